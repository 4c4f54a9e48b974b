"""common/teachers/imagenet.py: DiT against its pipeline of diffusers, SiT and EDM against forward
passes written here, on random weights in the real formats."""

import argparse
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import pipelines
from helpers.files import Bomb, edit
from helpers.teachers import (
    changed,
    check_other_views,
    copy_of,
    noise,
    quiet,
    reaches,
    relative,
    sample_as_pipeline,
)
from safetensors.torch import load_file, save_file

import dmd2
from common.errors import UserError
from common.sampling import teacher_sample
from common.schedules import EDM, VP, Flow, TrigFlow, equal_snr
from common.teachers.hub import HUB
from common.teachers.imagenet import sit_network, sit_time_waves
from common.teachers.load import load_model, load_teacher
from data.images import load_images

NAMES = ["dit", "sit", "edm"]


def load(folder, **options):
    return load_teacher(str(folder), text=dict(say=quiet, **options))


def saved_model(folder):
    return json.loads((folder / "distill.json").read_text())["model"]


# ---- DiT -----------------------------------------------------------------------------------------


def run_dit_pipeline(folder, labels, steps, w):
    """-> scheduler, latents that the pipeline decodes, its images in [0, 1]."""
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    decode, decoded = pipe.vae.decode, []

    def watch(z):
        decoded.append(z * pipe.vae.config.scaling_factor)
        return decode(z)

    pipe.vae.decode = watch
    images = pipe(
        labels,
        guidance_scale=w,
        generator=torch.Generator().manual_seed(steps),
        num_inference_steps=steps,
        output_type="np",
    ).images
    return pipe.scheduler, decoded[0], torch.from_numpy(images).permute(0, 3, 1, 2)


def test_shapes_of_dit(folders):
    model = load(folders("dit"))
    assert model.schedule.config["kind"] == "linear"
    assert model.classes == 1000
    assert model.shape == (4, 8, 8)
    assert model.image_shape == (3, 16, 16)
    assert model.null(2)["labels"].tolist() == [1000, 1000]


@torch.no_grad()
@pytest.mark.parametrize("w", [4.0, 1.0])
@pytest.mark.parametrize("steps", [2, 5])
def test_our_sampler_is_the_pipeline(steps, w, folders):
    model, labels = load(folders("dit")), [207, 0]
    z, cond = noise(steps, 2, 4, 8, 8), model.encode(labels)
    scheduler, theirs, images = run_dit_pipeline(folders("dit"), labels, steps, w)
    ours, _ = sample_as_pipeline(model, scheduler, z, cond, steps, w)
    assert relative(ours, theirs) < 1e-5
    assert (model.decode(ours) - images * 255).abs().max() <= 1
    check_other_views(model, theirs, scheduler, z, cond, steps, w)
    other, _ = sample_as_pipeline(model, scheduler, z, model.encode([1, 2]), steps, w)
    assert relative(other, theirs) > 1e-2  # labels matter


@torch.no_grad()
def test_unit_of_latents(folders):
    model = load(folders("dit"))
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    latents = model.vae.encode(pixels.float() / 127.5 - 1).latent_dist.mode() * 0.18215
    assert torch.allclose(model.encode_images(pixels), latents, atol=1e-5)
    assert model.encode_images(latents) is latents


@pytest.fixture
def old_format(folders, tmp_path):
    """The format of facebook/DiT-XL-2-256, which is older than safetensors and than the class."""
    folder = copy_of(folders, "dit", tmp_path)
    for part in ("transformer", "vae"):
        weights = folder / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), folder / part / "diffusion_pytorch_model.bin")
        weights.unlink()
    edit(
        folder / "transformer" / "config.json",
        _class_name="Transformer2DModel",
        cross_attention_dim=None,
        use_linear_projection=False,
    )
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    return folder


@torch.no_grad()
def test_the_format_on_the_hub(old_format, folders):
    old, new, x = load(old_format), load(folders("dit")), noise(0, 2, 4, 8, 8)
    cond = new.encode([3, 4])
    assert torch.equal(old(x, 0.6, 0.8, cond), new(x, 0.6, 0.8, cond))
    assert torch.equal(old.decode(x), new.decode(x))


def test_a_pickle_in_this_format_is_not_executed(old_format, tmp_path):
    torch.save(Bomb(tmp_path / "ran"), old_format / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="not loaded"):
        load(old_format)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name, option, says",
    [
        ("dit", dict(prompts=["dog"]), "--prompts: .*takes labels"),
        ("dit", dict(size=[16, 32]), "--size 16x32: expected a square"),
        ("dit", dict(frames=5), "--frames 5: .*DiTPipeline"),
        ("dit", dict(negative=""), "--negative-prompt: .* takes text, found .* takes labels"),
        (
            "dit",
            dict(guidance=2.0),
            "--embedded-guidance 2: expected a teacher whose network takes",
        ),
        ("edm", dict(size=[16, 16]), "--size: expected a teacher that is a pipeline"),
    ],
)
def test_flags_for_a_teacher_of_labels(name, option, says, folders):
    with pytest.raises(UserError, match=says):
        load(folders(name), **option)


def test_dense_times_of_dit(folders, tmp_path):
    """sana_sprint's --time dense: the network sees times in [0, 1]."""
    model, times = load(folders("dit")), []
    dense = model.copy().adapt()
    dense.net.transformer_blocks[0].norm1.emb.time_proj.register_forward_hook(
        lambda module, args, out: times.append(float(args[0][0]))
    )
    t = torch.tensor(500.0)
    alpha, sigma = dense.schedule.alpha(t), dense.schedule.sigma(t)
    dense(noise(0, 1, 4, 8, 8), alpha, sigma, dense.encode([0]))
    assert times[0] == 0.5

    dense.save(tmp_path, {})
    info = saved_model(tmp_path)
    assert load_model(tmp_path, info, model).dense
    with pytest.raises(UserError, match="adapted: expected none or dense"):
        load_model(tmp_path, dict(info, adapted=["qk_norm"]), model)


def test_sit_has_dense_times(folders):
    assert load(folders("sit")).dense


def test_a_smaller_student(folders, tmp_path):
    model = load(folders("dit"))
    model.copy(None, changed("num_layers=1")).save(tmp_path, {})
    info = saved_model(tmp_path)
    assert len(load_model(tmp_path, info, model).net.transformer_blocks) == 1


def test_students_of_another_size_are_refused(folders, tmp_path):
    model = load(folders("dit"))
    model.copy().save(tmp_path, {})
    edit(tmp_path / "config.json", sample_size=16)
    with pytest.raises(UserError, match="expected a network for"):
        load_model(tmp_path, saved_model(tmp_path), model)


# ---- SiT -----------------------------------------------------------------------------------------


def sit_forward(w, x, t, y, heads=2, patch=2):
    """The output of SiT as published, for x [B, C, H, W], its time t [B], labels y [B].

    w: checkpoint.
    """

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def modulate(h, shift, scale):
        variance = h.var(-1, unbiased=False, keepdim=True)
        normalised = (h - h.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
        return normalised * (1 + scale[:, None]) + shift[:, None]

    def attention(block, h):
        qkv = linear(f"{block}.attn.qkv", h).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
        weights = ((q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5).softmax(-1)
        return linear(f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))

    def mlp(block, h):
        h = F.gelu(linear(f"{block}.mlp.fc1", h), approximate="tanh")
        return linear(f"{block}.mlp.fc2", h)

    patches = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    h = patches.flatten(2).transpose(1, 2) + w["pos_embed"]
    phase = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    waves = torch.cat([phase.cos(), phase.sin()], 1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    c = c + w["y_embedder.embedding_table.weight"][y]
    for i in range(len([k for k in w if k.endswith("attn.proj.bias")])):
        block = f"blocks.{i}"
        modulation = linear(f"{block}.adaLN_modulation.1", F.silu(c)).chunk(6, 1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        h = h + gate_a[:, None] * attention(block, modulate(h, shift_a, scale_a))
        h = h + gate_m[:, None] * mlp(block, modulate(h, shift_m, scale_m))
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    h = linear("final_layer.linear", modulate(h, shift, scale))
    side, channels = x.shape[-1] // patch, h.shape[-1] // patch**2
    image = h.unflatten(1, (side, side)).unflatten(-1, (patch, patch, channels))
    image = image.permute(0, 5, 1, 3, 2, 4).reshape(len(x), channels, *x.shape[2:])
    return image[:, : x.shape[1]]  # without the learned sigma


def sit_velocity(w, x, t, y, repa):
    """noise - data at t, which is 1 at noise. REPA's networks have this convention."""
    if repa:
        return sit_forward(w, x, t, y)
    return -sit_forward(w, x, 1 - t, y)


def load_with_weights(folder):
    """-> model, checkpoint."""
    return load(folder), torch.load(folder / "sit.pt", weights_only=True)


sit_variants = pytest.mark.parametrize("projectors, out", [(0, 8), (1, 8), (0, 4), (1, 4)])


@sit_variants
@torch.no_grad()
def test_sit_is_the_published_network(projectors, out, folders):
    model, w = load_with_weights(folders("sit", out=out, projectors=projectors))
    x, y, t = noise(0, 3, 4, 8, 8), torch.tensor([3, 10, 0]), torch.tensor([1.0, 0.55, 0.1])
    raw = model.net(x, timestep=t, class_labels=y).sample
    assert raw.shape[1] == out
    expected = sit_forward(w, x, t, y)
    assert (raw[:, :4] - expected).abs().max() < 1e-5 * raw.abs().max()


@sit_variants
@torch.no_grad()
def test_estimates_of_sit(projectors, out, folders):
    """x0 = x - t u, in SiT's own schedule and in VP's scale."""
    model, w = load_with_weights(folders("sit", out=out, projectors=projectors))
    x, y, t = noise(0, 3, 4, 8, 8), torch.tensor([3, 10, 0]), torch.tensor([1.0, 0.55, 0.1])
    cond = dict(labels=y)
    x0 = model(x, 1 - t.double(), t.double(), cond)
    expected = x - t[:, None, None, None] * sit_velocity(w, x, t, y, projectors)
    assert (x0 - expected).abs().max() < 1e-5 * x0.abs().max()
    alpha = VP().alpha(300)
    again = model(x / 0.45 * alpha, alpha, alpha * 0.55 / 0.45, cond)
    assert relative(model(x, 0.45, 0.55, cond), again) < 1e-4


@sit_variants
@torch.no_grad()
def test_teacher_sampler_of_sit_is_euler(projectors, out, folders):
    model, w = load_with_weights(folders("sit", out=out, projectors=projectors))
    z, labels, null = noise(1, 2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([10, 10])
    x = z
    for t in (1.0, 0.75, 0.5, 0.25):
        times = torch.full((2,), t)
        u = sit_velocity(w, x, times, null, projectors)
        c = sit_velocity(w, x, times, labels, projectors)
        x = x - 0.25 * (u + 1.5 * (c - u))
    ours = teacher_sample(model, z, model.encode(labels), 4, 1.5)
    assert relative(ours, x) < 1e-4


@pytest.mark.parametrize("projectors, convention", [(0, "sit"), (1, "repa")])
def test_convention_follows_from_the_projectors(projectors, convention, folders):
    model = load(folders("sit", projectors=projectors))
    assert model.convention == convention
    assert model.classes == 10
    assert model.null(1)["labels"].tolist() == [10]


@torch.no_grad()
def test_convention_in_teacher_json(folders, tmp_path):
    folder = copy_of(folders, "sit", tmp_path)
    model = dict(adapter="sit", weights="sit.pt", heads=2, convention="repa")
    edit(folder / "teacher.json", model=model)
    model, w = load_with_weights(folder)
    x = noise(0, 1, 4, 8, 8)
    expected = x - 0.3 * sit_forward(w, x, torch.tensor([0.3]), torch.tensor([1]))
    assert (model(x, 0.7, 0.3, model.encode([1])) - expected).abs().max() < 1e-5


def late_name(name):
    """REPA's first checkpoints number the blocks behind the projectors anew."""
    parts = name.split(".", 2)
    if parts[0] != "blocks" or int(parts[1]) < 3:
        return name
    return f"decoder_blocks.{int(parts[1]) - 3}.{parts[2]}"


def test_forms_of_checkpoints(tmp_path):
    w = pipelines.sit_weights(depth=4, projectors=True)
    save_file(w, tmp_path / "repa.safetensors")
    ema = {late_name(k): v for k, v in w.items()}
    flags = argparse.Namespace(lr=1e-4)
    torch.save(dict(ema=ema, model={}, opt={}, args=flags, steps=5), tmp_path / "repa.pt")
    one, _ = sit_network(tmp_path / "repa.pt", 2)
    two, has_projectors = sit_network(tmp_path / "repa.safetensors", 2)
    assert has_projectors
    assert len(two.transformer_blocks) == 4
    assert two.config.norm_eps == 1e-6
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_heads_by_the_width(tmp_path):
    save_file(pipelines.sit_weights(width=384, depth=1), tmp_path / "s.safetensors")
    net, _ = sit_network(tmp_path / "s.safetensors")
    assert net.config.num_attention_heads == 6  # SiT-S


MARKER = "/tmp/ran-by-a-checkpoint"
SPOILT = {  # what is done to a checkpoint: what the message must say
    "no bias": (
        lambda w: w.pop("blocks.1.mlp.fc1.bias"),
        "blocks.1.mlp.fc1.bias of SiT is missing",
    ),
    "no embedder": (
        lambda w: w.pop("x_embedder.proj.weight"),
        "x_embedder.proj.weight of SiT is missing",
    ),
    "one tensor more": (
        lambda w: w.update(dt=torch.zeros(1)),
        "1 tensors that SiT does not have, the first is dt",
    ),
    "a block that is no number": (
        lambda w: w.update({"decoder_blocks.x": torch.zeros(1)}),
        "1 tensors that SiT does not have, the first is decoder_blocks.x",
    ),
    "another shape": (
        lambda w: w.update({"blocks.0.attn.proj.weight": torch.zeros(3, 3)}),
        "expected the shapes of SiT",
    ),
    "another number of dimensions": (
        lambda w: w.update({"x_embedder.proj.weight": torch.zeros(3)}),
        "expected the shapes of SiT",
    ),
    "positions of one dimension": (
        lambda w: w.update(pos_embed=torch.zeros(3)),
        "expected the shapes of SiT",
    ),
    "other positions": (
        lambda w: w.update(pos_embed=w["pos_embed"].flip(2)),
        "pos_embed: expected the sines and cosines of SiT",
    ),
    "a number": (lambda w: w.update(opt=3), "expected a state dict"),
    "code": (lambda w: w.update(code=Bomb(MARKER)), "without running code"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_foreign_checkpoints(name, tmp_path):
    spoil, says = SPOILT[name]
    w = pipelines.sit_weights()
    spoil(w)
    torch.save(w, tmp_path / "x.pt")
    with pytest.raises(UserError, match=says) as e:
        sit_network(tmp_path / "x.pt", 2)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(weights=None), "weights: expected a file in this folder, found None"),
        (dict(weights="none.pt"), "none.pt: expected the weights of SiT, found no such file"),
        (dict(heads="two"), "heads: expected an integer >= 1, found 'two'"),
        (dict(heads=None), "heads: expected, in teacher.json, the number"),
        (dict(heads=3), "heads: expected, in teacher.json, the number"),
        (dict(convention="dit"), "convention: expected sit or repa, found 'dit'"),
        (dict(vae="../../x"), "vae: expected a file in this folder"),
        (dict(vae=3), "vae: expected a file in this folder"),
        (dict(vae="no such folder"), "vae: expected a folder of an AutoencoderKL there or a name"),
    ],
)
def test_bad_teacher_json_of_sit(change, says, folders, tmp_path):
    folder = copy_of(folders, "sit", tmp_path)
    model = dict(adapter="sit", weights="sit.pt", heads=2)
    edit(folder / "teacher.json", model=model | change)
    with pytest.raises(UserError, match=says):
        load(folder)


@torch.no_grad()
def test_sit_student_in_plain_diffusers(folders, tmp_path):
    """With the one change that its config.json cannot say."""
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import Timesteps

    model = load(folders("sit"))
    model.copy().save(tmp_path, {})
    net = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    x, labels = noise(0, 2, 4, 8, 8), torch.tensor([1, 2])
    v = net(x, timestep=torch.zeros(2), class_labels=labels).sample[:, :4]  # data - noise
    assert torch.allclose(model(x, 0.0, 1.0, model.encode(labels)), x + v, atol=1e-6)


def test_a_student_keeps_its_convention(folders, tmp_path):
    load(folders("sit")).copy().save(tmp_path, {})
    info, other = saved_model(tmp_path), load(folders("sit", projectors=True))
    assert other.convention == "repa"
    assert load_model(tmp_path, info, other).convention == "sit"
    del info["convention"]
    with pytest.raises(UserError, match="convention: expected sit or repa"):
        load_model(tmp_path, info, other)


# ---- EDM -----------------------------------------------------------------------------------------


def edm_denoiser(folder, time_scale=1000):
    """D(x; sigma) of Karras et al. 2022, table 1, around the network as diffusers loads it."""
    from diffusers import UNet2DModel

    net = UNet2DModel.from_pretrained(folder).eval()

    def denoise(x, sigma, labels):
        s, d = torch.as_tensor(sigma, dtype=torch.float64), 0.5
        c_skip = d**2 / (s**2 + d**2)
        c_out = s * d / (s**2 + d**2) ** 0.5
        c_in = 1 / (s**2 + d**2) ** 0.5
        time = time_scale * s.log() / 4
        out = net((c_in * x.double()).float(), time.float(), labels).sample
        return c_skip * x.double() + c_out * out.double()

    return denoise


def edm_sampler(denoise, z, n, heun):
    """Algorithm 1 of the paper without churn, from pure noise to 0. denoise(x, sigma)."""
    i = torch.arange(n, dtype=torch.float64)
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    t = [*(high + i / (n - 1) * (low - high)) ** 7, torch.tensor(0.0)]
    x = z.double() * t[0]
    for a, b in zip(t[:-1], t[1:]):
        d = (x - denoise(x, a)) / a
        y = x + (b - a) * d
        if heun and b:
            y = x + (b - a) * (d + (y - denoise(y, b)) / b) / 2
        x = y
    return x


edm_scales = pytest.mark.parametrize("time_scale", [1000, 1])


@edm_scales
@torch.no_grad()
def test_estimates_of_edm_are_the_papers(time_scale, folders):
    folder = folders("edm", time_scale=time_scale)
    model, denoise = load(folder), edm_denoiser(folder, time_scale)
    labels = torch.tensor([3, 0])
    cond = model.encode(labels)
    for sigma in (0.01, 0.5, 20.0):
        x = noise(1, 2, 3, 8, 8) * sigma
        expected = denoise(x, sigma, labels)
        found = model(x, 1.0, sigma, cond)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        for view in (VP(), Flow()):
            alpha = view.alpha(view.t_from_snr(1 / torch.tensor(sigma, dtype=torch.float64) ** 2))
            found = model((x * alpha).float(), alpha, alpha * sigma, cond)
            assert relative(found, expected) < 1e-4, view.config


@edm_scales
@torch.no_grad()
@pytest.mark.parametrize("n", [3, 6])
def test_samples_of_edm_are_the_papers(n, time_scale, folders):
    folder = folders("edm", time_scale=time_scale)
    model, denoise = load(folder), edm_denoiser(folder, time_scale)
    z, labels = noise(0, 2, 3, 8, 8), torch.tensor([3, 0])
    cond = model.encode(labels)
    for heun in (False, True):
        expected = edm_sampler(lambda x, s: denoise(x, s, labels), z, n, heun)
        ours = edm_sampler(lambda x, s: model(x.float(), 1.0, s, cond).double(), z, n, heun)
        assert relative(ours, expected) < 1e-4
    euler = edm_sampler(lambda x, s: denoise(x, s, labels), z, n, False)
    assert relative(teacher_sample(model, z, cond, n), euler) < 1e-4


@torch.no_grad()
def test_samples_of_edm_are_those_of_diffusers(folders):
    """Preconditioning and times of EDMEulerScheduler."""
    from diffusers import EDMEulerScheduler

    model = load(folders("edm", time_scale=1))
    labels, z = torch.tensor([1, 2]), noise(2, 2, 3, 8, 8)
    scheduler = EDMEulerScheduler(
        0.002, 80.0, 0.5, prediction_type="epsilon", sigma_schedule="karras"
    )
    scheduler.set_timesteps(4)
    x = z * scheduler.sigmas[0]
    for t in scheduler.timesteps:
        out = model.net(scheduler.scale_model_input(x, t), t.expand(2), labels).sample
        x = scheduler.step(out, t, x, return_dict=False)[0]
    assert relative(teacher_sample(model, z, model.encode(labels), 4), x) < 1e-4


@torch.no_grad()
def test_time_of_openais_networks_is_that_of_diffusers(folders):
    from diffusers import CMStochasticIterativeScheduler

    model, times = load(folders("edm", time_scale=1000)), []
    model.net.time_proj.register_forward_hook(lambda module, args, out: times.append(args[0]))
    model(noise(2, 2, 3, 8, 8), 1.0, 7.0, model.encode([1, 2]))
    expected = CMStochasticIterativeScheduler().sigma_to_t([7.0])[0]
    assert float(times[0][0]) == pytest.approx(float(expected), rel=1e-5)


def test_edm_without_a_null_label(folders):
    model, x = load(folders("edm")), noise(0, 2, 3, 8, 8)
    cond = model.encode([1, 2])
    assert torch.equal(model.guided(x, 1.0, 2.0, cond, 1), model(x, 1.0, 2.0, cond))
    with pytest.raises(UserError, match="--cfg: expected 1.*no null label"):
        model.guided(x, 1.0, 2.0, cond, 2.0)
    with pytest.raises(UserError, match="--cfg: expected 1.*no null label"):
        model.null(1)


def test_edm_with_a_null_label(folders):
    model, x = load(folders("edm", null=True)), noise(0, 2, 3, 8, 8)
    cond = model.encode([1, 2])
    u = model(x, 1.0, 2.0, dict(labels=torch.tensor([10, 10])))
    c = model(x, 1.0, 2.0, cond)
    assert not torch.equal(u, c)
    assert torch.allclose(model.guided(x, 1.0, 2.0, cond, 3.0), u + 3 * (c - u), atol=1e-5)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(schedule=dict(name="flow")), "expected schedule edm"),
        (dict(prediction="eps"), "expected schedule edm, prediction edm"),
        (dict(time_scale=0), "time_scale: expected a number > 0, found 0"),
        (dict(time_scale="x"), "time_scale: expected a number > 0, found 'x'"),
        (dict(classes=8), "shape and classes: expected .*10.*found .*8"),
        (dict(shape=[3, 16, 16]), "shape and classes"),
        (dict(sigma_data=-1), "sigma_data: expected a number > 0, found -1"),
        (dict(sigma_data=None), "sigma_data: expected a number > 0, found None"),
    ],
)
def test_bad_teacher_json_of_edm(change, says, folders, tmp_path):
    folder = copy_of(folders, "edm", tmp_path)
    info = json.loads((folder / "teacher.json").read_text())
    edit(folder / "teacher.json", model=info["model"] | change)
    with pytest.raises(UserError, match=says):
        load(folder)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(class_embed_type="identity"), "class_embed_type"),
        (dict(mid_block_type=None), "mid_block_type"),
        (dict(_class_name="UNet2DConditionModel"), "_class_name: expected UNet2DModel"),
    ],
)
def test_bad_config_of_edm(change, says, folders, tmp_path):
    folder = copy_of(folders, "edm", tmp_path)
    edit(folder / "config.json", **change)
    with pytest.raises(UserError, match=says):
        load(folder)


# ---- all of them ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_same_estimate_in_another_schedule(name, folders):
    """At the network's own levels, wherever the other schedule has them.

    DiT's last level has sigma / alpha = 157; EDM ends at 80.
    """
    model = load(folders(name, null=True) if name == "edm" else folders(name))
    x0, eps = noise(0, 2, *model.shape), noise(1, 2, *model.shape)
    cond, own = model.encode([0, 1]), model.schedule
    views = [EDM(), VP(), VP(1000, 1e-4, 0.02, "linear"), Flow(), TrigFlow()]
    views = [view for view in views if view.config["name"] != own.config["name"]]
    levels = own.grid(1000)[[999, 990, 800, 500, 200, 50, 5]]
    compared = 0
    for t in levels:
        a, s = own.alpha(t), own.sigma(t)
        x = a * x0 + s * eps
        for w in (1.0, 3.0):
            here = model.guided(x.float(), a, s, cond, w)
            for view in views:
                if not reaches(view, a, s):
                    continue
                _, a2, s2, scale = equal_snr(view, a, s)
                there = model.guided((scale * x).float(), a2, s2, cond, w)
                assert relative(there, here) < 1e-4, (float(t), w, view.config)
                compared += 1
    assert compared >= 2 * (len(levels) * len(views) - 8)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_starts_as_the_teacher(name, folders):
    model = load(folders(name))
    cond, x = model.encode([0, 1]), noise(0, 2, *model.shape)
    student = model.copy()
    assert torch.equal(student(x, 0.6, 0.8, cond), model(x, 0.6, 0.8, cond))
    own = {id(p) for p in student.parameters()}
    assert own == {id(p) for p in student.net.parameters()}  # no VAE


@pytest.mark.parametrize("name", NAMES)
def test_features_carry_gradient_to_the_copy_alone(name, folders):
    model = load(folders(name))
    student = model.copy()
    (h,) = student(noise(0, 2, *model.shape), 0.6, 0.8, model.encode([0, 1]), features=True)
    assert h.ndim == 4
    assert h.shape[-1] == h.shape[-2] > 1
    assert h.dtype == torch.float32
    h.sum().backward()
    assert any(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_new_conditions_and_files(name, folders, tmp_path):
    model = load(folders(name))
    cond, x = model.encode([0, 1]), noise(0, 2, *model.shape)
    student = model.copy()
    before = student(x, 0.6, 0.8, cond)
    student.extend("r")
    cond["r"] = torch.rand(2)
    assert torch.equal(student(x, 0.6, 0.8, cond), before)
    student.extras["r"].layers[2].weight.data.normal_()
    with torch.no_grad():
        after = student(x, 0.6, 0.8, cond)
    assert not torch.allclose(after, before)

    student.train()  # brings neither dropout nor dropped labels
    with torch.no_grad():
        assert torch.equal(student(x, 0.6, 0.8, cond), after)

    student.save(tmp_path, {})
    loaded = load_model(tmp_path, saved_model(tmp_path), model)
    assert loaded.config() == student.config()
    with torch.no_grad():
        assert torch.equal(loaded(x, 0.6, 0.8, cond), after)

    student.checkpoint_activations()
    y = student(x, 0.6, 0.8, cond)
    y.sum().backward()
    assert torch.allclose(y, after, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_bf16(name, folders):
    """As on a GPU: latent networks have bf16 weights, the rest runs under autocast."""
    full = load(folders(name))
    half = load_teacher(str(folders(name)), dtype=torch.bfloat16, text=dict(say=quiet))
    x, cond = noise(0, 2, *full.shape), full.encode([1, 2])
    a, b = full.guided(x, 0.8, 0.6, cond, 1), half.guided(x, 0.8, 0.6, cond, 1)
    assert b.dtype == torch.float32
    assert 0 < relative(b, a) < 0.03
    weights = torch.float32 if name == "edm" else torch.bfloat16
    assert next(half.net.parameters()).dtype == weights
    # what is trained starts from the file's digits, not from the teacher's rounded ones
    student = half.copy().net
    assert student.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), full.net.parameters()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["dit", "sit"])
def test_vae_in_bf16(name, folders):
    full = load(folders(name))
    half = load_teacher(str(folders(name)), dtype=torch.bfloat16, text=dict(say=quiet))
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert half.decode(noise(0, 2, *full.shape)).dtype == torch.uint8
    assert (half.encode_images(pixels) - full.encode_images(pixels)).abs().max() < 0.05


def test_dit_on_the_hub():
    assert HUB["dit-xl-256"] == "facebook/DiT-XL-2-256"


def test_latents_of_class_folders(pictures, folders, tmp_path):
    model, lines = load(folders("dit"), cache=tmp_path), []
    images = load_images(str(pictures), model, lines.append)
    assert images.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert images.names == ["0", "1", "2"]
    assert "9 images, 3 classes, 0 skipped" in lines[-1]
    x, labels = images.batch(0, 4)
    assert x.shape == (4, 4, 8, 8)
    assert torch.equal(model.encode_images(x), x)
    assert model.encode(labels)["labels"].tolist() == labels.tolist()

    model.encode_images = None  # calling it would fail
    again = load_images(str(pictures), model, lines.append)
    assert torch.equal(again.batch(0, 4)[0], x)
    assert "read from" in lines[-2]


def test_too_many_classes(pictures, folders, tmp_path):
    model = load(folders("dit"), cache=tmp_path)
    model.classes = 2
    with pytest.raises(UserError, match="at most 2 class"):
        load_images(str(pictures), model)


def test_no_images(folders):
    with pytest.raises(UserError, match="ships no images; give a folder with one subfolder"):
        load_images(None, load(folders("dit")))


def test_no_class_folders_with_images(folders, tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="found none readable .0 skipped."):
        load_images(str(tmp_path / "set"), load(folders("dit"), cache=tmp_path), quiet)


# ---- scripts -------------------------------------------------------------------------------------


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name, nfe, gan",
    [
        ("dit", 1, True),
        ("edm", 4, True),
        slow("dit", 4, False),
        slow("dit", 4, True),
        slow("dit", 1, False),
        slow("edm", 1, False),
        slow("edm", 1, True),
        slow("edm", 4, False),
        slow("sit", 1, True),
    ],
)
def test_dmd2_on_it(name, nfe, gan, folders, pictures, scripts, tmp_path):
    """Three iterations, pictures, export, resume; the student is loaded by diffusers."""
    import diffusers

    scripts.load(*pipelines.MODULES)
    out = tmp_path / "run"
    flags = ["--teacher", folders(name), "--nfe", nfe, "--cfg", 1 if name == "edm" else 2]
    flags += ["--batch", 4, "--lr", 1e-3, "--warmup", 0]
    flags += ["--cache-prompts", tmp_path / "cache", "--out", out]
    if gan:
        flags += ["--gan", "--data", pictures]
    p = scripts.run("dmd2.py", *flags, "--smoke")
    assert "brings no metric" in p.out
    assert "Traceback" not in p.err
    assert (out / "samples" / "00000003.png").exists()

    info = json.loads((out / "student" / "distill.json").read_text())
    teacher = load(folders(name))
    student = load_model(out / "student", info["model"], teacher)
    net = getattr(diffusers, teacher.network_class).from_pretrained(out / "student").eval()
    net = sit_time_waves(net) if name == "sit" else net
    z, cond = noise(0, 2, *teacher.shape), teacher.encode([0, 1])

    def sample(model):
        with torch.no_grad():
            return dmd2.sample(model, z, cond, nfe, lambda: torch.zeros_like(z), **info["sampler"])

    assert torch.equal(sample(student), sample(teacher.with_network(net)))
    assert not torch.equal(sample(student), sample(teacher))
    if gan:
        more = ["--iters", 4, "--resume", "--eval-n", 0, "--sample-every", 0]
        again = scripts.run("dmd2.py", *flags, *more)
        assert "resumed it-00000003.pt" in again.out
        assert name == "edm" or "read from" in again.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, name, flags",
    [
        ("sana_sprint", "dit", ["--time", "dense"]),
        ("twinflow", "sit", []),
        ("sid", "edm", ["--gan", "--cfg", 1]),
        ("flowmap", "sit", ["--cfg", 2]),
    ],
)
def test_other_methods(method, name, flags, folders, pictures, scripts, tmp_path):
    scripts.load(*pipelines.MODULES)
    out = tmp_path / "run"
    flags = [
        "--teacher",
        folders(name),
        "--batch",
        8,
        "--cache-prompts",
        tmp_path / "cache",
        *flags,
    ]
    if method != "flowmap":
        flags += ["--data", pictures]
    scripts.run(f"{method}.py", *flags, "--smoke", "--out", out)
    teacher = load(folders(name))
    info = saved_model(out / "student")
    student = load_model(out / "student", info, teacher)
    assert student.config() == info
    if name != "edm":
        assert student.dense


def test_guidance_without_a_null_label(folders, scripts, tmp_path):
    scripts.load(*pipelines.MODULES)
    flags = ["--teacher", folders("edm"), "--cfg", 2, "--batch", 4, "--smoke"]
    p = scripts.run("dmd2.py", *flags, "--out", tmp_path / "run", code=2)
    assert p.err.count("\n") == 1
    assert "--cfg: expected 1" in p.err

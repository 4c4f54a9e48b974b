"""common/teachers_class.py: DiT against its pipeline of diffusers, SiT and EDM against forward passes written here, on random weights in the real formats."""

import argparse
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import pipelines
from safetensors.torch import load_file, save_file
from test_data import picture
from test_teachers import native, reaches, through_other_schedules

import dmd2
from common.data import load_images
from common.errors import UserError
from common.sampling import teacher_sample
from common.schedules import EDM, VP, Flow, TrigFlow, equal_snr
from common.teachers.imagenet import sit_network, sit_time_waves
from common.teachers.load import HUB, load_model, load_teacher


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, made = tmp_path_factory.mktemp("classes"), {}

    def get(name, **kw):
        key = f"{name}-{'-'.join(f'{k}{v}' for k, v in kw.items())}"
        if key not in made:
            (base / key).mkdir()
            made[key] = getattr(pipelines, name)(base / key, **kw)
        return made[key]

    return get


def load(folder, **text):
    return load_teacher(str(folder), text=dict(say=lambda *a: None, **text))


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- DiT --------------------------------------------------------------------------------------------------------------------------------


def run_pipeline(folder, labels, steps, w):
    """-> scheduler, latents that the pipeline decodes, its images."""
    from diffusers import DiTPipeline

    pipe, seen = DiTPipeline.from_pretrained(folder), []
    pipe.set_progress_bar_config(disable=True)
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z: (seen.append(z * pipe.vae.config.scaling_factor), decode(z))[1]
    images = pipe(
        labels,
        guidance_scale=w,
        generator=torch.Generator().manual_seed(steps),
        num_inference_steps=steps,
        output_type="np",
    ).images
    return pipe.scheduler, seen[0], torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("steps", [2, 5])
def test_our_sampler_is_the_pipeline(steps, folders):
    model, labels = load(folders("dit")), [207, 0]
    assert (
        model.schedule.config["kind"] == "linear"
        and model.classes == 1000
        and model.shape == (4, 8, 8)
        and model.image_shape == (3, 16, 16)
    )
    z = noise(steps, 2, 4, 8, 8)
    with torch.no_grad():
        for w in (4.0, 1.0):
            scheduler, theirs, images = run_pipeline(folders("dit"), labels, steps, w)
            ours = native(model, scheduler, z, model.encode(labels), steps, w, "vp")
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()
            assert (model.decode(ours) - images * 255).abs().max() <= 1
            through_other_schedules(
                model, theirs, scheduler, z, model.encode(labels), steps, w, "vp"
            )
        other = native(model, scheduler, z, model.encode([1, 2]), steps, 1.0, "vp")
    assert (other - theirs).norm() > 1e-2 * theirs.norm()  # labels matter
    assert torch.equal(model.null(2)["labels"], torch.tensor([1000, 1000]))


def test_unit_of_latents(folders):
    model = load(folders("dit"))
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        direct = model.vae.encode(pixels.float() / 127.5 - 1).latent_dist.mode() * 0.18215
    assert (
        torch.allclose(model.encode_images(pixels), direct, atol=1e-5)
        and model.encode_images(direct) is direct
    )


def test_the_form_on_the_hub(folders, tmp_path):
    """facebook/DiT-XL-2-256 is older than safetensors and than DiTTransformer2DModel. What a pickle would run is not run."""
    folder = shutil.copytree(folders("dit"), tmp_path / "old")
    for part in ("transformer", "vae"):
        weights = folder / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), folder / part / "diffusion_pytorch_model.bin")
        weights.unlink()
    for name, change in (
        (
            "transformer/config.json",
            dict(
                _class_name="Transformer2DModel",
                cross_attention_dim=None,
                use_linear_projection=False,
            ),
        ),
        ("model_index.json", dict(transformer=["diffusers", "Transformer2DModel"])),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    old, new, x = load(folder), load(folders("dit")), noise(0, 2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(
            old(x, 0.6, 0.8, old.encode([3, 4])), new(x, 0.6, 0.8, new.encode([3, 4]))
        ) and torch.equal(old.decode(x), new.decode(x))
    torch.save(Evil(tmp_path / "ran"), folder / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="not loaded"):
        load(folder)
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_flags_for_a_teacher_of_labels(folders):
    for text, says in (
        (dict(prompts="prompts.txt"), "--prompts: .*takes labels"),
        (dict(size=[16, 32]), "--size 16x32: expected a square"),
        (dict(frames=5), "--frames 5: .*DiTPipeline"),
        (dict(guidance=2.0), "--embedded-guidance 2: expected a teacher whose network takes"),
    ):
        with pytest.raises(UserError, match=says):
            load(folders("dit"), **text)
    with pytest.raises(UserError, match="--size: expected a teacher that is a pipeline"):
        load(folders("edm"), size=[16, 16])


# ---- SiT --------------------------------------------------------------------------------------------------------------------------------


def sit_forward(w, x, t, y, heads=2, patch=2):
    """SiT as published: what the network says for x [B, C, H, W], its time t [B], labels y [B]. w: checkpoint."""
    linear = lambda name, h: h @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    norm = lambda h: (
        (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    )
    modulate = lambda h, shift, scale: norm(h) * (1 + scale[:, None]) + shift[:, None]
    h = (
        F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
        .flatten(2)
        .transpose(1, 2)
        + w["pos_embed"]
    )
    waves = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = (
        linear(
            "t_embedder.mlp.2",
            F.silu(linear("t_embedder.mlp.0", torch.cat([waves.cos(), waves.sin()], 1))),
        )
        + w["y_embedder.embedding_table.weight"][y]
    )
    for i in range(len([k for k in w if k.endswith("attn.proj.bias")])):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(
            f"blocks.{i}.adaLN_modulation.1", F.silu(c)
        ).chunk(6, 1)
        q, k, v = (
            p.unflatten(-1, (heads, -1)).transpose(1, 2)
            for p in linear(f"blocks.{i}.attn.qkv", modulate(h, shift_a, scale_a)).chunk(3, -1)
        )
        a = ((q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5).softmax(-1) @ v
        h = h + gate_a[:, None] * linear(f"blocks.{i}.attn.proj", a.transpose(1, 2).flatten(2))
        m = F.gelu(linear(f"blocks.{i}.mlp.fc1", modulate(h, shift_m, scale_m)), approximate="tanh")
        h = h + gate_m[:, None] * linear(f"blocks.{i}.mlp.fc2", m)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    h = linear("final_layer.linear", modulate(h, shift, scale))
    side, channels = x.shape[-1] // patch, h.shape[-1] // patch**2
    image = (
        h.unflatten(1, (side, side))
        .unflatten(-1, (patch, patch, channels))
        .permute(0, 5, 1, 3, 2, 4)
        .reshape(len(x), channels, *x.shape[2:])
    )
    return image[:, : x.shape[1]]  # the learned sigma is not part of the velocity


@pytest.mark.parametrize("out", [8, 4])
@pytest.mark.parametrize("projectors", [False, True])
def test_sit_is_the_published_network(projectors, out, folders):
    folder = folders("sit", out=out, projectors=projectors)
    model, w = load(folder), torch.load(folder / "sit.pt", weights_only=True)
    x, y, t = noise(0, 3, 4, 8, 8), torch.tensor([3, 10, 0]), torch.tensor([1.0, 0.55, 0.1])
    assert (
        model.convention == ("repa" if projectors else "sit")
        and model.classes == 10
        and torch.equal(model.null(1)["labels"], torch.tensor([10]))
    )
    with torch.no_grad():
        raw = model.net(x, timestep=t, class_labels=y).sample
        assert (
            raw.shape[1] == out
            and (raw[:, :4] - sit_forward(w, x, t, y)).abs().max() < 1e-5 * raw.abs().max()
        )
        to_noise = (
            sit_forward(w, x, t, y) if projectors else -sit_forward(w, x, 1 - t, y)
        )  # noise - data, at t = 1 noise
        x0 = model(x, 1 - t.double(), t.double(), dict(labels=y))
        assert (x0 - (x - t[:, None, None, None] * to_noise)).abs().max() < 1e-5 * x0.abs().max()
        again = model(
            x / (1 - 0.55) * VP().alpha(300),
            VP().alpha(300),
            VP().alpha(300) * 0.55 / 0.45,
            dict(labels=y),
        )  # the same noise level, asked in VP's scale
        assert (again - model(x, 0.45, 0.55, dict(labels=y))).norm() < 1e-4 * again.norm()
        # the teacher's own sampler against Euler steps from noise to data, guided
        z, cond, null = noise(1, 2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([10, 10])
        x, said = (
            z,
            lambda x, t, y: (
                sit_forward(w, x, torch.full((2,), t), y)
                if projectors
                else -sit_forward(w, x, torch.full((2,), 1 - t), y)
            ),
        )
        for t in (1.0, 0.75, 0.5, 0.25):
            x = x - 0.25 * (said(x, t, null) + 1.5 * (said(x, t, cond) - said(x, t, null)))
        assert (teacher_sample(model, z, model.encode(cond), 4, 1.5) - x).norm() < 1e-4 * x.norm()


def test_convention_can_be_said(folders, tmp_path):
    folder, x = shutil.copytree(folders("sit"), tmp_path / "said"), noise(0, 1, 4, 8, 8)
    (folder / "teacher.json").write_text(
        json.dumps(
            {"model": {"adapter": "sit", "weights": "sit.pt", "heads": 2, "convention": "repa"}}
        )
    )
    model, w = load(folder), torch.load(folder / "sit.pt", weights_only=True)
    with torch.no_grad():
        want = x - 0.3 * sit_forward(w, x, torch.tensor([0.3]), torch.tensor([1]))
        assert (model(x, 0.7, 0.3, model.encode([1])) - want).abs().max() < 1e-5


def test_forms_of_checkpoints(tmp_path):
    w = pipelines.sit_weights(depth=4, projectors=True)
    late = lambda k: (
        k
        if not k.startswith("blocks.") or int(k.split(".")[1]) < 3
        else f"decoder_blocks.{int(k.split('.')[1]) - 3}.{k.split('.', 2)[2]}"
    )
    torch.save(
        dict(
            ema={late(k): v for k, v in w.items()},
            model={},
            opt={},
            args=argparse.Namespace(lr=1e-4),
            steps=5,
        ),
        tmp_path / "repa.pt",
    )
    save_file(w, tmp_path / "repa.safetensors")
    one, _ = sit_network(tmp_path / "repa.pt", 2)
    two, repa = sit_network(tmp_path / "repa.safetensors", 2)
    assert repa and all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    assert len(two.transformer_blocks) == 4 and two.config.norm_eps == 1e-6
    save_file(pipelines.sit_weights(width=384, depth=1), tmp_path / "s.safetensors")
    assert (
        sit_network(tmp_path / "s.safetensors")[0].config.num_attention_heads == 6
    )  # SiT-S, by its width


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda w: w.pop("blocks.1.mlp.fc1.bias"), "blocks.1.mlp.fc1.bias of SiT is missing"),
        (lambda w: w.pop("x_embedder.proj.weight"), "x_embedder.proj.weight of SiT is missing"),
        (
            lambda w: w.update(dt=torch.zeros(1)),
            "1 tensors that SiT does not have, the first is dt",
        ),
        (
            lambda w: w.update({"blocks.0.attn.proj.weight": torch.zeros(3, 3)}),
            "expected the shapes of SiT",
        ),
        (
            lambda w: w.update({"x_embedder.proj.weight": torch.zeros(3)}),
            "expected the shapes of SiT",
        ),
        (lambda w: w.update(pos_embed=w["pos_embed"].flip(2)), "pos_embed"),
        (lambda w: w.update(opt=3), "expected a state dict"),
        (lambda w: w.update(code=Evil("/tmp/ran-by-a-checkpoint")), "without running code"),
    ],
)
def test_foreign_checkpoints(spoil, says, tmp_path):
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
        (dict(heads=3), "heads: expected"),
        (dict(convention="dit"), "convention: expected sit or repa, found 'dit'"),
        (dict(vae="../../x"), "vae: expected a file in this folder"),
        (dict(vae=3), "vae: expected a file in this folder"),
    ],
)
def test_bad_teacher_json_of_sit(change, says, folders, tmp_path):
    folder = shutil.copytree(folders("sit"), tmp_path / "bad")
    (folder / "teacher.json").write_text(
        json.dumps({"model": dict(adapter="sit", weights="sit.pt", heads=2) | change})
    )
    with pytest.raises(UserError, match=says):
        load(folder)


def test_sit_student_in_plain_diffusers(folders, tmp_path):
    """With the one change that its config.json cannot say."""
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import Timesteps

    model = load(folders("sit"))
    model.copy().save(tmp_path / "student", {})
    info, other = (
        json.loads((tmp_path / "student" / "distill.json").read_text())["model"],
        load(folders("sit", projectors=True)),
    )
    assert (other.convention, load_model(tmp_path / "student", info, other).convention) == (
        "repa",
        "sit",
    )
    with pytest.raises(UserError, match="convention: expected sit or repa"):
        load_model(
            tmp_path / "student", {k: v for k, v in info.items() if k != "convention"}, model
        )
    net, x, labels = (
        DiTTransformer2DModel.from_pretrained(tmp_path / "student").eval(),
        noise(0, 2, 4, 8, 8),
        torch.tensor([1, 2]),
    )
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    with torch.no_grad():
        v = net(x, timestep=torch.zeros(2), class_labels=labels).sample[
            :, :4
        ]  # data - noise, at noise
        assert torch.allclose(model(x, 0.0, 1.0, model.encode(labels)), x + v, atol=1e-6)


# ---- EDM --------------------------------------------------------------------------------------------------------------------------------


def edm_denoiser(folder, time_scale=1000):
    """D(x; sigma) of Karras et al. 2022, table 1, around the network as diffusers loads it."""
    from diffusers import UNet2DModel

    net = UNet2DModel.from_pretrained(folder).eval()

    def D(x, sigma, labels):
        s, d = torch.as_tensor(sigma, dtype=torch.float64), 0.5
        skip, out, c_in = (
            d**2 / (s**2 + d**2),
            s * d / (s**2 + d**2) ** 0.5,
            1 / (s**2 + d**2) ** 0.5,
        )
        said = net((c_in * x.double()).float(), (time_scale * s.log() / 4).float(), labels).sample
        return skip * x.double() + out * said.double()

    return D


def edm_sampler(D, z, n, heun):
    """Algorithm 1 of the paper without churn, from pure noise to 0."""
    i = torch.arange(n, dtype=torch.float64)
    t = [
        *(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7,
        torch.tensor(0.0),
    ]
    x = z.double() * t[0]
    for a, b in zip(t[:-1], t[1:]):
        d = (x - D(x, a)) / a
        y = x + (b - a) * d
        x = x + (b - a) * (d + (y - D(y, b)) / b) / 2 if heun and b else y
    return x


@pytest.mark.parametrize("time_scale", [1000, 1])
@torch.no_grad()
def test_edm_is_the_paper(time_scale, folders):
    folder = folders("edm", time_scale=time_scale)
    model, D, labels = load(folder), edm_denoiser(folder, time_scale), torch.tensor([3, 0])
    cond, z = model.encode(labels), noise(0, 2, 3, 8, 8)
    for sigma in (0.01, 0.5, 20.0):
        x = noise(1, 2, 3, 8, 8) * sigma
        want = D(x, sigma, labels)
        assert (model(x, 1.0, sigma, cond) - want).abs().max() < 1e-5 * want.abs().max()
        for ask in (VP(), Flow()):
            t = ask.t_from_snr(1 / torch.tensor(sigma, dtype=torch.float64) ** 2)
            a, s = ask.alpha(t), ask.sigma(t)
            assert (model((x * a).float(), a, a * sigma, cond) - want).norm() < 1e-4 * want.norm()
    for n in (3, 6):
        for heun in (False, True):
            want = edm_sampler(lambda x, s: D(x, s, labels), z, n, heun)
            ours = edm_sampler(lambda x, s: model(x.float(), 1.0, s, cond).double(), z, n, heun)
            assert (ours - want).norm() < 1e-4 * want.norm()
        euler = edm_sampler(lambda x, s: D(x, s, labels), z, n, False)
        assert (teacher_sample(model, z, cond, n) - euler).norm() < 1e-4 * euler.norm()


@torch.no_grad()
def test_edm_is_that_of_diffusers(folders):
    """Preconditioning and times of EDMEulerScheduler; the time of OpenAI's networks as their scheduler has it."""
    from diffusers import CMStochasticIterativeScheduler, EDMEulerScheduler

    model = load(folders("edm", time_scale=1))
    scheduler, labels, z = (
        EDMEulerScheduler(0.002, 80.0, 0.5, prediction_type="epsilon", sigma_schedule="karras"),
        torch.tensor([1, 2]),
        noise(2, 2, 3, 8, 8),
    )
    scheduler.set_timesteps(4)
    x = z * scheduler.sigmas[0]
    for t in scheduler.timesteps:
        said = model.net(scheduler.scale_model_input(x, t), t.expand(2), labels).sample
        x = scheduler.step(said, t, x, return_dict=False)[0]
    assert (teacher_sample(model, z, model.encode(labels), 4) - x).norm() < 1e-4 * x.norm()
    openai, seen = load(folders("edm", time_scale=1000)), []
    openai.net.time_proj.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    openai(z, 1.0, 7.0, openai.encode(labels))
    assert float(seen[0][0]) == pytest.approx(
        float(CMStochasticIterativeScheduler().sigma_to_t([7.0])[0]), rel=1e-5
    )


def test_null_label_of_edm(folders):
    x = noise(0, 2, 3, 8, 8)
    without, with_null = load(folders("edm")), load(folders("edm", null=True))
    cond = without.encode([1, 2])
    assert torch.equal(without.guided(x, 1.0, 2.0, cond, 1), without(x, 1.0, 2.0, cond))
    for ask in (lambda: without.guided(x, 1.0, 2.0, cond, 2.0), lambda: without.null(1)):
        with pytest.raises(UserError, match="--cfg: expected 1.*no null label"):
            ask()
    u, c = with_null(x, 1.0, 2.0, dict(labels=torch.tensor([10, 10]))), with_null(x, 1.0, 2.0, cond)
    assert torch.allclose(
        with_null.guided(x, 1.0, 2.0, cond, 3.0), u + 3 * (c - u), atol=1e-5
    ) and not torch.equal(u, c)


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
    folder = shutil.copytree(folders("edm"), tmp_path / "bad")
    info = json.loads((folder / "teacher.json").read_text())
    (folder / "teacher.json").write_text(json.dumps({"model": info["model"] | change}))
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
    folder = shutil.copytree(folders("edm"), tmp_path / "bad")
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | change)
    )
    with pytest.raises(UserError, match=says):
        load(folder)


# ---- all of them ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "sit", "edm"])
@torch.no_grad()
def test_the_same_estimate_in_another_schedule(name, folders):
    """All over the network's own levels, wherever the other schedule has them. DiT's own last level has sigma / alpha = 157, EDM ends at 80."""
    model = load(folders(name, **{"null": True} if name == "edm" else {}))
    x0, eps, cond, own = (
        noise(0, 2, *model.shape),
        noise(1, 2, *model.shape),
        model.encode([0, 1]),
        model.schedule,
    )
    other = [
        ask
        for ask in (EDM(), VP(), VP(1000, 1e-4, 0.02, "linear"), Flow(), TrigFlow())
        if ask.config["name"] != own.config["name"]
    ]
    levels, asked = own.grid(1000)[[999, 990, 800, 500, 200, 50, 5]], 0
    for t in levels:
        a, s = own.alpha(t), own.sigma(t)
        for w in (1.0, 3.0):
            here = model.guided((a * x0 + s * eps).float(), a, s, cond, w)
            for ask in [ask for ask in other if reaches(ask, a, s)]:
                _, a2, s2, scale = equal_snr(ask, a, s)
                there = model.guided((scale * (a * x0 + s * eps)).float(), a2, s2, cond, w)
                assert (there - here).norm() < 1e-4 * here.norm(), (float(t), w, ask.config)
                asked += 1
    assert asked >= 2 * (len(levels) * len(other) - 8)


@pytest.mark.parametrize("name", ["dit", "sit", "edm"])
def test_copies_features_new_conditions_and_files(name, folders, tmp_path):
    model = load(folders(name))
    cond, x = model.encode([0, 1]), noise(0, 2, *model.shape)
    student = model.copy()
    assert torch.equal(student(x, 0.6, 0.8, cond), model(x, 0.6, 0.8, cond))
    (h,) = student(x, 0.6, 0.8, cond, features=True)
    assert (
        h.ndim == 4 and h.shape[-1] > 1 and h.shape[-1] == h.shape[-2] and h.dtype == torch.float32
    )
    h.sum().backward()
    assert any(p.grad is not None for p in student.parameters()) and all(
        p.grad is None for p in model.parameters()
    )
    assert {id(p) for p in student.parameters()} == {
        id(p) for p in student.net.parameters()
    }  # no VAE
    before = student(x, 0.6, 0.8, cond)
    student.extend("r")
    cond["r"] = torch.rand(2)
    assert torch.equal(student(x, 0.6, 0.8, cond), before)
    student.extras["r"].layers[2].weight.data.normal_()
    with torch.no_grad():
        after = student(x, 0.6, 0.8, cond)
        assert not torch.allclose(after, before)
        student.train()  # neither dropout nor dropped labels
        assert torch.equal(student(x, 0.6, 0.8, cond), after)
        student.save(tmp_path / "student", {})
        again = load_model(
            tmp_path / "student",
            json.loads((tmp_path / "student" / "distill.json").read_text())["model"],
            model,
        )
        assert torch.equal(again(x, 0.6, 0.8, cond), after) and again.config() == student.config()
    student.checkpoint_activations()
    y = student(x, 0.6, 0.8, cond)
    y.sum().backward()
    assert torch.allclose(y, after, atol=1e-6)


@pytest.mark.parametrize("name", ["dit", "sit", "edm"])
@torch.no_grad()
def test_bf16(name, folders):
    """As teachers run on a GPU: latent networks in bf16 weights, the rest under autocast; answers stay those of fp32 up to rounding."""
    full, half = (
        load(folders(name)),
        load_teacher(str(folders(name)), dtype=torch.bfloat16, text=dict(say=lambda *a: None)),
    )
    x, cond = noise(0, 2, *full.shape), full.encode([1, 2])
    a, b = full.guided(x, 0.8, 0.6, cond, 1), half.guided(x, 0.8, 0.6, cond, 1)
    assert b.dtype == torch.float32 and 0 < (a - b).norm() < 0.03 * a.norm()
    assert (
        next(half.net.parameters()).dtype == (torch.float32 if name == "edm" else torch.bfloat16)
        and half.copy().net.dtype == torch.float32
    )
    if name != "edm":
        pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
        assert (
            half.decode(x).dtype == torch.uint8
            and (half.encode_images(pixels) - full.encode_images(pixels)).abs().max() < 0.05
        )


def test_dense_times_of_dit(folders, tmp_path):
    """sana_sprint's --time dense: the network is shown times in [0, 1]."""
    model, seen = load(folders("dit")), []
    dense = model.copy().adapt()
    dense.net.transformer_blocks[0].norm1.emb.time_proj.register_forward_hook(
        lambda m, args, out: seen.append(float(args[0][0]))
    )
    t = torch.tensor(500.0)
    dense(noise(0, 1, 4, 8, 8), dense.schedule.alpha(t), dense.schedule.sigma(t), dense.encode([0]))
    assert seen[0] == 0.5
    dense.save(tmp_path, {})
    info = json.loads((tmp_path / "distill.json").read_text())["model"]
    assert load_model(tmp_path, info, model).dense and load(folders("sit")).dense
    with pytest.raises(UserError, match="adapted: expected none or dense"):
        load_model(tmp_path, dict(info, adapted=["qk_norm"]), model)


def test_students_of_another_size_are_refused(folders, tmp_path):
    small = load(folders("dit")).copy()
    other = small.resized(["num_layers=1"])
    other.save(tmp_path / "one", {})
    model, info = (
        load(folders("dit")),
        json.loads((tmp_path / "one" / "distill.json").read_text())["model"],
    )
    assert len(load_model(tmp_path / "one", info, model).net.transformer_blocks) == 1
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps(config | dict(sample_size=16)))
    with pytest.raises(UserError, match="expected a network for"):
        load_model(tmp_path / "one", info, model)


def test_presets_are_found_by_the_folder(tmp_path):
    args = lambda *a: dmd2.parse_args([*map(str, a)])
    paper = args("--teacher", tmp_path / "anything")
    assert (args("--teacher", tmp_path / "edm-imagenet64").lr, paper.batch, paper.cfg) == (
        2e-6,
        280,
        1.0,
    )
    for name in ("dit-xl-256", "sit-xl-256", "dit-xl-512", "edm-imagenet64"):
        assert (
            args("--teacher", tmp_path / name).cfg
            == args("--teacher", name).cfg
            == dmd2.PRESETS[name]["cfg"]
        )
    assert (
        args("--teacher", tmp_path / "dit-xl-256").cfg == 1.5
        and HUB["dit-xl-256"] == "facebook/DiT-XL-2-256"
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    home = tmp_path_factory.mktemp("set")
    for label in range(3):
        for i in range(3):
            picture(home / str(label) / f"{i}.png", (20, 16), (80 * label, 20 * i, 100), "RGB")
    return home


def test_latents_of_class_folders(pictures, folders, tmp_path):
    model, lines = load(folders("dit"), cache=tmp_path), []
    images = load_images(str(pictures), model, lines.append)
    assert (
        images.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        and images.names == ["0", "1", "2"]
        and "9 images, 3 classes, 0 skipped" in lines[-1]
    )
    x, labels = images.batch(0, 4)
    assert (
        x.shape == (4, 4, 8, 8)
        and torch.equal(model.encode_images(x), x)
        and model.encode(labels)["labels"].tolist() == labels.tolist()
    )
    model.encode_images = None  # would fail if it were asked
    again = load_images(str(pictures), model, lines.append)
    assert torch.equal(again.batch(0, 4)[0], x) and "read from" in lines[-2]
    with pytest.raises(UserError, match="at most 2 class"):
        model.classes = 2
        load_images(str(pictures), model)
    with pytest.raises(UserError, match="ships no images; give a folder with one subfolder"):
        load_images(None, model)


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


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
    """From the command line: three iterations, pictures, export, resume; the student is loaded by diffusers."""
    import diffusers

    scripts.load(*pipelines.MODULES)
    cls = "UNet2DModel" if name == "edm" else "DiTTransformer2DModel"
    args = [
        "--teacher",
        folders(name),
        "--nfe",
        nfe,
        "--batch",
        4,
        "--cfg",
        1 if name == "edm" else 2,
        "--cache-prompts",
        tmp_path / "cache",
        "--lr",
        1e-3,
        "--warmup",
        0,
    ]
    args += ["--gan", "--data", pictures] * gan
    p = scripts.run("dmd2.py", *args, "--smoke", "--out", tmp_path / "run")
    assert (
        "brings no metric" in p.out
        and (tmp_path / "run" / "samples" / "00000003.png").exists()
        and "Traceback" not in p.err
    )
    info, teacher = (
        json.loads((tmp_path / "run" / "student" / "distill.json").read_text()),
        load(folders(name)),
    )
    student = load_model(tmp_path / "run" / "student", info["model"], teacher)
    net = getattr(diffusers, cls).from_pretrained(tmp_path / "run" / "student").eval()
    net = sit_time_waves(net) if name == "sit" else net
    z, cond = noise(0, 2, *teacher.shape), teacher.encode([0, 1])
    with torch.no_grad():
        draw = lambda model: dmd2.sample(
            model, z, cond, nfe, lambda: torch.zeros_like(z), **info["sampler"]
        )
        assert torch.equal(draw(student), draw(teacher.with_network(net))) and not torch.equal(
            draw(student), draw(teacher)
        )
    if gan:
        again = scripts.run(
            "dmd2.py",
            *args,
            "--iters",
            4,
            "--resume",
            "--eval-n",
            0,
            "--sample-every",
            0,
            "--out",
            tmp_path / "run",
        )
        assert "resumed it-00000003.pt" in again.out and (name == "edm" or "read from" in again.out)


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
    args = [
        "--teacher",
        folders(name),
        "--batch",
        8,
        "--cache-prompts",
        tmp_path / "cache",
        *flags,
    ] + ["--data", pictures] * (method != "flowmap")
    scripts.run(f"{method}.py", *args, "--smoke", "--out", tmp_path / "run")
    info, teacher = (
        json.loads((tmp_path / "run" / "student" / "distill.json").read_text()),
        load(folders(name)),
    )
    student = load_model(tmp_path / "run" / "student", info["model"], teacher)
    assert student.config() == info["model"] and getattr(student, "dense", False) == (name != "edm")


def test_guidance_without_a_null_label(folders, scripts, tmp_path):
    scripts.load(*pipelines.MODULES)
    p = scripts.run(
        "dmd2.py",
        "--teacher",
        folders("edm"),
        "--cfg",
        2,
        "--batch",
        4,
        "--smoke",
        "--out",
        tmp_path / "run",
        code=2,
    )
    assert p.err.count("\n") == 1 and "--cfg: expected 1" in p.err

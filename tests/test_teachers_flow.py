"""common/teachers/{flow,wan,ltx,sana_video,hunyuan_video}.py: FLUX.1, Qwen-Image, Z-Image, videos.
That their samples are those of their own pipelines is in test_teachers.py. Here is what only some
of them have, and scripts on them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import pipelines
from helpers.cards import same_as_card, write_as_run
from helpers.files import edit
from helpers.runs import close, one_line, run_processes
from helpers.teachers import (
    OLDER,
    PROMPTS,
    SIZE,
    as_tensor,
    copy_of,
    draw,
    load,
    noise,
    plain_pipeline,
    quiet,
    relative,
    run_pipeline,
    sample_as_pipeline,
    size_flags,
    write_captioned,
)
from safetensors.torch import load_file
from test_teachers import wide
from torch.nn.attention import SDPBackend, sdpa_kernel

import dmd2
import eval as eval_script
import phased_dmd
import sana_sprint
from common.errors import UserError
from common.files import WEIGHTS
from common.model import Model
from common.routed import ByLabel, Routed
from common.teachers.flow import pack, unpack
from common.teachers.load import load_model, load_pipeline, load_teacher
from common.teachers.pipeline import Pipeline
from common.teachers.students import read_student, sampler_of
from common.teachers.wan import Wan
from tools.rows import prompt_kwargs

ONE_NETWORK = ["flux", "chroma", "klein", "hunyuan", "lumina", "qwen", "zimage", "wan", "wan5b"]
ONE_NETWORK += ["sanavideo", "ltx", "hunyuanvideo"]


def saved_model(folder):
    return json.loads((folder / "distill.json").read_text())["model"]


def reload(folder, teacher):
    return load_model(folder, saved_model(folder), teacher)


# ---- packed latents ------------------------------------------------------------------------------


def test_unpack_is_the_inverse_of_pack():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    assert torch.equal(unpack(pack(x), 4, 6), x)


def test_a_token_is_a_square_of_latents():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    token = pack(x)[1, 4]  # second of the second row
    assert token.tolist() == x[1, :, 2:4, 2:4].flatten().tolist()


@pytest.mark.parametrize(
    "name",
    ["flux", "chroma", "klein", "hunyuan", "lumina", "qwen", "zimage", "ltx", "hunyuanvideo"],
)
def test_time_shift_is_the_schedulers(name, folders):
    """Our grid of n levels is the scheduler's table, apart from Qwen-Image's stretching of it, at
    each size of one model.
    FLUX.2's shift depends on n: ours is that of 50."""
    side = 32 if name == "ltx" else 16
    model = load(folders, name, size=[[side, side], [2 * side, side]])
    pipe = plain_pipeline(model, folders(name))
    config = pipe.scheduler.config
    pipe.scheduler = type(pipe.scheduler).from_config(config, shift_terminal=None)
    n = 50 if name == "klein" else 4
    shifts = []
    for _ in model.sizes.each():
        run_pipeline(model, pipe, PROMPTS[:1], torch.zeros(1, *model.shape), n, 1.0)
        sigmas = pipe.scheduler.sigmas[:-1].double()
        assert torch.allclose(sigmas, model.schedule.grid(n).flip(0), atol=1e-6)
        shifts.append(model.schedule.shift)
    assert shifts[0] > 1.5
    assert (shifts[1] > shifts[0]) == (name in ("flux", "klein", "qwen", "ltx"))  # by tokens


# ---- guidance ------------------------------------------------------------------------------------


@torch.no_grad()
def test_qwen_keeps_the_length_of_the_conditional_velocity(folders):
    model = load(folders, "qwen")
    x, cond = noise(0, 2, *model.shape), model.encode([0, 1])
    c, u = model.cond_and_uncond(x, 0.4, 0.6, cond)
    g = model.guided(x, 0.4, 0.6, cond, 40.0)
    lengths = [pack(x - estimate).norm(dim=-1) for estimate in (g, c)]
    assert torch.allclose(*lengths, rtol=1e-4)
    assert not torch.allclose(g, u + 40 * (c - u), atol=0.1)


@torch.no_grad()
def test_qwen_at_the_clean_end(folders):
    """There the velocity is 0, and so is its length."""
    model = load(folders, "qwen")
    x, cond = noise(0, 2, *model.shape), model.encode([0, 1])
    assert torch.equal(model.guided(x, 1.0, 0.0, cond, 4.0), x)


@torch.no_grad()
def test_flux_uses_its_guidance(folders):
    model = load(folders, "flux")
    assert model.guidance == 3.5
    assert model.config()["guidance"] == 3.5
    pipe = plain_pipeline(model, folders("flux"))
    z, cond = noise(0, 1, *model.shape), model.encode([1])
    plain, _ = sample_as_pipeline(model, pipe.scheduler, z, cond, 2, 1.0)
    model.guidance = 7.0
    theirs = run_pipeline(model, pipe, [PROMPTS[1]], z, 2, 1.0, guidance_scale=7.0)
    ours, _ = sample_as_pipeline(model.copy(), pipe.scheduler, z, cond, 2, 1.0)
    assert relative(ours, theirs) < 1e-5
    assert relative(ours, plain) > 1e-3


LORA = dict(rank=2, alpha=2, targets=None, seed=0, flag="--lora")


@torch.no_grad()
@pytest.mark.parametrize("adapters", [None, LORA], ids=["whole", "lora"])
def test_a_student_keeps_the_guidance_it_was_trained_with(adapters, folders, tmp_path):
    """--embedded-guidance of the training, whatever the teacher has when the student is loaded."""
    teacher, plain = load(folders, "flux", guidance=6.0), load(folders, "flux")
    teacher.copy(adapters).save(tmp_path, {})
    student = reload(tmp_path, plain)
    assert student.guidance == 6.0
    assert plain.guidance == 3.5
    x, cond = noise(0, 1, *plain.shape), plain.encode([1])
    expected = teacher(x, 0.3, 0.7, cond)
    assert torch.allclose(student(x, 0.3, 0.7, cond), expected, atol=1e-6)
    assert not torch.allclose(plain(x, 0.3, 0.7, cond), expected, atol=1e-4)


@pytest.mark.parametrize("value", [-1, "3.5", True, None, float("nan")])
def test_guidance_of_a_student_is_a_number(value, folders, tmp_path):
    teacher = load(folders, "flux")
    teacher.copy().save(tmp_path, {})
    info = saved_model(tmp_path) | dict(guidance=value)
    with pytest.raises(UserError, match="guidance: expected a number >= 0"):
        load_model(tmp_path, info, teacher)


def test_eval_takes_the_guidance_of_the_training():
    args = eval_script.parse_args(["--teacher", "flux"])
    text = prompt_kwargs(args, dict(flags=dict(embedded_guidance=6.0)))
    assert text["guidance"] == 6.0


def test_guidance_of_another_teacher(folders):
    says = (
        "--embedded-guidance 2: expected .* takes a guidance scale, such as FLUX.1-dev, found .*sd3"
    )
    with pytest.raises(UserError, match=says):
        load(folders, "sd3", guidance=2.0)


# ---- Wan -----------------------------------------------------------------------------------------


def test_wan_21_is_one_network(folders):
    model = load(folders, "wan")
    assert isinstance(model, Wan)
    assert model.vae_scale == 4
    assert model.schedule.shift == 3.0  # flow_shift of its scheduler


def test_wan_22_is_two_experts(folders):
    model = load(folders, "wan22")
    assert isinstance(model, Routed)
    assert len(model.experts) == 2
    assert model.video
    assert model.shape == (4, 2, 8, 8)
    assert model.schedule.shift == 3.0
    first, second = (list(expert.parameters()) for expert in model.experts)
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_boundary_of_wans_experts(folders):
    """In the pipeline, t >= 875 belongs to the first expert."""
    model = load(folders, "wan22")
    boundary = 0.875
    s = torch.tensor([1.0, 0.9, boundary, np.nextafter(boundary, 0), 0.5, 0.0]).double()
    s[3] = np.nextafter(boundary, 0)  # in double precision
    assert model.route(6, 1 - s, s, {}).tolist() == [0, 0, 0, 1, 1, 1]


def test_features_are_those_of_each_samples_expert(folders):
    model = load(folders, "wan22")
    x, cond = noise(0, 2, *model.shape), model.encode([0, 1])
    alpha, sigma = torch.tensor([0.05, 0.5]), torch.tensor([0.95, 0.5])
    (mixed,) = model(x, alpha, sigma, cond, features=True)
    for i, expert in enumerate(model.experts):
        row = slice(i, i + 1)
        own = {k: v[row] for k, v in cond.items()}
        (alone,) = expert(x[row], alpha[row], sigma[row], own, features=True)
        assert torch.allclose(mixed[row], alone, atol=1e-5)


def test_experts_take_new_conditions(folders, tmp_path):
    model = load(folders, "wan22")
    student = model.copy().extend("r")
    x, cond = noise(0, 2, *model.shape), dict(model.encode([0, 1]), r=torch.rand(2))
    levels = torch.tensor([0.05, 0.5]), torch.tensor([0.95, 0.5])
    before = model(x, *levels, cond)
    # Not bit for bit: the weights of a memory-mapped file are aligned differently.
    assert torch.allclose(student(x, *levels, cond), before, atol=1e-4)
    for expert in student.experts:
        expert.extras["r"].layers[2].weight.data.normal_()
    after = student(x, *levels, cond)
    assert (after - before).abs().amax((1, 2, 3, 4)).min() > 1e-3

    student.save(tmp_path, {})
    loaded = reload(tmp_path, model)
    for a, b in zip(loaded.parameters(), student.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.allclose(loaded(x, *levels, cond), after, atol=1e-4)


def test_prompts_have_labels(folders):
    """MSD's students are chosen by them."""
    model = load(folders, "flux")
    both = ByLabel([model, model.copy()], [1, 0, 1])
    assert both.route(3, 1.0, 1.0, model.encode([0, 1, 2])).tolist() == [1, 0, 1]
    assert both.route(2, 1.0, 1.0, model.null(2)).tolist() == [0, 0]


def test_wan_22_5b_has_a_size_of_its_own(folders):
    """Other than the default of its pipeline's call, which a student's lines must not rely on."""
    model = load(folders, "wan5b", size=None, frames=None)
    assert model.image_shape == (3, 121, 704, 1280)
    assert model.shape == (48, 31, 88, 160)
    given = {key: model.call_options()[key] for key in ("height", "width", "num_frames")}
    assert given == dict(height=704, width=1280, num_frames=121)
    assert not load(folders, "wan", size=None, frames=None).call_options().keys() & given.keys()


def test_wan_22_5b_gives_a_time_to_each_token(folders):
    """In its pipeline. test_our_sampler_is_the_pipeline compares that with one time per sample."""
    model = load(folders, "wan5b")
    pipe = plain_pipeline(model, folders("wan5b"))
    shapes = []
    hook = lambda module, args, kwargs: shapes.append(kwargs["timestep"].shape)
    pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    run_pipeline(model, pipe, PROMPTS[:1], torch.zeros(1, *model.shape), 1, 1.0)
    assert shapes == [(1, 2 * 2 * 2)]


def test_sana_video_of_720p(folders, tmp_path):
    """It has another autoencoder."""
    folder = copy_of(folders, "sanavideo", tmp_path)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(sample_size=22)))
    with pytest.raises(UserError, match="sample_size: expected 30, found '22'"):
        load_pipeline(str(folder), prompts=PROMPTS, cache=tmp_path / "cache", say=quiet)


@torch.no_grad()
def test_the_autoencoder_of_ltx_that_takes_a_time(tmp_path):
    """That of LTX-Video 0.9.1. Its pipeline's decode_timestep is 0, without noise."""
    folder = pipelines.ltx(tmp_path / "ltx", timestep_conditioning=True)
    options = dict(prompts=PROMPTS, cache=tmp_path / "cache", say=quiet)
    model = load_pipeline(str(folder), **options, **SIZE["ltx"])
    pipe = plain_pipeline(model, folder)
    z = noise(0, 1, *model.shape)
    latents = run_pipeline(model, pipe, PROMPTS[:1], z, 2, 1.0)
    theirs = as_tensor(run_pipeline(model, pipe, PROMPTS[:1], z, 2, 1.0, "pil")[0])
    ours = model.decode(latents)[0]
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert not torch.equal(ours, decode_at(model, latents, 0.5)[0])


def decode_at(model, latents, time):
    shift, scale = model.latent_stats()
    images = model.vae.decode(latents / scale + shift, torch.full((1,), time), return_dict=False)[0]
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
def test_words_in_quotes_are_read_letter_by_letter(folders):
    """HunyuanVideo 1.5, beside a prompt without any: what is left out of padding is masked."""
    prompts = ['a sign that says "ok"', "dog"]
    model = load(folders, "hunyuanvideo", prompts)
    cond = model.encode([0, 1])
    assert cond["glyph_mask"].sum(1).tolist() == [len('Text "ok". ') + 1, 0]
    assert cond["text"].shape[1] == cond["mask"].sum(1).max()
    pipe = DiffusionPipeline.from_pretrained(folders("hunyuanvideo"))  # with all of its padding
    z = noise(0, 2, *model.shape)
    theirs = run_pipeline(model, pipe, prompts, z, 2, 3.0)
    ours, _ = sample_as_pipeline(model, pipe.scheduler, z, cond, 2, 3.0)
    assert relative(ours, theirs) < 1e-5
    cond["glyphs"] = -cond["glyphs"]
    other, _ = sample_as_pipeline(model, pipe.scheduler, z, cond, 2, 3.0)
    assert relative(other[:1], theirs[:1]) > 1e-4
    assert relative(other[1:], theirs[1:]) < 1e-5


def test_hunyuan_video_is_made_for_16_to_9(folders):
    model = load(folders, "hunyuanvideo", size=None, frames=None)
    assert model.image_shape[1] == 121
    height, width = model.image_shape[2:]
    assert height < width
    assert height * width == pytest.approx(640**2, rel=0.05)


def test_frames(folders):
    assert load(folders, "wan", frames=9).shape == (4, 3, 8, 8)
    assert load(folders, "wan", frames=5, size=[16, 24]).image_shape == (3, 5, 16, 24)
    assert load(folders, "wan", frames=1, size=None).image_shape == (3, 1, 480, 832)


def test_a_video_of_one_frame_is_shown_once(folders):
    model = load(folders, "wan", frames=1)
    assert model.to_pictures(noise(0, 2, 4, 1, 8, 8)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("frames", [0, 4, -3])
def test_wrong_numbers_of_frames(frames, folders, monkeypatch):
    folders("wan")
    monkeypatch.setattr(Pipeline, "load_net", None)  # it is found before anything is loaded
    with pytest.raises(UserError, match=f"--frames {frames}: expected a multiple of 4, plus 1"):
        load(folders, "wan", frames=frames)


def test_frames_of_an_image(folders):
    says = "--frames 5: expected a text-to-video teacher, found FluxPipeline"
    with pytest.raises(UserError, match=says):
        load(folders, "flux", frames=5)


# ---- features, checkpointing, derivatives --------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_NETWORK)
def test_features_are_where_the_pixels_are(name, folders):
    """A feature map has the format of the sample, and changes most where the sample does.

    Frames are one below the other.
    """
    model = wide(load(folders, name))
    cond, x = model.encode([0]), noise(0, 1, *model.shape)
    y = x.clone()
    one = ("klein", "hunyuan", "ltx", "hunyuanvideo")
    p = 1 if name in one else 2  # latents of a token along a side
    y[..., -p:, p : 2 * p] += 5  # last row of patches, second column
    (before,) = model(x, 0.6, 0.8, cond, features=True)
    (after,) = model(y, 0.6, 0.8, cond, features=True)
    h, w = model.shape[-2] // p, model.shape[-1] // p
    frames = model.shape[1] if model.video else 1
    assert before.shape[2:] == (frames * h, w)
    change = (before - after).square().sum(1).view(frames, h, w)
    for frame in change:
        assert frame.argmax() == (h - 1) * w + 1


@torch.no_grad()
def test_features_of_lumina_whatever_the_length_of_the_text(folders):
    """The image follows the text in its sequence, at a place of its own in each sample."""
    model = load(folders, "lumina")
    x = noise(0, 2, *model.shape)
    (both,) = model(x, 0.6, 0.8, model.encode([0, 1]), features=True)
    for i in (0, 1):
        (alone,) = model(x[i : i + 1], 0.6, 0.8, model.encode([i]), features=True)
        assert relative(both[i : i + 1], alone) < 1e-5


@torch.no_grad()
def test_hunyuan_reads_what_stands_in_quotes(folders):
    """By an encoder of its own. The padding of both texts, to 1000 and 128 tokens, is cut off."""
    prompts = ['a "dog 7" on the left', "pizza", "an 'x'"]
    model = load(folders, "hunyuan", prompts)
    pipe = plain_pipeline(model, folders("hunyuan"))
    z, cond = noise(0, 3, *model.shape), model.encode([0, 1, 2])
    quoted = cond["glyph_mask"].sum(1).tolist()
    assert quoted[0] > quoted[2] > quoted[1] == 0
    assert cond["glyphs"].shape[1] == quoted[0]
    assert cond["text"].shape[1] == cond["mask"].sum(1).max() < 200
    theirs = run_pipeline(model, pipe, prompts, z, 2, 3.0)
    ours, _ = sample_as_pipeline(model, pipe.scheduler, z, cond, 2, 3.0)
    assert relative(ours, theirs) < 1e-5
    unread = dict(cond, glyph_mask=torch.zeros_like(cond["glyph_mask"]))
    change = (model(z, 0.4, 0.6, cond) - model(z, 0.4, 0.6, unread)).abs().amax((1, 2, 3))
    assert (change > 1e-4).tolist() == [True, False, True]


@torch.no_grad()
def test_lumina_keeps_the_length_of_each_row(folders):
    model = load(folders, "lumina")
    x, cond = noise(0, 2, *model.shape), model.encode([0, 1])
    c, _ = model.cond_and_uncond(x, 0.4, 0.6, cond)
    g = model.guided(x, 0.4, 0.6, cond, 40.0)
    assert torch.allclose((x - g).norm(dim=-1), (x - c).norm(dim=-1), rtol=1e-4)


@torch.no_grad()
def test_guidance_that_flux2_is_told(folders):
    model = load(folders, "flux2", guidance=7.0)
    assert (model.guidance, load(folders, "flux2").guidance) == (7.0, 4.0)
    z, cond = noise(0, 1, *model.shape), model.encode([1])
    pipe = plain_pipeline(model, folders("flux2"))
    theirs = run_pipeline(model, pipe, [PROMPTS[1]], z, 2, 1.0)
    ours, _ = sample_as_pipeline(model.copy(), pipe.scheduler, z, cond, 2, 1.0)
    assert relative(ours, theirs) < 1e-5
    model.guidance = 4.0
    other, _ = sample_as_pipeline(model, pipe.scheduler, z, cond, 2, 1.0)
    assert relative(other, theirs) > 1e-4


def test_the_first_name_of_luminas_pipeline(folders, tmp_path):
    """As in older folders. The student's folder has the name that diffusers has today."""
    folder = copy_of(folders, "lumina", tmp_path)
    edit(folder / "model_index.json", _class_name="Lumina2Text2ImgPipeline")
    options = dict(prompts=PROMPTS, cache=folders.cache, say=quiet)
    model, same = load_pipeline(str(folder), **options), load(folders, "lumina")
    x = noise(0, 2, *model.shape)
    with torch.no_grad():
        assert torch.equal(
            model(x, 0.6, 0.8, model.encode([0, 1])), same(x, 0.6, 0.8, same.encode([0, 1]))
        )
    write_as_run(tmp_path / "student", model.copy(), model, "dmd2", dmd2, 4, {})
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["_class_name"] == "Lumina2Pipeline"


def test_which_teachers_have_dense_times(folders, monkeypatch):
    """--time dense takes a teacher of SANA-Sprint as it is, and names it for SANA."""
    args = SimpleNamespace(teacher="x", lora=None)
    for name in ("sprint", "lumina"):
        model = load(folders, name)
        assert sana_sprint.with_dense_time(model, args) is model
        seen = []
        monkeypatch.setattr(model.net, "forward", lambda *a, **kw: seen.append(kw["timestep"]))
        with pytest.raises(TypeError):  # of what the network returns
            model(noise(0, 1, *model.shape), 0.25, 0.75, model.encode([0]))
        assert float(seen[0].abs()) <= 1
    with pytest.raises(UserError, match="has dense times, as sana-sprint-teacher, found x"):
        sana_sprint.with_dense_time(load(folders, "sana"), args)


@pytest.mark.parametrize("name", ONE_NETWORK)
def test_checkpointing_changes_nothing(name, folders):
    model = load(folders, name)
    cond, x = model.encode([0, 1]), noise(0, 2, *model.shape)
    student = model.copy().extend("r")
    student.extras["r"].layers[2].weight.data.normal_()

    def gradients():
        student.zero_grad()
        first = student(x, 0.6, 0.8, dict(cond, r=torch.tensor([0.3, 0.9])))
        second = student(x, 0.3, 0.7, dict(cond, r=torch.tensor([0.1, 0.5])))
        (first.square().sum() + second.sum()).backward()
        return [p.grad.clone() for p in student.parameters() if p.grad is not None]

    expected = gradients()
    student.checkpoint_activations()
    recompute, calls = student.net._gradient_checkpointing_func, []

    def count(*args, **kw):
        calls.append(1)
        return recompute(*args, **kw)

    student.net._gradient_checkpointing_func = count
    found = gradients()
    assert calls
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def use_float64_only(monkeypatch):
    """Networks, and the view's times, round to float32 here and there: not from now on."""
    to = torch.Tensor.to

    def to_float64(x, *args, **kw):
        return to(x, *(torch.float64 if a is torch.float32 else a for a in args), **kw)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "to", to_float64)


@pytest.mark.parametrize("along", ["sample", "time"])
@pytest.mark.parametrize("name", OLDER + ONE_NETWORK)
def test_forward_derivatives_are_central_differences(name, along, folders, monkeypatch):
    """torch.func.jvp in float64, as sana_sprint, twinflow and flowmap need it."""
    if name in ("lumina", "zimage") and torch.__version__ < "2.7":
        pytest.skip("torch 2.6 has no forward derivative of complex rotary embeddings")
    model = load(folders, name)
    use_float64_only(monkeypatch)
    model.net.double()
    cond = {k: v.double() if v.is_floating_point() else v for k, v in model.encode([0, 1]).items()}
    g = torch.Generator().manual_seed(0)
    x, dx = torch.randn(2, 2, *model.shape, generator=g, dtype=torch.float64)
    high = model.schedule.t_max
    t = torch.tensor([0.3217, 0.7391], dtype=torch.float64) * high
    dt = torch.tensor([1.0, -0.5], dtype=torch.float64) * high / 100
    if along == "sample":
        dt = 0 * dt
    else:
        dx = 0 * dx

    def f(x, t):
        return model(x, model.schedule.alpha(t), model.schedule.sigma(t), cond)

    def step(h):
        return f(x + h * dx, t + h * dt)

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        value, slope = torch.func.jvp(f, (x, t), (dx, dt))
        h = 1e-6
        difference = (8 * (step(h) - step(-h)) - (step(2 * h) - step(-2 * h))) / (12 * h)
        assert torch.allclose(value, f(x, t))
    assert slope.norm() > 0
    assert relative(difference, slope) < 1e-6


# ---- scripts -------------------------------------------------------------------------------------


def prompt_flags(tmp_path, prompts=PROMPTS):
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    return ["--prompts", tmp_path / "prompts.txt", "--cache-prompts", tmp_path / "cache"]


def load_with(tmp_path, folders, name):
    """The teacher with the prompts and the cache of prompt_flags."""
    return load_pipeline(
        str(folders(name)),
        prompts=str(tmp_path / "prompts.txt"),
        cache=tmp_path / "cache",
        say=quiet,
        **SIZE.get(name, {}),
    )


FAST = [("flux", 1), ("wan22", 4)]
OTHERS = [("klein", 4), ("lumina", 1), ("ltx", 4)]
PAIRS = [(name, nfe) for name in ("flux", "qwen", "zimage", "wan", "wan22") for nfe in (1, 4)]
SLOW = OTHERS + [pair for pair in PAIRS if pair not in FAST]


@pytest.mark.parametrize(
    "name, nfe", FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_dmd2_on_it(name, nfe, folders, scripts, tmp_path):
    """Three iterations, export, resume; the student in the plain pipeline makes our latents."""
    out = tmp_path / "run"
    flags = ["--teacher", folders(name), *prompt_flags(tmp_path, PROMPTS * 3), *size_flags(name)]
    flags += ["--nfe", nfe, "--cfg", 3, "--batch", 4, "--lr", 1e-3, "--lr-fake", 1e-3]
    flags += ["--warmup", 0, "--ratio", 2, "--out", out]
    if name == "flux":
        flags += ["--embedded-guidance", 6]
    p = scripts.run("dmd2.py", *flags, "--smoke")
    assert "brings no metric" in p.out
    assert "Traceback" not in p.err
    assert (out / "samples" / "00000003.png").exists()

    home = out / "student"
    info = json.loads((home / "distill.json").read_text())
    teacher = load_with(tmp_path, folders, name)
    student = load_model(home, info["model"], teacher)
    if name == "flux":
        assert info["flags"]["embedded_guidance"] == 6
        assert student.guidance == 6
    same_as_card(home, teacher, student, dmd2.sample, nfe, PROMPTS[0], 0, **info["sampler"])
    if nfe == 4:
        resume = ["--iters", 4, "--resume", "--eval-n", 0, "--sample-every", 0]
        scripts.run("dmd2.py", *flags, *resume)


@pytest.mark.slow
@pytest.mark.parametrize("name, nfe", PAIRS + [("flux2", 4), ("lumina", 4), ("sanavideo", 4)])
def test_dmd2_lora_on_it(name, nfe, folders, scripts, tmp_path):
    """Adapters on student and critic; the LoRA file in the plain pipeline is our network."""
    out = tmp_path / "run"
    flags = ["--teacher", folders(name), *prompt_flags(tmp_path, PROMPTS * 3), *size_flags(name)]
    flags += ["--nfe", nfe, "--cfg", 3, "--batch", 4, "--lr", 2e-2, "--lr-fake", 1e-3]
    flags += ["--warmup", 0, "--ratio", 2, "--lora", 4, "--lora-fake", 2]
    p = scripts.run("dmd2.py", *flags, "--smoke", "--out", out)
    assert "of the teacher's, frozen" in p.out
    assert "Traceback" not in p.err

    teacher = load_with(tmp_path, folders, name)
    student = reload(out / "student", teacher)
    z, t, cond = noise(0, 2, *teacher.shape), 0.9, teacher.encode([0, 2])
    with torch.no_grad():
        ours = student(z, 1 - t, t, cond)
        assert relative(ours, teacher(z, 1 - t, t, cond)) > 1e-3
    if name != "wan22":  # its two LoRAs are in folders of their own
        pipe = plain_pipeline(teacher, folders(name))
        pipe.load_lora_weights(out / "student")
        with torch.no_grad():
            theirs = teacher.with_network(pipe.transformer)(z, 1 - t, t, cond)
        assert relative(theirs, ours) < 1e-4


@pytest.mark.slow
def test_experts_over_two_processes(folders, scripts, tmp_path):
    """A one-step student of Wan 2.2 uses its first expert only; the critic's samples reach both.

    DDP must not wait for the gradient of an expert that has none.
    """
    flags = ["--teacher", folders("wan22"), *prompt_flags(tmp_path), *size_flags("wan22")]
    flags += ["--cfg", 1, "--batch", 4, "--iters", 4, "--ratio", 2, "--warmup", 0]
    flags += ["--lr", 1e-4, "--lr-fake", 1e-4, "--log-every", 1, "--sample-every", 0]
    flags += ["--eval-n", 0, "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    scripts.run("dmd2.py", *flags, one)
    run_processes(scripts, 2, "dmd2.py", *flags, two)
    close(one, two, 4)

    def was_trained(part):
        student = load_file(two / "student" / part / WEIGHTS)
        teacher = load_file(folders("wan22") / part / WEIGHTS)
        return any(not torch.equal(v, teacher[k]) for k, v in student.items())

    assert was_trained("transformer")
    assert not was_trained("transformer_2")


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def nothing(folder):
    pass


MISTAKES = [  # what is done to a copy of the folder, further flags, what the line must say
    (
        lambda folder: (folder / "model_index.json").unlink(),
        [],
        "expected a teacher folder .teacher.json, or model_index.json of a diffusers pipeline., "
        "found: no teacher.json in it",
    ),
    (
        write("model_index.json", json.dumps(dict(_class_name="KandinskyPipeline"))),
        [],
        "one of the pipelines .*FluxPipeline.*WanPipeline.*, found 'KandinskyPipeline'",
    ),
    (
        write("p.txt", ""),
        ["--prompts", "{folder}/p.txt"],
        "--prompts .*p.txt: expected prompts, found an empty file",
    ),
    (
        write("p.txt", "ok\n" + "a" * 10_000_000),
        ["--prompts", "{folder}/p.txt"],
        "--prompts .*p.txt: line 2: expected a prompt of at most 4000 characters",
    ),
    (
        write("p.txt", " \n\n"),
        ["--prompts", "{folder}/p.txt"],
        "--prompts .*p.txt: expected prompts, found an empty file",
    ),
    (
        nothing,
        ["--frames", "5"],
        "--frames 5: expected a text-to-video teacher, found FluxPipeline",
    ),
    (nothing, ["--size", "480x834"], "--size 480x834: expected a multiple of 4 pixels"),
    (
        nothing,
        ["--size", "480x"],
        "argument --size: expected pixels, as 512 or HEIGHTxWIDTH, found '480x'",
    ),
    (
        nothing,
        ["--size", "16", "--lora", "500"],
        "--lora 500: expected a rank of at most 16, the smaller side of layer ",
    ),
    (
        lambda folder: draw(folder / "set" / "dog.png"),
        ["--size", "16", "--gan", "--data", "{folder}/set"],
        "--data .*set: expected a caption for each image, .*none for 1 of 1 images, "
        "the first is dog.png",
    ),
]


@pytest.mark.parametrize("spoil, flags, says", MISTAKES)
def test_mistakes_end_in_one_line(spoil, flags, says, folders, scripts, tmp_path):
    folder = copy_of(folders, "flux", tmp_path)
    spoil(folder)
    flags = [flag.format(folder=folder) for flag in flags]
    flags += ["--cache-prompts", tmp_path / "cache", "--out", tmp_path / "run"]
    p = scripts.start("dmd2.py", "--teacher", folder, "--smoke", *flags)
    one_line(p, says, "dmd2")


# ---- scripts with experts on a teacher of experts ------------------------------------------------


@pytest.mark.parametrize(
    "shift, nfe, phases, start",
    [
        (5.0, 4, 2, [0, 1]),
        (5.0, 4, 4, [0, 0, 1, 1]),
        (1.0, 4, 2, [None, 1]),
        (5.0, 1, 1, [0]),
        (5.0, 4, 1, [None]),
    ],
)
def test_phases_start_as_the_experts_of_their_levels(shift, nfe, phases, start, folders):
    """Four steps, shifted by 5: 1, 0.9375 | 0.8333, 0.625; the experts meet at 0.875.

    start: the expert of each phase; None: steps of the phase use both.
    """
    teacher = load(folders, "wan22")
    times = phased_dmd.step_times(nfe, shift)
    ends = phased_dmd.phase_ends(nfe, phases)
    found = []
    for network in phased_dmd.starts_as(teacher, times, ends):
        found.append(next((i for i, e in enumerate(teacher.experts) if e is network), None))
    assert found == start


def test_phases_of_a_teacher_of_one_network(folders):
    teacher = load(folders, "wan")
    times, ends = phased_dmd.step_times(4, 5.0), phased_dmd.phase_ends(4, 2)
    assert phased_dmd.starts_as(teacher, times, ends) == [teacher] * 2


slow = pytest.mark.slow
ON_EXPERTS = [  # script, flags, is each expert of the student routed itself?
    ("phased_dmd", [], [False] * 2),
    pytest.param("phased_dmd", ["--lora", 4, "--phases", 4], [False] * 4, marks=slow),
    pytest.param("phased_dmd", ["--step-shift", 1], [True, False], marks=slow),
    pytest.param("msd", ["--students", 2, "--adm", 0], [True] * 2, marks=slow),
    pytest.param("msd", ["--students", 2, "--adm", 0, "--lora", 4], [True] * 2, marks=slow),
]


@pytest.fixture
def on_experts(folders, scripts, tmp_path):
    """Runs a script on Wan 2.2 -> teacher, student as read back, its folder, its JSON."""

    def run(script, flags):
        out = tmp_path / "run"
        base = ["--teacher", folders("wan22"), *prompt_flags(tmp_path), *size_flags("wan22")]
        base += ["--batch", 4, "--smoke", "--ema", 0, "--lr", 1e-2, "--lr-fake", 1e-3]
        base += ["--cfg", 3, "--warmup", 0, "--ratio", 1, "--out", out]
        scripts.run(f"{script}.py", *base, *flags)
        teacher = load_with(tmp_path, folders, "wan22")
        info = json.loads((out / "student" / "distill.json").read_text())
        return teacher, load_model(out / "student", info["model"], teacher), out / "student", info

    return run


@pytest.mark.parametrize("script, flags, routed", ON_EXPERTS)
def test_experts_on_a_teacher_of_experts(script, flags, routed, on_experts):
    """The export is the student, all of it; each LoRA is on the weights it was trained on."""
    teacher, student, home, info = on_experts(script, flags)
    assert [isinstance(expert, Routed) for expert in student.experts] == routed

    path = home.parent / "ckpt" / f"it-{info['flags']['iters']:08d}.pt"
    trained = torch.load(path, weights_only=True)["state"]["student"]
    weights = student.state_dict()
    assert weights.keys() == trained.keys()
    for name, value in weights.items():
        assert torch.allclose(value, trained[name], atol=1e-6), name

    if "--lora" in flags:
        check_bases(script, teacher, student)

    sample = sampler_of(home, info)
    z, cond = noise(0, 2, *teacher.shape), teacher.encode([0, 1])

    def samples(model):
        torch.manual_seed(3)
        return sample(model, z, cond, info["nfe"], lambda: torch.randn_like(z), **info["sampler"])

    assert relative(samples(student), samples(teacher)) > 1e-3

    nested = dict(info["model"], experts=[info["model"]])
    for wrong in (
        dict(experts=[info["model"]]),
        dict(experts=[nested]),
        dict(table="x"),
        dict(table=[1.0, 2.0]),
    ):
        with pytest.raises(UserError):
            load_model(home, info["model"] | wrong, teacher)


def check_bases(script, teacher, student):
    """msd: two experts of two networks; phased_dmd: four experts, two on each network."""
    theirs = [{p.data_ptr() for p in expert.parameters()} for expert in teacher.experts]
    for i, expert in enumerate(student.experts):
        if script == "msd":
            bases = [{t.data_ptr() for t in part.base} for part in expert.experts]
            assert bases == theirs
        else:
            assert {t.data_ptr() for t in expert.base} == theirs[i // 2]


# ---- every method --------------------------------------------------------------------------------

METHODS = dict(
    sid=[],
    decoupled_dmd=["--nfe", 4, "--cfg", 3],
    phased_dmd=[],
    msd=["--students", 2, "--adm", 0],
    twinflow=["--image-free", "--guide", "frozen", "--cfg", 3],
    flowmap=[],
    boot=["--cfg", 2],
    anyflow=["--image-free", "--velocity", "teacher"],
    swiftbrush=["--lora-fake", 4],  # the preset's 64 is above the width of the tiny networks
)


ON_KINDS = [(script, name) for name in ("sd15", "sdxl", "sd3", "wan22") for script in METHODS]
ON_KINDS += [("sid", "chroma"), ("phased_dmd", "lumina"), ("twinflow", "hunyuan")]
ON_KINDS += [("decoupled_dmd", "klein"), ("swiftbrush", "flux2")]


@pytest.mark.slow
@pytest.mark.parametrize("script, name", ON_KINDS)
def test_every_method_without_images(script, name, folders, scripts, tmp_path):
    """Run, export, reload: the student that is read back is the teacher's network, trained."""
    out = tmp_path / "run"
    flags = ["--teacher", folders(name), *prompt_flags(tmp_path), *size_flags(name)]
    flags += ["--batch", 4, "--lr", 1e-3, "--warmup", 0, "--smoke", "--out", out]
    p = scripts.run(f"{script}.py", *flags, *METHODS[script])
    assert "Traceback" not in p.err
    # three iterations, or as many of each phase, stage or student
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["it"] + 1
    assert (out / "samples" / f"{last:08d}.png").exists()

    options = dict(
        prompts=str(tmp_path / "prompts.txt"),
        cache=tmp_path / "cache",
        say=quiet,
        **SIZE.get(name, {}),
    )
    teacher = load_teacher(str(folders(name)), text=options)
    home, info = read_student(out)
    student = load_model(home, info["model"], teacher)
    # Of msd's students not all have had a turn after three iterations.
    assert max(distances(student, teacher)) > 1e-4

    z = noise(0, 2, *teacher.shape)
    cond = teacher.encode(torch.tensor([0, 1]))
    sample = sampler_of(home, info)
    with torch.no_grad():
        x = sample(student, z, cond, info["nfe"], lambda: torch.randn_like(z), **info["sampler"])
    assert x.shape == z.shape
    assert x.isfinite().all()


def distances(student, teacher):
    """Largest change of a weight, for each network of the student to the teacher's nearest one."""

    def networks(model):
        return [dict(m.named_parameters()) for m in model.modules() if isinstance(m, Model)]

    def distance(after, before):
        common = [k for k in before if k in after and after[k].shape == before[k].shape]
        assert len(common) > 0.9 * len(before)
        return max(float((after[k] - before[k]).abs().max()) for k in common)

    return [min(distance(a, b) for b in networks(teacher)) for a in networks(student)]


@pytest.mark.slow
def test_sana_sprint_on_the_teacher_it_needs(folders, scripts, tmp_path):
    """Dense times and QK norm: --time dense fits nothing. The student in plain diffusers."""
    out = tmp_path / "run"
    flags = ["--teacher", folders("sprint"), *prompt_flags(tmp_path), "--time", "dense"]
    flags += ["--data", write_captioned(tmp_path / "images"), "--batch", 4, "--lr", 1e-3]
    scripts.run("sana_sprint.py", *flags, "--warmup", 0, "--smoke", "--out", out)
    teacher = load_with(tmp_path, folders, "sprint")
    home, info = read_student(out)
    student = load_model(home, info["model"], teacher)
    same_as_card(home, teacher, student, sana_sprint.sample, 2, PROMPTS[0], 0, **info["sampler"])

"""common/teachers_flow.py: FLUX.1, Qwen-Image, Z-Image, Wan 2.1 and 2.2 against their own pipelines of diffusers, as tests/test_teachers.py does with the others."""

import json
import re

import numpy as np
import pytest
import test_teachers
import torch
from helpers.runs import close, processes
from safetensors.torch import load_file
from test_data import picture
from test_teachers import PROMPTS, SIZE, folders, load, native, pipeline  # noqa: F401  folders: a fixture
from torch.nn.attention import SDPBackend, sdpa_kernel

import dmd2
import eval as eval_script
import phased_dmd
from common.errors import UserError
from common.files import ROOT, WEIGHTS
from common.model import Model
from common.routed import ByLabel, Routed
from common.schedules import EDM, VP, TrigFlow, equal_snr
from common.teachers.flow import pack, unpack
from common.teachers.load import load_model, load_pipeline, load_teacher
from common.teachers.pipeline import Pipeline
from common.teachers.students import read_student, sampler_of
from common.teachers.wan import Wan
from tools.rows import make_rows, prompt_kwargs

NAMES = ["flux", "qwen", "zimage", "wan", "wan22"]
PACKED = ("flux", "qwen")


def wide(model):
    """The same number of tokens in another format, so that height and width cannot be mistaken for each other."""
    for m in getattr(model, "experts", [model]):
        m.shape = (*m.shape[:-2], m.shape[-2] // 2, m.shape[-1] * 2)
    return model


def call(model, pipe, prompts, z, steps, w, kind="latent", **kw):
    """pipe(...) with guidance w in our convention -> latents as ours, or what `kind` asks for."""
    name, n = model.adapter, len(prompts)
    h, width = model.image_shape[-2:]
    if name == "flux":
        kw.setdefault("guidance_scale", model.guidance)
    if name in ("flux", "qwen-image"):
        kw |= dict(
            true_cfg_scale=w, negative_prompt=[dict(flux="").get(name, " ")] * n if w > 1 else None
        )
    else:
        kw |= dict(guidance_scale=w - 1 if name == "z-image" else w) | (
            dict(num_frames=model.frames) if name == "wan" else {}
        )
    packed = name in ("flux", "qwen-image")
    out = pipe(
        prompts,
        height=h,
        width=width,
        num_inference_steps=steps,
        latents=pack(z) if packed else z,
        output_type=kind,
        **kw,
    )
    out = out.frames if name == "wan" else out.images
    return unpack(out, *z.shape[-2:]) if packed and kind == "latent" else out


def test_packing():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    assert torch.equal(unpack(pack(x), 4, 6), x)
    assert (
        pack(x)[1, 4].tolist() == x[1, :, 2:4, 2:4].flatten().tolist()
    )  # the second token of the second row


@pytest.mark.parametrize("name", NAMES)
def test_our_sampler_is_the_pipeline(name, folders):
    model = wide(load(folders, name))
    pipe = pipeline(model, folders(name))
    cond = model.encode(torch.tensor([2, 0]))
    found = {}
    for steps, w in ((2, 3.0), (5, 3.0), (5, 1.0), (2, 1.0)):
        z = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(steps))
        theirs = call(model, pipe, [PROMPTS[2], PROMPTS[0]], z, steps, w)
        with torch.no_grad():
            ours = native(model, pipe.scheduler, z, cond, steps, w, "flow")
        assert (ours - theirs).norm() < 1e-5 * theirs.norm(), (steps, w)
        if (steps, w) == (5, 3.0):
            with torch.no_grad():
                test_teachers.through_other_schedules(
                    model, theirs, pipe.scheduler, z, cond, steps, w, "flow"
                )
        found[steps, w] = ours
    assert (found[2, 3.0] - ours).norm() > 0.02 * ours.norm()  # guidance does something


@pytest.mark.parametrize("name", NAMES)
def test_the_same_estimate_in_another_schedule(name, folders):
    model = load(folders, name)
    x0, eps = torch.randn(2, 2, *model.shape, generator=torch.Generator().manual_seed(0))
    for s in (0.9, 0.3):
        a, cond = 1 - s, model.encode([0, 1])
        with torch.no_grad():
            for w in (1.0, 3.0):
                here = model.guided(a * x0 + s * eps, a, s, cond, w)
                for ask in (EDM(), VP(), TrigFlow()):
                    _, a2, s2, scale = equal_snr(ask, a, s)
                    there = model.guided((scale * (a * x0 + s * eps)).float(), a2, s2, cond, w)
                    assert (there - here).norm() < 1e-5 * here.norm(), (s, w, ask.config)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_the_pipelines(name, folders):
    model = wide(load(folders, name))
    pipe = pipeline(model, folders(name))
    z = torch.randn(1, *model.shape)
    latents, image = (
        call(model, pipe, PROMPTS[:1], z, 2, 1.0),
        call(model, pipe, PROMPTS[:1], z, 2, 1.0, "pil")[0],
    )  # Qwen-Image's own table has 0 / 0 for 1 step
    assert latents.isfinite().all()
    theirs = torch.from_numpy(
        np.array([np.array(f) for f in image] if model.video else np.array(image))
    ).movedim(-1, 0)
    ours = model.decode(latents)[0]
    assert (
        ours.shape == theirs.shape == model.image_shape
        and (ours.int() - theirs.int()).abs().max() <= 1
    )
    assert model.encode_images(ours[None]).shape == latents.shape
    rows = model.to_pictures(latents)
    assert torch.equal(
        rows[0], torch.cat([ours[:, i] for i in (0, 2, 4)], 1) if model.video else ours
    )


@pytest.mark.parametrize("name", NAMES)
def test_encoding_is_the_inverse_of_what_the_decoder_reads(name, folders):
    """Latents of the encoder, shifted and scaled: what the pipeline's decoder undoes."""
    model = load(folders, name)
    images = torch.randint(0, 256, (1, *model.image_shape), dtype=torch.uint8)
    with torch.no_grad():
        y = images.float() / 127.5 - 1
        y = model.vae.encode(y[:, :, None] if name == "qwen" else y).latent_dist.mode()
        y = y[:, :, 0] if name == "qwen" else y
    shift, scale = model.latent_stats()
    assert torch.allclose(
        model.encode_images(images) / scale + shift, y, atol=1e-5
    ) and not torch.allclose(model.encode_images(images), y, atol=1e-2)


@pytest.mark.parametrize("name", ["flux", "qwen", "zimage"])
def test_time_shift_is_the_schedulers(name, folders):
    """Our grid of n levels is the scheduler's table, but for Qwen-Image's stretching of it."""
    model = load(folders, name)
    scheduler = pipeline(model, folders(name)).scheduler
    scheduler = type(scheduler).from_config(scheduler.config, shift_terminal=None)
    call(
        model,
        pipe := pipeline(model, folders(name)),
        PROMPTS[:1],
        torch.zeros(1, *model.shape),
        4,
        1.0,
    )
    pipe.scheduler = scheduler
    call(model, pipe, PROMPTS[:1], torch.zeros(1, *model.shape), 4, 1.0)
    assert (
        torch.allclose(scheduler.sigmas[:-1].double(), model.schedule.grid(4).flip(0), atol=1e-6)
        and model.schedule.shift > 1.5
    )


def test_qwen_keeps_the_length_of_the_conditional_velocity(folders):
    model = load(folders, "qwen")
    x, cond = torch.randn(2, *model.shape), model.encode([0, 1])
    with torch.no_grad():
        c, u = model.cond_and_uncond(x, 0.4, 0.6, cond)
        g = model.guided(x, 0.4, 0.6, cond, 40.0)
    assert torch.allclose(
        pack(x - g).norm(dim=-1), pack(x - c).norm(dim=-1), rtol=1e-4
    ) and not torch.allclose(g, u + 40 * (c - u), atol=0.1)
    assert torch.equal(
        model.guided(x, 1.0, 0.0, cond, 4.0), x
    )  # at the clean end there is no velocity


def test_flux_reads_its_guidance(folders):
    model = load(folders, "flux")
    pipe, z, cond = (
        pipeline(model, folders("flux")),
        torch.randn(1, *model.shape),
        model.encode([1]),
    )
    assert model.guidance == 3.5 and model.config()["guidance"] == 3.5
    plain = native(model, pipe.scheduler, z, cond, 2, 1.0, "flow").detach()
    model.guidance = 7.0
    theirs = call(model, pipe, [PROMPTS[1]], z, 2, 1.0, guidance_scale=7.0)
    ours = native(model.copy(), pipe.scheduler, z, cond, 2, 1.0, "flow").detach()
    assert (ours - theirs).norm() < 1e-5 * theirs.norm() and (
        ours - plain
    ).norm() > 1e-3 * plain.norm()


def test_flux_guidance_is_the_students(folders, tmp_path):
    """--embedded-guidance goes to teacher and student, and comes back with the student, whole or LoRA, whatever the teacher is told then."""
    teacher, plain = load(folders, "flux", guidance=6.0), load(folders, "flux")
    assert (teacher.guidance, plain.guidance) == (6.0, 3.5)
    x, cond = torch.randn(1, *plain.shape), plain.encode([1])
    for name, adapters in (
        ("whole", None),
        ("lora", dict(rank=2, alpha=2, targets=None, seed=0, flag="--lora")),
    ):
        student = teacher.copy(adapters)
        student.save(tmp_path / name, {})
        info = json.loads((tmp_path / name / "distill.json").read_text())["model"]
        again = load_model(tmp_path / name, info, plain)
        with torch.no_grad():
            assert (
                again.guidance == 6.0
                and plain.guidance == 3.5
                and torch.allclose(again(x, 0.3, 0.7, cond), teacher(x, 0.3, 0.7, cond), atol=1e-6)
            )
            assert not torch.allclose(again(x, 0.3, 0.7, cond), plain(x, 0.3, 0.7, cond), atol=1e-4)
        for wrong in (-1, "3.5", True, None, float("nan")):
            with pytest.raises(UserError, match="guidance: expected a number >= 0"):
                load_model(tmp_path / name, dict(info, guidance=wrong), plain)
    assert (
        prompt_kwargs(
            eval_script.parse_args(["--teacher", "flux"]), dict(flags=dict(embedded_guidance=6.0))
        )["guidance"]
        == 6.0
    )
    with pytest.raises(
        UserError,
        match="--embedded-guidance 2: expected a teacher whose network takes a guidance scale, such as FLUX.1-dev, found .*sd3",
    ):
        load(folders, "sd3", guidance=2.0)


def test_wan_experts_and_their_boundary(folders):
    model = load(folders, "wan22")
    assert (
        isinstance(model, Routed)
        and len(model.experts) == 2
        and model.video
        and model.shape == (4, 2, 8, 8)
    )
    edge = 0.875  # pipeline: t >= 875 is the first expert's
    s = torch.tensor([1.0, 0.9, edge, np.nextafter(edge, 0), 0.5, 0.0], dtype=torch.float64)
    assert model.route(6, 1 - s, s, {}).tolist() == [0, 0, 0, 1, 1, 1]
    assert any(not torch.equal(a, b) for a, b in zip(*(e.parameters() for e in model.experts)))
    one = load(folders, "wan")
    assert (
        isinstance(one, Wan)
        and one.vae_scale == 4
        and one.schedule.shift == model.schedule.shift == 3.0
    )  # flow_shift of its scheduler
    x, cond = torch.randn(2, *model.shape), model.encode([0, 1])
    mixed = model(x, torch.tensor([0.05, 0.5]), torch.tensor([0.95, 0.5]), cond, features=True)[0]
    for i, (e, s) in enumerate(
        zip(model.experts, (0.95, 0.5))
    ):  # each sample's features are those of its own expert
        alone = e(
            x[i : i + 1], 1 - s, s, {k: v[i : i + 1] for k, v in cond.items()}, features=True
        )[0]
        assert torch.allclose(mixed[i : i + 1], alone, atol=1e-5)


def test_experts_take_new_conditions_and_come_back(folders, tmp_path):
    model = load(folders, "wan22")
    student = model.copy().extend("r")
    x, cond = torch.randn(2, *model.shape), dict(model.encode([0, 1]), r=torch.rand(2))
    levels = torch.tensor([0.05, 0.5]), torch.tensor([0.95, 0.5])
    assert torch.allclose(
        student(x, *levels, cond), model(x, *levels, cond), atol=1e-4
    )  # not bit for bit: weights of a mapped file lie elsewhere in memory
    for expert in student.experts:
        expert.extras["r"].layers[2].weight.data.normal_()
    assert (student(x, *levels, cond) - model(x, *levels, cond)).abs().amax(
        (1, 2, 3, 4)
    ).min() > 1e-3
    student.save(tmp_path / "s", {})
    again = load_model(
        tmp_path / "s", json.loads((tmp_path / "s" / "distill.json").read_text())["model"], model
    )
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True)
    )
    assert torch.allclose(again(x, *levels, cond), student(x, *levels, cond), atol=1e-4)


def test_labels_of_prompts(folders):
    """What `ByLabel`, MSD's students, goes by."""
    model = load(folders, "flux")
    both = ByLabel([model, model.copy()], [1, 0, 1])
    assert both.route(3, 1.0, 1.0, model.encode([0, 1, 2])).tolist() == [1, 0, 1] and both.route(
        2, 1.0, 1.0, model.null(2)
    ).tolist() == [0, 0]


def test_wan_with_one_time_per_token(folders):
    """Wan 2.2 5B: its pipeline gives every token a time, all of them equal in text to video."""
    model = load(folders, "wan")
    pipe, z = pipeline(model, folders("wan")), torch.randn(1, *model.shape)
    pipe.register_to_config(expand_timesteps=True)
    theirs = call(model, pipe, [PROMPTS[1]], z, 2, 3.0)
    with torch.no_grad():
        ours = native(model, pipe.scheduler, z, model.encode([1]), 2, 3.0, "flow")
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_frames(folders, monkeypatch):
    assert load(folders, "wan", frames=9).shape == (4, 3, 8, 8) and load(
        folders, "wan", frames=1
    ).to_pictures(torch.randn(2, 4, 1, 8, 8)).shape == (2, 3, 32, 32)
    assert load(folders, "wan", frames=5, size=[16, 24]).image_shape == (3, 5, 16, 24) and load(
        folders, "wan", frames=1, size=None
    ).image_shape == (3, 1, 480, 832)
    monkeypatch.setattr(Pipeline, "load_net", None)  # all of these before anything is loaded
    for size, says in (
        ([16, 20], "16x20: expected a multiple of 8"),
        ([4, 16], "4x16: expected a multiple of 8"),
    ):
        with pytest.raises(UserError, match=f"--size {says}"):
            load(folders, "wan", size=size)
    for name, size in (("flux", 18), ("qwen", 6), ("zimage", [16, 2])):
        with pytest.raises(UserError, match="--size .*: expected a multiple of 4 pixels"):
            load(folders, name, size=size)
    for frames in (0, 4, -3):
        with pytest.raises(UserError, match=f"--frames {frames}: expected a multiple of 4, plus 1"):
            load(folders, "wan", frames=frames)
    with pytest.raises(
        UserError, match="--frames 5: expected a text-to-video teacher, found FluxPipeline"
    ):
        load(folders, "flux", frames=5)


def test_a_class_that_diffusers_does_not_have(folders, tmp_path):
    folder = test_teachers.broken(folders, tmp_path, "flux")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | dict(vae=["diffusers", "NoSuchVAE"]))
    )
    with pytest.raises(UserError, match="not loaded: AttributeError.*NoSuchVAE"):
        load_pipeline(
            str(folder), prompts=PROMPTS, cache=tmp_path / "cache", size=16, say=lambda *a: None
        )


def test_older_diffusers(folders, monkeypatch):
    import diffusers

    for name in ("zimage", "qwen"):  # built, or the test is skipped, by the version that is here
        folders(name)
    monkeypatch.setattr(diffusers, "__version__", "0.36.1")
    load(folders, "zimage")
    with pytest.raises(
        UserError, match="QwenImagePipeline: expected diffusers 0.37 or newer, found 0.36.1"
    ):
        load(folders, "qwen")


@pytest.mark.parametrize("name", NAMES[:4])
def test_copies_features_and_new_conditions(name, folders):
    test_teachers.test_copies_features_and_new_conditions(name, folders)


@pytest.mark.parametrize("name", NAMES[:4])
def test_features_are_where_the_pixels_are(name, folders):
    """A map of features has the format of the sample, and changes most where the sample does. Frames lie one below the other."""
    model = wide(load(folders, name))
    cond, x = model.encode([0]), torch.randn(1, *model.shape)
    y = x.clone()
    y[..., -2:, 2:4] += 5  # last row of patches, second column
    with torch.no_grad():
        f, g = (model(v, 0.6, 0.8, cond, features=True)[0] for v in (x, y))
    h, w = model.shape[-2] // 2, model.shape[-1] // 2
    assert f.shape[2:] == ((2 if model.video else 1) * h, w)
    f, g = (v.view(*v.shape[:2], -1, h, w) for v in (f, g))  # [1, D, frames, h, w]
    change = (f - g).square().sum(1)[0]
    assert all(frame.argmax() == (h - 1) * w + 1 for frame in change)


@pytest.mark.parametrize("name", NAMES[:4])
def test_checkpointing_changes_nothing(name, folders):
    model, grads = load(folders, name), []
    cond, x = model.encode([0, 1]), torch.randn(2, *model.shape)
    student = model.copy().extend("r")
    student.extras["r"].layers[2].weight.data.normal_()
    for on in (False, True):
        if on:
            student.checkpoint_activations()
            inner = student.net._gradient_checkpointing_func
            seen = []
            student.net._gradient_checkpointing_func = lambda *a: seen.append(1) or inner(*a)
        student.zero_grad()
        (
            student(x, 0.6, 0.8, dict(cond, r=torch.tensor([0.3, 0.9]))).square().sum()
            + student(x, 0.3, 0.7, dict(cond, r=torch.tensor([0.1, 0.5]))).sum()
        ).backward()
        grads.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert (
        seen
        and len(grads[0]) == len(grads[1])
        and all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads))
    )


def stochastic(model, pipe, steps):
    """The pipeline with the Euler scheduler of diffusers in its stochastic form, at the student's own levels: dmd2's sampler."""
    from diffusers import FlowMatchEulerDiscreteScheduler as Euler

    pipe.scheduler = Euler(
        shift=model.schedule.shift, use_dynamic_shifting=False, stochastic_sampling=True
    )
    sigmas = [(i + 1) / 1000 for i in steps]
    if model.video:  # WanPipeline passes only a number of steps
        set_timesteps = pipe.scheduler.set_timesteps
        pipe.scheduler.set_timesteps = lambda n, device=None: set_timesteps(
            sigmas=sigmas, device=device
        )
        return {}
    return dict(sigmas=sigmas)


def same_latents(name, nfe, teacher, student, home, folders, sampler, adapters=False):
    """The plain pipeline with the network, or the LoRA, of the student's folder gives our sampler's latents."""
    import diffusers

    pipe, z = pipeline(teacher, folders(name)), torch.randn(2, *teacher.shape)
    if adapters:
        pipe.load_lora_weights(home)
    else:
        for part, sub in (
            (("transformer", "expert-0"), ("transformer_2", "expert-1"))
            if name == "wan22"
            else (("transformer", ""),)
        ):
            setattr(
                pipe, part, getattr(diffusers, teacher.network_class).from_pretrained(home / sub)
            )
    torch.manual_seed(5)
    theirs = call(
        student,
        pipe,
        [PROMPTS[0], PROMPTS[2]],
        z,
        nfe,
        1.0,
        **stochastic(teacher, pipe, dmd2.step_indices(nfe)),
    )
    noise = lambda: (
        unpack(torch.randn_like(pack(z)), *z.shape[-2:]) if name in PACKED else torch.randn_like(z)
    )
    torch.manual_seed(5)
    ours = dmd2.sample(student, z, teacher.encode([0, 2]), nfe, noise, **sampler)
    assert (ours - theirs).norm() < 1e-4 * ours.norm()
    torch.manual_seed(5)
    assert (
        ours - dmd2.sample(teacher, z, teacher.encode([0, 2]), nfe, noise)
    ).norm() > 1e-3 * ours.norm()  # it has learnt something


@pytest.mark.parametrize(
    "name, nfe",
    [("flux", 1), ("wan22", 4)]
    + [
        pytest.param(n, k, marks=pytest.mark.slow)
        for n in NAMES
        for k in (1, 4)
        if (n, k) not in (("flux", 1), ("wan22", 4))
    ],
)
def test_dmd2_on_it(name, nfe, folders, scripts, tmp_path):
    """From the command line: three iterations, pictures, export, resume; the student in the plain pipeline of diffusers gives our sampler's latents."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS * 3))
    size = [f for k, v in SIZE[name].items() for f in (f"--{k}", v)]
    args = [
        "--teacher",
        folders(name),
        "--prompts",
        tmp_path / "prompts.txt",
        "--cache-prompts",
        tmp_path / "cache",
        "--nfe",
        nfe,
        "--cfg",
        3,
        "--batch",
        4,
        *size,
    ]
    args += ["--lr", 1e-3, "--lr-fake", 1e-3, "--warmup", 0, "--ratio", 2] + [
        "--embedded-guidance",
        6,
    ] * (name == "flux")
    p = scripts.run("dmd2.py", *args, "--smoke", "--out", tmp_path / "run")
    assert (
        "brings no metric" in p.out
        and (tmp_path / "run" / "samples" / "00000003.png").exists()
        and "Traceback" not in p.err
    )
    home = tmp_path / "run" / "student"
    info = json.loads((home / "distill.json").read_text())
    teacher = load_pipeline(
        str(folders(name)),
        prompts=str(tmp_path / "prompts.txt"),
        cache=tmp_path / "cache",
        say=lambda *a: None,
        **SIZE[name],
    )
    student = load_model(home, info["model"], teacher)
    assert name != "flux" or student.guidance == info["flags"]["embedded_guidance"] == 6
    same_latents(name, nfe, teacher, student, home, folders, info["sampler"])
    if nfe == 4:
        scripts.run(
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


@pytest.mark.slow
@pytest.mark.parametrize("nfe", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_dmd2_lora_on_it(name, nfe, folders, scripts, tmp_path):
    """From the command line with adapters on student and critic; the LoRA file in the plain pipeline gives our network's answer."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS * 3))
    size = [f for k, v in SIZE[name].items() for f in (f"--{k}", v)]
    p = scripts.run(
        "dmd2.py",
        "--teacher",
        folders(name),
        "--prompts",
        tmp_path / "prompts.txt",
        "--cache-prompts",
        tmp_path / "cache",
        "--nfe",
        nfe,
        "--cfg",
        3,
        "--batch",
        4,
        *size,
        "--lr",
        2e-2,
        "--lr-fake",
        1e-3,
        "--warmup",
        0,
        "--ratio",
        2,
        "--lora",
        4,
        "--lora-fake",
        2,
        "--smoke",
        "--out",
        tmp_path / "run",
    )
    assert "of the teacher's, frozen" in p.out and "Traceback" not in p.err
    home = tmp_path / "run" / "student"
    teacher = load_pipeline(
        str(folders(name)),
        prompts=str(tmp_path / "prompts.txt"),
        cache=tmp_path / "cache",
        say=lambda *a: None,
        **SIZE[name],
    )
    student = load_model(home, json.loads((home / "distill.json").read_text())["model"], teacher)
    z, t, cond = torch.randn(2, *teacher.shape), 0.9, teacher.encode([0, 2])
    with torch.no_grad():
        ours, before = student(z, 1 - t, t, cond), teacher(z, 1 - t, t, cond)
        assert (ours - before).norm() > 1e-3 * before.norm()
        if name != "wan22":  # its two LoRAs are in folders of their own
            pipe = pipeline(teacher, folders(name))
            pipe.load_lora_weights(home)
            assert (
                teacher.with_network(pipe.transformer)(z, 1 - t, t, cond) - ours
            ).norm() < 1e-4 * ours.norm()


@pytest.mark.slow  # three times the import of diffusers
def test_experts_over_two_processes(folders, scripts, tmp_path):
    """The one-step student of Wan 2.2 is its first expert alone, the critic's samples fall to both: DDP waits for no gradient of an expert that has none."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    args = [
        "dmd2.py",
        "--teacher",
        folders("wan22"),
        "--prompts",
        tmp_path / "prompts.txt",
        "--cache-prompts",
        tmp_path / "cache",
        "--size",
        32,
        "--frames",
        5,
        "--cfg",
        1,
        "--batch",
        4,
        "--iters",
        4,
        "--ratio",
        2,
        "--warmup",
        0,
        "--sample-every",
        0,
        "--log-every",
        1,
        "--eval-n",
        0,
        "--lr",
        1e-4,
        "--lr-fake",
        1e-4,
        "--out",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    scripts.run(*args, one)
    ps = processes(scripts, 2, *args, two)
    assert [p.wait() for p in ps] == [0, 0], ps[0].err + ps[1].err
    close(one, two, 4)
    moved = lambda i, sub: any(
        not torch.equal(v, load_file(folders("wan22") / sub / WEIGHTS)[k])
        for k, v in load_file(two / "student" / f"expert-{i}" / WEIGHTS).items()
    )
    assert moved(0, "transformer") and not moved(1, "transformer_2")


@pytest.mark.parametrize(
    "spoil, flags, says",
    [
        (
            lambda f: (f / "model_index.json").unlink(),
            [],
            "expected a teacher folder .teacher.json, or model_index.json of a diffusers pipeline., found: no teacher.json in it",
        ),
        (
            lambda f: (f / "model_index.json").write_text(
                json.dumps(dict(_class_name="KandinskyPipeline"))
            ),
            [],
            "expected one of the pipelines .*FluxPipeline.*WanPipeline.*, found 'KandinskyPipeline'",
        ),
        (
            lambda f: (f / "p.txt").write_text(""),
            ["--prompts", "{tmp}/p.txt"],
            "--prompts .*p.txt: expected one prompt per line, found an empty file",
        ),
        (
            lambda f: (f / "p.txt").write_text("ok\n" + "a" * 10_000_000),
            ["--prompts", "{tmp}/p.txt"],
            "--prompts .*p.txt: line 2: expected a prompt of at most 4000 characters",
        ),
        (
            lambda f: (f / "p.txt").write_text(" \n\n"),
            ["--prompts", "{tmp}/p.txt"],
            "--prompts .*p.txt: expected one prompt per line, found an empty file",
        ),
        (
            lambda f: None,
            ["--frames", "5"],
            "--frames 5: expected a text-to-video teacher, found FluxPipeline",
        ),
        (lambda f: None, ["--size", "480x834"], "--size 480x834: expected a multiple of 4 pixels"),
        (
            lambda f: None,
            ["--size", "480x"],
            "argument --size: expected pixels, as 512 or HEIGHTxWIDTH, found '480x' .*",
        ),
        (
            lambda f: None,
            ["--size", "16", "--lora", "500"],
            "--lora 500: expected a rank of at most 16, the smaller side of layer .*",
        ),
        (
            lambda f: picture(f / "set" / "dog.png"),
            ["--size", "16", "--gan", "--data", "{tmp}/set"],
            "--data .*set: expected a caption for each image, .*none for 1 of 1 images, the first is dog.png",
        ),
    ],
)
def test_mistakes_end_in_one_line(spoil, flags, says, folders, scripts, tmp_path):
    folder = test_teachers.broken(folders, tmp_path, "flux")
    spoil(folder)
    flags = [f.format(tmp=folder) for f in flags]
    p = scripts.run(
        "dmd2.py",
        "--teacher",
        folder,
        "--cache-prompts",
        tmp_path / "cache",
        "--smoke",
        "--out",
        tmp_path / "run",
        *flags,
        code=2,
    )
    assert re.fullmatch(f"dmd2.py: [^\\n]*{says}[^\\n]*\\n", p.err), p.err


def test_videos_are_not_measured(folders):
    with pytest.raises(UserError, match="expected a teacher of images.*found one of videos"):
        make_rows(
            eval_script.parse_args(
                [
                    "--teacher",
                    str(folders("wan")),
                    "--prompts",
                    str(ROOT / "assets" / "prompts.txt"),
                    "--size",
                    "32",
                    "--frames",
                    "5",
                    "--cache-prompts",
                    str(folders.cache),
                ]
            ),
            torch.float32,
        )


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sana", *NAMES[:4]])
def test_forward_derivatives_are_central_differences(name, folders, monkeypatch):
    """torch.func.jvp along the sample and along time, as sana_sprint, twinflow and flowmap need it, in float64."""
    model = load(folders, name)
    model.net.double()
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "float", torch.Tensor.double
    )  # the networks, and the view's times, round to float32 here and there: not in this test
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda x, *a, **kw: to(x, *(torch.float64 if v is torch.float32 else v for v in a), **kw),
    )
    cond = {k: v.double() if v.is_floating_point() else v for k, v in model.encode([0, 1]).items()}
    g = torch.Generator().manual_seed(0)
    x, dx = torch.randn(2, 2, *model.shape, generator=g, dtype=torch.float64)
    high = model.schedule.t_max
    t, dt = (
        torch.tensor([0.3217, 0.7391], dtype=torch.float64) * high,
        torch.tensor([1.0, -0.5], dtype=torch.float64) * high / 100,
    )

    def f(x, t):
        return model(x, model.schedule.alpha(t), model.schedule.sigma(t), cond)

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        for dx, dt in ((dx, 0 * dt), (0 * dx, dt)):  # one by one: they differ in size
            value, slope = torch.func.jvp(f, (x, t), (dx, dt))
            h, along = 1e-6, lambda s: f(x + s * dx, t + s * dt)
            difference = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
            assert (
                torch.allclose(value, f(x, t))
                and (slope - difference).norm() < 1e-6 * slope.norm()
                and slope.norm() > 0
            )


@pytest.mark.parametrize(
    "shift, nfe, phases, one",
    [
        (5.0, 4, 2, [0, 1]),
        (5.0, 4, 4, [0, 0, 1, 1]),
        (1.0, 4, 2, [None, 1]),
        (5.0, 1, 1, [0]),
        (5.0, 4, 1, [None]),
    ],
)
def test_phases_start_as_the_experts_of_their_levels(shift, nfe, phases, one, folders):
    """Steps of four, shifted by 5: 1, 0.9375 | 0.8333, 0.625, and the experts meet at 0.875. None: a phase that asks both."""
    teacher, times, ends = (
        load(folders, "wan22"),
        phased_dmd.step_times(nfe, shift),
        phased_dmd.phase_ends(nfe, phases),
    )
    assert [
        next((i for i, e in enumerate(teacher.experts) if e is s), None)
        for s in phased_dmd.starts_as(teacher, times, ends)
    ] == one
    plain = load(folders, "wan")
    assert phased_dmd.starts_as(plain, times, ends) == [plain] * phases


@pytest.mark.parametrize(
    "script, flags",
    [
        ("phased_dmd", []),
        pytest.param("phased_dmd", ["--lora", 4, "--phases", 4], marks=pytest.mark.slow),
        pytest.param("phased_dmd", ["--step-shift", 1], marks=pytest.mark.slow),
        pytest.param("msd", ["--students", 2, "--adm", 0], marks=pytest.mark.slow),
        pytest.param("msd", ["--students", 2, "--adm", 0, "--lora", 4], marks=pytest.mark.slow),
    ],
)
def test_experts_on_a_teacher_of_experts(script, flags, folders, scripts, tmp_path):
    """Wan 2.2: what is exported is the student, all of it, and is read back; each adapter on the weights that it was trained on."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    text = dict(prompts=str(tmp_path / "prompts.txt"), cache=tmp_path / "cache", **SIZE["wan22"])
    scripts.run(
        f"{script}.py",
        "--teacher",
        folders("wan22"),
        "--prompts",
        text["prompts"],
        "--cache-prompts",
        text["cache"],
        "--size",
        32,
        "--frames",
        5,
        "--batch",
        4,
        "--smoke",
        "--ema",
        0,
        "--lr",
        1e-2,
        "--lr-fake",
        1e-3,
        "--cfg",
        3,
        "--warmup",
        0,
        "--ratio",
        1,
        "--out",
        tmp_path / "run",
        *flags,
    )
    home = tmp_path / "run" / "student"
    info, teacher = (
        json.loads((home / "distill.json").read_text()),
        load_pipeline(str(folders("wan22")), say=lambda *a: None, **text),
    )
    student = load_model(home, info["model"], teacher)
    weights, state = (
        student.state_dict(),
        torch.load(
            tmp_path / "run" / "ckpt" / f"it-{info['flags']['iters']:08d}.pt", weights_only=True
        )["state"]["student"],
    )
    assert weights.keys() == state.keys() and all(
        torch.allclose(v, state[k], atol=1e-6) for k, v in weights.items()
    )
    nested = [isinstance(e, Routed) for e in student.experts]
    assert nested == (
        [True] * 2
        if script == "msd"
        else [True, False]
        if flags == ["--step-shift", 1]
        else [False] * (4 if flags else 2)
    )
    if "--lora" in flags:
        theirs = [{p.data_ptr() for p in e.parameters()} for e in teacher.experts]
        for i, expert in enumerate(student.experts):  # msd: two of two; phased_dmd: one of four
            parts, expected = (
                (expert.experts, theirs) if script == "msd" else ([expert], [theirs[i // 2]])
            )
            assert [{t.data_ptr() for t in part.base} for part in parts] == expected
    z = torch.randn(2, *teacher.shape)
    sample = sampler_of(home, info)
    draw = lambda model: (
        torch.manual_seed(3),
        sample(
            model,
            z,
            teacher.encode([0, 1]),
            info["nfe"],
            lambda: torch.randn_like(z),
            **info["sampler"],
        ),
    )[1]
    assert (draw(student) - draw(teacher)).norm() > 1e-3 * draw(teacher).norm()
    for broken in (
        dict(experts=[info["model"]]),
        dict(experts=[dict(info["model"], experts=[info["model"]])]),
        dict(table="x"),
        dict(table=[1.0, 2.0]),
    ):
        with pytest.raises(UserError):
            load_model(home, info["model"] | broken, teacher)


METHODS = dict(
    sid=[],
    decoupled_dmd=["--nfe", 4, "--cfg", 3],
    phased_dmd=[],
    msd=["--students", 2, "--adm", 0],
    twinflow=["--image-free", "--guide", "frozen", "--cfg", 3],
    flowmap=[],
    boot=["--cfg", 2],
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "wan22"])
@pytest.mark.parametrize("script", METHODS)
def test_every_method_without_images(script, name, folders, scripts, tmp_path):
    """Run, export, reload: the student read back is the teacher's network, trained."""
    prompts, size = tmp_path / "prompts.txt", SIZE.get(name, {})
    prompts.write_text("\n".join(PROMPTS))
    p = scripts.run(
        f"{script}.py",
        "--teacher",
        folders(name),
        "--prompts",
        prompts,
        "--cache-prompts",
        tmp_path / "cache",
        "--batch",
        4,
        "--lr",
        1e-3,
        "--warmup",
        0,
        "--smoke",
        "--out",
        tmp_path / "run",
        *[f for k, v in size.items() for f in (f"--{k}", v)],
        *METHODS[script],
    )
    home = tmp_path / "run" / "student"
    assert "Traceback" not in p.err and (tmp_path / "run" / "samples" / "00000003.png").exists()
    teacher = load_teacher(
        str(folders(name)),
        text=dict(prompts=str(prompts), cache=tmp_path / "cache", say=lambda *a: None, **size),
    )
    info = read_student(home)[1]
    student, leaves = (
        load_model(home, info["model"], teacher),
        lambda net: [dict(m.named_parameters()) for m in net.modules() if isinstance(m, Model)],
    )
    both = lambda after, before: [
        k for k in before if k in after and after[k].shape == before[k].shape
    ]
    far = []  # of each student's network from the nearest of the teacher's
    for after in leaves(student):
        assert all(len(both(after, before)) > 0.9 * len(before) for before in leaves(teacher))
        far.append(
            min(
                max((after[k] - before[k]).abs().max() for k in both(after, before))
                for before in leaves(teacher)
            )
        )
    assert max(far) > 1e-4, far  # of msd's students not all have had a turn after three iterations
    noise = lambda: torch.randn(2, *teacher.shape)
    with torch.no_grad():
        x = sampler_of(home, info)(
            student,
            noise(),
            teacher.encode(torch.tensor([0, 1])),
            info["nfe"],
            noise,
            **info["sampler"],
        )
    assert x.shape == (2, *teacher.shape) and x.isfinite().all()

"""common/teachers.py: every adapter against its own pipeline of diffusers, on tiny random weights saved in the real format."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from helpers import pipelines
from safetensors.torch import load_file, save_file

import dmd2
from common.errors import UserError
from common.schedules import EDM, VP, Flow, TrigFlow
from common.teachers import load as loader
from common.teachers.load import full_config, load_model, load_pipeline, load_teacher
from common.teachers.pipeline import Pipeline
from common.teachers.prompts import read_prompts
from common.teachers.unet import SD15, SDXL

PROMPTS = ["a red heart on the left of a dog", "dog", "pizza 7"]
NAMES = ["sd15", "sdxl", "sd3", "sana"]
HOW = dict(sd15="vp", sdxl="ve")  # the coordinates of the pipeline's scheduler, if not flow
SIZE = dict(
    flux=dict(size=16),
    qwen=dict(size=16),
    zimage=dict(size=16),
    wan=dict(size=32, frames=5),
    wan22=dict(size=32, frames=5),
)  # of what has no size of its own


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, made = tmp_path_factory.mktemp("teachers"), {}
    warnings.simplefilter("ignore")
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()

    def get(name):
        if name not in made:
            (base / name).mkdir(exist_ok=True)  # a builder that skips leaves it
            made[name] = getattr(pipelines, name)(base / name)
        return made[name]

    get.cache = base / "cache"
    return get


def load(folders, name, prompts=PROMPTS, **kw):
    return load_pipeline(
        str(folders(name)),
        prompts=prompts,
        cache=folders.cache,
        say=lambda *a: None,
        **SIZE.get(name, {}) | kw,
    )


def pipeline(model, folder):
    import diffusers

    empty = [
        k
        for k, v in json.loads((folder / "model_index.json").read_text()).items()
        if v == [None, None]
    ]
    pipe = getattr(diffusers, model.pipeline).from_pretrained(folder, **dict.fromkeys(empty))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reaches(ask, a, s):
    """Whether another schedule has this noise level: EDM and VP end before pure noise and before clean data."""
    t = ask.t_from_snr((a / s) ** 2)
    a2, s2 = ask.alpha(t), ask.sigma(t)
    return abs(a2 * s - a * s2) < 1e-5 * torch.hypot(a, s) * torch.hypot(
        a2, s2
    )  # sine of the angle between both, up to the rounding of t to float32


def native(model, scheduler, z, cond, steps, w, how, ask=None, asked=None):
    """The pipeline's own loop, with our `guided` in the place of its network. ask: another schedule in whose coordinates the network is asked, at the levels
    that it has; asked: list of these levels."""
    given = (
        dict(sigmas=np.linspace(1, 1 / steps, steps), mu=math.log(model.schedule.shift))
        if model.adapter in ("flux", "qwen-image", "z-image")
        else {}
    )
    scheduler.set_timesteps(None if given else steps, **given)
    x = z * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(scheduler.timesteps):
        if how == "vp":
            a, s = model.schedule.alpha(t), model.schedule.sigma(t)
        elif how == "ve":
            a, s = torch.tensor(1.0), scheduler.sigmas[i].double()
        else:  # at the scheduler's time: that of SANA and Wan is rounded down to an integer, while their noise level keeps its fraction
            s = t.double() / 1000
            a = 1 - s
        a2, s2, y = a, s, x
        if ask is not None and reaches(
            ask, a.double(), s
        ):  # the same point, scaled into another schedule
            t2 = ask.t_from_snr((a / s) ** 2)
            a2, s2 = ask.alpha(t2), ask.sigma(t2)
            y = (x * (s2 / s if s > a else a2 / a)).float()
            asked.append(float(s))
        x0 = model.guided(y, a2, s2, cond, w).double()
        out = (x.double() - a * x0) / s if how != "flow" else (x.double() - x0) / s
        x = scheduler.step(out.float(), t, x, return_dict=False)[0]
    return x


def through_other_schedules(model, theirs, *args):
    """The same samples when the network is asked in the coordinates of other schedules. args: of `native`, without the model."""
    steps = args[3]
    for ask in (Flow(), TrigFlow(), EDM(), VP()):
        asked = []
        if ask.config["name"] != model.schedule.config["name"]:
            assert (native(model, *args, ask, asked) - theirs).norm() < 1e-5 * theirs.norm(), (
                ask.config
            )
            assert (
                len(asked) == steps
                if isinstance(ask, (Flow, TrigFlow))
                else len(asked) >= steps - 2
            ), asked  # the first two have every level


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_our_sampler_is_the_pipeline(name, steps, folders):
    model = load(folders, name)
    pipe = pipeline(model, folders(name))
    z = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(steps))
    h, w = model.image_shape[1:]
    extra = (
        dict(complex_human_instruction=None, use_resolution_binning=False) if name == "sana" else {}
    )
    theirs = pipe(
        [PROMPTS[2], PROMPTS[0]],
        height=h,
        width=w,
        num_inference_steps=steps,
        guidance_scale=3.0,
        latents=z,
        output_type="latent",
        **extra,
    ).images
    cond = model.encode(torch.tensor([2, 0]))
    with torch.no_grad():
        ours = native(model, pipe.scheduler, z, cond, steps, 3.0, HOW.get(name, "flow"))
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        through_other_schedules(
            model, theirs, pipe.scheduler, z, cond, steps, 3.0, HOW.get(name, "flow")
        )
    plain = pipe(
        [PROMPTS[1]],
        height=h,
        width=w,
        num_inference_steps=steps,
        guidance_scale=1.0,
        latents=z[:1],
        output_type="latent",
        **extra,
    ).images
    with torch.no_grad():
        ours = native(
            model, pipe.scheduler, z[:1], model.encode([1]), steps, 1.0, HOW.get(name, "flow")
        )
    assert (ours - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_the_pipelines(name, folders):
    model = load(folders, name)
    pipe = pipeline(model, folders(name))
    z = torch.randn(1, *model.shape)
    h, w = model.image_shape[1:]
    extra = (
        dict(complex_human_instruction=None, use_resolution_binning=False) if name == "sana" else {}
    )
    call = lambda kind: (
        pipe(
            PROMPTS[:1],
            height=h,
            width=w,
            num_inference_steps=1,
            guidance_scale=1.0,
            latents=z,
            output_type=kind,
            **extra,
        ).images
    )
    latents, image = call("latent"), torch.from_numpy(np.array(call("pil")[0])).permute(2, 0, 1)
    assert (model.decode(latents)[0].int() - image.int()).abs().max() <= 1
    assert model.encode_images(model.decode(latents)).shape == latents.shape


@pytest.mark.parametrize("name, nfe", [("sd15", 1), ("sdxl", 4), ("sd3", 4), ("sana", 1)])
def test_dmd2_on_it(name, nfe, folders, scripts, tmp_path):
    """From the command line: three iterations, pictures, export; the student is loaded by diffusers and by eval.py."""
    import diffusers

    scripts.load(*pipelines.MODULES)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS * 3))
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
    ]
    p = scripts.run("dmd2.py", *args, "--smoke", "--out", tmp_path / "run")
    assert (
        "brings no metric" in p.out
        and (tmp_path / "run" / "samples" / "00000003.png").exists()
        and "Traceback" not in p.err
    )
    info = json.loads((tmp_path / "run" / "student" / "distill.json").read_text())
    teacher = load_pipeline(
        str(folders(name)),
        prompts=str(tmp_path / "prompts.txt"),
        cache=tmp_path / "cache",
        say=lambda *a: None,
    )
    student = load_model(tmp_path / "run" / "student", info["model"], teacher)
    net = getattr(diffusers, teacher.network_class).from_pretrained(tmp_path / "run" / "student")
    z, cond = torch.randn(2, *teacher.shape), teacher.encode([0, 1])
    with torch.no_grad():
        ours = dmd2.sample(student, z, cond, nfe, lambda: torch.zeros_like(z), **info["sampler"])
        again = dmd2.sample(
            teacher.with_network(net), z, cond, nfe, lambda: torch.zeros_like(z), **info["sampler"]
        )
        assert torch.equal(ours, again) and not torch.equal(
            ours, dmd2.sample(teacher, z, cond, nfe, lambda: torch.zeros_like(z))
        )
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


@pytest.mark.parametrize("name", NAMES)
def test_copies_features_and_new_conditions(name, folders):
    model = load(folders, name)
    cond, x = model.encode([0, 1]), torch.randn(2, *model.shape)
    student = model.copy()
    assert torch.equal(student(x, 0.6, 0.8, cond), model(x, 0.6, 0.8, cond))
    (h,) = student(x, 0.6, 0.8, cond, features=True)
    assert h.ndim == 4 and len(h) == 2 and h.dtype == torch.float32
    h.sum().backward()
    assert any(p.grad is not None for p in student.parameters()) and all(
        p.grad is None for p in model.parameters()
    )
    assert {id(p) for p in student.parameters()} == {
        id(p) for p in student.net.parameters()
    }  # no VAE, no text encoder
    before = student(x, 0.6, 0.8, cond)
    student.extend("r")
    assert torch.equal(student(x, 0.6, 0.8, dict(cond, r=torch.rand(2))), before)
    student.extras["r"].layers[2].weight.data.normal_()
    assert not torch.allclose(student(x, 0.6, 0.8, dict(cond, r=torch.rand(2))), before)


def broken(folders, tmp_path, name="sd15"):
    import shutil

    shutil.copytree(folders(name), tmp_path / "broken")
    return tmp_path / "broken"


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100),
            "not loaded",
        ),
        (lambda f: (f / "vae" / "config.json").unlink(), "vae/config.json: No such file"),
        (
            lambda f: (f / "scheduler" / "scheduler_config.json").write_text(
                json.dumps(dict(beta_schedule="linear"))
            ),
            "not loaded: KeyError",
        ),
        (
            lambda f: (f / "scheduler" / "scheduler_config.json").write_text(
                json.dumps(dict(beta_schedule="squaredcos_cap_v2"))
            ),
            "scheduler: expected beta_schedule",
        ),
        (lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"x"), "not loaded"),
    ],
)
def test_broken_folder(spoil, says, folders, tmp_path):
    folder = broken(folders, tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=says) as e:
        load_pipeline(str(folder), prompts=PROMPTS, cache=tmp_path / "cache", say=lambda *a: None)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", NAMES)
def test_another_format(name, folders):
    """--size 24x16, height and width, is what the pipeline makes of them. SANA's takes multiples of 32 only."""
    h, w = (64, 32) if name == "sana" else (24, 16)
    model = load(folders, name, size=[h, w])
    assert model.image_shape == (3, h, w) and model.decode(torch.zeros(1, *model.shape)).shape == (
        1,
        3,
        h,
        w,
    )
    pipe, z = pipeline(model, folders(name)), torch.randn(1, *model.shape)
    extra = (
        dict(complex_human_instruction=None, use_resolution_binning=False) if name == "sana" else {}
    )
    theirs = pipe(
        PROMPTS[:1],
        height=h,
        width=w,
        num_inference_steps=2,
        guidance_scale=3.0,
        latents=z,
        output_type="latent",
        **extra,
    ).images
    with torch.no_grad():
        ours = native(model, pipe.scheduler, z, model.encode([0]), 2, 3.0, HOW.get(name, "flow"))
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        if name == "sdxl":  # whose network is told the size
            model.__class__ = type("Turned", (SDXL,), dict(image_shape=(3, w, h)))
            assert (
                native(model, pipe.scheduler, z, model.encode([0]), 2, 3.0, "ve") - theirs
            ).norm() > 1e-4 * theirs.norm()


def test_size(folders, monkeypatch):
    """What cannot be is said before anything is loaded."""
    assert load(folders, "sd15", size=32).shape == (4, 16, 16)
    monkeypatch.setattr(Pipeline, "load_net", None)
    monkeypatch.setattr(loader, "embed_prompts", None)
    for name, size, says in (
        ("sd15", 30, "30: expected a multiple of 4 pixels"),
        ("sd15", 0, "0: expected a multiple of 4"),
        ("sd15", -4, "-4: expected a multiple of 4"),
        ("sd15", [32, 30], "32x30: expected a multiple of 4"),
        ("sdxl", [6, 32], "6x32: expected a multiple of 4"),
        ("sana", 3, "3: expected a multiple of 2"),
        ("sd3", [16, 68], "16x68: expected at most 64 pixels along a side"),
        ("sd3", 6, "6: expected a multiple of 4"),
    ):
        with pytest.raises(UserError, match=f"--size {says}") as e:
            load(folders, name, size=size)
        assert "\n" not in str(e.value)


def test_configurations_of_older_versions(folders, tmp_path):
    """A file that is silent about a value means the default of its class."""
    from diffusers import AutoencoderKL

    (tmp_path / "config.json").write_text(json.dumps(dict(latent_channels=16)))
    c = full_config(AutoencoderKL, tmp_path)
    assert c.latent_channels == 16 and c.scaling_factor == 0.18215 and Pipeline.scale(c) == 1
    folder = broken(folders, tmp_path)
    (folder / "vae" / "config.json").write_text(json.dumps(dict(block_out_channels=3)))
    with pytest.raises(UserError, match="not loaded: TypeError"):
        load_pipeline(
            str(folder), prompts=PROMPTS, cache=tmp_path / "cache", size=16, say=lambda *a: None
        )


@pytest.mark.parametrize(
    "text, size",
    [
        ("512", [512, 512]),
        ("480x832", [480, 832]),
        ("x", None),
        ("12x", None),
        ("-4", None),
        ("1x2x3", None),
        ("", None),
        ("9" * 5000, None),
        ("512X512", None),
    ],
)
def test_pixels(text, size, capsys):
    if size:
        assert dmd2.parse_args(["--size", text]).size == size
        return
    with pytest.raises(SystemExit) as e:
        dmd2.parse_args(["--size", text])
    assert (
        e.value.code == 2
        and "--size: expected " in (err := capsys.readouterr().err)
        and err.count("\n") == 1
    )


def test_flags_of_pipelines_with_other_teachers():
    for flag, value in dict(prompts="p.txt", size=[32, 32], frames=5, guidance=3.5).items():
        with pytest.raises(
            UserError,
            match=f"--{flag.replace('guidance', 'embedded-guidance')}: expected a teacher that is a pipeline of diffusers, found mnist",
        ):
            load_teacher("mnist", text={flag: value})


def test_changed_or_damaged_embeddings_are_not_used(folders, tmp_path):
    """Another text encoder in the same folder is encoded anew; a damaged cache is named."""
    folder, said = broken(folders, tmp_path), []
    again = lambda: load_pipeline(
        str(folder), prompts=PROMPTS, cache=tmp_path / "cache", say=said.append
    )
    again()
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    save_file({k: v + 0.1 for k, v in weights.items()}, path, metadata={"format": "pt"})
    again()
    assert ["encoding" in s for s in said] == [True, True] and len(
        list((tmp_path / "cache").iterdir())
    ) == 2
    for shard in (tmp_path / "cache").glob("*/00000.safetensors"):
        shard.write_bytes(b"half a file")
    with pytest.raises(UserError, match="--cache-prompts"):
        again()


def test_prompts_are_encoded_once(folders, monkeypatch):
    said = []
    args = dict(prompts=["a b", "c"], cache=folders.cache, say=said.append)
    load_pipeline(str(folders("sd15")), **args)
    monkeypatch.setattr(SD15, "text_pipeline", None)  # would fail if it were asked
    model = load_pipeline(str(folders("sd15")), **args)
    assert "encoding 2" in said[0] and "read from" in said[-1]
    assert model.classes == 2 and model.encode([1])["text"].shape[0] == 1


def test_text_encoders_are_gone(folders):
    import gc

    from transformers import CLIPTextModel

    model = load_pipeline(
        str(folders("sd15")), prompts=["once more"], cache=folders.cache, say=lambda *a: None
    )
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, CLIPTextModel)] and model.table.parts


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "empty file"),
        (b"\n \n", "empty file"),
        (b"ok\n\xff\xfe\n", "line 2.*UTF-8"),
        (b"ok\n" + b"a" * 10_000_000, "line 2.*at most"),
    ],
)
def test_bad_prompts(content, says, tmp_path):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"--prompts .*{says}"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(UserError, match="--prompts"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    "change, says",
    [
        (
            dict(_class_name="KandinskyPipeline"),
            "expected one of the pipelines .*KandinskyPipeline",
        ),
        (dict(_class_name=None), "expected one of the pipelines"),
        (dict(unet=["my_code", "Net"]), "unet: expected a component of diffusers or transformers"),
        (dict(vae=["diffusers", "AutoencoderKL", "x"]), "vae: expected a component"),
    ],
)
def test_foreign_index(change, says, folders, tmp_path):
    index = json.loads((folders("sd15") / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(UserError, match=says):
        load_pipeline(str(tmp_path), prompts=["x"])

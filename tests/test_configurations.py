"""common/teachers/configuration.py: every value in the list of helpers/configurations.py is
honoured, refused by name, or without effect, as the list says, against pipe(...) on tiny random
weights. The table in docs/teachers.md is that list."""

import functools
import inspect
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from helpers import configurations
from helpers.configurations import FLOW, ROWS, VP
from helpers.files import edit
from helpers.pipelines import wake_zero_layers
from helpers.teachers import (
    PROMPTS,
    SIZE,
    as_tensor,
    copy_of,
    load,
    noise,
    plain_pipeline,
    quiet,
    relative,
    run_pipeline,
    sample_as_pipeline,
    write_captioned,
)
from safetensors.torch import load_file
from test_teachers_class import run_dit_pipeline

from common.errors import UserError
from common.files import ROOT, WEIGHTS
from common.teachers import load as loader
from common.teachers.load import load_teacher

STEPS = 3
FILES = dict(index="model_index.json", scheduler="scheduler/scheduler_config.json")


def cases():
    """(row, pipeline, verdict). What only the pipeline's solver reads is compared with -m slow."""
    for row in ROWS:
        for name, verdict in row.cases():
            slow = row.why == configurations.SOLVER
            yield pytest.param(row, name, verdict, marks=[pytest.mark.slow] if slow else [])


def case_id(value):
    if isinstance(value, configurations.Row):
        kind = f"{value.kind}-" if value.kind else ""
        return f"{value.part}-{kind}{value.key}={str(value.value).replace(' ', '')}"
    return str(value)


# ---- folders with one value changed --------------------------------------------------------------


def change(folder, row):
    """Writes the row's value into a folder."""
    values = {row.key: row.value} | row.also
    if row.part == "index":
        edit(folder / FILES["index"], **values)
    elif row.part == "scheduler":
        if kind := values.get("_class_name", row.kind):
            index = json.loads((folder / FILES["index"]).read_text())
            edit(folder / FILES["index"], scheduler=["diffusers", kind])
            values["_class_name"] = kind
            assert index["scheduler"][1] != kind or row.kind
        edit(folder / FILES["scheduler"], **values)
    else:
        part = row.part
        if part == "network":
            part = "unet" if (folder / "unet").is_dir() else "transformer"
        rebuild(folder / part, values)


def rebuild(folder, values):
    """A network with these values in the place of the one in the folder.

    It keeps the weights that fit it, and gets random ones for the others. Where diffusers cannot
    build one with these values, only the file is changed.
    """
    config = json.loads((folder / "config.json").read_text()) | values
    kind = getattr(diffusers, config["_class_name"])
    (folder / "config.json").write_text(json.dumps(config))
    known = inspect.signature(kind.__init__).parameters
    try:
        torch.manual_seed(0)
        net = kind.from_config({k: v for k, v in config.items() if k in known})
    except Exception:  # the folder is refused before its weights are read
        return
    wake_zero_layers(net)
    own = net.state_dict()
    old = load_file(folder / WEIGHTS)
    fitting = {k: v for k, v in old.items() if k in own and own[k].shape == v.shape}
    net.load_state_dict(fitting, strict=False)
    net.save_pretrained(folder)
    edit(folder / "config.json", **values)  # also those that the class does not know


class Bench:
    """The models of unchanged folders, and their embeddings for folders with other values."""

    def __init__(self, folders):
        self.folders = folders
        self.models = {}

    def folder_name(self, row, name):
        return "wan22" if row.key == "boundary_ratio" else name

    def base(self, name):
        if name not in self.models:
            if name == "dit":
                model = load_teacher(str(self.folders("dit")), text=dict(say=quiet))
            else:
                model = load(self.folders, name)
            self.models[name] = model
        return self.models[name]

    def load(self, folder, row, name, monkeypatch):
        """The model of a folder. Its prompts are encoded anew only if the row may change them."""
        if name == "dit":
            return load_teacher(str(folder), text=dict(say=quiet))
        size = {} if row.key == "sample_size" else SIZE.get(name, {})
        options = dict(prompts=PROMPTS, cache=folder / "cache", say=quiet, **size)
        if row.part != "index":
            table = self.base(name).table
            monkeypatch.setattr(loader, "embed_prompts", lambda *args: table)
        return loader.load_pipeline(str(folder), **options)


@pytest.fixture(scope="module")
def bench(folders):
    return Bench(folders)


# ---- pipe(...) and our model ---------------------------------------------------------------------


@torch.no_grad()
def sample_with_scheduler(model, scheduler, z, cond, steps, w, scale_noise=True):
    """The sampling loop of a pipeline with DDPM's noise levels, with `model.guided` as its network.

    alpha and sigma are the scheduler's, so that a wrong table of ours gives a wrong time.
    """
    scheduler.set_timesteps(steps)
    x = z * scheduler.init_noise_sigma if scale_noise else z
    for i, t in enumerate(scheduler.timesteps):
        if t == t.round():
            alpha = scheduler.alphas_cumprod[int(t)].double().sqrt()
        else:
            alpha = (1 + scheduler.sigmas[i].double() ** 2).rsqrt()
        sigma = (1 - alpha**2).sqrt()
        y = scheduler.scale_model_input(x, t)
        x0 = model.guided(y, alpha, sigma, cond, w).double()
        out = dict(
            epsilon=lambda: (y.double() - alpha * x0) / sigma,
            v_prediction=lambda: (alpha * y.double() - x0) / sigma,
            sample=lambda: x0,
        )[scheduler.config.prediction_type]()
        x = scheduler.step(out.float(), t, x, return_dict=False)[0]
    return x


def sample(model, name, scheduler, z, cond, w):
    torch.manual_seed(7)  # of solvers that add noise
    if name in VP:
        return sample_with_scheduler(model, scheduler, z, cond, STEPS, w, name != "dit")
    return sample_as_pipeline(model, scheduler, z, cond, STEPS, w)[0]


def their_samples(model, name, folder, z, w):
    """-> scheduler, latents of pipe(...), its pictures uint8."""
    if name == "dit":
        scheduler, latents, images = run_dit_pipeline(folder, [1, 2], STEPS, w)
        return scheduler, latents, (images * 255).round()
    pipe = plain_pipeline(model, folder)
    torch.manual_seed(7)
    latents = run_pipeline(model, pipe, [PROMPTS[2]], z, STEPS, w)
    check_time_shift(model, name, pipe, w)
    torch.manual_seed(7)
    images = run_pipeline(model, pipe, [PROMPTS[2]], z, STEPS, w, "pil")
    return pipe.scheduler, latents, as_tensor(images[0])[None]


def check_time_shift(model, name, pipe, w):
    """The times of evenly spaced steps of our schedule are the scheduler's, without its solver."""
    config = pipe.scheduler.config
    if name not in FLOW:
        return
    if type(pipe.scheduler).__name__.startswith("FlowMatch"):
        mu = None
        if config.use_dynamic_shifting:
            calls = record_calls(pipe.scheduler, "set_timesteps")
            run_pipeline(model, pipe, [PROMPTS[2]], noise(0, 1, *model.shape), STEPS, w)
            mu = calls[0]["mu"]
        keys = ("shift", "use_dynamic_shifting", "time_shift_type")
        plain = diffusers.FlowMatchEulerDiscreteScheduler(
            **{key: config[key] for key in keys if key in config}
        )
        u = np.linspace(1, 1 / STEPS, STEPS)
        plain.set_timesteps(sigmas=u, mu=mu)
    else:
        plain = diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=config.flow_shift
        )
        u = np.linspace(1, 1 / 1000, STEPS + 1)[:-1]
        plain.set_timesteps(STEPS)
    ours = model.schedule.shifted(torch.from_numpy(u.copy()))
    assert torch.allclose(ours, plain.sigmas[:-1].double(), atol=1e-5)


def record_calls(thing, method):
    """Arguments by name of the calls of a method from now on."""
    original, calls = getattr(thing, method), []

    @functools.wraps(original)  # pipelines look at its arguments
    def record(*args, **kw):
        calls.append(kw)
        return original(*args, **kw)

    setattr(thing, method, record)
    return calls


@torch.no_grad()
def effect(model):
    """What a value can change: schedule, estimates at two levels, pixels, the null prompt."""
    z = noise(1, 1, *model.shape)
    cond = model.encode([0])
    estimates = [model(z, a, s, cond) for a, s in ((0.6, 0.8), (0.05, 0.95))]
    config = getattr(model, "experts", [model])[0].config()
    null = {k: v for k, v in model.null(1).items() if k != "labels"}
    return config, [*estimates, model.decode(z), *null.values()]


def same_effect(a, b):
    (config_a, tensors_a), (config_b, tensors_b) = effect(a), effect(b)
    pairs = list(zip(tensors_a, tensors_b, strict=True))
    same = all(x.shape == y.shape and torch.allclose(x.float(), y.float()) for x, y in pairs)
    return config_a == config_b and same


# ---- the list ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row, name, verdict", cases(), ids=case_id)
def test_a_value(row, name, verdict, bench, folders, tmp_path, monkeypatch):
    base = bench.folder_name(row, name)
    folder = copy_of(folders, base, tmp_path)
    change(folder, row)
    if verdict == "refused":
        with pytest.raises(UserError) as e:
            bench.load(folder, row, base, monkeypatch)
        said = str(e.value)
        assert "\n" not in said
        key = row.named or ("scheduler" if row.key == "_class_name" else row.key)
        assert f"{key}: expected" in said
        return

    model = bench.load(folder, row, base, monkeypatch)
    assert same_effect(model, bench.base(base)) == (verdict == "no effect")
    labels = [1, 2] if name == "dit" else [2]
    z = noise(STEPS, len(labels), *model.shape)
    scheduler, latents, images = their_samples(model, name, folder, z, row.w)
    assert latents.isfinite().all()
    ours = sample(model, name, scheduler, z, model.encode(labels), row.w)
    assert relative(ours, latents) < 1e-4
    decoded = model.decode(latents)
    assert decoded.shape == images.shape
    assert (decoded.float() - images.float()).abs().max() <= 1


# ---- zero terminal SNR ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize(
    "name, kind",
    [
        ("sd15", None),
        ("sd15", "EulerDiscreteScheduler"),
        ("sdxl", None),
        ("sdxl", "DDIMScheduler"),
        ("sdxl", "DPMSolverMultistepScheduler"),
    ],
)
def test_from_pure_noise(name, kind, steps, bench, folders, tmp_path, monkeypatch):
    folder, row = copy_of(folders, name, tmp_path), configurations.zero_snr(kind)
    change(folder, row)
    model = bench.load(folder, row, name, monkeypatch)
    pipe = plain_pipeline(model, folder)
    levels = pipe.scheduler.alphas_cumprod.double().sqrt()
    ours = model.schedule.alpha(torch.arange(1000))
    assert (ours - levels).abs().max() < 1e-6
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    z = noise(steps, 1, *model.shape)
    theirs = run_pipeline(model, pipe, [PROMPTS[2]], z, steps, 5.0)
    assert int(pipe.scheduler.timesteps[0]) == 999
    samples = sample_with_scheduler(model, pipe.scheduler, z, model.encode([2]), steps, 5.0)
    assert relative(samples, theirs) < 1e-4


SCRIPTS = dict(
    dmd2=["--nfe", 1, "--cfg", 3],
    sid=[],
    twinflow=["--image-free", "--guide", "frozen", "--cfg", 3],
    boot=["--cfg", 2],
    flowmap=[],
    sana_sprint=["--data"],
    decoupled_dmd=["--nfe", 1, "--cfg", 3],
    phased_dmd=[],
    msd=["--students", 2, "--adm", 0],
    anyflow=["--image-free", "--velocity", "teacher"],
    swiftbrush=["--lora-fake", 4],  # the preset's 64 is above the width of the tiny networks
)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_scripts_from_pure_noise(name, script, folders, scripts, tmp_path):
    """The one-step start is the last level, where alpha is 0: all numbers are finite."""
    folder, out = copy_of(folders, name, tmp_path), tmp_path / "run"
    change(folder, configurations.zero_snr())
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = SCRIPTS[script]
    if flags == ["--data"]:
        flags = ["--data", write_captioned(tmp_path / "images")]
    flags = ["--teacher", folder, "--prompts", tmp_path / "prompts.txt", *flags]
    flags += ["--cache-prompts", tmp_path / "cache", "--batch", 4, "--lr", 1e-3, "--warmup", 0]
    scripts.run(f"{script}.py", *flags, "--smoke", "--log-every", 1, "--out", out)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        numbers = [v for v in row.values() if isinstance(v, float)]
        assert len(numbers) > 2
        assert np.isfinite(numbers).all(), row
        assert row["skipped"] == 0


# ---- files as other versions write them ----------------------------------------------------------


def scheduler_file(folder):
    return folder / FILES["scheduler"]


def only_the_class(folder):
    config = json.loads(scheduler_file(folder).read_text())
    scheduler_file(folder).write_text(json.dumps({"_class_name": config["_class_name"]}))


def class_of_the_index(folder):
    """The index names the class that counts; the file was written by another."""
    edit(scheduler_file(folder), _class_name="PNDMScheduler", skip_prk_steps=True)


def unknown_keys(folder):
    files = [scheduler_file(folder), *folder.glob("*/config.json"), folder / FILES["index"]]
    for path in files:
        edit(path, a_key_of_the_future=7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [only_the_class, class_of_the_index, unknown_keys])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_other_versions(name, write, bench, folders, tmp_path, monkeypatch):
    folder = copy_of(folders, name, tmp_path)
    write(folder)
    row = configurations.scheduler("beta_end", None)
    model = bench.load(folder, row, name, monkeypatch)
    assert same_effect(model, bench.base(name)) == (write != only_the_class)
    z = noise(STEPS, 1, *model.shape)
    scheduler, latents, _ = their_samples(model, name, folder, z, 3.0)
    assert relative(sample(model, name, scheduler, z, model.encode([2]), 3.0), latents) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version, side", [("0.8.1.dev0", 64), ("0.9.0", 8), (None, 8)])
def test_sizes_of_old_unets(version, side, bench, folders, tmp_path, monkeypatch):
    """Before 0.9, files of Stable Diffusion 1 had a smaller size than the network was made for."""
    folder = copy_of(folders, "sd15", tmp_path)
    path = folder / "unet" / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "_diffusers_version"}
    path.write_text(json.dumps(config | (dict(_diffusers_version=version) if version else {})))
    model = bench.load(folder, network_size(), "sd15", monkeypatch)
    assert model.shape == (4, side, side)
    assert plain_pipeline(model, folder).unet.config.sample_size == side


def network_size():
    return configurations.network("sample_size", None)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_features_of_a_unet_without_middle(name, bench, folders, tmp_path, monkeypatch):
    """Small distilled UNets have none: the lowest block on the way down takes its place."""
    folder = copy_of(folders, name, tmp_path)
    row = configurations.network("mid_block_type", None)
    change(folder, row)
    model = bench.load(folder, row, name, monkeypatch)
    (features,) = model(noise(0, 1, *model.shape), 0.6, 0.8, model.encode([0]), features=True)
    assert features.shape == (1, 32, 4, 4)
    assert features.std() > 0


@torch.no_grad()
def test_a_tiny_autoencoder(bench, folders, tmp_path, monkeypatch):
    from diffusers import AutoencoderTiny

    folder = copy_of(folders, "sd15", tmp_path)
    torch.manual_seed(0)
    shutil.rmtree(folder / "vae")
    sizes = dict(encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8])
    sizes |= dict(num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1], scaling_factor=0.7)
    AutoencoderTiny(**sizes).save_pretrained(folder / "vae")
    edit(folder / FILES["index"], vae=["diffusers", "AutoencoderTiny"])
    model = bench.load(folder, configurations.vae("scaling_factor", 0.7), "sd15", monkeypatch)
    z = noise(0, 1, *model.shape)
    _, latents, images = their_samples(model, "sd15", folder, z, 3.0)
    assert (model.decode(latents).float() - images.float()).abs().max() <= 1
    pixels = torch.randint(0, 256, (1, *model.image_shape), dtype=torch.uint8)
    encoded = model.vae.encode(pixels.float() / 127.5 - 1).latents
    assert torch.allclose(model.encode_images(pixels), encoded * 0.7, atol=1e-5)


# ---- is the list complete? -----------------------------------------------------------------------

CLASSES = dict(
    network="""
        UNet2DConditionModel SD3Transformer2DModel SanaTransformer2DModel FluxTransformer2DModel
        QwenImageTransformer2DModel ZImageTransformer2DModel WanTransformer3DModel
        DiTTransformer2DModel
    """,
    vae="AutoencoderKL AutoencoderDC AutoencoderKLQwenImage AutoencoderKLWan",
    scheduler="""
        DDIMScheduler DDPMScheduler PNDMScheduler EulerDiscreteScheduler
        EulerAncestralDiscreteScheduler LMSDiscreteScheduler LCMScheduler
        DPMSolverMultistepScheduler UniPCMultistepScheduler FlowMatchEulerDiscreteScheduler
        FlowMatchHeunDiscreteScheduler
    """,
    index="""
        StableDiffusionPipeline StableDiffusionXLPipeline StableDiffusion3Pipeline SanaPipeline
        FluxPipeline QwenImagePipeline ZImagePipeline WanPipeline DiTPipeline
    """,
)


@pytest.mark.parametrize("part", CLASSES)
def test_every_key_of_diffusers_is_in_the_list(part):
    if not diffusers.__version__.startswith("0.42."):
        pytest.skip(f"the list was made for diffusers 0.42, this is {diffusers.__version__}")
    known = {*configurations.BUILT[part]}
    for row in ROWS:
        if row.part == part:
            known |= {row.key, *row.also}
    for name in CLASSES[part].split():
        kind = getattr(diffusers, name)
        keys = set(inspect.signature(kind.__init__).parameters) - {"self"}
        if part == "index":
            keys -= components(kind)
        assert keys <= known, name


def components(pipeline):
    return set(pipeline._get_signature_keys(pipeline)[0])


def test_the_table_in_the_docs():
    """`python tests/helpers/configurations.py` prints it."""
    text = (ROOT / "docs" / "teachers.md").read_text()
    lines = text.split("<!-- configurations -->")[1].strip().splitlines()
    assert lines == configurations.table()

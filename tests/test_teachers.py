"""common/teachers/{load,pipeline,prompts}.py: text-to-image teachers against their own pipelines of
diffusers, on tiny random weights saved in the real format. Class-conditional teachers are in
test_teachers_class.py, what only flow transformers and videos have in test_teachers_flow.py."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import pipelines
from helpers.files import edit
from helpers.teachers import (
    NEGATIVE,
    NEWER,
    OLDER,
    PROMPTS,
    as_tensor,
    check_other_views,
    copy_of,
    load,
    noise,
    plain_pipeline,
    quiet,
    relative,
    run_pipeline,
    sample_as_pipeline,
)
from safetensors.torch import load_file, save_file

import dmd2
from common.errors import UserError
from common.files import ROOT
from common.schedules import EDM, VP, Flow, TrigFlow, equal_snr
from common.teachers import load as loader
from common.teachers.kind import teacher_kind
from common.teachers.load import full_config, load_model, load_pipeline, load_teacher
from common.teachers.pipeline import Pipeline
from common.teachers.unet import SD15, SDXL

NAMES = OLDER + NEWER
NOT_GUIDED = ["flux2"]  # by their pipelines
# one of the two experts of Wan 2.2 is like Wan 2.1
ONE_NETWORK = [name for name in NAMES if name != "wan22"]


def wide(model):
    """The same number of tokens in another format, so that height and width cannot be confused."""
    for m in getattr(model, "experts", [model]):
        m.shape = (*m.shape[:-2], m.shape[-2] // 2, m.shape[-1] * 2)
    return model


def load_wide(folders, name, **options):
    model = load(folders, name, **options)
    return wide(model) if name in NEWER else model


@pytest.mark.parametrize("name", NAMES)
def test_students_of_a_bf16_teacher_start_in_fp32(name, folders):
    """The teacher alone is rounded. A copy of a student that has moved is a copy of the student."""
    full = load(folders, name)
    half = load(folders, name, dtype=torch.bfloat16)
    assert torch.bfloat16 in {p.dtype for p in half.parameters()}
    student = half.copy()
    pairs = list(zip(student.parameters(), full.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any((a != b.bfloat16()).any() for a, b in pairs)  # the file has more digits

    for p in student.parameters():
        p.data.add_(1.0)
    again = student.copy()
    assert all(map(torch.equal, again.parameters(), student.parameters()))


# ---- against the pipeline ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, negative", [(2, None), (5, None), (2, NEGATIVE)], ids=["2", "5", "negative"]
)
@pytest.mark.parametrize("name", NAMES)
def test_our_sampler_is_the_pipeline(name, steps, negative, folders):
    """Also with a negative prompt (FLUX.2-dev's pipeline has none)."""
    if negative and name == "hunyuan":  # whose tiny network hardly tells longer texts apart
        negative = "0"
    model = load_wide(folders, name, negative=negative)
    pipe = plain_pipeline(model, folders(name))
    z = noise(steps, 2, *model.shape)
    prompts, cond = [PROMPTS[2], PROMPTS[0]], model.encode(torch.tensor([2, 0]))
    samples = {}
    guidance = 1.0 if name in NOT_GUIDED else 3.0
    for w in (3.0, 1.0):
        samples[w], _ = sample_as_pipeline(model, pipe.scheduler, z, cond, steps, w)
        if w > 1 and name in NOT_GUIDED:
            continue
        theirs = run_pipeline(model, pipe, prompts, z, steps, w)
        assert relative(samples[w], theirs) < 1e-5, w
        if w == guidance and negative is None and (name in OLDER or steps == 5):
            check_other_views(model, theirs, pipe.scheduler, z, cond, steps, w)
    assert relative(samples[3.0], samples[1.0]) > 0.01  # guidance does something
    if negative is not None:
        null = load_wide(folders, name)
        without, _ = sample_as_pipeline(null, pipe.scheduler, z, cond, steps, 3.0)
        assert relative(samples[3.0], without) > 1e-3


def null_of(folders, name, **options):
    null = load(folders, name, **options).null(1)
    return {key: value for key, value in null.items() if key != "labels"}


@pytest.mark.parametrize("name", NAMES)
def test_the_null_condition_is_that_of_the_docs(name, folders):
    """The table in docs/teachers.md says with which text --negative-prompt changes nothing."""
    kind = teacher_kind(str(folders(name)))[0]
    page = (ROOT / "docs" / "teachers.md").read_text()
    section = page.split("\n## Guidance\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines()]
    (stated,) = [row[1] for row in rows if f"`{kind}`" in row[0]]
    null = null_of(folders, name)
    if stated == "zeros":
        assert all(value.norm() == 0 for value in null.values())
        return
    text = " " if stated == "a blank" else ""
    assert stated == "a blank" or stated.startswith("empty prompt")
    same = null_of(folders, name, negative=text)
    assert all(torch.equal(null[key], same[key]) for key in null)


@pytest.mark.parametrize("name", NAMES)
def test_one_sample_without_guidance_is_the_pipelines(name, folders):
    model = load(folders, name)
    pipe = plain_pipeline(model, folders(name))
    z = noise(0, 1, *model.shape)
    theirs = run_pipeline(model, pipe, [PROMPTS[1]], z, 2, 1.0)
    ours, _ = sample_as_pipeline(model, pipe.scheduler, z, model.encode([1]), 2, 1.0)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_other_sizes_are_the_pipelines(name, folders):
    """--size 24x16,16x32: height, then width. The student shares the size that is in use."""
    sizes = [[24, 16], [16, 32]]
    coarse = ("sana", "sprint", "lumina", "sanavideo", "ltx")
    if name in coarse or name.startswith("wan"):  # multiples of 16 or 32 only
        sizes = [[64, 32], [32, 64]]
    model = load(folders, name, size=sizes)
    student = model.copy()
    w = 1.0 if name in NOT_GUIDED else 3.0
    for i in model.sizes.each():
        assert list(student.image_shape[-2:]) == sizes[i]
        pixels = student.decode(torch.zeros(1, *student.shape))
        assert pixels.shape == (1, *model.image_shape)
        pipe = plain_pipeline(model, folders(name))
        z = noise(0, 1, *model.shape)
        theirs = run_pipeline(model, pipe, PROMPTS[:1], z, 2, w)
        ours, _ = sample_as_pipeline(student, pipe.scheduler, z, model.encode([0]), 2, w)
        assert relative(ours, theirs) < 1e-5


def test_sdxl_sees_height_before_width(folders):
    model = load(folders, "sdxl", size=[24, 16])
    x, cond = noise(0, 1, *model.shape), model.encode([0])
    with torch.no_grad():
        right = model(x, 0.6, 0.8, cond)
        model.__class__ = type("Turned", (SDXL,), dict(image_shape=(3, 16, 24)))
        turned = model(x, 0.6, 0.8, cond)
    assert relative(turned, right) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_the_pipelines(name, folders):
    model = load_wide(folders, name)
    pipe = plain_pipeline(model, folders(name))
    z = noise(0, 1, *model.shape)
    steps = 2  # the table of Qwen-Image's scheduler has 0 / 0 for one step
    latents = run_pipeline(model, pipe, PROMPTS[:1], z, steps, 1.0)
    assert latents.isfinite().all()
    theirs = as_tensor(run_pipeline(model, pipe, PROMPTS[:1], z, steps, 1.0, "pil")[0])
    ours = model.decode(latents)[0]
    assert ours.shape == theirs.shape == model.image_shape
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert model.encode_images(ours[None]).shape == latents.shape
    picture = model.to_pictures(latents)[0]
    if model.video:  # first, middle and last frame
        ours = torch.cat([ours[:, i] for i in (0, 2, 4)], 1)
    assert torch.equal(picture, ours)


@pytest.mark.parametrize("name", NEWER)
def test_encoding_is_the_inverse_of_what_the_decoder_reads(name, folders):
    """Shift and scale of the encoder's latents are those that the pipeline's decoder undoes."""
    model = load(folders, name)
    images = torch.randint(0, 256, (1, *model.image_shape), dtype=torch.uint8)
    with torch.no_grad():
        y = images.float() / 127.5 - 1
        if name == "qwen":  # its VAE takes videos
            y = model.vae.encode(y[:, :, None]).latent_dist.mode()[:, :, 0]
        else:
            y = model.vae.encode(y).latent_dist.mode()
        if name in ("flux2", "klein"):  # its statistics are of 2 x 2 latents
            y = torch.nn.functional.pixel_unshuffle(y, 2)
    latents = model.encode_images(images)
    shift, scale = model.latent_stats()
    assert torch.allclose(latents / scale + shift, y, atol=1e-5)
    assert not torch.allclose(latents, y, atol=1e-2)


@pytest.mark.parametrize("name", NEWER)
def test_the_same_estimate_in_another_schedule(name, folders):
    model = load(folders, name)
    x0, eps = noise(0, 2, 2, *model.shape)
    cond = model.encode([0, 1])
    for s in (0.9, 0.3):
        a = 1 - s
        x = a * x0 + s * eps
        for w in (1.0, 3.0):
            with torch.no_grad():
                here = model.guided(x, a, s, cond, w)
            for view in (EDM(), VP(), TrigFlow(), Flow()):
                _, a2, s2, scale = equal_snr(view, a, s)
                with torch.no_grad():
                    there = model.guided((scale * x).float(), a2, s2, cond, w)
                assert relative(there, here) < 1e-5, (s, w, view.config)


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_NETWORK)
def test_a_copy_starts_as_the_teacher(name, folders):
    model = load(folders, name)
    cond, x = model.encode([0, 1]), noise(0, 2, *model.shape)
    student = model.copy()
    assert torch.equal(student(x, 0.6, 0.8, cond), model(x, 0.6, 0.8, cond))
    own = {id(p) for p in student.parameters()}
    assert own == {id(p) for p in student.net.parameters()}  # no VAE, no text encoder


@pytest.mark.parametrize("name", ONE_NETWORK)
def test_features_carry_gradient_to_the_copy_alone(name, folders):
    model = load(folders, name)
    student = model.copy()
    x = noise(0, 2, *model.shape)
    (h,) = student(x, 0.6, 0.8, model.encode([0, 1]), features=True)
    assert h.ndim == 4
    assert len(h) == 2
    assert h.dtype == torch.float32
    h.sum().backward()
    assert any(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ONE_NETWORK)
def test_a_new_condition_starts_without_effect(name, folders):
    model = load(folders, name)
    cond, x = model.encode([0, 1]), noise(0, 2, *model.shape)
    student = model.copy()
    before = student(x, 0.6, 0.8, cond)
    student.extend("r")
    cond["r"] = torch.rand(2)
    assert torch.equal(student(x, 0.6, 0.8, cond), before)
    student.extras["r"].layers[2].weight.data.normal_()
    assert not torch.allclose(student(x, 0.6, 0.8, cond), before)


# ---- a script on it ------------------------------------------------------------------------------


@pytest.mark.parametrize("name, nfe", [("sd15", 1), ("sdxl", 4), ("sd3", 4), ("sana", 1)])
def test_dmd2_on_it(name, nfe, folders, scripts, tmp_path):
    """Three iterations, pictures, export, resume; diffusers loads the student's network."""
    import diffusers

    scripts.load(*pipelines.MODULES)
    prompts, cache, out = tmp_path / "prompts.txt", tmp_path / "cache", tmp_path / "run"
    prompts.write_text("\n".join(PROMPTS * 3))
    flags = ["--teacher", folders(name), "--prompts", prompts, "--cache-prompts", cache]
    flags += ["--nfe", nfe, "--cfg", 3, "--batch", 4, "--out", out]
    p = scripts.run("dmd2.py", *flags, "--smoke")
    assert "brings no metric" in p.out
    assert "Traceback" not in p.err
    assert (out / "samples" / "00000003.png").exists()

    info = json.loads((out / "student" / "distill.json").read_text())
    teacher = load_pipeline(str(folders(name)), prompts=str(prompts), cache=cache, say=quiet)
    student = load_model(out / "student", info["model"], teacher)
    net = getattr(diffusers, teacher.network_class).from_pretrained(out / "student" / teacher.part)
    z, cond = noise(0, 2, *teacher.shape), teacher.encode([0, 1])

    def sample(model):
        with torch.no_grad():
            return dmd2.sample(model, z, cond, nfe, lambda: torch.zeros_like(z), **info["sampler"])

    assert torch.equal(sample(student), sample(teacher.with_network(net)))
    assert not torch.equal(sample(student), sample(teacher))
    scripts.run("dmd2.py", *flags, "--iters", 4, "--resume", "--eval-n", 0, "--sample-every", 0)


# ---- broken folders ------------------------------------------------------------------------------


def refused(says, folder, **options):
    """load_pipeline raises a UserError of one line that matches `says`."""
    with pytest.raises(UserError, match=says) as e:
        load_pipeline(str(folder), prompts=PROMPTS, say=quiet, **options)
    assert "\n" not in str(e.value)


def write(part, content):
    """A function of a folder: replaces the file `part` of it."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / part).write_bytes(data)


SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BROKEN = {  # name: (what is done to a good folder, what the message must say)
    "network": (write(f"unet/{WEIGHTS}", b"x" * 100), "not loaded"),
    "text encoder": (write("text_encoder/model.safetensors", b"x"), "not loaded"),
    "no VAE": (
        lambda folder: (folder / "vae" / "config.json").unlink(),
        "vae/config.json: No such file",
    ),
    "VAE of wrong values": (
        write("vae/config.json", dict(block_out_channels=3)),
        "not loaded: TypeError",
    ),
    "scheduler of wrong values": (
        write(SCHEDULER, dict(beta_start="low")),
        "not loaded: TypeError",
    ),
    "scheduler of another kind": (
        write(SCHEDULER, dict(beta_schedule="squaredcos_cap_v2")),
        "beta_schedule: expected linear or scaled_linear, found 'squaredcos_cap_v2'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder(name, folders, tmp_path):
    spoil, says = BROKEN[name]
    folder = copy_of(folders, "sd15", tmp_path)
    spoil(folder)
    refused(says, folder, cache=tmp_path / "cache", size=16)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(_class_name="KandinskyPipeline"), "one of the pipelines .*KandinskyPipeline"),
        (dict(_class_name=None), "expected one of the pipelines"),
        (dict(unet=["my_code", "Net"]), "unet: expected a component of diffusers or transformers"),
        (dict(vae=["diffusers", "AutoencoderKL", "x"]), "vae: expected a component"),
    ],
)
def test_foreign_index(change, says, folders, tmp_path):
    index = json.loads((folders("sd15") / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    refused(says, tmp_path)


def test_a_class_that_diffusers_does_not_have(folders, tmp_path):
    folder = copy_of(folders, "flux", tmp_path)
    edit(folder / "model_index.json", vae=["diffusers", "NoSuchVAE"])
    refused("not loaded: AttributeError.*NoSuchVAE", folder, cache=tmp_path / "cache", size=16)


def test_older_diffusers(folders, monkeypatch):
    import diffusers

    for name in ("zimage", "qwen"):
        folders(name)  # skips the test if the real version cannot make it
    monkeypatch.setattr(diffusers, "__version__", "0.36.1")
    load(folders, "zimage")
    says = "QwenImagePipeline: expected diffusers 0.37 or newer, found 0.36.1"
    with pytest.raises(UserError, match=says):
        load(folders, "qwen")


def test_configurations_of_older_versions(tmp_path):
    """A file that does not have a field means the default of its class."""
    from diffusers import AutoencoderKL

    (tmp_path / "config.json").write_text(json.dumps(dict(latent_channels=16)))
    c = full_config(AutoencoderKL, tmp_path)
    assert c.latent_channels == 16
    assert c.scaling_factor == 0.18215
    assert Pipeline.scale(c) == 1


# ---- flags ---------------------------------------------------------------------------------------


def test_size(folders):
    assert load(folders, "sd15", size=32).shape == (4, 16, 16)


@pytest.mark.parametrize(
    "name, size, says",
    [
        ("sd15", 30, "30: expected a multiple of 4 pixels"),
        ("sd15", 0, "0: expected a multiple of 4"),
        ("sd15", -4, "-4: expected a multiple of 4"),
        ("sd15", [32, 30], "32x30: expected a multiple of 4"),
        ("sdxl", [6, 32], "6x32: expected a multiple of 4"),
        ("sana", 3, "3: expected a multiple of 2"),
        ("sd3", [16, 68], "16x68: expected at most 64 pixels along a side"),
        ("sd3", 6, "6: expected a multiple of 4"),
        ("flux", 18, "18: expected a multiple of 4 pixels"),
        ("qwen", 6, "6: expected a multiple of 4 pixels"),
        ("zimage", [16, 2], "16x2: expected a multiple of 4 pixels"),
        ("wan", [16, 20], "16x20: expected a multiple of 8"),
        ("wan", [4, 16], "4x16: expected a multiple of 8"),
    ],
)
def test_wrong_sizes_are_found_before_anything_is_loaded(name, size, says, folders, monkeypatch):
    folders(name)
    monkeypatch.setattr(Pipeline, "load_net", None)
    monkeypatch.setattr(loader, "embed_prompts", None)
    with pytest.raises(UserError, match=f"--size {says}") as e:
        load(folders, name, size=size)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text, size", [("512", [512, 512]), ("480x832", [480, 832])])
def test_size_flag(text, size):
    assert dmd2.parse_args(["--size", text]).size == size


@pytest.mark.parametrize("text", ["x", "12x", "-4", "1x2x3", "", "9" * 5000, "512X512"])
def test_wrong_size_flag(text, capsys):
    with pytest.raises(SystemExit) as e:
        dmd2.parse_args(["--size", text])
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert "--size: expected " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "option, value, flag",
    [
        ("prompts", "p.txt", "--prompts"),
        ("negative", "", "--negative-prompt"),
        ("size", [32, 32], "--size"),
        ("frames", 5, "--frames"),
        ("guidance", 3.5, "--embedded-guidance"),
    ],
)
def test_flags_of_pipelines_with_other_teachers(option, value, flag):
    says = f"{flag}: expected a teacher that is a pipeline of diffusers, found mnist"
    with pytest.raises(UserError, match=says):
        load_teacher("mnist", text={option: value})


# ---- prompts -------------------------------------------------------------------------------------


def test_prompts_are_encoded_once(folders, monkeypatch):
    lines = []
    options = dict(prompts=["a b", "c"], cache=folders.cache, say=lines.append)
    load_pipeline(str(folders("sd15")), **options)
    assert lines[0].startswith("prompts: 2, 2 different, 1 to 3 characters")
    assert "encoding 2" in lines[1]
    monkeypatch.setattr(SD15, "text_pipeline", None)  # calling it would fail
    model = load_pipeline(str(folders("sd15")), **options)
    assert "read from" in lines[-1]
    assert model.classes == 2
    assert model.encode([1])["text"].shape[0] == 1


def test_changed_text_encoders_are_encoded_anew(folders, tmp_path):
    folder, lines = copy_of(folders, "sd15", tmp_path), []
    options = dict(prompts=PROMPTS, cache=tmp_path / "cache", say=lines.append)
    load_pipeline(str(folder), **options)
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    save_file({k: v + 0.1 for k, v in weights.items()}, path, metadata={"format": "pt"})
    load_pipeline(str(folder), **options)
    assert sum("encoding" in line for line in lines) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_damaged_embeddings_are_refused(folders, tmp_path):
    options = dict(prompts=PROMPTS, cache=tmp_path / "cache", say=quiet)
    load_pipeline(str(folders("sd15")), **options)
    (shard,) = (tmp_path / "cache").glob("*/00000.safetensors")
    shard.write_bytes(b"half a file")
    with pytest.raises(UserError, match="--cache-prompts"):
        load_pipeline(str(folders("sd15")), **options)


@pytest.mark.filterwarnings("ignore")  # get_objects touches deprecated ones
def test_text_encoders_are_freed(folders):
    from transformers import CLIPTextModel

    model = load(folders, "sd15", ["once more"])
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, CLIPTextModel)]
    assert model.table.parts


# ---- which of two teachers a name means ----------------------------------------------------------


def test_a_folder_with_the_name_of_a_teacher_of_the_hub(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders("sd15"), "sdxl")
    lines = []
    options = dict(prompts=["a"], cache=tmp_path / "cache", say=lines.append)
    assert isinstance(load_teacher("sdxl", text=options), SD15)
    assert lines[0] == (
        f"--teacher sdxl: the folder {tmp_path}/sdxl, "
        "not stabilityai/stable-diffusion-xl-base-1.0 of the hub"
    )
    Path("sd15").mkdir()
    with pytest.raises(UserError, match="no teacher.json in it; it hides the hub's: .* stable-"):
        load_teacher("sd15", text=options)


def test_a_folder_with_the_name_of_an_embedded_teacher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy").mkdir()
    lines = []
    assert load_teacher("toy", text=dict(say=lines.append)).adapter == "toy"
    expected = (
        f"--teacher toy: the one of this repository; ./toy would be the folder {tmp_path}/toy"
    )
    assert lines == [expected]
    with pytest.raises(UserError, match=r"--teacher \./toy: expected a teacher folder"):
        load_teacher("./toy")


def test_a_name_that_means_one_teacher_needs_no_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    load_teacher("toy", text=dict(say=lines.append))
    load_teacher(str(loader.ROOT / "assets" / "toy"), text=dict(say=lines.append))
    assert lines == []

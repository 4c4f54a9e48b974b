"""common/teachers/{from_image,qwen_edit}.py and FluxKontext: teachers that take an image, against
their own pipelines of diffusers, and scripts on a folder of edits."""

import json
import re
import shutil

import pytest
import torch
from helpers.cards import for_test, our_latents
from helpers.files import edit
from helpers.runs import close, one_line
from helpers.sources import MODULES, PREPARE, draw_source, prepare, write_triples
from helpers.teachers import (
    as_tensor,
    from_tokens,
    noise,
    plain_pipeline,
    quiet,
    relative,
    run_pipeline,
    sample_as_pipeline,
    to_argument,
)
from PIL import Image

import dmd2
import sana_sprint
from common.errors import UserError
from common.files import ROOT, read_json
from common.lora import FILE
from common.routed import Routed
from common.schedules import EDM, VP, TrigFlow, equal_snr
from common.teachers.load import load_model, load_pipeline
from common.teachers.qwen_edit import QwenImageEdit
from data.image_folder import SOURCES, TARGETS, TEXTS, read_edits
from dryrun.teachers import blank_embeddings
from sample import load as load_sampler

NAMES = ["kontext", "qwen_edit", "qwen_plus"]
# with the source at the time 0
PLUS_2511 = ("qwen_plus", dict(zero_cond_t=True))
ALL = [*((name, {}) for name in NAMES), PLUS_2511]
SIZE = [8, 32]  # in another format than a square, so that height and width cannot be confused
TEXT = ["dog", "a red heart on the left"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    prepare(monkeypatch.setattr)


@pytest.fixture(scope="module", autouse=True)
def imported(scripts):
    scripts.load(*MODULES)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two images in the format of SIZE."""
    home = tmp_path_factory.mktemp("sources")
    return [draw_source(home / f"{i}.png", i, (96, 40)) for i in range(2)]


@pytest.fixture(scope="module")
def triples(tmp_path_factory):
    return write_triples(tmp_path_factory.mktemp("triples"))


def load(folders, name, prompts=None, size=SIZE, **options):
    folder = folders(name, **options.pop("network", {}))
    options = dict(cache=folders.cache, say=quiet, size=size) | options
    return load_pipeline(str(folder), prompts=prompts, **options)


def fitted(model, path):
    """The source as our teacher reads it: the middle in its format, at its size."""
    with Image.open(path) as image:
        size = model.source_pixels[::-1]
        scale = min(image.width / size[0], image.height / size[1])
        w, h = round(scale * size[0]), round(scale * size[1])
        left, top = (image.width - w) // 2, (image.height - h) // 2
        return image.resize(size, Image.LANCZOS, box=(left, top, left + w, top + h))


def pipeline_samples(model, pipe, texts, images, z, steps, w, output_type="latent"):
    """pipe(...) for each sample alone: -Plus takes one at a time."""
    options = {}
    if model.adapter == "flux-kontext":
        options["max_area"] = model.image_shape[-2] * model.image_shape[-1]
    found = []
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        call = (model, pipe, [text], z[i : i + 1], steps, w, output_type)
        found += run_pipeline(*call, image=image, **options)
    return torch.stack(found) if output_type == "latent" else found


# ---- against the pipeline ------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("name, network", ALL)
def test_our_sampler_is_the_pipeline(name, network, steps, folders, sources):
    model = load(folders, name, list(zip(TEXT, sources)), network=network)
    pipe = plain_pipeline(model, folders(name, **network))
    images = [fitted(model, path) for path in sources]
    z, cond = noise(steps, 2, *model.shape), model.encode([0, 1])
    samples = {}
    for w in (3.0, 1.0):
        samples[w], _ = sample_as_pipeline(model, pipe.scheduler, z, cond, steps, w)
        theirs = pipeline_samples(model, pipe, TEXT, images, z, steps, w)
        assert relative(samples[w], theirs) < 1e-5, w
    assert relative(samples[3.0], samples[1.0]) > 0.01  # guidance does something
    other = cond | dict(source=cond["source"].flip(0))
    changed, _ = sample_as_pipeline(model, pipe.scheduler, z, other, steps, 1.0)
    assert relative(changed, samples[1.0]) > 1e-3  # and so does the source


@pytest.mark.parametrize("name", NAMES)
def test_negative_prompts(name, folders, sources):
    """The text of u, with the same source."""
    pairs = list(zip(TEXT, sources))
    model, plain = (load(folders, name, pairs, negative=text) for text in ("blurry, grey", None))
    images = [fitted(model, path) for path in sources]
    z, cond = noise(0, 2, *model.shape), model.encode([0, 1])
    pipe = plain_pipeline(model, folders(name))
    ours, _ = sample_as_pipeline(model, pipe.scheduler, z, cond, 2, 3.0)
    assert relative(ours, pipeline_samples(model, pipe, TEXT, images, z, 2, 3.0)) < 1e-5
    other, _ = sample_as_pipeline(plain, pipe.scheduler, z, plain.encode([0, 1]), 2, 3.0)
    assert relative(other, ours) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_same_estimate_in_another_schedule(name, folders, sources):
    model = load(folders, name, list(zip(TEXT, sources)))
    cond, x = model.encode([0, 1]), noise(0, 2, *model.shape)
    here = model.guided(x, 0.4, 0.6, cond, 3.0)
    for view in (EDM(), VP(), TrigFlow()):
        _, a, s, scale = equal_snr(view, 0.4, 0.6)
        assert relative(model.guided((scale * x).float(), a, s, cond, 3.0), here) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_null_condition_keeps_the_source(name, folders, sources):
    """In guidance, at w = 0 and where a training drops the condition: another text, the image."""
    model = load(folders, name, list(zip(TEXT, sources)))
    cond, x = model.encode([0, 1]), noise(0, 2, *model.shape)
    null = model.unconditional(cond, 2)
    assert null["source"] is cond["source"]
    assert not torch.equal(null["text"], cond["text"])
    u = model(x, 0.4, 0.6, null)
    assert torch.equal(model.guided(x, 0.4, 0.6, cond, 0), u)
    half = model.drop_condition(cond, torch.tensor([True, False]))
    mixed = model(x, 0.4, 0.6, half)
    assert relative(mixed[:1], u[:1]) < 1e-5
    assert relative(mixed[1:], model(x, 0.4, 0.6, cond)[1:]) < 1e-5
    # sana_sprint's derivative of the teacher, in which no cond of the whole batch is built
    t = torch.tensor([0.5, 0.9])
    guided = sana_sprint.teacher_derivative(model, x, t, cond, 1.0, torch.full((2,), 3.0))
    plain = sana_sprint.teacher_derivative(model, x, t, cond, 1.0, None)
    assert relative(guided, plain) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_sources_and_results_have_the_same_latents(name, folders, sources):
    """The pipeline encodes the one, the teacher the other: of one image they are equal."""
    model = load(folders, name, [("dog", sources[0])])
    pixels = as_tensor(fitted(model, sources[0]))[None]
    found = model.encode_images(pixels)
    assert torch.allclose(model.encode([0])["source"], found, atol=1e-5)
    assert model.image_shape == (3, *SIZE)
    assert model.decode(noise(0, 1, *model.shape)).shape == (1, 3, *SIZE)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_sample(name, folders, sources):
    """A map in the format of the sample, which changes most where the sample does."""
    model = load(folders, name, [("dog", sources[0])])
    cond, x = model.encode([0]), noise(0, 1, *model.shape)
    y = x.clone()
    y[..., -2:, 2:4] += 5  # last row of tokens, second column
    (before,) = model(x, 0.6, 0.8, cond, features=True)
    (after,) = model(y, 0.6, 0.8, cond, features=True)
    h, w = model.shape[-2] // 2, model.shape[-1] // 2
    assert before.shape[2:] == (h, w)
    change = (before - after).square().sum(1)[0]
    assert change.argmax() == (h - 1) * w + 1


def test_published_sizes_of_sources(monkeypatch):
    """About 1024 x 1024 pixels, and for a source of this size the same again."""
    monkeypatch.undo()
    vae = type("Config", (), dict(temperal_downsample=[False, True, True]))
    for size in ([1024, 1024], [768, 1024], [720, 1280], [1280, 720], [512, 768]):
        height, width = QwenImageEdit.source_size(size, vae)
        assert abs(height * width / 2**20 - 1) < 0.05
        assert abs(width / height / (size[1] / size[0]) - 1) < 0.04
        assert QwenImageEdit.source_size([height, width], vae) == (height, width)


# ---- image to video ------------------------------------------------------------------------------


WAN = {False: "wan_i2v", True: "wan_i2v22"}


def load_video(folders, experts, sources, **options):
    """Wan 2.2 with `experts`, else Wan 2.1."""
    options = dict(cache=folders.cache, say=quiet, size=[16, 32], frames=5) | options
    prompts = list(zip(TEXT, sources))
    return load_pipeline(str(folders(WAN[experts])), prompts=prompts, **options)


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("experts", [False, True], ids=["2.1", "2.2"])
def test_image_to_video_is_the_pipeline(experts, steps, folders, sources):
    model = load_video(folders, experts, sources)
    assert isinstance(model, Routed) == experts
    assert ("seen" in model.encode([0])) != experts
    pipe = plain_pipeline(model, folders(WAN[experts]))
    images = [fitted(model, path) for path in sources]
    z, cond = noise(steps, 2, *model.shape), model.encode([0, 1])
    samples = {}
    for w in (3.0, 1.0):
        samples[w], _ = sample_as_pipeline(model, pipe.scheduler, z, cond, steps, w)
        theirs = pipeline_samples(model, pipe, TEXT, images, z, steps, w)
        assert relative(samples[w], theirs) < 1e-5, w
    assert relative(samples[3.0], samples[1.0]) > 0.01
    for name in {"source", "seen"} & cond.keys():
        other = cond | {name: cond[name].flip(0)}
        changed, _ = sample_as_pipeline(model, pipe.scheduler, z, other, steps, 1.0)
        assert relative(changed, samples[1.0]) > 1e-4, name


@torch.no_grad()
@pytest.mark.parametrize("experts", [False, True], ids=["2.1", "2.2"])
def test_the_null_condition_keeps_the_first_frame(experts, folders, sources):
    model = load_video(folders, experts, sources, negative="blurry")
    cond, x = model.encode([0, 1]), noise(0, 2, *model.shape)
    null = model.unconditional(cond, 2)
    for name in cond:
        assert (null[name] is cond[name]) == (name in ("source", "seen")), name
    assert torch.equal(model.guided(x, 0.4, 0.6, cond, 0), model(x, 0.4, 0.6, null))
    expert = model.at_level(1.0) if experts else model
    (before,) = expert(x, 0.6, 0.8, cond, features=True)
    assert before.shape[2:] == (model.shape[1] * model.shape[2] // 2, model.shape[3] // 2)


def test_a_time_for_each_token_is_refused(folders, sources, tmp_path):
    copy = shutil.copytree(folders(WAN[False]), tmp_path / "copy")
    edit(copy / "model_index.json", expand_timesteps=True)
    with pytest.raises(UserError, match="expand_timesteps: expected false"):
        options = dict(cache=folders.cache, say=quiet, size=[16, 16], frames=1)
        load_pipeline(str(copy), prompts=[("dog", sources[0])], **options)


# ---- folders of edits ----------------------------------------------------------------------------


def write_lines(home, *entries):
    draw_source(home / "a.png", 0)
    draw_source(home / "b.png", 1)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (home / "metadata.jsonl").write_text("\n".join(lines))
    return home


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", [*TARGETS, None])
def test_usual_names_of_columns(source, target, tmp_path):
    for text in TEXTS:
        entry = {source: "a.png", text: "make it red", "id": 7}
        if target:
            entry[target] = "b.png"
        (found,) = read_edits(write_lines(tmp_path, entry))
        expected = tmp_path / "b.png" if target else None
        assert found == (tmp_path / "a.png", ["make it red"], expected)


EDIT = dict(source_file_name="a.png", text="x")


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "line 1: expected a JSON object with the source image"),
        ("[1]", "line 1: expected a JSON object with the source image"),
        (dict(file_name="a.png", text="x"), r"line 1: expected .*\(source_file_name,.*, found fil"),
        (dict(source_file_name="a.png"), "line 1: expected .* a text"),
        (dict(EDIT, text=[]), "line 1: expected .* a text"),
        (dict(EDIT, text=[1]), "line 1: expected .* a text"),
        (dict(EDIT, source_file_name=3), "line 1: expected .* the source image"),
        (dict(EDIT, file_name=3), "line 1: expected .* the result"),
        (dict(EDIT, source_file_name="c.png"), "line 1: no such file: 'c.png'"),
        (dict(EDIT, source_file_name="../a.png"), "line 1: expected a file in this folder"),
        (dict(EDIT, file_name="/etc/passwd"), "line 1: expected a file in this folder"),
        ("", "expected a line for each edit, found none"),
    ],
)
def test_lines_that_are_no_edits(line, says, tmp_path):
    with pytest.raises(UserError, match=says):
        read_edits(write_lines(tmp_path, line))


def test_a_folder_without_lines(tmp_path, folders):
    draw_source(tmp_path / "a.png", 0)
    with pytest.raises(UserError, match="--data .*: expected metadata.jsonl"):
        read_edits(tmp_path)
    with pytest.raises(UserError, match="--data: expected a folder of source images and prompts"):
        load(folders, "kontext")
    with pytest.raises(UserError, match="--prompts: expected --data FOLDER"):
        load(folders, "kontext", ["a prompt without image"], data=tmp_path)
    with pytest.raises(UserError, match="--size: expected one size for"):
        load(folders, "kontext", [("dog", tmp_path / "a.png")], size=[[16, 16], [16, 32]])
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="a.png: expected an image that can be read"):
        load(folders, "kontext", [("dog", tmp_path / "a.png")])


def test_several_texts_of_an_image(folders, tmp_path):
    """A row for each; the result goes with them in turn."""
    entry = dict(EDIT, text=["one", "two"], file_name="b.png")
    home = write_lines(tmp_path, entry, dict(EDIT, text="three", file_name="a.png"))
    model = load(folders, "kontext", data=str(home))
    assert model.prompts == ["one", "two", "three"]
    images = model.load_image_folder(str(home), quiet)
    assert images.labels.tolist() == [0, 2]
    assert images.captions.tolist() == [2, 1]
    assert not torch.equal(model.encode([0])["text"], model.encode([1])["text"])


def test_embeddings_are_kept_for_the_same_bytes(folders, tmp_path):
    """A source under another name is read from the cache, one with another pixel is not."""
    said = []
    first = draw_source(tmp_path / "a.png", 5)
    load(folders, "kontext", [("dog", first)], say=said.append)
    assert "encoding 1" in said[-1]
    moved = first.rename(tmp_path / "b.png")
    load(folders, "kontext", [("dog", moved)], say=said.append)
    assert "read from" in said[-1]
    load(folders, "kontext", [("dog", moved)], size=[16, 16], say=said.append)
    assert "encoding 1" in said[-1]  # of another size
    load(folders, "kontext", [("dog", draw_source(moved, 6))], say=said.append)
    assert "encoding 1" in said[-1]


# ---- scripts -------------------------------------------------------------------------------------


def flags_of(folders, name, triples, *more):
    flags = ["--teacher", folders(name), "--data", triples, "--cache-prompts", folders.cache]
    flags += ["--size", "16", "--batch", 2, "--ema", 0, "--lr", 1e-3, "--lr-fake", 1e-3]
    flags += ["--frames", 5] if name in WAN.values() else []
    return [*flags, "--cfg", 3, "--nfe", 2, "--warmup", 0, *more]


@pytest.mark.parametrize("name", ["kontext"])
def test_a_run_from_a_folder_of_triples(name, folders, triples, scripts, tmp_path):
    """dmd2 with the GAN term: prompts and sources for the student, results as real images. Resumed
    it is the same run, and plain diffusers samples its student."""
    more = ["--gan", "--ratio", 1, "--log-every", 1, "--sample-every", 0, "--save-every", 2]
    flags = flags_of(folders, name, triples, *more)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    found = scripts.run("dmd2.py", *flags, "--iters", 3, "--out", whole, BEFORE=PREPARE).out
    assert f"3 images of {triples}; 3 prompts in {triples}, each with an image" in found
    scripts.run("dmd2.py", *flags, "--iters", 2, "--out", parts, BEFORE=PREPARE)
    again = ["--resume", "--iters", 3, "--out", parts]
    scripts.run("dmd2.py", *again, BEFORE=PREPARE)  # --data and the teacher are the run's
    close(whole, parts, 3)
    same_in_diffusers(whole / "student", folders, name, triples)
    check_pictures(whole / "samples" / "00000003.png", triples)


def check_pictures(path, triples):
    """The first row of the grid: each source above the samples that are made from it."""
    grid = as_tensor(Image.open(path).convert("RGB"))
    source = as_tensor(Image.open(triples / "before" / "1.png").resize((64, 64), Image.NEAREST))
    left = 2 + 1 * (64 + 2)  # of the second column, below a caption of 14 pixels
    assert torch.equal(grid[:, 16:80, left : left + 64], source)


def same_in_diffusers(home, folders, name, triples):
    """The card's lines, with a source of the folder, give our sampler's samples."""
    info = read_json(home / "distill.json")
    teacher = load(folders, name, data=str(triples), size=[16, 16])
    student = load_model(home, info["model"], teacher)
    code = re.search(r"```python\n(.*?)```", (home / "README.md").read_text(), re.S)[1]
    shutil.copy(triples / "before" / "1.png", home / "source.png")
    code = for_test(code, teacher.prompts[1]).replace(
        '"source.png"', repr(str(home / "source.png"))
    )
    code = code.replace('folder = "."', f"folder = {str(home)!r}")
    z = noise(1, 1, *teacher.shape)
    names = dict(Z=to_argument(teacher, z))
    exec(code, names)
    theirs = from_tokens(teacher, names["image"])
    cond = teacher.encode([1])
    ours = our_latents(dmd2.sample, student, z, cond, info["nfe"], **info["sampler"])
    assert relative(theirs, ours) < 1e-5
    untrained = our_latents(dmd2.sample, teacher, z, cond, info["nfe"], **info["sampler"])
    assert relative(untrained, ours) > 1e-3


# ---- other scripts -------------------------------------------------------------------------------

SCRIPTS = dict(  # flags besides flags_of
    sid=["--lora", 2, "--lora-fake", 2],
    phased_dmd=[],
    twinflow=["--image-free", "--guide", "frozen"],
    decoupled_dmd=[],
    sana_sprint=[],
)
SMOKE = [
    ("phased_dmd", "kontext", True),
    ("sid", "qwen_edit", True),
    *(
        pytest.param(script, name, script == "sana_sprint", marks=pytest.mark.slow)
        for script in SCRIPTS
        for name in (*NAMES, *WAN.values())
        if (script, name) not in (("phased_dmd", "kontext"), ("sid", "qwen_edit"))
        and (script != "sana_sprint" or name in NAMES)  # videos are not read
    ),
]


@pytest.mark.parametrize("script, name, targets", SMOKE)
def test_scripts(script, name, targets, folders, scripts, tmp_path):
    """Three iterations, and the exported student is read back."""
    home = write_triples(tmp_path / "edits", targets=targets)
    flags = flags_of(folders, name, home, *SCRIPTS[script])
    if script in ("twinflow", "sana_sprint"):
        flags += ["--batch", 4]
    if script == "sana_sprint" and name.startswith("qwen"):
        flags += ["--cfg", 4]  # within the preset's --cfg-train
    if script == "twinflow":
        at = flags.index("--lr-fake")
        del flags[at : at + 2]
    out = tmp_path / "run"
    scripts.run(f"{script}.py", *flags, "--smoke", "--out", out, BEFORE=PREPARE)
    info = read_json(out / "student" / "distill.json")
    options = dict(frames=5) if name in WAN.values() else {}
    teacher = load(folders, name, data=str(home), size=[16, 16], **options)
    student = load_model(out / "student", info["model"], teacher)
    assert (student.adapter, student.shape) == (teacher.adapter, teacher.shape)
    assert any((out / "student").rglob(FILE)) == ("--lora" in flags)


MISTAKES = [
    ("dmd2", ["--gan"], "--data .*: expected for these flags the result .* in 2 of 2 lines"),
    ("sana_sprint", [], "--data .*: expected for these flags the result .* in 2 of 2 lines"),
    ("boot", ["--data", "x"], "--data x: expected a folder of images, found nothing"),
    ("dmd2", ["--teacher", "mnist"], "--data .*: this run uses no images; add --gan"),
    ("boot", ["--teacher", "mnist"], "--data .*: expected a teacher that takes an image"),
    ("dmd2", ["--prompts", ROOT / "assets" / "prompts.txt"], "--prompts: expected --data"),
]


@pytest.mark.parametrize("script, flags, says", MISTAKES)
def test_mistakes_end_in_one_line(script, flags, says, folders, scripts, tmp_path):
    home = write_triples(tmp_path / "edits", n=2, targets=False)
    base = ["--teacher", folders("kontext"), "--data", home, "--cache-prompts", folders.cache]
    base += ["--size", 16, "--smoke", "--out", tmp_path / "run"]
    process = scripts.start(f"{script}.py", *base, *flags, BEFORE=PREPARE)
    one_line(process, says, script)


def test_dry_run(folders, triples, scripts, tmp_path):
    """Without --data. Its embeddings without values have the shapes of real ones."""
    flags = ["--teacher", folders("kontext"), "--size", 16, "--batch", 1, "--nfe", 1]
    scripts.run("dmd2.py", *flags, "--dry-run", "--out", tmp_path, BEFORE=PREPARE)
    assert read_json(tmp_path / "dryrun.json")["tflop_per_iteration"] > 0
    for name in NAMES:
        real = load(folders, name, data=str(triples))
        shapes = real.text_shapes(real.net.config) | real.source_shapes()
        blank = blank_embeddings(shapes, 2, torch.float32).rows(torch.tensor([0, 1]), "cpu")
        cond = real.encode([0, 1])
        assert blank.keys() == cond.keys() - {"labels"}
        assert blank["source"].shape == cond["source"].shape
        for key in blank.keys() - {"source"}:  # texts are shorter than the longest
            assert blank[key].ndim == cond[key].ndim
            assert blank[key].shape[2:] == cond[key].shape[2:]


# ---- sample.py -----------------------------------------------------------------------------------


def test_sample(folders, sources, tmp_path):
    folder = folders("kontext")
    options = dict(nfe=2, cfg=3.0, size=SIZE, cache_prompts=folders.cache)
    sampler = load_sampler(teacher=str(folder), image=str(sources[0]), **options)
    first, second = sampler(TEXT, seed=3)
    assert first.size == (SIZE[1], SIZE[0])
    (again,) = sampler([TEXT[1]], seed=3)
    assert (as_tensor(again).int() - as_tensor(second).int()).abs().max() <= 1
    sampler.image = str(sources[1])  # another source, the same noise and prompt
    (other,) = sampler([TEXT[1]], seed=3)
    assert not torch.equal(as_tensor(other), as_tensor(second))
    with pytest.raises(UserError, match="--image FILE: expected the image that .* takes"):
        load_sampler(teacher=str(folder), cfg=3.0)
    with pytest.raises(UserError, match="--image x.png: expected a teacher that takes an image"):
        load_sampler(teacher="mnist", image="x.png")
    with pytest.raises(UserError, match="x.png: expected an image, found: No such file"):
        load_sampler(teacher=str(folder), image="x.png", **options)


# ---- presets, further inputs ---------------------------------------------------------------------


def test_presets_are_those_of_the_kind_for_text_alone(folders):
    for name, kind in (("kontext", "flux"), ("qwen_edit", "qwen-image")):
        args = dmd2.parse_args(["--teacher", str(folders(name))])
        relative = dmd2.PRESETS[kind]
        assert (args.preset, args.preset_source) == (kind, f"nobody's: {kind}'s")
        assert (args.lr, args.cfg, args.batch) == tuple(relative[k] for k in ("lr", "cfg", "batch"))


def test_two_times_in_one_network(folders, sources):
    """The tokens of the source have the time 0: no method adds a further input there."""
    name, network = PLUS_2511
    model = load(folders, name, [("dog", sources[0])], network=network)
    with pytest.raises(UserError, match="zero_cond_t: expected a method without further inputs"):
        model.extend("r")
    load(folders, name, [("dog", sources[0])]).extend("r")


def test_processor_is_that_of_transformers(folders):
    """Qwen2VLProcessor itself asks for torchvision when it is made, but not when it is called."""
    from transformers.models.qwen2_vl import processing_qwen2_vl as module

    home = folders("qwen_edit")
    pipe = QwenImageEdit.text_pipeline(home, torch.float32)
    ours = pipe.processor
    theirs = module.Qwen2VLProcessor.__new__(module.Qwen2VLProcessor)
    theirs.image_processor, theirs.tokenizer = ours.image_processor, ours.tokenizer
    theirs.image_token, theirs.video_token = "<|image_pad|>", "<|video_pad|>"
    theirs.image_token_id = ours.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    images = [Image.new("RGB", size, "red") for size in ((60, 60), (90, 30))]
    texts = [f"{i} <|vision_start|><|image_pad|><|vision_end|> word" for i in range(2)]
    options = dict(text=texts, images=images, padding=True, return_tensors="pt")
    a, b = ours(**options), theirs(**options)
    for key in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"):
        assert torch.equal(a[key], b[key]), key

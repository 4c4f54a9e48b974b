"""Images with captions for text-to-image teachers: folders, what must not be read, latents and
embeddings on disk (common/teachers/{latents,prompts}.py), scripts on them."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from helpers import pipelines
from helpers.runs import log, run_processes
from helpers.teachers import draw, quiet, write_captioned
from PIL import Image

from common.errors import UserError
from common.teachers import latents, prompts
from common.teachers.latents import Shards
from common.teachers.load import load_model, load_pipeline
from common.teachers.prompts import PromptEmbeddings
from common.teachers.unet import SD15
from data.image_file import read_image
from data.image_folder import LONGEST, read_captions
from data.images import Images, load_images

PROMPTS = ["a red heart", "dog", "pizza 7"]


def write_metadata(home, *lines):
    """metadata.jsonl of objects, or of lines of text -> home."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (home / "metadata.jsonl").write_text("".join(line + "\n" for line in lines))
    return home


# ---- folders -------------------------------------------------------------------------------------


def test_text_files(tmp_path):
    write_captioned(tmp_path)
    draw(tmp_path / ".trash" / "9.png")
    draw(tmp_path / "deep" / "._3.png")
    (tmp_path / "0.txt").write_bytes("\ufeffzwei  Zeilen\r\n\r\n mit Ümlaut \n".encode())
    (tmp_path / "2.txt").write_text("")
    found = [(str(path.relative_to(tmp_path)), texts) for path, texts in read_captions(tmp_path)]
    assert found == [
        ("0.jpg", ["zwei Zeilen", "mit Ümlaut"]),
        ("2.jpg", [""]),
        ("4.jpg", ["word 4"]),
        ("deep/1.png", ["word 1"]),
        ("deep/3.png", ["word 3"]),
    ]


def test_metadata(tmp_path):
    """Its lines decide which images, and in which order; files of text are not read then."""
    write_captioned(tmp_path)
    first = dict(file_name="deep/3.png", text=" three\n", size=3)
    second = dict(file_name="0.jpg", text="")
    third = dict(file_name="2.jpg", text=["two", " zwei"])
    write_metadata(tmp_path, first, "", second, third)
    found = [(path.name, texts) for path, texts in read_captions(str(tmp_path))]
    assert found == [("3.png", ["three"]), ("0.jpg", [""]), ("2.jpg", ["two", "zwei"])]


NOT_AN_ENTRY = "line 2: expected a JSON object with file_name and text"
WAY_OUT = "line 2: .*a way out of it"
BAD_LINES = [  # line 2 of metadata.jsonl, what the message must say
    ("{", NOT_AN_ENTRY),
    ("[]", NOT_AN_ENTRY),
    ("[" * 9000, NOT_AN_ENTRY),
    (dict(file_name="0.jpg"), NOT_AN_ENTRY),
    (dict(file_name="0.jpg", text=None), NOT_AN_ENTRY),
    (dict(file_name=["0.jpg"], text="x"), NOT_AN_ENTRY),
    (dict(file_name="0.jpg", text=[]), NOT_AN_ENTRY),
    (dict(file_name="0.jpg", text=["x", 1]), NOT_AN_ENTRY),
    (dict(file_name="none.jpg", text="x"), "line 2: no such file: 'none.jpg'"),
    (dict(file_name="deep", text="x"), "line 2: no such file"),
    (dict(file_name="../secret.jpg", text="x"), WAY_OUT),
    (dict(file_name="deep/../../secret.jpg", text="x"), WAY_OUT),
    (dict(file_name="{tmp}/secret.jpg", text="x"), WAY_OUT),
    (dict(file_name="loop.jpg", text="x"), "line 2: "),
    (dict(file_name="a\0b", text="x"), "line 2: no such file"),
    (dict(file_name="\ud800", text="x"), "line 2: "),
    (dict(file_name="x" * 300, text="x"), "line 2: "),
    (dict(file_name="0.jpg", text="\ud800"), "line 2: expected UTF-8 text"),
    (
        dict(file_name="0.jpg", text="x" * (LONGEST + 1)),
        "line 2: expected a caption of at most",
    ),
    ("x" * 10_000_000, "metadata.jsonl: expected captions of at most"),
]


@pytest.mark.parametrize("line, says", BAD_LINES, ids=lambda value: str(value)[:40])
def test_bad_metadata(line, says, tmp_path, monkeypatch):
    """One line each, and the file outside the folder is never opened."""
    home = write_captioned(tmp_path / "set", 1)
    (home / "deep").mkdir(exist_ok=True)
    draw(tmp_path / "secret.jpg")
    (home / "loop.jpg").symlink_to(home / "loop.jpg")
    if isinstance(line, dict) and isinstance(line.get("file_name"), str):
        line = dict(line, file_name=line["file_name"].replace("{tmp}", str(tmp_path)))
    write_metadata(home, dict(file_name="0.jpg", text="fine"), line)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(UserError, match=f"--data .*{says}") as e:
        read_captions(home)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 700


def test_links_to_images_and_captions(tmp_path):
    """A farm of links, as people make subsets; and the hub's cache, whose files have no suffix."""
    source = write_captioned(tmp_path / "source", 1)
    farm = tmp_path / "farm"
    farm.mkdir()
    for name in ("0.jpg", "0.txt"):
        (farm / name).symlink_to(source / name)
    assert read_captions(farm) == [(farm / "0.jpg", ["word 0"])]
    write_metadata(farm, dict(file_name="0.jpg", text="linked"))
    assert read_captions(farm) == [(farm / "0.jpg", ["linked"])]

    snapshot = tmp_path / "datasets--x--y" / "snapshots" / "0123"
    blobs = tmp_path / "datasets--x--y" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for name in ("0.jpg", "0.txt"):
        (blobs / f"hash-of-{name[2:]}").write_bytes((source / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/hash-of-{name[2:]}")
    assert read_captions(snapshot) == [(snapshot / "0.jpg", ["word 0"])]


def test_missing_captions_are_counted(tmp_path):
    write_captioned(tmp_path)
    (tmp_path / "2.txt").unlink()
    (tmp_path / "deep" / "3.txt").unlink()
    says = "a caption for each image.* found none for 2 of 5 images, the first is 2.jpg"
    with pytest.raises(UserError, match=says):
        read_captions(tmp_path)


def replace_by_link(path, target):
    path.unlink()
    path.symlink_to(target)


BAD_FILES = [  # what is done to a folder (and a file outside of it), what the message must say
    (lambda home, out: (home / "0.txt").write_bytes(b"\xff\xfe"), "0.txt: expected UTF-8"),
    (
        lambda home, out: (home / "0.txt").write_text("y" * 5000),
        "0.txt: expected a caption of at most",
    ),
    (
        lambda home, out: (home / "0.txt").write_bytes(b"y\n" * 9000),
        "0.txt: expected captions of at most",
    ),
    (
        lambda home, out: replace_by_link(home / "0.txt", out),
        "0.txt: .*found a link to '.*outside'",
    ),
    (lambda home, out: (home / "metadata.jsonl").symlink_to(out), "metadata.jsonl: .*found a link"),
]


@pytest.mark.parametrize("spoil, says", BAD_FILES)
def test_bad_text_files(spoil, says, tmp_path):
    home = write_captioned(tmp_path / "set", 2)
    (tmp_path / "outside").write_text("secret")
    spoil(home, tmp_path / "outside")
    with pytest.raises(UserError, match=says):
        read_captions(home)


@pytest.mark.parametrize("with_table", [False, True])
def test_no_images_with_captions(with_table, tmp_path):
    if with_table:
        write_metadata(tmp_path)
    with pytest.raises(UserError, match="expected images .* with captions, found none"):
        read_captions(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="expected a folder of images, found nothing"):
        read_captions(tmp_path / "none")


# ---- latents and embeddings ----------------------------------------------------------------------


def load(folders, name, home, cache, say=quiet, **options):
    """A teacher that is loaded with --data home."""
    data = home and str(home)
    return load_pipeline(
        str(folders(name)), prompts=PROMPTS, cache=cache, data=data, say=say, **options
    )


@pytest.fixture
def damaged_set(tmp_path):
    """Five images with captions, of which the first cannot be read."""
    home = write_captioned(tmp_path / "set")
    (home / "0.jpg").write_bytes(b"damaged")
    return home


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sana"])
def test_latents_and_captions(name, folders, damaged_set, tmp_path, monkeypatch):
    """A batch is the VAE's latents of the images, and the embeddings of their own captions."""
    monkeypatch.setattr(latents, "SHARD", 2)  # three files
    model, lines = load(folders, name, damaged_set, tmp_path / "cache"), []
    images = load_images(str(damaged_set), model, lines.append)
    assert "encoding" in lines[0]
    assert "skipped" in lines[1]
    assert "0.jpg" in lines[1]
    assert "4 images, with captions, 1 skipped" in lines[-1]
    assert len(images) == 4
    assert len(images.images.parts) == 3

    x, labels = images.batch(0, 4)
    assert model.encode_images(x) is x
    assert x.shape == (4, *model.shape)
    assert model.classes == 3
    assert min(labels) >= model.classes  # behind the prompts

    cond = model.encode(labels)
    cls = type(model)
    pipe = cls.text_pipeline(folders(name), torch.float32)
    first = int(labels.min()) - 1  # row of the damaged image's caption
    files = dict(enumerate(read_captions(damaged_set), first))
    for i, label in enumerate(labels.tolist()):
        path, (text,) = files[label]
        pixels = read_image(path, 3, model.image_shape[-1])[None]
        assert torch.allclose(x[i], model.encode_images(pixels)[0], atol=1e-5), path
        with torch.no_grad():
            expected = cls.embed(pipe, [text])
        for key, value in expected.items():
            assert torch.allclose(cond[key][i].float(), value[0].float(), atol=1e-5), (key, text)


def test_several_captions(folders, tmp_path):
    """Of each image one in an epoch, in turn; the embedding is that of the caption."""
    home = write_captioned(tmp_path / "set", 3)
    (home / "0.txt").write_text("one\ntwo\n\nthree\n")
    model, lines = load(folders, "sd15", home, tmp_path / "cache"), []
    images = load_images(str(home), model, lines.append)
    assert "3 images, with 5 captions, of each image one in every epoch" in lines[-1]
    texts = [text for _, own in read_captions(home) for text in own]
    assert texts == ["one", "two", "three", "word 2", "word 1"]
    first = int(images.labels.min())  # behind the prompts
    drawn = [{texts[row - first] for row in images.batch(it, 3)[1].tolist()} for it in range(4)]
    other = {"word 1", "word 2"}
    assert drawn == [other | {"one"}, other | {"two"}, other | {"three"}, other | {"one"}]

    x, labels = images.batch(1, 3)
    i = first + texts.index("two")
    pixels = read_image(home / "0.jpg", 3, model.image_shape[-1])[None]
    assert torch.allclose(x[labels == i], model.encode_images(pixels), atol=1e-5)
    with torch.no_grad():
        expected = SD15.embed(SD15.text_pipeline(folders("sd15"), torch.float32), ["two"])
    for key, value in expected.items():
        assert torch.allclose(model.encode([i])[key].float(), value[:1].float(), atol=1e-5), key
    assert images.part(None, 0, 2).captions.tolist() == [3, 1]  # every second image, from the first


def test_notes_are_kept_with_the_latents(folders, tmp_path, monkeypatch):
    """What was converted is said again when the latents come from the cache."""
    monkeypatch.setattr(latents, "SHARD", 2)
    home = write_captioned(tmp_path / "set", 3)
    (home / "photo.heic").write_bytes(b"x")
    for name in ("0.jpg", "2.jpg"):
        exif = Image.Exif()
        exif[0x0112] = 3
        with Image.open(home / name) as image:
            image.save(home / name, exif=exif)
    model = load(folders, "sd15", home, tmp_path / "cache")
    for _ in range(2):
        lines = []
        load_images(str(home), model, lines.append)
        assert "turned by EXIF orientation: 2" in lines[-1]
        assert "left out (.heic is not read): 1" in lines[-1]
        assert "Lanczos" in lines[-1]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sana"])
def test_captions_leave_the_prompts_as_they_are(name, folders, damaged_set, tmp_path):
    model = load(folders, name, damaged_set, tmp_path / "cache")
    plain = load(folders, name, None, tmp_path / "cache")
    expected = plain.encode([0, 1, 2])
    for key, value in model.encode([0, 1, 2]).items():
        assert torch.equal(value, expected[key]), key


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sana"])
def test_captions_and_prompts_in_one_batch(name, folders, damaged_set, tmp_path):
    """As the GAN term joins them."""
    model = load(folders, name, damaged_set, tmp_path / "cache")
    _, labels = load_images(str(damaged_set), model, quiet).batch(0, 4)
    cond, real = model.encode([0, 1]), model.encode(labels)
    both = {key: torch.cat([value, real[key]]) for key, value in cond.items()}
    assert len(both["labels"]) == 6
    x = model.guided(torch.randn(6, *model.shape), 0.6, 0.8, both, 2.0)
    assert x.isfinite().all()


@pytest.mark.parametrize(
    "name, options, shape",
    [
        ("sd15", dict(size=[16, 24]), (4, 8, 12)),
        ("wan", dict(size=[16, 24], frames=1), (4, 1, 4, 6)),
    ],
)
def test_latents_of_another_size(name, options, shape, folders, tmp_path):
    """--size 16x24, and --frames 1 of a teacher of videos."""
    home = write_captioned(tmp_path / "set", 2)
    model = load(folders, name, home, tmp_path / "cache", **options)
    assert model.shape == shape
    x, labels = load_images(str(home), model, quiet).batch(0, 2)
    assert x.shape == (2, *shape)
    path, _ = read_captions(home)[int(labels[0]) - int(labels.min())]
    pixels = read_image(path, 3, (16, 24))[None]
    if name == "wan":
        pixels = pixels[:, :, None]
    assert torch.allclose(x[:1], model.encode_images(pixels), atol=1e-5)


def test_videos_are_not_read(folders, tmp_path):
    home = write_captioned(tmp_path / "set", 2)
    model = load(folders, "wan", home, tmp_path / "cache", size=16, frames=5)
    with pytest.raises(UserError, match="a teacher of images, found one of videos.*--frames 1"):
        load_images(str(home), model)


def test_second_start_reads_the_caches(folders, tmp_path, monkeypatch):
    home, cache, lines = write_captioned(tmp_path / "set"), tmp_path / "cache", []
    model = load(folders, "sd15", home, cache, lines.append)
    first = load_images(str(home), model, lines.append)
    assert sum("encoding" in line for line in lines) == 3  # prompts, captions, latents

    monkeypatch.setattr(SD15, "text_pipeline", None)  # calling these would fail
    monkeypatch.setattr(latents, "read_images", None)
    lines.clear()
    model = load(folders, "sd15", home, cache, lines.append)
    again = load_images(str(home), model, lines.append)
    assert sum("read from" in line for line in lines) == 3
    for a, b in zip(first.batch(3, 4), again.batch(3, 4), strict=True):
        assert torch.equal(a, b)


def test_damaged_latents_are_refused(folders, tmp_path):
    home, cache = write_captioned(tmp_path / "set"), tmp_path / "cache"
    model = load(folders, "sd15", home, cache)
    load_images(str(home), model, quiet)
    (shard,) = cache.glob("set-latents-*/00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="--cache-prompts .*delete it to encode again"):
        load_images(str(home), model, quiet)


def what_is_encoded(lines):
    """Of prompts, captions and latents."""
    return ["encoding" in line for line in lines if "encoding" in line or "read from" in line]


def test_changed_captions_are_encoded_anew(folders, tmp_path):
    home, cache, lines = write_captioned(tmp_path / "set"), tmp_path / "cache", []
    load_images(str(home), load(folders, "sd15", home, cache), quiet)
    (home / "4.txt").write_text("another caption")
    model = load(folders, "sd15", home, cache, lines.append)
    load_images(str(home), model, lines.append)
    assert what_is_encoded(lines) == [False, True, False]


def test_changed_images_are_encoded_anew(folders, tmp_path, monkeypatch):
    home, cache, lines = write_captioned(tmp_path / "set"), tmp_path / "cache", []
    load_images(str(home), load(folders, "sd15", home, cache), quiet)
    draw(home / "5.png")
    (home / "5.txt").write_text("new")
    model = load(folders, "sd15", home, cache, lines.append)
    images = load_images(str(home), model, lines.append)
    assert what_is_encoded(lines) == [False, True, True]
    assert len(images) == 6

    os.utime(home / "2.jpg", ns=(1, 1))
    load_images(str(home), load(folders, "sd15", home, cache), quiet)
    assert len(list(cache.glob("set-latents-*"))) == 3

    monkeypatch.setattr("common.teachers.cache.metadata.version", lambda name: "9.9")
    lines.clear()
    model = load(folders, "sd15", home, cache, lines.append)
    load_images(str(home), model, lines.append)
    assert what_is_encoded(lines) == [True, True, True]
    model.vae.__class__ = type("OtherVAE", (type(model.vae),), {})  # of another model_index.json
    load_images(str(home), model, lines.append)
    assert what_is_encoded(lines)[3:] == [True]


def test_a_folder_of_bombs(folders, tmp_path, monkeypatch):
    """Images that would take too much memory are skipped; here nothing else is left."""
    home = tmp_path / "set"
    draw(home / "x.png", (60, 60))
    (home / "x.txt").write_text("bomb")
    model, lines = load(folders, "sd15", home, tmp_path / "cache"), []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="expected images .* found none readable .1 skipped."):
        load_images(str(home), model, lines.append)
    assert any("over 1,000 pixels" in line for line in lines)


def test_an_interrupted_encoding_goes_on(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)
    home = write_captioned(tmp_path / "set")
    model, encoded = load(folders, "sd15", home, tmp_path / "cache"), []
    encode_images = model.encode_images

    def count(images):
        encoded.append(len(images))
        return encode_images(images)

    model.encode_images = count
    whole = load_images(str(home), model, quiet)
    next((tmp_path / "cache").glob("set-latents-*/00001.safetensors")).unlink()
    encoded.clear()
    again = load_images(str(home), model, quiet)
    assert encoded == [2]
    rows = torch.arange(5)
    assert torch.equal(whole.images[rows], again.images[rows])


def test_latents_that_do_not_fit_on_the_disk(folders, tmp_path, monkeypatch):
    home, lines = write_captioned(tmp_path / "set"), []
    model = load(folders, "sd15", home, tmp_path / "cache")
    size = 5 * 4 * model.shape[0] * model.shape[1] * model.shape[2]
    usage = SimpleNamespace(free=size - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="the latents of 5 images take .* free; choose a folder"):
        load_images(str(home), model, quiet)
    usage.free = size
    load_images(str(home), model, lines.append)
    assert "encoding 5 of them, " in lines[0]


def test_a_teacher_without_images(folders, tmp_path):
    model = load(folders, "sd15", None, tmp_path / "cache")
    with pytest.raises(UserError, match="ships no images; give a folder of images with captions"):
        load_images(None, model)


# ---- rows of several files -----------------------------------------------------------------------


def test_embeddings_of_other_lengths():
    """Encoders that do not pad to a fixed length: captions are longer than prompts and null."""
    table = PromptEmbeddings(
        [dict(text=torch.ones(3, 4, 2), pooled=torch.ones(3, 5))],
        dict(text=torch.ones(1, 2, 2), pooled=torch.zeros(1, 5)),
    )
    captions = PromptEmbeddings(
        [dict(text=torch.full((2, 6, 2), 7.0), pooled=torch.full((2, 5), 7.0))],
        dict(text=torch.ones(1, 6, 2), pooled=torch.zeros(1, 5)),
    )
    first = table.append(captions)
    rows = table.rows(torch.tensor([2, first + 1]), "cpu")
    assert rows["text"].shape == (2, 6, 2)
    assert rows["text"][:, :, 0].sum(1).tolist() == [4, 42]
    assert rows["pooled"].tolist() == [[1.0] * 5, [7.0] * 5]
    assert table.nulls(3, "cpu")["text"].shape == (3, 6, 2)


def test_rows_of_two_tables(monkeypatch):
    monkeypatch.setattr(prompts, "SHARD", 2)

    def part(*values):
        return dict(pooled=torch.tensor(values)[:, None])

    table = PromptEmbeddings([part(0, 1), part(2)], part(9))
    first = table.append(PromptEmbeddings([part(10, 11), part(12)], part(9)))
    index = torch.tensor([0, 2, first, first + 1, first + 2])
    rows = table.rows(index, "cpu")["pooled"].flatten().tolist()
    assert rows == [0, 2, 10, 11, 12]


def test_shards_are_indexed_as_one_tensor():
    whole = torch.arange(12.0).view(6, 2)
    shards = Shards([whole[:1], whole[1:1], whole[1:5], whole[5:]])
    index, mask = torch.tensor([5, 0, 3, 3]), torch.arange(6) % 2 == 1
    assert len(shards) == 6
    assert torch.equal(shards[index], whole[index])
    assert torch.equal(shards[mask], whole[mask])
    assert shards[torch.zeros(6, dtype=torch.bool)].shape == (0, 2)


def test_part_of_the_classes():
    """MSD's students share the classes."""
    images = Images(torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2]), ["a", "b", "c"])
    assert images.part(torch.tensor([0, 2]), 0, 2).images.tolist() == [0, 2, 3, 5]


def test_part_of_the_captions():
    """Captions have no class: each student gets every n-th."""
    images = Images(torch.arange(5), torch.arange(5) + 1024, [])
    parts = [images.part(None, k, 2).images.tolist() for k in range(2)]
    assert parts == [[0, 2, 4], [1, 3]]


# ---- scripts -------------------------------------------------------------------------------------


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


RUNS = [
    ("dmd2", "sd15", ["--gan", "--nfe", 2, "--cfg", 2]),
    slow("sana_sprint", "sd15", ["--time", "native"]),
    slow("twinflow", "sd3", []),
    slow("dmd2", "sd3", ["--gan", "--nfe", 4, "--cfg", 2]),
    slow("sana_sprint", "sd3", ["--time", "native", "--cfg-train", 1, 2, "--cfg", 2]),
    slow("twinflow", "sd15", []),
    slow("msd", "sd15", ["--students", 2, "--adm", 0.4, "--cfg", 2]),
    slow("sid", "sd15", ["--gan", "--gan-warmup", 4, "--cfg", 1]),
    slow("decoupled_dmd", "sd15", ["--gan", "--cfg", 2]),
    slow("dmd2", "sdxl", ["--gan", "--nfe", 2, "--cfg", 2]),
]


@pytest.mark.parametrize("method, name, flags", RUNS)
def test_script(method, name, flags, folders, scripts, tmp_path):
    scripts.load(*pipelines.MODULES)
    prompt_file, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompt_file.write_text("\n".join(PROMPTS * 3))
    flags = ["--teacher", folders(name), "--prompts", prompt_file, *flags]
    flags += ["--cache-prompts", tmp_path / "cache", "--data", write_captioned(tmp_path / "set")]
    flags += ["--batch", 4, "--lr", 1e-4, "--warmup", 0, "--smoke", "--out", out]
    p = scripts.run(f"{method}.py", *flags)
    assert p.out.count("encoding") == 3
    assert "5 images, with captions, 0 skipped" in p.out
    assert "Traceback" not in p.err
    lines = log(out)
    assert len(lines) >= 3
    assert all(line["skipped"] == 0 for line in lines)

    info = json.loads((out / "student" / "distill.json").read_text())
    teacher = load_pipeline(
        str(folders(name)), prompts=str(prompt_file), cache=tmp_path / "cache", say=quiet
    )
    student = load_model(out / "student", info["model"], teacher)
    pairs = zip(student.parameters(), teacher.parameters())
    assert any(not torch.equal(a, b) for a, b in pairs)

    again = scripts.run(f"{method}.py", *flags, "--overwrite")
    assert again.out.count("read from") == 3
    assert "encoding" not in again.out


@pytest.mark.slow
def test_two_processes_are_one(folders, scripts, tmp_path):
    """Each encodes its share of the latents; three iterations of both equal those of one."""
    write_captioned(tmp_path / "set")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    logs = []
    for n in (1, 2):
        out = tmp_path / f"run-{n}"
        flags = ["--teacher", folders("sd15"), "--prompts", tmp_path / "prompts.txt"]
        flags += ["--cache-prompts", tmp_path / f"cache-{n}", "--data", tmp_path / "set"]
        flags += ["--batch", 4, "--gan", "--nfe", 1, "--lr", 1e-3, "--warmup", 0]
        run_processes(scripts, n, "dmd2.py", *flags, "--smoke", "--out", out)
        logs.append(log(out))
    for one, two in zip(*logs, strict=True):
        for key in ("gen", "cls", "fake", "dm"):
            if key in one:
                assert one[key] == pytest.approx(two[key], rel=1e-4), key

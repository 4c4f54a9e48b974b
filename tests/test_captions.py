"""Images with captions for text-to-image teachers: folders, what must not be read, latents and embeddings on disk, scripts on them."""

import json
import os

import pytest
import torch
from helpers import pipelines
from PIL import Image
from test_data import picture
from test_teachers import folders  # noqa: F401  the fixture: tiny pipelines

from common.data import Images, load_images
from common.errors import UserError
from common.files import ROOT
from common.image_folder import LONGEST, read_captions, read_image
from common.teachers import latents as latents_module
from common.teachers import prompts as prompts_module
from common.teachers.latents import Shards
from common.teachers.load import load_model, load_pipeline
from common.teachers.prompts import PromptEmbeddings
from common.teachers.unet import SD15

PROMPTS = ["a red heart", "dog", "pizza 7"]


def fill(home, n=5):
    for i in range(n):
        picture(
            home / "deep" / f"{i}.png" if i % 2 else home / f"{i}.jpg",
            (20 + i, 17),
            (40 * i, 99, 10),
            "RGB",
        )
        (home / "deep" / f"{i}.txt" if i % 2 else home / f"{i}.txt").write_text(f"word {i}\n")
    return home


def jsonl(home, *lines):
    (home / "metadata.jsonl").write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return home


# ---- folders ----------------------------------------------------------------------------------------------------------------------------


def test_text_files(tmp_path):
    fill(tmp_path)
    picture(tmp_path / ".trash" / "9.png")
    picture(tmp_path / "deep" / "._3.png")
    (tmp_path / "0.txt").write_bytes("\ufeffzwei  Zeilen\r\nmit Ümlaut \n".encode())
    found = read_captions(tmp_path)
    assert [(str(p.relative_to(tmp_path)), text) for p, text in found] == [
        ("0.jpg", "zwei Zeilen mit Ümlaut"),
        ("2.jpg", "word 2"),
        ("4.jpg", "word 4"),
        ("deep/1.png", "word 1"),
        ("deep/3.png", "word 3"),
    ]


def test_metadata(tmp_path):
    """Its lines decide: which images, in which order; same-name text is not looked at."""
    fill(tmp_path)
    jsonl(
        tmp_path,
        dict(file_name="deep/3.png", text=" three\n", size=3),
        "",
        dict(file_name="0.jpg", text=""),
    )
    assert [(p.name, text) for p, text in read_captions(str(tmp_path))] == [
        ("3.png", "three"),
        ("0.jpg", ""),
    ]


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "line 2: expected a JSON object with file_name and text"),
        ("[]", "line 2: expected a JSON object"),
        ("[" * 9000, "line 2: expected a JSON object"),
        (dict(file_name="0.jpg"), "line 2: expected a JSON object with file_name and text"),
        (dict(file_name="0.jpg", text=None), "line 2: expected a JSON object"),
        (dict(file_name=["0.jpg"], text="x"), "line 2: expected a JSON object"),
        (dict(file_name="none.jpg", text="x"), "line 2: no such file: 'none.jpg'"),
        (dict(file_name="deep", text="x"), "line 2: no such file"),
        (dict(file_name="../secret.jpg", text="x"), "line 2: .*a way out of it"),
        (dict(file_name="deep/../../secret.jpg", text="x"), "line 2: .*a way out"),
        (dict(file_name="{tmp}/secret.jpg", text="x"), "line 2: .*a way out"),
        (dict(file_name="out.jpg", text="x"), "line 2: .*a way out"),
        (dict(file_name="away/secret.jpg", text="x"), "line 2: .*a way out"),
        (dict(file_name="loop.jpg", text="x"), "line 2: "),
        (dict(file_name="a\0b", text="x"), "line 2: .*a way out"),
        (dict(file_name="\ud800", text="x"), "line 2: "),
        (dict(file_name="0.jpg", text="\ud800"), "line 2: expected UTF-8 text"),
        (
            dict(file_name="0.jpg", text="x" * (LONGEST + 1)),
            "line 2: expected a caption of at most",
        ),
        ("x" * 10_000_000, "metadata.jsonl: expected captions of at most"),
        (dict(file_name="x" * 300, text="x"), "line 2: "),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_metadata(line, says, tmp_path, monkeypatch):
    """One line each, and the file outside is never opened."""
    home = fill(tmp_path / "set", 1)
    (home / "deep").mkdir(exist_ok=True)
    picture(tmp_path / "secret.jpg", mode="RGB", color=(1, 2, 3))
    (home / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (home / "away").symlink_to(tmp_path)
    (home / "loop.jpg").symlink_to(home / "loop.jpg")
    if isinstance(line, dict) and isinstance(line.get("file_name"), str):
        line = dict(line, file_name=line["file_name"].replace("{tmp}", str(tmp_path)))
    jsonl(home, dict(file_name="0.jpg", text="fine"), line)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(UserError, match=f"--data .*{says}") as e:
        read_captions(home)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700


def test_missing_captions_are_counted(tmp_path):
    fill(tmp_path)
    (tmp_path / "2.txt").unlink()
    (tmp_path / "deep" / "3.txt").unlink()
    with pytest.raises(
        UserError,
        match=r"expected a caption for each image.* found none for 2 of 5 images, the first is 2.jpg",
    ):
        read_captions(tmp_path)


@pytest.mark.parametrize(
    "spoil, says",
    [
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
            lambda home, out: ((home / "0.txt").unlink(), (home / "0.txt").symlink_to(out)),
            "0.txt: .*a way out",
        ),
        (lambda home, out: (home / "z.png").symlink_to(out), "image: .*a way out"),
        (
            lambda home, out: (home / "metadata.jsonl").symlink_to(out),
            "metadata.jsonl: .*a way out",
        ),
    ],
)
def test_bad_text_files(spoil, says, tmp_path):
    home = fill(tmp_path / "set", 2)
    (tmp_path / "outside").write_text("secret")
    spoil(home, tmp_path / "outside")
    with pytest.raises(UserError, match=says):
        read_captions(home)


def test_no_images_with_captions(tmp_path):
    with pytest.raises(UserError, match="expected images .* with captions, found none"):
        read_captions(tmp_path)
    with pytest.raises(UserError, match="expected images .* with captions, found none"):
        read_captions(jsonl(tmp_path))
    with pytest.raises(UserError, match="expected a folder of images, found nothing"):
        read_captions(tmp_path / "none")


def test_only_formats_of_images(tmp_path):
    """A PostScript file would start a program."""
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    )
    with pytest.raises(ValueError, match="UnidentifiedImageError"):
        read_image(tmp_path / "x.png", 3, 8)


# ---- latents and embeddings ---------------------------------------------------------------------------------------------------------------


def load(folders, name, home, cache, lines=None, **kw):  # noqa: F811
    return load_pipeline(
        str(folders(name)),
        prompts=PROMPTS,
        cache=cache,
        data=home and str(home),
        say=(lines if lines is not None else []).append,
        **kw,
    )


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "sana"])
def test_latents_and_captions(name, folders, tmp_path, monkeypatch):  # noqa: F811
    """What a script's two lines make of a batch is the image of the VAE and the embedding of its own caption; the prompts stay what they were."""
    monkeypatch.setattr(latents_module, "SHARD", 2)  # three files
    home = fill(tmp_path / "set")
    (home / "0.jpg").write_bytes(b"damaged")
    model, lines = load(folders, name, home, tmp_path / "cache"), []
    images = load_images(str(home), model, lines.append)
    assert (
        "encoding" in lines[0]
        and "skipped" in lines[1]
        and "0.jpg" in lines[1]
        and "4 images, with captions, 1 skipped" in lines[-1]
    )
    assert len(images) == 4 and len(images.images.parts) == 3 and model.classes == 3
    latents, labels = images.batch(0, 4)
    x, cond = model.encode_images(latents), model.encode(labels)
    assert x is latents and x.shape == (4, *model.shape) and min(labels) > 2
    files = dict(
        enumerate(read_captions(home), int(labels.min()) - 1)
    )  # the first caption is that of the damaged image
    cls = type(model)
    pipe = cls.text_pipeline(folders(name), torch.float32)
    for i, label in enumerate(labels.tolist()):
        path, text = files[label]
        assert torch.allclose(
            x[i],
            model.encode_images(read_image(path, 3, model.image_shape[-1])[None])[0],
            atol=1e-5,
        ), path
        with torch.no_grad():
            for k, v in cls.embed(pipe, [text]).items():
                assert torch.allclose(cond[k][i].float(), v[0].float(), atol=1e-5), (k, text)
    plain = load(folders, name, None, tmp_path / "cache")
    assert all(
        torch.equal(v, plain.encode([0, 1, 2])[k]) for k, v in model.encode([0, 1, 2]).items()
    )
    both = {
        k: torch.cat([v, cond[k]]) for k, v in model.encode([0, 1]).items()
    }  # as the GAN term joins them
    assert (
        len(both["labels"]) == 6
        and torch.isfinite(model.guided(torch.randn(6, *model.shape), 0.6, 0.8, both, 2.0)).all()
    )


def test_latents_of_another_format(folders, tmp_path):  # noqa: F811
    """--size 16x24, and --frames 1 of a teacher of videos."""
    home = fill(tmp_path / "set", 2)
    for name, kw, shape in (
        ("sd15", dict(size=[16, 24]), (4, 8, 12)),
        ("wan", dict(size=[16, 24], frames=1), (4, 1, 4, 6)),
    ):
        model = load(folders, name, home, tmp_path / "cache", **kw)
        assert model.shape == shape
        latents, labels = load_images(str(home), model, lambda *a: None).batch(0, 2)
        path, _ = read_captions(home)[int(labels[0]) - int(labels.min())]
        image = read_image(path, 3, (16, 24))[None]
        assert latents.shape == (2, *shape) and torch.allclose(
            latents[:1],
            model.encode_images(image[:, :, None] if name == "wan" else image),
            atol=1e-5,
        )
    with pytest.raises(UserError, match="found one of videos.*--frames 1"):
        load_images(str(home), load(folders, "wan", home, tmp_path / "cache", size=16, frames=5))


def test_second_start_reads_the_caches(folders, tmp_path, monkeypatch):  # noqa: F811
    home, lines = fill(tmp_path / "set"), []
    first = load_images(
        str(home), load(folders, "sd15", home, tmp_path / "cache", lines), lines.append
    )
    assert sum("encoding" in line for line in lines) == 3  # prompts, captions, latents
    with monkeypatch.context() as m:
        m.setattr(SD15, "text_pipeline", None)  # would fail if they were asked
        m.setattr(latents_module, "read_images", None)
        lines.clear()
        model = load(folders, "sd15", home, tmp_path / "cache", lines)
        again = load_images(str(home), model, lines.append)
        assert sum("read from" in line for line in lines) == 3
        assert torch.equal(first.batch(3, 4)[0], again.batch(3, 4)[0]) and torch.equal(
            first.batch(3, 4)[1], again.batch(3, 4)[1]
        )
    half = next((tmp_path / "cache").glob("set-latents-*/00000.safetensors"))
    whole = half.read_bytes()
    half.write_bytes(whole[:100])
    with pytest.raises(UserError, match="--cache-prompts .*delete it to encode again"):
        load_images(str(home), model, lines.append)
    half.write_bytes(whole)
    (home / "4.txt").write_text("another caption")  # new embeddings, old latents
    picture(home / "5.png", mode="RGB", color=(1, 2, 3))
    (home / "5.txt").write_text("new")
    lines.clear()
    more = load_images(
        str(home), load(folders, "sd15", home, tmp_path / "cache", lines), lines.append
    )
    assert [("encoding" in line) for line in lines[:3]] == [False, True, True] and len(more) == 6
    os.utime(home / "2.jpg", ns=(1, 1))
    load_images(str(home), load(folders, "sd15", home, tmp_path / "cache"), lines.append)
    assert len(list((tmp_path / "cache").glob("set-latents-*"))) == 3


def test_bombs_and_nothing_else(folders, tmp_path, monkeypatch):  # noqa: F811
    home = tmp_path / "set"
    picture(home / "x.png", (60, 60), (1, 2, 3), "RGB")
    (home / "x.txt").write_text("bomb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    lines, model = [], load(folders, "sd15", home, tmp_path / "cache")
    with pytest.raises(UserError, match="expected images .* found none readable .1 skipped."):
        load_images(str(home), model, lines.append)
    assert any("DecompressionBomb" in line for line in lines)


def test_an_interrupted_encoding_goes_on(folders, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(latents_module, "SHARD", 2)
    home = fill(tmp_path / "set")
    model, asked = load(folders, "sd15", home, tmp_path / "cache"), []
    real, count = model.encode_images, lambda x: (asked.append(len(x)), real(x))[1]
    model.encode_images = count
    whole = load_images(str(home), model, lambda *a: None)
    next((tmp_path / "cache").glob("set-latents-*/00001.safetensors")).unlink()
    asked.clear()
    again = load_images(str(home), model, lambda *a: None)
    assert asked == [2] and torch.equal(
        whole.images[torch.arange(5)], again.images[torch.arange(5)]
    )


def test_a_teacher_without_images(folders, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="ships no images; give a folder of images with captions"):
        load_images(None, load(folders, "sd15", None, tmp_path / "cache"))
    video = load(folders, "sd15", fill(tmp_path / "set", 1), tmp_path / "cache")
    video.shape = (4, 3, 8, 8)
    with pytest.raises(UserError, match="expected a teacher of images, found one of videos"):
        load_images(str(tmp_path / "set"), video)


def test_embeddings_of_other_lengths():
    """Encoders that do not pad to a fixed length: captions longer than the prompts, and a null that fits both."""
    table = PromptEmbeddings(
        [dict(text=torch.ones(3, 4, 2), pooled=torch.ones(3, 5))],
        dict(text=torch.ones(1, 2, 2), pooled=torch.zeros(1, 5)),
    )
    first = table.append(
        PromptEmbeddings(
            [dict(text=torch.full((2, 6, 2), 7.0), pooled=torch.full((2, 5), 7.0))],
            dict(text=torch.ones(1, 6, 2), pooled=torch.zeros(1, 5)),
        )
    )
    rows = table.rows(torch.tensor([2, first + 1]), "cpu")
    assert (
        rows["text"].shape == (2, 6, 2)
        and rows["text"][:, :, 0].sum(1).tolist() == [4, 42]
        and rows["pooled"].tolist() == [[1.0] * 5, [7.0] * 5]
    )
    assert table.nulls(3, "cpu")["text"].shape == (3, 6, 2)


def test_rows_of_two_tables(monkeypatch):
    monkeypatch.setattr(prompts_module, "SHARD", 2)
    part = lambda *values: dict(pooled=torch.tensor(values)[:, None])
    table = PromptEmbeddings([part(0, 1), part(2)], part(9))
    first = table.append(PromptEmbeddings([part(10, 11), part(12)], part(9)))
    assert table.rows(torch.tensor([0, 2, first, first + 1, first + 2]), "cpu")[
        "pooled"
    ].flatten().tolist() == [0, 2, 10, 11, 12]


def test_shards():
    whole = torch.arange(12.0).view(6, 2)
    s = Shards([whole[:1], whole[1:1], whole[1:5], whole[5:]])
    index = torch.tensor([5, 0, 3, 3])
    assert (
        len(s) == 6
        and torch.equal(s[index], whole[index])
        and torch.equal(s[torch.arange(6) % 2 == 1], whole[1::2])
    )
    assert s[torch.zeros(6, dtype=torch.bool)].shape == (0, 2)


def test_parts():
    """msd's students share the classes; captions are dealt out."""
    images = Images(torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2]), ["a", "b", "c"])
    assert images.part(torch.tensor([0, 2]), 0, 2).images.tolist() == [0, 2, 3, 5]
    captioned = Images(torch.arange(5), torch.arange(5) + 1024, [])
    assert [captioned.part(None, k, 2).images.tolist() for k in range(2)] == [[0, 2, 4], [1, 3]]


# ---- scripts ------------------------------------------------------------------------------------------------------------------------------


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
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
    slow("dmd2", "sdxl", ["--sim", "data", "--nfe", 2, "--cfg", 2]),
]


@pytest.mark.parametrize("method, name, flags", RUNS)
def test_script(method, name, flags, folders, scripts, tmp_path):  # noqa: F811
    scripts.load(*pipelines.MODULES)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS * 3))
    args = [
        "--teacher",
        folders(name),
        "--prompts",
        tmp_path / "prompts.txt",
        "--cache-prompts",
        tmp_path / "cache",
        "--data",
        fill(tmp_path / "set"),
        "--batch",
        4,
        "--lr",
        1e-4,
        "--warmup",
        0,
        *flags,
    ]
    p = scripts.run(f"{method}.py", *args, "--smoke", "--out", tmp_path / "run")
    assert (
        p.out.count("encoding") == 3
        and "5 images, with captions, 0 skipped" in p.out
        and "Traceback" not in p.err
    )
    values = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert len(values) >= 3 and all(v["skipped"] == 0 for v in values)
    info = json.loads((tmp_path / "run" / "student" / "distill.json").read_text())
    teacher = load_pipeline(
        str(folders(name)),
        prompts=str(tmp_path / "prompts.txt"),
        cache=tmp_path / "cache",
        say=lambda *a: None,
    )
    student = load_model(tmp_path / "run" / "student", info["model"], teacher)
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters()))
    again = scripts.run(f"{method}.py", *args, "--smoke", "--overwrite", "--out", tmp_path / "run")
    assert again.out.count("read from") == 3 and "encoding" not in again.out


@pytest.mark.slow
def test_two_processes_are_one(folders, tmp_path):  # noqa: F811
    """Each encodes its share of the latents; three iterations of both equal those of one."""
    import subprocess
    import sys

    fill(tmp_path / "set")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    logs = []
    for n in (1, 2):
        args = [
            "--teacher",
            folders("sd15"),
            "--prompts",
            tmp_path / "prompts.txt",
            "--cache-prompts",
            tmp_path / f"cache-{n}",
            "--data",
            tmp_path / "set",
            "--batch",
            4,
            "--gan",
            "--nfe",
            1,
            "--lr",
            1e-3,
            "--warmup",
            0,
            "--smoke",
            "--out",
            tmp_path / f"run-{n}",
        ]
        subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={n}",
                "dmd2.py",
                *map(str, args),
            ],
            check=True,
            cwd=ROOT,
            env=dict(os.environ, OMP_NUM_THREADS="1"),
        )
        logs.append(
            [
                json.loads(line)
                for line in (tmp_path / f"run-{n}" / "log.jsonl").read_text().splitlines()
            ]
        )
    for a, b in zip(*logs):
        for key in ("gen", "cls", "fake", "dm"):
            assert key not in a or a[key] == pytest.approx(b[key], rel=1e-4), key

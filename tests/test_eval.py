"""eval.py: numbers that do not depend on batch or processes, honest names, mistakes in one line."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import scorers
from PIL import Image
from safetensors.torch import save_file

import eval as script
from common import fid, metrics, schedules
from common.distributed import gather_rows
from common.errors import UserError
from common.features import ClassifierExtractor, SmallCNN
from common.files import ROOT
from common.rng import PerImageNoise
from common.sampling import generate, teacher_sample
from common.teachers.dit import DiT
from common.teachers.load import load_teacher
from data import images as data
from tools import inception as inception_module
from tools import rows as rows_module
from tools.inception import INCEPTION_SHA256, InceptionExtractor, resize_tf1
from tools.measure import alikeness
from tools.rows import Row, best_row, load_student, student_row

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def make_dit(seed):
    """A tiny DiT whose output depends on labels and times: diffusers starts some weights at 0."""
    torch.manual_seed(seed)
    config = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=28,
        patch_size=7,
        num_embeds_ada_norm=10,
        activation_fn="linear-silu",
    )
    model = DiT(DiT.network(config), schedules.Flow(), "flow", (1, 28, 28), 10)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """teacher/ (tiny DiT with its classifier), dmd2-digits/, dmd2-toy/ and toy-cond/ (students),
    A/ and B/ (PNG folders of 60 and 90 digits)."""
    home = tmp_path_factory.mktemp("eval")
    digits = data.load_npz(ROOT / "assets" / "mnist" / "images.npz")
    digits = data.Images(digits.images[::25], digits.labels[::25], digits.names)  # 200
    make_teacher(home / "teacher", digits)
    info = dict(method="dmd2", nfe=2, cfg=1.5, sampler=dict(steps="999,400"))
    make_dit(2).save(home / "dmd2-digits" / "student", dict(info, teacher=str(home / "teacher")))
    toy = load_teacher("toy").copy()
    toy.save(home / "dmd2-toy" / "student", dict(info, teacher="toy"))
    toy.labelled = True
    toy.save(home / "toy-cond" / "student", dict(info, teacher="toy-cond"))
    for name, part in dict(A=range(60), B=range(60, 150)).items():
        (home / name).mkdir()
        for i in part:
            Image.fromarray(digits.images[i, 0].numpy()).save(home / name / f"{i:06d}.png")
    return home


def make_teacher(folder, digits):
    folder.mkdir()
    images, labels = digits.images[:, 0].numpy(), digits.labels.numpy()
    np.savez(folder / "images.npz", images=images, labels=labels)
    torch.manual_seed(0)
    classifier = SmallCNN().eval()
    save_file(classifier.state_dict(), folder / "classifier.safetensors")
    stats = fid.Stats(64)
    with torch.no_grad():
        stats.update(classifier(digits.images)[0])
    fid.save_stats(folder / "stats.npz", *stats.mean_cov(), stats.n, "tiny-cnn")
    evaluation = dict(
        protocol="tiny-cnn",
        classifier="classifier.safetensors",
        reference="stats.npz",
        images="images.npz",
        names=digits.names,
    )
    make_dit(1).save(folder, dict(name="tiny", evaluation=evaluation), "teacher.json")


@pytest.fixture
def run(home, tmp_path, capsys):
    """run(*flags) -> the JSON object of the last line; .text is all that was printed."""

    def go(*flags):
        capsys.readouterr()
        script.main([*map(str, flags), "--out", str(tmp_path / "eval.jsonl"), "--device", "cpu"])
        go.text = capsys.readouterr().out
        return json.loads(go.text.splitlines()[-1])

    return go


def pictures(folder):
    """The PNG files 000000.png, ... of a folder as one int array."""
    files = sorted(Path(folder).glob("*.png"))
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(len(files))]
    return np.stack([np.array(Image.open(f)) for f in files]).astype(int)


def assert_nearly_equal(a, b):
    """Grey levels: another order of float sums may move some across a rounding border."""
    assert abs(a - b).max() <= 1
    assert (a != b).mean() < 1e-3


def same(a, b, tolerance):
    """All metrics of two results agree."""
    for key in set(metrics.METRICS) & (set(a) | set(b)):
        assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key


# ---- the same numbers, however they are computed -------------------------------------------------


def as_rank(rank, port, flags, out):
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    with open(f"{out}.{rank}", "w") as f, contextlib.redirect_stdout(f):
        script.main(flags)
    torch.distributed.destroy_process_group()


def with_torchrun(flags):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, "eval.py", *flags]
    p = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert p.returncode == 0, p.stderr
    return p.stdout


def two_processes(torchrun, out, *flags):
    """Standard output of eval.py on two processes: torchrun, or forks, which start faster."""
    flags = [*map(str, flags), "--device", "cpu", "--out", f"{out}.jsonl"]
    if torchrun:
        return with_torchrun(flags)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=as_rank, args=(rank, port, flags, out)) for rank in range(2)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join()
    assert [p.exitcode for p in ranks] == [0, 0]
    assert Path(f"{out}.1").read_text() == ""  # rank 0 alone prints
    return Path(f"{out}.0").read_text()


def last_line(text):
    return json.loads(text.splitlines()[-1])


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_equal_one(home, run, tmp_path, torchrun):
    flags = ["--samples", 45, "--batch", 16, "--seed", 3]  # not --n: torchrun takes it for its own
    digits, toy = run(home / "dmd2-digits", *flags), run(home / "dmd2-toy", *flags)
    runs = (home / "dmd2-digits", home / "dmd2-toy")
    out = two_processes(torchrun, tmp_path / "two", *runs, *flags)
    assert out.count('{"results"') == 1
    two = last_line(out)["results"]
    assert [r["world"] for r in two] == [2, 2]
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) == 2
    same(two[0], digits, 1e-6)
    same(two[1], toy, 1e-6)
    assert two[0]["distinct"] == digits["distinct"] == 45


def turned_file(image, path):
    """The image is stored turned back, with the EXIF orientation that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


FORMATS = {  # suffix, function (image, path) that writes a grey image
    "8 bits": (".png", lambda image, path: image.save(path)),
    "16 bits": (
        ".png",
        lambda image, path: Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(path),
    ),
    "tiff": (
        ".tif",
        lambda image, path: Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(path),
    ),
    "palette": (".png", lambda image, path: image.convert("P").save(path)),
    "gif": (".gif", lambda image, path: image.save(path)),
    "rgb": (".png", lambda image, path: image.convert("RGB").save(path)),
    "rgba": (".png", lambda image, path: image.convert("RGBA").save(path)),
    "turned": (".png", turned_file),
    "bmp": (".bmp", lambda image, path: image.save(path)),
    "webp": (".webp", lambda image, path: image.save(path, lossless=True)),
    "jpeg": (".jpg", lambda image, path: image.save(path, quality=100)),
}


def test_fd_does_not_depend_on_the_format(run, tmp_path):
    """The same 200 digits in eleven formats. JPEG of quality 100 is off by rounding."""
    digits = data.load_npz(ROOT / "assets" / "mnist" / "images.npz").images[::25, 0].numpy()
    found = {}
    for name, (suffix, write) in FORMATS.items():
        folder = tmp_path / name
        folder.mkdir()
        for i, pixels in enumerate(digits):
            write(Image.fromarray(pixels), folder / f"{i:03d}{suffix}")
        found[name] = run("--images", folder, "--teacher", "mnist")["fd"]
        converted = {"turned": "turned by EXIF orientation", "16 bits": "reduced from 16 bits"}
        assert converted.get(name, "") in run.text
    exact = found.pop("8 bits")
    assert abs(found.pop("jpeg") - exact) < 0.01 * exact
    assert found == dict.fromkeys(found, exact)


def test_notes_of_two_processes_are_added(home, run, tmp_path):
    for name in "AB":
        (tmp_path / name).mkdir()
        for path in sorted((home / name).iterdir())[:12]:
            with Image.open(path) as image:
                turned_file(image, tmp_path / name / path.name)
    flags = ["--images", tmp_path / "A", "--ref-images", tmp_path / "B"]
    flags += ["--teacher", home / "teacher"]
    result = two_processes(False, tmp_path / "two", *flags)
    assert "--images: 12 images; turned by EXIF orientation: 12" in result
    assert "--ref-images: 12 images; turned by EXIF orientation: 12" in result


def test_folders_on_two_processes(home, run, tmp_path):
    flags = ["--images", home / "A", "--ref-images", home / "B", "--teacher", home / "teacher"]
    two = last_line(two_processes(False, tmp_path / "two", *flags))
    same(two, run(*flags), 1e-6)


def test_scores_on_two_processes(home, run, tmp_path):
    """61 images and 3 prompts: the processes have other images and other numbers of them."""
    (tmp_path / "clip").mkdir()
    scorers.clip_model(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    flags = ["--images", home / "B", "--n", 61, "--prompts", tmp_path / "prompts.txt"]
    flags += ["--clip", tmp_path / "clip", "--batch", 7]
    two = last_line(two_processes(False, tmp_path / "two", *flags))
    same(two, run(*flags), 1e-6)
    assert "clip_score" in two


def test_pictures_on_two_processes(home, run, tmp_path):
    flags = [home / "dmd2-digits", "--n", 21, "--latency", "--batch", 8]
    flags += ["--grid", tmp_path / "grid.png", "--save-images"]
    run(*flags, tmp_path / "png1")
    two_processes(False, tmp_path / "two", *flags, tmp_path / "png2")
    a, b = pictures(tmp_path / "png1"), pictures(tmp_path / "png2")
    assert len(a) == 21
    assert_nearly_equal(a, b)


def test_gather_restores_the_order(monkeypatch):
    rows = torch.arange(7)[:, None] * torch.ones(1, 2)
    parts_of_ranks = [rows[rank::3] for rank in range(3)]

    def all_gather(parts, padded):  # what the other ranks would send
        for part, x in zip(parts, parts_of_ranks):
            part.copy_(torch.cat([x, x.new_zeros(len(part) - len(x), 2)]))

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    for rank in range(3):
        assert torch.equal(gather_rows(parts_of_ranks[rank], 7, rank, 3), rows)


def test_batch_size_does_not_change_samples(home, run, tmp_path):
    results = []
    for batch in (30, 7):
        flags = ["--n", 30, "--batch", batch, "--save-images", tmp_path / str(batch)]
        results.append(run(home / "dmd2-digits", *flags))
    same(*results, 1e-3)
    a, b = pictures(tmp_path / "30"), pictures(tmp_path / "7")
    assert len(a) == 30
    assert_nearly_equal(a, b)
    assert abs(a[0] - a[10]).mean() > 1  # same label, other noise


def test_seeds(home, run):
    r = run(home / "dmd2-digits", "--n", 16, "--seed", 5, "--seeds", 3)
    assert r["seeds"] == [5, 6, 7]
    assert "seed=5-7" in r["protocol"]
    for key in ("fd", "kid"):
        assert len(set(r["all"][key])) == 3
        assert r["min"][key] == min(r["all"][key])
        assert r[key] == pytest.approx(np.mean(r["all"][key]))
    alone = run(home / "dmd2-digits", "--n", 16, "--seed", 6)
    assert alone["fd"] == r["all"]["fd"][1]


# ---- similarity ----------------------------------------------------------------------------------


@pytest.fixture
def extractor(home):
    return ClassifierExtractor(load_teacher(str(home / "teacher")))


def noise_plus_label(model, z, cond, noise):
    return z + cond["labels"].view(-1, 1, 1, 1)


def test_similarity_is_the_mean_over_pairs(extractor):
    model = make_dit(2)
    found = alikeness(noise_plus_label, model, extractor, 3, seed=5, batch=7)["similarity"]
    pairs = []
    for label in range(8):
        features = []
        for k in range(3):
            z = PerImageNoise(5, [8 * k + label])(1, 28, 28)
            features.append(extractor(model.decode(z + label))[0][0])
        for i, j in ((0, 1), (0, 2), (1, 2)):
            pairs.append(torch.cosine_similarity(features[i], features[j], dim=0).item())
    assert found == pytest.approx(sum(pairs) / 24, abs=1e-6)
    assert max(pairs) - min(pairs) > 1e-3


def test_similarity_of_equal_images_is_one(extractor):
    sampler = lambda *inputs: 0 * noise_plus_label(*inputs)
    found = alikeness(sampler, make_dit(2), extractor, 3)
    assert found["similarity"] == pytest.approx(1, abs=1e-6)
    assert found["vendi"] == pytest.approx(1, abs=1e-4)


def test_similarity_does_not_depend_on_batch_or_processes(home, run, tmp_path):
    flags = [home / "dmd2-digits", "--samples", 16, "--per-prompt", 4]
    one = run(*flags)["similarity"]
    assert 0 < one < 1
    assert run(*flags, "--batch", 5)["similarity"] == pytest.approx(one, abs=1e-6)
    two = last_line(two_processes(False, tmp_path / "two", *flags))
    assert two["similarity"] == pytest.approx(one, abs=1e-6)


# ---- what is counted and named -------------------------------------------------------------------


def test_script_and_last_line(home, tmp_path, scripts):
    out = tmp_path / "new" / "eval.jsonl"
    p = scripts.run("eval.py", home / "dmd2-toy", "--n", 64, "--nfe", "1,2", "--out", out)
    results = last_line(p.out)["results"]
    assert results == [json.loads(line) for line in out.read_text().splitlines()]
    for nfe, r in zip((1, 2), results):
        assert (r["method"], r["n"], r["seeds"], r["distinct"]) == ("dmd2", 64, [0], 64)
        assert r["nfe"] == r["passes"] == nfe


@pytest.mark.parametrize(
    "key",
    "energy_distance sliced_wasserstein mode_min protocol hardware threads weights torch date "
    "seconds cfg dtype revision images_per_s world".split(),
)
def test_a_result_has(home, run, key):
    assert run(home / "dmd2-toy", "--n", 64)[key] is not None


def test_teacher_rows(home, run):
    rows = run("--teacher", home / "teacher", "--nfe", "1,3", "--cfg", "1,2", "--n", 8)["results"]
    found = [(r["nfe"], r["cfg"], r["passes"]) for r in rows]
    assert found == [(1, 1, 1), (1, 2, 2), (3, 1, 3), (3, 2, 6)]
    assert len({r["fd"] for r in rows}) == 4
    assert "fid" not in rows[0]
    assert rows[0]["protocol"].startswith("fd tiny-cnn")


@pytest.mark.parametrize("teacher, flags, passes", [("teacher", ["--heun"], 10), ("toy", [], 6)])
def test_passes_of_a_teacher(home, run, teacher, flags, passes):
    """Three guided steps. The exact teacher of the toy has no network; its calls are counted."""
    name = home / "teacher" if teacher == "teacher" else "toy-cond"
    flags = ["--teacher", name, "--nfe", 3, "--cfg", 2, "--n", 8, *flags]
    assert run(*flags)["passes"] == passes


def test_steps_of_another_nfe_are_dropped(home):
    loaded = load_student(home / "dmd2-digits", script.parse_args([str(home)]), {})
    calls = []

    def sample(model, z, cond, nfe, noise, **sampler):
        calls.append((nfe, sampler))

    student = dataclasses.replace(loaded, sample=sample)
    for nfe in (2, 4):
        student_row(student, nfe).sampler(None, None, None, None)
    assert calls == [(2, dict(steps="999,400")), (4, {})]


def test_labelled_toy(home):
    args = script.parse_args([str(home)])
    assert load_student(home / "toy-cond", args, {}).model.labelled
    assert not load_student(home / "dmd2-toy", args, {}).model.labelled


def test_latency(home, run):
    r = run(home / "dmd2-digits", "--n", 8, "--batch", 4, "--latency")["latency"]
    assert set(r) == {"1", "4"}
    for times in r.values():
        assert times["ms_per_image"] * times["images_per_s"] == pytest.approx(1000, rel=0.01)


def test_grid(home, run, tmp_path):
    run(home / "dmd2-toy", "--n", 8, "--grid", tmp_path / "g.png")
    assert (tmp_path / "g.png").stat().st_size > 500


# ---- comparison of images (of points: test_compare.py) -------------------------------------------


def test_compare(home, run, tmp_path):
    runs = (home / "dmd2-digits", home / "dmd2-digits" / "student")
    flags = ["--compare", "--teacher-nfe", "1,2", "--n", 20, "--batch", 20]
    rows = run(*runs, *flags)["results"]
    assert [r["name"] for r in rows] == ["teacher teacher"] * 2 + ["dmd2-digits"] * 2
    assert [r["cfg"] for r in rows] == [1.5] * 4
    assert rows[2]["fd"] == rows[3]["fd"]
    lines = [line for line in run.text.splitlines() if line.startswith("|")]
    assert len(lines) == 6
    assert " fd " in lines[0]
    assert "FID" not in lines[0]
    sheet = Image.open(tmp_path / "compare.png")
    assert sheet.height == 4 * 58 - 2 + 2 * 12  # four rows of 28 pixels, doubled
    assert sheet.width > 20 * 58  # 20 digits, captions on their left
    names = {path.name for path in tmp_path.glob("compare*")}
    assert names == {"compare.png", "compare.md", "compare.json"}  # no log, so no curves


def test_each_guidance_scale_has_its_own_target(home, run, tmp_path):
    flags = ["--compare", "--n", 70, "--batch", 30, "--teacher-nfe", "3,1", "--cfg", "1.5,2"]
    run(home / "dmd2-digits", *flags)
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [(r["method"], r["nfe"], r["cfg"]) for r in rows] == [
        ("teacher", 3, 1.5),
        ("teacher", 3, 2),
        ("teacher", 1, 1.5),
        ("teacher", 1, 2),
        ("dmd2", 2, 1.5),
    ]
    assert [r["to_teacher"] == 0 for r in rows] == [True, True, False, False, False]
    teacher = load_teacher(str(home / "teacher"))
    samples = {}
    for nfe in (1, 3):
        sampler = lambda m, z, c, noise: teacher_sample(m, z, c, nfe, 1.5)
        parts = [x for _, _, x in generate(sampler, teacher, 70)]
        samples[nfe] = torch.cat(parts).clamp(-1, 1)
    expected = (samples[1] - samples[3]).square().mean().item()
    assert rows[2]["to_teacher"] == pytest.approx(expected, rel=0.02)  # grey levels are rounded


# ---- best of n -----------------------------------------------------------------------------------


def test_best_of(home, run):
    """Three previews of two steps, then two guided steps of the teacher."""
    flags = ["--best-of", 3, "--teacher-nfe", 2, "--n", 20, "--batch", 9]
    plain, best = run(home / "dmd2-digits", *flags)["results"]
    assert plain["name"] == "dmd2-digits"
    assert plain["passes"] == 2
    assert best["name"] == "teacher best-of-3 dmd2-digits"
    assert (best["best_of"], best["verifier"]) == (3, "classifier")
    assert (best["nfe"], best["cfg"]) == (2, 1.5)
    assert best["passes"] == 3 * 2 + 2 * 2


def brightness(images):
    """A verifier: even labels want bright images, odd labels dark ones."""
    signs = torch.tensor([1.0, -1.0] * 5)
    return (images.float().flatten(1).mean(1, keepdim=True) - 128) / 9 * signs


def test_best_of_gives_the_teacher_the_best_noise(monkeypatch):
    """The student's image is minus the noise, the teacher's is the noise."""

    class Verifier:
        classes = staticmethod(lambda labels: labels)

        def __call__(self, images):
            return None, brightness(images)

    monkeypatch.setattr(rows_module, "ClassifierExtractor", lambda teacher: Verifier())
    monkeypatch.setattr(rows_module, "teacher_sample", lambda teacher, z, *a: z)
    teacher = make_dit(1)
    sampler = lambda m, z, c, noise: -z
    plain = Row(teacher.copy(), teacher, sampler, "s", dict(name="s"), None)
    row = best_row(plain, 4, 2, 1.0, False)
    noise = PerImageNoise(0, range(6))
    candidates = torch.stack([noise(1, 28, 28) for _ in range(4)])  # [4, 6, 1, 28, 28]
    ((_, labels, best),) = generate(row.sampler, row.model, 6)
    assert labels.tolist() == list(range(6))
    pixels = teacher.decode(-candidates.flatten(0, 1)).float().mean((1, 2, 3)).view(4, 6)
    wanted = (pixels * torch.tensor([1.0, -1.0] * 3)).argmax(0)
    assert torch.equal(best, candidates[wanted, torch.arange(6)])
    parts = [x for _, _, x in generate(row.sampler, row.model, 6, batch=4)]
    assert torch.equal(torch.cat(parts), best)


# ---- folders and FID -----------------------------------------------------------------------------


def test_two_folders(home, run):
    flags = ["--images", home / "A", "--teacher", home / "teacher", "--ref-images"]
    other, itself = run(*flags, home / "B"), run(*flags, home / "A")
    assert other["n"] == 60
    assert other["images"] == str(home / "A")
    assert other["protocol"].startswith("fd tiny-cnn")
    assert "ref=B:90" in other["protocol"]
    assert itself["fd"] < 1e-6 < other["fd"]
    assert itself["precision"] == itself["recall"] == itself["coverage"] == 1
    assert other["precision"] < 1


def test_the_first_images_of_a_folder(home, run):
    flags = ["--images", home / "A", "--teacher", home / "teacher"]
    assert run(*flags, "--n", 20)["n"] == 20


def test_saved_images_give_the_same_numbers(home, run, tmp_path):
    direct = run(home / "dmd2-digits", "--n", 24, "--save-images", tmp_path / "png")
    again = run("--images", tmp_path / "png", "--teacher", home / "teacher")
    del direct["agreement"]  # files have no labels
    same(direct, again, 1e-6)


def test_folders_of_several_rows_and_seeds(home, run, tmp_path):
    flags = ["--nfe", "1,2", "--n", 8, "--seeds", 2, "--save-images", tmp_path]
    run(home / "dmd2-digits", *flags, "--out", tmp_path.parent / "eval.jsonl")
    assert len(list(tmp_path.glob("0?-dmd2-digits-nfe?/seed?/00000?.png"))) == 32


@pytest.fixture
def inception(monkeypatch):
    """The real network takes seconds per image; its loading and features: test_fid.py."""
    digest = [INCEPTION_SHA256]
    mix = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    net = lambda images, resize: (resize_tf1(images, 8).mean(1).flatten(1) @ mix, None)
    monkeypatch.setattr(InceptionExtractor, "dims", 32)
    monkeypatch.setattr(inception_module, "load_inception", lambda *args: (net, digest[0]))
    return digest


def test_fid_of_folders(home, run, inception):
    r = run("--images", home / "A", "--ref-images", home / "B", "--inception", "w")
    assert r["protocol"] == "fid60 inception-tf1resize uint8 ref=B:90 n=60 images=A"
    assert r["fid"] > 0
    assert "fd" not in r
    assert "kid" in r


def test_fid_of_stored_pixels(home, run, inception, tmp_path):
    """--as-stored reads as pytorch-fid does, and the protocol says so."""
    folder = tmp_path / "turned"
    folder.mkdir()
    for path in (home / "A").iterdir():
        with Image.open(path) as image:
            turned_file(image, folder / path.name)
    flags = ["--ref-images", home / "B", "--inception", "w"]
    plain = run("--images", home / "A", *flags)
    shown = run("--images", folder, *flags)
    assert shown["fid"] == plain["fid"]
    assert "turned by EXIF orientation: 60" in run.text
    assert "--as-stored reads as it does" in run.text
    stored = run("--images", folder, *flags, "--as-stored")
    assert stored["fid"] != plain["fid"]
    assert "EXIF" not in run.text
    assert "inception-tf1resize-as-stored uint8" in stored["protocol"]
    # nothing to convert: equal
    assert run("--images", home / "A", *flags, "--as-stored")["fid"] == plain["fid"]


def test_fid_against_statistics(home, run, tmp_path, inception):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(32), sigma=np.eye(32))
    flags = ["--ref", tmp_path / "edm.npz", "--inception", "w", "--resize", "clean"]
    r = run(home / "dmd2-digits", *flags, "--n", 8, "--seed", 4)
    assert r["protocol"] == "fid8 inception-cleanresize uint8 ref=edm.npz n=8 seed=4"
    assert not {"kid", "precision", "agreement"} & set(r)
    assert "singular" in run.text


def test_other_weights_are_not_called_fid(home, run, inception):
    inception[0] = "00000000"
    flags = ["--inception", "w", "--force-inception"]
    r = run("--images", home / "A", "--ref-images", home / "B", *flags)
    assert "fid" not in r
    assert r["fd"] > 0
    assert "00000000" in r["protocol"]


# ---- mistakes: one line, before the first sample -------------------------------------------------


def spoil(home, tmp_path, text=None, **changes):
    """A copy of the digits student with another distill.json; text: the whole file."""
    folder = Path(shutil.copytree(home / "dmd2-digits", tmp_path / "bad"))
    path = folder / "student" / "distill.json"
    info = json.loads(path.read_text()) | changes
    path.write_text(text or json.dumps({k: v for k, v in info.items() if v is not None}))
    return folder


class Evil:
    """Unpickling it creates the file `marker`."""

    def __reduce__(self):
        return open, ("marker", "w")


@pytest.fixture
def workplace(home, tmp_path, monkeypatch):
    """The folders of `home`, good and bad files, as the current directory."""
    for name in ("A", "B", "teacher", "dmd2-digits", "dmd2-toy"):
        (tmp_path / name).symlink_to(home / name)
    for name in ("empty", "large", "torn"):
        (tmp_path / name).mkdir()
    for i in range(8):
        Image.new("L", (32, 32)).save(tmp_path / "large" / f"{i}.png")
        (tmp_path / "torn" / f"{i}.png").write_bytes(b"no image")
    np.savez(tmp_path / "none.npz", mean=np.zeros(3))
    np.savez(tmp_path / "two.npz", mu=np.zeros(2), sigma=np.eye(2))
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", "expected the folder of a run"),
        ("nowhere", "found nothing"),
        ("A", "no student/distill.json"),
        ("teacher", "give it as --teacher"),
        ("dmd2-digits --nfe 0", "--nfe 0"),
        ("dmd2-digits --nfe 1,x", "--nfe 1,x"),
        ("dmd2-digits --nfe 1000", "--nfe 1000"),
        ("dmd2-digits --n 0", "--n:"),
        ("dmd2-digits --batch 0", "--batch"),
        ("dmd2-digits --seeds 0", "--seeds"),
        ("dmd2-digits --cfg 2", "--cfg, --heun and --negative-prompt are for teacher rows"),
        ("dmd2-digits --negative-prompt x", "--negative-prompt are for teacher rows"),
        ("--teacher teacher --negative-prompt x", "--negative-prompt: expected --cfg other than"),
        (
            "dmd2-digits --compare --negative-prompt x",
            "--negative-prompt: expected a teacher that is a pipeline of diffusers",
        ),
        ("--images A --teacher teacher --negative-prompt x", "--negative-prompt a model"),
        ("dmd2-digits --teacher-nfe 2", "--teacher-nfe: only with run folders"),
        ("--teacher toy --cfg nan", "--cfg nan"),
        ("--teacher toy --nfe 0", "--nfe 0"),
        ("--teacher tooy", "did you mean toy"),
        ("dmd2-digits --teacher toy", "expected a student of toy"),
        ("--teacher toy --compare", "--compare"),
        ("dmd2-digits dmd2-toy --compare", "students of one teacher"),
        ("dmd2-toy --save-images x", "points"),
        ("--teacher toy --n 30000", "20000"),
        ("--images A", "--inception FILE"),
        ("--images A --teacher toy", "points"),
        ("--images empty --teacher teacher", "found 0"),
        ("--images gone --teacher teacher", "found nothing"),
        ("--images A --teacher teacher --ref-images empty", "--ref-images"),
        ("--images A --teacher teacher --ref two.npz --ref-images B", "contradict"),
        ("--images A --teacher teacher --n 61", "at least 61"),
        ("--images large --teacher teacher", "28 x 28"),
        ("--images torn --teacher teacher", "not readable"),
        ("--images A --teacher teacher --ref none.npz", "no mu"),
        ("--images A --teacher teacher --ref two.npz", "64 features"),
        ("--images A dmd2-toy --teacher teacher", "--images"),
        ("--images A --nfe 2 --teacher teacher", "--nfe"),
        ("--images A --ref-images B --inception gone", "--inception"),
        ("--images A --ref-images B --inception evil.pth --force-inception", "--inception"),
        ("dmd2-digits --inception evil.pth", "reference"),
        ("dmd2-digits --resize clean", "--resize"),
        ("dmd2-digits --as-stored", "--as-stored"),
        ("dmd2-digits --save-images A", "empty folder"),
        ("dmd2-digits --grid A", "--grid"),
        ("--images A --teacher teacher --ref-images B --save-ref A", "--save-ref A: expected a"),
        ("--teacher teacher --best-of 4", "--best-of: expected folders of runs"),
        ("dmd2-digits --best-of 1", "--best-of: expected at least 2"),
        ("dmd2-toy --best-of 4", "--best-of: the verifier"),
        ("dmd2-digits --device tpu", "--device"),
        ("dmd2-digits --device cuda", "--device cuda"),
    ],
)
def test_mistakes(workplace, flags, expected):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError) as e:
        script.main([*flags.split(), "--out", "eval.jsonl"])
    assert expected in str(e.value)
    assert "\n" not in str(e.value)
    assert not (workplace / "marker").exists()  # nothing was executed
    assert not list(workplace.glob("*.jsonl"))  # nothing was measured


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(method="dmd3"), "did you mean dmd2"),
        (dict(method="os"), "expected its script os.py"),
        (dict(text="{"), "expected JSON"),
        (dict(text="[]"), "JSON object"),
        (dict(nfe=None), "nfe"),
        (dict(nfe=0), "nfe"),
        (dict(sampler=[]), "sampler"),
        (dict(sampler=dict(speed=2)), "does not fit"),
        (dict(model=3), "model"),
        (dict(teacher="gone"), "--teacher overrides"),
    ],
)
def test_bad_students(home, tmp_path, changes, expected):
    with pytest.raises(UserError) as e:
        script.main([str(spoil(home, tmp_path, **changes)), "--out", str(tmp_path / "eval.jsonl")])
    assert expected in str(e.value)


def test_teacher_overrides(home, run, tmp_path):
    folder = spoil(home, tmp_path, teacher="gone")
    teacher = str(home / "teacher")
    assert run(folder, "--teacher", teacher, "--n", 8)["teacher"] == teacher


def test_exit_code(scripts):
    p = scripts.run("eval.py", "out/none", "--n", "0", code=2)
    assert p.out == ""
    assert p.err == "eval.py: --n: expected at least 8, found 0\n"


@pytest.mark.parametrize("flags", ["--unknown", "--n x", "--resize pil"])
def test_flags(flags, capsys):
    with pytest.raises(SystemExit) as e:
        script.main(flags.split())
    assert e.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1

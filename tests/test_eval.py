"""eval.py: numbers that do not depend on batch or processes, honest names and labels, mistakes in one line."""

import contextlib
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
from PIL import Image
from safetensors.torch import save_file

import eval as script
from common import data, fid, metrics, schedules
from common.distributed import gather_rows
from common.errors import UserError
from common.features import ClassifierExtractor, SmallCNN
from common.files import ROOT
from common.rng import PerImageNoise
from common.sampling import generate, teacher_sample
from common.teachers.dit import DiT
from common.teachers.load import load_teacher
from tools import measure
from tools.inception import INCEPTION_SHA256, resize_tf1
from tools.measure import InceptionExtractor, similarity

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def make_dit(seed):
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
            p.add_(
                0.05 * torch.randn_like(p)
            )  # diffusers starts some weights at zero; here labels and times shall matter
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """teacher/ (tiny DiT with its classifier), dmd2-digits/, dmd2-toy/ and toy-cond/ (students), A/ and B/ (PNG folders of 60 and 90 digits)."""
    home = tmp_path_factory.mktemp("eval")
    digits = data.load_npz(ROOT / "assets" / "mnist" / "images.npz")
    digits = data.Images(digits.images[::25], digits.labels[::25], digits.names)  # 200
    (home / "teacher").mkdir()
    np.savez(
        home / "teacher" / "images.npz",
        images=digits.images[:, 0].numpy(),
        labels=digits.labels.numpy(),
    )
    torch.manual_seed(0)
    classifier = SmallCNN().eval()
    save_file(classifier.state_dict(), home / "teacher" / "classifier.safetensors")
    stats = fid.Stats(64)
    with torch.no_grad():
        stats.update(classifier(digits.images)[0])
    fid.save_stats(home / "teacher" / "stats.npz", *stats.mean_cov(), stats.n, "tiny-cnn")
    evaluation = dict(
        protocol="tiny-cnn",
        classifier="classifier.safetensors",
        reference="stats.npz",
        images="images.npz",
        names=digits.names,
    )
    make_dit(1).save(home / "teacher", dict(name="tiny", evaluation=evaluation), "teacher.json")
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
    files = sorted(Path(folder).glob("*.png"))
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(len(files))]
    return np.stack([np.array(Image.open(f)) for f in files]).astype(int)


def same(a, b, tolerance):
    for key in set(metrics.METRICS) & (set(a) | set(b)):
        assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key


# ---- the same numbers, however they are computed --------------------------------------------------------------------------------------------


def as_rank(rank, port, flags, out):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    with open(f"{out}.{rank}", "w") as f, contextlib.redirect_stdout(f):
        script.main(flags)
    torch.distributed.destroy_process_group()


def two_processes(torchrun, out, *flags):
    """Standard output of eval.py on two processes: real torchrun, or forks of this one, which spare the seconds of importing diffusers."""
    flags = [*map(str, flags), "--device", "cpu", "--out", f"{out}.jsonl"]
    if torchrun:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "eval.py",
            *flags,
        ]
        p = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
        assert p.returncode == 0, p.stderr
        return p.stdout
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [
        multiprocessing.get_context("fork").Process(target=as_rank, args=(r, port, flags, out))
        for r in range(2)
    ]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join()
    assert [p.exitcode for p in ranks] == [0, 0]
    assert Path(f"{out}.1").read_text() == ""  # rank 0 alone prints
    return Path(f"{out}.0").read_text()


def test_similarity(home, run, tmp_path):
    """The mean over pairs, one by one; the same for any batch and on two processes; 1 where noise changes nothing."""
    model, extractor = make_dit(2), ClassifierExtractor(load_teacher(str(home / "teacher")))
    sampler = lambda m, z, c, noise: z + c["labels"].view(-1, 1, 1, 1)
    found = similarity(sampler, model, extractor, 3, seed=5, batch=7)
    pairs = []
    for label in range(8):
        f = [
            extractor(model.decode(PerImageNoise(5, [8 * k + label], "cpu")(1, 28, 28) + label))[0][
                0
            ]
            for k in range(3)
        ]
        pairs += [
            torch.cosine_similarity(f[i], f[j], dim=0).item() for i, j in ((0, 1), (0, 2), (1, 2))
        ]
    assert found == pytest.approx(sum(pairs) / 24, abs=1e-6) and max(pairs) - min(pairs) > 1e-3
    assert similarity(
        lambda m, z, c, noise: 0 * sampler(m, z, c, noise), model, extractor, 3
    ) == pytest.approx(1, abs=1e-6)
    flags = [home / "dmd2-digits", "--samples", 16, "--per-prompt", 4]
    one = run(*flags)["similarity"]
    assert one == pytest.approx(run(*flags, "--batch", 5)["similarity"], abs=1e-6) and 0 < one < 1
    assert one == pytest.approx(
        json.loads(two_processes(False, tmp_path / "two", *flags).splitlines()[-1])["similarity"],
        abs=1e-6,
    )


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_equal_one(home, run, tmp_path, torchrun):
    flags = ["--samples", 45, "--batch", 16, "--seed", 3]  # not --n: torchrun takes it for its own
    digits, toy = run(home / "dmd2-digits", *flags), run(home / "dmd2-toy", *flags)
    out = two_processes(torchrun, tmp_path / "two", home / "dmd2-digits", home / "dmd2-toy", *flags)
    assert out.count('{"results"') == 1
    two = json.loads(out.splitlines()[-1])["results"]
    assert [r["world"] for r in two] == [2, 2] and len(
        (tmp_path / "two.jsonl").read_text().splitlines()
    ) == 2
    same(two[0], digits, 1e-6)
    same(two[1], toy, 1e-6)
    assert two[0]["distinct"] == digits["distinct"] == 45


def test_folders_and_pictures_on_two_processes(home, run, tmp_path):
    flags = ["--images", home / "A", "--ref-images", home / "B", "--teacher", home / "teacher"]
    same(
        json.loads(two_processes(False, tmp_path / "two", *flags).splitlines()[-1]),
        run(*flags),
        1e-6,
    )
    flags = [
        home / "dmd2-digits",
        "--n",
        21,
        "--latency",
        "--batch",
        8,
        "--grid",
        tmp_path / "grid.png",
        "--save-images",
    ]
    run(*flags, tmp_path / "png1")
    two_processes(False, tmp_path / "two", *flags, tmp_path / "png2")
    a, b = pictures(tmp_path / "png1"), pictures(tmp_path / "png2")
    assert len(a) == 21 and abs(a - b).max() <= 1 and (a != b).mean() < 1e-3


def test_gather_restores_the_order(monkeypatch):
    rows = torch.arange(7)[:, None] * torch.ones(1, 2)
    locals_ = [rows[r::3] for r in range(3)]

    def all_gather(parts, padded):  # what the other ranks would send
        for part, x in zip(parts, locals_):
            part.copy_(torch.cat([x, x.new_zeros(len(part) - len(x), 2)]))

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    for rank in range(3):
        assert torch.equal(gather_rows(locals_[rank], 7, rank, 3), rows)


def test_batch_size_does_not_change_samples(home, run, tmp_path):
    results = [
        run(home / "dmd2-digits", "--n", 30, "--batch", b, "--save-images", tmp_path / str(b))
        for b in (30, 7)
    ]
    a, b = pictures(tmp_path / "30"), pictures(tmp_path / "7")
    assert (
        len(a) == 30 and abs(a - b).max() <= 1 and (a != b).mean() < 1e-3
    )  # another order of float sums may cross a rounding border
    assert abs(a[0] - a[10]).mean() > 1  # same label, other noise
    same(*results, 1e-3)


def test_seeds(home, run):
    r = run(home / "dmd2-digits", "--n", 16, "--seed", 5, "--seeds", 3)
    assert r["seeds"] == [5, 6, 7] and "seed=5-7" in r["protocol"]
    for key in ("fd", "kid"):
        assert (
            len(set(r["all"][key])) == 3
            and r["min"][key] == min(r["all"][key])
            and r[key] == pytest.approx(np.mean(r["all"][key]))
        )
    assert (
        run(home / "dmd2-digits", "--n", 16, "--seed", 6)["fd"] == r["all"]["fd"][1]
    )  # a seed is a seed


def test_indices_labels_and_noise():
    toy = load_teacher("toy-cond")
    sampler = lambda m, z, c, noise: torch.cat([z, noise(), c["labels"][:, None].float()], 1)
    ((i, y, x),) = generate(sampler, toy, 6, seed=1, batch=10, rank=1, world=2)
    assert i.tolist() == [1, 3, 5] and y.tolist() == [1, 3, 5] and x[:, 4].tolist() == [1, 3, 5]
    noise = PerImageNoise(1, [3])
    assert torch.equal(
        x[1, :4], torch.cat([noise(2)[0], noise(2)[0]])
    )  # image 3 alone has the same noise, first and later draw
    i, y, x = list(generate(sampler, toy, 40, seed=1, batch=9))[3]
    assert y.tolist() == [k % 8 for k in range(27, 36)] == x[:, 4].tolist()


class Oracle(ClassifierExtractor):
    """A classifier that reads the label which the sampler below wrote into the first pixel."""

    def __call__(self, images):
        return super().__call__(images)[0], torch.nn.functional.one_hot(
            images[:, 0, 0, 0].long(), 10
        ).float()


def test_agreement_and_distinct(home):
    teacher = load_teacher(str(home / "teacher"))

    def sampler(model, z, cond, noise):
        x = teacher.encode_images(
            torch.randint(
                0, 255, z.shape, generator=torch.Generator().manual_seed(int(cond["labels"][0]))
            )
        )
        x[:, 0, 0, 0] = (cond["labels"] - 127.5) / 127.5  # decoded to the label itself
        return x

    r = metrics.evaluate(sampler, teacher, teacher, 30, batch=10, extractor=Oracle(teacher))
    assert (
        r["agreement"] == 1.0 and r["distinct"] == 10
    )  # three batches with the same noise: the mistake of a seed that is equal everywhere
    r = metrics.evaluate(lambda m, z, c, noise: z * float("nan"), teacher, teacher, 10)
    assert r["nonfinite"] == 10 and r["distinct"] == 1


# ---- what is counted and named --------------------------------------------------------------------------------------------------------------


def test_script_and_last_line(home, tmp_path, scripts):
    out = tmp_path / "new" / "eval.jsonl"
    p = scripts.run("eval.py", home / "dmd2-toy", "--n", 64, "--nfe", "1,2", "--out", out)
    results = json.loads(p.out.splitlines()[-1])["results"]
    assert results == [json.loads(line) for line in out.read_text().splitlines()]
    assert [
        (r["method"], r["nfe"], r["passes"], r["n"], r["seeds"], r["distinct"]) for r in results
    ] == [("dmd2", 1, 1, 64, [0], 64), ("dmd2", 2, 2, 64, [0], 64)]
    for key in (
        "energy_distance",
        "sliced_wasserstein",
        "mode_min",
        "protocol",
        "hardware",
        "threads",
        "weights",
        "torch",
        "date",
        "seconds",
        "cfg",
        "dtype",
    ):
        assert results[0][key] is not None, key


def test_teacher_rows_and_passes(home, run):
    rows = run("--teacher", home / "teacher", "--nfe", "1,3", "--cfg", "1,2", "--n", 8)["results"]
    assert [(r["nfe"], r["cfg"], r["passes"]) for r in rows] == [
        (1, 1, 1),
        (1, 2, 2),
        (3, 1, 3),
        (3, 2, 6),
    ]
    assert (
        len({r["fd"] for r in rows}) == 4
        and "fid" not in rows[0]
        and rows[0]["protocol"].startswith("fd tiny-cnn")
    )
    assert (
        run("--teacher", home / "teacher", "--nfe", 3, "--cfg", 2, "--heun", "--n", 8)["passes"]
        == 10
    )
    assert (
        run("--teacher", "toy-cond", "--nfe", 3, "--cfg", 2, "--n", 8)["passes"] == 6
    )  # the exact teacher runs no network


def test_steps_of_another_nfe_are_dropped(home, run):
    loaded = script.load_student(home / "dmd2-digits", script.parse_args([str(home)]), {})
    seen = []
    for nfe in (2, 4):
        row = script.student_row(
            "x", loaded[0], lambda *a, **kw: seen.append((a[3], kw)), *loaded[2:], nfe
        )
        row["sampler"](None, None, None, None)
    assert seen == [(2, dict(steps="999,400")), (4, {})]


def test_labelled_toy(home):
    args = script.parse_args([str(home)])
    assert (
        script.load_student(home / "toy-cond", args, {})[0].labelled
        and not script.load_student(home / "dmd2-toy", args, {})[0].labelled
    )


def test_compare(home, run, tmp_path):
    rows = run(
        home / "dmd2-digits",
        home / "dmd2-digits" / "student",
        "--compare",
        "--teacher-nfe",
        "1,2",
        "--n",
        20,
        "--batch",
        20,
    )["results"]
    assert [r["name"] for r in rows] == ["teacher teacher"] * 2 + ["dmd2-digits"] * 2 and [
        r["cfg"] for r in rows
    ] == [1.5] * 4
    assert rows[2]["fd"] == rows[3]["fd"]
    lines = [line for line in run.text.splitlines() if line.startswith("|")]
    assert len(lines) == 6 and "fd" in lines[0] and "fid" not in lines[0]
    sheet = Image.open(tmp_path / "compare.png")
    assert (
        sheet.height == 20 + 4 * 58 - 2 and sheet.width > 20 * 58
    )  # 20 digits of twice 28 pixels, captions at their left
    assert {p.name for p in tmp_path.glob("compare*")} == {
        "compare.png",
        "compare.md",
        "compare.json",
    }  # no curves: that student has no log

    run(
        home / "dmd2-digits",
        "--compare",
        "--n",
        70,
        "--batch",
        30,
        "--teacher-nfe",
        "3,1",
        "--cfg",
        "1.5,2",
    )
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [(r["method"], r["nfe"], r["cfg"]) for r in rows] == [
        ("teacher", 3, 1.5),
        ("teacher", 3, 2),
        ("teacher", 1, 1.5),
        ("teacher", 1, 2),
        ("dmd2", 2, 1.5),
    ]
    assert [r["to_teacher"] == 0 for r in rows] == [
        True,
        True,
        False,
        False,
        False,
    ] and "fd" in rows[0]  # each guidance has its own target
    sampler = lambda nfe: lambda m, z, c, noise: teacher_sample(m, z, c, nfe, 1.5)
    a, b = (
        torch.cat(
            [x for *_, x in generate(sampler(nfe), load_teacher(str(home / "teacher")), 70)]
        ).clamp(-1, 1)
        for nfe in (3, 1)
    )
    assert rows[2]["to_teacher"] == pytest.approx(
        float((a - b).square().mean()), rel=0.02
    )  # grey levels are rounded

    run(home / "dmd2-toy", "--n", 8, "--grid", tmp_path / "g.png", "--latency", "--batch", 4)
    assert (tmp_path / "g.png").stat().st_size > 500


def test_best_of(home, run):
    plain, best = run(
        home / "dmd2-digits", "--best-of", 3, "--teacher-nfe", 2, "--n", 20, "--batch", 9
    )["results"]
    assert (
        plain["name"] == "dmd2-digits"
        and best["name"] == "teacher best-of-3 dmd2-digits"
        and (best["best_of"], best["verifier"]) == (3, "classifier")
    )
    assert (
        plain["passes"] == 2
        and best["passes"] == 3 * 2 + 2 * 2
        and best["cfg"] == 1.5
        and best["nfe"] == 2
    )  # three previews of two steps, two guided steps


def test_best_of_gives_the_teacher_the_best_noise(monkeypatch):
    """Verifier: brightness, minus that for odd labels. The student's image is minus the noise, the teacher's is the noise."""

    def verifier(images):
        return None, (images.float().flatten(1).mean(1, keepdim=True) - 128) / 9 * torch.tensor(
            [[1.0, -1.0] * 5]
        )

    verifier.classes = lambda labels: labels
    monkeypatch.setattr(script, "ClassifierExtractor", lambda teacher: verifier)
    monkeypatch.setattr(script, "teacher_sample", lambda teacher, z, *a: z)
    teacher = make_dit(1)
    plain = dict(
        model=teacher.copy(),
        teacher=teacher,
        folder=None,
        facts=dict(name="s"),
        sampler=lambda m, z, c, noise: -z,
    )
    row = script.best_row(plain, 4, 2, 1.0, False)
    noise = PerImageNoise(0, range(6))
    candidates = torch.stack([noise(1, 28, 28) for _ in range(4)])  # [4, 6, 1, 28, 28]
    ((_, labels, best),) = generate(row["sampler"], row["model"], 6)
    score = teacher.decode(-candidates.flatten(0, 1)).float().mean((1, 2, 3)).view(
        4, 6
    ) * torch.tensor([1.0, -1.0] * 3)  # odd labels want dark images
    assert torch.equal(
        best, candidates[score.argmax(0), torch.arange(6)]
    ) and labels.tolist() == list(range(6))
    parts = [x for _, _, x in generate(row["sampler"], row["model"], 6, batch=4)]
    assert torch.equal(torch.cat(parts), best)


def test_latency(home, run):
    r = run(home / "dmd2-digits", "--n", 8, "--batch", 4, "--latency")["latency"]
    assert set(r) == {"1", "4"} and all(
        v["ms_per_image"] * v["images_per_s"] == pytest.approx(1000, rel=0.01) for v in r.values()
    )


# ---- folders and FID ------------------------------------------------------------------------------------------------------------------------


def test_two_folders(home, run):
    teacher = ("--teacher", home / "teacher")
    ab, aa = (run("--images", home / "A", "--ref-images", home / x, *teacher) for x in "BA")
    assert (
        ab["n"] == 60
        and "ref=B:90" in ab["protocol"]
        and ab["protocol"].startswith("fd tiny-cnn")
        and ab["images"] == str(home / "A")
    )
    assert (
        aa["fd"] < 1e-6 < ab["fd"]
        and aa["precision"] == aa["recall"] == aa["coverage"] == 1 > ab["precision"]
    )
    assert run("--images", home / "A", *teacher, "--n", 20)["n"] == 20


def test_part_of_the_reference_is_mixed(home):
    extractor = ClassifierExtractor(load_teacher(str(home / "teacher")))
    extractor.set_reference(
        extractor.reference, "x", torch.arange(1000.0)[:, None]
    )  # features in the order of class folders
    assert 300 < extractor.real_features(100).mean() < 700


def test_saved_images_give_the_same_numbers(home, run, tmp_path):
    direct = run(home / "dmd2-digits", "--n", 24, "--save-images", tmp_path / "png")
    again = run("--images", tmp_path / "png", "--teacher", home / "teacher")
    same({k: v for k, v in direct.items() if k != "agreement"}, again, 1e-6)
    run(
        home / "dmd2-digits",
        "--nfe",
        "1,2",
        "--n",
        8,
        "--seeds",
        2,
        "--save-images",
        tmp_path / "many",
    )
    assert len(list((tmp_path / "many").glob("0?-dmd2-digits-nfe?/seed?/00000?.png"))) == 32


@pytest.fixture
def inception(monkeypatch):
    """The real network takes seconds per image; its loading and its features are tested in test_fid.py."""
    digest = [INCEPTION_SHA256]
    mix = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(InceptionExtractor, "dims", 32)
    net = lambda images, resize: (resize_tf1(images, 8).mean(1).flatten(1) @ mix, None)
    monkeypatch.setattr(measure, "load_inception", lambda path, device, force: (net, digest[0]))
    return digest


def test_fid_is_named_only_with_the_public_weights(home, run, tmp_path, inception):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(32), sigma=np.eye(32))
    r = run("--images", home / "A", "--ref-images", home / "B", "--inception", "w")
    assert (
        r["protocol"] == "fid60 inception-tf1resize uint8 ref=B:90 n=60 images=A"
        and r["fid"] > 0
        and "fd" not in r
        and "kid" in r
    )
    r = run(
        home / "dmd2-digits",
        "--ref",
        tmp_path / "edm.npz",
        "--inception",
        "w",
        "--n",
        8,
        "--resize",
        "clean",
        "--seed",
        4,
    )
    assert (
        r["protocol"] == "fid8 inception-cleanresize uint8 ref=edm.npz n=8 seed=4"
        and "kid" not in r
        and "precision" not in r
        and "agreement" not in r
    )
    assert "singular" in run.text
    inception[0] = "00000000"
    r = run(
        "--images", home / "A", "--ref-images", home / "B", "--inception", "w", "--force-inception"
    )
    assert "fid" not in r and r["fd"] > 0 and "00000000" in r["protocol"]


# ---- mistakes: one line, exit code 2, before the first sample -----------------------------------------------------------------------------------


def spoil(home, tmp_path, **changes):
    """A copy of the digits student with another distill.json; text: the whole file."""
    folder = Path(shutil.copytree(home / "dmd2-digits", tmp_path / "bad"))
    path = folder / "student" / "distill.json"
    path.write_text(
        changes.get("text")
        or json.dumps(
            {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
        )
    )
    return folder


@pytest.mark.parametrize(
    "flags,expected",
    [
        ("", "expected the folder of a run"),
        ("nowhere", "found nothing"),
        ("A", "no student/distill.json"),
        ("teacher", "give it as --teacher"),
        ("dmd2-digits --nfe 0", "--nfe 0"),
        ("dmd2-digits --nfe 1,x", "--nfe 1,x"),
        ("dmd2-digits --n 0", "--n:"),
        ("dmd2-digits --batch 0", "--batch"),
        ("dmd2-digits --seeds 0", "--seeds"),
        ("dmd2-digits --cfg 2", "--cfg and --heun"),
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
        ("dmd2-digits --save-images A", "empty folder"),
        ("dmd2-digits --grid A", "--grid"),
        ("dmd2-digits --device cuda", "--device cuda"),
        ("--teacher teacher --best-of 4", "--best-of: expected folders of runs"),
        ("dmd2-digits --best-of 1", "--best-of: expected at least 2"),
        ("dmd2-toy --best-of 4", "--best-of: the verifier"),
        ("dmd2-digits --verifier classifier", "--verifier: means something only with --best-of"),
        ("dmd2-digits --device tpu", "--device"),
        ("dmd2-digits --nfe 1000", "--nfe 1000"),
    ],
)
def test_mistakes(home, tmp_path, monkeypatch, flags, expected):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    for name in ("A", "B", "teacher", "dmd2-digits", "dmd2-toy"):
        (tmp_path / name).symlink_to(home / name)
    for name, content in dict(
        empty=None, large=np.zeros((32, 32), np.uint8), torn=b"no image"
    ).items():
        (tmp_path / name).mkdir()
        for i in range(8 if content is not None else 0):
            path = tmp_path / name / f"{i}.png"
            path.write_bytes(content) if isinstance(content, bytes) else Image.fromarray(
                content
            ).save(path)
    np.savez(tmp_path / "none.npz", mean=np.zeros(3))
    np.savez(tmp_path / "two.npz", mu=np.zeros(2), sigma=np.eye(2))

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        script.main([*flags.split(), "--out", "eval.jsonl"])
    assert expected in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "marker").exists() and not list(
        tmp_path.glob("*.jsonl")
    )  # nothing was executed, nothing was measured


@pytest.mark.parametrize(
    "changes,expected",
    [
        (dict(method="dmd3"), "did you mean dmd2"),
        (dict(method="os"), "expected its script os.py"),
        (dict(method="nct"), "nct.py is not here"),
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
    if changes.get("method") == "nct" and (ROOT / "nct.py").exists():
        pytest.skip("nct.py has come")
    with pytest.raises(UserError) as e:
        script.main([str(spoil(home, tmp_path, **changes)), "--out", str(tmp_path / "eval.jsonl")])
    assert expected in str(e.value)


def test_teacher_overrides(home, run, tmp_path):
    assert run(spoil(home, tmp_path, teacher="gone"), "--teacher", home / "teacher", "--n", 8)[
        "teacher"
    ] == str(home / "teacher")


def test_exit_code(scripts):
    p = scripts.run("eval.py", "out/none", "--n", "0", code=2)
    assert (p.out, p.err) == ("", "eval.py: --n: expected at least 8, found 0\n")


@pytest.mark.parametrize("flags", ["--unknown", "--n x", "--resize pil"])
def test_flags(flags, capsys):
    with pytest.raises(SystemExit) as e:
        script.main(flags.split())
    assert e.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1

"""eval.py --compare: what is one row, whose numbers stand there, what is measured again, pictures without clipped text."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_eval import same, two_processes

import eval as script
from common import metrics
from common.errors import UserError
from common.files import ROOT
from common.sampling import generate, teacher_sample
from common.teachers.load import load_teacher
from tools.compare import command, distance, groups, lines_of_code, networks, order, teacher_steps
from tools.plot_log import (
    by_angle,
    curves,
    image_rows,
    main,
    read_log,
    running_mean,
    scatter,
    ticks,
)

FLAGS = dict(teacher="toy", iters=20, seed=0, out="x", eval_n=10)
RECORD = dict(
    images=0,
    passes_per_iteration="4.80",
    networks=dict(student=3, critic=4),
    seconds=7,
    iterations=20,
    batch=8,
    threads=1,
    hardware="a CPU",
    date="today",
    command="python dmd2.py --teacher toy --iters 20 --seed 1 --out x",
)


def student(folder, seed, move=0.05, log=True, **info):
    """A student of the toy without training: its network's weights moved."""
    model = load_teacher("toy").copy()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += move * torch.randn(p.shape, generator=g)
    record = dict(
        method="dmd2",
        teacher="toy",
        nfe=1,
        cfg=1.0,
        sampler=dict(steps="999"),
        flags=dict(FLAGS, seed=seed, out=str(folder)),
        seed=seed,
        training=RECORD,
    )
    model.save(folder / "student", {k: v for k, v in (record | info).items() if v is not None})
    if log:
        lines = [
            dict(
                it=it,
                images=8 * it,
                skipped=0,
                loss=1 / (it + 1),
                sometimes=seed,
                time=dict(seconds=it),
            )
            for it in range(0, 200, 10)
        ]
        del lines[3]["sometimes"]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """dmd2 and dmd2-s1, two seeds of one setting; old: a run without a record; long: the setting with other iterations."""
    toys = tmp_path_factory.mktemp("toys")
    student(toys / "dmd2", 0)
    student(toys / "dmd2-s1", 1, training=RECORD | dict(seconds=10))
    student(toys / "old", 2, flags=None, training=None, log=False)
    student(
        toys / "long",
        3,
        flags=dict(FLAGS, iters=40),
        log=False,
        nfe=2,
        sampler=dict(steps="999,499"),
        training=RECORD | dict(images=9, networks=dict(one_student=1)),
    )
    (toys / "old" / "metrics.json").write_text(json.dumps(dict(train_seconds=1234)))
    return toys


@pytest.fixture
def run(tmp_path, capsys):
    """run(*flags) -> rows of compare.json; .results: the last line; .text: all that was printed."""

    def go(*flags):
        capsys.readouterr()
        script.main(
            [
                *map(str, flags),
                "--compare",
                "--out",
                str(tmp_path / "eval.jsonl"),
                "--device",
                "cpu",
            ]
        )
        go.text = capsys.readouterr().out
        go.results = json.loads(go.text.splitlines()[-1])["results"]
        return json.loads((tmp_path / "compare.json").read_text())["rows"]

    return go


# ---- the table ----------------------------------------------------------------------------------------------------------------------------


def test_rows(toys, run, tmp_path):
    rows = run(
        *(toys / name for name in ("old", "dmd2", "dmd2-s1", "long")),
        "--n",
        60,
        "--heun",
        "--teacher-nfe",
        "3,1,2",
    )
    assert [(r["name"], r["nfe"], r["passes"]) for r in rows] == [
        ("teacher, 3 steps, w = 1", 3, 3),
        ("teacher, 1 step, w = 1", 1, 1),
        ("teacher, 2 steps, w = 1", 2, 2),
        ("teacher, Heun, 2 steps, w = 1", 3, 3),
        ("old", 1, 1),
        ("dmd2", 1, 1),
        ("long", 2, 2),
    ]
    teacher, old, dmd2, long = rows[0], *rows[4:]

    assert dmd2["seeds"] == [0, 1] and len(dmd2["runs"]) == 2 and old["seeds"] == [2]
    singles = {r["name"]: r for r in run.results}
    for key in ("energy_distance", "sliced_wasserstein", "mode_max"):
        assert (
            dmd2["each"][key] == [singles["dmd2"][key], singles["dmd2-s1"][key]]
            and dmd2["each"][key][0] != dmd2["each"][key][1]
        )
        assert dmd2[key] == pytest.approx(np.mean(dmd2["each"][key]))

    # the distance, from its definition
    toy, gap = load_teacher("toy"), {}
    target = torch.cat(
        [x for *_, x in generate(lambda m, z, c, noise: teacher_sample(m, z, c, 3), toy, 60)]
    )
    for name in ("dmd2", "dmd2-s1"):
        model, sample, info, *_ = script.load_student(
            toys / name, script.parse_args([str(toys)]), {}
        )
        x = torch.cat(
            [
                x
                for *_, x in generate(
                    lambda m, z, c, noise: sample(m, z, c, 1, noise, **info["sampler"]), model, 60
                )
            ]
        )
        gap[name] = float((x - target).square().mean())
    assert dmd2["to_teacher"] == pytest.approx((gap["dmd2"] + gap["dmd2-s1"]) / 2, rel=1e-5)
    assert (
        teacher["to_teacher"]
        == 0
        < rows[3]["to_teacher"]
        < rows[2]["to_teacher"]
        < rows[1]["to_teacher"]
    )

    assert (dmd2["images"], dmd2["networks"], dmd2["passes_per_iteration"], dmd2["iterations"]) == (
        "no",
        "student, critic",
        "4.80",
        20,
    )
    assert (
        dmd2["train_seconds"] == 8.5
        and dmd2["command"] == ["python dmd2.py --teacher toy --iters 20"]
        and dmd2["lines"] == lines_of_code(ROOT / "dmd2.py")
    )
    assert [
        old[k] for k in ("images", "networks", "passes_per_iteration", "iterations", "command")
    ] == [None] * 5 and old["train_seconds"] == 1234
    assert long["images"] == "yes"

    text = (tmp_path / "compare.md").read_text()
    table = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    cells = [dict(zip(table[0], row)) for row in table[2:]]
    assert (
        cells[5]["energy distance"]
        == f"{dmd2['energy_distance']:.4f} ({dmd2['each']['energy_distance'][0]:.4f}, {dmd2['each']['energy_distance'][1]:.4f})"
    )
    assert (
        cells[5]["seeds"] == "0, 1"
        and cells[5]["training seconds"] == "8"
        and cells[4]["training seconds"] == "1,234"
    )
    assert (
        cells[4]["networks trained"]
        == cells[4]["command"]
        == cells[0]["seeds"]
        == cells[0]["lines of method code"]
        == "-"
        and "fd" not in cells[0]
    )
    assert cells[3]["command"] == "`python eval.py --teacher toy --nfe 2 --cfg 1 --heun`"
    assert table[0][:4] == ["name", "NFE", "passes per image", "seeds"] and table[0][-8:] == [
        "to teacher",
        "images needed",
        "networks trained",
        "passes per iteration",
        "iterations",
        "training seconds",
        "lines of method code",
        "command",
    ]
    assert (
        "toy exact n=60 seed=0" in text
        and "teacher's 3 Euler steps" in text
        and text.rstrip() in run.prompt_kwargs
    )
    assert [p.name for p in (tmp_path / "compare-curves").iterdir()] == ["dmd2.png"]
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_teacher_rows():
    args = script.parse_args(["x", "--compare"])
    assert teacher_steps(args, [1, 4, 1]) == [(50, False), (4, False), (1, False)]
    args = script.parse_args(["x", "--compare", "--heun"])
    assert teacher_steps(args, [50, 1, 2, 4]) == [
        (50, False),
        (4, False),
        (2, False),
        (1, False),
        (25, True),
        (2, True),
    ]  # 2 n - 1 calls: 49, 3; with 1 it is Euler
    assert teacher_steps(
        script.parse_args(["x", "--compare", "--heun", "--teacher-nfe", "7,8,16"]), [1]
    ) == [(7, False), (8, False), (16, False), (4, True), (8, True)]


def pair(seed=0, nfe=1, method="dmd2", **flags):
    info = (
        dict(method=method, seed=seed, flags=dict(FLAGS, seed=seed) | flags)
        if seed is not None
        else dict(method=method)
    )
    return dict(info=info), dict(method=method, nfe=nfe)


@pytest.mark.parametrize(
    "pairs,sizes",
    [
        ([pair(0), pair(1), pair(2)], [3]),
        ([pair(0), pair(1, iters=40), pair(2)], [2, 1]),
        ([pair(0), pair(1, nfe=2)], [1, 1]),
        ([pair(0), pair(1, method="sid")], [1, 1]),
        ([pair(0, out="a", log_every=1, save_every=2, eval_n=3), pair(1, out="b")], [2]),
        ([pair(None), pair(None)], [1, 1]),
        ([pair(0), pair(1), pair(0), pair(1)], [2, 2]),  # all of it a second time: not four seeds
    ],
)
def test_groups(pairs, sizes):
    assert [len(g) for g in groups(pairs)] == sizes


def test_order():
    rows = [
        dict(name="b", fd=2.0, seeds=[3]),
        dict(name="c", fd=None),
        dict(name="a", fd=1.0, seeds=[1]),
    ]
    names = lambda key: "".join(r["name"] for r in order(rows, key))
    assert [names(k) for k in (None, "fd", "-fd", "name", "-name", "seeds", "kid")] == [
        "bca",
        "abc",
        "bac",
        "abc",
        "cba",
        "abc",
        "bca",
    ]


def test_sorted_table(toys, run):
    rows = run(
        toys / "dmd2",
        toys / "dmd2-s1",
        "--n",
        20,
        "--teacher-nfe",
        "1,2",
        "--sort=-energy_distance",
    )
    values = [r["energy_distance"] for r in rows]
    assert values == sorted(values, reverse=True) and rows[0]["name"].startswith("teacher, 1 step,")


@pytest.mark.parametrize(
    "info,nfe,expected",
    [
        (
            dict(
                nfe=1, training=dict(command="python dmd2.py --seed 2 --iters 5 --out 'a b' --lr 1")
            ),
            1,
            ["python dmd2.py --iters 5 --lr 1"],
        ),
        (
            dict(nfe=1, training=dict(command="python dmd2.py --out=x --overwrite --data 'a b'")),
            4,
            ["python dmd2.py --data 'a b'", "python eval.py OUT --nfe 4"],
        ),
        (dict(nfe=1), 1, None),
        (dict(nfe=1, training=None), 2, None),
    ],
)
def test_command(info, nfe, expected):
    assert command(info, nfe) == expected


@pytest.mark.parametrize(
    "trained,experts,expected",
    [
        (dict(student=1, critic=2), None, "student, critic"),
        (dict(one_student=1, critic=1), 4, "4 x student, critic"),
        (dict(student=1), 2, "2 x student"),
        (dict(student=1), 1, "student"),
        (dict(one_student=1), 1, "student"),
        (None, None, None),
    ],
)
def test_networks(trained, experts, expected):
    info = dict(model=dict(experts=[{}] * experts) if experts else {}) | (
        dict(training=dict(networks=trained)) if trained else {}
    )
    assert networks(info) == expected


def test_lines_of_code(tmp_path):
    (tmp_path / "x.py").write_text('''"""Two
lines."""
import math  # 1

# a comment
def f(x):  # 2
    """A docstring."""
    # ==== same in every script: setup ====
    x = x + 1
    # ==== end ====
    y = """a text
that counts"""  # 3 and 4

    return (x +  # 5
            y)  # 6
    # ==== same in every script: end ====
    g()
    # ==== end ====
''')
    assert lines_of_code(tmp_path / "x.py") == 6


def test_distance():
    a, b = (
        torch.tensor([[0, 255], [7, 7]], dtype=torch.uint8),
        torch.tensor([[255, 255]], dtype=torch.uint8),
    )
    assert distance(a, b) == 2.0  # black and white are 2 apart; only as many as both have
    assert distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])) == 2.5


# ---- what is measured again ---------------------------------------------------------------------------------------------------------------


def test_measured_once(toys, run, tmp_path, monkeypatch):
    for name in ("dmd2", "old"):
        shutil.copytree(toys / name, tmp_path / name)
    seen, evaluate = [], metrics.evaluate
    monkeypatch.setattr(
        metrics,
        "evaluate",
        lambda sampler, model, teacher, n, seed, *a, **kw: (
            seen.append((n, seed)) or evaluate(sampler, model, teacher, n, seed, *a, **kw)
        ),
    )
    measured = lambda *flags: (
        seen.clear(),
        run(tmp_path / "dmd2", tmp_path / "old", "--n", 40, "--teacher-nfe", 2, *flags),
        len(seen),
    )[1:]
    first, count = measured()
    assert count == 3
    picture = (tmp_path / "compare.png").read_bytes()
    again, count = measured("--sort", "name")
    assert (
        count == 0
        and {r["name"]: r for r in again} == {r["name"]: r for r in first}
        and "3 of 3 rows were measured earlier" in run.prompt_kwargs
    )
    measured()
    assert (tmp_path / "compare.png").read_bytes() == picture and len(
        (tmp_path / "eval.jsonl").read_text().splitlines()
    ) == 3
    assert [
        measured(*f)[1]
        for f in (
            ("--seed", 1),
            ("--nfe", 2),
            ("--cfg", 2),
            ("--dtype", "bf16"),
            ("--fresh",),
            ("--seeds", 2),
            (),
        )
    ] == [3, 2, 1, 3, 3, 6, 0]
    assert {len(np.load(path)["samples"]) for path in (tmp_path / "measured").glob("*.npz")} == {
        40
    }  # of the first seed only
    shutil.copytree(tmp_path / "dmd2", tmp_path / "copy")  # another name is no other student
    seen.clear()
    assert run(tmp_path / "copy", "--n", 40, "--teacher-nfe", 2)[1]["name"] == "copy" and not seen
    student(tmp_path / "old", 5, flags=None)  # the same name with other weights is
    now, count = measured()
    assert (
        count == 1
        and now[1]["energy_distance"] == first[1]["energy_distance"]
        and now[2]["energy_distance"] != first[2]["energy_distance"]
    )
    info = tmp_path / "dmd2" / "student" / "distill.json"
    info.write_text(
        info.read_text().replace('"999"', '"499"')
    )  # the same weights with another sampler are, too
    assert measured()[1] == 1


def test_pictures_and_times_are_made_anew(toys, run, tmp_path):
    flags = [toys / "old", "--n", 20, "--batch", 20, "--teacher-nfe", 1]
    run(*flags)
    run(*flags, "--latency")
    assert [set(r["latency"]) for r in run.results] == [{"1", "20"}] * 2


def test_two_processes(toys, run, tmp_path):
    flags = [toys / "dmd2", toys / "long", "--n", 41, "--batch", 16, "--teacher-nfe", 2]
    one = run(*flags)
    out = two_processes(
        False,
        tmp_path / "two",
        *[f if f != "--n" else "--samples" for f in flags],
        "--compare",
        "--grid",
        tmp_path / "two.png",
        "--cache",
        tmp_path / "cache",
    )
    two = json.loads((tmp_path / "two.json").read_text())["rows"]
    for a, b in zip(one, two, strict=True):
        assert a["to_teacher"] == pytest.approx(b["to_teacher"], abs=1e-9)
        same(
            {k: a[k] for k in metrics.METRICS if k in a},
            {k: b[k] for k in metrics.METRICS if k in b},
            1e-6,
        )
    assert out.count('{"results"') == 1
    two_processes(
        False,
        tmp_path / "two",
        *[f if f != "--n" else "--samples" for f in flags],
        "--compare",
        "--grid",
        tmp_path / "two.png",
        "--cache",
        tmp_path / "cache",
    )
    assert (
        json.loads((tmp_path / "two.json").read_text())["rows"] == two
        and len((tmp_path / "two.jsonl").read_text().splitlines()) == 3
    )  # nothing measured twice


def test_what_is_no_run_is_left_out(toys, run, tmp_path):
    (tmp_path / "measured").mkdir()
    (tmp_path / "eval.jsonl").write_text("")
    run(tmp_path / "measured", toys / "old", tmp_path / "eval.jsonl", "--n", 20, "--teacher-nfe", 1)
    assert (
        "left out, no finished students: measured, eval.jsonl"
        in (tmp_path / "compare.md").read_text()
    )
    with pytest.raises(UserError, match="gone: expected the folder of a run, found nothing"):
        run(toys / "old", tmp_path / "gone")
    with pytest.raises(UserError, match="no student/distill.json"):
        run(tmp_path / "measured")


@pytest.mark.parametrize(
    "flags,expected",
    [
        ("--compare --sort recal", "did you mean recall"),
        ("--sort fd", "only with --compare"),
        ("--fresh", "only with --compare"),
        ("--cache x", "only with --compare"),
        ("--compare --cache file/x", "--cache file/x: expected a folder"),
    ],
)
def test_mistakes(toys, tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UserError, match=expected):
        script.main([str(toys / "old"), "--n", "20", "--out", "eval.jsonl", *flags.split()])


def test_students_say_what_their_training_took(scripts, tmp_path):
    scripts.run(
        "dmd2.py", "--teacher", "toy", "--gan", "--smoke", "--eval-n", 0, "--out", tmp_path / "run"
    )
    record = json.loads((tmp_path / "run" / "student" / "distill.json").read_text())["training"]
    assert (record["images"], list(record["networks"]), record["iterations"], record["batch"]) == (
        20000,
        ["student", "critic"],
        3,
        256,
    )
    assert (
        record["passes_per_iteration"] == "4.80 and those of the GAN head"
        and record["seconds"] >= 0
        and record["hardware"]
        and record["dtype"] == "float32"
    )
    net = load_teacher("toy").copy()
    assert (
        record["networks"]["student"]
        == sum(p.numel() for p in net.parameters())
        < record["networks"]["critic"]
    )


# ---- pictures -----------------------------------------------------------------------------------------------------------------------------


def clean_margin(path, width=4):
    """Nothing touches the border: no text is cut there."""
    a = np.array(Image.open(path).convert("L"))
    inner = a[width:-width, width:-width]
    return inner.min() < 100 and all(
        (edge == 255).all() for edge in (a[:width], a[-width:], a[:, :width], a[:, -width:])
    )


def test_pictures_are_not_clipped(tmp_path):
    long = "a name that is much longer than it should be, with more words than fit"
    image_rows(
        tmp_path / "rows.png",
        [
            (long, "second line", torch.zeros(3, 1, 8, 8, dtype=torch.uint8)),
            ("b", "", torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
        ],
    )
    for n in (1, 5, 13):
        scatter(
            tmp_path / f"scatter{n}.png",
            [(long, long, np.array([[9.0, 9.0], [0, float("nan")]]))] * n,
            [(0, 0, 0)] * 2,
        )
        assert clean_margin(tmp_path / f"scatter{n}.png")
    logs = [
        (
            f"seed {k}",
            {
                "x" * 60: (np.arange(30), np.arange(30) * 12345.678 * (k - 2)),
                "y": (np.array([0]), np.array([float("nan")])),
            },
        )
        for k in range(9)
    ]
    curves(tmp_path / "curves.png", logs, long)
    assert clean_margin(tmp_path / "rows.png") and clean_margin(tmp_path / "curves.png")


def test_image_rows_show_the_images(tmp_path):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[1, 0] = 200
    image_rows(tmp_path / "a.png", [("x", "", images)], margin=10, gap=2)
    a = np.array(Image.open(tmp_path / "a.png"))
    assert (
        (a[10:66, -66:-10] == [200, 0, 0]).all()
        and (a[10:66, -124:-68] == 0).all()
        and (a[10:66, -68:-66] == 255).all()
    )


def test_scatter_puts_points_where_they_are(tmp_path):
    scatter(
        tmp_path / "a.png",
        [("a", "", np.array([[0.8, 0.8], [-0.8, 5.0]]))],
        [(255, 0, 0), (0, 0, 255)],
        side=200,
    )
    a = np.array(Image.open(tmp_path / "a.png")).astype(int)
    top = a.shape[0] - 14 - 200
    red, blue = (np.argwhere((a[..., c] - a[..., 2 - c]) > 100).mean(0) - [top, 14] for c in (0, 2))
    assert np.abs(red - [50, 150]).max() < 2  # up is smaller
    assert abs(blue[1] - 50) < 2 and blue[0] < 6  # what is outside is at the border


def test_colours_are_directions():
    angle = np.linspace(0, 2 * math.pi, 9)[:-1] + 0.01
    points = np.stack([np.cos(angle), np.sin(angle)], 1)
    colours = by_angle(points)
    assert (
        len(set(colours)) == 8
        and by_angle(5 * points) == colours
        and colours[0][0] > 200
        and colours[3][1] > 200
    )


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_running_mean(values, window):
    y, half = np.array(values), window // 2
    assert np.allclose(
        running_mean(y, window),
        [y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))],
        atol=1e-9,
    )


@given(st.floats(-1e4, 1e4), st.floats(1e-6, 1e6), st.booleans())
@settings(max_examples=200, deadline=None)
def test_ticks(low, span, log):
    low, span = (low % 10, span % 12 + 1.0) if log else (low, max(span, abs(low) * 1e-6))
    found = ticks(low, low + span, log)
    assert (
        1 <= len(found) <= 6
        and all(low - 1e-6 * span - 1e-9 <= v <= low + span + 1e-6 * span + 1e-9 for v in found)
        and found == sorted(set(found))
    )
    assert log or len(found) >= 2


def test_logs(toys, tmp_path):
    log = read_log(toys / "dmd2-s1")
    assert set(log) == {"loss", "sometimes"}  # nothing was skipped, and times are no result
    assert (
        log["loss"][0].tolist() == list(range(0, 200, 10))
        and 30 not in log["sometimes"][0]
        and log["loss"][1][1] == 1 / 11
    )
    main([str(toys / "dmd2"), str(toys / "dmd2-s1"), "--out", str(tmp_path / "log.png")])
    assert clean_margin(tmp_path / "log.png")
    (tmp_path / "log.jsonl").write_text("{")
    for folder, expected in (
        (toys / "old", "expected the log of a run"),
        (tmp_path, "one JSON object per line"),
    ):
        with pytest.raises(UserError, match=expected):
            read_log(folder)

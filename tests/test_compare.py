"""eval.py --compare: what is one row, whose numbers are in it, what is measured again."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_eval import same, two_processes

import eval as script
from common import metrics
from common.errors import UserError
from common.sampling import generate, teacher_sample
from common.teachers.load import load_teacher
from tools import cache
from tools.compare import (
    distance,
    group_seeds,
    markdown,
    sort_rows,
    teacher_targets,
    training_facts,
)
from tools.rows import load_student, teacher_steps

FLAGS = dict(teacher="toy", iters=20, seed=0, out="x", eval_n=10)
RECORD = dict(
    images=0,
    passes_per_iteration=4.8,
    networks=dict(student=3, critic=4),
    seconds=7,
    iterations=20,
    batch=8,
    threads=1,
    hardware="a CPU",
    date="today",
    command="python dmd2.py --teacher toy --iters 20 --seed 1 --out x",
)


def student(folder, seed, **info):
    """A student of the toy without training: its network's weights moved."""
    model = load_teacher("toy").copy()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
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


def write_log(folder):
    lines = []
    for it in range(0, 200, 10):
        lines.append(
            dict(it=it, images=8 * it, skipped=0, loss=1 / (it + 1), time=dict(seconds=it))
        )
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """dmd2 and dmd2-s1: two seeds of one setting. old: without a record. long: other iterations."""
    toys = tmp_path_factory.mktemp("toys")
    student(toys / "dmd2", 0)
    student(toys / "dmd2-s1", 1, training=RECORD | dict(seconds=10))
    for name in ("dmd2", "dmd2-s1"):
        write_log(toys / name)
    student(toys / "old", 2, flags=None, training=None)
    student(
        toys / "long",
        3,
        flags=dict(FLAGS, iters=40),
        nfe=2,
        sampler=dict(steps="999,499"),
        training=RECORD | dict(images=9, networks=dict(one_student=1)),
    )
    return toys


@pytest.fixture
def run(tmp_path, capsys):
    """run(*flags) -> rows of compare.json. .results: of the last line; .text: what is printed."""

    def go(*flags):
        capsys.readouterr()
        out = ("--out", str(tmp_path / "eval.jsonl"), "--device", "cpu")
        script.main([*map(str, flags), "--compare", *out])
        go.text = capsys.readouterr().out
        go.results = json.loads(go.text.splitlines()[-1])["results"]
        return json.loads((tmp_path / "compare.json").read_text())["rows"]

    return go


# ---- the table -----------------------------------------------------------------------------------


@pytest.fixture
def comparison(toys, run, tmp_path):
    """Three students, one of two seeds, and four teacher rows. rows by name; cells of the table."""
    runs = [toys / name for name in ("old", "dmd2", "dmd2-s1", "long")]
    rows = run(*runs, "--n", 60, "--heun", "--teacher-nfe", "3,1,2")
    text = (tmp_path / "compare.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return SimpleNamespace(
        rows=rows,
        by_name={row["name"]: row for row in rows},
        results={result["name"]: result for result in run.results},
        text=text,
        printed=run.text,
        head=head,
        cells={row[0]: dict(zip(head, row)) for row in cells},
    )


def test_rows(comparison):
    assert [(row["name"], row["nfe"], row["passes"]) for row in comparison.rows] == [
        ("teacher, 3 steps, w = 1", 3, 3),
        ("teacher, 1 step, w = 1", 1, 1),
        ("teacher, 2 steps, w = 1", 2, 2),
        ("teacher, Heun, 2 steps, w = 1", 3, 3),
        ("old", 1, 1),
        ("dmd2", 1, 1),
        ("long", 2, 2),
    ]


@pytest.mark.parametrize("key", ["energy_distance", "sliced_wasserstein", "mode_max"])
def test_metrics_are_means_over_seeds(comparison, key):
    row = comparison.by_name["dmd2"]
    assert row["seeds"] == [0, 1]
    assert len(row["runs"]) == 2
    each = [comparison.results[name][key] for name in ("dmd2", "dmd2-s1")]
    assert row["each"][key] == each
    assert each[0] != each[1]
    assert row[key] == pytest.approx(np.mean(each))


def test_distance_to_the_teacher(comparison, toys):
    """From its definition: three Euler steps, and students from the same noise."""

    def samples(sampler, model):
        return torch.cat([x for _, _, x in generate(sampler, model, 60)])

    target = samples(lambda m, z, c, noise: teacher_sample(m, z, c, 3), load_teacher("toy"))
    gaps = []
    for name in ("dmd2", "dmd2-s1"):
        s = load_student(toys / name, script.parse_args([str(toys)]), {})
        x = samples(lambda m, z, c, noise: s.sample(m, z, c, 1, noise, steps="999"), s.model)
        gaps.append((x - target).square().mean().item())
    row = comparison.by_name["dmd2"]
    assert row["to_teacher"] == pytest.approx(sum(gaps) / 2, rel=1e-5)


def test_teachers_with_more_steps_are_nearer(comparison):
    three, one, two, heun = [row["to_teacher"] for row in comparison.rows[:4]]
    assert three == 0
    assert 0 < heun < two < one


def test_facts_of_the_training(comparison):
    row = comparison.by_name["dmd2"]
    assert row["images"] == "no"
    assert row["networks"] == "student, critic"
    assert row["passes_per_iteration"] == 4.8
    assert row["iterations"] == 20
    assert row["train_seconds"] == 8.5
    assert row["command"] == ["python dmd2.py --teacher toy --iters 20"]
    assert comparison.by_name["long"]["images"] == "yes"


@pytest.mark.parametrize(
    "key", ["images", "networks", "passes_per_iteration", "iterations", "train_seconds", "command"]
)
def test_a_run_without_a_record(comparison, key):
    row = comparison.by_name["old"]
    assert row["seeds"] == [2]
    assert row.get(key) is None


def test_cells(comparison):
    row = comparison.by_name["dmd2"]
    cell = comparison.cells["dmd2"]
    first, second = row["each"]["energy_distance"]
    mean = row["energy_distance"]
    assert cell["energy distance"] == f"{mean:.4g} ({first:.4g}, {second:.4g})"
    assert cell["seeds"] == "0, 1"
    assert cell["training seconds"] == "8.5"
    assert comparison.cells["old"]["command"] == "-"
    assert comparison.cells["old"]["networks trained"] == "-"
    teacher = comparison.cells["teacher, Heun, 2 steps, w = 1"]
    assert teacher["command"] == "`python eval.py --teacher toy --nfe 2 --cfg 1 --heun`"
    assert teacher["seeds"] == "-"


def test_columns(comparison):
    assert comparison.head[:4] == ["name", "NFE", "passes per image", "seeds"]
    assert comparison.head[-7:] == [
        "to teacher",
        "images needed",
        "networks trained",
        "passes per iteration",
        "iterations",
        "training seconds",
        "command",
    ]
    assert "fd" not in comparison.head  # points have other metrics than images


def test_what_is_written(comparison, tmp_path):
    assert "toy exact n=60 seed=0" in comparison.text
    assert "teacher's 3 Euler steps" in comparison.text
    assert comparison.text.rstrip() in comparison.printed
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_curves(toys, run, tmp_path):
    pytest.importorskip("matplotlib")
    run(toys / "old", toys / "dmd2", toys / "dmd2-s1", "--n", 20, "--teacher-nfe", 1)
    assert [path.name for path in (tmp_path / "compare-curves").iterdir()] == ["dmd2.png"]


def test_without_matplotlib_the_curves_are_skipped(toys, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(toys / "dmd2", "--n", 20, "--teacher-nfe", 1)
    assert run.text.count("no curves: log curves need matplotlib: pip install matplotlib\n") == 1
    assert not (tmp_path / "compare-curves").exists()


def test_the_target_is_the_row_with_the_most_euler_steps():
    row = lambda name: SimpleNamespace(samples=name)
    measured_rows = [
        (row("two"), dict(method="teacher", nfe=2, cfg=1.0)),
        (row("three"), dict(method="teacher", nfe=3, cfg=1.0)),
        (row("one"), dict(method="teacher", nfe=1, cfg=1.0)),
        (row("Heun"), dict(method="teacher", nfe=4, cfg=1.0, heun=True)),
        (row("guided"), dict(method="teacher", nfe=1, cfg=2.0)),
        (row("student"), dict(method="dmd2", nfe=8, cfg=1.0)),
    ]
    assert teacher_targets(measured_rows) == {1.0: (3, "three"), 2.0: (1, "guided")}


@pytest.mark.parametrize(
    "flags, students, expected",
    [
        ([], [1, 4, 1], [(50, False), (4, False), (1, False)]),
        # about as many evaluations, 2 n - 1: 49 and 3; with one it is Euler
        (
            ["--heun"],
            [50, 1, 2, 4],
            [(50, False), (4, False), (2, False), (1, False), (25, True), (2, True)],
        ),
        (
            ["--heun", "--teacher-nfe", "7,8,16"],
            [1],
            [(7, False), (8, False), (16, False), (4, True), (8, True)],
        ),
    ],
)
def test_steps_of_the_teacher(flags, students, expected):
    args = script.parse_args(["x", "--compare", *flags])
    assert teacher_steps(args, students) == expected


def measured(seed=0, nfe=1, method="dmd2", **flags):
    """A student's row, as far as grouping needs it, and its result."""
    info = {}
    if seed is not None:
        info = dict(seed=seed, flags=dict(FLAGS, seed=seed) | flags)
    return SimpleNamespace(info=info), dict(method=method, nfe=nfe)


@pytest.mark.parametrize(
    "rows, sizes",
    [
        ([measured(0), measured(1), measured(2)], [3]),
        ([measured(0), measured(1, iters=40), measured(2)], [2, 1]),
        ([measured(0), measured(1, nfe=2)], [1, 1]),
        ([measured(0), measured(1, method="sid")], [1, 1]),
        ([measured(0, out="a", log_every=1, save_every=2, eval_n=3), measured(1, out="b")], [2]),
        ([measured(None), measured(None)], [1, 1]),
        # everything a second time: not four seeds
        ([measured(0), measured(1), measured(0), measured(1)], [2, 2]),
    ],
)
def test_seeds_of_one_setting_are_one_row(rows, sizes):
    assert [len(group) for group in group_seeds(rows)] == sizes


@pytest.mark.parametrize(
    "key, order",
    [
        (None, "bca"),
        ("fd", "abc"),
        ("-fd", "bac"),  # without a value: last
        ("name", "abc"),
        ("-name", "cba"),
        ("seeds", "abc"),
        ("passes_per_iteration", "bac"),  # older students recorded text
        ("kid", "bca"),
    ],
)
def test_sorting(key, order):
    rows = [
        dict(name="b", fd=2.0, seeds=[3], passes_per_iteration=3.5),
        dict(name="c", fd=None),
        dict(name="a", fd=1.0, seeds=[1], passes_per_iteration="4.80 and more"),
    ]
    assert "".join(row["name"] for row in sort_rows(rows, key)) == order


def test_sorted_table(toys, run):
    flags = ["--n", 20, "--teacher-nfe", "1,2", "--sort=-energy_distance"]
    rows = run(toys / "dmd2", toys / "dmd2-s1", *flags)
    values = [row["energy_distance"] for row in rows]
    assert values == sorted(values, reverse=True)
    assert rows[0]["name"].startswith("teacher, 1 step,")


def facts(nfe=1, experts=None, **training):
    """training_facts of one student that was trained with one step."""
    model = dict(experts=[{}] * experts) if experts else {}
    info = dict(nfe=1, seed=0, model=model, training=training)
    return training_facts([(SimpleNamespace(info=info), dict(nfe=nfe))])


@pytest.mark.parametrize(
    "command, nfe, expected",
    [
        (
            "python dmd2.py --seed 2 --iters 5 --out 'a b' --lr 1",
            1,
            ["python dmd2.py --iters 5 --lr 1"],
        ),
        (
            "python dmd2.py --out=x --overwrite --data 'a b'",
            4,
            ["python dmd2.py --data 'a b'", "python eval.py OUT --nfe 4"],
        ),
    ],
)
def test_command_without_what_differs_between_runs(command, nfe, expected):
    assert facts(nfe, command=command)["command"] == expected


@pytest.mark.parametrize(
    "trained, experts, expected",
    [
        (dict(student=1, critic=2), None, "student, critic"),
        (dict(one_student=1, critic=1), 4, "4 x student, critic"),
        (dict(student=1), 2, "2 x student"),
        (dict(student=1), 1, "student"),
        (dict(one_student=1), 1, "student"),
    ],
)
def test_networks(trained, experts, expected):
    assert facts(experts=experts, networks=trained)["networks"] == expected


def test_distance_of_images():
    """Black and white are 2 apart. Only as many images count as both have."""
    a = torch.tensor([[0, 255], [7, 7]], dtype=torch.uint8)
    b = torch.tensor([[255, 255]], dtype=torch.uint8)
    assert distance(a, b) == 2.0


def test_distance_of_points():
    assert distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])) == 2.5


def test_markdown():
    rows = [dict(name="a|b", fd=1.0 / 3, nfe=1), dict(name="c", nfe=None, seeds=[1, 2])]
    assert markdown(rows).splitlines() == [
        "| name | NFE | seeds | fd     |",
        "| ---- | --- | ----- | ------ |",
        "| a\\|b | 1   | -     | 0.3333 |",
        "| c    | -   | 1, 2  | -      |",
    ]


# ---- what is measured again ----------------------------------------------------------------------


@pytest.fixture
def counted(toys, run, tmp_path, monkeypatch):
    """counted(*flags) -> rows and number of evaluations for the students dmd2 and old (a copy)."""
    for name in ("dmd2", "old"):
        shutil.copytree(toys / name, tmp_path / name)
    calls = []
    evaluate = metrics.evaluate

    def count(*args):
        calls.append(args)
        return evaluate(*args)

    monkeypatch.setattr(metrics, "evaluate", count)

    def go(*flags, runs=("dmd2", "old")):
        calls.clear()
        folders = [tmp_path / name for name in runs]
        rows = run(*folders, "--n", 40, "--teacher-nfe", 2, *flags)
        return rows, len(calls)

    return go


def test_measured_once(counted, run, tmp_path):
    first, count = counted()
    assert count == 3
    picture = (tmp_path / "compare.png").read_bytes()
    again, count = counted("--sort", "name")
    assert count == 0
    assert sorted(again, key=str) == sorted(first, key=str)
    assert "3 of 3 rows were measured earlier" in run.text
    counted()
    assert (tmp_path / "compare.png").read_bytes() == picture
    assert len((tmp_path / "eval.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "flags, count",
    [
        (["--seed", 1], 3),
        (["--nfe", 2], 2),
        (["--cfg", 2], 1),
        (["--dtype", "bf16"], 3),
        (["--fresh"], 3),
        (["--seeds", 2], 6),
        ([], 0),
    ],
)
def test_flags_that_change_a_number(counted, flags, count):
    counted()
    assert counted(*flags)[1] == count


def test_what_a_kept_result_depends_on(tmp_path, monkeypatch):
    """All files of both models, and the versions of the libraries; not the names of folders."""
    (tmp_path / "student").mkdir()
    (tmp_path / "teacher").mkdir()
    facts = dict(name="a", teacher="b", nfe=1)
    teacher = SimpleNamespace(folder=tmp_path / "teacher")
    row = SimpleNamespace(facts=facts, folder=tmp_path / "student", teacher=teacher)
    kept = cache.ResultCache(tmp_path)
    found = {kept.path(row, {})}
    for n, name in enumerate(["w.bin", "merges.txt", "spiece.model", "c.json"], 2):
        (tmp_path / "teacher" / name).write_bytes(b"1")
        found.add(kept.path(row, {}))
        assert len(found) == n, name
    row.facts = facts | dict(name="c", teacher="d")
    assert kept.path(row, {}) in found
    monkeypatch.setattr("common.teachers.cache.metadata.version", lambda name: "9.9")
    assert kept.path(row, {}) not in found


def cached_samples(folder):
    return [load_file(path)["samples"] for path in sorted(folder.iterdir())]


def test_samples_of_the_first_seed_are_kept(counted, tmp_path):
    counted("--cache", tmp_path / "one")
    counted("--cache", tmp_path / "two", "--seeds", 2)
    one, two = cached_samples(tmp_path / "one"), cached_samples(tmp_path / "two")
    assert [samples.shape for samples in one] == [(40, 2)] * 3
    assert sorted(x.tolist() for x in one) == sorted(x.tolist() for x in two)


def test_the_first_samples_are_kept(counted, tmp_path, monkeypatch):
    counted("--cache", tmp_path / "all")
    monkeypatch.setattr(cache, "KEPT_SAMPLES", 10)
    counted("--cache", tmp_path / "few", "--batch", 7, "--fresh")
    few, all_samples = cached_samples(tmp_path / "few"), cached_samples(tmp_path / "all")
    for a, b in zip(few, all_samples):
        assert torch.allclose(a, b[:10])


def test_another_name_is_the_same_student(counted, tmp_path):
    counted()
    shutil.copytree(tmp_path / "dmd2", tmp_path / "copy")
    rows, count = counted(runs=["copy"])
    assert count == 0
    assert rows[1]["name"] == "copy"


def test_other_weights_are_another_student(counted, tmp_path):
    first, _ = counted()
    student(tmp_path / "old", 5, flags=None)
    rows, count = counted()
    assert count == 1
    assert rows[1]["energy_distance"] == first[1]["energy_distance"]
    assert rows[2]["energy_distance"] != first[2]["energy_distance"]


def test_another_sampler_is_another_student(counted, tmp_path):
    counted()
    path = tmp_path / "dmd2" / "student" / "distill.json"
    path.write_text(path.read_text().replace('"999"', '"499"'))
    assert counted()[1] == 1


def test_times_are_measured_anew(toys, run):
    flags = [toys / "old", "--n", 20, "--batch", 20, "--teacher-nfe", 1]
    run(*flags)
    run(*flags, "--latency")
    assert [set(result["latency"]) for result in run.results] == [{"1", "20"}] * 2


def test_two_processes(toys, run, tmp_path):
    runs = [toys / "dmd2", toys / "long"]
    one = run(*runs, "--n", 41, "--batch", 16, "--teacher-nfe", 2)

    def on_two():
        flags = ["--samples", 41, "--batch", 16, "--teacher-nfe", 2, "--compare"]
        outputs = ["--grid", tmp_path / "two.png", "--cache", tmp_path / "cache"]
        return two_processes(False, tmp_path / "two", *runs, *flags, *outputs)

    out = on_two()
    two = json.loads((tmp_path / "two.json").read_text())["rows"]
    for a, b in zip(one, two, strict=True):
        assert a["to_teacher"] == pytest.approx(b["to_teacher"], abs=1e-7)  # float32 samples
        same(a, b, 1e-6)
    assert out.count('{"results"') == 1
    on_two()
    assert json.loads((tmp_path / "two.json").read_text())["rows"] == two
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) == 3  # nothing measured twice


# ---- mistakes ------------------------------------------------------------------------------------


def test_what_is_no_run_is_left_out(toys, run, tmp_path):
    (tmp_path / "measured").mkdir()
    (tmp_path / "eval.jsonl").write_text("")
    others = [tmp_path / "measured", tmp_path / "eval.jsonl"]
    run(others[0], toys / "old", others[1], "--n", 20, "--teacher-nfe", 1)
    text = (tmp_path / "compare.md").read_text()
    assert "left out, no finished students: measured, eval.jsonl" in text


def test_a_missing_run_is_not_left_out(toys, run, tmp_path):
    with pytest.raises(UserError, match="gone: expected the folder of a run, found nothing"):
        run(toys / "old", tmp_path / "gone")


def test_no_run_at_all(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no student/distill.json"):
        run(tmp_path / "empty")


@pytest.mark.parametrize(
    "flags, expected",
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


# ---- what students record ------------------------------------------------------------------------


def test_students_record_their_training(scripts, tmp_path):
    flags = ["--teacher", "toy", "--gan", "--smoke", "--eval-n", 0, "--out", tmp_path / "run"]
    scripts.run("dmd2.py", *flags)
    record = json.loads((tmp_path / "run" / "student" / "distill.json").read_text())["training"]
    assert record["images"] == 20000
    assert list(record["networks"]) == ["student", "critic"]
    assert record["iterations"] == 3
    assert record["batch"] == 256
    assert record["seconds"] >= 0
    assert record["hardware"]
    assert record["dtype"] == "float32"
    parameters = sum(p.numel() for p in load_teacher("toy").copy().parameters())
    assert record["networks"]["student"] == parameters
    assert record["networks"]["critic"] > parameters
    # student turn: 3 of the student, 1 of teacher and critic each, 2 through the critic to x
    # critic turn: 3 on the samples and 6 of the GAN loss, 1 of the student where it has no turn
    # --smoke: student turns in iterations 0 and 2
    assert record["passes_per_iteration"] == pytest.approx(((7 + 9) + (1 + 9) + (7 + 9)) / 3)

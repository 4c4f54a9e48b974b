"""tools/export.py: the student of any checkpoint, also of a run that was stopped or is running."""

import json
import signal

import pytest
import torch
from helpers.cases import SCRIPTS, SECOND_FLAGS
from helpers.runs import QUICK, count_lines, wait_for
from safetensors.torch import load_file

from common import checkpoint as checkpoint_module
from common import files as files_module
from common.checkpoint import best_checkpoint, delete_oldest, list_checkpoints
from common.errors import UserError
from common.files import WEIGHTS, read_json, write_folder
from common.teachers.load import load_teacher
from common.teachers.students import network_of, read_student
from tools import export as export_module
from tools.export import export, export_temporary, find_checkpoint


def contents(folder):
    """{path: contents} of a student's folder, without what the clock says."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes() if path.suffix != ".json" else read_json(path)
        if name == "distill.json":
            for key in ("date", "seconds", "passes_per_iteration"):
                found[name]["training"].pop(key, None)
    return found


# ---- of every script -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_last_checkpoint_has_the_student_that_the_run_writes(script, scripts, tmp_path):
    """Bit for bit, with flags that make other networks: heads, experts, embeddings, averages."""
    run = tmp_path / "run"
    flags = [*QUICK, *SECOND_FLAGS[script], "--iters", 5, "--save-every", 3, "--out", run]
    scripts.run(f"{script}.py", *flags)
    last = export(run)
    assert last == run / "student-5"
    assert contents(last) == contents(run / "student")

    earlier = export(run, 3, tmp_path / "three")
    assert contents(earlier).keys() == contents(last).keys()
    info = read_json(earlier / "distill.json")
    assert info["training"]["iterations"] == 3
    assert contents(earlier) != contents(last)
    # it loads, and is the average at the third iteration, or the student where there is none
    home, info = read_student(earlier)
    teacher = load_teacher(info["teacher"])
    student = network_of(earlier, home, info, teacher, info["teacher"])
    saved = torch.load(run / "ckpt" / "it-00000003.pt", weights_only=True)["state"]
    averaged = saved["ema"]["model"] or saved["student"]
    assert averaged.keys() == student.state_dict().keys()
    for name, v in student.state_dict().items():
        assert torch.equal(v, averaged[name]), name


def test_of_a_lora(scripts, tmp_path):
    flags = ["--lora", 2, "--lora-targets", "inp", "--lora-alpha", 4, "--iters", 3]
    scripts.run("dmd2.py", *QUICK, *flags, "--out", tmp_path)
    assert contents(export(tmp_path)) == contents(tmp_path / "student")


def test_a_checkpoint_does_not_grow(scripts, tmp_path):
    """Its student is made of the tensors of its state, which are stored once."""
    scripts.run("dmd2.py", *QUICK, "--iters", 1, "--ema", 100, "--out", tmp_path)
    (path,) = list_checkpoints(tmp_path)
    payload = torch.load(path, weights_only=True)
    assert payload["student"][WEIGHTS]
    del payload["student"]
    torch.save(payload, tmp_path / "without.pt")
    assert path.stat().st_size < (tmp_path / "without.pt").stat().st_size + 20_000


# ---- of a run that goes on, or was stopped -------------------------------------------------------


def test_of_a_running_and_of_a_stopped_run(scripts, tmp_path):
    out = tmp_path / "run"
    args = ["dmd2.py", *QUICK, "--log-every", 1, "--save-every", 20, "--out", out]
    p = scripts.start(*args, "--iters", 100_000)
    wait_for(lambda: len(list_checkpoints(out)) == 2)
    p.kill(signal.SIGSTOP)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    home = export(out, to=tmp_path / "student")
    first = read_json(home / "distill.json")["training"]["iterations"]
    assert first == int(list_checkpoints(out)[-1].stem[3:])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    p.kill(signal.SIGCONT)
    lines = count_lines(out)
    wait_for(lambda: count_lines(out) > lines + 5)  # it was not disturbed
    p.kill(signal.SIGTERM)
    assert p.wait() == 143
    with pytest.raises(UserError, match=r"the run has not ended yet .*--it \d+, or python -m"):
        read_student(out)
    _, it = export_temporary(out, "best") if best_checkpoint(out) else export_temporary(out, None)
    assert it > first


# ---- the best checkpoint -------------------------------------------------------------------------


def make_checkpoints(out, scores, n=1000):
    """Checkpoints with scores {iteration: fd or None}."""
    (out / "ckpt").mkdir(parents=True, exist_ok=True)
    lines = []
    for it, fd in scores.items():
        (out / "ckpt" / f"it-{it:08d}.pt").write_bytes(b"")
        lines.append(json.dumps(dict(it=it, fd=fd, n=n)))
    (out / "eval.jsonl").write_text("\n".join([*lines, '{"it": 9, "fd"']))


def names(out):
    return [int(path.stem[3:]) for path in list_checkpoints(out)]


def test_the_best_checkpoint_is_kept_beside_the_two_newest(tmp_path):
    make_checkpoints(tmp_path, {10: 5.0, 20: 3.0, 30: 4.0, 40: None, 50: 3.5})
    delete_oldest(tmp_path)
    assert names(tmp_path) == [20, 40, 50]
    assert find_checkpoint(tmp_path, "best").name == "it-00000020.pt"
    assert find_checkpoint(tmp_path).name == "it-00000050.pt"


def test_evaluations_of_other_numbers_of_samples_do_not_count(tmp_path):
    make_checkpoints(tmp_path, {10: 5.0, 20: 3.0, 30: 4.0}, n=5000)
    assert best_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="--it best: .*--eval-every"):
        find_checkpoint(tmp_path, "best")


def test_a_new_best_is_saved_at_once(make_run, monkeypatch, tmp_path):
    """Evaluations at 2, 4, ..., 10, the best of them at 4; checkpoints are due at 5 and 10 only."""
    scores = iter([3.0, 1.0, 2.0, 2.5, 2.2])
    run = make_run("--eval-every", 2, "--save-every", 5, "--sample-every", 0, "--log-every", 100)
    teacher = load_teacher("toy")
    from training import report as report_module
    from training.ema import EMA

    def evaluate(*args, **kwargs):
        return dict(protocol="x", n=1000, energy_distance=next(scores))

    monkeypatch.setattr(report_module, "evaluate", evaluate)
    student = teacher.copy()
    report = report_module.Report(run, teacher, EMA(student, 0), None, {})
    state = dict(student=student)
    run.resume(state)
    seen = []
    for it in run.loop(0, 10):
        run.after(it, dict(loss=0.0), state, report)
        seen.append(names(run.out))
    assert seen[1] == [2]
    assert seen[3] == [2, 4]
    assert seen[4] == [4, 5]
    assert seen[9] == [4, 5, 10]
    assert find_checkpoint(run.out, "best").name == "it-00000004.pt"


# ---- mistakes ------------------------------------------------------------------------------------


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="expected the folder of a run with checkpoints"):
        find_checkpoint(tmp_path)
    make_checkpoints(tmp_path, {10: None, 20: None})
    for it in (7, "x", "-1", "1e1"):
        with pytest.raises(
            UserError, match=f"--it {it}: expected a checkpoint of .*: 10, 20 or best"
        ):
            find_checkpoint(tmp_path, it)


@pytest.mark.parametrize(
    "student, message",
    [
        (None, "expected a checkpoint that holds its student, found one without"),
        ({}, "expected a checkpoint that holds its student, found one without"),
        ({"../x.json": {}, "distill.json": {}}, "names and contents of files, found '../x.json'"),
        (
            {"/tmp/x.json": {}, "distill.json": {}},
            "names and contents of files, found '/tmp/x.json'",
        ),
        ({"x.safetensors": {"a": 1}, "distill.json": {}}, "found 'x.safetensors'"),
        ({"distill.json": [1]}, "found 'distill.json'"),
    ],
)
def test_checkpoints_of_others(student, message, tmp_path):
    make_checkpoints(tmp_path, {10: None})
    torch.save(dict(student=student), list_checkpoints(tmp_path)[0])
    with pytest.raises(UserError, match=message):
        export(tmp_path)
    assert not (tmp_path / "student-10").exists()


def test_a_damaged_checkpoint(tmp_path):
    make_checkpoints(tmp_path, {10: None})
    with pytest.raises(UserError, match="it-00000010.pt: not readable"):
        export(tmp_path)


def test_other_folders_are_not_overwritten(tmp_path, monkeypatch):
    record = dict(method="dmd2", teacher="toy", nfe=1, sampler={})
    files = {"distill.json": record}
    monkeypatch.setattr(export_module, "read_student_files", lambda path: files)
    make_checkpoints(tmp_path / "run", {10: None})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="--to .*mine: expected a new or empty folder"):
        export(tmp_path / "run", to=tmp_path / "mine")
    for _ in range(2):  # a student's folder is replaced
        assert export(tmp_path / "run") == tmp_path / "run" / "student-10"


# ---- folders -------------------------------------------------------------------------------------


def test_large_weights_are_several_files(tmp_path, monkeypatch):
    """diffusers loads them by the index."""
    from diffusers import DiTTransformer2DModel

    model = load_teacher("mnist")
    monkeypatch.setattr(files_module, "LARGEST_FILE", 10**6)
    write_folder(tmp_path, model.files())
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) > 1
    assert max(path.stat().st_size for path in parts) < 1.1e6
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path).state_dict()
    for name, v in model.net.state_dict().items():
        assert torch.equal(loaded[name], v), name


def test_small_weights_are_one_file(tmp_path):
    model = load_teacher("toy")
    write_folder(tmp_path, model.files())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    assert load_file(tmp_path / WEIGHTS).keys() == model.net.state_dict().keys()


def test_the_number_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "KEPT", 3)
    make_checkpoints(tmp_path, dict.fromkeys(range(1, 8)))
    delete_oldest(tmp_path)
    assert names(tmp_path) == [5, 6, 7]

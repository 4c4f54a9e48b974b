"""common/run.py without a script around it: random numbers, average, optimiser step, files."""

import ctypes
import json
import resource
import signal
import subprocess
import sys
import textwrap
import types

import pytest
import torch

import dmd2
from common.ema import EMA
from common.errors import RunError, did_you_mean
from common.files import ROOT, atomic, read_json, write_json
from common.report import evaluate_run, export
from common.rng import BatchRandom
from common.run import Run


@pytest.fixture
def run(tmp_path):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    made = []

    def make(*flags):
        made.append(
            Run(
                "dmd2",
                dmd2.parse_args(["--teacher", "toy", "--out", str(tmp_path / "out"), *flags]),
            )
        )
        return made[-1]

    yield make
    for r in made:
        r.lock.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)


class Box(torch.nn.Linear):
    def copy(self):
        twin = Box(self.in_features, self.out_features)
        twin.load_state_dict(self.state_dict())
        return twin


def test_draws_do_not_depend_on_the_number_of_processes():
    whole = BatchRandom(3, 7, 8)
    parts = [BatchRandom(3, 7, 8, rank, 4) for rank in range(4)]
    for draw in (
        lambda d: d.randn(2, 3),
        lambda d: d.randint(0, 1000),
        lambda d: d.rand(),
        lambda d: d.randn_like(torch.zeros(1, 5)),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(d) for d in parts]))
    assert len({d.shared_randint(0, 10**6) for d in (whole, *parts)}) == 1
    first = lambda seed, it: BatchRandom(seed, it, 8).normal(4)
    assert (
        torch.equal(first(1, 2), first(1, 2))
        and not torch.equal(first(1, 2), first(2, 1))
        and not torch.equal(first(1, 2), first(1, 3))
    )
    assert not torch.equal(
        whole.normal(4)[:4], whole.normal(4)[4:]
    )  # rows differ, and so do successive draws


def test_ema_halves_in_its_half_life():
    model = Box(1, 1)
    ema = EMA(model, 100)
    ema.images = 10**6  # long after the ramp-up
    with torch.no_grad():
        start = ema.model.weight.clone()
        model.weight += 1
    for _ in range(10):
        ema.update(10)
    assert torch.allclose(ema.model.weight, start + 0.5, atol=1e-6)
    off = EMA(model, 0)
    off.update(10)
    assert off.model is model and off.images == 10


def test_ema_state_goes_through_a_checkpoint():
    a, b = EMA(Box(2, 2), 50), EMA(Box(2, 2), 50)
    a.update(10)
    b.load_state_dict(a.state_dict())
    assert b.images == 10 and torch.equal(a.model.weight, b.model.weight)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(run):
    r, net = run(), torch.nn.Linear(3, 3)
    opt = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)

    def step(factor):
        (net(torch.ones(1, 3)).sum() * factor).backward()
        r.step(opt, 10.0)
        return torch.cat(
            [
                *(p.detach().flatten() for p in net.parameters()),
                *(v.flatten().float() for s in opt.state.values() for v in s.values()),
            ]
        )

    good = step(1.0)
    for factor in (float("nan"), float("inf")):
        assert torch.equal(step(factor), good)
    assert int(r.skipped) == 2 and all(p.grad is None for p in net.parameters())
    assert not torch.equal(step(1.0), good)
    healthy = torch.nn.Linear(1, 1)
    healthy_opt = torch.optim.AdamW(healthy.parameters(), fused=True)
    r.bar = types.SimpleNamespace(set_postfix=lambda *a, **k: None)
    for i in range(20):
        r.log(i, dict(loss=0.0))  # not yet
        step(float("nan"))
        healthy(torch.ones(1, 1)).sum().backward()
        r.step(healthy_opt, 10.0)  # the other network's good steps do not hide it
    with pytest.raises(RunError, match="20 steps in a row"):
        r.log(20, dict(loss=0.0))
    assert json.loads((r.out / "log.jsonl").read_text().splitlines()[-1])["skipped"] == 21


def test_clipping_is_by_global_norm(run):
    r, net = run(), torch.nn.Linear(3, 3)
    opt = torch.optim.SGD(net.parameters(), lr=1.0, fused=True)
    before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    (net(torch.ones(1, 3)).sum() * 100).backward()
    norm = r.step(opt, 0.5)
    after = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert norm.item() == pytest.approx(100 * 12**0.5) and (
        after - before
    ).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_freed_memory_is_kept():
    """Blocks of 64 MB, which glibc maps and unmaps by default: 16,384 pages each time. In a process of its own, as mallopt holds for the main arena, and an
    allocation that has failed once (tests of out of memory) moves its thread to another."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("glibc only")
    code = """
        import resource, sys, torch
        from common.run import keep_heap
        if sys.argv[1] == "kept":
            keep_heap()
        for i in range(30):
            if i == 15:  # the heap grows at first, by the luck of what lies between the blocks
                start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)"""
    kept, usual = [
        int(
            subprocess.run(
                [sys.executable, "-c", textwrap.dedent(code), how],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for how in ("kept", "usual")
    ]
    assert kept * 5 < usual, (kept, usual)


def test_gradients_are_summed_over_parts_of_the_batch(run):
    """SGD, which sees the size of a gradient: the step is that of the mean, clipped, and only the last part makes it."""
    r, net = run("--accumulate", "4"), torch.nn.Linear(2, 1, bias=False)
    start, opt = net.weight.detach().clone(), torch.optim.SGD(net.parameters(), lr=1.0, fused=True)
    x = torch.tensor(
        [[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [4.0, 5.0]]
    )  # its mean: (2, 2), of norm sqrt(8)
    for clip, expected in (
        (10.0, torch.tensor([[2.0, 2.0]])),
        (2.0**0.5, torch.tensor([[1.0, 1.0]])),
    ):
        seen, norms = [], []
        for it in r.loop(0, 1):
            seen.append((it, r.slot, r.stepped, r.due(it, 1), torch.equal(net.weight, start)))
            net(x[r.part]).sum().backward()
            norms.append(r.step(opt, clip))
            r.log(it, dict(part=r.part, norm=norms[-1], first=1.0 if r.part == 0 else None))
        assert seen == [(0, (i, 4), r.args.batch * (i == 3), i == 3, True) for i in range(4)]
        assert norms[:3] == [None] * 3 and norms[3].item() == pytest.approx(8**0.5)
        assert torch.allclose(start - net.weight, expected, atol=1e-5) and net.weight.grad is None
        start = net.weight.detach().clone()
    line = json.loads((r.out / "log.jsonl").read_text().splitlines()[-1])
    assert (
        line["part"] == 1.5
        and line["norm"] == pytest.approx(8**0.5, rel=1e-4)
        and "first" not in line
    )
    ema = EMA(box := Box(1, 1), 100)
    with torch.no_grad():
        box.weight += 1
    before = ema.model.weight.clone()
    ema.update(0)
    assert torch.equal(ema.model.weight, before) and ema.images == 0


def test_gradients_are_averaged_by_one_all_reduce(run, monkeypatch):
    """What two processes really compute: test_two_processes_equal_one of the scripts that use it."""
    r, net, calls = (
        run(),
        torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5), torch.nn.Linear(1, 1)),
        [],
    )
    net[1](net[0](torch.randn(4, 3))).square().sum().backward()  # the last layer has no gradient
    before = [p.grad.clone() for p in net[:2].parameters()]
    other = [torch.randn_like(g) for g in before]  # the other process
    monkeypatch.setattr(
        module.dist,
        "all_reduce",
        lambda flat: calls.append(1) or flat.add_(torch.cat([g.flatten() for g in other])),
    )
    r.average_gradients(list(net.parameters()))
    assert not calls and all(
        torch.equal(p.grad, g) for p, g in zip(net.parameters(), before)
    )  # one process: nothing to do
    r.world = 2
    r.average_gradients(net.parameters())
    assert len(calls) == 1 and all(
        torch.allclose(p.grad, (g + o) / 2) for p, g, o in zip(net.parameters(), before, other)
    )
    assert net[2].weight.grad is None


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        with atomic(path) as f:
            f.write(b"half")
            1 / 0
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_json(path, dict(a=1))
    assert read_json(path) == dict(a=1) == json.loads(path.read_text())


def test_a_full_disk_costs_the_checkpoint_but_not_the_run(run, capsys):
    r, state = run(), dict(net=torch.nn.Linear(100, 100))
    r.save(0, state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (10_000, hard)
    )  # files end after 10 kB, as on a full disk
    try:
        r.save(1, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint at iteration 2 not written" in capsys.readouterr().err
    assert [p.name for p in (r.out / "ckpt").iterdir()] == ["it-00000001.pt"]
    torch.load(r.checkpoints()[0], weights_only=True)


def test_two_checkpoints_are_kept_and_a_damaged_one_does_not_count(run):
    r, net = run(), torch.nn.Linear(2, 2)
    for it in range(4):
        r.save(it, dict(net=net))
    assert [p.name for p in r.checkpoints()] == ["it-00000003.pt", "it-00000004.pt"]
    r.checkpoints()[-1].write_bytes(b"PK")
    r.lock.close()
    again = run("--resume")
    assert again.resume(dict(net=net)) == 3
    again.finish(
        3, dict(net=net)
    )  # iteration 4 is written anew although a file of that name was there
    assert torch.load(again.checkpoints()[-1], weights_only=True)["it"] == 4


def test_a_death_before_the_oldest_checkpoint_was_removed(run):
    r, net = run(), torch.nn.Linear(2, 2)
    for it in range(3):
        r.save(it, dict(net=net))
    (r.out / "ckpt" / "it-00000001.pt").write_bytes(r.checkpoints()[0].read_bytes())
    r.lock.close()
    (r.out / "ckpt" / "it-copy.pt").write_bytes(b"")  # somebody else's
    assert run("--resume").resume(dict(net=net)) == 3
    assert [p.name for p in r.checkpoints()] == ["it-00000002.pt", "it-00000003.pt"]


def test_a_flipped_bit_of_a_checkpoint_is_found(run, capsys):
    """In the middle of a tensor: torch itself reads it without a word."""
    r, net = run(), torch.nn.Linear(50, 50)
    for it in range(2):
        r.save(it, dict(net=net))
    newest = r.checkpoints()[-1]
    data = bytearray(newest.read_bytes())
    data[data.find(net.weight.detach().numpy().tobytes()) + 5000] ^= 1
    newest.write_bytes(data)
    assert torch.load(newest, weights_only=True)["it"] == 2
    r.lock.close()
    again = run("--resume")
    assert (
        again.resume(dict(net=net)) == 1
        and "it-00000002.pt: not readable (BadZipFile)" in capsys.readouterr().err
    )


def test_only_our_own_leftovers_are_removed(run, tmp_path):
    for name in ("keep.tmp", "sub/keep.tmp", "samples/keep.png", "ckpt/it-00000001.pt.tmp"):
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    run().resume({})
    left = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert left == {"keep.tmp", "sub/keep.tmp", "samples/keep.png", ".lock", "run.jsonl"}


def test_flags_of_a_preset_can_be_overridden():
    assert (
        dmd2.parse_args(["--teacher", "toy"]).lr == 5e-4
        and dmd2.parse_args(["--teacher", "toy", "--lr", "1"]).lr == 1
    )
    smoke = dmd2.parse_args(["--teacher", "toy", "--smoke"])
    assert (smoke.iters, smoke.log_every, smoke.save_every) == (3, 1, 3)
    assert did_you_mean("toyy", ["toy", "mnist"]) == ", did you mean toy?"


def test_rates_of_a_stage(run):
    """span: warm-up and cooldown of one stage of the run; without it, of the whole run."""
    r, opt = (
        run("--iters", "8", "--warmup", "2", "--cooldown", "0.5"),
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0),
    )

    def rate(it, **kw):
        r.set_rates(it, (opt, 2.0), **kw)
        return opt.param_groups[0]["lr"]

    assert [rate(it) for it in range(8)] == pytest.approx([1, 2, 2, 2, 2, 1.5, 1, 0.5])
    assert [rate(it, span=(0, 4)) for it in range(4)] == pytest.approx([1, 2, 2, 1]) and [
        rate(it, span=(4, 8)) for it in range(4, 8)
    ] == pytest.approx([1, 2, 2, 1])
    assert [rate(it, span=(0, 8)) for it in range(8)] == [rate(it) for it in range(8)]


def test_two_writers_of_one_file(tmp_path):
    """Two runs that share a cache: each writes a file of its own, the last one stays, and nothing else does."""
    with atomic(tmp_path / "a") as one, atomic(tmp_path / "a") as two:
        one.write(b"1" * 10)
        two.write(b"2")
    assert (tmp_path / "a").read_bytes() == b"1" * 10 and len(list(tmp_path.iterdir())) == 1


def test_overwrite_leaves_nothing_of_the_old_run(run, tmp_path):
    r = run()
    r.save(0, dict(net=torch.nn.Linear(1, 1)))
    r.lock.close()
    old = (
        "student/expert-3/diffusion_pytorch_model.safetensors",
        "student/generator/distill.json",
        "student/distill.json",
        "control.json",
        "path.json",
        "eval.jsonl",
        "run.jsonl",
    )
    for name in (*old, "mine.json"):
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    again = run("--overwrite")
    assert (
        tmp_path / "out" / old[0]
    ).exists()  # until nothing can be wrong with the flags any more
    again.resume({})
    left = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert left == {"mine.json", ".lock", "run.jsonl"} and again.checkpoints() == []


def test_evaluations_that_a_resume_has_undone_are_replaced(run, monkeypatch):
    r, teacher = run(), types.SimpleNamespace(adapter="toy", evaluation={})
    (r.out / "eval.jsonl").write_text(
        "".join(json.dumps(dict(it=it)) + "\n" for it in (2, 6, 8)) + '{"it": 9, "half'
    )
    monkeypatch.setattr(metrics, "evaluate", lambda *a, **k: dict(protocol="x", n=8))
    evaluate_run(r, teacher, None, None, {}, 6, 8)
    assert [json.loads(line)["it"] for line in (r.out / "eval.jsonl").read_text().splitlines()] == [
        2,
        6,
    ]


def test_a_student_that_is_half_written_does_not_look_finished(run):
    r = run()
    r.note_start(0)
    (r.out / "student").mkdir()
    (r.out / "student" / "distill.json").write_text("{}")

    def save(*a):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        export(r, None, types.SimpleNamespace(whole=lambda: types.SimpleNamespace(save=save)), {})
    assert not (r.out / "student" / "distill.json").exists()

"""training/run.py: shares of the batch, steps, log, checkpoints and resume, without a script."""

import gc
import json
import resource
import types
import weakref

import pytest
import torch

from common.errors import RunError, UserError
from training.run import Run


def linear(n=2):
    return torch.nn.Linear(n, n)


def log_lines(run):
    return [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]


def without_bar(run):
    """Run.log outside of Run.loop, which makes the progress bar."""
    run.bar = types.SimpleNamespace(set_postfix=lambda *args, **kwargs: None)
    run.args.log_every = 1
    return run


# ---- the folder and the name ---------------------------------------------------------------------


def test_the_method_is_the_scripts_name(tmp_path, monkeypatch):
    """A copy of a script trains into its own folder, next to the copy."""
    import dmd2

    script = tmp_path / "mine.py"
    run = Run(str(script), dmd2.parse_args(["--teacher", "toy"]))
    run.close()
    assert run.method == "mine"
    assert run.out == tmp_path / "out" / "mine-toy"


# ---- --accumulate --------------------------------------------------------------------------------


def test_microsteps(make_run):
    """What each visit of an iteration is told; `step` and `due` wait for the last one."""
    run = make_run("--accumulate", 4)
    seen = []
    for it in run.loop(0, 1):
        seen.append((it, run.data_shard, run.images_stepped, run.due(it, 1)))
    batch = run.args.batch
    assert seen == [
        (0, (0, 4), 0, False),
        (0, (1, 4), 0, False),
        (0, (2, 4), 0, False),
        (0, (3, 4), batch, True),
    ]


@pytest.mark.parametrize("clip, expected", [(10.0, [2.0, 2.0]), (2.0**0.5, [1.0, 1.0])])
def test_gradients_are_means_over_microsteps(make_run, clip, expected):
    """SGD, which sees the size of a gradient. The mean of the rows is (2, 2), of norm sqrt(8)."""
    run = make_run("--accumulate", 4)
    net = torch.nn.Linear(2, 1, bias=False)
    opt = torch.optim.SGD(net.parameters(), lr=1.0, fused=True)
    start = net.weight.detach().clone()
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [4.0, 5.0]])
    norms = []
    for _ in run.loop(0, 1):
        assert torch.equal(net.weight, start)
        net(x[run.microstep]).sum().backward()
        norms.append(run.step(opt, clip))
    assert norms[:3] == [None] * 3
    assert norms[3].item() == pytest.approx(8**0.5)
    assert torch.allclose(start - net.weight, torch.tensor([expected]), atol=1e-5)
    assert net.weight.grad is None


def test_values_are_means_over_microsteps(make_run):
    run = make_run("--accumulate", 4)
    for it in run.loop(0, 1):
        first = 1.0 if run.microstep == 0 else None
        run.log(it, dict(microstep=run.microstep, first=first))
    line = log_lines(run)[-1]
    assert line["microstep"] == 1.5
    assert line["first"] == 1.0  # the mean over those that have it


# ---- steps ---------------------------------------------------------------------------------------


def test_one_networks_good_steps_do_not_hide_anothers_bad_ones(make_run):
    run = without_bar(make_run())
    broken, healthy = linear(), linear()
    opt_broken = torch.optim.AdamW(broken.parameters(), fused=True)
    opt_healthy = torch.optim.AdamW(healthy.parameters(), fused=True)
    for it in range(20):
        run.log(it, dict(loss=0.0))  # raises nothing yet
        (broken(torch.ones(1, 2)).sum() * float("nan")).backward()
        run.step(opt_broken, 10.0)
        healthy(torch.ones(1, 2)).sum().backward()
        run.step(opt_healthy, 10.0)
    with pytest.raises(RunError, match="20 steps in a row"):
        run.log(20, dict(loss=0.0))
    assert log_lines(run)[-1]["skipped"] == 19


def test_gradients_are_averaged_by_one_all_reduce(make_run, monkeypatch):
    """What two processes compute: test_two_processes_equal_one of the scripts that use it."""
    run = make_run()
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5), torch.nn.Linear(1, 1))
    net[1](net[0](torch.randn(4, 3))).square().sum().backward()  # the last layer has no gradient
    mine = [p.grad.clone() for p in net[:2].parameters()]
    other = [torch.randn_like(g) for g in mine]  # of the other process
    calls = []

    def all_reduce(flat):
        calls.append(flat)
        flat += torch.cat([g.flatten() for g in other])

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    run.average_gradients(net.parameters())
    assert not calls  # one process: nothing to do
    for p, g in zip(net.parameters(), mine):
        assert torch.equal(p.grad, g)

    run.world = 2
    run.average_gradients(net.parameters())
    assert len(calls) == 1
    for p, a, b in zip(net.parameters(), mine, other):
        assert torch.allclose(p.grad, (a + b) / 2)
    assert net[2].weight.grad is None


def test_rates_of_a_run_and_of_a_stage(make_run):
    run = make_run("--iters", 8, "--warmup", 2, "--cooldown", 0.5)
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)

    def rate(it, **span):
        run.set_rates(it, (opt, 2.0), **span)
        return opt.param_groups[0]["lr"]

    whole = [rate(it) for it in range(8)]
    assert whole == pytest.approx([1, 2, 2, 2, 2, 1.5, 1, 0.5])
    assert [rate(it, span=(0, 8)) for it in range(8)] == whole
    assert [rate(it, span=(0, 4)) for it in range(4)] == pytest.approx([1, 2, 2, 1])
    assert [rate(it, span=(4, 8)) for it in range(4, 8)] == pytest.approx([1, 2, 2, 1])


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_full_disk_costs_the_checkpoint_but_not_the_run(make_run, capsys):
    run = make_run()
    state = dict(net=linear(100))
    run.save(0, state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # files end after 10 kB
    try:
        run.save(1, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint at iteration 2 not written" in capsys.readouterr().err
    assert [p.name for p in (run.out / "ckpt").iterdir()] == ["it-00000001.pt"]
    torch.load(run.checkpoints()[0], weights_only=True)


def test_two_checkpoints_are_kept(make_run):
    run = make_run()
    for it in range(4):
        run.save(it, dict(net=linear()))
    assert [p.name for p in run.checkpoints()] == ["it-00000003.pt", "it-00000004.pt"]


def test_a_damaged_checkpoint_does_not_count(make_run):
    net = linear()
    run = make_run()
    for it in range(4):
        run.save(it, dict(net=net))
    run.checkpoints()[-1].write_bytes(b"PK")
    run.close()
    again = make_run("--resume")
    assert again.resume(dict(net=net)) == 3
    again.finish(3, dict(net=net))  # written anew although a file of that name was there
    assert torch.load(again.checkpoints()[-1], weights_only=True)["it"] == 4


def test_a_flipped_bit_is_found(make_run, capsys):
    """In the middle of a tensor: torch itself reads it without a word."""
    net = linear(50)
    run = make_run()
    for it in range(2):
        run.save(it, dict(net=net))
    newest = run.checkpoints()[-1]
    data = bytearray(newest.read_bytes())
    start = data.find(net.weight.detach().numpy().tobytes())
    data[start + 5000] ^= 1
    newest.write_bytes(data)
    assert torch.load(newest, weights_only=True)["it"] == 2
    run.close()
    assert make_run("--resume").resume(dict(net=net)) == 1
    assert "it-00000002.pt: not readable (BadZipFile)" in capsys.readouterr().err


def test_a_kill_before_the_oldest_checkpoint_was_removed(make_run):
    net = linear()
    run = make_run()
    for it in range(3):
        run.save(it, dict(net=net))
    (run.out / "ckpt" / "it-00000001.pt").write_bytes(run.checkpoints()[0].read_bytes())
    (run.out / "ckpt" / "it-copy.pt").write_bytes(b"")  # somebody else's
    run.close()
    assert make_run("--resume").resume(dict(net=net)) == 3
    assert [p.name for p in run.checkpoints()] == ["it-00000002.pt", "it-00000003.pt"]


def test_moments_of_other_shapes_are_refused(make_run):
    """torch compares the number of parameters of an optimiser, not their shapes."""

    def trained(n):
        net = linear(n)
        opt = torch.optim.AdamW(net.parameters(), fused=True)
        net(torch.ones(1, n)).sum().backward()
        opt.step()
        return opt

    run = make_run()
    run.save(0, dict(opt=trained(3)))
    run.close()
    with pytest.raises(UserError, match="does not fit the networks.*expected moments of shape"):
        make_run("--resume").resume(dict(opt=trained(2)))


def test_random_numbers_of_an_iteration_seed_torch_too(make_run):
    run = make_run()
    run.draw(3)
    a = torch.rand(2)
    run.draw(4)
    b = torch.rand(2)
    run.draw(3)
    assert torch.equal(torch.rand(2), a)
    assert not torch.equal(a, b)


def test_a_network_that_a_script_replaces_is_freed(run):
    """msd.py replaces its students at each stage."""
    net = torch.nn.Linear(2, 2)
    made = run()
    made.print_summary(student=net)
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None

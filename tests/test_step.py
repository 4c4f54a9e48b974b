"""Run.step: a gradient that is not finite leaves weights and moments untouched and is counted."""

from types import SimpleNamespace

import pytest
import torch

from common.run import Run


def stepper():
    """A stand-in for Run with what step() reads, and step(opt)."""
    args = SimpleNamespace(shard=False, accumulate=1)
    run = SimpleNamespace(bad={}, skipped=0, is_last_microstep=True, args=args)
    return run, lambda opt: Run.step(run, opt, 1.0)


def linear():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    return list(net.parameters())


def set_grads(params, value):
    for p in params:
        p.grad = torch.full_like(p, value)


def counts(run):
    """Bad steps in a row by optimiser, and in all."""
    return [int(n) for n in run.bad.values()], int(run.skipped)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_non_finite_gradient_leaves_weights_and_moments(poison):
    """1e38: every entry is finite, but their norm is not."""
    params = linear()
    opt = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1, fused=True)
    run, step = stepper()

    def state():
        """Weights, step counts and both moments."""
        return [v.clone() for p in params for v in (p, *opt.state[p].values())]

    for _ in range(3):
        set_grads(params, 0.5)
        step(opt)
    before = state()
    for n in (1, 2):
        set_grads(params, 0.5)
        params[0].grad[0].fill_(poison)
        assert not step(opt).isfinite()
        assert counts(run) == ([n], n)
        assert all(torch.equal(a, b) for a, b in zip(before, state()))
        assert all(p.grad is None for p in params)
    set_grads(params, 0.5)
    step(opt)
    assert counts(run) == ([0], 2)
    assert not torch.equal(params[0], before[0])
    assert all(p.isfinite().all() for p in params)


def test_skipped_step_leaves_no_trace():
    """Five good steps equal five good steps with a bad one in between, bit for bit."""
    ends = []
    for poison_at in (None, 2):
        params = linear()
        opt = torch.optim.AdamW(params, lr=0.1, fused=True)
        _, step = stepper()
        for i in range(5):
            if i == poison_at:
                set_grads(params, float("nan"))
                step(opt)
            set_grads(params, 0.1 * (i + 1))
            step(opt)
        ends.append(params[0].detach().clone())
    assert torch.equal(*ends)


def test_a_first_step_that_is_bad():
    p = torch.nn.Parameter(torch.ones(4))
    opt = torch.optim.AdamW([p], lr=0.1, fused=True)
    run, step = stepper()
    p.grad = torch.full((4,), float("nan"))
    step(opt)
    assert torch.equal(p.detach(), torch.ones(4))
    assert int(run.skipped) == 1

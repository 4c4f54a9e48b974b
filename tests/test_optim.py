"""training/optim.py: clipping, and steps whose gradient is not finite."""

import pytest
import torch

from training.optim import clipped_step, rate_factor


def linear():
    torch.manual_seed(0)
    return list(torch.nn.Linear(4, 3).parameters())


def set_grads(params, value):
    for p in params:
        p.grad = torch.full_like(p, value)


def optimiser_state(opt, params):
    """Weights, step counts and both moments."""
    return [v.clone() for p in params for v in (p, *opt.state[p].values())]


def test_clipping_is_by_the_global_norm():
    params = linear()
    before = torch.cat([p.detach().flatten().clone() for p in params])
    set_grads(params, 100.0)
    norm, bad = clipped_step(torch.optim.SGD(params, lr=1.0, fused=True), clip=0.5)
    after = torch.cat([p.detach().flatten() for p in params])
    assert norm.item() == pytest.approx(100 * 15**0.5)
    assert bad == 0
    assert (after - before).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_a_small_gradient_is_not_clipped():
    params = linear()
    before = params[0].detach().clone()
    set_grads(params, 0.01)
    clipped_step(torch.optim.SGD(params, lr=1.0, fused=True), clip=10.0)
    assert torch.allclose(before - params[0], torch.full_like(before, 0.01), atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_a_gradient_that_is_not_finite_changes_nothing(poison):
    """1e38: every entry is finite, but their norm is not."""
    params = linear()
    opt = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(3):
        set_grads(params, 0.5)
        clipped_step(opt, 1.0)
    before = optimiser_state(opt, params)
    set_grads(params, 0.5)
    params[0].grad[0].fill_(poison)
    norm, bad = clipped_step(opt, 1.0)
    assert not norm.isfinite()
    assert bad == 1
    for a, b in zip(before, optimiser_state(opt, params), strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in params)


def test_a_skipped_step_leaves_no_trace():
    """Five good steps equal five good steps with a bad one in between, bit for bit."""
    ends = []
    for poison_at in (None, 2):
        params = linear()
        opt = torch.optim.AdamW(params, lr=0.1, fused=True)
        for i in range(5):
            if i == poison_at:
                set_grads(params, float("nan"))
                clipped_step(opt, 1.0)
            set_grads(params, 0.1 * (i + 1))
            clipped_step(opt, 1.0)
        ends.append(params[0].detach().clone())
    assert torch.equal(*ends)


def test_the_first_step_may_be_skipped():
    p = torch.nn.Parameter(torch.ones(4))
    opt = torch.optim.AdamW([p], lr=0.1, fused=True)
    p.grad = torch.full((4,), float("nan"))
    clipped_step(opt, 1.0)
    assert torch.equal(p.detach(), torch.ones(4))


def test_rate_factor():
    constant = [rate_factor(it, 0, 4, warmup=0, cooldown=0.0) for it in range(4)]
    assert constant == [1, 1, 1, 1]
    factors = [rate_factor(it, 0, 8, warmup=4, cooldown=0.25) for it in range(8)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5])

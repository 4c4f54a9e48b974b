"""Optimiser steps of a traced run against gradients and updates computed apart from it."""

import torch


def set_weights(trace, step):
    """The networks of a run as they were before one of its optimiser steps."""
    for name, net in trace.networks().items():
        vector = step.before[name]
        start = 0
        for p in net.parameters():
            p.data.copy_(vector[start : start + p.numel()].view_as(p))
            start += p.numel()
        assert start == len(vector), name


def gradient(loss, net):
    """d loss / d parameters of a network as one float64 vector; 0 where there is none."""
    params = list(net.parameters())
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]
    return torch.cat([g.flatten() for g in found]).double()


def difference(a, b):
    """|a - b| / |b| of two vectors."""
    return ((a - b).norm() / b.norm()).item()


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019) in float64, after clipping to a norm."""

    def __init__(self, lr, betas, weight_decay, clip):
        self.lr, self.betas, self.decay, self.clip = lr, betas, weight_decay, clip
        self.m = self.v = 0.0
        self.n = 0

    def step(self, w, g):
        """Weights after a step from w with gradient g."""
        g = g / max(1.0, g.norm().item() / self.clip)
        b1, b2 = self.betas
        self.n += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m, v = self.m / (1 - b1**self.n), self.v / (1 - b2**self.n)
        return w.double() * (1 - self.lr * self.decay) - self.lr * m / (v.sqrt() + 1e-8)


def compare_iterations(trace, iterations, optimisers, tolerance=2e-5):
    """Every optimiser step of a trace: gradients to `tolerance` (relative), weights after it.

    iterations(it) -> {role: loss}, in the order of the steps, from networks that stand as they did
    at the start of iteration `it`. optimisers: {role: AdamW}.
    """
    rest = list(trace)
    it = 0
    while rest:
        set_weights(trace, rest[0])
        for role, loss in iterations(it).items():
            step = rest.pop(0)
            assert step.role == role
            expected = gradient(loss, trace.networks()[role])
            found = torch.cat([g.flatten() for g in step.grads[role]]).double()
            assert expected.norm() > 0
            assert difference(found, expected) < tolerance, (it, role)
            after = optimisers[role].step(step.before[role], found)
            moved = after - step.before[role].double()
            assert difference(step.after[role].double() - step.before[role], moved) < 1e-3, role
        it += 1
    return it

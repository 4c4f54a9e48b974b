"""Optimiser steps of a traced run against gradients and updates computed apart from it."""

import itertools
import json
from collections.abc import Generator

import pytest
import torch
import torch.nn as nn

from common import lora
from common.model import Model
from common.rng import PerImageNoise
from common.schedules import EDM, VP, Flow, TrigFlow, expand
from common.teachers.students import sampler_of
from common.teachers.toy import MLP, Toy
from training.run import Run


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
    """Decoupled weight decay (Loshchilov and Hutter, 2019) in float64, after clipping to a norm.

    lr: a number, or a list with one for each step.
    """

    def __init__(self, lr, betas, weight_decay, clip):
        self.lr, self.betas, self.decay, self.clip = lr, betas, weight_decay, clip
        self.m = self.v = 0.0
        self.n = 0

    def step(self, w, g, factor=1.0):
        """Weights after a step from w with gradient g. factor: on the learning rate."""
        g = g / max(1.0, g.norm().item() / self.clip)
        b1, b2 = self.betas
        self.n += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m, v = self.m / (1 - b1**self.n), self.v / (1 - b2**self.n)
        lr = factor * (self.lr[self.n - 1] if isinstance(self.lr, list) else self.lr)
        return w.double() * (1 - lr * self.decay) - lr * m / (v.sqrt() + 1e-8)


def rates(lr, iters, warmup, cooldown):
    """lr in each iteration: up from lr / warmup, and down to 0 in the last share `cooldown`."""
    up = [min(1.0, (it + 1) / max(warmup, 1)) for it in range(iters)]
    down = [min(1.0, (1 - it / iters) / max(cooldown, 1e-9)) for it in range(iters)]
    return [lr * a * b for a, b in zip(up, down)]


def average(trace, halflife, batch):
    """The student's average after a run whose every step is the student's, float64."""
    mean = trace[0].before["student"].double()
    for n, step in enumerate(trace, 1):
        share = 0.5 ** (batch / min(halflife, 0.05 * n * batch))  # EDM's ramp-up of 5 %
        mean = share * mean + (1 - share) * step.after["student"].double()
    return mean


def compare_iterations(
    trace, iterations, optimisers, tolerance=2e-5, together=None, factor=lambda it: 1.0
):
    """Every optimiser step of a trace: gradients to `tolerance` (relative), weights after it.

    iterations(it) -> {role: loss}, or pairs of them, in the order of the steps, from networks that
    stand as they did at the start of iteration `it`. A loss may be a function without arguments,
    which is called with the networks as they stand before its step; so is a generator of pairs.
    optimisers: {role: AdamW}. factor(it): on their rates.
    together: {role: names} of networks that one optimiser steps, and clips to one norm.
    """
    rest = list(trace)
    it = 0
    while rest:
        set_weights(trace, rest[0])
        turns = iterations(it)
        for role, loss in turns.items() if isinstance(turns, dict) else turns:
            step = rest.pop(0)
            assert step.role == role
            if callable(loss):
                set_weights(trace, step)
                loss = loss()
            names = (together or {}).get(role, [role])
            parts = [gradient(loss, trace.networks()[name]) for name in names]
            grads = [g for name in names for g in step.grads[name]]
            weights = [p for name in names for p in trace.networks()[name].parameters()]
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, grads)]
            expected, found = torch.cat(parts), torch.cat([g.flatten() for g in found]).double()
            before = torch.cat([step.before[name] for name in names])
            after = torch.cat([step.after[name] for name in names])
            assert expected.norm() > 0
            assert difference(found, expected) < tolerance, (it, role)
            moved = optimisers[role].step(before, found, factor(it)) - before.double()
            # a weight without gradient stays, without decay
            used = [torch.full((p.numel(),), g is not None) for p, g in zip(weights, grads)]
            moved = torch.where(torch.cat(used), moved, 0.0)
            assert difference(after.double() - before, moved) < 1e-3, role
            if rest and isinstance(turns, Generator):
                set_weights(trace, rest[0])
        it += 1
    return it


def compare_logs(lines, logs):
    """Numbers in the lines of log.jsonl of a run. logs: [{name: 0-d tensor or number}, ...]."""
    for line, expected in zip(lines, logs, strict=True):
        numbers = {name: torch.as_tensor(value).item() for name, value in expected.items()}
        assert {n: line.get(n) for n in numbers} == pytest.approx(numbers, rel=2e-4, abs=2e-6)


# ---- teachers of any schedule --------------------------------------------------------------------


class AnySchedule(Toy):
    """A toy whose network takes the times of any schedule. Its own estimate is the exact one."""

    def predict(self, x, t, cond):
        return self.net(
            x.to(self.net.inp.weight.dtype), 1 + t / self.schedule.t_max, cond["labels"]
        )


SCHEDULES = dict(
    edm=(lambda: EDM(0.01, 20.0, 0.714), "edm", 0.714),
    vp=(VP, "eps", 0.5),
    flow=(Flow, "flow", 0.5),
    trigflow=(lambda: TrigFlow(0.7), "trigflow", 0.7),
)


def any_toy(kind):
    """toy-cond with a small untrained network and a schedule of this kind. Frozen."""
    schedule, prediction, sigma_data = SCHEDULES[kind]
    torch.manual_seed(3)
    net = MLP(width=32)
    toy = AnySchedule(
        net, schedule(), prediction, (2,), 8, sigma_data=sigma_data, exact=True, labelled=True
    )
    return toy.requires_grad_(False)


def wake(net, seed=5):
    """Moves all weights: inputs and adapters that start at zero then have an effect."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return net


def start_awake(monkeypatch):
    """New inputs, with the network around them, and adapters are moved as soon as they are made.

    -> list that grows by the seed of torch's generator with which an input was made.
    """
    extend, add_adapters = Model.extend, lora.add_adapters
    count = itertools.count()
    seeds = []

    def extend_awake(model, *names):
        seeds.append(torch.initial_seed())
        return wake(extend(model, *names), next(count))

    def add_awake(net, spec):
        net, weights = add_adapters(net, spec)
        return wake(net, next(count)), weights

    monkeypatch.setattr(Model, "extend", extend_awake)
    monkeypatch.setattr(lora, "add_adapters", add_awake)
    return seeds


def vp_ratios():
    """sigma / alpha of Stable Diffusion's 1000 times, rising."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - beta).cumprod(0)
    return ((1 - abar) / abar).sqrt()


def level_of(schedule, alpha, sigma):
    """alpha and sigma of a schedule at this sigma / alpha, within its range."""
    if isinstance(schedule, EDM):
        sigma = (sigma / alpha).clamp(schedule.t_min, schedule.t_max)
        return torch.ones_like(sigma), sigma
    if isinstance(schedule, VP):
        ratios = vp_ratios()
        ratio = (sigma / alpha).clamp(ratios[0], ratios[-1])
        return 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
    if isinstance(schedule, Flow):
        return alpha / (alpha + sigma), sigma / (alpha + sigma)
    norm = (alpha**2 + (sigma / schedule.sigma_data) ** 2).sqrt()
    return alpha / norm, sigma / norm


def weight_of(prediction, alpha, sigma, sigma_data):
    """That makes the squared error of x0 a network's own loss. alpha, sigma: on its schedule."""
    if prediction == "edm":
        return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (alpha / sigma) ** 2 if prediction == "eps" else sigma**-2


class Tiny(Toy):
    """A small labelled network of points in place of a teacher, of any schedule and prediction.

    Its copies, the students and critics, begin with other weights than its own, adapters too: a
    first gradient of equal networks, or of layers that start at zero, hides most mistakes.
    """

    def __init__(self, schedule, prediction):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = MLP(width=16)
        super().__init__(net, schedule, prediction, (2,), 8, sigma_data=0.7, labelled=True)
        self.requires_grad_(False)
        self.copies = 0
        self.is_teacher = True

    def predict(self, x, t, cond):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x = x * expand((alpha**2 + sigma**2).rsqrt(), x).to(x.dtype)
        return self.net(x, t / self.schedule.t_max + 0.05, cond["labels"])

    def copy(self, adapters=None, changes=None):
        twin = super().copy(adapters, changes)
        if self.is_teacher:
            self.copies += 1
            generator = torch.Generator().manual_seed(self.copies)
            for p in twin.parameters():
                p.data += 0.1 * torch.randn(p.shape, generator=generator)
        twin.is_teacher = False
        return twin


# ---- which passes are the trained ones -----------------------------------------------------------


class Wrapped(nn.Module):
    """As DDP is: without the attributes of the module in it. Counts its calls."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = {True: 0, False: 0}  # with and without gradient

    def forward(self, *args, **kwargs):
        self.calls[torch.is_grad_enabled()] += 1
        return self.module(*args, **kwargs)


def wrap_trained(monkeypatch):
    """run.train returns `Wrapped`. -> list that grows by one with each."""
    wrapped = []

    def train(run, module, **kwargs):
        wrapped.append(Wrapped(module))
        return wrapped[-1]

    monkeypatch.setattr(Run, "train", train)
    return wrapped


# ---- the average, and the sampler of distill.json ------------------------------------------------


def samples_of_record(report, n=6):
    """Samples of a finished run as others make them: by the script and the values in distill.json.

    report: Report of the run. -> samples [n, *shape], noise as its sampler drew it, cond.
    """
    record = json.loads(json.dumps(report.record(1)))
    student = report.ema.model
    cond = student.encode(torch.arange(n) % student.classes)
    noise = PerImageNoise(0, range(n))
    sample = sampler_of(report.run.out, record)
    draw = lambda: noise(*student.shape)
    x = sample(student, draw(), cond, record["nfe"], draw, **record["sampler"])
    assert not x.requires_grad
    again = PerImageNoise(0, range(n))
    return x, lambda: again(*student.shape), cond


def compare_average(trace, halflife, role="student", batch=16):
    """Average of a student's weights after a run: its half-life grows to 5 % of the images."""
    steps = [step for step in trace if step.role == role]
    mean = steps[0].before[role].double()
    for n, step in enumerate(steps, 1):
        beta = 0.5 ** (batch / min(halflife, 0.05 * n * batch))
        mean = beta * mean + (1 - beta) * step.after[role]
    live = steps[-1].after[role].double()
    found = torch.cat([p.detach().flatten() for p in trace.ema.model.parameters()]).double()
    assert difference(mean, live) > 1e-5  # the average is not the student itself
    assert difference(found - live, mean - live) < 1e-2


def sample_by_record(trace, script, seed=1):
    """What the student's record (distill.json) says of sampling, done with its average.

    -> samples of all 9 labels, their noises [5 tensors of 9 points] and labels.
    """
    record = json.loads(json.dumps(trace.distill))
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(9, 2, generator=generator) for _ in range(5)]
    later = iter(noises[1:])
    cond = dict(labels=torch.arange(9))
    student, nfe, sampler = trace.ema.model, record["nfe"], record["sampler"]
    x = script.sample(student, noises[0], cond, nfe, later.__next__, **sampler)
    assert not x.requires_grad
    return x, noises, cond

"""Gaussian data, for which every network that a method needs is known in closed form (float64)."""

import torch
import torch.nn as nn

from common.model import Model
from common.schedules import Flow, expand


def f64(*values):
    """float64 tensor: 0-d of one number, 1-d of several; a tensor or a list keeps its shape."""
    if len(values) == 1:
        values = values[0]
    return torch.as_tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    """float64 noise [*shape], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def full(value, n):
    """float64 [n], each `value`."""
    return torch.full((n,), value, dtype=torch.float64)


def labels(*values):
    """cond of samples with these labels."""
    return dict(labels=torch.tensor(values, dtype=torch.int64))


def relative_error(found, expected):
    """|found - expected| / |expected|, a number."""
    return ((found - expected).norm() / expected.norm()).item()


class Gauss(nn.Module):
    """The denoiser E[x | x_t] of data x ~ N(mean, std^2 I), in place of a trained network.

    It is called like a Model, at any (alpha, sigma). mean, std: one number, or one a label, chosen
    by cond["labels"]; label 0 is the unconditional data. mean is a parameter, so that a test can
    see who receives gradient.
    """

    classes = 0
    dtype = torch.float64
    sharding = None

    guided = Model.guided
    cond_and_uncond = Model.cond_and_uncond
    unconditional = Model.unconditional

    def __init__(self, mean=0.0, std=1.0, schedule=None):
        super().__init__()
        self.mean = nn.Parameter(f64(mean))
        self.std = f64(std)
        self.schedule = schedule or Flow()
        self.inputs = []  # x_t of every call
        self.null_calls = 0

    def forward(self, x_t, alpha, sigma, cond):
        self.inputs.append(x_t)
        mean, std = self.moments(x_t, cond)
        a = expand(alpha, x_t)
        s = expand(sigma, x_t)
        variance = a**2 * std**2 + s**2
        x0 = (std**2 * a * x_t + s**2 * mean) / variance
        return x0.to(x_t.dtype)

    def moments(self, x, cond):
        """mean and std of the data, shaped to x [B, ...]."""
        mean, std = self.mean, self.std
        if mean.ndim:
            mean = expand(mean[cond["labels"]], x)
        if std.ndim:
            std = expand(std[cond["labels"]], x)
        return mean, std

    def null(self, n):
        self.null_calls += 1
        return labels(*[0] * n)


class GaussConsistency(Gauss):
    """The exact consistency function: the end (sigma = 0) of the probability-flow ODE at x_t."""

    def forward(self, x_t, alpha, sigma, cond):
        self.inputs.append(x_t)
        mean, std = self.moments(x_t, cond)
        a = expand(alpha, x_t)
        s = expand(sigma, x_t)
        variance = a**2 * std**2 + s**2
        x0 = mean + std / variance.sqrt() * (x_t - a * mean)
        return x0.to(x_t.dtype)


class GaussFlow:
    """The same data on the straight path x_t = (1 - t) x0 + t eps. x [B, ...]; t, r: [B] or 0-d."""

    def __init__(self, mean=0.0, std=1.0):
        self.mean = mean
        self.std = std

    def variance(self, t):
        return t**2 + (1 - t) ** 2 * self.std**2

    def velocity(self, x, t):
        """v(x, t) = E[eps - x0 | x_t = x]."""
        t = expand(t, x)
        slope = (t - (1 - t) * self.std**2) / self.variance(t)
        return slope * (x - (1 - t) * self.mean) - self.mean

    def score(self, x, t):
        """Gradient of the log density of x_t."""
        t = expand(t, x)
        return -(x - (1 - t) * self.mean) / self.variance(t)

    def flow_map(self, x, t, r):
        """Where the ODE dx/dt = v that passes x at time t is at time r."""
        t = expand(t, x)
        r = expand(r, x)
        growth = (self.variance(r) / self.variance(t)).sqrt()
        return (1 - r) * self.mean + growth * (x - (1 - t) * self.mean)

    def mean_velocity(self, x, t, r):
        """F(x, t, r): mean of v along the ODE from t to r; v itself where r = t."""
        gap = expand(t - r, x)
        moves = gap > 0
        mean = (x - self.flow_map(x, t, r)) / torch.where(moves, gap, 1)
        return torch.where(moves, mean, self.velocity(x, t))

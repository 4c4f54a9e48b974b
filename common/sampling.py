"""Sampling from teachers and students."""

import functools
import math

import torch

from common.rng import PerImageNoise
from common.schedules import initial_noise

TEACHER_NFE = 16  # Euler steps of the teacher row in sample grids


@torch.no_grad()
def teacher_sample(teacher, z, cond, nfe, cfg=1.0, heun=False):
    """Deterministic sampler of the probability-flow ODE, from pure noise to data.

    First order: x_s = alpha_s x0 + sigma_s eps, which is Euler for flow teachers and DDIM for VP
    and EDM teachers. heun: second order on the same grid, with two evaluations per step except in
    the last. nfe counts the steps; guidance (cfg other than 1) doubles the passes of each.
    z: unit noise [B, *shape] -> samples [B, *shape].
    """
    schedule = teacher.schedule
    times = sampling_times(schedule, nfe)
    alpha = [*schedule.alpha(times), torch.tensor(1.0)]  # the last level is clean data
    sigma = [*schedule.sigma(times), torch.tensor(0.0)]

    def denoise(x, i):
        return teacher.guided(x.to(z.dtype), alpha[i], sigma[i], cond, cfg).double()

    def step(x, x0, i):
        """From level i to level i + 1."""
        return alpha[i + 1] * x0 + sigma[i + 1] / sigma[i] * (x - alpha[i] * x0)

    x = initial_noise(schedule, times[0], z.double())
    for i in range(nfe):
        x0 = denoise(x, i)
        if heun and i < nfe - 1:
            # the mean of the estimates at both ends: Heun's rule for the velocity
            x0 = (x0 + denoise(step(x, x0, i), i + 1)) / 2
        x = step(x, x0, i)
    return x.to(z.dtype)


def sampling_times(schedule, nfe):
    """Times of the nfe evaluations, from noise to data. The last step ends at clean data."""
    if schedule.unit_norm:  # VP: evenly spaced indices
        return torch.linspace(schedule.t_max, 0, nfe + 1, dtype=torch.float64)[:-1]
    if schedule.config["name"] == "edm":  # EDM eq. (5), for which two levels are the least
        return schedule.grid(max(nfe, 2)).flip(0)[:nfe]
    return schedule.grid(nfe).flip(0)


def generate(sampler, model, n, seed=0, batch=250, rank=0, world=1, first=0, classes=None):
    """Yields (indices, labels, samples) of this rank, batch by batch, for images `first` to n - 1.

    Image i has label i % classes (default: all of the model's) and noise that depends on (seed, i)
    only, so it is the same for any batch size and any number of processes.
    sampler(model, z, cond, noise) -> samples; noise() returns the next noise of the same images.
    """
    device = next(model.parameters()).device
    classes = classes or max(model.classes, 1)
    for indices in split_indices(torch.arange(first + rank, n, world), n - first, batch, world):
        noise = functools.partial(PerImageNoise(seed, indices.tolist(), device), *model.shape)
        labels = indices % classes
        yield indices, labels, sampler(model, noise(), model.encode(labels), noise)


def split_indices(indices, total, batch, world):
    """Batches of this rank's indices."""
    if world == 1:
        return indices.split(batch)
    # the same number of batches on every rank: a sharded network runs on all ranks at once
    count = math.ceil(math.ceil(total / world) / batch)
    return [part for part in indices.tensor_split(count) if len(part)]

"""Sampling from teachers and students."""

import torch

from common.rng import PerImageNoise

TEACHER_NFE = 16  # Euler steps of the teacher row in sample grids


@torch.no_grad()
def teacher_sample(teacher, z, cond, nfe, cfg=1.0, heun=False):
    """Deterministic sampler of the probability-flow ODE from pure noise to data on the teacher's own schedule: first order (Euler for flow, DDIM for
    VP and EDM: the same step x_s = alpha_s x0 + sigma_s eps), or Heun on the same grid (two calls per step, one in the last). nfe counts steps of the
    first-order sampler; guidance doubles the cost of each. z [B, *shape] unit noise -> x [B, *shape]."""
    s = teacher.schedule
    if s.unit_norm:  # VP: evenly spaced indices, then the clean end
        times = torch.linspace(s.t_max, 0, nfe + 1, dtype=torch.float64)[:-1]
    elif s.config["name"] == "edm":  # EDM eq. (5)
        times = s.grid(max(nfe, 2)).flip(0)[:nfe]
    else:
        times = s.grid(nfe).flip(0)
    alpha, sigma = [*s.alpha(times), torch.tensor(1.0)], [*s.sigma(times), torch.tensor(0.0)]
    x = z.double() * (1.0 if s.unit_norm else sigma[0])
    step = lambda x, x0, i: alpha[i + 1] * x0 + sigma[i + 1] / sigma[i] * (x - alpha[i] * x0)
    for i in range(nfe):
        x0 = teacher.guided(x.to(z.dtype), alpha[i], sigma[i], cond, cfg).double()
        y = step(x, x0, i)
        if (
            heun and i < nfe - 1
        ):  # the mean of x0 at both ends: second order, as Heun's rule on the velocity
            x0 = (
                x0 + teacher.guided(y.to(z.dtype), alpha[i + 1], sigma[i + 1], cond, cfg).double()
            ) / 2
            y = step(x, x0, i)
        x = y
    return x.to(z.dtype)


def generate(sampler, model, n, seed=0, batch=250, rank=0, world=1, first=0, classes=None):
    """Yields (indices, labels, samples) of this rank, from `first` to n - 1: image i has label i % classes (default: all) and noise of its own seed, whatever
    the batch or world size.

    sampler(model, z, cond, noise) -> samples; noise() gives more of the images' own noise, in the same order for any batch."""
    device = next(model.parameters()).device
    mine = torch.arange(first + rank, n, world)
    # several ranks: as many batches on each, since a sharded network answers when all ask
    for part in (
        mine.split(batch)
        if world == 1
        else filter(len, mine.tensor_split(-(-(n - first) // world // batch)))
    ):
        noise = PerImageNoise(seed, part.tolist(), device)
        labels = part % (classes or max(model.classes, 1))
        yield (
            part,
            labels,
            sampler(model, noise(*model.shape), model.encode(labels), lambda: noise(*model.shape)),
        )

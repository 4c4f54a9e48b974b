"""The 2-D mixture: exact density, an MLP, distances between point sets."""

import math

import torch
import torch.nn as nn
import torch.utils.checkpoint

from common.model import Model, layers_at
from common.schedules import expand


class Toy(Model):
    """The MLP on 2-D points, EDM preconditioning. As a teacher (`exact`) it answers with the mixture's exact posterior mean, while its copies, the
    students and critics, start from the MLP that was fitted to it (`python -m common.pretrain --data toy`)."""

    adapter = "toy"

    def __init__(self, *args, exact=False, labelled=False, **kw):
        super().__init__(*args, **kw)
        self.mixture, self.exact, self.labelled = Mixture(), exact, labelled

    @staticmethod
    def network(config):
        return MLP(**{k: v for k, v in config.items() if not k.startswith("_")})

    def forward(self, x_t, alpha, sigma, cond, features=False):
        if self.exact and not features:
            return self.mixture.x0(x_t, alpha, sigma, cond["labels"])
        return super().forward(x_t, alpha, sigma, cond, features)

    x0 = forward

    def predict(self, x, t, cond):
        c_in = (t**2 + self.sigma_data**2).rsqrt()
        return self.net((x * c_in[:, None]).to(self.net.inp.weight.dtype), t, cond["labels"])

    def expected_shape(self):
        return (2,), self.net.config["classes"]

    def time_embedders(self):
        return [self.net.label], self.net.config["width"]

    def feature_layers(self, depths=(0.5,)):
        return layers_at(self.net.hidden, depths)

    def encode(self, labels):
        labels = torch.as_tensor(labels, device=self.device)
        return dict(labels=labels if self.labelled else torch.full_like(labels, self.classes))

    def null(self, n):
        return dict(labels=torch.full((n,), self.classes, device=self.device))

    def copy(self, adapters=None):
        twin = super().copy(
            dict(adapters, targets=adapters["targets"] or ["inp", "hidden.0", "hidden.1"])
            if adapters
            else None
        )
        twin.exact = False
        return twin

    def decode(self, x):
        return self.to_pictures(x)

    def encode_images(self, images):
        return images

    def net_config(self):
        return self.net.config

    def config(self):
        return dict(super().config(), labelled=self.labelled)

    def to_pictures(self, x, size=128, extent=1.6):
        """One picture of all points: log-density histogram, uint8 [1, 1, size, size]."""
        ij = ((x.detach().cpu().float() / extent + 1) / 2 * size).floor().long()
        ij = ij[((ij >= 0) & (ij < size)).all(1)]
        count = torch.bincount(
            (size - 1 - ij[:, 1]) * size + ij[:, 0], minlength=size * size
        ).reshape(1, 1, size, size)
        return 255 - (count.float().log1p() / count.float().log1p().max().clamp(min=1e-6) * 255).to(
            torch.uint8
        )


class Mixture:
    """K equal modes of standard deviation `std` on a circle of radius `radius`. Points are [n, 2]; all functions are exact in the dtype of x."""

    def __init__(self, modes=8, std=0.1, radius=1.0):
        self.modes, self.std = modes, std
        a = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        self.means = radius * torch.stack([a.cos(), a.sin()], 1)  # [K, 2]

    def sample(self, n, labels=None, generator=None):
        """n clean points, float32 [n, 2]; labels: int64 [n] chooses components, default uniform."""
        if labels is None:
            labels = torch.randint(self.modes, (n,), generator=generator)
        return (
            self.means[labels]
            + self.std * torch.randn(n, 2, generator=generator, dtype=torch.float64)
        ).float()

    def log_parts(self, x_t, alpha, sigma, labels=None):
        """log of each component's share of p_t(x_t), [n, K]; labels [n]: K (= no label) keeps all components, k keeps only component k."""
        a, s = expand(alpha, x_t), expand(sigma, x_t)
        var = (a * self.std) ** 2 + s**2  # of one component of x_t = alpha x0 + sigma eps
        d2 = (
            (x_t[:, None].double() - a.reshape(-1, 1, 1) * self.means.to(x_t.device))
            .square()
            .sum(-1)
        )  # [n, K]
        logp = (
            -0.5 * d2 / var.reshape(-1, 1)
            - (2 * math.pi * var).log().reshape(-1, 1)
            - math.log(self.modes)
        )
        if labels is not None:
            keep = (labels[:, None] == self.modes) | (
                labels[:, None] == torch.arange(self.modes, device=x_t.device)
            )
            logp = logp.masked_fill(~keep, -torch.inf)
        return logp

    def log_prob(self, x_t, alpha=1.0, sigma=0.0, labels=None):
        """log p_t(x_t) [n]; with a label k: log of p_t(x_t, label k)."""
        return self.log_parts(x_t, alpha, sigma, labels).logsumexp(1)

    def x0(self, x_t, alpha, sigma, labels=None):
        """Posterior mean E[x0 | x_t, label], [n, 2]: component means pulled towards x_t, weighted by their responsibility."""
        a, s = expand(alpha, x_t).reshape(-1, 1, 1), expand(sigma, x_t).reshape(-1, 1, 1)
        means = self.means.to(x_t.device)
        gain = a * self.std**2 / ((a * self.std) ** 2 + s**2)
        each = means + gain * (x_t[:, None].double() - a * means)  # [n, K, 2]
        r = self.log_parts(x_t, alpha, sigma, labels).softmax(1)
        return (r[..., None] * each).sum(1).to(x_t.dtype)

    def score(self, x_t, alpha, sigma, labels=None):
        """grad_x log p_t(x_t), [n, 2]: the components' scores, weighted by responsibility. Finite at sigma = 0, where Tweedie's formula is 0 / 0."""
        a, s = expand(alpha, x_t).reshape(-1, 1, 1), expand(sigma, x_t).reshape(-1, 1, 1)
        each = (a * self.means.to(x_t.device) - x_t[:, None].double()) / (
            (a * self.std) ** 2 + s**2
        )  # [n, K, 2]
        r = self.log_parts(x_t, alpha, sigma, labels).softmax(1)
        return (r[..., None] * each).sum(1).to(x_t.dtype)


class MLP(nn.Module):
    """Denoiser of 2-D points: F of EDM preconditioning. x [n, 2] already scaled by c_in, sigma [n], labels int64 [n] (classes = no label) -> [n, 2]."""

    def __init__(self, width=128, depth=3, classes=8, freqs=8):
        super().__init__()
        self.config = dict(width=width, depth=depth, classes=classes, freqs=freqs)
        self.freqs = freqs
        self.label = nn.Embedding(classes + 1, width)
        self.inp = nn.Linear(2 + 2 * freqs, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.out = nn.Linear(width, 2)

    def forward(self, x, sigma, labels):
        c_noise = sigma.log()[:, None] / 4
        phase = c_noise * torch.arange(1, self.freqs + 1, device=x.device) * (math.pi / 2)
        h = nn.functional.silu(
            self.inp(torch.cat([x, phase.cos(), phase.sin()], 1)) + self.label(labels)
        )
        for layer in self.hidden:
            h = nn.functional.silu(layer(h))
        return self.out(h)


def energy_distance(x, y):
    """Squared energy distance 2 E|x-y| - E|x-x'| - E|y-y'| of two point sets [n, d], [m, d]: unbiased, 0 for equal distributions, in units of x."""
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    return float(
        2 * torch.cdist(x, y).mean()
        - torch.cdist(x, x).sum() / (n * (n - 1))
        - torch.cdist(y, y).sum() / (m * (m - 1))
    )


def sliced_wasserstein(x, y, projections=128, seed=0):
    """Mean over random directions of the 1-D Wasserstein-2 distance of the projections, for sets of equal size [n, d]. In units of x."""
    g = torch.Generator().manual_seed(seed)
    w = nn.functional.normalize(
        torch.randn(x.shape[1], projections, generator=g, dtype=torch.float64), dim=0
    ).to(x.device)
    a, b = (x.double() @ w).sort(0).values, (y.double() @ w).sort(0).values
    return float((a - b).square().mean(0).sqrt().mean())


def mode_shares(x, mixture):
    """Share of the points [n, 2] nearest to each mode [K], and the share within 3 standard deviations of their mode."""
    d, k = torch.cdist(x.double(), mixture.means.to(x.device)).min(1)
    return torch.bincount(k, minlength=mixture.modes).double() / len(x), float(
        (d < 3 * mixture.std).double().mean()
    )

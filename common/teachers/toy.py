"""The teachers toy and toy-cond: a 2-D mixture of Gaussians, exact, and distances of point sets."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.model import Model, layers_at
from common.schedules import expand


class Toy(Model):
    """An MLP on 2-D points with EDM preconditioning.

    exact: the teacher itself, which returns the exact posterior mean of the mixture instead. Its
    copies, the students and critics, start from an MLP that was fitted to it
    (`python -m recipes.pretrain --data toy`). labelled: toy-cond; otherwise labels are ignored.
    """

    adapter = "toy"
    network_class = "MLP"
    fields = ("labelled",)

    def __init__(self, *args, exact=False, labelled=False, **kw):
        super().__init__(*args, **kw)
        self.mixture = Mixture()
        self.exact = exact
        self.labelled = labelled

    @staticmethod
    def network(config):
        return MLP(**{k: v for k, v in config.items() if not k.startswith("_")})

    def forward(self, x_t, alpha, sigma, cond, features=False):
        if self.exact and not features:
            return self.mixture.x0(x_t, alpha, sigma, cond["labels"])
        return super().forward(x_t, alpha, sigma, cond, features)

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
        labels = torch.as_tensor(labels).to(self.device, non_blocking=True)
        return dict(labels=labels if self.labelled else torch.full_like(labels, self.classes))

    def null(self, n):
        return dict(labels=torch.full((n,), self.classes, device=self.device))

    def copy(self, adapters=None, changes=None):
        if adapters and not adapters["targets"]:  # it has no attention: all layers but the last
            adapters = dict(adapters, targets=["inp", "hidden.0", "hidden.1"])
        copy = super().copy(adapters, changes)
        copy.exact = False
        return copy

    def decode(self, x):
        return self.to_pictures(x)

    def encode_images(self, images):
        return images

    def net_config(self):
        return self.net.config

    def config(self):
        return dict(super().config(), labelled=self.labelled)

    def to_pictures(self, x, size=128, extent=1.6):
        """One picture of all points [n, 2]: histogram of log counts, uint8 [1, 1, size, size].

        It shows the square [-extent, extent]^2; darker means more points.
        """
        column_row = ((x.detach().cpu().float() / extent + 1) / 2 * size).floor().long()
        column_row = column_row[((column_row >= 0) & (column_row < size)).all(1)]
        column, row = column_row[:, 0], size - 1 - column_row[:, 1]
        count = torch.bincount(row * size + column, minlength=size * size)
        count = count.reshape(1, 1, size, size).float().log1p()
        return 255 - (count / count.max().clamp(min=1e-6) * 255).to(torch.uint8)


class Mixture:
    """K equal modes of standard deviation `std` on a circle of radius `radius`.

    x_t: noisy points [n, 2]; alpha, sigma: 0-d or [n]. labels: int64 [n]; k keeps only component k,
    K means no label, and so does None. Computed in float64.
    """

    def __init__(self, modes=8, std=0.1, radius=1.0):
        self.modes = modes
        self.std = std
        angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        self.means = radius * torch.stack([angle.cos(), angle.sin()], 1)  # [K, 2]

    def sample(self, n, labels=None, generator=None):
        """n clean points, float32 [n, 2]. labels: the component of each; uniform by default."""
        if labels is None:
            labels = torch.randint(self.modes, (n,), generator=generator)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return (self.means[labels] + self.std * noise).float()

    def components(self, x_t, alpha, sigma):
        """x_t in float64; mean and variance of each p(x_t | k); gain of the posterior mean."""
        x = x_t[:, None].double()  # [n, 1, 2]
        a, s = expand(alpha, x), expand(sigma, x)  # 0-d or [n, 1, 1]
        mean = a * self.means.to(x.device, non_blocking=True)  # [K, 2] or [n, K, 2]
        variance = (a * self.std) ** 2 + s**2  # 0-d or [n, 1, 1]
        gain = a * self.std**2 / variance
        return x, mean, variance, gain

    def log_parts(self, x_t, alpha, sigma, labels=None):
        """log (p(x_t | k) / K) for each component k, [n, K]; -inf where the label excludes it."""
        x, mean, variance, _ = self.components(x_t, alpha, sigma)
        variance = variance.reshape(-1, 1)
        log_p = -0.5 * (x - mean).square().sum(-1) / variance
        log_p = log_p - (2 * math.pi * variance).log() - math.log(self.modes)
        if labels is not None:
            k = torch.arange(self.modes, device=x_t.device)
            keep = (labels[:, None] == self.modes) | (labels[:, None] == k)
            log_p = log_p.masked_fill(~keep, -torch.inf)
        return log_p

    def log_prob(self, x_t, alpha=1.0, sigma=0.0, labels=None):
        """log p(x_t) [n]; with a label k: log p(x_t, k)."""
        return self.log_parts(x_t, alpha, sigma, labels).logsumexp(1)

    def x0(self, x_t, alpha, sigma, labels=None):
        """Posterior mean E[x0 | x_t, label] [n, 2], in the dtype of x_t.

        Component means pulled towards x_t, weighted by the components' responsibilities.
        """
        x, mean, _, gain = self.components(x_t, alpha, sigma)
        each = self.means.to(x.device, non_blocking=True) + gain * (x - mean)  # [n, K, 2]
        responsibility = self.log_parts(x_t, alpha, sigma, labels).softmax(1)  # [n, K]
        return (responsibility[..., None] * each).sum(1).to(x_t.dtype)

    def score(self, x_t, alpha, sigma, labels=None):
        """grad log p(x_t) [n, 2], in the dtype of x_t. Finite also at sigma = 0."""
        x, mean, variance, _ = self.components(x_t, alpha, sigma)
        each = (mean - x) / variance  # [n, K, 2]
        responsibility = self.log_parts(x_t, alpha, sigma, labels).softmax(1)  # [n, K]
        return (responsibility[..., None] * each).sum(1).to(x_t.dtype)


class MLP(nn.Module):
    """Denoiser of 2-D points: F of EDM's preconditioning."""

    def __init__(self, width=128, depth=3, classes=8, freqs=8):
        super().__init__()
        self.config = dict(width=width, depth=depth, classes=classes, freqs=freqs)
        self.freqs = freqs
        self.label = nn.Embedding(classes + 1, width)
        self.inp = nn.Linear(2 + 2 * freqs, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.out = nn.Linear(width, 2)

    def forward(self, x, sigma, labels):
        """x [n, 2], scaled by c_in; sigma [n]; labels int64 [n], `classes` = no label -> [n, 2]."""
        c_noise = sigma.log()[:, None] / 4
        phase = c_noise * torch.arange(1, self.freqs + 1, device=x.device) * (math.pi / 2)
        h = torch.cat([x, phase.cos(), phase.sin()], 1)
        h = F.silu(self.inp(h) + self.label(labels))
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.out(h)


def energy_distance(x, y):
    """Squared energy distance 2 E|x-y| - E|x-x'| - E|y-y'| of point sets [n, d] and [m, d].

    Unbiased; 0 for equal distributions; in units of x.
    """
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    between = 2 * torch.cdist(x, y).mean()
    within_x = torch.cdist(x, x).sum() / (n * (n - 1))
    within_y = torch.cdist(y, y).sum() / (m * (m - 1))
    return float(between - within_x - within_y)


def sliced_wasserstein(x, y, projections=128, seed=0):
    """Mean Wasserstein-2 distance of 1-D projections on random directions, in units of x.

    x, y: point sets of equal size, [n, d].
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    w = F.normalize(w, dim=0).to(x.device)
    a = (x.double() @ w).sort(0).values
    b = (y.double() @ w).sort(0).values
    return float((a - b).square().mean(0).sqrt().mean())


def mode_shares(x, mixture):
    """Share of the points [n, 2] nearest to each mode, [K], and the share within 3 std of one."""
    distance, mode = torch.cdist(x.double(), mixture.means.to(x.device)).min(1)
    share = torch.bincount(mode, minlength=mixture.modes).double() / len(x)
    near = (distance < 3 * mixture.std).double().mean()
    return share, float(near)

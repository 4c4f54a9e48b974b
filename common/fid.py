"""Features and distances between sets of images.

FID compares two Gaussians fitted to the 2048-d pool features of one fixed Inception network (arXiv 1706.08500):
    FID = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                                                       (1)
Weights, resize, quantisation and sample count move that number more than most methods do, so they are fixed here: TF 2015-12-05 weights
(pytorch-fid's file), TF1 resize, uint8 input, float64 statistics with N-1. The distances below take features of any network, but only
those of the public Inception weights may be called FID or KID. Nothing is downloaded and nothing is unpickled.
A user's mistake (a file, its shapes) raises UserError; a caller's mistake raises ValueError.
"""

import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common.errors import UserError
from common.files import atomic, check_npz_size


class SmallCNN(nn.Module):
    """Classifier of small images whose penultimate layer serves as feature space (`fd`, protocol `<data>-cnn`; never called FID).

    Input: uint8 [B, C, H, W], H and W divisible by 2^stages. Output: features float32 [B, dim], logits float32 [B, classes].
    """

    def __init__(self, channels=1, size=28, classes=10, width=32, dim=64, stages=2):
        super().__init__()
        conv = lambda i, o, stride: nn.Sequential(
            nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
        )
        widths = [channels, *(width * 2**i for i in range(stages))]
        self.body = nn.Sequential(
            *[layer for i, o in zip(widths, widths[1:]) for layer in (conv(i, o, 1), conv(o, o, 2))]
        )
        self.feat = nn.Linear(widths[-1] * (size // 2**stages) ** 2, dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images):
        x = images.float().div(127.5).sub(1)
        f = self.feat(self.body(x).flatten(1))
        return f, self.head(F.relu(f))


def _f64(x):
    x = torch.as_tensor(x).detach()
    return (
        x.cpu() if x.device.type == "mps" else x
    ).double()  # float32 once gave FID 8.1 for 7.3 (k-diffusion); MPS has no float64


def _set(x, least, name):
    x = _f64(x)
    if x.ndim != 2 or len(x) < least or not x.isfinite().all():
        raise ValueError(
            f"{name}: expected finite features [n >= {least}, D], found {list(x.shape)}, finite={bool(x.isfinite().all())}"
        )
    return x


class Stats:
    """Mean and covariance of a stream of features by float64 sums of f and f f^T, over all ranks.

    Each rank updates with its own images, then all call all_reduce once; `device` must suit the process group (NCCL: cuda).
    """

    def __init__(self, dim, device="cpu"):
        self.n, self.reduced = 0, False
        device = "cpu" if torch.device(device).type == "mps" else device
        self.sum = torch.zeros(
            dim, dtype=torch.float64, device=device
        )  # zeros: sums started at ones grow with the number of ranks
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """features [B, dim], any float type."""
        if self.reduced or features.ndim != 2 or features.shape[1] != len(self.sum):
            raise ValueError(
                f"Stats: expected [B, {len(self.sum)}] before all_reduce, found {list(features.shape)}, {self.reduced=}"
            )
        f = _f64(features).to(self.sum.device)
        self.n += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f

    def all_reduce(self):
        """Sum over ranks, in place; without a process group nothing happens. A second call would count each rank twice: ValueError."""
        if self.reduced:
            raise ValueError("Stats: all_reduce was called twice")
        if dist.is_initialized():
            n = torch.tensor(self.n, device=self.sum.device)
            for t in (n, self.sum, self.outer):
                dist.all_reduce(t)
            self.n, self.reduced = n.item(), True

    def mean_cov(self):
        """-> mu float64 [dim], cov float64 [dim, dim] with N-1 like numpy.cov and EDM's files. ValueError: n < 2, or nan or inf."""
        if self.n < 2 or not self.sum.isfinite().all():
            raise ValueError(
                f"Stats: expected at least 2 features, all finite, found n={self.n}, sum {self.sum.sum().item()}"
            )
        mu = self.sum / self.n
        return mu, (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)


def save_stats(path, mu, sigma, n, protocol, features=None):
    """Write mu [D] and sigma [D, D] as float64, n and the protocol string to .npz (EDM's layout plus two), whole or not at all. OSError.
    features [n, D]: kept too, in half precision, where the images themselves are not shipped."""
    more = {} if features is None else dict(features=features.half().numpy())
    with atomic(path) as f:
        np.savez(
            f,
            mu=_f64(mu).cpu().numpy(),
            sigma=_f64(sigma).cpu().numpy(),
            n=np.int64(n),
            protocol=np.str_(protocol),
            **more,
        )


def load_stats(path):
    """-> dict(mu float64 [D], sigma float64 [D, D], n int or None, protocol str or None, features float32 [n, D] or None) on the CPU; EDM's and ADM's
    public .npz load.

    UserError: unreadable file, pickled content (never executed), missing arrays, other shapes or types, values that are not finite.
    """
    bad = lambda found: UserError(
        f"{path}: expected .npz statistics with finite float arrays mu [D] and sigma [D, D], found {found}"
    )
    try:
        with np.load(path, allow_pickle=False) as z:
            check_npz_size(z)
            d = {k: z[k] for k in ("mu", "sigma", "n", "protocol", "features") if k in z.files}
        n, protocol = (
            (int(d["n"]) if "n" in d else None),
            (str(d["protocol"]) if "protocol" in d else None),
        )
    except OSError as e:
        raise bad(e.strerror or "no archive") from None
    except Exception as e:  # pickles, other archives and truncated ones raise many types
        raise bad(f"something else ({type(e).__name__})") from None
    mu, sigma = (d.get(k, np.array("missing")) for k in ("mu", "sigma"))
    if (
        mu.dtype.kind != "f"
        or sigma.dtype.kind != "f"
        or mu.ndim != 1
        or sigma.shape != mu.shape * 2
    ):
        raise bad(
            ", ".join(
                f"{k} {d[k].dtype} {list(d[k].shape)}" if k in d else f"no {k}"
                for k in ("mu", "sigma")
            )
        )
    features = d.get("features", mu[None])
    if features.dtype.kind != "f" or features.ndim != 2 or features.shape[1] != len(mu):
        raise bad(f"features {features.dtype} {list(features.shape)}")
    if not all(np.isfinite(a).all() for a in (mu, sigma, features)):
        raise bad("nan or inf")
    return dict(
        mu=_f64(mu),
        sigma=_f64(sigma),
        n=n,
        protocol=protocol,
        features=torch.from_numpy(features).float() if "features" in d else None,
    )


def _sqrt_eigenvalues(lam, name):
    if (
        lam[0] < -1e-4 * lam[-1].abs()
    ):  # rounding gives small negatives, which are clamped; a large one means a wrong matrix
        raise ValueError(
            f"frechet: {name} is not a covariance, eigenvalues {lam[0].item():.3g} to {lam[-1].item():.3g}"
        )
    return lam.clamp(min=0).sqrt()


def frechet(mu1, cov1, mu2, cov2, n=None):
    """Squared Frechet distance of two Gaussians, eq. (1): mu [D], cov [D, D] -> float >= 0, in squared units of the features.

    tr (S1 S2)^(1/2) = sum sqrt eig(R S2 R) with R = S1^(1/2): symmetric and real, so neither scipy's sqrtm (removed in 1.18) nor an
    imaginary part to drop. n: size of the smaller set; a warning tells that it makes the covariance singular. UserError: D differs.
    """
    args = [_f64(a) for a in (mu1, cov1, mu2, cov2)]
    mu1, cov1, mu2, cov2 = (
        a.to(max(args, key=lambda t: t.is_cuda).device) for a in args
    )  # on CUDA if any is: seconds, not a minute
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape:
        raise UserError(
            f"reference statistics: expected the samples' feature space, found {len(mu1)} against {len(mu2)} dimensions"
        )
    if n is not None and n <= len(mu1):
        warnings.warn(
            f"frechet: {n} samples for {len(mu1)} dimensions give a singular covariance: good for a smoke test only"
        )
    lam, q = torch.linalg.eigh(cov1)
    root = (q * _sqrt_eigenvalues(lam, "cov1")) @ q.T
    m = root @ cov2 @ root
    cross = _sqrt_eigenvalues(torch.linalg.eigvalsh((m + m.T) / 2), "cov2").sum()
    return max(0.0, ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item())


def kid(x, y, subsets=100, size=1000, seed=0):
    """KID (arXiv 1801.01401): features [n, D], [m, D] -> mean and population std over subsets of the unbiased MMD^2.

    Kernel (x.y / D + 1)^3. NOT multiplied by 1000; papers often print KID x 10^3. Without self pairs values scatter around 0 and may be
    negative. size falls to the smaller set; where it equals a set's length, that set never changes and std understates the noise.
    """
    x, y = _set(x, 2, "kid"), _set(y, 2, "kid")
    size, values = min(size, len(x), len(y)), []
    g = torch.Generator().manual_seed(seed)  # on the CPU: the same subsets on every device
    for _ in range(subsets):
        a, b = (
            s[torch.randperm(len(s), generator=g)[:size].to(s.device)].to(x.device) for s in (x, y)
        )
        aa, bb, ab = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        values.append(
            (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (size * (size - 1)) - 2 * ab.mean()
        )
    values = torch.stack(values)
    return values.mean().item(), values.std(unbiased=False).item()


def _radii(x, k, block):
    """[n, D] -> distance of each point to its k-th nearest other point, [n]."""
    radii = []
    for i in range(0, len(x), block):
        d = torch.cdist(x[i : i + block], x)
        d.diagonal(i).fill_(float("inf"))  # not itself; a duplicate elsewhere is a neighbour
        radii.append(d.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def prdc(real, fake, k=3, block=1024):
    """Precision, recall (arXiv 1904.06991), density, coverage (arXiv 2002.09797): features [n, D], [m, D] with n, m > k -> dict of floats.

    A ball reaches from a point to its k-th neighbour in its own set, itself not counted, border included (the prdc package excludes it).
    precision: share of fakes in a real ball. recall: share of reals in a fake ball. density: real balls around a fake, over k; may exceed 1
    (equal sets: (k + 1) / k). coverage: share of reals with a fake in their ball. State k: usual are 3 for the first two, 5 for the others.
    Memory: a few times block * max(n, m) float64.
    """
    real, fake = _set(real, k + 1, "prdc"), _set(fake, k + 1, "prdc").to(real.device)
    r_real, r_fake = _radii(real, k, block), _radii(fake, k, block)
    recalled, covered = (
        torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2)
    )
    precise = balls = 0
    for i in range(0, len(fake), block):
        d = torch.cdist(fake[i : i + block], real)  # [b, n]
        inside = d <= r_real
        precise, balls = precise + inside.any(1).sum().item(), balls + inside.sum().item()
        covered |= inside.any(0)
        recalled |= (d <= r_fake[i : i + block, None]).any(0)
    return dict(
        precision=precise / len(fake),
        recall=recalled.double().mean().item(),
        density=balls / (k * len(fake)),
        coverage=covered.double().mean().item(),
    )

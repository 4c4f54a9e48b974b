"""Distances between sets of features, and the statistics that they need.

FID (arXiv 1706.08500) compares two Gaussians fitted to the features of one fixed Inception network:

    FID = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                                     (1)

Weights, resize and quantisation change it more than most methods do, so they are fixed: the public
Inception weights and the resizes of tools/inception.py, uint8 images, float64 statistics. The
functions below take the features of any network, but with other weights the result is not FID.
A mistake of the user (a file, its shapes) raises UserError, a mistake of the caller ValueError.
"""

import numpy as np
import torch

from common.errors import UserError
from common.files import atomic, check_npz_size

# ---- mean and covariance -------------------------------------------------------------------------


def f64(x):
    """x as float64 without graph. In float32 a known FID implementation gave 8.1 instead of 7.3."""
    return torch.as_tensor(x).detach().double()


class Stats:
    """Mean and covariance of a stream of features, from float64 sums of f and f f^T."""

    def __init__(self, dim, device="cpu"):
        self.n = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """features: [B, dim], any float type and device."""
        dim = len(self.sum)
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"Stats: expected [B, {dim}], found {list(features.shape)}")
        f = f64(features).to(self.sum.device)
        self.n += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f

    def mean_cov(self):
        """mu float64 [dim], cov float64 [dim, dim] with n - 1 like numpy.cov and EDM's files."""
        if self.n < 2 or not self.sum.isfinite().all():
            found = f"n={self.n}, sum {self.sum.sum().item()}"
            raise ValueError(f"Stats: expected at least 2 features, all finite, found {found}")
        mu = self.sum / self.n
        return mu, (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)


def save_stats(path, mu, sigma, n, protocol, features=None):
    """Write mu [D], sigma [D, D], n and the protocol string to .npz: EDM's layout plus two.

    features [n, D]: stored as well, in half precision, for data whose images are not shipped.
    """
    arrays = dict(mu=f64(mu).cpu().numpy(), sigma=f64(sigma).cpu().numpy())
    arrays |= dict(n=np.int64(n), protocol=np.str_(protocol))
    if features is not None:
        arrays["features"] = features.half().numpy()
    with atomic(path) as f:
        np.savez(f, **arrays)


def load_stats(path):
    """Read the statistics of save_stats, or the public .npz files of EDM and ADM.

    Returns dict(mu float64 [D], sigma float64 [D, D], n int or None, protocol str or None,
    features float32 [n, D] or None), on the CPU. UserError: the file is unreadable or has pickled
    content (which is never executed), arrays are missing, of another shape or type, or not finite.
    """

    def error(found):
        return UserError(
            f"{path}: expected .npz statistics with finite float arrays mu [D] and sigma [D, D], "
            f"found {found}"
        )

    try:
        with np.load(path, allow_pickle=False) as archive:
            check_npz_size(archive)
            keys = ("mu", "sigma", "n", "protocol", "features")
            arrays = {k: archive[k] for k in keys if k in archive.files}
        n = int(arrays["n"]) if "n" in arrays else None
        protocol = str(arrays["protocol"]) if "protocol" in arrays else None
    except OSError as e:
        raise error(e.strerror or "no archive") from None
    except Exception as e:  # pickles, other archives and truncated ones raise many types
        raise error(f"something else ({type(e).__name__})") from None

    for key in ("mu", "sigma"):
        if key not in arrays:
            raise error(f"no {key}")
    mu, sigma, features = arrays["mu"], arrays["sigma"], arrays.get("features")
    if not is_float(mu, 1) or not is_float(sigma, 2) or sigma.shape != (len(mu), len(mu)):
        raise error(f"mu {mu.dtype} {list(mu.shape)}, sigma {sigma.dtype} {list(sigma.shape)}")
    if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise error("nan or inf")
    if features is not None:
        if not is_float(features, 2) or features.shape[1] != len(mu):
            raise error(f"features {features.dtype} {list(features.shape)}")
        if not np.isfinite(features).all():
            raise error("nan or inf")
        features = torch.from_numpy(features).float()
    return dict(mu=f64(mu), sigma=f64(sigma), n=n, protocol=protocol, features=features)


def is_float(array, ndim):
    return array.dtype.kind == "f" and array.ndim == ndim


# ---- distances -----------------------------------------------------------------------------------


def frechet(mu1, cov1, mu2, cov2):
    """Squared Frechet distance (1) of two Gaussians: mu [D], cov [D, D] -> float >= 0.

    Computed on the device of cov1. tr (S1 S2)^(1/2) = sum sqrt eig(R S2 R) with R = S1^(1/2): the
    matrix is symmetric, so there is no imaginary part to drop as with scipy's sqrtm.
    UserError: D differs. ValueError: not a covariance.
    """
    cov1 = f64(cov1)
    mu1, mu2, cov2 = (f64(a).to(cov1.device) for a in (mu1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape:
        raise UserError(
            "reference statistics: expected the samples' feature space, "
            f"found {len(mu1)} against {len(mu2)} dimensions"
        )
    eigenvalues, q = torch.linalg.eigh(cov1)
    root = (q * sqrt_eigenvalues(eigenvalues, "cov1")) @ q.T
    m = root @ cov2 @ root
    eigenvalues = torch.linalg.eigvalsh((m + m.T) / 2)
    cross = sqrt_eigenvalues(eigenvalues, "cov2").sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(0.0, distance.item())


def sqrt_eigenvalues(eigenvalues, name):
    """Square roots of ascending eigenvalues. Rounding makes small ones negative: they become 0."""
    low, high = eigenvalues[0], eigenvalues[-1]
    if low < -1e-4 * high.abs():
        found = f"eigenvalues {low.item():.3g} to {high.item():.3g}"
        raise ValueError(f"frechet: {name} is not a covariance, {found}")
    return eigenvalues.clamp(min=0).sqrt()


def kid(x, y, subsets=100, size=1000, seed=0):
    """KID (arXiv 1801.01401), the unbiased MMD^2 with kernel (x.y / D + 1)^3.

    x [n, D], y [m, D] -> mean and population standard deviation over random subsets. Not multiplied
    by 1000, as many papers do. Values of equal distributions scatter around 0 and can be negative.
    size is reduced to the smaller set; a set of that size is the same in every subset, so that the
    standard deviation understates the noise.
    """
    x = check_features(x, 2, "kid")
    y = check_features(y, 2, "kid").to(x.device)
    size = min(size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)  # on the CPU: equal subsets on every device

    def subset(features):
        rows = torch.randperm(len(features), generator=generator)[:size]
        return features[rows.to(features.device)]

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    values = []
    for _ in range(subsets):
        a, b = subset(x), subset(y)
        aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
        without_self = aa.sum() - aa.trace() + bb.sum() - bb.trace()
        values.append(without_self / (size * (size - 1)) - 2 * ab.mean())
    values = torch.stack(values)
    return values.mean().item(), values.std(unbiased=False).item()


def prdc(real, fake, k=3, block=1024):
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    real [n, D], fake [m, D] with n, m > k -> dict of floats. The ball of a point reaches to its
    k-th nearest other point of its own set, border included (the prdc package excludes it).
    precision: share of fakes in a real ball. recall: share of reals in a fake ball. density: mean
    number of real balls around a fake, divided by k; equal sets have (k + 1) / k. coverage: share
    of reals with a fake in their ball. Papers use k = 3 for the first two and 5 for the others.
    Memory: a few times block * max(n, m) float64.
    """
    real = check_features(real, k + 1, "prdc")
    fake = check_features(fake, k + 1, "prdc").to(real.device)
    real_radius = ball_radius(real, k, block)
    fake_radius = ball_radius(fake, k, block)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = covered.clone()
    precise = balls = 0
    for i in range(0, len(fake), block):
        distance = torch.cdist(fake[i : i + block], real)  # [b, n]
        in_real_ball = distance <= real_radius
        precise += in_real_ball.any(1).sum().item()
        balls += in_real_ball.sum().item()
        covered |= in_real_ball.any(0)
        recalled |= (distance <= fake_radius[i : i + block, None]).any(0)
    return dict(
        precision=precise / len(fake),
        recall=recalled.double().mean().item(),
        density=balls / (k * len(fake)),
        coverage=covered.double().mean().item(),
    )


def ball_radius(x, k, block):
    """Distance of each point of x [n, D] to its k-th nearest other point, [n]."""
    radii = []
    for i in range(0, len(x), block):
        distance = torch.cdist(x[i : i + block], x)
        distance.diagonal(i).fill_(float("inf"))  # not itself; a duplicate is a neighbour
        radii.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def check_features(x, least, name):
    x = f64(x)
    if x.ndim != 2 or len(x) < least or not x.isfinite().all():
        found = f"{list(x.shape)}, finite={bool(x.isfinite().all())}"
        raise ValueError(f"{name}: expected finite features [n >= {least}, D], found {found}")
    return x

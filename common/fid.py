"""Features and distances between sets of images.

FID compares two Gaussians fitted to the 2048-d pool features of one fixed Inception network (arXiv 1706.08500):
    FID = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                                                       (1)
Weights, resize, quantisation and sample count move that number more than most methods do, so they are fixed here: TF 2015-12-05 weights
(pytorch-fid's file), TF1 resize, uint8 input, float64 statistics with N-1. The distances below take features of any network, but only
those of the public Inception weights may be called FID or KID. Nothing is downloaded and nothing is unpickled.
A user's mistake (a file, its shapes) raises UserError; a caller's mistake raises ValueError.
"""
import hashlib
import io
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from common.run import UserError, atomic

INCEPTION_SHA256 = "6726825d"  # first 8 hex digits of the hash of pt_inception-2015-12-05-6726825d.pth


class SmallCNN(nn.Module):
    """Classifier of small images whose penultimate layer serves as feature space (`fd`, protocol `<data>-cnn`; never called FID).

    Input: uint8 [B, C, H, W], H and W divisible by 2^stages. Output: features float32 [B, dim], logits float32 [B, classes].
    """

    def __init__(self, channels=1, size=28, classes=10, width=32, dim=64, stages=2):
        super().__init__()
        conv = lambda i, o, stride: nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        widths = [channels, *(width * 2**i for i in range(stages))]
        self.body = nn.Sequential(*[layer for i, o in zip(widths, widths[1:]) for layer in (conv(i, o, 1), conv(o, o, 2))])
        self.feat = nn.Linear(widths[-1] * (size // 2**stages) ** 2, dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images):
        x = images.float().div(127.5).sub(1)
        f = self.feat(self.body(x).flatten(1))
        return f, self.head(F.relu(f))


# --- Inception ----------------------------------------------------------------------------------------------------------------

def to_uint8(x):
    """float [-1, 1] -> uint8 by EDM's rule, which truncates: -1, 0, 1 -> 0, 128, 255. Any shape."""
    return (x.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)


def resize_tf1(x, size=299):
    """TF1 bilinear: [B, C, H, W] in any range -> float [B, C, size, size].

    Output i reads source position i * H / size: no half-pixel shift, no antialiasing, the last pixel is held. The references of EDM and
    ADM were made this way; at 512 pixels and more the choice of resize decides the FID.
    """
    x = x if x.is_floating_point() else x.float()
    for dim in (2, 3):
        n = x.shape[dim]
        pos = torch.arange(size, device=x.device) * n  # in units of 1 / size: integers make floor and weight exact
        low, weight = pos // size, (pos % size).to(x.dtype) / size
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), weight[:, None] if dim == 2 else weight)
    return x


def resize_clean(x, size=299):
    """clean-fid (arXiv 2104.11222): uint8 [B, C, H, W] -> float32 [B, C, size, size] in [0, 255], same device, computed on the CPU.

    PIL bicubic with antialiasing, each channel in float; clipped like clean-fid 0.1.35, not rounded.
    """
    planes = x.cpu().numpy().reshape(-1, *x.shape[2:]).astype(np.float32)
    out = np.stack([np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in planes])
    return torch.from_numpy(out.clip(0, 255)).view(*x.shape[:2], size, size).to(x.device)


class Conv(nn.Module):
    def __init__(self, cin, cout, kernel, stride=1, pad=0):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


POOLS = {"avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),  # torchvision's blocks count the border's zeros, TF does not
         "max": lambda x: F.max_pool2d(x, 3, 1, 1),
         "shrink": lambda x: F.max_pool2d(x, 3, 2)}


class Mixed(nn.Module):
    """Branches on one input, concatenated in the order given, then the pooled input (through `branch_pool` if pool_out > 0).

    A branch is a list of (channels, kernel, stride), named as the public file's keys are: `branch` if alone, else `branch_1`, `branch_2`...
    A list of two kernels comes last and forks into `..a` and `..b`; both results are kept.
    """

    def __init__(self, cin, pool, pool_out, **branches):
        super().__init__()
        self.pool, self.paths = POOLS[pool], []
        for name, convs in branches.items():
            c, path = cin, []
            for i, (cout, kernels, stride) in enumerate(convs, 1):
                key = name if len(convs) == 1 else f"{name}_{i}"
                kernels = {key + s: k for s, k in zip("ab", kernels)} if isinstance(kernels, list) else {key: kernels}
                for key, k in kernels.items():
                    k = k if isinstance(k, tuple) else (k, k)
                    self.add_module(key, Conv(c, cout, k, stride, (k[0] // 2, k[1] // 2) if stride == 1 else 0))  # stride 1 keeps the size
                c = cout
                path.append(list(kernels))
            self.paths.append(path)
        self.branch_pool = Conv(cin, pool_out, 1) if pool_out else nn.Identity()

    def forward(self, x):
        outs = []
        for path in self.paths:
            h = [x]
            for keys in path:
                h = [getattr(self, key)(h[0]) for key in keys]
            outs += h
        return torch.cat(outs + [self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """Inception v3 of the TF 2015-12-05 graph (arXiv 1512.00567), with the keys of pytorch-fid's file.

    forward(images uint8 [B, 1 or 3, H, W], resize="tf1" | "clean") -> features float32 [B, 2048], logits float32 [B, 1008] (with bias).
    Always in eval mode and without gradients: with batch statistics a feature would depend on the other images of its batch.
    """

    def __init__(self):
        super().__init__()
        h, v, fork = (1, 7), (7, 1), (384, [(1, 3), (3, 1)], 1)
        A = lambda cin, p: Mixed(cin, "avg", p, branch1x1=[(64, 1, 1)], branch5x5=[(48, 1, 1), (64, 5, 1)],
                                 branch3x3dbl=[(64, 1, 1), (96, 3, 1), (96, 3, 1)])
        C = lambda c: Mixed(768, "avg", 192, branch1x1=[(192, 1, 1)], branch7x7=[(c, 1, 1), (c, h, 1), (192, v, 1)],
                            branch7x7dbl=[(c, 1, 1), (c, v, 1), (c, h, 1), (c, v, 1), (192, h, 1)])
        E = lambda cin, pool: Mixed(cin, pool, 192, branch1x1=[(320, 1, 1)], branch3x3=[(384, 1, 1), fork],
                                    branch3x3dbl=[(448, 1, 1), (384, 3, 1), fork])
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3), Conv(32, 64, 3, pad=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = Mixed(288, "shrink", 0, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1, 1), (96, 3, 1), (96, 3, 2)])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(128), C(160), C(160), C(192)
        self.Mixed_7a = Mixed(768, "shrink", 0, branch3x3=[(192, 1, 1), (320, 3, 2)],
                              branch7x7x3=[(192, 1, 1), (192, h, 1), (192, v, 1), (192, 3, 2)])
        self.Mixed_7b, self.Mixed_7c = E(1280, "avg"), E(2048, "max")  # max in 7c: a quirk of the TF graph that no key reveals
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    def body(self, x):
        """float32 [B, 3, h, w] in [-1, 1), h and w >= 75 -> features, logits."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["shrink"](x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(POOLS["shrink"](x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return features, self.fc(features)

    @torch.no_grad()
    def forward(self, images, resize="tf1"):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):  # floats would hide a wrong range
            raise ValueError(f"Inception: expected uint8 [B, 1 or 3, H, W] (see to_uint8), found {images.dtype} {list(images.shape)}")
        if resize not in ("tf1", "clean"):
            raise ValueError(f"Inception: expected resize 'tf1' or 'clean', found {resize!r}")
        x = resize_tf1(images) if resize == "tf1" else resize_clean(images)
        x = ((x - 128) / 128).expand(-1, 3, -1, -1)  # TF's scale; 2 x / 255 - 1 is not quite the same
        # Full float32 whatever surrounds the call: convolutions default to TF32, and a training loop may hold autocast open.
        with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.body(x)


def load_inception(path, device="cpu", force=False):
    """Inception with the weights in pytorch-fid's public file -> (Inception, first 8 hex digits of the file's sha256, also printed).

    UserError: unreadable file, another hash (unless force), anything but plain tensors, wrong keys (`num_batches_tracked` may be missing)
    or shapes. The global random state is left as it was, so that evaluating does not change a training run.
    """
    bad = lambda expected, found: UserError(f"--inception {path}: expected {expected}, found {found}")
    try:
        with open(path, "rb") as f:
            data = f.read()  # hashed and loaded from the same bytes
    except OSError as e:
        raise bad("a weight file", e.strerror) from None
    prefix = hashlib.sha256(data).hexdigest()[:8]
    if prefix != INCEPTION_SHA256 and not force:
        raise bad(f"pytorch-fid's public weights, sha256 {INCEPTION_SHA256}...", f"{prefix}...")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on odd pickles before it refuses them; the one line below says enough
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        have = {str(k): list(v.shape) for k, v in state.items()}
    except Exception as e:  # torch raises many types here, with messages of several pages
        raise bad("a state dict of plain tensors", f"something else ({type(e).__name__})") from None
    with torch.random.fork_rng(devices=[]):
        net = Inception()
    want = {k: list(v.shape) for k, v in net.state_dict().items() if k in have or not k.endswith("num_batches_tracked")}
    if wrong := sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k)):
        raise bad(f"{wrong[0]} {want.get(wrong[0], 'absent')}", f"{have.get(wrong[0], 'absent')} ({len(wrong)} wrong keys of {len(want)})")
    net.load_state_dict(state, strict=False)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"inception {path}: sha256 {prefix}..." + (" (forced: do not call the result FID)" if prefix != INCEPTION_SHA256 else ""))
    return net.to(device), prefix


# --- statistics ---------------------------------------------------------------------------------------------------------------

def _f64(x):
    x = torch.as_tensor(x).detach()
    return (x.cpu() if x.device.type == "mps" else x).double()  # float32 once gave FID 8.1 for 7.3 (k-diffusion); MPS has no float64


def _set(x, least, name):
    x = _f64(x)
    if x.ndim != 2 or len(x) < least or not x.isfinite().all():
        raise ValueError(f"{name}: expected finite features [n >= {least}, D], found {list(x.shape)}, finite={bool(x.isfinite().all())}")
    return x


class Stats:
    """Mean and covariance of a stream of features by float64 sums of f and f f^T, over all ranks.

    Each rank updates with its own images, then all call all_reduce once; `device` must suit the process group (NCCL: cuda).
    """

    def __init__(self, dim, device="cpu"):
        self.n, self.reduced = 0, False
        device = "cpu" if torch.device(device).type == "mps" else device
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)  # zeros: sums started at ones grow with the number of ranks
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """features [B, dim], any float type."""
        if self.reduced or features.ndim != 2 or features.shape[1] != len(self.sum):
            raise ValueError(f"Stats: expected [B, {len(self.sum)}] before all_reduce, found {list(features.shape)}, {self.reduced=}")
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
            raise ValueError(f"Stats: expected at least 2 features, all finite, found n={self.n}, sum {self.sum.sum().item()}")
        mu = self.sum / self.n
        return mu, (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)


def save_stats(path, mu, sigma, n, protocol, features=None):
    """Write mu [D] and sigma [D, D] as float64, n and the protocol string to .npz (EDM's layout plus two), whole or not at all. OSError.
    features [n, D]: kept too, in half precision, where the images themselves are not shipped."""
    more = {} if features is None else dict(features=features.half().numpy())
    with atomic(path) as f:
        np.savez(f, mu=_f64(mu).cpu().numpy(), sigma=_f64(sigma).cpu().numpy(), n=np.int64(n), protocol=np.str_(protocol), **more)


def no_bomb(archive, largest=2**28, ratio=100):
    """ValueError if an open .npz says that it grows beyond what arrays of numbers do."""
    sizes = [(part.file_size, part.compress_size) for part in archive.zip.infolist()]
    if (total := sum(a for a, _ in sizes)) > largest and total > ratio * sum(b for _, b in sizes):
        raise ValueError(f"would grow to {total} bytes")


def load_stats(path):
    """-> dict(mu float64 [D], sigma float64 [D, D], n int or None, protocol str or None, features float32 [n, D] or None) on the CPU; EDM's and ADM's
    public .npz load.

    UserError: unreadable file, pickled content (never executed), missing arrays, other shapes or types, values that are not finite.
    """
    bad = lambda found: UserError(f"{path}: expected .npz statistics with finite float arrays mu [D] and sigma [D, D], found {found}")
    try:
        with np.load(path, allow_pickle=False) as z:
            no_bomb(z)
            d = {k: z[k] for k in ("mu", "sigma", "n", "protocol", "features") if k in z.files}
        n, protocol = (int(d["n"]) if "n" in d else None), (str(d["protocol"]) if "protocol" in d else None)
    except OSError as e:
        raise bad(e.strerror or "no archive") from None
    except Exception as e:  # pickles, other archives and truncated ones raise many types
        raise bad(f"something else ({type(e).__name__})") from None
    mu, sigma = (d.get(k, np.array("missing")) for k in ("mu", "sigma"))
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or mu.ndim != 1 or sigma.shape != mu.shape * 2:
        raise bad(", ".join(f"{k} {d[k].dtype} {list(d[k].shape)}" if k in d else f"no {k}" for k in ("mu", "sigma")))
    features = d.get("features", mu[None])
    if features.dtype.kind != "f" or features.ndim != 2 or features.shape[1] != len(mu):
        raise bad(f"features {features.dtype} {list(features.shape)}")
    if not all(np.isfinite(a).all() for a in (mu, sigma, features)):
        raise bad("nan or inf")
    return dict(mu=_f64(mu), sigma=_f64(sigma), n=n, protocol=protocol, features=torch.from_numpy(features).float() if "features" in d else None)


# --- distances ----------------------------------------------------------------------------------------------------------------

def _sqrt_eigenvalues(lam, name):
    if lam[0] < -1e-4 * lam[-1].abs():  # rounding gives small negatives, which are clamped; a large one means a wrong matrix
        raise ValueError(f"frechet: {name} is not a covariance, eigenvalues {lam[0].item():.3g} to {lam[-1].item():.3g}")
    return lam.clamp(min=0).sqrt()


def frechet(mu1, cov1, mu2, cov2, n=None):
    """Squared Frechet distance of two Gaussians, eq. (1): mu [D], cov [D, D] -> float >= 0, in squared units of the features.

    tr (S1 S2)^(1/2) = sum sqrt eig(R S2 R) with R = S1^(1/2): symmetric and real, so neither scipy's sqrtm (removed in 1.18) nor an
    imaginary part to drop. n: size of the smaller set; a warning tells that it makes the covariance singular. UserError: D differs.
    """
    args = [_f64(a) for a in (mu1, cov1, mu2, cov2)]
    mu1, cov1, mu2, cov2 = (a.to(max(args, key=lambda t: t.is_cuda).device) for a in args)  # on CUDA if any is: seconds, not a minute
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape:
        raise UserError(f"reference statistics: expected the samples' feature space, found {len(mu1)} against {len(mu2)} dimensions")
    if n is not None and n <= len(mu1):
        warnings.warn(f"frechet: {n} samples for {len(mu1)} dimensions give a singular covariance: good for a smoke test only")
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
        a, b = (s[torch.randperm(len(s), generator=g)[:size].to(s.device)].to(x.device) for s in (x, y))
        aa, bb, ab = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        values.append((aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (size * (size - 1)) - 2 * ab.mean())
    values = torch.stack(values)
    return values.mean().item(), values.std(unbiased=False).item()


def _radii(x, k, block):
    """[n, D] -> distance of each point to its k-th nearest other point, [n]."""
    radii = []
    for i in range(0, len(x), block):
        d = torch.cdist(x[i:i + block], x)
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
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    precise = balls = 0
    for i in range(0, len(fake), block):
        d = torch.cdist(fake[i:i + block], real)  # [b, n]
        inside = d <= r_real
        precise, balls = precise + inside.any(1).sum().item(), balls + inside.sum().item()
        covered |= inside.any(0)
        recalled |= (d <= r_fake[i:i + block, None]).any(0)
    return dict(precision=precise / len(fake), recall=recalled.double().mean().item(),
                density=balls / (k * len(fake)), coverage=covered.double().mean().item())


def vendi(x):
    """Vendi score (arXiv 2210.02410), cosine kernel: features [n, D] -> effective number of distinct samples, 1 to min(n, D).

    exp of the entropy of the eigenvalues of X X' / n; they are those of its D x D dual X' X / n, apart from zeros.
    """
    x = F.normalize(_set(x, 1, "vendi"))
    return torch.special.entr(torch.linalg.eigvalsh(x.T @ x / len(x)).clamp(min=0)).sum().exp().item()


def pairwise_cosine(x, groups):
    """Features [n, D], groups int [n] (prompt ids) -> mean over groups of the mean cosine of all pairs in the group; lower = more diverse.

    Groups of one have no pair and are left out. ValueError if that leaves none.
    """
    x = F.normalize(_set(x, 2, "pairwise_cosine"))
    _, index, m = torch.unique(torch.as_tensor(groups, device=x.device), return_inverse=True, return_counts=True)
    if len(index) != len(x) or m.max() < 2:
        raise ValueError(f"pairwise_cosine: expected {len(x)} ids with a group of two or more, found {len(index)}, largest group {m.max()}")
    total = x.new_zeros(len(m), x.shape[1]).index_add_(0, index, x).square().sum(1)  # |sum u|^2 = self pairs + other pairs
    self_pairs = x.new_zeros(len(m)).index_add_(0, index, x.square().sum(1))
    return ((total - self_pairs) / (m * (m - 1)))[m > 1].mean().item()

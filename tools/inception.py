"""The public Inception network (TF 2015-12-05 weights) and its two resizes."""

import hashlib
import io
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from common.errors import UserError

INCEPTION_SHA256 = (
    "6726825d"  # first 8 hex digits of the hash of pt_inception-2015-12-05-6726825d.pth
)


def resize_tf1(x, size=299):
    """TF1 bilinear: [B, C, H, W] in any range -> float [B, C, size, size].

    Output i reads source position i * H / size: no half-pixel shift, no antialiasing, the last pixel is held. The references of EDM and
    ADM were made this way; at 512 pixels and more the choice of resize decides the FID.
    """
    x = x if x.is_floating_point() else x.float()
    for dim in (2, 3):
        n = x.shape[dim]
        pos = (
            torch.arange(size, device=x.device) * n
        )  # in units of 1 / size: integers make floor and weight exact
        low, weight = pos // size, (pos % size).to(x.dtype) / size
        x = torch.lerp(
            x.index_select(dim, low),
            x.index_select(dim, (low + 1).clamp(max=n - 1)),
            weight[:, None] if dim == 2 else weight,
        )
    return x


def resize_clean(x, size=299):
    """clean-fid (arXiv 2104.11222): uint8 [B, C, H, W] -> float32 [B, C, size, size] in [0, 255], same device, computed on the CPU.

    PIL bicubic with antialiasing, each channel in float; clipped like clean-fid 0.1.35, not rounded.
    """
    planes = x.cpu().numpy().reshape(-1, *x.shape[2:]).astype(np.float32)
    out = np.stack(
        [
            np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC))
            for p in planes
        ]
    )
    return torch.from_numpy(out.clip(0, 255)).view(*x.shape[:2], size, size).to(x.device)


class Conv(nn.Module):
    def __init__(self, cin, cout, kernel, stride=1, pad=0):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


POOLS = {
    "avg": lambda x: F.avg_pool2d(
        x, 3, 1, 1, count_include_pad=False
    ),  # torchvision's blocks count the border's zeros, TF does not
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "shrink": lambda x: F.max_pool2d(x, 3, 2),
}


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
                kernels = (
                    {key + s: k for s, k in zip("ab", kernels)}
                    if isinstance(kernels, list)
                    else {key: kernels}
                )
                for key, k in kernels.items():
                    k = k if isinstance(k, tuple) else (k, k)
                    self.add_module(
                        key, Conv(c, cout, k, stride, (k[0] // 2, k[1] // 2) if stride == 1 else 0)
                    )  # stride 1 keeps the size
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
        A = lambda cin, p: Mixed(
            cin,
            "avg",
            p,
            branch1x1=[(64, 1, 1)],
            branch5x5=[(48, 1, 1), (64, 5, 1)],
            branch3x3dbl=[(64, 1, 1), (96, 3, 1), (96, 3, 1)],
        )
        C = lambda c: Mixed(
            768,
            "avg",
            192,
            branch1x1=[(192, 1, 1)],
            branch7x7=[(c, 1, 1), (c, h, 1), (192, v, 1)],
            branch7x7dbl=[(c, 1, 1), (c, v, 1), (c, h, 1), (c, v, 1), (192, h, 1)],
        )
        E = lambda cin, pool: Mixed(
            cin,
            pool,
            192,
            branch1x1=[(320, 1, 1)],
            branch3x3=[(384, 1, 1), fork],
            branch3x3dbl=[(448, 1, 1), (384, 3, 1), fork],
        )
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = (
            Conv(3, 32, 3, 2),
            Conv(32, 32, 3),
            Conv(32, 64, 3, pad=1),
        )
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = Mixed(
            288,
            "shrink",
            0,
            branch3x3=[(384, 3, 2)],
            branch3x3dbl=[(64, 1, 1), (96, 3, 1), (96, 3, 2)],
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(128), C(160), C(160), C(192)
        self.Mixed_7a = Mixed(
            768,
            "shrink",
            0,
            branch3x3=[(192, 1, 1), (320, 3, 2)],
            branch7x7x3=[(192, 1, 1), (192, h, 1), (192, v, 1), (192, 3, 2)],
        )
        self.Mixed_7b, self.Mixed_7c = (
            E(1280, "avg"),
            E(2048, "max"),
        )  # max in 7c: a quirk of the TF graph that no key reveals
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
        if (
            images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3)
        ):  # floats would hide a wrong range
            raise ValueError(
                f"Inception: expected uint8 [B, 1 or 3, H, W] (see to_uint8), found {images.dtype} {list(images.shape)}"
            )
        if resize not in ("tf1", "clean"):
            raise ValueError(f"Inception: expected resize 'tf1' or 'clean', found {resize!r}")
        x = resize_tf1(images) if resize == "tf1" else resize_clean(images)
        x = ((x - 128) / 128).expand(
            -1, 3, -1, -1
        )  # TF's scale; 2 x / 255 - 1 is not quite the same
        # Full float32 whatever surrounds the call: convolutions default to TF32, and a training loop may hold autocast open.
        with (
            torch.autocast(x.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            return self.body(x)


def load_inception(path, device="cpu", force=False):
    """Inception with the weights in pytorch-fid's public file -> (Inception, first 8 hex digits of the file's sha256, also printed).

    UserError: unreadable file, another hash (unless force), anything but plain tensors, wrong keys (`num_batches_tracked` may be missing)
    or shapes. The global random state is left as it was, so that evaluating does not change a training run.
    """
    bad = lambda expected, found: UserError(
        f"--inception {path}: expected {expected}, found {found}"
    )
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
            warnings.simplefilter(
                "ignore"
            )  # torch comments on odd pickles before it refuses them; the one line below says enough
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        have = {str(k): list(v.shape) for k, v in state.items()}
    except Exception as e:  # torch raises many types here, with messages of several pages
        raise bad("a state dict of plain tensors", f"something else ({type(e).__name__})") from None
    with torch.random.fork_rng(devices=[]):
        net = Inception()
    want = {
        k: list(v.shape)
        for k, v in net.state_dict().items()
        if k in have or not k.endswith("num_batches_tracked")
    }
    if wrong := sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k)):
        raise bad(
            f"{wrong[0]} {want.get(wrong[0], 'absent')}",
            f"{have.get(wrong[0], 'absent')} ({len(wrong)} wrong keys of {len(want)})",
        )
    net.load_state_dict(state, strict=False)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(
            f"inception {path}: sha256 {prefix}..."
            + (" (forced: do not call the result FID)" if prefix != INCEPTION_SHA256 else "")
        )
    return net.to(device), prefix

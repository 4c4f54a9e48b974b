"""The public Inception network (TF 2015-12-05 weights), its two resizes, and FID's features."""

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
from common.features import Extractor

# First 8 hex digits of the sha256 of pytorch-fid's file, pt_inception-2015-12-05-6726825d.pth.
INCEPTION_SHA256 = "6726825d"


class InceptionExtractor(Extractor):
    """The 2048 pool features of the public network, for FID: `set_reference` has to be called.

    force: accept other weights. The metric is then fd, and the protocol names the weights.
    """

    dims = 2048

    def __init__(self, path, device, resize="tf1", force=False):
        self.net, digest = load_inception(path, device, force)
        self.device = device
        self.resize = resize
        self.protocol = f"inception-{resize}resize"
        if digest == INCEPTION_SHA256:
            self.metric = "fid"
        else:
            self.protocol += f"-{digest}"

    def describe(self, n, source):
        number = f"{n // 1000}k" if n % 1000 == 0 else n
        return (
            f"{self.metric}{number} {self.protocol} uint8 ref={self.reference_name} n={n} {source}"
        )

    def __call__(self, images):
        features, _ = self.net(images.to(self.device), self.resize)
        return features.float().cpu(), None


# ---- resizes -------------------------------------------------------------------------------------


def resize_tf1(x, size=299):
    """TF1 bilinear: [B, C, H, W] in any range -> float [B, C, size, size].

    Output i reads source position i * H / size: no half-pixel shift, no antialiasing, the last
    pixel is repeated. The references of EDM and ADM were made this way; at 512 pixels and more the
    choice of resize decides the FID.
    """
    x = x if x.is_floating_point() else x.float()
    for dim in (2, 3):
        n = x.shape[dim]
        position = torch.arange(size, device=x.device) * n  # in units of 1 / size, so exact
        low = position // size
        high = (low + 1).clamp(max=n - 1)
        weight = (position % size).to(x.dtype) / size
        if dim == 2:
            weight = weight[:, None]
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


def resize_clean(x, size=299):
    """clean-fid (arXiv 2104.11222): uint8 [B, C, H, W] -> float32 [B, C, size, size] in [0, 255].

    PIL bicubic with antialiasing, each channel in float, clipped like clean-fid 0.1.35 and not
    rounded. Computed on the CPU; the result is on the device of x.
    """
    planes = x.cpu().numpy().reshape(-1, *x.shape[2:]).astype(np.float32)
    resized = [
        np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC))
        for plane in planes
    ]
    out = torch.from_numpy(np.stack(resized).clip(0, 255))
    return out.view(*x.shape[:2], size, size).to(x.device)


# ---- network -------------------------------------------------------------------------------------


class Conv(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, pad=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


POOLS = {
    # without the border's zeros, as TF; torchvision's Inception blocks count them
    "avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "shrink": lambda x: F.max_pool2d(x, 3, 2),
}
FORK = ((1, 3), (3, 1))  # two convolutions of the same input, both kept; the last of a branch


class Mixed(nn.Module):
    """Branches of convolutions and a pooled branch on one input, concatenated in this order.

    A branch is a list of (channels, kernel) or (channels, kernel, stride). Its convolutions have
    the names of the public file: `branch` if there is one, else `branch_1`, `branch_2`, ..., with
    a and b appended in a FORK. pool_out: channels of a 1 x 1 convolution after the pool; 0: none.
    """

    def __init__(self, c_in, pool, pool_out, **branches):
        super().__init__()
        self.pool = POOLS[pool]
        self.branches = []  # for each branch, for each of its steps, names of the convolutions
        for name, convs in branches.items():
            self.branches.append(self.add_branch(c_in, name, convs))
        self.branch_pool = Conv(c_in, pool_out, 1) if pool_out else nn.Identity()

    def add_branch(self, c_in, name, convs):
        steps = []
        for i, (c_out, kernel, *stride) in enumerate(convs, 1):
            key = name if len(convs) == 1 else f"{name}_{i}"
            kernels = {key + "a": FORK[0], key + "b": FORK[1]} if kernel == FORK else {key: kernel}
            for key, size in kernels.items():
                self.add_module(key, branch_conv(c_in, c_out, size, *stride))
            steps.append(list(kernels))
            c_in = c_out
        return steps

    def forward(self, x):
        outputs = []
        for steps in self.branches:
            h = [x]
            for keys in steps:
                h = [getattr(self, key)(h[0]) for key in keys]
            outputs += h
        outputs.append(self.branch_pool(self.pool(x)))
        return torch.cat(outputs, 1)


def branch_conv(c_in, c_out, kernel, stride=1):
    """With stride 1 the size is kept, with stride 2 there is no padding."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    pad = (height // 2, width // 2) if stride == 1 else 0
    return Conv(c_in, c_out, (height, width), stride, pad)


def mixed_a(c_in, pool_out):
    return Mixed(
        c_in,
        "avg",
        pool_out,
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
    )


def mixed_c(c):
    row, column = (1, 7), (7, 1)
    return Mixed(
        768,
        "avg",
        192,
        branch1x1=[(192, 1)],
        branch7x7=[(c, 1), (c, row), (192, column)],
        branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)],
    )


def mixed_e(c_in, pool):
    return Mixed(
        c_in,
        pool,
        192,
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), (384, FORK)],
        branch3x3dbl=[(448, 1), (384, 3), (384, FORK)],
    )


class Inception(nn.Module):
    """Inception v3 of the TF 2015-12-05 graph (arXiv 1512.00567), with the keys of pytorch-fid.

    forward(images uint8 [B, 1 or 3, H, W], resize "tf1" or "clean") -> features float32 [B, 2048],
    logits float32 [B, 1008] (with bias). Always in eval mode and without gradients: with batch
    statistics a feature would depend on the other images of its batch.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, pad=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = mixed_a(192, 32)
        self.Mixed_5c = mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        self.Mixed_6a = Mixed(
            288,
            "shrink",
            0,
            branch3x3=[(384, 3, 2)],
            branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)],
        )
        self.Mixed_6b = mixed_c(128)
        self.Mixed_6c = mixed_c(160)
        self.Mixed_6d = mixed_c(160)
        self.Mixed_6e = mixed_c(192)
        self.Mixed_7a = Mixed(
            768,
            "shrink",
            0,
            branch3x3=[(192, 1), (320, 3, 2)],
            branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
        )
        self.Mixed_7b = mixed_e(1280, "avg")
        self.Mixed_7c = mixed_e(2048, "max")  # a quirk of the TF graph that no key reveals
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
        # floats are refused: they would hide a wrong range
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                "Inception: expected uint8 [B, 1 or 3, H, W], "
                f"found {images.dtype} {list(images.shape)}"
            )
        if resize not in ("tf1", "clean"):
            raise ValueError(f"Inception: expected resize 'tf1' or 'clean', found {resize!r}")
        x = resize_tf1(images) if resize == "tf1" else resize_clean(images)
        x = (x - 128) / 128  # TF's scale, which is not quite 2 x / 255 - 1
        x = x.expand(-1, 3, -1, -1)
        # full float32: convolutions default to TF32, and the caller may have enabled autocast
        no_autocast = torch.autocast(x.device.type, enabled=False)
        with no_autocast, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.body(x)


def load_inception(path, device="cpu", force=False):
    """Inception with the weights of a file, and the first 8 hex digits of its sha256 (printed too).

    The file is pytorch-fid's; another hash is refused unless `force`. UserError: unreadable file,
    anything but plain tensors, wrong keys (`num_batches_tracked` may be missing) or shapes.
    """

    def error(expected, found):
        return UserError(f"--inception {path}: expected {expected}, found {found}")

    try:
        with open(path, "rb") as f:
            data = f.read()  # hashed and loaded from the same bytes
    except OSError as e:
        raise error("a weight file", e.strerror) from None
    digest = hashlib.sha256(data).hexdigest()[:8]
    is_public = digest == INCEPTION_SHA256
    if not is_public and not force:
        raise error(f"pytorch-fid's public weights, sha256 {INCEPTION_SHA256}...", f"{digest}...")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickles before it refuses them
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        found = {str(key): list(tensor.shape) for key, tensor in state.items()}
    except Exception as e:  # torch raises many types here, with messages of several pages
        name = type(e).__name__
        raise error("a state dict of plain tensors", f"something else ({name})") from None

    with torch.random.fork_rng(devices=[]):  # evaluating does not change a training run
        net = Inception()
    expected = {
        key: list(tensor.shape)
        for key, tensor in net.state_dict().items()
        if key in found or not key.endswith("num_batches_tracked")
    }
    wrong = [k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)]
    if wrong:
        key = min(wrong)
        raise error(
            f"{key} {expected.get(key, 'absent')}",
            f"{found.get(key, 'absent')} ({len(wrong)} wrong keys of {len(expected)})",
        )
    net.load_state_dict(state, strict=False)
    if not dist.is_initialized() or dist.get_rank() == 0:
        note = "" if is_public else " (forced: do not call the result FID)"
        print(f"inception {path}: sha256 {digest}...{note}")
    return net.to(device), digest

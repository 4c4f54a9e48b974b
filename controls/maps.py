"""Controls: functions that turn an image into a condition, for nct.py and eval.py.

A control is a function (images, r, control) -> condition:
    images       float [n, C, H, W] in [0, 1]
    r            uniform random numbers [n, 4] in [0, 1), for controls with a random part
    control      the `Control` object, with --factor and the network of --control-model
    condition    a map [n, C', H, W] in [0, 1], or a vector [n, D] (`image`)
To add one, write the function and list it in MAPS. The image must (nearly) determine its condition:
if a condition fits every image a little, the boundary loss of nct.py is smallest for a branch that
ignores it. No gradient flows through a control.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import UserError, did_you_mean
from common.features import ClassifierExtractor
from controls.estimator import ESTIMATORS, Estimator

# ---- maps ----------------------------------------------------------------------------------------


def edges(images, r, control):
    """Soft edges [n, 1, H, W]: norm of the grey image's Sobel gradient; 1 from black to white."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=images.dtype)
    kernel = kernel.to(images.device, non_blocking=True)
    kernels = torch.stack([kernel, kernel.T])[:, None]  # d/dx, d/dy
    grey = images.mean(1, keepdim=True)
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)
    norm = gradient.square().sum(1, keepdim=True).sqrt() / 4
    return norm.clamp(max=1)


def canny(images, r, control):
    """Thin binary edges [n, 1, H, W] of the grey image. Computed on the CPU."""
    found = [canny_edges(image) for image in images.mean(1).cpu().double().numpy()]
    return torch.from_numpy(np.stack(found)[:, None]).to(images.device)


def canny_edges(image, low=0.1, high=0.2):
    """Canny's edge detector (IEEE PAMI 1986). image: grey [H, W] -> float32 [H, W] of 0 and 1.

    low, high: thresholds of the gradient, relative to its maximum in the image.
    """
    from scipy import ndimage

    smooth = ndimage.gaussian_filter(image, 1)
    gy = ndimage.sobel(smooth, 0, mode="nearest")
    gx = ndimage.sobel(smooth, 1, mode="nearest")
    norm = np.hypot(gx, gy)

    # ridges: at least as large as both neighbours along the gradient, rounded to 45 degrees
    direction = np.round(np.arctan2(gy, gx) / (np.pi / 4)).astype(int) % 4
    offsets = np.array([(0, 1), (1, 1), (1, 0), (1, -1)])[direction]  # [H, W, (dy, dx)]
    dy, dx = offsets[..., 0], offsets[..., 1]
    h, w = image.shape
    y, x = np.mgrid[1 : h + 1, 1 : w + 1]
    padded = np.pad(norm, 1)
    ridge = (norm >= padded[y + dy, x + dx]) & (norm > padded[y - dy, x - dx])

    # hysteresis: connected ridges above `low` are kept if one of them is above `high`
    weak = ridge & (norm > low * norm.max())
    strong = ridge & (norm > high * norm.max())
    parts, _ = ndimage.label(weak, np.ones((3, 3)))
    kept = weak & np.isin(parts, parts[strong])
    return kept.astype(np.float32)


def sr(images, r, control):
    """Super-resolution: means over blocks of --factor x --factor pixels, at full size."""
    small = F.avg_pool2d(images, control.factor)
    return F.interpolate(small, scale_factor=control.factor, mode="nearest")


def half(images, r, control):
    """The upper half of the image, and the mask."""
    mask = torch.zeros_like(images[:, :1])
    mask[:, :, images.shape[2] // 2 :] = 1
    return masked(images, mask)


def inpaint(images, r, control):
    """The image without a box at a random place, and the mask. Box: 1/4 to 3/4 of each side."""
    size = 0.25 + 0.5 * r[:, :2]  # [n, (height, width)] as shares of the image
    start = (1 - size) * r[:, 2:]
    end = start + size
    h, w = images.shape[2:]
    y = (torch.arange(h, device=images.device) + 0.5) / h
    x = (torch.arange(w, device=images.device) + 0.5) / w
    in_rows = (start[:, :1] <= y) & (y < end[:, :1])  # [n, H]
    in_columns = (start[:, 1:] <= x) & (x < end[:, 1:])  # [n, W]
    mask = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return masked(images, mask.to(images.dtype))


def masked(images, mask):
    """[n, C + 1, H, W]: the image, 0 where it is hidden, and the mask [n, 1, H, W], 1 there."""
    return torch.cat([images * (1 - mask), mask], 1)


def depth(images, r, control):
    """Depth [n, 1, H, W] by the network in --control-model; in each image 1 is near, 0 is far."""
    estimator = control.estimator
    rgb = images.expand(-1, 3, -1, -1)
    rgb = F.interpolate(rgb, estimator.size, mode="bicubic", align_corners=False).clamp(0, 1)
    d = estimator(rgb).predicted_depth[:, None].to(images.dtype)
    d = F.interpolate(d, images.shape[2:], mode="bilinear", align_corners=False)
    low = d.amin((1, 2, 3), keepdim=True)
    high = d.amax((1, 2, 3), keepdim=True)
    return (d - low) / (high - low).clamp(min=1e-6)


def image(images, r, control):
    """Image prompt [n, D]: embedding by the CLIP encoder in --control-model.

    The preprocessing is CLIP's: resize the shorter side, then crop the square in the middle.
    """
    estimator = control.estimator
    side = estimator.size[0]
    h, w = (n * side // min(images.shape[2:]) for n in images.shape[2:])
    rgb = images.expand(-1, 3, -1, -1)
    rgb = F.interpolate(rgb, (h, w), mode="bicubic", align_corners=False, antialias=True)
    top, left = (h - side) // 2, (w - side) // 2
    square = rgb.clamp(0, 1)[..., top : top + side, left : left + side]
    return estimator(square).image_embeds.to(images.dtype)


MAPS = {f.__name__: f for f in (edges, canny, sr, half, inpaint, depth, image)}
MASKED = ("half", "inpaint")  # the last channel of the condition is a mask


# ---- the control of a run ------------------------------------------------------------------------


class Control:
    """Computes the condition of a model's samples: h(x) of nct.py.

    name: a key of MAPS; or "class", the label, for a generator that takes none. On the toy it is
    the nearest mode, for images the prediction of the classifier in the teacher's folder.
    One of these is not 0: `classes` (number of labels), `channels` (of a map), `embedding` (length
    of a vector). `shape`: [C, H, W] of an image; None on the toy.
    """

    def __init__(self, name, model, teacher=None, factor=4, folder=None):
        self.name = name
        self.model = model
        self.factor = factor
        self.folder = folder
        self.is_toy = model.adapter == "toy"
        self.classes = 0
        self.channels = 0
        self.embedding = 0
        self.shape = None if self.is_toy else model.image_shape
        self.check()
        self.estimator = Estimator(name, folder) if name in ESTIMATORS else None
        if name == "class" and self.is_toy:
            self.classes = model.mixture.modes
        elif name == "class":
            measured = teacher if teacher is not None else model
            self.classifier = ClassifierExtractor(measured)
            self.classes = len(measured.evaluation["names"])
        elif name == "image":
            self.embedding = self.estimator.net.config.projection_dim
        else:
            self.channels = self.map(torch.zeros(2, *self.shape), torch.zeros(2, 4)).shape[1]

    def check(self):
        """UserError if the flags contradict each other or do not fit the generator."""
        known = ["class"] if self.is_toy else [*MAPS, "class"]
        if self.name not in known:
            raise UserError(
                f"--control {self.name}: expected {' or '.join(known)} for this generator"
                f"{did_you_mean(self.name, known)}"
            )
        if (self.folder is not None) != (self.name in ESTIMATORS):
            raise UserError(
                f"--control {self.name}: expected a folder as --control-model with depth (an "
                f"estimator) or image (a CLIP encoder), and only there, found {self.folder}"
            )
        takes_labels = self.model.labelled if self.is_toy else self.model.classes
        if self.name == "class" and takes_labels:
            raise UserError(
                "--control class: expected a generator without labels, "
                "found one that takes them, or prompts"
            )
        if self.name == "sr" and (self.factor < 2 or any(n % self.factor for n in self.shape[1:])):
            raise UserError(
                f"--factor {self.factor}: expected a number from 2 that divides the "
                f"{self.shape[1]} x {self.shape[2]} pixels of an image"
            )

    def config(self):
        """The entry of distill.json from which the control is made again."""
        config = dict(name=self.name, factor=self.factor)
        if self.folder:
            config["folder"] = str(self.folder)
        return config

    def map(self, images, r):
        """Images [n, C, H, W] in [0, 1] and r [n, 4] -> condition."""
        c = MAPS[self.name](images, r, self)
        is_grey = c.ndim == 4 and c.shape[1] == 1
        if is_grey and images.shape[1] == 3:
            return c.expand(-1, 3, -1, -1)  # pipelines with a ControlNet take RGB pictures
        return c

    @torch.no_grad()
    def __call__(self, x, r):
        """Samples x [n, *shape] of the model, uniform numbers r [n, 4] -> condition:
        labels int64 [n], a map float32 [n, channels, H, W] or a vector [n, embedding].
        """
        if self.is_toy:
            means = self.model.mixture.means.to(x.device, non_blocking=True)
            return torch.cdist(x.double(), means).argmin(1)
        images = self.model.decode(x)  # clips to the valid range
        if self.classes:
            _, logits = self.classifier(images)
            return logits.argmax(1).to(x.device)
        return self.map(images.float() / 255, r)

    def error(self, a, b):
        """Distance of the conditions a and b, [n]. Labels: 0 or 1; vectors: 1 - cosine similarity;
        maps: mean absolute difference, of the pixels that the mask of b does not hide.
        """
        if self.classes:
            return (a != b).double()
        if self.embedding:
            return 1 - F.cosine_similarity(a, b)
        difference = (a - b).abs()
        if self.name not in MASKED:
            return difference.flatten(1).mean(1)
        visible = (1 - b[:, -1:]).flatten(1).sum(1)  # pixels
        channels = a.shape[1] - 1
        return difference[:, :-1].flatten(1).sum(1) / (visible * channels).clamp(min=1)

    def picture(self, c):
        """Maps -> uint8 [n, C, H, W]; hidden pixels are grey."""
        if self.name in MASKED:
            c = c[:, :-1] + 0.5 * c[:, -1:]
        return (c * 255).round().clamp(0, 255).to(torch.uint8)

    def blank(self, n, device):
        """A placeholder: n conditions of zeros."""
        if self.classes:
            return torch.zeros(n, dtype=torch.int64, device=device)
        if self.embedding:
            return torch.zeros(n, self.embedding, device=device)
        return torch.zeros(n, self.channels, *self.shape[1:], device=device)

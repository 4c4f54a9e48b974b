"""Controls: functions that turn an image into a condition. nct.py teaches a finished generator to obey one, eval.py asks whether it does.

A control is one function (u, r, how) -> map [n, C', H, W] in [0, 1]. u: images [n, C, H, W] in [0, 1]; r: uniform numbers [n, 4], for controls with
chance; how: the `Control`, whose fields are the flags. `image` gives a vector [n, D] instead. To add one, write it and name it in MAPS. It must be (nearly) a function of the image: a
condition that fits every image a little is best ignored, says the boundary loss. No gradient passes through it.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import UserError, did_you_mean
from common.files import read_json
from common.metrics import Extractor


def edges(u, r, how):
    """Soft edges: length of the Sobel gradient of the grey image; 1 is a step from black to white."""
    gx = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=u.dtype, device=u.device)
    grey = F.pad(u.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    return (
        F.conv2d(grey, torch.stack([gx, gx.T])[:, None]).square().sum(1, keepdim=True).sqrt() / 4
    ).clamp(max=1)


def canny(u, r, how, low=0.1, high=0.2):
    """Thin binary edges: ridges of the gradient of the blurred image above `low` of the image's maximum that touch one above `high`. On the host."""
    from scipy import ndimage

    out = np.zeros((len(u), 1, *u.shape[2:]), np.float32)
    for i, image in enumerate(u.mean(1).cpu().double().numpy()):
        smooth = ndimage.gaussian_filter(image, 1)
        gy, gx = ndimage.sobel(smooth, 0, mode="nearest"), ndimage.sobel(smooth, 1, mode="nearest")
        size, side = np.hypot(gx, gy), np.round(np.arctan2(gy, gx) / (np.pi / 4)).astype(int) % 4
        padded, (h, w) = np.pad(size, 1), size.shape
        step = np.array([(0, 1), (1, 1), (1, 0), (1, -1)])[
            side
        ]  # the neighbours along the gradient
        y, x = np.mgrid[1 : h + 1, 1 : w + 1]
        ridge = (size >= padded[y + step[..., 0], x + step[..., 1]]) & (
            size > padded[y - step[..., 0], x - step[..., 1]]
        )
        weak = ridge & (size > low * size.max())
        parts, _ = ndimage.label(weak, np.ones((3, 3)))
        out[i, 0] = np.isin(parts, parts[ridge & (size > high * size.max())]) & weak
    return torch.from_numpy(out).to(u.device)


def sr(u, r, how):
    """Super-resolution: means over blocks of --factor pixels, shown at full size."""
    return F.interpolate(F.avg_pool2d(u, how.factor), scale_factor=how.factor, mode="nearest")


def half(u, r, how):
    """The upper half; and the mask, 1 where pixels are unknown."""
    mask = torch.zeros_like(u[:, :1])
    mask[:, :, u.shape[2] // 2 :] = 1
    return torch.cat([u * (1 - mask), mask], 1)


def inpaint(u, r, how):
    """All but a box of random place, a quarter to three quarters of each side; and the mask."""
    size = 0.25 + 0.5 * r[:, :2]
    low, high = (1 - size) * r[:, 2:], (1 - size) * r[:, 2:] + size
    inside = [
        (low[:, i, None] <= p) & (p < high[:, i, None])
        for i, p in enumerate((torch.arange(n, device=u.device) + 0.5) / n for n in u.shape[2:])
    ]
    mask = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(u.dtype)
    return torch.cat([u * (1 - mask), mask], 1)


def depth(u, r, how):
    """Depth, near is 1, of the estimator in --control-model; each image from 0 to 1."""
    size, mean, std = how.estimator_input
    x = F.interpolate(u.expand(-1, 3, -1, -1), size, mode="bicubic", align_corners=False).clamp(
        0, 1
    )
    d = how.estimator((x - mean.to(x)) / std.to(x)).predicted_depth[:, None].to(u.dtype)
    d = F.interpolate(d, u.shape[2:], mode="bilinear", align_corners=False)
    low, high = d.amin((1, 2, 3), keepdim=True), d.amax((1, 2, 3), keepdim=True)
    return (d - low) / (high - low).clamp(min=1e-6)


def image(u, r, how):
    """What the image shows: its embedding by the CLIP encoder in --control-model [n, D]. As CLIP's preprocessing has it: resized, then the square in the middle."""
    (size, _), mean, std = how.estimator_input
    shape = [n * size // min(u.shape[2:]) for n in u.shape[2:]]
    top, left = ((n - size) // 2 for n in shape)
    x = F.interpolate(
        u.expand(-1, 3, -1, -1), shape, mode="bicubic", align_corners=False, antialias=True
    ).clamp(0, 1)[..., top : top + size, left : left + size]
    return how.estimator((x - mean.to(x)) / std.to(x)).image_embeds.to(u.dtype)


MAPS = {f.__name__: f for f in (edges, canny, sr, half, inpaint, depth, image)}


MASKED = ("half", "inpaint")  # the last channel is a mask


ESTIMATORS = {  # controls with a network: its class in transformers, what it is, mean and deviation of its input where its folder does not say
    "depth": (
        "AutoModelForDepthEstimation",
        "a depth estimator",
        [0.485, 0.456, 0.406],
        [0.229, 0.224, 0.225],
    ),
    "image": (
        "CLIPVisionModelWithProjection",
        "a CLIP vision encoder with projection",
        [0.48145466, 0.4578275, 0.40821073],
        [0.26862954, 0.26130258, 0.27577711],
    ),
}


class Control:
    """h: samples of a model -> conditions. name: of MAPS, or "class": the label, of a generator that takes none (toy: the nearest mode; images: what the
    classifier of the teacher's folder sees). classes: number of values of "class", else 0; channels: of a map, else 0; embedding: length of a vector, else 0;
    shape: of an image."""

    def __init__(self, name, model, teacher=None, factor=4, folder=None):
        (
            self.name,
            self.model,
            self.factor,
            self.folder,
            self.classes,
            self.channels,
            self.embedding,
        ) = name, model, factor, folder, 0, 0, 0
        toy = model.adapter == "toy"
        known = ["class"] if toy else [*MAPS, "class"]
        if name not in known:
            raise UserError(
                f"--control {name}: expected {' or '.join(known)} for this generator{did_you_mean(name, known)}"
            )
        if (folder is not None) != (name in ESTIMATORS):
            raise UserError(
                f"--control {name}: expected a folder as --control-model with depth (an estimator) or image (a CLIP encoder), and only there, found {folder}"
            )
        self.shape = None if toy else model.image_shape
        if name == "class":
            if model.classes and not toy or getattr(model, "labelled", False):
                raise UserError(
                    "--control class: expected a generator without labels, found one that takes them, or prompts"
                )
            self.classifier = None
            if not toy:
                self.classifier = Extractor(teacher if teacher is not None else model)
            self.classes = (
                model.mixture.modes if toy else len(self.classifier.teacher.evaluation["names"])
            )
            return
        if name == "sr" and (factor < 2 or any(n % factor for n in self.shape[1:])):
            raise UserError(
                f"--factor {factor}: expected a number from 2 that divides the {self.shape[1]} x {self.shape[2]} pixels of an image"
            )
        if name in ESTIMATORS:
            self.load_estimator(folder)
        if name == "image":
            self.embedding = self.estimator.config.projection_dim
            return
        self.channels = self.map(torch.zeros(2, *self.shape), torch.zeros(2, 4)).shape[1]

    def load_estimator(self, folder):
        """The network of --control-model, frozen, and what its preprocessing asks for: size in pixels, mean, deviation."""
        import transformers

        cls, what, mean, std = ESTIMATORS[self.name]
        if not Path(folder).is_dir():
            raise UserError(
                f"--control-model {folder}: expected a folder of transformers with {what}, found none"
            )
        if self.name == "image" and (
            kind := read_json(Path(folder) / "config.json", "--control-model").get("model_type")
        ) not in ("clip_vision_model", "clip"):
            raise UserError(
                f"--control-model {folder}: expected {what} of transformers, found model_type {kind!r}"
            )
        try:
            self.estimator, loaded = getattr(transformers, cls).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as e:  # transformers raises many kinds for folders of other things
            raise UserError(
                f"--control-model {folder}: expected {what} of transformers: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
            ) from None
        if (
            self.name == "image" and loaded["missing_keys"]
        ):  # made up by transformers; depth estimators lack some that they do not use
            raise UserError(
                f"--control-model {folder}: expected all weights of {what}, {sorted(loaded['missing_keys'])[0]} is missing"
            )
        self.estimator.eval().requires_grad_(False)
        path = Path(folder) / "preprocessor_config.json"
        given = read_json(path, "--control-model") if path.exists() else {}
        normal = [given.get(k, v) for k, v in (("image_mean", mean), ("image_std", std))]
        for name, found in zip(("image_mean", "image_std"), normal):
            if not (
                isinstance(found, list)
                and len(found) == 3
                and all(isinstance(n, (int, float)) for n in found)
            ):
                raise UserError(f"{path}: {name}: expected three numbers, found {found!r}")
        size = given.get("size") if isinstance(given.get("size"), dict) else {}
        pixels = (
            (self.estimator.config.image_size,) * 2
            if self.name == "image"
            else (size.get("height", 384), size.get("width", 384))
        )
        self.estimator_input = (
            pixels,
            *(torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in normal),
        )

    def config(self):
        return dict(name=self.name, factor=self.factor) | (
            dict(folder=str(self.folder)) if self.folder else {}
        )

    def map(self, u, r):
        c = MAPS[self.name](u, r, self)
        return (
            c.expand(-1, 3, -1, -1) if c.ndim == 4 and c.shape[1] == 1 and u.shape[1] == 3 else c
        )  # a picture, as pipelines want it

    @torch.no_grad()
    def __call__(self, x, r):
        """Samples [n, *shape] and r [n, 4] -> int64 [n], float32 [n, channels, H, W] or [n, embedding]."""
        if self.model.adapter == "toy":
            return torch.cdist(x.double(), self.model.mixture.means.to(x.device)).argmin(1)
        images = self.model.decode(x)  # clips to the valid range
        if self.classes:
            return self.classifier(images)[1].argmax(1).to(x.device)
        if self.folder:
            self.estimator.to(x.device)
        return self.map(images.float() / 255, r)

    def error(self, a, b):
        """Distance of conditions [n]: mean absolute difference, of known pixels only; class: 0 or 1; image: 1 - cosine."""
        if self.classes:
            return (a != b).double()
        if self.embedding:
            return 1 - F.cosine_similarity(a, b)
        if self.name in MASKED:
            return (a - b)[:, :-1].abs().flatten(1).sum(1) / (
                (1 - b[:, -1:]).flatten(1).sum(1) * (a.shape[1] - 1)
            ).clamp(min=1)
        return (a - b).abs().flatten(1).mean(1)

    def picture(self, c):
        """uint8 [n, C, H, W] of maps; what a mask hides is grey."""
        if self.name in MASKED:
            c = c[:, :-1] + 0.5 * c[:, -1:]
        return (c * 255).round().clamp(0, 255).to(torch.uint8)

    def blank(self, n, device):
        """A condition for n samples that nobody looks at."""
        if self.classes:
            return torch.zeros(n, dtype=torch.int64, device=device)
        return torch.zeros(
            n,
            *(self.embedding,) if self.embedding else (self.channels, *self.shape[1:]),
            device=device,
        )

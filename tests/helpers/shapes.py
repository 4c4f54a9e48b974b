"""Pictures of coloured shapes in class folders, as a user may bring them, and spoilt copies."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

CLASSES = {  # name -> colour
    "blue square": (50, 90, 200),
    "green triangle": (60, 160, 70),
    "red circle": (210, 50, 50),
    "yellow star": (220, 190, 40),
}


def shape_image(kind, rng, size=32):
    """One picture, uint8 [size, size, 3]: a shape of random place, size, angle and brightness on a
    light ground. kind: the last word of a class."""
    scale = 4  # drawn larger and reduced: smooth edges
    ground = tuple(int(v) for v in rng.integers(215, 256, 3))
    image = Image.new("RGB", (size * scale, size * scale), ground)
    radius = rng.uniform(0.22, 0.38) * size * scale
    cx, cy = rng.uniform(0.4, 0.6, 2) * size * scale
    angle = rng.uniform(0, 2 * math.pi)
    colour = np.array(CLASSES[kind]) + rng.normal(0, 12, 3)
    fill = tuple(int(v) for v in colour.clip(0, 255))

    def corners(*radii):
        n = len(radii)
        return [
            (
                cx + r * math.cos(angle + 2 * math.pi * i / n),
                cy + r * math.sin(angle + 2 * math.pi * i / n),
            )
            for i, r in enumerate(radii)
        ]

    pen = ImageDraw.Draw(image)
    if kind.endswith("circle"):
        pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=fill)
    elif kind.endswith("star"):
        pen.polygon(corners(*[radius, 0.45 * radius] * 5), fill=fill)
    else:
        pen.polygon(corners(*[radius] * (4 if kind.endswith("square") else 3)), fill=fill)
    return np.asarray(image.resize((size, size), Image.LANCZOS))


def write_shapes(home, n=300, size=32, seed=0):
    """n PNGs in four class folders, equally many in each -> home."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        kind = list(CLASSES)[i % len(CLASSES)]
        (home / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(shape_image(kind, rng, size)).save(home / kind / f"{i:04d}.png")
    return home


# ---- spoilt copies -------------------------------------------------------------------------------


def to_uint8(x):
    return x.round().clip(0, 255).to(torch.uint8)


def with_noise(images, std, seed=1):
    """uint8 [n, C, H, W] with Gaussian noise of this standard deviation, in grey levels."""
    generator = torch.Generator().manual_seed(seed)
    return to_uint8(images + std * torch.randn(images.shape, generator=generator))


def blurred(images, sigma):
    """Gaussian blur; sigma in pixels."""
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    x = images.flatten(0, 1)[:, None].float()
    x = F.pad(x, [reach] * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return to_uint8(x.view(images.shape))


def with_colour_shift(images, shift):
    """shift: grey levels added to each channel."""
    return to_uint8(images + torch.tensor(shift, dtype=torch.float32).view(1, -1, 1, 1))

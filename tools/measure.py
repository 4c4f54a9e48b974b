"""What eval.py measures beside the metrics of training: Inception, image folders, latency."""

import hashlib
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.distributed import gather_rows, on_all_ranks
from common.errors import UserError
from common.features import Extractor
from common.image_folder import SUFFIXES, read_image
from common.metrics import METRICS, hash_images
from common.report import save_grid
from common.sampling import generate
from tools.inception import INCEPTION_SHA256, load_inception

DISTANCES = ("fid", "fd", "kid", "energy_distance", "sliced_wasserstein")  # lower is better


class InceptionExtractor(Extractor):
    """The 2048 features of the public Inception network, given by path. `use` names the reference. Weights forced by the user give fd, not FID."""

    dims = 2048

    def __init__(self, path, device, resize="tf1", force=False):
        self.net, digest = load_inception(path, device, force)
        public = digest == INCEPTION_SHA256
        self.metric, self.protocol = (
            "fid" if public else "fd",
            f"inception-{resize}resize" + ("" if public else f"-{digest}"),
        )
        self.device = device
        self.resize = resize

    def describe(self, n, source):
        return f"{self.metric}{f'{n // 1000}k' if n % 1000 == 0 else n} {self.protocol} uint8 ref={self.reference_name} n={n} {source}"

    def __call__(self, images):
        return self.net(images.to(self.device), self.resize)[0].float().cpu(), None


def similarity(sampler, model, extractor, images, seed=0, batch=250, rank=0, world=1, prompts=8):
    """How alike are images of one prompt or label? Mean cosine of the features of two of them: over all pairs of `images` of each of the first prompts. 1: all
    are one; what the teacher has is the scale. Phased DMD (arXiv 2510.27684) measures diversity like this, in the features of DINOv3."""
    p = min(prompts, max(model.classes, 1))
    if p * images < world:
        raise UserError(
            f"--per-prompt {images}: expected at least one of {p} x {images} images for each of {world} processes"
        )
    parts = [
        extractor(model.decode(x))[0]
        for _, _, x in generate(sampler, model, p * images, seed, batch, rank, world, classes=p)
    ]
    f = torch.nn.functional.normalize(
        gather_rows(torch.cat(parts), p * images, rank, world).double(), dim=1
    ).view(images, p, -1)
    return (
        ((f.sum(0).square().sum(1) - images) / (images * (images - 1))).mean().item()
    )  # |sum|^2 = images + the sum over ordered pairs


def list_images(flag, folder, n=None):
    if not Path(folder).is_dir():
        raise UserError(
            f"{flag} {folder}: expected a folder of images, found {'a file' if Path(folder).exists() else 'nothing'}"
        )
    files = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in SUFFIXES)
    if len(files) < (n or 8):
        raise UserError(
            f"{flag} {folder}: expected at least {n or 8} images ({', '.join(SUFFIXES)}), found {len(files)}"
        )
    return files[:n]


def folder_features(files, extractor, batch, rank, world):
    """Features float32 [n, D] and fingerprints [n] of image files, on every rank."""
    shape = extractor.shape
    if len(files) < world:
        raise UserError(f"{len(files)} images: expected at least one for each of {world} processes")

    def mine():
        features, ids, group = [], [], []
        for path in tqdm(
            files[rank::world] + [None],
            desc=files[0].parent.name,
            disable=rank > 0,
            mininterval=bar_interval(),
        ):
            try:  # at the file's own size: an image that is resized twice gives another number
                image = None if path is None else read_image(path, 3 if shape is None else shape[0])
            except ValueError as e:
                raise UserError(f"{path}: not readable as an image ({str(e)[:100]})") from None
            if image is not None and shape is not None and image.shape != shape:
                raise UserError(
                    f"{path}: expected {shape[1]} x {shape[2]} pixels, the teacher's size, found {image.shape[1]} x {image.shape[2]}"
                )
            if group and (
                image is None or len(group) == batch or image.shape != group[0].shape
            ):  # sizes may differ within a folder
                stack = torch.stack(group)
                features.append(extractor(stack)[0])
                ids.append(hash_images(stack))
                group = []
            group.append(image)
        return torch.cat(features), torch.cat(ids)

    local = []
    on_all_ranks(
        lambda: local.extend(mine()), world
    )  # a file that one rank cannot read ends all of them
    return tuple(gather_rows(a, len(files), rank, world) for a in local)


def bar_interval():
    return 0.2 if sys.stderr.isatty() else 10


def dummy_inputs(model, n):
    """(z, cond, noise) for n samples that nobody looks at."""
    device = next(model.parameters()).device
    z = torch.randn(n, *model.shape, device=device)
    return z, model.encode(torch.arange(n) % max(model.classes, 1)), lambda: torch.randn_like(z)


@torch.no_grad()
def count_nfe(sampler, model):
    """Network passes per image, counted where they happen: rows that enter the network (the exact toy teacher has none, there the model itself counts)."""
    seen = []
    count = lambda m, a, kw: seen.append(
        len(next(v for v in (*a, *kw.values()) if torch.is_tensor(v)))
    )
    targets = [
        m if getattr(m, "exact", False) else m.net for m in getattr(model, "experts", [model])
    ]
    hooks = [m.register_forward_pre_hook(count, with_kwargs=True) for m in targets]
    try:
        sampler(model, *dummy_inputs(model, 2))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(seen) / 2


@torch.no_grad()
def latency(sampler, model, batch):
    """Median time of sampling and decoding, at batch 1 and `batch`, of at least three calls."""
    out, device = {}, next(model.parameters()).device
    for b in sorted({1, batch}):
        inputs, times = dummy_inputs(model, b), []
        while len(times) < 5 or (len(times) < 50 and sum(times) < 2):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            x = sampler(model, *inputs)
            x = x if model.adapter == "toy" else model.decode(x)
            x.cpu()  # waits for the device
            times.append(time.perf_counter() - start)
        t = float(np.median(times[2:]))  # two calls of warm-up
        out[str(b)] = dict(ms_per_image=round(t / b * 1000, 4), images_per_s=round(b / t, 2))
    return out


def draw_rows(path, rows, args, device):
    """Picture: same noise, same labels in every row."""
    sheet = []
    for row in rows:
        model, n = row["model"].to(device), 4000 if row["teacher"].adapter == "toy" else 20
        parts = generate(
            row["sampler"], model, n, args.seed, max(args.batch, 1000) if n > 20 else args.batch
        )
        sheet.append((row["caption"], model.to_pictures(torch.cat([x for _, _, x in parts]))))
    save_grid(path, sheet)
    print(f"picture: {path}")


def hash_weights(folder):
    """Of all weights below a model's folder, by name."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*.safetensors")):
        with open(path, "rb") as f:
            while part := f.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()[:12]


def table(results):
    """Markdown; columns that no result has are left out. Several seeds: mean, of distances also (minimum)."""
    columns = [
        "name",
        "nfe",
        "passes",
        "cfg",
        *[k for k in METRICS if k != "kid_std"],
        "distinct",
        "nonfinite",
        "images_per_s",
    ]
    columns = [c for c in columns if any(r.get(c) is not None for r in results)]

    def show(r, c):
        least = f" ({r['min'][c]:.4g})" if c in DISTANCES and c in r.get("min", {}) else ""
        return (
            ""
            if r.get(c) is None
            else f"{r[c]:.4g}{least}"
            if isinstance(r[c], float)
            else str(r[c])
        )

    cells = [columns] + [[show(r, c) for c in columns] for r in results]
    width = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(v.ljust(w) for v, w in zip(line, width)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])

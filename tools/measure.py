"""What eval.py measures beyond the metrics of training: image folders, similarity, passes, time."""

import statistics
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common.distributed import bar_interval, gather_rows, on_all_ranks
from common.errors import UserError
from common.features import Extractor
from common.files import hash_files
from common.metrics import hash_images
from common.sampling import generate
from controls.controlled import Controlled
from data.image_file import SUFFIXES, middle, read_image
from data.image_folder import existing_folder, image_files
from training.passes import PassCounter
from training.report import to_image

# ---- image folders -------------------------------------------------------------------------------


def list_images(flag, folder, n=None, notes=None):
    """The first n image files of a folder, by name; all if n is None. At least 8.

    notes: Counter of files that are not read, and links.
    """
    files = image_files(existing_folder(folder, flag), notes)
    least = n or 8  # three neighbours and a covariance need some
    if len(files) < least:
        raise UserError(
            f"{flag} {folder}: expected at least {least} images ({', '.join(SUFFIXES)}), "
            f"found {len(files)}"
        )
    return files[:n]


def folder_features(files, extractor, batch, rank, world, as_stored=False, keep=None):
    """Features float32 [n, D], hashes int64 [n] and notes (Counter) of image files, on every rank.

    as_stored, notes: as in data/image_file.py. keep(indices, images) is called per batch.
    """
    if len(files) < world:
        raise UserError(f"{len(files)} images: expected at least one for each of {world} processes")

    def own_part():
        features, hashes, notes = [], [], Counter()
        bar = tqdm(
            total=len(files[rank::world]),
            desc=files[0].parent.name,
            disable=rank > 0,
            mininterval=bar_interval(),
        )
        with bar:
            reading = (extractor.shape, batch, notes, as_stored)
            indices = torch.arange(rank, len(files), world)
            for images in same_size_batches(files[rank::world], *reading):
                if keep:
                    keep(indices[: len(images)], images)
                indices = indices[len(images) :]
                features.append(extractor(images)[0])
                hashes.append(hash_images(images))
                bar.update(len(images))
        local.extend([torch.cat(features), torch.cat(hashes)])
        return notes

    local = []
    notes = sum(on_all_ranks(own_part), Counter())  # an unreadable file ends all ranks
    features, hashes = (gather_rows(rows, len(files), rank, world) for rows in local)
    return features, hashes, notes


def same_size_batches(files, shape, batch, notes=None, as_stored=False):
    """Yields uint8 [b, C, H, W], b <= batch, of consecutive images of the same size.

    shape: [C, H, W] that all images must have, or None: RGB of any size.
    """
    group = []
    for path in files:
        image = read_full_image(path, shape, notes, as_stored)
        if group and (len(group) == batch or image.shape != group[0].shape):
            yield torch.stack(group)
            group = []
        group.append(image)
    yield torch.stack(group)


def read_full_image(path, shape, notes=None, as_stored=False):
    """An image at the file's own size: to resize it twice would change the metrics."""
    try:
        channels = 3 if shape is None else shape[0]
        image = read_image(path, channels, notes=notes, as_stored=as_stored)
    except ValueError as e:  # leaving it out would silently change n
        raise UserError(f"{path}: not readable as an image ({str(e)[:100]})") from None
    if shape is not None and image.shape != shape:
        raise UserError(
            f"{path}: expected {shape[1]} x {shape[2]} pixels, the teacher's size, "
            f"found {image.shape[1]} x {image.shape[2]}"
        )
    return image


def to_square(images, side):
    """The middle square of images, resized (Lanczos). uint8 [n, C, H, W] -> [n, C, side, side].

    Cut first: data/image_file.py's resize of a part also reads the pixels around it.
    """
    height, width = images.shape[2:]
    box = middle(width, height, side, side)
    squares = [to_image(image).crop(box).resize((side, side), Image.LANCZOS) for image in images]
    pixels = torch.from_numpy(np.stack([np.array(square) for square in squares]))
    return pixels.view(len(images), side, side, -1).permute(0, 3, 1, 2)


class Squared(Extractor):
    """An extractor that looks at the middle square of images, resized to `side` pixels."""

    def __init__(self, extractor, side):
        self.extractor = extractor
        self.side = side
        self.metric = extractor.metric
        self.dims = extractor.dims
        self.device = extractor.device
        self.protocol = f"square{side}-lanczos {extractor.protocol}"

    def __call__(self, images):
        return self.extractor(to_square(images, self.side))


# ---- models --------------------------------------------------------------------------------------


def alikeness(sampler, model, extractor, images, seed=0, batch=250, rank=0, world=1, prompts=8):
    """How alike the images of one label or prompt are, averaged over the first `prompts` of them.

    dict of floats, from the features of `images` samples of each. Compare with the teacher's.
    similarity: mean cosine of two of them. 1: all are alike. Phased DMD (arXiv 2510.27684) does the
    same with the features of DINOv3.
    vendi: Vendi score (arXiv 2210.02410), the effective number of different images, 1 to `images`.
    """
    prompts = min(prompts, max(model.classes, 1))
    n = prompts * images
    if n < world:
        raise UserError(
            f"--per-prompt {images}: expected at least one of {prompts} x {images} images for each "
            f"of {world} processes"
        )
    samples = generate(sampler, model, n, seed, batch, rank, world, classes=prompts)
    parts = [extractor(model.decode(x))[0] for _, _, x in samples]
    features = gather_rows(torch.cat(parts), n, rank, world).double()
    features = features.view(images, prompts, -1).transpose(0, 1)
    values = [(mean_cosine(part), vendi_score(part)) for part in features]
    return dict(zip(("similarity", "vendi"), torch.tensor(values).mean(0).tolist()))


def mean_cosine(features):
    """Mean cosine of all pairs of different rows. features: float64 [n, D]."""
    n = len(features)
    # |sum of features|^2 = n + sum of the cosines of all ordered pairs
    pairs = F.normalize(features, dim=1).sum(0).square().sum() - n
    return (pairs / (n * (n - 1))).item()


def vendi_score(features):
    """exp of the entropy of the eigenvalues of K / n, K the cosines. features: float64 [n, D]."""
    features = F.normalize(features, dim=1)
    eigenvalues = torch.linalg.eigvalsh(features @ features.T / len(features)).clamp(min=0)
    return torch.special.entr(eigenvalues).sum().exp().item()


def dummy_inputs(model, n):
    """z, cond, noise for n samples of no use."""
    z = torch.randn(n, *model.shape, device=next(model.parameters()).device)
    return z, model.encode(torch.arange(n) % max(model.classes, 1)), lambda: torch.randn_like(z)


@torch.no_grad()
def count_nfe(sampler, model):
    """Network passes per image, counted where they happen: a guided evaluation is two."""
    counted = model.generator if isinstance(model, Controlled) else model
    counter = PassCounter(dict(model=counted))
    try:
        sampler(model, *dummy_inputs(model, 2))
    finally:
        counter.remove()
    return counter.samples["model"] / 2


@torch.no_grad()
def latency(sampler, model, batch):
    """Median time of sampling and decoding at batch 1 and `batch` -> {batch: times}."""
    result = {}
    for size in sorted({1, batch}):
        inputs = dummy_inputs(model, size)
        times = []
        while len(times) < 5 or (len(times) < 50 and sum(times) < 2):
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            x = sampler(model, *inputs)
            if model.adapter != "toy":
                x = model.decode(x)
            x.cpu()  # waits for the device
            times.append(time.perf_counter() - start)
        median = statistics.median(times[2:])  # two calls of warm-up
        result[str(size)] = dict(
            ms_per_image=round(median / size * 1000, 4), images_per_s=round(size / median, 2)
        )
    return result


def hash_weights(folder):
    """A short hash of all weights below a model's folder."""
    return hash_files(sorted(Path(folder).rglob("*.safetensors")))[:12]

"""Images with labels or captions for the losses that need real images."""

import zipfile
import zlib
from collections import Counter

import numpy as np
import torch

from common.errors import UserError
from common.files import check_npz_size
from common.rng import derive_seed
from data.class_folders import class_folders
from data.image_file import SUFFIXES, describe_notes, read_images

TOY_SAMPLES = 20_000  # points that stand for the data set of the toy teachers

# What numpy and zipfile raise for files that are truncated, damaged, pickled or something else.
NPZ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    AttributeError,
    NotImplementedError,
    MemoryError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
)


class Images:
    """A set of images with labels. Pixels are kept in memory: the sets meant here are small.

    images: uint8 [N, C, H, W], or latents, which teacher.encode_images returns unchanged.
    labels: int64 [N], which teacher.encode turns into conditions; rows of its table for captions.
    names: of the classes; [] for captions.
    captions: int64 [N], how many an image has: the rows from its label on, one after the other in
    successive epochs. None: one each.
    """

    def __init__(self, images, labels, names, captions=None):
        self.images = images
        self.labels = labels
        self.names = names
        self.captions = captions
        self.permutation = None
        self.permutation_key = None

    def __len__(self):
        return len(self.images)

    def batch(self, it, batch, seed=0, rank=0, world=1):
        """Rows of global batch number `it` for one rank: (images, labels), batch // world of each.

        A function of it and seed. Every epoch is one permutation of the set; a batch may span two.
        """
        n = batch // world
        start = it * batch + rank * n
        position = torch.arange(start, start + n)  # counted over all epochs
        index = torch.empty_like(position)
        epochs = position.div(len(self), rounding_mode="floor")
        for epoch in epochs.unique().tolist():
            rows = epochs == epoch
            index[rows] = self.order(epoch, seed)[position[rows] % len(self)]
        labels = self.labels[index]
        if self.captions is not None:
            labels = labels + epochs % self.captions[index]
        return self.images[index], labels

    def samples(self, run, teacher, it):
        """Clean samples and conditions of this process in iteration `it`, on its device."""
        pixels, labels = self.batch(it, run.args.batch, run.args.seed, *run.data_shard)
        pixels = pixels.to(run.device, non_blocking=True)
        return teacher.encode_images(pixels), teacher.encode(labels)

    def order(self, epoch, seed):
        """Permutation of the set in this epoch, int64 [N]. The last one is kept."""
        key = epoch, seed
        if self.permutation_key != key:
            generator = torch.Generator().manual_seed(derive_seed(seed, epoch, 5))
            self.permutation = torch.randperm(len(self), generator=generator)
            self.permutation_key = key
        return self.permutation

    def part(self, labels, k, n):
        """The images with these labels. Of captions: every n-th from k, they have no class."""
        if self.names:
            rows = torch.isin(self.labels, labels)
        else:
            rows = torch.arange(len(self)) % n == k
        captions = None if self.captions is None else self.captions[rows]
        return Images(self.images[rows], self.labels[rows], self.names, captions)


def load_images(data, teacher, say=print):
    """Images for a teacher, from the folder `data` (--data) or, without it, the teacher's own.

    say(line) reports what was read and skipped. UserError: no images, or of another size or number
    of classes than the teacher's.
    """
    if data and teacher.adapter == "toy":
        raise UserError(f"--data {data}: this teacher's samples are points; leave the flag out")
    if data and teacher.vae is not None:
        return teacher.load_image_folder(data, say)
    if data:
        return load_folder(data, teacher.shape[0], teacher.shape[-1], say, teacher)
    if teacher.adapter == "toy":
        return toy_images(teacher)
    if not teacher.evaluation.get("images"):
        if teacher.blank:  # --dry-run takes it that --data will be given
            return teacher.load_image_folder(data, say)
        kind = "with one subfolder per class"
        if teacher.prompts is not None:
            kind = "of images with captions (a .txt of the same name, or metadata.jsonl)"
        raise UserError(f"--data: this teacher ships no images; give a folder {kind}")
    return shipped_images(teacher)


def load_folder(folder, channels, size, say=print, teacher=None):
    """Images below a folder, a subfolder per class. Unreadable files are named and skipped.

    teacher: labels are those of its classes (class_folders); None: the subfolders are numbered.
    """
    notes = Counter()
    files, labels, names = class_folders(folder, teacher, say, notes)
    images, places = read_images(files, channels, size, say, notes)
    if not images:
        raise UserError(
            f"--data {folder}: expected images ({', '.join(SUFFIXES)}), "
            f"found none readable ({len(files)} skipped)"
        )
    skipped = len(files) - len(images)
    say(
        f"{folder}: {len(images)} images, {len(names)} classes, {skipped} skipped"
        f"{describe_notes(notes)}"
    )
    return Images(torch.stack(images), labels[places], names)


def toy_images(teacher):
    """Clean samples of the toy's mixture, equally many per label."""
    generator = torch.Generator().manual_seed(derive_seed(0, 6))
    labels = torch.arange(TOY_SAMPLES) % teacher.classes
    points = teacher.mixture.sample(TOY_SAMPLES, labels, generator)
    return Images(points, labels, [str(i) for i in range(teacher.classes)])


def shipped_images(teacher):
    """The images in the teacher's folder."""
    path = teacher.folder / teacher.evaluation["images"]
    images = load_npz(path, teacher.classes)
    shape = tuple(images.images.shape[1:])
    if shape != tuple(teacher.image_shape) or len(images.names) > teacher.classes:
        raise UserError(
            f"{path}: expected images {list(teacher.image_shape)} of at most {teacher.classes} "
            f"classes, found {list(shape)} of {len(images.names)}"
        )
    return images


def load_npz(path, classes=0):
    """Images from an .npz with arrays images uint8 [N, H, W] or [N, H, W, C], labels int [N].

    classes: of the teacher, so that a type too small for them is refused: labels have wrapped.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            check_npz_size(archive)
            images, labels = archive["images"], archive["labels"]
    except NPZ_ERRORS as e:
        raise UserError(
            f"{path}: expected an .npz with arrays images and labels ({type(e).__name__})"
        ) from None
    if images.ndim == 3:
        images = images[..., None]
    are_images = images.dtype == np.uint8 and images.ndim == 4 and len(images) > 0
    are_labels = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    if not are_images or not are_labels or labels.min() < 0:
        raise UserError(
            f"{path}: expected images uint8 [N, H, W, C] and labels int [N] >= 0, "
            f"found {images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    if classes - 1 > np.iinfo(labels.dtype).max:
        raise UserError(
            f"{path}: expected labels that can count {classes} classes, found {labels.dtype}, "
            "where those above begin again at 0; write the file again"
        )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    names = [str(i) for i in range(int(labels.max()) + 1)]
    return Images(pixels, torch.from_numpy(labels.astype(np.int64)), names)

"""Images with labels or captions, as a script's losses use them."""

import zipfile
import zlib

import numpy as np
import torch

from common.errors import UserError
from common.files import check_npz_size
from common.image_folder import SUFFIXES, class_folders, read_images
from common.rng import derive_seed


class Images:
    """images: uint8 [N, C, H, W], or latents (Shards), which teacher.encode_images leaves as they are; labels: int64 [N], what teacher.encode turns into
    conditions, for captions their rows in its table; names: of the classes, [] for captions. Pixels are kept in memory: sets meant here are small."""

    def __init__(self, images, labels, names):
        self.images, self.labels, self.names = images, labels, names

    def __len__(self):
        return len(self.images)

    def batch(self, it, batch, seed=0, rank=0, world=1):
        """The rank's rows of global batch number `it`: every epoch is one permutation of the set. -> (images, labels)"""
        n, rows = (
            len(self),
            torch.arange(it * batch, (it + 1) * batch)[
                rank * (batch // world) : (rank + 1) * (batch // world)
            ],
        )
        index = torch.empty_like(rows)
        for epoch in rows.div(n, rounding_mode="floor").unique().tolist():
            here = rows // n == epoch
            index[here] = self.order(epoch, seed)[rows[here] % n]
        return self.images[index], self.labels[index]

    def part(self, labels, k, n):
        """Those of these labels. Captions have no class: they are dealt out, to share k of n every n-th."""
        mine = torch.isin(self.labels, labels) if self.names else torch.arange(len(self)) % n == k
        return Images(self.images[mine], self.labels[mine], self.names)

    def order(self, epoch, seed):
        if getattr(self, "cached", (None, None))[0] != (epoch, seed):
            self.cached = (
                (epoch, seed),
                torch.randperm(
                    len(self), generator=torch.Generator().manual_seed(derive_seed(seed, epoch, 5))
                ),
            )
        return self.cached[1]


def load_npz(path):
    """Images from an .npz with arrays `images` uint8 [N, H, W] or [N, H, W, C] and `labels` [N]."""
    try:
        with np.load(path, allow_pickle=False) as f:
            check_npz_size(f)
            images, labels = f["images"], f["labels"]
    except (
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
    ) as e:
        raise UserError(
            f"{path}: expected an .npz with arrays images and labels ({type(e).__name__})"
        ) from None
    images = images[..., None] if images.ndim == 3 else images
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or labels.shape != images.shape[:1]
        or not len(images)
        or labels.dtype.kind not in "iu"
        or labels.min() < 0
    ):
        raise UserError(
            f"{path}: expected images uint8 [N, H, W, C] and labels int [N] >= 0, found {images.dtype} {list(images.shape)} and {labels.dtype} "
            f"{list(labels.shape)}"
        )
    names = [str(i) for i in range(int(labels.max()) + 1)]
    return Images(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(labels.astype(np.int64)),
        names,
    )


def load_folder(folder, channels, size, say=print):
    """Images below `folder`: one subfolder per class (sorted by name = label), or no subfolders = one class. Unreadable files are named and skipped."""
    files, labels, names = class_folders(folder)
    images, kept = read_images(files, channels, size, say)
    if not images:
        raise UserError(
            f"--data {folder}: expected images ({', '.join(SUFFIXES)}), found none readable ({len(files)} skipped)"
        )
    say(f"{folder}: {len(images)} images, {len(names)} classes, {len(files) - len(images)} skipped")
    return Images(torch.stack(images), labels[kept], names)


def check_classes(folder, names, teacher):
    """UserError if a folder has more classes than the teacher."""
    if len(names) > teacher.classes:
        raise UserError(
            f"--data {folder}: expected at most {teacher.classes} class subfolders for this teacher, "
            f"found {len(names)}"
        )


def load_images(data, teacher, say=print):
    """Images for a teacher: --data FOLDER, or the set that its folder names. Labels beyond the teacher's classes are refused."""
    if data and teacher.vae is not None:
        return teacher.load_image_folder(data, say)
    if data:
        images = load_folder(data, teacher.shape[0], teacher.shape[-1], say)
        check_classes(data, images.names, teacher)
        return images
    if teacher.adapter == "toy":  # clean samples of the mixture stand for the data set
        g = torch.Generator().manual_seed(derive_seed(0, 6))
        labels = torch.arange(20000) % teacher.classes
        return Images(
            teacher.mixture.sample(20000, labels, g),
            labels,
            [str(i) for i in range(teacher.classes)],
        )
    if not teacher.evaluation.get("images"):
        kind = (
            "of images with captions (a .txt of the same name, or metadata.jsonl)"
            if teacher.prompts is not None
            else "with one subfolder per class"
        )
        raise UserError(f"--data: this teacher ships no images; give a folder {kind}")
    images = load_npz(teacher.folder / teacher.evaluation["images"])
    if (
        tuple(images.images.shape[1:]) != (shape := teacher.image_shape)
        or len(images.names) > teacher.classes
    ):
        raise UserError(
            f"{teacher.folder / teacher.evaluation['images']}: expected images {list(shape)} of at most {teacher.classes} classes, "
            f"found {list(images.images.shape[1:])} of {len(images.names)}"
        )
    return images

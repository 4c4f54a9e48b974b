"""Images with labels: the embedded set of a teacher, or a folder with one subfolder per class. Order is a function of (seed, sample counter)."""
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from common.run import UserError, mix

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Images:
    """images: uint8 [N, C, H, W]; labels: int64 [N]; names: of the classes. Kept in memory: sets meant here are small, latents of large ones come cached."""

    def __init__(self, images, labels, names):
        self.images, self.labels, self.names = images, labels, names

    def __len__(self):
        return len(self.images)

    def batch(self, it, batch, seed=0, rank=0, world=1):
        """The rank's rows of global batch number `it`: every epoch is one permutation of the set. -> (images, labels)"""
        n, rows = len(self), torch.arange(it * batch, (it + 1) * batch)[rank * (batch // world):(rank + 1) * (batch // world)]
        index = torch.empty_like(rows)
        for epoch in rows.div(n, rounding_mode="floor").unique().tolist():
            here = rows // n == epoch
            index[here] = self.order(epoch, seed)[rows[here] % n]
        return self.images[index], self.labels[index]

    def order(self, epoch, seed):
        if getattr(self, "cached", (None, None))[0] != (epoch, seed):
            self.cached = (epoch, seed), torch.randperm(len(self), generator=torch.Generator().manual_seed(mix(seed, epoch, 5)))
        return self.cached[1]


def load_npz(path):
    """Images from an .npz with arrays `images` uint8 [N, H, W] or [N, H, W, C] and `labels` [N]."""
    try:
        with np.load(path, allow_pickle=False) as f:
            images, labels = f["images"], f["labels"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path}: expected an .npz with arrays images and labels ({type(e).__name__})") from None
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1] or not len(images) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(f"{path}: expected images uint8 [N, H, W, C] and labels int [N] >= 0, found {images.dtype} {list(images.shape)} and {labels.dtype} "
                        f"{list(labels.shape)}")
    names = [str(i) for i in range(int(labels.max()) + 1)]
    return Images(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64)), names)


def read_image(path, channels, size):
    """uint8 [C, size, size]: the central square, resized (Lanczos). ValueError if the file is no image that pillow accepts."""
    from PIL import Image
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # a bomb is refused, not warned about
        try:
            with Image.open(path) as img:
                img = img.convert("L" if channels == 1 else "RGB")
        except Exception as e:  # pillow's readers raise many kinds for a damaged file
            raise ValueError(f"{type(e).__name__}: {e}") from None
    side = min(img.size)  # cropped before it is resized: a strip of 1 x 80,000,000 pixels must not be enlarged
    left, top = (img.width - side) // 2, (img.height - side) // 2
    a = np.array(img.resize((size, size), Image.LANCZOS, box=(left, top, left + side, top + side)), dtype=np.uint8)
    return torch.from_numpy(a.reshape(size, size, channels)).permute(2, 0, 1)


def load_folder(folder, channels, size, say=print):
    """Images below `folder`: one subfolder per class (sorted by name = label), or no subfolders = one class. Unreadable files are named and skipped."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--data {folder}: expected a folder of images, found {'a file' if folder.exists() else 'nothing'}")
    classes = sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")) or [folder]
    images, labels, skipped = [], [], 0
    for label, sub in enumerate(classes):
        for path in sorted(p for p in sub.rglob("*") if p.suffix.lower() in SUFFIXES):
            try:
                images.append(read_image(path, channels, size))
                labels.append(label)
            except ValueError as e:
                skipped += 1
                say(f"skipped {path}: not readable as an image ({str(e)[:100]})")
    if not images:
        raise UserError(f"--data {folder}: expected images ({', '.join(SUFFIXES)}), found none readable ({skipped} skipped)")
    say(f"{folder}: {len(images)} images, {len(classes)} classes, {skipped} skipped")
    return Images(torch.stack(images), torch.tensor(labels), [c.name for c in classes])


def load_images(data, teacher, say=print):
    """Images for a teacher: --data FOLDER, or the set that its folder names. Labels beyond the teacher's classes are refused."""
    if hasattr(teacher, "prompts"):  # class folders say nothing about prompts
        raise UserError(f"--data {data}: expected a teacher with classes, found a text-to-image teacher: images with captions are not read yet")
    if data:
        images = load_folder(data, teacher.shape[0], teacher.shape[-1], say)
        if len(images.names) > teacher.classes:
            raise UserError(f"--data {data}: expected at most {teacher.classes} class subfolders for this teacher, found {len(images.names)}")
        return images
    if teacher.adapter == "toy":  # clean samples of the mixture stand for the data set
        g = torch.Generator().manual_seed(mix(0, 6))
        labels = torch.arange(20000) % teacher.classes
        return Images(teacher.mixture.sample(20000, labels, g), labels, [str(i) for i in range(teacher.classes)])
    if not teacher.evaluation.get("images"):
        raise UserError("--data: this teacher ships no images; give a folder with one subfolder per class")
    images = load_npz(teacher.folder / teacher.evaluation["images"])
    if tuple(images.images.shape[1:]) != teacher.shape or len(images.names) > teacher.classes:
        raise UserError(f"{teacher.folder / teacher.evaluation['images']}: expected images {list(teacher.shape)} of at most {teacher.classes} classes, "
                        f"found {list(images.images.shape[1:])} of {len(images.names)}")
    return images

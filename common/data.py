"""Images with labels or captions, as a script's losses use them."""

import hashlib
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.distributed import on_all_ranks
from common.errors import UserError
from common.files import ROOT, atomic, check_npz_size
from common.image_folder import SUFFIXES, class_folders, read_images
from common.rng import derive_seed

SHARD = 1024  # rows in one file of a cache


class Images:
    """images: uint8 [N, C, H, W], or latents (`Shards`), which teacher.encode_images leaves as they are; labels: int64 [N], what teacher.encode turns into
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


class Shards:
    """Rows of several tensors, which are memory-mapped files where they come from a cache, as one. Index: row numbers or a mask."""

    def __init__(self, parts):
        self.parts = parts
        self.place = torch.cat(
            [
                torch.stack([torch.full((len(p),), i), torch.arange(len(p))], 1)
                for i, p in enumerate(parts)
            ]
        )

    def __len__(self):
        return len(self.place)

    def __getitem__(self, index):
        rows = [self.parts[i][j] for i, j in self.place[index].tolist()]
        return torch.stack(rows) if rows else self.parts[0][:0]


def stamps(files, base):
    """What changes when files do: names, sizes and times."""
    stat = lambda p: (p.stat().st_size, p.stat().st_mtime_ns) if p.exists() else ()
    return [(str(p.relative_to(base)), *stat(p)) for p in files]


def load_latents(data, teacher, say=print):
    """Images for a teacher of latents: encoded once by its VAE, in turn by all processes, then read from the cache (beside that of the prompts)."""
    dist = torch.distributed
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(teacher.shape) == 4 and teacher.shape[1] > 1:
        raise UserError(
            f"--data {data}: expected a teacher of images, found one of videos, which are not read here; --frames 1 makes pictures of them"
        )
    if hasattr(teacher, "prompts"):
        files, first = teacher.captioned
        labels, names = torch.arange(len(files)) + first, []
    else:
        files, labels, names = class_folders(data)
        if len(names) > teacher.classes:
            raise UserError(
                f"--data {data}: expected at most {teacher.classes} class subfolders for this teacher, found {len(names)}"
            )
    vae = sorted(p for p in teacher.vae_folder.glob("*") if p.is_file())
    key = [
        str(teacher.folder),
        stamps(vae, teacher.vae_folder),
        str(teacher.vae.dtype),
        teacher.image_shape,
        str(Path(data).resolve()),
        stamps(files, Path(data)),
    ]
    home = (
        Path(teacher.cache or ROOT / "out" / "prompts")
        / f"{Path(data).resolve().name}-latents-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    )
    paths = [home / f"{i:05d}.safetensors" for i in range(-(-len(files) // SHARD))]

    def compute():
        home.mkdir(parents=True, exist_ok=True)
        for i in [i for i in range(rank, len(paths), world) if not paths[i].is_file()]:
            latents, kept = [torch.zeros(0, *teacher.shape)], []
            for start in range(i * SHARD, min((i + 1) * SHARD, len(files)), 16):
                images, part = read_images(
                    files[start : min(start + 16, (i + 1) * SHARD)],
                    3,
                    teacher.image_shape[-2:],
                    say,
                )
                if images:
                    batch = torch.stack(images).to(teacher.device)
                    latents.append(
                        teacher.encode_images(
                            batch[:, :, None] if len(teacher.shape) == 4 else batch
                        )
                        .float()
                        .cpu()
                    )
                kept += [start + k for k in part]
            with atomic(paths[i]) as f:
                save_file(
                    dict(latents=torch.cat(latents), kept=torch.tensor(kept, dtype=torch.int64)),
                    f.name,
                )

    def work():
        try:
            compute()
        except OSError as e:
            raise UserError(
                f"--cache-prompts {home}: expected a folder that can be written, found: {e.strerror}"
            ) from None

    say(
        f"latents: {len(files)} images, "
        + ("encoding into" if not all(p.is_file() for p in paths) else "read from")
        + f" {home}"
    )
    on_all_ranks(work, world)
    try:
        parts = [load_file(path) for path in paths]
        kept = torch.cat([p["kept"] for p in parts]) if parts else ()
        if not len(kept):
            raise UserError(
                f"--data {data}: expected images ({', '.join(SUFFIXES)}), found none readable ({len(files)} skipped)"
            )
        images = Images(Shards([p["latents"] for p in parts]), labels[kept], names)
    except (OSError, SafetensorError, KeyError, IndexError) as e:
        raise UserError(
            f"--cache-prompts {home}: expected latents of the images there, found: {str(e).splitlines()[0]}; delete it to encode again"
        ) from None
    say(
        f"{data}: {len(images)} images, {f'{len(names)} classes' if names else 'with captions'}, {len(files) - len(images)} skipped"
    )
    return images


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


def load_images(data, teacher, say=print):
    """Images for a teacher: --data FOLDER, or the set that its folder names. Labels beyond the teacher's classes are refused."""
    if data and hasattr(teacher, "vae"):
        return load_latents(data, teacher, say)
    if data:
        images = load_folder(data, teacher.shape[0], teacher.shape[-1], say)
        if len(images.names) > teacher.classes:
            raise UserError(
                f"--data {data}: expected at most {teacher.classes} class subfolders for this teacher, found {len(images.names)}"
            )
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
            if hasattr(teacher, "prompts")
            else "with one subfolder per class"
        )
        raise UserError(f"--data: this teacher ships no images; give a folder {kind}")
    images = load_npz(teacher.folder / teacher.evaluation["images"])
    if (
        tuple(images.images.shape[1:]) != (shape := getattr(teacher, "image_shape", teacher.shape))
        or len(images.names) > teacher.classes
    ):
        raise UserError(
            f"{teacher.folder / teacher.evaluation['images']}: expected images {list(shape)} of at most {teacher.classes} classes, "
            f"found {list(images.images.shape[1:])} of {len(images.names)}"
        )
    return images

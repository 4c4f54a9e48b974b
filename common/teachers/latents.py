"""Image folders as latents of a teacher's VAE, encoded once and kept on disk."""

import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.data import Images
from common.distributed import on_all_ranks
from common.errors import UserError, first_line
from common.files import ROOT, atomic
from common.image_folder import SUFFIXES, read_images
from common.teachers.prompts import SHARD, stamp_files

BATCH = 16  # images that are read and encoded together


class Shards:
    """Rows of several tensors [n_i, ...] behind one index: row numbers or a mask, as for a tensor.

    The tensors are memory-mapped files where they come from the cache; only indexed rows are read.
    """

    def __init__(self, parts):
        self.parts = parts
        places = []
        for i, part in enumerate(parts):
            rows = torch.arange(len(part))
            places.append(torch.stack([torch.full_like(rows, i), rows], 1))
        self.places = torch.cat(places)  # int64 [n, 2]: number of the tensor, row in it

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        rows = [self.parts[i][j] for i, j in self.places[index].tolist()]
        return torch.stack(rows) if rows else self.parts[0][:0]


def load_latents(folder, teacher, files, labels, names, say=print):
    """Encodes image files by the teacher's VAE, or reads their latents from the cache -> Images.

    All processes call this and share the encoding. Unreadable images are named and left out.
    folder: of --data; labels: int64 [n], one per file; names: of the classes, [] for captions.
    UserError: a teacher of videos, no readable image, a cache that cannot be written or read.
    """
    if len(teacher.shape) == 4 and teacher.shape[1] > 1:
        raise UserError(
            f"--data {folder}: expected a teacher of images, found one of videos, which are not "
            "read here; --frames 1 makes pictures of them"
        )
    home = cache_folder(folder, teacher, files)
    paths = [home / f"{i // SHARD:05d}.safetensors" for i in range(0, len(files), SHARD)]
    complete = all(path.is_file() for path in paths)
    say(f"latents: {len(files)} images, {'read from' if complete else 'encoding into'} {home}")

    rank, world = rank_and_world()
    on_all_ranks(lambda: write_missing(paths, rank, world, teacher, files, say), world)
    latents, kept_labels = read_cache(paths, labels) if paths else ([], [])
    if not len(kept_labels):
        raise UserError(
            f"--data {folder}: expected images ({', '.join(SUFFIXES)}), "
            f"found none readable ({len(files)} skipped)"
        )
    images = Images(latents, kept_labels, names)
    classes = f"{len(names)} classes" if names else "with captions"
    say(f"{folder}: {len(images)} images, {classes}, {len(files) - len(images)} skipped")
    return images


def rank_and_world():
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def cache_folder(folder, teacher, files):
    """Folder of these latents. Its name changes when the images, the VAE or the format do."""
    vae_files = sorted(p for p in teacher.vae_folder.glob("*") if p.is_file())
    key = [
        str(teacher.folder),
        stamp_files(vae_files, teacher.vae_folder),
        str(teacher.vae.dtype),
        teacher.image_shape,
        str(Path(folder).resolve()),
        stamp_files(files, Path(folder)),
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    cache = Path(teacher.cache or ROOT / "out" / "prompts")
    return cache / f"{Path(folder).resolve().name}-latents-{digest}"


def write_missing(paths, rank, world, teacher, files, say):
    """Encodes this process's share of the cache files that do not exist yet."""
    try:
        for i in range(rank, len(paths), world):
            if not paths[i].is_file():
                paths[i].parent.mkdir(parents=True, exist_ok=True)
                write_shard(paths[i], teacher, files, i * SHARD, say)
    except OSError as e:
        raise UserError(
            f"--cache-prompts {paths[0].parent}: expected a folder that can be written, "
            f"found: {e.strerror}"
        ) from None


def write_shard(path, teacher, files, first, say):
    """Latents of the SHARD images from number `first` on, and the numbers of the readable ones."""
    latents = [torch.zeros(0, *teacher.shape)]
    kept = []
    last = min(first + SHARD, len(files))
    for start in range(first, last, BATCH):
        batch = files[start : min(start + BATCH, last)]
        images, readable = read_images(batch, 3, teacher.image_shape[-2:], say)
        kept += [start + i for i in readable]
        if images:
            latents.append(encode(teacher, images))
    tensors = dict(latents=torch.cat(latents), kept=torch.tensor(kept, dtype=torch.int64))
    with atomic(path) as f:
        save_file(tensors, f.name)


def encode(teacher, images):
    """List of uint8 images [3, H, W] -> latents [n, *teacher.shape], float32 on the CPU."""
    pixels = torch.stack(images).to(teacher.device)
    if len(teacher.shape) == 4:  # a teacher of videos: one frame
        pixels = pixels[:, :, None]
    return teacher.encode_images(pixels).float().cpu()


def read_cache(paths, labels):
    """-> latents as Shards, the labels of the images that were readable. labels: of all files."""
    try:
        parts = [load_file(path) for path in paths]
        kept = torch.cat([part["kept"] for part in parts])
        return Shards([part["latents"] for part in parts]), labels[kept]
    except (OSError, SafetensorError, KeyError, IndexError) as e:
        raise UserError(
            f"--cache-prompts {paths[0].parent}: expected latents of the images there, "
            f"found: {first_line(e)}; delete it to encode again"
        ) from None

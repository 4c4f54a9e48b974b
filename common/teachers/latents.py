"""Image folders as latents of a teacher's VAE, encoded once and kept on disk."""

import math
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from common.distributed import (
    on_all_ranks,
    on_rank0,
    rank_and_world,
    require_same,
    run_in_step,
)
from common.errors import UserError, first_line
from common.files import atomic, format_bytes
from common.teachers.cache import (
    SHARD,
    cache_errors,
    cache_folder,
    library_versions,
    require_space,
    stamp_files,
    wait_until_visible,
)
from data.image_file import READER, SUFFIXES, describe_notes, read_images
from data.images import Images

BATCH = 16  # images that are read and encoded together


class ImagesOfSizes:
    """The same images in several sizes: list of Images, of which `samples` takes those of the size
    in use. All else is the first one's. sizes: of the teacher."""

    def __init__(self, sets, sizes):
        self.sets = sets
        self.sizes = sizes

    def __len__(self):
        return len(self.sets[0])

    def __getattr__(self, name):  # of what is not defined here
        return getattr(self.sets[0], name)

    def samples(self, run, teacher, it):
        return self.sets[self.sizes.index].samples(run, teacher, it)

    def part(self, labels, k, n):
        return ImagesOfSizes([images.part(labels, k, n) for images in self.sets], self.sizes)


def load_sizes(teacher, load):
    """load() -> Images of the teacher's size; of several --size, all of them."""
    if not teacher.sizes:
        return load()
    sets = [load() for _ in teacher.sizes.each()]
    teacher.sizes.use_smallest()
    return ImagesOfSizes(sets, teacher.sizes)


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


def load_latents(folder, teacher, files, labels, names, say=print, captions=None, notes=None):
    """Encodes image files by the teacher's VAE, or reads their latents from the cache -> Images.

    All processes call this and share the encoding. Unreadable images are named and left out.
    folder: of --data; labels: int64 [n], one per file; names: of the classes, [] for captions;
    captions: int64 [n], how many each has, or None; notes: Counter of what is said of the folder.
    UserError: a teacher of videos, no readable image, a cache that cannot be written or read.
    """
    if len(teacher.shape) == 4 and teacher.shape[1] > 1:
        raise UserError(
            f"--data {folder}: expected a teacher of images, found one of videos, which are not "
            "read here; --frames 1 makes pictures of them"
        )
    rank, world = rank_and_world()
    require_same([str(path.relative_to(folder)) for path in files], f"--data {folder}")
    # Process 0 decides: files may have other dates on another machine, and be seen there later.
    decide = lambda: make_plan(cache_of(folder, teacher, files), teacher, files)
    home, paths, missing, count = on_rank0(decide)
    size = format_bytes(count * latent_bytes(teacher))
    done = f"encoding {count} of them, {size}, into" if missing else "read from"
    say(f"latents: {len(files)} images, {done} {home}")
    run_in_step(write_parts(paths, missing[rank::world], teacher, files, say), count, "image")
    on_all_ranks(lambda: wait_until_visible(home, paths))
    latents, kept, found = read_cache(paths) if paths else ([], [], Counter())
    if not len(kept):
        raise UserError(
            f"--data {folder}: expected images ({', '.join(SUFFIXES)}), "
            f"found none readable ({len(files)} skipped)"
        )
    images = Images(latents, labels[kept], names, None if captions is None else captions[kept])
    kind = f"{len(names)} classes" if names else "with captions"
    if captions is not None and captions.max() > 1:
        kind = f"with {int(images.captions.sum())} captions, of each image one in every epoch"
    skipped = len(files) - len(images)
    found.update(notes or {})
    say(f"{folder}: {len(images)} images, {kind}, {skipped} skipped{describe_notes(found)}")
    return images


def make_plan(home, teacher, files):
    """-> folder of the cache, paths of its parts, numbers of those that it does not have, and how
    many images these hold.

    UserError: their latents do not fit on the disk.
    """
    paths = [home / f"{i // SHARD:05d}.safetensors" for i in range(0, len(files), SHARD)]
    missing = [k for k, path in enumerate(paths) if not path.is_file()]
    count = sum(len(files[k * SHARD : (k + 1) * SHARD]) for k in missing)
    if missing:
        with cache_errors(home, "latents"):
            home.mkdir(parents=True, exist_ok=True)
            require_space(home, f"the latents of {count} images", count * latent_bytes(teacher))
    return home, paths, missing, count


def latent_bytes(teacher):
    return math.prod(teacher.shape) * 4  # float32


def cache_of(folder, teacher, files):
    """Folder of these latents. Its name changes when the images, the VAE, the libraries or the
    format do."""
    vae_files = sorted(p for p in teacher.vae_folder.rglob("*") if p.is_file())
    key = [
        READER,
        library_versions(),
        type(teacher.vae).__name__,
        str(teacher.folder),
        stamp_files(vae_files, teacher.vae_folder),
        str(teacher.vae.dtype),
        teacher.image_shape,
        str(Path(folder).resolve()),
        stamp_files(files, Path(folder)),
    ]
    return cache_folder(teacher.cache, f"{Path(folder).resolve().name}-latents", key)


def write_parts(paths, numbers, teacher, files, say):
    """Encodes these cache files. Yields the number of images after each batch."""
    for k in numbers:
        with cache_errors(paths[k].parent, "latents"):
            yield from write_shard(paths[k], teacher, files, k * SHARD, say)


def write_shard(path, teacher, files, first, say):
    """Latents of the SHARD images from number `first` on, and the numbers of the readable ones.

    Yields the number of images after each batch.
    """
    latents = [torch.zeros(0, *teacher.shape)]
    kept = []
    notes = Counter()
    last = min(first + SHARD, len(files))
    for start in range(first, last, BATCH):
        batch = files[start : min(start + BATCH, last)]
        images, readable = read_images(batch, 3, teacher.image_shape[-2:], say, notes)
        kept += [start + i for i in readable]
        if images:
            latents.append(encode(teacher, images))
        yield len(batch)
    tensors = dict(latents=torch.cat(latents), kept=torch.tensor(kept, dtype=torch.int64))
    with atomic(path) as f:
        save_file(tensors, f.name, metadata={name: str(n) for name, n in notes.items()})


def encode(teacher, images):
    """List of uint8 images [3, H, W] -> latents [n, *teacher.shape], float32 on the CPU."""
    pixels = torch.stack(images).to(teacher.device)
    if len(teacher.shape) == 4:  # a teacher of videos: one frame
        pixels = pixels[:, :, None]
    return teacher.encode_images(pixels).float().cpu()


def read_cache(paths):
    """-> latents as Shards, the numbers of the readable images, the notes of their reading."""
    latents, kept, notes = [], [], Counter()
    try:
        for path in paths:
            part = load_file(path)
            latents.append(part["latents"])
            kept.append(part["kept"])
            with safe_open(path, "pt") as f:
                notes.update({name: int(n) for name, n in (f.metadata() or {}).items()})
        return Shards(latents), torch.cat(kept), notes
    except (OSError, SafetensorError, KeyError, IndexError, ValueError) as e:
        raise UserError(
            f"--cache-prompts {paths[0].parent}: expected latents of the images there, "
            f"found: {first_line(e)}; delete it to encode again"
        ) from None

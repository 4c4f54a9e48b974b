"""Prompts and their embeddings, computed once and kept on disk."""

import gc
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import UserError, first_line
from common.files import ROOT, load_errors, save_weights, write_json

SHARD = 1024  # rows in one file of a cache, of embeddings or of latents
BATCH = 16  # prompts that are encoded together


class PromptEmbeddings:
    """Embeddings of numbered prompts.

    parts: list of dicts of tensors [SHARD, ...], the last one perhaps shorter; memory-mapped files
    where they come from the cache. null: the same dict with one row, of the null prompt.
    """

    def __init__(self, parts, null):
        self.parts = parts
        self.null = null

    def rows(self, index, device):
        """index: int64 [n] -> dict of tensors [n, ...]."""
        index = index.tolist()
        return {
            name: torch.stack([self.parts[i // SHARD][name][i % SHARD] for i in index]).to(device)
            for name in self.null
        }

    def nulls(self, n, device):
        return {name: v.expand(n, *v.shape[1:]).to(device) for name, v in self.null.items()}

    def append(self, other):
        """Adds the rows of other embeddings -> number of the first of them.

        They start at a multiple of SHARD, so numbers in between may have no row.
        """
        first = SHARD * len(self.parts)
        pad_to_same_length([*self.parts, *other.parts, self.null])
        self.parts += other.parts
        return first


def pad_to_same_length(parts):
    """Pads tensors [n, length, ...] of some name with zeros to the longest, in place.

    Some text encoders do not pad to a fixed length.
    """
    for name in parts[0]:
        if parts[0][name].ndim < 2:
            continue
        longest = max(part[name].shape[1] for part in parts)
        for part in parts:
            v = part[name]
            if v.shape[1] < longest:
                zeros = v.new_zeros(len(v), longest - v.shape[1], *v.shape[2:])
                part[name] = torch.cat([v, zeros], 1)


def embed_prompts(cls, folder, prompts, device, dtype, cache, say, once):
    """PromptEmbeddings of a list of prompts by the text encoders of a pipeline, or from the cache.

    cls: a subclass of Pipeline. say: prints a line. once: runs a function on rank 0 while the
    others wait (Run.on_rank0).
    UserError: the text encoders cannot be loaded, or the cache cannot be read or written.
    """
    home = cache_folder(cls, folder, prompts, dtype, cache)

    def write():
        if (home / "done.json").is_file():
            say(f"prompts: {len(prompts)} embeddings read from {home}")
            return
        say(f"prompts: encoding {len(prompts)} into {home}")
        rows, null = encode(cls, folder, prompts, device, dtype)
        write_cache(home, rows, null)

    try:
        once(write)
        paths = [home / f"{i // SHARD:05d}.safetensors" for i in range(0, len(prompts), SHARD)]
        parts = [load_file(path) for path in paths]
        return PromptEmbeddings(parts, load_file(home / "null.safetensors"))
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"--cache-prompts {home}: expected to read and write embeddings there, "
            f"found: {first_line(e)}; delete it to encode again"
        ) from None


def cache_folder(cls, folder, prompts, dtype, cache):
    """Folder of these embeddings. Its name changes when the prompts or the text encoders do."""
    parts = ("text_encoder", "tokenizer")
    files = sorted(p for p in Path(folder).glob("t*/*") if p.parent.name.startswith(parts))
    files.append(Path(folder) / "model_index.json")  # says what the null prompt is
    key = [cls.__name__, str(folder), stamp_files(files, folder), str(dtype), prompts]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return Path(cache or ROOT / "out" / "prompts") / f"{Path(folder).name}-{digest}"


def stamp_files(files, base):
    """What changes when files do: names, sizes and modification times."""
    stamps = []
    for path in files:
        name = str(path.relative_to(base))
        if path.exists():
            stamps.append((name, path.stat().st_size, path.stat().st_mtime_ns))
        else:
            stamps.append((name,))
    return stamps


@torch.no_grad()
def encode(cls, folder, prompts, device, dtype):
    """-> embeddings of all prompts and of the null prompt, dicts of tensors on the CPU."""
    with load_errors(f"--teacher {folder}: not loaded"):
        pipe = cls.text_pipeline(folder, dtype).to(device)
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    parts = [{name: v.cpu() for name, v in cls.embed(pipe, batch).items()} for batch in batches]
    null = {name: v[:1].cpu() for name, v in cls.embed(pipe, None).items()}

    # The text encoders may be larger than the network: free their memory before it is loaded.
    del pipe
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()

    pad_to_same_length([*parts, null])
    return {name: torch.cat([part[name] for part in parts]) for name in null}, null


def write_cache(home, rows, null):
    """Files of SHARD rows. done.json is written last: without it, the rest does not count."""
    home.mkdir(parents=True, exist_ok=True)
    n = len(next(iter(rows.values())))
    for i in range(0, n, SHARD):
        part = {name: v[i : i + SHARD] for name, v in rows.items()}
        save_weights(home / f"{i // SHARD:05d}.safetensors", part)
    save_weights(home / "null.safetensors", null)
    write_json(home / "done.json", dict(prompts=n))

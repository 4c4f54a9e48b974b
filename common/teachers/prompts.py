"""Prompts and their embeddings, computed once and kept on disk."""

import gc
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import UserError
from common.files import LOAD_ERRORS, ROOT, atomic, save_weights
from common.image_folder import LONGEST

SHARD = 1024  # rows in one file of a cache, of embeddings or of latents


def read_prompts(path):
    """Lines of a UTF-8 text file, empty ones left out. UserError: not readable, no prompt, a line that is no prompt."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as e:
        raise UserError(f"--prompts {path}: {e.strerror}") from None
    prompts = []
    for i, line in enumerate(lines, 1):
        if len(line) > 4 * LONGEST:
            raise UserError(
                f"--prompts {path}: line {i}: expected a prompt of at most {LONGEST} characters, found {len(line)} bytes"
            )
        try:
            prompts.append(line.decode().strip())
        except UnicodeDecodeError:
            raise UserError(f"--prompts {path}: line {i}: expected UTF-8 text") from None
    prompts = [p for p in prompts if p]
    if not prompts:
        raise UserError(f"--prompts {path}: expected one prompt per line, found an empty file")
    return prompts


class PromptEmbeddings:
    """Embeddings of prompts: parts, a list of dicts of tensors [<= SHARD, ...], memory-mapped files where they come from the cache; null, one row each."""

    def __init__(self, parts, null):
        self.parts, self.null = parts, null

    def rows(self, index, device):
        """index: int64 [n] -> dict of tensors [n, ...]."""
        index = index.tolist()
        return {
            k: torch.stack([self.parts[i // SHARD][k][i % SHARD] for i in index]).to(device)
            for k in self.null
        }

    def append(self, other):
        """Takes the rows of another table in, behind its own -> number of the first of them. Numbers between may have no row."""
        pad_to_same_length([*self.parts, *other.parts, self.null])
        self.parts += other.parts
        return SHARD * (len(self.parts) - len(other.parts))

    def nulls(self, n, device):
        return {k: v.expand(n, *v.shape[1:]).to(device) for k, v in self.null.items()}


def pad_to_same_length(parts):
    """Zero-pads the second dimension of every tensor whose length differs between parts (encoders that do not pad to a fixed one)."""
    for k in parts[0]:
        longest = max(p[k].shape[1] if p[k].ndim > 1 else 0 for p in parts)
        for p in parts:
            if p[k].ndim > 1 and p[k].shape[1] < longest:
                p[k] = torch.cat(
                    [p[k], p[k].new_zeros(len(p[k]), longest - p[k].shape[1], *p[k].shape[2:])], 1
                )


def stamp_text_encoders(folder):
    """What changes when the text encoders of a local folder do: names, sizes and times of their files."""
    files = sorted(
        p
        for p in Path(folder).glob("t*/*")
        if p.parent.name.startswith(("text_encoder", "tokenizer"))
    )
    return [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


@torch.no_grad()
def embed_prompts(cls, folder, prompts, device, dtype, cache, say, once):
    """Table of the prompts, from the cache if it has them. `once`: runs a function on rank 0 while the others wait (Run.once)."""
    key = hashlib.sha256(
        json.dumps(
            [cls.__name__, str(folder), stamp_text_encoders(folder), str(dtype), prompts]
        ).encode()
    ).hexdigest()[:16]
    home = Path(cache or ROOT / "out" / "prompts") / f"{Path(str(folder)).name}-{key}"

    def compute():
        if (home / "done.json").is_file():
            say(f"prompts: {len(prompts)} embeddings read from {home}")
            return
        say(f"prompts: encoding {len(prompts)} into {home}")
        try:
            pipe = cls.text_pipeline(folder, dtype).to(device)
        except LOAD_ERRORS as e:
            raise UserError(
                f"--teacher {folder}: not loaded: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
            ) from None
        parts = [
            {k: v.cpu() for k, v in cls.text(pipe, prompts[i : i + 16]).items()}
            for i in range(0, len(prompts), 16)
        ]
        null = {k: v[:1].cpu() for k, v in cls.text(pipe, None).items()}
        del pipe
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        pad_to_same_length([*parts, null])
        home.mkdir(parents=True, exist_ok=True)
        whole = {k: torch.cat([p[k] for p in parts]) for k in null}
        for i in range(0, len(prompts), SHARD):
            save_weights(
                home / f"{i // SHARD:05d}.safetensors",
                {k: v[i : i + SHARD] for k, v in whole.items()},
            )
        save_weights(home / "null.safetensors", null)
        with atomic(home / "done.json") as f:
            f.write(json.dumps(dict(prompts=len(prompts))).encode())

    try:
        once(compute)
        parts = [
            load_file(home / f"{i // SHARD:05d}.safetensors") for i in range(0, len(prompts), SHARD)
        ]
        return PromptEmbeddings(parts, load_file(home / "null.safetensors"))
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"--cache-prompts {home}: expected to read and write embeddings there, found: {str(e).splitlines()[0]}; delete it to encode again"
        ) from None

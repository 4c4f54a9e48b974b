"""Prompts and their embeddings, computed once and kept on disk.

A cache is a folder of parts, safetensors files of some hundred rows each. They are written as they
come, by all processes, so that memory does not grow with the number of prompts and an interrupted
encoding goes on where it was.
"""

import bisect
import gc
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from common.distributed import (
    on_all_ranks,
    on_rank0,
    rank_and_world,
    require_same,
    run_in_step,
)
from common.errors import require
from common.files import format_bytes, load_errors, read_json, save_weights, write_json
from common.teachers.cache import (
    SHARD,
    cache_errors,
    cache_folder,
    digest_of,
    library_versions,
    require_space,
    stamp_files,
    wait_until_visible,
)

FORMAT = 2  # of the cache; another one is another folder
LARGEST_PART = 2**28  # bytes of such a file
BATCH = 16  # prompts that are encoded together
PLAN = "plan.json"  # written when everything but the parts is there
NULL = "null.safetensors"


class PromptEmbeddings:
    """Embeddings of numbered prompts.

    parts: list of dicts of tensors [n_i, ...]; memory-mapped files where they come from the cache,
    of which only the rows that are used are read. null: the same dict with one row, of the null
    prompt. Text encoders that do not pad to a fixed length make parts of different lengths; rows
    are padded with zeros to the longest.

    on_host: names of numbers that the host needs, which stay in its memory.
    """

    on_host = ()

    def __init__(self, parts, null):
        self.parts = parts
        self.null = null
        sizes = [count_rows(part) for part in parts]
        self.first_rows = [sum(sizes[:k]) for k in range(len(parts))]  # number of each first row
        self.end = sum(sizes)
        self.lengths = longest([*parts, null])

    def rows(self, index, device):
        """index: int64 [n] -> dict of tensors [n, ...]."""
        index = index.tolist()
        rows = {}
        for name in self.null:
            found = [self._row(name, i) for i in index]
            rows[name] = self._place(name, torch.stack(found), device)
        return rows

    def _place(self, name, v, device):
        return v if name in self.on_host else v.to(device, non_blocking=True)

    def _row(self, name, i):
        k = bisect.bisect_right(self.first_rows, i) - 1
        row = self.parts[k][name][i - self.first_rows[k]]
        return pad(row, 0, self.lengths[name]) if name in self.lengths else row

    def nulls(self, n, device):
        rows = {}
        for name, v in self.null.items():
            v = pad(v, 1, self.lengths[name]) if name in self.lengths else v
            rows[name] = self._place(name, v.expand(n, *v.shape[1:]), device)
        return rows

    def append(self, other):
        """Adds the rows of other embeddings -> number of the first of them.

        It is a multiple of SHARD, so numbers in between may have no row.
        """
        first = math.ceil(self.end / SHARD) * SHARD
        self.parts = self.parts + other.parts
        self.first_rows = self.first_rows + [first + row for row in other.first_rows]
        self.end = first + other.end
        self.lengths = longest([*self.parts, self.null])
        return first


def count_rows(part):
    return len(next(iter(part.values())))


def longest(parts):
    """{name: largest length} of tensors [n, length, ...] in dicts."""
    names = [name for name, v in parts[0].items() if v.ndim > 1]
    return {name: max(part[name].shape[1] for part in parts) for name in names}


def pad(v, dim, length):
    """Zeros behind v along a dimension, up to a length."""
    missing = length - v.shape[dim]
    if not missing:
        return v
    shape = list(v.shape)
    shape[dim] = missing
    return torch.cat([v, v.new_zeros(shape)], dim)


# ---- encoding ------------------------------------------------------------------------------------


def embed_prompts(cls, folder, prompts, device, dtype, cache, say, loras=(), negative=None):
    """PromptEmbeddings of a list of prompts by the text encoders of a pipeline, or from the cache.

    All processes call this and share the encoding. cls: a subclass of Pipeline. say: prints a line.
    loras: of --teacher-lora, those that change text encoders count. negative: of --negative-prompt,
    in the place of the pipeline's null prompt.
    UserError: the text encoders cannot be loaded, the cache cannot be read or written, or is not
    seen by all processes, the disk is too small.
    """
    rank, world = rank_and_world()
    require_same(digest_of(keys_of(prompts)), "--prompts or captions of --data")
    require_same(negative, "--negative-prompt")
    loras = [lora for lora in loras if lora.changes_text]
    encoders = TextEncoders(cls, folder, device, dtype, loras)
    # Process 0 decides: files may have other dates on another machine, and be seen there later.
    key = (cls, folder, prompts, dtype, cache, loras)
    home, plan, missing = on_rank0(lambda: make_plan(cache_of(*key), encoders, prompts))
    null_path = on_rank0(lambda: make_null(home, encoders, negative))
    written = [home / PLAN] + [null_path] * (negative is not None)
    on_all_ranks(lambda: wait_until_visible(home, written))

    say(describe_prompts(plan))
    if missing:
        count = sum(len(rows_of(k, plan, prompts)) for k in missing)
        say(f"prompts: encoding {count} into {home}, {describe_disk(home, count, plan)}")
        work = encode_parts(encoders, home, plan, prompts, missing[rank::world])
        run_in_step(work, count, "prompt")
    else:
        say(f"prompts: {len(prompts)} embeddings read from {home}")
    encoders.free()

    paths = [part_path(home, k) for k in range(count_parts(plan))]
    on_all_ranks(lambda: wait_until_visible(home, paths))
    with cache_errors(home, "embeddings"):
        null = load_file(null_path)
        sizes = [len(rows_of(k, plan, prompts)) for k in range(len(paths))]
        parts = [read_part(path, n, null) for path, n in zip(paths, sizes)]
        return PromptEmbeddings(parts, null)


class TextEncoders:
    """The text encoders of a pipeline, which are loaded when they are first used."""

    def __init__(self, cls, folder, device, dtype, loras=()):
        self.cls = cls
        self.loras = loras
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.pipe = None

    def load(self):
        if self.pipe is None:
            with load_errors(f"--teacher {self.folder}: not loaded"):
                pipe = self.cls.text_pipeline(self.folder, self.dtype)
                for lora in self.loras:
                    lora.add_to_text_encoders(pipe)
                self.pipe = pipe.to(self.device)
        return self.pipe

    @torch.no_grad()
    def embed(self, prompts):
        """Embeddings of prompts (None: the null prompt): dict of tensors [n, ...] on the CPU.

        prompts: list of str, or of ImagePrompt (from_image.py).
        """
        pipe = self.load()
        return {name: v.cpu() for name, v in self.cls.embed(pipe, prompts).items()}

    @torch.no_grad()
    def embed_negative(self, text):
        """The same for one negative prompt."""
        pipe = self.load()
        return {name: v.cpu() for name, v in self.cls.embed_negative(pipe, text).items()}

    def count_cut(self, prompts):
        """How many prompts are longer than a tokenizer's limit, by limit."""
        pipe = self.load()
        prompts = texts_of(prompts)
        cut = {}
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(pipe, name, None)
            if tokenizer is None:
                continue
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
            limit = self.cls.most_tokens.get(name, tokenizer.model_max_length)
            n = 0
            for i in range(0, len(prompts), SHARD):
                tokens = tokenizer(prompts[i : i + SHARD]).input_ids
                n += sum(len(t) > limit for t in tokens)
            if n:
                cut[limit] = max(n, cut.get(limit, 0))
        return cut

    def free(self):
        """They may be larger than the network: their memory is free before it is loaded."""
        self.pipe = None
        gc.collect()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()


def make_plan(home, encoders, prompts):
    """On rank 0 -> folder of the cache, its plan, the numbers of the parts that it does not have.

    plan: rows in a part, bytes of a row, and what is said of the prompts. A new cache gets its plan
    and the null prompt's embedding.
    """
    with cache_errors(home, "embeddings"):
        if (home / PLAN).is_file():
            plan = read_plan(home, prompts)
        else:
            home.mkdir(parents=True, exist_ok=True)
            row = encoders.embed(prompts[:BATCH])
            row_bytes = sum(v[0].nbytes for v in row.values())
            batches = max(1, min(SHARD, LARGEST_PART // row_bytes) // BATCH)
            lengths = [len(text) for text in texts_of(prompts)]
            plan = dict(
                prompts=len(prompts),
                rows=batches * BATCH,
                row_bytes=row_bytes,
                different=len(set(prompts)),
                shortest=min(lengths),
                longest=max(lengths),
                cut=encoders.count_cut(prompts),
            )
            # zeros for what the null prompt does not have: the image of a prompt
            null = {name: torch.zeros_like(v[:1]) for name, v in row.items()}
            null |= {name: v[:1] for name, v in encoders.embed(None).items()}
            save_weights(home / NULL, null)
            write_json(home / PLAN, plan)
        missing = [k for k in range(count_parts(plan)) if not part_path(home, k).is_file()]
        count = sum(len(rows_of(k, plan, prompts)) for k in missing)
        what = f"the embeddings of {count} prompts"
        require_space(home, what, count * plan["row_bytes"], ", or fewer prompts")
    return home, plan, missing


def make_null(home, encoders, negative):
    """On rank 0 -> file of what stands for "no prompt": the pipeline's null prompt, which came with
    the plan, or a negative prompt, which is added when it is first used."""
    if negative is None:
        return home / NULL
    path = home / f"negative-{digest_of([negative])}.safetensors"
    with cache_errors(home, "embeddings"):
        if not path.is_file():
            save_weights(path, load_file(home / NULL) | encoders.embed_negative(negative))
    return path


def texts_of(prompts):
    """The texts of prompts with or without images."""
    return [getattr(prompt, "text", prompt) for prompt in prompts]


def keys_of(prompts):
    """What the embeddings of prompts depend on, for JSON."""
    return [getattr(prompt, "key", prompt) for prompt in prompts]


def read_plan(home, prompts):
    plan = read_json(home / PLAN, "--cache-prompts")
    numbers = [plan.get(name) for name in ("prompts", "rows", "row_bytes")]
    usable = all(type(n) is int and n > 0 for n in numbers) and plan["prompts"] == len(prompts)
    require(
        usable,
        f"--cache-prompts {home / PLAN}: expected a plan of these prompts; delete the folder",
    )
    return plan


def count_parts(plan):
    return math.ceil(plan["prompts"] / plan["rows"])


def rows_of(k, plan, prompts):
    """The prompts of part k."""
    return prompts[k * plan["rows"] : (k + 1) * plan["rows"]]


def part_path(home, k):
    return home / f"{k:05d}.safetensors"


def describe_prompts(plan):
    """One line: number, duplicates, lengths, and how many are longer than the encoders read."""
    words = f"prompts: {plan['prompts']}, {plan.get('different')} different, "
    words += f"{plan.get('shortest')} to {plan.get('longest')} characters"
    for limit, n in plan.get("cut", {}).items():
        words += f", {n} cut at {limit} tokens"
    return words


def describe_disk(home, count, plan):
    size = format_bytes(count * plan["row_bytes"])
    return f"{size} of {format_bytes(shutil.disk_usage(home).free)} free"


def encode_parts(encoders, home, plan, prompts, numbers):
    """Encodes and writes parts. Yields the number of prompts after each batch."""
    for k in numbers:
        part = rows_of(k, plan, prompts)
        batches = []
        for i in range(0, len(part), BATCH):
            batch = part[i : i + BATCH]
            batches.append(encoders.embed(batch))
            if i + BATCH >= len(part):
                with cache_errors(home, "embeddings"):
                    save_weights(part_path(home, k), join(batches))
            yield len(batch)


def join(batches):
    """Dicts of tensors [n_i, ...] -> one of tensors [n, ...], padded to the same length."""
    lengths = longest(batches)
    joined = {}
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        if name in lengths:
            values = [pad(v, 1, lengths[name]) for v in values]
        joined[name] = torch.cat(values)
    return joined


# ---- the cache -----------------------------------------------------------------------------------


def cache_of(cls, folder, prompts, dtype, cache, loras=()):
    """Folder of these embeddings. Its name changes when the prompts, the text encoders, what
    --teacher-lora adds to them, the libraries or the format do."""
    folder = Path(folder)
    parts = [p for p in folder.glob("t*/") if p.name.startswith(("text_encoder", "tokenizer"))]
    if cls.takes_image:
        names = ("vae", "processor", "image_processor", "image_encoder")
        parts += [folder / name for name in names]
    files = sorted(p for part in parts for p in part.rglob("*") if p.is_file())
    files.append(folder / "model_index.json")  # says what the null prompt is
    if cls.text_needs_network:
        files.append(folder / cls.part / "config.json")
    key = [FORMAT, library_versions(), cls.__name__, str(folder), stamp_files(files, folder)]
    added = [[lora.sha256, lora.scale] for lora in loras]
    return cache_folder(cache, folder.name, [*key, str(dtype), *added, *keys_of(prompts)])


def read_part(path, n, null):
    """Part of n rows of a cache, as memory-mapped tensors."""
    part = load_file(path)
    fits = part.keys() == null.keys() and all(
        len(v) == n and v.dtype == null[name].dtype and v.shape[2:] == null[name].shape[2:]
        for name, v in part.items()
    )
    require(fits, f"--cache-prompts {path}: expected {n} embeddings; delete it to encode again")
    return part

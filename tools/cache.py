"""Results that `eval.py --compare` has measured before."""

import hashlib
import json
import math
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from common.errors import UserError
from common.files import atomic, hash_files
from common.teachers.cache import library_versions
from data.image_file import READER
from training.report import dumps

KEPT_SAMPLES = 2000  # of a row
KEPT_BYTES = 2**26


class ResultCache:
    """Results and first samples of rows, by the content of what was measured."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def make_folder(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"--cache {self.folder}: expected a folder that can be written, found: {e.strerror}"
            ) from None

    def path(self, row, settings):
        """The file of a row: a hash of its models and of the settings that change its numbers.

        The code that measures is not part of it.
        """
        facts = {k: v for k, v in row.facts.items() if k not in ("name", "teacher")}
        models = [content(row.folder), content(row.teacher.folder)]
        key = [facts, settings, library_versions(), *models]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.folder / f"{digest[:24]}.safetensors"

    def load(self, row, settings):
        """The row's result, or None. Sets row.samples."""
        path = self.path(row, settings)
        if not path.is_file():
            return None
        with safe_open(path, "pt") as f:
            row.samples = f.get_tensor("samples")
            return json.loads(f.metadata()["result"]) | row.facts

    def store(self, row, result, settings):
        with atomic(self.path(row, settings)) as f:
            samples = row.samples.contiguous()  # as decoders leave them, they may not be
            save_file({"samples": samples}, f.name, metadata={"result": dumps(result)})


def cache_settings(args, dtype, extractor, scores=None):
    """What changes the numbers of a row, apart from its models."""
    keys = ("n", "seed", "seeds", "inception", "force_inception", "resize", "ref", "ref_images")
    settings = {key: getattr(args, key) for key in (*keys, "per_prompt")}
    if args.ref_images:
        settings["reader"] = READER
    protocol = extractor.describe(args.n, "") if extractor else "toy"
    if scores:  # earlier results without scores keep their names
        settings["scores"] = scores.protocol()
    return settings | dict(dtype=str(dtype), protocol=protocol)


def content(folder):
    """Names and hash of all files that a model consists of: weights, configurations, reference
    statistics, the words of tokenizers."""
    suffixes = (".safetensors", ".bin", ".json", ".npz", ".txt", ".model", ".jinja")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix in suffixes)
    return [path.name for path in paths], hash_files(paths)


def kept_samples(teacher, n, world):
    """How many of n samples of a teacher's students are kept."""
    value_bytes = 4 if teacher.adapter == "toy" else 1  # float32 points, uint8 images
    sample_bytes = math.prod(teacher.image_shape) * value_bytes
    return min(n, KEPT_SAMPLES, max(KEPT_BYTES // sample_bytes, world))

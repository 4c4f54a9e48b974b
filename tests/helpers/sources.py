"""Source images for teachers that take one, at a size for tests.

Their pipelines give every source about 1024 x 1024 pixels. `prepare` divides the sides by 64, in
the modules of diffusers, where both the pipelines and our teacher classes read the sizes. It also
puts our own reader of text and images in the place of Qwen2VLProcessor, which needs torchvision,
and gives Wan's pipeline a package that it takes for granted.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from common.files import ROOT
from common.teachers.qwen_edit import Processor

# For scripts.run(..., BEFORE=PREPARE)
PREPARE = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from helpers.sources import prepare
prepare(setattr)
"""
FACTOR = 64
MODULES = [  # for `scripts.load`
    "diffusers.pipelines.flux.pipeline_flux_kontext",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.transformers.transformer_flux",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
]


def prepare(setattr):
    """setattr: of monkeypatch, or Python's own for the rest of the process."""
    import transformers
    from diffusers.pipelines.flux import pipeline_flux_kontext as kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
    from diffusers.pipelines.wan import pipeline_wan_i2v as wan

    transformers.utils.logging.set_verbosity_error()  # it says that torchvision is missing
    name = "PREFERRED_KONTEXT_RESOLUTIONS"
    sizes = [(w // FACTOR, h // FACTOR) for w, h in getattr(kontext, name)]
    setattr(kontext, name, sizes)
    for module in (edit, plus):
        setattr(module, "calculate_dimensions", shrunk(module.calculate_dimensions))
    setattr(transformers, "Qwen2VLProcessor", stand_in())
    if not hasattr(wan, "ftfy"):  # which repairs encodings of prompts
        wan.ftfy = SimpleNamespace(fix_text=lambda text: text)


def stand_in():
    """A class that diffusers loads as a processor of transformers."""
    from transformers import AutoTokenizer, ProcessorMixin

    class Qwen2VLProcessor(Processor, ProcessorMixin):
        @classmethod
        def from_pretrained(cls, folder, **options):
            home = Path(folder).parent
            return cls(home, AutoTokenizer.from_pretrained(home / "tokenizer"))

    return Qwen2VLProcessor


def shrunk(calculate):
    def calculate_dimensions(area, ratio):
        width, height, *rest = calculate(area, ratio)
        return width // FACTOR, height // FACTOR, *rest

    return calculate_dimensions


def draw_source(path, seed, size=(16, 16)):
    """Writes an image of random colours -> path."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_triples(home, n=3, targets=True):
    """n edits: images and metadata.jsonl -> home."""
    lines = []
    for i in range(n):
        draw_source(home / "before" / f"{i}.png", i)
        entry = dict(source_file_name=f"before/{i}.png", text=f"word {i}")
        if targets:
            draw_source(home / f"{i}.png", 100 + i)
            entry["file_name"] = f"{i}.png"
        lines.append(json.dumps(entry))
    (home / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return home

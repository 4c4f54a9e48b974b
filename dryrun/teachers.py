"""Teachers without weights, for --dry-run: networks from configurations alone.

They are on the device without memory (dryrun/ghost.py). Nothing is downloaded but, for names that
are not in HUB, configurations.

networks.json has the public configurations of HUB: sd15, sdxl, sana and sd3 as published, with the
published numbers of parameters; SANA-1.5 and the teachers of SANA-Sprint as diffusers' conversion
script makes them; FLUX, Chroma, HunyuanImage, Lumina 2, Qwen-Image, Z-Image and Wan are the
defaults of diffusers' classes, changed where the published network differs. Sizes of FLUX.2-klein
are those of its config.json as several other programs quote it.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from common.teachers.cache import SHARD
from common.teachers.prompts import PromptEmbeddings
from data.images import Images

TABLE = json.loads((Path(__file__).parent / "networks.json").read_text())
IMAGES = 64  # of a blank data set


def public_configs(name):
    """Configurations of a short name: index, as in model_index.json; network; vae; scheduler."""
    entry = TABLE[name]
    vae = SimpleNamespace(**entry["vae"])
    index = dict(_class_name=entry["pipeline"])
    if "boundary_ratio" in entry:  # two experts of one configuration
        part = ["diffusers", "the transformer's class"]
        index |= dict(boundary_ratio=entry["boundary_ratio"], transformer_2=part)
    return index, entry["network"], vae, entry["scheduler"]


def blank_network(cls, config, device, dtype):
    """The network of a teacher class, without values. config: dict."""
    import diffusers

    kind = getattr(diffusers, cls.network_class)
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    with torch.device(device):
        return kind(**config).to(device=device, dtype=dtype).eval()


def blank_embeddings(shapes, n, dtype):
    """Embeddings of n prompts, without values, of the greatest length. shapes: {name: shape}."""
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("mask"):  # all tokens count
            tensors[name] = torch.ones(1, *shape, dtype=torch.int64)
        elif name == "length":
            tensors[name] = torch.full((1,), tensors["text"].shape[1])
        else:
            tensors[name] = torch.zeros(1, *shape, dtype=dtype)
    rows = {name: v.expand(SHARD, *v.shape[1:]) for name, v in tensors.items()}
    return PromptEmbeddings([rows] * -(-n // SHARD), tensors)


def blank_images(teacher):
    """Images for losses that need them: of --data, whose files are not read, or the teacher's."""
    labels = torch.arange(IMAGES) % max(teacher.classes, 1)
    names = [] if teacher.prompts is not None else [str(i) for i in range(teacher.classes)]
    return Images(torch.zeros(IMAGES, *teacher.shape), labels, names)


def make_blank(teacher):
    """Marks a teacher whose samples come from files that a dry run does not read. Returns it."""
    teacher.blank = True
    teacher.load_image_folder = lambda data, say: blank_images(teacher)
    return teacher

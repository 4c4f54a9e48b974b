"""Text-to-image teachers of full size with random weights and embeddings: for speed and memory.

Nothing is downloaded: dryrun/networks.json has the public configurations. The parameter counts are
those of the published networks. `tiny` is the same code at a size for tests.
"""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from common.errors import UserError, did_you_mean
from common.teachers.load import PIPELINES, freeze, ignore_sizes
from common.teachers.prompts import PromptEmbeddings
from data.images import Images

NETWORKS = Path(__file__).parent.parent / "dryrun" / "networks.json"
TABLE = {name: e for name, e in json.loads(NETWORKS.read_text()).items() if "tiny" in e}
PROMPTS = 8


def entry(name, tiny=False):
    """Entry of networks.json. UserError for an unknown name."""
    if name not in TABLE:
        raise UserError(
            f"--teacher {name}: expected one of {', '.join(TABLE)} with --random-weights"
            f"{did_you_mean(name, TABLE)}"
        )
    found = dict(TABLE[name])
    if tiny:
        found["network"] = found["network"] | found["tiny"]["network"]
        found["text"] = found["tiny"]["text"]
    return found


def network(entry, device, dtype=torch.float32):
    """The network of an entry. device: may be "meta"."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    network_class = getattr(diffusers, PIPELINES[entry["pipeline"]].network_class)
    with torch.device(device):
        return network_class(**entry["network"]).to(dtype)


def load(entry, device, dtype, seed=0, budget=ignore_sizes, place=None):
    """What load_pipeline returns for a folder, but the VAE has no weights."""
    budget(
        network=sum(p.numel() for p in network(entry, "meta").parameters()),
        vae=entry["vae"]["parameters"],
        width=dtype.itemsize,
    )
    torch.manual_seed(seed)  # equal on all processes
    net = network(entry, "cpu" if place else device, dtype)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():  # layers that start at zero
            torch.nn.init.normal_(p, 0, 0.02)
    vae = SimpleNamespace(config=SimpleNamespace(**entry["vae"]))
    model = PIPELINES[entry["pipeline"]](net, vae, entry["scheduler"])

    generator = torch.Generator().manual_seed(seed)
    rows = random_embeddings(entry["text"], PROMPTS, generator, dtype)
    null = random_embeddings(entry["text"], 1, generator, dtype)
    model.attach(Path("random"), PromptEmbeddings([rows], null), ["random"] * PROMPTS)
    model.encode_images = lambda images: torch.randn(
        len(images), *model.shape, device=images.device
    )
    return freeze(model, device, dtype, place)


def random_embeddings(shapes, n, generator, dtype):
    """shapes: {name: shape without batch}. A mask says that all tokens count."""
    found = {}
    for name, shape in shapes.items():
        if name == "mask":
            found[name] = torch.ones(n, *shape, dtype=torch.int64)
        else:
            found[name] = torch.randn(n, *shape, generator=generator).to(dtype)
    return found


def images(model, n=PROMPTS):
    """Images for the GAN term; their pixels are not used (see `load`: encode_images)."""
    return Images(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n), ["random"])


def matmul_ceiling(device, dtype, seconds=1.0):
    """FLOP/s of one large matrix product, the best of a second's worth."""
    n = 8192 if torch.device(device).type == "cuda" else 768
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best

"""Full-size text-to-image teachers from their public configurations (networks.json) with random weights and random embeddings: for speed and memory, no download.

Parameters of `sd15`, `sdxl`, `sana`, `sd3`: the counts of the published networks (test_memory.py compares). `tiny`: the same code at a size for tests.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch

from common.data import Images
from common.errors import UserError, did_you_mean
from common.teachers.load import PIPELINES
from common.teachers.prompts import PromptEmbeddings

TABLE = json.loads((Path(__file__).parent / "networks.json").read_text())
PROMPTS = 8


def entry(name, tiny=False):
    if name not in TABLE:
        raise UserError(
            f"--teacher {name}: expected one of {', '.join(TABLE)} with --random-weights{did_you_mean(name, TABLE)}"
        )
    e = dict(TABLE[name])
    return (
        e | dict(network=e["network"] | e["tiny"]["network"], text=e["tiny"]["text"]) if tiny else e
    )


def network(e, device, dtype=torch.float32):
    """The network of an entry, on the meta device too."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    with torch.device(device):
        return getattr(diffusers, PIPELINES[e["pipeline"]].network_class)(**e["network"]).to(dtype)


def load(e, device, dtype, seed=0, budget=lambda **sizes: None, place=None):
    """What load_pipeline gives for a folder. No VAE: its latents are random numbers of the right shape."""
    cls, generator = PIPELINES[e["pipeline"]], torch.Generator().manual_seed(seed)
    budget(
        network=sum(p.numel() for p in network(e, "meta").parameters()),
        vae=e["vae"]["parameters"],
        width=dtype.itemsize,
    )
    torch.manual_seed(seed)  # equal on all processes
    net = network(e, "cpu" if place else device, dtype)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():  # layers that start at zero
            torch.nn.init.normal_(p, 0, 0.02)
    model = cls(net, SimpleNamespace(config=SimpleNamespace(**e["vae"])), e["scheduler"])
    rows = lambda n: {
        k: torch.ones(n, *shape, dtype=torch.int64)
        if k == "mask"
        else torch.randn(n, *shape, generator=generator).to(dtype)
        for k, shape in e["text"].items()
    }
    model.attach(Path("random"), PromptEmbeddings([rows(PROMPTS)], rows(1)), ["random"] * PROMPTS)
    model.encode_images = lambda images: torch.randn(
        len(images), *model.shape, device=images.device
    )
    model.dtype = dtype
    return (place or (lambda model: model.to(device)))(model.requires_grad_(False))


def images(model, n=PROMPTS):
    """Pictures for the GAN term; nothing looks at their pixels."""
    return Images(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n), ["random"])


def matmul_ceiling(device, dtype, seconds=1.0):
    """FLOP/s of one large matrix product, the best of a second's worth."""
    import time

    n = 8192 if torch.device(device).type == "cuda" else 768
    a, best, end = (
        torch.randn(n, n, device=device, dtype=dtype),
        math.inf,
        time.perf_counter() + seconds,
    )
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best

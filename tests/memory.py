"""What the networks of a dmd2 run take, worked out from parameter counts on the meta device: README's table of teachers.

    python tests/memory.py

Counts of sd15, sdxl, sana, sd3 are those of tests/networks.json; the others are diffusers' default configurations, which are the published networks', and the
two sizes of Wan by its model card. Bytes as in Run.budget: bf16 frozen teacher, 16 for each trained number, 4 for the average. No activations, no VAE.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import random_teachers  # noqa: E402
from common import lora  # noqa: E402

OTHERS = {"flux": ("FluxTransformer2DModel", dict(guidance_embeds=True)), "qwen-image": ("QwenImageTransformer2DModel", {}), "z-image": ("ZImageTransformer2DModel", {}),
          "wan2.1": ("WanTransformer3DModel", dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)), "wan2.1-14b": ("WanTransformer3DModel", {})}
RANK = 64


def network(name):
    import diffusers
    diffusers.utils.logging.set_verbosity_error()
    if name in random_teachers.TABLE:
        return random_teachers.network(random_teachers.entry(name), "meta")
    cls, config = OTHERS[name]
    with torch.device("meta"):
        return getattr(diffusers, cls)(**config)


def main():
    print("| teacher | parameters | whole: teacher, student, critic, average | the same over 8 processes (--shard) | --lora 64 --lora-fake 64 | adapters |\n|---|---|---|---|---|---|")
    for name in [*random_teachers.TABLE, *OTHERS]:
        net = network(name)
        n, known = sum(p.numel() for p in net.parameters()), dict(net.named_modules())
        layers = lora.choose(net, dict(rank=RANK, targets=None, flag="--lora"))
        a = sum(RANK * (known[k].weight.shape[0] + known[k].weight.flatten(1).shape[1]) for k in layers)
        whole, adapters = n * (2 + 2 * 16 + 4), n * 2 + a * (2 * 16 + 4)
        gb = lambda b: f"{b / 2**30:.0f} GB"
        print(f"| {name} | {n / 1e9:.2f}B | {gb(whole)} | {gb(whole / 8)} each | {gb(adapters)} | {a / 1e6:.0f}M |")


if __name__ == "__main__":
    main()

"""What the networks of a dmd2 run take, worked out from parameter counts on the meta device: README's table of teachers.

    python tests/memory.py

Counts of sd15, sdxl, sana, sd3 are those of tools/networks.json; the others are diffusers' default configurations, which are the published networks', the two
sizes of Wan by its model card, DiT-XL/2 by its paper, OpenAI's ImageNet-64 network by diffusers' conversion script. Bytes as in Run.budget: bf16 frozen teacher
(pixel teachers: fp32), 16 for each trained number, 4 for the average. No activations, no VAE. Everything here is an estimate; nothing was measured.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import lora
from tools import random_teachers  # noqa: E402

BLOCKS = (
    "ResnetDownsampleBlock2D AttnDownBlock2D AttnDownBlock2D AttnDownBlock2D",
    "AttnUpBlock2D AttnUpBlock2D AttnUpBlock2D ResnetUpsampleBlock2D",
)
OTHERS = {
    "flux": ("FluxTransformer2DModel", dict(guidance_embeds=True)),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "z-image": ("ZImageTransformer2DModel", {}),
    "wan2.1": ("WanTransformer3DModel", dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)),
    "wan2.1-14b": ("WanTransformer3DModel", {}),
    "wan2.2": ("WanTransformer3DModel", {}),
    "dit-xl-256": ("DiTTransformer2DModel", dict(out_channels=8)),
    "edm-imagenet64": (
        "UNet2DModel",
        dict(
            sample_size=64,
            layers_per_block=3,
            num_class_embeds=1000,
            block_out_channels=(192, 384, 576, 768),
            attention_head_dim=64,
            down_block_types=BLOCKS[0].split(),
            up_block_types=BLOCKS[1].split(),
            resnet_time_scale_shift="scale_shift",
            attn_norm_num_groups=32,
            upsample_type="resnet",
            downsample_type="resnet",
        ),
    ),
}
EXPERTS, PIXELS = {"wan2.2": 2}, ("edm-imagenet64",)
RANK, PROCESSES = 64, 8


def network(name):
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    if name in random_teachers.TABLE:
        return random_teachers.network(random_teachers.entry(name), "meta")
    cls, config = OTHERS[name]
    with torch.device("meta"):
        return getattr(diffusers, cls)(**config)


def row(name):
    """-> parameters, and bytes of one process: all networks whole, with adapters, sharded."""
    net, experts, width = network(name), EXPERTS.get(name, 1), 4 if name in PIXELS else 2
    n, known = sum(p.numel() for p in net.parameters()), dict(net.named_modules())
    a = sum(
        RANK * (known[k].weight.shape[0] + known[k].weight.flatten(1).shape[1])
        for k in lora.target_layers(net, dict(rank=RANK, targets=None, flag="--lora"))
    )
    whole = n * (width + 2 * 16 + 4) * experts  # teacher; student and critic; average
    return n * experts, whole, (n * width + a * (2 * 16 + 4)) * experts, whole / PROCESSES


def main():
    print(
        f"| `--teacher` | parameters | memory, all networks whole (estimated) | `--lora {RANK} --lora-fake {RANK}` (estimated) | whole, `--shard` over {PROCESSES} processes, each (estimated) |\n|---|---|---|---|---|"
    )
    for name in [*random_teachers.TABLE, *OTHERS]:
        n, *memory = row(name)
        count = (
            f"{EXPERTS[name]} x {n / EXPERTS[name] / 1e9:.2f}B"
            if name in EXPERTS
            else f"{n / 1e9:.2f}B"
        )
        print(f"| `{name}` | {count} | {' | '.join(f'{b / 2**30:.0f} GB' for b in memory)} |")


if __name__ == "__main__":
    main()

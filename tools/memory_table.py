"""Estimates the memory of a dmd2 run for each large teacher: the table of teachers in README.

    python -m tools.memory_table

Parameters are counted on the meta device, without weights. Sources of the configurations:
sd15, sdxl, sana, sd3: dryrun/networks.json; Wan: its model card; DiT-XL/2: its paper;
OpenAI's ImageNet-64 network: diffusers' conversion script; the others: diffusers' defaults, which
are the published networks. Bytes are those of estimate_memory: bf16 frozen teacher (fp32 for
teachers of pixels), 16 a trained number, 4 for the weight average. No activations, no VAE. Nothing
is measured.
"""

import torch

from common import lora
from tools import random_teachers

EDM_IMAGENET64 = dict(
    sample_size=64,
    layers_per_block=3,
    num_class_embeds=1000,
    block_out_channels=(192, 384, 576, 768),
    attention_head_dim=64,
    down_block_types=[
        "ResnetDownsampleBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    ],
    up_block_types=[
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "ResnetUpsampleBlock2D",
    ],
    resnet_time_scale_shift="scale_shift",
    attn_norm_num_groups=32,
    upsample_type="resnet",
    downsample_type="resnet",
)
WAN_1B = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)

# teachers that are not in random_teachers.TABLE: class of diffusers, changes to its defaults
OTHERS = {
    "flux": ("FluxTransformer2DModel", dict(guidance_embeds=True)),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "z-image": ("ZImageTransformer2DModel", {}),
    "wan2.1": ("WanTransformer3DModel", WAN_1B),
    "wan2.1-14b": ("WanTransformer3DModel", {}),
    "wan2.2": ("WanTransformer3DModel", {}),
    "dit-xl-256": ("DiTTransformer2DModel", dict(out_channels=8)),
    "edm-imagenet64": ("UNet2DModel", EDM_IMAGENET64),
}
EXPERTS = {"wan2.2": 2}
FP32_TEACHERS = ["edm-imagenet64"]

RANK = 64  # of --lora
PROCESSES = 8  # of --shard
TRAINED = 16  # bytes a trained number: fp32 weight, gradient, two moments
AVERAGE = 4  # bytes a trained number of the student


def network(name):
    """The teacher's network on the meta device."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    if name in random_teachers.TABLE:
        return random_teachers.network(random_teachers.entry(name), "meta")
    class_name, config = OTHERS[name]
    with torch.device("meta"):
        return getattr(diffusers, class_name)(**config)


def adapter_parameters(net):
    """Numbers in the two factors of all LoRA adapters of rank RANK."""
    modules = dict(net.named_modules())
    total = 0
    for name in lora.target_layers(net, dict(rank=RANK, targets=None, flag="--lora")):
        weight = modules[name].weight
        total += RANK * (weight.shape[0] + weight.flatten(1).shape[1])
    return total


def estimate(name):
    """-> parameters; bytes of one process: all networks whole, with adapters, sharded."""
    net = network(name)
    experts = EXPERTS.get(name, 1)
    n = sum(p.numel() for p in net.parameters())
    adapters = adapter_parameters(net)
    teacher = n * (4 if name in FP32_TEACHERS else 2)
    both = 2 * TRAINED + AVERAGE  # student and critic, average of the student
    whole = (teacher + n * both) * experts
    with_adapters = (teacher + adapters * both) * experts
    return n * experts, whole, with_adapters, whole / PROCESSES


def main():
    headings = [
        "`--teacher`",
        "parameters",
        "memory, all networks whole (estimated)",
        f"`--lora {RANK} --lora-fake {RANK}` (estimated)",
        f"whole, `--shard` over {PROCESSES} processes, each (estimated)",
    ]
    print(f"| {' | '.join(headings)} |")
    print("|---" * len(headings) + "|")
    for name in [*random_teachers.TABLE, *OTHERS]:
        n, *memory = estimate(name)
        count = f"{n / 1e9:.2f}B"
        if name in EXPERTS:
            count = f"{EXPERTS[name]} x {n / EXPERTS[name] / 1e9:.2f}B"
        gigabytes = [f"{b / 2**30:.0f} GB" for b in memory]
        print(f"| `{name}` | {count} | {' | '.join(gigabytes)} |")


if __name__ == "__main__":
    main()

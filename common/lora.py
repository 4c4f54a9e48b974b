"""LoRA (--lora, --lora-fake): adapters of peft on a network whose own weights stay the teacher's, so that one copy of them is in memory.

A network with adapters has modules of its own, while its weights are the very tensors of the teacher, held as plain attributes and not as parameters.
`parameters()`, `state_dict()` and `requires_grad_()` therefore mean the adapters alone (and what `Model.extend` added): optimisers, averages, checkpoints,
DDP and the scripts' toggles need not know that there is a base, and none of them can touch it. Adapters are float32, whatever the base is.
The weight average (EMA) is that of the two factors of each adapter, as is usual, and not of their product.
"""

import copy

import torch
import torch.nn as nn

from common.errors import UserError, did_you_mean

FILE = "pytorch_lora_weights.safetensors"  # name and keys of diffusers' LoRA files
LAYERS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "net.0.proj",
    "net.2",
)  # attention and feed-forward


def copy_network(net, shared):
    """Deep copy of a network that keeps the tensors of `shared` and its buffers."""
    return copy.deepcopy(net, {id(t): t for t in [*shared, *net.buffers()]})


def add_adapters(net, spec):
    """A twin of `net` on the same weights, with new adapters that change nothing yet. spec: rank, alpha (the update is alpha / rank B A), targets (endings
    of names of layers; None: LAYERS), seed, flag (for messages). -> network, the shared weights"""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    base = list(net.parameters())
    mine = {id(p) for p in base}
    names, net = target_layers(net, spec), copy_network(net, base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec["seed"])  # adapters start equal on all processes
        inject_adapter_in_model(
            LoraConfig(
                r=spec["rank"], lora_alpha=spec["alpha"], target_modules=names, lora_dropout=0.0
            ),
            net,
        )
    for module in net.modules():
        for name, p in list(module._parameters.items()):
            if id(p) in mine:
                del module._parameters[name]
                module.__dict__[name] = p
            elif p is not None:
                p.data = p.data.float()
        module._non_persistent_buffers_set.update(
            module._buffers
        )  # the teacher's as well: no checkpoint needs them
    for module in net.modules():  # a part without adapters still says which weights it has: Wan's network asks for their dtype
        weights = [t for m in module.modules() for t in vars(m).values() if id(t) in mine]
        if weights and next(module.parameters(), None) is None:
            module.parameters = lambda recurse=True, weights=weights: iter(weights)
    return net, base


def target_layers(net, spec):
    """Names of the layers that get adapters. UserError: none of that name, or the rank is larger than the layer."""
    known = {
        name: m
        for name, m in net.named_modules()
        if isinstance(m, nn.Linear) or isinstance(m, nn.Conv2d) and m.groups == 1
    }
    found = {
        ending: [name for name in known if f".{name}".endswith(f".{ending}")]
        for ending in spec["targets"] or LAYERS
    }
    if (
        missing := [ending for ending, names in found.items() if not names]
        if spec["targets"]
        else []
    ):
        raise UserError(
            f"--lora-targets {missing[0]}: expected the end of names of linear or convolution layers, found none such in {type(net).__name__}"
            f"{did_you_mean(missing[0], {name.split('.')[-1] for name in known})}"
        )
    names = sorted({name for names in found.values() for name in names})
    if not names:
        raise UserError(
            f"{spec['flag']} {spec['rank']}: expected a network with attention, found {type(net).__name__}; choose layers by --lora-targets, "
            f"e.g. {next(iter(known), 'none')}"
        )
    side = lambda name: min(known[name].weight.flatten(1).shape)
    if side(least := min(names, key=side)) < spec["rank"]:
        raise UserError(
            f"{spec['flag']} {spec['rank']}: expected a rank of at most {side(least)}, the smaller side of layer {least}; --lora-targets chooses others"
        )
    return names


def file_key(part):
    """Name of an adapter's tensor in a LoRA file, from its name in the network. part: prefix, the network's name in the pipeline."""
    return lambda name: f"{part}.{name.replace('.default.', '.')}"


def tensors(model):
    """Contents of a LoRA file. The file has no alpha, which means alpha = rank: the factor is in B."""
    scale = model.lora["alpha"] / model.lora["rank"]
    return {
        file_key(model.part)(k): v * scale if ".lora_B." in k else v
        for k, v in model.net.state_dict().items()
    }


def config(model):
    """What loading a saved network with adapters needs, beside its teacher."""
    names = [name for name, m in model.net.named_modules() if hasattr(m, "lora_A")]
    targets = [
        e
        for e in model.lora["targets"] or LAYERS
        if any(f".{name}".endswith(f".{e}") for name in names)
    ]
    return dict(
        rank=model.lora["rank"], alpha=model.lora["rank"], targets=targets
    )  # alpha of the file: see `tensors`

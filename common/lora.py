"""LoRA (--lora, --lora-fake): adapters of peft on a network that keeps the teacher's own weights.

The weights exist once in memory, for the teacher and for all networks with adapters on it. In such
a network they are no parameters any more (see `hide`), so `parameters()`, `state_dict()` and
`requires_grad_()` concern the adapters only, and what `Model.extend` added. Optimisers, averages,
checkpoints and DDP need no special case, and none of them can change the teacher.

Adapters are float32 whatever the weights are. The EMA averages the two factors of an adapter, as
is usual, and not their product.
"""

import copy

import torch
import torch.nn as nn

from common.errors import UserError, did_you_mean

FILE = "pytorch_lora_weights.safetensors"  # name and keys of diffusers' LoRA files

ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
FEED_FORWARD = ["net.0.proj", "net.2"]
LAYERS = ATTENTION + FEED_FORWARD  # that get adapters, by the ends of their names


def copy_network(net, shared):
    """Deep copy of a network that shares the tensors `shared` and all buffers with it."""
    return copy.deepcopy(net, {id(tensor): tensor for tensor in [*shared, *net.buffers()]})


def add_adapters(net, spec):
    """A copy of `net` on the same weights, with adapters that change nothing yet, and the weights.

    spec: rank, alpha (the update of a weight is alpha / rank B A), targets (ends of the names of
    layers, None for LAYERS), seed, flag (for messages). UserError if a layer cannot be used.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    names = target_layers(net, spec)
    weights = list(net.parameters())
    net = copy_network(net, weights)
    config = LoraConfig(
        r=spec["rank"], lora_alpha=spec["alpha"], target_modules=names, lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec["seed"])  # the adapters are equal on all processes
        inject_adapter_in_model(config, net)
    hide(net, weights)
    return net, weights


def hide(net, weights):
    """Makes the adapters the only parameters and the only state of a network. Two tricks:

    Each of `weights` leaves its module's parameters and becomes a plain attribute of the same name,
    which the module's forward finds just as well.

    Modules without adapters then have no parameters at all, but some networks read the dtype of a
    part from its first parameter (Wan's time embedder). There `parameters()` returns the weights.
    """
    hidden = {id(weight) for weight in weights}
    for module in net.modules():
        for name, p in list(module._parameters.items()):
            if id(p) in hidden:
                del module._parameters[name]
                module.__dict__[name] = p
            elif p is not None:
                p.data = p.data.float()
        module._non_persistent_buffers_set.update(module._buffers)
    for module in net.modules():
        own = [t for part in module.modules() for t in vars(part).values() if id(t) in hidden]
        if own and next(module.parameters(), None) is None:
            module.parameters = lambda recurse=True, own=own: iter(own)


def has_end(name, end):
    return f".{name}".endswith(f".{end}")


def target_layers(net, spec):
    """Names of the layers that get adapters. UserError: there are none; the rank is too large."""
    layers = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and module.groups == 1:
            layers[name] = module
    for end in spec["targets"] or ():
        if not any(has_end(name, end) for name in layers):
            raise UserError(
                f"--lora-targets {end}: expected the end of names of linear or convolution layers, "
                f"found none such in {type(net).__name__}"
                f"{did_you_mean(end, {name.split('.')[-1] for name in layers})}"
            )
    ends = spec["targets"] or LAYERS
    names = sorted(name for name in layers if any(has_end(name, end) for end in ends))
    if not names:
        raise UserError(
            f"{spec['flag']} {spec['rank']}: expected a network with attention, "
            f"found {type(net).__name__}; choose layers by --lora-targets, "
            f"e.g. {next(iter(layers), 'none')}"
        )
    side = {name: min(layers[name].weight.flatten(1).shape) for name in names}
    smallest = min(names, key=side.get)
    if side[smallest] < spec["rank"]:
        raise UserError(
            f"{spec['flag']} {spec['rank']}: expected a rank of at most {side[smallest]}, "
            f"the smaller side of layer {smallest}; --lora-targets chooses others"
        )
    return names


# ---- files ---------------------------------------------------------------------------------------


def file_key(part):
    """Function: an adapter's name in the network -> its key in a LoRA file. part: Model.part."""
    return lambda name: f"{part}.{name.replace('.default.', '.')}"


def file_tensors(model):
    """Contents of the LoRA file. It has no alpha, which means alpha = rank: the factor is in B."""
    key = file_key(model.part)
    scale = model.lora["alpha"] / model.lora["rank"]
    tensors = {}
    for name, tensor in model.net.state_dict().items():
        tensors[key(name)] = tensor * scale if ".lora_B." in name else tensor
    return tensors


def config(model):
    """The entry "lora" of distill.json. Its alpha is that of the file: see `file_tensors`."""
    adapted = [name for name, module in model.net.named_modules() if hasattr(module, "lora_A")]
    ends = model.lora["targets"] or LAYERS
    targets = [end for end in ends if any(has_end(name, end) for name in adapted)]
    return dict(rank=model.lora["rank"], alpha=model.lora["rank"], targets=targets)

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
from common.files import read_weights, set_weights

FILE = "pytorch_lora_weights.safetensors"  # where diffusers looks for a LoRA

ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
FEED_FORWARD = ["net.0.proj", "net.2"]
FLUX2 = ["linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out"]  # both, also in one layer
LAYERS = ATTENTION + FEED_FORWARD + FLUX2  # that get adapters, by the ends of their names


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
#
# diffusers reads all three forms of names; ComfyUI reads the one that belongs to the network. None
# has a scale of its own: alpha = rank, the factor alpha / rank is in B.

FACTORS = dict(A="lora_down", B="lora_up")  # kohya's names

KOHYA = {  # layers whose names diffusers does not read back as they are: the original's
    "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
}

WAN = {  # diffusers' names -> those of Wan's own code
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".o.",
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    "condition_embedder.time_embedder.linear_1.": "time_embedding.0.",
    "condition_embedder.time_embedder.linear_2.": "time_embedding.2.",
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    "condition_embedder.time_proj.": "time_projection.1.",
    "proj_out.": "head.head.",
}


def diffusers_key(part, name):
    return f"{part}.{name}"


def kohya_key(part, name):
    """Names of kohya's trainer: no dots in the layer's name, down and up for A and B."""
    layer, _, factor = name.removesuffix(".weight").rpartition(".lora_")
    key = layer.replace(".", "_")
    for plain, original in KOHYA.items():
        key = key.replace(plain, original)
    return f"lora_{part}_{key}.{FACTORS[factor]}.weight"


def wan_key(part, name):
    """Names of Wan's own code."""
    for plain, original in WAN.items():
        name = name.replace(plain, original)
    return f"diffusion_model.{name}"


KEYS = dict(diffusers=diffusers_key, kohya=kohya_key, wan=wan_key)  # Model.lora_names


def tensors_of(model):
    """Adapters {name in the network: tensor}, as in a file: the factor alpha / rank is in B."""
    scale = model.lora["alpha"] / model.lora["rank"]
    tensors = {}
    for name, tensor in model.net.state_dict().items():
        name = name.replace(".default.", ".")
        tensors[name] = tensor * scale if ".lora_B." in name else tensor
    return tensors


def to_file(model, tensors):
    """`tensors_of` under the names of the LoRA file. Kohya's form has an alpha for each layer."""
    names = model.lora_names
    if names == "wan" and not any(name.startswith("blocks.") for name in tensors):
        names = "diffusers"  # which does not read the others without one of a block
    files = {}
    for name, tensor in tensors.items():
        key = KEYS[names](model.part, name)
        files[key] = tensor
        if key.endswith(".lora_down.weight"):
            files[key.replace("lora_down.weight", "alpha")] = torch.tensor(float(len(tensor)))
    return files


def form_of(tensors):
    """Function of KEYS that has made a file's names."""
    first = next(iter(tensors), "")
    kohya, wan = first.startswith("lora_"), first.startswith("diffusion_model.")
    return KEYS["kohya" if kohya else "wan" if wan else "diffusers"]


def to_diffusers(tensors, part, layers):
    """`to_file` undone: its tensors under diffusers' names. layers: names of those of the network.

    The alphas are left out: they are the ranks.
    """
    form = form_of(tensors)
    names = [f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"]
    keys = {form(part, name): diffusers_key(part, name) for name in names}
    return {keys[key]: v for key, v in tensors.items() if not key.endswith(".alpha")}


def load(path, model):
    """Loads a LoRA file into a model's adapters, whichever of the three forms its names have.

    UserError: no safetensors file, a tensor is missing, unknown or of another shape.
    """
    tensors = read_weights(path)
    form = form_of(tensors)
    for name in [name for name in tensors if name.endswith(".alpha")]:
        layer = name.removesuffix("alpha")
        up, down = f"{layer}lora_up.weight", f"{layer}lora_down.weight"
        if up in tensors and down in tensors and tensors[name].numel() == 1:
            scale = float(tensors.pop(name)) / len(tensors[down])
            tensors[up] = tensors[up] * scale  # 1 in files of our own
    key = lambda name: form(model.part, name.replace(".default.", "."))
    set_weights(path, model.net, tensors, key)


def config(model):
    """The entry "lora" of distill.json. Its alpha is that of the file: see `tensors_of`."""
    adapted = [name for name, module in model.net.named_modules() if hasattr(module, "lora_A")]
    ends = model.lora["targets"] or LAYERS
    targets = [end for end in ends if any(has_end(name, end) for name in adapted)]
    return dict(rank=model.lora["rank"], alpha=model.lora["rank"], targets=targets)

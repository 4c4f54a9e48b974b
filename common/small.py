"""--small, --small-fake: networks smaller than the teacher's that start with its weights.

A small network is of the teacher's class, with other values in its configuration: fewer blocks, or
narrower ones. Where a list of blocks is shorter, it gets blocks of the teacher at even distances,
the first and the last among them: of 12 the six 0 2 4 7 9 11, as DistilBERT (arXiv 1910.01108); of
a UNet with one layer less in each stage the layers that BK-SDM keeps (arXiv 2305.15798). A tensor
whose shape is the same starts as the teacher's, all others start at random.
"""

import json

import torch
import torch.nn as nn

from common.errors import UserError, did_you_mean


def flag_text(small):
    return f"{small['flag']} {' '.join(small['changes'])}"


def change_config(config, small):
    """The teacher's configuration with the changes of a flag. UserError for an unknown key.

    small: dict of `flag`, `seed`, and `changes`, a list of KEY=VALUE with values as in JSON or
    words.
    """
    changed = dict(config)
    for change in small["changes"]:
        key, _, value = change.partition("=")
        if key not in config:
            raise UserError(
                f"{flag_text(small)}: {key}: expected a key of the network's config.json"
                f"{did_you_mean(key, config)}"
            )
        try:
            changed[key] = json.loads(value)
        except ValueError:
            changed[key] = value
    return changed


def build(make, config, small, device):
    """The network of the changed configuration, with random weights, float32.

    make: function of a configuration, `network` of a teacher class. UserError if that fails.
    """
    changed = change_config(config, small)
    torch.manual_seed(small["seed"])  # equal on all processes
    try:
        with torch.device(device):
            return make(changed).to(device)
    except Exception as e:  # diffusers and torch raise many kinds for an unusable configuration
        raise cannot(small, "no network can be built", e) from None


def cannot(small, what, error):
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{flag_text(small)}: {what}: {type(error).__name__}: {reason}")


def count_parameters(make, config, small):
    """Number of parameters of the small network, which is built without memory."""
    return sum(p.numel() for p in build(make, config, small, "meta").parameters())


# ---- which tensor starts as which of the teacher's -----------------------------------------------


def kept_blocks(n, total):
    """Which `n` of a list of `total` blocks are kept: at even distances, from first to last."""
    if n >= total:
        return list(range(total))
    return [round(i * (total - 1) / max(n - 1, 1)) for i in range(n)]


def teacher_names(net, teacher_net):
    """{name of a tensor of `net`: name of the teacher's tensor that it starts as}.

    Without the tensors that have no counterpart of the same shape.
    """
    tensors, teacher_tensors = net.state_dict(), teacher_net.state_dict()
    names = {}
    for name, tensor in tensors.items():
        found = counterpart(name, net, teacher_net)
        if found in teacher_tensors and teacher_tensors[found].shape == tensor.shape:
            names[name] = found
    return names


def counterpart(name, module, teacher_module):
    """The name of a tensor, with the numbers of blocks that the teacher has them under."""
    parts = name.split(".")
    for depth, part in enumerate(parts[:-1]):
        if isinstance(module, nn.ModuleList) and isinstance(teacher_module, nn.ModuleList):
            kept = kept_blocks(len(module), len(teacher_module))
            if int(part) < len(kept):
                parts[depth] = str(kept[int(part)])
        module = getattr(module, part, None)
        teacher_module = getattr(teacher_module, parts[depth], None)
    return ".".join(parts)

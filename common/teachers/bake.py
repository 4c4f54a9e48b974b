"""New inputs of a student, folded into its network for the fixed times of its sampler.

`Model.extend` adds a vector to the output of the time embedding. At each of the n times of a
sampler this vector is the same for all samples, so the last layer of the time embedding can be
changed such that its output at these n times contains the vector: the least change that solves n
linear equations. What results is an ordinary network of the teacher's architecture.
"""

import torch

from common import lora
from common.files import WEIGHTS
from common.model import StopForward
from common.teachers.plain import NotPlain

UNBAKED = "unbaked.safetensors"  # the changed layer as this repository's samplers need it
UNBAKED_LORA = "unbaked_lora_weights.safetensors"  # the same of a LoRA: all of its adapters
LARGEST_CONDITION = 1e3  # of the n equations
LARGEST_CHANGE = 10.0  # of the layer's weight, relative to its norm
EXACT = 1e-6  # error of the layer's outputs, relative


def bake(student, steps):
    """Files of a student without its new inputs, as `Model.files`, and the files that restore them.

    student: Pipeline with `extras`. steps: those of a Trace that this network makes. NotPlain if
    this is not exact.
    """
    layer = student.time_layer()
    if getattr(student.time_embedders()[0][0], "post_act", None) is not None:
        raise NotPlain("its time embedding ends in an activation")
    inputs = torch.cat([layer_input(student, layer, step) for step in steps])  # [n, width]
    added = torch.cat([added_vector(step) for step in steps])  # [n, out]
    if student.lora:
        return bake_adapters(student, layer, inputs, added)
    return bake_weights(student, layer, inputs, added)


def layer_input(student, layer, step):
    """What the layer gets at the time of a step, [1, width] in float64."""
    seen = []

    def stop(module, args):
        seen.append(args[0][:1].detach().double().cpu())
        raise StopForward

    handle = layer.register_forward_pre_hook(stop)
    x = step["x"][:1]
    t = torch.full((1,), step["t"], dtype=torch.float32, device=x.device)
    cond = student.encode([0])
    bf16 = student.dtype == torch.bfloat16
    try:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            student.predict(x, t, cond)
    except StopForward:
        pass
    finally:
        handle.remove()
    (found,) = seen
    if found.ndim == 3:  # several rows a sample: what they share is the time's part of the input
        found = found[:, 0] * (found == found[:, :1]).all(1)
    return found.view(1, -1)


def added_vector(step):
    """What the new inputs add at a step, [1, out] in float64."""
    extra = step["extra"].double().cpu()
    if not torch.allclose(extra, extra[:1].expand_as(extra), rtol=0, atol=1e-6):
        raise NotPlain("its new inputs differ between samples")
    return extra[:1]


def bake_weights(student, layer, inputs, added):
    """`bake` of whole weights: the layer's weight changes, and its bias if it has one."""
    old = {name: p.detach().double().cpu() for name, p in layer.named_parameters()}
    if "bias" in old and len(inputs) == 1:
        changes = dict(weight=torch.zeros_like(old["weight"]), bias=added[0])
    else:
        equations = inputs
        if "bias" in old:
            equations = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        require_condition(equations)
        solution = torch.linalg.pinv(equations) @ added  # of least norm
        changes = dict(weight=solution[: inputs.shape[1]].T, bias=solution[-1])
    require_small(changes["weight"], old["weight"])
    new = {name: (p + changes[name]).to(layer.weight.dtype) for name, p in old.items()}

    def outputs(parameters):
        return inputs @ parameters["weight"].double().T + parameters.get("bias", 0)

    require_exact(outputs(new), outputs(old) + added)

    files = student.network_files()
    tensors = dict(files[WEIGHTS])
    name = name_of(student.net, layer)
    kept = {f"{name}.{end}": tensors[f"{name}.{end}"] for end in old}
    tensors |= {f"{name}.{end}": p for end, p in new.items()}
    return files | {WEIGHTS: tensors}, {UNBAKED: kept}


def bake_adapters(student, layer, inputs, added):
    """`bake` of a LoRA: one more adapter, of rank n, on the layer. A A^+ = 1 at the n times."""
    base = getattr(layer, "base_layer", layer)
    n, width = inputs.shape
    if n > width:
        raise NotPlain(f"its time embedding has {width} numbers for {n} steps")
    require_condition(inputs)
    down = torch.linalg.pinv(inputs).T.float()  # [n, width]
    up = added.T.float()  # [out, n]
    require_small(up.double() @ down.double(), base.weight.detach().double().cpu())
    require_exact(inputs @ down.double().T @ up.double().T, added)

    tensors = lora.tensors_of(student)
    name = name_of(student.net, layer)
    names = [f"{name}.lora_{end}.weight" for end in "AB"]
    if names[0] in tensors:  # it has an adapter already: the ranks add up
        down = torch.cat([tensors[names[0]].cpu(), down])
        up = torch.cat([tensors[names[1]].cpu(), up], 1)
    rank = student.lora["rank"]
    missing = max(rank - len(down), 0)  # older programs expect one rank everywhere
    down = torch.cat([down, torch.zeros(missing, width)])
    up = torch.cat([up, torch.zeros(len(up), missing)], 1)
    baked = tensors | {names[0]: down, names[1]: up}
    return (
        {lora.FILE: lora.to_file(student, baked)},
        {UNBAKED_LORA: lora.to_file(student, tensors)},
    )


def name_of(net, layer):
    return next(name for name, module in net.named_modules() if module is layer)


def require_condition(equations):
    condition = float(torch.linalg.cond(equations))
    if not condition <= LARGEST_CONDITION:
        raise NotPlain(
            f"the steps are too close for the time embedding (condition number {condition:.1e}, "
            f"at most {LARGEST_CONDITION:.0e})"
        )


def require_small(change, weight):
    share = float(change.norm() / weight.norm())
    if not share <= LARGEST_CHANGE:
        raise NotPlain(
            f"its new inputs would change the time embedding {share:.2g} times its own size "
            f"(at most {LARGEST_CHANGE:g})"
        )


def require_exact(found, expected):
    error = float((found - expected).norm() / expected.norm())
    if not error <= EXACT:
        raise NotPlain(f"its new inputs would be {error:.1e} off (at most {EXACT:.0e})")

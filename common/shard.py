"""--shard: weights, gradients and optimiser state of every network spread over the processes by torch's `fully_shard` (FSDP2). Nothing home-made.

A unit, i.e. what is gathered before its pass and freed after it, is a block of the network; what is left of the network is one more. Weights are gathered
in the dtype they are kept in (a bf16 teacher in bf16, trained networks in fp32), so that the result is that of whole networks. All processes must call
a network equally often and in the same order.
"""

import copy
import re

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from common.errors import UserError

try:
    from torch.distributed.fsdp import FSDPModule, fully_shard
except ImportError:  # early builds of torch 2.6
    from torch.distributed._composable.fsdp import FSDPModule, fully_shard

UNIT = re.compile(r"(.*\.)?(\w*blocks\.\d+|mid_block)")


class Sharding:
    """place(module) -> the module, spread over the processes. All of them must hold the same weights beforehand."""

    def __init__(self, device):
        if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise UserError(
                f"--shard: expected a newer torch for CPUs (2.13 does it), found {torch.__version__}"
            )
        self.device, self.mesh = device, init_device_mesh(device.type, (dist.get_world_size(),))

    def __call__(self, module):
        parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
        if (
            parts or type(module).forward is nn.Module.forward or "experts" in module._modules
        ):  # its parts on their own: some are spread already; a list; Routed
            for child in module.children():
                if child not in parts:
                    self(child)
            return module
        if "skeleton" in vars(module):  # a Model: a network of blocks, from which copies are made
            skeleton = copy.deepcopy(
                module.net,
                {
                    id(p): nn.Parameter(torch.empty_like(p, device="meta"), False)
                    for p in module.net.parameters()
                },
            )
            module.__dict__["skeleton"], module.sharding = (
                module.with_network(skeleton),
                self,
            )  # proto is no part of the module
        for unit in units(module):
            materialise(unit, self.device)
            unit.register_forward_hook(
                lambda m, args, out: unviewed(out) if torch.is_grad_enabled() else None
            )
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True)
        module.register_forward_hook(rest)
        module.register_load_state_dict_pre_hook(take)
        return module

    @torch.no_grad()
    def copy(self, model):
        """Model.copy of a sharded model; at no time is more than a unit whole."""
        twin = model.skeleton.with_network(
            copy.deepcopy(model.skeleton.net).float().requires_grad_(True)
        )
        twin = self(twin)
        with torch.random.fork_rng([]):  # their weights are overwritten
            twin.extend(*model.extras)
        for new, old in zip(twin.parameters(), model.parameters(), strict=True):
            new.to_local().copy_(old.to_local())
        return twin

    def unsharded(self, model):
        """A plain model with all weights on the host: on rank 0, and without its weights elsewhere. To be called by all processes."""
        tensors = gather_state(model.state_dict(), dist.get_rank() == 0)
        twin = model.skeleton.with_network(copy.deepcopy(model.skeleton.net).float())
        if dist.get_rank() == 0:
            materialise(twin, "cpu")
            twin.extend(*model.extras)
            twin.load_state_dict(tensors)
        return twin


def units(module):
    """What is gathered at a time, the inner ones first, the module itself last."""
    outside = (
        module.time_embedders()[0] if "skeleton" in vars(module) else []
    )  # diffusers' DiT calls that of its first block from outside the block
    return [
        *reversed(
            [
                part
                for name, part in module.named_modules()
                if UNIT.fullmatch(name) or part in outside
            ]
        ),
        module,
    ]


def rest(module, args, out):
    """Hook after a pass without gradient."""
    if torch.is_grad_enabled():
        return
    module.reshard()  # torch 2.6 keeps the outermost unit whole
    if (
        "skeleton" in vars(module)
        and not next(module.parameters()).requires_grad
        and hasattr(module, "reset_iter_state")
    ):
        module.reset_iter_state()  # torch notes every pass for the order of a backward, which a frozen network never has: the notes would grow for ever


def unviewed(out):
    """Outputs that are views become tensors of their own: fully_shard's backward hooks would be lost where somebody writes into a view."""
    if isinstance(out, (list, tuple)):
        return type(out)(map(unviewed, out))
    return out.clone() if torch.is_tensor(out) and out._is_view() else out


def materialise(module, device):
    """Memory, not values, for parameters on the meta device."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if p.is_meta:
                setattr(
                    part, name, nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
                )


def gather_state(value, keep=True):
    """A state_dict, or what is in it, with whole tensors on the host. To be called by all processes; those that do not keep it get None in the place of tensors."""
    if isinstance(value, dict):
        return {k: gather_state(v, keep) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gather_state(v, keep) for v in value)
    if isinstance(value, DTensor):
        value = value.full_tensor()  # one at a time
        return value.cpu() if keep else None
    return value


def mine(full, like):
    """This process's part of a whole tensor, as `like` is spread."""
    if (
        not torch.is_tensor(full)
        or not isinstance(like, DTensor)
        or isinstance(full, DTensor)
        or full.shape != like.shape
    ):
        return full
    rank, parts = (
        dist.get_rank(),
        full.chunk(dist.get_world_size()),
    )  # as torch splits them: by rows, the last ones may have fewer or none
    local = (parts[rank] if rank < len(parts) else full[:0]).to(
        device=like.device, dtype=like.dtype
    )
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def take(module, state, prefix, *unused):
    """Hook of load_state_dict: whole tensors, from a checkpoint of any number of processes, become this process's parts."""
    for name, p in module.named_parameters():
        if prefix + name in state:
            state[prefix + name] = mine(state[prefix + name], p)


def local_optimizer_state(opt, state):
    """The same for an optimiser's state_dict."""
    params = [p for group in opt.param_groups for p in group["params"]]
    return dict(
        state,
        state={i: {k: mine(v, params[i]) for k, v in s.items()} for i, s in state["state"].items()},
    )

"""--shard: weights, gradients and optimiser states spread over processes by fully_shard (FSDP2).

A unit, i.e. what is gathered before its pass and freed after it, is a block of a network; what is
left of the network is one more. With --dtype bf16 the weights of networks are gathered in bf16,
half of the bytes; each process keeps its part in fp32, gradients are averaged in fp32. Autocast
would round the weights of matrices and convolutions in the same way, so only norms and other small
layers differ from a run with whole networks. What is not a Model (heads, embeddings of new inputs)
stays in fp32. All processes must call a network equally often and in the same order.

Checkpoints hold whole tensors, so that any number of processes can resume them, with --shard or
without. torch.distributed.checkpoint.state_dict would name optimiser states by parameters instead
of by indices, which a run without --shard could not read.
"""

import copy
import re

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from common.errors import UserError
from common.model import Model
from common.routed import Routed

try:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
except ImportError:  # early builds of torch 2.6
    from torch.distributed._composable.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

UNIT = re.compile(r"(.*\.)?(\w*blocks\.\d+|mid_block)")  # names of blocks in diffusers' networks


class Sharding:
    """sharding(module) spreads a module over the processes, in place, and returns it.

    All processes must hold the same weights beforehand. dtype: of the network passes. size: number
    of processes that share one copy of the weights; None: all. With several copies, as on several
    machines with a slow network between them, only gradients travel from copy to copy.
    """

    def __init__(self, device, dtype=torch.float32, size=None):
        if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise UserError(
                f"--shard: expected a newer torch for CPUs (2.13 can do it), "
                f"found {torch.__version__}"
            )
        self.device = device
        world = dist.get_world_size()
        copies = world // (size or world)
        shape, names = (copies, world // copies), ("copies", "parts")  # spread over the last one
        if copies == 1:
            shape, names = shape[1:], names[1:]
        self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self.mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)

    def __call__(self, module):
        sharded = [m for m in module.modules() if self.is_sharded(m)]
        is_list = type(module).forward is nn.Module.forward
        if sharded or is_list or isinstance(module, Routed):  # its parts one by one
            for child in module.children():
                if child not in sharded:
                    self(child)
            return module

        self.spread(module)
        if isinstance(module, Model):  # after the skeleton was made, which is not sharded
            module.sharding = self
        return module

    def is_sharded(self, module):
        return isinstance(module, FSDPModule)

    def spread(self, module):
        if isinstance(module, Model):
            # in __dict__, since the skeleton is no part of the module
            module.__dict__["skeleton"] = make_skeleton(module)
        precision = self.mixed if isinstance(module, Model) else MixedPrecisionPolicy()
        for unit in units(module):
            materialise(unit, self.device)
            unit.register_forward_hook(copy_views_hook)
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, mp_policy=precision)
        module.register_forward_hook(reshard_hook)
        # in front of the hook of fully_shard
        module.register_forward_pre_hook(self.move_inputs, prepend=True)
        NoteGradients(module)
        module.register_load_state_dict_pre_hook(load_hook)

    def move_inputs(self, module, args):
        """fully_shard copies inputs that are on the host to the device, and waits for that."""
        move = lambda t: t.to(self.device, non_blocking=True) if torch.is_tensor(t) else t
        return tree_map(move, args)

    @torch.no_grad()
    def copy(self, model):
        """Model.copy of a sharded model. No process ever holds more than one whole unit of it."""
        net = copy.deepcopy(model.skeleton.net).float().requires_grad_(True)
        copied = self(model.skeleton.with_network(net))
        with torch.random.fork_rng([]):  # the new embeddings' random weights are overwritten
            copied.extend(*model.extras)
        for new, old in zip(copied.parameters(), model.parameters(), strict=True):
            new.to_local().copy_(old.to_local())
        if model.is_rounded():
            self.scatter(model.read_weights, copied.net)
        return copied

    def scatter(self, read_weights, net, names=None):
        """Weights of a sharded network from a state_dict that rank 0 alone reads.

        names: {name of a parameter: its name in the state_dict}, others stay as they are; None: all
        of the network, by the same names.
        """
        weights = read_weights() if dist.get_rank() == 0 else {}
        for name, p in net.named_parameters():
            if names is not None and name not in names:
                continue
            read_name = name if names is None else names[name]
            whole = weights[read_name] if weights else torch.empty(p.shape)
            p.to_local().copy_(local_part(whole, p).to_local())

    def unsharded(self, model):
        """Model.unsharded: with its weights in CPU memory on rank 0, without weights elsewhere."""
        is_rank0 = dist.get_rank() == 0
        tensors = gather_state(model.state_dict(), is_rank0)
        whole = model.skeleton.with_network(copy.deepcopy(model.skeleton.net).float())
        if is_rank0:
            materialise(whole, "cpu")
            whole.extend(*model.extras)
            whole.load_state_dict(tensors)
        return whole


def make_skeleton(model):
    """The model with parameters on the meta device: shapes without memory, to make copies from."""
    memo = {}
    for p in model.net.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    return model.with_network(copy.deepcopy(model.net, memo))


def units(module):
    """Parts that are gathered at a time: inner ones first, the module itself last."""
    # diffusers' DiT calls the time embedder of its first block from outside that block
    embedders = module.time_embedders()[0] if isinstance(module, Model) else []
    parts = [m for name, m in module.named_modules() if UNIT.fullmatch(name) or m in embedders]
    return [*reversed(parts), module]


def materialise(module, device):
    """Memory, not values, for parameters on the meta device."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if p.is_meta:
                memory = torch.empty_like(p, device=device)
                setattr(part, name, nn.Parameter(memory, p.requires_grad))


# ---- hooks of a sharded module -------------------------------------------------------------------


class NoteGradients:
    """Hook before the passes of a network, until the first one that trains it.

    torch notes at a network's first pass in which dtype its gradients are averaged, and notes none
    for a network that is frozen then (pytorch#186998). Gathering a unit makes it note again.
    """

    def __init__(self, module):
        self.was_frozen = False
        self.handle = module.register_forward_pre_hook(self, prepend=True)

    def __call__(self, module, args):
        if not next(module.parameters()).requires_grad:
            self.was_frozen = True
            return
        self.handle.remove()
        if self.was_frozen:
            for unit in module.modules():
                if isinstance(unit, FSDPModule):
                    unit.unshard()
                    unit.reshard()


def copy_views_hook(module, args, out):
    """Outputs that are views become tensors of their own: writing into a view would remove the
    hooks that fully_shard has on it for the backward pass."""
    return copy_views(out) if torch.is_grad_enabled() else None


def copy_views(out):
    if isinstance(out, (list, tuple)):
        return type(out)(copy_views(x) for x in out)
    return out.clone() if torch.is_tensor(out) and out._is_view() else out


def reshard_hook(module, args, out):
    """After a pass without gradient."""
    if torch.is_grad_enabled():
        return
    module.reshard()  # torch 2.6 keeps the outermost unit whole
    # torch notes each pass for the order of the backward. A frozen network never has a backward,
    # and its notes would grow without end. Not all versions of torch do this.
    frozen = not next(module.parameters()).requires_grad
    if isinstance(module, Model) and frozen and hasattr(module, "reset_iter_state"):
        module.reset_iter_state()


def load_hook(module, state, prefix, *unused):
    """Before load_state_dict: whole tensors become this process's parts."""
    for name, p in module.named_parameters():
        if prefix + name in state:
            state[prefix + name] = local_part(state[prefix + name], p)


# ---- states --------------------------------------------------------------------------------------


def gather_state(state, keep=True):
    """A state_dict with whole tensors in CPU memory. To be called by all processes.

    keep: False on processes that do not need it, which get None in place of the tensors.
    """
    if isinstance(state, dict):
        return {key: gather_state(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gather_state(value, keep) for value in state)
    if isinstance(state, DTensor):
        whole = state.full_tensor()  # one at a time
        return whole.cpu() if keep else None
    return state


def local_optimizer_state(opt, state):
    """An optimiser's state_dict of whole tensors, with this process's parts instead.

    Networks need no such call: their load_state_dict does it itself. To be called by all processes.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    parts = {}
    for i, moments in state["state"].items():
        parts[i] = {name: local_part(value, params[i]) for name, value in moments.items()}
    return dict(state, state=parts)


def local_part(whole, like):
    """This process's part of a whole tensor, spread as `like` is; anything else stays as it is."""
    if not isinstance(like, DTensor) or not torch.is_tensor(whole) or isinstance(whole, DTensor):
        return whole
    if whole.shape != like.shape:  # a number of steps, or a mistake that torch reports
        return whole
    whole = whole.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements)

"""--dry-run with --processes N: what a process sends, and what it holds, when there are N.

The loop itself runs once, as one of them. Collectives are counted where they would happen, by hooks
on the parameters and networks; N processes in a ring each send 2 (N - 1) / N bytes for a byte that
is all-reduced and (N - 1) / N for one that is gathered or reduce-scattered. Single numbers (norms,
means of a loss) are left out.
"""

import weakref
from collections import Counter, defaultdict, deque

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_leaves

from common.model import Model
from dryrun.ghost import Storage
from training.shard import Sharding, copy_views, units

ALL_REDUCED = "gradients, all-reduced"
GATHERED = "weights, gathered"
AGAIN = "weights, gathered again for a backward"
SCATTERED = "gradients, reduce-scattered"


class Traffic:
    """Collectives of the current iteration. processes: N. gpu: the GhostDevice.

    sent: bytes that each process sends, by kind.
    """

    def __init__(self, processes, gpu):
        self.processes = processes
        self.gpu = gpu
        self.is_last_microstep = True
        self.sent = Counter()
        self.wrapped = weakref.WeakSet()  # networks in DDP
        self.held = deque()  # Storages of gathered weights

    def restart(self):
        self.sent.clear()
        for ddp in self.wrapped:
            ddp.restart()

    def all_reduce(self, n, processes=None):
        """n: bytes. processes: those that take part; None: all."""
        processes = processes or self.processes
        self.sent[ALL_REDUCED] += 2 * (processes - 1) * n / processes

    def spread(self, kind, n, processes):
        """A gather or a reduce-scatter. n: bytes of one process's part."""
        self.sent[kind] += (processes - 1) * n

    def buckets(self):
        """{id of a parameter: where DDP keeps its gradient}."""
        return {key: bucket for ddp in self.wrapped for key, bucket in ddp.buckets.items()}


class GhostDDP(torch.nn.Module):
    """DistributedDataParallel: memory for the gradients of a network for as long as it exists, and
    one all-reduce of all of them in each backward pass of the last microstep."""

    def __init__(self, module, traffic):
        super().__init__()
        self.module = module
        self.traffic = traffic
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.buckets = {id(p): torch.empty_like(p, requires_grad=False) for p in self.params}
        self.size = sum(p.numel() * p.element_size() for p in self.params)
        self.restart()
        this = weakref.ref(self)
        hook = lambda p: this().ready(p)
        handles = [p.register_post_accumulate_grad_hook(hook) for p in self.params]
        weakref.finalize(self, lambda: [handle.remove() for handle in handles])
        traffic.wrapped.add(self)

    def restart(self):
        self.backwards = defaultdict(int)  # by parameter
        self.reduced = 0

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def ready(self, p):
        """A gradient is complete. Until the last microstep it stays where it is; there it moves.

        Parameters that this backward does not reach are reduced with the others.
        """
        if not self.traffic.is_last_microstep:
            return
        bucket = self.buckets[id(p)]
        if p.grad is not bucket:
            bucket.copy_(p.grad)
            p.grad = bucket
        self.backwards[id(p)] += 1
        if self.backwards[id(p)] > self.reduced:
            self.reduced += 1
            self.traffic.all_reduce(self.size)


class Unit:
    """What fully_shard gathers at a time. params: its own, not those of units inside it.

    part: bytes of one process's part as it is sent, in the dtype of the network's passes.
    """

    def __init__(self, params, processes, outermost, dtype):
        self.fractions = {id(p): fraction(p, processes) for p in params}
        size = lambda p: min(p.element_size(), dtype.itemsize)
        self.part = sum(self.fractions[id(p)] * p.numel() * size(p) for p in params)
        self.whole = self.part * processes
        self.outermost = outermost
        self.in_backward = False
        self.recomputed = False  # gathered in a backward for activations, before its own part of it


def fraction(p, processes):
    """Of a parameter that one process holds: fully_shard splits the rows, and pads the last."""
    return -(-len(p) // processes) / len(p) if p.ndim else 1


class GhostSharding(Sharding):
    """training.shard.Sharding on the device without memory: networks stay whole for autograd, and
    their storages count as the part that one process holds.

    A unit is gathered before its pass and freed after it, and again in the backward. Two inner
    units are held at a time, as the next one is fetched while one computes.
    """

    def __init__(self, traffic, device, dtype, size):
        self.traffic = traffic
        self.device = device
        self.dtype = dtype
        self.size = size or traffic.processes  # processes that share one copy
        # not hooks of the modules: copies of a module would have them too
        self.units = weakref.WeakKeyDictionary()
        traffic.gpu.hooks += [
            register_module_forward_pre_hook(self.before_forward),
            register_module_forward_hook(self.after_forward),
        ]

    def is_sharded(self, module):
        return module in self.units

    def spread(self, module):
        module.to(self.device)
        inner = set()
        dtype = self.dtype if isinstance(module, Model) else torch.float32
        for part in units(module):
            params = [p for p in part.parameters() if id(p) not in inner]
            inner |= {id(p) for p in params}
            unit = Unit(params, self.size, part is module, dtype)
            self.units[part] = unit
            for p in params:
                p.storage.share(unit.fractions[id(p)])
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(self.reduce)

    def copy(self, model):
        model.sharding = None
        try:
            copied = model.copy()
        finally:
            model.sharding = self
        copied.extras.requires_grad_(True)
        return self(copied)

    def reduce(self, p):
        part = fraction(p, self.size)
        p.grad.storage.share(part)
        n = part * p.grad.numel() * p.grad.element_size()
        self.traffic.spread(SCATTERED, n, self.size)
        copies = self.traffic.processes // self.size
        if copies > 1:
            self.traffic.all_reduce(n, copies)

    # ---- passes

    def gather(self, unit, kind):
        held = self.traffic.held
        self.traffic.spread(kind, unit.part, self.size)
        inner = [entry for entry in held if not entry[0].outermost]
        if not unit.outermost and len(inner) == 2:
            held.remove(inner[0])
        held.append((unit, Storage(self.traffic.gpu.memory, round(unit.whole), GATHERED)))

    def free(self):
        self.traffic.held.clear()

    def before_forward(self, module, args):
        unit = self.units.get(module)
        if unit is None:
            return None
        if unit.in_backward:  # activations are computed again, with weights that are there
            pass
        elif torch._C._current_graph_task_id() != -1:  # a part of what is computed again
            self.begin_backward(unit, flows=False)
            unit.recomputed = True
        else:
            self.gather(unit, GATHERED)
        return self.move_inputs(module, args) if unit.outermost else None

    def after_forward(self, module, args, out):
        unit = self.units.get(module)
        if unit is None:
            return None
        if unit.outermost and not unit.in_backward:
            self.free()
        if not torch.is_grad_enabled():
            return None
        out = copy_views(out)
        if not unit.in_backward:
            flows = any(torch.is_tensor(t) and t.requires_grad for t in args)
            begin = Once(lambda: self.begin_backward(unit, flows))
            for t in tree_leaves(out):
                if torch.is_tensor(t) and t.requires_grad:
                    t.register_hook(begin)
        return out

    def begin_backward(self, unit, flows):
        """flows: through the unit, to its input. Its weights are freed then; else at the end of
        the whole backward, and a second pass of the unit finds them."""
        if unit.recomputed:
            unit.recomputed = False
            return
        if flows or not unit.in_backward:
            self.gather(unit, AGAIN)
        unit.in_backward = True

        def end():
            unit.in_backward = unit.recomputed = False
            self.free()

        torch.autograd.Variable._execution_engine.queue_callback(end)


class Once:
    """A hook of several gradients that acts at the first of them."""

    def __init__(self, act):
        self.act = act

    def __call__(self, grad):
        act, self.act = self.act, None
        if act:
            act()

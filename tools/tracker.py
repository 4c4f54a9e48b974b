"""Memory of real tensors on the CPU, as a dry run counts that of tensors without memory."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RealMemory(TorchDispatchMode):
    """Context that counts the bytes of storages that operations make in it. now, peak: bytes."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else torch imports its compiler

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == "cpu":
                self.add(t.untyped_storage())
        return out

    def add(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        n = storage.nbytes()
        self.known.add(key)
        self.now += n
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, key, n)

    def remove(self, key, n):
        self.known.discard(key)
        self.now -= n

    def restart(self):
        self.peak = self.now

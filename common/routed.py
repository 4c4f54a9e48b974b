"""Several models that act as one: each sample is evaluated by the expert of its level or label."""

from functools import partial

import torch
import torch.nn as nn

from common.model import Model, take_rows


class Routed(nn.Module):
    """Several Models (experts) that act as one Model.

    A subclass says which expert a sample goes to, by `route`, according to its `table`. Experts may
    be routed themselves: MSD's students of a teacher that has one expert per range of noise.
    """

    by = None  # name of the rule in saved JSON files

    def __init__(self, experts, table):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.table = list(table)
        self.folder = None

    def route(self, n, alpha, sigma, cond):
        """Index of the expert of each of n samples, int64 [n]. alpha, sigma: 0-d or [n]."""
        raise NotImplementedError

    def varies(self, alpha, sigma):
        """True if other processes of a run may need other experts at these levels."""
        raise NotImplementedError

    def __getattr__(self, name):
        # Python calls this only for names that it does not find otherwise. All that is not defined
        # here (schedule, shape, encode, decode, ...) is taken from the first expert, so that a
        # Routed can be used wherever a Model can.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("experts")[0], name)

    @property
    def dtype(self):
        return self.experts[0].dtype

    @dtype.setter
    def dtype(self, dtype):
        for expert in self.experts:
            expert.dtype = dtype

    def forward(self, x_t, alpha, sigma, cond, features=False):
        """As Model.forward: estimates [B, *shape], or features, each from the sample's expert."""
        expert_of = self.route(len(x_t), alpha, sigma, cond)  # [B]
        used = expert_of.unique().tolist()
        if len(used) == 1 and not (self.sharding and self.varies(alpha, sigma)):
            return self.experts[used[0]](x_t, alpha, sigma, cond, features)

        # All processes must call the parts of a sharded model equally often. An expert without
        # samples on this process gets the first one, and its output is dropped.
        called = range(len(self.experts)) if self.sharding else used
        outputs = None
        for i in called:
            rows = (expert_of == i).nonzero()[:, 0]
            if i not in used:
                rows = torch.zeros(1, dtype=torch.int64)
            at_rows = partial(select, rows=rows)
            part_cond = {name: at_rows(value) for name, value in cond.items()}
            part = self.experts[i](
                at_rows(x_t), at_rows(alpha), at_rows(sigma), part_cond, features
            )
            if i not in used:
                continue
            part = part if features else [part]
            if outputs is None:
                outputs = [p.new_zeros(len(x_t), *p.shape[1:]) for p in part]
            rows = rows.to(x_t.device, non_blocking=True)
            outputs = [whole.index_put((rows,), p) for whole, p in zip(outputs, part)]
        return outputs if features else outputs[0]

    # A Model's own code serves here: it needs only `self(...)`, `null`, `files` and `config`.
    guided = Model.guided
    cond_and_uncond = Model.cond_and_uncond
    save = Model.save

    def copy(self, adapters=None, changes=None):
        copies = [expert.copy(adapters, changes) for expert in self.experts]
        return type(self)(copies, self.table)

    def unsharded(self):
        return type(self)([expert.unsharded() for expert in self.experts], self.table)

    def checkpoint_activations(self):
        for expert in self.experts:
            expert.checkpoint_activations()

    def extend(self, *names):
        for expert in self.experts:
            expert.extend(*names)
        return self

    def at_level(self, ratio):
        """The expert for sigma / alpha = ratio, or `self` if the level does not choose one."""
        return self

    def config(self):
        experts = [expert.config() for expert in self.experts]
        return dict(adapter="routed", by=self.by, table=self.table, experts=experts)

    def files(self):
        files = {}
        for i, expert in enumerate(self.experts):
            files |= {f"expert-{i}/{path}": v for path, v in expert.files().items()}
        return files


class ByLevel(Routed):
    """The noise level chooses: expert i is for table[i] < sigma / alpha <= table[i - 1].

    table: falling values of sigma / alpha, one fewer than experts.
    """

    by = "level"

    def route(self, n, alpha, sigma, cond):
        alpha = torch.as_tensor(alpha, dtype=torch.float64)
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        ratio = sigma / alpha  # inf for pure noise
        expert = torch.zeros_like(ratio, dtype=torch.int64)
        for edge in self.table:
            expert += (ratio <= edge).long()
        return expert.expand(n)

    def varies(self, alpha, sigma):
        # a single level is a step of a sampler, which all processes take together
        return torch.as_tensor(alpha).ndim > 0 or torch.as_tensor(sigma).ndim > 0

    def at_level(self, ratio):
        return self.experts[self.route(1, 1.0, ratio, {})]


class ByLabel(Routed):
    """The label chooses: table[label] is its expert. The null label goes to expert 0."""

    by = "label"

    def route(self, n, alpha, sigma, cond):
        labels = cond["labels"]
        table = torch.tensor([*self.table, 0])  # the null label is the last
        return table.to(labels.device, non_blocking=True)[labels]

    def varies(self, alpha, sigma):
        return True  # each process has labels of its own


def select(value, rows):
    """The rows of a tensor [B, ...]; anything without a batch is returned as it is."""
    if not torch.is_tensor(value) or value.ndim == 0:
        return value
    return take_rows(value, rows)

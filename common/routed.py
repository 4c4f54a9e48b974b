"""Several Models as one: each sample goes to one expert."""

from pathlib import Path

import torch.nn as nn
import torch.utils.checkpoint

from common.files import write_json
from common.model import Model


class Routed(nn.Module):
    """Several Models as one: every sample goes to the one expert that is responsible for it. What is not said here (schedule, encode, decode, ...) is
    answered by the first expert, so that it can stand wherever a Model does.

    by = "level": table holds falling values of sigma / alpha, one fewer than experts; expert i is for table[i] < sigma / alpha <= table[i-1].
    by = "label": table[label] is the expert of that label; the null label goes to expert 0.
    """

    def __init__(self, experts, by, table):
        super().__init__()
        self.experts, self.by, self.table = nn.ModuleList(experts), by, list(table)
        self.folder = None

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("experts")[0], name)

    def __setattr__(self, name, value):
        if name == "dtype":
            for expert in self.experts:
                expert.dtype = value
        else:
            super().__setattr__(name, value)

    def route(self, n, alpha, sigma, cond):
        """Expert of each of n samples: int64 [n]."""
        if self.by == "label":
            return torch.tensor([*self.table, 0], device=cond["labels"].device)[cond["labels"]]
        ratio = torch.as_tensor(sigma, dtype=torch.float64) / torch.as_tensor(
            alpha, dtype=torch.float64
        )
        return sum(
            ((ratio <= b).long() for b in self.table), torch.zeros_like(ratio, dtype=torch.int64)
        ).expand(n)

    def forward(self, x_t, alpha, sigma, cond, features=False):
        which = self.route(len(x_t), alpha, sigma, cond)
        out, used = None, which.unique().tolist()
        if len(used) == 1 and not (self.sharding and self.by == "label"):
            return self.experts[used[0]](x_t, alpha, sigma, cond, features)
        for i in range(len(self.experts)) if self.sharding else used:
            rows = (which == i).to(x_t.device)
            if (
                i not in used
            ):  # --shard: all processes ask every expert, for nothing if none of their samples is its own
                self.experts[i](
                    x_t[:1],
                    *(torch.as_tensor(a).flatten()[0] for a in (alpha, sigma)),
                    {k: v[:1] for k, v in cond.items()},
                )
                continue
            part = lambda a: a[rows.to(a.device)] if torch.is_tensor(a) and a.ndim else a
            y = self.experts[i](
                part(x_t), part(alpha), part(sigma), {k: part(v) for k, v in cond.items()}, features
            )
            y = y if features else [y]
            out = [a.new_zeros(len(x_t), *a.shape[1:]) for a in y] if out is None else out
            out = [a.index_put((rows,), b) for a, b in zip(out, y)]
        return out if features else out[0]

    x0, guided, cond_and_uncond = forward, Model.guided, Model.cond_and_uncond

    def copy(self, adapters=None):
        return Routed([e.copy(adapters) for e in self.experts], self.by, self.table)

    def unsharded(self):
        return Routed([e.unsharded() for e in self.experts], self.by, self.table)

    def checkpoint_activations(self):
        for expert in self.experts:
            expert.checkpoint_activations()

    def extend(self, *names):
        for expert in self.experts:
            expert.extend(*names)
        return self

    def config(self):
        return dict(
            adapter="routed",
            by=self.by,
            table=self.table,
            experts=[e.config() for e in self.experts],
        )

    def save(self, folder, info, name="distill.json"):
        self.save_net(Path(folder))
        write_json(Path(folder) / name, dict(info, model=self.config()))

    def save_net(self, folder):
        for i, expert in enumerate(self.experts):
            (folder / f"expert-{i}").mkdir(parents=True, exist_ok=True)
            expert.save_net(folder / f"expert-{i}")

    def at_level(self, ratio):
        """The expert for sigma / alpha = ratio; of experts by label none is, so all."""
        return self.experts[self.route(1, 1.0, ratio, {})] if self.by == "level" else self

"""Random numbers that depend on (seed, iteration, sample) and not on the number of processes."""

import numpy as np
import torch


def derive_seed(*key):
    """A 64-bit seed from integers, well mixed: neighbouring keys give unrelated streams."""
    return int(
        np.random.SeedSequence([int(k) % 2**63 for k in key]).generate_state(1, np.uint64)[0]
    )


class BatchRandom:
    """Random numbers of one iteration, a function of (seed, iteration, place in the global batch) and not of the number of processes.

    Every process draws the whole global batch and keeps its own rows; that is cheap beside a network pass and needs no communication. Rows differ
    between processes; `shared_randint` is the same on all of them (what all ranks must agree on, such as a step index). Nothing is left to save for a resume.
    """

    def __init__(self, seed, it, batch, rank=0, world=1, device="cpu"):
        self.total, self.rows, self.device = (
            batch,
            slice(rank * (batch // world), (rank + 1) * (batch // world)),
            device,
        )
        self.gen = torch.Generator(device).manual_seed(derive_seed(seed, it, 1))
        self.cpu = torch.Generator().manual_seed(derive_seed(seed, it, 2))

    def randn(self, *shape):  # [B_local, *shape] float32
        return torch.randn(self.total, *shape, generator=self.gen, device=self.device)[self.rows]

    def randn_like(self, x):
        return self.randn(*x.shape[1:])

    def rand(self):  # [B_local] float64 in [0, 1)
        return torch.rand(self.total, generator=self.gen, device=self.device, dtype=torch.float64)[
            self.rows
        ]

    def randint(self, low, high):  # [B_local] int64 in low..high-1
        return torch.randint(low, high, (self.total,), generator=self.gen, device=self.device)[
            self.rows
        ]

    def shared_randint(self, low, high):  # python int in low..high-1, equal on all processes
        return int(torch.randint(low, high, (), generator=self.cpu))


class PerImageNoise:
    """Noise of images i = first, first+step, ... where image i depends on (seed, i) only: the same picture for any batch or world size (EDM's rule).
    Call it once for z and once for every later draw: noise(shape) -> [n, *shape] float32 on `device`."""

    def __init__(self, seed, indices, device="cpu"):
        self.gens, self.device = (
            [torch.Generator().manual_seed(derive_seed(seed, i, 3)) for i in indices],
            device,
        )

    def __call__(self, *shape):
        return torch.stack([torch.randn(*shape, generator=g) for g in self.gens]).to(self.device)

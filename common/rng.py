"""Random numbers that depend on (seed, iteration, sample), and not on the number of processes.

Nothing of this needs to be saved for a resume.
"""

import numpy as np
import torch


def derive_seed(*key):
    """A 64-bit seed from integers. Neighbouring keys give unrelated random streams."""
    sequence = np.random.SeedSequence([int(k) % 2**63 for k in key])
    return int(sequence.generate_state(1, np.uint64)[0])


class BatchRandom:
    """Random numbers of one iteration, for this process's rows of the global batch.

    Every process draws the whole global batch and keeps its own rows. That costs little compared
    with a network pass, needs no communication, and makes N processes compute the step of one.

    Numbers that decide something, one for each sample (labels, times, who is dropped), are drawn in
    the host's memory: then nothing that follows from them makes the host wait for the device. Noise
    is drawn on the device. On a CPU both come from one generator.
    """

    def __init__(self, seed, it, batch, rank=0, world=1, device="cpu"):
        self.batch = batch
        self.rows = slice(rank * (batch // world), (rank + 1) * (batch // world))
        self.device = device
        self.generator = torch.Generator(device).manual_seed(derive_seed(seed, it, 1))
        self.host = self.generator
        if torch.device(device).type != "cpu":
            self.host = torch.Generator().manual_seed(derive_seed(seed, it, 1))
        self.shared = torch.Generator().manual_seed(derive_seed(seed, it, 2))

    def randn(self, *shape):
        """Normal numbers, float32 [B, *shape] on the device; [B] on the host without a shape."""
        generator, device = self.generator, self.device
        if not shape:
            generator, device = self.host, "cpu"
        return torch.randn(self.batch, *shape, generator=generator, device=device)[self.rows]

    def randn_like(self, x):
        """Normal numbers in the shape of x [B, ...], float32."""
        return self.randn(*x.shape[1:])

    def rand(self):
        """Uniform numbers in [0, 1), float64 [B] on the host."""
        return torch.rand(self.batch, generator=self.host, dtype=torch.float64)[self.rows]

    def randint(self, low, high):
        """Integers from low to high - 1, int64 [B] on the host."""
        return torch.randint(low, high, (self.batch,), generator=self.host)[self.rows]

    def shared_randint(self, low, high):
        """One python int from low to high - 1, the same on all processes (a step index)."""
        return int(torch.randint(low, high, (), generator=self.shared))


class PerImageNoise:
    """Noise of numbered images: image i depends on (seed, i) only, for any batch or world size.

    Call it once for z and once for every later draw: noise(*shape) -> float32 [n, *shape].
    """

    def __init__(self, seed, indices, device="cpu"):
        seeds = [derive_seed(seed, i, 3) for i in indices]
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.device = device

    def __call__(self, *shape):
        rows = [torch.randn(*shape, generator=g) for g in self.generators]
        return torch.stack(rows).to(self.device)

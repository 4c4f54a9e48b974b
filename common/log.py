"""log.jsonl: one JSON object a line, with the means of what the loop hands over."""

import json
import math

import torch
import torch.distributed as dist


class Log:
    """path: of log.jsonl. world: number of processes, over which values are averaged."""

    def __init__(self, path, world):
        self.path = path
        self.world = world
        self.microsteps = []  # values of this iteration, by microstep
        self.last = None  # (images, seconds) of the last line

    def add(self, values):
        """Values of one microstep: floats, 0-d tensors, or None where it has none."""
        self.microsteps.append({k: to_cpu(v) for k, v in values.items() if v is not None})

    def means(self):
        """Means over the microsteps and processes, {name: float}. Starts the next iteration."""
        means = {}
        for name in self.microsteps[-1]:
            values = [v[name] for v in self.microsteps if name in v]
            means[name] = torch.stack(values).mean()
        self.microsteps = []
        flat = torch.stack(list(means.values()))
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        return dict(zip(means, flat.tolist()))

    def write(self, it, images, skipped, means, seconds, peak_mb):
        """One line. Wall-clock numbers stand under "time", apart from what is reproducible.

        Returns the images per second since the last line, None for the first one.
        """
        rate = None
        if self.last is not None:
            past_images, past_seconds = self.last
            rate = round((images - past_images) / max(seconds - past_seconds, 1e-9), 1)
        self.last = (images, seconds)
        line = dict(it=it, images=images, skipped=skipped)
        for name, v in means.items():
            line[name] = float(f"{v:.6g}") if math.isfinite(v) else None  # JSON has no nan
        line["time"] = dict(seconds=round(seconds, 2), images_per_s=rate, peak_mb=peak_mb)
        with open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
        return rate


def to_cpu(value):
    """A float or 0-d tensor as a float32 tensor on the CPU: here the host waits for the device."""
    if torch.is_tensor(value):
        return value.detach().float().reshape(()).cpu()
    return torch.tensor(float(value))

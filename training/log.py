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
        self.newest = {}  # since the last line: {name: (iteration, its values by microstep)}
        self.last = None  # (images, seconds) of the last line

    def add(self, it, values):
        """Values of one microstep: floats, 0-d tensors, or None where it has none. A tensor [B] has
        a value for each sample, nan for those that have none.

        Does not wait for the device. What the next line has not yet shown is kept, until a later
        iteration has a value of the same name.
        """
        for name, value in values.items():
            if value is None:
                continue
            if self.newest.get(name, (None, []))[0] != it:
                self.newest[name] = (it, [])
            self.newest[name][1].append(value.detach() if torch.is_tensor(value) else value)

    def means(self):
        """Means over the microsteps and processes of the newest values, {name: float}. Of values by
        sample: the mean over all samples that have one; nan if none has."""
        if not self.newest:
            return {}
        sums = torch.stack([sum_and_count(values) for _, values in self.newest.values()])
        if self.world > 1:
            dist.all_reduce(sums)
        return dict(zip(self.newest, (sums[:, 0] / sums[:, 1]).tolist()))

    def take(self):
        """The same, and from now on only newer values count. On all processes."""
        means = self.means()
        self.newest = {}
        return means

    def restore(self, it, means):
        """The newest values as a checkpoint has kept them: what `means` returned in `it`."""
        self.newest = {name: (it, [value]) for name, value in means.items()}

    def write(self, it, images, skipped, rates, means, seconds, peak_mb, alarms=None):
        """One line.

        rates: learning rates {name: float}. Wall-clock numbers stand under "time", apart from what
        is reproducible. alarms: function of the line -> names of the alarms that are on. Returns
        the images per second since the last line, None for the first one.
        """
        rate = None
        if self.last is not None:
            past_images, past_seconds = self.last
            rate = round((images - past_images) / max(seconds - past_seconds, 1e-9), 1)
        self.last = (images, seconds)
        line = dict(it=it, images=images, skipped=skipped)
        for name, v in (rates | means).items():
            line[name] = float(f"{v:.6g}") if math.isfinite(v) else None  # JSON has no nan
        if alarms is not None:
            line["alarms"] = alarms(line)
        line["time"] = dict(seconds=round(seconds, 2), images_per_s=rate, peak_mb=peak_mb)
        with open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
        return rate


def sum_and_count(values):
    """Sum of the microsteps' values and their number, float32 [2] on the CPU: here the host waits
    for the device."""
    values = [torch.as_tensor(value, dtype=torch.float32).cpu() for value in values]
    if values[0].ndim == 0:
        return torch.stack([torch.stack(values).sum(), torch.tensor(float(len(values)))])
    by_sample = torch.cat(values)
    return torch.stack([by_sample.nansum(), (~by_sample.isnan()).float().sum()])

"""How well a controlled generator follows its condition."""

import torch

from common.rng import PerImageNoise

GROUP = 8  # noises under one condition


@torch.no_grad()
def control_error(model, n=1000, seed=0, batch=250):
    """Metrics of a `Controlled` on about n samples, from noise independent of the condition.

    -> dict: error, mean distance from the given condition to the output's condition; chance, the
    same for samples without control; ratio, their quotient; diversity, RMS distance of two outputs
    under one condition; spread, the same for samples without control.
    """
    if model.prompts is not None:  # large pictures
        n, batch = min(n, 256), GROUP
    n = max(GROUP, n // GROUP * GROUP)
    batch = max(GROUP, batch // GROUP * GROUP)
    values = dict(error=[], chance=[], diversity=[], spread=[])
    for index in torch.arange(n).split(batch):
        # each group of samples has the label, the condition and the r of its first sample
        first = torch.arange(len(index)) // GROUP * GROUP
        cond = model.encode(index[first] // GROUP % max(model.classes, 1))
        first = first.to(model.device)
        noise = PerImageNoise(seed, index.tolist(), model.device)
        z, other, r = noise(*model.shape), noise(*model.shape), noise(4)
        c = model.condition(other, r, cond)[first]
        r = torch.special.ndtr(r)[first]

        x = model(z, c, cond)
        values["error"].append(model.control.error(model.control(x, r), c).double())
        values["diversity"].append(pairwise_distance(x))
        x = model.f(z, cond)
        values["chance"].append(model.control.error(model.control(x, r), c).double())
        values["spread"].append(pairwise_distance(x))
    means = {name: torch.cat(v).mean().item() for name, v in values.items()}
    return dict(
        control=model.control.name,
        **means,
        ratio=means["error"] / max(means["chance"], 1e-12),
        n=n,
        conditions=n // GROUP,
        seed=seed,
    )


def pairwise_distance(x):
    """Mean RMS distance of two different samples of each group. x: [n, ...] -> [n / GROUP]."""
    dim = x[0].numel()
    group = x.double().flatten(1).view(-1, GROUP, dim)
    pairs = GROUP * (GROUP - 1)
    return torch.cdist(group, group).sum((1, 2)) / pairs / dim**0.5


def control_summary(r):
    """One line for the terminal. r: what `control_error` returns."""
    if r["control"] == "class":
        what = f"accuracy {1 - r['error']:.4g}, by chance {1 - r['chance']:.4g}"
    else:
        what = f"error {r['error']:.4g}, without control {r['chance']:.4g}"
    return (
        f"control {r['control']}: {what} (ratio {r['ratio']:.3f}); distance of two outputs "
        f"{r['diversity']:.4g} under one condition, {r['spread']:.4g} without"
    )


@torch.no_grad()
def control_rows(model, seed=0, n=20):
    """Rows of a picture for `save_grid`: conditions and their source images, outputs from other
    noise and the outputs' conditions, and the generator's own images of that noise.
    """
    if model.prompts is not None:  # large pictures
        n = 4
    noise = PerImageNoise(seed, range(n), model.device)
    cond = model.encode(torch.arange(n) % max(model.classes, 1))
    z, other, r = noise(*model.shape), noise(*model.shape), torch.special.ndtr(noise(4))
    source = model.f(other, cond)
    c = model.control(source, r)
    x = model(z, c, cond)
    found = model.control(x, r)

    name = model.control.name
    images = [model.decode(samples) for samples in (source, x, model.f(z, cond))]
    if model.control.classes:
        captions = [f"{name}: {c.tolist()}", f"output: {found.tolist()}", "without control"]
        return list(zip(captions, images))
    if model.control.embedding:
        captions = ["condition: the look of", "output, other noise", "without control"]
        return list(zip(captions, images))
    return [
        (f"condition, {name}", model.control.picture(c)),
        ("its source", images[0]),
        ("output, other noise", images[1]),
        (f"{name} of the output", model.control.picture(found)),
        ("without control, the same noise", images[2]),
    ]

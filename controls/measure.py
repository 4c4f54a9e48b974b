"""Does a controlled generator obey its condition?"""

import torch

from common.rng import PerImageNoise

GROUP = 8  # noises under one condition


@torch.no_grad()
def control_error(model, n=1000, seed=0, batch=250):
    """Conditions of samples of the generator, obeyed from other noise -> dict. error: mean distance of the condition and that of the output; chance: the
    same without control; diversity: mean distance of two outputs under one condition, spread: of two samples without control, both RMS over an image."""
    out = {k: [] for k in ("error", "chance", "diversity", "spread")}
    if model.prompts is not None:  # large pictures
        n, batch = min(n, 256), GROUP
    n = max(GROUP, n // GROUP * GROUP)
    for part in torch.arange(n).split(max(GROUP, batch // GROUP * GROUP)):
        noise = PerImageNoise(seed, part.tolist(), model.device)
        first = (
            torch.arange(len(part)) // GROUP * GROUP
        )  # every group has the labels and the condition of its first
        cond = model.encode(part[first] // GROUP % max(model.classes, 1))
        z, other, r = noise(*model.shape), noise(*model.shape), noise(4)
        c = model.condition(other, r, cond)[first.to(model.device)]
        r = torch.special.ndtr(r)[first.to(model.device)]
        for x, error, distance in (
            (model(z, c, cond), "error", "diversity"),
            (model.f(z, cond), "chance", "spread"),
        ):
            out[error].append(model.control.error(model.control(x, r), c).double())
            group = x.double().flatten(1).view(-1, GROUP, x[0].numel())
            out[distance].append(
                torch.cdist(group, group).sum((1, 2)) / (GROUP * (GROUP - 1)) / x[0].numel() ** 0.5
            )
    means = {k: float(torch.cat(v).mean()) for k, v in out.items()}
    return dict(
        control=model.control.name,
        **means,
        ratio=means["error"] / max(means["chance"], 1e-12),
        n=n,
        conditions=n // GROUP,
        seed=seed,
    )


def control_summary(r):
    """One line for people."""
    what = (
        f"accuracy {1 - r['error']:.4g}, by chance {1 - r['chance']:.4g}"
        if r["control"] == "class"
        else f"error {r['error']:.4g}, without control {r['chance']:.4g}"
    )
    return f"control {r['control']}: {what} (ratio {r['ratio']:.3f}); distance of two outputs {r['diversity']:.4g} under one condition, {r['spread']:.4g} without"


@torch.no_grad()
def control_rows(model, seed=0, n=20):
    """Rows of a picture: the condition, the sample that it is of, what another noise makes of it, and the condition of that."""
    n = 4 if model.prompts is not None else n
    noise = PerImageNoise(seed, range(n), model.device)
    cond = model.encode(torch.arange(n) % max(model.classes, 1))
    z, other, r = noise(*model.shape), noise(*model.shape), torch.special.ndtr(noise(4))
    source = model.f(other, cond)
    c = model.control(source, r)
    x = model(z, c, cond)
    name = model.control.name
    if model.control.classes:
        return [
            (f"{name}: {c.tolist()}", model.decode(source)),
            (f"obeyed: {model.control(x, r).tolist()}", model.decode(x)),
            ("the same noise, free", model.decode(model.f(z, cond))),
        ]
    if model.control.embedding:
        return [
            ("condition: the look of", model.decode(source)),
            ("output, other noise", model.decode(x)),
            ("the same noise, free", model.decode(model.f(z, cond))),
        ]
    show = lambda c: model.control.picture(c)
    return [
        (f"condition, {name}", show(c)),
        ("its source", model.decode(source)),
        ("output, other noise", model.decode(x)),
        (f"{name} of the output", show(model.control(x, r))),
        ("the same noise, free", model.decode(model.f(z, cond))),
    ]

"""Conversions between predictions that only tests need."""

from common.schedules import expand


def from_x0(kind, x0, x_t, alpha, sigma, sigma_data=0.5):
    """Inverse of `to_x0`: the network output whose clean estimate is x0, in float64.

    x0, x_t: [B, ...]; alpha, sigma: 0-d or [B]. inf or nan at sigma = 0, unless kind is x0.
    """
    x0, x_t = x0.double(), x_t.double()
    a, s = expand(alpha, x_t), expand(sigma, x_t)
    if kind == "x0":
        return x0
    if kind == "eps":
        return (x_t - a * x0) / s
    if kind in ("v", "trigflow"):
        return (a * x_t - x0) / s
    if kind == "flow":
        return (x_t - x0) / s
    if kind == "edm":
        d2 = s**2 + sigma_data**2
        return (x0 - sigma_data**2 / d2 * x_t) * d2.sqrt() / (s * sigma_data)
    raise ValueError(f"prediction: expected x0, eps, v, flow, edm or trigflow, found {kind!r}")


def score_from_x0(x0, x_t, alpha, sigma):
    """grad log p_t(x_t) = -(x_t - alpha x0) / sigma^2 (Tweedie's formula), in float64."""
    return -(x_t.double() - expand(alpha, x_t) * x0.double()) / expand(sigma, x_t) ** 2


def x0_from_score(score, x_t, alpha, sigma):
    """Inverse of `score_from_x0`: x0 = (x_t + sigma^2 score) / alpha, in float64."""
    return (x_t.double() + expand(sigma, x_t) ** 2 * score.double()) / expand(alpha, x_t)

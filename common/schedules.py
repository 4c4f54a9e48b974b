"""Noise schedules, conversions between predictions, and the equal-SNR view that lets any method ask any network.

Every schedule writes a noisy sample as
    x_t = alpha(t) x0 + sigma(t) eps,    eps ~ N(0, I)                                            (1)
and differs only in alpha, sigma and the unit of t:
    VP        t in [0, T-1], index of a discrete table, fractional times interpolate log-SNR      alpha^2 + sigma^2 = 1
    EDM       t = sigma in [sigma_min, sigma_max]                                                 alpha = 1
    Flow      t in [0, 1]                                                                         alpha = 1 - t, sigma = t
    TrigFlow  t in [0, pi/2]                                                                      alpha = cos t, sigma = sigma_data sin t
snr = (alpha / sigma)^2 (not in dB, no log) is the coordinate they share: at equal snr two noisy samples differ by a scalar factor only.

All functions take and return tensors; times, alpha and sigma are computed in float64 whatever comes in, because snr spans ten decades.
Times that leave `t_from_snr` are rounded to float32 (kept in a float64 tensor): networks embed float32 times, and the rounding undoes the last-bit
error of alpha and sigma, so that asking a network in its own schedule is the identity, bit for bit.
"""

import math

import torch


def f64(x):
    return torch.as_tensor(x, dtype=torch.float64) if not torch.is_tensor(x) else x.double()


def expand(a, x):
    """Coefficient a (0-d or [B]) shaped to multiply x [B, ...], as float64 on the device of x."""
    a = f64(a).to(x.device)
    return a if a.ndim == 0 else a.view(-1, *[1] * (x.ndim - 1))


class VP:
    """Discrete variance-preserving schedule (DDPM, SD 1.5, SDXL): scaled-linear betas, abar = cumprod(1 - beta), alpha = sqrt(abar)."""

    unit_norm = True

    def __init__(self, T=1000, beta_start=0.00085, beta_end=0.012, kind="scaled_linear"):
        self.config = dict(name="vp", T=T, beta_start=beta_start, beta_end=beta_end, kind=kind)
        if kind == "scaled_linear":
            beta = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
        elif kind == "linear":
            beta = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
        else:
            raise ValueError(f"VP kind: expected scaled_linear or linear, found {kind}")
        self.T, abar = T, (1 - beta).cumprod(0)
        self.log_snr_table = abar.log() - (-abar).log1p()  # [T], falling
        self.t_min, self.t_max = 0.0, T - 1.0

    def log_snr(self, t):
        t = f64(t).clamp(0, self.T - 1)
        table = self.log_snr_table.to(t.device)
        lo = t.floor().long().clamp(max=self.T - 2)
        return torch.lerp(table[lo], table[lo + 1], t - lo)

    def alpha(self, t):
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t):
        return (-self.log_snr(t)).sigmoid().sqrt()

    def dlog_snr(
        self, t
    ):  # piecewise constant: right-hand slope at the nodes, left-hand slope at T-1
        t = f64(t).clamp(0, self.T - 1)
        table = self.log_snr_table.to(t.device)
        lo = t.floor().long().clamp(max=self.T - 2)
        return table[lo + 1] - table[lo]

    def dalpha(self, t):  # alpha^2 = sigmoid(l): d alpha = alpha sigma^2 dl / 2
        return 0.5 * self.alpha(t) * self.sigma(t) ** 2 * self.dlog_snr(t)

    def dsigma(self, t):
        return -0.5 * self.sigma(t) * self.alpha(t) ** 2 * self.dlog_snr(t)

    def t_from_snr(self, snr):
        log_snr = f64(snr).log()  # 0 -> -inf and inf -> inf land on the ends
        table = self.log_snr_table.to(log_snr.device)
        hi = torch.searchsorted(-table, -log_snr.contiguous()).clamp(
            1, self.T - 1
        )  # table[hi-1] > log_snr >= table[hi]
        frac = ((table[hi - 1] - log_snr) / (table[hi - 1] - table[hi])).clamp(0, 1)
        return (hi - 1 + frac).float().double()

    def grid(self, n=1000):
        """The n noise levels t[0] < ... < t[n-1] over which methods with discrete times draw; n = 1 is the noisy end, for every schedule."""
        return torch.linspace(self.T - 1, 0, n, dtype=torch.float64).flip(0)


class EDM:
    """Variance-exploding schedule of Karras et al. 2022: alpha = 1, sigma(t) = t."""

    unit_norm = False

    def __init__(self, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0):
        self.config = dict(
            name="edm", sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, rho=rho
        )
        self.sigma_data, self.rho, self.t_min, self.t_max = sigma_data, rho, sigma_min, sigma_max

    def alpha(self, t):
        return torch.ones_like(f64(t))

    def sigma(self, t):
        return f64(t)

    def dalpha(self, t):
        return torch.zeros_like(f64(t))

    def dsigma(self, t):
        return torch.ones_like(f64(t))

    def t_from_snr(self, snr):
        return f64(snr).rsqrt().clamp(self.t_min, self.t_max).float().double()

    def grid(self, n=1000):  # EDM eq. (5), ascending
        i = torch.linspace(0, 1, n, dtype=torch.float64)
        lo, hi = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        t = (lo + i * (hi - lo)) ** self.rho
        t[0], t[-1] = self.t_min, self.t_max  # exactly, not up to the rounding of the powers
        return t


class Flow:
    """Linear flow (rectified flow): alpha = 1 - t, sigma = t. `shift` s moves a uniform time u to s u / (1 + (s - 1) u) (SD3 eq. 23);
    it changes which times are visited (grid, shifted), not alpha and sigma as functions of t."""

    unit_norm = False

    def __init__(self, shift=1.0):
        self.config = dict(name="flow", shift=shift)
        self.shift, self.t_min, self.t_max = shift, 0.0, 1.0

    def alpha(self, t):
        return 1 - f64(t)

    def sigma(self, t):
        return f64(t)

    def dalpha(self, t):
        return -torch.ones_like(f64(t))

    def dsigma(self, t):
        return torch.ones_like(f64(t))

    def t_from_snr(self, snr):
        return (
            (1 / (1 + f64(snr).sqrt())).float().double()
        )  # snr = ((1 - t) / t)^2; 0 -> 1, inf -> 0

    def shifted(self, u):
        u = f64(u)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def grid(
        self, n=1000
    ):  # (i + 1) / n, shifted: the last entry is pure noise, the first is one step away from data
        return self.shifted(torch.arange(1, n + 1, dtype=torch.float64) / n)


class TrigFlow:
    """TrigFlow (sCM, Lu & Song 2024): x_t = cos(t) x0 + sin(t) z with z ~ N(0, sigma_data^2 I), i.e. sigma(t) = sigma_data sin(t) in (1)."""

    unit_norm = False

    def __init__(self, sigma_data=1.0):
        self.config = dict(name="trigflow", sigma_data=sigma_data)
        self.sigma_data, self.t_min, self.t_max = sigma_data, 0.0, math.pi / 2

    def alpha(self, t):
        return torch.where(
            f64(t) >= self.t_max, 0.0, f64(t).cos()
        )  # cos(pi / 2) is 6e-17 in floating point

    def sigma(self, t):
        return self.sigma_data * f64(t).sin()

    def dalpha(self, t):
        return -f64(t).sin()

    def dsigma(self, t):
        return self.sigma_data * self.alpha(t)

    def t_from_snr(
        self, snr
    ):  # tan t = 1 / (sigma_data sqrt(snr)); float32(pi / 2) exceeds pi / 2, hence the clamp
        s = self.sigma_data * f64(snr).sqrt()
        t = torch.where(s.isinf(), 0.0, torch.atan2(torch.ones_like(s), s.nan_to_num(posinf=1.0)))
        return t.float().double().clamp(max=self.t_max)

    def grid(self, n=1000):
        return torch.arange(1, n + 1, dtype=torch.float64) / n * self.t_max


SCHEDULES = dict(vp=VP, edm=EDM, flow=Flow, trigflow=TrigFlow)


def from_config(config):
    """Schedule from its `.config` dict, as stored in teacher.json and distill.json. ValueError if the name, a field or a value cannot be used."""
    if not isinstance(config, dict):
        raise ValueError(f"schedule: expected an object, found {type(config).__name__}")
    config = dict(config)
    name = config.pop("name", None)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(f"schedule name: expected one of {', '.join(SCHEDULES)}, found {name!r}")
    for k, v in config.items():
        if k != "kind" and (
            isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 < v < math.inf
        ):
            raise ValueError(f"schedule {name}: {k}: expected a positive number, found {v!r}")
    try:
        schedule = SCHEDULES[name](**config)
    except (TypeError, OverflowError, RuntimeError) as e:
        raise ValueError(f"schedule {name}: {e}") from None
    t = schedule.grid(16)
    if not (
        (schedule.alpha(t) / schedule.sigma(t)).diff() < 0
    ).all():  # sigma_min > sigma_max, one step, beta > 1, ...
        raise ValueError(
            f"schedule {name}: expected alpha / sigma to fall with t, found that it does not with {config}"
        )
    return schedule


# ---- noisy samples --------------------------------------------------------------------------------


def add_noise(x, alpha, sigma, eps):
    """x_t = alpha x + sigma eps, equation (1), in the dtype of x.

    x, eps: [B, ...]; alpha, sigma: numbers or tensors, 0-d or [B].
    """
    return (expand(alpha, x) * x + expand(sigma, x) * eps).to(x.dtype)


def initial_noise(schedule, t, z):
    """Pure noise as the first input of a sampler at time t, in the dtype of z.

    z: unit noise [B, ...]; t: 0-d or [B]. On a VP schedule noisy samples have unit norm at every t,
    and so has z: it is returned as it is. Otherwise the noise is sigma(t) z.
    """
    if schedule.unit_norm:
        return z
    return (expand(schedule.sigma(t), z) * z).to(z.dtype)


# ---- conversions: what a network says, given x_t = alpha x0 + sigma eps -----------------------------------------------------------------
# prediction   meaning                                              used by
#   x0         clean sample                                         toy
#   eps        noise                                                DDPM, SD 1.5, SDXL
#   v          alpha eps - sigma x0, for alpha^2 + sigma^2 = 1      SD 2.1-v (Salimans & Ho 2022)
#   flow       dx_t / dt = eps - x0, for alpha + sigma = 1          SD3, FLUX, SANA, mnist
#   edm        F of D = c_skip x + c_out F, for alpha = 1           EDM (Karras et al. 2022, table 1)
#   trigflow   F of dx_t / dt = sigma_data F                        sCM (Lu & Song 2024)


def to_x0(kind, out, x_t, alpha, sigma, sigma_data=0.5):
    """Clean-sample estimate from a network output, in float64. out, x_t: [B, ...]; alpha, sigma: 0-d or [B], on the network's own schedule."""
    out, x_t, a, s = out.double(), x_t.double(), expand(alpha, x_t), expand(sigma, x_t)
    if kind == "x0":
        return out
    if kind == "eps":
        return (x_t - s * out) / a
    if kind == "v":
        return a * x_t - s * out
    if kind == "flow":
        return x_t - s * out
    if kind == "edm":
        d2 = s**2 + sigma_data**2
        return sigma_data**2 / d2 * x_t + s * sigma_data / d2.sqrt() * out  # c_skip x + c_out F
    if kind == "trigflow":
        return a * x_t - s * out  # cos(t) x_t - sin(t) sigma_data F, and sigma = sigma_data sin(t)
    raise ValueError(f"prediction: expected x0, eps, v, flow, edm or trigflow, found {kind!r}")


def from_x0(kind, x0, x_t, alpha, sigma, sigma_data=0.5):
    """Inverse of to_x0: the network output whose clean-sample estimate is x0. Undefined (inf or nan) at sigma = 0 unless kind is x0."""
    x0, x_t, a, s = x0.double(), x_t.double(), expand(alpha, x_t), expand(sigma, x_t)
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


def eps_from_x0(x0, x_t, alpha, sigma):
    """Noise estimate of a clean-sample estimate, any schedule. float64."""
    return (x_t.double() - expand(alpha, x_t) * x0.double()) / expand(sigma, x_t)


def score_from_x0(x0, x_t, alpha, sigma):
    """grad log p_t(x_t) = -(x_t - alpha x0) / sigma^2 (Tweedie). float64."""
    return -(x_t.double() - expand(alpha, x_t) * x0.double()) / expand(sigma, x_t) ** 2


def x0_from_score(score, x_t, alpha, sigma):
    """Inverse of score_from_x0 (Tweedie): x0 = (x_t + sigma^2 score) / alpha. float64."""
    return (x_t.double() + expand(sigma, x_t) ** 2 * score.double()) / expand(alpha, x_t)


def native_weight(kind, alpha, sigma, sigma_data=0.5):
    """lambda with lambda |x0_hat - x0|^2 = |network output - its target|^2: turns an x0 error into the loss the network was trained with.

    alpha, sigma: on the network's own schedule. EDM: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2. float64, inf at sigma = 0.
    """
    a, s = f64(alpha), f64(sigma)
    if kind == "x0":
        return torch.ones_like(s)
    if kind == "eps":
        return (a / s) ** 2
    if (
        kind in ("v", "flow", "trigflow")
    ):  # TrigFlow: sigma = sigma_data sin(t) and the loss is on sigma_data F; F itself has 1 / sigma^2 here
        return s**-2
    if kind == "edm":
        return (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    raise ValueError(f"prediction: expected x0, eps, v, flow, edm or trigflow, found {kind!r}")


# ---- the equal-SNR view -----------------------------------------------------------------------------------------------------------------


def equal_snr(schedule, alpha, sigma):
    """Where a question asked at (alpha, sigma) falls on a network's own `schedule`: -> (t, alpha_n, sigma_n, scale), float64.

    x_t = alpha x0 + sigma eps and scale * x_t = alpha_n x0 + sigma_n eps hold together, so the network is called with scale * x_t at time t.
    The larger of the two terms sets the scale, since it is the better conditioned one. Outside the schedule's range no scale is exact: there t is
    the nearer end and the same rule holds (alpha = 0 asked of EDM becomes sigma_max * z, of SD 0.998 z; sigma = 0 keeps alpha_n x0).
    alpha, sigma: numbers or tensors of one shape, not both 0. If the schedule is the one alpha and sigma come from, scale is exactly 1.
    """
    alpha, sigma = torch.broadcast_tensors(f64(alpha), f64(sigma))
    t = schedule.t_from_snr((alpha / sigma) ** 2)
    alpha_n, sigma_n = schedule.alpha(t), schedule.sigma(t)
    scale = torch.where(sigma > alpha, sigma_n / sigma, alpha_n / alpha)
    return (
        t,
        alpha_n,
        sigma_n,
        torch.where((scale - 1).abs() < 5e-7, torch.ones_like(scale), scale),
    )  # what float32 times leave

"""Noise schedules, conversions between predictions, and the equal-SNR view.

Every schedule writes a noisy sample as

    x_t = alpha(t) x0 + sigma(t) eps,    eps ~ N(0, I)                                           (1)

and differs from the others only in alpha, sigma and the unit of t:

    VP        t in [0, T-1], index into a table      alpha^2 + sigma^2 = 1
    EDM       t = sigma in [sigma_min, sigma_max]    alpha = 1
    Flow      t in [0, 1]                            alpha = 1 - t, sigma = t
    TrigFlow  t in [0, pi/2]                         alpha = cos t, sigma = sigma_data sin t

All share the coordinate snr = (alpha / sigma)^2: two noisy samples of equal snr differ only by a
scalar factor. That is why a network trained under one schedule can be evaluated at the
(alpha, sigma) of any other (`equal_snr`), and why any method works with any teacher.

Times, alpha and sigma are computed in float64 whatever comes in, because snr spans ten decades.
Times that `t_from_snr` returns are rounded to float32 (in a float64 tensor): networks embed float32
times, and the rounding removes the last-bit error of alpha and sigma. Hence a network evaluated in
its own schedule gets its input and time unchanged, bit for bit.
"""

import math

import torch


def f64(x):
    return x.double() if torch.is_tensor(x) else torch.as_tensor(x, dtype=torch.float64)


def expand(a, x):
    """Coefficient a (0-d or [B]) shaped to multiply x [B, ...], in float64 on the device of x."""
    a = f64(a).to(x.device, non_blocking=True)
    return a if a.ndim == 0 else a.view(-1, *[1] * (x.ndim - 1))


# ---- schedules -----------------------------------------------------------------------------------
# alpha(t), sigma(t)     coefficients of (1); dalpha(t), dsigma(t): their derivatives in t
# t_from_snr(snr)        inverse of snr(t), clamped to [t_min, t_max]
# grid(n)                n rising noise levels; the last is t_max, also for n = 1
# unit_norm              True if samplers start from unit noise (`initial_noise`)
# config                 what `from_config` needs to build the schedule again


class VP:
    """Discrete variance-preserving schedule (DDPM, SD 1.5, SDXL).

    alpha = sqrt(abar), abar = cumprod(1 - beta) over T steps. Fractional times interpolate the log
    of snr linearly between two entries of the table.

    last_alpha2: of schedules with a zero terminal SNR, abar at the last step; None: without the
    rescaling (`zero_terminal_snr`). It is at least PURE_NOISE, so that logs and derivatives stay
    finite; alpha is then 6e-8, which float32 cannot see beside sigma = 1.
    """

    unit_norm = True
    PURE_NOISE = 2.0**-48

    def __init__(
        self, T=1000, beta_start=0.00085, beta_end=0.012, kind="scaled_linear", last_alpha2=None
    ):
        self.config = dict(name="vp", T=T, beta_start=beta_start, beta_end=beta_end, kind=kind)
        if kind == "scaled_linear":
            beta = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
        elif kind == "linear":
            beta = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
        else:
            raise ValueError(f"VP kind: expected scaled_linear or linear, found {kind}")
        self.T = T
        self.t_min = 0.0
        self.t_max = T - 1.0
        abar = (1 - beta).cumprod(0)
        if last_alpha2 is not None:
            self.config["last_alpha2"] = last_alpha2
            abar = zero_terminal_snr(abar, last_alpha2)
        self.log_snr_table = abar.log() - (-abar).log1p()  # [T], falling

    def neighbours(self, t):
        """Table entries below and above t, and the position of t between them in [0, 1]."""
        t = f64(t).clamp(0, self.T - 1)
        table = self.log_snr_table.to(t.device, non_blocking=True)
        i = t.floor().long().clamp(max=self.T - 2)
        return table[i], table[i + 1], t - i

    def log_snr(self, t):
        return torch.lerp(*self.neighbours(t))

    def dlog_snr(self, t):
        # piecewise constant: the right-hand slope at the nodes, the left-hand one at T-1
        low, high, _ = self.neighbours(t)
        return high - low

    def alpha(self, t):
        return self.log_snr(t).sigmoid().sqrt()

    def sigma(self, t):
        return (-self.log_snr(t)).sigmoid().sqrt()

    def dalpha(self, t):
        # alpha^2 = sigmoid(l), hence d alpha = alpha sigma^2 dl / 2
        return 0.5 * self.alpha(t) * self.sigma(t) ** 2 * self.dlog_snr(t)

    def dsigma(self, t):
        return -0.5 * self.sigma(t) * self.alpha(t) ** 2 * self.dlog_snr(t)

    def t_from_snr(self, snr):
        log_snr = f64(snr).log()  # -inf and inf, of snr 0 and inf, end at t_max and t_min
        table = self.log_snr_table.to(log_snr.device, non_blocking=True)
        i = torch.searchsorted(-table, -log_snr.contiguous())
        i = i.clamp(1, self.T - 1)  # table[i-1] > log_snr >= table[i]
        position = ((table[i - 1] - log_snr) / (table[i - 1] - table[i])).clamp(0, 1)
        return (i - 1 + position).float().double()

    def grid(self, n=1000):
        return torch.linspace(self.T - 1, 0, n, dtype=torch.float64).flip(0)


def zero_terminal_snr(abar, last):
    """Noise levels [T] rescaled to end in pure noise (Lin et al. 2024, algorithm 1).

    sqrt(abar) is shifted and scaled so that the first entry stays and the last becomes 0, for which
    `last` is put. ValueError if that is not below the entry before.
    """
    root = abar.sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root.square()
    if not 0 < last < abar[-2]:
        raise ValueError(
            f"VP: last_alpha2: expected a number below the entry before, {float(abar[-2]):.2g}, "
            f"found {last:.2g}"
        )
    abar[-1] = last
    return abar


class EDM:
    """Variance-exploding schedule of Karras et al. 2022: alpha = 1, sigma(t) = t."""

    unit_norm = False

    def __init__(self, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0):
        self.config = dict(
            name="edm", sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, rho=rho
        )
        self.t_min = sigma_min
        self.t_max = sigma_max
        self.sigma_data = sigma_data
        self.rho = rho

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

    def grid(self, n=1000):
        # equation (5) of Karras et al., from small to large
        i = torch.linspace(0, 1, n, dtype=torch.float64)
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        t = (low + i * (high - low)) ** self.rho
        t[0], t[-1] = self.t_min, self.t_max  # exactly, not up to the rounding of the powers
        return t


class Flow:
    """Linear flow (rectified flow): alpha = 1 - t, sigma = t.

    shift s moves a uniform time u to s u / (1 + (s - 1) u) (SD3, equation 23). It changes which
    times are visited (`shifted`, `grid`), not alpha and sigma as functions of t.
    """

    unit_norm = False

    def __init__(self, shift=1.0):
        self.config = dict(name="flow", shift=shift)
        self.shift = shift
        self.t_min = 0.0
        self.t_max = 1.0

    def alpha(self, t):
        return 1 - f64(t)

    def sigma(self, t):
        return f64(t)

    def dalpha(self, t):
        return -torch.ones_like(f64(t))

    def dsigma(self, t):
        return torch.ones_like(f64(t))

    def t_from_snr(self, snr):
        # snr = ((1 - t) / t)^2; 0 -> 1, inf -> 0
        return (1 / (1 + f64(snr).sqrt())).float().double()

    def shifted(self, u):
        u = f64(u)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def grid(self, n=1000):
        # (i + 1) / n, shifted: the first level is one step away from data
        return self.shifted(torch.arange(1, n + 1, dtype=torch.float64) / n)


class TrigFlow:
    """TrigFlow (sCM, Lu and Song 2024): x_t = cos(t) x0 + sin(t) z with z ~ N(0, sigma_data^2 I).

    In (1) this is sigma(t) = sigma_data sin(t).
    """

    unit_norm = False

    def __init__(self, sigma_data=1.0):
        self.config = dict(name="trigflow", sigma_data=sigma_data)
        self.sigma_data = sigma_data
        self.t_min = 0.0
        self.t_max = math.pi / 2

    def alpha(self, t):
        t = f64(t)
        return torch.where(t >= self.t_max, 0.0, t.cos())  # cos(pi / 2) is 6e-17 in floating point

    def sigma(self, t):
        return self.sigma_data * f64(t).sin()

    def dalpha(self, t):
        return -f64(t).sin()

    def dsigma(self, t):
        return self.sigma_data * self.alpha(t)

    def t_from_snr(self, snr):
        # tan t = 1 / (sigma_data sqrt(snr)); float32(pi / 2) exceeds pi / 2, hence the clamp
        s = self.sigma_data * f64(snr).sqrt()
        t = torch.where(s.isinf(), 0.0, torch.atan2(torch.ones_like(s), s.nan_to_num(posinf=1.0)))
        return t.float().double().clamp(max=self.t_max)

    def grid(self, n=1000):
        return torch.arange(1, n + 1, dtype=torch.float64) / n * self.t_max


SCHEDULES = dict(vp=VP, edm=EDM, flow=Flow, trigflow=TrigFlow)


def from_config(config):
    """Schedule from its `.config`, as stored in teacher.json and distill.json.

    ValueError if the name, a field or a value cannot be used.
    """
    if not isinstance(config, dict):
        raise ValueError(f"schedule: expected an object, found {type(config).__name__}")
    fields = dict(config)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(f"schedule name: expected one of {', '.join(SCHEDULES)}, found {name!r}")
    for key, value in fields.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key != "kind" and not (number and 0 < value < math.inf):
            raise ValueError(f"schedule {name}: {key}: expected a positive number, found {value!r}")
    try:
        schedule = SCHEDULES[name](**fields)
    except (TypeError, OverflowError, RuntimeError) as e:
        raise ValueError(f"schedule {name}: {e}") from None
    t = schedule.grid(16)
    ratio = schedule.alpha(t) / schedule.sigma(t)
    if not (ratio.diff() < 0).all():  # sigma_min > sigma_max, a table of one step, beta > 1, ...
        raise ValueError(f"schedule {name}: expected alpha / sigma to fall with t, found {fields}")
    return schedule


def shifted_grid(schedule, n, shift):
    """The levels of schedule.grid(n) with `shift` times their sigma / alpha, as times."""
    grid = schedule.grid(n)
    if shift == 1:
        return grid
    snr = (schedule.alpha(grid) / schedule.sigma(grid) / shift) ** 2
    return schedule.t_from_snr(snr)


# ---- noisy samples -------------------------------------------------------------------------------


def add_noise(x, alpha, sigma, eps):
    """x_t = alpha x + sigma eps, equation (1), in the dtype of x.

    x, eps: [B, ...]; alpha, sigma: numbers or tensors, 0-d or [B].
    """
    return (expand(alpha, x) * x + expand(sigma, x) * eps).to(x.dtype)


def initial_noise(schedule, t, z):
    """Pure noise as the first input of a sampler at time t, in the dtype of z.

    z: unit noise [B, ...]; t: 0-d or [B]. The result is sigma(t) z, but on a VP schedule z itself:
    its samplers start there, although sigma(T-1) is slightly below 1.
    """
    if schedule.unit_norm:
        return z
    return (expand(schedule.sigma(t), z) * z).to(z.dtype)


# ---- conversions ---------------------------------------------------------------------------------
# What a network predicts from x_t:
#   x0         the clean sample                                    toy
#   eps        the noise                                           DDPM, SD 1.5, SDXL
#   v          alpha eps - sigma x0, for alpha^2 + sigma^2 = 1     SD 2.1-v (Salimans and Ho 2022)
#   flow       dx_t / dt = eps - x0, for alpha + sigma = 1         SD3, FLUX, SANA, mnist
#   edm        F of D = c_skip x + c_out F, for alpha = 1          EDM (Karras et al. 2022, table 1)
#   trigflow   F of dx_t / dt = sigma_data F                       sCM (Lu and Song 2024)


def to_x0(kind, out, x_t, alpha, sigma, sigma_data=0.5):
    """Clean-sample estimate from a network's output, in float64.

    out, x_t: [B, ...]; alpha, sigma: 0-d or [B], on the network's own schedule.
    """
    out, x_t = out.double(), x_t.double()
    a, s = expand(alpha, x_t), expand(sigma, x_t)
    if kind == "x0":
        return out
    if kind == "eps":
        return (x_t - s * out) / a
    if kind == "v":
        return a * x_t - s * out
    if kind == "flow":
        return x_t - s * out
    if kind == "edm":  # c_skip x + c_out F
        d2 = s**2 + sigma_data**2
        return sigma_data**2 / d2 * x_t + s * sigma_data / d2.sqrt() * out
    if kind == "trigflow":  # cos(t) x_t - sin(t) sigma_data F, with sigma = sigma_data sin(t)
        return a * x_t - s * out
    raise ValueError(f"prediction: expected x0, eps, v, flow, edm or trigflow, found {kind!r}")


def eps_from_x0(x0, x_t, alpha, sigma):
    """Noise estimate of a clean-sample estimate, for any schedule, in float64."""
    return (x_t.double() - expand(alpha, x_t) * x0.double()) / expand(sigma, x_t)


def native_weight(kind, alpha, sigma, sigma_data=0.5):
    """lambda with lambda |x0_hat - x0|^2 = |network output - its target|^2, the training loss.

    alpha, sigma: on the network's own schedule. float64, inf at sigma = 0.
    """
    a, s = f64(alpha), f64(sigma)
    if kind == "x0":
        return torch.ones_like(s)
    if kind == "eps":
        return (a / s) ** 2
    if kind in ("v", "flow", "trigflow"):
        # for TrigFlow this weighs the error of F; its loss is on sigma_data F
        return s**-2
    if kind == "edm":
        return (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    raise ValueError(f"prediction: expected x0, eps, v, flow, edm or trigflow, found {kind!r}")


# ---- the equal-SNR view --------------------------------------------------------------------------


def equal_snr(schedule, alpha, sigma):
    """The level (alpha, sigma) on a network's own schedule: (t, alpha_n, sigma_n, scale).

    If x_t = alpha x0 + sigma eps then scale x_t = alpha_n x0 + sigma_n eps, so the network is
    evaluated at scale x_t and time t. alpha, sigma: numbers or tensors, not both 0. All results are
    float64 of their common shape. If they come from this very schedule, scale is exactly 1.

    The larger of the two terms sets the scale, because it is the better conditioned one. Outside
    the range of the schedule no scale is exact; t is the nearer end, and the same rule holds: for
    alpha = 0, EDM's network gets sigma_max z and Stable Diffusion's 0.998 z; for sigma = 0 each
    gets alpha_n x0.
    """
    alpha, sigma = torch.broadcast_tensors(f64(alpha), f64(sigma))
    t = schedule.t_from_snr((alpha / sigma) ** 2)
    alpha_n, sigma_n = schedule.alpha(t), schedule.sigma(t)
    scale = torch.where(sigma > alpha, sigma_n / sigma, alpha_n / alpha)
    # times rounded to float32 leave errors up to 5e-7
    scale = torch.where((scale - 1).abs() < 5e-7, torch.ones_like(scale), scale)
    return t, alpha_n, sigma_n, scale

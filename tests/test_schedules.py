"""common/schedules.py: closed forms, derivatives, ends, conversions, the equal-SNR view.

The last test runs the first-order sampler of common/sampling.py on Gaussian data.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.conversions import from_x0, score_from_x0, x0_from_score

from common.sampling import teacher_sample
from common.schedules import (
    EDM,
    VP,
    Flow,
    TrigFlow,
    add_noise,
    eps_from_x0,
    equal_snr,
    from_config,
    initial_noise,
    native_weight,
    to_x0,
)

ALL = {
    "vp": VP(),
    "vp-linear": VP(beta_start=1e-4, beta_end=0.02, kind="linear"),
    "vp-zero": VP(last_alpha2=VP.PURE_NOISE),
    "vp-euler": VP(last_alpha2=2.0**-24),
    "edm": EDM(),
    "flow": Flow(),
    "flow-3": Flow(3.0),
    "trig-0.5": TrigFlow(0.5),
    "trig-1": TrigFlow(1.0),
}
# prediction -> a schedule on which it is defined
KINDS = {
    "x0": Flow(),
    "eps": VP(),
    "v": VP(),
    "flow": Flow(),
    "edm": EDM(),
    "trigflow": TrigFlow(0.5),
}
every = pytest.mark.parametrize("s", ALL.values(), ids=ALL.keys())


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(s, n=2000, seed=0):
    """The two ends of a schedule and n random times that float32 can hold."""
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    t = s.t_min + (s.t_max - s.t_min) * u
    return torch.cat([f64(s.t_min, s.t_max), t.float().double().clamp(s.t_min, s.t_max)])


def largest(x):
    return x.abs().max()


# ---- closed forms --------------------------------------------------------------------------------


def test_vp_table():
    s, i = VP(), torch.tensor([999, 749, 499, 399, 249])
    beta = [(0.00085**0.5 + k / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for k in range(1000)]
    abar = f64(*[math.prod(1 - b for b in beta[: k + 1]) for k in i])
    assert largest(s.alpha(i) ** 2 / abar - 1) < 1e-12
    assert largest(s.alpha(i) ** 2 + s.sigma(i) ** 2 - 1) < 1e-15

    # the numbers of DMD2's schedule, which come from a float32 table
    expected = [0.0046601, 0.0566236, 0.2776694, 0.4260861, 0.6754321]
    assert (s.alpha(i) ** 2).tolist() == pytest.approx(expected, abs=4e-7)
    expected = [14.6146, 4.0817, 1.6129, 1.1606, 0.6932]
    assert (s.sigma(i) / s.alpha(i)).tolist() == pytest.approx(expected, abs=6e-5)
    x0_of_unit_eps = ((1 - s.sigma(i)) / s.alpha(i))[[0, 3]]  # for x_t = eps = 1
    assert x0_of_unit_eps.tolist() == pytest.approx([0.03417, 0.37139], abs=6e-6)


def test_vp_linear_table():
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    assert largest(ALL["vp-linear"].alpha(torch.arange(1000)) - abar.sqrt()) < 1e-14


@pytest.mark.parametrize("last", [VP.PURE_NOISE, 2.0**-24])
def test_vp_zero_terminal_snr(last):
    """sqrt(abar) is a linear function of what it was; it keeps its first value and ends at 0."""
    before, after = VP(), VP(last_alpha2=last)
    i = torch.arange(999)
    slope = (after.alpha(i[1:]) - after.alpha(i[:-1])) / (
        before.alpha(i[1:]) - before.alpha(i[:-1])
    )
    assert largest(slope / slope[0] - 1) < 1e-9
    assert float(after.alpha(0)) == pytest.approx(float(before.alpha(0)), abs=1e-12)
    end = before.alpha(998) + (0 - after.alpha(998)) / slope[0]  # where the line meets 0
    assert float(end) == pytest.approx(float(before.alpha(999)), abs=1e-9)
    assert float(after.alpha(999)) ** 2 == pytest.approx(last, rel=1e-9)
    assert float(after.sigma(999)) == pytest.approx(1, abs=1e-7)
    assert from_config(after.config).config == after.config


def test_vp_last_level_must_be_the_noisiest():
    """DDPM's linear betas end so low that Euler's 2^-24 is above the entry before."""
    VP(beta_start=1e-4, beta_end=0.02, kind="linear", last_alpha2=VP.PURE_NOISE)
    with pytest.raises(ValueError, match="last_alpha2: expected a number below the entry before"):
        VP(beta_start=1e-4, beta_end=0.02, kind="linear", last_alpha2=2.0**-24)


@torch.no_grad()
def test_v_at_pure_noise():
    """There v = -x0, so the estimate needs no division by alpha."""
    s, x, v = VP(last_alpha2=VP.PURE_NOISE), normal(2, 3), normal(2, 3, seed=1)
    x0 = to_x0("v", v, x, s.alpha(999), s.sigma(999))
    assert torch.allclose(x0, -v, atol=1e-6)
    assert float(equal_snr(s, 0.0, 1.0)[0]) == 999


def test_vp_fractional_times_interpolate_log_snr():
    s = VP()
    log_snr = lambda t: 2 * (s.alpha(t).log() - s.sigma(t).log())
    interpolated = 0.75 * log_snr(300.0) + 0.25 * log_snr(301.0)
    assert float(log_snr(300.25) - interpolated) == pytest.approx(0, abs=1e-13)
    # hence the level halfway between two entries of the table has exactly the time halfway
    middle = s.t_from_snr(((log_snr(300.0) + log_snr(301.0)) / 2).exp())
    assert float(middle) == pytest.approx(300.5, abs=2e-5)


@pytest.mark.parametrize(
    "name, alpha, sigma, t",
    [
        ("edm", lambda t: t * 0 + 1, lambda t: t, [0.002, 0.5, 80.0]),
        ("flow", lambda t: 1 - t, lambda t: t, [0.0, 0.3, 1.0]),
        # the shift moves the grid, not alpha and sigma
        ("flow-3", lambda t: 1 - t, lambda t: t, [0.0, 0.3, 1.0]),
        ("trig-0.5", torch.cos, lambda t: 0.5 * torch.sin(t), [0.0, 0.3, 1.5]),
        ("trig-1", torch.cos, torch.sin, [0.0, 0.3, 1.5]),
    ],
)
def test_closed_forms(name, alpha, sigma, t):
    t = f64(*t)
    assert torch.equal(ALL[name].alpha(t), alpha(t))
    assert torch.equal(ALL[name].sigma(t), sigma(t))


@every
def test_derivatives(s):
    """Central differences. VP is piecewise smooth: its differences stay between two entries."""
    t = torch.linspace(s.t_min, s.t_max, 400, dtype=torch.float64)[1:-1]
    if isinstance(s, VP):
        t = t.floor() + 0.1 + 0.8 * (t - t.floor())
    h = 1e-5
    for f, df in ((s.alpha, s.dalpha), (s.sigma, s.dsigma)):
        assert largest((f(t + h) - f(t - h)) / (2 * h) - df(t)) < 1e-9


@every
def test_derivatives_are_finite_at_both_ends(s):
    ends = f64(s.t_min, s.t_max)
    for f in (s.alpha, s.sigma, s.dalpha, s.dsigma):
        assert f(ends).isfinite().all()
        assert f(ends).dtype == torch.float64


def test_pure_noise_end_is_exact():
    assert float(Flow().alpha(1.0)) == 0
    assert float(TrigFlow(0.5).alpha(math.pi / 2)) == 0  # not cos(pi / 2) = 6e-17
    assert float(Flow().sigma(0.0)) == 0
    assert float(TrigFlow(0.5).sigma(0.0)) == 0


# ---- snr and grids -------------------------------------------------------------------------------


@every
def test_snr_falls(s):
    t = torch.linspace(s.t_min, s.t_max, 5000, dtype=torch.float64)
    assert ((s.alpha(t) / s.sigma(t)).diff()[1:] < 0).all()  # the first may be inf


@every
def test_t_from_snr_returns_float32_times_bit_for_bit(s):
    t = times(s)
    back = s.t_from_snr((s.alpha(t) / s.sigma(t)) ** 2)
    assert torch.equal(back.float(), t.float())
    # float32 values in float64; the two ends need not be float32 values
    assert torch.equal(back[2:], t[2:])


@every
def test_t_from_snr_at_the_edges(s):
    t = s.t_from_snr(f64(0.0, 1e-300, 1e300, math.inf))
    ends = f64(s.t_max, s.t_max, s.t_min, s.t_min)
    assert largest(t - ends) < 5e-6  # float32(80) is 80; TrigFlow's pi / 2 is no float32 value
    assert (t.diff() <= 0).all()
    assert (t <= s.t_max).all()
    assert s.alpha(t).isfinite().all()
    assert s.sigma(t).isfinite().all()
    # float32(pi / 2) lies beyond pi / 2, where the cosine is negative
    assert not s.alpha(t).signbit().any()


@every
@pytest.mark.parametrize("n", [1, 2, 3, 1000])
def test_grid(s, n):
    t = s.grid(n)
    assert t.shape == (n,)
    assert t.dtype == torch.float64
    assert (t.diff() > 0).all()
    assert t[0] >= s.t_min
    assert float(t[-1]) == s.t_max  # the noisy end, also for n = 1


def test_grid_values():
    k = EDM().grid(1000)  # k[i] of DMD2, rho = 7
    assert k[[0, 999]].tolist() == [0.002, 80.0]
    expected = [0.003232, 0.01675, 0.1703, 2.5265, 72.05]
    assert k[[20, 100, 250, 500, 980]].tolist() == pytest.approx(expected, rel=3e-4)
    assert (k < 0.5).double().mean().item() == pytest.approx(0.339, abs=1e-9)
    assert (k > 5).double().mean().item() == pytest.approx(0.419, abs=1e-9)
    assert torch.equal(VP().grid(1000), torch.arange(1000, dtype=torch.float64))
    assert Flow().grid(4).tolist() == [0.25, 0.5, 0.75, 1.0]
    assert Flow(3.0).grid(4).tolist() == pytest.approx([0.5, 0.75, 0.9, 1.0])  # 3 u / (1 + 2 u)
    assert TrigFlow().grid(2).tolist() == [math.pi / 4, math.pi / 2]


def test_flow_shift_is_an_snr_factor():
    """Shift s divides alpha / sigma by s (SD3, equation 23)."""
    u, f = f64(0.1, 0.5, 0.9), Flow(3.0)
    t = f.shifted(u)
    assert largest(f.alpha(t) / f.sigma(t) / ((1 - u) / u) * 3 - 1) < 1e-14


# ---- noisy samples -------------------------------------------------------------------------------


def test_add_noise():
    x, eps = normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2)
    alpha, sigma = f64(1.0, 0.7, 0.0), f64(0.1, 0.5, 1.0)
    x_t = add_noise(x, alpha, sigma, eps)
    for i in range(3):
        assert torch.equal(x_t[i], alpha[i] * x[i] + sigma[i] * eps[i])
    assert torch.equal(add_noise(x, 0.7, sigma[1], eps)[1], x_t[1])  # one level for all
    # float64 inside, rounded once
    rounded = (0.7 * x[1].float().double() + 0.5 * eps[1].float().double()).float()
    assert torch.equal(add_noise(x.float(), alpha, sigma, eps.float())[1], rounded)


@every
def test_initial_noise(s):
    z = normal(3, 2, 4).float()
    noise = initial_noise(s, f64(s.t_max)[0], z)
    assert noise.dtype == torch.float32
    if isinstance(s, VP):
        assert noise is z
    else:
        assert torch.equal(noise, (s.sigma(s.t_max) * z).to(z.dtype))
        each = initial_noise(s, f64(s.t_max, s.t_max / 2, s.t_max), z)
        assert torch.allclose(each[1], s.sigma(s.t_max / 2) * z[1])


# ---- conversions ---------------------------------------------------------------------------------


def noisy(s, n=64, low=0.02, high=0.98):
    """alpha, sigma [n], x0, eps, x_t [n, 3] at n levels of a schedule, away from its ends."""
    t = s.t_min + (s.t_max - s.t_min) * torch.linspace(low, high, n, dtype=torch.float64)
    x0, eps = normal(n, 3, seed=1), normal(n, 3, seed=2)
    alpha, sigma = s.alpha(t), s.sigma(t)
    return alpha, sigma, x0, eps, alpha[:, None] * x0 + sigma[:, None] * eps


@pytest.mark.parametrize("kind", KINDS)
def test_target_gives_x0(kind):
    """The training target of each prediction, written from its definition, is converted to x0."""
    alpha, sigma, x0, eps, x_t = noisy(KINDS[kind])
    a, s, sd = alpha[:, None], sigma[:, None], 0.5
    norm = (s**2 + sd**2).sqrt()
    targets = dict(
        x0=x0,
        eps=eps,
        v=a * eps - s * x0,
        flow=eps - x0,
        # F of c_skip x + c_out F = x0
        edm=(x0 - sd**2 / norm**2 * x_t) * norm / (s * sd),
        # dx_t / dt / sigma_data: cos' = -sin = -sigma / sigma_data
        trigflow=(a * sd * eps - s / sd * x0) / sd,
    )
    target = targets[kind]
    assert largest(to_x0(kind, target, x_t, alpha, sigma, sd) - x0) < 1e-10
    assert largest(from_x0(kind, x0, x_t, alpha, sigma, sd) - target) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_round_trips(kind, seed):
    alpha, sigma, _, _, x_t = noisy(KINDS[kind])
    out = normal(*x_t.shape, seed=10 + seed)
    x0 = to_x0(kind, out, x_t, alpha, sigma)
    assert largest(from_x0(kind, x0, x_t, alpha, sigma) - out) < 1e-10
    # eps -> x0 amplifies rounding
    assert to_x0(kind, out.float(), x_t.float(), alpha, sigma).dtype == torch.float64


@every
def test_score_and_eps_of_x0(s):
    alpha, sigma, x0, eps, x_t = noisy(s)
    assert largest(eps_from_x0(x0, x_t, alpha, sigma) - eps) < 1e-10
    # the score of N(alpha x0, sigma^2) is -eps / sigma
    score = score_from_x0(x0, x_t, alpha, sigma)
    assert largest((score + eps / sigma[:, None]) * sigma[:, None]) < 1e-10
    assert largest(x0_from_score(score, x_t, alpha, sigma) - x0) < 1e-10


def test_score_of_a_gaussian():
    """Data N(m, s^2): the score of x_t is that of N(alpha m, alpha^2 s^2 + sigma^2)."""
    mean, variance = 0.3, 0.49
    alpha, sigma, _, _, x_t = noisy(VP())
    a, s = alpha[:, None], sigma[:, None]
    variance_t = a**2 * variance + s**2
    x0 = mean + a * variance / variance_t * (x_t - a * mean)
    score = -(x_t - a * mean) / variance_t
    assert largest(score_from_x0(x0, x_t, alpha, sigma) - score) < 1e-10


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "x0"])
def test_clean_end(kind):
    """At sigma = 0 the sample itself is x0, whatever the network predicts."""
    x_t, out = normal(4, 3), normal(4, 3, seed=1)
    assert torch.equal(to_x0(kind, out, x_t, 1.0, 0.0), x_t)


@pytest.mark.parametrize("kind", KINDS)
def test_native_weight(kind):
    """lambda |error in x0|^2 = |error of the network's output|^2. For trigflow that is F."""
    alpha, sigma, x0, _, x_t = noisy(KINDS[kind])
    estimate = x0 + normal(*x0.shape, seed=5)
    error = from_x0(kind, estimate, x_t, alpha, sigma) - from_x0(kind, x0, x_t, alpha, sigma)
    weight = native_weight(kind, alpha, sigma)[:, None]
    assert largest(weight * (estimate - x0) ** 2 / error**2 - 1) < 1e-9


def test_native_weight_numbers():
    weight = native_weight("edm", 1.0, f64(0.002, 80.0), sigma_data=0.5)
    assert weight.tolist() == pytest.approx([250004, 4.00015625], rel=1e-12)
    # The least loss on Gaussian data of standard deviation s is s^2 (sigma^2 + sd^2) / (sd^2 (s^2 +
    # sigma^2)): 1 at every sigma if s = sd.
    s, sigma = torch.tensor([0.5, 0.25]), torch.tensor([0.002, 1.0])
    floor = native_weight("edm", 1.0, sigma, 0.5) * s**2 * sigma**2 / (s**2 + sigma**2)
    assert floor.tolist() == pytest.approx([1.0, 0.2941], abs=1e-4)
    alpha, sigma = VP().alpha(499), VP().sigma(499)
    floor = native_weight("eps", alpha, sigma) * sigma**2 / (alpha**2 + sigma**2)
    assert float(floor) == pytest.approx(0.27767, abs=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: to_x0("velocity", normal(1, 1), normal(1, 1), 1.0, 1.0),
        lambda: from_x0("velocity", normal(1, 1), normal(1, 1), 1.0, 1.0),
        lambda: native_weight("velocity", 1.0, 1.0),
    ],
)
def test_unknown_prediction(call):
    with pytest.raises(ValueError, match="velocity"):
        call()


# ---- the equal-SNR view --------------------------------------------------------------------------


@every
def test_view_is_the_identity_in_its_own_schedule(s):
    t = times(s, 20000, seed=3)
    t_n, alpha_n, sigma_n, scale = equal_snr(s, s.alpha(t), s.sigma(t))
    assert torch.equal(t_n.float(), t.float())
    assert torch.equal(scale, torch.ones_like(scale))
    x = normal(len(t), 2).float()
    assert torch.equal((x.double() * scale[:, None]).to(x.dtype), x)
    # float32(t_min) of EDM is 0.002 (1 + 5e-9); elsewhere alpha and sigma come back as they went
    assert largest(alpha_n - s.alpha(t)) < 1e-7
    assert largest(sigma_n - s.sigma(t)) < 1e-7
    # also at the times that methods draw, which float32 does not hold: (i + 1) / 1000, ...
    grid = s.grid(1000)
    scale = equal_snr(s, s.alpha(grid), s.sigma(grid))[3]
    assert torch.equal(scale, torch.ones(1000, dtype=torch.float64))


@every
@pytest.mark.parametrize("other", ["vp", "edm", "flow", "trig-0.5"])
def test_view_scale(s, other):
    """scale x_t = alpha_n x0 + sigma_n eps holds in both terms where the two schedules overlap."""
    o = ALL[other]
    t = o.t_min + (o.t_max - o.t_min) * torch.linspace(0.02, 0.98, 999, dtype=torch.float64)
    alpha, sigma = o.alpha(t), o.sigma(t)
    ratio = lambda u: float(s.sigma(u) / s.alpha(u)) if float(s.alpha(u)) else math.inf
    low, high = ratio(s.t_min) * 1.001, ratio(s.t_max) * 0.999
    inside = (sigma / alpha > low) & (sigma / alpha < high)
    alpha, sigma = alpha[inside], sigma[inside]
    assert len(alpha) > 100

    t, alpha_n, sigma_n, scale = equal_snr(s, alpha, sigma)
    assert torch.equal(alpha_n, s.alpha(t))
    assert torch.equal(sigma_n, s.sigma(t))
    error = torch.stack([scale * alpha / alpha_n - 1, scale * sigma / sigma_n - 1]).abs()
    # exact on the larger term; the other one shows that t is rounded to float32
    assert error.min(0).values.max() < 1e-7
    assert error.max() < 1e-5


@pytest.mark.parametrize(
    "schedule, level, expected",
    [
        # EDM's x0 + 3 eps is four times the flow's x0 / 4 + 3 eps / 4
        (Flow(), (1.0, 3.0), [0.75, 0.25, 0.75, 0.25]),
        (EDM(), (0.25, 0.75), [3.0, 1.0, 3.0, 4.0]),
        (TrigFlow(0.5), (0.5, 0.25), [math.pi / 4, 0.5**0.5, 0.5 * 0.5**0.5, 2**0.5]),
    ],
)
def test_view_scale_numbers(schedule, level, expected):
    assert [float(v) for v in equal_snr(schedule, *level)] == pytest.approx(expected)


def test_view_of_pure_noise():
    """alpha = 0: EDM gets sigma_max z; VP, whose last level still has some data, 0.998 z."""
    assert [float(v) for v in equal_snr(EDM(), 0.0, 1.0)] == [80.0, 1.0, 80.0, 80.0]
    t, alpha, _, scale = equal_snr(VP(), 0.0, 2.0)
    assert float(t) == 999
    assert float(scale) == pytest.approx(0.99767 / 2, abs=1e-5)
    assert float(alpha) ** 2 == pytest.approx(0.0046601, abs=6e-8)
    for schedule in (Flow(), TrigFlow(0.5)):
        t, alpha, sigma, scale = equal_snr(schedule, 0.0, 1.0)
        assert float(t) == schedule.t_max
        assert float(alpha) == 0
        assert float(scale) == float(sigma)


@every
def test_view_of_clean_samples(s):
    """sigma = 0, or below the network's smallest: the nearer end; the data keeps its size."""
    smallest = float(s.sigma(s.t_min) / s.alpha(s.t_min))
    for sigma in (0.0, smallest / 10):
        t, alpha, _, scale = equal_snr(s, 2.0, sigma)
        assert float(t) == pytest.approx(s.t_min, abs=1e-7)
        assert float(scale) == pytest.approx(float(alpha) / 2, rel=1e-7)
        assert math.isfinite(float(scale))


def test_view_broadcasts():
    for value in equal_snr(VP(), 1.0, torch.tensor([0.1, 1.0, 10.0])):
        assert value.shape == (3,)
        assert value.dtype == torch.float64


# ---- configurations ------------------------------------------------------------------------------


@every
def test_from_config_round_trip(s):
    again, t = from_config(s.config), times(s, 50)
    assert type(again) is type(s)
    assert again.config == s.config
    assert torch.equal(again.alpha(t), s.alpha(t))
    assert torch.equal(again.sigma(t), s.sigma(t))
    assert torch.equal(again.grid(7), s.grid(7))


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "name"),
        ({"name": "cosine"}, "cosine"),
        ({"name": ["vp"]}, "name"),
        ("vp", "object"),
        (None, "object"),
        ({"name": "flow", "sigma_min": 0.1}, "sigma_min"),
        ({"name": "vp", "kind": "cosine"}, "cosine"),
        ({"name": "vp", "kind": ["linear"]}, "kind"),
        ({"name": "vp", "T": 1}, "fall"),
        ({"name": "vp", "T": 10.5}, "vp"),
        ({"name": "vp", "T": 1e300}, "vp"),
        ({"name": "vp", "beta_end": 1.5}, "fall"),
        ({"name": "edm", "sigma_min": "0.002"}, "sigma_min"),
        ({"name": "edm", "sigma_min": 90.0}, "fall"),
        ({"name": "edm", "sigma_min": 0}, "sigma_min"),
        ({"name": "edm", "sigma_max": math.inf}, "sigma_max"),
        ({"name": "flow", "shift": -1}, "shift"),
        ({"name": "flow", "shift": True}, "shift"),
        ({"name": "trigflow", "sigma_data": math.nan}, "sigma_data"),
        ({"name": "trigflow", "sigma_data": None}, "sigma_data"),
    ],
)
def test_from_config_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        from_config(config)


# ---- the first-order sampler on Gaussian data ----------------------------------------------------


@pytest.mark.parametrize(
    "name, prediction, rate",
    [
        ("vp", "eps", 1.86),
        ("edm", "edm", 2),
        ("flow", "flow", 2),
        ("flow-3", "flow", 2),
        ("trig-0.5", "trigflow", 2),
    ],
)
def test_first_order_sampler_on_a_gaussian(name, prediction, rate):
    """Data N(m, s^2): the exact denoiser, stepped, converges to the probability flow.

    The flow maps x_T to m + s (x_T - alpha_T m) / sqrt(alpha_T^2 s^2 + sigma_T^2). First order:
    twice the steps, half the error (n / log n on VP's uniform times, where sigma grows like
    sqrt(t)).
    """
    m, s, schedule = 0.4, 1.0, ALL[name]

    def denoiser(x, alpha, sigma, cond, w):
        return m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x - alpha * m)

    model = SimpleNamespace(schedule=schedule, prediction=prediction, guided=denoiser)
    z = normal(200, 1)
    alpha, sigma = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    # VP starts from z, although its last level is alpha x0 + sigma z
    start = z if schedule.unit_norm else sigma * z
    exact = m + s * (start - alpha * m) / (alpha**2 * s**2 + sigma**2).sqrt()
    error = [float(largest(teacher_sample(model, z, {}, n) - exact)) for n in (100, 200, 400)]
    assert error[2] < 0.025
    assert [error[0] / error[1], error[1] / error[2]] == pytest.approx([rate, rate], abs=0.02)

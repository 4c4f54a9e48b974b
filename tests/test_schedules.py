"""common/schedules.py: closed forms, derivatives, ends, conversions, the equal-SNR view, and the first-order sampler on Gaussian data."""

import math
from types import SimpleNamespace

import pytest
import torch

from common import schedules
from common.sampling import teacher_sample
from common.schedules import (
    EDM,
    VP,
    Flow,
    TrigFlow,
    equal_snr,
    from_config,
    from_x0,
    native_weight,
    to_x0,
)

ALL = {
    "vp": VP(),
    "vp-linear": VP(beta_start=1e-4, beta_end=0.02, kind="linear"),
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


def times(s, n=2000, seed=0):
    """n random times of a schedule that float32 can hold, and its two ends."""
    t = s.t_min + (s.t_max - s.t_min) * torch.rand(
        n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return torch.cat(
        [
            torch.tensor([s.t_min, s.t_max], dtype=torch.float64),
            t.float().double().clamp(s.t_min, s.t_max),
        ]
    )


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- closed forms -----------------------------------------------------------------------------------------------------------------------


def test_vp_table():
    s, i = VP(), torch.tensor([999, 749, 499, 399, 249])
    beta = [(0.00085**0.5 + k / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for k in range(1000)]
    abar = torch.tensor([math.prod(1 - b for b in beta[: k + 1]) for k in i], dtype=torch.float64)
    assert (s.alpha(i) ** 2 / abar - 1).abs().max() < 1e-12
    assert (s.alpha(i) ** 2 + s.sigma(i) ** 2 - 1).abs().max() < 1e-15
    # the numbers of DMD2's schedule, which come from a float32 table
    assert (s.alpha(i) ** 2).tolist() == pytest.approx(
        [0.0046601, 0.0566236, 0.2776694, 0.4260861, 0.6754321], abs=4e-7
    )
    assert (s.sigma(i) / s.alpha(i)).tolist() == pytest.approx(
        [14.6146, 4.0817, 1.6129, 1.1606, 0.6932], abs=6e-5
    )
    assert ((1 - s.sigma(i)) / s.alpha(i))[[0, 3]].tolist() == pytest.approx(
        [0.03417, 0.37139], abs=6e-6
    )  # x0 for eps_hat = z


def test_vp_linear_table():
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    assert (ALL["vp-linear"].alpha(torch.arange(1000)) - abar.sqrt()).abs().max() < 1e-14


def test_vp_fractional_times_interpolate_log_snr():
    s = VP()
    at = lambda t: 2 * (s.alpha(t).log() - s.sigma(t).log())
    assert float(at(300.25) - (0.75 * at(300.0) + 0.25 * at(301.0))) == pytest.approx(0, abs=1e-13)
    # hence a critic asked halfway between two table entries is asked at exactly that time
    mid = s.t_from_snr(((at(300.0) + at(301.0)) / 2).exp())
    assert float(mid) == pytest.approx(300.5, abs=2e-5)


@pytest.mark.parametrize(
    "name, alpha, sigma, t",
    [
        ("edm", lambda t: t * 0 + 1, lambda t: t, [0.002, 0.5, 80.0]),
        ("flow", lambda t: 1 - t, lambda t: t, [0.0, 0.3, 1.0]),
        (
            "flow-3",
            lambda t: 1 - t,
            lambda t: t,
            [0.0, 0.3, 1.0],
        ),  # the shift moves the grid, not alpha and sigma
        ("trig-0.5", torch.cos, lambda t: 0.5 * torch.sin(t), [0.0, 0.3, 1.5]),
        ("trig-1", torch.cos, torch.sin, [0.0, 0.3, 1.5]),
    ],
)
def test_closed_forms(name, alpha, sigma, t):
    t = torch.tensor(t, dtype=torch.float64)
    assert torch.equal(ALL[name].alpha(t), alpha(t)) and torch.equal(ALL[name].sigma(t), sigma(t))


@every
def test_derivatives(s):
    """Central differences; VP is piecewise smooth, so its differences stay inside one table interval."""
    t = torch.linspace(s.t_min, s.t_max, 400, dtype=torch.float64)[1:-1]
    t = t.floor() + 0.1 + 0.8 * (t - t.floor()) if isinstance(s, VP) else t
    h = 1e-5
    for f, df in ((s.alpha, s.dalpha), (s.sigma, s.dsigma)):
        assert ((f(t + h) - f(t - h)) / (2 * h) - df(t)).abs().max() < 1e-9


@every
def test_derivatives_are_finite_at_both_ends(s):
    ends = torch.tensor([s.t_min, s.t_max], dtype=torch.float64)
    for f in (s.alpha, s.sigma, s.dalpha, s.dsigma):
        assert f(ends).isfinite().all() and f(ends).dtype == torch.float64


def test_pure_noise_end_is_exact():
    assert (
        float(Flow().alpha(1.0)) == 0 and float(TrigFlow(0.5).alpha(math.pi / 2)) == 0
    )  # not cos(pi / 2) = 6e-17
    assert float(Flow().sigma(0.0)) == 0 and float(TrigFlow(0.5).sigma(0.0)) == 0


# ---- snr and grids ----------------------------------------------------------------------------------------------------------------------


@every
def test_snr_falls(s):
    t = torch.linspace(s.t_min, s.t_max, 5000, dtype=torch.float64)
    assert ((s.alpha(t) / s.sigma(t)).diff()[1:] < 0).all()  # the first may be inf


@every
def test_t_from_snr_returns_float32_times_bit_for_bit(s):
    t = times(s)
    back = s.t_from_snr((s.alpha(t) / s.sigma(t)) ** 2)
    assert torch.equal(back.float(), t.float())
    assert torch.equal(
        back[2:], t[2:]
    )  # float32 values in float64; the two ends are what the schedule says


@every
def test_t_from_snr_at_the_edges(s):
    t = s.t_from_snr(torch.tensor([0.0, 1e-300, 1e300, math.inf], dtype=torch.float64))
    ends = torch.tensor([s.t_max, s.t_max, s.t_min, s.t_min], dtype=torch.float64)
    assert (t - ends).abs().max() < 5e-6 and (
        t.diff() <= 0
    ).all()  # float32(80) is 80; TrigFlow's pi / 2 is not float32
    assert (t <= s.t_max).all() and s.alpha(t).isfinite().all() and s.sigma(t).isfinite().all()
    assert (
        not s.alpha(t).signbit().any()
    )  # float32(pi / 2) lies beyond pi / 2, where the cosine is negative


@every
@pytest.mark.parametrize("n", [1, 2, 3, 1000])
def test_grid(s, n):
    t = s.grid(n)
    assert t.shape == (n,) and (t.diff() > 0).all() and t.dtype == torch.float64
    assert float(t[-1]) == s.t_max and t[0] >= s.t_min  # the last is the noisy end, also for n = 1


def test_grid_values():
    k = EDM().grid(1000)  # k[i] of DMD2, rho = 7
    assert k[[0, 999]].tolist() == [0.002, 80.0]
    assert k[[20, 100, 250, 500, 980]].tolist() == pytest.approx(
        [0.003232, 0.01675, 0.1703, 2.5265, 72.05], rel=3e-4
    )
    assert [(k < 0.5).double().mean().item(), (k > 5).double().mean().item()] == pytest.approx(
        [0.339, 0.419], abs=1e-9
    )
    assert torch.equal(VP().grid(1000), torch.arange(1000, dtype=torch.float64))
    assert Flow().grid(4).tolist() == [0.25, 0.5, 0.75, 1.0]
    assert Flow(3.0).grid(4).tolist() == pytest.approx([0.5, 0.75, 0.9, 1.0])  # 3 u / (1 + 2 u)
    assert TrigFlow().grid(2).tolist() == [math.pi / 4, math.pi / 2]


def test_flow_shift_is_an_snr_factor():
    """Shift s divides alpha / sigma by s (SD3, eq. 23)."""
    u, f = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), Flow(3.0)
    t = f.shifted(u)
    assert (f.alpha(t) / f.sigma(t) / ((1 - u) / u) * 3 - 1).abs().max() < 1e-14


# ---- conversions ------------------------------------------------------------------------------------------------------------------------


def noisy(s, n=64, lo=0.02, hi=0.98):
    t = s.t_min + (s.t_max - s.t_min) * torch.linspace(lo, hi, n, dtype=torch.float64)
    x0, eps = rand(n, 3, seed=1), rand(n, 3, seed=2)
    a, sig = s.alpha(t), s.sigma(t)
    return a, sig, x0, eps, a[:, None] * x0 + sig[:, None] * eps


@pytest.mark.parametrize("kind", KINDS)
def test_target_gives_x0(kind):
    """The training target of each prediction, written from its definition, is converted to x0."""
    a, s, x0, eps, x = noisy(KINDS[kind])
    a_, s_, sd = a[:, None], s[:, None], 0.5
    target = dict(
        x0=x0,
        eps=eps,
        v=a_ * eps - s_ * x0,
        flow=eps - x0,
        edm=(x0 - sd**2 / (s_**2 + sd**2) * x)
        * (s_**2 + sd**2).sqrt()
        / (s_ * sd),  # F of c_skip x + c_out F = x0
        trigflow=(a_ * sd * eps - s_ / sd * x0) / sd,
    )[kind]  # dx_t / dt / sigma_data: cos' = -sin = -sigma / sigma_data
    assert (to_x0(kind, target, x, a, s, sd) - x0).abs().max() < 1e-10
    assert (from_x0(kind, x0, x, a, s, sd) - target).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_round_trips(kind, seed):
    a, s, _, _, x = noisy(KINDS[kind])
    out = rand(*x.shape, seed=10 + seed)
    x0 = to_x0(kind, out, x, a, s)
    assert (from_x0(kind, x0, x, a, s) - out).abs().max() < 1e-10
    assert (
        to_x0(kind, out.float(), x.float(), a, s).dtype == torch.float64
    )  # eps -> x0 amplifies rounding


@every
def test_score_and_eps_of_x0(s):
    a, sig, x0, eps, x = noisy(s)
    assert (schedules.eps_from_x0(x0, x, a, sig) - eps).abs().max() < 1e-10
    score = schedules.score_from_x0(x0, x, a, sig)
    assert (score + eps / sig[:, None]).abs().mul(
        sig[:, None]
    ).max() < 1e-10  # score of N(alpha x0, sigma^2) = -eps / sigma
    assert (schedules.x0_from_score(score, x, a, sig) - x0).abs().max() < 1e-10


def test_score_of_a_gaussian():
    """Data N(m, s^2): the score of x_t is that of N(alpha m, alpha^2 s^2 + sigma^2)."""
    m, v, (a, sig, _, _, x) = 0.3, 0.49, noisy(VP())
    var = a[:, None] ** 2 * v + sig[:, None] ** 2
    mean = m + a[:, None] * v / var * (x - a[:, None] * m)
    assert (
        schedules.score_from_x0(mean, x, a, sig) + (x - a[:, None] * m) / var
    ).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_clean_end(kind):
    """At sigma = 0 the sample itself is x0, whatever the network says."""
    x, out = rand(4, 3), rand(4, 3, seed=1)
    if kind != "x0":
        assert torch.equal(to_x0(kind, out, x, 1.0, 0.0), x)


@pytest.mark.parametrize("kind", KINDS)
def test_native_weight(kind):
    """lambda |x0 error|^2 = |error of the network's output|^2. For trigflow the output is F, and dx_t / dt = sigma_data F."""
    a, s, x0, _, x = noisy(KINDS[kind])
    hat = x0 + rand(*x0.shape, seed=5)
    native = from_x0(kind, hat, x, a, s) - from_x0(kind, x0, x, a, s)
    weight = native_weight(kind, a, s)
    assert (weight[:, None] * (hat - x0) ** 2 / native**2 - 1).abs().max() < 1e-9


def test_native_weight_numbers():
    lam = native_weight(
        "edm", 1.0, torch.tensor([0.002, 80.0], dtype=torch.float64), sigma_data=0.5
    )
    assert lam.tolist() == pytest.approx([250004, 4.00015625], rel=1e-12)
    # critic floor: Gaussian data of std s has the loss s^2 (sig^2 + sd^2) / (sd^2 (s^2 + sig^2)), 1 at every sigma if s = sd
    s, sig = torch.tensor([0.5, 0.25]), torch.tensor([0.002, 1.0])
    floor = native_weight("edm", 1.0, sig, 0.5) * s**2 * sig**2 / (s**2 + sig**2)
    assert floor.tolist() == pytest.approx([1.0, 0.2941], abs=1e-4)
    at = VP().alpha(499), VP().sigma(499)
    assert float(
        native_weight("eps", *at) * at[1] ** 2 / (at[0] ** 2 + at[1] ** 2)
    ) == pytest.approx(0.27767, abs=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: to_x0("velocity", rand(1, 1), rand(1, 1), 1.0, 1.0),
        lambda: from_x0("velocity", rand(1, 1), rand(1, 1), 1.0, 1.0),
        lambda: native_weight("velocity", 1.0, 1.0),
    ],
)
def test_unknown_prediction(call):
    with pytest.raises(ValueError, match="velocity"):
        call()


# ---- the equal-SNR view -----------------------------------------------------------------------------------------------------------------


@every
def test_view_is_the_identity_in_its_own_schedule(s):
    t = times(s, 20000, seed=3)
    t_n, alpha_n, sigma_n, scale = equal_snr(s, s.alpha(t), s.sigma(t))
    assert torch.equal(t_n.float(), t.float())
    assert torch.equal(scale, torch.ones_like(scale))
    x = rand(len(t), 2).float()
    assert torch.equal((x.double() * scale[:, None]).to(x.dtype), x)
    # float32(t_min) of EDM is 0.002 (1 + 5e-9); elsewhere alpha and sigma come back as they went
    assert (alpha_n - s.alpha(t)).abs().max() < 1e-7 and (sigma_n - s.sigma(t)).abs().max() < 1e-7
    # also at the times that methods draw, which float32 does not hold: (i + 1) / 1000, ...
    assert torch.equal(
        equal_snr(s, s.alpha(s.grid(1000)), s.sigma(s.grid(1000)))[3],
        torch.ones(1000, dtype=torch.float64),
    )


@every
@pytest.mark.parametrize("other", ["vp", "edm", "flow", "trig-0.5"])
def test_view_scale(s, other):
    """scale x_t = alpha_n x0 + sigma_n eps holds for both terms wherever the two schedules overlap."""
    o = ALL[other]
    a, sig = (
        f(o.t_min + (o.t_max - o.t_min) * torch.linspace(0.02, 0.98, 999, dtype=torch.float64))
        for f in (o.alpha, o.sigma)
    )
    ratio = lambda u: float(s.sigma(u) / s.alpha(u)) if float(s.alpha(u)) else math.inf
    inside = (sig / a > ratio(s.t_min) * 1.001) & (sig / a < ratio(s.t_max) * 0.999)
    a, sig = a[inside], sig[inside]
    assert len(a) > 100
    t, a_n, s_n, scale = equal_snr(s, a, sig)
    assert torch.equal(a_n, s.alpha(t)) and torch.equal(s_n, s.sigma(t))
    both = torch.stack([scale * a / a_n - 1, scale * sig / s_n - 1]).abs()
    assert (
        both.min(0).values.max() < 1e-7
    )  # exact on the larger term; the other one feels that t is rounded to float32
    assert both.max() < 1e-5


def test_view_scale_numbers():
    t, a, s, scale = equal_snr(
        Flow(), 1.0, 3.0
    )  # EDM's x0 + 3 eps is four times the flow's x0 / 4 + 3 eps / 4
    assert [float(v) for v in (t, a, s, scale)] == pytest.approx([0.75, 0.25, 0.75, 0.25])
    t, a, s, scale = equal_snr(EDM(), 0.25, 0.75)
    assert [float(v) for v in (t, a, s, scale)] == pytest.approx([3.0, 1.0, 3.0, 4.0])
    t, a, s, scale = equal_snr(TrigFlow(0.5), 0.5, 0.25)
    assert [float(v) for v in (t, a, s, scale)] == pytest.approx(
        [math.pi / 4, 0.5**0.5, 0.5 * 0.5**0.5, 2**0.5]
    )


def test_view_of_pure_noise():
    """alpha = 0: asked of EDM it is sigma_max z; of VP, whose last step still holds some data, sigma_999 z with sigma_999 = 0.998."""
    t, a, s, scale = equal_snr(EDM(), 0.0, 1.0)
    assert [float(v) for v in (t, a, s, scale)] == [80.0, 1.0, 80.0, 80.0]
    t, a, s, scale = equal_snr(VP(), 0.0, 2.0)
    assert (
        float(t) == 999
        and float(scale) == pytest.approx(0.99767 / 2, abs=1e-5)
        and float(a) ** 2 == pytest.approx(0.0046601, abs=6e-8)
    )
    for own in (Flow(), TrigFlow(0.5)):
        t, a, s, scale = equal_snr(own, 0.0, 1.0)
        assert float(t) == own.t_max and float(a) == 0 and float(scale) == float(s)


@every
def test_view_of_clean_samples(s):
    """sigma = 0 and sigma below the network's smallest: the nearer end, and the data keeps its size alpha_n."""
    smallest = float(s.sigma(s.t_min) / s.alpha(s.t_min))
    for sigma in (0.0, smallest / 10):
        t, a, _, scale = equal_snr(s, 2.0, sigma)
        assert float(t) == pytest.approx(s.t_min, abs=1e-7)
        assert float(scale) == pytest.approx(float(a) / 2, rel=1e-7) and math.isfinite(float(scale))


def test_view_broadcasts():
    out = equal_snr(VP(), 1.0, torch.tensor([0.1, 1.0, 10.0]))
    assert all(v.shape == (3,) and v.dtype == torch.float64 for v in out)


# ---- configurations ---------------------------------------------------------------------------------------------------------------------


@every
def test_from_config_round_trip(s):
    twin, t = from_config(s.config), times(s, 50)
    assert type(twin) is type(s) and twin.config == s.config
    assert (
        torch.equal(twin.alpha(t), s.alpha(t))
        and torch.equal(twin.sigma(t), s.sigma(t))
        and torch.equal(twin.grid(7), s.grid(7))
    )


@pytest.mark.parametrize(
    "config, says",
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
def test_from_config_refuses(config, says):
    with pytest.raises(ValueError, match=says):
        from_config(config)


# ---- the first-order sampler on Gaussian data -------------------------------------------------------------------------------------------


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
    """Data N(m, s^2): the probability flow maps x_T to m + s (x_T - alpha_T m) / sqrt(alpha_T^2 s^2 + sigma_T^2). The exact denoiser, stepped, converges
    to it at first order: twice the steps, half the error (n / log n on VP's uniform times, whose sigma grows like sqrt(t))."""
    m, s, schedule = 0.4, 1.0, ALL[name]

    def x0(x, alpha, sigma, cond, w):
        return m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x - alpha * m)

    model = SimpleNamespace(schedule=schedule, prediction=prediction, guided=x0)
    z = rand(200, 1)
    a, sig = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    start = z * (
        1.0 if schedule.unit_norm else sig
    )  # VP starts from z, although its last step is alpha x0 + sigma z
    exact = m + s * (start - a * m) / (a**2 * s**2 + sig**2).sqrt()
    error = [float((teacher_sample(model, z, {}, n) - exact).abs().max()) for n in (100, 200, 400)]
    assert error[2] < 0.025
    assert [error[0] / error[1], error[1] / error[2]] == pytest.approx([rate, rate], abs=0.02)

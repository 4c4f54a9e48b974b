"""common/teachers/toy.py: the mixture's density, score and posterior mean against independent
computations; guidance; the toy teacher evaluated through any schedule; distances of point sets."""

import math

import pytest
import torch
from helpers.conversions import from_x0, score_from_x0, x0_from_score

from common.model import Model
from common.schedules import EDM, VP, Flow, TrigFlow, equal_snr
from common.teachers.load import load_teacher
from common.teachers.toy import Mixture, energy_distance, mode_shares, sliced_wasserstein

LEVELS = [(1.0, 0.05), (1.0, 3.0), (0.7, 0.5), (0.1, 0.995), (0.0, 1.0)]  # (alpha, sigma)
# a schedule, and a prediction that is defined on it
NETWORKS = {
    "edm": (EDM(0.002, 80.0), "edm"),
    "edm-x0": (EDM(0.002, 80.0), "x0"),
    "vp-eps": (VP(), "eps"),
    "vp-v": (VP(), "v"),
    "flow": (Flow(), "flow"),
    "trigflow": (TrigFlow(0.5), "trigflow"),
    "trigflow-1": (TrigFlow(1.0), "trigflow"),
}
network = pytest.mark.parametrize("schedule, prediction", NETWORKS.values(), ids=NETWORKS.keys())


def generator(seed):
    return torch.Generator().manual_seed(seed)


def points(n=40, seed=0, spread=1.2):
    return spread * torch.randn(n, 2, generator=generator(seed), dtype=torch.float64)


def label_sets(n):
    """No argument, the null label, and a component for each point."""
    return [None, torch.full((n,), 8), torch.arange(n) % 8]


def largest(x):
    return x.abs().max()


@pytest.fixture(scope="module")
def toy():
    return load_teacher("toy-cond")


# ---- the mixture ---------------------------------------------------------------------------------


def test_density_is_normalised_and_closed_form():
    m = Mixture()
    g = torch.linspace(-3, 3, 601, dtype=torch.float64)
    x = torch.cartesian_prod(g, g)
    assert float(m.log_prob(x).exp().sum() * 0.01**2) == pytest.approx(1, abs=1e-10)
    joint = m.log_prob(x, 0.6, 0.4, torch.zeros(len(x), dtype=torch.long)).exp()
    assert float(joint.sum() * 0.01**2) == pytest.approx(1 / 8, abs=1e-8)  # joint with the label
    # one point by hand: mode 0 at (1, 0); the others are more than 7 standard deviations away
    found = float(m.log_prob(torch.tensor([[1.0, 0.1]], dtype=torch.float64)))
    expected = -0.5 - math.log(2 * math.pi * 0.01) - math.log(8)
    assert found == pytest.approx(expected, abs=1e-9)


def test_samples_follow_the_density():
    m, g = Mixture(), generator(0)
    x = m.sample(20000, torch.full((20000,), 2), g).double()
    assert largest(x.mean(0) - m.means[2]) < 3e-3
    assert largest(x.std(0) - 0.1) < 2e-3  # 4 standard errors
    share, near = mode_shares(m.sample(20000, generator=g), m)
    assert largest(share - 1 / 8) < 0.01
    # a 2-D Gaussian within 3 standard deviations
    assert near == pytest.approx(1 - math.exp(-4.5), abs=4e-3)


@pytest.mark.parametrize("alpha, sigma", LEVELS + [(1.0, 0.0)])
def test_score_is_the_gradient_of_the_log_density(alpha, sigma):
    m = Mixture()
    for labels in label_sets(40):
        x = points().requires_grad_(True)
        (gradient,) = torch.autograd.grad(m.log_prob(x, alpha, sigma, labels).sum(), x)
        assert largest(m.score(x, alpha, sigma, labels) / gradient - 1) < 1e-8


@pytest.mark.parametrize("alpha, sigma", LEVELS[:-1])
def test_posterior_mean_is_tweedies(alpha, sigma):
    m, x = Mixture(), points()
    for labels in label_sets(40):
        score = m.score(x, alpha, sigma, labels)
        x0 = m.x0(x, alpha, sigma, labels)
        assert largest(x0_from_score(score, x, alpha, sigma) - x0) < 1e-8
        assert largest(score_from_x0(x0, x, alpha, sigma) / score - 1) < 1e-8


@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.3), (0.7, 0.5), (0.1, 0.995)])
def test_posterior_mean_by_integration(alpha, sigma):
    """E[x0 | x_t] = integral x0 p(x0) N(x_t; alpha x0, sigma^2) / integral p(x0) N(...)."""
    m, x = Mixture(), points(6)
    g = torch.linspace(-1.7, 1.7, 171, dtype=torch.float64)
    x0 = torch.cartesian_prod(g, g)  # a grid of clean points
    for labels in label_sets(6):
        k = torch.full((6,), 8) if labels is None else labels
        for i in range(6):
            prior = m.log_prob(x0, labels=k[i].expand(len(x0)))
            likelihood = -(x[i] - alpha * x0).square().sum(1) / (2 * sigma**2)
            mean = (prior + likelihood).softmax(0) @ x0
            assert largest(mean - m.x0(x, alpha, sigma, labels)[i]) < 1e-7


def test_posterior_mean_at_the_ends():
    m, x = Mixture(), points()
    assert largest(m.x0(x, 1.0, 0.0) - x) < 1e-12  # no noise
    assert largest(m.x0(x, 0.0, 1.0)) < 1e-12  # no signal: the mean of the data
    assert largest(m.x0(x, 0.0, 1.0, torch.full((40,), 3)) - m.means[3]) < 1e-12
    # far away the responsibilities do not underflow to 0 / 0
    assert m.x0(1e6 * x, 1.0, 0.01).isfinite().all()


def test_one_label_is_one_gaussian():
    m, x, k = Mixture(), points(), torch.arange(40) % 8
    a, s = 0.7, 0.5
    exact = m.means[k] + a * 0.01 / (a**2 * 0.01 + s**2) * (x - a * m.means[k])
    assert largest(m.x0(x, a, s, k) - exact) < 1e-14


def test_batched_levels_equal_single_calls():
    m, x = Mixture(), points(4)
    a, s = torch.tensor([1.0, 0.7, 0.1, 0.0]), torch.tensor([0.05, 0.5, 0.995, 1.0])
    for i in range(4):
        for f in (m.x0, m.score):
            assert largest(f(x, a, s)[i] - f(x[i : i + 1], a[i], s[i])[0]) < 1e-12
    assert m.x0(x.float(), a, s).dtype == torch.float32


# ---- the teacher ---------------------------------------------------------------------------------


def test_guidance(toy):
    x, cond = points(), toy.encode(torch.arange(40) % 8)
    a, s = 0.7, 0.5
    c, u = toy(x, a, s, cond), toy(x, a, s, toy.null(40))
    assert largest(c - u) > 0.5  # the label matters
    assert torch.equal(toy.guided(x, a, s, cond, 1), c)
    for w in (0.0, 0.5, 2.5):
        assert largest(toy.guided(x, a, s, cond, w) - (u + w * (c - u))) < 1e-12
    each = toy.guided(x, torch.full((40,), a), torch.full((40,), s), cond, 2.5)
    assert largest(each - (u + 2.5 * (c - u))) < 1e-6  # 0.7 went through float32


def test_toy_ignores_labels_and_toy_cond_does_not(toy):
    assert load_teacher("toy").encode([0, 3])["labels"].tolist() == [8, 8]
    assert toy.encode([0, 3])["labels"].tolist() == [0, 3]
    assert toy.null(2)["labels"].tolist() == [8, 8]


class Exact(Model):
    """The exact network of a schedule and a prediction type: computed, without weights."""

    mixture = Mixture()

    def predict(self, x, t, cond):
        assert t.dtype == x.dtype
        assert t.shape == x.shape[:1]
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        x0 = self.mixture.x0(x, a, s, cond["labels"])
        return from_x0(self.prediction, x0, x, a, s, self.sigma_data)


@network
@pytest.mark.parametrize(
    "other", [EDM(0.01, 20.0), VP(), Flow(), TrigFlow(0.5)], ids=["edm", "vp", "flow", "trigflow"]
)
def test_any_schedule_gives_the_same_posterior_mean(schedule, prediction, other):
    """The same noisy point in the time and scale of any schedule, for networks of any schedule."""
    model, n = Exact(None, schedule, prediction, (2,), 8), 400
    # sigma / alpha, inside the range of every schedule
    ratio = torch.logspace(-1.4, 1.1, n, dtype=torch.float64)
    t = other.t_from_snr(ratio**-2)
    a, s = other.alpha(t), other.sigma(t)
    x0 = model.mixture.sample(n, generator=generator(1)).double()
    x = x0 + ratio[:, None] * points(n, seed=2, spread=1.0)
    for labels in (torch.full((n,), 8), torch.arange(n) % 8):
        exact = model.mixture.x0(x, 1.0, ratio, labels)
        assert largest(model(a[:, None] * x, a, s, dict(labels=labels)) - exact) < 1e-6


@network
def test_own_schedule_reaches_the_network_bit_for_bit(schedule, prediction):
    seen = {}

    class Spy(Exact):
        def predict(self, x, t, cond):
            seen.update(x=x, t=t)
            return super().predict(x, t, cond)

    model = Spy(None, schedule, prediction, (2,), 8)
    t = schedule.grid(1000).float().double().clamp(max=schedule.t_max)
    x = points(1000).float()
    model(x, schedule.alpha(t), schedule.sigma(t), dict(labels=torch.full((1000,), 8)))
    assert torch.equal(seen["x"], x)
    assert torch.equal(seen["t"], t.float())


@network
def test_native_loss_weight_is_of_the_networks_own_error(schedule, prediction):
    """At a level of another schedule it weighs x0 errors as the network's own loss does there."""
    model, x = Exact(None, schedule, prediction, (2,), 8), points(1)
    for a, s in ((1.0, 2.0), (0.5, 0.3)):
        _, a_n, s_n, _ = equal_snr(schedule, a, s)
        output = lambda x0: from_x0(prediction, x0, x, a_n, s_n, model.sigma_data)
        error = output(x + 1) - output(x)
        expected = float(error[0, 0] ** 2)
        assert float(model.native_loss_weight(a, s)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("other", [VP(), Flow(), TrigFlow(0.5)], ids=["vp", "flow", "trigflow"])
def test_fitted_network_through_the_view(toy, other):
    """The MLP (EDM inside) gives the same in every schedule, but for rounding of its input."""
    net, n = toy.copy(), 400
    ratio = torch.logspace(-1.4, 1.1, n, dtype=torch.float64)
    t = other.t_from_snr(ratio**-2)
    a, s, cond = other.alpha(t), other.sigma(t), dict(labels=torch.arange(n) % 9)
    x = toy.mixture.sample(n, generator=generator(1))
    x = x + ratio[:, None].float() * points(n, 2).float()
    with torch.no_grad():
        through_view = net((a[:, None] * x).float(), a, s, cond)
        assert largest(through_view - net(x, 1.0, ratio, cond)) < 2e-5


def test_fitted_network_is_close_to_the_exact_posterior_mean(toy):
    """Students start here. Root mean square error of the shipped file on noisy samples.

    Measured: 0.0003 to 0.0174, worst at sigma 18 with labels.
    """
    net, n = toy.copy(), 4000
    g = generator(0)
    for labels in (torch.full((n,), 8), torch.arange(n) % 8):
        cond = dict(labels=labels)
        x0 = toy.mixture.sample(n, torch.arange(n) % 8, g)
        for sigma in (0.02, 0.1, 0.3, 1.0, 3.0, 18.0):
            x = x0 + sigma * torch.randn(n, 2, generator=g)
            with torch.no_grad():
                error = net(x, 1.0, sigma, cond) - toy(x, 1.0, sigma, cond)
            assert float(error.square().mean().sqrt()) < 0.025


def test_exact_teacher_and_trainable_copy(toy):
    net, x, cond = toy.copy(), points(5).float(), toy.null(5)
    assert toy.exact
    assert not net.exact
    assert torch.equal(toy(x, 1.0, 0.3, cond), toy.mixture.x0(x, 1.0, 0.3, cond["labels"]))
    net(x, 1.0, 0.3, cond).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(p.grad is None for p in toy.parameters())
    (h,) = toy(x, 1.0, 0.3, cond, features=True)  # the exact teacher has the features of its MLP
    assert h.shape == (5, 128)
    assert h.dtype == torch.float32


# ---- distances -----------------------------------------------------------------------------------


def cloud(n, seed, d=2):
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def test_energy_distance():
    x, y = cloud(1500, 0), cloud(1500, 1)
    assert abs(energy_distance(x, y)) < 5e-3  # unbiased: around 0, also below
    assert abs(energy_distance(x, x)) < 5e-3
    by_hand = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    assert energy_distance(*by_hand) == pytest.approx(2 * (3 + 5 + 2 + 4) / 4 - 1 - 2)
    # N(0, 1) and N(0, 4) in 1-D: 2 E|x-y| - E|x-x'| - E|y-y'|, with E|N(0, v)| = sqrt(2 v / pi)
    exact = 2 * math.sqrt(10 / math.pi) - 6 / math.sqrt(math.pi)
    found = energy_distance(cloud(3000, 2, 1), 2 * cloud(3000, 3, 1))
    assert found == pytest.approx(exact, abs=0.03)
    shift = [energy_distance(x, y + torch.tensor([d, 0.0])) for d in (0.5, 1.0, 2.0)]
    assert 0.05 < shift[0] < shift[1] < shift[2]


def test_energy_distance_is_unbiased():
    values = torch.tensor([energy_distance(cloud(50, i), cloud(50, 1000 + i)) for i in range(200)])
    assert abs(values.mean()) < 4 * values.std() / 200**0.5


def test_sliced_wasserstein():
    x = cloud(2000, 0)
    assert sliced_wasserstein(x, x) == 0
    assert sliced_wasserstein(x, x[torch.randperm(2000)]) == 0
    # a shift by d moves the projection on w by d cos(angle): mean |d cos| = 2 d / pi
    moved = x + torch.tensor([0.6, 0.0])
    found = sliced_wasserstein(x, moved, projections=1000)
    assert found == pytest.approx(1.2 / math.pi, abs=0.02)
    # 1-D Gaussians: W2^2 = (m1 - m2)^2 + (s1 - s2)^2
    found = sliced_wasserstein(cloud(5000, 1, 1), 0.3 + 1.5 * cloud(5000, 2, 1), projections=4)
    assert found == pytest.approx(math.hypot(0.3, 0.5), abs=0.03)
    assert sliced_wasserstein(x, 2 * cloud(2000, 3)) == pytest.approx(1.0, abs=0.07)


def test_mode_shares():
    m = Mixture()
    share, near = mode_shares(m.means[[0, 0, 0, 5]].float(), m)
    assert share.tolist() == [0.75, 0, 0, 0, 0, 0.25, 0, 0]
    assert near == 1
    # 0.29 and 0.31 away; the limit is 0.3
    share, near = mode_shares(m.means.float() * torch.tensor([[1.29]] * 4 + [[1.31]] * 4), m)
    assert share.tolist() == [1 / 8] * 8
    assert near == 0.5
    assert mode_shares(torch.zeros(7, 2), m)[1] == 0


def test_picture_of_points(toy):
    x = torch.tensor([[0.0, 0.0], [5.0, 0.0], [-1.6001, 0.0], [float("nan"), 0.0]])
    picture = toy.to_pictures(x)
    assert picture.shape == (1, 1, 128, 128)
    assert picture.dtype == torch.uint8
    assert (picture != 255).sum() == 1  # points outside are left out, not drawn on the border
    assert toy.to_pictures(torch.full((3, 2), 9.0)).min() == 255

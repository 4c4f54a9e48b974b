"""msd.py: the router, one student is DMD2, what capacity buys in closed form, teacher score
matching, who is trained when and on whose labels."""

import pytest
import torch
from helpers import byhand
from helpers.gaussian import Gauss, f64, normal
from helpers.runs import log
from helpers.teachers import changed
from helpers.trace import Trace, weights

import dmd2
import msd
from common.errors import UserError
from common.features import ClassifierExtractor
from common.files import read_json
from common.metrics import distances, evaluate
from common.rng import BatchRandom
from common.routed import ByLabel
from common.schedules import EDM, VP, Flow, add_noise
from common.teachers.dit import DiT
from common.teachers.load import load_model, load_teacher
from common.teachers.toy import Toy
from data.images import Images, load_images

ONE = f64(1.0)


@pytest.fixture
def trace(monkeypatch, tmp_path):
    def run(*flags, script=msd, **kwargs):
        return Trace(monkeypatch, script, tmp_path / script.__name__, *flags, **kwargs)

    return run


# ---- (1): the router, and the plan of a run ------------------------------------------------------


def sizes(table):
    return torch.bincount(torch.tensor(table)).tolist()


@pytest.mark.parametrize(
    "labels, students, expected",
    [(1000, 4, [250] * 4), (8, 8, [1] * 8), (5, 1, [5]), (10, 4, [3, 2, 3, 2])],
)
def test_eq01_parts_of_the_labels(labels, students, expected):
    table = msd.partition(labels, students)
    assert table == [students * label // labels for label in range(labels)]
    assert sizes(table) == expected


def test_eq01_parts_differ_by_one_label_at_most():
    for labels in range(1, 40):
        for students in range(1, labels + 1):
            table = msd.partition(labels, students)
            assert len(table) == labels
            assert set(table) == set(range(students))
            assert max(sizes(table)) - min(sizes(table)) <= 1


PLANS = [(1, 1, 0, 0), (1000, 4, 0, 0), (1003, 4, 0.3, 0.27), (17, 3, 0, 1), (100, 7, 0.4, 0.5)]
PLANS += [(8, 8, 0, 0.5)]


@pytest.mark.parametrize("iters, students, tsm, adm", PLANS)
def test_plan_covers_every_iteration_once(iters, students, tsm, adm):
    pieces = msd.plan(iters, students, tsm, adm)
    covered = [it for first, end, _, _ in pieces for it in range(first, end)]
    assert covered == list(range(iters))
    order = [(k, msd.STAGES.index(stage)) for _, _, k, stage in pieces]
    assert order == sorted(order)
    assert sum(stage == "tsm" for *_, stage in pieces) == (tsm > 0)


@pytest.mark.parametrize("iters, students, tsm, adm", PLANS)
def test_plan_gives_students_equal_shares(iters, students, tsm, adm):
    pieces = msd.plan(iters, students, tsm, adm)

    def length(k, *stages):
        return sum(end - first for first, end, i, stage in pieces if i == k and stage in stages)

    lengths = [length(k, "dm", "adm") for k in range(students)]
    assert sum(lengths) == iters - round(tsm * iters)
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) > 0
    for k, n in enumerate(lengths):
        assert length(k, "adm") == round(adm * n)


# ---- one student is DMD2 -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--teacher toy",
        "--cfg 2 --ema 300 --warmup 4 --cooldown 0.5 --shift 0.5 --ratio 3",
        "--gan",
    ],
)
def test_one_student_is_dmd2(trace, flags):
    """Same seeds, same steps: equal bit for bit after every one of them."""
    common = ["--iters", 12, "--cooldown", 0]
    gan = ["--adm", 1, "--adm-lr", 1] if flags == "--gan" else flags.split()
    one = trace(*common, "--students", 1, *gan)
    other = trace(*common, *flags.split(), script=dmd2)
    assert len(one) == len(other)
    assert any(step.lr > 0 for step in one)
    for a, b in zip(one, other):
        assert a.lr == b.lr
        assert a.images == b.images
        assert torch.equal(a.after["student0"], b.after["student"])
        assert torch.equal(a.after["critic"][1:][: len(b.after["critic"])], b.after["critic"][1:])
    assert torch.equal(weights(one.ema.model.experts[0]), weights(other.ema.model))


def test_eq04_to_eq10_are_dmd2s_in_float64():
    x, x_t, logit = normal(6, 5), normal(6, 5, seed=1), normal(6, 1, seed=2)
    sigma = torch.linspace(0.1, 9, 6, dtype=torch.float64)
    args = (x, x_t, ONE.expand(6), sigma, {}, Gauss(0.3, 0.5), Gauss(-0.2, 0.7), 1.0)
    for a, b in zip(msd.dm_gradient(*args), dmd2.dm_gradient(*args), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float64
    assert msd.dm_loss(x, x_t) == dmd2.dm_loss(x, x_t)
    assert msd.fake_loss(x_t, x, sigma) == dmd2.fake_loss(x_t, x, sigma)
    assert msd.gen_loss(logit) == dmd2.gen_loss(logit)
    assert msd.cls_loss(logit, x) == dmd2.cls_loss(logit, x)


@pytest.mark.parametrize("shape", [(16, 8, 8), (16, 15, 26), (24,)])
def test_eq08_head_is_dmd2s(shape):
    feature = torch.randn(2, *shape)
    heads = []
    for script in (msd, dmd2):
        torch.manual_seed(0)
        heads.append(script.Head(feature))
    assert torch.equal(heads[0](feature), heads[1](feature))


SCHEDULES = dict(edm=EDM(), vp=VP(), flow=Flow(), shifted=Flow(shift=3.0))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_eq02_one_step_is_dmd2s(schedule):
    def net(x_t, alpha, sigma, cond):
        return torch.stack([x_t[:, 0] * 2, alpha.expand(3), sigma.expand(3)], 1)

    net.schedule = schedule
    z = normal(3, 4)
    x = msd.one_step(net, schedule, z, {})
    assert torch.equal(x, dmd2.sample(net, z, {}, 1, None))
    assert torch.equal(x, msd.sample(net, z, {}, 1, None))
    with pytest.raises(UserError, match="one pass"):
        msd.sample(net, z, {}, 2, None)


# ---- what capacity buys --------------------------------------------------------------------------


def strided(labels, students):
    return [label % students for label in range(labels)]


@pytest.mark.parametrize(
    "k, split, expected",
    [
        (1, msd.partition, 5.25),
        (2, msd.partition, 1.25),
        (4, msd.partition, 0.25),
        (8, msd.partition, 0.0),
        (2, strided, 5.0),
        (4, strided, 4.0),
    ],
)
def test_students_without_label_input(k, split, expected):
    """Teacher N(y, s^2), students a_k + s z with one number each and the exact critic. Descent
    along f - r ends at the mean of V_k, and the mean squared error is the variance within V_k: it
    falls with K if neighbours stay together, hardly if they do not."""
    table = torch.tensor(split(8, k))
    y = torch.arange(8.0, dtype=torch.float64)
    std, sigma = 0.5, 1.3 * ONE
    gain = sigma**2 / (std**2 + sigma**2)
    offset = torch.zeros(k, dtype=torch.float64)
    cond = dict(labels=torch.arange(8))
    for it in range(40):
        x = offset[table][:, None] + std * normal(8, 200, seed=it)
        x_t = add_noise(x, ONE, sigma, normal(8, 200, seed=100 + it))
        real, fake = Gauss(y, std), Gauss(offset[table], std)
        _, r, f, _ = msd.dm_gradient(x, x_t, ONE, sigma, cond, real, fake, 1.0)
        each = (f - r).mean(1)  # without noise
        assert torch.allclose(each, gain * (offset[table] - y), atol=1e-12)
        offset -= torch.stack([each[table == i].mean() for i in range(k)])
    assert (offset[table] - y).square().mean().item() == pytest.approx(expected, abs=1e-6)


# ---- (3): teacher score matching -----------------------------------------------------------------


def tsm_of(phi, teacher):
    torch.manual_seed(0)
    x_t, cond = torch.randn(8, 2), dict(labels=torch.arange(8))
    s = torch.linspace(0.1, 5, 8).double()
    prediction, target = phi(x_t, 1.0, s, cond), teacher(x_t, 1.0, s, cond)
    weight = teacher.native_loss_weight(1.0, s)
    loss = msd.tsm_loss(prediction, target, weight)
    loss.backward()
    by_hand = (weight[:, None] * (prediction - target).double() ** 2).mean()
    return loss, by_hand


def test_eq03_is_zero_for_a_copy():
    teacher = load_teacher("toy-cond").copy()  # the MLP
    phi = teacher.copy()
    loss, _ = tsm_of(phi, teacher)
    assert loss == 0
    assert all(p.grad.abs().max() == 0 for p in phi.parameters())


def test_eq03_trains_another_network_and_leaves_the_teacher_alone():
    teacher = load_teacher("toy-cond").copy()
    phi = teacher.copy(None, changed("width=16", "depth=2"))
    loss, by_hand = tsm_of(phi, teacher)
    assert loss > 0
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert any(p.grad.abs().max() > 0 for p in phi.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("sigma, gap", [(0.1, 0.00962), (1.0, 0.2), (10.0, 0.2494)])
def test_eq03_is_denoising_with_less_noise(sigma, gap):
    """Against denoising score matching on the same data: the same mean gradient, a loss that is
    lower by the posterior variance, less spread."""
    n, s = 200_000, f64(sigma)
    x = 0.2 + 0.5 * normal(n, 1)
    x_t = add_noise(x, ONE, s, normal(n, 1, seed=1))
    target = Gauss(0.2, 0.5)(x_t, ONE, s, {}).detach()
    slope = torch.full((n, 1), 0.3, dtype=torch.float64, requires_grad=True)
    shift = torch.full((n, 1), -0.1, dtype=torch.float64, requires_grad=True)
    grads, losses = [], []
    for y in (target, x):
        loss = msd.tsm_loss(slope * x_t + shift, y, ONE)
        grads.append([n * g for g in torch.autograd.grad(loss, (slope, shift))])
        losses.append(loss.item())
    assert losses[1] - losses[0] == pytest.approx(gap, abs=4e-4 + 2e-3 * sigma)
    for a, b in zip(*grads):
        error = 4 * (a - b).std().item() / n**0.5
        assert a.mean().item() == pytest.approx(b.mean().item(), abs=error)
    if sigma == 1:
        assert [g.mean().item() for g in grads[0]] == pytest.approx([0.154, -0.480], abs=5e-3)
        spread = [(a.std() / b.std()).item() for a, b in zip(*grads)]
        assert spread == pytest.approx([0.51, 0.24], abs=0.03)


# ---- (11): a run with all stages: tsm 6 iterations, then 3 x (4 dm + 4 adm) ----------------------

ALL = ["--iters", 30, "--students", 3, "--small", "width=8", "depth=2", "--tsm", 0.2]
ALL += ["--adm", 0.5, "--ratio", 2, "--cfg", 2]
PIECES = msd.plan(30, 3, 0.2, 0.5)


def iterations_of(steps, ratio=2):
    """[(it, k, stage, its steps)] of a run with all stages."""
    rest = iter(steps)
    found = []
    for it in range(30):
        _, _, k, stage = msd.piece_at(PIECES, it)
        n = 2 if stage != "tsm" and it % ratio == 0 else 1
        found.append((it, k, stage, [next(rest) for _ in range(n)]))
    assert next(rest, None) is None
    return found


def watch(trace):
    """The critic without its head, which is there or not, and the head."""
    named = dict(critic=trace.critic.fake)
    if trace.critic.head is not None:
        named["head"] = trace.critic.head
    return named


def test_the_plan_of_the_run_with_all_stages():
    stages = [(end - first, k, stage) for first, end, k, stage in PIECES]
    assert stages == [(6, 0, "tsm")] + [(4, k, stage) for k in range(3) for stage in ("dm", "adm")]


def test_eq11_who_is_trained_when(trace):
    """Every weight of the network whose turn it is gets a gradient and moves; no other does."""
    steps = trace(*ALL, watch=watch)
    seen = set()
    for it, k, stage, turns in iterations_of(steps):
        for step in turns:
            is_student = step.role == f"student{k}"
            expected = {f"student{k}"}
            if not is_student:
                expected = {"critic", "head"} if stage == "adm" else {"critic"}
            moved = {name for name in step.before if step.moved(name)}
            assert moved == expected, it
            for name, grads in step.grads.items():
                assert [g is not None for g in grads] == [name in expected] * len(grads), (it, name)
            seen.add((k, stage, is_student))
    both = {(k, stage, turn) for k in range(3) for stage in ("dm", "adm") for turn in (0, 1)}
    assert seen == {(0, "tsm", True)} | both
    assert not any(p.requires_grad for p in steps.teacher.parameters())


def test_eq02_eq10_whose_labels(trace):
    """tsm uses images of all labels; a student's samples and images have its own labels."""
    steps = trace(*ALL, record=[(Toy, "encode")])
    calls = [torch.as_tensor(call.args[1]).tolist() for call in steps.calls["encode"]]
    batches = iter([labels for labels in calls if len(labels) == 16])
    table = msd.partition(8, 3)
    for it in range(30):
        _, _, k, stage = msd.piece_at(PIECES, it)
        for _ in range(2 if stage == "adm" else 1):  # images first, then samples
            labels = set(next(batches))
            if stage == "tsm":
                assert len(labels) > 5
            else:
                assert {table[label] for label in labels} == {k}
    assert next(batches, None) is None


def test_what_a_stage_starts_from(trace):
    """Small students from phi, critics from the teacher, the adversarial stage from where the
    first one ended; moments, head and learning rates anew."""
    rates = ["--warmup", 3, "--lr", 1e-3, "--tsm-lr", 7e-4]
    steps = trace(*ALL, "--ema", 40, *rates, watch=watch)
    iterations = iterations_of(steps)
    before = {it: turns[0].before for it, _, _, turns in iterations}
    after = {it: turns[-1].after for it, _, _, turns in iterations}
    phi = before[6]["student0"]
    teacher = weights(load_teacher("toy-cond"))
    assert not torch.equal(phi, before[0]["student0"])
    assert not torch.equal(phi, after[5]["student0"])  # phi is the average
    for k in range(3):
        assert torch.equal(before[6][f"student{k}"], phi)
    assert steps[0].lr == pytest.approx(7e-4 / 3)

    for k, first in enumerate((6, 14, 22)):
        assert torch.equal(before[first][f"student{k}"], phi)
        assert torch.equal(before[first]["critic"], teacher)
        assert not torch.equal(after[first + 3]["critic"], teacher)
        assert torch.equal(before[first + 4]["critic"], after[first + 3]["critic"])
        assert torch.equal(before[first]["head"], before[first + 4]["head"])
        for start, lr in ((first, 1e-3), (first + 4, 2.5e-4)):
            step = iterations[start][3][0]
            assert step.role == f"student{k}"
            assert step.moments == 0
            assert step.images == 0
            assert step.lr == pytest.approx(lr / 3)


def test_a_finished_student_is_its_average(trace):
    steps = trace(*ALL, "--ema", 40)
    last = steps[-1].after
    for k in range(2):
        assert torch.equal(weights(steps.ema.model.experts[k]), last[f"student{k}"])
    assert not torch.equal(weights(steps.ema.model.experts[2]), last["student2"])


def test_eq03_first_gradient_by_hand(trace):
    """Images of all labels, all levels, the exact teacher as the target (its copies are only near
    it), the teacher's own weight."""
    steps = trace(*ALL)
    teacher, draw = load_teacher("toy-cond"), BatchRandom(0, 0, 16)
    phi = teacher.copy(None, changed("width=8", "depth=2"))
    x, labels = load_images(None, teacher).batch(0, 16)
    s = teacher.schedule.grid(1000)[draw.randint(0, 1000)]
    x_t = (x + s[:, None] * draw.randn(2)).float()
    weight = (s**2 + 0.714**2) / (0.714 * s) ** 2
    target = teacher.mixture.x0(x_t, ONE, s, labels)
    error = phi(x_t, ONE, s, dict(labels=labels)) - target
    (weight[:, None] * error**2).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in phi.parameters()])
    found = torch.cat([g.flatten() for g in steps[0].grads["student0"]])
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_eq02_labels_are_uniform_on_the_part(trace):
    flags = ["--iters", 4, "--students", 2, "--batch", 10_000, "--ratio", 1]
    steps = trace(*flags, record=[(Toy, "encode")])
    calls = [torch.as_tensor(call.args[1]) for call in steps.calls["encode"]]
    batches = [labels for labels in calls if len(labels) == 10_000]
    assert len(batches) == 4
    for it, labels in enumerate(batches):
        own = [0, 1, 2, 3] if it < 2 else [4, 5, 6, 7]
        counts = torch.bincount(labels, minlength=8)[own].tolist()
        assert counts == pytest.approx([2500] * 4, abs=200)


def test_students_do_not_meet(trace, monkeypatch):
    """Student 1 is the same whatever student 0 learns: its draws depend on the iteration only."""
    flags = ["--iters", 12, "--students", 2, "--cfg", 2]
    good = trace(*flags)
    calls = []

    def spoils_student_0(x, g, right=msd.dm_loss):
        calls.append(1)
        return right(x, -3 * g if len(calls) <= 2 else g)

    monkeypatch.setattr(msd, "dm_loss", spoils_student_0)
    spoiled = trace(*flags)
    assert not torch.equal(good[-1].after["student0"], spoiled[-1].after["student0"])
    assert torch.equal(good[-1].after["student1"], spoiled[-1].after["student1"])


# ---- whole iterations by hand --------------------------------------------------------------------


class Hand:
    """(1) to (11) from the docstring, on 2-D points with labels 0 to 7 and 8 for none.

    pieces: (first, end, student, stage) of the run's plan.
    """

    def __init__(self, trace, pieces, **case):
        fixed = dict(w=1.0, shift=1.0, ratio=2, gan=(0.7, 0.4), table=[0, 0, 0, 1, 1, 1, 2, 2])
        self.trace, self.pieces = trace, pieces
        vars(self).update(fixed | case)
        self.table = torch.tensor(self.table)  # (1)
        self.schedule = trace.teacher.schedule
        self.last = self.schedule.t_max  # time 999 of the grid
        self.images = load_images(None, trace.teacher)
        self.optimisers, self.logs = {}, []

    def level(self, i):
        """alpha, sigma and lambda at grid indices i, with the ratio of the two times `shift`."""
        alpha, sigma = torch.ones(len(i), dtype=torch.float64), None
        if isinstance(self.schedule, EDM):
            ramp = torch.linspace(0.01 ** (1 / 7), 20 ** (1 / 7), 1000, dtype=torch.float64)
            sigma = (self.shift * ramp[i] ** 7).clamp(0.01, 20)
            weight = (sigma**2 + 0.714**2) / (sigma * 0.714) ** 2
        elif isinstance(self.schedule, VP):
            beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            ratio = (1 / (1 - beta).cumprod(0) - 1).sqrt()
            ratio = (self.shift * ratio[i]).clamp(ratio[0], ratio[-1])
            alpha = (1 + ratio**2) ** -0.5
            sigma, weight = ratio * alpha, ratio**-2
        else:
            u = (i + 1).double() / 1000
            ratio = self.shift * u / (1 - u)
            sigma = torch.where(u == 1, 1.0, ratio / (1 + ratio))
            alpha, weight = 1 - sigma, sigma**-2
        return alpha, sigma, weight

    def noised(self, x, i, eps):
        alpha, sigma, weight = self.level(i)
        return (alpha[:, None] * x + sigma[:, None] * eps).float(), alpha, sigma, weight

    def real(self, it, rows):
        own = Images(self.images.images[rows], self.images.labels[rows], self.images.names)
        return own.batch(it, 16, 3)

    def losses(self, it):
        first, end, k, stage = next(piece for piece in self.pieces if it < piece[1])
        role = f"student{k}"
        rates = dict(tsm=(5e-3, 0.0), dm=(3e-3, 2e-3), adm=(1.2e-3, 0.8e-3))[stage]
        if it == first:  # a stage has its own optimisers
            for name, lr in zip((role, "critic"), rates):
                lr = byhand.rates(lr, end - first, warmup=1, cooldown=0.9)
                if name == role and stage != "tsm":
                    lr = lr[-first % self.ratio :: self.ratio]
                self.optimisers[name] = byhand.AdamW(lr, (0.3, 0.8), 0.1, 0.1)
        draw, logs = BatchRandom(3, it, 16), dict(student=k)
        teacher, critic = self.trace.teacher, self.trace.critic
        student = self.trace.networks()[role]

        if stage == "tsm":
            x, labels = self.real(it, torch.arange(len(self.images)))
            x_t, *level, weight = self.noised(x, draw.randint(0, 1000), draw.randn(2))
            cond = dict(labels=labels)
            error = student(x_t, *level, cond) - teacher(x_t, *level, cond)
            loss = (weight[:, None] * error**2).mean()  # (3)
            self.logs.append(dict(student=k, tsm=loss))
            return {role: loss}

        own = (self.table == k).nonzero()[:, 0]
        cond = dict(labels=own[draw.randint(0, len(own))])
        z, one = draw.randn(2), torch.ones(16, dtype=torch.float64)
        alpha, sigma = self.schedule.alpha(self.last), self.schedule.sigma(self.last)
        x_in = z if isinstance(self.schedule, VP) else sigma.float() * z
        x = student(x_in, alpha * one, sigma * one, cond)  # (2)
        losses = {}
        if it % self.ratio == 0:
            x_t, *level, _ = self.noised(x.detach(), draw.randint(20, 981), draw.randn(2))
            c = teacher(x_t, *level, cond)
            null = teacher(x_t, *level, dict(labels=torch.full((16,), 8)))
            r, f = null + self.w * (c - null), critic.fake(x_t, *level, cond)  # (4)
            norm = (x - r).abs().mean(1, keepdim=True)
            g = ((f - r) / norm).detach()  # (5)
            losses[role] = (x * g).mean()  # the gradient of (6)
            gaps = [(x - a).square().mean() for a in (r, f)]
            logs |= dict(dm=(g**2).mean() / 2, dm_norm=norm.mean())
            logs |= dict(real_gap=gaps[0], fake_gap=gaps[1])
            if stage == "adm":
                x_t, *level, _ = self.noised(x, draw.randint(0, 1000), draw.randn(2))
                logit = critic.head(critic.fake(x_t, *level, cond, features=True)[-1])  # (8)
                logs["gen"] = (1 + (-logit).exp()).log().mean()  # (9)
                losses[role] = losses[role] + self.gan[0] * logs["gen"]  # (11)

        x = x.detach()
        x_t, *level, weight = self.noised(x, draw.randint(0, 1000), draw.randn(2))
        error = critic.fake(x_t, *level, cond) - x
        losses["critic"] = logs["fake"] = (weight[:, None] * error**2).mean()  # (7)
        logs |= dict(mean=x.mean(), std=x.std())
        if stage == "adm":
            x_real, labels = self.real(it, torch.isin(self.images.labels, own))
            i, i_real = draw.randint(0, 1000), draw.randint(0, 1000)
            x_t, *level, _ = self.noised(x, i, draw.randn(2))
            fake = critic.head(critic.fake(x_t, *level, cond, features=True)[-1])  # (8)
            x_t, *level, _ = self.noised(x_real, i_real, draw.randn(2))
            real = dict(labels=labels)
            real = critic.head(critic.fake(x_t, *level, real, features=True)[-1])
            logs["cls"] = (1 + fake.exp()).log().mean() + (1 + (-real).exp()).log().mean()  # (10)
            logs |= dict(logit_fake=fake.mean(), logit_real=real.mean())
            losses["critic"] = losses["critic"] + self.gan[1] * logs["cls"]  # (11)
        self.logs.append(logs)
        return losses


def in_turn(first, lengths):
    """Pieces of a plan from iteration `first` on. lengths: {stage: iterations} of each student."""
    pieces = []
    for k in range(3):
        for stage, n in lengths.items():
            pieces.append((first, first + n, k, stage))
            first += n
    return pieces


BY_HAND = {
    "--iters 6 --cfg 2.5 --shift 0.3": dict(pieces=in_turn(0, dict(dm=2)), w=2.5, shift=0.3),
    "--iters 14 --adm 0.5 --tsm 0.15 --small width=8 depth=2 --cfg 2 --shift 1.5": dict(
        pieces=[(0, 2, 0, "tsm"), *in_turn(2, dict(dm=2, adm=2))],
        w=2.0,
        shift=1.5,
        kind="vp",
    ),
    "--iters 9 --ratio 3 --adm 1 --cfg 0 --lora 4 --lora-fake 2": dict(
        pieces=in_turn(0, dict(adm=3)), w=0.0, ratio=3, kind="flow"
    ),
}


@pytest.mark.parametrize("flags", BY_HAND)
def test_whole_iterations_by_hand(trace, monkeypatch, tmp_path, flags):
    """(1) to (11): gradients of students, critic and head in all stages, AdamW's updates, the
    average of the last student, and what the log says."""
    common = "--students 3 --ratio 2 --seed 3 --lr 3e-3 --lr-fake 2e-3 --tsm-lr 5e-3 --adm-lr 0.4 "
    common += " --betas 0.3 0.8 --weight-decay 0.1 --clip 0.1 --warmup 1 --cooldown 0.9 --ema 1"
    common += " --gan-weight 0.7 --cls-weight 0.4"
    case = dict(BY_HAND[flags])
    teacher = byhand.any_toy(case.pop("kind", "edm"))
    monkeypatch.setattr(msd, "load_teacher", lambda *args, **kwargs: teacher)
    byhand.start_awake(monkeypatch)
    wrapped = byhand.wrap_trained(monkeypatch)
    flags = [*common.split(), *flags.split()]
    make_head, seeds = msd.Head, []

    def noted(feature):
        seeds.append(torch.initial_seed())
        return make_head(feature)

    monkeypatch.setattr(msd, "Head", noted)
    steps = trace(*flags, record=[(Toy, "resized")])
    assert all(call.args[1]["seed"] == 3 for call in steps.calls["resized"])
    hand = Hand(steps, **case)
    iters = hand.pieces[-1][1]
    assert byhand.compare_iterations(steps, hand.losses, hand.optimisers, 1e-4) == iters
    lines = log(tmp_path / "msd")
    byhand.compare_logs(lines, hand.logs)
    rates = dict(tsm=(5e-3, 0.0), dm=(3e-3, 2e-3), adm=(1.2e-3, 0.8e-3))
    for first, end, _, stage in hand.pieces:
        for name, lr in zip(("lr", "lr_fake"), rates[stage]):
            lr = byhand.rates(lr, end - first, warmup=1, cooldown=0.9)
            assert [line[name] for line in lines[first:end]] == pytest.approx(lr, rel=1e-5)

    # a head is made at first, and for every stage after the first: equal on all processes
    if steps.critic.head is not None:
        assert seeds == [3] + [3 + k for _, _, k, _ in hand.pieces[1:]]

    # gradients flow through what run.train returns, other passes do not
    calls = []
    for first, end, _, stage in hand.pieces:
        turns = sum(stage == "tsm" or it % hand.ratio == 0 for it in range(first, end))
        calls += [turns, dict(tsm=0, dm=end - first, adm=2 * (end - first))[stage]]
    assert [net.calls for net in wrapped] == [{True: n, False: 0} for n in calls]


# ---- the students as one model -------------------------------------------------------------------


def three_students():
    teacher = load_teacher("toy-cond")
    experts = [teacher.copy() for _ in range(3)]
    for i, expert in enumerate(experts):
        for p in expert.parameters():
            p.data += 0.1 * i
    return teacher, ByLabel(experts, msd.partition(8, 3))


def test_eq01_a_mixed_batch_keeps_its_order():
    teacher, student = three_students()
    labels = torch.randperm(64, generator=torch.Generator().manual_seed(0)) % 8
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    x = msd.sample(student, z, teacher.encode(labels), 1, None)
    assert not x.requires_grad
    for label in range(8):
        rows = labels == label
        k = student.table[label]
        cond = teacher.encode(labels[rows])
        own = msd.sample(student.experts[k], z[rows], cond, 1, None)
        other = msd.sample(student.experts[(k + 1) % 3], z[rows], cond, 1, None)
        assert torch.allclose(x[rows], own, atol=1e-6)
        assert not torch.allclose(x[rows], other, atol=1e-3)


@pytest.mark.parametrize("small", [[], ["width=16", "depth=2"]], ids=["same", "small"])
@pytest.mark.parametrize("w, is_zero", [(1.0, True), (3.0, False)])
def test_eq05_the_critic_has_to_move_first(small, w, is_zero):
    """While the critic equals the teacher there is no gradient without guidance."""
    teacher = load_teacher("toy-cond").copy()
    student = teacher.copy(None, changed(*small) if small else None)
    cond = teacher.encode(torch.arange(8))
    s = torch.linspace(0.1, 9, 8).double()
    x = msd.one_step(student, student.schedule, torch.randn(8, 2), cond)
    x_t = add_noise(x.detach(), ONE, s, torch.randn(8, 2))
    g = msd.dm_gradient(x, x_t, ONE.expand(8), s, cond, teacher, teacher.copy(), w)[0]
    msd.dm_loss(x, g).backward()
    assert (g.abs().max() == 0) == is_zero
    assert (max(p.grad.abs().max() for p in student.parameters()) == 0) == is_zero


# ---- --small: students of another size -----------------------------------------------------------


@pytest.fixture
def transformer():
    config = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=4,
    )
    return DiT(DiT.network(config), Flow(), "flow", (1, 8, 8), 4)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_small_students_of_a_transformer(transformer):
    half = transformer.copy(None, changed("num_layers=2"))
    narrow = transformer.copy(None, changed("num_layers=2", "num_attention_heads=1"))
    assert count(half) == count(transformer) - count(transformer.net.transformer_blocks) // 2
    assert count(narrow) < count(half)
    assert transformer.net.config.num_layers == 4
    assert all(p.requires_grad for p in half.parameters())
    again = transformer.copy(None, changed("num_layers=2"))
    assert torch.equal(weights(half), weights(again))


def test_small_students_are_saved(transformer, tmp_path):
    small = transformer.copy(None, changed("num_layers=2"))
    ByLabel([small, small.copy()], msd.partition(4, 2)).save(tmp_path, {})
    loaded = load_model(tmp_path, read_json(tmp_path / "distill.json")["model"])
    x, cond = torch.randn(4, 1, 8, 8), small.encode(torch.arange(4))
    assert torch.allclose(loaded(x, 0.5, 0.5, cond), small(x, 0.5, 0.5, cond), atol=1e-6)
    assert loaded.table == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "change, expected",
    [
        ("layers=2", "did you mean num_layers"),
        ("num_layers=x", "no network"),
        ("sample_size=16", "found one for"),
        ("num_layers", "no network"),
    ],
)
def test_wrong_changes_of_the_configuration(transformer, change, expected):
    with pytest.raises(UserError, match=expected):
        transformer.copy(None, changed(change))


# ---- metrics of each student ---------------------------------------------------------------------


def test_metrics_of_each_student():
    """On the same samples as the joint number. A student that is wrong is found although the
    others are right, and does not change their numbers."""
    teacher = load_teacher("toy-cond")

    def third_student_is_off(model, z, cond, noise):
        third = model.route(len(z), 1, 1, cond) == 2
        means = teacher.mixture.means[cond["labels"]].float()
        return means + 0.1 * z + 0.3 * third[:, None]

    model = ByLabel([teacher.copy() for _ in range(4)], msd.partition(8, 4))
    result = evaluate(third_student_is_off, model, teacher, n=2000)
    parts = result["experts"]
    assert [p["expert"] for p in parts] == [0, 1, 2, 3]
    assert [p["labels"] for p in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [p["n"] for p in parts] == [500] * 4
    assert parts[2]["energy_distance"] > 0.1
    for k in (0, 1, 3):
        assert abs(parts[k]["energy_distance"]) < 0.01

    joint = lambda _, z, cond, noise: third_student_is_off(model, z, cond, noise)
    alone = evaluate(joint, teacher, teacher, n=2000)
    assert alone["energy_distance"] == result["energy_distance"]
    assert "experts" not in alone


def test_reference_of_a_students_labels():
    teacher = load_teacher("mnist")
    images = load_images(None, teacher)
    extractor = ClassifierExtractor(teacher)
    part = extractor.for_labels([3, 4])
    rows = (images.labels == 3) | (images.labels == 4)
    own = torch.cat([extractor(batch)[0] for batch in images.images[rows].split(500)])
    assert part.reference["n"] == int(rows.sum())
    assert part.reference["mu"] == pytest.approx(own.double().mean(0).numpy(), abs=1e-6)
    found = distances(part, own)
    assert found["fd"] < 1e-3
    assert found["precision"] == 1
    assert found["recall"] == 1
    assert extractor.reference["n"] == 5000  # unchanged


def test_no_reference_of_a_students_labels_if_only_statistics_are_known():
    extractor = ClassifierExtractor(load_teacher("mnist"))
    extractor.set_reference(extractor.reference, "a file")
    assert extractor.for_labels([3, 4]) is None


# ---- broken on purpose: each must fail the test beside it ----------------------------------------


def reversed_router(student, n, alpha, sigma, cond):
    return torch.tensor(student.table[::-1])[cond["labels"]]


def swapped_gradient(*args, right=msd.dm_gradient):
    g, r, f, norm = right(*args)
    return -g, f, r, norm


def every_label(labels, students):
    return [(label + 1) % students for label in range(labels)]


def test_a_wrong_router_is_found(monkeypatch):
    monkeypatch.setattr(ByLabel, "route", reversed_router)
    with pytest.raises(AssertionError):
        test_eq01_a_mixed_batch_keeps_its_order()


def test_a_missing_stop_gradient_is_found(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "detach", lambda x: x)
    with pytest.raises((AssertionError, RuntimeError)):
        test_eq03_trains_another_network_and_leaves_the_teacher_alone()


def test_a_wrong_sign_of_eq05_is_found(monkeypatch):
    monkeypatch.setattr(msd, "dm_gradient", swapped_gradient)
    with pytest.raises(AssertionError):
        test_students_without_label_input(4, strided, 4.0)


def test_another_partition_is_found(monkeypatch):
    monkeypatch.setattr(msd, "partition", every_label)
    with pytest.raises(AssertionError):
        test_eq01_parts_of_the_labels(10, 4, [3, 2, 3, 2])

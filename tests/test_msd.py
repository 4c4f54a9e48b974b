"""Invariants of MSD (arXiv 2410.23274): the router, one student = DMD2, what capacity buys in closed form, teacher score matching, who is trained when."""

import json
import signal
import sys

import pytest
import torch
import torch.nn as nn

import dmd2
import msd
from common import data, metrics
from common import features as features_module
from common.errors import UserError
from common.features import ClassifierExtractor
from common.rng import BatchRandom
from common.routed import ByLabel, Routed
from common.run import Run
from common.schedules import EDM, VP, Flow, expand
from common.teachers.dit import DiT
from common.teachers.load import load_model, load_teacher
from common.teachers.toy import Toy

ONE = torch.ones((), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Gauss(nn.Module):
    """Optimal denoiser of data N(mean[label], std^2 I) at VE levels."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.as_tensor(mean, dtype=torch.float64)), std

    def forward(self, x_t, alpha, sigma, cond):
        s, m = (
            expand(sigma, x_t),
            self.mean if self.mean.ndim == 0 else self.mean[cond["labels"]][:, None],
        )
        return ((self.std**2 * x_t + s**2 * m) / (self.std**2 + s**2)).to(x_t.dtype)

    def guided(self, x_t, alpha, sigma, cond, w):
        return self(x_t, alpha, sigma, cond)


# ---- 10.1: the partition, which is the router ------------------------------------------------------------------------------------------------


def sizes(table):
    return torch.bincount(torch.tensor(table)).tolist()


def test_partition():
    assert (
        sizes(msd.partition(1000, 4)) == [250] * 4
        and msd.partition(8, 8) == list(range(8))
        and msd.partition(5, 1) == [0] * 5
    )
    assert sizes(msd.partition(10, 4)) == [3, 2, 3, 2] and msd.partition(10, 4) == [
        4 * y // 10 for y in range(10)
    ]
    for labels in range(1, 40):
        for k in range(1, labels + 1):
            for how in ("contiguous", "random"):
                table = msd.partition(labels, k, how, seed=3)
                assert (
                    len(table) == labels
                    and set(table) == set(range(k))
                    and max(sizes(table)) - min(sizes(table)) <= 1
                )
    a, b, c = (msd.partition(100, 4, "random", seed) for seed in (0, 0, 1))
    assert a == b != c and a != msd.partition(100, 4)


@pytest.mark.parametrize(
    "iters, students, tsm, adm",
    [
        (1, 1, 0, 0),
        (1000, 4, 0, 0),
        (1003, 4, 0.3, 0.27),
        (17, 3, 0, 1),
        (100, 7, 0.4, 0.5),
        (8, 8, 0, 0.5),
    ],
)
def test_plan_covers_every_iteration_once(iters, students, tsm, adm):
    pieces = msd.plan(iters, students, tsm, adm)
    assert [it for a, b, _, _ in pieces for it in range(a, b)] == list(range(iters))
    length = [
        sum(b - a for a, b, i, stage in pieces if i == k and stage != "tsm")
        for k in range(students)
    ]
    assert (
        sum(length) == iters - round(tsm * iters)
        and max(length) - min(length) <= 1
        and min(length) > 0
    )
    order = [(k, msd.STAGES.index(stage)) for _, _, k, stage in pieces]
    assert order == sorted(order) and sum(stage == "tsm" for *_, stage in pieces) == (tsm > 0)
    for k, n in enumerate(length):
        assert sum(b - a for a, b, i, stage in pieces if (i, stage) == (k, "adm")) == round(adm * n)


# ---- 10.2: one student is DMD2 -----------------------------------------------------------------------------------------------------------------


class Trace(list):
    """main() of a script in this process on the toy teacher. One entry per optimiser step: weights of all networks before and after, learning rate."""

    def __init__(self, monkeypatch, tmp_path, script, *flags):
        super().__init__()
        self.asked, self.labels, self.made = [], [], {}
        self.script = script
        for module, name, key in (
            (script, "Critic", "critic"),
            (script, "EMA", "ema"),
            (models, "load_teacher", "teacher"),
        ):
            self.keep(monkeypatch, module, name, key)
        step, encode, start = Run.step, Toy.encode, Run.draw
        monkeypatch.setattr(Run, "step", lambda run, opt, clip: self.step(step, run, opt, clip))
        monkeypatch.setattr(
            Toy,
            "encode",
            lambda net, labels: self.labels.append(torch.as_tensor(labels)) or encode(net, labels),
        )
        monkeypatch.setattr(Run, "draw", lambda run, it: self.begin(it) or start(run, it))
        for name in ("export", "pictures", "report"):
            monkeypatch.setattr(metrics, name, lambda *a, **k: None)
        default = [
            "--teacher",
            "toy-cond",
            "--batch",
            "16",
            "--out",
            str(tmp_path / script.__name__),
            "--overwrite",
            "--save-every",
            "0",
            "--sample-every",
            "0",
        ]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *default, *map(str, flags)])
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            script.main()
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
            monkeypatch.undo()

    def keep(self, monkeypatch, module, name, key):
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: self.made.setdefault(key, make(*a, **k)))

    def begin(self, it):
        self.it, self.labels = it, []

    def nets(self):
        student = self.made["ema"].live
        experts = (
            {f"student{k}": e for k, e in enumerate(student.experts)}
            if isinstance(student, Routed)
            else dict(student0=student)
        )
        return (
            experts
            | dict(critic=self.made["critic"].fake, teacher=self.made["teacher"])
            | ({"head": h} if (h := self.made["critic"].head) else {})
        )

    def weights(self):
        return {
            k: torch.cat([p.detach().flatten() for p in net.parameters()])
            for k, net in self.nets().items()
        }

    def step(self, step, run, opt, clip):
        grads = {
            k: [None if p.grad is None else p.grad.clone() for p in net.parameters()]
            for k, net in self.nets().items()
        }
        before, labels, moments = self.weights(), self.labels, len(opt.state)
        norm = step(run, opt, clip)
        self.append(
            dict(
                it=self.it,
                lr=opt.param_groups[0]["lr"],
                grads=grads,
                before=before,
                after=self.weights(),
                labels=labels,
                images=self.made["ema"].images,
                moments=moments,
            )
        )
        return norm


@pytest.fixture
def trace(monkeypatch, tmp_path):
    return lambda *flags, script=msd: Trace(monkeypatch, tmp_path, script, *flags)


@pytest.mark.parametrize(
    "flags",
    ["--teacher toy", "--cfg 2 --ema 300 --warmup 4 --cooldown 0.5 --shift 0.5 --ratio 3", "--gan"],
)
def test_one_student_is_dmd2(trace, flags):
    """Same seeds, same steps: equal bit for bit after every one of them, which is inside 1e-6."""
    gan = ["--adm", 1, "--adm-lr", 1] if flags == "--gan" else flags.split()
    steps = ["--iters", 12, "--cooldown", 0]
    one, two = trace(*steps, "--students", 1, *gan), trace(*steps, *flags.split(), script=dmd2)
    assert len(one) == len(two) and any(s["lr"] > 0 for s in one)
    for a, b in zip(one, two):
        assert a["lr"] == b["lr"] and a["images"] == b["images"]
        for k in b["after"]:
            assert torch.equal(a["after"][k], b["after"][k]), (a["it"], k)
    ema = one.made["ema"].model.experts[0].parameters(), two.made["ema"].model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(*ema))


def test_losses_are_those_of_dmd2_in_float64():
    x, x_t, y = normal(6, 5), normal(6, 5, seed=1), normal(6, 1, seed=2)
    real, fake, s = (
        Gauss(0.3, 0.5),
        Gauss(-0.2, 0.7),
        torch.linspace(0.1, 9, 6, dtype=torch.float64),
    )
    for a, b in zip(
        msd.dm_gradient(x, x_t, ONE, s, {}, real, fake, 1.0),
        dmd2.dm_gradient(x, x_t, ONE, s, {}, real, fake, 1.0),
    ):
        assert (a - b).abs().max() < 1e-12 and a.dtype == torch.float64
    for a, b in (
        (msd.dm_loss(x, x_t), dmd2.dm_loss(x, x_t)),
        (msd.gen_loss(y), dmd2.gen_loss(y)),
        (msd.cls_loss(y, x), dmd2.cls_loss(y, x)),
        (msd.fake_loss(fake, x, x_t, ONE, s, {}, s), dmd2.fake_loss(fake, x, x_t, ONE, s, {}, s)),
        (msd.renoise(x, ONE, s, x_t), dmd2.renoise(x, ONE, s, x_t)),
    ):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize(
    "schedule", [EDM(), VP(), Flow(), Flow(shift=3.0)], ids=["edm", "vp", "flow", "shifted"]
)
def test_one_step_is_dmd2s(schedule):
    net = lambda x_t, alpha, sigma, cond: torch.stack(
        [x_t[:, 0] * 2, alpha.expand(3), sigma.expand(3)], 1
    )
    net.schedule, z = schedule, normal(3, 4)
    x = msd.one_step(net, schedule, z, {})
    assert torch.equal(x, dmd2.sample(net, z, {}, 1, None)) and torch.equal(
        msd.sample(net, z, {}, 1, None), x
    )
    with pytest.raises(UserError, match="one pass"):
        msd.sample(net, z, {}, 2, None)


# ---- 10.3: what capacity buys --------------------------------------------------------------------------------------------------------------------

STRIDED = lambda labels, k: [y % k for y in range(labels)]
SPLITS = [
    (1, msd.partition, 5.25),
    (2, msd.partition, 1.25),
    (4, msd.partition, 0.25),
    (8, msd.partition, 0.0),
    (2, STRIDED, 5.0),
    (4, STRIDED, 4.0),
]


@pytest.mark.parametrize("k, split, expected", SPLITS)
def test_students_without_label_input(k, split, expected):
    """Teacher N(y, s^2), students a_k + s z with one number each and the exact critic: descent along f - r ends at the mean of V_k, and the mean squared
    error is the variance within V_k. It falls with K if neighbours stay together, hardly if they do not."""
    table, y, std = torch.tensor(split(8, k)), torch.arange(8.0, dtype=torch.float64), 0.5
    offset, real = torch.zeros(k, dtype=torch.float64), Gauss(y, std)
    gain = 1.3**2 / (std**2 + 1.3**2)
    for it in range(40):
        x = offset[table][:, None] + std * normal(8, 200, seed=it)
        x_t = msd.renoise(x, ONE, 1.3 * ONE, normal(8, 200, seed=100 + it))
        _, r, f, _ = msd.dm_gradient(
            x,
            x_t,
            ONE,
            1.3 * ONE,
            dict(labels=torch.arange(8)),
            real,
            Gauss(offset[table], std),
            1.0,
        )
        each = (f - r).mean(1)  # = gain (a - y), without noise
        assert torch.allclose(each, gain * (offset[table] - y), atol=1e-12)
        offset -= torch.stack([each[table == i].mean() for i in range(k)])
    assert (offset[table] - y).square().mean().item() == pytest.approx(expected, abs=1e-6)


# ---- 10.4, 10.5: teacher score matching ------------------------------------------------------------------------------------------------------------


def test_tsm_is_zero_for_a_copy_and_leaves_the_teacher_alone():
    torch.manual_seed(0)
    teacher = load_teacher("toy-cond").copy()  # the MLP
    phi, cond, s = teacher.copy(), dict(labels=torch.arange(8)), torch.linspace(0.1, 5, 8).double()
    x_t = torch.randn(8, 2)
    loss = msd.tsm_loss(
        phi(x_t, 1.0, s, cond), teacher(x_t, 1.0, s, cond), teacher.native_loss_weight(1.0, s)
    )
    loss.backward()
    assert loss == 0 and all(p.grad.abs().max() == 0 for p in phi.parameters())
    other = teacher.resized(["width=16", "depth=2"])
    loss = msd.tsm_loss(
        other(x_t, 1.0, s, cond), teacher(x_t, 1.0, s, cond), teacher.native_loss_weight(1.0, s)
    )
    loss.backward()
    assert (
        loss > 0
        and any(p.grad.abs().max() > 0 for p in other.parameters())
        and all(p.grad is None for p in teacher.parameters())
    )
    by_hand = (
        teacher.native_loss_weight(1.0, s)[:, None]
        * (other(x_t, 1.0, s, cond) - teacher(x_t, 1.0, s, cond)).double() ** 2
    ).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_first_tsm_gradient_by_hand(trace):
    """Images of all labels, all levels, the exact teacher as the target (its critic-to-be is only near it), the teacher's own weight."""
    steps = trace(*ALL)
    teacher, draw = load_teacher("toy-cond"), BatchRandom(0, 0, 16)
    phi, (x, labels) = (
        teacher.resized(["width=8", "depth=2"], seed=0),
        data.load_images(None, teacher).batch(0, 16),
    )
    s = teacher.schedule.grid(1000)[draw.randint(0, 1000)]
    x_t, cond = (x + s[:, None] * draw.randn(2)).float(), dict(labels=labels)
    (
        ((s**2 + 0.714**2) / (0.714 * s) ** 2)[:, None]
        * (phi(x_t, ONE, s, cond) - teacher.mixture.x0(x_t, ONE, s, labels)) ** 2
    ).mean().backward()
    found, expected = (
        torch.cat([g.flatten() for g in grads])
        for grads in (steps[0]["grads"]["student0"], [p.grad for p in phi.parameters()])
    )
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_critic_loss_reaches_the_critic_only():
    student, fake = Gauss(0.1, 0.5), Gauss(0.2, 0.5)
    x = student(normal(4, 6), ONE, ONE, {})
    msd.fake_loss(
        fake, x, msd.renoise(x.detach(), ONE, ONE, normal(4, 6)), ONE, ONE, {}, ONE
    ).backward()
    assert student.mean.grad is None and fake.mean.grad.abs() > 0


@pytest.mark.parametrize("sigma, gap", [(0.1, 0.00962), (1.0, 0.2), (10.0, 0.2494)])
def test_tsm_is_denoising_with_less_noise(sigma, gap):
    """Against denoising score matching on the same data: the same mean gradient, a loss that is lower by the posterior variance, less spread."""
    n, s = 200_000, torch.tensor(sigma, dtype=torch.float64)
    x = 0.2 + 0.5 * normal(n, 1)
    x_t = msd.renoise(x, ONE, s, normal(n, 1, seed=1))
    target = Gauss(0.2, 0.5)(x_t, ONE, s, {}).detach()
    slope, shift = (
        0.3 * torch.ones(n, 1, dtype=torch.float64),
        -0.1 * torch.ones(n, 1, dtype=torch.float64),
    )
    slope.requires_grad_(), shift.requires_grad_()
    grads, losses = [], []
    for y in (target, x):
        loss = msd.tsm_loss(slope * x_t + shift, y, ONE)
        grads.append([n * g for g in torch.autograd.grad(loss, (slope, shift))])
        losses.append(loss.item())
    assert losses[1] - losses[0] == pytest.approx(gap, abs=4e-4 + 2e-3 * sigma)
    for a, b in zip(*grads):
        assert a.mean().item() == pytest.approx(
            b.mean().item(), abs=4 * (a - b).std().item() / n**0.5
        )
    if sigma == 1:
        assert [g.mean().item() for g in grads[0]] == pytest.approx([0.154, -0.480], abs=5e-3)
        assert [(a.std() / b.std()).item() for a, b in zip(*grads)] == pytest.approx(
            [0.51, 0.24], abs=0.03
        )


# ---- 10.6, 10.7: a run: who is trained when, on whose labels -----------------------------------------------------------------------------------------

ALL = (
    "--iters",
    30,
    "--students",
    3,
    "--small",
    "width=8",
    "depth=2",
    "--tsm",
    0.2,
    "--adm",
    0.5,
    "--ratio",
    2,
    "--cfg",
    2,
)  # tsm 6, then 3 x (4 dm + 4 adm)


def moved(step):
    return {
        k
        for k in step["before"]
        if k in step["after"] and not torch.equal(step["before"][k], step["after"][k])
    }


def test_who_is_trained_when(trace):
    steps = trace(*ALL)
    pieces = msd.plan(30, 3, 0.2, 0.5)
    assert [(b - a, k, stage) for a, b, k, stage in pieces] == [(6, 0, "tsm")] + [
        (4, k, stage) for k in range(3) for stage in ("dm", "adm")
    ]
    table, seen = msd.partition(8, 3), set()
    for s in steps:
        _, _, k, stage = next(p for p in pieces if s["it"] < p[1])
        role = (
            "student"
            if stage == "tsm" or any(g is not None for g in s["grads"][f"student{k}"])
            else "critic"
        )
        expected = (
            {f"student{k}"}
            if role == "student"
            else {"critic", "head"}
            if stage == "adm"
            else {"critic"}
        )
        assert moved(s) == expected
        for net, grads in s[
            "grads"
        ].items():  # every weight of the network whose turn it is; not one of the others
            assert [g is not None for g in grads] == [net in expected] * len(grads), (s["it"], net)
        drawn = [
            set(labels.tolist()) for labels in s["labels"]
        ]  # the loop encodes images first, then what the student makes
        if stage == "tsm":
            assert len(drawn) == 1 and len(drawn[0]) > 5
        else:
            assert len(drawn) == 1 + (stage == "adm") and all(
                {table[y] for y in d} == {k} for d in drawn
            )
        seen.add((k, stage, role))
    assert seen == {(0, "tsm", "student")} | {
        (k, stage, role)
        for k in range(3)
        for stage in ("dm", "adm")
        for role in ("student", "critic")
    }
    assert not any(p.requires_grad for p in steps.nets()["teacher"].parameters())


def test_what_a_stage_starts_from(trace):
    """Small students from phi, critics from the teacher, the adversarial stage from where the first ended; moments, head and learning rates anew."""
    steps = trace(*ALL, "--ema", 40, "--warmup", 3, "--lr", 1e-3, "--tsm-lr", 7e-4)
    at = {}
    for s in steps:
        at.setdefault(s["it"], s["before"])
    phi, teacher = (
        at[6]["student0"],
        torch.cat([p.flatten() for p in load_teacher("toy-cond").parameters()]),
    )
    assert not torch.equal(phi, at[0]["student0"]) and not torch.equal(
        phi, next(s["after"]["student0"] for s in steps if s["it"] == 5)
    )  # the average
    assert all(torch.equal(at[6][f"student{k}"], phi) for k in range(3))
    for k, first in enumerate((6, 14, 22)):
        assert torch.equal(at[first]["critic"], teacher) and torch.equal(
            at[first][f"student{k}"], phi
        )
        end = [s["after"] for s in steps if s["it"] == first + 3][-1]
        assert torch.equal(at[first + 4]["critic"], end["critic"]) and not torch.equal(
            end["critic"], teacher
        )
        assert torch.equal(at[first]["head"], at[first + 4]["head"])
        for j in (first, first + 4):
            step = next(s for s in steps if s["it"] == j and s["lr"] > 0)
            assert step["moments"] == 0 and step["images"] == 0
            assert step["lr"] == pytest.approx((1e-3 if j == first else 2.5e-4) / 3)
    assert steps[0]["lr"] == pytest.approx(7e-4 / 3)
    last = steps[-1]["after"]
    finished = [steps.made["ema"].model.experts[k] for k in range(2)]
    for k in range(2):  # a finished student is its average and does not move any more
        assert torch.equal(
            torch.cat([p.flatten() for p in finished[k].parameters()]), last[f"student{k}"]
        )
    assert not torch.equal(
        last["student2"],
        torch.cat([p.flatten() for p in steps.made["ema"].model.experts[2].parameters()]),
    )


def test_labels_of_a_student_are_uniform_on_its_part(trace):
    steps = trace("--iters", 4, "--students", 2, "--batch", 10_000, "--ratio", 1)
    for s in steps:
        mine = [0, 1, 2, 3] if s["it"] < 2 else [4, 5, 6, 7]
        assert torch.bincount(s["labels"][0], minlength=8)[mine].tolist() == pytest.approx(
            [2500] * 4, abs=200
        )


def test_random_partition_in_a_run(trace):
    steps = trace(
        "--iters", 4, "--students", 4, "--partition", "random", "--seed", 5, "--batch", 256
    )
    table = msd.partition(8, 4, "random", 5)
    for s in steps:
        assert set(s["labels"][0].tolist()) == {y for y in range(8) if table[y] == s["it"]}


def test_students_do_not_meet(trace):
    """Student 1 is the same whatever student 0 learns: only the iteration number, hence the draws, tell it when it is trained."""
    a, b = trace("--iters", 12, "--students", 2, "--cfg", 2), None
    right = msd.dm_loss
    msd.dm_loss = lambda x, g: (
        right(x, -3 * g) if len(b_calls) < 2 and not b_calls.append(0) else right(x, g)
    )  # spoils student 0
    b_calls = []
    try:
        b = trace("--iters", 12, "--students", 2, "--cfg", 2)
    finally:
        msd.dm_loss = right
    assert not torch.equal(a[-1]["after"]["student0"], b[-1]["after"]["student0"]) and torch.equal(
        a[-1]["after"]["student1"], b[-1]["after"]["student1"]
    )


def test_a_mixed_batch_keeps_its_order():
    teacher = load_teacher("toy-cond")
    experts = [teacher.copy() for _ in range(3)]
    for i, e in enumerate(experts):
        for p in e.parameters():
            p.data += 0.1 * i
    table = msd.partition(8, 3)
    student, labels, z = (
        ByLabel(experts, table),
        torch.randperm(64, generator=torch.Generator().manual_seed(0)) % 8,
        torch.randn(64, 2),
    )
    x = msd.sample(student, z, teacher.encode(labels), 1, None)
    for y in range(8):
        rows = labels == y
        assert torch.allclose(
            x[rows],
            msd.sample(experts[table[y]], z[rows], teacher.encode(labels[rows]), 1, None),
            atol=1e-6,
        )
        assert not torch.allclose(
            x[rows],
            msd.sample(experts[(table[y] + 1) % 3], z[rows], teacher.encode(labels[rows]), 1, None),
            atol=1e-3,
        )


# ---- 10.8, 10.9: small students ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [[], ["width=16", "depth=2"]], ids=["same", "small"])
def test_the_critic_has_to_move_first(small):
    """Critic and teacher being equal, there is no gradient without guidance, whatever the student makes."""
    teacher = load_teacher("toy-cond").copy()
    student = teacher.resized(small) if small else teacher.copy()
    cond, s = teacher.encode(torch.arange(8)), torch.linspace(0.1, 9, 8).double()
    x = msd.one_step(student, student.schedule, torch.randn(8, 2), cond)
    x_t = msd.renoise(x.detach(), ONE, s, torch.randn(8, 2))
    for w, none in ((1.0, True), (3.0, False)):
        g = msd.dm_gradient(x, x_t, ONE, s, cond, teacher, teacher.copy(), w)[0]
        msd.dm_loss(x, g).backward(retain_graph=True)
        assert (
            (g.abs().max() == 0)
            == none
            == (max(p.grad.abs().max() for p in student.parameters()) == 0)
        )


def test_small_students_of_a_transformer(tmp_path):
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
    teacher = DiT(DiT.network(config), Flow(), "flow", (1, 8, 8), 4)
    count = lambda m: sum(p.numel() for p in m.parameters())
    a, b = (
        teacher.resized(["num_layers=2"], seed=1),
        teacher.resized(["num_layers=2", "num_attention_heads=1"], seed=1),
    )
    blocks = count(teacher.net.transformer_blocks)
    assert (
        count(a) == count(teacher) - blocks // 2
        and count(b) < count(a)
        and teacher.net.config.num_layers == 4
    )
    assert all(p.requires_grad for p in a.parameters())
    assert all(
        torch.equal(p, q)
        for p, q in zip(a.parameters(), teacher.resized(["num_layers=2"], seed=1).parameters())
    )
    ByLabel([a, a.copy()], msd.partition(4, 2)).save(tmp_path, {})
    again = load_model(tmp_path, json.loads((tmp_path / "distill.json").read_text())["model"])
    x, cond = torch.randn(4, 1, 8, 8), a.encode(torch.arange(4))
    assert torch.allclose(
        again(x, 0.5, 0.5, cond), a(x, 0.5, 0.5, cond), atol=1e-6
    ) and again.table == [0, 0, 1, 1]
    for wrong, expected in (
        ("layers=2", "did you mean num_layers"),
        ("num_layers=x", "no network"),
        ("sample_size=16", "found one for"),
        ("num_layers", "no network"),
    ):
        with pytest.raises(UserError, match=expected):
            teacher.resized([wrong])


# ---- metrics of each student ------------------------------------------------------------------------------------------------------------------------


def test_metrics_of_each_expert():
    """Of the same samples as the joint number. A student that is wrong is found although the others are right; its number does not tell on theirs."""
    teacher = load_teacher("toy-cond")
    right = lambda m, z, c, noise: (
        teacher.mixture.means[c["labels"]].float()
        + 0.1 * z
        + 0.3 * (m.route(len(z), 1, 1, c) == 2)[:, None]
    )
    model = ByLabel([teacher.copy() for _ in range(4)], msd.partition(8, 4))
    result = metrics.evaluate(right, model, teacher, n=2000)
    parts = result["experts"]
    assert (
        [p["labels"] for p in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        and [p["n"] for p in parts] == [500] * 4
        and [p["expert"] for p in parts] == [0, 1, 2, 3]
    )
    assert parts[2]["energy_distance"] > 0.1 and all(
        abs(parts[k]["energy_distance"]) < 0.01 for k in (0, 1, 3)
    )
    assert "experts" not in metrics.evaluate(
        right, ByLabel([teacher.copy()], [0] * 8), teacher, n=100
    )
    alone = metrics.evaluate(
        lambda m, z, c, noise: right(model, z, c, noise), teacher, teacher, n=2000
    )
    assert alone["energy_distance"] == result["energy_distance"]


def test_reference_of_a_part(monkeypatch):
    teacher = load_teacher("mnist")
    extractor, images = ClassifierExtractor(teacher), data.load_images(None, teacher)
    images = data.Images(images.images[::10], images.labels[::10], images.names)
    monkeypatch.setattr(features_module, "load_images", lambda *a: images)
    part = extractor.for_labels([3, 4])
    rows = (images.labels == 3) | (images.labels == 4)
    features = torch.cat([extractor(b)[0] for b in images.images[rows].split(500)])
    assert part.reference_name == int(rows.sum()) == len(features) and part.reference[
        "mu"
    ] == pytest.approx(features.double().mean(0).numpy(), abs=1e-6)
    assert extractor.reference["n"] == 5000 and extractor.reference_features is None  # unchanged
    found = metrics.distances(part, features)
    assert found["fd"] < 1e-3 and found["precision"] == found["recall"] == 1
    extractor.set_reference(extractor.reference, "a file")
    assert extractor.for_labels([3, 4]) is None  # only statistics are known


# ---- broken on purpose ----------------------------------------------------------------------------------------------------------------------------

BROKEN = {  # how it is broken, and the test that finds it
    "router is not the partition": (
        lambda m: m.setattr(
            ByLabel, "route", lambda self, n, a, s, c: torch.tensor(self.table[::-1])[c["labels"]]
        ),
        lambda t: test_a_mixed_batch_keeps_its_order(),
    ),
    "tsm without stop-gradient": (
        lambda m: m.setattr(torch.Tensor, "detach", lambda x: x),
        lambda t: test_tsm_is_zero_for_a_copy_and_leaves_the_teacher_alone(),
    ),
    "labels of the whole set": (
        lambda m: m.setattr(msd, "partition", lambda n, k, *a: [(k + y) % k for y in range(n)]),
        lambda t: test_who_is_trained_when(t),
    ),
    "sign of (5)": (
        lambda m: m.setattr(
            msd, "dm_gradient", lambda *a, f=msd.dm_gradient: (f(*a)[0], *f(*a)[2:0:-1], f(*a)[3])
        ),
        lambda t: test_students_without_label_input(4, STRIDED, 4.0),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_method_is_found(what, trace, monkeypatch):
    change, test = BROKEN[what]
    change(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        test(trace)

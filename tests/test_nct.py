"""Invariants of NCT (arXiv 2506.19741) in closed form, branches and controls one by one, then real runs. Numbers were derived apart from the code."""

import inspect
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from helpers.cases import toy_generator

import eval as evaluation
import nct
from common.errors import UserError
from common.files import WEIGHTS, read_json
from common.rng import BatchRandom
from common.routed import ByLabel
from common.teachers.load import load_teacher
from controls.controlled import load_generator, make_branch, make_controlled
from controls.maps import MAPS, Control
from controls.measure import control_error
from tools.measure import count_nfe

ARGS = SimpleNamespace(N=10, path="trig", distance="l2", huber=None)
Q = 1 - math.cos(math.pi / 20)  # 0.0123117


def args(**changes):
    return SimpleNamespace(**(vars(ARGS) | changes))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def white(d, n, steps):
    """[n * steps, d] whose second moments are exactly those of N(0, I), the same for each k; and k [n * steps]. Means of quadratics are then exact."""
    x = normal(n, d) - normal(n, d).mean(0)
    x = torch.linalg.qr(x)[0] * n**0.5
    return x.repeat(steps, 1), torch.arange(steps).repeat_interleave(n)


# ---- the path -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["trig", "linear"])
def test_ends_of_the_path(path):
    z, eps = normal(7, 3).float(), normal(7, 3, seed=1).float()
    for n in (1, 10, 33):
        assert torch.equal(nct.blend(z, eps, torch.zeros(7), n, path), z)
        assert torch.equal(nct.blend(z, eps, torch.full((7,), n), n, path), eps)


def test_unit_variance_and_correlation_of_neighbours():
    k = torch.arange(11)
    one, zero = torch.ones(11, 1, dtype=torch.float64), torch.zeros(11, 1, dtype=torch.float64)
    for path in ("trig", "linear"):
        alpha, sigma = (
            nct.blend(one, zero, k, 10, path)[:, 0],
            nct.blend(zero, one, k, 10, path)[:, 0],
        )
        assert (
            torch.allclose(alpha**2 + sigma**2, one[:, 0])
            and (alpha.diff() < 0).all()
            and (sigma.diff() > 0).all()
        )
        if path == "trig":
            assert torch.allclose(
                alpha[:-1] * alpha[1:] + sigma[:-1] * sigma[1:],
                torch.full((10,), 0.9876883406, dtype=torch.float64),
                atol=1e-9,
            )
        else:
            assert sigma[3] == pytest.approx(0.3)


@pytest.mark.parametrize("u, share", [(1.0, 0.8413), (0.4, 0.6554)])
def test_a_condition_fades_along_the_path(u, share):
    """c = sign(z): P(c = + | z_t = u) = Phi(alpha u / sigma), half way Phi(u)."""
    z, eps = normal(1_000_000, 1), normal(1_000_000, 1, seed=1)
    near = (nct.blend(z, eps, torch.full((1_000_000,), 5), 10) - u).abs()[:, 0] < 0.03
    assert (z[near] > 0).double().mean() == pytest.approx(share, abs=0.01)


# ---- losses -------------------------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """g = (a z_1 + b c, s z_2); f is the identity. One dimension: a z + b c."""

    def __init__(self, a, b, s=None):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([a, b] + [s] * (s is not None), dtype=torch.float64))

    def forward(self, z, c, cond):
        first = self.p[0] * z[:, :1] + self.p[1] * c[:, None]
        return torch.cat([first, self.p[2] * z[:, 1:]], 1) if len(self.p) > 2 else first


def linear_case(losses, n, abs_, weight=1.0, lam=1.0):
    """Sums over elements of both losses at (a, b, s), and their gradients."""
    x, k = white(4, 64, n)
    g = Linear(*abs_)
    z, eps = x[:, :2], x[:, 2:]
    con, bound = (d.mean() * 2 for d in losses(g, g, z, eps, k, z, z[:, 0], {}, args(N=n)))
    grad = lambda v: torch.autograd.grad(v, g.p, retain_graph=True)[0].tolist()
    return (
        con.item(),
        bound.item(),
        grad(con),
        grad(bound),
        grad(nct.total(con, bound, weight, lam)),
    )


def check(losses):
    """nct.md, 10.4, 10.5, 10.9."""
    con, bound, g_con, g_bound, _ = linear_case(losses, 10, (1.0, 0.0, 1.0))  # at the start
    assert con == pytest.approx(4 * Q, rel=1e-9) == pytest.approx(0.049247, abs=1e-6)
    assert (
        g_con == pytest.approx([2 * Q, -0.2, 2 * Q], abs=1e-9)
        and bound == pytest.approx(0, abs=1e-12)
        and g_bound == pytest.approx([0, 0, 0], abs=1e-12)
    )
    for n, s in (
        (1, 0.5),
        (10, 0.98784),
        (32, 0.99880),
    ):  # stationary for lambda = 1: the control exact, the rest shrunk by lambda / (lambda + q)
        q = 1 - math.cos(math.pi / 2 / n)
        assert 1 / (1 + q) == pytest.approx(s, abs=1e-5)
        assert linear_case(losses, n, (0.0, 1.0, 1 / (1 + q)))[4] == pytest.approx(
            [0, 0, 0], abs=1e-9
        )
        assert linear_case(losses, n, (0.0, 1.0, 1 / (1 + q)), weight=3, lam=3)[4] == pytest.approx(
            [0, 0, 0], abs=1e-9
        )
    con, bound, *_ = linear_case(losses, 10, (0.0, 1.0, 1.0))  # the ideal: not zero
    assert con == pytest.approx(0.024623, abs=1e-6) and bound == pytest.approx(0, abs=1e-12)


def test_linear_gaussian():
    check(nct.losses)


MUTATIONS = {
    "the wrong side has the gradient": [
        ("k, args.N", "k + 1, args.N"),
        ("far = blend(z, eps, k + 1,", "far = blend(z, eps, k,"),
    ],
    "no stop-gradient": [("with torch.no_grad():", "if True:")],
    "independent eps": [("far = blend(z, eps,", "far = blend(z, torch.randn_like(eps),")],
    "target of the coupled pair": [("plain(blend(z, eps, k, args.N, args.path)", "plain(z")],
    "condition of another sample": [("torch.cat([c, c])", "torch.cat([c.roll(1, 0), c])")],
    "boundary with another condition": [("torch.cat([c, c])", "torch.cat([c, c.roll(1, 0)])")],
    "boundary at other noise": [("torch.cat([far, z])", "torch.cat([far, eps])")],
    "halves swapped": [("out, bound = g", "bound, out = g")],
    "z and eps swapped": [("blend(z, eps,", "blend(eps, z,")],
    "two steps": [("k + 1, args.N", "k + 2, args.N")],
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_changed_loss_is_noticed(what):
    code = inspect.getsource(nct.losses)
    for old, new in MUTATIONS[what]:
        assert old in code
        code = code.replace(old, new)
    scope = dict(vars(nct))
    exec(code, scope)
    with pytest.raises(AssertionError):
        check(scope["losses"])


def test_the_gradient_is_that_of_a_constant_target():
    x, k = white(4, 64, 10)
    g = Linear(0.7, 0.2, 0.9)
    z, eps = x[:, :2], x[:, 2:]
    con, _ = nct.losses(g, g, z, eps, k, z, z[:, 0], {}, ARGS)
    target = g(nct.blend(z, eps, k, 10), z[:, 0], {}).detach()
    by_hand = (g(nct.blend(z, eps, k + 1, 10), z[:, 0], {}) - target).square().mean()
    assert torch.allclose(*(torch.autograd.grad(v, g.p)[0] for v in (con.mean(), by_hand)))


def test_one_step_is_regression():
    """N = 1: the trained side sees eps alone, the target is g at z."""
    seen = []
    g = lambda z, c, cond: seen.append(z) or z * 1.0
    z, eps = normal(5, 2), normal(5, 2, seed=1)
    nct.losses(g, g, z, eps, torch.zeros(5, dtype=torch.int64), z, z[:, 0], {}, args(N=1))
    assert torch.equal(seen[0], z) and torch.equal(seen[1], torch.cat([eps, z]))


@pytest.mark.parametrize(
    "tau, lam, a, b",
    [(0.5, 1, 0.6842, 0.3074), (0.5, 100, 0.9954, 0.0045), (0.05, 1, 0.0218, 0.9780)],
)
def test_a_noisy_condition_is_ignored_in_part(tau, lam, a, b):
    """c = z + tau n: stationary at a = lambda / (lambda + q + (q + 1/N) / tau^2), b = a (q + 1/N) / (lambda tau^2)."""
    exact = lam / (lam + Q + (Q + 0.1) / tau**2)
    slope = exact * (Q + 0.1) / (lam * tau**2)
    assert (exact, slope) == (pytest.approx(a, abs=1e-4), pytest.approx(b, abs=1e-4))
    x, k = white(3, 64, 10)
    g = Linear(exact, slope)
    con, bound = nct.losses(
        g, g, x[:, :1], x[:, 1:2], k, x[:, :1], x[:, 0] + tau * x[:, 2], {}, ARGS
    )
    assert torch.autograd.grad(nct.total(con, bound, 1, lam), g.p)[0].abs().max() < 1e-9


def test_theorem_for_the_sign():
    """f = id, c = sign(z): g = c |z| obeys, is its own boundary, and its law given c is half-normal at every t; its pointwise loss is not 0."""
    n = 400_000
    z, eps, k = normal(n, 1), normal(n, 1, seed=1), torch.arange(n) % 10
    g = lambda z, c, cond: c[:, None] * z.abs()
    c = z[:, 0].sign()
    con, bound = nct.losses(g, g, z, eps, k, z, c, {}, ARGS)
    assert bound.max() == 0
    r = math.cos(math.pi / 20)
    exact = 2 - 4 / math.pi * (math.sqrt(1 - r * r) + r * math.asin(r))
    assert exact == pytest.approx(0.02298, abs=1e-5) and con.mean() == pytest.approx(
        exact, abs=2e-4
    )
    for t in (0, 3, 7, 10):
        out = g(nct.blend(z, eps, torch.full((n,), t), 10), c, {})[c > 0]
        assert out.mean() == pytest.approx(0.7979, abs=5e-3) and out.std() == pytest.approx(
            0.6028, abs=5e-3
        )


@pytest.mark.parametrize(
    "kind, kernel",
    [
        ("l2", lambda a, b, h: -(a - b).square().sum(1)),
        ("huber", lambda a, b, h: h - ((a - b).square().sum(1) + h**2).sqrt()),
    ],
)
def test_distances_are_those_of_the_kernels(kind, kernel):
    """k(a, a) + k(b, b) - 2 k(a, b) = 2 d for sums over elements; here means, and the root of the number of elements."""
    a, b, h = normal(5, 3, 4), normal(5, 3, 4, seed=1), 0.3
    d = nct.distance(a, b, kind, h) * (12 if kind == "l2" else 12**0.5)
    a, b = a.flatten(1), b.flatten(1)
    assert torch.allclose(kernel(a, a, h) + kernel(b, b, h) - 2 * kernel(a, b, h), 2 * d)


@pytest.mark.parametrize("D, a", [(768, 0.01496), (3072, 0.02993)])
def test_the_constant_of_pseudo_huber(D, a):
    x, y = normal(2, D), normal(2, D, seed=1)
    assert torch.allclose(nct.distance(x, y, "huber"), nct.distance(x, y, "huber", a), rtol=1e-5)
    assert not torch.allclose(
        nct.distance(x, y, "huber"), nct.distance(x, y, "huber", 40 * a), rtol=1e-2
    )


# ---- lambda ---------------------------------------------------------------------------------------------------------------------------------


def multiplier(value=1.0, what="x", **changes):
    return nct.Multiplier(
        SimpleNamespace(**(dict(lambda0=value, eta=1.0, xi=0.01, lambda_max=1e3) | changes)),
        "cpu",
        what,
    )


def test_dual_ascent():
    lam, seen = multiplier(), []
    for bound in (0.05, 0.05, 0.005, 0.001, 0.01):
        lam.update(torch.tensor(bound, requires_grad=True))
        seen.append(float(lam.value))
    assert (
        seen == pytest.approx([1.04, 1.08, 1.075, 1.066, 1.066], abs=1e-6)
        and not lam.value.requires_grad
    )
    lam = multiplier(0.005)
    lam.update(torch.tensor(0.0))
    assert lam.value == 0
    lam = multiplier(1.0, lambda_max=1.02)
    lam.update(torch.tensor(0.05))
    assert float(lam.value) == pytest.approx(1.02)
    for broken in (math.nan, math.inf):  # a step that is skipped
        lam.update(torch.tensor(broken))
        assert float(lam.value) == pytest.approx(1.02)


def test_a_checkpoint_of_another_control_is_refused():
    state = multiplier(2.0, "edges").state_dict()
    lam = multiplier(1.0, "edges")
    lam.load_state_dict(state)
    assert lam.value == 2
    with pytest.raises(ValueError, match="--control"):
        multiplier(1.0, "sr").load_state_dict(state)


# ---- branches -------------------------------------------------------------------------------------------------------------------------------


def a_control(classes=0, channels=2):
    return SimpleNamespace(classes=classes, channels=channels, embedding=0, shape=(1, 28, 28))


def noise_up(branch, seed=0):
    """The zero layers get weights: now the branch says something."""
    for i, p in enumerate(p for p in branch.parameters() if not p.any()):
        p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed + i))


def dit():
    net = load_teacher("mnist").net
    inputs = dict(
        timestep=torch.full((3,), 900.0), class_labels=torch.tensor([1, 2, 3]), return_dict=False
    )
    return net, (torch.randn(3, 1, 28, 28),), inputs


def unet(**kw):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        num_class_embeds=5,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        **kw,
    ).eval()
    return (
        net,
        (torch.randn(3, 3, 8, 8), torch.tensor([5.0, 70.0, 900.0]), torch.tensor([0, 3, 4])),
        dict(return_dict=False),
    )


def pixel_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
    ).eval()
    return (
        net,
        (torch.randn(3, 3, 8, 8), torch.tensor([5.0, 70.0, 900.0])),
        dict(encoder_hidden_states=None, return_dict=False),
    )


def mlp():
    net = load_teacher("toy").net
    return net, (torch.randn(3, 2), torch.tensor([0.1, 1.0, 20.0]), torch.full((3,), 8)), {}


KINDS = {
    "dit": (dit, 0),
    "dit-class": (dit, 4),
    "unet": (unet, 0),
    "unet-class": (unet, 4),
    "pixel": (pixel_unet, 0),
    "mlp": (mlp, 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_starts_without_effect(kind):
    """Difference 0.0; then only layers of zeros have a gradient; then, when they have moved, everything has, and the frozen network has none."""
    make, classes = KINDS[kind]
    net, inputs, kw = make()
    net.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    branch = make_branch(net, a_control(classes))
    size = inputs[0].shape[-1]
    c = torch.tensor([0, 1, 3]) if classes else torch.rand(3, 2, size, size)
    other = c.flip(0)
    first = lambda out: out[0] if isinstance(out, tuple) else out
    with torch.no_grad():
        plain = first(net(*inputs, **kw))

    def controlled(c):
        with branch.attached(net, c):
            return first(net(*inputs, **kw))

    out = controlled(c)
    assert torch.equal(out, plain)
    zeros = {n for n, p in branch.named_parameters() if not p.any() and p.requires_grad}
    out.square().sum().backward()
    moved = {n for n, p in branch.named_parameters() if p.grad is not None and p.grad.any()}
    outputs = {
        n
        for n in zeros
        if n.startswith("outs") or "controlnet_down_blocks" in n or "controlnet_mid_block" in n
    }
    assert moved == outputs and len(moved) > 2
    branch.zero_grad()
    noise_up(branch)
    out = controlled(c)
    assert not torch.allclose(out, plain, atol=1e-4) and not torch.allclose(
        controlled(other), out, atol=1e-5
    )
    out.square().sum().backward()
    silent = [n for n, p in branch.named_parameters() if p.grad is None]
    assert not silent
    assert all(p.grad is None for p in net.parameters()) and all(
        torch.equal(v, before[k]) for k, v in net.state_dict().items()
    )
    assert torch.equal(first(net(*inputs, **kw)), plain)  # the hooks are gone


@pytest.mark.parametrize("skip", [False, True])
def test_the_unet_written_out(skip):
    """UNet2DModel.forward by hand, with residuals on skips and middle, against the hooks."""
    net, (x, t, y), _ = (
        unet() if not skip else unet(time_embedding_type="fourier", flip_sin_to_cos=False)
    )
    branch = make_branch(net, a_control())
    noise_up(branch)
    c = torch.rand(3, 2, 8, 8)

    def run(net, down_blocks, mid, hint=None, res=None):
        emb = net.time_embedding(net.time_proj(t)) + net.class_embedding(y)
        h = net.conv_in(x)
        h = h if hint is None else h + hint
        skips = [h]
        for block in down_blocks:
            h, more = block(hidden_states=h, temb=emb)
            skips += more
        h = mid(h, emb)
        if hint is not None:
            return [layer(s) for layer, s in zip(branch.outs, [*skips, h], strict=True)]
        skips, h = [s + r for s, r in zip(skips, res)], h + res[-1]
        for block in net.up_blocks:
            n = len(block.resnets)
            h = block(h, tuple(skips[-n:]), emb)
            skips = skips[:-n]
        h = net.conv_out(net.conv_act(net.conv_norm_out(h)))
        return h / t.view(-1, 1, 1, 1) if skip else h

    with torch.no_grad(), branch.attached(net, c):
        hooked = net(x, t, y, return_dict=False)[0]
    with torch.no_grad():
        by_hand = run(
            net,
            net.down_blocks,
            net.mid_block,
            res=run(net, branch.down, branch.mid, branch.hint(c)),
        )
    assert torch.equal(hooked, by_hand) and len(branch.outs) == 10


def test_the_transformer_written_out():
    net, (x,), kw = dit()
    branch = make_branch(net, a_control(), blocks=2)
    noise_up(branch)
    c = torch.rand(3, 2, 28, 28)
    call = lambda block, h: block(h, timestep=kw["timestep"], class_labels=kw["class_labels"])
    with torch.no_grad(), branch.attached(net, c):
        hooked = net(x, **kw)[0]
    with torch.no_grad():
        h = net.pos_embed(x)
        for i, block in enumerate(net.transformer_blocks):
            a = h + branch.hint(c).flatten(2).transpose(1, 2) if i == 4 else a if i > 4 else None
            h = call(block, h)
            if i >= 4:
                a = call(branch.blocks[i - 4], a)
                h = h + branch.outs[i - 4](a)
        seen = []
        handle = net.norm_out.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        with branch.attached(net, c):
            net(x, **kw)
        handle.remove()
    assert torch.equal(seen[0], h) and hooked.isfinite().all()


def test_the_control_net_needs_the_size_of_the_latent():
    """Without a stride for pixels; the default's three strides do not fit them."""
    from diffusers import ControlNetModel

    net, inputs, kw = pixel_unet()
    branch = make_branch(net, a_control())
    assert (
        len(branch.net.config.conditioning_embedding_out_channels) == 1
        and branch.net.config.conditioning_channels == 2
    )
    assert make_branch(net, a_control(), 8).net.config.conditioning_embedding_out_channels == (
        16,
        32,
        96,
        256,
    )
    branch.net = ControlNetModel.from_unet(net, conditioning_channels=2)
    with (
        pytest.raises(Exception, match="size|shape"),
        branch.attached(net, torch.rand(3, 2, 16, 16)),
    ):
        net(torch.randn(3, 3, 16, 16), *inputs[1:], **kw)


def prompt_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    net = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    return (
        net.requires_grad_(False),
        (torch.randn(3, 4, 8, 8), torch.tensor([5.0, 70.0, 900.0])),
        dict(encoder_hidden_states=torch.randn(3, 7, 16), return_dict=False),
    )


def test_an_image_prompt_starts_without_effect():
    """Difference 0.0; then only the values have a gradient; then, when they have moved, everything has. The frozen network is as it was afterwards."""
    net, inputs, kw = prompt_unet()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    branch = make_branch(
        net, SimpleNamespace(classes=0, channels=0, embedding=12, shape=(3, 16, 16)), 2
    )
    assert all(
        torch.equal(layer.to_k_ip[0].weight, net.get_submodule(n).to_k.weight)
        for n, layer in zip(branch.names, branch.ip_adapter.values(), strict=True)
    )
    c = torch.randn(3, 12)

    def controlled(c):
        with branch.attached(net, c):
            return net(*inputs, **kw)[0]

    plain, out = net(*inputs, **kw)[0], controlled(c)
    assert torch.equal(out, plain)
    out.square().sum().backward()
    moved = {n for n, p in branch.named_parameters() if p.grad.any()}
    assert moved == {n for n, p in branch.named_parameters() if "to_v_ip" in n} and len(moved) == 4
    branch.zero_grad()
    noise_up(branch)
    out = controlled(c)
    assert not torch.allclose(out, plain, atol=1e-4) and not torch.allclose(
        controlled(c.flip(0)), out, atol=1e-5
    )
    alike = controlled(c[:1].expand(3, -1))  # each sample has its own image
    assert torch.allclose(alike[0], out[0], atol=1e-5) and not torch.allclose(
        alike[1:], out[1:], atol=1e-4
    )
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in branch.parameters())
    assert (
        torch.equal(net(*inputs, **kw)[0], plain)
        and net.state_dict().keys() == before.keys()
        and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    )


@pytest.mark.parametrize(
    "make, found",
    [
        (pixel_unet, "UNet2DConditionModel without"),
        (unet, "UNet2DModel"),
        (dit, "Transformer2DModel|DiT"),
    ],
)
def test_image_prompts_need_a_prompt(make, found):
    with pytest.raises(
        UserError,
        match=f"--control image: expected a generator of class UNet2DConditionModel .*found ({found})",
    ):
        make_branch(make()[0], SimpleNamespace(classes=0, channels=0, embedding=12))
    with pytest.raises(UserError, match="--blocks"):
        make_branch(prompt_unet()[0], SimpleNamespace(classes=0, channels=0, embedding=12), 1, 2)


def test_branches_that_cannot_be():
    net = dit()[0]
    for blocks in (0, 7):
        with pytest.raises(UserError, match=f"--blocks {blocks}: expected a number from 1 to 6"):
            make_branch(net, a_control(), blocks=blocks)
    with pytest.raises(UserError, match="--control class"):
        make_branch(pixel_unet()[0], a_control(3))
    with pytest.raises(
        UserError, match="--generator: expected a UNet or transformer of diffusers, found Linear"
    ):
        make_branch(nn.Linear(2, 2), a_control())


# ---- controls -------------------------------------------------------------------------------------------------------------------------------


def control(name, **kw):
    return Control(name, load_teacher("mnist"), **kw)


def pictures(n=5):
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_sobel():
    from scipy import ndimage

    x = pictures()
    u = ((x * 127.5 + 128).clip(0, 255).to(torch.uint8)).double() / 255
    ours = control("edges")(x, torch.rand(5, 4))
    for a, b in zip(u[:, 0].numpy(), ours[:, 0]):
        length = (
            ndimage.sobel(a, 0, mode="nearest") ** 2 + ndimage.sobel(a, 1, mode="nearest") ** 2
        ) ** 0.5 / 4
        assert abs(b - torch.from_numpy(length).clamp(max=1)).max() < 1e-6
    step = torch.ones(1, 1, 8, 8)
    step[..., 4:] = -1
    c = MAPS["edges"](step / 2 + 0.5, None, None)
    assert torch.allclose(c[0, 0, 3], torch.tensor([0, 0, 0, 1, 1, 0, 0, 0.0]))


def test_canny():
    u = torch.zeros(1, 1, 28, 28)
    u[..., 6:20, 8:22] = 1
    c = MAPS["canny"](u, None, None)
    assert (
        set(c.unique().tolist()) == {0, 1} and 40 < c.sum() < 60
    )  # one pixel wide along 56 pixels of border, corners blurred
    assert c[0, 0, 10:16, 10:20].sum() == 0 and c[0, 0, 12, 5:11].sum() == 1
    weak = u + 0
    weak[..., 24:26, 2:10] = 0.1  # below both thresholds after the blur
    assert torch.equal(MAPS["canny"](weak, None, None)[..., 22:, :], torch.zeros(1, 1, 6, 28))


def test_super_resolution():
    x = pictures()
    c = control("sr", factor=4)(x, None)
    assert (
        torch.allclose(c, MAPS["sr"](c, None, SimpleNamespace(factor=4)), atol=1e-6)
        and len(c[0, 0, 0].unique()) == 7
    )
    assert torch.allclose(c.mean((1, 2, 3)), (x.mean((1, 2, 3)) + 1) / 2, atol=3e-3)
    for factor in (1, 5):
        with pytest.raises(UserError, match=f"--factor {factor}"):
            control("sr", factor=factor)


@pytest.mark.parametrize("name", ["half", "inpaint"])
def test_masks(name):
    h, x, r = (
        control(name),
        pictures(200),
        torch.rand(200, 4, generator=torch.Generator().manual_seed(1)),
    )
    c = h(x, r)
    mask = c[:, 1:] > 0
    assert (
        c.shape == (200, 2, 28, 28)
        and not c[:, :1][mask].any()
        and set(c[:, 1].unique().tolist()) == {0, 1}
    )
    share = mask.float().mean((1, 2, 3))
    assert (
        (share == 0.5).all()
        if name == "half"
        else share.min() > 0.05 and share.max() < 0.58 and share.std() > 0.05
    )
    other = x.clone()
    other[mask] = 0.9  # what is hidden has no say
    assert torch.equal(h(other, r), c) and (h.error(h(other, r), c) == 0).all()
    assert torch.allclose(
        h.error(h(x * 0 - 1, r), c), (c[:, :1].flatten(1).sum(1) / (~mask).flatten(1).sum(1))
    )
    assert (h.picture(c)[mask] == 128).all()


@pytest.mark.parametrize("name", ["edges", "canny", "sr", "half", "inpaint"])
def test_a_control_has_no_gradient(name):
    h, x = control(name), pictures(3).requires_grad_()
    c = h(x, torch.rand(3, 4))
    assert (
        not c.requires_grad and c.shape == (3, h.channels, 28, 28) and c.min() >= 0 and c.max() <= 1
    )
    assert torch.equal(c, h(x.detach().clamp(-1, 1), torch.rand(3, 4))) or name == "inpaint"
    assert h.blank(3, "cpu").shape == c.shape and h.picture(c).dtype == torch.uint8


def test_class_of_the_toy():
    h = Control("class", load_teacher("toy"))
    assert h.classes == 8 and h(h.model.mixture.means.float(), None).tolist() == list(range(8))
    assert h.error(torch.tensor([1, 2]), torch.tensor([1, 3])).tolist() == [0, 1]
    with pytest.raises(UserError, match="--control class: expected a generator without labels"):
        Control("class", load_teacher("toy-cond"))
    with pytest.raises(UserError, match="--control class: expected a generator without labels"):
        control("class")


def test_depth(tmp_path):
    """A depth estimator of transformers of a few random weights; and folders that are none."""
    from transformers import DPTConfig, DPTForDepthEstimation

    with pytest.raises(UserError, match="--control-model"):
        control("depth")
    with pytest.raises(UserError, match="--control-model .*none"):
        control("depth", folder=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--control-model .*expected a depth estimator"):
        control("depth", folder=str(tmp_path))
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
        is_hybrid=False,
    )
    net = DPTForDepthEstimation(config)
    for p in net.parameters():
        p.data.normal_(0, 0.3)  # random weights as transformers makes them see nothing
    net.save_pretrained(tmp_path / "dpt")
    (tmp_path / "dpt" / "preprocessor_config.json").write_text(
        json.dumps(dict(size=dict(height=32, width=32), image_mean=[0.5] * 3, image_std=[0.5] * 3))
    )
    h = control("depth", folder=str(tmp_path / "dpt"))
    c = h(pictures(), None)
    assert (
        h.channels == 1
        and c.shape == (5, 1, 28, 28)
        and (c.amin((1, 2, 3)) == 0).all()
        and torch.allclose(c.amax((1, 2, 3)), torch.ones(5))
    )
    assert torch.equal(c, h(pictures(), None)) and h.config()["folder"] == str(tmp_path / "dpt")


def encoder(folder):
    """A CLIP vision encoder of a few random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    net = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=8,
            projection_dim=12,
        )
    )
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)  # as transformers makes them they see little
    net.save_pretrained(folder)
    return net.eval()


def test_image_prompts_have_the_papers_rate_and_empty_prompts():
    get = lambda *flags: (lambda a: (a.lr, a.drop))(nct.parse_args(["--teacher", "sd15", *flags]))
    assert (
        get("--control", "image") == (1e-4, 0.05)
        and get("--control", "edges") == (1e-5, 0.0) == get()
        and get("--control", "image", "--drop", "0.5", "--lr", "1") == (1.0, 0.5)
    )
    with pytest.raises(UserError, match="--drop: expected a share from 0 to 1"):
        nct.parse_args(["--teacher", "sd15", "--drop", "1.5"])
    teacher = load_teacher("mnist")
    assert teacher.drop_condition(
        dict(labels=torch.tensor([3, 4, 5])), torch.tensor([True, False, True])
    )["labels"].tolist() == [10, 4, 10]


def test_image_embeddings(tmp_path):
    """Those of transformers' own preprocessing, also of pictures that are no square; 1 - cosine; and folders that hold no encoder."""
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPTextConfig

    net = encoder(tmp_path / "clip")
    h = control("image", folder=str(tmp_path / "clip"))
    x = pictures()
    c = h(x, None)
    assert (
        h.embedding == 12
        and h.channels == 0
        and c.shape == (5, 12) == h.blank(5, "cpu").shape
        and not c.requires_grad
    )
    processor = CLIPImageProcessor(size=24, crop_size=24)
    theirs = lambda u: (
        net(
            processor(
                [Image.fromarray(p.numpy()).convert("RGB") for p in u], return_tensors="pt"
            ).pixel_values
        ).image_embeds
    )
    with torch.no_grad():
        assert (h.error(c, theirs(h.model.decode(x)[:, 0])) < 1e-3).all() and h.error(
            c, c.roll(1, 0)
        ).min() > 0.01
        wide = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))
        square = Image.fromarray((wide[0] * 255).round().byte().permute(1, 2, 0).numpy())
        assert (
            h.error(
                MAPS["image"](wide[:1], None, h),
                net(processor([square], return_tensors="pt").pixel_values).image_embeds,
            )
            < 1e-3
        )
    assert h.error(
        torch.tensor([[1.0, 0]] * 3), torch.tensor([[2.0, 0], [0, 3], [-1, 0]])
    ).tolist() == pytest.approx([0, 1, 2])
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        json.dumps(dict(image_mean=[0.5] * 3, image_std=[0.5] * 3))
    )
    other = control("image", folder=str(tmp_path / "clip"))
    assert torch.equal(
        other.estimator.mean.flatten(), torch.full((3,), 0.5)
    ) and not torch.allclose(other(x, None), c, atol=1e-3)
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        json.dumps(dict(image_mean=[0.5, "a", 1]))
    )
    with pytest.raises(UserError, match="image_mean: expected three numbers"):
        control("image", folder=str(tmp_path / "clip"))
    with pytest.raises(UserError, match="--control image: expected a folder as --control-model"):
        control("image")
    with pytest.raises(UserError, match="--control-model .*nowhere"):
        control("image", folder=str(tmp_path / "nowhere"))
    CLIPTextConfig().save_pretrained(tmp_path / "text")
    with pytest.raises(
        UserError,
        match="expected a CLIP vision encoder with projection of transformers, found model_type 'clip_text_model'",
    ):
        control("image", folder=str(tmp_path / "text"))
    from safetensors.torch import load_file, save_file

    path = tmp_path / "clip" / "model.safetensors"
    save_file(
        {k: v for k, v in load_file(path).items() if "visual_projection" not in k},
        path,
        metadata={"format": "pt"},
    )
    with pytest.raises(
        UserError, match="expected all weights .*visual_projection.weight is missing"
    ):
        control("image", folder=str(tmp_path / "clip"))


# ---- generators -------------------------------------------------------------------------------------------------------------------------------


def quick(scripts, script, out, *flags):
    scripts.run(
        f"{script}.py",
        "--teacher",
        "toy",
        "--batch",
        32,
        "--eval-n",
        0,
        "--sample-every",
        0,
        "--iters",
        1,
        "--out",
        out,
        *flags,
    )
    return out


METHODS = {
    "sid": [],
    "dmd2": [],
    "decoupled_dmd": [],
    "phased_dmd": ["--nfe", 1, "--phases", 1],
    "sana_sprint": ["--nfe", 1],
    "twinflow": ["--nfe", 1, "--batch", 64],
    "flowmap": ["--batch", 128],
    "boot": [],
    "msd": [],
}


@pytest.mark.parametrize(
    "method",
    [
        "dmd2",
        "boot",
        *[pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in ("dmd2", "boot")],
    ],
)
def test_students_of_every_method_are_generators(method, scripts, tmp_path):
    """f is the method's own sampler, bit for bit; the network is asked once, and gradients pass through it."""
    folder = quick(scripts, method, tmp_path / method, *METHODS[method])
    teacher = load_teacher("toy")
    model, info, sample = load_generator(folder, teacher, "toy")
    student = make_controlled(model, info, sample, Control("class", model))
    z, cond = torch.randn(16, 2), model.encode(torch.arange(16) % 8)
    theirs = evaluation.load_student(folder, evaluation.parse_args([str(folder)]), {})
    with torch.no_grad():
        assert torch.equal(
            student.f(z, cond), theirs[1](theirs[0], z, cond, 1, None, **theirs[2]["sampler"])
        )
    c = torch.arange(16) % 8
    assert count_nfe(lambda m, z, cond, noise: m(z, m.control.blank(2, "cpu"), cond), student) == 1
    student(z, c, cond).square().sum().backward()
    assert student.branch.outs[0].weight.grad.any() and all(
        p.grad is None for p in model.parameters()
    )


def changed(folder, **kw):
    path = folder / "student" / "distill.json"
    path.write_text(json.dumps(read_json(path) | kw))
    return folder


@pytest.fixture
def copied(tmp_path):
    import shutil

    shutil.copytree(toy_generator(), tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(nfe=4), "expected a student of one step, found one of 4 steps"),
        (dict(method="nct", sampler={}), "found one that has a control already"),
        (dict(method="gan"), "method: expected one of"),
        (dict(sampler=dict(depth=3)), "sampler: does not fit dmd2.sample"),
        (dict(model=dict(adapter="unknown")), "adapter: expected one of"),
    ],
)
def test_generators_that_are_refused(change, says, copied):
    with pytest.raises(UserError, match=says):
        load_generator(changed(copied, **change), load_teacher("toy"), "toy")


def test_a_generator_of_another_teacher_or_of_experts_is_refused(copied, tmp_path):
    with pytest.raises(UserError, match="expected a student of mnist, dit"):
        load_generator(copied, load_teacher("mnist"), "mnist")
    teacher = load_teacher("toy")
    ByLabel([teacher.copy(), teacher.copy()], [0, 0, 0, 0, 1, 1, 1, 1]).save(
        tmp_path / "two", dict(method="msd", teacher="toy", nfe=1, sampler={})
    )
    with pytest.raises(UserError, match="--generator .*two: expected one network, found 2 experts"):
        load_generator(tmp_path / "two", teacher, "toy")


def test_the_teacher_is_that_of_the_generator():
    assert (
        nct.parse_args(["--generator", toy_generator()]).teacher == "toy"
        and nct.parse_args(["--generator", toy_generator()]).control == "class"
    )
    assert nct.parse_args(["--generator", toy_generator(), "--teacher", "mnist"]).control == "edges"
    args = nct.parse_args(["--teacher", "toy"])
    assert (
        args.generator.endswith("out/dmd2-toy")
        and args.out.endswith("out/nct-toy-class")
        and args.con_weight == args.N
    )


# ---- pipelines --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    import diffusers
    from helpers import pipelines

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    base = tmp_path_factory.mktemp("pipelines")
    (base / "prompts.txt").write_text("a red heart\ndog\n")

    def get(name):
        if not (base / name).exists():
            (base / name).mkdir()
            getattr(pipelines, name)(base / name)
        return base / name

    get.flags = ["--prompts", base / "prompts.txt", "--cache-prompts", base / "cache", "--batch", 2]
    get.text = dict(prompts=["a red heart", "dog"], cache=base / "cache", say=lambda *a: None)
    return get


@pytest.mark.slow
@pytest.mark.parametrize("student", [False, True])
def test_stable_diffusion(student, scripts, pipelines, tmp_path):
    """A one-step student of SD 1.5, or the pipeline itself: the run's ControlNet and UNet in diffusers' own pipeline make the picture of our sampler."""
    from diffusers import (
        ControlNetModel,
        DDIMScheduler,
        StableDiffusionControlNetPipeline,
        UNet2DConditionModel,
    )

    folder = pipelines("sd15")
    if student:
        moved = load_teacher(str(folder), text=pipelines.text).copy()
        for p in moved.parameters():
            p.data += 0.01 * torch.randn_like(p)
        moved.save(
            tmp_path / "gen" / "student",
            dict(method="dmd2", teacher=str(folder), nfe=1, cfg=1.75, sampler=dict(steps="999")),
        )
    run = tmp_path / "run"
    flags = [
        "--generator",
        tmp_path / "gen" if student else folder,
        *pipelines.flags,
        "--control",
        "edges",
        "--lr",
        1e-2,
        "--warmup",
        0,
        "--smoke",
        "--out",
        run,
    ]
    p = scripts.run("nct.py", *flags, *(["--grad-checkpoint"] if student else []))
    assert (
        "brings no metric" in p.out
        and "control edges: error" in p.out
        and (run / "samples" / "control.png").exists()
    )
    info = read_json(run / "student" / "distill.json")
    assert info["teacher"] == str(folder) and info["cfg"] == (1.75 if student else 1.0)
    teacher = load_teacher(str(folder), text=pipelines.text)
    ours = nct.load_student(run / "student", info["model"], teacher)
    controlnet, unet = (
        ControlNetModel.from_pretrained(run / "student"),
        UNet2DConditionModel.from_pretrained(run / "student" / "generator"),
    )
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        folder, unet=unet, controlnet=controlnet, safety_checker=None, feature_extractor=None
    )
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    pipe.set_progress_bar_config(disable=True)
    z, c = torch.randn(2, *teacher.shape), torch.rand(2, 3, 16, 16)
    theirs = pipe(
        teacher.prompts,
        image=c,
        latents=z,
        num_inference_steps=1,
        guidance_scale=1.0,
        height=16,
        width=16,
        output_type="latent",
    ).images
    x = nct.sample(ours, z, teacher.encode(torch.tensor([0, 1])), c=c)
    assert torch.allclose(x, theirs, rtol=1e-3, atol=1e-3 * float(theirs.std()))
    with torch.no_grad():
        free = ours.f(z, teacher.encode(torch.tensor([0, 1])))
    assert not torch.allclose(x, free, rtol=1e-2, atol=1e-2 * float(free.std()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_image_prompts(name, scripts, pipelines, tmp_path):
    """A trained run's IP-Adapter in diffusers' own pipeline makes the picture of our sampler, from the embedding and from the picture itself."""
    from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
    from PIL import Image

    folder, run, clip = pipelines(name), tmp_path / "run", encoder(tmp_path / "clip")
    flags = [
        "--generator",
        folder,
        *pipelines.flags,
        "--control",
        "image",
        "--control-model",
        tmp_path / "clip",
        "--lr",
        1e-2,
        "--warmup",
        0,
        "--out",
        run,
    ]
    p = scripts.run("nct.py", *flags, "--smoke")
    assert "control image: error" in p.out and (run / "samples" / "control.png").exists()
    info = read_json(run / "student" / "distill.json")
    teacher = load_teacher(str(folder), text=pipelines.text)
    ours = nct.load_student(run / "student", info["model"], teacher)
    assert any(layer.to_v_ip[0].weight.any() for layer in ours.branch.ip_adapter.values())
    with torch.no_grad():
        for layer in ours.branch.ip_adapter.values():
            layer.to_v_ip[0].weight += 0.2 * torch.randn_like(
                layer.to_v_ip[0].weight
            )  # a step or two is hardly seen
    ours.save(tmp_path / "s", {k: v for k, v in info.items() if k != "model"})
    again = nct.load_student(tmp_path / "s", read_json(tmp_path / "s" / "distill.json")["model"], teacher)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "s" / "generator")
    pipe = DiffusionPipeline.from_pretrained(
        folder,
        unet=unet,
        image_encoder=clip,
        feature_extractor=None,
        **dict(safety_checker=None) if name == "sd15" else {},
    )
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    pipe.load_ip_adapter(str(tmp_path / "s"), subfolder="", weight_name="ip_adapter.safetensors")
    pipe.set_progress_bar_config(disable=True)
    z, cond = torch.randn(2, *teacher.shape), teacher.encode(torch.tensor([0, 1]))
    with torch.no_grad():
        free = ours.f(z, cond)
    c = ours.control(ours.f(torch.randn(2, *teacher.shape), cond), None)
    x = nct.sample(ours, z, cond, c=c)
    close = lambda a, b, r=1e-3: torch.allclose(a, b, rtol=r, atol=r * float(b.std()))
    assert torch.equal(nct.sample(again, z, cond, c=c), x) and not close(x, free, 1e-2)
    call = lambda i, **kw: (
        pipe(
            [teacher.prompts[j] for j in i],
            latents=z[i],
            num_inference_steps=1,
            guidance_scale=1.0,
            height=16,
            width=16,
            output_type="latent",
            **kw,
        ).images
    )
    for i in (0, 1):  # a pipeline shows all prompts of a call the same image
        assert close(x[i : i + 1], call([i], ip_adapter_image_embeds=[c[i : i + 1, None]]))
    picture = torch.randint(
        256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    seen = ours.control.map(picture.float() / 255, None)
    shown = call([1], ip_adapter_image=Image.fromarray(picture[0].permute(1, 2, 0).numpy()))
    assert close(nct.sample(ours, z[1:], {k: v[1:] for k, v in cond.items()}, c=seen), shown, 1e-2)
    scripts.run("nct.py", *flags, "--smoke", "--drop", 1, "--out", tmp_path / "empty")
    con = [
        json.loads((d / "log.jsonl").read_text().splitlines()[0])["con"]
        for d in (run, tmp_path / "empty")
    ]
    assert (
        con[0] != con[1] and min(con) > 0
    )  # the branch has no effect yet, so it is the prompts that differ
    p = scripts.start("nct.py", *flags, "--smoke", "--grad-checkpoint", "--out", tmp_path / "other")
    assert (
        p.wait() == 2
        and "--grad-checkpoint: expected a generator of class" in p.err
        and p.err.count("\n") == 1
    )


@pytest.mark.slow
def test_image_prompts_are_for_unets(scripts, pipelines, tmp_path):
    encoder(tmp_path / "clip")
    p = scripts.start(
        "nct.py",
        "--generator",
        pipelines("sd3"),
        *pipelines.flags,
        "--control",
        "image",
        "--control-model",
        tmp_path / "clip",
        "--smoke",
        "--out",
        tmp_path / "run",
    )
    assert (
        p.wait() == 2
        and "--control image: expected a generator of class UNet2DConditionModel" in p.err
        and p.err.count("\n") == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3", "sana"])
def test_other_pipelines(name, pipelines, tmp_path):
    """A branch at the one-step form of each: no effect at first; the condition has a gradient and is obeyed in some way afterwards; saved and loaded."""
    folder = str(pipelines(name))
    teacher = load_teacher(folder, text=pipelines.text)
    model, info, sample = load_generator(folder, teacher, folder)
    student = make_controlled(model, info, sample, Control("edges", model))
    z, cond, c = (
        torch.randn(2, *model.shape),
        model.encode(torch.tensor([0, 1])),
        torch.rand(2, student.control.channels, *student.control.shape[1:]),
    )
    with torch.no_grad():
        plain = student.f(z, cond)
    assert torch.equal(student(z, c, cond), plain)
    noise_up(student.branch)
    x = student(z, c, cond)
    x.square().mean().backward()
    assert not torch.allclose(x, plain, rtol=1e-2) and not [
        n for n, p in student.named_parameters() if p.grad is None and p.requires_grad
    ]
    student.save(tmp_path / "s", dict(method="nct", teacher=folder, nfe=1, sampler={}))
    again = nct.load_student(tmp_path / "s", read_json(tmp_path / "s" / "distill.json")["model"], teacher)
    with torch.no_grad():
        assert torch.equal(again(z, c, cond), x)


# ---- conditions are independent of the noise ----------------------------------------------------------------------------------------------------


def controlled():
    teacher = load_teacher("toy")
    model, info, sample = load_generator(toy_generator(), teacher, "toy")
    return make_controlled(model, info, sample, Control("class", model))


def test_the_sampler_draws_its_condition_from_other_noise(monkeypatch):
    student, seen = controlled(), []
    monkeypatch.setattr(
        student,
        "condition",
        lambda z, r, cond: seen.append(z) or torch.zeros(len(z), dtype=torch.int64),
    )
    z, other = torch.randn(4, 2), [torch.randn(4, 2), torch.randn(4, 2)]
    x = nct.sample(student, z, student.encode([0] * 4), noise=lambda: other[len(seen)])
    assert (
        torch.equal(seen[0], other[0])
        and not torch.equal(seen[0], z)
        and torch.equal(x, student.f(z, student.encode([0] * 4)))
    )
    given = nct.sample(student, z, student.encode([0] * 4), c=torch.tensor([1, 2, 3, 4]))
    assert len(seen) == 1 and torch.equal(given, x)  # an untrained branch
    with pytest.raises(UserError, match="--nfe 2"):
        nct.sample(student, z, None, 2)


def test_obedience():
    """An untrained branch obeys by chance, a student that paints the condition fully, one that ignores its noise without diversity. Coupled evaluation would
    find the first one perfect."""
    student = controlled()
    first = control_error(student, 400)
    assert (
        first["error"] == first["chance"] > 0.5
        and first["diversity"] == first["spread"]
        and first["ratio"] == 1
        and first["conditions"] == 50
    )
    means = student.mixture.means.float()
    student.forward = lambda z, c, cond: means[c] + 0.01 * z
    ideal = control_error(student, 400)
    assert (
        ideal["error"] == 0 and ideal["chance"] == first["chance"] and 0 < ideal["diversity"] < 0.02
    )
    student.forward = lambda z, c, cond: means[c]
    assert control_error(student, 400)["diversity"] == 0
    student.forward = lambda z, c, cond: (
        z * 100
    )  # two points of N(0, 100^2 I): mean distance 100 sqrt(pi), over sqrt(2)
    assert control_error(student, 2000)["diversity"] == pytest.approx(
        100 * (math.pi / 2) ** 0.5, rel=0.05
    )


# ---- runs -----------------------------------------------------------------------------------------------------------------------------------------


def state(out, it):
    return torch.load(out / "ckpt" / f"it-{it:08d}.pt", weights_only=True)["state"]


def test_without_consistency_the_branch_never_moves(scripts, tmp_path):
    flags = [
        "--teacher",
        "toy",
        "--batch",
        32,
        "--sample-every",
        0,
        "--iters",
        5,
        "--out",
        tmp_path / "run",
    ]
    scripts.run("nct.py", *flags, "--con-weight", 0, "--eval-n", 400)
    model, info, sample = load_generator(toy_generator(), load_teacher("toy"), "toy")
    torch.manual_seed(0)
    start = make_controlled(model, info, sample, Control("class", model))
    assert all(
        torch.equal(v, start.state_dict()[k])
        for k, v in state(tmp_path / "run", 5)["student"].items()
    )
    result = read_json(tmp_path / "run" / "control.json")
    assert (
        result["error"] == result["chance"]
        and (tmp_path / "run" / "samples" / "control.png").exists()
    )


def test_a_run_by_hand(scripts, tmp_path):
    """Two iterations written out: the gradient of both losses, Adam without weight decay, lambda."""
    scripts.run(
        "nct.py",
        "--teacher",
        "toy",
        "--batch",
        16,
        "--eval-n",
        0,
        "--sample-every",
        0,
        "--iters",
        2,
        "--N",
        8,
        "--con-weight",
        3,
        "--lambda0",
        2,
        "--eta",
        5,
        "--xi",
        1e-4,
        "--clip",
        1e9,
        "--cooldown",
        0,
        "--out",
        tmp_path / "run",
    )
    teacher = load_teacher("toy")
    model, info, sample = load_generator(toy_generator(), teacher, "toy")
    torch.manual_seed(0)
    student = make_controlled(model, info, sample, Control("class", model))
    opt, lam = (
        torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0),
        2.0,
    )
    for it in range(2):
        draw = BatchRandom(0, it, 16)
        cond = teacher.encode(draw.randint(0, 8))
        z, eps, _, k = draw.randn(2), draw.randn(2), draw.randn(4), draw.randint(0, 8)
        with torch.no_grad():
            x = model(20 * z, 1.0, 20.0, cond)
            c = torch.cdist(x.double(), model.mixture.means).argmin(1)
            at = lambda k: (
                (math.pi * k / 16).cos()[:, None] * z + (math.pi * k / 16).sin()[:, None] * eps
            ).float()
            target = student(at(k), c, cond)
        loss = 3 * (student(at(k + 1), c, cond) - target).square().mean()
        bound = (student(z, c, cond) - x).square().mean()
        (loss + lam * bound).backward()
        opt.step()
        opt.zero_grad()
        lam += 5 * (bound.item() - 1e-4)
    found = state(tmp_path / "run", 2)
    assert float(found["multiplier"]["value"]) == pytest.approx(lam, abs=1e-6) and lam != 2
    for name, p in student.named_parameters():
        assert torch.allclose(found["student"][name], p, atol=2e-5), name


def test_export_and_eval(scripts, tmp_path, capsys):
    """The folder stands alone: the generator is in it. eval.py says what the run said, and counts one pass."""
    run = tmp_path / "run"
    scripts.run(
        "nct.py",
        "--teacher",
        "toy",
        "--batch",
        32,
        "--sample-every",
        0,
        "--iters",
        30,
        "--eval-n",
        500,
        "--out",
        run,
    )
    evaluation.main([str(run), "--n", "500", "--out", str(tmp_path / "eval.jsonl")])
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "eval.jsonl").read_text())
    assert result["passes"] == 1 and result["method"] == "nct" and "control class: accuracy" in text
    assert (
        result["control"] == read_json(run / "control.json")
        and result["control"]["error"] < result["control"]["chance"]
    )
    assert result["energy_distance"] == pytest.approx(
        read_json(run / "metrics.json")["energy_distance"], rel=1e-4
    )
    info = read_json(run / "student" / "distill.json")
    student = nct.load_student(run / "student", info["model"])
    z, cond = torch.randn(5, 2), student.encode([0] * 5)
    assert (
        student.folder == run / "student"
        and student.control.name == "class"
        and not torch.equal(student(z, torch.tensor([0, 1, 2, 3, 4]), cond), student.f(z, cond))
    )
    for change in (dict(control=3), dict(control=dict(name="class")), dict(blocks="two")):
        with pytest.raises(UserError, match="model\\.(control|blocks)"):
            nct.load_student(run / "student", info["model"] | change)


def test_another_generator_is_no_resume(scripts, copied, tmp_path):
    flags = [
        "--teacher",
        "toy",
        "--batch",
        32,
        "--sample-every",
        0,
        "--eval-n",
        0,
        "--out",
        tmp_path / "run",
    ]
    scripts.run("nct.py", *flags, "--iters", 1)
    from safetensors.torch import load_file, save_file

    path = copied / "student" / WEIGHTS
    save_file({k: v + 1e-3 for k, v in load_file(path).items()}, path)
    p = scripts.start("nct.py", *flags, "--iters", 2, "--resume", "--generator", copied)
    assert (
        p.wait() == 2
        and "--resume" in p.err
        and "another --control or --generator" in p.err
        and p.err.count("\n") == 1
    )


# ---- the toy, to the end ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(scripts, tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "dmd2-toy"
    scripts.run("dmd2.py", "--teacher", "toy", "--sample-every", 0, "--out", out)
    return out


@pytest.mark.slow
def test_toy(finished, scripts, tmp_path):
    """Labels for a generator without labels: the one-step student of dmd2.py's toy preset, its noise drawn apart from the label."""
    runs = {}
    for name, flags in {
        "preset": [],
        "no boundary": ["--lambda0", 0, "--eta", 0, "--iters", 500],
        "one step": ["--N", 1],
    }.items():
        p = scripts.run(
            "nct.py",
            "--teacher",
            "toy",
            "--generator",
            finished,
            "--sample-every",
            0,
            "--out",
            tmp_path / name,
            *flags,
        )
        runs[name] = (
            read_json(tmp_path / name / "metrics.json")
            | read_json(tmp_path / name / "control.json")
            | dict(cpu=p.cpu)
        )
    r = runs["preset"]
    assert r["error"] <= 0.05 and r["chance"] > 0.8 and r["cpu"] < 120, r
    assert r["energy_distance"] < 2 * read_json(finished / "metrics.json")["energy_distance"], r
    assert (
        runs["no boundary"]["energy_distance"] is None or runs["no boundary"]["energy_distance"] > 1
    )
    assert runs["no boundary"]["error"] > 0.5
    assert runs["one step"]["diversity"] < 0.7 * r["diversity"]

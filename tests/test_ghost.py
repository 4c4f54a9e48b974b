"""dryrun/ghost.py: it behaves as CUDA does, and counts what real tensors take."""

import contextlib
import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from common.errors import UserError
from dryrun import ghost
from dryrun.ghost import Ghost, GhostDevice
from tools.tracker import RealMemory

# Before the first backward of this process, when torch counts its devices: while pytest collects.
ghost.register()

DEVICE = "ghost"
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"


@pytest.fixture
def gpu():
    with GhostDevice() as device:
        yield device


def tensor(*shape, **kwargs):
    return torch.empty(*shape, device=DEVICE, **kwargs)


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 4))


# ---- which tensors may meet ----------------------------------------------------------------------


def test_a_tensor_on_the_host_beside_one_on_the_device_is_refused(gpu):
    x = tensor(2, 3)
    for mistake in (
        lambda: x + torch.ones(2, 3),
        lambda: x @ torch.ones(3, 2),
        lambda: torch.cat([x, torch.ones(2, 3)]),
        lambda: F.mse_loss(x, torch.ones(2, 3)),
        lambda: torch.where(torch.ones(2, 3, dtype=torch.bool), x, x),
        lambda: x.add_(torch.ones(2, 3)),
        lambda: torch._foreach_add_([x], [torch.ones(2, 3)]),
        lambda: torch.ones(2, 3)[tensor(2, dtype=torch.int64)],
    ):
        with pytest.raises(RuntimeError, match=r"test_ghost.py:\d+: aten::.*expected all tensors"):
            mistake()


def test_numbers_and_indices_of_the_host_are_allowed(gpu):
    x = tensor(4, 3)
    assert (x * torch.tensor(2.0)).device.type == DEVICE
    assert not gpu.waits
    assert x[torch.tensor([0, 2])].shape == (2, 3)
    x[torch.tensor([0, 2])] = 1.0
    x.copy_(torch.ones(4, 3))  # a copy is no meeting
    assert sum(gpu.waits.values()) == 3


def test_generators(gpu):
    own = torch.Generator(DEVICE).manual_seed(0)
    assert torch.randn(2, generator=own, device=DEVICE).shape == (2,)
    assert torch.randn(2, generator=torch.Generator()).device.type == "cpu"
    with pytest.raises(RuntimeError, match="expected a generator of the device"):
        torch.randn(2, generator=torch.Generator(), device=DEVICE)


def test_tensors_of_the_host_stay_real(gpu):
    assert torch.arange(4).sum().item() == 6
    assert type(torch.ones(2) + 1) is torch.Tensor


def test_meeting_inside_a_network_names_the_line(gpu):
    net = network().to(DEVICE)
    net[2].weight = nn.Parameter(torch.ones(16))
    with pytest.raises(RuntimeError, match="native_layer_norm: expected all tensors"):
        net(tensor(2, 8))


# ---- waits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.to("cpu"),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: (x > 0).unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.empty(3).copy_(x),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x.index_put((torch.tensor([0]),), x[:1]),
    ],
)
def test_what_waits_for_the_device(wait, gpu):
    wait(tensor(3))
    (line,) = gpu.waits
    assert line.startswith("tests/test_ghost.py:")


def test_what_does_not_wait(gpu):
    x = tensor(3)
    x.sum() + 1
    torch.ones(3).to(DEVICE, non_blocking=True)
    torch.empty(3).copy_(x, non_blocking=True)
    torch.full((3,), 2.0, device=DEVICE)
    x[x > 0] = 0.0  # a fill: CUDA does not count the elements
    x.where(x > 0, 0.0).clamp(min=1).nan_to_num()
    assert not gpu.waits


def test_small_integers_keep_their_numbers(gpu):
    lengths = torch.tensor([3, 5], device=DEVICE)
    assert torch.cat([lengths, lengths]).tolist() == [3, 5, 3, 5]
    assert int(lengths.max()) == 5
    assert (lengths > 4).nonzero().tolist() == [[1]]
    assert lengths[lengths > 4].shape == (1,)
    assert torch.arange(10, device=DEVICE)[lengths].sum().item() == 8
    lengths += 1  # written to: not known any more, also of views
    assert lengths.tolist() == [1, 1]


# ---- autocast ------------------------------------------------------------------------------------


def names(text):
    """Operations in a list of autocast_mode.h."""
    found = re.findall(r"_\((\w+)(?:, (\w+))?\)", text)
    return {name + (f".{overload}" if overload else "") for name, overload in found}


def macro(name):
    body = HEADER.read_text().split(f"#define AT_FORALL_{name}(_)")[1]
    return names(body.split("\n\n")[0])


@pytest.mark.parametrize(
    "name, ours",
    [
        ("LOWER_PRECISION_FP", ghost.LOWER_PRECISION),
        ("FP32", ghost.FP32),
        ("FP32_SET_OPT_DTYPE", ghost.FP32_OUTPUT),
        ("PROMOTE", ghost.WIDEST),
    ],
)
def test_lists_of_autocast_are_those_of_torchs_header(name, ours):
    if f"AT_FORALL_{name}(_)" not in HEADER.read_text():
        pytest.skip(f"torch {torch.__version__} writes its lists elsewhere")
    assert set(ours) == macro(name)


def test_lists_of_autocast_are_those_that_torch_registers_for_cuda():
    """binary_cross_entropy is forbidden there; `norm` is not used here."""
    found = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    theirs = {name.removeprefix("aten::") for name in found}
    ours = {*ghost.LOWER_PRECISION, *ghost.FP32, *ghost.FP32_OUTPUT, *ghost.WIDEST}
    assert ours <= theirs
    others = {name.split(".")[0] for name in theirs - ours}
    assert others <= {"binary_cross_entropy", "norm", "cudnn_convolution"} | {
        "cudnn_convolution_transpose"
    }


def test_autocast(gpu):
    net, x = network().to(DEVICE), tensor(2, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = net[0](x)
        assert y.dtype == torch.bfloat16
        assert net[2](y).dtype == torch.float32
        assert y.softmax(1).dtype == torch.float32
        assert (y * y).dtype == torch.bfloat16
        assert y.double().exp().dtype == torch.float64
        assert F.mse_loss(y, y).dtype == torch.float32
        assert torch.addcmul(y, y, y.float()).dtype == torch.float32
        with torch.autocast(DEVICE, enabled=False):
            assert net[0](x).dtype == torch.float32
    assert net[0](x).dtype == torch.float32


def test_autocast_casts_a_weight_once_a_pass(gpu):
    layer, x = nn.Linear(512, 512, bias=False, device=DEVICE), tensor(1, 512, dtype=torch.bfloat16)
    before = gpu.memory.now
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        layer(x), layer(x)
        assert 2 * 512**2 <= gpu.memory.now - before < 4 * 512**2
    assert gpu.memory.now == before


# ---- attention -----------------------------------------------------------------------------------


def attention_inputs(heads=4, kv_heads=4, length=64):
    q = tensor(2, heads, length, 16, requires_grad=True)
    k, v = (tensor(2, kv_heads, length, 16, requires_grad=True) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("kind", ["plain", "mask", "causal", "grouped"])
def test_fused_attention_keeps_no_matrix(kind, gpu):
    q, k, v = attention_inputs(kv_heads=2 if kind == "grouped" else 4, length=512)
    options = dict(
        plain={},
        mask=dict(attn_mask=tensor(2, 1, 512, 512, dtype=torch.bool)),
        causal=dict(is_causal=True),
        grouped=dict(enable_gqa=True),
    )[kind]
    before = gpu.memory.now
    out = F.scaled_dot_product_attention(q, k, v, **options)
    assert out.shape == q.shape
    assert out.transpose(1, 2).is_contiguous()
    assert gpu.memory.now - before == 4 * q.numel() + 4 * 2 * 4 * 512
    out.sum().backward()
    assert [t.grad.shape for t in (q, k, v)] == [t.shape for t in (q, k, v)]
    product = 2 * 2 * 4 * 512 * 512 * 16
    assert gpu.flops == 2 * product + 5 * product


def test_attention_refuses_what_cuda_refuses(gpu):
    q, k, v = attention_inputs()
    with pytest.raises(RuntimeError, match="expected one dtype"):
        F.scaled_dot_product_attention(q, k.half(), v)
    with pytest.raises(RuntimeError, match="expected all tensors on the device"):
        F.scaled_dot_product_attention(q, k, v, torch.ones(64, 64))
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, k, v, tensor(63, 64))


def test_forward_derivatives_of_attention(gpu):
    """As flowmap.py and sana_sprint.py compute them: by the kernel that keeps the matrix."""
    q, k, v = (t.detach() for t in attention_inputs())
    f = lambda q: F.scaled_dot_product_attention(q, k, v)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(f, (q,), (q,))
    with sdpa_kernel(SDPBackend.MATH):
        y, dy = torch.func.jvp(f, (q,), (q,))
    assert y.shape == dy.shape == q.shape


def test_forward_derivatives_under_autocast(gpu):
    net = network().to(DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        y, dy = torch.func.jvp(net, (tensor(2, 8),), (tensor(2, 8),))
    assert y.dtype == dy.dtype == torch.bfloat16


# ---- tensors and modules -------------------------------------------------------------------------


def test_data_of_a_parameter_can_be_replaced(gpu):
    p = nn.Parameter(tensor(1024, dtype=torch.bfloat16))
    before = gpu.memory.now
    p.data = p.data.float()
    assert (p.dtype, p.inner.dtype) == (torch.float32, torch.float32)
    assert gpu.memory.now == before + 2 * 1024
    assert (p * 2).dtype == torch.float32


def test_modules_move_and_are_copied(gpu):
    net = network().to(DEVICE)
    assert all(isinstance(p, nn.Parameter) and isinstance(p, Ghost) for p in net.parameters())
    before = gpu.memory.now
    twin = copy.deepcopy(net)
    assert gpu.memory.now == 2 * before
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in twin.parameters())
    twin.bfloat16()
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    twin.load_state_dict(net.state_dict())
    del twin
    assert gpu.memory.now == before


def test_views_share_their_memory(gpu):
    x = tensor(256)
    before = gpu.memory.now
    parts = [x.view(16, 16).t(), x[3:], x.detach(), *x.chunk(2), x.expand(4, 256)]
    assert gpu.memory.now == before
    del x
    assert gpu.memory.now == before
    del parts
    assert gpu.memory.now == 0


def test_in_place(gpu):
    x = tensor(4)
    before = gpu.memory.now
    y = x.add_(1).mul_(2)
    assert y is x
    torch._foreach_lerp_([x], [tensor(4)], 0.5)
    x.zero_(), x.normal_(), x.clamp_(0, 1)
    del y
    assert gpu.memory.now == before
    with pytest.raises(NotImplementedError):
        x.resize_(8)


@pytest.mark.parametrize("options", [dict(fused=True), dict(foreach=True), dict(foreach=False)])
def test_optimisers(options, gpu):
    net = network().to(DEVICE)
    opt = torch.optim.AdamW(net.parameters(), lr=0.1, **options)
    at_rest = []
    for _ in range(2):
        net(tensor(2, 8)).sum().backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        at_rest.append(gpu.memory.now)
    weights = sum(p.storage.nbytes for p in net.parameters())
    assert at_rest[0] == at_rest[1] >= 3 * weights


def test_hooks(gpu):
    net, seen = network().to(DEVICE), []
    net[0].register_forward_hook(lambda module, args, out: out + 1)
    net[1].register_full_backward_hook(lambda module, grads, out: seen.append(grads[0].shape))
    net[0].weight.register_hook(lambda grad: seen.append(grad.shape))
    net(tensor(2, 8)).sum().backward()
    assert seen == [(2, 16), (16, 8)]


def test_compiled_networks_are_refused(gpu):
    with pytest.raises(UserError, match="--compile"):
        torch.compile(network())


def test_an_older_torch_is_refused_in_one_line(monkeypatch):
    from torch.utils import backend_registration

    monkeypatch.delattr(backend_registration, "_setup_privateuseone_for_python_backend")
    with pytest.raises(UserError, match="--dry-run: expected torch 2.13.*found"):
        ghost.python_backend()


def test_one_device_at_a_time_and_none_afterwards():
    with GhostDevice() as device:
        x = tensor(2)
        with pytest.raises(RuntimeError, match="one ghost device at a time"):
            device.__enter__()
    with pytest.raises(RuntimeError, match="outside"):
        x + 1
    assert F.scaled_dot_product_attention is ghost.ATTENTION


# ---- what is counted -----------------------------------------------------------------------------


class Block(nn.Module):
    """Attention, convolution and a feed-forward layer."""

    def __init__(self, width=32):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = (t.unflatten(2, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x + self.ff(x)


def train(device, counter, checkpointed):
    """Two steps of a stack of blocks; the counter's peak counts from the second step on."""
    net = nn.ModuleList(Block() for _ in range(4)).to(device)
    opt = torch.optim.AdamW(net.parameters(), fused=True)
    for _ in range(2):
        counter.restart()
        x = torch.randn(8, 128, 32, device=device)
        for block in net:
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        x.square().mean().backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_peak_and_flops_are_those_of_real_tensors(checkpointed, monkeypatch):
    monkeypatch.setattr(ghost, "BLOCK", 1)
    with RealMemory() as real:
        train("cpu", real, checkpointed)
    with GhostDevice() as device:
        train(DEVICE, device, checkpointed)
    assert device.memory.peak == pytest.approx(real.peak, rel=0.05)

    # torch 2.13 leaves these two out
    mapping = {
        CPU_ATTENTION: lambda q, k, v, *rest, **named: sdpa_flop_count(q, k, v),
        CPU_BACKWARD: lambda g, q, k, v, *rest, **named: sdpa_backward_flop_count(g, q, k, v),
    }
    flops = FlopCounterMode(display=False, custom_mapping=mapping)
    flops.restart = contextlib.nullcontext  # counts both steps
    with flops:
        train("cpu", flops, checkpointed)
    assert 2 * device.flops == flops.get_total_flops()


def test_the_peak_is_reported_while_it_is_alive(gpu):
    seen = []
    gpu.memory.on_peak = lambda memory: seen.append((memory.now, memory.peak))
    x = tensor(1024)
    y = x + 1
    del y
    del x
    assert seen == [(8192, 8192)]


def test_large_tensors_know_the_line_that_made_them(gpu):
    x = tensor(2**20)
    assert re.match(r"tests/test_ghost.py:\d+$", x.storage.line)


def test_random_state_of_all_devices_is_kept():
    """fork_rng asks every device of the process, also while no dry run is going on."""
    state = torch.get_rng_state()
    with torch.random.fork_rng():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)


LAYERS = dict(
    silu=F.silu,
    mish=F.mish,
    gelu=F.gelu,
    gelu_tanh=lambda x: F.gelu(x, approximate="tanh"),
    relu=F.relu,
    elu=F.elu,
    leaky_relu=F.leaky_relu,
    softplus=F.softplus,
    hardswish=F.hardswish,
    sigmoid=torch.sigmoid,
    glu=lambda x: F.glu(x, 1),
    softmax=lambda x: x.softmax(1),
    logsumexp=lambda x: x.logsumexp(1),
    group_norm=lambda x: F.group_norm(x, 4),
    layer_norm=lambda x: F.layer_norm(x, x.shape[3:]),
    upsample=lambda x: F.interpolate(x, scale_factor=2.0),
    avg_pool=lambda x: F.avg_pool2d(x, 2),
    pixel_unshuffle=lambda x: F.pixel_unshuffle(x, 2),
    pad=lambda x: F.pad(x, (1, 1)),
    cat=lambda x: torch.cat([x, x], 1),
    square=torch.square,
    normalize=lambda x: F.normalize(x, dim=1),
)


@pytest.mark.parametrize("name", LAYERS)
def test_the_backward_of_a_layer_takes_what_real_tensors_take(name, monkeypatch):
    """A layer without a kernel of its own would be computed by a formula with more tensors."""
    monkeypatch.setattr(ghost, "BLOCK", 1)

    def backward(device):
        x = torch.zeros(2, 8, 16, 16, device=device, requires_grad=True)
        h = LAYERS[name](x * 1)
        h.backward(torch.ones_like(h))

    with RealMemory() as real:
        backward("cpu")
    with GhostDevice() as device:
        backward(DEVICE)
    assert device.memory.peak == pytest.approx(real.peak, rel=0.01)

"""A device without memory, for --dry-run: tensors there have shape, dtype, autograd and a lifetime,
but no numbers. Tensors on the CPU stay real.

    with GhostDevice() as gpu:                    # torch.device("ghost") exists from now on
        net = Net().to("ghost")
        net(torch.randn(2, 3, device="ghost")).sum().backward()
    gpu.memory.peak, gpu.flops, gpu.waits         # bytes, FLOPs, {source line: times}

It behaves as a CUDA device does where that can be seen from Python: which tensors may meet, what
autocast casts, what a fused attention kernel keeps, when the host waits for the device. A tensor is
a subclass around a tensor on torch's `meta` device; torch's Python backend (torch 2.13) gives the
device guards that autograd needs.

Not modelled: the time of anything, fragmentation and workspaces of CUDA's allocator and libraries,
kernels that do not exist for a dtype or a GPU. Numbers that a script fetches are made up (`item`),
except small integers that follow from numbers of the host.
"""

import functools
import gc
import math
import sys
import weakref
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from common.errors import UserError
from common.files import ROOT

aten = torch.ops.aten
NAME = "ghost"
TORCH = str(Path(torch.__file__).parent)
BLOCK = 512  # bytes; CUDA's allocator rounds up to a multiple
SMALL = 4096  # integers of a tensor whose numbers are kept


def leaves_of(x):
    """What stands in nested lists, tuples and dicts, as a list. As tree_leaves of
    torch.utils._pytree, which knows more containers and takes five times as long."""
    if isinstance(x, (list, tuple)):
        return [leaf for part in x for leaf in leaves_of(part)]
    if isinstance(x, dict):
        return [leaf for part in x.values() for leaf in leaves_of(part)]
    return [x]


def map_leaves(f, x):
    """x with f(leaf) in place of each of `leaves_of`."""
    if isinstance(x, (list, tuple)):
        return type(x)([map_leaves(f, part) for part in x])
    if isinstance(x, dict):
        return {key: map_leaves(f, part) for key, part in x.items()}
    return f(x)


# ---- autocast: CUDA's lists, by their names in torch's autocast_mode.h ---------------------------

LOWER_PRECISION = """
    _convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum
    mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot
    _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    _scaled_dot_product_flash_attention scaled_dot_product_attention
""".split()
FP32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm
    group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss
    huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
    _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
    _upsample_bicubic2d_aa
""".split()
FP32_OUTPUT = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
    linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList
""".split()
WIDEST = """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
""".split()


def on_device(t):
    """Also of a Ghost inside one of functorch's wrappers, as torch.func.jvp makes them."""
    return isinstance(t, torch.Tensor) and t.device.type == NAME


def eligible(t):
    return on_device(t) and t.is_floating_point() and t.dtype != torch.float64


def cast_all(dtype):
    """Rule: all inputs to `dtype`. Casts of weights to a lower precision are kept for the pass."""

    def cast(t):
        if not eligible(t) or t.dtype == dtype:
            return t
        keep = dtype != torch.float32 and t.dtype == torch.float32 and t.is_leaf
        if not (keep and t.requires_grad and torch.is_autocast_cache_enabled()):
            return t.to(dtype)
        kept = GhostDevice.current.casts
        if id(t) not in kept:
            kept[id(t)] = t, t.to(dtype)
        return kept[id(t)][1]

    return lambda args, kwargs: (map_leaves(cast, args), map_leaves(cast, kwargs))


def widen_output(args, kwargs):
    """Rule: the output is fp32, by the argument `dtype`, unless that is given."""
    if eligible(args[0]):
        kwargs.setdefault("dtype", torch.float32)
    return args, kwargs


def cast_to_widest(args, kwargs):
    """Rule: all inputs to the widest of their dtypes."""
    found = [t.dtype for t in leaves_of((args, kwargs)) if eligible(t)]
    if not found:
        return args, kwargs
    widest = functools.reduce(torch.promote_types, found)
    return cast_all(widest)(args, kwargs)


def autocast_kernel(op, rule):
    def kernel(*args, **kwargs):
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(key):
            args, kwargs = rule(args, kwargs)
            return op(*args, **kwargs)

    return kernel


def register_autocast(library):
    low = lambda args, kwargs: cast_all(torch.get_autocast_dtype(NAME))(args, kwargs)
    rules = (
        (LOWER_PRECISION, low),
        (FP32, cast_all(torch.float32)),
        (FP32_OUTPUT, widen_output),
        (WIDEST, cast_to_widest),
    )
    for names, rule in rules:
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(aten, packet), overload or "default")
            library.impl(name, autocast_kernel(op, rule))


# ---- registration, once a process ----------------------------------------------------------------


def python_backend():
    """torch.utils.backend_registration. UserError if this torch has no Python backend."""
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        raise UserError(
            f"--dry-run: expected torch 2.13, which has a Python backend, found {torch.__version__}"
        )
    return backend_registration


# torch computes these from other operations on a device that has no kernel, with more temporary
# tensors. CUDA has one.
WITH_KERNEL = ("silu_backward", "mish_backward", "native_channel_shuffle")


def not_reached(*args, **kwargs):
    """A kernel for torch to find. Tensors on the device are seen before (Ghost)."""
    raise NotImplementedError("the ghost device has no kernels")


@functools.cache
def register():
    """Makes the device type "ghost" known to torch. UserError if torch cannot.

    To be called before the first backward of the process: torch counts its devices there.
    """
    backends = python_backend()

    class Backend(backends._DummyBackendModule):
        def get_amp_supported_dtype(self):
            return [torch.bfloat16, torch.float16]

        def get_rng_state(self, device=None):  # for torch.random.fork_rng; there are no numbers
            return torch.empty(0, dtype=torch.uint8)

        def set_rng_state(self, state, device=None):
            pass

    backends._setup_privateuseone_for_python_backend(NAME, Backend())
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    lists = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    register_autocast(lists)
    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name in WITH_KERNEL:
        kernels.impl(name, not_reached)
    return fallback, lists, kernels  # a Library that is deleted takes its kernels with it


# ---- memory --------------------------------------------------------------------------------------


class Memory:
    """Bytes of all storages that are alive, and their peak.

    on_peak(memory) is called at the end of a rise to a new peak, while all of it is still alive.
    """

    def __init__(self):
        self.now = 0
        self.peak = 0
        self.rising = False  # a new peak that on_peak has not seen yet
        self.on_peak = None
        self.live = weakref.WeakSet()
        self.collected = 0

    def add(self, n):
        if self.on_peak and self.now + n > max(self.peak, self.collected * 1.05):
            # A Python object around each tensor makes reference cycles that real tensors do not
            # have. Without this, dead ones would count.
            gc.collect()
            self.collected = self.now + n
        self.now += n
        if self.now > self.peak:
            self.peak = self.now
            self.rising = True

    def remove(self, n):
        self.settle()
        self.now -= n

    def settle(self):
        if self.rising and self.on_peak:
            self.on_peak(self)
        self.rising = False

    def restart(self):
        """The peak counts from here."""
        gc.collect()
        self.peak = self.collected = self.now
        self.rising = True


def round_up(nbytes):
    return -(-round(nbytes) // BLOCK) * BLOCK


class Storage:
    """Bytes that a tensor and its views share."""

    def __init__(self, memory, nbytes, line, part=1):
        self.memory = memory
        self.whole = nbytes
        self.part = part  # of it that this process holds, see dryrun/wire.py
        self.nbytes = round_up(nbytes * part)
        self.line = line  # of the source, that made it
        self.written = False  # in place, so numbers that are known of it may be wrong
        memory.add(self.nbytes)
        memory.live.add(self)

    def share(self, part):
        """Only this part of it counts from now on."""
        self.part = part
        self.memory.remove(self.nbytes)
        self.nbytes = round_up(self.whole * part)
        self.memory.add(self.nbytes)

    def __del__(self):
        self.memory.remove(self.nbytes)


def source_line(within=None, outside=()):
    """ "file:line" of the innermost Python code outside torch, or below the folder `within` and
    not below one of `outside`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        inside = name.startswith(within) if within else not name.startswith((TORCH, "<"))
        inside = inside and not name.startswith(outside)
        if inside and name != __file__ and "/contextlib.py" not in name:
            short = name.removeprefix(f"{ROOT}/").split("site-packages/")[-1]
            return f"{short}:{frame.f_lineno}"
        frame = frame.f_back
    return "the backward pass"  # it runs in a thread of its own, without Python code


def project_line():
    return source_line(str(ROOT))


def script_line():
    """Outside of the packages that all scripts share."""
    shared = ("common", "data", "dryrun", "training")
    return source_line(str(ROOT), outside=tuple(f"{ROOT}/{name}/" for name in shared))


# ---- tensors -------------------------------------------------------------------------------------


class Ghost(torch.Tensor):
    """A tensor on the device. inner: the same on `meta`. storage: a Storage. numbers: the same on
    the CPU where they are known, of small integers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, storage, numbers=None):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        self.inner = inner
        self.storage = storage
        self.numbers = numbers
        return self

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.inner, self.storage, self.numbers = new.inner, new.storage, new.numbers

    def __repr__(self, **kwargs):
        return f"Ghost({list(self.shape)}, {self.dtype})"

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                twin = self.clone()
            if isinstance(self, torch.nn.Parameter):
                twin = torch.nn.Parameter(twin, self.requires_grad)
            memo[id(self)] = twin
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if GhostDevice.current is None:
            raise RuntimeError(f"{op}: a tensor on the ghost device, outside `with GhostDevice()`")
        return GhostDevice.current.run(op, args, kwargs or {})


class Generator(torch.Generator):
    """torch.Generator, also for the device."""

    of_device = set()  # addresses: torch makes new Python objects around generators

    def __new__(cls, device="cpu"):
        on_device = torch.device(device).type == NAME
        self = super().__new__(cls, "cpu" if on_device else device)
        if on_device:
            cls.of_device.add(self._cdata)
        return self

    def __del__(self):
        self.of_device.discard(self._cdata)


MOVES = {aten._to_copy.default, aten.copy_.default, aten.lift_fresh.default, aten.lift.default}
INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# Their result has as many elements as the numbers want, so the host waits to know how many. What
# is taken here is the largest possible result, and one value for `unique`.
DATA_DEPENDENT = {
    aten.nonzero.default: lambda x: x.new_empty(x.numel(), x.ndim, dtype=torch.int64),
    aten.masked_select.default: lambda x, mask: x.new_empty(
        math.prod(torch.broadcast_shapes(x.shape, mask.shape))
    ),
    aten._unique2.default: lambda x, *flags, **named: (
        x.new_empty(1),
        x.new_empty(x.shape if any((*flags[1:2], named.get("return_inverse"))) else 0),
        x.new_empty(1 if any((*flags[2:3], named.get("return_counts"))) else 0),
    ),
}
# Optimisers and averages make these, of what each process holds a part of.
LIKE = {aten.zeros_like.default, aten.empty_like.default}
IGNORED = {aten._assert_async.default, aten._assert_async.msg, aten.record_stream.default}


class GhostDevice(TorchDispatchMode):
    """Context in which the device exists.

    memory: a Memory. flops: by torch's own formulas (torch.utils.flop_counter). operations: how
    many ran. waits: how often the host waited for the device, by source line. dtypes: FLOPs by
    dtype of the products that made them. odd: FLOPs of products in other dtypes than `expected`
    (None: any), by dtype and the line in the script and in the project's innermost code.
    """

    current = None

    def __init__(self):
        register()
        super().__init__()
        self.memory = Memory()
        self.flops = 0
        self.operations = 0
        self.waits = Counter()
        self.dtypes = defaultdict(int)
        self.expected = None
        self.odd = Counter()
        self.casts = {}  # of weights by autocast, until the end of the pass

    def __enter__(self):
        if GhostDevice.current is not None:
            raise RuntimeError("one ghost device at a time")
        GhostDevice.current = self
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=): made on the host
        self.replaced = []
        self.hooks = []  # handles of hooks that end with the device
        self.replace(torch, "Generator", Generator)
        self.replace(torch, "compile", refuse_compile)
        self.replace(torch, "clear_autocast_cache", self.clear_casts)
        self.replace(F, "scaled_dot_product_attention", attention)
        return super().__enter__()

    def __exit__(self, *exc):
        result = super().__exit__(*exc)
        for owner, name, original in reversed(self.replaced):
            setattr(owner, name, original)
        for handle in self.hooks:
            handle.remove()
        torch._C._set_only_lift_cpu_tensors(False)
        self.casts.clear()
        GhostDevice.current = None
        return result

    def replace(self, owner, name, new):
        self.replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def clear_casts(self):
        self.casts.clear()
        CLEAR_CACHE()

    def restart(self):
        """FLOPs, waits and the peak count from here."""
        self.flops = self.operations = 0
        self.waits.clear()
        self.dtypes.clear()
        self.odd.clear()
        self.memory.restart()

    # -- one operation

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        here = device is not None and torch.device(device).type == NAME
        if here or any(isinstance(t, Ghost) for t in leaves_of((args, kwargs))):
            return self.run(op, args, kwargs)
        return op(*args, **kwargs)

    def wait(self, what):
        inner, ours = source_line(), project_line()
        line = ours if inner == ours else f"{ours} in {inner}"
        self.waits[f"{line} {what}"] += 1

    def run(self, op, args, kwargs):
        self.operations += 1
        tensors = [t for t in leaves_of((args, kwargs)) if isinstance(t, torch.Tensor)]
        ghosts = [t for t in tensors if isinstance(t, Ghost)]

        # To the host.
        if op is aten._local_scalar_dense.default:
            self.wait("reads a number")
            return item(args[0])
        if op is aten.equal.default:
            self.wait("compares")
            return True
        if op is aten.copy_.default and not isinstance(args[0], Ghost):
            return self.copy_to_host(args, kwargs)
        device = kwargs.get("device")
        if ghosts and device is not None and torch.device(device).type == "cpu":
            return self.to_host(args[0], kwargs)

        # Inputs on meta.
        moves = op in MOVES or device is not None
        if moves and len(ghosts) < len(tensors):
            self.from_host(op, args, kwargs)
        check_devices(op, args, tensors, ghosts, moves)
        if op in INDEXING:
            self.index_from_host(args)
            if any(is_mask(t) for t in args[1]):
                args = self.unmask(op, args)
        inner_args, inner_kwargs = map_leaves(lambda t: on_meta(t, moves), (args, kwargs))
        if "device" in inner_kwargs or op is aten._to_copy.default:
            inner_kwargs["device"] = "meta"
        inner_kwargs.pop("pin_memory", None)
        if "generator" in inner_kwargs:
            check_generator(op, inner_kwargs["generator"])
            inner_kwargs["generator"] = None

        # In place on lists: optimisers. There is nothing to compute.
        mutable = op._schema.is_mutable
        if op in IGNORED or mutable and not op._schema.returns:
            return None
        if op in DATA_DEPENDENT:
            self.wait("makes a tensor whose size depends on numbers")
            found = on_host(op, args, kwargs, ghosts)
            if found is not None:
                return map_leaves(self.with_numbers, found)
            out = DATA_DEPENDENT[op](*inner_args, **inner_kwargs)
        else:
            out = op(*inner_args, **inner_kwargs)
        self.count(op, inner_args, inner_kwargs, out)
        if mutable:
            return self.written(op, args, kwargs, inner_args, out)
        return self.wrap(op, out, ghosts, lambda: known_numbers(op, args, kwargs, ghosts, out))

    def wrap(self, op, out, ghosts, numbers):
        storages = {t.inner.untyped_storage()._cdata: t.storage for t in ghosts}
        only = isinstance(out, torch.Tensor)

        def as_ghost(t):
            if not isinstance(t, torch.Tensor) or isinstance(t, Ghost):
                return t
            key = t.untyped_storage()._cdata
            if key not in storages:
                part = ghosts[0].storage.part if op in LIKE else 1
                storages[key] = self.storage(t.untyped_storage().nbytes(), part)
            return Ghost(t, storages[key], numbers() if only else None)

        return map_leaves(as_ghost, out)

    def with_numbers(self, t):
        """A tensor of the host, on the device."""
        return Ghost(t.to("meta"), self.storage(t.untyped_storage().nbytes()), t)

    def storage(self, nbytes, part=1):
        line = "less than 1 MiB each"
        if nbytes >= 2**20:
            inner, ours = source_line(), project_line()
            line = inner if inner == ours else f"{inner} from {ours}"
        return Storage(self.memory, nbytes, line, part)

    def written(self, op, args, kwargs, inner_args, out):
        """Result of an operation that writes into its inputs."""
        name = op._schema.name
        if name in ("aten::resize_", "aten::set_", "aten::resize_as_"):
            raise NotImplementedError(f"{name}: not possible on the ghost device")
        if "out" in kwargs:
            kwargs["out"].storage.written = True
            return kwargs["out"]
        target = args[0]
        if target.shape != target.inner.shape or target.stride() != target.inner.stride():
            raise NotImplementedError(f"{name}: not possible on the ghost device")
        target.storage.written = True
        return (
            target if isinstance(out, torch.Tensor) else self.wrap(op, out, [target], lambda: None)
        )

    def count(self, op, args, kwargs, out):
        formula = flop_registry.get(op._overloadpacket)
        if formula is None:
            return
        flops = formula(*args, **kwargs, out_val=out)
        first = next(t for t in leaves_of(args) if isinstance(t, torch.Tensor))
        self.add_flops(flops, first.dtype)

    def add_flops(self, n, dtype):
        self.flops += n
        self.dtypes[dtype] += n
        if self.expected is not None and dtype != self.expected:
            lines = dict.fromkeys((script_line(), project_line()))
            self.odd[dtype, ", ".join(lines)] += n

    # -- between host and device

    def to_host(self, t, kwargs):
        if not kwargs.get("non_blocking"):
            self.wait("copies to the host")
        dtype = kwargs.get("dtype") or t.dtype
        if numbers_of(t) is not None:
            return t.numbers.to(dtype)
        return torch.ones(t.shape, dtype=dtype)

    def copy_to_host(self, args, kwargs):
        to, source = args[:2]
        if not (kwargs.get("non_blocking") or len(args) > 2 and args[2]):
            self.wait("copies to the host")
        numbers = numbers_of(source)
        return to.copy_(numbers) if numbers is not None else to.fill_(1)

    def index_from_host(self, args):
        """CUDA copies indices that are on the host, and waits for that."""
        on_host = [t for t in args[1] if isinstance(t, torch.Tensor) and not on_device(t)]
        if isinstance(args[0], Ghost) and on_host:
            self.wait("copies an index from the host")

    def from_host(self, op, args, kwargs):
        """CUDA waits for the copy, and so for all that was started before it, unless it is told
        not to. What the host's memory holds is read before either returns."""
        waits = not (kwargs.get("non_blocking") or op is aten.copy_.default and len(args) > 2)
        if op in (aten._to_copy.default, aten.copy_.default) and waits:
            self.wait("copies from the host")

    def unmask(self, op, args):
        """An index with a mask: the positions of its true elements, as many as there can be."""
        fills = op not in (aten.index.Tensor, aten._unsafe_index.Tensor)
        one_number = fills and args[2].numel() == 1  # then CUDA fills without counting them
        indices = []
        for t in args[1]:
            if not is_mask(t):
                indices.append(t)
                continue
            if isinstance(t, Ghost) and not one_number:
                self.wait("indexes with a mask")
            numbers = numbers_of(t) if isinstance(t, Ghost) else t
            if numbers is not None:
                places = [p.to("meta") for p in numbers.nonzero(as_tuple=True)]
            else:
                places = [torch.empty(t.numel(), dtype=torch.int64, device="meta")] * t.ndim
            indices += places
        return (args[0], indices, *args[2:])


CLEAR_CACHE = torch.clear_autocast_cache
ATTENTION = F.scaled_dot_product_attention


def is_mask(t):
    return isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)


def on_meta(t, moves):
    """A tensor on meta; a number on the host stays, as CUDA takes it like a Python number."""
    if isinstance(t, Ghost):
        return t.inner
    if isinstance(t, torch.Tensor) and t.device.type == "cpu" and (t.ndim or moves):
        return t.to("meta")
    return t


def check_devices(op, args, tensors, ghosts, moves):
    """RuntimeError for a tensor on the host beside one on the device, where CUDA refuses it."""
    if moves or not ghosts:
        return
    allowed = set()
    if op in INDEXING:  # indices may be on the host
        allowed = {id(t) for t in args[1]}
    for t in tensors:
        if on_device(t) or t.ndim == 0 or id(t) in allowed or t.device.type == "meta":
            continue
        raise RuntimeError(
            f"{project_line()}: {op._schema.name}: expected all tensors on the device, found one "
            f"{list(t.shape)} on {t.device}"
        )


def check_generator(op, generator):
    if generator is not None and generator._cdata not in Generator.of_device:
        raise RuntimeError(
            f"{project_line()}: {op._schema.name}: expected a generator of the device, found one "
            f"of {generator.device}"
        )


def refuse_compile(*args, **kwargs):
    raise UserError("--compile: expected no compiled network with --dry-run; leave it out")


# ---- numbers -------------------------------------------------------------------------------------


def numbers_of(t):
    """Numbers of a tensor on the device as a tensor on the CPU, None where they are not known."""
    return None if t.storage.written else t.numbers


def item(t):
    numbers = numbers_of(t)
    if numbers is not None:
        return numbers.item()
    return 1.0 if t.dtype.is_floating_point else t.dtype != torch.bool and 1


def known_numbers(op, args, kwargs, ghosts, out):
    """Numbers of a small integer result, if those of its inputs are known; else None."""
    integers = not (out.dtype.is_floating_point or out.dtype.is_complex)
    if not integers or out.numel() > SMALL or "empty" in op._schema.name:
        return None
    if torch.Tag.nondeterministic_seeded in op.tags:
        return None
    return on_host(op, args, kwargs, ghosts)


def on_host(op, args, kwargs, ghosts):
    """Result of an operation on the CPU; None if a number of an input is not known."""
    if any(numbers_of(t) is None for t in ghosts):
        return None
    to_numbers = lambda t: t.numbers if isinstance(t, Ghost) else t
    args, kwargs = map_leaves(to_numbers, (args, kwargs))
    if "device" in kwargs:
        kwargs["device"] = "cpu"
    with torch._C._DisableTorchDispatch():
        return op(*args, **kwargs)


# ---- fused attention -----------------------------------------------------------------------------


def heads_last(t, shape, dtype=None):
    """Memory in the order in which fused kernels write: [B, L, H, D], returned as [B, H, L, D]."""
    b, h, length, d = shape
    return t.new_empty(b, length, h, d, dtype=dtype or t.dtype).transpose(1, 2)


class FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps for the backward (its inputs, its output and one number a row) and
    what it costs. q, k, v: [B, H, L, D]; k and v may have fewer heads."""

    @staticmethod
    def forward(q, k, v, mask):
        return heads_last(q, (*q.shape[:-1], v.shape[-1])), q.new_empty(
            q.shape[:-1], dtype=torch.float32
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask = inputs
        out, rows = output
        ctx.save_for_backward(q, k, v, mask, out, rows)
        ctx.mark_non_differentiable(rows)
        shapes = attention_shapes(q, k, v)
        ctx.backward_flops = sdpa_backward_flop_count(out.shape, *shapes)
        count_attention(q, sdpa_flop_count(*shapes))

    @staticmethod
    def backward(ctx, grad, unused):
        q, k, v, _, _, _ = ctx.saved_tensors
        count_attention(q, ctx.backward_flops)
        return (*(heads_last(t, t.shape) for t in (q, k, v)), None)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(f"{project_line()}: fused attention has no forward-mode derivative")


def attention_shapes(q, k, v):
    b, heads = q.shape[:2]
    return q.shape, (b, heads, *k.shape[2:]), (b, heads, *v.shape[2:])


def count_attention(q, flops):
    GhostDevice.current.add_flops(flops, q.dtype)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
    """F.scaled_dot_product_attention."""
    fused = (
        torch.backends.cuda.flash_sdp_enabled()
        or torch.backends.cuda.mem_efficient_sdp_enabled()
        or torch.backends.cuda.cudnn_sdp_enabled()
    )
    needs_mask_grad = attn_mask is not None and attn_mask.requires_grad
    if query.device.type != NAME or query.ndim != 4 or not fused or needs_mask_grad:
        return ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
    q, k, v = query, key, value
    if torch.is_autocast_enabled(NAME):
        dtype = torch.get_autocast_dtype(NAME)
        q, k, v, attn_mask = (
            t.to(dtype) if t is not None and eligible(t) else t for t in (q, k, v, attn_mask)
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise RuntimeError(
            f"{project_line()}: attention: expected one dtype, found {q.dtype}, {k.dtype}, "
            f"{v.dtype}"
        )
    tensors = [q, k, v] + ([] if attn_mask is None else [attn_mask])
    check_devices(aten.scaled_dot_product_attention.default, (), tensors, [q], moves=False)
    if attn_mask is not None:
        torch.broadcast_shapes(attn_mask.shape, (*q.shape[:-1], k.shape[-2]))
    if not kwargs.get("enable_gqa"):
        torch.broadcast_shapes(q.shape[:2], k.shape[:2])
    return FusedAttention.apply(q, k, v, attn_mask)[0]

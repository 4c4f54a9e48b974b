"""Memory: what the networks will need, what the device has."""

import ctypes
import os
import sys
from pathlib import Path

import torch

from common.errors import UserError
from common.files import format_bytes

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None


def keep_heap():
    """On a CPU, glibc returns freed memory to the system and fetches it again, page by page, in
    every iteration. Keeping it makes a run a few per cent faster. Does nothing without glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_trim_threshold, 2**31 - 1)  # free bytes at the top of the heap that are kept
    mallopt(m_mmap_threshold, 2**30)  # smaller blocks are taken from the heap


def peak_memory(device):
    """Largest number of bytes that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return 0  # not known
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device, world):
    """Bytes that this process can still get: of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return available_on_host() // processes_here


def available_on_host():
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def estimate_memory(args, world, sizes, students=1, critics=0, averages=0, single=False):
    """Bytes by part, without activations, that the networks of a run will take in one process.

    sizes: of the teacher, known before it is loaded: parameters of its network (all experts) and
    of its vae, width (bytes of a frozen parameter), number of experts; count_small, a function:
    parameters of one network that --small makes.
    students, critics, averages: how many networks the script makes, of the teacher's size or of
    that of --small and --small-fake.
    single: each student is one network, also where the teacher has several experts.
    """
    network, width = sizes["network"], sizes["width"]
    student = critic = network
    if args.small:
        student = sizes["count_small"](args.small) * sizes.get("experts", 1)
    if args.small_fake:
        critic = sizes["count_small"](args.small_fake) * sizes.get("experts", 1)
    ways = (args.shard_size or world) if args.shard else 1  # processes that share each network
    if single:
        students = students / sizes.get("experts", 1)
    if args.ema and not args.ema_cpu:
        averages += students
    if args.lora:  # adapters are small
        students = averages = 0
    if args.lora_fake:
        critics = 0
    trained = 4 + 4 + 8  # fp32 weight, gradient, two moments
    return {
        "teacher": network * width / ways,
        "students": students * student * trained / ways,
        "critics": critics * critic * trained / ways,
        "averages": averages * student * 4 / ways,
        "VAE": sizes.get("vae", 0) * width,
    }


def refuse_if_too_large(args, total, free, device):
    """UserError with advice if the networks need more bytes than the device has."""
    if total <= free:
        return
    advice = ["--shard on more processes"]
    if not args.lora:
        advice.insert(0, "--lora RANK")
    if args.ema and not args.ema_cpu:
        advice.append("--ema-cpu")
    raise UserError(
        f"--teacher {args.teacher}: its networks need {format_bytes(total)}, activations not "
        f"included, found {format_bytes(free)} free on {device} for a process; "
        f"try {', '.join(advice)} (--grad-checkpoint and a smaller --batch lower activations only)"
    )


def parameter_bytes(modules):
    """Bytes by name for modules {name: module}: fp32 gradient and two moments if trained.

    Weights that modules share are counted once, under the first name.
    """
    parts = {}
    seen = set()
    for name, module in modules.items():
        parts[name] = 0
        for p in module.parameters():
            if id(p) in seen:
                continue
            seen.add(id(p))
            p_here = p.to_local() if hasattr(p, "to_local") else p  # --shard: this process's part
            parts[name] += p_here.numel() * (p.element_size() + 12 * p.requires_grad)
    return parts


def describe_bytes(parts, free):
    """One line: bytes by part, their sum, what is free."""
    each = ", ".join(f"{name} {format_bytes(n)}" for name, n in parts.items() if n)
    total = format_bytes(sum(parts.values()))
    return f"{each}: {total}, {format_bytes(free)} free"

"""Processes: the device, the process group, and results on which all ranks agree."""

import datetime
import os
import re
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.errors import RunError, UserError, require

LAUNCHERS = {  # variables that say how many tasks a launcher has started
    "SLURM_NTASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}


def init_processes(args):
    """Device and process group from --device, --dtype and torchrun's environment.

    Returns rank, number of processes, device, dtype of network passes. UserError: no such device.
    """
    check_launcher()
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device)
    if world > 1 and not dist.is_initialized():
        init_process_group(device, rank, world)
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda")
    return rank, world, device, torch.bfloat16 if bf16 else torch.float32


def check_launcher():
    """UserError if a launcher has started several processes that do not know of each other."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" in os.environ:
        return
    require(
        world == 1,
        f"WORLD_SIZE={world} without RANK: expected both, as torchrun sets them, or neither",
    )
    for variable, launcher in LAUNCHERS.items():
        tasks = os.environ.get(variable, "1")
        require(
            tasks in ("", "0", "1"),
            f"{variable}={tasks} without RANK: {launcher} started {tasks} tasks, and each would be "
            "a run of its own; start one torchrun --nproc_per_node=GPUS a machine, "
            f"or a single task ({launcher} -n 1)",
        )


def choose_device(name):
    """torch.device of --device. UserError: no such device, or not one for this process."""
    known = re.fullmatch(r"auto|cpu(:0)?|cuda(:\d{1,3})?", name)
    other = ""
    if name.split(":")[0] == "mps":
        other = " (Apple's GPUs have no float64, which is needed here: use --device cpu)"
    require(
        known is not None,
        f"--device: expected auto, cpu, cuda or cuda:N, found {name}{other}",
    )
    cuda = torch.cuda.is_available()
    require(
        cuda or not name.startswith("cuda"),
        f"--device {name}: torch sees no CUDA device here; "
        "use --device cpu or install a CUDA build of torch",
    )
    if not cuda or name.startswith("cpu"):
        return torch.device("cpu")
    device = torch.device("cuda", cuda_index(name))
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return device


def cuda_index(name):
    """Number of this process's GPU among those that it sees. name: auto, cuda or cuda:N."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    count = torch.cuda.device_count()
    require(
        processes <= count,
        f"--nproc_per_node: expected at most one process for each of the {count} GPUs that torch "
        f"sees on this machine, found {processes}",
    )
    if ":" not in name:
        return local_rank
    require(
        "LOCAL_RANK" not in os.environ,
        f"--device {name}: expected cuda, since torchrun gives each process its own GPU; "
        "CUDA_VISIBLE_DEVICES=2,3 torchrun ... chooses which",
    )
    index = int(name.split(":")[1])
    require(
        index < count,
        f"--device {name}: expected cuda:0 to cuda:{count - 1}, as many as torch sees "
        "(CUDA_VISIBLE_DEVICES numbers them anew from 0)",
    )
    return index


def init_process_group(device, rank, world):
    # gloo also on CUDA: numbers that only the host needs never wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=30)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarts or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        dist.init_process_group(backend, timeout=timeout)
        return
    # torchrun's store outlives its workers and still holds the addresses of the dead ones (pytorch
    # issue 135712), so every restart uses new names. The count is per machine: on several machines
    # start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
    store, _, _ = next(dist.rendezvous("env://", rank, world))
    store = dist.PrefixStore(f"restart_{restarts}", store)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)


def rank_and_world():
    """Of the process group; (0, 1) without one."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def on_rank0(fn):
    """fn() on rank 0 -> its result, on every rank.

    Its UserError or RunError is raised on every rank, so that none waits, and has the attribute
    on_all_ranks, so that one rank prints it.
    """
    rank, world = rank_and_world()
    result, error = None, None
    if rank == 0:
        try:
            result = fn()
        except (UserError, RunError) as e:
            error = e
    if world > 1:
        box = [(result, error)]
        dist.broadcast_object_list(box)
        result, error = box[0]
    if error is not None:
        error.on_all_ranks = True
        raise error
    return result


def on_all_ranks(fn):
    """fn() on every rank -> list of the results by rank.

    A UserError on one rank is raised on all, so that none waits for a process that has ended. It
    names the rank if rank 0 has none.
    """
    _, world = rank_and_world()
    result, error = None, None
    try:
        result = fn()
    except UserError as e:
        error = str(e)
    every = [(result, error)]
    if world > 1:
        every = [None] * world
        dist.all_gather_object(every, (result, error))
    for rank, (_, message) in enumerate(every):
        if message is not None:
            error = UserError(f"rank {rank}: {message}" if rank else message)
            error.on_all_ranks = True
            raise error
    return [result for result, _ in every]


def require_same(value, what):
    """UserError on every rank if the ranks have different values."""
    values = on_all_ranks(lambda: value)
    others = [rank for rank, other in enumerate(values) if other != values[0]]
    if others:
        error = UserError(
            f"{what}: expected the same on all machines, "
            f"process {others[0]} has others than process 0"
        )
        error.on_all_ranks = True
        raise error


def bar_interval():
    """Seconds between updates of a progress bar: in a file each update is a line."""
    return 0.2 if sys.stderr.isatty() else 10


def run_in_step(work, total, unit):
    """Runs an iterator of small pieces of work on every rank, with a progress bar on rank 0.

    work: yields after each piece how many of `total` units are done. The ranks meet after every
    piece. So none waits longer than a piece takes, which the process group limits to 30 minutes,
    and a UserError of one ends all.
    """
    rank, _ = rank_and_world()
    bar = tqdm(
        total=total,
        unit=unit,
        delay=5,  # seconds; what is done sooner needs no bar
        mininterval=bar_interval(),
        disable=rank > 0,
        leave=False,
    )
    with bar:
        while True:
            done = on_all_ranks(lambda: next(work, None))
            if all(n is None for n in done):
                return
            bar.update(sum(n or 0 for n in done))


def gather_rows(x, n, rank, world):
    """Rows rank, rank + world, ... of every rank -> all n rows in order, on every rank.

    x: [n_local, ...].
    """
    if world == 1:
        return x
    most = -(-n // world)
    padding = x.new_zeros(most - len(x), *x.shape[1:])
    padded = torch.cat([x, padding])
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:n]

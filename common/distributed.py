"""Processes: the device, the process group, and results on which all ranks agree."""

import datetime
import os

import torch
import torch.distributed as dist

from common.errors import RunError, UserError, require


def init_processes(args):
    """Device and process group from --device, --dtype and torchrun's environment.

    Returns rank, number of processes, device, dtype of network passes. UserError: no such device.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device)
    if world > 1 and not dist.is_initialized():
        init_process_group(device, rank, world)
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda")
    return rank, world, device, torch.bfloat16 if bf16 else torch.float32


def choose_device(name):
    cuda = torch.cuda.is_available()
    known = name in ("auto", "cpu", "cuda")
    require(known, f"--device: expected auto, cpu or cuda, found {name}")
    require(
        cuda or name != "cuda",
        "--device cuda: torch sees no CUDA device here; "
        "use --device cpu or install a CUDA build of torch",
    )
    if not cuda or name == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return device


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


def on_rank0(fn, rank, world):
    """fn() on rank 0 -> its result, on every rank.

    Its UserError or RunError is raised on every rank, so that none waits.
    """
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
        raise error
    return result


def on_all_ranks(fn, world):
    """fn() on every rank -> list of the results by rank.

    A UserError on one rank is raised on all, so that none waits for a process that has ended.
    """
    result, error = None, None
    try:
        result = fn()
    except UserError as e:
        error = str(e)
    every = [(result, error)]
    if world > 1:
        every = [None] * world
        dist.all_gather_object(every, (result, error))
    for _, error in every:
        require(error is None, error)
    return [result for result, _ in every]


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

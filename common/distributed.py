"""Processes: device, process group, results that all ranks agree on."""

import datetime
import os

import torch
import torch.distributed as dist

from common.errors import UserError


def init_processes(args):
    """Device and process group of --device, --dtype and torchrun's environment -> rank, world, device, dtype of the network passes. UserError: no such device."""
    rank, world, cuda = (
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
        torch.cuda.is_available(),
    )
    if args.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, found {args.device}")
    if args.device == "cuda" and not cuda:
        raise UserError(
            "--device cuda: torch sees no CUDA device here; use --device cpu or install a CUDA build of torch"
        )
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if cuda and args.device != "cpu"
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if (
        world > 1 and not dist.is_initialized()
    ):  # both backends: scalars that only the host needs go over gloo and never wait for the GPU
        where, restarts = {}, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if (
            restarts and os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        ):  # torchrun's store outlives its workers and still has the addresses of the
            # dead ones (pytorch issue 135712), so names are new after a restart. The count is per machine; on several, start torchrun with
            # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
            store = next(dist.rendezvous("env://", rank, world))[0]
            where = dict(
                store=dist.PrefixStore(f"restart_{restarts}", store), rank=rank, world_size=world
            )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(minutes=30),
            **where,
        )
    return (
        rank,
        world,
        device,
        torch.bfloat16
        if args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda")
        else torch.float32,
    )


def gather_rows(x, n, rank, world):
    """Rows i = rank, rank + world, ... of every rank -> all n rows in order, on every rank. x [n_local, ...]"""
    if world == 1:
        return x
    most = -(-n // world)
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:n]


def on_all_ranks(fn, world):
    """fn() on every rank -> list of its results by rank. A UserError on one rank is raised on all, so that none waits for a process that has ended."""
    try:
        mine = (fn(), None)
    except UserError as e:
        mine = (None, str(e))
    box = [mine]
    if world > 1:
        box = [None] * world
        dist.all_gather_object(box, mine)
    for _, error in box:
        if error is not None:
            raise UserError(error)
    return [result for result, _ in box]

"""Optimiser steps: AdamW, learning rates, averaged and clipped gradients."""

import torch
import torch.distributed as dist


def adamw(module, lr, args):
    """The optimiser of every network."""
    return torch.optim.AdamW(
        module.parameters(), lr=lr, betas=args.betas, weight_decay=args.weight_decay, fused=True
    )


def rate_factor(it, first, end, warmup, cooldown):
    """Factor on the learning rates in iteration `it` of first..end-1: linear from 1 / warmup over
    `warmup` iterations, then 1, then linear to 0 over the last share `cooldown`."""
    rising = min(1.0, (it - first + 1) / max(warmup, 1))
    left = 1 - (it - first) / (end - first)
    return rising * min(1.0, left / max(cooldown, 1e-9))


def average_over_processes(grads, world, all_reduce=None):
    """Gradients become their means over the processes, in place, by one all-reduce.

    all_reduce: of a dry run, instead of torch's.
    """
    flat = torch.cat([g.flatten() for g in grads])
    (all_reduce or dist.all_reduce)(flat)
    flat /= world
    parts = flat.split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])


def clipped_step(opt, clip, accumulate=1, shard=False):
    """One step with gradients that are sums over `accumulate` microsteps; zeroes them.

    Their mean is clipped to the global norm `clip`. If it is not finite, weights and moments stay
    as they are. Does not wait for the device. Returns norm and bad (1 if skipped), 0-d tensors.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True) / accumulate
    if shard:
        norm = norm.full_tensor()
    bad = 1 - norm.isfinite().float()
    # A fused optimiser divides gradients by grad_scale on its way, and skips the step where
    # found_inf is 1: what AMP's GradScaler uses.
    opt.grad_scale = ((norm / clip).clamp(min=1) * accumulate).float()
    opt.found_inf = bad
    opt.step()
    opt.zero_grad(set_to_none=True)
    return norm, bad

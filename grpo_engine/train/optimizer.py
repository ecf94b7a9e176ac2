"""What every optimizer step does, whatever the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn import Parameter

from grpo_engine import ops


def adamw(
    params: Iterable[Parameter], *, lr: float, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """The optimizer that `update` steps.

    Gradients of bfloat16 parameters are summed over micro-batches in float32: in bfloat16 a sum would lose what is under
    a 256th of it.

    Args:
        params: to be trained; for bfloat16 ones the type of their gradients is set to float32.
        lr, betas, eps, weight_decay: see `ops.adamw`.

    Returns:
        One parameter group and no state yet.
    """
    params = list(params)
    for p in params:
        if p.dtype == torch.bfloat16:
            p.grad_dtype = torch.float32
    return torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def update(optimizer: torch.optim.AdamW, *, lr: float, clip_norm: float) -> float:
    """Clips the gradient, takes one optimizer step and clears the gradient.

    The state has torch's names; the arithmetic is `ops.adamw`, one pass over all parameters. The moments are float32 or
    wider. A bfloat16 parameter has "master_low" besides, the lower half of its float32 master: a step of a thousandth or
    less of a weight would be rounded away.

    Args:
        optimizer: over parameters whose gradients were accumulated; one parameter group (see `adamw`).
        lr: learning rate of this step.
        clip_norm: bound of the global gradient norm.

    Returns:
        The global gradient norm before clipping.

    Raises:
        RuntimeError: the norm is not finite; the weights are then unchanged.
    """
    (group,) = optimizer.param_groups
    group["lr"] = lr
    params = [p for p in group["params"] if p.grad is not None]
    states = [optimizer.state[p] or _start(optimizer.state[p], p) for p in params]
    norm = ops.adamw(
        [p.detach() for p in params],
        [p.grad for p in params],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [s["step"] for s in states],
        lr=lr,
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        clip_norm=clip_norm,
        master_low=[s["master_low"] for s in states if "master_low" in s],
    )
    if not math.isfinite(norm):
        raise RuntimeError(f"training diverged: the gradient norm is {norm}; lower the learning rate or look at the data")
    for p in params:
        p.grad = None
    return norm


def _start(state: dict[str, torch.Tensor], p: Parameter) -> dict[str, torch.Tensor]:
    state["step"] = torch.zeros((), device=p.device)
    moments = torch.float32 if p.dtype == torch.bfloat16 else p.dtype
    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=moments) for _ in range(2))
    if p.dtype == torch.bfloat16:
        state["master_low"] = torch.zeros_like(p, dtype=torch.int16)
    return state

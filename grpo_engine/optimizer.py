"""What every optimizer step does, whatever the loss."""

from __future__ import annotations

import math

import torch

from grpo_engine import ops


def update(optimizer: torch.optim.AdamW, *, lr: float, clip_norm: float) -> float:
    """Clips the gradient, takes one optimizer step and clears the gradient.

    The state is torch's own, so that a checkpoint of one is a checkpoint of the other; the arithmetic is
    `ops.adamw`, one pass over all parameters.

    Args:
        optimizer: over parameters whose gradients were accumulated; one parameter group.
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
    )
    if not math.isfinite(norm):
        raise RuntimeError(f"training diverged: the gradient norm is {norm}; lower the learning rate or look at the data")
    for p in params:
        p.grad = None
    return norm


def _start(state: dict[str, torch.Tensor], p: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    state["step"] = torch.zeros(())
    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    return state

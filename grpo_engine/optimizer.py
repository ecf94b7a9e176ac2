"""What every optimizer step does, whatever the loss."""

from __future__ import annotations

import math

import torch


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, lr: float, clip_norm: float) -> float:
    """Clips the gradient, takes one optimizer step and clears the gradient.

    Args:
        model: whose gradients were accumulated.
        optimizer: over its parameters.
        lr: learning rate of this step, for all groups.
        clip_norm: bound of the global gradient norm.

    Returns:
        The global gradient norm before clipping.

    Raises:
        RuntimeError: the norm is not finite; the weights are then unchanged.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm))
    if not math.isfinite(norm):
        raise RuntimeError(f"training diverged: the gradient norm is {norm}; lower the learning rate or look at the data")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm

"""What a process of ours does so that it starts quickly."""

from __future__ import annotations

import torch


def skip_compiler() -> None:
    """Keeps torch.optim from importing torch's compiler, which takes about a second and is never used here.

    torch imports it when an optimizer is made, in order to mark two methods as not to be compiled. A torch that does
    so in another way than this expects starts as slowly as before; nothing else changes.
    """
    for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
        plain = getattr(method, "__wrapped__", None)
        if plain is not None:
            plain.__dynamo_disable = plain

"""adamw (clipping and step of all parameters) beside torch's AdamW."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks.shapes import LADDER, ladder_config, qwen_config, random_model  # noqa: E402
from benchmarks.table import Case, main  # noqa: E402
from grpo_engine import ops  # noqa: E402
from grpo_engine.model.decoder import Model  # noqa: E402

LR, BETAS, EPS, CLIP = 0.1, (0.9, 0.999), 1e-8, 1.0  # a step that is large enough to be checked
TOLERANCE = 5e-5  # of the largest parameter; torch adds up its norm in float32


class Ours:
    def __init__(self, params, grads):
        self.params, self.grads = [p.clone() for p in params], grads
        self.means, self.squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self.steps = [torch.zeros((), device=p.device) for p in params]

    def step(self):
        norm = ops.adamw(
            self.params, self.grads, self.means, self.squares, self.steps,
            lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, clip_norm=CLIP,
        )  # fmt: skip
        return [torch.tensor(norm, device=self.params[0].device), *self.params]


class Theirs:
    """torch's way changes the gradients, so each step is given them anew, as a backward pass does."""

    def __init__(self, params, grads, **how):
        self.params, self.grads = [p.clone() for p in params], grads
        self.optimizer = torch.optim.AdamW(self.params, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, **how)

    def step(self):
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g.clone()
        norm = torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        self.optimizer.step()
        return [norm, *self.params]


def case(size):
    return of(size, Model(ladder_config(size)).init_weights(1, std=None))


def qwen(size):
    return of(f"{size} float32", random_model(qwen_config(size), torch.float32))


def of(name, model):
    params = [p.detach() for p in model.parameters()]
    grads = [torch.randn_like(p) for p in params]
    doubles = [[x.double() for x in xs] for xs in (params, grads)]
    return Case(
        name=f"{name}, {len(params)} tensors",
        ours=Ours(params, grads).step,
        peers={
            "torch AdamW, fused": Theirs(params, grads, fused=True).step,
            "torch AdamW, foreach": Theirs(params, grads, foreach=True).step,
        },
        expected=lambda: Theirs(*doubles).step(),
        bits=lambda: Ours(params, grads).step(),
        tolerance=TOLERANCE,
        nbytes=7.0 * 4 * sum(p.numel() for p in params),
    )


def cases(quick):
    for size in ("0.2M",) if quick else LADDER:
        yield case(size)


def cuda(quick):
    yield partial(qwen, "0.5B")


if __name__ == "__main__":
    note = "torch's times hold a copy of the gradients, which its clipping changes in place."
    main("adamw", cases, cuda=cuda, note=note)

"""A training step - forward, backward, clipping, AdamW - beside transformers' model with the same weights; with the
shapes of published checkpoints a pass alone, forward and backward."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import copy  # noqa: E402

import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.limits import part  # noqa: E402
from benchmarks.shapes import (  # noqa: E402
    LADDER,
    REAL,
    cumulative,
    equal_lengths,
    ladder_config,
    log_normal_lengths,
    optimizer_of,
    qwen_config,
    random_model,
    sequence_flops,
)
from benchmarks.table import Case, Later, Missing, main, same_bits  # noqa: E402
from grpo_engine.model.decoder import Model, packed_positions  # noqa: E402
from grpo_engine.system.memory import keep_freed_memory  # noqa: E402
from grpo_engine.train.optimizer import update  # noqa: E402

SEQUENCES, TOKENS = 256, 24  # of the micro study's size; a batch goes through the model at once, as in a run
PARTS = 8  # micro-batches of the peer that sorts by length
LR = 1e-6  # the weights hardly move while they are timed
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-5}  # loss and gradient norm


class Training:
    """Training steps as a run takes them: packed, one micro-batch."""

    def __init__(self, model, sequences):
        self.model = model
        self.tokens = torch.cat([s[:-1] for s in sequences])
        self.target = torch.cat([s[1:] for s in sequences])
        self.cu_seqlens = cumulative([len(s) - 1 for s in sequences])
        self.positions = packed_positions(self.cu_seqlens)
        self.rows = torch.arange(self.tokens.numel(), device=self.tokens.device)
        self.optimizer = optimizer_of(model, LR)

    def loss(self):
        logprob, _ = self.model.logprobs(
            self.tokens, self.cu_seqlens, rows=self.rows, target=self.target, positions_T=self.positions
        )
        return -logprob.mean()

    def _backward(self):
        """The loss; leaves the gradients."""
        with part("forward"):
            loss = self.loss()
        with part("backward"):
            loss.backward()
        return loss.detach()

    def forward_and_backward(self):
        """[loss, gradient norm] of one pass; the weights stay as they are."""
        loss = self._backward()
        norm = peers.gradient_norm(self.model.parameters())
        self.model.zero_grad(set_to_none=True)
        return torch.stack([loss, norm.float()])

    def step(self):
        loss = self._backward()
        norm = update(self.optimizer, lr=LR, clip_norm=1.0)
        return torch.tensor([float(loss), norm], device=loss.device)

    def gradients(self):
        loss = self.loss()
        return [loss, *torch.autograd.grad(loss, list(self.model.parameters()))]

    def first_alone(self):
        """Whether the first sequence has the same log-probs on its own."""
        n = int(self.cu_seqlens[1])
        with torch.no_grad():
            whole, _ = self.model.logprobs(self.tokens, self.cu_seqlens, rows=self.rows, target=self.target)
            part, _ = self.model.logprobs(self.tokens[:n], self.cu_seqlens[:2], rows=self.rows[:n], target=self.target[:n])
        return same_bits(part, whole[:n])


def case(size, kind, *, compiled):
    return of(size, Model(ladder_config(size)).init_weights(1, std=None), SEQUENCES, TOKENS, kind, compiled=compiled)


def qwen(size, N, mean, kind):
    """bfloat16 weights, one micro-batch."""
    return of(f"{size} bfloat16", random_model(qwen_config(size), torch.bfloat16), N, mean, kind, compiled=False)


def of(size, model, N, mean, kind, *, compiled):
    draw = equal_lengths if kind == "equal" else log_normal_lengths
    lengths = draw(N, mean)
    sequences = [torch.randint(model.config.vocab_size, (n + 1,)) for n in lengths]

    def theirs(attention, **how):
        def make():
            return peers.TransformersTraining(peers.as_transformers(model, attention), sequences, lr=LR, **how).step

        return peers.optional("transformers", make)

    others = {"transformers": theirs("sdpa")}
    if model.device.type == "cuda":
        pass  # with logits of 151,936 tokens, one way of the peer is as much as fits
    elif kind == "equal":
        others["transformers, eager attention"] = theirs("eager")
    else:
        others[f"transformers, {PARTS} sorted micro-batches"] = theirs("sdpa", micro_batches=PARTS)
    if compiled:
        others["transformers, torch.compile"] = theirs("sdpa", compiled=True)
    mine = Training(copy.deepcopy(model), sequences)
    return Case(
        name=f"{size}, {kind} lengths (longest {max(lengths)}, {sum(lengths)} tokens)",
        ours=mine.step,
        peers=others,
        tolerance=TOLERANCE[model.dtype],
        bits=mine.gradients,
        alone=lambda _: mine.first_alone(),
        flops=3.0 * sequence_flops(model, lengths, head_rows=sum(lengths)),
        products=model.dtype,
        derived={"tokens/s": lambda seconds: sum(lengths) / seconds},
    )


def forward_and_backward(name, size, dtype, N, length, *, compiled):
    """One pass of N sequences, without an optimizer, so that the peers can share our weights."""
    model = random_model(REAL[size](), dtype)
    sequences = [torch.randint(model.config.vocab_size, (length + 1,)) for _ in range(N)]
    mine, first = Training(model, sequences), Training(model, sequences[:1])

    def theirs(dtype):
        def make():
            return peers.TransformersTraining(peers.as_transformers(model, dtype=dtype, share=True), sequences)

        return peers.optional("transformers", make)

    def run(peer):
        return peer if isinstance(peer, Missing) else peer.forward_and_backward

    def compiled_run(peer):
        def make():
            return peers.TransformersTraining(peer.model, sequences, compiled=True).forward_and_backward

        return peer if isinstance(peer, Missing) else peers.optional("transformers", make)

    slow = dtype == torch.bfloat16 and not peers.native_bfloat16()
    same = Missing(why=peers.NO_BFLOAT16) if slow else theirs(dtype)
    others = {"transformers": run(same)}
    if compiled:
        others["transformers, torch.compile"] = compiled_run(same)
    if dtype != torch.float32:
        others["transformers, float32"] = run(theirs(torch.float32))
    return Case(
        name=name,
        ours=mine.forward_and_backward,
        peers=others,
        tolerance=TOLERANCE[dtype],
        bits=first.gradients,
        alone=lambda _: mine.first_alone(),
        heavy=True,
        flops=3.0 * sequence_flops(model, [length] * N, head_rows=N * length),
        products=dtype,
        derived={"tokens/s": lambda seconds: N * length / seconds},
    )


def real(quick):
    keep_freed_memory()
    N, length = (2, 64) if quick else (4, 256)
    for size in ("135M",) if quick else REAL:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{size} {str(dtype)[6:]}, forward and backward of {N} x {length} tokens"
            compiled = not quick and dtype == torch.float32
            yield Later(name=name, make=partial(forward_and_backward, name, size, dtype, N, length, compiled=compiled))


def cases(quick):
    keep_freed_memory()  # as a run does; the peers of this process have it too
    for size in ("0.2M", "0.8M") if quick else LADDER:
        yield case(size, "equal", compiled=not quick and size in ("0.2M", "0.8M"))
        yield case(size, "log-normal", compiled=False)


def cuda(quick):
    yield partial(qwen, "0.5B", 8, 512, "equal")
    yield partial(qwen, "1.5B", 8, 512, "equal")
    if not quick:
        yield partial(qwen, "0.5B", 32, 256, "log-normal")


if __name__ == "__main__":
    note = (
        "Loss and gradient norm of the first step agree with transformers'. A pass without optimizer holds the norm of its "
        "gradients, which the check reads; forward and backward do not."
    )
    main("training", cases, real=real, cuda=cuda, whole=True, unit="ms", note=note)

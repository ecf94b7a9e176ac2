"""decoder_layer, forward and backward, beside transformers' Qwen2DecoderLayer."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import dataclasses  # noqa: E402

import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import (  # noqa: E402
    LADDER,
    cumulative,
    equal_lengths,
    ladder_config,
    log_normal_lengths,
    qwen_config,
    random_model,
    sequence_flops,
)
from benchmarks.table import Case, WrongAnswer, main, relative_error, same_bits  # noqa: E402
from grpo_engine import ops  # noqa: E402
from grpo_engine.model.decoder import Model, packed_positions  # noqa: E402

SEQUENCES, TOKENS = 256, 24
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5}  # of the largest element, the peer in the same dtype


def case(size, kind, *, compiled):
    return of(size, Model(ladder_config(size)).init_weights(1, std=None), SEQUENCES, TOKENS, kind, compiled=compiled)


def qwen(size, N, mean, kind):
    config = dataclasses.replace(qwen_config(size), num_hidden_layers=1)
    return of(f"{size} bfloat16", random_model(config, torch.bfloat16), N, mean, kind, compiled=False)


def of(size, model, N, mean, kind, *, compiled):
    config, dtype = model.config, model.dtype
    lengths = (equal_lengths if kind == "equal" else log_normal_lengths)(N, mean)
    total, cu = sum(lengths), cumulative(lengths)
    position = packed_positions(cu)
    x, upstream = torch.randn(2, total, config.hidden_size).to(dtype)
    weights = ops.LayerWeights(*(w.detach().clone().requires_grad_() for w in model.layers[0].weights))

    def layer(x, cu, position):
        return ops.decoder_layer(
            x, weights, position, cu, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
            theta=config.rope_theta, eps=config.rms_norm_eps,
        )  # fmt: skip

    mine = x.clone().requires_grad_()

    def ours():
        y = layer(mine, cu, position)
        return [y, *torch.autograd.grad(y, [mine, *weights], upstream)]

    def theirs(compiled=False):
        whole = peers.as_transformers(model)
        block = whole.model.layers[0]
        wide, up = (peers.padded(t.split(lengths), 0) for t in (x, upstream))
        leaf = wide.clone().requires_grad_()
        leaves = [leaf, *block.parameters()]
        where = torch.arange(wide.shape[1], device=wide.device)
        tables = whole.model.rotary_emb(wide, where[None])  # once for all layers: not timed
        forward = torch.compile(block, dynamic=False) if compiled else block

        def run():
            y = forward(leaf, attention_mask=None, position_embeddings=tables)
            y = y[0] if isinstance(y, tuple) else y
            return [y, *torch.autograd.grad(y, leaves, up)]

        return run

    kept = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def check(who, result):  # output and the gradient of the input; those of the weights have other shapes
        got = [t[kept] if t.dim() == 3 else t for t in result[:2]]
        error = relative_error(got, seen.setdefault("ours", got))
        if not error <= TOLERANCE[dtype]:
            raise WrongAnswer(f"differs from ours by {error:.3g}, allowed {TOLERANCE[dtype]:.3g}")

    def alone(whole):
        n = lengths[0]
        return same_bits(layer(x[:n], cu[:2], position[:n]), whole[0][:n])

    seen = {}
    rivals = {"transformers": peers.optional("transformers", theirs)}
    if compiled:
        rivals["transformers, torch.compile"] = peers.optional("transformers", lambda: theirs(compiled=True))
    return Case(
        name=f"{size}, {kind} lengths (longest {max(lengths)}, {total} tokens)",
        ours=ours,
        peers=rivals,
        tolerance=TOLERANCE[dtype],
        check=check,
        alone=alone,
        flops=3.0 * sequence_flops(model, lengths, head_rows=0) / config.num_hidden_layers,
        products=dtype,
    )


def cases(quick):
    for size in ("0.2M",) if quick else LADDER:
        yield case(size, "equal", compiled=size == "0.2M")
        yield case(size, "log-normal", compiled=False)


def cuda(quick):
    for size in ("0.5B", "7B"):
        yield partial(qwen, size, 8, 1024, "equal")
    if not quick:
        yield partial(qwen, "0.5B", 32, 256, "log-normal")


if __name__ == "__main__":
    note = "Forward and backward. The layer over pages is measured in decode_step and rollout."
    main("decoder_layer", cases, cuda=cuda, note=note)

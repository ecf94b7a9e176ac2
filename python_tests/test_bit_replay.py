"""The bits of today are those that were kept: of every op with its gradients, and of a whole run of the embedded study.

A change that is meant to keep all bits keeps `bit_replay.json`. One that changes them on purpose writes the file anew,
and its commit says why:

    python python_tests/test_bit_replay.py --write

`csrc/tests/kernel_bits.cpp` does the same for the kernels alone, on every instruction set.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from grpo_engine import _C, ops
from grpo_engine.records import jsonl

KEPT = Path(__file__).with_name("bit_replay.json")
WITH_FMA = ("avx2", "avx512", "avx512_bf16", "neon")  # their kernels have the same bits
RUN = [
    "model.size=xxs", "steps=6", "batch.prompts=8", "batch.group_size=4", "batch.minibatches=2", "task.eval_problems=16",
    "evaluation.count=2", "optimizer.lr=1e-3", "seed=3",
]  # fmt: skip


def digest(*parts) -> str:
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        sha.update(part)
    return sha.hexdigest()[:16]


def inputs(dtype):
    """Numbers without a generator: the same on every machine and in every version of torch."""
    count = 0

    def make(*shape, grad=True, scale=1.0):
        nonlocal count
        count += 1
        x = (torch.arange(math.prod(shape), dtype=torch.int64) * 7919 + count * 104729) % 2003
        return ((x.double() / 1001 - 1) * scale).to(dtype).view(shape).requires_grad_(grad)

    return make


def both_ways(outputs, *leaves):
    """The bits of some outputs, and of the gradients of their sum."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [o for o in outputs if isinstance(o, torch.Tensor)]
    kept = [o for o in outputs if o.requires_grad]
    weights = [torch.linspace(-1, 1, o.numel()).view(o.shape).to(o.dtype) for o in kept]
    gradients = torch.autograd.grad(kept, leaves, weights)
    return digest(*outputs, *gradients)


def op_bits(dtype):
    """Name of an op to the hash of its outputs and gradients."""
    make, bits = inputs(dtype), {}
    T, D, F, H, K, E, V = 23, 48, 80, 4, 2, 16, 211
    position, cu = torch.arange(T) % 13, torch.tensor([0, 9, 10, T], dtype=torch.int32)
    x, weight, bias = make(T, D), make(F, D, scale=0.2), make(F, scale=0.1)
    bits["linear"] = both_ways(ops.linear(x, weight, bias), x, weight, bias)
    norm, residual = make(D), make(T, D)
    bits["rms_norm"] = both_ways(ops.rms_norm(x, norm, eps=1e-6), x, norm)
    bits["rms_norm with residual"] = both_ways(ops.rms_norm(x, norm, eps=1e-6, residual=residual), x, norm, residual)
    gate_up = make(T, 2 * F)
    bits["swiglu"] = both_ways(ops.swiglu(gate_up), gate_up)
    q, k, v = make(T, H, E), make(T, K, E), make(T, K, E)
    bits["rope"] = both_ways(ops.rope(q, position, theta=1e4), q)
    bits["ragged_attention"] = both_ways(ops.ragged_attention(q, k, v, cu, scale=0.25), q, k, v)
    groups = torch.tensor([0, 3], dtype=torch.int32)
    bits["ragged_attention of a group"] = both_ways(ops.ragged_attention(q, k, v, cu, scale=0.25, cu_groups=groups), q, k, v)
    layer = ops.LayerWeights(
        attn_norm=make(D), qkv_weight=make((H + 2 * K) * E, D, scale=0.2), qkv_bias=make((H + 2 * K) * E, scale=0.1),
        out_weight=make(D, H * E, scale=0.2), mlp_norm=make(D), gate_up_weight=make(2 * F, D, scale=0.2),
        down_weight=make(D, F, scale=0.2),
    )  # fmt: skip
    numbers = dict(num_kv_heads=K, head_dim=E, theta=1e4, eps=1e-6)
    bits["decoder_layer"] = both_ways(ops.decoder_layer(x, layer, position, cu, **numbers), x, *layer)
    head, target = make(V, D), torch.arange(T) * 17 % V
    bits["token_logprob"] = both_ways(ops.token_logprob(x, head, target, temperature=0.7), x, head)
    logits = make(T, V, scale=4.0)
    bits["gather_logprob"] = both_ways(ops.gather_logprob(logits, target), logits)
    filters = dict(temperature=0.8, top_k=50, top_p=0.9)
    sampled = ops.sample_token(logits.detach(), seed=torch.arange(T), position=position, **filters)
    bits["sample_token"] = digest(*sampled)
    with torch.no_grad():
        key_pages, value_pages = torch.zeros(4, K, E, 16, dtype=dtype), torch.zeros(4, K, 16, E, dtype=dtype)
        ops.kv_write(k, v, key_pages, value_pages, torch.arange(T) + 16)
        bits["kv_write"] = digest(key_pages, value_pages)
        table, length = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([T], dtype=torch.int32)
        whole = torch.tensor([0, T], dtype=torch.int32)
        bits["paged_attention"] = digest(ops.paged_attention(q, key_pages, value_pages, table, whole, length, scale=0.25))
    if dtype == torch.float32:
        logprob, old, ref = make(T), make(T, grad=False), make(T, grad=False)
        for objective in ("clip", "cispo"):
            for aggregation in ("token_mean", "sequence_mean"):
                loss, stats = ops.policy_loss(
                    logprob, advantage=make(T, grad=False), cu_seqlens=cu, old_logprob=old, ref_logprob=ref, kl_coef=0.1,
                    objective=objective, aggregation=aggregation,
                )  # fmt: skip
                bits[f"policy_loss {objective} {aggregation}"] = digest(loss, stats, *torch.autograd.grad(loss, logprob))
        bits["group_advantages"] = digest(ops.group_advantages(make(5, 4, grad=False)))
    return bits


def in_former_names(records: bytes) -> bytes:
    """The lines as schema 2 wrote them, under which the bits were kept: a name is no bit of a result."""
    for former, name in jsonl.FORMER_NAMES.items():
        records = records.replace(f'"{name}":'.encode(), f'"{former}":'.encode())
    for absent in ("overlong_penalty_mean", "masked_responses"):  # fields that are new, of options that the run has not
        records = records.replace(f'"{absent}":null,'.encode(), b"")
    return records.replace(f'"schema":{jsonl.SCHEMA},'.encode(), b'"schema":2,')


def run_bits(folder):
    """Of a run through the command line: records but for times, and weights."""
    command = [sys.executable, "-m", "grpo_engine", "train", "--out", str(folder), *RUN]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    kept = {
        name: digest(in_former_names((folder / name).read_bytes())) for name in ("steps.jsonl", "evals.jsonl", "order.txt")
    }
    return kept | {"weights": digest((folder / "checkpoint" / "model.safetensors").read_bytes())}


def family(isa):
    return "fma" if isa in WITH_FMA else isa


def kept(part):
    found = json.loads(KEPT.read_text()).get(part)
    if found is None:
        pytest.skip(f"bit_replay.json holds no {part}")
    return found


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ops_have_the_bits_that_were_kept(dtype):
    assert op_bits(getattr(torch, dtype)) == kept(f"ops {dtype} {family(_C.cpu_isa())}")


@pytest.mark.usefixtures("cpu_kernels")
def test_a_run_has_the_bits_that_were_kept(tmp_path):
    # torch draws the first weights, and its normal numbers need not be the same on every instruction set
    assert run_bits(tmp_path / "run") == kept(f"run {_C.cpu_isa()}")


def write():
    found = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for dtype in ("float32", "bfloat16"):
        found[f"ops {dtype} {family(_C.cpu_isa())}"] = op_bits(getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        found[f"run {_C.cpu_isa()}"] = run_bits(Path(folder) / "run")
    KEPT.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("test_bit_replay.py --write keeps the bits of today; pytest compares them")
    write()

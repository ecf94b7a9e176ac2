"""ragged_attention: float64 reference, gradients, invariance, NaN, packed edges, contract."""

import hashlib
import os
import subprocess
import sys

import pytest
import reference
import torch
from bars import assert_as_good_as_torch
from conftest import EMULATED, SAME_EXTENSION

from grpo_engine import _C
from grpo_engine.ops import ragged_attention

pytestmark = pytest.mark.usefixtures("device")

# lengths around a block of 16 keys, an empty sequence at each end, one past a chunk of 128 tokens
LENGTHS = [0, 1, 15, 16, 17, 0, 33, 2, 130, 0]
# H, K, E: GQA ratios 1, 2, 3, 7; widths below, off and at the vector width; Qwen2.5 heads
HEADS = [(1, 1, 8), (2, 2, 20), (4, 2, 16), (6, 2, 16), (7, 1, 64), (2, 1, 128), (3, 3, 1), (14, 2, 32)]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make(lengths, H, K, E, dtype, seed=0):
    g = torch.Generator().manual_seed(seed + 100 * H + E)
    T = sum(lengths)
    tensors = [torch.randn(T, heads, E, generator=g).to(dtype) for heads in (H, K, K, H)]
    return *tensors[:3], offsets(lengths), tensors[3]


def plain(query, key, value, cu, *, scale):
    out = []
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (query, key, value))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)


def run(fn, query, key, value, cu, dout, scale, **groups):
    inputs = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = fn(*inputs, cu, scale=scale, **groups)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H,K,E", HEADS)
def test_forward_and_backward_are_as_good_as_torch(H, K, E, dtype):
    query, key, value, cu, dout = make([n for n in LENGTHS if n], H, K, E, dtype)
    scale = E**-0.5
    ours = run(ragged_attention, query, key, value, cu, dout, scale)
    theirs = run(plain, query, key, value, cu, dout, scale)
    double = [x.double() for x in (query, key, value)]
    exact = run(reference.ragged_attention, *double, cu, dout.double(), scale)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        assert_as_good_as_torch(a, b, c, floor=2.0**-22)


def test_large_scores_do_not_overflow():
    query, key, value, cu, dout = make([20, 5], 2, 1, 16, torch.float32)
    ours = run(ragged_attention, 40 * query, 40 * key, value, cu, dout, 1.0)  # scores near 6000
    theirs = run(plain, 40 * query, 40 * key, value, cu, dout, 1.0)
    double = [40 * query.double(), 40 * key.double(), value.double()]
    exact = run(reference.ragged_attention, *double, cu, dout.double(), 1.0)
    for a, b, c in zip(ours[::3], theirs[::3], exact[::3], strict=True):
        assert_as_good_as_torch(a, b, c, floor=2.0**-22)
    # the softmax is one-hot, so these are 0: what is left is the difference of two sums of E products of dout and value,
    # each rounded E times, on its way through a key or query
    products = 16 * dout.abs().max() * value.abs().max()
    bound = 2 * 16 * 2.0**-24 * products * 40 * max(query.abs().max(), key.abs().max())
    for a, c in zip(ours[1:3], exact[1:3], strict=True):
        assert (a - c).abs().max() <= bound


@pytest.mark.parametrize("H,K,E", [(2, 2, 3), (4, 2, 5), (7, 1, 2)])
def test_gradcheck(H, K, E):
    query, key, value, cu, _ = make([0, 3, 1, 18], H, K, E, torch.float64)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(lambda q, k, v: ragged_attention(q, k, v, cu, scale=0.7), inputs, nondet_tol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H,K,E", [(6, 2, 16), (7, 1, 20), (2, 2, 64)])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(H, K, E, dtype, both_ways_on_threads):
    lengths = LENGTHS * (3 if EMULATED else 5) + [300]
    query, key, value, cu, dout = make(lengths, H, K, E, dtype)
    out, gradients = both_ways_on_threads(
        lambda q, k, v: ragged_attention(q, k, v, cu, scale=0.25), [query, key, value], dout
    )
    one = [out, *gradients]
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        part = [x[begin:end] for x in (query, key, value)]
        alone = run(ragged_attention, *part, offsets([end - begin]), dout[begin:end], 0.25)
        for a, b in zip(alone, one, strict=True):
            assert torch.equal(a, b[begin:end])


def test_a_token_does_not_depend_on_those_after_it():
    query, key, value, cu, _ = make([140], 4, 2, 16, torch.float32)
    whole = ragged_attention(query, key, value, cu, scale=0.25)
    for n in (1, 15, 16, 17, 100, 129):
        first = ragged_attention(query[:n], key[:n], value[:n], offsets([n]), scale=0.25)
        assert torch.equal(first, whole[:n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_only_the_tokens_that_see_it(dtype):
    query, key, value, cu, _ = make([5, 30, 7], 4, 2, 20, dtype)
    clean = ragged_attention(query, key, value, cu, scale=0.25)
    for poisoned in (key, value):
        kept = poisoned[18].clone()
        poisoned[18] = float("nan")  # token 13 of the second sequence
        out = ragged_attention(query, key, value, cu, scale=0.25)
        assert out[18:35].isnan().all()
        assert torch.equal(out[:18], clean[:18]) and torch.equal(out[35:], clean[35:])
        poisoned[18] = kept


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_only_the_gradients_of_what_it_meets_on_cuda(dtype):
    query, key, value, cu, dout = make([5, 90, 7], 4, 2, 16, dtype)
    clean = run(ragged_attention, query, key, value, cu, dout, 0.25)
    seen, sees = [*range(5, 79)], [*range(78, 95)]  # by token 73 of the second sequence; those that see it
    for poisoned, lost in [(dout, ([], [78], seen, seen)), (key, (sees, sees, [*range(5, 95)], [*range(5, 95)]))]:
        kept = poisoned[78].clone()
        poisoned[78] = float("nan")
        out = run(ragged_attention, query, key, value, cu, dout, 0.25)
        poisoned[78] = kept
        for a, b, tokens in zip(out, clean, lost, strict=True):
            others = [t for t in range(102) if t not in tokens]
            assert a[tokens].isnan().all() and torch.equal(a[others], b[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_qkv_views_need_no_copy(dtype):
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(23, 8 * 20, generator=g).to(dtype).requires_grad_()
    dout = torch.randn(23, 4, 20, generator=g).to(dtype)
    cu = offsets([17, 6])

    def views(x):
        return x[:, :80].view(23, 4, 20), x[:, 80:120].view(23, 2, 20), x[:, 120:].view(23, 2, 20)

    out = ragged_attention(*views(qkv), cu, scale=0.3)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    copies = [x.detach().contiguous() for x in views(qkv)]
    want = run(ragged_attention, *copies, cu, dout, 0.3)
    assert torch.equal(out, want[0])
    assert torch.equal(grad, torch.cat([x.flatten(1) for x in want[1:]], dim=1))


def test_no_tokens_and_no_sequences():
    empty = torch.empty(0, 2, 8, requires_grad=True)
    for cu in (offsets([]), offsets([0, 0])):
        out = ragged_attention(empty, empty, empty, cu, scale=1.0)
        assert out.shape == (0, 2, 8)
        out.sum().backward()


def test_the_first_token_returns_its_value():
    query, key, value, cu, _ = make([1] * 5, 4, 2, 20, torch.float32)
    out = ragged_attention(query, key, value, cu, scale=0.25)
    assert torch.equal(out, value.repeat_interleave(2, dim=1))


# ---------------------------------------------------------------- shared prompts

# (prompt, responses): prompts around a block of 16 keys and past a chunk of 128 tokens, an empty one, a
# response of no token and one of a single token, a prompt alone, a response that reaches a third chunk
GROUPS = [(1, [3, 0, 1]), (15, [1, 20]), (16, [2, 17, 0]), (17, [15, 1]), (0, [4, 9]), (5, []), (130, [40, 1, 140])]


def pack_groups(groups):
    """cu_seqlens and cu_groups, and for each response behind a copy of its prompt the rows that it has here."""
    lengths = [n for prompt, responses in groups for n in (prompt, *responses)]
    cu, cu_groups = offsets(lengths), offsets([1 + len(responses) for _, responses in groups])
    copies, n = [], 0
    for _, responses in groups:
        prompt = torch.arange(cu[n], cu[n + 1])
        copies.append(prompt)
        copies += [torch.cat([prompt, torch.arange(cu[i], cu[i + 1])]) for i in range(n + 1, n + 1 + len(responses))]
        n += 1 + len(responses)
    return lengths, cu, cu_groups, copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H,K,E", [(2, 2, 16), (4, 2, 32), (7, 1, 64), (2, 1, 20)])
def test_shared_prompts_are_as_good_as_torch(H, K, E, dtype):
    lengths, cu, cu_groups, copies = pack_groups(GROUPS)
    query, key, value, _, dout = make(lengths, H, K, E, dtype)
    rows, unshared = torch.cat(copies), offsets([len(c) for c in copies if len(c)])
    first = torch.tensor([rows.tolist().index(t) for t in range(len(dout))])

    def copied(q, k, v, _, *, scale):
        return plain(q[rows], k[rows], v[rows], unshared, scale=scale)[first]

    ours = run(ragged_attention, query, key, value, cu, dout, E**-0.5, cu_groups=cu_groups)
    theirs = run(copied, query, key, value, cu, dout, E**-0.5)
    double = [x.double() for x in (query, key, value)]
    exact = run(reference.ragged_attention, *double, cu, dout.double(), E**-0.5, cu_groups=cu_groups)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        assert_as_good_as_torch(a, b, c, floor=2.0**-22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H,K,E", [(2, 2, 16), (4, 2, 32), (7, 1, 64), (6, 2, 20)])
def test_a_shared_prompt_changes_no_bit_of_the_forward_pass(H, K, E, dtype, both_ways_on_threads):
    lengths, cu, cu_groups, copies = pack_groups(GROUPS * (1 if EMULATED else 8 // K))  # work for eight threads
    query, key, value, _, dout = make(lengths, H, K, E, dtype)
    one, gradients = both_ways_on_threads(
        lambda q, k, v: ragged_attention(q, k, v, cu, scale=0.25, cu_groups=cu_groups), [query, key, value], dout
    )
    rows, unshared = torch.cat(copies), offsets([len(c) for c in copies])
    out = ragged_attention(query[rows], key[rows], value[rows], unshared, scale=0.25)
    assert torch.equal(out, one[rows])
    # nor of the gradient of a query
    own = [range(end - n, end) for end, n in zip(unshared[1:].tolist(), lengths, strict=True)]
    dquery = run(ragged_attention, query[rows], key[rows], value[rows], unshared, dout[rows], 0.25)[1]
    assert torch.equal(dquery[[t for r in own for t in r]], gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_has_the_same_bits_alone_and_in_a_batch(dtype):
    lengths, cu, cu_groups, _ = pack_groups(GROUPS)
    query, key, value, _, dout = make(lengths, 4, 2, 16, dtype)
    whole = run(ragged_attention, query, key, value, cu, dout, 0.25, cu_groups=cu_groups)
    for m, (prompt, responses) in enumerate(GROUPS):
        begin, end = cu[cu_groups[m]], cu[cu_groups[m + 1]]
        part = [x[begin:end] for x in (query, key, value)]
        alone = run(
            ragged_attention, *part, offsets([prompt, *responses]), dout[begin:end], 0.25,
            cu_groups=offsets([1 + len(responses)]),
        )  # fmt: skip
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a, b[begin:end])


def test_groups_of_one_sequence_are_no_groups():
    query, key, value, cu, dout = make(LENGTHS, 4, 2, 16, torch.float32)
    grouped = run(ragged_attention, query, key, value, cu, dout, 0.25, cu_groups=offsets([1] * len(LENGTHS)))
    for a, b in zip(grouped, run(ragged_attention, query, key, value, cu, dout, 0.25), strict=True):
        assert torch.equal(a, b)


def test_nan_in_a_response_stays_there_and_in_a_prompt_reaches_its_responses():
    lengths, cu, cu_groups, _ = pack_groups([(17, [20, 9]), (3, [5])])
    query, key, value, _, _ = make(lengths, 4, 2, 20, torch.float32)
    clean = ragged_attention(query, key, value, cu, scale=0.25, cu_groups=cu_groups)
    for token, poisoned in [(16, [*range(16, 46)]), (20, [*range(20, 37)]), (45, [45]), (46, [*range(46, 54)])]:
        for x in (key, value):
            kept = x[token].clone()
            x[token] = float("nan")
            out = ragged_attention(query, key, value, cu, scale=0.25, cu_groups=cu_groups)
            x[token] = kept
            reached = torch.zeros(54, dtype=torch.bool)
            reached[poisoned] = True
            assert out[reached].isnan().all() and torch.equal(out[~reached], clean[~reached])


@pytest.mark.parametrize("H,K,E", [(2, 2, 3), (4, 2, 5), (7, 1, 2)])
def test_gradcheck_of_shared_prompts(H, K, E):
    lengths, cu, cu_groups, _ = pack_groups([(3, [2, 0, 1]), (15, [3]), (0, [2])])
    query, key, value, _, _ = make(lengths, H, K, E, torch.float64)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: ragged_attention(q, k, v, cu, scale=0.7, cu_groups=cu_groups),
        inputs, nondet_tol=0.0,
    )  # fmt: skip


def test_no_groups():
    empty = torch.empty(0, 2, 8)
    assert ragged_attention(empty, empty, empty, offsets([]), scale=1.0, cu_groups=offsets([])).shape == (0, 2, 8)


ISA_SCRIPT = """
import hashlib, torch
from grpo_engine.ops import ragged_attention, rope
g = torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for H, K, E, dtype in [(6, 2, 16, torch.float32), (7, 1, 20, torch.bfloat16), (2, 2, 64, torch.float32)]:
    q, k, v = (torch.randn(96, h, E, generator=g).to(dtype).requires_grad_() for h in (H, K, K))
    cu = torch.tensor([0, 1, 18, 50, 96], dtype=torch.int32)
    position = torch.arange(96)
    cu_groups = torch.tensor([0, 1, 4], dtype=torch.int32)
    q_rotated, k_rotated = (rope(x, position, theta=1e4) for x in (q, k))
    out = ragged_attention(q_rotated, k_rotated, v, cu, scale=.3, cu_groups=cu_groups)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn(out.shape, generator=g).to(dtype))
    for t in (out, *grads):
        digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.skipif("avx512" not in _C.cpu_isas(), reason="this CPU has no AVX-512")
def test_avx2_and_avx512_give_the_same_bits():
    digests = set()
    for isa in ("avx2", "avx512"):
        done = subprocess.run(
            [sys.executable, "-c", SAME_EXTENSION + ISA_SCRIPT],
            env={**os.environ, "GRPO_ENGINE_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout)
    assert len(digests) == 1 and len(digests.pop().strip()) == 2 * hashlib.sha256().digest_size


NO_MEMORY_SCRIPT = """
import resource
import torch
from grpo_engine import ops
from conftest import count_threads, num_threads

def attend(length):
    query, key, value = torch.zeros(3, length, 1, 1, dtype=torch.bfloat16)
    return ops.ragged_attention(query, key, value, torch.tensor([0, length], dtype=torch.int32), scale=1.0)

with num_threads(2):
    attend(1000)
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (144 << 20), resource.RLIM_INFINITY))
    with count_threads() as threads:
        try:
            # 128 MiB of inputs, results and statistics. Then each thread requests 72 MiB at least, which is more than glibc
            # maps for the heap of a thread in advance.
            attend(8 << 20)
        except MemoryError as error:
            print(type(error).__name__)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(threads.number, attend(1000).abs().max().item())
"""


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory by RLIMIT_AS")
def test_kernels_without_memory_on_two_threads_raise_an_error():
    command = [sys.executable, "-c", SAME_EXTENSION + NO_MEMORY_SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "MemoryError\n2 0.0\n"), done.stderr


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "change,error,says",
    [
        ({"query": torch.zeros(9, 32)}, ValueError, r"query must be \[T, H, E\].*got \[9, 32\]"),
        ({"query": torch.zeros(9, 0, 8)}, ValueError, r"H >= 1 heads and E >= 1, got \[9, 0, 8\]"),
        ({"query": torch.zeros(9, 4, 8).half()}, TypeError, "query must be Float, BFloat16 or Double"),
        ({"query": torch.zeros(9, 8, 4).mT}, ValueError, "query must be contiguous in its last two"),
        ({"key": torch.zeros(8, 2, 8)}, ValueError, r"key must be \[T, K, E\] = \[9, -1, 8\], got"),
        ({"key": torch.zeros(9, 3, 8)}, ValueError, "key must have .* divides H = 4, got 3"),
        ({"value": torch.zeros(9, 4, 8)}, ValueError, r"value must be \[T, K, E\] = \[9, 2, 8\], got"),
        ({"value": torch.zeros(9, 2, 8).double()}, TypeError, "value must be Float, got Double"),
        ({"cu": torch.zeros(2)}, TypeError, "cu_seqlens must be Int, got Float"),
        ({"cu": torch.zeros(0).int()}, ValueError, r"cu_seqlens needs \[N \+ 1\] with at least one"),
        ({"groups": torch.zeros(2)}, TypeError, "cu_groups must be Int, got Float"),
        ({"groups": torch.zeros(1, 2).int()}, ValueError, r"cu_groups must be \[M \+ 1\] = \[-1\], got"),
        ({"groups": torch.zeros(0).int()}, ValueError, r"cu_groups needs \[M \+ 1\] with at least one"),
        ({"scale": float("nan")}, ValueError, "scale must be finite and > 0, got nan"),
    ],
)
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, change, error, says):
    given = {
        "query": torch.zeros(9, 4, 8), "key": torch.zeros(9, 2, 8), "value": torch.zeros(9, 2, 8),
        "cu": offsets([4, 5]), "groups": offsets([2]), "scale": 1.0, **change,
    }  # fmt: skip
    scale = given.pop("scale")
    *inputs, groups = (x.to(device) for x in given.values())
    with pytest.raises(error, match="ragged_attention: .*" + says):
        ragged_attention(*inputs, scale=scale, cu_groups=groups)


def test_groups_on_another_device_are_refused(device):
    x = torch.zeros(9, 2, 8)
    groups = offsets([2]).to("meta")
    with pytest.raises(ValueError, match=f"cu_groups must be on {device}(:0)? as the first argument, got meta"):
        ragged_attention(x, x, x, offsets([4, 5]), scale=1.0, cu_groups=groups)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize(
    "groups,says",
    [
        ([1, 3], "must start at 0 and end at N = 3, got 1 and 3"),
        ([0, 2], "must start at 0 and end at N = 3, got 0 and 2"),
        ([0], "must start at 0 and end at N = 3, got 0 and 0"),
        ([0, 2, 2, 3], "must rise, got 2 then 2 at group 1"),
        ([0, 2, 1, 3], "must rise, got 2 then 1 at group 1"),
    ],
)
def test_bad_groups_are_refused(groups, says):
    x = torch.zeros(9, 2, 8)
    groups = torch.tensor(groups, dtype=torch.int32)
    with pytest.raises(ValueError, match="ragged_attention: cu_groups " + says):
        ragged_attention(x, x, x, offsets([4, 0, 5]), scale=1.0, cu_groups=groups)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize(
    "cu,says",
    [
        ([1, 9], "must start at 0 and end at T = 9, got 1 and 9"),
        ([0, 8], "must start at 0 and end at T = 9, got 0 and 8"),
        ([0, 6, 4, 9], "must not fall, got 6 then 4 at sequence 1"),
        ([0], "must start at 0 and end at T = 9, got 0 and 0"),
    ],
)
def test_bad_offsets_are_refused(cu, says):
    x = torch.zeros(9, 2, 8)
    with pytest.raises(ValueError, match="ragged_attention: cu_seqlens " + says):
        ragged_attention(x, x, x, torch.tensor(cu, dtype=torch.int32), scale=1.0)


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize(
    "cu,groups,lost",
    [
        ([0, 4, 8], None, [8]),
        ([2, 4, 9], None, [0, 1]),
        ([0, 4, 12], None, [4, 5, 6, 7, 8]),
        ([-3, 4, 9], None, [0, 1, 2, 3]),
        ([0], None, range(9)),
        ([0, 4, 9], [0, 1], [4, 5, 6, 7, 8]),
        ([0, 4, 9], [1, 2], [0, 1, 2, 3]),
        ([0, 4, 9], [0, 3], range(9)),
        ([0, 4, 9], [0], range(9)),
        ([0, 4, 9], [0, 2**30, 2], range(9)),
    ],
)
def test_tokens_without_a_sequence_or_group_become_nan_on_cuda(cu, groups, lost):
    query, key, value, good, dout = make([4, 5], 4, 2, 8, torch.float32)
    clean = run(ragged_attention, query, key, value, good, dout, 0.3)
    cu_groups = None if groups is None else torch.tensor(groups, dtype=torch.int32)
    bad = run(ragged_attention, query, key, value, torch.tensor(cu, dtype=torch.int32), dout, 0.3, cu_groups=cu_groups)
    whole = [[0, 1, 2, 3], [4, 5, 6, 7, 8]]  # what is not lost is computed as before where its sequence is the same
    for a, b in zip(bad, clean, strict=True):
        assert a[list(lost)].isnan().all()
        for tokens in whole:
            if cu[:1] == [0] and not set(tokens) & set(lost):
                assert torch.equal(a[tokens], b[tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_heads_and_long_sequences_are_as_good_as_torch(dtype):
    # CUDA has at most 128 columns of a head in one warp, and sums its keys in stretches of 256
    for lengths, H, K, E in [([30, 5], 2, 1, 300), ([300, 600], 2, 1, 16), ([20, 3], 9, 1, 40)]:
        query, key, value, cu, dout = make(lengths, H, K, E, dtype)
        ours = run(ragged_attention, query, key, value, cu, dout, E**-0.5)
        theirs = run(plain, query, key, value, cu, dout, E**-0.5)
        double = [x.double() for x in (query, key, value)]
        exact = run(reference.ragged_attention, *double, cu, dout.double(), E**-0.5)
        for a, b, c in zip(ours, theirs, exact, strict=True):
            assert_as_good_as_torch(a, b, c, floor=2.0**-22)


@pytest.mark.parametrize("groups", [None, [2, 1]])
def test_registration(groups):
    query, key, value, cu, _ = make([3, 0, 5], 4, 2, 8, torch.float32)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    cu_groups = None if groups is None else offsets(groups)
    torch.library.opcheck(torch.ops.grpo_engine.ragged_attention.default, (*inputs, cu, cu_groups, 0.3))

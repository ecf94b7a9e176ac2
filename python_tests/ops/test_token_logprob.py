"""token_logprob: float64 reference, both gradients, equality with materialised logits, memory."""

import functools
import math
import sys

import pytest
import reference
import torch
from bars import assert_as_good_as_torch
from conftest import EMULATED

from grpo_engine.ops import gather_logprob, linear, token_logprob

pytestmark = pytest.mark.usefixtures("device")

# T, D, V: one of everything; less than a block; exactly a block; a ragged last block with one id;
# four blocks (one window of backward) and a bit; more rows than a tile and than a window; no rows
SHAPES = [
    (1, 1, 1),
    (1, 8, 300),
    (3, 16, 512),
    (9, 33, 513),
    (5, 24, 2100),
    (520, 6, 70),
    (0, 8, 40),
]


def make(T, D, V, dtype, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed + 100000 * T + 1000 * D + V)
    hidden = (torch.randn(T, D, generator=g) * scale).to(dtype)
    weight = torch.randn(V, D, generator=g).to(dtype)
    target = torch.randint(V, (T,), generator=g)
    return hidden, weight, target


def upstream(T, dtype=torch.float32):
    g = torch.Generator().manual_seed(7)
    return [torch.randn(T, generator=g).to(dtype) for _ in range(2)]


def plain(hidden, weight, target, temperature):
    """What a careful user writes: float32 logits, log_softmax, gather."""
    log_p = torch.log_softmax(hidden.float() @ weight.float().T / temperature, dim=-1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=-1)


def run(fn, hidden, weight, target, temperature, grads, exact=False):
    leaves = [(t.double() if exact else t.clone()).requires_grad_() for t in (hidden, weight)]
    kwargs = {"temperature": temperature}
    logprob, entropy = fn(*leaves, target, **kwargs)
    torch.autograd.backward((logprob, entropy), [g.to(logprob.dtype) for g in grads])
    return logprob.detach(), entropy.detach(), leaves[0].grad, leaves[1].grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,D,V", SHAPES)
def test_values_and_both_gradients_are_as_good_as_torch(T, D, V, dtype, temperature):
    inputs, grads = (*make(T, D, V, dtype), temperature), upstream(T)
    ours = run(token_logprob, *inputs, grads)
    theirs = run(plain, *inputs, grads)
    truth = run(reference.token_logprob, *inputs, grads, exact=True)
    for got, torchs, exact in zip(ours, theirs, truth, strict=True):
        # logits of D roundings each, weighted sums of V or T terms of either sign
        assert_as_good_as_torch(got, torchs, exact, floor=2.0**-22 * math.sqrt(max(D, 4)))


def exact_dlogits(hidden, weight, target, temperature, grads):
    z = reference.linear(hidden.double(), weight.double()).requires_grad_()
    log_p = torch.log_softmax(z / temperature, dim=-1)
    outputs = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=-1)
    torch.autograd.backward(outputs, [g.double() for g in grads])
    return z.grad


# SHAPES, and two windows each way of the library's: on the emulator, on a GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,D,V", [*SHAPES, (1030, 3, 1100), (4100, 3, 4200)])
def test_without_batch_invariance(T, D, V, dtype, device):
    if T > 1000 and device != "cuda" and not (EMULATED and T < 4000):
        pytest.skip("of CUDA")
    inputs, grads = (*make(T, D, V, dtype), 0.7), upstream(T)
    ours = run(functools.partial(token_logprob, batch_invariant=False), *inputs, grads)
    theirs = run(plain, *inputs, grads)
    truth = run(reference.token_logprob, *inputs, grads, exact=True)
    for got, torchs, exact in zip(ours[:2], theirs[:2], truth[:2], strict=True):  # logits are float32
        assert_as_good_as_torch(got, torchs, exact, floor=2.0**-22 * math.sqrt(max(D, 4)))
    hidden, weight, *_ = inputs
    dlogits = exact_dlogits(*inputs, grads)
    for got, a, b, exact in ((ours[2], dlogits, weight, truth[2]), (ours[3], dlogits.T, hidden, truth[3])):
        # the gradient of the logits is rounded, or off by the rounding of its exponent, and so is the result
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20 * math.sqrt(max(D, 4))
        bar = 1.1 * rounding * (a.abs() @ b.double().abs() + exact.abs()) + 1e-6
        assert got.dtype == dtype and ((got.double() - exact).abs() <= bar).all()


def test_the_upstream_gradient_of_entropy_is_honoured():
    hidden, weight, target = make(6, 12, 600, torch.float32)
    zero, g = torch.zeros(6), upstream(6)[1]
    got = run(token_logprob, hidden, weight, target, 1.3, [zero, g])
    want = run(reference.token_logprob, hidden, weight, target, 1.3, [zero, g], exact=True)
    assert want[2].abs().max() > 0.1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    hidden.requires_grad_()
    token_logprob(hidden, weight, target, temperature=1.3)[1].backward(g)  # logprob has no gradient
    assert torch.equal(hidden.grad, got[2])


def test_gradcheck():
    hidden, weight, target = make(4, 5, 530, torch.float64)
    hidden.requires_grad_()
    small = make(4, 5, 11, torch.float64)
    small[0].requires_grad_(), small[1].requires_grad_()
    for h, w, t in ((hidden, weight, target), small):
        assert torch.autograd.gradcheck(lambda a, b, t=t: token_logprob(a, b, t, temperature=0.8), (h, w))


@pytest.mark.parametrize("V", [1, 511, 512, 513, 1025])
def test_a_target_in_the_first_and_in_the_last_partial_tile(V):
    hidden, weight, _ = make(2, 20, V, torch.float32)
    target = torch.tensor([0, V - 1])
    got = run(token_logprob, hidden, weight, target, 1.0, upstream(2))
    want = run(reference.token_logprob, hidden, weight, target, 1.0, upstream(2), exact=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.85])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_the_ops_on_materialised_logits(dtype, temperature):
    from grpo_engine.ops import gather_logprob, sample_token

    hidden, weight, target = make(37, 40, 1500, dtype)
    logits = linear(hidden, weight, out_dtype=torch.float32)
    logprob, entropy = token_logprob(hidden, weight, target, temperature=temperature)
    other_logprob, other_entropy = gather_logprob(logits, target, temperature=temperature)
    assert torch.equal(logprob, other_logprob) and torch.equal(entropy, other_entropy)
    sampled = sample_token(logits, seed=torch.arange(37), position=torch.zeros(37).long(), temperature=temperature)
    scored = token_logprob(hidden, weight, sampled.token, temperature=temperature)
    assert torch.equal(scored[0], sampled.logprob) and torch.equal(scored[1], sampled.entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 2, 7, 8, 33, 193])
def test_a_row_has_the_same_bits_in_a_batch_of_any_size(T, dtype):
    hidden, weight, target = make(600, 24, 600, dtype)
    grads = upstream(600)
    whole = run(token_logprob, hidden, weight, target, 0.9, grads)
    part = run(token_logprob, hidden[-T:], weight, target[-T:], 0.9, [g[-T:] for g in grads])
    for a, b in zip(part[:3], whole[:3], strict=True):  # values and dhidden
        assert torch.equal(a, b[-T:])


def test_a_permutation_of_rows_permutes_the_result():
    hidden, weight, target = make(50, 24, 600, torch.float32)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    grads = upstream(50)
    whole = run(token_logprob, hidden, weight, target, 1.0, grads)
    mixed = run(token_logprob, hidden[order], weight, target[order], 1.0, [g[order] for g in grads])
    for a, b in zip(mixed[:3], whole[:3], strict=True):
        assert torch.equal(a, b[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,D,V", [(5, 64, 12200), (700, 40, 700), (40, 16, 5000)])
def test_neither_threads_nor_a_repetition_change_a_bit(T, D, V, dtype, both_ways_on_threads):
    hidden, weight, target = make(T, D, V, dtype)
    both_ways_on_threads(lambda h, w: token_logprob(h, w, target), [hidden, weight], upstream(T))


def test_the_weight_gradient_does_not_depend_on_the_windows():
    """One chain over t: the sum over 1100 rows in three windows is that of linear's backward."""
    hidden, weight, target = make(1100, 12, 90, torch.float32)
    logits = linear(hidden, weight)
    grads = upstream(1100)
    got = run(token_logprob, hidden, weight, target, 1.0, grads)
    log_p = torch.log_softmax(logits.double(), -1)
    onehot = torch.nn.functional.one_hot(target, 90)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    dlogits = (grads[0][:, None] * (onehot - log_p.exp()) - grads[1][:, None] * log_p.exp() * (log_p + entropy)).float()
    backward = torch.ops.grpo_engine.linear_backward
    want = backward(dlogits, hidden, weight, True, True, False)
    # equal chains of inputs that differ in the last bits of exp
    torch.testing.assert_close(got[2], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[3], want[1], rtol=1e-5, atol=1e-4)


def test_a_frozen_weight_and_a_frozen_hidden():
    hidden, weight, target = make(30, 10, 700, torch.float32)
    grads = upstream(30)
    both = run(token_logprob, hidden, weight, target, 1.0, grads)
    for i, name in enumerate(("hidden", "weight")):
        leaves = [hidden.clone(), weight.clone()]
        leaves[i].requires_grad_()
        torch.autograd.backward(token_logprob(*leaves, target), grads)
        assert torch.equal(leaves[i].grad, both[2 + i]), name
        assert leaves[1 - i].grad is None
    empty = torch.ops.grpo_engine.token_logprob_backward(
        *grads, hidden, weight, target, torch.zeros(30, 3, dtype=torch.float64), 1.0, True, False
    )[1]
    assert empty.numel() == 0


def test_gradients_of_tied_weights_add():
    _, weight, target = make(6, 10, 50, torch.float32)
    ids = torch.tensor([0, 3, 3, 49, 7, 1])
    tied = weight.clone().requires_grad_()
    token_logprob(torch.nn.functional.embedding(ids, tied), tied, target)[0].sum().backward()
    exact = weight.double().requires_grad_()
    reference.token_logprob(exact[ids], exact, target, 1.0)[0].sum().backward()
    torch.testing.assert_close(tied.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_logits_to_ten_thousand_neither_overflow_nor_lose_the_gradient():
    hidden, weight, target = make(8, 16, 700, torch.float32, scale=1000.0)
    logits = linear(hidden, weight)
    assert logits.abs().max() > 1e4
    got = run(token_logprob, hidden, weight, target, 1.0, upstream(8))
    # the float32 logits are given; beyond them everything is exact to float32
    log_p = torch.log_softmax(logits.double(), -1)
    want = log_p.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(got[0].double(), want, rtol=2.0**-23, atol=1e-6)
    assert all(torch.isfinite(t).all() for t in got)
    certain = token_logprob(hidden, weight, logits.argmax(-1))
    assert (certain[0] <= 0).all() and (certain[1] >= 0).all()


def test_temperature_scales_values_and_gradients():
    hidden, weight, target = make(9, 16, 700, torch.float32)
    grads = upstream(9)
    halved = run(token_logprob, hidden, weight, target, 2.0, grads)
    by_hand = run(token_logprob, hidden * 0.5, weight, target, 1.0, grads)
    assert torch.equal(halved[0], by_hand[0]) and torch.equal(halved[1], by_hand[1])  # exact in 2
    torch.testing.assert_close(halved[2], 0.5 * by_hand[2])
    torch.testing.assert_close(halved[3], by_hand[3])


def test_uniform_and_nan_rows():
    hidden, weight, target = make(3, 8, 600, torch.float32)
    hidden[0], hidden[1, 2] = 0.0, float("nan")
    logprob, entropy = token_logprob(hidden, weight, target)
    assert abs(logprob[0].item() + math.log(600)) < 1e-6
    assert abs(entropy[0].item() - math.log(600)) < 1e-6
    assert logprob[1].isnan() and entropy[1].isnan()
    assert torch.equal(logprob[2:], token_logprob(hidden[2:], weight, target[2:])[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_extra_memory_is_under_a_twentieth_of_the_logits(device):
    if device == "cuda":
        pytest.skip("reads the memory of the process")
    T, D, V = 300, 8, 151936
    hidden, weight, target = make(T, D, V, torch.float32)
    hidden.requires_grad_()
    grads = upstream(T)

    def peak_mib():
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

    run(token_logprob, *make(T, D, 600, torch.float32), 1.0, grads)  # threads and code are resident
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts again from what is resident now
    before = peak_mib()
    logprob, entropy = token_logprob(hidden, weight, target)
    torch.autograd.backward((logprob, entropy), grads)
    assert torch.isfinite(hidden.grad).all()
    assert peak_mib() - before < 0.05 * T * V * 4 / 2**20


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("bad", [-100, -1, 20])
def test_a_target_out_of_range_is_named_with_its_row(bad):
    hidden, weight, target = make(4, 8, 20, torch.float32)
    target[2] = bad
    with pytest.raises(ValueError, match=rf"target must be in .*20\), got {bad} at row 2"):
        token_logprob(hidden, weight, target)


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("bad", [-100, -1, 20])
def test_a_target_out_of_range_makes_its_row_nan_on_cuda(bad):
    hidden, weight, target = make(4, 8, 20, torch.float32)
    good = run(token_logprob, hidden, weight, target, 1.0, upstream(4))
    target[2] = bad
    logprob, _, dhidden, dweight = run(token_logprob, hidden, weight, target, 1.0, upstream(4))
    assert logprob[2].isnan() and dhidden[2].isnan().all() and dweight.isnan().all()
    others = [0, 1, 3]
    assert torch.equal(logprob[others], good[0][others]) and torch.equal(dhidden[others], good[2][others])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "hidden,weight,target,dtypes,temperature,error,says",
    [
        ((4,), (5, 4), (2,), "ffl", 1.0, ValueError, r"hidden must be \[T, D\].*got \[4\]"),
        ((2, 4), (5, 3), (2,), "ffl", 1.0, ValueError, r"weight must be \[V, D\] = \[-1, 4\]"),
        ((2, 4), (0, 4), (2,), "ffl", 1.0, ValueError, "weight needs V >= 1 rows"),
        ((2, 4), (5, 4), (3,), "ffl", 1.0, ValueError, r"target must be \[T\] = \[2\], got \[3\]"),
        ((2, 4), (5, 4), (2,), "lfl", 1.0, TypeError, "hidden must be Float, BFloat16 or Double"),
        ((2, 4), (5, 4), (2,), "bfl", 1.0, TypeError, "weight must be BFloat16, got Float"),
        ((2, 4), (5, 4), (2,), "fff", 1.0, TypeError, "target must be Long, got Float"),
        ((2, 4), (5, 4), (2,), "ffl", 0.0, ValueError, "temperature must be finite and > 0, got 0"),
        ((2, 4), (5, 4), (2,), "ffl", math.inf, ValueError, "temperature must be finite"),
    ],
)
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, hidden, weight, target, dtypes, temperature, error, says):
    kinds = {"f": torch.float32, "b": torch.bfloat16, "l": torch.int64}
    tensors = [torch.zeros(s, dtype=kinds[d], device=device) for s, d in zip((hidden, weight, target), dtypes, strict=True)]
    with pytest.raises(error, match="token_logprob: .*" + says):
        token_logprob(*tensors, temperature=temperature)


def test_a_strided_hidden_is_rejected():
    hidden, weight, target = make(4, 8, 20, torch.float32)
    with pytest.raises(ValueError, match="hidden must be contiguous.*strides"):
        token_logprob(hidden.repeat(1, 2)[:, :8], weight, target)


@pytest.mark.parametrize("batch_invariant", [(), (False,)])
def test_registration(batch_invariant):
    hidden, weight, target = make(3, 7, 40, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.grpo_engine.token_logprob.default, (hidden, weight, target, 0.9, *batch_invariant))
    saved = torch.ops.grpo_engine.token_logprob(hidden, weight, target, 0.9)[2].detach()
    torch.library.opcheck(
        torch.ops.grpo_engine.token_logprob_backward.default,
        (*upstream(3), hidden.detach(), weight.detach(), target, saved, 0.9, True, False, *batch_invariant),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits,temperature", [([0.0, 3e38], 0.5), ([1.0, 5.0, 2.0], 1e-38), ([2e38, 3e38, 3e38], 0.25),
                                                ([-3e38, -2e38], 0.5), ([1.0, 5.0, 2.0], 1e-42)])  # fmt: skip
def test_logits_that_leave_float32_once_divided(logits, temperature, dtype):
    """Values and gradients of the fused op and of gather_logprob against float64, of every target."""
    V = len(logits)
    weight = torch.tensor(logits).view(V, 1).to(dtype)
    hidden, target = torch.ones(V, 1, dtype=dtype), torch.arange(V)
    exact = (weight.double().view(1, V) * torch.ones(V, 1, dtype=torch.float64)).requires_grad_()
    # the logits less their largest, whose softmax is that of the logits
    log_p = torch.log_softmax((exact - exact.detach().max()) / temperature, dim=1)
    want, entropy = log_p[target, target], -(log_p.exp() * log_p.clamp(min=-1e4)).sum(dim=1)
    grads = torch.autograd.grad(want.sum(), exact)[0]
    rows = weight.view(1, V).repeat(V, 1).requires_grad_()
    for got, gradient in (
        (token_logprob(hidden, weight, target, temperature=temperature), None),
        (gather_logprob(rows, target, temperature=temperature), rows),
    ):
        torch.testing.assert_close(got[0], want.float(), rtol=2**-22, atol=0)
        torch.testing.assert_close(got[1].double(), entropy.double().detach(), rtol=1e-6, atol=1e-6)
        if gradient is not None:
            got[0].sum().backward()
            most = 3.4028e38  # below 2^-128 a temperature counts as that
            got_grad, want_grad = (g.double().clamp(-most, most) for g in (gradient.grad, grads))
            torch.testing.assert_close(got_grad, want_grad, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)
    weight.requires_grad_()
    token_logprob(hidden, weight, target, temperature=temperature)[0].sum().backward()
    assert not weight.grad.isnan().any()

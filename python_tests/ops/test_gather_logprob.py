"""gather_logprob: float64 reference, gradients, extremes, invariance, contract, registration."""

import pytest
import reference
import torch
from bars import assert_as_good_as_torch

from grpo_engine.ops import gather_logprob

pytestmark = pytest.mark.usefixtures("device")

INF, NAN = float("inf"), float("nan")
# one column, less than a vector, a vector, a ragged tail, one block of 512, one more, several
# blocks with a tail, Qwen2.5's vocabulary, no rows
SHAPES = [(3, 1), (4, 7), (2, 16), (5, 33), (3, 512), (3, 513), (4, 2050), (1, 151_936), (0, 8)]


def make(T, V, dtype, scale=3.0):
    g = torch.Generator().manual_seed(1000 * T + V)
    logits = (torch.randn(T, V, generator=g) * scale).to(dtype)
    target = torch.randint(V, (T,), generator=g)
    if T > 1:
        target[0], target[1] = 0, V - 1
    return logits, target


def plain(logits, target, temperature):
    """Plain torch in float32 (float64 for float64)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    log_p = torch.log_softmax(z / temperature, dim=-1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def ours(logits, target, temperature):
    return gather_logprob(logits, target, temperature=temperature)


def values_and_gradient(function, logits, target, temperature, upstream):
    leaf = logits.clone().requires_grad_()
    logprob, entropy = function(leaf, target, temperature)
    ((logprob * upstream[0]).sum() + (entropy * upstream[1]).sum()).backward()
    return logprob.detach(), entropy.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 13.0])
@pytest.mark.parametrize("T,V", SHAPES)
def test_forward_and_backward_are_as_good_as_torch(T, V, temperature, dtype):
    logits, target = make(T, V, dtype)
    upstream = torch.randn(2, T, generator=torch.Generator().manual_seed(5))
    got = values_and_gradient(ours, logits, target, temperature, upstream)
    theirs = values_and_gradient(plain, logits, target, temperature, upstream)
    exact = values_and_gradient(reference.gather_logprob, logits.double(), target, temperature, upstream.double())
    assert got[0].dtype == got[1].dtype == torch.float32 and got[2].dtype == dtype
    # a block of 512 is 16 chains of 32 float32 additions: relative error of the sum below 2^-19
    for a, b, truth in zip(got, theirs, exact, strict=True):
        assert_as_good_as_torch(a, b, truth, floor=2.0**-20)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("used", ["logprob", "entropy", "both"])
def test_gradcheck(temperature, used):
    logits, target = make(3, 19, torch.float64, scale=1.0)
    pick = {"logprob": slice(0, 1), "entropy": slice(1, 2), "both": slice(0, 2)}[used]
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(x, target, temperature)[pick], (logits,))


def test_float64_matches_the_reference():
    logits, target = make(5, 700, torch.float64, scale=10.0)
    for got, want in zip(ours(logits, target, 0.7), reference.gather_logprob(logits, target, 0.7), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_a_gradient_that_comes_from_only_one_output_is_honoured():
    logits, target = make(3, 40, torch.float32)
    both = values_and_gradient(ours, logits, target, 0.5, torch.tensor([[2.0], [-3.0]]))[2]
    parts = [
        values_and_gradient(ours, logits, target, 0.5, torch.tensor([[a], [b]]))[2] for a, b in ((2.0, 0.0), (0.0, -3.0))
    ]
    alone = []
    for i, factor in enumerate((2.0, -3.0)):
        leaf = logits.clone().requires_grad_()
        (factor * ours(leaf, target, 0.5)[i]).sum().backward()
        alone.append(leaf.grad)
    for a, b in zip(parts, alone, strict=True):
        assert torch.equal(a, b) and a.abs().max() > 1e-3
    torch.testing.assert_close(both, parts[0] + parts[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("V", [2, 16, 600])
def test_entropy_of_a_one_hot_row_is_exactly_zero(V, dtype):
    for low in (-INF, -1e30, -2000.0):
        logits = torch.full((3, V), low, dtype=dtype)
        target = torch.tensor([0, V // 2, V - 1])
        logits[torch.arange(3), target] = 5.0
        logits.requires_grad_()
        logprob, entropy = gather_logprob(logits, target)
        assert torch.equal(logprob, torch.zeros(3, dtype=dtype))
        assert torch.equal(entropy, torch.zeros(3, dtype=dtype))
        assert not torch.signbit(entropy).any()
        (logprob.sum() + entropy.sum()).backward()
        assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("V", [1, 5, 512, 1000, 151_936])
def test_an_all_equal_row_is_uniform(V):
    for value in (0.0, 80.0, -1e4):
        logprob, entropy = gather_logprob(torch.full((1, V), value), torch.tensor([V // 2]))
        want = torch.tensor([V], dtype=torch.float64).log()
        torch.testing.assert_close(entropy.double(), want, rtol=2**-23, atol=0)
        torch.testing.assert_close(logprob.double(), -want, rtol=2**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_minus_infinity_has_probability_zero(dtype, temperature):
    logits, target = make(4, 1100, dtype)
    logits[:, 1::2] = -INF
    logits[2, :1000] = -INF  # a whole block of nothing
    target[0], target[1], target[2] = 0, 1, 1098
    upstream = torch.ones(2, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    logprob, entropy, dlogits = values_and_gradient(ours, logits, target, temperature, upstream)
    want = reference.gather_logprob(logits, target, temperature)
    assert logprob[1] == -INF and torch.isfinite(entropy).all()
    torch.testing.assert_close(logprob.double(), want[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), want[1], rtol=1e-6, atol=2e-6)
    assert torch.isfinite(dlogits).all()
    dead = torch.isneginf(logits)
    dead[1, 1] = False  # the target pushes itself up even from probability 0
    assert torch.equal(dlogits[dead], torch.zeros_like(dlogits[dead]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("where", [0, 15, 511, 512, 1029])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_row_is_nan_and_the_others_keep_their_bits(dtype, where, bad):
    logits, target = make(5, 1030, dtype)
    upstream = torch.ones(2, 5)
    good = values_and_gradient(ours, logits, target, 0.9, upstream)
    logits[2, where] = bad
    logits[4] = -INF
    got = values_and_gradient(ours, logits, target, 0.9, upstream)
    for a, b in zip(got, good, strict=True):
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])
    for a in got[:2]:
        assert a[[2, 4]].isnan().all()
    assert got[2][[2, 4]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [80.0, 1e4, 1e30])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-3])
def test_large_logits_do_not_overflow(scale, temperature, dtype):
    logits, target = make(6, 50, dtype, scale=scale)
    target[3] = logits[3].argmax()
    upstream = torch.ones(2, 6)
    logprob, entropy, dlogits = values_and_gradient(ours, logits, target, temperature, upstream)
    assert torch.isfinite(logprob).all() and (logprob <= 0).all()
    assert torch.isfinite(entropy).all() and (entropy >= 0).all()
    # z is rounded to float32 once: half an ulp of the largest z is the error of every difference
    atol = 2.0**-23 * float(logits.abs().max()) / temperature + 1e-5
    want = reference.gather_logprob(logits, target, temperature)
    torch.testing.assert_close(logprob.double(), want[0], rtol=1e-6, atol=atol)
    # probabilities are at most 1, so |d logprob / d logit| <= 1 / temperature in every element;
    # p (log p + H) is below 1 + log V
    assert (dlogits.float().abs() * temperature <= 2 + torch.tensor(50.0).log()).all()


@pytest.mark.parametrize("temperature", [0.7, 0.9, 1.3])
def test_gradient_of_a_certain_token_is_zero_at_any_scale(temperature):
    # p = 1 for the largest logit whatever its size: the gradient must not carry the rounding of z
    logits = torch.zeros(4, 20)
    logits[:, 7] = torch.tensor([321.0, 12345.678, 9.9e5, 3.3e7])
    upstream = torch.tensor([[1.0], [0.0]])
    dlogits = values_and_gradient(ours, logits, torch.full((4,), 7), temperature, upstream)[2]
    assert torch.equal(dlogits, torch.zeros_like(dlogits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(both_ways_on_threads, dtype):
    logits, target = make(47, 1500, dtype)
    upstream = torch.ones(2, 1)
    values, gradients = both_ways_on_threads(lambda x: ours(x, target, 0.8), [logits], list(upstream.expand(2, 47)))
    one = [*values, *gradients]
    for t in (0, 1, 20, 46):
        row = slice(t, t + 1)
        alone = values_and_gradient(ours, logits[row], target[row], 0.8, upstream)
        for a, b in zip(alone, one, strict=True):
            assert torch.equal(a[0], b[t])


def test_an_unaligned_base_has_the_same_bits():
    logits, target = make(3, 700, torch.float32)
    buffer = torch.empty(3 * 700 + 1)
    shifted = buffer[1:].view(3, 700)
    shifted.copy_(logits)
    for a, b in zip(ours(shifted, target, 0.8), ours(logits, target, 0.8), strict=True):
        assert torch.equal(a, b)


def test_second_backward_through_a_retained_graph_gives_the_same_gradient():
    logits, target = make(3, 40, torch.float32)
    logits.requires_grad_()
    logprob, entropy = gather_logprob(logits, target)
    first = torch.autograd.grad(logprob.sum() + entropy.sum(), logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(logprob.sum() + entropy.sum(), logits)[0])


def logits_and_target(d, V=5, dtype=torch.float32, target=torch.int64):
    return torch.zeros(2, V, dtype=dtype, device=d), torch.zeros(2, dtype=target, device=d)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "make_inputs,temperature,error,says",
    [
        (lambda d: (torch.zeros(5, device=d), torch.zeros(2, device=d).long()), 1.0, ValueError,
         r"logits must be \[T, V\].*got \[5\]"),
        (lambda d: logits_and_target(d, V=0), 1.0, ValueError, r"V >= 1 columns, got \[2, 0\]"),
        (lambda d: logits_and_target(d, dtype=torch.float16), 1.0, TypeError, "got Half"),
        (lambda d: (torch.zeros(5, 2, device=d).t(), torch.zeros(2, device=d).long()), 1.0,
         ValueError, r"logits must be contiguous.*strides \[1, 2\]"),
        (lambda d: logits_and_target(d, target=torch.int32), 1.0, TypeError,
         "target must be Long, got Int"),
        (lambda d: (torch.zeros(2, 5, device=d), torch.zeros(3, device=d).long()), 1.0, ValueError,
         r"target must be \[T\] = \[2\], got \[3\]"),
        (logits_and_target, 0.0, ValueError, "temperature must be finite and > 0, got 0"),
        (logits_and_target, -1.0, ValueError, "temperature must be finite and > 0, got -1"),
        (logits_and_target, INF, ValueError, "temperature must be finite and > 0, got inf"),
        (logits_and_target, NAN, ValueError, "temperature must be finite and > 0, got nan"),
    ],
)  # fmt: skip
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, make_inputs, temperature, error, says):
    with pytest.raises(error, match="gather_logprob: .*" + says):
        gather_logprob(*make_inputs(device), temperature=temperature)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("bad", [-1, -100, 5, 2**40])
def test_a_target_outside_the_vocabulary_is_named(bad):
    target = torch.tensor([0, 4, bad])
    says = rf"gather_logprob: target must be in \[0, V\) = \[0, 5\), got {bad} at row 2"
    with pytest.raises(ValueError, match=says):
        gather_logprob(torch.zeros(3, 5), target)


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("bad", [-1, -100, 5, 2**40])
def test_a_target_outside_the_vocabulary_makes_its_row_nan_on_cuda(bad):
    logits, target = make(3, 5, torch.float32)
    good = values_and_gradient(ours, logits, target, 1.0, torch.ones(2, 1))
    target[2] = bad
    logprob, _, dlogits = values_and_gradient(ours, logits, target, 1.0, torch.ones(2, 1))
    assert logprob[2].isnan() and dlogits[2].isnan().all()
    assert torch.equal(logprob[:2], good[0][:2]) and torch.equal(dlogits[:2], good[2][:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_registration(dtype):
    logits, target = make(3, 19, dtype)
    _, _, saved = torch.ops.grpo_engine.gather_logprob(logits, target, 0.7)
    g = torch.ones(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(torch.ops.grpo_engine.gather_logprob_backward.default, (g, g, logits, target, saved, 0.7))
    torch.library.opcheck(torch.ops.grpo_engine.gather_logprob.default, (logits.requires_grad_(), target, 0.7))

"""swiglu: float64 reference, gradients, extremes, invariance, contract, registration."""

import pytest
import reference
import torch
from bars import assert_as_good_as_torch

from grpo_engine.ops import swiglu

pytestmark = pytest.mark.usefixtures("device")

# one column, less than a vector, a vector, a ragged tail, Qwen2.5-0.5B's width, no rows, no columns
SHAPES = [(3, 1), (2, 7), (1, 16), (5, 33), (2, 4864), (0, 8), (3, 0)]


def make(T, F, dtype, scale=2.0):
    g = torch.Generator().manual_seed(1000 * T + F)
    gate_up, dy = torch.randn(T, 2 * F, generator=g) * scale, torch.randn(T, F, generator=g)
    return gate_up.to(dtype), dy.to(dtype)


def plain(gate_up):  # the Hugging Face order of roundings
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def value_and_gradient(function, gate_up, dy):
    leaf = gate_up.clone().requires_grad_()
    y = function(leaf)
    y.backward(dy)
    return y.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,F", SHAPES)
def test_forward_and_backward_are_as_good_as_torch(T, F, dtype):
    gate_up, dy = make(T, F, dtype)
    ours = value_and_gradient(swiglu, gate_up, dy)
    torchs = value_and_gradient(plain, gate_up, dy)
    exact = value_and_gradient(reference.swiglu, gate_up.double(), dy.double())
    for got, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert got.dtype == dtype
        # an exponential within 1 ulp and five roundings
        assert_as_good_as_torch(got, theirs, truth, floor=2.0**-22)


def test_bfloat16_rounds_where_hugging_face_does():
    gate_up, _ = make(64, 128, torch.bfloat16)
    gate, up = gate_up.chunk(2, dim=-1)
    gate64 = gate.double()
    silu = (gate64 * torch.sigmoid(gate64)).to(torch.bfloat16)
    want = (silu.float() * up.float()).to(torch.bfloat16)
    # float32 instead of float64 before the first rounding moves it only at a near-tie
    assert (swiglu(gate_up) != want).float().mean() < 1e-3


def test_gradcheck():
    gate_up, _ = make(3, 19, torch.float64)
    assert torch.autograd.gradcheck(swiglu, (gate_up.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_gates_neither_overflow_nor_lose_the_sign(dtype):
    gate = [0.0, -0.0, 80.0, -80.0, 100.0, -100.0, 1e4, -1e4, 1e30, -1e30]
    gate = torch.tensor(gate, dtype=dtype)
    gate_up = torch.cat([gate, torch.full_like(gate, 2.0)])[None].requires_grad_()
    y = swiglu(gate_up)
    y.sum().backward()
    want = torch.where(gate > 0, 2 * gate, torch.zeros(()).to(dtype))
    torch.testing.assert_close(y[0].detach(), want, rtol=1e-6, atol=1e-30)
    dgate, dup = gate_up.grad[0].chunk(2)
    torch.testing.assert_close(dup, want / 2, rtol=1e-6, atol=1e-30)
    slope = torch.where(gate > 0, 2.0, torch.where(gate < 0, 0.0, 1.0)).to(dtype)
    torch.testing.assert_close(dgate, slope, rtol=1e-6, atol=1e-30)


def test_nan_stays_in_its_element():
    gate_up = torch.ones(2, 40)
    gate_up[0, 3] = gate_up[1, 25] = float("nan")
    y = swiglu(gate_up)
    assert y.isnan().nonzero().tolist() == [[0, 3], [1, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(both_ways_on_threads, dtype):
    gate_up, dy = make(301, 97, dtype)
    y, (dgate_up,) = both_ways_on_threads(swiglu, [gate_up], dy)
    for t in (0, 1, 150, 300):
        alone = value_and_gradient(swiglu, gate_up[t : t + 1], dy[t : t + 1])
        for a, b in zip(alone, (y, dgate_up), strict=True):
            assert torch.equal(a[0], b[t])


def test_an_upstream_gradient_may_be_expanded():
    gate_up, _ = make(4, 9, torch.float32)
    ours = value_and_gradient(swiglu, gate_up, torch.tensor(3.0).expand(4, 9))[1]
    same = value_and_gradient(swiglu, gate_up, torch.full((4, 9), 3.0))[1]
    assert torch.equal(ours, same)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "make_input,error,says",
    [
        (lambda d: torch.zeros(4, device=d), ValueError, r"gate_up must be \[T, 2F\].*got \[4\]"),
        (lambda d: torch.zeros(2, 5, device=d), ValueError, r"even number .*got \[2, 5\]"),
        (lambda d: torch.zeros(2, 4, dtype=torch.int64, device=d), TypeError, "got Long"),
        (lambda d: torch.zeros(2, 4, dtype=torch.float16, device=d), TypeError, "got Half"),
        (lambda d: torch.zeros(4, 2, device=d).t(), ValueError, r"contiguous.*strides \[1, 2\]"),
    ],
)
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, make_input, error, says):
    with pytest.raises(error, match="swiglu: .*" + says):
        swiglu(make_input(device))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_checks_the_upstream_gradient(device):
    gate_up, dy = torch.zeros(2, 6, device=device), torch.zeros(2, 4, device=device)
    with pytest.raises(ValueError, match=r"swiglu: dy must be \[T, F\] = \[2, 3\], got \[2, 4\]"):
        torch.ops.grpo_engine.swiglu_backward(dy, gate_up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_registration(dtype):
    gate_up, dy = make(3, 19, dtype)
    torch.library.opcheck(torch.ops.grpo_engine.swiglu_backward.default, (dy, gate_up))
    torch.library.opcheck(torch.ops.grpo_engine.swiglu.default, (gate_up.requires_grad_(),))

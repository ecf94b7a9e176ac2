"""rms_norm: float64 reference, gradients, invariance, contract, registration."""

import pytest
import reference
import torch
from bars import assert_as_good_as_torch

from grpo_engine.ops import rms_norm

pytestmark = pytest.mark.usefixtures("device")

# one vector, a ragged tail, one column, Qwen2.5-0.5B's width, no rows
SHAPES = [(1, 16), (5, 33), (3, 1), (7, 896), (0, 8)]


def make(T, D, dtype, seed=0):
    g = torch.Generator().manual_seed(seed + 1000 * T + D)
    return torch.randn(T, D, generator=g).to(dtype), torch.randn(D, generator=g).to(dtype)


def plain(x, weight, eps):  # the Hugging Face order of roundings
    f = x.float()
    n = f * torch.rsqrt((f * f).mean(-1, keepdim=True) + eps)
    return weight * n.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,D", SHAPES)
def test_forward_and_backward_are_as_good_as_torch(T, D, dtype):
    x, weight = make(T, D, dtype)
    dy = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, torchs, exact = [], [], []
    for fn, out, cast in ((rms_norm, got, False), (plain, torchs, False), (None, exact, True)):
        a, w = x.clone(), weight.clone()
        if cast:
            a, w = a.double(), w.double()
        a.requires_grad_(), w.requires_grad_()
        y = reference.rms_norm(a, w, 1e-6) if fn is None else fn(a, w, eps=1e-6)
        y.backward(dy.to(y.dtype))
        out += [y.detach(), a.grad, w.grad]
    for ours, theirs, truth in zip(got, torchs, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_good_as_torch(ours, theirs, truth, floor=2.0**-22)


@pytest.mark.parametrize("share", [None, 2.0**-8, 2.0**-9, 2.0**-10])
def test_sums_of_all_bfloat16_numbers_are_rounded_as_torch_rounds_them(share):
    # with a share of itself added, many a number lies half-way between two
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(64, 1024)
    other = x.flatten()[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view_as(x)
    residual = other if share is None else (x.float() * share).bfloat16()
    _, total = rms_norm(x, torch.ones(1024).bfloat16(), eps=1e-6, residual=residual)
    want = x + residual
    assert torch.equal(total.isnan(), want.isnan())
    assert torch.equal(total.view(torch.int16)[~want.isnan()], want.view(torch.int16)[~want.isnan()])


def test_gradcheck():
    x, weight = make(3, 19, torch.float64)
    x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, eps=1e-6), (x, weight))


def test_a_row_has_the_same_bits_alone_and_in_a_batch(on_threads):
    x, weight = make(601, 97, torch.float32)
    one, *others = on_threads(lambda: rms_norm(x, weight, eps=1e-6))
    assert all(torch.equal(one, other) for other in others)
    for t in (0, 1, 150, 600):
        assert torch.equal(rms_norm(x[t : t + 1], weight, eps=1e-6)[0], one[t])


def test_zeros_huge_and_nan_rows():
    x = torch.zeros(4, 20)
    x[1], x[2, 3] = 1e18, float("nan")
    y = rms_norm(x, torch.ones(20), eps=1e-6)
    assert torch.equal(y[0], torch.zeros(20)) and torch.equal(y[3], torch.zeros(20))
    torch.testing.assert_close(y[1], torch.ones(20))
    assert y[2].isnan().all()


# ---------------------------------------------------------------- with a residual


def make_residual(T, D, dtype):
    x, weight = make(T, D, dtype)
    return x, weight, make(T, D, dtype, seed=7)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("T,D", [*SHAPES, (130, 77)])
def test_a_residual_gives_the_bits_of_the_norm_of_the_rounded_sum(T, D, dtype):
    x, weight, residual = make_residual(T, D, dtype)
    y, total = rms_norm(x, weight, eps=1e-6, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight, eps=1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,D", [*SHAPES, (130, 77)])
def test_gradients_with_a_residual_are_as_good_as_torch(T, D, dtype):
    x, weight, residual = make_residual(T, D, dtype)
    dy, dtotal = make(T, D, dtype, seed=8)[0], make(T, D, dtype, seed=9)[0]

    def gradients(function, *leaves):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        outputs = function(*leaves)
        return torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip((dy, dtotal), outputs, strict=True)])

    def torchs(x, weight, residual):
        return plain(x + residual, weight, 1e-6), x + residual

    def exact(x, weight, residual):  # of the sum that is stored
        return reference.rms_norm(x + residual, weight, 1e-6), x + residual

    got = gradients(lambda x, w, r: rms_norm(x, w, eps=1e-6, residual=r), x, weight, residual)
    theirs = gradients(torchs, x, weight, residual)
    stored = (x + residual).double()
    truth = gradients(exact, stored, weight.double(), torch.zeros_like(stored))
    assert torch.equal(got[0], got[2])
    for ours, peer, want in zip(got, theirs, truth, strict=True):
        assert ours.dtype == dtype
        assert_as_good_as_torch(ours, peer, want, floor=2.0**-22)


def test_gradcheck_with_a_residual():
    x, weight, residual = (t.requires_grad_() for t in make_residual(3, 19, torch.float64))
    assert torch.autograd.gradcheck(lambda a, w, r: rms_norm(a, w, eps=1e-6, residual=r), (x, weight, residual))


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_be_left_unused(used):
    x, weight, residual = (t.requires_grad_() for t in make_residual(3, 19, torch.float64))
    assert torch.autograd.gradcheck(lambda a, r: rms_norm(a, weight, eps=1e-6, residual=r)[used], (x, residual))


def test_backward_has_the_same_bits_whatever_the_threads_and_a_row_of_dx_depends_on_that_row(both_ways_on_threads):
    x, weight, residual = make_residual(1450, 97, torch.float32)  # 23 chunks of 64 rows

    def norm(rows):
        return lambda x, weight: rms_norm(x, weight, eps=1e-6, residual=residual[rows])

    _, whole = both_ways_on_threads(norm(slice(None)), [x, weight], (residual, x))
    for t in (0, 63, 64, 1449):
        rows = slice(t, t + 1)
        leaves = [x[rows].clone().requires_grad_(), weight.clone().requires_grad_()]
        alone = torch.autograd.grad(norm(rows)(*leaves), leaves, (residual[rows], x[rows]))
        assert torch.equal(alone[0][0], whole[0][t])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_bad_residual_is_told_what_was_wanted_and_what_came(device):
    x, weight = torch.zeros(2, 4, device=device), torch.zeros(4, device=device)
    with pytest.raises(ValueError, match=r"rms_norm: residual must be \[T, D\] = \[2, 4\], got \[4, 2\]"):
        rms_norm(x, weight, eps=1e-6, residual=torch.zeros(4, 2, device=device))
    with pytest.raises(TypeError, match="rms_norm: residual must be Float, got Double"):
        rms_norm(x, weight, eps=1e-6, residual=x.double())
    with pytest.raises(ValueError, match="rms_norm: residual must be contiguous"):
        rms_norm(x, weight, eps=1e-6, residual=torch.zeros(4, 2, device=device).t())


# ---------------------------------------------------------------- contract


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "shape,weight,dtype,error,says",
    [
        ((4,), (4,), torch.float32, ValueError, r"x must be \[T, D\].*got \[4\]"),
        ((2, 4), (3,), torch.float32, ValueError, r"weight must be \[D\] = \[4\], got \[3\]"),
        ((2, 4), (4,), torch.int32, TypeError, "x must be Float, BFloat16 or Double, got Int"),
        ((2, 0), (0,), torch.float32, ValueError, "D >= 1"),
    ],
)
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, shape, weight, dtype, error, says):
    x = torch.zeros(shape, dtype=dtype, device=device)
    with pytest.raises(error, match="rms_norm: .*" + says):
        rms_norm(x, torch.zeros(weight, dtype=dtype, device=device), eps=1e-6)


def test_registration():
    x, weight = make(3, 19, torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.grpo_engine.rms_norm.default, (x, weight, 1e-6))
    residual = torch.randn(3, 19, requires_grad=True)
    torch.library.opcheck(torch.ops.grpo_engine.rms_norm_residual.default, (x, residual, weight, 1e-6))
    rstd = torch.ones(3)
    for dsum in (None, torch.ones(3, 19)):
        args = (torch.ones(3, 19), dsum, x.detach(), weight.detach(), rstd)
        torch.library.opcheck(torch.ops.grpo_engine.rms_norm_backward.default, args)

"""linear: float64 reference, gradients, the one chain per element, contract, registration."""

import functools
import math
import os
import subprocess
import sys

import pytest
import reference
import torch
from bars import assert_as_good_as_torch
from conftest import EMULATED, ROOT, SAME_EXTENSION, assert_identical

from grpo_engine import _C
from grpo_engine.ops import linear

pytestmark = pytest.mark.usefixtures("device")

# T, I, O: one element; one row of many; one over a tile in every direction; ragged tails of a
# vector and of a transposed 16 x 16; more than one slice of k; four vectors left at the end of a
# panel; many blocks; no rows; no columns to sum over
SHAPES = [
    (1, 1, 1),
    (1, 896, 100),
    (9, 33, 49),
    (7, 16, 17),
    (50, 385, 64),
    (33, 191, 112),
    (400, 200, 400),
    (0, 4, 5),
    (3, 0, 4),
]


def make(T, in_features, out_features, dtype, seed=0):
    g = torch.Generator().manual_seed(seed + 10000 * T + 100 * in_features + out_features)
    return [
        torch.randn(*s, generator=g).to(dtype)
        for s in ((T, in_features), (out_features, in_features), (out_features,), (T, out_features))
    ]


@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,I,O", SHAPES)
def test_forward_and_backward_are_as_good_as_torch(T, I, O, dtype, batch_invariant):
    x, weight, bias, dy = make(T, I, O, dtype)
    results = []
    for fn, exact in (
        (functools.partial(linear, batch_invariant=batch_invariant), False),
        (torch.nn.functional.linear, False),
        (reference.linear, True),
    ):
        leaves = [t.double() if exact else t.clone() for t in (x, weight, bias)]
        for leaf in leaves:
            leaf.requires_grad_()
        y = fn(*leaves)
        y.backward(dy.to(y.dtype))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs, truth in zip(*results, strict=True):
        assert ours.dtype == dtype
        # a chain of n roundings: sqrt(n) of them on average, each of half an ulp of a partial sum
        assert_as_good_as_torch(ours, theirs, truth, floor=2.0**-24 * math.sqrt(max(T, I, O, 4)))


def test_float32_output_of_bfloat16_is_not_rounded(device):
    x, weight, bias, dy = make(20, 70, 50, torch.bfloat16)
    x.requires_grad_(), weight.requires_grad_()
    y = linear(x, weight, bias, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    if EMULATED or device == "cuda":  # tensor cores add in another order
        wide = linear(x.float(), weight.float(), bias.float())
        torch.testing.assert_close(y, wide, rtol=2.0**-20, atol=2.0**-18)
        assert not torch.equal(y, y.bfloat16().float())
    else:  # the chain of bfloat16 is that of float32 from the other end
        assert torch.equal(y, linear(x.float().flip(1), weight.float().flip(1), bias.float()))
    assert torch.equal(y.bfloat16(), linear(x, weight, bias))
    grads = torch.autograd.grad(y, (x, weight), dy.float())
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2
    for got, want in zip(grads, (dy.float() @ weight.float(), dy.float().T @ x.float()), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2.0**-7, atol=1e-4)


def test_without_batch_invariance_a_wide_output_and_its_gradients():
    x, weight, bias, dy = make(20, 70, 50, torch.bfloat16)
    x.requires_grad_(), weight.requires_grad_()
    y = linear(x, weight, bias, out_dtype=torch.float32, batch_invariant=False)
    wide = [t.detach().double() for t in (x, weight, bias)]
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), reference.linear(*wide), rtol=2.0**-20, atol=2.0**-18)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy.float() * (1 + 2.0**-10))
    d = dy.double() * (1 + 2.0**-10)
    for got, a, b in ((dx, d, wide[1]), (dweight, d.T, wide[0])):
        # dy is rounded to bfloat16, and so is the result; float32 sums between
        bar = 2.0**-9 * (a.abs() @ b.abs()) + 2.0**-8 * (a @ b).abs() + 1e-6
        assert ((got.double() - a @ b).abs() <= bar).all()


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu_batch_invariance_is_not_a_choice(dtype):
    x, weight, bias, dy = make(33, 191, 112, dtype)
    assert torch.equal(linear(x, weight, bias, batch_invariant=False), linear(x, weight, bias))
    grads = [torch.ops.grpo_engine.linear_backward(dy, x, weight, True, True, True, b) for b in (False, True)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sums", [(True, True), (False, True), (False, False)])
def test_torchs_switch_for_sums_in_bfloat16_is_left_as_it_was(sums, monkeypatch):
    switch = torch.backends.cuda.matmul
    before = switch.allow_bf16_reduced_precision_reduction
    try:
        switch.allow_bf16_reduced_precision_reduction = sums
        was = switch.allow_bf16_reduced_precision_reduction
        linear(*make(3, 4, 5, torch.bfloat16)[:2], batch_invariant=False)
        assert switch.allow_bf16_reduced_precision_reduction == was
    finally:
        switch.allow_bf16_reduced_precision_reduction = before


def chain(x, weight, bias):
    """y[t,o] as the contract has it, in float64 with a rounding to float32 after each step.

    A product of two float32 is exact in float64; adding it to a float32 there and rounding to
    float32 rounds twice, which differs from one rounding only on a tie of the float64 sum.
    """
    acc = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for k in range(x.shape[1]):
        acc = (acc + x[:, k, None].double() * weight[None, :, k].double()).float().double()
    return (acc.float() + bias.float()).float()


def fused():
    return EMULATED or os.environ.get("GRPO_ENGINE_ISA") != "generic"


@pytest.mark.skipif(not fused(), reason="the generic build has no fused multiply-add")
@pytest.mark.parametrize("T,I,O", [(1, 500, 40), (9, 193, 49), (40, 64, 200)])
def test_each_element_is_one_chain_of_fused_multiply_adds(T, I, O):
    x, weight, bias, _ = make(T, I, O, torch.float32)
    assert torch.equal(linear(x, weight, bias), chain(x, weight, bias))


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.skipif(not fused(), reason="the generic build has no fused multiply-add")
@pytest.mark.parametrize("T,I,O", [(1, 500, 40), (9, 193, 49), (40, 64, 200)])
def test_the_chain_of_bfloat16_descends(T, I, O):
    x, weight, bias, _ = make(T, I, O, torch.bfloat16)
    assert torch.equal(
        linear(x, weight, bias, out_dtype=torch.float32), chain(x.float().flip(1), weight.float().flip(1), bias)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 24, 25, 31, 33, 64, 200, 385])
def test_a_row_has_the_same_bits_in_a_batch_of_any_size(T, dtype):
    x, weight, bias, dy = make(400, 201, 145, dtype)
    whole = linear(x, weight, bias)
    assert torch.equal(linear(x[:T], weight, bias), whole[:T])
    assert torch.equal(linear(x[-T:], weight, bias), whole[-T:])
    backward = torch.ops.grpo_engine.linear_backward
    dx = backward(dy, x, weight, True, False, False)[0]
    assert torch.equal(backward(dy[:T], x[:T], weight, True, False, False)[0], dx[:T])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("narrow", [40, 37])
def test_a_product_of_many_tiles_has_the_bits_of_a_small_one(narrow, dtype):
    """CUDA has larger tiles for it."""
    backward = torch.ops.grpo_engine.linear_backward
    x, weight, bias, _ = make(1450, narrow, 1500, dtype)
    y = linear(x, weight, bias)
    for rows in (slice(0, 5), slice(-3, None)):
        assert torch.equal(linear(x[rows], weight, bias), y[rows])
    x, weight, _, dy = make(1450, 1500, narrow, dtype)
    dx = backward(dy, x, weight, True, False, False)[0]
    assert torch.equal(backward(dy[-5:], x[-5:], weight, True, False, False)[0], dx[-5:])
    x, weight, _, dy = make(narrow, 1500, 1450, dtype)
    dweight = backward(dy, x, weight, False, True, False)[1]
    few = backward(dy[:, :5].contiguous(), x, weight[:5].contiguous(), False, True, False)[1]
    assert torch.equal(few, dweight[:5])
    exact = dy.double().T @ x.double()
    torch.testing.assert_close(dweight.double(), exact, rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


# CUDA has tiles for up to 16 and up to 64 rows, of few and of many columns, whose warps share k, in one round or more;
# the last of these beside the largest tile
@pytest.mark.parametrize(
    "T,I,O,few",
    [
        (300, 900, 70, (1, 3, 16, 33, 64, 200)),
        (70, 2500, 37, (1, 17)),
        (65, 270, 3600, (9,)),
        (65, 1100, 3600, (20,)),
        (1450, 270, 1500, (5,)),
    ],
)
def test_a_few_rows_have_the_bits_of_many(T, I, O, few):
    x, weight, bias, _ = make(T, I, O, torch.bfloat16)
    whole = linear(x, weight, bias)
    for n in few:
        assert torch.equal(linear(x[-n:], weight, bias), whole[-n:])


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("T", [2, 50, 80])
def test_on_cuda_a_sum_of_bfloat16_is_one_of_chunks_in_order(T):
    x, weight, bias, _ = make(T, 700, 90, torch.bfloat16)
    total = torch.zeros(T, 90)
    for a, b in zip(x.split(256, dim=1), weight.split(256, dim=1), strict=True):
        total += linear(a, b.contiguous(), out_dtype=torch.float32)
    assert torch.equal(linear(x, weight, bias, out_dtype=torch.float32), total + bias.float())


def test_a_permutation_of_rows_permutes_the_result():
    x, weight, bias, _ = make(100, 97, 61, torch.float32)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(x[order], weight, bias), linear(x, weight, bias)[order])
    order = torch.randperm(61, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(x, weight[order], bias[order]), linear(x, weight, bias)[:, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,I,O", [(1, 1100, 1500), (30, 500, 500), (700, 230, 70), (900, 500, 500)])
def test_neither_threads_nor_a_repetition_change_a_bit(T, I, O, dtype, on_threads):
    x, weight, bias, dy = make(T, I, O, dtype)
    backward = torch.ops.grpo_engine.linear_backward
    for thunk in (
        lambda: linear(x, weight, bias),
        lambda: backward(dy, x, weight, True, False, False)[0],
        lambda: backward(dy, x, weight, False, True, False)[1],
    ):
        assert_identical(on_threads(thunk))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_a_repetition_change_a_bit_of_the_biass_gradient(dtype, on_threads):
    x, weight, _, dy = make(2600, 9, 1900, dtype)  # 15 blocks of columns
    assert_identical(on_threads(lambda: torch.ops.grpo_engine.linear_backward(dy, x, weight, False, False, True)[2]))


def test_every_instruction_set_with_fused_multiply_adds_gives_the_same_bits():
    isas = [isa for isa in _C.cpu_isas() if isa != "generic"]
    if len(isas) < 2:
        pytest.skip("this CPU has no AVX-512")
    code = (
        f"{SAME_EXTENSION}import torch, hashlib\n"
        "from grpo_engine.ops import linear\n"
        "g = torch.Generator().manual_seed(0)\n"
        "h = hashlib.sha256()\n"
        "for T, I, O in [(1, 500, 300), (7, 301, 97), (21, 100, 64), (45, 301, 97), (33, 64, 47)]:\n"
        "    x, w, b = (torch.randn(*s, generator=g) for s in ((T, I), (O, I), (O,)))\n"
        "    dy = torch.randn(T, O, generator=g)\n"
        "    x[:, ::3] *= 2.0**-66\n"  # products with w[::2] are subnormal
        "    w[::2] *= 2.0**-64\n"
        "    for d in (torch.float32, torch.bfloat16):\n"
        "        x, w, b, dy = (t.to(d) for t in (x, w, b, dy))\n"
        "        back = torch.ops.grpo_engine.linear_backward(dy, x, w, True, True, True)\n"
        "        for t in (linear(x, w, b), *back):\n"
        "            h.update(t.float().numpy().tobytes())\n"
        "print(h.hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "GRPO_ENGINE_ISA": isa},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for isa in isas
    }
    assert len(digests) == 1


def test_gradcheck():
    x, weight, bias, _ = make(3, 19, 18, torch.float64)
    for t in (x, weight, bias):
        t.requires_grad_()
    assert torch.autograd.gradcheck(linear, (x, weight, bias))


def test_gradients_that_nobody_needs_are_not_computed():
    x, weight, bias, dy = make(5, 6, 7, torch.float32)
    backward = torch.ops.grpo_engine.linear_backward
    assert [g.numel() for g in backward(dy, x, weight, True, False, False)] == [30, 0, 0]
    assert [g.numel() for g in backward(dy, x, weight, False, True, True)] == [0, 42, 7]
    x.requires_grad_()
    y = linear(x, weight, bias)  # a frozen weight
    y.backward(dy)
    assert torch.equal(x.grad, backward(dy, x, weight, True, False, False)[0])


def test_an_expanded_upstream_gradient():
    x, weight, _, _ = make(5, 6, 7, torch.float32)
    x.requires_grad_()
    linear(x, weight).sum().backward()  # dy has strides (0, 0)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 6))


def test_strided_rows_are_read_in_place_and_strided_columns_rejected():
    x, weight, bias, dy = make(20, 50, 30, torch.float32)
    part = x[::2, 7:40].requires_grad_()
    small = weight[:, :33].contiguous()
    assert torch.equal(linear(part, small, bias), linear(part.detach().contiguous(), small, bias))
    backward = torch.ops.grpo_engine.linear_backward
    for a, b in zip(
        backward(dy[::2].contiguous(), part, small, True, True, True),
        backward(dy[::2].contiguous(), part.contiguous(), small, True, True, True),
        strict=True,
    ):
        assert torch.equal(a, b)
    one_row = x[:1].expand(4, 50)
    assert torch.equal(linear(one_row, weight), linear(one_row.contiguous(), weight))
    with pytest.raises(ValueError, match="linear: x must have adjacent columns.*strides"):
        linear(x.T, torch.zeros(4, 20))


def test_zeros_signs_subnormals_infinities_and_nan():
    x, weight = torch.zeros(5, 20), torch.ones(3, 20)
    x[0, 4] = 1e-40  # a subnormal is not flushed
    x[1, 0], x[2, 1] = float("inf"), float("nan")
    x[3, 0], x[3, 1] = float("inf"), -float("inf")
    y = linear(x, weight)
    assert torch.equal(y[0], x[0, 4].expand(3)) and y[0, 0] > 0
    assert torch.equal(y[1], torch.full((3,), float("inf")))
    assert y[2:4].isnan().all() and torch.equal(y[4], torch.zeros(3))
    tiny = linear(torch.full((1, 1), 2.0**-75), torch.full((1, 1), 2.0**-70))
    assert tiny.item() == 2.0**-145


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("T", [3, 40])
def test_subnormals_of_bfloat16_count_as_zero_and_those_of_float32_still_do_not(T):
    x, weight = torch.zeros(T, 20, dtype=torch.bfloat16), torch.ones(17, 20, dtype=torch.bfloat16)
    x[0, 4] = 1e-40  # a subnormal
    x[1, 0], x[2, 1] = float("inf"), float("nan")
    y = linear(x, weight, out_dtype=torch.float32)
    assert torch.equal(y[0], torch.zeros(17))
    assert y[1].isposinf().all() and y[2].isnan().all()
    x[0, 4] = 2.0**-75
    assert linear(x, weight * 2.0**-70, out_dtype=torch.float32)[0].count_nonzero() == 0  # 2^-145
    wide = torch.full((T, 20), 2.0**-75)
    assert linear(wide, torch.full((17, 20), 2.0**-70)).count_nonzero() == T * 17


def test_bfloat16_rounds_once_to_nearest_even():
    # sums 1 + 2^-8 and 1 + 3 * 2^-8 are ties between neighbours; the bias breaks neither
    x = torch.tensor([[1.0, 2.0**-8], [1.0, 3 * 2.0**-8]], dtype=torch.bfloat16)
    y = linear(x, torch.ones(1, 2, dtype=torch.bfloat16))
    assert y.flatten().tolist() == [1.0, 1.015625]
    # the bias comes before the rounding: 1 + 2^-8 + 2^-9 rounds up, not 1 + 2^-9
    up = linear(x[:1], torch.ones(1, 2).bfloat16(), torch.tensor([2.0**-9]).bfloat16())
    assert up.item() == 1.0078125


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "x,weight,bias,dtypes,out,error,says",
    [
        ((4,), (5, 4), None, "fff", None, ValueError, r"x must be \[T, I\].*got \[4\]"),
        ((2, 4), (5, 3), None, "fff", None, ValueError, r"weight must be \[O, I\] = \[-1, 4\]"),
        ((2, 4), (5, 4), (4,), "fff", None, ValueError, r"bias must be \[O\] = \[5\], got \[4\]"),
        (
            (2, 4),
            (5, 4),
            None,
            "iff",
            None,
            TypeError,
            "x must be Float, BFloat16 or Double, got Int",
        ),
        ((2, 4), (5, 4), None, "bff", None, TypeError, "weight must be BFloat16, got Float"),
        ((2, 4), (5, 4), (5,), "ffb", None, TypeError, "bias must be Float, got BFloat16"),
        (
            (2, 4),
            (5, 4),
            None,
            "fff",
            torch.bfloat16,
            ValueError,
            "out_dtype must be the dtype of x",
        ),
        (
            (2, 4),
            (5, 4),
            None,
            "bbb",
            torch.float64,
            ValueError,
            "out_dtype must be the dtype of x",
        ),
    ],
)
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, x, weight, bias, dtypes, out, error, says):
    kinds = {"f": torch.float32, "b": torch.bfloat16, "i": torch.int32}
    tensors = [
        None if s is None else torch.zeros(s, dtype=kinds[d], device=device)
        for s, d in zip((x, weight, bias), dtypes, strict=True)
    ]
    with pytest.raises(error, match="linear: .*" + says):
        linear(*tensors, out_dtype=out)


@pytest.mark.parametrize("batch_invariant", [(), (False,)])
@pytest.mark.parametrize("dtype,out", [(torch.float32, None), (torch.bfloat16, torch.float32)])
def test_registration(dtype, out, batch_invariant):
    x, weight, bias, dy = make(3, 19, 18, dtype)
    for t in (x, weight, bias):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.grpo_engine.linear.default, (x, weight, bias, out, *batch_invariant))
    torch.library.opcheck(
        torch.ops.grpo_engine.linear_backward.default,
        (dy, x.detach(), weight.detach(), True, False, True, *batch_invariant),
    )

"""adamw: float64 reference, torch's own step, threads, clipping, divergence, contract."""

import math

import pytest
import reference
import torch
from bars import assert_as_good_as_torch

from grpo_engine.ops import adamw

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(3, 5), (1,), (0,), (4096,), (4097,), (67, 129)]
NUMBERS = dict(lr=3e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)


def make(dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    params, grads, m = ([torch.randn(s, generator=g).to(dtype) for s in SHAPES] for _ in range(3))
    v = [torch.rand(s, generator=g).to(dtype) for s in SHAPES]
    steps = [torch.tensor(float(i)) for i in range(len(SHAPES))]
    return params, [x * scale for x in grads], m, v, steps


def ours(state, **numbers):
    state = [[x.clone() for x in part] for part in state]
    norm = adamw(*state, **{**NUMBERS, **numbers})
    return norm, state


def torchs(state, *, clip_norm, lr, betas, eps, weight_decay):
    params, grads, m, v, steps = [[x.clone() for x in part] for part in state]
    leaves = [torch.nn.Parameter(p) for p in params]
    optimizer = torch.optim.AdamW(leaves, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    for leaf, *parts in zip(leaves, grads, m, v, steps, strict=True):
        leaf.grad = parts[0]
        optimizer.state[leaf] = dict(zip(("exp_avg", "exp_avg_sq", "step"), parts[1:], strict=True))
    norm = torch.nn.utils.clip_grad_norm_(leaves, clip_norm)
    optimizer.step()
    return float(norm), [[x.detach() for x in leaves], grads, m, v, steps]


@pytest.mark.parametrize("clip_norm", [0.5, 1e9, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_as_good_as_torchs(dtype, clip_norm):
    state = make(dtype)
    norm, (params, grads, m, v, steps) = ours(state, clip_norm=clip_norm)
    their_norm, theirs = torchs(state, clip_norm=clip_norm, **NUMBERS)
    exact_norm, exact = reference.adamw(*state, clip_norm=clip_norm, **NUMBERS)
    assert norm == pytest.approx(exact_norm, rel=1e-6)
    assert their_norm == pytest.approx(exact_norm, rel=1e-2)
    for mine, plain, want in zip((params, m, v), (theirs[0], theirs[2], theirs[3]), exact, strict=True):
        for a, b, c in zip(mine, plain, want, strict=True):
            assert a.dtype == dtype
            assert_as_good_as_torch(a, b, c)
    assert all(torch.equal(a, b) for a, b in zip(grads, state[1], strict=True))
    assert [int(s) for s in steps] == [1, 2, 3, 4, 5, 6]


def test_float64_equals_the_reference():
    state = [[x.double() for x in part] for part in make()[:4]] + [make()[4]]
    _, (params, _, m, v, _) = ours(state, clip_norm=0.5)
    for mine, want in zip((params, m, v), reference.adamw(*state, clip_norm=0.5, **NUMBERS)[1], strict=True):
        for a, b in zip(mine, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_threads_change_no_bit(one_and_two_threads):
    state = make()
    (norm1, one), (norm2, two) = one_and_two_threads(lambda: ours(state, clip_norm=1.0))
    assert norm1 == norm2
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    state = make()
    state[1][5][3, 7] = bad
    norm, after = ours(state)
    assert not math.isfinite(norm)
    for a, b in zip(after, state, strict=True):
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def test_huge_gradients_are_clipped_without_overflow_of_the_sum():
    norm, (params, *_) = ours(make(scale=1e15), clip_norm=1.0)
    assert norm == pytest.approx(reference.adamw(*make(scale=1e15), clip_norm=1.0, **NUMBERS)[0], rel=1e-6)
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize(
    "change,error,says",
    [
        (lambda s, n: s[1].pop(), ValueError, "must be of one length >= 1, got 6, 5, 6, 6, 6"),
        (lambda s, n: s[0].__setitem__(0, s[0][0].T), ValueError, "params must be contiguous"),
        (lambda s, n: s[1].__setitem__(0, s[1][0][:2]), ValueError, "grads must be the shape of its parameter"),
        (lambda s, n: s[2].__setitem__(0, s[2][0].double()), TypeError, "exp_avg must be Float, got Double"),
        (lambda s, n: s[4].__setitem__(0, torch.zeros(1)), ValueError, r"steps must be \[\]"),
        (lambda s, n: n.update(lr=-1.0), ValueError, "lr must be finite and >= 0, got -1"),
        (lambda s, n: n.update(betas=(0.9, 1.0)), ValueError, r"beta2 must be in \[0, 1\), got 1"),
        (lambda s, n: n.update(eps=0.0), ValueError, "eps must be finite and > 0"),
        (lambda s, n: n.update(weight_decay=math.nan), ValueError, "weight_decay must be finite"),
        (lambda s, n: n.update(clip_norm=0.0), ValueError, "clip_norm must be > 0, got 0"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input_is_named(change, error, says, device):
    state, numbers = [[x.to(device) for x in part] for part in make()], dict(NUMBERS)
    change(state, numbers)
    with pytest.raises(error, match=says):
        torch.ops.grpo_engine.adamw(
            *state, numbers["lr"], *numbers["betas"], numbers["eps"], numbers["weight_decay"],
            numbers.get("clip_norm", 1.0),
        )  # fmt: skip


def test_opcheck():
    n = NUMBERS
    torch.library.opcheck(
        torch.ops.grpo_engine.adamw, (*make(), n["lr"], *n["betas"], n["eps"], n["weight_decay"], 1.0)
    )


def test_a_tensor_off_the_grid_of_16_bytes_has_the_same_bits():
    state = make()
    shifted = [[torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in part] for part in state[:4]] + [state[4]]
    norm, want = ours(state, clip_norm=1.0)
    steps = [s.clone() for s in state[4]]
    assert adamw(*shifted[:4], steps, **NUMBERS, clip_norm=1.0) == norm
    for mine, theirs in zip(shifted[:4], want, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

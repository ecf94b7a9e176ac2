"""adamw: float64 reference, torch's own step, masters of bfloat16, threads, clipping, divergence, contract."""

import math

import pytest
import reference
import torch
from bars import assert_as_good_as_torch
from conftest import assert_identical

from grpo_engine.ops import adamw

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(3, 5), (1,), (0,), (4096,), (4097,), (67, 129)]
NUMBERS = dict(lr=3e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)


def make(dtype=torch.float32, seed=0, scale=1.0, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    params, grads, m = ([torch.randn(s, generator=g).to(dtype) for s in shapes] for _ in range(3))
    v = [torch.rand(s, generator=g).to(dtype) for s in shapes]
    steps = [torch.tensor(float(i)) for i in range(len(shapes))]
    return params, [x * scale for x in grads], m, v, steps


def ours(state, *, low=(), **numbers):
    state = [[x.clone() for x in part] for part in state]
    low = [x.clone() for x in low]
    norm = adamw(*state, **{**NUMBERS, **numbers}, master_low=low)
    return norm, state + ([low] if low else [])


def split(master):
    """A float32 tensor as (bfloat16, int16): bits = (high << 16) + low, high rounded to nearest, ties away from zero."""
    bits = master.view(torch.int32).long()
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weight, low):
    return ((weight.view(torch.int16).long() << 16) + low).to(torch.int32).view(torch.float32)


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


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_a_bfloat16_weight_with_a_master_steps_as_the_float32_master_does(grad_dtype):
    masters, grads, m, v, steps = make()
    grads = [g.to(grad_dtype) for g in grads]
    weights, low = (list(part) for part in zip(*map(split, masters), strict=True))
    assert all(torch.equal(join(w, x), p) for w, x, p in zip(weights, low, masters, strict=True))
    norm, (weights, _, m1, v1, counts, low) = ours([weights, grads, m, v, steps], low=low, clip_norm=0.5)
    want_norm, (want, _, m2, v2, _) = ours([masters, [g.float() for g in grads], m, v, steps], clip_norm=0.5)
    # on CUDA the squares of bfloat16 are added eight to a thread, those of float32 four: other sums, other last bits
    assert norm == pytest.approx(want_norm, rel=1e-6) and [int(s) for s in counts] == [1, 2, 3, 4, 5, 6]
    exact = dict(rtol=0, atol=0) if norm == want_norm else dict(rtol=2e-6, atol=1e-7)
    for w, x, p in zip(weights, low, want, strict=True):
        torch.testing.assert_close(join(w, x), p, **exact)
        assert torch.equal(w, split(join(w, x))[0])
    for mine, theirs in zip(m1 + v1, m2 + v2, strict=True):
        torch.testing.assert_close(mine, theirs, **exact)


def test_a_small_learning_rate_moves_bfloat16_weights_as_their_masters_say():
    start = torch.tensor([1 / 32, -1 / 16, 0.02, 3e-5, 0.0])
    grad = torch.tensor([0.3, -0.2, 0.1, 0.4, -0.5])
    numbers = dict(lr=1e-6, weight_decay=0.0, clip_norm=math.inf)

    def begin(dtype, moments):
        return [[start.to(dtype)], [grad.to(dtype)], *([torch.zeros(5, dtype=moments)] for _ in range(2)), [torch.zeros(())]]

    plain, exact, mixed = (
        begin(torch.bfloat16, torch.bfloat16),
        begin(torch.float32, torch.float32),
        begin(torch.bfloat16, torch.float32),
    )
    exact[1] = [mixed[1][0].float()]
    low = [torch.zeros(5, dtype=torch.int16)]
    before = mixed[0][0].clone()
    exact[0] = [before.float()]
    for _ in range(100):  # 1e-4 in all: half of the distance between 1/32 and the bfloat16 below it is 6e-5
        adamw(*plain, **{**NUMBERS, **numbers})
        adamw(*exact, **{**NUMBERS, **numbers})
        adamw(*mixed, **{**NUMBERS, **numbers}, master_low=low)
    assert torch.equal(plain[0][0][:3], before[:3])  # each step was rounded away
    assert torch.equal(join(mixed[0][0], low[0]), exact[0][0])
    assert torch.equal(mixed[0][0], split(join(mixed[0][0], low[0]))[0])
    assert mixed[0][0][0] < before[0] and mixed[0][0][3] < 0


def test_every_lower_half_survives_a_step_of_nothing():
    low = torch.arange(-(2**15), 2**15).to(torch.int16)
    weight = torch.tensor([1.5, -3e-39, 2e38, 0.0]).bfloat16().repeat(2**14)
    zeros = torch.zeros(2**16)
    _, (after, *_, low_after) = ours(
        [[weight], [zeros], [zeros], [zeros], [torch.zeros(())]], low=[low], lr=0.0, weight_decay=0.0
    )
    finite = torch.isfinite(join(weight, low))
    assert torch.equal(low_after[0][finite], low[finite]) and torch.equal(after[0][finite], weight[finite])


def test_float64_equals_the_reference():
    state = [[x.double() for x in part] for part in make()[:4]] + [make()[4]]
    _, (params, _, m, v, _) = ours(state, clip_norm=0.5)
    for mine, want in zip((params, m, v), reference.adamw(*state, clip_norm=0.5, **NUMBERS)[1], strict=True):
        for a, b in zip(mine, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_neither_threads_nor_a_repetition_change_a_bit(on_threads):
    state = make(shapes=[*SHAPES, (39 * 4096,)])  # 47 blocks of 4,096
    assert_identical(on_threads(lambda: ours(state, clip_norm=1.0)))


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
            *state, [], numbers["lr"], *numbers["betas"], numbers["eps"], numbers["weight_decay"],
            numbers.get("clip_norm", 1.0),
        )  # fmt: skip


@pytest.mark.parametrize(
    "change,error,says",
    [
        (lambda s: s[5].pop(), ValueError, "master_low must be empty or of the length of params, 6, got 5"),
        (lambda s: s[5].__setitem__(1, s[5][1].int()), TypeError, "master_low must be Short, got Int"),
        (lambda s: s[5].__setitem__(0, s[5][0][:2]), ValueError, "master_low must be the shape of its parameter"),
        (lambda s: s[0].__setitem__(0, s[0][0].float()), TypeError, "params with master_low must be BFloat16, got Float"),
        (lambda s: s[2].__setitem__(0, s[2][0].bfloat16()), TypeError, "exp_avg must be Float, got BFloat16"),
        (lambda s: s[1].__setitem__(0, s[1][0].double()), TypeError, "grads must be BFloat16, got Double"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_bad_master_is_named(change, error, says, device):
    state = [[x.to(device) for x in part] for part in make()]
    weights, low = zip(*map(split, make()[0]), strict=True)
    state[0] = [w.to(device) for w in weights]
    state.append([x.to(device) for x in low])
    change(state)
    n = NUMBERS
    with pytest.raises(error, match=says):
        torch.ops.grpo_engine.adamw(*state, n["lr"], *n["betas"], n["eps"], n["weight_decay"], 1.0)


@pytest.mark.parametrize("masters", [False, True])
def test_opcheck(masters):
    n, state, low = NUMBERS, list(make()), []
    if masters:
        state[0], low = (list(part) for part in zip(*map(split, state[0]), strict=True))
    torch.library.opcheck(torch.ops.grpo_engine.adamw, (*state, low, n["lr"], *n["betas"], n["eps"], n["weight_decay"], 1.0))


@pytest.mark.parametrize("masters", [False, True])
def test_a_tensor_off_the_grid_of_16_bytes_has_the_same_bits(masters):
    def shifted(part):
        return [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in part]

    state, low = list(make()), []
    if masters:
        state[0], low = (list(part) for part in zip(*map(split, state[0]), strict=True))
    norm, want = ours(state, clip_norm=1.0, low=low)
    *parts, off_low = *map(shifted, state[:4]), shifted(low)
    steps = [s.clone() for s in state[4]]
    assert adamw(*parts, steps, **NUMBERS, clip_norm=1.0, master_low=off_low) == norm
    for mine, theirs in zip([*parts, *([off_low] if low else [])], want[:4] + want[5:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

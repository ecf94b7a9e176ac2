"""policy_loss: float64 reference, TRL's formulas, gradients, masks, edges, batches, contract."""

import itertools

import pytest
import reference
import torch
from conftest import assert_identical

from grpo_engine.ops import PolicyStats, policy_loss

pytestmark = pytest.mark.usefixtures("device")

INF, NAN = float("inf"), float("nan")
# one token, less than a vector, an empty sequence, a vector, a ragged tail, several vectors
LENGTHS = [1, 5, 0, 16, 33, 70]
AGGREGATIONS = {
    "token_mean": {"aggregation": "token_mean"},
    "sequence_mean": {"aggregation": "sequence_mean"},
    "constant": {"aggregation": "constant", "constant_length": 64},
}
METHODS = {
    "GRPO": {"aggregation": "sequence_mean", "dual_clip": None},
    "Dr. GRPO": {"aggregation": "constant", "constant_length": 64, "dual_clip": None},
    "DAPO": {"aggregation": "token_mean", "clip_high": 0.28, "dual_clip": None},
    "GSPO": {"ratio": "sequence", "aggregation": "sequence_mean", "clip_low": 0.03},
    "CISPO": {"objective": "cispo", "aggregation": "token_mean", "clip_low": 1.0},
}
OPTIONS = [
    {"ratio": r, "objective": o, "kl": k, **a}
    for r, o, k, a in itertools.product(("token", "sequence"), ("clip", "cispo"), ("k1", "k2", "k3"), AGGREGATIONS.values())
]
OPTIONS += [o | {"kl_ratio": True} for o in OPTIONS if o["aggregation"] == "sequence_mean"]


def name_of(options):
    return "-".join(str(v) for v in options.values())


def cumulative(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def make(lengths=LENGTHS, dtype=torch.float32, spread=0.4, masked=0.2, seed=0):
    """Log-probs of new, old and reference policy, one advantage a sequence, a mask."""
    g = torch.Generator().manual_seed(seed)
    R, N = sum(lengths), len(lengths)
    old = -torch.rand(R, generator=g, dtype=torch.float64) * 3
    noise = torch.randn(2, R, generator=g, dtype=torch.float64) * spread
    advantage = torch.randn(N, generator=g, dtype=torch.float64)
    advantage = advantage.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    return {
        "logprob": (old + noise[0]).to(dtype),
        "advantage": advantage.to(dtype),
        "cu_seqlens": cumulative(lengths),
        "old_logprob": old.to(dtype),
        "ref_logprob": (old + noise[1]).to(dtype),
        "mask": torch.rand(R, generator=g) >= masked,
    }


def run(function, data, upstream=1.0, **options):
    """(loss, gradient, stats)."""
    leaf = data["logprob"].detach().clone().requires_grad_()
    loss, stats = function(leaf, **{k: v for k, v in data.items() if k != "logprob"}, **options)
    (loss * upstream).backward()
    return loss.detach(), leaf.grad, stats


def assert_close_to_reference(data, **options):
    loss, grad, stats = run(policy_loss, data, **options)
    want_loss, want_grad, want_stats = run(reference.policy_loss, data, **options)
    dtype = data["logprob"].dtype
    assert loss.dtype == grad.dtype == dtype and stats.dtype == torch.float64
    # float32: a log-ratio of size up to d has error d 2^-24, which is the relative error of its
    # exponential; then five roundings.  Sums are float64.  float64: the same with 2^-53.
    eps = 2.0**-24 if dtype == torch.float32 else 2.0**-53
    relative = (float(want_stats[9]) + 8) * 4 * eps
    largest = max(1.0, float(want_stats[5])) * max(1.0, float(data["advantage"].abs().max()))
    largest *= max(1.0, float(data["logprob"].abs().max()))
    assert abs(float(loss) - float(want_loss)) <= relative * largest
    assert float((grad.double() - want_grad.double()).abs().max()) <= relative * max(float(want_grad.abs().max()), 1e-3)
    counts = [0, 6, 7, 8]
    assert torch.equal(stats[counts], want_stats[counts])
    rest = [i for i in range(10) if i not in counts]
    scale = max(1.0, float(want_stats[0]))
    torch.testing.assert_close(stats[rest], want_stats[rest], rtol=relative, atol=relative * largest * scale)


# ---------------------------------------------------------------- against the reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_loss_gradient_and_stats_match_the_reference(options, dtype):
    assert_close_to_reference(make(dtype=dtype), kl_coef=0.1, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_methods_match_the_reference_with_every_optional_input_left_out(method, dtype):
    for absent in itertools.product((True, False), repeat=3):
        data = make(dtype=dtype, seed=1)
        for name, gone in zip(("old_logprob", "ref_logprob", "mask"), absent, strict=True):
            if gone:
                del data[name]
        kl_coef = 0.04 if "ref_logprob" in data else 0.0
        assert_close_to_reference(data, kl_coef=kl_coef, **METHODS[method])


def test_every_clip_binds_somewhere_in_the_data_of_these_tests():
    stats = PolicyStats(*run(policy_loss, make(spread=1.0))[2].tolist())
    assert min(stats.clip_low, stats.clip_high, stats.dual_clip) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [{"num_tokens": 1000}, {"num_sequences": 40}])
def test_given_denominators_replace_those_of_the_call(given, dtype):
    for aggregation in AGGREGATIONS.values():
        assert_close_to_reference(make(dtype=dtype), **given, **aggregation)


# ---------------------------------------------------------------- TRL's formulas


def trl_loss(
    new, old, ref, advantages, mask, *, loss_type, level, epsilon, epsilon_high, delta, beta, use_bias_correction_kl,
    max_completion_length, num_items_in_batch,
):  # fmt: skip
    """The loss of TRL's GRPOTrainer on padded [N, L] tensors, from its documentation."""
    mask = mask.to(new.dtype)
    log_ratio = new - old
    if level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
        log_ratio = log_ratio.unsqueeze(-1)
    coef_1, A = log_ratio.exp(), advantages.unsqueeze(1)
    kl_weight = coef_1 if use_bias_correction_kl else 1.0
    if loss_type == "cispo":
        per_token = -coef_1.clamp(max=epsilon_high).detach() * A * new
    else:
        coef_2 = coef_1.clamp(1 - epsilon, 1 + epsilon_high)
        if delta is not None:
            coef_1 = coef_1.clamp(max=delta)
        per_token = -torch.min(coef_1 * A, coef_2 * A)
    if beta:
        per_token = per_token + beta * ((ref - new).exp() - (ref - new) - 1) * kl_weight
    if loss_type == "grpo":
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    total = (per_token * mask).sum()
    if loss_type == "bnpo":
        return total / mask.sum().clamp(min=1.0)
    if loss_type == "dr_grpo":
        return total / (len(new) * max_completion_length)
    return total / num_items_in_batch


@pytest.mark.parametrize("beta, corrected", [(0.0, False), (0.04, False), (0.04, True)])
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_trl_loss_types(loss_type, level, delta, beta, corrected):
    lengths, L = [7, 20, 1, 13], 20
    data = make(lengths, torch.float64, masked=0.0, spread=0.6)
    valid = torch.arange(L) < torch.tensor(lengths)[:, None]

    def pad(packed):
        return torch.zeros(valid.shape, dtype=packed.dtype).masked_scatter(valid, packed)

    leaf = data["logprob"].clone().requires_grad_()
    starts = data["cu_seqlens"][:-1].long()
    cispo = loss_type == "cispo"
    want = trl_loss(
        pad(leaf), pad(data["old_logprob"]), pad(data["ref_logprob"]),
        data["advantage"][starts], valid, loss_type=loss_type, level=level, epsilon=0.2,
        epsilon_high=1.3 if cispo else 0.28, delta=delta, beta=beta, use_bias_correction_kl=corrected,
        max_completion_length=50, num_items_in_batch=300,
    )  # fmt: skip
    want.backward()
    aggregation = {
        "grpo": {"aggregation": "sequence_mean"},
        "bnpo": {"aggregation": "token_mean"},
        "dr_grpo": {"aggregation": "constant", "constant_length": 50},
    }.get(loss_type, {"aggregation": "token_mean", "num_tokens": 300})
    # TRL's CISPO has an upper bound only, and gives it whole
    clip = {"clip_low": 1.0, "clip_high": 0.3} if cispo else {"clip_low": 0.2, "clip_high": 0.28}
    loss, grad, _ = run(
        policy_loss, data, ratio=level, objective="cispo" if cispo else "clip", dual_clip=delta,
        kl_coef=beta, kl_ratio=corrected, **clip, **aggregation,
    )  # fmt: skip
    torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-11, atol=1e-14)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_gradcheck(options):
    # log-ratios of about +-1: no kink near, and the weight of CISPO (a constant) is a bound
    lengths = [3, 1, 4]
    data = make(lengths, torch.float64, masked=0.0, spread=0.02)
    sign = torch.tensor([1.0, 1, 1, -1, 1, 1, 1, 1]).double()
    logprob = (data.pop("logprob") + sign).requires_grad_()
    data["mask"] = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1]).bool()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, **data, kl_coef=0.3, dual_clip=3.3, **options).loss, (logprob,))


@pytest.mark.parametrize("upstream", [0.0, 1.0, -2.5, 1e4])
def test_an_upstream_gradient_scales_the_gradient(upstream):
    data = make()
    unit = run(policy_loss, data)[1]
    assert unit.abs().max() > 1e-3
    assert torch.equal(run(policy_loss, data, upstream=upstream)[1], unit * upstream)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_without_old_logprobs_the_ratio_is_one_and_the_gradient_is_the_advantage(ratio):
    data = make([4, 0, 21], masked=0.0)
    del data["old_logprob"]
    loss, grad, stats = run(policy_loss, data, ratio=ratio, num_tokens=32)
    stats = PolicyStats(*stats.tolist())
    assert stats.ratio == 25 and stats.ratio_max == 1 and stats.mismatch_max == 0
    assert stats.clip_low == stats.clip_high == stats.dual_clip == 0
    torch.testing.assert_close(grad, -data["advantage"] / 32, rtol=2e-7 * 8, atol=1e-9)
    torch.testing.assert_close(loss, -data["advantage"].sum() / 32, rtol=1e-6, atol=1e-7)
    # the same bits as old log-probs that are equal to the new ones
    same = run(policy_loss, data | {"old_logprob": data["logprob"]}, ratio=ratio, num_tokens=32)
    for a, b in zip((loss, grad), same, strict=False):
        assert torch.equal(a, b)


def test_no_gradient_reaches_the_other_inputs():
    data = make([4, 9])
    for name in ("advantage", "old_logprob", "ref_logprob"):
        data[name].requires_grad_()
    run(policy_loss, data, kl_coef=0.1)
    assert all(data[n].grad is None for n in ("advantage", "old_logprob", "ref_logprob"))


# ---------------------------------------------------------------- ties, clips and large numbers


def tokens(logprob, advantage, old=None, ref=None, dtype=torch.float64):
    data = {
        "logprob": torch.tensor(logprob, dtype=dtype),
        "advantage": torch.tensor(advantage, dtype=dtype),
        "cu_seqlens": cumulative([1] * len(logprob)),
    }
    if old is not None:
        data["old_logprob"] = torch.tensor(old, dtype=dtype)
    if ref is not None:
        data["ref_logprob"] = torch.tensor(ref, dtype=dtype)
    return data


def test_gradient_flows_at_a_tie_and_stops_past_the_clip():
    # ratio exactly 1 and both clips at 1: the branches are equal
    data = tokens([-1.0, -1.0], [2.0, -2.0], old=[-1.0, -1.0])
    _, grad, stats = run(policy_loss, data, clip_low=0.0, clip_high=0.0, num_tokens=1)
    assert grad.tolist() == [-2.0, 2.0]
    assert stats[6:9].tolist() == [0, 0, 0]
    # a hair above and below: A > 0 is held above, A < 0 below
    d = [1e-9, 1e-9, -1e-9, -1e-9]
    data = tokens(d, [2.0, -2.0, 2.0, -2.0], old=[0.0] * 4)
    _, grad, stats = run(policy_loss, data, clip_low=0.0, clip_high=0.0, num_tokens=1)
    torch.testing.assert_close(grad, torch.tensor([0.0, 2.0, -2.0, 0.0], dtype=torch.float64))
    assert stats[6:9].tolist() == [1, 1, 0]


def test_clip_low_and_high_are_distances_from_one():
    # ratios 0.5, 0.75, 1.4, 1.6 with both signs of A, clip [0.6, 1.5]
    ratios = torch.tensor([0.5, 0.75, 1.4, 1.6] * 2).double()
    data = tokens(ratios.log().tolist(), [1.0] * 4 + [-1.0] * 4, old=[0.0] * 8)
    loss, grad, stats = run(policy_loss, data, clip_low=0.4, clip_high=0.5, dual_clip=None, num_tokens=1)
    want = torch.tensor([-0.5, -0.75, -1.4, 0.0, 0.0, 0.75, 1.4, 1.6]).double()
    torch.testing.assert_close(grad, want)
    values = torch.tensor([-0.5, -0.75, -1.4, -1.5, 0.6, 0.75, 1.4, 1.6]).double()
    torch.testing.assert_close(loss, values.sum())
    assert stats[6:9].tolist() == [1, 1, 0]


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    ratios = torch.tensor([2.9, 3.1, 100.0, 3.1]).double()
    data = tokens(ratios.log().tolist(), [-1.0, -1.0, -2.0, 1.0], old=[0.0] * 4)
    loss, grad, stats = run(policy_loss, data, num_tokens=1)
    torch.testing.assert_close(loss, torch.tensor(2.9 + 3.0 + 6.0 - 1.2).double())
    torch.testing.assert_close(grad, torch.tensor([2.9, 0.0, 0.0, 0.0]).double())
    assert stats[8] == 2
    free = run(policy_loss, data, num_tokens=1, dual_clip=None)
    torch.testing.assert_close(free[0], torch.tensor(2.9 + 3.1 + 200.0 - 1.2).double())
    assert free[2][8] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_an_advantage_of_zero_gives_no_loss_and_no_gradient(objective, ratio, dtype):
    data = make(dtype=dtype, spread=5.0)
    data["advantage"] = torch.zeros_like(data["advantage"])
    loss, grad, stats = run(policy_loss, data, ratio=ratio, objective=objective)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))
    assert stats[6:9].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [21.5, 89.0, 1000.0, 1e30, INF])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("objective", ["clip", "cispo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_log_ratios_beyond_twenty_stay_finite_and_have_no_slope(ratio, objective, kl, far, dtype):
    # both directions, both signs of A; each token is a sequence
    data = tokens([-1.0] * 4, [1.0, -1.0, 1.0, -1.0], old=[far, far, -far, -far],
                  ref=[far, -far, -far, far], dtype=dtype)  # fmt: skip
    options = {"ratio": ratio, "objective": objective, "kl": kl, "kl_coef": 0.1, "dual_clip": None}
    loss, grad, stats = run(policy_loss, data, **options)
    want = run(reference.policy_loss, data, **options)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(grad, want[1], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(stats, want[2], rtol=1e-5, atol=1e-12)
    if objective == "clip":
        assert torch.equal(grad, torch.zeros_like(grad))


def test_one_far_token_does_not_hide_the_others_of_its_sequence():
    data = make([6], torch.float64, masked=0.0, spread=0.01)
    data["old_logprob"][2] -= 1000.0
    data["advantage"][:] = -1.0
    options = {"ratio": "sequence", "dual_clip": None}
    _, grad, stats = run(policy_loss, data, **options)
    want = run(reference.policy_loss, data, **options)
    torch.testing.assert_close(grad, want[1], rtol=1e-12, atol=0)
    assert grad[2] == 0 and (grad[[0, 1, 3, 4, 5]] > 0).all()
    assert stats[9] > 999  # the mismatch is told as it is


# ---------------------------------------------------------------- masks, nothing kept, bad numbers


@pytest.mark.parametrize("options", OPTIONS[::2], ids=name_of)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e38])
def test_masked_garbage_never_leaks(garbage, options):
    data = make(masked=0.4)
    mask = data["mask"]
    for name in ("logprob", "advantage", "old_logprob", "ref_logprob"):
        data[name][~mask] = garbage
    got = run(policy_loss, data, kl_coef=0.1, **options)
    # the batch without those tokens
    cu = data["cu_seqlens"].long()
    kept = [int(mask[a:b].sum()) for a, b in itertools.pairwise(cu.tolist())]
    small = {k: v[mask] for k, v in data.items() if k not in ("cu_seqlens", "mask")}
    want = run(policy_loss, small | {"cu_seqlens": cumulative(kept)}, kl_coef=0.1, **options)
    assert torch.equal(got[0], want[0]) and torch.isfinite(got[0])
    assert torch.equal(got[1][mask], want[1])
    assert torch.equal(got[1][~mask], torch.zeros(int((~mask).sum())))
    assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("options", OPTIONS[::2], ids=name_of)
def test_nothing_kept_gives_zero_and_no_nan(options):
    empty = make([])
    all_empty = make([0, 0])
    masked = make([3, 0, 20])
    masked["mask"][:] = False
    for data in (empty, all_empty, masked):
        loss, grad, stats = run(policy_loss, data, kl_coef=0.1, **options)
        assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))
        assert torch.equal(stats, torch.zeros(10, dtype=torch.float64))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_empty_or_masked_sequence_adds_nothing_but_counts_as_a_sequence(aggregation):
    data = make([5, 9], masked=0.0)
    more = data | {"cu_seqlens": torch.tensor([0, 0, 5, 5, 14], dtype=torch.int32)}
    options = AGGREGATIONS[aggregation]
    loss, grad, _ = run(policy_loss, data, **options)
    loss_more, grad_more, _ = run(policy_loss, more, **options)
    factor = 1.0 if aggregation == "token_mean" else 0.5
    assert torch.equal(loss_more, loss * factor) and torch.equal(grad_more, grad * factor)


@pytest.mark.parametrize("name", ["logprob", "old_logprob", "advantage", "ref_logprob"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_nan_in_a_kept_token_reaches_the_loss_but_no_other_sequence(ratio, name):
    data = make([20, 20, 20], masked=0.0)
    good = run(policy_loss, data, kl_coef=0.1, ratio=ratio)
    data[name][25] = NAN
    loss, grad, _ = run(policy_loss, data, kl_coef=0.1, ratio=ratio)
    assert loss.isnan() and grad[20:40].isnan().any()
    assert torch.equal(grad[:20], good[1][:20]) and torch.equal(grad[40:], good[1][40:])


def test_a_reference_with_coefficient_zero_is_measured_and_touches_nothing():
    data = make()
    with_ref = run(policy_loss, data)
    measured = PolicyStats(*with_ref[2].tolist())
    assert measured.kl > 0 and measured.kl_loss == 0
    bad = data | {"ref_logprob": torch.full_like(data["ref_logprob"], NAN)}
    with_nan = run(policy_loss, bad)
    del data["ref_logprob"]
    without = run(policy_loss, data)
    for other in (with_ref, with_nan):
        assert torch.equal(other[0], without[0]) and torch.equal(other[1], without[1])


# ---------------------------------------------------------------- invariance


@pytest.mark.parametrize("options", OPTIONS[::3], ids=name_of)
def test_one_batch_of_eight_equals_eight_micro_batches_of_one(options):
    lengths = [3, 17, 0, 40, 1, 16, 8, 25]
    data = make(lengths)
    total = {"num_tokens": int(data["mask"].sum()), "num_sequences": 8, "kl_coef": 0.1}
    loss, grad, stats = run(policy_loss, data, **total, **options)
    parts = []
    for a, b in itertools.pairwise(data["cu_seqlens"].tolist()):
        part = {k: v[a:b] for k, v in data.items() if k != "cu_seqlens"}
        part["cu_seqlens"] = cumulative([b - a])
        parts.append(run(policy_loss, part, **total, **options))
    # the weight of a token comes from the totals alone, so its gradient has the same bits
    assert torch.equal(torch.cat([p[1] for p in parts]), grad)
    # nine roundings of a loss to float32
    losses = torch.stack([p[0].double() for p in parts])
    assert abs(losses.sum() - loss.double()) <= 2.0**-24 * (losses.abs().sum() + loss.abs())
    merged = PolicyStats(*parts[0][2].tolist())
    for p in parts[1:]:
        merged = merged.merge(PolicyStats(*p[2].tolist()))
    torch.testing.assert_close(torch.tensor(merged, dtype=torch.float64), stats, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS[::3], ids=name_of)
def test_neither_threads_nor_a_repetition_change_a_bit(on_threads, options):
    data = make([37] * 454 + [0, 1, 400])
    assert_identical(on_threads(lambda: run(policy_loss, data, kl_coef=0.1, **options)))


def test_merge_adds_sums_and_keeps_maxima():
    a = PolicyStats(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
    b = PolicyStats(10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
    assert a.merge(b) == PolicyStats(11.0, 11.0, 11.0, 11.0, 11.0, 6.0, 11.0, 11.0, 11.0, 10.0)


# ---------------------------------------------------------------- contract


def call(d, *, logprob=None, **options):
    R = 6
    data = {
        "advantage": torch.zeros(R, device=d),
        "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32, device=d),
    }
    made = {k: v(d) if callable(v) else v for k, v in options.items()}
    return policy_loss(torch.zeros(R, device=d) if logprob is None else logprob(d), **data | made)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "change,error,says",
    [
        ({"logprob": lambda d: torch.zeros(2, 3, device=d)}, ValueError,
         r"logprob must be \[R\].*got \[2, 3\]"),
        ({"logprob": lambda d: torch.zeros(6, device=d).bfloat16()}, TypeError,
         "logprob must be Float or Double, got BFloat16"),
        ({"logprob": lambda d: torch.zeros(12, device=d)[::2]}, ValueError,
         r"logprob must be contiguous.*strides \[2\]"),
        ({"advantage": lambda d: torch.zeros(5, device=d)}, ValueError,
         r"advantage must be \[R\] = \[6\], got \[5\]"),
        ({"advantage": lambda d: torch.zeros(6, device=d).double()}, TypeError,
         "advantage must be Float, got Double"),
        ({"cu_seqlens": lambda d: torch.zeros(3, device=d).long()}, TypeError,
         "cu_seqlens must be Int, got Long"),
        ({"cu_seqlens": lambda d: torch.zeros(0, device=d).int()}, ValueError,
         r"cu_seqlens must be \[N\+1\].*got \[0\]"),
        ({"old_logprob": lambda d: torch.zeros(6, 1, device=d)}, ValueError,
         r"old_logprob must be \[R\] = \[6\], got \[6, 1\]"),
        ({"ref_logprob": lambda d: torch.zeros(6, device=d).double()}, TypeError,
         "ref_logprob must be Float, got Double"),
        ({"mask": lambda d: torch.ones(6, device=d), "num_tokens": 6}, TypeError,
         "mask must be Bool, got Float"),
        ({"mask": lambda d: torch.ones(6, device=d).int(), "num_tokens": 6}, TypeError,
         "mask must be Bool, got Int"),
        ({"mask": lambda d: torch.ones(5, device=d).bool(), "num_tokens": 6}, ValueError,
         r"mask must be \[R\] = \[6\], got \[5\]"),
        ({"ratio": "group"}, ValueError, "ratio must be one of token, sequence, got group"),
        ({"objective": "ppo"}, ValueError, "objective must be one of clip, cispo, got ppo"),
        ({"kl": "k4"}, ValueError, "kl must be one of k1, k2, k3, got k4"),
        ({"aggregation": "mean"}, ValueError,
         "aggregation must be one of token_mean, sequence_mean, constant, got mean"),
        ({"clip_low": -0.1}, ValueError, r"clip_low must be in \[0, 1\], got -0.1"),
        ({"clip_low": 1.1}, ValueError, r"clip_low must be in \[0, 1\], got 1.1"),
        ({"clip_low": NAN}, ValueError, r"clip_low must be in \[0, 1\], got nan"),
        ({"clip_high": -0.1}, ValueError, "clip_high must be finite and >= 0, got -0.1"),
        ({"clip_high": INF}, ValueError, "clip_high must be finite and >= 0, got inf"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip must be > 1 or None, got 1"),
        ({"dual_clip": NAN}, ValueError, "dual_clip must be > 1 or None, got nan"),
        ({"kl_coef": -1.0}, ValueError, "kl_coef must be finite and >= 0, got -1"),
        ({"kl_coef": 0.1}, ValueError, "kl_coef = 0.1 needs ref_logprob, got None"),
        ({"num_tokens": 0}, ValueError, "denominator .num_tokens.* must be .* > 0, got 0"),
        ({"num_sequences": -2, "aggregation": "sequence_mean"}, ValueError, "got -2"),
        ({"aggregation": "constant"}, ValueError, "constant_length=None"),
        ({"constant_length": 5}, ValueError, "aggregation='token_mean', constant_length=5"),
        ({"aggregation": "constant", "constant_length": 0}, ValueError, "> 0, got 0"),
    ],
)  # fmt: skip
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, change, error, says):
    with pytest.raises(error, match="policy_loss: .*" + says):
        call(device, **change)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize(
    "cu,says",
    [
        ([1, 6], "must run from 0 to R = 6, got 1 to 6"),
        ([0, 5], "must run from 0 to R = 6, got 0 to 5"),
        ([0, 7], "must run from 0 to R = 6, got 0 to 7"),
        ([0, 4, 2, 6], "must not fall, got 4 then 2 at sequence 1"),
        ([0, 9, 6], "must not fall, got 9 then 6 at sequence 1"),
    ],
)
def test_sequence_starts_that_cannot_be_are_told(cu, says):
    with pytest.raises(ValueError, match="policy_loss: cu_seqlens " + says):
        call("cpu", cu_seqlens=torch.tensor(cu, dtype=torch.int32))


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("cu", [[1, 6], [0, 5], [0, 7], [0, 4, 2, 6], [0, 9, 6], [0, -1, 6]])
def test_sequence_starts_that_cannot_be_make_everything_nan_on_cuda(cu):
    data = make([6], masked=0.0)
    loss, grad, stats = run(policy_loss, data | {"cu_seqlens": torch.tensor(cu, dtype=torch.int32)}, num_tokens=6)
    assert loss.isnan() and grad.isnan().all() and stats.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("full", [True, False])
def test_registration(full, dtype):
    data = make([3, 0, 18], dtype)
    optional = [data[n] if full else None for n in ("old_logprob", "ref_logprob", "mask")]
    rest = ("sequence", "clip", 0.2, 0.3, 3.0 if full else None, "k3", 0.1 if full else 0.0)
    torch.library.opcheck(
        torch.ops.grpo_engine.policy_loss.default,
        (data["logprob"].requires_grad_(), data["advantage"], data["cu_seqlens"], *optional, *rest,
         full, "sequence_mean", 3.0),
    )  # fmt: skip

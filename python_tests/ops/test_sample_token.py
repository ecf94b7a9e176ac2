"""sample_token: float64 reference, filters, distribution, bad rows, invariance, contract."""

import mmap

import pytest
import reference
import torch
from conftest import EMULATED

from grpo_engine.ops import gather_logprob, sample_token

pytestmark = pytest.mark.usefixtures("device")

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16]
FEWER = 200 if EMULATED else 1  # draws of the statistical tests: the emulator takes 4 ms for each
# one token, less than a vector, a vector, a ragged tail, one block of 512, one more, several blocks
VOCABULARIES = [1, 7, 16, 33, 512, 513, 2050]
FILTERS = {
    "none": {},
    "one": {"top_k": 1},
    "top_k": {"top_k": 5},
    "top_k of every block": {"top_k": 40},
    "top_p": {"top_p": 0.9},
    "top_p small": {"top_p": 0.01},
    "min_p": {"min_p": 0.05},
    "top_k, top_p": {"top_k": 30, "top_p": 0.8},
    "top_k, min_p": {"top_k": 3, "min_p": 0.3},
    "top_p, min_p": {"top_p": 0.7, "min_p": 0.2},
    "all": {"top_k": 20, "top_p": 0.95, "min_p": 0.02},
}


def make(B, V, dtype=torch.float32, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed + 1000 * B + V)
    return (torch.randn(B, V, generator=g) * scale).to(dtype)


def draw(logits, *, seed=11, position=None, **options):
    """One draw a row, at positions 0, 1, ... of one request unless told otherwise."""
    B = logits.shape[0]
    seed = seed if isinstance(seed, torch.Tensor) else torch.full((B,), seed)
    return sample_token(logits, seed=seed, position=torch.arange(B) if position is None else position, **options)


def float32(value):
    """The number that a float32 argument holds."""
    return float(torch.tensor(value, dtype=torch.float32))


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.nan_to_num(nan=7e7), y.nan_to_num(nan=7e7))


def assert_matches_reference(out, logits, u, temperature=1.0, **filters):
    """Every row of ``out``, but for the few where rounding may move the token."""
    temperature = float32(temperature)
    filters = {k: v if k == "top_k" else float32(v) for k, v in filters.items()}
    near = 0
    for b in range(logits.shape[0]):
        token, *_, margin = reference.sample_token(logits[b], float(u[b]), temperature=temperature, **filters)
        got = int(out.token[b])
        if margin < 4e-6:  # the float32 sum of a block: relative error below 2^-19
            near += 1
            continue
        assert got == token, f"row {b}: token {got}, wanted {token}, margin {margin:.2e}"
        want = torch.tensor(reference.sample_token(logits[b], float(u[b]), temperature=temperature, **filters)[1:4])
        # z is rounded twice to float32; then the sum of the block as above
        size = float(logits[b][torch.isfinite(logits[b])].abs().max()) / (temperature or 1.0)
        got = torch.stack([out.logprob[b], out.full_logprob[b], out.entropy[b]])
        torch.testing.assert_close(got.double(), want.double(), rtol=2**-22, atol=2**-19 + 2**-22 * size)
    assert near <= 1 + logits.shape[0] // 10


# ---------------------------------------------------------------- against the reference


def test_the_reference_generator_gives_the_published_vectors():
    # Random123, kat_vectors: philox4x32 10
    def words(*values):
        return [torch.tensor([v]) for v in values]

    ones = 0xFFFFFFFF
    for counter, key, want in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        got = reference.philox4x32_10(words(*counter), words(*key))
        assert [int(w) for w in got] == list(want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_token_logprobs_and_entropy_match_the_reference(filters, V, dtype):
    logits = make(12, V, dtype)
    out = draw(logits, **filters)
    u = reference.philox_uniform(torch.full((12,), 11), torch.arange(12))
    assert [x.dtype for x in out] == [torch.int64] + [torch.float32] * 3
    assert_matches_reference(out, logits, u, **filters)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.7, 30.0])
@pytest.mark.parametrize("filters", [{}, FILTERS["all"]], ids=["none", "all"])
def test_temperature_divides_the_logits(temperature, filters):
    logits = make(40, 700)
    u = reference.philox_uniform(torch.full((40,), 11), torch.arange(40))
    out = draw(logits, temperature=temperature, **filters)
    assert_matches_reference(out, logits, u, temperature, **filters)


@pytest.mark.parametrize("filters", [FILTERS[n] for n in ("none", "all", "top_p")])
def test_a_real_vocabulary(filters):
    logits = make(3, 151_936)
    u = reference.philox_uniform(torch.full((3,), 11), torch.arange(3))
    assert_matches_reference(draw(logits, **filters), logits, u, **filters)


def test_the_uniform_is_that_of_seed_and_position():
    # 64 bits of both: neighbours, signs and high words all count
    values = torch.tensor([0, 1, 2, -1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)])
    seed, position = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    u = reference.philox_uniform(seed, position)
    assert len(set(u.tolist())) == u.numel()
    logits = torch.zeros(seed.numel(), 4096)  # the token is the top 12 bits of the uniform
    out = draw(logits, seed=seed, position=position)
    assert torch.equal(out.token, (u * 4096).long())


# ---------------------------------------------------------------- distribution


def five_sigma(count, p, n):
    return bool(((count - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1e-9).all())


@pytest.mark.parametrize("fixed", ["seed", "position"])
def test_draws_follow_the_softmax_to_five_sigma(fixed):
    n, p = 200_000 // FEWER, torch.tensor([0.5, 0.3, 0.15, 0.04999, 0.00001], dtype=torch.float64)
    moving, still = torch.arange(n), torch.full((n,), 5)
    seed, position = (still, moving) if fixed == "seed" else (moving, still)
    out = draw(p.log().float().expand(n, 5), seed=seed, position=position)
    assert five_sigma(torch.bincount(out.token, minlength=5).double(), p, n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chi_square_over_a_thousand_tokens(dtype):
    n, V = 100_000 // FEWER, 1000
    row = make(1, V, dtype, scale=1.0)
    count = torch.bincount(draw(row.expand(n, V)).token, minlength=V).double()
    expected = n * torch.softmax(row[0].double(), 0)
    chi2 = float(((count - expected) ** 2 / expected).sum())
    df = V - 1
    assert abs(chi2 - df) <= 5 * (2 * df) ** 0.5


@pytest.mark.parametrize("filters", list(FILTERS.values())[2:], ids=list(FILTERS)[2:])
def test_filtered_draws_keep_exactly_the_kept_set_and_its_proportions(filters):
    n, V = 50_000 // FEWER, 60
    row = make(1, V, scale=1.5, seed=3)
    keep, margin = reference.kept_tokens(row[0], **filters)
    assert margin > 1e-5
    out = draw(row.expand(n, V), **filters)
    count = torch.bincount(out.token, minlength=V).double()
    p = torch.where(keep, torch.softmax(row[0].double(), 0), 0.0)
    assert not count[~keep].any() and (EMULATED or torch.equal(count > 0, keep))
    assert five_sigma(count, p / p.sum(), n)
    want = (p / p.sum()).log()[out.token]
    torch.testing.assert_close(out.logprob.double(), want, rtol=2**-22, atol=2**-19)


def test_many_tail_race():
    # every tail token has 1.25e-9 of the head's mass: float32 uniforms or float32 Gumbel noise
    # never draw one.  In 1e5 trials 32.8 draws should leave the head.
    tail, gap, trials, head = 262_144, 20.5, 100_000, 100_000
    row = torch.full((tail + 1,), -gap)
    row[head] = 0.0
    each = torch.tensor(-gap, dtype=torch.float64).exp()
    u = reference.philox_uniform(torch.full((trials,), 3), torch.arange(trials))
    place = u * (1 + tail * each)
    hit = (place <= head * each) | (place > head * each + 1)
    expected = trials * tail * each / (1 + tail * each)
    assert abs(float(expected) - 32.8) < 0.1
    assert (hit.sum() - expected).abs() <= 5 * expected.sqrt()
    # the rows of all hits, and as many that miss
    chosen = torch.cat([hit.nonzero()[:, 0], (~hit).nonzero()[:, 0][: int(hit.sum())]])
    out = draw(row.expand(len(chosen), -1), seed=3, position=chosen)
    assert torch.equal(out.token != head, hit[chosen])
    before = place[chosen] <= head * each
    ids = torch.where(before, place[chosen] / each, (place[chosen] - 1) / each + 1)[hit[chosen]]
    # past the head the float32 sum of its block, 1 + 2^-24, is worth 48 tail tokens
    assert ((out.token[hit[chosen]] - ids).abs() <= torch.where(before[hit[chosen]], 1.5, 100)).all()


def test_many_tail_race_drawn_in_full():
    tail, trials = 1024, 100_000 // FEWER
    row = torch.full((tail + 1,), -20.5) + torch.tensor(262_144 / tail).log()
    row[500] = 0.0
    p = tail * row[0].double().exp()
    expected = trials * p / (1 + p)  # 32.8 for all trials, as above
    hits = (draw(row.expand(trials, -1)).token != 500).sum()
    assert (hits - expected).abs() <= 5 * expected.sqrt()


# ---------------------------------------------------------------- ties, order, edges of filters


def support(row, n=160 if EMULATED else 4000, **options):
    return sorted(set(draw(row.expand(n, -1), **options).token.tolist()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_at_the_top_k_boundary_go_to_the_lowest_ids(dtype):
    row = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0, 3.0, 2.0]], dtype=dtype)
    assert support(row, top_k=1) == [1]
    assert support(row, top_k=2) == [1, 6]
    assert support(row, top_k=3) == [1, 2, 6]
    assert support(row, top_k=5) == [1, 2, 3, 5, 6]
    assert support(row, top_k=6) == [1, 2, 3, 5, 6, 7]
    assert support(row, top_k=7) == [0, 1, 2, 3, 5, 6, 7]


def test_ties_across_blocks_go_to_the_lowest_ids():
    row = torch.zeros(1, 2000)
    row[0, [5, 600, 1200, 1999]] = 1.0
    assert support(row, top_k=1) == [5]
    assert support(row, top_k=3) == [5, 600, 1200]
    assert support(row, top_k=6) == [0, 1, 5, 600, 1200, 1999]


@pytest.mark.parametrize("V", [2, 16, 513, 5000])
def test_top_k_one_is_the_lowest_argmax_even_among_ties(V):
    logits = make(50, V, torch.bfloat16).float().round()  # many ties
    want = logits.argmax(dim=1)
    lowest = torch.tensor([int((r == r.max()).nonzero()[0]) for r in logits])
    for out in (draw(logits, top_k=1), draw(logits, temperature=0.0)):
        assert torch.equal(out.token, lowest)
        assert torch.equal(logits.gather(1, out.token[:, None]), logits.gather(1, want[:, None]))
        assert torch.equal(out.logprob, torch.zeros(50))


def test_top_p_keeps_every_token_that_ties_with_the_last():
    row = torch.tensor([[0.0, 1.0, 0.0, 0.0, -1.0]])
    # the largest has 0.436, each tie 0.161: any of them brings it past 0.5
    assert support(row, top_p=0.4) == [1]
    assert support(row, top_p=0.5) == [0, 1, 2, 3]
    assert support(row, top_p=0.95) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("V", [4, 700])
def test_an_all_equal_row(V):
    row = torch.full((1, V), 2.5)
    n = 20 * V // (100 if EMULATED and V > 4 else 1)
    for options in ({}, {"top_p": 0.3}, {"top_p": 0.0}, {"min_p": 1.0}):
        out = draw(row.expand(n, V), **options)
        count = torch.bincount(out.token, minlength=V).double()
        assert five_sigma(count, torch.tensor(1 / V, dtype=torch.float64), n)
        torch.testing.assert_close(out.entropy, torch.tensor(float(V)).log().expand(n))
        torch.testing.assert_close(out.logprob, -torch.tensor(float(V)).log().expand(n))
    assert support(row, top_k=3) == [0, 1, 2]


def test_top_p_and_min_p_at_their_ends():
    logits = make(60, 900)
    best = logits.argmax(dim=1)
    for options in ({"top_p": 0.0}, {"min_p": 1.0}, {"top_p": 1e-30}, {"top_p": 0.0, "min_p": 1.0}):
        out = draw(logits, **options)
        assert torch.equal(out.token, best) and torch.equal(out.logprob, torch.zeros(60))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_filter_that_is_off_changes_no_bit(dtype):
    logits = make(60, 900, dtype)
    free = draw(logits)
    assert torch.equal(free.logprob, free.full_logprob)
    for options in (
        {"top_p": 1.0}, {"min_p": 0.0}, {"top_k": 0}, {"top_k": -1}, {"top_k": 900},
        {"top_k": 2**62}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
    ):  # fmt: skip
        assert_same_bits(draw(logits, **options), free)


def test_the_order_is_top_k_then_top_p_then_min_p():
    row = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # of 0.4 + 0.3 renormalised the first alone has 0.57; jointly 0.5 would need both
    assert support(row, top_k=2, top_p=0.5) == [0]
    # top-p first would keep three, and top-k then two
    assert support(row, top_k=3, top_p=0.8) == [0, 1, 2]
    assert support(row, top_k=3, top_p=0.75) == [0, 1]
    row = torch.tensor([[0.5, 0.26, 0.1, 0.1, 0.04]]).log()
    # min-p first would leave 0.66 to the first token, enough for top-p
    assert support(row, top_p=0.6, min_p=0.5) == [0, 1]
    # min-p counts from the largest probability of the whole row
    assert support(row, top_k=3, min_p=0.15) == [0, 1, 2]


def test_random_filter_mixes_against_the_brute_force_kept_set():
    g = torch.Generator().manual_seed(0)
    V, rows = 300, 200
    # an eighth of a unit apart: every filter meets ties
    logits = (torch.randn(rows, V, generator=g) * 16).round() / 8
    top_k = torch.randint(-1, 40, (rows,), generator=g)
    top_p = torch.rand(rows, generator=g)
    min_p = torch.rand(rows, generator=g) ** 3
    top_p[::5], min_p[::3] = 1.0, 0.0
    out = draw(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    checked = 0
    for b in range(rows):
        keep, margin = reference.kept_tokens(logits[b], top_k=int(top_k[b]), top_p=float(top_p[b]), min_p=float(min_p[b]))
        if margin < 1e-6:
            continue
        checked += 1
        assert keep[out.token[b]]
        # the kept mass, seen through the two log-probs
        mass = torch.softmax(logits[b].double(), 0)[keep].sum()
        got = (out.full_logprob[b].double() - out.logprob[b].double()).exp()
        torch.testing.assert_close(got, mass, rtol=4e-6, atol=0)
    assert checked > rows * 0.95


@pytest.mark.parametrize("kind", ["fair", "sampled blocks hold all", "hold nothing", "hold the smallest", "ties", "steep"])
@pytest.mark.parametrize("top_p", [1e-4, 0.2, 0.9, 0.999])
def test_top_p_of_a_long_row_whatever_its_sample_makes_believe(kind, top_p):
    # a long row is first searched in every sixteenth block of 512
    V = 40_000
    logits = make(3, V)
    sampled = torch.arange(V) // 512 % 16 == 0
    if kind == "sampled blocks hold all":
        logits[:, ~sampled] -= 60.0
    elif kind == "hold nothing":
        logits[:, sampled] = -INF
    elif kind == "hold the smallest":
        logits[:, sampled] -= 8.0
    elif kind == "ties":
        logits = logits.round()
    elif kind == "steep":
        logits *= 1e30
    out = draw(logits, top_p=top_p)
    for b in range(3):
        keep, _ = reference.kept_tokens(logits[b], top_p=top_p)
        assert keep[out.token[b]]
        mass = torch.softmax(logits[b].double(), 0)[keep].sum()
        torch.testing.assert_close((out.full_logprob[b].double() - out.logprob[b].double()).exp(), mass, rtol=4e-6, atol=0)


# ---------------------------------------------------------------- bad rows and extreme numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [0, 15, 511, 512, 1029])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, FILTERS["all"]])
def test_a_bad_row_is_marked_and_the_others_keep_their_bits(options, bad, where, dtype):
    logits = make(5, 1030, dtype)
    good = draw(logits, **options)
    logits[2, where] = bad
    logits[4] = -INF
    out = draw(logits, **options)
    assert out.token[[2, 4]].tolist() == [-1, -1]
    for x in out[1:]:
        assert x[[2, 4]].isnan().all()
    assert_same_bits([x[[0, 1, 3]] for x in out], [x[[0, 1, 3]] for x in good])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, *list(FILTERS.values())[1:]])
def test_minus_infinity_is_never_drawn(options, dtype):
    logits = make(200 // (8 if EMULATED else 1), 1100, dtype)
    logits[:, 1::2] = -INF
    logits[:, :520] = -INF  # a whole block, too
    out = draw(logits, **options)
    assert ((out.token >= 520) & (out.token % 2 == 0)).all()
    assert torch.isfinite(out.logprob).all() and torch.isfinite(out.entropy).all()
    # as if the masked tokens were not there
    small = draw(logits[:, 520::2].contiguous(), **options)
    same = out.token == small.token * 2 + 520
    assert same.float().mean() >= 0.99  # the blocks differ, so the last bit of a sum may
    torch.testing.assert_close(out.entropy, small.entropy, rtol=2e-6, atol=2e-6)
    for a, b in ((out.logprob, small.logprob), (out.full_logprob, small.full_logprob)):
        torch.testing.assert_close(a[same], b[same], rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("low", [-INF, -3e38, -1000.0])
@pytest.mark.parametrize("V", [1, 2, 17, 1500])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, *list(FILTERS.values())[1:]])
def test_all_but_one_masked_gives_that_token_and_entropy_exactly_zero(options, V, low):
    ids = torch.tensor([0, V // 2, V - 1])
    logits = torch.full((3, V), low)
    logits[torch.arange(3), ids] = -5.0
    out = draw(logits, **options)
    assert torch.equal(out.token, ids)
    for x in out[1:]:
        assert torch.equal(x, torch.zeros(3))
    assert not torch.signbit(out.entropy).any()


def test_a_padded_vocabulary_is_masked_by_minus_infinity():
    logits = torch.zeros(2000 // FEWER, 151_936 // 64)
    real = 2365
    logits[:, real:] = -INF
    out = draw(logits)
    assert (out.token < real).all() and (out.token > real - (1000 if EMULATED else 20)).any()
    torch.testing.assert_close(out.entropy, torch.tensor(float(real)).log().expand(len(logits)))


def test_adjacent_floats_are_told_apart():
    one = torch.tensor(1.0)
    up = torch.nextafter(one, torch.tensor(2.0))
    row = torch.full((1, 700), 1.0)
    row[0, 650] = up
    assert support(row, top_k=1) == [650]
    assert support(row, top_p=0.0) == [650]
    assert support(row, min_p=1.0) == [650]
    assert support(row, temperature=0.0) == [650]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, FILTERS["all"], {"top_p": 0.5}])
def test_subnormal_logits_are_equal_in_probability_and_ordered_by_size(options):
    row = torch.arange(700, dtype=torch.float32)[None] * 1e-45
    out = draw(row.expand(50, -1), **options)
    assert ((out.token >= 0) & (out.token < 700)).all()
    torch.testing.assert_close(out.entropy, torch.tensor(700.0).log().expand(50))
    if options.get("temperature") == 0.0:
        assert (out.token == 699).all()
    if "top_k" in options:  # the twenty largest; top-p then drops the lowest of them
        assert (out.token >= 680).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [80.0, 1e4, 1e30])
@pytest.mark.parametrize("options", [{}, FILTERS["all"], {"temperature": 0.5}])
def test_large_logits_do_not_overflow(options, scale, dtype):
    logits = make(30, 600, dtype, scale=scale)
    out = draw(logits, **options)
    assert ((out.token >= 0) & (out.token < 600)).all()
    for x in out[1:]:
        assert torch.isfinite(x).all()
    assert (out.logprob <= 0).all() and (out.entropy >= 0).all()
    if scale >= 1e4:
        assert (out.token == logits.float().argmax(dim=1)).float().mean() > 0.9


def test_temperature_from_zero_to_huge():
    logits = make(100, 800)
    best = logits.argmax(dim=1)
    greedy = draw(logits, temperature=0.0)
    one = draw(logits, temperature=1.0)
    assert torch.equal(greedy.token, best) and torch.equal(greedy.logprob, torch.zeros(100))
    # the other outputs of a greedy row are those of temperature 1
    assert torch.equal(greedy.entropy, one.entropy)
    full = gather_logprob(logits, best)[0]
    assert torch.equal(greedy.full_logprob, full)
    cold = draw(logits, temperature=1e-6)
    assert torch.equal(cold.token, best) and torch.equal(cold.logprob, torch.zeros(100))
    assert torch.equal(cold.entropy, torch.zeros(100))
    hot = draw(logits, temperature=1e30)
    u = reference.philox_uniform(torch.full((100,), 11), torch.arange(100))
    assert ((hot.token - (u * 800).long()).abs() <= 1).all()
    torch.testing.assert_close(hot.entropy, torch.tensor(800.0).log().expand(100))


@pytest.mark.parametrize("temperature", [1e-38, 1e-40, 1e-45])
def test_the_smallest_temperatures_give_the_largest_logit(temperature):
    logits = make(20, 300)
    out = draw(logits, temperature=temperature)
    assert torch.equal(out.token, logits.argmax(dim=1))
    assert all(x.eq(0).all() for x in out[1:])


# ---------------------------------------------------------------- invariance


def mixed(B, V, dtype=torch.float32):
    """Rows that differ in every option."""
    g = torch.Generator().manual_seed(B)
    temperature = torch.rand(B, generator=g) * 2
    temperature[::4] = 0.0
    top_p = torch.rand(B, generator=g)
    top_p[1::3] = 1.0
    min_p = torch.rand(B, generator=g) * 0.2
    min_p[::3] = 0.0
    options = {
        "seed": torch.randint(2**62, (B,), generator=g),
        "position": torch.randint(5000, (B,), generator=g),
        "temperature": temperature,
        "top_k": torch.randint(-1, 60, (B,), generator=g),
        "top_p": top_p,
        "min_p": min_p,
    }
    return make(B, V, dtype), options


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_reversed_and_among_other_neighbours(on_threads, dtype):
    logits, options = mixed(61, 1100, dtype)
    one, *others = on_threads(lambda: sample_token(logits, **options))
    for other in others:
        assert_same_bits(one, other)
    for b in range(0, 61, 7):
        alone = sample_token(logits[b : b + 1], **{k: v[b : b + 1] for k, v in options.items()})
        assert_same_bits(alone, [x[b : b + 1] for x in one])
    back = sample_token(logits.flip(0), **{k: v.flip(0) for k, v in options.items()})
    assert_same_bits([x.flip(0) for x in back], one)
    # the same rows beside neighbours without any filter
    plain = {
        k: torch.where(torch.arange(61) % 2 == 0, v, off)
        for (k, v), off in zip(options.items(), (options["seed"], options["position"], 1.0, 0, 1.0, 0.0), strict=True)
    }
    assert_same_bits([x[::2] for x in sample_token(logits, **plain)], [x[::2] for x in one])


def test_a_number_and_a_tensor_of_it_are_the_same():
    logits = make(20, 600)
    scalar = draw(logits, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01)
    tensor = draw(
        logits,
        temperature=torch.full((20,), 0.7),
        top_k=torch.full((20,), 9),
        top_p=torch.full((20,), 0.9),
        min_p=torch.full((20,), 0.01),
    )
    assert_same_bits(scalar, tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 7, 512, 1500])
@pytest.mark.parametrize("temperature", [0.1, 0.3, 0.49, 0.6, 0.7, 0.9, 1.0, 1.1, 1.7, 3.3])
def test_full_logprob_and_entropy_have_the_bits_of_gather_logprob(temperature, V, dtype):
    logits = make(6 if EMULATED else 30, V, dtype)
    for filters in ({}, FILTERS["all"]):
        out = draw(logits, temperature=temperature, **filters)
        logprob, entropy = gather_logprob(logits, out.token, temperature=temperature)
        assert torch.equal(out.full_logprob, logprob)
        assert torch.equal(out.entropy, entropy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_have_the_bits_of_contiguous_ones(dtype):
    wide = make(20, 1200, dtype)
    for view in (wide[:, :1001], wide[:, 3:1003], wide[::3], wide[:1, 5:500].expand(9, -1)):
        assert not view.is_contiguous() or view.data_ptr() % 64
        for options in ({}, FILTERS["all"]):
            assert_same_bits(draw(view, **options), draw(view.contiguous(), **options))


def test_rows_beyond_two_to_the_32_elements(device):
    if device == "cuda":
        pytest.skip("no GPU lends memory that is never touched")
    # memory that is reserved and never touched, but for three rows
    stride, V = 2**31 + 8, 40
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, (2 * stride + V) * 4, flags=flags)
    except OSError:
        pytest.skip("this system does not lend 17 GB of untouched address space")
    logits = torch.frombuffer(memory, dtype=torch.float32).as_strided((3, V), (stride, 1))
    rows = make(3, V)
    logits.copy_(rows)
    assert_same_bits(draw(logits), draw(rows))
    assert_same_bits(draw(logits, top_k=3), draw(rows, top_k=3))


def test_an_empty_batch():
    empty = torch.zeros(0, dtype=torch.int64)
    for options in ({}, FILTERS["all"]):
        out = sample_token(torch.zeros(0, 9), seed=empty, position=empty, **options)
        assert [x.shape for x in out] == [(0,)] * 4


# ---------------------------------------------------------------- contract


def call(d, *, B=2, V=4, dtype=torch.float32, **options):
    options = {"seed": torch.zeros(B).long(), "position": torch.zeros(B).long()} | options
    on_device = {name: value(d) if callable(value) else value.to(d) for name, value in options.items()}
    return sample_token(torch.zeros(B, V, dtype=dtype, device=d), **on_device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "change,error,says",
    [
        ({"V": 0}, ValueError, r"V >= 1 columns, got \[2, 0\]"),
        ({"dtype": torch.float64}, TypeError, "logits must be Float or BFloat16, got Double"),
        ({"dtype": torch.float16}, TypeError, "logits must be Float or BFloat16, got Half"),
        ({"seed": torch.zeros(3).long()}, ValueError, r"seed must be \[B\] = \[2\], got \[3\]"),
        ({"seed": torch.zeros(2)}, TypeError, "seed must be Long, got Float"),
        ({"position": torch.zeros(1, 2).long()}, ValueError, r"position must be .*got \[1, 2\]"),
        ({"position": torch.zeros(2).int()}, TypeError, "position must be Long, got Int"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be .*got \[3\]"),
        ({"temperature": torch.ones(2).double()}, TypeError, "temperature must be Float, got Do"),
        ({"top_k": torch.ones(2)}, TypeError, "top_k must be Long, got Float"),
        ({"top_k": torch.ones(3).long()}, ValueError, r"top_k must be \[B\] = \[2\], got \[3\]"),
        (
            {"top_p": lambda d: torch.ones(4, device=d)[::2]},
            ValueError,
            r"top_p must be contiguous",
        ),
        ({"min_p": torch.ones(2, 1)}, ValueError, r"min_p must be \[B\] = \[2\], got \[2, 1\]"),
    ],
)
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, change, error, says):
    with pytest.raises(error, match="sample_token: .*" + says):
        call(device, **change)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_logits_are_told_what_was_wanted_and_what_came(device):
    two = torch.zeros(2, dtype=torch.int64, device=device)
    for logits, says in (
        (torch.zeros(5, device=device), r"logits must be \[B, V\].*got \[5\]"),
        (torch.zeros(5, 2, device=device).t(), r"row of logits must be contiguous.*\[1, 2\]"),
        (torch.zeros((), device=device), r"logits must be \[B, V\].*got \[\]"),
    ):
        with pytest.raises(ValueError, match="sample_token: .*" + says):
            sample_token(logits, seed=two, position=two)


OUT_OF_RANGE = [
    ("temperature", -0.5), ("temperature", INF), ("temperature", NAN), ("top_p", -0.1),
    ("top_p", 1.1), ("top_p", NAN), ("min_p", -0.1), ("min_p", 1.5), ("min_p", NAN),
]  # fmt: skip


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name,bad", OUT_OF_RANGE)
def test_a_value_outside_its_range_names_the_row(name, bad):
    values = torch.tensor([1.0, bad, 1.0])
    with pytest.raises(ValueError, match=f"sample_token: {name} must be .*got {bad}.* at row 1"):
        call("cpu", B=3, **{name: values})


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("options", [{}, {"top_k": 7}])
@pytest.mark.parametrize("name,bad", OUT_OF_RANGE)
def test_a_row_with_a_value_outside_its_range_is_marked_on_cuda(name, bad, options):
    logits = make(3, 600)
    values = torch.full((3,), 0.5)
    good = draw(logits, **{name: values}, **options)
    values[1] = bad
    out = draw(logits, **{name: values}, **options)
    assert out.token[1] == -1 and all(x[1].isnan() for x in out[1:])
    assert_same_bits([x[::2] for x in out], [x[::2] for x in good])


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype):
    logits, options = mixed(3, 50, dtype)
    op = torch.ops.grpo_engine.sample_token.default
    names = ("seed", "position", "temperature", "top_k", "top_p", "min_p")
    torch.library.opcheck(op, (logits, *(options[n] for n in names)))
    torch.library.opcheck(op, (logits, *(options[n] for n in names[:3]), None, None, None))


# logits and temperatures whose quotient leaves float32
BEYOND = [
    ([0.0, 3e38], 0.5),
    ([1.0, 5.0, 2.0], 1e-38),
    ([1.0, 5.0, 2.0], 1e-42),
    ([-3e38, -2e38, -3e38], 0.5),
    ([2e38, 3e38, 3e38, -3e38], 0.25),
    ([3e38, -INF, 3.1e38], 1e-3),
    ([0.0] * 600 + [3e38] + [1.0] * 700, 0.1),
    ([-3.3e38] * 600 + [-3.2e38] + [-3.3e38] * 600, 0.1),
]


def beyond(row, temperature, dtype):
    """The logits, their probabilities and the log of these, in float64 of what the row holds."""
    logits = torch.tensor([row], dtype=torch.float32).to(dtype)
    exact = logits.double() - logits.double().max()
    return logits, torch.softmax(exact / temperature, dim=1), torch.log_softmax(exact / temperature, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row,temperature", BEYOND)
@pytest.mark.parametrize(
    "filters", [{}, FILTERS["all"], {"top_k": 1}, {"top_p": 0.5}], ids=["none", "all", "top_k", "top_p"]
)
def test_a_row_that_leaves_float32_is_sampled(row, temperature, filters, dtype):
    logits, p, log_p = beyond(row, temperature, dtype)
    rows = 64
    ordinary = make(1, len(row), dtype)
    out = draw(torch.cat([logits.expand(rows, -1), ordinary]), temperature=temperature, **filters)
    likely = {int(i) for i in p[0].nonzero()}
    taken = out.token[:rows].tolist()
    assert set(taken) <= likely
    if filters in ({}, FILTERS["all"]):
        assert set(taken) == likely
    assert torch.equal(out.full_logprob[:rows].double(), log_p[0, out.token[:rows]].float().double())
    entropy = -(p * log_p.clamp(min=-1e4)).sum()
    torch.testing.assert_close(out.entropy[:rows].double(), entropy.expand(rows), rtol=1e-6, atol=1e-6)
    alone = sample_token(
        ordinary, seed=torch.tensor([11]), position=torch.tensor([rows]), temperature=temperature, **filters
    )
    assert_same_bits([o[rows:] for o in out], alone)  # the row beside them is untouched
    logprob, _ = gather_logprob(logits.expand(rows, -1).contiguous(), out.token[:rows], temperature=temperature)
    assert torch.equal(logprob, out.full_logprob[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_number_stays_no_number_beyond_float32(dtype):
    for bad in (NAN, INF):
        out = draw(torch.tensor([[3e38, bad, 0.0]]).to(dtype), temperature=0.1)
        assert out.token.tolist() == [-1] and out.logprob.isnan().all()

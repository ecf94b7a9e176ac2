"""rope: float64 reference, transformers, far positions, strided views, gradients, contract."""

import pytest
import reference
import torch
from bars import assert_as_good_as_torch

from grpo_engine.ops import rope

pytestmark = pytest.mark.usefixtures("device")

# one pair, half a vector, a ragged half, one vector a half, Qwen2.5 heads, no rows, no heads
SHAPES = [(3, 2, 2), (5, 1, 16), (4, 3, 20), (7, 2, 32), (9, 14, 64), (2, 12, 128), (0, 2, 8), (3, 0, 8)]


def make(T, H, E, dtype, seed=0):
    g = torch.Generator().manual_seed(seed + 1000 * T + E)
    return torch.randn(T, H, E, generator=g).to(dtype), torch.randint(0, 600, (T,), generator=g)


def plain(x, position, theta):  # the Hugging Face way, cos and sin in the dtype of x
    E = x.shape[-1]
    frequency = 1.0 / (theta ** (torch.arange(0, E, 2).float() / E))
    angle = (position.float()[:, None] * frequency).repeat(1, 2)[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,H,E", SHAPES)
def test_forward_and_backward_are_as_good_as_torch(T, H, E, dtype):
    x, position = make(T, H, E, dtype)
    dy = make(T, H, E, dtype, seed=1)[0]
    results = []
    for fn, cast in ((rope, dtype), (plain, dtype), (reference.rope, torch.float64)):
        a = x.detach().to(cast, copy=True).requires_grad_()
        y = fn(a, position, theta=1e6)
        y.backward(dy.to(y.dtype))
        results.append((y.detach(), a.grad))
    for ours, theirs, truth in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert_as_good_as_torch(ours, theirs, truth)


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("E", [64, 128])
def test_cos_and_sin_match_transformers_at_every_position(E, theta):
    qwen2 = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    config = qwen2.Qwen2Config(hidden_size=E, num_attention_heads=1, num_key_value_heads=1)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    with torch.device("cpu"):  # on CUDA its float32 angles are off by 1e-4
        cos, sin = qwen2.Qwen2RotaryEmbedding(config)(torch.zeros(1), torch.arange(32768)[None])
    position = torch.arange(32768)
    x = torch.zeros(32768, 1, E)
    x[:, :, : E // 2] = 1.0  # (1, 0) turns into (cos, sin)
    got = rope(x, position, theta=theta)[:, 0]
    want = torch.cat([cos[0, :, : E // 2], sin[0, :, : E // 2]], dim=-1)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-5)


def test_positions_up_to_a_million_stay_exact():
    position = torch.tensor([0, 1, 999_983, 1_000_000, 2**24])
    x = make(5, 2, 64, torch.float32)[0]
    got = rope(x, position, theta=1e6)
    want = reference.rope(x, position, theta=1e6)
    # cos, sin, two products and a sum, each rounded once: 4 half-ulps of at most |x| sqrt(2)
    bound = 4 * 2.0**-24 * 2**0.5 * x.abs().max().double()
    assert (got - want).abs().max() <= bound
    assert torch.equal(got[0], x[0])  # position 0 turns nothing


def test_a_row_does_not_depend_on_the_table_or_the_batch(both_ways_on_threads):
    # near positions share a table by position; one past what is kept makes a table by token
    x, dy = make(1001, 3, 20, torch.float32)[0], make(1001, 3, 20, torch.float32, seed=1)[0]
    dense = torch.arange(1001)
    one, _ = both_ways_on_threads(lambda y: rope(y, dense, theta=1e4), [x], dy)
    far = dense.clone()
    far[7] = 300_000
    sparse, _ = both_ways_on_threads(lambda y: rope(y, far, theta=1e4), [x], dy)
    kept = dense != 7
    assert torch.equal(sparse[kept], one[kept])
    for t in (0, 1, 150):
        assert torch.equal(rope(x[t : t + 1], dense[t : t + 1], theta=1e4)[0], one[t])


def test_the_kept_table_grows_and_gives_way_without_changing_a_bit():
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(4, 1, 16)
    near, far = torch.tensor([0, 1, 5, 7]), torch.tensor([0, 1, 5, 900_000])  # far: beyond what is kept
    first = rope(x, near, theta=1e4)
    # longer tables, one for this call alone, another width, another model
    for y, position, theta in [
        (x, near + 40, 1e4), (x, near, 1e4), (x, near + 5000, 1e4), (x, far, 1e4), (x[..., :8], near, 1e4), (x, near, 1e6),
    ]:  # fmt: skip
        got = rope(y, position, theta=theta)
        torch.testing.assert_close(got.double(), reference.rope(y, position, theta), rtol=0, atol=2.0**-20)
        if y is x and theta == 1e4 and position[0] == 0:
            assert torch.equal(got[:2], first[:2])
    assert torch.equal(rope(x, near, theta=1e4), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_qkv_views_need_no_copy(dtype):
    qkv = make(11, 8, 20, dtype)[0].reshape(11, 160)
    position = torch.arange(11)
    query, key = qkv[:, :80].view(11, 4, 20), qkv[:, 80:120].view(11, 2, 20)
    for view in (query, key):
        assert not view.is_contiguous()
        got = rope(view, position, theta=1e6)
        assert got.is_contiguous()
        assert torch.equal(got, rope(view.contiguous(), position, theta=1e6))


def test_non_finite_values_stay_in_their_pair():
    x = torch.ones(2, 1, 8)
    x[0, 0, 1], x[1, 0, 6] = float("nan"), float("inf")
    y = rope(x, torch.tensor([3, 4]), theta=1e4)
    assert y[0, 0].isnan().tolist() == [False, True, False, False, False, True, False, False]
    assert y[1, 0].isfinite().tolist() == [True, True, False, True, True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("far", [0, 100_000])  # a kept table, one of the call's own
def test_given_frequencies_take_the_place_of_thetas(dtype, far):
    x, position = make(7, 3, 20, dtype)
    position += far
    dy = make(7, 3, 20, dtype, seed=1)[0]
    frequency = torch.rand(10, generator=torch.Generator().manual_seed(2))
    a, b = (x.to(d, copy=True).requires_grad_() for d in (dtype, torch.float64))
    y, want = rope(a, position, theta=1e4, frequency=frequency), reference.rope(b, position, 1e4, frequency)
    y.backward(dy)
    want.backward(dy.double())
    # two products and a sum of numbers rounded once, then of the result's own dtype
    bound = (4 * 2.0**-24 + (2.0**-8 if dtype == torch.bfloat16 else 0)) * 2**0.5
    assert (y - want).abs().max() <= bound * x.abs().max().double()
    assert (a.grad - b.grad).abs().max() <= bound * dy.abs().max().double()


def test_gradcheck():
    x, position = make(3, 2, 10, torch.float64)
    assert torch.autograd.gradcheck(lambda a: rope(a, position, theta=1e4), (x.requires_grad_(),))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "change,error,says",
    [
        ({"x": torch.zeros(4, 8)}, ValueError, r"x must be \[T, H, E\].*got \[4, 8\]"),
        ({"x": torch.zeros(4, 2, 7)}, ValueError, r"even head width E >= 2, got \[4, 2, 7\]"),
        ({"x": torch.zeros(4, 2, 8).int()}, TypeError, "x must be Float, BFloat16 or Double, got Int"),
        ({"x": torch.zeros(4, 8, 2).mT}, ValueError, "x must be contiguous in its last two axes"),
        ({"position": torch.zeros(3).long()}, ValueError, r"position must be \[T\] = \[4\], got \[3\]"),
        ({"position": torch.zeros(4).int()}, TypeError, "position must be Long, got Int"),
        ({"theta": 0.0}, ValueError, "theta must be finite and > 0, got 0"),
        ({"frequency": torch.zeros(3)}, ValueError, r"frequency must be \[E/2\] = \[4\], got \[3\]"),
        ({"frequency": torch.zeros(4).double()}, TypeError, "frequency must be Float, got Double"),
    ],
)
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, change, error, says):
    given = {"x": torch.zeros(4, 2, 8), "position": torch.zeros(4).long(), "theta": 1e4, **change}
    given = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    with pytest.raises(error, match="rope: .*" + says):
        rope(**given)


@pytest.mark.usefixtures("cpu_kernels")
def test_a_negative_position_is_refused():
    with pytest.raises(ValueError, match="rope: position must be >= 0, got -2 at row 1"):
        rope(torch.zeros(2, 1, 4), torch.tensor([5, -2]), theta=1e4)


@pytest.mark.usefixtures("cuda_kernels")
def test_a_negative_position_makes_its_row_nan_on_cuda():
    y = rope(torch.ones(3, 1, 4), torch.tensor([5, -2, 0]), theta=1e4)
    assert y.isnan().all(-1).flatten().tolist() == [False, True, False]


def test_registration():
    x, position = make(3, 2, 10, torch.float32)
    for frequency in (None, torch.rand(5)):
        torch.library.opcheck(torch.ops.grpo_engine.rope.default, (x.requires_grad_(), position, 1e4, False, frequency))

"""decoder_layer and decoder_layer_paged: the ops they are made of, float64, gradients, invariance, contract."""

import functools
import math

import pytest
import torch
from conftest import EMULATED, assert_identical

from grpo_engine import ops
from grpo_engine.ops import LayerWeights, decoder_layer, decoder_layer_paged

pytestmark = pytest.mark.usefixtures("device")

NUMBERS = dict(theta=1e4, eps=1e-6)
# D, F, H, K, E: grouped and single kv heads, widths off the vector width, a head wider than the stream
SIZES = [(32, 40, 4, 2, 8), (20, 24, 2, 1, 16), (48, 128, 3, 3, 20), (28, 30, 7, 1, 32)]
LENGTHS = [1, 17, 5, 300, 16]  # more than one tile of rows


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def positions(lengths):
    return torch.cat([torch.arange(n) for n in lengths])


def make(D, F, H, K, E, T, dtype=torch.float32, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(shape, generator=g) / math.sqrt(shape[-1])).to(dtype)

    weights = LayerWeights(
        attn_norm=1 + draw(D), qkv_weight=draw((H + 2 * K) * E, D), qkv_bias=draw((H + 2 * K) * E),
        out_weight=draw(D, H * E), mlp_norm=1 + draw(D), gate_up_weight=draw(2 * F, D), down_weight=draw(D, F),
    )  # fmt: skip
    return torch.randn(T, D, generator=g).to(dtype), weights if bias else weights._replace(qkv_bias=None)


def composed(x, w, position, cu_seqlens, *, num_kv_heads, head_dim, theta, eps, cu_groups=None, batch_invariant=True):
    """The layer written with the single ops."""
    linear = functools.partial(ops.linear, batch_invariant=batch_invariant)
    K, E = num_kv_heads, head_dim
    H = w.out_weight.shape[1] // E
    qkv = linear(ops.rms_norm(x, w.attn_norm, eps=eps), w.qkv_weight, w.qkv_bias).view(-1, H + 2 * K, E)
    qk, v = qkv.split((H + K, K), dim=1)
    q, k = ops.rope(qk, position, theta=theta).split((H, K), dim=1)
    o = ops.ragged_attention(q, k, v, cu_seqlens, scale=1 / math.sqrt(E), cu_groups=cu_groups)
    s = x + linear(o.reshape(-1, H * E), w.out_weight)
    return s + linear(ops.swiglu(linear(ops.rms_norm(s, w.mlp_norm, eps=eps), w.gate_up_weight)), w.down_weight)


def value_and_gradients(layer, x, weights, *args, **numbers):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, *weights)]
    y = layer(leaves[0], LayerWeights(*leaves[1:]), *args, **numbers)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy)]


@pytest.mark.parametrize(
    "dtype,batch_invariant",
    [(torch.float32, True), (torch.bfloat16, True), (torch.float64, True), (torch.float32, False), (torch.bfloat16, False)],
)
@pytest.mark.parametrize("D,F,H,K,E", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_has_the_bits_of_the_single_ops_and_backward_their_values(D, F, H, K, E, bias, dtype, batch_invariant):
    x, weights = make(D, F, H, K, E, sum(LENGTHS), dtype, bias=bias)
    args = (positions(LENGTHS), offsets(LENGTHS))
    numbers = dict(num_kv_heads=K, head_dim=E, batch_invariant=batch_invariant, **NUMBERS)
    ours = value_and_gradients(decoder_layer, x, weights, *args, **numbers)
    theirs = value_and_gradients(composed, x, weights, *args, **numbers)
    assert torch.equal(ours[0], theirs[0])
    with torch.no_grad():
        assert torch.equal(decoder_layer(x, weights, *args, **numbers), ours[0])
    # gradients meet in another order at the two residual sums, so they may round differently
    rtol = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float64: 1e-13}[dtype]
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert (a - b).abs().max() <= rtol * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_prompt_gives_the_bits_of_whole_sequences(dtype):
    D, F, H, K, E = SIZES[0]
    prompt, responses = 19, [5, 1, 14]
    x, weights = make(D, F, H, K, E, prompt + sum(responses), dtype)
    own = [torch.arange(n) + prompt for n in responses]
    numbers = dict(num_kv_heads=K, head_dim=E, **NUMBERS)
    shared = decoder_layer(x, weights, torch.cat([torch.arange(prompt), *own]), offsets([prompt, *responses]),
                           cu_groups=offsets([4]), **numbers)  # fmt: skip
    for part, want in zip(x[prompt:].split(responses), shared[prompt:].split(responses), strict=True):
        whole = torch.cat([x[:prompt], part])
        n = [len(whole)]
        y = decoder_layer(whole, weights, positions(n), offsets(n), **numbers)
        assert torch.equal(y[:prompt], shared[:prompt]) and torch.equal(y[prompt:], want)


@pytest.mark.parametrize("cu_groups", [None, [2, 1]])
@pytest.mark.parametrize("D,F,H,K,E", SIZES[:2])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(D, F, H, K, E, bias, cu_groups):
    lengths = [3, 1, 4]
    x, weights = make(D, F, H, K, E, sum(lengths), torch.float64, bias=bias)
    given = {name: w.requires_grad_() for name, w in weights._asdict().items() if w is not None}
    leaves = [x.requires_grad_(), *given.values()]
    groups = None if cu_groups is None else offsets(cu_groups)

    def layer(x, *leaves):
        weights = LayerWeights(**{"qkv_bias": None} | dict(zip(given, leaves, strict=True)))
        return decoder_layer(x, weights, positions(lengths), offsets(lengths), num_kv_heads=K,
                             head_dim=E, cu_groups=groups, **NUMBERS)  # fmt: skip

    assert torch.autograd.gradcheck(layer, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_depend_on_their_sequence_alone(dtype, both_ways_on_threads):
    D, F, H, K, E = SIZES[0]
    lengths = LENGTHS if EMULATED else 11 * LENGTHS  # 15 tiles of 256 rows, which eight threads take
    x, weights = make(D, F, H, K, E, sum(lengths), dtype)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    numbers = dict(num_kv_heads=K, head_dim=E, **NUMBERS)
    args = (positions(lengths), offsets(lengths))
    y, _ = both_ways_on_threads(lambda x, *w: decoder_layer(x, LayerWeights(*w), *args, **numbers), [x, *weights], dy)
    for part, want in list(zip(x.split(lengths), y.split(lengths), strict=True))[-len(LENGTHS) :]:
        n = [len(part)]
        assert torch.equal(decoder_layer(part.contiguous(), weights, positions(n), offsets(n), **numbers), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D,F,H,K,E", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_pages_give_the_same_bits_whole_and_token_by_token(D, F, H, K, E, bias, dtype):
    lengths, page = [37, 3, 16], 16
    x, weights = make(D, F, H, K, E, sum(lengths), dtype, bias=bias)
    want = decoder_layer(x, weights, positions(lengths), offsets(lengths), num_kv_heads=K, head_dim=E, **NUMBERS)
    page_table = torch.tensor([[4, 0, 2], [1, 0, 0], [3, 0, 0]], dtype=torch.int32)

    def slots(n, begin, end):
        return [int(page_table[n, p // page]) * page + p % page for p in range(begin, end)]

    def pages():
        like = dict(dtype=dtype)
        return torch.full((5, K, E, page), math.nan, **like), torch.full((5, K, page, E), math.nan, **like)

    starts = offsets(lengths).tolist()
    y = decoder_layer_paged(
        x, weights, positions(lengths), *pages(), torch.tensor(sum((slots(n, 0, m) for n, m in enumerate(lengths)), [])),
        page_table, offsets(lengths), torch.tensor(lengths, dtype=torch.int32), **NUMBERS,
    )  # fmt: skip
    assert torch.equal(y, want)
    cache = pages()
    for p in range(max(lengths)):  # all sequences that are still running, one token each
        running = [n for n, m in enumerate(lengths) if p < m]
        y = decoder_layer_paged(
            x[[starts[n] + p for n in running]], weights, torch.full((len(running),), p), *cache,
            torch.tensor(sum((slots(n, p, p + 1) for n in running), [])), page_table[running],
            offsets([1] * len(running)), torch.full((len(running),), p + 1, dtype=torch.int32), **NUMBERS,
        )  # fmt: skip
        assert torch.equal(y, want[[starts[n] + p for n in running]])


# few rows: threads share the columns of each product; many: each takes tiles of rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D,F,H,K,E,sequences", [(256, 700, 8, 4, 32, 5), (*SIZES[0], 463)])
def test_over_pages_neither_threads_nor_a_repetition_change_a_bit(D, F, H, K, E, sequences, dtype, on_threads):
    sequences, length, page = min(sequences, 9) if EMULATED else sequences, 8, 16
    x, weights = make(D, F, H, K, E, sequences * length, dtype)
    position = torch.arange(length).repeat(sequences)
    slot = (torch.arange(sequences)[:, None] * page + torch.arange(length)).flatten()
    pages = torch.arange(sequences, dtype=torch.int32)[:, None]
    kv_len = torch.full((sequences,), length, dtype=torch.int32)

    def layer():
        keys = torch.full((sequences, K, E, page), math.nan, dtype=dtype)
        return decoder_layer_paged(x, weights, position, keys, keys.mT.contiguous(), slot, pages,
                                   offsets([length] * sequences), kv_len, **NUMBERS)  # fmt: skip

    assert_identical(on_threads(layer))


def test_no_token_and_nan():
    D, F, H, K, E = SIZES[0]
    x, weights = make(D, F, H, K, E, 6)
    numbers = dict(num_kv_heads=K, head_dim=E, **NUMBERS)
    empty = value_and_gradients(decoder_layer, x[:0], weights, torch.empty(0, dtype=torch.int64), offsets([]), **numbers)
    assert empty[0].shape == (0, D) and all((g == 0).all() for g in empty[2:])
    x[4] = math.nan
    y = decoder_layer(x, weights, positions([3, 3]), offsets([3, 3]), **numbers)
    assert torch.isfinite(y[:4]).all() and y[4:].isnan().all()


@pytest.mark.parametrize(
    "change,error,says",
    [
        (dict(x=torch.ones(6)), ValueError, r"x must be \[T, D\]"),
        (dict(x=torch.ones(6, 32).half()), TypeError, "x must be Float, BFloat16 or Double"),
        (dict(x=torch.ones(32, 6).T), ValueError, "x must be contiguous"),
        (dict(qkv_weight=torch.ones(60, 32)), ValueError, "qkv_weight must be"),
        (dict(qkv_bias=torch.ones(64).double()), TypeError, "qkv_bias must be Float, got Double"),
        (dict(out_weight=torch.ones(32, 30)), ValueError, "out_weight must be .* head_dim E = 8"),
        (dict(gate_up_weight=torch.ones(40, 32)), ValueError, "gate_up_weight must be"),
        (dict(down_weight=torch.ones(31, 40)), ValueError, "down_weight must be"),
        (dict(mlp_norm=torch.ones(31)), ValueError, "mlp_norm must be"),
        (dict(position=torch.zeros(5, dtype=torch.int64)), ValueError, "position must be"),
        (dict(num_kv_heads=3), ValueError, "num_kv_heads must divide H = 4, got 3"),
        (dict(head_dim=7), ValueError, "head_dim must be even and >= 2, got 7"),
        (dict(theta=0.0), ValueError, "theta must be finite and > 0"),
        (dict(eps=-1.0), ValueError, "eps must be finite and >= 0"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_input_is_named(change, error, says, device):
    D, F, H, K, E = SIZES[0]
    x, weights = make(D, F, H, K, E, 6)
    good = dict(x=x, position=positions([6]), cu_seqlens=offsets([6]), num_kv_heads=K, head_dim=E, **NUMBERS)
    good |= weights._asdict()
    call = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in {**good, **change}.items()}
    with pytest.raises(error, match=says):
        decoder_layer(weights=LayerWeights(**{n: call.pop(n) for n in LayerWeights._fields}), **call)


@pytest.mark.usefixtures("cpu_kernels")
def test_a_negative_position_and_wrong_offsets_are_named():
    D, F, H, K, E = SIZES[0]
    x, weights = make(D, F, H, K, E, 6)
    with pytest.raises(ValueError, match="position must be >= 0, got -1 at row 2"):
        decoder_layer(x, weights, torch.tensor([0, 1, -1, 2, 3, 4]), offsets([6]), num_kv_heads=K, head_dim=E, **NUMBERS)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0 and end at T = 6"):
        decoder_layer(x, weights, positions([6]), offsets([5]), num_kv_heads=K, head_dim=E, **NUMBERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias, dtype):
    D, F, H, K, E = SIZES[0]
    x, weights = make(D, F, H, K, E, 6, dtype, bias=bias)
    inputs = [None if t is None else t.requires_grad_() for t in (x, *weights)]
    torch.library.opcheck(
        torch.ops.grpo_engine.decoder_layer,
        (*inputs, positions([2, 4]), offsets([2, 4]), None, K, E, 1e4, 1e-6, True, False),
    )
    torch.library.opcheck(
        torch.ops.grpo_engine.decoder_layer_paged,
        (*(None if t is None else t.detach() for t in inputs), positions([6]), torch.zeros(2, K, E, 16, dtype=dtype),
         torch.zeros(2, K, 16, E, dtype=dtype), torch.arange(6), torch.tensor([[0]], dtype=torch.int32), offsets([6]),
         torch.tensor([6], dtype=torch.int32), 1e4, 1e-6),
    )  # fmt: skip

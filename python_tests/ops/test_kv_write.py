"""kv_write: reference, skipped slots, strided views, 64-bit addresses, contract, registration."""

import pytest
import reference
import torch

from grpo_engine.ops import kv_write

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def make(T=9, K=2, E=8, page=16, num_pages=5, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(T, K, E, generator=g).to(dtype) for _ in range(2))
    key_pages = torch.full((num_pages, K, E, page), float("nan"), dtype=dtype)
    value_pages = torch.full((num_pages, K, page, E), float("nan"), dtype=dtype)
    slot = torch.randperm(num_pages * page, generator=g)[:T]
    return key, value, key_pages, value_pages, slot


def same_bits(a, b):
    return torch.equal(a.nan_to_num(nan=1e4), b.nan_to_num(nan=1e4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K,E,page", [(1, 8, 16), (2, 20, 48), (3, 64, 32)])
def test_matches_reference_and_touches_nothing_else(K, E, page, dtype):
    key, value, key_pages, value_pages, slot = make(13, K, E, page, dtype=dtype)
    slot[3] = slot[11] = -1
    want = reference.kv_write(key, value, key_pages, value_pages, slot)
    kv_write(key, value, key_pages, value_pages, slot)
    assert same_bits(key_pages, want[0]) and same_bits(value_pages, want[1])


def test_strided_views_of_a_fused_projection():
    g = torch.Generator().manual_seed(2)
    qkv = torch.randn(9, 8 * 8, generator=g)
    key, value = qkv[:, 32:48].view(9, 2, 8), qkv[:, 48:].view(9, 2, 8)
    _, _, key_pages, value_pages, slot = make()
    want = reference.kv_write(key, value, key_pages, value_pages, slot)
    kv_write(key, value, key_pages, value_pages, slot)
    assert same_bits(key_pages, want[0]) and same_bits(value_pages, want[1])


def test_first_and_last_slot_and_no_rows():
    key, value, key_pages, value_pages, _ = make(T=2)
    kv_write(key, value, key_pages, value_pages, torch.tensor([0, 79]))
    assert torch.equal(key_pages[0, :, :, 0], key[0]) and torch.equal(key_pages[4, :, :, 15], key[1])
    assert torch.equal(value_pages[4, :, 15], value[1])
    before = key_pages.clone()
    kv_write(key[:0], value[:0], key_pages, value_pages, torch.empty(0, dtype=torch.int64))
    assert same_bits(key_pages, before)


def test_of_two_tokens_with_one_slot_the_later_wins(on_threads):
    key, value, key_pages, value_pages, slot = make(T=4000, K=23, num_pages=8)
    slot = torch.arange(4000) % 128

    def run():
        pages = key_pages.clone(), value_pages.clone()
        kv_write(key, value, *pages, slot)
        return pages

    last = [max(t for t in range(4000) if t % 128 == s) for s in range(128)]
    for keys, values in on_threads(run):
        assert torch.equal(keys.permute(0, 3, 1, 2).reshape(128, 23, 8), key[last])
        assert torch.equal(values.permute(0, 2, 1, 3).reshape(128, 23, 8), value[last])


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("bad", [-2, 80, 2**40])
def test_a_slot_out_of_range_is_refused_before_anything_is_written(bad):
    key, value, key_pages, value_pages, slot = make()
    slot[5] = bad
    with pytest.raises(ValueError, match=rf"kv_write: slot must be -1 or in \[0, 80\), got {bad} at row 5"):
        kv_write(key, value, key_pages, value_pages, slot)
    assert key_pages.isnan().all() and value_pages.isnan().all()


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("bad", [-2, 80, 2**40])
def test_a_slot_out_of_range_is_skipped_on_cuda(bad):
    key, value, key_pages, value_pages, slot = make()
    slot[5] = -1
    want = reference.kv_write(key, value, key_pages, value_pages, slot)
    slot[5] = bad
    kv_write(key, value, key_pages, value_pages, slot)
    assert same_bits(key_pages, want[0]) and same_bits(value_pages, want[1])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "name,tensor,error,says",
    [
        ("key", torch.zeros(9, 8), ValueError, r"key must be \[T, K, E\].*got \[9, 8\]"),
        ("key", torch.zeros(9, 2, 8).int(), TypeError, "key must be Float, BFloat16 or Double"),
        ("key", torch.zeros(9, 8, 2).mT, ValueError, "key must be contiguous in its last two axes"),
        ("value", torch.zeros(9, 2, 7), ValueError, r"value must be \[T, K, E\] = \[9, 2, 8\], got"),
        ("value", torch.zeros(9, 2, 8).bfloat16(), TypeError, "value must be Float, got BFloat16"),
        ("key_pages", torch.zeros(5, 2, 16, 8), ValueError, r"key_pages must be \[num_pages, K, E, page\]"),
        ("key_pages", torch.zeros(5, 2, 8, 24), ValueError, r"multiple of 16, got \[5, 2, 8, 24\]"),
        ("key_pages", torch.zeros(5, 2, 16, 8).mT, ValueError, "key_pages must be contiguous"),
        ("value_pages", torch.zeros(4, 2, 16, 8), ValueError, r"value_pages must be .*\[5, 2, 16, 8\], got"),
        ("slot", torch.zeros(8).long(), ValueError, r"slot must be \[T\] = \[9\], got \[8\]"),
        ("slot", torch.zeros(9).int(), TypeError, "slot must be Long, got Int"),
    ],
)
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, name, tensor, error, says):
    given = dict(zip(("key", "value", "key_pages", "value_pages", "slot"), make(), strict=True))
    given[name] = tensor
    with pytest.raises(error, match="kv_write: .*" + says):
        kv_write(**{k: v.to(device) for k, v in given.items()})


def test_registration():
    torch.library.opcheck(torch.ops.grpo_engine.kv_write.default, make())

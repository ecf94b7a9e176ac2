"""paged_attention: float64 reference, the bits of ragged_attention, poisoned pages, contract."""

import pytest
import reference
import torch
from bars import assert_as_good_as_torch

from grpo_engine.ops import kv_write, paged_attention, ragged_attention

pytestmark = pytest.mark.usefixtures("device")

NAN = float("nan")
# H, K, E: GQA ratios 1, 2, 7; widths off and at the vector width; Qwen2.5 heads
HEADS = [(2, 2, 8), (4, 2, 20), (7, 1, 16), (14, 2, 64), (2, 1, 128)]
LENGTHS = [1, 15, 16, 17, 33, 47, 48, 49, 140]  # keys: page - 1, page, page + 1 for pages of 16 and 48


class Cache:
    """Sequences in shuffled pages; every slot that nothing was written to holds NaN."""

    def __init__(self, lengths, H, K, E, dtype, page=16, seed=0, shuffle=1):
        g = torch.Generator().manual_seed(seed)
        self.lengths, self.page = lengths, page
        self.query, self.key, self.value = (
            [torch.randn(n, heads, E, generator=g).to(dtype) for n in lengths] for heads in (H, K, K)
        )
        self.scale = E**-0.5
        pages = [-(-n // page) for n in lengths]
        spare = 3
        order = torch.randperm(sum(pages) + spare, generator=torch.Generator().manual_seed(shuffle)).int()
        width = max(pages, default=0) + 2
        self.page_table = torch.full((len(lengths), width), -1, dtype=torch.int32)
        used = 0
        for n, count in enumerate(pages):
            self.page_table[n, :count] = order[used : used + count]
            self.page_table[n, count + 1 :] = 2**31 - 1
            used += count
        self.key_pages = torch.full((len(order), K, E, page), NAN, dtype=dtype)
        self.value_pages = torch.full((len(order), K, page, E), NAN, dtype=dtype)
        for n in range(len(lengths)):
            self.write(n, 0, lengths[n])

    def write(self, n, begin, end):
        position = torch.arange(begin, end)
        slot = self.page_table[n, position // self.page].long() * self.page + position % self.page
        kv_write(self.key[n][begin:end], self.value[n][begin:end], self.key_pages, self.value_pages, slot)

    def arguments(self, queries, sequences=None, kv_len=None):
        """The last queries[i] tokens of each sequence, or those that end at kv_len[i]."""
        sequences = list(range(len(self.lengths))) if sequences is None else sequences
        kv_len = [self.lengths[n] for n in sequences] if kv_len is None else kv_len
        rows = [self.query[n][b - q : b] for n, q, b in zip(sequences, queries, kv_len, strict=True)]
        return (
            torch.cat(rows), self.key_pages, self.value_pages, self.page_table[sequences],
            torch.tensor([0, *queries]).cumsum(0).int(), torch.tensor(kv_len, dtype=torch.int32),
        )  # fmt: skip

    def attend(self, queries, sequences=None, kv_len=None):
        return paged_attention(*self.arguments(queries, sequences, kv_len), scale=self.scale)

    def ragged(self):
        cu = torch.tensor([0, *self.lengths]).cumsum(0).int()
        packed = [torch.cat(x) for x in (self.query, self.key, self.value)]
        return ragged_attention(*packed, cu, scale=self.scale).split(self.lengths)


def plain(cache, queries):
    out = []
    for n, count in enumerate(queries):
        L = cache.lengths[n]
        q, k, v = (x.transpose(0, 1)[None] for x in (cache.query[n][L - count :], cache.key[n], cache.value[n]))
        mask = torch.ones(count, L, dtype=torch.bool).tril(L - count)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=cache.scale)
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page", [16, 48])
@pytest.mark.parametrize("H,K,E", HEADS)
def test_decode_and_prefill_are_as_good_as_torch(H, K, E, page, dtype):
    cache = Cache([1, 15, 16, 17, 33, 48, 49], H, K, E, dtype, page)
    for queries in ([1] * 7, [1, 15, 16, 2, 20, 1, 7]):
        exact = reference.paged_attention(*cache.arguments(queries), cache.scale)
        ours = cache.attend(queries)
        assert ours.dtype == dtype
        assert_as_good_as_torch(ours, plain(cache, queries), exact, floor=2.0**-22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("page", [16, 48])
@pytest.mark.parametrize("H,K,E", HEADS)
def test_paged_equals_ragged_bitwise(H, K, E, page, dtype):
    cache = Cache(LENGTHS, H, K, E, dtype, page)
    trained = cache.ragged()
    whole = cache.attend(LENGTHS).split(LENGTHS)  # prefill
    last = cache.attend([1] * len(LENGTHS))  # decode
    for n in range(len(LENGTHS)):
        assert torch.equal(whole[n], trained[n])
        assert torch.equal(last[n], trained[n][-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences_equal_ragged_bitwise(dtype):
    # CUDA gives every 256 keys of these few rows to a warp of their own; in ragged_attention one has them all
    lengths = [255, 256, 257, 600]
    cache = Cache(lengths, 4, 2, 20, dtype)
    trained = cache.ragged()
    for queries in (lengths, [1] * 4, [3, 256, 2, 90]):
        for n, rows in enumerate(cache.attend(queries).split(queries)):
            assert torch.equal(rows, trained[n][-queries[n] :])
    exact = reference.paged_attention(*cache.arguments([9] * 4), cache.scale)
    assert_as_good_as_torch(cache.attend([9] * 4), plain(cache, [9] * 4), exact, floor=2.0**-22)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H,K,E", [(2, 1, 300), (3, 3, 1), (9, 1, 40)])
def test_wide_heads_and_many_heads_of_a_kv_head(H, K, E, dtype):
    cache = Cache([40, 3], H, K, E, dtype)
    exact = reference.paged_attention(*cache.arguments([20, 3]), cache.scale)
    ours = cache.attend([20, 3])
    assert_as_good_as_torch(ours, plain(cache, [20, 3]), exact, floor=2.0**-22)
    assert torch.equal(ours, torch.cat([rows[-n:] for rows, n in zip(cache.ragged(), [20, 3], strict=True)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_chunked_prefill_equals_whole_bitwise(chunk, dtype):
    cache = Cache([140], 4, 2, 20, dtype)
    whole = cache.attend([140])
    cache.key_pages.fill_(NAN), cache.value_pages.fill_(NAN)
    parts = []
    for begin in range(0, 140, chunk):
        end = min(begin + chunk, 140)
        cache.write(0, begin, end)  # later slots still hold NaN
        parts.append(cache.attend([end - begin], kv_len=[end]))
    assert torch.equal(torch.cat(parts), whole)


def test_shuffled_physical_pages_change_no_bit():
    a, b = (Cache(LENGTHS, 4, 2, 16, torch.float32, shuffle=s) for s in (1, 2))
    assert not torch.equal(a.page_table, b.page_table)
    assert torch.equal(a.attend(LENGTHS), b.attend(LENGTHS))


def test_alone_and_in_a_batch_in_any_order_bitwise(on_threads):
    cache = Cache(LENGTHS * 3, 6, 2, 16, torch.float32)
    queries = [1, 2, 16, 5, 1, 47, 1, 1, 130] * 3
    one, *others = on_threads(lambda: cache.attend(queries))
    assert all(torch.equal(one, other) for other in others)
    parts = one.split(queries)
    for n in range(len(queries)):
        assert torch.equal(cache.attend([queries[n]], [n]), parts[n])
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = cache.attend([queries[n] for n in order], order)
    assert torch.equal(mixed, torch.cat([parts[n] for n in order]))


def test_sequences_may_share_the_pages_of_a_prompt():
    cache = Cache([32, 40, 35], 4, 2, 16, torch.float32)
    alone = cache.attend([1, 1, 1])
    for n in (1, 2):
        cache.key[n][:32], cache.value[n][:32] = cache.key[0], cache.value[0]
        cache.write(n, 0, 32)
    own = cache.attend([1, 1, 1])
    cache.page_table[1:, :2] = cache.page_table[0, :2]
    assert torch.equal(cache.attend([1, 1, 1]), own) and not torch.equal(own[1:], alone[1:])


CHUNK = 128  # keys that CUDA takes at a time where bfloat16 heads are up to 128 wide


def groups(prompt, sizes, H, K, E, dtype):
    """Groups of responses, every other of one token, each behind its prompt; every prompt a copy in own pages."""
    responses = [1 + i % 2 * (CHUNK + 3) for size in sizes for i in range(size)]
    cache = Cache([prompt + n for n in responses], H, K, E, dtype)
    first = 0
    for size in sizes:
        for n in range(first + 1, first + size):
            cache.key[n][:prompt], cache.value[n][:prompt] = cache.key[first][:prompt], cache.value[first][:prompt]
            cache.write(n, 0, prompt)
        first += size
    return cache


def share_prompts(cache, prompt, sizes):
    """Each group's full pages of the prompt become those of its first sequence; nothing is left in the others'."""
    pages, first = prompt // cache.page, 0
    for size in sizes:
        own = cache.page_table[first + 1 : first + size, :pages]
        if own.numel():
            cache.key_pages[own.long()] = cache.value_pages[own.long()] = NAN
            own.copy_(cache.page_table[first, :pages].expand_as(own).clone())
        first += size


@pytest.mark.parametrize("prompt", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 20])
@pytest.mark.parametrize("H,K,E", [(7, 1, 64), (2, 2, 16), (2, 1, 128)])
def test_a_shared_prompt_changes_no_bit(H, K, E, prompt):
    sizes = [1, 2, 17, 1]
    cache = groups(prompt, sizes, H, K, E, torch.bfloat16)
    own = cache.attend([1] * 21)
    alone = [cache.attend([1], [n]) for n in (0, 2, 20)]
    share_prompts(cache, prompt, sizes)
    assert torch.equal(cache.attend([1] * 21), own)
    assert torch.equal(torch.cat(alone), own[[0, 2, 20]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_that_share_pages_in_part_or_are_not_neighbours(dtype):
    cache = groups(2 * CHUNK, [5], 3, 1, 16, dtype)
    for n, page in [(1, 7), (2, 8), (4, 15)]:  # the last or first page of a chunk is another
        cache.key[n][page * 16 : page * 16 + 16] *= 2
        cache.write(n, page * 16, page * 16 + 16)
    own = cache.attend([1] * 5)
    exact = reference.paged_attention(*cache.arguments([1] * 5), cache.scale)
    assert_as_good_as_torch(own, plain(cache, [1] * 5), exact, floor=2.0**-22)
    for n, kept in [(1, 7), (2, 8), (3, None), (4, 15)]:
        pages = [i for i in range(16) if i != kept]
        cache.page_table[n, pages] = cache.page_table[0, pages]
    assert torch.equal(cache.attend([1] * 5), own)
    assert torch.equal(cache.attend([1, 2, 1, 0, 1])[[0, 2, 3, 4]], own[[0, 1, 2, 4]])  # nor have they one token each
    cache.page_table = torch.cat([cache.page_table, torch.full((5, 20), -1, dtype=torch.int32)], dim=1)
    assert torch.equal(cache.attend([1] * 5), own)


def test_a_table_with_room_changes_no_bit():
    # on CUDA a table for one chunk of keys needs no second kernel, a longer one does
    for H, K, E in [(66, 1, 16), (2, 2, 64)]:
        cache = Cache([1, 40, 90], H, K, E, torch.bfloat16)
        short = cache.attend([1, 1, 1])
        cache.page_table = torch.cat([cache.page_table, torch.full((3, 30), -1, dtype=torch.int32)], dim=1)
        assert torch.equal(cache.attend([1, 1, 1]), short)
        assert torch.equal(short, torch.stack([rows[-1] for rows in cache.ragged()]))


def test_nan_in_one_of_a_group_leaves_the_others():
    sizes = [3]
    cache = groups(CHUNK, sizes, 7, 1, 64, torch.bfloat16)
    share_prompts(cache, CHUNK, sizes)
    clean = cache.attend([1] * 3)
    for pages in (cache.key_pages, cache.value_pages):
        for position, lost in [(CHUNK + 1, [1]), (CHUNK - 1, [0, 1, 2])]:  # its own token, one of the prompt
            page = int(cache.page_table[1, position // 16])
            kept = pages[page].clone()
            token = (page, 0, slice(None), position % 16) if pages is cache.key_pages else (page, 0, position % 16)
            pages[token] = NAN
            out = cache.attend([1] * 3)
            pages[page] = kept
            others = [n for n in range(3) if n not in lost]
            assert out[lost].isnan().all() and torch.equal(out[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_reach_the_same_rows_in_both_ops(dtype):
    cache = Cache([150], 3, 1, 16, dtype)
    for token, e, x in [(3, 2, float("inf")), (70, 5, NAN), (140, 2, -float("inf")), (145, 7, float("inf"))]:
        cache.value[0][token, 0, e] = x
    cache.write(0, 0, 150)
    (trained,) = cache.ragged()
    assert torch.equal(trained.isfinite().all(dim=0).all(dim=0), torch.tensor([e not in (2, 5, 7) for e in range(16)]))
    assert trained[145:, :, 7].isposinf().all() and trained[:145, :, 7].isfinite().all()
    for n in (2, 3, 71, 141, 146, 150):
        torch.testing.assert_close(cache.attend([1], kv_len=[n])[0], trained[n - 1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(cache.attend([150]), trained, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kv_len", [1, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_unused_slots_does_not_matter(kv_len, dtype):
    cache = Cache([kv_len], 4, 2, 20, dtype)
    poisoned = cache.attend([1])
    assert cache.key_pages.isnan().any()
    cache.key_pages.nan_to_num_(nan=0.5), cache.value_pages.nan_to_num_(nan=-3.0)
    assert torch.equal(cache.attend([1]), poisoned) and poisoned.isfinite().all()


def test_nan_in_a_visible_key_reaches_its_own_kv_head_only():
    cache = Cache([20, 20], 4, 2, 16, torch.float32)
    clean = cache.attend([5, 5])
    page, offset = int(cache.page_table[0, 1]), 1  # position 17
    cache.value_pages[page, 1, offset] = NAN
    out = cache.attend([5, 5])
    assert out[2:5, 2:].isnan().all()
    out[2:5, 2:] = clean[2:5, 2:]
    assert torch.equal(out, clean)


def test_sequences_without_new_tokens_and_empty_batches():
    cache = Cache([17, 40, 3], 4, 2, 16, torch.float32)
    queries = [0, 2, 0]
    want = cache.attend([2], [1])
    cache.page_table[0] = cache.page_table[2] = -1  # nobody reads their pages
    assert torch.equal(cache.attend(queries), want)
    query, key_pages, value_pages, _, _, _ = cache.arguments([0, 0, 0])
    for N in (0, 2):
        out = paged_attention(
            query, key_pages, value_pages, torch.zeros(N, 0, dtype=torch.int32),
            torch.zeros(N + 1, dtype=torch.int32), torch.zeros(N, dtype=torch.int32), scale=1.0,
        )  # fmt: skip
        assert out.shape == (0, 4, 16)


def call(cache, queries=(1, 1), **change):
    names = ("query", "key_pages", "value_pages", "page_table", "cu_query", "kv_len")
    given = dict(zip(names, cache.arguments(list(queries)), strict=True))
    return paged_attention(**{**given, "scale": 1.0, **change})


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("entry", [-1, 6, 2**31 - 1])
def test_a_needed_page_out_of_range_is_refused(entry):
    cache = Cache([20, 20], 2, 1, 8, torch.float32)
    cache.key_pages, cache.value_pages = cache.key_pages[:6], cache.value_pages[:6]
    cache.page_table.clamp_(max=5)
    cache.page_table[1, 1] = entry
    says = rf"page_table must be in \[0, 6\) for the first 2 pages of sequence 1, got {entry} at page 1"
    with pytest.raises(ValueError, match="paged_attention: " + says):
        call(cache)
    cache.page_table[:, :2].clamp_(0, 5)
    cache.page_table[1, 2] = entry  # not needed
    call(cache)


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("entry", [-1, 6, 2**31 - 1])
def test_a_page_out_of_range_makes_the_rows_that_see_it_nan_on_cuda(entry):
    cache = Cache([20, 20], 2, 1, 8, torch.float32)
    cache.key_pages, cache.value_pages = cache.key_pages[:6], cache.value_pages[:6]
    cache.page_table.clamp_(max=5)
    cache.key_pages.nan_to_num_(), cache.value_pages.nan_to_num_()  # those of the page cut off are lost
    clean = call(cache, (1, 6))
    cache.page_table[1, 1] = entry
    out = call(cache, (1, 6))  # positions 14 .. 19 of the second; the page begins at 16
    assert torch.equal(out[:3], clean[:3]) and out[3:].isnan().all()


@pytest.mark.usefixtures("cuda_kernels")
def test_rows_of_lengths_that_do_not_fit_become_nan_on_cuda():
    cache = Cache([20, 20], 2, 1, 8, torch.float32)
    clean = call(cache, (1, 3))
    for kv_len in (2, -5, 65, 2**31 - 1):
        out = call(cache, (1, 3), kv_len=torch.tensor([20, kv_len], dtype=torch.int32))
        assert torch.equal(out[:1], clean[:1]) and out[1:].isnan().all()
    for cu in ([0, 1, 1], [0, 1, 5], [0, 1, -1]):
        out = call(cache, (1, 3), cu_query=torch.tensor(cu, dtype=torch.int32))
        assert torch.equal(out[:1], clean[:1]) and out[1:].isnan().all()
    out = call(cache, (1, 3), cu_query=torch.tensor([1, 1, 4], dtype=torch.int32))
    assert out[:1].isnan().all() and torch.equal(out[1:], clean[1:])


@pytest.mark.usefixtures("cpu_kernels")
def test_lengths_that_do_not_fit_are_refused():
    cache = Cache([20, 20], 2, 1, 8, torch.float32)
    says = "kv_len must be at least the 3 new tokens of its sequence, got 2 at sequence 1"
    with pytest.raises(ValueError, match="paged_attention: " + says):
        call(cache, (1, 3), kv_len=torch.tensor([20, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="got 0 at sequence 0"):
        call(cache, kv_len=torch.tensor([0, 20], dtype=torch.int32))
    says = "page_table has 4 pages a sequence, but kv_len 65 needs 5 at sequence 0"
    with pytest.raises(ValueError, match="paged_attention: " + says):
        call(cache, kv_len=torch.tensor([65, 20], dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_query must start at 0 and end at T = 2, got 0 and 1"):
        call(cache, cu_query=torch.tensor([0, 1, 1], dtype=torch.int32))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "name,value,error,says",
    [
        ("query", torch.zeros(2, 16), ValueError, r"query must be \[T, H, E\].*got \[2, 16\]"),
        ("query", torch.zeros(2, 3, 8), ValueError, "key_pages must have .* divides H = 3, got 2"),
        ("query", torch.zeros(2, 8, 4).mT, ValueError, "query must be contiguous in its last two"),
        ("key_pages", torch.zeros(7, 2, 9, 16), ValueError, r"key_pages must be .*\[-1, -1, 8, -1\]"),
        ("key_pages", torch.zeros(7, 2, 8, 20), ValueError, "multiple of 16, got"),
        ("key_pages", torch.zeros(7, 2, 8, 16).double(), TypeError, "key_pages must be Float"),
        ("value_pages", torch.zeros(7, 2, 8, 16), ValueError, r"value_pages must be .*\[7, 2, 16, 8\]"),
        ("page_table", torch.zeros(3, 4).int(), ValueError, r"page_table must be .*\[2, -1\], got"),
        ("page_table", torch.zeros(2, 4).long(), TypeError, "page_table must be Int, got Long"),
        ("cu_query", torch.zeros(3).long(), TypeError, "cu_query must be Int, got Long"),
        ("kv_len", torch.zeros(3).int(), ValueError, r"kv_len must be \[N\] = \[2\], got \[3\]"),
        ("scale", -1.0, ValueError, "scale must be finite and > 0, got -1"),
    ],
)
def test_a_bad_input_is_told_what_was_wanted_and_what_came(device, name, value, error, says):
    cache = Cache([20, 20], 4, 2, 8, torch.float32)
    names = ("query", "key_pages", "value_pages", "page_table", "cu_query", "kv_len", "scale")
    given = dict(zip(names, (*cache.arguments([1, 1]), 1.0), strict=True)) | {name: value}
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(error, match="paged_attention: .*" + says):
        paged_attention(**moved)


def test_registration():
    cache = Cache([20, 3], 4, 2, 8, torch.float32)
    cache.key_pages.nan_to_num_(), cache.value_pages.nan_to_num_()
    torch.library.opcheck(torch.ops.grpo_engine.paged_attention.default, (*cache.arguments([2, 1]), 0.3))

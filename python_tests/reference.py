"""Float64 textbook versions of every op.  Imports nothing from grpo_engine and shares no line with it.

Inputs may have any floating dtype; everything is computed and returned in float64, and gradients come
from torch autograd on these functions.
"""

import torch

# ---------------------------------------------------------------- sample_token


# ---------------------------------------------------------------- gather_logprob and token_logprob


# ---------------------------------------------------------------- group_advantages


def group_advantages(rewards, std, eps):
    r = rewards.double()
    centred = r - r.mean(dim=1, keepdim=True)
    if std == "none":
        return centred
    correction = 1 if std == "unbiased" else 0
    return centred / (r.std(dim=1, keepdim=True, correction=correction) + eps)


# ---------------------------------------------------------------- policy_loss


# ---------------------------------------------------------------- rms_norm


def rms_norm(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


# ---------------------------------------------------------------- rope


def rope(x, position, theta):
    """The frequencies and angles are float32 by definition; the rest is float64."""
    E = x.shape[-1]
    exponent = (torch.arange(0, E, 2) / E).float()
    frequency = 1 / (theta ** exponent.double()).float()
    angle = (position.float()[:, None] * frequency).double()[:, None, :]
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.view_as_complex(torch.stack([first, second], dim=-1)) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([turned.real, turned.imag], dim=-1)


# ---------------------------------------------------------------- swiglu


# ---------------------------------------------------------------- linear


# ---------------------------------------------------------------- kv_write, paged_attention, ragged_attention


def kv_write(key, value, key_pages, value_pages, slot):
    """Returns new pages; the inputs stay as they are."""
    key_pages, value_pages = key_pages.clone(), value_pages.clone()
    page = key_pages.shape[-1]
    for t, s in enumerate(slot.tolist()):
        if s >= 0:
            key_pages[s // page, :, :, s % page] = key[t]
            value_pages[s // page, :, s % page, :] = value[t]
    return key_pages, value_pages


def attention_row(query, key, value, scale):
    """query [H, E] against the keys it sees, [L, K, E]."""
    group = query.shape[0] // key.shape[1]
    key = key.double().repeat_interleave(group, dim=1)
    value = value.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("he,lhe->hl", query.double(), key) * scale
    return torch.einsum("hl,lhe->he", scores.softmax(dim=-1), value)


def ragged_attention(query, key, value, cu_seqlens, scale):
    rows = [query.new_zeros((0, *query.shape[1:]), dtype=torch.float64)]
    bounds = cu_seqlens.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        rows += [
            attention_row(query[t], key[begin : t + 1], value[begin : t + 1], scale)[None]
            for t in range(begin, end)
        ]
    return torch.cat(rows)


def paged_attention(query, key_pages, value_pages, page_table, cu_query, kv_len, scale):
    page = key_pages.shape[-1]
    rows = [query.new_zeros((0, *query.shape[1:]), dtype=torch.float64)]
    bounds = cu_query.tolist()
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        for t in range(begin, end):
            visible = int(kv_len[n]) - (end - 1 - t)
            slots = [(int(page_table[n, j // page]), j % page) for j in range(visible)]
            key = torch.stack([key_pages[p, :, :, o] for p, o in slots])
            value = torch.stack([value_pages[p, :, o, :] for p, o in slots])
            rows.append(attention_row(query[t], key, value, scale)[None])
    return torch.cat(rows)

"""Float64 textbook versions of every op.  Imports nothing from grpo_engine and shares no line with it.

Inputs may have any floating dtype; everything is computed and returned in float64, and gradients come
from torch autograd on these functions.
"""

import torch

# ---------------------------------------------------------------- sample_token


def philox4x32_10(counter, key):
    """Ten rounds of Philox (Salmon et al. 2011) on int64 tensors that hold 32-bit words."""
    low = 0xFFFFFFFF
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32 & low) ^ c[1] ^ k[0],
            second & low,
            (first >> 32 & low) ^ c[3] ^ k[1],
            first & low,
        ]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return c


def philox_uniform(seed, position):
    """Uniforms in (0, 1) of seeds and positions, int64 tensors: 53 bits of one Philox block."""
    low = 0xFFFFFFFF
    zero = torch.zeros_like(position)
    words = philox4x32_10((position & low, position >> 32 & low, zero, zero), (seed & low, seed >> 32 & low))
    return ((words[0] << 21 | words[1] >> 11).double() + 0.5) / 2**53


def kept_tokens(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """What the filters keep of one row, and how near the nearest token is to the other side.

    top-k (ties: lowest ids first), then top-p of what is left and renormalised (ties with the last
    token stay), then min-p.
    """
    z = logits.double() / temperature
    p = torch.softmax(z, dim=0)
    best_first = torch.sort(z, descending=True, stable=True).indices
    keep, margin = p > 0, 1.0
    if top_k is not None and 0 < top_k < z.numel():
        keep[best_first[top_k:]] = False
    if top_p is not None and top_p < 1:
        share = torch.where(keep, p, 0.0)[best_first].cumsum(0)
        share = share / share[-1]
        last = z[best_first[int((share < top_p).sum())]]
        margin = min(margin, float((share - top_p).abs().min()))
        keep &= z >= last
    if min_p is not None and min_p > 0:
        ratio = p / p.max()
        margin = min([margin, *(ratio[ratio < 1] - min_p).abs().tolist()])
        keep &= ratio >= min_p
    return keep, margin


def sample_token(logits, u, *, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """One row by the inverse of its cumulative distribution.

    Returns (token, logprob, full_logprob, entropy, margin); a margin near 0 says that rounding may
    move the token.
    """
    if temperature == 0:
        full = torch.log_softmax(logits.double(), dim=0)
        entropy = -torch.special.xlogy(full.exp(), full.exp()).sum()
        token = int((logits == logits.max()).nonzero()[0])
        return token, 0.0, float(full[token]), float(entropy), 1.0
    full = torch.log_softmax(logits.double() / temperature, dim=0)
    p = full.exp()
    entropy = -torch.special.xlogy(p, p).sum()
    keep, margin = kept_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    q = torch.where(keep, p, 0.0)
    q = q / q.sum()
    cumulative = q.cumsum(0)
    token = int(((cumulative >= u) & (q > 0)).nonzero()[0])
    margin = min(margin, float((cumulative - u).abs().min()))
    return token, float(q[token].log()), float(full[token]), float(entropy), margin


# ---------------------------------------------------------------- gather_logprob and token_logprob


def gather_logprob(logits, target, temperature):
    log_p = torch.log_softmax(logits.double() / temperature, dim=-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(dim=-1)
    return log_p.gather(1, target[:, None])[:, 0], entropy


def token_logprob(hidden, weight, target, temperature):
    return gather_logprob(hidden.double() @ weight.double().T, target, temperature)


# ---------------------------------------------------------------- group_advantages


def group_advantages(rewards, std, eps):
    r = rewards.double()
    centred = r - r.mean(dim=1, keepdim=True)
    if std == "none":
        return centred
    correction = 1 if std == "unbiased" else 0
    return centred / (r.std(dim=1, keepdim=True, correction=correction) + eps)


# ---------------------------------------------------------------- policy_loss


def policy_loss(
    logprob, *, advantage, cu_seqlens, old_logprob=None, ref_logprob=None, mask=None,
    ratio="token", objective="clip", clip_low=0.2, clip_high=0.2, dual_clip=3.0, kl="k3",
    kl_coef=0.0, kl_ratio=False, aggregation="token_mean", num_tokens=None, num_sequences=None,
    constant_length=None,
):  # fmt: skip
    """(loss, stats): one sequence after another, on its kept tokens only."""
    N = len(cu_seqlens) - 1
    keep = torch.ones(len(logprob), dtype=torch.bool) if mask is None else mask
    num_tokens = max(int(keep.sum()), 1) if num_tokens is None else num_tokens
    num_sequences = max(N, 1) if num_sequences is None else num_sequences
    names = "tokens policy_loss kl_loss kl ratio ratio_max clip_low clip_high dual_clip mismatch_max"
    stats = dict.fromkeys(names.split(), 0.0)
    loss = torch.zeros((), dtype=torch.float64)
    for n in range(N):
        ids = [t for t in range(int(cu_seqlens[n]), int(cu_seqlens[n + 1])) if keep[t]]
        if not ids:
            continue
        new, A = logprob.double()[ids], advantage.double()[ids]
        old = new.detach() if old_logprob is None else old_logprob.double()[ids]
        log_ratio = torch.clamp(new - old, -20, 20)
        if ratio == "sequence":
            log_ratio = log_ratio.mean().expand(len(ids))
        r = torch.exp(log_ratio)
        clipped = torch.clamp(r, 1 - clip_low, 1 + clip_high)
        if objective == "cispo":
            term = -clipped.detach() * A * new
        else:
            term = -torch.minimum(r * A, clipped * A)
            if dual_clip is not None:
                bound = -dual_clip * A
                stats["dual_clip"] += int(((A < 0) & (term > bound)).sum())
                term = torch.where(A < 0, torch.minimum(term, bound), term)
        estimate = torch.zeros_like(new)
        if ref_logprob is not None:
            e = torch.clamp(ref_logprob.double()[ids] - new, -20, 20)
            estimate = {"k1": -e, "k2": 0.5 * e**2, "k3": torch.expm1(e) - e}[kl]
            if kl_ratio:
                estimate = estimate * r
        weight = {
            "token_mean": 1 / num_tokens,
            "sequence_mean": 1 / (num_sequences * len(ids)),
            "constant": 1 / (num_sequences * (constant_length or 1)),
        }[aggregation]
        loss = loss + weight * term.sum() + weight * kl_coef * estimate.sum()
        stats["tokens"] += len(ids)
        stats["policy_loss"] += float((weight * term.sum()).detach())
        stats["kl_loss"] += float((weight * kl_coef * estimate.sum()).detach())
        stats["kl"] += float(estimate.sum().detach())
        stats["ratio"] += float(r.sum().detach())
        stats["ratio_max"] = max(stats["ratio_max"], float(r.max().detach()))
        stats["clip_low"] += int(((A < 0) & (r < 1 - clip_low)).sum())
        stats["clip_high"] += int(((A > 0) & (r > 1 + clip_high)).sum())
        stats["mismatch_max"] = max(stats["mismatch_max"], float((new - old).detach().abs().max()))
    return loss, torch.tensor(list(stats.values()), dtype=torch.float64)


# ---------------------------------------------------------------- rms_norm


def rms_norm(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


# ---------------------------------------------------------------- rope


def rope(x, position, theta, frequency=None):
    """The frequencies and angles are float32 by definition; the rest is float64."""
    E = x.shape[-1]
    exponent = (torch.arange(0, E, 2) / E).float()
    if frequency is None:
        frequency = 1 / (theta ** exponent.double()).float()
    angle = (position.float()[:, None] * frequency).double()[:, None, :]
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.view_as_complex(torch.stack([first, second], dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


# ---------------------------------------------------------------- swiglu


def swiglu(gate_up):
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# ---------------------------------------------------------------- linear


def linear(x, weight, bias=None):
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


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


def ragged_attention(query, key, value, cu_seqlens, scale, cu_groups=None):
    rows = [query.new_zeros((0, *query.shape[1:]), dtype=torch.float64)]
    bounds = cu_seqlens.tolist()
    heads = range(len(bounds)) if cu_groups is None else cu_groups.tolist()
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        head = max(h for h in heads if h <= n)
        prompt = range(bounds[head], bounds[head + 1]) if head < n else range(0)
        for t in range(begin, end):
            seen = [*prompt, *range(begin, t + 1)]
            rows.append(attention_row(query[t], key[seen], value[seen], scale)[None])
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


# ---------------------------------------------------------------- adamw


def adamw(params, grads, exp_avg, exp_avg_sq, steps, *, lr, betas, eps, weight_decay, clip_norm):
    """(norm, (params, exp_avg, exp_avg_sq) after the step), all float64; nothing is written."""
    norm = sum(g.double().square().sum() for g in grads).sqrt().item()
    factor = min(1.0, clip_norm / (norm + 1e-6))
    after = ([], [], [])
    for p, g, m, v, step in zip(params, grads, exp_avg, exp_avg_sq, steps, strict=True):
        p, g, m, v, t = p.double(), g.double() * factor, m.double(), v.double(), float(step) + 1
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        hat_m, hat_v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        for out, x in zip(after, ((1 - lr * weight_decay) * p - lr * hat_m / (hat_v.sqrt() + eps), m, v), strict=True):
            out.append(x)
    return norm, after

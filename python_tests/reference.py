"""Float64 textbook versions of every op.  Imports nothing from grpo_engine and shares no line with it.

Inputs may have any floating dtype; everything is computed and returned in float64, and gradients come
from torch autograd on these functions.
"""

import torch

# ---------------------------------------------------------------- sample_token


# ---------------------------------------------------------------- gather_logprob and token_logprob


def gather_logprob(logits, target, temperature):
    log_p = torch.log_softmax(logits.double() / temperature, dim=-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(dim=-1)
    return log_p.gather(1, target[:, None])[:, 0], entropy


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


# ---------------------------------------------------------------- swiglu


def swiglu(gate_up):
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# ---------------------------------------------------------------- linear


def linear(x, weight, bias=None):
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


# ---------------------------------------------------------------- kv_write, paged_attention, ragged_attention

"""The ops alone, in a trainer of your own: sampling, log-probs with gradient and the policy loss; the rest is torch.

    python examples/ops_alone.py

A table of hidden states, eight for each prompt, and a head learn to say eight numbers in ascending order. No model of this
package is used, and nothing but torch is needed.
"""

import sys

import torch

from grpo_engine import ops

P, G, T, D, V = 4, 16, 8, 32, 40  # prompts, answers to each, tokens of an answer, width, vocabulary


def main(steps: int = 60) -> tuple[float, float]:
    """Mean reward of the first and of the last step."""
    torch.manual_seed(0)
    states = torch.randn(P, T, D).requires_grad_()
    head = (0.1 * torch.randn(V, D)).requires_grad_()
    optimizer = torch.optim.Adam([states, head], lr=0.02)
    cu_seqlens = torch.arange(0, P * G * T + 1, T, dtype=torch.int32)  # where each answer's tokens begin
    rewards = []
    for step in range(steps):
        hidden = states[:, None].expand(P, G, T, D).reshape(-1, D)  # [R, D]
        with torch.no_grad():
            row = torch.arange(P * G * T)
            drawn = ops.sample_token(ops.linear(hidden, head), seed=row, position=torch.full_like(row, step))
        answers = drawn.token.view(P, G, T)
        reward = (answers[..., 1:] > answers[..., :-1]).float().mean(dim=-1)  # share of neighbours in order
        advantage = ops.group_advantages(reward).repeat_interleave(T)  # [P, G] -> [R]

        for _ in range(2):  # the second pass is off-policy: its ratios are clipped
            hidden = states[:, None].expand(P, G, T, D).reshape(-1, D)
            logprob, _ = ops.token_logprob(hidden, head, drawn.token)  # without the [R, V] logits
            loss, stats = ops.policy_loss(
                logprob, advantage=advantage, cu_seqlens=cu_seqlens, old_logprob=drawn.logprob, clip_high=0.28
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rewards.append(float(reward.mean()))
        if step % 10 == 0 or step == steps - 1:
            clipped = ops.PolicyStats(*stats.tolist()).clip_high / (P * G * T)
            print(f"step {step}: reward {rewards[-1]:.3f}, {clipped:.1%} of the tokens clipped from above")
    return rewards[0], rewards[-1]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""A loss and an advantage of your own: functions in torch, named in the configuration.

    python examples/custom_loss.py                          # 20 steps of an embedded model, which is made first
    python examples/custom_loss.py model.size=s steps=100   # any setting of a run

or, with this folder in PYTHONPATH:

    grpo-engine train --out runs/soft loss.objective=custom_loss:soft_clip advantage.estimator=custom_loss:max_baseline
"""

import sys

import torch

OURS = [
    "loss.objective=custom_loss:soft_clip", "advantage.estimator=custom_loss:max_baseline", "model.size=xs", "steps=20",
    "batch.prompts=16", "batch.minibatches=2", "optimizer.lr=5e-4",
]  # fmt: skip


def soft_clip(logprob, *, old_logprob, advantage, **_):
    """SAPO's gate in place of the clip: a sigmoid of the ratio, steeper where the advantage is negative.

    Gao et al. 2025, arXiv:2511.20347. Returns one value a response token; the engine averages them, adds the KL penalty
    and lets autograd differentiate.
    """
    ratio = torch.exp(logprob - old_logprob)
    temperature = torch.where(advantage > 0, 1.0, 1.05)
    return -advantage * torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature


def max_baseline(rewards_PG, rollout, config):
    """The reward minus the best one of the group: 0 for the best responses, and a push away from the others."""
    return rewards_PG - rewards_PG.max(dim=1, keepdim=True).values


if __name__ == "__main__":
    from grpo_engine.config import load_run_config
    from grpo_engine.run.run import train

    print(train(load_run_config(None, [*OURS, *sys.argv[1:]]), "runs/custom_loss"))

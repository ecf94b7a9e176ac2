"""A reward of your own: a function of the answer's text and the problem, named in the configuration.

    python examples/custom_reward.py                          # 20 steps of an embedded model, which is made first
    python examples/custom_reward.py model.size=s steps=100   # any setting of a run

or, with this folder in PYTHONPATH, `grpo-engine train --out runs/brief reward.function=custom_reward:score`. It runs in
processes that can be killed: one that hangs, raises or returns no number in [0, 1] costs one zero, which is counted.
"""

import sys

OURS = ["reward.function=custom_reward:score", "model.size=xs", "steps=20", "batch.prompts=16", "optimizer.lr=5e-4"]


def score(response: str, problem) -> float:
    """The right last word, and few words before it: 1 for the answer alone, a tenth less for each further word."""
    words = response.split()
    if not words or words[-1] != problem.answer:
        return 0.0
    return max(0.1, 1.1 - 0.1 * len(words))


if __name__ == "__main__":
    from grpo_engine.config import load_run_config
    from grpo_engine.run.run import train

    print(train(load_run_config(None, [*OURS, *sys.argv[1:]]), "runs/custom_reward"))

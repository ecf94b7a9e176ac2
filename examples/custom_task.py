"""A task of your own: a function that returns problems, named in the configuration, with a scorer of its own.

    python examples/custom_task.py                            # 20 steps of an embedded model, which is made first
    python examples/custom_task.py model.path=MODEL_FOLDER    # any setting of a run

or, with this folder in PYTHONPATH, `grpo-engine train --out runs/sorting task.name=custom_task:sorting`.
"""

import random
import sys

from grpo_engine.types import EvalSet, Problem, Task

OURS = ["task.name=custom_task:sorting", "model.size=xs", "steps=20", "batch.prompts=16", "optimizer.lr=5e-4"]


def sorting(config, *, seed: int, needed: int) -> Task:
    """Lists to be sorted. An eighth of all lists is only tested: those whose sum divides by eight."""

    def problems(count: int, draw: random.Random, *, tested: bool) -> list[Problem]:
        found = {}
        while len(found) < count:
            numbers = draw.sample(range(30), 3)
            if (sum(numbers) % 8 == 0) == tested:
                text = " ".join(map(str, numbers))
                answer = " ".join(map(str, sorted(numbers)))
                found[text] = Problem(uid=f"sort/{text}", prompt=f"{text} :", answer=answer, domain="sort",
                                      reward="custom_task:places")  # fmt: skip
        return list(found.values())

    train = problems(min(needed, 10_000), random.Random(seed), tested=False)
    test = problems(min(config.eval_problems or 500, 500), random.Random(0), tested=True)
    return Task(name="sorting", train=train, evals={"sort": EvalSet(name="sort", in_domain=True, problems=test)})


def places(response: str, problem) -> float:
    """Share of the numbers that stand where they belong; 0 when there are too few or too many."""
    got, want = response.split(), problem.answer.split()
    return sum(a == b for a, b in zip(got, want, strict=True)) / len(want) if len(got) == len(want) else 0.0


if __name__ == "__main__":
    from grpo_engine.config import load_run_config
    from grpo_engine.run.run import train

    print(train(load_run_config(None, [*OURS, *sys.argv[1:]]), "runs/custom_task"))

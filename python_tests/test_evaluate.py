"""Evaluation: what is counted, its standard error, and draws that do not depend on the step."""

import models
import pytest
import torch

from grpo_engine.config import RunConfig
from grpo_engine.evaluate import evaluate
from grpo_engine.tasks.micro import MicroTokenizer, micro_task
from grpo_engine.types import EvalSet, Reward


class EveryOther:
    """Scores an answer by its place, so that the statistics can be worked out by hand."""

    def score(self, responses, problems):
        self.seen = list(zip(responses, [p.uid for p in problems], strict=True))
        return [Reward(value=float(i % 3 == 0)) for i in range(len(responses))]


@pytest.fixture(scope="module")
def setting():
    tokenizer = MicroTokenizer()
    model = models.random_model(models.small_config(vocab=tokenizer.vocab_size), scale=3.0)
    task = micro_task(train_problems=1, eval_problems=12, seed=0)
    return tokenizer, model, next(iter(task.evals.values()))


def run(setting, pool, *, greedy=False, samples=2, seed=0):
    tokenizer, model, eval_set = setting
    config = RunConfig(seed=seed, evaluation={"samples": samples}, rollout={"max_new_tokens": 6})
    return evaluate(model, eval_set, tokenizer=tokenizer, pool=pool, config=config, greedy=greedy)


def test_pass1_and_its_standard_error(setting):
    result = run(setting, EveryOther())
    values = torch.tensor([float(i % 3 == 0) for i in range(24)]).view(12, 2).mean(1).double()
    assert result.pass1 == pytest.approx(values.mean().item()) and result.loss == pytest.approx(1 - result.pass1)
    assert result.stderr == pytest.approx((values.std() / 12**0.5).item())
    assert (result.num_problems, result.num_samples, result.temperature) == (12, 2, 0.7)
    assert sum(g["n"] for g in result.by_grade.values()) == 12


def test_greedy_is_one_answer_and_repeats(setting):
    a, b = EveryOther(), EveryOther()
    assert run(setting, a, greedy=True).num_samples == 1
    run(setting, b, greedy=True, seed=5)
    assert a.seen == b.seen  # nothing is drawn


def test_draws_repeat_for_a_seed_and_differ_between_seeds(setting):
    pools = [EveryOther() for _ in range(3)]
    for pool, seed in zip(pools, (0, 0, 1), strict=True):
        run(setting, pool, seed=seed)
    assert pools[0].seen == pools[1].seen and pools[0].seen != pools[2].seen


def test_an_empty_set_is_refused(setting):
    tokenizer, model, eval_set = setting
    empty = EvalSet(name="none", in_domain=True, problems=[])
    with pytest.raises(ValueError, match="set 'none' holds no problem"):
        evaluate(model, empty, tokenizer=tokenizer, pool=EveryOther(), config=RunConfig(), greedy=False)

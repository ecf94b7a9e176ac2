"""Evaluation: what is counted, its standard error, and draws that do not depend on the step."""

import contextlib

import models
import pytest
import torch

from grpo_engine.config import RunConfig
from grpo_engine.evaluate.evaluate import EVALUATION_STREAM, evaluate
from grpo_engine.micro.task import micro_task
from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.model.tokenizer import PromptTokens
from grpo_engine.records.ledger import Ledger
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.rollout.engine import Engine, derive_seeds, generate
from grpo_engine.types import EvalSet, Reward


class EveryThird(RewardPool):
    """Scores an answer by its place, so that the statistics can be worked out by hand."""

    def __init__(self):
        super().__init__(workers=1, timeout_s=1.0)

    @contextlib.contextmanager
    def begin(self, problems, *, progress=None):
        self.problems, self.responses = [p.uid for p in problems], [None] * len(problems)
        yield self

    def add(self, indices, responses):
        for i, response in zip(indices, responses, strict=True):
            self.responses[i] = response

    def finish(self):
        return [Reward(value=float(i % 3 == 0)) for i in range(len(self.responses))]


@pytest.fixture(scope="module")
def setting():
    tokenizer = MicroTokenizer()
    model = models.random_model(models.small_config(vocab=tokenizer.vocab_size), scale=3.0)
    task = micro_task(train_problems=1, eval_problems=12, seed=0)
    return tokenizer, model, list(task.evals.values())


def config_of(seed=0, **evaluation):
    return RunConfig(seed=seed, evaluation={"samples": 2, **evaluation}, rollout={"max_new_tokens": 6})


def parts_of(tokenizer, pool, **settings):
    config = config_of(**settings)
    encode = PromptTokens(tokenizer, chat=False)
    return dict(tokenizer=tokenizer, encode=encode, pool=pool, evaluation=config.evaluation, rollout=config.rollout,
                seed=config.seed)  # fmt: skip


def run(setting, pool, *, sets=slice(0, 1), **settings):
    tokenizer, model, eval_sets = setting
    return evaluate(Engine(model), eval_sets[sets], **parts_of(tokenizer, pool, **settings))


def test_pass1_and_its_standard_error(setting):
    (result,) = run(setting, EveryThird(), greedy=False)
    values = torch.tensor([float(i % 3 == 0) for i in range(24)]).view(12, 2).mean(1).double()
    assert result.pass1 == pytest.approx(values.mean().item()) and result.loss == pytest.approx(1 - result.pass1)
    assert result.stderr == pytest.approx((values.std() / 12**0.5).item())
    assert (result.num_problems, result.num_samples, result.temperature) == (12, 2, 0.7)
    assert sum(g["n"] for g in result.by_grade.values()) == 12
    assert result.right == (2 * values).int().tolist()


def test_greedy_is_one_answer_and_repeats(setting):
    a, b = EveryThird(), EveryThird()
    sampled, greedy = run(setting, a)
    run(setting, b, seed=5)
    assert (sampled.mode, greedy.mode, greedy.num_samples, greedy.temperature) == ("sample", "greedy", 1, 0.0)
    assert len(a.responses) == 12 * (2 + 1)
    assert a.responses[24:] == b.responses[24:]  # nothing is drawn
    assert a.responses[:24] != b.responses[:24]


def test_draws_repeat_for_a_seed_and_differ_between_seeds(setting):
    pools = [EveryThird() for _ in range(3)]
    for pool, seed in zip(pools, (0, 0, 1), strict=True):
        run(setting, pool, seed=seed, greedy=False)
    assert pools[0].responses == pools[1].responses and pools[0].responses != pools[2].responses


def test_all_sets_at_once_give_the_answers_that_each_gives_alone(setting):
    tokenizer, model, eval_sets = setting
    together = EveryThird()
    results = run(setting, together, sets=slice(None))
    assert [(r.eval_set, r.mode) for r in results] == [(s.name, m) for s in eval_sets for m in ("sample", "greedy")]
    alone = []
    for s in eval_sets:
        prompts = [tokenizer.encode_prompt(p.prompt, False) for p in s.problems]
        for samples, temperature in ((2, 0.7), (1, 0.0)):
            name = int.from_bytes(s.name.encode()[:8], "little")
            rollout = generate(
                model, prompts, group_size=samples, temperature=temperature, stop_ids=tokenizer.stop_ids,
                seeds=derive_seeds(0, EVALUATION_STREAM, name, count=12 * samples), config=config_of().rollout,
            )  # fmt: skip
            alone += map(tokenizer.decode, rollout.responses())
    assert together.responses == alone
    assert together.problems == [p.uid for s in eval_sets for g in (2, 1) for p in s.problems for _ in range(g)]


def test_its_cost_is_booked_as_evaluation(setting):
    tokenizer, model, eval_sets = setting
    ledger = Ledger()
    evaluate(Engine(model), eval_sets, **parts_of(tokenizer, EveryThird()), ledger=ledger)
    assert ledger.flops_without_evaluation == 0.0
    (cost,) = ledger.close_step().values()
    assert cost.tokens > 0 and cost.flops > 0 and cost.seconds > 0


def test_an_empty_set_is_refused(setting):
    tokenizer, model, eval_sets = setting
    empty = EvalSet(name="none", in_domain=True, problems=[])
    with pytest.raises(ValueError, match="set 'none' holds no problem"):
        evaluate(Engine(model), [*eval_sets, empty], **parts_of(tokenizer, EveryThird()))

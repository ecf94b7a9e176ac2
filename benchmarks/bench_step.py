"""A whole GRPO step - rollout, rewards, reference, training - beside TRL's GRPOTrainer."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import copy  # noqa: E402

import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.lengths import answer_lengths  # noqa: E402
from benchmarks.shapes import (  # noqa: E402
    LADDER_VOCABULARY,
    REAL,
    equal_lengths,
    ladder_config,
    log_normal_lengths,
    optimizer_of,
    qwen_config,
    random_model,
)
from benchmarks.table import OURS, Case, WrongAnswer, main, tensors  # noqa: E402
from grpo_engine.config import BatchConfig, LossConfig, OptimizerConfig, RolloutConfig, RunConfig  # noqa: E402
from grpo_engine.model.decoder import Model  # noqa: E402
from grpo_engine.model.tokenizer import PromptTokens  # noqa: E402
from grpo_engine.records.ledger import Ledger  # noqa: E402
from grpo_engine.rewards.pool import RewardPool  # noqa: E402
from grpo_engine.rollout.engine import Engine, derive_seeds, generate  # noqa: E402
from grpo_engine.system.memory import keep_freed_memory  # noqa: E402
from grpo_engine.train.step import grpo_step  # noqa: E402
from grpo_engine.types import Problem  # noqa: E402

PROMPTS, GROUP, PROMPT, NEW = 32, 8, 8, 16
LR, KL_COEF = 1e-6, 0.001
REAL_PROMPTS, REAL_PROMPT, REAL_NEW = 4, 32, 48
ANSWER = "w1"  # the word that scores
NOTE = (
    "Sampling, rewards, reference, forward, backward, optimizer; set-up is left out. Each of our steps asserts that "
    "sampling and training computed the same log-probs, bit for bit."
)
ENTROPY_TOLERANCE = 0.03  # means over thousands of different draws from one model


class Words:
    """A token a word, and no token that ends an answer."""

    eos_id, stop_ids = 0, ()

    def encode_prompt(self, text, chat):
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


class Steps:
    """GRPO steps as a run takes them."""

    def __init__(self, model, problems, lengths, *, group_size=GROUP, kl_coef=KL_COEF, tokens_per_micro_batch=4096):
        self.policy, self.problems, self.lengths = copy.deepcopy(model), problems, lengths
        self.reference = copy.deepcopy(model).requires_grad_(False) if kl_coef else None
        self.engine = Engine(self.policy)
        self.optimizer = optimizer_of(self.policy, LR)
        self.config = RunConfig(
            rollout=RolloutConfig(max_new_tokens=max(lengths)),
            batch=BatchConfig(prompts=len(problems), group_size=group_size, tokens_per_micro_batch=tokens_per_micro_batch),
            loss=LossConfig(kl_coef=kl_coef),
            optimizer=OptimizerConfig(lr=LR),
        )
        self.encode = PromptTokens(Words(), chat=False)
        self.pool = RewardPool(workers=1, timeout_s=10.0)  # the scorer is harmless: no worker is started
        self.number = 0
        self.flops = 0.0

    def step(self):
        """[mean answer length, mean entropy] of one step."""
        self.number += 1
        ledger = Ledger()
        with answer_lengths(self.lengths):
            outcome = grpo_step(
                self.engine, self.reference, self.optimizer, iter(self.problems), tokenizer=Words(), encode=self.encode,
                pool=self.pool, config=self.config, step=self.number, ledger=ledger,
            )  # fmt: skip
        self.flops = ledger.flops_without_evaluation
        rollout = outcome.scored.rollout
        answers = rollout.tokens.numel() - int(rollout.prompt_len.sum())
        return torch.tensor([answers / rollout.num_sequences, float(rollout.entropy.sum()) / answers])


def problems_of(count, tokens, vocabulary):
    """Random words; the answer that scores is one word."""
    prompts = torch.randint(1, vocabulary, (count, tokens), device="cpu").tolist()
    texts = [" ".join(f"w{i}" for i in prompt) for prompt in prompts]
    return [Problem(uid=str(i), prompt=text, answer=ANSWER, domain="none", reward="exact") for i, text in enumerate(texts)]


def beside_trl(name, model, problems, lengths, *, heavy=False):
    """The case, and what closes it."""
    words = [f"w{i}" for i in range(model.config.vocab_size)]
    prompts = [problem.prompt for problem in problems]
    mine = Steps(model, problems, lengths)
    mine.step()  # books the FLOPs of a step

    def score(completions, **_):
        return [float(bool(words := text.split()) and words[-1] == ANSWER) for text in completions]

    def check(who, result):
        length, entropy = tensors(result)[0].tolist()
        if abs(length - sum(lengths) / len(lengths)) > 1e-3:
            raise WrongAnswer(f"answers of {length} tokens on average, wanted {sum(lengths) / len(lengths)}")
        if who == OURS:
            seen["entropy"] = entropy
        elif not abs(entropy / seen["entropy"] - 1) <= ENTROPY_TOLERANCE:
            raise WrongAnswer(f"mean entropy {entropy}, ours {seen['entropy']}, allowed {ENTROPY_TOLERANCE:.0%} apart")

    def bits():
        some = slice(1 if heavy else None)
        fresh = Steps(model, problems[some], lengths[some])
        fresh.step()
        fresh.pool.close()
        return [p.detach() for p in fresh.policy.parameters()]

    seen = {}
    theirs = peers.optional(
        "trl",
        lambda: peers.TrlSteps(
            model, prompts, words, lengths, group_size=GROUP, reward=score, lr=LR, kl_coef=KL_COEF
        ),
    )  # fmt: skip

    def close():
        mine.pool.close()
        if hasattr(theirs, "close"):
            theirs.close()

    return close, Case(
        name=name,
        ours=mine.step,
        peers={"TRL": getattr(theirs, "step", theirs)},
        tolerance=ENTROPY_TOLERANCE,
        check=check,
        bits=bits,
        at_least=3 if heavy else 5,
        heavy=heavy,
        flops=mine.flops,
        derived={"tokens/s": lambda seconds: sum(lengths) * GROUP / seconds},
    )


def case(size, kind):
    model = Model(ladder_config(size)).init_weights(1, std=None)
    lengths = (equal_lengths if kind == "equal" else log_normal_lengths)(PROMPTS, NEW)
    name = f"{size}, 256 answers, {kind} lengths (longest {max(lengths)}, {sum(lengths) * GROUP} tokens)"
    close, made = beside_trl(name, model, problems_of(PROMPTS, PROMPT, LADDER_VOCABULARY), lengths)
    yield made
    close()


def cases(quick):
    keep_freed_memory()  # as a run does; the peers of this process have it too
    for size in ("0.2M",) if quick else ("0.2M", "0.8M"):
        for kind in ("equal", "log-normal"):
            yield from case(size, kind)


def real(quick):
    keep_freed_memory()
    size, (prompts, tokens, new) = "135M", (1, 4, 4) if quick else (REAL_PROMPTS, REAL_PROMPT, REAL_NEW)
    name = f"{size} float32, {prompts} x {GROUP} answers of {new}, {tokens} of prompt"
    config = REAL[size]()
    problems = problems_of(prompts, tokens, config.vocab_size)
    close, made = beside_trl(
        name, random_model(config, torch.float32), problems, equal_lengths(prompts, new), heavy=True
    )  # fmt: skip
    yield made
    close()


def qwen(size, *, prompts, group_size, prompt_tokens, new, kl_coef):
    """No peer: TRL with vLLM needs a machine of its own. The first step, which books the FLOPs, is not timed."""
    mine = Steps(
        random_model(qwen_config(size), torch.bfloat16),
        problems_of(prompts, prompt_tokens, qwen_config(size).vocab_size),
        equal_lengths(prompts, new), group_size=group_size, kl_coef=kl_coef, tokens_per_micro_batch=8192,
    )  # fmt: skip
    mine.step()

    def check(who, result):
        if abs(float(result[0]) - new) > 1e-3:
            raise WrongAnswer(f"answers of {float(result[0])} tokens on average, wanted {new}")

    def two_answers():
        prompt = Words().encode_prompt(mine.problems[0].prompt, False)
        config = RolloutConfig(max_new_tokens=4)
        return generate(
            mine.policy, [prompt], group_size=2, seeds=derive_seeds(1, count=2), stop_ids=(), config=config
        ).logprob  # fmt: skip

    answers = prompts * group_size
    return Case(
        name=f"{size} bfloat16, {prompts} x {group_size} answers of {new}, {prompt_tokens} of prompt"
        + (", reference" if kl_coef else ", no reference"),
        ours=mine.step,
        peers={},
        tolerance=0.0,
        check=check,
        bits=two_answers,
        at_least=3,
        flops=mine.flops,
        products=torch.bfloat16,
        derived={
            "answer tokens/s": lambda seconds: answers * new / seconds,
            "peak GB": lambda _: torch.cuda.max_memory_allocated() / 1e9,
        },
    )


def cuda(quick):
    new = 64 if quick else 256
    for size in ("0.5B", "1.5B") if quick else ("0.5B", "1.5B", "7B"):
        yield partial(qwen, size, prompts=8, group_size=16, prompt_tokens=128, new=new, kl_coef=KL_COEF)
    yield partial(qwen, "7B", prompts=8, group_size=8, prompt_tokens=128, new=new, kl_coef=0.0)


if __name__ == "__main__":
    main("step", cases, real=real, cuda=cuda, whole=True, unit="ms", note=NOTE)

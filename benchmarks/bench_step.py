"""A whole GRPO step - rollout, rewards, reference, training - beside TRL's GRPOTrainer."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import copy  # noqa: E402

import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.lengths import answer_lengths  # noqa: E402
from benchmarks.shapes import LADDER_VOCABULARY, equal_lengths, ladder_config, log_normal_lengths  # noqa: E402
from benchmarks.table import OURS, Case, WrongAnswer, main, tensors  # noqa: E402
from grpo_engine.config import BatchConfig, LossConfig, OptimizerConfig, RolloutConfig, RunConfig  # noqa: E402
from grpo_engine.ledger import Ledger  # noqa: E402
from grpo_engine.memory import keep_freed_memory  # noqa: E402
from grpo_engine.model import Model  # noqa: E402
from grpo_engine.rewards.pool import RewardPool  # noqa: E402
from grpo_engine.step import grpo_step  # noqa: E402
from grpo_engine.types import Problem  # noqa: E402

PROMPTS, GROUP, PROMPT, NEW = 32, 8, 8, 16
LR, KL_COEF = 1e-6, 0.001
WORDS = [f"w{i}" for i in range(LADDER_VOCABULARY)]
NOTE = (
    "Sampling, rewards, reference, forward, backward, optimizer; set-up is left out. Each of our steps asserts that "
    "sampling and training computed the same log-probs, bit for bit."
)
ENTROPY_TOLERANCE = 0.03  # means over thousands of different draws from one model


class Words:
    """A token a word, and no token that ends an answer."""

    eos_id, stop_ids, vocab_size = 0, (), LADDER_VOCABULARY

    def encode_prompt(self, text, chat):
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids):
        return " ".join(WORDS[i] for i in ids)


class Steps:
    """GRPO steps as a run takes them."""

    def __init__(self, model, problems, lengths):
        self.policy, self.problems, self.lengths = copy.deepcopy(model), problems, lengths
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LR, weight_decay=0.0)
        self.config = RunConfig(
            rollout=RolloutConfig(max_new_tokens=max(lengths)),
            batch=BatchConfig(prompts=PROMPTS, group_size=GROUP),
            loss=LossConfig(kl_coef=KL_COEF),
            optimizer=OptimizerConfig(lr=LR),
        )
        self.pool = RewardPool(workers=1, timeout_s=10.0)  # the scorer is harmless: no worker is started
        self.number = 0
        self.flops = 0.0

    def step(self):
        """[mean answer length, mean entropy] of one step."""
        self.number += 1
        ledger = Ledger()
        with answer_lengths(self.lengths):
            outcome = grpo_step(
                self.policy, self.reference, self.optimizer, self.problems, tokenizer=Words(), pool=self.pool,
                config=self.config, step=self.number, ledger=ledger,
            )  # fmt: skip
        self.flops = ledger.flops_without_evaluation
        rollout = outcome.rollout
        answers = rollout.tokens.numel() - int(rollout.prompt_len.sum())
        return torch.tensor([answers / rollout.num_sequences, float(rollout.entropy.sum()) / answers])


def case(size, kind):
    model = Model(ladder_config(size)).init_weights(1, std=None)
    lengths = (equal_lengths if kind == "equal" else log_normal_lengths)(PROMPTS, NEW)
    prompts = [" ".join(WORDS[int(i)] for i in torch.randint(1, LADDER_VOCABULARY, (PROMPT,))) for _ in lengths]
    problems = [
        Problem(uid=str(i), prompt=text, answer=WORDS[1], domain="none", reward="exact") for i, text in enumerate(prompts)
    ]
    mine = Steps(model, problems, lengths)
    mine.step()  # books the FLOPs of a step
    flops = mine.flops
    mine = Steps(model, problems, lengths)

    def score(completions, **_):
        return [float(bool(words := text.split()) and words[-1] == WORDS[1]) for text in completions]

    def check(who, result):
        length, entropy = tensors(result)[0].tolist()
        if abs(length - sum(lengths) / len(lengths)) > 1e-3:
            raise WrongAnswer(f"answers of {length} tokens on average, wanted {sum(lengths) / len(lengths)}")
        if who == OURS:
            seen["entropy"] = entropy
        elif not abs(entropy / seen["entropy"] - 1) <= ENTROPY_TOLERANCE:
            raise WrongAnswer(f"mean entropy {entropy}, ours {seen['entropy']}, allowed {ENTROPY_TOLERANCE:.0%} apart")

    def bits():
        fresh = Steps(model, problems, lengths)
        fresh.step()
        return [p.detach() for p in fresh.policy.parameters()]

    seen = {}
    theirs = peers.optional(
        "trl",
        lambda: peers.TrlSteps(
            model, prompts, WORDS, lengths, group_size=GROUP, reward=score, lr=LR, kl_coef=KL_COEF
        ),
    )  # fmt: skip
    yield Case(
        name=f"{size}, 256 answers, {kind} lengths (longest {max(lengths)}, {sum(lengths) * GROUP} tokens)",
        ours=mine.step,
        peers={"TRL": getattr(theirs, "step", theirs)},
        tolerance=ENTROPY_TOLERANCE,
        check=check,
        bits=bits,
        at_least=5,
        flops=flops,
        derived={"tokens/s": lambda seconds: sum(lengths) * GROUP / seconds},
    )
    mine.pool.close()
    if hasattr(theirs, "close"):
        theirs.close()


def cases(quick):
    keep_freed_memory()  # as a run does; the peers of this process have it too
    for size in ("0.2M",) if quick else ("0.2M", "0.8M"):
        for kind in ("equal", "log-normal"):
            yield from case(size, kind)


if __name__ == "__main__":
    main("step", cases, unit="ms", note=NOTE)

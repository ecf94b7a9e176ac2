"""The embedded problems as constants: vocabulary, ranges, what a corpus holds. No torch."""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = 60  # values lie in [0, LIMIT); as sums stop at both ends, the order of their terms matters
OPERAND = 9  # operands lie in [1, OPERAND]
CORPUS_TERMS = (2, 3, 4, 5, 6, 8)
TERMS = (3, 4, 5, 6, 8)  # of the problems that are trained and tested on
LIST_LENGTHS = (3, 4, 5, 6)
NAME_COUNTS = (2, 3, 4)
FUNCTIONS = ("first", "second", "last", "max", "min")
LETTERS = tuple("abcdef")
PEOPLE = ("ann", "ben", "cleo", "dan")
TEST_SHARE = 1 / 8
IN_DOMAIN = ("chain", "word")
OUT_OF_DOMAIN = ("code", "logic")
DOMAINS = IN_DOMAIN + OUT_OF_DOMAIN
PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
SPECIAL = (PAD, EOS, USER, ASSISTANT)
_NUMBERS = tuple(str(v) for v in range(LIMIT))
VOCABULARY = (
    *SPECIAL,
    *_NUMBERS,
    *(f"{sign}{k}" for sign in "+-" for k in range(1, OPERAND + 1)),
    *("=", "?", ":", ";", ",", ">", "has", "now", "top", "low"),
    *FUNCTIONS,
    *LETTERS,
    *PEOPLE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """What the embedded models read before any RL."""

    chain: float = 0.6  # shares of documents
    word: float = 0.15
    code: float = 0.125
    logic: float = 0.125
    direct: float = 0.5  # share of sums that are answered without working
    error: float = 0.1  # chance that a written value is wrong; the working goes on from the wrong value
    chat: float = 0.15  # share of documents that are a user's turn and its answer
    prompt_weight: float = 0.1  # loss weight of a prompt token; response tokens weigh 1

    def __post_init__(self) -> None:
        for name in ("direct", "error", "chat", "prompt_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"CorpusConfig.{name} must be in [0, 1], got {getattr(self, name)}")
        if abs(self.chain + self.word + self.code + self.logic - 1) > 1e-9:
            raise ValueError("CorpusConfig: chain + word + code + logic must be 1")


def tokens_per_worked_answer(*, chat: bool) -> float:
    """Tokens of a chain problem and its fully worked answer that a training pass reads, averaged over grades.

    An upper estimate of what GRPO trains on for one answer; the plain-pretraining control spends as much.

    Args:
        chat: with the two tokens of the chat template.

    Returns:
        Prompt and answer with its stop token, less the last token, which is never read.
    """
    lengths = [(terms + 1) + (terms - 1) + 1 - 1 for terms in TERMS]
    return sum(lengths) / len(lengths) + (2 if chat else 0)

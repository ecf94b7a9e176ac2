"""Generated problems small enough that a model of 20 thousand parameters can learn them in seconds.

Four families, each with a difficulty grade:

    chain   "7 +8 -3 ="             in domain; grade = terms; a counter that stops at 0 and at LIMIT - 1
    word    "ann has 7 +8 -3 now ?" in domain; the same sums in another template
    code    "max 3 7 2 :"           out of domain; grade = length of the list
    logic   "b > a , c > b ; top ?" out of domain; grade = number of names

An answer to a sum is *direct* ("12") or *worked* ("15 12": every partial value); only its last word counts. The
corpus that the embedded models are pretrained on mixes both and gets some values wrong, so a pretrained model knows
how to work a sum out but often does not, and copies the mistakes. That is what GRPO can honestly improve.

Test problems are chosen by a hash of the sum itself, whatever its template: they are in no training set and in no
corpus, which `check_disjoint` asserts wherever problems or documents are made. Sums of two terms are the facts that
everything else is made of; there are too few to hold any out, so none is ever tested. From the same pool comes a
second draw, the *selection* sets, which share no problem with the test sets: what a study settles beforehand (learning
rates, the difficulty of the tasks) is settled on them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable

from grpo_engine.micro import _corpus
from grpo_engine.micro.facts import (
    DOMAINS,
    FUNCTIONS,
    IN_DOMAIN,
    LETTERS,
    LIMIT,
    LIST_LENGTHS,
    NAME_COUNTS,
    OPERAND,
    PEOPLE,
    TERMS,
    TEST_SHARE,
    VOCABULARY,
)
from grpo_engine.types import EvalSet, Problem, Task

EVAL_SEED = 2024  # evaluation sets are the same in every run
SELECTION_SEED = 2025  # and so are those that settings are chosen on
TEST_PROBLEMS = 1000  # of each test set in domain at most; selection sets hold none of them
FEW_PROBLEMS = 500  # of each set out of domain at most: there are hardly more orders of so few names
_TRIES = 200  # draws before a grade counts as used up


def is_test(key: str) -> bool:
    """Whether a problem belongs to the test pool.

    Args:
        key: what names the problem whatever its template: a sum in the chain template, the prompt otherwise.

    Returns:
        True for about `TEST_SHARE` of all keys; the same on every machine and in every run.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < TEST_SHARE * 2**32


def key_of(prompt: str) -> str:
    """The key of a problem, read back from its prompt alone, so that a leak cannot hide behind its own generator.

    Args:
        prompt: text in any of the four templates, without chat tokens.

    Returns:
        See `is_test`; both templates of a sum have one key.
    """
    words = prompt.split()
    if words[0] in PEOPLE:
        words = [*words[2:-2], "="]
    return " ".join(words)


def is_fact(key: str) -> bool:
    """Whether a key is a sum of two terms, which every corpus may hold and no test does."""
    words = key.split()
    return len(words) == 3 and words[-1] == "="


def check_disjoint(prompts: Iterable[str], held_out: Collection[str], *, what: str) -> None:
    """Asserts that nothing to be trained on is held out.

    Args:
        prompts: texts of problems or documents' problems.
        held_out: keys of the problems of all evaluation sets.
        what: name of the prompts, for the message.

    Raises:
        RuntimeError: a prompt whose key is in `held_out`, or in the pool that `held_out` was drawn from.
    """
    for prompt in prompts:
        key = key_of(prompt)
        if key in held_out or (is_test(key) and not is_fact(key)):
            raise RuntimeError(f"{what}: problem {prompt!r} is held out for testing and must not be trained on")


def native_source(seed: str) -> _corpus.MicroSource:
    """The native generator, its draws those of `random.Random(seed)`."""
    return _corpus.MicroSource(
        random.Random(seed).getstate()[1],
        vocabulary=VOCABULARY,
        functions=FUNCTIONS,
        letters=LETTERS,
        people=PEOPLE,
        limit=LIMIT,
        operand=OPERAND,
        test_share=TEST_SHARE,
    )


def _grades(domain: str) -> tuple[int, ...]:
    return {"code": LIST_LENGTHS, "logic": NAME_COUNTS}.get(domain, TERMS)


def problems(domain: str, count: int, *, seed: int, test: bool, without: Collection[str] = frozenset()) -> list[Problem]:
    """Different problems of one family, the grades in turn.

    Args:
        domain: "chain", "word", "code" or "logic".
        count: how many.
        seed: of the draw.
        test: from the test pool, or from all others.
        without: keys that are left out.

    Returns:
        `count` problems with different keys. A grade whose pool is used up leaves its place to the next.

    Raises:
        ValueError: an unknown domain, or more problems than there are; the message says how many.
    """
    if domain not in DOMAINS:
        raise ValueError(f"problems: domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
    source = native_source(f"{domain}/{seed}/{test}")
    family = getattr(_corpus.Domain, domain)
    grades = list(_grades(domain))
    found: dict[str, Problem] = {}
    turn = 0
    while len(found) < count:
        if not grades:
            raise ValueError(f"problems: no more than about {len(found)} {domain} problems exist, wanted {count}")
        grade = grades[turn % len(grades)]
        for _ in range(_TRIES):
            key, prompt, answer = source.item(family, grade)
            if key not in found and key not in without and is_test(key) == test:
                found[key] = Problem(
                    uid=f"{domain}/{key}", prompt=prompt, answer=answer, domain=domain, reward="exact", grade=grade
                )
                turn += 1
                break
        else:
            grades.remove(grade)
    return list(found.values())


def eval_sets(eval_problems: int | None = TEST_PROBLEMS, *, selection: bool = False) -> dict[str, EvalSet]:
    """The evaluation sets, the same in every run and for every model.

    Args:
        eval_problems: problems of each, out of domain no more than `FEW_PROBLEMS`; None: `TEST_PROBLEMS`.
        selection: a second draw from the test pool, without the problems of the test sets, to choose settings on; of
            the sets in domain alone.

    Returns:
        {"chain", "word", "code", "logic"} in this order, or the first two.

    Raises:
        ValueError: fewer than one problem, or more than a family has.
    """
    count = TEST_PROBLEMS if eval_problems is None else eval_problems
    if count < 1:
        raise ValueError(f"eval_sets: eval_problems must be at least 1, got {eval_problems}")
    domains: tuple[str, ...] = DOMAINS
    seed, without = EVAL_SEED, frozenset[str]()
    if selection:
        domains, seed, without = IN_DOMAIN, SELECTION_SEED, held_out_keys(eval_sets().values())
    return {
        d: EvalSet(
            name=d,
            in_domain=d in IN_DOMAIN,
            problems=problems(
                d, count if d in IN_DOMAIN else min(count, FEW_PROBLEMS), seed=seed, test=True, without=without
            ),
        )
        for d in domains
    }


def held_out_keys(sets: Iterable[EvalSet]) -> frozenset[str]:
    """The keys of all problems of some evaluation sets."""
    return frozenset(key_of(p.prompt) for s in sets for p in s.problems)


def micro_task(
    *, train_problems: int, eval_problems: int | None = TEST_PROBLEMS, seed: int = 0, selection: bool = False
) -> Task:
    """Chain problems to train on and four sets to be tested on.

    Args:
        train_problems: how many different training problems.
        eval_problems: problems of each evaluation set; None: `TEST_PROBLEMS`.
        seed: of the training problems; the evaluation sets do not depend on it.
        selection: see `eval_sets`.

    Returns:
        A `Task` named "micro" whose training and test problems are disjoint.

    Raises:
        ValueError: counts that no pool carries.
        RuntimeError: a training problem is held out (never, unless this module is broken).
    """
    if train_problems < 1:
        raise ValueError(f"micro_task: train_problems must be at least 1, got {train_problems}")
    evals = eval_sets(eval_problems, selection=selection)
    train = problems("chain", train_problems, seed=seed, test=False)
    check_disjoint((p.prompt for p in train), held_out_keys(evals.values()), what="training set")
    return Task(name="micro", train=train, evals=evals)

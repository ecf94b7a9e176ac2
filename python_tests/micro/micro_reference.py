"""The embedded tasks' generators in Python: what the native ones must repeat draw by draw."""

import random
from dataclasses import dataclass

from grpo_engine.micro.corpus import Document  # fmt: skip
from grpo_engine.micro.facts import (  # fmt: skip
    CORPUS_TERMS,
    DOMAINS,
    FUNCTIONS,
    IN_DOMAIN,
    LETTERS,
    LIMIT,
    LIST_LENGTHS,
    NAME_COUNTS,
    OPERAND,
    PEOPLE,
    CorpusConfig,
)
from grpo_engine.micro.task import is_fact, is_test  # fmt: skip
from grpo_engine.micro.tokenizer import MicroTokenizer  # fmt: skip

GRADES = {"chain": CORPUS_TERMS, "word": CORPUS_TERMS, "code": LIST_LENGTHS, "logic": NAME_COUNTS}


@dataclass(frozen=True, slots=True)
class Item:
    """A problem before it gets a template: `key` names it for the split."""

    key: str
    prompt: str
    values: tuple[str, ...]  # worked answer; the last is the answer
    grade: int


def clamp(value: int) -> int:
    """A sum's value after one operand: the counter stops at 0 and at LIMIT - 1."""
    return min(max(value, 0), LIMIT - 1)


def sum_item(rng: random.Random, terms: int, domain: str) -> Item:
    # random() is several times as fast as randrange, and corpora are long
    value = int(rng.random() * LIMIT)
    words, values = [str(value)], []
    for _ in range(terms - 1):
        k = int(rng.random() * 2 * OPERAND) - OPERAND  # -OPERAND .. OPERAND - 1
        k += k >= 0  # no zero
        value = clamp(value + k)
        words.append(f"{k:+d}")
        values.append(str(value))
    text = " ".join(words)
    key = f"{text} ="
    prompt = key if domain == "chain" else f"{rng.choice(PEOPLE)} has {text} now ?"
    return Item(key, prompt, tuple(values), terms)


def code_item(rng: random.Random, length: int) -> Item:
    values = [rng.randrange(LIMIT) for _ in range(length)]
    function = rng.choice(FUNCTIONS)
    answer = {"first": values[0], "second": values[1], "last": values[-1], "max": max(values), "min": min(values)}
    prompt = " ".join([function, *map(str, values), ":"])
    return Item(prompt, prompt, (str(answer[function]),), length)


def logic_item(rng: random.Random, names: int) -> Item:
    order = rng.sample(LETTERS, names)  # from top to low
    pairs = [f"{a} > {b}" for a, b in zip(order, order[1:], strict=False)]
    rng.shuffle(pairs)
    question = rng.choice(("top", "low"))
    prompt = f"{' , '.join(pairs)} ; {question} ?"
    return Item(prompt, prompt, (order[0] if question == "top" else order[-1],), names)


def draw(rng: random.Random, domain: str, grade: int) -> Item:
    if domain == "code":
        return code_item(rng, grade)
    if domain == "logic":
        return logic_item(rng, grade)
    return sum_item(rng, grade, domain)


def document(rng: random.Random, config: CorpusConfig, tokenizer: MicroTokenizer) -> Document:
    domain = rng.choices(DOMAINS, (config.chain, config.word, config.code, config.logic))[0]
    while True:
        item = draw(rng, domain, rng.choice(GRADES[domain]))
        if not is_test(item.key) or is_fact(item.key):
            break
    answer = written(rng, config, domain, item)
    prompt = tokenizer.encode_prompt(item.prompt, rng.random() < config.chat)
    ids = [*tokenizer.encode(" ".join(answer)), tokenizer.eos_id]
    return Document(item.prompt, prompt + ids, [config.prompt_weight] * len(prompt) + [1.0] * len(ids))


def written(rng: random.Random, config: CorpusConfig, domain: str, item: Item) -> list[str]:
    """The answer as somebody wrote it down: direct or worked, with slips."""
    if domain not in IN_DOMAIN:
        wrong = LETTERS if domain == "logic" else tuple(map(str, range(LIMIT)))
        return [rng.choice(wrong) if rng.random() < config.error else item.values[-1]]
    start, *operands = map(int, item.key.split()[:-1])
    value, written = start, []
    for k in operands:
        value = rng.randrange(LIMIT) if rng.random() < config.error else clamp(value + k)
        written.append(str(value))
    return written if rng.random() >= config.direct else written[-1:]


def corpus(seed, config=None):
    """Documents without end."""
    rng, tokenizer = random.Random(seed), MicroTokenizer()
    while True:
        yield document(rng, config or CorpusConfig(), tokenizer)


def pack(documents):
    """(tokens, cu_seqlens, target, weight) as lists."""
    cu_seqlens = [0]
    for d in documents:
        cu_seqlens.append(cu_seqlens[-1] + len(d.tokens) - 1)
    return (
        [t for d in documents for t in d.tokens[:-1]],
        cu_seqlens,
        [t for d in documents for t in d.tokens[1:]],
        [w for d in documents for w in d.weights[1:]],
    )

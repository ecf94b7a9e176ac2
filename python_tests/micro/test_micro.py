import itertools
import random

import micro_reference as reference
import numpy as np
import pytest

from grpo_engine.micro import _corpus, corpus, facts
from grpo_engine.micro import task as task_
from grpo_engine.micro.facts import CorpusConfig
from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.rewards import exact


def solve(prompt: str) -> str:
    """The answer to a prompt, from its text alone and by other means than the generator's."""
    words = prompt.split()
    if words[0] in facts.PEOPLE:
        words = words[2:-1]
    if words[0] in facts.FUNCTIONS:
        values = sorted(map(int, words[1:-1])) if words[0] in ("max", "min") else list(map(int, words[1:-1]))
        return str(values[{"first": 0, "second": 1, "last": -1, "max": -1, "min": 0}[words[0]]])
    if ";" in words:
        above = {w for i, w in enumerate(words) if words[i + 1 : i + 2] == [">"]}
        below = {w for i, w in enumerate(words) if i and words[i - 1] == ">"}
        return (above - below if "top" in words else below - above).pop()
    value = int(words[0])
    for word in words[1:-1]:
        value = sorted((0, value + int(word), facts.LIMIT - 1))[1]
    return str(value)


@pytest.mark.parametrize("domain", facts.DOMAINS)
@pytest.mark.parametrize("test", [False, True])
def test_answers_are_right_and_in_the_vocabulary(domain, test):
    tokenizer = MicroTokenizer()
    for p in task_.problems(domain, 300, seed=5, test=test):
        assert p.answer == solve(p.prompt)
        assert tokenizer.decode(tokenizer.encode(p.prompt)) == p.prompt
        assert tokenizer.decode(tokenizer.encode(p.answer)) == p.answer
        assert task_.is_test(task_.key_of(p.prompt)) == test
        assert exact.score(f"1 2 {p.answer}", p) == 1.0
        assert exact.score(f"{p.answer} ;", p) == 0.0
        assert exact.score("", p) == 0.0


def test_sums_that_stop_at_an_end_are_common():
    found = task_.problems("chain", 500, seed=0, test=False)
    assert all(0 <= int(p.answer) < facts.LIMIT for p in found)
    stopped = sum(int(p.answer) != eval(p.prompt.removesuffix("=")) for p in found)
    assert 100 < stopped < 400  # so that adding up all terms at once is no way to answer


def test_same_seed_same_problems_other_seed_others():
    assert task_.problems("chain", 50, seed=1, test=False) == task_.problems("chain", 50, seed=1, test=False)
    assert task_.problems("chain", 50, seed=1, test=False) != task_.problems("chain", 50, seed=2, test=False)


def test_grades_are_balanced_and_problems_differ():
    found = task_.problems("chain", 500, seed=0, test=True)
    assert len({p.uid for p in found}) == 500
    for terms in facts.TERMS:
        assert sum(p.grade == terms for p in found) == 100
        assert all(len(p.prompt.split()) == terms + 1 for p in found if p.grade == terms)


def test_task_is_disjoint_from_its_tests_and_evals_do_not_depend_on_the_seed():
    a = task_.micro_task(train_problems=6400, eval_problems=200, seed=0)
    b = task_.micro_task(train_problems=64, eval_problems=200, seed=9)
    held_out = task_.held_out_keys(a.evals.values())
    assert len(held_out) >= 4 * 200 - 5  # a sum may be in both templates' sets
    assert not held_out & {task_.key_of(p.prompt) for p in a.train}
    assert a.evals == b.evals
    assert {n: s.in_domain for n, s in a.evals.items()} == {"chain": True, "word": True, "code": False, "logic": False}
    assert all(len(s.problems) == 200 for s in a.evals.values())
    # a smaller set is the start of a larger one, so studies of different sizes share their problems
    assert task_.eval_sets(50)["chain"].problems == a.evals["chain"].problems[:50]


def test_selection_problems_are_of_the_test_pool_and_in_no_test_set():
    test = task_.held_out_keys(task_.eval_sets().values())
    selection = task_.eval_sets(300, selection=True)
    assert list(selection) == ["chain", "word"]
    for s in selection.values():
        keys = {task_.key_of(p.prompt) for p in s.problems}
        assert len(keys) == 300 and not keys & test and all(map(task_.is_test, keys))
        assert {p.grade for p in s.problems} == set(facts.TERMS)
    task = task_.micro_task(train_problems=100, eval_problems=20, selection=True)
    assert task.evals == task_.eval_sets(20, selection=True)
    assert task.train == task_.micro_task(train_problems=100).train


def test_a_reuse_study_finds_50_000_training_problems_of_even_grades():
    found = task_.problems("chain", 50_000, seed=0, test=False)
    assert len({p.prompt for p in found}) == 50_000
    assert all(sum(p.grade == terms for p in found) == 10_000 for terms in facts.TERMS)


def test_key_is_the_same_in_both_templates():
    assert task_.key_of("ann has 7 +8 -3 now ?") == task_.key_of("7 +8 -3 =") == "7 +8 -3 ="


def test_share_of_the_test_pool():
    keys = [p.prompt for p in task_.problems("code", 2000, seed=3, test=False)]
    keys += [f"{k} x" for k in keys]
    share = sum(map(task_.is_test, keys[2000:])) / 2000
    sd = (facts.TEST_SHARE * (1 - facts.TEST_SHARE) / 2000) ** 0.5
    assert abs(share - facts.TEST_SHARE) < 5 * sd


@pytest.mark.parametrize(
    "config",
    [
        CorpusConfig(),
        CorpusConfig(chat=1.0),
        CorpusConfig(chain=0.1, word=0.2, code=0.3, logic=0.4, direct=0.1, error=0.6, chat=0.5, prompt_weight=0.3),
    ],
)
@pytest.mark.parametrize("seed", ["base/1", "control/1/0/80"])
def test_the_native_corpus_repeats_the_reference_document_by_document(seed, config):
    wanted = list(itertools.islice(reference.corpus(seed, config), 4000))
    assert list(itertools.islice(corpus.Corpus(seed, config=config), 4000)) == wanted
    packed = corpus.Corpus(seed, config=config)
    for first in range(0, 4000, 64):
        documents = wanted[first : first + 64]
        batch = packed.batch(len(documents))
        assert [a.dtype.name for a in batch] == ["int64", "int32", "int64", "float32"]
        for ours, theirs in zip(batch, reference.pack(documents), strict=True):
            assert ours.tolist() == np.array(theirs, dtype=ours.dtype).tolist()


def test_a_batch_ends_with_the_document_that_reaches_its_tokens():
    documents = list(itertools.islice(corpus.Corpus("a"), 10))
    ends = list(itertools.accumulate(len(d.tokens) - 1 for d in documents))
    for limit, count in ((ends[4], 5), (ends[4] + 1, 6), (1, 1), (10**6, 10)):
        assert corpus.Corpus("a").batch(10, max_tokens=limit)[1].tolist() == [0, *ends[:count]]


@pytest.mark.parametrize("domain", facts.DOMAINS)
def test_native_problems_repeat_the_reference(domain):
    source, rng = task_.native_source(domain), random.Random(domain)
    for grade in list(reference.GRADES[domain]) * 200:
        item = reference.draw(rng, domain, grade)
        assert source.item(getattr(_corpus.Domain, domain), grade) == (item.key, item.prompt, item.values[-1])
        assert source.is_test(item.key) == task_.is_test(item.key)


def test_a_key_of_every_length_has_the_same_hash_in_both_languages():
    source = task_.native_source("")
    assert [source.is_test("x" * n) for n in range(129)] == [task_.is_test("x" * n) for n in range(129)]
    with pytest.raises(ValueError, match="at most 128 bytes"):
        source.is_test("x" * 129)


def test_a_leaking_corpus_is_stopped():
    key = next(k for d in corpus.Corpus("a") for k in [task_.key_of(d.prompt)] if d.prompt != k)
    with pytest.raises(RuntimeError, match="corpus: problem .* is held out for testing"):
        corpus.Corpus("a", held_out={key}).batch(1000)


def test_corpus_holds_no_test_problem_and_no_evaluated_problem():
    held_out = task_.held_out_keys(task_.eval_sets(500).values())
    seen = [d.prompt for d in itertools.islice(corpus.Corpus("a"), 20000)]
    keys = {task_.key_of(p) for p in seen}
    assert not keys & held_out
    assert not any(task_.is_test(k) for k in keys if not task_.is_fact(k))
    assert any(task_.is_test(k) for k in keys)  # facts are in, whatever their hash


@pytest.mark.parametrize("template", ["{}", "ann has {} now ?"])
def test_a_leak_is_noticed(template):
    problem = task_.eval_sets(5)["chain"].problems[0]
    text = problem.prompt if template == "{}" else template.format(problem.prompt[:-2])
    with pytest.raises(RuntimeError, match="held out for testing"):
        task_.check_disjoint([text], frozenset(), what="training set")
    with pytest.raises(RuntimeError, match="training set"):
        task_.check_disjoint([text], {task_.key_of(text)}, what="training set")


def test_corpus_without_noise_is_right_and_has_the_shares_asked_for():
    config = CorpusConfig(error=0.0, direct=0.3, chat=0.2)
    tokenizer = MicroTokenizer()
    documents = list(itertools.islice(corpus.Corpus("b", config=config), 6000))
    sums = direct = chats = 0
    for d in documents:
        assert len(d.tokens) == len(d.weights)
        n = d.weights.count(config.prompt_weight)
        chat = d.tokens[0] == facts.VOCABULARY.index(facts.USER)
        chats += chat
        assert d.tokens[:n] == tokenizer.encode_prompt(d.prompt, chat)
        assert d.tokens[-1] == tokenizer.eos_id
        answer = tokenizer.decode(d.tokens[n:]).split()
        assert answer[-1] == solve(d.prompt)
        terms = len(task_.key_of(d.prompt).split()) - 1
        if ";" not in d.prompt and ":" not in d.prompt and terms > 2:
            sums += 1
            direct += len(answer) == 1
            assert len(answer) in (1, terms - 1)
    assert abs(direct / sums - 0.3) < 5 * (0.3 * 0.7 / sums) ** 0.5
    assert abs(chats / 6000 - 0.2) < 5 * (0.2 * 0.8 / 6000) ** 0.5


def test_a_wrong_value_is_carried_on():
    config = CorpusConfig(error=0.5, direct=0.0, chain=1.0, word=0.0, code=0.0, logic=0.0, chat=0.0)
    tokenizer = MicroTokenizer()
    carried = 0
    for d in itertools.islice(corpus.Corpus("c", config=config), 2000):
        start, *operands = map(int, d.prompt.split()[:-1])
        written = [start, *map(int, tokenizer.decode(d.tokens[len(operands) + 2 :]).split())]
        right = reference.clamp(start + operands[0])
        if written[1] != right and len(operands) > 1:
            carried += written[2] == reference.clamp(written[1] + operands[1])
    assert carried > 300  # about half of those whose first value is wrong


def test_tokens_per_worked_answer():
    tokenizer = MicroTokenizer()
    train = task_.problems("chain", 500, seed=0, test=False)
    lengths = [len(tokenizer.encode_prompt(p.prompt, True)) + p.grade - 1 + 1 - 1 for p in train]
    assert facts.tokens_per_worked_answer(chat=True) == pytest.approx(sum(lengths) / len(lengths))
    assert facts.tokens_per_worked_answer(chat=False) == pytest.approx(sum(lengths) / len(lengths) - 2)


def test_tokenizer_specials():
    t = MicroTokenizer()
    assert t.vocab_size == len(set(facts.VOCABULARY))
    assert t.stop_ids == (t.eos_id,)
    assert t.encode("") == []
    ids = t.encode_prompt("7 +8 =", True)
    assert [facts.VOCABULARY[i] for i in ids] == ["<user>", "7", "+8", "=", "<assistant>"]
    assert t.decode([*ids, t.eos_id]) == "7 +8 ="
    words = [random.Random(0).choice(facts.VOCABULARY[4:]) for _ in range(50)]
    assert t.decode(t.encode(" ".join(words))) == " ".join(words)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MicroTokenizer().encode("7 +99 ="), r"'\+99' in '7 \+99 ='"),
        (lambda: MicroTokenizer().decode([3, 10_000]), "got 10000"),
        (lambda: task_.problems("poetry", 1, seed=0, test=False), "got 'poetry'"),
        (lambda: task_.problems("logic", 100_000, seed=0, test=True), "problems exist, wanted 100000"),
        (lambda: task_.micro_task(train_problems=0), "train_problems must be at least 1, got 0"),
        (lambda: task_.eval_sets(0), "eval_problems must be at least 1, got 0"),
        (lambda: CorpusConfig(error=1.5), "error must be in"),
        (lambda: CorpusConfig(chain=0.9), "must be 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

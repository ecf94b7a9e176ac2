"""lm-evaluation-harness with our rollout and our log-probs, beside its own HFLM on the same checkpoint."""

import models
import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from grpo_engine.integrations import lm_eval as ours  # noqa: E402
from grpo_engine.model import weights  # noqa: E402
from grpo_engine.model.tokenizer import train_bpe  # noqa: E402

TEXTS = ["the cat sat on the mat and the dog ran after the cat .", "what is two and two ?\nfour", "a river runs to the sea"]
CHOICES = [(TEXTS[1][:21], f" {word}") for word in ("four", "five", "the sea and the cat", "a")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """HFLM and ours."""
    folder = tmp_path_factory.mktemp("models") / "one"
    vocabulary = train_bpe(TEXTS * 4, vocab_size=300, folder=folder.parent / "words").vocab_size
    weights.save_checkpoint(models.random_model(models.small_config(vocab=vocabulary), seed=4, scale=5.0), folder)
    train_bpe(TEXTS * 4, vocab_size=300, folder=folder)
    mine = ours.GrpoEngineLM(str(folder), max_step_tokens=128)
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4), mine


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def assert_scores_equal(theirs, mine):
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    assert [score for score, _ in mine] == pytest.approx([score for score, _ in theirs], abs=1e-4)


def test_greedy_answers_are_those_of_hflm(pair):
    contexts = [text[:cut] for text in TEXTS for cut in (7, 20)] + [TEXTS[0] * 20]  # the last is longer than the model

    def answers(**settings):
        asked = requests("generate_until", *((context, settings) for context in contexts))
        theirs, mine = (one.generate_until(asked, disable_tqdm=True) for one in pair)
        assert mine == theirs
        return mine

    whole = answers(until=[], max_gen_toks=50)  # more than are made before the first look
    assert len(set(whole)) > 3 and answers(max_gen_toks=10)[0] == whole[0][: len(answers(max_gen_toks=10)[0])]
    stops = [whole[0][9:11], whole[1][-6:-3]]
    cut = answers(until=stops, max_gen_toks=50)
    assert (
        whole[0].startswith(cut[0])
        and len(cut[0]) < len(whole[0])
        and not any(stop in text for stop in stops for text in cut)
    )


def test_log_likelihoods_are_those_of_hflm(pair):
    mine = pair[1]
    asked = [*CHOICES, ("", "the cat"), ("the cat ", "sat"), (TEXTS[0] * 20, " and"), *CHOICES]
    results = [one.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True) for one in pair]
    assert_scores_equal(*results)
    alone = [mine.loglikelihood(requests("loglikelihood", one), disable_tqdm=True)[0] for one in asked]
    assert alone == results[1]  # the same bits: neither its neighbours nor a shared context show


def test_one_token_is_the_greedy_one(pair):
    asked = [(None, [3, 7, 5], [token]) for token in range(pair[1].text.vocab_size)]
    results = [one._loglikelihood_tokens(asked, disable_tqdm=True) for one in pair]
    assert_scores_equal(*results)
    assert sum(greedy for _, greedy in results[1]) == 1 and max(results[1])[1]


def test_rolling_log_likelihoods_are_those_of_hflm(pair):
    asked = [(text,) for text in (*TEXTS, TEXTS[0] * 20)]
    theirs, mine = (one.loglikelihood_rolling(requests("loglikelihood_rolling", *asked), disable_tqdm=True) for one in pair)
    assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-4)


def test_chats_are_written_as_hflm_does(pair):
    chat = [{"role": "user", "content": "two and two ?"}, {"role": "assistant", "content": "fo"}]
    for turns, more in ((chat[:1], True), (chat, False)):
        theirs, mine = (one.apply_chat_template(turns, add_generation_prompt=more) for one in pair)
        assert mine == theirs and "<|im_start|>" in mine
    assert pair[1].chat_template(True) == pair[0].chat_template(True)


def test_sampled_answers_depend_neither_on_how_often_they_are_looked_at_nor_on_the_batch(pair, monkeypatch):
    _, mine = pair
    how = {"do_sample": True, "temperature": 0.9, "max_gen_toks": 24}
    filtered = how | {"top_p": 0.8, "until": ["a"]}
    asked = requests("generate_until", *((text, s) for text in TEXTS for s in (how, filtered, how)))
    whole = mine.generate_until(asked)
    assert whole[0] != whole[2]  # the same question twice: two draws
    monkeypatch.setattr(ours, "FIRST_TOKENS", 1)
    assert mine.generate_until(asked) == whole
    monkeypatch.setitem(mine.limits, "max_running", 2)
    assert mine.generate_until(asked) == whole


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"repetition_penalty": 1.2}, "unknown generation settings repetition_penalty; known: do_sample"),
        ({"max_gen_toks": 4096}, "max_gen_toks=4096 must be positive and leave room"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_by_name(pair, settings, says):
    with pytest.raises(ValueError, match=says):
        pair[1].generate_until(requests("generate_until", ("the", settings)))


def test_bad_arguments_are_refused_by_name(pair):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'float16'"):
        ours.GrpoEngineLM(pair[1].pretrained, dtype="float16")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'mps'"):
        ours.GrpoEngineLM(pair[1].pretrained, device="mps")
    with pytest.raises(ValueError, match="continuation of 1 to 256 tokens, got 1 and 0"):
        pair[1]._loglikelihood_tokens([(("the", ""), [5], [])])


def test_the_harness_knows_it_by_name():
    assert lm_eval.api.registry.get_model("grpo_engine") is ours.GrpoEngineLM

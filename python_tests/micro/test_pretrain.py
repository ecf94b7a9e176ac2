import dataclasses
import json
import math
import multiprocessing

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from grpo_engine.config import RunConfig
from grpo_engine.micro import control, facts, pretrain, task
from grpo_engine.micro import ladder as ladder_
from grpo_engine.micro.corpus import Corpus
from grpo_engine.micro.ladder import LADDER
from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.model import weights
from grpo_engine.model.decoder import Model
from grpo_engine.model.tokenizer import HFTokenizer
from grpo_engine.records.ledger import Ledger
from grpo_engine.train import language
from grpo_engine.train.schedule import Schedule


@pytest.fixture
def tiny(monkeypatch):
    """A ladder of one size that trains in a second."""
    small = dataclasses.replace(
        LADDER["xxs"],
        base=Schedule(tokens=12_000, lr=1e-2),
        instruct=Schedule(tokens=3_000, lr=3e-3, warmup=0.1, anneal=0.9),
    )
    monkeypatch.setattr(ladder_, "LADDER", {"tiny": small})
    return small


def control_config(**batch) -> RunConfig:
    return RunConfig.model_validate(
        {"steps": 3, "seed": 4, "method": "pretrain", "model": {"size": "tiny"}, "batch": {"prompts": 8} | batch}
    )


def batch_of(count: int, seed: str = "x") -> language.DocumentBatch:
    return pretrain.document_batch(Corpus(seed), count)


# ------------------------------------------------------------------------------------------ recipes


def test_ladder_sizes():
    counts = []
    for size in LADDER:
        with torch.device("meta"):
            counts.append(Model(ladder_.architecture(size)).num_non_embedding)
    assert counts == [6_288, 21_792, 74_304, 296_064, 985_376]


def test_schedule_warms_up_holds_and_anneals():
    s = Schedule(tokens=1000, lr=2.0, warmup=0.1, anneal=0.5, floor=0.05)
    assert 0 < s.rate(0.0) < 0.05
    assert s.rate(0.05) == pytest.approx(1.0, rel=0.05)
    assert s.rate(0.2) == s.rate(0.5) == 2.0
    assert s.rate(0.75) == pytest.approx(2.0 * (0.05 + 0.95 / 2))
    assert s.rate(1.0) == pytest.approx(0.1)
    assert s.rate(1.2) == s.rate(1.0)  # the last step may start after the last token


@pytest.mark.parametrize("kind", ["base", "instruct"])
def test_all_recipes_end_annealed(kind):
    for size in LADDER:
        s = ladder_.schedule_of(ladder_.recipe(size), kind)
        assert s.rate(1.0) <= 0.05 * s.lr
        assert ladder_.training_tokens(size, kind) == s.tokens


# ------------------------------------------------------------------------------------------ training


def test_language_loss_is_weighted_cross_entropy():
    model = Model(ladder_.architecture("xxs")).init_weights(0, std=None)
    batch = batch_of(7)
    loss = language.language_loss(model, batch)
    total = 0.0
    for a, b in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
        alone = language.DocumentBatch(
            tokens=batch.tokens[a:b], cu_seqlens=torch.tensor([0, b - a], dtype=torch.int32),
            target=batch.target[a:b], weight=torch.ones(b - a),
        )  # fmt: skip
        for i in range(b - a):
            w = torch.zeros(b - a)
            w[i] = 1.0
            one = language.language_loss(model, dataclasses.replace(alone, weight=w))
            total += one.item() * batch.weight[a + i].item()
    assert loss.item() == pytest.approx(total / batch.weight.sum().item(), rel=1e-5)
    # an untrained model knows nothing: close to the logarithm of the vocabulary
    assert abs(loss.item() - math.log(len(facts.VOCABULARY))) < 1.0


def test_training_lowers_the_loss_on_other_documents():
    model = Model(ladder_.architecture("xxs")).init_weights(0, std=None)
    unseen = batch_of(200, "unseen")
    with torch.no_grad():
        before = language.language_loss(model, unseen).item()
    calls = []
    seen = Corpus("seen")
    language.train_language(
        model, Schedule(tokens=30_000, lr=1e-2), batches=iter(lambda: pretrain.document_batch(seen, 64), None),
        betas=(0.9, 0.98), progress=lambda *a: calls.append(a),
    )  # fmt: skip
    with torch.no_grad():
        after = language.language_loss(model, unseen).item()
    assert after < before - 1.0
    assert calls[-1][:2] == (30_000, 30_000)
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_a_leaking_corpus_stops_the_training():
    problem = task.eval_sets(1)["chain"].problems[0]
    model = Model(ladder_.architecture("xxs")).init_weights(0, std=None)

    def leaking():
        task.check_disjoint([problem.prompt], frozenset(), what="corpus")
        yield

    with pytest.raises(RuntimeError, match="held out"):
        language.train_language(model, Schedule(tokens=100, lr=1e-2), batches=leaking(), betas=(0.9, 0.98))


# --------------------------------------------------------------------------------------------- cache


def test_ensure_model_trains_once_and_shares_the_base(tiny, tmp_path):
    calls = []
    assert pretrain.cached_model("tiny", "base", cache_dir=tmp_path) is None
    chat = pretrain.ensure_model("tiny", "instruct", cache_dir=tmp_path, progress=lambda *a: calls.append(a))
    trained = len(calls)
    base = pretrain.ensure_model("tiny", "base", cache_dir=tmp_path, progress=lambda *a: calls.append(a))
    assert pretrain.ensure_model("tiny", "instruct", cache_dir=tmp_path) == chat
    assert len(calls) == trained  # the base was made for its instruct model, and is not made again
    assert pretrain.cached_model("tiny", "base", cache_dir=tmp_path) == base
    assert {c[1] for c in calls} == {12_000, 3_000}
    assert json.loads((base / "config.json").read_text())["hidden_size"] == 16

    a, b = (weights.load_model(f, dtype=torch.float32).state_dict() for f in (base, chat))
    assert a.keys() == b.keys()
    assert any(not torch.equal(a[n], b[n]) for n in a)
    assert sorted(p.suffix for p in (tmp_path / "models").iterdir()) == ["", "", ".lock", ".lock"]


def test_the_saved_tokenizer_is_the_micro_tokenizer(tiny, tmp_path):
    folder = pretrain.ensure_model("tiny", "base", cache_dir=tmp_path)
    ours, saved, theirs = MicroTokenizer(), HFTokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert (saved.vocab_size, saved.stop_ids, theirs.eos_token_id) == (ours.vocab_size, ours.stop_ids, ours.eos_id)
    texts = [" ".join(facts.VOCABULARY), "", " 7  +8\n="]
    texts += [text for d in facts.DOMAINS for p in task.problems(d, 50, seed=5, test=True) for text in (p.prompt, p.answer)]
    for text in texts:
        ids = ours.encode(text)
        assert saved.encode(text) == theirs(text)["input_ids"] == ids
        assert saved.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    for text in texts[1:]:
        for chat in (False, True):
            assert saved.encode_prompt(text, chat) == ours.encode_prompt(text, chat)
    turns = [{"role": "user", "content": "7 +8 ="}, {"role": "assistant", "content": "15"}]
    assert theirs.apply_chat_template(turns, tokenize=False).split() == "<user> 7 +8 = <assistant> 15 <eos>".split()
    with pytest.raises(Exception, match="UNK"):
        saved.encode("7 plus 8")


def test_the_same_recipe_gives_the_same_bits(tiny, tmp_path):
    folders = [pretrain.ensure_model("tiny", "base", cache_dir=tmp_path / name) for name in "ab"]
    a, b = (weights.load_model(f, dtype=torch.float32).state_dict() for f in folders)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert folders[0].name == folders[1].name


def test_key_follows_what_decides_the_weights(tiny, monkeypatch):
    base, chat = pretrain.model_key("tiny", "base"), pretrain.model_key("tiny", "instruct")
    assert base != chat

    def with_recipe(**changes):
        monkeypatch.setattr(ladder_, "LADDER", {"tiny": dataclasses.replace(tiny, **changes)})
        return pretrain.model_key("tiny", "base"), pretrain.model_key("tiny", "instruct")

    other_sft = with_recipe(instruct=Schedule(tokens=4_000, lr=1e-3))
    assert other_sft[0] == base
    assert other_sft[1] != chat
    noisier = with_recipe(corpus=facts.CorpusConfig(error=0.2))
    assert noisier[0] != base
    assert noisier[1] != chat
    assert with_recipe() == (base, chat)
    assert pretrain.model_key("tiny", "base", seed=1) != base
    assert pretrain.model_key("tiny", "instruct", seed=1) != chat
    assert with_recipe(seed=7) == (base, chat)  # the caller says which
    monkeypatch.setattr(pretrain, "VERSION", pretrain.VERSION + 1)
    assert pretrain.model_key("tiny", "base") != base


def test_each_seed_makes_a_model_of_its_own(tiny, tmp_path):
    make = lambda seed, kind="base": pretrain.ensure_model("tiny", kind, seed=seed, cache_dir=tmp_path)  # noqa: E731
    folders = [make(0), make(1), make(1, "instruct")]
    assert [f.name.rpartition("-")[0] for f in folders] == ["tiny-base-0", "tiny-base-1", "tiny-instruct-1"]
    first, second, chat = (weights.load_model(f, dtype=torch.float32).state_dict() for f in folders)
    assert not any(torch.equal(first[n], second[n]) for n in first if "norm" not in n and "bias" not in n)
    apart = [sum((chat[n] - base[n]).norm() for n in chat) for base in (first, second)]
    assert apart[1] < 0.5 * apart[0]  # an instruct model is made from the base of its seed
    assert pretrain.cached_model("tiny", "instruct", seed=0, cache_dir=tmp_path) is None


def _ensure(ladder, cache, queue):
    ladder_.LADDER = ladder
    calls = []
    folder = pretrain.ensure_model("tiny", "base", cache_dir=cache, progress=lambda *a: calls.append(a))
    queue.put((str(folder), bool(calls)))


def test_two_processes_train_one_model(tiny, tmp_path):
    context = multiprocessing.get_context("spawn")  # a forked child has no OpenMP threads
    queue = context.Queue()
    both = [context.Process(target=_ensure, args=({"tiny": tiny}, tmp_path, queue)) for _ in range(2)]
    for p in both:
        p.start()
    answers = [queue.get(timeout=120) for _ in both]
    for p in both:
        p.join()
        assert p.exitcode == 0
    assert answers[0][0] == answers[1][0]
    assert sorted(trained for _, trained in answers) == [False, True]


def test_a_failed_training_leaves_no_model(tiny, tmp_path, monkeypatch):
    def fail(*_args):
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(weights, "save_checkpoint", fail)
        with pytest.raises(OSError, match="disk full"):
            pretrain.ensure_model("tiny", "base", cache_dir=tmp_path)
    assert pretrain.cached_model("tiny", "base", cache_dir=tmp_path) is None
    assert [p.suffix for p in (tmp_path / "models").iterdir()] == [".lock"]
    assert pretrain.ensure_model("tiny", "base", cache_dir=tmp_path).is_dir()


# -------------------------------------------------------------------------------------------- control


def test_control_reads_at_least_what_rl_trains_on(tiny):
    config = control_config()
    corpus = control.control_corpus(config)
    answers = 8 * config.batch.group_size
    for step in (1, 2):
        batches = list(corpus.batches(step))
        total = sum(b.tokens.numel() for b in batches)
        assert answers * facts.tokens_per_worked_answer(chat=False) <= total < corpus.tokens + 30
        assert all(b.cu_seqlens.numel() - 1 <= tiny.documents for b in batches)


def test_control_documents_depend_on_seed_and_step_alone(tiny):
    def tokens(config, step):
        return [b.tokens.tolist() for b in control.control_corpus(config).batches(step)]

    a = control_config()
    assert tokens(a, 2) == tokens(a, 2)
    assert tokens(a, 2) != tokens(a, 1)
    assert tokens(a, 2) != tokens(a.model_copy(update={"seed": 5}), 2)
    other_base = a.model_copy(update={"model": a.model.model_copy(update={"seed": 1})})
    assert tokens(a, 2) != tokens(other_base, 2)


def test_control_of_an_instruct_model_reads_chat(tiny):
    config = control_config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"kind": "instruct"})})
    user = facts.VOCABULARY.index(facts.USER)
    for batch in control.control_corpus(config).batches(1):
        assert (batch.tokens[batch.cu_seqlens[:-1].long()] == user).all()


def test_control_steps_train_anneal_and_book_their_cost(tiny):
    config = control_config()
    model = Model(ladder_.architecture("tiny")).init_weights(0, std=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)
    corpus, ledger = control.control_corpus(config), Ledger()
    outcomes, rates = [], []
    for step in (1, 2, 3):
        outcome = control.control_step(model, optimizer, corpus, config=config, step=step, ledger=ledger)
        outcomes.append(outcome)
        rates.append(optimizer.param_groups[0]["lr"])
    assert outcomes[-1].loss < outcomes[0].loss
    assert all(math.isfinite(o.grad_norm) and o.grad_norm > 0 for o in outcomes)
    assert tiny.base.lr > rates[0] > rates[1] > rates[2] > 0
    cost = ledger.close_step()
    assert cost["forward"].tokens == cost["backward"].tokens == sum(o.trained_tokens for o in outcomes)
    assert cost["backward"].flops == pytest.approx(2 * cost["forward"].flops)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ladder_.recipe("xxl"), "no size 'xxl'; it has xxs, xs"),
        (lambda: pretrain.ensure_model("s", "chat"), "kind must be 'base' or 'instruct', got 'chat'"),
        (lambda: control.control_corpus(RunConfig.model_validate({"model": {"path": "x"}})), "needs model.size"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

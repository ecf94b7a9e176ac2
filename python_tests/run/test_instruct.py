"""An instruct checkpoint as transformers saves it, trained on problems in JSONL: prompts, ends of answers, what is saved."""

import json
import shutil

import models
import pytest
import torch

from grpo_engine.config import RunConfig, validate
from grpo_engine.model.tokenizer import train_bpe
from grpo_engine.records import jsonl, records
from grpo_engine.rollout.engine import Engine
from grpo_engine.run.run import train

transformers = pytest.importorskip("transformers")

TEMPLATE = (  # in the form of Qwen2.5's: a system turn of its own where the messages bring none
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou count well.<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'user' or message.role == 'assistant' or not loop.first %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)
RATES = [0.5, 0.1, 0.9, 0.3, 0.7, 1.0, 0.0, 0.2]
LIMIT = 48  # tokens of a prompt


def question(i):
    return f"what is {i} and one?" + " and one" * 60 * (i in (2, 6))  # two that do not fit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Written by transformers alone: weights, tokenizer, template and several ends of an answer."""
    bpe, folder = tmp_path_factory.mktemp("bpe"), tmp_path_factory.mktemp("instruct")
    train_bpe(["what is one and one and two?", "user system assistant You count well."], vocab_size=290, folder=bpe)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bpe)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(models.qwen2_config(vocab=290, width=32, layers=1, heads=2, positions=256))
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>", "9")]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "train.jsonl"
    held_out = path.with_name("held_out.jsonl")
    rows = [
        {"question": question(i), "answer": letter, "pass_rate": rate, "data_source": "stem__supergpqa"}
        for i, (letter, rate) in enumerate(zip("ABCDEFGH", RATES, strict=True))
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    held_out.write_text("".join(json.dumps(r | {"question": "So " + r["question"]}) + "\n" for r in rows[:4]))
    return path, held_out


def run(checkpoint, problems, out, kind, monkeypatch, **rollout):
    """A run of three steps; what the engine was asked and what it answered in each."""
    seen = []
    stream = Engine.stream

    def watched(self, requests, **options):
        rollout = stream(self, requests, **options)
        if options.get("phase") is None:  # not an evaluation
            seen.append((requests[0].prompts, options["stop_ids"], rollout))
        return rollout

    monkeypatch.setattr(Engine, "stream", watched)
    config = validate(RunConfig, {
        "model": {"path": str(checkpoint), "kind": kind}, "steps": 3,
        "task": {"name": "files", "train": str(problems[0]), "evals": {"held_out": str(problems[1])}, "shuffle": False},
        "rollout": {"max_new_tokens": 40, "max_prompt_tokens": LIMIT, **rollout}, "batch": {"prompts": 4, "group_size": 8},
        "evaluation": {"count": 1, "samples": 1}, "optimizer": {"lr": 1e-3},
        "reward": {"scoring": "paper"},  # draws letters, so that random text is right now and then
    })  # fmt: skip
    folder = train(config, out, quiet=True)
    return folder, [([list(p) for p in prompts], stops, *rollout.batches) for prompts, stops, rollout in seen]


@pytest.mark.parametrize("kind", ["instruct", "base"])
def test_training_from_template_to_template(checkpoint, problems, kind, tmp_path, monkeypatch):
    out, seen = run(checkpoint, problems, tmp_path / "run", kind, monkeypatch)
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)

    def prompt(i):
        if kind == "base":
            return theirs.encode(question(i), add_special_tokens=False)
        turn = [{"role": "user", "content": question(i)}]
        return theirs.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)

    # easy to hard, without the two that are too long, over and over
    order = [i for i in sorted(range(8), key=lambda i: -RATES[i]) if i not in (2, 6)] * 2
    assert [p for prompts, _, _ in seen for p in prompts] == [prompt(i) for i in order]
    header = json.loads((out / records.RUN_FILE).read_text())["task"]
    assert header == {"train_problems": 6, "left_out_too_long": 2, "evals_left_out_too_long": {"held_out": 1}}
    uids = (out / records.ORDER_FILE).read_text().split()
    assert len(uids) == 12 and uids[:6] == uids[6:] and len(set(uids)) == 6
    assert [e["num_problems"] for e in jsonl.read_jsonl(out / records.EVALS_FILE).records] == [3, 3]

    stops = set(transformers.GenerationConfig.from_pretrained(checkpoint).eos_token_id)
    assert len(stops) == 3
    ends = set()
    for _, asked, rollout in seen:
        assert set(asked) == stops
        for answer, finish in zip(rollout.responses(), rollout.finish, strict=True):
            assert not stops & set(answer[:-1]) and (finish == "stop") == (answer[-1] in stops)
            ends.add(answer[-1])
    assert ends >= stops

    saved = transformers.AutoTokenizer.from_pretrained(out / "checkpoint")
    assert saved.chat_template == theirs.chat_template == TEMPLATE
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert set(model.generation_config.eos_token_id) == stops
    assert any(s["reward_mean"] > 0 for s in jsonl.read_jsonl(out / records.STEPS_FILE).records)
    assert not torch.equal(model.model.norm.weight, torch.ones(32))  # as it began
    answer = model.generate(torch.tensor([prompt(0)]), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > len(prompt(0))


def test_an_instruct_run_of_a_base_tokenizer_is_refused_before_any_step(checkpoint, problems, tmp_path, monkeypatch):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="base: no chat template there"):
        run(base, problems, tmp_path / "run", "instruct", monkeypatch)
    assert not (tmp_path / "run" / records.STEPS_FILE).exists()


def test_a_prompt_without_room_for_an_answer_is_refused_before_any_step(checkpoint, problems, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"up to \d+ tokens .* 256 positions; rollout.max_prompt_tokens=56 leaves"):
        run(checkpoint, problems, tmp_path / "run", "base", monkeypatch, max_prompt_tokens=None, max_new_tokens=200)
    with pytest.raises(ValueError, match="max_prompt_tokens=2 leaves no problem to train on"):
        run(checkpoint, problems, tmp_path / "run", "base", monkeypatch, max_prompt_tokens=2)
    assert not (tmp_path / "run" / records.STEPS_FILE).exists()

"""Prompts that are chats: system messages, earlier turns, and lists of messages that a file holds as text."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from grpo_engine.tasks.files import files_task, read_problems
from grpo_engine.types import Message

HI = [{"role": "user", "content": "hi"}]
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    SYSTEM,
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
]


@pytest.fixture(params=["plain", "verl", "parquet"])
def read(request, tmp_path):
    """The problem of a prompt, in either form of a row and in either format."""

    def read(prompt):
        row = {"prompt": prompt, "answer": "1"}
        if request.param != "plain":
            row = {"prompt": prompt, "data_source": "math_dapo", "reward_model": {"ground_truth": "1"}}
        if request.param == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "p.parquet")
            return read_problems(tmp_path / "p.parquet")[0]
        (tmp_path / "p.jsonl").write_text(json.dumps(row))
        return read_problems(tmp_path / "p.jsonl")[0]

    return read


WRITTEN = {
    "json": json.dumps,
    "json over lines": lambda m: "\n " + json.dumps(m, indent=1) + "\n",
    "python": str,
    "json, not ascii": lambda m: json.dumps(m, ensure_ascii=False),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_messages_written_as_text_are_the_messages(read, how):
    p = read(WRITTEN[how](HI))
    assert (p.prompt, p.messages) == ("hi", None)
    odd = [{"role": "user", "content": 'it\'s "odd"\n\\frac{1}{2} \u2264'}]
    assert read(WRITTEN[how](odd)).prompt == odd[0]["content"]
    p = read(WRITTEN[how](TURNS))
    assert p.messages == tuple(Message(**m) for m in TURNS)


def test_a_text_that_is_messages_and_one_that_only_begins_like_them(read):
    for text in ("[{1, 2}, {3}] is a list of sets; how many?", "[1, 2, 3]", "[]", '[{"a": 1}]', "[x]", '["role"]'):
        p = read(text)
        assert (p.prompt, p.messages) == (text, None)
    for text in ("[{'role': 'user', 'content': 'hi'} {'role': 'user', 'content': 'ho'}]",  # as NumPy prints them
                 '[{"role": "user", "content": "hi'):  # fmt: skip
        with pytest.raises(ValueError, match="(row 0|line 1): prompt looks like messages, and is neither JSON nor a Python"):
            read(text)


def test_several_messages_are_kept_and_a_base_model_sees_their_contents(read):
    p = read(TURNS)
    assert p.messages == tuple(Message(**m) for m in TURNS) and p.prompt == "Be brief.\n\n1+1?\n\n2\n\n2+2?"
    p = read([SYSTEM, *HI])
    assert p.messages == (Message("system", "Be brief."), Message("user", "hi")) and p.prompt == "Be brief.\n\nhi"
    assert read(HI).messages is None
    begun = [*HI, {"role": "assistant", "content": "The answer is"}]
    assert read(begun).messages[-1] == Message("assistant", "The answer is")


def test_other_ways_to_write_a_message(read):
    assert read([{"from": "system", "value": "Be brief."}, {"from": "human", "value": "hi"}]).messages == (
        Message("system", "Be brief."), Message("user", "hi")
    )  # fmt: skip
    assert read([{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]).prompt == "hi"
    with pytest.raises(ValueError, match="prompt must be text or a list of messages with role and content, got list"):
        read([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}])


def test_one_text_in_two_ways_is_one_problem(tmp_path):
    rows = [{"prompt": p, "answer": "1"} for p in (HI, json.dumps(HI), str(HI), "hi")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert len(read_problems(tmp_path / "p.jsonl")) == 1
    (tmp_path / "t.jsonl").write_text(json.dumps({"question": "ho", "answer": "1"}))
    with pytest.raises(ValueError, match="every training problem is also in an evaluation file"):
        files_task(train=tmp_path / "p.jsonl", evals={"t": tmp_path / "p.jsonl"})


@pytest.mark.parametrize("field", ["reward_model", "extra_info"])
def test_named_values_written_as_text(tmp_path, field):
    row = {"data_source": "math_dapo", "prompt": "?", "reward_model": {"ground_truth": 0.00001}, "extra_info": {"index": 3}}
    row[field] = json.dumps(row[field]).replace("1e-05", "0.00001")
    (tmp_path / "p.jsonl").write_text(json.dumps(row).replace("1e-05", "0.00001"))
    (p,) = read_problems(tmp_path / "p.jsonl")
    assert p.answer == "0.00001" and p.info["index"] == 3

"""What a model is given: chat templates and their arguments, system prompts, plain templates, begin of text."""

import json
import re

import pytest

from grpo_engine.config import load_run_config
from grpo_engine.load import prompt_tokens
from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.model.tokenizer import HFTokenizer, PromptTokens, train_bpe
from grpo_engine.types import Message, Problem

TEMPLATE = (  # in the form of Qwen3's
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
QUESTION = Problem(uid="q", prompt="{2}+2?", answer="", domain="", reward="exact")
CHAT = Problem(
    uid="c", prompt="Be brief.\n\n1?\n\n2\n\n3?", answer="", domain="", reward="exact",
    messages=(Message("system", "Be brief."), Message("user", "1?"), Message("assistant", "2"), Message("user", "3?")),
)  # fmt: skip
BEGUN = Problem(
    uid="b", prompt="1?\n\nIt is", answer="", domain="", reward="exact",
    messages=(Message("user", "1?"), Message("assistant", "It is")),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    train_bpe(["system user assistant Be brief. think 1? 2"], vocab_size=300, folder=tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return tmp_path


def around(folder, before, after=()):
    """tokenizer.json puts tokens around a text."""
    path = folder / "tokenizer.json"
    fast = json.loads(path.read_text())
    ids = {t["content"]: t["id"] for t in fast["added_tokens"]}
    parts = [[{"SpecialToken": {"id": t, "type_id": 0}} for t in part] for part in (before, after)]
    fast["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [*parts[0], {"Sequence": {"id": "A", "type_id": 0}}, *parts[1]],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (*before, *after)},
    }  # fmt: skip
    path.write_text(json.dumps(fast))
    return HFTokenizer(folder)


def text_of(folder, problem, **settings):
    """What a model sees, special tokens written out."""
    tokenizer = HFTokenizer(folder)
    return tokenizer.decode(list(PromptTokens(tokenizer, **settings)(problem)), special=True)


# ------------------------------------------------------------------ chats


def test_a_chat_has_the_roles_of_its_messages(folder):
    assert text_of(folder, CHAT, chat=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(folder, CHAT, chat=False) == CHAT.prompt


def test_a_chat_that_ends_with_the_assistant_is_gone_on_with(folder):
    assert text_of(folder, BEGUN, chat=True) == "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\nIt is"


def test_messages_are_what_transformers_makes_of_them(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    encode = PromptTokens(HFTokenizer(folder), chat=True, chat_template_kwargs={"enable_thinking": False})
    messages = [m._asdict() for m in CHAT.messages]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, enable_thinking=False)
    assert list(encode(CHAT)) == wanted


def test_arguments_of_the_chat_template(folder):
    plain, thinking, silent = (
        text_of(folder, QUESTION, chat=True, chat_template_kwargs=arguments)
        for arguments in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    )
    assert plain == thinking == "<|im_start|>user\n{2}+2?<|im_end|>\n<|im_start|>assistant\n"
    assert silent == plain + "<think>\n\n</think>\n\n"
    with pytest.raises(ValueError, match="the chat template reads no 'enable_thinkin'"):
        text_of(folder, QUESTION, chat=True, chat_template_kwargs={"enable_thinkin": False})


def test_a_template_that_refuses_a_role_says_which_there_were(folder):
    path = folder / "tokenizer_config.json"
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": refusing}))
    with pytest.raises(ValueError, match=r"no system, please \(roles: system, user, assistant, user\)"):
        text_of(folder, CHAT, chat=True)


# ------------------------------------------------------------------ of one's own


def test_a_system_prompt_of_ones_own(folder):
    mine = {"system_prompt": "Think."}
    assert text_of(folder, QUESTION, chat=True, **mine).startswith(
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n{2}+2?"
    )
    chat = text_of(folder, CHAT, chat=True, **mine)
    assert chat == text_of(folder, CHAT, chat=True).replace("Be brief.", "Think.")
    assert text_of(folder, QUESTION, chat=False, **mine) == "Think.\n\n{2}+2?"
    assert text_of(folder, CHAT, chat=False, **mine) == CHAT.prompt.replace("Be brief.", "Think.")


def test_a_plain_template_of_ones_own(folder):
    template = "Question: {prompt}\nAnswer in \\boxed{}: {"
    assert text_of(folder, QUESTION, chat=False, prompt_template=template) == "Question: {2}+2?\nAnswer in \\boxed{}: {"
    both = text_of(folder, QUESTION, chat=False, prompt_template="Q: {prompt} A:", system_prompt="Think.")
    assert both == "Q: Think.\n\n{2}+2? A:"


def test_the_settings_of_a_run_reach_the_prompts(folder):
    tokenizer = HFTokenizer(folder)

    def text(*settings):
        config = load_run_config(None, ["model.size=null", f"model.path={folder}", *settings])
        return tokenizer.decode(list(prompt_tokens(config.model, tokenizer)(QUESTION)), special=True)

    assert text('model.prompt_template="Q: {prompt}\\nA:"') == "Q: {2}+2?\nA:"
    assert text("model.system_prompt=Think.") == "Think.\n\n{2}+2?"
    assert text("model.kind=instruct", "model.chat_template_kwargs.enable_thinking=false").endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.chat_template_kwargs={enable_thinking: false}"], "chat_template_kwargs belongs to kind=instruct, got"),
        (["model.kind=instruct", "model.prompt_template='Q: {prompt}'"], "prompt_template belongs to kind=base"),
        (["model.prompt_template='Q: {question}'"], "prompt_template must hold {prompt}, got 'Q: {question}'"),
        (["model.kind=instruct", "model.chat_template_kwargs={tokenize: true}"], "must not hold tokenize: a run sets it"),
        (["model.system_prompt=7"], "model.system_prompt: .*valid string, got 7"),
        (["model.path=null", "model.size=s", "model.system_prompt=x"], "belong to models with a path"),
    ],
)  # fmt: skip
def test_a_setting_that_would_do_nothing_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        load_run_config(None, ["model.size=null", "model.path=/m", *settings])


def test_the_embedded_models_know_one_message():
    tokenizer = MicroTokenizer()
    assert tokenizer.encode_chat([Message("user", "7 +8 =")]) == tokenizer.encode_prompt("7 +8 =", True)
    with pytest.raises(ValueError, match=r"wanted a user's only message, got \['system', 'user'\]"):
        tokenizer.encode_chat([Message("system", "7"), Message("user", "7")])


# ------------------------------------------------------------------ begin of text


BEGIN = "<|im_start|>"


def test_a_prompt_that_was_rendered_before_has_one_begin_of_text(folder):
    t = around(folder, [BEGIN])
    begin = t.encode(BEGIN)
    assert t.encode_prompt("hi", False) == [*begin, *t.encode("hi")]
    for text in (f"{BEGIN}hi", f"{BEGIN}user\nhi<|im_end|>\n"):
        assert t.encode_prompt(text, False) == t.encode(text)
    # two that the text itself has are the text's affair, and one in the middle is no beginning
    assert t.encode_prompt(f"{BEGIN}{BEGIN}hi", False) == [*begin, *begin, *t.encode("hi")]
    assert t.encode_prompt(f"hi{BEGIN}", False) == [*begin, *t.encode("hi"), *begin]
    assert t.encode_prompt("", False) == begin == t.encode_prompt(BEGIN, False)


def test_a_beginning_of_two_tokens_and_a_template_of_ones_own_that_has_it(folder):
    t = around(folder, ["<|endoftext|>", BEGIN])
    both = t.encode(f"<|endoftext|>{BEGIN}")
    assert t.encode_prompt("hi", False) == t.encode_prompt(f"<|endoftext|>{BEGIN}hi", False) == [*both, *t.encode("hi")]
    encode = PromptTokens(t, chat=False, prompt_template=f"<|endoftext|>{BEGIN}user\n{{prompt}}")
    assert list(encode(QUESTION)) == [*both, *t.encode("user\n{2}+2?")]


def test_no_end_of_text_is_put_behind_a_prompt(folder):
    bare = HFTokenizer(folder)
    t = around(folder, [BEGIN], ["<|endoftext|>"])
    assert bare.stop_ids == t.stop_ids and t.encode("<|endoftext|>")[0] in t.stop_ids
    assert t.encode_prompt("hi", False) == bare.encode(f"{BEGIN}hi")
    assert around(folder, [], [BEGIN]).encode_prompt("hi", False) == bare.encode(f"hi{BEGIN}")


# ------------------------------------------------------------------ for a person to read


def test_a_prompt_is_shown_as_text_and_tokens(folder):
    encode = PromptTokens(HFTokenizer(folder), chat=True)
    shown = encode.show(QUESTION)
    ids = list(encode(QUESTION))
    assert f"first prompt (q), {len(ids)} tokens:\n<|im_start|>user\n{{2}}+2?<|im_end|>\n<|im_start|>assistant\n" in shown
    assert re.findall(r"(\d+) '", shown.rpartition("tokens: ")[2]) == [str(i) for i in ids]
    short = encode.show(QUESTION, most=4)
    assert f", ({len(ids) - 4} more), " in short and len(re.findall(r"(\d+) '", short.rpartition("tokens: ")[2])) == 4
    micro = Problem(uid="m", prompt="7 +8 =", answer="", domain="", reward="exact")
    assert "<user> 7 +8 = <assistant>" in PromptTokens(MicroTokenizer(), chat=True).show(micro).lower()


def test_a_chat_is_tokenised_once():
    asked = []

    class Counting:
        def encode_prompt(self, text, chat):
            asked.append(text)
            return [1]

        def encode_chat(self, messages, **arguments):
            asked.append((messages, arguments))
            return [len(messages)]

    encode = PromptTokens(Counting(), chat=True)
    for _ in range(3):
        assert [list(encode(p)) for p in (CHAT, QUESTION, BEGUN)] == [[4], [1], [2]]
    assert asked == [(CHAT.messages, {}), QUESTION.prompt, (BEGUN.messages, {})]

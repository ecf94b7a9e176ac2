import json
import os
import shutil
import subprocess
import sys

import pytest

from grpo_engine.load import load_tokenizer
from grpo_engine.model.tokenizer import PATTERN, HFTokenizer, PromptTokens, train_bpe
from grpo_engine.types import Problem

TEXTS = [
    "Let x and y be integers such that x + y = 12 and x - y = 4. Find the value of x * y.",
    "What is the remainder when 2^{10} is divided by 7? Put the final answer within \\boxed{}.",
    "def add(a, b):\n    return a + b\n\n\ndef main():\n    print(add(1, 2))\n",
] * 3  # fmt: skip
ODD = [
    "", " ", "\n\n  a \n b", "1234567,89", "caf\u00e9 \u4e2d\u6587 \U0001f600", "don't I'LL\t\tend \r\n", "\x00\x7f",
    "<|im_end|> written out <|endoftext|>", "a\u0301 decomposed",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(TEXTS, vocab_size=320, folder=folder)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def change(folder, name, **values):
    path = folder / name
    obj = (json.loads(path.read_text()) if path.exists() else {}) | values
    path.write_text(json.dumps({k: v for k, v in obj.items() if v is not ...}))


# ------------------------------------------------------------------------------------------ encode, decode


def test_text_comes_back(trained):
    import unicodedata

    t = load_tokenizer(trained)
    for text in TEXTS + [x for x in ODD if "<|" not in x]:
        ids = t.encode(text)
        assert all(0 <= i < t.vocab_size for i in ids)
        assert t.decode(ids) == unicodedata.normalize("NFC", text)
    assert len(t.encode(TEXTS[0])) < 0.7 * len(TEXTS[0])  # merges were learned


def test_digits_stay_single(trained):
    t = load_tokenizer(trained)
    assert len(t.encode("20482048")) == 8


def test_special_tokens_are_not_decoded(trained):
    t = load_tokenizer(trained)
    ids = [*t.encode("4"), t.eos_id, *t.stop_ids]
    assert t.decode(ids) == "4"
    assert t.decode([]) == ""
    assert t.decode([*t.encode("4"), t.vocab_size + 100]) == "4"  # a padded row of the model's vocabulary


def test_same_ids_as_transformers(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    t = HFTokenizer(trained)
    # beside a Qwen2 config.json transformers builds a Qwen2Tokenizer, which has its own idea of words
    qwen = shutil.copytree(trained, tmp_path / "qwen")
    transformers.Qwen2Config(vocab_size=t.vocab_size).save_pretrained(qwen)
    for folder in (trained, qwen):
        other = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert len(other) == t.vocab_size and other.eos_token_id == t.eos_id
        for text in TEXTS + ODD:
            ids = t.encode(text)
            assert other.encode(text, add_special_tokens=False) == ids
            assert other.decode(ids, skip_special_tokens=True) == t.decode(ids)
        turn = [{"role": "user", "content": TEXTS[0]}]
        chat = other.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        assert chat == t.encode_prompt(TEXTS[0], True)


def test_the_pattern_is_that_of_qwen2():
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    assert PATTERN == qwen2.PRETOKENIZE_REGEX


def test_saved_limits_do_not_cut_prompts(copy):
    change(
        copy, "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<|endoftext|>"},
    )  # fmt: skip
    t = load_tokenizer(copy)
    assert t.decode(t.encode(TEXTS[0])) == TEXTS[0] and len(t.encode("4")) == 1


# ------------------------------------------------------------------------------------------ prompts


def test_prompts(trained):
    t = load_tokenizer(trained)
    assert t.encode_prompt("2+2=", False) == t.encode("2+2=")
    chat = t.encode_prompt("2+2=", True)
    assert chat == t.encode("<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n")
    assert t.stop_ids[1] in chat and t.eos_id not in chat


def test_a_plain_prompt_begins_as_the_file_says_and_a_chat_as_the_template_says(copy):
    bare, turn = load_tokenizer(copy).encode("4"), load_tokenizer(copy).stop_ids[1]
    name = "<|im_end|>"
    change(
        copy, "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {name: {"id": name, "ids": [turn], "tokens": [name]}},
        },
    )  # fmt: skip
    change(copy, "tokenizer_config.json", chat_template="{{ '<|im_end|>' + messages[0].content }}")
    t = load_tokenizer(copy)
    assert t.encode("4") == bare
    assert t.encode_prompt("4", False) == t.encode_prompt("4", True) == [turn, *bare]


def test_no_chat_template(copy):
    change(copy, "tokenizer_config.json", chat_template=...)
    t = load_tokenizer(copy)
    assert t.encode_prompt("4", False) == t.encode("4")
    with pytest.raises(ValueError, match="copy: no chat template there"):
        t.encode_prompt("4", True)


def test_a_chat_template_that_fails(copy):
    change(copy, "tokenizer_config.json", chat_template="{{ raise_exception('no users, please') }}")
    with pytest.raises(ValueError, match="copy: the chat template failed: no users, please"):
        load_tokenizer(copy).encode_prompt("4", True)


def test_a_chat_template_in_a_file_of_its_own(copy):
    change(copy, "tokenizer_config.json", chat_template=...)
    (copy / "chat_template.jinja").write_text("Q: {{ messages[0].content }} A:")
    t = load_tokenizer(copy)
    assert t.encode_prompt("4", True) == t.encode("Q: 4 A:")


# ------------------------------------------------------------------------------------------ where answers stop


def test_stops(copy):
    end, turn = load_tokenizer(copy).stop_ids
    assert load_tokenizer(copy).eos_id == end
    change(copy, "generation_config.json", eos_token_id=turn)
    assert load_tokenizer(copy).stop_ids == (end, turn)
    change(copy, "tokenizer_config.json", eos_token={"content": "<|im_end|>", "special": True})
    assert load_tokenizer(copy).stop_ids == (turn,)
    (copy / "generation_config.json").unlink()
    change(copy, "config.json", eos_token_id=[turn, end])
    assert load_tokenizer(copy).stop_ids == (turn, end)
    change(copy, "tokenizer_config.json", eos_token=None)
    change(copy, "config.json", eos_token_id=end)
    assert load_tokenizer(copy).stop_ids == (end,)
    change(copy, "config.json", eos_token_id=None)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: eos_token must name a token, got none"):
        load_tokenizer(copy)


BAD = {
    "not JSON": (lambda d: (d / "tokenizer.json").write_text("{"), ValueError, "tokenizer.json: not a tokenizer"),
    "other JSON": (lambda d: (d / "tokenizer.json").write_text('{"a": 1}'), ValueError, "tokenizer.json: not a tokeni"),
    "absent": (lambda d: (d / "tokenizer.json").unlink(), FileNotFoundError, "copy: no tokenizer there"),
    "no folder": (lambda d: shutil.rmtree(d), FileNotFoundError, "copy: no such folder"),
    "settings no JSON": (
        lambda d: (d / "tokenizer_config.json").write_text("nope"), ValueError, "tokenizer_config.json: not JSON",
    ),
    "settings a list": (
        lambda d: (d / "tokenizer_config.json").write_text("[]"), ValueError, "must hold a JSON object, got list",
    ),
    "unknown eos": (
        lambda d: change(d, "tokenizer_config.json", eos_token="</s>"), ValueError,
        "tokenizer_config.json: eos_token must be in tokenizer.json, got '</s>'",
    ),
    "eos id as text": (
        lambda d: change(d, "generation_config.json", eos_token_id="2"), ValueError,
        "generation_config.json: eos_token_id must be an id, or a list of ids, got '2'",
    ),
    "negative eos id": (lambda d: change(d, "generation_config.json", eos_token_id=[0, -1]), ValueError, "[0, -1]"),
    "model too small": (
        lambda d: change(d, "config.json", vocab_size=300), ValueError, "vocab_size=300, too few rows for 320 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage, kind, message", BAD.values(), ids=BAD.keys())
def test_a_bad_folder_is_named(copy, damage, kind, message):
    damage(copy)
    with pytest.raises(kind) as error:
        load_tokenizer(copy)
    assert str(copy) in str(error.value) and message in str(error.value)


def test_micro_by_name():
    from grpo_engine.micro.tokenizer import MicroTokenizer

    assert isinstance(load_tokenizer("micro"), MicroTokenizer)


# ------------------------------------------------------------------------------------------ training


def test_training_is_deterministic_on_any_number_of_threads(trained, tmp_path):
    code = (
        "import sys; from grpo_engine.model.tokenizer import train_bpe; sys.path.insert(0, sys.argv[1]);"
        "from test_tokenizer import TEXTS; train_bpe(TEXTS, vocab_size=320, folder=sys.argv[2])"
    )
    here = os.path.dirname(__file__)
    for threads in ("1", "3"):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join([*sys.path, here])}
        subprocess.run([sys.executable, "-c", code, here, str(tmp_path / threads)], env=env, check=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / threads / name).read_bytes() == (trained / name).read_bytes()


def test_the_least_vocabulary_has_all_bytes_and_no_merge(tmp_path):
    t = train_bpe([], vocab_size=259, folder=tmp_path)
    assert t.vocab_size == 259
    assert len(t.encode("\u4e2d1")) == 4


def test_bad_training_arguments(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be >= 259"):
        train_bpe(TEXTS, vocab_size=258, folder=tmp_path)
    change(tmp_path, "config.json", vocab_size=300)
    with pytest.raises(ValueError, match="too few rows for 320 tokens"):
        train_bpe(TEXTS, vocab_size=320, folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_real_problems(real_data, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = real_data / "math_curriculum_sampled" / "math__sampled_1_100_512.parquet"
    texts = [turns[0]["content"] for turns in parquet.read_table(file, columns=["prompt"])["prompt"].to_pylist()]
    t = train_bpe(texts, vocab_size=1024, folder=tmp_path)
    assert t.vocab_size == 1024
    assert all(t.decode(t.encode(x)) == x for x in texts)
    tokens = sum(len(t.encode(x)) for x in texts)
    assert sum(map(len, texts)) > 2.5 * tokens


def test_a_prompt_is_tokenised_once():
    asked = []

    class Counting:
        def encode_prompt(self, text, chat):
            asked.append((text, chat))
            return [len(text), 70_000]

    encode = PromptTokens(Counting(), chat=True)
    problems = [Problem(uid=uid, prompt=p, answer="", domain="", reward="exact") for uid, p in ("aX", "bY", "cX")]
    assert [list(encode(p)) for p in problems * 2] == [[1, 70_000], [1, 70_000], [1, 70_000]] * 2
    assert asked == [("X", True), ("Y", True)]


@pytest.mark.parametrize(
    "file,settings,says",
    [
        (
            "tokenizer_config.json",
            {"eos_token": ["<|endoftext|>"]},
            "eos_token must be a token's text",
        ),
        ("config.json", {"vocab_size": None}, "config.json: vocab_size must be an integer, got None"),
        ("config.json", {"vocab_size": "512"}, "config.json: vocab_size must be an integer, got '512'"),
    ],
)
def test_a_setting_of_a_wrong_type_is_named_with_its_file(trained, file, settings, says, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / file).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=says):
        load_tokenizer(copy)

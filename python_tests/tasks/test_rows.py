"""What lies in folders, in which encodings, and how its numbers are written."""

import json
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from grpo_engine.config import load_run_config
from grpo_engine.load import load_task
from grpo_engine.rewards.math import score
from grpo_engine.tasks.files import files_task, read_problems
from grpo_engine.tasks.rows import find_files, positional


def plain(*numbers):
    return [{"question": f"what is {n}?", "answer": str(n)} for n in numbers]


def answers(source, **options):
    return [p.answer for p in read_problems(source, **options)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


# ------------------------------------------------------------------ which files


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_folder_of_shards_is_read_in_the_order_of_their_numbers(tmp_path, ending):
    for n in (10, 2, 1):
        write(tmp_path / f"part-{n}.{ending}", plain(n))
    assert answers(tmp_path) == answers(str(tmp_path)) == answers(tmp_path / f"part-*.{ending}") == ["1", "2", "10"]
    assert answers([tmp_path / f"part-10.{ending}", f"{tmp_path}/part-[12].{ending}"]) == ["10", "1", "2"]
    (tmp_path / "README.md").write_text("what this is")  # what else a folder of a hub holds
    write(tmp_path / ".cache" / f"part-7.{ending}", plain(7))
    write(tmp_path / f"_part-8.{ending}", plain(8))
    assert answers(tmp_path) == ["1", "2", "10"]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"],
        ["data/train-00000-of-00002-a09b74b3ef9c3b56", "data/train-00001-of-00002-b09b74b3ef9c3b56", "data/test-0"],
        ["train/0000", "train/0001", "test/0000"],
        ["train_0", "train_1", "test"],
        ["my_train.0", "my_train.1", "my_test.0"],
    ],
)
def test_a_split_by_its_name(tmp_path, names):
    for n, name in enumerate(names):
        write(tmp_path / f"{name}.parquet", plain(n))
    assert answers(f"{tmp_path}:train") == ["0", "1"] and answers(f"{tmp_path}:test") == ["2"]
    with pytest.raises(ValueError, match=f"{tmp_path}: holds the splits .*test.*; name one of them: {tmp_path}:.*t"):
        read_problems(tmp_path)
    with pytest.raises(ValueError, match="no one split 'dev'; it holds the splits"):
        read_problems(f"{tmp_path}:dev")


def test_sets_that_are_no_splits_are_read_together_or_one_by_its_name(tmp_path):
    for n, name in enumerate(["aime2024", "amc2023", "math__math_500"]):
        write(tmp_path / f"{name}.parquet", plain(n))
    assert answers(tmp_path) == ["0", "1", "2"]
    assert [answers(f"{tmp_path}:{name}") for name in ("aime2024", "math__math_500")] == [["0"], ["2"]]


def test_two_parts_of_a_hubs_folder_with_the_same_splits(tmp_path):
    for n, name in enumerate(["main/train-00000-of-00001", "main/test-00000-of-00001", "socratic/train-00000-of-00001"]):
        write(tmp_path / f"{name}.parquet", plain(n))
    with pytest.raises(ValueError, match="no one split 'train'; it holds the splits .'main/train', 'socratic/train'"):
        read_problems(f"{tmp_path}:train")
    assert answers(f"{tmp_path}:main/train") == answers(f"{tmp_path}/main:train") == ["0"]


def test_one_split_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list(plain(1)), test=datasets.Dataset.from_list(plain(2)))
    saved.save_to_disk(tmp_path / "two")
    assert answers(f"{tmp_path}/two:test") == answers(f"{tmp_path}/two/test") == ["2"]
    with pytest.raises(ValueError, match=r"no one split 'dev'; it holds the splits \['train', 'test'\]"):
        read_problems(f"{tmp_path}/two:dev")
    with pytest.raises(ValueError, match="two/test: no one split 'train'"):
        read_problems(f"{tmp_path}/two/test:train")


def test_a_name_with_special_characters_is_a_file_if_there_is_one(tmp_path):
    odd = write(tmp_path / "a:b [1].jsonl", plain(1))
    write(tmp_path / "a:b 1.jsonl", plain(2))
    assert answers(odd) == ["1"] and find_files(str(odd)) == [odd]


def test_files_of_folders_within(tmp_path):
    for n, name in enumerate(["a/x.jsonl", "b/c/x.jsonl"]):
        write(tmp_path / name, plain(n))
    assert answers(tmp_path) == answers(f"{tmp_path}/**/*.jsonl") == answers(f"{tmp_path}/**") == ["0", "1"]


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("no*.parquet", FileNotFoundError, "no problem file matches .*no.*parquet"),
        ("openai/gsm8k", FileNotFoundError, "no problem file .*openai/gsm8k .problems are read from files of this machine"),
        ("both", ValueError, "both: holds .jsonl and .parquet files; name those that are meant"),
        ("empty", ValueError, "empty: no state.json there and no file of problems"),
        ("notes.*", ValueError, "notes.txt: problems are read from .parquet, .jsonl, .json, .* got '.txt'"),
    ],
)
def test_what_names_no_problems_is_named(tmp_path, source, error, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    for ending in ("parquet", "jsonl"):
        write(tmp_path / f"both/x.{ending}", plain(1))
    with pytest.raises(error, match=said):
        read_problems(tmp_path / source)
    with pytest.raises(ValueError, match="the list of files is empty"):
        read_problems([])


def test_a_fault_in_a_shard_names_the_shard_and_its_row(tmp_path):
    write(tmp_path / "part-0.parquet", plain(0, 1))
    write(tmp_path / "part-1.parquet", [{"question": " ", "answer": "1"}])
    with pytest.raises(ValueError, match=f"{tmp_path}/part-1.parquet: row 0: question is empty"):
        read_problems(tmp_path)


def test_a_run_names_several_files(tmp_path):
    first, second, test = (write(tmp_path / f"{n}.jsonl", plain(n)) for n in (1, 2, 3))
    settings = ["task.name=files", f"task.train=[{first}, {second}]", f"task.evals={{one: {test}, both: [{test}, {first}]}}"]
    config = load_run_config(None, settings).task
    task = load_task(config, seed=0, needed=1)
    assert [p.answer for p in task.train] == ["2"]  # the first is tested on
    assert [p.answer for p in task.evals["both"].problems] == ["3", "1"]
    with pytest.raises(ValueError, match="1.jsonl, .*2.jsonl: every training problem"):
        files_task(train=[first, second], evals={"t": tmp_path / "[12].jsonl"})


def test_verls_folders_by_split(real_data, caplog):
    for name, rows in (("gsm8k", (7473, 1319)), ("math", (7498, 5000))):
        assert tuple(len(read_problems(f"{real_data / name}:{split}")) for split in ("train", "test")) == rows
    assert caplog.text.count("2 of 7500 rows have no true answer") == caplog.text.count("WARNING") == 1
    with pytest.raises(ValueError, match="gsm8k: holds the splits"):
        read_problems(real_data / "gsm8k")


# ------------------------------------------------------------------ encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_byte_order_marks_and_what_they_mark(tmp_path, encoding, ending):
    rows = [{"question": "caf\u00e9, 1 \u2264 x?\u2028", "answer": "\u221e"}, *plain(2)]
    text = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    path = tmp_path / f"p.{ending}"
    path.write_bytes(text.encode(encoding))
    found = read_problems(path)
    assert [p.answer for p in found] == ["\u221e", "2"] and found[0].prompt == rows[0]["question"]


def test_a_mark_within_a_file_that_was_joined_of_two(tmp_path):
    one, two = (json.dumps(r).encode("utf-8-sig") for r in plain(1, 2))
    (tmp_path / "p.jsonl").write_bytes(one + b"\n" + two + b"\n\xef\xbb\xbf\n")
    assert answers(tmp_path / "p.jsonl") == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n{".encode("utf-16"), "p.jsonl: line 2: not JSON"),
        ("{}".encode("utf-16")[:-1], "p.jsonl: not UTF-16"),
        (b"\xff\xff", "p.jsonl: not UTF-8"),
        (b'{"question": "caf\xe9"}', "p.jsonl: not UTF-8"),  # Latin-1
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, content, said):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_problems(tmp_path / "p.jsonl")


def test_an_array_of_json(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([*plain(1), {"question": "?", "answer": 1.5}], indent=1))
    assert answers(tmp_path / "p.json") == ["1", "1.5"]
    (tmp_path / "p.json").write_text("[{}, 3]")
    with pytest.raises(ValueError, match="p.json: row 0: prompt .*is missing"):
        read_problems(tmp_path / "p.json")
    (tmp_path / "p.json").write_text('[{"question": "?", "answer": "1"}, 3]')
    with pytest.raises(ValueError, match="p.json: row 1: must be a JSON object, got int"):
        read_problems(tmp_path / "p.json")


# ------------------------------------------------------------------ numbers


LITERALS = ["0.00001", "1e-05", "1e16", "1E+16", "0.10", "7.0", "-0.5", "72", "123456789012345678901234567890", "1e400"]


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize(
    "form",
    [
        '{"question": "q", "answer": %s}',
        '{"question": "q", "solution": %s}',
        '{"data_source": "math_dapo", "prompt": "q", "reward_model": {"ground_truth": %s}}',
    ],
)
def test_a_number_of_json_keeps_its_literal(tmp_path, form, literal):
    (tmp_path / "p.jsonl").write_text(form % literal)
    assert answers(tmp_path / "p.jsonl") == [literal]


def test_a_number_of_json_is_scored_as_it_stands(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question":"q","answer":0.00001}')
    (p,) = read_problems(tmp_path / "p.jsonl")
    assert score(r"\boxed{0.00001}", p) == 1.0 and score(r"\boxed{0.0001}", p) == 0.0


NUMBERS = [(1e-05, "0.00001"), (1e16, "10000000000000000"), (1e23, "100000000000000000000000"), (72.0, "72"), (0.1, "0.1"),
           (-2.5e-7, "-0.00000025")]  # fmt: skip


@pytest.mark.parametrize(("number", "text"), NUMBERS)
@pytest.mark.parametrize("width", [pyarrow.float64(), pyarrow.float32()])
@pytest.mark.parametrize("verl", [True, False])
def test_a_number_of_parquet_has_no_exponent(tmp_path, number, text, width, verl):
    column = pyarrow.array([number], width)
    table = pyarrow.table({"prompt": ["q"], "answer": column})
    if verl:
        model = pyarrow.StructArray.from_arrays([column], ["ground_truth"])
        table = pyarrow.table({"data_source": ["math_dapo"], "prompt": ["q"], "reward_model": model})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert answers(tmp_path / "p.parquet") == [text]


def test_integers_and_decimals_of_parquet(tmp_path):
    for column, text in ((pyarrow.array([7]), "7"), (pyarrow.array([Decimal("0.00000010")]), "0.00000010")):
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["q"], "answer": column}), tmp_path / "p.parquet")
        assert answers(tmp_path / "p.parquet") == [text]
    assert positional("-1.25E+3") == "-1250"


def test_other_numbers_stay_numbers(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question": "q", "answer": 1, "pass_rate": 0.25, "extra_info": {"level": 1e-5}}')
    (p,) = read_problems(tmp_path / "p.jsonl")
    assert p.info == {"data_source": "math__plain", "pass_rate": 0.25, "level": 1e-5}
    assert {type(p.info["pass_rate"]), type(p.info["level"])} == {float}

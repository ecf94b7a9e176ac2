"""Problems from files: parquet, JSONL, or a folder of Hugging Face's `datasets` (`rows`), in either of two forms.

verl's form, one row a problem: data_source (text), prompt (chat messages, {role, content}), reward_model.ground_truth,
and extra_info with whatever the source says besides.

The plain form: the prompt as text in prompt, question or problem; the true answer in answer, ground_truth or solution
(the first of each that there is; text, or a number); and, if need be, data_source and pass_rate. A solution may be a whole
one that ends in a box or in "#### 18". A row with reward_model is verl's.

data_source decides the family and the scorer; a plain row that has none is mathematics:

    math__*, aime*, openai/gsm8k    math    math
    codegen__humaneval*             code    code
    logic__zebra_puzzle*            logic   logic
    stem__supergpqa*                stem    choice

With behaviour "paper" the scorers are those of `rewards.paper`, which keep the paper's errors.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_engine.config import Behaviour
from grpo_engine.rewards.choice import LETTERS
from grpo_engine.rewards.code import functional_tests
from grpo_engine.tasks.rows import read_rows
from grpo_engine.types import EvalSet, Problem, Task

PROMPTS = ("prompt", "question", "problem")  # of the plain form, the first that there is
ANSWERS = ("answer", "ground_truth", "solution")  # likewise
FIELDS = ("data_source", "reward_model", "extra_info", "pass_rate", *PROMPTS, *ANSWERS)
PLAIN_SOURCE = "math__plain"  # of a plain row that names no data_source
PASS_RATE_SUFFIX = "_pass_rate"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """How the problems of a source are called and scored."""

    domain: str
    reward: str
    paper: str  # the scorer that does as the paper's


DATA_SOURCES: dict[str, DataSource] = {  # by the start of data_source
    "math__": DataSource(domain="math", reward="math", paper="paper_math"),
    "aime": DataSource(domain="math", reward="math", paper="paper_aime"),
    "openai/gsm8k": DataSource(domain="math", reward="math", paper="paper_gsm8k"),
    "codegen__humaneval": DataSource(domain="code", reward="code", paper="paper_code"),
    "logic__zebra_puzzle": DataSource(domain="logic", reward="logic", paper="paper_logic"),
    "stem__supergpqa": DataSource(domain="stem", reward="choice", paper="paper_choice"),
}


def read_problems(path: str | Path, *, limit: int | None = None, behaviour: Behaviour = "ours") -> list[Problem]:
    """The problems of a file or folder, in its order.

    Of one user message the prompt is its content; a system message before it is put in front, with an empty line
    between. A content that is itself a list of messages written as text (as in the HumanEval file) is read as that
    list. The uid is data_source and a hash of prompt and answer: the same problem has the same uid in every file. A
    row that repeats an earlier one is left out, with a warning.

    info holds data_source, every plain value of extra_info, and pass_rate: the field of that name, or the first of
    extra_info that is or ends in "_pass_rate", a share in [0, 1], or None where it is null or NaN.

    Args:
        path: a .parquet or .jsonl file, or a folder that save_to_disk of `datasets` made.
        limit: at most this many problems, spaced evenly over the file: of a file that is sorted by difficulty they
            have the whole's mix, in the same order. None: all.
        behaviour: "ours", or "paper" for its scorers.

    Returns:
        At least one problem.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, no rows, a missing field, a bad value or an unknown data_source: file, row
            and field are named; or limit < 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"read_problems: limit must be at least 1 or None, got {limit}")
    return _spaced(_read(Path(path), behaviour), limit)


def files_task(
    *,
    train: str | Path,
    evals: Mapping[str, str | Path],
    eval_problems: int | None = None,
    behaviour: Behaviour = "ours",
    name: str = "files",
) -> Task:
    """A task from one file to train on and any number of files to be tested on.

    A training problem whose prompt is in one of the evaluation files (white space and case aside) is left out, with a
    warning that counts them. An evaluation set is in domain when all of its families are trained on: for a mathematical
    training file GSM8K is, HumanEval is not.

    Args:
        train: file to train on.
        evals: name of an evaluation set to its file; may be empty.
        eval_problems: at most this many problems of each evaluation set, spaced evenly over its file; None: all.
        behaviour: see `read_problems`.
        name: of the task.

    Returns:
        The `Task`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_problems`, or no training problem is left.
    """
    if eval_problems is not None and eval_problems < 1:
        raise ValueError(f"files_task: eval_problems must be at least 1 or None, got {eval_problems}")
    test = {set_name: _read(Path(path), behaviour) for set_name, path in evals.items()}
    held_out = {_same_text(p.prompt) for problems in test.values() for p in problems}
    everything = _read(Path(train), behaviour)
    training = [p for p in everything if _same_text(p.prompt) not in held_out]
    if len(training) < len(everything):
        _log.warning(
            "%s: %d of %d training problems are also in an evaluation file and are left out",
            train, len(everything) - len(training), len(everything),
        )  # fmt: skip
    if not training:
        raise ValueError(f"{train}: every training problem is also in an evaluation file")
    trained = {p.domain for p in training}
    return Task(
        name=name,
        train=training,
        evals={
            set_name: EvalSet(
                name=set_name,
                in_domain={p.domain for p in problems} <= trained,
                problems=_spaced(problems, eval_problems),
            )
            for set_name, problems in test.items()
        },
    )


def data_source_of(data_source: str) -> DataSource:
    """The family that a data_source belongs to.

    Args:
        data_source: as in the file.

    Returns:
        Domain and scorer.

    Raises:
        ValueError: none of `DATA_SOURCES` begins it.
    """
    for start, family in DATA_SOURCES.items():
        if data_source.startswith(start):
            return family
    raise ValueError(f"unknown data_source {data_source!r}: known ones begin with {', '.join(DATA_SOURCES)}")


def _read(path: Path, behaviour: Behaviour) -> list[Problem]:
    found: dict[str, Problem] = {}
    count = 0
    for place, row in read_rows(path, FIELDS):
        try:
            problem = _problem(row, behaviour)
        except ValueError as e:
            raise ValueError(f"{path}: {place}: {e}") from e
        found.setdefault(problem.uid, problem)
        count += 1
    if not count:
        raise ValueError(f"{path}: the file holds no rows")
    if len(found) < count:
        _log.warning("%s: %d of %d rows repeat an earlier one and are left out", path, count - len(found), count)
    return list(found.values())


def _problem(row: Mapping[str, object], behaviour: Behaviour) -> Problem:
    source, prompt, truth, truth_field = _verl(row) if row.get("reward_model") is not None else _plain(row)
    family = data_source_of(source)
    answer = _answer(truth, truth_field, family)
    digest = hashlib.sha256(f"{prompt}\0{answer}".encode()).hexdigest()[:16]
    return Problem(
        uid=f"{source}/{digest}",
        prompt=prompt,
        answer=answer,
        domain=family.domain,
        reward=family.paper if behaviour == "paper" else family.reward,
        info={"data_source": source, **_info(row)},
    )


Parts = tuple[str, str, object, str]  # data_source, prompt, true answer, the field that it is from


def _verl(row: Mapping[str, object]) -> Parts:
    for field in ("data_source", "prompt"):
        if field not in row:
            raise ValueError(f"{field} is missing; there are {', '.join(row)}")
    model = row["reward_model"]
    if not isinstance(model, dict) or model.get("ground_truth") is None:
        raise ValueError(f"reward_model must hold a ground_truth, got {_shown(model)}")
    return _source(row["data_source"]), _prompt(row["prompt"]), model["ground_truth"], "reward_model.ground_truth"


def _plain(row: Mapping[str, object]) -> Parts:
    fields = []
    for names in (PROMPTS, ANSWERS):
        there = [name for name in names if row.get(name) is not None]
        if not there:
            verl = ", or reward_model" if names is ANSWERS else ""
            raise ValueError(f"{names[0]} (or {' or '.join(names[1:])}{verl}) is missing; there are {', '.join(row)}")
        fields.append(there[0])
    prompt, truth = (row[field] for field in fields)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{fields[0]} is empty")
    else:
        prompt = _prompt(prompt, fields[0])
    if isinstance(truth, (int, float)) and not isinstance(truth, bool) and math.isfinite(truth):
        truth = str(truth)
    source = _source(row["data_source"]) if row.get("data_source") is not None else PLAIN_SOURCE
    return source, prompt, truth, fields[1]


def _source(source: object) -> str:
    if not isinstance(source, str):
        raise ValueError(f"data_source must be text, got {_shown(source)}")
    return source


def _prompt(messages: object, field: str = "prompt") -> str:
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict):
        content = messages[0].get("content")
        if isinstance(content, str) and content.startswith("[{"):
            try:
                inner = ast.literal_eval(content)
            except (ValueError, SyntaxError):
                inner = None  # a question that merely begins like a list
            if isinstance(inner, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in inner):
                messages = inner
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise ValueError(f"{field} must be a list of messages with role and content, got {_shown(messages)}")
    roles = [m["role"] for m in messages]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(f"{field} must be one user message, with or without a system message before it, got {roles}")
    if not messages[-1]["content"].strip():
        raise ValueError(f"{field}: the user's message is empty")
    return "\n\n".join(m["content"] for m in messages if m["content"])


def _answer(truth: object, field: str, family: DataSource) -> str:
    if family.reward == "logic":
        return _grid(truth, field)
    if not isinstance(truth, str):
        raise ValueError(f"{field} must be text for {family.domain} problems, got {_shown(truth)}")
    if not truth.strip():
        raise ValueError(f"{field} is empty")
    if family.reward == "choice" and not (len(truth.strip()) == 1 and truth.strip() in LETTERS):
        raise ValueError(f"{field} must be a letter A to J, got {_shown(truth)}")
    if family.reward == "code":
        try:
            functional_tests(truth)
        except ValueError as e:
            raise ValueError(f"{field}: {e}") from None
    return truth


def _grid(truth: object, field: str) -> str:
    header = truth.get("header") if isinstance(truth, dict) else None
    rows = truth.get("rows") if isinstance(truth, dict) else None
    if not header or not rows or not all(row and len(row) == len(header) for row in rows):
        raise ValueError(f"{field} must hold a header and rows of its length, got {_shown(truth)}")
    return json.dumps({"header": header, "rows": rows})


def _info(row: Mapping[str, object]) -> dict[str, object]:
    extra = row.get("extra_info") or {}
    if not isinstance(extra, dict):
        raise ValueError(f"extra_info must hold named values, got {_shown(extra)}")
    info: dict[str, object] = {}
    if "pass_rate" in row:
        info["pass_rate"] = _pass_rate("pass_rate", row["pass_rate"])
    for key, value in extra.items():
        if key == "pass_rate" or key.endswith(PASS_RATE_SUFFIX):
            value = _pass_rate(f"extra_info.{key}", value)
            info.setdefault("pass_rate", value)
        if value is None or isinstance(value, (str, int, float, bool)):
            info.setdefault(key, value)
    return info


def _pass_rate(field: str, value: object) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{field} must be a share in [0, 1], got {_shown(value)}")
    return float(value)


def _spaced(problems: Sequence[Problem], limit: int | None) -> list[Problem]:
    count = len(problems)
    if limit is None or limit >= count:
        return list(problems)
    return [problems[i * count // limit] for i in range(limit)]


def _same_text(prompt: str) -> str:
    return " ".join(prompt.split()).lower()


def _shown(value: object) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 100 else text[:97] + "..."

"""Problems from files: parquet, JSON, or folders of them (`rows`), in either of two forms.

verl's form, one row a problem: data_source (text), prompt, reward_model.ground_truth, and extra_info with whatever the
source says besides.

The plain form: the prompt in prompt, question or problem; the true answer in answer, ground_truth or solution (the first of
each that there is); and, if need be, data_source and pass_rate. A solution may be a whole one that ends in a box or in
"#### 18". A row with reward_model is verl's.

A prompt is text or a list of messages, {role, content}; the list may be written out as text. A true answer is text or a
number.

data_source decides the domain and the scorer (`DATA_SOURCES`); a plain row that has none is mathematics. A source that
the table does not have needs a scorer by name, or a function.

With scoring "paper" the scorers are those of `rewards.paper`, which keep the paper's errors.
"""

from __future__ import annotations

import ast
import decimal
import fnmatch
import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo_engine.config import Scoring
from grpo_engine.rewards import SCORERS
from grpo_engine.rewards.choice import LETTERS
from grpo_engine.rewards.code import functional_tests
from grpo_engine.tasks.rows import Source, WrittenNumber, positional, read_rows, shown
from grpo_engine.types import EvalSet, Message, Problem, Task

PROMPTS = ("prompt", "question", "problem")  # of the plain form, the first that there is
ANSWERS = ("answer", "ground_truth", "solution")  # likewise
FIELDS = ("data_source", "ability", "reward_model", "extra_info", "pass_rate", *PROMPTS, *ANSWERS)
PLAIN_SOURCE = "math__plain"  # of a plain row that names no data_source
OWN_SOURCE = "own"  # of a row that names none and is scored by the user's choice
PASS_RATE_SUFFIX = "_pass_rate"
SPEAKERS = {"human": "user", "gpt": "assistant"}  # of {from, value} messages

# text that begins as messages do: it is read as such, or refused, but not shown to a model
_LIKE_MESSAGES = re.compile(r"\[\s*\{\s*(['\"])(role|content|from|value)\1\s*:")

_log = logging.getLogger(__name__)

Scorer = str | Mapping[str, str] | None  # of all sources, or by pattern of data_source; None: as the table says


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """How the problems of a source are called and scored."""

    domain: str
    reward: str
    paper: str  # the scorer that does as the paper's


MATH = DataSource(domain="math", reward="math", paper="paper_math")
AIME = DataSource(domain="math", reward="math", paper="paper_aime")
GSM8K = DataSource(domain="math", reward="math", paper="paper_gsm8k")

DATA_SOURCES: dict[str, DataSource] = {  # by pattern of data_source, in any case; the first that fits
    "math__*": MATH,  # Guru's
    "aime*": AIME,
    "amc*": MATH,
    "codegen__humaneval*": DataSource(domain="code", reward="code", paper="paper_code"),
    "logic__zebra_puzzle*": DataSource(domain="logic", reward="logic", paper="paper_logic"),
    "stem__supergpqa*": DataSource(domain="stem", reward="choice", paper="paper_choice"),
    "openai/gsm8k*": GSM8K,
    "gsm8k*": GSM8K,
    "madrylab/gsm8k*": GSM8K,
    "DigitalLearningGmbH/MATH*": MATH,
    "lighteval/MATH*": MATH,
    "HuggingFaceH4/MATH*": MATH,
    "HuggingFaceH4/aime*": MATH,
    "EleutherAI/hendrycks_math*": MATH,
    "hendrycks/*math*": MATH,
    "math": MATH,
    "math500": MATH,
    "math[-_]*": MATH,  # math_dapo and its like among them
    "math-ai/*": MATH,
    "BytedTsinghua-SIA/*": MATH,  # DAPO's
    "open-r1/*math*": MATH,  # processed forms of DAPO's and Big-Math, OpenR1-Math
    "agentica-org/DeepScaleR*": MATH,
    "deepscaler*": MATH,
    "SynthLabsAI/Big-Math*": MATH,
    "big[-_]math*": MATH,
    "AI-MO/*": MATH,  # NuminaMath, and the validation sets of AIMO
    "numina*": MATH,
    "zwhe99/DeepMath*": MATH,
    "minerva*": MATH,
    "olympiad*": MATH,
}
DOMAINS = {name: family.domain for family in DATA_SOURCES.values() for name in (family.reward, family.paper)} | {
    "logic_strict": "logic"
}
TEXT_SCORERS = {*DOMAINS, "exact"}  # whose true answers are text, but for grids


def read_problems(
    source: Source, *, limit: int | None = None, scoring: Scoring = "default", scorer: Scorer = None
) -> list[Problem]:
    """The problems of a file, a folder or several of them, in their order.

    Of one user message the prompt is its content. Several messages, as a system message before it or earlier turns, are kept
    as such for a chat template; the prompt has their contents with an empty line between. A content that is itself a list of
    messages written as text (as in the HumanEval file) is read as that list. The uid is data_source and a hash of prompt and
    answer: the same problem has the same uid in every file. A row that repeats an earlier one, or whose true answer is
    empty, is left out, with a warning.

    The answer of a number is its text as the file has it: 0.00001 and 1e16 in JSON. Where a file has no text (parquet), it
    is the shortest that gives the number, without an exponent.

    info holds data_source, every plain value of extra_info, and pass_rate: the field of that name, or the first of
    extra_info that is or ends in "_pass_rate", a share in [0, 1], or None where it is null or NaN.

    Args:
        source: a file, a folder, FOLDER:SPLIT, a pattern, or a list of those; see `rows`.
        limit: at most this many problems, spaced evenly over the file: of a file that is sorted by difficulty they
            have the whole's mix, in the same order. None: all.
        scoring: "default", or "paper" for its scorers.
        scorer: name of the scorer of every problem, or "module:function"; or a mapping from patterns of data_source to
            such names, which comes before the table. None: the table alone.

    Returns:
        At least one problem.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, no rows, a missing field, a bad value or an unknown data_source: file, row
            and field are named; or limit < 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"read_problems: limit must be at least 1 or None, got {limit}")
    return _spaced(_read(source, scoring, scorer), limit)


def files_task(
    *,
    train: Source,
    evals: Mapping[str, Source],
    eval_problems: int | None = None,
    scoring: Scoring = "default",
    scorer: Scorer = None,
    name: str = "files",
) -> Task:
    """A task from files to train on and any number of sets of files to be tested on.

    A training problem whose prompt is in one of the evaluation files (white space and case aside) is left out, with a
    warning that counts them. An evaluation set is in domain when all of its families are trained on: for a mathematical
    training file GSM8K is, HumanEval is not.

    Args:
        train: what to train on, see `read_problems`.
        evals: name of an evaluation set to its files; may be empty.
        eval_problems: at most this many problems of each evaluation set, spaced evenly over its file; None: all.
        scoring, scorer: see `read_problems`.
        name: of the task.

    Returns:
        The `Task`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_problems`, or no training problem is left.
    """
    if eval_problems is not None and eval_problems < 1:
        raise ValueError(f"files_task: eval_problems must be at least 1 or None, got {eval_problems}")
    test = {set_name: _read(source, scoring, scorer) for set_name, source in evals.items()}
    held_out = {_same_text(p.prompt) for problems in test.values() for p in problems}
    everything = _read(train, scoring, scorer)
    training = [p for p in everything if _same_text(p.prompt) not in held_out]
    if len(training) < len(everything):
        _log.warning(
            "%s: %d of %d training problems are also in an evaluation file and are left out",
            shown(train), len(everything) - len(training), len(everything),
        )  # fmt: skip
    if not training:
        raise ValueError(f"{shown(train)}: every training problem is also in an evaluation file")
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
        ValueError: `DATA_SOURCES` does not have it; the message says how to choose a scorer.
    """
    name = _first_fit(DATA_SOURCES, data_source)
    if name is None:
        raise ValueError(
            f"unknown data_source {data_source!r}: choose its scorer ({', '.join(SCORERS)}) by reward.scorer=math for all "
            f"problems or 'reward.scorer={{{data_source}: math}}' for this source, or give a function of your own by "
            f"reward.function=module:function; known are {', '.join(DATA_SOURCES)}"
        )
    return DATA_SOURCES[name]


def _first_fit(patterns: Mapping[str, object], data_source: str) -> str | None:
    source = data_source.lower()
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(source, pattern.lower())), None)


def _read(source: Source, scoring: Scoring, scorer: Scorer) -> list[Problem]:
    found: dict[str, Problem] = {}
    unanswered: list[str] = []
    count = 0
    for where, row in read_rows(source, FIELDS):
        count += 1
        try:
            problem = _problem(row, scoring, scorer)
        except _Unanswered as e:
            unanswered.append(f"{where}: {e}")
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
        else:
            found.setdefault(problem.uid, problem)
    if not count:
        raise ValueError(f"{shown(source)}: the file holds no rows")
    if not found:
        raise ValueError(unanswered[0])
    if unanswered:
        _log.warning("%d of %d rows have no true answer and are left out, first %s", len(unanswered), count, unanswered[0])
    if repeated := count - len(unanswered) - len(found):
        _log.warning("%s: %d of %d rows repeat an earlier one and are left out", shown(source), repeated, count)
    return list(found.values())


class _Unanswered(ValueError):
    """A row whose true answer is empty: verl's own file of MATH has two, whose solutions have no box."""


def _problem(row: Mapping[str, object], scoring: Scoring, scorer: Scorer) -> Problem:
    form = _verl if row.get("reward_model") is not None else _plain
    source, prompt_field, truth, truth_field = form(row, isinstance(scorer, str))
    domain, reward = _scored(source, scoring, scorer)
    prompt, messages = _prompt(row[prompt_field], prompt_field)
    answer = _answer(truth, truth_field, reward)
    digest = hashlib.sha256(f"{prompt}\0{answer}".encode()).hexdigest()[:16]
    return Problem(
        uid=f"{source}/{digest}",
        prompt=prompt,
        messages=messages,
        answer=answer,
        domain=domain,
        reward=reward,
        info={"data_source": source, **_info(row)},
    )


def _scored(source: str, scoring: Scoring, scorer: Scorer) -> tuple[str, str]:
    """Domain and scorer of the problems of a source."""
    if isinstance(scorer, Mapping):
        pattern = _first_fit(scorer, source)
        name = None if pattern is None else scorer[pattern]
    else:
        name = scorer
    if name is None:
        family = data_source_of(source)
        return family.domain, family.paper if scoring == "paper" else family.reward
    known = _first_fit(DATA_SOURCES, source)
    return DOMAINS.get(name, source) if known is None else DATA_SOURCES[known].domain, name


Parts = tuple[str, str, object, str]  # data_source, the field of the prompt, true answer, the field that it is from


def _verl(row: Mapping[str, object], any_source: bool) -> Parts:
    wanted = ("prompt",) if any_source else ("data_source", "prompt")
    for field in wanted:
        if field not in row:
            raise ValueError(f"{field} is missing; there are {', '.join(row)}")
    model = _named_values(row["reward_model"])
    if not isinstance(model, dict) or model.get("ground_truth") is None:
        raise ValueError(f"reward_model must hold a ground_truth, got {_shown(model)}")
    if any_source and row.get("data_source") in (None, ""):
        source = OWN_SOURCE
    elif row["data_source"] == "" and row.get("ability") == "math":
        source = PLAIN_SOURCE  # as DeepScaleR's scripts write it
    else:
        source = _source(row["data_source"])
    return source, "prompt", model["ground_truth"], "reward_model.ground_truth"


def _plain(row: Mapping[str, object], any_source: bool) -> Parts:
    fields = []
    for names in (PROMPTS, ANSWERS):
        there = [name for name in names if row.get(name) is not None]
        if not there:
            verl = ", or reward_model" if names is ANSWERS else ""
            raise ValueError(f"{names[0]} (or {' or '.join(names[1:])}{verl}) is missing; there are {', '.join(row)}")
        fields.append(there[0])
    prompt, truth = fields
    if row.get("data_source") not in (None, ""):
        source = _source(row["data_source"])
    else:
        source = OWN_SOURCE if any_source else PLAIN_SOURCE
    return source, prompt, row[truth], truth


def _source(source: object) -> str:
    if not isinstance(source, str):
        raise ValueError(f"data_source must be text, got {_shown(source)}")
    return source


def _prompt(value: object, field: str) -> tuple[str, tuple[Message, ...] | None]:
    """A prompt as text, and its messages unless they are one user's."""
    given = value
    if isinstance(value, str):
        given = _written_out(value, field)
        if given is None:
            if not value.strip():
                raise ValueError(f"{field} is empty")
            return value, None
    messages = _messages(given, field)
    if [m.role for m in messages] == ["user"] and messages[0].content.startswith("[{"):
        inner = _written_out(messages[0].content, field)
        messages = messages if inner is None else _messages(inner, field)
    roles = [m.role for m in messages]
    if "user" not in roles or roles[-1] == "system":
        raise ValueError(f"{field} must hold a user's message and not end with a system message, got {roles}")
    if not all(m.content.strip() for m in messages if m.role == "user"):
        raise ValueError(f"{field}: the user's message is empty")
    text = "\n\n".join(m.content for m in messages if m.content)
    return text, None if roles == ["user"] else messages


def _written_out(text: str, field: str) -> object | None:
    """The messages that a text holds as JSON or as Python's list; None of any other text."""
    text = text.strip()
    if not text.startswith("["):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        keys = [m.keys() for m in found if isinstance(m, dict)] if isinstance(found, list) else []
        if keys and len(keys) == len(found) and all({"role", "content"} <= k or {"from", "value"} <= k for k in keys):
            return found
        return None
    if _LIKE_MESSAGES.match(text):
        raise ValueError(f"{field} looks like messages, and is neither JSON nor a Python list: {text:.80}")
    return None


def _messages(given: object, field: str) -> tuple[Message, ...]:
    messages = []
    for message in given if isinstance(given, list) else [given]:
        named = message if isinstance(message, dict) else {}
        role, content = named.get("role"), named.get("content")
        if role is None and isinstance(named.get("from"), str):
            role, content = SPEAKERS.get(named["from"], named["from"]), named.get("value")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)  # of {type: text, text} parts
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"{field} must be text or a list of messages with role and content, got {_shown(given)}")
        messages.append(Message(role, content))
    return tuple(messages)


def _answer(truth: object, field: str, reward: str) -> str:
    kind = reward.removeprefix("paper_")
    if kind in ("logic", "logic_strict"):
        return _grid(truth, field)
    text = truth if isinstance(truth, str) else _number(truth)
    if text is None and reward not in TEXT_SCORERS:
        text = json.dumps(truth)  # a function of the user's may be about anything
    if text is None:
        raise ValueError(f"{field} must be text or a number for {DOMAINS.get(reward, reward)} problems, got {_shown(truth)}")
    if not text.strip():
        raise _Unanswered(f"{field} is empty")
    if kind == "choice" and not (len(text.strip()) == 1 and text.strip() in LETTERS):
        raise ValueError(f"{field} must be a letter A to J, got {_shown(truth)}")
    if kind == "code":
        try:
            functional_tests(text)
        except ValueError as e:
            raise ValueError(f"{field}: {e}") from None
    return text


def _number(value: object) -> str | None:
    """The text of a number, as its file has it; None of what is none."""
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, (float, decimal.Decimal)) and math.isfinite(value):
        return positional(str(value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _grid(truth: object, field: str) -> str:
    header = truth.get("header") if isinstance(truth, dict) else None
    rows = truth.get("rows") if isinstance(truth, dict) else None
    if not header or not rows or not all(row and len(row) == len(header) for row in rows):
        raise ValueError(f"{field} must hold a header and rows of its length, got {_shown(truth)}")
    return json.dumps({"header": header, "rows": rows})


def _info(row: Mapping[str, object]) -> dict[str, object]:
    extra = _named_values(row.get("extra_info") or {})
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
            info.setdefault(key, float(value) if isinstance(value, WrittenNumber) else value)
    return info


def _named_values(value: object) -> object:
    """What a field holds whose file writes named values as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value, parse_float=WrittenNumber)
        except (ValueError, RecursionError):
            return value
    return value


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

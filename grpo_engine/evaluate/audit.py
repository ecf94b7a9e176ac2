"""An audit of the verifier: a file of responses with their truths, scored by ours and by others' scorers.

The file has one response a row, or several in a list, and the truth beside it, in fields that are named as peers name
them (`RESPONSES`, `TRUTHS`), or as one says. A dotted name reaches into a field: doc.answer, reward_model.ground_truth.
"""

from __future__ import annotations

import decimal
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo_engine.rewards import scorer_target
from grpo_engine.rewards.extract import after_thinking, last_boxed
from grpo_engine.rewards.peers import PEERS, installed
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.rewards.quantity import number_text
from grpo_engine.tasks.rows import WrittenNumber, read_rows
from grpo_engine.types import Problem

# As verl's rollout dumps, lm-evaluation-harness's samples, TRL's completions and data sets of generations name them.
RESPONSES = (
    "response", "responses", "output", "outputs", "completion", "completions", "generation", "generations",
    "generated_text", "prediction", "predictions", "model_output", "resps", "filtered_resps", "text", "answer",
)  # fmt: skip
TRUTHS = (
    "truth", "ground_truth", "reward_model.ground_truth", "gts", "gt", "target", "gold", "reference", "expected_answer",
    "answer", "solution", "doc.answer", "doc.solution",
)  # fmt: skip
VERDICTS = ("score", "acc", "correct", "is_correct", "exact_match", "reward", "value")  # the file's own


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredResponse:
    """One response, and what each scorer gave it."""

    row: str  # "line 3" or "row 2"
    truth: str
    response: str
    scores: dict[str, float]  # by scorer; ours is the first
    statuses: dict[str, str]  # likewise: "ok", "timeout", "crash", "error"
    file: float | None  # the file's own verdict

    @property
    def agreed(self) -> bool:
        """Whether all scorers, and the file, say the same."""
        return len({*self.scores.values()} | ({self.file} if self.file is not None else set())) == 1

    @property
    def answer(self) -> str:
        """What the response answers, for a table: its last box, or its end."""
        boxed = last_boxed(after_thinking(self.response))
        return boxed if boxed is not None else self.response.strip()[-60:]


def audit(
    path: str | Path,
    *,
    scorer: str = "math",
    beside: Sequence[str] | None = None,
    response: str | None = None,
    truth: str | None = None,
    bare: bool = False,
    limit: int | None = None,
    workers: int = 2,
    timeout_s: float = 10.0,
) -> list[ScoredResponse]:
    """Scores a file of responses.

    Args:
        path: .jsonl or .parquet, or a folder that `datasets` saved.
        scorer: ours: a name of `rewards.SCORERS`, or "module:function".
        beside: other scorers: names of `peers.PEERS`, of `SCORERS`, or "module:function"; None: all installed peers for
            "math", else none.
        response: field of the responses; None: the first of `RESPONSES` that the first row has.
        truth: field of the truths; None: the first of `TRUTHS`.
        bare: the responses are answers alone, without a box: each is put in one.
        limit: at most this many rows, the first; None: all.
        workers: processes that score.
        timeout_s: of one response and one scorer; exceeding it is worth 0.

    Returns:
        One verdict a response, in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no rows, a field that is not there, an unknown scorer, or one that is not installed.
    """
    beside = _others(scorer, beside)
    problems, rows = _read(Path(path), response, truth, limit)
    scores: dict[str, list] = {}
    with RewardPool(workers=workers, timeout_s=timeout_s) as pool:
        for name in (scorer, *beside):
            target = PEERS[name][1] if name in PEERS else name
            scores[name] = pool.score(
                [f"\\boxed{{{text}}}" if bare else text for _, text, _ in rows],
                [Problem(uid=name, prompt="", answer=answer, domain="audit", reward=target) for name, answer in problems],
            )
    return [
        ScoredResponse(
            row=name, truth=answer, response=text, file=said,
            scores={name: found[i].value for name, found in scores.items()},
            statuses={name: found[i].status for name, found in scores.items()},
        )
        for i, ((name, answer), (_, text, said)) in enumerate(zip(problems, rows, strict=True))
    ]  # fmt: skip


def write_verdicts(path: Path, verdicts: Sequence[ScoredResponse]) -> None:
    """Writes one JSON object a line.

    Args:
        path: file, written anew.
        verdicts: as `audit` gives them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(v)) + "\n" for v in verdicts), encoding="utf-8")


Table = list[list[str]]  # the first row is the head


def summary(verdicts: Sequence[ScoredResponse]) -> Table:
    """How many responses each scorer finds right, and how often it says what ours does.

    Args:
        verdicts: at least one.

    Returns:
        One row a scorer, and one for the file's own verdicts where it has some.
    """
    ours, *_ = verdicts[0].scores
    rows = [["scorer", "right", "mean", "not scored", "as ours", "right, not ours", "ours, not right"]]
    for name in (*verdicts[0].scores, "file"):
        told = [(v.file if name == "file" else v.scores[name], v.scores[ours]) for v in verdicts]
        pairs = [(theirs, mine) for theirs, mine in told if theirs is not None]
        if not pairs:
            continue
        failed = sum(v.statuses.get(name, "ok") != "ok" for v in verdicts)
        compared = ["", "", ""] if name == ours else [
            str(sum(a == b for a, b in pairs)), str(sum(a > b for a, b in pairs)), str(sum(a < b for a, b in pairs)),
        ]  # fmt: skip
        right = sum(a == 1.0 for a, _ in pairs)
        rows.append(
            [name, f"{right} of {len(pairs)}", f"{sum(a for a, _ in pairs) / len(pairs):.4f}", str(failed), *compared]
        )
    return rows


def table(verdicts: Sequence[ScoredResponse], width: int = 40) -> Table:
    """The verdicts as a table.

    Args:
        verdicts: any.
        width: characters of a truth or an answer; longer ones lose their middle.

    Returns:
        One row a response: where it stands, truth, answer, and each scorer's value.
    """
    if not verdicts:
        return [["row", "truth", "answer"]]
    names = list(verdicts[0].scores)
    said = any(v.file is not None for v in verdicts)
    rows = [["row", "truth", "answer", *names, *(["file"] if said else [])]]
    for v in verdicts:
        values = [_value(v.scores[name]) if v.statuses[name] == "ok" else v.statuses[name] for name in names]
        own = ["" if v.file is None else _value(v.file)] if said else []
        rows.append([v.row, _cut(v.truth, width), _cut(v.answer, width), *values, *own])
    return rows


def _others(scorer: str, beside: Sequence[str] | None) -> list[str]:
    scorer_target(scorer)
    if beside is None:
        return installed() if scorer == "math" else []
    for name in beside:
        if name not in PEERS:
            try:
                scorer_target(name)
            except ValueError as e:
                raise ValueError(f"{e}; and of others {', '.join(PEERS)}") from None
        elif name not in installed():
            raise ValueError(f"{name}: {PEERS[name][0]} is not installed; there is {', '.join(installed())}")
    return [name for name in dict.fromkeys(beside) if name != scorer]


def _read(
    path: Path, response: str | None, truth: str | None, limit: int | None
) -> tuple[list[tuple[str, str]], list[tuple[str, str, float | None]]]:
    if limit is not None and limit < 1:
        raise ValueError(f"score: limit must be at least 1 or None, got {limit}")
    names = (*RESPONSES, *TRUTHS, *VERDICTS, *(name for name in (response, truth) if name is not None))
    problems, rows = [], []
    for count, (where, row) in enumerate(read_rows(path, {name.partition(".")[0] for name in names})):
        if count == 0:
            response, truth = _fields(path, row, response, truth)
        assert response is not None and truth is not None  # the first row named them
        if limit is not None and count >= limit:
            break
        found, answer = _at(row, response), _text(_at(row, truth))
        if answer is None or not answer.strip():
            raise ValueError(f"{where}: {truth} holds no truth, got {_at(row, truth)!r}")
        texts = _texts(found)
        if texts is None:
            raise ValueError(f"{where}: {response} must be text or a list of texts, got {type(found).__name__}")
        for i, text in enumerate(texts):
            line = where.removeprefix(f"{path}: ")
            name = line if len(texts) == 1 else f"{line}, {i + 1}"
            problems.append((name, answer))
            rows.append((name, text, _said(row, i, len(texts))))
    if not rows:
        raise ValueError(f"{path}: the file holds no responses")
    return problems, rows


def _fields(path: Path, row: Mapping[str, object], response: str | None, truth: str | None) -> tuple[str, str]:
    truth = truth or next((name for name in TRUTHS if _text(_at(row, name)) and name != response), None)
    response = response or next((n for n in RESPONSES if n != truth and _texts(_at(row, n)) is not None), None)
    for option, name, known in (("--response", response, RESPONSES), ("--truth", truth, TRUTHS)):
        if name is None:
            raise ValueError(f"{path}: no field of {', '.join(known)} there; {option} names it; there are {', '.join(row)}")
        if _at(row, name) is None:
            raise ValueError(f"{path}: {option} {name}: no such field; there are {', '.join(row)}")
    assert response is not None and truth is not None  # the loop refuses None
    return response, truth


def _at(row: Mapping[str, object], name: str) -> object:
    if name in row:
        return row[name]
    value: object = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _text(value: object) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, (int, float, decimal.Decimal)) and not isinstance(value, bool) and math.isfinite(value):
        return number_text(value)
    return value if isinstance(value, str) else None


def _texts(value: object) -> list[str] | None:
    """The responses of a field: text, a list of texts, a list of chat messages, or lists of those."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return [value["content"]]
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        return _texts(value[-1])  # a chat: its last message
    found = [texts for item in value if (texts := _texts(item)) is not None]
    return [text for texts in found for text in texts] if len(found) == len(value) else None


def _said(row: Mapping[str, object], i: int, count: int) -> float | None:
    for name in VERDICTS:
        value = row.get(name)
        if isinstance(value, list):
            value = value[i] if len(value) == count else None
        if isinstance(value, (bool, int, float)) and math.isfinite(value):
            return float(value)
    return None


def _value(value: float) -> str:
    return f"{value:g}"


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split())
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[:half]}…{text[-half:]}"

"""The metrics of a verl run: its file logger's lines, or its console.

A captured console holds what other programs print, too: answers of the model, progress bars, requests of tools. A line is
verl's where one of its keys is. Others that look like a step are counted, and said.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_engine.study.importers.rows import (
    Metric,
    Rows,
    RunInfo,
    check_sets,
    keys_of,
    metric_of,
    number,
    read_log,
    row_of,
    step_number,
)

if TYPE_CHECKING:
    import pyarrow

_log = logging.getLogger(__name__)

_TOKENS = "perf/total_num_tokens"
# The first part of the keys that verl itself logs (its metric_utils.py and ray_trainer.py).
_OWN = re.compile(
    r"(?:val|val-core|val-aux|actor|critic|perf|training|timing_s|timing_per_token_ms|global_seqlen|response|"
    r"response_length|prompt_length)/."
)
_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_REPEATED = re.compile(r" \[repeated \d+x across cluster\].*$")  # what Ray appends
_STEP = re.compile(r"(?<![A-Za-z_/.-])step:(\d+) - ")
_TEXT = re.compile(r"\[(?:prompt|response|ground_truth|score)\]")  # verl prints samples behind these
_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf)"
_VALUE = re.compile(rf"(?:np\.)?\w+\((?P<inner>{_NUMBER}|True|False)\)|(?P<plain>{_NUMBER}|True|False)")
_LAST = re.compile(rf"(?P<key>[^\n]+?):\s*(?:{_VALUE.pattern})(?![0-9.a-zE/])")
_FILE_LINE = re.compile(r'\{\s*"step":\s*-?\d+,\s*"data":\s*\{')


def read_verl(
    path: str | os.PathLike[str],
    *,
    run: RunInfo,
    metrics: Mapping[str, Metric] | None = None,
    out_of_domain: Sequence[str] = (),
) -> pyarrow.Table:
    """Reads the metrics of a verl run.

    Both of verl's own forms are read, a line at a time: the file logger's {"step": 1, "data": {...}} and the console's
    `step:1 - critic/score/mean:0.31 - ...`, whatever else the captured output holds. Lines that only look like it are left
    out, with a warning that counts them.

    A step that was trained twice (a run that was resumed from a checkpoint) counts as it was the last time, and the steps
    after it do not count until they are trained again. A line with validation alone (verl validates before it trains, after
    a resumption too) adds to its step.

    Tokens are the running sum of `perf/total_num_tokens` (attention mask of prompts and responses of the whole batch); from
    a step that is missing on they are null, because a sum with a hole is no sum.

    Args:
        path: the file.
        run: what the log does not say; prompts_per_step is data.train_batch_size.
        metrics: evaluation set -> key, or several keys with weights ({"val/test_score/a": 335, ...}). None takes every
            `val-core/<set>/<reward or acc>/mean@n`, or every `val/test_score/<set>` of older versions.
        out_of_domain: which of the sets are out of domain.

    Returns:
        The table.

    Raises:
        ValueError: no metrics in the file, a line of the file logger cut short, or a value that is no pass rate; file,
            line and key are named.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    named = set(keys_of(metrics)) if metrics else set()
    log = _Log(path=path, named=named)
    steps: dict[int, _Step] = {}
    for line, step, data in log.read():
        old = steps.get(step)
        if not all(key.startswith("val") or key in named for key in data):
            for later in [s for s in steps if s > step]:  # resumed from a checkpoint: what followed is run again
                del steps[later]
            if old is None or old.trained:
                steps[step] = _Step(line=line, data=data, trained=True)
            else:
                steps[step] = _Step(line=line, data=old.data | data, trained=True)
        elif old is None:
            steps[step] = _Step(line=line, data=data, trained=False)
        else:
            steps[step] = _Step(line=line, data=old.data | data, trained=old.trained)
    log.say_what_was_left_out()
    if not steps:
        raise ValueError(f"{path}: holds no line of verl's file logger or console logger")
    if metrics is None:
        metrics = _metrics_of(steps, path)
    check_sets(metrics, out_of_domain)
    rows, expected = Rows(run.dataset_prompts), 1
    tokens: int | None = 0
    for step in sorted(steps):
        data, where = steps[step].data, f"{path}:{steps[step].line}"
        if step > 0:
            count = data.get(_TOKENS)
            if tokens is not None and step == expected and count is not None:
                tokens += round(number(count, f"{where}, {_TOKENS}"))
            else:
                tokens = None
            expected = step + 1
        for eval_set, metric in metrics.items():
            value = metric_of(data, metric, where)
            if value is not None:
                row = row_of(run, run_id=path.stem, step=step, eval_set=eval_set, in_domain=eval_set not in out_of_domain,
                             pass1=value, tokens=tokens)  # fmt: skip
                rows.add(row, where)
    return rows.table(f"{path} ({', '.join(str(m) for m in metrics.values())})")


@dataclass(frozen=True, slots=True)
class _Step:
    """What the log has of a step."""

    line: int  # the last that is about it
    data: dict[str, Any]
    trained: bool  # False: only validation


class _Log:
    """The lines of a log that are verl's, and a count of those that only look like it."""

    def __init__(self, path: Path, named: set[str]) -> None:
        """`named` are keys that are taken for verl's besides its own."""
        self._path, self._named = path, named
        self._foreign: list[tuple[int, str]] = []
        self._damaged: list[tuple[int, str]] = []

    def read(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """(line number, step, metrics), in the order of the file."""
        for line, text in enumerate(read_log(self._path, mixed=True).split("\n"), start=1):
            for part in text.split("\r"):  # a progress bar writes over itself
                yield from self._line(line, _ANSI.sub("", part).strip())

    def say_what_was_left_out(self) -> None:
        for found, what in (
            (self._foreign, "lines left out that look like a step and have no metric of verl's"),
            (self._damaged, "parts of verl's lines left out that are no KEY:NUMBER"),
        ):
            if found:
                line, text = found[0]
                _log.warning("%s: %s: %d, the first at line %d: %.60r", self._path, what, len(found), line, text)

    def _line(self, line: int, text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
        if text.startswith("{"):
            yield from self._file_line(line, text)
            return
        text = _REPEATED.sub("", text)
        starts = list(_STEP.finditer(text))
        ends = [match.start() for match in starts[1:]] + [len(text)]
        for match, end in zip(starts, ends, strict=False):
            data, damaged = _console_values(text[match.end() : end])
            if _TEXT.search(text, 0, match.start()) or not self._is_verl(data):
                self._foreign.append((line, text[match.start() :]))
            else:
                self._damaged += [(line, part) for part in damaged]
                yield line, int(match[1]), data

    def _file_line(self, line: int, text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
        try:
            obj = json.loads(text)
        except ValueError as error:
            if _FILE_LINE.match(text):
                raise ValueError(f"{self._path}:{line}: not JSON ({error}): {text[:60]!r}") from None
            obj = None
        if isinstance(obj, dict) and "step" in obj and isinstance(obj.get("data"), dict) and self._is_verl(obj["data"]):
            yield line, step_number(obj["step"], f"{self._path}:{line}, step"), obj["data"]
        elif '"step"' in text:
            self._foreign.append((line, text))

    def _is_verl(self, data: Mapping[str, Any]) -> bool:
        return any(key in self._named or _OWN.match(key) for key in data)


def _console_values(text: str) -> tuple[dict[str, str], list[str]]:
    """Key to number of what follows `step:N - `, and the parts that are neither."""
    data: dict[str, str] = {}
    damaged = []
    *parts, last = text.split(" - ")
    for part in [*parts, last]:
        key, _, value = part.rpartition(":")
        match = _VALUE.fullmatch(value.strip())
        if part is last and (match is None or ":" in key):
            # another program may have printed before the end of the line: it stands behind the last number
            found = _LAST.match(part)
            key, match = (found["key"], found) if found else (key, match)
        if key.strip() and match:
            data[key.strip()] = _plain(match)
        elif part.strip():
            damaged.append(part)
    return data, damaged


def _plain(match: re.Match[str]) -> str:
    text = match["inner"] or match["plain"]
    return {"True": "1", "False": "0"}.get(text, text)


def _metrics_of(steps: Mapping[int, _Step], path: Path) -> dict[str, Metric]:
    keys = sorted({k for step in steps.values() for k in step.data})
    for pattern in (r"val-core/(?P<set>.+)/(?:reward|acc)/mean@\d+", r"val/test_score/(?P<set>.+)"):
        found: dict[str, list[str]] = {}
        for key in keys:
            if match := re.fullmatch(pattern, key):
                found.setdefault(match["set"], []).append(key)
        if several := {s: k for s, k in found.items() if len(k) > 1}:
            raise ValueError(f"{path}: metrics must be named, as a set has several keys: {several}")
        if found:
            return {s: k[0] for s, k in found.items()}
    raise ValueError(f"{path}: metrics must be named, as no key is val-core/*/mean@n or val/test_score/*")

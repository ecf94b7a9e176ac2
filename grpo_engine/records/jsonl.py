"""Records as JSON: one object a line, checked when it is read, whole after a kill.

See `grpo_engine.records.records` for what the files hold.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from grpo_engine.system.files import write_bytes_atomic

SCHEMA = 3
READABLE = (1, 2, 3)  # schemas that are read; a field that the older lacks has a default
FORMER_NAMES = {"equal_groups": "zero_variance_groups"}  # fields of schemas 1 and 2 -> today's
Record = TypeVar("Record")


def to_json(record: Any) -> dict[str, Any]:
    """A record, or a mapping, as the JSON object that is written: schema first, non-finite numbers named.

    Args:
        record: a dataclass instance or a mapping of JSON-like values; nested ones are walked. Paths become text,
            tuples become lists, and anything with an `item()` method (a one-element tensor) becomes its number.

    Returns:
        A dict that starts with `"schema"`. A NaN or an infinity is `None`, and `"non_finite"` maps its dotted
        name to "nan", "inf" or "-inf".

    Raises:
        TypeError: a value that has no JSON form; the message names its place.
    """
    non_finite: dict[str, str] = {}
    body = _plain(record, "", non_finite)
    if not isinstance(body, dict):
        raise TypeError(f"to_json: a record must be a dataclass or a mapping, got {type(record).__name__}")
    body.pop("schema", None)
    out = {"schema": SCHEMA, **body}
    if non_finite:
        out["non_finite"] = non_finite
    return out


def _plain(value: Any, where: str, non_finite: dict[str, str]) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        non_finite[where] = "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}" if where else str(k), non_finite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]", non_finite) for i, v in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "item", None)):
        return _plain(value.item(), where, non_finite)
    raise TypeError(f"to_json: {where or 'the record'} is a {type(value).__name__}, which has no JSON form")


def from_json(cls: type[Record], obj: Mapping[str, Any], *, where: str = "record") -> Record:
    """A typed record from a JSON object that was read; fields of older schemas get today's names.

    Args:
        cls: a dataclass, such as `StepRecord`; its fields may be dataclasses in turn.
        obj: the object; `schema` and `non_finite` are checked and left out.
        where: file and line, for messages.

    Returns:
        An instance of `cls`. Fields with a default may be absent.

    Raises:
        ValueError: another schema number, a missing field or one that `cls` does not have.
        TypeError: a value of the wrong type (an integer is accepted where a float is wanted).
    """
    _check_schema(obj, where)
    names = obj.get("non_finite", {})
    former = FORMER_NAMES if obj["schema"] < 3 else {}
    body = {
        former.get(k, k): _restored(v, k, names) if names else v for k, v in obj.items() if k not in ("schema", "non_finite")
    }
    try:
        # from text: pydantic's strict mode takes a list for a tuple, and an object for a dataclass, in JSON only
        return _adapter(cls).validate_json(json.dumps([body]))[0]  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        raise _fault(cls, error, where) from None


@functools.cache
def _adapter(cls: type[Record]) -> pydantic.TypeAdapter[list[Record]]:
    # of a list, because a configuration reaches the dataclasses within but cannot be given to one itself
    return pydantic.TypeAdapter(list[cls], config=pydantic.ConfigDict(strict=True, extra="forbid"))  # type: ignore[valid-type]


def _restored(value: Any, where: str, names: Mapping[str, str]) -> Any:
    """The inverse of `_plain` for the numbers that JSON does not have."""
    if value is None:
        return float(names[where]) if where in names else None
    if isinstance(value, dict):
        return {k: _restored(v, f"{where}.{k}", names) for k, v in value.items()}
    if isinstance(value, list):
        return [_restored(v, f"{where}[{i}]", names) for i, v in enumerate(value)]
    return value


_WANTED = {"int_type": "int", "float_type": "float", "string_type": "str", "bool_type": "bool"}


def _fault(cls: type, error: pydantic.ValidationError, where: str) -> Exception:
    """Pydantic's report as one line: unknown fields, else missing ones, else the first value of a wrong type."""
    faults = error.errors(include_url=False)
    for kind, says in (("unexpected_keyword_argument", "has no field"), ("missing", "lacks")):
        if found := [f["loc"] for f in faults if f["type"] == kind]:
            fields = sorted(str(loc[-1]) for loc in found if loc[:-1] == found[0][:-1])
            return ValueError(f"{where}: {_path(cls, found[0][:-1])} {says} {', '.join(fields)}")
    fault = faults[0]
    wanted = _WANTED.get(fault["type"]) or fault["msg"].removeprefix("Input should be ")
    if len(fault["loc"]) == 2:  # a field of the record itself: what its declaration says, None included
        wanted = next(str(f.type) for f in dataclasses.fields(cls) if f.name == fault["loc"][1])
    return TypeError(f"{where}: {_path(cls, fault['loc'])} must be {wanted}, got {fault['input']!r}")


def _path(cls: type, loc: tuple[int | str, ...]) -> str:
    return cls.__name__ + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc[1:])


def _check_schema(obj: Mapping[str, Any], where: str) -> None:
    if obj.get("schema") not in READABLE:
        raise ValueError(f"{where}: schema must be one of {READABLE}, got {obj.get('schema')!r}")


class JsonlWriter:
    """Appends records to a file, one line each, flushed to the operating system after every line.

    A process that is killed loses nothing that `write` returned from; a machine that loses power may lose lines
    written after the last `sync`. A checkpoint stores `num_bytes` after a `sync`; opening with `truncate_to` that
    number puts the file back to where the checkpoint was taken, so a resumed run repeats the lost lines exactly.
    """

    def __init__(self, path: str | os.PathLike[str], *, truncate_to: int | None = None) -> None:
        """Opens, and creates when absent, the file.

        Args:
            path: the file; its folder must exist.
            truncate_to: length in bytes to cut the file to before appending; None appends at the end; 0 starts afresh.

        Raises:
            ValueError: the file is shorter than `truncate_to`, so records that a checkpoint counted on are gone;
                or it does not end a line there.
        """
        self.path = Path(path)
        self._file = open(self.path, "ab")
        size = self._file.tell()
        if truncate_to is not None:
            if not 0 <= truncate_to <= size:
                self._file.close()
                raise ValueError(
                    f"{self.path}: truncate_to must be in 0..{size} (the file's length), got {truncate_to}: "
                    "records that the checkpoint counted on are missing"
                )
            with open(self.path, "rb") as read:
                read.seek(max(truncate_to - 1, 0))
                if truncate_to > 0 and read.read(1) != b"\n":
                    self._file.close()
                    raise ValueError(f"{self.path}: byte {truncate_to} does not end a record")
            self._file.truncate(truncate_to)
            self._file.seek(0, os.SEEK_END)

    @property
    def num_bytes(self) -> int:
        """Length of the file in bytes, all written lines included."""
        return self._file.tell()

    def write(self, record: Any) -> None:
        """Appends one record (see `to_json`) and flushes it.

        Args:
            record: a dataclass instance or a mapping.

        Raises:
            TypeError: a value without a JSON form; the file is then unchanged.
        """
        self.write_lines([json.dumps(to_json(record), allow_nan=False, separators=(",", ":"))])

    def write_lines(self, lines: Iterable[str]) -> None:
        """Appends lines as they are, each without its line end, and flushes them."""
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()

    def sync(self) -> None:
        """Forces what was written to the disk (fsync)."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes a JSON file so that a reader sees the old content or the new, never a part.

    Written to a temporary name in the same folder, fsynced, renamed; then the folder is fsynced.

    Args:
        path: the file; its folder must exist.
        obj: a dataclass instance or a mapping (see `to_json`; `schema` is added).

    Raises:
        TypeError: a value without a JSON form.
        OSError: the folder is missing or not writable; no temporary file is left behind.
    """
    write_bytes_atomic(path, (json.dumps(to_json(obj), allow_nan=False, indent=1) + "\n").encode())


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonlFile:
    """What a .jsonl file held. `torn` describes a last line that was cut short, when one was left out."""

    records: list[dict[str, Any]]
    torn: str | None = None


def read_jsonl(path: str | os.PathLike[str], *, allow_torn: bool = False) -> JsonlFile:
    """Reads a file of JSON objects, one a line.

    Args:
        path: the file.
        allow_torn: whether a last line that was cut short by a kill is left out and reported in `torn`; only right
            for a run that is not complete.

    Returns:
        The objects in order, and the report on a torn last line.

    Raises:
        ValueError: a line that is not a JSON object; the message holds file and line number.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    data = path.read_bytes()
    lines = data.split(b"\n")
    ends_clean = lines[-1] == b""
    if ends_clean:
        lines.pop()
    out: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        problem = None
        if last and not ends_clean:
            problem = "is cut short (no line end)"
        else:
            try:
                obj = json.loads(line)
                if not isinstance(obj, dict):
                    problem = f"is not a JSON object: {line[:60]!r}"
            except ValueError as error:  # json and utf-8 errors alike
                problem = f"is not JSON ({error}): {line[:60]!r}"
        if problem is None:
            out.append(obj)
            continue
        message = f"{path}:{number}: the record {problem}"
        if last and not ends_clean and allow_torn:
            return JsonlFile(records=out, torn=message)
        raise ValueError(message)
    return JsonlFile(records=out)


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads one JSON object, of whatever schema.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        ValueError: not JSON, or not an object; the message names the file.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        obj = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(obj, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(obj).__name__}")
    return obj


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads one JSON object and checks its schema number.

    Args:
        path: the file.

    Returns:
        The object, `schema` included.

    Raises:
        ValueError: not a JSON object, or another schema; the message names the file.
        FileNotFoundError: no such file.
    """
    obj = read_object(path)
    _check_schema(obj, str(path))
    return obj

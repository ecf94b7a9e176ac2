"""Records as JSON: one object a line, checked when it is read, whole after a kill.

See `grpo_engine.records.records` for what the files hold.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from grpo_engine.system.files import write_bytes_atomic

SCHEMA = 2
READABLE = (1, 2)  # schemas that are read; a field that the older lacks has a default
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
    """A typed record from a JSON object that was read.

    Args:
        cls: `StepRecord`, `EvalRecord` or `TimingRecord`.
        obj: the object; `schema` and `non_finite` are checked and left out.
        where: file and line, for messages.

    Returns:
        An instance of `cls`. Fields with a default may be absent.

    Raises:
        ValueError: another schema number, a missing field or one that `cls` does not have.
        TypeError: a value of the wrong type (an integer is accepted where a float is wanted).
    """
    _check_schema(obj, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {k: v for k, v in obj.items() if k not in ("schema", "non_finite")}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where}: {cls.__name__} has no field {', '.join(unknown)}")
    required = [
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [n for n in required if n not in values]:
        raise ValueError(f"{where}: {cls.__name__} lacks {', '.join(missing)}")
    nulled = obj.get("non_finite", {})
    hints = _hints(cls)
    for name, value in values.items():
        if value is None and name in nulled:
            values[name] = float(nulled[name])
        elif not _is_a(value, hints[name]):
            raise TypeError(f"{where}: {cls.__name__}.{name} must be {fields[name].type}, got {value!r}")
        else:
            values[name] = _made(value, hints[name])
    return cls(**values)


def _made(value: Any, hint: Any) -> Any:
    """A mapping of objects as the dataclasses that the hint names."""
    kind = get_args(hint)[-1] if get_origin(hint) is dict else None
    return {k: kind(**v) for k, v in value.items()} if dataclasses.is_dataclass(kind) else value


def _check_schema(obj: Mapping[str, Any], where: str) -> None:
    if obj.get("schema") not in READABLE:
        raise ValueError(f"{where}: schema must be one of {READABLE}, got {obj.get('schema')!r}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_a(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, h) for h in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


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
        line = json.dumps(to_json(record), allow_nan=False, separators=(",", ":")) + "\n"
        self._file.write(line.encode())
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


def write_json_atomic(path: str | os.PathLike[str], obj: Any, *, schema: int = SCHEMA) -> None:
    """Writes a JSON file so that a reader sees the old content or the new, never a part.

    Written to a temporary name in the same folder, fsynced, renamed; then the folder is fsynced.

    Args:
        path: the file; its folder must exist.
        obj: a dataclass instance or a mapping (see `to_json`).
        schema: number of the file's own schema, written first.

    Raises:
        TypeError: a value without a JSON form.
        OSError: the folder is missing or not writable; no temporary file is left behind.
    """
    write_bytes_atomic(path, (json.dumps(to_json(obj) | {"schema": schema}, allow_nan=False, indent=1) + "\n").encode())


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

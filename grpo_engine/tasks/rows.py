"""Rows of files of problems, whatever their format; what a row means is `files`' to say.

NAME.parquet        parquet
NAME.jsonl          one JSON object a line; empty lines are passed over
NAME.json           the same, or one array of objects
FOLDER              the parquet or JSON files in it and in its folders; or what `datasets` calls save_to_disk: Arrow
                    files, read without that library
FOLDER:SPLIT        one split of a folder that holds several: FOLDER/SPLIT, or the files named after it
"data/train-*.parquet"  a pattern; ** stands for any folders
[A, B, ...]         several of these, one after the other

Shards are read in the order of the numbers in their names: part-10 comes after part-2. JSON is UTF-8, UTF-16 or UTF-32,
with a byte order mark or without (UTF-32: with one).
"""

from __future__ import annotations

import codecs
import glob
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from grpo_engine.records import jsonl

Row = dict[str, Any]
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]  # see the top of this file

FORMATS = ".parquet, .jsonl, .json, or a folder of those or that datasets' save_to_disk made"
STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"  # of save_to_disk
SPLITS = frozenset({"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"})

_MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_MARK = "\ufeff"  # in the text; in the middle of it where files with marks were joined
_PATTERN = re.compile(r"[*?\[]")
_SHARD = re.compile(r"(^|[-_.])\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{16})?$")  # at the end of a name: -00000-of-00002


class WrittenNumber(float):
    """A number of a file, and the text that it was written as: 0.00001 stays 0.00001."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str, value: float | None = None) -> WrittenNumber:
        number = super().__new__(cls, text if value is None else value)
        number.text = text
        return number


def positional(number: str) -> str:
    """A decimal number without an exponent, and without ".0" at its end: "1e-05" is "0.00001", "72.0" is "72"."""
    return f"{Decimal(number):f}".removesuffix(".0")


def read_rows(source: Source, fields: Collection[str]) -> Iterator[tuple[str, Row]]:
    """The rows of one or several files, in their order.

    Args:
        source: what to read, see above.
        fields: those that are wanted; others are left out.

    Yields:
        Where the row stands, for messages ("a.parquet: row 3", counted from 0, or "a.jsonl: line 4", counted from 1), and
        those of its fields that there are. A JSON number with a point or an exponent, and a number of less than double
        precision, is a `WrittenNumber`.

    Raises:
        FileNotFoundError: no such file or folder, or none that a pattern matches.
        ValueError: another format, a file that is not of the format its name says, or a folder with several splits of which
            none is named; file and line are named.
    """
    for path in find_files(source):
        for place, row in READERS["" if path.is_dir() else path.suffix](path, fields):
            yield f"{path}: {place}", row


def find_files(source: Source) -> list[Path]:
    """The files that a source names.

    Args:
        source: see `read_rows`.

    Returns:
        At least one, in the order in which they are read. A folder of save_to_disk is one, as it is.

    Raises:
        FileNotFoundError, ValueError: see `read_rows`.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else source
    if not sources:
        raise ValueError("no problem file: the list of files is empty")
    return [file for one in sources for file in _find(os.fspath(one))]


def shown(source: Source) -> str:
    """A source as messages name it."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else ", ".join(os.fspath(one) for one in source)


# ------------------------------------------------------------------ which files


def _find(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        return _in_folder(path, None)
    if path.exists():
        return [_readable(path)]
    folder, colon, split = name.rpartition(":")
    if colon and split and Path(folder).is_dir():
        return _in_folder(Path(folder), split)
    if not _PATTERN.search(name):
        raise FileNotFoundError(f"no problem file {name} (problems are read from files of this machine)")
    matches = sorted(map(Path, glob.glob(name, recursive=True)), key=_natural)
    if "**" in name:  # the files of a folder match for themselves
        matches = [match for match in matches if match.is_file()]
    if not matches:
        raise FileNotFoundError(f"no problem file matches {name}")
    return [file for match in matches for file in (_in_folder(match, None) if match.is_dir() else [_readable(match)])]


def _readable(path: Path) -> Path:
    if path.suffix not in READERS or not path.suffix:
        raise ValueError(f"{path}: problems are read from {FORMATS}, got {path.suffix or 'a name without an ending'!r}")
    return path


def _in_folder(folder: Path, split: str | None) -> list[Path]:
    if (folder / SPLITS_FILE).is_file():
        splits = jsonl.read_object(folder / SPLITS_FILE).get("splits")
        if split is None or not isinstance(splits, list) or split not in splits:
            raise _which_split(folder, split, splits)
        return [folder / split]
    if split is not None and (folder / split).is_dir():
        return _in_folder(folder / split, None)
    if (folder / STATE_FILE).is_file():
        its_own = jsonl.read_object(folder / STATE_FILE).get("_split")
        if split not in (None, its_own):
            raise _which_split(folder, split, [its_own])
        return [folder]
    by_split: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(folder.rglob("*"), key=_natural):
        inside = file.relative_to(folder)
        # Hidden ones are a downloader's or a file system's, those with an underscore Spark's.
        if file.suffix and file.suffix in READERS and file.is_file() and not any(p[0] in "._" for p in inside.parts):
            by_split[_split_of(inside)].append(file)
    if not by_split:
        raise ValueError(f"{folder}: no {STATE_FILE} there and no file of problems: they are read from {FORMATS}")
    if split is not None:
        chosen = [name for name in by_split if _is_split(name, by_split[name], split)]
        if len(chosen) != 1:
            raise _which_split(folder, split, chosen or list(by_split))
        files = by_split[chosen[0]]
    else:
        if len(by_split) > 1 and any(SPLITS & _words(name) for name in by_split):
            raise _which_split(folder, split, list(by_split))
        files = [file for of_one in by_split.values() for file in of_one]
    endings = sorted({file.suffix for file in files})
    if len(endings) > 1:
        raise ValueError(f"{folder}: holds {' and '.join(endings)} files; name those that are meant: {folder}/*{endings[0]}")
    return files


def _which_split(folder: Path, split: str | None, splits: object) -> ValueError:
    name = splits[0] if isinstance(splits, list) and splits else "SPLIT"
    wanted = "" if split is None else f"no one split {split!r}; it "
    return ValueError(f"{folder}: {wanted}holds the splits {splits}; name one of them: {folder}:{name}")


def _split_of(file: Path) -> str:
    """What the shards of a split have in common: "train" of data/train-00000-of-00002.parquet and of train/0000.parquet."""
    name = _SHARD.sub("", file.stem)
    return "/".join([part for part in file.parent.parts if part != "data"] + [name] * bool(name))


def _is_split(name: str, files: Sequence[Path], split: str) -> bool:
    return name == split or name.endswith(f"/{split}") or split in _words(name) or [f.stem for f in files] == [split]


def _words(name: str) -> set[str]:
    return set(re.split(r"[-_./]", name.lower()))


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


# ------------------------------------------------------------------ what they hold


def _parquet(path: Path, fields: Collection[str]) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # By batches: a whole column of long messages may be more than one of Arrow's arrays holds.
            names = [name for name in file.schema_arrow.names if name in fields]
            yield from _numbered(file.iter_batches(1024, columns=names), file.schema_arrow)
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{path}: not a readable parquet file: {e}") from e


def _dataset(path: Path, fields: Collection[str]) -> Iterator[tuple[str, Row]]:
    import pyarrow

    files = jsonl.read_object(path / STATE_FILE).get("_data_files")
    if not isinstance(files, list) or not all(isinstance(f, dict) and isinstance(f.get("filename"), str) for f in files):
        raise ValueError(f"{path / STATE_FILE}: _data_files must list file names, got {files!r}")
    tables = []
    for file in files:
        name = path / file["filename"]
        try:
            with pyarrow.memory_map(str(name)) as source:
                tables.append(pyarrow.ipc.open_stream(source).read_all())
        except (pyarrow.ArrowException, OSError) as e:
            raise ValueError(f"{name}: not a readable Arrow file: {e}") from e
    wanted = [table.select([name for name in table.column_names if name in fields]) for table in tables]
    batches = (batch for table in wanted for batch in table.to_batches(max_chunksize=1024))
    yield from _numbered(batches, wanted[0].schema if wanted else ())


def _numbered(batches: Iterator[Any], schema: Any) -> Iterator[tuple[str, Row]]:
    import pyarrow

    narrow = [
        (field.name, inner.name if inner is not field else None)
        for field in schema
        for inner in (field.type if pyarrow.types.is_struct(field.type) else [field])
        if pyarrow.types.is_float16(inner.type) or pyarrow.types.is_float32(inner.type)
    ]
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            for name, inner in narrow:
                _shorten(row if inner is None else row.get(name), inner or name)
            yield f"row {number}", row
            number += 1


def _shorten(row: Row | None, name: str) -> None:
    """0.1 in single precision is not the double 0.10000000149011612."""
    import numpy

    if not row:
        return
    value = row.get(name)
    if isinstance(value, float) and numpy.isfinite(value):
        row[name] = WrittenNumber(positional(str(numpy.float32(value))), value)


def _json_lines(path: Path, fields: Collection[str]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_decoded(path), start=1):
        if line := line.strip(_MARK + " \t\r\n"):
            yield f"line {number}", _row(path, f"line {number}", _parsed(path, f"line {number}", line), fields)


def _json(path: Path, fields: Collection[str]) -> Iterator[tuple[str, Row]]:
    text = "".join(_decoded(path)).strip(_MARK + " \t\r\n")
    if not text.startswith("["):
        yield from _json_lines(path, fields)
        return
    for number, row in enumerate(_parsed(path, "array", text)):
        yield f"row {number}", _row(path, f"row {number}", row, fields)


def _decoded(path: Path) -> Iterator[str]:
    encoding = _encoding(path)
    with path.open(encoding=encoding) as file:
        try:
            yield from file
        except UnicodeError as e:
            raise ValueError(f"{path}: not {encoding}: {e}") from None


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(4)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    # JSON begins with a character of ASCII, so a zero byte beside it is UTF-16's (RFC 4627, section 3).
    if len(head) >= 2 and (not head[0] or not head[1]):
        return "UTF-16-LE" if head[0] else "UTF-16-BE"
    return "UTF-8"


def _parsed(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text, parse_float=WrittenNumber)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: {place}: not JSON: {e}") from None


def _row(path: Path, place: str, row: Any, fields: Collection[str]) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{path}: {place}: must be a JSON object, got {type(row).__name__}")
    return {name: value for name, value in row.items() if name in fields}


READERS: dict[str, Callable[[Path, Collection[str]], Iterator[tuple[str, Row]]]] = {  # by ending; "": a folder
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".json": _json,
    "": _dataset,
}

"""Rows of a file of problems, whatever its format; what a row means is `files`' to say.

NAME.parquet    parquet
NAME.jsonl      one JSON object a line; empty lines are passed over
FOLDER          what `datasets` calls save_to_disk: Arrow files, read without that library
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from grpo_engine.records import jsonl

Row = dict[str, Any]
FORMATS = ".parquet, .jsonl, or a folder that datasets' save_to_disk made"
STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"  # of save_to_disk


def read_rows(path: str | Path, fields: Collection[str]) -> Iterator[tuple[str, Row]]:
    """The rows of a file, in its order.

    Args:
        path: a file or folder of one of the formats above.
        fields: those that are wanted; others are left out.

    Yields:
        Where the row stands, for messages ("row 3", counted from 0, or "line 4", counted from 1), and those of its
        fields that there are.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: another format, or a file that is not of the format its name says; file and line are named.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no problem file {path}")
    if path.is_dir():
        return _folder(path, fields)
    if path.suffix == ".parquet":
        return _parquet(path, fields)
    if path.suffix == ".jsonl":
        return _jsonl(path, fields)
    raise ValueError(f"{path}: problems are read from {FORMATS}, got {path.suffix or 'a name without an ending'!r}")


def _parquet(path: Path, fields: Collection[str]) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{path}: not a readable parquet file: {e}") from e
    yield from _numbered([table], fields)


def _jsonl(path: Path, fields: Collection[str]) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as e:
                        raise ValueError(f"{path}: line {number}: not JSON: {e}") from None
                    if not isinstance(row, dict):
                        raise ValueError(f"{path}: line {number}: must be a JSON object, got {type(row).__name__}")
                    yield f"line {number}", {name: value for name, value in row.items() if name in fields}
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: not UTF-8: {e}") from None


def _folder(path: Path, fields: Collection[str]) -> Iterator[tuple[str, Row]]:
    import pyarrow

    if (path / SPLITS_FILE).is_file():
        splits = jsonl.read_object(path / SPLITS_FILE).get("splits")
        raise ValueError(f"{path}: holds the splits {splits}; name the folder of one of them")
    if not (path / STATE_FILE).is_file():
        raise ValueError(f"{path}: no {STATE_FILE} there: problems are read from {FORMATS}")
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
    yield from _numbered(tables, fields)


def _numbered(tables: list[Any], fields: Collection[str]) -> Iterator[tuple[str, Row]]:
    number = 0
    for table in tables:
        wanted = table.select([name for name in table.column_names if name in fields])
        for batch in wanted.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1

"""Scorer of zebra puzzles: a grid of objects (rows) and their attributes (columns)."""

from __future__ import annotations

import ast
import json
import re

from grpo_engine.rewards import Question
from grpo_engine.rewards.extract import after_thinking

MAX_GRID_CHARS = 100_000  # the largest grid of the data takes 1,500; beyond this nothing is parsed


def share_of_cells(response: str, problem: Question) -> float:
    """The share of the true grid's cells that a response gets right.

    The grid is read from the last <answer>...</answer>, which may span lines, as JSON or as a Python literal. Columns
    are matched by their header when the response's header holds every true name, else by place; rows by place. Cells
    are compared as text without case and outer blanks. The "Position" column counts like any other, as in the paper's
    code: of a grid with C columns, 1 / C is had for numbering the rows.

    Args:
        response: decoded answer; what precedes "</think>" is ignored.
        problem: its answer is JSON, {"header": [C names], "rows": [R lists of C cells]}.

    Returns:
        A number in [0, 1]; 0.0 for a response without a readable grid.

    Raises:
        ValueError: the problem's answer is no such grid.
    """
    header, rows = _true_grid(problem.answer)
    found = _read_grid(response)
    if found is None:
        return 0.0
    places = _columns(header, found.get("header"))
    found_rows = found.get("rows")
    if not isinstance(found_rows, list):
        return 0.0
    right = 0
    for row, found_row in zip(rows, found_rows, strict=False):
        if isinstance(found_row, list):
            right += sum(
                place < len(found_row) and _text(found_row[place]) == _text(cell)
                for cell, place in zip(row, places, strict=True)
            )
    return right / (len(rows) * len(header))


def score(response: str, problem: Question) -> float:
    """`share_of_cells`: partial credit, the paper's value. Its "test loss" is therefore 1 - the mean share."""
    return share_of_cells(response, problem)


def score_strict(response: str, problem: Question) -> float:
    """1.0 when every cell is right (`share_of_cells` is 1), else 0.0."""
    return float(share_of_cells(response, problem) == 1.0)


def _true_grid(answer: str) -> tuple[list[str], list[list[str]]]:
    try:
        grid = json.loads(answer)
        header, rows = grid["header"], grid["rows"]
        if header and rows and all(len(row) == len(header) for row in rows):
            return header, rows
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"logic: the answer must be JSON with a header and rows of its length, got {answer[:80]!r}")


def _read_grid(response: str) -> dict | None:
    before, tag, rest = after_thinking(response).rpartition("<answer>")
    content, closing, _ = rest.partition("</answer>")
    if not tag or not closing:
        # The last tag was left open: an earlier, complete answer still counts.
        complete = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", before, re.DOTALL)
        if not complete:
            return None
        content = complete[-1]
    content = content.strip()
    if content.startswith("```"):
        content = content.strip("`").removeprefix("json").removeprefix("python").strip()
    if len(content) > MAX_GRID_CHARS:
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            grid = read(content)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(grid, dict):
            return grid
    return None


def _columns(header: list[str], found: object) -> list[int]:
    """For each true column, where the response has it."""
    names = [_text(name) for name in found] if isinstance(found, list) else []
    wanted = [_text(name) for name in header]
    if set(wanted) <= set(names):
        return [names.index(name) for name in wanted]
    return list(range(len(header)))


def _text(cell: object) -> str:
    return str(cell).strip().lower()

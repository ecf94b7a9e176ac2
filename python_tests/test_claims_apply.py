"""The planted faults (scripts/claims.py) fit the tree: nothing is broken here, `scripts/check_claims.py` does that."""

import ast
import runpy
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = runpy.run_path(str(ROOT / "scripts" / "claims.py"), run_name="claims")
FAULTS, ROWS, ELSEWHERE = CLAIMS["FAULTS"], CLAIMS["ROWS"], CLAIMS["ELSEWHERE"]


@cache
def functions(path):
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_text_of_every_fault_is_there_once():
    wrong = {f.name: CLAIMS["one_place"](ROOT, edit) for f in FAULTS for edit in f.edits}
    assert {name: why for name, why in wrong.items() if why} == {}


def test_every_fault_breaks_something_that_is_made_anew():
    for f in FAULTS:
        native = any(e.file.startswith(("csrc/", "CMakeLists")) for e in f.edits)
        assert f.build == ("cmake" if f.options else "native" if native else "python"), f.name
        assert bool(f.edits) != bool(f.options) and all(e.old != e.new for e in f.edits), f.name
    names = [f.name for f in FAULTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_the_tests_of_a_fault_exist(fault):
    for test in fault.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file(), test
        assert not name or name.partition("[")[0] in functions(path), test


def test_every_claim_that_is_called_tested_has_a_fault():
    rows, tested = CLAIMS["table_rows"](ROOT), CLAIMS["tested_rows"](ROOT)
    row_of = {}
    for key, words in ROWS.items():
        found = [claim for claim in rows if words in claim]
        assert len(found) == 1, f"{key}: one row of the table of claims must hold {words!r}, got {found}"
        row_of[key] = found[0]
    broken = {row_of[f.claim] for f in FAULTS if f.claim in ROWS}
    assert [claim for claim in tested if claim not in broken] == []


def test_every_fault_is_of_a_claim_that_is_made():
    assert {f.claim for f in FAULTS} == {*ROWS, *ELSEWHERE} and not set(ROWS) & set(ELSEWHERE)
    for claim, (page, words) in ELSEWHERE.items():
        assert words in " ".join((ROOT / page).read_text().split()), f"{claim}: {page} no longer says {words!r}"


def test_the_page_of_faults_is_of_these_faults():
    page = (ROOT / "docs" / "claims.md").read_text()
    assert [f.name for f in FAULTS if f"| {f.name} | {f.says} |" not in page] == []

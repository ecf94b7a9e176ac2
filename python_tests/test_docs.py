"""Documentation is executed: docstrings follow signatures, README's Python runs, files that it names exist."""

import inspect
import json
import re
import runpy
from pathlib import Path

import pytest

from grpo_engine import ops
from grpo_engine.micro import facts, ladder
from grpo_engine.study.design import load_study

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
SECTIONS = ("Args:", "Returns:", "Raises:", "Source:")


@pytest.mark.parametrize("name", ops.__all__)
def test_an_ops_docstring_states_the_contract(name):
    fn = getattr(ops, name)
    doc = inspect.getdoc(fn)
    assert [s for s in SECTIONS if s not in doc] == []
    body = doc.split("Args:")[1].split("Returns:")[0]
    assert re.findall(r"^    (\w+):", body, re.M) == list(inspect.signature(fn).parameters)


def test_readme_has_python_to_run():
    assert BLOCKS


@pytest.mark.parametrize("n", range(len(BLOCKS)))
def test_readme_example_runs(n, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[n], f"README.md[{n}]", "exec"), {})


def test_files_that_the_documents_link_to_exist():
    missing = []
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
    for page in [*pages, *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert missing == []


def test_the_calibration_page_and_the_presets_follow_its_records():
    script = runpy.run_path(str(ROOT / "scripts" / "calibrate_micro.py"))
    data = json.loads((ROOT / "scripts" / "calibrate_micro.json").read_text())
    assert script["page"](data) == (ROOT / "docs" / "calibration.md").read_text()
    rates = script["chosen_rates"](data["sweep"])
    for preset in ("micro", "smoke"):
        assert {s: rates[s] for s in load_study(preset).sizes} == {
            s: entry.run["optimizer.lr"] for s, entry in load_study(preset).sizes.items()
        }
    assert (data["tasks"]["limit"], data["tasks"]["terms"]) == (facts.LIMIT, list(facts.TERMS))
    assert load_study("micro").run == data["run"]
    low, high = script["HEADROOM"]
    for b in data["bases"]:
        assert b["tokens"] == ladder.training_tokens(b["size"], b["kind"])
        assert b["kind"] != "base" or low <= b["greedy"] <= high

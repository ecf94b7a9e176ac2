"""Documentation is executed: docstrings follow signatures, README's Python runs, files that it names exist."""

import inspect
import re
from pathlib import Path

import pytest

from grpo_engine import ops

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
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert missing == []

"""The recipes of CONTRIBUTING, followed word for word: their files are written and their commands run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from grpo_engine.records import jsonl, records

RECIPES = {
    part.splitlines()[0]: part
    for part in re.split(r"^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)
    if part.startswith(("Adding an advantage", "Adding a loss"))
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_works_as_it_is_written(name, tmp_path):
    python, bash = (re.findall(rf"^```{language}\n(.*?)^```", RECIPES[name], re.S | re.M) for language in ("python", "bash"))
    assert len(python) == len(bash) == 1
    file = re.match(r"# (\w+\.py)\n", python[0])[1]
    (tmp_path / file).write_text(python[0])
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = subprocess.run(["bash", "-ec", bash[0]], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    steps = jsonl.read_jsonl(tmp_path / "runs/own" / records.STEPS_FILE).records
    assert len(steps) == 5 and any(s["grad_norm"] > 0 for s in steps)


def test_both_recipes_are_there():
    assert len(RECIPES) == 2


def test_the_row_of_a_family_is_the_one_in_the_code():
    recipe = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a model family")[1]
    row = re.search(r"^```python\n(.*?)\n^```", recipe, re.S | re.M)[1]
    assert row in (ROOT / "grpo_engine" / "model" / "config.py").read_text()

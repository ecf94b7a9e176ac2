"""Output for consoles without UTF-8."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

CODE = """
from rich.console import Console
from rich.table import Table
from grpo_engine.system.console import allow_any_text
allow_any_text()
table = Table("law", title="L\\u2212x")
table.add_row("\\u22120.5 \\u00b1 0.1 \\u03b1 caf\\u00e9")
Console(markup=False).print(table)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_table_with_a_minus_sign_is_printed_whatever_the_encoding(encoding):
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, env=env, cwd=ROOT, check=True).stdout
    text = out.decode(encoding)
    assert "-0.5" in text and "L-x" in text and ("caf" + "e" * (encoding == "ascii")) in text

"""Rules of the tree that a reader may rely on."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from grpo_engine import _C, ops

ROOT = Path(__file__).resolve().parents[1]
OPS = ROOT / "csrc" / "ops"


# a layer is one op over packed sequences and over pages
PUBLIC = {name.removesuffix("_paged") for name in ops.__all__}


def names(pattern, suffix):
    return {p.name.removesuffix(suffix) for p in OPS.glob(pattern)}


def test_every_op_has_a_contract_a_test_and_a_public_function():
    torch_sides = {p.stem for p in OPS.glob("*.cpp") if p.with_suffix(".h").exists()}
    assert torch_sides == PUBLIC
    for op in sorted(torch_sides):
        assert (ROOT / "python_tests" / "ops" / f"test_{op}.py").exists(), op


def test_every_op_has_a_cuda_half():
    assert names("*_cuda.cu", "_cuda.cu") | names("*_cuda.cpp", "_cuda.cpp") == PUBLIC


def test_kernels_and_contracts_include_no_torch_header():
    # they are compiled by nvcc and by the C++ tests, and once per instruction set; x_call.h is for Torch sides only
    bad = []
    kernels = [p for pattern in ("*.h", "*.cuh", "*_cpu.cpp", "*.cu") for p in OPS.glob(pattern) if "_call" not in p.stem]
    for path in [*kernels, *(ROOT / "csrc/rollout").glob("*")]:
        bad += [path.name for line in path.read_text().splitlines() if re.match(r"#include <(torch|ATen|c10)/", line)]
    assert bad == []


def test_kernel_bits_runs_every_kernel_and_its_hashes_are_kept():
    declared = set()
    for path in (ROOT / "csrc").rglob("*.h"):
        if path.name != "cpu_dispatch.h":  # defines the macros
            declared |= set(re.findall(r"^GE_CPU_(?:MATMUL_)?KERNEL\((\w+),", path.read_text(), re.M))
    run = re.findall(r"^ +GE_RUN\(report, (\w+),", (ROOT / "csrc/tests/kernel_bits.cpp").read_text(), re.M)
    kept = [line.split()[0] for line in (ROOT / "csrc/tests/kernel_bits.txt").read_text().splitlines() if line[0] != "#"]
    assert len(declared) >= 20
    assert sorted(declared - set(run)) == [] and sorted(declared - set(kept)) == []
    assert sorted(set(run) | set(kept)) == sorted(declared)


def test_no_two_classes_have_one_name():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "grpo_engine").rglob("*.py")]
    found = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert len(found) > 100 and [name for name, count in found.items() if count > 1] == []


def test_torch_extension_h_is_never_included():
    assert [p for p in (ROOT / "csrc").rglob("*") if p.is_file() and "torch/extension.h" in p.read_text()] == []


def test_ops_import_needs_torch_and_nothing_else():
    code = (
        "import sys, grpo_engine.ops; "
        "print([m for m in ('pydantic','yaml','typer','rich','pyarrow','scipy','matplotlib','plotly','transformers',"
        "'safetensors','math_verify','pebble') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_the_extension_names_the_instruction_sets():
    assert _C.cpu_isa() in _C.cpu_isas() and "generic" in _C.cpu_isas()


def test_a_wrong_instruction_set_is_an_error():
    code = "from grpo_engine import _C; _C.cpu_isa()"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"GRPO_ENGINE_ISA": "sse9", "PATH": ""}, capture_output=True, text=True, cwd=ROOT
    )
    assert "GRPO_ENGINE_ISA must be one of generic, avx2, avx512, avx512_bf16, neon, got sse9" in result.stderr


def test_the_ops_extension_knows_nothing_of_the_embedded_study():
    code = "import sys; from grpo_engine import _C, ops; print([m for m in sys.modules if '.micro' in m], *dir(_C))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.startswith("[] ") and "Micro" not in out.stdout and "Domain" not in out.stdout


def _without_encoding(*paths):
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--preview", "--select", "PLW1514", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_text_files_are_read_and_written_as_utf8(tmp_path):
    found = _without_encoding("grpo_engine", "scripts", "benchmarks", "examples")
    assert found.returncode == 0, found.stdout
    (tmp_path / "planted.py").write_text("from pathlib import Path\nPath('a').write_text('b')\n")
    assert "without explicit `encoding`" in _without_encoding(tmp_path / "planted.py").stdout
    calls = [  # what the linter cannot see: methods of paths that it does not know as such
        f"{path.relative_to(ROOT)}: {call}"
        for folder in ("grpo_engine", "scripts", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        for call in re.findall(r"\.(?:read_text\(\)|open\(\"[wa]\"\))", path.read_text())
    ]
    assert calls == []

"""The layers of the package: `docs/internals.md` says which folder may import which, and the imports keep to it."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "grpo_engine"
# Files whose imports inside functions keep torch out of a process until it is wanted, and why.
LATE = {
    "cli.py": "`grpo-engine --help` and plans answer without torch",
    "study/job.py": "a started process sets the environment before torch is imported",
    "study/jobs.py": "a study's own process does without torch",
    "study/executors.py": "torch is imported in the fork server beside it",
    "system/device.py": "the extension is loaded only where a run computes",
    "rewards/pool.py": "the sandbox is imported only where programs are scored",
}


def layers(text: str) -> dict[str, set[str]]:
    """Folder -> what it may import, in the order of the table: each line only those above it."""
    table = re.search(r"^\| layer \| holds \| imports \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)[1]
    found = {}
    for line in table.splitlines():
        layer, _, imports = (cell.strip() for cell in line.strip("|").split("|"))
        found[layer.strip("`")] = {name.strip("` ") for name in imports.split(",")} - {""}
    return found


def layer_of(module: str, known) -> str:
    parts = module.split(".")[1:]
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in known:
            return ".".join(parts[:n])
    return ".".join(parts)


def module_of(path: Path, root: Path) -> str:
    return str(path.relative_to(root.parent))[:-3].replace("/", ".").removesuffix(".__init__")


def arrows(package: Path, known) -> list[tuple[str, str, str]]:
    """(file, its layer, the layer that it imports) of each import."""
    found = []
    for path in sorted(package.rglob("*.py")):
        here = layer_of(module_of(path, package), known)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                targets = [f"{node.module}.{a.name}" for a in node.names]
            else:
                continue
            for target in targets:
                if target.split(".")[0] == "grpo_engine":
                    found.append((str(path.relative_to(package)), here, layer_of(target, known)))
    return found


def circle(package: Path) -> list[str]:
    """The modules that import each other in a circle, and those that wait for them; [] where there is none."""
    paths = {module_of(path, package): path for path in package.rglob("*.py")}
    left = {}
    for module, path in paths.items():
        targets = set()
        typed = _typing_only(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.lineno not in typed:
                full = {f"{node.module}.{a.name}" for a in node.names}
                targets |= (full & paths.keys()) or ({node.module} & paths.keys())
            elif isinstance(node, ast.Import):
                targets |= {a.name for a in node.names} & paths.keys()
        left[module] = targets - {module}
    while free := [m for m, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def _typing_only(path: Path) -> set[int]:
    """Lines of imports under `if TYPE_CHECKING`, which never run."""
    tree = ast.parse(path.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    return {m.lineno for block in blocks for m in ast.walk(block) if isinstance(m, ast.ImportFrom)}


def wrong(package: Path, table: dict[str, set[str]]) -> list[str]:
    out = []
    for file, here, there in arrows(package, table):
        if here not in table:
            out.append(f"{file}: {here} is in no row of the table")
        elif there != here and there not in table[here]:
            out.append(f"{file}: {here} imports {there}")
    for path in sorted(package.rglob("*.py")):
        file, typed = str(path.relative_to(package)), _typing_only(path)
        for node in ast.walk(ast.parse(path.read_text())):
            own = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "grpo_engine"
            if own and node.col_offset and node.lineno not in typed and file not in LATE:
                out.append(f"{file}:{node.lineno}: an import inside a function")
    return out


TABLE = layers((ROOT / "docs" / "internals.md").read_text())


def test_a_layer_imports_only_what_stands_above_it():
    order = list(TABLE)
    for i, layer in enumerate(order):
        assert TABLE[layer] <= set(order[:i]), layer  # so there is no cycle


def test_no_modules_import_each_other_in_a_circle():
    assert circle(PACKAGE) == []


def test_a_planted_circle_is_found(tmp_path):
    package = tmp_path / "grpo_engine"
    package.mkdir()
    for name, code in {
        "a": "from grpo_engine.b import f",
        "b": "def f():\n    from grpo_engine import c",
        "c": "import grpo_engine.a",
        "d": "from grpo_engine import e",
        "e": "",
    }.items():
        (package / f"{name}.py").write_text(code + "\n")
    assert circle(package) == ["grpo_engine.a", "grpo_engine.b", "grpo_engine.c"]


def test_the_imports_keep_to_the_table():
    assert wrong(PACKAGE, TABLE) == []


def test_the_table_allows_no_more_than_there_is():
    used = {(here, there) for _, here, there in arrows(PACKAGE, TABLE) if here != there}
    assert {(layer, name) for layer, names in TABLE.items() for name in names} == used


def test_every_file_that_imports_late_is_there():
    assert [file for file in LATE if not (PACKAGE / file).exists()] == []


@pytest.mark.parametrize(
    "code,says",
    [
        ("from grpo_engine.study.design import plan\n", "records/planted.py: records imports study"),
        ("import grpo_engine.train.step\n", "records/planted.py: records imports train"),
        ("def f():\n    from grpo_engine.types import Problem\n", "records/planted.py:2: an import inside a function"),
    ],
)
def test_a_planted_import_is_found(code, says, tmp_path):
    package = tmp_path / "grpo_engine"
    (package / "records").mkdir(parents=True)
    (package / "records" / "planted.py").write_text(code)
    assert says in wrong(package, TABLE)


def test_plans_need_no_torch():
    code = """
        import sys
        import grpo_engine.study.design, grpo_engine.study.forecast, grpo_engine.study.plan_view, grpo_engine.study.recommend
        import grpo_engine.model.hub, grpo_engine.micro.ladder, grpo_engine.records.table
        sys.exit("torch" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)

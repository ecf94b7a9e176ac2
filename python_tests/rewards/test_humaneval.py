"""HumanEval's own tests against solutions, what a change of each is worth, and programs that mean harm.

A sample by default; GRPO_ENGINE_LONG_TESTS=1 runs every solution (two minutes).
"""

import ast
import copy
import os
import socket
import tempfile
import time
from pathlib import Path

import humaneval_solutions
import pytest

from grpo_engine.rewards import code
from grpo_engine.tasks.files import read_problems

SOURCE = Path(humaneval_solutions.__file__).read_text()
HELPERS = {"find_zero": ["poly"], "decode_cyclic": ["encode_cyclic"], "decode_shift": ["encode_shift"]}
IMPORTS = "\n".join(line for line in SOURCE.splitlines() if line.startswith(("import", "from")))
FUNCTIONS = {node.name: node for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef)}
NAMES = [name for name in FUNCTIONS if name not in sum(HELPERS.values(), [])]
LONG = os.environ.get("GRPO_ENGINE_LONG_TESTS") == "1"
SAMPLE = NAMES if LONG else ["separate_paren_groups", "find_zero", "decode_shift", "sum_product", "string_to_md5"]

OPPOSITE = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.Add: ast.Sub, ast.Sub: ast.Add}  # fmt: skip


@pytest.fixture(scope="module")
def problems(real_data):
    found = {}
    for p in read_problems(real_data / "guru_verl/online_eval/codegen__humaneval_164.parquet"):
        found.setdefault(code.functional_tests(p.answer).rpartition("check(")[2].split(")")[0], []).append(p)
    return found


def response(*functions):
    return f"```python\n{IMPORTS}\n" + "\n".join(map(ast.unparse, functions)) + "\n```"


def mutants(function):
    """One operator turned into its opposite, or one integer raised by one, at each place in turn."""
    for i, node in enumerate(ast.walk(function)):
        mutant = copy.deepcopy(function)
        twin = list(ast.walk(mutant))[i]
        if isinstance(node, ast.Compare) and type(node.ops[0]) in OPPOSITE:
            twin.ops[0] = OPPOSITE[type(node.ops[0])]()
        elif isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE:
            twin.op = OPPOSITE[type(node.op)]()
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            twin.value += 1
        elif isinstance(node, ast.Return):
            twin.value = ast.Constant(None)
        else:
            continue
        yield ast.unparse(mutant), mutant


def test_there_are_sixty_solutions(problems):
    assert len(NAMES) >= 60 and set(NAMES) <= set(problems)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_solution_is_right_and_a_change_of_it_is_wrong(problems, name):
    helpers = [FUNCTIONS[h] for h in HELPERS.get(name, [])]
    scores = [code.score(response(FUNCTIONS[name], *helpers), p) for p in problems[name]]
    assert max(scores) == 1  # a name may stand for two problems
    problem = problems[name][scores.index(1.0)]
    kept = []
    for text, mutant in mutants(FUNCTIONS[name]):
        if code.score(response(mutant, *helpers), problem) == 0:
            return
        kept.append(text)  # an equal program, or one that the tests do not tell apart
    pytest.fail(f"no change is wrong: {kept}")


HOSTILE = {
    "forks": "import os\nwhile True: os.fork()",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "loop": "while True: pass",
    "loop in a call": "def f(x):\n    while True: pass",
    "sleep": "import time\ntime.sleep(10**6)",
    "ten gigabytes": "x = bytearray(10 << 30)\ndef f(x): return x + 1",
    "a large value": "def f(x): return 'a' * (1 << 28)",
    "a full disk": "open('x', 'wb').write(bytes(64 << 20))\ndef f(x): return x + 1",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\ndef f(x): return x + 1",
    "the user's files": "text = open('FILE').read()\ndef f(x): return x + 1",
    "the user's folders": "import os\nnames = os.listdir('FOLDER')\ndef f(x): return x + 1",
    "write outside": "open('FILE', 'w').write('mine')\ndef f(x): return x + 1",
    "other processes": "names = open('/proc/PID/cmdline').read()\ndef f(x): return x + 1",
    "kill the caller": "import os\nos.kill(PID, 9)\ndef f(x): return x + 1",
    "kill the judge": "import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\ndef f(x): return None",
    "the judge's memory": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)\ndef f(x): return x + 1",
    "leave": "import os\nos._exit(0)",
    "leave in a call": "import os\ndef f(x): os._exit(0)",
    "print success": "print('passed', flush=True)\nraise SystemExit(0)",
    "equal to everything": "class E:\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "a number equal to everything": "class E(int):\n    def __eq__(s, o): return True\ndef f(x): return E(0)",
    "patched builtins": "import builtins\nbuiltins.AssertionError = builtins.compile = None\nbuiltins.exec = print",
    "names of builtins": "def range(*a): return []\ndef abs(x): return 0\ndef f(x): return 0",
    "the caller's frames": "import sys, os\nf = sys._getframe()\nwhile f: print(f.f_locals); f = f.f_back\n"
    "for n in range(3, 64):\n    try: os.write(n, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
    "every pipe": "import os\nfor n in range(3, 64):\n    try: os.write(n, b'[2]\\n' * 99)\n    except OSError: pass\n"
    "def f(x): return 0",
    "a debugger": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0\ndef f(x): return x + 1",
}
TESTS = "for x in range(4):\n    assert f(x) == x + 1 and abs(-2) == 2"


def test_a_harmless_program_passes():
    assert code.passes("def f(x): return x + 1", tests=TESTS) is True


@pytest.mark.parametrize("deed", HOSTILE)
def test_a_hostile_program_is_worth_nothing_and_leaves_no_trace(deed, tmp_path, monkeypatch):
    if missing := code.missing_protections():
        pytest.skip(f"this kernel grants no protection of {missing}")
    monkeypatch.setattr(code, "WALL_S", 1.5)
    monkeypatch.setattr(code, "CPU_S", 1)
    file = tmp_path / "mine.txt"
    file.write_text("kept")
    for path, mode in ((file, 0o666), (tmp_path, 0o777)):
        os.chmod(path, mode)
    before = set(Path(tempfile.gettempdir()).glob("grpo_engine-*")), _processes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"PORT": str(server.getsockname()[1]), "FILE": str(file), "FOLDER": str(tmp_path), "PID": str(os.getpid())}
        program = HOSTILE[deed]
        for name, value in names.items():
            program = program.replace(name, value)
        assert code.passes(program, tests=TESTS) is False
    assert file.read_text() == "kept" and os.listdir(tmp_path) == ["mine.txt"]
    deadline = time.monotonic() + 5  # the kernel takes a moment to end a namespace
    while time.monotonic() < deadline and not _processes() <= before[1]:
        time.sleep(0.02)
    assert set(Path(tempfile.gettempdir()).glob("grpo_engine-*")) <= before[0] and _processes() <= before[1]


def _processes():
    """Sandboxes of this process that are alive."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"sandbox.py\0" + str(os.getpid()).encode() + b"\0" in path.read_bytes():
                found.add(path.parent.name)
        except OSError:
            pass
    return found

"""Programs in a sandbox."""

import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import humaneval_solutions
import pytest
from scoring import problem

from grpo_engine.rewards import code
from grpo_engine.rewards.pool import RewardPool
from grpo_engine.tasks.files import read_problems

TESTS = json.dumps({"functional": "assert add(2, 3) == 5\nassert add(-1, 1) == 0\n"})
RIGHT = "def add(a, b):\n    return a + b\n"

SOLUTIONS = {
    "has_close_elements": """
from typing import List
def has_close_elements(numbers: List[float], threshold: float) -> bool:
    ordered = sorted(numbers)
    return any(b - a < threshold for a, b in zip(ordered, ordered[1:]))
""",
    "separate_paren_groups": inspect.getsource(humaneval_solutions.separate_paren_groups),
    "truncate_number": "def truncate_number(number: float) -> float:\n    return number % 1.0\n",
    "sort_numbers": """
def sort_numbers(numbers: str) -> str:
    order = "zero one two three four five six seven eight nine".split()
    return " ".join(sorted(numbers.split(), key=order.index))
""",
}


def fenced(program, mark="python"):
    return f"Here it is:\n```{mark}\n{program}```\nDone."


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = set(Path(tempfile.gettempdir()).glob("grpo_engine-*"))
    yield
    assert set(Path(tempfile.gettempdir()).glob("grpo_engine-*")) <= before


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(code, "WALL_S", 2.0)
    monkeypatch.setattr(code, "CPU_S", 1)


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n```\nand\n```Python\nb\n```", "a\n\nb\n"),
        ("```python\na\n```\nwhich prints\n```\n3\n```", "a\n"),
        ("```bash\nls\n```", None),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("<think>```python\na\n```</think>```python\nb\n```", "b\n"),
        ("```python\na", None),
        ("def f(): pass", None),
        ("```" * 100_000, None),
        ("", None),
    ],
)
def test_the_program_of_a_response(response, program):
    assert code.program_text(response) == program


@pytest.mark.parametrize(
    ("response", "value"),
    [
        (fenced(RIGHT), 1),
        (fenced(RIGHT, mark=""), 1),
        (fenced("from __future__ import annotations\n" + RIGHT), 1),
        (fenced(RIGHT + "if __name__ == '__main__':\n    input()\n"), 1),
        (fenced("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\n" + RIGHT), 1),
        (fenced("open('mine.txt', 'w').write('x')\n" + RIGHT), 1),
        (fenced("def add(a, b):\n    return a - b\n"), 0),
        (fenced("def add(a, b)\n"), 0),
        (fenced("raise ValueError\n" + RIGHT), 0),
        (RIGHT, 0),
        (fenced("#" * code.MAX_PROGRAM_CHARS + "\n" + RIGHT), 0),
        ("", 0),
    ],
)
def test_the_tests_decide(response, value):
    assert code.score(response, problem(TESTS)) == value


def test_a_prefix_goes_before_the_program():
    response = fenced("def add(a, b):\n    return plus(a, b)\n")
    assert code.score(response, problem(TESTS, prefix="from operator import add as plus")) == 1
    assert code.score(response, problem(TESTS, prefix="")) == 0


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "print('passed')\nraise SystemExit",
        "import ctypes\nctypes.string_at(0)",
        "import os, signal\nsignal.raise_signal(signal.SIGSEGV)\nos.abort()",
        "def f(n):\n    return f(n + 1)\nf(0)",
        "x = [0] * 10**10",
        "open('big', 'wb').write(bytes(1 << 26))",
        "\0",
        "x = " + "(" * 5000,
    ],
)
def test_a_program_that_leaves_or_breaks_early_has_not_passed(program):
    start = time.monotonic()
    assert code.passes(program, tests="pass") is False
    assert time.monotonic() - start < code.WALL_S


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time; time.sleep(100)", "while True: print('a' * 10**6)", "input()\nwhile True: pass"],
)
def test_a_program_without_end_is_ended(quick, program):
    start = time.monotonic()
    assert code.passes(program, tests="pass") is False
    assert time.monotonic() - start < 10


def test_children_end_with_the_program(quick):
    name = f"5{os.getpid()}"  # seconds, and how the process is found
    assert code.passes(f"import subprocess\nsubprocess.Popen(['sleep', '{name}'], start_new_session=True)", tests="pass")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (alive := _sleepers(name)):
        time.sleep(0.05)
    if "processes" not in code.missing_protections():
        assert alive == []


def _sleepers(name):
    lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if os.access(p, os.R_OK)]
    return [line for line in lines if line.startswith(b"sleep\0" + name.encode())]


def test_forks_without_end_are_limited(quick):
    program = """
import os
made = 0
try:
    while made < 1000:
        if os.fork() == 0:
            import time
            time.sleep(100)
        made += 1
except OSError:
    pass
"""
    if "processes" in code.missing_protections():
        pytest.skip("no process namespaces here: the limit counts all of the user's processes")
    assert code.passes(program, tests="assert made < 100") is True


def test_nothing_of_the_callers_environment_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert code.passes("import os\nseen = 'SECRET_TOKEN' in os.environ", tests="assert not seen") is True


OUTSIDE = {
    "connect": ("network", "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"),
    "signal": ("processes", "import os\nos.kill({caller}, 0)"),
    "write": ("files", "open({file!r}, 'w').write('overwritten')"),
    "remove": ("files", "import os\nos.remove({file!r})"),
    "rename": ("files", "import os\nos.rename({file!r}, 'mine')"),
    "truncate": ("files", "import os\nos.truncate({file!r}, 0)"),
    "mkdir": ("files", "import os\nos.mkdir({file!r} + '-folder')"),
}


@pytest.mark.parametrize("deed", OUTSIDE)
def test_the_outside_is_out_of_reach(tmp_path, deed):
    protection, program = OUTSIDE[deed]
    if protection in code.missing_protections():
        pytest.skip(f"this kernel grants no protection of {protection}")
    file = tmp_path / "mine.txt"
    file.write_text("kept")
    os.chmod(tmp_path, 0o777)
    os.chmod(file, 0o666)
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = program.format(caller=os.getpid(), file=str(file), port=server.getsockname()[1])
        assert code.passes(program, tests="pass") is False
    assert file.read_text() == "kept" and os.listdir(tmp_path) == ["mine.txt"]


def test_what_the_kernel_grants_is_in_force():
    """Where a protection is missing other tests are skipped: here the kernel is asked, and not the sandbox."""
    program = """
import ctypes, os
libc = ctypes.CDLL(None)
if os.getuid() == 0:  # the sandbox gives root up first
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
user_ipc_processes_network = 0x10000000 | 0x08000000 | 0x20000000 | 0x40000000
spaces = libc.unshare(user_ipc_processes_network) == 0
landlock = libc.syscall(444, None, ctypes.c_size_t(0), 1) >= 1
print(*["network", "processes"] * spaces, *["files"] * landlock)
"""
    granted = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert [name for name in code.missing_protections() if name in granted] == []


def test_sets_have_the_same_order_every_time():
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    wanted = int(subprocess.check_output([sys.executable, "-c", "print(hash('a'))"], env=environment))
    assert code.passes("", tests=f"assert hash('a') == {wanted}") is True


@pytest.mark.parametrize("gold", ["", "{}", "not json", '{"functional": 1}', '{"functional": " "}', "[]"])
def test_a_true_answer_without_tests_is_refused(gold):
    with pytest.raises(ValueError, match="functional"):
        code.score(fenced(RIGHT), problem(gold))


def test_real_problems_through_the_pool(real_data):
    problems = read_problems(real_data / "guru_verl/online_eval/codegen__humaneval_164.parquet")
    assert len(problems) == 164
    chosen = {name: next(p for p in problems if f"check({name})" in p.answer) for name in SOLUTIONS}
    empty = "def {}(*args):\n    return None\n"
    responses = [fenced(s) for s in SOLUTIONS.values()] + [fenced(empty.format(name)) for name in SOLUTIONS]
    with RewardPool(workers=2, timeout_s=30.0, unprotected=True) as pool:
        scored = pool.score(responses, [*chosen.values()] * 2)
    assert [(r.value, r.status) for r in scored] == [(1, "ok")] * 4 + [(0, "ok")] * 4


def test_a_pool_refuses_programs_where_a_protection_is_missing(monkeypatch):
    monkeypatch.setattr(code, "missing_protections", lambda: ("network",))
    p = type(problem(""))(uid="t", prompt="", answer=TESTS, domain="code", reward="code")
    with RewardPool(workers=1, timeout_s=5.0) as pool, pytest.raises(RuntimeError, match="network.*reward.unprotected"):
        pool.score([fenced(RIGHT)], [p])


def test_a_killed_worker_takes_its_program_along(monkeypatch):
    name = f"6{os.getpid()}"
    response = fenced(f"import subprocess, time\nsubprocess.Popen(['sleep', '{name}'])\ntime.sleep(100)\n")
    p = type(problem(""))(uid="t", prompt="", answer=TESTS, domain="code", reward="code")
    with RewardPool(workers=1, timeout_s=1.5, unprotected=True) as pool:  # below the sandbox's own limit
        (reward,) = pool.score([response], [p])
    assert (reward.value, reward.status) == (0, "timeout")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (alive := _sleepers(name)):
        time.sleep(0.05)
    assert alive == []

"""Scorer of programs: a response's Python code against HumanEval's tests, in a sandbox (`sandbox.py`)."""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from grpo_engine.rewards import Question
from grpo_engine.rewards.extract import after_thinking

WALL_S = 8.0  # of one program, its start included; below the pool's default limit, so that a slow program is
CPU_S = 5  # an ordinary wrong answer and no failure of the verifier
MEMORY_BYTES = 2 << 30
FILE_BYTES = 16 << 20
MAX_PROGRAM_CHARS = 100_000

SANDBOX = Path(__file__).with_name("sandbox.py")
# Not `python sandbox.py`: that puts this folder, with its math.py and code.py, at the head of the import path.
_START = "import runpy, sys; sys.path.pop(0); sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
_FENCE = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def program_text(response: str) -> str | None:
    """The program in a response.

    Args:
        response: decoded answer; what precedes "</think>" is ignored.

    Returns:
        The closed fenced blocks joined by a line break: those marked as Python if there are any, otherwise those
        without a mark. None if there is neither: code outside of a fence does not count, as in the paper.
    """
    blocks = [(mark.strip().lower(), code) for mark, code in _FENCE.findall(after_thinking(response))]
    for marks in (("python", "py", "python3"), ("",)):
        chosen = [code for mark, code in blocks if mark in marks]
        if chosen:
            return "\n".join(chosen)
    return None


def score(response: str, problem: Question) -> float:
    """1.0 when the response's program passes the problem's tests within the limits.

    Limits: `CPU_S` CPU seconds and `WALL_S` seconds in all, `MEMORY_BYTES` of memory, files up to `FILE_BYTES`. The
    result can depend on the machine only near a limit.

    Args:
        response: decoded answer.
        problem: its answer is JSON, {"functional": Python source that raises unless the program is right}; a string
            info["prefix"], when there is one, goes before the program.

    Returns:
        0.0 or 1.0; 0.0 for a response without a program.

    Raises:
        ValueError: the problem's answer is no such JSON.
    """
    return score_program(program_text(response), problem)


def score_program(program: str | None, problem: Question) -> float:
    """`score` of a program that was found in a response; None is worth 0."""
    tests = functional_tests(problem.answer)
    if program is None or len(program) > MAX_PROGRAM_CHARS:
        return 0.0
    return float(passes(f"{problem.info.get('prefix') or ''}\n{program}", tests=tests))


def functional_tests(answer: str) -> str:
    """The tests in a problem's answer.

    Args:
        answer: JSON, {"functional": Python source}.

    Returns:
        The source.

    Raises:
        ValueError: anything else.
    """
    try:
        tests = json.loads(answer)["functional"]
    except (ValueError, KeyError, TypeError):
        tests = None
    if not isinstance(tests, str) or not tests.strip():
        raise ValueError(f"code: the answer must be JSON with the tests under 'functional', got {answer[:80]!r}")
    return tests


def passes(program: str, *, tests: str) -> bool:
    """Whether a program passes its tests, found out in the sandbox.

    Args:
        program: Python source.
        tests: Python source that calls its functions, from a process of its own (`sandbox.run_tests`).

    Returns:
        True when the tests ran to their end. A program that exits, crashes, prints without end or exceeds a limit
        has not passed; nothing of it is left behind.
    """
    # Leaving before the tests have run must not look like passing them, so the exit status decides nothing.
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="grpo_engine-", ignore_cleanup_errors=True) as folder:
        job = {"program": program, "tests": tests, "token": token}
        Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
        return _run(folder) == token.encode()


@functools.cache
def missing_protections() -> tuple[str, ...]:
    """What the sandbox cannot do on this machine, tried out once.

    Returns:
        Those of "network", "processes" and "files" (`sandbox.py` explains them) that the kernel refuses; () is best.

    Raises:
        RuntimeError: not even an empty program passes, so every score would be 0.
    """
    if not passes("", tests="pass"):
        raise RuntimeError(f"code: the sandbox cannot run an empty program here ({sys.executable} {SANDBOX})")
    # A program cannot report anything but pass or fail, so each protection is a program that passes if it is missing.
    folder = tempfile.gettempdir()
    probes = {
        "network": "import socket\nassert len(socket.if_nameindex()) > 1",
        "processes": "import os\nassert os.getppid() > 1",
        "files": f"import os, tempfile\nhandle, path = tempfile.mkstemp(dir={folder!r})\nos.unlink(path)",
    }
    return tuple(name for name, program in probes.items() if passes(program, tests="pass"))


def _run(folder: str) -> bytes:
    """What the sandbox reports; its processes have ended when this returns."""
    command = [sys.executable, "-s", "-B", "-c", _START, str(SANDBOX), str(os.getpid()), folder]
    command += [str(limit) for limit in (CPU_S, MEMORY_BYTES, FILE_BYTES)]
    # Nothing of the caller's environment, which may hold credentials; a fixed hash seed, so that sets have one order.
    environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    environment |= {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )
    assert process.stdout is not None  # a pipe was asked for
    try:
        # One write of a few bytes, or the end of the last process that could have written.
        ready, _, _ = select.select([process.stdout], [], [], WALL_S)
        return os.read(process.stdout.fileno(), 1024) if ready else b""
    finally:
        # The whole group, whether its leader has ended or not: a program may have left children behind. The leader
        # is not waited for until then, so its number cannot have passed to somebody else's group.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()

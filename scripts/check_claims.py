"""Breaks each promise on purpose and demands that a test notices: the faults are in claims.py.

    python scripts/check_claims.py --list
    python scripts/check_claims.py --python-only                # those that need no compiler
    python scripts/check_claims.py --only k3-sign late-warm-up
    python scripts/check_claims.py --keep --out docs/claims.md  # all, in a quarter of an hour on 2 cores

Works on a copy of the tree. First all tests run there unbroken; a fault whose tests do not pass then is an error. Then each
fault is applied, what it touches is compiled, its tests run in a process of their own, and the fault is taken back. A fault
is caught when a test fails. One that breaks the build, an import or the collection of tests is an error of the fault, and
so is one whose text the tree no longer has. A fault whose tests are skipped on this machine is not caught either. Exit code
1 unless every fault is caught.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from claims import ELSEWHERE, FAULTS, ROWS, Fault, one_place
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"_C": "grpo_engine", "_corpus": "grpo_engine/micro"}  # extension -> folder of its package
COPY = ROOT / "build" / "claims"
LIMIT_S = 600  # of the tests of one fault
# A process that has imported what is slow to import, and nothing of ours. For each line that it reads it forks. A child runs
# pytest on some files, of which a plugin keeps the tests that were asked for (a module that is skipped whole has none that
# could be named on the command line). The answer is pytest's exit code, or null where it did not end.
STARTER = """
import json, os, signal, sys, time
import numpy, pyarrow.parquet, pytest, scipy.optimize, scipy.stats, torch, transformers.models.qwen2.modeling_qwen2

class Only:
    def __init__(self, wanted):
        self.wanted = wanted

    def pytest_collection_modifyitems(self, config, items):
        asked = lambda name: any(name == w or name.startswith((w + "[", w + "::")) for w in self.wanted)
        items[:] = [i for i in items if asked(i.nodeid)]

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for to, at in ((null, 0), (log, 1), (log, 2)):
            os.dup2(to, at)
        code = pytest.main(job["arguments"], plugins=[Only(job["tests"])])
        sys.stdout.flush()
        os._exit(int(code))
    end, status = time.monotonic() + job["limit"], None
    while status is None and time.monotonic() < end:
        done, found = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(found) if done else None
        time.sleep(0.05)
    try:
        os.killpg(child, signal.SIGKILL)  # with what a failed test left behind
    except ProcessLookupError:
        pass
    if status is None:
        os.waitpid(child, 0)
    print(json.dumps(status), flush=True)
"""
# what a test fails with when the fault has broken the program and not the promise
BROKEN = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError", "UnboundLocalError",
          "AttributeError")  # fmt: skip
Verdict = Literal["yes", "NO", "skipped", "error", "not run"]
console = Console(stderr=True, width=140)


class FaultError(Exception):
    """A fault says nothing about the tests: it does not apply, or breaks more than the promise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one fault."""

    fault: Fault
    verdict: Verdict
    why: str  # what the test said, or what went wrong
    seconds: float  # compiling included


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One test of a run of pytest."""

    name: str  # python_tests/test_x.py::test_y[z]
    result: Literal["passed", "failed", "error", "skipped"]
    message: str

    def is_of(self, test: str) -> bool:
        """Whether pytest, asked for `test`, runs this one."""
        return self.name == test or self.name.startswith((f"{test}[", f"{test}::"))


class Copy:
    """A copy of the tree, which may be broken: its sources, its extension and its own build folder.

    Kernels are compiled once per instruction set, and a test runs those of one. So of a changed kernel only that copy is
    made anew: its source gets back its old time once it is compiled, and ninja lets the other copies be.
    """

    def __init__(self, folder: Path, *, native: bool) -> None:
        self.folder, self.build_folder = folder, folder / "build" / "native"
        self._times: dict[Path, int] = {}  # of files that were changed since the last build, before it
        self._sync()
        self.env = os.environ | {
            # what else is on the path comes behind the copy
            "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONPYCACHEPREFIX": str(folder / "build" / "pycache"),
            "GRPO_ENGINE_DATA": os.environ.get("GRPO_ENGINE_DATA", str(ROOT.parent / "shared" / "data")),
            "CCACHE_BASEDIR": str(folder),
            "CCACHE_NOHASHDIR": "1",
            # cmake and ninja of this environment first
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.env.pop("GRPO_ENGINE_EXTENSION", None)
        self._isa = ""
        if native:
            self.configure()
            self._ninja(*TARGETS)
            self._install()
        else:
            for target, package in TARGETS.items():
                built = [*(ROOT / package).glob(f"{target}.*so"), *(ROOT / "build" / "native").glob(f"{target}.*so")]
                if not built:
                    raise SystemExit(f"the extension {target} is not built: bash scripts/setup.sh")
                shutil.copy2(built[0], folder / package / built[0].name)
        code = "import torch, grpo_engine as g; from grpo_engine import _C; print(g.__path__[0], _C.__file__, _C.cpu_isa())"
        *places, self._isa = self._run([sys.executable, "-c", code]).split()
        if any(not Path(p).is_relative_to(folder) for p in places):
            raise SystemExit(f"the tests would run {' and '.join(places)} and not the copy in {folder}")
        self._starter = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            cwd=folder, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _sync(self) -> None:
        """Makes the copy's files those of the tree; one that is the same keeps its time, so that little is compiled."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        wanted = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [p for p in self.folder.rglob("*") if p.is_file()]:
            name = path.relative_to(self.folder).as_posix()
            if name not in wanted and not name.startswith("build/"):
                path.unlink()
        for name in wanted:
            content, to = (ROOT / name).read_bytes(), self.folder / name
            if not to.is_file() or to.read_bytes() != content:
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(content)

    def _run(self, command: Sequence[str]) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise FaultError(f"{' '.join(command)[:80]}: {(done.stdout + done.stderr)[-2000:]}")
        return done.stdout

    # ------------------------------------------------------------------ building

    def configure(self, *options: str) -> None:
        """Runs cmake."""
        launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
        self._run([
            "cmake", "-S", ".", "-B", str(self.build_folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
            "-DGRPO_ENGINE_OPENMP=ON", *launcher, *options,
        ])  # fmt: skip

    def _ninja(self, *arguments: str) -> str:
        return self._run(["ninja", "-C", str(self.build_folder), *arguments])

    def _install(self) -> None:
        for target, package in TARGETS.items():
            (built,) = self.build_folder.glob(f"{target}.*so")
            new = self.folder / package / f"{built.name}.new"
            shutil.copy2(built, new)
            os.replace(new, new.with_suffix(""))

    def build(self) -> None:
        """Compiles what was changed, of kernels the copy that runs here."""
        stale = re.findall(r"Building CXX object (\S+)", self._ninja("-n", *TARGETS))
        of = {name: re.match(r"CMakeFiles/kernels_(\w+)\.dir/", name) for name in stale}
        mine = [name for name, kernel in of.items() if kernel is None or kernel[1] == self._isa]
        if mine:
            self._ninja(*mine)
        for path, time_ns in self._times.items():
            os.utime(path, ns=(time_ns, time_ns))
        self._times.clear()
        self._ninja(*TARGETS)
        self._install()

    @contextlib.contextmanager
    def other_options(self, options: Sequence[str]) -> Iterator[None]:
        """Everything with other options of CMake, and afterwards as it was."""
        kept = self.build_folder.with_name("native.kept")
        shutil.copytree(self.build_folder, kept)  # with its times: what is put back need not be compiled
        try:
            self.configure(*options)
            self._ninja(*TARGETS)
            self._install()
            yield
        finally:
            shutil.rmtree(self.build_folder)
            kept.rename(self.build_folder)
            self._install()

    # ------------------------------------------------------------------ faults and tests

    @contextlib.contextmanager
    def broken(self, fault: Fault) -> Iterator[None]:
        """The copy's sources with a fault."""
        before = {e.file: (self.folder / e.file).read_text(encoding="utf-8") for e in fault.edits}
        after = dict(before)
        for edit in fault.edits:
            if wrong := one_place(self.folder, edit):
                raise FaultError(wrong)
            after[edit.file] = after[edit.file].replace(edit.old, edit.new)
        try:
            self._write(after)
            yield
        finally:
            self._write(before)

    def _write(self, texts: dict[str, str]) -> None:
        for name, text in texts.items():
            path = self.folder / name
            self._times.setdefault(path, path.stat().st_mtime_ns)
            path.write_text(text, encoding="utf-8")

    def test(self, tests: Sequence[str], *, to_the_end: bool) -> list[Case]:
        """Runs tests in a process of their own.

        Raises:
            FaultError: they could not be collected, or did not end.
        """
        with tempfile.TemporaryDirectory() as folder:
            report, log = Path(folder) / "report.xml", Path(folder) / "log.txt"
            files = sorted({test.partition("::")[0] for test in tests})
            arguments = ["-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
            arguments += [*([] if to_the_end else ["-x"]), *files]
            job = {"arguments": arguments, "tests": sorted(tests), "log": str(log), "limit": 1e9 if to_the_end else LIMIT_S}
            print(json.dumps(job), file=self._starter.stdin, flush=True)
            answer = self._starter.stdout.readline()
            if not answer:
                raise SystemExit(f"the process that starts tests has ended with {self._starter.wait()}")
            code = json.loads(answer)
            if code is None:
                raise FaultError(f"the tests did not end within {LIMIT_S} s")
            if code not in (0, 1, 5) or not report.is_file():  # 5: all that there was is skipped
                raise FaultError(f"pytest ended with {code}: {log.read_text(encoding='utf-8', errors='replace')[-1500:]}")
            return list(_cases(report))

    def close(self) -> None:
        """Ends the process that starts tests."""
        self._starter.stdin.close()
        self._starter.wait()


def _cases(report: Path) -> Iterator[Case]:
    for element in ET.parse(report).getroot().iter("testcase"):
        if element.get("file") is None:
            continue  # a module that was skipped
        name = f"{element.get('file')}::{element.get('name')}"
        result, message = "passed", ""
        for child, what in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            if (found := element.find(child)) is not None:
                result, message = what, found.get("message") or ""
                break
        yield Case(name=name, result=result, message=message)


# ------------------------------------------------------------------------------------------ the check


def judge(cases: Sequence[Case]) -> tuple[Verdict, str]:
    """The verdict over a fault by the tests that ran with it.

    Raises:
        FaultError: they failed for another reason than the promise.
    """
    failed = [c for c in cases if c.result == "failed"]
    if broken := [c for c in cases if c.result == "error"] or [c for c in failed if c.message.startswith(BROKEN)]:
        raise FaultError(f"{broken[0].name}: {broken[0].message[:300]}")
    if failed:
        return "yes", " ".join(failed[0].message.split())[:160]
    return "NO", "the tests pass"


def in_order(faults: Sequence[Fault]) -> list[Fault]:
    """Without a build first, then file by file so that little is compiled twice, then those of another configuration."""
    kinds = ["python", "native", "cmake"]
    return sorted(faults, key=lambda f: (kinds.index(f.build), [e.file for e in f.edits] if f.build == "native" else []))


def try_fault(copy: Copy, fault: Fault) -> Outcome:
    """Breaks the copy, runs the tests, and mends the sources again; what was compiled is mended by the next build."""
    start = time.monotonic()
    try:
        with copy.broken(fault), copy.other_options(fault.options) if fault.build == "cmake" else contextlib.nullcontext():
            if fault.build == "native":
                copy.build()
            verdict, why = judge(copy.test(fault.tests, to_the_end=False))
    except FaultError as error:
        verdict, why = "error", str(error)
    return Outcome(fault=fault, verdict=verdict, why=why, seconds=time.monotonic() - start)


def check(faults: Sequence[Fault], folder: Path) -> Iterator[Outcome]:
    """Tries faults one after another.

    Args:
        faults: in the order in which they are tried.
        folder: of the copy.

    Yields:
        What became of each.
    """
    start = time.monotonic()
    console.print(f"a copy of the tree in {folder}")
    copy = Copy(folder, native=any(f.build != "python" for f in faults))
    tests = sorted({test for f in faults for test in f.tests})
    console.print(f"built after {time.monotonic() - start:.0f} s; {len(tests)} tests of the unbroken copy")
    cases = copy.test(tests, to_the_end=True)
    counts = {what: sum(c.result == what for c in cases) for what in ("passed", "skipped", "failed", "error")}
    console.print(f"{', '.join(f'{n} {what}' for what, n in counts.items())}, after {time.monotonic() - start:.0f} s")
    for i, fault in enumerate(faults, start=1):
        mine = [c for c in cases if any(c.is_of(test) for test in fault.tests)]
        wrong = [f"{c.name} fails without the fault: {c.message}" for c in mine if c.result in ("failed", "error")]
        if wrong:
            outcome = Outcome(fault=fault, verdict="error", why=wrong[0], seconds=0.0)
        elif all(c.result == "skipped" for c in mine):
            why = mine[0].message if mine else "no such test ran"
            outcome = Outcome(fault=fault, verdict="skipped", why=why, seconds=0.0)
        else:
            outcome = try_fault(copy, fault)
        style = "green" if outcome.verdict == "yes" else "bold red"
        console.print(
            f"[{style}]{i}/{len(faults)} {fault.name}: {outcome.verdict}[/] {outcome.seconds:.0f} s", highlight=False
        )
        console.print(f"    {outcome.why[:600]}", style="dim", markup=False, highlight=False)
        yield outcome
    if any(f.build == "native" for f in faults):
        copy.build()  # as the tree is, for the next time
    copy.close()
    console.print(f"{time.monotonic() - start:.0f} s in all")


def words_of(claim: str) -> str:
    """The claim in words: of its row, or where else it is made."""
    return ROWS[claim] if claim in ROWS else f"{claim} ({ELSEWHERE[claim][0]})"


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as Markdown, by claim."""
    order = [*ROWS, *ELSEWHERE]
    lines = ["| claim | fault | what is broken | test | caught | seconds |", "|---|---|---|---|---|---|"]
    for o in sorted(outcomes, key=lambda o: order.index(o.fault.claim)):
        tests = "<br>".join(f"`{test.removeprefix('python_tests/')}`" for test in o.fault.tests)
        cells = [words_of(o.fault.claim), o.fault.name, o.fault.says, tests, o.verdict, f"{o.seconds:.0f}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def page(outcomes: Sequence[Outcome], seconds: float) -> str:
    """docs/claims.md: all faults, those that were not asked for as not run."""
    from grpo_engine import _C
    from grpo_engine.system import machine

    hardware, ran = machine.collect_hardware(), {o.fault.name for o in outcomes}
    rest = [Outcome(fault=f, verdict="not run", why="", seconds=0.0) for f in FAULTS if f.name not in ran]
    caught = sum(o.verdict == "yes" for o in outcomes)
    return (
        "# Planted faults\n\n"
        "A test that cannot fail proves nothing. `scripts/check_claims.py` breaks the sources on purpose, one promise at a\n"
        "time, and demands that a test fails. The faults are in [claims.py](../scripts/claims.py). A test checks in every\n"
        "run that each still fits the tree, and that every claim that is called tested has one. This page is written by\n"
        "`python scripts/check_claims.py --out docs/claims.md`.\n\n"
        f"Of {len(FAULTS)} faults {len(outcomes)} were tried and {caught} were caught. The run took {seconds / 60:.0f} "
        f"minutes on {hardware['cpu']},\n{os.cpu_count()} cores, instruction set {_C.cpu_isa()}. Seconds include "
        f"compiling.\n\n{table([*outcomes, *rest])}\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults")
    parser.add_argument("--python-only", action="store_true", help="faults that need no compiler")
    parser.add_argument("--list", action="store_true", help="say which faults there are, and stop")
    parser.add_argument("--keep", action="store_true", help="leave the copy in build/claims for the next time")
    parser.add_argument("--out", type=Path, help="write the page there")
    asked = parser.parse_args(argv)
    faults = in_order([f for f in FAULTS if not asked.python_only or f.build == "python"])
    if asked.only:
        if unknown := sorted(set(asked.only) - {f.name for f in faults}):
            parser.error(f"--only: no fault is called {', '.join(unknown)}")
        faults = [f for f in faults if f.name in asked.only]
    if asked.list:
        for f in faults:
            print(f"{f.name:32} {f.build:7} {f.says}")
        return 0
    start = time.monotonic()
    try:
        outcomes = list(check(faults, COPY))
    finally:
        if not asked.keep:
            shutil.rmtree(COPY, ignore_errors=True)
    if asked.out:
        asked.out.write_text(page(outcomes, time.monotonic() - start), encoding="utf-8")
    print(table(outcomes))
    missed = [f"{o.fault.name}: {o.verdict}" for o in outcomes if o.verdict != "yes"]
    if missed:
        console.print("not caught: " + "; ".join(missed), style="bold red")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Builds, tests, sanitizes and measures the CUDA half on a machine with a GPU; see gpu_check.sh and docs/gpu.md.

A stage that fails does not stop the next; the exit code is 1 if any failed, 2 if there is no CUDA device. Each stage has
a limit of its own, below ten minutes. Under --out, a folder of the GPU's name gets

    summary.json   what ran, when, how long, tests by file, errors of the sanitizer, missing packages; stages of earlier
                   calls are kept
    NAME.json, results.md   the benchmarks' records and tables
    STAGE.log      output

and gpu.md there says of each op what has run on which GPU. The standard library is all that this file needs.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the package need not be built or installed for this import
from grpo_engine.system.machine import collect_source  # noqa: E402

WORK = ROOT / "build" / "gpu_check"  # carried from one call to the next: wheels, the list of tests, their report
SITE, TESTS, REPORT = WORK / "site", WORK / "cuda_tests.json", WORK / "tests.xml"
SCHEMA = 1
SANITIZED_TESTS = 4  # of each op
COLLECT_S = 180
LEAST_S, CLOSE_S = 1.0, 10.0  # a stage is not begun with less; left for the summary
QUICK_TEST_S = 1.0  # the sanitizers run tens of times slower
SANITIZER_FOUND = 99  # its exit code
# import name: what goes without it
OPTIONAL = {
    "pydantic": "no tests of model, rollout and training, no rollout and step in the benchmarks",
    "pebble": "no training, and no step in the benchmarks",
    "math_verify": "no scoring of mathematical answers",
    "transformers": "no tests against it, and a peer less",
    "rich": "no benchmarks",
    "xdist": "tests one at a time",
    "pytest_timeout": "no limits of single tests",
    "flashinfer": "a peer less",
    "liger_kernel": "a peer less",
    "flash_attn": "a peer less",
}
DEVICE = """
import json, subprocess, torch
if not torch.cuda.is_available():
    raise SystemExit(3)
about = torch.cuda.get_device_properties(0)
print(json.dumps({"gpu": about.name, "capability": [about.major, about.minor], "memory_bytes": about.total_memory,
                  "torch": torch.__version__, "cuda": torch.version.cuda}))
"""
SMOKE = """
import torch
from grpo_engine import ops
names = sorted(n for n in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA") if n.startswith("grpo_engine::"))
assert names, "no op is registered for CUDA"
print("registered for CUDA:", *names)
x = torch.randn(33, 64, device="cuda")
got, want = ops.rms_norm(x, torch.ones(64, device="cuda"), eps=1e-6), x / x.double().pow(2).mean(1, True).sqrt()
assert (got - want).abs().max() < 1e-4, (got - want).abs().max()
print("rms_norm ran on", torch.cuda.get_device_name())
"""


# FlashInfer compiles a kernel when it is first called, for up to a minute: these at once, before anything is timed
FLASHINFER = """
import torch
from benchmarks import peers
torch.set_default_device("cuda")
def bf16(*shape): return torch.randn(*shape).bfloat16()
"""
FLASHINFER_KERNELS = (
    "for filters in ((None, None), (50, 0.9), (None, 0.9)): peers.flashinfer_sample(torch.randn(2, 1024), *filters)()",
    "peers.flashinfer_rms_norm(bf16(4, 896), bf16(896), 1e-6)()",
    "peers.flashinfer_swiglu(bf16(4, 256))()",
    "peers.flashinfer_rope(bf16(4, 16, 64), torch.arange(4), 1e6)()",
    *(
        f"peers.flashinfer_decode(bf16(2, 14, {E}), bf16(2, 2, 16, {E}), bf16(2, 2, 16, {E}), [16, 9], 16)()"
        for E in (64, 128)
    ),
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One process of a stage."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join([*(f"{k}={v}" for k, v in self.env.items()), *self.argv])


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the check."""

    name: str
    says: str
    estimate_s: int  # on 16 cores and an H100 or H200
    limit_s: int
    steps: Callable[[Context], Iterable[Sequence[Command]]]  # one after another; the commands of a step at once
    result: Callable[[Context, str], dict[str, Any]] = lambda context, log: {}  # of the log, for the summary


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where and how the stages run."""

    folder: Path  # of results
    architecture: str  # of the machine code, as nvcc names it
    full: bool
    only: Sequence[str]
    dry: bool = False
    python: str = sys.executable


class Skipped(Exception):
    """A stage that this machine cannot run, with the reason."""


# ---------------------------------------------------------------- stages


def build(context: Context) -> Iterable[Sequence[Command]]:
    flags = f"-DGRPO_ENGINE_CUDA_ARCHITECTURES={context.architecture} -DGRPO_ENGINE_WARNINGS_ARE_ERRORS=OFF"
    env = {"GRPO_ENGINE_CUDA": "1", "GRPO_ENGINE_BUILD_DIR": "build/gpu", "CMAKE_ARGS": flags}
    yield [Command(argv=[context.python, "setup.py", "-q", "build_ext", "--inplace"], env=env)]
    yield [Command(argv=[context.python, "-c", SMOKE])]


def peers(context: Context) -> Iterable[Sequence[Command]]:
    if not context.dry and "flashinfer" in missing_packages():
        raise Skipped("flashinfer is missing")
    yield [Command(argv=[context.python, "-c", FLASHINFER + kernel]) for kernel in FLASHINFER_KERNELS]


def tests(context: Context) -> Iterable[Sequence[Command]]:
    REPORT.unlink(missing_ok=True)
    collected = ["the files whose imports are there"] if context.dry else _collect(context)["files"]
    parallel = [] if "xdist" in missing_packages() else ["-n", str(max(1, (os.cpu_count() or 1) - 2))]
    yield [
        Command(
            argv=[context.python, "-m", "pytest", "-k", "cuda", "-o", "timeout=120", f"--junitxml={REPORT}", *parallel,
                  *collected],
            env={"OMP_NUM_THREADS": "1"},
        )
    ]  # fmt: skip


def sanitize(context: Context) -> Iterable[Sequence[Command]]:
    tool = shutil.which("compute-sanitizer") or str(
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    )
    if not context.dry and not Path(tool).exists():
        raise Skipped("compute-sanitizer is missing")
    if context.dry:
        chosen = [f"{SANITIZED_TESTS} tests of each op"]
    else:
        slow = {test for test, taken in _durations().items() if taken > QUICK_TEST_S}
        chosen = choose([t for t in _collect(context)["tests"] if t not in slow], SANITIZED_TESTS)

    def under(name: str, **env: str) -> Command:
        # only our kernels are watched: torch's are many and not what is checked
        watch = [tool, "--tool", name, "--kernel-name", "kns=grpo_engine", "--error-exitcode", str(SANITIZER_FOUND)]
        if name == "memcheck":
            watch += ["--report-api-errors", "no"]
        run = [context.python, "-m", "pytest", "-p", "no:cacheprovider", "-o", "timeout=100", *chosen]
        return Command(argv=watch + run, env={"OMP_NUM_THREADS": "2", **env})

    # without torch's own pool an access beyond a tensor is one beyond an allocation
    yield [under("memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"), under("racecheck")]


def measure(part: str, limit_s: int) -> Callable[[Context], Iterable[Sequence[Command]]]:
    def steps(context: Context) -> Iterable[Sequence[Command]]:
        argv = [context.python, "-m", "benchmarks.run", "--device", "cuda", "--out", str(context.folder)]
        argv += ["--only", *context.only] if context.only else ["--part", part]
        yield [Command(argv=[*argv, "--limit-s", str(limit_s), *([] if context.full else ["--quick"])])]

    return steps


def tested(context: Context, log: str) -> dict[str, Any]:
    by_file: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})
    for case in _reported():
        state = "passed"
        if any(case.find(kind) is not None for kind in ("failure", "error")):
            state = "failed"
        elif case.find("skipped") is not None:
            state = "skipped"
        by_file[case.get("classname", "").split(".")[-1].removeprefix("test_")][state] += 1
    return {"by_file": dict(by_file), "not_imported": _collect(context)["missing"]}


def sanitized(context: Context, log: str) -> dict[str, Any]:
    def total(pattern: str) -> int | None:
        found = re.findall(pattern, log)
        return int(found[-1]) if found else None

    return {
        "memcheck_errors": total(r"ERROR SUMMARY: (\d+) error"),
        "race_hazards": total(r"RACECHECK SUMMARY: (\d+) hazard"),
    }


STAGES = {
    stage.name: stage
    for stage in (
        Stage(name="build", says="builds the extension in place, with machine code for this GPU only", estimate_s=120,
              limit_s=240, steps=build),
        Stage(name="peers", says="lets FlashInfer compile its kernels (minutes where it is installed)", estimate_s=5,
              limit_s=400, steps=peers),
        Stage(name="tests", says="every test that takes a device", estimate_s=240, limit_s=540, steps=tests, result=tested),
        Stage(name="sanitize", says="compute-sanitizer's memcheck and racecheck on some tests of each op", estimate_s=150,
              limit_s=400, steps=sanitize, result=sanitized),
        Stage(name="bench", says="ops beside peers", estimate_s=300, limit_s=570, steps=measure("ops", 180)),
        Stage(name="models", says="decode step, training, rollout and GRPO step", estimate_s=240, limit_s=570,
              steps=measure("whole", 240)),
    )
}  # fmt: skip


# ---------------------------------------------------------------- tests of CUDA


def _collect(context: Context) -> dict[str, Any]:
    """Tests on the device, the files that have some, and why others cannot be imported; kept between calls.

    Returns:
        {"tests": ids, "files": paths, "missing": {path: module}}.
    """
    if TESTS.exists():
        return json.loads(TESTS.read_text(encoding="utf-8"))
    files = ["python_tests/ops", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "python_tests").glob("test_*.py")))]
    command = [context.python, "-m", "pytest", "--collect-only", "--continue-on-collection-errors", "-k", "cuda", *files]
    run = subprocess.run(command, cwd=ROOT, env=_environment({}), capture_output=True, text=True, timeout=COLLECT_S)
    found = parse_collection(run.stdout)
    if found["tests"]:  # else the extension may be what is missing
        TESTS.parent.mkdir(parents=True, exist_ok=True)
        TESTS.write_text(json.dumps(found), encoding="utf-8")
    return found


def parse_collection(out: str) -> dict[str, Any]:
    """See `_collect`; of pytest's output. A file that fails for another reason is run, so that its error is seen."""
    ids = re.findall(r"^(python_tests/\S+\.py::.+)$", out, re.M)
    missing, broken = {}, []
    for path, why in re.findall(r"ERROR collecting (\S+\.py) _+\n(.*?)(?=\n_{5}|\n={5}|\Z)", out, re.S):
        module = re.search(r"No module named '([\w.]+)'", why)
        if module:
            missing[path] = module[1]
        else:
            broken.append(path)
    files = list(dict.fromkeys([i.split("::")[0] for i in ids] + broken))
    return {"tests": ids, "files": files, "missing": missing}


def choose(ids: Sequence[str], each: int) -> list[str]:
    """Some tests of each op's file, spread evenly over the file."""
    by_file = collections.defaultdict(list)
    for test in ids:
        if test.startswith("python_tests/ops/"):
            by_file[test.split("::")[0]].append(test)
    return [test for of in by_file.values() for test in of[:: max(1, len(of) // each)][:each]]


def _reported() -> list[xml.etree.ElementTree.Element]:
    try:
        return list(xml.etree.ElementTree.parse(REPORT).iter("testcase"))
    except (OSError, xml.etree.ElementTree.ParseError):
        return []


def _durations() -> dict[str, float]:
    """Seconds of each test in the last report, by id."""
    return {
        f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": float(case.get("time", 0))
        for case in _reported()
    }


# ---------------------------------------------------------------- running


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    paths = [str(ROOT), *([str(SITE)] if SITE.exists() else []), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1", **extra}
    env.pop("GRPO_ENGINE_EXTENSION", None)  # what is built here is what is checked
    return env


def run_step(commands: Sequence[Command], log: Path, deadline: float) -> list[int | None]:
    """Runs commands at once, their output appended to a log.

    Args:
        commands: of one step.
        log: file.
        deadline: of time.monotonic(); whatever still runs then is killed with its children.

    Returns:
        Exit codes, None for what was killed.
    """
    running, codes, parts = [], [], []
    try:
        for n, command in enumerate(commands):
            parts.append(log.with_suffix(f".{n}.part"))
            with parts[-1].open("w", encoding="utf-8") as out:
                out.write(f"$ {command}\n")
                out.flush()
                running.append(subprocess.Popen(command.argv, cwd=ROOT, env=_environment(command.env), stdout=out,
                                                stderr=subprocess.STDOUT, start_new_session=True))  # fmt: skip
        for process in running:
            try:
                codes.append(process.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        with log.open("a", encoding="utf-8") as out:
            for part in parts:
                if part.exists():
                    out.write(part.read_text(encoding="utf-8", errors="replace"))
                    part.unlink()
    return codes


def run_stage(stage: Stage, context: Context, left_s: float = math.inf) -> dict[str, Any]:
    """Runs a stage and says what came out.

    Args:
        stage: one of STAGES.
        context: where and how.
        left_s: of all the time there is; a stage's own limit is cut to it.

    Returns:
        {"state": "passed", "failed", "timed out" or "skipped", "why", "seconds", "limit_s", "log", "date", ...}, and
        what `stage.result` reads from its log.
    """
    log, start = context.folder / f"{stage.name}.log", time.monotonic()
    limit_s = min(stage.limit_s, left_s)
    log.unlink(missing_ok=True)
    log.touch()
    state, why = "passed", None
    try:
        if limit_s < LEAST_S:
            raise Skipped("no time is left")
        for commands in stage.steps(context):
            codes = run_step(commands, log, start + limit_s)
            if None in codes:
                state, why = "timed out", f"more than {limit_s:.0f} s"
                break
            if any(codes):
                state, why = "failed", f"exit code {next(code for code in codes if code)}"
                break
    except Skipped as e:
        state, why = "skipped", str(e)
    except (OSError, subprocess.SubprocessError) as e:
        state, why = "failed", str(e)
    return {
        "state": state,
        "why": why,
        "seconds": round(time.monotonic() - start, 1),
        "limit_s": round(limit_s),
        "log": log.name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": collect_source()["commit"],
        **({} if state == "skipped" else stage.result(context, log.read_text(encoding="utf-8", errors="replace"))),
    }


def gpu_folder(name: str) -> str:
    """The name of a GPU's folder: "NVIDIA H100 80GB HBM3" is h100, "NVIDIA H200" h200."""
    model = re.search(r"\b([A-Z]{1,3}\d{2,4}\w*)\b", name.replace("NVIDIA", ""))
    return (model[1] if model else re.sub(r"\W+", "_", name)).lower()


# ---------------------------------------------------------------- what has run on which GPU


def status(out: Path) -> str:
    """gpu.md: a table of ops and whole steps, from the summaries and records in the subfolders of a folder."""
    ops = sorted(p.stem for p in (ROOT / "csrc" / "ops").glob("*.cpp") if p.with_suffix(".h").exists())
    whole = [name for name in ("decode_step", "training", "rollout", "step") if name not in ops]
    summaries = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(out.glob("*/summary.json"))]
    lines = [
        "# What has run on a GPU",
        "",
        "Made by `scripts/gpu_check.sh` from the summaries in the GPUs' folders, where results.md has the tables.",
        "Sanitizers: errors of memcheck and hazards of racecheck over some tests of each op together. Measured: cases, and",
        "their share of the GPU's limit.",
        "",
        "| op or step | GPU | tests | sanitizers | measured |",
        "|---|---|---|---|---|",
    ]
    for name in [*ops, *whole]:
        rows = [row for folder, summary in summaries if (row := _status_row(name, name in ops, folder, summary))]
        lines += rows or [f"| {name} | not yet run on a GPU | | | |"]
    return "\n".join(lines) + "\n"


def _status_row(name: str, is_op: bool, folder: Path, summary: Mapping[str, Any]) -> str | None:
    stages = summary["stages"]
    counts = stages.get("tests", {}).get("by_file", {}).get(name)
    tests_cell = bench_cell = sanitizers = ""
    if counts:
        tests_cell = f"{counts['passed']} passed, {counts['failed']} failed, {_when(stages['tests'])}"
    clean = stages.get("sanitize", {})
    if is_op and clean.get("memcheck_errors") is not None:
        sanitizers = f"{clean['memcheck_errors']} errors, {clean.get('race_hazards')} hazards, {_when(clean)}"
    record = folder / f"{name}.json"
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        shares = [row["share"] for row in found["cases"]]
        bench_cell = f"{len(shares)} cases" + (f", {min(shares):.0%} to {max(shares):.0%}" if shares else "")
        bench_cell += f", {len(found['failed'])} FAILED" if found.get("failed") else ""
        bench_cell += f", {_when(stages.get('bench' if is_op else 'models', {}))}"
    elif (results := folder / "results.md").exists() and f"## {name}\n" in results.read_text(encoding="utf-8"):
        bench_cell = "its table alone was kept"
    if not (tests_cell or bench_cell):
        return None
    return f"| {name} | [{summary['gpu']}]({folder.name}/results.md) | {tests_cell} | {sanitizers} | {bench_cell} |"


def _when(stage: Mapping[str, Any]) -> str:
    return f"{stage.get('date', '')[:10]} at {stage.get('commit')}" if stage else ""


# ---------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="results go to DIR/GPU")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, installed without a network beside the sources")
    parser.add_argument("--full", action="store_true", help="all cases and samples of the benchmarks; use with --only")
    parser.add_argument("--only", default="", help="benchmarks, with commas between; for bench or models")
    parser.add_argument("--within", type=float, default=math.inf, metavar="SECONDS", help="end by then, whatever is left")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of each stage, and run nothing")
    parser.add_argument("--table", action="store_true", help="only write gpu.md from the summaries in --out")
    args = parser.parse_args(argv)
    for name in args.stages:
        if name not in STAGES:
            parser.error(f"no stage {name!r}; there are {', '.join(STAGES)}")
    args.stages = args.stages or list(STAGES)
    args.only = [name for name in args.only.split(",") if name]
    if args.only and set(args.stages) - {"bench"} and set(args.stages) - {"models"}:
        parser.error("--only goes with one stage, bench or models")
    return args


def device() -> dict[str, Any] | None:
    """GPU, capability, torch and CUDA; None without a CUDA device."""
    out = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True, env=_environment({}), cwd=ROOT)
    return json.loads(out.stdout.splitlines()[-1]) if out.returncode == 0 else None


def missing_packages() -> list[str]:
    """Those of OPTIONAL that the stages cannot import."""
    probe = "import importlib.util, sys; print(*(m for m in sys.argv[1:] if importlib.util.find_spec(m) is None))"
    command = [sys.executable, "-c", probe, *OPTIONAL]
    return subprocess.run(command, env=_environment({}), cwd=ROOT, capture_output=True, text=True).stdout.split()


def install(wheels: Path) -> None:
    """Unpacks wheels into SITE.

    Raises:
        SystemExit: none there, or pip fails; in words.
    """
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"grpo_engine: --wheels {wheels} has no .whl file")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade",
               "--disable-pip-version-check", "--target", str(SITE), *found]  # fmt: skip
    if subprocess.run(command).returncode:
        raise SystemExit(f"grpo_engine: the wheels of {wheels} could not be installed")


def main(argv: Sequence[str] | None = None) -> int:
    args, start = parse(argv), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else what a stage started would go on
    if args.table:
        (args.out / "gpu.md").write_text(status(args.out), encoding="utf-8")
        return 0
    stages = [STAGES[name] for name in args.stages]
    about = None if args.dry_run else device()
    if about is None and not args.dry_run:
        print(f"grpo_engine: torch of {sys.executable} sees no CUDA device; nothing was built or run", file=sys.stderr)
        return 2
    estimate = ", ".join(f"{stage.name} {stage.estimate_s // 60}:{stage.estimate_s % 60:02d}" for stage in stages)
    total = sum(stage.estimate_s for stage in stages)
    print(f"estimated: {estimate}; {total // 60} min in all on 16 cores and an H100 or H200", flush=True)
    if args.dry_run:
        context = Context(folder=args.out / "GPU", architecture="90a", full=args.full, only=args.only, dry=True)
        for stage in stages:
            print(f"\n{stage.name}: {stage.says}; at most {stage.limit_s} s")
            for commands in stage.steps(context):
                for command in commands:
                    print("  ", command)
        return 0

    major, minor = about["capability"]
    folder = args.out.resolve() / gpu_folder(about["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    TESTS.unlink(missing_ok=True)  # sources may have changed
    if args.wheels is not None:
        install(args.wheels)
    missing = missing_packages()
    print(f"{about['gpu']}, compute capability {major}.{minor}, torch {about['torch']}, CUDA {about['cuda']}")
    for name in missing:
        print(f"missing {name}: {OPTIONAL[name]}")
    context = Context(folder=folder, architecture=f"{major}{minor}" + ("a" if major >= 9 else ""), full=args.full,
                      only=args.only)  # fmt: skip
    path = folder / "summary.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"stages": {}}
    summary = {"schema": SCHEMA, **about, "python": sys.version.split()[0], "missing_packages": missing,
               "stages": before["stages"]}  # fmt: skip
    for stage in stages:
        print(f"\n{stage.name}: {stage.says}", flush=True)
        outcome = run_stage(stage, context, args.within - CLOSE_S - (time.monotonic() - start))
        summary["stages"][stage.name] = outcome
        path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (args.out / "gpu.md").write_text(status(args.out), encoding="utf-8")
        print(f"{stage.name}: {outcome['state']}" + (f" ({outcome['why']})" if outcome["why"] else "")
              + f" in {outcome['seconds']:.0f} s; {folder / outcome['log']}", flush=True)  # fmt: skip
        lines = (folder / outcome["log"]).read_text(encoding="utf-8", errors="replace").splitlines()
        print(*lines[-25 if outcome["state"] in ("failed", "timed out") else -3 :], sep="\n", flush=True)
        for file, module in outcome.get("not_imported", {}).items():
            print(f"left out: {file} needs {module}")
    bad = [s.name for s in stages if summary["stages"][s.name]["state"] in ("failed", "timed out")]
    print("\n" + (f"failed: {', '.join(bad)}" if bad else "all stages passed or were skipped") + f"; {path}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the benchmarks one after another, each in a process of its own, and keeps their records.

python -m benchmarks.run --list
python -m benchmarks.run --quick                     # minutes; every file, fewer cases and samples
python -m benchmarks.run --out benchmarks/results    # all cases; writes a record of each, results.md and the figures
python -m benchmarks.run --part real --out benchmarks/results    # only SmolLM2-135M and Qwen2.5-0.5B
python -m benchmarks.run --only linear rollout --threads all
python -m benchmarks.run --device cuda --out benchmarks/results/h200    # on a GPU; a case that fails costs only itself
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent))  # the repository, however this file is started

from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from benchmarks import table  # noqa: E402
from grpo_engine.system.machine import num_cores  # noqa: E402

WHOLE = (  # no op, in the order of the tables
    "decode_step", "training", "rollout", "step", "trl_training", "scaling", "thread_scaling",
)  # fmt: skip
CPU_ONLY = ("trl_training", "scaling", "thread_scaling")
LARGE = (  # ops with cases that are worth all cores
    "adamw", "decoder_layer", "linear", "paged_attention", "ragged_attention", "sample_token", "token_logprob",
)  # fmt: skip
STEPS = ("training", "rollout", "step")  # on one thread and on all cores
REAL = ("training", "rollout", "step", "thread_scaling")  # with cases of published sizes
REAL_ON_ONE = ("training", "rollout")  # of these also on one thread
PARTS = ("all", "ops", "whole", "real")
FIGURES = {"scaling": "Time against batch, length, vocabulary and size", "thread_scaling": "Speed-up against threads"}


@dataclass(frozen=True, slots=True)
class Job:
    """One process: a file, its sizes and its threads."""

    name: str
    threads: int
    real: bool = False

    def options(self) -> list[str]:
        return ["--threads", str(self.threads), *["--real"] * self.real]

    def __str__(self) -> str:
        return f"{self.name}{', published sizes' * self.real}, {self.threads} thread{'s' * (self.threads > 1)}"


def plan(chosen: Sequence[str], *, part: str, threads: int | None, quick: bool, cores: int) -> list[Job]:
    """The processes of a run on the CPU.

    By default every file runs on one thread, by the clock of CPU time; the large ops and whole steps once more on all
    cores, and the published sizes on all cores, training and rollout also on one thread.

    Args:
        chosen: names of benchmarks.
        part: one of PARTS; "all" and "whole" hold the published sizes too, "real" nothing else.
        threads: of every process; None: as said above.
        quick: each file once: ops on one thread, whole steps on all cores.
        cores: what "all" means.

    Returns:
        In the order of the tables.
    """
    if (threads or cores) < 2:
        chosen = [name for name in chosen if name != "thread_scaling"]  # there is nothing to compare

    def jobs(name: str, *, one: bool, every: bool, real: bool = False) -> list[Job]:
        wanted = {threads} if threads is not None else ({1} if one else set()) | ({cores} if every else set())
        return [Job(name, n, real) for n in sorted(wanted)]

    found = []
    for name in chosen:
        if part == "real":
            pass
        elif name in STEPS:
            found += jobs(name, one=not quick, every=True)
        elif name == "thread_scaling":
            found += jobs(name, one=False, every=True)
        else:
            found += jobs(name, one=True, every=name in LARGE and not quick)
        if name in REAL and part != "ops":
            found += jobs(name, one=name in REAL_ON_ONE and not quick, every=True, real=True)
    return found


def names(*, part: str = "all", device: str = "cpu") -> list[str]:
    """Benchmarks of a device: the ops in alphabetic order, then what is no op; or only those of a part."""
    found = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    found -= set(CPU_ONLY) if device == "cuda" else set()
    ops, whole = sorted(found - set(WHOLE)), [name for name in WHOLE if name in found]
    return {"all": ops + whole, "ops": ops, "whole": whole, "real": [name for name in whole if name in REAL]}[part]


def run_one(
    name: str, options: Sequence[str], progress: Progress, task: Any, limit_s: float
) -> tuple[str, dict[str, Any] | None, bool]:
    """Runs one file.

    Args:
        name: of the benchmark.
        options: its command line.
        progress: shows the case that it is at.
        task: of progress.
        limit_s: it is killed after this many seconds.

    Returns:
        (what it printed but for the record; its last errors when it failed; the record or None; whether all went well).
        The record of one that was killed or failed holds the cases that it finished.
    """
    with tempfile.TemporaryDirectory() as folder:
        so_far = Path(folder) / "record.json"
        if name not in FIGURES:  # those two measure one thing, whole
            options = [*options, "--record", str(so_far)]
        printed, record, well = _run_one(name, options, progress, task, limit_s)
        if record is None and so_far.exists():
            record = json.loads(so_far.read_text(encoding="utf-8"))
            printed = f"{table.text(record)}\n\n{printed}"
        return printed, record, well


def _run_one(
    name: str, options: Sequence[str], progress: Progress, task: Any, limit_s: float
) -> tuple[str, dict[str, Any] | None, bool]:
    command = [sys.executable, str(FOLDER / f"bench_{name}.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=FOLDER.parent)
    errors, start = [], time.monotonic()
    reader = _Reader(process.stdout)
    alarm = threading.Timer(limit_s, process.kill)
    alarm.start()
    for line in process.stderr:
        errors.append(line)
        if line.startswith(f"  {name}: "):
            progress.update(task, description=line.strip()[:70])
    out = reader.text().rstrip().splitlines()
    record = json.loads(out.pop()) if out and out[-1].startswith('{"benchmark"') else None
    code = process.wait()
    alarm.cancel()
    if time.monotonic() - start >= limit_s:
        errors.append(f"{name}: took more than {limit_s:.0f} s and was killed\n")
    if code != 0:
        return "".join(["\n".join(out), "\n", *errors[-5:]]), record, False
    return "\n".join(out), record, True


class _Reader:
    """Reads a pipe to its end beside another, so that neither fills up."""

    def __init__(self, pipe: Any) -> None:
        self._parts: list[str] = []
        self._thread = threading.Thread(target=lambda: self._parts.append(pipe.read()))
        self._thread.start()

    def text(self) -> str:
        self._thread.join()
        return "".join(self._parts)


def kept_records(out: Path) -> list[dict[str, Any]]:
    """The records of a folder in the order of the tables: by benchmark, then sizes, then threads."""
    order, found = names(), []
    for path in out.glob("*.json"):
        if path.name.split(".")[0] in order:
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return sorted(found, key=lambda r: (order.index(r["benchmark"]), r.get("sizes") == table.REAL, r["threads"]))


def write(out: Path, record: dict[str, Any]) -> None:
    """Keeps a record, and makes results.md anew from all records of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    stem = table.file_stem(record)
    table.write_record(out / f"{stem}.json", record)
    kept = kept_records(out)
    parts = ["# Measured beside peers", "", summary(kept)]
    if any(table.UNCOUNTED in row for one in kept for row in one["cases"]):
        why = "is of one thread and older than the count of threads. The column compared one thread with itself."
        parts += ["", f'A table with a column "not counted" {why}']
    if record["benchmark"] == "scaling" or "speed_up" in record and record["threads"] > 2:  # two points are a table
        module = importlib.import_module(f"benchmarks.bench_{record['benchmark']}")
        module.figure(record, out / f"{stem}.png")
    for one in kept:
        parts.append(f"\n{table.text(one)}")
        figure = out / f"{table.file_stem(one)}.png"
        if figure.exists():
            parts.append(f"\n![{FIGURES[one['benchmark']]}]({figure.name})")
    (out / "results.md").write_text("\n".join(parts) + "\n", encoding="utf-8")


def summary(kept: Sequence[dict[str, Any]]) -> str:
    """Geometric means of all benchmarks in one table, with the bit checks."""
    lines = ["| benchmark | geometric mean of the ratios, by peer | losing cases | bits |", "|---|---|---|---|"]
    for record in kept:
        means = ", ".join(f"{peer} {value:.2f}" for peer, value in record["geometric_mean"].items())
        ratios = [p["ratio"] for row in record["cases"] for p in row["peers"].values() if "ratio" in p]
        counted = [row[k] for row in record["cases"] for k in table.CHECKS if k != table.UNCOUNTED and k in row]
        said = [table.verdict(check) for check in counted if check is not None]
        failed = len(record.get("failed", ()))
        losing = f"{sum(r < 1 for r in ratios)} of {len(ratios)}" if ratios else ""
        equal, unequal = sum(s.startswith("yes") for s in said), said.count("NO")
        bits = f"{equal} of {equal + unequal} equal"
        if single := len(said) - equal - unequal:
            bits += f", {single} on one thread"
        bits += f"; {failed} cases FAILED" if failed else ""
        lines.append(f"| {table.title(record)} | {means} | {losing} | {bits if said or failed else ''} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--quick", action="store_true", help="fewer cases and samples")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="all",
        help="ops: single ops; whole: steps and rollouts; real: those of published sizes",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names(), default=None)
    parser.add_argument(
        "--threads",
        type=table.thread_count,
        default=None,
        metavar="N|all",
        help="of every benchmark; by default ops run on one thread, large ops and whole steps on all too",
    )
    parser.add_argument("--limit-s", type=float, default=3600.0, help="a benchmark is killed after this many seconds")
    parser.add_argument("--out", type=Path, default=None, help="folder for the records; none are kept without it")
    args = parser.parse_args(argv)
    chosen = args.only or names(part=args.part, device=args.device)
    if args.list:
        print("\n".join(chosen))
        return
    common = ["--quick"] if args.quick else []
    if args.device == "cuda":
        common += ["--device", "cuda", "--keep-going"]
        jobs = [Job(name, 1) for name in chosen]
    else:
        jobs = plan(chosen, part=args.part, threads=args.threads, quick=args.quick, cores=num_cores())
    console, failed, kept, start = Console(), [], [], time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=str(job))
            printed, record, well = run_one(job.name, [*job.options(), *common], progress, task, args.limit_s)
            print(printed + "\n", flush=True)
            if not well:
                failed.append(str(job))
            if record is not None:
                kept.append(record)
                if args.out is not None:
                    write(args.out, record)
            progress.advance(task)
    print(summary(kept))
    print(f"\n{len(kept)} of {len(jobs)} benchmarks in {time.monotonic() - start:.0f} s")
    if failed:
        console.print(f"failed: {'; '.join(failed)}", style="bold red")
        raise SystemExit(1)


if __name__ == "__main__":
    main()

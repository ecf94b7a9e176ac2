"""Runs the benchmarks one after another, each in a process of its own, and keeps their records.

python -m benchmarks.run --list
python -m benchmarks.run --quick                     # minutes; every file, fewer cases and samples
python -m benchmarks.run --out benchmarks/results    # all cases; writes NAME.json, results.md and scaling.png
python -m benchmarks.run --only linear rollout --threads 2
python -m benchmarks.run --device cuda --out benchmarks/results/h200    # on a GPU; a case that fails costs only itself
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent))  # the repository, however this file is started

from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from benchmarks import table  # noqa: E402

WHOLE = ("decode_step", "training", "rollout", "step", "trl_training", "scaling")  # no op, in the order of the tables
CPU_ONLY = ("trl_training", "scaling")
PARTS = ("all", "ops", "whole")


def names(*, part: str = "all", device: str = "cpu") -> list[str]:
    """Benchmarks of a device: the ops in alphabetic order, then what is no op; or only one of the two parts."""
    found = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    found -= set(CPU_ONLY) if device == "cuda" else set()
    ops, whole = sorted(found - set(WHOLE)), [name for name in WHOLE if name in found]
    return {"all": ops + whole, "ops": ops, "whole": whole}[part]


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
    """
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


def write(out: Path, name: str, record: dict[str, Any]) -> None:
    """Keeps a record, and makes results.md anew from all records of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    kept = [json.loads((out / f"{n}.json").read_text()) for n in names() if (out / f"{n}.json").exists()]
    parts = ["# Measured beside peers", "", summary(kept), *(f"\n{table.text(r)}" for r in kept)]
    if name == "scaling":
        from benchmarks.bench_scaling import figure

        figure(record, out / "scaling.png")
    if (out / "scaling.png").exists():
        parts.append("\n![Time against batch, length, vocabulary and size](scaling.png)")
    (out / "results.md").write_text("\n".join(parts) + "\n")


def summary(kept: Sequence[dict[str, Any]]) -> str:
    """Geometric means of all benchmarks in one table, with the bit checks."""
    lines = ["| benchmark | geometric mean of the ratios, by peer | losing cases | bits |", "|---|---|---|---|"]
    for record in kept:
        means = ", ".join(f"{peer} {value:.2f}" for peer, value in record["geometric_mean"].items())
        ratios = [p["ratio"] for row in record["cases"] for p in row["peers"].values() if "ratio" in p]
        checks = [row.get(k) for row in record["cases"] for k in table.CHECKS]
        made = [c for c in checks if c is not None]
        failed = len(record.get("failed", ()))
        losing = f"{sum(r < 1 for r in ratios)} of {len(ratios)}" if ratios else ""
        bits = f"{sum(made)} of {len(made)} equal" + (f"; {failed} cases FAILED" if failed else "")
        lines.append(f"| {record['benchmark']} | {means} | {losing} | {bits} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--quick", action="store_true", help="fewer cases and samples")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--part", choices=PARTS, default="all", help="ops: single ops; whole: steps and rollouts")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names(), default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=3600.0, help="a benchmark is killed after this many seconds")
    parser.add_argument("--out", type=Path, default=None, help="folder for the records; none are kept without it")
    args = parser.parse_args(argv)
    chosen = args.only or names(part=args.part, device=args.device)
    if args.list:
        print("\n".join(chosen))
        return
    options = ["--threads", str(args.threads), *(["--quick"] if args.quick else [])]
    if args.device == "cuda":
        options += ["--device", "cuda", "--keep-going"]
    console, failed, kept, start = Console(), [], [], time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(chosen))
        for name in chosen:
            progress.update(task, description=name)
            printed, record, well = run_one(name, options, progress, task, args.limit_s)
            print(printed + "\n", flush=True)
            if not well:
                failed.append(name)
            if record is not None:
                kept.append(record)
                if args.out is not None:
                    write(args.out, name, record)
            progress.advance(task)
    print(summary(kept))
    print(f"\n{len(kept)} of {len(chosen)} benchmarks in {time.monotonic() - start:.0f} s")
    if failed:
        console.print(f"failed: {', '.join(failed)}", style="bold red")
        raise SystemExit(1)


if __name__ == "__main__":
    main()

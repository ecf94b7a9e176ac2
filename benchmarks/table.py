"""One benchmark: cases are checked, timed beside their peers, printed as a table and as one JSON line.

A wrong answer is not timed: every case compares our result and each peer's with float64, or with each other, and the
program ends with an error that names the case. A peer that is not installed is named in the table and skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no worker processes beside what is timed
import torch  # noqa: E402

from benchmarks.limits import Clock, Limits, clock_for, interleave, measure  # noqa: E402
from grpo_engine import records  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OURS = "ours"
UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0}
PEER_PACKAGES = ("numpy", "trl", "accelerate", "llama-cpp-python")

Run = Callable[[], Any]


class WrongAnswer(Exception):
    """A result that is not what the case asks for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """A peer that cannot run here."""

    why: str  # shown in the table, for instance "not installed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of a table.

    A result is a tensor or a sequence of tensors. Either `expected` gives the truth (float64 where that is possible) or
    `check` judges a result; with neither, the peers are held against us.
    """

    name: str
    ours: Run
    peers: Mapping[str, Run | Missing]
    tolerance: float  # largest error, as a share of the largest element of the truth
    expected: Run | None = None
    check: Callable[[str, Any], None] | None = None  # (who, result); raises WrongAnswer
    bits: Run | None = None  # what must have the same bits on one and two threads; None: `ours`, which then keeps no state
    alone: Callable[[Any], bool] | None = None  # our result -> has a part of the batch the same bits on its own?
    at_least: int = 3  # samples, whatever they cost
    flops: float = 0.0
    nbytes: float = 0.0  # read and written at least once
    derived: Mapping[str, Callable[[float], float]] = field(default_factory=dict)  # column -> of the seconds


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order."""
    return [result] if isinstance(result, torch.Tensor) else list(result)


def relative_error(got: Any, want: Any) -> float:
    """Largest difference as a share of the largest element, over all tensors of a result.

    Args:
        got: a result.
        want: another of the same shapes. Infinite or NaN elements must be at the same places.

    Returns:
        >= 0; infinity when number, shape or the place of non-finite values differ.
    """
    got, want = tensors(got), tensors(want)
    if len(got) != len(want):
        return math.inf
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        a, b = a.detach().double(), b.detach().double()
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return math.inf
        if not torch.equal(a[~a.isfinite()].nan_to_num(), b[~b.isfinite()].nan_to_num()):
            return math.inf
        a, b = a[a.isfinite()], b[b.isfinite()]
        if a.numel():
            scale = float(b.abs().max())
            worst = max(worst, float((a - b).abs().max()) / (scale if scale > 0 else 1.0))
    return worst


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results are equal bit for bit (NaN equals NaN)."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) and torch.equal(x.isnan(), y.isnan()) for x, y in pairs)


def same_on_two_threads(run: Run) -> bool:
    """Whether a function returns the same bits with one thread and with two."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(2)
        return same_bits(one, run())
    finally:
        torch.set_num_threads(before)


def verify(case: Case) -> tuple[dict[str, float], dict[str, Run], dict[str, str], Any]:
    """Runs everything once and refuses wrong answers.

    Args:
        case: the row.

    Returns:
        (error of each, functions to time, why each other peer is missing, our result).

    Raises:
        WrongAnswer: naming the case and who is wrong.
    """
    mine = case.ours()
    results, runs, missing = {OURS: mine}, {OURS: case.ours}, {}
    for name, peer in case.peers.items():
        if isinstance(peer, Missing):
            missing[name] = peer.why
            continue
        try:
            results[name] = peer()
        except (RuntimeError, TypeError, ValueError, ImportError, NotImplementedError) as e:
            missing[name] = f"failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:120]
            continue
        runs[name] = peer
    errors = {}
    truth = case.expected() if case.expected is not None else mine
    for who, result in results.items():
        if case.check is not None:
            try:
                case.check(who, result)
            except WrongAnswer as e:
                raise WrongAnswer(f"{case.name}: {who} is wrong: {e}") from e
            continue
        errors[who] = relative_error(result, truth)
        if not errors[who] <= case.tolerance:
            raise WrongAnswer(f"{case.name}: {who} is wrong: error {errors[who]:.3g}, allowed {case.tolerance:.3g}")
    return errors, runs, missing, mine


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and range of some seconds."""
    low, high = statistics.quantiles(samples, n=4, method="inclusive")[::2] if len(samples) > 1 else (samples[0], samples[0])
    return {
        "median_s": statistics.median(samples),
        "q1_s": low,
        "q3_s": high,
        "min_s": min(samples),
        "max_s": max(samples),
        "samples": len(samples),
    }


def run_case(case: Case, *, clock: Clock, repeats: int, budget_s: float) -> dict[str, Any]:
    """Checks and times one case.

    Args:
        case: the row.
        clock: seconds.
        repeats: samples of each function.
        budget_s: see `interleave`.

    Returns:
        The row's record, all but its share of the limits.

    Raises:
        WrongAnswer: see `verify`.
    """
    torch._dynamo.reset()  # else the ninth shape of a compiled peer would silently run eagerly
    errors, runs, missing, mine = verify(case)
    bits = same_on_two_threads(case.bits or case.ours)
    alone = case.alone(mine) if case.alone is not None else None
    del mine
    times = {
        name: spread(samples)
        for name, samples in interleave(
            runs, clock=clock, repeats=max(repeats, case.at_least), budget_s=budget_s, at_least=case.at_least
        ).items()
    }
    mine_s = times[OURS]["median_s"]
    peers: dict[str, Any] = {}
    for name in case.peers:
        if name in missing:
            peers[name] = {"missing": missing[name]}
        else:
            seconds = times[name]["median_s"]
            peers[name] = times[name] | {
                "ratio": seconds / mine_s,
                **{column: value(seconds) for column, value in case.derived.items()},
            }
    return {
        "case": case.name,
        "tolerance": case.tolerance,
        "errors": errors,
        "ours": times[OURS] | {column: value(mine_s) for column, value in case.derived.items()},
        "peers": peers,
        "flops": case.flops,
        "nbytes": case.nbytes,
        "bits_1_vs_2_threads": bits,
        "batch_invariant": alone,
    }


def place(row: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """A row with its rates and its share of the machine's limit."""
    seconds = row["ours"]["median_s"]
    roof, bound = limits.roof(flops=row["flops"], nbytes=row["nbytes"])
    return row | {
        "gflops": row["flops"] / seconds / 1e9,
        "gbytes": row["nbytes"] / seconds / 1e9,
        "bound": bound,
        "share": roof / seconds,
    }


def geometric_means(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Geometric mean of the ratios of each peer, over the cases where it ran."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        for name, peer in row["peers"].items():
            if "ratio" in peer:
                ratios.setdefault(name, []).append(peer["ratio"])
    return {name: math.exp(statistics.fmean(map(math.log, values))) for name, values in ratios.items()}


def markdown(record: Mapping[str, Any]) -> str:
    """The table of a benchmark's record."""
    unit, rows = record["unit"], record["cases"]
    scale = UNITS[unit]
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    derived = list(dict.fromkeys(k for row in rows for k in row["ours"] if not k.endswith("_s") and k != "samples"))
    header = ["case", unit, "rate", "of limit", *derived]
    for name in names:
        header += [name, "ratio"]
    header += ["bits 1 = 2 threads", "alone = in batch"]
    lines = [header]
    for row in rows:
        rate = f"{row['gflops']:.1f} GFLOP/s" if row["bound"] == "compute" else f"{row['gbytes']:.1f} GB/s"
        line = [row["case"], number(row["ours"]["median_s"] * scale), rate, f"{row['share']:.0%} {row['bound']}"]
        line += [number(row["ours"][k]) if k in row["ours"] else "" for k in derived]
        for name in names:
            peer = row["peers"].get(name, {"missing": ""})
            if "missing" in peer:
                line += [peer["missing"], ""]
            else:
                line += [number(peer["median_s"] * scale), f"{peer['ratio']:.2f}"]
        line += [{True: "yes", False: "NO", None: ""}[row[k]] for k in ("bits_1_vs_2_threads", "batch_invariant")]
        lines.append(line)
    mean = ["geometric mean"] + [""] * (len(header) - 1)
    for name, value in record["geometric_mean"].items():
        mean[header.index(name) + 1] = f"{value:.2f}"
    lines.append(mean)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def number(value: float) -> str:
    """Three significant digits, thousands grouped."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def machine() -> dict[str, Any]:
    """Hardware, versions, commit and load: what a number cannot be read without."""
    versions = records.collect_versions()
    for name in PEER_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"hardware": records.collect_hardware(), "versions": versions, "commit": commit(), "load": os.getloadavg()}


def commit() -> str | None:
    """The checkout's commit, marked when files differ from it; None outside a checkout."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()


def benchmark(
    name: str,
    cases: Iterable[Case],
    *,
    quick: bool = False,
    threads: int = 1,
    unit: str = "us",
    note: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Runs the cases of one benchmark.

    Args:
        name: of the benchmark.
        cases: made one at a time, so that only one is in memory.
        quick: fewer samples.
        threads: of torch; with more than one the clock is the wall's.
        unit: of the table's times: "us", "ms" or "s".
        note: printed under the table.
        say: gets the name of each case before it runs.

    Returns:
        The record: what `markdown` prints and what the JSON line holds.

    Raises:
        WrongAnswer: see `verify`.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    clock = clock_for(threads)
    repeats, budget_s = (5, 2.0) if quick else (15, 20.0)
    about = machine()
    before = measure(clock, repeats=5)
    rows = []
    for case in cases:
        say(case.name)
        rows.append(run_case(case, clock=clock, repeats=repeats, budget_s=budget_s))
    after = measure(clock, repeats=5)
    limits = Limits(**{k: statistics.fmean((v, after.as_dict()[k])) for k, v in before.as_dict().items()})
    rows = [place(row, limits) for row in rows]
    return {
        "benchmark": name,
        "quick": quick,
        "threads": threads,
        "clock": "process_time" if threads == 1 else "perf_counter",
        "unit": unit,
        "note": note,
        **about,
        "load_after": os.getloadavg(),
        "limits": limits.as_dict(),
        "cases": rows,
        "geometric_mean": geometric_means(rows),
    }


def text(record: Mapping[str, Any]) -> str:
    """A record as it is printed: title, table, limits, note."""
    hardware = record["hardware"]
    lines = [
        f"## {record['benchmark']}",
        "",
        markdown(record),
        "",
        f"{hardware['cpu']}, {record['threads']} thread(s), {record['clock']}, medians, interleaved; "
        f"load {record['load'][0]:.1f} to {record['load_after'][0]:.1f}; commit {record['commit']}. "
        f"{Limits(**record['limits'])}. A ratio is the peer's time over ours.",
    ]
    return "\n".join(lines + ([record["note"]] if record["note"] else []))


def main(
    name: str,
    cases: Callable[[bool], Iterable[Case]],
    *,
    unit: str = "us",
    note: str = "",
    argv: Sequence[str] | None = None,
) -> None:
    """The command line of a benchmark file: prints its table, and its record as the last line.

    Args:
        name: of the benchmark.
        cases: of (quick).
        unit: see `benchmark`.
        note: likewise.
        argv: of the command line; None: the process's.

    Raises:
        SystemExit: 1 with a sentence that names the case, for a wrong answer.
    """
    parser = argparse.ArgumentParser(prog=f"bench_{name}")
    parser.add_argument("--quick", action="store_true", help="fewer cases and samples")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    args = parser.parse_args(argv)
    chosen = (case for case in cases(args.quick) if args.case in case.name)
    try:
        record = benchmark(name, chosen, quick=args.quick, threads=args.threads, unit=unit, note=note,
                           say=lambda case: print(f"  {name}: {case}", file=sys.stderr, flush=True))  # fmt: skip
    except WrongAnswer as e:
        raise SystemExit(f"{name}: {e}") from e
    print(text(record))
    print(json.dumps(record), flush=True)

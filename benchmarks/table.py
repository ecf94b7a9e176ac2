"""One benchmark: cases are checked, timed beside their peers, printed as a table and as one JSON line.

A wrong answer is not timed: every case compares our result and each peer's with float64, or with each other, and the
program ends with an error that names the case. A peer that is not installed is named in the table and skipped. With
--keep-going the other cases are still run, what failed is in the record, and the program ends with an error after it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no worker processes beside what is timed
import torch  # noqa: E402

from benchmarks.limits import Limits, Run, Timer, interleave, measure, timer_for  # noqa: E402
from grpo_engine import records  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OURS = "ours"
UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0}
BITS = {"cpu": "bits_1_vs_2_threads", "cuda": "bits_twice"}  # keys of a row
CHECKS = {BITS["cpu"]: "bits 1 = 2 threads", BITS["cuda"]: "same bits twice", "batch_invariant": "alone = in batch"}
PEER_PACKAGES = ("numpy", "trl", "accelerate", "llama-cpp-python", "triton", "flashinfer-python", "liger-kernel")


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
    bits: Run | None = None  # what must have the same bits in two runs; None: `ours`, which then keeps no state
    alone: Callable[[Any], bool] | None = None  # our result -> has a part of the batch the same bits on its own?
    at_least: int = 3  # samples, whatever they cost
    flops: float = 0.0
    nbytes: float = 0.0  # read and written at least once
    products: torch.dtype = torch.float32  # operands of the products, which decide a GPU's limit
    derived: Mapping[str, Callable[[float], float]] = field(default_factory=dict)  # column -> of the seconds


def failure(error: BaseException) -> str:
    """What the table says of a peer that fails."""
    return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]


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


def same_bits_twice(run: Run, device: str) -> bool:
    """Whether a function returns the same bits with one thread and with two; on CUDA, in two runs."""
    if device == "cuda":
        return same_bits(run(), run())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(2)
        return same_bits(one, run())
    finally:
        torch.set_num_threads(before)


def extra_memory(run: Run) -> int:
    """Bytes of a GPU's memory that a call takes at its peak beyond what was there before and what it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    returned = [result] if isinstance(result, torch.Tensor) else result if isinstance(result, tuple | list) else ()
    kept = sum(x.nbytes for x in returned if isinstance(x, torch.Tensor) and x.is_cuda)
    return max(0, torch.cuda.max_memory_allocated() - before - kept)


def verify(case: Case, *, keep_going: bool = False) -> tuple[dict[str, float], dict[str, Run], dict[str, str], Any]:
    """Runs everything once and refuses wrong answers.

    Args:
        case: the row.
        keep_going: leave a peer out whose answer is wrong, and name it.

    Returns:
        (error of each, functions to time, why each other peer is missing, our result).

    Raises:
        WrongAnswer: naming the case and who is wrong.
    """

    def refuse(who: str, why: str) -> None:
        if who == OURS or not keep_going:
            raise WrongAnswer(f"{case.name}: {who} is wrong: {why}")
        missing[who] = f"wrong: {why}"[:120]
        del runs[who]

    mine = case.ours()
    results, runs, missing = {OURS: mine}, {OURS: case.ours}, {}
    for name, peer in case.peers.items():
        if isinstance(peer, Missing):
            missing[name] = peer.why
            continue
        try:
            results[name] = peer()
        except Exception as e:  # a peer may fail in any way, and is then named
            missing[name] = failure(e)
            continue
        runs[name] = peer
    errors = {}
    truth = case.expected() if case.expected is not None else mine
    for who, result in results.items():
        if case.check is not None:
            try:
                case.check(who, result)
            except WrongAnswer as e:
                refuse(who, str(e))
            continue
        errors[who] = relative_error(result, truth)
        if not errors[who] <= case.tolerance:
            refuse(who, f"error {errors[who]:.3g}, allowed {case.tolerance:.3g}")
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


def run_case(
    case: Case, *, timer: Timer, repeats: int, budget_s: float, device: str = "cpu", keep_going: bool = False
) -> dict[str, Any]:
    """Checks and times one case.

    Args:
        case: the row.
        timer: see `timer_for`.
        repeats: samples of each function.
        budget_s: see `interleave`.
        device: "cpu" or "cuda".
        keep_going: see `verify`.

    Returns:
        The row's record, all but its share of the limits.

    Raises:
        WrongAnswer: see `verify`.
    """
    torch._dynamo.reset()  # else the ninth shape of a compiled peer would silently run eagerly
    errors, runs, missing, mine = verify(case, keep_going=keep_going)
    bits = same_bits_twice(case.bits or case.ours, device)
    alone = case.alone(mine) if case.alone is not None else None
    del mine
    times = {
        name: spread(samples)
        for name, samples in interleave(
            runs, timer=timer, repeats=max(repeats, case.at_least), budget_s=budget_s, at_least=case.at_least
        ).items()
    }
    if device == "cuda":
        for name, run in runs.items():
            times[name]["extra MB"] = extra_memory(run) / 1e6
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
        "products": str(case.products)[6:],
        BITS[device]: bits,
        "batch_invariant": alone,
    }


def place(row: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """A row with its rates and its share of the machine's limit."""
    seconds = row["ours"]["median_s"]
    roof, bound = limits.roof(flops=row["flops"], nbytes=row["nbytes"], bf16=row.get("products") == "bfloat16")
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
    checks = [key for key in CHECKS if any(key in row for row in rows)]
    header += [CHECKS[key] for key in checks]
    lines = [header]
    for row in rows:
        rate = giga(row["gflops"], "FLOP/s") if row["bound"] == "compute" else giga(row["gbytes"], "B/s")
        line = [row["case"], number(row["ours"]["median_s"] * scale), rate, f"{row['share']:.0%} {row['bound']}"]
        line += [number(row["ours"][k]) if k in row["ours"] else "" for k in derived]
        for name in names:
            peer = row["peers"].get(name, {"missing": ""})
            if "missing" in peer:
                line += [peer["missing"], ""]
            else:
                line += [number(peer["median_s"] * scale), f"{peer['ratio']:.2f}"]
        line += [{True: "yes", False: "NO", None: ""}[row[k]] for k in checks]
        lines.append(line)
    mean = ["geometric mean"] + [""] * (len(header) - 1)
    for name, value in record["geometric_mean"].items():
        mean[header.index(name) + 1] = f"{value:.2f}"
    lines.append(mean)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def giga(value: float, unit: str) -> str:
    """A rate that is given in 1e9 a second."""
    return f"{value / 1e3:.1f} T{unit}" if value >= 1e4 else f"{value:.1f} G{unit}"


def number(value: float) -> str:
    """Three significant digits, thousands grouped."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def gpu() -> dict[str, Any]:
    """Name, compute capability and memory of the GPU, and the versions of CUDA and of its driver."""
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "name": about.name, "capability": f"{about.major}.{about.minor}", "memory_bytes": about.total_memory,
        "cuda": torch.version.cuda, "driver": driver,
    }  # fmt: skip


def made(cases: Iterable[Case | Callable[[], Case]], device: str) -> Iterator[Case | Exception]:
    """The cases one at a time, with the tensors that are made for them on a device.

    Args:
        cases: each a case, or what makes it.
        device: "cpu" or "cuda".

    Yields:
        A case, or what was raised when one was made. A generator that raised ends.
    """
    cases = iter(cases)
    while True:
        try:
            with torch.device(device):
                case = next(cases, None)
                case = case() if callable(case) else case
        except Exception as e:
            case = e
        if case is None:
            return
        yield case


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
    cases: Iterable[Case | Callable[[], Case]],
    *,
    quick: bool = False,
    threads: int = 1,
    device: str = "cpu",
    whole: bool = False,
    unit: str = "us",
    note: str = "",
    only: str = "",
    keep_going: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Runs the cases of one benchmark.

    Args:
        name: of the benchmark.
        cases: made one at a time, so that only one is in memory.
        quick: fewer samples.
        threads: of torch; with more than one the clock is the wall's.
        device: "cpu" or "cuda".
        whole: see `timer_for`.
        unit: of the table's times: "us", "ms" or "s".
        note: printed under the table.
        only: cases whose name holds this.
        keep_going: run the other cases when one is wrong or fails; "failed" of the record has them.
        say: gets the name of each case before it runs.

    Returns:
        The record: what `markdown` prints and what the JSON line holds.

    Raises:
        WrongAnswer: see `verify`; and whatever a case raises. Neither with keep_going.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    timer = timer_for(device, threads, whole=whole)
    repeats, budget_s = (5, 2.0) if quick else (15, 20.0)
    if device == "cuda" and not whole:
        repeats, budget_s = (20, 1.0) if quick else (50, 4.0)
    about = machine() | ({"gpu": gpu()} if device == "cuda" else {})
    before = measure(device, threads, repeats=5)
    rows, failed = [], []
    for case in made(cases, device):
        title = "while a case was made" if isinstance(case, Exception) else case.name
        try:
            if isinstance(case, Exception):
                raise case
            if only in title:
                say(title)
                rows.append(run_case(case, timer=timer, repeats=repeats, budget_s=budget_s, device=device,
                                     keep_going=keep_going))  # fmt: skip
        except Exception as e:
            if not keep_going:
                raise
            failed.append({"case": title, "why": f"{type(e).__name__}: {e}"[:500]})
        del case  # and what it holds, before the next is made
        if device == "cuda":
            torch.cuda.empty_cache()
    after = measure(device, threads, repeats=5)
    limits = Limits(**{k: statistics.fmean((v, after.as_dict()[k])) for k, v in before.as_dict().items()})
    rows = [place(row, limits) for row in rows]
    return {
        "benchmark": name,
        "quick": quick,
        "device": device,
        "threads": threads,
        "clock": timer.name,
        "unit": unit,
        "note": note,
        **about,
        "load_after": os.getloadavg(),
        "limits": limits.as_dict(),
        "cases": rows,
        "failed": failed,
        "geometric_mean": geometric_means(rows),
    }


def text(record: Mapping[str, Any]) -> str:
    """A record as it is printed: title, table, limits, note."""
    where = f"{record['hardware']['cpu']}, {record['threads']} thread(s)"
    if gpu := record.get("gpu"):
        where = f"{gpu['name']}, CUDA {gpu['cuda']}, torch {record['versions']['torch']}"
    lines = [
        f"## {record['benchmark']}",
        "",
        markdown(record),
        "",
        f"{where}, {record['clock']}, medians, interleaved; "
        f"load {record['load'][0]:.1f} to {record['load_after'][0]:.1f}; commit {record['commit']}. "
        f"{Limits(**record['limits'])}. A ratio is the peer's time over ours.",
    ]
    lines += [record["note"]] if record["note"] else []
    for bad in record.get("failed", ()):
        lines += ["", f"**Failed**: {bad['case']}: {bad['why']}"]
    return "\n".join(lines)


def main(
    name: str,
    cases: Callable[[bool], Iterable[Case | Callable[[], Case]]],
    *,
    cuda: Callable[[bool], Iterable[Case | Callable[[], Case]]] | None = None,
    whole: bool = False,
    unit: str = "us",
    note: str = "",
    argv: Sequence[str] | None = None,
) -> None:
    """The command line of a benchmark file: prints its table, and its record as the last line.

    Args:
        name: of the benchmark.
        cases: of (quick), on the CPU.
        cuda: of (quick), on a GPU; functions that make a case, so that one that fails costs only itself.
        whole: see `benchmark`.
        unit: likewise.
        note: likewise.
        argv: of the command line; None: the process's.

    Raises:
        SystemExit: 1 with a sentence that names the case, for a wrong answer; with --keep-going, after the record.
    """
    parser = argparse.ArgumentParser(prog=f"bench_{name}")
    parser.add_argument("--quick", action="store_true", help="fewer cases and samples")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--keep-going", action="store_true", help="run the other cases when one fails")
    args = parser.parse_args(argv)
    if args.device == "cuda":
        if cuda is None:
            raise SystemExit(f"{name}: has no cases for CUDA")
        if not torch.cuda.is_available():
            raise SystemExit(f"{name}: torch sees no CUDA device")
        cases = cuda
    try:
        record = benchmark(name, cases(args.quick), quick=args.quick, threads=args.threads, device=args.device, whole=whole,
                           unit=unit, note=note, only=args.case, keep_going=args.keep_going,
                           say=lambda case: print(f"  {name}: {case}", file=sys.stderr, flush=True))  # fmt: skip
    except WrongAnswer as e:
        raise SystemExit(f"{name}: {e}") from e
    print(text(record))
    print(json.dumps(record), flush=True)
    if record["failed"]:
        raise SystemExit(f"{name}: failed: {'; '.join(bad['case'] for bad in record['failed'])}")

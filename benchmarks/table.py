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
from grpo_engine import _C  # noqa: E402
from grpo_engine.system.machine import collect_hardware, collect_source, collect_versions, num_cores  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OURS = "ours"
LADDER, REAL = "ladder", "real"  # sizes: of the embedded study and single ops; of published checkpoints
UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0}
BITS = {"cpu": "bits_by_threads", "cuda": "bits_twice"}  # keys of a row
UNCOUNTED = "bits_1_vs_2_threads"  # of older records, which compared one thread with itself: shown, and worth nothing
CHECKS = {
    BITS["cpu"]: "bits 1 = n threads",
    UNCOUNTED: "bits 1 = 2 threads, not counted",
    BITS["cuda"]: "same bits twice",
    "batch_invariant": "alone = in batch",
}
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
    heavy: bool = False  # a call takes seconds on the CPU: the one that is checked also warms up
    flops: float = 0.0
    nbytes: float = 0.0  # read and written at least once
    products: torch.dtype = torch.float32  # operands of the products, which decide a GPU's limit
    derived: Mapping[str, Callable[[float], float]] = field(default_factory=dict)  # column -> of the seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Later:
    """A case that is made when its turn comes, and not at all where its name is not asked for."""

    name: str  # the case's
    make: Callable[[], Case]

    def __call__(self) -> Case:
        return self.make()


def thread_count(text: str) -> int:
    """A number of threads as it is given on the command line: an integer >= 1, or "all" for all cores."""
    if text == "all":
        return num_cores()
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer >= 1 or "all", got {text!r}')
    return int(text)


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


def bits_by_threads(run: Run) -> dict[str, Any]:
    """Runs a function on 1 thread, on 2 and on all cores, and counts the threads that took part in our kernels.

    Args:
        run: keeps no state.

    Returns:
        "asked": the numbers of threads; "took_part": how many did, of each; "equal": whether all results have the same
        bits. Equal bits say something of n threads only where n took part: see `verdict`.

    Raises:
        RuntimeError: more threads took part than were asked for, so that nothing was compared with one thread.
    """
    before = torch.get_num_threads()
    asked = sorted({1, 2, num_cores()})
    took_part: list[int] = []
    one, equal = None, True
    try:
        for threads in asked:
            torch.set_num_threads(threads)
            _C.start_counting_threads()
            try:
                result = run()
            finally:
                took_part.append(_C.stop_counting_threads())
            if took_part[-1] > threads:
                raise RuntimeError(f"{took_part[-1]} threads took part where {threads} were asked for")
            one = result if threads == 1 else one
            equal = equal and same_bits(one, result)
            del result
    finally:
        torch.set_num_threads(before)
    return {"equal": equal, "asked": asked, "took_part": took_part}


def check_bits(run: Run, device: str) -> dict[str, Any] | bool:
    """See `bits_by_threads`; on CUDA, whether two runs return the same bits."""
    return same_bits(run(), run()) if device == "cuda" else bits_by_threads(run)


def verdict(check: dict[str, Any] | bool | None) -> str:
    """A check as the table shows it. It says "yes" of threads only where a second one took part."""
    if not isinstance(check, dict):
        return {True: "yes", False: "NO", None: ""}[check]
    if not check["equal"]:
        return "NO"
    most = max(check["took_part"])
    return f"yes, {most} threads" if most > 1 else "1 thread" if most else "not counted"


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
    bits = check_bits(case.bits or case.ours, device)
    alone = case.alone(mine) if case.alone is not None else None
    del mine
    repeats = max(repeats, case.at_least)
    taken = interleave(
        runs, timer=timer, repeats=repeats, budget_s=budget_s, at_least=case.at_least, warm=case.heavy
    )  # fmt: skip
    times = {}
    for name, samples in taken.items():
        times[name] = spread(samples)
        if samples.parts:
            times[name]["parts_s"] = {piece: statistics.median(seconds) for piece, seconds in samples.parts.items()}
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
    times = {OURS: [row["ours"] for row in rows]} | {
        name: [row["peers"].get(name, {}) for row in rows] for name in names
    }  # fmt: skip
    parts = {who: list(dict.fromkeys(k for one in of for k in one.get("parts_s", ()))) for who, of in times.items()}
    both = {"forward", "backward"} <= set(parts[OURS])
    header = ["case", unit, *parts[OURS], *["backward / forward"] * both, "rate", "of limit", *derived]
    for name in names:
        header += [name, "ratio", *(f"its {piece}" for piece in parts[name])]
    checks = [key for key in CHECKS if any(key in row for row in rows)]
    header += [CHECKS[key] for key in checks]
    lines = [header]
    for row in rows:
        rate = giga(row["gflops"], "FLOP/s") if row["bound"] == "compute" else giga(row["gbytes"], "B/s")
        mine = row["ours"].get("parts_s", {})
        line = [row["case"], number(row["ours"]["median_s"] * scale)]
        line += [number(mine[k] * scale) if k in mine else "" for k in parts[OURS]]
        line += ([f"{mine['backward'] / mine['forward']:.2f}"] if set(mine) >= {"forward", "backward"} else [""]) * both
        line += [rate, f"{row['share']:.0%} {row['bound']}"]
        line += [number(row["ours"][k]) if k in row["ours"] else "" for k in derived]
        for name in names:
            peer = row["peers"].get(name, {"missing": ""})
            if "missing" in peer:
                line += [peer["missing"], "", *[""] * len(parts[name])]
            else:
                line += [number(peer["median_s"] * scale), f"{peer['ratio']:.2f}"]
                theirs = peer.get("parts_s", {})
                line += [number(theirs[k] * scale) if k in theirs else "" for k in parts[name]]
        line += [verdict(row.get(k)) for k in checks]
        lines.append(line)
    mean = ["geometric mean"] + [""] * (len(header) - 1)
    for name, value in record["geometric_mean"].items():
        mean[header.index(name) + 1] = f"{value:.2f}"
    lines.append(mean)
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a header and rows, its columns as wide in the text as they must be."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
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


def made(cases: Iterable[Case | Callable[[], Case]], device: str, only: str = "") -> Iterator[Case | Exception]:
    """The cases one at a time, with the tensors that are made for them on a device.

    Args:
        cases: each a case, or what makes it.
        device: "cpu" or "cuda".
        only: a `Later` whose name does not hold this is left out.

    Yields:
        A case, or what was raised when one was made. A generator that raised ends.
    """
    cases = iter(cases)
    while True:
        try:
            with torch.device(device):
                case = next((one for one in cases if not isinstance(one, Later) or only in one.name), None)
                case = case() if callable(case) else case
        except Exception as e:
            case = e
        if case is None:
            return
        yield case


def machine() -> dict[str, Any]:
    """Hardware, versions, commit and load: what a number cannot be read without."""
    versions = collect_versions()
    for name in PEER_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "hardware": collect_hardware(),
        "versions": versions,
        "commit": collect_source()["commit"],
        "load": os.getloadavg(),
    }


def benchmark(
    name: str,
    cases: Iterable[Case | Callable[[], Case]],
    *,
    quick: bool = False,
    sizes: str = LADDER,
    threads: int = 1,
    device: str = "cpu",
    whole: bool = False,
    unit: str = "us",
    note: str = "",
    only: str = "",
    keep_going: bool = False,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Runs the cases of one benchmark.

    Args:
        name: of the benchmark.
        cases: made one at a time, so that only one is in memory.
        quick: fewer samples.
        sizes: LADDER or REAL: what the cases are, for the record.
        threads: of torch; with more than one the clock is the wall's.
        device: "cpu" or "cuda".
        whole: see `timer_for`.
        unit: of the table's times: "us", "ms" or "s".
        note: printed under the table.
        only: cases whose name holds this.
        keep_going: run the other cases when one is wrong or fails; "failed" of the record has them.
        say: gets the name of each case before it runs.
        keep: gets the record of the cases so far after each of them, "finished" false, so that a benchmark that is
            stopped leaves what it measured.

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

    def record(finished: bool) -> dict[str, Any]:
        after = measure(device, threads, repeats=5) if finished else before
        limits = Limits(**{k: statistics.fmean((v, after.as_dict()[k])) for k, v in before.as_dict().items()})
        placed = [place(row, limits) for row in rows]
        return {
            "benchmark": name,
            "quick": quick,
            "sizes": sizes,
            "device": device,
            "threads": threads,
            "cores": num_cores(),
            "clock": timer.name,
            "unit": unit,
            "note": note,
            **about,
            "load_after": os.getloadavg(),
            "limits": limits.as_dict(),
            "finished": finished,
            "cases": placed,
            "failed": failed,
            "geometric_mean": geometric_means(placed),
        }

    for case in made(cases, device, only):
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
        keep(record(finished=False))
    return record(finished=True)


def threads_text(record: Mapping[str, Any]) -> str:
    """On how many threads a record was taken, and of how many cores where it says so."""
    threads = record["threads"]
    of = f" of {record['cores']} cores" if "cores" in record else ""
    return f"{threads} thread{'s' * (threads > 1)}{of}"


def title(record: Mapping[str, Any]) -> str:
    """The heading of a record: which benchmark, of which sizes, on how many threads."""
    if record.get("gpu"):
        return record["benchmark"]
    sizes = ", sizes of published checkpoints" if record.get("sizes") == REAL else ""
    return f"{record['benchmark']}{sizes}, {threads_text(record)}"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record whole: whoever reads the file meanwhile finds this one or the one before."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def file_stem(record: Mapping[str, Any]) -> str:
    """Name of a record's file: NAME, NAME.all_cores, NAME.real, NAME.real.all_cores, or with another number of threads."""
    stem, threads = record["benchmark"], record["threads"]
    if record.get("sizes") == REAL:
        stem += ".real"
    if threads > 1:
        stem += ".all_cores" if threads == record.get("cores") else f".{threads}_threads"
    return stem


def speed_up_table(record: Mapping[str, Any]) -> str:
    """The table of a record that holds the same work on several numbers of threads."""
    unit, rows = record["unit"], record["speed_up"]
    numbers = list(rows[0]["threads"])
    header = ["case", f"1 thread, {unit}"]
    for n in numbers[1:]:
        header += [f"{n} threads", "speed-up", "took part"]
    lines = [header]
    for row in rows:
        line = [row["case"], number(row["threads"]["1"]["median_s"] * UNITS[unit])]
        for n in numbers[1:]:
            taken = row["threads"][n]
            line += [number(taken["median_s"] * UNITS[unit]), f"{taken['speed_up']:.2f}", str(taken["took_part"])]
        lines.append(line)
    return aligned(lines)


def text(record: Mapping[str, Any]) -> str:
    """A record as it is printed: title, table, limits, note."""
    where = f"{record['hardware']['cpu']}, {threads_text(record)}"
    if gpu := record.get("gpu"):
        where = f"{gpu['name']}, CUDA {gpu['cuda']}, torch {record['versions']['torch']}"
    how = (
        f"{where}, {record['clock']}, medians, interleaved; "
        f"load {record['load'][0]:.1f} to {record['load_after'][0]:.1f}; commit {record['commit']}."
    )
    if "speed_up" in record:
        lines = [f"## {title(record)}", "", speed_up_table(record), "", how]
    else:
        how += f" {Limits(**record['limits'])}. A ratio is the peer's time over ours."
        lines = [f"## {title(record)}", "", markdown(record), "", how]
    lines += [record["note"]] if record["note"] else []
    if not record.get("finished", True):
        lines += ["", "**Unfinished**: the benchmark was stopped before its other cases."]
    for bad in record.get("failed", ()):
        lines += ["", f"**Failed**: {bad['case']}: {bad['why']}"]
    return "\n".join(lines)


def main(
    name: str,
    cases: Callable[[bool], Iterable[Case | Callable[[], Case]]],
    *,
    real: Callable[[bool], Iterable[Case | Callable[[], Case]]] | None = None,
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
        real: of (quick), on the CPU: the cases of --real, with the shapes of published checkpoints.
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
    parser.add_argument("--threads", type=thread_count, default=1, metavar="N|all", help="all: every core; default 1")
    parser.add_argument("--real", action="store_true", help="the shapes of published checkpoints instead")
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--keep-going", action="store_true", help="run the other cases when one fails")
    parser.add_argument(
        "--record",
        type=Path,
        default=None,
        metavar="FILE",
        help="write the record there too, after every case: a run that is stopped leaves what it measured",
    )
    args = parser.parse_args(argv)
    if args.device == "cuda":
        if cuda is None:
            raise SystemExit(f"{name}: has no cases for CUDA")
        if not torch.cuda.is_available():
            raise SystemExit(f"{name}: torch sees no CUDA device")
        cases = cuda
    elif args.real:
        if real is None:
            raise SystemExit(f"{name}: has no cases of published sizes")
        cases = real

    def keep(record: dict[str, Any]) -> None:
        if args.record is not None:
            write_record(args.record, record)

    try:
        record = benchmark(name, cases(args.quick), quick=args.quick, sizes=REAL if args.real else LADDER,
                           threads=args.threads, device=args.device, whole=whole, unit=unit,
                           note=note, only=args.case, keep_going=args.keep_going,
                           say=lambda case: print(f"  {name}: {case}", file=sys.stderr, flush=True),
                           keep=keep)  # fmt: skip
    except WrongAnswer as e:
        raise SystemExit(f"{name}: {e}") from e
    keep(record)
    print(text(record))
    print(json.dumps(record), flush=True)
    if record["failed"]:
        raise SystemExit(f"{name}: failed: {'; '.join(bad['case'] for bad in record['failed'])}")

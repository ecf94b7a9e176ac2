"""Speed-up of training and rollout by threads: three sizes of the ladder, or SmolLM2-135M and Qwen2.5-0.5B."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import argparse  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable, Iterator, Mapping, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from benchmarks import table  # noqa: E402
from benchmarks.bench_rollout import Rollout  # noqa: E402
from benchmarks.bench_training import Training  # noqa: E402
from benchmarks.limits import Run, interleave, timer_for  # noqa: E402
from benchmarks.shapes import REAL, equal_lengths, ladder_config, random_model  # noqa: E402
from grpo_engine import _C  # noqa: E402
from grpo_engine.model.decoder import Model  # noqa: E402
from grpo_engine.system.machine import num_cores  # noqa: E402
from grpo_engine.system.memory import keep_freed_memory  # noqa: E402

MICRO = ("0.025M", "0.2M", "0.8M")
NOTE = (
    "One process; the numbers of threads take turns. A speed-up is the time on one thread over the time on n. `took part`: "
    "the most threads that our kernels were counted on in one call."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is run on several numbers of threads; made when its turn comes."""

    name: str
    make: Callable[[], Run]
    heavy: bool = False  # a call takes seconds


def numbers_of_threads(most: int) -> list[int]:
    """1, 2, 4 and so on, and the most."""
    return sorted({1, most} | {2**i for i in range(1, most.bit_length()) if 2**i <= most})


def works(quick: bool, real: bool) -> Iterator[Work]:
    def micro(size: str) -> Model:
        return Model(ladder_config(size)).init_weights(1, std=None)

    def training(model: Model, count: int, length: int) -> Training:
        return Training(model, [torch.randint(model.config.vocab_size, (length + 1,)) for _ in range(count)])

    def rollout(model: Model, prompts: int, group: int, prompt: int, new: int) -> Run:
        inputs = torch.randint(model.config.vocab_size, (prompts, prompt))
        return Rollout(model, inputs, group, equal_lengths(prompts, new)).run

    if not real:
        for size in MICRO[1:2] if quick else MICRO:
            yield Work(
                name=f"training step, {size}, 256 x 24 tokens", make=lambda size=size: training(micro(size), 256, 24).step
            )  # fmt: skip
            yield Work(
                name=f"rollout, {size}, 32 x 8 answers of 16", make=lambda size=size: rollout(micro(size), 32, 8, 8, 16)
            )  # fmt: skip
        return
    count, length, new = (1, 32, 2) if quick else (2, 256, 16)
    for size in ("135M",) if quick else REAL:

        def passes(size=size):
            return training(random_model(REAL[size](), torch.float32), count, length).forward_and_backward

        def answers(size=size):
            return rollout(random_model(REAL[size](), torch.bfloat16).requires_grad_(False), 8, 8, 32, new)

        yield Work(name=f"forward and backward, {size} float32, {count} x {length} tokens", make=passes, heavy=True)
        yield Work(name=f"rollout, {size} bfloat16, 8 x 8 answers of {new}", make=answers, heavy=True)


def on(threads: int, run: Run) -> Run:
    """The same call, on a number of threads of its own."""

    def call() -> Any:
        torch.set_num_threads(threads)
        return run()

    return call


def took_part(run: Run) -> int:
    """Threads that took part in our kernels in one call."""
    _C.start_counting_threads()
    try:
        run()
    finally:
        count = _C.stop_counting_threads()
    return count


def measure(work: Work, threads: Sequence[int], *, quick: bool) -> dict[str, Any]:
    """One row: the times on each number of threads, how many took part, and the speed-up.

    Args:
        work: what is run.
        threads: numbers of threads, 1 first.
        quick: fewer samples.

    Returns:
        The row's record.
    """
    run = work.make()
    runs = {str(n): on(n, run) for n in threads}
    counts = {n: took_part(call) for n, call in runs.items()}
    samples = interleave(
        runs, timer=timer_for("cpu", max(2, *threads)), repeats=5 if quick else 9, budget_s=5.0 if quick else 20.0,
        warm=work.heavy,
    )  # fmt: skip
    times = {n: table.spread(taken) for n, taken in samples.items()}
    one = times["1"]["median_s"]
    taken = {n: t | {"took_part": counts[n], "speed_up": one / t["median_s"]} for n, t in times.items()}
    return {"case": work.name, "threads": taken}


def benchmark(*, quick: bool, real: bool, most: int) -> dict[str, Any]:
    """The record: a row for each piece of work."""
    keep_freed_memory()  # as a run does
    torch.manual_seed(0)
    about = table.machine()
    rows = []
    for work in works(quick, real):
        print(f"  thread_scaling: {work.name}", file=sys.stderr, flush=True)
        rows.append(measure(work, numbers_of_threads(most), quick=quick))
    return {
        "benchmark": "thread_scaling", "quick": quick, "sizes": table.REAL if real else table.LADDER, "threads": most,
        "cores": num_cores(), "unit": "ms", "note": NOTE, "clock": timer_for("cpu", max(2, most)).name, **about,
        "load_after": table.os.getloadavg(), "cases": [], "speed_up": rows, "geometric_mean": {},
    }  # fmt: skip


def figure(record: Mapping[str, Any], path: Path) -> None:
    """Speed-up against threads, a panel for training and one for rollout, a line a size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for row in record["speed_up"]:
        panel = panels["rollout" in row["case"]]
        threads = [int(n) for n in row["threads"]]
        panel.plot(threads, [taken["speed_up"] for taken in row["threads"].values()], "o-", label=row["case"])
        panel.plot(threads, threads, "--", color="#999999", linewidth=1)
        panel.set(xlabel="threads", xticks=threads)
    panels[0].set_ylabel("speed-up over one thread")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    pyplot.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench_thread_scaling")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and samples")
    parser.add_argument("--real", action="store_true", help="only the sizes of published checkpoints")
    parser.add_argument("--threads", type=table.thread_count, default=num_cores(), metavar="N|all", help="the most")
    parser.add_argument("--figure", type=Path, default=None, help="also draw this file")
    args = parser.parse_args(argv)
    if args.threads < 2:
        raise SystemExit("thread_scaling: needs two threads or more, got one; --threads says how many")
    record = benchmark(quick=args.quick, real=args.real, most=args.threads)
    if args.figure is not None:
        figure(record, args.figure)
    print(table.text(record))
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

"""Cost against batch, length, vocabulary and size: a figure, and a check that no cost outgrows its arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import statistics  # noqa: E402
from collections.abc import Callable, Iterator, Mapping, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from benchmarks import table  # noqa: E402
from benchmarks.bench_rollout import Rollout  # noqa: E402
from benchmarks.bench_training import Training  # noqa: E402
from benchmarks.limits import interleave, timer_for  # noqa: E402
from benchmarks.shapes import LADDER, LADDER_VOCABULARY, ladder_config, sequence_flops  # noqa: E402
from grpo_engine import ops  # noqa: E402
from grpo_engine.model.decoder import Model  # noqa: E402
from grpo_engine.system.machine import num_cores  # noqa: E402
from grpo_engine.system.memory import keep_freed_memory  # noqa: E402

EXPONENT = 1.2  # of time against arithmetic over an axis's last three points; 1 is proportional


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One way to make a piece of work larger."""

    name: str
    label: str  # of the values
    work: str  # unit of the arithmetic: "FLOP" or "B"
    values: Sequence[float]
    runs: Sequence[Callable[[], object]]
    arithmetic: Sequence[float]  # of each run


def training(size, count, length):
    model = Model(ladder_config(size, positions=4096)).init_weights(1, std=None)
    sequences = [torch.randint(LADDER_VOCABULARY, (length + 1,)) for _ in range(count)]
    flops = 3.0 * sequence_flops(model, [length] * count, head_rows=count * length)
    return model.num_non_embedding, Training(model, sequences).step, flops


def rollout(prompts, new):
    model = Model(ladder_config("0.2M", positions=4096)).init_weights(1, std=None)
    mine = Rollout(model, torch.randint(LADDER_VOCABULARY, (prompts, 8)), 8, [new] * prompts)
    return mine.run, mine.flops()


def axes(quick: bool) -> Iterator[Axis]:
    """The axes, each with at least three points."""

    def axis(name, label, values, made, work="FLOP"):
        runs, arithmetic = zip(*made, strict=True)
        return Axis(name=name, label=label, work=work, values=values, runs=runs, arithmetic=arithmetic)

    counts = (16, 64, 256) if quick else (16, 64, 256, 1024)
    yield axis("training, batch", "sequences of 24 tokens, 0.2M", counts, [training("0.2M", n, 24)[1:] for n in counts])
    lengths = (32, 128, 512) if quick else (32, 128, 512, 2048)
    yield axis("training, length", "tokens a sequence, 8 sequences, 0.2M", lengths,
               [training("0.2M", 8, n)[1:] for n in lengths])  # fmt: skip
    sizes = [training(size, 64, 24) for size in (tuple(LADDER)[:3] if quick else LADDER)]
    yield axis("training, size", "non-embedding parameters, 64 x 24 tokens", [s[0] for s in sizes], [s[1:] for s in sizes])
    prompts = (1, 4, 16) if quick else (1, 4, 16, 64)
    yield axis("rollout, batch", "answers of 16 tokens, 0.2M", [8 * p for p in prompts], [rollout(p, 16) for p in prompts])
    news = (16, 64, 256) if quick else (16, 64, 256, 1024)
    yield axis("rollout, length", "tokens an answer, 32 answers, 0.2M", news, [rollout(4, n) for n in news])

    def logprob(V):
        hidden, weight, target = torch.randn(64, 64), torch.randn(V, 64), torch.randint(V, (64,))
        return (lambda: ops.token_logprob(hidden, weight, target)), 2.0 * 64 * 64 * V

    def sample(V):
        logits, seed, position = torch.randn(8, V), torch.arange(8), torch.zeros(8, dtype=torch.int64)
        return (lambda: ops.sample_token(logits, seed=seed, position=position)), 4.0 * 8 * V

    vocabularies = (512, 4096, 32768) if quick else (512, 4096, 32768, 262_144)
    yield axis("token_logprob, vocabulary", "V, 64 rows of 64", vocabularies, [logprob(V) for V in vocabularies])
    yield axis("sample_token, vocabulary", "V, 8 rows", vocabularies, [sample(V) for V in vocabularies], work="B")


def exponent(arithmetic: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log time against log arithmetic over the last three points, by least squares."""
    x, y = ([math.log(v) for v in values[-3:]] for values in (arithmetic, seconds))
    return statistics.linear_regression(x, y).slope


def run(*, quick: bool, threads: int) -> dict[str, Any]:
    """The record of all axes: one case a point, and `growth` with the exponent of each axis."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as a run does
    torch.manual_seed(0)
    timer = timer_for("cpu", threads)
    about = table.machine()
    limits = table.measure("cpu", threads)
    rows, growth = [], []
    for axis in axes(quick):
        print(f"  scaling: {axis.name}", file=sys.stderr, flush=True)
        runs = {str(i): r for i, r in enumerate(axis.runs)}
        samples = interleave(runs, timer=timer, repeats=5 if quick else 9, budget_s=5.0 if quick else 30.0)
        times = [table.spread(taken) for taken in samples.values()]
        for value, arithmetic, taken in zip(axis.values, axis.arithmetic, times, strict=True):
            flops, nbytes = (arithmetic, 0.0) if axis.work == "FLOP" else (0.0, arithmetic)
            row = {"case": f"{axis.name}: {value:,}", "tolerance": None, "errors": {}, "ours": taken, "peers": {},
                   "flops": flops, "nbytes": nbytes, "bits_by_threads": None, "batch_invariant": None}  # fmt: skip
            rows.append(table.place(row, limits))
        seconds = [taken["median_s"] for taken in times]
        growth.append({"axis": axis.name, "label": axis.label, "values": list(axis.values), "seconds": seconds,
                       "arithmetic": list(axis.arithmetic), "exponent": exponent(axis.arithmetic, seconds)})  # fmt: skip
    note = "Time against arithmetic, last three points (1 is proportional): " + ", ".join(
        f"{g['axis']} {g['exponent']:.2f}" for g in growth
    )
    return {
        "benchmark": "scaling", "quick": quick, "threads": threads, "cores": num_cores(), "unit": "us",
        "note": f"{note}. Allowed {EXPONENT}.", "clock": timer.name, **about, "load_after": table.os.getloadavg(),
        "limits": limits.as_dict(), "cases": rows, "geometric_mean": {}, "growth": growth,
    }  # fmt: skip


def figure(record: Mapping[str, Any], path: Path) -> None:
    """One panel an axis: measured time, and what is proportional to the arithmetic through the last point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    growth = record["growth"]
    columns = 4
    fig, panels = pyplot.subplots(-(-len(growth) // columns), columns, figsize=(16, 7), squeeze=False)
    for panel in panels.flat[len(growth) :]:
        panel.axis("off")
    for panel, g in zip(panels.flat, growth, strict=False):
        last = g["seconds"][-1] / g["arithmetic"][-1]
        panel.loglog(g["values"], [1e3 * s for s in g["seconds"]], "o-", color="#1f5fa8", label="measured")
        panel.loglog(g["values"], [1e3 * last * a for a in g["arithmetic"]], "--", color="#999999", label="arithmetic")
        panel.set_xticks(g["values"], [f"{v:,}" for v in g["values"]])  # those of a logarithmic axis would overlap
        panel.set_xticks([], minor=True)
        panel.set(title=f"{g['axis']} (exponent {g['exponent']:.2f})", xlabel=g["label"], ylabel="ms")
        panel.grid(alpha=0.3)
    panels[0, 0].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    pyplot.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench_scaling")
    parser.add_argument("--quick", action="store_true", help="fewer points and samples")
    parser.add_argument("--threads", type=table.thread_count, default=1, metavar="N|all")
    parser.add_argument("--figure", type=Path, default=None, help="also draw this file")
    args = parser.parse_args(argv)
    record = run(quick=args.quick, threads=args.threads)
    if args.figure is not None:
        figure(record, args.figure)
    print(table.text(record))
    print(json.dumps(record), flush=True)
    if bad := [f"{g['axis']} ({g['exponent']:.2f})" for g in record["growth"] if not g["exponent"] <= EXPONENT]:
        raise SystemExit(f"scaling: time outgrows arithmetic, exponent allowed {EXPONENT}: {', '.join(bad)}")


if __name__ == "__main__":
    main()

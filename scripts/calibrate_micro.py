"""Remakes docs/calibration.md: is the embedded study an instrument that can show anything?

    .venv/bin/python scripts/calibrate_micro.py [--out runs/calibration] [--jobs 2]
    .venv/bin/python scripts/calibrate_micro.py --page      # the page alone, from scripts/calibrate_micro.json

It answers with every model of the `micro` preset, and tries learning rates on bases that the study does not use: all on
selection problems, so that nothing is settled on the test set. What is done is kept in the folder: a run that was
killed goes on. scripts/calibrate_micro.json holds the records. Every figure of the page and of its picture is one of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from grpo_engine.config import ModelSource, RunConfig, validate
from grpo_engine.evaluate.evaluate import EvalResult
from grpo_engine.micro import facts, ladder, pretrain
from grpo_engine.records import jsonl, records
from grpo_engine.records.cost import total_cost
from grpo_engine.study.design import AxesConfig, StudyConfig, load_study, plan
from grpo_engine.study.forecast import num_params
from grpo_engine.study.report.drawing import Figure, Key, Panel, Series, draw, size_colors
from grpo_engine.study.run import run_study
from grpo_engine.system import machine

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECORDS = Path(__file__).with_suffix(".json")
SWEEP_SEED = 100  # of the bases and runs that rates are tried on; the study's are 0 to 4
RATES = {
    "xxs": (5e-4, 1e-3, 2e-3, 4e-3),
    "xs": (3e-4, 6e-4, 1.2e-3, 2.4e-3),
    "s": (2e-4, 4e-4, 8e-4, 1.6e-3),
    "m": (1e-4, 2e-4, 4e-4, 8e-4),
    "l": (6e-5, 1.2e-4, 2.4e-4),
}
HEADROOM = (0.10, 0.60)  # greedy accuracy that a base must have
LAST = 3  # evaluations at the end of a run whose mean loss decides between rates


# ------------------------------------------------------------------------------------------ measuring


def measure(out: Path, jobs: int) -> dict[str, Any]:
    """All records of the calibration.

    Args:
        out: folder of what is done already, and of what is done now.
        jobs: processes side by side.

    Returns:
        What scripts/calibrate_micro.json holds.
    """
    study = load_study("micro")
    bases = measured_bases(study, out / "bases", jobs)
    models = [pretrain.model_key(size, "base", seed=SWEEP_SEED) for size in study.sizes]
    sweep = out / f"sweep-{hashlib.sha256(' '.join(models).encode()).hexdigest()[:12]}"  # of other models: another folder
    result = run_study(sweep, study=sweep_study(study), jobs=jobs)
    if result.failures or result.interrupted is not None:
        raise SystemExit("the sweep is not finished: run this again")
    return {
        "hardware": machine.collect_hardware(),
        "versions": machine.collect_versions(),
        "tasks": {
            "limit": facts.LIMIT, "operand": facts.OPERAND, "corpus_terms": facts.CORPUS_TERMS, "terms": facts.TERMS,
            "error": ladder.LADDER["m"].corpus.error, "direct": ladder.LADDER["m"].corpus.direct,
        },
        "run": study.run,
        "bases": bases,
        "sweep": swept(study, sweep),
    }  # fmt: skip


def measured_bases(study: StudyConfig, out: Path, jobs: int) -> list[dict[str, Any]]:
    """Every embedded model of a study, on the selection problems."""
    out.mkdir(parents=True, exist_ok=True)
    needs = [n for n, _ in plan(study).models]
    files = {n: out / f"{pretrain.model_key(n.size, n.kind, seed=n.seed)}.json" for n in needs}
    missing = [n for n in needs if not files[n].exists()]
    missing.sort(key=lambda n: (n.kind, -list(study.sizes).index(n.size)))  # bases first, the longest first of all
    started = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(measured_base, n.size, n.kind, n.seed, study.run): n for n in missing}
        for done, future in enumerate(as_completed(running), start=1):
            need, record = running[future], future.result()
            jsonl.write_json_atomic(files[need], record)
            print(
                f"{need.name}: greedy {record['greedy']:.3f}, sampled {record['sample']:.3f} "
                f"({done} of {len(missing)} models, {time.monotonic() - started:.0f} s)", flush=True,
            )  # fmt: skip
    return [json.loads(files[n].read_text(encoding="utf-8")) for n in needs]


def measured_base(size: str, kind: str, seed: int, run: Mapping[str, Any]) -> dict[str, Any]:
    """One model: how well it answers, and what making it took (None: it was made before)."""
    from grpo_engine.evaluate.evaluate import evaluate_only

    started, made = time.process_time(), pretrain.cached_model(size, kind, seed=seed) is None
    pretrain.ensure_model(size, kind, seed=seed)
    seconds = time.process_time() - started
    data = {"model": {"size": size, "kind": kind, "seed": seed}}
    data |= {name: run[name] for name in ("rollout", "evaluation")}
    data["task"] = run["task"] | {"eval_draw": "selection"}
    results = {r.mode: r for r in evaluate_only(validate(RunConfig, data, where=size)) if r.eval_set == "chain"}
    sample: EvalResult = results["sample"]
    return {
        "size": size, "kind": kind, "seed": seed, "params": num_params(ModelSource(size=size)),
        "tokens": ladder.training_tokens(size, kind), "cpu_s": round(seconds, 1) if made else None,
        "greedy": results["greedy"].pass1, "greedy_stderr": results["greedy"].stderr,
        "sample": sample.pass1, "sample_stderr": sample.stderr,
        "problems": sample.num_problems, "samples": sample.num_samples,
    }  # fmt: skip


def sweep_study(study: StudyConfig) -> StudyConfig:
    """The micro study's runs of base models at several rates, each size on one base of its own, on selection problems."""
    run = study.run | {"task": study.run["task"] | {"eval_draw": "selection"}}
    axes = tuple(
        AxesConfig(
            name=f"rates of {size}", sizes=(size,), seeds=(SWEEP_SEED,),
            variants={f"lr{rate:g}": {"optimizer.lr": rate} for rate in rates},
        )
        for size, rates in RATES.items()
    )  # fmt: skip
    return study.model_copy(update={"name": "micro-rates", "run": run, "axes": axes})


def swept(study: StudyConfig, folder: Path) -> list[dict[str, Any]]:
    """The evaluations of the sweep's runs."""
    out = []
    for cell in plan(sweep_study(study)).cells:
        run = records.read_run(folder / cell.folder)
        evals = [e for e in run.evals if e.eval_set == "chain"]
        sample, greedy = ([e for e in evals if e.mode == mode] for mode in ("sample", "greedy"))
        seconds = sum(cost.seconds for cost in total_cost(run.timings).values())
        out.append({
            "size": cell.size, "lr": cell.config.optimizer.lr, "seconds": round(seconds, 1),
            "steps": [e.step for e in sample], "loss": [round(e.loss, 4) for e in sample],
            "stderr": [round(e.stderr or 0.0, 4) for e in sample], "greedy": [round(e.pass1, 4) for e in greedy],
            "change_stderr": round(change_stderr(sample[0], sample[-1]), 4),
        })  # fmt: skip
    return out


def change_stderr(first: records.EvalRecord, last: records.EvalRecord) -> float:
    """Standard error, over problems, of the change of the loss between two evaluations of the same problems."""
    changes = [
        b / last.num_samples - a / first.num_samples for a, b in zip(first.right or (), last.right or (), strict=True)
    ]
    return statistics.stdev(changes) / math.sqrt(len(changes))


def end_loss(run: Mapping[str, Any]) -> float:
    """What decides between rates: the mean loss of a run's last evaluations."""
    return statistics.fmean(run["loss"][-LAST:])


def chosen_rates(sweep: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rate of each size that ends with the lowest loss."""
    sizes = dict.fromkeys(r["size"] for r in sweep)
    return {s: min((r for r in sweep if r["size"] == s), key=end_loss)["lr"] for s in sizes}


# -------------------------------------------------------------------------------------------- the page


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def of_size(rows: Sequence[Mapping[str, Any]], size: str, **more: Any) -> list[Mapping[str, Any]]:
    return [r for r in rows if r["size"] == size and all(r[k] == v for k, v in more.items())]


def base_table(data: Mapping[str, Any]) -> str:
    rows = []
    for size in dict.fromkeys(b["size"] for b in data["bases"]):
        mine, chat = (of_size(data["bases"], size, kind=kind) for kind in ("base", "instruct"))
        answers = (", ".join(f"{b[mode]:.3f}" for b in group) for group in (mine, chat) for mode in ("greedy", "sample"))
        seconds = [b["cpu_s"] for b in mine if b["cpu_s"] is not None]
        took = f"{statistics.fmean(seconds):.0f}" if seconds else ""
        rows.append([size, f"{mine[0]['params']:,}", f"{mine[0]['tokens'] / 1e6:g}M", *answers, took])
    head = ["size", "N", "tokens read", "base: greedy", "sampled", "instruct: greedy", "sampled", "CPU seconds"]
    return table(head, rows)


def sweep_table(data: Mapping[str, Any]) -> str:
    chosen, rows = chosen_rates(data["sweep"]), []
    for r in data["sweep"]:
        rate = f"{r['lr']:g}"
        rows.append([
            r["size"], f"**{rate}**" if chosen[r["size"]] == r["lr"] else rate, f"{r['loss'][0]:.3f}", f"{end_loss(r):.3f}",
            f"{r['greedy'][0]:.3f}", f"{statistics.fmean(r['greedy'][-LAST:]):.3f}", f"{min(r['greedy']):.3f}",
        ])  # fmt: skip
    return table(["size", "rate", "loss before", "loss after", "greedy before", "greedy after", "lowest greedy"], rows)


def noise_table(data: Mapping[str, Any]) -> str:
    chosen, rows = chosen_rates(data["sweep"]), []
    for r in data["sweep"]:
        if chosen[r["size"]] == r["lr"]:
            gain, error = r["loss"][0] - r["loss"][-1], r["change_stderr"]
            spread = statistics.stdev(b["sample"] for b in of_size(data["bases"], r["size"], kind="base"))
            rows.append([
                r["size"], f"{r['stderr'][0]:.4f}", f"{r['stderr'][-1]:.4f}", f"{gain:.3f} ± {error:.3f}",
                f"{gain / error:.0f}", f"{spread:.3f}",
            ])  # fmt: skip
    return table(["size", "error before", "error after", "gain of the run", "gain / its error", "spread of bases"], rows)


def page(data: Mapping[str, Any]) -> str:
    """docs/calibration.md."""
    bases = [b for b in data["bases"] if b["kind"] == "base"]
    outside = [
        f"{b['size']}-{b['kind']}-{b['seed']} ({b['greedy']:.3f})" for b in data["bases"]
        if not HEADROOM[0] <= b["greedy"] <= HEADROOM[1]
    ]  # fmt: skip
    tasks, run = data["tasks"], data["run"]
    errors = [b["greedy_stderr"] for b in bases]
    return PAGE.format(
        cpu=data["hardware"]["cpu"], problems=bases[0]["problems"], sweep_seed=SWEEP_SEED,
        seeds=", ".join(str(s) for s in sorted({b["seed"] for b in bases})), highest=tasks["limit"] - 1,
        operand=tasks["operand"], fewest=min(tasks["terms"]), most=max(tasks["terms"]), error=tasks["error"],
        direct=tasks["direct"], temperature=run["evaluation"]["temperature"], low=HEADROOM[0], high=HEADROOM[1],
        verdict=f"outside are {', '.join(outside)}" if outside else "none is outside", least=min(errors),
        largest=max(errors), base_table=base_table(data), steps=run["steps"], prompts=run["batch"]["prompts"],
        group=run["batch"]["group_size"],
        last=LAST, sweep_table=sweep_table(data), samples=run["evaluation"]["samples"], noise_table=noise_table(data),
    )  # fmt: skip


PAGE = """# Calibration of the embedded study

The `micro` preset was settled on this, before any of its runs. `scripts/calibrate_micro.py` makes this page, its picture
and its records (`scripts/calibrate_micro.json`). Every measured figure here is one of those records. Measured on
{cpu}, two processes of one thread.

**Nothing was chosen on the test set.** All responses here are to *selection* problems ({problems} chains). They are a
second sample from the pool that is kept out of pretraining and RL, without any problem of the test sets
(`task.eval_draw: selection`). Learning rates are chosen on bases (seed {sweep_seed}) that the study does not use (its
own: {seeds}).

Tasks: values 0 to {highest}, operands to {operand}, {fewest} to {most} terms. In the corpus {error:.0%} of the written
values are wrong and {direct:.0%} of the sums are answered without working.

## Bases

The table has greedy accuracy, and pass@1 at temperature {temperature:g}, of the study's models. Each cell lists the
seeds {seeds}, in this order; a size with fewer models lists fewer. Greedy accuracy between {low:.0%} and {high:.0%} is
wanted, so that RL has something to teach and no ceiling is near; {verdict}. Standard errors of greedy accuracy over
problems: {least:.3f} to {largest:.3f}.

{base_table}

![Bases by size, and the end of each run by its learning rate](calibration.png)

## Learning rates

A run has {steps} steps of {prompts} prompts x {group} responses, one run a rate. "After" is the mean of the last {last}
evaluations. The preset takes the rate with the lowest loss (bold).

{sweep_table}

## Noise

The test loss of a point is a mean over {problems} problems x {samples} responses. The table is of the runs at the chosen
rates.

- Error is the standard error of the loss over problems.
- The gain is the loss before less the loss after. Its error is that of the difference, which is of the same problems.
- The spread of bases is what another base alone changes before RL: the standard deviation between the bases of a size.

Because of that spread, every seed of the main runs has a base of its own.

{noise_table}
"""


def picture(data: Mapping[str, Any], path: Path) -> None:
    """docs/calibration.png: the bases, and the end of each run by its rate."""
    sizes = list(dict.fromkeys(b["size"] for b in data["bases"]))
    colors, chosen = size_colors(sizes), chosen_rates(data["sweep"])
    bases, ends = [], []
    for mode, hollow in (("greedy", False), ("sample", True)):
        for size in sizes:
            mine = of_size(data["bases"], size, kind="base")
            bases.append(
                Series(label=f"{size}, {mode}", x=[b["params"] for b in mine], y=[b[mode] for b in mine], color=colors[size],
                       y_error=[b[f"{mode}_stderr"] for b in mine], line=False, hollow=hollow)
            )  # fmt: skip
    for size in sizes:
        mine = of_size(data["sweep"], size)
        best = of_size(mine, size, lr=chosen[size])
        for runs, style in ((mine, {"hollow": True}), (best, {"line": False})):
            ends.append(
                Series(label=size, x=[r["lr"] for r in runs], y=[end_loss(r) for r in runs], color=colors[size], **style)
            )
    figure = Figure(
        name="calibration", title="Calibration", caption="",
        panels=[
            Panel(title="Bases: dots greedy, rings T = 0.7", x_label="N, parameters without embedding",
                  y_label="accuracy on selection problems", series=bases, x_log=True, y_range=(0.0, 0.7)),
            Panel(title="End of a run by learning rate; dot: chosen", x_label="learning rate",
                  y_label="loss on selection problems", series=ends, x_log=True),
        ],
        legend=[Key(label=size, color=colors[size], shape="dot") for size in sizes],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        png, _ = draw(figure, Path(folder))
        shutil.move(png, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"), help="folder of runs and results")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--page", action="store_true", help="write page and picture from scripts/calibrate_micro.json")
    arguments = parser.parse_args()
    if not arguments.page:
        os.environ["OMP_NUM_THREADS"] = "1"
        jsonl.write_json_atomic(RECORDS, measure(arguments.out, arguments.jobs))
    data = json.loads(RECORDS.read_text(encoding="utf-8"))
    (DOCS / "calibration.md").write_text(page(data), encoding="utf-8")
    picture(data, DOCS / "calibration.png")
    print(f"{DOCS / 'calibration.md'}; learning rates: {chosen_rates(data['sweep'])}")


if __name__ == "__main__":
    main()

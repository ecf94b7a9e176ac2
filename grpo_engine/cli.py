"""The command `grpo-engine`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from grpo_engine.system.console import allow_any_text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Scaling studies of GRPO post-training: run them, fit their laws, read the recommendation.\n\n"
    "Start with [bold]grpo-engine study run smoke --out runs/smoke[/bold]: a complete small study in a few minutes on "
    "a laptop.",
)
study_app = typer.Typer(no_args_is_help=True, help="A whole study: plan, run, status, fit, report.")
app.add_typer(study_app, name="study")
console = Console(markup=False)  # paths and names are printed as they are

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings to change, dotted: optimizer.lr=1e-5 batch.group_size=16", show_default=False),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run or study; made when absent.")]
Preset = Annotated[str, typer.Argument(help="Preset (smoke, micro, paper, paper-v3) or YAML file.")]
Gpu = Annotated[str | None, typer.Option(help="a100, h100, h200, b200, l40s, l4 or mi300x; here: the one of this machine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StudyDir = Annotated[Path, typer.Argument(help="Folder of a study, as given to `study run --out`.")]


@app.command()
def doctor() -> None:
    """Say what is built, what this machine has, and whether the engine keeps its promises here."""
    from grpo_engine.system import doctor as d

    styled = Console()
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in d.facts().items():
        table.add_row(f"[bold]{name}[/bold]", value)
    styled.print(table)
    results = d.checks()
    for check in results:
        mark = "[green]ok[/green]    " if check.ok else "[red]BROKEN[/red]"
        styled.print(f"{mark} {check.name} ({check.detail})")
    if not all(c.ok for c in results):
        raise typer.Exit(1)


@app.command()
def train(
    out: Out,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="YAML file with a run configuration; none: the defaults.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; none: torch's default.")] = None,
    show_prompt: Annotated[
        bool, typer.Option("--show-prompt", help="Show the first prompt as text and tokens, and run nothing.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Run one GRPO training, or resume it where it stopped.

    Example: grpo-engine train --out runs/one model.size=s steps=40 optimizer.lr=1.5e-4
    """
    from grpo_engine.config import load_run_config

    if show_prompt:
        from grpo_engine.load import first_prompt

        return print(first_prompt(load_run_config(config, overrides or [])))
    from grpo_engine.run.run import train as run
    from grpo_engine.system.startup import skip_compiler

    skip_compiler()
    _set_threads(threads)
    folder = run(load_run_config(config, overrides or []), out)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    console.print(f"done: {folder} ({summary['steps']} steps, {summary['trained_tokens']:,} trained tokens)", soft_wrap=True)
    _print_run(folder)


@app.command()
def evaluate(
    config: Annotated[str | None, typer.Option("--config", "-c", help="YAML file with a run configuration.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder: model.path.")] = None,
    suite: Annotated[str | None, typer.Option(help="A suite of sets: paper.")] = None,
    data: Annotated[str, typer.Option(envvar="GRPO_ENGINE_DATA", help="Folder of the suite's problems.")] = "data",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the suite's answers and tables.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; none: torch's default.")] = None,
    overrides: Overrides = None,
) -> None:
    """Answer held-out problems with a model and print pass@1 with its standard error, or a suite's table.

    Example: grpo-engine evaluate --model checkpoints/qwen --suite paper --data data --out runs/qwen evaluation.samples=8

    Killed and started again, a suite goes on where it was. It asks for four answers of up to 4,096 tokens to each problem.
    """
    from grpo_engine.config import load_run_config
    from grpo_engine.evaluate.evaluate import evaluate_only

    _set_threads(threads)
    overrides = [*([f"model.path={json.dumps(model)}"] if model else []), *(overrides or [])]
    if suite is not None:
        return _evaluate_suite(config, suite, data, out, overrides)
    table = Table("set", "mode", "problems", "samples", "pass@1", "standard error")
    for r in evaluate_only(load_run_config(config, overrides)):
        error = "-" if r.stderr is None else f"{r.stderr:.4f}"
        table.add_row(r.eval_set, r.mode, str(r.num_problems), str(r.num_samples), f"{r.pass1:.4f}", error)
    console.print(table)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A GGUF file of a Qwen2, Llama or Qwen3 model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make, with config.json, safetensors and tokenizer.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")] = "float32",
) -> None:
    """Write a model of llama.cpp's as a Hugging Face folder.

    Example: grpo-engine convert smollm2-135m-instruct.gguf --out models/smollm2

    A .gguf file can also be given as model.path. It is then converted once, into the cache.
    """
    from grpo_engine.model import gguf

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    folder = gguf.convert(file, out, dtype="float32" if dtype == "float32" else "bfloat16")
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:,.0f} MB")


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="Responses with their truths: .jsonl or .parquet.")],
    scorer: Annotated[str, typer.Option(help="math, choice, exact, ..., or module:function.")] = "math",
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="Another scorer: math_verify, verl_prime, verl_math, lm_eval or module:function; repeatable. "
            "None: those that are installed."
        ),
    ] = None,
    response: Annotated[str | None, typer.Option(help="Field of the responses: response, output, completion, ...")] = None,
    truth: Annotated[str | None, typer.Option(help="Field of the truths: truth, ground_truth, doc.answer, ...")] = None,
    bare: Annotated[bool, typer.Option("--bare", help="The responses are answers alone, without a box.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSONL file for every verdict.")] = None,
    show: Annotated[int, typer.Option(help="Rows of each table; 0: all.")] = 20,
    limit: Annotated[int | None, typer.Option(help="At most this many rows of the file.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that score.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds for a response and a scorer; more is worth 0.")] = 10.0,
) -> None:
    """Score a file of responses with our verifier and with others', and list where they disagree.

    Example: grpo-engine score rollouts/120.jsonl --response output --truth gts
    """
    from grpo_engine.evaluate.audit import audit, summary, write_verdicts
    from grpo_engine.evaluate.audit import table as rows_of

    verdicts = audit(
        file, scorer=scorer, beside=beside, response=response, truth=truth, bare=bare, limit=limit, workers=workers,
        timeout_s=timeout,
    )  # fmt: skip
    if out is not None:
        write_verdicts(out, verdicts)
    disagreed = [v for v in verdicts if not v.agreed]
    for title, chosen in (("verdicts", verdicts), ("disagreements", disagreed)):
        shown = chosen[: show or None]
        if shown:
            of = f" ({len(shown)} of {len(chosen)})" if len(shown) < len(chosen) else ""
            _print_table(f"{title}{of}", rows_of(shown))
    _print_table("scorers", summary(verdicts))
    console.print(f"{len(verdicts)} responses, {len(disagreed)} disagreements" + (f": {out}" if out else ""), markup=False)


def _print_table(title: str, rows: list[list[str]]) -> None:
    from rich.text import Text

    heads, *body = rows
    table = Table(*heads, title=title, title_justify="left")
    for row in body:
        table.add_row(*(Text(cell) for cell in row))  # an answer's brackets are no markup
    Console(width=max(console.width, 120)).print(table)


@app.command()
def track(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run, complete or under way.")],
    to: Annotated[str, typer.Option(help="tensorboard, wandb (offline) or trackio; each must be installed.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the tracker's files.")] = Path("tracked"),
    project: Annotated[str, typer.Option(help="Name that wandb and trackio group runs under.")] = "grpo_engine",
) -> None:
    """Copy a run's records into a tracker.

    Example: grpo-engine track runs/one --to tensorboard --out runs/tensorboard
    """
    from grpo_engine.records.trackers import export

    console.print(f"{export(run_dir, to, out=out, project=project)} steps to {to}")


def _evaluate_suite(config: str | None, suite: str, data: str, out: Path | None, overrides: list[str]) -> None:
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from grpo_engine.config import load_run_config
    from grpo_engine.evaluate.suite import evaluate_suite, suite_files, tables

    if out is None:
        raise ValueError("--suite needs --out, the folder of its answers and tables")
    files = suite_files(suite, data)
    task = {"name": "files", "train": next(iter(files.values())), "evals": files, "eval_problems": None}
    settings = [f"task={json.dumps(task)}", "rollout.max_new_tokens=4096", *overrides]
    start = time.monotonic()
    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
        answers = bar.add_task("answers", total=None)
        results = evaluate_suite(
            load_run_config(config, settings), out,
            progress=lambda finished, total: bar.update(answers, completed=finished, total=total),
        )  # fmt: skip
    took, problems = time.monotonic() - start, sum(r.problems for r in results)
    for one in tables(results):
        table = Table(*one.head)
        for row in one.rows:
            table.add_row(*row)
        Console(width=max(console.width, 180)).print(table)
    console.print(f"{problems} problems in {took:.0f} s; {out / 'table.md'}", soft_wrap=True)


@study_app.command("plan")
def study_plan(
    preset: Preset,
    gpu: Gpu = None,
    usd_per_hour: Annotated[float | None, typer.Option(help="Price of one device for an hour.")] = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """List the cells of a study, what each needs and what it will cost, and run nothing; no weights or data are read.

    Example: grpo-engine study plan paper --gpu h200 --usd-per-hour 3
    """
    from grpo_engine.study.design import load_study, plan
    from grpo_engine.study.gpus import gpu_here
    from grpo_engine.study.plan_view import plan_json, plan_view

    assumed = {"estimate.gpu": gpu_here() if gpu == "here" else gpu, "estimate.usd_per_hour": usd_per_hour}
    settings = [f"{k}={v}" for k, v in assumed.items() if v is not None]
    the_plan = plan(load_study(preset, [*settings, *(overrides or [])]))
    if as_json:
        print(json.dumps(plan_json(the_plan), indent=1))
    else:
        Console(width=max(console.width, 110)).print(plan_view(the_plan), highlight=False)


@study_app.command("run")
def study_run(
    preset: Preset,
    out: Out,
    jobs: Annotated[int | None, typer.Option(help="Cells side by side; none: as many as there is room for.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each process; none: its share of the cores (on a cluster one).")
    ] = None,
    backend: Annotated[str, typer.Option(help="Where cells run: local, ray or slurm.")] = "local",
    cluster: Annotated[
        list[str] | None,
        typer.Option(help="Option of the backend, name=value: slurm_partition=gpu, address=auto; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and their cost, and run nothing.")] = False,
    overrides: Overrides = None,
) -> None:
    """Run a study: what is missing is run, what is done is kept; then fit its laws and write the report."""
    from grpo_engine.study.cluster import make_executor
    from grpo_engine.study.design import load_study
    from grpo_engine.study.run import run_study

    if dry_run:
        return study_plan(preset, overrides=overrides)
    executor = make_executor(backend, out, threads=threads, options=cluster or [])
    result = run_study(out, study=load_study(preset, overrides or []), jobs=jobs, threads=threads, executor=executor)
    if result.exit_code:
        raise typer.Exit(result.exit_code)
    _report(out)


@study_app.command("status")
def study_status(study_dir: StudyDir) -> None:
    """Say which cells are done, running, failed, begun or missing; only records are read."""
    from grpo_engine.study.status import study_status as status

    table = Table("cell", "state", "test loss", "seconds")
    found = status(study_dir)
    for s in found:
        loss, seconds = "-" if s.loss is None else f"{s.loss:.3f}", "-" if s.seconds is None else f"{s.seconds:.0f}"
        table.add_row(s.name, str(s), loss, seconds)
    console.print(table)
    counts: Counter[str] = Counter(s.state for s in found)
    states = ("done", "running", "failed", "partial", "missing", "imported")
    console.print(", ".join(f"{counts[s]} {s}" for s in states if counts[s]))


@study_app.command("fit")
def study_fit(study_dir: StudyDir) -> None:
    """Fit the laws anew from the records, offline, and print them."""
    from grpo_engine.study.fits import NO_AXIS, fit_study
    from grpo_engine.study.report import law_table

    fits = fit_study(study_dir)
    if not fits.fits:
        raise ValueError(f"{study_dir}: {NO_AXIS}")
    console.print(law_table(fits))


@study_app.command("import")
def study_import(
    log_format: Annotated[str, typer.Argument(metavar="FORMAT", help="csv, verl, trl or wandb.")],
    paths: Annotated[list[Path], typer.Argument(help="Logs, one a run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study; what it holds already stays.")],
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Size of the model, a label: 7B. LABEL=NAME, repeated, where one file has several sizes: NAME is the "
            "column of its pass rates (csv), its value in the column of sizes (csv), or its run (wandb)."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model folder, or a Qwen2.5 or Qwen3 name, that --params is counted from; or LABEL=MODEL."),
    ] = None,
    params: Annotated[
        list[str] | None, typer.Option(help="Parameters without embedding and head; or LABEL=PARAMS, repeated.")
    ] = None,
    params_nominal: Annotated[
        list[str] | None,
        typer.Option(help="Parameters by the model's name; or LABEL=PARAMS. None: what a label such as 7B says."),
    ] = None,
    kind: Annotated[str, typer.Option(help="base or instruct.")] = "base",
    prompts_per_step: Annotated[int | None, typer.Option(help="Prompts of a step; gives the data axis.")] = None,
    dataset_prompts: Annotated[int | None, typer.Option(help="Different prompts there are; gives their reuse.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Answers to a prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the evaluation.")] = None,
    num_problems: Annotated[int | None, typer.Option(help="Problems of the evaluation set.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Answers to each.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the run.")] = None,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; none: its file's.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="SET=KEY: evaluation set and the log's key of its pass rate; repeatable.")
    ] = None,
    out_of_domain: Annotated[list[str] | None, typer.Option(help="A set that is out of domain; repeatable.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="csv: OURS=THEIRS, a column of our table; repeatable.")] = None,
    eval_set: Annotated[str | None, typer.Option(help="csv: name of the evaluation set, where no --metric says it.")] = None,
    step: Annotated[str | None, typer.Option(help="wandb: the step column.")] = None,
    tokens: Annotated[str | None, typer.Option(help="wandb: the running count of tokens.")] = None,
) -> None:
    """Take another trainer's logs into a folder that `study fit`, `report` and `recommend` read.

    Example: grpo-engine study import verl 7b.log --out runs/ours --size 7B --model Qwen2.5-7B --prompts-per-step 512

    With a column a size: grpo-engine study import csv all.csv --out runs/ours --size 4B=c --size 8B=d --column step=Step
    """
    from grpo_engine.config import ModelSource
    from grpo_engine.study.forecast import num_params
    from grpo_engine.study.importers import RunInfo, import_logs
    from grpo_engine.study.importers.rows import number, whole

    labels: dict[str | None, str | None] = {None: None}  # label of a size -> its name in the file; None: one, or a column's
    if size and len(size) == 1 and "=" not in size[0]:
        labels = {size[0]: None}
    elif size:
        named = _pairs("--size", [s if "=" in s else f"{s}={s}" for s in size]) or {}
        labels = dict(named.items())
        if twice := [name for name in labels.values() if list(labels.values()).count(name) > 1]:
            raise ValueError(f"--size must name {twice[0]!r} once, got it for several labels")
    models, counts, nominal = (
        _by_label(option, given, labels)
        for option, given in (("--model", model), ("--params", params), ("--params-nominal", params_nominal))
    )
    runs = {}
    for label, name in labels.items():
        n = whole(counts[label], "--params") if label in counts else None
        if n is None and label in models:
            n = num_params(ModelSource(path=models[label]))
        runs[name] = RunInfo(
            size=label, kind=kind, params_non_embedding=n,
            params_nominal=number(nominal[label], "--params-nominal") if label in nominal else None,
            prompts_per_step=prompts_per_step, dataset_prompts=dataset_prompts, group_size=group_size,
            temperature=temperature, num_problems=num_problems, num_samples=num_samples, seed=seed, run_id=run_id,
        )  # fmt: skip
    of_file = {name: run for name, run in runs.items() if name is not None}
    table = import_logs(
        out, log_format, paths, run=runs[None] if None in runs else of_file, metrics=_pairs("--metric", metric),
        out_of_domain=out_of_domain or (), columns=_pairs("--column", column), eval_set=eval_set, step=step, tokens=tokens,
    )  # fmt: skip
    num_runs, num_sizes = (len(set(table.column(name).to_pylist())) for name in ("run_id", "size"))
    text = f"{out}: {table.num_rows} evaluations of {num_runs} runs and {num_sizes} sizes"
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _pairs(option: str, given: list[str] | None) -> dict[str, str] | None:
    if not given:
        return None
    if bad := [g for g in given if "=" not in g]:
        raise ValueError(f"{option} must be NAME=VALUE, got {bad[0]!r}")
    names = [g.split("=", 1)[0] for g in given]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(f"{option} must name {twice[0]!r} once, got it {names.count(twice[0])} times")
    return dict(g.split("=", 1) for g in given)


def _by_label(option: str, given: list[str] | None, labels: Mapping[str | None, str | None]) -> dict[str | None, str]:
    """The values of an option by the labels of sizes: one value for all, or LABEL=VALUE for each."""
    if not given:
        return {}
    if len(given) == 1 and given[0].partition("=")[0] not in labels:
        if len(labels) > 1:
            raise ValueError(f"{option} must be LABEL=VALUE for each of {', '.join(map(str, labels))}, got {given[0]!r}")
        return dict.fromkeys(labels, given[0])
    pairs = _pairs(option, given) or {}
    if unknown := [name for name in pairs if name not in labels]:
        raise ValueError(f"{option} must name sizes of --size, {', '.join(map(str, labels))}, got {unknown[0]!r}")
    return dict(pairs.items())


@study_app.command("recommend")
def study_recommend(
    study_dir: StudyDir,
    compute: Annotated[float | None, typer.Option(help="Budget in FLOPs, 6NT.")] = None,
    data: Annotated[float | None, typer.Option(help="Budget in prompts seen.")] = None,
    target_loss: Annotated[float | None, typer.Option(help="The test loss that is wanted.")] = None,
    gpu: Gpu = None,
    hours: Annotated[float | None, typer.Option(help="Budget in hours of --gpu.")] = None,
    num_gpus: Annotated[int, typer.Option(help="How many of --gpu.")] = 1,
    unique_prompts: Annotated[int | None, typer.Option(help="Different prompts there are.")] = None,
    kind: Annotated[str | None, typer.Option(help="base or instruct; none: each that there is.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which size to train for a budget, for how many steps, and how far it will get, with how sure that is.

    Example: grpo-engine study recommend runs/smoke --compute 1e12
    """
    from dataclasses import asdict

    from grpo_engine.study.fits import recommendations
    from grpo_engine.study.gpus import gpu_here

    options = {
        "compute": compute, "prompts": data, "target_loss": target_loss, "gpu": gpu_here() if gpu == "here" else gpu,
        "hours": hours, "num_gpus": num_gpus, "unique_prompts": unique_prompts,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    found = recommendations(study_dir, kind=kind, **given)
    if as_json:
        print(json.dumps({k: asdict(r) for k, r in found.items()}, indent=1))
        return
    for name, r in found.items():
        console.print(f"{name} models", style="bold")
        Console(width=max(console.width, 110)).print(r.render_text(), highlight=False, markup=False)


@study_app.command("report")
def study_report(study_dir: StudyDir) -> None:
    """Write the report anew, offline: from fits.json, which is fitted first where the records have gone on since."""
    _report(study_dir)


def _report(study_dir: Path) -> None:
    from grpo_engine.study.fits import fits_of
    from grpo_engine.study.report import law_table, write_report

    fits = fits_of(study_dir)
    page = write_report(study_dir)
    if fits.fits:
        console.print(law_table(fits))
    console.print(f"report: {page}", soft_wrap=True, markup=False, highlight=False)


def _print_run(folder: Path) -> None:
    from grpo_engine.records.records import read_run

    run = read_run(folder)
    if not run.evals:
        return
    table = Table("set", "mode", "pass@1 before", "after", "standard error")
    first = {(e.eval_set, e.mode): e for e in reversed(run.evals)}
    last = {(e.eval_set, e.mode): e for e in run.evals}
    for key, e in last.items():
        error = "-" if e.stderr is None else f"{e.stderr:.4f}"
        table.add_row(*key, f"{first[key].pass1:.4f}", f"{e.pass1:.4f}", error)
    console.print(table)
    equal = sum(s.zero_variance_groups or 0 for s in run.steps)
    groups = sum(s.groups or 0 for s in run.steps)
    if groups and equal == groups:
        console.print(
            f"All {groups} groups had zero variance: no response was better than its siblings, so the policy was not "
            "moved by rewards at all."
        )
    elif groups:
        console.print(f"{equal} of {groups} groups had zero variance and carried no gradient.")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def main() -> None:
    """Runs the command; an error a user can mend is one message and exit code 2, not a traceback."""
    allow_any_text()
    try:
        app()
    except OSError as e:  # a full disk, a folder that may not be written to, a file where a folder is wanted
        print(f"grpo-engine: {_system_error(e)}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, TypeError, RuntimeError) as e:
        print(f"grpo-engine: {e}", file=sys.stderr)
        sys.exit(2)


def _system_error(e: OSError) -> str:
    if e.strerror is None:
        return str(e)
    return f"{e.filename}: {e.strerror}" if e.filename is not None else e.strerror


if __name__ == "__main__":
    main()

"""Four trainers' logs, one a size, become one study: table, laws, page, recommendation."""

import csv
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from grpo_engine.cli import app
from grpo_engine.study.fits import fit_study
from grpo_engine.study.forecast import num_params
from grpo_engine.study.importers import RunInfo, folder, import_logs, read_table
from grpo_engine.study.laws.fit import read_fits
from grpo_engine.study.report import load_data
from grpo_engine.study.report.fits import study_laws
from grpo_engine.study.report.page import render_page, sections_of
from grpo_engine.study.report.words import findings
from grpo_engine.system import locks
from grpo_engine.system.locks import LOCK_FILE

K_MAX, N0 = 0.14, 13e9
STEPS, PROMPTS, TOKENS = range(0, 106, 5), 512, 4096 * 1100
MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-14B")


def params(name):
    from grpo_engine.config import ModelSource

    return num_params(ModelSource(path=name))


def pass1(name, step):
    """The planted law in prompts, from one start for all sizes."""
    n = params(name)
    return 1 - 0.95 * max(PROMPTS * step, 256) ** -(K_MAX * n / (n + N0)) * 256 ** (K_MAX * n / (n + N0))


def write_verl(path, name):
    lines = ["(TaskRunner pid=1) some banner"]
    for step in range(0, 106):
        data = {"critic/score/mean": 0.3} | ({"perf/total_num_tokens": TOKENS} if step else {})
        data |= {"val-core/math/acc/mean@1": pass1(name, step)} if step in STEPS else {}
        lines.append(json.dumps({"step": step, "data": data}))
    path.write_text("\n".join(lines) + "\n")


def write_trl(path, name):
    log = []
    for step in range(0, 106):
        log += [{"loss": 0.1, "num_tokens": float(TOKENS * step), "step": step}] if step else []
        log += [{"eval_rewards/accuracy_reward/mean": pass1(name, step), "step": step}] if step in STEPS else []
    path.write_text(json.dumps({"global_step": 105, "log_history": log}))


def write_wandb(path, name):
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["_step", "val/acc", "tokens"])
        out.writerows([step, pass1(name, step) if step in STEPS else "", TOKENS * step] for step in range(0, 106))


def write_csv(path, name):
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["global_step", "accuracy", "T"])
        out.writerows([step, pass1(name, step), TOKENS * step] for step in STEPS)


def command(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    logs, folder = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("study") / "theirs"
    more = {
        "verl": [], "trl": ["--metric", "math=eval_rewards/accuracy_reward/mean"],
        "wandb": ["--metric", "math=val/acc", "--tokens", "tokens"],
        "csv": ["--metric", "math=accuracy", "--column", "step=global_step", "--column", "trained_tokens=T"],
    }  # fmt: skip
    for name, (form, options), write in zip(MODELS, more.items(), (write_verl, write_trl, write_wandb, write_csv),
                                            strict=True):  # fmt: skip
        path = logs / f"{name}.{form}"
        write(path, name)
        output = command("study", "import", form, path, "--out", folder, "--size", name.split("-")[1], "--model", name,
                         "--prompts-per-step", PROMPTS, "--group-size", 8, *options)  # fmt: skip
    assert "of 4 runs and 4 sizes" in output
    return folder


def test_the_planted_law_is_found(study):
    table = read_table(study)
    assert set(table.column("run_id").to_pylist()) == set(MODELS) and set(table.column("eval_set").to_pylist()) == {"math"}
    assert table.column("compute_6nt").null_count == 0
    fits = fit_study(study, n_boot=20)
    assert {(f.axis, f.kind) for f in fits.fits} == {("compute", "base"), ("data", "base")}
    for axis in ("compute", "data"):
        law = fits.get(axis, "base").joint.parameters
        assert law["K_max"].value == pytest.approx(K_MAX, rel=0.02) and law["N0"].value == pytest.approx(N0, rel=0.04)
    assert read_fits(study / "fits.json") == fits


def test_a_page_says_whose_runs_they_are(study):
    data, fits = load_data(study), fit_study(study, n_boot=20)
    laws = study_laws(data, fits)
    sections = sections_of(data, laws)
    page = render_page(data, sections, findings(data, laws))
    assert "The runs are of another trainer" in page and "14B" in page and "cells are not finished" not in page
    assert {f.name for s in sections for f in s.figures} >= {"loss_compute", "loss_data", "claims", "residuals", "frontier"}
    assert not {"plan", "cost", "training", "tau"} & {s.id for s in sections}  # a log has none of them


def test_a_recommendation_comes_from_the_command(study):
    fit_study(study, n_boot=20)
    said = json.loads(command("study", "recommend", study, "--compute", "1e19", "--json"))
    assert said["base"]["amount"] == 1e19 and said["base"]["pick"] in {n.split("-")[1] for n in MODELS}
    text = command("study", "recommend", study, "--data", 20_000)
    assert "base models" in text and "predicted test loss" in text
    hours = json.loads(command("study", "recommend", study, "--gpu", "h200", "--hours", 100, "--json"))
    assert (hours["base"]["budget"], hours["base"]["amount"]) == ("hours", 100)
    assert all(c["hours"] == pytest.approx(100) for c in hours["base"]["candidates"])
    flops = hours["base"]["candidates"][0]["compute"]
    again = json.loads(command("study", "recommend", study, "--gpu", "h200", "--compute", flops, "--json"))
    assert {c["label"]: c["hours"] for c in again["base"]["candidates"]}[hours["base"]["pick"]] == pytest.approx(100)
    (reached,) = json.loads(command("study", "recommend", study, "--target-loss", 0.6, "--json")).values()
    assert reached["budget"] == "loss" and reached["candidates"][0]["needs"]["value"] > 0
    for wrong, message in (
        (["--target-loss", "2"], "must be below 1"), (["--compute", "1", "--data", "1"], "exactly one must be given"),
        ([], "exactly one must be given"), (["--hours", "1"], "gpu: must be one of"),
        (["--gpu", "tpu", "--hours", "1"], "gpu must be one of"), (["--compute", "1", "--kind", "chat"], "no law"),
    ):  # fmt: skip
        result = CliRunner().invoke(app, ["study", "recommend", str(study), *wrong])
        assert message in str(result.exception), wrong


def test_a_run_that_is_imported_again_replaces_itself(tmp_path):
    write_csv(tmp_path / "a.csv", MODELS[0])
    run = RunInfo(size="0.5B", params_non_embedding=params(MODELS[0]), dataset_prompts=25_600, prompts_per_step=512)
    columns = {"step": "global_step", "pass1": "accuracy", "trained_tokens": "T"}
    for _ in range(2):
        table = import_logs(tmp_path / "out", "csv", [tmp_path / "a.csv"], run=run, columns=columns)
        assert table.num_rows == len(STEPS)
    assert set(table.column("tau").to_pylist()) == {105 * 512 / 25_600}


def test_what_cannot_be_imported_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    for where in (tmp_path, tmp_path / "x"):
        write_csv(where / "a.csv", MODELS[0])
    run, columns = RunInfo(size="0.5B"), {"step": "global_step", "pass1": "accuracy"}
    for options, message in (
        ({"log_format": "log"}, "log_format must be one of csv, verl, trl, wandb, got 'log'"),
        ({"log_format": "verl"}, "columns: only csv logs have it"),
        ({"tokens": "t"}, "tokens: only wandb logs have it"),
        ({"log_format": "wandb", "columns": None}, "metrics: must be named for wandb logs"),
        ({"paths": [tmp_path / "a.csv", tmp_path / "x/a.csv"]}, "two logs are called a:"),
    ):
        given = {"log_format": "csv", "paths": [tmp_path / "a.csv"], "run": run, "columns": columns} | options
        with pytest.raises(ValueError, match=message):
            import_logs(tmp_path / "out", **given)
    import_logs(tmp_path / "out", "csv", [tmp_path / "a.csv"], run=run, columns=columns)
    result = CliRunner().invoke(app, ["study", "fit", str(tmp_path / "out")])
    assert "neither compute nor prompts seen are known of any run" in str(result.exception)
    assert "import again with --prompts-per-step" in str(result.exception)
    (tmp_path / "out/study.yaml").touch()
    with pytest.raises(ValueError, match="holds a study that was run here"):
        import_logs(tmp_path / "out", "csv", [tmp_path / "a.csv"], run=run, columns=columns)


# ------------------------------------------------------------------------------- one file of several sizes


def write_wide(path, header="Step"):
    """A column a size; the last size is evaluated at every step, the others at every fifth."""
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow([header, *MODELS])
        for step in range(0, 41):
            rates = [pass1(name, step) if step % 5 == 0 or name == MODELS[-1] else "" for name in MODELS]
            out.writerow([step, *rates])
    return path


SIZES = [f"{name.split('-')[1]}={name}" for name in MODELS]


def of_sizes(option, values):
    return itertools.chain.from_iterable((option, v) for v in values)


def page_of(folder):
    """The page of a study, without its pictures."""
    data = load_data(folder)
    laws = study_laws(data, fit_study(folder, n_boot=20))
    sections = sections_of(data, laws)
    return render_page(data, sections, findings(data, laws)), sections


def test_a_table_with_a_column_a_size_is_one_call(tmp_path):
    wide = write_wide(tmp_path / "all.csv")
    models = [f"{name.split('-')[1]}={name}" for name in MODELS]
    output = command("study", "import", "csv", wide, "--out", tmp_path / "out", "--column", "step=Step",
                     *of_sizes("--size", SIZES), *of_sizes("--model", models), "--prompts-per-step", PROMPTS,
                     "--eval-set", "math")  # fmt: skip
    assert output == f"{tmp_path / 'out'}: 68 evaluations of 4 runs and 4 sizes\n"
    rows = read_table(tmp_path / "out").to_pylist()
    assert {(r["run_id"], r["size"], r["params_non_embedding"]) for r in rows} == {
        (f"all-{name.split('-')[1]}", name.split("-")[1], params(name)) for name in MODELS
    }
    assert [r["step"] for r in rows if r["size"] == "0.5B"] == list(range(0, 41, 5))
    law = fit_study(tmp_path / "out", n_boot=20).get("data", "base").joint.parameters
    assert law["K_max"].value == pytest.approx(K_MAX, rel=0.02) and law["N0"].value == pytest.approx(N0, rel=0.04)
    assert "test loss on unseen math problems falls during RL at every size" in page_of(tmp_path / "out")[0]


def test_a_column_of_sizes_and_a_chart_are_one_call(tmp_path):
    rows = [(name, step, pass1(name, step)) for name in MODELS for step in STEPS]
    with open(tmp_path / "long.csv", "w", newline="") as file:
        csv.writer(file).writerows([("model", "step", "acc"), *rows])
    with open(tmp_path / "chart.csv", "w", newline="") as file:
        lines = [[step, *(pass1(name, step) for name in MODELS)] for step in STEPS]
        csv.writer(file).writerows([["Step", *(f"{name} - val/acc" for name in MODELS)], *lines])
    columns = ("--column", "step=step", "--column", "size=model")
    for form, options, run_ids in (
        ("csv", ["long.csv", *columns, "--metric", "math=acc", *of_sizes("--size", SIZES)],
         {f"long-{s.split('=')[0]}" for s in SIZES}),
        ("csv", ["long.csv", *columns, "--column", "pass1=acc"], {f"long-{name}-base" for name in MODELS}),
        ("wandb", ["chart.csv", "--metric", "math=val/acc", *of_sizes("--size", SIZES)], set(MODELS)),
    ):  # fmt: skip
        out = tmp_path / f"{form}{len(options)}"
        output = command("study", "import", form, tmp_path / options[0], "--out", out, *options[1:])
        assert "84 evaluations of 4 runs and 4 sizes" in output or f"{4 * len(STEPS)} evaluations of 4" in output
        assert set(read_table(out).column("run_id").to_pylist()) == run_ids


def test_what_cannot_be_told_apart_is_named(tmp_path):
    wide = write_wide(tmp_path / "all.csv", "step")
    step = ("--column", "step=step")
    for options, message in (
        ([*step], "size: must be given for csv logs that have no column of sizes"),
        ([*step, "--size", "7B=x"], "no column 'x' (wanted for pass1)"),
        ([*step, "--size", f"7B={MODELS[0]}", "--size", f"3B={MODELS[0]}"], f"--size must name '{MODELS[0]}' once"),
        ([*step, "--size", f"7B={MODELS[0]}", "--size", f"7B={MODELS[1]}"], "--size must name '7B' once, got it 2 times"),
        ([*step, *of_sizes("--size", SIZES), "--params", "7000"], "--params must be LABEL=VALUE for each of 0.5B, 1.5B"),
        ([*step, *of_sizes("--size", SIZES), "--params", "9B=7000"], "--params must be LABEL=VALUE"),
        (
            [*step, *of_sizes("--size", SIZES), "--params", "7B=1", "--params", "9B=1"],
            "sizes of --size, 0.5B, 1.5B, 7B, 14B",
        ),
        ([*step, "--size", "7B", "--column", f"pass1={MODELS[0]}", "--params", "many"], "--params: must be a number"),
        ([*step, *of_sizes("--size", SIZES), "--metric", "a=b"], "metrics: a table with one column a size has one evalu"),
        ([*step, *of_sizes("--size", SIZES), "--run-id", "r"], "run_id: the runs of a file must have different names"),
        ([*step, "--column", "size=step", "--size", "7B", "--column", f"pass1={MODELS[0]}"], "size: column 'step' has it"),
        ([*step, "--column", "size=step", *of_sizes("--size", SIZES)], "all.csv:2: column 'step': must be one of Qwen2.5-0"),
    ):
        result = CliRunner().invoke(app, ["study", "import", "csv", str(wide), "--out", str(tmp_path / "out"), *options])
        assert message in str(result.exception), (options, result.exception)
    for form in ("verl", "trl"):
        with pytest.raises(ValueError, match=f"size: a log of {form} is one run, got 2 sizes"):
            import_logs(tmp_path / "out", form, [wide], run={"a": RunInfo(size="1B"), "b": RunInfo(size="2B")})
    assert not (tmp_path / "out").exists()


def test_a_run_of_the_same_name_and_another_size_does_not_replace_it(tmp_path):
    """Two sizes whose logs lie in folders of one name, such as checkpoint-100."""
    for name in MODELS[:2]:
        (tmp_path / name / "checkpoint-100").mkdir(parents=True)
        write_trl(tmp_path / name / "checkpoint-100/trainer_state.json", name)
    first, second = (tmp_path / name / "checkpoint-100" for name in MODELS[:2])
    import_logs(tmp_path / "out", "trl", [first], run=RunInfo(size="0.5B"))
    with pytest.raises(
        ValueError, match="run_id: 'checkpoint-100' is there already with size '0.5B', got '1.5B': name the n"
    ):
        import_logs(tmp_path / "out", "trl", [second], run=RunInfo(size="1.5B"))
    table = import_logs(tmp_path / "out", "trl", [second], run=RunInfo(size="1.5B", run_id="second"))
    assert set(table.column("size").to_pylist()) == {"0.5B", "1.5B"}


# ---------------------------------------------------------------------------------- two writers, and messages


def test_several_imports_at_once_lose_no_size(tmp_path, monkeypatch):
    def slow(path):
        table = read_table(path)
        time.sleep(0.2)  # each has read the table before any has written
        return table

    monkeypatch.setattr(folder, "read_table", slow)
    for name in MODELS:
        write_csv(tmp_path / f"{name}.csv", name)
    columns = {"step": "global_step", "pass1": "accuracy"}

    def one(name):
        run = RunInfo(size=name.split("-")[1])
        import_logs(tmp_path / "out", "csv", [tmp_path / f"{name}.csv"], run=run, columns=columns)

    with ThreadPoolExecutor(len(MODELS)) as pool:
        list(pool.map(one, MODELS))
    assert set(read_table(tmp_path / "out").column("run_id").to_pylist()) == set(MODELS)


def test_a_folder_that_is_held_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "WAIT_S", 0.1)
    write_csv(tmp_path / "a.csv", MODELS[0])
    (tmp_path / "out").mkdir()
    given = {"run": RunInfo(size="0.5B"), "columns": {"step": "global_step", "pass1": "accuracy"}}
    with locks.locked(tmp_path / "out" / LOCK_FILE, "held"), pytest.raises(locks.Locked) as error:
        import_logs(tmp_path / "out", "csv", [tmp_path / "a.csv"], **given)
    assert str(error.value).startswith(f"{tmp_path / 'out'}: another process writes into it (process ")
    assert read_table(tmp_path / "out") is None
    import_logs(tmp_path / "out", "csv", [tmp_path / "a.csv"], **given)


def test_messages_of_the_command(tmp_path, monkeypatch, capsys):
    log = tmp_path / "a.csv"
    write_csv(log, MODELS[0])
    (tmp_path / "file").touch()

    def said(out, *paths):
        from grpo_engine import cli

        arguments = ["study", "import", "csv", *map(str, paths or [log]), "--out", str(out), "--size", "0.5B",
                     "--column", "step=global_step", "--column", "pass1=accuracy"]  # fmt: skip
        monkeypatch.setattr("sys.argv", ["grpo-engine", *arguments])
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    out = tmp_path / "file"
    assert said(out) == (2, f"grpo-engine: out: {out} must be a folder, got a file\n")
    out = tmp_path / "file/within"
    message = "must be a folder that can be written, got: Not a directory"
    assert said(out) == (2, f"grpo-engine: out: {out} {message}\n")
    out = tmp_path / "x[bold]y[/bold] [0]"
    assert said(out) == (0, f"{out}: {len(STEPS)} evaluations of 1 runs and 1 sizes\n")
    assert said(out, tmp_path / "none[0].csv") == (2, f"grpo-engine: {tmp_path / 'none[0].csv'}: no such file\n")

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(folder.files, "write_bytes_atomic", full)
    message = "must be a folder that can be written, got: No space left on device"
    assert said(out) == (2, f"grpo-engine: out: {out} {message}\n")

    def read_only(*_, **__):
        raise PermissionError(13, "Permission denied", str(out))

    monkeypatch.setattr(folder, "locked", read_only)
    message = "must be a folder that can be written, got: Permission denied"
    assert said(out) == (2, f"grpo-engine: out: {out} {message}\n")


# --------------------------------------------------------------------------------------- what nobody says

OPTIONS = {
    "params_non_embedding": True, "params_nominal": True, "prompts_per_step": PROMPTS, "dataset_prompts": 60_000,
    "group_size": 8, "seed": 0, "run_id": True, "study": "theirs", "temperature": 0.7, "num_problems": 500,
    "num_samples": 4, "trained_tokens": True,
}  # fmt: skip


def import_four(out, logs, given, write=write_csv):
    for name in MODELS:
        path, run = logs / f"{name}.csv", dict(given)
        write(path, name)
        columns = {"step": "global_step", "pass1": "accuracy"}
        columns |= {"trained_tokens": "T"} if run.pop("trained_tokens", False) else {}
        for field, value in (("params_non_embedding", params(name)), ("params_nominal", 1e9 * float(name[8:-1])),
                             ("run_id", f"run of {name}")):  # fmt: skip
            if run.pop(field, False):
                run[field] = value
        import_logs(out, "csv", [path], run=RunInfo(size=name.split("-")[1], **run), columns=columns)


@pytest.mark.parametrize("left_out", [*OPTIONS, "all", "all but prompts", "all but tokens and parameters"])
def test_a_field_that_is_left_out_leaves_a_report(tmp_path, left_out):
    kept = {
        "all": (), "all but prompts": ("prompts_per_step",),
        "all but tokens and parameters": ("trained_tokens", "params_non_embedding"),
    }.get(left_out, [name for name in OPTIONS if name != left_out])  # fmt: skip
    import_four(tmp_path / "out", tmp_path, {name: OPTIONS[name] for name in kept})
    page, sections = page_of(tmp_path / "out")
    axes = {f.name for s in sections for f in s.figures} & {"loss_compute", "loss_data"}
    assert axes == ({"loss_data"} if "prompts_per_step" in kept else set()) | (
        {"loss_compute"} if {"trained_tokens", "params_non_embedding"} <= set(kept) else set()
    )
    assert "nan" not in page.split("<script")[0].lower().replace("finance", "")
    assert ("there is no law to fit" in page) == (not axes)
    assert "\u00b1\u00a00.000" not in page  # an error that nobody knows is not 0
    losses = next(s for s in sections if s.id == "losses")
    assert len(losses.tables[0].rows) == len(MODELS) and "learning_curves" in {f.name for f in losses.figures}


@pytest.mark.parametrize("dataset_prompts", [1_000, 12_000, 20_000, 40_000])
def test_data_that_were_seen_again_and_again_leave_a_law(tmp_path, dataset_prompts):
    """All sizes went over their data several times; one run of another length is no ablation."""
    given = {"params_non_embedding": True, "prompts_per_step": PROMPTS, "dataset_prompts": dataset_prompts}
    import_four(tmp_path / "out", tmp_path, given)
    rows = read_table(tmp_path / "out").to_pylist()
    assert {r["tau"] for r in rows} == {105 * PROMPTS / dataset_prompts}
    law = fit_study(tmp_path / "out", n_boot=20).get("data", "base").joint.parameters
    assert law["K_max"].value == pytest.approx(K_MAX, rel=0.02)
    assert len(page_of(tmp_path / "out")[1]) > 5


def test_a_log_with_step_0_alone(tmp_path):
    def only_0(path, name):
        path.write_text(f"global_step,accuracy,T\n0,{pass1(name, 0)},0\n")

    given = {"params_non_embedding": True, "prompts_per_step": PROMPTS, "dataset_prompts": 7_500, "trained_tokens": True}
    import_four(tmp_path / "out", tmp_path, given, only_0)
    fits = fit_study(tmp_path / "out", n_boot=20)
    assert fits.fits and not any(f.verdict.ok for f in fits.fits)
    page, _ = page_of(tmp_path / "out")
    assert "no size can be fitted" in page


def test_sizes_with_and_without_a_group_size_are_one_law(tmp_path):
    for i, name in enumerate(MODELS):
        write_csv(tmp_path / f"{name}.csv", name)
        run = RunInfo(size=name.split("-")[1], params_non_embedding=params(name), prompts_per_step=PROMPTS,
                      group_size=8 if i % 2 else None)  # fmt: skip
        import_logs(tmp_path / "out", "csv", [tmp_path / f"{name}.csv"], run=run,
                    columns={"step": "global_step", "pass1": "accuracy"})  # fmt: skip
    _, sections = page_of(tmp_path / "out")
    assert len(next(s for s in sections if s.id == "losses").tables[0].rows) == len(MODELS)


def test_parameters_that_not_all_runs_have_are_asked_for(tmp_path):
    columns = {"step": "global_step", "pass1": "accuracy"}
    for name, run in (("a", RunInfo(size="small", params_non_embedding=10**9)), ("b", RunInfo(size="7B"))):
        write_csv(tmp_path / f"{name}.csv", MODELS[0])
        import_logs(tmp_path / "out", "csv", [tmp_path / f"{name}.csv"], run=run, columns=columns)
    with pytest.raises(
        ValueError, match="the parameters of a are not known: import again with --params-nominal .* for every"
    ):
        load_data(tmp_path / "out")
    import_logs(tmp_path / "none", "csv", [tmp_path / "a.csv"], run=RunInfo(size="small"), columns=columns)
    with pytest.raises(
        ValueError, match="the parameters of a are not known: import again with --params or --model for ever"
    ):
        load_data(tmp_path / "none")

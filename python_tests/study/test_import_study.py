"""Four trainers' logs, one a size, become one study: table, laws, page, recommendation."""

import csv
import json

import pytest
from typer.testing import CliRunner

from grpo_engine.cli import app
from grpo_engine.study.claims import study_claims
from grpo_engine.study.forecast import num_params
from grpo_engine.study.importers import RunInfo, import_logs, read_table
from grpo_engine.study.laws.fit import read_fits
from grpo_engine.study.report import fit_study, load_data
from grpo_engine.study.report.fits import study_laws
from grpo_engine.study.report.page import render_page, sections_of
from grpo_engine.study.report.words import findings

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
    laws, claims = study_laws(data, fits), study_claims(data)
    sections = sections_of(data, laws, claims)
    page = render_page(data, sections, findings(data, laws, claims))
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
    for folder in (tmp_path, tmp_path / "x"):
        write_csv(folder / "a.csv", MODELS[0])
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
    with pytest.raises(ValueError, match="run a: its parameters are not known"):
        fit_study(tmp_path / "out")
    (tmp_path / "out/study.yaml").touch()
    with pytest.raises(ValueError, match="holds a study that was run here"):
        import_logs(tmp_path / "out", "csv", [tmp_path / "a.csv"], run=run, columns=columns)

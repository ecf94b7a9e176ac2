import dataclasses
import io
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from synthetic_study import K_MAX, N0, PARAMS, make_study, true_loss

from grpo_engine.records.table import TABLE_COLUMNS, runs_table
from grpo_engine.records.text_table import Table
from grpo_engine.study.claims import _Drawer, study_claims
from grpo_engine.study.data import StudyData
from grpo_engine.study.design import AxesConfig, load_study, plan
from grpo_engine.study.fits import fit_study, plain_table
from grpo_engine.study.laws.curves import select_curves
from grpo_engine.study.laws.fit import read_fits
from grpo_engine.study.report import law_table, load_data, words, write_report
from grpo_engine.study.report.drawing import (
    BarPanel,
    Figure,
    Panel,
    Series,
    draw,
    linear_ticks,
    log_ticks,
    plotly_spec,
    size_colors,
    tick_text,
)
from grpo_engine.study.report.fits import study_laws
from grpo_engine.study.report.page import Section, render_page, sections_of

AXES = (
    AxesConfig(kinds=("base", "instruct"), seeds=(0, 1), control=("base",)),
    AxesConfig(name="reuse", sizes=("m",), tau=(5, 25)),
    AxesConfig(name="group", sizes=("m",), group_size=(2, 4)),
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of four sizes that has run, with its report."""
    folder = tmp_path_factory.mktemp("study") / "synthetic"
    make_study(folder, sizes=("xs", "s", "m", "l"), axes=AXES)
    fit_study(folder, n_boot=30)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(study):
    return (study / "report" / "index.html").read_text()


def test_an_ablation_compares_runs_that_differ_in_one_setting_from_one_base():
    cells = {c.name: c for c in plan(load_study("micro")).cells}
    data = StudyData(name="micro", plan=None, runs={n: n for n in cells}, missing=(), headline="chain", group_size=8,
                     params={}, table=None, cells=cells)  # fmt: skip
    taus = data.ablation("m", "base", "tau")
    assert taus == {t: [f"m-base-tau{t}-seed4" if t > 1 else "m-base-seed4"] for t in (1, 2, 4, 5, 10, 20, 25, 50, 100)}
    groups = data.ablation("m", "base", "group_size")  # the main runs of 8 answers start from other bases
    assert groups == {4: ["m-base-G4-seed3"], 8: ["m-base-seed3"], 16: ["m-base-G16-seed3"], 32: ["m-base-G32-seed3"]}
    assert data.ablation("s", "base", "tau") == data.ablation("s", "base", "group_size") == {}


def text_of(page):
    return re.sub(r"<[^>]+>", " ", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))


def panels_of(page):
    return json.loads(re.search(r"const panels = (\{.*?\});\n//", page, flags=re.DOTALL).group(1))


def test_the_table_holds_every_evaluation(study):
    table = pq.read_table(study / "runs.parquet")
    assert tuple(table.column_names) == (*TABLE_COLUMNS, "right")
    data = load_data(study)
    assert table.num_rows == sum(len(r.evals) for r in data.runs.values())
    assert set(table["study"].to_pylist()) == {"synthetic"} and set(table["tau"].to_pylist()) == {1.0, 5.0, 25.0}


def test_the_planted_law_is_in_the_fits(study):
    fits = read_fits(study / "fits.json")
    for axis in ("compute", "data"):
        for kind in ("base", "instruct", "all"):
            found = fits.get(axis, kind)
            assert found.verdict.ok, found.verdict.why
            assert found.joint.parameters["K_max"].value == pytest.approx(K_MAX, rel=0.25)
            assert found.joint.parameters["N0"].value == pytest.approx(N0, rel=0.5)


def test_the_page_needs_no_network(study, page):
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    links = re.findall(r"(?:src|href)=[\"'](?!#|data:)([^\"']*)", outside)
    assert links and all(re.fullmatch(r"(figures|tables)/\w+\.(png|pdf|md|tex)", link) for link in links)
    assert all((study / "report" / link).is_file() for link in links)
    assert page.count("Plotly.newPlot") >= 1 and page.count("plotly.js v") == 1
    assert 'name="viewport"' in page


def test_the_page_says_what_the_data_say(page):
    text = text_of(page)
    assert "Base models: test loss on unseen chain problems falls during RL at every size" in text
    assert "Every larger base model ends lower than the one before it." in text
    assert "Base models against plain pretraining of the same length: RL ends lower at every size" in text
    assert "One law for all sizes, loss against data (95 % intervals): for base models K_max = 0.1" in text
    assert re.search(r"Which base model to train for 2\.2·10¹² FLOPs: l \(decided; it is the largest size", text)
    assert "What these data cannot show" in text and "How it was measured" in text
    assert "2 answers" not in text and "4 answers to each" in text


def test_every_panel_of_the_page_has_its_drawing_and_its_file(study, page):
    panels = panels_of(page)
    assert set(re.findall(r'<div class="panel" id="([^"]+)"', page)) == set(panels)
    names = {i.rsplit("-", 1)[0] for i in panels}
    assert names == {
        "claims", "loss_compute", "loss_data", "slopes", "intercepts", "residuals", "frontier", "base_instruct",
        "learning_curves", "control", "tau", "group_size", "training", "response_length", "transfer", "transfer_grid",
        "cost",
    }  # fmt: skip
    assert len(re.findall(r'alt="[^"]*" src="data:image/png;base64,iVBOR', page)) == len(names)  # for print
    folder = study / "report" / "figures"
    assert {p.name for p in folder.iterdir()} == {f"{n}.{e}" for n in names for e in ("png", "pdf")}
    for path in folder.iterdir():
        assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF") and path.stat().st_size > 5000


def test_the_points_on_the_page_are_the_means_of_the_records(study, page):
    data = load_data(study)
    traces = panels_of(page)["loss_data-0"]["data"]
    points = {t["name"]: t for t in traces if t.get("mode") == "markers"}
    for size in ("xs", "s", "m", "l"):
        runs = data.main(size, "base")
        assert len(runs) == 2
        wanted = {}
        for run in runs:
            for e in run.evals:
                if e.eval_set == "chain" and e.mode == "sample" and e.step > 0:
                    wanted.setdefault(e.prompts_seen, []).append(e.loss)
        assert points[size]["x"] == sorted(wanted)
        assert points[size]["y"] == pytest.approx([sum(wanted[x]) / 2 for x in sorted(wanted)])


def test_the_fitted_lines_pass_through_the_planted_law(page):
    traces = panels_of(page)["loss_data-1"]["data"]
    for size in ("s", "m", "l"):
        (line,) = [t for t in traces if t.get("name") == f"{size}, fitted"]
        for x, y in zip(line["x"], line["y"], strict=True):
            assert y == pytest.approx(true_loss(PARAMS[size], x, "instruct"), rel=0.08)


def test_a_law_is_continued_where_nothing_was_measured(page):
    traces = {t["name"]: t for t in panels_of(page)["loss_data-0"]["data"] if "name" in t}
    fitted, beyond = traces["l, fitted"], traces["l, continued"]
    assert beyond["line"]["dash"] != "solid" and fitted["line"]["dash"] == "solid"
    assert beyond["x"][0] == pytest.approx(max(traces["l"]["x"])) and beyond["x"][-1] == pytest.approx(3 * beyond["x"][0])
    assert beyond["y"][-1] == pytest.approx(true_loss(PARAMS["l"], beyond["x"][-1]), rel=0.08)


def test_residuals_are_what_the_law_leaves(study, page):
    panels = panels_of(page)
    points = {t["name"]: t for t in panels["loss_data-0"]["data"] if t.get("mode") == "markers"}
    (left,) = [t for t in panels["residuals-2"]["data"] if t["name"] == "m"]
    fit = read_fits(study / "fits.json").get("data", "base").joint
    assert "base models, against data" in panels["residuals-2"]["layout"]["title"]["text"]
    want = [y - float(fit.loss("m", x)) for x, y in zip(points["m"]["x"], points["m"]["y"], strict=True)]
    assert left["y"] == pytest.approx(want, abs=1e-9)


def test_every_legend_entry_that_can_be_pressed_has_series(page):
    panels = panels_of(page)
    for name, figure in re.findall(r'<figure id="figure-(\w+)">(.*?)</figure>', page, flags=re.DOTALL):
        groups = set(re.findall(r'data-group="([^"]*)"', figure))
        drawn = {t["legendgroup"] for i, p in panels.items() if i.startswith(f"{name}-") for t in p["data"]}
        assert groups <= drawn, name
        assert figure.count('tabindex="0" role="group"') == sum(i.rsplit("-", 1)[0] == name for i in panels)


def test_the_claims_have_their_verdicts_on_the_page(study, page):
    text = text_of(page)
    claims = read_fits(study / "fits.json").claims
    assert claims == study_claims(load_data(study)) and claims
    for claim in claims:
        assert claim.statement in text and claim.why in text
    rows = (study / "report/tables/comparisons.md").read_text()
    assert re.search(r"fixed data \| l against m, base \| \+0\.\d{3} \[.*\| 0\.02 \| supported \| 2, 2 \|", rows)
    assert "Which law predicts what it did not see" in text and "next smaller size" in text
    assert "The frontier N*(C)" in text and "Each row holds from its compute on" in text


def test_a_table_is_the_same_in_every_form(study, page):
    folder = study / "report" / "tables"
    names = {p.stem for p in folder.iterdir()}
    assert {p.name for p in folder.iterdir()} == {f"{n}.{e}" for n in names for e in ("md", "tex")}
    assert {"law", "claims", "comparisons", "held_out", "other_laws", "frontier", "plan", "versions", "cost"} <= names
    for name in names:
        rows = [x for x in (folder / f"{name}.md").read_text().splitlines() if x.startswith("| ")]
        tex = (folder / f"{name}.tex").read_text()
        assert tex.count(r" \\") == len(rows) - 1 and tex.count("{") == tex.count("}")  # the rule is no row
        assert page.count(f"tables/{name}.tex") == 1


def test_tables_escape_what_their_forms_reserve():
    table = Table(name="t", head=("a_b", "c|d"), rows=[("50 % & more", "3·10⁻¹² ± 2\u00a0x²")], title="K_max", note="#1")
    assert table.markdown() == "K_max\n\n| a_b | c\\|d |\n| --- | ---: |\n| 50 % & more | 3·10⁻¹² ± 2\u00a0x² |\n\n#1\n"
    tex = table.latex()
    assert r"a\_b & c|d \\" in tex and r"50 \% \& more & 3$\cdot$10$^{-12}$ $\pm$ 2~x$^2$ \\" in tex
    assert r"\begin{tabular}{lr}" in tex and r"\caption{K\_max}" in tex and r"\#1" in tex


def test_reuse_and_group_runs_stay_out_of_the_main_curves(study):
    data = load_data(study)
    assert data.group_size == 8 and data.kinds == ["base", "instruct"]
    assert len(data.main("m", "base")) == 2 and len(data.control("m", "base")) == 2
    assert data.control("m", "instruct") == []


def test_standard_errors_hold_problems_and_runs(study):
    data = load_data(study)
    runs = data.main("s", "base")
    last = data.curve(runs)[-1]
    ends = [e for r in runs for e in r.evals if e.step == last.step and e.eval_set == "chain" and e.mode == "sample"]
    a, b = (e.pass1 for e in ends)
    assert last.num_runs == 2
    assert last.pass1 == pytest.approx((a + b) / 2)
    problems = (ends[0].stderr ** 2 + ends[1].stderr ** 2) / 2
    assert last.error**2 == pytest.approx(problems + (a - b) ** 2 / 2 / 2)


@pytest.mark.parametrize("uneven", [False, True])
def test_laws_figures_and_claims_take_the_same_points(study, uneven):
    """`uneven`: one of the runs was not evaluated at one of the steps."""
    data = load_data(study)
    runs = data.main("s", "base")
    if uneven:
        step = sorted({e.step for e in runs[1].evals})[3]
        less = [e for e in runs[1].evals if e.step != step or e.eval_set != "chain"]
        assert len(less) < len(runs[1].evals)
        names = {n: dataclasses.replace(r, evals=less) if r is runs[1] else r for n, r in data.runs.items()}
        data = dataclasses.replace(data, runs=names, table=runs_table(names.values()))
        runs = data.main("s", "base")
    curves, _, _ = select_curves(plain_table(data), axis="data", kind="base", eval_set="chain", group_size=8)
    (law,) = (c for c in curves if c.size == "s")
    figure = [p for p in data.curve(runs) if p.step > 0]
    assert [p.step for p in figure] == law.step.tolist() and len(figure) > 5
    assert [p.loss for p in figure] == pytest.approx(law.loss.tolist())
    assert [p.prompts for p in figure] == law.x.tolist()
    assert {p.num_runs for p in figure} == ({1, 2} if uneven else {2})
    drawer = _Drawer(rng=np.random.default_rng(0), draws=2, spread=0.0, freedom=0, weights={})
    for p in figure:
        if p.num_runs == 2:
            assert drawer.side(runs, "chain", "prompts_seen", p.prompts).value == pytest.approx(p.loss)


def test_the_terminal_table_holds_the_law(study):
    console = Console(width=80, file=io.StringIO())
    console.print(law_table(fits := read_fits(study / "fits.json")))
    text = console.file.getvalue()
    assert "\u2026" not in text  # nothing is cut short
    (line,) = [x.split() for x in text.splitlines() if x.split()[:2] == ["prompts", "base"] and "xs" not in x][:1]
    found = fits.get("data", "base")
    assert line[2] == f"{found.joint.parameters['K_max'].value:.3f}" and line[-1] == "yes"
    assert "falls" in text


def test_the_terminal_says_why_a_law_is_not_identifiable(tmp_path):
    make_study(tmp_path / "s", sizes=("xs", "s"), axes=(AxesConfig(),))
    console = Console(width=80, file=io.StringIO())
    console.print(law_table(fit_study(tmp_path / "s", n_boot=20)))
    text = " ".join(console.file.getvalue().split())
    assert "base (X: 6NT, prompts and ledger): not identifiable: 2 sizes" in text
    assert "\u2026" not in text


def test_a_curve_that_bends_away_from_the_law_is_told(tmp_path):
    the_plan = make_study(tmp_path / "s", sizes=("xs", "s", "m", "l"), axes=(AxesConfig(seeds=(0, 1)),))
    assert words.misses(load_data(tmp_path / "s"), fit_study(tmp_path / "s", n_boot=20)) == []
    for cell in the_plan.cells:
        if cell.size == "l":  # the last point of the largest size falls by a third more than the law has
            path = tmp_path / "s" / cell.folder / "evals.jsonl"
            evals = [json.loads(line) for line in path.read_text().splitlines()]
            for e in evals:
                if e["step"] == 60 and e["eval_set"] == "chain" and e["mode"] == "sample":
                    e["loss"] -= 0.12
                    e["pass1"] += 0.12
            path.write_text("".join(json.dumps(e) + "\n" for e in evals))
    data = load_data(tmp_path / "s")
    (line,) = words.misses(data, fit_study(tmp_path / "s", n_boot=20))
    assert "l base ends below it" in line and "m base" not in line


def test_a_report_fits_nothing(study, page, monkeypatch):
    """Every way to a fit, to draws of a claim or to a law's curves raises, and the page is the same."""

    def refuse(*_, **__):
        raise AssertionError("the report fits")

    for name in (
        "least_squares.FitProblem.best", "least_squares.FitProblem.solve", "least_squares.Joint.fit", "bootstrap.resample",
        "bootstrap.profile_interval", "fit.fit_table", "fit.fit_sizes", "law_fit.fit_surface", "law_fit.fit_reuse",
        "curves.select_curves",
    ):  # fmt: skip
        monkeypatch.setattr(f"grpo_engine.study.laws.{name}", refuse)
    monkeypatch.setattr("grpo_engine.study.claims.study_claims", refuse)
    for name in ("fit_table", "fit_surface", "fit_reuse", "other_set", "select_curves", "curves_by", "study_claims"):
        monkeypatch.setattr(f"grpo_engine.study.fits.{name}", refuse)
    data = load_data(study)
    laws = study_laws(data, read_fits(study / "fits.json"))
    found = words.findings(data, laws)
    again = render_page(data, sections_of(data, laws), found)
    assert text_of(again).split() == text_of(page).split() and panels_of(again) == panels_of(page)


def test_a_report_takes_no_fits_of_other_records(study, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(study, copy, ignore=shutil.ignore_patterns("report"))
    (path,) = copy.glob("cells/s-base-seed0.*/evals.jsonl")
    changed = re.sub(r'"step": ?60\b', '"step": 61', path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(ValueError, match=r"fits\.json: it is not of the records as they are now"):
        write_report(copy)
    (copy / "fits.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"fits\.json"):
        write_report(copy)


def test_a_report_can_be_made_of_a_part(tmp_path):
    axes = (AxesConfig(seeds=(0,)), AxesConfig(name="reuse", sizes=("s",), tau=(5,)))
    unfinished = ("m-base-seed0", "s-base-tau5-seed0")
    make_study(tmp_path / "s", sizes=("xs", "s", "m"), axes=axes, unfinished=unfinished)
    data, fits = load_data(tmp_path / "s"), fit_study(tmp_path / "s", n_boot=20)
    laws = study_laws(data, fits)
    sections = sections_of(data, laws)
    text = text_of(render_page(data, sections, words.findings(data, laws)))
    assert "2 of 4 cells are not finished and not in this report: m-base-seed0, s-base-tau5-seed0" in text
    assert "There is no control" in text and "With one run at some or all sizes" in text
    assert "for base models the data do not identify it (2 sizes" in text
    assert re.search(r"Which base model to train for .*: s \(not decided", text)
    assert not fits.get("data", "base").verdict.ok
    assert "problems are not drawn anew" in text and "No law could be tested on what it had not seen" in text
    # what the plan asked for and is not there is said, what nobody asked for is not
    shown = {s.id: s for s in sections}
    assert "not finished: s-base-tau5-seed0" in shown["tau"].text[0] and not shown["tau"].figures
    assert "group_size" not in shown and "control" not in shown


def test_a_study_without_a_finished_cell_is_an_error(tmp_path):
    make_study(tmp_path / "s", sizes=("xs",), axes=(AxesConfig(),), unfinished=("xs-base-seed0",))
    with pytest.raises(ValueError, match="no GRPO cell is finished yet"):
        write_report(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="study.yaml"):
        write_report(tmp_path)


def test_a_damaged_record_is_named(study, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(study, copy, ignore=shutil.ignore_patterns("report"))
    (broken,) = copy.glob("cells/s-base-seed0.*/evals.jsonl")
    lines = broken.read_text().splitlines()
    lines[2] = lines[2][:40]
    broken.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"s-base-seed0\..*evals\.jsonl:3: the record is not JSON"):
        load_data(copy)


def test_a_name_that_looks_like_markup_stays_text(tmp_path):
    make_study(tmp_path / "s", sizes=("xs",), axes=(AxesConfig(),))
    path = tmp_path / "s" / "study.yaml"
    path.write_text(path.read_text().replace("name: synthetic", "name: <b>bold</b>"))
    page = render_page(data := load_data(tmp_path / "s"), [], ["a < b"])
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold" in page and "a &lt; b" in page
    assert data.plan.study.name == "<b>bold</b>"


# ------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0.35, 1.0, [0.4, 0.6, 0.8, 1.0]),
        (0.1, 1.1, [0.1, 0.2, 0.3, 0.5, 1.0]),
        (60, 4000, [100, 200, 500, 1000, 2000]),
        (2e8, 5e12, [1e9, 1e10, 1e11, 1e12]),
        (1e3, 1e20, [1e3, 1e6, 1e9, 1e12, 1e15, 1e18]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low, high, ticks):
    found = log_ticks(low, high)
    assert found == pytest.approx(ticks)
    assert all(low <= t <= high for t in found)


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 31, [0, 10, 20, 30]), (0.512, 0.519, [0.512, 0.514, 0.516, 0.518])],
)
def test_ticks_of_a_linear_axis(low, high, ticks):
    assert linear_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.35, "0.35"), (2000, "2000"), (20000, "20k"), (2.5e6, "2.5M"), (1e9, "10⁹"), (3e12, "3·10¹²"),
     (2e-5, "2·10⁻⁵"), (-10, "-10")],
)  # fmt: skip
def test_tick_texts(value, text):
    assert tick_text(value) == text


def test_larger_sizes_are_darker():
    for count in (1, 2, 3, 5, 9):
        colors = list(size_colors([str(i) for i in range(count)]).values())
        light = [sum(int(c[i : i + 2], 16) * w for i, w in ((1, 0.3), (3, 0.6), (5, 0.1))) for c in colors]
        assert len(set(colors)) == count and light == sorted(light, reverse=True)


def test_end_labels_keep_apart_and_stay_at_their_series():
    series = [Series(label=str(i), x=[1, 2], y=[1, 1 + i / 1000], color="#000000", end_label=f"l{i}") for i in range(3)]
    spec = plotly_spec(Panel(title="", x_label="", y_label="", series=series), height=300)
    labels = {a["text"]: a for a in spec["layout"]["annotations"]}
    low, high = spec["layout"]["yaxis"]["range"]
    positions = [(labels[f"l{i}"]["y"] - low) / (high - low) for i in range(3)]
    assert all(b - a > 0.05 for a, b in zip(positions, positions[1:], strict=False))
    assert {a["x"] for a in labels.values()} == {2}


def test_values_that_a_logarithm_cannot_show_are_left_out_of_the_range():
    series = [Series(label="a", x=[0.0, 10.0, 100.0], y=[0.5, 0.4, 0.3], color="#000000")]
    spec = plotly_spec(Panel(title="", x_label="", y_label="", series=series, x_log=True), height=300)
    assert 0.8 < spec["layout"]["xaxis"]["range"][0] < 1.0
    json.dumps(spec, allow_nan=False)


def test_a_figure_of_one_point_and_of_bars_can_be_drawn(tmp_path):
    point = Panel(
        title="t", x_label="x", y_label="y",
        series=[Series(label="a", x=[1.0], y=[1.0], color="#112233", y_span=[(0.5, None)], end_label="a")],
    )  # fmt: skip
    bars = BarPanel(title="b", x_label="%", rows=["one"], parts=[("p", "#445566", [100.0])])
    for path in draw(Figure(name="f", title="", caption="", panels=[point, bars]), tmp_path):
        assert path.stat().st_size > 1000
    for panel in (point, bars):
        json.dumps(plotly_spec(panel, height=200), allow_nan=False)


def test_a_figure_that_cannot_be_drawn_is_an_error_of_the_report(study, tmp_path, monkeypatch):
    shutil.copytree(study, tmp_path / "s")
    bars = BarPanel(title="", x_label="x", rows=("a",), parts=(("one", "no colour", (1.0,)),))
    section = Section(id="x", title="", figures=[Figure(name="f", title="", caption="", panels=[bars])])
    monkeypatch.setattr("grpo_engine.study.report.page.sections_of", lambda *_: [section])
    with pytest.raises(ValueError, match="valid color"):
        write_report(tmp_path / "s")


def test_variants_take_no_part_in_laws_and_figures(tmp_path):
    axes = (AxesConfig(seeds=(0, 1)), AxesConfig(name="dr", variants={"dr": {"advantage.std": "none"}}))
    the_plan = make_study(tmp_path / "s", axes=axes)
    data = load_data(tmp_path / "s")
    assert sum(c.variant == "dr" for c in the_plan.cells) == 3
    assert len(data.runs) == 9 and [len(data.main(size, "base")) for size in data.sizes] == [2, 2, 2]
    fits = fit_study(tmp_path / "s", n_boot=20)
    assert [s.num_runs for s in fits.get("data", "base").sizes] == [2, 2, 2]
    assert len(set(pq.read_table(tmp_path / "s/runs.parquet").column("run_id").to_pylist())) == 9

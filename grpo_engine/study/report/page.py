"""The report: its sections, the page, and the files beside it."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from grpo_engine.records.text_table import Table
from grpo_engine.study.data import StudyData, load_data
from grpo_engine.study.design import Cell
from grpo_engine.study.fits import FITS_FILE, NO_AXIS, axes_of, records_digest
from grpo_engine.study.importers import TABLE_FILE
from grpo_engine.study.laws.results import Claim, read_fits
from grpo_engine.study.plan_view import human
from grpo_engine.study.report.drawing import Figure, draw, import_matplotlib, plotly_spec
from grpo_engine.study.report.figures import (
    claims_figure,
    control_figure,
    cost_figure,
    frontier_figure,
    group_figure,
    intercept_figure,
    kinds_figure,
    learning_figure,
    length_figure,
    loss_figure,
    residual_figure,
    reuse_figure,
    slope_figure,
    training_figure,
    transfer_figure,
    transfer_grid_figure,
)
from grpo_engine.study.report.fits import Laws, study_laws
from grpo_engine.study.report.tables import (
    claims_table,
    comparisons_table,
    cost_table,
    frontier_table,
    held_out_table,
    joint_table,
    loss_table,
    other_laws_table,
    plan_table,
    recommendation_table,
    size_table,
    transfer_table,
    versions_table,
)
from grpo_engine.study.report.words import cautions, findings, limits, listed, method_points, verdicts
from grpo_engine.system import files
from grpo_engine.system.machine import num_cores
from grpo_engine.system.processes import SpawnContext

REPORT = "report"
BEST_LAWS = 3  # of each test that are shown before the table is unfolded
MOST_DRAWERS = 4  # processes


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading with what stands under it, in the order of the fields."""

    id: str
    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    points: Sequence[str] = ()


def sections_of(data: StudyData, laws: Laws) -> list[Section]:
    """The sections in the order of the page: what the study says, what it rests on, how it was made."""
    fits = laws.fits
    return [
        _claims(fits.claims),
        *(Section(id=f.name, title=f.title, figures=[f]) for a in axes_of(fits) for f in _some(loss_figure(data, fits, a))),
        _law(data, laws),
        *([_other_laws(data, laws)] if fits.fits else []),
        _recommendation(data, laws),
        Section(
            id="losses", title="Where the runs begin and end",
            figures=_some(kinds_figure(data), learning_figure(data)), tables=[loss_table(data)],
        ),
        *_planned(data, "control", "RL against plain pretraining", control_figure(data), "controls of plain pretraining",
                lambda c: c.method == "pretrain"),
        *_planned(data, "tau", "Data reuse", reuse_figure(data, fits), "runs with data reuse", lambda c: c.tau != 1),
        *_planned(data, "group_size", "Group size", group_figure(data), "runs with other group sizes",
                lambda c: c.method == "grpo" and c.group_size != data.group_size),
        *_planned(data, "training", "Training", training_figure(data), "GRPO runs", lambda c: c.method == "grpo"),
        *_planned(data, "response_length", "Response length", length_figure(data), "GRPO runs",
                lambda c: c.method == "grpo"),
        *_transfer(data),
        *_cost(data),
        *(Section(id="plan", title="The plan", text=_plan_text(data), tables=[t]) for t in _some(plan_table(data))),
        Section(id="method", title="How it was measured", points=method_points(data), tables=_some(versions_table(data))),
        Section(id="limits", title="What these data cannot show", points=limits(data)),
    ]  # fmt: skip


_Kept = TypeVar("_Kept")


def _some(*found: _Kept | None) -> list[_Kept]:
    """Those that there are."""
    return [f for f in found if f is not None]


def _claims(claims: Sequence[Claim]) -> Section:
    title = "The claims, tested"
    figure = claims_figure(claims)
    if figure is None:
        return Section(id="claims", title=title, text=["Nothing here can be compared: a claim needs two groups of runs."])
    text = (
        "Questions of scaling studies, as tests with a margin that was set beforehand. A claim makes several "
        "comparisons, on the same problems; its verdict needs them all."
    )
    tables = [claims_table(claims), comparisons_table(claims)]
    return Section(id="claims", title=title, text=[text], figures=[figure], tables=tables)


def _law(data: StudyData, laws: Laws) -> Section:
    title, fits = "The fitted law", laws.fits
    if not fits.fits:
        return Section(id="law", title=title, text=[f"{NO_AXIS[0].upper()}{NO_AXIS[1:]}."])
    return Section(
        id="law", title=title,
        figures=_some(slope_figure(data, fits), intercept_figure(data, fits), residual_figure(data, fits)),
        tables=[joint_table(fits), size_table(fits)], points=[*verdicts(fits), *cautions(fits)],
    )  # fmt: skip


def _other_laws(data: StudyData, laws: Laws) -> Section:
    text, points = [], []
    held = held_out_table(data, laws, most=BEST_LAWS)
    if held is None:
        text.append(
            "No law could be tested on what it had not seen: that takes four sizes of a kind, or curves of at least 12 "
            "points."
        )
    for f in laws.fits.fits:
        if f.kind in data.kinds:
            points += [f"{c.test}, {f.kind} models against {f.axis}: {c.why}." for c in f.choices]
    return Section(
        id="held_out", title="Which law predicts what it did not see", text=text, points=points,
        tables=_some(held, held_out_table(data, laws), other_laws_table(data, laws)),
    )  # fmt: skip


def _recommendation(data: StudyData, laws: Laws) -> Section:
    title = "Which size to train"
    if not laws.picks:
        why = "One size was measured" if len(data.sizes) == 1 else "No law for all sizes was fitted"
        return Section(id="recommendation", title=title, text=[f"{why}, so there is nothing to choose."])
    text = (
        "Budgets are those that the runs of the ladder ended with. A budget of compute buys a small model more "
        "prompts; a budget of prompts costs a large model more compute."
    )
    undecided: dict[tuple[str, str], list[str]] = {}
    for kind, budget, r in laws.picks:
        if not r.decided:
            undecided.setdefault((kind, r.why.partition(" Intervals: ")[0]), []).append(budget)
    open_points = [
        f"{kind.capitalize()} models, {listed(budgets)}: not decided. {why}" for (kind, why), budgets in undecided.items()
    ]
    doubts: dict[tuple[str, str, str], list[str]] = {}
    for kind, budget, r in laws.picks:
        for reason in r.distrust:
            if reason not in r.why:
                doubts.setdefault((reason, kind, r.budget), []).append(budget)
    against = []
    for (reason, kind, unit), budgets in doubts.items():
        whole = sum((k, r.budget) == (kind, unit) for k, _, r in laws.picks) == len(budgets)
        where = f"any budget of {unit}" if whole else listed(budgets)
        against.append(f"{kind.capitalize()} models, {where}: do not trust it. {reason}")
    return Section(
        id="recommendation", title=title, text=[text], figures=_some(frontier_figure(data, laws)),
        tables=_some(recommendation_table(laws.picks), frontier_table(laws.frontiers)),
        points=[*open_points, *against] or ["The data give no reason against these; those of the laws are above."],
    )  # fmt: skip


def _planned(
    data: StudyData, id: str, title: str, figure: Figure | None, what: str, wanted: Callable[[Cell], bool]
) -> list[Section]:
    """The figure's section; without a figure, a sentence where one was planned, and nothing where none was."""
    if figure is not None:
        return [Section(id=id, title=title, figures=[figure])]
    planned = [c.name for c in data.plan.cells if wanted(c) and not c.variant] if data.plan else []
    if not planned:
        return []
    missing = [name for name in planned if name in data.missing]
    why = f"not finished: {listed(missing)}" if missing else "they recorded too little for it"
    return [Section(id=id, title=title, text=[f"Planned were {what}, and there is nothing to show ({why})."])]


def _transfer(data: StudyData) -> list[Section]:
    figures = _some(transfer_figure(data), transfer_grid_figure(data))
    if figures:
        tables = [transfer_table(data)]
        return [Section(id="transfer", title="Transfer to other test sets", figures=figures, tables=tables)]
    return _planned(data, "transfer", "Transfer to other test sets", None, "evaluation of several sets",
                  lambda c: len(c.config.task.evals or ()) > 1)  # fmt: skip


def _cost(data: StudyData) -> list[Section]:
    figure = cost_figure(data)
    if figure is None:
        return _planned(data, "cost", "Where the cost goes", None, "runs whose cost is booked by phase", lambda c: True)
    return [Section(id="cost", title=figure.title, figures=[figure], tables=[cost_table(data)])]


def _plan_text(data: StudyData) -> list[str]:
    cells = data.plan.cells if data.plan else ()
    blocks = dict.fromkeys(block for c in cells for block in c.axes)
    counts = [(b, sum(b in c.axes for c in cells)) for b in blocks]
    return [f"{len(data.cells)} cells: {listed([f'{b} {n}' for b, n in counts])}. {len(data.runs)} are finished."]


def render_page(
    data: StudyData, sections: Sequence[Section], found: Sequence[str], images: Mapping[str, bytes] | None = None
) -> str:
    """The page as HTML.

    Args:
        data: what it is about.
        sections: of `sections_of`.
        found: of `findings`.
        images: figure name to PNG, for print and for readers without JavaScript.

    Returns:
        The text; it needs no other file.
    """
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    panels: dict[str, Any] = {}
    shown = []
    for s in sections:
        figures = []
        for f in s.figures:
            ids = [f"{f.name}-{i}" for i in range(len(f.panels))]
            panels |= {i: plotly_spec(p, height=f.height) for i, p in zip(ids, f.panels, strict=True)}
            image = base64.b64encode((images or {}).get(f.name, b"")).decode()
            figures.append(
                {"name": f.name, "title": f.title if f.title != s.title else "", "legend": f.legend, "caption": f.caption,
                 "panels": [(i, p.about) for i, p in zip(ids, f.panels, strict=True)],
                 "min_width": 300 if min(len(ids), f.columns) > 2 else 420, "alone": len(ids) == 1, "image": image}
            )  # fmt: skip
        shown.append({"id": s.id, "title": s.title, "text": s.text, "figures": figures, "tables": s.tables,
                      "points": s.points})  # fmt: skip
    warnings = []
    if data.missing:
        warnings.append(
            f"{len(data.missing)} of {len(data.cells)} cells are not finished and not in this report: "
            f"{', '.join(data.missing)}."
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    whose = "" if data.plan else " The runs are of another trainer."
    return environment.get_template("report.html").render(
        study=data.name,
        heading=f"Scaling study \u201c{data.name}\u201d",
        about=f"GRPO post-training of {len(data.sizes)} model sizes ({listed(data.sizes)}; N from "
        f"{human(min(data.params.values()))} to {human(max(data.params.values()))}), {listed(data.kinds)} models, "
        f"{len(data.runs)} finished runs, tested on held-out problems.",
        warnings=warnings,
        findings=found,
        sections=shown,
        footer=f"Made from the records in {TABLE_FILE} by grpo_engine.{whose} Beside this page: figures as PNG and PDF, "
        "tables as Markdown and LaTeX.",
        plotly_js=Markup(get_plotlyjs()),
        panels=Markup(json.dumps(panels, allow_nan=False, ensure_ascii=False).replace("</", "<\\/")),
    )


@contextlib.contextmanager
def _drawers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for drawing, which import matplotlib while this one reads the records."""
    with ProcessPoolExecutor(processes, mp_context=SpawnContext()) as pool:
        for _ in range(processes):
            pool.submit(import_matplotlib)
        yield pool


def write_report(study_dir: str | os.PathLike[str]) -> Path:
    """Writes the report of a study from its records and fits.json; the package's docstring says what is written where.

    Args:
        study_dir: the study's folder. Cells that are not finished are left out, and the page names them.

    Returns:
        The page, `report/index.html`.

    Raises:
        FileNotFoundError, ValueError: see `load_data` and `read_fits`; a fits.json of other records.
    """
    folder = Path(study_dir)
    data = load_data(folder)
    fits = read_fits(folder / FITS_FILE)
    if fits.records != records_digest(data):
        raise ValueError(f"{folder / FITS_FILE}: it is not of the records as they are now; fit them: grpo-engine study fit")
    with _drawers(min(num_cores(), MOST_DRAWERS)) as drawers:
        laws = study_laws(data, fits)
        sections = sections_of(data, laws)
        figures, tables = (_empty_folder(folder / REPORT / name) for name in ("figures", "tables"))
        drawn = list(drawers.map(draw, (f for s in sections for f in s.figures), itertools.repeat(figures)))
    for table in (t for s in sections for t in s.tables):
        (tables / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
        (tables / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8")
    page = folder / REPORT / "index.html"
    images = {png.stem: png.read_bytes() for png, _ in drawn}
    files.write_bytes_atomic(page, render_page(data, sections, findings(data, laws), images).encode())
    return page


def _empty_folder(path: Path) -> Path:
    """A folder without the files of an earlier report, which may be of sections that are no longer there."""
    path.mkdir(parents=True, exist_ok=True)
    for file in path.iterdir():
        if file.suffix in (".png", ".pdf", ".md", ".tex"):
            file.unlink()
    return path

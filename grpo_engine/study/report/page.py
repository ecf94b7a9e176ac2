"""The report: its sections, the page, and the files beside it."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import records
from ...processes import SpawnContext
from ..design import human, num_cores
from ..drawing import Figure, draw, import_matplotlib, plotly_spec
from ..importers import TABLE_FILE
from ..recommend import Recommendation
from ..results import Fits
from .data import StudyData, load_data
from .figures import (
    axis_figure,
    control_figure,
    cost_figure,
    kinds_figure,
    learning_figure,
    loss_figure,
    slope_figure,
    transfer_figure,
)
from .fits import axes_of, budget_picks, fit_data
from .tables import Table, cost_table, joint_table, loss_table, size_table, transfer_table
from .words import cautions, findings, interval_text, limits, listed, method_points, verdicts

REPORT = "report"
MOST_DRAWERS = 4  # processes


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    id: str
    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    points: Sequence[str] = ()


def _recommendation_section(picks: Sequence[tuple[str, str, Recommendation]]) -> Section:
    rows, reasons = [], []
    for kind, budget, r in picks:
        best = r.candidates[0]
        rows.append(
            (
                kind, budget, r.pick, interval_text(best.loss, "{:.3f}".format),
                "" if best.prompts is None else f"{best.prompts:,.0f}", "yes" if r.decided else "no",
                listed(r.tied) if r.tied else "none",
            )
        )  # fmt: skip
        if not r.decided:
            why = r.why.partition(" Intervals: ")[0]
            reasons.append(f"{kind.capitalize()} models, {budget}: not decided. {why}")
    table = Table(
        head=("models", "budget", "size", "loss", "prompts", "decided", "not told apart from it"),
        rows=rows,
        text_columns=2,
        note="The size with the smallest loss that the fitted law predicts for a budget, with the 95 % interval of "
        "that loss. Decided: the data carry the law, every other size is behind beyond the 95 % interval of the "
        "difference, and the budget lies where that size was measured.",
    )
    text = (
        "Budgets are those that the runs of the ladder ended with. A budget of compute buys a small model more "
        "prompts; a budget of prompts costs a large model more compute."
    )
    return Section(id="recommendation", title="Which size to train", text=[text], tables=[table], points=reasons)


def sections_of(data: StudyData, fits: Fits) -> list[Section]:
    loss_figures = [loss_figure(data, fits, axis) for axis in axes_of(fits)]
    slopes = slope_figure(data, fits)
    kinds, control, transfer, cost = (
        f(data) for f in (kinds_figure, control_figure, transfer_figure, cost_figure)
    )
    sections = [
        *(Section(id=f.name, title=f.title, figures=[f]) for f in loss_figures),
        Section(
            id="law", title="The fitted law", figures=[slopes] if slopes else [],
            tables=[joint_table(fits), size_table(fits)],
            points=[*verdicts(fits), *cautions(fits)],
        ),
        *([_recommendation_section(picks)] if (picks := budget_picks(data, fits)) else []),
        Section(id="losses", title="Where the runs end", figures=[kinds] if kinds else [], tables=[loss_table(data)]),
    ]
    if control:
        sections.append(Section(id="control", title=control.title, figures=[control]))
    if any(r.steps for r in data.runs.values()):
        sections.append(Section(id="learning", title="Learning curves", figures=[learning_figure(data)]))
    if transfer:
        sections.append(
            Section(id="transfer", title=transfer.title, figures=[transfer], tables=[transfer_table(data)])
        )
    for axis in ("tau", "group_size"):
        figure = axis_figure(data, axis)
        if figure:
            sections.append(Section(id=axis, title=figure.title, figures=[figure]))
    if cost:
        sections.append(Section(id="cost", title=cost.title, figures=[cost], tables=[cost_table(data)]))
    sections.append(Section(id="method", title="How it was measured", points=method_points(data)))
    sections.append(Section(id="limits", title="What these data cannot show", points=limits(data)))
    return sections


def render_page(data: StudyData, sections: Sequence[Section], found: Sequence[str]) -> str:
    import json

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
            wide = 300 if len(f.panels) > 2 else 420
            figures.append({"legend": f.legend, "ids": ids, "caption": f.caption, "min_width": wide,
                            "alone": len(ids) == 1})  # fmt: skip
        shown.append({"id": s.id, "title": s.title, "text": s.text, "figures": figures, "tables": s.tables,
                      "points": s.points})  # fmt: skip
    run = next(iter(data.runs.values()))
    hardware, versions = run.header.get("hardware"), run.header.get("versions")
    where = (
        f"Runs: {hardware.get('cpu')}, {hardware.get('cores')} cores; Python {versions.get('python')}, torch "
        f"{versions.get('torch')}."
        if hardware and versions
        else "The runs are of another trainer."
    )
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
    name = data.name
    problems = len(data.sizes)
    return environment.get_template("report.html").render(
        study=name,
        heading=f"Scaling study \u201c{name}\u201d",
        about=f"GRPO post-training of {problems} model sizes ({listed(data.sizes)}; N from "
        f"{human(min(data.params.values()))} to {human(max(data.params.values()))}), {listed(data.kinds)} models, "
        f"{len(data.runs)} finished runs, tested on held-out problems.",
        warnings=warnings,
        findings=found,
        sections=shown,
        footer=f"Made from the records in {TABLE_FILE} by grpo_engine. {where}",
        plotly_js=Markup(get_plotlyjs()),
        panels=Markup(json.dumps(panels, allow_nan=False, ensure_ascii=False).replace("</", "<\\/")),
    )


@contextlib.contextmanager
def _drawers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for drawing, which import matplotlib while this one makes fits."""
    with ProcessPoolExecutor(processes, mp_context=SpawnContext()) as pool:
        for _ in range(processes):
            pool.submit(import_matplotlib)
        yield pool


def write_report(study_dir: str | os.PathLike[str], *, n_boot: int = 200) -> Path:
    """Fits the laws of a study and writes its report; see the top of this file for what is written where.

    Args:
        study_dir: the study's folder. Cells that are not finished are left out, and the page names them.
        n_boot: bootstrap draws behind each interval of a fit.

    Returns:
        The page, `report/index.html`.

    Raises:
        FileNotFoundError, ValueError: see `load_data`.
    """
    folder = Path(study_dir)
    data = load_data(folder)
    with _drawers(min(num_cores(), MOST_DRAWERS)) as drawers:
        fits = fit_data(data, folder, n_boot)
        sections = sections_of(data, fits)
        figures = folder / REPORT / "figures"
        figures.mkdir(parents=True, exist_ok=True)
        list(drawers.map(draw, (f for s in sections for f in s.figures), itertools.repeat(figures)))
    page = folder / REPORT / "index.html"
    records.write_bytes_atomic(page, render_page(data, sections, findings(data, fits)).encode())
    return page

"""The tables of a study, each defined once for the page, Markdown, LaTeX and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...cost import COST_HEAD, cost_rows
from ..design import human
from ..results import Fits
from .data import StudyData, costs_of, transfer_rows
from .fits import AXIS_NAMES
from .words import cautions, change_text, interval_text, loss_text, rate_text, verdicts

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    text_columns: int = 1
    note: str = ""
    summary: str = ""  # folded away under this line, when given


def law_table(fits: Fits) -> Group:
    """The fitted laws for a terminal, 80 columns wide.

    Args:
        fits: of `fit_study`.

    Returns:
        The joint law for each axis and kind, why the data do not carry those that they do not, and the slope of each
        size by itself.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(ours: Table, gap: int) -> Table:
        out = Table(title=ours.title, title_justify="left", box=None, padding=(0, gap, 0, 0))
        for i, name in enumerate(ours.head):
            out.add_column(name, justify="left" if i < ours.text_columns else "right", no_wrap=True)
        for row in ours.rows:
            out.add_row(*row)
        return out

    notes = [Text(f"- {line}") for line in [*verdicts(fits), *cautions(fits)]]
    return Group(table(joint_table(fits), 2), Text(), *notes, Text(), table(size_table(fits), 1))


def joint_table(fits: Fits) -> Table:
    rows = []
    for f in fits.fits:
        p = f.joint.parameters if f.joint else {}
        rows.append(
            (
                AXIS_NAMES[f.axis], f.kind, interval_text(p.get("K_max"), "{:.3f}".format),
                interval_text(p.get("N0"), human), "" if not f.joint or f.joint.r2 is None else f"{f.joint.r2:.3f}",
                "yes" if f.verdict.ok else "no",
            )
        )  # fmt: skip
    return Table(
        title="log L = \u2212k(N) log X + E(N), k(N) = K_max N / (N + N0)",
        head=("X", "models", "K_max", "N0", "R\u00b2", "carried"),
        rows=rows,
        text_columns=2,
        note="X: compute as 6NT, as the ledger of all phases but evaluation, or prompts seen. 95 % intervals. Carried: "
        "whether the data determine the law. R\u00b2 is pooled over sizes: most of it is their difference.",
    )


def size_table(fits: Fits) -> Table:
    rows = []
    for f in fits.fits:
        if f.kind == "all" or f.axis == "ledger":
            continue
        for s in f.sizes:
            rows.append(
                (
                    AXIS_NAMES[f.axis], s.kind, s.size, human(s.params), interval_text(s.k, "{:.3f}".format),
                    f"{s.E.value:.2f}", "" if s.r2 is None else f"{s.r2:.2f}", f"{s.num_runs}",
                    "yes" if s.verdict.ok else "no",
                )
            )  # fmt: skip
    return Table(
        title="Each size by itself: log L = \u2212k log X + E",
        head=("X", "models", "size", "N", "k", "E", "R\u00b2", "runs", "falls"),
        rows=rows,
        text_columns=3,
        summary="Each size by itself",
        note="95 % intervals; natural logarithms, so that E is the logarithm of the loss at X = 1. Falls: whether the "
        "loss falls beyond its scatter.",
    )


def loss_table(data: StudyData) -> Table:
    rows = []
    for kind in data.kinds:
        for size in data.sizes:
            runs = data.main(size, kind)
            sampled, greedy = data.curve(runs), data.curve(runs, mode="greedy")
            if not sampled:
                continue
            row = [size, kind, human(data.params[size]), str(len(runs)), loss_text(sampled[0]), loss_text(sampled[-1])]
            row += [loss_text(greedy[0]), loss_text(greedy[-1])] if greedy else ["", ""]
            rows.append(row)
    for size in data.sizes:
        for kind in ("base", "instruct"):
            runs = data.control(size, kind)
            sampled, greedy = data.curve(runs), data.curve(runs, mode="greedy")
            if sampled:
                row = [size, f"{kind}, control", human(data.params[size]), str(len(runs))]
                row += [loss_text(sampled[0]), loss_text(sampled[-1])]
                rows.append(row + ([loss_text(greedy[0]), loss_text(greedy[-1])] if greedy else ["", ""]))
    return Table(
        head=("size", "model", "N", "runs", "loss before", "loss after", "greedy before", "greedy after"),
        rows=rows,
        text_columns=2,
        note=f"Test loss, 1 - pass@1, on {data.headline}, with standard errors. The sampled loss is what the laws are "
        "fitted to; the greedy one takes the likeliest token everywhere.",
    )


def transfer_table(data: StudyData) -> Table:
    rows = []
    greedy = {(r[0], r[2], r[3]): r for r in transfer_rows(data, "greedy")}
    for name, inside, kind, size, before, after in transfer_rows(data, "sample"):
        row = [name, "in" if inside else "out", kind, size, rate_text(before), rate_text(after), change_text(before, after)]
        g = greedy.get((name, kind, size))
        rows.append(row + ([rate_text(g[4]), rate_text(g[5]), change_text(g[4], g[5])] if g else ["", "", ""]))
    return Table(
        head=("set", "domain", "model", "size", "before", "after", "change", "greedy before", "after", "change"),
        rows=rows,
        text_columns=4,
        summary="All values, with the greedy ones",
        note="pass@1 in per cent, with standard errors.",
    )


def cost_table(data: StudyData) -> Table:
    return Table(
        title="Cost of a run by phase",
        head=("run", *COST_HEAD),
        rows=[(label, *row) for label, cost in costs_of(data) for row in cost_rows(cost)],
        text_columns=2,
        summary="Seconds, tokens and FLOPs of each phase",
        note="Mean over runs. GFLOP/s: FLOPs of the matrix products and the attention over the phase's own seconds.",
    )

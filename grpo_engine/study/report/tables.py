"""The tables of a study, each defined once for the page, Markdown, LaTeX and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpo_engine.records.cost import COST_HEAD, cost_rows
from grpo_engine.records.text_table import Table
from grpo_engine.study.data import StudyData, costs_of, transfer_rows
from grpo_engine.study.laws.results import Claim, Estimate, Fits, Verdict
from grpo_engine.study.plan_view import duration, human, plan_rows
from grpo_engine.study.recommend import FrontierPoint, Recommendation
from grpo_engine.study.report.fits import AXIS_NAMES, Laws
from grpo_engine.study.report.words import cautions, change_text, interval_text, listed, loss_text, rate_text, verdicts

if TYPE_CHECKING:
    from rich.console import Group


def law_table(fits: Fits) -> Group:
    """The fitted laws for a terminal, 80 columns wide.

    Args:
        fits: of `fit_study`.

    Returns:
        The joint law for each axis and kind, why the data do not identify those that they do not, and the slope of each
        size by itself.
    """
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    def table(ours: Table, gap: int) -> RichTable:
        out = RichTable(title=ours.title, title_justify="left", box=None, padding=(0, gap, 0, 0))
        for i, name in enumerate(ours.head):
            out.add_column(name, justify="left" if i < ours.text_columns else "right", no_wrap=True)
        for row in ours.rows:
            out.add_row(*row)
        return out

    notes = [Text(f"- {line}") for line in [*verdicts(fits), *cautions(fits)]]
    return Group(table(joint_table(fits), 1), Text(), *notes, Text(), table(size_table(fits), 1))


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
        name="law",
        title="log L = \u2212k(N) log X + E(N), k(N) = K_max N / (N + N0)",
        head=("X", "models", "K_max", "N0", "R\u00b2", "identifiable"),
        rows=rows,
        text_columns=2,
        note="X: compute as 6NT, as the ledger of all phases but evaluation, or prompts seen. 95 % intervals. Identifiable: "
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
        name="sizes",
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
        name="losses",
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
        name="transfer",
        head=(
            "set",
            "domain",
            "model",
            "size",
            "before",
            "after",
            "change",
            "greedy before",
            "greedy after",
            "greedy change",
        ),
        rows=rows,
        text_columns=4,
        summary="All values, with the greedy ones",
        note="pass@1 in per cent, with standard errors.",
    )


def cost_table(data: StudyData) -> Table:
    return Table(
        name="cost",
        title="Cost of a run by phase",
        head=("run", *COST_HEAD),
        rows=[(label, *row) for label, cost in costs_of(data) for row in cost_rows(cost)],
        text_columns=2,
        summary="Seconds, tokens and FLOPs of each phase",
        note="Mean over runs. GFLOP/s: FLOPs of the matrix products and the attention over the phase's own seconds.",
    )


def claims_table(claims: Sequence[Claim]) -> Table:
    """A row for each claim."""
    return Table(
        name="claims",
        head=("claim", "test", "margin", "verdict", "why"),
        rows=[(c.statement, c.test, f"{c.margin:g}", c.verdict, c.why) for c in claims],
        text_columns=2,
        wide=("claim", "verdict", "why"),
        note="Supported: every comparison is. Not supported: one is shown not to be. Undecided: the rest; a difference that "
        "is not significant supports nothing. The margin is the smallest effect that matters, in loss (for base against "
        "instruct, in its logarithm).",
    )


def comparisons_table(claims: Sequence[Claim]) -> Table:
    """A row for each comparison of each claim."""
    rows = []
    for claim in claims:
        for c in claim.comparisons:
            needed = "" if c.verdict != "undecided" else "none would" if c.runs_needed is None else str(c.runs_needed)
            rows.append(
                (
                    claim.name, c.label, interval_text(c.effect, "{:+.3f}".format), f"{100 * c.confidence:.1f} %",
                    f"{claim.margin:g}", c.verdict, f"{c.runs[0]}, {c.runs[1]}", needed, c.note,
                )
            )  # fmt: skip
    return Table(
        name="comparisons",
        head=("claim", "comparison", "effect", "confidence", "margin", "verdict", "runs", "runs that would decide", "why"),
        rows=rows,
        text_columns=2,
        wide=("verdict", "why"),
        summary="Every comparison: effect, interval, margin, runs",
        note="Effect: positive as the claim has it; in loss at the largest X that both sides reached. Intervals at the "
        "confidence at which all comparisons of a claim hold together with 95 %. Runs: of each side; those that would "
        "decide it are a side, if the effect is what it seems.",
    )


def held_out_table(data: StudyData, laws: Laws, *, most: int | None = None) -> Table | None:
    """The laws by their error on what they did not see, the best first; only the best so many of each test."""
    rows = []
    for f in laws.fits.fits:
        if f.kind not in data.kinds:
            continue
        for choice in f.choices:
            mine = [h for h in f.held_out if h.test == choice.test and not h.tests_only_slope]
            for law, error in list(choice.errors.items())[:most]:
                inside = [h.coverage for h in mine if h.law == law and h.coverage is not None]
                covered = f"{100 * sum(inside) / len(inside):.0f} %" if inside else ""
                rows.append(
                    (
                        choice.test, AXIS_NAMES[f.axis], f.kind, law, f"{100 * error:.1f} %", f"{choice.num_targets}",
                        _skills(choice.skill[law]), covered, "yes" if law == choice.best else "",
                    )
                )  # fmt: skip
    for other in laws.fits.other_sets:
        for h in sorted(other.held_out, key=lambda h: h.log_error):
            rows.append(
                (
                    f"{h.test}: {h.target}", "prompts", other.kind, h.law, f"{100 * h.log_error:.1f} %", "1",
                    _skills(h.skill), "" if h.coverage is None else f"{100 * h.coverage:.0f} %", "",
                )
            )  # fmt: skip
    if not rows:
        return None
    return Table(
        name="held_out" if most else "held_out_all",
        head=("test", "X", "models", "law", "error", "targets", "skill against", "in its 90 % band", "chosen"),
        rows=rows,
        text_columns=4,
        wide=("skill against",),
        title=f"The best {most} of each test by their error on what they did not see" if most else "",
        summary="" if most else "Every law by its error on what it did not see",
        note="Largest size: slope and intercept of a size from those below it. Late steps: the last fifth of a curve from "
        "its first two fifths. Other set: one test set from the others. Error: root mean square of log(predicted / "
        "measured). Skill: 1 - (error / error of a naive rule)\u00b2; 0 is no better than the rule, negative is worse.",
    )


def _skills(skill: dict[str, float | None]) -> str:
    return "; ".join(f"{rule} {v:.2f}" for rule, v in skill.items() if v is not None).replace("-", "\u2212")


def other_laws_table(data: StudyData, laws: Laws) -> Table | None:
    """The laws beside the joint one: intercepts E(N), surfaces L(N, D), single curves that saturate, reuse."""
    rows = []
    for f in laws.fits.fits:
        if f.kind in data.kinds and f.axis != "ledger":
            for v in f.intercepts:
                rows.append(
                    (f"intercepts at X = {v.x:.3g}", AXIS_NAMES[f.axis], f.kind, v.law, v.formula, _parameters(v.parameters),
                     f"misfit {v.misfit:.3f}", _identifiable(v.verdict))
                )  # fmt: skip
    found = [(s.kind, s.law, "all sizes") for s in laws.fits.surfaces]
    found += [(r.kind, r.law, f"{r.size}, reuse") for r in laws.fits.reuse]
    found += [
        (f.kind, law, law.label) for f in laws.fits.fits if f.axis == "data" and f.kind in data.kinds for law in f.laws
    ]
    for kind, law, what in found:
        rows.append(
            (what, "prompts", kind, law.law, law.formula, _parameters(law.parameters),
             "" if law.r2 is None else f"{law.r2:.3f}", _identifiable(law.verdict))
        )  # fmt: skip
    if not rows:
        return None
    return Table(
        name="other_laws",
        head=("of", "X", "models", "law", "formula", "parameters", "R\u00b2", "identifiable"),
        rows=rows,
        text_columns=6,
        wide=("formula", "parameters", "identifiable"),
        summary="Other laws: intercepts, surfaces, reuse, curves that saturate",
        note="95 % intervals; an end that is missing is open: the data do not limit it. Parameters of each curve are left "
        "out. A good R\u00b2 chooses no law; the held-out errors do.",
    )


def _parameters(parameters: dict[str, Estimate]) -> str:
    def show(v: float) -> str:
        return f"{v:.3g}" if abs(v) < 1e4 else human(v)

    def span(e: Estimate) -> str:
        if e.at_bound:
            return f"{show(e.value)} (at a bound)"
        if e.low is None and e.high is None:
            return f"{show(e.value)} [open]"
        return f"{show(e.value)} [{'open' if e.low is None else show(e.low)}, {'open' if e.high is None else show(e.high)}]"

    return "; ".join(f"{q} = {span(e)}" for q, e in parameters.items() if "[" not in q)


def _identifiable(verdict: Verdict) -> str:
    return "yes" if verdict.ok else f"no: {verdict.why}"


def recommendation_table(picks: Sequence[tuple[str, str, Recommendation]]) -> Table:
    """What to train for the budgets that the runs ended with."""
    rows = []
    for kind, budget, r in picks:
        best = r.candidates[0]
        rows.append(
            (
                kind, budget, r.pick, interval_text(best.loss, "{:.3f}".format),
                "" if best.prompts is None else f"{best.prompts:,.0f}", "yes" if r.decided else "no",
                listed(r.tied) if r.tied else "none",
            )
        )  # fmt: skip
    return Table(
        name="recommendation",
        head=("models", "budget", "size", "loss", "prompts", "decided", "not told apart from it"),
        rows=rows,
        text_columns=3,
        wide=("not told apart from it",),
        note="The size with the smallest loss that the fitted law predicts for a budget, with the 95 % interval of "
        "that loss. Decided: the data identify the law, every other size is behind beyond the 95 % interval of the "
        "difference, and the budget lies where that size was measured.",
    )


def frontier_table(frontiers: dict[str, tuple[FrontierPoint, ...]]) -> Table | None:
    """N*(C), a row where the best size or whether it is decided changes."""
    rows = []
    for kind, points in frontiers.items():
        last = None
        for p in points:
            if (p.pick, p.decided) != last:
                span = " to ".join(dict.fromkeys(human(n) for n in p.params_span))
                rows.append((kind, f"{p.compute:.2e}", p.pick, human(p.params), span,
                             interval_text(p.loss, "{:.3f}".format), "yes" if p.decided else "no"))  # fmt: skip
            last = (p.pick, p.decided)
    if not rows:
        return None
    return Table(
        name="frontier",
        head=("models", "from C (FLOPs)", "size", "N*", "best in 5 % of draws", "loss", "decided"),
        rows=rows,
        text_columns=1,
        note="Each row holds from its compute on to the next row's.",
    )


def plan_table(data: StudyData) -> Table | None:
    """The cells that were planned, and what became of them; None for another trainer's logs."""
    if data.plan is None:
        return None
    rows = []
    for cell, row in zip(data.plan.cells, plan_rows(data.plan)[-len(data.plan.cells) :], strict=True):
        run = data.runs.get(cell.name)
        took = sum(t.seconds or sum(c.seconds for c in t.phase.values()) for t in run.timings) if run else 0.0
        rows.append(
            (
                cell.name, cell.method, cell.size, cell.kind, cell.variant, str(cell.seed), f"{cell.tau:g}",
                str(cell.group_size), str(cell.config.steps), f"{row['compute_6nt']:.2e}", duration(row["seconds"]),
                duration(took) if took else "", "finished" if run else "missing", cell.id,
            )
        )  # fmt: skip
    return Table(
        name="plan",
        head=("cell", "method", "size", "model", "variant", "seed", "τ", "G", "steps", "6NT", "planned time", "time",
              "state", "configuration"),
        rows=rows,
        text_columns=5,
        wide=("state", "configuration"),
        summary=f"All {len(rows)} cells",
        note="6NT and time as planned, from shapes and assumed lengths; time as it was, of all steps. Configuration: the "
        "hash of everything that was set.",
    )  # fmt: skip


def versions_table(data: StudyData) -> Table | None:
    """The software and machines that the runs had; None where no run says."""
    found: dict[tuple[str, str], int] = {}
    for run in data.runs.values():
        versions, hardware = run.header.get("versions") or {}, run.header.get("hardware") or {}
        machine = {"processor": hardware.get("cpu"), "cores": hardware.get("cores"), "threads": hardware.get("threads"),
                   "GPUs": listed(gpus) if (gpus := hardware.get("gpus")) else None}  # fmt: skip
        for name, value in (machine | (run.header.get("source") or {}) | versions).items():
            if value is not None:
                found[name, str(value)] = found.get((name, str(value)), 0) + 1
    if not found:
        return None
    order = list(dict.fromkeys(name for name, _ in found))
    return Table(
        name="versions",
        head=("what", "which", "runs"),
        rows=[(n, v, str(c)) for (n, v), c in sorted(found.items(), key=lambda f: (order.index(f[0][0]), f[0][1]))],
        text_columns=2,
    )

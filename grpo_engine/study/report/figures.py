"""The figures of a study, as data for `drawing.py`."""

from __future__ import annotations

import math

import numpy as np

from ...cost import OTHER
from ...records import PHASES
from ..bootstrap import interval
from ..design import duration, human
from ..drawing import GREY, KIND_COLOR, PHASE_COLOR, BarPanel, Figure, Panel, Series, size_colors, tick_text
from ..results import Fits, draws_of
from .data import StudyData, costs_of, mean_steps, transfer_rows
from .fits import axes_of


def _sizes_legend(data: StudyData, *more: tuple[str, str, str]) -> tuple[tuple[str, str, str], ...]:
    colors = size_colors(data.sizes)
    return (*((f"{s} ({human(data.params[s])})", colors[s], "line") for s in data.sizes), *more)


def _grid(low: float, high: float, count: int = 60) -> list[float]:
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def loss_figure(data: StudyData, fits: Fits, axis: str) -> Figure:
    colors, panels = size_colors(data.sizes), []
    points: list[float] = []
    carried = []
    for kind in data.kinds:
        fit = fits.get(axis, kind)
        joint = fit.joint if fit.verdict.ok else None
        carried.append(joint is not None)
        series = []
        for size in data.sizes:
            curve = [p for p in data.curve(data.main(size, kind)) if p.step > 0]
            if not curve:
                continue
            x = [p.compute if axis == "compute" else p.prompts for p in curve]
            points += [p.loss + s * p.error for p in curve for s in (-1, 1)]
            own = next((s for s in fit.sizes if s.size == size), None)
            if own:
                line = _grid(own.x_min, own.x_max)
                if joint:
                    y = joint.loss(size, line).tolist()
                    low, high = (b.tolist() for b in joint.band(size, line))
                    points += [*low, *high]
                else:
                    y, low, high = [math.exp(own.E.value - own.k.value * math.log(v)) for v in line], None, None
                    points += y
                series.append(
                    Series(label=f"{size}, fitted", x=line, y=y, low=low, high=high, color=colors[size], markers=False,
                           thin=joint is None)
                )  # fmt: skip
            series.append(
                Series(label=size, x=x, y=[p.loss for p in curve], y_error=[p.error for p in curve], line=False,
                       color=colors[size], end_label=size)
            )  # fmt: skip
        panels.append((kind, series))
    lines = {
        (True,): "Lines: the law fitted to all sizes together, with its 95 % band. ",
        (False,): "The data do not carry one law for all sizes; the thin lines are fitted to each size by itself. ",
    }.get(
        tuple(sorted(set(carried))),
        "Lines with a band: the law fitted to all sizes of a kind together, with its 95 % band. Thin lines, where the "
        "data do not carry that law: each size by itself. ",
    )
    what = {"compute": "training compute, 6NT (FLOPs)", "data": "prompts seen"}[axis]
    return Figure(
        name=f"loss_{axis}",
        title={"compute": "Test loss against compute", "data": "Test loss against data"}[axis],
        caption=f"{lines}Points: mean over runs, bars one standard error. Step 0 has no place on a logarithmic axis.",
        panels=[
            Panel(title=f"{kind} models", x_label=what, y_label=f"test loss ({data.headline})", series=series,
                  x_log=True, y_log=True, y_range=(min(points), max(points)))
            for kind, series in panels
        ],
        legend=_sizes_legend(data),
        height=400,
    )  # fmt: skip


def slope_figure(data: StudyData, fits: Fits) -> Figure | None:
    """k of each size by itself, and k(N) of the joint law where the data carry it."""
    if len(data.sizes) < 2:
        return None
    panels = []
    for axis in axes_of(fits):
        series, carried = [], []
        for kind in data.kinds:
            fit = fits.get(axis, kind)
            if not fit.sizes:
                continue
            if fit.joint and fit.verdict.ok:
                n = _grid(min(data.params.values()) / 1.5, max(data.params.values()) * 1.5)
                k, _ = draws_of(fit.joint, np.array(n))
                low, high = interval(k)
                series.append(
                    Series(label=f"{kind}, law", x=n, y=fit.joint.slope.k(np.array(n)).tolist(), low=low.tolist(),
                           high=high.tolist(), color=KIND_COLOR[kind], markers=False, end_label=kind)
                )  # fmt: skip
                carried.append(kind)
            series.append(
                Series(
                    label=f"{kind}, each size", x=[s.params for s in fit.sizes], y=[s.k.value for s in fit.sizes],
                    y_span=[(s.k.low, s.k.high) for s in fit.sizes], color=KIND_COLOR[kind], line=False,
                    end_label=None if kind in carried else kind,
                )
            )  # fmt: skip
        panels.append(
            Panel(title={"compute": "against compute", "data": "against data"}[axis],
                  x_label="non-embedding parameters N", y_label="slope k", series=series, x_log=True, zero="y")
        )  # fmt: skip
    return Figure(
        name="slopes",
        title="How fast the loss falls, by size",
        caption="Points: the slope of each size by itself, with its 95 % interval. Lines, where the data carry the "
        "law: k(N) = K_max N / (N + N0) with its 95 % band.",
        panels=panels,
        height=360,
    )


def learning_figure(data: StudyData) -> Figure:
    colors = size_colors(data.sizes)
    panels = []
    for name, title, unit in (
        ("reward_mean", "Reward", "mean training reward"),
        ("entropy", "Entropy", "nats a token"),
        ("response_len_mean", "Response length", "tokens"),
    ):
        series = []
        for kind in data.kinds:
            for size in data.sizes:
                x, y = mean_steps(data.main(size, kind), name)
                if x:
                    series.append(
                        Series(label=f"{size} {kind}", x=x, y=y, color=colors[size], markers=False,
                               dashed=kind == "instruct")
                    )  # fmt: skip
        panels.append(Panel(title=title, x_label="step", y_label=unit, series=series, x_zero=True))
    dashed = (("instruct (dashed)", GREY, "dash"),) if "instruct" in data.kinds else ()
    return Figure(
        name="learning_curves",
        title="Learning curves",
        caption="Means over runs, averaged over a twentieth of the run. Rewards are those of training answers at "
        "temperature 1 on ever new problems; they are no test result.",
        panels=panels,
        legend=_sizes_legend(data, *dashed),
        height=300,
    )


def kinds_figure(data: StudyData) -> Figure | None:
    if len(data.kinds) < 2:
        return None
    series = []
    for kind in data.kinds:
        curves = [(data.params[s], c) for s in data.sizes if len(c := data.curve(data.main(s, kind))) > 1]
        for place, label, hollow in ((0, "before", True), (-1, "after", False)):
            series.append(
                Series(
                    label=f"{kind} {label}", x=[n for n, _ in curves], y=[c[place].loss for _, c in curves],
                    y_error=[c[place].error for _, c in curves], color=KIND_COLOR[kind], hollow=hollow, dashed=hollow,
                    end_label=f"{kind} {label}",
                )
            )  # fmt: skip
    return Figure(
        name="base_instruct",
        title="Base against instruct models",
        caption="Test loss before the first and after the last step; bars one standard error.",
        panels=[
            Panel(title="", x_label="non-embedding parameters N", y_label=f"test loss ({data.headline})",
                  series=series, x_log=True)
        ],
        height=400,
    )  # fmt: skip


def control_figure(data: StudyData) -> Figure | None:
    both = [(s, k) for k in data.kinds for s in data.sizes if data.control(s, k) and data.main(s, k)]
    if not both:
        return None
    panels, every = [], []
    for size, kind in both:
        series = []
        for label, runs, color in (
            ("RL", data.main(size, kind), KIND_COLOR[kind]),
            ("control", data.control(size, kind), KIND_COLOR["control"]),
        ):
            curve = data.curve(runs)
            every += [p.loss + s * p.error for p in curve for s in (-1, 1)]
            series.append(
                Series(label=label, x=[p.tokens for p in curve], y=[p.loss for p in curve],
                       y_error=[p.error for p in curve], color=color, end_label=label)
            )  # fmt: skip
        panels.append((f"{size}, {kind}", series))
    return Figure(
        name="control",
        title="RL against plain pretraining",
        caption="The control goes on with plain pretraining of the same model for the same number of steps: from the full "
        "learning rate, hence its rise, annealed to the end, so compare the ends. Bars one standard error.",
        panels=[
            Panel(title=title, x_label="trained tokens", y_label=f"test loss ({data.headline})",
                  series=series, x_zero=True, y_range=(min(every), max(every)))
            for title, series in panels
        ],
        height=300,
    )  # fmt: skip


def transfer_figure(data: StudyData) -> Figure | None:
    rows = transfer_rows(data, "sample")
    names = list(dict.fromkeys((name, inside) for name, inside, *_ in rows))
    if len(names) < 2:
        return None
    colors, panels = size_colors(data.sizes), []
    apart = 0.7 / max(len(data.sizes), 2)
    for kind in data.kinds:
        series = []
        for i, size in enumerate(data.sizes):
            mine = [r for r in rows if r[2] == kind and r[3] == size]
            offset = ((len(data.sizes) - 1) / 2 - i) * apart
            series.append(
                Series(
                    label=size,
                    x=[100 * (r[5].pass1 - r[4].pass1) for r in mine],
                    x_error=[100 * math.hypot(r[4].error, r[5].error) for r in mine],
                    y=[len(names) - 1 - [n for n, _ in names].index(r[0]) + offset for r in mine],
                    color=colors[size], line=False,
                )
            )  # fmt: skip
        ticks = []
        for i, (name, inside) in enumerate(names):
            where = "in domain" if inside else "out of domain"
            ticks.append((float(len(names) - 1 - i), f"{name} ({where})"))
        panels.append(
            Panel(title=f"{kind} models", x_label="change of pass@1 (points)", y_label="", series=series,
                  ticks_y=ticks, zero="x")
        )  # fmt: skip
    return Figure(
        name="transfer",
        title="Transfer by domain",
        caption="pass@1 after RL minus before, sampled at the test temperature, in percentage points; bars one "
        "standard error of the difference.",
        panels=panels,
        legend=tuple((label, color, "dot") for label, color, _ in _sizes_legend(data)),
        height=110 + 75 * len(names),
    )


def cost_figure(data: StudyData) -> Figure | None:
    costs = costs_of(data)
    if not costs:
        return None
    panels = []
    for title, what, show in (("Time", "seconds", duration), ("FLOPs", "flops", tick_text)):
        rows = [(label, {p: getattr(c, what) or 0.0 for p, c in cost.items()}) for label, cost in costs]
        totals = [sum(values.values()) for _, values in rows]
        if not all(totals):
            continue
        panels.append(
            BarPanel(
                title=title,
                x_label=f"% of a run's {'time' if title == 'Time' else 'FLOPs'}",
                rows=[f"{label}: {show(total)}" for (label, _), total in zip(rows, totals, strict=True)],
                parts=[
                    (p, PHASE_COLOR[p],
                     [100 * values.get(p, 0.0) / total for (_, values), total in zip(rows, totals, strict=True)])
                    for p in (*PHASES, OTHER) if any(values.get(p) for _, values in rows)
                ],
            )
        )  # fmt: skip
    used = dict.fromkeys(label for panel in panels for label, _, _ in panel.parts)
    return Figure(
        name="cost",
        title="Where the cost goes",
        caption="Of one run (mean over runs), by phase; the row's name holds the total. Prefill and decode sample the "
        "answers; reference is the KL's forward pass; other is wall-clock that no phase was booked for, starting up "
        "included.",
        panels=panels,
        legend=tuple((p, PHASE_COLOR[p], "box") for p in (*PHASES, OTHER) if p in used),
        height=90 + 34 * len(costs),
    )


def axis_figure(data: StudyData, axis: str) -> Figure | None:
    """Data reuse or group size: the curves of each value, and where they end."""
    title, symbol, caption = {
        "tau": ("Data reuse", "τ", "τ: prompts seen over different prompts. Equal numbers of steps."),
        "group_size": ("Group size", "G", "G: answers to a prompt. Equal numbers of prompts; cost grows with G."),
    }[axis]
    panels = []
    for kind in data.kinds:
        for size in data.sizes:
            other = (lambda c: c.group_size == data.group_size) if axis == "tau" else (lambda c: c.tau == 1)
            runs = data.select(size, lambda c, k=kind, o=other: c.method == "grpo" and c.kind == k and o(c))
            values = sorted({getattr(data.cells[n], axis) for n, r in data.runs.items() if r in runs})
            if len(values) < 2:
                continue
            colors = size_colors([str(v) for v in values])
            series, ends = [], []
            for value in values:
                mine = [r for n, r in data.runs.items() if r in runs and getattr(data.cells[n], axis) == value]
                curve = [p for p in data.curve(mine) if p.step > 0]
                if not curve:
                    continue
                ends.append((value, curve[-1]))
                series.append(
                    Series(label=f"{symbol} = {value:g}", x=[p.prompts for p in curve], y=[p.loss for p in curve],
                           y_error=[p.error for p in curve], color=colors[str(value)],
                           end_label=f"{symbol}={value:g}")
                )  # fmt: skip
            panels.append(
                Panel(title=f"{size}, {kind}", x_label="prompts seen", y_label=f"test loss ({data.headline})",
                      series=series, x_log=True)
            )  # fmt: skip
            panels.append(
                Panel(
                    title=f"{size}, {kind}: at the end", x_label=symbol, y_label=f"test loss ({data.headline})",
                    x_log=True, ticks_x=[float(v) for v, _ in ends],
                    series=[
                        Series(label="end", x=[float(v) for v, _ in ends], y=[p.loss for _, p in ends],
                               y_error=[p.error for _, p in ends], color=KIND_COLOR[kind])
                    ],
                )
            )  # fmt: skip
    if not panels:
        return None
    return Figure(name=axis, title=title, caption=f"{caption} Bars one standard error.", panels=panels, height=320)

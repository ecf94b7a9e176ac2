"""The figures of a study, as data for `drawing.py`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np

from grpo_engine.evaluate.intervals import interval
from grpo_engine.records.cost import OTHER
from grpo_engine.records.records import PHASES
from grpo_engine.study.data import Point, StudyData, costs_of, mean_steps, transfer_rows
from grpo_engine.study.fits import axes_of
from grpo_engine.study.laws.forms import INTERCEPTS, ReuseLaw
from grpo_engine.study.laws.results import Claim, Fits, draws_of, residuals
from grpo_engine.study.plan_view import duration, human
from grpo_engine.study.report.drawing import (
    BLUE,
    GREY,
    INK,
    KIND_COLOR,
    PHASE_COLOR,
    VERMILION,
    BarPanel,
    Figure,
    Key,
    Panel,
    Series,
    size_colors,
    tick_text,
)
from grpo_engine.study.report.fits import Laws
from grpo_engine.study.report.words import listed

CONTINUED = 3.0  # times its last point, to which a fitted law is drawn beyond it
LOSS_AXES = {"compute": "training compute, 6NT (FLOPs)", "data": "prompts seen"}
VERDICT_COLOR = {"supported": BLUE, "not supported": VERMILION, "undecided": GREY}


def _sizes_legend(data: StudyData, *more: Key, shape: str = "line") -> tuple[Key, ...]:
    colors = size_colors(data.sizes)
    sizes = [Key(label=f"{s} ({human(data.params[s])})", color=colors[s], shape=shape, group=s) for s in data.sizes]
    return (*sizes, *more)


def _kinds_legend(data: StudyData, *more: Key) -> tuple[Key, ...]:
    return (*(Key(label=k, color=KIND_COLOR[k], group=k) for k in data.kinds), *more)


def _grid(low: float, high: float, count: int = 60) -> list[float]:
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def loss_figure(data: StudyData, fits: Fits, axis: str) -> Figure | None:
    colors, panels = size_colors(data.sizes), []
    points: list[float] = []
    identified = []
    for kind in data.kinds:
        fit = fits.get(axis, kind)
        joint = fit.joint if fit.verdict.ok else None
        identified.append(joint is not None)
        series = []
        for size in data.sizes:
            x_of = (lambda p: p.compute) if axis == "compute" else (lambda p: p.prompts)
            curve = [p for p in data.curve(data.main(size, kind)) if p.step > 0 and math.isfinite(x_of(p))]
            if not curve:
                continue
            x = [x_of(p) for p in curve]
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
                           thin=joint is None, group=size)
                )  # fmt: skip
                if joint:
                    beyond = _grid(own.x_max, CONTINUED * own.x_max, 12)
                    y = joint.loss(size, beyond).tolist()
                    points += y
                    series.append(
                        Series(label=f"{size}, continued", x=beyond, y=y, color=colors[size], markers=False, dashed=True,
                               thin=True, end_label=size, group=size)
                    )  # fmt: skip
            series.append(
                Series(label=size, x=x, y=[p.loss for p in curve], y_error=[p.error for p in curve], line=False,
                       color=colors[size], end_label=None if own and joint else size, group=size)
            )  # fmt: skip
        panels.append((kind, series))
    if not points:
        return None
    known: dict[tuple[bool, ...], str] = {
        (True,): "Lines: the law fitted to all sizes together, with its 95 % band; dashed, continued beyond the last "
        "point, where nothing was measured. ",
        (False,): "The data do not identify one law for all sizes; the thin lines are fitted to each size by itself. ",
    }
    lines = known.get(
        tuple(sorted(set(identified))),
        "Lines with a band: the law fitted to all sizes of a kind together, with its 95 % band; dashed, continued "
        "beyond the last point. Thin lines, where the data do not identify that law: each size by itself. ",
    )
    return Figure(
        name=f"loss_{axis}",
        title={"compute": "Test loss against compute", "data": "Test loss against data"}[axis],
        caption=f"{lines}Points: mean over runs, bars one standard error. Step 0 has no position on a logarithmic axis.",
        panels=[
            Panel(title=f"{kind} models", x_label=LOSS_AXES[axis], y_label=f"test loss ({data.headline})", series=series,
                  x_log=True, y_log=True, y_range=(min(points), max(points)))
            for kind, series in panels
        ],
        legend=_sizes_legend(data),
        height=400,
    )  # fmt: skip


def slope_figure(data: StudyData, fits: Fits) -> Figure | None:
    """k of each size by itself, and k(N) of the joint law where the data identify it."""
    if len(data.sizes) < 2:
        return None
    panels = []
    for axis in axes_of(fits):
        series, identified = [], []
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
                           high=high.tolist(), color=KIND_COLOR[kind], markers=False, end_label=kind, group=kind)
                )  # fmt: skip
                identified.append(kind)
            series.append(
                Series(
                    label=f"{kind}, each size", x=[s.params for s in fit.sizes], y=[s.k.value for s in fit.sizes],
                    y_span=[(s.k.low, s.k.high) for s in fit.sizes], color=KIND_COLOR[kind], line=False,
                    end_label=None if kind in identified else kind, group=kind,
                )
            )  # fmt: skip
        panels.append(
            Panel(title={"compute": "against compute", "data": "against data"}[axis],
                  x_label="non-embedding parameters N", y_label="slope k", series=series, x_log=True, zero="y")
        )  # fmt: skip
    if not panels:
        return None
    return Figure(
        name="slopes",
        title="How fast the loss falls, by size",
        caption="Points: the slope of each size by itself, with its 95 % interval. Lines, where the data identify the "
        "law: k(N) = K_max N / (N + N0) with its 95 % band.",
        panels=panels,
        height=360,
    )


def intercept_figure(data: StudyData, fits: Fits) -> Figure | None:
    """E(N): the log of the loss of each size at one X, by the joint law, and the law of E(N) that misses it least."""
    panels, where = [], []
    for axis in axes_of(fits):
        series = []
        for kind in data.kinds:
            fit = fits.get(axis, kind)
            if fit.joint is None or fit.at_one_x is None:
                continue
            intercepts, x = fit.at_one_x.intercepts, fit.at_one_x.x
            curves = fit.joint.curves
            where.append(f"{tick_text(float(f'{x:.2g}'))} {'FLOPs' if axis == 'compute' else 'prompts'} ({kind})")
            law = fit.intercepts[0] if fit.intercepts and fit.intercepts[0].verdict.ok else None
            if law is not None:
                n = _grid(curves[0].params, curves[-1].params)
                form = INTERCEPTS[law.law](**{q: e.value for q, e in law.parameters.items()}, **law.fixed)
                series.append(
                    Series(label=f"{kind}, {law.law} law", x=n, y=form.intercept(np.array(n)).tolist(), markers=False,
                           color=KIND_COLOR[kind], dashed=True, thin=True, group=kind)
                )  # fmt: skip
            series.append(
                Series(
                    label=kind, x=[c.params for c in curves], y=[intercepts[c.label].value for c in curves],
                    y_span=[(intercepts[c.label].low, intercepts[c.label].high) for c in curves], color=KIND_COLOR[kind],
                    line=False, end_label=kind, group=kind,
                )
            )  # fmt: skip
        if series:
            # the interval of a law that is not identifiable may have no end: it leaves the panel
            drawn = [y for s in series for y in s.y]
            ends = [end for s in series for span in s.y_span or () for end in span if end is not None]
            far = max(1.0, max(drawn) - min(drawn))
            span = (max(min(drawn + ends), min(drawn) - far), min(max(drawn + ends), max(drawn) + far))
            panels.append(
                Panel(title=f"against {axis}", x_label="non-embedding parameters N", y_label="intercept E, log of the loss",
                      series=series, x_log=True, y_range=span)
            )  # fmt: skip
    if not panels:
        return None
    return Figure(
        name="intercepts",
        title="Where the loss stands, by size",
        caption=f"The intercept E(N) of the joint law, as the log of the loss at {listed(where)}, with 95 % intervals; "
        "one that leaves its panel goes on. Dashed, with four sizes or more: the law of E(N) that misses them least.",
        panels=panels,
        legend=_kinds_legend(data),
        height=360,
    )


def residual_figure(data: StudyData, fits: Fits) -> Figure | None:
    """What the joint laws leave unexplained."""
    colors, panels, every = size_colors(data.sizes), [], []
    for fit in fits.fits:
        axis, kind, joint = fit.axis, fit.kind, fit.joint
        if joint is None or axis not in LOSS_AXES or kind not in data.kinds:
            continue
        series = []
        for label, (x, _, left) in residuals(fit.curves, joint).items():
            every += left.tolist()
            series.append(
                Series(label=label, x=x.tolist(), y=left.tolist(), color=colors[label], thin=True, group=label,
                       end_label=label)
            )  # fmt: skip
        panels.append((axis, kind, series))
    if not panels:
        return None
    most = max(map(abs, every))
    return Figure(
        name="residuals",
        title="What the law leaves unexplained",
        caption="Measured minus fitted loss at each point. Scatter about 0 is noise; a bow that several sizes share is a "
        "law of the wrong shape.",
        panels=[
            Panel(title=f"{kind} models, against {axis}", x_label=LOSS_AXES[axis], y_label="measured \u2212 fitted",
                  series=series, x_log=True, zero="y", y_range=(-most, most))
            for axis, kind, series in panels
        ],
        legend=_sizes_legend(data),
        height=280,
        columns=2,
    )  # fmt: skip


def learning_figure(data: StudyData) -> Figure | None:
    """The test loss of each size while it trains, base against instruct."""
    panels, every = [], []
    curves = {(s, k): data.curve(data.main(s, k)) for s in data.sizes for k in data.kinds}
    prompts = all(math.isfinite(p.prompts) for c in curves.values() for p in c)  # a log may not tell them
    for size in data.sizes:
        series = []
        for kind in data.kinds:
            curve = curves[size, kind]
            if len(curve) > 1:
                every += [p.loss + s * p.error for p in curve for s in (-1, 1)]
                series.append(
                    Series(label=kind, x=[p.prompts if prompts else p.step for p in curve], y=[p.loss for p in curve],
                           group=kind,
                           y_error=[p.error for p in curve], color=KIND_COLOR[kind], hollow=kind == "instruct")
                )  # fmt: skip
        if series:
            panels.append((size, series))
    if not panels:
        return None
    return Figure(
        name="learning_curves",
        title="Learning curves",
        caption="Test loss from before the first step on, mean over runs; bars one standard error. Instruct models have "
        "hollow points.",
        panels=[
            Panel(title=f"{size} ({human(data.params[size])})", x_label="prompts seen" if prompts else "step",
                  y_label=f"test loss ({data.headline})", series=series, x_zero=True, y_range=(min(every), max(every)))
            for size, series in panels
        ],
        legend=_kinds_legend(data),
        height=280,
    )  # fmt: skip


def training_figure(data: StudyData) -> Figure | None:
    """Reward and entropy of the training answers."""
    panels = [
        Panel(title=title, x_label="step", y_label=unit, series=_step_series(data, data.kinds, name), x_zero=True)
        for name, title, unit in (
            ("reward_mean", "Reward", "mean training reward"), ("entropy", "Entropy", "nats a token"),
        )
    ]  # fmt: skip
    dashed = (Key(label="instruct (dashed)", color=GREY, shape="dash"),) if "instruct" in data.kinds else ()
    return _if_any(
        Figure(
            name="training",
            title="Reward and entropy",
            caption="Means over runs, averaged over a twentieth of the run. Rewards are those of training answers at "
            "temperature 1 on ever new problems; they are no test result.",
            panels=panels,
            legend=_sizes_legend(data, *dashed),
            height=300,
        )
    )


def length_figure(data: StudyData) -> Figure | None:
    """How long the training answers are."""
    panels = [
        Panel(title=f"{kind} models", x_label="step", y_label="tokens an answer",
              series=_step_series(data, [kind], "response_len_mean"), x_zero=True)
        for kind in data.kinds
    ]  # fmt: skip
    return _if_any(
        Figure(
            name="response_length",
            title="Response length",
            caption="Mean length of the training answers, over runs and a twentieth of the run. The compute a prompt "
            "grows with it, so that a law in compute and one in data need not have the same slope.",
            panels=panels,
            legend=_sizes_legend(data),
            height=300,
        )
    )


def _step_series(data: StudyData, kinds: Sequence[str], name: str) -> list[Series]:
    colors = size_colors(data.sizes)
    out = []
    for kind in kinds:
        for size in data.sizes:
            x, y = mean_steps(data.main(size, kind), name)
            if x:
                out.append(
                    Series(label=f"{size} {kind}", x=x, y=y, color=colors[size], markers=False, group=size,
                           dashed=kind == "instruct" and len(kinds) > 1)
                )  # fmt: skip
    return out


def _if_any(figure: Figure) -> Figure | None:
    """The figure, or None when a panel of it is empty."""
    return figure if all(panel.series for panel in figure.panels if isinstance(panel, Panel)) else None


def kinds_figure(data: StudyData) -> Figure | None:
    """Where the runs of each size begin and end."""
    names = [data.headline]
    panels = [
        Panel(title="", x_label="non-embedding parameters N", y_label=f"test loss ({name})",
              series=_before_after(data, name, ends=True), x_log=True)
        for name in names
    ]  # fmt: skip
    if not panels[0].series:
        return None
    return Figure(
        name="base_instruct",
        title="Before and after RL, by size",
        caption="Test loss before the first (hollow, dashed) and after the last step; bars one standard error.",
        panels=panels,
        legend=_kinds_legend(data),
        height=400,
    )


def _before_after(data: StudyData, eval_set: str, *, ends: bool) -> list[Series]:
    series = []
    for kind in data.kinds:
        curves = [(data.params[s], c) for s in data.sizes if len(c := data.curve(data.main(s, kind), eval_set)) > 1]
        for index, label, hollow in ((0, "before", True), (-1, "after", False)):
            series.append(
                Series(
                    label=f"{kind} {label}", x=[n for n, _ in curves], y=[c[index].loss for _, c in curves],
                    y_error=[c[index].error for _, c in curves], color=KIND_COLOR[kind], hollow=hollow, dashed=hollow,
                    end_label=f"{kind} {label}" if ends else None, group=kind,
                )
            )  # fmt: skip
    return [s for s in series if len(s.x)]


def transfer_grid_figure(data: StudyData) -> Figure | None:
    """Each test set, in and out of domain: loss before and after RL by size."""
    names = list(dict.fromkeys((name, inside) for name, inside, *_ in transfer_rows(data, "sample")))
    if len(names) < 2:
        return None
    return Figure(
        name="transfer_grid",
        title="Every test set, before and after",
        caption="Test loss before the first (hollow, dashed) and after the last step, by size; bars one standard error. "
        "Each panel has its own range.",
        panels=[
            Panel(title=f"{name} ({'in' if inside else 'out of'} domain)", x_label="non-embedding parameters N",
                  y_label="test loss", series=_before_after(data, name, ends=False), x_log=True)
            for name, inside in names
        ],
        legend=_kinds_legend(data),
        height=260,
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
                       y_error=[p.error for p in curve], color=color, end_label=label, group=label)
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
                    color=colors[size], line=False, group=size,
                )
            )  # fmt: skip
        ticks = []
        for i, (name, inside) in enumerate(names):
            where = "in domain" if inside else "out of domain"
            ticks.append((float(len(names) - 1 - i), f"{name}\n({where})"))
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
        legend=_sizes_legend(data, shape="dot"),
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
        legend=tuple(Key(label=p, color=PHASE_COLOR[p], shape="box", group=p) for p in (*PHASES, OTHER) if p in used),
        height=90 + 34 * len(costs),
    )


def reuse_figure(data: StudyData, fits: Fits) -> Figure | None:
    """Data reuse: the curves of each tau with the law of what a repeated prompt is worth, and where they end."""
    panels = []
    fitted = {(r.size, r.kind): r for r in fits.reuse}
    for kind in data.kinds:
        for size in data.sizes:
            curves = _by_value(data, size, kind, "tau")
            if len(curves) < 2 or not all(math.isfinite(p.prompts) for c in curves.values() for p in c):
                continue
            colors = size_colors([f"{v:g}" for v in curves])
            series = _value_series(curves, colors, "τ", "prompts")
            found = fitted.get((size, kind))
            if found is not None:
                law = ReuseLaw(**{q: e.value for q, e in found.law.parameters.items()})
                for tau, color in zip(found.curves, colors.values(), strict=False):
                    c = found.curves[tau]
                    series.append(
                        Series(label=f"τ = {tau}, law", x=c.x, y=law.loss(np.array(c.x), np.array(c.unique)).tolist(),
                               color=color, markers=False, dashed=True, thin=True)
                    )  # fmt: skip
            panels += [
                Panel(title=f"{size}, {kind}", x_label="prompts seen", y_label=f"test loss ({data.headline})",
                      series=series, x_log=True),
                _end_panel(data, f"{size}, {kind}", curves, "reuse τ", kind),
            ]  # fmt: skip
    if not panels:
        return None
    return Figure(
        name="tau",
        title="Data reuse",
        caption="τ: prompts seen over different prompts. Equal numbers of steps. Dashed: the law of effective data, where "
        "it could be fitted. Bars one standard error.",
        panels=panels,
        height=330,
        columns=2,
    )


def group_figure(data: StudyData) -> Figure | None:
    """Group size: the curves of each G per prompt and per FLOP, and where they end."""
    panels = []
    for kind in data.kinds:
        for size in data.sizes:
            curves = _by_value(data, size, kind, "group_size")
            if len(curves) < 2:
                continue
            colors = size_colors([f"{v:g}" for v in curves])
            for axis in ("prompts", "compute"):
                if all(math.isfinite(getattr(p, axis)) for c in curves.values() for p in c):
                    what = "per unique prompt" if axis == "prompts" else "per FLOP"
                    panels.append(
                        Panel(title=f"{size}, {kind}: {what}", x_label=LOSS_AXES["data" if axis == "prompts" else axis],
                              y_label=f"test loss ({data.headline})", series=_value_series(curves, colors, "G", axis),
                              x_log=True)
                    )  # fmt: skip
            panels.append(_end_panel(data, f"{size}, {kind}", curves, "group size G", kind))
    if not panels:
        return None
    return Figure(
        name="group_size",
        title="Group size",
        caption="G: answers to a prompt. Runs saw equal numbers of prompts, each once; their compute grows with G, so that "
        "what is ahead per prompt may be behind per FLOP. Bars one standard error.",
        panels=panels,
        height=320,
    )


def _by_value(data: StudyData, size: str, kind: str, axis: str) -> dict[float, list[Point]]:
    """Curves without step 0 by the value of an ablated axis, "tau" or "group_size", rising."""
    groups = data.ablation(size, kind, axis)
    curves = {value: [p for p in data.curve(runs) if p.step > 0] for value, runs in groups.items()}
    return {value: curve for value, curve in curves.items() if curve}


def _value_series(curves: dict[float, list[Point]], colors: dict[str, str], symbol: str, axis: str) -> list[Series]:
    return [
        Series(label=f"{symbol} = {value:g}", x=[getattr(p, axis) for p in curve], y=[p.loss for p in curve],
               y_error=[p.error for p in curve], color=colors[f"{value:g}"], thin=True, end_label=f"{symbol}={value:g}")
        for value, curve in curves.items()
    ]  # fmt: skip


def _end_panel(data: StudyData, title: str, curves: dict[float, list[Point]], label: str, kind: str) -> Panel:
    ends = [(float(value), curve[-1]) for value, curve in curves.items()]
    series = Series(label="end", x=[v for v, _ in ends], y=[p.loss for _, p in ends],
                    y_error=[p.error for _, p in ends], color=KIND_COLOR[kind])  # fmt: skip
    return Panel(title=f"{title}: at the end", x_label=label, y_label=f"test loss ({data.headline})", x_log=True,
                 ticks_x=[v for v, _ in ends], series=[series])  # fmt: skip


def frontier_figure(data: StudyData, laws: Laws) -> Figure | None:
    """N*(C): the size with the smallest predicted loss for each compute budget."""
    panels = []
    for kind, points in laws.frontiers.items():
        if not points:
            continue
        color = KIND_COLOR[kind]
        series = [
            Series(label="best", x=[p.compute for p in points], y=[p.params for p in points], color=color, thin=True,
                   markers=False, group="line")
        ]  # fmt: skip
        for decided in (True, False):
            mine = [p for p in points if p.decided == decided]
            if mine:
                series.append(
                    Series(label="decided" if decided else "not decided", x=[p.compute for p in mine],
                           y=[p.params for p in mine], y_span=[p.params_span for p in mine], color=color,
                           hollow=not decided, line=False, group="decided" if decided else "open")
                )  # fmt: skip
        panels.append(
            Panel(title=f"{kind} models", x_label=LOSS_AXES["compute"], y_label="best size N*", series=series, x_log=True,
                  y_log=True, y_range=(min(data.params.values()), max(data.params.values())))
        )  # fmt: skip
    if not panels:
        return None
    return Figure(
        name="frontier",
        title="The frontier N*(C)",
        caption="The measured size with the smallest predicted loss for a compute budget, inside the measured range. Bars: "
        "sizes that are the best in at least one in twenty draws. Hollow: the data do not decide it.",
        panels=panels,
        legend=(Key(label="decided", color=INK, shape="dot", group="decided"),
                Key(label="not decided", color=INK, shape="ring", group="open")),
        height=320,
    )  # fmt: skip


def claims_figure(claims: Sequence[Claim]) -> Figure | None:
    """Every comparison of every claim with its interval, beside the margin that it is held against."""
    panels = []
    for claim in claims:
        rows = list(reversed(claim.comparisons))
        series = [
            Series(
                label=verdict, x=[c.effect.value for _, c in mine], y=[float(i) for i, _ in mine],
                x_span=[(c.effect.low, c.effect.high) for _, c in mine], color=VERDICT_COLOR[verdict], line=False,
                hollow=verdict == "undecided", group=verdict,
            )
            for verdict in VERDICT_COLOR if (mine := [(i, c) for i, c in enumerate(rows) if c.verdict == verdict])
        ]  # fmt: skip
        limits = {"equivalence": (-claim.margin, claim.margin), "non-inferiority": (-claim.margin,)}
        what = "difference of falls of log loss" if claim.test == "equivalence" else "difference of loss"
        panels.append(
            Panel(title=claim.name, x_label=what, y_label="", series=series, zero="x",
                  limits=limits.get(claim.test, (claim.margin,)),
                  ticks_y=[(float(i), textwrap.fill(c.label, 26)) for i, c in enumerate(rows)])
        )  # fmt: skip
    if not panels:
        return None
    return Figure(
        name="claims",
        title="The claims, one comparison a row",
        caption="Right of 0: as the claim has it. Intervals hold together for each claim with 95 %. Dotted: the margin, the "
        "smallest effect that matters.",
        panels=panels,
        legend=tuple(
            Key(label=v, color=c, shape="ring" if v == "undecided" else "dot", group=v) for v, c in VERDICT_COLOR.items()
        ),
        height=90 + 32 * max(len(c.comparisons) for c in claims),
        columns=2,
    )  # fmt: skip

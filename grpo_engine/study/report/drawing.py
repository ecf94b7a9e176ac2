"""Figures as data, drawn twice: by matplotlib for print (PNG, PDF) and by plotly for the page.

A `Figure` is a row of `Panel`s; a `Panel` is axes with `Series`. What is shown (ranges, ticks, where labels sit) is
decided here once, so that the page and the paper show the same picture.

Colours: sizes are an ordered scale, so they take an ordered, evenly darkening one; kinds and phases are not, and take
Okabe and Ito's set. Both stay apart under the common colour-vision deficiencies and in grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

INK, FAINT, GRID = "#1f2328", "#6e7781", "#e6e8eb"
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, VERMILION, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#B8A800", "#D55E00", "#7f7f7f",
)  # fmt: skip
KIND_COLOR = {"base": BLUE, "instruct": VERMILION, "control": GREY}
PHASE_COLOR = {
    "prefill": SKY, "decode": BLUE, "reference": PINK, "forward": GREEN, "backward": "#00543d",
    "optimizer": YELLOW, "reward": VERMILION, "evaluation": "#bdbdbd",
    "checkpoint": ORANGE, "other": "#4d4d4d",
}  # fmt: skip
_RAMP = ("#4dbb6d", "#21918c", "#31688e", "#443983", "#2a0a3d")  # light to dark, small to large (after viridis)


def size_colors(sizes: Sequence[str]) -> dict[str, str]:
    """One colour a size, the larger the darker.

    Args:
        sizes: smallest first.

    Returns:
        {size: "#rrggbb"}.
    """

    def mix(position: float) -> str:
        low = min(int(position), len(_RAMP) - 2)
        a, b = (tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in _RAMP[low : low + 2])
        return "#" + "".join(f"{round(u + (v - u) * (position - low)):02x}" for u, v in zip(a, b, strict=True))

    last = len(_RAMP) - 1
    step = last / max(len(sizes) - 1, 1)
    return {size: mix(i * step if len(sizes) > 1 else last / 2) for i, size in enumerate(sizes)}


Span = tuple[float | None, float | None]  # ends of a bar; None: there is none on that side


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Points in the order in which a line joins them."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    y_error: Sequence[float | None] | None = None  # half-length of the bar
    x_error: Sequence[float | None] | None = None
    y_span: Sequence[Span] | None = None  # ends of a bar that is not symmetric
    x_span: Sequence[Span] | None = None
    low: Sequence[float] | None = None  # band, with `high`
    high: Sequence[float] | None = None
    line: bool = True
    markers: bool = True
    hollow: bool = False
    dashed: bool = False
    end_label: str | None = None  # written beside the last point
    thin: bool = False
    group: str = ""  # the legend's entry that shows and hides it


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Axes. `ticks_y`, when given, are the named rows of a chart whose y is a category."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_log: bool = False
    y_log: bool = False
    y_range: tuple[float, float] | None = None
    ticks_y: Sequence[tuple[float, str]] | None = None
    ticks_x: Sequence[float] | None = None  # where the axis is marked; None: round numbers
    zero: str | None = None  # "x" or "y": a line at 0 of that axis
    limits: Sequence[float] = ()  # dashed lines at these x
    x_zero: bool = False  # the axis starts at 0
    note: str | None = None  # written in the panel

    @property
    def about(self) -> str:
        """What the axes are, for those who do not see them."""
        return f"{self.title}: {self.y_label or 'rows'} by {self.x_label}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BarPanel:
    """Horizontal stacked bars: one row a bar, one part a colour."""

    title: str
    x_label: str
    rows: Sequence[str]
    parts: Sequence[tuple[str, str, Sequence[float]]]  # label, colour, a value a row

    @property
    def about(self) -> str:
        """See `Panel.about`."""
        return f"{self.title}: {self.x_label} by row"


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """An entry of a legend."""

    label: str
    color: str
    shape: str = "line"  # "line", "dash", "dot", "ring" or "box"
    group: str = ""  # the series that it shows and hides; empty: it only explains


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A row of panels with one caption and one legend."""

    name: str  # file name, without ending
    title: str
    caption: str
    panels: Sequence[Panel | BarPanel]
    legend: Sequence[Key] = ()
    height: int = 340  # pixels of a panel
    columns: int = 3  # at the most, where there is room


# ------------------------------------------------------------------------------------ ranges and ticks


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers inside a range of a logarithmic axis, few enough to read.

    Args:
        low: above 0.
        high: above `low`.

    Returns:
        At most 6 values: decades where the range has many, steps inside them where it has few, equal steps where it
        is less than a factor of 3.
    """
    if high / low < 3:
        return [v for v in linear_ticks(low, high) if low <= v <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(found) <= 6:
            break
    return found[:: math.ceil(len(found) / 6)]


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers inside a range.

    Args:
        low: lower end.
        high: upper end, above `low`.
        most: the largest number of them.

    Returns:
        Multiples of 1, 2, 2.5 or 5 times a power of ten, as many as `most` allows.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [round(i * step, 12) for i in range(first, last + 1)]


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def tick_text(value: float) -> str:
    """A tick's number for people.

    Args:
        value: any finite number.

    Returns:
        "0.35", "20k", "3·10⁹": plain below 10,000, with k or M up to 10 million, powers of ten above.
    """
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-3:
        power = math.floor(math.log10(size) + 1e-9)
        lead = f"{value / 10.0**power:.3g}"
        return ("" if lead == "1" else f"{lead}·") + "10" + str(power).translate(_SUPERSCRIPT)
    for limit, suffix in ((1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e6 if suffix == 'M' else 1e3):.4g}{suffix}"
    return f"{value:.4g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    low: float
    high: float
    log: bool
    ticks: list[float]
    names: list[str]

    def shows(self, value: float) -> bool:
        """Whether the axis has a place for a value: a logarithmic one has none for 0."""
        return value > 0 or not self.log

    def fraction(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def value(self, fraction: float) -> float:
        """The value at a fraction of the axis; undoes `fraction`."""
        if self.log:
            return self.low * (self.high / self.low) ** fraction
        return self.low + fraction * (self.high - self.low)


def _axis(
    values: Sequence[float], *, log: bool, before: float, after: float, from_zero: bool = False, most: int = 6
) -> _Axis:
    values = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if from_zero:
        low = 0.0
    if log:
        if high / low < 1.05:
            low, high = low / 1.1, high * 1.1
        span = math.log(high / low)
        low, high = low * math.exp(-before * span), high * math.exp(after * span)
    else:
        span = (high - low) or max(abs(high), 1.0) * 0.2
        low, high = low - (0 if from_zero else before * span), high + after * span
    ticks = log_ticks(low, high) if log else [t for t in linear_ticks(low, high, most) if low <= t <= high]
    return _Axis(low=low, high=high, log=log, ticks=ticks, names=[tick_text(t) for t in ticks])


def _axes(panel: Panel) -> tuple[_Axis, _Axis]:
    xs: list[float] = []
    ys: list[float] = []
    for s in panel.series:
        for values, errors, out in ((s.x, s.x_error, xs), (s.y, s.y_error, ys)):
            out += list(values)
            if errors:
                out += [v + e for v, e in zip(values, errors, strict=True) if e is not None]
                out += [v - e for v, e in zip(values, errors, strict=True) if e is not None]
        if s.low is not None and s.high is not None:
            ys += [*s.low, *s.high]
        ys += [end for span in s.y_span or () for end in span if end is not None]
        xs += [end for span in s.x_span or () for end in span if end is not None]
    if panel.zero:
        (xs if panel.zero == "x" else ys).append(0.0)
    xs += panel.limits
    few = 4 if panel.ticks_y is not None else 6  # names of rows leave little room
    labels = any(s.end_label for s in panel.series)
    longest = max((len(s.end_label) for s in panel.series if s.end_label), default=0)
    x = _axis(
        xs, log=panel.x_log, before=0.04, after=0.04 + (0.03 + 0.02 * longest if labels else 0), from_zero=panel.x_zero,
        most=few,
    )  # fmt: skip
    if panel.ticks_x is not None:
        x = replace(x, ticks=list(panel.ticks_x), names=_names(x, panel.ticks_x))
    if panel.ticks_y is not None:
        positions = [p for p, _ in panel.ticks_y]
        y = _Axis(low=min(positions) - 0.6, high=max(positions) + 0.6, log=False, ticks=positions,
                  names=[n for _, n in panel.ticks_y])  # fmt: skip
    else:
        y = _axis(panel.y_range or ys, log=panel.y_log, before=0.06, after=0.06)
    return x, y


def _names(axis: _Axis, ticks: Sequence[float]) -> list[str]:
    """A name a tick, empty where it would run into the one before it."""
    names: list[str] = []
    shown = None
    for tick in ticks:
        name = tick_text(tick)
        if shown is not None and axis.fraction(tick) - axis.fraction(shown) < 0.013 * (len(name) + len(tick_text(shown))):
            name = ""
        else:
            shown = tick
        names.append(name)
    return names


def _labels(panel: Panel, x: _Axis, y: _Axis) -> list[tuple[float, float, Series]]:
    """End labels as (x, y, series); those beside each other are moved up or down as little as keeps them apart."""
    found = [
        ([x.fraction(s.x[-1]), y.fraction(s.y[-1])], s) for s in panel.series
        if s.end_label and len(s.x) and x.shows(s.x[-1]) and y.shows(s.y[-1])
    ]  # fmt: skip
    found.sort(key=lambda f: f[0][1])
    apart, beside = 0.062, 0.15  # shares of the axes
    for _ in range(100):
        moved = False
        for i, (below, _) in enumerate(found):
            for above, _ in found[i + 1 :]:
                gap = above[1] - below[1]
                if gap < apart - 1e-6 and abs(above[0] - below[0]) < beside:
                    below[1] -= (apart - gap) / 2
                    above[1] += (apart - gap) / 2
                    moved = True
        for label, _ in found:  # a stack of them stays beside the axes
            label[1] = min(max(label[1], apart / 2), 1 - apart / 2)
        if not moved:
            break
    return [(x.value(px), y.value(py), s) for (px, py), s in found]


# ------------------------------------------------------------------------------------------- plotly


def plotly_spec(panel: Panel | BarPanel, *, height: int) -> dict[str, Any]:
    """What `Plotly.newPlot` takes for a panel.

    Args:
        panel: the panel.
        height: pixels.

    Returns:
        {"data": [...], "layout": {...}}, JSON-like.
    """
    return _plotly_bars(panel, height) if isinstance(panel, BarPanel) else _plotly_xy(panel, height)


def _plotly_layout(title: str, height: int, *, aside: bool = False) -> dict[str, Any]:
    """What all panels have in common; `aside`: the title begins above the names of the rows, not above the axes."""
    return {
        "title": {"text": title, "font": {"size": 14, "color": INK}, "x": 0, "xref": "container" if aside else "paper",
                  "xanchor": "left",
                  "y": 0.97, "yanchor": "top"},
        "height": height,
        "margin": {"l": 58, "r": 12, "t": 40 if title else 12, "b": 52},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
    }  # fmt: skip


def _plotly_axis(axis: _Axis, label: str, *, grid: bool) -> dict[str, Any]:
    ends = [math.log10(axis.low), math.log10(axis.high)] if axis.log else [axis.low, axis.high]
    return {
        "type": "log" if axis.log else "linear", "range": ends, "tickvals": axis.ticks,
        "ticktext": [n.replace("\n", "<br>") for n in axis.names],
        "title": {"text": label, "standoff": 8}, "showgrid": grid, "gridcolor": GRID, "zeroline": False,
        "showline": True, "linecolor": FAINT, "ticks": "outside", "tickcolor": FAINT, "ticklen": 4,
        "tickangle": 0,
    }  # fmt: skip


def _plotly_xy(panel: Panel, height: int) -> dict[str, Any]:
    x, y = _axes(panel)
    data: list[dict[str, Any]] = []
    for s in panel.series:
        if s.low is not None and s.high is not None:
            data.append(
                {
                    "type": "scatter", "mode": "lines", "x": [*s.x, *reversed(s.x)], "y": [*s.high, *reversed(s.low)],
                    "fill": "toself", "fillcolor": _rgba(s.color, 0.16), "line": {"width": 0}, "hoverinfo": "skip",
                    "legendgroup": s.group,
                }
            )  # fmt: skip
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "+".join(m for m, on in (("lines", s.line), ("markers", s.markers)) if on) or "none",
            "name": s.label,
            "legendgroup": s.group,
            "x": list(s.x),
            "y": list(s.y),
            "line": {"color": s.color, "width": 1.2 if s.thin else 2, "dash": "4px,3px" if s.dashed else "solid"},
            "marker": {
                "size": 7,
                "color": "#ffffff" if s.hollow else s.color,
                "line": {"color": s.color, "width": 1.6},
            },
            "hovertemplate": f"{s.label}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
        }
        for key, errors in (("error_y", s.y_error), ("error_x", s.x_error)):
            if errors:
                trace[key] = {"type": "data", "array": list(errors), "color": _rgba(s.color, 0.6), "thickness": 1.2,
                              "width": 0}  # fmt: skip
        for key, values, spans in (("error_y", s.y, s.y_span), ("error_x", s.x, s.x_span)):
            if spans:
                up, down = _arms(values, spans)
                trace[key] = {"type": "data", "symmetric": False, "array": up, "arrayminus": down,
                              "color": _rgba(s.color, 0.6), "thickness": 1.2, "width": 0}  # fmt: skip
        data.append(trace)
    annotations = [
        {
            "x": math.log10(lx) if x.log else lx, "y": math.log10(ly) if y.log else ly, "text": s.end_label,
            "showarrow": False, "xanchor": "left", "xshift": 7, "font": {"color": s.color, "size": 12}, "name": s.group,
        }
        for lx, ly, s in _labels(panel, x, y)
    ]  # fmt: skip
    if panel.note:
        annotations.append(
            {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "text": panel.note, "showarrow": False,
             "font": {"color": FAINT}}
        )  # fmt: skip
    layout = _plotly_layout(panel.title, height, aside=panel.ticks_y is not None) | {
        "xaxis": _plotly_axis(x, panel.x_label, grid=True),
        "yaxis": _plotly_axis(y, panel.y_label, grid=True) | {"automargin": True},
        "annotations": annotations,
    }
    across = {"type": "line", "line": {"color": FAINT, "width": 1}, "layer": "below"}
    upright = across | {"xref": "x", "yref": "paper", "y0": 0, "y1": 1}
    layout["shapes"] = [
        *([upright | {"x0": 0, "x1": 0}] if panel.zero == "x" else []),
        *([across | {"xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": 0, "y1": 0}] if panel.zero == "y" else []),
        *(upright | {"x0": at, "x1": at, "line": {"color": FAINT, "width": 1, "dash": "dot"}} for at in panel.limits),
    ]
    return {"data": data, "layout": layout}


def _plotly_bars(panel: BarPanel, height: int) -> dict[str, Any]:
    data = [
        {
            "type": "bar", "orientation": "h", "name": label, "y": list(panel.rows), "x": list(values),
            "legendgroup": label,
            "marker": {"color": color}, "hovertemplate": f"{label}: %{{x:.3g}}<extra>%{{y}}</extra>",
        }
        for label, color, values in panel.parts
    ]  # fmt: skip
    high = max((sum(v[i] for _, _, v in panel.parts) for i in range(len(panel.rows))), default=1.0)
    axis = _Axis(low=0, high=high, log=False, ticks=linear_ticks(0, high), names=[])
    layout = _plotly_layout(panel.title, height, aside=True) | {
        "barmode": "stack",
        "bargap": 0.35,
        "xaxis": _plotly_axis(axis, panel.x_label, grid=True) | {"ticktext": [tick_text(t) for t in axis.ticks]},
        "yaxis": {"autorange": "reversed", "automargin": True, "ticks": "", "showline": False},
    }
    return {"data": data, "layout": layout}


def _arms(values: Sequence[float], spans: Sequence[Span]) -> tuple[list[float], list[float]]:
    """Lengths of bars above and below the points."""
    up = [0.0 if high is None else high - v for v, (_, high) in zip(values, spans, strict=True)]
    down = [0.0 if low is None else v - low for v, (low, _) in zip(values, spans, strict=True)]
    return [max(v, 0.0) for v in up], [max(v, 0.0) for v in down]


def _rgba(color: str, alpha: float) -> str:
    return f"rgba({int(color[1:3], 16)},{int(color[3:5], 16)},{int(color[5:7], 16)},{alpha})"


# --------------------------------------------------------------------------------------- matplotlib


def import_matplotlib() -> None:
    """Imports all that `draw` needs, so that a process can do it before there is anything to draw."""
    from matplotlib import figure, lines, patches, ticker  # noqa: F401
    from matplotlib.backends import backend_agg, backend_pdf  # noqa: F401


def draw(figure: Figure, folder: Path) -> list[Path]:
    """Writes a figure as PNG (200 dots an inch) and PDF (text stays text).

    Args:
        figure: what to draw.
        folder: an existing folder.

    Returns:
        The two files.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MplFigure

    style = {
        "font.family": "sans-serif", "font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.titlesize": 9.5, "axes.titlelocation": "left",
        "pdf.fonttype": 42,
    }  # fmt: skip
    columns = min(len(figure.panels), figure.columns)
    rows = math.ceil(len(figure.panels) / columns)
    with matplotlib.rc_context(style):
        width = 3.6 * columns + 0.4 if columns > 1 else 5.2
        legend_room = 0.32 if figure.legend else 0.0
        mpl = MplFigure(figsize=(width, figure.height / 112 * rows + legend_room), layout="constrained")
        FigureCanvasAgg(mpl)
        grid = mpl.subplots(rows, columns, squeeze=False)
        for ax, panel in zip(grid.flat, figure.panels, strict=False):
            _mpl_bars(ax, panel) if isinstance(panel, BarPanel) else _mpl_xy(ax, panel)
        for ax in list(grid.flat)[len(figure.panels) :]:
            ax.set_axis_off()
        if figure.legend:
            mpl.legend(
                handles=[_mpl_handle(key) for key in figure.legend], loc="outside lower center",
                ncols=min(len(figure.legend), 4 * columns), frameon=False, fontsize=8, handlelength=1.6,
            )  # fmt: skip
        paths = [folder / f"{figure.name}.png", folder / f"{figure.name}.pdf"]
        mpl.savefig(paths[0], dpi=200, facecolor="white")
        mpl.savefig(paths[1], metadata={"CreationDate": None})
    return paths


def _mpl_handle(key: Key) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if key.shape == "box":
        return Patch(color=key.color, label=key.label)
    line = {"line": "-", "dash": (0, (4, 3)), "dot": "", "ring": ""}[key.shape]
    mark = "o" if key.shape in ("dot", "ring") else ""
    face = "white" if key.shape == "ring" else key.color
    return Line2D([], [], color=key.color, linestyle=line, marker=mark, markersize=5, markerfacecolor=face,
                  label=key.label)  # fmt: skip


def _mpl_axis(axis: Any, ours: _Axis, setter: Any) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(ours.ticks))
    axis.set_major_formatter(FixedFormatter(ours.names))
    axis.set_minor_locator(NullLocator())
    setter(ours.low, ours.high)


def _mpl_xy(ax: Any, panel: Panel) -> None:
    x, y = _axes(panel)
    ax.set_xscale("log" if x.log else "linear")
    ax.set_yscale("log" if y.log else "linear")
    ax.grid(color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    for s in panel.series:
        if s.low is not None and s.high is not None:
            ax.fill_between(s.x, s.low, s.high, color=s.color, alpha=0.16, linewidth=0)
        style = {
            "color": s.color, "linewidth": 0.8 if s.thin else 1.4, "markersize": 3.6, "markeredgewidth": 1.0,
            "markerfacecolor": "white" if s.hollow else s.color,
            "linestyle": ((0, (4, 3)) if s.dashed else "-") if s.line else "none", "marker": "o" if s.markers else "",
        }  # fmt: skip
        errors: list[Any] = [[v or 0.0 for v in e] if e else None for e in (s.y_error, s.x_error)]
        for i, (values, spans) in enumerate(((s.y, s.y_span), (s.x, s.x_span))):
            if spans:
                errors[i] = list(reversed(_arms(values, spans)))
        ax.errorbar(s.x, s.y, yerr=errors[0], xerr=errors[1], elinewidth=0.8, capsize=0, **style)
    _mpl_axis(ax.xaxis, x, ax.set_xlim)
    _mpl_axis(ax.yaxis, y, ax.set_ylim)
    for lx, ly, s in _labels(panel, x, y):
        ax.annotate(s.end_label, (lx, ly), xytext=(5, 0), textcoords="offset points", va="center", color=s.color,
                    fontsize=8, annotation_clip=False)  # fmt: skip
    if panel.zero:
        (ax.axvline if panel.zero == "x" else ax.axhline)(0, color=FAINT, linewidth=0.9, zorder=1.5)
    for at in panel.limits:
        ax.axvline(at, color=FAINT, linewidth=0.9, linestyle=":", zorder=1.5)
    if panel.note:
        ax.text(0.5, 0.5, panel.note, transform=ax.transAxes, ha="center", va="center", color=FAINT)
    ax.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)


def _mpl_bars(ax: Any, panel: BarPanel) -> None:
    left = [0.0] * len(panel.rows)
    for _, color, values in panel.parts:
        ax.barh(range(len(panel.rows)), values, left=left, color=color, height=0.62)
        left = [a + b for a, b in zip(left, values, strict=True)]
    ax.set_yticks(range(len(panel.rows)), panel.rows)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.set(title=panel.title, xlabel=panel.x_label)

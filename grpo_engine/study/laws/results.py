"""What was fitted, as typed values, and fits.json, which holds them."""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from grpo_engine.evaluate.intervals import CONFIDENCE, interval
from grpo_engine.records import jsonl
from grpo_engine.study.laws.curves import Selection
from grpo_engine.study.laws.forms import SLOPES, JointLaw, Slope


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether the data identify a fit. `why` is empty when they do; `cautions` are true either way."""

    ok: bool
    why: str = ""
    cautions: tuple[str, ...] = ()

    @classmethod
    def of(cls, why: Sequence[str], cautions: Sequence[str] = ()) -> Verdict:
        """The verdict of reasons against: none is a yes."""
        return cls(ok=not why, why="; ".join(why), cautions=tuple(cautions))


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A parameter with its 95 % interval (None: no interval was made, or it is open on that side)."""

    value: float
    low: float | None = None
    high: float | None = None
    at_bound: str = ""  # "low" or "high" when the search ended at a bound: then it is not an estimate

    @classmethod
    def of(cls, value: float, draws: np.ndarray, at_bound: str = "", confidence: float = CONFIDENCE) -> Estimate:
        """A value with the percentile interval of draws [draws]."""
        low, high = interval(draws, confidence)
        return cls(value=float(value), low=float(low), high=float(high), at_bound=at_bound)


def r_squared(y: np.ndarray, fitted: np.ndarray) -> float | None:
    """Share of the variance that is explained; None when all y are equal up to rounding."""
    total = float(np.sum((y - y.mean()) ** 2))
    rounding = len(y) * (1e-14 * float(np.max(np.abs(y)))) ** 2
    return 1.0 - float(np.sum((y - fitted) ** 2)) / total if total > rounding else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Bootstrap:
    """How the intervals were made."""

    draws: int
    confidence: float
    seed: int
    method: str  # a sentence: what was drawn anew
    runs_resampled: tuple[str, ...]  # labels of the curves with at least two runs


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeFit:
    """The law of one curve by itself: log L = -k log X + E."""

    label: str  # size, and kind where several are fitted together
    size: str
    kind: str
    params: float  # N
    k: Estimate
    E: Estimate  # log of the loss at X = 1
    r2: float | None  # linear space; None when all losses are equal
    rmse: float
    noise: float  # standard deviation of the points about the fitted curve
    num_points: int
    num_runs: int
    x_min: float
    x_max: float
    loss_before: float | None  # at step 0, where it was evaluated
    loss_first: float  # of the fitted curve at x_min
    loss_last: float  # of the fitted curve at x_max
    compute_per_prompt: float | None  # 6NT FLOPs for each prompt seen, at the end
    prompts_per_step: float | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class JointCurve:
    """One curve under the joint law."""

    label: str
    size: str
    kind: str
    params: float
    k: Estimate  # k(N) of the law
    E: Estimate
    r2: float | None  # of this curve under the joint law: pooled R2 hides a curve that is missed
    rmse: float
    num_points: int
    num_runs: int
    x_min: float
    x_max: float
    log_x_mean: float  # where the intercept of this curve is least correlated with its slope


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """The objective along N0, K_max being refitted at each: does a minimum stand out at all?

    `low` and `high` are its 95 % profile interval (`bootstrap.profile_interval`); None where the objective does not rise
    enough inside the bounds: the data do not limit N0 on that side.
    """

    N0: tuple[float, ...]
    K_max: tuple[float, ...]
    objective: tuple[float, ...]
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class WithoutOne:
    """The joint law with one size left out."""

    size: str
    parameters: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveScore:
    """How well a law describes one curve: a pooled R2 is mostly variance between sizes."""

    label: str
    r2: float | None  # linear space; None when all losses are equal
    rmse: float
    num_points: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LawFit:
    """A law fitted to one curve, or to several at once."""

    label: str  # of the curve, or of what the law is about
    law: str  # its NAME
    formula: str
    objective: str
    parameters: dict[str, Estimate]  # per-curve parameters as "name[label]"; an asymptote's interval may be open
    fixed: dict[str, float]  # what was known, and constants of the law
    r2: float | None  # pooled, linear space
    rmse: float
    curves: tuple[CurveScore, ...]
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class InterceptFit:
    """A law of E(N): the log of the loss at one X, over the sizes of a joint law."""

    law: str  # a key of laws.INTERCEPTS
    formula: str
    x: float  # where the intercepts are taken
    parameters: dict[str, Estimate]
    fixed: dict[str, float]
    intercepts: dict[str, Estimate]  # of each curve, by the joint law
    misfit: float  # standard deviation of the intercepts about the law, over sizes less parameters
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """A prediction of points that were not used to make it.

    log_error is the root mean square of log(predicted / measured), bias the mean of predicted minus measured loss,
    coverage the share of the points inside the prediction interval. skill against a naive rule is 1 - (error of the law
    / error of the rule)^2: 0 is no better than the rule, 1 is perfect, negative is worse.
    """

    test: str  # "largest size", "late steps" or "other set"
    law: str
    target: str  # label of the curve
    used: str  # what of the target was used
    num_points: int
    log_error: float
    bias: float
    r2: float | None
    coverage: float | None  # None: no interval was made
    confidence: float  # of the prediction interval
    skill: dict[str, float | None]  # by naive rule; None where the rule makes no error

    @property
    def tests_only_slope(self) -> bool:
        """Whether the intercept was the target's own; fits.json of earlier versions calls it a level."""
        return self.used.startswith(("its intercept", "its level"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LawChoice:
    """Which of several laws predicts best what it did not see. An empty `best`: these data do not tell."""

    test: str
    errors: dict[str, float]  # law -> root mean square log error over the targets, the smallest first
    skill: dict[str, dict[str, float | None]]  # law -> naive rule -> skill over all targets
    num_targets: int
    best: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JointFit:
    """One law for all curves of an axis."""

    axis: str  # a key of AXES
    kind: str  # "base", "instruct", ... or "all"
    form: str  # a key of laws.SLOPES
    formula: str
    objective: str
    parameters: dict[str, Estimate]
    fixed: dict[str, float]  # constants of the form
    curves: tuple[JointCurve, ...]
    r2: float | None  # pooled over all points, linear space: mostly variance *between* sizes
    objective_value: float  # mean over curves of the mean squared error
    num_points: int
    bootstrap: Bootstrap
    draws: tuple[tuple[float, ...], ...]  # of the parameters in order, then of E in the order of curves
    profile: Profile | None
    without_one: tuple[WithoutOne, ...]
    verdict: Verdict

    @property
    def slope(self) -> Slope:
        """The fitted k(N)."""
        return SLOPES[self.form](**{n: e.value for n, e in self.parameters.items()}, **self.fixed)

    @property
    def law(self) -> JointLaw:
        """The fitted law, curves in the order of `curves`."""
        return JointLaw(slope=self.slope, n=tuple(c.params for c in self.curves), E=tuple(c.E.value for c in self.curves))

    def index(self, label: str) -> int:
        """Place of a curve in `curves`.

        Args:
            label: as in `JointCurve.label`.

        Returns:
            Its index.

        Raises:
            ValueError: no such curve; the message lists them.
        """
        for i, c in enumerate(self.curves):
            if c.label == label:
                return i
        raise ValueError(f"label must be one of {[c.label for c in self.curves]}, got {label!r}")

    def loss(self, label: str, x: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """Loss that the law says.

        Args:
            label: which curve.
            x: [...] float, positive, in the unit of the axis.

        Returns:
            [...] float64.

        Raises:
            ValueError: no such curve.
        """
        return self.law.loss(x, self.index(label))

    def loss_draws(self, label: str, x: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """Loss that the law of each bootstrap draw says.

        Args:
            label: which curve.
            x: [...] float, positive.

        Returns:
            [draws, ...] float64.

        Raises:
            ValueError: no such curve.
        """
        i, log_x = self.index(label), np.log(np.asarray(x, dtype=np.float64))
        k, intercepts = draws_of(self, np.array([self.curves[i].params]))
        wide = (slice(None), *([None] * log_x.ndim))
        return np.exp(intercepts[:, i][wide] - k[:, 0][wide] * log_x)

    def band(self, label: str, x: np.ndarray | Sequence[float] | float) -> tuple[np.ndarray, np.ndarray]:
        """95 % band of the fitted curve: where the law is, not where a single run would be.

        Args:
            label: which curve.
            x: [...] float, positive.

        Returns:
            (low, high), each [...] float64.

        Raises:
            ValueError: no such curve.
        """
        low, high = interval(self.loss_draws(label, x))
        return low, high


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisFit:
    """Everything that was fitted for one axis and one kind of model."""

    axis: str
    kind: str
    selection: Selection
    left_out: tuple[str, ...]  # what of the table could not be used, and why
    sizes: tuple[SizeFit, ...]
    joint: JointFit | None  # None when there is only one size
    laws: tuple[LawFit, ...]  # of each curve by itself
    intercepts: tuple[InterceptFit, ...]  # laws of E(N)
    held_out: tuple[HeldOut, ...]
    choices: tuple[LawChoice, ...]
    verdict: Verdict  # of the joint law, or why there is none


@dataclass(frozen=True, kw_only=True, slots=True)
class Fits:
    """All fits of a study; the content of fits.json."""

    objective: str
    fits: tuple[AxisFit, ...]

    def get(self, axis: str, kind: str) -> AxisFit:
        """The fit of an axis and a kind.

        Args:
            axis: a key of `AXES`.
            kind: kind of model, or "all".

        Returns:
            The fit.

        Raises:
            ValueError: there is none; the message lists those that are there.
        """
        for f in self.fits:
            if (f.axis, f.kind) == (axis, kind):
                return f
        raise ValueError(f"no fit of {(axis, kind)}; there are {[(f.axis, f.kind) for f in self.fits]}")


def write_fits(path: str | os.PathLike[str], fits: Fits) -> None:
    """Writes fits.json atomically.

    Args:
        path: the file; its folder must exist.
        fits: what to write.

    Raises:
        OSError: the folder is missing or not writable.
    """
    jsonl.write_json_atomic(path, fits)


def read_fits(path: str | os.PathLike[str]) -> Fits:
    """Reads what `write_fits` wrote, exactly.

    Args:
        path: the file.

    Returns:
        The fits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another schema, or a field that is missing or unknown; the message names the file and the field.
    """
    obj = jsonl.read_json(path)
    obj.pop("schema")
    return _build(Fits, obj, f"{os.fspath(path)}: fits")


_OLD_NAMES = {"level": "confidence", "levels": "intercepts"}  # of fields, in fits.json of earlier versions


def _build(hint: Any, value: Any, where: str) -> Any:
    """A typed value from its JSON form."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [h for h in get_args(hint) if h is not type(None)]
        return None if value is None else _build(inner[0], value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: must be an object, got {value!r}")
        hints = get_type_hints(hint)
        value = {n if n in hints else _OLD_NAMES.get(n, n): v for n, v in value.items()}
        if set(value) != set(hints):
            odd = sorted(set(value) ^ set(hints))
            raise ValueError(f"{where}: the fields of {hint.__name__} are not those expected: {', '.join(odd)}")
        return hint(**{n: _build(h, value[n], f"{where}.{n}") for n, h in hints.items()})
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: must be a list, got {value!r}")
        return tuple(_build(get_args(hint)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        return {n: _build(get_args(hint)[1], v, f"{where}.{n}") for n, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint):
        raise ValueError(f"{where}: must be {hint.__name__}, got {value!r}")
    return value


def draws_of(fit: JointFit, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each bootstrap draw of a joint fit says about slopes and intercepts.

    Args:
        fit: the fit.
        n: [S] parameters at which k is wanted; they need not have been measured.

    Returns:
        k [draws, S], and E of the fit's curves [draws, M].
    """
    form, names = SLOPES[fit.form], list(fit.parameters)
    draws = np.asarray(fit.draws)
    columns = {q: draws[:, i : i + 1] for i, q in enumerate(names)}
    return form(**columns, **fit.fixed).k(n), draws[:, len(names) :]

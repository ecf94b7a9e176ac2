"""What was fitted, as typed values, and fits.json, which holds them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from grpo_engine.evaluate.intervals import CONFIDENCE, interval
from grpo_engine.records import jsonl
from grpo_engine.study.laws.curves import Curve, Selection
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
class FittedCurve:
    """The points of one mean curve."""

    label: str
    x: tuple[float, ...]
    loss: tuple[float, ...]
    unique: tuple[float, ...] | None  # different prompts seen; None: not recorded


@dataclass(frozen=True, kw_only=True, slots=True)
class InterceptsAtX:
    """The log of the loss of each curve at one X, by the joint law."""

    x: float
    intercepts: dict[str, Estimate]  # by label of the curve


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
    curves: tuple[FittedCurve, ...] = ()  # that was fitted
    at_one_x: InterceptsAtX | None = None  # where the joint law has the loss of each curve


@dataclass(frozen=True, kw_only=True, slots=True)
class SurfaceFit:
    """A law of N and D of one kind of model."""

    kind: str
    law: LawFit


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseFit:
    """What a repeated prompt is worth to one size of one kind."""

    size: str
    kind: str
    curves: dict[str, FittedCurve]  # by tau
    law: LawFit


@dataclass(frozen=True, kw_only=True, slots=True)
class SetPredictions:
    """Predictions of one test set from the others, for one kind of model."""

    kind: str
    held_out: tuple[HeldOut, ...]


Answer = Literal["supported", "not supported", "undecided"]
Test = Literal["superiority", "equivalence", "non-inferiority"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two groups of runs."""

    label: str
    effect: Estimate  # positive: as the claim has it; for an equivalence, the first less the second
    confidence: float  # of the interval
    verdict: Answer
    runs: tuple[int, ...]  # of each side
    runs_needed: int | None  # a side, for an undecided one; None: decided, or runs alone will not decide it
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A claim with everything that was compared for it."""

    name: str
    statement: str
    test: Test
    margin: float
    comparisons: tuple[Comparison, ...]
    verdict: Answer
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fits:
    """All that was fitted and tested of a study; the content of fits.json."""

    objective: str
    fits: tuple[AxisFit, ...]
    records: str = ""  # digest of the table that was fitted; empty: not known
    surfaces: tuple[SurfaceFit, ...] = ()
    reuse: tuple[ReuseFit, ...] = ()
    other_sets: tuple[SetPredictions, ...] = ()
    claims: tuple[Claim, ...] = ()

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
    """Reads what `write_fits` wrote, exactly, or the laws of a former schema.

    Args:
        path: the file.

    Returns:
        The fits. A former schema has no claims, surfaces, reuse and points, and does not tell its records.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another schema, or a field that is missing or unknown; the message names the file and the place.
        TypeError: a value of the wrong type, likewise.
    """
    obj = jsonl.read_json(path)
    return jsonl.from_json(Fits, _former(obj) if obj["schema"] < 3 else obj, where=os.fspath(path))


FORMER_NAMES = {"level": "confidence", "levels": "intercepts"}  # of fields, in schemas 1 and 2


def _former(obj: dict[str, Any]) -> dict[str, Any]:
    """What schemas 1 and 2 hold, which are the joint laws alone: under today's names, with the fields that they had not."""
    obj = _renamed(obj)
    fits = [{"curves": [], "at_one_x": None} | f for f in obj.get("fits", [])]
    return {"records": "", "surfaces": [], "reuse": [], "other_sets": [], "claims": []} | obj | {"fits": fits}


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {FORMER_NAMES.get(k, k): _renamed(v) for k, v in value.items()}
    return [_renamed(v) for v in value] if isinstance(value, list) else value


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
    columns: dict[str, Any] = {q: draws[:, i : i + 1] for i, q in enumerate(names)}
    return form(**columns, **fit.fixed).k(n), draws[:, len(names) :]


def residuals(
    curves: Sequence[Curve | FittedCurve], joint: JointFit
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What a joint law leaves unexplained.

    Args:
        curves: that it was fitted to.
        joint: the fit.

    Returns:
        (x, fitted loss, measured minus fitted loss), each [n], by label of the curve.

    Raises:
        ValueError: a curve that the fit does not have.
    """
    out = {}
    for c in curves:
        fitted = joint.loss(c.label, c.x)
        out[c.label] = (np.asarray(c.x), fitted, np.asarray(c.loss) - fitted)
    return out

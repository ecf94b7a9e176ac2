"""The laws: formulas only. How test loss falls with compute or data, and what model size does to it.

    log L(N, X) = -k(N) log X + E(N)

X is compute (FLOPs) or data (prompts seen), N the number of parameters, L = 1 - pass@1 the test loss. `log` is the
natural logarithm everywhere. k has no base; E is the log of the loss at X = 1 (one prompt, one FLOP), so E of a law
written with log10 is E / ln 10 (`e_log10`). Source of the law: Tan et al. 2025, arXiv:2509.25300, equations 1 and 2.

| family | what it says | laws |
|---|---|---|
| slope | k(N) | `SaturatingSlope`, `PowerSlope`, `LogSlope` |
| intercept | log of the loss at a reference X, for any N | `LineIntercept`, `LogisticIntercept`, `SaturatingIntercept` |
| curve | L(X) of one size | `LogLinear`, `FloorPower`, `ScaleRLSigmoid`, `ExponentialSaturation` |
| surface | L(N, D) | `AdditiveLaw`, `LossDecomposition`; `JointLaw`: a slope law and a free E for each curve |
| reuse | L(D, U), U different prompts | `ReuseLaw` |

A law is a frozen value. Its parameters may be arrays that broadcast against the coordinates, so that one call
evaluates many laws (bootstrap draws, starts of a search), and complex, so that a derivative is an imaginary part
(`least_squares.jacobian`). No law has a size among its fields: a parameter with a value for each curve is an array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray | Sequence[float] | float
LN10 = math.log(10.0)
STEEPEST = "at 2 the loss falls fourfold whenever X doubles: no RL run did"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Where a parameter may lie, and why nowhere else. An estimate at its bound is not an estimate."""

    low: float
    high: float
    why: str


class Law:
    """What a law class says of itself, for the fits. `bounds` and `fixed` see the coordinates of the data."""

    __slots__ = ()
    NAME: ClassVar[str]
    FORMULA: ClassVar[str]
    GIVES: ClassVar[str] = "loss"  # the method that is the law
    PARAMETERS: ClassVar[tuple[str, ...]]
    LOG: ClassVar[tuple[str, ...]] = ()  # searched on a logarithmic scale
    LINEAR: ClassVar[tuple[str, ...]] = ()  # the law is linear in these when the others are given
    LOG_LINEAR: ClassVar[bool] = False  # LINEAR speaks of log L
    PER_CURVE: ClassVar[tuple[str, ...]] = ()  # one value for each curve

    @classmethod
    def bounds(cls, *coordinates: Any, **named: Any) -> dict[str, Bound]:
        """Where each parameter may lie.

        Args:
            coordinates, named: of the data, each [n] float64: what the law's method takes, by place or by name.

        Returns:
            Bounds by parameter name.
        """
        raise NotImplementedError

    @classmethod
    def fixed(cls, *coordinates: Any, **named: Any) -> dict[str, float]:
        """Constants of the law that are not fitted, such as the size in whose unit another parameter is told.

        Args:
            coordinates, named: see `bounds`.

        Returns:
            Values by name; none by default.
        """
        return {}


def e_log10(e: float) -> float:
    """E of the same law written with log10, as in the code of Tan et al.

    Args:
        e: E in natural units: the log of the loss at X = 1.

    Returns:
        E / ln 10.
    """
    return e / LN10


def _float(v: Array) -> np.ndarray:
    return np.asarray(v, dtype=np.float64)


def _middle(n: np.ndarray) -> float:
    return float(np.exp(np.mean(np.log(n))))


# --------------------------------------------------------------------------------------- slope laws


@dataclass(frozen=True, kw_only=True, slots=True)
class SaturatingSlope(Law):
    """k(N) = K_max N / (N + N0): proportional to N far below N0, K_max far above it.

    Tan et al. 2025, equation 2. At N = N0 half of K_max is reached; at N = 0 the slope is 0.
    """

    K_max: float  # slope of an infinitely large model; no unit
    N0: float  # parameters

    NAME: ClassVar[str] = "saturating"
    FORMULA: ClassVar[str] = "k(N) = K_max N / (N + N0)"
    GIVES: ClassVar[str] = "k"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("K_max", "N0")
    LOG: ClassVar[tuple[str, ...]] = ("N0",)
    LINEAR: ClassVar[tuple[str, ...]] = ("K_max",)

    def k(self, n: Array) -> np.ndarray:
        """Slope for each number of parameters.

        Args:
            n: [M] float, parameters, positive.

        Returns:
            [M] float64.
        """
        n = _float(n)
        return self.K_max * n / (n + self.N0)

    @classmethod
    def bounds(cls, n: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`; n [M] are the measured sizes."""
        return {
            "K_max": Bound(
                low=0.0,
                high=2.0 * 101.0,
                why="below 0 the loss rises; above, even at the largest N0 the largest measured model has a slope over "
                "2, so that its loss falls more than fourfold when X doubles: no RL run did",
            ),
            "N0": Bound(
                low=float(np.min(n)) / 100,
                high=float(np.max(n)) * 100,
                why="100 times beyond the measured sizes k(N) is constant, or proportional to N, over all of them, so "
                "they no longer tell where N0 is",
            ),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerSlope(Law):
    """k(N) = a (N / n_ref)^gamma: grows without limit; at N = 0 it is 0 for gamma > 0.

    An alternative to the saturating form, with as many parameters. n_ref (the geometric mean of the measured sizes)
    only sets the unit in which a is told: the slope of a model of n_ref parameters.
    """

    a: float  # slope at n_ref
    gamma: float
    n_ref: float = 1.0

    NAME: ClassVar[str] = "power"
    FORMULA: ClassVar[str] = "k(N) = a (N / n_ref)^gamma"
    GIVES: ClassVar[str] = "k"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("a", "gamma")
    LINEAR: ClassVar[tuple[str, ...]] = ("a",)

    def k(self, n: Array) -> np.ndarray:
        """Slope for each number of parameters; see `SaturatingSlope.k`."""
        return self.a * (_float(n) / self.n_ref) ** self.gamma

    @classmethod
    def bounds(cls, n: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`; n [M] are the measured sizes."""
        return {
            "a": Bound(low=0.0, high=2.0, why=f"below 0 the loss rises; {STEEPEST}"),
            "gamma": Bound(low=-2.0, high=4.0, why="outside, one size has all of the slope and the others none"),
        }

    @classmethod
    def fixed(cls, n: np.ndarray) -> dict[str, float]:
        """{"n_ref": geometric mean of n}."""
        return {"n_ref": _middle(n)}


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSlope(Law):
    """k(N) = a + b log(N / n_ref): grows slowly without limit, and is negative for small enough N.

    An alternative to the saturating form, with as many parameters; n_ref as in `PowerSlope`.
    """

    a: float  # slope at n_ref
    b: float  # growth of the slope for e times as many parameters
    n_ref: float = 1.0

    NAME: ClassVar[str] = "log"
    FORMULA: ClassVar[str] = "k(N) = a + b log(N / n_ref)"
    GIVES: ClassVar[str] = "k"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("a", "b")
    LINEAR: ClassVar[tuple[str, ...]] = ("a", "b")

    def k(self, n: Array) -> np.ndarray:
        """Slope for each number of parameters; see `SaturatingSlope.k`."""
        return self.a + self.b * np.log(_float(n) / self.n_ref)

    @classmethod
    def bounds(cls, n: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`; n [M] are the measured sizes."""
        return {
            "a": Bound(low=-2.0, high=2.0, why=STEEPEST),
            "b": Bound(low=-1.0, high=1.0, why="at 1 one doubling of N adds .7 to the slope: no RL run did"),
        }

    @classmethod
    def fixed(cls, n: np.ndarray) -> dict[str, float]:
        """{"n_ref": geometric mean of n}."""
        return {"n_ref": _middle(n)}


Slope = SaturatingSlope | PowerSlope | LogSlope
SLOPES: dict[str, type[Slope]] = {c.NAME: c for c in (SaturatingSlope, PowerSlope, LogSlope)}


# --------------------------------------------------------------------------------------- intercept laws


@dataclass(frozen=True, kw_only=True, slots=True)
class LineIntercept(Law):
    """log L = a + b log(N / n_ref) at a reference X: a power law of the loss in N. Above L = 1 it does not hold."""

    a: float  # log of the loss at n_ref
    b: float  # negative where larger models are better
    n_ref: float = 1.0

    NAME: ClassVar[str] = "line"
    FORMULA: ClassVar[str] = "E(N) = a + b log(N / n_ref)"
    GIVES: ClassVar[str] = "intercept"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("a", "b")
    LINEAR: ClassVar[tuple[str, ...]] = ("a", "b")

    def intercept(self, n: Array) -> np.ndarray:
        """Log of the loss at the reference X.

        Args:
            n: [M] float, parameters, positive.

        Returns:
            [M] float64.
        """
        return self.a + self.b * np.log(_float(n) / self.n_ref)

    @classmethod
    def bounds(cls, n: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`; n [M] are the measured sizes."""
        return {
            "a": Bound(low=-20.0, high=5.0, why="a loss of e^-20 is none"),
            "b": Bound(low=-3.0, high=3.0, why="at -3 the loss falls eightfold whenever N doubles"),
        }

    @classmethod
    def fixed(cls, n: np.ndarray) -> dict[str, float]:
        """{"n_ref": geometric mean of n}."""
        return {"n_ref": _middle(n)}


@dataclass(frozen=True, kw_only=True, slots=True)
class LogisticIntercept(Law):
    """L = 1 / (1 + (N / N_half)^g) at a reference X: 1 for small models, a power law of exponent -g for large ones."""

    N_half: float  # parameters at which half of the problems are solved
    g: float

    NAME: ClassVar[str] = "logistic"
    FORMULA: ClassVar[str] = "E(N) = -log(1 + (N / N_half)^g)"
    GIVES: ClassVar[str] = "intercept"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("N_half", "g")
    LOG: ClassVar[tuple[str, ...]] = ("N_half",)

    def intercept(self, n: Array) -> np.ndarray:
        """Log of the loss at the reference X; see `LineIntercept.intercept`."""
        return -np.log1p((_float(n) / self.N_half) ** self.g)

    @classmethod
    def bounds(cls, n: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`; n [M] are the measured sizes."""
        low, high = float(np.min(n)), float(np.max(n))
        return {
            "N_half": Bound(low=low / 1e6, high=high * 1e6, why="farther out the measured sizes do not tell it"),
            "g": Bound(low=0.0, high=5.0, why="below 0 larger models are worse; above, one size is all or nothing"),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SaturatingIntercept(Law):
    """log L = a - b N / (N + N1) at a reference X: falls from a for small models to a - b for large ones.

    The code of Tan et al. has E(N) = E_max N / (N + N1) among its forms; a is added here, because at a reference X
    inside the data the loss of a small model is not 1.
    """

    a: float  # log of the loss of a very small model
    b: float
    N1: float  # parameters at which half of the fall is reached

    NAME: ClassVar[str] = "saturating"
    FORMULA: ClassVar[str] = "E(N) = a - b N / (N + N1)"
    GIVES: ClassVar[str] = "intercept"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("a", "b", "N1")
    LOG: ClassVar[tuple[str, ...]] = ("N1",)
    LINEAR: ClassVar[tuple[str, ...]] = ("a", "b")

    def intercept(self, n: Array) -> np.ndarray:
        """Log of the loss at the reference X; see `LineIntercept.intercept`."""
        n = _float(n)
        return self.a - self.b * n / (n + self.N1)

    @classmethod
    def bounds(cls, n: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`; n [M] are the measured sizes."""
        return {
            "a": Bound(low=-20.0, high=5.0, why="a loss of e^-20 is none"),
            "b": Bound(low=0.0, high=50.0, why="below 0 larger models are worse"),
            "N1": Bound(low=float(np.min(n)) / 100, high=float(np.max(n)) * 100, why="as N0 of a saturating slope"),
        }


Intercept = LineIntercept | LogisticIntercept | SaturatingIntercept
INTERCEPTS: dict[str, type[Intercept]] = {c.NAME: c for c in (LineIntercept, LogisticIntercept, SaturatingIntercept)}


# --------------------------------------------------------------------------------------- curve laws


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLinear(Law):
    """log L = -k log X + E, the law of one size. It has no floor: L goes to 0, and exceeds 1 for small X.

    Tan et al. 2025, equation 1. A negative k is a loss that rises: it is shown, not hidden.
    """

    k: float
    E: float  # log of the loss at X = 1

    NAME: ClassVar[str] = "loglinear"
    FORMULA: ClassVar[str] = "log L = -k log X + E"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("k", "E")
    LINEAR: ClassVar[tuple[str, ...]] = ("k", "E")
    LOG_LINEAR: ClassVar[bool] = True

    def loss(self, x: Array) -> np.ndarray:
        """Predicted loss.

        Args:
            x: [...] float, positive.

        Returns:
            [...] float64.
        """
        return np.exp(self.E - self.k * np.log(_float(x)))

    @classmethod
    def bounds(cls, x: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`; x [n] is where the curve was measured."""
        far = 2.0 * max(1.0, float(np.max(np.abs(np.log(x)))))
        return {
            "k": Bound(low=-2.0, high=2.0, why=STEEPEST),
            "E": Bound(low=-far - 20.0, high=far + 5.0, why="what the steepest slope makes of a loss between 0 and 1"),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class FloorPower(Law):
    """L = A (X / x_ref)^-alpha + L_inf: a power law down to a floor.

    The form of pre-training laws (Hoffmann et al. 2022, arXiv:2203.15556) for one size. x_ref (the first measured X)
    only sets the unit in which A is told: what can still be gained there. With L_inf = 0 it is `LogLinear`.
    """

    A: float  # loss above the floor at x_ref
    alpha: float
    L_inf: float  # loss for infinite X
    x_ref: float = 1.0

    NAME: ClassVar[str] = "floor"
    FORMULA: ClassVar[str] = "L = A (X / x_ref)^-alpha + L_inf"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("A", "alpha", "L_inf")
    LOG: ClassVar[tuple[str, ...]] = ("alpha",)
    LINEAR: ClassVar[tuple[str, ...]] = ("A", "L_inf")

    def loss(self, x: Array) -> np.ndarray:
        """Predicted loss; see `LogLinear.loss`."""
        return self.A * (_float(x) / self.x_ref) ** -self.alpha + self.L_inf

    @classmethod
    def bounds(cls, x: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`; x [n] is where the curve was measured."""
        return {
            "A": Bound(low=0.0, high=2.0, why="below 0 the loss rises; a loss is at most 1"),
            "alpha": Bound(low=0.01, high=5.0, why="below, a line in log X; above, a step at the first point"),
            "L_inf": Bound(low=0.0, high=1.0, why="a loss"),
        }

    @classmethod
    def fixed(cls, x: np.ndarray) -> dict[str, float]:
        """{"x_ref": smallest x}."""
        return {"x_ref": float(np.min(x))}


class _Gain(Law):
    """What curves from R0 up to a ceiling A share: L = 1 - R0 - (A - R0) * gained."""

    __slots__ = ()
    R0: float
    A: float

    def gained(self, x: Array) -> np.ndarray:
        """Share of the gain A - R0 that is reached; see `ScaleRLSigmoid.gained`."""
        raise NotImplementedError

    def loss(self, x: Array) -> np.ndarray:
        """Predicted loss; see `LogLinear.loss`."""
        return 1.0 - self.R0 - (self.A - self.R0) * self.gained(x)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleRLSigmoid(_Gain):
    """R = R0 + (A - R0) / (1 + (X_mid / X)^B), L = 1 - R: a sigmoid in log X from R0 up to the ceiling A.

    Khatri et al. 2025, arXiv:2510.13786. R0 is the pass rate before RL, measured where an evaluation at step 0 exists.
    A is not identified when all X lie below X_mid; the fit then gives it an open interval.
    """

    A: float  # pass rate for infinite X
    B: float  # steepness
    X_mid: float  # where half of the gain is reached, in the unit of X
    R0: float  # pass rate at X = 0

    NAME: ClassVar[str] = "sigmoid"
    FORMULA: ClassVar[str] = "R = R0 + (A - R0) / (1 + (X_mid / X)^B)"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("A", "B", "X_mid", "R0")
    LOG: ClassVar[tuple[str, ...]] = ("B", "X_mid")
    LINEAR: ClassVar[tuple[str, ...]] = ("A", "R0")

    def gained(self, x: Array) -> np.ndarray:
        """Share of the gain A - R0 that is reached.

        Args:
            x: [...] float, positive.

        Returns:
            [...] float64 in (0, 1).
        """
        return 1.0 / (1.0 + (self.X_mid / _float(x)) ** self.B)

    @classmethod
    def bounds(cls, x: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`; x [n] is where the curve was measured."""
        low, high = float(np.min(x)), float(np.max(x))
        return {
            "A": Bound(low=0.0, high=1.0, why="a pass rate"),
            "B": Bound(low=0.2, high=8.0, why="below, a straight line in log X; above, a step between two points"),
            "X_mid": Bound(low=low / 10, high=high * 10, why="farther out no measured point tells it"),
            "R0": Bound(low=0.0, high=1.0, why="a pass rate"),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ExponentialSaturation(_Gain):
    """R = A - (A - R0) exp(-X / X_scale), L = 1 - R: a gain that decays exponentially.

    The saturating phase of Nimmaturi et al. 2025, arXiv:2507.18014. R0 as in `ScaleRLSigmoid`.
    """

    A: float  # pass rate for infinite X
    X_scale: float  # where 63 % of the gain is reached, in the unit of X
    R0: float  # pass rate at X = 0

    NAME: ClassVar[str] = "exponential"
    FORMULA: ClassVar[str] = "R = A - (A - R0) exp(-X / X_scale)"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("A", "X_scale", "R0")
    LOG: ClassVar[tuple[str, ...]] = ("X_scale",)
    LINEAR: ClassVar[tuple[str, ...]] = ("A", "R0")

    def gained(self, x: Array) -> np.ndarray:
        """Share of the gain A - R0 that is reached; see `ScaleRLSigmoid.gained`."""
        return -np.expm1(-_float(x) / self.X_scale)

    @classmethod
    def bounds(cls, x: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`; x [n] is where the curve was measured."""
        low, high = float(np.min(x)), float(np.max(x))
        return {
            "A": Bound(low=0.0, high=1.0, why="a pass rate"),
            "X_scale": Bound(low=low / 10, high=high * 10, why="farther out the measured curve is a straight line"),
            "R0": Bound(low=0.0, high=1.0, why="a pass rate"),
        }


CurveLaw = LogLinear | FloorPower | ScaleRLSigmoid | ExponentialSaturation
CURVES: dict[str, type[CurveLaw]] = {c.NAME: c for c in (LogLinear, FloorPower, ScaleRLSigmoid, ExponentialSaturation)}


# ------------------------------------------------------------------------------------- surface laws


@dataclass(frozen=True, kw_only=True, slots=True)
class JointLaw:
    """log L = -k(N) log X + E, one slope law for all curves and one free E for each.

    Tan et al. 2025, equations 6 and 8. A curve is one size of one kind of model (base or instruct). Tan et al. offer
    no law for E(N), so a size that was not measured has no E; the intercept laws are ours.
    """

    slope: Slope
    n: tuple[float, ...]  # parameters of each curve
    E: tuple[float, ...]  # log of the loss of each curve at X = 1

    def __post_init__(self) -> None:
        if len(self.n) != len(self.E):
            raise ValueError(f"JointLaw: n and E must have one entry a curve, got {len(self.n)} and {len(self.E)}")

    def loss(self, x: Array, curve: np.ndarray | int) -> np.ndarray:
        """Predicted loss.

        Args:
            x: [...] float, compute or data, positive.
            curve: [...] int, which curve each x belongs to (or one curve for all).

        Returns:
            [...] float64; it may exceed 1 for small x, because the law has no ceiling.
        """
        k = self.slope.k(np.asarray(self.n))[curve]
        return np.exp(np.asarray(self.E)[curve] - k * np.log(_float(x)))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdditiveLaw(Law):
    """L = A (N / n_ref)^-a + B (D / d_ref)^-b + L_inf: what a lack of size and a lack of data cost, added.

    Hoffmann et al. 2022, arXiv:2203.15556, equation 2. n_ref and d_ref (geometric means of the data) only set the units
    in which A and B are told. Its slope in log D does not grow with N in absolute loss: the test that k(N) answers.
    """

    A: float  # loss that a model of n_ref parameters has for its size
    a: float
    B: float  # loss that is left for the lack of data at d_ref
    b: float
    L_inf: float  # of an infinite model with infinite data
    n_ref: float = 1.0
    d_ref: float = 1.0

    NAME: ClassVar[str] = "additive"
    FORMULA: ClassVar[str] = "L = A (N / n_ref)^-a + B (D / d_ref)^-b + L_inf"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("A", "a", "B", "b", "L_inf")
    LOG: ClassVar[tuple[str, ...]] = ("a", "b")
    LINEAR: ClassVar[tuple[str, ...]] = ("A", "B", "L_inf")

    def loss(self, n: Array, d: Array) -> np.ndarray:
        """Predicted loss.

        Args:
            n: [...] float, parameters, positive.
            d: [...] float, data or compute, positive.

        Returns:
            [...] float64; above 1 for small enough n or d.
        """
        size, data = (_float(n) / self.n_ref) ** -self.a, (_float(d) / self.d_ref) ** -self.b
        return self.A * size + self.B * data + self.L_inf

    @classmethod
    def bounds(cls, n: np.ndarray, d: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`."""
        why = "below, a line in the logarithm; above, a step at the smallest"
        return {
            "A": Bound(low=0.0, high=10.0, why="below 0 larger models are worse"),
            "a": Bound(low=0.01, high=5.0, why=why),
            "B": Bound(low=0.0, high=10.0, why="below 0 the loss rises"),
            "b": Bound(low=0.01, high=5.0, why=why),
            "L_inf": Bound(low=0.0, high=1.0, why="a loss"),
        }

    @classmethod
    def fixed(cls, n: np.ndarray, d: np.ndarray) -> dict[str, float]:
        """{"n_ref": geometric mean of n, "d_ref": geometric mean of d}."""
        return {"n_ref": _middle(n), "d_ref": _middle(d)}


@dataclass(frozen=True, kw_only=True, slots=True)
class LossDecomposition(Law):
    """L = L_inf + A (N / n_ref)^-alpha + lam / (1 + (D / D0)^beta): a floor that N lowers, above it a sigmoid in log D.

    Tan et al. 2025, appendix D, with (N0 / N)^alpha written as A (N / n_ref)^-alpha. lam (what RL can take away) and D0
    (where half of it is gone) are free for each curve; the paper has no law for them.

    Erratum: equation 20 of the paper, k_max = (beta / 2) / (1 + S) with S = 2 floor / lam, is called the maximal slope
    -d log L / d log D. It is the slope at D = D0. The maximum lies at (D / D0)^beta = sqrt(1 + lam / floor) and is
    beta (x - 1) / (x + 1) with x that root: never below equation 20, and bounded by beta, not by beta / 2.
    """

    L_inf: float
    A: float  # floor above L_inf of a model of n_ref parameters
    alpha: float
    beta: float
    lam: np.ndarray | tuple[float, ...]  # [M], of each curve
    D0: np.ndarray | tuple[float, ...]  # [M], of each curve, in the unit of D
    n_ref: float = 1.0

    NAME: ClassVar[str] = "decomposition"
    FORMULA: ClassVar[str] = "L = L_inf + A (N / n_ref)^-alpha + lam / (1 + (D / D0)^beta)"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("L_inf", "A", "alpha", "beta", "lam", "D0")
    LOG: ClassVar[tuple[str, ...]] = ("alpha", "beta", "D0")
    LINEAR: ClassVar[tuple[str, ...]] = ("L_inf", "A", "lam")
    PER_CURVE: ClassVar[tuple[str, ...]] = ("lam", "D0")

    def loss(self, n: Array, d: Array, curve: np.ndarray | int) -> np.ndarray:
        """Predicted loss.

        Args:
            n: [...] float, parameters, positive.
            d: [...] float, data or compute, positive.
            curve: [...] int, which curve each point belongs to.

        Returns:
            [...] float64.
        """
        lam, d0 = np.asarray(self.lam)[..., curve], np.asarray(self.D0)[..., curve]
        return self.floor(n) + lam / (1.0 + (_float(d) / d0) ** self.beta)

    def floor(self, n: Array) -> np.ndarray:
        """Loss for infinite data.

        Args:
            n: [...] float, parameters, positive.

        Returns:
            [...] float64.
        """
        return self.L_inf + self.A * (_float(n) / self.n_ref) ** -self.alpha

    def slope_at_d0(self, n: Array, curve: np.ndarray | int) -> np.ndarray:
        """-d log L / d log D at D = D0: equation 20 of the paper, there called the maximal slope.

        Args:
            n: [...] float, parameters.
            curve: [...] int.

        Returns:
            [...] float64.
        """
        return self.beta / 2 / (1.0 + 2.0 * self.floor(n) / np.asarray(self.lam)[..., curve])

    def max_slope(self, n: Array, curve: np.ndarray | int) -> np.ndarray:
        """The largest -d log L / d log D over all D; see the erratum above.

        Args:
            n: [...] float, parameters.
            curve: [...] int.

        Returns:
            [...] float64 in [0, beta]; beta where the floor is 0.
        """
        with np.errstate(divide="ignore"):
            root = np.sqrt(1.0 + np.asarray(self.lam)[..., curve] / self.floor(n))
        return self.beta * (1.0 - 2.0 / (root + 1.0))

    @classmethod
    def bounds(cls, n: np.ndarray, d: np.ndarray, curve: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`; a per-curve parameter has the same bounds for every curve."""
        low, high = float(np.min(d)), float(np.max(d))
        return {
            "L_inf": Bound(low=0.0, high=1.0, why="a loss"),
            "A": Bound(low=0.0, high=10.0, why="below 0 larger models have a higher floor"),
            "alpha": Bound(low=0.01, high=5.0, why="below, a line in log N; above, a step at the smallest"),
            "beta": Bound(low=0.2, high=8.0, why="as B of the sigmoid"),
            "lam": Bound(low=0.0, high=1.0, why="below 0 the loss rises; a loss is at most 1"),
            "D0": Bound(low=low / 10, high=high * 10, why="farther out no measured point tells it"),
        }

    @classmethod
    def fixed(cls, n: np.ndarray, d: np.ndarray, curve: np.ndarray) -> dict[str, float]:
        """{"n_ref": geometric mean of n}."""
        return {"n_ref": _middle(n)}


# -------------------------------------------------------------------------------------------- reuse


def effective_data(seen: Array, unique: Array, worth: np.ndarray | float) -> np.ndarray:
    """Fresh prompts that are worth as much as prompts seen several times: U + U worth (1 - exp(-R / worth)).

    Muennighoff et al. 2023, arXiv:2305.16264, equation 5. R = seen / unique - 1 is the number of repetitions. Each
    repetition is worth less than the one before by the factor exp(-1 / worth): the first ones are nearly as good as
    fresh prompts, and no number of them is worth more than `worth` times the fresh ones.

    Args:
        seen: [...] float, D, prompts seen.
        unique: [...] float, U, different prompts among them, positive; where it is above `seen`, nothing is repeated.
        worth: [...] float, R*, positive; for worth -> infinity the result is `seen`.

    Returns:
        [...] float64, at most `seen`.
    """
    unique = np.minimum(_float(unique), _float(seen))
    return unique * (1.0 - worth * np.expm1(-(_float(seen) / unique - 1.0) / worth))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseLaw(Law):
    """log L = E - k log(D_eff): the law of one size in data, repeated prompts counting for what they are worth.

    D_eff is `effective_data`. With large `worth` reuse is free and it is `LogLinear` in prompts seen; with worth -> 0
    only different prompts count. It has no way to say that repetition harms: a curve that turns up is a misfit, which
    the residuals show.
    """

    k: float
    E: float  # log of the loss after one fresh prompt
    worth: float  # R*: repetitions after which little is left to learn from a prompt

    NAME: ClassVar[str] = "reuse"
    FORMULA: ClassVar[str] = "log L = E - k log(U + U R* (1 - exp(-(D / U - 1) / R*)))"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("k", "E", "worth")
    LOG: ClassVar[tuple[str, ...]] = ("worth",)
    LINEAR: ClassVar[tuple[str, ...]] = ("k", "E")
    LOG_LINEAR: ClassVar[bool] = True

    def loss(self, seen: Array, unique: Array) -> np.ndarray:
        """Predicted loss.

        Args:
            seen: [...] float, D, prompts seen, positive.
            unique: [...] float, U, different prompts among them, positive.

        Returns:
            [...] float64.
        """
        return np.exp(self.E - self.k * np.log(effective_data(seen, unique, self.worth)))

    @classmethod
    def bounds(cls, seen: np.ndarray, unique: np.ndarray) -> dict[str, Bound]:
        """See `Law.bounds`."""
        most = max(float(np.max(seen / unique)) - 1.0, 1.0)
        return LogLinear.bounds(seen) | {
            "worth": Bound(low=0.01, high=100 * most, why="below, repeats are worth nothing; above, all of them are free")
        }

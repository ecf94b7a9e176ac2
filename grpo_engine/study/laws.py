"""The laws: how test loss falls with compute or data, and how the speed of the fall grows with model size.

    log L(N, X) = -k(N) log X + E(N)

X is compute (FLOPs) or data (prompts seen), N the number of parameters, L = 1 - pass@1 the test loss. `log` is the
natural logarithm everywhere. k has no base; E is the log of the loss at X = 1 (one prompt, one FLOP), so E of a law
written with log10 is E / ln 10 (`e_log10`). Source of the law: Tan et al. 2025, arXiv:2509.25300, equations 1 and 2.

Two families. A *slope law* says how k depends on N and needs several sizes (`SaturatingSlope`, `PowerSlope`,
`LogSlope`; `JointLaw` adds one free E per curve). A *curve law* describes the curve of one size (`LogLinear`,
`ScaleRLSigmoid`, `ExponentialSaturation`). A law is a frozen value; `fit` finds its parameters within `bounds`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

LN10 = math.log(10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Where a parameter may lie, and why nowhere else. An estimate at its bound is not an estimate."""

    low: float
    high: float
    why: str


def e_log10(e: float) -> float:
    """E of the same law written with log10, as in the code of Tan et al.

    Args:
        e: E in natural units: the log of the loss at X = 1.

    Returns:
        E / ln 10.
    """
    return e / LN10


# --------------------------------------------------------------------------------------- slope laws


@dataclass(frozen=True, kw_only=True, slots=True)
class SaturatingSlope:
    """k(N) = K_max N / (N + N0): proportional to N far below N0, K_max far above it.

    Tan et al. 2025, equation 2. At N = N0 half of K_max is reached. Parameters of slope laws may be [B, 1] arrays, one
    row a bootstrap draw; k is then [B, M].
    """

    K_max: float  # slope of an infinitely large model; no unit
    N0: float  # parameters

    NAME: ClassVar[str] = "saturating"
    FORMULA: ClassVar[str] = "k(N) = K_max N / (N + N0)"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("K_max", "N0")
    LOG: ClassVar[tuple[str, ...]] = ("N0",)  # searched on a logarithmic scale

    def k(self, n: np.ndarray | float) -> np.ndarray:
        """Slope for each number of parameters.

        Args:
            n: [M] float, parameters, positive.

        Returns:
            [M] float64.
        """
        n = np.asarray(n, dtype=np.float64)
        return self.K_max * n / (n + self.N0)

    @classmethod
    def bounds(cls, n: np.ndarray) -> dict[str, Bound]:
        """Bounds of the parameters, given the sizes that were measured.

        Args:
            n: [M] float, parameters of the measured models.

        Returns:
            Bounds by parameter name.
        """
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

    @classmethod
    def starts(cls, n: np.ndarray, k: np.ndarray) -> list[SaturatingSlope]:
        """Where a search may begin, given the slope of each size by itself.

        Args:
            n: [M] float, parameters.
            k: [M] float, slope of each size.

        Returns:
            For each of nine N0 over its bounds, the K_max that is best in least squares.
        """
        b = cls.bounds(n)
        out = []
        for n0 in np.geomspace(b["N0"].low, b["N0"].high, 11)[1:-1]:
            shape = n / (n + n0)
            k_max = float(np.clip(shape @ k / (shape @ shape), 1e-4, 0.99 * b["K_max"].high))
            out.append(cls(K_max=k_max, N0=float(n0)))
        return out

    @classmethod
    def fixed(cls, n: np.ndarray) -> dict[str, float]:
        """Constants of the law that are not fitted (none).

        Args:
            n: [M] float, parameters of the measured models.

        Returns:
            An empty dict.
        """
        return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerSlope:
    """k(N) = a (N / n_ref)^gamma: grows without limit.

    An alternative to the saturating form, with as many parameters. n_ref (the geometric mean of the measured sizes)
    only sets the unit in which a is told: the slope of a model of n_ref parameters.
    """

    a: float  # slope at n_ref
    gamma: float
    n_ref: float = 1.0

    NAME: ClassVar[str] = "power"
    FORMULA: ClassVar[str] = "k(N) = a (N / n_ref)^gamma"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("a", "gamma")
    LOG: ClassVar[tuple[str, ...]] = ()

    def k(self, n: np.ndarray | float) -> np.ndarray:
        """Slope for each number of parameters.

        Args:
            n: [M] float, parameters, positive.

        Returns:
            [M] float64.
        """
        return self.a * (np.asarray(n, dtype=np.float64) / self.n_ref) ** self.gamma

    @classmethod
    def bounds(cls, n: np.ndarray) -> dict[str, Bound]:
        """Bounds of the parameters; see `SaturatingSlope.bounds`.

        Args:
            n: [M] float, parameters of the measured models.

        Returns:
            Bounds by parameter name.
        """
        return {
            "a": Bound(low=0.0, high=2.0, why="below 0 the loss rises; at 2 it falls fourfold whenever X doubles"),
            "gamma": Bound(low=-2.0, high=4.0, why="outside, one size has all of the slope and the others none"),
        }

    @classmethod
    def starts(cls, n: np.ndarray, k: np.ndarray) -> list[PowerSlope]:
        """Where a search may begin; see `SaturatingSlope.starts`.

        Args:
            n: [M] float, parameters.
            k: [M] float, slope of each size.

        Returns:
            For each of seven exponents, the best a.
        """
        ref = cls.fixed(n)["n_ref"]
        out = []
        for gamma in (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0):
            shape = (n / ref) ** gamma
            out.append(cls(a=float(np.clip(shape @ k / (shape @ shape), 1e-4, 1.9)), gamma=gamma, n_ref=ref))
        return out

    @classmethod
    def fixed(cls, n: np.ndarray) -> dict[str, float]:
        """Constants of the law that are not fitted.

        Args:
            n: [M] float, parameters of the measured models.

        Returns:
            {"n_ref": geometric mean of n}.
        """
        return {"n_ref": float(np.exp(np.mean(np.log(n))))}


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSlope:
    """k(N) = a + b log(N / n_ref): grows slowly without limit, and is negative for small enough N.

    An alternative to the saturating form, with as many parameters; n_ref as in `PowerSlope`.
    """

    a: float  # slope at n_ref
    b: float  # growth of the slope for e times as many parameters
    n_ref: float = 1.0

    NAME: ClassVar[str] = "log"
    FORMULA: ClassVar[str] = "k(N) = a + b log(N / n_ref)"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("a", "b")
    LOG: ClassVar[tuple[str, ...]] = ()

    def k(self, n: np.ndarray | float) -> np.ndarray:
        """Slope for each number of parameters.

        Args:
            n: [M] float, parameters, positive.

        Returns:
            [M] float64.
        """
        return self.a + self.b * np.log(np.asarray(n, dtype=np.float64) / self.n_ref)

    @classmethod
    def bounds(cls, n: np.ndarray) -> dict[str, Bound]:
        """Bounds of the parameters; see `SaturatingSlope.bounds`.

        Args:
            n: [M] float, parameters of the measured models.

        Returns:
            Bounds by parameter name.
        """
        return {
            "a": Bound(low=-2.0, high=2.0, why="at 2 the loss falls fourfold whenever X doubles: no RL run did"),
            "b": Bound(low=-1.0, high=1.0, why="at 1 one doubling of N adds .7 to the slope: no RL run did"),
        }

    @classmethod
    def starts(cls, n: np.ndarray, k: np.ndarray) -> list[LogSlope]:
        """Where a search may begin; see `SaturatingSlope.starts`.

        Args:
            n: [M] float, parameters.
            k: [M] float, slope of each size.

        Returns:
            The straight line through the slopes.
        """
        ref = cls.fixed(n)["n_ref"]
        u = np.log(n / ref)  # its mean is 0
        spread = float(u @ u)
        b = float(u @ k) / spread if spread > 0 else 0.0
        return [cls(a=float(np.clip(np.mean(k), -1.9, 1.9)), b=float(np.clip(b, -0.9, 0.9)), n_ref=ref)]

    @classmethod
    def fixed(cls, n: np.ndarray) -> dict[str, float]:
        """Constants of the law that are not fitted.

        Args:
            n: [M] float, parameters of the measured models.

        Returns:
            {"n_ref": geometric mean of n}.
        """
        return {"n_ref": float(np.exp(np.mean(np.log(n))))}


Slope = SaturatingSlope | PowerSlope | LogSlope
SLOPES: dict[str, type[Slope]] = {c.NAME: c for c in (SaturatingSlope, PowerSlope, LogSlope)}


@dataclass(frozen=True, kw_only=True, slots=True)
class JointLaw:
    """log L = -k(N) log X + E, one slope law for all curves and one free E for each.

    Tan et al. 2025, equations 6 and 8. A curve is one size of one kind of model (base or instruct). Tan et al. offer
    no law for E(N), so a size that was not measured has no E.
    """

    slope: Slope
    n: tuple[float, ...]  # parameters of each curve
    E: tuple[float, ...]  # log of the loss of each curve at X = 1

    def __post_init__(self) -> None:
        if len(self.n) != len(self.E):
            raise ValueError(f"JointLaw: n and E must have one entry a curve, got {len(self.n)} and {len(self.E)}")

    def loss(self, x: np.ndarray | Sequence[float] | float, curve: np.ndarray | int) -> np.ndarray:
        """Predicted loss.

        Args:
            x: [...] float, compute or data, positive.
            curve: [...] int, which curve each x belongs to (or one curve for all).

        Returns:
            [...] float64; it may exceed 1 for small x, because the law has no ceiling.
        """
        k = self.slope.k(np.asarray(self.n))[curve]
        return np.exp(np.asarray(self.E)[curve] - k * np.log(np.asarray(x, dtype=np.float64)))


# --------------------------------------------------------------------------------------- curve laws


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLinear:
    """log L = -k log X + E, the law of one size. It has no floor: L goes to 0, and exceeds 1 for small X.

    Tan et al. 2025, equation 1.
    """

    k: float
    E: float  # log of the loss at X = 1

    NAME: ClassVar[str] = "loglinear"
    FORMULA: ClassVar[str] = "log L = -k log X + E"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("k", "E")

    def loss(self, x: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """Predicted loss.

        Args:
            x: [...] float, positive.

        Returns:
            [...] float64.
        """
        return np.exp(self.E - self.k * np.log(np.asarray(x, dtype=np.float64)))

    @classmethod
    def bounds(cls, x: np.ndarray) -> dict[str, Bound]:
        """Bounds of the parameters (a slope that is not positive is shown, not hidden).

        Args:
            x: [n] float, where the curve was measured.

        Returns:
            Bounds by parameter name.
        """
        return {"k": Bound(low=-2.0, high=2.0, why="at 2 the loss falls fourfold whenever X doubles: no RL run did")}


class _Gain:
    """What curves from R0 up to a ceiling A share: L = 1 - R0 - (A - R0) * gained."""

    __slots__ = ()

    def loss(self, x: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """Predicted loss.

        Args:
            x: [...] float, positive.

        Returns:
            [...] float64.
        """
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

    def gained(self, x: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """Share of the gain A - R0 that is reached.

        Args:
            x: [...] float, positive.

        Returns:
            [...] float64 in (0, 1).
        """
        return 1.0 / (1.0 + (self.X_mid / np.asarray(x, dtype=np.float64)) ** self.B)

    @classmethod
    def bounds(cls, x: np.ndarray) -> dict[str, Bound]:
        """Bounds of the parameters, given where the curve was measured.

        Args:
            x: [n] float, positive.

        Returns:
            Bounds by parameter name.
        """
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

    The saturating phase of Nimmaturi et al. 2025, arXiv:2507.18014.
    """

    A: float  # pass rate for infinite X
    X_scale: float  # where 63 % of the gain is reached, in the unit of X
    R0: float  # pass rate at X = 0

    NAME: ClassVar[str] = "exponential"
    FORMULA: ClassVar[str] = "R = A - (A - R0) exp(-X / X_scale)"
    PARAMETERS: ClassVar[tuple[str, ...]] = ("A", "X_scale", "R0")

    def gained(self, x: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """Share of the gain A - R0 that is reached.

        Args:
            x: [...] float, positive.

        Returns:
            [...] float64 in (0, 1).
        """
        return -np.expm1(-np.asarray(x, dtype=np.float64) / self.X_scale)

    @classmethod
    def bounds(cls, x: np.ndarray) -> dict[str, Bound]:
        """Bounds of the parameters, given where the curve was measured.

        Args:
            x: [n] float, positive.

        Returns:
            Bounds by parameter name.
        """
        low, high = float(np.min(x)), float(np.max(x))
        return {
            "A": Bound(low=0.0, high=1.0, why="a pass rate"),
            "X_scale": Bound(low=low / 10, high=high * 10, why="farther out the measured curve is a straight line"),
            "R0": Bound(low=0.0, high=1.0, why="a pass rate"),
        }


CurveLaw = LogLinear | ScaleRLSigmoid | ExponentialSaturation

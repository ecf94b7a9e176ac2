"""How the points of a curve scatter about its law: not independently, and that is most of what widens an interval.

The scatter has a part that is new at every evaluation (answers are drawn) and a part that lasts (the run has drifted,
or the law does not bend where the curve does): its covariance is sigma^2 ((1 - s) [i = j] + s phi^|i - j|) over the
evaluations i, j of a curve. A curve of twenty points does not tell s and phi, and the lag-1 autocorrelation of its
residuals is too small twice over: a fit takes the slow part away, and the new part hides the rest. So nothing is
estimated: each (s, phi) of a grid counts by its restricted likelihood (Patterson and Thompson 1971), which allows for
the fitted parameters, and all curves of a study vote together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)  # s
CHAINS = (0.3, 0.5, 0.7, 0.85, 0.95)  # phi
MODELS = ((0.0, 0.0), *((s, phi) for s in SHARES for phi in CHAINS))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Noise:
    """The noise of several curves. G models, M curves."""

    weights: np.ndarray  # [G], of each model; they sum to 1
    sigma: np.ndarray  # [G, M], standard deviation of a point of each curve under each model
    freedom: np.ndarray  # [M], points less parameters

    def draw(self, lengths: Sequence[int], draws: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Deviations of new data sets; how badly sigma is known is in them.

        Args:
            lengths: points of each curve.
            draws: how many data sets.
            rng: of the draws.

        Returns:
            For each curve [draws, n].
        """
        model = rng.choice(len(self.weights), size=draws, p=self.weights)
        out = []
        for m, n in enumerate(lengths):
            spread = self.sigma[model, m] * np.sqrt(self.freedom[m] / rng.chisquare(self.freedom[m], draws))
            white, part = rng.standard_normal((draws, n)), np.empty((draws, n))
            for g in np.unique(model):
                part[model == g] = white[model == g] @ _root(g, n).T
            out.append(spread[:, None] * part)
        return out


@lru_cache(maxsize=512)
def covariance(model: int, n: int) -> np.ndarray:
    """[n, n] covariance of model number `model`, sigma being 1."""
    share, chain = MODELS[model]
    apart = np.abs(np.arange(n)[:, None] - np.arange(n))
    return (1 - share) * np.eye(n) + share * (chain**apart if share else 0.0)


@lru_cache(maxsize=512)
def _root(model: int, n: int) -> np.ndarray:
    return np.linalg.cholesky(covariance(model, n) + 1e-12 * np.eye(n))


@lru_cache(maxsize=512)
def _whitener(model: int, n: int) -> tuple[np.ndarray, float]:
    root = _root(model, n)
    return np.linalg.inv(root), float(2 * np.sum(np.log(np.diag(root))))


def noise_of(residuals: Sequence[np.ndarray], designs: Sequence[np.ndarray], deviations: Sequence[np.ndarray] = ()) -> Noise:
    """The noise behind the residuals of fitted curves.

    Args:
        residuals: [n] of each curve.
        designs: [n, q] of each curve, the derivative of what was fitted by its parameters.
        deviations: of runs from their mean, each [runs, n]: they tell how the noise lasts without any law.

    Returns:
        The noise.
    """
    G, M = len(MODELS), len(residuals)
    likelihood, sigma, freedom = np.zeros(G), np.zeros((G, M)), np.zeros(M)
    for m, (r, x) in enumerate(zip(residuals, designs, strict=True)):
        x = _independent(x)
        freedom[m] = max(len(r) - x.shape[1], 1)
        for g in range(G):
            white, log_det = _whitener(g, len(r))
            q, upper = np.linalg.qr(white @ x)
            w = white @ r
            w = w - q @ (q.T @ w)
            rss = max(float(w @ w), 1e-300)
            log_x = 2 * float(np.sum(np.log(np.maximum(np.abs(np.diag(upper)), 1e-300))))
            sigma[g, m] = np.sqrt(rss / freedom[m])
            likelihood[g] -= 0.5 * (log_det + log_x + freedom[m] * np.log(rss))
    for d in deviations:
        copies = len(d) - 1
        for g in range(G):
            white, log_det = _whitener(g, d.shape[1])
            rss = max(float(np.sum((d @ white.T) ** 2)), 1e-300)
            likelihood[g] -= 0.5 * copies * (log_det + d.shape[1] * np.log(rss))
    weights = np.exp(likelihood - likelihood.max())
    return Noise(weights=weights / weights.sum(), sigma=sigma, freedom=freedom)


def inflation(residual: np.ndarray, design: np.ndarray, noise: Noise, ends: np.ndarray) -> tuple[np.ndarray, float]:
    """What the noise does to the standard errors of least squares.

    Args:
        residual: [n], weighted, of all curves end to end.
        design: [n, q], weighted likewise.
        noise: of the curves, from the same weighted values.
        ends: where each curve but the last ends.

    Returns:
        [q], true over naive standard error of each parameter, naive being that of independent points; 1 for one that
        moves nothing. And the degrees of freedom of the sum of squares (Satterthwaite).
    """
    n, q = design.shape
    scale = np.linalg.norm(design, axis=0)
    moves = scale > 1e-12 * max(float(scale.max(initial=0.0)), 1e-300)
    x = design[:, moves] / scale[moves]
    pinv = np.linalg.pinv(x, rcond=1e-9)
    lengths = np.diff([0, *ends, n])
    middle = np.zeros((int(moves.sum()), int(moves.sum())))
    trace = square = 0.0
    blocks = []
    for m, length in enumerate(lengths):
        at = slice(int(np.sum(lengths[:m])), int(np.sum(lengths[: m + 1])))
        v = sum(
            w * s**2 * covariance(g, int(length))
            for g, (w, s) in enumerate(zip(noise.weights, noise.sigma[:, m], strict=True)) if w > 1e-6
        )  # fmt: skip
        middle += pinv[:, at] @ v @ pinv[:, at].T
        blocks.append((at, v))
    # tr(MV) and tr(MVMV) of the residual maker M = 1 - X X^+, block by block
    for at, v in blocks:
        hat = x[at] @ pinv[:, at]
        trace += float(np.trace(v) - np.sum(hat * v.T))
        own = v - hat @ v
        square += float(np.sum(own * own.T))
    naive = float(residual @ residual) / max(n - x.shape[1], 1) * np.diag(pinv @ pinv.T)
    out = np.ones(q)
    out[moves] = np.sqrt(np.maximum(np.diag(middle), 1e-300) / np.maximum(naive, 1e-300))
    return out, float(np.clip(trace**2 / max(square, 1e-300), 1.0, max(n - x.shape[1], 1)))


def _independent(x: np.ndarray) -> np.ndarray:
    """Columns that span what x [n, q] spans."""
    scale = np.linalg.norm(x, axis=0)
    x = x[:, scale > 0] / scale[scale > 0]
    if not x.shape[1]:
        return np.ones((len(x), 1))
    left, values, _ = np.linalg.svd(x, full_matrices=False)
    return left[:, values > 1e-8 * values[0]]

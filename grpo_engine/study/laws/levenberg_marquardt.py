"""Many least-squares problems at once by Levenberg and Marquardt's method."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Residual = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def levenberg_marquardt(
    residual: Residual, y: np.ndarray, weight: np.ndarray, theta: np.ndarray, low: np.ndarray, high: np.ndarray,
    steps: int = 80,
) -> np.ndarray:  # fmt: skip
    low, high = np.broadcast_to(low, theta.shape), np.broadcast_to(high, theta.shape)
    theta = np.clip(theta, low, high)  # a copy, which is written to below
    live = np.arange(len(theta))  # rows that still move

    def at(t: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        root = np.sqrt(weight[rows])
        with np.errstate(over="ignore", invalid="ignore"):  # a step too far is refused by its infinite cost
            r, d = residual(t, y[rows], weight[rows])
            r, d = root * r, root[:, None, :] * d
            cost = np.einsum("bn,bn->b", r, r)
            gradient, normal = np.einsum("bqn,bn->bq", d, r), d @ d.transpose(0, 2, 1)
        return np.where(np.isfinite(cost), cost, np.inf), gradient, normal

    cost, gradient, normal = at(theta, live)
    damping = np.full(len(theta), 1e-3)
    for _ in range(steps):
        t, lo, hi = theta[live], low[live], high[live]
        # a parameter that sits at a bound and is pushed outwards stays there, and the others move without it
        stuck = ((t <= lo) & (gradient > 0)) | ((t >= hi) & (gradient < 0))
        diagonal = np.einsum("bqq->bq", normal)
        scale = np.where(diagonal > 0, diagonal, 1.0)
        matrix = np.where(~stuck[:, :, None] & ~stuck[:, None, :], normal, 0.0)
        matrix = matrix + np.eye(t.shape[1]) * (damping[:, None] * scale + stuck * scale)[:, None, :]
        step = np.linalg.solve(matrix, np.where(stuck, 0.0, -gradient)[:, :, None])[:, :, 0]
        there = np.clip(t + step, lo, hi)
        new_cost, new_gradient, new_normal = at(there, live)
        better = new_cost <= cost
        moved = np.max(np.abs(there - t) / (1e-3 + np.abs(t)), axis=1)
        converged = better & (cost - new_cost <= 1e-11 * cost) & (damping < 1.0)
        theta[live] = np.where(better[:, None], there, t)
        cost = np.where(better, new_cost, cost)
        gradient = np.where(better[:, None], new_gradient, gradient)
        normal = np.where(better[:, None, None], new_normal, normal)
        damping = np.clip(np.where(better, damping / 5, damping * 8), 1e-12, 1e12)
        going = (moved >= 1e-9) & (damping < 1e12) & ~converged
        if not going.any():
            break
        live, cost, gradient, normal, damping = (v[going] for v in (live, cost, gradient, normal, damping))
    return theta

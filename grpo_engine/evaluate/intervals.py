"""Percentile intervals of draws: of scores, laws and claims alike."""

from __future__ import annotations

from typing import Any

import numpy as np

CONFIDENCE = 0.95  # of every interval, where no other is given


def interval(draws: np.ndarray, confidence: float = CONFIDENCE) -> tuple[Any, Any]:
    """Percentile interval over the first axis.

    Args:
        draws: [draws, ...] float.
        confidence: share of the draws inside.

    Returns:
        (low, high), each [...].
    """
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high

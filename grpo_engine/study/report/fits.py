"""What the report shows of fits.json: laws as they are, and what `recommend` reads from them. Nothing is fitted here."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_engine.study.data import StudyData
from grpo_engine.study.fits import axes_of
from grpo_engine.study.laws.results import Fits
from grpo_engine.study.recommend import FrontierPoint, Recommendation, frontier, recommend
from grpo_engine.study.report.drawing import tick_text

AXIS_NAMES = {"compute": "6NT", "ledger": "ledger", "data": "prompts"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Laws:
    """fits.json, and what is recommended from it."""

    fits: Fits
    picks: list[tuple[str, str, Recommendation]]  # (kind, budget in words, what it says), budgets rising
    frontiers: dict[str, tuple[FrontierPoint, ...]]  # kind -> N*(C)


def study_laws(data: StudyData, fits: Fits) -> Laws:
    """The laws of a study with what they recommend for the budgets that its runs had."""
    frontiers = {
        f.kind: frontier(f, count=25) for f in fits.fits if f.axis == "compute" and f.kind in data.kinds and f.joint
    }
    return Laws(fits=fits, picks=budget_picks(data, fits), frontiers=frontiers)


def budget_picks(data: StudyData, fits: Fits) -> list[tuple[str, str, Recommendation]]:
    """(kind, budget in words, recommendation) for the budgets that the runs ended with, rising."""
    out = []
    for kind in data.kinds:
        for axis in axes_of(fits):
            fit, unit = fits.get(axis, kind), {"compute": "FLOPs", "data": "prompts"}[axis]
            if fit.joint is None:
                continue
            for amount in sorted({round_to(s.x_max, 2) for s in fit.sizes}):
                pick = recommend(fit, compute=amount) if axis == "compute" else recommend(fit, prompts=amount)
                out.append((kind, f"{tick_text(amount)} {unit}", pick))
    return out


def round_to(value: float, digits: int) -> float:
    """A number with so many significant digits.

    Args:
        value: any finite number.
        digits: at least 1.

    Returns:
        The nearest such number.
    """
    return float(f"{value:.{digits - 1}e}")

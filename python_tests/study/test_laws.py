"""The laws against their formulas, written out."""

import math

import numpy as np
import pytest

from grpo_engine.study import laws


def test_saturating_slope_is_half_at_n0_and_linear_far_below_it():
    law = laws.SaturatingSlope(K_max=0.14, N0=13e9)
    assert law.k(13e9) == pytest.approx(0.07, rel=1e-15)
    assert law.k(np.array([13e5, 26e5])) == pytest.approx([0.14e-4, 0.28e-4], rel=3e-4)
    assert law.k(1e18) == pytest.approx(0.14, rel=1e-7)


def test_published_slopes_of_base_models():
    """K_max N / (N + N0) of the authors' fit of base models on data, as tabulated to five digits."""
    law = laws.SaturatingSlope(K_max=0.13995590993298102, N0=13002965268.771812)
    want = [0.00518, 0.01448, 0.02624, 0.04898, 0.07256, 0.09952, 0.11854]
    assert law.k(1e9 * np.array([0.5, 1.5, 3, 7, 14, 32, 72])) == pytest.approx(want, abs=1e-5)


def test_unbounded_slopes():
    assert laws.PowerSlope(a=0.05, gamma=0.5, n_ref=1e6).k(4e6) == pytest.approx(0.1)
    assert laws.LogSlope(a=0.05, b=0.02, n_ref=1e6).k(math.e**2 * 1e6) == pytest.approx(0.09)
    assert laws.LogSlope(a=0.05, b=0.02, n_ref=1e6).k(1.0) < 0


@pytest.mark.parametrize("form", laws.SLOPES.values(), ids=lambda c: c.NAME)
def test_starts_lie_inside_the_bounds_and_come_near_slopes_of_the_form(form):
    n = np.array([2e5, 6e5, 2e6, 6e6, 2e7])
    fixed, bounds = form.fixed(n), form.bounds(n)
    assert set(bounds) == set(form.PARAMETERS)
    assert all(b.why for b in bounds.values())
    truth = {"saturating": (0.15, 1e6), "power": (0.05, 0.5), "log": (0.05, 0.02)}[form.NAME]
    k = form(**dict(zip(form.PARAMETERS, truth, strict=True)), **fixed).k(n)
    starts = form.starts(n, k)
    for s in starts:
        assert all(bounds[q].low < getattr(s, q) < bounds[q].high for q in form.PARAMETERS)
    best = min(float(np.max(np.abs(s.k(n) - k))) for s in starts)
    assert best < 0.3 * k.max()


def test_joint_law_is_the_formula_in_natural_logs():
    law = laws.JointLaw(slope=laws.SaturatingSlope(K_max=0.2, N0=1e6), n=(1e6, 3e6), E=(0.1, -0.2))
    x = np.array([64.0, 640.0])
    assert np.log(law.loss(x, 0)) == pytest.approx(-0.1 * np.log(x) + 0.1, rel=1e-12)
    want = [-0.15 * math.log(64) - 0.2, -0.1 * math.log(640) + 0.1]
    assert np.log(law.loss(x, np.array([1, 0]))) == pytest.approx(want)
    assert laws.e_log10(0.1) == pytest.approx(math.log10(math.exp(0.1)))
    # the same law with log10: y = 10^(-k log10 x + E10)
    assert law.loss(64.0, 0) == pytest.approx(10 ** (-0.1 * math.log10(64) + laws.e_log10(0.1)))


def test_joint_law_needs_a_level_for_each_curve():
    with pytest.raises(ValueError, match="n and E must have one entry a curve, got 2 and 1"):
        laws.JointLaw(slope=laws.SaturatingSlope(K_max=0.2, N0=1e6), n=(1e6, 3e6), E=(0.1,))


def test_curve_laws():
    assert np.log(laws.LogLinear(k=0.1, E=0.3).loss(np.array([50.0]))) == pytest.approx([0.3 - 0.1 * math.log(50)])
    sigmoid = laws.ScaleRLSigmoid(A=0.6, B=2.0, X_mid=1000.0, R0=0.2)
    assert sigmoid.loss(1000.0) == pytest.approx(1 - 0.4)  # half of the gain at X_mid
    assert sigmoid.loss(1e9) == pytest.approx(0.4, abs=1e-6)
    assert sigmoid.loss(1e-3) == pytest.approx(0.8, abs=1e-6)
    assert sigmoid.loss(2000.0) == pytest.approx(1 - 0.2 - 0.4 / (1 + 0.25))
    saturation = laws.ExponentialSaturation(A=0.6, X_scale=1000.0, R0=0.2)
    assert saturation.loss(1000.0) == pytest.approx(1 - (0.6 - 0.4 / math.e))
    assert saturation.loss(1e6) == pytest.approx(0.4)


def test_scalerl_in_the_form_of_its_paper():
    """R_C - R_0 = (A - R_0) / (1 + (C_mid / C)^B), with the published fit of the 8B model."""
    law = laws.ScaleRLSigmoid(A=0.61, B=1.92, X_mid=2542.0, R0=0.3)
    c = np.array([1500.0, 8000.0, 50000.0])
    assert 1 - law.loss(c) - 0.3 == pytest.approx((0.61 - 0.3) / (1 + (2542 / c) ** 1.92), rel=1e-12)

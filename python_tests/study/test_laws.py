"""The laws against their formulas, written out."""

import math

import numpy as np
import pytest

from grpo_engine.study.laws import forms as laws


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


def test_intercepts():
    assert laws.LineIntercept(a=-0.5, b=-0.1, n_ref=1e6).intercept(math.e * 1e6) == pytest.approx(-0.6)
    half = laws.LogisticIntercept(N_half=1e6, g=0.5)
    assert np.exp(half.intercept(np.array([1e6, 4e6, 1e-9]))) == pytest.approx([0.5, 1 / 3, 1.0], rel=1e-6)
    assert laws.SaturatingIntercept(a=-0.1, b=1.0, N1=1e6).intercept(1e6) == pytest.approx(-0.6)


def test_joint_law_is_the_formula_in_natural_logs():
    law = laws.JointLaw(slope=laws.SaturatingSlope(K_max=0.2, N0=1e6), n=(1e6, 3e6), E=(0.1, -0.2))
    x = np.array([64.0, 640.0])
    assert np.log(law.loss(x, 0)) == pytest.approx(-0.1 * np.log(x) + 0.1, rel=1e-12)
    want = [-0.15 * math.log(64) - 0.2, -0.1 * math.log(640) + 0.1]
    assert np.log(law.loss(x, np.array([1, 0]))) == pytest.approx(want)
    assert laws.e_log10(0.1) == pytest.approx(math.log10(math.exp(0.1)))
    # the same law with log10: y = 10^(-k log10 x + E10)
    assert law.loss(64.0, 0) == pytest.approx(10 ** (-0.1 * math.log10(64) + laws.e_log10(0.1)))


def test_joint_law_needs_an_intercept_for_each_curve():
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


def test_floor_power():
    law = laws.FloorPower(A=0.5, alpha=0.5, L_inf=0.2, x_ref=64.0)
    assert law.loss(np.array([64.0, 256.0, 1e30])) == pytest.approx([0.7, 0.45, 0.2])


def test_additive_law():
    law = laws.AdditiveLaw(A=0.3, a=0.5, B=0.2, b=1.0, L_inf=0.1, n_ref=1e6, d_ref=100.0)
    assert law.loss(4e6, 200.0) == pytest.approx(0.15 + 0.1 + 0.1)


DECOMPOSITION = laws.LossDecomposition(L_inf=0.05, A=0.3, alpha=0.4, beta=1.5, lam=(0.1, 0.3), D0=(500.0, 4000.0), n_ref=1e9)


def test_loss_decomposition_is_the_formula():
    n, d = np.array([1e9, 8e9]), np.array([500.0, 1000.0])
    want = [0.05 + 0.3 + 0.1 / 2, 0.05 + 0.3 * 8**-0.4 + 0.3 / (1 + 0.25**1.5)]
    assert DECOMPOSITION.loss(n, d, np.array([0, 1])) == pytest.approx(want, rel=1e-14)
    # (N0 / N)^alpha of the paper, with the N0 that our A stands for
    n0 = 1e9 * 0.3 ** (1 / 0.4)
    assert DECOMPOSITION.floor(n) == pytest.approx(0.05 + (n0 / n) ** 0.4, rel=1e-14)


@pytest.mark.parametrize("curve", [0, 1])
def test_erratum_of_the_maximal_slope(curve):
    """Against slopes taken numerically: equation 20 is the slope at D0, and not the largest one."""
    n, d0 = 8e9, DECOMPOSITION.D0[curve]
    log_d = np.linspace(np.log(d0) - 12, np.log(d0) + 12, 480_001)
    slope = -np.gradient(np.log(DECOMPOSITION.loss(n, np.exp(log_d), curve)), log_d)
    at_d0 = float(DECOMPOSITION.slope_at_d0(n, curve))
    largest = float(DECOMPOSITION.max_slope(n, curve))
    assert at_d0 == pytest.approx(slope[np.argmin(abs(log_d - np.log(d0)))], rel=1e-6)
    assert largest == pytest.approx(slope.max(), rel=1e-6)
    assert largest > 1.01 * at_d0
    ratio = DECOMPOSITION.lam[curve] / float(DECOMPOSITION.floor(n))
    assert math.exp(DECOMPOSITION.beta * (log_d[slope.argmax()] - np.log(d0))) == pytest.approx(
        math.sqrt(1 + ratio), rel=1e-2
    )


def test_the_slope_is_bounded_by_beta_not_by_half_of_it():
    law = laws.LossDecomposition(L_inf=0.0, A=1e-12, alpha=0.4, beta=1.5, lam=(0.9,), D0=(500.0,))
    assert law.max_slope(1.0, 0) == pytest.approx(1.5, rel=1e-4)
    assert law.slope_at_d0(1.0, 0) == pytest.approx(0.75, rel=1e-4)


def test_effective_data():
    """Fresh prompts count in full, the first repeat by 1 - exp(-1 / R*), all repeats together by R*."""
    assert laws.effective_data(300.0, 300.0, 5.0) == 300.0
    assert laws.effective_data(200.0, 100.0, 5.0) == pytest.approx(100 + 500 * (1 - math.exp(-0.2)))
    assert laws.effective_data(1e9, 100.0, 5.0) == pytest.approx(600.0)
    assert laws.effective_data(1000.0, 100.0, 1e9) == pytest.approx(1000.0, rel=1e-7)
    assert laws.effective_data(50.0, 100.0, 5.0) == 50.0  # the first pass is not over
    once, often = laws.ReuseLaw(k=0.1, E=0.2, worth=4.0).loss(np.array([800.0, 800.0]), np.array([800.0, 100.0]))
    assert once == pytest.approx(math.exp(0.2) * 800**-0.1)
    assert often == pytest.approx(math.exp(0.2) * (100 + 400 * (1 - math.exp(-7 / 4))) ** -0.1)


@pytest.mark.parametrize("form", [*laws.SLOPES.values(), *laws.INTERCEPTS.values(), *laws.CURVES.values(), laws.AdditiveLaw,
                                  laws.LossDecomposition, laws.ReuseLaw], ids=lambda c: c.__name__)  # fmt: skip
def test_a_law_says_what_fits_need(form):
    n, d, which = np.array([1e6, 4e6, 9e6]), np.array([64.0, 640.0, 6400.0]), np.array([0, 0, 1])
    coordinates = {
        laws.AdditiveLaw: (n, d), laws.LossDecomposition: (n, d, which), laws.ReuseLaw: (d, np.minimum(d, 100.0)),
    }.get(form, (d,) if form in laws.CURVES.values() else (n,))  # fmt: skip
    bounds = form.bounds(*coordinates)
    assert set(bounds) == set(form.PARAMETERS)
    assert all(b.low < b.high and b.why for b in bounds.values())
    assert all(bounds[q].low > 0 for q in form.LOG)
    assert {*form.LOG, *form.LINEAR, *form.PER_CURVE} <= set(form.PARAMETERS)
    assert callable(getattr(form, form.GIVES))

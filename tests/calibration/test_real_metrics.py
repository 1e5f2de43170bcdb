"""Metrics of predicted targets against closed forms, counts by hand and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions import StudentT
from scipy.special import hyp1f1, ndtr, ndtri

from uq.calibration import (
    augrc,
    aurc,
    crps,
    energy_score,
    expected_normalized_calibration_error,
    interval_coverage,
    interval_score,
    mae,
    mean_interval_width,
    negative_log_likelihood,
    pinball_loss,
    pit_test,
    pit_values,
    quantile_calibration_error,
    report,
    risk_coverage_curve,
    rmse,
    sharpness,
    uncertainty_calibration_error,
)
from uq.distributions import Empirical, NormalMixture, Parametric
from uq.errors import DataError

seeds = st.integers(0, 2**20)


def normal(mean, scale):
    mean = torch.as_tensor(np.asarray(mean, float))
    return NormalMixture(mean[None], torch.as_tensor(scale, dtype=torch.float64))


def random_mixture(seed, n=40, n_draws=4):
    rng = np.random.default_rng(seed)
    loc = torch.as_tensor(rng.standard_normal((n_draws, n)))
    scale = torch.as_tensor(np.exp(0.5 * rng.standard_normal((n_draws, n))))
    return NormalMixture(loc, scale), 2 * rng.standard_normal(n)


# -- scores ------------------------------------------------------------------------------------


def test_normal_scores_match_their_closed_forms():
    assert crps([0.0], normal([0.0], 1.0)) == pytest.approx(0.23369497725, abs=1e-10)
    y, mu, s = np.array([0.3, -1.2]), np.array([0.1, 0.4]), np.array([0.5, 2.0])
    z = (y - mu) / s
    pdf = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    expected = (s * (z * (2 * ndtr(z) - 1) + 2 * pdf - 1 / np.sqrt(np.pi))).mean()
    assert crps(y, normal(mu, s)) == pytest.approx(expected, abs=1e-12)
    nll = (np.log(s) + z**2 / 2 + np.log(2 * np.pi) / 2).mean()
    assert negative_log_likelihood(y, normal(mu, s)) == pytest.approx(nll, abs=1e-12)
    assert rmse(y, normal(mu, s)) == pytest.approx(np.sqrt(((y - mu) ** 2).mean()), abs=1e-14)
    assert sharpness(y, normal(mu, s)) == pytest.approx(np.sqrt((s**2).mean()), abs=1e-14)
    width = 2 * ndtri(0.9) * s.mean()
    assert mean_interval_width(y, normal(mu, s), coverage=0.8) == pytest.approx(width, abs=1e-12)


def test_several_outputs_are_scored_jointly_and_the_rest_is_averaged():
    torch.manual_seed(0)
    loc, y = torch.randn(5, 6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    d = NormalMixture(loc, torch.tensor(0.5, dtype=torch.float64))
    joint = -d.joint().log_prob(y).mean().item()
    assert negative_log_likelihood(y, d) == pytest.approx(joint, abs=1e-12)
    assert abs(joint + d.log_prob(y).sum(-1).mean().item()) > 0.1  # the sum of marginals differs
    assert negative_log_likelihood(y, d.joint()) == pytest.approx(joint, abs=1e-12)
    for metric in (
        crps, rmse, mae, interval_score, interval_coverage, mean_interval_width, sharpness,
        quantile_calibration_error, uncertainty_calibration_error,
    ):  # fmt: skip
        per_output = [metric(y[:, j], NormalMixture(loc[..., j], d.scale[..., j])) for j in (0, 1)]
        if metric in (rmse, sharpness):
            assert metric(y, d) ** 2 == pytest.approx(np.square(per_output).mean(), abs=1e-12)
        else:
            assert metric(y, d) == pytest.approx(np.mean(per_output), abs=1e-12)
    assert pit_values(y, d).shape == (6, 2)


def test_losses_are_accumulated_in_float64():
    # One part in 1e8 of a target is below float32: the float32 copy of y must not decide.
    d = NormalMixture(torch.zeros(1, 1, dtype=torch.float32), torch.tensor(1.0))
    assert rmse([1 + 1e-9], d) == 1 + 1e-9


@pytest.mark.statistical
@pytest.mark.parametrize("n_draws", [2, 50])
@pytest.mark.parametrize("y", [(0.0, 0.0), (1.0, -2.0)])
def test_energy_score_of_a_gaussian_in_the_plane(y, n_draws):
    # E|Y − y| is the mean of a Rice distribution, E|Y − Y′| = √2 √(π/2); scaled by 3.
    rice = np.sqrt(np.pi / 2) * hyp1f1(-0.5, 1, -np.square(y).sum() / 2)
    expected = 3 * (rice - np.sqrt(np.pi) / 2)
    n = 8000
    targets = 3 * np.tile(y, (n, 1))
    value = energy_score(targets, normal(np.zeros((n, 2)), 3.0), n_draws=n_draws)
    # Deviations of |Y − y| and ½|Y − Y′| are below 1 and ½: a row's score has one below 1.5 · 3 at
    # two draws, and 1/√(S/2) of that at S.
    assert value == pytest.approx(expected, abs=5 * 4.5 / np.sqrt(n * n_draws / 2))


@pytest.mark.statistical
def test_energy_score_of_one_output_is_the_crps():
    y = np.full(8000, 0.7)
    d = normal(np.zeros_like(y), 1.0)
    assert energy_score(y, d, n_draws=50) == pytest.approx(crps(y, d), abs=5 * 1.5 / np.sqrt(2e5))


def test_energy_score_sees_dependence_that_marginals_hide():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 1))
    tied = Empirical(rng.standard_normal((200, 1000, 1)).repeat(2, 2))
    apart = Empirical(rng.standard_normal((200, 1000, 2)))
    y = np.hstack([x, x])
    assert energy_score(y, tied, n_draws=100) < energy_score(y, apart, n_draws=100) - 0.02


@pytest.mark.parametrize("level", [0.05, 0.5, 0.9])
@given(seed=seeds)
def test_pinball_loss_is_scikit_learns(level, seed):
    from sklearn.metrics import mean_pinball_loss

    d, y = random_mixture(seed)
    weight = np.random.default_rng(seed).uniform(0, 2, len(y))
    expected = mean_pinball_loss(y, d.quantile(level).numpy(), alpha=level, sample_weight=weight)
    found = pinball_loss(y, d, level=level, sample_weight=weight)
    assert found == pytest.approx(expected, rel=1e-12)


def test_pinball_loss_by_hand_and_as_half_the_crps():
    d = normal([0.0, 0.0], 1.0)
    q = ndtri(0.9)
    value = pinball_loss([q + 1, q - 1], d, level=0.9)
    assert value == pytest.approx((0.9 + 0.1) / 2, abs=1e-12)
    levels = (np.arange(2000) + 0.5) / 2000
    mean = np.mean([pinball_loss([0.3, -1.0], d, level=float(q)) for q in levels])
    assert 2 * mean == pytest.approx(crps([0.3, -1.0], d), abs=1e-4)


def test_interval_score_by_hand():
    edge = ndtri(0.9)  # of the 80 % interval: α = .2, 2/α = 10
    y = np.array([0.0, edge + 0.5, -edge - 0.25, edge])
    expected = 2 * edge + 10 * np.array([0, 0.5, 0.25, 0]).mean()
    value = interval_score(y, normal(np.zeros(4), 1.0), coverage=0.8)
    assert value == pytest.approx(expected, abs=1e-12)


def test_absolute_error_is_taken_from_the_median():
    # Draws 0, 0, 9: median 0, mean 3.
    d = Empirical(np.array([[0.0], [0.0], [9.0]]))
    assert mae([2.0], d) == 2.0
    assert rmse([2.0], d) == 1.0


# -- calibration -------------------------------------------------------------------------------


def test_coverage_counts_targets_in_the_closed_central_interval():
    edge = ndtri(0.95)
    y = np.array([-edge - 1e-6, -edge + 1e-6, 0.0, edge - 1e-6, edge + 1e-6])
    assert interval_coverage(y, normal(np.zeros(5), 1.0)) == 0.6
    assert interval_coverage(y, normal(np.zeros(5), 1.0), coverage=0.95) == 1.0
    # Closed: the 50 % interval of the level .25 holds the quantile itself.
    assert interval_coverage([0.0], normal([0.0], 1.0), coverage=1e-12) == 1.0


def test_quantile_calibration_error_of_doubled_scale_has_its_closed_form():
    # y at the quantiles of N(0, 1), predicted N(0, 2²): share below level q is Φ(2 Φ⁻¹(q)).
    y = ndtri((np.arange(100_000) + 0.5) / 100_000)
    q = np.arange(1, 100) / 100
    expected = np.abs(q - ndtr(2 * ndtri(q))).mean()
    error = quantile_calibration_error(y, normal(np.zeros_like(y), 2.0))
    assert error == pytest.approx(expected, abs=1e-5)
    assert quantile_calibration_error(y, normal(np.zeros_like(y), 1.0)) < 1e-5


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, 3.0])
def test_errors_of_a_constant_number_of_deviations(c):
    scale = np.repeat([0.1, 1.0, 5.0], 4)
    y = c * scale * np.tile([1, -1], 6)
    d = normal(np.zeros(12), scale)
    ence = expected_normalized_calibration_error(y, d, n_bins=3)
    assert ence == pytest.approx(abs(1 - c), abs=1e-12)
    uce = uncertainty_calibration_error(y, d, n_bins=3)
    assert uce == pytest.approx(np.square(scale).mean() * abs(1 - c**2), abs=1e-12)
    assert sharpness(y, d) == pytest.approx(np.sqrt(np.square(scale).mean()), abs=1e-12)


def test_variance_errors_by_hand():
    # Deviations 1, 1, 3, 3 and errors 2, 2, 1.5, 1.5.
    y, d = [2.0, -2.0, 1.5, -1.5], normal(np.zeros(4), [1.0, 1.0, 3.0, 3.0])
    ence, uce = expected_normalized_calibration_error, uncertainty_calibration_error
    assert ence(y, d, n_bins=2) == pytest.approx((1 + 0.5) / 2, abs=1e-12)
    assert uce(y, d, n_bins=2) == pytest.approx((3 + 6.75) / 2, abs=1e-12)
    one = abs(np.sqrt(5) - np.sqrt(3.125)) / np.sqrt(5)
    assert ence(y, d, n_bins=1) == pytest.approx(one, abs=1e-12)
    assert uce(y, d, n_bins=1) == pytest.approx(5 - 3.125, abs=1e-12)
    # Three quarters of the weight on the first two rows; bins of ENCE count alike.
    assert uce(y, d, n_bins=2, sample_weight=[3, 3, 1, 1]) == pytest.approx(
        0.75 * 3 + 0.25 * 6.75, abs=1e-12
    )


@pytest.mark.parametrize(("shift", "factor"), [(0.5, 1.0), (-1.0, 1.0), (0.0, 0.5), (0.3, 2.0)])
def test_quantile_calibration_error_has_a_closed_form(shift, factor):
    # y at the quantiles of N(0, 1), predicted N(shift, factor²).
    y = ndtri((np.arange(50_000) + 0.5) / 50_000)
    q = np.arange(1, 100) / 100
    expected = np.abs(q - ndtr(shift + factor * ndtri(q))).mean()
    error = quantile_calibration_error(y, normal(np.full_like(y, shift), factor))
    assert error == pytest.approx(expected, abs=2e-5)


def test_coverage_of_draws_is_that_of_their_closed_interval():
    # Ties: F(y) is far above the level of the upper quantile, and y is that quantile.
    assert interval_coverage(np.ones(3), Empirical(np.ones((4, 3)))) == 1.0
    rng = np.random.default_rng(0)
    for n_draws in (1, 7, 20):
        d = Empirical(rng.poisson(2.0, (n_draws, 500)).astype(float))
        y = rng.poisson(2.0, 500).astype(float)
        for coverage in (0.05, 0.5, 0.9):
            lower, upper = (end.numpy() for end in d.interval(coverage))
            inside = ((lower <= y) & (y <= upper)).mean()
            assert interval_coverage(y, d, coverage=coverage) == inside


@pytest.mark.parametrize("n_draws", [1, 7, 20, 100])
def test_quantile_error_of_draws_counts_targets_at_or_below_their_quantiles(n_draws):
    rng = np.random.default_rng(0)
    d = Empirical(rng.poisson(2.0, (n_draws, 500)).astype(float))
    y = rng.poisson(2.5, 500).astype(float)
    levels = np.arange(1, 100) / 100
    share = (y <= d.quantile(levels).numpy()).mean(1)
    assert quantile_calibration_error(y, d) == pytest.approx(
        np.abs(levels - share).mean(), abs=1e-12
    )


def test_a_variance_of_zero_has_no_relative_error():
    sure = Empirical(np.zeros((3, 4)))
    assert np.isnan(expected_normalized_calibration_error([0.0, 0.0, 0.0, 1e-3], sure))
    assert expected_normalized_calibration_error(np.zeros(4), sure) == 0.0
    assert uncertainty_calibration_error([0.0, 0.0, 0.0, 2.0], sure) == 1.0
    # One bin of variance 0 and right, one of deviation 1 and errors of 3.
    half = Empirical(np.array([[0.0, -1.0], [0.0, 1.0]]))
    assert expected_normalized_calibration_error([0.0, 3.0], half, n_bins=2) == pytest.approx(1.0)


# -- infinite variance -------------------------------------------------------------------------


def student(df, n=60):
    return Parametric(StudentT(torch.full((n,), df, dtype=torch.float64)))


def test_an_infinite_variance_leaves_the_other_metrics_defined():
    d = student(1.5)
    y = d.sample(generator=torch.Generator().manual_seed(0)).numpy()
    assert sharpness(y, d) == np.inf
    assert np.isnan(expected_normalized_calibration_error(y, d))
    assert np.isnan(uncertainty_calibration_error(y, d))
    assert np.isfinite([negative_log_likelihood(y, d), crps(y, d), interval_score(y, d)]).all()
    assert aurc(y, d) == pytest.approx(np.square(y).mean())  # all rows are tied
    assert pit_test(y, d).p_value > 1e-6


def test_an_infinite_variance_counts_only_where_its_row_does():
    df = torch.tensor([1.5, 5.0, 5.0, 9.0], dtype=torch.float64)
    y, weight = np.array([1.0, 0.5, -2.0, 1.0]), [0, 1, 2, 1]
    d = Parametric(StudentT(df))
    for metric in (
        sharpness,
        expected_normalized_calibration_error,
        uncertainty_calibration_error,
        aurc,
    ):
        known = metric(y[1:], d[1:], sample_weight=weight[1:])
        assert metric(y, d, sample_weight=weight) == pytest.approx(known, rel=1e-12)
    # The row of infinite variance is the least certain: last in the ranking.
    curve = risk_coverage_curve(y, d)
    assert curve.risk[-1] == pytest.approx(np.square(y).mean())
    assert curve.risk[0] == 1.0


# The skewness of infinite values, for the interval, is computed and thrown away.
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
def test_a_report_of_an_infinite_variance():
    d = student(1.5)
    found = report(d, d.sample(generator=torch.Generator().manual_seed(0)).numpy())
    assert "∞" in str(found)
    page = found.to_html()
    assert "a predictive variance is infinite, or 0 in a whole bin" in page


@pytest.mark.parametrize("metric", [sharpness, crps])
def test_an_undefined_mean_or_variance_is_refused(metric):
    with pytest.raises(DataError, match=r"prediction\.mean is NaN or infinite at row 0"):
        metric(np.zeros(60), student(1.0))


# -- properties --------------------------------------------------------------------------------

REAL = {
    "nll": negative_log_likelihood,
    "crps": crps,
    "rmse": rmse,
    "mae": mae,
    "pinball": lambda y, d, **w: pinball_loss(y, d, level=0.2, **w),
    "interval_score": interval_score,
    "coverage": interval_coverage,
    "width": mean_interval_width,
    "sharpness": sharpness,
    "quantile_error": quantile_calibration_error,
    "ence": lambda y, d, **w: expected_normalized_calibration_error(y, d, n_bins=4, **w),
    "uce": lambda y, d, **w: uncertainty_calibration_error(y, d, n_bins=4, **w),
    "aurc": aurc,
    "augrc": augrc,
}
COUNTS_ROWS = {"aurc", "augrc"}  # by definition
each_metric = pytest.mark.parametrize("name", REAL)


def tied_mixture(seed, n=40):
    """As random_mixture, with rows that are equal."""
    d, y = random_mixture(seed, n)
    rows = np.r_[np.arange(n - 10), np.zeros(10, int)]
    return d[rows], y[rows]


@each_metric
@settings(max_examples=10)
@given(seed=seeds)
def test_the_order_of_rows_does_not_matter(name, seed):
    d, y = tied_mixture(seed)
    order = np.random.default_rng(seed).permutation(len(y))
    assert REAL[name](y[order], d[order]) == pytest.approx(REAL[name](y, d), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", sorted(REAL.keys() - COUNTS_ROWS))
@settings(max_examples=10)
@given(seed=seeds)
def test_tiling_the_rows_changes_nothing(name, seed):
    d, y = tied_mixture(seed)
    rows = np.tile(np.arange(len(y)), 3)
    assert REAL[name](y[rows], d[rows]) == pytest.approx(REAL[name](y, d), rel=1e-9, abs=1e-12)


@each_metric
@settings(max_examples=10)
@given(seed=seeds)
def test_integer_weights_are_repetitions(name, seed):
    d, y = tied_mixture(seed)
    weight = np.random.default_rng(seed).integers(0, 4, size=len(y))
    again = np.repeat(np.arange(len(y)), weight)
    repeated = pytest.approx(REAL[name](y[again], d[again]), rel=1e-9, abs=1e-12)
    assert REAL[name](y, d, sample_weight=weight) == repeated
    if name not in COUNTS_ROWS:
        assert REAL[name](y, d, sample_weight=0.1 * weight) == repeated


POWERS = {
    "nll": None,
    "coverage": 0,
    "quantile_error": 0,
    "ence": 0,
    "uce": 2,
    "aurc": 2,
    "augrc": 2,
}


@each_metric
@settings(max_examples=10)
@given(seed=seeds, unit=st.sampled_from([0.25, 8.0]), shift=st.sampled_from([-16.0, 0.0, 2.0]))
def test_metrics_are_in_the_unit_that_they_say(name, seed, unit, shift):
    d, y = random_mixture(seed)
    moved = NormalMixture(unit * d.loc + shift, unit * d.scale)
    value, power = REAL[name](y, d), POWERS.get(name, 1)
    expected = value + np.log(unit) if power is None else value * unit**power
    assert REAL[name](unit * y + shift, moved) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(seed=seeds)
def test_regression_metrics_keep_their_bounds(seed):
    d, y = random_mixture(seed)
    # CRPS of a distribution is at most the mean absolute error of its draws.
    mae = (torch.as_tensor(y) - d.loc).abs() + d.scale * math.sqrt(2 / math.pi)
    assert 0 <= crps(y, d) <= float(mae.mean())
    assert 0 <= quantile_calibration_error(y, d) <= 0.5
    assert ((pit_values(y, d) >= 0) & (pit_values(y, d) <= 1)).all()
    covers = [interval_coverage(y, d, coverage=c) for c in (0.1, 0.5, 0.9)]
    assert covers == sorted(covers)


@given(seed=seeds, coverage=st.floats(0.05, 0.99))
def test_coverage_by_pit_is_coverage_by_quantiles(seed, coverage):
    d, y = random_mixture(seed)
    lower, upper = d.interval(coverage)
    inside = (torch.as_tensor(y) >= lower) & (torch.as_tensor(y) <= upper)
    assert interval_coverage(y, d, coverage=coverage) == inside.double().mean().item()

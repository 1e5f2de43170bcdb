"""Tests of calibration: uniform p-values where predictions are right, power where they are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, logit, ndtr, ndtri
from scipy.stats import binom, chi2, kstest, ncx2

from uq.calibration import (
    calibration_test,
    classwise_calibration_error,
    debiased_calibration_error,
    expected_calibration_error,
    mmce,
    pit_test,
    pit_values,
    smooth_calibration_error,
)
from uq.distributions import Empirical, NormalMixture

STATISTICS = {
    "smooth_calibration_error": smooth_calibration_error,
    "mmce": mmce,
    "expected_calibration_error": expected_calibration_error,
    "debiased_calibration_error": debiased_calibration_error,
    "classwise_calibration_error": classwise_calibration_error,
}


def multiclass(seed, n=100, factor=1.0, n_classes=3):
    """Labels drawn from probabilities; those said have logits ``factor`` times as large."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.standard_normal((n, n_classes))
    true, said = (torch.softmax(torch.as_tensor(s * logits), 1).numpy() for s in (1.0, factor))
    return (rng.random((n, 1)) > true.cumsum(1)[:, :-1]).sum(1), said


def binary(p):
    p = np.asarray(p, float)
    return np.stack([1 - p, p], 1)


def normal(mean, scale):
    mean = torch.as_tensor(np.asarray(mean, float))
    return NormalMixture(mean[None], torch.as_tensor(scale, dtype=torch.float64))


def assert_uniform(p, n_cells=10):
    """χ² on cells of (0, 1], too large once in a million times."""
    counts = np.bincount(np.ceil(np.round(n_cells * p, 9)).astype(int) - 1, minlength=n_cells)
    expected = len(p) / n_cells
    assert np.square(counts - expected).sum() / expected < chi2.isf(1e-6, n_cells - 1)


# -- classes -----------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("statistic", "kind", "n_sets"),
    [
        ("smooth_calibration_error", None, 200),
        ("smooth_calibration_error", "positive", 200),
        ("mmce", None, 1000),
        ("mmce", "top_label", 1000),
        ("expected_calibration_error", None, 1000),
        ("classwise_calibration_error", None, 500),
    ],
)
def test_p_values_of_a_calibrated_method_are_uniform(statistic, kind, n_sets):
    found = []
    for seed in range(n_sets):
        y, p = multiclass(seed, n_classes=2 if kind else 3)
        options = {"statistic": statistic, "kind": kind, "n_draws": 19, "random_state": seed}
        found.append(calibration_test(y, p, **options).p_value)
    assert_uniform(np.array(found))  # 1/20, …, 1 by exchange of the labels with those drawn


DEVIATIONS = {
    "three classes, logits times 1.3": lambda seed: multiclass(seed, 500, 1.3),
    "two, logits shifted by .3": lambda p: expit(logit(p) + 0.3),
    "two, one wave of height .08": lambda p: p + 0.08 * np.sin(2 * np.pi * p),
    "two, four waves of height .15": lambda p: p + 0.15 * np.sin(8 * np.pi * p),
}
# Measured with 150 data sets each, as in the docstring of calibration_test.
POWER = {
    ("three classes, logits times 1.3", "smooth_calibration_error"): 0.84,
    ("two, logits shifted by .3", "smooth_calibration_error"): 0.63,
    ("two, logits shifted by .3", "mmce"): 0.76,
    ("two, one wave of height .08", "smooth_calibration_error"): 0.65,
    ("two, four waves of height .15", "smooth_calibration_error"): 0.80,
    ("two, four waves of height .15", "mmce"): 0.08,
}


@pytest.mark.statistical
@pytest.mark.parametrize(("deviation", "statistic"), POWER)
def test_power_is_what_the_docstring_says(deviation, statistic):
    n_sets, found = 60, []
    for seed in range(1000, 1000 + n_sets):
        if deviation.startswith("three"):
            y, p = DEVIATIONS[deviation](seed)
        else:
            rng = np.random.default_rng(seed)
            said = rng.random(500)
            y = (rng.random(500) < DEVIATIONS[deviation](said).clip(0, 1)).astype(int)
            p = binary(said)
        kind = None if deviation.startswith("three") else "positive"
        options = {"statistic": statistic, "kind": kind, "n_draws": 59, "random_state": seed}
        found.append(calibration_test(y, p, **options).p_value <= 0.05)
    stated = POWER[deviation, statistic]
    error = np.sqrt(stated * (1 - stated) * (1 / n_sets + 1 / 150))
    assert np.mean(found) == pytest.approx(stated, abs=5 * error)


@pytest.mark.statistical
@pytest.mark.parametrize("statistic", STATISTICS)
def test_an_over_confident_method_is_found_and_a_calibrated_one_rarely(statistic):
    def share(n_sets, n, factor):
        tests = (
            calibration_test(*multiclass(seed, n, factor), statistic=statistic, n_draws=39)
            for seed in range(n_sets)
        )
        return np.mean([test.p_value <= 0.05 for test in tests])

    assert share(30, 300, 2.0) > 0.9
    # 5 of 100 on average; 20 or more once in 10⁷ times.
    assert share(100, 100, 1.0) < 0.2


@pytest.mark.parametrize("statistic", list(STATISTICS)[:3])
def test_p_value_of_constant_predictions_is_the_binomial_one(statistic):
    # All rows at .7: the error is |k/n − .7|, and as many right, on either side, is as large.
    n, n_draws, k = 20, 1000, np.arange(21)
    p = binary(np.full(n, 0.7))
    for right in (10, 12, 14, 15, 17):
        y = (np.arange(n) < right).astype(int)
        as_far = np.abs(k / n - 0.7) >= abs(right / n - 0.7) - 1e-9
        exact = binom.pmf(k, n, 0.7)[as_far].sum()
        found = calibration_test(y, p, statistic=statistic, kind="positive", n_draws=n_draws)
        error = 5 * np.sqrt(exact * (1 - exact) / n_draws) + 2 / n_draws
        assert found.p_value == pytest.approx(exact, abs=error)
        assert found.statistic == pytest.approx(abs(right / n - 0.7), abs=1e-6)


@pytest.mark.parametrize("name", STATISTICS)
def test_the_statistic_is_the_metric_and_the_seed_decides_the_draws(name):
    y, p = multiclass(0, 60, 1.5)
    tests = [calibration_test(y, p, statistic=name, n_draws=50, random_state=s) for s in (1, 1, 2)]
    assert tests[0].statistic == STATISTICS[name](y, p)
    assert tests[0] == tests[1]
    assert 1 / 51 <= tests[2].p_value <= 1


def test_the_default_is_the_smooth_error():
    y, p = multiclass(0, 60, 1.5)
    smooth = calibration_test(y, p, statistic="smooth_calibration_error")
    assert calibration_test(y, p) == smooth


# -- targets -----------------------------------------------------------------------------------


@pytest.mark.statistical
def test_p_values_of_the_truth_are_uniform():
    rng = np.random.default_rng(0)
    d = normal(rng.standard_normal(500), np.exp(rng.standard_normal(500)))
    mean, scale = d.mean.numpy(), d.stddev.numpy()
    p = [pit_test(mean + scale * rng.standard_normal(500), d).p_value for _ in range(1500)]
    assert_uniform(np.array(p))


@pytest.mark.statistical
def test_pit_of_a_mixture_is_uniform_and_of_a_scale_off_by_a_tenth_is_not():
    rng = np.random.default_rng(0)
    n = 20_000
    loc, scale = rng.standard_normal((2, n)), np.exp(0.3 * rng.standard_normal((2, n)))
    which = rng.integers(2, size=n), np.arange(n)
    y = loc[which] + scale[which] * rng.standard_normal(n)
    for factor, uniform in ((1.0, True), (1.1, False)):
        d = NormalMixture(torch.as_tensor(loc), torch.as_tensor(factor * scale))
        assert (pit_test(y, d).p_value > 1e-6) == uniform


@pytest.mark.statistical
@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("level", [1e-4, 0.01])
def test_power_against_a_scale_off_by_a_tenth_is_that_of_theory(factor, level):
    rng = np.random.default_rng(0)
    n, n_sets = 2000, 200
    d = normal(np.zeros(n), factor)
    found = [pit_test(rng.standard_normal(n), d).p_value < level for _ in range(n_sets)]
    mass = np.diff(ndtr(factor * ndtri(np.arange(21) / 20)))
    power = ncx2.sf(chi2.isf(level, 19), 19, n * 20 * np.square(mass - 0.05).sum())
    # The non-central χ² is right to a few hundredths.
    error = 5 * np.sqrt(power * (1 - power) / n_sets)
    assert np.mean(found) == pytest.approx(power, abs=error + 0.03)
    assert power > {0.01: 0.7, 1e-4: 0.35}[level]


@pytest.mark.statistical
def test_kolmogorov_and_smirnov_would_miss_such_a_scale():
    rng = np.random.default_rng(0)
    d = normal(np.zeros(2000), 1.1)
    targets = [rng.standard_normal(2000) for _ in range(100)]
    assert np.mean([kstest(pit_values(y, d), "uniform").pvalue < 1e-4 for y in targets]) < 0.1
    assert np.mean([pit_test(y, d).p_value < 1e-4 for y in targets]) > 0.2


@pytest.mark.parametrize(("n", "n_bins", "used"), [(10, 20, 2), (57, 20, 11), (57, 4, 4)])
def test_statistic_by_hand_and_fewer_bins_on_few_rows(n, n_bins, used):
    u = np.random.default_rng(0).random(n) ** 2
    found = pit_test(ndtri(u), normal(np.zeros(n), 1.0), n_bins=n_bins)
    counts = np.histogram(u, used, (0, 1))[0]
    statistic = (np.square(counts - n / used) / (n / used)).sum()
    assert found.statistic == pytest.approx(statistic, rel=1e-12)
    assert found.p_value == pytest.approx(chi2.sf(statistic, used - 1), rel=1e-12)


@pytest.mark.statistical
@pytest.mark.parametrize("n_draws", [1, 5, 33])
@pytest.mark.parametrize("counts", [False, True])
def test_pit_of_a_target_from_the_law_of_the_draws_is_uniform(n_draws, counts):
    rng = np.random.default_rng(0)
    n = 20_000
    shape = n_draws + 1, n
    if counts:  # many ties
        drawn = rng.poisson(rng.exponential(3.0, n), shape).astype(float)
    else:
        drawn = rng.standard_normal(shape) + rng.standard_normal(n)
    assert pit_test(drawn[0], Empirical(drawn[1:])).p_value > 1e-6
    if n_draws > 1:
        assert pit_test(1.5 * drawn[0], Empirical(drawn[1:])).p_value < 1e-6


def test_pit_is_drawn_within_the_place_among_the_draws():
    d = Empirical(np.array([[1.0], [2.0], [2.0], [5.0]]))

    def values(y):
        return [float(pit_values([y], d, random_state=s)[0]) for s in range(300)]

    # Of five places: the first, three that 2 shares with two draws, the one of 3, the last.
    for y, low, high in ((0.0, 0, 1), (2.0, 1, 4), (3.0, 3, 4), (9.0, 4, 5)):
        found = np.array(values(y))
        assert low / 5 <= found.min() < low / 5 + 0.02
        assert high / 5 - 0.02 < found.max() <= high / 5
    assert pit_values([[0.3], [0.4]], normal([0.0, 0.0], 1.0)).shape == (2, 1)
    np.testing.assert_array_equal(pit_values([0.3], normal([0.0], 1.0)), ndtr([0.3]))


def test_the_seed_decides_only_where_the_cdf_jumps():
    rng = np.random.default_rng(0)
    y, draws = rng.standard_normal(100), rng.standard_normal((4, 100))
    tests = [pit_test(y, Empirical(draws), random_state=s) for s in (0, 0, 1)]
    assert tests[0] == tests[1] != tests[2]
    d = normal(np.zeros(100), 1.0)
    assert pit_test(y, d, random_state=0) == pit_test(y, d, random_state=1)
    column = NormalMixture(torch.zeros(1, 100, 1), torch.tensor(1.0))
    assert pit_test(y, column) == pit_test(y[:, None], column)

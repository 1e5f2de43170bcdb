from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri

from uq.calibration import (
    accuracy,
    brier_score,
    crps,
    expected_calibration_error,
    interval_coverage,
    mean_interval_width,
    negative_log_likelihood,
    pit_values,
    quantile_calibration_error,
    rmse,
    sharpness,
)
from uq.distributions import CategoricalMixture, NormalMixture
from uq.errors import DataError, ParameterError


def top_label_error(y, prediction, **options):
    return expected_calibration_error(y, prediction, kind="top_label", **options)


CLASS_METRICS = [negative_log_likelihood, brier_score, accuracy, top_label_error]
REAL_METRICS = [
    negative_log_likelihood,
    crps,
    rmse,
    interval_coverage,
    mean_interval_width,
    sharpness,
    quantile_calibration_error,
]


def classes(probs, labels=None):
    return CategoricalMixture(torch.as_tensor(probs, dtype=torch.float64).log(), classes=labels)


def normal(mean, scale):
    mean = torch.as_tensor(mean, dtype=torch.float64)
    return NormalMixture(mean[None], torch.as_tensor(scale, dtype=torch.float64))


def random_classes(seed, n=40, n_classes=3, n_draws=4):
    rng = np.random.default_rng(seed)
    logits = torch.as_tensor(2 * rng.standard_normal((n_draws, n, n_classes)))
    return CategoricalMixture(logits), rng.integers(n_classes, size=n)


def random_mixture(seed, n=40, n_draws=4):
    rng = np.random.default_rng(seed)
    loc = torch.as_tensor(rng.standard_normal((n_draws, n)))
    scale = torch.as_tensor(np.exp(0.5 * rng.standard_normal((n_draws, n))))
    return NormalMixture(loc, scale), 2 * rng.standard_normal(n)


# -- oracles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_uniform_probabilities_score_log_k_and_one_minus_one_over_k(n_classes):
    y = np.arange(n_classes)
    d = classes(np.full((2, n_classes, n_classes), 1 / n_classes))
    half = 0.5 if n_classes == 2 else 1.0
    assert negative_log_likelihood(y, d) == pytest.approx(math.log(n_classes), abs=1e-12)
    assert brier_score(y, d) == pytest.approx(half * (1 - 1 / n_classes), abs=1e-12)


def test_scores_judge_the_averaged_probabilities_not_the_draws():
    # Averaging the draws' losses would give −(log .9 + log .1)/2 and (.01 + .81)/2 instead.
    d = classes([[[0.9, 0.1]], [[0.1, 0.9]]])
    assert negative_log_likelihood([1], d) == pytest.approx(math.log(2), abs=1e-12)
    assert brier_score([1], d) == pytest.approx(0.25, abs=1e-12)


def test_brier_score_of_a_sure_error_is_two():
    assert brier_score([1], classes([[[1.0, 0.0, 0.0]]])) == pytest.approx(2.0, abs=1e-15)


def test_calibration_error_puts_confidence_one_into_the_last_bin():
    d = classes([[[0.05, 0.95], [0.0, 1.0]]])
    error = expected_calibration_error([1, 0], d, n_bins=10, kind="positive")
    assert error == pytest.approx(0.475, abs=1e-12)


def test_calibration_error_puts_an_edge_into_the_bin_above_it():
    # .5 shares the bin [.5, .6) with .55: |.5 − .525|. Apart, the two would give .475.
    d = classes([[[0.5, 0.5], [0.45, 0.55]]])
    error = expected_calibration_error([0, 1], d, n_bins=10, kind="positive")
    assert error == pytest.approx(0.025, abs=1e-12)


def test_binary_calibration_error_depends_on_its_kind():
    p = np.repeat([0.3, 0.7], 10)
    d = classes(np.stack([1 - p, p], -1)[None])
    y = np.r_[np.repeat([1, 0], [4, 6]), np.repeat([1, 0], [8, 2])]
    assert expected_calibration_error(y, d, kind="positive") == pytest.approx(0.1, abs=1e-12)
    # Top label: 6 of 10 and 8 of 10 right at .7, in one bin.
    assert expected_calibration_error(y, d, kind="top_label") == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ParameterError, match="two classes need kind"):
        expected_calibration_error(y, d)


def test_calibration_error_weighs_bins_by_their_rows():
    # Three rows at .9 all wrong, one row at .5 right: (3·.9 + 1·.5)/4.
    d = classes([[[0.9, 0.05, 0.05]] * 3 + [[0.5, 0.25, 0.25]]])
    assert expected_calibration_error([1, 1, 1, 0], d) == pytest.approx(0.8, abs=1e-12)


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


@pytest.mark.statistical
def test_pit_of_the_truth_is_uniform_and_of_a_scale_off_by_a_tenth_is_not():
    rng = np.random.default_rng(0)
    n = 20_000
    loc, scale = rng.standard_normal((2, n)), np.exp(0.3 * rng.standard_normal((2, n)))
    which = rng.integers(2, size=n), np.arange(n)
    y = loc[which] + scale[which] * rng.standard_normal(n)

    def chi2(factor):
        d = NormalMixture(torch.as_tensor(loc), torch.as_tensor(factor * scale))
        counts = np.histogram(pit_values(y, d), 20, (0, 1))[0]
        return ((counts - n / 20) ** 2 / (n / 20)).sum()

    # χ² with 19 degrees of freedom exceeds 66.6 with probability 3e-7.
    assert chi2(1.0) < 66.6 < chi2(1.1)


def test_several_outputs_are_scored_jointly_and_the_rest_is_averaged():
    torch.manual_seed(0)
    loc, y = torch.randn(5, 6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    d = NormalMixture(loc, torch.tensor(0.5, dtype=torch.float64))
    joint = -d.joint().log_prob(y).mean().item()
    assert negative_log_likelihood(y, d) == pytest.approx(joint, abs=1e-12)
    assert abs(joint + d.log_prob(y).sum(-1).mean().item()) > 0.1  # the sum of marginals differs
    assert negative_log_likelihood(y, d.joint()) == pytest.approx(joint, abs=1e-12)
    for metric in REAL_METRICS[1:]:
        per_output = [metric(y[:, j], NormalMixture(loc[..., j], d.scale[..., j])) for j in (0, 1)]
        if metric in (rmse, sharpness):
            assert metric(y, d) ** 2 == pytest.approx(np.square(per_output).mean(), abs=1e-12)
        else:
            assert metric(y, d) == pytest.approx(np.mean(per_output), abs=1e-12)
    assert pit_values(y, d).shape == (6, 2)


def test_a_label_of_probability_zero_gives_infinity_and_a_warning():
    d = classes([[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]])
    with pytest.warns(RuntimeWarning, match="1 of 2 labels .*first at row 1"):
        assert negative_log_likelihood([0, 2], d) == math.inf
    with pytest.warns(RuntimeWarning, match="probability 0"):
        weighted = negative_log_likelihood([0, 2], d, sample_weight=[1.0, 0.0])
    assert weighted == pytest.approx(math.log(2))


def test_losses_are_accumulated_in_float64():
    # One part in 1e8 of a target is below float32: the float32 copy of y must not decide.
    d = NormalMixture(torch.zeros(1, 1, dtype=torch.float32), torch.tensor(1.0))
    assert rmse([1 + 1e-9], d) == 1 + 1e-9


# -- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [["ant", "bee", "cow"], [10, 20, 30], [0.5, 1.5, 2.5], np.array(["x", "y", "z"], object)],
)
@pytest.mark.parametrize("wrap", [list, np.array, pd.Series, pd.Categorical])
def test_labels_of_any_kind_are_matched_by_value(labels, wrap):
    d = classes([[[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]], labels)
    assert accuracy(wrap([labels[0], labels[2]]), d) == 1.0
    assert accuracy(wrap([labels[2], labels[0]]), d) == 0.0


def test_boolean_labels():
    d = classes([[[0.7, 0.3], [0.1, 0.9]]], np.array([False, True]))
    assert accuracy(np.array([False, True]), d) == 1.0


def test_an_unknown_label_is_named():
    d = classes([[[0.7, 0.3], [0.1, 0.9]]], ["ant", "bee"])
    with pytest.raises(DataError, match=r"brier_score: y_true holds 'fly' at row 1.*'ant', 'bee'"):
        brier_score(["ant", "fly"], d)
    with pytest.raises(DataError, match="holds nan at row 0"):
        brier_score([np.nan, 1.0], classes([[[0.7, 0.3], [0.1, 0.9]]]))


# -- bad input ---------------------------------------------------------------------------------

TWO = normal([0.0, 0.0], 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rmse([1.0], TWO), r"rmse: y_true has shape \(1,\), expected \(2,\)"),
        (lambda: rmse([1.0, np.nan], TWO), "rmse: y_true is NaN or infinite at row 1"),
        (lambda: rmse(["a", "b"], TWO), "rmse: y_true must hold numbers"),
        (lambda: rmse([0, 1], np.zeros(2)), "prediction must be a NormalMixture .* got a ndarray"),
        (lambda: brier_score([0, 1], TWO), "must be a CategoricalMixture .* got a NormalMixture"),
        (lambda: crps([0.0], TWO[0]), r"needs batch shape \(n,\) or \(n, m\), got \(\)"),
        (lambda: rmse([], TWO[:0]), "y_true is empty"),
        (
            lambda: rmse(
                [0.0],
                NormalMixture(torch.tensor([[np.nan]]), torch.tensor(1.0), validate_args=False),
            ),
            r"prediction\.mean is NaN or infinite",
        ),
        (lambda: rmse([0.0, 1], TWO, sample_weight=[1]), r"sample_weight has shape \(1,\)"),
        (lambda: rmse([0.0, 1], TWO, sample_weight=[1, -1]), "must be finite, >= 0"),
        (lambda: rmse([0.0, 1], TWO, sample_weight=[0, 0]), "not all zero"),
        (lambda: negative_log_likelihood([0], "x"), "CategoricalMixture or a NormalMixture"),
        (lambda: interval_coverage([0.0, 1], TWO, coverage=1.0), r"coverage must lie in \(0, 1\)"),
        (lambda: top_label_error([0], classes([[[1.0, 0]]]), n_bins=0), "n_bins must be"),
        (
            lambda: expected_calibration_error([0], classes([[[1.0, 0, 0]]]), kind="positive"),
            "needs two classes, got 3",
        ),
        (
            lambda: expected_calibration_error([0], classes([[[1.0, 0]]]), kind="other"),
            "kind must be 'top_label' or 'positive'",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((DataError, ParameterError), match=message):
        call()


def test_a_single_column_of_targets_is_taken_as_one_output():
    y, d = [0.1, 0.2], NormalMixture(torch.zeros(1, 2, 1), torch.tensor(1.0))
    assert rmse(y, d) == rmse([[0.1], [0.2]], d) == rmse([[0.1], [0.2]], TWO)


# -- properties --------------------------------------------------------------------------------

CASES = [(m, random_classes) for m in CLASS_METRICS] + [(m, random_mixture) for m in REAL_METRICS]
names = [f"{m.__name__}-{make.__name__[7:]}" for m, make in CASES]
seeds = st.integers(0, 2**20)


@pytest.mark.parametrize(("metric", "make"), CASES, ids=names)
@given(seed=seeds)
def test_the_order_of_rows_does_not_matter(metric, make, seed):
    d, y = make(seed)
    order = np.random.default_rng(seed).permutation(len(y))
    assert metric(y[order], d[order]) == pytest.approx(metric(y, d), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("metric", "make"), CASES, ids=names)
@given(seed=seeds)
def test_tiling_the_data_changes_nothing(metric, make, seed):
    d, y = make(seed)
    rows = np.tile(np.arange(len(y)), 3)
    assert metric(y[rows], d[rows]) == pytest.approx(metric(y, d), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("metric", "make"), CASES, ids=names)
@given(seed=seeds)
def test_integer_weights_are_repetitions(metric, make, seed):
    d, y = make(seed)
    weight = np.random.default_rng(seed).integers(0, 4, size=len(y))
    rows = np.repeat(np.arange(len(y)), weight)
    repeated = metric(y[rows], d[rows])
    assert metric(y, d, sample_weight=weight) == pytest.approx(repeated, rel=1e-12, abs=1e-12)
    assert metric(y, d, sample_weight=0.1 * weight) == pytest.approx(repeated, rel=1e-12)


@given(seed=seeds, n_classes=st.integers(2, 5))
def test_classification_metrics_keep_their_bounds(seed, n_classes):
    d, y = random_classes(seed, n_classes=n_classes)
    assert negative_log_likelihood(y, d) >= 0
    assert 0 <= brier_score(y, d) <= (1 if n_classes == 2 else 2)
    assert 0 <= accuracy(y, d) <= 1
    assert 0 <= top_label_error(y, d) <= 1


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


@given(seed=seeds)
def test_scores_are_proper_for_the_labels_own_distribution(seed):
    # Weighted by the predicted probabilities themselves, no other prediction scores better.
    d, _ = random_classes(seed, n=3)
    other, _ = random_classes(seed + 1, n=3)
    n, k = d.probs.shape
    rows, labels = np.repeat(np.arange(n), k), np.tile(np.arange(k), n)
    weight = d.probs.reshape(-1).numpy()
    for metric in (negative_log_likelihood, brier_score):
        own = metric(labels, d[rows], sample_weight=weight)
        assert own <= metric(labels, other[rows], sample_weight=weight) + 1e-12

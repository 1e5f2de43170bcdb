"""Metrics of class probabilities against closed forms, integrals, loops and simulation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from uq.calibration import (
    accuracy,
    accuracy_at_coverage,
    augrc,
    aurc,
    brier_decomposition,
    brier_score,
    classwise_calibration_error,
    coverage_at_accuracy,
    debiased_calibration_error,
    excess_aurc,
    expected_calibration_error,
    maximum_calibration_error,
    misclassification_auroc,
    mmce,
    negative_log_likelihood,
    smooth_calibration_error,
)
from uq.distributions import CategoricalMixture
from uq.errors import DataError, ParameterError

seeds = st.integers(0, 2**20)


def draw(seed, n=60, n_classes=3, sharpen=1.0):
    """Labels drawn from probabilities, and those, over-confident for ``sharpen`` > 1."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.standard_normal((n, n_classes))
    true, said = (torch.softmax(torch.as_tensor(s * logits), 1).numpy() for s in (1.0, sharpen))
    return (rng.random((n, 1)) > true.cumsum(1)[:, :-1]).sum(1), said


def binary(p):
    p = np.asarray(p, float)
    return np.stack([1 - p, p], 1)


def classes(probs, labels=None):
    return CategoricalMixture(torch.as_tensor(probs, dtype=torch.float64).log(), classes=labels)


# -- scores ------------------------------------------------------------------------------------


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


def test_a_label_of_probability_zero_gives_infinity_and_a_warning():
    d = classes([[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]])
    with pytest.warns(RuntimeWarning, match="1 of 2 labels .*first at row 1"):
        assert negative_log_likelihood([0, 2], d) == math.inf
    with pytest.warns(RuntimeWarning, match="probability 0"):
        weighted = negative_log_likelihood([0, 2], d, sample_weight=[1.0, 0.0])
    assert weighted == pytest.approx(math.log(2))


@given(seed=seeds)
def test_scores_are_proper_for_the_labels_own_distribution(seed):
    # Weighted by the predicted probabilities themselves, no other prediction scores better.
    (_, p), (_, other) = draw(seed, n=3), draw(seed + 1, n=3)
    rows, labels = np.repeat(np.arange(3), 3), np.tile(np.arange(3), 3)
    for metric in (negative_log_likelihood, brier_score):
        own = metric(labels, p[rows], sample_weight=p.ravel())
        assert own <= metric(labels, other[rows], sample_weight=p.ravel()) + 1e-12


# -- Brier score -------------------------------------------------------------------------------


@given(seed=seeds, n_classes=st.integers(2, 4), weighted=st.booleans())
def test_parts_of_the_brier_score_add_up_to_it(seed, n_classes, weighted):
    y, p = draw(seed, n_classes=n_classes)
    p[::3] = p[0]
    weight = np.random.default_rng(seed).integers(0, 3, len(y)) + 0.0 if weighted else None
    parts = brier_decomposition(y, p, sample_weight=weight)
    total = parts.reliability - parts.resolution + parts.uncertainty
    assert total == pytest.approx(brier_score(y, p, sample_weight=weight), abs=1e-12)
    assert min(parts) >= -1e-12
    share = np.bincount(y, weight, n_classes) / np.sum(
        np.ones_like(y) if weight is None else weight
    )
    uncertainty = (share * (1 - share)).sum() / (2 if n_classes == 2 else 1)
    assert parts.uncertainty == pytest.approx(uncertainty, abs=1e-12)


def test_decomposition_of_two_values_in_order_is_murphys():
    # Shares 1/4 at .4 and 3/4 at .7, half of the rows each; ȳ = 1/2.
    y, p = [1, 0, 0, 0, 1, 1, 1, 0], binary([0.4] * 4 + [0.7] * 4)
    parts = brier_decomposition(y, p)
    assert parts.reliability == pytest.approx((0.15**2 + 0.05**2) / 2, abs=1e-14)
    assert parts.resolution == pytest.approx(0.25**2, abs=1e-14)
    assert parts.uncertainty == pytest.approx(0.25, abs=1e-14)


@given(seed=seeds)
def test_reliability_is_what_the_best_monotone_map_gains(seed):
    # π of the decomposition by its definition: maxima of minima of means (Robertson et al. 1988).
    rng = np.random.default_rng(seed)
    p, y = np.sort(rng.choice([0.1, 0.3, 0.4, 0.8, 0.9], 12)), rng.integers(0, 2, 12)
    values = np.unique(p)
    best = {
        v: max(
            min(y[(p >= a) & (p <= b)].mean() for b in values[values >= v])
            for a in values[values <= v]
        )
        for v in values
    }
    fitted = np.array([best[v] for v in p])
    score = np.square(fitted - y).mean()
    parts = brier_decomposition(y, binary(p))
    assert parts.reliability == pytest.approx(np.square(p - y).mean() - score, abs=1e-12)
    assert parts.resolution == pytest.approx(y.mean() * (1 - y.mean()) - score, abs=1e-12)


# -- calibration errors ------------------------------------------------------------------------


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


@pytest.mark.parametrize("n_bins", [1, 2, 7, 10, 15, 100])
def test_confidences_at_every_edge_stay_in_range(n_bins):
    p = np.r_[np.arange(n_bins + 1) / n_bins, 1.0]
    y = np.arange(len(p)) % 2
    # By the definition, row by row.
    gaps = np.zeros(n_bins)
    for c, correct in zip(p, y, strict=True):
        gaps[min(int(c * n_bins), n_bins - 1)] += correct - c
    value = expected_calibration_error(y, binary(p), kind="positive", n_bins=n_bins)
    assert value == pytest.approx(np.abs(gaps).sum() / len(p), abs=1e-12)


def smooth_error_by_integration(confidence, correct):
    """Root of ∫|mean (correct − c) K_σ(t, c)| dt = σ: reflected Gaussians, midpoint rule."""
    t = (np.arange(2000) + 0.5) / 2000
    residual = correct - confidence

    def integral(sigma):
        kernel = sum(
            np.exp(-0.5 * np.square((t[:, None] - sign * confidence + 2 * k) / sigma))
            for k in range(-2, 3)
            for sign in (1, -1)
        ) / (sigma * np.sqrt(2 * np.pi))
        return np.abs(kernel @ residual).mean() / len(residual)

    return brentq(lambda s: integral(s) - s, 1e-3, 0.5, xtol=1e-7)


@pytest.mark.parametrize("gap", [-0.25, -0.1, 0.0, 0.3])
def test_smooth_error_is_the_root_of_an_integral(gap):
    rng = np.random.default_rng(0)
    p = np.r_[rng.random(150), 0.0, 1.0, 1.0]
    y = (rng.random(len(p)) < (p + gap).clip(0, 1)).astype(int)
    expected = smooth_error_by_integration(p, y)
    value = smooth_calibration_error(y, binary(p), kind="positive")
    assert value == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_smooth_error_places_the_grid_on_the_ends(end):
    # One row at an end against ten a tenth away: half a cell nearer would be half a percent less.
    p = abs(end - np.r_[0.0, np.full(10, 0.1)])
    y = np.r_[1 - end, np.full(10, end)].astype(int)
    expected = smooth_error_by_integration(p, y)
    value = smooth_calibration_error(y, binary(p), kind="positive")
    assert value == pytest.approx(expected, rel=1e-3)


def test_smooth_error_of_a_constant_gap_is_that_gap():
    # A Gaussian keeps the sign and the mass of residuals of one sign: ∫ = |mean residual|.
    y = np.r_[np.zeros(5), np.ones(5)].astype(int)
    value = smooth_calibration_error(y, binary(np.full(10, 0.8)), kind="positive")
    assert value == pytest.approx(0.3, abs=1e-5)


@pytest.mark.statistical
def test_debiased_error_is_unbiased():
    # Five groups of equal confidence, 40 rows each: a gap of .3 everywhere, mean square .09. What
    # chance adds is at least .16/40, which 2000 data sets show by more than eight standard errors.
    rng = np.random.default_rng(0)
    p, true = np.repeat(np.linspace(0.5, 0.9, 5), 40), np.repeat(np.linspace(0.2, 0.6, 5), 40)
    squares = [
        debiased_calibration_error(
            (rng.random(200) < true).astype(int), binary(p), kind="positive", n_bins=5
        )
        ** 2
        for _ in range(2000)
    ]
    error = np.std(squares) / np.sqrt(len(squares))
    assert np.mean(squares) == pytest.approx(0.09, abs=5 * error)
    assert 8 * error < 0.2 * 0.8 / 40


def test_debiased_error_leaves_out_bins_of_one_row_and_is_never_negative():
    # Bin of four rows: accuracy 1/4 at .5; variance (3/16)/3; the lone row at .9 says nothing.
    p = binary([0.5] * 4 + [0.9])
    value = debiased_calibration_error([1, 0, 0, 0, 0], p, kind="positive", n_bins=2)
    assert value == 0.0  # 1/16 − 1/16
    value = debiased_calibration_error([0, 0, 0, 0, 0], p, kind="positive", n_bins=2)
    assert value == pytest.approx(np.sqrt(0.8 * 0.25), abs=1e-14)


@pytest.mark.parametrize("n_bins", [1, 4, 15])
@given(seed=seeds)
def test_classwise_error_is_a_mean_over_classes_and_bins(n_bins, seed):
    y, p = draw(seed, n_classes=4)
    p[:3] = np.eye(4)[:3]
    weight = np.random.default_rng(seed).uniform(0, 2, len(y))
    errors = []
    for k in range(4):
        gaps = np.zeros(n_bins)
        for i in range(len(y)):
            gaps[min(int(p[i, k] * n_bins), n_bins - 1)] += weight[i] * ((y[i] == k) - p[i, k])
        errors.append(np.abs(gaps).sum() / weight.sum())
    value = classwise_calibration_error(y, p, n_bins=n_bins, sample_weight=weight)
    assert value == pytest.approx(np.mean(errors), abs=1e-12)


@given(seed=seeds)
def test_classwise_error_of_two_classes_is_that_of_either(seed):
    y, p = draw(seed, n_classes=2)
    value = classwise_calibration_error(y, p, n_bins=1)
    assert value == pytest.approx(
        expected_calibration_error(y, p, kind="positive", n_bins=1), abs=1e-12
    )


def test_largest_gap_is_taken_over_bins_that_hold_rows():
    p = binary([0.15, 0.15, 0.55, 0.95])  # gaps: |.5 − .15|, .55 and .05
    value = maximum_calibration_error([0, 1, 0, 1], p, kind="positive", n_bins=10)
    assert value == pytest.approx(0.55, abs=1e-14)
    value = maximum_calibration_error([1, 1, 1, 1], p, kind="positive", n_bins=10)
    assert value == pytest.approx(0.85, abs=1e-14)


def test_bins_of_equal_mass_keep_ties_together():
    def error(p, y, n_bins):
        return expected_calibration_error(
            y, binary(p), kind="positive", bins="equal_mass", n_bins=n_bins
        )

    # One value is one bin; cut in two by position it would give (|1 − .6| + |0 − .6|)/2 = .5.
    assert error([0.6] * 4, [1, 1, 0, 0], 2) == pytest.approx(0.1, abs=1e-14)
    # The middle of .5 is at 1/8, that of .6 at 5/8: bins {.5} and {.6 ×3}.
    assert error([0.5, 0.6, 0.6, 0.6], [1, 0, 0, 1], 2) == pytest.approx(
        0.25 * 0.5 + 0.75 * (0.6 - 1 / 3), abs=1e-14
    )
    # No ties: bins of two rows each.
    assert error([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1], 2) == pytest.approx(
        0.5 * (0.5 - 0.15) + 0.5 * (0.5 - 0.35), abs=1e-14
    )


def test_debiased_error_takes_away_the_variance_of_the_labels_as_its_docstring_says():
    # One bin of confidences 0 and 1, all right: accuracy ½ and mean confidence ½, Σ = −¼/3 → 0.
    assert (
        debiased_calibration_error([0, 0, 1, 1], binary([0, 0, 1, 1]), kind="positive", n_bins=1)
        == 0
    )
    # Accuracy ½ at a confidence of .9: .16 − ¼/3.
    value = debiased_calibration_error([0, 0, 1, 1], binary([0.9] * 4), kind="positive", n_bins=1)
    assert value == pytest.approx(np.sqrt(0.16 - 0.25 / 3), abs=1e-12)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_of_any_precision(dtype):
    p = torch.tensor([[0.75, 0.25], [0.125, 0.875]], dtype=dtype, requires_grad=True)
    assert brier_score(torch.tensor([0, 0]), p) == (0.25**2 + 0.875**2) / 2


def test_boolean_labels():
    d = classes([[[0.7, 0.3], [0.1, 0.9]]], np.array([False, True]))
    assert accuracy(np.array([False, True]), d) == 1.0


def test_an_unknown_label_is_named():
    d = classes([[[0.7, 0.3], [0.1, 0.9]]], ["ant", "bee"])
    with pytest.raises(DataError, match=r"brier_score: y_true holds 'fly' at row 1.*'ant', 'bee'"):
        brier_score(["ant", "fly"], d)
    with pytest.raises(DataError, match="holds nan at row 0"):
        brier_score([np.nan, 1.0], classes([[[0.7, 0.3], [0.1, 0.9]]]))


# -- properties --------------------------------------------------------------------------------

RANKING = {
    "auroc": misclassification_auroc,
    "aurc": aurc,
    "excess_aurc": excess_aurc,
    "augrc": augrc,
    "accuracy_at": lambda y, p, **w: accuracy_at_coverage(y, p, coverage=0.6, **w),
    "coverage_at": lambda y, p, **w: coverage_at_accuracy(y, p, accuracy=0.75, **w),
}
KINDS = {
    "ece": expected_calibration_error,
    "mce": maximum_calibration_error,
    "debiased": debiased_calibration_error,
    "smooth": smooth_calibration_error,
    "mmce": mmce,
    "adaptive": lambda y, p, **o: expected_calibration_error(y, p, bins="equal_mass", **o),
}
METRICS = {
    "nll": negative_log_likelihood,
    "brier": brier_score,
    "accuracy": accuracy,
    "classwise": classwise_calibration_error,
    **{
        part: lambda y, p, part=part, **w: getattr(brier_decomposition(y, p, **w), part)
        for part in ("reliability", "resolution", "uncertainty")
    },
    **{name: lambda y, p, f=f, **w: f(y, p, kind="top_label", **w) for name, f in KINDS.items()},
    **RANKING,
}
COUNTS_ROWS = {"aurc", "excess_aurc", "augrc", "debiased"}  # by definition
each_metric = pytest.mark.parametrize("name", METRICS)


def near(value):
    return pytest.approx(value, rel=1e-9, abs=2e-6)  # the smooth error is found to 1e-6


@each_metric
@settings(max_examples=10)
@given(seed=seeds)
def test_neither_the_order_of_rows_nor_that_of_classes_matters(name, seed):
    y, p = draw(seed)
    rng = np.random.default_rng(seed)
    rows, classes = rng.permutation(len(y)), rng.permutation(3)
    value = METRICS[name](y, p)
    assert METRICS[name](y[rows], p[rows]) == near(value)
    assert METRICS[name](y, pd.DataFrame(p)[classes]) == near(value)
    assert METRICS[name](np.argsort(classes)[y], p[:, classes]) == near(value)


@pytest.mark.parametrize("name", sorted(METRICS.keys() - COUNTS_ROWS))
@settings(max_examples=10)
@given(seed=seeds)
def test_tiling_the_rows_changes_nothing(name, seed):
    y, p = draw(seed)
    assert METRICS[name](np.tile(y, 3), np.tile(p, (3, 1))) == near(METRICS[name](y, p))


@each_metric
@settings(max_examples=10)
@given(seed=seeds)
def test_integer_weights_are_repetitions(name, seed):
    y, p = draw(seed)
    p[::4] = p[0]
    weight = np.random.default_rng(seed).integers(0, 4, len(y))
    again = np.repeat(np.arange(len(y)), weight)
    value = METRICS[name](y, p, sample_weight=weight)
    assert value == near(METRICS[name](y[again], p[again]))


@each_metric
@settings(max_examples=10)
@given(seed=seeds, sharpen=st.floats(0.1, 20))
def test_bounds(name, seed, sharpen):
    y, p = draw(seed, sharpen=sharpen)
    value = METRICS[name](y, p)
    top = {"nll": np.inf, "brier": 2.0, "reliability": 2.0}.get(name, 1.0)
    assert -1e-12 <= value <= top + 1e-12


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=10)
@given(seed=seeds)
def test_the_two_kinds_agree_where_the_second_class_is_the_most_probable(name, seed):
    y, p = draw(seed, n_classes=2)
    p = np.sort(p, 1)
    assert KINDS[name](y, p, kind="positive") == near(KINDS[name](y, p, kind="top_label"))


@pytest.mark.parametrize("name", RANKING)
@given(seed=seeds, power=st.floats(0.3, 3))
def test_rankings_do_not_change_with_a_monotone_map_of_the_confidence(name, seed, power):
    y, p = draw(seed)
    order = np.argsort(p, 1)
    top = 0.5 + 0.5 * p.max(1) ** power  # the same class stays the most probable
    moved = np.repeat((1 - top[:, None]) / 2, 3, 1)
    np.put_along_axis(moved, order[:, -1:], top[:, None], 1)
    assert RANKING[name](y, moved) == pytest.approx(RANKING[name](y, p), abs=1e-12)

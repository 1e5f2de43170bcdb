"""Bad and degenerate input of every metric: a named error, or a value that is documented."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import uq
from uq.calibration import (
    accuracy,
    accuracy_at_coverage,
    augrc,
    aurc,
    brier_decomposition,
    brier_score,
    calibration_test,
    classwise_calibration_error,
    coverage_at_accuracy,
    crps,
    debiased_calibration_error,
    energy_score,
    excess_aurc,
    expected_calibration_error,
    expected_normalized_calibration_error,
    interval_coverage,
    interval_score,
    mae,
    maximum_calibration_error,
    mean_interval_width,
    misclassification_auroc,
    mmce,
    negative_log_likelihood,
    pinball_loss,
    pit_test,
    pit_values,
    quantile_calibration_error,
    risk_coverage_curve,
    rmse,
    sharpness,
    smooth_calibration_error,
    uncertainty_calibration_error,
)
from uq.distributions import CategoricalMixture, Empirical, NormalMixture
from uq.errors import DataError, ParameterError


def normal(mean, scale):
    mean = torch.as_tensor(np.asarray(mean, float))
    return NormalMixture(mean[None], torch.as_tensor(scale, dtype=torch.float64))


TWO = normal([0.0, 0.0], 1.0)


# -- classes -----------------------------------------------------------------------------------

CLASSES = {
    "negative_log_likelihood": negative_log_likelihood,
    "brier_score": brier_score,
    "brier_decomposition": brier_decomposition,
    "accuracy": accuracy,
    "classwise_calibration_error": classwise_calibration_error,
    **{
        f.__name__: lambda y, p, f=f, **o: f(y, p, kind="top_label", **o)
        for f in (
            expected_calibration_error,
            debiased_calibration_error,
            maximum_calibration_error,
            smooth_calibration_error,
            mmce,
        )
    },
    "calibration_test": lambda y, p: calibration_test(y, p, kind="top_label", n_draws=20),
    "misclassification_auroc": misclassification_auroc,
    "aurc": aurc,
    "excess_aurc": excess_aurc,
    "augrc": augrc,
    "risk_coverage_curve": risk_coverage_curve,
    "accuracy_at_coverage": lambda y, p, **o: accuracy_at_coverage(y, p, coverage=0.5, **o),
    "coverage_at_accuracy": lambda y, p, **o: coverage_at_accuracy(y, p, accuracy=0.5, **o),
}
each_function = pytest.mark.parametrize("name", CLASSES)
P = np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])


@each_function
@pytest.mark.parametrize(
    ("y", "p", "message"),
    [
        ([], np.empty((0, 3)), "y_true is empty; at least one row is needed"),
        ([], CategoricalMixture(torch.zeros(1, 2, 3))[:0], "y_true is empty"),
        ([], [], r"class probabilities need shape \(n, n_classes\).*got \(0,\)"),
        ([0], P, r"y_true has shape \(1,\), expected \(2,\), the shape of prediction"),
        ([[0, 1], [1, 0]], P, r"y_true has shape \(2, 2\), expected \(2,\)"),
        (0, P, r"y_true has shape \(\), expected \(2,\)"),
        ([[0], [1, 2]], P, "y_true must be a regular array"),
        ([0, 3], P, "y_true holds 3 at row 1, which is none of the classes of prediction: 0, 1, 2"),
        ([0, -1], P, "y_true holds -1 at row 1"),
        ([0, np.nan], P, "y_true holds nan at row 1"),
        ([0, None], P, "y_true holds None at row 1"),
        ([0, 1], [[0.7, 0.2, 0.1], [np.nan, 0.5, 0.5]], "prediction is NaN or infinite at row 1"),
        ([0, 1], [[0.7, 0.2, 0.1], [np.inf, 0.5, 0.5]], "prediction is NaN or infinite at row 1"),
        ([0, 1], [[0.7, 0.2, 0.1], [0.5, 0.5, 0.5]], "sum to 1 in each row; row 1 .*logits"),
        ([0, 1], [[0.7, 0.2, 0.1], [-0.5, 1.0, 0.5]], "must be >= 0 .*; row 1"),
        ([0, 1], [[0.5, 0.5], [1.0]], "prediction must be a regular array"),
        ([0, 1], [["a", "b"], ["c", "d"]], "prediction must hold numbers"),
        ([0, 1], [0.3, 0.7], r"n_classes >= 2, got \(2,\); for two classes give both columns"),
        ([0, 1], [9.5, 7.1], r"for real targets a distribution \(metrics take y first"),
        ([0, 1], uq.MAPRegressor(), r"got a MAPRegressor; give its predict_distribution\(X\)"),
        ([0, 1], [[1.0], [1.0]], r"n_classes >= 2, got \(2, 1\)"),
        ([0, 1], P[None], r"got \(1, 2, 3\)"),
        ([0, 1], "x", "prediction must be a .*got a str"),
        ([0, 1], None, "prediction must be a .*got a NoneType"),
    ],
)  # fmt: skip
def test_bad_input_of_classes_is_named(name, y, p, message):
    with pytest.raises(DataError, match=f"^{name}: .*{message}"):
        CLASSES[name](y, p)


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"calibration_test"}))
@pytest.mark.parametrize(
    "weight", [[1.0], [1.0, np.nan], [1.0, -1.0], [0, 0], [[1, 1]], ["a", "b"]]
)
def test_bad_weights_of_classes_are_named(name, weight):
    with pytest.raises(DataError, match=f"^{name}: sample_weight"):
        CLASSES[name]([0, 1], P, sample_weight=weight)


RANKED_TARGETS = {"negative_log_likelihood", "aurc", "augrc", "risk_coverage_curve"}


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - RANKED_TARGETS))
def test_a_prediction_of_targets_is_refused(name):
    message = f"^{name}: prediction must be a predictive distribution over classes, got a Normal"
    with pytest.raises(DataError, match=message):
        CLASSES[name]([0, 1], TWO)


@each_function
@pytest.mark.parametrize(
    ("y", "p"),
    [
        ([0], P[:1]),
        ([2], P[:1]),
        ([0], [[1.0, 0.0]]),
        ([0, 0, 0], np.full((3, 3), 1 / 3)),
        ([0, 1, 2, 2], np.full((4, 3), 1 / 3)),
        ([1, 1, 1], [[0.4, 0.6], [0.2, 0.8], [0.7, 0.3]]),
    ],
    ids=["row", "wrong", "sure", "constant-class", "constant", "class"],
)
def test_one_row_one_class_and_constant_predictions_have_a_value(name, y, p):
    value = np.hstack([np.ravel(part) for part in np.atleast_1d(CLASSES[name](y, p))])
    right = np.argmax(p, 1) == y
    if name == "misclassification_auroc" and (right.all() or not right.any()):
        assert np.isnan(value).all()
    else:
        assert np.isfinite(value).all()


# -- targets -----------------------------------------------------------------------------------

TARGETS = {
    f.__name__: f
    for f in (
        negative_log_likelihood,
        crps,
        energy_score,
        rmse,
        mae,
        interval_score,
        interval_coverage,
        pit_values,
        quantile_calibration_error,
        expected_normalized_calibration_error,
        uncertainty_calibration_error,
        mean_interval_width,
        sharpness,
        aurc,
        augrc,
        risk_coverage_curve,
    )
}
TARGETS["pinball_loss"] = lambda y, d, **w: pinball_loss(y, d, level=0.3, **w)
TARGETS["pit_test"] = pit_test
BOTH = {"negative_log_likelihood", "aurc", "augrc", "risk_coverage_curve"}  # classes as well


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("y", "d", "message"),
    [
        ([], TWO[:0], "y_true is empty; at least one row is needed"),
        ([], Empirical(np.zeros((3, 2)))[:0], "y_true is empty"),
        ([0.0, np.nan], TWO, "y_true is NaN or infinite at row 1"),
        ([np.inf, 0.0], TWO, "y_true is NaN or infinite at row 0"),
        ([0.0], TWO, r"y_true has shape \(1,\), expected \(2,\), the shape of prediction"),
        (0.0, TWO, r"y_true has shape \(\), expected \(2,\)"),
        ([[0.0, 1.0], [0.0, 1.0]], TWO, r"y_true has shape \(2, 2\), expected \(2,\)"),
        ([[0.0], [0.0, 1.0]], TWO, "y_true must be a regular array"),
        (["a", "b"], TWO, "y_true must hold numbers"),
        ([None, 1.0], TWO, "y_true is NaN or infinite at row 0"),
        (0.0, TWO[0], r"prediction needs batch shape \(n,\) or \(n, m\), got \(\)"),
        (np.zeros((2, 1, 1)), normal(np.zeros((2, 1, 1)), 1.0), r"got \(2, 1, 1\)"),
    ],
)
def test_bad_input_of_targets_is_named(name, y, d, message):
    with pytest.raises(DataError, match=f"^{name}: .*{message}"):
        TARGETS[name](y, d)


@pytest.mark.parametrize("name", TARGETS)
def test_a_single_column_is_taken_row_by_row(name):
    """Shapes (n, 1) and (n,) are the same n rows, never n x n pairs."""
    rng = np.random.default_rng(0)
    y, mean, scale = rng.normal(size=(3, 12))
    scale = 1 + scale**2
    flat, column = normal(mean, scale), normal(mean[:, None], scale[:, None])

    def value(y, d):
        return np.hstack([np.ravel(part) for part in np.atleast_1d(TARGETS[name](y, d))])

    expected = value(y, flat)
    for t, d in ((y, column), (y[:, None], flat), (y[:, None], column)):
        np.testing.assert_array_equal(value(t, d), expected)


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - BOTH))
@pytest.mark.parametrize(
    "d", [np.zeros(2), "x", None, CategoricalMixture(torch.zeros(1, 2, 3))], ids=type
)
def test_other_predictions_are_refused(name, d):
    message = f"^{name}: prediction must be a predictive distribution over real targets, got a "
    with pytest.raises(DataError, match=message):
        TARGETS[name]([0, 1], d)


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"pit_values", "pit_test"}))
@pytest.mark.parametrize("weight", [[1.0], [1.0, np.nan], [1.0, -1.0], [0, 0], ["a", "b"]])
def test_bad_weights_of_targets_are_named(name, weight):
    with pytest.raises(DataError, match=f"^{name}: sample_weight"):
        TARGETS[name]([0.0, 1.0], TWO, sample_weight=weight)


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"pit_test"}))
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "make", [lambda n: normal(np.zeros(n), 2.0), lambda n: Empirical(np.ones((4, n)))]
)
def test_one_row_and_constant_predictions_have_a_value(name, n, make):
    value = np.hstack([np.ravel(v) for v in np.atleast_1d(TARGETS[name](np.ones(n), make(n)))])
    if name == "negative_log_likelihood" and isinstance(make(n), Empirical):
        assert np.isnan(value).all()
    else:
        assert np.isfinite(value).all()


def test_a_single_column_of_targets_is_taken_as_one_output():
    y, d = [0.1, 0.2], NormalMixture(torch.zeros(1, 2, 1), torch.tensor(1.0))
    assert rmse(y, d) == rmse([[0.1], [0.2]], d) == rmse([[0.1], [0.2]], TWO)


# -- options -----------------------------------------------------------------------------------


ONE = [0.0], normal([0.0], 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pit_test(*ONE, n_bins=1), "pit_test: n_bins must be an integer >= 2, got 1"),
        (lambda: pit_test(*ONE, n_bins="a"), "got 'a'"),
        (lambda: pit_test(*ONE, n_bins=True), "got True"),
        (lambda: energy_score(*ONE, n_draws=1), "n_draws must be an integer >= 2, got 1"),
        (lambda: pinball_loss(*ONE, level=1), r"level must lie in \(0, 1\), got 1"),
        (lambda: pinball_loss(*ONE, level=[0.1, 0.9]), r"level must lie in .*got \[0.1, 0.9\]"),
        (lambda: interval_score(*ONE, coverage=0), r"coverage must lie in \(0, 1\), got 0"),
        (lambda: interval_coverage(*ONE, coverage=np.nan), "got nan"),
        (lambda: mean_interval_width(*ONE, coverage="90"), "got '90'"),
        (lambda: uncertainty_calibration_error(*ONE, n_bins=0), "n_bins must be .* >= 1, got 0"),
        (lambda: expected_normalized_calibration_error(*ONE, n_bins=None), "got None"),
        (lambda: calibration_test([0, 1], P, statistic="ece"), "one of 'smooth_calib.*got 'ece'"),
        (lambda: calibration_test([0, 1], P, n_draws=0), "n_draws must be an integer >= 1, got 0"),
        (lambda: calibration_test([0, 1], P, n_draws=9.5), "n_draws must be an integer"),
        (lambda: calibration_test([0, 1], P, kind="positive"), "needs two classes, got 3"),
        (lambda: calibration_test([0], [[0.5, 0.5]]), "two classes need kind="),
        (
            lambda: calibration_test(
                [0, 1], P, statistic="classwise_calibration_error", kind="top_label"
            ),
            "leave out kind='top_label'",
        ),
        (lambda: accuracy_at_coverage([0, 1], P, coverage=0.0), r"coverage must lie in \(0, 1\]"),
        (lambda: accuracy_at_coverage([0, 1], P, coverage=np.nan), "got nan"),
        (lambda: coverage_at_accuracy([0, 1], P, accuracy=1.1), r"accuracy must lie in \(0, 1\]"),
        (lambda: mmce([0, 1], P, kind="other"), "kind must be 'top_label' or 'positive', got 'oth"),
        (lambda: classwise_calibration_error([0, 1], P, n_bins=2.5), "n_bins must be an integer"),
        (lambda: expected_calibration_error([0, 1], P, bins="x"), "bins must be 'equal_width' or"),
    ],
)  # fmt: skip
def test_bad_options_are_named(call, message):
    with pytest.raises(ParameterError, match=message):
        call()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((20, 2), r"pit_test: expected one output, got 2, .*prediction\.output\(j\)"),
        ((9,), "pit_test: at least 10 rows are needed, got 9"),
    ],
)
def test_a_pit_test_needs_one_output_and_ten_rows(shape, message):
    with pytest.raises(DataError, match=message):
        pit_test(np.zeros(shape), normal(np.zeros(shape), 1.0))


@pytest.mark.parametrize(
    ("factor", "hint"), [(1.01, "rounded"), (100.0, "percent"), (3.0, "logits")]
)
def test_why_probabilities_do_not_sum_to_one(factor, hint):
    p = np.tile([0.3, 0.7], (4, 1)) * factor
    with pytest.raises(DataError, match=hint):
        brier_score([0, 1, 0, 1], p)


def test_half_precision_probabilities_are_taken():
    p = np.random.default_rng(0).dirichlet(np.ones(10), 50)
    y = np.arange(50) % 10
    rough = brier_score(y, p.astype(np.float16))
    assert rough == pytest.approx(brier_score(y, p), abs=2e-3)  # 2⁻¹¹ of each probability

"""Metrics of a predictive distribution on held-out labels, in the style of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from uq.calibration.definitions import (
    ACCURACY,
    BRIER,
    CRPS,
    ECE_BINS,
    NLL,
    QUANTILE_ERROR,
    RMSE,
    SHARPNESS,
    Metric,
    coverage_metric,
    ece_metric,
    width_metric,
)
from uq.calibration.rows import (
    ClassificationRows,
    Names,
    RegressionRows,
    Rows,
    as_array,
    check_weight,
    make_rows,
)
from uq.distributions import Predictive
from uq.errors import ParameterError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor


def _score(
    where: str,
    metric: Metric,
    rows_of: Callable[[Any, Any, Names], Rows],
    y_true: ArrayLike | Tensor,
    prediction: Predictive,
    sample_weight: ArrayLike | None,
) -> float:
    rows = rows_of(y_true, prediction, Names(where))
    return metric.value(rows, check_weight(where, sample_weight, len(rows.y)))


def negative_log_likelihood(
    y_true: ArrayLike | Tensor,
    prediction: Predictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Mean negative log predictive probability (classes) or density (targets).

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Labels, as in ``prediction.classes``, or targets.
    prediction : CategoricalMixture or NormalMixture
        Predictive distribution of the same rows.
    sample_weight : array-like of shape (n,), optional
        Row weights.

    Returns
    -------
    float
        Σ w_i (−log p(y_i)) / Σ w_i in nats; lower is better. Several outputs are scored jointly.
        Nothing is clipped: a label of probability 0 gives inf, with a RuntimeWarning.

    Raises
    ------
    DataError
        If shapes do not match, ``y_true`` holds NaN, or a label is not among the classes.

    See Also
    --------
    sklearn.metrics.log_loss : clips probabilities.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import negative_log_likelihood
    >>> from uq.distributions import CategoricalMixture
    >>> d = CategoricalMixture(torch.zeros(1, 2, 4), classes=["a", "b", "c", "d"])
    >>> round(negative_log_likelihood(["b", "d"], d), 4)  # log 4
    1.3863
    """
    where = "negative_log_likelihood"
    return _score(where, NLL, make_rows, y_true, prediction, sample_weight)


def brier_score(
    y_true: ArrayLike | Tensor,
    prediction: Predictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Mean squared distance of the class probabilities from the label.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        Labels, as in ``prediction.classes``.
    prediction : CategoricalMixture
        Predictive distribution of the same rows.
    sample_weight : array-like of shape (n,), optional
        Row weights.

    Returns
    -------
    float
        Mean Σ_k (p_k − y_k)² in [0, 2] for three classes and more; (p₁ − y)² in [0, 1], half of
        that sum, for two. Lower is better.

    See Also
    --------
    sklearn.metrics.brier_score_loss : the same convention since 1.7 (``scale_by_half="auto"``).

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import brier_score
    >>> from uq.distributions import CategoricalMixture
    >>> brier_score([0, 2], CategoricalMixture(torch.zeros(1, 2, 4)))  # 1 − 1/4
    0.75
    """
    return _score("brier_score", BRIER, ClassificationRows, y_true, prediction, sample_weight)


def accuracy(
    y_true: ArrayLike | Tensor,
    prediction: Predictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Share of rows whose most probable class is the label.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        Labels, as in ``prediction.classes``.
    prediction : CategoricalMixture
        Predictive distribution of the same rows.
    sample_weight : array-like of shape (n,), optional
        Row weights.

    Returns
    -------
    float
        In [0, 1]; higher is better. Of equally probable classes the first counts.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import accuracy
    >>> from uq.distributions import CategoricalMixture
    >>> d = CategoricalMixture(torch.tensor([[[0.9, 0.1], [0.2, 0.8]]]).log())
    >>> accuracy([0, 0], d)
    0.5
    """
    return _score("accuracy", ACCURACY, ClassificationRows, y_true, prediction, sample_weight)


def expected_calibration_error(
    y_true: ArrayLike | Tensor,
    prediction: Predictive,
    *,
    sample_weight: ArrayLike | None = None,
    n_bins: int = ECE_BINS,
    kind: Literal["top_label", "positive"] | None = None,
) -> float:
    """Mean gap between confidence and accuracy over equal-width bins of confidence.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        Labels, as in ``prediction.classes``.
    prediction : CategoricalMixture
        Predictive distribution of the same rows.
    sample_weight : array-like of shape (n,), optional
        Row weights.
    n_bins : int, default=15
        Number of bins B; a confidence p falls into bin min(⌊pB⌋, B − 1).
    kind : {"top_label", "positive"}, optional
        What is compared: the probability of the most probable class with being right, or the
        probability of ``classes[1]`` with being that class. Two classes need a choice, because
        the two differ; with more classes only ``"top_label"`` exists.

    Returns
    -------
    float
        Σ_b (n_b/n) |accuracy_b − confidence_b| in [0, 1]; lower is better. It is biased upwards on
        few rows: noise in a bin counts as a gap.

    Raises
    ------
    ParameterError
        If ``n_bins`` or ``kind`` cannot be used.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import expected_calibration_error
    >>> from uq.distributions import CategoricalMixture
    >>> d = CategoricalMixture(torch.tensor([[[0.05, 0.95], [0.0, 1.0]]]).log())
    >>> round(expected_calibration_error([1, 0], d, n_bins=10, kind="positive"), 3)
    0.475
    """
    where = "expected_calibration_error"
    if not isinstance(n_bins, int) or n_bins < 1:
        raise ParameterError(f"{where}: n_bins must be an integer >= 1, got {n_bins!r}.")
    if kind not in (None, "top_label", "positive"):
        raise ParameterError(f"{where}: kind must be 'top_label' or 'positive', got {kind!r}.")
    rows = ClassificationRows(y_true, prediction, Names(where))
    n_classes = rows.probs.shape[1]
    if n_classes == 2 and kind is None:
        raise ParameterError(
            f"{where}: two classes need kind='top_label' or kind='positive', which differ."
        )
    if n_classes != 2 and kind == "positive":
        raise ParameterError(f"{where}: kind='positive' needs two classes, got {n_classes}.")
    weight = check_weight(where, sample_weight, len(rows.y))
    return ece_metric(n_bins, kind or "top_label").value(rows, weight)


def crps(
    y_true: ArrayLike | Tensor,
    prediction: Predictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Mean continuous ranked probability score, exact for the mixture.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets.
    prediction : NormalMixture
        Predictive distribution of the same rows.
    sample_weight : array-like of shape (n,), optional
        Row weights.

    Returns
    -------
    float
        Mean ∫ (F(x) − 1[y ≤ x])² dx in target units, averaged over outputs; lower is better.

    See Also
    --------
    uq.distributions.NormalMixture.crps : the score of each row.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import crps
    >>> from uq.distributions import NormalMixture
    >>> round(crps([0.0], NormalMixture(torch.zeros(1, 1), torch.tensor(1.0))), 7)
    0.233695
    """
    return _score("crps", CRPS, RegressionRows, y_true, prediction, sample_weight)


def rmse(
    y_true: ArrayLike | Tensor,
    prediction: Predictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Root mean squared error of the predictive mean.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets.
    prediction : NormalMixture
        Predictive distribution of the same rows.
    sample_weight : array-like of shape (n,), optional
        Row weights.

    Returns
    -------
    float
        √ mean (y − E y)² in target units, the mean over rows and outputs; lower is better.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import rmse
    >>> from uq.distributions import NormalMixture
    >>> rmse([3.0, -3.0], NormalMixture(torch.zeros(1, 2), torch.tensor(1.0)))
    3.0
    """
    return _score("rmse", RMSE, RegressionRows, y_true, prediction, sample_weight)


def interval_coverage(
    y_true: ArrayLike | Tensor,
    prediction: Predictive,
    *,
    sample_weight: ArrayLike | None = None,
    coverage: float = 0.9,
) -> float:
    """Share of targets inside the equal-tailed predictive interval.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets.
    prediction : NormalMixture
        Predictive distribution of the same rows.
    sample_weight : array-like of shape (n,), optional
        Row weights.
    coverage : float, default=0.9
        Predictive mass of the interval, in (0, 1).

    Returns
    -------
    float
        In [0, 1]; right if equal to ``coverage``. The interval is closed; outputs are averaged.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import interval_coverage
    >>> from uq.distributions import NormalMixture
    >>> interval_coverage([0.0, 1.7], NormalMixture(torch.zeros(1, 2), torch.tensor(1.0)))
    0.5
    """
    where = "interval_coverage"
    metric = coverage_metric(_check_coverage(where, coverage))
    return _score(where, metric, RegressionRows, y_true, prediction, sample_weight)


def mean_interval_width(
    y_true: ArrayLike | Tensor,
    prediction: Predictive,
    *,
    sample_weight: ArrayLike | None = None,
    coverage: float = 0.9,
) -> float:
    """Mean width of the equal-tailed predictive interval.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets; only their shape is used, so that all metrics are called alike.
    prediction : NormalMixture
        Predictive distribution of the same rows.
    sample_weight : array-like of shape (n,), optional
        Row weights.
    coverage : float, default=0.9
        Predictive mass of the interval, in (0, 1).

    Returns
    -------
    float
        In target units, averaged over outputs; lower is better at equal coverage.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import mean_interval_width
    >>> from uq.distributions import NormalMixture
    >>> d = NormalMixture(torch.zeros(1, 2), torch.tensor(1.0))
    >>> round(mean_interval_width([0.0, 1.7], d), 3)
    3.29
    """
    where = "mean_interval_width"
    metric = width_metric(_check_coverage(where, coverage))
    return _score(where, metric, RegressionRows, y_true, prediction, sample_weight)


def sharpness(
    y_true: ArrayLike | Tensor,
    prediction: Predictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Root mean predictive variance.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets; only their shape is used, so that all metrics are called alike.
    prediction : NormalMixture
        Predictive distribution of the same rows.
    sample_weight : array-like of shape (n,), optional
        Row weights.

    Returns
    -------
    float
        √ mean Var y in target units, the mean over rows and outputs; lower is better among
        calibrated predictions.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import sharpness
    >>> from uq.distributions import NormalMixture
    >>> sharpness([0.0, 1.7], NormalMixture(torch.zeros(1, 2), torch.tensor(2.0)))
    2.0
    """
    return _score("sharpness", SHARPNESS, RegressionRows, y_true, prediction, sample_weight)


def pit_values(y_true: ArrayLike | Tensor, prediction: Predictive) -> NDArray[np.float64]:
    """Probability integral transform: the predictive cdf at each target.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets.
    prediction : NormalMixture
        Predictive distribution of the same rows.

    Returns
    -------
    ndarray of the shape of ``y_true``
        F_i(y_i) in [0, 1]: uniform for calibrated predictions, heaped at both ends for
        over-confident ones, in the middle for under-confident ones.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import pit_values
    >>> from uq.distributions import NormalMixture
    >>> pit_values([0.0], NormalMixture(torch.zeros(1, 1), torch.tensor(1.0)))
    array([0.5])
    """
    y = as_array(y_true)
    return RegressionRows(y, prediction, Names("pit_values")).pit.reshape(y.shape)


def quantile_calibration_error(
    y_true: ArrayLike | Tensor,
    prediction: Predictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Mean gap between quantile levels and the share of targets at or below the quantiles.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets.
    prediction : NormalMixture
        Predictive distribution of the same rows.
    sample_weight : array-like of shape (n,), optional
        Row weights.

    Returns
    -------
    float
        Mean over the levels q = 1, …, 99 % of |q − share of y ≤ quantile(q)|, averaged over
        outputs; in [0, 0.5], lower is better.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import quantile_calibration_error
    >>> from uq.distributions import NormalMixture
    >>> d = NormalMixture(torch.zeros(1, 3), torch.tensor(1.0))
    >>> round(quantile_calibration_error([9.0, 9.0, 9.0], d), 3)
    0.5
    """
    where = "quantile_calibration_error"
    return _score(where, QUANTILE_ERROR, RegressionRows, y_true, prediction, sample_weight)


def _check_coverage(where: str, coverage: float) -> float:
    if not 0 < coverage < 1:
        raise ParameterError(f"{where}: coverage must lie in (0, 1), got {coverage!r}.")
    return coverage

"""What the metrics are, as data: columns of each row and a function of their weighted means.

Every metric is a function of weighted means over rows: what a row contributes is computed once,

    value(w) = finish( Σ_i w_i c_i / Σ_i w_i ),    c_i = columns of row i,

so that sample weights cost nothing and all resamples of a bootstrap are one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from uq.calibration.rows import ClassificationRows, RegressionRows, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ECE_BINS = 15
LEVELS = np.arange(1, 100) / 100
COVERAGES = (0.5, 0.8, 0.9, 0.95)


def _single(means: Floats) -> Floats:
    return means[..., 0]


def _root(means: Floats) -> Floats:
    return np.sqrt(means[..., 0])


@dataclass(frozen=True)
class Definition:
    """What a report says about a number: key, title, one-line definition, which way is better."""

    name: str
    label: str
    definition: str
    better: Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Metric(Definition):
    """A metric as columns of each row and a function of their weighted means.

    Parameters
    ----------
    columns : callable
        Maps rows to an array (n, c).
    finish : callable
        Maps weighted means (..., c) to values (...).
    folded : bool
        Whether the metric adds up absolute deviations, which resampling inflates; the bootstrap
        then moves its replicates back to the value.
    share : bool
        Whether the metric is a share of rows, which resampling cannot vary where it is 0 or 1.
    """

    columns: Callable[[Any], Floats]
    finish: Callable[[Floats], Floats] = _single
    folded: bool = False
    share: bool = False

    def value(self, rows: Rows, weight: Floats) -> float:
        """Value under row weights of shape (n,)."""
        return float(self.finish(weighted_means(weight, self.columns(rows))))


def weighted_means(weights: Floats, columns: Floats) -> Floats:
    """Means (..., c) of ``columns`` (n, c) under ``weights`` (..., n); inf counts where w > 0."""
    infinite = np.isposinf(columns)
    total = weights.sum(-1, keepdims=True)
    if not infinite.any():
        means: Floats = weights @ columns / total
        return means
    means = weights @ np.where(infinite, 0.0, columns) / total
    return np.where(weights @ infinite.astype(np.float64) > 0, np.inf, means)


# -- what rows contribute ----------------------------------------------------------------------


def _mean_of(quantity: str) -> Callable[[Any], Floats]:
    """Mean over the outputs of the attribute ``quantity`` of the rows, as one column."""

    def columns(rows: Rows) -> Floats:
        values: Floats = getattr(rows, quantity)
        return values.reshape(len(values), -1).mean(1, keepdims=True)

    return columns


def _brier_columns(rows: ClassificationRows) -> Floats:
    p = rows.probs
    if p.shape[1] == 2:
        return np.square(p[:, 1:] - rows.y[:, None])
    error = p.copy()
    error[np.arange(len(p)), rows.y] -= 1
    return np.square(error).sum(1, keepdims=True)


def confidence_bins(confidence: Floats, n_bins: int) -> NDArray[np.int64]:
    """Bin min(⌊pB⌋, B − 1) of each confidence."""
    return np.minimum((confidence * n_bins).astype(np.int64), n_bins - 1)


def ece_metric(n_bins: int, kind: Literal["top_label", "positive"]) -> Metric:
    """Expected calibration error over ``n_bins`` equal-width bins."""

    def columns(rows: ClassificationRows) -> Floats:
        if kind == "top_label":
            outcome, p = rows.correct, rows.confidence
        else:
            outcome, p = rows.y.astype(np.float64), rows.probs[:, 1]
        gaps = np.zeros((len(p), n_bins))
        gaps[np.arange(len(p)), confidence_bins(p, n_bins)] = outcome - p
        return gaps

    return Metric(
        "expected_calibration_error",
        "Expected calibration error",
        f"top label, {n_bins} equal-width bins of confidence: Σ (n_b/n) |accuracy − confidence|",
        "lower",
        columns,
        lambda means: np.abs(means).sum(-1),
        folded=True,
    )


def _quantile_columns(rows: RegressionRows) -> Floats:
    below = rows.pit[:, :, None] <= LEVELS  # (n, m, levels)
    return below.reshape(len(below), -1).astype(np.float64)


def _quantile_finish(means: Floats) -> Floats:
    shares = means.reshape(*means.shape[:-1], -1, len(LEVELS))  # (..., m, levels)
    return np.abs(shares - LEVELS).mean((-2, -1))


def coverage_metric(coverage: float) -> Metric:
    """Share of targets inside the interval of ``coverage``."""
    tail = (1 - coverage) / 2

    def columns(rows: RegressionRows) -> Floats:
        # y lies in the equal-tailed interval where its PIT does: one cdf serves all levels.
        inside = (rows.pit >= tail) & (rows.pit <= 1 - tail)
        return inside.mean(1, keepdims=True)

    percent = f"{100 * coverage:g}"
    return Metric(
        f"coverage_{percent}",
        f"Coverage of {percent} % intervals",
        f"share of targets inside the equal-tailed interval; {coverage:g} is right",
        "",
        columns,
        share=True,
    )


def width_metric(coverage: float) -> Metric:
    """Mean width of the interval of ``coverage``."""
    percent = f"{100 * coverage:g}"
    return Metric(
        f"width_{percent}",
        f"Width of {percent} % intervals",
        "mean width of the equal-tailed interval, in target units",
        "",
        lambda rows: rows.width(coverage).mean(1, keepdims=True),
    )


NLL = Metric(
    "negative_log_likelihood",
    "Log score (NLL)",
    "mean −log p(y), in nats; joint over the outputs where there are several",
    "lower",
    _mean_of("neg_log"),
)
BRIER = Metric(
    "brier_score",
    "Brier score",
    "mean Σ_k (p_k − y_k)², from 0 to 2; for two classes (p₁ − y)², from 0 to 1",
    "lower",
    _brier_columns,
)
ACCURACY = Metric(
    "accuracy",
    "Accuracy",
    "share of rows whose most probable class is the label",
    "higher",
    _mean_of("correct"),
    share=True,
)
CRPS = Metric(
    "crps",
    "CRPS",
    "mean continuous ranked probability score, in target units, exact for the mixture",
    "lower",
    _mean_of("crps"),
)
RMSE = Metric(
    "rmse",
    "RMSE",
    "root mean squared error of the predictive mean, in target units",
    "lower",
    lambda rows: np.square(rows.error).mean(1, keepdims=True),
    _root,
)
QUANTILE_ERROR = Metric(
    "quantile_calibration_error",
    "Quantile calibration error",
    "mean over the levels 1 … 99 % of |level − share of targets at or below that quantile|",
    "lower",
    _quantile_columns,
    _quantile_finish,
    folded=True,
)
SHARPNESS = Metric(
    "sharpness",
    "Sharpness",
    "√ mean predictive variance, in target units",
    "",
    _mean_of("variance"),
    _root,
)

# Reports show the metrics in these groups and in this order.
CLASSIFICATION = {
    "Scores": (NLL, BRIER, ACCURACY),
    "Calibration": (
        ece_metric(ECE_BINS, "top_label"),
        Metric(
            "mean_confidence",
            "Mean confidence",
            "mean probability of the most probable class; it should equal the accuracy",
            "",
            _mean_of("confidence"),
        ),
    ),
    "Uncertainty": (
        Metric(
            "mean_aleatoric",
            "Aleatoric uncertainty",
            "mean entropy of the labels given the model, in nats",
            "",
            _mean_of("aleatoric"),
        ),
        Metric(
            "mean_epistemic",
            "Epistemic uncertainty",
            "mean mutual information of label and model, in nats; the two add up to the entropy",
            "",
            _mean_of("epistemic"),
        ),
    ),
}
REGRESSION = {
    "Scores": (NLL, CRPS, RMSE),
    "Calibration": (QUANTILE_ERROR, *map(coverage_metric, COVERAGES)),
    "Sharpness": (*map(width_metric, COVERAGES), SHARPNESS),
    "Uncertainty": (
        Metric(
            "mean_aleatoric",
            "Aleatoric uncertainty",
            "√ mean noise variance, in target units",
            "",
            _mean_of("aleatoric"),
            _root,
        ),
        Metric(
            "mean_epistemic",
            "Epistemic uncertainty",
            "√ mean variance of the mean over models; sharpness² is the sum of the two squares",
            "",
            _mean_of("epistemic"),
            _root,
        ),
    ),
}

"""The regression metrics, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uq.calibration.class_definitions import NLL
from uq.calibration.definitions import (
    MeanMetric,
    Metric,
    OneHot,
    RankMetric,
    equal_mass_bins,
    mean_of,
    ratio,
    root,
)
from uq.calibration.rows import RegressionRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEVELS = np.arange(1, 100) / 100
COVERAGES = (0.5, 0.8, 0.9, 0.95)
VARIANCE_BINS = 10


# -- scores ------------------------------------------------------------------------------------

CRPS = MeanMetric(
    "crps",
    "CRPS",
    "mean continuous ranked probability score, in target units",
    "lower",
    columns=mean_of("crps"),
)
RMSE = MeanMetric(
    "rmse",
    "RMSE",
    "root mean squared error of the predictive mean, in target units",
    "lower",
    columns=lambda rows, weight: np.square(rows.error).mean(1, keepdims=True),
    finish=root,
)
MAE = MeanMetric(
    "mae",
    "MAE",
    "mean absolute error of the predictive median, in target units",
    "lower",
    columns=mean_of("absolute_error"),
)


def pinball_metric(level: float) -> MeanMetric:
    """Pinball loss of one quantile."""

    def columns(rows: RegressionRows, weight: Any) -> Floats:
        above = rows.y - rows.quantile(level)
        return np.maximum(level * above, (level - 1) * above).mean(1, keepdims=True)

    return MeanMetric(
        f"pinball_{100 * level:g}",
        f"Pinball loss at {100 * level:g} %",
        "mean of q(y − quantile) above and (q − 1)(y − quantile) below it, in target units",
        "lower",
        columns=columns,
    )


def interval_score_metric(coverage: float) -> MeanMetric:
    """Winkler score of one interval."""

    def columns(rows: RegressionRows, weight: Any) -> Floats:
        lower, upper = rows.interval(coverage)
        missed = (lower - rows.y).clip(min=0) + (rows.y - upper).clip(min=0)
        return (upper - lower + 2 / (1 - coverage) * missed).mean(1, keepdims=True)

    percent = f"{100 * coverage:g}"
    return MeanMetric(
        f"interval_score_{percent}",
        f"Interval score at {percent} %",
        "mean width of the interval + 2/(1 − coverage) times the distance of targets outside it",
        "lower",
        columns=columns,
    )


# -- calibration -------------------------------------------------------------------------------


def _level_columns(rows: RegressionRows, weight: Any) -> Any:
    """One column for each step between two levels, so that sums over them are the shares below."""
    m = rows.y.shape[1]
    step = np.searchsorted(LEVELS, rows.least_level) + (len(LEVELS) + 1) * np.arange(m)
    return OneHot(step, m * (len(LEVELS) + 1), [1.0])


def _level_finish(means: Floats, total: float) -> Floats:
    steps = means.reshape(*means.shape[:-1], -1, len(LEVELS) + 1)  # (R, m, steps)
    return np.abs(steps[..., :-1].cumsum(-1) - LEVELS).mean((-2, -1))


def _level_null(rows: RegressionRows, rng: np.random.Generator, n_draws: int) -> Floats:
    n, m = rows.y.shape
    steps = len(LEVELS) + 1
    counts = rng.multinomial(n, np.full(steps, 1 / steps), size=(n_draws, m))
    return _level_finish(counts.reshape(n_draws, -1) / n, float(n))


QUANTILE_ERROR = MeanMetric(
    "quantile_calibration_error",
    "Quantile calibration error",
    "mean over the levels 1 … 99 % of |level − share of targets at or below that quantile|",
    "lower",
    _level_null,
    columns=_level_columns,
    finish=_level_finish,
)


def _variance_bins(rows: RegressionRows, weight: Floats, n_bins: int) -> NDArray[np.int64]:
    """Equal-mass bins (n, m) of the variance of each output, numbered on from output to output."""
    bins = [
        equal_mass_bins(rows.variance[:, j], weight, n_bins) + n_bins * j
        for j in range(rows.variance.shape[1])
    ]
    return np.stack(bins, 1)


def _ence(share: Floats, variance: Floats, square: Floats) -> Floats:
    full = share > 0
    deviation, error = np.sqrt(ratio(variance, share)), np.sqrt(ratio(square, share))
    gap = ratio(np.abs(deviation - error), deviation)
    # No multiple of a deviation of 0 is an error, unless that is 0 as well.
    return np.where((deviation == 0) & (error > 0), np.nan, gap).sum(-1) / full.sum(-1)


def _uce(share: Floats, variance: Floats, square: Floats) -> Floats:
    return np.abs(square - variance).sum(-1)


_NULL_ELEMENTS = 1 << 21


def variance_metric(
    name: str, label: str, definition: str, value: Any, n_bins: int = VARIANCE_BINS
) -> MeanMetric:
    """Metric of predicted variance and squared error over equal-mass bins of the variance."""

    def columns(rows: RegressionRows, weight: Floats) -> OneHot:
        m = rows.y.shape[1]
        # 0 · inf would be NaN also for rows without weight.
        unknown = np.where(weight[:, None] > 0, np.nan, 0.0)
        variance = np.where(np.isinf(rows.variance), unknown, rows.variance)
        values = [1.0 / m, variance / m, np.square(rows.error) / m]
        return OneHot(_variance_bins(rows, weight, n_bins), n_bins * m, values)

    def finish(means: Floats, total: float) -> Floats:
        return value(*np.split(means, 3, axis=-1))

    def null(rows: RegressionRows, rng: np.random.Generator, n_draws: int) -> Floats:
        import torch

        n, m = rows.y.shape
        bins = _variance_bins(rows, np.ones(n), n_bins).ravel()
        share = np.bincount(bins, minlength=n_bins * m) / (n * m)
        variance = np.bincount(bins, rows.variance.ravel(), n_bins * m) / (n * m)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        mean = rows.y - rows.error
        block = max(1, _NULL_ELEMENTS // rows.y.size)
        found = []
        for start in range(0, n_draws, block):
            shape = (min(block, n_draws - start),)
            drawn = rows.prediction.cpu().sample(shape, generator=generator).numpy()
            squares = np.square(drawn.reshape(-1, n, m) - mean)
            sums = [np.bincount(bins, s.ravel(), n_bins * m) for s in squares]
            found.append(value(share, variance, np.array(sums) / (n * m)))
        return np.concatenate(found)

    return MeanMetric(
        name,
        label,
        f"{definition}, {n_bins} equal-mass bins of variance",
        "lower",
        null,
        "a predictive variance is infinite, or 0 in a whole bin",
        columns=columns,
        finish=finish,
    )


def ence_metric(n_bins: int = VARIANCE_BINS) -> MeanMetric:
    """Expected normalised calibration error."""
    return variance_metric(
        "expected_normalized_calibration_error",
        "Variance error (ENCE)",
        "mean over bins of |deviation − RMSE|/deviation",
        _ence,
        n_bins,
    )


def uce_metric(n_bins: int = VARIANCE_BINS) -> MeanMetric:
    """Uncertainty calibration error."""
    return variance_metric(
        "uncertainty_calibration_error",
        "Variance error (UCE)",
        "Σ (n_b/n) |variance − mean squared error|, in squared target units",
        _uce,
        n_bins,
    )


def coverage_metric(coverage: float) -> MeanMetric:
    """Share of targets inside the interval of ``coverage``."""
    tail = (1 - coverage) / 2

    def columns(rows: RegressionRows, weight: Any) -> Floats:
        # y is at or above the lower quantile where F(y) >= tail: one cdf serves all levels.
        inside = (rows.pit >= tail) & (rows.least_level <= 1 - tail)
        return inside.mean(1, keepdims=True)

    percent = f"{100 * coverage:g}"
    return MeanMetric(
        f"coverage_{percent}",
        f"Coverage of {percent} % intervals",
        f"share of targets inside the equal-tailed interval; {coverage:g} is right",
        "",
        columns=columns,
        share=True,
        target=coverage,
    )


# -- sharpness ---------------------------------------------------------------------------------


def width_metric(coverage: float) -> MeanMetric:
    """Mean width of the interval of ``coverage``."""

    def columns(rows: RegressionRows, weight: Any) -> Floats:
        lower, upper = rows.interval(coverage)
        return (upper - lower).mean(1, keepdims=True)

    percent = f"{100 * coverage:g}"
    return MeanMetric(
        f"width_{percent}",
        f"Width of {percent} % intervals",
        "mean width of the equal-tailed interval, in target units",
        "",
        columns=columns,
    )


SHARPNESS = MeanMetric(
    "sharpness",
    "Sharpness",
    "√ mean predictive variance, in target units",
    "",
    columns=mean_of("variance"),
    finish=root,
)
SQUARED_AURC = RankMetric(
    "aurc",
    "AURC",
    "mean over k of the mean squared error among the k rows of least variance",
    "lower",
    statistic=lambda ranking: ranking.aurc,
)


def rmse_at_metric(coverage: float) -> RankMetric:
    """RMSE among the rows of least variance."""
    percent = f"{100 * coverage:g}"
    return RankMetric(
        f"rmse_at_{percent}",
        f"RMSE at {percent} % coverage",
        f"RMSE among the {percent} % of rows of least predictive variance, in target units",
        "lower",
        statistic=lambda ranking: np.sqrt(ranking.risk_at(coverage)),
    )


# Reports show the metrics in these sections and in this order.
REGRESSION: dict[str, tuple[Metric, ...]] = {
    "accuracy": (NLL, CRPS, RMSE, MAE, interval_score_metric(0.9)),
    "calibration": (QUANTILE_ERROR, ence_metric(), *map(coverage_metric, COVERAGES)),
    "sharpness": (
        *map(width_metric, COVERAGES),
        SHARPNESS,
        MeanMetric(
            "mean_aleatoric",
            "Aleatoric uncertainty",
            "√ mean noise variance, in target units",
            "",
            columns=mean_of("aleatoric"),
            finish=root,
        ),
        MeanMetric(
            "mean_epistemic",
            "Epistemic uncertainty",
            "√ mean variance of the mean over models; sharpness² is the sum of the two squares",
            "",
            undefined="the method has a single parameter value",
            columns=mean_of("epistemic"),
            finish=root,
        ),
    ),
    "awareness": (SQUARED_AURC, rmse_at_metric(0.5)),
}

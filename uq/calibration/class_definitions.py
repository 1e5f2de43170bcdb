"""The classification metrics, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from uq.calibration.definitions import (
    MeanMetric,
    Metric,
    OneHot,
    RankMetric,
    binned,
    draw_correct,
    equal_mass_bins,
    equal_width_bins,
    mean_of,
    ratio,
)
from uq.calibration.ranking import MAX_GROUPS
from uq.calibration.rows import ClassificationRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

N_BINS = 15
COVERAGE = 0.8  # of accuracy at coverage, in reports
_NO_ERRORS = "every label was predicted right, or every one wrong"

Kind = Literal["top_label", "positive"]
BinKind = Literal["equal_width", "equal_mass"]


# -- scores ------------------------------------------------------------------------------------


def _brier_columns(rows: ClassificationRows, weight: Any) -> Floats:
    p, at = rows.probs, np.arange(len(rows.y))
    if p.shape[1] == 2:
        return np.square(p[:, 1:] - rows.y[:, None], dtype=np.float64)
    squares = np.einsum("ij,ij->i", p, p, dtype=np.float64)
    return (squares - 2.0 * p[at, rows.y] + 1.0)[:, None]


NLL = MeanMetric(
    "negative_log_likelihood",
    "Log score (NLL)",
    "mean −log p(y), in nats; joint over the outputs where there are several",
    "lower",
    undefined="a distribution given by samples has no density",
    columns=mean_of("neg_log"),
)
BRIER = MeanMetric(
    "brier_score",
    "Brier score",
    "mean Σ_k (p_k − y_k)², from 0 to 2; for two classes (p₁ − y)², from 0 to 1",
    "lower",
    columns=_brier_columns,
)
ACCURACY = MeanMetric(
    "accuracy",
    "Accuracy",
    "share of rows whose most probable class is the label",
    "higher",
    columns=mean_of("correct"),
    share=True,
)


# -- calibration errors ------------------------------------------------------------------------


def _width(n_bins: int) -> Any:
    return lambda rows, weight: equal_width_bins(rows.confidence, n_bins)


def _mass(n_bins: int) -> Any:
    return lambda rows, weight: equal_mass_bins(rows.confidence, weight, n_bins)


def _mean_gap(share: Floats, confidence: Floats, correct: Floats, n: float) -> Floats:
    return np.abs(correct - confidence).sum(-1)


def _largest_gap(share: Floats, confidence: Floats, correct: Floats, n: float) -> Floats:
    found: Floats = ratio(np.abs(correct - confidence), share).max(-1)
    return found


def _debiased_gap(share: Floats, confidence: Floats, correct: Floats, n: float) -> Floats:
    accuracy = ratio(correct, share)
    # Squared gap less what chance adds to it; a bin of one row tells nothing of its chance.
    chance = ratio(accuracy * (1 - accuracy), (n * share - 1).clip(min=0))
    square = np.square(ratio(correct - confidence, share)) - chance
    square = np.where(n * share > 1 + 1e-9, share * square, 0.0).sum(-1)
    return np.sqrt(square.clip(min=0))


def ece_metric(n_bins: int = N_BINS, bins: BinKind = "equal_width") -> MeanMetric:
    """Expected calibration error of the top label."""
    wide = bins == "equal_width"
    kind = "equal-width" if wide else "equal-mass"
    return binned(
        "expected_calibration_error" if wide else "adaptive_calibration_error",
        "Expected calibration error" if wide else "Adaptive calibration error",
        f"top label, {n_bins} {kind} bins of confidence: Σ (n_b/n) |accuracy − confidence|",
        bins=_width(n_bins) if wide else _mass(n_bins),
        n_bins=n_bins,
        finish=_mean_gap,
    )


def mce_metric(n_bins: int = N_BINS) -> MeanMetric:
    """Largest gap of a bin."""
    return binned(
        "maximum_calibration_error",
        "Maximum calibration error",
        f"top label, {n_bins} equal-width bins: largest |accuracy − confidence| of a bin",
        bins=_width(n_bins),
        n_bins=n_bins,
        finish=_largest_gap,
    )


def debiased_metric(n_bins: int = N_BINS) -> MeanMetric:
    """Root mean squared gap, less what chance adds."""
    return binned(
        "debiased_calibration_error",
        "Debiased calibration error",
        f"top label, {n_bins} equal-mass bins: √ Σ (n_b/n) [(accuracy − confidence)² − what chance "
        "adds], 0 if negative",
        bins=_mass(n_bins),
        n_bins=n_bins,
        finish=_debiased_gap,
    )


GRID = 512


def _grid_columns(rows: ClassificationRows, weight: Any) -> Any:
    bins, shares = _split(rows.confidence)
    gap = rows.correct - rows.confidence
    return OneHot(bins, GRID, [shares * gap[:, None]])


def _split(p: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Nearest two grid cells of each confidence, and its share in each."""
    place = (p * GRID - 0.5).clip(0, GRID - 1)
    left = np.minimum(place.astype(np.int64), GRID - 2)
    right_share = place - left
    return np.stack([left, left + 1], 1), np.stack([1 - right_share, right_share], 1)


def smooth_error(residual: Floats, total: float = 0.0) -> Floats:
    """Smooth calibration error of mean residuals (R, GRID): the σ with ∫|K_σ ∗ residual| = σ.

    The reflected Gaussian kernel is diagonal in the cosine transform; the integral falls with σ.
    """
    from scipy.fft import dct, idct

    waves = dct(residual, axis=-1)
    decay = -0.5 * np.square(np.pi * np.arange(residual.shape[-1]))
    low, high = np.zeros(len(residual)), np.ones(len(residual))
    for _ in range(20):
        middle = (low + high) / 2
        smoothed = idct(waves * np.exp(decay * np.square(middle)[:, None]), axis=-1)
        above = np.abs(smoothed).sum(-1) > middle
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2


def _smooth_null(rows: ClassificationRows, rng: np.random.Generator, n_draws: int) -> Floats:
    bins, shares = _split(rows.confidence)
    pattern = OneHot(bins, GRID, [shares])
    expected = pattern.sums(rows.confidence[None]) / len(rows.y)
    return np.concatenate(
        [
            smooth_error(pattern.sums(correct) / len(rows.y) - expected)
            for correct in draw_correct(rows.confidence, rng, n_draws)
        ]
    )


SMOOTH = MeanMetric(
    "smooth_calibration_error",
    "Smooth calibration error",
    "top label, no bins: gap of accuracy and confidence smoothed by a Gaussian whose width is the "
    "error itself",
    "lower",
    _smooth_null,
    columns=_grid_columns,
    finish=smooth_error,
)


def _mmce_null(rows: ClassificationRows, rng: np.random.Generator, n_draws: int) -> Floats:
    ranking = rows.ranking.coarse(MAX_GROUPS)
    return np.concatenate(
        [ranking.gaps(correct).mmce() for correct in draw_correct(rows.confidence, rng, n_draws)]
    )


MMCE = RankMetric(
    "mmce",
    "Kernel error (MMCE)",
    "top label, no bins: √ mean over pairs of rows of (gap · gap′ · exp(−|confidence difference| "
    "/ 0.4))",
    "lower",
    _mmce_null,
    statistic=lambda ranking: ranking.mmce(),
)


def classwise_metric(n_bins: int = N_BINS) -> MeanMetric:
    """Mean over classes of the calibration error of the probability of that class."""

    def offsets(probs: Floats) -> NDArray[np.int64]:
        # Each class has its own block of columns.
        return n_bins * np.arange(probs.shape[1])

    def columns(rows: ClassificationRows, weight: Any) -> Any:
        p = rows.probs.astype(np.float64)
        gaps = -p
        gaps[np.arange(len(p)), rows.y] += 1
        # Most probabilities are in the first bin, which is what the others leave of the total.
        bins = equal_width_bins(p, n_bins)
        rest = np.where(bins == 0, 0.0, gaps)
        return gaps, OneHot(bins + offsets(p), n_bins * p.shape[1], [rest])

    def finish(means: Floats, total: float) -> Floats:
        n_classes = means.shape[-1] // (n_bins + 1)
        whole = means[..., :n_classes]
        bins = means[..., n_classes:].reshape(*whole.shape, n_bins)
        first = whole - bins.sum(-1)
        return (np.abs(bins).sum(-1) + np.abs(first)).mean(-1)

    def null(rows: ClassificationRows, rng: np.random.Generator, n_draws: int) -> Floats:
        p = rows.probs.astype(np.float64)
        n, size = len(p), n_bins * p.shape[1]
        place = equal_width_bins(p, n_bins) + offsets(p)
        expected = np.bincount(place.ravel(), p.ravel(), size)
        limits = p.cumsum(1)[:, :-1]
        counts = np.empty((n_draws, size))
        for i in range(n_draws):
            drawn = (rng.random((n, 1)) >= limits).sum(1)
            counts[i] = np.bincount(place[np.arange(n), drawn], minlength=size)
        gaps = ((counts - expected) / n).reshape(n_draws, p.shape[1], n_bins)
        error: Floats = np.abs(gaps).sum(-1).mean(-1)
        return error

    return MeanMetric(
        "classwise_calibration_error",
        "Classwise calibration error",
        f"mean over classes of Σ (n_b/n) |share of the class − its probability|, {n_bins} "
        "equal-width bins",
        "lower",
        null,
        columns=columns,
        finish=finish,
    )


# -- selective prediction ----------------------------------------------------------------------

MISCLASSIFICATION_AUROC = RankMetric(
    "misclassification_auroc",
    "AUROC of errors",
    "probability that a right prediction is more confident than a wrong one; a tie counts one half",
    "higher",
    undefined=_NO_ERRORS,
    statistic=lambda ranking: ranking.auroc(),
)
AURC = RankMetric(
    "aurc",
    "AURC",
    "mean over k of the risk among the k most confident rows",
    "lower",
    statistic=lambda ranking: ranking.aurc,
)
EXCESS_AURC = RankMetric(
    "excess_aurc",
    "Excess AURC",
    "AURC less that of an order with all errors last",
    "lower",
    statistic=lambda ranking: ranking.aurc - ranking.best_aurc(),
)
AUGRC = RankMetric(
    "augrc",
    "AUGRC",
    "mean over k of (errors among the k most confident rows)/n: risk of undetected errors",
    "lower",
    statistic=lambda ranking: ranking.augrc(),
)


def accuracy_at_metric(coverage: float) -> RankMetric:
    """Accuracy among the most confident share of rows."""
    percent = f"{100 * coverage:g}"
    return RankMetric(
        f"accuracy_at_{percent}",
        f"Accuracy at {percent} % coverage",
        f"accuracy among the {percent} % most confident rows",
        "higher",
        statistic=lambda ranking: 1 - ranking.risk_at(coverage),
    )


# Reports show the metrics in these sections and in this order.
CLASSIFICATION: dict[str, tuple[Metric, ...]] = {
    "accuracy": (NLL, BRIER, ACCURACY),
    "calibration": (
        ece_metric(),
        debiased_metric(),
        SMOOTH,
        MMCE,
        classwise_metric(),
        MeanMetric(
            "mean_confidence",
            "Mean confidence",
            "mean probability of the most probable class; it should equal the accuracy",
            "",
            columns=mean_of("confidence"),
        ),
    ),
    "sharpness": (
        MeanMetric(
            "mean_entropy",
            "Predictive entropy",
            "mean entropy of the predicted probabilities, in nats; 0 is certain, log K a guess",
            "",
            columns=mean_of("entropy"),
        ),
        MeanMetric(
            "mean_aleatoric",
            "Aleatoric uncertainty",
            "mean entropy of the labels given the model, in nats",
            "",
            columns=mean_of("aleatoric"),
        ),
        MeanMetric(
            "mean_epistemic",
            "Epistemic uncertainty",
            "mean mutual information of label and model, in nats; the two add up to the entropy",
            "",
            undefined="the method has a single parameter value",
            columns=mean_of("epistemic"),
        ),
    ),
    "awareness": (
        MISCLASSIFICATION_AUROC,
        AURC,
        EXCESS_AURC,
        AUGRC,
        accuracy_at_metric(COVERAGE),
    ),
}

"""The numbers behind reliability diagrams and PIT histograms.

Bands show where a calibrated method would fall 90 % of the time, by the binomial distribution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from uq.calibration.definitions import ECE_BINS, confidence_bins
from uq.calibration.rows import ClassificationRows, RegressionRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

Curve = dict[str, list[Any]]  # one list a column, one entry a bin

BAND = 0.9
PIT_BINS = 20


def reliability_curve(rows: ClassificationRows) -> Curve:
    """Count, mean confidence, accuracy and band of each bin of top-label confidence.

    Empty bins hold None.
    """
    bins = confidence_bins(rows.confidence, ECE_BINS)
    count = np.bincount(bins, minlength=ECE_BINS)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bins, rows.confidence, ECE_BINS) / count
        accuracy = np.bincount(bins, rows.correct, ECE_BINS) / count
    low, high = binomial_band(count, np.nan_to_num(confidence))
    full = count > 0
    edges = np.arange(ECE_BINS + 1) / ECE_BINS
    return {
        "left": edges[:-1].tolist(),
        "right": edges[1:].tolist(),
        "count": count.tolist(),
        "confidence": _where(full, confidence),
        "accuracy": _where(full, accuracy),
        "band_low": _where(full, low),
        "band_high": _where(full, high),
    }


def pit_curve(rows: RegressionRows) -> Curve:
    """Count, share and band of each of 20 bins of the PIT values, outputs pooled."""
    count, edges = np.histogram(rows.pit, PIT_BINS, (0.0, 1.0))
    # Outputs of a row may depend on one another, so the band counts rows, not values.
    low, high = binomial_band(np.full(PIT_BINS, len(rows.pit)), np.full(PIT_BINS, 1 / PIT_BINS))
    return {
        "left": edges[:-1].tolist(),
        "right": edges[1:].tolist(),
        "count": count.tolist(),
        "share": (count / count.sum()).tolist(),
        "band_low": low.tolist(),
        "band_high": high.tolist(),
    }


def binomial_band(
    count: NDArray[np.int64], share: NDArray[np.float64], risk: float = 1 - BAND
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares between which a binomial share falls except with probability ``risk``."""
    from scipy.stats import binom

    n = np.maximum(count, 1)
    low, high = (binom.ppf(q, n, share) / n for q in (risk / 2, 1 - risk / 2))
    return low, high


def _where(full: NDArray[np.bool_], values: NDArray[np.float64]) -> list[Any]:
    return [float(v) if ok else None for ok, v in zip(full, values, strict=True)]

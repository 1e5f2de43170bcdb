"""The numbers behind the diagrams of a report, as columns that JSON can hold.

Bands show where a calibrated method would fall 90 % of the time, by the binomial distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from uq.calibration.class_definitions import N_BINS
from uq.calibration.definitions import equal_width_bins
from uq.calibration.rows import ClassificationRows, RegressionRows, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Curve = dict[str, list[Any]]  # one list a column, one entry a bin or point

BAND = 0.9
PIT_BINS = 20
POINTS = 200  # of a curve, at most
SCORE_BINS = 30


def diagrams(rows: Rows) -> dict[str, Curve]:
    """All curves that need the held-out rows only, by name."""
    if isinstance(rows, ClassificationRows):
        found = {"reliability": reliability_curve(rows)}
    else:
        found = {"pit": pit_curve(rows), "coverage": coverage_curve(rows)}
    return {**found, "risk_coverage": risk_coverage(rows)}


def reliability_curve(rows: ClassificationRows) -> Curve:
    """Count, mean confidence, accuracy and band of each bin of top-label confidence.

    Empty bins hold None.
    """
    bins = equal_width_bins(rows.confidence, N_BINS)
    count = np.bincount(bins, minlength=N_BINS)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bins, rows.confidence, N_BINS) / count
        accuracy = np.bincount(bins, rows.correct, N_BINS) / count
    low, high = binomial_band(count, np.nan_to_num(confidence))
    full = count > 0
    edges = np.arange(N_BINS + 1) / N_BINS
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
    pit = rows.random_pit(np.random.default_rng(0))
    count, edges = np.histogram(pit, PIT_BINS, (0.0, 1.0))
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


def coverage_curve(rows: RegressionRows) -> Curve:
    """Share of targets inside the equal-tailed interval of each nominal coverage."""
    nominal = np.arange(5, 100, 5) / 100
    # The narrowest interval that holds y has coverage |2F(y) − 1|, where F does not jump.
    needed = np.maximum(1 - 2 * rows.pit, 2 * rows.least_level - 1).ravel()
    share = np.searchsorted(np.sort(needed), nominal, side="right") / needed.size
    low, high = binomial_band(np.full(len(nominal), len(rows.pit)), nominal)
    return {
        "nominal": nominal.tolist(),
        "share": share.tolist(),
        "band_low": low.tolist(),
        "band_high": high.tolist(),
    }


def risk_coverage(rows: Rows) -> Curve:
    """Error rate (classes) or RMSE (targets) among the most confident rows, by their share."""
    ranking = rows.ranking.under(np.ones((1, len(rows.y))))
    coverage = ranking.mass[0] / ranking.mass[0, -1]
    risk = ranking.loss[0] / ranking.mass[0]
    if isinstance(rows, RegressionRows):
        risk = np.sqrt(risk)
    # Thinned evenly in coverage; the first few rows alone are noise.
    keep = np.unique(np.searchsorted(coverage, np.linspace(1 / POINTS, 1, POINTS) - 1e-12))
    return {"coverage": coverage[keep].tolist(), "risk": risk[keep].tolist()}


def ood_curves(score_in: Floats, score_out: Floats) -> dict[str, Curve]:
    """ROC curve, and histograms of the scores of held-out and OOD rows in common bins."""
    from uq.calibration.ood import roc_curve

    fpr, tpr = roc_curve(score_in, score_out)
    both = np.concatenate([score_in, score_out])
    finite = both[np.isfinite(both)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, SCORE_BINS + 1)
    shares = [np.histogram(s.clip(low, high), edges)[0] / len(s) for s in (score_in, score_out)]
    return {
        "roc": {"fpr": fpr.tolist(), "tpr": tpr.tolist()},
        "scores": {
            "left": edges[:-1].tolist(),
            "right": edges[1:].tolist(),
            "held_out": shares[0].tolist(),
            "ood": shares[1].tolist(),
        },
    }


def binomial_band(
    count: NDArray[np.int64], share: Floats, risk: float = 1 - BAND
) -> tuple[Floats, Floats]:
    """Shares between which a binomial share falls except with probability ``risk``."""
    from scipy.stats import binom

    n = np.maximum(count, 1)
    low, high = (binom.ppf(q, n, share) / n for q in (risk / 2, 1 - risk / 2))
    return low, high


def _where(full: Sequence[bool] | NDArray[np.bool_], values: Floats) -> list[Any]:
    return [float(v) if ok else None for ok, v in zip(full, values, strict=True)]

"""What one constant prediction for all rows would score: the least that a method must beat."""

from __future__ import annotations

import math

import numpy as np

from uq.calibration.rows import ClassificationRows, RegressionRows, Rows


def constant_scores(rows: Rows) -> dict[str, float]:
    """Scores of the best constant prediction, by metric name.

    For classes the frequencies of the held-out labels; for targets their own distribution (CRPS),
    mean (RMSE), median (MAE) and the Normal of their moments (log score). It has seen the held-out
    labels, which flatters it a little.
    """
    return _class_scores(rows) if isinstance(rows, ClassificationRows) else _real_scores(rows)


def _class_scores(rows: ClassificationRows) -> dict[str, float]:
    share = np.bincount(rows.y, minlength=rows.probs.shape[1]) / len(rows.y)
    known = share[share > 0]
    brier = 1 - float(np.square(share).sum())
    return {
        "negative_log_likelihood": -float(known @ np.log(known)),
        "brier_score": brier / 2 if len(share) == 2 else brier,
        "accuracy": float(share.max()),
    }


def _real_scores(rows: RegressionRows) -> dict[str, float]:
    y = np.sort(rows.y, axis=0)
    n = len(y)
    deviation = y.std(0)
    # Half the mean difference between two targets: the CRPS of the targets' own distribution.
    rank = (2 * np.arange(1, n + 1) - n - 1)[:, None]
    return {
        "negative_log_likelihood": float(
            np.sum(np.log(deviation) + 0.5 * math.log(2 * math.pi * math.e))
            if (deviation > 0).all()
            else -np.inf
        ),
        "crps": float((rank * y).sum(0).mean() / n**2),
        "rmse": float(np.sqrt(np.square(deviation).mean())),
        "mae": float(np.abs(y - np.median(y, axis=0)).mean()),
    }

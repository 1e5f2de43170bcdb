"""What one constant prediction for all rows would score: the least that a method must beat."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from uq.calibration.rows import ClassificationRows, RegressionRows, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def constant_scores(rows: Rows) -> dict[str, float]:
    """Scores of the best constant prediction, by metric name.

    For classes the frequencies of the held-out labels; for targets their own distribution (CRPS),
    mean (RMSE), median (MAE) and the Normal of their moments (log score). It has seen the held-out
    labels, which flatters it a little.
    """
    scores = {name: float(loss.mean()) for name, loss in constant_losses(rows).items()}
    if isinstance(rows, ClassificationRows):
        share = _shares(rows)
        brier = 1 - float(np.square(share).sum())
        return {
            **scores,
            "brier_score": brier / 2 if len(share) == 2 else brier,
            "accuracy": float(share.max()),
        }
    y = rows.y
    return {
        **scores,
        "rmse": float(np.sqrt(y.var(0).mean())),
        "mae": float(np.abs(y - np.median(y, axis=0)).mean()),
    }


def constant_losses(rows: Rows) -> dict[str, Floats]:
    """Log score and (for targets) CRPS of the constant prediction at each row, shape (n,)."""
    if isinstance(rows, ClassificationRows):
        return {"negative_log_likelihood": -np.log(_shares(rows)[rows.y])}
    return {"negative_log_likelihood": _normal_losses(rows), "crps": _own_crps(rows)}


def _shares(rows: ClassificationRows) -> Floats:
    share: Floats = np.bincount(rows.y, minlength=rows.probs.shape[1]) / len(rows.y)
    return share


def _normal_losses(rows: RegressionRows) -> Floats:
    mean, deviation = rows.y.mean(0), rows.y.std(0)
    if not (deviation > 0).all():  # constant targets: a constant prediction cannot be beaten
        return np.full(len(rows.y), -np.inf)
    z = (rows.y - mean) / deviation
    loss: Floats = (0.5 * np.square(z) + np.log(deviation) + 0.5 * math.log(2 * math.pi)).sum(1)
    return loss


def _own_crps(rows: RegressionRows) -> Floats:
    """CRPS of the targets' own distribution, E|Y − y| − ½ E|Y − Y′|, mean over outputs."""
    n = len(rows.y)
    order = rows.y.argsort(0)
    y = np.take_along_axis(rows.y, order, 0)
    below = y.cumsum(0) - y  # Σ of smaller targets
    rank = np.arange(n)[:, None]
    distance = rank * y - below + (y.sum(0) - below - y) - (n - 1 - rank) * y
    spread = ((2 * rank + 1 - n) * y).sum(0) / n**2
    loss = np.empty_like(y)
    np.put_along_axis(loss, order, distance / n - spread, 0)
    found: Floats = loss.mean(1)
    return found

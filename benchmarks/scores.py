"""Scores of a predictive distribution on the test rows of a split, and the seconds it took."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from benchmarks.data import Split
from uq.calibration import (
    accuracy,
    auroc,
    brier_score,
    debiased_calibration_error,
    fpr_at_tpr,
    misclassification_auroc,
    ood_score,
    quantile_calibration_error,
)

Row = dict[str, Any]


def predicted(model: Any, X: np.ndarray) -> tuple[Any, float]:
    """The predictive distribution, and seconds."""
    start = time.perf_counter()
    dist = model.predict_distribution(X)
    _ = dist.mean if hasattr(dist, "crps") else dist.probs  # what is lazy is a part of it
    return dist, time.perf_counter() - start


def regression_scores(dist: Any, y: np.ndarray) -> Row:
    """NLL and CRPS in target units, coverage of the 90 % interval, error of the quantiles."""
    target = torch.as_tensor(y)
    lower, upper = (t.numpy() for t in dist.interval(0.9))
    found: Row = {
        "crps": float(dist.crps(target).mean()),
        "rmse": float(np.sqrt(np.mean((dist.mean.numpy() - y) ** 2))),
        "coverage_90": float(np.mean((lower <= y) & (y <= upper))),
        "width_90": float(np.mean(upper - lower)),
        "quantile_error": quantile_calibration_error(y, dist),
    }
    if dist.has_log_prob:
        found["nll"] = -float(dist.log_prob(target).double().mean())
    return found


def class_scores(dist: Any, y: np.ndarray) -> Row:
    """NLL in nats, Brier, debiased top-label calibration error, accuracy, AUROC of errors."""
    found = {
        "nll": -float(dist.log_prob(torch.as_tensor(y)).double().mean()),
        "brier": brier_score(y, dist),
        "ece_debiased": debiased_calibration_error(y, dist, kind="top_label"),
        "accuracy": accuracy(y, dist),
        "auroc_errors": misclassification_auroc(y, dist),
    }
    # None or all of the rows are wrong: there is nothing to rank.
    return {k: v for k, v in found.items() if not math.isnan(v)}


def score_regression(model: Any, data: Split, name: str, split: int) -> Row:
    """Scores of a fitted regressor."""
    dist, seconds = predicted(model, data.X_test)
    return regression_scores(dist, data.y_test) | {"predict_seconds": seconds}


def score_classes(model: Any, data: Split, name: str, split: int) -> Row:
    """Scores of a fitted classifier; of images, also of strange and of shifted ones."""
    dist, seconds = predicted(model, data.X_test)
    found = class_scores(dist, data.y_test) | {"predict_seconds": seconds}
    for strange, X in data.strange.items():
        scores = ood_score(dist), ood_score(model.predict_distribution(X))
        found[f"auroc_{strange}"] = auroc(*scores)
        found[f"fpr95_{strange}"] = fpr_at_tpr(*scores)
    for shift, X in data.shifted.items():
        moved = class_scores(model.predict_distribution(X), data.y_test[: len(X)])
        found |= {f"{metric}_{shift}": moved[metric] for metric in ("nll", "accuracy")}
    return found

"""Are the predicted probabilities right? Metrics, out-of-distribution detection, reports."""

from uq.calibration.metrics import (
    accuracy,
    brier_score,
    crps,
    expected_calibration_error,
    interval_coverage,
    mean_interval_width,
    negative_log_likelihood,
    pit_values,
    quantile_calibration_error,
    rmse,
    sharpness,
)
from uq.calibration.ood import aupr_in, aupr_out, auroc, fpr_at_tpr, ood_score
from uq.calibration.reporting import Report, compare, report

__all__ = [
    "Report",
    "accuracy",
    "aupr_in",
    "aupr_out",
    "auroc",
    "brier_score",
    "compare",
    "crps",
    "expected_calibration_error",
    "fpr_at_tpr",
    "interval_coverage",
    "mean_interval_width",
    "negative_log_likelihood",
    "ood_score",
    "pit_values",
    "quantile_calibration_error",
    "report",
    "rmse",
    "sharpness",
]

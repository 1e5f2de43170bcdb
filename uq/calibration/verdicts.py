"""What a report says in words: one sentence or two on each of the reader's questions.

A fault is stated only if a calibrated method would show it in less than one of twenty data sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from uq.calibration.baseline import constant_losses
from uq.calibration.bootstrap import Estimate
from uq.calibration.class_definitions import COVERAGE
from uq.calibration.curves import binomial_band
from uq.calibration.grouping import GroupTest, confidence_p_value
from uq.calibration.real_definitions import COVERAGES, coverage_metric
from uq.calibration.rows import ClassificationRows, RegressionRows, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RISK = 0.05
_NORMAL = NormalDist().inv_cdf(1 - RISK / 2)
_FEW = 30
_SLIGHT = 0.02  # a difference in probability that is real but hardly matters


def verdicts(
    rows: Rows, found: Mapping[str, Estimate], baseline: Mapping[str, float]
) -> dict[str, str]:
    """Sentences on one method, by section."""
    if isinstance(rows, ClassificationRows):
        said = {
            "accuracy": _right(found, baseline),
            "calibration": _confidence(rows, found),
            "sharpness": _entropy(rows, found),
            "awareness": _errors(found),
        }
    else:
        said = {
            "accuracy": _error(found, baseline),
            "calibration": " ".join([_coverage(rows, found), *_bias(rows)]),
            "sharpness": _width(rows, found),
            "awareness": _risk(found),
        }
    if "auroc" in found:
        said["awareness"] += " " + _ood(found["auroc"])
    return said | {"comparison": _against_baseline(rows, found, baseline)}


def fault(rows: Rows, found: Mapping[str, Estimate]) -> str:
    """What is wrong with the calibration beyond chance, in few words; "" for nothing."""
    if isinstance(rows, RegressionRows):
        off = _off_levels(rows, found)
        if not off:
            return ""
        _, level, share = max(off)
        return "intervals too narrow" if share < level else "intervals too wide"
    if confidence_p_value(rows) < RISK:
        gap = float((rows.confidence - rows.correct).mean())
        return "over-confident" if gap > 0 else "under-confident"
    p_value = found["expected_calibration_error"].p_value
    return "off at some levels" if p_value is not None and p_value < RISK else ""


def group_findings(tests: Sequence[GroupTest]) -> list[str]:
    """Name the groups whose calibration is off beyond chance, Bonferroni over all tests."""
    n = len(tests)
    several = len({test.method for test in tests}) > 1
    found = [
        f"{f'{t.method}, ' if several else ''}{t.group}: {t.seen} "
        f"(p {_p(min(1.0, t.p_value * n))}, corrected for {n} tests)."
        for t in tests
        if t.p_value * n <= RISK
    ]
    if tests and not found:
        return [f"No group's calibration is off beyond chance ({n} tests)."]
    return found


def _p(value: float) -> str:
    return "< 1e-15" if value < 1e-15 else f"= {value:.2g}"


# -- classification ----------------------------------------------------------------------------


def _right(found: Mapping[str, Estimate], baseline: Mapping[str, float]) -> str:
    e = found["accuracy"]
    often = f"the most frequent class alone would be {_percent(baseline['accuracy'])}"
    return f"{_percent(e.value)} of the labels are right ({_range(e, percent=True)}); {often}."


def _confidence(rows: ClassificationRows, found: Mapping[str, Estimate]) -> str:
    p = rows.confidence
    gap = float((p - rows.correct).mean())
    numbers = f"accuracy {rows.correct.mean():.3f} at mean confidence {p.mean():.3f}"
    e = found["expected_calibration_error"]
    tested = f"ECE {e.value:.3f}"
    if e.limit is not None:  # one row alone tests nothing
        tested += f", a calibrated method stays below {e.limit:.3f}"
    finding = fault(rows, found)
    if finding.endswith("confident"):
        return f"{_graded(finding, gap)}: {numbers} ({tested})."
    if finding and e.p_value is not None:
        return (
            f"Confidence is right on average ({numbers}), but not at every level: {tested} "
            f"(p {_p(e.p_value)})."
        )
    few = f", but {_few(len(p))}" if len(p) < _FEW else ""
    matches = "Confidence matches accuracy" if not few else "Nothing against the confidence"
    return f"{matches}: {numbers}; {tested}{few}."


def _entropy(rows: ClassificationRows, found: Mapping[str, Estimate]) -> str:
    most = float(np.log(rows.probs.shape[1]))
    sure = float((rows.confidence >= 0.9).mean())
    entropy = found["mean_entropy"].value
    return (
        f"{_percent(sure)} of the predictions have a confidence of 90 % or more; mean entropy "
        f"{entropy:.3f} nats of at most {most:.3f}."
    )


def _errors(found: Mapping[str, Estimate]) -> str:
    auroc, kept = found["misclassification_auroc"], found[f"accuracy_at_{100 * COVERAGE:g}"]
    if np.isnan(auroc.value):
        return f"Whether errors are less confident cannot be said: {auroc.note}."
    number = f"AUROC of errors {auroc.value:.3f}"
    then = (
        f"answering only the {100 * COVERAGE:.0f} % most confident gives an accuracy of "
        f"{kept.value:.3f}"
    )
    if auroc.low > 0.5:
        return f"Errors are less confident than right answers: {number}; {then}."
    return f"Confidence does not tell errors from right answers: {number}; {then}."


# -- regression --------------------------------------------------------------------------------


def _error(found: Mapping[str, Estimate], baseline: Mapping[str, float]) -> str:
    e = found["rmse"]
    explained = 1 - (e.value / baseline["rmse"]) ** 2 if baseline["rmse"] else float("nan")
    said = f"Typical error (RMSE) {_figures(e.value)} ({_range(e)}), in target units."
    if np.isnan(explained):
        return said
    return f"{said} That is {_percent(explained)} of the variance explained (R²)."


def _coverage(rows: RegressionRows, found: Mapping[str, Estimate]) -> str:
    """Judge the 90 % intervals, or the level that is farthest off if those are right."""
    n = len(rows.pit)
    off = _off_levels(rows, found)
    if not off:
        held = _holds(0.9, found[coverage_metric(0.9).name].value)
        if n < _FEW:
            return f"{held}: nothing against it, but {_few(n)}."
        return f"{held}: no further off than chance allows, like the other levels."
    _, level, share = max(off)
    finding = _graded("too narrow" if share < level else "too wide", share - level).lower()
    return f"{_holds(level, share)}: {finding}."


def _off_levels(
    rows: RegressionRows, found: Mapping[str, Estimate]
) -> list[tuple[float, float, float]]:
    """Levels whose intervals hold a share beyond chance: rank, level and share; 90 % goes first."""
    off = []
    for level in COVERAGES:  # each is allowed a part of the risk of a false alarm
        share = found[coverage_metric(level).name].value
        n = np.array([len(rows.pit)])
        (low,), (high,) = binomial_band(n, np.array([level]), risk=RISK / len(COVERAGES))
        if not low <= share <= high:
            distance = abs(share - level) / math.sqrt(level * (1 - level))
            off.append((math.inf if level == 0.9 else distance, level, share))
    return off


def _holds(level: float, share: float) -> str:
    return f"{100 * level:.0f} % intervals hold {100 * share:.1f} % of the held-out targets"


def _bias(rows: RegressionRows) -> list[str]:
    above = float((rows.pit > 0.5).mean())
    (low,), (high,) = binomial_band(np.array([len(rows.pit)]), np.array([0.5]), risk=RISK)
    if low <= above <= high:
        return []
    finding = _graded("low" if above > 0.5 else "high", above - 0.5).lower()
    return [f"Predictions run {finding}: {100 * above:.1f} % of the targets exceed the median."]


def _width(rows: RegressionRows, found: Mapping[str, Estimate]) -> str:
    width = found["width_90"].value
    spread = float(np.mean(np.quantile(rows.y, 0.95, axis=0) - np.quantile(rows.y, 0.05, axis=0)))
    said = f"90 % intervals are {width:.4g} wide on average, in target units"
    if not spread:
        return f"{said}."
    return f"{said}: {_percent(width / spread)} of the span that holds 90 % of all the targets."


def _risk(found: Mapping[str, Estimate]) -> str:
    whole, half = found["rmse"].value, found["rmse_at_50"]
    numbers = f"RMSE {half.value:.4g} on the half of least variance, {whole:.4g} on all"
    if half.high < whole:
        return f"Errors are smaller where the variance is: {numbers}."
    if half.low > whole:
        return f"Errors are larger where the variance is small: {numbers}."
    return f"The variance does not tell large errors from small ones: {numbers}."


# -- both --------------------------------------------------------------------------------------


def _ood(auroc: Estimate) -> str:
    number = f"AUROC {auroc.value:.3f}"
    if auroc.low > 0.5:
        return f"More uncertain on OOD inputs than on held-out ones: {number}."
    if auroc.high < 0.5:
        return f"Less uncertain on OOD inputs than on held-out ones: {number}."
    return f"Does not tell OOD inputs from held-out ones: {number}."


def _against_baseline(
    rows: Rows, found: Mapping[str, Estimate], baseline: Mapping[str, float]
) -> str:
    name, label, unit = "negative_log_likelihood", "log score", " nats"
    losses: Floats = rows.neg_log
    if np.isnan(found[name].value):
        name, label, unit = "crps", "CRPS", ""
        losses = rows.crps.mean(1) if isinstance(rows, RegressionRows) else losses
    numbers = f"{label} {found[name].value:.4g}{unit} against {baseline[name]:.4g}"
    gain = constant_losses(rows)[name] - losses
    noise = _NORMAL * float(gain.std()) / math.sqrt(len(gain)) if np.isfinite(gain).all() else 0.0
    if gain.mean() > noise:
        return f"Better than one constant prediction for all rows: {numbers}."
    if gain.mean() < -noise:
        return f"Worse than one constant prediction for all rows: {numbers}."
    return f"Not distinguishable from one constant prediction for all rows: {numbers}."


def _graded(finding: str, by: float) -> str:
    return f"Slightly {finding}" if abs(by) < _SLIGHT else finding.capitalize()


def _few(n: int) -> str:
    return "one row says little" if n == 1 else f"{n} rows are few"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(e: Estimate, *, percent: bool = False) -> str:
    if np.isnan(e.low):
        return "no interval"
    if percent:
        return f"{100 * e.low:.1f} to {100 * e.high:.1f} %"
    return f"{_figures(e.low)} to {_figures(e.high)}"


def _figures(x: float) -> str:
    """Four figures, zeros at the end too, so that the numbers of a range look alike."""
    return f"{x:#.4g}".rstrip(".")

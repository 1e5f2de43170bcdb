"""Plain-language findings, derived from the numbers of a report.

A finding is stated only if a calibrated method would show it in less than one of ten data sets.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from uq.calibration.bootstrap import INTERVAL, Estimate
from uq.calibration.curves import BAND, binomial_band
from uq.calibration.definitions import COVERAGES, coverage_metric
from uq.calibration.rows import ClassificationRows, RegressionRows, Rows

_STANDARD_ERRORS = NormalDist().inv_cdf((1 + INTERVAL) / 2)
_FEW = 30
_SLIGHT = 0.02  # a difference in probability that is real but hardly matters


def verdict(rows: Rows, estimates: dict[str, Estimate]) -> list[str]:
    """One or two sentences on calibration, and one on OOD inputs where there are any."""
    if isinstance(rows, ClassificationRows):
        sentences = [_confidence(rows)]
    else:
        held = {level: estimates[coverage_metric(level).name].value for level in COVERAGES}
        sentences = [_coverage(rows, held), *_bias(rows)]
    if "auroc" in estimates:
        sentences.append(_ood(estimates["auroc"]))
    return sentences


def summary(estimates: dict[str, dict[str, Estimate]]) -> str:
    """Which method has the best log score, and which cannot be told from it; "" for one method."""
    if len(estimates) == 1:
        return ""
    scores = {name: e["negative_log_likelihood"] for name, e in estimates.items()}
    best = [name for name, e in scores.items() if e.standing == "best"]
    tied = [name for name, e in scores.items() if e.standing == "tied"]
    found = f"Best log score: {', '.join(best)} ({scores[best[0]].value:.4g} nats)"
    return f"{found}; not distinguishable from it: {', '.join(tied)}." if tied else f"{found}."


def _confidence(rows: ClassificationRows) -> str:
    p = rows.confidence
    gap = float((p - rows.correct).mean())
    noise = _STANDARD_ERRORS * float(np.sqrt((p * (1 - p)).clip(min=0).sum())) / len(p)
    numbers = f"accuracy {rows.correct.mean():.3f} at mean confidence {p.mean():.3f}"
    if abs(gap) <= noise + 1e-12:
        return f"Confidence matches accuracy on average: {numbers}."
    finding = "over-confident" if gap > 0 else "under-confident"
    return f"{_graded(finding, gap)}: {numbers}."


def _coverage(rows: RegressionRows, held: dict[float, float]) -> str:
    """Judge the 90 % intervals, or the level that is farthest off if those are right."""
    n = len(rows.pit)
    off = []
    for level, share in held.items():  # each is allowed a quarter of the risk of a false alarm
        (low,), (high,) = binomial_band(
            np.array([n]), np.array([level]), risk=(1 - BAND) / len(held)
        )
        if not low <= share <= high:
            distance = abs(share - level) / np.sqrt(level * (1 - level))
            off.append((np.inf if level == 0.9 else distance, level, share))
    if not off:
        if n < _FEW:
            return f"{_holds(0.9, held[0.9])}: nothing against it, but {n} rows are few."
        return f"{_holds(0.9, held[0.9])}: within chance of right, like the other levels."
    _, level, share = max(off)
    finding = _graded("too narrow" if share < level else "too wide", share - level).lower()
    return f"{_holds(level, share)}: {finding}."


def _holds(level: float, share: float) -> str:
    return f"{100 * level:.0f} % intervals hold {100 * share:.1f} % of the held-out targets"


def _bias(rows: RegressionRows) -> list[str]:
    above = float((rows.pit > 0.5).mean())
    (low,), (high,) = binomial_band(np.array([len(rows.pit)]), np.array([0.5]))
    if low <= above <= high:
        return []
    finding = _graded("low" if above > 0.5 else "high", above - 0.5).lower()
    return [f"Predictions run {finding}: {100 * above:.1f} % of the targets exceed the median."]


def _ood(auroc: Estimate) -> str:
    number = f"AUROC {auroc.value:.3f}"
    if auroc.low > 0.5:
        return f"More uncertain on OOD inputs than on held-out ones: {number}."
    if auroc.high < 0.5:
        return f"Less uncertain on OOD inputs than on held-out ones: {number}."
    return f"Does not tell OOD inputs from held-out ones: {number}."


def _graded(finding: str, by: float) -> str:
    return f"Slightly {finding}" if abs(by) < _SLIGHT else finding.capitalize()

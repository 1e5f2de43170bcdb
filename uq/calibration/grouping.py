"""Reports by group of rows: does what holds on average hold for each of them?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from uq.calibration.bootstrap import Estimate, Resampling, estimates, sample_metrics
from uq.calibration.class_definitions import CLASSIFICATION
from uq.calibration.definitions import Metric
from uq.calibration.real_definitions import REGRESSION
from uq.calibration.rows import ClassificationRows, Names, RegressionRows, Rows
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_GROUPS = 50
_COVERAGE = "coverage_90"
_CLASS_METRICS = (
    "negative_log_likelihood",
    "accuracy",
    "mean_confidence",
    "expected_calibration_error",
)
_REAL_METRICS = ("negative_log_likelihood", "crps", "rmse", _COVERAGE, "width_90")

Grouping = dict[str, "NDArray[np.int64]"]  # positions of the rows, by group


@dataclass(frozen=True)
class Group:
    """Metrics of some of the rows.

    Attributes
    ----------
    grouping, label : str
        Which grouping, and which of its groups.
    n : int
        Number of rows.
    estimates : dict of str to dict of str to Estimate
        Value and interval, by method and metric.
    """

    grouping: str
    label: str
    n: int
    estimates: dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class GroupTest:
    """Whether a method's calibration is off in a group: a p-value, and what was seen."""

    method: str
    group: str
    p_value: float
    seen: str


def check_groups(where: str, groups: Any, n: int) -> dict[str, Grouping]:
    """Groupings as positions of rows, by name; groups in sorted order."""
    if groups is None:
        return {}
    if hasattr(groups, "columns") or isinstance(groups, Mapping):
        columns = {str(name): groups[name] for name in groups}
    else:
        columns = {str(getattr(groups, "name", None) or "group"): groups}
    return {name: _positions(where, name, column, n) for name, column in columns.items()}


def _positions(where: str, name: str, column: Any, n: int) -> Grouping:
    import pandas as pd

    labels = pd.Series(np.asarray(column) if not hasattr(column, "dtype") else column)
    if labels.shape != (n,):
        raise DataError(
            f"{where}: groups need a label for each of the {n} rows, but {name!r} has shape "
            f"{np.shape(column)}."
        )
    codes, levels = pd.factorize(labels, sort=True, use_na_sentinel=True)
    known = [str(level) for level in levels]
    if (codes < 0).any():
        codes, known = np.where(codes < 0, len(known), codes), [*known, "missing"]
    if len(known) > MAX_GROUPS:
        raise ParameterError(
            f"{where}: groups {name!r} have {len(known)} distinct labels, at most {MAX_GROUPS} can "
            "be shown; bin numbers with pandas.qcut(values, 4)."
        )
    return {label: np.flatnonzero(codes == i) for i, label in enumerate(known)}


def group_reports(
    rows: Mapping[str, Rows], groupings: Mapping[str, Grouping], settings: Resampling
) -> tuple[list[Group], list[GroupTest]]:
    """Metrics of every group for every method, and tests of their calibration."""
    found = [
        _group(grouping, label, {m: _take(r, at) for m, r in rows.items()}, settings)
        for grouping, groups in groupings.items()
        for label, at in groups.items()
    ]
    return [group for group, _ in found], [test for _, tests in found for test in tests]


def outputs_as_groups(
    rows: Mapping[str, Rows], settings: Resampling
) -> tuple[list[Group], list[GroupTest]]:
    """Metrics of each of several outputs, which may have different units."""
    targets = {m: r for m, r in rows.items() if isinstance(r, RegressionRows)}
    n_outputs = next((r.y.shape[1] for r in targets.values()), 1)
    if n_outputs < 2:
        return [], []
    found = [
        _group(
            "output",
            str(j),
            {
                m: RegressionRows(r.y[:, j], r.prediction.output(j), Names("report"))
                for m, r in targets.items()
            },
            settings,
        )
        for j in range(n_outputs)
    ]
    return [group for group, _ in found], [test for _, tests in found for test in tests]


def _group(
    grouping: str, label: str, rows: Mapping[str, Rows], settings: Resampling
) -> tuple[Group, list[GroupTest]]:
    first = next(iter(rows.values()))
    metrics = _metrics(first)
    each = list(rows.values())
    sampled = sample_metrics(each, metrics, settings)
    found = dict(zip(rows, estimates(sampled, metrics, settings, each), strict=True))
    name = f"{grouping} {label}"
    tests = [_test(method, name, r, found[method]) for method, r in rows.items()]
    return Group(grouping, label, len(first.y), found), [t for t in tests if t is not None]


def _metrics(rows: Rows) -> list[Metric]:
    classes = isinstance(rows, ClassificationRows)
    names = _CLASS_METRICS if classes else _REAL_METRICS
    sections: Mapping[str, Any] = CLASSIFICATION if classes else REGRESSION
    known = {metric.name: metric for section in sections.values() for metric in section}
    return [known[name] for name in names]


def _take(rows: Rows, at: NDArray[np.int64]) -> Rows:
    names = Names("report")
    if isinstance(rows, RegressionRows):
        y = rows.y if rows.prediction.batch_shape[1:] else rows.y[:, 0]
        return RegressionRows(y[at], rows.prediction[at], names)
    if rows.prediction is not None:
        return ClassificationRows(rows.classes[rows.y[at]], rows.prediction[at], names)
    import pandas as pd

    probs = pd.DataFrame(rows.probs[at], columns=rows.classes)
    return ClassificationRows(rows.classes[rows.y[at]], probs, names)


def _test(method: str, group: str, rows: Rows, found: Mapping[str, Estimate]) -> GroupTest | None:
    if isinstance(rows, RegressionRows):
        e = found[_COVERAGE]
        if e.p_value is None:  # outputs of a row depend on one another: no exact test
            return None
        seen = f"90 % intervals hold {100 * e.value:.1f} % of {len(rows.y)} targets"
        return GroupTest(method, group, e.p_value, seen)
    seen = (
        f"accuracy {rows.correct.mean():.3f} at mean confidence {rows.confidence.mean():.3f} "
        f"({len(rows.y)} rows)"
    )
    return GroupTest(method, group, confidence_p_value(rows), seen)


_EXACT_ROWS = 1000


def confidence_p_value(rows: ClassificationRows) -> float:
    """Two-sided p-value of the number of right rows, if each is right with its confidence.

    By the Poisson-binomial distribution, and its normal limit where rows are many.
    """
    from scipy.stats import norm, poisson_binom

    p, right = rows.confidence.clip(0, 1), int(rows.correct.sum())
    if len(p) <= _EXACT_ROWS:
        law = poisson_binom(p)
        at_most, at_least = law.cdf(right), 1 - (law.cdf(right - 1) if right else 0.0)
        return float(min(1.0, 2 * min(at_most, at_least)))
    variance = float((p * (1 - p)).sum())
    gap = right - float(p.sum())
    if variance == 0:
        return float(abs(gap) < 0.5)
    return float(2 * norm.sf(max(abs(gap) - 0.5, 0.0) / np.sqrt(variance)))

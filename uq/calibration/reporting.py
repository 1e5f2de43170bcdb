"""Reports: what held-out rows say of one or several methods, each number with its interval."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from uq.calibration.baseline import constant_scores
from uq.calibration.bootstrap import (
    Difference,
    Estimate,
    Resampling,
    differences,
    estimates,
    sample_metrics,
    sample_ood,
    standings,
)
from uq.calibration.class_definitions import CLASSIFICATION
from uq.calibration.curves import diagrams, ood_curves
from uq.calibration.definitions import Definition, Metric
from uq.calibration.grouping import check_groups, group_reports, outputs_as_groups
from uq.calibration.memo import ranking, recommendation, summary
from uq.calibration.ood import OOD_METRICS, check_scores, ood_score
from uq.calibration.real_definitions import REGRESSION
from uq.calibration.report_data import MethodReport, Report
from uq.calibration.rows import ClassificationRows, Names, Rows, make_rows
from uq.calibration.verdicts import fault, group_findings, verdicts
from uq.distributions import Predictive, RealPredictive
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike
    from torch import Tensor


def report(
    prediction: Predictive | Any,
    y: ArrayLike | Tensor,
    *,
    ood: Predictive | None = None,
    groups: Any = None,
    name: str = "model",
    title: str | None = None,
    notes: Mapping[str, Any] | None = None,
    diagnostics: tuple[pd.DataFrame, Sequence[str]] | None = None,
    interval: float = 0.95,
    n_resamples: int = 1000,
    random_state: int = 0,
) -> Report:
    """Judge one predictive distribution on held-out labels.

    Parameters
    ----------
    prediction : Predictive, or class probabilities of shape (n, n_classes)
        Predictive distribution of the held-out rows. The columns of an array are the labels
        0, 1, …, those of a DataFrame are named by them.
    y : array-like of shape (n,) or (n, m)
        Their labels or targets; rows that neither training nor recalibration has seen.
    ood : Predictive, optional
        Predictive distribution of inputs from elsewhere; adds how well they are told apart.
    groups : array-like of shape (n,), dict or DataFrame of such, optional
        Group of each row (site, sex, year, …); adds a table by group, and names groups whose
        calibration is off beyond chance. At most 50 groups; bin numbers with ``pandas.qcut``.
    name : str, default="model"
        What to call the method.
    title : str, optional
        Heading of the report.
    notes : dict, optional
        Anything to print with it: data set, training size, seconds. Values that are dicts by
        method are fine.
    diagnostics : tuple of DataFrame and sequence of str, optional
        Numbers that say how sampling went, a row for each quantity, and warnings; what the
        ``diagnostics`` method of a sampling estimator gives. Adds a section.
    interval : float, default=0.95
        Coverage of the intervals, in (0, 1).
    n_resamples : int, default=1000
        Bootstrap resamples of the rows, >= 100.
    random_state : int, default=0
        Seed of the resamples.

    Returns
    -------
    Report
        Every number with its interval, findings in words, diagrams.

    Raises
    ------
    DataError
        If shapes do not match, ``y`` holds NaN, or a label is not among the classes.
    ParameterError
        If ``interval``, ``n_resamples`` or ``groups`` cannot be used.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import report
    >>> from uq.distributions import NormalMixture
    >>> y = torch.linspace(-2, 2, 101)
    >>> r = report(NormalMixture(torch.zeros(1, 101), torch.tensor(1.0)), y)
    >>> r.methods["model"].verdicts["calibration"]
    '80 % intervals hold 64.4 % of the held-out targets: too narrow.'
    >>> print(r.to_frame()["rmse"].round(3).to_dict())
    {'model': 1.166}
    """
    labels = {name: Names("report", "y", "prediction")}
    settings = Resampling(interval, n_resamples, random_state)
    ood_by_name = None if ood is None else {name: ood}
    shown = {} if diagnostics is None else _diagnostic_texts(diagnostics)
    made = _make({name: prediction}, y, ood_by_name, groups, labels, title, notes, settings, {})
    return replace(made, diagnostics=shown)


def compare(
    predictions: Mapping[str, Predictive | Any],
    y: ArrayLike | Tensor,
    *,
    ood: Mapping[str, Predictive] | None = None,
    groups: Any = None,
    fit_seconds: Mapping[str, float] | None = None,
    title: str | None = None,
    notes: Mapping[str, Any] | None = None,
    interval: float = 0.95,
    n_resamples: int = 1000,
    random_state: int = 0,
) -> Report:
    """Judge several methods on the same held-out labels, side by side.

    The best method of each metric is marked, and those that a paired bootstrap of the difference
    cannot tell from it: the same resampled rows for all, and intervals that hold for all pairs of
    methods of a metric together, so that more methods do not make more false findings.

    Parameters
    ----------
    predictions : dict of str to Predictive, or to class probabilities of shape (n, n_classes)
        Predictive distribution of the held-out rows, by method.
    y : array-like of shape (n,) or (n, m)
        Their labels or targets; rows that neither training nor recalibration has seen.
    ood : dict of the same keys, optional
        Predictive distributions of inputs from elsewhere, the same for all methods.
    fit_seconds : dict of str to float, optional
        Seconds that each method took to fit; they decide between methods that the score cannot
        tell apart.
    groups, title, notes, interval, n_resamples, random_state
        As for :func:`report`.

    Returns
    -------
    Report
        Every number with its interval, findings in words, diagrams, and a table of wins, ties and
        losses.

    Raises
    ------
    DataError
        If shapes do not match, tasks are mixed, ``y`` holds NaN, or a label is not among the
        classes.
    ParameterError
        If there is nothing to compare, ``ood`` has other keys, or ``interval``, ``n_resamples`` or
        ``groups`` cannot be used.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import compare
    >>> from uq.distributions import CategoricalMixture
    >>> sure = CategoricalMixture(torch.tensor([[[0.0, 3.0], [3.0, 0.0]] * 50]))
    >>> unsure = CategoricalMixture(torch.zeros(1, 100, 2))
    >>> r = compare({"sure": sure, "unsure": unsure}, [1, 0] * 50)
    >>> r.to_frame()["brier_score"].round(4).to_dict()
    {'sure': 0.0022, 'unsure': 0.25}
    >>> r.summary
    'Best log score: sure (0.04859 nats).'
    """
    if not isinstance(predictions, Mapping) or not predictions:
        raise ParameterError(
            "compare: predictions must be a dict {name: distribution} with at least one entry, "
            f"got {predictions!r:.80}."
        )
    names = {str(name): Names("compare", "y", f"predictions[{name!r}]") for name in predictions}
    if ood is not None and (not isinstance(ood, Mapping) or set(ood) != set(predictions)):
        got = sorted(map(str, ood)) if isinstance(ood, Mapping) else type(ood).__name__
        raise ParameterError(
            f"compare: ood must be a dict with the names of predictions, {sorted(predictions)}, "
            f"got {got}."
        )
    settings = Resampling(interval, n_resamples, random_state)
    by_name = {str(name): p for name, p in predictions.items()}
    ood_by_name = None if ood is None else {str(name): p for name, p in ood.items()}
    seconds = _checked_seconds(fit_seconds or {}, by_name)
    return _make(by_name, y, ood_by_name, groups, names, title, notes, settings, seconds)


def _make(
    predictions: Mapping[str, Any],
    y: ArrayLike | Tensor,
    ood: Mapping[str, Any] | None,
    groups: Any,
    names: Mapping[str, Names],
    title: str | None,
    notes: Mapping[str, Any] | None,
    settings: Resampling,
    seconds: Mapping[str, float],
) -> Report:
    where = next(iter(names.values())).where
    settings.check(where)
    rows = _checked_rows(predictions, y, names, where)
    first = next(iter(rows.values()))
    classification = isinstance(first, ClassificationRows)
    groupings = check_groups(where, groups, len(first.y))
    chosen: Mapping[str, Sequence[Metric]] = CLASSIFICATION if classification else REGRESSION
    sections: dict[str, list[Definition]] = {name: list(part) for name, part in chosen.items()}
    curves = {name: diagrams(r) for name, r in rows.items()}
    metrics = [metric for part in chosen.values() for metric in part]
    found, compared = _judge(list(rows.values()), list(rows), metrics, settings)
    n_ood = 0
    if ood is not None:
        scores = _ood_scores(predictions, ood, where)
        n_ood = len(next(iter(scores.values()))[1])
        for name, (familiar, out) in scores.items():
            curves[name] |= ood_curves(familiar, out)
        of_ood, also = _judge_ood(scores, settings)
        found = [a | b for a, b in zip(found, of_ood, strict=True)]
        compared += also
        sections["awareness"] += OOD_METRICS
    baseline = constant_scores(first)
    methods = {
        name: MethodReport(verdicts(r, e, baseline), e, curves[name])
        for (name, r), e in zip(rows.items(), found, strict=True)
    }
    by_group, tests = group_reports(rows, groupings, settings)
    by_output, more = outputs_as_groups(rows, settings)
    by_method = {name: m.estimates for name, m in methods.items()}
    faults = {name: fault(r, by_method[name]) for name, r in rows.items()}
    order = ranking(by_method, compared, faults, seconds)
    return Report(
        title=title or f"Predictive uncertainty: {', '.join(methods)}",
        task="classification" if classification else "regression",
        n=len(first.y),
        n_ood=n_ood,
        summary=summary(by_method),
        sections={
            name: [Definition(d.name, d.label, d.definition, d.better) for d in metrics]
            for name, metrics in sections.items()
        },
        methods=methods,
        baseline=baseline,
        differences=compared,
        groups=by_group + by_output,
        group_findings=group_findings(tests + more),
        resampling=settings,
        notes=dict(notes or {}),
        versions=_versions(),
        ranking=order,
        recommendation=recommendation(order, by_method, compared, baseline),
    )


def _checked_seconds(seconds: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    found = {str(name): float(value) for name, value in seconds.items()}
    unknown = sorted(set(found) - set(names))
    if unknown or not all(value >= 0 for value in found.values()):
        raise ParameterError(
            f"compare: fit_seconds must be numbers from 0 on by the names of predictions, got "
            f"{dict(seconds)!r:.80}."
        )
    return found


def _diagnostic_texts(diagnostics: Any) -> dict[str, Any]:
    """Numbers as texts: they may be NaN, and counts look like counts."""
    try:
        table, warnings = diagnostics
        columns = [str(c) for c in table.columns]
        body = table.to_numpy(dtype=float)
        labels = [str(label) for label in table.index]
        said = [str(w) for w in ([warnings] if isinstance(warnings, str) else warnings)]
    except (TypeError, ValueError, AttributeError) as error:
        raise ParameterError(
            "report: diagnostics must be a pair of a DataFrame of numbers and a sequence of "
            f"warnings, got {type(diagnostics).__name__} ({error})."
        ) from error
    rows = [
        [label, *("" if math.isnan(v) else f"{v:.4g}" for v in line)]
        for label, line in zip(labels, body, strict=True)
    ]
    return {"columns": columns, "rows": rows, "warnings": said}


def _checked_rows(
    predictions: Mapping[str, Any], y: Any, names: Mapping[str, Names], where: str
) -> dict[str, Rows]:
    if len({isinstance(p, RealPredictive) for p in predictions.values()}) > 1:
        kinds = {name: type(p).__name__ for name, p in predictions.items()}
        raise DataError(f"{where}: predictions mix tasks: {kinds}; compare one task at a time.")
    rows = {name: make_rows(y, p, names[name]) for name, p in predictions.items()}
    for name, p in predictions.items():
        _check_order(where, names[name].prediction, getattr(y, "index", None), p)
    return rows


def _check_order(where: str, name: str, index: Any, prediction: Any) -> None:
    """Refuse labels whose index holds the rows of the prediction in another order."""
    other: Any = getattr(prediction, "index", None)
    if not hasattr(other, "equals") or not hasattr(index, "equals") or index.equals(other):
        return
    if index.sort_values().equals(other.sort_values()):
        raise DataError(
            f"{where}: y and {name} hold the same rows in different orders, by their pandas index; "
            "reorder y with y.loc[prediction.index], or drop its index with y.to_numpy()."
        )


def _judge(
    rows: list[Rows],
    names: list[str],
    metrics: list[Metric],
    settings: Resampling,
) -> tuple[list[dict[str, Estimate]], list[Difference]]:
    sampled = sample_metrics(rows, metrics, settings)
    found = estimates(sampled, metrics, settings, rows)
    compared = differences(sampled, metrics, names, settings)
    return _with_standings(found, compared, metrics, names), compared


def _judge_ood(
    scores: Mapping[str, tuple[Any, Any]], settings: Resampling
) -> tuple[list[dict[str, Estimate]], list[Difference]]:
    familiar, out = zip(*scores.values(), strict=True)
    sampled = sample_ood(familiar, out, settings)
    found = estimates(sampled, OOD_METRICS, settings)
    compared = differences(sampled, OOD_METRICS, list(scores), settings)
    return _with_standings(found, compared, OOD_METRICS, list(scores)), compared


def _with_standings(
    found: list[dict[str, Estimate]],
    compared: list[Difference],
    definitions: Sequence[Definition],
    names: list[str],
) -> list[dict[str, Estimate]]:
    for d in definitions:
        values = {name: e[d.name].value for name, e in zip(names, found, strict=True)}
        standing = standings(compared, d, values)
        for name, e in zip(names, found, strict=True):
            e[d.name] = replace(e[d.name], standing=standing[name])
    return found


def _ood_scores(
    predictions: Mapping[str, Any], ood: Mapping[str, Any], where: str
) -> dict[str, tuple[Any, Any]]:
    """Scores of the held-out and of the OOD rows, by method."""
    scores = {}
    for name, prediction in predictions.items():
        argument = "ood" if where == "report" else f"ood[{name!r}]"
        if type(ood[name]) is not type(prediction):
            raise DataError(
                f"{where}: {argument} must be a {type(prediction).__name__} like the prediction "
                f"of the held-out rows, got a {type(ood[name]).__name__}."
            )
        if not isinstance(prediction, Predictive):
            raise DataError(
                f"{where}: {argument} needs predictive distributions, which have an uncertainty "
                "score; make them with CategoricalMixture(log_probabilities[None])."
            )
        out = check_scores(f"{where}: the score of {argument}", ood_score(ood[name]))
        scores[name] = ood_score(prediction), out
    sizes = {name: len(out) for name, (_, out) in scores.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{where}: ood needs the same rows for all methods, got {sizes} rows.")
    return scores


def _versions() -> dict[str, str]:
    import uq

    packages = {p: version(p) for p in ("torch", "pyro-ppl", "numpy", "scipy")}
    return {"uq": uq.__version__, "python": platform.python_version(), **packages}

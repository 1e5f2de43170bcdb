"""Reports: what held-out rows say of one or several methods, each number with its interval."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

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
from uq.calibration.curves import Curve, diagrams, ood_curves
from uq.calibration.definitions import Definition, Metric
from uq.calibration.grouping import Group, check_groups, group_reports, outputs_as_groups
from uq.calibration.memo import Standing, ranking, recommendation, summary
from uq.calibration.ood import OOD_METRICS, check_scores, ood_score
from uq.calibration.real_definitions import REGRESSION
from uq.calibration.rendering import to_html, to_markdown, to_text
from uq.calibration.rows import ClassificationRows, Names, Rows, make_rows
from uq.calibration.verdicts import fault, group_findings, verdicts
from uq.distributions import Predictive, RealPredictive
from uq.errors import DataError, LoadError, ParameterError, SaveError
from uq.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike
    from torch import Tensor

FORMAT_VERSION = 2
_SCORES = {
    "classification": "predictive entropy",
    "regression": "epistemic variance (the whole variance where a method has none)",
}


@dataclass(frozen=True)
class MethodReport:
    """What a report says about one method.

    Attributes
    ----------
    verdicts : dict of str to str
        Findings in plain language, by section.
    estimates : dict of str to Estimate
        Value and interval of each metric.
    curves : dict of str to dict
        Numbers behind each diagram, as columns.
    """

    verdicts: dict[str, str]
    estimates: dict[str, Estimate]
    curves: dict[str, Curve]


@dataclass(frozen=True)
class Report:
    """Metrics, findings and diagrams of methods on held-out rows; made by :func:`report`.

    Printing gives text, a notebook shows the page, :meth:`save` writes it.

    Attributes
    ----------
    title : str
        Heading.
    task : {"classification", "regression"}
        What was predicted.
    n, n_ood : int
        Number of held-out rows and of OOD rows (0 without).
    summary : str
        Which method is best, where there are several.
    sections : dict of str to list of Definition
        The metrics of each section, in the order in which they are shown.
    methods : dict of str to MethodReport
        What was found, by method.
    baseline : dict of str to float
        What one constant prediction for all rows would score.
    differences : list of Difference
        All pairs of methods in all metrics that have a better side.
    groups : list of Group
        Metrics by group of rows.
    group_findings : list of str
        Groups whose calibration is off beyond chance.
    resampling : Resampling
        How intervals were made.
    notes : dict
        What the caller wanted to be printed.
    versions : dict of str to str
        Of the packages that made the numbers.
    diagnostics : dict
        How sampling went, as texts: "columns", "rows" (a label first) and "warnings"; empty where
        none were given.
    ranking : list of Standing
        Methods from the best log score to the worst; empty for one method.
    recommendation : str
        Which method to pick, and why; "" for one method.

    See Also
    --------
    report : of one method.
    compare : of several.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import report
    >>> from uq.distributions import NormalMixture
    >>> y = torch.linspace(-2, 2, 101)
    >>> made = report(NormalMixture(torch.zeros(1, 101), torch.tensor(1.0)), y, name="constant")
    >>> made.task, made.n, list(made.methods)
    ('regression', 101, ['constant'])
    >>> made.to_dict()["methods"]["constant"]["estimates"]["rmse"]["value"]
    1.166
    """

    title: str
    task: Literal["classification", "regression"]
    n: int
    n_ood: int
    summary: str
    sections: dict[str, list[Definition]]
    methods: dict[str, MethodReport]
    baseline: dict[str, float]
    differences: list[Difference]
    groups: list[Group]
    group_findings: list[str]
    resampling: Resampling
    notes: dict[str, Any]
    versions: dict[str, str]
    diagnostics: dict[str, Any] = field(default_factory=dict)
    ranking: list[Standing] = field(default_factory=list)
    recommendation: str = ""

    # -- tables ----------------------------------------------------------------------------

    @property
    def definitions(self) -> list[Definition]:
        """The metrics, in order."""
        return [d for section in self.sections.values() for d in section]

    def to_frame(self, *, intervals: bool = False) -> pd.DataFrame:
        """Return the metrics as a table.

        Parameters
        ----------
        intervals : bool, default=False
            Whether to give a tidy table with a row for each method and metric (columns method,
            metric, value, low, high, limit, p_value, note) instead of a row a method and a column a
            metric.

        Returns
        -------
        pandas.DataFrame
        """
        import pandas as pd

        if intervals:
            columns = ("value", "low", "high", "limit", "p_value", "note")
            return pd.DataFrame(
                [
                    {
                        "method": name,
                        "metric": d.name,
                        **{c: getattr(method.estimates[d.name], c) for c in columns},
                    }
                    for name, method in self.methods.items()
                    for d in self.definitions
                ]
            ).astype({"limit": float, "p_value": float})
        names = [d.name for d in self.definitions]
        rows = [[m.estimates[c].value for c in names] for m in self.methods.values()]
        return pd.DataFrame(rows, index=pd.Index(self.methods, name="method"), columns=names)

    def groups_frame(self) -> pd.DataFrame:
        """Return the metrics by group: columns grouping, group, n, method, metric, value, …."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "grouping": group.grouping,
                    "group": group.label,
                    "n": group.n,
                    "method": method,
                    "metric": metric,
                    "value": e.value,
                    "low": e.low,
                    "high": e.high,
                }
                for group in self.groups
                for method, found in group.estimates.items()
                for metric, e in found.items()
            ],
            columns=["grouping", "group", "n", "method", "metric", "value", "low", "high"],
        )

    def differences_frame(self) -> pd.DataFrame:
        """Return how methods differ: columns metric, first, second, value, low, high, winner."""
        import pandas as pd

        columns = ["metric", "first", "second", "value", "low", "high", "winner"]
        return pd.DataFrame([asdict(d) for d in self.differences], columns=columns)

    # -- output ----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything the report knows, ready for JSON: NaN becomes None, infinity ``"inf"``."""
        found = _jsonable({**asdict(self), "ood_score": _SCORES[self.task] if self.n_ood else None})
        return {"format": FORMAT_VERSION, **found}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Undo :meth:`to_dict`.

        Raises
        ------
        LoadError
            If ``data`` is not what :meth:`to_dict` of this version gives.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT_VERSION:
            got = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise LoadError(
                f"Report: this is no report of format {FORMAT_VERSION} (got {got!r}); make it "
                "again, or read it with the version of uq that wrote it."
            )
        try:
            return cls(
                **{k: data[k] for k in ("title", "task", "n", "n_ood", "summary", "notes")},
                sections={
                    name: [_definition(d) for d in metrics]
                    for name, metrics in data["sections"].items()
                },
                methods={
                    name: MethodReport(
                        dict(m["verdicts"]), _estimates(m["estimates"]), dict(m["curves"])
                    )
                    for name, m in data["methods"].items()
                },
                baseline={k: _float(v) for k, v in data["baseline"].items()},
                differences=[
                    Difference(**{**d, **{k: _float(d[k]) for k in ("value", "low", "high")}})
                    for d in data["differences"]
                ],
                groups=[
                    Group(
                        g["grouping"],
                        g["label"],
                        g["n"],
                        {m: _estimates(e) for m, e in g["estimates"].items()},
                    )
                    for g in data["groups"]
                ],
                group_findings=list(data["group_findings"]),
                resampling=Resampling(**data["resampling"]),
                versions=dict(data["versions"]),
                diagnostics=_checked_diagnostics(data.get("diagnostics", {})),
                ranking=[_standing(line) for line in data.get("ranking", [])],
                recommendation=str(data.get("recommendation", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(
                f"Report: the file is damaged ({type(error).__name__}: {error}); make it again."
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report that :meth:`save` wrote as JSON.

        Parameters
        ----------
        path : path-like
            File ending in .json, or the folder that holds ``report.json``.

        Returns
        -------
        Report

        Raises
        ------
        LoadError
            If the file cannot be read, or is no report.
        """
        file = Path(path)
        file = file / "report.json" if file.is_dir() else file
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise LoadError(f"cannot read {str(file)!r}: {error.strerror or error}.") from error
        except (ValueError, RecursionError) as error:
            raise LoadError(
                f"{str(file)!r} is not JSON: {error}. (Report.load reads the .json that save "
                "writes, not the page.)"
            ) from error
        return cls.from_dict(data)

    def to_html(self) -> str:
        """Return the report as one self-contained page, with no scripts and nothing to fetch."""
        return to_html(self.to_dict())

    def to_markdown(self) -> str:
        """Return findings and tables in Markdown, without diagrams."""
        return to_markdown(self.to_dict())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report.

        Parameters
        ----------
        path : path-like
            File ending in .html, .json or .md, whose folder is made if it does not exist; or a
            folder, which gets ``report.html`` and ``report.json``.

        Returns
        -------
        Path
            The file, or ``report.html`` in the folder.

        Raises
        ------
        SaveError
            If a file cannot be written; earlier reports are then unchanged.
        ParameterError
            If the file ends in something else.
        """
        target = Path(path)
        makers = {".html": self.to_html, ".json": self._to_json, ".md": self.to_markdown}
        if target.suffix in makers and not target.is_dir():
            folder, files = target.parent, {target: makers[target.suffix]()}
        elif target.suffix and target.suffix.lower() in {".htm", ".pdf", ".txt", ".csv", ".yaml"}:
            raise ParameterError(
                f"Report.save: a file must end in .html, .json or .md, got {target.name!r}."
            )
        else:
            folder, target = target, target / "report.html"
            files = {folder / "report.json": self._to_json(), target: self.to_html()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(
                error.errno, f"cannot make the folder {str(folder)!r}: {error.strerror}"
            ) from error
        write_atomically({file: text.encode() for file, text in files.items()})
        return target

    def _to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)

    def plot(
        self, kind: str | None = None, *, methods: Sequence[str] | None = None, ax: Any = None
    ) -> Axes | list[Axes]:
        """Draw a diagram with Matplotlib, for a paper or a notebook.

        Parameters
        ----------
        kind : str, optional
            Classification: ``"reliability"`` or ``"risk_coverage"``; regression: ``"pit"``,
            ``"coverage"`` or ``"risk_coverage"``; with OOD rows also ``"roc"`` and ``"scores"``.
            By default ``"reliability"`` or ``"pit"``.
        methods : sequence of str, optional
            Names of the methods to draw; all by default.
        ax : matplotlib Axes or sequence of them, optional
            Where to draw; by default a new figure of pyplot.

        Returns
        -------
        Axes or list of Axes
            One for the kinds that overlay methods (``"risk_coverage"``, ``"coverage"``,
            ``"roc"``) and for a single method, otherwise one a method.

        Raises
        ------
        ParameterError
            If ``kind`` or a method does not exist, or ``ax`` holds too few axes.
        """
        from uq.calibration.plots import plot

        return plot(self, kind, methods, ax)

    def __str__(self) -> str:
        return to_text(self.to_dict())

    def __repr__(self) -> str:  # at a prompt the report itself, not its many fields
        return str(self)

    def _repr_html_(self) -> str:
        from html import escape

        # A frame keeps the style of the page from the style of the notebook.
        return (
            f'<iframe srcdoc="{escape(self.to_html())}" title="{escape(self.title)}" '
            'style="width:100%;height:800px;border:0"></iframe>'
        )


# -- making reports ----------------------------------------------------------------------------


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


def _checked_diagnostics(data: Mapping[str, Any]) -> dict[str, Any]:
    if not data:
        return {}
    return {
        "columns": [str(c) for c in data["columns"]],
        "rows": [[str(t) for t in row] for row in data["rows"]],
        "warnings": [str(w) for w in data["warnings"]],
    }


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


# -- plain data --------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    import uq

    packages = {p: version(p) for p in ("torch", "pyro-ppl", "numpy", "scipy")}
    return {"uq": uq.__version__, "python": platform.python_version(), **packages}


def _jsonable(value: Any) -> Any:
    """JSON's own types; what JSON cannot say becomes None, ``"inf"`` or the string of it."""
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _float(value: float | str | None) -> float:
    """Undo :func:`_jsonable` for a number."""
    return float("nan") if value is None else float(value)


def _estimates(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    numbers = ("value", "low", "high")
    return {
        metric: Estimate(**{**e, **{k: _float(e[k]) for k in numbers}})
        for metric, e in data.items()
    }


def _standing(data: Mapping[str, Any]) -> Standing:
    numbers = ("value", "low", "high", "behind", "behind_low", "behind_high")
    seconds = None if data["seconds"] is None else float(data["seconds"])
    return Standing(**{**data, **{k: _float(data[k]) for k in numbers}, "seconds": seconds})


def _definition(data: Mapping[str, str]) -> Definition:
    return Definition(**data)  # type: ignore[arg-type]

"""Reports: every metric of one or several methods on the same held-out rows, with intervals."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from uq.calibration.bootstrap import (
    Estimate,
    estimates,
    sample_metrics,
    sample_ood,
)
from uq.calibration.class_definitions import CLASSIFICATION
from uq.calibration.curves import Curve, pit_curve, reliability_curve
from uq.calibration.definitions import Definition
from uq.calibration.ood import OOD_METRICS, check_scores, ood_score
from uq.calibration.real_definitions import REGRESSION
from uq.calibration.rendering import to_html, to_text
from uq.calibration.rows import ClassificationRows, Names, Rows, make_rows
from uq.calibration.verdicts import summary
from uq.distributions import Predictive
from uq.errors import DataError, ParameterError, SaveError
from uq.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike
    from torch import Tensor

_OOD_GROUP = "Out of distribution"
_SCORES = {
    "classification": "predictive entropy",
    "regression": "epistemic variance (the whole variance where a method has none)",
}


@dataclass(frozen=True)
class MethodReport:
    """What a report says about one method.

    Attributes
    ----------
    verdict : list of str
        Findings in plain language.
    estimates : dict of str to Estimate
        Value and interval of each metric.
    curve : dict of str to list
        Bins of the reliability diagram (classification) or of the PIT histogram (regression).
    """

    verdict: list[str]
    estimates: dict[str, Estimate]
    curve: Curve


@dataclass(frozen=True)
class Report:
    """Metrics, findings and diagrams of methods on held-out rows; made by :func:`report`.

    Printing gives a table, a notebook shows the page, :meth:`save` writes it.

    Attributes
    ----------
    title : str
        Heading.
    task : {"classification", "regression"}
        What was predicted.
    n, n_ood : int
        Number of held-out rows and of OOD rows (0 without).
    groups : dict of str to sequence of Definition
        The metrics, in the order in which they are shown.
    methods : dict of str to MethodReport
        What was found, by method.
    notes : dict
        What the caller wanted to be printed.
    """

    title: str
    task: Literal["classification", "regression"]
    n: int
    n_ood: int
    groups: Mapping[str, Sequence[Definition]]
    methods: dict[str, MethodReport]
    notes: dict[str, Any]

    @property
    def definitions(self) -> list[Definition]:
        """The metrics, in order."""
        return [d for group in self.groups.values() for d in group]

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Tidy table: method, metric, value, low and high end of the 90 % interval."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"method": name, "metric": d.name, "value": e.value, "low": e.low, "high": e.high}
                for name, method in self.methods.items()
                for d in self.definitions
                for e in [method.estimates[d.name]]
            ]
        )

    def to_frame(self) -> pd.DataFrame:
        """Values only: a row a method, a column a metric."""
        import pandas as pd

        columns = [d.name for d in self.definitions]
        rows = [[m.estimates[c].value for c in columns] for m in self.methods.values()]
        index = pd.Index(self.methods, name="method")
        return pd.DataFrame(rows, index=index, columns=columns)

    def to_dict(self) -> dict[str, Any]:
        """Everything the report knows, ready for JSON: NaN becomes None, infinity ``"inf"``."""
        return _jsonable(
            {
                "title": self.title,
                "task": self.task,
                "n": self.n,
                "n_ood": self.n_ood,
                "ood_score": _SCORES[self.task] if self.n_ood else None,
                "bootstrap": {"interval": INTERVAL, "resamples": N_RESAMPLES, "seed": SEED},
                "summary": summary({name: m.estimates for name, m in self.methods.items()}),
                "definitions": {d.name: _definition(d) for d in self.definitions},
                "methods": {name: asdict(method) for name, method in self.methods.items()},
                "notes": self.notes,
                "versions": _versions(),
            }
        )

    def to_html(self) -> str:
        """Return the report as one self-contained page, with no scripts and nothing to fetch."""
        return to_html(self.to_dict(), self.groups)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``report.html`` and, beside it, ``report.json``.

        Parameters
        ----------
        directory : path-like
            Folder, made if it does not exist.

        Returns
        -------
        Path
            Where ``report.html`` is.

        Raises
        ------
        SaveError
            If a file cannot be written; earlier reports in the folder are then unchanged.
        """
        folder = Path(directory)
        data = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        page = folder / "report.html"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(
                error.errno, f"cannot make the folder {str(folder)!r}: {error.strerror}"
            ) from error
        write_atomically({folder / "report.json": data.encode(), page: self.to_html().encode()})
        return page

    def __str__(self) -> str:
        return to_text(self.to_dict(), self.groups)

    def _repr_html_(self) -> str:
        from html import escape

        # A frame keeps the style of the page from the style of the notebook.
        return (
            f'<iframe srcdoc="{escape(self.to_html())}" title="{escape(self.title)}" '
            'style="width:100%;height:800px;border:0"></iframe>'
        )


def report(
    prediction: Predictive,
    y: ArrayLike | Tensor,
    *,
    ood: Predictive | None = None,
    name: str = "model",
    title: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Report:
    """Judge one predictive distribution on held-out labels.

    Parameters
    ----------
    prediction : CategoricalMixture or NormalMixture
        Predictive distribution of the held-out rows.
    y : array-like of shape (n,) or (n, m)
        Their labels or targets; rows that neither training nor recalibration has seen.
    ood : same type, optional
        Predictive distribution of inputs from elsewhere; adds how well they are told apart.
    name : str, default="model"
        What to call the method.
    title : str, optional
        Heading of the report.
    notes : dict, optional
        Anything to print with it: data set, training size, seconds. Values that are dicts by
        method are fine.

    Returns
    -------
    Report
        Every number with a 90 % bootstrap interval over rows (500 resamples, fixed seed).

    Raises
    ------
    DataError
        If shapes do not match, ``y`` holds NaN, or a label is not among the classes.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import report
    >>> from uq.distributions import NormalMixture
    >>> y = torch.linspace(-2, 2, 101)
    >>> r = report(NormalMixture(torch.zeros(1, 101), torch.tensor(1.0)), y)
    >>> r.methods["model"].verdict
    ['90 % intervals hold 82.2 % of the held-out targets: too narrow.']
    >>> print(r.to_frame()["rmse"].round(3).to_dict())
    {'model': 1.166}
    """
    ood_by_name = None if ood is None else {name: ood}
    labels = {name: Names("report", "y", "prediction")}
    return _make({name: prediction}, y, ood_by_name, labels, title, notes)


def compare(
    predictions: Mapping[str, Predictive],
    y: ArrayLike | Tensor,
    *,
    ood: Mapping[str, Predictive] | None = None,
    title: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Report:
    """Judge several methods on the same held-out labels, side by side.

    The best method of each metric is marked, and those that a paired bootstrap of the difference
    (90 % interval, the same resampled rows for all) cannot tell from it.

    Parameters
    ----------
    predictions : dict of str to CategoricalMixture or NormalMixture
        Predictive distribution of the held-out rows, by method.
    y : array-like of shape (n,) or (n, m)
        Their labels or targets; rows that neither training nor recalibration has seen.
    ood : dict of the same keys, optional
        Predictive distributions of inputs from elsewhere, the same for all methods.
    title : str, optional
        Heading of the report.
    notes : dict, optional
        Anything to print with it: data set, training size, seconds. Values that are dicts by
        method are fine.

    Returns
    -------
    Report
        Every number with a 90 % bootstrap interval over rows (500 resamples, fixed seed).

    Raises
    ------
    DataError
        If shapes do not match, tasks are mixed, ``y`` holds NaN, or a label is not among the
        classes.
    ParameterError
        If there is nothing to compare, or ``ood`` has other keys.

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
    """
    if not isinstance(predictions, Mapping) or not predictions:
        raise ParameterError(
            "compare: predictions must be a dict {name: distribution} with at least one entry, "
            f"got {predictions!r:.80}."
        )
    names = {name: Names("compare", "y", f"predictions[{name!r}]") for name in predictions}
    if ood is not None and (not isinstance(ood, Mapping) or set(ood) != set(predictions)):
        got = sorted(map(str, ood)) if isinstance(ood, Mapping) else type(ood).__name__
        raise ParameterError(
            f"compare: ood must be a dict with the names of predictions, {sorted(predictions)}, "
            f"got {got}."
        )
    return _make(predictions, y, ood, names, title, notes)


def _make(
    predictions: Mapping[str, Predictive],
    y: ArrayLike | Tensor,
    ood: Mapping[str, Predictive] | None,
    names: Mapping[str, Names],
    title: str | None,
    notes: Mapping[str, Any] | None,
) -> Report:
    kinds = {name: type(p).__name__ for name, p in predictions.items()}
    if set(kinds.values()) == {"CategoricalMixture", "NormalMixture"}:
        raise DataError(f"compare: predictions mix tasks: {kinds}; compare one task at a time.")
    rows = {name: make_rows(y, p, names[name]) for name, p in predictions.items()}
    first = next(iter(rows.values()))
    classification = isinstance(first, ClassificationRows)
    groups: dict[str, Sequence[Definition]] = {**(CLASSIFICATION if classification else REGRESSION)}
    found = _metric_estimates(list(rows.values()), classification)
    n_ood = 0
    if ood is not None:
        ood_found, n_ood = _ood_estimates(predictions, ood, next(iter(names.values())).where)
        groups[_OOD_GROUP] = OOD_METRICS
        found = [a | b for a, b in zip(found, ood_found, strict=True)]
    methods = {
        name: MethodReport(verdict(r, e), e, _curve(r))
        for (name, r), e in zip(rows.items(), found, strict=True)
    }
    task: Literal["classification", "regression"] = (
        "classification" if classification else "regression"
    )
    heading = title or f"Predictive uncertainty: {', '.join(methods)}"
    return Report(heading, task, len(first.y), n_ood, groups, methods, dict(notes or {}))


def _metric_estimates(rows: list[Rows], classification: bool) -> list[dict[str, Estimate]]:
    groups = CLASSIFICATION if classification else REGRESSION
    metrics = [metric for group in groups.values() for metric in group]
    return estimates(sample_metrics(rows, metrics), metrics)


def _ood_estimates(
    predictions: Mapping[str, Predictive], ood: Mapping[str, Predictive], where: str
) -> tuple[list[dict[str, Estimate]], int]:
    familiar, out = [], []
    for name, prediction in predictions.items():
        argument = "ood" if where == "report" else f"ood[{name!r}]"
        if type(ood[name]) is not type(prediction):
            raise DataError(
                f"{where}: {argument} must be a {type(prediction).__name__} like the prediction "
                f"of the held-out rows, got a {type(ood[name]).__name__}."
            )
        familiar.append(ood_score(prediction))
        out.append(check_scores(f"{where}: the score of {argument}", ood_score(ood[name])))
    sizes = {name: len(s) for name, s in zip(predictions, out, strict=True)}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{where}: ood needs the same rows for all methods, got {sizes} rows.")
    return estimates(sample_ood(familiar, out), OOD_METRICS), len(out[0])


def _curve(rows: Rows) -> Curve:
    return reliability_curve(rows) if isinstance(rows, ClassificationRows) else pit_curve(rows)


def _definition(d: Definition) -> dict[str, str]:
    return {"label": d.label, "definition": d.definition, "better": d.better}


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

"""A report as an object: tables, pages and files, and the plain data that it is written as."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from uq.calibration.bootstrap import Difference, Estimate, Resampling
from uq.calibration.curves import Curve
from uq.calibration.definitions import Definition
from uq.calibration.grouping import Group
from uq.calibration.memo import Standing
from uq.calibration.rendering import to_html, to_markdown, to_text
from uq.errors import LoadError, ParameterError, SaveError
from uq.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

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


# -- plain data --------------------------------------------------------------------------------


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


def _checked_diagnostics(data: Mapping[str, Any]) -> dict[str, Any]:
    if not data:
        return {}
    return {
        "columns": [str(c) for c in data["columns"]],
        "rows": [[str(t) for t in row] for row in data["rows"]],
        "warnings": [str(w) for w in data["warnings"]],
    }

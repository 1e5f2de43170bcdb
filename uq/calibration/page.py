"""A report as one self-contained HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uq.calibration.plots import OVERLAID, TITLES, figure_of, risk_label, to_svg

if TYPE_CHECKING:
    from uq.calibration.curves import Curve
    from uq.calibration.rendering import View

# Diagrams of each section, where the report has them.
_PLACES = {
    "calibration": ("reliability", "pit", "coverage"),
    "awareness": ("risk_coverage", "scores", "roc"),
}
_CAPTIONS = {
    "reliability": (
        "Accuracy against confidence, and the number of rows in each bin. A calibrated method "
        "stays within the band in 9 of 10 bins; points outside it are orange. Below the diagonal "
        "is over-confident."
    ),
    "pit": (
        "Where the targets fall in their predictive distributions. A calibrated method stays "
        "between the two lines in 9 of 10 bins; other bars are orange. Heaps at both ends are "
        "over-confident, a heap in the middle is under-confident."
    ),
    "coverage": (
        "Share of the targets inside central intervals. A calibrated method stays within the band "
        "at 9 of 10 levels; below the diagonal the intervals are too narrow."
    ),
    "risk_coverage": (
        "What is lost when only the most confident rows are answered. A line that rises to the "
        "right says that errors come with low confidence."
    ),
    "roc": "Telling OOD rows from held-out ones by their uncertainty; the diagonal is chance.",
    "scores": "Uncertainty of held-out and of OOD rows; the less they overlap, the better.",
}
_COLUMNS = {
    "reliability": [
        ("Rows", "count", "d"),
        ("Confidence", "confidence", ".3f"),
        ("Accuracy", "accuracy", ".3f"),
        ("Band from", "band_low", ".3f"),
        ("to", "band_high", ".3f"),
    ],
    "pit": [
        ("Targets", "count", "d"),
        ("Share", "share", ".3f"),
        ("Band from", "band_low", ".3f"),
        ("to", "band_high", ".3f"),
    ],
    "coverage": [
        ("Nominal", "nominal", ".2f"),
        ("Share inside", "share", ".3f"),
        ("Band from", "band_low", ".3f"),
        ("to", "band_high", ".3f"),
    ],
    "risk_coverage": [("Rows answered", "coverage", ".3f"), ("Risk", "risk", ".4g")],
    "roc": [("Held-out flagged", "fpr", ".3f"), ("OOD flagged", "tpr", ".3f")],
    "scores": [("Held-out", "held_out", ".4f"), ("OOD", "ood", ".4f")],
}
_TABLE_ROWS = 25  # of the numbers under a diagram


@dataclass(frozen=True)
class Table:
    """Numbers of a curve."""

    caption: str
    head: list[str]
    body: list[list[str]]


@dataclass(frozen=True)
class Diagram:
    """One drawing and the numbers in it."""

    name: str
    svg: str
    tables: list[Table]


@dataclass(frozen=True)
class Panel:
    """The diagrams of one kind."""

    title: str
    caption: str
    diagrams: list[Diagram]


def render_page(data: dict[str, Any], v: View) -> str:
    """Fill the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("uq.calibration"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    panels = {
        section: [panel for kind in kinds for panel in _panel(data, kind)]
        for section, kinds in _PLACES.items()
    }
    return environment.get_template("report.html").render(v=v, panels=panels, task=data["task"])


def _panel(data: dict[str, Any], kind: str) -> list[Panel]:
    curves = {name: m["curves"][kind] for name, m in data["methods"].items() if kind in m["curves"]}
    if not curves:
        return []
    if kind in OVERLAID:
        diagrams = [_diagram(data, kind, TITLES[kind], curves, kind)]
    else:
        diagrams = [
            _diagram(data, kind, name, {name: curve}, f"{kind}{i}")
            for i, (name, curve) in enumerate(curves.items())
        ]
    return [Panel(TITLES[kind], _CAPTIONS[kind], diagrams)]


def _diagram(
    data: dict[str, Any], kind: str, name: str, curves: dict[str, Curve], prefix: str
) -> Diagram:
    figure = figure_of(kind, curves, data["task"])
    tables = [_table(kind, method, curve) for method, curve in curves.items()]
    return Diagram(name, to_svg(figure, _alt(data, kind, curves), prefix), tables)


def _table(kind: str, method: str, curve: Curve) -> Table:
    columns = _COLUMNS[kind]
    n = len(next(iter(curve.values())))
    shown = sorted({round(i * (n - 1) / max(_TABLE_ROWS - 1, 1)) for i in range(_TABLE_ROWS)})
    shown = list(range(n)) if n <= _TABLE_ROWS else shown
    binned = "left" in curve
    body = [
        ([f"{curve['left'][i]:.4g} – {curve['right'][i]:.4g}"] if binned else [])
        + [
            "—" if curve[key][i] is None else format(curve[key][i], spec)
            for _, key, spec in columns
        ]
        for i in shown
    ]
    return Table(method, ["Bin"] * binned + [title for title, _, _ in columns], body)


def _alt(data: dict[str, Any], kind: str, curves: dict[str, Curve]) -> str:
    """What a diagram shows, for readers who do not see it."""
    names = ", ".join(curves)
    curve = next(iter(curves.values()))
    if kind in ("reliability", "pit"):
        value = "accuracy" if kind == "reliability" else "share"
        bins = [
            (curve[value][i], curve["band_low"][i], curve["band_high"][i])
            for i in range(len(curve["count"]))
            if curve[value][i] is not None
        ]
        outside = sum(not low <= v <= high for v, low, high in bins)
        what = "Reliability diagram" if kind == "reliability" else "Histogram of PIT values"
        return f"{what} of {names}: {outside} of {len(bins)} bins outside the calibrated band."
    if kind == "coverage":
        middle = curve["nominal"].index(0.9) if 0.9 in curve["nominal"] else -1
        shares = ", ".join(f"{n} {c['share'][middle]:.3f}" for n, c in curves.items())
        return f"Coverage of central intervals; at 90 %: {shares}."
    if kind == "risk_coverage":
        ends = ", ".join(f"{n} {c['risk'][-1]:.3g}" for n, c in curves.items())
        return f"{risk_label(data['task'])} against share of rows answered; on all rows: {ends}."
    if kind == "roc":
        areas = ", ".join(
            f"{n} {float(data['methods'][n]['estimates']['auroc']['value']):.3f}" for n in curves
        )
        return f"ROC curves of OOD detection; area under the curve: {areas}."
    return f"Histograms of the uncertainty of held-out and OOD rows for {names}."

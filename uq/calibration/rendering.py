"""A report as text and as a page, from its dict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from uq.calibration.plots import pit_figure, reliability_figure, to_svg

if TYPE_CHECKING:
    from uq.calibration.definitions import Definition

_WIDTH, _LABEL_WIDTH, _CELL_WIDTH, _METHODS_ACROSS = 100, 31, 17, 4
_BETTER = {"lower": "lower is better", "higher": "higher is better", "": ""}
_CAPTIONS = {
    "classification": (
        "Accuracy against confidence, and the number of rows in each bin. A calibrated method "
        "stays within the band in 9 of 10 bins; points outside it are orange. Below the diagonal "
        "is over-confident."
    ),
    "regression": (
        "Where the targets fall in their predictive distributions. A calibrated method stays "
        "between the two lines in 9 of 10 bins; other bars are orange. Heaps at both ends are "
        "over-confident, a heap in the middle is under-confident."
    ),
}


def to_text(data: dict[str, Any], groups: Mapping[str, Sequence[Definition]]) -> str:
    """Plain-text table of at most 100 columns, methods in blocks of four."""
    methods = list(data["methods"])
    lines = [data["title"], _setting(data), ""]
    lines += [data["summary"]] if data["summary"] else []
    lines += [f"{name}: {' '.join(method['verdict'])}" for name, method in data["methods"].items()]
    lines = [part for line in lines for part in _wrap(line)]
    for start in range(0, len(methods), _METHODS_ACROSS):
        block = methods[start : start + _METHODS_ACROSS]
        lines += ["", " " * _LABEL_WIDTH + "".join(_fit(m, _CELL_WIDTH) for m in block)]
        for group, definitions in groups.items():
            lines.append(group)
            for d in definitions:
                cells = _cells(data, d)
                shown = "".join(_fit(_text_cell(cells[m]), _CELL_WIDTH) for m in block)
                lines.append(f"  {d.label:<{_LABEL_WIDTH - 2}}{shown}")
    lines += ["", "± half of the 90 % bootstrap interval."]
    if len(methods) > 1:
        lines[-1] += " * best, = not distinguishable from the best."
    lines += [part for key, text in _notes(data) for part in _wrap(f"{key}: {text}")]
    return "\n".join(line.rstrip() for line in lines)


def to_html(data: dict[str, Any], groups: Mapping[str, Sequence[Definition]]) -> str:
    """Return one self-contained page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("uq.calibration"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        data=data,
        setting=_setting(data),
        groups=[
            (
                group,
                [
                    {"definition": d, "better": _BETTER[d.better], "cells": _cells(data, d)}
                    for d in definitions
                ],
            )
            for group, definitions in groups.items()
        ],
        diagrams=[_diagram(data, i, name) for i, name in enumerate(data["methods"])],
        caption=_CAPTIONS[data["task"]],
        notes=_notes(data),
    )


def _setting(data: dict[str, Any]) -> str:
    parts = [data["task"].capitalize(), f"{data['n']:,} held-out rows"]
    if data["n_ood"]:
        parts.append(f"{data['n_ood']:,} OOD rows scored by {data['ood_score']}")
    return ", ".join(parts)


def _notes(data: dict[str, Any]) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {text(v)}" for k, v in value.items())
        if isinstance(value, list):
            return ", ".join(map(text, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return [(key, text(value)) for key, value in data["notes"].items()]


def _cells(data: dict[str, Any], definition: Definition) -> dict[str, dict[str, str]]:
    """Texts of one metric by method, all with the same number of decimals."""
    found = {m: r["estimates"][definition.name] for m, r in data["methods"].items()}
    numbers = {
        m: {k: math.nan if e[k] is None else float(e[k]) for k in ("value", "low", "high")}
        for m, e in found.items()
    }
    spec = _format(list(numbers.values()))
    return {
        m: {
            "value": _number(n["value"], spec),
            "half": _number((n["high"] - n["low"]) / 2, spec),
            "interval": f"{_number(n['low'], spec)} – {_number(n['high'], spec)}",
            "standing": found[m]["standing"],
        }
        for m, n in numbers.items()
    }


def _format(numbers: list[dict[str, float]]) -> str:
    """Format with two digits for the narrowest interval, at most four decimals."""
    size = max((abs(n["value"]) for n in numbers if math.isfinite(n["value"])), default=0.0)
    if size and not 1e-3 <= size < 1e6:
        return ".2g" if size < 1 else ".3g"
    halves = [(n["high"] - n["low"]) / 2 for n in numbers]
    halves = [h for h in halves if math.isfinite(h) and h > 1e-6 * size]  # more than rounding
    decimals = 1 - math.floor(math.log10(min(halves))) if halves else 3
    return f".{min(max(decimals, 0), 4)}f"


def _number(x: float, spec: str) -> str:
    if math.isnan(x):
        return "—"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    return format(x, spec).replace("-", "−")


def _text_cell(cell: dict[str, str]) -> str:
    if cell["half"] == "—":
        return cell["value"]
    mark = {"best": " *", "tied": " =", "": ""}[cell["standing"]]
    return f"{cell['value']} ±{cell['half']}{mark}"


def _wrap(line: str) -> list[str]:
    return wrap(line, _WIDTH, subsequent_indent="    ") or [""]


def _fit(text: str, width: int) -> str:
    """Pad to ``width``, or cut to leave a blank at the end."""
    return text.ljust(width) if len(text) < width else text[: width - 2] + "… "


def _diagram(data: dict[str, Any], number: int, name: str) -> dict[str, Any]:
    curve = data["methods"][name]["curve"]
    if data["task"] == "classification":
        figure, kind = reliability_figure(curve), "Reliability diagram"
        columns = [
            ("Rows", "count", "d"),
            ("Confidence", "confidence", ".3f"),
            ("Accuracy", "accuracy", ".3f"),
        ]
    else:
        figure, kind = pit_figure(curve), "PIT histogram"
        columns = [("Targets", "count", "d"), ("Share", "share", ".3f")]
    columns += [("Band from", "band_low", ".3f"), ("to", "band_high", ".3f")]
    table = [
        [f"{curve['left'][i]:.2f} – {curve['right'][i]:.2f}"]
        + [
            "—" if curve[key][i] is None else format(curve[key][i], spec)
            for _, key, spec in columns
        ]
        for i in range(len(curve["left"]))
    ]
    return {
        "name": name,
        "svg": to_svg(figure, f"{kind} of method {number + 1}", f"d{number}"),
        "head": ["Bin", *(title for title, _, _ in columns)],
        "table": table,
    }

"""Tables and numbers of the page in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Lines = list[str]


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Lines:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def folded(title: str, lines: Lines) -> Lines:
    """Lines that are shown on a click."""
    return [f"<details><summary>{title}</summary>", "", *lines, "</details>", ""]


def number(value: float) -> str:
    """Three significant digits."""
    if not np.isfinite(value):
        return "∞" if value > 0 else "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def with_error(mean: float, error: float) -> str:
    """A mean, to the second digit of its standard error."""
    if not np.isfinite(error) or not np.isfinite(mean):
        return number(mean)
    if error == 0:
        return f"{mean:.3g} ± 0"
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"

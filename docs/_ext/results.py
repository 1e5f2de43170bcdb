"""Rows of ``benchmarks/results`` as the cells of a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def number(value: Any) -> str:
    """Write a value as people do: four significant digits, no exponent where it can be."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {True: "yes", False: "no"}.get(value, str(value))
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:.0f}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.1e}"


def with_error(value: Any, error: Any) -> str:
    """Write ``value ± error``, the error to two digits and the value to the same place."""
    if value is None or pd.isna(value) or error is None or pd.isna(error) or error <= 0:
        return number(value)
    places = max(0, 1 - int(f"{error:.1e}".split("e")[1]))
    return f"{value:.{places}f}\u00a0±\u00a0{error:.{places}f}"  # which does not break


def cells(table: pd.DataFrame, column: str) -> list[str]:
    """Format a column, with its standard error where the results have one."""
    found = next((e for e in (f"{column}_se", "standard_error") if e in table), None)
    if column == found or (found == "standard_error" and column != "mean"):
        found = None
    errors = table[found] if found else [None] * len(table)
    return [with_error(v, e) for v, e in zip(table[column], errors, strict=True)]


def read(suite: str) -> tuple[pd.DataFrame, dict[str, Any], str] | None:
    """Rows of a suite, the machine they were measured on, and the file; None if there is none.

    A suite of tasks has a line for each split; the last one counts, and errors are left out.
    """
    whole, lines = RESULTS / f"{suite}.json", RESULTS / f"{suite}.jsonl"
    if whole.exists():
        found = json.loads(whole.read_text())
        return pd.DataFrame(found["results"]), found["machine"], whole.name
    if lines.exists():
        table = pd.read_json(lines, lines=True)
        table = table.drop_duplicates(["set", "split", "method"], keep="last")
        if "error" in table:
            table = table[table["error"].isna()]
        return table, table.iloc[-1].to_dict(), lines.name
    return None


def over_splits(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the splits that all methods of the table have, with standard errors."""
    n_methods = table.groupby("set")["method"].nunique()
    shared = table.groupby(["set", "split"])["method"].transform("nunique")
    table = table[shared == table["set"].map(n_methods)]
    numbers = [c for c in table.select_dtypes("number") if c != "split"]
    groups = table.groupby(["set", "method"], sort=False)
    means, errors, n = groups[numbers].mean(), groups[numbers].sem(), groups.size()
    return means.join(errors.add_suffix("_se")).assign(splits=n).reset_index()

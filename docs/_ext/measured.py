"""Directives that bring in what the project knows of itself when the pages are built.

``{measured} SUITE`` makes a table of ``benchmarks/results/SUITE.json`` or ``.jsonl``, so that no
number is typed; ``{standard} METHOD`` the same two tables for every method;
``{usage} COMMAND`` shows the help of the shell command; ``{facts} METHOD`` lists what the registry
says of a method, ``{methods}`` of all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from uq.models.registry import METHODS

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


class Measured(SphinxDirective):
    """Table of results: ``:rows:`` is a pandas query, ``:columns:`` are ``name = title, …``."""

    required_arguments = 1
    option_spec = {  # noqa: RUF012 (the interface of docutils)
        "rows": directives.unchanged,
        "columns": directives.unchanged_required,
        "pivot": directives.unchanged,
    }

    def run(self) -> list[nodes.Node]:
        suite = self.arguments[0]
        for ending in ("json", "jsonl"):
            self.env.note_dependency(str(RESULTS / f"{suite}.{ending}"))
        found = read(suite)
        if found is None:
            text = f"There is no result of the suite *{suite}* in this version: "
            return self.parse_text_to_nodes(text + f"`python -m benchmarks.run {suite}` makes it.")
        table, machine, name = found
        if "rows" in self.options:
            table = table.query(self.options["rows"])
        if table.empty:
            raise ExtensionError(f"{self.get_location()}: no row of {name} fits the query.")
        if name.endswith("jsonl"):
            table = over_splits(table)
        missing = set(self.names()) - set(table)
        if missing:
            raise ExtensionError(f"{self.get_location()}: {name} has no {sorted(missing)}.")
        header, body = self.pivoted(table) if "pivot" in self.options else self.listed(table)
        source = (
            f"benchmarks/results/{name}: {machine['cpu']}, threads: {machine['threads']}, "
            f"Python {machine['python']}, torch {machine['torch']}"
        )
        if "splits" in table and table["splits"].nunique() == 1:
            source += f"; {table['splits'].iloc[0]:.0f} splits"
        if any("±" in cell for row in body for cell in row):
            source += "; ± is the standard error of the mean"
        note = nodes.paragraph("", source + ".", classes=["measured-source"])
        return [draw(header, body), note]

    def names(self) -> dict[str, str]:
        parts = (part.partition("=") for part in self.options["columns"].split(","))
        return {name.strip(): title.strip() or name.strip() for name, _, title in parts}

    def listed(self, table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
        names = self.names()
        columns = [cells(table, name) for name in names]
        return list(names.values()), [list(row) for row in zip(*columns, strict=True)]

    def pivoted(self, table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
        """``:pivot: index, across`` gives a row for each index, a column for each across."""
        index, across = (x.strip() for x in self.options["pivot"].split(","))
        ((value, _),) = self.names().items()
        table = table.assign(cell=cells(table, value))
        wide = table.pivot(index=index, columns=across, values="cell").fillna("")
        wide = wide.loc[table[index].unique(), table[across].unique()]
        return ["", *map(str, wide.columns)], [
            [str(i), *row] for i, row in zip(wide.index, wide.to_numpy(), strict=True)
        ]


def draw(header: list[str], body: list[list[str]]) -> nodes.table:
    """Make a docutils table."""
    group = nodes.tgroup("", cols=len(header))
    group += [nodes.colspec("", colwidth=1) for _ in header]

    def row(texts: list[str]) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", x)) for x in texts))

    group += nodes.thead("", row(header))
    group += nodes.tbody("", *map(row, body))
    return nodes.table("", group, classes=["measured"])


class Standard(SphinxDirective):
    """Held-out log scores of a method beside MAP and the ensemble, on all tables it was run on."""

    required_arguments = 1
    optional_arguments = 9  # peers

    def run(self) -> list[nodes.Node]:
        method, *peers = self.arguments
        shown = [*dict.fromkeys((method, *peers, "MAP", "Ensemble"))]
        out: list[nodes.Node] = []
        for task in ("classification", "regression"):
            suite = f"uci-{task}"
            found = read(suite)
            if found is None or method not in set(found[0]["method"]):
                continue
            sets = found[0].query(f"method == {method!r}")["set"].unique().tolist()
            text = f"""Negative log likelihood of UCI {task} on held-out rows, in nats:

```{{measured}} {suite}
:rows: method in {shown} and set in {sets}
:columns: nll
:pivot: set, method
```
"""
            out += self.parse_text_to_nodes(text)
        if not out:
            text = "There is no result of the UCI suites in this version: "
            out = self.parse_text_to_nodes(
                text + "`python -m benchmarks.run uci-regression uci-classification` makes them."
            )
        return out


class Facts(SphinxDirective):
    """What ``uq.methods()`` says of a method, with links to its estimators."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        key = self.arguments[0]
        method = METHODS[key]
        estimators = ", ".join(f"{{py:class}}`uq.{method.class_name(t)}`" for t in method.tasks)
        rows = {
            "Estimators": estimators,
            "Cost": method.cost,
            "Needs": method.needs,
            "Paper": method.paper,
            "Shell": f"`uq fit FILE --method {key}`",
        }
        text = "\n".join(f":{name}: {value}" for name, value in rows.items())
        return self.parse_text_to_nodes(text)


class Methods(SphinxDirective):
    """Table of all methods of the registry, with links to their pages and estimators."""

    def run(self) -> list[nodes.Node]:
        rows = ["| method | estimators | cost | needs |", "| --- | --- | --- | --- |"]
        for key, m in METHODS.items():
            names = " ".join(f"{{py:class}}`~uq.{m.class_name(t)}`" for t in m.tasks)
            rows.append(f"| {{doc}}`/methods/{key}` | {names} | {m.cost} | {m.needs} |")
        return self.parse_text_to_nodes("\n".join(rows))


class Usage(SphinxDirective):
    """The help text of a command, as the shell prints it."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "uq", *self.arguments, "--help"]
        settings = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1"}
        text = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
        return [nodes.literal_block("", text.stdout, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("measured", Measured)
    app.add_directive("standard", Standard)
    app.add_directive("facts", Facts)
    app.add_directive("methods", Methods)
    app.add_directive("usage", Usage)
    return {"parallel_read_safe": True}

"""Directives that bring in what the project knows of itself when the pages are built.

``{measured} SUITE`` makes a table of ``benchmarks/results/SUITE.json`` or ``.jsonl``, so that no
number is typed; ``{standard} METHOD`` the same two tables for every method;
``{usage} COMMAND`` shows the help of the shell command; ``{facts} METHOD`` lists what the registry
says of a method, ``{methods}`` of all.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pandas as pd
from docutils import nodes
from docutils.parsers.rst import directives
from results import RESULTS, cells, over_splits, read
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from uq.models.registry import METHODS


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

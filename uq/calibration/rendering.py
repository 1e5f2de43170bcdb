"""A report as text and as Markdown, from its dict; the page is in :mod:`uq.calibration.page`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from uq.calibration.page import render_page
from uq.texts import all_visible

SECTIONS = {
    "accuracy": "How accurate?",
    "calibration": "How calibrated?",
    "sharpness": "How sharp?",
    "awareness": "Does it know what it does not know?",
    "comparison": "Compared with what?",
    "groups": "For which rows?",
    "diagnostics": "Did sampling work?",
}
_SAMPLED = "No warning: chains agree, and there are draws enough."
BETTER = {"lower": "lower is better", "higher": "higher is better", "": ""}
_ARROWS = {BETTER["lower"]: " ↓", BETTER["higher"]: " ↑", "": ""}
_LEGEND = "↓ lower is better, ↑ higher is better."

# Metrics of groups, as headings of narrow columns.
_SHORT = {
    "negative_log_likelihood": "NLL",
    "accuracy": "Accuracy",
    "mean_confidence": "Confidence",
    "expected_calibration_error": "ECE",
    "crps": "CRPS",
    "rmse": "RMSE",
    "coverage_90": "Coverage 90",
    "width_90": "Width 90",
}
_WIDTH, _LABEL_WIDTH, _CELL_WIDTH, _METHODS_ACROSS = 100, 32, 17, 4
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Cell:
    """One number, as texts."""

    value: str
    side: str = ""
    interval: str = ""
    standing: str = ""
    limit: str = ""
    beyond_chance: bool = False
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One metric: what it is, and a cell for each method or column."""

    label: str
    definition: str
    better: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Section:
    """One of the reader's questions, with its answers in words and numbers."""

    key: str
    title: str
    verdicts: list[tuple[str, str]]
    rows: list[Row]


@dataclass(frozen=True)
class GroupTable:
    """Metrics of the groups of one grouping for one method: a row a group."""

    grouping: str
    method: str
    columns: list[str]
    rows: list[tuple[str, int, list[Cell]]]


@dataclass(frozen=True)
class DiagnosticTable:
    """How sampling went: findings, and a row of texts for each quantity."""

    findings: list[str]
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class RankRow:
    """One method in the ranking, as texts; the columns are ``View.ranking_columns``."""

    method: str
    cells: list[str]
    tied: bool


@dataclass(frozen=True)
class View:
    """Everything that is shown, as texts."""

    title: str
    setting: str
    summary: str
    recommendation: str
    ranking_columns: list[str]
    ranking: list[RankRow]
    methods: list[str]
    sections: list[Section]
    baseline: list[Row]
    records: list[Row]
    groups: list[GroupTable]
    group_findings: list[str]
    notes: list[tuple[str, str]]
    diagnostics: DiagnosticTable | None
    interval: str
    resamples: int
    versions: str


BASELINE = "constant"
_RANKING = ("Score ↓", "Interval", "Behind the first", "Calibration", "Fit, s")


def view(data: dict[str, Any]) -> View:
    """Texts of a report from its dict."""
    methods = list(data["methods"])
    labels = {d["name"]: d for metrics in data["sections"].values() for d in metrics}
    sections = [
        Section(key, title, _verdicts(data, key), _metric_rows(data, data["sections"].get(key, [])))
        for key, title in SECTIONS.items()
        if key not in ("groups", "diagnostics")
    ]
    timed = any(x["seconds"] is not None for x in data["ranking"])
    return View(
        title=data["title"],
        setting=_setting(data),
        summary=data["summary"],
        recommendation=data["recommendation"],
        ranking_columns=list(_RANKING if timed else _RANKING[:-1]),
        ranking=_ranking(data["ranking"], timed),
        methods=methods,
        sections=sections,
        baseline=_baseline_rows(data, labels),
        records=_records(data, labels) if len(methods) > 1 else [],
        groups=_group_tables(data, labels),
        group_findings=data["group_findings"],
        notes=_notes(data),
        diagnostics=_diagnostics(data.get("diagnostics")),
        interval=f"{100 * data['resampling']['interval']:g} %",
        resamples=data["resampling"]["n_resamples"],
        versions=" · ".join(f"{name} {number}" for name, number in data["versions"].items()),
    )


def to_html(data: dict[str, Any]) -> str:
    """Return one self-contained page."""
    data = all_visible(data)
    return render_page(data, view(data))


# -- text --------------------------------------------------------------------------------------


def to_text(data: dict[str, Any]) -> str:
    """Plain text of at most 100 columns, methods in blocks of four."""
    v = view(all_visible(data))
    lines = [*_wrap(v.title), *_wrap(v.setting)]
    lines += _wrapped(f"{key}: {text}" for key, text in v.notes)
    if v.summary:
        lines += ["", *_wrap(v.summary), *_wrap(v.recommendation), "", *_text_ranking(v)]
    for section in v.sections:
        lines += ["", section.title]
        for name, sentence in section.verdicts:
            lines += _wrap(f"  {name}: {sentence}")
        if section.key == "comparison":
            lines += _text_table(v.baseline, [*v.methods, BASELINE])
        else:
            lines += _text_table(section.rows, v.methods)
    if v.groups:
        lines += ["", SECTIONS["groups"], *(f"  {line}" for line in _wrapped(v.group_findings))]
        for table in v.groups:
            lines += _text_groups(table, len(v.methods) > 1)
    if v.diagnostics is not None:
        d = v.diagnostics
        lines += ["", SECTIONS["diagnostics"], *(f"  {line}" for line in _wrapped(d.findings))]
        for label, *texts in [["", *d.columns], *d.rows]:
            shown = "".join(_fit(text, _CELL_WIDTH) for text in texts)
            lines.append(_fit(f"  {label}", _LABEL_WIDTH) + shown)
    lines += ["", f"± the longer side of the {v.interval} interval."]
    if len(v.methods) > 1:
        lines[-1] += " * best, = not distinguishable from the best."
    lines.append(_LEGEND)
    return "\n".join(line.rstrip() for line in lines)


def _text_table(rows: list[Row], columns: list[str]) -> list[str]:
    lines = []
    for start in range(0, len(columns) if rows else 0, _METHODS_ACROSS):
        block = columns[start : start + _METHODS_ACROSS]
        if len(columns) > 1:
            lines.append(" " * _LABEL_WIDTH + "".join(_fit(m, _CELL_WIDTH) for m in block))
        for row in rows:
            shown = "".join(_fit(_text_cell(row.cells[m]), _CELL_WIDTH) for m in block)
            lines.append(_fit(f"  {_directed(row)}", _LABEL_WIDTH) + shown)
    return lines


def _directed(row: Row) -> str:
    """The metric, and where better lies."""
    return row.label + _ARROWS[row.better]


def _text_ranking(v: View) -> list[str]:
    table = [("", *v.ranking_columns), *((_fit(r.method, 17), *r.cells) for r in v.ranking)]
    widths = [max(map(len, column)) + 2 for column in zip(*table, strict=True)]
    return [
        "  " + "".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]


def _text_groups(table: GroupTable, several: bool) -> list[str]:
    lines = [f"  {table.grouping}{f', {table.method}' if several else ''}"]
    width = min(_CELL_WIDTH, (_WIDTH - 26) // len(table.columns))
    lines.append(f"{'':18}{'rows':>6}  " + "".join(_fit(c, width) for c in table.columns))
    for label, n, cells in table.rows:
        numbers = "".join(_fit(cell.value, width) for cell in cells)
        lines.append(f"  {_fit(label, 16)}{n:>6}  {numbers}")
    return lines


def _text_cell(cell: Cell) -> str:
    mark = {"best": " *", "tied": " =", "": ""}[cell.standing]
    if cell.side in ("", "—"):
        return f"{cell.value}{mark}"
    return f"{cell.value} ±{cell.side}{mark}"


def _wrap(line: str, width: int = _WIDTH, indent: str = "    ") -> list[str]:
    glued = line.replace(" %", "\N{NO-BREAK SPACE}%")  # a number stays with its unit
    parts = wrap(glued, width, subsequent_indent=indent) or [""]
    return [part.replace("\N{NO-BREAK SPACE}%", " %") for part in parts]


def _wrapped(lines: Iterable[str]) -> list[str]:
    return [part for line in lines if line for part in _wrap(line, _WIDTH - 2, "  ")]


def _fit(text: str, width: int) -> str:
    """Pad to ``width``, or cut to leave a blank at the end."""
    return text.ljust(width) if len(text) < width else text[: width - 2] + "… "


# -- Markdown ----------------------------------------------------------------------------------


def to_markdown(data: dict[str, Any]) -> str:
    """Findings and tables in GitHub's Markdown."""
    v = view(all_visible(data))
    lines = [f"# {_escape(v.title)}", "", _escape(v.setting), ""]
    lines += [f"- {_escape(key)}: {_escape(text)}" for key, text in v.notes]
    lines += [""] if v.notes else []
    if v.summary:
        ranked = [[row.method, *row.cells] for row in v.ranking]
        lines += [f"{_escape(v.summary)} {_escape(v.recommendation)}", ""]
        lines += [*_markdown_table(["", *v.ranking_columns], ranked), ""]
    for section in v.sections:
        lines += [f"## {section.title}", ""]
        lines += [f"- **{_escape(name)}**: {_escape(text)}" for name, text in section.verdicts]
        lines.append("")
        if section.key == "comparison":
            lines += _markdown_rows(v.baseline, [*v.methods, BASELINE])
            if v.records:
                lines += ["Wins–ties–losses against the other methods:", ""]
                lines += _markdown_rows(v.records, v.methods)
        else:
            lines += _markdown_rows(section.rows, v.methods)
    if v.groups:
        lines += [f"## {SECTIONS['groups']}", "", *map(_escape, v.group_findings), ""]
        for table in v.groups:
            lines += [f"{_escape(table.grouping)}, {_escape(table.method)}:", ""]
            body = [[label, str(n), *(c.value for c in cells)] for label, n, cells in table.rows]
            lines += _markdown_table([table.grouping, "rows", *table.columns], body)
    if v.diagnostics is not None:
        d = v.diagnostics
        lines += [f"## {SECTIONS['diagnostics']}", "", *(f"- {_escape(t)}" for t in d.findings), ""]
        lines += _markdown_table(["", *d.columns], d.rows)
    lines += [f"Intervals hold {v.interval}. {_LEGEND}"]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_rows(rows: list[Row], columns: list[str]) -> list[str]:
    body = [[_directed(row), *(_markdown_cell(row.cells[m]) for m in columns)] for row in rows]
    return _markdown_table(["", *columns], body) if rows else []


def _markdown_cell(cell: Cell) -> str:
    mark = {"best": " **best**", "tied": " ≈ best", "": ""}[cell.standing]
    interval = f" ({cell.interval})" if cell.side not in ("", "—") else ""
    return f"{cell.value}{interval}{mark}"


def _markdown_table(head: list[str], body: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = [head, rule, *body]
    # Marks of our own are made after a cell is escaped; nothing else is bold.
    return [*("| " + " | ".join(_escape(t, bold=True) for t in line) + " |" for line in lines), ""]


def _escape(text: str, *, bold: bool = False) -> str:
    text = text.replace("&", "&amp;")
    for mark in ("\\", "|", "<", "`", "[", *([] if bold else ["*"])):  # "[": links and images
        text = text.replace(mark, "&lt;" if mark == "<" else f"\\{mark}")
    return text.replace("\n", " ")


# -- texts of numbers --------------------------------------------------------------------------


def _setting(data: dict[str, Any]) -> str:
    def rows(n: int, kind: str) -> str:
        return f"{n:,} {kind} row{'s' * (n != 1)}"

    parts = [data["task"].capitalize(), rows(data["n"], "held-out")]
    if data["n_ood"]:
        parts.append(f"{rows(data['n_ood'], 'OOD')} scored by {data['ood_score']}")
    return ", ".join(parts)


def _notes(data: dict[str, Any]) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {text(v)}" for k, v in value.items())
        if isinstance(value, list):
            return ", ".join(map(text, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return [(key, text(value)) for key, value in data["notes"].items()]


def _diagnostics(data: dict[str, Any] | None) -> DiagnosticTable | None:
    if not data:
        return None
    return DiagnosticTable(data["warnings"] or [_SAMPLED], data["columns"], data["rows"])


def _verdicts(data: dict[str, Any], key: str) -> list[tuple[str, str]]:
    return [
        (name, m["verdicts"][key]) for name, m in data["methods"].items() if key in m["verdicts"]
    ]


def _metric_rows(data: dict[str, Any], definitions: list[dict[str, str]]) -> list[Row]:
    return [
        _row(d, {m: r["estimates"][d["name"]] for m, r in data["methods"].items()})
        for d in definitions
    ]


def _row(definition: Mapping[str, str], found: Mapping[str, Mapping[str, Any]]) -> Row:
    """Texts of one metric, all with the same number of decimals."""
    keys = ("value", "low", "high", "limit")
    numbers = {
        m: {k: math.nan if e.get(k) is None else float(e[k]) for k in keys}
        for m, e in found.items()
    }
    spec = _format(list(numbers.values()))
    cells = {
        m: Cell(
            value=_number(n["value"], spec),
            # The longer side: an interval may be lopsided, as at a bound of the metric.
            side=_number(max(n["high"] - n["value"], n["value"] - n["low"]), spec),
            interval=f"{_number(n['low'], spec)} – {_number(n['high'], spec)}",
            standing=found[m]["standing"],
            limit="" if math.isnan(n["limit"]) else _number(n["limit"], spec),
            beyond_chance=(found[m].get("p_value") or 1.0) < _SIGNIFICANT,
            note=found[m]["note"],
        )
        for m, n in numbers.items()
    }
    return Row(definition["label"], definition["definition"], BETTER[definition["better"]], cells)


def _baseline_rows(data: dict[str, Any], labels: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name, constant in data["baseline"].items():
        found = {m: r["estimates"][name] for m, r in data["methods"].items()}
        row = _row(labels[name], found)
        numbers = [
            {k: math.nan if e[k] is None else float(e[k]) for k in ("value", "low", "high")}
            for e in found.values()
        ]
        value = math.nan if constant is None else float(constant)
        cells = {**row.cells, BASELINE: Cell(_number(value, _format(numbers)))}
        rows.append(Row(row.label, row.definition, row.better, cells))
    return rows


def _ranking(lines: list[dict[str, Any]], timed: bool) -> list[RankRow]:
    """The ranking with as many decimals as the narrowest interval asks for; seconds if timed."""
    keys = ("value", "low", "high", "behind", "behind_low", "behind_high")
    numbers = [{k: math.nan if x[k] is None else float(x[k]) for k in keys} for x in lines]
    spec = _format([{k: n[k] for k in ("value", "low", "high")} for n in numbers])

    def between(low: float, high: float) -> str:
        return f"{_number(low, spec)} to {_number(high, spec)}"

    return [
        RankRow(
            method=x["method"],
            cells=[
                _number(n["value"], spec),
                between(n["low"], n["high"]),
                "first"
                if i == 0
                else f"{_number(n['behind'], spec)} ({between(n['behind_low'], n['behind_high'])})",
                x["fault"] or "no fault seen",
                *([_seconds(x["seconds"])] if timed else []),
            ],
            tied=x["tied"],
        )
        for i, (x, n) in enumerate(zip(lines, numbers, strict=True))
    ]


def _seconds(x: float | None) -> str:
    return "—" if x is None else f"{float(x):.3g}"


def _records(data: dict[str, Any], labels: Mapping[str, Any]) -> list[Row]:
    """Wins, ties and losses of each method against the others, by metric."""
    methods = list(data["methods"])
    counts: dict[str, dict[str, list[int]]] = {}
    for d in data["differences"]:
        record = counts.setdefault(d["metric"], {m: [0, 0, 0] for m in methods})
        for side in (d["first"], d["second"]):
            record[side][1 if not d["winner"] else 0 if d["winner"] == side else 2] += 1
    return [
        Row(
            labels[metric]["label"],
            "wins–ties–losses against the other methods",
            "",
            {m: Cell("–".join(map(str, record[m]))) for m in methods},
        )
        for metric, record in counts.items()
    ]


def _group_tables(data: dict[str, Any], labels: Mapping[str, Any]) -> list[GroupTable]:
    tables = []
    groupings = list(dict.fromkeys(g["grouping"] for g in data["groups"]))
    for grouping in groupings:
        groups = [g for g in data["groups"] if g["grouping"] == grouping]
        metrics = list(next(iter(groups[0]["estimates"].values())))
        for method in data["methods"]:
            # One column has one number of decimals, so cells are made metric by metric.
            columns = [
                _row(labels[m], {str(i): g["estimates"][method][m] for i, g in enumerate(groups)})
                for m in metrics
            ]
            rows = [
                (g["label"], g["n"], [c.cells[str(i)] for c in columns])
                for i, g in enumerate(groups)
            ]
            tables.append(GroupTable(grouping, method, [_SHORT[m] for m in metrics], rows))
    return tables


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

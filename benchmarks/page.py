"""``RESULTS.md`` and its plots from the rows in ``results/`` alone: no number is typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import harness
from benchmarks.advice import OURS, advice_lines, default_lines, is_of_strange, relative_cost
from benchmarks.claims import CLAIMS, NotRun, Results
from benchmarks.harness import Suite, suite_of
from benchmarks.markdown import Lines, folded, markdown, number, with_error
from benchmarks.measure import is_target
from benchmarks.ranks import average_ranks, draw
from benchmarks.run import TASKS
from benchmarks.verdicts import ERROR_LEAST, Measured, Share

NAMES = {
    "nll": "NLL (nats)",
    "crps": "CRPS (target units)",
    "rmse": "RMSE (target units)",
    "coverage_90": "coverage of the 90 % interval",
    "quantile_error": "quantile calibration error",
    "brier": "Brier score",
    "ece_debiased": "ECE, top label, debiased",
    "accuracy": "accuracy",
    "auroc_errors": "AUROC of errors by confidence",
    "excess_nll": "NLL above the truth's (nats)",
    "distance": "distance to the reference posterior predictive",
    "spread": "epistemic spread over the reference's",
}
# What is best: the least, the most, or the nearest to a value.
HIGH = ("accuracy", "auroc")
NEAR = {"coverage_90": 0.9, "spread": 1.0}
METRICS = {
    "uci-regression": ("nll", "crps", "rmse", "coverage_90", "quantile_error"),
    "uci-classification": ("nll", "brier", "ece_debiased", "accuracy", "auroc_errors"),
    "images": ("nll", "brier", "ece_debiased", "accuracy", "auroc_errors"),
    "toys": ("excess_nll", "distance", "spread"),
}
RANKED = {
    "uci-regression": ("nll", "crps"),
    "uci-classification": ("nll", "brier"),
}


# -- rows ------------------------------------------------------------------------------------------


def newest(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Last row of each task, of the arguments that a method had last on a set."""
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    table = table.drop_duplicates(["set", "split", "method"], keep="last")
    last = table.groupby(["set", "method"])["key"].transform("last")
    return table[table["key"] == last]


def good(table: pd.DataFrame) -> pd.DataFrame:
    """Rows without an error."""
    return table[table["error"].isna()] if "error" in table else table


def in_order(table: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    """Methods as rows and sets as columns, in the order of the suite."""
    rows = [m for m in suite.methods if m in table.index]
    return table.loc[rows, [s for s in suite.sets if s in table.columns]]


# -- parts of the page -----------------------------------------------------------------------------


def metric_table(table: pd.DataFrame, suite: Suite, metric: str) -> Lines:
    """Mean ± standard error over splits, methods × sets; the best of all splits is bold."""
    if metric not in table or table[metric].notna().sum() == 0:
        return ["No rows yet.", ""]
    groups = table.pivot_table(
        index="method", columns="set", values=metric, aggfunc=["mean", "sem", "count"]
    )
    mean, count = (in_order(groups[k], suite) for k in ("mean", "count"))
    error = groups["sem"].reindex_like(mean) if "sem" in groups else mean * np.nan
    error = error.where(count >= ERROR_LEAST)
    most = count.max()
    worse = ((mean - NEAR[metric]).abs() if metric in NEAR else mean).where(count == most)
    best = worse.max() if metric.startswith(HIGH) else worse.min()
    rows = []
    for method in mean.index:
        cells = [method if method in OURS else f"*{method}*"]
        for name in mean.columns:
            n = count.at[method, name]
            if not n > 0:
                cells.append("")
                continue
            cell = with_error(mean.at[method, name], error.at[method, name])
            if worse.at[method, name] == best[name]:
                cell = f"**{cell}**"
            cells.append(cell if n == most[name] else f"{cell} ({n:.0f})")
        rows.append(cells)
    return markdown(["", *(f"{s} ({most[s]:.0f})" for s in mean.columns)], rows)


def command(suite: str) -> str:
    return f"`python -m benchmarks.run {suite} --jobs 2`"


def suite_lines(suite: Suite, table: pd.DataFrame, plots: Path) -> Lines:
    """Tables of all metrics, ranks, times, errors and what is left out."""
    rows = good(table)
    planned = sum(1 for _ in suite.tasks())
    lines = [
        (import_module(f"benchmarks.{suite.name.replace('-', '_')}").__doc__ or "").strip(),
        "",
        f"Made by {command(suite.name)}; {len(table)} of {planned} planned rows are there. "
        f"Mean ± standard error over splits (of {ERROR_LEAST} or more); the number of splits "
        "stands beside the set, and beside a cell that has fewer. Bold is the best mean of those "
        "with all splits, italic is a peer.",
        "",
    ]
    if not len(rows):
        return [*lines, "No rows yet.", ""]
    first, *others = METRICS[suite.name]
    lines += [f"### {NAMES[first]}", "", *metric_table(rows, suite, first)]
    for metric in others:
        lines += folded(NAMES[metric], metric_table(rows, suite, metric))
    for metric in RANKED.get(suite.name, ()):
        lines += rank_lines(rows, suite.name, metric, plots)
    if suite.name == "images":
        lines += strange_lines(rows, suite)
    lines += [*time_lines(rows, suite), *error_lines(table), *left_out_lines(suite)]
    return lines


def rank_lines(rows: pd.DataFrame, suite: str, metric: str, plots: Path) -> Lines:
    """Average ranks: of the methods that ran on all sets, and on sets that all methods ran on."""
    lines = [f"### Average ranks, {NAMES[metric]}", ""]
    for everywhere, title in (
        (True, "methods that ran on every set"),
        (False, "all methods, on the sets that all of them ran on"),
    ):
        ranking = average_ranks(rows, metric, everywhere=everywhere)
        if ranking is None:
            lines += [f"{title.capitalize()}: fewer than two sets or methods yet.", ""]
            continue
        name = f"ranks_{suite}_{metric}_{'every' if everywhere else 'common'}.png"
        draw(ranking, f"{NAMES[metric]}: {title}", plots / name)
        splits = ", ".join(f"{s} ({n})" for s, n in ranking.n_splits.items())
        lines += [
            f"{title.capitalize()}: {len(ranking.ranks)} methods, {ranking.n_sets} sets, means "
            f"over the splits that all of them have: {splits}. Bars join methods whose ranks "
            f"differ by less than the critical difference {ranking.critical:.2f} (Nemenyi, 5 %, "
            "which grows with the number of methods); that all are alike has "
            f"p = {ranking.p_value:.1g} (Friedman).",
            "",
            f"![{NAMES[metric]}, {title}](results/plots/{name})",
            "",
        ]
    return lines


def strange_lines(rows: pd.DataFrame, suite: Suite) -> Lines:
    """AUROC of strange images, and NLL on rotated ones."""
    lines: Lines = ["### Strange and rotated images", ""]
    for metric in rows.columns:
        if is_of_strange(metric):
            lines += folded(f"AUROC: {metric[6:]}", metric_table(rows, suite, metric))
        elif metric.startswith("nll_"):
            lines += folded(f"NLL, rotated by {metric[4:]}", metric_table(rows, suite, metric))
    return lines


def time_lines(rows: pd.DataFrame, suite: Suite) -> Lines:
    """CPU seconds to fit, seconds to predict, memory."""
    found = []
    for method in suite.methods:
        part = rows[rows["method"] == method]
        if not len(part) or part["fit_cpu_seconds"].max() < 0.001:  # published: nothing ran
            continue
        per_row = 1e6 * part["predict_seconds"] / part["n_test"]
        found.append(
            [
                method if method in OURS else f"*{method}*",
                number(part["fit_cpu_seconds"].median()),
                number(part["fit_cpu_seconds"].max()),
                number(relative_cost(rows, "fit_cpu_seconds", method)),
                number(per_row.median()),
                number(part["peak_mb"].max()),
            ]
        )
    header = ["", "fit, CPU s, median", "most", "over MAP's", "predict, µs a row", "peak, MiB"]
    text = "One thread; CPU seconds, which other work on the machine changes less than the clock."
    return ["### Time and memory", "", text, "", *markdown(header, found)]


def error_lines(table: pd.DataFrame) -> Lines:
    """What failed."""
    if "error" not in table or table["error"].isna().all():
        return ["No task failed.", ""]
    failed = table[table["error"].notna()]
    rows = [
        [method, ", ".join(f"{s} {i}" for s, i in zip(p["set"], p["split"], strict=True)), error]
        for (method, error), p in failed.groupby(["method", "error"])
    ]
    cleaned = [[m, s, str(e).replace("|", "\\|").replace("\n", " ")] for m, s, e in rows]
    return ["### Failed", "", *markdown(["method", "set and split", "error"], cleaned)]


def left_out_lines(suite: Suite) -> Lines:
    """What is not run, and why; a set is followed by the first split that is left out."""
    reasons: dict[tuple[str, str], dict[str, int]] = {}
    for method in suite.methods:
        for name, n_splits in suite.sets.items():
            for split in range(n_splits):
                if reason := suite.left_out(name, method, split):
                    reasons.setdefault((method, reason), {}).setdefault(name, split)
    rows = [
        [m, ", ".join(f"{s} from split {i}" if i else s for s, i in sets.items()), reason]
        for (m, reason), sets in reasons.items()
    ]
    return folded("Not run, and why", markdown(["method", "sets", "reason"], rows)) if rows else []


# -- papers, speed, calibration --------------------------------------------------------------------


def shown(values: dict[str, float]) -> str:
    """Named numbers, with their standard errors where they have one."""
    parts = []
    for name, value in values.items():
        if isinstance(value, Share):
            parts.append(f"{value.k} of {value.n} {name}")
        else:
            error = value.error if isinstance(value, Measured) else np.nan
            parts.append(f"{name} {with_error(value, error)}")
    return ", ".join(parts)


def claim_lines(results: Results) -> Lines:
    """A table a method: what its paper claims, and what was found here."""
    lines: Lines = [
        "A claim that one is better than another holds, or does not, where the 95 % interval of "
        "the difference is without 0 (Student's, by seed; two standard errors where single seeds "
        "were not kept); one of most sets where a sign test says so at 5 %. "
        'Otherwise it is "not decided". Reasons are conjectures. Reference: the method '
        "beside it, in the same run; what a paper says where so marked.",
        "",
    ]
    words = {True: "holds", False: "**does not hold**", None: "not decided"}
    for method in dict.fromkeys(c.method for c in CLAIMS):
        rows = []
        for c in (c for c in CLAIMS if c.method == method):
            row = [c.claim, c.source, c.setting]
            try:
                ours = c.ours(results)
                theirs = c.reference(results) if c.reference else {}
            except NotRun:
                rows.append([*row, "not run", "", "not run"])
                continue
            held = c.holds(ours, theirs)
            verdict = words[held if held is None else bool(held)]
            if verdict == words[False] and c.why_not:
                verdict += f": {c.why_not}"
            rows.append([*row, shown(ours), shown(theirs), verdict])
        header = ["claim", "source", "setting here", "ours", "reference", "holds"]
        lines += [f"### {method}", "", *markdown(header, rows)]
    return lines


def speed_lines(whole: dict[str, list[dict[str, Any]]]) -> Lines:
    """All ratios against peers that were measured in one run."""
    rows = []
    for suite, found in whole.items():
        for r in found:
            if "benchmark" not in r or r.get("ratio") is None or "target" not in r:
                continue
            met = {True: "yes", False: "**no**"}.get(r.get("met"), "")
            met = met if is_target(r["target"]) else ""  # older rows say yes to none
            span = ""
            if r.get("ratio_min") is not None:
                span = f"{number(r['ratio_min'])} to {number(r['ratio_max'])}"
            rows.append([suite, r["benchmark"], number(r["ratio"]), span, r["target"], met])
    header = ["suite", "benchmark", "ratio", "range", "target", "met"]
    verdicts = [row[-1] for row in rows if row[-1]]
    return [
        f"Ratios of alternating repeats in one process, {verdicts.count('yes')} of {len(verdicts)} "
        "within their target; made by `python -m benchmarks.run SUITE`.",
        "",
        *folded("All ratios", markdown(header, rows)),
    ]


def calibration_lines(rows: list[dict[str, Any]]) -> Lines:
    """Do the intervals of the metrics hold, and do libraries agree?"""
    table = pd.DataFrame(rows)
    if "part" not in table:
        return ["No rows yet.", ""]
    lines = ["Made by `python -m benchmarks.run calibration`.", ""]
    nominal = table[table["part"] == "nominal rate"]
    if len(nominal):
        by_kind = nominal.groupby(["simulation", "n"])["coverage"].agg(["min", "mean", "count"])
        cells = [
            [s, f"{n:.0f}", f"{r['count']:.0f}", f"{r['mean']:.1%}", f"{r['min']:.1%}"]
            for (s, n), r in by_kind.iterrows()
        ]
        header = ["simulation", "rows", "metrics", "95 % intervals that hold, mean", "least"]
        lines += markdown(header, cells)
    agreed = table[table["part"] == "agreement"]
    if len(agreed):
        same = int((agreed["reason"] == "").sum())
        other = agreed[agreed["reason"] != ""]
        lines += [
            f"{same} of {len(agreed)} metrics are those of the other library on the same rows.",
            "",
        ]
        cells = other[["metric", "library", "ours", "theirs", "reason"]].to_numpy().tolist()
        lines += markdown(["metric", "library", "ours", "theirs", "why not the same"], cells)
    return lines


def spent_lines(tables: dict[str, pd.DataFrame], files: dict[str, dict[str, Any]]) -> Lines:
    """Hours by suite, and where and with what they were spent."""
    rows = []
    for name, table in tables.items():
        if not len(table):
            rows.append([name, 0, "", "", command(name)])
            continue
        hours = table["task_seconds"].sum() / 3600
        by_method = table.groupby("method")["task_seconds"].sum().sort_values(ascending=False)
        most = ", ".join(
            f"{m} {s / table['task_seconds'].sum():.0%}" for m, s in by_method.head(4).items()
        )
        rows.append([name, len(table), f"{hours:.2f}", most, command(name)])
    for name, file in files.items():
        hours = f"{file['seconds'] / 3600:.2f}" if "seconds" in file else ""
        of = ", ".join(file[k] for k in ("code", "date") if k in file)
        made = f"`python -m benchmarks.run {name}`"
        rows.append([name, len(file["results"]), hours, of, made])
    header = ["suite", "rows", "hours, summed over processes", "most, or code and date", "command"]
    lines = [
        "Hours of the rows that are shown, without those that later ones replaced; a suite that "
        "was measured before its hours were kept has none. A command goes on where rows are "
        "missing; `--again` measures all anew.",
        "",
        *markdown(header, rows),
    ]
    measured = [t for t in tables.values() if len(t)]
    if measured:
        every = pd.concat(measured)
        names = ("cpu", "cores", "threads", "python", "torch", "pyro-ppl", "scikit-learn", "code")
        said = [
            f"{name}: {', '.join(sorted(map(str, every[name].dropna().unique())))}"
            for name in (*names, "date")
            if name in every
        ]
        lines += ["Rows were measured with " + "; ".join(said) + ".", ""]
    machines = {", ".join(f"{k} {v}" for k, v in f["machine"].items()) for f in files.values()}
    if machines:
        lines += ["The other suites were measured on " + "; ".join(sorted(machines)) + ".", ""]
    return lines


def render(out: Path = harness.RESULTS) -> Path:
    """Write ``RESULTS.md`` beside the folder of results, and its plots into the folder."""
    plots = out / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    tables = {name: newest(harness.read(out / f"{name}.jsonl")) for name in TASKS}
    files = {p.stem: json.loads(p.read_text()) for p in sorted(out.glob("*.json"))}
    whole = {name: found["results"] for name, found in files.items()}
    rows = {name: good(table) for name, table in tables.items()}
    results = Results(whole, rows)
    lines = [
        "# Results",
        "",
        "Every method against its paper, and against what a user would pick instead. This page is "
        "made of the rows in [results](results) by `python -m benchmarks.run render`; no measured "
        "number is typed, those of claims and sources are quoted.",
        "",
    ]
    parts: dict[str, Callable[[], Lines]] = {
        "When to pick which": lambda: advice_lines(rows),
        "Defaults": lambda: default_lines(rows),
        **{
            title: lambda name=name: suite_lines(suite_of(name), tables[name], plots)
            for title, name in (
                ("UCI regression", "uci-regression"),
                ("UCI classification", "uci-classification"),
                ("Images", "images"),
                ("Toys with a known truth", "toys"),
            )
        },
        "Paper rows": lambda: claim_lines(results),
        "Speed against peers": lambda: speed_lines(whole),
        "Calibration": lambda: calibration_lines(whole.get("calibration", [])),
        "Compute": lambda: spent_lines(tables, files),
    }
    for title, part in parts.items():
        lines += [f"## {title}", "", *part()]
    page = out.parent / "RESULTS.md"
    page.write_text("\n".join(lines).rstrip() + "\n")
    return page

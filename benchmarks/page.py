"""``RESULTS.md`` and its plots from the rows in ``results/`` alone: no number is typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from benchmarks import harness
from benchmarks.claims import CLAIMS, Measured, NotRun, Results, Share
from benchmarks.harness import Suite, suite_of
from benchmarks.measure import is_target
from benchmarks.methods import NORM
from benchmarks.ranks import Ranking, average_ranks, common_splits, draw, ranks_around
from benchmarks.run import TASKS
from benchmarks.toys import same_model
from uq.models.registry import METHODS

Lines = list[str]
OURS = {m.name for m in METHODS.values()}
# Share of sets that makes a clear majority, and what a mean 90 % coverage may be.
MAJORITY, COVERAGE = 2 / 3, (0.85, 0.95)
# A fit that takes at most this many times MAP's is cheap, and one beyond the second dear.
CHEAP, DEAR = 2.0, 10.0
# Share of the methods that are among the best in rank.
BEST = 1 / 4
# Fewest tables, and toys or kinds of strange images, from which anything is concluded.
TABLES_LEAST, OTHERS_LEAST = 6, 3
# Fewest values of which a standard error is shown.
ERROR_LEAST = 3
TABLES = {"uci-regression": "Regression", "uci-classification": "Classes"}

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


# -- Markdown --------------------------------------------------------------------------------------


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


# -- parts of the page -----------------------------------------------------------------------------


def command(suite: str) -> str:
    return f"`python -m benchmarks.run {suite} --jobs 2`"


def suite_lines(suite: Suite, table: pd.DataFrame, plots: Path) -> Lines:
    """Tables of all metrics, ranks, times, errors and what is left out."""
    rows = good(table) if len(table) else table
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


def is_of_strange(metric: str) -> bool:
    """Whether a column is the AUROC of strange images."""
    return metric.startswith("auroc_") and metric != "auroc_errors"


def strange_lines(rows: pd.DataFrame, suite: Suite) -> Lines:
    """AUROC of strange images, and NLL on rotated ones."""
    lines: Lines = ["### Strange and rotated images", ""]
    for metric in rows.columns:
        if is_of_strange(metric):
            lines += folded(f"AUROC: {metric[6:]}", metric_table(rows, suite, metric))
        elif metric.startswith("nll_"):
            lines += folded(f"NLL, rotated by {metric[4:]}", metric_table(rows, suite, metric))
    return lines


def relative_cost(rows: pd.DataFrame, column: str, method: str) -> float:
    """Geometric mean over sets of a method's seconds over MAP's, each on a split that both have."""
    seconds = rows.pivot_table(index=["set", "split"], columns="method", values=column)
    if method not in seconds or "MAP" not in seconds:
        return float("nan")
    # Splits may have been measured on different machines, the methods of one mostly on one.
    ratios = np.log(seconds[method] / seconds["MAP"]).groupby(level="set").mean()
    return float(np.exp(ratios.mean()))


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


# -- defaults --------------------------------------------------------------------------------------


def against(rows: pd.DataFrame, method: str, base: str = "MAP") -> pd.DataFrame:
    """NLL of a method and of another by set, over the splits that both have."""
    part = rows[rows["method"].isin((method, base))]
    found = common_splits(part, "nll").groupby(level="set", sort=False).mean()
    return found.dropna() if {method, base} <= set(found.columns) else pd.DataFrame()


def as_good(pairs: pd.DataFrame, method: str) -> bool:
    """Whether a method is at least as good as MAP on a clear majority."""
    return len(pairs) > 0 and bool((pairs[method] <= pairs["MAP"]).mean() >= MAJORITY)


def told_apart(rows: pd.DataFrame, method: str) -> tuple[int, int]:
    """Sets on which a method's NLL is below MAP's, and above, beyond Student's 95 % interval."""
    part = common_splits(rows[rows["method"].isin((method, "MAP"))], "nll")
    by_set = (part[method] - part["MAP"]).groupby(level="set")
    means, count = by_set.mean(), by_set.count()
    half = (by_set.sem() * student_t.ppf(0.975, count - 1)).where(count >= ERROR_LEAST)
    return int((means < -half).sum()), int((means > half).sum())


def default_lines(tables: dict[str, pd.DataFrame]) -> Lines:
    """Each estimator out of the box against MAP out of the box."""
    low, high = COVERAGE
    lines = [
        "Out of the box on tables, by one rule: an NLL at least as good as MAP's (means over "
        f"common splits) on {MAJORITY:.0%} of the sets or more, and 90 % intervals that hold "
        f"{low:.0%} to {high:.0%} on average. Told apart are sets on which Student's 95 % interval "
        f"of the difference to MAP's NLL is without 0 ({ERROR_LEAST} splits or more).",
        "",
    ]
    rows = []
    for suite in TABLES:
        table = good(tables[suite]) if len(tables[suite]) else tables[suite]
        for method in suite_of(suite).methods:
            if method not in OURS or method == "MAP" or not len(table):
                continue
            pairs = against(table, method)
            if pairs.empty:
                continue
            won = int((pairs[method] <= pairs["MAP"]).sum())
            verdict = "yes" if as_good(pairs, method) else "**no**"
            difference = (pairs[method] - pairs["MAP"]).median()
            cells = [suite, method, f"{won}/{len(pairs)}", verdict, f"{difference:+.3f}"]
            cells += list(map(str, told_apart(table, method)))
            if suite == "uci-regression":
                coverage = coverage_by_set(table, method).mean()
                cells += [f"{coverage:.1%}", "yes" if low <= coverage <= high else "**no**"]
            else:
                cells += ["", ""]
            rows.append(cells)
    header = [
        "suite",
        "estimator",
        "sets as good as MAP",
        "",
        "median difference of NLL (nats)",
        "told better",
        "told worse",
        "coverage of 90 %",
        "",
    ]
    return [*lines, *(markdown(header, rows) if rows else ["No rows yet.", ""])]


# -- when to pick which ----------------------------------------------------------------------------


def place(rows: pd.DataFrame, method: str) -> tuple[int, Ranking] | None:
    """Place of a method in NLL among those that have all of its sets and splits."""
    ranking = ranks_around(rows, "nll", method) if len(rows) else None
    if ranking is None:
        return None
    return int((ranking.ranks < ranking.ranks[method]).sum()) + 1, ranking


def coverage_by_set(rows: pd.DataFrame, method: str) -> pd.Series:
    """Coverage of a method's 90 % intervals by set; empty where there is none."""
    part = rows[rows["method"] == method] if len(rows) else rows
    return part.groupby("set")["coverage_90"].mean() if len(part) else pd.Series(dtype=float)


def beside_map(rows: pd.DataFrame, metrics: Iterable[str], method: str) -> pd.DataFrame:
    """Means by set and metric of a method and of MAP, on splits that both have."""
    part = rows[rows["method"].isin((method, "MAP"))] if len(rows) and method != "MAP" else rows[:0]
    found = [
        common_splits(part, m).groupby(level="set").mean()
        for m in metrics
        if m in part and set(part.loc[part[m].notna(), "method"]) == {method, "MAP"}
    ]
    return pd.concat(found).dropna() if found else pd.DataFrame(columns=[method, "MAP"])


def mostly_better(
    pairs: pd.DataFrame, method: str, *, high: bool = False, least: int = OTHERS_LEAST
) -> bool:
    """Whether a method beats MAP on a clear majority, and on average, of ``least`` or more."""
    gain = (pairs[method] - pairs["MAP"]) * (1 if high else -1)
    return len(pairs) >= least and bool((gain > 0).mean() >= MAJORITY and gain.mean() > 0)


def strange_beside_map(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """AUROC of all kinds of strange images, of a method and of MAP."""
    return beside_map(rows, filter(is_of_strange, rows.columns), method)


def both(pairs: pd.DataFrame, method: str) -> str:
    """A method's mean, and MAP's in brackets."""
    return f"{pairs[method].mean():.3f} ({pairs['MAP'].mean():.3f})" if len(pairs) else ""


def ratio_to_map(pairs: pd.DataFrame, method: str) -> float:
    """Geometric mean of a method's values over MAP's."""
    return float(np.exp(np.log(pairs[method] / pairs["MAP"]).mean())) if len(pairs) else np.nan


def toys_beside_map(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """Distances to the posterior of a method's own model, and MAP's, by toy."""
    pairs = beside_map(rows, ["distance"], method)
    return pairs[[same_model(str(toy), method) for toy in pairs.index]]


def of_sets(value: float, pairs: pd.DataFrame) -> str:
    """A number, and of how many sets or toys it is."""
    return f"{number(value)} ({len(pairs)})" if len(pairs) else ""


def fit_ratio(rows: dict[str, pd.DataFrame], method: str) -> float | None:
    """CPU time of a fit over MAP's, on tables; None where there is none."""
    ratios = [
        r
        for suite in TABLES
        if len(rows[suite])
        and np.isfinite(r := relative_cost(rows[suite], "fit_cpu_seconds", method))
    ]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else None


def overview_lines(rows: dict[str, pd.DataFrame]) -> Lines:
    """All methods in one table."""
    found = []
    for method in METHODS.values():
        name = method.name
        cells = [f"**{name}**"]
        for suite in TABLES:
            at = place(rows[suite], name)
            sets = f", {at[1].n_sets} sets" if at else ""
            cells.append(f"{at[0]} of {len(at[1].ranks)}{sets}" if at else "")
        regression, classes = rows["uci-regression"], rows["uci-classification"]
        coverage, ratio = coverage_by_set(regression, name), fit_ratio(rows, name)
        errors, toys = beside_map(regression, ["rmse"], name), toys_beside_map(rows["toys"], name)
        images = beside_map(rows["images"], ["nll"], name)
        cells += [
            of_sets(ratio_to_map(errors, name), errors),
            both(beside_map(classes, ["accuracy"], name), name),
            f"{coverage.mean():.0%}" if len(coverage) else "",
            both(beside_map(classes, ["ece_debiased"], name), name),
            f"{(images[name] < images['MAP']).sum()} of {len(images)}" if len(images) else "",
            both(strange_beside_map(rows["images"], name), name),
            of_sets(ratio_to_map(toys, name), toys),
            number(ratio) if ratio else "",
        ]
        found.append(cells)
    header = [
        "",
        "NLL, regression",
        "NLL, classes",
        "RMSE over MAP's",
        "accuracy (MAP's)",
        "90 % coverage",
        "ECE (MAP's)",
        "image sets with a better NLL than MAP's",
        "strange images, AUROC (MAP's)",
        "distance to the posterior over MAP's",
        "fit over MAP's, tables",
    ]
    return [
        "Places in average rank among our methods and the peers that have all of a method's sets "
        "and splits; 1 is the best. What stands beside MAP's is over the splits that both have, in "
        "brackets of how many sets or toys.",
        "",
        *markdown(header, found),
        f"A method is picked for the NLL of a kind of table if it is in the best {BEST:.0%} of "
        f"{TABLES_LEAST} sets or more; for calibrated class probabilities, strange images or "
        f"nearness to the posterior if it beats MAP on {MAJORITY:.0%} of {TABLES_LEAST} sets "
        f"({OTHERS_LEAST} kinds of images or toys) or more and on average; for a small budget if a "
        f"fit takes at most {CHEAP:.0f} times MAP's CPU time and its NLL is as good as MAP's on "
        f"{MAJORITY:.0%} of a kind of table.",
        "",
    ]


def advice_lines(tables: dict[str, pd.DataFrame]) -> Lines:
    """An overview, and a paragraph for each method of sentences whose numbers are looked up."""
    rows = {name: good(t) if len(t) else t for name, t in tables.items()}
    lines = overview_lines(rows)
    for method in METHODS.values():
        text, picks = [], []
        for suite, what in TABLES.items():
            table = rows[suite]
            if len(table) and (table["method"] == method.name).any():
                text += _standing(table, method.name, what, picks)
        text += _base_sentence(rows, method.name)
        text += _error_sentence(rows["uci-regression"], method.name)
        text += _coverage_sentence(rows["uci-regression"], method.name)
        text += _class_sentence(rows["uci-classification"], method.name, picks)
        text += _image_sentence(rows["images"], method.name, picks)
        text += _toy_sentence(rows["toys"], method.name, picks)
        text += _cost_sentence(rows, method.name, picks)
        if not text:
            text = ["no rows yet."]
        elif picks:
            text.append(f"Pick it for {', '.join(picks)}.")
        else:
            text.append("By these rules nothing speaks for it over the others.")
        lines += [f"**{method.name}** ({method.cost}). " + " ".join(text), ""]
    return lines


def _standing(rows: pd.DataFrame, method: str, what: str, picks: list[str]) -> list[str]:
    at = place(rows, method)
    if at is None:
        return [f"{what}: not ranked (fewer than two sets or methods)."]
    i, ranking = at
    rank, k = ranking.ranks[method], len(ranking.ranks)
    near = rank - ranking.ranks.iloc[0] <= ranking.critical
    if i <= BEST * k and ranking.n_sets >= TABLES_LEAST:
        picks.append(f"the NLL of {what.lower()}")
    return [
        f"{what}: place {i} of {k} in NLL (average rank {rank:.1f} over {ranking.n_sets} sets; "
        f"{'not told from' if near else 'significantly behind'} the best)."
    ]


def _coverage_sentence(rows: pd.DataFrame, method: str) -> list[str]:
    by_set = coverage_by_set(rows, method)
    if by_set.empty:
        return []
    low, high = COVERAGE
    within = int(by_set.between(low, high).sum())
    if by_set.mean() < low:
        verdict = "conformalise them"
    elif by_set.mean() > high:
        verdict = "wider than they need be"
    elif within >= MAJORITY * len(by_set):
        verdict = "calibrated enough to use as they are"
    else:
        verdict = "right on average alone, so conformalise them"
    return [
        f"Its 90 % intervals hold {by_set.mean():.0%} on average, {by_set.min():.0%} to "
        f"{by_set.max():.0%} by set, {low:.0%} to {high:.0%} on {within} of {len(by_set)}: "
        f"{verdict}."
    ]


def _base_sentence(rows: dict[str, pd.DataFrame], method: str) -> list[str]:
    """What a method brings beyond the network that it starts from, where that is not MAP's."""
    if method != "ABNN":
        return []
    found = []
    for suite, what in TABLES.items():
        pairs = against(rows[suite], method, NORM) if len(rows[suite]) else pd.DataFrame()
        if len(pairs):
            won = int((pairs[method] <= pairs[NORM]).sum())
            found.append(f"{won} of {len(pairs)} sets ({what.lower()})")
    if not found:
        return []
    sets = ", ".join(found)
    return [f"Its NLL is as good as that of MAP on its own network ({NORM}) on {sets}."]


def _error_sentence(rows: pd.DataFrame, method: str) -> list[str]:
    pairs = beside_map(rows, ["rmse"], method)
    return [f"Its RMSE is {number(ratio_to_map(pairs, method))} times MAP's."] if len(pairs) else []


def _class_sentence(rows: pd.DataFrame, method: str, picks: list[str]) -> list[str]:
    ece = beside_map(rows, ["ece_debiased"], method)
    if ece.empty:
        return []
    if mostly_better(ece, method, least=TABLES_LEAST):
        picks.append("calibrated class probabilities")
    right = beside_map(rows, ["accuracy"], method)
    return [
        f"Beside MAP's in brackets: accuracy {both(right, method)}, debiased ECE "
        f"{both(ece, method)}."
    ]


def _image_sentence(rows: pd.DataFrame, method: str, picks: list[str]) -> list[str]:
    strange, nll = strange_beside_map(rows, method), beside_map(rows, ["nll"], method)
    if strange.empty:
        return []
    if mostly_better(strange, method, high=True):
        picks.append("finding strange images")
    gains = ", ".join(f"{name} {x:+.3f}" for name, x in (nll[method] - nll["MAP"]).items())
    return [f"Images: NLL less MAP's {gains}; AUROC of strange ones {both(strange, method)}."]


def _toy_sentence(rows: pd.DataFrame, method: str, picks: list[str]) -> list[str]:
    pairs = toys_beside_map(rows, method)
    if pairs.empty:
        return []
    if mostly_better(pairs, method):
        picks.append("nearness to the exact posterior")
    ratio = number(ratio_to_map(pairs, method))
    toys = f"{len(pairs)} toy{'s' * (len(pairs) > 1)}"
    return [f"Its distance to the posterior is {ratio} times MAP's ({toys})."]


def _cost_sentence(rows: dict[str, pd.DataFrame], method: str, picks: list[str]) -> list[str]:
    ratio = fit_ratio(rows, method)
    if ratio is None:
        return []
    if method == "MAP":
        picks.append("a small budget")
        return []
    good_at = [
        what.lower()
        for suite, what in TABLES.items()
        if len(rows[suite]) and as_good(against(rows[suite], method), method)
    ]
    if ratio <= CHEAP and good_at:
        picks.append(f"a small budget ({' and '.join(good_at)})")
    size = "cheap" if ratio <= CHEAP else "dear" if ratio > DEAR else "moderate"
    return [f"A fit on a table takes {number(ratio)} times MAP's CPU time ({size})."]


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
            why = f": {c.why_not}" if c.why_not and words[held] == words[False] else ""
            rows.append([*row, shown(ours), shown(theirs), words[held] + why])
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
    results = Results(whole, {n: good(t) if len(t) else t for n, t in tables.items()})
    lines = [
        "# Results",
        "",
        "Every method against its paper, and against what a user would pick instead. This page is "
        "made of the rows in [results](results) by `python -m benchmarks.run render`; no measured "
        "number is typed, those of claims and sources are quoted.",
        "",
    ]
    parts: dict[str, Callable[[], Lines]] = {
        "When to pick which": lambda: advice_lines(tables),
        "Defaults": lambda: default_lines(tables),
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

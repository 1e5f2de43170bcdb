"""Methods beside MAP: whether their defaults hold, and when to pick which.

Every function takes rows without errors, by suite where it needs several.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from benchmarks.harness import suite_of
from benchmarks.markdown import Lines, markdown, number
from benchmarks.methods import NORM
from benchmarks.ranks import Ranking, common_splits, ranks_around
from benchmarks.toys import same_model
from benchmarks.verdicts import ERROR_LEAST, half_width
from uq.models.registry import METHODS

OURS = {m.name for m in METHODS.values()}
# Share of sets that makes a clear majority, and what a mean 90 % coverage may be.
MAJORITY, COVERAGE = 2 / 3, (0.85, 0.95)
# A fit that takes at most this many times MAP's is cheap, and one beyond the second dear.
CHEAP, DEAR = 2.0, 10.0
# Share of the methods that are among the best in rank.
BEST = 1 / 4
# Fewest tables, and toys or kinds of strange images, from which anything is concluded.
TABLES_LEAST, OTHERS_LEAST = 6, 3
TABLES = {"uci-regression": "Regression", "uci-classification": "Classes"}


def is_of_strange(metric: str) -> bool:
    """Whether a column is the AUROC of strange images."""
    return metric.startswith("auroc_") and metric != "auroc_errors"


def relative_cost(rows: pd.DataFrame, column: str, method: str) -> float:
    """Geometric mean over sets of a method's seconds over MAP's, each on a split that both have."""
    seconds = rows.pivot_table(index=["set", "split"], columns="method", values=column)
    if method not in seconds or "MAP" not in seconds:
        return float("nan")
    # Splits may have been measured on different machines, the methods of one mostly on one.
    ratios = np.log(seconds[method] / seconds["MAP"]).groupby(level="set").mean()
    return float(np.exp(ratios.mean()))


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
    half = half_width(by_set.sem(), count).where(count >= ERROR_LEAST)
    return int((means < -half).sum()), int((means > half).sum())


def default_lines(rows: dict[str, pd.DataFrame]) -> Lines:
    """Each estimator out of the box against MAP out of the box."""
    low, high = COVERAGE
    lines = [
        "Out of the box on tables, by one rule: an NLL at least as good as MAP's (means over "
        f"common splits) on {MAJORITY:.0%} of the sets or more, and 90 % intervals that hold "
        f"{low:.0%} to {high:.0%} on average. Told apart are sets on which Student's 95 % interval "
        f"of the difference to MAP's NLL is without 0 ({ERROR_LEAST} splits or more).",
        "",
    ]
    found = []
    for suite in TABLES:
        table = rows[suite]
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
            found.append(cells)
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
    return [*lines, *(markdown(header, found) if found else ["No rows yet.", ""])]


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


def advice_lines(rows: dict[str, pd.DataFrame]) -> Lines:
    """An overview, and a paragraph for each method of sentences whose numbers are looked up."""
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

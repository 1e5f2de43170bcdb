"""Average ranks of methods over data sets, and which of them differ by more than chance.

J. Demšar, "Statistical comparisons of classifiers over multiple data sets", JMLR 7, 2006:
ranks, and Nemenyi's critical difference CD = q_α √(k (k + 1) / (6 N)) of k methods on N sets, where
q_α is the quantile of the Studentised range of k groups and infinite degrees of freedom over √2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import friedmanchisquare, rankdata, studentized_range


def critical_difference(n_methods: int, n_sets: int, alpha: float = 0.05) -> float:
    """Least difference of average ranks that is significant at ``alpha``."""
    q = studentized_range.isf(alpha, n_methods, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(n_methods * (n_methods + 1) / (6 * n_sets)))


@dataclass(frozen=True)
class Ranking:
    """Average ranks, 1 the best, of the methods that ran on all of some sets."""

    ranks: pd.Series
    n_sets: int
    n_splits: pd.Series
    """Splits of each set that all of the methods have."""
    p_value: float
    """Of Friedman's test that all methods are alike; NaN of fewer than three methods."""

    @property
    def critical(self) -> float:
        """The critical difference at 5 %."""
        return critical_difference(len(self.ranks), self.n_sets)


def common_splits(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Table sets and splits × methods, of the splits of a set that every method on it has."""
    table = rows.pivot_table(index=["set", "split"], columns="method", values=metric)
    parts = []
    for _, part in table.groupby(level="set", sort=False):
        on_it = part.dropna(axis=1, how="all")
        parts.append(on_it.dropna(axis=0, how="any"))
    return pd.concat(parts) if parts else table


def average_ranks(rows: pd.DataFrame, metric: str, *, everywhere: bool) -> Ranking | None:
    """Rank means over common splits, lower is better; ties share their ranks.

    ``everywhere`` takes all sets and the methods that ran on all of them; otherwise all methods and
    the sets on which all of them ran. None where fewer than two of either are left.
    """
    rows = rows[rows[metric].notna()]
    means = rows.pivot_table(index="set", columns="method", values=metric)
    means = means.dropna(axis=1 if everywhere else 0, how="any")
    chosen = rows[rows["set"].isin(means.index) & rows["method"].isin(means.columns)]
    return _ranked(common_splits(chosen, metric)) if len(chosen) else None


def ranks_around(rows: pd.DataFrame, metric: str, method: str) -> Ranking | None:
    """Ranks over all sets and splits of a method, among the methods that have all of them."""
    table = rows.pivot_table(index=["set", "split"], columns="method", values=metric)
    if method not in table:
        return None
    return _ranked(table[table[method].notna()].dropna(axis=1, how="any"))


def _ranked(table: pd.DataFrame) -> Ranking | None:
    # Infinite NLL is the worst there is, and the same for all that have it.
    means = table.groupby(level="set", sort=False).mean()
    if means.shape[1] < 2 or len(means) < 2:
        return None
    ranks = pd.DataFrame(rankdata(means, axis=1), columns=means.columns).mean()
    p = friedmanchisquare(*means.T.to_numpy()).pvalue if means.shape[1] > 2 else math.nan
    counts = table.groupby(level="set", sort=False).size()
    return Ranking(ranks.sort_values(), len(means), counts, float(p))


def cliques(ranks: pd.Series, critical: float) -> list[tuple[float, float]]:
    """Longest runs of methods whose ranks differ by less than the critical difference."""
    values = ranks.to_numpy()
    runs = [
        (i, int(np.searchsorted(values, v + critical, "right")) - 1) for i, v in enumerate(values)
    ]
    return [
        (float(values[i]), float(values[j]))
        for n, (i, j) in enumerate(runs)
        if j > i and (n == 0 or j > runs[n - 1][1])
    ]


def draw(ranking: Ranking, title: str, path: Path) -> None:
    """Critical-difference diagram: bars join methods that chance may order."""
    k = len(ranking.ranks)
    half, bars = (k + 1) // 2, cliques(ranking.ranks, ranking.critical)
    top = 0.9 + 0.35 * len(bars)
    figure = Figure(figsize=(9, 0.28 * (half + top) + 0.9))
    ax = figure.add_axes((0.22, 0.02, 0.56, 0.86))
    ax.set_xlim(0.5, k + 0.5)
    ax.set_ylim(-(half + top), 1.6)
    ax.axis("off")
    ax.hlines(0, 1, k, color="black", lw=1)
    for tick in range(1, k + 1):
        ax.vlines(tick, 0, 0.15, color="black", lw=1)
        ax.text(tick, 0.25, str(tick), ha="center", va="bottom", fontsize=8)
    ax.hlines(1.2, 1, 1 + ranking.critical, color="black", lw=1)
    ax.text(1 + ranking.critical, 1.2, f"  CD {ranking.critical:.2f}", va="center", fontsize=8)
    for i, (method, rank) in enumerate(ranking.ranks.items()):
        left = i < half
        y = -(top + (i if left else k - 1 - i))
        end = 0.5 if left else k + 0.5
        ax.plot([rank, rank, end], [0, y, y], color="0.4", lw=0.8)
        ax.text(
            end, y, f"{method} {rank:.2f}", ha="right" if left else "left", va="center", fontsize=8
        )
    for i, (low, high) in enumerate(bars):
        y = -(0.5 + 0.35 * i)
        ax.hlines(y, low - 0.05, high + 0.05, color="black", lw=3)
    ax.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})

"""Bootstrap intervals for all numbers of a report at once.

Rows are resampled with a fixed seed, the same resamples for every method, so that methods are
compared on equal terms: a difference is judged by the interval of the difference itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from uq.calibration.definitions import Definition, Metric, weighted_means
from uq.calibration.ood import ScoreGroups
from uq.calibration.rows import Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

N_RESAMPLES = 500
INTERVAL = 0.9
SEED = 0
_BLOCK_ELEMENTS = 1 << 19  # weights held at a time: small enough for the cache


@dataclass(frozen=True)
class Estimate:
    """A number of a report, with its bootstrap interval and its standing among the methods."""

    value: float
    low: float
    high: float
    standing: Literal["best", "tied", ""] = ""


@dataclass(frozen=True)
class Sampled:
    """Values (methods, metrics) and their replicates (resamples, methods, metrics)."""

    values: Floats
    replicates: Floats
    n_rows: int


def sample_metrics(methods: Sequence[Rows], metrics: Sequence[Metric]) -> Sampled:
    """Evaluate ``metrics`` for every method, on the rows and on their resamples."""
    tables = [[metric.columns(rows) for metric in metrics] for rows in methods]
    ends = np.cumsum([columns.shape[1] for columns in tables[0]])[:-1]
    joined = [np.concatenate(table, axis=1) for table in tables]

    def evaluate(weights: Floats) -> Floats:
        means = [np.split(weighted_means(weights, table), ends, axis=-1) for table in joined]
        values = [[f.finish(m) for f, m in zip(metrics, ms, strict=True)] for ms in means]
        return np.moveaxis(np.array(values), -1, 0)  # (resamples, methods, metrics)

    n = len(methods[0].y)
    values = evaluate(np.ones((1, n)))[0]
    replicates = np.concatenate([evaluate(w) for (w,) in _resamples(n)])
    for j, metric in enumerate(metrics):
        if metric.folded:
            shift = np.median(replicates[..., j], axis=0) - values[:, j]
            replicates[..., j] = (replicates[..., j] - shift).clip(min=0.0)
    return Sampled(values, replicates, n)


def sample_ood(scores_in: Sequence[Floats], scores_out: Sequence[Floats]) -> Sampled:
    """Evaluate the OOD metrics for every method, resampling familiar and OOD rows apart."""
    groups = [ScoreGroups(a, b) for a, b in zip(scores_in, scores_out, strict=True)]

    def evaluate(weight_in: Floats, weight_out: Floats) -> Floats:
        return np.stack([g.metrics(weight_in, weight_out) for g in groups], axis=1)

    sizes = len(scores_in[0]), len(scores_out[0])
    values = evaluate(np.ones((1, sizes[0])), np.ones((1, sizes[1])))[0]
    return Sampled(values, np.concatenate([evaluate(*w) for w in _resamples(*sizes)]), sizes[0])


def estimates(sampled: Sampled, definitions: Sequence[Definition]) -> list[dict[str, Estimate]]:
    """Intervals and standings, one dict {metric name: estimate} a method."""
    tails = [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]
    # Quantiles that are replicates themselves stay defined where some replicates are infinite.
    low, high = np.quantile(sampled.replicates, tails, axis=0, method="inverted_cdf")
    for j, definition in enumerate(definitions):
        if isinstance(definition, Metric) and definition.share:
            # All rows or none: the exact binomial end, since no resample differs.
            end = tails[0] ** (1 / sampled.n_rows)
            low[sampled.values[:, j] >= 1, j] = end
            high[sampled.values[:, j] <= 0, j] = 1 - end
    standing = [
        _standings(definition.better, sampled.values[:, j], sampled.replicates[..., j])
        for j, definition in enumerate(definitions)
    ]
    return [
        {
            definition.name: Estimate(
                float(sampled.values[i, j]), float(low[i, j]), float(high[i, j]), standing[j][i]
            )
            for j, definition in enumerate(definitions)
        }
        for i in range(len(sampled.values))
    ]


def _standings(
    better: Literal["lower", "higher", ""], values: Floats, replicates: Floats
) -> list[Literal["best", "tied", ""]]:
    standings: list[Literal["best", "tied", ""]] = [""] * len(values)
    if not better or len(values) == 1:
        return standings
    sign = 1.0 if better == "lower" else -1.0
    best = int((sign * values).argmin())
    for i in range(len(values)):
        with np.errstate(invalid="ignore"):
            behind = sign * (replicates[:, i] - replicates[:, best])
        # inf − inf is no evidence of a difference.
        behind = np.where(np.isnan(behind), 0.0, behind)
        if np.quantile(behind, (1 - INTERVAL) / 2, method="inverted_cdf") <= 0:
            standings[i] = "best" if values[i] == values[best] else "tied"
    return standings


def _resamples(*sizes: int) -> Iterator[list[Floats]]:
    """Multinomial row weights (block, n) for each of ``sizes``, in blocks of resamples."""
    rng = np.random.default_rng(SEED)
    block = max(1, _BLOCK_ELEMENTS // max(sizes))
    for start in range(0, N_RESAMPLES, block):
        count = min(block, N_RESAMPLES - start)
        yield [
            np.array(
                [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(count)], float
            )
            for n in sizes
        ]

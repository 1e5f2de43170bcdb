"""The statistical uncertainty of all numbers of a report at once.

Rows are resampled with a fixed seed, the same resamples for every method, so that methods are
compared on equal terms: a difference is judged by the interval of the difference itself. Shares of
rows have exact binomial intervals. Calibration errors, which chance keeps above zero, are also set
against data sets whose labels were drawn from the predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np

from uq.calibration.definitions import (
    TIE,
    Definition,
    MeanMetric,
    Metric,
    OneHot,
    RankMetric,
    weighted_means,
)
from uq.calibration.ood import ScoreGroups
from uq.calibration.ranking import MAX_GROUPS
from uq.calibration.rows import RegressionRows, Rows
from uq.errors import ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_BLOCK_ELEMENTS = 1 << 20  # weights held at a time: small enough for the cache
_NULL_ELEMENTS = 20_000_000
_NULL_DRAWS = 200


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: their coverage, the number of resamples and the seed."""

    interval: float = 0.95
    n_resamples: int = 1000
    seed: int = 0

    def check(self, where: str) -> None:
        """Refuse settings that cannot be used."""
        if not 0 < self.interval < 1:
            raise ParameterError(f"{where}: interval must lie in (0, 1), got {self.interval!r}.")
        if not isinstance(self.n_resamples, int) or self.n_resamples < 100:
            raise ParameterError(
                f"{where}: n_resamples must be an integer >= 100, got {self.n_resamples!r}."
            )

    @property
    def tails(self) -> tuple[float, float]:
        """Levels of the two ends."""
        return (1 - self.interval) / 2, (1 + self.interval) / 2


@dataclass(frozen=True)
class Estimate:
    """A number of a report.

    Attributes
    ----------
    value : float
        The metric; NaN where it is undefined, and ``note`` says why.
    low, high : float
        Its interval.
    standing : {"best", "tied", ""}
        Among the methods.
    limit : float or None
        For a calibration error: what a calibrated method stays below in 95 of 100 data sets.
    p_value : float or None
        How often a calibrated method would look at least as bad.
    note : str
        Why the value or its interval is undefined.
    """

    value: float
    low: float
    high: float
    standing: Literal["best", "tied", ""] = ""
    limit: float | None = None
    p_value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """How two methods differ in a metric: first less second, with a simultaneous interval.

    The intervals of all pairs of methods hold together with the stated coverage, so that more
    methods do not make more false findings. ``winner`` is "" for a tie.
    """

    metric: str
    first: str
    second: str
    value: float
    low: float
    high: float
    winner: str


@dataclass(frozen=True)
class Sampled:
    """Values (methods, metrics) and their replicates (resamples, methods, metrics)."""

    values: Floats
    replicates: Floats


# -- replicates --------------------------------------------------------------------------------


def sample_metrics(
    methods: Sequence[Rows], metrics: Sequence[Metric], settings: Resampling
) -> Sampled:
    """Evaluate ``metrics`` for every method, on the rows and on their resamples."""
    n = len(methods[0].y)
    evaluators = [_Evaluator(rows, metrics) for rows in methods]
    values = np.array([[m.value(rows, np.ones(n)) for m in metrics] for rows in methods])
    blocks = [
        np.stack([evaluate(weight) for evaluate in evaluators], axis=1)
        for (weight,) in _resamples(settings, n)
    ]
    return Sampled(values, np.concatenate(blocks))


class _Evaluator:
    """All metrics of one method under any weights, by one dense and one sparse product."""

    def __init__(self, rows: Rows, metrics: Sequence[Metric]) -> None:
        from scipy.sparse import csr_array, vstack

        self._metrics = metrics
        ones = np.ones(len(rows.y))
        self._dense = np.empty((len(ones), 0))
        self._parts: dict[int, list[tuple[bool, slice]]] = {}
        sparse = [csr_array((0, len(ones)))]
        n_sparse = 0
        for j, metric in enumerate(metrics):
            if not isinstance(metric, MeanMetric):
                continue
            columns = metric.columns(rows, ones)
            self._parts[j] = []
            for part in columns if isinstance(columns, tuple) else (columns,):
                if isinstance(part, OneHot):
                    sparse.append(part.matrix)
                    width, start = part.matrix.shape[0], n_sparse
                    n_sparse += width
                else:
                    width, start = part.shape[1], self._dense.shape[1]
                    self._dense = np.concatenate([self._dense, part], axis=1)
                self._parts[j].append((isinstance(part, OneHot), slice(start, start + width)))
        self._sparse = vstack(sparse, format="csr")
        self._ranking = rows.ranking.coarse(MAX_GROUPS)
        as_is = self._ranking.under(ones[None])
        # What merging rows of nearly equal confidence takes from the value is given back.
        self._lost = {
            j: m.value(rows, ones) - float(m.statistic(as_is)[0])
            for j, m in enumerate(metrics)
            if isinstance(m, RankMetric)
        }

    def __call__(self, weight: Floats) -> Floats:
        """Values (R, metrics) under weights (R, n)."""
        total = float(weight.shape[1])
        dense = weighted_means(weight, self._dense)
        sparse = (self._sparse @ np.ascontiguousarray(weight.T)).T / total
        ranked = self._ranking.under(weight)
        found = []
        for j, metric in enumerate(self._metrics):
            if isinstance(metric, RankMetric):
                found.append(metric.statistic(ranked) + self._lost[j])
            elif isinstance(metric, MeanMetric):
                parts = [(sparse if s else dense)[:, at] for s, at in self._parts[j]]
                means = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)
                found.append(metric.finish(means, total))
        return np.stack(found, axis=-1)


def sample_ood(
    scores_in: Sequence[Floats], scores_out: Sequence[Floats], settings: Resampling
) -> Sampled:
    """Evaluate the OOD metrics for every method, resampling familiar and OOD rows apart."""
    groups = [ScoreGroups(a, b) for a, b in zip(scores_in, scores_out, strict=True)]

    def evaluate(weight_in: Floats, weight_out: Floats) -> Floats:
        return np.stack([g.metrics(weight_in, weight_out) for g in groups], axis=1)

    sizes = len(scores_in[0]), len(scores_out[0])
    values = evaluate(np.ones((1, sizes[0])), np.ones((1, sizes[1])))[0]
    blocks = [evaluate(*weights) for weights in _resamples(settings, *sizes)]
    return Sampled(values, np.concatenate(blocks))


def _resamples(settings: Resampling, *sizes: int) -> Iterator[list[Floats]]:
    """Multinomial row weights (block, n) for each of ``sizes``, in blocks of resamples."""
    rng = np.random.default_rng(settings.seed)
    block = max(1, _BLOCK_ELEMENTS // max(sizes))
    for start in range(0, settings.n_resamples, block):
        count = min(block, settings.n_resamples - start)
        yield [
            np.array(
                [
                    np.bincount(rng.integers(n, size=n, dtype=np.int32), minlength=n)
                    for _ in range(count)
                ],
                float,
            )
            for n in sizes
        ]


# -- estimates ---------------------------------------------------------------------------------


def estimates(
    sampled: Sampled,
    definitions: Sequence[Definition],
    settings: Resampling,
    methods: Sequence[Rows] = (),
) -> list[dict[str, Estimate]]:
    """Values with their intervals, one dict {metric name: estimate} a method.

    ``methods`` are the rows of each, for what needs more than resamples: exact intervals and
    calibration tests.
    """
    found: list[dict[str, Estimate]] = []
    for i, values in enumerate(sampled.values):
        found.append({})
        for j, definition in enumerate(definitions):
            value, replicates = float(values[j]), sampled.replicates[:, i, j]
            rows = methods[i] if methods else None
            if np.isnan(value):
                note = getattr(definition, "undefined", "")
                estimate = Estimate(value, np.nan, np.nan, note=note)
            elif rows is not None and len(rows.y) == 1:
                estimate = Estimate(value, np.nan, np.nan, note="an interval needs two rows")
            elif rows is not None and isinstance(definition, Metric) and definition.null:
                estimate = _error_estimate(value, replicates, definition, rows, settings)
            elif rows is not None and isinstance(definition, MeanMetric) and definition.share:
                estimate = _share_estimate(value, replicates, definition, rows, settings)
            else:
                z0, acceleration = _corrections(value, replicates, definition, rows)
                n = None if rows is None else len(rows.y)
                if definition.shifted:
                    # Average precision takes a row that is drawn twice for two rows of one score.
                    replicates = (replicates - (replicates.mean() - value)).clip(0.0, 1.0)
                ends = _bca(replicates, z0, acceleration, settings, n)
                estimate = Estimate(value, *ends)
            found[-1][definition.name] = estimate
    return found


def _bca(
    replicates: Floats, z0: float, acceleration: float, settings: Resampling, n: int | None
) -> tuple[float, float]:
    """Ends of the bias-corrected and accelerated percentile interval (Efron, JASA 1987).

    Quantiles of the replicates at levels Φ(z₀ + (z₀ + z)/(1 − a (z₀ + z))); plain percentiles where
    z₀ and a are 0. Invariant under monotone transforms. Resamples of few rows scatter too little:
    z is a t quantile times √(n/(n − 1)) (Hesterberg, The American Statistician 2015).
    """
    from scipy.special import ndtr, ndtri, stdtrit

    known = replicates[~np.isnan(replicates)]  # a resample without any error has no AUROC of errors
    if len(known) == 0:
        return np.nan, np.nan
    z = ndtri(settings.tails)
    if n is not None:
        z = np.sqrt(n / (n - 1)) * stdtrit(n - 1, settings.tails)
    moved = z0 + z
    levels = ndtr(z0 + moved / (1 - acceleration * moved))
    # Quantiles that are replicates themselves stay defined where some replicates are infinite.
    low, high = np.quantile(known, levels, method="inverted_cdf")
    return float(low), float(high)


def _corrections(
    value: float, replicates: Floats, definition: Definition, rows: Rows | None
) -> tuple[float, float]:
    """Bias correction z₀ and acceleration a.

    Both are a sixth of the skewness for a mean of rows. For an optimum over the rows that are
    judged, which resampling flatters once more, z₀ is the normal score of the share of replicates
    below the value. Elsewhere both are 0: estimating them would add more noise than it mends.
    """
    from scipy.special import ndtri

    if definition.optimised:
        below = np.mean(replicates < value) + 0.5 * np.mean(replicates == value)
        edge = 0.5 / len(replicates)
        return float(ndtri(np.clip(below, edge, 1 - edge))), 0.0
    skewness = _skewness(definition, rows)
    return skewness / 6, skewness / 6


def _skewness(definition: Definition, rows: Rows | None) -> float:
    """Skewness of the mean of one column; 0 for other metrics."""
    if rows is None or not isinstance(definition, MeanMetric):
        return 0.0
    columns = definition.columns(rows, np.ones(len(rows.y)))
    if not isinstance(columns, np.ndarray) or columns.shape[1] != 1:
        return 0.0
    if not np.isfinite(columns).all():
        return 0.0
    centred = columns[:, 0] - columns[:, 0].mean()
    spread = float(np.square(centred).sum())
    if spread <= 1e-20 * float(np.square(columns).sum()):  # equal but for rounding
        return 0.0
    return float((centred**3).sum() / spread**1.5)


def _error_estimate(
    value: float, replicates: Floats, metric: Metric, rows: Rows, settings: Resampling
) -> Estimate:
    """Interval and test of a calibration error.

    Chance adds to an error: to the value, and by resampling once more. Errors behave like norms, so
    what is in the value is estimated by V − √(V² − m²), with m what a calibrated method would show,
    times by how much the labels scatter more than a calibrated method's would. Where a calibrated
    method would show as much as the value, the true error may be 0.
    """
    assert metric.null is not None
    n_draws = int(np.clip(_NULL_ELEMENTS // rows.y.size, _NULL_DRAWS, settings.n_resamples))
    null = metric.null(rows, np.random.default_rng(settings.seed), n_draws)
    p_value = float((1 + (null >= value - TIE).sum()) / (1 + n_draws))
    again = max(0.0, float(np.median(replicates)) - value)
    chance = float(np.median(null)) ** 2 * max(1.0, _scatter(rows))
    inside = value - float(np.sqrt(max(value**2 - chance, 0.0)))
    low, high = np.quantile(replicates, settings.tails) - again
    low = 0.0 if p_value > 1 - settings.interval else low - max(again, inside)
    limit = float(np.quantile(null, settings.interval, method="higher"))
    low, high = min(max(low, 0.0), value), max(high, value)
    return Estimate(value, float(low), float(high), limit=limit, p_value=p_value)


def _scatter(rows: Rows) -> float:
    """Squared deviations of labels from their probabilities, over what these would make them."""
    if isinstance(rows, RegressionRows):
        return 1.0
    p = rows.probs.astype(np.float64)
    expected = 1 - np.square(p).sum(1)
    squares = 2 - 2 * p[np.arange(len(p)), rows.y] - expected
    return float(squares.sum() / expected.sum()) if expected.any() else 1.0


def _share_estimate(
    value: float, replicates: Floats, metric: MeanMetric, rows: Rows, settings: Resampling
) -> Estimate:
    """Clopper–Pearson interval of a share of rows, and the exact test of what it should be."""
    from scipy.stats import binomtest

    if isinstance(rows, RegressionRows) and rows.y.shape[1] > 1:
        # Outputs of a row depend on one another.
        return Estimate(value, *_bca(replicates, 0.0, 0.0, settings, len(rows.y)))
    n = len(rows.y)
    test = binomtest(round(value * n), n, 0.5 if metric.target is None else metric.target)
    exact = test.proportion_ci(settings.interval)
    p_value = None if metric.target is None else float(test.pvalue)
    return Estimate(value, float(exact.low), float(exact.high), p_value=p_value)


# -- differences -------------------------------------------------------------------------------


def differences(
    sampled: Sampled, definitions: Sequence[Definition], names: Sequence[str], settings: Resampling
) -> list[Difference]:
    """All pairs of methods in all metrics that have a better side.

    Per metric the intervals are simultaneous over the pairs (studentised maximum over the paired
    resamples): the chance of any false winner in a metric is 1 − interval at most.
    """
    found = []
    pairs = list(combinations(range(len(names)), 2))
    for j, definition in enumerate(definitions):
        if not definition.better:
            continue
        sign = 1.0 if definition.better == "lower" else -1.0
        usable = [(a, b) for a, b in pairs if not np.isnan(sampled.values[[a, b], j]).any()]
        with np.errstate(invalid="ignore"):  # inf − inf is no evidence of a difference
            value = np.array([sampled.values[a, j] - sampled.values[b, j] for a, b in usable])
            moved = np.array(
                [sampled.replicates[:, a, j] - sampled.replicates[:, b, j] for a, b in usable]
            )
        value, moved = np.nan_to_num(value, nan=0.0, posinf=np.inf, neginf=-np.inf), _no_nan(moved)
        for (a, b), v, (low, high) in zip(
            usable, value, _simultaneous(value, moved, settings), strict=True
        ):
            winner = "" if low <= 0 <= high else names[a] if sign * v < 0 else names[b]
            found.append(
                Difference(
                    definition.name, names[a], names[b], float(v), float(low), float(high), winner
                )
            )
    return found


def _no_nan(a: Floats) -> Floats:
    return np.where(np.isnan(a), 0.0, a)


def _simultaneous(value: Floats, moved: Floats, settings: Resampling) -> Floats:
    """Ends (pairs, 2) around ``value`` (pairs,) from replicates (pairs, R)."""
    if len(value) == 0:
        return np.empty((0, 2))
    finite = np.isfinite(moved).all(1) & np.isfinite(value)
    ends = np.empty((len(value), 2))
    if finite.any():
        spread = moved[finite].std(1)
        centred = moved[finite] - moved[finite].mean(1, keepdims=True)
        unit = np.divide(
            centred, spread[:, None], out=np.zeros_like(centred), where=spread[:, None] > 0
        )
        factor = np.quantile(np.abs(unit).max(0), settings.interval)
        ends[finite] = value[finite, None] + factor * spread[:, None] * np.array([-1.0, 1.0])
    if not finite.all():  # infinite scores have no spread: each pair by its share of the risk
        tail = settings.tails[0] / len(value)
        levels = [tail, 1 - tail]
        ends[~finite] = np.quantile(moved[~finite], levels, axis=1, method="inverted_cdf").T
    return ends


def standings(
    found: Sequence[Difference], definition: Definition, values: dict[str, float]
) -> dict[str, Literal["best", "tied", ""]]:
    """Which methods are best in a metric, and which cannot be told from the best."""
    known = {name: v for name, v in values.items() if not np.isnan(v)}
    if not definition.better or len(known) < 2:
        return dict.fromkeys(values, "")
    top = min(known.values()) if definition.better == "lower" else max(known.values())
    best = {name for name, v in known.items() if v == top}
    if len(best) == len(values):
        return dict.fromkeys(values, "")
    beaten = {
        d.second if d.winner == d.first else d.first
        for d in found
        if d.metric == definition.name and d.winner in best
    }
    return {
        name: "best" if name in best else "" if name in beaten or name not in known else "tied"
        for name in values
    }

"""What a metric is, as data: what it is called, what each row adds, and how that becomes a number.

Nearly every metric is a function of weighted means over rows,

    value(w) = finish( Σ_i w_i c_i / Σ_i w_i ),    c_i = columns of row i,

so that sample weights cost nothing and all resamples of a bootstrap are one matrix product. Bins
are columns that are mostly zero, kept sparse; so are the groups of rows of equal confidence, whose
sums are all that metrics of a ranking need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from uq.calibration.ranking import Ranked
    from uq.calibration.rows import BinaryRows, ClassificationRows, Rows

    Floats = NDArray[np.float64]

TIE = 1e-6  # to which errors are computed: a null value this close below is as large

Finish = Callable[[Any, float], Any]
Columns = Any  # (n, c): an array, a OneHot, or a tuple of both side by side


class TestResult(NamedTuple):
    """Value of a test statistic, and how often a calibrated method would show at least as much."""

    statistic: float
    p_value: float


TestResult.__test__ = False  # type: ignore[attr-defined]  # no test class, as pytest would think


@dataclass(frozen=True)
class Definition:
    """What a report says about a number: key, title, one-line definition, which way is better.

    ``optimised`` metrics are the best over choices made on the rows that are judged; ``shifted``
    ones move when rows are repeated, as resampling does, so that replicates are moved back.
    """

    name: str
    label: str
    definition: str
    better: Literal["lower", "higher", ""]
    optimised: bool = field(default=False, kw_only=True)
    shifted: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Metric(Definition):
    """A metric that can be computed; one of the two subclasses.

    Parameters
    ----------
    null : callable, optional
        For calibration errors. Maps rows, a generator and a number R to R values on data sets whose
        labels were drawn from the predictions: what the metric is for a calibrated method.
    undefined : str
        Why the value can be NaN.
    """

    null: Callable[[Any, np.random.Generator, int], Floats] | None = None
    undefined: str = ""

    def value(self, rows: Rows | BinaryRows, weight: Floats) -> float:
        """Value under row weights of shape (n,)."""
        raise NotImplementedError


@dataclass(frozen=True)
class MeanMetric(Metric):
    """A metric that is a function of weighted means of columns.

    Parameters
    ----------
    columns : callable
        Maps rows and their weights (which may set bins) to an array or a OneHot (n, c), or a tuple
        of these, side by side.
    finish : callable
        Maps weighted means (..., c) and the sum of the weights to values (...).
    share : bool
        Whether the metric is a share of rows, so that its interval can be exact.
    target : float, optional
        What the share should be.
    """

    columns: Callable[[Any, Any], Columns] = lambda rows, weight: np.ones((len(rows.y), 1))
    finish: Finish = lambda means, total: means[..., 0]
    share: bool = False
    target: float | None = None

    def value(self, rows: Rows | BinaryRows, weight: Floats) -> float:
        """Value under row weights of shape (n,)."""
        means = weighted_means(weight[None], self.columns(rows, weight))
        return float(self.finish(means, float(weight.sum()))[0])


@dataclass(frozen=True)
class RankMetric(Metric):
    """A metric of how rows rank by confidence, as a function of :class:`Ranked` groups."""

    statistic: Callable[[Ranked], Floats] = lambda ranking: np.zeros(1)

    def value(self, rows: Rows | BinaryRows, weight: Floats) -> float:
        """Value under row weights of shape (n,)."""
        return float(self.statistic(rows.ranking.under(weight[None]))[0])


def weighted_means(weights: Floats, columns: Columns) -> Floats:
    """Means (R, c) of ``columns`` (n, c) under ``weights`` (R, n); inf counts where w > 0."""
    if isinstance(columns, tuple):
        return np.concatenate([weighted_means(weights, part) for part in columns], -1)
    total = weights.sum(-1, keepdims=True)
    if isinstance(columns, OneHot):
        means: Floats = columns.sums(weights) / total
        return means
    infinite = np.isposinf(columns)
    if not infinite.any():
        means = weights @ columns / total
        return means
    means = weights @ np.where(infinite, 0.0, columns) / total
    return np.where(weights @ infinite.astype(np.float64) > 0, np.inf, means)


def mean_of(quantity: str) -> Callable[[Any, Any], Floats]:
    """Mean over the outputs of the attribute ``quantity`` of the rows, as one column."""

    def columns(rows: Any, weight: Any) -> Floats:
        values: Floats = getattr(rows, quantity)
        return values.reshape(len(values), -1).mean(1, keepdims=True)

    return columns


def root(means: Any, total: float) -> Any:
    """Square root of a single mean."""
    return np.sqrt(means[..., 0])


# -- bins --------------------------------------------------------------------------------------


class OneHot:
    """Columns (n, len(values) · n_bins): each of ``values`` stands in the column of its row's bin.

    Parameters
    ----------
    bins : ndarray of shape (n,) or (n, k)
        Bin of each row, or k bins of each.
    n_bins : int
        Number of bins.
    values : sequence of arrays broadcastable to ``bins``
        What a row adds to its bins.
    """

    def __init__(self, bins: NDArray[np.int64], n_bins: int, values: Sequence[Any]) -> None:
        self.bins: NDArray[np.int64] = bins
        self.n_bins: int = n_bins
        self.values: list[NDArray[Any]] = [np.broadcast_to(v, bins.shape) for v in values]

    def sums(self, weights: Floats) -> Floats:
        """Sums (R, columns) under ``weights`` (R, n)."""
        if len(weights) > 2:
            return np.asarray(self.matrix @ np.ascontiguousarray(weights.T)).T
        shaped = weights.reshape(*weights.shape, *(1,) * (self.bins.ndim - 1))
        flat = self.bins.ravel()

        def sums(values: Floats) -> Floats:
            return np.bincount(flat, values.ravel(), self.n_bins).astype(np.float64, copy=False)

        return np.array([np.concatenate([sums(w * v) for v in self.values]) for w in shaped])

    @cached_property
    def matrix(self) -> Any:
        """The columns as a sparse matrix, transposed: (columns, n)."""
        from scipy.sparse import csc_array, vstack

        n, k = len(self.bins), self.bins.size // max(len(self.bins), 1)
        starts, flat = np.arange(0, n * k + 1, k), self.bins.ravel()
        blocks = []
        for v in self.values:
            columns = csc_array((v.astype(np.float64).ravel(), flat, starts), (self.n_bins, n))
            rows = columns.tocsr()
            rows.eliminate_zeros()
            blocks.append(rows)
        return vstack(blocks, format="csr")


def equal_width_bins(p: Floats, n_bins: int) -> NDArray[np.int64]:
    """Bin min(⌊pB⌋, B − 1) of each probability: p = 1 belongs to the last bin."""
    return np.minimum((p * n_bins).astype(np.int64), n_bins - 1)


def equal_mass_bins(values: Floats, weight: Floats, n_bins: int) -> NDArray[np.int64]:
    """Bin of each value in ``n_bins`` of about equal weight; equal values are never parted.

    A group of equal values goes where its middle falls in the cumulated weight.
    """
    distinct, group = np.unique(values, return_inverse=True)
    mass = np.bincount(group.ravel(), weight, len(distinct))
    middle = (mass.cumsum() - mass / 2) / mass.sum()
    return equal_width_bins(middle, n_bins)[group.ravel()]


def ratio(a: Any, b: Any) -> Any:
    """Quotient a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)


Bins = Callable[["ClassificationRows", "Floats"], "NDArray[np.int64]"]


def binned(
    name: str, label: str, definition: str, *, bins: Bins, n_bins: int, finish: Callable[..., Any]
) -> MeanMetric:
    """Return a metric of confidence and accuracy over bins of the top-label confidence.

    ``finish`` gets, in each bin, the share of rows, Σ confidence / n and Σ correct / n, each
    (R, bins), and n.
    """

    def columns(rows: ClassificationRows, weight: Floats) -> OneHot:
        return OneHot(bins(rows, weight), n_bins, [1.0, rows.confidence, rows.correct])

    def finish_means(means: Floats, total: float) -> Floats:
        return finish(*np.split(means, 3, axis=-1), total)

    def null(rows: ClassificationRows, rng: np.random.Generator, n_draws: int) -> Floats:
        ones = np.ones(len(rows.y))
        where = bins(rows, ones)
        fixed = weighted_means(ones[None], OneHot(where, n_bins, [1.0, rows.confidence]))
        share, confidence = np.split(fixed, 2, axis=-1)
        pattern = OneHot(where, n_bins, [1.0])
        found = [
            finish(share, confidence, pattern.sums(correct) / len(ones), float(len(ones)))
            for correct in draw_correct(rows.confidence, rng, n_draws)
        ]
        return np.concatenate(found)

    return MeanMetric(name, label, definition, "lower", null, columns=columns, finish=finish_means)


_DRAW_ELEMENTS = 1 << 20


def draw_correct(confidence: Floats, rng: np.random.Generator, n_draws: int) -> Any:
    """Blocks (r, n) of whether rows are right, drawn with probability ``confidence``."""
    block = max(1, _DRAW_ELEMENTS // len(confidence))
    limit = confidence.astype(np.float32)
    for start in range(0, n_draws, block):
        shape = min(block, n_draws - start), len(confidence)
        yield (rng.random(shape, dtype=np.float32) < limit).astype(np.float64)

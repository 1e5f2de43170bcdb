"""Conformal prediction intervals and regions around predictive distributions of real targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from uq.calibration.conformal import (
    check_coverage,
    kth_score,
    match_folds,
    pair_folds,
    rank,
    rows_needed,
    warn_too_few,
)
from uq.calibration.density_cells import DensityCells
from uq.calibration.rows import Names, RegressionRows, as_array, check_finite_rows
from uq.distributions import RealPredictive
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]

REAL_SCORES = ("quantile", "normalized", "residual", "density")
# Numbers that one pass over (new rows, held-out rows) or (rows, cells) holds at a time.
_CHUNK = 1 << 20


class ConformalIntervals(BaseEstimator):
    """Intervals that hold the target with a stated probability, whatever the model got wrong.

    Parameters
    ----------
    score : {"quantile", "normalized", "residual", "density"}, default="quantile"
        What a held-out target is judged by.

        - "quantile": its distance outside the equal-tailed interval of ``coverage`` (CQR). Follows
          the shape of the distribution and moves each end by the same number of target units. The
          default: it needs no more than quantiles and changes the predicted interval least.
        - "normalized": its distance from the predictive mean in predictive standard deviations, so
          that intervals are wide where the model is uncertain.
        - "residual": its distance from the predictive mean. All rows get the same width.
        - "density": the predictive mass of where the density is higher than at the target
          (HPD-split). The region is the part of highest density, in several intervals if the
          distribution has several modes (:meth:`region`).
    coverage : float, default=0.9
        Probability c that the interval of a new row holds its target, in (0, 1); of each output by
        itself where there are several.
    symmetric : bool, default=True
        False finds the two ends separately, each missed with probability at most (1 − c)/2, which
        follows a bias of the model but needs twice the rows. Not for "density".

    Attributes
    ----------
    threshold_ : ndarray of shape (m,), or (2, m) below and above if not ``symmetric``
        What held-out targets scored at most, but for a share of 1 − c; infinite with too few rows.
        For "density" the predictive mass that regions hold, or more than 1 if even that of all the
        distribution is too little.
    scores_ : list of ndarray of shape (sides, n_k, m)
        Scores of the held-out rows, for each fold; one fold unless ``fit`` was given several.

    See Also
    --------
    uq.Conformal : the same behind an estimator, which holds the rows out itself.
    QuantileRecalibration : corrects the whole distribution rather than one interval.

    Notes
    -----
    With k = ⌈(n + 1) c⌉ and the k-th smallest score s_(k) of n held-out rows, the interval is
    [a − s_(k) u, b + s_(k) u] where the score is max(a − y, y − b)/u: the ends a, b are both the
    mean, or the quantiles of level (1 ∓ c)/2; the unit u is 1 or the standard deviation. It holds
    the target of a new row with probability in [c, c + 1/(n + 1)], on average over held-out and
    new rows, if these are exchangeable and scores have no ties (with ties at least c; with two
    sides up to 2/(n + 1) more). This is not a promise for each x, and none if the data shift. A
    negative threshold can turn a narrow interval of "quantile" inside out; it is then the point in
    its middle, which covers more than the empty set would.

    If k > n, that is with fewer than c/(1 − c) rows (9 for c = 0.9), intervals are the whole line.

    Lists of the k folds' distributions and targets give cross-conformal intervals (CV+). The held-
    out row i of fold j proposes a_j(x) − s_i u_j(x) and b_j(x) + s_i u_j(x); the ends are the
    (n + 1 − k)-th smallest of the lower and the k-th smallest of the upper proposals. Then
    2c − 1 − √(2/n) is what is certain, and c is typical. For "density" the region would not be one
    of highest density of any distribution, so lists are refused.

    References
    ----------
    J. Lei, M. G'Sell, A. Rinaldo, R. Tibshirani, L. Wasserman, "Distribution-Free Predictive
    Inference for Regression", JASA 2018, arXiv 1604.04173 ("residual", "normalized").
    Y. Romano, E. Patterson, E. Candès, "Conformalized Quantile Regression", NeurIPS 2019, arXiv
    1905.03222 ("quantile").
    R. Izbicki, G. Shimizu, R. Stern, "CD-split and HPD-split: Efficient Conformal Regions in High
    Dimensions", JMLR 2022, arXiv 2007.12778 ("density").
    R. Barber, E. Candès, A. Ramdas, R. Tibshirani, "Predictive inference with the jackknife+",
    Annals of Statistics 2021, arXiv 1905.02928 (CV+).
    C. Gupta, A. Kuchibhotla, A. Ramdas, "Nested conformal prediction and quantile out-of-bag
    ensemble methods", Pattern Recognition 2022, arXiv 1910.10562 (CV+ for other scores).

    Examples
    --------
    Targets are twice as wide as predicted:

    >>> import torch
    >>> from uq.calibration import ConformalIntervals
    >>> from uq.distributions import NormalMixture
    >>> dist = NormalMixture(torch.zeros(1, 999), torch.ones(1, 999))
    >>> y = 2 * torch.special.ndtri(torch.arange(1, 1000, dtype=torch.float64) / 1000)
    >>> conformal = ConformalIntervals(coverage=0.9).fit(dist, y)
    >>> lower, upper = conformal.interval(dist[:1])
    >>> float(upper[0]), float(dist.interval(0.9)[1][0])
    (3.290, 1.645)
    """

    threshold_: Floats
    scores_: list[Floats]

    def __init__(
        self,
        score: Literal["quantile", "normalized", "residual", "density"] = "quantile",
        coverage: float = 0.9,
        symmetric: bool = True,
    ) -> None:
        self.score = score
        self.coverage = coverage
        self.symmetric = symmetric

    # -- fit -------------------------------------------------------------------------------

    def fit(
        self,
        dist: RealPredictive | Sequence[RealPredictive],
        y: ArrayLike | Tensor | Sequence[ArrayLike | Tensor],
    ) -> Self:
        """Score held-out targets.

        Parameters
        ----------
        dist : RealPredictive, or list of them
            Predictive distribution of rows that the model was not trained on. For CV+ a list with
            one for the rows of each fold, by the model that was fitted without them.
        y : array-like of shape (n,) or (n, m), or list of them
            The targets.

        Warns
        -----
        UserWarning
            If there are too few rows, so that all intervals are the whole line.

        Raises
        ------
        DataError
            If shapes do not match, there is NaN, folds differ, a standard deviation that
            "normalized" divides by is 0, or "density" is asked of a distribution without one.
        ParameterError
            If ``score``, ``coverage`` or ``symmetric`` cannot be used.
        """
        where = "ConformalIntervals.fit"
        self._check_parameters()
        folds = pair_folds(where, dist, y)
        if len(folds) > 1 and self.score == "density":
            raise ParameterError(
                f"{where}: score='density' has no cross-conformal region of highest density; give "
                "one distribution of held-out rows, or use 'quantile'."
            )
        scores = [self._scores(RegressionRows(t, d, Names(where, "y", "dist"))) for d, t in folds]
        if len({s.shape[2] for s in scores}) > 1:
            raise DataError(f"{where}: all folds must have the same number of outputs.")
        self.threshold_ = self._threshold(where, scores, self.coverage)
        self.scores_ = scores
        return self

    def _threshold(self, where: str, scores: list[Floats], coverage: float) -> Floats:
        """Threshold for ``coverage``, with a warning if there are too few rows for it."""
        n, level = sum(s.shape[1] for s in scores), self._level(coverage)
        if rank(n, level) > n:
            warn_too_few(
                f"{where}: coverage {coverage:g} needs at least {rows_needed(level)} held-out "
                f"rows, got {n}, so that all intervals will be the whole line; hold out more rows "
                "or lower the coverage."
            )
        threshold = kth_score(np.concatenate(scores, 1).swapaxes(0, 1), level)
        return threshold[0] if self.symmetric else threshold

    def _level(self, coverage: float) -> float:
        """Share of scores up to the threshold, on each side if there are two."""
        return coverage if self.symmetric else (1 + coverage) / 2

    def _check_parameters(self) -> None:
        if self.score not in REAL_SCORES:
            listed = ", ".join(map(repr, REAL_SCORES))
            raise ParameterError(
                f"ConformalIntervals: score must be one of {listed}, got {self.score!r}."
            )
        check_coverage("ConformalIntervals", self.coverage)
        if self.score == "density" and not self.symmetric:
            raise ParameterError(
                "ConformalIntervals: score='density' has no sides; leave symmetric=True."
            )

    def _scores(self, rows: RegressionRows) -> Floats:
        """Scores of held-out rows, shape (sides, n, m)."""
        where = "ConformalIntervals.fit"
        if self.score == "density":
            each = self._each_output(where, rows.prediction)
            columns = [
                np.concatenate([cells.scores(y_j[part]) for part, cells in _chunks(output)])
                for output, y_j in zip(each, rows.y.T, strict=True)
            ]
            return np.stack(columns, -1)[None]
        band = self._band(where, rows.prediction)
        sides = np.stack([band.lower - rows.y, rows.y - band.upper]) / band.unit
        return sides.max(0, keepdims=True) if self.symmetric else sides

    def _band(self, where: str, dist: RealPredictive) -> _Band:
        """Interval that is widened by a multiple of a unit, and the unit."""
        dist = dist.marginal().double()
        n_outputs = dist.batch_shape[1] if len(dist.batch_shape) == 2 else 1

        def columns(t: Tensor) -> Floats:
            return as_array(t).reshape(-1, n_outputs)

        if self.score == "quantile":
            lower, upper = (columns(t) for t in dist.interval(self.coverage))
            return _Band(lower, upper, np.ones_like(lower))
        mean = columns(dist.mean)
        if self.score == "residual":
            return _Band(mean, mean, np.ones_like(mean))
        unit = columns(dist.stddev)
        if not (unit > 0).all():
            row = int((~(unit > 0)).any(1).argmax())
            raise DataError(
                f"{where}: score='normalized' divides by the predictive standard deviation, which "
                f"is {unit[row].min():g} at row {row}; use score='residual' or 'quantile'."
            )
        return _Band(mean, mean, unit)

    def _each_output(self, where: str, dist: RealPredictive) -> list[RealPredictive]:
        """One distribution of batch shape (n,) for each output."""
        if not dist.has_log_prob:
            raise DataError(
                f"{where}: a {type(dist).__name__} has no density; use score='quantile'."
            )
        each = dist.marginal().double()
        if len(each.batch_shape) == 1:
            return [each]
        return [each.output(j) for j in range(each.batch_shape[1])]

    # -- predict ---------------------------------------------------------------------------

    def interval(
        self,
        dist: RealPredictive | Sequence[RealPredictive],
        coverage: float | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the conformal interval of each row.

        Parameters
        ----------
        dist : RealPredictive, or list of them
            Predictive distribution of new rows; a list, from the model of each fold, if ``fit`` was
            given one.
        coverage : float, optional
            Another coverage than that of ``fit``, of the same held-out scores. Not for "quantile",
            whose scores are of the interval of one coverage.

        Returns
        -------
        lower, upper : ndarray of shape (n,) or (n, m)
            Ends, in target units; infinite if there were too few held-out rows. For "density" the
            smallest interval around the region.

        Raises
        ------
        DataError
            If ``dist`` is not of the kind that was fitted.
        ParameterError
            If ``coverage`` is not in (0, 1), or another one for "quantile".
        """
        where = "ConformalIntervals.interval"
        dists = self._check_new(where, dist)
        coverage, threshold = self._asked(where, coverage)
        shape = tuple(dists[0].batch_shape + dists[0].event_shape)
        if self.score == "density":
            hulls = [
                np.concatenate(
                    [np.stack(cells.hull(t)) for _, cells in _chunks(output)] or [np.empty((2, 0))],
                    axis=1,
                )
                for output, t in zip(self._each_output(where, dists[0]), threshold, strict=True)
            ]
            lower, upper = np.stack(hulls, -1)
        else:
            bands = [self._band(where, d) for d in dists]
            for band in bands if len(dists[0]) else []:
                check_finite_rows(f"{where}: dist", band.lower + band.upper)
            if len(bands) == 1:
                below, above = np.broadcast_to(threshold, (2, len(self.scores_[0][0, 0])))
                (band,) = bands
                lower = band.lower - below * band.unit
                upper = band.upper + above * band.unit
            else:
                lower, upper = self._cross(bands, self._level(coverage))
            crossed = lower > upper
            lower[crossed] = upper[crossed] = 0.5 * (lower[crossed] + upper[crossed])
        return lower.reshape(shape), upper.reshape(shape)

    def region(
        self,
        dist: RealPredictive | Sequence[RealPredictive],
        coverage: float | None = None,
    ) -> list[Any]:
        """Return the conformal region of each row as the intervals that it is made of.

        Parameters
        ----------
        dist, coverage
            As for :meth:`interval`.

        Returns
        -------
        list of ndarray of shape (k, 2)
            For each row its k intervals in increasing order, a line (lower, upper) each; one
            interval unless ``score="density"``. With several outputs, for each row a list of one
            such array an output.
        """
        where = "ConformalIntervals.region"
        if self.score != "density":
            ends = np.stack(self.interval(dist, coverage), -1)
            return [r[None] if r.ndim == 1 else [output[None] for output in r] for r in ends]
        (one,) = self._check_new(where, dist)
        _, threshold = self._asked(where, coverage)
        outputs = [
            [region for _, cells in _chunks(output) for region in cells.regions(t)]
            for output, t in zip(self._each_output(where, one), threshold, strict=True)
        ]
        if len(one.batch_shape + one.event_shape) == 1:
            return outputs[0]
        return [list(row) for row in zip(*outputs, strict=True)]

    def _asked(self, where: str, coverage: float | None) -> tuple[float, Floats]:
        """Coverage asked for, and its threshold."""
        if coverage is None or coverage == self.coverage:
            return self.coverage, self.threshold_
        check_coverage(where, coverage)
        if self.score == "quantile":
            raise ParameterError(
                f"{where}: held-out rows were judged by the interval of coverage "
                f"{self.coverage:g}, got coverage={coverage:g}; fit with that coverage, or with "
                "'normalized', 'residual' or 'density' in place of 'quantile', which give any."
            )
        return coverage, self._threshold(where, self.scores_, coverage)

    def _check_new(self, where: str, dist: Any) -> list[Any]:
        check_is_fitted(self)
        n_outputs = self.scores_[0].shape[2]
        dists = match_folds(where, dist, len(self.scores_))
        for d in dists:
            if not isinstance(d, RealPredictive):
                raise DataError(
                    f"{where}: dist must be a predictive distribution over real targets, got a "
                    f"{type(d).__name__}."
                )
            shape = tuple(d.batch_shape + d.event_shape)
            if len(shape) not in (1, 2) or (shape[1] if len(shape) == 2 else 1) != n_outputs:
                raise DataError(
                    f"{where}: fitted on {n_outputs} output(s), but dist has shape {shape}; "
                    f"expected {'(n,)' if n_outputs == 1 else f'(n, {n_outputs})'}."
                )
        return dists

    def _cross(self, bands: list[_Band], level: float) -> tuple[Floats, Floats]:
        """Ends of the CV+ intervals, (n, m) each."""
        n_rows, n_outputs = bands[0].lower.shape
        n = sum(s.shape[1] for s in self.scores_)
        k = rank(n, level)
        lower, upper = np.full((2, n_rows, n_outputs), np.inf)
        lower *= -1
        if k > n:
            return lower, upper
        size = max(1, _CHUNK // n)
        for start in range(0, n_rows, size):
            part = slice(start, start + size)
            for j in range(n_outputs):
                below, above = [], []
                for band, scores in zip(bands, self.scores_, strict=True):
                    unit = band.unit[part, j, None]
                    below.append(band.lower[part, j, None] - scores[0, :, j] * unit)
                    above.append(band.upper[part, j, None] + scores[-1, :, j] * unit)
                lower[part, j] = np.partition(np.concatenate(below, 1), n - k, axis=1)[:, n - k]
                upper[part, j] = np.partition(np.concatenate(above, 1), k - 1, axis=1)[:, k - 1]
        return lower, upper


@dataclass(frozen=True)
class _Band:
    lower: Floats  # (n, m)
    upper: Floats
    unit: Floats


def _chunks(dist: RealPredictive) -> Iterator[tuple[slice, DensityCells]]:
    """Cells of a few thousand rows at a time."""
    size = _CHUNK >> 8
    for start in range(0, len(dist), size):
        part = slice(start, start + size)
        yield part, DensityCells(dist[part])

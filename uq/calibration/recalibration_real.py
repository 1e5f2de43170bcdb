"""Recalibrators of real targets: fitted on held-out rows, they map predictives to predictives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from uq.calibration.recalibration import Recalibrator
from uq.calibration.rows import Names, RegressionRows, check_weight
from uq.distributions import NormalMixture, RealPredictive, Recalibrated
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

_DEFAULT_LEVELS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975)
# With a knot at every row: the fewest rows, and the share of them on one side for which F(y) may
# round to 0 or 1.
_MIN_ROWS, _MAX_EDGE_SHARE = 10, 0.025
# Steps of the search over log s: from 2⁻¹⁰ to 2¹⁰ times the scale that matches the second moment.
_SCALE_GRID = np.log(2) * np.linspace(-10, 10, 41)


class VarianceScaling(Recalibrator):
    """Stretch each predictive distribution about its mean by one learned factor an output.

    Attributes
    ----------
    scale_ : ndarray of shape (m,)
        The factor s > 0 of each output: above 1 where the predictions were over-confident.

    See Also
    --------
    uq.calibration.QuantileRecalibration : also mends a bias and a wrong shape.

    Notes
    -----
    A target is modelled as Y = μ + s (Y₀ − μ), with Y₀ from the prediction and μ its mean, so that
    locations of a mixture become μ + s (μ_k − μ) and its scales s σ_k: the result is a
    :class:`~uq.distributions.NormalMixture` with both parts of its variance multiplied by s². The
    factor minimises the negative log likelihood of the output's mixture on the held-out rows,

        Σ_i w_i [log s − log p_i(μ_i + (y_i − μ_i)/s)],

    which for a single Normal gives s² = Σ w z² / Σ w with z = (y − μ)/σ; a mixture is searched over
    a grid of log s, then refined, and never comes out worse than s = 1.

    References
    ----------
    D. Levi, L. Gispan, N. Giladi, E. Fetaya, "Evaluating and Calibrating Uncertainty Prediction in
    Regression Tasks", Sensors 22(15), 2022, arXiv 1905.11659, for one Normal.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import VarianceScaling
    >>> from uq.distributions import NormalMixture
    >>> dist = NormalMixture(torch.zeros(1, 4), torch.ones(1, 4))
    >>> scaling = VarianceScaling().fit(dist, [-2.0, 2.0, -2.0, 2.0])
    >>> scaling.scale_
    array([2.])
    >>> scaling.transform(dist).stddev
    tensor([2., 2., 2., 2.])
    """

    scale_: Floats

    def fit(self, dist: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Find the factors.

        Parameters
        ----------
        dist : NormalMixture
            Predictive distribution of rows that the model was not trained on.
        y : array-like of shape (n,) or (n, m)
            Their targets.
        sample_weight : array-like of shape (n,), optional
            Weight of each row; a weight of 2 is the same as the row twice.

        Raises
        ------
        DataError
            If ``dist`` is not a NormalMixture, shapes do not match, or every target equals its
            predicted mean.
        """
        _need_mixture("VarianceScaling.fit", dist)
        rows = RegressionRows(y, dist, Names("VarianceScaling.fit", "y", "dist"))
        weight = check_weight("VarianceScaling.fit", sample_weight, len(rows.y))
        z2 = np.average(np.square(rows.error) / rows.variance, axis=0, weights=weight)
        if not z2.all():
            raise DataError(
                "VarianceScaling.fit: every target equals its predicted mean, so no scale > 0 is "
                "most likely; were these rows held out?"
            )
        self.scale_ = np.sqrt(z2)  # exact for one Normal, a start for mixtures
        if dist.n_draws > 1:
            each: Any = rows.prediction  # NormalMixture, as dist
            outputs = (
                [each.output(j) for j in range(rows.y.shape[1])] if dist.loc.ndim > 2 else [each]
            )
            self.scale_ = np.array(
                [
                    _best_scale(output, y_j, weight, start)
                    for output, y_j, start in zip(outputs, rows.y.T, self.scale_, strict=True)
                ]
            )
        return self

    def transform(self, dist: Any) -> NormalMixture:
        """Stretch ``dist`` about its mean.

        Raises
        ------
        DataError
            If ``dist`` is not a NormalMixture, or has other outputs than were fitted.
        """
        check_is_fitted(self)
        _need_mixture("VarianceScaling.transform", dist)
        _check_outputs("VarianceScaling.transform", dist, len(self.scale_))
        factor = torch.as_tensor(self.scale_, dtype=dist.loc.dtype, device=dist.loc.device)
        factor = factor if dist.loc.ndim > 2 else factor[0]
        scaled = dist.affine(dist.mean * (1 - factor), factor)
        scaled.index = dist.index
        return scaled


class QuantileRecalibration(Recalibrator):
    """Correct the levels of predictive quantiles to the shares of targets found below them.

    Parameters
    ----------
    levels : sequence of float or None, default=(0.025, 0.05, 0.1, 0.2, …, 0.9, 0.95, 0.975)
        Levels, increasing within (0, 1), whose predictive quantiles are corrected exactly; between
        them the correction is linear. By default the deciles and the ends of the 90 % and 95 %
        intervals: a dozen numbers, which 39 rows can give and which cost a log score
        about 13/(2n) nats of noise. None makes every held-out row a knot (isotonic regression).

    Attributes
    ----------
    predicted_ : ndarray of shape (m, K)
        Knots of the map of each output: levels that the predictions claim, from 0 to 1.
    observed_ : ndarray of shape (m, K)
        Share of targets found below them.

    See Also
    --------
    uq.calibration.VarianceScaling : one number an output, for few rows or extreme over-confidence.
    sklearn.isotonic.IsotonicRegression : agrees with ``levels=None`` at the held-out rows.

    Notes
    -----
    With u_i = F_i(y_i) of n held-out rows, sorted, the target of a new row falls below its
    predictive quantile of level u_(i) with probability i/(n + 1), exactly, where rows are
    exchangeable. The map R goes through (0, 0), (1, 1) and, with ``levels=None``, all points
    (u_(i), i/(n + 1)), ties having their mean rank; the paper's isotonic regression of the
    empirical distribution of u on u is this map, since that distribution never decreases. Otherwise
    it goes through the points of that line at the heights ``levels``. The result is
    :class:`~uq.distributions.Recalibrated`, whose cdf is R(F(y)).

    Why not all rows by default: for quantiles and coverage the two hardly differ, but the density
    is multiplied by the slope of R, and the slope between neighbouring rows is noise. On calibrated
    predictions it costs a fresh row 1 − γ ≈ 0.42 nats, however many rows were held out.

    R acts on levels, so it cannot widen predictions that put 0 or 1 (to rounding) below a target.

    References
    ----------
    V. Kuleshov, N. Fenner, S. Ermon, "Accurate Uncertainties for Deep Learning Using Calibrated
    Regression", ICML 2018, arXiv 1807.00263, algorithm 1.

    Examples
    --------
    Targets are twice as wide as predicted, so that the level 0.975 comes out near 0.84:

    >>> import torch
    >>> from uq.calibration import QuantileRecalibration
    >>> from uq.distributions import NormalMixture
    >>> dist = NormalMixture(torch.zeros(1, 999), torch.ones(1, 999))
    >>> y = 2 * torch.special.ndtri(torch.arange(1, 1000, dtype=torch.float64) / 1000)
    >>> fitted = QuantileRecalibration().fit(dist, y)
    >>> new = fitted.transform(dist[:1])
    >>> lower, upper = new.interval(0.95)
    >>> round(float(upper), 2), round(float(dist.quantile(0.975)[0]), 2)
    (3.92, 1.96)
    """

    predicted_: Floats
    observed_: Floats

    def __init__(self, levels: Sequence[float] | None = _DEFAULT_LEVELS) -> None:
        self.levels = levels

    def fit(self, dist: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Find the map of each output.

        Parameters
        ----------
        dist : RealPredictive
            Predictive distribution of rows that the model was not trained on.
        y : array-like of shape (n,) or (n, m)
            Their targets.
        sample_weight : array-like of shape (n,), optional
            Weight of each row; a weight of 2 is the same as the row twice.

        Raises
        ------
        DataError
            If shapes do not match, there are too few rows for the outermost level, or too many
            targets lie where the predictive level is 0 or 1.
        ParameterError
            If ``levels`` do not increase within (0, 1).
        """
        where = "QuantileRecalibration.fit"
        levels = None if self.levels is None else _check_levels(self.levels)
        rows = RegressionRows(y, dist, Names(where, "y", "dist"))
        weight = check_weight(where, sample_weight, len(rows.y))
        used = weight > 0
        maps = [_level_map(where, pit, weight[used], levels) for pit in rows.pit[used].T]
        n_knots = max(len(predicted) for predicted, _ in maps)
        padded = [_pad(*knots, n_knots) for knots in maps]
        self.predicted_ = np.stack([predicted for predicted, _ in padded])
        self.observed_ = np.stack([observed for _, observed in padded])
        return self

    def transform(self, dist: Any) -> Recalibrated:
        """Recalibrate the levels of ``dist``.

        Raises
        ------
        DataError
            If ``dist`` is not a RealPredictive with a density, or has other outputs than were
            fitted.
        """
        check_is_fitted(self)
        if not isinstance(dist, RealPredictive):
            raise DataError(
                "QuantileRecalibration.transform: dist must be a predictive distribution over real "
                f"targets, got a {type(dist).__name__}."
            )
        _check_outputs("QuantileRecalibration.transform", dist, len(self.predicted_))
        out = Recalibrated(dist, self.predicted_, self.observed_)
        out.index = dist.index
        return out


# -- helpers -----------------------------------------------------------------------------------


def _need_mixture(where: str, dist: object) -> None:
    if not isinstance(dist, NormalMixture):
        raise DataError(
            f"{where}: dist must be a NormalMixture, got a {type(dist).__name__}; use "
            "QuantileRecalibration for other distributions of real targets."
        )


def _check_outputs(where: str, dist: RealPredictive, n_outputs: int) -> None:
    shape = tuple(dist.batch_shape + dist.event_shape)
    if len(shape) not in (1, 2) or (shape[1] if len(shape) == 2 else 1) != n_outputs:
        raise DataError(
            f"{where}: fitted on {n_outputs} output(s), but dist has shape {shape}; expected "
            f"{'(n,)' if n_outputs == 1 else f'(n, {n_outputs})'}."
        )


def _best_scale(dist: NormalMixture, y: Floats, weight: Floats, start: float) -> float:
    """Scale about the mean that minimises the weighted NLL of ``y`` under a mixture."""
    from scipy.optimize import minimize_scalar

    mean = dist.mean
    error = torch.as_tensor(y, device=mean.device) - mean

    def nll(log_s: float) -> float:
        log_p = dist.log_prob(mean + error * math.exp(-log_s)).cpu().numpy()
        return float(log_s - np.average(log_p, weights=weight))

    # The NLL of a mixture can have several valleys.
    grid = np.append(math.log(start) + _SCALE_GRID, 0.0)
    best = grid[int(np.argmin([nll(log_s) for log_s in grid]))]
    step = _SCALE_GRID[1] - _SCALE_GRID[0]
    found = minimize_scalar(
        nll, bounds=(best - step, best + step), method="bounded", options={"xatol": 1e-9}
    )
    return math.exp(found.x if found.fun < nll(best) else best)


def _check_levels(levels: Sequence[float]) -> Floats:
    q = np.asarray(levels, dtype=np.float64)
    ends = np.concatenate([[0.0], q.ravel(), [1.0]])
    if q.ndim != 1 or not q.size or not (np.diff(ends) > 0).all():
        raise ParameterError(
            "QuantileRecalibration: levels must be a sequence that increases within (0, 1), or "
            f"None, got {levels!r}."
        )
    return q


def _level_map(
    where: str, pit: Floats, weight: Floats, levels: Floats | None
) -> tuple[Floats, Floats]:
    """Knots (predicted level, observed share) of the map of one output, ends included."""
    u, group = np.unique(pit, return_inverse=True)
    size = np.bincount(group, weight)
    total = float(size.sum())
    rank = np.cumsum(size) - 0.5 * (size - 1)  # mean rank of rows that are tied
    inside = (u > 0) & (u < 1)
    n_low, n_high = float(size[u <= 0].sum()), float(size[u >= 1].sum())
    u, share = u[inside], rank[inside] / (total + 1)

    tail = _MAX_EDGE_SHARE if levels is None else min(levels[0], 1 - levels[-1])
    needed = _MIN_ROWS if levels is None else math.ceil(1 / tail - 1e-9) - 1
    if total < needed:
        raise DataError(
            f"{where}: these levels need at least {needed} rows (or as much total weight), got "
            f"{total:g}; hold out more rows, give levels nearer to 0.5, or use VarianceScaling."
        )
    enough = len(u) > 0 and max(n_low, n_high) <= tail * total
    if enough and levels is not None:
        enough = share[0] <= levels[0] + 1e-12 and share[-1] >= levels[-1] - 1e-12
        u, share = np.interp(levels, share, u), levels
    u, share = np.concatenate([[0.0], u, [1.0]]), np.concatenate([[0.0], share, [1.0]])
    if not enough or (np.diff(u) <= 0).any():
        raise DataError(
            f"{where}: too many targets are tied in predictive level: {n_low:g} of {total:g} have "
            f"level 0 to rounding and {n_high:g} level 1, which no map of levels can mend; apply "
            "VarianceScaling first (or spread out the weights, where these make the ties)."
        )
    return u, share


def _pad(predicted: Floats, observed: Floats, n_knots: int) -> tuple[Floats, Floats]:
    """Add knots within the last, straight piece, so that all outputs have as many."""
    more = np.linspace(0, 1, n_knots - len(predicted) + 2)[:-1]
    ends = [a[-2] + more * (a[-1] - a[-2]) for a in (predicted, observed)]
    return (
        np.concatenate([predicted[:-2], ends[0], [1.0]]),
        np.concatenate([observed[:-2], ends[1], [1.0]]),
    )

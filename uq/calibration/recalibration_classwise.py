"""Recalibrators that map the averaged probability of each class by a curve of its own.

With p̄_k the probability of class k averaged over draws and a curve g_k, increasing or of steps,
fitted to whether the label is k (one class against the rest),

    q_k = g_k(p̄_k) / Σ_j g_j(p̄_j).

The draws are averaged first, so the result has one draw, and no epistemic uncertainty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from uq.calibration.definitions import equal_mass_bins
from uq.calibration.recalibration import (
    Recalibrator,
    check_applicable,
    check_held_out,
    mixture_like,
)
from uq.calibration.rows import as_array
from uq.distributions import CategoricalMixture, ClassPredictive
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]
    Curves = tuple[NDArray[np.float64], ...]


class IsotonicCalibration(Recalibrator):
    """Map the probability of each class by the best increasing curve.

    Attributes
    ----------
    curves_ : tuple of ndarray of shape (2, n_knots), one a class
        Probabilities, and what they are mapped to; linear in between, constant beyond.
    classes_ : ndarray of shape (n_classes,)
        Labels of the predictions that it was fitted on.

    See Also
    --------
    BetaCalibration : a curve of three parameters, which needs fewer rows.
    sklearn.calibration.CalibratedClassifierCV : ``method="isotonic"``, the same for two classes but
        for the bounds.

    Notes
    -----
    g_k minimises Σ w (g_k(p̄_k) − 1[y = k])² among increasing functions (pool adjacent violators).
    With n rows and K classes it is kept within [ε, 1 − (K − 1) ε], ε = 1/(K (n + 1)), so that no
    class is ruled out and a row where all classes are at their least becomes uniform. For two
    classes the two curves mirror each other. Needs some 1,000 rows not to overfit.

    Draws are averaged first: the result has one draw, and no epistemic uncertainty.

    References
    ----------
    B. Zadrozny, C. Elkan. "Transforming classifier scores into accurate multiclass probability
    estimates." KDD 2002.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import IsotonicCalibration
    >>> from uq.distributions import CategoricalMixture
    >>> p = torch.tensor([0.1, 0.9]).repeat(50)
    >>> dist = CategoricalMixture(torch.stack([1 - p, p], -1).log()[None])
    >>> y = [0, 1, 1, 1, 0, 1, 0, 1, 0, 0] * 10  # 1 of 5 at p = 0.1, 4 of 5 at p = 0.9
    >>> IsotonicCalibration().fit(dist, y).transform(dist[:2]).probs[:, 1].numpy().round(4)
    array([0.2, 0.8])
    """

    curves_: Curves
    classes_: NDArray[Any]

    def fit(
        self, dist: ClassPredictive, y: ArrayLike | Tensor, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Fit the curves to held-out labels.

        Parameters
        ----------
        dist : ClassPredictive
            Predictive distribution of rows that the model was not trained on.
        y : array-like of shape (n,)
            Their labels, as in ``dist.classes``.
        sample_weight : array-like of shape (n,), optional
            Weight of each row; 2 is the same as the row twice.

        Raises
        ------
        DataError
            If labels and predictions do not match, or ``y`` has fewer than two classes.
        """
        from sklearn.isotonic import IsotonicRegression

        checked, positions, weight = check_held_out(self, dist, y, sample_weight)
        least = 1 / (dist.n_classes * (weight.sum() + 1))
        most = 1 - (dist.n_classes - 1) * least
        curves = []
        for k, p in enumerate(as_array(checked.probs).T):
            curve = IsotonicRegression(y_min=least, y_max=most).fit(p, positions == k, weight)
            curves.append(np.stack([curve.X_thresholds_, curve.y_thresholds_]))
        self.curves_, self.classes_ = tuple(curves), dist.classes
        return self

    def transform(self, dist: ClassPredictive) -> CategoricalMixture:
        """Return the recalibrated probabilities, as a mixture of one draw."""
        check_applicable(self, dist)
        p = as_array(dist.probs)
        return _one_draw(dist, [np.interp(p[..., k], *c) for k, c in enumerate(self.curves_)])


class HistogramBinning(Recalibrator):
    """Replace the probability of each class by how often the class came true in its bin.

    Parameters
    ----------
    n_bins : int, default=15
        Number of bins of each class, of equal weight.

    Attributes
    ----------
    curves_ : tuple of ndarray of shape (2, n_bins), one a class
        Least probability of each bin, and what the bin is mapped to. Equal probabilities share a
        bin, so there may be fewer bins.
    classes_ : ndarray of shape (n_classes,)
        Labels of the predictions that it was fitted on.

    See Also
    --------
    IsotonicCalibration : bins chosen so that the curve increases.

    Notes
    -----
    A bin of total weight n_b that holds weight m_b of class k is mapped to (m_b + 1/K) / (n_b + 1):
    one row more, shared by the K classes, so that none is ruled out. A bin starts at its least
    held-out probability; below the first bin the first is used, and 1 belongs to the last.

    Draws are averaged first: the result has one draw, and no epistemic uncertainty.

    References
    ----------
    B. Zadrozny, C. Elkan. "Obtaining calibrated probability estimates from decision trees and naive
    Bayesian classifiers." ICML 2001.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import HistogramBinning
    >>> from uq.distributions import CategoricalMixture
    >>> p = torch.tensor([0.1, 0.9]).repeat(50)
    >>> dist = CategoricalMixture(torch.stack([1 - p, p], -1).log()[None])
    >>> y = [0, 1, 1, 1, 0, 1, 0, 1, 0, 0] * 10  # 1 of 5 at p = 0.1, 4 of 5 at p = 0.9
    >>> HistogramBinning(n_bins=2).fit(dist, y).transform(dist[:2]).probs[:, 1].numpy().round(4)
    array([0.2059, 0.7941])
    """

    curves_: Curves
    classes_: NDArray[Any]

    def __init__(self, n_bins: int = 15) -> None:
        self.n_bins = n_bins

    def fit(
        self, dist: ClassPredictive, y: ArrayLike | Tensor, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Fit the bins to held-out labels.

        Parameters
        ----------
        dist : ClassPredictive
            Predictive distribution of rows that the model was not trained on.
        y : array-like of shape (n,)
            Their labels, as in ``dist.classes``.
        sample_weight : array-like of shape (n,), optional
            Weight of each row; 2 is the same as the row twice.

        Raises
        ------
        DataError
            If labels and predictions do not match, ``y`` has fewer than two classes, or there are
            fewer rows than bins.
        ParameterError
            If ``n_bins`` is not a positive integer.
        """
        if not isinstance(self.n_bins, int | np.integer) or self.n_bins < 1:
            raise ParameterError(
                f"HistogramBinning: n_bins must be an integer >= 1, got {self.n_bins!r}."
            )
        checked, positions, weight = check_held_out(self, dist, y, sample_weight)
        if len(positions) < self.n_bins:
            raise DataError(
                f"HistogramBinning.fit: y has {len(positions)} rows of positive weight for "
                f"n_bins = {self.n_bins}; give more rows or lower n_bins."
            )
        columns = as_array(checked.probs).T
        self.curves_ = tuple(
            _binned(p, positions == k, weight, int(self.n_bins), 1 / dist.n_classes)
            for k, p in enumerate(columns)
        )
        self.classes_ = dist.classes
        return self

    def transform(self, dist: ClassPredictive) -> CategoricalMixture:
        """Return the recalibrated probabilities, as a mixture of one draw."""
        check_applicable(self, dist)
        p = as_array(dist.probs)
        columns = []
        for k, (least, value) in enumerate(self.curves_):
            # Bins start at their least value: no later bin may start at or below p.
            bins = np.searchsorted(least[1:], p[..., k], side="right")
            columns.append(value[bins])
        return _one_draw(dist, columns)


def _binned(p: Floats, hit: NDArray[np.bool_], weight: Floats, n_bins: int, prior: float) -> Floats:
    """Least probability and value of each bin that is not empty, shape (2, n_bins)."""
    _, bins = np.unique(equal_mass_bins(p, weight, n_bins), return_inverse=True)
    least = np.full(bins.max() + 1, np.inf)
    np.minimum.at(least, bins, p)
    total, hits = np.bincount(bins, weight), np.bincount(bins, weight * hit)
    return np.stack([least, (hits + prior) / (total + 1)])


def _one_draw(dist: ClassPredictive, columns: list[Floats]) -> CategoricalMixture:
    """Mixture of one draw with probabilities proportional to ``columns``."""
    q = torch.as_tensor(np.stack(columns, -1), device=dist.probs.device)
    return mixture_like(dist, q.log()[None])

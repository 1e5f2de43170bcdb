"""Recalibrators: fitted on held-out rows, they map predictive distributions to better ones.

Here are what all of them share and the two for classes that fit a single number: with the log
probabilities ℓ_s of draw s, or with evidence α − prior, and held-out rows i of weight w_i,

    temperature  p̄(y) = mean_s softmax(ℓ_s / T)_y,    evidence  p(y) ∝ prior + c (α_y − prior),

with T or c = argmin −Σ_i w_i log p(y_i | x_i).
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from uq.calibration.rows import ClassificationRows, Names, check_weight
from uq.distributions import (
    CategoricalMixture,
    ClassPredictive,
    DirichletCategorical,
    Predictive,
)
from uq.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

# A class of probability 0 counts as one of the smallest normal float64, so that it can be scaled.
_FLOOR = math.log(np.finfo(np.float64).tiny)


class Recalibrator(BaseEstimator, ABC):
    """Base class of recalibrators: fitted on held-out rows, then applied to any prediction.

    A subclass takes plain data as constructor parameters, and keeps what it fits in attributes that
    end in ``_`` and are numbers or arrays, so that it can be cloned, pickled and saved.

    Examples
    --------
    One of your own divides log probabilities by a number that is given:

    >>> import torch
    >>> from uq.calibration import Recalibrator
    >>> from uq.distributions import CategoricalMixture
    >>> class Soften(Recalibrator):
    ...     def __init__(self, by=2.0):
    ...         self.by = by
    ...     def fit(self, dist, y, sample_weight=None):
    ...         return self  # nothing to learn
    ...     def transform(self, dist):
    ...         return CategoricalMixture(dist.logits / self.by)
    >>> dist = CategoricalMixture(torch.tensor([[[4.0, 0.0]]]))
    >>> Soften().fit(dist, [0]).transform(dist).probs.numpy().round(3)  # from 0.982
    array([[0.881, 0.119]])
    """

    @abstractmethod
    def fit(self, dist: Any, y: ArrayLike | Tensor, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to predictions of rows that the model was not trained on.

        Parameters
        ----------
        dist : Predictive
            Predictive distribution of the rows.
        y : array-like
            Labels or targets of the rows.
        sample_weight : array-like of shape (n,), optional
            Weight of each row; a weight of 2 is the same as the row twice.

        Returns
        -------
        Recalibrator
            This object.
        """

    @abstractmethod
    def transform(self, dist: Any) -> Predictive:
        """Return the recalibrated predictive distribution of the same rows."""


# -- one number --------------------------------------------------------------------------------


class TemperatureScaling(Recalibrator):
    """Divide the log probabilities of each draw by one temperature.

    T > 1 flattens over-confident predictions, T < 1 sharpens timid ones. The most probable class of
    a draw never changes, and with one draw neither does that of the prediction.

    Attributes
    ----------
    temperature_ : float
        T, in [0.01, 100].
    classes_ : ndarray of shape (n_classes,)
        Labels of the predictions that it was fitted on.

    See Also
    --------
    VectorScaling : a scale and a bias for each class.
    sklearn.calibration.CalibratedClassifierCV : ``method="temperature"``, without draws.

    Notes
    -----
    p̄(y) = mean_s softmax(ℓ_s / T)_y, and T minimises −Σ w log p̄(y). For one draw this is convex in
    1/T; for more it need not be, so log T is searched on a grid, then by Brent's method. The
    averaged probabilities themselves are tempered if ``dist`` is not made of draws.

    References
    ----------
    C. Guo, G. Pleiss, Y. Sun, K. Weinberger. "On calibration of modern neural networks." ICML 2017.
    arXiv:1706.04599.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import TemperatureScaling
    >>> from uq.distributions import CategoricalMixture
    >>> dist = CategoricalMixture(torch.tensor([[[8.0, 0.0]] * 4]))  # sure of class 0 ...
    >>> recalibrator = TemperatureScaling().fit(dist, [0, 0, 0, 1])  # ... which is right in 3 of 4
    >>> recalibrator.transform(dist).probs[0].numpy().round(4)
    array([0.75, 0.25])
    >>> recalibrator.temperature_  # 8 / log 3
    7.282
    """

    temperature_: float
    classes_: NDArray[Any]

    def fit(
        self, dist: ClassPredictive, y: ArrayLike | Tensor, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Fit the temperature to held-out labels.

        Parameters
        ----------
        dist : ClassPredictive
            Predictive distribution of rows that the model was not trained on.
        y : array-like of shape (n,)
            Their labels, as in ``dist.classes``.
        sample_weight : array-like of shape (n,), optional
            Weight of each row; 2 is the same as the row twice.

        Warns
        -----
        ConvergenceWarning
            If T ends at a bound: all rows are right, so that sharper is always better, or the
            predictions tell nothing about the labels.

        Raises
        ------
        DataError
            If labels and predictions do not match, or ``y`` has fewer than two classes.
        """
        rows = HeldOut.of(self, dist, y, sample_weight)
        self.temperature_ = _search_scale(
            f"{type(self).__name__}.fit: temperature_",
            lambda t: float(rows.neg_log(rows.log_p / t)),
            limit=100.0,
            sharper="lower",
        )
        self.classes_ = dist.classes
        return self

    def transform(self, dist: ClassPredictive) -> CategoricalMixture:
        """Return the mixture of the tempered draws."""
        check_applicable(self, dist)
        return mixture_like(dist, log_probs(dist) / self.temperature_)


class EvidenceScaling(Recalibrator):
    """Multiply the evidence of Dirichlet predictions by one number.

    Evidential networks are held back in training, so that their probabilities are far too timid;
    c > 1 undoes that. The most probable class and the order of rows by total evidence stay.

    Attributes
    ----------
    scale_ : float
        c, in [1e-6, 1e6].
    classes_ : ndarray of shape (n_classes,)
        Labels of the predictions that it was fitted on.

    See Also
    --------
    TemperatureScaling : for predictions that are made of draws.

    Notes
    -----
    α ← prior + c · (α − prior), and c minimises −Σ w log(α_y / S). There may be several minima, so
    log c is searched on a grid, then by Brent's method.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import EvidenceScaling
    >>> from uq.distributions import DirichletCategorical
    >>> dist = DirichletCategorical(torch.tensor([[1.5, 1.0], [1.0, 1.5]] * 5))  # p = 0.6
    >>> recalibrator = EvidenceScaling().fit(dist, [0, 1] * 4 + [1, 0])  # right in 8 of 10
    >>> recalibrator.scale_  # (1 + c/2) / (2 + c/2) = 0.8
    6.0
    >>> recalibrator.transform(dist[:1]).concentration
    tensor([[4., 1.]], dtype=torch.float64)
    """

    scale_: float
    classes_: NDArray[Any]

    def fit(
        self,
        dist: DirichletCategorical,
        y: ArrayLike | Tensor,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Fit the scale to held-out labels.

        Parameters
        ----------
        dist : DirichletCategorical
            Predictive distribution of rows that the model was not trained on.
        y : array-like of shape (n,)
            Their labels, as in ``dist.classes``.
        sample_weight : array-like of shape (n,), optional
            Weight of each row; 2 is the same as the row twice.

        Warns
        -----
        ConvergenceWarning
            If c ends at a bound: all rows are right, so that sharper is always better, or the
            evidence tells nothing about the labels.

        Raises
        ------
        DataError
            If ``dist`` is no DirichletCategorical, labels and predictions do not match, or ``y``
            has fewer than two classes.
        """
        self._check_dirichlet("fit", dist)
        checked, positions, weight = check_held_out(self, dist, y, sample_weight)
        evidence, prior = checked.evidence.detach(), checked.prior
        share = torch.as_tensor(weight / weight.sum(), device=evidence.device)
        where = torch.as_tensor(positions, device=evidence.device)[:, None]
        of_label, total = evidence.gather(1, where).squeeze(1), evidence.sum(1)
        none = prior * dist.n_classes

        def neg_log(c: float) -> float:
            log_odds = (none + c * total).log() - (prior + c * of_label).log()
            return float((share * log_odds).sum())

        name = f"{type(self).__name__}.fit: scale_"
        self.scale_ = _search_scale(name, neg_log, limit=1e6, sharper="higher")
        self.classes_ = dist.classes
        return self

    def transform(self, dist: DirichletCategorical) -> DirichletCategorical:
        """Return the Dirichlet predictive with scaled evidence, in float64."""
        check_applicable(self, dist)
        self._check_dirichlet("transform", dist)
        alpha = dist.prior + self.scale_ * dist.evidence
        scaled = DirichletCategorical(alpha, classes=dist.classes, prior=dist.prior)
        scaled.index = dist.index
        return scaled

    def _check_dirichlet(self, method: str, dist: object) -> None:
        if not isinstance(dist, DirichletCategorical):
            raise DataError(
                f"EvidenceScaling.{method}: dist must be a DirichletCategorical, got a "
                f"{type(dist).__name__}; use TemperatureScaling for predictions without evidence."
            )


# -- rows and optimisers -----------------------------------------------------------------------


def check_held_out(
    recalibrator: Recalibrator,
    dist: Any,
    y: ArrayLike | Tensor,
    sample_weight: ArrayLike | None,
) -> tuple[Any, NDArray[np.int64], Floats]:
    """Rows of positive weight: predictions, positions of the labels, weights."""
    where = f"{type(recalibrator).__name__}.fit"
    _check_class_predictive(where, dist)
    positions = ClassificationRows(y, dist, Names(where, "y", "dist")).y
    weight = check_weight(where, sample_weight, len(positions))
    kept = weight > 0
    found = np.unique(positions[kept])
    if len(found) < 2:
        raise DataError(
            f"{where}: y holds only the class {dist.classes.tolist()[found[0]]!r} (in "
            f"{int(kept.sum())} rows of positive weight); give held-out rows of two classes."
        )
    return dist if kept.all() else dist[kept], positions[kept], weight[kept]


def check_applicable(recalibrator: Any, dist: Any) -> None:
    """Refuse a recalibrator that is not fitted, and predictions of other classes."""
    check_is_fitted(recalibrator)
    where = f"{type(recalibrator).__name__}.transform"
    _check_class_predictive(where, dist)
    if dist.classes.tolist() != recalibrator.classes_.tolist():
        raise DataError(
            f"{where}: dist has the classes {dist.classes.tolist()[:10]}, but the recalibrator was "
            f"fitted on {recalibrator.classes_.tolist()[:10]}."
        )


def _check_class_predictive(where: str, dist: object) -> None:
    if not isinstance(dist, ClassPredictive):
        raise DataError(
            f"{where}: dist must be a predictive distribution over classes, got a "
            f"{type(dist).__name__}; make one by CategoricalMixture(log_probabilities[None])."
        )


def log_probs(dist: ClassPredictive) -> Tensor:
    """Log probabilities of each draw, shape (S, n, K)."""
    draws: Any = dist.draws  # Categorical
    log_p: Tensor = draws.logits
    return log_p.clamp_min(_FLOOR)


def mixture_like(dist: ClassPredictive, logits: Tensor) -> CategoricalMixture:
    """Mixture of the draws' ``logits`` for the rows and classes of ``dist``."""
    mixture = CategoricalMixture(logits, classes=dist.classes)
    mixture.index = dist.index
    return mixture


@dataclass(frozen=True)
class HeldOut:
    """Rows that a map of the log probabilities is fitted on."""

    log_p: Tensor  # (S, n, K), float64
    y: Tensor  # (S, n, 1), positions
    weight: Tensor  # (n,), sums to 1
    total_weight: float

    @classmethod
    def of(
        cls,
        recalibrator: Recalibrator,
        dist: Any,
        y: ArrayLike | Tensor,
        sample_weight: ArrayLike | None,
    ) -> Self:
        """Check what ``recalibrator.fit`` was given, and move it to the device of ``dist``."""
        checked, positions, weight = check_held_out(recalibrator, dist, y, sample_weight)
        log_p = log_probs(checked.double())
        at = torch.as_tensor(positions, device=log_p.device)
        share = torch.as_tensor(weight / weight.sum(), device=log_p.device)
        return cls(log_p, at[:, None].expand(len(log_p), -1, 1), share, float(weight.sum()))

    def neg_log(self, logits: Tensor) -> Tensor:
        """Weighted mean of −log p̄(y) for the draws' ``logits`` (S, n, K)."""
        log_p = logits.gather(-1, self.y).squeeze(-1) - logits.logsumexp(-1)  # (S, n)
        return -(self.weight * (log_p.logsumexp(0) - math.log(len(log_p)))).sum()


def _search_scale(
    name: str, loss: Callable[[float], float], *, limit: float, sharper: str
) -> float:
    """Positive number in [1/limit, limit] of the least ``loss``: a grid of its log, then Brent.

    The grid holds 1, so that the loss is never above that of leaving the predictions as they are.
    """
    from scipy.optimize import minimize_scalar

    half = math.ceil(2 * math.log(limit))  # steps of about 0.5
    grid = math.log(limit) * np.arange(-half, half + 1) / half
    losses = [loss(math.exp(s)) for s in grid]
    i = int(np.argmin(losses))
    found = minimize_scalar(
        lambda s: loss(math.exp(s)),
        bounds=(grid[max(i - 1, 0)], grid[min(i + 1, 2 * half)]),
        method="bounded",
        options={"xatol": 1e-9},
    )
    best = float(found.x if found.fun < losses[i] else grid[i])
    if abs(best) > math.log(limit) - 1e-3:
        why = (
            "nearly all rows are right, so that sharper is always better"
            if (best > 0) == (sharper == "higher")
            else "the predictions tell nothing about y, so that flatter is always better"
        )
        warnings.warn(
            f"{name} ended at its bound {math.exp(best):g}: {why}. Fit on more rows, none of which "
            "the model was trained on.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return math.exp(best)

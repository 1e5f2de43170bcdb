"""Recalibrators that map the log probabilities of each posterior draw by a matrix and a bias.

With the log probabilities ℓ_s of draw s, held-out rows i of weight w_i and a penalty R,

    p̄(y) = mean_s softmax(W ℓ_s + b)_y,    W, b = argmin −Σ_i w_i log p̄(y_i | x_i) + R(W, b),

where W is diagonal (vector, beta) or full (matrix, also called Dirichlet calibration). Every draw
is mapped, so the split into aleatoric and epistemic uncertainty stays.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from uq.calibration.recalibration import (
    HeldOut,
    Recalibrator,
    check_applicable,
    log_probs,
    mixture_like,
)
from uq.distributions import CategoricalMixture, ClassPredictive
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

Map = Callable[[Tensor, Tensor], Tensor]

# Gradient, in nats a row, above which a fit counts as not converged; rounding may stop the line
# search of L-BFGS well below it.
_TOLERANCE = 1e-4


class VectorScaling(Recalibrator):
    """Scale the log probability of each class and add a bias, in each draw.

    Parameters
    ----------
    penalty_weight : float, default=1.0
        Pull towards leaving predictions as they are, in units of a row: the sum of n log scores
        gets ``penalty_weight``/2 · (Σ (w_k − 1)² + Σ b_k²), a standard normal prior for 1. It fades
        as n grows; 0 leaves nothing to stop weights from growing without end when classes separate.

    Attributes
    ----------
    weight_, bias_ : ndarray of shape (n_classes,)
        w and b; biases sum to 0 where ``penalty_weight`` > 0.
    classes_ : ndarray of shape (n_classes,)
        Labels of the predictions that it was fitted on.

    See Also
    --------
    TemperatureScaling : one number for all classes, which needs fewer rows.
    BetaCalibration : the same for two classes, kept increasing.

    Notes
    -----
    p̄(y) = mean_s softmax(w ⊙ ℓ_s + b)_y, fitted by L-BFGS from w = 1, b = 0.

    References
    ----------
    C. Guo, G. Pleiss, Y. Sun, K. Weinberger. "On calibration of modern neural networks." ICML 2017,
    section 4.2. arXiv:1706.04599.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import VectorScaling
    >>> from uq.distributions import CategoricalMixture
    >>> dist = CategoricalMixture(torch.zeros(1, 100, 2))  # undecided, while class 1 is common
    >>> recalibrator = VectorScaling().fit(dist, [0] * 20 + [1] * 80)
    >>> recalibrator.transform(dist).probs[0].numpy().round(2)
    array([0.2, 0.8])
    """

    weight_: Floats
    bias_: Floats
    classes_: NDArray[Any]

    def __init__(self, penalty_weight: float = 1.0) -> None:
        self.penalty_weight = penalty_weight

    def fit(
        self, dist: ClassPredictive, y: ArrayLike | Tensor, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Fit weights and biases to held-out labels.

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
            If the optimiser stops early.

        Raises
        ------
        DataError
            If labels and predictions do not match, or ``y`` has fewer than two classes.
        ParameterError
            If ``penalty_weight`` is negative.
        """
        _check_penalty(self)
        rows = HeldOut.of(self, dist, y, sample_weight)
        k = dist.n_classes
        found = _descend(self, rows, _diagonal_map, np.repeat([1.0, 0.0], k))
        self.weight_, self.bias_ = found[:k], found[k:]
        self.classes_ = dist.classes
        return self

    def transform(self, dist: ClassPredictive) -> CategoricalMixture:
        """Return the mixture of the mapped draws."""
        check_applicable(self, dist)
        return _mapped(dist, _diagonal_map, [*self.weight_, *self.bias_])


class MatrixScaling(Recalibrator):
    """Map the log probabilities of each draw by a matrix and a bias: Dirichlet calibration.

    Parameters
    ----------
    penalty_weight : float, default=1.0
        Pull towards leaving predictions as they are, in units of a row: the sum of n log scores
        gets ``penalty_weight``/2 · (K² Σ_{i≠j} w_ij² + Σ (w_ii − 1)² + Σ b_i²) for K classes. It
        fades as n grows.

    Attributes
    ----------
    weight_ : ndarray of shape (n_classes, n_classes)
        W; row i gives the new log odds of class i.
    bias_ : ndarray of shape (n_classes,)
        b.
    classes_ : ndarray of shape (n_classes,)
        Labels of the predictions that it was fitted on.

    See Also
    --------
    VectorScaling : the diagonal alone, which needs fewer rows: with less than some 10 K² of them
        it usually predicts better.

    Notes
    -----
    p̄(y) = mean_s softmax(W ℓ_s + b)_y, fitted by L-BFGS from W = I, b = 0. Where the predictions of
    each class are Dirichlet distributed, one draw mapped so is exactly calibrated. The penalty is
    the paper's (off-diagonal and intercept regularisation) with a weight that falls as 1/n, so that
    it need not be searched for, and a light pull of the diagonal to 1, which makes the solution
    unique and finite.

    References
    ----------
    M. Kull, M. Perello-Nieto, M. Kängsepp, T. Silva Filho, H. Song, P. Flach. "Beyond temperature
    scaling: obtaining well-calibrated multiclass probabilities with Dirichlet calibration."
    NeurIPS 2019. arXiv:1910.12656.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import MatrixScaling
    >>> from uq.distributions import CategoricalMixture
    >>> p = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    >>> dist = CategoricalMixture(p.log().repeat(1, 100, 1))
    >>> y = [0, 2, 1] * 100  # classes 1 and 2 are mixed up
    >>> MatrixScaling().fit(dist, y).transform(dist[:3]).mode
    tensor([0, 2, 1])
    """

    weight_: Floats
    bias_: Floats
    classes_: NDArray[Any]

    def __init__(self, penalty_weight: float = 1.0) -> None:
        self.penalty_weight = penalty_weight

    def fit(
        self, dist: ClassPredictive, y: ArrayLike | Tensor, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Fit the matrix and the bias to held-out labels.

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
            If the optimiser stops early.

        Raises
        ------
        DataError
            If labels and predictions do not match, or ``y`` has fewer than two classes.
        ParameterError
            If ``penalty_weight`` is negative.
        """
        _check_penalty(self)
        rows = HeldOut.of(self, dist, y, sample_weight)
        k = dist.n_classes
        eye = np.eye(k).ravel()
        found = _descend(
            self,
            rows,
            _matrix_map,
            np.r_[eye, np.zeros(k)],
            stiffness=np.r_[np.where(eye > 0, 1.0, k**2), np.ones(k)],
        )
        self.weight_, self.bias_ = found[: k * k].reshape(k, k), found[k * k :]
        self.classes_ = dist.classes
        return self

    def transform(self, dist: ClassPredictive) -> CategoricalMixture:
        """Return the mixture of the mapped draws."""
        check_applicable(self, dist)
        return _mapped(dist, _matrix_map, [*self.weight_.ravel(), *self.bias_])


class BetaCalibration(Recalibrator):
    """Map the probability of two classes by an increasing beta curve, in each draw.

    Parameters
    ----------
    penalty_weight : float, default=1.0
        Pull towards leaving predictions as they are, in units of a row: the sum of n log scores
        gets ``penalty_weight``/2 · ((a − 1)² + (b − 1)² + c²). It fades as n grows.

    Attributes
    ----------
    a_, b_, c_ : float
        Parameters of the curve; a, b >= 0.
    classes_ : ndarray of shape (2,)
        Labels of the predictions that it was fitted on.

    See Also
    --------
    VectorScaling : for any number of classes; may turn the order of rows around.
    IsotonicCalibration : any increasing curve, which needs more rows.

    Notes
    -----
    With p the probability of ``classes[1]`` in a draw, log q/(1 − q) = a log p − b log(1 − p) + c.
    a = b = 1, c = 0 leaves p as it is; a = b is temperature scaling with a bias. Where p is beta
    distributed in both classes, q is exactly calibrated. Fitted by L-BFGS with bounds from there.

    References
    ----------
    M. Kull, T. Silva Filho, P. Flach. "Beta calibration: a well-founded and easily implemented
    improvement on logistic calibration for binary classifiers." AISTATS 2017.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import BetaCalibration
    >>> from uq.distributions import CategoricalMixture
    >>> p = torch.tensor([0.1, 0.9]).repeat(100)
    >>> dist = CategoricalMixture(torch.stack([1 - p, p], -1).log()[None])
    >>> y = [0, 1, 1, 1, 0, 1, 0, 1, 0, 0] * 20  # 1 of 5 at p = 0.1, 4 of 5 at p = 0.9
    >>> BetaCalibration().fit(dist, y).transform(dist[:2]).probs[:, 1].numpy().round(2)
    array([0.2, 0.8])
    """

    a_: float
    b_: float
    c_: float
    classes_: NDArray[Any]

    def __init__(self, penalty_weight: float = 1.0) -> None:
        self.penalty_weight = penalty_weight

    def fit(
        self, dist: ClassPredictive, y: ArrayLike | Tensor, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Fit the curve to held-out labels.

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
            If the optimiser stops early.

        Raises
        ------
        DataError
            If there are not two classes, labels and predictions do not match, or ``y`` holds one.
        ParameterError
            If ``penalty_weight`` is negative.
        """
        _check_penalty(self)
        rows = HeldOut.of(self, dist, y, sample_weight)
        if dist.n_classes != 2:
            raise DataError(
                f"BetaCalibration.fit: dist must have 2 classes, got {dist.n_classes}; use "
                "VectorScaling or MatrixScaling."
            )
        identity, lower = np.array([1.0, 1.0, 0.0]), np.array([0.0, 0.0, -np.inf])
        found = _descend(self, rows, _beta_map, identity, lower=lower)
        self.a_, self.b_, self.c_ = found.tolist()
        self.classes_ = dist.classes
        return self

    def transform(self, dist: ClassPredictive) -> CategoricalMixture:
        """Return the mixture of the mapped draws."""
        check_applicable(self, dist)
        return _mapped(dist, _beta_map, [self.a_, self.b_, self.c_])


_Affine = VectorScaling | MatrixScaling | BetaCalibration


def _diagonal_map(log_p: Tensor, theta: Tensor) -> Tensor:
    weight, bias = theta.chunk(2)
    return log_p * weight + bias


def _matrix_map(log_p: Tensor, theta: Tensor) -> Tensor:
    k = log_p.shape[-1]
    return log_p @ theta[: k * k].reshape(k, k).T + theta[k * k :]


def _beta_map(log_p: Tensor, theta: Tensor) -> Tensor:
    a, b, c = theta
    return torch.stack([b * log_p[..., 0], a * log_p[..., 1] + c], -1)


def _mapped(dist: ClassPredictive, mapping: Map, theta: Any) -> CategoricalMixture:
    log_p = log_probs(dist)
    return mixture_like(dist, mapping(log_p, log_p.new_tensor(theta)))


def _check_penalty(recalibrator: _Affine) -> None:
    weight = recalibrator.penalty_weight
    if not isinstance(weight, Real) or not 0 <= weight < np.inf:
        raise ParameterError(
            f"{type(recalibrator).__name__}: penalty_weight must be a number >= 0, got {weight!r}."
        )


def _descend(
    recalibrator: _Affine,
    rows: HeldOut,
    mapping: Map,
    identity: Floats,
    *,
    stiffness: Floats | float = 1.0,
    lower: Floats | float = -np.inf,
) -> Floats:
    """Parameters of ``mapping`` above ``lower`` of the least penalised loss.

    The penalty is ``penalty_weight``/2 · Σ stiffness · (θ − identity)²; ``identity`` leaves
    predictions as they are, and is where the descent starts.
    """
    from scipy.optimize import minimize

    device = rows.log_p.device
    # In units in which the penalty is the same in all directions, which takes fewer steps.
    unit = np.broadcast_to(1 / np.sqrt(stiffness), identity.shape)
    pull = recalibrator.penalty_weight / (2 * rows.total_weight)

    def loss(u: Floats) -> tuple[float, Floats]:
        theta = torch.tensor(identity + unit * u, device=device, requires_grad=True)
        value = rows.neg_log(mapping(rows.log_p, theta))
        (slope,) = torch.autograd.grad(value, theta)
        return value.item() + pull * float(u @ u), unit * slope.cpu().numpy() + 2 * pull * u

    lowest = np.broadcast_to((lower - identity) / unit, identity.shape)
    found = minimize(
        loss,
        np.zeros_like(identity),
        jac=True,
        method="L-BFGS-B",
        bounds=[(low, None) for low in lowest],
        options={"maxcor": 30, "maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-7},
    )
    # At a bound, a slope that pushes against it is no reason to go on.
    slope = np.where(found.x <= lowest, np.minimum(found.jac, 0), found.jac)
    residual = float(np.abs(slope).max())
    if not residual <= _TOLERANCE:
        warnings.warn(
            f"{type(recalibrator).__name__}.fit stopped after {found.nit} steps with a gradient of "
            f"{residual:.1e} nats, expected <= {_TOLERANCE:g}; raise penalty_weight, or use "
            "TemperatureScaling.",
            ConvergenceWarning,
            stacklevel=3,
        )
    theta: Floats = np.maximum(identity + unit * found.x, lower)
    return theta

"""Dirichlet distributions over the class probabilities of each row.

An evidential network gives a row the concentrations α_k; the class probabilities π are Dirichlet(α)
and the label is categorical in π. With S = Σ α_k, p = α/S and the digamma function ψ, in nats,

    aleatoric = E[H(π)] = Σ_k p_k (ψ(S + 1) − ψ(α_k + 1)),
    epistemic = I(y; π) = Σ_k p_k (ψ(α_k + 1) − log α_k) − (ψ(S + 1) − log S),

which add up to H(p).
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from pyro.distributions import Categorical, Dirichlet
from torch import Tensor

from uq.distributions.base import ClassPredictive, TorchDistribution
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class DirichletCategorical(ClassPredictive):
    """Categorical distributions whose class probabilities are Dirichlet distributed.

    Parameters
    ----------
    concentration : Tensor of shape (n, n_classes)
        Concentrations α >= ``prior`` of each row.
    classes : ndarray of shape (n_classes,), optional
        Labels, in the order of the columns of ``probs``; positions 0, 1, … by default. The
        distribution itself is over positions.
    prior : float, default=1.0
        Concentration of each class when there is no evidence. 1 is the uniform distribution over
        class probabilities; a lower value lets the evidence weigh more.
    validate_args : bool, optional
        False leaves out the check of values, which reads all of them.

    Raises
    ------
    DataError
        If a concentration is below ``prior`` or not finite, or a shape does not match.
    ParameterError
        If ``prior`` is not positive.

    See Also
    --------
    scipy.stats.dirichlet : the distribution of the class probabilities, ``second_order`` here.

    Notes
    -----
    There is one Dirichlet a row, so ``n_draws`` is 1, and ``draws`` is the averaged distribution;
    the epistemic uncertainty comes from the spread of the Dirichlet, not from draws. What that
    spread means depends on how the network was trained: it need not vanish with more data.

    References
    ----------
    M. Sensoy, L. Kaplan, M. Kandemir. "Evidential deep learning to quantify classification
    uncertainty." NeurIPS 2018. arXiv:1806.01768.

    A. Malinin, M. Gales. "Predictive uncertainty estimation via prior networks." NeurIPS 2018,
    appendix C. arXiv:1802.10501.

    Examples
    --------
    >>> import torch
    >>> from uq.distributions import DirichletCategorical
    >>> d = DirichletCategorical(torch.tensor([[2.0, 1.0, 1.0], [101.0, 1.0, 1.0]]))
    >>> d.probs[0]
    tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)
    >>> d.aleatoric[0].item(), d.epistemic[0].item()
    (0.8333, 0.2064)
    >>> d.vacuity
    tensor([0.7500, 0.0291], dtype=torch.float64)
    """

    concentration: Tensor
    prior: float

    def __init__(
        self,
        concentration: Tensor,
        *,
        classes: ArrayLike | None = None,
        prior: float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        if concentration.ndim < 1 or concentration.shape[-1] < 2:
            raise DataError(
                "DirichletCategorical: concentration needs shape (…, n_classes), n_classes >= 2, "
                f"got {tuple(concentration.shape)}."
            )
        if not concentration.is_floating_point():
            raise DataError(
                "DirichletCategorical: concentration must be a floating-point tensor, got "
                f"{concentration.dtype}; use concentration.double()."
            )
        if not isinstance(prior, Real) or not 0 < prior < np.inf:
            raise ParameterError(f"DirichletCategorical: prior must be > 0, got {prior!r}.")
        self.concentration = concentration
        self.prior = float(prior)
        if validate_args is not False:
            self._check_concentration()
        n_classes = concentration.shape[-1]
        self.classes = np.arange(n_classes) if classes is None else np.asarray(classes)
        if self.classes.shape != (n_classes,):
            raise DataError(
                f"DirichletCategorical: classes must name each of the {n_classes} columns, "
                f"got shape {self.classes.shape}."
            )
        super().__init__(concentration.shape[:-1], validate_args=False)

    def _check_concentration(self) -> None:
        # Compared in the dtype of the concentrations: 0.1 in float32 is not below a prior of 0.1.
        prior = torch.tensor(self.prior, dtype=self.concentration.dtype)
        bad = ~((self.concentration >= prior) & self.concentration.isfinite())
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            raise DataError(
                f"DirichletCategorical: concentration must be finite and >= prior = {self.prior:g} "
                f"(no evidence), got {self.concentration[where].item():g} at {where}; give a lower "
                "prior if that is meant."
            )

    # -- shape -------------------------------------------------------------------------------

    @property
    def n_draws(self) -> int:
        """One: draws are not what carries the epistemic uncertainty."""
        return 1

    @property
    def draws(self) -> TorchDistribution:
        """Categorical of the averaged probabilities, batch shape ``(1, *batch_shape)``."""
        return Categorical(logits=self._log_probs[None], validate_args=False)

    @property
    def second_order(self) -> TorchDistribution:
        """Dirichlet distribution of the class probabilities of each row, in float64."""
        return Dirichlet(self._alpha, validate_args=False)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Self:
        alpha = f(self.concentration)
        return type(self)(alpha, classes=self.classes, prior=self.prior, validate_args=False)

    def _rows(self, key: Any) -> Self:
        return self._map(lambda t: t[key])

    def expand(self, batch_shape: Any, _instance: None = None) -> Self:
        """Return the distribution with its batch shape expanded to ``batch_shape``."""
        return self._map(lambda t: t.expand(*batch_shape, self.n_classes))

    # -- probabilities -------------------------------------------------------------------------

    @property
    def _alpha(self) -> Tensor:
        return self.concentration.double()

    @property
    def _log_probs(self) -> Tensor:
        return self._alpha.log() - self._alpha.sum(-1, keepdim=True).log()

    @property
    def probs(self) -> Tensor:
        """Class probabilities α/S, float64, shape (n, n_classes)."""
        return self._alpha / self._alpha.sum(-1, keepdim=True)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability, in nats, of class positions ``value``."""
        self._check_positions(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        log_p = self._log_probs.expand(*shape, self.n_classes)
        return log_p.gather(-1, value.long().expand(shape)[..., None]).squeeze(-1)

    @property
    def aleatoric(self) -> Tensor:
        """Entropy of the class probabilities, averaged over the Dirichlet, in nats."""
        alpha = self._alpha
        total = alpha.sum(-1, keepdim=True)
        gap = torch.digamma(total + 1) - torch.digamma(alpha + 1)
        return (alpha / total * gap).sum(-1)

    @property
    def epistemic(self) -> Tensor:
        """Mutual information between the label and its class probabilities, in nats."""
        total = self._alpha.sum(-1)
        information = (self.probs * _digamma_excess(self._alpha)).sum(-1) - _digamma_excess(total)
        return information.clamp_min(0.0)  # below 0 by rounding only

    # -- evidence ------------------------------------------------------------------------------

    @property
    def evidence(self) -> Tensor:
        """Evidence α − prior for each class, float64, shape (n, n_classes)."""
        return (self._alpha - self.prior).clamp_min(0.0)  # below 0 by the rounding of the prior

    @property
    def vacuity(self) -> Tensor:
        """Share of the prior in the total concentration, n_classes · prior / S, in (0, 1].

        1 means that there is no evidence at all.
        """
        return self.n_classes * self.prior / self._alpha.sum(-1)

    def differential_entropy(self) -> Tensor:
        """Entropy of the Dirichlet density, in nats; at most −log Γ(n_classes), at α = 1.

        Examples
        --------
        >>> d = DirichletCategorical(torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0]]))
        >>> d.differential_entropy()
        tensor([-0.6931, -0.9584], dtype=torch.float64)
        """
        return self.second_order.entropy()


def _digamma_excess(x: Tensor) -> Tensor:
    """ψ(x + 1) − log x: positive, falling, 1/(2x) for large x."""
    return torch.digamma(x + 1) - x.log()

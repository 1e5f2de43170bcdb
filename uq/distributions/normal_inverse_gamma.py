"""Predictive distribution of a target whose mean and variance are Normal-inverse-Gamma.

    y | μ, σ² ~ N(μ, σ²),   μ | σ² ~ N(γ, σ²/ν),   σ² ~ InvGamma(α, β)

so that y is Student-t with 2α degrees of freedom, location γ and scale w, w² = β (1 + ν)/(ν α), and

    variance = E σ² + Var μ = β/(α − 1) + β/(ν (α − 1)).
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from pyro.distributions import StudentT
from torch import Tensor

from uq.distributions.parametric import Parametric
from uq.errors import DataError


class NormalInverseGamma(Parametric):
    """Student-t predictive of a Normal-inverse-Gamma; make one by :meth:`from_parameters`.

    ``aleatoric`` is E σ² = β/(α − 1), ``epistemic`` is Var μ = β/(ν (α − 1)), in squared target
    units. Quantiles, CRPS and the rest are those of :class:`Parametric`.

    Parameters
    ----------
    base, epistemic_share, event_dim, validate_args
        Of :class:`Parametric`; the base is a Student t.

    Notes
    -----
    What the split means depends on how ν and α were found: see the warning of
    :class:`uq.EvidentialRegressor`.

    References
    ----------
    A. Amini, W. Schwarting, A. Soleimany, D. Rus. "Deep evidential regression." NeurIPS 2020,
    eqs. 4–8. arXiv:1910.02600.

    Examples
    --------
    >>> import torch
    >>> from uq.distributions import NormalInverseGamma
    >>> loc, nu, alpha, beta = torch.tensor([[0.2], [0.5], [1.8], [0.7]]).double()
    >>> d = NormalInverseGamma.from_parameters(loc, nu, alpha, beta)
    >>> d.aleatoric.item(), d.epistemic.item(), d.variance.item()
    (0.875, 1.75, 2.625)
    >>> d.log_prob(torch.tensor([1.3])).item()
    -1.6469
    """

    @classmethod
    def from_parameters(cls, loc: Tensor, nu: Tensor, alpha: Tensor, beta: Tensor) -> Self:
        """Make the distribution of rows, or of rows and outputs.

        Parameters
        ----------
        loc : Tensor of shape (n,) or (n, m)
            γ, in target units.
        nu, alpha, beta : Tensor of the same shape
            ν > 0 and α > 1 (virtual observations of the mean, half of those of the variance),
            β > 0 (squared target units).

        Raises
        ------
        DataError
            If a parameter is out of its range or not finite.
        """
        for name, value, least in (("nu", nu, 0), ("alpha", alpha, 1), ("beta", beta, 0)):
            if not bool(((value > least) & value.isfinite()).all()):
                raise DataError(f"NormalInverseGamma: {name} must be finite and > {least}.")
        scale = (beta * (1 + nu) / (nu * alpha)).sqrt()
        base = StudentT(2 * alpha, loc, scale, validate_args=False)
        return cls(base, epistemic_share=1 / (1 + nu))

    @property
    def _student(self) -> Any:
        return self.base

    @property
    def nu(self) -> Tensor:
        """Virtual observations ν of the mean."""
        share: Any = self.epistemic_share
        return 1 / share - 1

    @property
    def alpha(self) -> Tensor:
        """Shape α of the variance's inverse Gamma."""
        return self._student.df.expand(self.base.batch_shape) / 2

    @property
    def beta(self) -> Tensor:
        """Scale β of the variance's inverse Gamma, in squared target units."""
        return self._student.scale.square() * self.nu * self.alpha / (1 + self.nu)

    def _summed(self, t: Tensor) -> Tensor:
        return t.sum(-1) if self._event_dim else t

    def expected_entropy(self) -> Tensor:
        """Entropy of y given μ and σ², averaged over them, in nats: ½ log 2πe + ½ E log σ²."""
        log_variance = self.beta.log() - torch.digamma(self.alpha)
        return self._summed(0.5 * (math.log(2 * math.pi * math.e) + log_variance))

    def mutual_information(self) -> Tensor:
        """Information between y and its (μ, σ²), in nats: the entropy less the expected one."""
        return self.entropy() - self.expected_entropy()

    def differential_entropy(self) -> Tensor:
        """Entropy of the Normal-inverse-Gamma density itself, in nats."""
        a, log_b = self.alpha, self.beta.log()
        log_variance = log_b - torch.digamma(a)
        of_mean = 0.5 * (math.log(2 * math.pi * math.e) + log_variance - self.nu.log())
        of_variance = a + log_b + torch.lgamma(a) - (1 + a) * torch.digamma(a)
        return self._summed(of_mean + of_variance)

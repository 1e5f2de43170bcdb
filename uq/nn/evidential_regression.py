"""Deep evidential regression: a network gives the parameters of a Normal-inverse-Gamma.

With Ω = 2β(1 + ν) the loss of a row is (Amini et al. 2020, eqs. 8–10)

    ½ log(π/ν) − α log Ω + (α + ½) log(ν (y − γ)² + Ω) + log Γ(α) − log Γ(α + ½)  +  λ R,

minus the log density of Student-t(2α, γ, w), w² = β(1 + ν)/(ν α), plus a penalty on evidence where
the prediction is wrong. R is one of

    evidence     |y − γ| (2ν + α)
    normalised   |y − γ|/w (2ν + α)                                    (Meinert et al. 2023, eq. 11)
    kl           |y − γ| KL(NIG(γ, ν, α, β) ‖ NIG(γ, ω, 1 + ω, β)),  ω = 0.01

The log density does not change along β = c ν/(1 + ν): nothing but R tells ν from β.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from scipy import special
from torch import Tensor, nn
from torch.nn import functional as F

from uq.distributions.normal_inverse_gamma import NormalInverseGamma
from uq.errors import DataError, ParameterError

Penalty = Literal["evidence", "normalised", "kl"]
PENALTIES: tuple[str, ...] = get_args(Penalty)
_FLOOR = 1e-6
# Evidence of the prior that the "kl" penalty pulls to.
_OMEGA = 0.01

Parameters = tuple[Tensor, Tensor, Tensor, Tensor]


def nig_nll(y: Tensor, loc: Tensor, nu: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Negative log marginal likelihood of ``y`` under a Normal-inverse-Gamma, in nats.

    Parameters
    ----------
    y : Tensor
        Targets.
    loc, nu, alpha, beta : Tensor of the same shape
        γ, ν > 0, α > 1 and β > 0.

    Returns
    -------
    Tensor of the same shape
        In nats: minus the log density of a Student t with 2α degrees of freedom at ``y``
        (Amini et al., NeurIPS 2020, eq. 8).

    Examples
    --------
    >>> import torch
    >>> from uq.nn import nig_nll
    >>> nig_nll(*torch.tensor([1.3, 0.2, 0.5, 1.8, 0.7]))
    tensor(1.6469)
    """
    omega = 2 * beta * (1 + nu)
    # Ω out of the sum of logs, which would cancel for large α.
    quadratic = (alpha + 0.5) * torch.log1p(nu * (y - loc).square() / omega)
    constant = torch.lgamma(alpha) - torch.lgamma(alpha + 0.5)
    return 0.5 * (math.log(math.pi) - nu.log() + omega.log()) + quadratic + constant


def nig_kl(p: Parameters, q: Parameters) -> Tensor:
    """KL divergence between two Normal-inverse-Gamma distributions, in nats.

    Parameters
    ----------
    p, q : tuple of Tensor
        γ, ν, α, β of each.

    Returns
    -------
    Tensor
        KL(p ‖ q), in nats, of the shape of the parameters.

    Notes
    -----
    The mean of 1/σ² under p is α₁/β₁; published code of the method has (α₁ − 1)/β₁ in the first
    term, which gives a number that is no divergence.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import nig_kl
    >>> nig_kl(torch.tensor([0.5, 2.0, 3.0, 1.5]), torch.tensor([-0.3, 0.7, 2.0, 1.0]))
    tensor(0.6885)
    """
    (loc1, nu1, a1, b1), (loc2, nu2, a2, b2) = p, q
    precision = a1 / b1
    ratio = nu2 / nu1
    of_mean = 0.5 * (precision * nu2 * (loc1 - loc2).square() + ratio - 1 - ratio.log())
    of_variance = a2 * (b1 / b2).log() - torch.lgamma(a1) + torch.lgamma(a2)
    of_variance = of_variance + (a1 - a2) * torch.digamma(a1) - (b1 - b2) * precision
    return of_mean + of_variance


def _check_shape(y: Tensor, loc: Tensor) -> None:
    if y.shape != loc.shape:  # (n,) would be broadcast against (n, 1) to (n, n)
        raise DataError(
            f"NormalInverseGammaHead: y must have shape {tuple(loc.shape)}, rows by targets, got "
            f"{tuple(y.shape)}."
        )


class NormalInverseGammaHead(nn.Module):
    """What the outputs of a network mean for real targets: four numbers a target.

    Parameters
    ----------
    n_targets : int
        Number of targets m; the network gives 4m outputs: all γ, then ν, α and β before softplus.
    penalty : {"evidence", "normalised", "kl"}, default="evidence"
        Penalty R; see :mod:`uq.nn.evidential_regression`.
    penalty_weight : float, default=0.01
        λ, as in the paper.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import NormalInverseGammaHead
    >>> head = NormalInverseGammaHead(1)
    >>> outputs = torch.randn(5, 4, requires_grad=True)  # of any network
    >>> head.loss(outputs, torch.randn(5, 1)).mean().backward()
    >>> head.predictive(outputs.detach()).batch_shape
    torch.Size([5, 1])
    """

    def __init__(
        self, n_targets: int, penalty: str = "evidence", *, penalty_weight: float = 0.01
    ) -> None:
        super().__init__()
        if penalty not in PENALTIES:
            raise ParameterError(f"penalty must be one of {', '.join(PENALTIES)}, got {penalty!r}.")
        if not 0 <= penalty_weight < math.inf:
            raise ParameterError(f"penalty_weight must be >= 0 and finite, got {penalty_weight!r}.")
        self.n_targets = n_targets
        self.n_outputs: int = 4 * n_targets
        self.penalty = penalty
        self.penalty_weight = penalty_weight

    def forward(self, outputs: Tensor) -> Parameters:
        """γ, ν, α and β of each row, each (n, m)."""
        loc, *raw = outputs.split(self.n_targets, -1)
        nu, alpha, beta = (F.softplus(t) + _FLOOR for t in raw)
        return loc, nu, alpha + 1, beta

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Loss of each row, ``y`` (n, m), summed over targets; in float32 also under autocast."""
        parameters = self(outputs if outputs.dtype == torch.float64 else outputs.float())
        loc, nu, alpha, beta = parameters
        _check_shape(y, loc)
        error = (y - loc).abs()
        if self.penalty == "kl":
            omega = torch.full_like(nu, _OMEGA)
            factor = nig_kl(parameters, (loc, omega, 1 + omega, beta))
        else:
            factor = 2 * nu + alpha
            if self.penalty == "normalised":
                factor = factor * (nu * alpha / (beta * (1 + nu))).sqrt()
        return (nig_nll(y, *parameters) + self.penalty_weight * error * factor).sum(-1)

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Negative log predictive density of each row, summed over targets."""
        parameters = self(outputs)
        _check_shape(y, parameters[0])
        return nig_nll(y, *parameters).sum(-1)

    def predictive(self, outputs: Tensor) -> NormalInverseGamma:
        """Student-t predictive of each row, batch shape (n, m), in float64."""
        return NormalInverseGamma.from_parameters(*self(outputs.double()))

    def functions(self, outputs: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draw means μ, shape (n, rows, m).

        Each draw uses the same random numbers at all rows, so that it is a function of the inputs;
        the model itself says nothing about how rows belong together.
        """
        loc, nu, alpha, beta = (t.cpu() for t in self(outputs.double()))
        shape = (n, 1, self.n_targets)
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        u = torch.rand(shape, generator=generator, dtype=torch.float64)
        precision = torch.as_tensor(special.gammaincinv(alpha.numpy(), u.numpy())) / beta
        return loc + z / (nu * precision).sqrt()

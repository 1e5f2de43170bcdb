"""Evidential classification: losses of Dirichlet concentrations, and the head that predicts them.

A network gives each row evidence e >= 0; the class probabilities are Dir(α) with α = e + prior.
With S = Σ α_k, p = α/S and one-hot y the losses of a row are (Sensoy et al. 2018, eqs. 3–5)

    edl      Σ_k (y_k − p_k)² + p_k (1 − p_k)/(S + 1)               E ‖y − π‖²
    edl_nll  log S − log α_y                                        −log E π_y
    edl_ce   ψ(S) − ψ(α_y)                                          −E log π_y

(Deng et al. 2023, eq. 16), with the Fisher information I(α) = diag ψ1(α) − ψ1(S) 11ᵀ,

    iedl     Σ_k ψ1(α_k) [(y_k − p_k)² + p_k (1 − p_k)/(S + 1)] − λ₁ log |I(α)|

and (Chen et al. 2024), with prior 0.1,

    redl     Σ_k (y_k − p_k)²

each plus λ KL(Dir(α̃) ‖ Dir(prior · 1)), where α̃ is α without the evidence of the true class.

Loss and gradient are computed in one pass, in closed form: as long as a forward pass alone takes,
and without the tetragamma function that differentiating ψ1 would need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from uq.distributions import DirichletCategorical
from uq.errors import DataError, ParameterError
from uq.nn.evidential_functions import gamma_parts

Loss = Literal["edl", "edl_nll", "edl_ce", "iedl", "redl"]
LOSSES: tuple[str, ...] = get_args(Loss)
# exp(15) keeps S² and its gradient far inside float32.
_MAX_LOGIT = 15.0
EVIDENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "exp": lambda t: t.clamp(max=_MAX_LOGIT).exp(),
    "relu": F.relu,
}


def default_prior(loss: str) -> float:
    """Concentration without evidence in the papers: 0.1 for "redl", otherwise 1."""
    return 0.1 if loss == "redl" else 1.0


def evidential_loss(
    evidence: Tensor,
    y: Tensor,
    loss: str = "iedl",
    *,
    prior: float | None = None,
    kl_weight: float = 1.0,
    logdet_weight: float = 0.05,
    validate_args: bool = True,
) -> Tensor:
    """Loss of each row for Dirichlet predictions, with a closed-form gradient.

    Parameters
    ----------
    evidence : Tensor of shape (n, n_classes)
        Evidence e >= 0; the concentrations are α = e + prior. Below float32 it is converted.
    y : Tensor of shape (n,)
        Class positions.
    loss : {"edl", "edl_nll", "edl_ce", "iedl", "redl"}, default="iedl"
        See the formulas above, in :mod:`uq.nn.evidential`.
    prior : float, optional
        Concentration of a class without evidence; by default that of the paper, 0.1 for "redl" and
        1 for the others.
    kl_weight : float, default=1.0
        λ, weight of the divergence from the prior; the papers let it grow from 0 to 1 in 10 epochs.
    logdet_weight : float, default=0.05
        λ₁ of "iedl"; the authors take 0.005 on MNIST and 0.05 on CIFAR-10.
    validate_args : bool, default=True
        Whether to check the values of ``evidence`` and ``y``, which makes a GPU wait.

    Returns
    -------
    Tensor of shape (n,)
        Differentiable once, with respect to ``evidence``. In nats, except for squared errors.

    Raises
    ------
    DataError
        If evidence is negative or NaN, a label is outside the classes, or shapes do not match.
    ParameterError
        If ``loss`` is unknown or a weight out of range.

    References
    ----------
    M. Sensoy, L. Kaplan, M. Kandemir. "Evidential deep learning to quantify classification
    uncertainty." NeurIPS 2018. arXiv:1806.01768.

    D. Deng, G. Chen, Y. Yu, F. Liu, P.-A. Heng. "Uncertainty estimation by Fisher information-based
    evidential deep learning." ICML 2023. arXiv:2303.02045.

    M. Chen, J. Gao, C. Xu. "R-EDL: relaxing nonessential settings of evidential deep learning."
    ICLR 2024.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import evidential_loss
    >>> evidence = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    >>> evidential_loss(evidence, torch.tensor([1]), "edl", kl_weight=0.0)
    tensor([1.], grad_fn=<_DirichletLossBackward>)
    """
    if loss not in LOSSES:
        raise ParameterError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")
    prior = default_prior(loss) if prior is None else prior
    for name, value, least in (
        ("prior", prior, math.ulp(0.0)),
        ("kl_weight", kl_weight, 0.0),
        ("logdet_weight", logdet_weight, 0.0),
    ):
        if not least <= value < math.inf:
            sign = ">" if least else ">="
            raise ParameterError(f"{name} must be {sign} 0 and finite, got {value!r}.")
    if validate_args:
        _check(evidence, y)
    if evidence.dtype != torch.float64:
        evidence = evidence.float()
    rows: Tensor = _DirichletLoss.apply(evidence, y, loss, prior, kl_weight, logdet_weight)
    return rows


def _check(evidence: Tensor, y: Tensor) -> None:
    if evidence.ndim != 2 or evidence.shape[1] < 2 or y.shape != evidence.shape[:1]:
        raise DataError(
            "evidential_loss: evidence needs shape (n, n_classes) with n_classes >= 2 and y shape "
            f"(n,), got {tuple(evidence.shape)} and {tuple(y.shape)}."
        )
    if not evidence.is_floating_point() or y.is_floating_point():
        raise DataError(
            "evidential_loss: evidence must be floating-point and y integer class positions, got "
            f"{evidence.dtype} and {y.dtype}."
        )
    bad = ~((evidence >= 0) & evidence.isfinite())
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise DataError(
            "evidential_loss: evidence must be >= 0 and finite, got "
            f"{evidence[where].item():g} at {where}; put softplus after the network."
        )
    outside = (y < 0) | (y >= evidence.shape[1])
    if bool(outside.any()):
        raise DataError(
            f"evidential_loss: y must hold positions 0 to {evidence.shape[1] - 1}, got "
            f"{int(y[outside][0])}."
        )


class _DirichletLoss(torch.autograd.Function):
    """Rows of a loss, whose gradient is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        evidence: Tensor,
        y: Tensor,
        loss: str,
        prior: float,
        kl_weight: float,
        logdet_weight: float,
    ) -> Tensor:
        k = evidence.shape[1]
        at_y = y[:, None]
        # The sums S and S̃ ride along as two more columns.
        alpha_sums = evidence.new_empty(len(evidence), k + 2)
        alpha = torch.add(evidence, prior, out=alpha_sums[:, :k])
        wrong = evidence.scatter(1, at_y, 0.0)  # evidence of the wrong classes: α̃ − prior
        total, evidence_wrong = alpha.sum(1), wrong.sum(1)
        alpha_sums[:, k] = total
        alpha_sums[:, k + 1] = evidence_wrong + k * prior
        alpha_y = alpha.gather(1, at_y).squeeze(1)
        parts = gamma_parts(alpha_sums, prior)

        # The gradient is grad + (shift of a row) + (corner at the true class).
        psi1 = parts.trigamma[:, :k]
        grad = wrong.mul_(psi1).mul_(kl_weight)
        shift = -kl_weight * evidence_wrong * parts.trigamma[:, k + 1]
        corner = -shift
        rows = kl_weight * _divergence(parts.q, at_y, alpha_sums[:, k + 1], prior)
        if loss == "edl_nll":
            rows += total.log() - alpha_y.log()
            shift += total.reciprocal()
            corner -= alpha_y.reciprocal()
        elif loss == "edl_ce":
            rows += torch.digamma(total) - torch.digamma(alpha_y)
            shift += parts.trigamma[:, k]
            corner -= psi1.gather(1, at_y).squeeze(1)
        else:
            fisher = None
            if loss == "iedl":
                slope = parts.trigamma * (parts.g_slope + 1)  # −ψ2/ψ1
                fisher = psi1, slope[:, :k]
                log_det = parts.log_trigamma[:, : k + 1].sum(1)
                gap = parts.g[:, k] - parts.g[:, :k].sum(1)
                log_det += gap.log()
                rows -= logdet_weight * log_det
                grad += slope[:, :k] * logdet_weight
                grad += parts.g_slope[:, :k] * (logdet_weight / gap)[:, None]
                shift += logdet_weight * (slope[:, k] - parts.g_slope[:, k] / gap)
            variance = loss != "redl"
            terms = _squares(alpha, total, alpha_y, at_y, grad, fisher, variance=variance)
            for sums, term in zip((rows, shift, corner), terms, strict=True):
                sums += term
        grad += shift[:, None]
        grad.scatter_add_(1, at_y, corner[:, None])
        ctx.save_for_backward(grad)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_rows[:, None], None, None, None, None, None


def _divergence(q: Tensor, at_y: Tensor, total_wrong: Tensor, prior: float) -> Tensor:
    """KL(Dir(α̃) ‖ Dir(prior · 1)) of each row from q at α, S and S̃.

    With h = q + α it is Σ h(α̃_k) − h(S̃) + prior (K − 1) ψ(S̃) + constants, in which the α cancel.
    """
    k = q.shape[1] - 2
    constant = (k - 1) * math.lgamma(prior) - math.lgamma(k * prior) - prior
    rows = q[:, :k].sum(1) - q.gather(1, at_y).squeeze(1) - q[:, k + 1]
    return rows.add_(torch.digamma(total_wrong), alpha=prior * (k - 1)).add_(constant)


def _squares(
    alpha: Tensor,
    total: Tensor,
    alpha_y: Tensor,
    at_y: Tensor,
    grad: Tensor,
    fisher: tuple[Tensor, Tensor] | None,
    *,
    variance: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors, weighted by ψ1 where ``fisher`` = (ψ1, −ψ2/ψ1): rows, shift and corner.

    The sum is Σ w_k b_k / n + w_y (1 − 2 p_y), with b = α(α + 1) and n = S(S + 1), or without the
    variance b = α² and n = S². The rest of the gradient is added to ``grad``.
    """
    if variance:
        inverse = (total * (total + 1)).reciprocal_()
        inverse_slope = -(2 * total + 1) * inverse.square()
        b, b_slope = torch.addcmul(alpha, alpha, alpha), 2 * alpha + 1
    else:
        inverse = total.square().reciprocal_()
        inverse_slope = -2 * inverse / total
        b, b_slope = alpha.square(), 2 * alpha
    p_y = alpha_y / total
    if fisher is None:
        sums = b.sum(1)
        grad += b_slope.mul_(inverse[:, None])
        rows = sums * inverse + 1 - 2 * p_y
        slope_y = -2 / total
        return rows, sums * inverse_slope - p_y * slope_y, slope_y
    weight, fall = fisher
    weight_y = weight.gather(1, at_y).squeeze(1)
    grad += (b_slope - fall * b).mul_(weight).mul_(inverse[:, None])
    sums = b.mul_(weight).sum(1)
    rows = sums * inverse + weight_y * (1 - 2 * p_y)
    slope_y = -2 * weight_y / total
    corner = slope_y - weight_y * fall.gather(1, at_y).squeeze(1) * (1 - 2 * p_y)
    return rows, sums * inverse_slope - p_y * slope_y, corner


class DirichletHead(nn.Module):
    """What the outputs of a network mean for the label: Dirichlet concentrations.

    Parameters
    ----------
    n_classes : int
        Number of classes, and of outputs.
    loss : {"edl", "edl_nll", "edl_ce", "iedl", "redl"}, default="iedl"
        Training loss; see :func:`evidential_loss`.
    evidence : {"softplus", "exp", "relu"}, default="softplus"
        Turns outputs into evidence. A row whose evidence ReLU cuts to 0 has no gradient; "exp" is
        capped at exp(15).
    prior : float, optional
        Concentration without evidence; 0.1 for "redl", otherwise 1.
    logdet_weight : float, default=0.05
        λ₁ of "iedl".

    Examples
    --------
    >>> import torch
    >>> from uq.nn import DirichletHead
    >>> head = DirichletHead(3, loss="edl")
    >>> outputs = torch.randn(5, 3, requires_grad=True)  # of any network
    >>> head.loss(outputs, torch.tensor([0, 1, 2, 0, 1]), kl_weight=0.1).mean().backward()
    >>> head.predictive(outputs.detach()).vacuity.shape
    torch.Size([5])
    """

    def __init__(
        self,
        n_classes: int,
        loss: str = "iedl",
        *,
        evidence: str = "softplus",
        prior: float | None = None,
        logdet_weight: float = 0.05,
    ) -> None:
        super().__init__()
        if evidence not in EVIDENCE:
            raise ParameterError(
                f"evidence must be one of {', '.join(EVIDENCE)}, got {evidence!r}."
            )
        if loss not in LOSSES:
            raise ParameterError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")
        self.n_outputs = n_classes
        self.loss_name = loss
        self.evidence = EVIDENCE[evidence]
        self.prior = default_prior(loss) if prior is None else prior
        self.logdet_weight = logdet_weight

    def forward(self, outputs: Tensor) -> Tensor:
        """Concentrations α of each row, shape (n, n_classes)."""
        return self.evidence(outputs) + self.prior

    def loss(self, outputs: Tensor, y: Tensor, kl_weight: float = 1.0) -> Tensor:
        """Loss of each row; ``kl_weight`` is λ. In float32 also under autocast."""
        return evidential_loss(
            self.evidence(outputs if outputs.dtype == torch.float64 else outputs.float()),
            y,
            self.loss_name,
            prior=self.prior,
            kl_weight=kl_weight,
            logdet_weight=self.logdet_weight,
            validate_args=False,
        )

    def predictive(self, outputs: Tensor) -> DirichletCategorical:
        """Dirichlet predictive distribution of each row, in float64."""
        return DirichletCategorical(self(outputs.double()), prior=self.prior)

    def functions(self, outputs: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draw class probabilities π ~ Dir(α), shape (n, rows, n_classes).

        Each draw uses the same uniform numbers at all rows, so that it is a function of the inputs;
        the model itself says nothing about how rows belong together.
        """
        alpha = self(outputs.double()).cpu().numpy()
        u = torch.rand(2, n, 1, self.n_outputs, generator=generator, dtype=torch.float64).numpy()
        # Γ(α) is Γ(α + 1) u^{1/α}, which in logs does not underflow for small α.
        log_gamma = np.log(special.gammaincinv(alpha + 1, u[0])) + np.log(u[1]) / alpha
        return torch.as_tensor(special.softmax(log_gamma, axis=-1))

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

Loss and gradient are computed in one pass, in closed form, without the tetragamma function that
differentiating ψ1 would need. On a CPU with Numba that is one compiled loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor, nn
from torch.nn import functional as F

from uq.distributions import DirichletCategorical
from uq.errors import DataError, ParameterError
from uq.nn.evidential_functions import GammaParts, fill_gamma_parts, polynomials

Loss = Literal["edl", "edl_nll", "edl_ce", "iedl", "redl"]
LOSSES: tuple[str, ...] = get_args(Loss)
# exp(15) keeps S² and its gradient far inside float32.
_MAX_LOGIT = 15.0


def _capped_exp(t: Tensor) -> Tensor:
    return t.clamp(max=_MAX_LOGIT).exp()


EVIDENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "exp": _capped_exp,
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
    dirichlet_kl_weight: float = 1.0,
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
    dirichlet_kl_weight : float, default=1.0
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
    >>> evidential_loss(evidence, torch.tensor([1]), "edl", dirichlet_kl_weight=0.0)
    tensor([1.], grad_fn=<_DirichletLossBackward>)
    """
    if loss not in LOSSES:
        raise ParameterError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")
    prior = default_prior(loss) if prior is None else prior
    _check_numbers(prior, dirichlet_kl_weight, logdet_weight)
    if validate_args:
        _check(evidence, y)
    if evidence.dtype != torch.float64:
        evidence = evidence.float()
    rows: Tensor = _DirichletLoss.apply(
        evidence, y, loss, prior, dirichlet_kl_weight, logdet_weight
    )
    return rows


def _check_numbers(prior: float, dirichlet_kl_weight: float, logdet_weight: float) -> None:
    for name, value, least in (
        ("prior", prior, math.ulp(0.0)),
        ("dirichlet_kl_weight", dirichlet_kl_weight, 0.0),
        ("logdet_weight", logdet_weight, 0.0),
    ):
        if not least <= value < math.inf:
            sign = ">" if least else ">="
            raise ParameterError(f"{name} must be {sign} 0 and finite, got {value!r}.")


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


@cache
def _kernel() -> Callable[..., None] | None:
    """Compiled loop over rows, where Numba is installed."""
    try:
        from uq.nn.evidential_kernel import dirichlet_rows
    except ImportError:
        return None
    kernel: Callable[..., None] = dirichlet_rows
    return kernel


@cache
def _coefficients(prior: float) -> NDArray[np.float32]:
    coefficients: NDArray[np.float32] = polynomials(
        1.0 - prior, 0, torch.float32, torch.device("cpu")
    ).numpy()
    return coefficients


class _DirichletLoss(torch.autograd.Function):
    """Rows of a loss, whose gradient is made in the forward pass.

    For a small network the number of operations counts, not their size. So the sums S and S̃ ride
    along as two more columns of α, and all functions of α are rows of one block, which is summed
    and gathered from at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        evidence: Tensor,
        y: Tensor,
        loss: str,
        prior: float,
        dirichlet_kl_weight: float,
        logdet_weight: float,
    ) -> Tensor:
        kernel = _kernel()
        single = evidence.device.type == "cpu" and evidence.dtype == torch.float32
        if kernel is not None and single and prior >= 1:
            evidence, y = evidence.contiguous(), y.long().contiguous()
            rows, grad = evidence.new_empty(len(evidence)), torch.empty_like(evidence)
            arrays = evidence.numpy(), y.numpy(), _coefficients(prior)
            weights = float(prior), float(dirichlet_kl_weight), float(logdet_weight)
            kernel(*arrays, LOSSES.index(loss), *weights, rows.numpy(), grad.numpy())
            ctx.grad = grad
            return rows
        n, k = evidence.shape
        at_y = y.long()[:, None]
        block = evidence.new_empty(8, n, k + 2)
        alpha_sums, psi1, g_slope, g, q, log_psi1, squares, fall = block.unbind(0)
        wrong = evidence.scatter(1, at_y, 0.0)  # evidence of the wrong classes: α̃ − prior
        wrong_sum = wrong.sum(1)
        alpha = torch.add(evidence, prior, out=alpha_sums[:, :k])
        torch.sum(alpha, 1, out=alpha_sums[:, k])
        torch.add(wrong_sum, k * prior, out=alpha_sums[:, k + 1])
        fill_gamma_parts(alpha_sums, prior, GammaParts(psi1, g_slope, g, q, log_psi1))
        if loss == "iedl":
            torch.addcmul(psi1, psi1, g_slope, out=fall)  # −ψ2/ψ1
        classes, total, wrong_total = block[:, :, :k], block[:, :, k], block[:, :, k + 1]
        _, psi1, g_slope, *_, squares, fall = classes.unbind(0)
        grad = _weighted_squares(loss, alpha, psi1, fall, squares)
        g_sum, q_sum, log_psi1_sum, squares_sum = classes[3:7].sum(2).unbind(0)
        true = classes.gather(2, at_y.expand(8, n, 1)).squeeze(2)
        alpha_y, psi1_y, *_, q_y, _, _, fall_y = true.unbind(0)
        s, psi1_s, slope_s, g_s, _, log_psi1_s, _, fall_s = total.unbind(0)

        # The gradient is grad + (shift of a row) + (corner at the true class).
        if loss == "edl_nll":
            rows, shift, corner = s.log() - alpha_y.log(), s.reciprocal(), -alpha_y.reciprocal()
        elif loss == "edl_ce":
            rows, shift, corner = torch.digamma(s) - torch.digamma(alpha_y), psi1_s.clone(), -psi1_y
        else:
            # Σ_k w_k b_k i + w_y (1 − 2 p_y), with i = 1/(S (S + 1)) or 1/S², w = ψ1 or 1.
            one = s.reciprocal()
            other = one if loss == "redl" else (s + 1).reciprocal_()
            inverse = one * other
            p_y = alpha_y * one
            rows, gap_y = squares_sum * inverse, torch.rsub(p_y, 1, alpha=2)
            shift = (one + other).mul_(rows).neg_()
            if loss == "iedl":
                gap_y *= psi1_y
                one = one * psi1_y
            shift.addcmul_(one, p_y, value=2)
            corner = one * -2
            rows += gap_y
            grad *= inverse[:, None]
        if loss == "iedl":
            corner.addcmul_(fall_y, gap_y, value=-1)
            grad.add_(wrong, alpha=dirichlet_kl_weight).mul_(psi1).add_(fall, alpha=logdet_weight)
            gap = g_s - g_sum
            log_det = gap.log().add_(log_psi1_sum).add_(log_psi1_s)
            rows.add_(log_det, alpha=-logdet_weight)
            pull = gap.reciprocal_().mul_(logdet_weight)
            shift.add_(fall_s, alpha=logdet_weight).addcmul_(slope_s, pull, value=-1)
            grad += g_slope * pull[:, None]
        else:
            grad.addcmul_(wrong, psi1, value=dirichlet_kl_weight)

        # KL(Dir(α̃) ‖ Dir(prior · 1)): with h = q + α it is Σ h(α̃_k) − h(S̃)
        # + prior (K − 1) ψ(S̃) + constants, in which the α cancel.
        divergence = torch.digamma(wrong_total[0]).mul_(prior * (k - 1))
        divergence.add_(q_sum).sub_(q_y).sub_(wrong_total[4])
        constant = (k - 1) * math.lgamma(prior) - math.lgamma(k * prior) - prior
        rows.add_(divergence, alpha=dirichlet_kl_weight).add_(dirichlet_kl_weight * constant)
        back = wrong_sum.mul_(wrong_total[1])
        shift.sub_(back, alpha=dirichlet_kl_weight)
        corner.add_(back, alpha=dirichlet_kl_weight)
        grad += shift[:, None]
        grad.scatter_add_(1, at_y, corner[:, None])
        ctx.grad = grad
        return rows

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # under create_graph=True
            raise NotImplementedError("evidential_loss is differentiable once only.")
        return ctx.grad * grad_rows[:, None], None, None, None, None, None


def _weighted_squares(
    loss: str, alpha: Tensor, psi1: Tensor, fall: Tensor, squares: Tensor
) -> Tensor:
    """Write w b to ``squares`` and return its slope over w, for b = α(α + 1) or α², w = ψ1 or 1."""
    if loss == "redl":
        torch.mul(alpha, alpha, out=squares)
        return alpha + alpha
    if loss in ("edl_nll", "edl_ce"):
        squares.zero_()
        return torch.zeros_like(alpha)
    after = alpha + 1
    torch.mul(alpha, after, out=squares)
    slope = after.add_(alpha)
    if loss == "iedl":
        slope.addcmul_(fall, squares, value=-1)
        squares *= psi1
    return slope


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
    >>> head.loss(outputs, torch.tensor([0, 1, 2, 0, 1]), dirichlet_kl_weight=0.1).mean().backward()
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
        self.prior: float = default_prior(loss) if prior is None else prior
        self.logdet_weight = logdet_weight
        _check_numbers(self.prior, 0.0, logdet_weight)

    def forward(self, outputs: Tensor) -> Tensor:
        """Concentrations α of each row, shape (n, n_classes)."""
        return self.evidence(outputs) + self.prior

    def loss(self, outputs: Tensor, y: Tensor, dirichlet_kl_weight: float = 1.0) -> Tensor:
        """Loss of each row; ``dirichlet_kl_weight`` is λ. In float32 also under autocast."""
        evidence = self.evidence(outputs if outputs.dtype == torch.float64 else outputs.float())
        rows: Tensor = _DirichletLoss.apply(
            evidence, y, self.loss_name, self.prior, dirichlet_kl_weight, self.logdet_weight
        )
        return rows

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

"""Gaussian posteriors over the rows of a linear map, q(W) = Π_k N(w_k; m_k, S_k).

Four parametrisations of the covariances S_k (D × D) for K outputs:

    dense            S_k = L Lᵀ, L lower triangular with diagonal e^ℓ
    dense_precision  S_k = (L Lᵀ)⁻¹, the same L
    diagonal         S_k = diag(e^{2ℓ})
    lowrank          S_k = U Uᵀ + diag(e^{2ℓ}), U with ``rank`` columns

e^{2ℓ} is a variance and e^ℓ a standard deviation in all but ``dense_precision``, where e^ℓ is the
root of a precision. KL(q ‖ Π N(0, s I)) = ½ Σ_k [(‖m_k‖² + tr S_k)/s + D ln s − ln|S_k| − D].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from uq.errors import ParameterError

COVARIANCES = ("dense", "dense_precision", "diagonal", "lowrank")
_MAX_DENSE = 1 << 26


class GaussianWeights(nn.Module, ABC):
    """Posterior over a (K, D) matrix with independent rows; see :func:`gaussian_weights`.

    Attributes
    ----------
    mean : Parameter of shape (K, D)
        Posterior means m_k.
    """

    correlated = True
    """Whether any covariance matrix can be represented."""

    def __init__(self, n_outputs: int, n_inputs: int) -> None:
        super().__init__()
        start = torch.empty(n_outputs, n_inputs).uniform_(-1, 1)
        self.mean: nn.Parameter = nn.Parameter(start / math.sqrt(n_inputs))

    @abstractmethod
    def variance(self, phi: Tensor) -> Tensor:
        """Variances φᵀS_kφ at the rows of ``phi`` (n, D), shape (n, K)."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """ln|S_k|, shape (K,)."""

    @abstractmethod
    def trace(self) -> Tensor:
        """tr S_k, shape (K,)."""

    @abstractmethod
    def covariances(self) -> Tensor:
        """S_k as explicit matrices, shape (K, D, D)."""

    @abstractmethod
    def deviations(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of w_k − m_k ~ N(0, S_k), shape (n, K, D)."""

    @abstractmethod
    def set_precision(self, root: Tensor) -> None:
        """Take the covariances that fit best a Gaussian of given precisions.

        Parameters
        ----------
        root : Tensor of shape (K, rows, D)
            Any R_k with R_kᵀR_k = Λ_k, the precision. ``dense`` and ``dense_precision`` represent
            Λ_k⁻¹; ``diagonal`` takes its best mean-field approximation, S_jj = 1/Λ_jj.
        """

    @abstractmethod
    def precision_root(self) -> Tensor:
        """A root R_k (K, D, D) of the precisions, R_kᵀR_k = S_k⁻¹, in float64."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n weight matrices, shape (n, K, D)."""
        return self.mean + self.deviations(n, generator)

    def kl(self, prior_variance: Tensor, expected_precision: Tensor | None = None) -> Tensor:
        """KL(q ‖ p) with p(w_k) = N(0, s I), in nats.

        Parameters
        ----------
        prior_variance : Tensor, scalar
            Variance s.
        expected_precision : Tensor of shape (K,), optional
            E[τ_k], where q(w_k | τ_k) = N(m_k, S_k/τ_k) and p(w_k | τ_k) = N(0, s I/τ_k): the KL
            of these, averaged over q(τ_k).
        """
        k, d = self.mean.shape
        prior_variance = prior_variance.to(self.mean.dtype)
        squares = self.mean.square()
        if expected_precision is not None:
            squares = squares * expected_precision.unsqueeze(-1)
        quadratic = (squares.sum() + self.trace().sum()) / prior_variance
        return 0.5 * (quadratic - self.log_det().sum() + k * d * (prior_variance.log() - 1))

    def _noise(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        like = self.mean
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


class DenseWeights(GaussianWeights):
    """S_k = LLᵀ."""

    def __init__(self, n_outputs: int, n_inputs: int) -> None:
        super().__init__(n_outputs, n_inputs)
        self.log_diagonal: nn.Parameter = nn.Parameter(_initial_log_scale(n_outputs, n_inputs))
        self.off_diagonal: nn.Parameter = nn.Parameter(torch.zeros(n_outputs, n_inputs, n_inputs))

    def factor(self) -> Tensor:
        """The triangular factors L, shape (K, D, D)."""
        return _triangular(self.off_diagonal, self.log_diagonal)

    def variance(self, phi: Tensor) -> Tensor:
        """‖Lᵀφ‖²."""
        return _projected_norm(phi, self.factor())

    def log_det(self) -> Tensor:
        """2 Σℓ."""
        return 2 * self.log_diagonal.sum(-1)

    def trace(self) -> Tensor:
        """‖L‖²."""
        below = torch.tril(self.off_diagonal, -1).square().sum((-2, -1))
        return below + (2 * self.log_diagonal).exp().sum(-1)

    def covariances(self) -> Tensor:
        """LLᵀ."""
        factor = self.factor()
        return factor @ factor.mT

    def deviations(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Lz."""
        z = self._noise(n, *self.mean.shape, generator=generator)
        return torch.einsum("kij,nkj->nki", self.factor(), z)

    @torch.no_grad()
    def set_precision(self, root: Tensor) -> None:
        """L = T⁻¹ with T lower triangular and TᵀT = Λ."""
        lower = _upper_root(root.flip(-1)).flip((-2, -1))
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        _store(self, torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False))

    def precision_root(self) -> Tensor:
        """L⁻¹."""
        factor = self.factor().detach().double()
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


class DensePrecisionWeights(GaussianWeights):
    """S_k = (LLᵀ)⁻¹."""

    def __init__(self, n_outputs: int, n_inputs: int) -> None:
        super().__init__(n_outputs, n_inputs)
        self.log_diagonal: nn.Parameter = nn.Parameter(-_initial_log_scale(n_outputs, n_inputs))
        self.off_diagonal: nn.Parameter = nn.Parameter(torch.zeros(n_outputs, n_inputs, n_inputs))

    def factor(self) -> Tensor:
        """The triangular factors L of the precisions, shape (K, D, D)."""
        return _triangular(self.off_diagonal, self.log_diagonal)

    def variance(self, phi: Tensor) -> Tensor:
        """‖L⁻¹φ‖², by a triangular solve."""
        columns = phi.mT.expand(len(self.mean), -1, -1)
        solved = torch.linalg.solve_triangular(self.factor(), columns, upper=False)
        return solved.square().sum(-2).mT

    def log_det(self) -> Tensor:
        """−2 Σℓ."""
        return -2 * self.log_diagonal.sum(-1)

    def trace(self) -> Tensor:
        """‖L⁻¹‖²."""
        return self._inverse().square().sum((-2, -1))

    def covariances(self) -> Tensor:
        """L⁻ᵀL⁻¹."""
        inverse = self._inverse()
        return inverse.mT @ inverse

    def deviations(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """L⁻ᵀz."""
        z = self._noise(n, *self.mean.shape, generator=generator).permute(1, 2, 0)
        solved = torch.linalg.solve_triangular(self.factor().mT, z, upper=True)
        return solved.permute(2, 0, 1)

    @torch.no_grad()
    def set_precision(self, root: Tensor) -> None:
        """L = Rᵀ with R upper triangular and RᵀR = Λ."""
        _store(self, _upper_root(root).mT)

    def precision_root(self) -> Tensor:
        """Lᵀ."""
        return self.factor().detach().double().mT

    def _inverse(self) -> Tensor:
        factor = self.factor()
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


class DiagonalWeights(GaussianWeights):
    """S_k = diag(e^{2ℓ})."""

    correlated = False

    def __init__(self, n_outputs: int, n_inputs: int) -> None:
        super().__init__(n_outputs, n_inputs)
        self.log_diagonal: nn.Parameter = nn.Parameter(_initial_log_scale(n_outputs, n_inputs))

    def variance(self, phi: Tensor) -> Tensor:
        """Σ_j φ_j² e^{2ℓ_j}."""
        return phi.square() @ (2 * self.log_diagonal).exp().mT

    def log_det(self) -> Tensor:
        """2 Σℓ."""
        return 2 * self.log_diagonal.sum(-1)

    def trace(self) -> Tensor:
        """Σ e^{2ℓ}."""
        return (2 * self.log_diagonal).exp().sum(-1)

    def covariances(self) -> Tensor:
        """diag(e^{2ℓ})."""
        return torch.diag_embed((2 * self.log_diagonal).exp())

    def deviations(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """e^ℓ z."""
        return self.log_diagonal.exp() * self._noise(n, *self.mean.shape, generator=generator)

    @torch.no_grad()
    def set_precision(self, root: Tensor) -> None:
        """S_jj = 1/Λ_jj."""
        self.log_diagonal.copy_(-0.5 * root.square().sum(-2).log())

    def precision_root(self) -> Tensor:
        """diag(e^{−ℓ})."""
        return torch.diag_embed((-self.log_diagonal).detach().double().exp())


class LowRankWeights(GaussianWeights):
    """S_k = UUᵀ + diag(e^{2ℓ})."""

    correlated = False

    def __init__(self, n_outputs: int, n_inputs: int, rank: int) -> None:
        super().__init__(n_outputs, n_inputs)
        self.log_diagonal: nn.Parameter = nn.Parameter(_initial_log_scale(n_outputs, n_inputs))
        # Zero is a saddle point of UUᵀ, hence the small noise.
        self.off_diagonal: nn.Parameter = nn.Parameter(
            1e-3 * torch.randn(n_outputs, n_inputs, rank)
        )

    def variance(self, phi: Tensor) -> Tensor:
        """‖Uᵀφ‖² + Σ_j φ_j² e^{2ℓ_j}."""
        diagonal = phi.square() @ (2 * self.log_diagonal).exp().mT
        return diagonal + _projected_norm(phi, self.off_diagonal)

    def log_det(self) -> Tensor:
        """Σ 2ℓ + ln|I + Uᵀ diag⁻¹ U|, a rank × rank determinant."""
        scaled = self.off_diagonal * torch.exp(-self.log_diagonal).unsqueeze(-1)
        rank = scaled.shape[-1]
        inner = torch.eye(rank, dtype=scaled.dtype, device=scaled.device) + scaled.mT @ scaled
        return 2 * self.log_diagonal.sum(-1) + torch.linalg.slogdet(inner).logabsdet

    def trace(self) -> Tensor:
        """‖U‖² + Σ e^{2ℓ}."""
        return self.off_diagonal.square().sum((-2, -1)) + (2 * self.log_diagonal).exp().sum(-1)

    def covariances(self) -> Tensor:
        """UUᵀ + diag(e^{2ℓ})."""
        u = self.off_diagonal
        return u @ u.mT + torch.diag_embed((2 * self.log_diagonal).exp())

    def deviations(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """e^ℓ z + U z′."""
        k, _, rank = self.off_diagonal.shape
        own = self.log_diagonal.exp() * self._noise(n, *self.mean.shape, generator=generator)
        shared = self._noise(n, k, rank, generator=generator)
        return own + torch.einsum("kir,nkr->nki", self.off_diagonal, shared)

    def set_precision(self, root: Tensor) -> None:
        """Not in closed form."""
        raise _no_closed_form()

    def precision_root(self) -> Tensor:
        """Not in closed form."""
        raise _no_closed_form()


def gaussian_weights(
    n_outputs: int, n_inputs: int, covariance: str = "dense", rank: int = 3
) -> GaussianWeights:
    """Make the posterior q(W) of a linear map, initialised for training.

    Parameters
    ----------
    n_outputs, n_inputs : int
        Shape (K, D) of W.
    covariance : {"dense", "dense_precision", "diagonal", "lowrank"}, default="dense"
        How the covariances S_k are represented.
    rank : int, default=3
        Columns of U, for "lowrank" alone.

    Raises
    ------
    ParameterError
        If ``covariance`` is none of these, or dense ones would not fit in memory.

    Examples
    --------
    >>> import torch
    >>> from uq.nn.vbll_weights import gaussian_weights
    >>> weights = gaussian_weights(3, 5, "lowrank", rank=2)
    >>> weights.variance(torch.zeros(7, 5)).shape, weights.sample(2).shape
    (torch.Size([7, 3]), torch.Size([2, 3, 5]))
    """
    if covariance not in COVARIANCES:
        raise ParameterError(
            f"covariance must be one of {', '.join(COVARIANCES)}, got {covariance!r}."
        )
    if covariance.startswith("dense") and n_outputs * n_inputs**2 > _MAX_DENSE:
        raise ParameterError(
            f"covariance={covariance!r} needs {n_outputs} × {n_inputs}² numbers; use 'diagonal' or "
            "'lowrank'."
        )
    if covariance == "lowrank":
        return LowRankWeights(n_outputs, n_inputs, rank)
    if covariance == "diagonal":
        return DiagonalWeights(n_outputs, n_inputs)
    if covariance == "dense":
        return DenseWeights(n_outputs, n_inputs)
    return DensePrecisionWeights(n_outputs, n_inputs)


def _initial_log_scale(n_outputs: int, n_inputs: int) -> Tensor:
    """Log standard deviations at which φᵀSφ is about e⁻² for features of size 1."""
    return torch.full((n_outputs, n_inputs), -0.5 * math.log(n_inputs) - 1.0)


def _triangular(off_diagonal: Tensor, log_diagonal: Tensor) -> Tensor:
    return torch.tril(off_diagonal, -1) + torch.diag_embed(log_diagonal.exp())


def _store(weights: DenseWeights | DensePrecisionWeights, factor: Tensor) -> None:
    weights.off_diagonal.copy_(torch.tril(factor, -1))
    weights.log_diagonal.copy_(factor.diagonal(dim1=-2, dim2=-1).log())


def _projected_norm(phi: Tensor, factor: Tensor) -> Tensor:
    """‖F_kᵀφ‖² for factors (K, D, R): one matrix product, never (n, K, D, D)."""
    k, d, r = factor.shape
    flat = factor.permute(1, 0, 2).reshape(d, k * r)
    return (phi @ flat).view(-1, k, r).square().sum(-1)


def _upper_root(root: Tensor) -> Tensor:
    """Upper triangular R with positive diagonal and RᵀR = rootᵀroot.

    By QR of the root: the matrix itself, whose condition number is the square, is never formed.
    """
    upper = torch.linalg.qr(root, mode="r").R
    return upper * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)


def _no_closed_form() -> ParameterError:
    return ParameterError(
        "covariance='lowrank' has no closed form; use 'dense', 'dense_precision' or 'diagonal'."
    )

"""Gaussian processes: exact regression, and variational with inducing points for any likelihood.

Kernels are GPyTorch's, with a length scale for each feature, for each output separately; all else
is by Cholesky in float64, so that only rounding separates it from the equations. With K = k(Z, Z):

    exact        Z the training rows, C = K + σ² diag(1/w):
                 f(x) ~ N(k'C⁻¹y, k(x, x) − k'C⁻¹k),    −log p(y) = ½ y'C⁻¹y + ½ log|C| + …
    variational  u = f(Z) = L v with LL' = K and q(v) = N(m, SS'); with a = L⁻¹ k(Z, x)
                 f(x) ~ N(a'm, k(x, x) − a'a + |S'a|²),
                 ELBO = Σ w E_q log p(y | f) − KL(q(v) ‖ N(0, I))

A row of weight w counts as w equal rows, in the marginal likelihood, too.

C. E. Rasmussen, C. K. I. Williams, "Gaussian Processes for Machine Learning", MIT Press 2006,
ch. 2; J. Hensman et al., UAI 2013, arXiv 1309.6835 (eq. 4), and AISTATS 2015, arXiv 1411.2005;
function draws by J. T. Wilson et al., ICML 2020, arXiv 2002.09309 (eqs. 12-13).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor, nn

from uq.distributions import CategoricalMixture, Parametric, Predictive

KERNELS = ("rbf", "matern12", "matern32", "matern52")
# Relative to the kernel's scale: keeps the factorisation of equal rows going.
_JITTER = 1e-8
_NOISE_FLOOR = 1e-6  # variance, in units of the standardised target
_FOURIER_FEATURES = 2048
_TRAINING_DRAWS = 16
_CHUNK = 4096


def make_kernel(name: str, n_features: int, n_outputs: int) -> Any:
    """GPyTorch kernel with a scale and a length scale per feature, for each output."""
    from gpytorch.constraints import Positive
    from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

    batch = torch.Size([n_outputs])
    # On the CPU also while a file is loaded, when modules are made on the meta device: GPyTorch
    # looks at values.
    with torch.device("cpu"):
        # Logarithms rather than GPyTorch's softplus: a feature without effect has a length scale of
        # hundreds, which steps of Adam reach in logarithms only.
        positive = Positive(transform=torch.exp, inv_transform=torch.log)
        options: dict[str, Any] = {
            "ard_num_dims": n_features,
            "batch_shape": batch,
            "lengthscale_constraint": positive,
        }
        base = (
            RBFKernel(**options) if name == "rbf" else MaternKernel(nu=int(name[-2]) / 2, **options)
        )
        kernel = ScaleKernel(base, batch_shape=batch, outputscale_constraint=positive).double()
        # Distances of standardised rows grow with the square root of their width.
        base.lengthscale = math.sqrt(n_features)
        kernel.outputscale = 1.0
    return kernel


class GaussianProcess(nn.Module, ABC):
    """Independent processes for K outputs, on the same features.

    Parameters
    ----------
    kernel : str
        One of ``KERNELS``.
    n_features, n_outputs, n_anchors : int
        Width of a row, number of outputs K, number of rows in Z.
    """

    def __init__(self, kernel: str, n_features: int, n_outputs: int, n_anchors: int) -> None:
        super().__init__()
        self.name = kernel
        self.kernel: Any = make_kernel(kernel, n_features, n_outputs)
        self.n_outputs = n_outputs
        self.register_buffer("anchors", torch.zeros(n_anchors, n_features, dtype=torch.float64))

    anchors: Tensor

    def covariance(self, a: Tensor, b: Tensor) -> Tensor:
        """k(a, b) of each output, (K, rows of a, rows of b)."""
        dense: Tensor = self.kernel(a, b).to_dense()
        return dense

    def variance(self, a: Tensor) -> Tensor:
        """k(x, x) of each output and row; the kernels are stationary."""
        return self.kernel.outputscale[:, None].expand(-1, len(a))

    @abstractmethod
    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of f at features ``z``, both (K, rows)."""

    @abstractmethod
    def _update(self, prior: Tensor, generator: torch.Generator) -> Tensor:
        """k(x, Z) times this moves a prior function, known at Z, to a posterior one: (n, K, Z)."""

    def draw(self, z: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draw n functions and evaluate them at features ``z``: (n, rows, K).

        A prior function from random Fourier features of the kernel, moved to the posterior by the
        exact update, so that the error of the features dies out where there are data.
        """
        shape = (n, self.n_outputs, _FOURIER_FEATURES)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=z.dtype, device=z.device)

        frequency = randn(self.n_outputs, _FOURIER_FEATURES, z.shape[-1])
        if self.name != "rbf":  # Student-t with 2ν degrees of freedom
            df = int(self.name[-2])
            chi2 = randn(self.n_outputs, _FOURIER_FEATURES, df).square().sum(-1, keepdim=True)
            frequency = frequency * (df / chi2).sqrt()
        frequency = frequency / self.kernel.base_kernel.lengthscale
        phase = 2 * math.pi * torch.rand(shape[1:], generator=generator, dtype=z.dtype)
        weights = randn(*shape) * (2 * self.kernel.outputscale[:, None] / _FOURIER_FEATURES).sqrt()

        def prior(rows: Tensor) -> Tensor:
            waves = (rows @ frequency.mT + phase.to(z)[:, None]).cos()  # (K, rows, features)
            return torch.einsum("nkf,krf->nkr", weights, waves)

        update = self._update(prior(self.anchors), generator)
        parts = [
            prior(rows) + torch.einsum("nkz,krz->nkr", update, self.covariance(rows, self.anchors))
            for rows in z.split(_CHUNK)
        ]
        return torch.cat(parts, -1).mT


class NoisyProcess(nn.Module):
    """Noise of regression: one variance per output."""

    log_noise: nn.Parameter

    @property
    def noise(self) -> Tensor:
        """Noise variance of each output, (K,)."""
        return self.log_noise.exp() + _NOISE_FLOOR

    def predict(self, mean: Tensor, variance: Tensor) -> Predictive:
        """Predictive Normal, batch shape (n, K), with the process's share as epistemic."""
        total = variance + self.noise[:, None]
        base = Normal(mean.mT, total.sqrt().mT, validate_args=False)
        return Parametric(base, epistemic_share=(variance / total).mT, validate_args=False)


class ExactGP(GaussianProcess, NoisyProcess):
    """Exact regression. ``condition`` on the training rows before predicting."""

    factor: Tensor
    alpha: Tensor
    inverse_weight: Tensor

    def __init__(self, kernel: str, n_features: int, n_outputs: int, n_rows: int) -> None:
        super().__init__(kernel, n_features, n_outputs, n_rows)
        self.log_noise = nn.Parameter(torch.full((n_outputs,), -2.0, dtype=torch.float64))
        for name, shape in (
            ("factor", (n_outputs, n_rows, n_rows)),
            ("alpha", (n_outputs, n_rows)),
            ("inverse_weight", (n_rows,)),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def _factorise(self, z: Tensor, y: Tensor, inverse_weight: Tensor) -> tuple[Tensor, Tensor]:
        extra = self.noise[:, None] * inverse_weight + _JITTER * self.kernel.outputscale[:, None]
        factor, info = torch.linalg.cholesky_ex(self.covariance(z, z) + torch.diag_embed(extra))
        factor = torch.where(info[:, None, None] > 0, torch.nan, factor)  # the loss says so
        return factor, torch.cholesky_solve(y.mT[..., None], factor)[..., 0]

    def loss(self, z: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """−log p(y | z) of all rows (n, D) and targets (n, K), in nats, not divided by rows.

        ``weight`` (n,) counts rows; the fractional case interpolates the whole numbers.
        """
        w = torch.ones_like(y[:, 0]) if weight is None else weight
        factor, alpha = self._factorise(z, y, 1 / w)
        quadratic = (y.mT * alpha).sum(-1) + 2 * factor.diagonal(0, -2, -1).log().sum(-1)
        # w equal rows against one of variance σ²/w: Normal densities of the differences, all zero.
        repeats = ((w - 1) * (2 * math.pi * self.noise[:, None]).log() + w.log()).sum(-1)
        return 0.5 * (quadratic + repeats + len(y) * math.log(2 * math.pi)).sum()

    @torch.no_grad()
    def condition(self, z: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Keep training rows and the factor of their covariance."""
        w = torch.ones_like(y[:, 0]) if weight is None else weight
        self.anchors, self.inverse_weight = z.detach(), 1 / w
        # Row by row, as a file keeps them: products of another layout round differently.
        factor, alpha = self._factorise(self.anchors, y, 1 / w)
        self.factor, self.alpha = factor.contiguous(), alpha.contiguous()

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of f at features ``z``, both (K, rows)."""
        cross = self.covariance(self.anchors, z)
        half = torch.linalg.solve_triangular(self.factor, cross, upper=False)
        variance = (self.variance(z) - half.square().sum(-2)).clamp_min(0)
        return torch.einsum("kzr,kz->kr", cross, self.alpha), variance

    def _update(self, prior: Tensor, generator: torch.Generator) -> Tensor:
        scale = (self.noise[:, None] * self.inverse_weight).sqrt()
        noise = torch.randn(
            prior.shape, generator=generator, dtype=prior.dtype, device=prior.device
        )
        moved = torch.cholesky_solve((prior + scale * noise)[..., None], self.factor)[..., 0]
        return self.alpha - moved


class VariationalGP(GaussianProcess):
    """Variational posterior at inducing points, which are learned with everything else."""

    def __init__(self, kernel: str, n_features: int, n_outputs: int, n_inducing: int) -> None:
        super().__init__(kernel, n_features, n_outputs, n_inducing)
        anchors = self.anchors
        del self.anchors
        self.anchors = nn.Parameter(anchors)
        shape = (n_outputs, n_inducing)
        self.mean: nn.Parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.raw_tril: nn.Parameter = nn.Parameter(
            torch.zeros((*shape, n_inducing), dtype=torch.float64)
        )

    @property
    def _tril(self) -> Tensor:
        """Factor S of the covariance of v; the identity, which is the prior, at zero."""
        return self.raw_tril.tril(-1) + torch.diag_embed(self.raw_tril.diagonal(0, -2, -1).exp())

    def _factor(self) -> Tensor:
        gram = self.covariance(self.anchors, self.anchors)
        jitter = 100 * _JITTER * self.kernel.outputscale[:, None].expand(-1, gram.shape[-1])
        factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(jitter))
        return torch.where(info[:, None, None] > 0, torch.nan, factor)

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of f at features ``z``, both (K, rows)."""
        cross = self.covariance(self.anchors, z)
        a = torch.linalg.solve_triangular(self._factor(), cross, upper=False)
        extra = (self._tril.mT @ a).square().sum(-2) - a.square().sum(-2)
        variance = (self.variance(z) + extra).clamp_min(1e-12)
        return torch.einsum("kzr,kz->kr", a, self.mean), variance

    def kl(self) -> Tensor:
        """KL(q ‖ prior) of all outputs, in nats."""
        log_det = 2 * self.raw_tril.diagonal(0, -2, -1).sum()
        squares = self._tril.square().sum() + self.mean.square().sum()
        return 0.5 * (squares - log_det - self.mean.numel())

    @abstractmethod
    def expected_nll(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        """−E log p(y | f) of each row under the marginals of f, in nats."""

    def loss(self, z: Tensor, y: Tensor, n_rows: float, weight: Tensor | None = None) -> Tensor:
        """−ELBO/N, estimated from a batch, in nats per row; weights have mean 1."""
        rows = self.expected_nll(*self.moments(z), y)
        return (rows if weight is None else rows * weight).mean() + self.kl() / n_rows

    def _update(self, prior: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(
            prior.shape, generator=generator, dtype=prior.dtype, device=prior.device
        )
        factor = self._factor()
        v = self.mean + torch.einsum("kij,nkj->nki", self._tril, noise)
        u = torch.einsum("kij,nkj->nki", factor, v)
        return torch.cholesky_solve((u - prior)[..., None], factor)[..., 0]


class VariationalRegression(VariationalGP, NoisyProcess):
    """Normal noise; its expectation is in closed form."""

    def __init__(self, kernel: str, n_features: int, n_outputs: int, n_inducing: int) -> None:
        super().__init__(kernel, n_features, n_outputs, n_inducing)
        self.log_noise = nn.Parameter(torch.full((n_outputs,), -2.0, dtype=torch.float64))

    def expected_nll(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        """−E log N(y | f, σ²), summed over outputs."""
        noise = self.noise[:, None]
        squares = ((y.mT - mean).square() + variance) / noise
        return 0.5 * (squares + (2 * math.pi * noise).log()).sum(0)


class VariationalClassification(VariationalGP):
    """Softmax of K processes; its expectation by antithetic draws, the same for all rows."""

    def expected_nll(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        """Monte-Carlo estimate of −E log softmax(f)_y, from torch's global generator."""
        half = torch.randn(_TRAINING_DRAWS // 2, self.n_outputs, 1).to(mean)
        logits = mean + variance.sqrt() * torch.cat([half, -half])
        picked = logits.gather(1, y.expand(len(logits), 1, -1))[:, 0]
        return (logits.logsumexp(1) - picked).mean(0)

    def predict(
        self, mean: Tensor, variance: Tensor, n_samples: int, generator: torch.Generator
    ) -> Predictive:
        """Mixture over ``n_samples`` draws of the marginals, batch shape (n,)."""
        noise = torch.randn(
            n_samples, self.n_outputs, 1, generator=generator, dtype=mean.dtype, device=mean.device
        )
        return CategoricalMixture((mean + variance.sqrt() * noise).mT)

"""Variational Bayesian last layers: a Gaussian posterior over the last linear map, in closed form.

J. Harrison, J. Willes, J. Snoek, "Variational Bayesian Last Layers", ICLR 2024, arXiv 2404.11599.
With features φ (a constant 1 appended), rows w_k ~ N(0, s I), q(w_k) = N(m_k, S_k), noise variance
σ_k² and v_k = φᵀS_kφ, the loss of each head is −ELBO/N, the mean over rows of an expected negative
log likelihood plus 1/N times a regularizer. The heads of this module are for real targets:

    Normal            Σ_k −ln N(y_k; m_kᵀφ, σ_k²) + v_k/(2σ_k²);   regularizer KL(q ‖ p) − ln p(Σ)
    Student t         w_k|τ_k ~ N(0, s I/τ_k), τ_k ~ Gamma(a₀, b₀), q(w_k|τ_k) = N(m_k, S_k/τ_k):
                      ½ Σ_k E[τ_k](y_k − m_kᵀφ)² + v_k − E[ln τ_k] + ln 2π;   KL(q ‖ p)
    heteroscedastic   ln σ_k²(x) = r_kᵀφ + c with q(r_k) Gaussian, too:
                      ½ Σ_k ((y_k − m_kᵀφ)² + v_k) E[σ_k⁻²] + E[ln σ_k²] + ln 2π;   KL(q ‖ p)

All three are the evidence bound itself, without a further inequality. Σ = diag(σ_k²) is found by
MAP under an inverse-Wishart prior. The heads for classes are in :mod:`uq.nn.vbll_classification`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro.distributions import StudentT
from torch import Tensor, nn

from uq.distributions import NormalMixture, Parametric, Predictive
from uq.errors import DataError, ParameterError
from uq.nn.vbll_statistics import (
    ClassStatistics,
    LinearStatistics,
    check_weight,
    most_probable_noise,
)
from uq.nn.vbll_weights import GaussianWeights, gaussian_weights

_LOG_2PI = math.log(2 * math.pi)
_UPDATE_ROWS = 1024
# e^±30 on standardised targets: beyond it a linear log variance has left the data far behind.
LOG_VARIANCE_LIMIT = 30.0


def add_constant(features: Tensor) -> Tensor:
    """Append the constant feature 1, which gives the last layer its bias."""
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], -1)


def positive(name: str, value: float) -> float:
    """Return ``value`` if it is a number > 0, else raise a ParameterError that names it."""
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ParameterError(f"{name} must be a number > 0, got {value!r}.")
    return float(value)


class BayesianLastLayer(nn.Module, ABC):
    """Posterior over the last linear map of a network, from features to K outputs.

    A head computes in its own dtype, whatever that of the features is and also under autocast:
    variances and log determinants lose too much in half precision.

    Attributes
    ----------
    n_features, n_outputs : int
        Width of the features, without the constant; number of outputs or classes K.
    prior_variance : Tensor, scalar
        Variance s of the prior of each weight.

    Examples
    --------
    Every head is trained and read in the same way:

    >>> import torch
    >>> from uq.nn import VBLLClassification
    >>> head = VBLLClassification(16, 3)
    >>> features = torch.randn(20, 16, requires_grad=True)  # of any network
    >>> head.loss(features, torch.arange(20) % 3, n_rows=20).backward()
    >>> head.predictive(features.detach()).probs.shape
    torch.Size([20, 3])
    """

    prior_variance: Tensor

    def __init__(self, n_features: int, n_outputs: int, prior_variance: float) -> None:
        super().__init__()
        for name, value in (("n_features", n_features), ("n_outputs", n_outputs)):
            if not isinstance(value, int) or value < 1:
                raise ParameterError(f"{name} must be an integer >= 1, got {value!r}.")
        self.n_features = n_features
        self.n_outputs = n_outputs
        variance = positive("prior_variance", prior_variance)
        self.register_buffer("prior_variance", torch.tensor(variance, dtype=torch.float64))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters, in which the head computes."""
        return next(self.parameters()).dtype

    # -- training ----------------------------------------------------------------------------

    def loss(
        self,
        features: Tensor,
        y: Tensor,
        n_rows: float | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """−ELBO/N, estimated from a batch, in nats per row.

        Parameters
        ----------
        features : Tensor of shape (n, D)
            Features of the batch, with gradients to the network below.
        y : Tensor of shape (n, K) or (n,) for one output; class positions (n,)
            Targets.
        n_rows : float, optional
            Rows of the whole training data, N. By default the rows of this batch, which is right
            only if the batch is the whole data: with mini-batches the prior would count N/n times.
        weight : Tensor of shape (n,), optional
            Weights of the rows, with mean 1 over the whole data.

        Returns
        -------
        Tensor, scalar
        """
        if n_rows is not None and not n_rows > 0:
            raise ParameterError(f"{type(self).__name__}.loss: n_rows must be > 0, got {n_rows!r}.")
        rows = self.expected_nll(features, y)
        if weight is not None:
            if weight.shape != rows.shape:
                raise DataError(
                    f"{type(self).__name__}: weight must have shape {tuple(rows.shape)}, got "
                    f"{tuple(weight.shape)}."
                )
            rows = rows * weight
        return rows.mean() + self.regularizer() / (len(rows) if n_rows is None else n_rows)

    def expected_nll(self, features: Tensor, y: Tensor) -> Tensor:
        """E_q[−ln p(y | φ, W)] of each row, or an upper bound on it, in nats, shape (n,)."""
        with self._own_precision(features):
            return self._expected_nll(self._inputs(features), self._targets(y, len(features)))

    @abstractmethod
    def regularizer(self) -> Tensor:
        """What the loss adds with weight 1/N: KL(q ‖ p), less log priors of point estimates."""

    # -- prediction --------------------------------------------------------------------------

    def predictive(
        self, features: Tensor, n_samples: int = 64, generator: torch.Generator | None = None
    ) -> Predictive:
        """Predictive distribution of each row.

        Parameters
        ----------
        features : Tensor of shape (n, D)
            Features.
        n_samples : int, default=64
            Draws, for heads whose predictive is not in closed form.
        generator : torch.Generator, optional
            Source of the draws, on the device of the features; draws are shared by all rows.
        """
        with self._own_precision(features):
            return self._predictive(self._inputs(features), n_samples, generator)

    def functions(
        self, features: Tensor, n: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n last layers: each is one function, whose values at all rows belong together.

        Returns
        -------
        Tensor of shape (n, rows, K)
            Noise-free means, or class probabilities: what Thompson sampling maximises.
        """
        with self._own_precision(features):
            return self._functions(self._inputs(features), n, generator)

    # -- frozen features -----------------------------------------------------------------------

    def statistics(self) -> LinearStatistics | ClassStatistics:
        """Empty sums to collect from a stream, for :meth:`fit_statistics`."""
        raise self._no_closed_form()

    def fit_statistics(self, statistics: Any) -> None:
        """Set the posterior to the exact one given the rows summed in ``statistics``.

        No gradient step is taken; features count as fixed. The noise is the most probable one.

        Raises
        ------
        ParameterError
            If this head has no closed form.
        DataError
            If there are no rows, or they held NaN or infinity.
        """
        raise self._no_closed_form()

    def update(self, features: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Condition the posterior on more rows: afterwards it is that of old and new rows.

        Exact for frozen features, in any order and any split of the rows. The precision is updated
        by the new rows alone (by QR, which does not square its condition number): old rows are not
        needed. A noise level that is a point estimate stays as it is.

        Parameters
        ----------
        features, y
            New rows, as in :meth:`loss`.
        weight : Tensor of shape (n,), optional
            How many times each row counts.

        Raises
        ------
        ParameterError
            If this head has no closed form, or its covariance keeps no correlations.
        """
        raise self._no_closed_form()

    def _no_closed_form(self) -> ParameterError:
        return ParameterError(
            f"{type(self).__name__} has no closed form; train it by its loss, or use "
            "VBLLRegression, VBLLStudentTRegression or VBLLGenerativeClassification."
        )

    # -- checks --------------------------------------------------------------------------------

    @abstractmethod
    def _expected_nll(self, phi: Tensor, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _predictive(
        self, phi: Tensor, n_samples: int, generator: torch.Generator | None
    ) -> Predictive: ...

    @abstractmethod
    def _functions(self, phi: Tensor, n: int, generator: torch.Generator | None) -> Tensor: ...

    @abstractmethod
    def _targets(self, y: Tensor, n: int) -> Tensor:
        """Check and shape the targets of n rows."""

    def _inputs(self, features: Tensor) -> Tensor:
        """Check the features; append the constant."""
        return add_constant(self._checked(features))

    def _checked(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.n_features:
            raise DataError(
                f"{type(self).__name__}: features must have shape (n, {self.n_features}), got "
                f"{tuple(features.shape)}."
            )
        dtype = self.dtype
        if dtype not in (torch.float32, torch.float64):
            raise ParameterError(
                f"{type(self).__name__} holds {dtype} weights, too coarse for variances and log "
                "determinants; call .float() on it (the network below may stay in half precision)."
            )
        return features.to(dtype)

    def _own_precision(self, features: Tensor) -> AbstractContextManager[Any]:
        kind = features.device.type
        if torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
        return nullcontext()


class RegressionLastLayer(BayesianLastLayer):
    """Base of the heads for real targets, whose mean is linear in the features.

    Attributes
    ----------
    weights : GaussianWeights
        q(W), of shape (K, D + 1): the last column belongs to the constant feature.
    """

    weights: GaussianWeights

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        covariance: str,
        rank: int,
        prior_variance: float,
    ) -> None:
        super().__init__(n_features, n_outputs, prior_variance)
        self.weights = gaussian_weights(n_outputs, n_features + 1, covariance, rank)

    def _targets(self, y: Tensor, n: int) -> Tensor:
        if y.ndim == 1 and self.n_outputs == 1:
            y = y.unsqueeze(-1)
        if y.shape != (n, self.n_outputs):
            raise DataError(
                f"{type(self).__name__}: y must have shape ({n}, {self.n_outputs}), got "
                f"{tuple(y.shape)}."
            )
        return y.to(self.dtype)

    def _condition(
        self, features: Tensor, y: Tensor, weight: Tensor | None, scale: Tensor
    ) -> Tensor:
        """Condition q(W) on rows with noise standard deviations ``scale`` (K,).

        Returns eᵀ(I + ΦSΦᵀ)⁻¹e of each output, e = (y − Φm)/scale, S in units of scale².
        """
        if not self.weights.correlated:
            raise ParameterError(
                f"{type(self).__name__}.update: this covariance keeps no correlations, so rows "
                "cannot be added exactly; use covariance='dense' or 'dense_precision'."
            )
        phi = self._inputs(features).double()
        targets = self._targets(y, len(phi)).double()
        if not bool(phi.isfinite().all() and targets.isfinite().all()):
            raise DataError(f"{type(self).__name__}.update: features or y hold NaN or infinity.")
        check_weight(weight, len(phi))
        root_weight = None if weight is None else weight.double().sqrt().unsqueeze(-1)
        misfit = torch.zeros_like(scale, dtype=torch.float64)
        for start in range(0, len(phi), _UPDATE_ROWS):
            rows = slice(start, start + _UPDATE_ROWS)
            mean = self.weights.mean.detach().double()
            residual = targets[rows] - phi[rows] @ mean.mT
            x, e = phi[rows].unsqueeze(-1) / scale, residual / scale  # (n, D, K), (n, K)
            if root_weight is not None:
                x, e = x * root_weight[rows].unsqueeze(-1), e * root_weight[rows]
            x, e = x.permute(2, 0, 1), e.mT.unsqueeze(-1)  # (K, n, D), (K, n, 1)
            stacked = torch.cat([self.weights.precision_root(), x], 1)
            upper = torch.linalg.qr(stacked, mode="r").R
            step = torch.cholesky_solve(x.mT @ e, upper, upper=True)
            misfit += (e * (e - x @ step)).sum((-2, -1))
            self.weights.set_precision(upper)
            self.weights.mean.data.copy_(mean + step.squeeze(-1))
        return misfit

    def _set_solution(self, statistics: LinearStatistics, noise: Tensor) -> None:
        """q(W) = N(m, Λ⁻¹) with Λ_k = ΦᵀΦ/noise_k + I/s, from the eigenvectors of ΦᵀΦ."""
        values, vectors, rotated = statistics.spectrum()
        s = self.prior_variance.double()
        mean = vectors @ (rotated / (values.unsqueeze(-1) + noise / s))
        precision = values / noise.unsqueeze(-1) + 1 / s  # (K, D)
        self.weights.set_precision(precision.sqrt().unsqueeze(-1) * vectors.mT)
        self.weights.mean.data.copy_(mean.mT)


class VBLLRegression(RegressionLastLayer):
    """Gaussian regression: the exact evidence bound and the exact Gaussian predictive.

    Parameters
    ----------
    n_features : int
        Width D of the features, without the constant that is appended here.
    n_outputs : int, default=1
        Number of targets K, in units in which they are about 1 in size.
    covariance : {"dense", "dense_precision", "diagonal", "lowrank"}, default="dense"
        How S_k is represented, see :mod:`uq.nn.vbll_weights`: "dense" is exact and costs D² numbers
        per output; "dense_precision" is the same family, quicker to :meth:`update` and slower to
        train; the others are approximations for wide features.
    rank : int, default=3
        Rank of the "lowrank" covariance.
    prior_variance : float, optional
        Variance s of the prior of each weight. By default 1/(D + 1), so that the prior variance of
        the mean is about 1 for features of size 1.
    wishart_scale : float, default=0.1
        Scale V of the inverse-Wishart prior of the noise (1 degree of freedom).
    noise_scale : float, default=0.5
        Noise standard deviation at the start.

    References
    ----------
    J. Harrison, J. Willes, J. Snoek, "Variational Bayesian Last Layers", ICLR 2024,
    arXiv 2404.11599, section 2.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import VBLLRegression
    >>> x, y = torch.randn(100, 3), torch.randn(100, 1)
    >>> net, head = torch.nn.Linear(3, 64), VBLLRegression(64, 1)
    >>> loss = head.loss(net(x).tanh(), y)  # −ELBO/N of all rows
    >>> loss.backward()
    >>> head.predictive(net(x).tanh()).batch_shape
    torch.Size([100, 1])

    The same head on frozen features, without a gradient step:

    >>> statistics = head.statistics()
    >>> statistics.add(net(x).tanh(), y)
    >>> head.fit_statistics(statistics)
    >>> head.update(net(x[:2]).tanh(), y[:2])  # two more rows
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int = 1,
        *,
        covariance: str = "dense",
        rank: int = 3,
        prior_variance: float | None = None,
        wishart_scale: float = 0.1,
        noise_scale: float = 0.5,
    ) -> None:
        s = 1 / (n_features + 1) if prior_variance is None else prior_variance
        super().__init__(n_features, n_outputs, covariance, rank, s)
        self.wishart_scale: float = positive("wishart_scale", wishart_scale)
        start = math.log(positive("noise_scale", noise_scale))
        self.log_noise: nn.Parameter = nn.Parameter(torch.full((n_outputs,), start))

    def noise_variance(self) -> Tensor:
        """Noise variance σ_k², shape (K,)."""
        return (2 * self.log_noise).exp()

    def noise_log_prior(self) -> Tensor:
        """Log density of the inverse-Wishart prior at Σ, up to a constant, in nats."""
        return wishart_log_prior(self.log_noise, self.wishart_scale)

    def regularizer(self) -> Tensor:
        """KL(q(W) ‖ p(W)) − ln p(Σ)."""
        return self.weights.kl(self.prior_variance) - self.noise_log_prior()

    def _expected_nll(self, phi: Tensor, y: Tensor) -> Tensor:
        residual = y - phi @ self.weights.mean.mT
        weighted = (residual.square() + self.weights.variance(phi)) / self.noise_variance()
        return (0.5 * weighted + self.log_noise + 0.5 * _LOG_2PI).sum(-1)

    def _predictive(
        self, phi: Tensor, n_samples: int, generator: torch.Generator | None
    ) -> NormalMixture:
        loc = (phi @ self.weights.mean.mT).double()
        scale = self.log_noise.exp().double().expand_as(loc)
        tau = self.weights.variance(phi).double().sqrt()
        return NormalMixture(loc[None], scale[None], tau[None], validate_args=False)

    def _functions(self, phi: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        return phi @ self.weights.sample(n, generator).mT

    def statistics(self) -> LinearStatistics:
        """Empty sums to collect from a stream, for :meth:`fit_statistics`."""
        return LinearStatistics(self.n_features, self.n_outputs, self.prior_variance.device)

    @torch.no_grad()
    def fit_statistics(self, statistics: LinearStatistics) -> None:
        """Set weights and noise to the maximum of the ELBO; see the base class.

        A noise with ``log_noise.requires_grad_(False)`` is known and stays.
        """
        noise = self.noise_variance().double()
        if self.log_noise.requires_grad:
            values, _, rotated = statistics.spectrum()
            noise = most_probable_noise(
                values,
                rotated,
                statistics.squares,
                statistics.n_rows,
                prior_variance=float(self.prior_variance),
                dof=self.n_outputs + 2.0,
                scale=self.wishart_scale,
                volumes=None if self.weights.correlated else statistics.gram.diagonal(),
            )
        self._set_solution(statistics, noise)
        self.log_noise.copy_(0.5 * noise.log())

    @torch.no_grad()
    def update(self, features: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Condition the weights on more rows, at the present noise; see the base class."""
        self._condition(features, y, weight, self.log_noise.double().exp())


class VBLLStudentTRegression(RegressionLastLayer):
    """Regression with the noise level integrated out: normal-inverse-gamma, Student-t predictive.

    The weights' prior scales with the noise, w_k | τ_k ~ N(0, s I/τ_k), which makes the model
    conjugate: with "dense" covariances the optimum is the exact posterior and the predictive is
    St(2a_k; m_kᵀφ, (1 + φᵀS_kφ) b_k/a_k).

    Parameters
    ----------
    n_features, n_outputs, covariance, rank
        As in :class:`VBLLRegression`.
    prior_variance : float, optional
        Variance s of each weight, in units of the noise variance. By default 4/(D + 1): times the
        initial noise variance ¼ this is the prior of :class:`VBLLRegression`.
    noise_shape, noise_rate : float, default=1.0, 0.05
        a₀ and b₀ of the prior τ_k ~ Gamma(a₀, b₀) of the noise precision.
    noise_scale : float, default=0.5
        E[τ_k]^(−1/2) at the start.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import VBLLStudentTRegression
    >>> head = VBLLStudentTRegression(4)
    >>> statistics = head.statistics()
    >>> statistics.add(torch.randn(6, 4), torch.randn(6, 1))
    >>> head.fit_statistics(statistics)
    >>> head.predictive(torch.randn(2, 4)).base.df  # 2 a₀ + N
    tensor([[8.], [8.]], dtype=torch.float64, grad_fn=<...>)
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int = 1,
        *,
        covariance: str = "dense",
        rank: int = 3,
        prior_variance: float | None = None,
        noise_shape: float = 1.0,
        noise_rate: float = 0.05,
        noise_scale: float = 0.5,
    ) -> None:
        s = 4 / (n_features + 1) if prior_variance is None else prior_variance
        super().__init__(n_features, n_outputs, covariance, rank, s)
        self.noise_shape: float = positive("noise_shape", noise_shape)
        self.noise_rate: float = positive("noise_rate", noise_rate)
        start = math.log(positive("noise_scale", noise_scale))
        # q(τ) by its shape and its mean e^(−2ℓ): unlike shape and rate, the two do not pull at
        # one another while they are trained.
        self.log_noise: nn.Parameter = nn.Parameter(torch.full((n_outputs,), start))
        self.log_shape: nn.Parameter = nn.Parameter(
            torch.full((n_outputs,), math.log(noise_shape + 1))
        )

    def gamma(self) -> tuple[Tensor, Tensor]:
        """Shape a_k and rate b_k of q(τ_k), each (K,)."""
        shape = self.log_shape.exp()
        return shape, shape * (2 * self.log_noise).exp()

    def regularizer(self) -> Tensor:
        """KL(q(W, τ) ‖ p(W, τ))."""
        precision = torch.exp(-2 * self.log_noise)
        return self.weights.kl(self.prior_variance, precision) + self._gamma_kl().sum()

    def _gamma_kl(self) -> Tensor:
        a, b = self.gamma()
        a0, b0 = self.noise_shape, self.noise_rate
        shapes = (a - a0) * torch.digamma(a) - torch.lgamma(a) + math.lgamma(a0)
        return shapes + a0 * (b.log() - math.log(b0)) + a * (b0 - b) / b

    def _expected_nll(self, phi: Tensor, y: Tensor) -> Tensor:
        a, b = self.gamma()
        residual = y - phi @ self.weights.mean.mT
        expected_log = torch.digamma(a) - b.log()
        squares = residual.square() * a / b + self.weights.variance(phi)
        return 0.5 * (squares - expected_log + _LOG_2PI).sum(-1)

    def _predictive(
        self, phi: Tensor, n_samples: int, generator: torch.Generator | None
    ) -> Parametric:
        a, b = (t.double() for t in self.gamma())
        loc = (phi @ self.weights.mean.mT).double()
        spread = self.weights.variance(phi).double()
        scale = ((1 + spread) * b / a).sqrt()
        # Var y = (1 + v) E[σ²]: the share v/(1 + v) is about the mean.
        share = spread / (1 + spread)
        base = StudentT((2 * a).expand_as(loc), loc, scale, validate_args=False)
        return Parametric(base, epistemic_share=share, validate_args=False)

    def _functions(self, phi: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        a, b = self.gamma()
        precision = torch._standard_gamma(a.detach().expand(n, -1), generator=generator) / b
        noise = precision.rsqrt().unsqueeze(-1)
        draws = self.weights.mean + self.weights.deviations(n, generator) * noise
        return phi @ draws.mT

    def statistics(self) -> LinearStatistics:
        """Empty sums to collect from a stream, for :meth:`fit_statistics`."""
        return LinearStatistics(self.n_features, self.n_outputs, self.prior_variance.device)

    @torch.no_grad()
    def fit_statistics(self, statistics: LinearStatistics) -> None:
        """Set the posterior to the exact normal-inverse-gamma one; see the base class."""
        values, _, rotated = statistics.spectrum()
        s = self.prior_variance.double()
        explained = (rotated.square() / (values + 1 / s).unsqueeze(-1)).sum(0)
        # The covariance is the same for all outputs.
        self._set_solution(statistics, torch.ones_like(statistics.squares[:1]))
        self._set_gamma(
            self.noise_shape + 0.5 * statistics.n_rows,
            self.noise_rate + 0.5 * (statistics.squares - explained).clamp_min(0.0),
        )

    @torch.no_grad()
    def update(self, features: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Condition weights and noise on more rows; see the base class."""
        a, b = (t.double() for t in self.gamma())
        misfit = self._condition(features, y, weight, torch.ones_like(b))
        n = float(len(features) if weight is None else weight.sum())
        self._set_gamma(a + 0.5 * n, b + 0.5 * misfit)

    def _set_gamma(self, a: Tensor | float, b: Tensor) -> None:
        a = torch.as_tensor(a, dtype=torch.float64, device=b.device)
        self.log_shape.copy_(a.log())
        self.log_noise.copy_(0.5 * (b / a).log())


class VBLLHeteroscedasticRegression(RegressionLastLayer):
    """Regression whose noise level depends on the input: ln σ_k²(x) is linear in the features.

    Parameters
    ----------
    n_features, n_outputs, covariance, rank, prior_variance
        As in :class:`VBLLRegression`; ``covariance`` and ``prior_variance`` also hold for the
        weights r_k of the log variance.
    noise_scale : float, default=0.5
        Noise standard deviation around which the prior of ln σ_k² is centred.

    Notes
    -----
    The prior of the weights does not scale with the noise, which differs from row to row: the
    weights are one function for all rows, so that the loss is the evidence bound of one model. The
    predictive is a mixture over ``n_samples`` draws of r, the weights W integrated out in each.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import VBLLHeteroscedasticRegression
    >>> head = VBLLHeteroscedasticRegression(4)
    >>> head.predictive(torch.randn(5, 4), n_samples=16).n_draws
    16
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int = 1,
        *,
        covariance: str = "dense",
        rank: int = 3,
        prior_variance: float | None = None,
        noise_scale: float = 0.5,
    ) -> None:
        s = 1 / (n_features + 1) if prior_variance is None else prior_variance
        super().__init__(n_features, n_outputs, covariance, rank, s)
        self.noise_weights: GaussianWeights = gaussian_weights(
            n_outputs, n_features + 1, covariance, rank
        )
        nn.init.zeros_(self.noise_weights.mean)
        self.log_variance_offset: float = 2 * math.log(positive("noise_scale", noise_scale))

    def regularizer(self) -> Tensor:
        """KL of the weights and of the weights of the log variance."""
        s = self.prior_variance
        return self.weights.kl(s) + self.noise_weights.kl(s)

    def log_variance(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of ln σ_k²(x) under q, each (n, K)."""
        mean = phi @ self.noise_weights.mean.mT + self.log_variance_offset
        return mean, self.noise_weights.variance(phi)

    def _expected_nll(self, phi: Tensor, y: Tensor) -> Tensor:
        log_mean, log_spread = self.log_variance(phi)
        precision = torch.exp(0.5 * log_spread - log_mean)  # E[σ⁻²] of a log-normal
        squares = (y - phi @ self.weights.mean.mT).square() + self.weights.variance(phi)
        return 0.5 * (squares * precision + log_mean + _LOG_2PI).sum(-1)

    def _predictive(
        self, phi: Tensor, n_samples: int, generator: torch.Generator | None
    ) -> NormalMixture:
        loc = (phi @ self.weights.mean.mT).double()
        tau = self.weights.variance(phi).double().sqrt()
        drawn = phi @ self.noise_weights.sample(n_samples, generator).mT
        log_variance = (drawn + self.log_variance_offset).double()
        limit = LOG_VARIANCE_LIMIT
        scale = log_variance.clamp(-limit, limit).mul(0.5).exp()
        shape = scale.shape
        return NormalMixture(loc.expand(shape), scale, tau.expand(shape), validate_args=False)

    def _functions(self, phi: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        return phi @ self.weights.sample(n, generator).mT


def wishart_log_prior(log_noise: Tensor, scale: float) -> Tensor:
    """Log density of the inverse-Wishart prior (1 degree of freedom) at Σ = diag(e^{2 log_noise}).

    Up to a constant, in nats: −((ν + K + 1)/2) ln|Σ| − ½ V tr Σ⁻¹.
    """
    power = 0.5 * (1 + log_noise.shape[0] + 1)
    return -power * 2 * log_noise.sum() - 0.5 * scale * torch.exp(-2 * log_noise).sum()

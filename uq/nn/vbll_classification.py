"""Variational Bayesian last layers for classes.

J. Harrison, J. Willes, J. Snoek, "Variational Bayesian Last Layers", ICLR 2024, arXiv 2404.11599.
Notation as in :mod:`uq.nn.vbll`. Three models:

    discriminative    z = Wφ + ε, ε_k ~ N(0, σ_k²), p(y | z) = softmax_y(z)
    heteroscedastic   the same with ln σ_k²(x) = r_kᵀφ + c, q(r_k) Gaussian
    generative        φ | y = k ~ N(w_k, Σ), π ~ Dirichlet(α)

Training needs an upper bound on E[logsumexp(z)], z_k ~ N(μ_k, u_k). Jensen's inequality (Theorem 2)
gives logsumexp_k(μ_k + u_k/2). The bound of D. Knowles and T. Minka, "Non-conjugate Variational
Message Passing for Multinomial and Binary Regression", NeurIPS 2011, holds for every a:

    E logsumexp(z) ≤ logsumexp_k(μ_k + (½ − a_k) u_k) + ½ Σ_k a_k² u_k.

With α_k = (½ − a_k) u_k it is convex in α, and a = 0 is Jensen's. Where u_k itself is random, α
keeps out of the logarithm what depends on it (the "reduced" bound):

    logsumexp_k(μ_k + α_k) + ½ Σ_k (E[u_k]/4 − α_k + α_k² E[1/u_k]).
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from uq.distributions import CategoricalMixture
from uq.errors import DataError, ParameterError
from uq.nn.vbll import LOG_VARIANCE_LIMIT, BayesianLastLayer, positive, wishart_log_prior
from uq.nn.vbll_statistics import ClassStatistics, most_probable_noise
from uq.nn.vbll_weights import gaussian_weights

BOUNDS = ("jensen", "knowles_minka")
# Points of the logit noise, averaged inside each weight draw: the noise is aleatoric, so only the
# spread between weight draws may count as epistemic. With 16 scrambled Sobol points probabilities
# are off by about 0.002, 0.006, 0.012 (rms) at noise σ = 0.3, 0.8, 1.5; 64 weight draws are off by
# more. Training drives σ down.
_NOISE_POINTS = 16
_CHUNK_ELEMENTS = 1 << 18
_KNOWLES_MINKA_STEPS = 5


def jensen_bound(mean: Tensor, variance: Tensor) -> Tensor:
    """Upper bound on E[logsumexp(z)] for z_k ~ N(μ_k, u_k), over the last axis.

    Parameters
    ----------
    mean, variance : Tensor of shape (n, K)
        μ and u.
    """
    return torch.logsumexp(mean + 0.5 * variance, -1)


def knowles_minka_bound(mean: Tensor, variance: Tensor, inverse: Tensor | None = None) -> Tensor:
    """Upper bound on E[logsumexp(z)], never above Jensen's and near the truth for wide logits.

    Parameters
    ----------
    mean, variance : Tensor of shape (n, K)
        μ and u, or E[u] where the variances are random.
    inverse : Tensor of shape (n, K), optional
        E[1/u], or a bound above it. By default 1/u.

    Notes
    -----
    The α of each row starts at Jensen's value and takes Newton steps with the curvature of
    logsumexp replaced by its upper bound ½(I − 11ᵀ/K), so that each step lowers the bound. It is
    held fixed in the gradient: the bound is valid at any α, and at the best one its gradient with
    respect to α is 0.

    Examples
    --------
    >>> import torch
    >>> from uq.nn.vbll_classification import jensen_bound, knowles_minka_bound
    >>> mean, variance = torch.zeros(1, 2), torch.full((1, 2), 8.0)
    >>> jensen_bound(mean, variance), knowles_minka_bound(mean, variance)  # the truth is 1.75
    (tensor([4.6931]), tensor([2.6931]))
    """
    inverse = 1 / variance if inverse is None else inverse
    with torch.no_grad():
        alpha = 0.5 / inverse
        share = 1 / (inverse + 0.5)
        rest = 2 * mean.shape[-1] - share.sum(-1, keepdim=True)
        for _ in range(_KNOWLES_MINKA_STEPS):
            slope = share * (torch.softmax(mean + alpha, -1) + alpha * inverse - 0.5)
            alpha = alpha - slope - share * slope.sum(-1, keepdim=True) / rest
    quadratic = (0.25 * variance - alpha + alpha.square() * inverse).sum(-1)
    return torch.logsumexp(mean + alpha, -1) + 0.5 * quadratic


class ClassificationLastLayer(BayesianLastLayer):
    """Base of the heads for class positions 0 … K−1."""

    def _targets(self, y: Tensor, n: int) -> Tensor:
        if y.shape != (n,) or y.is_floating_point() or y.is_complex():
            raise DataError(
                f"{type(self).__name__}: y must hold class positions 0 to {self.n_outputs - 1} as "
                f"integers of shape ({n},), got {y.dtype} of shape {tuple(y.shape)}."
            )
        return y.long()


class SoftmaxLastLayer(ClassificationLastLayer):
    """Base of the heads with Gaussian logits.

    Attributes
    ----------
    weights : GaussianWeights
        q(W), of shape (K, D + 1).
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        covariance: str,
        rank: int,
        prior_variance: float | None,
    ) -> None:
        s = 2 / (n_features + 1) if prior_variance is None else prior_variance
        super().__init__(n_features, n_outputs, s)
        self.weights = gaussian_weights(n_outputs, n_features + 1, covariance, rank)

    def _mixture(
        self, phi: Tensor, n_draws: int, generator: torch.Generator | None
    ) -> CategoricalMixture:
        """Mixture over weight draws, the logit noise averaged inside each.

        All rows share the weight draws and the noise, so a row's prediction does not depend on
        which rows come with it, and without weight uncertainty nothing is epistemic.
        """
        k = self.n_outputs
        weights = self.weights.sample(n_draws, generator)  # (S, K, D)
        scales = self._noise_draws(n_draws, generator)
        points = _normal_points(phi, k, generator)[:, None, None]
        log_probs = phi.new_empty(n_draws, len(phi), k)
        rows = max(1, _CHUNK_ELEMENTS // (n_draws * _NOISE_POINTS * k))
        for start in range(0, len(phi), rows):
            part = phi[start : start + rows]
            noise = points * self._noise_scale(part, scales)
            noisy = torch.log_softmax(part @ weights.mT + noise, -1)  # (points, S, rows, K)
            mean = torch.logsumexp(noisy, 0) - math.log(_NOISE_POINTS)
            log_probs[:, start : start + rows] = mean
        return CategoricalMixture(log_probs, validate_args=False)

    @abstractmethod
    def _noise_draws(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Draws of what the noise depends on, for :meth:`_noise_scale`."""

    @abstractmethod
    def _noise_scale(self, phi: Tensor, draws: Tensor) -> Tensor:
        """Noise standard deviations, broadcastable to (S, rows, K)."""

    def _predictive(
        self, phi: Tensor, n_samples: int, generator: torch.Generator | None
    ) -> CategoricalMixture:
        return self._mixture(phi, n_samples, generator)

    def _functions(self, phi: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        return self._mixture(phi, n, generator).logits.exp()


class VBLLClassification(SoftmaxLastLayer):
    """Discriminative classification (D-VBLL): Gaussian logits with one noise level a class.

    Parameters
    ----------
    n_features : int
        Width D of the features, without the constant that is appended here.
    n_outputs : int
        Number of classes K.
    covariance : {"dense", "dense_precision", "diagonal", "lowrank"}, default="dense"
        As in :class:`uq.nn.VBLLRegression`.
    rank : int, default=3
        Rank of the "lowrank" covariance.
    prior_variance : float, optional
        Variance s of the prior of each weight; by default 2/(D + 1).
    wishart_scale : float, default=1.0
        Scale V of the inverse-Wishart prior of the logit noise.
    noise_scale : float, default=0.5
        Standard deviation of the logit noise at the start.
    bound : {"jensen", "knowles_minka"}, default="jensen"
        Bound that is trained. Jensen's is the paper's; it pushes the variances down, the more the
        wider the logits are. Knowles and Minka's is tighter and costs a few percent more.

    References
    ----------
    J. Harrison, J. Willes, J. Snoek, "Variational Bayesian Last Layers", ICLR 2024,
    arXiv 2404.11599, Theorem 2.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import VBLLClassification
    >>> head = VBLLClassification(8, 3)
    >>> features = torch.randn(20, 8, requires_grad=True)
    >>> head.loss(features, torch.arange(20) % 3, n_rows=1000).backward()
    >>> head.predictive(features, n_samples=32).probs.shape
    torch.Size([20, 3])
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        *,
        covariance: str = "dense",
        rank: int = 3,
        prior_variance: float | None = None,
        wishart_scale: float = 1.0,
        noise_scale: float = 0.5,
        bound: str = "jensen",
    ) -> None:
        super().__init__(n_features, n_outputs, covariance, rank, prior_variance)
        if bound not in BOUNDS:
            raise ParameterError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}.")
        self.bound = bound
        self.wishart_scale: float = positive("wishart_scale", wishart_scale)
        start = math.log(positive("noise_scale", noise_scale))
        self.log_noise: nn.Parameter = nn.Parameter(torch.full((n_outputs,), start))

    def noise_variance(self) -> Tensor:
        """Variance σ_k² of the logit noise, shape (K,)."""
        return (2 * self.log_noise).exp()

    def regularizer(self) -> Tensor:
        """KL(q(W) ‖ p(W)) − ln p(Σ)."""
        prior = wishart_log_prior(self.log_noise, self.wishart_scale)
        return self.weights.kl(self.prior_variance) - prior

    def _expected_nll(self, phi: Tensor, y: Tensor) -> Tensor:
        mean = phi @ self.weights.mean.mT
        total = self.weights.variance(phi) + self.noise_variance()
        chosen = mean.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        bound = jensen_bound if self.bound == "jensen" else knowles_minka_bound
        return bound(mean, total) - chosen

    def _noise_draws(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self.log_noise.exp()  # a point estimate: the same in every draw

    def _noise_scale(self, phi: Tensor, draws: Tensor) -> Tensor:
        return draws


class VBLLHeteroscedasticClassification(SoftmaxLastLayer):
    """Gaussian logits whose noise depends on the input: labels may be noisy in places.

    Parameters
    ----------
    n_features, n_outputs, covariance, rank, prior_variance
        As in :class:`VBLLClassification`; ``covariance`` and ``prior_variance`` also hold for the
        weights r_k of the log variance.
    noise_scale : float, default=0.5
        Noise standard deviation around which the prior of ln σ_k² is centred.

    Notes
    -----
    Trained by the reduced Knowles–Minka bound with u_k = v_k + σ_k², E[σ_k²] = exp(μ + s²/2) and
    E[1/u_k] ≤ 1/(v_k + 1/E[σ_k⁻²]), since 1/(v + 1/p) is concave in p = σ⁻². Jensen's bound does
    not exist here: the moment generating function of a log-normal is infinite.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import VBLLHeteroscedasticClassification
    >>> head = VBLLHeteroscedasticClassification(8, 3, covariance="diagonal")
    >>> loss = head.loss(torch.randn(20, 8), torch.arange(20) % 3)
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        *,
        covariance: str = "dense",
        rank: int = 3,
        prior_variance: float | None = None,
        noise_scale: float = 0.5,
    ) -> None:
        super().__init__(n_features, n_outputs, covariance, rank, prior_variance)
        self.noise_weights = gaussian_weights(n_outputs, n_features + 1, covariance, rank)
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
        mean, spread = phi @ self.weights.mean.mT, self.weights.variance(phi)
        log_mean, log_spread = self.log_variance(phi)
        noise = torch.exp(log_mean + 0.5 * log_spread)  # E[σ²]
        harmonic = torch.exp(log_mean - 0.5 * log_spread)  # 1/E[σ⁻²]
        bound = knowles_minka_bound(mean, spread + noise, 1 / (spread + harmonic))
        return bound - mean.gather(-1, y.unsqueeze(-1)).squeeze(-1)

    def _noise_draws(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self.noise_weights.sample(n, generator)

    def _noise_scale(self, phi: Tensor, draws: Tensor) -> Tensor:
        limit = LOG_VARIANCE_LIMIT
        log_variance = phi @ draws.mT + self.log_variance_offset
        return log_variance.clamp(-limit, limit).mul(0.5).exp()


class VBLLGenerativeClassification(ClassificationLastLayer):
    """Generative classification (G-VBLL): a Gaussian over the features of each class.

    Parameters
    ----------
    n_features, n_outputs : int
        Width D of the features; number of classes K.
    prior_variance : float, default=1.0
        Variance s of the prior of the class means, for features of size 1.
    wishart_scale : float, default=1.0
        Scale V of the prior of the noise variance of each feature.
    noise_scale : float, default=1.0
        Noise standard deviation of each feature at the start.
    concentration : float, default=1.0
        α of the symmetric Dirichlet prior of the class probabilities.

    Attributes
    ----------
    mean, log_diagonal : Parameter of shape (K, D)
        q(w_k) = N(m_k, diag(e^{2ℓ_k})): given the noise, the exact posterior is diagonal.
    log_noise : Parameter of shape (D,)
        Log standard deviation of each feature, shared by the classes.
    class_counts : Tensor of shape (K,)
        Rows of each class that were seen, 0 until :meth:`count_classes` or :meth:`fit_statistics`.

    Notes
    -----
    The loss is the paper's bound on E_q[ln p(y | φ, W, π)], which trains the network below,

        E ln N(φ; w_y, Σ) + E ln π_y − logsumexp_k(ln N(φ; m_k, Σ + S_k) + ln E π_k),

    here with the Dirichlet posterior of π. :meth:`fit_statistics` and :meth:`update` are the
    conjugate posterior of the joint model of (φ, y) on frozen features. The prior of the noise is
    one inverse Wishart a feature: one of dimension D, as in the reference, counts as D rows. The
    predictive is in closed form, one draw; what is epistemic shows in the feature density.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import VBLLGenerativeClassification
    >>> head = VBLLGenerativeClassification(2, 3)
    >>> features, y = torch.randn(30, 2), torch.arange(30) % 3
    >>> statistics = head.statistics()
    >>> statistics.add(features, y)
    >>> head.fit_statistics(statistics)
    >>> bool(head.feature_log_density(torch.zeros(1, 2)) > head.feature_log_density(
    ...     torch.full((1, 2), 20.0)))
    True
    """

    class_counts: Tensor

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        *,
        prior_variance: float = 1.0,
        wishart_scale: float = 1.0,
        noise_scale: float = 1.0,
        concentration: float = 1.0,
    ) -> None:
        super().__init__(n_features, n_outputs, prior_variance)
        self.wishart_scale: float = positive("wishart_scale", wishart_scale)
        self.concentration: float = positive("concentration", concentration)
        start = math.log(positive("noise_scale", noise_scale))
        self.mean: nn.Parameter = nn.Parameter(0.1 * torch.randn(n_outputs, n_features))
        self.log_diagonal: nn.Parameter = nn.Parameter(torch.full((n_outputs, n_features), -1.0))
        self.log_noise: nn.Parameter = nn.Parameter(torch.full((n_features,), start))
        self.register_buffer("class_counts", torch.zeros(n_outputs, dtype=torch.float64))

    def noise_variance(self) -> Tensor:
        """Noise variance of each feature, shape (D,)."""
        return (2 * self.log_noise).exp()

    def count_classes(self, y: Tensor, weight: Tensor | None = None) -> None:
        """Add labels to ``class_counts``, from which the class probabilities are inferred."""
        classes = self._targets(y, len(y))
        w = torch.ones_like(classes) if weight is None else weight
        self.class_counts.index_add_(0, classes, w.to(self.class_counts))

    def regularizer(self) -> Tensor:
        """KL(q(W) ‖ p(W)) − ln p(Σ); that of the class probabilities is constant."""
        s, spread = self.prior_variance.to(self.dtype), (2 * self.log_diagonal).exp()
        squares = (self.mean.square() + spread).sum() / s
        size = self.mean.numel() * (s.log() - 1)
        kl = 0.5 * (squares - 2 * self.log_diagonal.sum() + size)
        # ln p(σ_j²) = −(3/2) ln σ_j² − V/(2σ_j²): an inverse Wishart of dimension 1.
        log_prior = (
            -3 * self.log_noise.sum()
            - 0.5 * self.wishart_scale * torch.exp(-2 * self.log_noise).sum()
        )
        return kl - log_prior

    def feature_log_density(self, features: Tensor) -> Tensor:
        """ln p(φ) = ln Σ_k E[π_k] N(φ; m_k, Σ + S_k), in nats, shape (n,): low is unfamiliar."""
        with self._own_precision(features):
            return torch.logsumexp(self._joint(self._inputs(features)), -1)

    def _inputs(self, features: Tensor) -> Tensor:
        return self._checked(features)  # class means are their own constant

    def _joint(self, phi: Tensor) -> Tensor:
        """ln E[π_k] + ln N(φ; m_k, Σ + S_k), shape (n, K)."""
        total = self.noise_variance() + (2 * self.log_diagonal).exp()
        counts = self.class_counts + self.concentration
        log_prior = (counts / counts.sum()).log().to(phi.dtype)
        return log_prior + _log_normal(phi, self.mean, total)

    def _expected_nll(self, phi: Tensor, y: Tensor) -> Tensor:
        noise = self.noise_variance()
        # Not self.mean[y]: that takes a label of −1 for the last class.
        mean, log_std = self.mean.index_select(0, y), self.log_diagonal.index_select(0, y)
        own = ((phi - mean).square() + (2 * log_std).exp()) / noise
        log_density = -0.5 * (own + noise.log() + math.log(2 * math.pi)).sum(-1)
        counts = self.class_counts + self.concentration
        expected_log = (torch.digamma(counts) - torch.digamma(counts.sum())).to(phi.dtype)
        return torch.logsumexp(self._joint(phi), -1) - log_density - expected_log[y]

    def _predictive(
        self, phi: Tensor, n_samples: int, generator: torch.Generator | None
    ) -> CategoricalMixture:
        return CategoricalMixture(self._joint(phi)[None], validate_args=False)

    def _functions(self, phi: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        shape = (n, *self.mean.shape)
        z = torch.randn(shape, generator=generator, dtype=phi.dtype, device=phi.device)
        means = self.mean + self.log_diagonal.exp() * z
        counts = (self.class_counts + self.concentration).expand(n, -1)
        gammas = torch._standard_gamma(counts, generator=generator)
        log_prior = (gammas / gammas.sum(-1, keepdim=True)).log().to(phi.dtype)
        noise = self.noise_variance()
        each = [
            torch.softmax(p + _log_normal(phi, m, noise.expand_as(m)), -1)
            for p, m in zip(log_prior, means, strict=True)
        ]
        return torch.stack(each)

    # -- frozen features -----------------------------------------------------------------------

    def statistics(self) -> ClassStatistics:
        """Empty sums to collect from a stream, for :meth:`fit_statistics`."""
        return ClassStatistics(self.n_features, self.n_outputs, self.mean.device)

    @torch.no_grad()
    def fit_statistics(self, statistics: ClassStatistics) -> None:
        """Set class means, noise and counts to the conjugate posterior; see the base class.

        A class without rows keeps its prior. A noise with ``log_noise.requires_grad_(False)`` is
        known and stays.
        """
        statistics.check()
        if self.log_noise.requires_grad:
            # Each feature is a linear regression on the class indicators: ΦᵀΦ = diag(counts).
            noise = most_probable_noise(
                statistics.counts,
                statistics.sums,
                statistics.squares,
                statistics.n_rows,
                prior_variance=float(self.prior_variance),
                dof=3.0,
                scale=self.wishart_scale,
            )
            self.log_noise.copy_(0.5 * noise.log())
        self.mean.zero_()
        self.log_diagonal.copy_(0.5 * self.prior_variance.log().expand_as(self.mean))
        self.class_counts.zero_()
        self._condition(statistics)

    @torch.no_grad()
    def update(self, features: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Condition class means and counts on more rows; see the base class.

        The rows need not hold every class.
        """
        added = self.statistics()
        added.add(self._inputs(features), self._targets(y, len(features)), weight)
        added.check()
        self._condition(added)

    def _condition(self, statistics: ClassStatistics) -> None:
        noise = self.noise_variance().double()
        before = (-2 * self.log_diagonal.double()).exp()
        precision = before + statistics.counts.unsqueeze(-1) / noise
        self.mean.copy_((before * self.mean.double() + statistics.sums / noise) / precision)
        self.log_diagonal.copy_(-0.5 * precision.log())
        self.class_counts += statistics.counts.to(self.class_counts)


def _log_normal(phi: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """ln N(φ; m_k, diag(u_k)) of rows (n, D) for K means and variances (K, D), shape (n, K).

    The square is expanded, so that no (n, K, D) array is made; around the overall mean, so that
    little cancels.
    """
    centre = mean.mean(0)
    x, m, precision = phi - centre, mean - centre, 1 / variance
    squares = x.square() @ precision.mT - 2 * x @ (m * precision).mT
    constant = (m.square() * precision + variance.log()).sum(-1)
    return -0.5 * (squares + constant + phi.shape[-1] * math.log(2 * math.pi))


def _normal_points(like: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """Quasi-random standard normals, shape (_NOISE_POINTS, k)."""
    seed = int(torch.randint(2**31, (1,), generator=generator, device=like.device))
    uniform = torch.quasirandom.SobolEngine(k, scramble=True, seed=seed).draw(
        _NOISE_POINTS, dtype=torch.float64
    )
    tiny = torch.finfo(torch.float64).eps
    return torch.special.ndtri(uniform.clamp(tiny, 1 - tiny)).to(like)

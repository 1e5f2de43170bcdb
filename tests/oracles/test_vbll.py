"""VBLL heads against exact answers: evidence, conjugate posterior, GP, MVN algebra, quadrature."""

import gpytorch
import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn import functional as F

from uq.nn import vbll
from uq.nn.vbll import CategoricalLastLayer, NormalLastLayer, add_constant

N, D = 60, 4


def regression_data(k=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(N, D, generator=g, dtype=torch.float64)
    y = features @ torch.randn(D, k, generator=g, dtype=torch.float64) + 0.7
    return features, y + 0.3 * torch.randn(N, k, generator=g, dtype=torch.float64)


def normal_head(k=1, covariance="dense", wishart_scale=0.1):
    torch.manual_seed(0)
    head = NormalLastLayer(
        D,
        k,
        covariance=covariance,
        rank=2,
        prior_variance=0.8,
        wishart_scale=wishart_scale,
        noise_scale=0.5,
    )
    return head.double()


def optimise(head, features, y, n, *, fixed_noise):
    head.log_noise.requires_grad_(not fixed_noise)
    parameters = [p for p in head.parameters() if p.requires_grad]
    opt = torch.optim.LBFGS(
        parameters,
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
        history_size=50,
    )

    def closure():
        opt.zero_grad()
        regularizer = head.kl() if fixed_noise else head.regularizer()
        loss = head.expected_nll(features, y).mean() + regularizer / n
        loss.backward()
        return loss

    opt.step(closure)
    with torch.no_grad():
        return float(head.expected_nll(features, y).mean() + head.kl() / n)


def exact(features, y, sigma2, s):
    phi = add_constant(features)
    precision = phi.T @ phi / sigma2 + torch.eye(D + 1).double() / s
    return phi, precision, torch.linalg.solve(precision, phi.T @ y / sigma2)


def test_dense_bound_is_the_evidence_at_its_optimum():
    features, y = regression_data()
    head = normal_head()
    sigma2 = float(head.noise_variance().detach())
    bound = -N * optimise(head, features, y, N, fixed_noise=True)
    phi, precision, mean = exact(features, y, sigma2, 0.8)
    marginal = MultivariateNormal(
        torch.zeros(N).double(), sigma2 * torch.eye(N).double() + 0.8 * phi @ phi.T
    )
    assert bound == pytest.approx(float(marginal.log_prob(y[:, 0])), rel=1e-7)
    torch.testing.assert_close(head.mean.detach().T, mean, rtol=0, atol=1e-5)
    factor = head.cholesky()[0].detach()
    torch.testing.assert_close(factor @ factor.T, torch.linalg.inv(precision), rtol=1e-3, atol=1e-6)


def test_predictive_is_the_gaussian_process_with_a_linear_kernel():
    features, y = regression_data()
    head = normal_head()
    optimise(head, features, y, N, fixed_noise=True)
    phi = add_constant(features)
    new = torch.randn(7, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    dist = head.predictive(new, 1)

    class LinearGP(gpytorch.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(phi, y[:, 0], likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = gpytorch.kernels.LinearKernel()

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(
                self.mean_module(x), self.covar_module(x)
            )

    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = float(head.noise_variance().detach())
    gp = LinearGP(likelihood).double()
    gp.covar_module.variance = 0.8
    gp.eval()
    likelihood.eval()
    with gpytorch.settings.fast_computations(False, False, False), torch.no_grad():
        expected = likelihood(gp(add_constant(new)))
    torch.testing.assert_close(dist.mean[:, 0], expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dist.variance[:, 0], expected.variance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dist.aleatoric[:, 0], head.noise_variance().expand(7).detach())


def test_diagonal_optimum():
    features, y = regression_data()
    head = normal_head(covariance="diagonal")
    sigma2 = float(head.noise_variance().detach())
    bound = -N * optimise(head, features, y, N, fixed_noise=True)
    phi, precision, mean = exact(features, y, sigma2, 0.8)
    torch.testing.assert_close(
        (2 * head.log_diagonal[0]).exp().detach(), 1 / precision.diagonal(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(head.mean.detach().T, mean, rtol=0, atol=1e-5)
    marginal = MultivariateNormal(
        torch.zeros(N).double(), sigma2 * torch.eye(N).double() + 0.8 * phi @ phi.T
    )
    assert bound < float(marginal.log_prob(y[:, 0])) - 1e-3


@pytest.mark.parametrize("k", [1, 3])
def test_noise_is_the_map_of_its_closed_form(k):
    """σ_k² = [Σ((y − mᵀφ)² + v) + V]/(N + ν + K + 1)."""
    features, y = regression_data(k)
    head = normal_head(k, wishart_scale=0.3)
    optimise(head, features, y, N, fixed_noise=False)
    with torch.no_grad():
        phi = add_constant(features)
        squares = ((y - phi @ head.mean.T).square() + head.variance(phi)).sum(0)
        expected = (squares + 0.3) / (N + 1 + k + 1)
        torch.testing.assert_close(head.noise_variance(), expected, rtol=1e-5, atol=0)


def test_outputs_add_up():
    """Without the noise prior, K outputs lose what K single-output heads lose together."""
    features, y = regression_data(3)
    head = normal_head(3)
    with torch.no_grad():
        head.off_diagonal.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.2)
        head.log_noise.copy_(torch.tensor([-1.0, 0.0, 0.5]))
        total = head.expected_nll(features, y).mean() + head.kl() / N
        parts = 0.0
        for k in range(3):
            one = normal_head(1)
            for name, value in head.named_parameters():
                getattr(one, name).copy_(value[k : k + 1])
            parts += one.expected_nll(features, y[:, k : k + 1]).mean() + one.kl() / N
    torch.testing.assert_close(total, parts, rtol=1e-12, atol=0)


@pytest.mark.parametrize("covariance", ["dense", "diagonal", "lowrank"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [1, 5])
def test_covariance_algebra(covariance, k, n):
    """φᵀSφ, KL and samples against an explicit multivariate normal."""
    head = normal_head(k, covariance)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=g, dtype=torch.float64))
        if covariance == "dense":
            factors = head.cholesky()
            covariances = factors @ factors.mT
        else:
            covariances = torch.diag_embed((2 * head.log_diagonal).exp())
            if covariance == "lowrank":
                covariances = covariances + head.off_diagonal @ head.off_diagonal.mT
        phi = add_constant(torch.randn(n, D, generator=g, dtype=torch.float64))
        explicit = torch.einsum("bd,kde,be->bk", phi, covariances, phi)
        torch.testing.assert_close(head.variance(phi), explicit, rtol=1e-10, atol=1e-12)
        q = MultivariateNormal(head.mean, covariances)
        p = MultivariateNormal(torch.zeros(D + 1).double(), 0.8 * torch.eye(D + 1).double())
        torch.testing.assert_close(head.kl(), kl_divergence(q, p).sum(), rtol=1e-10, atol=0)
        draws = head.sample_weights(40_000, g)
        error = draws.mean(0) - head.mean
        limit = 5 * (covariances.diagonal(dim1=-2, dim2=-1) / 40_000).sqrt()
        assert (error.abs() < limit).all()
        centred = draws - draws.mean(0)
        empirical = torch.einsum("nkd,nke->kde", centred, centred) / 40_000
        sizes = covariances.diagonal(dim1=-2, dim2=-1)
        spread = (sizes[:, :, None] * sizes[:, None, :] + covariances.square()) / 40_000
        assert ((empirical - covariances).abs() < 5 * spread.sqrt()).all()


def test_temperature_scales_the_likelihood():
    """Weight c/N gives the exact posterior under the likelihood to the power 1/c."""
    features, y = regression_data()
    head = normal_head()
    sigma2, c = float(head.noise_variance().detach()), 4.0
    optimise(head, features, y, N / c, fixed_noise=True)
    _, _, mean = exact(features, y, sigma2 * c, 0.8)
    torch.testing.assert_close(head.mean.detach().T, mean, rtol=0, atol=1e-5)


def categorical_head(k, noise=0.4, spread=0.3):
    torch.manual_seed(1)
    head = CategoricalLastLayer(
        D, k, covariance="dense", rank=2, prior_variance=1.0, wishart_scale=1.0, noise_scale=noise
    ).double()
    with torch.no_grad():
        head.mean.normal_()
        head.off_diagonal.normal_().mul_(spread)
    return head


@pytest.mark.statistical
@pytest.mark.parametrize("noise", [1e-4, 0.4, 1.5])
def test_jensen_bound_is_above_the_expected_nll(noise):
    head = categorical_head(4, noise=noise, spread=1e-4 if noise == 1e-4 else 0.3)
    if noise == 1e-4:
        with torch.no_grad():
            head.log_diagonal.fill_(np.log(1e-4))
    g = torch.Generator().manual_seed(5)
    features = torch.randn(6, D, generator=g, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        bound = head.expected_nll(features, y)
        phi = add_constant(features)
        u = (head.variance(phi) + head.noise_variance()).sqrt()
        z = phi @ head.mean.T + u * torch.randn(100_000, 6, 4, generator=g, dtype=torch.float64)
        nll = F.cross_entropy(z.reshape(-1, 4), y.repeat(100_000), reduction="none").view(-1, 6)
    error = nll.std(0) / np.sqrt(100_000)
    assert (bound > nll.mean(0) - 5 * error).all()
    if noise == 1e-4:  # no variance: the bound is the cross entropy of the mean
        expected = F.cross_entropy(phi @ head.mean.T, y, reduction="none")
        torch.testing.assert_close(bound, expected, rtol=0, atol=1e-6)


@pytest.mark.statistical
def test_binary_predictive_against_quadrature(monkeypatch):
    """z₁ − z₀ is Normal: the predictive is a one-dimensional integral of the sigmoid."""
    default = vbll._NOISE_POINTS
    monkeypatch.setattr(vbll, "_NOISE_POINTS", 512)  # so that only the weight draws are random
    head = categorical_head(2, noise=0.8)
    features = torch.randn(5, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    with torch.no_grad():
        phi = add_constant(features)
        mean = phi @ head.mean.T
        total = head.variance(phi) + head.noise_variance()
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)
        d = mean[:, 1] - mean[:, 0]
        s = total.sum(-1).sqrt()
        z = torch.tensor(nodes)[:, None] * s + d
        expected = (torch.tensor(weights / weights.sum())[:, None] * torch.sigmoid(z)).sum(0)
        dist = head.predictive(features, 4000, torch.Generator().manual_seed(7))
        per_draw = dist.draws.probs[..., 1]
    # 5 standard errors of the outer average over weight draws.
    error = 5 * per_draw.std(0) / np.sqrt(4000)
    assert ((dist.probs[:, 1] - expected).abs() < error).all()
    assert (error < 0.03).all()
    monkeypatch.setattr(vbll, "_NOISE_POINTS", default)
    coarse = head.predictive(features, 4000, torch.Generator().manual_seed(7))
    assert (coarse.probs - dist.probs).abs().max() < 5 * 0.006  # rms stated at σ = 0.8


def test_logit_noise_is_not_epistemic():
    """Without weight uncertainty the mutual information is 0, however large the noise."""
    head = categorical_head(3, noise=2.0, spread=0.0)
    with torch.no_grad():
        head.log_diagonal.fill_(-40.0)
        dist = head.predictive(torch.randn(6, D, dtype=torch.float64), 32)
    assert dist.epistemic.max() < 1e-12
    assert dist.aleatoric.min() > 0.1


def test_gradients_reach_the_features_through_mean_and_variance():
    head = categorical_head(3)
    y = torch.tensor([0, 2])
    features = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: head.expected_nll(f, y), features)
    regression = normal_head(2)
    targets = torch.randn(2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: regression.expected_nll(f, targets), features)
    with torch.no_grad():
        head.mean.zero_()
    (gradient,) = torch.autograd.grad(head.expected_nll(features, y).sum(), features)
    assert gradient.abs().max() > 1e-3  # through the variance alone


def test_noise_prior_is_the_inverse_wishart():
    """ln p(Σ) for diagonal Σ, up to a constant, against SciPy."""
    from scipy.stats import invwishart

    head = normal_head(2, wishart_scale=0.7)
    values = []
    for log_noise in ([-1.0, 0.2], [0.3, -0.4]):
        with torch.no_grad():
            head.log_noise.copy_(torch.tensor(log_noise, dtype=torch.float64))
        sigma = np.diag(np.exp(2 * np.array(log_noise)))
        # SciPy wants df >= dimension; ours is 1, so the difference is put in by hand.
        reference = invwishart(df=2, scale=0.7 * np.eye(2)).logpdf(sigma)
        reference += 0.5 * np.linalg.slogdet(sigma)[1]
        values.append(float(head.noise_log_prior().detach()) - reference)
    assert values[0] == pytest.approx(values[1], abs=1e-10)


def test_thompson_draws_have_the_predictive_moments():
    head = normal_head(2)
    features = torch.randn(3, D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    with torch.no_grad():
        f = head.functions(features, 50_000, torch.Generator().manual_seed(9))
        dist = head.predictive(features, 1)
    error = 5 * (dist.epistemic / 50_000).sqrt()
    assert ((f.mean(0) - dist.mean).abs() < error).all()
    relative = 5 * np.sqrt(2 / 50_000)
    torch.testing.assert_close(f.var(0), dist.epistemic, rtol=relative, atol=0)
    assert Normal(dist.mean, dist.stddev).log_prob(dist.mean).isfinite().all()

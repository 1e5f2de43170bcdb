"""VBLL heads for real targets against exact answers: evidence, GP, MVN algebra, quadrature."""

import gpytorch
import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Gamma, MultivariateNormal, Normal, kl_divergence

from uq.distributions import NormalMixture
from uq.errors import DataError, ParameterError
from uq.nn import (
    VBLLHeteroscedasticRegression,
    VBLLRegression,
    VBLLStudentTRegression,
)
from uq.nn.vbll import add_constant
from uq.nn.vbll_weights import COVARIANCES, gaussian_weights

N, D = 60, 4


def regression_data(k=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(N, D, generator=g, dtype=torch.float64)
    y = features @ torch.randn(D, k, generator=g, dtype=torch.float64) + 0.7
    return features, y + 0.3 * torch.randn(N, k, generator=g, dtype=torch.float64)


def normal_head(k=1, covariance="dense", wishart_scale=0.1):
    torch.manual_seed(0)
    head = VBLLRegression(
        D, k, covariance=covariance, rank=2, prior_variance=0.8, wishart_scale=wishart_scale
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
        regularizer = head.weights.kl(head.prior_variance) if fixed_noise else head.regularizer()
        loss = head.expected_nll(features, y).mean() + regularizer / n
        loss.backward()
        return loss

    opt.step(closure)
    with torch.no_grad():
        return float(
            head.expected_nll(features, y).mean() + head.weights.kl(head.prior_variance) / n
        )


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
    torch.testing.assert_close(head.weights.mean.detach().T, mean, rtol=0, atol=1e-5)
    covariances = head.weights.covariances().detach()
    torch.testing.assert_close(covariances[0], torch.linalg.inv(precision), rtol=1e-3, atol=1e-6)


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
        (2 * head.weights.log_diagonal[0]).exp().detach(),
        1 / precision.diagonal(),
        rtol=1e-5,
        atol=0,
    )
    torch.testing.assert_close(head.weights.mean.detach().T, mean, rtol=0, atol=1e-5)
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
        squares = ((y - phi @ head.weights.mean.T).square() + head.weights.variance(phi)).sum(0)
        expected = (squares + 0.3) / (N + 1 + k + 1)
        torch.testing.assert_close(head.noise_variance(), expected, rtol=1e-5, atol=0)


def copy_output(source, target, k):
    """Give a head of one output what output ``k`` of another has."""
    state = {
        name: value if value.ndim == 0 else value[k : k + 1]
        for name, value in source.state_dict().items()
    }
    target.load_state_dict(state)


def shaken(head, seed=2, size=0.3):
    """The same head away from where it starts."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(size * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return head


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize(
    "kind", [VBLLRegression, VBLLStudentTRegression, VBLLHeteroscedasticRegression]
)
def test_outputs_add_up(kind, covariance):
    """K outputs lose what K heads of one output lose together (noise prior of Σ aside)."""
    features, y = regression_data(3)
    head = shaken(kind(D, 3, covariance=covariance).double())

    def loss(head, y):
        total = head.loss(features, y, N)
        if kind is VBLLRegression:  # the dimension of the Wishart is that of Σ
            total = total + head.noise_log_prior() / N
        return total

    parts = 0.0
    for k in range(3):
        one = kind(D, 1, covariance=covariance).double()
        copy_output(head, one, k)
        parts += loss(one, y[:, k])
    torch.testing.assert_close(loss(head, y), parts, rtol=1e-12, atol=0)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("k", [1, 3])
def test_covariance_algebra(covariance, k):
    """φᵀSφ, ln|S|, tr S, KL and draws against an explicit multivariate normal."""
    weights = shaken(gaussian_weights(k, D, covariance, rank=2).double(), 3, 0.4)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        covariances = weights.covariances()
        if covariance == "diagonal":
            expected = torch.diag_embed((2 * weights.log_diagonal).exp())
        elif covariance == "lowrank":
            u = weights.off_diagonal
            expected = torch.diag_embed((2 * weights.log_diagonal).exp()) + u @ u.mT
        else:
            lower = torch.tril(weights.off_diagonal, -1)
            lower = lower + torch.diag_embed(weights.log_diagonal.exp())
            expected = lower @ lower.mT
            if covariance == "dense_precision":
                expected = torch.linalg.inv(expected)
        torch.testing.assert_close(covariances, expected, rtol=1e-9, atol=1e-12)
        for n in (1, 5):
            phi = torch.randn(n, D, generator=g, dtype=torch.float64)
            explicit = torch.einsum("bd,kde,be->bk", phi, covariances, phi)
            torch.testing.assert_close(weights.variance(phi), explicit, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(weights.log_det(), torch.logdet(covariances))
        traces = covariances.diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(weights.trace(), traces)
        q = MultivariateNormal(weights.mean, covariances)
        s = torch.tensor(0.8).double()
        prior = MultivariateNormal(torch.zeros(D).double(), s * torch.eye(D).double())
        torch.testing.assert_close(weights.kl(s), kl_divergence(q, prior).sum(), rtol=1e-10, atol=0)
        # Scaled by a precision τ: q = N(m, S/τ), p = N(0, s/τ).
        tau = torch.linspace(0.5, 3, k).double()
        q = MultivariateNormal(weights.mean, covariances / tau[:, None, None])
        wide = (s / tau)[:, None, None] * torch.eye(D).double()
        prior = MultivariateNormal(torch.zeros(k, D).double(), wide)
        torch.testing.assert_close(
            weights.kl(s, tau), kl_divergence(q, prior).sum(), rtol=1e-10, atol=0
        )
        draws = weights.sample(40_000, g)
        sizes = covariances.diagonal(dim1=-2, dim2=-1)
        assert ((draws.mean(0) - weights.mean).abs() < 5 * (sizes / 40_000).sqrt()).all()
        centred = draws - draws.mean(0)
        empirical = torch.einsum("nkd,nke->kde", centred, centred) / 40_000
        spread = (sizes[:, :, None] * sizes[:, None, :] + covariances.square()) / 40_000
        assert ((empirical - covariances).abs() < 5 * spread.sqrt()).all()


def test_parametrisations_of_one_posterior_agree():
    """The same q(W), in each parametrisation that can hold it, gives the same loss."""
    features, y = regression_data(2)
    g = torch.Generator().manual_seed(7)
    root = torch.randn(2, D + 1, D + 1, generator=g, dtype=torch.float64)
    diagonal = torch.diag_embed(1 + torch.rand(2, D + 1, generator=g, dtype=torch.float64))
    for precision_root, kinds in (
        (root, ("dense", "dense_precision")),
        (diagonal, ("dense", "dense_precision", "diagonal")),
    ):
        losses = []
        for covariance in kinds:
            head = normal_head(2, covariance)
            head.weights.set_precision(precision_root)
            losses.append(head.loss(features, y, 500).detach())
            again = head.weights.precision_root()
            torch.testing.assert_close(
                again.mT @ again, precision_root.mT @ precision_root, rtol=1e-9, atol=1e-9
            )
        for loss in losses[1:]:
            torch.testing.assert_close(loss, losses[0], rtol=1e-9, atol=0)
    lowrank = VBLLRegression(D, 2, covariance="lowrank", rank=D + 1, prior_variance=0.8).double()
    dense = normal_head(2)
    with torch.no_grad():
        lowrank.weights.mean.copy_(dense.weights.mean)
        lowrank.weights.log_diagonal.fill_(-1.0)
        lowrank.weights.off_diagonal.copy_(0.3 * root)
        covariances = lowrank.weights.covariances()
        dense.weights.set_precision(torch.linalg.inv(torch.linalg.cholesky(covariances)))
        torch.testing.assert_close(
            lowrank.loss(features, y), dense.loss(features, y), rtol=1e-9, atol=0
        )


def test_temperature_scales_the_likelihood():
    """Weight c/N gives the exact posterior under the likelihood to the power 1/c."""
    features, y = regression_data()
    head = normal_head()
    sigma2, c = float(head.noise_variance().detach()), 4.0
    optimise(head, features, y, N / c, fixed_noise=True)
    _, _, mean = exact(features, y, sigma2 * c, 0.8)
    torch.testing.assert_close(head.weights.mean.detach().T, mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize(
    "kind", [VBLLRegression, VBLLStudentTRegression, VBLLHeteroscedasticRegression]
)
def test_gradients_of_features_and_parameters(kind, covariance):
    head = shaken(kind(D, 2, covariance=covariance).double())
    g = torch.Generator().manual_seed(3)
    features = torch.randn(3, D, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 2, generator=g, dtype=torch.float64)

    def loss(features, *parameters):
        return head.loss(features, y, 10)

    assert torch.autograd.gradcheck(loss, (features, *head.parameters()), fast_mode=True)
    with torch.no_grad():  # through the variance alone: the mean is flat and without residual
        head.weights.mean.zero_()
    (gradient,) = torch.autograd.grad(head.expected_nll(features, 0 * y).sum(), features)
    assert gradient.abs().max() > 1e-3


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


# -- Student t -----------------------------------------------------------------------------------


def student_head(covariance="dense", k=1):
    head = VBLLStudentTRegression(
        D, k, covariance=covariance, prior_variance=0.7, noise_shape=1.5, noise_rate=0.2
    )
    return head.double()


def log_evidence(phi, y):
    """Normal-inverse-gamma marginal: a multivariate Student t."""
    shape = 0.2 / 1.5 * (torch.eye(len(phi)).double() + 0.7 * phi @ phi.T)
    return stats.multivariate_t(np.zeros(len(phi)), shape.numpy(), df=3.0).logpdf(y.numpy())


@pytest.mark.parametrize("covariance", ["dense", "dense_precision"])
def test_student_loss_is_the_evidence_and_its_predictive_the_conditional(covariance):
    features, y = regression_data()
    head = student_head(covariance)
    statistics = head.statistics()
    statistics.add(features, y)
    head.fit_statistics(statistics)
    phi = add_constant(features)
    evidence = log_evidence(phi, y[:, 0])
    assert -N * float(head.loss(features, y).detach()) == pytest.approx(evidence, rel=1e-10)
    assert float(head.gamma()[0].detach()) == pytest.approx(1.5 + N / 2)
    # No parameter has a slope there: it is the maximum, not merely a point with the right value.
    head.loss(features, y).backward()
    slopes = [p.grad.abs().max() for p in head.parameters()]
    assert max(slopes) < 1e-9
    new = torch.randn(3, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.tensor([0.2, -1.0, 4.0]).double()
    log_prob = head.predictive(new).log_prob(target[:, None])[:, 0].detach()
    for i in range(3):
        joint = log_evidence(
            torch.cat([phi, add_constant(new[i : i + 1])]), torch.cat([y[:, 0], target[i : i + 1]])
        )
        assert float(log_prob[i]) == pytest.approx(joint - evidence, rel=1e-8)


def test_student_training_finds_the_closed_form():
    features, y = regression_data()
    trained, solved = student_head(), student_head()
    statistics = solved.statistics()
    statistics.add(features, y)
    solved.fit_statistics(statistics)
    opt = torch.optim.LBFGS(
        trained.parameters(), max_iter=3000, tolerance_grad=1e-11, line_search_fn="strong_wolfe"
    )

    def closure():
        opt.zero_grad()
        loss = trained.loss(features, y)
        loss.backward()
        return loss

    opt.step(closure)
    for (name, p), (_, q) in zip(
        trained.named_parameters(), solved.named_parameters(), strict=True
    ):
        if "off_diagonal" not in name:
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


def test_student_terms_against_torch_and_quadrature():
    head = shaken(student_head(k=2))
    a, b = (t.detach() for t in head.gamma())
    prior = Gamma(*torch.tensor([1.5, 0.2], dtype=torch.float64))
    kl = kl_divergence(Gamma(a, b), prior).sum()
    weights = head.weights.kl(head.prior_variance, a / b)
    torch.testing.assert_close(head.regularizer(), kl + weights, rtol=1e-12, atol=0)
    # E_q[−ln N(y; f, 1/τ)], f | τ ~ N(m, v/τ): on a grid of τ quantiles and Hermite nodes of f.
    features = torch.tensor([[0.3, -1.0, 0.5, 2.0]]).double()
    y = torch.tensor([[0.4, -0.6]]).double()
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(8)
    levels = (np.arange(200_000) + 0.5) / 200_000
    with torch.no_grad():
        phi = add_constant(features)
        mean, v = (phi @ head.weights.mean.mT)[0], head.weights.variance(phi)[0]
        expected = 0.0
        for k in range(2):
            tau = stats.gamma(float(a[k]), scale=1 / float(b[k])).ppf(levels)[:, None]
            f = float(mean[k]) + np.sqrt(float(v[k]) / tau) * nodes
            log_p = stats.norm(f, 1 / np.sqrt(tau)).logpdf(float(y[0, k]))
            expected -= (log_p @ node_weights / node_weights.sum()).mean()
        assert float(head.expected_nll(features, y)) == pytest.approx(expected, abs=1e-4)


def test_student_split_and_draws_have_the_predictive_moments():
    head = shaken(student_head(k=2))
    with torch.no_grad():
        head.log_shape.fill_(np.log(6.0))
    features = torch.randn(3, D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    with torch.no_grad():
        dist = head.predictive(features)
        a, b = head.gamma()
        v = head.weights.variance(add_constant(features))
        f = head.functions(features, 100_000, torch.Generator().manual_seed(9))
    torch.testing.assert_close(dist.aleatoric, (b / (a - 1)).expand(3, 2))
    torch.testing.assert_close(dist.epistemic, v * b / (a - 1))
    torch.testing.assert_close(dist.aleatoric + dist.epistemic, dist.variance)
    assert ((f.mean(0) - dist.mean).abs() < 5 * (dist.epistemic / 100_000).sqrt()).all()
    # Functions are Student t with 12 degrees of freedom: kurtosis 3 + 6/8.
    relative = 5 * np.sqrt((3.75 - 1) / 100_000)
    torch.testing.assert_close(f.var(0), dist.epistemic, rtol=relative, atol=0)
    scaled = dist.affine(3.0, 2.0)
    torch.testing.assert_close(scaled.epistemic, 4 * dist.epistemic)
    torch.testing.assert_close(scaled.mean, 3 + 2 * dist.mean)
    assert scaled.joint().log_prob(scaled.mean).shape == (3,)


# -- heteroscedastic -----------------------------------------------------------------------------


def test_heteroscedastic_expected_nll_against_quadrature():
    """E over f ~ N(m, v) and ln σ² ~ N(μ, s²) of −ln N(y; f, σ²)."""
    head = shaken(VBLLHeteroscedasticRegression(D, 2).double(), size=0.4)
    features = torch.randn(4, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.randn(4, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    nodes, w = np.polynomial.hermite_e.hermegauss(60)
    w = w / w.sum()
    with torch.no_grad():
        phi = add_constant(features)
        mean, v = phi @ head.weights.mean.mT, head.weights.variance(phi)
        log_mean, log_spread = head.log_variance(phi)
        f = mean[..., None, None] + v.sqrt()[..., None, None] * torch.tensor(nodes)[:, None]
        t = log_mean[..., None, None] + log_spread.sqrt()[..., None, None] * torch.tensor(nodes)
        log_p = Normal(f, (0.5 * t).exp()).log_prob(y[..., None, None])
        expected = -(log_p * torch.tensor(w)[:, None] * torch.tensor(w)).sum((-1, -2)).sum(-1)
        torch.testing.assert_close(head.expected_nll(features, y), expected, rtol=1e-9, atol=0)
    constant = head.log_variance_offset
    assert constant == pytest.approx(2 * np.log(0.5))


def test_heteroscedastic_without_noise_weights_is_homoscedastic():
    features, y = regression_data(2)
    head = shaken(VBLLHeteroscedasticRegression(D, 2).double())
    plain = VBLLRegression(D, 2).double()
    with torch.no_grad():
        head.noise_weights.mean.zero_()
        head.noise_weights.mean[:, -1] = torch.tensor([0.4, -1.0], dtype=torch.float64)
        head.noise_weights.off_diagonal.zero_()
        head.noise_weights.log_diagonal.fill_(-30.0)
        plain.weights.load_state_dict(head.weights.state_dict())
        plain.log_noise.copy_(np.log(0.5) + torch.tensor([0.2, -0.5], dtype=torch.float64))
        torch.testing.assert_close(
            head.expected_nll(features, y), plain.expected_nll(features, y), rtol=1e-10, atol=0
        )
        a, b = head.predictive(features, 8), plain.predictive(features)
    assert isinstance(a, NormalMixture)
    torch.testing.assert_close(a.aleatoric, b.aleatoric)
    torch.testing.assert_close(a.epistemic, b.epistemic)


def test_heteroscedastic_learns_where_the_noise_is():
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(2000, 1, generator=g) - 1
    scale = (x - 1).exp()  # from 0.14 to 1
    y = x + scale * torch.randn(x.shape, generator=g)
    head = VBLLHeteroscedasticRegression(1)
    opt = torch.optim.Adam(head.parameters(), 0.03)
    for _ in range(400):
        opt.zero_grad()
        head.loss(x, y).backward()
        opt.step()
    at = torch.tensor([[-0.8], [0.8]])
    with torch.no_grad():
        sigma = head.predictive(at, 64, torch.Generator().manual_seed(1)).aleatoric.sqrt()
    # ln σ is fitted by 2 weights to 2,000 rows: standard errors about 2 √(2/2000)/2 = 3 %.
    torch.testing.assert_close(sigma[:, 0], (at[:, 0] - 1).exp().double(), rtol=0.12, atol=0)


# -- use and misuse ------------------------------------------------------------------------------


def test_batch_losses_average_to_the_loss_of_all_rows():
    features, y = regression_data()
    head = shaken(normal_head())
    whole = head.loss(features, y)
    parts = [
        head.loss(f, t, n_rows=N) for f, t in zip(features.split(15), y.split(15), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)
    weight = torch.ones(N).double()
    weight[:10], weight[10:20] = 2.0, 0.0
    rows = torch.cat([features[:10], features[:10], features[20:]])
    repeated = head.loss(rows, torch.cat([y[:10], y[:10], y[20:]]))
    torch.testing.assert_close(head.loss(features, y, N, weight), repeated, rtol=1e-12, atol=0)
    with pytest.raises(DataError, match=rf"weight must have shape \({N},\)"):
        head.loss(features, y, N, weight[:, None])  # would broadcast to (N, N)
    with pytest.raises(ParameterError, match="n_rows must be > 0"):
        head.loss(features, y, 0)


@pytest.mark.parametrize(
    "kind", [VBLLRegression, VBLLStudentTRegression, VBLLHeteroscedasticRegression]
)
def test_half_precision(kind):
    """Features may be half and under autocast: the head computes in its own precision."""
    torch.manual_seed(0)
    head, features, y = kind(16, 1), torch.randn(50, 16).bfloat16(), torch.randn(50, 1)
    expected = head.loss(features.float(), y)
    assert head.loss(features, y).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head.loss(features, y)
        assert head.predictive(features).mean.dtype == torch.float64
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ParameterError, match=r"too coarse.*\.float\(\)"):
            kind(16, 1).to(dtype).loss(features, y)


def test_arguments_and_shapes_are_named():
    head = VBLLRegression(4, 2)
    with pytest.raises(DataError, match=r"features must have shape \(n, 4\)"):
        head.loss(torch.zeros(3, 5), torch.zeros(3, 2))
    with pytest.raises(DataError, match=r"y must have shape \(3, 2\)"):
        head.loss(torch.zeros(3, 4), torch.zeros(3))  # would broadcast
    with pytest.raises(DataError, match=r"y must have shape \(3, 1\)"):
        VBLLRegression(4).loss(torch.zeros(3, 4), torch.zeros(1, 3))
    assert VBLLRegression(4).expected_nll(torch.zeros(3, 4), torch.zeros(3)).shape == (3,)
    for name, bad in (("covariance", "full"), ("prior_variance", 0.0), ("noise_scale", -1.0)):
        with pytest.raises(ParameterError, match=name):
            VBLLRegression(4, **{name: bad})
    with pytest.raises(ParameterError, match="n_features"):
        VBLLRegression(0)
    with pytest.raises(ParameterError, match="use 'diagonal'"):
        VBLLRegression(20_000)
    with pytest.raises(ParameterError, match="no closed form"):
        VBLLHeteroscedasticRegression(4).statistics()


def test_constant_targets_train_to_little_noise():
    torch.manual_seed(0)
    head, features = VBLLRegression(6), torch.randn(40, 6)
    opt = torch.optim.Adam(head.parameters(), 0.02)
    for _ in range(500):
        opt.zero_grad()
        loss = head.loss(features, torch.zeros(40, 1))
        loss.backward()
        opt.step()
    assert loss.isfinite()
    # The noise cannot fall below where its prior holds it: V/(N + ν + K + 1).
    assert float(head.noise_variance().detach()) > 0.1 / 43
    assert float(head.noise_variance().detach()) < 0.05

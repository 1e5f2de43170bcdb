"""Gaussian processes against scikit-learn, GPyTorch, each other and their own equations."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel
from torch import nn

from uq import GPClassifier, GPRegressor
from uq.errors import ParameterError
from uq.inference.gp import GPPosterior
from uq.nn.gp import KERNELS, ExactGP, VariationalClassification, VariationalRegression

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3))
Y = np.stack([np.sin(2 * X[:, 0]) + 0.1 * RNG.normal(size=40), X[:, 1] ** 2], 1)
NEW = RNG.normal(size=(9, 3))
LENGTHS, SCALES, NOISES = np.array([[0.7, 1.1, 2.0], [1.5, 0.4, 0.9]]), [1.3, 0.6], [0.05, 0.2]


def set_parameters(process):
    process.kernel.base_kernel.lengthscale = torch.tensor(LENGTHS)[:, None]
    process.kernel.outputscale = torch.tensor(SCALES, dtype=torch.float64)
    process.log_noise.data = (torch.tensor(NOISES, dtype=torch.float64) - 1e-6).log()
    return process


def sklearn_process(kernel, j):
    base = RBF(LENGTHS[j]) if kernel == "rbf" else Matern(LENGTHS[j], nu=int(kernel[-2]) / 2)
    # 1e-8 of the scale is the jitter, which is not part of the noise that is predicted.
    process = GaussianProcessRegressor(
        ConstantKernel(SCALES[j]) * base + WhiteKernel(NOISES[j]),
        alpha=1e-8 * SCALES[j],
        optimizer=None,
    )
    return process.fit(X, Y[:, j])


@pytest.mark.parametrize("kernel", KERNELS)
def test_exact_process_is_that_of_scikit_learn(kernel):
    process = set_parameters(ExactGP(kernel, 3, 2, len(X)))
    x, y = torch.tensor(X), torch.tensor(Y)
    process.condition(x, y)
    dist = GPPosterior(nn.Identity(), process)(torch.tensor(NEW))
    peers = [sklearn_process(kernel, j) for j in range(2)]
    for j, peer in enumerate(peers):
        mean, std = peer.predict(NEW, return_std=True)
        # GPyTorch's Matérn floors distances, at 1e-15 of a square: about 1e-7 near the diagonal.
        np.testing.assert_allclose(dist.mean[:, j], mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(dist.stddev[:, j], std, rtol=1e-6)
        np.testing.assert_allclose(dist.aleatoric[:, j], NOISES[j], rtol=1e-9)
    expected = -sum(peer.log_marginal_likelihood_value_ for peer in peers)
    assert float(process.loss(x, y).detach()) == pytest.approx(expected, rel=1e-6)


def test_fitted_marginal_likelihood_reaches_scikit_learns_optimum():
    model = GPRegressor(kernel="rbf").fit(X, Y[:, 0])
    z = (X - model.x_mean_) / model.x_scale_
    t = (Y[:, 0] - model.y_mean_) / model.y_scale_
    start = ConstantKernel(1.0) * RBF([1.7] * 3) + WhiteKernel(0.3)
    peer = GaussianProcessRegressor(start, n_restarts_optimizer=0, random_state=0).fit(z, t)
    ours = -40 * model.history_["train_loss"][-1]
    assert ours > peer.log_marginal_likelihood_value_ - 0.1
    np.testing.assert_allclose(
        model.predict(NEW),
        model.y_mean_ + model.y_scale_ * peer.predict((NEW - model.x_mean_) / model.x_scale_),
        atol=0.03,
    )


def test_marginal_likelihood_of_weights_is_that_of_repeated_rows():
    process = set_parameters(ExactGP("matern32", 3, 2, 40))
    x, y = torch.tensor(X), torch.tensor(Y)
    counts = torch.arange(40) % 3 + 1
    repeated = x.repeat_interleave(counts, 0), y.repeat_interleave(counts, 0)
    weighted = process.loss(x, y, counts.double())
    # Through the jitter: on the repeated rows it counts 1/w as much.
    torch.testing.assert_close(weighted, process.loss(*repeated), rtol=1e-6, atol=0)
    process.condition(x, y, counts.double())
    moments = process.moments(torch.tensor(NEW))
    process.condition(*repeated)
    torch.testing.assert_close(moments, process.moments(torch.tensor(NEW)), rtol=1e-5, atol=1e-7)


def optimal_variational(x, y, anchors):
    """Put q at its optimum for Normal noise: M = I + AA'/σ², S S' = M⁻¹, m = M⁻¹ A y/σ²."""
    process = set_parameters(VariationalRegression("matern52", 3, 2, len(anchors)))
    process.anchors.data = anchors
    with torch.no_grad():
        a = torch.linalg.solve_triangular(
            process._factor(), process.covariance(anchors, x), upper=False
        )
        noise = process.noise[:, None, None]
        precision = torch.eye(len(anchors), dtype=torch.float64) + a @ a.mT / noise
        cov = torch.linalg.inv(precision)
        process.mean.copy_((cov @ a @ y.mT[..., None])[..., 0] / noise[..., 0])
        factor = torch.linalg.cholesky(0.5 * (cov + cov.mT))
        raw = factor.tril(-1) + torch.diag_embed(factor.diagonal(0, -2, -1).log())
        process.raw_tril.copy_(raw)
    return process


def test_variational_process_with_all_rows_as_inducing_points_is_the_exact_one():
    x, y = torch.tensor(X), torch.tensor(Y)
    process = optimal_variational(x, y, x)
    exact = set_parameters(ExactGP("matern52", 3, 2, 40))
    exact.condition(x, y)
    for ours, expected in zip(
        process.moments(torch.tensor(NEW)), exact.moments(torch.tensor(NEW)), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    # There the bound is the evidence.
    assert 40 * float(process.loss(x, y, 40).detach()) == pytest.approx(
        float(exact.loss(x, y).detach()), rel=1e-5
    )


def test_bound_at_its_optimum_is_that_of_titsias():
    x, y = torch.tensor(X), torch.tensor(Y)
    process = optimal_variational(x, y, x[:10].clone())
    bound = 0.0
    with torch.no_grad():
        a = torch.linalg.solve_triangular(
            process._factor(), process.covariance(process.anchors, x), upper=False
        )
        q = a.mT @ a
        for j in range(2):
            marginal = torch.distributions.MultivariateNormal(
                torch.zeros(40, dtype=torch.float64),
                q[j] + NOISES[j] * torch.eye(40, dtype=torch.float64),
            )
            trace = (SCALES[j] - q[j].diagonal()).sum()
            bound += float(marginal.log_prob(y[:, j]) - 0.5 * trace / NOISES[j])
    assert -40 * float(process.loss(x, y, 40).detach()) == pytest.approx(bound, rel=1e-8)
    # Adam from there finds nothing better, with q alone.
    process.mean.requires_grad_(True)
    gradient = torch.autograd.grad(process.loss(x, y, 40), (process.mean, process.raw_tril))
    assert max(float(g.abs().max()) for g in gradient) < 1e-8


def test_moments_are_those_of_gpytorch():
    from gpytorch.distributions import MultivariateNormal
    from gpytorch.models import ApproximateGP
    from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy

    process = VariationalRegression("rbf", 3, 1, 7)
    process.anchors.data = torch.tensor(X[:7])
    process.mean.data.normal_()
    process.raw_tril.data = 0.3 * torch.randn(1, 7, 7, dtype=torch.float64)

    class Peer(ApproximateGP):
        def __init__(self):
            q = CholeskyVariationalDistribution(7)
            strategy = VariationalStrategy(self, torch.tensor(X[:7]), q, jitter_val=1e-6)
            super().__init__(strategy)

        def forward(self, x):
            cov = process.covariance(x, x)[0]
            return MultivariateNormal(torch.zeros(len(x), dtype=x.dtype), cov)

    peer = Peer().double()
    q = peer.variational_strategy._variational_distribution
    q.variational_mean.data = process.mean.data[0]
    q.chol_variational_covar.data = process._tril.data[0]
    peer.variational_strategy.variational_params_initialized.fill_(1)
    peer.eval()
    with torch.no_grad():
        expected = peer(torch.tensor(NEW))
        mean, variance = process.moments(torch.tensor(NEW))
    torch.testing.assert_close(mean[0], expected.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance[0], expected.variance, rtol=1e-4, atol=1e-5)
    kl = peer.variational_strategy.kl_divergence()
    torch.testing.assert_close(process.kl(), kl.double(), rtol=1e-9, atol=0, check_dtype=False)


@pytest.mark.statistical
@pytest.mark.parametrize("kernel", ["rbf", "matern32"])
@pytest.mark.parametrize("exact", [True, False])
def test_function_draws_have_the_process_moments(kernel, exact):
    x, y, new = torch.tensor(X), torch.tensor(Y), torch.tensor(NEW)
    process = set_parameters((ExactGP if exact else VariationalRegression)(kernel, 3, 2, 40))
    if exact:
        process.condition(x, y)
    else:
        process.anchors.data = x
        process.mean.data.normal_()
        process.raw_tril.data -= torch.eye(40) * 0.7
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.cat([process.draw(new, 50, generator) for _ in range(40)])
        mean, variance = process.moments(new)
    assert draws.shape == (2000, 9, 2)
    # Five standard errors of 2,000 draws; beside them the 2,048 Fourier features, new for each 50
    # draws: √(2/2048/40) of the scale.
    error = 5 * (variance.mT / 2000).sqrt() + 0.02
    assert ((draws.mean(0) - mean.mT).abs() < error).all()
    assert ((draws.var(0) - variance.mT).abs() < 5 * variance.mT * (2 / 2000) ** 0.5 + 0.03).all()


@pytest.mark.statistical
def test_expected_softmax_is_that_of_many_draws():
    process = VariationalClassification("rbf", 2, 3, 4)
    mean, variance = torch.randn(3, 5).double(), torch.rand(3, 5).double()
    y = torch.tensor([0, 1, 2, 0, 1])
    ours = torch.stack([process.expected_nll(mean, variance, y) for _ in range(2000)])
    f = mean + variance.sqrt() * torch.randn(100_000, 3, 5, dtype=torch.float64)
    nll = f.logsumexp(1) - f.gather(1, y.expand(len(f), 1, -1))[:, 0]
    error = 5 * (ours.var(0) / 2000 + nll.var(0) / 100_000).sqrt()
    assert ((ours.mean(0) - nll.mean(0)).abs() < error).all()


def test_classifier_learns_two_moons_and_doubts_far_away():
    points, labels = make_moons(200, noise=0.15, random_state=0)
    model = GPClassifier(n_inducing=40, max_epochs=150, random_state=0).fit(points, labels)
    assert model.score(points, labels) > 0.97
    dist = model.predict_distribution(np.array([[0.0, 1.0], [8.0, 8.0]]))
    assert dist.epistemic[1] > 5 * dist.epistemic[0]


def test_beyond_max_exact_rows_the_process_is_variational():
    exact = GPRegressor().fit(X, Y[:, 0])
    model = GPRegressor(max_exact=39, n_inducing=40, max_epochs=400, random_state=0)
    model.fit(X, Y[:, 0])
    assert exact.exact_
    assert not model.exact_
    # The same model, and nearly as many inducing points as rows: much the same functions.
    gap = np.abs(model.predict(NEW) - exact.predict(NEW)).max()
    assert gap < 0.25 * Y[:, 0].std()


@pytest.mark.parametrize(
    ("name", "value"),
    [("kernel", "linear"), ("n_inducing", 0), ("max_exact", -1), ("precision", "bf16-mixed")],
)
def test_bad_arguments(name, value):
    with pytest.raises(ParameterError, match=name):
        GPRegressor(**{name: value}).fit(X, Y)


@pytest.mark.parametrize(("n_batches", "epochs"), [(1, 500), (4, 500), (10, 200), (1000, 20)])
def test_variational_runs_take_2000_steps_within_20_to_500_epochs(n_batches, epochs):
    model = GPClassifier()
    model.exact_ = False
    assert model._n_epochs(SimpleNamespace(batches=range(n_batches))) == epochs
    assert GPClassifier(max_epochs=7)._n_epochs(SimpleNamespace(batches=range(3))) == 7

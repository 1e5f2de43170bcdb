"""VBLL heads for classes against quadrature, Monte Carlo, discriminant analysis, conjugacy."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import gammaln, logsumexp
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.distributions import Dirichlet, MultivariateNormal, Normal, kl_divergence
from torch.nn import functional as F

from uq.errors import DataError, NoEpistemicError, ParameterError
from uq.nn import (
    VBLLClassification,
    VBLLGenerativeClassification,
    VBLLHeteroscedasticClassification,
    vbll_classification,
)
from uq.nn.vbll import add_constant
from uq.nn.vbll_classification import jensen_bound, knowles_minka_bound

D = 4
SOFTMAX = [VBLLClassification, VBLLHeteroscedasticClassification]


def hermite(n):
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return nodes, weights / weights.sum()


def expected_logsumexp(mean, variance, n=48):
    """E logsumexp(z), z_k ~ N(μ_k, u_k), by a product of Gauss-Hermite rules."""
    nodes, weights = hermite(n)
    grids = np.meshgrid(*[m + np.sqrt(u) * nodes for m, u in zip(mean, variance, strict=True)])
    w = np.meshgrid(*[weights] * len(mean))
    return float((logsumexp(np.stack(grids), 0) * np.prod(np.stack(w), 0)).sum())


def random_logits(k, size, n=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(n, k, generator=g, dtype=torch.float64)
    return mean, size * torch.rand(n, k, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0])
def test_bounds_are_bounds(k, size):
    mean, variance = random_logits(k, size)
    truth = torch.tensor(
        [expected_logsumexp(m, u) for m, u in zip(mean.numpy(), variance.numpy(), strict=True)]
    )
    jensen, tilted = jensen_bound(mean, variance), knowles_minka_bound(mean, variance)
    assert (tilted >= truth - 1e-6).all()  # the rule's error at size 10
    assert (jensen >= tilted - 1e-12).all()
    # How much is lost: Jensen's gap grows like the variance, the tilted one stays well below it.
    gap, smaller = (jensen - truth).mean(), (tilted - truth).mean()
    if size == 1e-3:
        assert gap < 1e-3
    else:
        assert smaller < 0.75 * gap


def test_knowles_minka_finds_the_best_alpha():
    """Against a general optimiser of the published bound in a."""
    mean, variance = random_logits(5, 6.0)
    found = knowles_minka_bound(mean, variance).numpy()

    def published(a, m, u):
        return logsumexp(m + (0.5 - a) * u) + 0.5 * (a**2 * u).sum()

    best = [
        minimize(published, np.full(5, 0.2), (m, u), tol=1e-10).fun
        for m, u in zip(mean.numpy(), variance.numpy(), strict=True)
    ]
    assert (found >= np.array(best) - 1e-9).all()
    np.testing.assert_allclose(found, best, atol=0.02)


def test_knowles_minka_starts_at_jensen(monkeypatch):
    """a = 0, before the first step on α, is Jensen's bound; without variance both are exact."""
    mean, variance = random_logits(5, 6.0)
    tiny = 1e-12 * variance
    torch.testing.assert_close(knowles_minka_bound(mean, tiny), torch.logsumexp(mean, -1))
    monkeypatch.setattr(vbll_classification, "_KNOWLES_MINKA_STEPS", 0)
    torch.testing.assert_close(knowles_minka_bound(mean, variance), jensen_bound(mean, variance))


def test_bound_gradient_is_that_of_the_bound_at_its_alpha():
    """α is held fixed; at the optimum the gradient equals the total derivative."""
    mean, variance = random_logits(3, 2.0, n=4)
    mean.requires_grad_()
    variance.requires_grad_()
    exact = torch.autograd.grad(knowles_minka_bound(mean, variance).sum(), (mean, variance))
    eps = 1e-5
    for x, slope in zip((mean, variance), exact, strict=True):
        step = torch.zeros_like(x)
        step[1, 2] = eps
        up = [t + step if t is x else t for t in (mean, variance)]
        down = [t - step if t is x else t for t in (mean, variance)]
        numeric = (knowles_minka_bound(*up) - knowles_minka_bound(*down)).sum() / (2 * eps)
        assert float(slope[1, 2]) == pytest.approx(float(numeric.detach()), abs=1e-2)


def categorical_head(k, noise=0.4, spread=0.3, bound="jensen"):
    torch.manual_seed(1)
    head = VBLLClassification(D, k, prior_variance=1.0, noise_scale=noise, bound=bound).double()
    with torch.no_grad():
        head.weights.mean.normal_()
        head.weights.off_diagonal.normal_().mul_(spread)
    return head


@pytest.mark.statistical
@pytest.mark.parametrize("bound", ["jensen", "knowles_minka"])
@pytest.mark.parametrize("noise", [1e-4, 0.4, 1.5])
def test_loss_is_above_the_expected_nll(noise, bound):
    head = categorical_head(4, noise=noise, spread=1e-4 if noise == 1e-4 else 0.3, bound=bound)
    if noise == 1e-4:
        with torch.no_grad():
            head.weights.log_diagonal.fill_(np.log(1e-4))
    g = torch.Generator().manual_seed(5)
    features = torch.randn(6, D, generator=g, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        value = head.expected_nll(features, y)
        phi = add_constant(features)
        u = (head.weights.variance(phi) + head.noise_variance()).sqrt()
        mean = phi @ head.weights.mean.T
        z = mean + u * torch.randn(100_000, 6, 4, generator=g, dtype=torch.float64)
        nll = F.cross_entropy(z.reshape(-1, 4), y.repeat(100_000), reduction="none").view(-1, 6)
    error = nll.std(0) / np.sqrt(100_000)
    assert (value > nll.mean(0) - 5 * error).all()
    if noise == 1e-4:  # no variance: the bound is the cross entropy of the mean
        expected = F.cross_entropy(mean, y, reduction="none")
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_heteroscedastic_loss_is_above_the_expected_nll():
    """Two classes, so that E over both log variances and the logit difference is a sum."""
    torch.manual_seed(0)
    head = VBLLHeteroscedasticClassification(D, 2).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.4 * torch.randn_like(p))
        features = torch.randn(8, D, dtype=torch.float64)
        y = torch.arange(8) % 2
        phi = add_constant(features)
        mean, v = phi @ head.weights.mean.mT, head.weights.variance(phi)
        log_mean, log_spread = head.log_variance(phi)
        loss = head.expected_nll(features, y).numpy()
    nodes, w = hermite(40)
    truth = np.empty(8)
    for i in range(8):
        t = log_mean[i].numpy()[:, None] + np.sqrt(log_spread[i].numpy())[:, None] * nodes
        u = (v[i, 0] + v[i, 1]).item() + np.exp(t[0])[:, None] + np.exp(t[1])
        d = float(mean[i, 1] - mean[i, 0]) + np.sqrt(u)[..., None] * nodes
        softplus = (np.logaddexp(0, d) * w).sum(-1)  # logsumexp(z) − z_0
        truth[i] = (softplus * w[:, None] * w).sum()
        truth[i] += float(mean[i, 0] - mean[i, y[i]])
    assert (loss > truth).all()
    assert (loss < truth + 1.0).all()
    # Without uncertainty about the noise it is the discriminative head's bound.
    with torch.no_grad():
        head.noise_weights.mean.zero_()
        head.noise_weights.off_diagonal.zero_()
        head.noise_weights.log_diagonal.fill_(-30.0)
        plain = VBLLClassification(D, 2, bound="knowles_minka").double()
        plain.weights.load_state_dict(head.weights.state_dict())
        plain.log_noise.fill_(np.log(0.5))
        torch.testing.assert_close(
            head.expected_nll(features, y), plain.expected_nll(features, y), rtol=1e-9, atol=0
        )


@pytest.mark.statistical
def test_binary_predictive_against_quadrature(monkeypatch):
    """z₁ − z₀ is Normal: the predictive is a one-dimensional integral of the sigmoid."""
    default = vbll_classification._NOISE_POINTS
    monkeypatch.setattr(vbll_classification, "_NOISE_POINTS", 512)  # only weight draws are random
    head = categorical_head(2, noise=0.8)
    features = torch.randn(5, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    with torch.no_grad():
        phi = add_constant(features)
        mean = phi @ head.weights.mean.T
        total = head.weights.variance(phi) + head.noise_variance()
        nodes, weights = hermite(64)
        z = torch.tensor(nodes)[:, None] * total.sum(-1).sqrt() + mean[:, 1] - mean[:, 0]
        expected = (torch.tensor(weights)[:, None] * torch.sigmoid(z)).sum(0)
        dist = head.predictive(features, 4000, torch.Generator().manual_seed(7))
        per_draw = dist.draws.probs[..., 1]
        functions = head.functions(features, 4000, torch.Generator().manual_seed(7))
    # 5 standard errors of the outer average over weight draws.
    error = 5 * per_draw.std(0) / np.sqrt(4000)
    assert ((dist.probs[:, 1] - expected).abs() < error).all()
    assert (error < 0.03).all()
    torch.testing.assert_close(functions[..., 1], per_draw)
    monkeypatch.setattr(vbll_classification, "_NOISE_POINTS", default)
    with torch.no_grad():
        coarse = head.predictive(features, 4000, torch.Generator().manual_seed(7))
    assert (coarse.probs - dist.probs).abs().max() < 5 * 0.006  # rms stated at σ = 0.8


@pytest.mark.parametrize("kind", SOFTMAX)
def test_logit_noise_is_not_epistemic(kind):
    """Without weight uncertainty the mutual information is 0, however large the noise."""
    torch.manual_seed(0)
    head = kind(D, 3, noise_scale=2.0).double()
    with torch.no_grad():
        for weights in (head.weights, getattr(head, "noise_weights", head.weights)):
            weights.off_diagonal.zero_()
            weights.log_diagonal.fill_(-40.0)
        dist = head.predictive(torch.randn(6, D, dtype=torch.float64), 32)
    assert dist.epistemic.max() < 1e-12
    assert dist.aleatoric.min() > 0.1


@pytest.mark.parametrize("kind", [*SOFTMAX, VBLLGenerativeClassification])
def test_gradients_of_features_and_parameters(kind):
    torch.manual_seed(0)
    head = kind(D, 3).double()
    features = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 2, 1, 1, 0])

    def loss(features, *parameters):
        return head.loss(features, y, 10)

    # The α of the Knowles-Minka bound is not differentiated: exact only at its optimum.
    loose = kind is VBLLHeteroscedasticClassification
    assert torch.autograd.gradcheck(
        loss, (features, *head.parameters()), fast_mode=not loose, atol=1e-2 if loose else 1e-5
    )
    if kind is not VBLLGenerativeClassification:  # there the variance is that of the features
        with torch.no_grad():  # through the variance alone: the mean is flat
            head.weights.mean.zero_()
        (gradient,) = torch.autograd.grad(head.expected_nll(features, y).sum(), features)
        assert gradient.abs().max() > 1e-3


# -- generative ----------------------------------------------------------------------------------

N, K = 40, 3


def generative_data(seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), N, replacement=True, generator=g)
    means = 2 * torch.randn(K, D, generator=g, dtype=torch.float64)
    return means[y] + torch.randn(N, D, generator=g, dtype=torch.float64), y


def solved(features, y, **settings):
    head = VBLLGenerativeClassification(D, K, **settings).double()
    statistics = head.statistics()
    statistics.add(features, y)
    head.fit_statistics(statistics)
    return head


def test_generative_predictive_is_a_ratio_of_evidences():
    """p(y* | φ*, data) from the marginal likelihoods of data with (φ*, k) added."""
    s, alpha = 1.7, 0.8
    features, y = generative_data()
    head = solved(features, y, prior_variance=s, concentration=alpha)
    noise = head.noise_variance().detach()

    def evidence(features, y):
        counts = np.bincount(y, minlength=K)
        total = gammaln(K * alpha) - gammaln(K * alpha + len(y))
        total += (gammaln(counts + alpha) - gammaln(alpha)).sum()
        z = F.one_hot(y, K).double()
        for j in range(D):
            covariance = noise[j] * torch.eye(len(y)).double() + s * z @ z.T
            marginal = MultivariateNormal(torch.zeros(len(y)).double(), covariance)
            total += float(marginal.log_prob(features[:, j]))
        return total

    before = evidence(features, y)
    new = torch.randn(3, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        probs = head.predictive(new).probs
        density = head.feature_log_density(new)
    for i in range(3):
        logs = [
            evidence(torch.cat([features, new[i : i + 1]]), torch.cat([y, torch.tensor([k])]))
            for k in range(K)
        ]
        np.testing.assert_allclose(probs[i], np.exp(logs - logsumexp(logs)), rtol=1e-8)
        assert float(density[i]) == pytest.approx(logsumexp(logs) - before, rel=1e-9)


def test_generative_noise_is_its_most_probable_value():
    s, v = 1.7, 0.6
    features, y = generative_data()
    found = solved(features, y, prior_variance=s, wishart_scale=v).noise_variance().detach()
    z = F.one_hot(y, K).double().numpy()

    def cost(t, x):
        covariance = np.exp(t) * np.eye(N) + s * z @ z.T
        fit = np.linalg.slogdet(covariance)[1] + x @ np.linalg.solve(covariance, x)
        return fit + 3 * t + v * np.exp(-t)

    for j in range(D):
        t = minimize(lambda t, j=j: cost(t[0], features[:, j].numpy()), [0.0], tol=1e-10).x[0]
        assert float(found[j]) == pytest.approx(np.exp(t), rel=1e-4)


def test_generative_posterior_minimises_the_joint_bound():
    """m and S of the closed form against the generative ELBO written out with torch."""
    features, y = generative_data()
    head = solved(features, y, prior_variance=1.7)
    parameters = [head.mean, head.log_diagonal]
    noise = head.noise_variance().detach()
    own = ((features - head.mean[y]).square() + (2 * head.log_diagonal).exp()[y]) / noise
    q = Normal(head.mean, head.log_diagonal.exp())
    prior = Normal(torch.tensor(0.0).double(), head.prior_variance.sqrt())
    elbo = 0.5 * own.sum() + kl_divergence(q, prior).sum()
    slopes = torch.autograd.grad(elbo, parameters)
    assert max(float(g.abs().max()) for g in slopes) < 1e-9


def test_generative_regularizer():
    head = solved(*generative_data(), prior_variance=1.7, wishart_scale=0.6)
    q = Normal(head.mean, head.log_diagonal.exp())
    prior = Normal(torch.tensor(0.0).double(), head.prior_variance.sqrt())
    noise = head.noise_variance()
    log_prior = (-1.5 * noise.log() - 0.3 / noise).sum()
    expected = kl_divergence(q, prior).sum() - log_prior
    torch.testing.assert_close(head.regularizer(), expected, rtol=1e-10, atol=0)


@pytest.mark.statistical
def test_generative_loss_is_above_the_expected_nll():
    features, y = generative_data()
    head = solved(features, y)
    with torch.no_grad():
        head.log_diagonal.fill_(-0.5)  # a wide posterior, so that the bound has something to lose
        bound = head.expected_nll(features, y)
        g = torch.Generator().manual_seed(3)
        torch.manual_seed(3)
        shape = (20_000, K, D)
        w = head.mean + head.log_diagonal.exp() * torch.randn(shape, generator=g).double()
        log_prior = Dirichlet(head.class_counts + 1.0).sample((20_000,)).log()
        log_joint = Normal(w[:, None], head.noise_variance().sqrt()).log_prob(features[:, None])
        log_joint = log_joint.sum(-1) + log_prior[:, None]
        nll = F.cross_entropy(log_joint.permute(0, 2, 1), y.expand(20_000, -1), reduction="none")
    error = 5 * nll.std(0) / np.sqrt(20_000)
    assert (bound > nll.mean(0) - error).all()
    assert (bound.mean() - nll.mean()) < 2.0


def test_generative_without_uncertainty_is_discriminant_analysis():
    """S → 0 and a weak prior: shared diagonal covariance, means of the classes."""
    features, y = generative_data()
    head = VBLLGenerativeClassification(D, K, concentration=1e-9).double()
    means = torch.stack([features[y == k].mean(0) for k in range(K)])
    noise = torch.tensor([0.5, 1.0, 2.0, 1.5]).double()
    head.count_classes(y)
    with torch.no_grad():
        head.mean.copy_(means)
        head.log_diagonal.fill_(-40.0)
        head.log_noise.copy_(0.5 * noise.log())
        probs = head.predictive(features).probs
        lda = LinearDiscriminantAnalysis(solver="lsqr").fit(features, y)
        lda.coef_ = (means / noise).numpy()
        lda.intercept_ = (-0.5 * (means**2 / noise).sum(1)).numpy() + np.log(lda.priors_)
        np.testing.assert_allclose(probs, lda.predict_proba(features), atol=1e-9)
        # And the loss is then the cross entropy, but for E ln π against ln E π.
        expected = -probs.log()[torch.arange(N), y]
        counts = torch.bincount(y, minlength=K).double()
        gap = torch.digamma(counts) - torch.digamma(counts.sum()) - (counts / N).log()
        torch.testing.assert_close(
            head.expected_nll(features, y), expected - gap[y], rtol=1e-7, atol=1e-7
        )


def test_generative_draws_average_around_the_predictive():
    """Functions are p(y | φ, W, π); with many rows all of them are the predictive."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(30_000) % K
    means = torch.randn(K, D, generator=g, dtype=torch.float64)
    features = means[y] + torch.randn(len(y), D, generator=g, dtype=torch.float64)
    head = solved(features, y)
    with torch.no_grad():
        f = head.functions(features[:20], 50, torch.Generator().manual_seed(1))
        probs = head.predictive(features[:20]).probs
    torch.testing.assert_close(f.sum(-1), torch.ones(50, 20).double())
    assert 0 < f.std(0).max() < 0.05
    assert (f.mean(0) - probs).abs().max() < 0.01
    with pytest.raises(NoEpistemicError):
        _ = head.predictive(features[:2]).epistemic


def test_unseen_class_keeps_its_prior_and_updates_add_it():
    features, y = generative_data()
    head = solved(features[y < 2], y[y < 2])
    noise = head.noise_variance().detach()
    assert float(head.mean[2].detach().abs().max()) == 0
    torch.testing.assert_close(head.log_diagonal[2].detach(), torch.zeros(D).double())
    with torch.no_grad():
        assert (head.predictive(features).probs > 0).all()
    # One class per batch, in any order, ends at the posterior of all rows.
    whole = VBLLGenerativeClassification(D, K).double()
    whole.log_noise.data.copy_(0.5 * noise.log())
    whole.log_noise.requires_grad_(False)
    statistics = whole.statistics()
    statistics.add(features, y)
    whole.fit_statistics(statistics)
    head.update(features[y == 2], y[y == 2])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], value, rtol=1e-10, atol=1e-12)


# -- misuse --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*SOFTMAX, VBLLGenerativeClassification])
def test_half_precision_and_targets(kind):
    torch.manual_seed(0)
    head, features, y = kind(16, 3), torch.randn(30, 16).bfloat16(), torch.arange(30) % 3
    expected = head.loss(features.float(), y)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(head.loss(features, y), expected, rtol=0, atol=0)
        assert head.predictive(features, 4).probs.isfinite().all()
    with pytest.raises(ParameterError, match="too coarse"):
        kind(16, 3).half().loss(features, y)
    with pytest.raises(DataError, match="class positions 0 to 2"):
        head.loss(features, y.float())
    with pytest.raises(DataError, match="class positions"):
        head.loss(features, y[:, None])
    for label in (-1, 3):  # −1 is the last class to an index
        with pytest.raises((IndexError, RuntimeError)):
            head.loss(features, y.masked_fill(y == 0, label))


def test_arguments_are_named():
    with pytest.raises(ParameterError, match="bound"):
        VBLLClassification(4, 3, bound="taylor")
    with pytest.raises(ParameterError, match="concentration"):
        VBLLGenerativeClassification(4, 3, concentration=0)
    with pytest.raises(ParameterError, match="no closed form"):
        VBLLClassification(4, 3).statistics()
    with pytest.raises(ParameterError, match="no closed form"):
        VBLLClassification(4, 3).update(torch.zeros(1, 4), torch.zeros(1).long())

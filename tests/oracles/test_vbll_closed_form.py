"""VBLL on frozen features: streaming sums, closed forms and recursive updates, in float64."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn
from torch.distributions import MultivariateNormal

from uq.errors import DataError, ParameterError
from uq.inference import post_train
from uq.nn import (
    VBLLClassification,
    VBLLGenerativeClassification,
    VBLLRegression,
    VBLLStudentTRegression,
)
from uq.nn.vbll import add_constant

N, D = 50, 5
DENSE = ["dense", "dense_precision"]
LINEAR = [VBLLRegression, VBLLStudentTRegression]


def data(k=1, n=N, d=D, noise=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = features @ torch.randn(d, k, generator=g, dtype=torch.float64) / d**0.5 + 0.7
    return features, y + noise * torch.randn(n, k, generator=g, dtype=torch.float64)


def solve(head, features, y, weight=None):
    statistics = head.statistics()
    statistics.add(features, y, weight)
    head.fit_statistics(statistics)
    return head


def same_posterior(a, b, rtol=1e-9):
    """Means, covariances and noise; factors of a matrix may differ by rounding alone."""
    torch.testing.assert_close(a.weights.mean, b.weights.mean, rtol=rtol, atol=rtol)
    torch.testing.assert_close(
        a.weights.covariances(), b.weights.covariances(), rtol=rtol, atol=1e-12
    )
    for name, value in a.named_parameters():
        if not name.startswith("weights"):
            torch.testing.assert_close(value, dict(b.named_parameters())[name], rtol=rtol, atol=0)


@pytest.mark.parametrize("covariance", DENSE)
@pytest.mark.parametrize("k", [1, 3])
def test_solution_is_bayesian_linear_regression(covariance, k):
    features, y = data(k)
    head = VBLLRegression(D, k, covariance=covariance, prior_variance=0.8).double()
    head.log_noise.data.copy_(torch.linspace(-1.5, 0, k))
    head.log_noise.requires_grad_(False)
    solve(head, features, y)
    phi, noise = add_constant(features), head.noise_variance()
    evidence = 0.0
    for j in range(k):
        precision = phi.T @ phi / noise[j] + torch.eye(D + 1).double() / 0.8
        mean = torch.linalg.solve(precision, phi.T @ y[:, j] / noise[j])
        torch.testing.assert_close(head.weights.mean[j].detach(), mean, rtol=1e-10, atol=1e-12)
        covariances = head.weights.covariances()[j].detach()
        torch.testing.assert_close(covariances, torch.linalg.inv(precision), rtol=1e-9, atol=1e-12)
        marginal = MultivariateNormal(
            torch.zeros(N).double(), noise[j] * torch.eye(N).double() + 0.8 * phi @ phi.T
        )
        evidence += float(marginal.log_prob(y[:, j]))
    bound = head.expected_nll(features, y).sum() + head.weights.kl(head.prior_variance)
    assert -float(bound.detach()) == pytest.approx(evidence, rel=1e-11)


@pytest.mark.parametrize("covariance", [*DENSE, "diagonal"])
def test_solution_has_no_slope(covariance):
    """Mean, covariance and noise are at the maximum of the bound that is trained."""
    features, y = data(2)
    head = VBLLRegression(D, 2, covariance=covariance, wishart_scale=0.4).double()
    solve(head, features, y)
    head.loss(features, y).backward()
    for name, p in head.named_parameters():
        assert float(p.grad.abs().max()) < 1e-9, name


def test_diagonal_solution_of_correlated_features():
    features, y = data()
    features = features + 3 * features[:, :1]
    head = solve(VBLLRegression(D, covariance="diagonal").double(), features, y)
    head.loss(features, y).backward()
    assert max(float(p.grad.abs().max()) for p in head.parameters()) < 1e-9


@pytest.mark.parametrize("noise", [1e-3, 0.3, 3.0])
def test_noise_is_the_global_maximum(noise):
    """Against SciPy on the marginal likelihood, from many starts."""
    features, y = data(noise=noise)
    head = solve(VBLLRegression(D, prior_variance=0.8, wishart_scale=0.05).double(), features, y)
    phi = add_constant(features).numpy()

    def cost(t):
        covariance = np.exp(t) * np.eye(N) + 0.8 * phi @ phi.T
        target = y[:, 0].numpy()
        fit = np.linalg.slogdet(covariance)[1] + target @ np.linalg.solve(covariance, target)
        return fit + 3 * t + 0.05 * np.exp(-t)

    brackets = [(t, t + 2) for t in range(-10, 4)]
    best = min(
        (
            minimize_scalar(cost, bounds=b, method="bounded", options={"xatol": 1e-9})
            for b in brackets
        ),
        key=lambda r: r.fun,
    )
    assert float(head.noise_variance().detach()) == pytest.approx(np.exp(best.x), rel=1e-5)


@pytest.mark.parametrize("kind", LINEAR)
def test_stream_equals_one_pass_and_order_does_not_matter(kind):
    features, y = data(2, n=9000)  # more than one chunk
    weight = torch.rand(9000, dtype=torch.float64) + 0.5
    whole = solve(kind(D, 2).double(), features, y, weight)
    order = torch.randperm(9000)
    head = kind(D, 2).double()
    statistics = head.statistics()
    for rows in order.split(777):
        statistics.add(features[rows], y[rows], weight[rows])
    head.fit_statistics(statistics)
    same_posterior(head, whole, rtol=1e-8)


@pytest.mark.parametrize("kind", LINEAR)
def test_weights_are_repetitions(kind):
    features, y = data()
    weight = torch.ones(N).double()
    weight[:10], weight[10:20] = 2.0, 0.0
    rows = torch.cat([torch.arange(10), torch.arange(10), torch.arange(20, N)])
    weighted = solve(kind(D).double(), features, y, weight)
    repeated = solve(kind(D).double(), features[rows], y[rows])
    same_posterior(weighted, repeated)
    weighted.update(features[:5], y[:5], torch.full((5,), 3.0))
    for _ in range(3):
        repeated.update(features[:5], y[:5])
    same_posterior(weighted, repeated)


@pytest.mark.parametrize("covariance", DENSE)
@pytest.mark.parametrize("kind", LINEAR)
def test_updates_are_the_batch_fit(kind, covariance):
    """In any split: from nothing but the prior, row by row, in blocks, at once."""
    features, y = data(2)
    whole = kind(D, 2, covariance=covariance, prior_variance=0.6).double()
    if kind is VBLLRegression:
        whole.log_noise.requires_grad_(False)
    solve(whole, features, y)
    for split in ([1] * N, [20, 1, 29], [N]):
        head = kind(D, 2, covariance=covariance, prior_variance=0.6).double()
        prior_root = torch.eye(D + 1).double() / 0.6**0.5
        head.weights.set_precision(prior_root.expand(2, -1, -1))
        head.weights.mean.data.zero_()
        if kind is VBLLStudentTRegression:
            head.log_shape.data.fill_(np.log(head.noise_shape))
            head.log_noise.data.fill_(0.5 * np.log(head.noise_rate / head.noise_shape))
        for f, t in zip(features.split(split), y.split(split), strict=True):
            head.update(f, t)
        same_posterior(head, whole, rtol=1e-9)


def test_update_of_more_rows_than_a_block():
    features, y = data(n=2500)
    head, whole = VBLLRegression(D).double(), VBLLRegression(D).double()
    for each in (head, whole):
        each.log_noise.requires_grad_(False)
    solve(head, features[:100], y[:100])
    solve(whole, features, y)
    head.update(features[100:], y[100:])
    same_posterior(head, whole)


def test_update_after_training_keeps_what_was_learned():
    """An update of a trained (not exact) q is Bayes' rule with q as the prior."""
    torch.manual_seed(0)
    features, y = data()
    head = VBLLRegression(D).double()
    with torch.no_grad():
        head.weights.off_diagonal.normal_().mul_(0.1)
        before = torch.linalg.inv(head.weights.covariances()[0])
        mean = head.weights.mean[0].clone()
    head.update(features, y)
    phi, noise = add_constant(features), head.noise_variance().detach()
    precision = before + phi.T @ phi / noise
    expected = torch.linalg.solve(precision, before @ mean + phi.T @ y[:, 0] / noise)
    torch.testing.assert_close(head.weights.mean[0].detach(), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        torch.linalg.inv(head.weights.covariances()[0].detach()), precision, rtol=1e-8, atol=1e-8
    )


# -- hard data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", DENSE)
@pytest.mark.parametrize("kind", LINEAR)
def test_more_features_than_rows(kind, covariance):
    """D > N: the kernel form of the same posterior, N × N."""
    features, y = data(n=8, d=40)
    head = solve(kind(40, covariance=covariance, prior_variance=0.2).double(), features, y)
    phi = add_constant(features)
    student = kind is VBLLStudentTRegression
    noise = 1.0 if student else float(head.noise_variance().detach())
    kernel = 0.2 * phi @ phi.T + noise * torch.eye(8).double()
    mean = 0.2 * phi.T @ torch.linalg.solve(kernel, y)
    torch.testing.assert_close(head.weights.mean.detach().T, mean, rtol=1e-7, atol=1e-9)
    new = add_constant(data(n=3, d=40, seed=1)[0])
    cross = 0.2 * phi @ new.T
    v = 0.2 * new.square().sum(-1) - (cross * torch.linalg.solve(kernel, cross)).sum(0)
    torch.testing.assert_close(head.weights.variance(new).detach()[:, 0], v, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("covariance", DENSE)
@pytest.mark.parametrize("kind", LINEAR)
def test_collinear_features(kind, covariance):
    """A feature that is there twice: the two share its weight, and predictions are the same."""
    features, y = data()
    twice = torch.cat([features, features[:, :1], 0 * features[:, :1], 2 * features[:, :1]], -1)
    head = solve(kind(D + 3, covariance=covariance, prior_variance=0.3).double(), twice, y)
    w = head.weights.mean.detach()[0]
    assert head.weights.covariances().isfinite().all()
    torch.testing.assert_close(w[D], w[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(w[D + 2], 2 * w[0], rtol=1e-6, atol=1e-9)
    assert abs(float(w[D + 1])) < 1e-9
    # √6 times the feature, once, is the same model.
    once = torch.cat([6**0.5 * features[:, :1], features[:, 1:]], -1)
    merged = solve(kind(D, covariance=covariance, prior_variance=0.3).double(), once, y)
    a, b = head.predictive(twice), merged.predictive(once)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(a.variance, b.variance, rtol=1e-6, atol=1e-9)
    head.update(twice[:3], y[:3])
    merged.update(once[:3], y[:3])
    torch.testing.assert_close(
        head.predictive(twice).mean, merged.predictive(once).mean, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("kind", LINEAR)
def test_constant_targets(kind):
    """Nothing but the noise prior is left: σ² = V/(N + ν + K + 1), up to the weights' spread."""
    features, _ = data()
    head = solve(kind(D).double(), features, torch.zeros(N, 1).double())
    assert float(head.weights.mean.detach().abs().max()) < 1e-12
    if kind is VBLLStudentTRegression:
        a, b = head.gamma()
        assert float(b.detach()) == pytest.approx(head.noise_rate)
        assert float(a.detach()) == pytest.approx(1 + N / 2)
    else:
        v = head.weights.variance(add_constant(features)).sum()
        expected = float((v.detach() + 0.1) / (N + 3))
        assert float(head.noise_variance().detach()) == pytest.approx(expected, rel=1e-5)


def test_float32_head_of_float64_sums():
    """Sums are in float64 whatever the features are: a large offset costs no digits."""
    features, y = data(n=3000)
    head = VBLLRegression(D)
    shifted = (features + 100.0).float()
    solve(head, shifted, y.float())
    expected = solve(VBLLRegression(D).double(), shifted.double(), y.float().double())
    a, b = head.predictive(shifted), expected.predictive(shifted.double())
    # float32 weights on features of size 100: 100 √D × 6e-8 × weight.
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-4)
    half = solve(VBLLRegression(D), features.half(), y.half())
    assert half.predictive(features.half()).mean.isfinite().all()


def test_errors_say_what_to_do():
    features, y = data()
    head = VBLLRegression(D)
    with pytest.raises(DataError, match="no rows"):
        head.fit_statistics(head.statistics())
    with pytest.raises(DataError, match="NaN or infinity"):
        solve(VBLLRegression(D).double(), features / 0, y)
    with pytest.raises(DataError, match="NaN or infinity"):
        VBLLRegression(D).double().update(features, y / 0)
    with pytest.raises(ParameterError, match="use 'dense'"):
        solve(VBLLRegression(D, covariance="lowrank").double(), features, y)
    for covariance in ("diagonal", "lowrank"):
        with pytest.raises(ParameterError, match="keeps no correlations"):
            VBLLRegression(D, covariance=covariance).double().update(features, y)
    with pytest.raises(ParameterError, match="no closed form"):
        post_train(nn.Identity(), VBLLClassification(D, 2), [])


@pytest.mark.parametrize("kind", [*LINEAR, VBLLGenerativeClassification])
def test_bad_weights_and_shapes_leave_everything_as_it_was(kind):
    features, y = data()
    generative = kind is VBLLGenerativeClassification
    target = (y[:, 0] > 0).long() if generative else y
    head = kind(D, 2 if generative else 1).double()
    statistics = head.statistics()
    before = copy.deepcopy((head.state_dict(), vars(statistics)))
    ones = torch.ones(N).double()
    for weight in (-ones, ones / 0, 0 * ones / 0, ones[:-1], ones[:, None]):
        with pytest.raises(DataError, match=f"weight must hold {N} finite"):
            head.update(features, target, weight)
        with pytest.raises(DataError, match=f"weight must hold {N} finite"):
            statistics.add(features, target, weight)
    if not generative:
        for bad in (y[:-1], torch.cat([y, y], 1)):
            with pytest.raises(DataError, match=r"features and y must have shapes"):
                statistics.add(features, bad)
    for a, b in zip(before, (head.state_dict(), vars(statistics)), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    if not generative:  # one target may come without its axis, as in the loss
        statistics.add(features, y[:, 0])
        torch.testing.assert_close(statistics.cross[:-1], features.T @ y)


# -- any module ----------------------------------------------------------------------------------


def test_post_train_any_module():
    """A network with batch norm and dropout is used as it predicts, and is left as it was."""
    torch.manual_seed(0)
    x, y = torch.randn(300, 3), torch.randn(300, 1)
    body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh())
    body(x)
    before = {k: t.clone() for k, t in body.state_dict().items()}
    posterior = post_train(body, VBLLRegression(8), zip(x.split(64), y.split(64), strict=True))
    assert all(torch.equal(before[k], t) for k, t in body.state_dict().items())
    assert not any(p.grad is not None for p in body.parameters())
    expected = solve(VBLLRegression(8), posterior.features(x), y)
    torch.testing.assert_close(posterior(x).mean, expected.predictive(posterior.features(x)).mean)
    labels = (x[:, 0] > 0).long()
    head = VBLLGenerativeClassification(8, 2)
    classes = post_train(body, head, [(x, labels, torch.ones(300))])
    assert float((classes(x).mode == labels).float().mean()) > 0.8


@pytest.mark.statistical
def test_functions_are_joint_over_rows():
    """Covariance of function draws across rows is φSφ′ᵀ: what Thompson sampling relies on."""
    features, y = data(2)
    head = solve(VBLLRegression(D, 2).double(), features, y)
    new = data(n=4, seed=3)[0]
    with torch.no_grad():
        f = head.functions(new, 40_000, torch.Generator().manual_seed(0))
        phi = add_constant(new)
        covariances = phi @ head.weights.covariances() @ phi.T  # (K, rows, rows)
        mean = phi @ head.weights.mean.mT
    for k in range(2):
        centred = f[..., k] - mean[:, k]
        empirical = centred.T @ centred / len(f)
        sizes = covariances[k].diagonal()
        error = ((sizes[:, None] * sizes + covariances[k].square()) / len(f)).sqrt()
        assert ((empirical - covariances[k]).abs() < 5 * error).all()
        assert (covariances[k].abs() > 20 * error).float().mean() > 0.5  # the test can fail

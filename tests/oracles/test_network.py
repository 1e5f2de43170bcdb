"""Functional forms against Pyro: log joints, priors, likelihoods, Monte-Carlo prediction."""

import math

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Predictive
from torch.func import functional_call

from uq.inference.posterior import DrawsPosterior, NormalPosterior, monte_carlo
from uq.nn import MLP, CategoricalLikelihood, ConvNet, Network, NormalLikelihood, NormalPrior
from uq.nn.bayesian import BayesianNetwork

LIKELIHOODS = {
    "categorical": lambda: CategoricalLikelihood(3),
    "homoscedastic": lambda: NormalLikelihood(2),
    "heteroscedastic": lambda: NormalLikelihood(2, "heteroscedastic"),
}


def network(kind, seed=0):
    torch.manual_seed(seed)
    likelihood = LIKELIHOODS[kind]()
    return Network(MLP(4, (5,), likelihood.n_outputs), likelihood).double()


def targets(kind, n):
    return torch.arange(n) % 3 if kind == "categorical" else torch.randn(n, 2, dtype=torch.float64)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_log_joint_is_the_traced_one(kind):
    net, prior = network(kind), NormalPrior(0.7)
    x, y = torch.randn(9, 4, dtype=torch.float64), targets(kind, 9)
    model = BayesianNetwork(net, prior)
    weights = {k: torch.randn_like(p) for k, p in net.named_parameters()}
    conditioned = poutine.condition(model, data=weights)
    traced = poutine.trace(conditioned).get_trace(x, y).log_prob_sum()
    torch.testing.assert_close(model.log_joint(weights, x, y), traced, rtol=1e-10, atol=0)


def test_prior_log_density_is_that_of_its_distribution():
    net, prior = network("homoscedastic"), NormalPrior(0.3)
    by_distribution = sum(prior.distribution(p).log_prob(p) for p in net.parameters())
    torch.testing.assert_close(
        prior.log_prob(net.parameters()), by_distribution, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_nll_is_the_distribution_s(kind):
    net = network(kind)
    x, y = torch.randn(9, 4, dtype=torch.float64), targets(kind, 9)
    with torch.no_grad():
        parameters = net(x)
        expected = -net.likelihood.distribution(parameters).log_prob(y)
        torch.testing.assert_close(net.nll(x, y), expected, rtol=1e-12, atol=0)
        one = net.likelihood.predictive(tuple(p[None] for p in parameters))
        one = one if kind == "categorical" else one.joint()
        torch.testing.assert_close(one.log_prob(y), -expected, rtol=1e-7, atol=1e-9)


def test_initial_noise_is_half_the_target_s_deviation():
    _, scale = NormalLikelihood(2)(torch.zeros(3, 2))
    torch.testing.assert_close(scale, torch.full((3, 2), 0.5))


@pytest.mark.parametrize("max_memory_mb", [256, 0])
@pytest.mark.parametrize("n", [1, 100])
def test_monte_carlo_is_the_loop_over_draws_whatever_the_chunks(n, max_memory_mb):
    net = network("heteroscedastic")
    stds = {k: 0.1 * torch.ones_like(p) for k, p in net.named_parameters()}
    posterior = NormalPosterior(net, stds)
    x = torch.randn(n, 4, dtype=torch.float64)
    sampler = posterior.sampler(7, posterior.generator(x.device))
    fast = monte_carlo(net, sampler, 7, x, max_memory_mb=max_memory_mb)
    again = posterior.sampler(7, posterior.generator(x.device))
    with torch.no_grad():
        slow = [
            functional_call(net, {k: v[0] for k, v in again(1).items()}, (x,)) for _ in range(7)
        ]
    for i in range(2):
        torch.testing.assert_close(fast[i], torch.stack([s[i] for s in slow]), rtol=1e-12, atol=0)


@pytest.mark.statistical
def test_weight_draws_have_the_posterior_s_moments():
    """A linear model: the outputs' variance is Σ x²σ²; 5 standard errors."""
    torch.manual_seed(0)
    net = Network(MLP(4, (), 2), NormalLikelihood(2)).double()
    stds = {k: 0.1 + torch.rand_like(p) for k, p in net.named_parameters()}
    stds["likelihood.raw_scale"] = torch.zeros(2, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    n = 20_000
    dist = NormalPosterior(net, stds)(x, n)
    weight, bias = stds["body.0.weight"], stds["body.0.bias"]
    expected = x.square() @ weight.square().T + bias.square()
    torch.testing.assert_close(dist.epistemic, expected, rtol=5 * math.sqrt(2 / n), atol=0)
    error = 5 * (expected / n).sqrt()
    assert ((dist.mean - net.body(x)).abs() < error).all()


@pytest.mark.statistical
def test_export_to_pyro_predicts_the_same():
    net = network("homoscedastic")
    stds = {k: torch.full_like(p, 0.2) for k, p in net.named_parameters()}
    posterior = NormalPosterior(net, stds)
    x = torch.randn(3, 4, dtype=torch.float64)
    model, guide = posterior.to_pyro(NormalPrior(1.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = Predictive(model, guide=guide, num_samples=3000)(x)["y"]
    ours = posterior(x, 3000)
    error = 5 * (2 * ours.variance / 3000).sqrt()
    assert ((drawn.mean(0) - ours.mean).abs() < error).all()
    # Kurtosis of a mixture of Normals is above 3, hence the factor of 2 in the relative error.
    torch.testing.assert_close(drawn.var(0), ours.variance, rtol=10 * math.sqrt(2 / 3000), atol=0)
    assert not pyro.get_param_store().keys()


def test_ensemble_draws_are_the_networks():
    nets = [network("categorical", seed) for seed in range(3)]
    x = torch.randn(5, 4, dtype=torch.float64)
    dist = DrawsPosterior.stack(nets)(x)
    with torch.no_grad():
        for i, net in enumerate(nets):
            expected = torch.log_softmax(net(x)[0], -1)
            torch.testing.assert_close(dist.logits[i], expected, rtol=1e-10, atol=1e-12)


def test_buffers_are_drawn_with_the_weights():
    """Ensemble members keep their own BatchNorm statistics."""
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        body = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)).double()
        body(torch.randn(20, 4, dtype=torch.float64) * (seed + 1))
        nets.append(Network(body.eval(), CategoricalLikelihood(3)))
    x = torch.randn(5, 4, dtype=torch.float64)
    dist = DrawsPosterior.stack(nets)(x)
    with torch.no_grad():
        expected = torch.log_softmax(nets[1](x)[0], -1)
    torch.testing.assert_close(dist.logits[1], expected, rtol=1e-10, atol=1e-12)


def test_conv_net_shapes():
    for shape in [(8, 8), (3, 9, 12)]:
        assert ConvNet(shape, 4)(torch.zeros(2, *shape)).shape == (2, 4)
    with pytest.raises(ValueError, match="in_shape"):
        ConvNet((2, 2), 4)

"""Kernels reached through methods: the same posterior, layer and matches as without them."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from uq.inference.posterior import MixturePosterior, NormalPosterior, monte_carlo
from uq.inference.ssvi_posterior import SparsePosterior
from uq.kernels import Purpose, normal, stream
from uq.nn import Network, NormalLikelihood
from uq.nn.sampled import sampled_network
from uq.nn.ssvi import sparsify
from uq.nn.ssvi_compact import compact


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", "triton")


class Body(nn.Module):
    """Linear layers, one of them used twice, and other parameters between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.norm = nn.LayerNorm(6)
        self.twice = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 1)

    def forward(self, x):
        h = self.norm(self.first(x)).tanh()
        return self.last(self.twice(self.twice(h).tanh()))


def posterior(body=None, seed=3):
    network = Network(body or Body(), NormalLikelihood(1))
    stds = {k: 0.1 + torch.rand_like(p) for k, p in network.named_parameters()}
    return NormalPosterior(network, stds, seed)


def draws(p, n):
    """The weights that the kernels draw, written out."""
    network, found = p.network, {}
    names = [k for k, _ in network.named_parameters()]
    for i, (name, mean) in enumerate(network.named_parameters()):
        module, _, kind = name.rpartition(".")
        purpose = Purpose.WEIGHT
        if kind == "bias" and type(network.get_submodule(module)) is nn.Linear:
            i, purpose = names.index(f"{module}.weight"), Purpose.BIAS
        eps = normal(tuple(mean.shape), int(p.seed), stream=stream(purpose, i), samples=n)
        found[name] = mean.detach() + p.stds[name] * eps
    return found


def test_prediction_is_that_of_the_draws_written_out(kernels):
    p, x = posterior(), torch.randn(7, 3)
    found = p.outputs(x, 6)
    weights = draws(p, 6)
    for s in range(6):
        expected = functional_call(p.network, {k: w[s] for k, w in weights.items()}, (x,))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[s], b.detach(), rtol=1e-5, atol=1e-5)


def test_draws_do_not_depend_on_chunks(kernels):
    p, x = posterior(), torch.randn(7, 3)
    made = sampled_network(p.network, x, p.stds, 3)
    whole = monte_carlo(made.network, made.sampler(), 2, x)
    # So little memory that a draw is evaluated at a time.
    parts = monte_carlo(made.network, made.sampler(), 2, x, max_memory_mb=1e-4)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_network_is_left_as_it_was(kernels):
    p, x = posterior(), torch.randn(2, 3)
    before = {k: t.clone() for k, t in p.state_dict().items()}
    p(x, 1)
    assert type(p.network.body.first) is nn.Linear
    assert all(torch.equal(t, before[k]) for k, t in p.state_dict().items())


def test_mixtures_use_it_too(kernels):
    members = [posterior(nn.Linear(3, 1), seed=i) for i in (1, 2)]
    x = torch.randn(4, 3)
    both = MixturePosterior(members)(x, 3)
    each = [m(x, 3) for m in members]
    assert torch.equal(both.loc, torch.cat([d.loc for d in each]))


class Reads(nn.Module):
    """Reads the weight of its layer instead of applying it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 1)

    def forward(self, x):
        return x @ self.inner.weight.T


class Tied(nn.Module):
    """Its layer shares the weight with an embedding."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 1)
        self.table = nn.Embedding(1, 3)
        self.table.weight = self.inner.weight

    def forward(self, x):
        return self.inner(x) + self.table(torch.zeros(len(x), dtype=torch.long)).sum(1)[:, None]


@pytest.mark.parametrize("body", [Reads, Tied])
def test_networks_that_do_not_fit_are_predicted_as_before(monkeypatch, body):
    p, x = posterior(body()), torch.randn(4, 3)
    expected = p(x, 5).loc
    monkeypatch.setenv("UQ_KERNELS", "triton")
    assert torch.equal(p(x, 5).loc, expected)


def test_sparse_networks(kernels):
    """Each active weight has the noise of its place in the dense weight, the others none."""
    body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    network = Network(sparsify(body, 0.5, dense=(), init_std=1.0), NormalLikelihood(1))
    p, x, n = SparsePosterior(compact(network), seed=8), torch.randn(4, 3), 5
    found = p.outputs(x, n)
    n_parameters = len(list(p.network.parameters()))
    weights = {}
    for i, (name, w) in enumerate(p._weights.items()):
        channel = stream(Purpose.WEIGHT, n_parameters + i)
        eps = normal(w.n, 8, stream=channel, samples=n)[:, w.index()]
        weights[f"{name}.mean"] = w.mean.detach() + w.std * eps
    for s in range(n):
        drawn = {k: t[s] for k, t in weights.items()}
        for a, b in zip(found, functional_call(p.network, drawn, (x,)), strict=True):
            torch.testing.assert_close(a[s], b.detach(), rtol=1e-5, atol=1e-5)


def test_sparse_training_layer(monkeypatch):
    """Moments over repeated rows are the layer's, and gradients reach all its parameters."""
    layer = sparsify(nn.Linear(5, 3), 0.4, dense=(), init_std=1.0)
    x = torch.randn(1, 5).expand(4000, 5)
    mean, variance = (t[0].detach() for t in layer.moments(x[:1]))
    monkeypatch.setenv("UQ_KERNELS", "triton")
    monkeypatch.setattr("uq.kernels.local_reparam._BM", 4096)
    monkeypatch.setattr("uq.kernels.local_reparam._BN", 4)
    monkeypatch.setattr("uq.kernels.local_reparam.tiles", lambda *_: {"BM": 4096, "BN": 4, "BK": 8})
    torch.manual_seed(0)
    out = layer(x)
    y, n = out.detach(), len(x)
    assert not torch.equal(y, layer(x))
    torch.manual_seed(0)
    assert torch.equal(y, layer(x))
    assert float(((y.mean(0) - mean).abs() / (variance / n).sqrt().clamp_min(1e-6)).max()) < 4.5
    live = variance > 0
    assert float((y.var(0)[live] / variance[live] - 1).abs().max()) < 4.5 * (2 / n) ** 0.5
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())

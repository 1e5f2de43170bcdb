"""Trajectories of chains: kernels against torch, and what holds of any leapfrog integrator."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from uq.inference import MaskedBNN, WidthPrior
from uq.inference.masked_bnn import MaskedMoves
from uq.inference.masked_bnn_moves import hmc
from uq.inference.masked_bnn_runs import sample_masked
from uq.kernels.leapfrog import Recorded, kick_drift, kick_energy, leapfrog, mlp_gradient
from uq.nn.masked_bnn import MaskedMLP, relu_mlp


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", request.param)
    return request.param


def gaussian(d, dtype=torch.float64):
    """Log density of N(0, Σ), its gradient, and Σ."""
    g = torch.Generator().manual_seed(1)
    root = torch.randn(d, d, generator=g, dtype=dtype) / d**0.5 + torch.eye(d, dtype=dtype)
    precision = torch.linalg.inv(root @ root.T)

    def density(q):
        pull = q @ precision
        return -0.5 * (q * pull).sum(1), -pull

    return density, root @ root.T


def start(chains, d, dtype=torch.float64):
    g = torch.Generator().manual_seed(2)
    return [torch.randn(chains, d, generator=g, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_equal_reference(monkeypatch, full, dtype):
    """Over a block and a half of coordinates; float32 to a few roundings of each of 5 steps."""
    monkeypatch.setattr("uq.kernels.leapfrog._BLOCK", 32)
    q, p = start(5, 45, dtype)
    step = 0.1 + 0.1 * torch.rand(5, 45 if full else 1, dtype=torch.float64).squeeze(1)
    density, _ = gaussian(45, dtype)
    found = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("UQ_KERNELS", backend)
        found.append(leapfrog(q, p, density(q)[1], step, density, 5))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=10 * tolerance)


def test_pieces_written_out(backend):
    q, p = start(3, 4)
    g, step = torch.randn(3, 4).double(), torch.rand(3, 1).double()
    x, k = kick_drift(q, p, g, step, 0.5)
    torch.testing.assert_close(k, p + 0.5 * step * g)
    torch.testing.assert_close(x, q + step * k)
    k, energy = kick_energy(p, g, step)
    torch.testing.assert_close(k, p + 0.5 * step * g)
    torch.testing.assert_close(energy, 0.5 * k.square().sum(1))


def test_trajectories_are_reversible(backend):
    density, _ = gaussian(6)
    q, p = start(4, 6)
    step = torch.tensor([0.05, 0.1, 0.2, 0.3], dtype=torch.float64)
    end = leapfrog(q, p, density(q)[1], step, density, 15)
    back = leapfrog(end[0], -end[1], end[4], step, density, 15)
    torch.testing.assert_close(back[0], q, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(-back[1], p, rtol=1e-10, atol=1e-10)


def test_energy_error_goes_with_the_square_of_the_step(backend):
    """Half the step and twice as many: a quarter of the error, up to terms of fourth order."""
    density, _ = gaussian(6)
    q, p = start(8, 6)
    value, gradient = density(q)
    errors = []
    for halvings in (3, 4):
        step = torch.full((8,), 0.2 / 2**halvings, dtype=torch.float64)
        end = leapfrog(q, p, gradient, step, density, 4 * 2**halvings)
        errors.append(end[2] - end[3] - (0.5 * p.square().sum(1) - value))
    ratio = errors[0].abs().sum() / errors[1].abs().sum()
    assert 3.8 < float(ratio) < 4.2


def test_chains_do_not_know_of_each_other(backend):
    density, _ = gaussian(6)
    q, p = start(5, 6)
    step = torch.linspace(0.05, 0.2, 5, dtype=torch.float64)
    together = leapfrog(q, p, density(q)[1], step, density, 5)
    for c in range(5):
        one = slice(c, c + 1)
        alone = leapfrog(q[one], p[one], density(q[one])[1], step[one], density, 5)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[one], b, rtol=1e-12, atol=1e-12)


@pytest.mark.statistical
def test_the_target_stays_what_it_is():
    """Chains start in N(0, Σ) and stay there: variances to 4.5 standard errors (8 numbers)."""
    density, covariance = gaussian(8)
    g = torch.Generator().manual_seed(3)
    n = 4000
    root = torch.linalg.cholesky(covariance)
    q = torch.randn(n, 8, generator=g, dtype=torch.float64) @ root.T
    step = torch.full((n,), 0.5, dtype=torch.float64)
    for _ in range(5):
        q, accepted, _ = hmc(q, density, step, 5, g)
    assert 0.5 < float(accepted.mean()) < 0.999  # so that decisions matter
    error = (q.var(0) / covariance.diagonal() - 1).abs().max()
    assert float(error) < 4.5 * (2 / n) ** 0.5


def test_gradient_of_networks_equals_automatic_differentiation():
    sizes, chains = (3, 7, 5, 2), 4
    body = relu_mlp(sizes).double()
    x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    shapes = [(k, p.shape, p.numel()) for k, p in body.named_parameters()]

    def one(flat):
        parts = flat.split([n for _, _, n in shapes])
        named = {k: t.view(s) for (k, s, _), t in zip(shapes, parts, strict=True)}
        return -0.5 * (functional_call(body, named, (x,)) - y).square().sum()

    theta = torch.randn(chains, sum(n for _, _, n in shapes)).double()

    def pull(outputs):
        error = y - outputs
        return -0.5 * error.square().sum((1, 2)), error

    value, gradient = mlp_gradient(theta, sizes, x, pull)
    torch.testing.assert_close(value, vmap(one)(theta))
    torch.testing.assert_close(gradient, vmap(grad(one))(theta))


def test_recorded_functions_read_their_own_copies():
    """As a graph does: a function that keeps to its arguments gives the same at new ones."""
    seen = []

    def function(a, b):
        seen.append((a.data_ptr(), b.data_ptr()))
        return a + b, a * b

    run = Recorded(function, torch.zeros(3), torch.zeros(3))
    first = run(torch.ones(3), torch.full((3,), 2.0))
    second = run(torch.full((3,), 5.0), torch.ones(3))
    assert torch.equal(first[0], torch.full((3,), 3.0))  # not written over by the second
    assert torch.equal(second[1], torch.full((3,), 5.0))
    assert len(set(seen)) == 1


@pytest.mark.parametrize("classes", [False, True])
def test_masked_networks_sample_alike_when_trajectories_are_recorded(monkeypatch, classes):
    """Bit by bit: what a graph replays reads nothing of the state that it was recorded at."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, generator=g)
    y = (x[:, 0] > 0).long() if classes else x.sum(1, keepdim=True)
    weight = 1 + torch.rand(30, generator=g)

    def sample():
        network = MaskedMLP((2, 6, 2 if classes else 1))
        model = MaskedBNN(network, x, y, WidthPrior([6], [0.1], [1]), weight=weight)
        g = torch.Generator().manual_seed(1)
        state = model.draw_state(3, g)
        run = sample_masked(
            model, state, moves=MaskedMoves(5), n_warmup=12, n_draws=4, thin=3, generator=g
        )
        return model, run

    _, expected = sample()
    monkeypatch.setattr("uq.inference.masked_bnn._records", lambda _: True)
    model, found = sample()
    assert any(graph is not None for graph in model._recorded.values())
    assert torch.equal(found.masks, expected.masks)
    for name, values in expected.parameters.items():
        assert torch.equal(found.parameters[name], values)

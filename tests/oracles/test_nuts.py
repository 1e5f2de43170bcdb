"""NUTS: JAX network against torch, exact posteriors, interrupts, simulation-based calibration."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.func import functional_call

from uq import NUTSClassifier, NUTSRegressor
from uq.errors import ParameterError
from uq.inference.nuts import sample_nuts
from uq.nn import MLP, CategoricalLikelihood, ConvNet, Network, NormalLikelihood
from uq.nn.nuts import JaxNetwork, to_arrays

BODIES = {
    "mlp": (lambda: MLP(3, (5, 4), 2), (3,)),
    "one layer": (lambda: nn.Linear(3, 2), (3,)),
    "convolution": (lambda: ConvNet((4, 4), 2, channels=(4,)), (4, 4)),
    "layers": (
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.Linear(12, 6, bias=False),
            nn.LayerNorm(6),
            nn.GELU(),
            nn.Linear(6, 5),
            nn.Softplus(2.0),
            nn.Linear(5, 4),
            nn.LeakyReLU(0.2),
            nn.Linear(4, 2),
            nn.SiLU(),
        ),
        (3, 4),
    ),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", ["classes", "homoscedastic", "heteroscedastic"])
def test_log_likelihood_in_jax_is_that_of_torch(body, kind):
    import jax

    make, shape = BODIES[body]
    x = torch.randn(6, *shape, dtype=torch.float64)
    likelihood = CategoricalLikelihood(2)
    y = torch.arange(6) % 2
    if kind != "classes":
        likelihood = NormalLikelihood(2 if kind == "homoscedastic" else 1, kind)
        y = torch.randn(6, likelihood.n_targets, dtype=torch.float64)
    network = Network(make(), likelihood).double().eval()
    weights = {k: torch.randn_like(p) for k, p in network.named_parameters()}
    expected = -likelihood.nll(functional_call(network, weights, (x,)), y)
    with jax.enable_x64(True):
        got = JaxNetwork(network).log_likelihood(to_arrays(weights), x.numpy(), y.numpy())
    # GELU and softplus are other series in the two libraries: 1e-9 rather than 1e-14.
    np.testing.assert_allclose(got, expected.detach(), rtol=1e-9)


def test_equal_architectures_share_a_program():
    def network(width, alpha=1.0):
        body = nn.Sequential(nn.Linear(2, width), nn.ELU(alpha), nn.Linear(width, 3))
        return JaxNetwork(Network(body, CategoricalLikelihood(3)))

    assert network(4) == network(4)
    assert hash(network(4)) == hash(network(4))
    assert network(4) != network(5)
    assert network(4) != network(4, alpha=0.5)


@pytest.fixture(scope="module")
def linear():
    """Linear regression with known noise and prior N(0, 0.7²): its posterior is Normal."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, dtype=torch.float64, generator=g)
    y = x @ torch.tensor([[1.0], [-0.5], [0.3]], dtype=torch.float64) + 0.4
    y = y + 0.5 * torch.randn(40, 1, dtype=torch.float64, generator=g)
    network = Network(nn.Linear(3, 1), NormalLikelihood(1)).double()
    network.likelihood.raw_scale.requires_grad_(False)  # softplus(offset) + floor is 0.5
    design = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    weight = torch.linspace(0.2, 2, 40, dtype=torch.float64)
    precision = design.T @ (weight[:, None] * design) / 0.5**2 + torch.eye(4) / 0.7**2
    mean = torch.linalg.solve(precision, design.T @ (weight[:, None] * y) / 0.5**2)[:, 0]
    starts = {"body.weight": torch.randn(4, 1, 3, generator=g), "body.bias": torch.zeros(4, 1)}
    run = sample_nuts(
        network, x, y, starts, weight=weight, prior_scale=0.7, n_warmup=200, n_draws=500
    )
    return run, mean, torch.linalg.inv(precision), (network, x, y, weight)


@pytest.mark.statistical
def test_conjugate_linear_regression_with_weights(linear):
    run, mean, covariance, _ = linear
    draws = torch.cat([run.draws["body.weight"][:, :, 0], run.draws["body.bias"]], -1)
    assert draws.shape == (4, 500, 4)
    flat = draws.flatten(0, 1)
    std = covariance.diagonal().sqrt()
    # 2,000 draws that NUTS makes at least as good as 500 independent ones: five standard errors
    # of the mean, and of the log of a standard deviation (1/√(2n)) and of a correlation (1/√n).
    assert ((flat.mean(0) - mean).abs() / std).max() < 5 / 500**0.5
    assert (flat.std(0) / std).log().abs().max() < 5 / 1000**0.5
    expected = covariance / std.outer(std)
    assert (torch.corrcoef(flat.T) - expected).abs().max() < 5 / 500**0.5
    assert not run.sample_stats["diverging"].any()
    assert run.sample_stats["acceptance_rate"].mean() > 0.6


def test_recorded_log_density_is_the_log_joint(linear):
    from uq.nn import NormalPrior

    run, _, _, (network, x, y, weight) = linear
    weights = {k: t[1, 7] for k, t in run.draws.items()}
    nll = network.likelihood.nll(functional_call(network, weights, (x,)), y)
    expected = NormalPrior(0.7).log_prob(weights.values()) - (weight * nll).sum()
    assert run.sample_stats["lp"][1, 7] == pytest.approx(float(expected.detach()), rel=1e-10)


@pytest.mark.statistical
def test_learned_noise_against_quadrature():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(12, 1, dtype=torch.float64, generator=g)
    y = 0.8 * x + 0.6 * torch.randn(12, 1, dtype=torch.float64, generator=g)
    network = Network(nn.Linear(1, 1, bias=False), NormalLikelihood(1)).double()
    starts = {"body.weight": torch.zeros(4, 1, 1), "likelihood.raw_scale": torch.zeros(4, 1)}
    run = sample_nuts(network, x, y, starts, n_warmup=300, n_draws=700, seed=2)
    w, r = torch.meshgrid(
        torch.linspace(-3, 4, 401, dtype=torch.float64),
        torch.linspace(-6, 6, 401, dtype=torch.float64),
        indexing="ij",
    )
    scale = nn.functional.softplus(r + network.likelihood.offset) + 1e-3
    z = (y[:, 0] - w[..., None] * x[:, 0]) / scale[..., None]
    log = -0.5 * (z**2).sum(-1) - 12 * scale.log() - 0.5 * (w**2 + r**2)
    p = torch.softmax(log.flatten(), 0).view_as(log)
    draws = run.draws["body.weight"].flatten(), run.draws["likelihood.raw_scale"].flatten()
    for values, drawn in zip((w, r), draws, strict=True):
        mean = (p * values).sum()
        std = (p * (values - mean) ** 2).sum().sqrt()
        # At least 700 effective draws of 2,800: five standard errors.
        assert abs(drawn.mean() - mean) < 5 * std / 700**0.5
        assert abs((drawn.std() / std).log()) < 5 / 1400**0.5


def test_frozen_weights_stay(tmp_path):
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    net[0].weight.requires_grad_(False)
    X = np.random.default_rng(0).normal(size=(20, 2))
    model = NUTSRegressor(
        module=net, n_chains=1, n_warmup=5, n_draws=6, max_tree_depth=3, max_epochs=1
    )
    model.fit(X, X[:, 0])
    draws = model.posterior_.draws
    assert (draws["body.0.weight"] == net[0].weight).all()
    assert draws["body.2.weight"].std(0).min() > 0


def test_interrupted_sampling_keeps_the_draws_so_far(monkeypatch):
    from tqdm.auto import tqdm

    def press(after):
        seen = []

        def update(self, n=1):
            seen.append(n)
            if len(seen) == after:
                raise KeyboardInterrupt

        monkeypatch.setattr(tqdm, "update", update)

    X = np.random.default_rng(0).normal(size=(20, 2))
    model = NUTSRegressor(
        hidden=(), n_chains=2, n_warmup=50, n_draws=100, max_epochs=2, random_state=0
    )
    press(2)
    with pytest.warns(UserWarning, match="after 100 of 150 transitions.* 50 draws of each"):
        model.fit(X, X[:, 0])
    assert model.stop_reason_ == "interrupted"
    assert model.predict_distribution(X).n_draws == 100
    assert model.sample_stats_["lp"].shape == (2, 50)
    press(1)
    with pytest.warns(UserWarning, match="warm-up had not ended"):
        model.fit(X, X[:, 0])
    assert model.sample_stats_ == {}
    assert np.isfinite(model.log_score(X, X[:, 0]))


def test_networks_that_have_no_translation():
    X = np.random.default_rng(0).normal(size=(20, 2))
    y = np.arange(20) % 2

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    for module, message in (
        (nn.Sequential(nn.Linear(2, 2), nn.PReLU()), "PReLU, which is not translated"),
        (Branches(), "branches on its input"),
    ):
        with pytest.raises(ParameterError, match=message):
            NUTSClassifier(module=module, n_chains=1, max_epochs=1).fit(X, y)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_chains", 0), ("n_warmup", -1), ("n_draws", 0), ("target_accept", 1.0)],
)
def test_bad_arguments(name, value):
    with pytest.raises(ParameterError, match=name):
        NUTSRegressor(**{name: value}).fit(np.eye(4), np.arange(4.0))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.statistical
@pytest.mark.parametrize("hidden", [(), (3,)])
def test_simulation_based_calibration(hidden):
    """Talts et al. 2018: ranks of a prior draw among posterior draws are uniform."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(15, 2, dtype=torch.float64, generator=g)
    network = Network(MLP(2, hidden, 1), NormalLikelihood(1)).double()
    ranks = []
    for simulation in range(200):
        truth = {
            k: torch.randn(p.shape, dtype=torch.float64, generator=g)
            for k, p in network.named_parameters()
        }
        loc, scale = functional_call(network, truth, (x,))
        y = (loc + scale * torch.randn(loc.shape, dtype=torch.float64, generator=g)).detach()
        starts = {k: torch.randn(2, *t.shape, generator=g) for k, t in truth.items()}
        run = sample_nuts(
            network, x, y, starts, n_warmup=200, n_draws=500, target_accept=0.9, seed=simulation
        )
        # Functions, not weights: those of hidden units can be exchanged. Every 20th draw is as
        # good as independent.
        draws = {k: t[:, ::20].flatten(0, 1) for k, t in run.draws.items()}
        values = torch.func.vmap(lambda w: functional_call(network, w, (x[:1],))[0])(draws)
        noise = draws["likelihood.raw_scale"][:, 0]
        ranks.append(
            [
                int((values[:, 0, 0] < loc[0, 0]).sum()),
                int((noise < truth["likelihood.raw_scale"][0]).sum()),
            ]
        )
    for column in np.array(ranks).T:  # 51 possible ranks, in 10 bins of near-equal size
        counts, edges = np.histogram(column, bins=np.linspace(-0.5, 50.5, 11))
        share = np.diff(np.floor(edges + 0.5)) / 51
        assert stats.chisquare(counts, share * len(column)).pvalue > 1e-3

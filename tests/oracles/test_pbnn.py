"""Partial BNNs: OHSMC is a Kalman filter, SGSMC's compromise, gradients, moves; the estimators."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_breast_cancer, load_diabetes, make_moons
from torch import nn
from torch.func import functional_call

import uq
from uq import MAPClassifier, PartialBNNClassifier, PartialBNNRegressor
from uq.errors import FitInterruptedWarning, ParameterError, UQError
from uq.inference import (
    OHSMC,
    SGSMC,
    PartialPosterior,
    ParticleNetwork,
    ParticleWarning,
    stochastic_names,
)
from uq.inference.pbnn import refresh
from uq.nn import MLP, CategoricalLikelihood, ConvNet, Network, NormalLikelihood

statistical = pytest.mark.statistical


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class FixedNoise(NormalLikelihood):
    """Normal of known standard deviation."""

    def __init__(self, scale=1.0):
        super().__init__(1)
        self.raw_scale = None
        self.n_outputs = 1
        self.scale = scale

    def forward(self, outputs):
        return outputs, torch.full_like(outputs, self.scale)


class Location(nn.Module):
    """f(x; φ, ψ) = ψφ, whatever x."""

    def __init__(self, psi=None):
        super().__init__()
        self.phi = nn.Parameter(torch.zeros(1, 1).double())
        if psi is not None:
            self.psi = nn.Parameter(torch.tensor(psi).double())

    def forward(self, x):
        value = self.phi if not hasattr(self, "psi") else self.psi * self.phi
        return value.expand(len(x), 1)


def location(psi=None, scale=1.0):
    return ParticleNetwork(Network(Location(psi), FixedNoise(scale)), ["phi"])


def mlp(hidden=(6, 5, 4), seed=0, classes=None, stochastic="penultimate", d=3, **settings):
    torch.manual_seed(seed)
    likelihood = NormalLikelihood(1) if classes is None else CategoricalLikelihood(classes)
    body = MLP(d, hidden, likelihood.n_outputs).double()
    network = Network(body, likelihood.double())
    return ParticleNetwork(network, stochastic_names(body, stochastic), **settings)


def regression(n=20, d=3, seed=0):
    g = generator(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, x[:, :1].sin() + 0.3 * torch.randn(n, 1, generator=g, dtype=torch.float64)


# -- OHSMC ---------------------------------------------------------------------------------------


@statistical
@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_ohsmc_is_the_kalman_filter_of_a_local_level_model(threshold):
    """y ~ N(φ, 1), φ a random walk of variance v between batches: everything in closed form."""
    v, m_batch, n_particles, n_steps = 0.01, 10, 4000, 400
    y = 0.5 + torch.randn(100, 1, generator=generator(1), dtype=torch.float64)
    smc = OHSMC(
        location(),
        n_particles,
        generator=generator(2),
        move="rw",
        move_var=v,
        ess_threshold=threshold,
    )
    mean, variance, log_evidence = 0.0, 1.0, 0.0
    order, errors, variances = generator(3), [], []
    for step in range(n_steps):
        batch = y[torch.randperm(100, generator=order)[:m_batch]]
        with torch.no_grad():
            loss = smc(torch.zeros(m_batch, 1).double(), batch)
        before = variance + v
        cov = np.full((m_batch, m_batch), before) + np.eye(m_batch)
        exact = stats.multivariate_normal(np.full(m_batch, mean), cov).logpdf(batch[:, 0].numpy())
        # The loss is −log p̂ over the rows of the batch.
        log_evidence += exact + float(loss) * m_batch
        variance = 1 / (1 / before + m_batch)
        mean = variance * (mean / before + float(batch.sum()))
        w = smc.log_weights.exp()
        found = float(w @ smc.particles[:, 0])
        if step >= 200:
            errors.append(found - mean)
            variances.append(float(w @ (smc.particles[:, 0] - found).square()))
    stationary = (math.sqrt(v**2 + 4 * v / m_batch) - v) / 2
    assert variance == pytest.approx(stationary, rel=1e-9)
    assert stationary == pytest.approx(0.0270156, abs=1e-7)
    assert np.mean(variances) == pytest.approx(stationary, rel=0.02)
    assert np.sqrt(np.mean(np.square(errors))) < 2 * math.sqrt(stationary / n_particles)
    assert abs(log_evidence) < 0.5
    increments = smc.diagnostics()["log_increments"]
    assert len(increments) == n_steps


@statistical
def test_moves_without_data():
    """ "ou" keeps N(0, s²), "rw" widens by v a step."""
    n, v, steps = 20_000, 0.02, 30
    x, nothing = torch.zeros(2, 1).double(), torch.zeros(2).double()
    for move, variance in (("ou", 4.0), ("rw", 4 + steps * v)):
        smc = OHSMC(
            location(), n, generator=generator(), move=move, move_var=v, prior_scale=2.0,
            ess_threshold=0.5,
        )  # fmt: skip
        with torch.no_grad():
            for _ in range(steps):
                smc(x, x, nothing)
        assert float(smc.particles.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))
    # The cloud's own covariance, exactly: x + √v Lz has covariance (1 + v) LLᵀ.
    smc = OHSMC(mlp(), 20_000, generator=generator(), move="adaptive_rw", move_var=0.5)
    mix = torch.tensor([[1.0, 0.0], [0.9, 0.6]], dtype=torch.float64)
    smc.particles[:, :2] = smc.particles[:, :2] @ mix.T
    before, after = smc.particles.T.cov(), smc._move(smc.particles).T.cov()
    torch.testing.assert_close(after, 1.5 * before, atol=0.08, rtol=0)


@statistical
def test_mh_reaches_the_posterior_of_the_batch_before():
    y = 0.5 + torch.randn(10, 1, generator=generator(1), dtype=torch.float64)
    x = torch.zeros_like(y)
    n = 4000
    for move, steps, v in (("mh", 60, 0.1), ("langevin", 1, 4e-3)):
        smc = OHSMC(location(), n, generator=generator(), move=move, n_move_steps=steps, move_var=v)
        assert torch.equal(smc._move(smc.particles), smc.particles)  # no row was seen
        smc._previous = (x, y, None)
        phi = smc.particles
        for _ in range(1 if move == "mh" else 800):
            phi = smc._move(phi).detach()
        mean, variance = float(y.sum()) / 11, 1 / 11
        assert float(phi.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
        # Langevin of length v has a bias of v/(4 variance) ≈ 1 %; the standard error is 2 %.
        assert float(phi.var()) == pytest.approx(variance, rel=0.1)
    rates = smc.diagnostics()["acceptance"]
    assert len(rates) == 0
    smc = OHSMC(location(), 50, generator=generator(), move="mh")
    for _ in range(3):
        smc(x, y)
    rates = smc.diagnostics()["acceptance"]
    assert len(rates) == 2  # the first step has no move
    assert ((rates > 0) & (rates < 1)).all()


def test_mh_never_sees_the_rows_that_it_is_weighted_by():
    smc = OHSMC(location(), 20, generator=generator(), move="mh")
    seen = []
    smc._log_target = lambda phi: seen.append(smc._previous[1]) or torch.zeros(len(phi)).double()
    batches = [torch.full((3, 1), float(i)).double() for i in range(3)]
    for y in batches:
        smc(torch.zeros_like(y), y)
    assert {float(y[0]) for y in seen} == {0.0, 1.0}
    assert float(seen[-1][0]) == 1.0


# -- gradients -----------------------------------------------------------------------------------


def jacobian(network, phi, x, y):
    """∇_ψ ℓ of each particle, one backward pass a particle."""
    rows = []
    for p in phi:
        log_l = network(p[None], x, y).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(log_l, network.psi())]))
    return torch.stack(rows)


def gradient_of(smc, x, y):
    smc.zero_grad()
    smc(x, y).backward()
    return torch.cat([p.grad.flatten() for p in smc.trained()])


@pytest.mark.parametrize("gradient", ["pre", "post"])
@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_one_backward_pass_equals_the_jacobian_of_the_particles(gradient, threshold):
    x, y = regression()
    network = mlp()
    smc = OHSMC(
        network, 30, generator=generator(), move="rw", gradient=gradient, ess_threshold=threshold
    )
    for _ in range(3):
        log_w = smc.log_weights.clone()
        state = smc.generator.get_state()
        phi = smc._move(smc.particles).clone()
        smc.generator.set_state(state)
        found = gradient_of(smc, x, y)
        each = jacobian(network, phi, x, y)
        with torch.no_grad():
            w = (log_w + network(phi, x, y)).softmax(0)
        if gradient == "post":
            each = jacobian(network, smc.particles, x, y)
            w = smc.log_weights.exp()
        torch.testing.assert_close(found, -(w @ each) / len(x), rtol=1e-11, atol=1e-12)


@statistical
def test_post_averages_to_pre():
    x, y = regression()
    network = mlp()
    found = {}
    for gradient in ("pre", "post"):
        draws = []
        for seed in range(300 if gradient == "post" else 1):
            # Same particles every time; only resampling differs.
            smc = OHSMC(
                network, 40, generator=generator(7), gradient=gradient, resampling="multinomial"
            )
            smc._move = lambda phi: phi.clone()
            smc.generator.manual_seed(seed)
            draws.append(gradient_of(smc, x, y))
        found[gradient] = torch.stack(draws)
    error = found["post"].std(0) / math.sqrt(300)
    z = (found["post"].mean(0) - found["pre"][0]) / error.clamp(min=1e-12)
    assert float(z.abs().max()) < 4.5  # 60 weights
    assert float(z.square().mean()) < 2


@pytest.mark.parametrize("algorithm", [OHSMC, SGSMC])
@pytest.mark.parametrize("weighted", [False, True])
def test_permuting_rows_and_splitting_particles_change_nothing(algorithm, weighted):
    x, y = regression(8)
    weight = torch.rand(8, generator=generator(1), dtype=torch.float64) if weighted else None
    whole = mlp()
    parts = mlp(max_memory_mb=0.01)
    assert parts.particles_at_once(x) < 30
    results = []
    for network in (whole, parts):
        smc = algorithm(network, 60, generator=generator())
        loss = smc(x, y, weight)
        loss.backward()
        results.append([loss.detach(), smc.particles, *[p.grad for p in smc.trained()]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_weight_of_two_is_a_row_given_twice():
    x, y = regression(10)
    twice = torch.cat([x, x[:4]]), torch.cat([y, y[:4]])
    weight = torch.ones(10).double()
    weight[:4] = 2
    network = mlp()
    a, b = (OHSMC(network, 50, generator=generator(), weight_factor=f) for f in (1.4, 1.0))
    loss = a(x, y, weight / 1.4)
    torch.testing.assert_close(loss, b(*twice), rtol=1e-12, atol=0)
    torch.testing.assert_close(a.particles, b.particles)


def test_without_stochastic_weights_it_is_adam():
    """A layer whose particles have nowhere to go: ψ follows Adam on the deterministic network."""
    x, y = regression()
    network = mlp()
    own = dict(network.network.body.named_parameters())
    start = torch.cat([own[name].detach().flatten() for name in network.names])
    smc = OHSMC(network, 5, generator=generator())
    smc._move = lambda phi: start.expand_as(phi).clone()
    plain = mlp().network
    for name in network.names:
        dict(plain.body.named_parameters())[name].requires_grad_(False)
    pairs = [
        (smc, smc.trained(), lambda: smc(x, y)),
        (plain, [p for p in plain.parameters() if p.requires_grad], lambda: plain.nll(x, y).mean()),
    ]
    for module, parameters, loss in pairs:
        optimizer = torch.optim.Adam(parameters, 0.01)
        for _ in range(30):
            module.zero_grad()
            loss().backward()
            optimizer.step()
    for a, b in zip(pairs[0][1], pairs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# -- SGSMC and refresh ---------------------------------------------------------------------------


def sg_gradient(psi, y, m_batch, scale=1.0):
    """∇_ψ log N(y; 0, ψ²11ᵀ + I) of the model y ~ N(ψφ, 1), φ ~ N(0, 1)."""
    a, mean = 1 + m_batch * psi**2, float(y.mean())
    return -m_batch * psi / a + psi * m_batch**2 * mean**2 / a**2


@statistical
def test_sgsmc_gradient_posterior_and_evidence_of_a_batch():
    psi, m_batch, n = 0.8, 10, 4000
    y = 0.9 + torch.randn(m_batch, 1, generator=generator(1), dtype=torch.float64)
    x = torch.zeros_like(y)
    found, losses = [], []
    for seed in range(12):
        smc = SGSMC(location(psi), n, generator=generator(seed))
        loss = smc(x, y)
        loss.backward()
        found.append(-float(smc.model.network.body.psi.grad) * m_batch)
        losses.append(-float(loss.detach()) * m_batch)
    a = 1 + m_batch * psi**2
    w = smc.log_weights.exp()
    mean = float(w @ smc.particles[:, 0])
    assert mean == pytest.approx(psi * float(y.sum()) / a, abs=6 / math.sqrt(a * n))
    assert float(w @ (smc.particles[:, 0] - mean).square()) == pytest.approx(1 / a, rel=0.15)
    cov = psi**2 * np.ones((m_batch, m_batch)) + np.eye(m_batch)
    exact = stats.multivariate_normal(np.zeros(m_batch), cov).logpdf(y[:, 0].numpy())
    assert np.mean(losses) == pytest.approx(exact, abs=0.05)
    error = np.std(found, ddof=1) / math.sqrt(12)
    assert error < 0.1
    assert np.mean(found) == pytest.approx(sg_gradient(psi, y, m_batch), abs=5 * error)


@statistical
def test_sgsmc_finds_the_compromised_maximum():
    """Batches bias ψ² by (s² − 1)(1/M − 1/N): here the noise is twice what the model says."""
    n, m_batch = 100, 10
    g = generator(5)
    y = 1.0 + 2 * torch.randn(n, 1, generator=g, dtype=torch.float64)
    mean, s2 = float(y.mean()), float(y.var())
    full = mean**2 - 1 / n
    expected = mean**2 + s2 * (1 / m_batch - 1 / n) - 1 / m_batch
    assert expected - full == pytest.approx((s2 - 1) * (1 / m_batch - 1 / n), rel=1e-9)
    assert expected - full > 0.15
    # The mean gradient over batches at a value of ψ, from SGSMC: 0 at the compromise, not at the
    # maximum of the likelihood. 60 batches, standard error from their spread.
    slopes = {}
    for name, squared in (("full", full), ("compromise", expected)):
        smc = SGSMC(location(math.sqrt(squared)), 1000, generator=generator(6), n_move_steps=3)
        order, each = generator(7), []
        for _ in range(60):
            batch = y[torch.randperm(n, generator=order)[:m_batch]]
            smc.zero_grad()
            smc(torch.zeros_like(batch), batch).backward()
            exact = sg_gradient(math.sqrt(squared), batch, m_batch)
            each.append((-float(smc.model.network.body.psi.grad) * m_batch, exact))
        slopes[name] = np.array(each)
    # Batch by batch the gradient is the exact one, within the noise of 1,000 particles.
    for each in slopes.values():
        assert np.abs(each[:, 0] - each[:, 1]).mean() < 0.15
    # And the exact one vanishes over all batches at the compromise: checked by many of them.
    order = generator(8)
    psi = math.sqrt(expected)
    exact = [
        sg_gradient(psi, y[torch.randperm(n, generator=order)[:m_batch]], m_batch)
        for _ in range(20_000)
    ]
    assert abs(np.mean(exact)) < 4 * np.std(exact) / math.sqrt(20_000)
    exact = [
        sg_gradient(math.sqrt(full), y[torch.randperm(n, generator=order)[:m_batch]], m_batch)
        for _ in range(20_000)
    ]
    assert np.mean(exact) > 10 * np.std(exact) / math.sqrt(20_000)


@statistical
def test_refresh_is_the_posterior_of_a_bayesian_linear_layer():
    """Last layer stochastic, known noise: conjugate given the features."""
    x, y = regression(40)
    torch.manual_seed(0)
    body = MLP(3, (4,), 1).double()
    network = ParticleNetwork(Network(body, FixedNoise(0.5)), stochastic_names(body, "last"))
    result = refresh(network, x, y, n_particles=3000, prior_scale=2.0, generator=generator())
    with torch.no_grad():
        features = torch.cat([body[1](body[0](x)), torch.ones(40, 1).double()], 1)
    precision = features.T @ features / 0.25 + torch.eye(5).double() / 4
    cov = precision.inverse()
    mean = cov @ features.T @ y[:, 0] / 0.25
    marginal = 4 * features @ features.T + 0.25 * torch.eye(40).double()
    exact = stats.multivariate_normal(np.zeros(40), marginal.numpy()).logpdf(y[:, 0].numpy())
    w = result.log_weights.exp()
    found = w @ result.particles
    torch.testing.assert_close(
        found, mean, atol=6 * math.sqrt(float(cov.diag().max()) / 3000), rtol=0
    )
    centered = result.particles - found
    correlation = cov / torch.outer(cov.diag(), cov.diag()).sqrt()
    scaled = (w[:, None] * centered).T @ centered / torch.outer(cov.diag(), cov.diag()).sqrt()
    torch.testing.assert_close(scaled, correlation, atol=0.15, rtol=0)
    assert float(result.log_evidence) == pytest.approx(exact, abs=0.4)
    assert abs(float(result.log_evidence) - exact) < 4 * float(result.log_evidence_se)


# -- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stochastic", ["penultimate", "first", "last", "all", ["0.weight", "4"], ["2.bias"]]
)
@pytest.mark.parametrize("classes", [None, 3])
def test_batched_layers_equal_one_network_a_particle(stochastic, classes):
    x, y = regression(7)
    y = y if classes is None else torch.arange(7) % 3
    network = mlp(classes=classes, stochastic=stochastic)
    phi = torch.randn(5, network.dim, generator=generator(), dtype=torch.float64)
    found = network.log_likelihood_rows(phi, x, y)
    network._plain = False
    torch.testing.assert_close(network.log_likelihood_rows(phi, x, y), found)
    own = dict(network.network.body.named_parameters())
    for j in range(5):
        with torch.no_grad():
            for name, value in network.unflatten(phi[j : j + 1]).items():
                own[name].copy_(value[0])
        torch.testing.assert_close(-network.network.nll(x, y), found[:, j])


def test_convolutions_go_through_vmap():
    torch.manual_seed(0)
    body = ConvNet((8, 8), 3, channels=(4,))
    network = ParticleNetwork(
        Network(body, CategoricalLikelihood(3)), stochastic_names(body, "features.0")
    )
    assert not network._plain
    smc = OHSMC(network, 6, generator=generator())
    x, y = torch.randn(10, 8, 8), torch.arange(10) % 3
    smc(x, y).backward()
    assert all(p.grad is not None for p in smc.trained())
    assert network.network.body.features[0].weight.grad is None


def test_which_weights_are_stochastic():
    body = MLP(2, (100, 20, 5), 1)
    assert stochastic_names(body) == ["4.weight", "4.bias"]
    assert stochastic_names(body, "first") == ["0.weight", "0.bias"]
    assert stochastic_names(body, "6") == ["6.weight", "6.bias"]
    assert stochastic_names(body, ["2", "0.bias"]) == ["0.bias", "2.weight", "2.bias"]
    wide = stochastic_names(body, lambda name, m: getattr(m, "out_features", 0) >= 20)
    assert wide == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert stochastic_names(nn.Linear(2, 1)) == ["weight", "bias"]
    nested = nn.ModuleDict({"a": MLP(2, (3,), 3), "b": nn.Linear(3, 1)})
    assert stochastic_names(nested, "a") == ["a.0.weight", "a.0.bias", "a.2.weight", "a.2.bias"]
    for wrong, said in (
        ("layer3", r"no module 'layer3'; there are '0', '1'"),
        (["0", "9"], "no module '9'"),
        ([], "empty list"),
        (lambda name, m: False, "chose no module"),
        ("1", "'1' hold no parameters"),
    ):
        with pytest.raises(ParameterError, match=said):
            stochastic_names(body, wrong)
    with pytest.raises(ParameterError, match="no layer with weights"):
        stochastic_names(nn.ReLU())


def test_nothing_has_the_size_of_particles_times_deterministic_weights():
    """1,000 particles beside 4 million deterministic weights: 16 GB as a Jacobian."""
    body = nn.Sequential(
        nn.Linear(64, 2000), nn.ELU(), nn.Linear(2000, 2000), nn.ELU(), nn.Linear(2000, 4),
        nn.ELU(), nn.Linear(4, 1),
    )  # fmt: skip
    network = ParticleNetwork(Network(body, NormalLikelihood(1)), ["4.bias"])
    smc = OHSMC(network, 1000, generator=generator())
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Sizes():
        smc(torch.randn(8, 64), torch.randn(8, 1)).backward()
    assert max(sizes) == 2000 * 2000  # the gradient of ψ


# -- estimators ----------------------------------------------------------------------------------


def moons(seed=0, n=200):
    return make_moons(n, noise=0.3, random_state=seed)


QUICK = {"n_particles": 100, "max_epochs": 15, "batch_size": 20, "random_state": 0}


@pytest.mark.parametrize("move", ["ou", "rw", "mh", "langevin", "adaptive_rw"])
@pytest.mark.parametrize("resampling", ["stratified", "multinomial"])
def test_every_move_learns(move, resampling):
    X, y = moons()
    v = {"langevin": 1e-3, "mh": 1e-3}.get(move, 0.01)
    model = PartialBNNClassifier(
        move=move, resampling=resampling, move_var=v, n_move_steps=2, **QUICK
    ).fit(X, y)
    X_test, y_test = moons(1)
    assert model.score(X_test, y_test) > 0.8
    assert model.log_score(X_test, y_test) > -0.5
    found = model.diagnostics_
    n_steps = len(model.history_["train_loss"]) * 8
    assert len(found["ess"]) == len(found["unique_ancestors"]) == n_steps
    assert ((found["ess"] > 0) & (found["ess"] <= 1)).all()
    assert (len(found["acceptance"]) > 0) == (move == "mh")
    assert found["best_epoch"] >= 1
    assert found["log_evidence"] is None


def test_sgsmc_and_refresh_behind_the_api(tmp_path):
    X, y = moons(n=60)
    model = PartialBNNClassifier(
        algorithm="sgsmc", hidden=(8, 4), n_particles=60, max_epochs=2, batch_size=16,
        n_move_steps=2, random_state=0,
    ).fit(X, y)  # fmt: skip
    found = model.diagnostics_
    assert found["log_evidence"] < 0
    assert found["log_evidence_se"] > 0
    assert found["refresh"]["temperatures"][-1] == 1
    assert len(found["acceptance"]) > 0
    model.save(tmp_path / "m.uq")
    again = uq.load(tmp_path / "m.uq")
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    np.testing.assert_array_equal(again.diagnostics_["ess"], found["ess"])
    assert again.diagnostics_["log_evidence"] == found["log_evidence"]
    # The evidence prefers weights that were trained.
    start = PartialBNNClassifier(
        refresh=True, hidden=(8, 4), lr=1e-9, n_particles=60, max_epochs=1, random_state=0,
        batch_size=16,
    ).fit(X, y)  # fmt: skip
    trained = PartialBNNClassifier(
        refresh=True, hidden=(8, 4), n_particles=60, max_epochs=40, random_state=0, batch_size=16,
        patience=None,
    ).fit(X, y)  # fmt: skip
    assert trained.diagnostics_["log_evidence"] > start.diagnostics_["log_evidence"]


def test_regression_noise_and_epistemic_uncertainty():
    """y = sin 2x + N(0, 0.2²) on [−2, 2]: the noise is learned, and doubt grows outside."""
    rng = np.random.default_rng(0)
    X = rng.uniform(-2, 2, (400, 1))
    y = 10 * (np.sin(2 * X[:, 0]) + 0.2 * rng.normal(size=400))
    model = PartialBNNRegressor(n_particles=200, max_epochs=60, batch_size=40, random_state=0).fit(
        X, y
    )
    inside = model.predict_distribution(np.linspace(-2, 2, 50)[:, None])
    outside = model.predict_distribution(np.array([[-6.0], [6.0]]))
    assert float(inside.aleatoric.sqrt().mean()) == pytest.approx(2, rel=0.25)
    assert float(outside.epistemic.min()) > 5 * float(inside.epistemic.mean())
    grid = np.linspace(-2, 2, 50)
    assert np.abs(model.predict(grid[:, None]) - 10 * np.sin(2 * grid)).mean() < 1.5


def test_the_best_epoch_and_its_cloud_are_kept():
    X, y = moons(n=60)
    model = PartialBNNClassifier(**QUICK | {"max_epochs": 40}).fit(X, y)
    losses = model.history_["held_out_loss"]
    best = model.diagnostics_["best_epoch"]
    assert losses[best - 1] == min(losses)
    assert best < len(losses)
    shorter = PartialBNNClassifier(
        **QUICK | {"max_epochs": 40}, callbacks=[lambda s: s.epoch == best]
    )
    shorter.fit(X, y)
    assert torch.equal(shorter.posterior_.particles, model.posterior_.particles)


def test_particles_of_a_prediction():
    X, y = moons()
    model = PartialBNNClassifier(n_samples=7, **QUICK).fit(X, y)
    assert model.predict_distribution(X[:3]).n_draws == 7
    model.n_samples = 1000
    whole = model.predict_distribution(X[:3])
    assert whole.n_draws == 100
    posterior = model.posterior_
    assert isinstance(posterior, PartialPosterior)
    for name, values in posterior.draws(7).items():
        torch.testing.assert_close(values, posterior.draws()[name][[0, 14, 28, 42, 57, 71, 85]])
    # Functions are particles, each of them one.
    assert model.sample_functions(X[:3], 5).shape == (5, 3, 2)
    with pytest.raises(ParameterError, match="n_samples"):
        PartialBNNClassifier(n_samples=0).fit(X, y)


def test_weights_below_the_threshold_are_turned_into_equal_ones():
    """With τ < 1 the cloud at the end is weighted; predictions must count the weights."""
    X, y = moons()
    model = PartialBNNClassifier(ess_threshold=0.02, **QUICK | {"max_epochs": 1}).fit(X, y)
    phi = model.posterior_.particles
    assert len(phi.unique(dim=0)) < 70  # copies stand for weights


def test_choices_of_layers_survive_a_file(tmp_path):
    X, y = moons()

    def late(name, module):
        return name in ("2", "4")

    for stochastic in (late, ["2", "4"]):
        model = PartialBNNClassifier(
            hidden=(12, 6), stochastic=stochastic, **QUICK | {"max_epochs": 4}
        ).fit(X, y)
        assert model.stochastic_ == ["2.weight", "2.bias", "4.weight", "4.bias"]
        model.save(tmp_path / "m.uq")
        again = uq.load(tmp_path / "m.uq")
        np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))


def test_one_particle_works_and_has_no_epistemic_uncertainty():
    X, y = moons()
    model = PartialBNNClassifier(**QUICK | {"n_particles": 1}).fit(X, y)
    assert np.isfinite(model.log_score(X, y))
    with pytest.raises(UQError, match="epistemic"):
        _ = model.predict_distribution(X).epistemic


@pytest.mark.parametrize("gradient", ["pre", "post"])
@pytest.mark.parametrize("threshold", [1.0, 0.3])
def test_nan_particles_are_left_out_of_cloud_and_gradient(gradient, threshold):
    class Fragile(nn.Module):
        """Overflows for a positive weight of the cloud."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 1), nn.Linear(1, 2)

        def forward(self, x):
            weight = self.first.weight[0, 0]
            return self.last(torch.tanh(self.first(x)) + torch.where(weight > 0.5, math.nan, 0.0))

    X, y = moons()
    model = PartialBNNClassifier(
        module=Fragile(), stochastic="first", gradient=gradient, ess_threshold=threshold, **QUICK
    ).fit(X, y)
    assert np.isfinite(model.log_score(X, y))
    assert np.isfinite(model.history_["train_loss"]).all()
    assert float(model.posterior_.particles[:, 0].max()) <= 0.5
    assert model.diagnostics_["impossible"][0] > 10


def test_collapse_is_said_with_the_remedy():
    X, y = load_diabetes(return_X_y=True)
    with pytest.warns(ParticleWarning, match=r"collapsed.*100 \(median\).*Lower batch_size.*mh"):
        PartialBNNRegressor(
            hidden=(50, 50), move_var=0.3, n_particles=100, max_epochs=30, batch_size=400,
            random_state=0,
        ).fit(X, y)  # fmt: skip


def test_interrupted_refresh_keeps_the_cloud(monkeypatch):
    X, y = moons()
    plain = PartialBNNClassifier(**QUICK).fit(X, y)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("uq.models.pbnn.refresh", stop)
    with pytest.warns(FitInterruptedWarning, match="refresh: interrupted; the cloud of training"):
        model = PartialBNNClassifier(refresh=True, **QUICK).fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), plain.predict_proba(X))


def test_interrupted_sgsmc_keeps_the_epochs_done():
    X, y = moons(n=40)
    calls = []

    def interrupt(state):
        calls.append(state.epoch)
        if state.epoch == 2:
            raise KeyboardInterrupt

    with pytest.warns(FitInterruptedWarning, match="after 2 epochs"):
        model = PartialBNNClassifier(
            algorithm="sgsmc", refresh=False, hidden=(4, 3), n_move_steps=1, n_particles=30,
            max_epochs=9, batch_size=16, callbacks=[interrupt], random_state=0,
        ).fit(X, y)  # fmt: skip
    assert np.isfinite(model.log_score(X, y))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stochastic": "layer7"}, r"PartialBNNClassifier: stochastic: .*no module 'layer7'"),
        ({"stochastic": ["0", "seven"]}, "no module 'seven'; there are '0', '1'"),
        ({"algorithm": "smc"}, "algorithm must be one of 'ohsmc', 'sgsmc'"),
        ({"n_particles": 0}, "n_particles must be an integer >= 1, got 0"),
        ({"move": "nuts"}, "move must be one of 'ou', 'rw'"),
        ({"move_var": 0}, "move_var must be a number > 0"),
        ({"move_var": 2.0}, r"move_var must be below prior_scale² = 1"),
        ({"n_move_steps": 1.5}, "n_move_steps"),
        ({"prior_scale": -1}, "prior_scale"),
        ({"ess_threshold": 1.5}, r"ess_threshold must be a number in \(0, 1\]"),
        ({"resampling": "best"}, "resampling must be one of"),
        ({"gradient": "mid"}, "gradient must be one of 'pre', 'post'"),
        ({"refresh": "yes"}, "refresh must be True, False or None"),
        ({"validation_fraction": 1}, "validation_fraction must be a number > 0 and < 1"),
    ],
)
def test_bad_arguments_are_named(changes, said):
    X, y = moons()
    with pytest.raises(ParameterError, match=said):
        PartialBNNClassifier(**QUICK | changes).fit(X, y)


# -- results -------------------------------------------------------------------------------------


def paper_network(d_in, d_out):
    """2–100–20–5–2 with tanh-GELU and Xavier-normal weights."""
    sides = (d_in, 100, 20, 5, d_out)
    layers = []
    for i in range(4):
        layers += [nn.Linear(sides[i], sides[i + 1]), nn.GELU("tanh")]
        nn.init.xavier_normal_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@statistical
def test_two_moons_in_the_bands_of_the_paper():
    """100 rows each to train, stop and test on: NLPD 0.288 ± 0.05, and no worse than without a
    cloud."""
    ours, single, accuracy = [], [], []
    for seed in range(8):
        X, y = moons(seed)
        X_test, y_test = moons(10_000 + seed, 100)
        settings = {
            "module": paper_network, "max_epochs": 100, "batch_size": 20, "patience": 100,
            "validation_fraction": 0.5, "move": "rw", "precision": "64-true", "random_state": seed,
        }  # fmt: skip
        model = PartialBNNClassifier(n_samples=1000, **settings).fit(X, y)
        ours.append(-model.log_score(X_test, y_test))
        accuracy.append(model.score(X_test, y_test))
        one = PartialBNNClassifier(**settings, n_particles=1).fit(X, y)
        single.append(-one.log_score(X_test, y_test))
    assert 0.2 < np.mean(ours) < 0.338
    assert np.mean(accuracy) >= 0.86
    assert np.mean(ours) <= np.mean(single)


@pytest.mark.slow
@statistical
def test_breast_cancer_against_map():
    """Same network and rule of stopping: no worse than MAP, over 4 splits."""
    X, y = load_breast_cancer(return_X_y=True)
    scores = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(X))
        train, test = order[:400], order[400:]
        settings = {"hidden": (50, 20, 5), "max_epochs": 60, "random_state": seed}
        ours = PartialBNNClassifier(**settings).fit(X[train], y[train])
        theirs = MAPClassifier(lr=1e-2, **settings).fit(X[train], y[train])
        scores.append((-ours.log_score(X[test], y[test]), -theirs.log_score(X[test], y[test])))
    assert np.mean(scores, 0)[0] <= np.mean(scores, 0)[1] + 0.02


def test_diabetes_regression_beats_a_constant():
    X, y = load_diabetes(return_X_y=True)
    model = PartialBNNRegressor(n_particles=100, max_epochs=20, random_state=0).fit(
        X[:300], y[:300]
    )
    constant = stats.norm(y[:300].mean(), y[:300].std()).logpdf(y[300:]).mean()
    assert model.log_score(X[300:], y[300:]) > constant + 0.15


@pytest.mark.parametrize("stochastic", ["4", "2", "0"])
def test_an_activation_that_comes_again_is_not_left_out(stochastic):
    # One module object at two places of a chain has one name among the children.
    x, _ = regression(7)
    torch.manual_seed(0)
    act = nn.Tanh()
    body = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 3), act, nn.Linear(3, 1)).double()
    network = ParticleNetwork(Network(body, FixedNoise(0.5)), stochastic_names(body, [stochastic]))
    phi = torch.randn(5, network.dim, generator=generator(), dtype=torch.float64)
    expected = torch.stack(
        [
            functional_call(body, {k: v[j] for k, v in network.unflatten(phi).items()}, x)
            for j in range(5)
        ],
        1,
    )
    torch.testing.assert_close(network.outputs(phi, x), expected)


def test_layers_before_the_particles_run_once_in_training_and_prediction():
    x, y = regression(40)
    runs = []

    class Counted(nn.Linear):
        def forward(self, h):
            runs.append(len(h))
            return super().forward(h)

    torch.manual_seed(0)
    body = nn.Sequential(nn.Sequential(Counted(3, 6), nn.Tanh()), nn.Linear(6, 1)).double()
    whole = Network(body, NormalLikelihood(1))
    network = ParticleNetwork(whole, ["1.weight", "1.bias"], max_memory_mb=0.001)
    phi = torch.randn(30, network.dim, generator=generator(), dtype=torch.float64)
    assert network.particles_at_once(x) < 10
    runs.clear()
    network(phi, x, y).sum().backward()
    assert runs == [40]
    posterior = PartialPosterior(whole, ["1.weight", "1.bias"], phi)
    runs.clear()
    dist = posterior(x, 30)
    assert runs == [40]
    each = [
        functional_call(body, {k: v[j] for k, v in network.unflatten(phi).items()}, x)
        for j in range(30)
    ]
    torch.testing.assert_close(dist.mean, torch.stack(each).mean(0).to(dist.mean.dtype))

"""Leave-one-out and merging against exact answers on linear models."""

import numpy as np
import pytest
import torch
from torch import nn

from uq import IVONClassifier, IVONRegressor
from uq.errors import DataError, ParameterError
from uq.inference import IVON, MixturePosterior, NormalPosterior, leave_one_out, merge
from uq.nn import MLP, CategoricalLikelihood, Network, NormalLikelihood, NormalPrior


def fixed_noise(d, scale):
    """Linear regression without bias; the noise scale is known and frozen."""
    likelihood = NormalLikelihood(1).double()
    raw = scale - 1e-3
    likelihood.raw_scale.data.fill_(raw + np.log(-np.expm1(-raw)) - likelihood.offset)
    likelihood.raw_scale.requires_grad_(False)
    return Network(nn.Linear(d, 1, bias=False).double(), likelihood)


def exact(X, y, noise, prior_precision):
    precision = X.T @ X / noise**2 + prior_precision * np.eye(X.shape[1])
    return np.linalg.solve(precision, X.T @ y / noise**2), precision


def posterior_of(X, y, noise, prior_precision):
    """Exact mean-field posterior: mean, and the diagonal of the precision."""
    network = fixed_noise(X.shape[1], noise)
    mean, precision = exact(X, y, noise, prior_precision)
    network.body.weight.data = torch.tensor(mean)[None]
    std = torch.tensor(1 / np.sqrt(np.diag(precision)))[None]
    return NormalPosterior(network, {"body.weight": std})


@pytest.fixture
def orthogonal():
    rng = np.random.default_rng(0)
    X, _ = np.linalg.qr(rng.normal(size=(20, 4)))
    X = X * np.sqrt(20)
    return X, X @ rng.normal(size=4) + 0.3 * rng.normal(size=20)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_relative_error_of_leave_one_out_is_the_leverage(orthogonal, temperature):
    """True shift e·lev/(1 − lev), first order e·lev; tempering counts an example λ/N times."""
    X, y = orthogonal
    noise, s0 = 0.3, 2.0
    n_times = 1 / temperature
    posterior = posterior_of(X, y, noise * np.sqrt(temperature), s0)
    posterior.network = fixed_noise(4, noise)
    mean, precision = exact(X, y, noise * np.sqrt(temperature), s0)
    posterior.network.body.weight.data = torch.tensor(mean)[None]
    found = leave_one_out(posterior, torch.tensor(X), torch.tensor(y)[:, None], weight=n_times)
    for i in range(len(X)):
        rest = np.arange(len(X)) != i
        without, _ = exact(X[rest], y[rest], noise * np.sqrt(temperature), s0)
        true = X[i] @ without - X[i] @ mean
        leverage = n_times * X[i] @ np.linalg.solve(precision, X[i]) / noise**2
        assert 1 - found.shift[i, 0].item() / true == pytest.approx(leverage, rel=1e-9)
    # The likelihood is then exact at the moved mean.
    moved = torch.tensor(X @ mean)[:, None] + found.shift
    z = (torch.tensor(y)[:, None] - moved) / noise
    nll = (0.5 * z.square() + np.log(noise) + 0.5 * np.log(2 * np.pi))[:, 0]
    torch.testing.assert_close(found.nll, nll, rtol=1e-9, atol=0)
    assert torch.equal(found.sensitivity, found.shift[:, 0].abs())


def test_shift_uses_the_whole_output_covariance():
    """Against J diag(σ²) Jᵀ e with explicit Jacobians; its diagonal alone gives something else."""
    torch.manual_seed(0)
    network = Network(MLP(3, (5,), 4), CategoricalLikelihood(4)).double()
    stds = {k: 0.1 + 0.2 * torch.rand_like(p) for k, p in network.named_parameters()}
    posterior = NormalPosterior(network, stds)
    x, y = torch.randn(6, 3).double(), torch.arange(6) % 4
    weight = torch.tensor([1.0, 2, 1, 0, 1, 1]).double()
    # Chunks of one row give what one chunk gives.
    found = leave_one_out(posterior, x, y, weight=weight)
    again = leave_one_out(posterior, x, y, weight=weight, max_memory_mb=1e-9)
    torch.testing.assert_close(found.shift, again.shift, rtol=1e-12, atol=1e-15)
    parameters = [*network.body.parameters()]
    variance = torch.cat(
        [stds[f"body.{k}"].square().reshape(-1) for k, _ in network.body.named_parameters()]
    )
    for i in range(6):
        logits = network.body(x[i : i + 1])[0]
        rows = [torch.autograd.grad(f, parameters, retain_graph=True) for f in logits]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in r]) for r in rows])
        e = logits.softmax(-1) - torch.eye(4).double()[y[i]]
        v = jacobian * variance @ jacobian.T
        torch.testing.assert_close(found.shift[i], weight[i] * v @ e, rtol=1e-9, atol=1e-14)
        moved = (logits + weight[i] * v @ e).log_softmax(-1)[y[i]]
        assert found.nll[i].item() == pytest.approx(-moved.item(), rel=1e-9)
        if weight[i]:
            diagonal = weight[i] * v.diag() * e
            assert (found.shift[i] - diagonal).abs().max() > 0.01 * found.shift[i].abs().max()


def test_noise_scale_moves_with_the_weights():
    """A learned noise scale is a weight: leaving out the worst fitted row makes it smaller."""
    torch.manual_seed(0)
    network = Network(nn.Linear(2, 1).double(), NormalLikelihood(1).double())
    posterior = NormalPosterior(
        network, {k: torch.full_like(p, 0.1) for k, p in network.named_parameters()}
    )
    x, y = torch.randn(5, 2).double(), torch.zeros(5, 1).double()
    y[0] = 30.0
    _, scale = leave_one_out(posterior, x, y).parameters
    _, before = network(x)
    assert scale[0, 0] < before[0, 0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_recurrent_network_is_explained():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(1, 2, batch_first=True)

        def forward(self, x):
            return self.rnn(x[..., None])[0][:, -1]

    posterior = NormalPosterior(Network(Recurrent(), CategoricalLikelihood(2)), {})
    with pytest.raises(ParameterError, match="recurrent"):
        leave_one_out(posterior, torch.randn(3, 4), torch.tensor([0, 1, 0]))


# -- merging ---------------------------------------------------------------------------------


def test_models_of_disjoint_data_merge_to_the_model_of_all():
    """Quadratic losses with diagonal Hessians under one prior: exact."""
    rng = np.random.default_rng(1)
    noise, prior = 0.5, NormalPrior(0.7)
    blocks = []
    for _ in range(3):
        X, _ = np.linalg.qr(rng.normal(size=(12, 3)))
        X = X * rng.uniform(1, 3, 3)
        blocks.append((X, X @ rng.normal(size=3) + noise * rng.normal(size=12)))
    parts = [posterior_of(X, y, noise, prior.precision) for X, y in blocks]
    X, y = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    mean, precision = exact(X, y, noise, prior.precision)
    merged = merge(prior, parts)
    np.testing.assert_allclose(merged.network.body.weight.detach()[0], mean, rtol=1e-12)
    np.testing.assert_allclose(merged.stds["body.weight"][0] ** -2, np.diag(precision), rtol=1e-12)
    # Plain averaging is off, in units of the posterior's deviation.
    average = np.mean([p.network.body.weight.detach()[0].numpy() for p in parts], 0)
    assert (np.abs(average - mean) * np.sqrt(np.diag(precision))).max() > 0.5
    # The noise scale was frozen, and stays.
    assert torch.equal(merged.network.likelihood.raw_scale, parts[0].network.likelihood.raw_scale)
    assert (merged.stds["likelihood.raw_scale"] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_fine_tuned_models_merge_to_the_joint_minimiser(scale):
    """m_t minimises ½h_t(θ − b_t)² + ½H₀(θ − m₀)²; merged: α Σ_t of the first, plus the second."""
    rng = np.random.default_rng(2)
    d = 4
    h0, m0 = rng.uniform(1, 5, d), rng.normal(size=d)
    h, b = rng.uniform(0.5, 8, (3, d)), rng.normal(size=(3, d))
    tuned = (h * b + h0 * m0) / (h + h0)

    def model(mean, precision):
        network = fixed_noise(d, 1.0)
        network.body.weight.data = torch.tensor(mean)[None]
        return NormalPosterior(network, {"body.weight": torch.tensor(precision**-0.5)[None]})

    merged = merge(model(m0, h0), [model(m, p) for m, p in zip(tuned, h, strict=True)], scale=scale)
    joint = (h0 * m0 + scale * (h * b).sum(0)) / (h0 + scale * h.sum(0))
    np.testing.assert_allclose(merged.network.body.weight.detach()[0], joint, rtol=1e-12)
    arithmetic = m0 + scale * (tuned - m0).sum(0)
    assert np.abs(arithmetic - joint).max() > 0.1


def test_merging_explains_what_does_not_fit():
    small, large = (NormalPosterior(fixed_noise(d, 1.0), {}) for d in (2, 3))
    with pytest.raises(ParameterError, match="one architecture"):
        merge(NormalPrior(1.0), [small, large])
    with pytest.raises(ParameterError, match="at least one"):
        merge(NormalPrior(1.0), [])
    with pytest.raises(ParameterError, match="scale"):
        merge(NormalPrior(1.0), [small], scale=0)


# -- estimators ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy():
    rng = np.random.default_rng(3)
    X = rng.normal(size=(120, 2))
    y = (X[:, 0] + 0.5 * X[:, 1] > 0).astype(int)
    wrong = np.arange(0, 120, 15)
    y[wrong] = 1 - y[wrong]
    return X, y, wrong


def test_mislabelled_rows_are_the_sensitive_ones(noisy):
    X, y, wrong = noisy
    names = np.array(["no", "yes"])[y]
    model = IVONClassifier(hidden=(16,), max_epochs=60, random_state=0).fit(X, names)
    scores = model.sensitivity(X, names)
    clear = wrong[np.abs(X[wrong, 0] + 0.5 * X[wrong, 1]) > 0.3]
    assert set(clear) <= set(np.argsort(-scores)[: 2 * len(wrong)])
    dist = model.leave_one_out(X, names)
    assert list(dist.classes) == ["no", "yes"]
    # Leaving out costs: more than the training loss, by the mean of the shifts.
    train = float(-model.predict_distribution_at_mean(X).log_prob(torch.tensor(y)).mean())
    assert model.generalization_nll(X, names) > train
    # Weights count: a row of weight 2 moves twice as far.
    weight = np.where(np.arange(120) == 5, 2.0, 1.0)
    np.testing.assert_allclose(model.sensitivity(X, names, weight) / scores, weight, rtol=1e-5)


def test_regression_estimate_is_in_target_units(noisy):
    X, _, _ = noisy
    y = 100 * X[:, 0] + 10 * np.random.default_rng(0).normal(size=120)
    model = IVONRegressor(hidden=(8,), max_epochs=60, random_state=0).fit(X, y)
    scaled = IVONRegressor(hidden=(8,), max_epochs=60, random_state=0).fit(X, y / 100)
    difference = model.generalization_nll(X, y) - scaled.generalization_nll(X, y / 100)
    assert difference == pytest.approx(np.log(100), rel=1e-4)
    assert np.corrcoef(model.leave_one_out(X, y).mean, y)[0, 1] > 0.9


def test_members_are_mixed(noisy, tmp_path):
    import uq

    X, y, _ = noisy
    model = IVONClassifier(hidden=(8,), max_epochs=5, n_samples=4, n_members=3, random_state=0)
    dist = model.fit(X, y).predict_distribution(X)
    posterior = model.posterior_
    assert isinstance(posterior, MixturePosterior)
    assert (model.n_members_, dist.n_draws) == (3, 12)
    x = torch.tensor((X - model.x_mean_) / model.x_scale_, dtype=torch.float32)
    each = torch.stack([m(x, 4).probs for m in posterior.members])
    torch.testing.assert_close(dist.probs, each.mean(0), rtol=1e-6, atol=1e-9)
    assert (each[0] - each[1]).abs().max() > 1e-3
    assert model.predict_distribution_at_mean(X).n_draws == 3
    assert model.sample_functions(X, 5).shape == (5, 120, 2)
    assert model.sensitivity(X, y).shape == (120,)
    model.save(tmp_path / "model.uq")
    loaded = uq.load(tmp_path / "model.uq")
    assert torch.equal(loaded.predict_distribution(X).probs, dist.probs)
    assert np.isfinite(loaded.generalization_nll(X, y))


def test_targets_and_weights_are_not_broadcast(noisy):
    X, y, _ = noisy
    settings = {"hidden": (4,), "max_epochs": 2, "random_state": 0}
    two = np.stack([X[:, 0], X[:, 1]], 1)
    one, both = IVONRegressor(**settings).fit(X, two[:, 0]), IVONRegressor(**settings).fit(X, two)
    classes = IVONClassifier(**settings).fit(X, y)
    assert both.sensitivity(X, two).shape == (120,)
    for model, bad in ((both, two[:, 0]), (both, two[:, :1]), (one, two), (classes, y[:-1])):
        with pytest.raises(DataError, match="y must have shape"):
            model.sensitivity(X, bad)
    for weight in (np.ones(1), np.ones(119), np.full(120, -1.0), np.full(120, np.nan)):
        with pytest.raises(DataError, match="sample_weight must hold 120"):
            classes.sensitivity(X, y, weight)


def test_the_mean_has_no_epistemic_part(noisy):
    X, y, _ = noisy
    model = IVONClassifier(hidden=(8,), max_epochs=5, random_state=0).fit(X, y)
    dist = model.predict_distribution_at_mean(X)
    with pytest.raises(NotImplementedError):
        _ = dist.epistemic
    x = torch.tensor((X - model.x_mean_) / model.x_scale_, dtype=torch.float32)
    expected = model.posterior_.network.body(x).softmax(-1)
    torch.testing.assert_close(dist.probs.float(), expected, rtol=1e-5, atol=1e-7)


def test_optimizer_gives_the_posterior():
    network = Network(MLP(2, (4,), 3), CategoricalLikelihood(3))
    optimizer = IVON(network.parameters(), 0.1, ess=50, weight_decay=0.1, hess_init=0.9)
    posterior = optimizer.posterior(network)
    std = torch.cat([s.reshape(-1) for s in posterior.stds.values()])
    torch.testing.assert_close(std, torch.full_like(std, 50**-0.5), rtol=1e-6, atol=0)

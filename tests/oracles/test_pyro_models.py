"""Pyro models behind the interface: exact posteriors by SVI and MCMC, families, stores, files."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from scipy import stats
from sklearn.base import clone
from torch import nn

import uq
from uq import PyroClassifier, PyroRegressor
from uq.errors import ParameterError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 2))
Y = 3 + X @ [1.5, -0.7] + 0.5 * RNG.normal(size=30)
WEIGHT = np.linspace(0.5, 2, 30)
EXACT = {"precision": "64-true", "random_state": 0}


def linear(x, y=None):
    weight = pyro.sample("weight", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    bias = pyro.sample("bias", dist.Normal(1.0, 3.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ weight + bias, 0.5), obs=y)


def bernoulli(x, y=None):
    weight = pyro.sample("weight", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=y)


def posterior():
    design = np.column_stack([X, np.ones(30)])
    prior = np.diag(1 / np.array([2.0, 2.0, 3.0]) ** 2)
    precision = design.T @ (WEIGHT[:, None] * design) / 0.25 + prior
    mean = np.linalg.solve(precision, design.T @ (WEIGHT * Y) / 0.25 + prior @ [0, 0, 1.0])
    return mean, np.linalg.inv(precision)


def check_against_exact(model, effective):
    draws = model.posterior_.draws
    flat = torch.cat([draws["weight"], draws["bias"][:, None]], 1).numpy()
    mean, covariance = posterior()
    std = np.sqrt(covariance.diagonal())
    # Five standard errors of so many independent draws.
    assert (np.abs(flat.mean(0) - mean) / std).max() < 5 / effective**0.5
    assert np.abs(np.log(flat.std(0) / std)).max() < 5 / (2 * effective) ** 0.5
    correlation = covariance / np.outer(std, std)
    assert np.abs(np.corrcoef(flat.T) - correlation).max() < 5 / effective**0.5
    new = np.array([[0.3, -1.0], [2.0, 2.0]])
    at = np.column_stack([new, np.ones(2)])
    predicted = model.predict_distribution(new)
    spread = np.sqrt(np.einsum("ij,jk,ik->i", at, covariance, at))
    assert (np.abs(predicted.mean.numpy() - at @ mean) / spread).max() < 5 / effective**0.5
    np.testing.assert_allclose(predicted.aleatoric, 0.25)
    np.testing.assert_allclose(predicted.epistemic, spread**2, rtol=5 * (2 / effective) ** 0.5)


@pytest.mark.statistical
def test_variational_inference_reaches_the_exact_posterior():
    model = PyroRegressor(
        linear, guide=AutoMultivariateNormal, max_epochs=1500, lr=0.03, n_draws=600, **EXACT
    )
    # 400 rather than 600: the gradient's noise leaves the guide within a few percent.
    check_against_exact(model.fit(X, Y, sample_weight=WEIGHT), 400)
    assert model.history_["train_loss"][-1] < model.history_["train_loss"][0]


@pytest.mark.statistical
def test_pyros_nuts_reaches_the_exact_posterior():
    kernel = partial(NUTS, jit_compile=False)
    model = PyroRegressor(linear, kernel=kernel, n_chains=2, n_warmup=100, n_draws=250, **EXACT)
    check_against_exact(model.fit(X, Y, sample_weight=WEIGHT), 250)
    assert model.sample_stats_["diverging"].shape == (2, 250)
    assert 0.5 < model.sample_stats_["acceptance_rate"].mean() < 1
    found = model.diagnostics(X)
    assert not any("diverged" in w or "disagree" in w for w in found.warnings)
    assert set(found.table.index) >= {"weight", "bias", "prediction", "divergences"}


def test_users_store_and_model_are_left_alone():
    class Network(PyroModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(2, 4)
            self.head = PyroModule[nn.Linear](4, 1)
            self.head.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))

        def forward(self, x, y=None):
            scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
            mean = self.head(self.body(x).tanh())[:, 0]
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(mean, scale), obs=y)

    pyro.get_param_store().setdefault("scale", torch.tensor(7.0))
    net = Network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model = PyroRegressor(net, guide=AutoNormal, max_epochs=200, n_draws=20, random_state=0)
    model.fit(X, Y)
    assert list(pyro.get_param_store().keys()) == ["scale"]
    assert pyro.param("scale") == 7
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    learned = model.posterior_.params["scale"]
    assert 0.05 < learned < 1.5
    assert learned != 1
    np.testing.assert_allclose(model.predict_distribution(X).aleatoric, learned**2, rtol=1e-6)
    # The network below was trained, too: in a copy.
    trained = model.posterior_.module.body.weight
    assert not torch.equal(trained, net.body.weight)
    pyro.get_param_store().clear()


def test_files_and_clones(tmp_path):
    model = PyroRegressor(linear, guide=AutoNormal, max_epochs=30, n_draws=10, random_state=0)
    first = model.fit(X, Y).predict_distribution(X)
    model.save(tmp_path / "model.uq")
    with pytest.raises(uq.UQError, match="module="):
        uq.load(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq", module=linear)
    assert torch.equal(again.predict_distribution(X).loc, first.loc)
    same = clone(model).fit(X, Y).predict_distribution(X)
    assert torch.equal(same.loc, first.loc)
    with pytest.raises(ParameterError, match="fit with kernel="):
        model.diagnostics(X)
    functions = model.sample_functions(X, 4)
    assert functions.shape == (4, 30)
    np.testing.assert_allclose(model.sample_functions(X[3:5], 4), functions[:, 3:5], rtol=1e-5)


def test_classes_by_categorical_and_bernoulli_agree():
    labels = np.where(Y.mean() < Y, "high", "low")

    def categorical(x, y=None):
        weight = pyro.sample("weight", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            logits = torch.stack([torch.zeros(len(x)), x @ weight], -1)
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    settings = {"guide": AutoNormal, "max_epochs": 200, "n_draws": 50, **EXACT}
    first, second = (PyroClassifier(m, **settings).fit(X, labels) for m in (bernoulli, categorical))
    np.testing.assert_allclose(first.predict_proba(X), second.predict_proba(X), rtol=1e-9)
    assert first.score(X, labels) > 0.8
    assert set(first.predict(X)) == {"high", "low"}
    assert (first.predict_distribution(X).epistemic > 0).all()


def test_several_targets_other_families_and_latents_of_rows():
    both = np.stack([Y, -2 * Y], 1)

    def robust(x, y=None):
        weight = pyro.sample("weight", dist.Normal(0.0, 2.0).expand([2, 2]).to_event(2))
        with pyro.plate("data", len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 0.3))
            noise = dist.StudentT(4.0, x @ weight + shift[:, None], 1.0).to_event(1)
            return pyro.sample("observed", noise, obs=y)

    model = PyroRegressor(robust, guide=AutoNormal, max_epochs=50, n_draws=12, random_state=0)
    model.fit(X, both)
    assert model.site_ == "observed"
    assert list(model.posterior_.draws) == ["weight"]
    predicted = model.predict_distribution(X[:5])
    assert predicted.batch_shape == (5, 2)
    assert np.isfinite(model.log_score(X, both))
    assert (predicted.epistemic > 0).all()


def test_tree_of_chains_for_arviz():
    """Against the density written out, at the draws that the tree holds."""
    kernel = partial(HMC, step_size=0.05, num_steps=4, adapt_step_size=False)
    settings = {"kernel": kernel, "n_chains": 2, "n_warmup": 20, "n_draws": 15, **EXACT}
    model = PyroRegressor(linear, **settings).fit(X, Y)
    tree = model.to_inference_data(X[:7], Y[:7])
    posterior = tree["posterior"]
    assert dict(posterior.sizes)["chain"] == 2
    weight, bias = posterior["weight"].to_numpy(), posterior["bias"].to_numpy()
    assert (weight[0] != weight[1]).all()
    mean = weight @ X[:7].T + bias[..., None]
    np.testing.assert_allclose(posterior["prediction"], mean, rtol=1e-12)
    rows = stats.norm(mean, 0.5).logpdf(Y[:7])
    np.testing.assert_allclose(tree["log_likelihood"]["y"], rows, rtol=1e-12)
    np.testing.assert_allclose(posterior["log_likelihood"], rows.sum(-1), rtol=1e-12)
    assert set(tree["sample_stats"].data_vars) == set(model.sample_stats_)
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y[:7])
    assert tree.attrs["estimator"] == "PyroRegressor"
    assert set(model.to_inference_data()["posterior"].data_vars) == {"weight", "bias"}


def test_tree_of_a_guide_is_one_chain_of_any_targets():
    labels = np.where(Y > 3, "high", "low")
    settings = {"guide": AutoNormal, "max_epochs": 50, "n_draws": 12, **EXACT}
    classifier = PyroClassifier(bernoulli, **settings).fit(X, labels)
    tree = classifier.to_inference_data(X, labels)
    assert tree["posterior"]["prediction"].shape == (1, 12, 30, 2)
    assert "sample_stats" not in tree.children
    picked = np.exp(tree["log_likelihood"]["y"]).mean(("chain", "draw"))
    expected = classifier.predict_proba(X)[np.arange(30), (labels == "low").astype(int)]
    np.testing.assert_allclose(picked, expected, rtol=1e-12)

    def two(x, y=None):
        weight = pyro.sample("weight", dist.Normal(0.0, 2.0).expand([2, 2]).to_event(2))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ weight, 1.0).to_event(1), obs=y)

    both = np.stack([Y, -2 * Y], 1)
    model = PyroRegressor(two, **settings).fit(X, both)
    tree = model.to_inference_data(X, both)
    mean = np.einsum("nd,csdm->csnm", X, tree["posterior"]["weight"].to_numpy())
    rows = stats.norm(mean, 1.0).logpdf(both).sum(-1)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], rows, rtol=1e-12)


def test_interrupted_chains_are_kept(monkeypatch):
    started = []

    class Pressed(HMC):
        def sample(self, params):
            if len(started) == 2 and self._t == 12:
                raise KeyboardInterrupt
            return super().sample(params)

    def kernel(model):
        started.append(model)
        return Pressed(model, step_size=0.05, num_steps=3, adapt_step_size=False)

    model = PyroRegressor(linear, kernel=kernel, n_chains=3, n_warmup=5, n_draws=20, **EXACT)
    with pytest.warns(UserWarning, match="in chain 2: interrupted; 1 whole chains are kept"):
        model.fit(X, Y)
    assert model.n_chains_ == 1
    assert model.stop_reason_ == "interrupted"
    assert model.predict_distribution(X).n_draws == 20


def test_bad_models():
    def silent(x, y=None):
        pyro.sample("weight", dist.Normal(0.0, 1.0))

    def one_event(x, y=None):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(x[:, 0] * weight, 1.0).to_event(1), obs=y)

    for arguments, message in (
        ({}, "model must be a Pyro model"),
        ({"model": linear}, "either guide=.* or kernel="),
        ({"model": linear, "guide": AutoNormal, "kernel": NUTS}, "either guide="),
        ({"model": silent, "guide": AutoNormal}, "observe y at one site"),
        ({"model": one_event, "guide": AutoNormal}, "batch element for each of 30 rows"),
        ({"model": linear, "guide": lambda x, y=None: None}, "no parameters|no site"),
        ({"model": linear, "guide": AutoNormal, "n_draws": 0}, "n_draws"),
    ):
        with pytest.raises(ParameterError, match=message):
            PyroRegressor(**arguments).fit(X, Y)

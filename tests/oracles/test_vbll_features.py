"""Uncertain features: a Normal posterior over the body's weights below an analytic last layer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_wine
from torch import nn
from torch.func import functional_call

import uq
from uq import VBLLClassifier, VBLLRegressor
from uq.distributions import NormalMixture, Parametric, mixture
from uq.errors import DataError, ParameterError
from uq.inference import IVON
from uq.inference.posterior import BayesianFeaturesPosterior, LastLayerPosterior
from uq.nn import VBLLClassification, VBLLRegression

QUICK = {"hidden": (16,), "max_epochs": 10, "batch_size": 32, "random_state": 0, "lr": 0.02}
BAYESIAN = QUICK | {"features": "bayesian", "n_samples": 8}
CASES = [
    (VBLLRegressor, {}),
    (VBLLRegressor, {"noise": "heteroscedastic"}),
    (VBLLClassifier, {}),
    (VBLLClassifier, {"head": "heteroscedastic", "covariance": "diagonal"}),
]


def rows_of(cls):
    X, y = (load_diabetes if cls is VBLLRegressor else load_wine)(return_X_y=True)
    return X[:160:2], y[:160:2]


def parts(seed=0, std=0.1):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(3, 5), nn.Tanh()).double()
    stds = {name: torch.full_like(p, std) for name, p in body.named_parameters()}
    return body, stds, torch.randn(7, 3, dtype=torch.float64)


def test_certain_weights_give_the_last_layer_alone():
    body, _, x = parts()
    for head in (VBLLRegression(5, 2).double(), VBLLClassification(5, 3).double()):
        nn.init.normal_(head.weights.mean)
        plain = LastLayerPosterior(body, head)(x, 4000)
        mixed = BayesianFeaturesPosterior(body, head, {})(x, 400)
        if isinstance(plain, NormalMixture):
            torch.testing.assert_close(mixed.mean, plain.mean)
            torch.testing.assert_close(mixed.variance, plain.variance)
            torch.testing.assert_close(mixed.epistemic, plain.epistemic)
        else:  # both average over draws of the last layer
            error = plain.logits.exp().std(0) * (1 / 400 + 1 / 4000) ** 0.5
            assert ((mixed.probs - plain.probs).abs() < 5 * error).all()


def test_mixture_over_bodies_by_hand():
    """Total variance: E[σ² + φᵀSφ] + Var[mᵀφ] over the weight draws that the seed gives."""
    body, stds, x = parts()
    head = VBLLRegression(5, 1).double()
    nn.init.normal_(head.weights.mean)
    posterior = BayesianFeaturesPosterior(body, head, stds, seed=3)
    n = 50
    generator = torch.Generator().manual_seed(3)
    means, spreads = [], []
    for _ in range(n):
        weights = {
            name: p + stds[name] * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for name, p in body.named_parameters()
        }
        phi = torch.cat([functional_call(body, weights, (x,)), torch.ones(7, 1).double()], 1)
        means.append(phi @ head.weights.mean[0])
        covariance = head.weights.covariances()[0]
        spreads.append(((phi @ covariance) * phi).sum(1))
    means, spreads = torch.stack(means), torch.stack(spreads)
    dist = posterior(x, n)
    torch.testing.assert_close(dist.mean[:, 0], means.mean(0))
    torch.testing.assert_close(dist.epistemic[:, 0], spreads.mean(0) + means.var(0, unbiased=False))
    torch.testing.assert_close(dist.aleatoric[:, 0], head.noise_variance().expand(7))


class WithIdleWeights(nn.Module):
    """A body of which some weights have no effect."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 8)
        self.idle = nn.Parameter(torch.zeros(20))

    def forward(self, x):
        return torch.tanh(self.layer(x)) + 0 * self.idle.sum()


def test_weights_that_the_data_says_nothing_about_keep_their_prior():
    """N(0, 0.4²) but for what is left of the initial curvature, β₂^steps of it."""
    X, y = rows_of(VBLLRegressor)
    epochs = 3000  # one step each
    model = VBLLRegressor(
        features="bayesian",
        module=WithIdleWeights(),
        max_epochs=epochs,
        batch_size=None,
        patience=None,
        random_state=0,
    ).fit(10 * X, y)
    idle = model.posterior_.stds["idle"]
    left = (1 / 0.02**2 - 1 / 0.4**2) * (1 - 2 / epochs) ** epochs
    # rtol: the step of h is damped to second order, ½ρ² of it each, ρ = 2/epochs.
    expected = torch.full((20,), (1 / 0.4**2 + left) ** -0.5)
    torch.testing.assert_close(idle, expected, rtol=2 / epochs, atol=0)
    assert (model.posterior_.stds["layer.weight"] < idle.min()).all()


@pytest.mark.parametrize(("cls", "changes"), CASES)
def test_estimators(cls, changes, tmp_path):
    X, y = rows_of(cls)
    model = cls(**BAYESIAN | changes).fit(X, y)
    dist = model.predict_distribution(X[:9])
    assert dist.n_draws == 8
    assert (dist.epistemic > 0).all()
    again = cls(**BAYESIAN | changes).fit(X, y)
    np.testing.assert_array_equal(model.predict(X), again.predict(X))
    model.save(tmp_path / "m.uq")
    loaded = uq.load(tmp_path / "m.uq")
    np.testing.assert_array_equal(model.predict(X), loaded.predict(X))
    functions = model.sample_functions(X[:9], 5)
    assert functions.shape[:2] == (5, 9)
    assert not np.array_equal(functions[0], functions[1])
    np.testing.assert_array_equal(functions, loaded.sample_functions(X[:9], 5))
    # A function is one function: rows may be asked for one by one (up to rounding).
    np.testing.assert_allclose(
        model.sample_functions(X[3:4], 5)[:, 0], functions[:, 3], rtol=1e-4, atol=1e-4
    )
    assert not hasattr(model, "partial_fit")


def test_learns_the_data():
    X, y = rows_of(VBLLRegressor)
    model = VBLLRegressor(**BAYESIAN | {"max_epochs": 100}).fit(X, y)
    assert model.score(X, y) > 0.4
    X, y = rows_of(VBLLClassifier)
    assert VBLLClassifier(**BAYESIAN | {"max_epochs": 60}).fit(X, y).score(X, y) > 0.95


def test_what_has_no_mixture_is_refused():
    X, y = rows_of(VBLLRegressor)
    with pytest.raises(ParameterError, match="features='bayesian' needs noise="):
        VBLLRegressor(**BAYESIAN, noise="student_t").fit(X, y)
    with pytest.raises(ParameterError, match="features='bayesian' needs head="):
        VBLLClassifier(**BAYESIAN, head="generative").fit(*rows_of(VBLLClassifier))


def test_two_targets_share_the_body():
    """One draw of the body moves both targets: their joint density is a mixture of products."""
    X, y = rows_of(VBLLRegressor)
    model = VBLLRegressor(**BAYESIAN).fit(X, np.stack([y, 3 - y], 1))
    dist = model.predict_distribution(X[:5])
    assert dist.batch_shape == (5, 2)
    assert model.sample_functions(X[:5], 3).shape == (3, 5, 2)
    both = np.stack([y, 3 - y], 1)[:5]
    spread = (dist.scale**2 + dist.epistemic_scale**2).sqrt()
    rows = torch.distributions.Normal(dist.loc, spread).log_prob(torch.tensor(both)).sum(-1)
    expected = (torch.logsumexp(rows, 0) - np.log(8)).mean()
    assert model.log_score(X[:5], both) == pytest.approx(float(expected))


def test_weights_are_repetitions():
    """Each row twice is N = 2n, for the last layer and for the body."""
    X, y = rows_of(VBLLRegressor)
    settings = BAYESIAN | {"batch_size": None, "patience": None, "precision": "64-true"}
    weighted = VBLLRegressor(**settings).fit(X, y, np.full(len(X), 2.0))
    repeated = VBLLRegressor(**settings).fit(np.r_[X, X], np.r_[y, y])
    for name, std in weighted.posterior_.stds.items():
        torch.testing.assert_close(repeated.posterior_.stds[name], std, rtol=1e-9, atol=0)
    a, b = weighted.predict_distribution(X), repeated.predict_distribution(X)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(a.variance, b.variance, rtol=1e-7, atol=1e-7)


def test_batch_norm_and_dropout_are_warned_of():
    X, y = rows_of(VBLLRegressor)

    def module(d_in, d_out):
        return nn.Sequential(nn.Linear(d_in, d_out), nn.BatchNorm1d(d_out), nn.Dropout(0.1))

    with pytest.warns(UserWarning, match=r"BatchNorm1d, Dropout.*wrong at other draws"):
        VBLLRegressor(**BAYESIAN, module=module).fit(X, y)
    VBLLRegressor(**QUICK, module=module).fit(X, y)  # trained as usual: nothing to warn of


def test_runaway_curvature_is_told(monkeypatch):
    X, y = rows_of(VBLLRegressor)
    found = IVON.diagnostics
    asked = []

    def run_away(self, *, warn=True):
        asked.append(warn)
        return [replace(d, noise_share=0.9) for d in found(self, warn=False)]

    monkeypatch.setattr(IVON, "diagnostics", run_away)
    VBLLRegressor(**BAYESIAN | {"max_epochs": 1}).fit(X, y)
    assert asked[-1] is True


def test_a_body_without_weights_is_refused():
    X, y = rows_of(VBLLRegressor)
    frozen = nn.Linear(10, 4).requires_grad_(False)
    for settings in ({"hidden": ()}, {"module": frozen}):
        with pytest.raises(ParameterError, match="needs a body with weights to learn"):
            VBLLRegressor(**BAYESIAN | settings).fit(X, y)


def test_hard_data():
    """Constant targets, more features than rows, collinear features: finite and sensible."""
    X, y = rows_of(VBLLRegressor)
    constant = VBLLRegressor(**BAYESIAN).fit(X, np.full(len(X), 7.0))
    np.testing.assert_allclose(constant.predict(X), 7.0, atol=0.5)
    wide = np.random.default_rng(0).normal(size=(12, 60))
    few = VBLLRegressor(**BAYESIAN).fit(wide, y[:12])
    assert few.predict_distribution(wide).variance.isfinite().all()
    collinear = np.c_[X, X, np.ones(len(X))]
    assert np.isfinite(VBLLRegressor(**BAYESIAN).fit(collinear, y).log_score(collinear, y))


def test_mixture_of_distributions():
    one = NormalMixture(torch.zeros(2, 3), torch.tensor(1.0))
    two = NormalMixture(torch.full((2, 3), 4.0), torch.tensor(2.0))
    mixed = mixture([one, two])
    assert mixed.n_draws == 4
    torch.testing.assert_close(mixed.mean, torch.full((3,), 2.0))
    torch.testing.assert_close(mixed.aleatoric, torch.full((3,), 2.5))
    torch.testing.assert_close(mixed.epistemic, torch.full((3,), 4.0))
    with pytest.raises(DataError, match="parts is empty"):
        mixture([])
    with pytest.raises(DataError, match=r"parts\[1\]"):
        mixture([one, two[:2]])
    with pytest.raises(DataError, match=r"parts\[0\]"):
        mixture([Parametric(torch.distributions.Normal(torch.zeros(3), 1.0))])

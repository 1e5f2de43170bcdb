"""VBLL estimators: heads and noise models behind one API, frozen features, added rows."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_diabetes, load_wine
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import uq
from uq import VBLLClassifier, VBLLRegressor
from uq.errors import DataError, ParameterError
from uq.nn import VBLLClassification, VBLLRegression

QUICK = {"hidden": (16,), "max_epochs": 12, "batch_size": 32, "random_state": 0, "lr": 0.02}
NOISES = ["homoscedastic", "student_t", "heteroscedastic"]
HEADS = ["discriminative", "heteroscedastic", "generative"]


def diabetes():
    X, y = load_diabetes(return_X_y=True)
    return X[:200] / X.std(0), y[:200]


def wine():
    X, y = load_wine(return_X_y=True)
    return (X - X.mean(0)) / X.std(0), np.array(["a", "b", "c"])[y]


def features_of(d_in, d_out=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d_in, d_out), nn.Tanh()).double()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("m", [1, 2])
def test_every_noise_model_behind_the_whole_api(noise, m, tmp_path):
    X, y = diabetes()
    y = y if m == 1 else np.stack([y, -3 * y + 1], 1)
    model = VBLLRegressor(noise=noise, **QUICK).fit(X, y)
    dist = model.predict_distribution(X[:7])
    assert dist.batch_shape == ((7,) if m == 1 else (7, 2))
    torch.testing.assert_close(dist.aleatoric + dist.epistemic, dist.variance)
    assert (dist.epistemic > 0).all()
    varies = float((dist.aleatoric.std(0) / dist.aleatoric.mean(0)).max()) > 1e-6
    assert varies == (noise == "heteroscedastic")
    lower, upper = model.predict_interval(X[:7], 0.5)
    assert (lower < model.predict(X[:7])).all()
    assert (model.predict(X[:7]) < upper).all()
    assert model.sample_functions(X[:7], 5).shape == ((5, 7) if m == 1 else (5, 7, 2))
    constant = stats.norm(y.mean(0), y.std(0)).logpdf(y).sum() / len(y)
    assert model.log_score(X, y) > constant + 0.1
    assert list(dist.to_frame().columns)
    model.save(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq").predict_distribution(X[:7])
    assert torch.equal(again.mean, dist.mean)
    assert torch.equal(again.variance, dist.variance)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_behind_the_whole_api(head, tmp_path):
    X, y = wine()
    model = VBLLClassifier(head=head, **QUICK).fit(X[::2], y[::2])
    assert model.score(X[1::2], y[1::2]) > 0.9
    assert model.log_score(X[1::2], y[1::2]) > np.log(0.5)
    f = model.sample_functions(X[:6], 4)
    np.testing.assert_allclose(f.sum(-1), 1, rtol=1e-5)
    model.save(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq")
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    tight = VBLLClassifier(head=head, bound="knowles_minka", **QUICK).fit(X[::2], y[::2])
    assert tight.score(X[1::2], y[1::2]) > 0.9


def test_feature_density_falls_away_from_the_data():
    X, y = wine()
    model = VBLLClassifier(head="generative", **QUICK).fit(X, y)
    assert model.feature_log_density(X).min() > model.feature_log_density(20 + 0 * X[:1])[0]
    assert not hasattr(VBLLClassifier(), "feature_log_density")
    assert not hasattr(VBLLClassifier(), "partial_fit")
    # Class frequencies: 10 times the rows of one class raise its prior.
    counts = model.posterior_.head.class_counts
    assert float(counts.sum()) == pytest.approx(len(X) - 20, abs=1.5)  # 20 are held out


@pytest.mark.parametrize("noise", ["homoscedastic", "student_t"])
def test_frozen_features_are_solved_not_trained(noise):
    X, y = diabetes()
    net = features_of(10)
    before = copy.deepcopy(net.state_dict())
    settings = {"module": net, "features": "frozen", "noise": noise, "precision": "64-true"}
    model = VBLLRegressor(random_state=0, **settings).fit(X, y)
    assert model.stop_reason_ == "closed_form"
    assert model.n_epochs_ == 0
    assert all(torch.equal(before[k], t) for k, t in model.posterior_.body.state_dict().items())
    # Ridge regression on the features, penalised by σ²/s.
    phi = np.c_[net(torch.tensor(X)).detach().numpy(), np.ones(len(X))]
    head = model.posterior_.head
    t = (y - model.y_mean_) / model.y_scale_
    sigma2 = 1.0 if noise == "student_t" else float(head.noise_variance().detach())
    s = float(head.prior_variance)
    assert s * (phi**2).sum(1).mean() == pytest.approx(4.0 if noise == "student_t" else 1.0)
    ridge = np.linalg.solve(phi.T @ phi + sigma2 / s * np.eye(13), phi.T @ t)
    np.testing.assert_allclose(
        model.predict(X), model.y_mean_ + model.y_scale_ * (phi @ ridge), rtol=1e-8
    )
    # Weights, streams and covariances.
    twice = VBLLRegressor(random_state=0, patience=None, **settings)
    weight = np.where(np.arange(200) < 100, 2.0, 1.0)
    a = twice.fit(X, y, weight).predict(X)
    b = twice.fit(np.r_[X, X[:100]], np.r_[y, y[:100]]).predict(X)
    np.testing.assert_allclose(a, b, rtol=1e-8)
    stream = DataLoader(TensorDataset(torch.tensor(X), torch.tensor(y)), 33)
    np.testing.assert_allclose(
        VBLLRegressor(**settings).fit(stream).predict(X),
        VBLLRegressor(patience=None, **settings).fit(X, y).predict(X),
        rtol=1e-8,
    )
    diagonal = VBLLRegressor(covariance="diagonal", **settings).fit(X, y)
    assert np.corrcoef(diagonal.predict(X), model.predict(X))[0, 1] > 0.99


@pytest.mark.parametrize("head", HEADS)
def test_frozen_classifiers(head):
    X, y = wine()
    net = features_of(13).float()
    before = copy.deepcopy(net.state_dict())
    model = VBLLClassifier(
        module=net, features="frozen", head=head, max_epochs=30, lr=0.02, random_state=0
    ).fit(X, y)
    assert all(torch.equal(before[k], t) for k, t in model.posterior_.body.state_dict().items())
    assert (model.stop_reason_ == "closed_form") == (head == "generative")
    assert model.score(X, y) > 0.9


@pytest.mark.parametrize("noise", ["homoscedastic", "student_t"])
@pytest.mark.parametrize("covariance", ["dense", "dense_precision"])
def test_partial_fit_is_the_posterior_of_all_rows(noise, covariance):
    X, y = diabetes()
    settings = {
        "module": features_of(10),
        "features": "frozen",
        "noise": noise,
        "covariance": covariance,
        "precision": "64-true",
        "patience": None,
    }
    model = VBLLRegressor(**settings).fit(X[:100], y[:100])
    whole = copy.deepcopy(model)
    before = model.sample_functions(X[:3], 1)
    seed = int(model.posterior_.seed)
    for rows in (slice(100, 101), slice(101, 150), slice(150, 200)):
        model.partial_fit(X[rows], y[rows])
    whole.partial_fit(X[100:], y[100:])
    np.testing.assert_allclose(model.predict(X), whole.predict(X), rtol=1e-9)
    a, b = model.predict_distribution(X), whole.predict_distribution(X)
    torch.testing.assert_close(a.variance, b.variance, rtol=1e-9, atol=0)
    assert int(model.posterior_.seed) == seed + 3
    assert not np.allclose(before, model.sample_functions(X[:3], 1))
    # Noise and prior of the first rows: their exact posterior with all rows is the same.
    head, phi = model.posterior_.head, features_of(10)(torch.tensor(X)).detach()
    phi = torch.cat([phi, torch.ones(200, 1).double()], 1)
    noise_variance = 1.0 if noise == "student_t" else head.noise_variance()[0].detach()
    precision = phi.T @ phi / noise_variance + torch.eye(13).double() / head.prior_variance
    torch.testing.assert_close(
        head.weights.covariances()[0].detach(), torch.linalg.inv(precision), rtol=1e-7, atol=1e-9
    )


def test_partial_fit_checks_its_rows():
    X, y = diabetes()
    model = VBLLRegressor(**QUICK).partial_fit(X[:150], y[:150])
    assert model.n_epochs_ > 0
    before = model.log_score(X[150:], y[150:])
    model.partial_fit(X[150:], y[150:])
    assert model.log_score(X[150:], y[150:]) > before
    with pytest.raises(DataError, match=r"rows of shape \(2,\)"):
        model.partial_fit(X[:4], np.stack([y[:4]] * 2, 1))
    with pytest.raises(ValueError, match="inconsistent"):
        model.partial_fit(X[:4], y[:3])
    with pytest.raises(DataError, match="sample_weight"):
        model.partial_fit(X[:4], y[:4], sample_weight=[-1, 1, 1, 1])
    for settings in ({"covariance": "diagonal"}, {"noise": "heteroscedastic"}):
        assert not hasattr(VBLLRegressor(**settings), "partial_fit")


def test_partial_fit_of_classes():
    X, y = wine()
    model = VBLLClassifier(module=features_of(13).float(), features="frozen", head="generative")
    with pytest.raises(DataError, match=r"lacks 'c'"):
        model.partial_fit(X[y < "c"], y[y < "c"], classes=["a", "b", "c"])
    model.partial_fit(X[::2], y[::2], classes=["a", "b", "c"])
    whole = copy.deepcopy(model).partial_fit(X[1::2], y[1::2])
    for label in ("c", "a", "b"):  # each batch lacks two of the classes
        rows = np.flatnonzero(y == label)
        rows = rows[rows % 2 == 1]
        model.partial_fit(X[rows], y[rows])
    np.testing.assert_allclose(model.predict_proba(X), whole.predict_proba(X), rtol=1e-3, atol=1e-5)
    with pytest.raises(DataError, match=r"label .*'d'"):
        model.partial_fit(X[:2], ["a", "d"])


@pytest.mark.parametrize("noise", NOISES)
def test_hard_data(noise):
    """Constant targets, more features than rows, collinear features: finite and sensible."""
    X, y = diabetes()
    quick = QUICK | {"noise": noise, "max_epochs": 6}
    constant = VBLLRegressor(**quick).fit(X, np.full(200, 7.0))
    np.testing.assert_allclose(constant.predict(X), 7.0, atol=0.5)  # the unit of a constant is 1
    wide = np.random.default_rng(0).normal(size=(12, 60))
    few = VBLLRegressor(**quick | {"hidden": (32,)}).fit(wide, y[:12])
    assert few.predict_distribution(wide).variance.isfinite().all()
    collinear = VBLLRegressor(**quick).fit(np.c_[X, X, np.ones(200)], y)
    assert np.isfinite(collinear.log_score(np.c_[X, X, np.ones(200)], y))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(precision):
    X, y = diabetes()
    settings = QUICK | {"precision": precision, "max_epochs": 6}
    for noise in NOISES:
        model = VBLLRegressor(noise=noise, **settings).fit(X, y)
        # A constant with the spread of y scores −5.7 nats; without digits it would be far below.
        assert model.log_score(X, y) > -5.7
    X, y = wine()
    for head in HEADS:
        assert VBLLClassifier(head=head, **settings).fit(X, y).score(X, y) > 0.85


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (VBLLRegressor, "noise", "cauchy"),
        (VBLLRegressor, "covariance", "full"),
        (VBLLRegressor, "features", "thawed"),
        (VBLLRegressor, "n_samples", 0),
        (VBLLRegressor, "prior_scale", 0),
        (VBLLClassifier, "head", "linear"),
        (VBLLClassifier, "bound", "taylor"),
    ],
)
def test_arguments_are_named(cls, name, value):
    X, y = diabetes() if cls is VBLLRegressor else wine()
    with pytest.raises(ParameterError, match=name):
        cls(**QUICK | {name: value}).fit(X, y)


def test_frozen_needs_a_module_and_a_closed_form():
    X, y = diabetes()
    with pytest.raises(ParameterError, match="needs module="):
        VBLLRegressor(features="frozen").fit(X, y)
    with pytest.raises(ParameterError, match="lowrank"):
        VBLLRegressor(features="frozen", module=features_of(10), covariance="lowrank").fit(X, y)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.untyped_storage().size() // t.element_size())
        return out


@pytest.mark.parametrize("covariance", ["dense", "dense_precision", "diagonal", "lowrank"])
def test_no_buffer_of_rows_times_covariances(covariance):
    n, d, k = 64, 32, 5
    features, labels = torch.randn(n, d, requires_grad=True), torch.arange(n) % k
    for loss in (
        VBLLClassification(d, k, covariance=covariance).loss,
        lambda f, y, n: VBLLRegression(d, k, covariance=covariance).loss(f, torch.eye(k)[y], n),
    ):
        with Largest() as largest:
            loss(features, labels, 1000).backward()
        assert 0 < largest.size <= max(n * k * (d + 1), k * (d + 1) ** 2)

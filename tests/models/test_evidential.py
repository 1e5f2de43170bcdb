"""Evidential estimators: losses behind one API, annealing, few shots, recalibration, stand-ins."""

import copy
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits, load_wine
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import uq
from uq import EvidentialClassifier, EvidentialRegressor, MAPClassifier
from uq.calibration import auroc, expected_calibration_error, ood_score, report
from uq.distributions import DirichletCategorical, NormalInverseGamma
from uq.errors import DataError, ParameterError
from uq.nn.evidential import LOSSES

QUICK = {"hidden": (16,), "max_epochs": 20, "batch_size": 32, "random_state": 0, "lr": 0.02}


def wine():
    X, y = load_wine(return_X_y=True)
    return (X - X.mean(0)) / X.std(0), np.array(["a", "b", "c"])[y]


def features_of(d_in, width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d_in, width), nn.Tanh())


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_behind_the_whole_api(loss, tmp_path):
    X, y = wine()
    model = EvidentialClassifier(loss=loss, **QUICK).fit(X[::2], y[::2])
    assert model.score(X[1::2], y[1::2]) > 0.9
    dist = model.predict_distribution(X)
    assert isinstance(dist, DirichletCategorical)
    assert dist.prior == (0.1 if loss == "redl" else 1)
    assert dist.concentration.dtype == torch.float64
    assert ((dist.vacuity > 0) & (dist.vacuity <= 1)).all()
    model.save(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq")
    assert torch.equal(again.predict_distribution(X).concentration, dist.concentration)
    np.testing.assert_array_equal(
        again.sample_functions(X[:4], 3), model.sample_functions(X[:4], 3)
    )


def test_divergence_comes_in_by_epochs():
    """At zero evidence the divergence is 0; with the same outputs the loss grows as λ does."""
    X, y = wine()
    losses = {}
    for anneal in (0, 10):
        model = EvidentialClassifier(
            loss="edl", kl_warmup_epochs=anneal, **QUICK | {"lr": 1e-12, "max_epochs": 13},
            patience=None,
        ).fit(X, y)  # fmt: skip
        losses[anneal] = np.array(model.history_["train_loss"])
    plain = EvidentialClassifier(
        loss="edl", dirichlet_kl_weight=0.0, **QUICK | {"lr": 1e-12, "max_epochs": 2}, patience=None
    ).fit(X, y)
    base = plain.history_["train_loss"][0]
    share = (losses[10] - base) / (losses[0] - base)
    # Weights stand still, so that losses are equal up to which rows the last, short batch holds.
    np.testing.assert_allclose(share, np.minimum(np.arange(13) / 10, 1), atol=0.02)
    assert losses[0][0] > base + 1e-3


def test_early_stopping_waits_for_the_divergence():
    X, y = wine()
    settings = QUICK | {"max_epochs": 60, "patience": 15}
    model = EvidentialClassifier(loss="edl", **settings).fit(X, y)
    held = model.history_["held_out_loss"]
    assert 1 + int(np.argmin(held)) == model.n_epochs_ - 15 or model.n_epochs_ == 60
    assert int(np.argmin(held)) > 5


def test_few_shots_on_frozen_features(tmp_path):
    X, y = wine()
    body = features_of(X.shape[1])
    before = copy.deepcopy(body.state_dict())
    rows = np.concatenate([np.flatnonzero(y == c)[:5] for c in "abc"])
    rest = np.setdiff1d(np.arange(len(X)), rows)
    model = EvidentialClassifier(features="frozen", module=body, random_state=0)
    model.fit(X[rows], y[rows])
    assert model.n_epochs_ == 10
    assert model.score(X[rest], y[rest]) > 0.8  # chance is 0.4
    fitted = model.posterior_.network[0].state_dict()
    assert all(torch.equal(fitted[k], v) and torch.equal(body.state_dict()[k], v)
               for k, v in before.items())  # fmt: skip
    # No seed, order of rows or batch size matters: the loss is one on all rows.
    exact = {"features": "frozen", "module": body, "precision": "64-true", "max_epochs": 3}
    one = EvidentialClassifier(**exact, random_state=0).fit(X[rows], y[rows]).predict_proba(X)
    other = EvidentialClassifier(**exact, random_state=1, batch_size=4)
    other.fit(X[rows[::-1]], y[rows[::-1]])
    np.testing.assert_allclose(other.predict_proba(X), one, atol=1e-6)
    source = TensorDataset(torch.tensor(X[rows]), torch.arange(15) // 5)
    streamed = EvidentialClassifier(**exact, random_state=0).fit(DataLoader(source, 4))
    np.testing.assert_allclose(streamed.predict_proba(X), one, atol=1e-6)
    model.save(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq", module=features_of(X.shape[1]))
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))


def test_frozen_weights_count_rows():
    X, y = wine()
    body = features_of(X.shape[1]).double()
    shared = {"features": "frozen", "module": body, "precision": "64-true", "max_epochs": 3}
    weight = np.where(np.arange(len(X)) < 30, 2.0, 1.0)
    weighted = EvidentialClassifier(**shared, random_state=0).fit(X, y, sample_weight=weight)
    repeated = EvidentialClassifier(**shared, random_state=0).fit(
        np.concatenate([X, X[:30]]), np.concatenate([y, y[:30]])
    )
    np.testing.assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), atol=1e-6)


def test_evidence_scaling_behind_the_estimator(tmp_path):
    """Probabilities are far too timid; one factor mends them and keeps classes and ranking."""
    X, y = load_digits(return_X_y=True)
    X_fit, X_new, y_fit, y_new = train_test_split(X, y, test_size=0.4, random_state=0, stratify=y)
    plain = EvidentialClassifier(
        hidden=(64,), max_epochs=25, batch_size=128, lr=0.01, patience=None, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = uq.Calibrated(plain, "evidence_scale", cv=0.3).fit(X_fit, y_fit)
    before = model.estimator_.predict_distribution(X_new)
    after = model.predict_distribution(X_new)
    assert isinstance(after, DirichletCategorical)
    assert model.recalibrator_.scale_ > 3
    assert torch.equal(before.mode, after.mode)
    assert torch.equal(before.vacuity.argsort(), after.vacuity.argsort())
    timid, mended = (expected_calibration_error(y_new, d) for d in (before, after))
    assert mended < timid / 3
    labels = torch.as_tensor(y_new)
    assert after.log_prob(labels).mean() > before.log_prob(labels).mean() + 0.1
    model.save(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq").predict_distribution(X_new)
    assert torch.equal(again.concentration, after.concentration)
    with pytest.raises(DataError, match="DirichletCategorical"):
        uq.Calibrated(MAPClassifier(**QUICK), "evidence_scale", cv=2).fit(X_fit, y_fit)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_digits_stand_in(seed):
    """ID 0–7, OOD 8 and 9: accuracy beside softmax, less evidence for OOD rows and under I-EDL."""
    X, y = load_digits(return_X_y=True)
    known = y < 8
    X_fit, X_new, y_fit, y_new = train_test_split(
        X[known] / 16, y[known], test_size=0.3, random_state=seed, stratify=y[known]
    )
    shared = {"hidden": (64, 64, 64), "max_epochs": 40, "lr": 1e-3, "patience": None}
    softmax = MAPClassifier(**shared, random_state=seed).fit(X_fit, y_fit)
    strength = {}
    for loss in ("edl", "iedl"):
        model = EvidentialClassifier(loss=loss, **shared, random_state=seed).fit(X_fit, y_fit)
        assert model.score(X_new, y_new) >= softmax.score(X_new, y_new) - 0.02
        inside, outside = map(model.predict_distribution, (X_new, X[~known] / 16))
        assert auroc(ood_score(inside, "vacuity"), ood_score(outside, "vacuity")) >= 0.85
        strength[loss] = float(inside.concentration.sum(-1).mean())
        assert strength[loss] > float(outside.concentration.sum(-1).mean())
    assert strength["iedl"] < strength["edl"]


def test_ood_scores_and_report_take_dirichlet_predictions():
    X, y = wine()
    model = EvidentialClassifier(**QUICK).fit(X[::2], y[::2])
    dist, far = model.predict_distribution(X[1::2]), model.predict_distribution(5 * X[:40])
    np.testing.assert_allclose(ood_score(dist, "vacuity"), dist.vacuity)
    np.testing.assert_allclose(ood_score(dist, "differential_entropy"), dist.differential_entropy())
    text = str(report(dist, y[1::2], ood=far))
    assert "OOD" in text
    mixed = MAPClassifier(**QUICK).fit(X, y).predict_distribution(X)
    with pytest.raises(ParameterError, match="DirichletCategorical"):
        ood_score(mixed, "vacuity")


# -- regression ----------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["evidence", "normalised", "kl"])
@pytest.mark.parametrize("m", [1, 2])
def test_every_penalty_behind_the_whole_api(penalty, m, tmp_path):
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:200] / X.std(0), y[:200]
    y = y if m == 1 else np.stack([y, -3 * y + 1], 1)
    model = EvidentialRegressor(penalty=penalty, **QUICK).fit(X, y)
    dist = model.predict_distribution(X)
    assert isinstance(dist, NormalInverseGamma)
    assert dist.batch_shape == ((200,) if m == 1 else (200, 2))
    torch.testing.assert_close(dist.aleatoric + dist.epistemic, dist.variance)
    assert dist.mutual_information().shape == dist.batch_shape
    constant = -0.5 * np.log(2 * np.pi * np.e * y.var(0)).sum()
    assert model.log_score(X, y) > constant + 0.1
    model.save(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq").predict_distribution(X)
    assert torch.equal(again.mean, dist.mean)
    assert torch.equal(again.variance, dist.variance)


def test_regression_on_frozen_features():
    X, y = load_diabetes(return_X_y=True)
    X = X / X.std(0)
    model = EvidentialRegressor(features="frozen", module=features_of(10), random_state=0)
    model.fit(X[:300], y[:300])
    assert model.score(X[300:], y[300:]) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_cubic_toy_shows_the_known_failure(seed):
    """The Student-t's scale is near the noise, 3; the part called aleatoric is below it."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-4, 4, (1000, 1))
    y = x[:, 0] ** 3 + rng.normal(0, 3, 1000)
    model = EvidentialRegressor(
        max_epochs=300, batch_size=100, lr=2.5e-3, patience=None, random_state=seed
    ).fit(x, y)
    grid = np.linspace(-3.5, 3.5, 200)[:, None]
    dist = model.predict_distribution(grid)
    assert (dist.mean - torch.as_tensor(grid[:, 0]) ** 3).square().mean() < 1.5**2
    assert 2 < float(dist.base.scale.mean()) < 3.5
    assert float(dist.aleatoric.sqrt().mean()) < 3


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", "mse"),
        ("dirichlet_kl_weight", -1.0),
        ("dirichlet_kl_weight", float("inf")),
        ("kl_warmup_epochs", 2.5),
        ("logdet_weight", -0.1),
        ("logdet_weight", float("inf")),
        ("prior", 0.0),
        ("prior", float("inf")),
        ("evidence", "tanh"),
        ("features", "some"),
        ("features", "frozen"),  # without a module
    ],
)
def test_arguments_of_the_classifier_are_named(name, value):
    X, y = wine()
    with pytest.raises(ParameterError, match=name):
        EvidentialClassifier(**QUICK | {name: value}).fit(X, y)


@pytest.mark.parametrize(
    ("name", "value"),
    [("penalty", "none"), ("penalty_weight", -1.0), ("penalty_weight", float("inf"))],
)
def test_arguments_of_the_regressor_are_named(name, value):
    X, _ = wine()
    with pytest.raises(ParameterError, match=name):
        EvidentialRegressor(**QUICK | {name: value}).fit(X, X[:, 0])


def test_labels_outside_training():
    X, y = wine()
    model = EvidentialClassifier(**QUICK | {"max_epochs": 2}).fit(X, y)
    with pytest.raises(DataError, match="'z'"):
        model.log_score(X[:2], np.array(["a", "z"]))


def test_module_in_half_precision_is_trained_in_single():
    X, y = wine()
    net = nn.Linear(X.shape[1], 3).half()
    model = EvidentialClassifier(module=net, **QUICK | {"max_epochs": 3}).fit(X, y)
    assert model.posterior_.dtype == torch.float32
    assert net.weight.dtype == torch.float16
    assert np.isfinite(model.log_score(X, y))

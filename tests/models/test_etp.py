"""Evidential Turing process behind the API: memory kept and saved, weights, seeds, bad input."""

import copy
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import train_test_split
from torch import nn

import uq
from uq import ETPClassifier, EvidentialClassifier
from uq.calibration import auroc, expected_calibration_error, ood_score, report
from uq.distributions import DirichletCategorical
from uq.errors import DataError, ParameterError
from uq.nn import VariationalLinear

QUICK = {"hidden": (16,), "max_epochs": 20, "batch_size": 32, "random_state": 0, "lr": 0.02}


def wine():
    X, y = load_wine(return_X_y=True)
    return (X - X.mean(0)) / X.std(0), np.array(["a", "b", "c"])[y]


def test_the_whole_api(tmp_path):
    X, y = wine()
    model = ETPClassifier(**QUICK).fit(X[::2], y[::2])
    assert model.score(X[1::2], y[1::2]) > 0.9
    dist = model.predict_distribution(X)
    assert isinstance(dist, DirichletCategorical)
    assert ((dist.vacuity > 0) & (dist.vacuity <= 1)).all()
    assert (dist.epistemic > 0).all()
    torch.testing.assert_close(dist.aleatoric + dist.epistemic, dist.entropy())
    head = model.posterior_.head
    assert head.memory.shape == (20, 3)
    # 20 epochs of 3 batches of 32: it has been written to, and is far from how it started.
    assert head.memory.mean() > 0.01
    layers = [m for m in model.posterior_.modules() if isinstance(m, VariationalLinear)]
    assert len(layers) == 2
    assert all((layer.log_var != -9).any() for layer in layers)
    model.save(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq")
    assert torch.equal(again.posterior_.head.memory, head.memory)
    assert torch.equal(again.predict_distribution(X).concentration, dist.concentration)
    np.testing.assert_array_equal(
        again.sample_functions(X[:4], 3), model.sample_functions(X[:4], 3)
    )
    far = model.predict_distribution(5 * X[:40])
    np.testing.assert_allclose(ood_score(dist, "vacuity"), dist.vacuity)
    assert "OOD" in str(report(dist[1::2], y[1::2], ood=far))


def test_memory_belongs_to_the_best_epoch():
    X, y = wine()
    seen = []

    def look(state):
        seen.append(state.module.head.memory.clone())

    model = ETPClassifier(
        **QUICK | {"lr": 0.3, "max_epochs": 30}, patience=5, callbacks=[look]
    ).fit(X, y)  # fmt: skip
    best = int(np.argmin(model.history_["held_out_loss"]))
    assert best < len(seen) - 1
    assert torch.equal(model.posterior_.head.memory, seen[best])


def test_seeds():
    X, y = wine()
    first, same, other = (
        ETPClassifier(**QUICK | {"random_state": s, "max_epochs": 3}).fit(X, y) for s in (0, 0, 1)
    )
    memories = [m.posterior_.head.memory for m in (first, same, other)]
    assert torch.equal(memories[0], memories[1])
    assert not torch.equal(memories[0], memories[2])


def test_weights_reach_loss_and_memory():
    """Class "a" is in the data by its weight alone: weights of 20 there, next to 0 elsewhere."""
    X, y = wine()
    settings = QUICK | {"max_epochs": 10, "patience": None}
    weight = np.where(y == "a", 20.0, 1e-3)
    weighted = ETPClassifier(**settings).fit(X, y, sample_weight=weight)
    assert (weighted.predict(X) == "a").all()
    plain = ETPClassifier(**settings).fit(X, y)
    shares = [m.posterior_.head.memory.sum(0) / m.posterior_.head.memory.sum()
              for m in (weighted, plain)]  # fmt: skip
    assert shares[0][0] > shares[1][0] + 0.3


def test_pretrained_and_frozen_layers(tmp_path):
    X, y = wine()
    net = nn.Sequential(nn.Linear(13, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    net[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    model = ETPClassifier(module=net, **QUICK | {"lr": 1e-9, "max_epochs": 1}).fit(X, y)
    fitted = model.posterior_.network
    assert type(fitted[0]) is nn.Linear
    assert torch.equal(fitted[0].weight, before["0.weight"].float())
    torch.testing.assert_close(fitted[2].weight, before["2.weight"].float())
    assert type(net[2]) is nn.Linear
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    model.save(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq", module=net)
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))


def test_temperature_scaling():
    X, y = load_digits(return_X_y=True)
    settings = QUICK | {"lr": 3e-3, "max_epochs": 5, "batch_size": 128}
    model = uq.Calibrated(ETPClassifier(**settings), "temperature", cv=0.5).fit(X[:1200], y[:1200])
    before = model.estimator_.log_score(X[1200:], y[1200:])
    assert model.log_score(X[1200:], y[1200:]) > before - 0.02


def test_labels_outside_training_and_half_precision():
    X, y = wine()
    net = nn.Linear(13, 3).half()
    model = ETPClassifier(module=net, **QUICK | {"max_epochs": 3}).fit(X, y)
    assert model.posterior_.dtype == torch.float32
    assert net.weight.dtype == torch.float16
    assert np.isfinite(model.log_score(X, y))
    with pytest.raises(DataError, match="'z'"):
        model.log_score(X[:2], np.array(["a", "z"]))
    mixed = ETPClassifier(**QUICK | {"max_epochs": 3}, precision="bf16-mixed").fit(X, y)
    assert np.isfinite(mixed.log_score(X, y))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_size", 0),
        ("memory_size", 2.5),
        ("memory_decay", 1.0),
        ("memory_decay", -0.1),
        ("memory_noise", -1.0),
        ("dirichlet_kl_weight", np.inf),
        ("dirichlet_kl_weight", "small"),
        ("layer_kl_weight", -1.0),
    ],
)
def test_arguments_are_named(name, value):
    X, y = wine()
    with pytest.raises(ParameterError, match=name):
        ETPClassifier(**QUICK | {name: value}).fit(X, y)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_digits_stand_in(seed):
    """ID 0–7, OOD 8 and 9: accuracy of EDL, less evidence for OOD rows, and no timidity."""
    X, y = load_digits(return_X_y=True)
    known = y < 8
    X_fit, X_new, y_fit, y_new = train_test_split(
        X[known] / 16, y[known], test_size=0.3, random_state=seed, stratify=y[known]
    )
    shared = {"hidden": (64, 64, 64), "max_epochs": 40, "lr": 1e-3, "patience": None}
    etp, edl = (
        model.fit(X_fit, y_fit)
        for model in (
            ETPClassifier(**shared, random_state=seed),
            EvidentialClassifier(loss="edl", **shared, random_state=seed),
        )
    )
    assert etp.score(X_new, y_new) >= edl.score(X_new, y_new) - 0.02
    inside, outside = map(etp.predict_distribution, (X_new, X[~known] / 16))
    assert auroc(ood_score(inside, "vacuity"), ood_score(outside, "vacuity")) >= 0.85
    strengths = [d.concentration.sum(-1).median() for d in (inside, outside)]
    assert strengths[0] > 2 * strengths[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors = [
            float(expected_calibration_error(y_new, m.predict_distribution(X_new)))
            for m in (etp, edl)
        ]
    assert errors[0] < errors[1] / 2

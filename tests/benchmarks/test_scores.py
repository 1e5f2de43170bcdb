import math

import numpy as np
import pytest

from benchmarks.methods import map_with_norm
from benchmarks.peers import QuantileBoosting, SklearnClassifier, categorical, normal
from benchmarks.scores import class_scores, regression_scores
from uq.models.registry import estimator_class


def test_scores_of_two_classes():
    # All at confidence 0.8, of which 4 in 5 are right: no calibration error beyond chance.
    p = np.tile([0.2, 0.8], (10, 1))
    y = np.array([1, 1, 1, 1, 0] * 2)
    found = class_scores(categorical(p), y)
    assert found["nll"] == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    assert (found["accuracy"], found["ece_debiased"]) == (pytest.approx(0.8), pytest.approx(0.0))
    assert found["brier"] == pytest.approx(0.8 * 0.04 + 0.2 * 0.64)
    assert found["auroc_errors"] == 0.5


def test_nothing_to_rank_where_all_are_right():
    assert "auroc_errors" not in class_scores(categorical(np.eye(3) * 0.9 + 0.03), np.arange(3))


def test_scores_of_targets():
    y = np.array([0.0, 1.6, 1.7, -1.0])
    found = regression_scores(normal(np.zeros(4), np.ones(4)), y)
    assert found["coverage_90"] == 0.75  # ± 1.645
    assert found["rmse"] == pytest.approx(math.sqrt(np.mean(y**2)))
    nll = 0.5 * np.mean(y**2) + 0.5 * math.log(2 * math.pi)
    assert found["nll"] == pytest.approx(nll)
    assert found["width_90"] == pytest.approx(2 * 1.644854, rel=1e-5)


def test_quantiles_are_a_distribution_without_a_density():
    class Level:
        def __init__(self, q):
            self.q = q

        def predict(self, X):
            return np.full(len(X), self.q)  # of a target that is uniform on 0 to 1

    model = QuantileBoosting(0)
    model.models = [Level(q) for q in model.levels]
    y = np.array([0.04, 0.06, 0.3, 0.96])
    found = regression_scores(model.predict_distribution(np.zeros((4, 1))), y)
    assert "nll" not in found
    assert found["coverage_90"] == 0.5
    # CRPS of a uniform: y² - y + 1/3. Atoms 1/200 apart are off by less than their squared width.
    assert found["crps"] == pytest.approx(np.mean(y**2 - y + 1 / 3), abs=1 / 200**2)
    assert found["width_90"] == pytest.approx(0.9, abs=1 / 200)


def test_a_probability_of_0_of_a_peer_is_no_certainty():
    class Certain:
        def fit(self, X, y): ...

        def predict_proba(self, X):
            return np.array([[1.0, 0.0]])

    model = SklearnClassifier(Certain()).fit(np.zeros((9, 1)), np.zeros(9))
    dist = model.predict_distribution(np.zeros((1, 1)))
    np.testing.assert_allclose(dist.probs.numpy(), [[0.95, 0.05]])


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_map_runs_on_the_network_of_abnn(task):
    model = map_with_norm(task).make("any", 0)
    X = np.random.default_rng(0).standard_normal((40, 3))
    model.set_params(max_epochs=1).fit(X, X[:, 0] if task == "regression" else X[:, 0] > 0)
    abnn = estimator_class("abnn", task)(max_epochs=1, base_max_epochs=1, random_state=0)
    ours, theirs = (
        [tuple(p.shape) for p in m.posterior_.network.body.parameters()]
        for m in (model, abnn.fit(X, X[:, 0] if task == "regression" else X[:, 0] > 0))
    )
    assert ours == theirs

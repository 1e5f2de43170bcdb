import math

import numpy as np
import pytest
import torch

from benchmarks.peers import QuantileBoosting, SklearnClassifier, categorical, normal
from benchmarks.scores import class_scores, regression_scores
from uq.distributions import Empirical


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


def test_ten_quantiles_have_a_90_percent_interval_and_no_density():
    values = np.arange(10.0)[:, None] + np.zeros((10, 3))
    found = regression_scores(Empirical(values), np.array([0.0, 9.0, 9.1]))
    assert "nll" not in found
    assert found["coverage_90"] == pytest.approx(2 / 3)
    # The CRPS of draws at levels (i - 1/2)/10 is twice their mean pinball loss.
    y, levels = 9.1, QuantileBoosting.levels
    pinball = np.mean(np.maximum(levels * (y - values[:, 0]), (levels - 1) * (y - values[:, 0])))
    dist = Empirical(values[:, :1])
    assert float(dist.crps(torch.tensor([y]))) == pytest.approx(2 * pinball)


def test_a_probability_of_0_of_a_peer_is_no_certainty():
    class Certain:
        def fit(self, X, y): ...

        def predict_proba(self, X):
            return np.array([[1.0, 0.0]])

    model = SklearnClassifier(Certain()).fit(np.zeros((9, 1)), np.zeros(9))
    dist = model.predict_distribution(np.zeros((1, 1)))
    np.testing.assert_allclose(dist.probs.numpy(), [[0.95, 0.05]])

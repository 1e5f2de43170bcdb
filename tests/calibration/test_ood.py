from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from uq.calibration import aupr_in, aupr_out, auroc, fpr_at_tpr, ood_score
from uq.calibration.ood import ScoreGroups, curve_fpr_at_tpr
from uq.distributions import CategoricalMixture, NormalMixture
from uq.errors import DataError, ParameterError

METRICS = [auroc, aupr_in, aupr_out, fpr_at_tpr]
# Few distinct values, so that ties within and across the two groups are common.
scores = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=30)


def test_normal_scores_give_the_closed_forms():
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    familiar, out = norm.ppf(quantiles), norm.ppf(quantiles, 1, 2)
    assert auroc(familiar, out) == pytest.approx(0.67264, abs=2e-5)
    assert fpr_at_tpr(familiar, out) == pytest.approx(0.98898, abs=5e-5)  # not .62644


@given(scores, scores)
def test_metrics_agree_with_scikit_learn_ties_included(familiar, out):
    s = np.r_[familiar, out]
    y = np.r_[np.zeros(len(familiar)), np.ones(len(out))]
    assert auroc(familiar, out) == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    assert aupr_out(familiar, out) == pytest.approx(average_precision_score(y, s), abs=1e-12)
    assert aupr_in(familiar, out) == pytest.approx(average_precision_score(1 - y, -s), abs=1e-12)
    fpr, tpr, _ = roc_curve(y, s, drop_intermediate=False)
    assert fpr_at_tpr(familiar, out) == pytest.approx(fpr[tpr >= 0.95 - 1e-12][0], abs=1e-12)


@given(scores, scores, st.integers(0, 2**20))
def test_integer_weights_are_repetitions(familiar, out, seed):
    rng = np.random.default_rng(seed)
    w_in = rng.integers(0, 3, size=(3, len(familiar))) + np.eye(1, len(familiar), dtype=int)
    w_out = rng.integers(0, 3, size=(3, len(out))) + np.eye(1, len(out), dtype=int)
    weighted = ScoreGroups(np.array(familiar), np.array(out)).metrics(w_in, w_out)
    for b in range(3):
        repeated = np.repeat(familiar, w_in[b]), np.repeat(out, w_out[b])
        expected = [metric(*repeated) for metric in METRICS]
        np.testing.assert_allclose(weighted[b], expected, atol=1e-12)


@given(scores, scores)
def test_swapping_the_groups_and_the_sign_mirrors_the_metrics(familiar, out):
    f, o = np.array(familiar), np.array(out)
    assert auroc(f, o) == pytest.approx(1 - auroc(o, f), abs=1e-12)
    assert aupr_in(f, o) == pytest.approx(aupr_out(-o, -f), abs=1e-12)


def test_constant_scores_are_chance():
    assert auroc([1.0] * 30, [1.0] * 10) == 0.5
    assert aupr_out([1.0] * 30, [1.0] * 10) == 0.25
    assert aupr_in([1.0] * 30, [1.0] * 10) == 0.75
    assert fpr_at_tpr([1.0] * 30, [1.0] * 10) == 1.0


@pytest.mark.parametrize("n", [20, 40, 60, 100, 140, 180, 1000])
def test_the_rate_is_reached_at_exactly_95_percent(n):
    # 95 % of the OOD scores are 2, and so is no familiar one.
    out = np.r_[np.full(95 * n // 100, 2.0), np.zeros(n - 95 * n // 100)]
    assert fpr_at_tpr([1.0, 1.0], out) == 0.0
    assert fpr_at_tpr([1.0, 1.0], out, tpr=0.96) == 1.0


def test_the_rate_is_not_missed_by_rounding():
    # 0.55 · 100 is 55.00000000000001 in floating point.
    out = np.r_[np.full(55, 2.0), np.zeros(45)]
    assert fpr_at_tpr([1.0, 1.0], out, tpr=0.55) == 0.0


def test_the_rate_can_be_asked_of_many_weightings():
    groups = ScoreGroups(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    curve = groups.curve(np.ones((4, 3, 2)), np.ones((4, 3, 2)))
    assert curve_fpr_at_tpr(curve).shape == (4, 3)


@pytest.mark.parametrize("metric", METRICS)
def test_bad_scores_are_named(metric):
    with pytest.raises(DataError, match=f"{metric.__name__}: score_in is NaN at row 1"):
        metric([0.0, np.nan], [1.0])
    with pytest.raises(DataError, match=r"score_out needs shape \(n,\) with n >= 1, got \(0,\)"):
        metric([0.0], [])
    with pytest.raises(DataError, match=r"score_in needs shape .* got \(1, 2\)"):
        metric([[0.0, 1.0]], [1.0])


def test_the_rate_must_be_possible():
    with pytest.raises(ParameterError, match=r"tpr must lie in \(0, 1\], got 0"):
        fpr_at_tpr([0.0], [1.0], tpr=0)


def test_score_of_a_classifier_is_the_predictive_entropy():
    d = CategoricalMixture(torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]], dtype=torch.float64).log())
    np.testing.assert_allclose(ood_score(d), [np.log(2)], atol=1e-12)


def test_score_of_a_regressor_is_epistemic_where_there_is_such_a_thing():
    loc = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    scale = torch.tensor([1.0, 3.0])
    np.testing.assert_allclose(ood_score(NormalMixture(loc, scale)), [1.0, 0.0])
    np.testing.assert_allclose(ood_score(NormalMixture(loc[:1], scale)), [1.0, 9.0])
    two = NormalMixture(torch.stack([loc, 2 * loc], -1), torch.tensor(1.0))
    np.testing.assert_allclose(ood_score(two), [(1 + 4) / 2, 0.0])

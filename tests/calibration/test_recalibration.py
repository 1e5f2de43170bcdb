from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from scipy.stats import chi2
from sklearn.exceptions import ConvergenceWarning

from uq.calibration import (
    BetaCalibration,
    EvidenceScaling,
    HistogramBinning,
    IsotonicCalibration,
    MatrixScaling,
    TemperatureScaling,
    VectorScaling,
    expected_calibration_error,
    negative_log_likelihood,
)
from uq.distributions import CategoricalMixture, DirichletCategorical
from uq.errors import DataError

F64 = torch.float64
seeds = st.integers(0, 2**20)
MAPS = [TemperatureScaling(), VectorScaling(), MatrixScaling()]
BINARY = [*MAPS, BetaCalibration(), IsotonicCalibration(), HistogramBinning(n_bins=4)]
CLASSWISE = [IsotonicCalibration(), HistogramBinning(n_bins=4)]
ANY = [*MAPS, *CLASSWISE]


def name(value):
    return type(value).__name__


def label(rng, p):
    """A label of each row of ``p``, drawn with its probability."""
    return (p.cumsum(-1) > rng.random((len(p), 1))).argmax(-1)


def one_draw(log_odds, **kwargs):
    return CategoricalMixture(torch.as_tensor(log_odds)[None], **kwargs)


def calibrated(rng, n, n_classes, sharpness=2.0):
    """Log probabilities, and labels that are drawn from them."""
    log_p = log_softmax(sharpness * rng.standard_normal((n, n_classes)), -1)
    return log_p, label(rng, np.exp(log_p))


def mixture(seed, n=40, n_classes=3, n_draws=4, sharpness=3.0):
    """A mixture of several draws, and labels that have to do with it; every class occurs."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((n, n_classes))
    log_odds = sharpness * (shared + 0.5 * rng.standard_normal((n_draws, n, n_classes)))
    y = label(rng, softmax(shared, -1))
    y[:n_classes] = np.arange(n_classes)
    return CategoricalMixture(torch.as_tensor(log_odds)), y


def nll(dist, y, weight=None):
    return negative_log_likelihood(y, dist, sample_weight=weight)


# -- one temperature -----------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("n_classes", [2, 10])
@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_of_tempered_predictions_is_found(n_classes, true):
    rng = np.random.default_rng(0)
    log_p, y = calibrated(rng, 10_000, n_classes)
    found = TemperatureScaling().fit(one_draw(true * log_p), y).temperature_
    # Information about 1/T in a row: the variance of its reported log probabilities.
    p, reported = np.exp(log_p), true * log_p
    variance = (p * reported**2).sum(-1) - (p * reported).sum(-1) ** 2
    assert abs(1 / found - 1 / true) <= 5 / math.sqrt(variance.sum())
    assert abs(found / true - 1) < 0.05  # what the line before allows is tight enough to fail


@given(seeds)
def test_the_temperature_matches_the_mean_log_probability(seed):
    """At the optimum of one draw, labels have the log probability that is expected."""
    dist, y = mixture(seed, n_draws=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        scaling = TemperatureScaling().fit(dist, y)
    if 0.011 < scaling.temperature_ < 99:
        reported, p = dist.logits[0].numpy(), scaling.transform(dist).probs.numpy()
        expected = (p * reported).sum(-1)
        observed = reported[np.arange(len(y)), y]
        assert observed.mean() == pytest.approx(expected.mean(), abs=1e-5)


@given(seeds)
def test_no_temperature_scores_a_mixture_better(seed):
    dist, y = mixture(seed)
    scaling = TemperatureScaling().fit(dist, y)
    found = nll(scaling.transform(dist), y)
    for t in np.geomspace(0.02, 50, 60):
        p = softmax(dist.logits.numpy() / t, -1).mean(0)
        assert found <= -np.log(p[np.arange(len(y)), y]).mean() + 1e-9


def test_each_draw_is_tempered_so_that_the_split_stays():
    dist, y = mixture(0)
    scaling = TemperatureScaling().fit(dist, y)
    tempered = scaling.transform(dist)
    expected = torch.softmax(dist.logits / scaling.temperature_, -1)
    torch.testing.assert_close(tempered.logits.exp(), expected)
    assert tempered.n_draws == dist.n_draws
    assert (tempered.epistemic > 0).all()


@given(seeds)
def test_the_most_probable_class_of_one_draw_stays(seed):
    dist, y = mixture(seed, n_draws=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        tempered = TemperatureScaling().fit(dist, y).transform(dist)
    assert torch.equal(tempered.mode, dist.mode)


@pytest.mark.parametrize(("right", "bound"), [(True, 0.01), (False, 100.0)])
def test_a_temperature_without_end_stops_at_its_bound(right, bound):
    y = np.array([0, 1, 2] * 5)
    dist = one_draw(3.0 * np.eye(3)[y])
    with pytest.warns(ConvergenceWarning, match=f"bound {bound:g}: .* always better"):
        scaling = TemperatureScaling().fit(dist, y if right else (y + 1) % 3)
    assert scaling.temperature_ == pytest.approx(bound)
    assert scaling.transform(dist).probs.isfinite().all()


# -- evidence ------------------------------------------------------------------------------------


@given(st.integers(11, 19), st.floats(0.05, 20))
def test_the_scale_of_the_evidence_has_its_closed_form(right, evidence):
    """(1 + c e) / (2 + c e) is the accuracy, for evidence e of one class of two."""
    y = np.arange(20) % 2
    claimed = np.where(np.arange(20) < right, y, 1 - y)
    dist = DirichletCategorical(torch.as_tensor(1 + evidence * np.eye(2)[claimed]))
    accuracy = right / 20
    expected = (2 * accuracy - 1) / (1 - accuracy) / evidence
    assert EvidenceScaling().fit(dist, y).scale_ == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prior", [0.5, 1.0])
def test_scaling_evidence_undoes_what_held_it_back(prior):
    rng = np.random.default_rng(0)
    evidence = rng.gamma(0.3, 30.0, (20_000, 4))
    alpha = prior + evidence
    p = alpha / alpha.sum(-1, keepdims=True)
    y = label(rng, p)
    timid = DirichletCategorical(torch.as_tensor(prior + evidence / 50), prior=prior)
    timid.index = pd.RangeIndex(5, 20_005)
    scaling = EvidenceScaling().fit(timid[:10_000], y[:10_000])
    scaled = scaling.transform(timid[10_000:])
    error = expected_calibration_error(y[10_000:], timid[10_000:])
    assert expected_calibration_error(y[10_000:], scaled) < error / 3
    expected = prior + scaling.scale_ * evidence[10_000:] / 50
    np.testing.assert_allclose(scaled.concentration, expected, rtol=1e-12)
    assert scaled.prior == prior
    assert scaled.index[0] == 10_005
    assert torch.equal(scaled.mode, timid[10_000:].mode)
    assert torch.equal(scaled.vacuity.argsort(), timid[10_000:].vacuity.argsort())
    excess = nll(scaling.transform(timid[:10_000]), y[:10_000])
    true = DirichletCategorical(torch.as_tensor(alpha[:10_000]), prior=prior)
    ratio = 2 * 10_000 * (nll(true, y[:10_000]) - excess)
    assert 0 <= ratio <= chi2(1).isf(1e-6)


def test_evidence_without_end_stops_at_its_bound():
    y = np.array([0, 1, 2] * 5)
    dist = DirichletCategorical(torch.as_tensor(1 + np.eye(3)[y]))
    with pytest.warns(ConvergenceWarning, match=r"bound 1e\+06: .* sharper is always better"):
        EvidenceScaling().fit(dist, y)
    with pytest.warns(ConvergenceWarning, match="bound 1e-06: .* flatter is always better"):
        EvidenceScaling().fit(dist, (y + 1) % 3)


def test_evidence_scaling_refuses_predictions_without_evidence():
    dist, y = mixture(0)
    with pytest.raises(DataError, match=r"fit: dist must be a DirichletCategorical, got a Categ"):
        EvidenceScaling().fit(dist, y)
    fitted = EvidenceScaling().fit(
        DirichletCategorical(1 + 2 * torch.eye(2).repeat(3, 1)), [0, 1, 0, 1, 1, 0]
    )
    with pytest.raises(DataError, match=r"transform: dist must be a DirichletCategorical"):
        fitted.transform(one_draw(np.zeros((2, 2))))


# -- maps of the log probabilities -----------------------------------------------------------------


def distorted(rng, log_p, kind):
    """Reported log probabilities that a map of ``kind`` turns into the true ones."""
    k = log_p.shape[-1]
    if kind == "vector":
        weight = np.diag(rng.uniform(0.4, 1.2, k))
    elif kind == "matrix":
        weight = 0.7 * np.eye(k) + 0.15 * rng.standard_normal((k, k))
    bias = 0.5 * rng.standard_normal(k)
    # Reported rows must be log probabilities: shift the true log odds of a row until they are.
    inverse = np.linalg.inv(weight)
    reported = []
    for row in log_p:
        low, high = -60.0, 60.0
        at = lambda c, row=row: inverse @ (row + c - bias)  # noqa: E731
        for _ in range(80):
            middle = (low + high) / 2
            rising = inverse.sum() > 0
            above = np.logaddexp.reduce(at(middle)) > 0
            low, high = (low, middle) if above == rising else (middle, high)
        reported.append(at((low + high) / 2))
    return np.array(reported), weight, bias

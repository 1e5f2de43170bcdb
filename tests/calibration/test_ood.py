from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp, norm
from sklearn import metrics as sk
from sklearn.metrics import average_precision_score, roc_auc_score

from uq.calibration import (
    aupr_in,
    aupr_out,
    auroc,
    detection_error,
    fpr_at_tpr,
    ood_score,
    roc_curve,
)
from uq.calibration.bootstrap import Resampling, estimates, sample_ood
from uq.calibration.ood import OOD_METRICS, ScoreGroups, curve_fpr_at_tpr
from uq.distributions import CategoricalMixture, ClassPredictive, NormalMixture
from uq.errors import DataError, NoEpistemicError, ParameterError

METRICS = [auroc, aupr_in, aupr_out, fpr_at_tpr, detection_error]  # as in OOD_METRICS
# Few distinct values, so that ties within and across the two groups are common.
scores = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=30)


def test_normal_scores_give_the_closed_forms():
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    familiar, out = norm.ppf(quantiles), norm.ppf(quantiles, 1, 2)
    assert auroc(familiar, out) == pytest.approx(0.67264, abs=2e-5)
    assert fpr_at_tpr(familiar, out) == pytest.approx(0.98898, abs=5e-5)  # not .62644
    # The best threshold t is where the densities φ(t) and ½φ((t − 1)/2) cross.
    t = (-2 + np.sqrt(4 + 12 * (1 + 8 * np.log(2)))) / 6
    best = (norm.sf(t) + norm.cdf(t, 1, 2)) / 2
    assert detection_error(familiar, out) == pytest.approx(best, abs=1e-4)


@pytest.mark.statistical
def test_metrics_of_drawn_scores_lie_within_chance_of_the_closed_forms():
    n = 100_000
    rng = np.random.default_rng(0)
    familiar, out = rng.normal(size=n), rng.normal(1, 2, size=n)
    # Var AUROC <= AUROC (1 − AUROC)/n (Birnbaum and Klose, 1957); a share has p (1 − p)/n, and the
    # threshold adds its own, f_in² .95 · .05/(n f_out²).
    assert auroc(familiar, out) == pytest.approx(0.67264, abs=5 * np.sqrt(0.673 * 0.327 / n))
    t = norm.ppf(0.05, 1, 2)
    ratio = norm.pdf(t) / norm.pdf(t, 1, 2)
    error = np.sqrt((0.98898 * 0.01102 + ratio**2 * 0.95 * 0.05) / n)
    assert fpr_at_tpr(familiar, out) == pytest.approx(0.98898, abs=5 * error)


def test_a_case_worked_by_hand():
    # Thresholds from the top: {2: out} {1: in, out} {0: in}, the two at 1 flagged together.
    familiar, out = [0.0, 1.0], [1.0, 2.0]
    assert auroc(familiar, out) == (0.5 + 1 + 1 + 1) / 4
    assert aupr_out(familiar, out) == 0.5 * 1 + 0.5 * (2 / 3)
    assert aupr_in(familiar, out) == 0.5 * 1 + 0.5 * (2 / 3)
    assert fpr_at_tpr(familiar, out) == 0.5
    assert fpr_at_tpr(familiar, out, tpr=0.5) == 0.0
    assert detection_error(familiar, out) == 0.25


def test_infinite_scores_are_scores():
    assert auroc([-np.inf, 0.0], [1.0, np.inf]) == 1.0
    assert auroc([np.inf], [np.inf]) == 0.5
    assert detection_error([np.inf], [0.0]) == 0.5  # flag all or nothing


@given(scores, scores)
def test_metrics_agree_with_scikit_learn_ties_included(familiar, out):
    s = np.r_[familiar, out]
    y = np.r_[np.zeros(len(familiar)), np.ones(len(out))]
    assert auroc(familiar, out) == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    assert aupr_out(familiar, out) == pytest.approx(average_precision_score(y, s), abs=1e-12)
    assert aupr_in(familiar, out) == pytest.approx(average_precision_score(1 - y, -s), abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(y, s, drop_intermediate=False)
    assert fpr_at_tpr(familiar, out) == pytest.approx(fpr[tpr >= 0.95 - 1e-12][0], abs=1e-12)
    assert detection_error(familiar, out) == pytest.approx(((fpr + 1 - tpr) / 2).min(), abs=1e-12)


@given(scores, scores)
def test_detection_error_is_the_one_sided_kolmogorov_smirnov_distance(familiar, out):
    distance = ks_2samp(familiar, out, alternative="greater", method="asymp").statistic
    assert detection_error(familiar, out) == pytest.approx((1 - distance) / 2, abs=1e-12)


@given(scores, scores, st.integers(0, 2**20))
def test_metrics_depend_on_the_order_of_scores_alone(familiar, out, seed):
    rng = np.random.default_rng(seed)
    f, o = rng.permutation(familiar), rng.permutation(out)
    for metric in METRICS:
        expected = metric(familiar, out)
        assert metric(f, o) == pytest.approx(expected, abs=1e-12)
        assert metric(np.expm1(f) * 7, np.expm1(o) * 7) == pytest.approx(expected, abs=1e-12)
        assert metric(np.tile(f, 3), np.tile(o, 3)) == pytest.approx(expected, abs=1e-12)


def test_the_table_of_definitions_names_the_functions():
    values = ScoreGroups(np.zeros(1), np.ones(1)).metrics(np.ones(1), np.ones(1))
    assert values.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    names = [m.__name__ for m in METRICS]
    assert [d.name for d in OOD_METRICS] == [n.replace("at_tpr", "at_95_tpr") for n in names]
    assert [d.better for d in OOD_METRICS] == ["higher"] * 3 + ["lower"] * 2


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
    assert detection_error([1.0] * 30, [1.0] * 10) == 0.5


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
    with pytest.raises(DataError, match="score_out must hold numbers: could not convert"):
        metric([0.0], ["high"])


def test_the_rate_must_be_possible():
    with pytest.raises(ParameterError, match=r"tpr must lie in \(0, 1\], got 0"):
        fpr_at_tpr([0.0], [1.0], tpr=0)


# -- ROC curve ---------------------------------------------------------------------------------


def distance_to_curve(points, corners):
    """Distance of each of ``points`` (k, 2) from the line through ``corners`` (c, 2)."""
    start, step = corners[:-1], np.diff(corners, axis=0)
    along = ((points[:, None] - start) * step).sum(-1) / np.square(step).sum(-1)
    nearest = start + along.clip(0, 1)[..., None] * step
    return np.linalg.norm(points[:, None] - nearest, axis=-1).min(1)


def whole_curve(familiar, out):
    y = np.r_[np.zeros(len(familiar)), np.ones(len(out))]
    return np.stack(sk.roc_curve(y, np.r_[familiar, out], drop_intermediate=False)[:2], 1)


@given(scores, scores)
def test_roc_curve_has_the_corners_of_scikit_learns(familiar, out):
    corners = np.stack(roc_curve(familiar, out), 1)
    whole = whole_curve(familiar, out)
    assert distance_to_curve(whole, corners).max() < 1e-12
    assert {*map(tuple, corners)} <= {*map(tuple, whole)}
    step = np.diff(corners, axis=0)
    turn = step[1:, 0] * step[:-1, 1] - step[:-1, 0] * step[1:, 1]
    assert (np.abs(turn) > 1e-12).all()  # none could be left out
    assert np.trapezoid(corners[:, 1], corners[:, 0]) == pytest.approx(auroc(familiar, out))


@given(st.integers(0, 2**20), st.integers(2, 60), st.sampled_from([0.0, 1.0, 3.0]))
def test_a_thinned_roc_curve_stays_where_it_was(seed, max_points, shift):
    rng = np.random.default_rng(seed)
    familiar, out = rng.normal(size=400), rng.normal(shift, 1, size=30)  # long and short steps
    corners = np.stack(roc_curve(familiar, out, max_points=max_points), 1)
    assert len(corners) <= max_points
    assert corners[0].tolist() == [0, 0]
    assert corners[-1].tolist() == [1, 1]
    moved = distance_to_curve(whole_curve(familiar, out), corners)
    assert moved.max() <= 2 / (max_points - 1)


def test_a_large_roc_curve_is_thinned_beyond_what_an_eye_can_see():
    rng = np.random.default_rng(0)
    familiar, out = rng.normal(size=20_000), rng.normal(1, 2, size=20_000)
    corners = np.stack(roc_curve(familiar, out), 1)
    assert 400 < len(corners) <= 500
    assert distance_to_curve(whole_curve(familiar, out)[::10], corners).max() < 0.002


def test_roc_curve_refuses_bad_input():
    with pytest.raises(ParameterError, match="max_points must be an integer >= 2, got 1"):
        roc_curve([0.0], [1.0], max_points=1)
    with pytest.raises(DataError, match="roc_curve: score_in is NaN at row 0"):
        roc_curve([np.nan], [1.0])


# -- scores of predictives ---------------------------------------------------------------------


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


def test_each_kind_of_score_of_a_classifier():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), size=(5, 7))  # (draws, n, classes)
    d = CategoricalMixture(torch.as_tensor(p).log())
    mean = p.mean(0)
    total = -(mean * np.log(mean)).sum(1)
    within = -(p * np.log(p)).sum(2).mean(0)
    expected = {
        "auto": total,
        "entropy": total,
        "max_probability": 1 - mean.max(1),
        "mutual_information": total - within,
        "epistemic": total - within,
    }
    for kind, value in expected.items():
        np.testing.assert_allclose(ood_score(d, kind), value, rtol=1e-9)
        assert ood_score(d, kind).dtype == np.float64


def test_each_kind_of_score_of_a_regressor():
    loc = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    d = NormalMixture(loc, torch.tensor([1.0, 3.0]))
    np.testing.assert_allclose(ood_score(d, "epistemic"), [1.0, 0.0])
    np.testing.assert_allclose(ood_score(d, "variance"), [2.0, 9.0])
    joint = NormalMixture(torch.stack([loc, 2 * loc], -1), torch.tensor(1.0)).joint()
    np.testing.assert_allclose(ood_score(joint, "variance"), [1 + (1 + 4) / 2, 1.0])


def test_max_probability_ranks_predictions_that_round_to_one():
    d = CategoricalMixture(torch.tensor([[[60.0, 0.0], [80.0, 0.0]]], dtype=torch.float64))
    assert (d.probs[:, 0] == 1).all()
    np.testing.assert_allclose(ood_score(d, "max_probability"), np.exp([-60.0, -80.0]))


def test_any_distribution_over_classes_has_a_score():
    class Known(ClassPredictive):
        probs = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
        classes = np.array(["no", "yes"])
        n_draws = 1

        @property
        def epistemic(self):
            raise self._no_epistemic()

        aleatoric = draws = to_frame = _map = _rows = None

    d = Known(torch.Size([2]))
    np.testing.assert_allclose(ood_score(d), [np.log(2), 0])
    np.testing.assert_allclose(ood_score(d, "max_probability"), [0.5, 0])
    with pytest.raises(NoEpistemicError):
        ood_score(d, "mutual_information")


def test_scores_that_do_not_exist_are_refused():
    classes = CategoricalMixture(torch.zeros(1, 3, 2))
    real = NormalMixture(torch.zeros(1, 3), torch.tensor(1.0))
    with pytest.raises(ParameterError, match=r"one of \['auto', .* for classification, got 'vari"):
        ood_score(classes, "variance")
    for kind in ("mutual_information", "entropy", "max_probability", "?"):
        with pytest.raises(ParameterError, match=r"\['auto', 'epistemic', 'variance'\] for regr"):
            ood_score(real, kind)
    for d in (classes, real):
        with pytest.raises(NoEpistemicError, match="single parameter value"):
            ood_score(d, "epistemic")
        with pytest.raises(DataError, match=r"needs batch shape \(n,\).*, got \(\)"):
            ood_score(d[0])
    with pytest.raises(DataError, match="predictive distribution of uq, got a ndarray"):
        ood_score(np.ones((3, 2)) / 2)


@pytest.mark.parametrize("shift", [-4.0, 0.0, 3.0])
def test_interval_of_average_precision_holds_its_value(shift):
    """Resampling repeats rows, which average precision takes for ties: replicates move up."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(200), shift + rng.standard_normal(100)
    settings = Resampling(n_resamples=200)
    sampled = sample_ood([scores[0]], [scores[1]], settings)
    for estimate in estimates(sampled, OOD_METRICS, settings)[0].values():
        assert estimate.low <= estimate.value <= estimate.high


def test_distributions_are_no_scores():
    d = CategoricalMixture(torch.zeros(1, 5, 3))
    with pytest.raises(DataError, match=r"pass ood_score\(score_in\)"):
        auroc(d, d)

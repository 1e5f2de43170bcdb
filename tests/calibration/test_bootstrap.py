"""Intervals against closed forms and SciPy, and how often they hold the truth in simulations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from uq.calibration import bootstrap
from uq.calibration.bootstrap import (
    Resampling,
    Sampled,
    differences,
    estimates,
    sample_metrics,
    sample_ood,
    standings,
)
from uq.calibration.class_definitions import (
    ACCURACY,
    BRIER,
    CLASSIFICATION,
    MISCLASSIFICATION_AUROC,
    MMCE,
    NLL,
    classwise_metric,
    ece_metric,
)
from uq.calibration.definitions import Definition
from uq.calibration.ood import OOD_METRICS
from uq.calibration.real_definitions import CRPS, MAE, QUANTILE_ERROR, RMSE, coverage_metric
from uq.calibration.rows import ClassificationRows, Names, RegressionRows
from uq.distributions import NormalMixture
from uq.errors import ParameterError

NAMES = Names("test")
EPISTEMIC = next(m for m in CLASSIFICATION["sharpness"] if m.name == "mean_epistemic")


def losses(values):
    """Two-class rows whose log scores are ``values`` (finite ones above 0)."""
    p = np.exp(-np.asarray(values, float))
    return ClassificationRows(np.zeros(len(p), int), np.stack([p, 1 - p], 1), NAMES)


def normal(y, mean, scale):
    d = NormalMixture(torch.as_tensor(mean)[None], torch.as_tensor(scale)[None])
    return RegressionRows(y, d, NAMES)


def estimate(rows, metric, **settings):
    s = Resampling(**settings)
    return estimates(sample_metrics([rows], [metric], s), [metric], s, [rows])[0][metric.name]


# -- closed forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [12, 400])
def test_interval_of_a_symmetric_mean_is_students(n):
    x = 2 + stats.norm.ppf((np.arange(n) + 0.5) / n) / 4
    e = estimate(losses(x), NLL, n_resamples=20_000)
    se = x.std(ddof=1) / np.sqrt(n)
    t = stats.t.ppf(0.975, n - 1)
    # A 1 % quantile of R draws has the error √(.01 · .99/R)/φ(2.3) = .025 se; 5 of them. The normal
    # interval of 12 rows is .34 se away.
    assert [e.low, e.high] == pytest.approx([2 - t * se, 2 + t * se], abs=0.13 * se)
    assert e.value == pytest.approx(2)


def test_interval_of_a_skewed_mean_is_the_bca_interval_of_scipy():
    n = 60
    x = stats.expon.ppf((np.arange(n) + 0.5) / n)
    e = estimate(losses(x), NLL, n_resamples=40_000)
    level = 1 - 2 * stats.norm.sf(np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))

    def peer(method):
        found = stats.bootstrap(
            (x,), np.mean, n_resamples=40_000, confidence_level=level, method=method, rng=1
        )
        return found.confidence_interval

    se = x.std() / np.sqrt(n)
    # Each has an error of .013 se from its quantiles, SciPy another .013 from its estimate of the
    # bias; plain percentiles are .23 se away.
    low, high = peer("BCa")
    assert [e.low, e.high] == pytest.approx([low, high], abs=0.11 * se)
    assert e.low - peer("percentile").low > 0.15 * se


@pytest.mark.parametrize("right", [0, 13, 20])
def test_shares_have_the_interval_of_clopper_and_pearson(right):
    p = np.tile([0.9, 0.1], (20, 1))
    rows = ClassificationRows([0] * right + [1] * (20 - right), p, NAMES)
    e = estimate(rows, ACCURACY)
    low = stats.beta.ppf(0.025, right, 21 - right) if right else 0.0
    high = stats.beta.ppf(0.975, right + 1, 20 - right) if right < 20 else 1.0
    assert (e.value, e.low, e.high) == pytest.approx((right / 20, low, high))
    assert e.p_value is None


def test_coverage_is_tested_against_what_it_should_be():
    y = np.r_[np.zeros(30), np.full(10, 5.0)]
    e = estimate(normal(y, np.zeros(40), np.ones(40)), coverage_metric(0.9))
    assert e.p_value == pytest.approx(stats.binomtest(30, 40, 0.9).pvalue)


def test_the_widths_of_all_pairs_follow_tukeys_range():
    """Four equally good methods: the largest standardised difference is a range/√2."""
    metric = Definition("x", "X", "", "lower")
    replicates = np.random.default_rng(0).standard_normal((20_000, 4, 1))
    sampled = Sampled(np.zeros((4, 1)), replicates)
    found = differences(sampled, [metric], list("abcd"), Resampling())
    factor = stats.studentized_range.ppf(0.95, 4, np.inf) / np.sqrt(2)  # 2.57
    assert len(found) == 6
    # √(.95 · .05/R)/density(2.57) = .0015/.14, and 1/√(2R) of the deviations; 5 of them.
    widths = [d.high / np.sqrt(2) for d in found]
    assert widths == pytest.approx([factor] * 6, abs=0.1)
    two = differences(
        Sampled(np.zeros((2, 1)), replicates[:, :2]), [metric], ["a", "b"], Resampling()
    )
    assert two[0].high / np.sqrt(2) == pytest.approx(1.96, abs=0.1)


def test_an_error_of_detection_is_not_flattered_by_its_best_threshold():
    """Indistinguishable scores: the least error is below 1/2, its interval still holds 1/2."""
    rng = np.random.default_rng(0)
    s = Resampling()
    scores = rng.standard_normal((2, 300))
    sampled = sample_ood([scores[0]], [scores[1]], s)
    e = estimates(sampled, OOD_METRICS, s)[0]["detection_error"]
    percentile = np.quantile(sampled.replicates[:, 0, -1], [0.025, 0.975])
    assert e.value < 0.48
    assert (e.low, e.high) > tuple(percentile)


# -- edges -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:1 of 50 labels have predictive probability 0:RuntimeWarning")
def test_an_infinite_score_leaves_the_lower_end():
    x = np.linspace(0.5, 1.5, 50)
    with_one = np.r_[np.inf, x[1:]]
    e = estimate(losses(with_one), NLL)
    # (1 − 1/50)⁵⁰ = 36 % of the resamples miss the row.
    assert (e.value, e.high) == (np.inf, np.inf)
    assert 0.8 < e.low < 1.0
    rows, s = [losses(with_one), losses(x), losses(with_one)], Resampling()
    first, same, last = differences(sample_metrics(rows, [NLL], s), [NLL], list("abc"), s)
    assert (first.value, first.high, first.winner) == (np.inf, np.inf, "")
    assert (same.value, same.low, same.high, same.winner) == (0.0, 0.0, 0.0, "")
    assert (last.value, last.low) == (-np.inf, -np.inf)


def test_one_row_has_values_without_intervals():
    for metric in (NLL, ACCURACY, ece_metric()):
        e = estimate(losses([1.0]), metric)
        assert np.isfinite(e.value)
        assert np.isnan([e.low, e.high]).all()
        assert e.note == "an interval needs two rows"


def test_what_is_undefined_says_why():
    e = estimate(losses([0.1, 0.2, 0.3]), MISCLASSIFICATION_AUROC)
    assert np.isnan([e.value, e.low, e.high]).all()
    assert e.note == MISCLASSIFICATION_AUROC.undefined != ""
    assert estimate(losses([0.1, 0.2]), EPISTEMIC).note == EPISTEMIC.undefined != ""


def test_a_metric_undefined_for_one_method_is_compared_among_the_others():
    rows, s = [losses([0.1] * 20), losses([0.1, 0.9] * 10), losses([0.9, 0.1] * 10)], Resampling()
    sampled = sample_metrics(rows, [MISCLASSIFICATION_AUROC], s)
    found = differences(sampled, [MISCLASSIFICATION_AUROC], list("abc"), s)
    assert [(d.first, d.second) for d in found] == [("b", "c")]
    values = dict(zip("abc", sampled.values[:, 0], strict=True))
    assert standings(found, MISCLASSIFICATION_AUROC, values)["a"] == ""


def test_resamples_without_errors_are_left_out():
    x = np.r_[np.full(29, 0.1), 0.9]  # one wrong row: (1 − 1/30)³⁰ of the resamples have none
    e = estimate(losses(x), MISCLASSIFICATION_AUROC)
    assert (e.value, e.low, e.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Resampling(interval=1.0), r"here: interval must lie in \(0, 1\), got 1.0"),
        (Resampling(n_resamples=99), "n_resamples must be an integer >= 100, got 99"),
        (Resampling(n_resamples=1e3), "n_resamples must be an integer >= 100, got 1000.0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ParameterError, match=message):
        settings.check("here")


# -- resamples ---------------------------------------------------------------------------------


def test_the_seed_decides_and_the_size_of_blocks_does_not(monkeypatch):
    rows = losses(np.linspace(0.1, 2, 40))
    metrics = (NLL, BRIER, ece_metric(), MMCE, MISCLASSIFICATION_AUROC)
    once = sample_metrics([rows], metrics, Resampling(n_resamples=100)).replicates
    monkeypatch.setattr(bootstrap, "_BLOCK_ELEMENTS", 7 * 40)
    again = sample_metrics([rows], metrics, Resampling(n_resamples=100)).replicates
    np.testing.assert_allclose(again, once, rtol=1e-12)
    other = sample_metrics([rows], metrics, Resampling(n_resamples=100, seed=1)).replicates
    assert not np.isclose(other[:, 0, 0], once[:, 0, 0]).any()


def test_replicates_are_the_metrics_of_the_resampled_rows():
    rng = np.random.default_rng(0)
    p, y = rng.dirichlet(np.ones(3), 30), rng.integers(3, size=30)
    metrics = [m for section in CLASSIFICATION.values() for m in section if m is not EPISTEMIC]
    rows = ClassificationRows(y, p, NAMES)
    s = Resampling(n_resamples=100)
    sampled = sample_metrics([rows], metrics, s)
    ((weights,),) = bootstrap._resamples(s, 30)
    assert (weights.sum(1) == 30).all()
    for replicate, weight in zip(sampled.replicates[:5, 0], weights, strict=False):
        repeated = np.repeat(np.arange(30), weight.astype(int))
        drawn = ClassificationRows(y[repeated], p[repeated], NAMES)
        for metric, found in zip(metrics, replicate, strict=True):
            if metric.name != "debiased_calibration_error":  # bins of equal mass are those of all
                expected = metric.value(drawn, np.ones(30))
                assert found == pytest.approx(expected, abs=2e-6), metric.name


def test_twins_tie_exactly_because_resamples_are_shared():
    rows, s = [losses(np.linspace(0.1, 2, 40))] * 2, Resampling()
    (d,) = differences(sample_metrics(rows, [NLL], s), [NLL], ["a", "b"], s)
    assert (d.value, d.low, d.high, d.winner) == (0.0, 0.0, 0.0, "")


# -- simulations -------------------------------------------------------------------------------


def class_rows(rng, n, temperature):
    """Labels of a softmax, predicted at another temperature; 1 is calibrated."""
    logits = 2 * rng.standard_normal((n, 4))
    y = (logits + rng.gumbel(size=(n, 4))).argmax(1)
    p = torch.softmax(torch.as_tensor(logits / temperature), 1).numpy()
    return ClassificationRows(y, p, NAMES)


def real_rows(rng, n, factor):
    """Normal targets, predicted with scales times a factor; 1 is calibrated."""
    mean, scale = rng.standard_normal(n), np.exp(0.3 * rng.standard_normal(n))
    return normal(mean + scale * rng.standard_normal(n), mean, factor * scale)


CLASS = (NLL, BRIER, ACCURACY, ece_metric(), MMCE, classwise_metric(), MISCLASSIFICATION_AUROC)
REAL = (NLL, CRPS, RMSE, MAE, QUANTILE_ERROR, coverage_metric(0.9))


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("make", "parameter", "metrics"),
    [
        (class_rows, 1.0, CLASS),
        (class_rows, 0.6, CLASS),
        (real_rows, 1.0, REAL),
        (real_rows, 0.7, REAL),
    ],
)
def test_intervals_hold_the_population_value(make, parameter, metrics):
    """At n = 200, where a calibrated model has errors of 0 though chance always shows some."""
    population = make(np.random.default_rng(10**6), 300_000, parameter)
    truth = {m.name: m.value(population, np.ones(300_000)) for m in metrics}
    if parameter == 1.0:
        truth |= {m.name: 0.0 for m in metrics if m.null is not None}
    repeats, held = 150, dict.fromkeys(truth, 0)
    for seed in range(repeats):
        rows, s = (
            make(np.random.default_rng([seed, 5]), 200, parameter),
            Resampling(n_resamples=200),
        )
        for name, e in estimates(sample_metrics([rows], metrics, s), metrics, s, [rows])[0].items():
            held[name] += e.low <= truth[name] + 1e-9 and e.high >= truth[name] - 1e-9
    # Of 200 rows an interval with a rate of .93 is what a skewed score can have: squared errors.
    least = stats.binom.ppf(1e-6, repeats, 0.93)
    assert {name: count / repeats for name, count in held.items() if count < least} == {}


@pytest.mark.statistical
def test_equal_methods_rarely_have_a_winner_and_a_better_one_does():
    """Any false winner among the six pairs of four methods is one of at most 5 % of data sets."""
    metrics, repeats, n = (NLL, CRPS, RMSE), 100, 600
    wrong, right = dict.fromkeys([m.name for m in metrics], 0), 0
    for seed in range(repeats):
        rng, s = np.random.default_rng([seed, 6]), Resampling(n_resamples=200)
        noise, y = 0.7 * rng.standard_normal((4, n)), rng.standard_normal(n)
        for shrink in (1.0, 0.0):  # the last is the truth
            means = noise * np.array([1, 1, 1, shrink])[:, None]
            rows = [normal(y, m, np.full(n, 1.2)) for m in means]
            found = differences(sample_metrics(rows, metrics, s), metrics, list("abcd"), s)
            if shrink == 1:
                for name in {d.metric for d in found if d.winner}:
                    wrong[name] += 1
            else:
                right += all(
                    d.winner == "d" for d in found if d.metric == "crps" and d.second == "d"
                )
    assert max(wrong.values()) <= stats.binom.ppf(1 - 1e-6, repeats, 0.05)
    assert right > 0.5 * repeats

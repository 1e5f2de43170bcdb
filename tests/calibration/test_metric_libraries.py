"""Our metrics beside those of other libraries on the same predictions; where they differ, why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from uq.calibration import (
    accuracy,
    brier_score,
    crps,
    energy_score,
    expected_calibration_error,
    expected_normalized_calibration_error,
    interval_coverage,
    interval_score,
    maximum_calibration_error,
    mean_interval_width,
    misclassification_auroc,
    mmce,
    negative_log_likelihood,
    pinball_loss,
    pit_values,
    quantile_calibration_error,
    rmse,
    sharpness,
    uncertainty_calibration_error,
)
from uq.distributions import Empirical, NormalMixture

N, BINS = 500, 15
RNG = np.random.default_rng(0)
LOGITS = 1.5 * RNG.standard_normal((N, 4))
LABELS = (LOGITS + RNG.gumbel(size=LOGITS.shape)).argmax(1)
P = torch.softmax(torch.as_tensor(1.4 * LOGITS), 1).numpy()
TWO, IS_ZERO = np.stack([1 - P[:, 0], P[:, 0]], 1), (LABELS == 0).astype(int)
RIGHT = P.argmax(1) == LABELS
EDGE = np.array([[0.05, 0.95], [0.0, 1.0]])  # a confidence of exactly 1
WEIGHT = RNG.uniform(0, 2, N)

# Four values of the deviation, so that bins of equal width and of equal mass are the same four.
MEAN, SCALE = RNG.standard_normal(N), np.repeat([0.5, 1.0, 1.5, 2.0], N // 4)
Y = MEAN + 1.3 * SCALE * RNG.standard_normal(N)
NORMAL = NormalMixture(torch.as_tensor(MEAN)[None], torch.as_tensor(SCALE)[None])
EXACT = norm(MEAN, SCALE)
DRAWS = MEAN + SCALE * RNG.standard_normal((50, N))


def same(value, rel=1e-12):
    return pytest.approx(float(value), rel=rel)


# -- SciPy and scikit-learn --------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_scikit_learn(weight):
    from sklearn.metrics import (
        accuracy_score,
        brier_score_loss,
        log_loss,
        mean_pinball_loss,
        roc_auc_score,
        root_mean_squared_error,
    )

    w = {"sample_weight": weight}
    # log_loss clips at the epsilon of the dtype, ours never: the same while no p is that small.
    assert negative_log_likelihood(LABELS, P, **w) == same(log_loss(LABELS, P, **w))
    # Half of Σ_k (p_k − y_k)² for two classes and the whole for more, in both: its scale_by_half.
    two = brier_score_loss(IS_ZERO, TWO[:, 1], **w)
    assert brier_score(IS_ZERO, TWO, **w) == same(two)
    squares = np.square(P - np.eye(4)[LABELS]).sum(1)
    assert brier_score(LABELS, P, **w) == same(np.average(squares, weights=weight))
    assert accuracy(LABELS, P, **w) == same(accuracy_score(LABELS, P.argmax(1), **w))
    assert misclassification_auroc(LABELS, P, **w) == same(roc_auc_score(RIGHT, P.max(1), **w))
    for level in (0.05, 0.5, 0.9):
        theirs = mean_pinball_loss(Y, EXACT.ppf(level), alpha=level, **w)
        assert pinball_loss(Y, NORMAL, level=level, **w) == same(theirs)
    assert rmse(Y, NORMAL, **w) == same(root_mean_squared_error(Y, MEAN, **w))


def test_scipy():
    assert negative_log_likelihood(Y, NORMAL) == same(-EXACT.logpdf(Y).mean())
    np.testing.assert_allclose(pit_values(Y, NORMAL), EXACT.cdf(Y), rtol=1e-12, atol=1e-15)
    lower, upper = EXACT.interval(0.8)
    assert interval_coverage(Y, NORMAL, coverage=0.8) == ((lower <= Y) & (upper >= Y)).mean()
    assert mean_interval_width(Y, NORMAL, coverage=0.8) == same((upper - lower).mean())


# -- torchmetrics ------------------------------------------------------------------------------


def test_torchmetrics():
    classes = pytest.importorskip("torchmetrics.functional.classification")
    p, y = torch.as_tensor(P), torch.as_tensor(LABELS)
    two, is_zero = torch.tensor(TWO[:, 1]), torch.as_tensor(IS_ZERO)
    for norm_, metric in (("l1", expected_calibration_error), ("max", maximum_calibration_error)):
        value = classes.multiclass_calibration_error(p, y, 4, BINS, norm_)
        assert metric(LABELS, P) == same(value, 1e-6)  # theirs is summed in float32
        value = classes.binary_calibration_error(two, is_zero, BINS, norm_)
        # Two classes: theirs is the probability of the second, our kind="positive".
        assert metric(IS_ZERO, TWO, kind="positive") == same(value, 1e-6)
    area = classes.binary_auroc(torch.as_tensor(P.max(1)), torch.as_tensor(RIGHT.astype(int)))
    assert misclassification_auroc(LABELS, P) == same(area, 1e-6)
    regression = pytest.importorskip("torchmetrics.functional.regression")
    value = regression.continuous_ranked_probability_score(
        torch.tensor(DRAWS.T), torch.as_tensor(Y)
    )
    assert crps(Y, Empirical(DRAWS)) == same(value)


def test_torchmetrics_puts_a_confidence_of_one_into_a_bin_of_its_own():
    # By the definition B bins cover [0, 1] and .95 and 1 share the last of ten: |½ − .975| = .475.
    # An eleventh bin gives (|1 − .95| + |0 − 1|)/2: theirs is wrong.
    classes = pytest.importorskip("torchmetrics.functional.classification")
    y = np.array([1, 0])
    theirs = classes.binary_calibration_error(torch.tensor(EDGE[:, 1]), torch.as_tensor(y), 10)
    assert float(theirs) == pytest.approx(0.525, abs=1e-6)
    ours = expected_calibration_error(y, EDGE, n_bins=10, kind="positive")
    assert ours == pytest.approx(0.475, abs=1e-12)


# -- netcal ------------------------------------------------------------------------------------


def test_netcal_of_classes():
    metrics = pytest.importorskip("netcal.metrics")
    assert expected_calibration_error(LABELS, P) == same(metrics.ECE(BINS).measure(P, LABELS))
    assert maximum_calibration_error(LABELS, P) == same(metrics.MCE(BINS).measure(P, LABELS))
    # Two classes by the probability of the second, as torchmetrics; a confidence of 1 as ours.
    for y, p, n_bins in ((IS_ZERO, TWO, BINS), (np.array([1, 0]), EDGE, 10)):
        theirs = metrics.ECE(n_bins).measure(p[:, 1], y)
        assert expected_calibration_error(y, p, n_bins=n_bins, kind="positive") == same(theirs)
    equal_mass = metrics.ECE(10, equal_intervals=False).measure(P, LABELS)
    assert expected_calibration_error(LABELS, P, n_bins=10, bins="equal_mass") == same(equal_mass)
    assert mmce(LABELS, P) == same(metrics.MMCE().measure(P, LABELS), 1e-9)


def test_netcal_weighs_the_bins_of_its_ace_alike():
    # Its ACE has bins of equal width and is their plain mean, so that a bin of one row counts as
    # much as one of hundreds. Ours ("equal_mass") has bins of equal weight and is an expectation.
    metrics = pytest.importorskip("netcal.metrics")
    bins = np.minimum((P.max(1) * BINS).astype(int), BINS - 1)
    gaps = [abs((RIGHT - P.max(1))[bins == b].mean()) for b in np.unique(bins)]
    theirs = metrics.ACE(BINS).measure(P, LABELS)
    assert theirs == same(np.mean(gaps))
    assert expected_calibration_error(LABELS, P, bins="equal_mass") < 0.95 * theirs


def test_netcal_of_targets():
    metrics = pytest.importorskip("netcal.metrics.regression")
    stated = MEAN, SCALE
    # Its bins have equal width in the deviation, so that the last may hold a row or two; ours have
    # equal mass, as in Levi et al. On these four deviations they are the same.
    ence = float(metrics.ENCE(bins=4).measure(stated, Y))
    assert expected_normalized_calibration_error(Y, NORMAL, n_bins=4) == same(ence)
    uce = float(metrics.UCE(bins=4).measure(stated, Y))
    assert uncertainty_calibration_error(Y, NORMAL, n_bins=4) == same(uce)
    found = metrics.PICP(bins=4).measure(stated, Y, q=np.array([0.9]))
    assert interval_coverage(Y, NORMAL, coverage=0.9) == same(found.picp[0])
    assert mean_interval_width(Y, NORMAL, coverage=0.9) == same(found.mpiw[0])
    assert negative_log_likelihood(Y, NORMAL) == same(np.mean(metrics.NLL().measure(stated, Y)))


# -- uncertainty-toolbox -----------------------------------------------------------------------


def test_uncertainty_toolbox():
    metrics = pytest.importorskip("uncertainty_toolbox").metrics
    stated = MEAN, SCALE, Y
    assert negative_log_likelihood(Y, NORMAL) == same(metrics.nll_gaussian(*stated))
    assert crps(Y, NORMAL) == same(metrics.crps_gaussian(*stated))
    assert sharpness(Y, NORMAL) == same(metrics.sharpness(SCALE))
    # Its scores are means over 99 levels, ours of one.
    levels = np.arange(1, 100) / 100
    losses = [pinball_loss(Y, NORMAL, level=float(q)) for q in levels]
    assert np.mean(losses) == same(metrics.check_score(*stated))
    scores = [interval_score(Y, NORMAL, coverage=float(q)) for q in levels]
    assert np.mean(scores) == same(metrics.interval_score(*stated))


def test_uncertainty_toolbox_counts_the_levels_zero_and_one():
    # Both are always right, so that its mean over 101 levels is 99/101 of ours over 1, …, 99 %.
    # Its default is the coverage of central intervals ("interval"), blind to a shift; ours is
    # its "quantile", the definition of Kuleshov et al.
    metrics = pytest.importorskip("uncertainty_toolbox").metrics
    options = {"num_bins": 101, "prop_type": "quantile"}
    theirs = metrics.mean_absolute_calibration_error(MEAN, SCALE, Y, **options)
    assert quantile_calibration_error(Y, NORMAL) == same(theirs * 101 / 99)


# -- scoringrules, properscoring and Pyro ------------------------------------------------------


def test_scoringrules():
    sr = pytest.importorskip("scoringrules")
    assert crps(Y, NORMAL) == same(np.mean(sr.crps_normal(Y, MEAN, SCALE)))
    assert negative_log_likelihood(Y, NORMAL) == same(np.mean(sr.logs_normal(Y, MEAN, SCALE)))
    # Of the draws as a distribution: their "nrg"; their default divides by S(S − 1), as our fair.
    theirs = np.mean(sr.crps_ensemble(Y, DRAWS.T, estimator="nrg"))
    assert crps(Y, Empirical(DRAWS)) == same(theirs)
    lower, upper = EXACT.interval(0.9)
    theirs = np.mean(sr.interval_score(Y, lower, upper, alpha=0.1))
    assert interval_score(Y, NORMAL, coverage=0.9) == same(theirs)
    theirs = np.mean(sr.quantile_score(Y, EXACT.ppf(0.3), alpha=0.3))
    assert pinball_loss(Y, NORMAL, level=0.3) == same(theirs)
    assert brier_score(IS_ZERO, TWO) == same(np.mean(sr.brier_score(IS_ZERO, TWO[:, 1])))


def test_scoringrules_of_several_outputs():
    sr = pytest.importorskip("scoringrules")
    y = RNG.standard_normal((N, 2))
    d = NormalMixture(torch.zeros(1, N, 2, dtype=torch.float64), torch.tensor(1.0).double())
    drawn = d.joint().sample((50,), generator=torch.Generator().manual_seed(3)).numpy()
    # The unbiased estimate, from the same draws: their default divides by S², for the draws alone.
    theirs = np.mean(sr.es_ensemble(y, np.moveaxis(drawn, 0, 1), estimator="fair"))
    assert energy_score(y, d, n_draws=50, random_state=3) == same(theirs, 1e-9)


def test_properscoring():
    ps = pytest.importorskip("properscoring")
    assert crps(Y, NORMAL) == same(np.mean(ps.crps_gaussian(Y, MEAN, SCALE)))
    assert crps(Y, Empirical(DRAWS)) == same(np.mean(ps.crps_ensemble(Y, DRAWS.T)))
    assert brier_score(IS_ZERO, TWO) == same(np.mean(ps.brier_score(IS_ZERO, TWO[:, 1])))


def test_pyro():
    from pyro.ops.stats import crps_empirical

    theirs = crps_empirical(torch.as_tensor(DRAWS), torch.as_tensor(Y)).mean()
    assert crps(Y, Empirical(DRAWS)) == same(theirs)

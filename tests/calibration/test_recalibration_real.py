from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize_scalar
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.isotonic import IsotonicRegression

from uq.calibration import QuantileRecalibration, VarianceScaling
from uq.distributions import CategoricalMixture, NormalMixture, Recalibrated
from uq.errors import DataError, ParameterError

EULER_GAMMA = 0.5772156649015329


def normal(loc, scale):
    """Single Normals with the given means and scales, one a row."""
    loc = torch.as_tensor(np.asarray(loc, dtype=np.float64))[None]
    return NormalMixture(loc, torch.as_tensor(np.asarray(scale, dtype=np.float64)))


def mixture(n, n_draws=4, shape=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    loc = torch.randn(n_draws, n, *shape, generator=g, dtype=torch.float64)
    scale = torch.rand(n_draws, n, *shape, generator=g, dtype=torch.float64) + 0.3
    return NormalMixture(loc, scale)


def stretched(dist, factor, seed=1):
    """Targets that are ``factor`` times as far from the mean as ``dist`` says."""
    y = dist.sample(generator=torch.Generator().manual_seed(seed))
    return (dist.mean + factor * (y - dist.mean)).numpy()


def nll(dist, y):
    return -float(dist.log_prob(torch.as_tensor(y)).mean())


# -- variance scaling ----------------------------------------------------------------------------


def test_one_normal_has_a_closed_form():
    rng = np.random.default_rng(0)
    loc, scale, y, w = rng.normal(size=(4, 50))
    scale, w = np.exp(scale), w**2
    fitted = VarianceScaling().fit(normal(loc, scale), y, w)
    z2 = ((y - loc) / scale) ** 2
    assert fitted.scale_ == pytest.approx(np.sqrt((w * z2).sum() / w.sum()), rel=1e-14)


def test_a_mixture_gets_the_minimum_of_its_likelihood():
    dist = mixture(200)
    y = stretched(dist, 2)

    def loss(log_s):
        s = np.exp(log_s)
        loc = dist.mean + s * (dist.loc - dist.mean)
        return nll(NormalMixture(loc, s * dist.scale), y)

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
    fitted = VarianceScaling().fit(dist, y)
    # The NLL is flat to second order: its float64 rounding leaves √1e-16 of log s.
    assert np.log(fitted.scale_[0]) == pytest.approx(best.x, abs=1e-6)
    assert nll(fitted.transform(dist), y) == pytest.approx(best.fun, abs=1e-12)
    # The moments give another factor, so that taking them for the answer would show.
    assert (
        abs(
            np.log(fitted.scale_[0])
            - 0.5 * np.log((((y - dist.mean.numpy()) ** 2) / dist.variance.numpy()).mean())
        )
        > 1e-3
    )


@pytest.mark.statistical
@pytest.mark.parametrize("n_draws", [1, 4])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_scale_is_recovered(n_draws, factor):
    dist = mixture(8000, n_draws)
    fitted = VarianceScaling().fit(dist, stretched(dist, factor))
    # One Normal: Var(log s) = 1/(2n). A mixture has less information on its scale; twice the
    # deviation holds for these (measured over 20 seeds: 1.1 times).
    error = np.sqrt(1 / (2 * 8000)) * (1 if n_draws == 1 else 2)
    assert abs(np.log(fitted.scale_[0] / factor)) < 5 * error


@pytest.mark.statistical
def test_calibrated_predictions_are_left_alone():
    dist = mixture(8000)
    fitted = VarianceScaling().fit(dist, stretched(dist, 1))
    assert abs(np.log(fitted.scale_[0])) < 5 * 2 * np.sqrt(1 / 16000)


@given(st.integers(0, 10_000), st.sampled_from([1, 3]), st.floats(0.05, 20))
def test_variance_scaling_never_worsens_the_fit(seed, n_draws, factor):
    dist = mixture(12, n_draws, seed=seed)
    y = stretched(dist, factor, seed)
    scaled = VarianceScaling().fit(dist, y).transform(dist)
    assert nll(scaled, y) <= nll(dist, y) + 1e-12


def test_valleys_of_a_mixture_are_all_searched():
    """Two far components: a scale that puts a component on the targets, or a wide one."""
    loc = torch.tensor([[-10.0] * 9, [10.0] * 9], dtype=torch.float64)
    dist = NormalMixture(loc, torch.tensor(0.5, dtype=torch.float64))
    y = np.r_[np.linspace(-10.2, -9.8, 4), np.linspace(9.8, 10.2, 4), 0.5]
    fitted = VarianceScaling().fit(dist, y)
    grid = np.exp(np.linspace(-4, 8, 4001))
    losses = [nll(dist.affine(0.0, s), y) for s in grid]
    assert nll(fitted.transform(dist), y) <= min(losses) + 1e-9


def test_what_scaling_does_to_a_mixture():
    base = mixture(5)
    dist = NormalMixture(base.loc, base.scale, 0.5 * base.scale)
    dist.index = pd.Index(list("abcde"))
    fitted = VarianceScaling().fit(dist, stretched(dist, 3))
    s, scaled = fitted.scale_[0], fitted.transform(dist)
    assert isinstance(scaled, NormalMixture)
    assert list(scaled.index) == list("abcde")
    torch.testing.assert_close(scaled.mean, dist.mean)
    torch.testing.assert_close(scaled.aleatoric, s**2 * dist.aleatoric)
    torch.testing.assert_close(scaled.epistemic, s**2 * dist.epistemic)
    torch.testing.assert_close(scaled.loc, dist.mean + s * (dist.loc - dist.mean))


@pytest.mark.parametrize("n_draws", [1, 3])
def test_each_output_has_its_factor(n_draws):
    dist = mixture(40, n_draws, (2,))
    y = np.stack([stretched(dist.output(0), 0.5), stretched(dist.output(1), 3)], 1)
    fitted = VarianceScaling().fit(dist, y)
    alone = [VarianceScaling().fit(dist.output(j), y[:, j]).scale_[0] for j in (0, 1)]
    np.testing.assert_allclose(fitted.scale_, alone, rtol=1e-6)
    joint = VarianceScaling().fit(dist.joint(), y)
    np.testing.assert_array_equal(joint.scale_, fitted.scale_)
    assert joint.transform(dist.joint()).event_shape == (2,)
    torch.testing.assert_close(fitted.transform(dist).stddev, dist.stddev * torch.tensor(alone))


@pytest.mark.parametrize("n_draws", [1, 3])
def test_weights_are_repetitions(n_draws):
    dist, times = mixture(40, n_draws), np.arange(40) % 4
    y, rows = stretched(dist, 2), np.repeat(np.arange(40), times)
    for method in (
        VarianceScaling(),
        QuantileRecalibration((0.1, 0.5, 0.9)),
        QuantileRecalibration(None),
    ):
        weighted = vars(clone(method).fit(dist, y, times))
        repeated = vars(clone(method).fit(dist[rows], y[rows]))
        for name in weighted.keys() - {"levels"}:
            np.testing.assert_allclose(weighted[name], repeated[name], rtol=1e-7)


# -- quantile recalibration ----------------------------------------------------------------------


def uniform_pits(u):
    """Predictions and targets whose levels F(y) are ``u``."""
    return normal(np.zeros(len(u)), 1.0), stats.norm.ppf(u)


def test_all_rows_agree_with_isotonic_regression():
    u = np.random.default_rng(0).beta(2, 5, size=200)
    dist, y = uniform_pits(u)
    fitted = QuantileRecalibration(None).fit(dist, y)
    rank = np.argsort(np.argsort(u)) + 1
    theirs = IsotonicRegression().fit(u, rank / 201)
    np.testing.assert_allclose(
        np.interp(u, fitted.predicted_[0], fitted.observed_[0]), theirs.predict(u), atol=1e-12
    )
    assert fitted.predicted_.shape == (1, 202)
    # Calibrating the held-out rows themselves gives their ranks.
    levels = fitted.transform(dist).cdf(torch.as_tensor(y))
    np.testing.assert_allclose(levels, rank / 201, atol=1e-12)


def test_ties_have_their_mean_rank():
    u = np.repeat([0.2, 0.5, 0.6], [6, 2, 2])
    fitted = QuantileRecalibration(None).fit(*uniform_pits(u))
    np.testing.assert_allclose(fitted.predicted_, [[0, 0.2, 0.5, 0.6, 1]], atol=1e-12)
    np.testing.assert_allclose(fitted.observed_, [[0, 3.5 / 11, 7.5 / 11, 9.5 / 11, 1]], atol=1e-12)


def test_levels_are_quantiles_of_the_held_out_levels():
    u = np.random.default_rng(0).beta(2, 5, size=57)
    levels = (0.1, 0.25, 0.8)
    fitted = QuantileRecalibration(levels).fit(*uniform_pits(u))
    expected = np.quantile(u, levels, method="weibull")  # the i-th of n is the i/(n + 1) quantile
    np.testing.assert_allclose(fitted.predicted_, [[0, *expected, 1]], atol=1e-12)
    np.testing.assert_array_equal(fitted.observed_, [[0, *levels, 1]])


def test_fewest_rows_of_the_default():
    u = np.arange(1, 40) / 40
    fitted = QuantileRecalibration().fit(*uniform_pits(u))
    np.testing.assert_allclose(fitted.predicted_, fitted.observed_, atol=1e-12)  # the identity
    with pytest.raises(DataError, match=r"need at least 39 rows .* got 38"):
        QuantileRecalibration().fit(*uniform_pits(u[:-1]))
    with pytest.raises(DataError, match=r"need at least 10 rows .* got 9"):
        QuantileRecalibration(None).fit(*uniform_pits(u[:9]))
    assert QuantileRecalibration((0.5,)).fit(*uniform_pits(u[:3])).predicted_[
        0, 1
    ] == pytest.approx(0.05)


WRONG = {
    "narrow": lambda n, rng: rng.normal(scale=2, size=n),
    "wide": lambda n, rng: rng.normal(scale=0.5, size=n),
    "biased": lambda n, rng: rng.normal(0.8, size=n),
    "skewed": lambda n, rng: rng.exponential(size=n) - 0.5,
    "heavy": lambda n, rng: rng.standard_t(3, size=n),
}


@pytest.mark.statistical
@pytest.mark.parametrize("truth", WRONG)
@pytest.mark.parametrize("levels", ["default", None])
def test_fresh_levels_are_uniform_after_recalibration(truth, levels):
    rng = np.random.default_rng(0)
    n, n_fresh = 4000, 10_000
    base = normal(np.zeros(n), 1.0)
    settings = {} if levels == "default" else {"levels": levels}
    fitted = QuantileRecalibration(**settings).fit(base, WRONG[truth](n, rng))
    fresh = torch.as_tensor(WRONG[truth](n_fresh, rng))
    wrong = normal(np.zeros(n_fresh), 1.0)
    right = fitted.transform(wrong)
    q = np.array(QuantileRecalibration().levels)
    # The share below a recalibrated quantile is Beta about q with n, then binomial with n_fresh.
    error = np.sqrt(q * (1 - q) * (1 / n + 1 / n_fresh))
    below = (fresh < right.quantile(q)).double().mean(1).numpy()
    assert (np.abs(below - q) < 5 * error).all()
    before = (fresh < wrong.quantile(q)).double().mean(1).numpy()
    assert (np.abs(before - q) > 5 * error).any()
    assert right.crps(fresh).mean() < wrong.crps(fresh).mean()
    if levels == "default":
        assert nll(right, fresh) < nll(wrong, fresh)


@pytest.mark.statistical
@pytest.mark.slow
def test_exact_coverage_over_repetitions():
    """A fresh target is below the quantile at level i/(n + 1) with just that probability."""
    rng, n, repetitions, levels = np.random.default_rng(0), 19, 2000, (0.1, 0.5, 0.95)
    below = np.empty((repetitions, 3))
    for r in range(repetitions):
        y = rng.gamma(2, size=n)
        fitted = QuantileRecalibration(levels).fit(normal(np.full(n, 1.5), 2.0), y)
        edges = np.interp(levels, fitted.observed_[0], fitted.predicted_[0])
        below[r] = stats.gamma(2).cdf(1.5 + 2.0 * stats.norm.ppf(edges))
    error = below.std(0) / np.sqrt(repetitions)
    assert (np.abs(below.mean(0) - levels) < 5 * error).all()
    # Knots at (i − ½)/n instead would be off by far more than that in the tails.
    assert np.abs(0.95 - (19 * 0.95 + 0.5) / 20) > 5 * error[2]


@pytest.mark.statistical
def test_price_of_all_knots_in_nats():
    """1 − γ a fresh row on calibrated predictions; the default costs about its 13 knots over 2n."""
    rng, n = np.random.default_rng(0), 2000
    excess = {None: [], "default": []}
    for _ in range(30):
        held_out, fresh = rng.uniform(size=(2, n))
        for levels, found in excess.items():
            method = QuantileRecalibration(**({} if levels else {"levels": None}))
            fitted = method.fit(*uniform_pits(held_out))
            knots = fitted.predicted_[0], fitted.observed_[0]
            slope = np.diff(knots[1]) / np.diff(knots[0])
            found.append(-np.log(slope[np.searchsorted(knots[0], fresh) - 1]).mean())
    for levels, expected in ((None, 1 - EULER_GAMMA), ("default", 13 / (2 * n))):
        error = np.std(excess[levels]) / np.sqrt(30)
        assert abs(np.mean(excess[levels]) - expected) < 5 * error


def test_each_output_has_its_map_even_with_ties():
    dist = mixture(40, 3, (2,))
    dist.index = pd.RangeIndex(5, 45)
    y = stretched(dist, 2)
    dist_tied = NormalMixture(dist.loc.clone(), dist.scale.clone())
    for t in (dist_tied.loc, dist_tied.scale):
        t[:, 7, 1] = t[:, 3, 1]
    y[7, 1] = y[3, 1]  # output 1 has a knot less
    fitted = QuantileRecalibration(None).fit(dist_tied, y)
    assert fitted.predicted_.shape == (2, 42)
    new = fitted.transform(dist)
    assert isinstance(new, Recalibrated)
    assert list(new.index) == list(dist.index)
    for j in (0, 1):
        alone = QuantileRecalibration(None).fit(dist_tied.output(j), y[:, j])
        one = alone.transform(dist.output(j))
        torch.testing.assert_close(new.output(j).quantile([0.1, 0.99]), one.quantile([0.1, 0.99]))
        torch.testing.assert_close(
            new.cdf(torch.as_tensor(y))[:, j], one.cdf(torch.as_tensor(y[:, j]))
        )
    joint = QuantileRecalibration(None).fit(dist_tied.joint(), y)
    assert joint.transform(dist.joint()).event_shape == (2,)
    with pytest.raises(DataError, match=r"fitted on 2 output\(s\), but dist has shape \(40,\)"):
        fitted.transform(dist.output(0))


def test_what_is_learned_can_be_cloned_pickled_and_applied_elsewhere():
    dist = mixture(60)
    y = stretched(dist, 2)
    for method in (VarianceScaling(), QuantileRecalibration(), QuantileRecalibration(None)):
        fitted = method.fit(dist, y)
        again = pickle.loads(pickle.dumps(fitted))
        row = dist[:1]
        torch.testing.assert_close(
            again.transform(row).quantile(0.3), fitted.transform(dist).quantile(0.3)[:1]
        )
        assert clone(fitted).get_params() == fitted.get_params()
        learned = [v for k, v in vars(fitted).items() if k.endswith("_")]
        assert learned
        assert all(isinstance(v, np.ndarray) and v.dtype == np.float64 for v in learned)


# -- bad input -----------------------------------------------------------------------------------

both = pytest.mark.parametrize("method", [VarianceScaling(), QuantileRecalibration()], ids=str)


@both
def test_bad_data(method):
    dist = mixture(50)
    y = stretched(dist, 1)
    name = type(method).__name__
    with pytest.raises(DataError, match=rf"{name}.fit: y has shape \(49,\), expected \(50,\)"):
        method.fit(dist, y[1:])
    with pytest.raises(DataError, match="y is NaN or infinite at row 3"):
        method.fit(dist, np.where(np.arange(50) == 3, np.nan, y))
    with pytest.raises(DataError, match=f"{name}.fit: sample_weight"):
        method.fit(dist, y, -np.ones(50))
    with pytest.raises(DataError, match=f"{name}.fit: dist must be .* got a CategoricalMixture"):
        method.fit(CategoricalMixture(torch.zeros(1, 50, 3)), y)
    with pytest.raises(NotFittedError):
        clone(method).transform(dist)
    fitted = clone(method).fit(dist, y)
    with pytest.raises(DataError, match=r"fitted on 1 output\(s\), but dist has shape \(4, 2\)"):
        fitted.transform(mixture(4, shape=(2,)))
    with pytest.raises(DataError, match=f"{name}.transform: dist must be .* got a Categorical"):
        fitted.transform(CategoricalMixture(torch.zeros(1, 50, 3)))


def test_scaling_needs_a_mixture_and_errors():
    dist = mixture(50)
    with pytest.raises(DataError, match="NormalMixture, got a Recalibrated; use QuantileRecal"):
        VarianceScaling().fit(Recalibrated(dist, [0, 1], [0, 1]), stretched(dist, 1))
    with pytest.raises(DataError, match="every target equals its predicted mean"):
        VarianceScaling().fit(dist, dist.mean)


@pytest.mark.parametrize(
    "levels", [(0.5, 0.2), (0.0, 0.5), (0.5, 1.0), (), ((0.2, 0.5),), (0.3, 0.3)]
)
def test_bad_levels(levels):
    dist = mixture(50)
    with pytest.raises(ParameterError, match="levels must be a sequence that increases"):
        QuantileRecalibration(levels).fit(dist, stretched(dist, 1))


@pytest.mark.parametrize("levels", [None, (0.05, 0.5, 0.95)])
def test_targets_beyond_the_reach_of_levels(levels):
    rng = np.random.default_rng(0)
    y = rng.normal(scale=30, size=400)
    with pytest.raises(
        DataError, match=r"of 400 have level 0 .* level 1, .* VarianceScaling first"
    ):
        QuantileRecalibration(levels).fit(normal(np.zeros(400), 1.0), y)
    # As the message says: scaled first, it works.
    dist = (
        VarianceScaling().fit(normal(np.zeros(400), 1.0), y).transform(normal(np.zeros(400), 1.0))
    )
    QuantileRecalibration(levels).fit(dist, y)
    # One such row in a hundred is a tail like any other.
    y = np.r_[rng.normal(size=397), 30, 31, -60]
    fitted = QuantileRecalibration(levels).fit(normal(np.zeros(400), 1.0), y)
    assert (np.diff(fitted.predicted_) > 0).all()
    y = np.sort(rng.normal(size=20))
    with pytest.raises(DataError, match="spread out the weights"):
        QuantileRecalibration((0.1, 0.9)).fit(normal(np.zeros(20), 1.0), y, np.r_[100, np.ones(19)])

from __future__ import annotations

import math
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import KFold

from uq.calibration import ConformalIntervals, ConformalSets
from uq.calibration.conformal import rank, rows_needed
from uq.calibration.density_cells import DensityCells
from uq.distributions import CategoricalMixture, Empirical, NormalMixture, Parametric
from uq.errors import DataError, ParameterError
from uq.io import load, save

F64 = torch.float64
seeds = st.integers(0, 2**20)
REAL = [
    ConformalIntervals("residual"),
    ConformalIntervals("normalized"),
    ConformalIntervals("quantile"),
    ConformalIntervals("density"),
    ConformalIntervals("residual", symmetric=False),
    ConformalIntervals("quantile", symmetric=False),
]
SETS = [
    ConformalSets("lac", random_state=0),
    ConformalSets("aps", random_state=0),
    ConformalSets("aps", randomized=True, random_state=0),
    ConformalSets("raps", random_state=0),
    ConformalSets("raps", randomized=True, k_reg=2, penalty_weight=0.02, random_state=0),
]


def name(value):
    if isinstance(value, ConformalIntervals):
        return value.score + ("" if value.symmetric else "-two-sided")
    if isinstance(value, ConformalSets):
        return value.score + ("-randomized" if value.randomized else "")
    return None


def normal(loc, scale):
    loc = torch.as_tensor(np.asarray(loc, dtype=np.float64))[None]
    return NormalMixture(loc, torch.as_tensor(np.asarray(scale, dtype=np.float64)))


def real_rows(seed, n, n_draws=3, shape=()):
    """Predictions that are wrong in place, scale and shape, and targets."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, *shape))
    loc = x + 0.7 * rng.standard_normal((n_draws, *x.shape))
    scale = 0.2 + 0.5 * rng.random((n_draws, *x.shape))
    y = 1.2 * x + 0.4 + np.exp(0.5 * x) * (rng.gamma(2.0, size=x.shape) - 2)
    return NormalMixture(torch.as_tensor(loc), torch.as_tensor(scale)), y


def class_rows(seed, n, n_classes=4):
    """Probabilities that are too sharp and biased, and labels."""
    rng = np.random.default_rng(seed)
    log_odds = rng.standard_normal((n, n_classes))
    p = softmax(1.5 * log_odds, -1)
    y = (p.cumsum(-1) > rng.random((n, 1))).argmax(-1)
    reported = 3 * log_odds + rng.standard_normal(log_odds.shape) + np.arange(n_classes)
    return one_draw(log_softmax(reported, -1)), y


def one_draw(log_p, **kwargs):
    return CategoricalMixture(torch.as_tensor(log_p)[None], **kwargs)


def with_p(p, **kwargs):
    return one_draw(np.log(np.asarray(p, dtype=np.float64)), **kwargs)


def covered(conformal, dist, y):
    if isinstance(conformal, ConformalSets):
        return conformal.predict_set(dist)[np.arange(len(y)), y]
    if conformal.score == "density":
        regions = conformal.region(dist)
        return np.array(
            [bool(((r[:, 0] <= t) & (t <= r[:, 1])).any()) for r, t in zip(regions, y, strict=True)]
        )
    lower, upper = conformal.interval(dist)
    return (lower <= y) & (y <= upper)


# -- the guarantee -------------------------------------------------------------------------------


def test_rank_is_exact_where_floating_point_is_not():
    for n in range(1, 400):
        for percent in range(1, 100):
            assert rank(n, percent / 100) == math.ceil(Fraction(percent, 100) * (n + 1))
    for percent in range(1, 100):
        n = rows_needed(percent / 100)
        assert rank(n, percent / 100) <= n
        assert rank(n - 1, percent / 100) > n - 1


@pytest.mark.statistical
@pytest.mark.parametrize(
    "conformal",
    [
        pytest.param(c, marks=pytest.mark.slow if c.get_params()["score"] == "density" else ())
        for c in REAL + SETS
    ],
    ids=name,
)
def test_coverage_is_beta_distributed(conformal):
    """200 repetitions: given the n held-out rows the coverage is Beta(k, n + 1 − k).

    With sides, the misses on both follow Beta laws of rank n + 1 − k together: the coverage is
    Beta(2k − n − 1, 2(n + 1 − k)). A rank that is wrong by one shifts the mean by 1/50, six
    standard errors; the distribution of the count is looked at besides.
    """
    n, n_new, coverage, repetitions = 49, 100, 0.7, 200
    conformal = clone(conformal).set_params(coverage=coverage)
    make = class_rows if isinstance(conformal, ConformalSets) else real_rows
    counts = []
    for seed in range(repetitions):
        dist, y = make(seed, n + n_new)
        fitted = clone(conformal).fit(dist[:n], y[:n])
        counts.append(covered(fitted, dist[n:], y[n:]).sum())
    counts = np.array(counts)
    k = rank(n, coverage)
    a, b = k, n + 1 - k
    if not getattr(conformal, "symmetric", True):
        b = 2 * (n + 1 - rank(n, (1 + coverage) / 2))
        a = n + 1 - b
    law = stats.betabinom(n_new, a, b)
    z = (counts.mean() - law.mean()) / (law.std() / math.sqrt(repetitions))
    assert abs(z) < 5
    u = law.cdf(counts - 1) + np.random.default_rng(0).random(repetitions) * law.pmf(counts)
    observed = np.histogram(u, 10, (0, 1))[0]
    assert ((observed - repetitions / 10) ** 2).sum() / (repetitions / 10) < stats.chi2.isf(1e-6, 9)


@pytest.mark.statistical
def test_each_class_is_covered_by_itself():
    """Class-conditional sets keep the coverage of the class that predictions are biased against."""
    conditional, marginal = [], []
    for seed in range(100):
        dist, y = class_rows(seed, 1400)
        held, new = slice(0, 400), slice(400, None)
        for out, class_conditional in ((conditional, True), (marginal, False)):
            sets = ConformalSets(coverage=0.8, class_conditional=class_conditional)
            inside = covered(sets.fit(dist[held], y[held]), dist[new], y[new])
            out.append([inside[y[new] == j].mean() for j in range(4)])
    # About 100 held-out and 250 new rows of a class, 100 times: a standard error of 0.005.
    error = math.sqrt(0.16 / 100 + 0.16 / 250) / math.sqrt(100)
    excess = np.mean(conditional, 0) - 0.8
    assert (excess > -5 * error).all()
    assert (excess < 5 * error + 1 / 80).all()
    assert np.ptp(np.mean(marginal, 0)) > 0.1


@pytest.mark.parametrize("conformal", SETS, ids=name)
def test_ties_are_covered_at_least(conformal):
    """Three kinds of rows only: coverage of the tied scores, by enumeration, is never too low."""
    p = np.array([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.8, 0.1, 0.1]])
    inside = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        row = rng.integers(3, size=60)
        y = (p[row].cumsum(-1) > rng.random((60, 1))).argmax(-1)
        fitted = clone(conformal).set_params(coverage=0.8).fit(with_p(p[row[:30]]), y[:30])
        inside.append(covered(fitted, with_p(p[row[30:]]), y[30:]).mean())
    assert np.mean(inside) > 0.8 - 5 * np.std(inside) / 10


# -- formulas by hand ----------------------------------------------------------------------------


def test_quantile_is_conformalized_quantile_regression():
    rng = np.random.default_rng(0)
    loc, scale, y = rng.standard_normal(30), np.exp(rng.standard_normal(30)), rng.normal(0, 3, 30)
    z = stats.norm.ppf(0.95)
    low, high = loc - z * scale, loc + z * scale
    q = sorted(max(a - t, t - b) for a, b, t in zip(low, high, y, strict=True))[28 - 1]
    fitted = ConformalIntervals("quantile").fit(normal(loc, scale), y)  # ⌈31 · 0.9⌉ = 28
    lower, upper = fitted.interval(normal(loc, scale))
    assert fitted.threshold_ == pytest.approx(q)
    np.testing.assert_allclose(lower, low - q)
    np.testing.assert_allclose(upper, high + q)


def test_two_sides_have_a_threshold_each():
    rng = np.random.default_rng(0)
    loc, scale, y = rng.standard_normal(60), np.exp(rng.standard_normal(60)), rng.normal(2, 3, 60)
    fitted = ConformalIntervals("normalized", symmetric=False).fit(normal(loc, scale), y)
    z = np.sort((y - loc) / scale)
    below, above = -z[60 - 58], z[58 - 1]  # ⌈61 · 0.95⌉ = 58, from either end
    np.testing.assert_allclose(fitted.threshold_, [[below], [above]])
    lower, upper = fitted.interval(normal(loc, scale))
    np.testing.assert_allclose(lower, loc - below * scale)
    np.testing.assert_allclose(upper, loc + above * scale)


@pytest.mark.parametrize(("score", "unit"), [("residual", False), ("normalized", True)])
def test_conformal_p_values_decide_what_is_inside(score, unit):
    """y is inside if and only if (1 + #{s_i >= s(y)})/(n + 1) > 1 − c."""
    rng = np.random.default_rng(1)
    loc, scale, y = rng.standard_normal((3, 25))
    scale = np.exp(scale)
    fitted = ConformalIntervals(score, coverage=0.75).fit(normal(loc, scale), y)
    divisor = scale if unit else np.ones(25)
    held = np.abs(y - loc) / divisor
    lower, upper = fitted.interval(normal(loc, scale))
    for t in np.linspace(-5, 5, 101):
        p_value = (1 + (held >= (np.abs(t - loc) / divisor)[:, None]).sum(1)) / 26
        np.testing.assert_array_equal((lower <= t) & (t <= upper), p_value > 0.25)


def test_an_interval_turned_inside_out_is_its_middle():
    y = np.zeros(99)
    fitted = ConformalIntervals("quantile").fit(normal(y, np.ones(99)), y)
    lower, upper = fitted.interval(normal([3.0, 3.0], [0.5, 2.0]))
    assert lower[0] == upper[0] == pytest.approx(3)
    assert lower[1] < upper[1]


def scores_by_hand(p, conformal, u):
    """Scores of all classes of one row, in loops."""
    out = []
    for k in range(len(p)):
        if conformal.score == "lac":
            out.append(1 - p[k])
            continue
        more = sum(q for q in p if q > p[k])
        same = sum(q for q in p if q == p[k])
        beyond = sum(q >= p[k] for q in p) - conformal.k_reg
        penalty = conformal.penalty_weight * max(0, beyond) if conformal.score == "raps" else 0
        out.append(more + u * same + penalty)
    return np.array(out)


@pytest.mark.parametrize("conformal", SETS, ids=name)
@pytest.mark.parametrize("class_conditional", [False, True])
def test_sets_by_enumeration(conformal, class_conditional):
    """Every class of every row by its conformal p-value, from scores added up in loops."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 50)
    p[::5] = [0.3, 0.3, 0.2, 0.2]  # ties
    y = rng.integers(4, size=50)
    conformal = clone(conformal).set_params(class_conditional=class_conditional, coverage=0.8)
    fitted = conformal.fit(with_p(p), y)
    p = with_p(p).probs.numpy()
    noise = fitted._noise(-np.sort(-p, 1))[:, 0] if conformal.randomized else np.ones(50)
    scores = np.array([scores_by_hand(row, conformal, u) for row, u in zip(p, noise, strict=True)])
    np.testing.assert_allclose(fitted._scores(p), scores, atol=2e-12)
    held = scores[np.arange(50), y]
    expected = np.zeros((50, 4), bool)
    for i in range(50):
        for k in range(4):
            group = held[y == k] if class_conditional else held
            # − 1e-12: sums in another order differ in the last digit, also from themselves.
            above = (group >= scores[i, k] - 1e-12).sum()
            expected[i, k] = (1 + above) / (1 + len(group)) > 0.2 + 1e-12
    np.testing.assert_array_equal(fitted.predict_set(with_p(p)), expected)


def test_noise_is_a_function_of_the_probabilities():
    dist, y = class_rows(0, 5000)
    fitted = ConformalSets("aps", randomized=True, random_state=0).fit(dist, y)
    sets = fitted.predict_set(dist)
    order = np.random.default_rng(0).permutation(5000)
    np.testing.assert_array_equal(fitted.predict_set(dist[order]), sets[order])
    np.testing.assert_array_equal(fitted.predict_set(dist[:7]), sets[:7])
    again = ConformalSets("aps", randomized=True, random_state=0).fit(dist, y)
    np.testing.assert_array_equal(again.predict_set(dist), sets)
    other = ConformalSets("aps", randomized=True, random_state=1).fit(dist, y)
    assert (other.predict_set(dist) != sets).any()
    sorted_p = -np.sort(-dist.probs.numpy(), 1)
    u = fitted._noise(sorted_p)[:, 0]
    assert u.min() >= 0
    assert u.max() < 1
    observed = np.histogram(u, 20, (0, 1))[0]
    assert ((observed - 250) ** 2).sum() / 250 < stats.chi2.isf(1e-6, 19)
    # float32 rounding of the probabilities moves it little.
    moved = fitted._noise(sorted_p * (1 + 1e-7 * np.random.default_rng(0).random(sorted_p.shape)))
    assert np.abs((moved[:, 0] - u + 0.5) % 1 - 0.5).max() < 1e-3
    # Without a probability there is no logarithm.
    assert fitted._noise(np.array([[1.0, 0.0, 0.0, 0.0]])) < 1


def test_randomized_and_penalized_sets_are_smaller():
    rng = np.random.default_rng(0)
    p = softmax(1.5 * rng.standard_normal((4000, 20)), -1)
    dist, y = with_p(p), (p.cumsum(-1) > rng.random((4000, 1))).argmax(-1)
    size = {
        name(c): c.fit(dist[:2000], y[:2000]).predict_set(dist[2000:]).sum(1).mean()
        for c in map(clone, SETS[:4])
    }
    assert size["aps-randomized"] < size["aps"]
    assert size["lac"] < size["aps"]
    assert size["raps"] < size["aps"]


def test_empty_sets_can_be_filled_with_the_most_probable_class():
    p = np.tile([0.9, 0.1], (20, 1))
    p[0] = [0.6, 0.4]
    fitted = ConformalSets(coverage=0.9).fit(with_p(p), np.zeros(20, int))
    new = with_p([[0.55, 0.45], [0.95, 0.05], [0.5, 0.5]])
    assert fitted.predict_set(new).tolist() == [[False, False], [True, False], [False, False]]
    filled = ConformalSets(coverage=0.9, allow_empty=False).fit(with_p(p), np.zeros(20, int))
    assert filled.predict_set(new).tolist() == [[True, False], [True, False], [True, True]]


# -- regions of highest density ------------------------------------------------------------------


def mass(dist, region):
    low, high = (dist.cdf(torch.as_tensor(region[:, i])[:, None])[:, 0] for i in (0, 1))
    return float((high - low).sum())


def test_two_modes_give_two_intervals_of_the_right_mass():
    n = 500
    dist = NormalMixture(
        torch.tensor([[-10.0], [10.0]], dtype=F64).repeat(1, n), torch.ones((), dtype=F64)
    )
    y = dist.sample(generator=torch.Generator().manual_seed(0))
    fitted = ConformalIntervals("density").fit(dist, y)
    (region,) = fitted.region(dist[:1])
    assert region.shape == (2, 2)
    assert mass(dist[:1], region) == pytest.approx(float(fitted.threshold_[0]), abs=1e-3)
    # Each mode holds half of it: ± z about it, to the width of a cell.
    z = stats.norm.ppf((1 + fitted.threshold_[0]) / 2)
    np.testing.assert_allclose(region, [[-10 - z, -10 + z], [10 - z, 10 + z]], atol=0.1)
    lower, upper = fitted.interval(dist[:1])
    assert (lower[0], upper[0]) == (region[0, 0], region[1, 1])


@pytest.mark.parametrize(
    ("base", "exact"),
    [
        (torch.distributions.Normal, (-1.2815515655446004, 1.2815515655446004)),
        # The interval of equal density that holds 0.8 of Gamma(3), by root finding.
        (lambda a, b: torch.distributions.Gamma(a + 3, b), None),
        (lambda a, b: torch.distributions.Uniform(a, b), (0.1, 0.9)),
    ],
)
def test_region_of_one_mode_is_the_shortest_interval(base, exact):
    dist = Parametric(base(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)))
    if exact is None:
        from scipy.optimize import minimize_scalar

        gamma = stats.gamma(3)
        best = minimize_scalar(
            lambda q: gamma.ppf(q + 0.8) - gamma.ppf(q), bounds=(0, 0.2), method="bounded"
        ).x
        exact = gamma.ppf(best), gamma.ppf(best + 0.8)
    (region,) = DensityCells(dist).regions(0.8)
    assert region.shape == (1, 2)
    assert mass(dist, region) == pytest.approx(0.8, abs=1e-3)
    np.testing.assert_allclose(region[0], exact, atol=0.1)
    assert np.ptp(region) == pytest.approx(np.ptp(exact), rel=5e-3)


@given(seeds, st.floats(0.01, 1.5))
def test_scores_and_regions_agree(seed, threshold):
    """y is in the region of t if and only if s(y) <= t; regions hold t, but for part of a cell."""
    rng = np.random.default_rng(seed)
    loc = torch.as_tensor(5 * rng.standard_normal((4, 3)))
    dist = NormalMixture(loc, torch.as_tensor(np.exp(rng.standard_normal((4, 3)))))
    cells = DensityCells(dist)
    regions, (low, high) = cells.regions(threshold), cells.hull(threshold)
    for i, region in enumerate(regions):
        assert (np.diff(region.ravel()) > 0).all()
        assert (region[0, 0], region[-1, 1]) == (low[i], high[i])
        if threshold < 1 - 1e-5:
            assert mass(dist[i : i + 1], region) == pytest.approx(threshold, abs=1 / 64)
    for y in rng.uniform(-30, 30, 40):
        s = cells.scores(np.full(3, y))
        inside = [bool(((r[:, 0] <= y) & (y <= r[:, 1])).any()) for r in regions]
        clear = np.abs(s - threshold) > 1e-9
        np.testing.assert_array_equal(np.array(inside)[clear], (s <= threshold)[clear])


def test_density_scores_are_the_mass_of_higher_density():
    y = np.linspace(-4, 4, 81)
    scores = DensityCells(normal(np.zeros(81), np.ones(81))).scores(y)
    np.testing.assert_allclose(scores, 2 * stats.norm.cdf(np.abs(y)) - 1, atol=0.02)


def test_over_confident_densities_are_stretched():
    rng = np.random.default_rng(0)
    dist, y = normal(np.zeros(2000), np.full(2000, 0.01)), rng.standard_normal(2000)
    fitted = ConformalIntervals("density").fit(dist[:1000], y[:1000])
    assert fitted.threshold_ > 1
    lower, upper = fitted.interval(dist[1000:])
    assert np.mean((lower <= y[1000:]) & (y[1000:] <= upper)) == pytest.approx(0.9, abs=0.05)
    np.testing.assert_allclose(np.stack([lower, upper], 1)[0], fitted.region(dist[:1])[0][0])


# -- cross-conformal -----------------------------------------------------------------------------


def folds_of(dist, y, k):
    parts = np.array_split(np.arange(len(y)), k)
    return [dist[p] for p in parts], [y[p] for p in parts]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("score", ["residual", "normalized", "quantile"])
def test_cross_intervals_by_their_definition(score, symmetric):
    rng = np.random.default_rng(0)
    n, k, n_new, coverage = 53, 4, 6, 0.8
    loc, y = rng.standard_normal((2, n))
    scale = np.exp(0.5 * rng.standard_normal(n))
    new_loc, new_scale = rng.standard_normal((k, n_new)), 0.3 + rng.random((k, n_new))
    dists, ys = folds_of(normal(loc, scale), y, k)
    fitted = ConformalIntervals(score, coverage, symmetric).fit(dists, ys)
    news = [normal(a, b) for a, b in zip(new_loc, new_scale, strict=True)]
    lower, upper = fitted.interval(news)

    z = stats.norm.ppf((1 + coverage) / 2) if score == "quantile" else 0.0
    level = coverage if symmetric else (1 + coverage) / 2
    position = math.ceil((n + 1) * level)
    fold = np.concatenate([[j] * len(part) for j, part in enumerate(ys)])
    for row in range(n_new):
        lows, highs = [], []
        for i in range(n):
            unit = scale[i] if score == "normalized" else 1.0
            below = (loc[i] - z * scale[i] - y[i]) / unit
            above = (y[i] - loc[i] - z * scale[i]) / unit
            if symmetric:
                below = above = max(below, above)
            m, s = new_loc[fold[i], row], new_scale[fold[i], row]
            unit = s if score == "normalized" else 1.0
            lows.append(m - z * s - below * unit)
            highs.append(m + z * s + above * unit)
        assert lower[row] == pytest.approx(-sorted(-a for a in lows)[position - 1])
        assert upper[row] == pytest.approx(sorted(highs)[position - 1])


@pytest.mark.parametrize("conformal", SETS, ids=name)
def test_cross_sets_by_their_definition(conformal):
    n, k, coverage = 47, 4, 0.75
    dist, y = class_rows(0, n)
    dists, ys = folds_of(dist, y, k)
    news = [class_rows(j + 1, 9)[0] for j in range(k)]
    fitted = clone(conformal).set_params(coverage=coverage).fit(dists, ys)
    held = [
        fitted._scores(d.probs.numpy())[np.arange(len(t)), t]
        for d, t in zip(dists, ys, strict=True)
    ]
    expected = np.zeros((9, 4), bool)
    for row in range(9):
        for label in range(4):
            own = [fitted._scores(d.probs.numpy())[row, label] for d in news]
            below = sum(s < own[j] for j in range(k) for s in held[j])
            expected[row, label] = below < coverage * (n + 1)
    np.testing.assert_array_equal(fitted.predict_set(news), expected)


def test_folds_of_one_model_are_split_conformal():
    dist, y = real_rows(0, 60)
    for conformal in REAL[:3]:
        whole = clone(conformal).fit(dist, y).interval(dist)
        folds = clone(conformal).fit(*folds_of(dist, y, 3)).interval([dist] * 3)
        np.testing.assert_allclose(folds, whole, atol=1e-12)
    dist, y = class_rows(0, 60)
    for conformal in SETS:
        whole = clone(conformal).fit(dist, y).predict_set(dist)
        folds = clone(conformal).fit(*folds_of(dist, y, 3)).predict_set([dist] * 3)
        np.testing.assert_array_equal(folds, whole)


def least_squares(X, y):
    coefficients = np.linalg.lstsq(X, y, rcond=None)[0]
    residual = y - X @ coefficients
    return coefficients, math.sqrt((residual**2).mean())


@pytest.mark.statistical
@pytest.mark.parametrize("score", ["residual", "quantile"])
def test_cross_coverage_of_an_unstable_model(score):
    """Least squares with as many as half the rows in features: over-confident, and unstable."""
    n, d, n_new, k, coverage = 40, 15, 100, 4, 0.8
    inside = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        X, X_new = rng.standard_normal((n, d)), rng.standard_normal((n_new, d))
        y, y_new = X.sum(1) + rng.standard_t(4, n), X_new.sum(1) + rng.standard_t(4, n_new)
        dists, ys, news = [], [], []
        for train, test in KFold(k).split(X):
            w, sigma = least_squares(X[train], y[train])
            dists.append(normal(X[test] @ w, np.full(len(test), sigma)))
            news.append(normal(X_new @ w, np.full(n_new, sigma)))
            ys.append(y[test])
        lower, upper = ConformalIntervals(score, coverage).fit(dists, ys).interval(news)
        inside.append(((lower <= y_new) & (y_new <= upper)).mean())
    error = np.std(inside) / math.sqrt(200)
    assert np.mean(inside) > 2 * coverage - 1 - math.sqrt(2 / n) + 5 * error  # certain
    assert coverage - 0.02 < np.mean(inside) < coverage + 0.1  # typical


# -- MAPIE ---------------------------------------------------------------------------------------


class Column(RegressorMixin, BaseEstimator):
    """A regressor that predicts one of its inputs."""

    def __init__(self, column=0):
        self.column = column

    def fit(self, X, y):
        self.n_features_in_ = X.shape[1]
        return self

    def predict(self, X):
        return X[:, self.column]


class Probabilities(ClassifierMixin, BaseEstimator):
    """A classifier whose inputs are its probabilities."""

    def fit(self, X, y):
        self.n_features_in_, self.classes_ = X.shape[1], np.arange(X.shape[1])
        return self

    def predict_proba(self, X):
        return X

    def predict(self, X):
        return X.argmax(1)


def test_intervals_agree_with_mapie():
    """Residuals, and CQR with one correction for both ends and with two."""
    regression = pytest.importorskip("mapie.regression")
    dist, y = real_rows(0, 200)
    held, new = slice(0, 101), slice(101, None)
    X = np.stack([dist.mean, *dist.interval(0.9), dist.median], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapie = regression.SplitConformalRegressor(Column().fit(X, y), confidence_level=0.9)
        mapie.conformalize(X[held], y[held])
        expected = mapie.predict_interval(X[new])[1][:, :, 0].T
        ours = ConformalIntervals("residual").fit(dist[held], y[held]).interval(dist[new])
        np.testing.assert_allclose(ours, expected, atol=1e-12)
        quantiles = regression.ConformalizedQuantileRegressor(
            [Column(j).fit(X, y) for j in (1, 2, 3)], confidence_level=0.9, prefit=True
        )
        quantiles.conformalize(X[held], y[held])
        for symmetric in (True, False):
            expected = quantiles.predict_interval(X[new], symmetric_correction=symmetric)[1][
                :, :, 0
            ].T
            ours = ConformalIntervals("quantile", symmetric=symmetric)
            ours = ours.fit(dist[held], y[held]).interval(dist[new])
            np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_cross_intervals_agree_with_mapie():
    from sklearn.linear_model import LinearRegression

    regression = pytest.importorskip("mapie.regression")
    rng = np.random.default_rng(0)
    X, X_new = rng.standard_normal((73, 5)), rng.standard_normal((20, 5))
    y = X.sum(1) + rng.standard_normal(73)
    splitter = KFold(5, shuffle=True, random_state=0)
    dists, news, ys = [], [], []
    for train, test in splitter.split(X):
        model = LinearRegression().fit(X[train], y[train])
        dists.append(normal(model.predict(X[test]), np.ones(len(test))))
        news.append(normal(model.predict(X_new), np.ones(20)))
        ys.append(y[test])
    ours = ConformalIntervals("residual").fit(dists, ys).interval(news)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapie = regression.CrossConformalRegressor(
            LinearRegression(), confidence_level=0.9, method="plus", cv=splitter
        )
        mapie.fit_conformalize(X, y)
        expected = mapie.predict_interval(X_new)[1][:, :, 0].T
    np.testing.assert_allclose(ours, expected, atol=1e-10)


def test_sets_agree_with_mapie():
    """LAC agrees. APS agrees at MAPIE's threshold, but thresholds differ.

    MAPIE always scores held-out labels with noise in APS, and by default judges new rows without,
    which is not the score that was calibrated: coverage is then above c. Ours judges both alike. At
    an equal threshold ``include_last_label=False`` is our score, and never empty, as with
    ``allow_empty=False``. In cross-conformal sets MAPIE asks for at least α(n − 1) scores that are
    as high, where Romano et al. (2020) and we ask for more than α(n + 1) − 1.
    """
    classification = pytest.importorskip("mapie.classification")
    dist, y = class_rows(0, 300)
    held, new = slice(0, 151), slice(151, None)
    X = dist.probs.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for score in ("lac", "aps"):
            mapie = classification.SplitConformalClassifier(
                Probabilities().fit(X, y), confidence_level=0.9, conformity_score=score
            )
            mapie.conformalize(X[held], y[held])
            settings = {"include_last_label": False} if score == "aps" else {}
            expected = mapie.predict_set(X[new], conformity_score_params=settings)[1][:, :, 0]
            ours = ConformalSets(score, allow_empty=score == "lac").fit(dist[held], y[held])
            if score == "aps":
                threshold = mapie._mapie_classifier.conformity_score_function_.quantiles_
                ours.threshold_ = np.full(4, threshold[0])
            np.testing.assert_array_equal(ours.predict_set(dist[new]), expected)


# -- properties ----------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seeds)
def test_order_of_held_out_rows_does_not_matter(seed):
    order = np.random.default_rng(seed).permutation(40)
    dist, y = real_rows(seed, 40)
    for conformal in REAL:
        first, second = clone(conformal).fit(dist, y), clone(conformal).fit(dist[order], y[order])
        np.testing.assert_array_equal(first.threshold_, second.threshold_)
    dist, y = class_rows(seed, 40)
    for conformal in SETS:
        first, second = clone(conformal).fit(dist, y), clone(conformal).fit(dist[order], y[order])
        np.testing.assert_array_equal(first.threshold_, second.threshold_)


@given(seeds, st.permutations(range(4)))
def test_names_of_classes_do_not_matter(seed, columns):
    dist, y = class_rows(seed, 60)
    renamed = one_draw(dist.logits[0][:, columns])
    new_y = np.argsort(columns)[y]
    for conformal in SETS:
        for class_conditional in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                c = clone(conformal).set_params(class_conditional=class_conditional, coverage=0.7)
                before = c.fit(dist, y).predict_set(dist)
                after = c.fit(renamed, new_y).predict_set(renamed)
            np.testing.assert_array_equal(after, before[:, columns])


@settings(max_examples=20)
@given(seeds, st.floats(0.3, 0.9), st.floats(0.3, 0.9))
def test_more_coverage_is_more_of_everything(seed, c1, c2):
    c1, c2 = sorted((c1, c2))
    dist, y = class_rows(seed, 40)
    for conformal in SETS:
        small, large = (
            clone(conformal).set_params(coverage=c).fit(dist, y).predict_set(dist) for c in (c1, c2)
        )
        assert (small <= large).all()
    dist, y = real_rows(seed, 40)
    for conformal in REAL:
        if conformal.symmetric and conformal.score != "quantile":  # whose base moves with coverage
            small, large = (
                clone(conformal).set_params(coverage=c).fit(dist, y).interval(dist)
                for c in (c1, c2)
            )
            assert (small[0] >= large[0]).all()
            assert (small[1] <= large[1]).all()


@settings(max_examples=20)
@given(seeds, st.floats(-10, 10), st.floats(0.01, 100))
def test_intervals_follow_the_unit_of_the_target(seed, shift, factor):
    dist, y = real_rows(seed, 40)
    for conformal in REAL:
        before = np.stack(clone(conformal).fit(dist, y).interval(dist))
        moved = dist.affine(shift, factor)
        after = np.stack(clone(conformal).fit(moved, shift + factor * y).interval(moved))
        np.testing.assert_allclose(
            after, shift + factor * before, atol=1e-7 * (factor + abs(shift)), rtol=1e-7
        )


# -- shapes and storage --------------------------------------------------------------------------


@pytest.mark.parametrize("conformal", REAL, ids=name)
def test_several_outputs_are_treated_one_by_one(conformal):
    dist, y = real_rows(0, 50, shape=(2,))
    both = clone(conformal).fit(dist, y)
    joint = clone(conformal).fit(dist.joint(), torch.as_tensor(y))
    intervals = np.stack(both.interval(dist))
    assert intervals.shape == (2, 50, 2)
    np.testing.assert_array_equal(np.stack(joint.interval(dist.joint())), intervals)
    regions = both.region(dist)
    for j in range(2):
        one = clone(conformal).fit(dist.output(j), y[:, j])
        np.testing.assert_allclose(intervals[..., j], np.stack(one.interval(dist.output(j))))
        np.testing.assert_allclose(both.threshold_[..., j], one.threshold_[..., 0])
        for row, alone in zip(regions, one.region(dist.output(j)), strict=True):
            np.testing.assert_allclose(row[j], alone)
    column = real_rows(1, 50, shape=(1,))
    lower, _ = clone(conformal).fit(*column).interval(column[0])
    assert lower.shape == (50, 1)


@pytest.mark.parametrize("conformal", REAL + SETS, ids=name)
def test_clone_pickle_file_and_no_rows(conformal, tmp_path):
    make = class_rows if isinstance(conformal, ConformalSets) else real_rows
    dist, y = make(0, 50)
    fitted = clone(conformal).fit(dist, y)
    save(fitted, tmp_path / "conformal.uq")
    call = "predict_set" if isinstance(conformal, ConformalSets) else "interval"
    expected = np.stack(getattr(fitted, call)(dist))
    for again in (pickle.loads(pickle.dumps(fitted)), load(tmp_path / "conformal.uq")):
        np.testing.assert_array_equal(np.stack(getattr(again, call)(dist)), expected)
    empty = getattr(fitted, call)(dist[:0])
    assert np.shape(empty)[-1 if call == "interval" else 0] == 0
    with pytest.raises(NotFittedError):
        getattr(clone(fitted), call)(dist)


def test_float32_and_labels_of_any_type():
    dist, y = class_rows(0, 60)
    labels = np.array(["ant", "bee", "cat", "dog"])
    named = CategoricalMixture(dist.logits.float(), classes=labels)
    fitted = ConformalSets().fit(named, labels[y])
    expected = ConformalSets().fit(dist, y).predict_set(dist)
    np.testing.assert_array_equal(fitted.predict_set(named), expected)
    assert fitted.classes_.tolist() == labels.tolist()


def test_draws_of_the_target_have_quantiles_but_no_density():
    rng = np.random.default_rng(0)
    dist, y = Empirical(rng.standard_normal((50, 99))), 2 * rng.standard_normal(99)
    lower, upper = ConformalIntervals("quantile").fit(dist, y).interval(dist)
    assert ((lower <= y) & (y <= upper)).sum() == 90
    with pytest.raises(DataError, match="no density; use score='quantile'"):
        ConformalIntervals("density").fit(dist, y)
    still = Empirical(np.zeros((5, 99)))
    with pytest.raises(DataError, match="standard deviation, which is 0 at row 0"):
        ConformalIntervals("normalized").fit(still, y)


@pytest.mark.parametrize(
    ("conformal", "k"),
    [
        pytest.param(c, k, id=f"{name(c)}-{k}")
        for c in REAL + SETS
        for k in (1, 3)
        if k == 1 or c.score != "density"  # which has no cross-conformal form
    ],
)
def test_another_coverage_is_that_of_a_new_fit(conformal, k):
    """The score of "quantile" alone is of one coverage; the others are only ranked anew."""
    sets = isinstance(conformal, ConformalSets)
    dist, y = (class_rows if sets else real_rows)(3, 60)
    held_out = (dist, y) if k == 1 else folds_of(dist, y, k)
    new = dist if k == 1 else [dist] * k
    fitted = clone(conformal).fit(*held_out)
    calls = ["predict_set"] if sets else ["interval", "region"]
    for call in calls:
        ask = getattr(fitted, call)
        np.testing.assert_array_equal(np.asarray(ask(new, 0.9)), np.asarray(ask(new)))
        if conformal.score == "quantile":
            with pytest.raises(ParameterError, match="fit with that coverage, or with"):
                ask(new, 0.6)
            continue
        again = getattr(clone(conformal).set_params(coverage=0.6).fit(*held_out), call)
        for found, expected in zip(ask(new, coverage=0.6), again(new), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert any(
            np.shape(a) != np.shape(b) or (np.asarray(a) != b).any()
            for a, b in zip(ask(new, 0.6), ask(new), strict=True)
        )
        with pytest.raises(ParameterError, match=r"coverage must lie in \(0, 1\), got 60"):
            ask(new, 60)
        with pytest.warns(UserWarning, match="coverage 0.999 needs at least .* rows, got 60"):
            ask(new, 0.999)


def test_class_conditional_sets_are_of_one_coverage():
    dist, y = class_rows(0, 60)
    fitted = ConformalSets(class_conditional=True, coverage=0.6).fit(dist, y)
    with pytest.raises(ParameterError, match=r"for coverage 0\.6, got coverage=0\.7; fit with"):
        fitted.predict_set(dist, 0.7)


# -- too few rows and bad input ------------------------------------------------------------------


@pytest.mark.parametrize("conformal", REAL + SETS, ids=name)
def test_too_few_rows_warn_and_cover_everything(conformal):
    make = class_rows if isinstance(conformal, ConformalSets) else real_rows
    dist, y = make(0, 19)
    n = 18 if not getattr(conformal, "symmetric", True) else 8
    with pytest.warns(
        UserWarning, match=f"coverage 0.9 needs at least {n + 1} held-out rows, got {n}"
    ):
        fitted = clone(conformal).fit(dist[:n], y[:n])
    if isinstance(conformal, ConformalSets):
        assert fitted.predict_set(dist).all()
    else:
        lower, upper = fitted.interval(dist)
        assert (lower == -np.inf).all()
        assert (upper == np.inf).all()
        assert fitted.region(dist)[0].tolist() == [[-np.inf, np.inf]]
    clone(conformal).fit(dist[: n + 1], y[: n + 1])  # no warning
    if conformal.get_params().get("score") != "density":
        with pytest.warns(UserWarning, match="needs at least"):
            fitted = clone(conformal).fit(*folds_of(dist[:n], y[:n], 2))
        call = "predict_set" if isinstance(conformal, ConformalSets) else "interval"
        out = np.stack(getattr(fitted, call)([dist] * 2))
        assert out.all() if out.dtype == bool else np.isinf(out).all()


def test_a_rare_or_missing_class_is_in_all_sets():
    dist, y = class_rows(0, 300)
    y[y == 1] = 0
    y[:2], y[2:][y[2:] == 2] = 2, 3
    with pytest.warns(UserWarning, match=r"these classes .* in all sets: 1 \(0\), 2 \(2\); hold"):
        fitted = ConformalSets(class_conditional=True).fit(dist, y)
    np.testing.assert_array_equal(np.isinf(fitted.threshold_), [False, True, True, False])
    sets = fitted.predict_set(dist)
    assert sets[:, 1:3].all()
    assert not sets[:, [0, 3]].all()


@pytest.mark.parametrize("kind", [ConformalIntervals, ConformalSets])
@pytest.mark.parametrize(
    "changes",
    [
        {"coverage": 0},
        {"coverage": 1},
        {"coverage": 1.5},
        {"coverage": np.nan},
        {"coverage": "0.9"},
        {"score": "mean"},
    ],
)
def test_bad_parameters(kind, changes):
    dist, y = (class_rows if kind is ConformalSets else real_rows)(0, 20)
    with pytest.raises(ParameterError, match=next(iter(changes))):
        kind(**changes).fit(dist, y)


@pytest.mark.parametrize(
    "changes",
    [
        {"k_reg": -1},
        {"k_reg": 1.5},
        {"penalty_weight": -1},
        {"penalty_weight": np.inf},
        {"penalty_weight": None},
    ],
)
def test_bad_penalties(changes):
    with pytest.raises(ParameterError, match=next(iter(changes))):
        ConformalSets("raps", **changes).fit(*class_rows(0, 20))


def test_bad_real_data():
    dist, y = real_rows(0, 20)
    conformal = ConformalIntervals()
    for bad, message in [
        ((dist[0], y[0]), "batch shape"),
        ((dist, y[:5]), r"y has shape \(5,\), expected \(20,\)"),
        ((dist, np.where(np.arange(20) == 3, np.nan, y)), "NaN or infinite at row 3"),
        ((dist[:0], y[:0]), "empty"),
        ((class_rows(0, 20)[0], y), "over real targets"),
        ((dist.mean, y), "over real targets"),
        (([dist, dist], y), "one for each"),
        (([dist], [y]), "at least two folds"),
        (([dist, dist], [y]), "got 2 distributions and 1 parts of y"),
        (([dist, real_rows(0, 20, shape=(2,))[0]], [y, np.zeros((20, 2))]), "number of outputs"),
    ]:
        with pytest.raises(DataError, match=message):
            conformal.fit(*bad)
    conformal.fit(dist, y)
    for bad, message in [
        (dist[0], "has shape"),
        (real_rows(0, 20, shape=(2,))[0], r"fitted on 1 output\(s\), but dist has shape \(20, 2\)"),
        (class_rows(0, 20)[0], "over real targets"),
        ([dist, dist], "predictions of one model, as in fit; got a list of 2"),
    ]:
        with pytest.raises(DataError, match=message):
            conformal.interval(bad)
    crossed = ConformalIntervals().fit(*folds_of(dist, y, 2))
    for bad, message in [
        (dist, "its 2 models"),
        ([dist] * 3, "list of 3"),
        ([dist, dist[:3]], "same rows"),
    ]:
        with pytest.raises(DataError, match=message):
            crossed.interval(bad)
    with pytest.raises(ParameterError, match="no sides"):
        ConformalIntervals("density", symmetric=False).fit(dist, y)
    with pytest.raises(ParameterError, match="cross-conformal"):
        ConformalIntervals("density").fit(*folds_of(dist, y, 2))
    narrow = normal(np.full(20, 1e16), np.full(20, 1e-3))
    with pytest.raises(DataError, match="a single point to rounding"):
        ConformalIntervals("density").fit(narrow, y)


def test_bad_class_data():
    dist, y = class_rows(0, 20)
    conformal = ConformalSets()
    for bad, message in [
        ((dist, np.where(np.arange(20) == 3, 7, y)), "holds 7 at row 3"),
        ((dist, y[:5]), "shape"),
        ((dist.probs, y), "make one by CategoricalMixture"),
        ((real_rows(0, 20)[0], y), "over classes"),
        (([dist, class_rows(0, 20, 3)[0]], [y, y % 3]), "different classes"),
    ]:
        with pytest.raises(DataError, match=message):
            conformal.fit(*bad)
    broken = CategoricalMixture(torch.full((1, 20, 4), torch.nan), validate_args=False)
    with pytest.raises(DataError, match="NaN"):
        conformal.fit(broken, y)
    conformal.fit(dist, y)
    for bad, message in [
        (class_rows(0, 20, 3)[0], r"has the classes \[0, 1, 2\]"),
        (broken, "NaN"),
        (dist[0], "batch shape"),
        (dist.probs, "make one by"),
    ]:
        with pytest.raises(DataError, match=message):
            conformal.predict_set(bad)
    with pytest.raises(ParameterError, match="class_conditional"):
        ConformalSets(class_conditional=True).fit(*folds_of(dist, y, 2))

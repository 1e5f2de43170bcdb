from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from uq.distributions import (
    CategoricalMixture,
    DirichletCategorical,
    NormalMixture,
    Recalibrated,
    concatenate,
)
from uq.errors import DataError, NoEpistemicError, ParameterError

LEVELS, HEIGHTS = [0.0, 0.05, 0.3, 0.6, 0.9, 1.0], [0.0, 0.2, 0.35, 0.5, 0.8, 1.0]


def mixture(n_draws=3, shape=(4,), seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    loc = torch.randn(n_draws, *shape, generator=g, dtype=dtype)
    scale = torch.rand(n_draws, *shape, generator=g, dtype=dtype) + 0.5
    return NormalMixture(loc, scale)


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


# -- one output ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_draws", [1, 3])
def test_the_identity_map_changes_nothing(n_draws):
    base = mixture(n_draws)
    d = Recalibrated(base, [0, 0.2, 1], [0, 0.2, 1])
    y = base.sample((50,), generator=generator())
    torch.testing.assert_close(d.cdf(y), base.cdf(y), rtol=0, atol=1e-15)
    torch.testing.assert_close(d.log_prob(y), base.log_prob(y), rtol=0, atol=1e-13)
    q = [0.001, 0.1, 0.5, 0.999]
    torch.testing.assert_close(d.quantile(q), base.quantile(q), rtol=0, atol=1e-12)
    torch.testing.assert_close(d.mean, base.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(d.variance, base.variance, rtol=1e-9, atol=0)
    torch.testing.assert_close(d.aleatoric, base.aleatoric, rtol=1e-9, atol=0)
    far = torch.tensor([-80.0, 0.0, 0.5, 80.0], dtype=torch.float64)
    for value in (y[0], far):
        torch.testing.assert_close(d.crps(value), base.crps(value), rtol=0, atol=1e-9)
    torch.testing.assert_close(d.mode, base.mode, rtol=0, atol=1e-6)


def test_moments_and_crps_against_adaptive_quadrature():
    base, value = mixture(), torch.tensor([-3.0, 0.0, 0.4, 5.0], dtype=torch.float64)
    d = Recalibrated(base, LEVELS, HEIGHTS)
    crps = d.crps(value)
    for i in range(4):
        row = d[i]
        knots = row.base.quantile(LEVELS[1:-1]).tolist()
        low, high = -14.0, 14.0  # 20 of the largest scales from the middle

        def g(t, row=row):
            return float(row.log_prob(torch.tensor(t, dtype=torch.float64)).exp())

        def cdf(t, row=row):
            return float(row.cdf(torch.tensor(t, dtype=torch.float64)))

        def integral(f, a, b, knots=knots):
            ends = [a, *(k for k in knots if a < k < b), b]
            return sum(integrate.quad(f, *p, epsabs=1e-12, limit=200)[0] for p in pairwise(ends))

        assert integral(g, low, high) == pytest.approx(1, abs=1e-9)
        mean = integral(lambda t: t * g(t), low, high)
        variance = integral(lambda t, mean=mean: (t - mean) ** 2 * g(t), low, high)
        assert float(d.mean[i]) == pytest.approx(mean, abs=1e-8)
        assert float(d.variance[i]) == pytest.approx(variance, abs=1e-8)
        y = float(value[i])
        expected = integral(lambda t: cdf(t) ** 2, low, y)
        expected += integral(lambda t: (1 - cdf(t)) ** 2, y, high)
        assert float(crps[i]) == pytest.approx(expected, abs=1e-8)


def test_density_is_the_slope_of_the_cdf():
    d = Recalibrated(mixture(), LEVELS, HEIGHTS)
    y = d.base.sample((200,), generator=generator())
    slope = (d.cdf(y + 1e-6) - d.cdf(y - 1e-6)) / 2e-6
    on_a_knot = (d.cdf(y + 1e-6) - torch.tensor(HEIGHTS)[:, None, None]).abs().amin(0) < 1e-5
    torch.testing.assert_close(
        d.log_prob(y).exp()[~on_a_knot], slope[~on_a_knot], atol=1e-8, rtol=0
    )


steps = st.lists(st.floats(0.01, 1), min_size=2, max_size=8)


@given(steps, st.data())
def test_cdf_and_quantile_are_inverse_and_monotone(wide, data):
    high = data.draw(st.lists(st.floats(0.01, 1), min_size=len(wide), max_size=len(wide)))
    knots = [np.concatenate([[0], np.cumsum(s) / np.sum(s)]) for s in (wide, high)]
    for k in knots:
        k[-1] = 1
    d = Recalibrated(mixture(), *knots)
    q = torch.linspace(0.001, 0.999, 41, dtype=torch.float64)
    y = d.quantile(q)
    assert (y.diff(dim=0) > 0).all()
    # A mixture's quantile is found to 1e-9 of its narrowest scale; R is at most 800 times as steep.
    torch.testing.assert_close(d.cdf(y), q[:, None].expand_as(y), rtol=0, atol=4e-7)
    one = Recalibrated(mixture(1), *knots)
    torch.testing.assert_close(
        one.cdf(one.quantile(q)), q[:, None].expand(41, 4), rtol=0, atol=1e-12
    )


def test_flat_pieces_have_no_density_and_their_lower_end_as_quantile():
    base = mixture(1, (2,))
    d = Recalibrated(base, [0, 0.2, 0.4, 0.7, 1], [0, 0, 0.5, 0.5, 1])
    y = base.quantile([0.1, 0.3, 0.6, 0.8])
    expected = torch.tensor([0, 0.25, 0.5, 0.5 + 0.5 / 3], dtype=torch.float64)
    torch.testing.assert_close(d.cdf(y), expected[:, None].expand(4, 2), rtol=0, atol=1e-12)
    assert d.log_prob(y).isneginf().tolist() == [[True] * 2, [False] * 2, [True] * 2, [False] * 2]
    torch.testing.assert_close(d.quantile(0.5), base.quantile(0.4))
    drawn = base.cdf(d.sample((500,), generator=generator()))
    assert not ((drawn < 0.2 - 1e-9) | ((drawn > 0.4 + 1e-9) & (drawn < 0.7 - 1e-9))).any()
    assert d.variance.isfinite().all()


def test_very_small_levels_keep_their_precision():
    """Over-confident tenfold: 2.5 % of the targets lie below level Φ(−19.6), about 1e-85."""
    true = np.linspace(0.025, 0.5, 20)
    claimed = stats.norm.cdf(10 * stats.norm.ppf(true[true < 0.5]))
    levels = [0, *claimed, 0.5, 1]
    heights = [0, *true, 1]
    d = Recalibrated(
        NormalMixture(torch.zeros(1, 1).double(), torch.ones(1, 1).double()), levels, heights
    )
    expected = 10 * stats.norm.ppf(true)
    np.testing.assert_allclose(d.quantile(true).numpy()[:, 0], expected, rtol=1e-9, atol=1e-9)
    drawn = d.sample((4000,), generator=generator())[:, 0].numpy()
    share = (drawn < expected[:, None]).mean(1)
    assert (np.abs(share - true) < 5 * np.sqrt(true * (1 - true) / 4000)).all()


def test_mode_is_the_highest_point_of_a_fine_grid():
    d = Recalibrated(mixture(5), LEVELS, HEIGHTS)
    grid = torch.linspace(-6, 6, 40_001, dtype=torch.float64)[:, None]
    # At a jump the density at the mode may be either side's.
    near = torch.stack([d.log_prob(d.mode + e) for e in (-1e-7, 0, 1e-7)]).amax(0)
    assert (near >= d.log_prob(grid).amax(0) - 1e-6).all()


def test_many_knots_are_followed_closely():
    rng = np.random.default_rng(0)
    levels = np.sort(rng.uniform(size=2000))
    heights = np.arange(1, 2001) / 2001
    base = mixture(1)
    d = Recalibrated(base, [0, *levels, 1], [0, *heights, 1])
    q = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    y = d.quantile(q)
    assert ((d.mean - y.mean(0)).abs() < 1e-3 * base.stddev).all()
    assert ((d.variance / y.var(0) - 1).abs() < 2e-3).all()


@pytest.mark.statistical
def test_samples_follow_the_distribution():
    d = Recalibrated(mixture(), LEVELS, HEIGHTS)
    levels = d.cdf(d.sample((5000,), generator=generator())).numpy()
    for column in levels.T:
        counts, _ = np.histogram(column, 20, (0, 1))
        # 1e-6: the level of five standard errors.
        assert stats.chisquare(counts).pvalue > 1e-6
        assert stats.kstest(column, "uniform").pvalue > 1e-6


def test_uncertainty_keeps_the_shares_of_the_base():
    base = NormalMixture(mixture().loc, mixture().scale, torch.tensor(0.3, dtype=torch.float64))
    d = Recalibrated(base, LEVELS, HEIGHTS)
    torch.testing.assert_close(d.aleatoric + d.epistemic, d.variance)
    torch.testing.assert_close(d.epistemic / d.aleatoric, base.epistemic / base.aleatoric)
    with pytest.raises(NoEpistemicError):
        _ = Recalibrated(mixture(1), LEVELS, HEIGHTS).epistemic


def test_frame_has_all_columns():
    d = Recalibrated(mixture(), LEVELS, HEIGHTS)
    frame = d.to_frame()
    np.testing.assert_allclose(frame["q05"], d.quantile(0.05))
    assert np.isfinite(frame.to_numpy()).all()
    assert Recalibrated(mixture(1), LEVELS, HEIGHTS).to_frame()["epistemic"].isna().all()


def test_recalibrated_twice_is_the_map_of_the_map():
    base = mixture()
    twice = Recalibrated(Recalibrated(base, [0, 0.3, 1], [0, 0.5, 1]), [0, 0.5, 1], [0, 0.8, 1])
    once = Recalibrated(base, [0, 0.3, 1], [0, 0.8, 1])
    y = base.sample((20,), generator=generator())
    torch.testing.assert_close(twice.cdf(y), once.cdf(y))
    torch.testing.assert_close(twice.quantile([0.1, 0.9]), once.quantile([0.1, 0.9]))
    torch.testing.assert_close(twice.mean, once.mean, rtol=0, atol=1e-9)


# -- several outputs -----------------------------------------------------------------------------

OWN_LEVELS = [[0, 0.1, 0.5, 1], [0, 0.4, 0.9, 1]]
OWN_HEIGHTS = [[0, 0.3, 0.6, 1], [0, 0.2, 0.7, 1]]


def test_each_output_has_its_map():
    base = mixture(shape=(4, 2))
    d = Recalibrated(base, OWN_LEVELS, OWN_HEIGHTS)
    y = base.sample((6,), generator=generator())
    for j in (0, 1):
        alone = Recalibrated(base.output(j), OWN_LEVELS[j], OWN_HEIGHTS[j])
        for own in (d.output(j), d.output(j - 2)):
            torch.testing.assert_close(own.quantile(0.3), alone.quantile(0.3))
        torch.testing.assert_close(d.cdf(y)[..., j], alone.cdf(y[..., j]))
        torch.testing.assert_close(d.log_prob(y)[..., j], alone.log_prob(y[..., j]))
        torch.testing.assert_close(d.quantile([0.2, 0.7])[..., j], alone.quantile([0.2, 0.7]))
        torch.testing.assert_close(d.mean[:, j], alone.mean)
        torch.testing.assert_close(d.variance[:, j], alone.variance)
        torch.testing.assert_close(d.crps(y[0])[:, j], alone.crps(y[0, :, j]))
        torch.testing.assert_close(d.mode[:, j], alone.mode)
    torch.testing.assert_close(d[2].quantile(0.3), d.quantile(0.3)[2])


def dependent():
    """Two outputs whose mixture makes them strongly dependent."""
    loc = torch.tensor([[[-1.5, -1.0]], [[1.5, 1.2]]], dtype=torch.float64)
    return NormalMixture(loc, torch.full_like(loc, 0.7))


def test_joint_density_integrates_to_one_and_has_the_new_marginals():
    d = Recalibrated(dependent(), OWN_LEVELS, OWN_HEIGHTS)
    # Grid through the knots, where the density jumps.
    axes = []
    for j in (0, 1):
        knots = d.base.output(j).quantile(OWN_LEVELS[j][1:-1])[:, 0].tolist()
        nodes, weights = np.polynomial.legendre.leggauss(40)
        ends = [-7.0, *knots, 7.0]
        pairs = list(pairwise(ends))
        x = np.concatenate([0.5 * (b - a) * nodes + 0.5 * (a + b) for a, b in pairs])
        w = np.concatenate([0.5 * (b - a) * weights for a, b in pairs])
        axes.append((torch.tensor(x), torch.tensor(w)))
    (x0, w0), (x1, w1) = axes
    points = torch.stack(torch.meshgrid(x0, x1, indexing="ij"), -1)[..., None, :]
    density = d.joint().log_prob(points).exp()[..., 0]
    assert float(w0 @ density @ w1) == pytest.approx(1, abs=1e-6)
    marginal = d.output(0).log_prob(x0[:, None]).exp()[:, 0]
    torch.testing.assert_close(density @ w1, marginal, rtol=0, atol=1e-5)
    # The sum of the per-output Jacobians is no density: the reason for the change of variables.
    naive = d.base.joint().log_prob(points)[..., 0]
    _, slope = d._recalibrate(d._exact.cdf(points))
    assert abs(float(w0 @ (naive + slope.log().sum(-1)[..., 0]).exp() @ w1) - 1) > 0.02


def test_joint_of_independent_outputs_is_the_sum():
    base = mixture(1, (4, 2))
    d = Recalibrated(base, OWN_LEVELS, OWN_HEIGHTS)
    y = base.sample((30,), generator=generator())
    torch.testing.assert_close(d.joint().log_prob(y), d.log_prob(y).sum(-1), rtol=0, atol=1e-8)


@pytest.mark.statistical
def test_samples_keep_the_dependence_of_the_base():
    base = dependent()
    d = Recalibrated(base, OWN_LEVELS, OWN_HEIGHTS)
    n = 20_000
    tau = [
        stats.kendalltau(*t.sample((n,), generator=generator(s))[:, 0].T)[0]
        for s, t in enumerate((base.joint(), d.joint()))
    ]
    # Standard deviation of Kendall's τ from n pairs is at most √(2(1 − τ²)/n).
    error = np.sqrt(2 * (1 - tau[0] ** 2) / n)
    assert tau[0] > 0.3
    assert abs(tau[0] - tau[1]) < 5 * error * np.sqrt(2)


def test_joint_and_marginal_undo_each_other():
    base = mixture(shape=(4, 2))
    base.index = pd.Index(list("abcd"))
    d = Recalibrated(base, OWN_LEVELS, OWN_HEIGHTS)
    d.index = base.index
    joint = d.joint()
    assert joint.event_shape == (2,)
    assert joint.batch_shape == (4,)
    assert list(joint.index) == list("abcd")
    assert joint.marginal().batch_shape == (4, 2)
    assert d.marginal() is d
    torch.testing.assert_close(joint.mean, d.mean)
    torch.testing.assert_close(joint[1:3].mean, d.mean[1:3])
    y = base.sample(generator=generator())
    torch.testing.assert_close(joint[2].log_prob(y[2]), joint.log_prob(y)[2])
    for name in ("cdf", "crps"):
        with pytest.raises(NotImplementedError, match="before"):
            getattr(joint, name)(y)


# -- shape, copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2)])
@pytest.mark.parametrize("joint", [False, True])
def test_shapes_slices_copies_and_expansion(shape, joint):
    base = mixture(shape=shape)
    d = Recalibrated(base, LEVELS, HEIGHTS)
    d = d.joint() if joint else d
    whole = d.batch_shape + d.event_shape
    assert whole == shape
    y = d.sample((3, 2), generator=generator())
    assert y.shape == (3, 2, *shape)
    assert d.sample((0,), generator=generator()).shape == (0, *shape)
    log_p = d.log_prob(y)
    assert log_p.shape == (3, 2, *d.batch_shape)
    assert d.support.check(y).all()
    torch.testing.assert_close(d[[3, 0]].log_prob(y[:, :, [3, 0]]), log_p[:, :, [3, 0]])
    torch.testing.assert_close(pickle.loads(pickle.dumps(d)).log_prob(y), log_p, rtol=0, atol=0)
    torch.testing.assert_close(
        d.expand((4, *d.batch_shape)).log_prob(y[0, 0]).sum(), 4 * log_p[0, 0].sum()
    )
    assert d.draws.log_prob(y).shape == (3, 2, *d.batch_shape)
    assert d.draws.batch_shape == (d.n_draws, *d.batch_shape)
    again = d.sample((3, 2), generator=generator())
    torch.testing.assert_close(again, y, rtol=0, atol=0)


def test_a_float32_base_is_computed_in_float64():
    base = mixture(dtype=torch.float32)
    d = Recalibrated(base, LEVELS, HEIGHTS)
    exact = Recalibrated(base.double(), LEVELS, HEIGHTS)
    y = base.sample(generator=generator())
    assert d.log_prob(y).dtype == torch.float64
    torch.testing.assert_close(d.log_prob(y), exact.log_prob(y.double()))
    torch.testing.assert_close(d.mean, exact.mean)
    assert d.quantile(0.2).dtype == d.sample().dtype == torch.float64


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "heights", "message"),
    [
        ([0, 0.5, 0.5, 1], [0, 0.2, 0.3, 1], "levels must increase strictly"),
        ([0, 0.5, 1], [0, 1.2, 1], "recalibrated must never decrease"),
        ([0.1, 0.5, 1], [0, 0.5, 1], "levels must .* from 0 to 1"),
        ([0, 0.5, 1], [0, 0.5, 0.9], "recalibrated must .* from 0 to 1"),
        ([0, float("nan"), 1], [0, 0.5, 1], "levels must increase"),
        ([0, 1], [0, 0.5, 1], r"shape \(1, 2\) and recalibrated \(1, 3\)"),
        ([1], [1], "K >= 2"),
        ([[0, 1]] * 3, [[0, 1]] * 3, "maps of 3 outputs"),
    ],
)
def test_bad_maps(levels, heights, message):
    with pytest.raises(ParameterError, match=message):
        Recalibrated(mixture(), levels, heights)


def test_base_must_be_real():
    with pytest.raises(DataError, match="got a CategoricalMixture"):
        Recalibrated(CategoricalMixture(torch.zeros(1, 2, 3)), [0, 1], [0, 1])


# -- concatenate ---------------------------------------------------------------------------------


def all_kinds():
    logits = torch.randn(3, 5, 4, generator=generator(), dtype=torch.float64)
    return {
        "normal": mixture(shape=(5,)),
        "outputs": mixture(shape=(5, 2)),
        "joint": mixture(shape=(5, 2)).joint(),
        "tau": NormalMixture(torch.zeros(2, 5), torch.ones(2, 5), torch.ones(2, 5)),
        "classes": CategoricalMixture(logits, classes=list("abcd")),
        "dirichlet": DirichletCategorical(1 + logits[0].exp(), classes=list("abcd")),
        "recalibrated": Recalibrated(mixture(shape=(5,)), LEVELS, HEIGHTS),
        "recalibrated-joint": Recalibrated(mixture(shape=(5, 2)).joint(), OWN_LEVELS, OWN_HEIGHTS),
    }


@pytest.mark.parametrize("kind", all_kinds())
def test_concatenating_slices_gives_the_whole(kind):
    d = all_kinds()[kind]
    d.index = pd.Index(list("abcde"))
    again = concatenate([d[:2], d[2:3], d[3:]])
    assert type(again) is type(d)
    assert again.batch_shape == d.batch_shape
    assert again.event_shape == d.event_shape
    assert list(again.index) == list("abcde")
    y = d.sample(generator=generator())
    torch.testing.assert_close(again.log_prob(y), d.log_prob(y), rtol=0, atol=1e-14)
    if hasattr(d, "classes"):
        assert again.classes.tolist() == list("abcd")
    no_index = d[:2]
    no_index.index = None
    assert concatenate([no_index, d[2:]]).index is None


def test_only_one_kind_is_concatenated():
    kinds = list(all_kinds().values())
    for i, other in enumerate(kinds):
        with pytest.raises(DataError, match=r"parts\[1\] .* differs in kind"):
            concatenate([kinds[i - 1], other])
    base = mixture(shape=(5,))
    different = [
        (base, mixture(4, (5,))),
        (
            CategoricalMixture(torch.zeros(1, 2, 3)),
            CategoricalMixture(torch.zeros(1, 2, 3), classes=[1, 2, 3]),
        ),
        (Recalibrated(base, [0, 1], [0, 1]), Recalibrated(base, LEVELS, HEIGHTS)),
    ]
    for pair in different:
        with pytest.raises(DataError, match="differs in kind"):
            concatenate(pair)
    with pytest.raises(DataError, match="parts is empty"):
        concatenate([])
    with pytest.raises(DataError, match=r"parts\[0\] must be a predictive distribution of rows"):
        concatenate([base[0]])
    with pytest.raises(DataError, match=r"parts\[0\] must be"):
        concatenate([np.zeros(3)])

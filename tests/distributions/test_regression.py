from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate
from scipy.special import ndtr
from scipy.stats import norm

from uq.distributions import NormalMixture
from uq.distributions.regression import _mean_difference, _mean_difference_pairs
from uq.errors import DataError, ParameterError

F64 = torch.float64
seeds = st.integers(0, 2**20)
levels = st.floats(1e-6, 1 - 1e-6)


def mixture(seed, n=4, max_draws=6, tau=True):
    """Mixtures from nearly Normal to far-apart narrow peaks."""
    rng = np.random.default_rng(seed)
    n_draws = int(rng.integers(2, max_draws + 1))
    spread, ratio = 10 ** rng.uniform(-3, 2), rng.uniform(0, 2)
    loc = torch.as_tensor(rng.uniform(-50, 50) + spread * rng.standard_normal((n_draws, n)))
    scale = torch.as_tensor(np.exp(ratio * rng.standard_normal((n_draws, n))))
    return NormalMixture(loc, scale, 0.5 * scale if tau and seed % 2 else None)


def total_scale(d):
    tau = 0.0 if d.epistemic_scale is None else d.epistemic_scale.numpy()
    return np.hypot(d.scale.numpy(), tau)


def integral(f, d, row):
    """∫ f over the support of a row, split at its component means."""
    loc, scale = d.loc[:, row].numpy(), total_scale(d)[:, row]
    cuts = np.unique(
        np.r_[loc - 12 * scale, loc - 3 * scale, loc, loc + 3 * scale, loc + 12 * scale]
    )
    pieces = [integrate.quad(f, a, b, epsabs=1e-13, limit=200)[0] for a, b in pairwise(cuts)]
    return sum(pieces)


# -- SciPy and closed forms --------------------------------------------------------------------


@given(seeds)
def test_density_and_cdf_are_the_mean_of_scipys(seed):
    d = mixture(seed)
    y = d.sample(generator=torch.Generator().manual_seed(seed))
    components = norm(d.loc.numpy(), total_scale(d))
    np.testing.assert_allclose(d.log_prob(y).exp(), components.pdf(y).mean(0), rtol=1e-10)
    np.testing.assert_allclose(d.cdf(y), components.cdf(y).mean(0), rtol=1e-12)


def test_cdf_keeps_its_relative_precision_in_the_lower_tail():
    d = NormalMixture(torch.zeros(1, 4, dtype=F64), torch.tensor(1.0, dtype=F64))
    y = torch.tensor([-5.0, -8.0, -15.0, -30.0], dtype=F64)
    np.testing.assert_allclose(d.cdf(y), ndtr(y.numpy()), rtol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_density_integrates_to_one_and_gives_moments_entropy_and_crps(seed):
    d = mixture(seed, n=1)
    y = float(d.mean) + 0.7 * float(d.stddev)

    def at(f):
        return lambda x: float(f(torch.tensor([x], dtype=F64)))

    density = at(lambda x: d.log_prob(x).exp())
    assert integral(density, d, 0) == pytest.approx(1, abs=1e-9)
    mean = integral(lambda x: x * density(x), d, 0)
    assert float(d.mean) == pytest.approx(mean, rel=1e-8)
    variance = integral(lambda x: (x - mean) ** 2 * density(x), d, 0)
    assert float(d.variance) == pytest.approx(variance, rel=1e-7)

    cdf = at(d.cdf)
    below = integral(lambda x: cdf(x) ** 2 if x < y else 0.0, d, 0)
    above = integral(lambda x: (1 - cdf(x)) ** 2 if x >= y else 0.0, d, 0)
    # quad meets the jump at y inside a piece, hence the tolerance.
    assert float(d.crps(torch.tensor([y], dtype=F64))) == pytest.approx(below + above, rel=1e-5)


def test_entropy_matches_quadrature_and_its_limits():
    loc = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 100.0]], dtype=F64)
    d = NormalMixture(loc, torch.tensor(0.8, dtype=F64))
    single = 0.5 * math.log(2 * math.pi * math.e * 0.64)
    h = d.entropy()
    assert float(h[0]) == pytest.approx(single, abs=1e-12)
    assert float(h[2]) == pytest.approx(single + math.log(2), abs=1e-10)

    def integrand(x):
        log_p = float(d[1].log_prob(torch.tensor(x, dtype=F64)))
        return -log_p * math.exp(log_p)

    expected = integrate.quad(integrand, -12, 13, epsabs=1e-12)[0]
    assert float(h[1]) == pytest.approx(expected, abs=1e-9)


def test_crps_of_a_normal_has_the_textbook_value():
    d = NormalMixture(torch.zeros(1, 1, dtype=F64), torch.tensor(1.0, dtype=F64))
    assert d.crps(torch.zeros(1, dtype=F64)).item() == pytest.approx(0.2336949772, abs=1e-10)


@given(seeds, st.sampled_from([2, 20, 60, 150]))
def test_crps_by_the_grid_is_crps_by_pairs(seed, n_draws):
    rng = np.random.default_rng(seed)
    spread, ratio = 10 ** rng.uniform(-3, 1, 8), rng.uniform(0, 0.5, 8)
    loc = torch.as_tensor(1e3 + spread * rng.standard_normal((n_draws, 8)))
    scale = torch.as_tensor(np.exp(ratio * rng.standard_normal((n_draws, 8))))
    error = _mean_difference(loc, scale) - _mean_difference_pairs(loc, scale)
    assert (error.abs() <= 1e-11 * scale.amin(0)).all()


def test_crps_uses_the_grid_and_the_pairs(monkeypatch):
    # Otherwise the comparison above compares a thing with itself.
    sizes = []

    def spy(loc, *rest):
        sizes.append(loc.shape[1])
        return torch.zeros(loc.shape[1], dtype=F64)

    monkeypatch.setattr("uq.distributions.regression._mean_difference_grid", spy)
    loc = torch.as_tensor(np.random.default_rng(0).standard_normal((60, 3)))
    loc[:, 1] *= 1e4
    difference = _mean_difference(loc, torch.ones(60, 3, dtype=F64))
    assert sizes == [2]
    assert (difference == 0).tolist() == [True, False, True]


# -- quantiles ---------------------------------------------------------------------------------


@given(seeds, levels)
def test_cdf_inverts_quantile(seed, q):
    d = mixture(seed)
    np.testing.assert_allclose(d.cdf(d.quantile(q)), q, rtol=1e-9)


@given(seeds, st.lists(levels, min_size=2, max_size=5))
def test_quantiles_and_cdf_are_monotone(seed, q):
    d = mixture(seed)
    steps = d.quantile(sorted(q)).diff(dim=0)
    assert (steps >= -1e-9 * d.stddev).all()
    grid = torch.linspace(-200, 200, 50, dtype=F64)[:, None].expand(-1, 4)
    assert (d.cdf(grid).diff(dim=0) >= 0).all()


@pytest.mark.parametrize("gap", [1e1, 1e3, 1e6])
@pytest.mark.parametrize("q", [1e-8, 0.2, 0.49999, 0.5, 0.8, 1 - 1e-8])
def test_quantiles_of_far_apart_peaks(gap, q):
    loc = torch.tensor([[0.0], [0.0], [gap], [gap]], dtype=F64)
    d = NormalMixture(loc, torch.tensor(1.0, dtype=F64))
    x = d.quantile(q)
    assert d.cdf(x).item() == pytest.approx(q, rel=1e-6)
    if q == 0.5:
        assert 0 < x.item() < gap
    elif q == 0.2:
        assert x.item() == pytest.approx(norm.ppf(0.4), abs=1e-9 * gap)


def test_quantiles_of_equal_draws_are_those_of_the_normal():
    d = NormalMixture(torch.full((50, 3), 2.5, dtype=F64), torch.tensor(0.7, dtype=F64))
    for q in (1e-9, 0.3, 0.5, 0.975):
        np.testing.assert_allclose(d.quantile(q), norm.ppf(q, 2.5, 0.7), rtol=1e-12)


def test_quantile_interval_and_median_shapes():
    d = NormalMixture(torch.randn(3, 5, 2, dtype=F64), torch.tensor(1.0, dtype=F64))
    assert d.quantile(0.3).shape == d.median.shape == (5, 2)
    assert d.quantile([0.1, 0.2, 0.3]).shape == (3, 5, 2)
    torch.testing.assert_close(d.icdf(torch.tensor([0.1, 0.9], dtype=F64)), d.quantile([0.1, 0.9]))
    lower, upper = d.interval(0.8)
    torch.testing.assert_close(torch.stack([lower, upper]), d.quantile([0.1, 0.9]))
    empty = d[:0]
    assert empty.quantile([0.1, 0.9]).shape == (2, 0, 2)


# -- moments, mode, transforms -----------------------------------------------------------------


@given(seeds)
def test_split_of_uncertainty_sums_to_the_variance(seed):
    d = mixture(seed)
    torch.testing.assert_close(d.aleatoric + d.epistemic, d.variance, rtol=1e-14, atol=0)
    tau2 = 0.0 if d.epistemic_scale is None else d.epistemic_scale.square()
    second = (d.scale.square() + tau2 + (d.loc - d.mean).square()).mean(0)
    torch.testing.assert_close(d.variance, second, rtol=1e-12, atol=0)
    assert (d.epistemic >= 0).all()


def test_variance_survives_a_large_offset_in_float32():
    loc = torch.tensor([[1e4], [1e4]], dtype=torch.float32)
    d = NormalMixture(loc, torch.tensor(0.01))
    assert d.variance.item() == pytest.approx(1e-4, rel=1e-5)


@given(seeds, st.floats(-50, 50), st.floats(0.01, 100))
def test_affine_equivariance(seed, shift, factor):
    d = mixture(seed)
    moved = d.affine(shift, factor)
    y = d.sample(generator=torch.Generator().manual_seed(seed))
    z = shift + factor * y
    close = {"rtol": 1e-7, "atol": 1e-7 * factor}
    torch.testing.assert_close(moved.log_prob(z), d.log_prob(y) - math.log(factor), **close)
    torch.testing.assert_close(moved.cdf(z), d.cdf(y), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(moved.mean, shift + factor * d.mean, **close)
    torch.testing.assert_close(moved.epistemic, factor**2 * d.epistemic, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(moved.crps(z), factor * d.crps(y), **close)
    torch.testing.assert_close(moved.quantile(0.3), shift + factor * d.quantile(0.3), **close)


@given(seeds)
def test_mode_is_the_highest_point_of_a_fine_grid(seed):
    d = mixture(seed, n=2)
    low, high = d.loc.amin(0) - 1, d.loc.amax(0) + 1
    grid = low + torch.linspace(0, 1, 2001, dtype=F64)[:, None] * (high - low)
    best = d.log_prob(torch.cat([grid, d.loc])).amax(0)
    # Mean shift climbs from the best component mean, which may miss a merged higher peak by little.
    assert (d.log_prob(d.mode) >= best - 0.05).all()
    density_slope = torch.func.jacrev(lambda x: d.log_prob(x).sum())(d.mode)
    assert (density_slope.abs() * d.scale.amin(0) < 1e-6).all()


def test_joint_density_is_not_the_product_of_the_marginals():
    d = NormalMixture(torch.randn(4, 5, 3, dtype=F64), torch.tensor(0.5, dtype=F64))
    y = torch.randn(5, 3, dtype=F64)
    per_draw = norm(d.loc.numpy(), 0.5).logpdf(y.numpy()).sum(-1)
    expected = np.log(np.exp(per_draw).mean(0))
    np.testing.assert_allclose(d.joint().log_prob(y), expected, rtol=1e-12)
    assert ((d.log_prob(y).sum(-1) - d.joint().log_prob(y)).abs() > 1e-3).any()
    assert d.joint().batch_shape == (5,)
    assert d.joint().event_shape == (3,)
    assert d.joint().joint().event_shape == (3,)


def test_joint_is_the_marginal_for_one_output_and_for_one_draw():
    one = NormalMixture(torch.randn(4, 5, dtype=F64), torch.tensor(0.5, dtype=F64))
    assert one.joint() is one
    d = NormalMixture(torch.randn(1, 5, 3, dtype=F64), torch.tensor(0.5, dtype=F64))
    y = torch.randn(5, 3, dtype=F64)
    torch.testing.assert_close(d.joint().log_prob(y), d.log_prob(y).sum(-1))


@pytest.mark.statistical
def test_samples_have_the_moments_and_the_cdf_of_the_distribution():
    d, n = mixture(3, n=3), 40_000
    y = d.sample((n,), generator=torch.Generator().manual_seed(0))
    assert ((y.mean(0) - d.mean).abs() <= 5 * d.stddev / math.sqrt(n)).all()
    squares = (y - d.mean).square()
    error = (squares.mean(0) - d.variance).abs()
    assert (error <= 5 * squares.std(0) / math.sqrt(n)).all()
    share = (y <= d.quantile(0.3)).double().mean(0)
    assert ((share - 0.3).abs() <= 5 * math.sqrt(0.3 * 0.7 / n)).all()


@pytest.mark.statistical
def test_outputs_of_a_joint_sample_share_their_draw():
    # Two draws at (−9, −9) and (9, 9): joint samples agree in sign, marginal ones need not.
    loc = torch.tensor([[[-9.0, -9.0]], [[9.0, 9.0]]], dtype=F64)
    d = NormalMixture(loc, torch.tensor(1.0, dtype=F64))
    generator = torch.Generator().manual_seed(0)
    joint = d.joint().sample((1000,), generator=generator)[:, 0].sign()
    assert (joint[:, 0] == joint[:, 1]).all()
    # 5 standard errors of a fair coin.
    assert abs(joint.mean().item()) <= 5 / math.sqrt(1000)
    marginal = d.sample((1000,), generator=generator)[:, 0].sign()
    assert abs((marginal[:, 0] * marginal[:, 1]).mean().item()) <= 5 / math.sqrt(1000)


# -- gradients, devices, presentation ----------------------------------------------------------


def test_rsample_carries_gradients_for_a_single_draw_only():
    loc = torch.zeros(1, 3, requires_grad=True)
    d = NormalMixture(loc, torch.tensor(1.0))
    assert d.has_rsample
    d.rsample((5,)).sum().backward()
    assert torch.equal(loc.grad, torch.full((1, 3), 5.0))
    two = NormalMixture(torch.zeros(2, 3), torch.tensor(1.0))
    assert not two.has_rsample
    with pytest.raises(NotImplementedError, match="no reparameterised sample"):
        two.rsample()


@pytest.mark.parametrize("method", ["log_prob", "cdf"])
def test_gradients_are_right(method):
    loc = torch.randn(3, 4, dtype=F64, requires_grad=True)
    y = torch.randn(4, dtype=F64)
    f = lambda m: getattr(NormalMixture(m, torch.tensor(0.7, dtype=F64)), method)(y)  # noqa: E731
    assert torch.autograd.gradcheck(f, loc)


def test_per_output_methods_refuse_the_joint_distribution():
    d = NormalMixture(torch.randn(4, 5, 2), torch.tensor(1.0)).joint()
    y = torch.zeros(5, 2)
    for call in (lambda: d.cdf(y), lambda: d.quantile(0.5), lambda: d.crps(y), lambda: d.mode):
        with pytest.raises(NotImplementedError, match=r"per output; call it .* before joint"):
            call()


def test_frames_summarise_rows():
    d = NormalMixture(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor(1.0))
    d.index = pd.Index(["a", "b"])
    frame = d.to_frame()
    assert list(frame.columns) == ["mean", "std", "q05", "q50", "q95", "aleatoric", "epistemic"]
    assert frame.loc["a", "epistemic"] == 1.0
    assert frame.loc["b", "q95"] == pytest.approx(1 + 1.6448536, abs=1e-6)
    point = NormalMixture(torch.zeros(1, 2), torch.tensor(1.0)).to_frame()
    assert point["epistemic"].isna().all()
    wide = NormalMixture(torch.zeros(2, 3, 2), torch.tensor(1.0)).joint().to_frame()
    assert wide.shape == (3, 14)
    assert wide.columns[7] == ("y1", "mean")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NormalMixture(torch.tensor(0.0), torch.tensor(1.0)), "leading axis of draws"),
        (lambda: NormalMixture(torch.zeros(1, 2), torch.tensor(0.0)), "scale must be > 0"),
        (lambda: NormalMixture(torch.zeros(1, 2), torch.tensor(math.nan)), "not NaN"),
        (
            lambda: NormalMixture(torch.zeros(1, 2), torch.tensor(1.0)).quantile([0.5, 1.0]),
            "strictly between 0 and 1",
        ),
        (
            lambda: NormalMixture(torch.zeros(1, 2), torch.tensor(1.0)).interval(0),
            r"coverage must lie in \(0, 1\), got 0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((DataError, ParameterError), match=message):
        call()

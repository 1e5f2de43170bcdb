"""Resampling: laws of each scheme, an independent search, extremes of the weights."""

import math

import numpy as np
import pytest
import torch

from uq.errors import DataError, ParameterError
from uq.inference import resampling
from uq.inference.resampling import (
    SCHEMES,
    ParticleWarning,
    normalize,
    resample,
    resample_below,
    unique_share,
)

schemes = pytest.mark.parametrize("scheme", SCHEMES)


def weights(n=37, seed=0, runs=()):
    g = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(*runs, n, generator=g, dtype=torch.float64)


def counts(ancestors, n):
    flat = ancestors.reshape(-1, ancestors.shape[-1])
    return torch.stack([torch.bincount(row, minlength=n) for row in flat]).double()


@schemes
def test_number_and_order(scheme):
    chosen = resample(weights(), scheme)
    assert chosen.shape == (37,)
    assert chosen.dtype == torch.int64
    assert bool((chosen.diff() >= 0).all())
    for n in (1, 5, 200):
        few = resample(weights(runs=(3, 2)), scheme, n=n)
        assert few.shape == (3, 2, n)
        assert bool(((few >= 0) & (few < 37)).all())


@schemes
@pytest.mark.statistical
def test_expected_copies_are_those_of_the_weights(scheme):
    n_seeds, n = 10_000, 37
    log_w = weights(n)
    w = log_w.softmax(0)
    g = torch.Generator().manual_seed(2)
    found = counts(resample(log_w.expand(n_seeds, n), scheme, generator=g), n)
    assert bool((found.sum(1) == n).all())
    # 4 standard errors of each mean: 37 tests of level 6e-5. Where a copy more or less is a rare
    # event (p < 1e-3) the standard error is not known: ten such events in 10⁴.
    error = (4 * found.std(0) / math.sqrt(n_seeds)).clamp(min=1e-3)
    assert bool(((found.mean(0) - n * w).abs() <= error).all())
    spread = (found - n * w).abs().max()
    if scheme in ("systematic", "residual"):
        assert spread < 1
    if scheme == "stratified":
        assert 1 < spread < 2
    if scheme == "multinomial":
        variance = n * w * (1 - w)
        # Relative error of a variance from 10⁴ draws is √(2/10⁴) for a Normal; 10 % is 5 of them
        # for counts of kurtosis 6.
        big = w > 0.02
        torch.testing.assert_close(found.var(0)[big], variance[big], rtol=0.1, atol=0)


@pytest.mark.parametrize("scheme", ["stratified", "systematic"])
def test_equals_a_search_of_the_cumulative_weights(scheme):
    n = 5000
    log_w = weights(n, 2, runs=(3,)) - 1e4
    g, h = (torch.Generator().manual_seed(3) for _ in range(2))
    chosen = resample(log_w, scheme, generator=g).numpy()
    u = resampling.uniforms(log_w, scheme, n, h).numpy()[:, :n]
    for row in range(3):
        w = np.exp(log_w[row].numpy() - log_w[row].numpy().max())
        points = (np.arange(n) + u[row]) / n
        # First k with C_k > u.
        expected = np.searchsorted(np.cumsum(w) / w.sum(), points, side="right")
        np.testing.assert_array_equal(chosen[row], expected)


def test_multinomial_equals_a_search_of_ordered_uniforms():
    log_w = weights(2000, 4)
    g, h = (torch.Generator().manual_seed(3) for _ in range(2))
    chosen = resample(log_w, "multinomial", n=777, generator=g)
    u = resampling.uniforms(log_w, "multinomial", 777, h)
    assert bool((u.diff() > 0).all())
    expected = torch.searchsorted(log_w.softmax(0).cumsum(0), u, right=True)
    assert torch.equal(chosen, expected)


@schemes
def test_a_constant_in_the_log_weights_changes_nothing(scheme):
    # Exact in float64 where the constant only shifts the exponent's argument by whole numbers.
    log_w = (weights(101) * 64).round() / 64
    base = resample(log_w, scheme, generator=torch.Generator().manual_seed(5))
    for shift in (1.0, 1e4, -1e4):
        moved = resample(log_w + shift, scheme, generator=torch.Generator().manual_seed(5))
        assert torch.equal(moved, base)


@pytest.mark.parametrize("n", [1, 7, 1000, 99_999])
def test_equal_weights_give_each_particle_once(n):
    log_w = torch.full((n,), -3.7, dtype=torch.float64)
    for u in (1e-6, 0.3, 1 - 1e-6):
        w = resampling._scaled(log_w)
        point = torch.tensor([u], dtype=torch.float64)
        chosen = resampling._ancestors(resampling._counts(w, "systematic", n, point), n)
        assert torch.equal(chosen, torch.arange(n))
    assert torch.equal(resample(log_w, "residual"), torch.arange(n))


@schemes
@pytest.mark.parametrize("nothing", [-math.inf, math.nan, math.inf])
def test_zero_weight_is_never_chosen(scheme, nothing):
    log_w = weights(50, 6, runs=(400,))
    dead = [0, 1, 20, 21, 48, 49]
    log_w[:, dead] = nothing
    chosen = resample(log_w, scheme)
    assert not np.isin(chosen.numpy(), dead).any()


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("n", [3, 1_000_000])
def test_ends_of_the_unit_interval(u, n):
    """At u = 0 a zero weight in front must not win; at u → 1 no index may pass the last."""
    w = torch.full((n,), 1.0, dtype=torch.float64)
    w[0] = w[-1] = 0.0
    for scheme, size in (("systematic", 1), ("stratified", n + 1), ("residual", 1)):
        points = torch.full((size,), u, dtype=torch.float64)
        chosen = resampling._ancestors(resampling._counts(w.clone(), scheme, n, points), n)
        assert int(chosen[0]) >= 1
        assert int(chosen[-1]) <= n - 2


@schemes
def test_all_weights_zero_is_uniform_and_said(scheme):
    log_w = torch.stack([torch.full((9,), -math.inf), torch.zeros(9), torch.full((9,), math.nan)])
    with pytest.warns(ParticleWarning, match="zero or NaN in 2 of 3 runs"):
        chosen = resample(log_w, scheme, generator=torch.Generator().manual_seed(0))
    if scheme != "multinomial":
        assert float(unique_share(chosen).min()) > 0.5
    w = normalize(log_w)
    assert w.degenerate.tolist() == [True, False, True]
    assert w.log_sum.tolist() == [-math.inf, pytest.approx(math.log(9)), -math.inf]
    torch.testing.assert_close(w.ess, torch.full((3,), 9.0, dtype=torch.float64))


def test_normalised_weights_and_effective_size():
    log_w = weights(1000, 7) - 1e4
    log_w[3] = math.nan
    w = normalize(log_w)
    clean = np.delete(log_w.numpy(), 3)
    expected = np.log(np.exp(clean + 1e4).sum()) - 1e4
    assert float(w.log_sum) == pytest.approx(expected, rel=1e-13)
    p = np.exp(clean - expected)
    assert float(w.ess) == pytest.approx(1 / np.square(p).sum(), rel=1e-10)
    assert float(w.log_weights[3]) == -math.inf
    one = normalize(torch.tensor([[0.0, -1e5], [5.0, 5.0]]))
    torch.testing.assert_close(one.ess, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_float32_weights_are_summed_in_float64():
    """A float32 cumulative sum of 10⁵ equal weights ends at 1.001 and picks wrong ancestors."""
    chosen = resample(torch.zeros(100_000), "systematic")
    assert torch.equal(chosen, torch.arange(100_000))


@schemes
def test_runs_are_independent_and_batched(scheme):
    log_w = weights(64, 8, runs=(5,))
    n = 64
    u = resampling.uniforms(log_w, scheme, n, torch.Generator().manual_seed(0))
    together = resampling._ancestors(resampling._counts(resampling._scaled(log_w), scheme, n, u), n)
    for r in range(5):
        w = resampling._scaled(log_w[r])
        alone = resampling._ancestors(resampling._counts(w, scheme, n, u[r].contiguous()), n)
        assert torch.equal(alone, together[r])


def test_only_runs_below_the_threshold_are_resampled():
    log_w = torch.stack([torch.zeros(100), torch.linspace(0, 30, 100)]).double()
    w = normalize(log_w)
    chosen, after, which = resample_below(w, 0.5, "systematic")
    assert which.tolist() == [False, True]
    assert torch.equal(chosen[0], torch.arange(100))
    torch.testing.assert_close(after[1], torch.full((100,), -math.log(100)).double())
    torch.testing.assert_close(after[0], w.log_weights[0])
    assert float(unique_share(chosen)[1]) < 0.2
    _, _, always = resample_below(w, 1.0, "systematic")
    assert always.tolist() == [True, True]


def test_bad_arguments():
    with pytest.raises(ParameterError, match=r"scheme must be one of 'stratified'.*'best'"):
        resample(torch.zeros(3), "best")
    with pytest.raises(ParameterError, match="n must be an integer >= 1, got 0"):
        resample(torch.zeros(3), n=0)
    with pytest.raises(DataError, match=r"at least one particle, got shape \(0,\)"):
        resample(torch.zeros(0))
    with pytest.raises(DataError, match="int64"):
        resample(torch.zeros(3, dtype=torch.int64))

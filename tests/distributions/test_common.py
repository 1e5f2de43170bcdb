"""What every predictive distribution must keep, in each dtype and shape."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin

from uq.distributions import (
    BarDistribution,
    CategoricalMixture,
    Empirical,
    NormalMixture,
    Parametric,
    Predictive,
)
from uq.errors import DataError, NoEpistemicError


def normal(dtype, shape, n_draws=3, tau=False):
    g = torch.Generator().manual_seed(0)
    loc = torch.randn(n_draws, *shape, generator=g, dtype=dtype)
    scale = torch.rand(n_draws, *shape, generator=g, dtype=dtype) + 0.5
    return NormalMixture(loc, scale, 0.5 * scale if tau else None)


def categorical(dtype, shape, n_draws=3):
    g = torch.Generator().manual_seed(0)
    return CategoricalMixture(torch.randn(n_draws, *shape, 4, generator=g, dtype=dtype))


def bars(dtype, shape):
    g = torch.Generator().manual_seed(0)
    borders = torch.tensor([-2.0, -1.0, 0.0, 0.25, 2.0, 3.0], dtype=dtype)
    return BarDistribution(torch.randn(*shape, 5, generator=g, dtype=dtype), borders)


CASES = {
    "bars64": lambda: bars(torch.float64, (5,)),
    "bars32": lambda: bars(torch.float32, (5,)),
    "bars-outputs": lambda: bars(torch.float64, (5, 2)),
    "bars-joint": lambda: bars(torch.float64, (5, 2)).joint(),
    "normal64": lambda: normal(torch.float64, (5,)),
    "normal32": lambda: normal(torch.float32, (5,)),
    "normal-tau": lambda: normal(torch.float64, (5,), tau=True),
    "normal-outputs": lambda: normal(torch.float64, (5, 2)),
    "normal-one-output": lambda: normal(torch.float64, (5, 1)),
    "normal-joint": lambda: normal(torch.float64, (5, 2), tau=True).joint(),
    "normal-one-draw": lambda: normal(torch.float64, (5,), n_draws=1, tau=True),
    "categorical64": lambda: categorical(torch.float64, (5,)),
    "categorical32": lambda: categorical(torch.float32, (5,)),
    "categorical-two-axes": lambda: categorical(torch.float64, (5, 2)),
}


@pytest.fixture(params=CASES, ids=str)
def d(request) -> Predictive:
    return CASES[request.param]()


def values(d, sample_shape=()):
    return d.sample(torch.Size(sample_shape), generator=torch.Generator().manual_seed(1))


def test_is_a_pyro_distribution_with_consistent_shapes(d):
    assert isinstance(d, TorchDistributionMixin)
    shape = d.batch_shape + d.event_shape
    assert values(d).shape == shape
    assert values(d, (7, 2)).shape == (7, 2, *shape)
    assert values(d, (0,)).shape == (0, *shape)
    assert d.log_prob(values(d)).shape == d.batch_shape
    assert d.log_prob(values(d, (7, 2))).shape == (7, 2, *d.batch_shape)
    assert len(d) == 5
    assert d.draws.log_prob(values(d)).shape == (d.n_draws, *d.batch_shape)
    assert d.support.check(values(d)).all()
    assert d.support.event_dim == d.event_dim


def test_log_prob_is_the_log_mean_density_of_the_draws(d):
    y = values(d)
    expected = torch.logsumexp(d.draws.log_prob(y).double(), 0) - np.log(d.n_draws)
    torch.testing.assert_close(d.log_prob(y).double(), expected, rtol=1e-5, atol=1e-5)


def test_leading_axes_of_values_broadcast(d):
    y = values(d, (3, 4))
    torch.testing.assert_close(d.log_prob(y)[2, 1], d.log_prob(y[2, 1]))


@pytest.mark.parametrize(
    "key",
    [slice(1, 4), slice(None, None, 2), [3, 0], np.array([True, False, True, False, True]), 2],
)
def test_slicing_keeps_the_rows(d, key):
    y = values(d)
    expected = d.log_prob(y)[key if not isinstance(key, list) else torch.tensor(key)]
    torch.testing.assert_close(d[key].log_prob(y[key]), expected)
    torch.testing.assert_close(d[key].aleatoric, d.aleatoric[key])


def test_a_mask_of_pandas_which_cannot_be_written_selects_without_a_warning():
    d = NormalMixture(torch.zeros(1, 3), torch.tensor(1.0))
    mask = np.array([True, False, True])
    mask.setflags(write=False)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # otherwise torch warns once in a process
    try:
        assert len(d[mask]) == 2
    finally:
        torch.set_warn_always(before)


def test_slicing_keeps_the_index(d):
    d.index = pd.Index(list("abcde"))
    assert list(d[1:3].index) == ["b", "c"]
    assert list(d[[4, 0]].index) == ["e", "a"]
    assert list(d[np.array([True, False, False, False, True])].index) == ["a", "e"]


@pytest.mark.parametrize("case", ["normal64", "normal-joint", "categorical64"])
def test_a_single_row_has_no_length_and_no_rows(case):
    row = CASES[case]()[0]
    with pytest.raises(TypeError, match="single row"):
        len(row)
    with pytest.raises(DataError, match="single row"):
        row[0]


def test_pickling_keeps_everything(d):
    copy = pickle.loads(pickle.dumps(d))
    y = values(d)
    torch.testing.assert_close(copy.log_prob(y), d.log_prob(y), rtol=0, atol=0)
    assert repr(copy) == repr(d)


def test_expand_repeats_along_new_axes(d):
    wide = d.expand(torch.Size([3, *d.batch_shape]))
    y = values(d)
    assert wide.batch_shape == (3, *d.batch_shape)
    torch.testing.assert_close(wide.log_prob(y), d.log_prob(y).expand(3, *d.batch_shape))
    assert values(wide).shape == (3, *d.batch_shape, *d.event_shape)


def test_can_be_used_in_pyro(d):
    y = values(d)

    def model():
        with pyro.plate_stack("rows", d.batch_shape):
            pyro.sample("y", d)

    trace = poutine.trace(poutine.condition(model, {"y": y})).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), d.log_prob(y).sum())
    assert poutine.trace(model).get_trace().nodes["y"]["value"].shape == y.shape


def test_a_seeded_generator_reproduces_samples_and_spares_the_global_one(d):
    before = torch.random.get_rng_state()
    torch.testing.assert_close(values(d, (4,)), values(d, (4,)), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(values(d, (4,))[0], values(d, (4,))[1])


def test_a_single_draw_has_no_epistemic_uncertainty():
    for d in (normal(torch.float64, (5,), n_draws=1), categorical(torch.float64, (5,), n_draws=1)):
        with pytest.raises(NoEpistemicError, match="single parameter value"):
            _ = d.epistemic
    assert (CASES["normal-one-draw"]().epistemic > 0).all()


REAL = {
    "normal": lambda: normal(torch.float64, (5,)),
    "bars": lambda: bars(torch.float64, (5,)),
    "draws": lambda: Empirical(torch.linspace(-1, 1, 45, dtype=torch.float64).view(9, 5)),
    "student": lambda: Parametric(torch.distributions.StudentT(4.0, torch.zeros(5).double())),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("method", ["log_prob", "cdf", "crps"])
def test_outcomes_may_be_arrays_and_must_fit_the_rows(name, method):
    dist = REAL[name]()
    if isinstance(dist, Empirical) and method == "log_prob":
        pytest.skip("draws have no density")
    y = [0.5, -0.25, 0.0, 1.0, 0.1]
    expected = getattr(dist, method)(torch.tensor(y, dtype=torch.float64))
    for same in (y, np.array(y), pd.Series(y, index=list("abcde"))):
        torch.testing.assert_close(getattr(dist, method)(same), expected, rtol=0, atol=0)
    where = f"{type(dist).__name__}.{method}"
    with pytest.raises(DataError, match=rf"{where}: value has shape \(3,\), expected \(5,\)"):
        getattr(dist, method)(torch.zeros(3))
    with pytest.raises(DataError, match=f"{where}: value must hold numbers, got a list"):
        getattr(dist, method)(["low"] * 5)


@pytest.mark.parametrize("method", ["log_prob", "cdf", "crps"])
def test_outcomes_without_the_axis_of_a_single_output_are_refused(method):
    """Broadcasting would pair each of them with each row."""
    dist, y = normal(torch.float64, (5, 1)), torch.linspace(-1, 1, 5).double()
    with pytest.raises(DataError, match=r"value has shape \(5,\), expected \(5, 1\); add the axis"):
        getattr(dist, method)(y)
    expected = getattr(normal(torch.float64, (5,)), method)(y)
    torch.testing.assert_close(getattr(dist, method)(y[:, None]), expected[:, None])
    torch.testing.assert_close(getattr(dist.output(0), method)(y), expected)
    if method != "crps":  # one value for all rows, and several for each
        assert getattr(dist, method)(y[:1]).shape == (5, 1)
        assert getattr(dist, method)(y[:3, None, None]).shape == (3, 5, 1)


def test_class_positions_must_fit_the_rows():
    with pytest.raises(DataError, match=r"log_prob: value has shape \(3,\), expected \(5,\)"):
        categorical(torch.float64, (5,)).log_prob(torch.zeros(3))

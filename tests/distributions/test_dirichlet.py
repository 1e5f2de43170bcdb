from __future__ import annotations

import math
import pickle

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from scipy.integrate import quad
from scipy.special import digamma
from scipy.stats import beta, dirichlet, entropy

from uq.distributions import DirichletCategorical
from uq.errors import DataError, ParameterError

F64 = torch.float64
seeds = st.integers(0, 2**20)


def concentrations(seed, n=5, n_classes=3):
    """Between no evidence and 10⁴ of it."""
    rng = np.random.default_rng(seed)
    return 1 + 10 ** rng.uniform(-3, 4, (n, n_classes))


def make(seed=0, dtype=F64, **kwargs):
    return DirichletCategorical(torch.as_tensor(concentrations(seed), dtype=dtype), **kwargs)


# -- uncertainty -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "total", "aleatoric", "epistemic", "density"),
    [
        ((2, 1, 1), 1.039721, 0.833333, 0.206387, -0.958426),
        ((1, 1, 1), 1.098612, 0.833333, 0.265279, -0.693147),
        ((10, 2, 3, 1), 1.040840, 0.956374, 0.084466, -4.046263),
        ((1,) * 10, 2.302585, 1.928968, 0.373617, -12.801827),
        ((101, *(1,) * 9), 0.462961, 0.428370, 0.034591, -33.306303),
    ],
)
def test_uncertainty_has_its_known_values(alpha, total, aleatoric, epistemic, density):
    d = DirichletCategorical(torch.tensor([alpha], dtype=F64))
    assert d.entropy().item() == pytest.approx(total, abs=1e-6)
    assert d.aleatoric.item() == pytest.approx(aleatoric, abs=1e-6)
    assert d.epistemic.item() == pytest.approx(epistemic, abs=1e-6)
    assert d.differential_entropy().item() == pytest.approx(density, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (3.5, 1.2), (40.0, 7.0), (0.3, 0.9)])
def test_aleatoric_is_the_expected_entropy_by_quadrature(a, b):
    d = DirichletCategorical(torch.tensor([[a, b]], dtype=F64), prior=0.1)
    expected, _ = quad(lambda p: entropy([p, 1 - p]) * beta.pdf(p, a, b), 0, 1, epsabs=1e-10)
    assert d.aleatoric.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.statistical
def test_the_split_agrees_with_draws_of_the_second_order_distribution():
    d, n = make(3), 40_000
    pi = d.second_order.sample((n,)).numpy()  # (draws, rows, classes)
    each = entropy(pi, axis=-1)
    error = each.std(0) / math.sqrt(n)
    assert (np.abs(each.mean(0) - d.aleatoric.numpy()) <= 5 * error).all()
    kl = entropy(pi, np.broadcast_to(d.probs.numpy(), pi.shape), axis=-1)
    assert (np.abs(kl.mean(0) - d.epistemic.numpy()) <= 5 * kl.std(0) / math.sqrt(n)).all()


@given(seeds)
def test_the_parts_are_bounded_and_sum_to_the_entropy(seed):
    d = make(seed)
    torch.testing.assert_close(d.aleatoric + d.epistemic, d.entropy(), rtol=1e-12, atol=1e-12)
    assert (d.epistemic >= 0).all()
    assert (d.aleatoric >= 0).all()
    assert (d.epistemic <= math.log(3)).all()
    assert ((d.vacuity > 0) & (d.vacuity <= 1)).all()


@given(seeds)
def test_differential_entropy_agrees_with_scipy(seed):
    alpha = concentrations(seed)
    d = DirichletCategorical(torch.as_tensor(alpha))
    expected = [dirichlet(a).entropy() for a in alpha]
    np.testing.assert_allclose(d.differential_entropy(), expected, rtol=1e-9, atol=1e-8)
    assert (d.differential_entropy() <= -math.lgamma(3) + 1e-9).all()


def test_epistemic_uncertainty_vanishes_as_evidence_grows():
    p = torch.tensor([0.6, 0.3, 0.1], dtype=F64)
    d = DirichletCategorical(torch.tensor([[1e3], [1e6], [1e9]], dtype=F64) * p)
    total = d.concentration.sum(-1)
    # I(y; π) → (K − 1) / (2 S); rounding of order 1e-15 is what is left at S = 1e9.
    torch.testing.assert_close(d.epistemic, 1 / total, rtol=5e-3, atol=2e-14)
    torch.testing.assert_close(d.epistemic[1:], 1 / total[1:], rtol=1e-5, atol=2e-14)
    torch.testing.assert_close(d.aleatoric[2], d.entropy()[2], rtol=1e-8, atol=0)


@pytest.mark.parametrize("prior", [0.1, 0.5, 1.0])
def test_no_evidence_is_all_vacuity(prior):
    d = DirichletCategorical(torch.full((2, 4), prior, dtype=F64), prior=prior)
    assert (d.vacuity == 1).all()
    assert (d.evidence == 0).all()
    assert (d.probs == 0.25).all()
    expected = math.log(4) - (digamma(4 * prior + 1) - digamma(prior + 1))
    torch.testing.assert_close(d.epistemic, torch.full((2,), expected, dtype=F64))


def test_a_prior_in_lower_precision_is_no_evidence_either():
    d = DirichletCategorical(torch.full((1, 2), 0.1), prior=0.1)
    assert (d.evidence >= 0).all()
    assert (d.evidence < 1e-8).all()


# -- labels ------------------------------------------------------------------------------------


@given(seeds)
def test_probabilities_are_the_mean_of_the_dirichlet(seed):
    alpha = concentrations(seed)
    d = DirichletCategorical(torch.as_tensor(alpha))
    p = alpha / alpha.sum(1, keepdims=True)
    np.testing.assert_allclose(d.probs, p, rtol=1e-14)
    np.testing.assert_allclose(d.second_order.mean, p, rtol=1e-14)
    for k in range(3):
        np.testing.assert_allclose(d.log_prob(torch.full((5,), k)), np.log(p[:, k]), atol=1e-13)
    assert (d.mode == d.probs.argmax(-1)).all()


def test_leading_axes_of_values_broadcast_and_draws_are_the_average():
    d = make()
    y = d.sample((3, 4))
    assert y.shape == (3, 4, 5)
    torch.testing.assert_close(d.log_prob(y)[2, 1], d.log_prob(y[2, 1]))
    assert d.draws.log_prob(y[0, 0]).shape == (1, 5)
    torch.testing.assert_close(d.draws.log_prob(y[0, 0])[0], d.log_prob(y[0, 0]))


@pytest.mark.statistical
def test_samples_have_the_class_frequencies():
    d, n = make(5), 20_000
    y = d.sample((n,), generator=torch.Generator().manual_seed(0))
    share = torch.stack([(y == k).double().mean(0) for k in range(3)], -1)
    assert ((share - d.probs).abs() <= 5 * (d.probs * (1 - d.probs) / n).sqrt() + 1e-12).all()


def test_permuting_classes_permutes_the_answers():
    alpha, order = torch.as_tensor(concentrations(1)), [2, 0, 1]
    d, turned = DirichletCategorical(alpha), DirichletCategorical(alpha[:, order])
    torch.testing.assert_close(turned.probs, d.probs[:, order])
    torch.testing.assert_close(turned.epistemic, d.epistemic)
    torch.testing.assert_close(turned.differential_entropy(), d.differential_entropy())


# -- a distribution like the others --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_in_float64(dtype):
    d = make(dtype=dtype)
    for value in (d.probs, d.log_prob(d.mode), d.aleatoric, d.epistemic, d.vacuity, d.evidence):
        assert value.dtype == F64
    torch.testing.assert_close(d.probs, make().probs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(d.epistemic, make().epistemic, rtol=1e-5, atol=1e-7)
    assert d.double().concentration.dtype == F64
    assert d.cpu().concentration.dtype == dtype


@pytest.mark.parametrize(
    "key", [slice(1, 4), [3, 0], np.array([True, False, True, False, True]), 2]
)
def test_rows_keep_labels_prior_and_index(key):
    d = make(prior=0.5, classes=["a", "b", "c"])
    d.index = pd.Index(list("vwxyz"))
    rows = d[key]
    where = torch.tensor(key) if isinstance(key, list) else key
    torch.testing.assert_close(rows.concentration, d.concentration[where])
    assert rows.prior == 0.5
    assert rows.classes.tolist() == ["a", "b", "c"]
    if not isinstance(key, int):
        assert list(rows.index) == list(d.index[key])
        assert list(rows.to_frame().columns) == ["a", "b", "c"]


def test_pickling_and_expanding_keep_everything():
    d = make(prior=0.5, classes=[10, 20, 30])
    copy = pickle.loads(pickle.dumps(d))
    assert torch.equal(copy.concentration, d.concentration)
    assert (copy.prior, copy.classes.tolist()) == (0.5, [10, 20, 30])
    wide = d.expand((4, 5))
    assert wide.batch_shape == (4, 5)
    assert wide.prior == 0.5
    torch.testing.assert_close(wide.epistemic[3], d.epistemic)
    assert wide.sample((2,)).shape == (2, 4, 5)
    assert repr(d) == "DirichletCategorical(batch_shape=(5,), event_shape=(), n_draws=1)"


def test_can_be_used_in_pyro():
    d = make()
    y = d.sample()

    def model():
        with pyro.plate("rows", 5):
            pyro.sample("y", d)

    trace = poutine.trace(poutine.condition(model, {"y": y})).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), d.log_prob(y).sum())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DirichletCategorical(torch.tensor(1.0)), DataError, r"needs shape .* got \(\)"),
        (lambda: DirichletCategorical(torch.ones(4, 1)), DataError, r"got \(4, 1\)"),
        (lambda: DirichletCategorical(torch.ones(4, 2).int()), DataError, "floating-point"),
        (
            lambda: DirichletCategorical(torch.tensor([[2.0, 1.0], [0.5, 3.0]])),
            DataError,
            r">= prior = 1 .* got 0.5 at \(1, 0\); give a lower prior",
        ),
        (lambda: DirichletCategorical(torch.full((1, 2), math.nan)), DataError, "got nan"),
        (lambda: DirichletCategorical(torch.full((1, 2), math.inf)), DataError, "got inf"),
        (lambda: DirichletCategorical(torch.ones(1, 2), classes=[1]), DataError, "each of the 2"),
        (lambda: DirichletCategorical(torch.ones(1, 2), prior=0.0), ParameterError, "got 0.0"),
        (lambda: DirichletCategorical(torch.ones(1, 2), prior="a"), ParameterError, "got 'a'"),
        (lambda: make().log_prob(torch.tensor([3])), DataError, "positions 0 to 2"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()

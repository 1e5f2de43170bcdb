from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from uq.distributions import CategoricalMixture
from uq.errors import DataError

F64 = torch.float64
seeds = st.integers(0, 2**20)


def mixture(seed, n=4, n_classes=3):
    rng = np.random.default_rng(seed)
    sharp = 10 ** rng.uniform(-1, 2.5)  # up to classes of probability 0 in float64
    shape = (int(rng.integers(2, 6)), n, n_classes)
    return CategoricalMixture(torch.as_tensor(sharp * rng.standard_normal(shape)))


@given(seeds)
def test_probabilities_and_scores_agree_with_numpy(seed):
    d = mixture(seed)
    p = np.exp(d.logits.numpy())
    np.testing.assert_allclose(d.probs, p.mean(0), rtol=1e-12)
    np.testing.assert_allclose(d.probs.sum(-1), 1, rtol=1e-14)
    for k in range(3):
        log_p = d.log_prob(torch.full((4,), k))
        np.testing.assert_allclose(log_p.exp(), p.mean(0)[:, k], rtol=1e-11)
    assert (d.confidence == d.probs.amax(-1)).all()
    assert (d.mode == d.probs.argmax(-1)).all()


@given(seeds)
def test_split_is_mutual_information_and_sums_to_the_entropy(seed):
    d = mixture(seed)
    p = np.exp(d.logits.numpy())
    np.testing.assert_allclose(d.aleatoric, entropy(p, axis=-1).mean(0), rtol=1e-9, atol=1e-12)
    kl = entropy(p, p.mean(0, keepdims=True), axis=-1).mean(0)
    np.testing.assert_allclose(d.epistemic, kl, rtol=1e-9, atol=1e-12)
    total = d.aleatoric + d.epistemic
    torch.testing.assert_close(total, d.entropy(), rtol=1e-12, atol=1e-12)
    assert (d.epistemic >= -1e-15).all()
    assert (d.epistemic <= math.log(d.n_draws) + 1e-12).all()


def test_a_class_that_a_draw_rules_out_is_allowed():
    d = CategoricalMixture(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=F64).log())
    assert d.aleatoric.item() == 0.0
    assert d.epistemic.item() == pytest.approx(math.log(2), abs=1e-15)
    never = CategoricalMixture(torch.tensor([[[1.0, 0.0]]], dtype=F64).log())
    assert never.log_prob(torch.tensor([1])).item() == -math.inf
    assert never.entropy().item() == 0.0


def test_log_probabilities_do_not_underflow():
    d = CategoricalMixture(torch.tensor([[[0.0, -900.0]]], dtype=F64))
    assert d.log_prob(torch.tensor([1])).item() == pytest.approx(-900.0)


def test_confident_float32_draws_keep_the_split_non_negative():
    g = torch.Generator().manual_seed(0)
    d = CategoricalMixture(30 + 1e-3 * torch.randn(50, 200, 10, generator=g))
    assert (d.epistemic > -1e-7).all()
    torch.testing.assert_close(d.aleatoric + d.epistemic, d.entropy(), rtol=1e-6, atol=1e-6)


@pytest.mark.statistical
def test_samples_have_the_class_frequencies():
    d, n = mixture(5), 20_000
    y = d.sample((n,), generator=torch.Generator().manual_seed(0))
    share = torch.stack([(y == k).double().mean(0) for k in range(3)], -1)
    assert ((share - d.probs).abs() <= 5 * (d.probs * (1 - d.probs) / n).sqrt() + 1e-12).all()


def test_the_support_can_be_enumerated():
    d = mixture(0)
    values = d.enumerate_support()
    assert values.shape == (3, 4)
    torch.testing.assert_close(d.log_prob(values).exp().sum(0), torch.ones(4, dtype=F64))
    assert d.enumerate_support(expand=False).shape == (3, 1)


def test_labels_travel_with_rows_and_into_frames():
    d = CategoricalMixture(torch.zeros(2, 3, 2), classes=["no", "yes"])
    d.index = pd.Index([7, 8, 9])
    frame = d[1:].to_frame()
    assert list(frame.columns) == ["no", "yes"]
    assert list(frame.index) == [8, 9]
    assert (frame == 0.5).all(axis=None)
    assert list(d.expand((4, 3)).classes) == ["no", "yes"]


def test_labels_have_no_mean():
    with pytest.raises(NotImplementedError, match=r"see \.probs"):
        _ = mixture(0).mean
    with pytest.raises(NotImplementedError, match=r"see \.entropy"):
        _ = mixture(0).variance


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CategoricalMixture(torch.zeros(3)), r"logits need shape .* got \(3,\)"),
        (lambda: CategoricalMixture(torch.full((1, 2, 3), math.nan)), "hold NaN"),
        (lambda: CategoricalMixture(torch.full((1, 2, 3), -math.inf)), "row of -inf only"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(DataError, match=message):
        call()

"""Ranking of rows by confidence against the enumeration of all orders of tied rows."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uq.calibration import (
    accuracy_at_coverage,
    augrc,
    aurc,
    coverage_at_accuracy,
    excess_aurc,
    misclassification_auroc,
    mmce,
    risk_coverage_curve,
)
from uq.calibration.ranking import Ranking, harmonic

rows = st.lists(st.tuples(st.sampled_from([0.5, 0.6, 0.75]), st.booleans()), min_size=1, max_size=6)


def predicted(confidence, right):
    """Labels and three-class probabilities with the given confidences and hits."""
    c = np.asarray(confidence, float)
    return np.where(right, 0, 2), np.stack([c, (1 - c) / 2, (1 - c) / 2], 1)


def losses_by_enumeration(confidence, risk):
    """Loss of the k most confident rows, k = 0 … n: every order without inversions, averaged."""
    confidence, risk = np.asarray(confidence), np.asarray(risk, float)
    orders = [
        order
        for order in map(list, permutations(range(len(risk))))
        if (np.diff(confidence[order]) <= 0).all()
    ]
    return np.mean([np.r_[0.0, risk[order].cumsum()] for order in orders], axis=0), orders


# -- enumeration -------------------------------------------------------------------------------


@given(rows=rows)
def test_areas_are_means_over_all_orders_of_tied_rows(rows):
    confidence, right = map(np.array, zip(*rows, strict=True))
    n, k = len(rows), np.arange(1, len(rows) + 1)
    loss, _ = losses_by_enumeration(confidence, ~right)
    y, p = predicted(confidence, right)
    area = (loss[1:] / k).mean()
    assert aurc(y, p) == pytest.approx(area, abs=1e-12)
    assert augrc(y, p) == pytest.approx((loss[1:] / n).mean(), abs=1e-12)
    best = min((np.cumsum(order) / k).mean() for order in set(permutations((~right).astype(float))))
    assert excess_aurc(y, p) == pytest.approx(area - best, abs=1e-12)


@given(rows=rows)
def test_auroc_of_errors_counts_pairs(rows):
    confidence, right = map(np.array, zip(*rows, strict=True))
    pairs = [(a > b) + 0.5 * (a == b) for a in confidence[right] for b in confidence[~right]] or [
        math.nan
    ]
    value = misclassification_auroc(*predicted(confidence, right))
    assert value == pytest.approx(np.mean(pairs), abs=1e-12, nan_ok=True)


@given(rows=rows, coverage=st.floats(0.01, 1.0))
def test_accuracy_at_coverage_is_a_mean_over_all_orders(rows, coverage):
    confidence, right = map(np.array, zip(*rows, strict=True))
    loss, _ = losses_by_enumeration(confidence, ~right)
    answered = coverage * len(rows)
    expected = 1 - np.interp(answered, np.arange(len(loss)), loss) / answered
    y, p = predicted(confidence, right)
    assert accuracy_at_coverage(y, p, coverage=coverage) == pytest.approx(expected, abs=1e-10)


@given(rows=rows, accuracy=st.sampled_from([0.2, 0.5, 0.6, 2 / 3, 0.75, 0.9, 1.0]))
def test_coverage_at_accuracy_is_the_last_place_where_the_mean_loss_is_low_enough(rows, accuracy):
    confidence, right = map(np.array, zip(*rows, strict=True))
    loss, _ = losses_by_enumeration(confidence, ~right)
    excess = loss - (1 - accuracy) * np.arange(len(loss))  # linear from k to k + 1
    expected = 0.0
    for k in range(len(rows)):
        if excess[k + 1] <= 1e-12:
            expected = k + 1.0
        elif k and excess[k] <= 1e-12:
            expected = k - min(excess[k], 0.0) / (excess[k + 1] - excess[k])
    y, p = predicted(confidence, right)
    found = coverage_at_accuracy(y, p, accuracy=accuracy)
    assert found == pytest.approx(expected / len(rows), abs=1e-9)


@given(
    risk=st.lists(st.floats(0, 9), min_size=1, max_size=6),
    levels=st.lists(st.sampled_from([-2.0, -1.0, -math.inf]), min_size=6, max_size=6),
)
def test_real_losses_are_ranked_alike_also_by_infinite_variances(risk, levels):
    levels = np.array(levels[: len(risk)])
    n, k = len(risk), np.arange(1, len(risk) + 1)
    order = np.argsort(-levels, kind="stable")
    loss, _ = losses_by_enumeration(-np.unique(-levels, return_inverse=True)[1], risk)
    ranked = Ranking.of(levels[order], np.array(risk)[order]).under(np.ones((1, n)))
    assert ranked.aurc[0] == pytest.approx((loss[1:] / k).mean(), rel=1e-12, abs=1e-12)
    assert ranked.augrc()[0] == pytest.approx(loss[1:].mean() / n, rel=1e-12, abs=1e-12)


def test_the_curve_has_a_point_for_each_distinct_confidence():
    y, p = predicted([0.9, 0.8, 0.8, 0.6], np.array([True, True, False, False]))
    curve = risk_coverage_curve(y, p, sample_weight=[1, 1, 2, 0])
    assert curve.coverage == pytest.approx([0.25, 1.0])
    assert curve.risk == pytest.approx([0.0, 0.5])


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_constant_confidence_has_the_closed_forms(n):
    y, p = predicted(np.full(n, 0.6), np.arange(n) % 3 > 0)
    error = float((np.arange(n) % 3 == 0).mean())
    assert aurc(y, p) == pytest.approx(error, abs=1e-12)
    assert augrc(y, p) == pytest.approx(error * (n + 1) / (2 * n), abs=1e-12)
    assert accuracy_at_coverage(y, p, coverage=0.3) == pytest.approx(1 - error, abs=1e-12)


def test_harmonic_numbers_by_both_ways():
    n = np.tile(np.arange(40.0), 40)  # more than 1000: by a table
    exact = np.array([sum(1 / k for k in range(1, int(m) + 1)) for m in n[:40]])
    np.testing.assert_allclose(harmonic(n)[:40], exact, rtol=0, atol=1e-13)
    np.testing.assert_allclose(harmonic(n[:40]), exact, rtol=0, atol=1e-13)


# -- weights -----------------------------------------------------------------------------------

RANKING_METRICS = [
    aurc,
    augrc,
    excess_aurc,
    misclassification_auroc,
    lambda y, p, **w: accuracy_at_coverage(y, p, coverage=0.37, **w),
    lambda y, p, **w: coverage_at_accuracy(y, p, accuracy=0.7, **w),
    lambda y, p, **w: mmce(y, p, **w),
]
RANKING_NAMES = ["aurc", "augrc", "excess", "auroc", "accuracy_at", "coverage_at", "mmce"]


@pytest.mark.parametrize("metric", RANKING_METRICS, ids=RANKING_NAMES)
@given(seed=st.integers(0, 2**20))
def test_integer_weights_are_repetitions(metric, seed):
    rng = np.random.default_rng(seed)
    y, p = predicted(rng.choice([0.5, 0.6, 0.7, 0.9], 20), rng.random(20) < 0.6)
    weight = rng.integers(0, 4, size=20)
    again = np.repeat(np.arange(20), weight)
    expected = metric(y[again], p[again])
    assert metric(y, p, sample_weight=weight) == pytest.approx(expected, abs=1e-9, nan_ok=True)


# -- kernel calibration error ------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@given(seed=st.integers(0, 2**20))
def test_mmce_is_the_root_of_a_double_sum(weighted, seed):
    rng = np.random.default_rng(seed)
    c = np.r_[rng.uniform(0.34, 1, 25), rng.choice([0.5, 0.8], 10), 1.0, 1.0]
    right = rng.random(len(c)) < c**2
    weight = rng.uniform(0, 2, len(c)) if weighted else np.ones(len(c))
    e = weight * (right - c)
    square = e @ np.exp(-np.abs(c[:, None] - c) / 0.4) @ e
    y, p = predicted(c, right)
    value = mmce(y, p, sample_weight=weight)
    assert value == pytest.approx(math.sqrt(square) / weight.sum(), rel=1e-10)


def test_mmce_of_two_rows_of_one_confidence():
    y, p = predicted([0.7, 0.7], np.array([True, False]))
    assert mmce(y, p) == pytest.approx(abs(1 - 2 * 0.7) / 2, abs=1e-14)


# -- merged groups -----------------------------------------------------------------------------


@pytest.mark.parametrize("n_groups", [8, 64, 512])
def test_merging_moves_a_statistic_by_no_more_than_a_group(n_groups):
    rng = np.random.default_rng(0)
    n = 3000
    confidence = rng.uniform(0.3, 1, n)
    right = rng.random(n) < confidence
    exact = Ranking.of(confidence, 1.0 - right)
    merged = exact.coarse(n_groups)
    assert len(merged.levels) == n_groups
    assert (np.diff(merged.levels) < 0).all()
    ones = np.ones((1, n))
    a, b = exact.under(ones), merged.under(ones)
    size = n / n_groups + 1  # rows a group, at most
    assert np.bincount(merged.group).max() <= size
    # Orders differ only within a group: the loss of the k first rows by at most its size.
    assert abs(a.augrc() - b.augrc())[0] <= size / n
    assert abs(a.aurc - b.aurc)[0] <= size / n * (1 + math.log(n / size))
    assert abs(a.risk_at(0.5) - b.risk_at(0.5))[0] <= size / (0.5 * n)
    wrong = np.bincount(merged.group, 1.0 - right)
    pairs = (wrong * (np.bincount(merged.group) - wrong)).sum() / (right.sum() * (~right).sum())
    assert abs(a.auroc() - b.auroc())[0] <= pairs / 2 + 1e-12
    # Confidences move by a group's width, the kernel by 1/0.4 of the distance between two of them.
    width = max(np.ptp(confidence[merged.group == g]) for g in range(n_groups))
    assert abs(a.mmce() ** 2 - b.mmce() ** 2)[0] <= 2 * width / 0.4


def test_few_levels_are_not_merged():
    rng = np.random.default_rng(0)
    ranking = Ranking.of(rng.choice([0.2, 0.5, 0.9], 1000), rng.random(1000))
    assert ranking.coarse(3) is ranking
    assert len(ranking.coarse(2).levels) == 2

"""SDM against exact answers: a worked example, a full sort, the closed forms, enumeration."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import beta
from torch.nn import functional as F

from uq.errors import DataError, ParameterError
from uq.inference.sdm import _BLOCK, match, nearest_rows
from uq.inference.sdm_calibration import (
    class_cdfs,
    distance_cdfs,
    distance_quantile,
    dkw_error,
    effective_sizes,
    find_region,
    rescaled_similarity,
)
from uq.nn import ExemplarAdaptor, SDMActivation, SDMLoss
from uq.nn.sdm import Q_SOFTMAX, sdm_logits

# -- the worked example: two classes, scalar exemplars h, logits (4 − h, h − 4), alpha = 0.8 -------

SUPPORT = torch.tensor([0, 1, 2, 3, 4.5, 6, 7, 8], dtype=torch.float64)[:, None]
LABELS = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1])
CALIBRATION = torch.tensor(
    [
        *(0.0625, 0.90625, 1.15625, -0.25, 2.125, 3.1875, 0.34375, 7.96875, 7.109375, 8.203125),
        *(6.78125, 5.6875, 8.4375, 0.28125, 4.796875),
    ],
    dtype=torch.float64,
)[:, None]
CAL_LABELS = torch.tensor([0] * 7 + [1] * 8)
QUERIES = torch.tensor([0.046875, 7.03125, 7.25, 1.625, 20, 3.4], dtype=torch.float64)[:, None]
ALPHA = 0.8


def logits_of(h):
    return torch.cat([4 - h, h - 4], 1)


def judge(h, cdfs=None):
    """q, d0, d, P, q' and prediction by uq's functions."""
    z = logits_of(h)
    predictions = z.argmax(1)
    found = match(h, predictions, SUPPORT, LABELS, logits_of(SUPPORT).argmax(1))
    if cdfs is None:
        cdfs = distance_cdfs(found.d0, found.q, CAL_LABELS, 2)
    d = distance_quantile(found.d0, cdfs)
    p = SDMActivation()(z, found.q.double(), d)
    own = p.gather(1, predictions[:, None])[:, 0]
    return found, d, p, rescaled_similarity(found.q, own), predictions, cdfs


def test_worked_example_calibration_rows():
    found, d, p, q_prime, predictions, _ = judge(CALIBRATION)
    assert found.q.tolist() == [3, 3, 3, 3, 1, 0, 3, 3, 3, 3, 3, 1, 3, 3, 0]
    d0 = torch.tensor([2, 3, 5, 8, 4, 6, 11, 1, 3.5, 6.5, 7, 10, 14, 9, 9.5], dtype=torch.float64)
    torch.testing.assert_close(32 * found.d0, d0, rtol=0, atol=1e-12)
    expected = [6 / 7, 5 / 6, 1 / 2, 1 / 3, 2 / 3, 1 / 3, 1 / 7, 1, 2 / 3, 1 / 3, 1 / 3, 1 / 6, 0]
    expected += [1 / 6, 1 / 6]
    np.testing.assert_allclose(d, expected, atol=1e-12)
    own = [0.999981, 0.999751, 0.989817, 0.989647, 0.939717, 0.592776, 0.843075, 0.999997]
    own += [0.998736, 0.989119, 0.951854, 0.649757, 0.5, 0.880275, 0.5459]
    np.testing.assert_allclose(p.gather(1, predictions[:, None])[:, 0], own, atol=1e-6)
    np.testing.assert_allclose(
        q_prime, [3, 3, 3, 3, 1, 0, 3, 3, 3, 3, 3, 1, 5**0.5, 3, 0], atol=1e-12
    )
    assert predictions.tolist() == [0] * 7 + [1] * 6 + [0, 1]
    loss = SDMLoss("none")(logits_of(CALIBRATION), CAL_LABELS, found.q.double(), d)
    balanced = (loss[:7].mean() + loss[7:].mean()) / 2
    assert float(balanced) == pytest.approx(0.257278, abs=1e-6)


def test_worked_example_region():
    _, _, p, q_prime, predictions, _ = judge(CALIBRATION)
    p_true = p.gather(1, CAL_LABELS[:, None])[:, 0]
    region = find_region(q_prime, p_true, CAL_LABELS, 2, ALPHA)
    assert region.q_min == 3
    np.testing.assert_allclose(region.psi, [0.989647, 0.951854], atol=1e-6)
    own = p.gather(1, predictions[:, None])[:, 0]
    admitted = region.admits(q_prime, own, predictions).nonzero()[:, 0]
    assert admitted.tolist() == [0, 1, 2, 3, 7, 8, 9, 10]
    for alpha in (0.9, 0.95):
        nowhere = find_region(q_prime, p_true, CAL_LABELS, 2, alpha)
        assert nowhere.q_min == math.inf
        assert not nowhere.admits(q_prime, own, predictions).any()


def test_worked_example_queries_and_band():
    _, _, p_cal, q_prime_cal, _, cdfs = judge(CALIBRATION)
    p_true = p_cal.gather(1, CAL_LABELS[:, None])[:, 0]
    region = find_region(q_prime_cal, p_true, CAL_LABELS, 2, ALPHA)
    found, d, p, q_prime, predictions, _ = judge(QUERIES, cdfs)
    assert predictions.tolist() == [0, 1, 1, 0, 1, 0]
    assert found.nearest.tolist() == [0, 6, 6, 2, 7, 3]
    assert found.q.tolist() == [3, 3, 3, 2, 3, 0]
    np.testing.assert_allclose(32 * found.d0, [1.5, 1, 8, 12, 384, 12.8], rtol=1e-12)
    np.testing.assert_allclose(d, [6 / 7, 1, 1 / 3, 0, 0, 0], atol=1e-12)
    own = p.gather(1, predictions[:, None])[:, 0]
    np.testing.assert_allclose(own, [0.99998, 0.99994, 0.97032, 0.5, 0.5, 0.5], atol=1e-5)
    np.testing.assert_allclose(q_prime, [3, 3, 3, 2, 5**0.5, 0], atol=1e-12)
    assert region.admits(q_prime, own, predictions).tolist() == [True] * 3 + [False] * 3

    sizes = effective_sizes(q_prime, class_cdfs(q_prime_cal, CAL_LABELS, 2))
    assert sizes.tolist() == [[7, 8], [7, 8], [7, 8], [2, 2], [2, 3], [1, 1]]
    error = dkw_error(sizes, ALPHA)
    expected = [0.40555, 0.40555, 0.40555, 0.75871, 0.75871, 1.07298]
    np.testing.assert_allclose(error, expected, atol=1e-5)
    low = (d - error).clamp_min(0)
    np.testing.assert_allclose(low, [0.45159, 0.59445, 0, 0, 0, 0], atol=1e-5)
    p_low = sdm_logits(logits_of(QUERIES), found.q.double(), low).softmax(1)
    p_low = p_low.gather(1, predictions[:, None])[:, 0]
    np.testing.assert_allclose(p_low, [0.99682, 0.99698, 0.5, 0.5, 0.5, 0.5], atol=1e-5)
    q_low = rescaled_similarity(found.q, p_low)
    np.testing.assert_allclose(q_low, [3, 3, 5**0.5, 2, 5**0.5, 0], atol=1e-5)
    assert region.admits(q_low, p_low, predictions).tolist() == [True, True] + [False] * 4


def test_worked_example_training_side():
    """Each support row without itself; neighbours at equal distance go by position."""
    z = logits_of(SUPPORT)
    own = z.argmax(1)
    found = match(SUPPORT, own, SUPPORT, LABELS, own, exclude=torch.arange(8))
    assert found.q.tolist() == [2, 2, 1, 1, 0, 1, 2, 2]
    assert found.d0.tolist() == [1, 1, 1, 1, 1.5, 1, 1, 1]
    d = distance_quantile(found.d0, distance_cdfs(found.d0, found.q, LABELS, 2))
    assert d.tolist() == [1, 1, 1, 1, 0, 1, 1, 1]
    loss = SDMLoss("none")(z, LABELS, found.q.double(), d)
    expected = [0.00001, 0.00018, 0.01117, 2.09590, 1.0, 0.01117, 0.00018, 0.00001]
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    assert float(loss.mean()) == pytest.approx(0.389827, abs=1e-6)


# -- activation and loss -----------------------------------------------------------------------


def random_case(n=50, c=4):
    z = 3 * torch.randn(n, c, dtype=torch.float64)
    q = torch.randint(0, 30, (n,)).double()
    return z, torch.randint(0, c, (n,)), q, torch.rand(n, dtype=torch.float64)


def test_softmax_uniform_and_argmax():
    z, _, q, d = random_case()
    activation = SDMActivation()
    one = torch.ones_like(q)
    torch.testing.assert_close(activation(z, Q_SOFTMAX * one, one), z.softmax(1))
    assert (activation(z, q, 0 * one) == 0.25).all()
    assert (activation(z, q, d.clamp_min(1e-3)).argmax(1) == z.argmax(1)).all()
    log_p = SDMActivation(log=True)(z, q, d)
    torch.testing.assert_close(log_p.exp(), activation(z, q, d))
    powers = (2 + q[:, None]) ** (d[:, None] * z)
    torch.testing.assert_close(activation(z, q, d), powers / powers.sum(1, keepdim=True))


def test_gradient_is_d_times_error_and_the_loss_at_d_0():
    z, y, q, d = random_case()
    z.requires_grad_()
    SDMLoss("none")(z, y, q, d).sum().backward()
    p = SDMActivation()(z, q, d).detach()
    expected = d[:, None] * (p - F.one_hot(y, 4))
    torch.testing.assert_close(z.grad, expected, rtol=0, atol=1e-10)
    at_zero = SDMLoss("none")(z, y, q, 0 * d)
    torch.testing.assert_close(at_zero, math.log(4) / torch.log(2 + q))
    at_softmax = SDMLoss()(z, y, torch.full_like(q, Q_SOFTMAX), torch.ones_like(d))
    torch.testing.assert_close(at_softmax, F.cross_entropy(z, y))


def test_activation_says_what_does_not_fit():
    z, y, q, d = random_case()
    with pytest.raises(DataError, match="one number a row"):
        SDMActivation()(z, q[:3], d[:3])
    with pytest.raises(ParameterError, match="reduction"):
        SDMLoss("sum")
    assert SDMLoss()(z, y, q, d).ndim == 0


def test_adaptor_normalises_by_two_numbers():
    adaptor = ExemplarAdaptor(3, 5, 2)
    features = torch.randn(100, 3) * torch.tensor([1.0, 10.0, 100.0]) + 7
    adaptor.normalise(features)
    torch.testing.assert_close(adaptor.mean, features.mean())
    torch.testing.assert_close(adaptor.scale, features.std())
    h, z = adaptor(features)
    by_hand = F.linear(
        (features - features.mean()) / features.std(),
        adaptor.exemplar.weight,
        adaptor.exemplar.bias,
    )
    torch.testing.assert_close(h, by_hand)
    torch.testing.assert_close(z, adaptor.classify(h))
    adaptor.normalise(torch.full((4, 3), 2.0))
    assert adaptor(torch.full((4, 3), 2.0))[0].isfinite().all()


# -- the search against a full sort ------------------------------------------------------------


def sorted_definition(h, predictions, support, labels, own, exclude=None, cap=2048):
    """Definition by a stable sort of float64 distances, row by row."""
    q, d0, nearest = [], [], []
    for i in range(len(h)):
        distance = ((h[i].double() - support.double()) ** 2).sum(1)
        order = torch.sort(distance, stable=True).indices.tolist()
        if exclude is not None:
            order.remove(int(exclude[i]))
        good = [bool(labels[j] == own[j] == predictions[i]) for j in order]
        q.append(min(cap, good.index(False) if False in good else len(good)))
        d0.append(float(distance[order[0]].sqrt()) if order else math.inf)
        nearest.append(order[0] if order else -1)
    return q, d0, nearest


def support_case(n, m, c, dtype, integers):
    draw = (lambda k: torch.randint(0, 3, (k, m))) if integers else (lambda k: torch.randn(k, m))
    support, labels = draw(n).to(dtype), torch.randint(0, c, (n,))
    own = torch.where(torch.rand(n) < 0.9, labels, torch.randint(0, c, (n,)))
    return support, labels, own, draw(15).to(dtype), torch.randint(0, c, (15,))


def assert_same(found, expected):
    assert found.q.tolist() == expected[0]
    np.testing.assert_allclose(found.d0, expected[1], rtol=1e-12)
    assert found.nearest.tolist() == expected[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("integers", [True, False])
def test_search_equals_a_sort(dtype, integers):
    """Integer exemplars in few dimensions are full of ties and copies."""
    for n in (1, 2, 5, 40, 200):
        for m in (1, 2, 4):
            support, labels, own, h, predictions = support_case(n, m, 3, dtype, integers)
            found = match(h, predictions, support, labels, own)
            assert_same(found, sorted_definition(h, predictions, support, labels, own))
            itself = torch.randint(0, n, (15,))
            found = match(h, predictions, support, labels, own, exclude=itself)
            assert_same(found, sorted_definition(h, predictions, support, labels, own, itself))


def test_search_over_many_blocks(monkeypatch):
    """Blocks and the split of many tied pairs are borders only."""
    monkeypatch.setitem(_BLOCK, "cpu", (4, 16))
    monkeypatch.setattr("uq.inference.sdm._MAX_PAIRS", 30)
    for integers in (True, False):
        support, labels, own, h, predictions = support_case(300, 2, 2, torch.float32, integers)
        own[labels == 0] = 0  # long prefixes for one class
        found = match(h, predictions, support, labels, own)
        assert_same(found, sorted_definition(h, predictions, support, labels, own))


def test_search_tells_apart_what_rounding_hides():
    """Far from the origin, float32 products carry an error far above the differences."""
    offset = torch.tensor([1.0] * 7 + [3000.0])
    steps = torch.linspace(0, 0.01, 101)[:, None]
    support = torch.cat([steps.expand(101, 7), 0 * steps], 1) + offset
    support = torch.cat([support, torch.zeros(3, 8)])
    labels, own = torch.zeros(104, dtype=torch.long), torch.zeros(104, dtype=torch.long)
    own[50] = 1
    h, predictions = support[[0, 49, 51, 100]] + 1e-4, torch.zeros(4, dtype=torch.long)
    found = match(h, predictions, support, labels, own)
    assert_same(found, sorted_definition(h, predictions, support, labels, own))


def test_search_where_squares_leave_float32():
    support, labels, own, _, predictions = support_case(60, 3, 2, torch.float32, integers=False)
    h = torch.full((15, 3), 1e25)
    found = match(h, predictions, support, labels, own)
    assert_same(found, sorted_definition(h, predictions, support, labels, own))
    found = match(support[:15].double() * 1e25, predictions, support, labels, own)
    expected = sorted_definition(support[:15].double() * 1e25, predictions, support, labels, own)
    assert_same(found, expected)


def test_all_equal_rows_all_good_rows_and_the_cap():
    support, h = torch.ones(60, 3), torch.ones(2, 3)
    labels = torch.zeros(60, dtype=torch.long)
    predictions = torch.tensor([0, 1])
    found = match(h, predictions, support, labels, labels)
    assert found.q.tolist() == [60, 0]
    assert found.nearest.tolist() == [0, 0]
    assert match(h, predictions, support, labels, labels, cap=10).q.tolist() == [10, 0]
    own = labels.clone()
    own[17] = 1  # position decides among equals
    assert match(h, predictions, support, labels, own).q.tolist() == [17, 0]
    outside = labels.clone()
    outside[5] = -1  # a label that is no class cuts q, even if it is predicted "rightly"
    assert match(h, predictions, support, outside, outside).q.tolist() == [5, 0]
    alone = match(h[:1], predictions[:1], h[:1], labels[:1], labels[:1], exclude=labels[:1])
    assert (alone.q.item(), alone.d0.item(), alone.nearest.item()) == (0, math.inf, -1)


def test_self_exclusion_equals_a_support_without_the_row():
    support, labels, own, _, _ = support_case(40, 2, 2, torch.float64, integers=True)
    found = match(support, own, support, labels, own, exclude=torch.arange(40))
    for i in range(40):
        rest = torch.arange(40) != i
        one = match(support[i : i + 1], own[i : i + 1], support[rest], labels[rest], own[rest])
        assert (found.q[i], found.d0[i]) == (one.q[0], one.d0[0])


def test_search_says_what_does_not_fit():
    h, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(DataError, match=r"\(n, M\)"):
        match(h, y, torch.zeros(3, 4), y, y)
    with pytest.raises(DataError, match="one class a query"):
        match(h, y[:2], h, y, y)
    with pytest.raises(DataError, match="at least one row"):
        match(h, y, h[:0], y[:0], y[:0])
    with pytest.raises(DataError, match="queries contain NaN"):
        match(h * math.nan, y, h, y, y)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_nearest_rows(backend):
    if backend == "faiss":
        pytest.importorskip("faiss")
    h, s = torch.randn(30, 5), torch.randn(80, 5)
    index, distance = nearest_rows(h, s, 4, backend=backend)
    exact = torch.cdist(h.double(), s.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = exact.sort(1)
    assert (index == expected.indices[:, :4]).all()
    torch.testing.assert_close(distance, expected.values[:, :4])
    tied = nearest_rows(torch.zeros(1, 2), torch.ones(9, 2), 3, backend=backend)[0]
    assert tied.tolist() == [[0, 1, 2]]
    # More ties than candidates, and queries so far away that float32 sees nothing but ties.
    tied = nearest_rows(torch.zeros(2, 2), torch.ones(200, 2), 3, backend=backend)[0]
    assert tied.tolist() == [[0, 1, 2]] * 2
    far, _ = nearest_rows(h * 1e8, s, 4, backend=backend)
    expected = ((1e8 * h)[:, None].double() - s.double()).square().sum(-1).sort(stable=True)
    assert (far == expected.indices[:, :4]).all()
    for bad in (0, 81, 1.5):
        with pytest.raises(ParameterError, match="k must be"):
            nearest_rows(h, s, bad)
    with pytest.raises(ParameterError, match="backend"):
        nearest_rows(h, s, 2, backend="annoy")


# -- quantiles, q' and the region ----------------------------------------------------------------


def test_distance_quantile_by_enumeration():
    d0, q = torch.rand(40, dtype=torch.float64), torch.randint(0, 3, (40,))
    d0[:5] = d0[5]  # ties
    labels = torch.randint(0, 3, (40,))
    cdfs = distance_cdfs(d0, q, labels, 3)
    t = torch.cat([d0, torch.tensor([0.0, 2.0], dtype=torch.float64)])
    d = distance_quantile(t, cdfs)
    for value, got in zip(t, d, strict=True):
        lists = [d0[(labels == c) & (q > 0)] for c in range(3)]
        expected = min(1 - float((v < value).sum()) / len(v) for v in lists)
        assert float(got) == pytest.approx(expected, abs=1e-12)
    assert d[-2:].tolist() == [1, 0]
    assert (distance_quantile(t, distance_cdfs(d0, q, labels, 4)) == 0).all()  # an empty class


def test_ranks_alone_matter():
    found, d, *_ = judge(CALIBRATION)
    for f in (torch.square, torch.exp):
        cdfs = distance_cdfs(f(found.d0), found.q, CAL_LABELS, 2)
        torch.testing.assert_close(distance_quantile(f(found.d0), cdfs), d)


def test_rescaled_similarity_bounds():
    q = torch.randint(0, 50, (500,))
    c = 3
    p = 1 / c + (1 - 1 / c) * torch.rand(500, dtype=torch.float64)
    q_prime = rescaled_similarity(q, p)
    assert (q_prime <= q).all()
    assert ((q_prime == 0) == (q == 0)).all()
    assert (q_prime[q >= 1] >= 1).all()
    at_zero = rescaled_similarity(q, torch.full_like(p, 1 / c))
    expected = torch.minimum(q.double(), (2 + q.double()) ** (1 / c))
    torch.testing.assert_close(at_zero, expected)


def region_case(n=120, c=3, weights=False):
    q_prime = torch.randint(0, 12, (n,)).double() + torch.randint(0, 2, (n,)) * 0.5
    labels = torch.randint(0, c, (n,))
    # Better where q' is larger.
    p_true = torch.rand(n, dtype=torch.float64) ** (1 / (1 + q_prime**2))
    weight = torch.randint(1, 4, (n,)).double() if weights else None
    return q_prime, p_true, labels, weight


def by_enumeration(q_prime, p_true, labels, n_classes, alpha):
    rest = round(1 - alpha, 10)
    for t in sorted(set(q_prime[q_prime >= 1].tolist())):
        psi = []
        for c in range(n_classes):
            v = sorted(p_true[(q_prime >= t) & (labels == c)].tolist())
            psi.append(v[min(math.floor(rest * len(v) + 1e-9), len(v) - 1)] if v else 0.0)
        if min(psi) >= alpha:
            return t, psi
    return math.inf, [math.inf] * n_classes


@pytest.mark.parametrize("alpha", [0.55, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_region_by_enumeration(alpha):
    finite = 0
    for _ in range(20):
        q_prime, p_true, labels, _ = region_case()
        region = find_region(q_prime, p_true, labels, 3, alpha)
        t, psi = by_enumeration(q_prime, p_true, labels, 3, alpha)
        assert region.q_min == t
        assert region.psi.tolist() == psi
        finite += t < math.inf
    assert finite > 0 or alpha == 1.0


def test_weights_repeat_rows():
    for _ in range(20):
        q_prime, p_true, labels, weight = region_case(weights=True)
        times = weight.long()
        repeated = [t.repeat_interleave(times) for t in (q_prime, p_true, labels)]
        a = find_region(q_prime, p_true, labels, 3, 0.8, weight)
        b = find_region(*repeated, 3, 0.8)
        assert a.q_min == b.q_min
        assert a.psi.tolist() == b.psi.tolist()
        at = torch.tensor([0.0, 3.0, 20.0])
        q = torch.ones_like(labels)
        d = distance_quantile(at, distance_cdfs(q_prime, q, labels, 3, weight))
        again = distance_cdfs(repeated[0], torch.ones_like(repeated[2]), repeated[2], 3)
        torch.testing.assert_close(d, distance_quantile(at, again))
        sizes = effective_sizes(at, class_cdfs(q_prime, labels, 3, weight))
        torch.testing.assert_close(
            sizes, effective_sizes(at, class_cdfs(repeated[0], repeated[2], 3))
        )


def test_quantile_index_is_not_a_victim_of_floating_point():
    """(1 − 0.8) · 5 is below 1 in floating point: one row in five may lie below psi."""
    p_true = torch.tensor([0.1, 0.85, 0.9, 0.95, 0.99] * 2)
    labels = torch.tensor([0] * 5 + [1] * 5)
    region = find_region(torch.full((10,), 2.0), p_true, labels, 2, 0.8)
    assert region.q_min == 2
    np.testing.assert_allclose(region.psi, [0.85, 0.85])


def test_accuracy_given_each_class_on_the_calibration_rows():
    """By construction, if the region exists: at most ⌊(1 − α) n_c⌋ rows of a class are errors."""
    found = 0
    for alpha in (0.6, 0.8, 0.9):
        for _ in range(40):
            n, c = 200, 3
            labels = torch.randint(0, c, (n,))
            q = torch.randint(0, 20, (n,))
            z = 2 * torch.randn(n, c, dtype=torch.float64)
            z[torch.arange(n), labels] += 0.4 * q
            probs, predictions = z.softmax(1), z.argmax(1)
            own = probs.amax(1)
            q_prime = rescaled_similarity(q, own)
            p_true = probs.gather(1, labels[:, None])[:, 0]
            region = find_region(q_prime, p_true, labels, c, alpha)
            admitted = region.admits(q_prime, own, predictions)
            if region.q_min == math.inf:
                assert not admitted.any()
                continue
            found += 1
            for k in range(c):
                right = (predictions == labels)[admitted & (labels == k)]
                assert right.double().mean() >= alpha
    assert found >= 60


def test_region_grows_as_alpha_falls():
    for _ in range(30):
        q_prime, p_true, labels, _ = region_case()
        t = [find_region(q_prime, p_true, labels, 3, a).q_min for a in np.linspace(0.51, 1, 25)]
        assert all(x <= y for x, y in pairwise(t))


@pytest.mark.statistical
def test_coverage_of_a_fixed_region_is_beta_distributed():
    """At a fixed t: the coverage of {P_y >= ψ_y} given a class is Beta(n + 1 − l, l).

    ψ is the (⌊(1 − α) n⌋ + 1)-th smallest of n uniforms, so l = ⌊(1 − α) n⌋ + 1. 400 draws; the
    Kolmogorov distance exceeds 1.95/√400 with probability 0.001.
    """
    n, alpha = 60, 0.8
    rng = np.random.default_rng(0)
    uncovered = []
    for _ in range(400):
        # One value of q', so that nothing is searched. P is a rank transform of uniforms above α
        # but for the share that may be spared, so that the region always exists.
        u = np.sort(rng.uniform(size=n))
        labels = torch.tensor([0] * n + [1] * n)
        p = np.concatenate([0.9 + u / 10, np.ones(n)])
        region = find_region(torch.full((2 * n,), 5.0), torch.tensor(p), labels, 2, alpha)
        uncovered.append(10 * (float(region.psi[0]) - 0.9))
    rank = math.floor(round(1 - alpha, 10) * n) + 1
    law = beta(rank, n + 1 - rank)
    values = np.sort(law.cdf(uncovered))
    gap = np.abs(values - (np.arange(400) + 0.5) / 400).max()
    assert gap < 1.95 / 20


def test_band_of_no_rows_and_of_alpha_one():
    sizes = torch.tensor([[0.0, 5.0], [2.0, 3.0]])
    error = dkw_error(sizes, 0.9)
    assert error[0] == 1
    assert float(error[1]) == pytest.approx(math.sqrt(math.log(20) / 4))
    assert dkw_error(sizes, 1.0).tolist() == [1, 1]


def test_alpha_out_of_range_and_shapes():
    q_prime, p_true, labels, _ = region_case()
    for bad in (0.5, 1.01, "high", True, math.nan):
        with pytest.raises(ParameterError, match="alpha"):
            find_region(q_prime, p_true, labels, 3, bad)
    with pytest.raises(DataError, match="one number a row"):
        find_region(q_prime[1:], p_true, labels, 3, 0.9)
    empty = find_region(torch.zeros(120), p_true, labels, 3, 0.9)  # q' = 0 everywhere
    assert empty.q_min == math.inf


# -- parity with the author's package --------------------------------------------------------------


def test_parity_with_the_authors_package():
    theirs = pytest.importorskip("reexpress_sdm.math")
    calibration = pytest.importorskip("reexpress_sdm.calibration")
    z, y, q, d = random_case(200, 3)
    ours = SDMActivation()(z, q, d)
    np.testing.assert_allclose(
        ours, theirs.sdm_probabilities(z.numpy(), q.numpy(), d.numpy()), atol=1e-5
    )
    own, predictions = ours.amax(1), z.argmax(1)
    q_prime = rescaled_similarity(q, own)
    np.testing.assert_allclose(
        q_prime, theirs.rescaled_similarities(q.numpy(), own.numpy()), rtol=1e-5
    )
    d0 = torch.rand(200, dtype=torch.float64)
    cdfs = distance_cdfs(d0, q, y, 3)
    lists = [cdf.values.tolist() for cdf in cdfs]
    np.testing.assert_allclose(
        distance_quantile(d0, cdfs), theirs.distance_quantiles(d0.numpy(), lists), atol=1e-6
    )
    ordered = [cdf.values.tolist() for cdf in class_cdfs(q_prime, y, 3)]
    at = torch.linspace(0, 30, 50, dtype=torch.float64)
    sizes = effective_sizes(at, class_cdfs(q_prime, y, 3))
    np.testing.assert_array_equal(sizes, theirs.effective_sample_size_matrix(at.numpy(), ordered))
    # Their ladder starts at 1 − δ with all rows, as a single region does. float32 inside.
    compared = 0
    for seed in range(20):
        torch.manual_seed(seed)
        y = torch.randint(0, 3, (300,))
        q = torch.randint(0, 40, (300,)).double()
        z = torch.randn(300, 3, dtype=torch.float64)
        z[torch.arange(300), y] += 0.1 * q
        probs, predictions = z.softmax(1).float().double(), z.argmax(1)
        q_prime = rescaled_similarity(q, probs.amax(1)).float().double()
        regions = calibration.calibrate_nested_regions(
            probs.numpy(),
            q_prime.numpy(),
            y.numpy(),
            number_of_classes=3,
            alpha_resolution=0.1,
            predictions=predictions.numpy(),
        )
        p_true = probs.gather(1, y[:, None])[:, 0]
        region = find_region(q_prime, p_true, y, 3, 0.9)
        top = [r for r in regions if abs(r.alpha - 0.9) < 1e-9]
        assert bool(top) == (region.q_min < math.inf)
        if not top:
            continue
        compared += 1
        assert region.q_min == pytest.approx(top[0].minimum_rescaled_similarity, rel=1e-6)
        np.testing.assert_allclose(region.psi, top[0].output_thresholds, atol=1e-6)
    assert compared > 0

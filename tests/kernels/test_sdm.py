"""Reductions over distances: against all distances in float64, sorted; ties, copies, own row."""

import pytest
import torch

from uq.errors import ParameterError
from uq.inference.sdm import _FusedSearch, match, nearest_rows
from uq.kernels.sdm import FAR, Support, count, nearest_keys, pack, scan, unpack, window

TILES = {"BQ": 16, "BS": 32, "BK": 16}


@pytest.fixture(params=["reference", "triton"])
def backend(request, monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", request.param)
    monkeypatch.setattr("uq.kernels.sdm._TILES", TILES)
    monkeypatch.setattr("uq.kernels.sdm._NEAREST_TILES", TILES)
    monkeypatch.setattr("uq.kernels.sdm._BLOCK", 50)
    # So few programs that a share has several tiles, and so many that there are several shares.
    monkeypatch.setattr("uq.kernels.sdm.PROGRAMS", 4)
    return request.param


def lattice(n_support=110, n=20, m=5, seed=0):
    """Small integers, mean 0: distances are exact in float32, and many of them are equal."""
    g = torch.Generator().manual_seed(seed)
    half = torch.randint(-1, 2, (n_support // 2, m), generator=g).float()
    support = torch.cat([half, -half])[torch.randperm(n_support, generator=g)]
    support[7] = support[3]
    queries = torch.cat([support[: n // 2], torch.randint(-2, 3, (n - n // 2, m), generator=g)])
    group = torch.randint(-1, 2, (n_support,), generator=g)
    predictions = torch.randint(0, 2, (n,), generator=g)
    exclude = torch.randint(-1, n_support, (n,), generator=g)
    exclude[: n // 2] = torch.arange(n // 2)  # themselves
    return queries, predictions, support, group, exclude


def by_sorting(queries, predictions, support, group, exclude):
    """Positions by (distance, position), squared distances, length of the good beginning."""
    d = torch.cdist(queries.double(), support.double()).square().round(decimals=6)
    d[torch.arange(len(d))[exclude >= 0], exclude[exclude >= 0]] = torch.inf
    squared, order = d.sort(dim=1, stable=True)
    good = (group[order] == predictions[:, None]) & squared.isfinite()
    return squared, order, good.long().cumprod(1).sum(1)


@pytest.mark.parametrize("shape", [(110, 20, 5), (64, 3, 17), (34, 16, 1)])
def test_radius_and_count_equal_sorting(backend, shape):
    queries, predictions, support, group, exclude = lattice(*shape)
    support[-1] -= support.sum(0)  # mean 0 exactly
    squared, order, q = by_sorting(queries, predictions, support, group, exclude)
    rows = Support.of(support)
    nearest, radius = scan(queries, predictions, rows, group, exclude)
    assert torch.equal(unpack(nearest)[1], order[:, 0])
    assert torch.equal(unpack(nearest)[0].double(), squared[:, 0])
    visible = squared.isfinite().sum(1)
    none_bad = q == visible
    assert torch.equal(radius == FAR, none_bad)
    first_bad = order.gather(1, q.clamp_max(order.shape[1] - 1)[:, None])[:, 0]
    assert torch.equal(unpack(radius)[1][~none_bad], first_bad[~none_bad])
    assert torch.equal(count(queries, rows, radius, exclude), q)


def test_nearest_equal_sorting(backend):
    queries, predictions, support, group, exclude = lattice(70, 6, 4)
    support[-1] -= support.sum(0)
    _, order, _ = by_sorting(queries, predictions, support, group, exclude)
    for k in (1, 5):
        found = unpack(nearest_keys(queries, Support.of(support), k, exclude))[1]
        assert torch.equal(found, order[:, :k])


def test_window(backend):
    queries, predictions, support, group, exclude = lattice()
    support[-1] -= support.sum(0)
    squared, order, _ = by_sorting(queries, predictions, support, group, exclude)
    inner, outer, reach = (torch.full((len(queries),), v) for v in (4.0, 6.0, 2.0))
    rows = Support.of(support)
    seen = window(queries, rows, inner, outer, reach, exclude)
    assert torch.equal(seen.closer, (squared < 4).sum(1))
    near = (squared >= 4) & (squared <= 6)
    expected = set()
    for i, column in (near | (squared <= 2)).nonzero().tolist():
        expected.add((i, int(order[i, column]), bool(near[i, column])))
    listed = list(zip(seen.query.tolist(), seen.row.tolist(), seen.near.tolist(), strict=True))
    assert set(listed) == expected
    assert len(listed) == len(expected)
    assert not seen.full.any()
    if backend == "triton":  # counts are right where places run out
        short = window(queries, rows, inner, outer, reach, exclude, slots=2)
        assert short.full.any()
        assert torch.equal(short.closer, seen.closer)


def test_keys_are_ordered_like_distance_and_position():
    squared = torch.tensor([0.0, -0.0, 1e-30, 1.0, 1.0, 3e38])
    keys = pack(squared, torch.tensor([5, 4, 0, 2, 1, 0]))
    assert keys.argsort().tolist() == [1, 0, 2, 4, 3, 5]
    assert torch.equal(unpack(keys)[0], squared.abs())
    assert unpack(torch.tensor([FAR]))[0].isinf().all()


def data(seed, n_support=90, n=24, m=6):
    """Features far from the origin, near-copies among them."""
    g = torch.Generator().manual_seed(seed)
    support = 50 + torch.randn(n_support, m, generator=g)
    support[10:20] = support[:10]
    support[20:30] = support[:10] + 1e-5
    queries = torch.cat([support[: n // 2], 50 + torch.randn(n - n // 2, m, generator=g)])
    labels, own = (torch.randint(0, 3, (n_support,), generator=g) for _ in range(2))
    own = torch.where(torch.rand(n_support, generator=g) < 0.7, labels, own)
    return queries, torch.randint(0, 3, (n,), generator=g), support, labels, own


@pytest.mark.parametrize("exclude", [False, True])
def test_match_is_the_same_through_kernels(monkeypatch, exclude):
    """To the bit: what float32 leaves open is settled in float64 either way."""
    monkeypatch.setattr("uq.kernels.sdm._TILES", TILES)
    monkeypatch.setattr("uq.kernels.sdm._NEAREST_TILES", TILES)
    given = data(0)
    own = torch.arange(len(given[0])) if exclude else None
    expected = match(*given, exclude=own)
    monkeypatch.setenv("UQ_KERNELS", "triton")
    found = match(*given, exclude=own)
    for name in ("q", "d0", "nearest"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.q > 0).any()


def test_match_where_all_rows_are_equal(monkeypatch):
    """More ties than a query has room for, and one support row left or none."""
    monkeypatch.setattr("uq.kernels.sdm._TILES", TILES)
    monkeypatch.setattr("uq.kernels.sdm._NEAREST_TILES", TILES)
    support = torch.ones(200, 3)
    labels = torch.zeros(200, dtype=torch.long)
    labels[150] = 1
    given = (torch.ones(2, 3), torch.tensor([0, 1]), support, labels, torch.zeros_like(labels))
    alone = (*given[:2], support[:1], labels[:1], labels[:1])
    for case, own in ((given, None), (given, torch.tensor([0, 1])), (alone, torch.zeros(2).long())):
        monkeypatch.setenv("UQ_KERNELS", "reference")
        expected = match(*case, exclude=own)
        monkeypatch.setenv("UQ_KERNELS", "triton")
        found = match(*case, exclude=own)
        for name in ("q", "d0", "nearest"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_match_takes_the_kernels(monkeypatch):
    monkeypatch.setenv("UQ_KERNELS", "triton")
    calls = []
    monkeypatch.setattr(_FusedSearch, "__call__", lambda *_: calls.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        match(*data(1))
    assert calls


def test_nearest_rows_are_the_same_through_kernels(monkeypatch):
    monkeypatch.setattr("uq.kernels.sdm._TILES", TILES)
    monkeypatch.setattr("uq.kernels.sdm._NEAREST_TILES", TILES)
    queries, _, support, *_ = data(2, 40, 8)
    expected = nearest_rows(queries, support, 5)
    monkeypatch.setenv("UQ_KERNELS", "triton")
    found = nearest_rows(queries, support, 5)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_bad_arguments():
    support = Support.of(torch.ones(3, 2))
    with pytest.raises(ParameterError, match="k must be from 1 to 3"):
        nearest_keys(torch.ones(1, 2), support, 4)
    with pytest.raises(ParameterError, match=r"queries must be \(n, 2\)"):
        nearest_keys(torch.ones(1, 3), support, 1)
    with pytest.raises(ParameterError, match="Support: needs rows"):
        Support.of(torch.ones(3))

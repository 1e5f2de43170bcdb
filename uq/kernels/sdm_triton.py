"""Triton kernels of :mod:`uq.kernels.sdm`; imported only where Triton runs.

A program takes a tile of queries through a share of the support. Distances never leave its
registers: what does is a minimum, a count or the few positions that rounding cannot tell apart.
"""

# Triton compiles annotations, too, and knows none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

_FAR = tl.constexpr((1 << 63) - 1)


@triton.jit
def squared_distances(
    q, s, q_norm, s_norm, i, j, n_queries, n_rows,
    n_features, PRECISION: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """‖q‖² + ‖s‖² − 2qs of a tile, at least 0."""
    inner = tl.zeros((BQ, BS), tl.float32)
    for start in range(0, n_features, BK):
        k = start + tl.arange(0, BK)
        at_q = i.to(tl.int64)[:, None] * n_features + k[None, :]
        at_s = j.to(tl.int64)[:, None] * n_features + k[None, :]
        in_q = (i[:, None] < n_queries) & (k[None, :] < n_features)
        in_s = (j[:, None] < n_rows) & (k[None, :] < n_features)
        a = tl.load(q + at_q, mask=in_q, other=0.0)
        b = tl.load(s + at_s, mask=in_s, other=0.0)
        inner = tl.dot(a, tl.trans(b), inner, input_precision=PRECISION)
    own = tl.load(q_norm + i, mask=i < n_queries, other=0.0)
    far = tl.load(s_norm + j, mask=j < n_rows, other=0.0)
    # The zero that is added makes −0 a 0: as an integer it would come before everything.
    return tl.maximum(own[:, None] + far[None, :] - 2 * inner, 0.0) + 0.0


@triton.jit
def packed(squared, j, visible):
    """Distance and position in one integer: its order is theirs."""
    bits = squared.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(visible, (bits << 32) | j.to(tl.int64)[None, :], _FAR)


@triton.jit(do_not_specialize=["n_queries", "n_rows", "tiles_each"])
def scan_kernel(
    q, s, q_norm, s_norm, predicted, group, hidden,
    nearest, radius, n_queries, n_rows, n_features, tiles_each,
    PRECISION: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Smallest key over all rows, and over rows that are not of the predicted group."""
    i = tl.program_id(0) * BQ + tl.arange(0, BQ)
    share = tl.program_id(1)
    own = tl.load(predicted + i, mask=i < n_queries, other=0)
    gone = tl.load(hidden + i, mask=i < n_queries, other=-1)
    best = tl.full((BQ,), _FAR, tl.int64)
    bad = tl.full((BQ,), _FAR, tl.int64)
    stop = tl.minimum((share + 1) * tiles_each * BS, n_rows)
    for start in range(share * tiles_each * BS, stop, BS):
        j = start + tl.arange(0, BS)
        d = squared_distances(q, s, q_norm, s_norm, i, j, n_queries, n_rows, n_features,
                              PRECISION, BQ, BS, BK)  # fmt: skip
        visible = (j[None, :] < n_rows) & (j[None, :] != gone[:, None])
        keys = packed(d, j, visible)
        best = tl.minimum(best, tl.min(keys, 1))
        of = tl.load(group + j, mask=j < n_rows, other=-1)
        bad = tl.minimum(bad, tl.min(tl.where(of[None, :] != own[:, None], keys, _FAR), 1))
    at = share.to(tl.int64) * n_queries + i
    tl.store(nearest + at, best, mask=i < n_queries)
    tl.store(radius + at, bad, mask=i < n_queries)


@triton.jit(do_not_specialize=["n_queries", "n_rows", "tiles_each"])
def count_kernel(
    q, s, q_norm, s_norm, hidden, limit, counts,
    n_queries, n_rows, n_features, tiles_each,
    PRECISION: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows whose key is below the query's limit."""
    i = tl.program_id(0) * BQ + tl.arange(0, BQ)
    share = tl.program_id(1)
    gone = tl.load(hidden + i, mask=i < n_queries, other=-1)
    below = tl.load(limit + i, mask=i < n_queries, other=0)
    total = tl.zeros((BQ,), tl.int32)
    stop = tl.minimum((share + 1) * tiles_each * BS, n_rows)
    for start in range(share * tiles_each * BS, stop, BS):
        j = start + tl.arange(0, BS)
        d = squared_distances(q, s, q_norm, s_norm, i, j, n_queries, n_rows, n_features,
                              PRECISION, BQ, BS, BK)  # fmt: skip
        visible = (j[None, :] < n_rows) & (j[None, :] != gone[:, None])
        total += tl.sum((packed(d, j, visible) < below[:, None]).to(tl.int32), 1)
    tl.store(counts + share.to(tl.int64) * n_queries + i, total, mask=i < n_queries)


@triton.jit(do_not_specialize=["n_queries", "n_rows", "tiles_each"])
def window_kernel(
    q, s, q_norm, s_norm, hidden, inner, outer, reach,
    counts, hits, slots,
    n_queries, n_rows, n_features, tiles_each,
    PRECISION: tl.constexpr, SLOTS: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows closer than ``inner``, and positions of those up to ``outer`` or within ``reach``.

    A position p goes out as 2p + 1 where it lies between ``inner`` and ``outer``, else as 2p.
    """
    i = tl.program_id(0) * BQ + tl.arange(0, BQ)
    share = tl.program_id(1)
    here = i < n_queries
    gone = tl.load(hidden + i, mask=here, other=-1)
    low = tl.load(inner + i, mask=here, other=-1.0)
    high = tl.load(outer + i, mask=here, other=-1.0)
    first = tl.load(reach + i, mask=here, other=-1.0)
    total = tl.zeros((BQ,), tl.int32)
    found = tl.zeros((BQ,), tl.int32)
    base = (share.to(tl.int64) * n_queries + i) * SLOTS
    stop = tl.minimum((share + 1) * tiles_each * BS, n_rows)
    for start in range(share * tiles_each * BS, stop, BS):
        j = start + tl.arange(0, BS)
        d = squared_distances(q, s, q_norm, s_norm, i, j, n_queries, n_rows, n_features,
                              PRECISION, BQ, BS, BK)  # fmt: skip
        visible = (j[None, :] < n_rows) & (j[None, :] != gone[:, None])
        total += tl.sum((visible & (d < low[:, None])).to(tl.int32), 1)
        near = visible & (d >= low[:, None]) & (d <= high[:, None])
        hit = (near | (visible & (d <= first[:, None]))).to(tl.int32)
        new = tl.sum(hit, 1)
        if tl.max(new, 0) > 0:
            at = found[:, None] + tl.cumsum(hit, 1) - 1
            value = 2 * j.to(tl.int64)[None, :] + near.to(tl.int64)
            keep = (hit > 0) & (at < SLOTS) & here[:, None]
            tl.store(slots + base[:, None] + at, value, mask=keep)
        found += new
    at = share.to(tl.int64) * n_queries + i
    tl.store(counts + at, total, mask=here)
    tl.store(hits + at, found, mask=here)


@triton.jit(do_not_specialize=["n_queries", "n_rows", "tiles_each"])
def nearest_kernel(
    q, s, q_norm, s_norm, hidden, out,
    n_queries, n_rows, n_features, tiles_each,
    K: tl.constexpr, PRECISION: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The K smallest keys of each query, ascending."""
    i = tl.program_id(0) * BQ + tl.arange(0, BQ)
    share = tl.program_id(1)
    gone = tl.load(hidden + i, mask=i < n_queries, other=-1)
    # Negative keys, so that the largest are wanted.
    best = tl.full((BQ, K), -_FAR, tl.int64)
    stop = tl.minimum((share + 1) * tiles_each * BS, n_rows)
    for start in range(share * tiles_each * BS, stop, BS):
        j = start + tl.arange(0, BS)
        d = squared_distances(q, s, q_norm, s_norm, i, j, n_queries, n_rows, n_features,
                              PRECISION, BQ, BS, BK)  # fmt: skip
        visible = (j[None, :] < n_rows) & (j[None, :] != gone[:, None])
        keys = -packed(d, j, visible)
        worst = tl.min(best, 1)
        if tl.max((keys > worst[:, None]).to(tl.int32)) > 0:
            both = tl.join(best, tl.topk(keys, K))
            best = tl.topk(tl.reshape(both, (BQ, 2 * K)), K)
    k = tl.arange(0, K)
    at = (share.to(tl.int64) * n_queries + i)[:, None] * K + k[None, :]
    tl.store(out + at, -best, mask=(i < n_queries)[:, None] & (k[None, :] < K))

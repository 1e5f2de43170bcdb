"""Nearest rows without the matrix of distances: radii, counts and k nearest, ties in order.

For queries i and support rows j, with D_ij = ‖h_i‖² + ‖h_j‖² − 2 h_i·h_j in float32, a row's key is

    key_ij = bits(D_ij) · 2³² + j,

an int64 whose order is that of (D, j), as the bits of a float ≥ 0 are ordered like the float. Then
the nearest row, the nearest *bad* row (of another group than the query's prediction) and the count
of rows before it are a minimum and a count of integers, and ties go to the lower position
exactly. Rows are centred at the support's mean first: D loses the digits of ‖h‖² to cancellation.

What float32 cannot tell apart, :func:`window` lists for a second look in float64;
:func:`uq.inference.sdm.match` takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uq.errors import ParameterError
from uq.kernels.dispatch import cdiv, use_triton
from uq.kernels.products import PROGRAMS

FAR = (1 << 63) - 1
"""Key of no row at all."""
MAX_K = 64
# Support rows that the reference takes at a time.
_BLOCK = 2048
_MAX_ROWS = 1 << 31
# Products in three passes of TF32 are as exact as float32 to the bound that callers use; in
# interpreted kernels they are float32.
_TILES: dict[str, Any] = {"BQ": 64, "BS": 128, "BK": 32, "num_warps": 8, "num_stages": 2}
# Sorting networks grow with the tile, and with them the code.
_NEAREST_TILES: dict[str, Any] = _TILES | {"BQ": 32, "BS": 64, "num_warps": 4}
_PRECISION = "tf32x3"


@dataclass(frozen=True)
class Support:
    """Support rows, centred, with their squared norms.

    Parameters
    ----------
    centre : Tensor of shape (M,)
        Mean of the rows.
    rows : Tensor of shape (N, M), float32
        Rows minus the mean.
    squares : Tensor of shape (N,), float32
        Their squared norms.
    """

    centre: Tensor
    rows: Tensor
    squares: Tensor

    @classmethod
    def of(cls, support: Tensor) -> Support:
        """From rows (N, M) of any floating-point type."""
        if support.ndim != 2 or not 0 < len(support) < _MAX_ROWS:
            raise ParameterError(
                f"Support: needs rows (N, M) with 0 < N < 2^31, got {tuple(support.shape)}."
            )
        rows = support.float()
        centre = rows.mean(0)
        rows = (rows - centre).contiguous()
        return cls(centre, rows, (rows * rows).sum(1))

    def centred(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Queries minus the mean, and their squared norms."""
        if queries.ndim != 2 or queries.shape[1] != self.rows.shape[1]:
            raise ParameterError(
                f"queries must be (n, {self.rows.shape[1]}) for this support, got "
                f"{tuple(queries.shape)}."
            )
        h = (queries.float() - self.centre).contiguous()
        return h, (h * h).sum(1)


def pack(squared: Tensor, index: Tensor) -> Tensor:
    """Keys of squared distances (float32, ≥ 0) and positions."""
    bits = (squared.clamp_min(0) + 0.0).contiguous().view(torch.int32).long()
    return (bits << 32) | index


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances and positions of keys; infinity and −1 where there is no row."""
    none = keys == FAR
    squared = (keys >> 32).int().view(torch.float32)
    index = keys & 0xFFFFFFFF
    return squared.masked_fill(none, torch.inf), index.masked_fill(none, -1)


def scan(
    queries: Tensor,
    predictions: Tensor,
    support: Support,
    group: Tensor,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """First pass: key of the nearest row, and of the nearest row that is not in a query's group.

    Parameters
    ----------
    queries : Tensor of shape (n, M)
        Query rows.
    predictions : Tensor of shape (n,), int64
        Group of each query, at least 0.
    support : Support
        Support rows.
    group : Tensor of shape (N,), int64
        Group of each support row; −1 is in nobody's.
    exclude : Tensor of shape (n,), int64, optional
        A support row that each query does not see; −1 is none.

    Returns
    -------
    nearest, radius : Tensor of shape (n,), int64
        Keys; see :func:`unpack`.

    Examples
    --------
    >>> import torch
    >>> from uq.kernels.sdm import Support, count, scan, unpack
    >>> support = Support.of(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    >>> query, group = torch.tensor([[0.25]]), torch.tensor([0, 0, 0, 1])
    >>> nearest, radius = scan(query, torch.tensor([0]), support, group)
    >>> unpack(nearest)
    (tensor([0.0625]), tensor([0]))
    >>> count(query, support, radius)
    tensor([3])
    """
    h, squares = support.centred(queries)
    hidden = _hidden(exclude, h)
    if not use_triton(h):
        best, bad = h.new_full((len(h),), FAR, dtype=torch.int64), None
        bad = best.clone()
        for start, keys in _keys(h, squares, support, hidden):
            of = group[start : start + keys.shape[1]]
            best = torch.minimum(best, keys.amin(1))
            keys = keys.masked_fill(of == predictions[:, None], FAR)
            bad = torch.minimum(bad, keys.amin(1))
        return best, bad
    from uq.kernels.sdm_triton import scan_kernel

    grid, sizes, shares = _launch(h, support, _TILES)
    nearest, radius = (h.new_empty(shares, len(h), dtype=torch.int64) for _ in range(2))
    scan_kernel[grid](
        h, support.rows, squares, support.squares, predictions.contiguous(), group.contiguous(),
        hidden, nearest, radius, *sizes, PRECISION=_PRECISION, **_TILES,
    )  # fmt: skip
    return nearest.amin(0), radius.amin(0)


def count(
    queries: Tensor, support: Support, limit: Tensor, exclude: Tensor | None = None
) -> Tensor:
    """Second pass: how many rows have a key below each query's limit.

    Parameters
    ----------
    queries, support, exclude
        As for :func:`scan`.
    limit : Tensor of shape (n,), int64
        Keys: with the radius of :func:`scan`, the count is of consecutive nearest rows of the
        query's group.

    Returns
    -------
    Tensor of shape (n,), int64
    """
    h, squares = support.centred(queries)
    hidden = _hidden(exclude, h)
    if not use_triton(h):
        total = torch.zeros_like(limit)
        for _, keys in _keys(h, squares, support, hidden):
            total += (keys < limit[:, None]).sum(1)
        return total
    from uq.kernels.sdm_triton import count_kernel

    grid, sizes, shares = _launch(h, support, _TILES)
    counts = h.new_empty(shares, len(h), dtype=torch.int32)
    count_kernel[grid](
        h, support.rows, squares, support.squares, hidden, limit.contiguous(), counts, *sizes,
        PRECISION=_PRECISION, **_TILES,
    )  # fmt: skip
    return counts.sum(0)


@dataclass(frozen=True)
class Window:
    """What :func:`window` found.

    Attributes
    ----------
    closer : Tensor of shape (n,), int64
        Rows closer than the inner bound.
    query, row : Tensor of shape (pairs,), int64
        Pairs in the window.
    near : Tensor of shape (pairs,), bool
        Whether a pair lies between the inner and the outer bound.
    full : Tensor of shape (n,), bool
        Queries that have more pairs than slots: theirs are incomplete.
    """

    closer: Tensor
    query: Tensor
    row: Tensor
    near: Tensor
    full: Tensor


def window(
    queries: Tensor,
    support: Support,
    inner: Tensor,
    outer: Tensor,
    reach: Tensor,
    exclude: Tensor | None = None,
    slots: int = 64,
) -> Window:
    """Count rows closer than ``inner``; list those up to ``outer``, and those within ``reach``.

    Parameters
    ----------
    queries, support, exclude
        As for :func:`scan`.
    inner, outer, reach : Tensor of shape (n,), float32
        Bounds on squared distances.
    slots : int, default=64
        Pairs that a query has room for in each share of the support.

    Returns
    -------
    Window
    """
    h, squares = support.centred(queries)
    hidden = _hidden(exclude, h)
    if not use_triton(h):
        return _window(h, squares, support, hidden, inner, outer, reach)
    from uq.kernels.sdm_triton import window_kernel

    grid, sizes, shares = _launch(h, support, _TILES)
    counts, hits = (h.new_empty(shares, len(h), dtype=torch.int32) for _ in range(2))
    listed = h.new_empty(shares, len(h), slots, dtype=torch.int64)
    window_kernel[grid](
        h, support.rows, squares, support.squares, hidden,
        inner.contiguous(), outer.contiguous(), reach.contiguous(), counts, hits, listed, *sizes,
        PRECISION=_PRECISION, SLOTS=slots, **_TILES,
    )  # fmt: skip
    held = torch.arange(slots, device=h.device) < hits[:, :, None]
    _, query, _ = held.nonzero(as_tuple=True)
    coded = listed[held]
    return Window(counts.sum(0), query, coded >> 1, (coded & 1) > 0, (hits > slots).any(0))


def _window(
    h: Tensor,
    squares: Tensor,
    support: Support,
    hidden: Tensor,
    inner: Tensor,
    outer: Tensor,
    reach: Tensor,
) -> Window:
    closer = torch.zeros(len(h), dtype=torch.int64, device=h.device)
    parts = []
    for start, keys in _keys(h, squares, support, hidden):
        squared, _ = unpack(keys)
        closer += (squared < inner[:, None]).sum(1)
        near = (squared >= inner[:, None]) & (squared <= outer[:, None]) & squared.isfinite()
        query, column = (near | (squared <= reach[:, None])).nonzero(as_tuple=True)
        parts.append((query, start + column, near[query, column]))
    query, row, near = (torch.cat(ts) for ts in zip(*parts, strict=True))
    return Window(closer, query, row, near, torch.zeros_like(closer, dtype=torch.bool))


def nearest_keys(
    queries: Tensor, support: Support, k: int, exclude: Tensor | None = None
) -> Tensor:
    """Keys of the k nearest rows of each query, ascending, from one pass over the support.

    Parameters
    ----------
    queries, support, exclude
        As for :func:`scan`.
    k : int
        From 1 to 64, at most the rows of the support.

    Returns
    -------
    Tensor of shape (n, k), int64
        See :func:`unpack`.
    """
    if not 1 <= k <= min(MAX_K, len(support.rows)):
        raise ParameterError(
            f"nearest_keys: k must be from 1 to {min(MAX_K, len(support.rows))}, got {k!r}."
        )
    h, squares = support.centred(queries)
    hidden = _hidden(exclude, h)
    if not use_triton(h):
        best = h.new_empty(len(h), 0, dtype=torch.int64)
        for _, keys in _keys(h, squares, support, hidden):
            both = torch.cat([best, keys], 1)
            best = both.topk(min(k, both.shape[1]), largest=False).values
        return best
    from uq.kernels.sdm_triton import nearest_kernel

    held = max(2, 1 << (k - 1).bit_length())
    grid, sizes, shares = _launch(h, support, _NEAREST_TILES)
    out = h.new_empty(shares, len(h), held, dtype=torch.int64)
    nearest_kernel[grid](
        h, support.rows, squares, support.squares, hidden, out, *sizes,
        K=held, PRECISION=_PRECISION, **_NEAREST_TILES,
    )  # fmt: skip
    every = out.permute(1, 0, 2).reshape(len(h), -1)
    return every.topk(k, largest=False).values


def _hidden(exclude: Tensor | None, h: Tensor) -> Tensor:
    if exclude is None:
        return torch.full((len(h),), -1, dtype=torch.int64, device=h.device)
    return exclude.contiguous()


def _keys(h: Tensor, squares: Tensor, support: Support, hidden: Tensor) -> Any:
    """Keys of blocks of the support, and where the block starts."""
    for start in range(0, len(support.rows), _BLOCK):
        rows = support.rows[start : start + _BLOCK]
        index = torch.arange(start, start + len(rows), device=h.device)
        far = support.squares[start : start + _BLOCK]
        squared = squares[:, None] + far - 2 * (h @ rows.T)
        yield start, pack(squared, index).masked_fill(index == hidden[:, None], FAR)


def _launch(
    h: Tensor, support: Support, how: dict[str, Any]
) -> tuple[tuple[int, int], tuple[int, ...], int]:
    """Grid, sizes and shares of the support: few queries are spread over several programs each."""
    tiles = cdiv(len(support.rows), how["BS"])
    across = cdiv(len(h), how["BQ"])
    each = cdiv(tiles, min(tiles, cdiv(PROGRAMS, across)))
    shares = cdiv(tiles, each)
    return (across, shares), (len(h), len(support.rows), h.shape[1], each), shares

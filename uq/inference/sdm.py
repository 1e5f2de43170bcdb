"""Similarity and distance for SDM activations: exact nearest-neighbour work without a sort.

For a query with exemplar h and predicted class ŷ, support rows are ordered by L2 distance to h,
ties by position. Row j is *good* for ŷ if its label and its own prediction are both ŷ, else *bad*.
Then

    q  = length of the longest prefix of good rows,     d0 = distance to the first row.

No order is needed for that: with r the first bad row in this order, q is the number of rows before
it (all of them good). So there are two reductions, a minimum for each block of rows and a count.
They run on products of matrices (‖a‖² − 2ab + ‖b‖²) whose rounding error is bounded; rows that the
bound cannot tell apart are compared again by float64 differences. The result is that of a full
sort, ties included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from uq.errors import DataError, ParameterError
from uq.kernels import use_triton
from uq.kernels.sdm import MAX_K, Support, nearest_keys, scan, unpack, window

MAX_Q = 2048
"""Largest q that is told apart: the authors' cap."""
# Queries and support rows of one product: the block of 2 MB stays in the cache of one core.
_BLOCK = {"cpu": (256, 2048), "cuda": (4096, 8192)}
_MAX_PAIRS = 1 << 20
_PAIR_ELEMENTS = 1 << 20
# Norms up to which squares in float32 are far from its largest number.
_MAX_NORM = 1e18
# Rounding of a product in the settings of torch.set_float32_matmul_precision.
_FLOAT32_ROUNDING = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}


@dataclass(frozen=True)
class Matches:
    """What the support says of each query.

    Attributes
    ----------
    q : Tensor of shape (n,), int64
        Number of consecutive nearest support rows that are good, at most the cap.
    d0 : Tensor of shape (n,), float64
        L2 distance to the nearest support row; infinite where none is left.
    nearest : Tensor of shape (n,), int64
        Position of that row; -1 where none is left.

    See Also
    --------
    match : makes one; it has an example.
    """

    q: Tensor
    d0: Tensor
    nearest: Tensor


@torch.no_grad()
def match(
    queries: Tensor,
    predictions: Tensor,
    support: Tensor,
    labels: Tensor,
    support_predictions: Tensor,
    *,
    exclude: Tensor | None = None,
    cap: int = MAX_Q,
) -> Matches:
    """Find q, d0 and the nearest support row of each query.

    Memory beside the arguments is a few blocks of 256 × 2,048 numbers (4,096 × 8,192 on a GPU) and
    one number for each query of a block and 2,048 support rows.

    Parameters
    ----------
    queries : Tensor of shape (n, M)
        Exemplars of the queries.
    predictions : Tensor of shape (n,), int64
        Their predicted classes, as positions.
    support : Tensor of shape (N, M)
        Exemplars of the support.
    labels, support_predictions : Tensor of shape (N,), int64
        Classes of the support rows, and what the model predicts for them. A label that is no class
        (-1, say) is never good.
    exclude : Tensor of shape (n,), int64, optional
        Position of a support row that each query must not see: itself, for a row of the support.
    cap : int, default=2048
        Largest q.

    Returns
    -------
    Matches

    Raises
    ------
    DataError
        If shapes do not fit, the support is empty, or an exemplar is not finite.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import match
    >>> support = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> labels, predicted = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0])
    >>> found = match(torch.tensor([[0.4]]), torch.tensor([0]), support, labels, predicted)
    >>> found.q, found.nearest
    (tensor([3]), tensor([0]))
    """
    _check(queries, predictions, support, labels, support_predictions)
    wide = max(float(h.abs().max()) for h in (queries, support)) * queries.shape[1] ** 0.5
    if torch.float64 in (queries.dtype, support.dtype) or wide > _MAX_NORM:
        queries, support = queries.double(), support.double()
    fused = use_triton(queries, support) and queries.dtype != torch.float64
    search = (_FusedSearch if fused else _Search)(support, labels, support_predictions)
    n, size = len(queries), _BLOCK[queries.device.type][0]
    parts = []
    for start in range(0, n, size):
        at = slice(start, start + size)
        parts.append(search(queries[at], predictions[at], None if exclude is None else exclude[at]))
    q, d0, nearest = (torch.cat(ts) for ts in zip(*parts, strict=True))
    return Matches(q.clamp(max=cap), d0, nearest)


def _check(
    queries: Tensor, predictions: Tensor, support: Tensor, labels: Tensor, own: Tensor
) -> None:
    if queries.ndim != 2 or support.ndim != 2 or queries.shape[1] != support.shape[1]:
        raise DataError(
            "match: queries and support must be (n, M) and (N, M), got "
            f"{tuple(queries.shape)} and {tuple(support.shape)}."
        )
    if not len(support) or not len(queries):
        raise DataError("match: queries and support need at least one row each.")
    if predictions.shape != queries.shape[:1] or not (
        labels.shape == own.shape == support.shape[:1]
    ):
        raise DataError(
            "match: predictions need one class a query, labels and support_predictions one a "
            f"support row, got {tuple(predictions.shape)}, {tuple(labels.shape)} and "
            f"{tuple(own.shape)} for {len(queries)} queries and {len(support)} support rows."
        )
    for name, values in (("queries", queries), ("support", support)):
        if not bool(values.isfinite().all()):
            raise DataError(f"match: {name} contain NaN or infinity.")


class _Search:
    """A support in blocks, each of rows that are good for one class or for none."""

    def __init__(self, support: Tensor, labels: Tensor, predictions: Tensor) -> None:
        self.exact = support.double()
        self.order, sizes, self.groups = _grouped(labels, predictions)
        self.position = torch.empty_like(self.order)
        self.position[self.order] = torch.arange(len(self.order), device=support.device)
        # Products of float32 or float64; distances from the centre of the support lose least.
        rows = support.double() if support.dtype == torch.float64 else support.float()
        self.centre = rows.mean(0)
        rows = rows[self.order] - self.centre
        # (−2h, 1) · (s, ‖s‖²) = ‖s‖² − 2hs in one product.
        self.rows = torch.cat([rows, (rows * rows).sum(1, keepdim=True)], 1)
        self.bounds: list[tuple[int, int]] = []
        self.block_group: list[int] = []
        start, width = 0, _BLOCK[support.device.type][1]
        for group, size in zip(self.groups.tolist(), sizes.tolist(), strict=True):
            for a in range(start, start + size, width):
                self.bounds.append((a, min(a + width, start + size)))
                self.block_group.append(group)
            start += size
        self.of_block = torch.tensor(self.block_group, device=support.device)
        self.group = torch.where(labels == predictions, labels, -1)
        unit = float(torch.finfo(rows.dtype).eps)
        if rows.dtype == torch.float32:
            unit = _FLOAT32_ROUNDING[torch.get_float32_matmul_precision()]
        self.rounding = 4 * (rows.shape[1] + 4) * unit

    def __call__(
        self, queries: Tensor, predictions: Tensor, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = queries.to(self.rows.dtype) - self.centre
        squares = (h * h).sum(1)
        h = torch.cat([-2 * h, torch.ones_like(h[:, :1])], 1)
        hidden = None if exclude is None else self.position[exclude]

        def product(rows: Tensor | None, block: int) -> Tensor:
            a, b = self.bounds[block]
            left, own, gone = (
                (h, squares, hidden)
                if rows is None
                else (h[rows], squares[rows], None if hidden is None else hidden[rows])
            )
            values = left @ self.rows[a:b].T
            if gone is not None:
                at = ((gone >= a) & (gone < b)).nonzero()[:, 0]
                values[at, gone[at] - a] = torch.inf
            # The minimum comes without ‖h‖², which is added to one number instead of thousands.
            return values if rows is None else values + own[:, None]

        lowest = torch.stack([product(None, b).amin(1) for b in range(len(self.bounds))], 1)
        lowest += squares[:, None]
        bad = self.of_block != predictions[:, None]
        closest = lowest.amin(1)
        radius = lowest.masked_fill(~bad, torch.inf).amin(1)
        reach = torch.where(radius.isinf(), closest, radius).clamp_min(0)
        # No row within reach has a norm above ‖h‖ + reach.
        slack = 2 * self.rounding * (squares + (squares.sqrt() + 2 * reach.sqrt()) ** 2)
        certain = torch.zeros(len(h), dtype=torch.long, device=h.device)
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        n_pairs = 0
        need = lowest <= (reach + slack)[:, None]
        for block in need.any(0).nonzero()[:, 0].tolist():
            rows = need[:, block].nonzero()[:, 0]
            values = product(rows, block)
            inner, outer = (radius - slack)[rows, None], (radius + slack)[rows, None]
            certain[rows] += (values < inner).sum(1)
            near = (values >= inner) & (values <= outer) & radius[rows, None].isfinite()
            first = values <= (closest + slack)[rows, None]
            at, column = ((near | first) & values.isfinite()).nonzero(as_tuple=True)
            pairs.append((rows[at], self.order[self.bounds[block][0] + column], near[at, column]))
            n_pairs += len(at)
            if n_pairs > _MAX_PAIRS and len(h) > 1:  # many equal rows: fewer queries at a time
                return self._halves(queries, predictions, exclude)
        return self._settle(queries, predictions, radius, certain, hidden, pairs)

    def _halves(
        self, queries: Tensor, predictions: Tensor, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        half = len(queries) // 2
        parts = [
            self(queries[at], predictions[at], None if exclude is None else exclude[at])
            for at in (slice(half), slice(half, None))
        ]
        q, d0, nearest = (torch.cat(ts) for ts in zip(*parts, strict=True))
        return q, d0, nearest

    def _settle(
        self,
        queries: Tensor,
        predictions: Tensor,
        radius: Tensor,
        certain: Tensor,
        hidden: Tensor | None,
        pairs: list[tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare what rounding could not tell apart in float64."""
        n, n_support = len(queries), len(self.order)
        at, row, near = (torch.cat(ts) for ts in zip(*pairs, strict=True))
        h = queries.double()
        step = max(1, _PAIR_ELEMENTS // h.shape[1])
        squared = torch.cat(
            [
                ((h[a] - self.exact[r]) ** 2).sum(1)
                for a, r in zip(at.split(step), row.split(step), strict=True)
            ]
        )
        good = self.group[row] == predictions[at]

        def first(of: Tensor) -> tuple[Tensor, Tensor]:
            """Smallest distance and position of it, among the pairs ``of``."""
            a, r, value = at[of], row[of], squared[of]
            best = squared.new_full((n,), torch.inf).scatter_reduce(0, a, value, "amin")
            tied = value == best[a]
            index = row.new_full((n,), n_support).scatter_reduce(0, a[tied], r[tied], "amin")
            return best, index

        d0, nearest = first(torch.ones_like(good))
        limit, limit_row = first(~good)
        before = (squared < limit[at]) | ((squared == limit[at]) & (row < limit_row[at]))
        counted = good & near & before
        q = certain + torch.bincount(at[counted], minlength=n)
        everything = (self.group == predictions[:, None]).sum(1) if radius.isinf().any() else q
        if hidden is not None and radius.isinf().any():
            everything = everything - (self.group[self.order[hidden]] == predictions).long()
        q = torch.where(radius.isinf(), everything, q)
        return q, d0.sqrt(), torch.where(nearest == n_support, -1, nearest)


class _FusedSearch(_Search):
    """The same on a GPU, where distances need no memory; what they leave open is settled alike."""

    def __init__(self, support: Tensor, labels: Tensor, predictions: Tensor) -> None:
        self.parts = support, labels, predictions
        self.exact = support.double()
        self.order = torch.arange(len(support), device=support.device)
        self.group = torch.where(labels == predictions, labels, -1)
        self.support = Support.of(support)
        self.rounding = 4 * (support.shape[1] + 4) * float(torch.finfo(torch.float32).eps)

    def __call__(
        self, queries: Tensor, predictions: Tensor, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys = scan(queries, predictions, self.support, self.group, exclude)
        closest, radius = (unpack(k)[0] for k in keys)
        squares = self.support.centred(queries)[1]
        reach = torch.where(radius.isinf(), closest, radius)
        # As in _Search.
        slack = 2 * self.rounding * (squares + (squares.sqrt() + 2 * reach.sqrt()) ** 2)
        bounds = radius - slack, radius + slack, closest + slack
        seen = window(queries, self.support, *bounds, exclude)
        pairs = [(seen.query, seen.row, seen.near)]
        found = self._settle(queries, predictions, radius, seen.closer, exclude, pairs)
        if seen.full.any():  # many equal rows
            some = seen.full
            again = _Search(*self.parts)(
                queries[some], predictions[some], None if exclude is None else exclude[some]
            )
            for all_of_them, part in zip(found, again, strict=True):
                all_of_them[some] = part
        return found


def _grouped(labels: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order that puts rows good for one class together, sizes of the groups, and their classes."""
    group = torch.where(labels == predictions, labels, -1)
    order = torch.argsort(group, stable=True)
    groups, sizes = group.unique(return_counts=True)
    return order, sizes, groups


@torch.no_grad()
def nearest_rows(
    queries: Tensor, support: Tensor, k: int, *, backend: Literal["torch", "faiss"] = "torch"
) -> tuple[Tensor, Tensor]:
    """Find the k nearest support rows of each query: the exemplars that a prediction rests on.

    Parameters
    ----------
    queries, support : Tensor of shape (n, M) and (N, M)
        Exemplars.
    k : int
        How many; at most N.
    backend : {"torch", "faiss"}, default="torch"
        "faiss" takes its flat index, where that package is installed: faster for large supports.

    Returns
    -------
    index : Tensor of shape (n, k), int64
        Positions, nearest first, ties by position.
    distance : Tensor of shape (n, k), float64
        L2 distances.
    """
    if not isinstance(k, int) or not 1 <= k <= len(support):
        raise ParameterError(
            f"nearest_rows: k must be an integer from 1 to {len(support)} (the support's rows), "
            f"got {k!r}."
        )
    # A few more than k, which float64 then puts in order.
    n_candidates = min(len(support), k + 16)
    centre = support.double().mean(0)
    h, s = queries.double() - centre, support.double() - centre
    if backend == "faiss":
        candidates, lowest = _faiss_candidates(h, s, n_candidates)
        unit = float(torch.finfo(torch.float32).eps)
    elif backend == "torch" and n_candidates <= MAX_K and use_triton(queries, support):
        squared, candidates = unpack(nearest_keys(queries, Support.of(support), n_candidates))
        lowest, unit = squared.double(), float(torch.finfo(torch.float32).eps)
    elif backend == "torch":
        size = max(1, (1 << 21) // len(s))
        found = [torch.cdist(part, s).topk(n_candidates, largest=False) for part in h.split(size)]
        candidates = torch.cat([f.indices for f in found])
        lowest = torch.cat([f.values for f in found]).square()
        unit = float(torch.finfo(torch.float64).eps)
    else:
        raise ParameterError(f"nearest_rows: backend must be 'torch' or 'faiss', got {backend!r}.")
    candidates = candidates.sort(1).values
    step = max(1, _PAIR_ELEMENTS // (n_candidates * support.shape[1]))
    parts = [
        (a[:, None].double() - support[c].double()).square().sum(-1).sort(dim=1, stable=True)
        for a, c in zip(queries.split(step), candidates.split(step), strict=True)
    ]
    index = candidates.gather(1, torch.cat([p.indices for p in parts]))[:, :k]
    squared = torch.cat([p.values for p in parts])[:, :k]
    if n_candidates < len(s):
        # Rows that tie with the k-th, up to rounding, may be missing: look at all.
        slack = 8 * (s.shape[1] + 4) * unit * (h.square().sum(1) + lowest[:, -1])
        for i in (lowest[:, -1] <= lowest[:, k - 1] + slack).nonzero()[:, 0].tolist():
            every = (queries[i].double() - support.double()).square().sum(1).sort(stable=True)
            index[i], squared[i] = every.indices[:k], every.values[:k]
    return index, squared.sqrt()


def _faiss_candidates(queries: Tensor, support: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions and squared distances of the k nearest, in float32."""
    try:
        import faiss
    except ImportError as error:
        raise ParameterError(
            "nearest_rows: backend='faiss' needs the package faiss (pip install faiss-cpu); "
            "'torch' needs nothing."
        ) from error
    index = faiss.IndexFlatL2(support.shape[1])
    index.add(support.float().cpu().numpy())
    squared, found = index.search(queries.float().cpu().numpy(), k)
    return tuple(torch.from_numpy(t).to(queries.device) for t in (found, squared))  # type: ignore[return-value]

"""Regions of highest density of univariate predictive distributions, row by row.

The line is cut in cells, finer where there is more mass; a cell's density is its mass over its
width. Cells are taken from the densest on, and each is entered from its denser neighbour, so that

    s(y) = mass of what is taken before y is reached

grows continuously as y moves down in density, and {y : s(y) <= t} holds the mass t, to a fraction
of the last cell (1/64 at the most), in which mass is counted as spread evenly. How fine cells are
decides how close the region is to the smallest of that mass; whether scores and regions agree, and
with that coverage, does not depend on it. Beyond the outermost cells, where 1e-6 of the mass is
left on either side, s is 1 plus the distance from them in units of their total width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from uq.distributions import RealPredictive
from uq.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Quantile levels, and the number of steps from each to the next, of a first look at where the mass
# is; from this the cells are made, each a like share of mass and width together.
_LOWER = [2.0**-20, 2.0**-10, 2.0**-5, 1 / 8, 1 / 4, 3 / 8]
_LEVELS = torch.tensor([*_LOWER, 1 / 2, *(1 - q for q in _LOWER[::-1])], dtype=torch.float64)
_STEPS, _CELLS = 4, 128
# Decimals of log densities; cells that differ by less are taken from the middle outwards.
_DECIMALS = 6
# Regions hold at least this mass, so that none is empty.
_LEAST = 1e-6


class DensityCells:
    """Cells of a distribution of batch shape (n,), and the order in which they are taken."""

    def __init__(self, dist: RealPredictive) -> None:
        edges = _even_edges(dist)
        self.edges: NDArray[Any] = np.ascontiguousarray(edges.cpu().numpy().T)  # (n, P + 1)
        self.mass: NDArray[Any] = np.diff(_cdf(dist, edges).cpu().numpy().T).clip(0)  # (n, P)
        self.width: NDArray[Any] = np.diff(self.edges)
        if not (self._span > 0).all():
            raise DataError(
                "score='density': the predictive distribution of a row is a single point to "
                "rounding; use score='residual'."
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            log_density = np.log(self.mass / self.width).round(_DECIMALS)
        log_density[self.mass == 0] = -np.inf

        n_cells = self.mass.shape[1]
        outwards = np.argsort(np.abs(np.arange(n_cells) - (n_cells - 1) / 2), kind="stable")
        order = outwards[np.argsort(-log_density[:, outwards], axis=1, kind="stable")]
        taken = np.take_along_axis(self.mass, order, 1)
        self.before: NDArray[Any] = np.empty_like(self.mass)
        np.put_along_axis(self.before, order, taken.cumsum(1) - taken, 1)

        none = np.full((len(self.mass), 1), -np.inf)
        left = np.concatenate([none, log_density[:, :-1]], 1)
        right = np.concatenate([log_density[:, 1:], none], 1)
        self.from_left: NDArray[Any] = np.where(
            left == right, np.arange(n_cells) >= n_cells / 2, left > right
        )

    @property
    def _span(self) -> Floats:
        span: Floats = self.edges[:, -1] - self.edges[:, 0]
        return span

    def scores(self, y: Floats) -> Floats:
        """S(y) of a target of each row, shape (n,)."""
        n_cells = self.mass.shape[1]
        at = ((self.edges <= y[:, None]).sum(1) - 1).clip(0, n_cells - 1)[:, None]
        start, width, mass, before, from_left = (
            np.take_along_axis(a, at, 1)[:, 0]
            for a in (self.edges, self.width, self.mass, self.before, self.from_left)
        )
        share = np.divide(y - start, width, out=np.zeros_like(y), where=width > 0).clip(0, 1)
        inside = before + np.where(from_left, share, 1 - share) * mass
        beyond = np.maximum(self.edges[:, 0] - y, y - self.edges[:, -1])
        return np.where(beyond > 0, 1 + beyond / self._span, inside)

    def _taken(self, threshold: float) -> tuple[Floats, Floats]:
        """Ends of what is taken of each cell, (n, P); empty parts have equal ends."""
        missing = max(threshold, _LEAST) - self.before
        share = np.divide(
            missing, self.mass, out=(missing >= 0).astype(np.float64), where=self.mass > 0
        ).clip(0, 1)
        left, right = self.edges[:, :-1], self.edges[:, 1:]
        part = share * self.width
        whole = share == 1
        return (
            np.where(whole | self.from_left, left, right - part),
            np.where(whole | ~self.from_left, right, left + part),
        )

    def regions(self, threshold: float) -> list[Floats]:
        """Intervals that make up {y : s(y) <= threshold}, an array (k, 2) for each row."""
        if threshold >= 1:
            return list(np.stack(self.hull(threshold), -1)[:, None])
        low, high = self._taken(threshold)
        regions = []
        for a, b in zip(low, high, strict=True):
            used = b > a
            a, b = a[used], b[used]
            gap = a[1:] > b[:-1]
            ends = a[np.append(True, gap)], b[np.append(gap, True)]
            regions.append(np.stack(ends, -1))
        return regions

    def hull(self, threshold: float) -> tuple[Floats, Floats]:
        """Smallest interval around the region of each row, (n,) each."""
        if threshold >= 1:
            beyond = (threshold - 1) * self._span
            return self.edges[:, 0] - beyond, self.edges[:, -1] + beyond
        low, high = self._taken(threshold)
        used = high > low
        return np.where(used, low, np.inf).min(1), np.where(used, high, -np.inf).max(1)


def _cdf(dist: RealPredictive, points: Tensor) -> Tensor:
    """Cumulative distribution at points (P, n); one at a time, since a mixture has draws, too."""
    return torch.stack([dist.cdf(y) for y in points])


def _even_edges(dist: RealPredictive) -> Tensor:
    """Edges (P + 1, n) between which mass plus share of the total width is about the same."""
    knots = dist.quantile(_LEVELS)  # (L, n)
    parts = torch.arange(_STEPS, dtype=torch.float64, device=knots.device)[:, None] / _STEPS
    steps = (knots[:-1, None] + parts * knots.diff(dim=0)[:, None]).flatten(0, 1)
    first = torch.cat([steps, knots[-1:]])
    height = _cdf(dist, first) + (first - first[0]) / (first[-1] - first[0])
    height, first = height.T.contiguous(), first.T.contiguous()  # (n, Q)
    share = torch.linspace(0, 1, _CELLS + 1, dtype=torch.float64, device=knots.device)
    wanted = torch.lerp(height[:, :1], height[:, -1:], share)
    right = torch.searchsorted(height, wanted).clamp(1, height.shape[1] - 1)
    (h0, h1), (y0, y1) = ((t.gather(1, right - 1), t.gather(1, right)) for t in (height, first))
    edges = torch.lerp(y0, y1, ((wanted - h0) / (h1 - h0)).nan_to_num(0.0).clamp(0, 1))
    return edges.cummax(1).values.T

"""Inversion, integrals and maxima of functions of y, for all rows of a batch at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

_GOLDEN = 0.5 * (math.sqrt(5) - 1)


def invert(cdf: Function, q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Solve cdf(x) = q for x in [low, high] by halving, to a few units in the last place.

    Infinite ends are first replaced by finite ones, found in steps that double.
    """
    low, high = _finite_bracket(cdf, q, low, high)
    for _ in range(200):
        x = 0.5 * (low + high)
        below = cdf(x) < q
        low, high = torch.where(below, x, low), torch.where(below, high, x)
        if bool((high - low <= 5e-16 * (low.abs() + high.abs())).all()):
            break
    return 0.5 * (low + high)


def _finite_bracket(cdf: Function, q: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    start = torch.where(low.isfinite(), low, torch.where(high.isfinite(), high, 0.0))
    a = torch.where(low.isfinite(), low, start - 1)
    b = torch.where(high.isfinite(), high, start + 1)
    for k in range(1, 1023):
        down, up = low.isinf() & (cdf(a) > q), high.isinf() & (cdf(b) < q)
        if not bool((down | up).any()):
            break
        a, b = torch.where(down, start - 2.0**k, a), torch.where(up, start + 2.0**k, b)
    return a, b


def integrate(f: Function, edges: Tensor, scale: Tensor) -> Tensor:
    """∫ f(y) dy between the first and the last of the edges (P, *batch), which increase.

    SciPy's adaptive Gauss-Kronrod quadrature, split at the edges and refined for all rows alike,
    until none errs by more than about 1e-11 of its ``scale``, or 1e-11 of the largest integral in
    these units.
    """
    from scipy.integrate import quad_vec

    width = edges.diff(dim=0)
    if scale.numel() == 0:
        return torch.zeros_like(scale)

    def integrand(u: float) -> Any:
        k = min(int(u), len(width) - 1)
        y = edges[k] + (u - k) * width[k]
        return (f(y) * (width[k] / scale)).reshape(-1).cpu().numpy()

    breaks = range(1, len(width))
    total, _ = quad_vec(integrand, 0, len(width), 1e-11, 1e-11, norm="max", points=breaks)
    return scale * torch.as_tensor(total, device=scale.device).reshape(scale.shape)


def highest(f: Function, grid: Tensor) -> Tensor:
    """Maximum of f next to the best point of the grid (P, *batch), by golden-section search."""
    best = f(grid).argmax(0, keepdim=True)
    low = grid.gather(0, (best - 1).clamp_min(0))[0]
    high = grid.gather(0, (best + 1).clamp_max(len(grid) - 1))[0]
    for _ in range(60):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        rising = f(left) < f(right)
        low, high = torch.where(rising, left, low), torch.where(rising, high, right)
    return 0.5 * (low + high)

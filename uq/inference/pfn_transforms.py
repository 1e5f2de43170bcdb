"""Transforms of tables that views of a context are made by: powers and principal axes."""

from __future__ import annotations

import torch
from torch import Tensor


class PowerTransform:
    """Yeo-Johnson transform of standardised values, by maximum likelihood over λ in 1 ± reach.

    Beyond the values that it was fitted to it goes on as a straight line: mapped back, the tails of
    a prediction are not stretched without bound.

    Parameters
    ----------
    y : Tensor of shape (m, n)
        Values of m outputs or columns, NaN where missing.
    weight : Tensor of shape (n,), optional
        Weights of the rows.
    reach : float, default=1
        At most 1, at which a logarithm is the end. For targets 1/2, a square root: after an
        exponential, the mean of a prediction is that of its utmost tail.
    """

    def __init__(self, y: Tensor, weight: Tensor | None = None, reach: float = 1.0) -> None:
        y = y.double()
        w = torch.ones_like(y[0]) if weight is None else weight.double()
        w = w * ~y.isnan()
        w = w / w.sum(-1, keepdim=True).clamp_min(1e-300)
        y = y.nan_to_num(0.0)
        grid = torch.linspace(1 - reach, 1 + reach, 41, dtype=torch.float64, device=y.device)
        z = self._forward(y, grid[:, None, None])
        mean = (z * w).sum(-1, keepdim=True)
        variance = ((z - mean).square() * w).sum(-1).clamp_min(1e-12)
        jacobian = (w * y.sign() * y.abs().log1p()).sum(-1)
        likelihood = -0.5 * variance.log() + (grid[:, None] - 1) * jacobian
        self.power: Tensor = grid[likelihood.argmax(0)][:, None]
        self.low: Tensor = y.amin(-1, keepdim=True)
        self.high: Tensor = y.amax(-1, keepdim=True)

    @staticmethod
    def _forward(y: Tensor, power: Tensor) -> Tensor:
        up, down = y.clamp_min(0).log1p(), (-y).clamp_min(0).log1p()
        other = 2 - power
        above = torch.where(power > 1e-9, torch.expm1(power * up) / power.clamp_min(1e-9), up)
        below = torch.where(other > 1e-9, torch.expm1(other * down) / other.clamp_min(1e-9), down)
        return above - below

    @staticmethod
    def _backward(z: Tensor, power: Tensor) -> Tensor:
        other, up, down = 2 - power, z.clamp_min(0), (-z).clamp_min(0)
        above = torch.where(power > 1e-9, (power * up).log1p() / power.clamp_min(1e-9), up)
        below = torch.where(other > 1e-9, (other * down).log1p() / other.clamp_min(1e-9), down)
        return torch.expm1(above) - torch.expm1(below)

    def _slope(self, y: Tensor) -> Tensor:
        """Derivative at ``y``."""
        return torch.exp((self.power - 1) * y.sign() * y.abs().log1p())

    def __call__(self, y: Tensor) -> Tensor:
        """Transform values (m, n)."""
        x = y.double()
        inside = torch.maximum(torch.minimum(x, self.high), self.low)
        return (self._forward(inside, self.power) + self._slope(inside) * (x - inside)).to(y.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        """Map values (m, …) back."""
        flat = z.flatten(1)
        low, high = (self._forward(end, self.power) for end in (self.low, self.high))
        inside = torch.maximum(torch.minimum(flat, high), low)
        y = self._backward(inside, self.power)
        return (y + (flat - inside) / self._slope(y)).view_as(z)


def principal_axes(x: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """At most ``k`` leading principal axes (d, k) of rows (n, d), signs fixed, gaps as means."""
    x = x.nan_to_num(0.0).double()
    w = torch.ones(len(x), dtype=x.dtype, device=x.device) if weight is None else weight.double()
    mean = (x * w[:, None]).sum(0) / w.sum()
    scaled = (x - mean) * w.sqrt()[:, None]
    if x.shape[1] <= len(x):
        values, axes = torch.linalg.eigh(scaled.T @ scaled)
        values, axes = values.flip(0), axes.flip(1)
    else:
        _, roots, rows = torch.linalg.svd(scaled, full_matrices=False)
        values, axes = roots.square(), rows.T
    # Directions in which no row differs are rounding.
    axes = axes[:, values >= 1e-10 * values[0]][:, :k]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0)

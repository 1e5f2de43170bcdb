"""Predictive distributions of real targets whose levels are corrected by a monotone map.

With F the cumulative distribution of the base and R a continuous, piecewise linear, non-decreasing
map of [0, 1] onto [0, 1], the recalibrated distribution has

    cdf G(y) = R(F(y)),    quantile G⁻¹(q) = F⁻¹(R⁻¹(q)),    density g(y) = f(y) R′(F(y)).

It is the law of T(Y) for Y from the base and T = G⁻¹ ∘ F, an increasing function of each output. So
several outputs keep their dependence: with T⁻¹(y) taken output by output,

    log p(y) = log p_base(T⁻¹(y)) + Σ_j [log g_j(y_j) − log f_j(T_j⁻¹(y_j))],

the base's copula at the new levels. (log p_base(y) + Σ_j log R_j′ would put it at the old levels,
and does not integrate to 1 unless the outputs are independent.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from uq.distributions.base import RealPredictive, TorchDistribution, check_levels
from uq.errors import DataError, ParameterError

# Levels are kept where a float64 tells them from 0 and 1.
_LOWEST, _HIGHEST = 1e-300, 1 - 2.0**-53
# Moments and CRPS are integrals over pieces of y that end at quantiles of these levels, finer by
# factors of 4 towards the tails, and at the knots of the map, of which about _MAX_KNOTS are used.
_TAIL = 2.0 ** -torch.arange(50, 5, -2, dtype=torch.float64)
_LEVELS = torch.cat([_TAIL, torch.arange(1, 32, dtype=torch.float64) / 32, 1 - _TAIL.flip(0)])
_MAX_KNOTS = 100
_NODES, _WEIGHTS = ((0.5 * a).tolist() for a in np.polynomial.legendre.leggauss(6))
_GOLDEN = 0.5 * (5**0.5 - 1)


class Recalibrated(RealPredictive):
    """Base distribution whose levels are corrected by a monotone map of [0, 1] onto itself.

    Parameters
    ----------
    base : RealPredictive
        Distribution with a density, batch shape (n,) or (n, m), or event shape (m,).
    levels : array-like of shape (K,) or (m, K)
        Knots of the map R: levels of the base, from 0 to 1, strictly increasing.
    recalibrated : array-like of the shape of ``levels``
        R at the knots, from 0 to 1, non-decreasing; linear in between. A row for each output, or
        one map for all. Where R is flat the density is 0 (``log_prob`` is −inf), and a quantile at
        the height of a flat piece is its lower end.

    Notes
    -----
    Beyond the outermost knots the tails are those of the base, rescaled in mass. Mean, variance and
    CRPS are Gauss–Legendre integrals of G over pieces that end at its knots. Relative to the
    standard deviation they err by 1e-10 for a Normal base or a mixture whose scales are within a
    factor of ten, by 1e-4 where these differ a hundredfold, and by 1e-3 with more than a hundred
    knots, which are then not all met. A variance that rests on tails of probability below 1e-15, as
    that of a Student t with less than three degrees of freedom does, is cut off there.

    The split of variance is that of the base in proportion, so that the parts add up to the new
    variance: exact where R only moves and stretches the distribution, a convention elsewhere.

    References
    ----------
    V. Kuleshov, N. Fenner, S. Ermon, "Accurate Uncertainties for Deep Learning Using Calibrated
    Regression", ICML 2018, arXiv 1807.00263.

    Examples
    --------
    The outer tenths of a Normal turn out to hold twice that:

    >>> import torch
    >>> from uq.distributions import NormalMixture, Recalibrated
    >>> base = NormalMixture(torch.zeros(1, 1), torch.ones(1, 1))
    >>> d = Recalibrated(base, [0, 0.1, 0.9, 1], [0, 0.2, 0.8, 1])
    >>> lower, upper = d.interval(0.6)
    >>> round(float(upper), 3), round(float(base.quantile(0.9)), 3)
    (1.282, 1.282)
    """

    has_rsample = False

    def __init__(self, base: RealPredictive, levels: Any, recalibrated: Any) -> None:
        if not isinstance(base, RealPredictive) or not getattr(base, "has_log_prob", True):
            raise DataError(
                "Recalibrated: base must be a predictive distribution of real targets with a "
                f"density, got a {type(base).__name__}."
            )
        self.base = base
        self.levels: Tensor
        self.recalibrated: Tensor
        self.levels, self.recalibrated = _check_map(levels, recalibrated)
        shape, n_maps = base.batch_shape + base.event_shape, len(self.levels)
        if n_maps > 1 and shape[-1:] != (n_maps,):
            raise ParameterError(
                f"Recalibrated: levels hold maps of {n_maps} outputs, but base has shape "
                f"{tuple(shape)}; give one map, or one for each output."
            )
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    # -- shape -------------------------------------------------------------------------------

    @property
    def support(self) -> Any:
        """Support of the base."""
        return self.base.support

    @property
    def n_draws(self) -> int:
        """Always 1: the map is of the mixture of the base's draws, not of each draw."""
        return 1

    @property
    def draws(self) -> TorchDistribution:
        """The distribution itself, with a first axis of one draw."""
        return self.expand((1, *self.batch_shape))

    @property
    def _has_epistemic(self) -> bool:
        return self.base._has_epistemic

    def _kind(self) -> tuple[Any, ...]:
        knots = (self.levels.tolist(), self.recalibrated.tolist())
        return (*super()._kind(), *self.base._kind(), *knots)

    def _with(self, base: RealPredictive) -> Self:
        return type(self)(base, self.levels, self.recalibrated)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Self:
        return self._with(self.base._map(f))

    def _rows(self, key: Any) -> Self:
        return self._with(self.base._rows(key))

    def expand(self, batch_shape: Any, _instance: None = None) -> Self:
        """Return the distribution with its batch shape expanded to ``batch_shape``."""
        return self._with(self.base.expand(batch_shape))

    def joint(self) -> Self:
        """Make the outputs of a row one event: the base's copula with the new marginals."""
        return self._regrouped(self.base.joint())

    def marginal(self) -> Self:
        """Undo :meth:`joint`: one distribution an output, batch shape (n, m)."""
        return self._regrouped(self.base.marginal())

    def _regrouped(self, base: RealPredictive) -> Self:
        if base is self.base:
            return self
        same = self._with(base)
        same.index = self.index
        return same

    def output(self, j: int) -> Self:
        """Marginal distribution of output ``j`` of batch shape (n, m), batch shape (n,)."""
        own = range(len(self.levels))[j] if len(self.levels) > 1 else 0
        knots = self.levels[own], self.recalibrated[own]
        return type(self)(self.base.output(j), *knots)

    @cached_property
    def _exact(self) -> RealPredictive:
        """The base in float64, one distribution an output."""
        return self.base.marginal().double()

    # -- density, cdf, quantiles ---------------------------------------------------------------

    def _recalibrate(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """R and R′ at levels of the base, outputs on the last axis where each has its map."""
        return _piecewise(levels, self.levels, self.recalibrated, right=True)

    def cdf(self, value: Tensor) -> Tensor:
        """Cumulative distribution of each output, float64."""
        self._need_marginal("cdf")
        value = self._targets("cdf", value)
        return self._recalibrate(self._exact.cdf(value))[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, float64; per output for batch shape (n, m), joint for event (m,)."""
        value = self._targets("log_prob", value)
        level, slope = self._recalibrate(self._exact.cdf(value))
        log_g = self._exact.log_prob(value) + slope.log()
        if not self.event_shape:
            return log_g
        before = self._invert(level)
        ratio = log_g - self._exact.log_prob(before)
        return self.base.double().log_prob(before) + ratio.sum(-1)

    def quantile(self, q: Tensor | float | Any) -> Tensor:
        """Quantiles, as exact as those of the base.

        Parameters
        ----------
        q : float or array-like of shape (Q,)
            Levels in (0, 1).

        Returns
        -------
        Tensor
            Shape (n[, m]) for a scalar level, (Q, n[, m]) for Q levels, float64.
        """
        self._need_marginal("quantile")
        levels = check_levels(q)
        out = self._base_quantile(self._base_levels(levels.reshape(-1)))
        return out.reshape(*levels.shape, *self.batch_shape)

    def _base_levels(self, q: Tensor) -> Tensor:
        """R⁻¹ at levels (Q,): levels of the base, (n_maps, Q)."""
        each = q[:, None].expand(-1, len(self.levels))
        return _piecewise(each, self.recalibrated, self.levels, right=False)[0].T

    def _base_quantile(self, levels: Tensor) -> Tensor:
        """Quantiles (Q, *batch) of the base at levels (n_maps, Q)."""
        levels = levels.clamp(_LOWEST, _HIGHEST)
        if len(levels) == 1:
            return self._exact.quantile(levels[0])
        each = [self._exact.output(j).quantile(own) for j, own in enumerate(levels)]
        return torch.stack(each, -1)

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor]:
        """Levels (n_maps, P) of the base, and its quantiles (P, *batch) there."""
        knots = self.levels[:, 1:-1]
        knots = knots[:, :: 1 + knots.shape[1] // _MAX_KNOTS]
        levels = torch.cat([self._base_levels(_LEVELS), knots], 1).clamp(_LOWEST, _HIGHEST)
        levels = levels.sort(1).values
        return levels, self._base_quantile(levels)

    def _invert(self, levels: Tensor) -> Tensor:
        """F⁻¹ of the base at a level for each element, shape (…, *batch)."""
        grid, edges = self._grid
        flat = _by_map(levels, len(grid)).clamp(grid[:, :1], grid[:, -1:])
        upper = torch.searchsorted(grid, flat).clamp(1, grid.shape[1] - 1)
        z = torch.special.ndtri(flat)
        ends = []
        for k in (upper - 1, upper):
            rows = _like(k, levels).reshape(-1, *edges.shape[1:])
            y = edges.gather(0, rows).reshape(levels.shape)
            ends.append((y, _like(torch.special.ndtri(grid.gather(1, k)) - z, levels)))
        return _solve(self._exact.cdf, _like(z, levels), *ends)

    # -- moments -----------------------------------------------------------------------------

    def _pieces(self, split: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
        """Nodes y, weights, and G(y) below ``split`` or 1 − G(y) above it (the last entry True)."""
        for a, b in pairwise(self._grid[1]):
            c = torch.minimum(torch.maximum(split, a), b)
            for low, high, above in ((a, c, False), (c, b, True)):
                width = high - low
                if not bool((width > 0).any()):
                    continue
                for node, weight in zip(_NODES, _WEIGHTS, strict=True):
                    y = low + (0.5 + node) * width
                    mass, _ = self._recalibrate(self._exact.cdf(y))
                    yield y, weight * width, 1 - mass if above else mass, above

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, from E(Y − c) = ∫ (1 − G) − ∫ G above and below c, and the like."""
        edges = self._grid[1]
        centre = edges[len(edges) // 2]
        first, second = torch.zeros_like(centre), torch.zeros_like(centre)
        for y, weight, mass, above in self._pieces(centre):
            first += weight * mass if above else -weight * mass
            second += 2 * weight * (y - centre).abs() * mass
        return centre + first, second - first.square()

    @property
    def mean(self) -> Tensor:
        """Predictive mean, in target units, float64."""
        return self._moments[0]

    @property
    def variance(self) -> Tensor:
        """Predictive variance, in squared target units, float64."""
        return self._moments[1]

    @property
    def aleatoric(self) -> Tensor:
        """Variance times the base's share of aleatoric variance, in squared target units."""
        return self.variance * (self._exact.aleatoric / self._exact.variance)

    @property
    def epistemic(self) -> Tensor:
        """Variance times the base's share of epistemic variance, in squared target units.

        Raises
        ------
        NoEpistemicError
            If the base has no epistemic uncertainty.
        """
        return self.variance * (self._exact.epistemic / self._exact.variance)

    def crps(self, value: Tensor) -> Tensor:
        """Continuous ranked probability score of each output at ``value``, in target units.

        ∫ (G(t) − 1{t >= y})² dt, by quadrature.
        """
        self._need_marginal("crps")
        value = self._targets("crps", value)
        edges = self._grid[1]
        y = value.expand(self.batch_shape).to(torch.float64)
        total = (edges[0] - y).relu() + (y - edges[-1]).relu()
        for _, weight, mass, _ in self._pieces(y):
            total += weight * mass.square()
        return total

    @property
    def mode(self) -> Tensor:
        """Highest point of the density, or the knot where it jumps there; float64."""
        self._need_marginal("mode")
        edges = self._grid[1]
        low, high = edges[0], edges[0]
        best = torch.full_like(low, -torch.inf)
        for a, b in pairwise(edges):
            for node in _NODES:
                density = self.log_prob(a + (0.5 + node) * (b - a))
                low, high = torch.where(
                    density > best, torch.stack([a, b]), torch.stack([low, high])
                )
                best = torch.maximum(density, best)
        for _ in range(45):  # golden-section search
            left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            rising = self.log_prob(left) < self.log_prob(right)
            low, high = torch.where(rising, left, low), torch.where(rising, high, right)
        return 0.5 * (low + high)

    # -- sampling ----------------------------------------------------------------------------

    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets, float64: T of draws from the base, whose dependence they keep."""
        with torch.no_grad():
            drawn = self.base.sample(sample_shape, generator=generator).to(torch.float64)
            levels = self._exact.cdf(drawn).clamp(_LOWEST, _HIGHEST)
            before, _ = _piecewise(levels, self.recalibrated, self.levels, right=False)
            return self._invert(before)


def _check_map(levels: Any, recalibrated: Any) -> tuple[Tensor, Tensor]:
    """Knots of the maps as float64 (n_maps, K)."""
    out = []
    for name, values in (("levels", levels), ("recalibrated", recalibrated)):
        t = torch.as_tensor(values, dtype=torch.float64)
        if t.ndim not in (1, 2) or t.shape[-1] < 2:
            raise ParameterError(
                f"Recalibrated: {name} need shape (K,) or (m, K) with K >= 2 knots, got "
                f"{tuple(t.shape)}."
            )
        t = t.reshape(-1, t.shape[-1])
        step = t.diff(dim=1)
        rises = bool((step > 0).all()) if name == "levels" else bool((step >= 0).all())
        if not rises or bool((t[:, 0] != 0).any()) or bool((t[:, -1] != 1).any()):
            kind = "increase strictly" if name == "levels" else "never decrease"
            raise ParameterError(f"Recalibrated: {name} must {kind}, from 0 to 1.")
        out.append(t.contiguous())
    if out[0].shape != out[1].shape:
        raise ParameterError(
            f"Recalibrated: levels have shape {tuple(out[0].shape)} and recalibrated "
            f"{tuple(out[1].shape)}; they must be equal."
        )
    return out[0], out[1]


def _by_map(x: Tensor, n_maps: int) -> Tensor:
    """Elements of (…, m) as (m, rest), or as (1, all) for a single map."""
    return (x if n_maps == 1 else x.movedim(-1, 0)).reshape(n_maps, -1).contiguous()


def _like(flat: Tensor, x: Tensor) -> Tensor:
    """Undo :func:`_by_map` for a tensor of the shape of ``x``."""
    if len(flat) == 1:
        return flat.reshape(x.shape)
    return flat.reshape(-1, *x.shape[:-1]).movedim(0, -1)


def _piecewise(x: Tensor, xs: Tensor, ys: Tensor, *, right: bool) -> tuple[Tensor, Tensor]:
    """Height and slope at ``x`` of the maps through knots (xs, ys) of shape (n_maps, K).

    A knot belongs to the piece on its right, or on its left: then a piece of no width is never met.
    """
    xs, ys = xs.to(x.device), ys.to(x.device)
    flat = _by_map(x, len(xs))
    k = torch.searchsorted(xs, flat, right=right).clamp(1, xs.shape[1] - 1)
    x0, y0, y1 = xs.gather(1, k - 1), ys.gather(1, k - 1), ys.gather(1, k)
    slope = (y1 - y0) / (xs.gather(1, k) - x0)
    return _like(torch.minimum(y0 + (flat - x0) * slope, y1), x), _like(slope, x)


def _solve(
    cdf: Callable[[Tensor], Tensor],
    z: Tensor,
    low: tuple[Tensor, Tensor],
    high: tuple[Tensor, Tensor],
) -> Tensor:
    """Solve Φ⁻¹(cdf(y)) = z between ends (y, Φ⁻¹(cdf(y)) − z), to about 1e-11 in Φ⁻¹.

    Regula falsi with the Illinois rule, on what is nearly a straight line; every third step halves
    the bracket, so that it shrinks whatever the distribution.
    """
    (y_low, f_low), (y_high, f_high) = low, high
    # Rounding of a cdf near 1 is worth this much on the scale of Φ⁻¹.
    noise = torch.where(z > 0, 2e-15 * torch.exp(0.5 * z.square()), 0.0)
    width = 1e-14 * (y_high - y_low)
    y, active, side = y_low, torch.ones_like(z, dtype=torch.bool), torch.zeros_like(z)
    for step in range(150):
        secant = (y_low * f_high - y_high * f_low) / (f_high - f_low)
        inside = (secant >= y_low) & (secant <= y_high) & (step % 3 < 2)
        new = torch.where(inside, secant, 0.5 * (y_low + y_high))
        y = torch.where(active, new, y)
        f = torch.special.ndtri(cdf(y)) - z
        active = active & (f.abs() > 1e-11 + noise) & (y_high - y_low > width + 4e-16 * y.abs())
        if not bool(active.any()):
            break
        below = f < 0
        # The end that stays twice in a row counts half: the Illinois rule.
        f_high = torch.where(below, torch.where(side < 0, 0.5 * f_high, f_high), f)
        f_low = torch.where(below, f, torch.where(side > 0, 0.5 * f_low, f_low))
        y_low, y_high = torch.where(below, y, y_low), torch.where(below, y_high, y)
        side = torch.where(below, -1.0, 1.0)
    return y

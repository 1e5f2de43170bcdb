"""Bar distribution: a histogram with half-normal tails, the output of a prior-data fitted network.

The real line is cut at borders b_0 < … < b_K. Bucket i has probability p_i. Inside, the density is
p_i / w_i with w_i = b_{i+1} − b_i. The first and the last bucket are half-normals that point
outwards from b_1 and b_{K−1}, with half of their mass inside the bucket: scales w_0 / c and
w_{K−1} / c with c = Φ⁻¹(3/4). Everything has a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import constraints

from uq.distributions.bar_functions import (
    BORDER_RULES,
    HALF_NORMAL_MEAN,
    HALF_NORMAL_MEDIAN,
    BorderRule,
    bar_borders,
    bar_loss,
    bucket_of,
)
from uq.distributions.base import RealPredictive, TorchDistribution, check_levels
from uq.errors import DataError, NoEpistemicError, ParameterError

__all__ = ["BORDER_RULES", "BarDistribution", "BorderRule", "bar_borders", "bar_loss"]


class BarDistribution(RealPredictive):
    """Predictive distribution given by bars over the real line, with half-normal tails.

    Parameters
    ----------
    logits : Tensor of shape (n, K) or (n, m, K)
        Unnormalised log probabilities of the K >= 2 buckets of n rows and m outputs.
    borders : Tensor, broadcastable to (n, K + 1) or (n, m, K + 1)
        Increasing borders, in target units. (K + 1,) where all rows share them.
    event_dim : {0, 1}, default=0
        1 makes the outputs one event. Use :meth:`joint` rather than this.
    validate_args : bool, optional
        False leaves out the check of values, which reads all of them.

    Raises
    ------
    DataError
        If shapes do not fit, borders do not increase, or a value is NaN or infinite (logits may be
        −inf: a bucket of probability 0).

    Notes
    -----
    The bars are one distribution, not draws from a posterior: ``n_draws`` is 1, ``aleatoric`` is
    the whole variance and ``epistemic`` raises. A network that was fitted to prior data has
    integrated its parameters out, and the two parts cannot be told apart from the result.

    ``log_prob`` carries gradients to ``logits``; the rest is computed in float64 without.

    References
    ----------
    S. Müller, N. Hollmann, S. Pineda Arango, J. Grabocka, F. Hutter, "Transformers Can Do Bayesian
    Inference", ICLR 2022, section 4 ("Riemann distribution").

    Examples
    --------
    >>> import torch
    >>> from uq.distributions import BarDistribution
    >>> d = BarDistribution(torch.zeros(1, 4), torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]))
    >>> float(d.mean), float(d.cdf(torch.tensor([1.0])))
    (0.0, 0.75)
    >>> d.log_prob(torch.tensor([0.5])).exp()
    tensor([0.2500])
    """

    has_rsample = False

    def __init__(
        self,
        logits: Tensor,
        borders: Tensor,
        *,
        event_dim: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        if validate_args is not False:
            _check(logits, borders)
        self.logits = logits
        self.borders: Tensor = (
            borders.detach().double().expand(*logits.shape[:-1], borders.shape[-1])
        )
        self._event_dim = event_dim
        shape = logits.shape[:-1]
        cut = len(shape) - event_dim
        super().__init__(shape[:cut], shape[cut:], validate_args=False)

    @classmethod
    def average(
        cls,
        parts: Sequence[BarDistribution],
        weights: Sequence[float] | None = None,
        borders: Tensor | None = None,
    ) -> BarDistribution:
        """Mixture of bar distributions of the same rows, as one bar distribution.

        Parameters
        ----------
        parts : sequence of BarDistribution
            Members, of one batch shape.
        weights : sequence of float, optional
            Non-negative weights; equal by default.
        borders : Tensor of shape (K + 1,), optional
            Borders of the result. By default those of the first part.

        Returns
        -------
        BarDistribution
            Exact, the arithmetic mean of the densities, where all parts have the borders of the
            result. Otherwise the mean of their probabilities of its buckets, which are differences
            of cumulative distributions: exact at the inner borders.

        Raises
        ------
        DataError
            If there are no parts or their shapes differ.
        """
        if not parts:
            raise DataError("BarDistribution.average: parts is empty.")
        first = parts[0]
        if any(p.batch_shape != first.batch_shape or p._event_dim for p in parts):
            raise DataError(
                "BarDistribution.average: parts must have the same batch shape and no joint event."
            )
        share = torch.ones(len(parts)) if weights is None else torch.as_tensor(weights)
        share = share.to(first.borders) / share.sum()
        target = first.borders if borders is None else borders.to(first.borders)
        target = target.expand(*first.batch_shape, target.shape[-1])
        total = sum(w * p._mass_between(target) for w, p in zip(share, parts, strict=True))
        assert isinstance(total, Tensor)
        averaged = cls(total.log().to(first.logits.dtype), target, validate_args=False)
        averaged.index = first.index
        return averaged

    # -- shape -------------------------------------------------------------------------------

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers; real vectors after :meth:`joint`."""
        return constraints.independent(constraints.real, self._event_dim)

    @property
    def n_buckets(self) -> int:
        """Number of bars."""
        return self.logits.shape[-1]

    @property
    def n_draws(self) -> int:
        """Always 1: the bars are one predictive distribution."""
        return 1

    @property
    def draws(self) -> TorchDistribution:
        """The distribution itself, with a first axis of one draw."""
        return self.expand((1, *self.batch_shape))

    @property
    def _row_axis(self) -> int:
        return super()._row_axis - 1  # the buckets come last

    def _kind(self) -> tuple[Any, ...]:
        return (*super()._kind(), self.n_buckets)

    def _map(self, f: Callable[[Tensor], Tensor], event_dim: int | None = None) -> Self:
        event_dim = self._event_dim if event_dim is None else event_dim
        logits, borders = f(self.logits), f(self.borders)
        return type(self)(logits, borders, event_dim=event_dim, validate_args=False)

    def _rows(self, key: Any) -> Self:
        return self._map(lambda t: t[key])

    def expand(self, batch_shape: Any, _instance: None = None) -> Self:
        """Return the distribution with its batch shape expanded to ``batch_shape``."""
        shape = (*batch_shape, *self.event_shape)
        return self._map(lambda t: t.expand(*shape, t.shape[-1]))

    def joint(self) -> Self:
        """Make the outputs of a row one event: independent, so that their log densities add up.

        Returns
        -------
        BarDistribution
            Batch shape (n,), event shape (m,). A one-output distribution returns itself.
        """
        if self._event_dim or len(self.batch_shape) < 2:
            return self
        return self._regrouped(1)

    def marginal(self) -> Self:
        """Undo :meth:`joint`: one distribution an output, batch shape (n, m)."""
        return self._regrouped(0) if self._event_dim else self

    def _regrouped(self, event_dim: int) -> Self:
        same = self._map(lambda t: t, event_dim)
        same.index = self.index
        return same

    def output(self, j: int) -> Self:
        """Marginal distribution of output ``j`` of batch shape (n, m), batch shape (n,)."""
        return self._map(lambda t: t[..., j, :], event_dim=0)

    def affine(self, shift: Tensor | float, factor: Tensor | float) -> Self:
        """Distribution of ``shift + factor * y``, with ``factor`` > 0: the borders move."""
        if not bool((torch.as_tensor(factor) > 0).all()):
            raise ParameterError("BarDistribution.affine: factor must be > 0.")
        moved = [torch.as_tensor(t, dtype=torch.float64)[..., None] for t in (shift, factor)]
        return self.transformed(lambda b: moved[0] + moved[1] * b)

    def transformed(self, f: Callable[[Tensor], Tensor]) -> Self:
        """Distribution of ``f(y)`` for an increasing ``f``, by moving the borders.

        Exact at the borders: the probabilities of the bars are kept, and the density inside one is
        again uniform, the tails again half-normal.
        """
        borders = self.borders
        shared = _shared(borders)
        moved = f(borders if shared is None else shared)
        same = type(self)(self.logits, moved, event_dim=self._event_dim, validate_args=False)
        same.index = self.index
        return same

    # -- pieces ------------------------------------------------------------------------------

    @cached_property
    def _p(self) -> Tensor:
        return torch.softmax(self.logits.detach().double(), -1)

    @cached_property
    def _below(self) -> Tensor:
        """Probability below each border but the outermost two ends: (*batch, K + 1), 0 to 1."""
        total = self._p.cumsum(-1)
        total = total / total[..., -1:]
        return torch.cat([torch.zeros_like(total[..., :1]), total], -1)

    @property
    def _width(self) -> Tensor:
        return self.borders.diff(dim=-1)

    @property
    def _tails(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """b_1, its scale, b_{K−1}, its scale."""
        b = self.borders
        left = (b[..., 1] - b[..., 0]) / HALF_NORMAL_MEDIAN
        right = (b[..., -1] - b[..., -2]) / HALF_NORMAL_MEDIAN
        return b[..., 1], left, b[..., -2], right

    @property
    def _centres(self) -> Tensor:
        """Mean of each bucket."""
        first, left, last, right = self._tails
        centre = 0.5 * (self.borders[..., 1:] + self.borders[..., :-1])
        centre[..., 0] = first - HALF_NORMAL_MEAN * left
        centre[..., -1] = last + HALF_NORMAL_MEAN * right
        return centre

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self.logits.dtype)

    def _find(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (..., *shape) in float64, their buckets, and an index of the rows of the bars."""
        shape = self.batch_shape + self.event_shape
        value = value.double().to(self.borders.device)
        value = value.expand(torch.broadcast_shapes(value.shape, shape))
        shared = _shared(self.borders)
        if shared is not None:
            return value, bucket_of(shared, value), shared
        lead = value.shape[: value.ndim - len(shape)]
        flat = value.reshape(-1, *shape).movedim(0, -1)
        bucket = bucket_of(self.borders, flat).movedim(-1, 0)
        return value, bucket.reshape(lead + shape), self.borders

    def _at(self, per_bucket: Tensor, bucket: Tensor) -> Tensor:
        """Entries (*shape, K) of each row's bucket (..., *shape)."""
        shape = self.batch_shape + self.event_shape
        if per_bucket.ndim == 1:
            return per_bucket[bucket]
        flat = bucket.reshape(-1, *shape).movedim(0, -1)
        return per_bucket.gather(-1, flat).movedim(-1, 0).reshape(bucket.shape)

    def _mass_between(self, borders: Tensor) -> Tensor:
        """Probability of each bucket of other borders."""
        if borders.shape == self.borders.shape and torch.equal(borders, self.borders):
            return self._p
        # In float64 whatever the logits are: the differences of a rounded cdf lose small buckets.
        inner = self._cdf(borders[..., 1:-1].movedim(-1, 0)).movedim(0, -1)
        zero = torch.zeros_like(inner[..., :1])
        return torch.cat([zero, inner, zero + 1], -1).diff(dim=-1).clamp_min(0)

    # -- moments -----------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """Mean, in target units."""
        return self._cast((self._p * self._centres).sum(-1))

    @property
    def variance(self) -> Tensor:
        """Variance, in squared target units."""
        centre = self._centres
        spread = self._width.square() / 12
        _, left, _, right = self._tails
        spread[..., 0] = (1 - 2 / math.pi) * left.square()
        spread[..., -1] = (1 - 2 / math.pi) * right.square()
        mean = (self._p * centre).sum(-1, keepdim=True)
        return self._cast((self._p * (spread + (centre - mean).square())).sum(-1))

    @property
    def aleatoric(self) -> Tensor:
        """The whole variance: the bars do not tell its sources apart."""
        return self.variance

    @property
    def epistemic(self) -> Tensor:
        """Not known from one predictive distribution: raises NoEpistemicError."""
        raise NoEpistemicError(
            "BarDistribution: the network has integrated its uncertainty about the function into "
            "one predictive distribution, so there is no epistemic part to read off; use a method "
            "with draws (IVON, VBLL, GP) or an ensemble for the split."
        )

    @property
    def mode(self) -> Tensor:
        """Middle of the bar with the highest density; the inner border for a tail."""
        first, _, last, _ = self._tails
        height = self._p / self._width
        height[..., [0, -1]] *= HALF_NORMAL_MEAN * HALF_NORMAL_MEDIAN
        middle = 0.5 * (self.borders[..., 1:] + self.borders[..., :-1])
        middle[..., 0], middle[..., -1] = first, last
        best = height.argmax(-1, keepdim=True)
        return self._cast(middle.gather(-1, best)[..., 0])

    def entropy(self) -> Tensor:
        """Differential entropy in nats, in closed form."""
        p, inside = self._p, self._width.log()
        # Half-normal of scale s = w / c: ½ log(π s² / 2) + ½.
        inside[..., [0, -1]] += 0.5 * math.log(math.pi / 2) - math.log(HALF_NORMAL_MEDIAN) + 0.5
        h = (p * inside - torch.xlogy(p, p)).sum(-1)
        return self._cast(h.sum(-1) if self._event_dim else h)

    # -- density, cdf, quantiles -----------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats (per target unit); a joint event adds its outputs up."""
        value = self._targets("log_prob", value)
        value, bucket, borders = self._find(value)
        log_p = torch.log_softmax(self.logits.double(), -1)
        width = borders.diff(dim=-1)
        inside = -self._at(width.log(), bucket)
        first, left, last, right = self._tails
        constant = math.log(HALF_NORMAL_MEAN * HALF_NORMAL_MEDIAN)
        z = torch.where(bucket == 0, (first - value) / left, (value - last) / right)
        outer = (bucket == 0) | (bucket == self.n_buckets - 1)
        inside = torch.where(outer, inside + constant - 0.5 * z.square(), inside)
        out = self._at(log_p, bucket) + inside
        return self._cast(out.sum(-1) if self._event_dim else out)

    def cdf(self, value: Tensor) -> Tensor:
        """Cumulative distribution of each output."""
        self._need_marginal("cdf")
        value = self._targets("cdf", value)
        return self._cast(self._cdf(value))

    def _cdf(self, value: Tensor) -> Tensor:
        value, bucket, borders = self._find(value)
        start, width = borders[..., :-1], borders.diff(dim=-1)
        p = self._p
        part = (value - self._at(start, bucket)) / self._at(width, bucket)
        middle = self._at(self._below[..., :-1], bucket) + self._at(p, bucket) * part.clamp(0, 1)
        first, left, last, right = self._tails
        root = math.sqrt(0.5)
        low = p[..., 0] * torch.erfc((first - value) / left * root)
        high = 1 - p[..., -1] * torch.erfc((value - last) / right * root)
        return torch.where(
            bucket == 0, low, torch.where(bucket == self.n_buckets - 1, high, middle)
        )

    def quantile(self, q: Tensor | float | Any) -> Tensor:
        """Quantiles in closed form, the inverse of :meth:`cdf`.

        Parameters
        ----------
        q : float or array-like of shape (Q,)
            Levels in (0, 1).

        Returns
        -------
        Tensor
            Shape (n[, m]) for a scalar level, (Q, n[, m]) for Q levels.
        """
        self._need_marginal("quantile")
        levels = check_levels(q).to(self.borders.device)
        flat = levels.reshape(-1, *(1,) * len(self.batch_shape))
        out = self._inverse(flat.expand(-1, *self.batch_shape))
        return self._cast(out.reshape(levels.shape + self.batch_shape))

    def _inverse(self, u: Tensor) -> Tensor:
        """Values whose cdf is ``u`` (S, *batch[, m])."""
        below = self._below
        last_bucket = self.n_buckets - 1
        flat = u.movedim(0, -1).contiguous()
        bucket = torch.searchsorted(below[..., 1:-1].contiguous(), flat, right=True).movedim(-1, 0)
        p = self._at(self._p, bucket)
        # A bucket of probability 0 is found only through rounding; its start is as good as any.
        part = ((u - self._at(below[..., :-1], bucket)) / p.clamp_min(1e-300)).clamp(0, 1)
        width, start = self._width, self.borders[..., :-1]
        middle = self._at(start, bucket) + part * self._at(width, bucket)
        first, left, last, right = self._tails
        tail = torch.where(bucket == 0, u, 1 - u) / (2 * p.clamp_min(1e-300))
        z = torch.special.ndtri(tail.clamp(1e-300, 0.5))
        out = torch.where(bucket == 0, first + left * z, middle)
        return torch.where(bucket == last_bucket, last - right * z, out)

    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets, tails included, by inverting the cdf."""
        sample_shape = torch.Size(sample_shape)
        shape = sample_shape + self.batch_shape + self.event_shape
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device=self.borders.device)
        row = self.batch_shape + self.event_shape
        flat = u.clamp_min(1e-18).reshape(math.prod(sample_shape), *row)
        return self._cast(self._inverse(flat).reshape(shape))

    # -- score -------------------------------------------------------------------------------

    def crps(self, value: Tensor) -> Tensor:
        """Continuous ranked probability score of each output at ``value``, in target units.

        ∫_{−∞}^{y} F² + ∫_y^∞ (1 − F)², in closed form: F is linear in a bar and an error function
        in the tails.
        """
        self._need_marginal("crps")
        value = self._targets("crps", value)
        y = value.expand(self.batch_shape).double().to(self.borders.device)
        first, left, last, right = self._tails
        p = self._p
        # Inner bars: F goes from a to b over the part below y, 1 − F over the part above.
        inner = slice(1, self.n_buckets - 1)
        start, width = self.borders[..., :-1][..., inner], self._width[..., inner]
        a = self._below[..., :-1][..., inner]
        done = ((y[..., None] - start) / width).clamp(0, 1)
        at_y = a + p[..., inner] * done
        b = a + p[..., inner]
        total = (width * done * _mean_square(a, at_y)).sum(-1)
        total = total + (width * (1 - done) * _mean_square(1 - at_y, 1 - b)).sum(-1)
        # From b_1 to b_{K−1} y counts as it is; beyond, the tail that holds it is cut in two.
        total = total + _tail_score((first - y) / (left * math.sqrt(2)), p[..., 0], left)
        total = total + _tail_score((y - last) / (right * math.sqrt(2)), p[..., -1], right)
        return self._cast(total)


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean of t² for t uniform between a and b."""
    return (a * a + a * b + b * b) / 3


def _tail_score(x: Tensor, p: Tensor, scale: Tensor) -> Tensor:
    """Share of one tail in the CRPS; x > 0 where the outcome lies in it, in √2 scales.

    The tail's cdf is p·erfc(t). ∫ p² erfc² outside the outcome, ∫ (1 − p·erfc)² between the
    outcome and the inner border.
    """
    x = x.clamp_min(0)
    root_pi = math.sqrt(math.pi)

    def squared(t: Tensor) -> Tensor:  # antiderivative of erfc²
        c = torch.erfc(t)
        e = torch.exp(-t * t)
        return (
            t * c * c - 2 / root_pi * e * c - math.sqrt(2 / math.pi) * torch.erf(math.sqrt(2) * t)
        )

    def once(t: Tensor) -> Tensor:  # antiderivative of erfc
        return t * torch.erfc(t) - torch.exp(-t * t) / root_pi

    zero = torch.zeros_like(x)
    beyond = p * p * (-math.sqrt(2 / math.pi) - squared(x))
    crossed = p * p * (squared(x) - squared(zero))
    inside = x - 2 * p * (once(x) - once(zero)) + crossed
    return math.sqrt(2) * scale * (beyond + inside)


def _shared(borders: Tensor) -> Tensor | None:
    """The one row of borders (K + 1,) that all rows share, where they do."""
    if borders.ndim == 1:
        return borders
    if any(s != 0 and n > 1 for s, n in zip(borders.stride()[:-1], borders.shape, strict=False)):
        return None
    if 0 in borders.shape:
        return None
    return borders[(0,) * (borders.ndim - 1)]


def _check(logits: Tensor, borders: Tensor) -> None:
    for name, t in (("logits", logits), ("borders", borders)):
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.ndim < 1:
            raise DataError(f"BarDistribution: {name} must be a tensor of real numbers.")
    n_buckets = logits.shape[-1]
    if n_buckets < 2 or borders.shape[-1] != n_buckets + 1:
        raise DataError(
            f"BarDistribution: K buckets need K + 1 borders and K >= 2; logits have the shape "
            f"{tuple(logits.shape)}, borders {tuple(borders.shape)}."
        )
    try:
        torch.broadcast_shapes(borders.shape[:-1], logits.shape[:-1])
    except RuntimeError as error:
        raise DataError(
            f"BarDistribution: borders of shape {tuple(borders.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}."
        ) from error
    if not bool(borders.isfinite().all()) or not bool((borders.diff(dim=-1) > 0).all()):
        raise DataError("BarDistribution: borders must be finite and increase.")
    top = logits.detach().amax(-1)
    if not bool(top.isfinite().all()):
        raise DataError("BarDistribution: logits hold NaN or +inf, or a row of only -inf.")

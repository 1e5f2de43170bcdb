"""Borders of bar distributions, and their log density as plain functions, for training."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from uq.errors import DataError, ParameterError

BorderRule = Literal["equal_mass", "equal_width", "fine_tails"]
BORDER_RULES = ("equal_mass", "equal_width", "fine_tails")

HALF_NORMAL_MEDIAN = 0.6744897501960817
HALF_NORMAL_MEAN = math.sqrt(2 / math.pi)
_TAIL_BUCKETS = 8  # of each side, under "fine_tails"
_TAIL_LEVEL = 1e-5


def bar_borders(values: Tensor, n_buckets: int, rule: BorderRule = "equal_width") -> Tensor:
    """Borders of a bar distribution for targets like ``values``.

    Parameters
    ----------
    values : Tensor of shape (N,)
        Targets drawn from the prior, many more than ``n_buckets``.
    n_buckets : int
        Buckets wanted, at least 2. Their width should stay below the smallest predictive standard
        deviation: a histogram cannot be narrower than a bar.
    rule : {"equal_width", "equal_mass", "fine_tails"}, default="equal_width"
        "equal_width": equal widths between the 0.1 % and the 99.9 % quantile, for targets that are
        nearly normal. "equal_mass": equal probabilities, for skewed ones. "fine_tails": equal
        probabilities with 8 more borders a side, down to a tail of probability 1e-5, for targets
        with heavy tails, whose outer bars would otherwise be half-normals that are far too narrow.

    Returns
    -------
    Tensor of shape (K + 1,)
        float64, increasing. K is smaller than ``n_buckets`` where values repeat. The outermost
        borders are the medians of the tails beyond their neighbours, as the half-normals want.

    Raises
    ------
    ParameterError
        If there are fewer than 2 buckets, or the rule is unknown.
    DataError
        If the values are not finite, or have fewer than 3 distinct quantiles.
    """
    if n_buckets < 2:
        raise ParameterError(f"n_buckets must be at least 2, got {n_buckets!r}.")
    if rule not in BORDER_RULES:
        raise ParameterError(f"border_rule must be one of {BORDER_RULES}, got {rule!r}.")
    values = values.detach().double().reshape(-1)
    if not len(values) or not bool(values.isfinite().all()):
        raise DataError("bar_borders: values must be finite targets, at least one.")
    values = values.sort().values
    if rule == "equal_width":
        low, high = _quantiles(values, torch.tensor([1e-3, 1 - 1e-3]))
        inner = torch.linspace(float(low), float(high), n_buckets - 1, dtype=torch.float64)
        below = float((values < low).double().mean())
        above = float((values > high).double().mean())
        ends = torch.tensor([0.5 * below, 1 - 0.5 * above], dtype=torch.float64)
    else:
        levels = torch.arange(1, n_buckets, dtype=torch.float64) / n_buckets
        if rule == "fine_tails" and n_buckets > 4 * _TAIL_BUCKETS:
            n_middle = n_buckets - 2 * _TAIL_BUCKETS
            middle = torch.arange(1, n_middle, dtype=torch.float64) / n_middle
            ratio = torch.linspace(0, 1, _TAIL_BUCKETS + 1, dtype=torch.float64)[1:]
            tail = middle[0] * (_TAIL_LEVEL / middle[0]) ** ratio
            levels = torch.cat([tail.flip(0), middle, 1 - tail])
        inner = _quantiles(values, levels)
        ends = torch.stack([0.5 * levels[0], 1 - 0.5 * (1 - levels[-1])])
    first, last = _quantiles(values, ends)
    borders = torch.unique(torch.cat([first[None], inner, last[None]]))
    if len(borders) < 3:
        raise DataError(
            "bar_borders: values have fewer than 3 distinct quantiles, so there are no 2 buckets "
            "to tell apart; is the prior's target discrete or constant?"
        )
    return borders


def _quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of sorted values; torch.quantile refuses more than 16 million."""
    position = levels.double() * (len(values) - 1)
    low = position.floor().long().clamp(0, len(values) - 1)
    high = (low + 1).clamp_max(len(values) - 1)
    return values[low] + (position - low) * (values[high] - values[low])


def bar_loss(logits: Tensor, borders: Tensor, value: Tensor) -> Tensor:
    """Negative log density of bar distributions with the same borders, in nats.

    The gradient with respect to the logits is softmax(logits) minus the one-hot bucket.

    Parameters
    ----------
    logits : Tensor of shape (..., K)
        Unnormalised log probabilities of the buckets.
    borders : Tensor of shape (K + 1,)
        Increasing borders, in target units.
    value : Tensor of shape (...,)
        Targets.
    """
    bucket = bucket_of(borders, value)
    log_p = torch.log_softmax(logits, -1).gather(-1, bucket[..., None])[..., 0]
    return -(log_p + _log_density_within(borders, value, bucket))


def bucket_of(borders: Tensor, value: Tensor) -> Tensor:
    """Bucket that holds each value: shared borders (K + 1,), or a row of them a row of values."""
    inner = borders[..., 1:-1]
    if inner.ndim > 1:  # one row of borders a row of values
        return torch.searchsorted(inner.contiguous(), value.contiguous(), right=True)
    return torch.searchsorted(inner.contiguous(), value.contiguous().to(inner.dtype), right=True)


def _log_density_within(borders: Tensor, value: Tensor, bucket: Tensor) -> Tensor:
    """Log density at ``value`` given its bucket; shared borders (K + 1,)."""
    width = borders.diff()
    n = len(width)
    at = width[bucket].log().neg().to(value.dtype)
    z_left = (borders[1] - value) * (HALF_NORMAL_MEDIAN / width[0])
    z_right = (value - borders[-2]) * (HALF_NORMAL_MEDIAN / width[-1])
    constant = math.log(HALF_NORMAL_MEAN * HALF_NORMAL_MEDIAN)
    at = torch.where(bucket == 0, at + constant - 0.5 * z_left.square(), at)
    return torch.where(bucket == n - 1, at + constant - 0.5 * z_right.square(), at)

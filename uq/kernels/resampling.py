"""Resampling of weighted particles and their gathering, batched over runs: two launches.

As :mod:`uq.inference.resampling`, whose definitions these are, with counted noise: place i of run r
draws word 0 at (c0 = i, c1 = r) of stream 3 (:mod:`uq.kernels.philox`), and systematic and residual
resampling that of i = 0. Place i takes the first particle whose threshold exceeds its point,

    systematic    T = nC,   i + U          stratified    T = nC,  i + U_i
    multinomial   T = nC,   ordered        residual      T = copies up to k,  i

with C the cumulative weight. Sums are in float64: in float32 a few per cent of the ancestors of 10⁴
particles are wrong, and nearly all of 10⁶. Nothing waits for the device: a run that needs no
resampling gets the ancestors 0 … S − 1. Ancestors have no gradient.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from uq.errors import DataError, ParameterError
from uq.kernels.dispatch import block, cdiv, use_triton
from uq.kernels.philox import Purpose, unit64, words

SCHEMES = ("systematic", "stratified", "residual", "multinomial")
_STREAM = Purpose.RESAMPLING << 24
# Particles of a tile; a program takes as many sums of tiles at most.
TILE = 4096
# Particles of a run that one program goes through, tile by tile: that saves launches, and lasts
# about as long as one. Larger runs are spread over the device.
RUN = 16384
# Places of a program that searches.
PLACES = 256


class Normalized(NamedTuple):
    """Normalised weights of each run; see :func:`normalize`."""

    log_weights: Tensor
    log_sum: Tensor
    ess: Tensor
    degenerate: Tensor


class Resampled(NamedTuple):
    """What :func:`resample` gives."""

    ancestors: Tensor
    """Shape (…, n), int64, increasing."""
    log_weights: Tensor
    """Shape (…, n), float64: −log n, or the normalised ones of a run that was not resampled."""
    resampled: Tensor
    """Shape (…), bool."""
    values: Tensor | None
    """Values of the ancestors, shape ``(…, n, *extra)``."""
    weights: Normalized
    """Of what came in."""


def normalize(log_weights: Tensor) -> Normalized:
    """Normalise log weights over the last axis, in one launch.

    Parameters
    ----------
    log_weights : Tensor of shape (…, S)
        NaN and +inf count as weight 0. A run without any weight gets equal ones, ``log_sum`` −inf
        and the mark ``degenerate``.
    """
    flat = _runs(log_weights)
    log_w, ess, log_sum, dead = torch.ops.uq.normalize_particles(flat)
    lead = log_weights.shape[:-1]
    return Normalized(
        log_w.view(log_weights.shape), log_sum.view(lead), ess.view(lead), dead.view(lead)
    )


def resample(
    log_weights: Tensor,
    scheme: str,
    seed: int | Tensor,
    *,
    step: int = 0,
    n: int | None = None,
    threshold: float | None = None,
    values: Tensor | None = None,
) -> Resampled:
    """Draw ancestors in proportion to the weights, and gather what belongs to them.

    Parameters
    ----------
    log_weights : Tensor of shape (…, S)
        Up to a constant; leading axes are independent runs. S below 2²⁴ on a GPU.
    scheme : {"systematic", "stratified", "residual", "multinomial"}
    seed : int or Tensor of shape (), int64
        A tensor on the device of the weights is read there.
    step : int, default=0
        Number of the resampling, below 2³²: each needs its own.
    n : int, optional
        Number to draw; S by default.
    threshold : float, optional
        Resample only the runs whose effective sample size is at most ``threshold`` · S; needs
        n = S. By default all.
    values : Tensor of shape ``(…, S, *extra)``, optional
        What belongs to the particles.

    Returns
    -------
    Resampled

    Raises
    ------
    ParameterError, DataError
        For arguments that do not fit.

    Examples
    --------
    >>> import torch
    >>> from uq.kernels.resampling import resample
    >>> resample(torch.tensor([0.5, 0.0, 0.25, 0.25]).log(), "systematic", seed=1).ancestors
    tensor([0, 0, 2, 3])
    """
    if scheme not in SCHEMES:
        raise ParameterError(
            f"resample: scheme must be one of {', '.join(map(repr, SCHEMES))}, got {scheme!r}."
        )
    flat = _runs(log_weights)
    lead, size = log_weights.shape[:-1], log_weights.shape[-1]
    n = size if n is None else n
    if not 1 <= n < 1 << 31 or not 0 <= step < 1 << 32:
        raise ParameterError(
            f"resample: n must be from 1 to 2^31 − 1 and step below 2^32, got {n!r} and {step!r}."
        )
    if threshold is not None and n != size:
        raise ParameterError(
            f"resample: with a threshold n must be the number of particles, got {n} of {size}."
        )
    extra: tuple[int, ...] = ()
    rows = None
    if values is not None:
        if values.shape[: log_weights.ndim] != log_weights.shape:
            raise DataError(
                f"resample: values must begin with the shape {tuple(log_weights.shape)} of the "
                f"weights, got {tuple(values.shape)}."
            )
        extra = tuple(values.shape[log_weights.ndim :])
        rows = values.detach().reshape(*flat.shape, math.prod(extra))
    at = seed if isinstance(seed, Tensor) else None
    number = 0 if isinstance(seed, Tensor) else _signed(seed)
    # ess <= S always: a limit of infinity resamples every run.
    limit = math.inf if threshold is None or threshold >= 1 else threshold * size
    found = torch.ops.uq.resample_particles(flat, scheme, at, number, step, n, limit, rows)
    chosen, log_w, drawn, taken, old, ess, log_sum, dead = found
    return Resampled(
        chosen.view(*lead, n),
        log_w.view(*lead, n),
        drawn.view(lead),
        None if values is None else taken.view(*lead, n, *extra),
        Normalized(
            old.view(log_weights.shape), log_sum.view(lead), ess.view(lead), dead.view(lead)
        ),
    )


def take(values: Tensor, ancestors: Tensor) -> Tensor:
    """Rows of values ``(…, S, *extra)`` at ancestors (…, n), in one launch.

    An index that is not one gives zeros on a GPU, and an error elsewhere.
    """
    lead = ancestors.shape[:-1]
    if ancestors.dtype != torch.int64 or values.shape[: len(lead)] != lead:
        raise DataError(
            "take: needs int64 ancestors (…, n) for values (…, S, *extra), got "
            f"{tuple(ancestors.shape)} of {ancestors.dtype} for {tuple(values.shape)}."
        )
    size, n = values.shape[len(lead)], ancestors.shape[-1]
    extra = tuple(values.shape[len(lead) + 1 :])
    runs = math.prod(lead)
    rows = values.reshape(runs, size, math.prod(extra))
    return torch.ops.uq.take_particles(rows, ancestors.reshape(runs, n)).view(*lead, n, *extra)


def _runs(log_weights: Tensor) -> Tensor:
    if log_weights.ndim < 1 or log_weights.shape[-1] < 1 or not log_weights.is_floating_point():
        raise DataError(
            "log_weights must be a floating-point tensor (…, S) of at least one particle, got "
            f"shape {tuple(log_weights.shape)} of {log_weights.dtype}."
        )
    if log_weights.shape[-1] >= 1 << 31:
        raise DataError(f"log_weights: at most 2^31 − 1 particles, got {log_weights.shape[-1]}.")
    return log_weights.detach().reshape(-1, log_weights.shape[-1]).contiguous()


def _signed(seed: int) -> int:
    seed &= (1 << 64) - 1
    return seed - (seed >> 63 << 64)


# -- operators ---------------------------------------------------------------------------------


@torch.library.custom_op("uq::normalize_particles", mutates_args=())
def _normalize(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _on_kernels(log_weights, 1):
        out = _Buffers(log_weights)
        _thresholds(out, -1, None, 0, 0, 1)
        return out.log_w, out.ess, out.log_sum, out.degenerate
    return _reference_weights(log_weights)[1:]


@_normalize.register_fake
def _(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_weights(log_weights)


def _fake_weights(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one = x.new_empty(len(x), dtype=torch.float64)
    log_w = torch.empty_like(x, dtype=torch.float64)
    return log_w, one, torch.empty_like(one), one.new_empty(len(x), dtype=torch.bool)


_Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("uq::resample_particles", mutates_args=())
def _resample(
    log_weights: Tensor,
    scheme: str,
    seed_at: Tensor | None,
    seed: int,
    step: int,
    n: int,
    limit: float,
    values: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _on_kernels(log_weights, n + 1):
        return _resample_triton(log_weights, scheme, seed_at, seed, step, n, limit, values)
    return _resample_reference(log_weights, scheme, seed_at, seed, step, n, limit, values)


@_resample.register_fake
def _(
    log_weights: Tensor,
    scheme: str,
    seed_at: Tensor | None,
    seed: int,
    step: int,
    n: int,
    limit: float,
    values: Tensor | None,
) -> _Eight:
    old, ess, log_sum, dead = _fake_weights(log_weights)
    chosen = log_weights.new_empty(len(log_weights), n, dtype=torch.int64)
    new = torch.empty_like(chosen, dtype=torch.float64)
    drawn = torch.empty_like(dead)
    return chosen, new, drawn, _place_for(values, log_weights, n), old, ess, log_sum, dead


def _place_for(values: Tensor | None, log_weights: Tensor, n: int) -> Tensor:
    if values is None:
        return log_weights.new_empty(0)
    return values.new_empty(len(values), n, values.shape[-1])


@torch.library.custom_op("uq::take_particles", mutates_args=())
def _take(values: Tensor, ancestors: Tensor) -> Tensor:
    if not use_triton(values, ancestors):
        return values.gather(1, ancestors[..., None].expand(-1, -1, values.shape[-1]))
    from uq.kernels.resampling_triton import take_kernel

    values, ancestors = values.contiguous(), ancestors.contiguous()
    (runs, size, width), n = values.shape, ancestors.shape[-1]
    taken = values.new_empty(runs, n, width)
    if taken.numel():
        columns = block(width, 1, 64)
        take_kernel[(runs * cdiv(n, PLACES),)](
            values, ancestors, taken, size, n, cdiv(n, PLACES), width, BLOCK=PLACES, COLUMNS=columns
        )
    return taken


@_take.register_fake
def _(values: Tensor, ancestors: Tensor) -> Tensor:
    return values.new_empty(len(values), ancestors.shape[-1], values.shape[-1])


def _on_kernels(log_weights: Tensor, n: int) -> bool:
    """Whether Triton runs here, and a run's tiles fit one program."""
    return max(n, log_weights.shape[-1]) <= TILE * TILE and use_triton(log_weights)


# -- Triton ------------------------------------------------------------------------------------


class _Buffers:
    """What the kernels of a call write."""

    def __init__(self, log_weights: Tensor) -> None:
        self.log_weights = log_weights
        runs, self.size = log_weights.shape
        self.runs = runs

        def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=log_weights.device)

        self.new = new
        self.log_w = new(runs, self.size)
        self.ess, self.log_sum = new(runs), new(runs)
        self.degenerate = new(runs, dtype=torch.bool)
        self.thresholds = self.points = self.ess


def _thresholds(
    out: _Buffers, scheme: int, seed_at: Tensor | None, seed: int, step: int, n: int
) -> None:
    """Weights and, unless the scheme is negative, thresholds and points."""
    from uq.kernels import resampling_triton as kernels

    runs, size, x = out.runs, out.size, out.log_weights
    if scheme >= 0:
        out.thresholds = out.new(runs, size)
    multinomial = scheme == SCHEMES.index("multinomial")
    if multinomial:
        out.points = out.new(runs, n)
    if not runs:
        return
    noise = (out.ess if seed_at is None else seed_at, seed, int(_STREAM), step)
    pointer = seed_at is not None
    dead = out.degenerate.view(torch.int8)
    written = (out.log_w, out.ess, out.log_sum, dead, out.thresholds)
    if size <= RUN and (not multinomial or n < RUN):
        kernels.run_kernel[(runs,)](
            x, *written, out.points, *noise, size, n,
            POINTER=pointer, SCHEME=scheme, BLOCK=block(size, 16, TILE),
            PLACES=block(n + 1, 16, TILE), num_warps=8,
        )  # fmt: skip
        return
    n_tiles = cdiv(size, TILE)
    tiles, grid = block(n_tiles, 2, TILE), (runs * n_tiles,)
    tops, sums, squares, wholes, parts = (out.new(runs, n_tiles) for _ in range(5))
    kernels.tile_max_kernel[grid](x, tops, size, n_tiles, BLOCK=TILE, num_warps=8)
    kernels.tile_sum_kernel[grid](
        x, tops, sums, squares, size, n_tiles, BLOCK=TILE, TILES=tiles, num_warps=8
    )
    if scheme == SCHEMES.index("residual"):
        kernels.tile_parts_kernel[grid](
            x, tops, sums, wholes, parts, size, n, n_tiles, BLOCK=TILE, TILES=tiles, num_warps=8
        )
    kernels.tile_kernel[grid](
        x, tops, sums, squares, wholes, parts, *written, *noise, size, n, n_tiles,
        POINTER=pointer, SCHEME=scheme, BLOCK=TILE, TILES=tiles, num_warps=8,
    )  # fmt: skip
    if multinomial:
        n_tiles = cdiv(n + 1, TILE)
        tiles, grid = block(n_tiles, 2, TILE), (runs * n_tiles,)
        times = out.new(runs, n_tiles)
        kernels.time_sum_kernel[grid](
            times, *noise, n, n_tiles, POINTER=pointer, BLOCK=TILE, num_warps=8
        )
        kernels.time_kernel[grid](
            times, out.points, *noise, n, n_tiles,
            POINTER=pointer, BLOCK=TILE, TILES=tiles, num_warps=8,
        )  # fmt: skip


def _resample_triton(
    log_weights: Tensor,
    scheme: str,
    seed_at: Tensor | None,
    seed: int,
    step: int,
    n: int,
    limit: float,
    values: Tensor | None,
) -> _Eight:
    from uq.kernels.resampling_triton import search_kernel

    out, code = _Buffers(log_weights), SCHEMES.index(scheme)
    if seed_at is not None:
        use_triton(log_weights, seed_at)  # on one device
    _thresholds(out, code, seed_at, seed, step, n)
    runs, size = out.runs, out.size
    always = math.isinf(limit)
    chosen = out.new(runs, n, dtype=torch.int64)
    drawn = out.new(runs, dtype=torch.bool)
    new = out.new(runs, n)
    if values is not None:
        values = values.contiguous()
    taken = _place_for(values, log_weights, n)
    width = 1 if values is None else values.shape[-1]
    n_tiles = cdiv(n, PLACES)
    if runs:
        search_kernel[(runs * n_tiles,)](
            out.thresholds, out.points, out.log_w, out.ess, chosen, new, drawn.view(torch.int8),
            out.ess if values is None else values, taken,
            out.ess if seed_at is None else seed_at, seed, int(_STREAM), step,
            size, n, n_tiles, struct.unpack("q", struct.pack("d", limit))[0], width,
            POINTER=seed_at is not None, SCHEME=code, ALWAYS=always,
            GATHER=values is not None and taken.numel() > 0,
            STEPS=size.bit_length() + 1, BLOCK=PLACES, COLUMNS=block(width, 1, 64),
        )  # fmt: skip
    return (
        chosen, new, drawn, taken,
        out.log_w, out.ess, out.log_sum, out.degenerate,
    )  # fmt: skip


# -- reference ---------------------------------------------------------------------------------


def _reference_weights(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights over the largest, and what :func:`normalize` gives."""
    inf = math.inf
    x = torch.nan_to_num(log_weights.double(), nan=-inf, posinf=-inf, neginf=-inf)
    top = x.amax(-1, keepdim=True)
    dead = top == -inf
    x = x.masked_fill(dead, 0.0)
    top = top.masked_fill(dead, 0.0)
    w = (x - top).exp()
    total = w.sum(-1, keepdim=True)
    log_total = top + total.log()
    ess = total.square() / w.square().sum(-1, keepdim=True)
    log_sum = log_total.masked_fill(dead, -inf)
    return w, x - log_total, ess[:, 0], log_sum[:, 0], dead[:, 0]


def _rising(w: Tensor) -> Tensor:
    """Cumulative sum that stays where w is zero."""
    return torch.where(w > 0, w.cumsum(-1), 0.0).cummax(-1).values


def _from_last(w: Tensor) -> Tensor:
    """Whether no later weight is positive."""
    k = torch.arange(w.shape[-1], device=w.device)
    return k >= torch.where(w > 0, k, -1).amax(-1, keepdim=True)


def _resample_reference(
    log_weights: Tensor,
    scheme: str,
    seed_at: Tensor | None,
    seed: int,
    step: int,
    n: int,
    limit: float,
    values: Tensor | None,
) -> _Eight:
    w, log_w, ess, log_sum, dead = _reference_weights(log_weights)
    runs = len(w)
    key = seed if seed_at is None else int(seed_at)
    run = torch.arange(runs, device=w.device)[:, None]

    def draw(count: int) -> Tensor:
        return unit64(words(key, torch.arange(count, device=w.device), run, _STREAM, step)[0])

    place = torch.arange(n, dtype=torch.float64, device=w.device).expand(runs, n)
    if scheme == "residual":
        expected = w * (n / w.sum(-1, keepdim=True))
        whole = expected.floor()
        part = expected - whole
        certain = whole.cumsum(-1)
        rest = n - certain[:, -1:]
        c = _rising(part)
        share = (c / c[:, -1:]).nan_to_num(nan=0.0)
        below = (rest * share - draw(1)).ceil().clamp(min=0).minimum(rest)
        thresholds = certain + torch.where((rest * share >= rest) | _from_last(part), rest, below)
        points = place.contiguous()
    else:
        c = _rising(w)
        thresholds = (n * (c / c[:, -1:])).masked_fill(_from_last(w), 2.0 * n + 2)
        if scheme == "multinomial":
            arrivals = (-draw(n + 1).log()).cumsum(-1)
            points = n * (arrivals[:, :n] / arrivals[:, n:])
        else:
            points = place + draw(1 if scheme == "systematic" else n)
    chosen = torch.searchsorted(thresholds, points, right=True).clamp_(max=w.shape[-1] - 1)
    drawn = ess <= limit
    new = torch.full((runs, n), -math.log(n), dtype=torch.float64, device=w.device)
    if not math.isinf(limit):
        chosen = torch.where(drawn[:, None], chosen, torch.arange(n, device=w.device))
        new = torch.where(drawn[:, None], new, log_w)
    taken = _place_for(values, log_weights, n)
    if values is not None:
        taken = values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))
    return chosen, new, drawn, taken, log_w, ess, log_sum, dead

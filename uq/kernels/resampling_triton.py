"""Triton kernels of :mod:`uq.kernels.resampling`; imported only where Triton runs.

Up to 4096 particles a program has a run to itself: one launch forms the thresholds T, the next
searches them and gathers. Beyond, tiles of a run are summed first, and each adds what comes before
it. Sums are in float64.

A parallel sum need not increase where a weight is small, and may change where it is zero. So the
cumulative weight of a particle of weight zero is set to that of the one before, and from the last
positive weight on the threshold lies above every point.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from uq.kernels.philox_triton import uniform64, words4

SYSTEMATIC = tl.constexpr(0)
STRATIFIED = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)
MULTINOMIAL = tl.constexpr(3)
NUMBERS = ["seed", "stream", "step", "n_particles", "n", "n_tiles", "threshold", "n_values"]


@triton.jit
def _larger(a: Any, b: Any) -> Any:
    return tl.maximum(a, b)


@triton.jit
def _rising(c: Any) -> Any:
    return tl.associative_scan(c, 0, _larger)


@triton.jit
def _load(log_weights: Any, run: Any, k: Any, n_particles: Any) -> Any:
    """Log weights in float64, with −inf for NaN and +inf."""
    n_particles = n_particles.to(tl.int64)
    at = log_weights + run * n_particles + k
    x = tl.load(at, mask=k < n_particles, other=-float("inf")).to(tl.float64)
    return tl.where((x != x) | (x == float("inf")), -float("inf"), x)


@triton.jit
def _weights(x: Any, top: Any, k: Any, n_particles: Any) -> Any:
    """Weights over the largest; 1 where all are zero, and 0 beyond the particles."""
    dead = top == -float("inf")
    w = tl.exp(x - tl.where(dead, 0.0, top))
    w = tl.where(dead, 1.0, w)
    return tl.where(k < n_particles, w, 0.0)


@triton.jit
def _uniform(seed: Any, i: Any, run: Any, stream: Any, step: Any) -> Any:
    word, _, _, _ = words4(seed, i, run, stream, step)
    return uniform64(word)


@triton.jit
def _seed(seed_at: Any, seed: Any, POINTER: tl.constexpr) -> Any:
    if POINTER:
        return tl.load(seed_at)
    else:
        return seed


@triton.jit
def _row(sums: Any, run: Any, tile: Any, n_tiles: Any, TILES: tl.constexpr) -> Any:
    """Sum of the tiles before ``tile``, with it, and of all; and whether a later one is positive."""
    t = tl.arange(0, TILES)
    v = tl.load(sums + run * n_tiles + t, mask=t < n_tiles, other=0.0)
    c = _rising(tl.where(v > 0, tl.cumsum(v, 0), 0.0))
    before = tl.max(tl.where(t < tile, c, 0.0), 0)
    upto = tl.max(tl.where(t <= tile, c, 0.0), 0)
    later = tl.max(tl.where(t > tile, v, 0.0), 0)
    return before, upto, tl.max(c, 0), later


@triton.jit
def _cumulative(w: Any, before: Any, upto: Any) -> Any:
    c = tl.minimum(before + tl.cumsum(w, 0), upto)
    return _rising(tl.where(w > 0, c, before))


@triton.jit
def _last(w: Any, k: Any) -> Any:
    """Place of the last positive weight, −1 if there is none."""
    return tl.max(tl.where(w > 0, k, -1), 0)


@triton.jit
def _plain(w: Any, k: Any, n: Any, before: Any, upto: Any, total: Any, later: Any) -> Any:
    """Thresholds n·C."""
    t = n * (_cumulative(w, before, upto) / total)
    return tl.where((later == 0) & (k >= _last(w, k)), 2.0 * n + 2.0, t)


@triton.jit
def _residual(
    whole: Any, part: Any, k: Any, n: Any, u: Any, whole_before: Any, whole_total: Any,
    before: Any, upto: Any, total: Any, later: Any,
) -> Any:  # fmt: skip
    """Numbers of copies up to each particle: certain ones, and points of the rest below it."""
    certain = whole_before + tl.cumsum(whole, 0)
    rest = n - whole_total
    t = rest * (_cumulative(part, before, upto) / tl.where(total > 0, total, 1.0))
    full = (t >= rest) | ((later == 0) & (k >= _last(part, k)))
    points = tl.maximum(tl.ceil(t - u), 0.0)
    return certain + tl.where(full, rest, tl.minimum(points, rest))


@triton.jit
def _finish(
    log_w: Any, ess: Any, log_sum: Any, degenerate: Any, x: Any, top: Any, total: Any, squares: Any,
    run: Any, k: Any, n_particles: Any, first: Any,
) -> None:  # fmt: skip
    """Write what :func:`uq.kernels.resampling.normalize` gives."""
    dead = top == -float("inf")
    log_total = tl.where(dead, 0.0, top) + tl.log(total)
    x = tl.where(dead, 0.0, x)
    n_particles = n_particles.to(tl.int64)
    tl.store(log_w + run * n_particles + k, x - log_total, mask=k < n_particles)
    tl.store(ess + run, total * total / squares, mask=first)
    tl.store(log_sum + run, tl.where(dead, -float("inf"), log_total), mask=first)
    tl.store(degenerate + run, dead.to(tl.int8), mask=first)


@triton.jit(do_not_specialize=NUMBERS)
def run_kernel(
    log_weights: Any, log_w: Any, ess: Any, log_sum: Any, degenerate: Any, thresholds: Any,
    points: Any, seed_at: Any, seed: Any, stream: Any, step: Any, n_particles: Any, n: Any,
    POINTER: tl.constexpr, SCHEME: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
) -> None:  # fmt: skip
    """All of a run that fits a program. A negative scheme normalises only."""
    run = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = _load(log_weights, run, k, n_particles)
    top = tl.max(x, 0)
    w = _weights(x, top, k, n_particles)
    total = tl.sum(w, 0)
    _finish(
        log_w, ess, log_sum, degenerate, x, top, total, tl.sum(w * w, 0), run, k, n_particles, True
    )
    if SCHEME >= 0:
        key = _seed(seed_at, seed, POINTER)
        count = n.to(tl.float64)
        zero = 0.0 * total
        if SCHEME == RESIDUAL:
            expected = w * (count / total)
            whole = tl.floor(expected)
            part = expected - whole
            u = tl.max(_uniform(key, k * 0, run, stream, step), 0)
            # Sums of parts in the order of the scan, of which the last is the largest.
            all_parts = tl.max(tl.cumsum(part, 0), 0)
            t = _residual(
                whole, part, k, count, u, zero, tl.sum(whole, 0), zero, all_parts, all_parts, zero
            )
        else:
            sum_of_scan = tl.max(tl.cumsum(w, 0), 0)
            t = _plain(w, k, count, zero, sum_of_scan, sum_of_scan, zero)
        n_all = n_particles.to(tl.int64)
        tl.store(thresholds + run * n_all + k, t, mask=k < n_all)
        if SCHEME == MULTINOMIAL:
            i = tl.arange(0, PLACES)
            times = -tl.log(_uniform(key, i, run, stream, step))
            arrivals = tl.cumsum(tl.where(i <= n, times, 0.0), 0)
            at = points + run * n.to(tl.int64) + i
            tl.store(at, count * (arrivals / tl.max(arrivals, 0)), mask=i < n)


@triton.jit(do_not_specialize=NUMBERS)
def tile_max_kernel(
    log_weights: Any, tops: Any, n_particles: Any, n_tiles: Any, BLOCK: tl.constexpr
) -> None:
    run, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    k = tile * BLOCK + tl.arange(0, BLOCK)
    x = _load(log_weights, run, k, n_particles)
    tl.store(tops + tl.program_id(0), tl.max(x, 0))


@triton.jit
def _top(tops: Any, run: Any, n_tiles: Any, TILES: tl.constexpr) -> Any:
    t = tl.arange(0, TILES)
    return tl.max(tl.load(tops + run * n_tiles + t, mask=t < n_tiles, other=-float("inf")), 0)


@triton.jit(do_not_specialize=NUMBERS)
def tile_sum_kernel(
    log_weights: Any, tops: Any, sums: Any, squares: Any, n_particles: Any, n_tiles: Any,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    run, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    k = tile * BLOCK + tl.arange(0, BLOCK)
    x = _load(log_weights, run, k, n_particles)
    w = _weights(x, _top(tops, run, n_tiles, TILES), k, n_particles)
    tl.store(sums + tl.program_id(0), tl.sum(w, 0))
    tl.store(squares + tl.program_id(0), tl.sum(w * w, 0))


@triton.jit(do_not_specialize=NUMBERS)
def tile_parts_kernel(
    log_weights: Any, tops: Any, sums: Any, wholes: Any, parts: Any, n_particles: Any, n: Any,
    n_tiles: Any, BLOCK: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """Certain copies of a tile, and what is left of its expected ones."""
    run, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    k = tile * BLOCK + tl.arange(0, BLOCK)
    x = _load(log_weights, run, k, n_particles)
    w = _weights(x, _top(tops, run, n_tiles, TILES), k, n_particles)
    _, _, total, _ = _row(sums, run, tile, n_tiles, TILES)
    expected = w * (n.to(tl.float64) / total)
    whole = tl.floor(expected)
    tl.store(wholes + tl.program_id(0), tl.sum(whole, 0))
    tl.store(parts + tl.program_id(0), tl.sum(expected - whole, 0))


@triton.jit(do_not_specialize=NUMBERS)
def tile_kernel(
    log_weights: Any, tops: Any, sums: Any, squares: Any, wholes: Any, parts: Any,
    log_w: Any, ess: Any, log_sum: Any, degenerate: Any, thresholds: Any,
    seed_at: Any, seed: Any, stream: Any, step: Any, n_particles: Any, n: Any, n_tiles: Any,
    POINTER: tl.constexpr, SCHEME: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """What ``run_kernel`` writes, for a tile of a run."""
    run, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    k = tile * BLOCK + tl.arange(0, BLOCK)
    x = _load(log_weights, run, k, n_particles)
    top = _top(tops, run, n_tiles, TILES)
    w = _weights(x, top, k, n_particles)
    before, upto, total, later = _row(sums, run, tile, n_tiles, TILES)
    _, _, all_squares, _ = _row(squares, run, tile, n_tiles, TILES)
    _finish(
        log_w, ess, log_sum, degenerate, x, top, total, all_squares, run, k, n_particles, tile == 0
    )
    if SCHEME >= 0:
        count = n.to(tl.float64)
        if SCHEME == RESIDUAL:
            expected = w * (count / total)
            whole = tl.floor(expected)
            key = _seed(seed_at, seed, POINTER)
            u = tl.max(_uniform(key, k * 0, run, stream, step), 0)
            whole_before, _, whole_total, _ = _row(wholes, run, tile, n_tiles, TILES)
            before, upto, total, later = _row(parts, run, tile, n_tiles, TILES)
            t = _residual(
                whole, expected - whole, k, count, u, whole_before, whole_total,
                before, upto, total, later,
            )  # fmt: skip
        else:
            t = _plain(w, k, count, before, upto, total, later)
        n_all = n_particles.to(tl.int64)
        tl.store(thresholds + run * n_all + k, t, mask=k < n_all)


@triton.jit(do_not_specialize=NUMBERS)
def time_sum_kernel(
    sums: Any, seed_at: Any, seed: Any, stream: Any, step: Any, n: Any, n_tiles: Any,
    POINTER: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Sum of a tile of the n + 1 waiting times whose arrivals are ordered uniforms."""
    run, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    i = tile * BLOCK + tl.arange(0, BLOCK)
    u = _uniform(_seed(seed_at, seed, POINTER), i, run, stream, step)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(i <= n, -tl.log(u), 0.0), 0))


@triton.jit(do_not_specialize=NUMBERS)
def time_kernel(
    sums: Any, points: Any, seed_at: Any, seed: Any, stream: Any, step: Any, n: Any, n_tiles: Any,
    POINTER: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """Ordered uniforms of a tile, times n."""
    run, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    i = tile * BLOCK + tl.arange(0, BLOCK)
    u = _uniform(_seed(seed_at, seed, POINTER), i, run, stream, step)
    before, upto, total, _ = _row(sums, run, tile, n_tiles, TILES)
    arrivals = _cumulative(tl.where(i <= n, -tl.log(u), 0.0), before, upto)
    at = points + run * n.to(tl.int64) + i
    tl.store(at, n.to(tl.float64) * (arrivals / total), mask=i < n)


@triton.jit(do_not_specialize=NUMBERS)
def search_kernel(
    thresholds: Any, points: Any, log_w: Any, ess: Any, ancestors: Any, new_log_w: Any,
    resampled: Any, values: Any, taken: Any,
    seed_at: Any, seed: Any, stream: Any, step: Any, n_particles: Any, n: Any, n_tiles: Any,
    threshold: Any, n_values: Any,
    POINTER: tl.constexpr, SCHEME: tl.constexpr, ALWAYS: tl.constexpr, GATHER: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """First particle whose threshold exceeds the point of each place, and its values."""
    run, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    i = tile * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    n_all, n_places = n_particles.to(tl.int64), n.to(tl.int64)
    key = _seed(seed_at, seed, POINTER)
    if SCHEME == SYSTEMATIC:
        point = i + _uniform(key, i * 0, run, stream, step)
    elif SCHEME == STRATIFIED:
        point = i + _uniform(key, i, run, stream, step)
    elif SCHEME == RESIDUAL:
        point = i.to(tl.float64)
    else:
        point = tl.load(points + run * n_places + i, mask=inside, other=0.0)
    low = i * 0
    high = low + (n_particles - 1)
    for _ in range(STEPS):
        middle = (low + high) // 2
        above = tl.load(thresholds + run * n_all + middle) > point
        high = tl.where(above, middle, high)
        low = tl.where(above, low, tl.minimum(middle + 1, high))
    chosen = low
    if not ALWAYS:
        drawn = tl.load(ess + run) <= threshold
        chosen = tl.where(drawn, chosen, i)
        old = tl.load(log_w + run * n_all + i, mask=inside, other=0.0)
        equal = -tl.log(n.to(tl.float64))
        tl.store(new_log_w + run * n_places + i, tl.where(drawn, equal, old), mask=inside)
        tl.store(resampled + run, drawn.to(tl.int8), mask=tile == 0)
    tl.store(ancestors + run * n_places + i, chosen.to(tl.int64), mask=inside)
    if GATHER:
        width = n_values.to(tl.int64)
        source = (run * n_all + chosen.to(tl.int64)) * width
        target = (run * n_places + i.to(tl.int64)) * width
        for start in range(0, n_values, COLUMNS):
            d = start + tl.arange(0, COLUMNS)
            keep = inside[:, None] & (d[None, :] < n_values)
            v = tl.load(values + source[:, None] + d[None, :], mask=keep, other=0)
            tl.store(taken + target[:, None] + d[None, :], v, mask=keep)


@triton.jit(do_not_specialize=NUMBERS)
def take_kernel(
    values: Any, ancestors: Any, taken: Any, n_particles: Any, n: Any, n_tiles: Any, n_values: Any,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Rows of the values at given ancestors."""
    run, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    i = tile * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    n_all, n_places = n_particles.to(tl.int64), n.to(tl.int64)
    chosen = tl.load(ancestors + run * n_places + i, mask=inside, other=0)
    # An index that is not one would read anywhere; the host cannot look without waiting.
    valid = inside & (chosen >= 0) & (chosen < n_all)
    width = n_values.to(tl.int64)
    source = (run * n_all + chosen) * width
    target = (run * n_places + i.to(tl.int64)) * width
    for start in range(0, n_values, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        columns = d[None, :] < n_values
        v = tl.load(values + source[:, None] + d[None, :], mask=valid[:, None] & columns, other=0)
        tl.store(taken + target[:, None] + d[None, :], v, mask=inside[:, None] & columns)

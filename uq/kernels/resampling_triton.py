"""Triton kernels of :mod:`uq.kernels.resampling`; imported only where Triton runs.

Up to 16,384 particles a program has a run to itself: one launch forms the thresholds T, the next
searches them and gathers. Beyond, tiles of a run are summed first, and each adds what comes before
it. Sums are in float64.

A parallel sum need not increase where a weight is small, and may change where it is zero. So the
cumulative weight of a particle of weight zero is set to that of the one before, and from the last
positive weight on the threshold lies above every point.
"""

# Triton compiles annotations, too, and knows none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from uq.kernels.philox_triton import uniform64, words4

SYSTEMATIC = tl.constexpr(0)
STRATIFIED = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)
MULTINOMIAL = tl.constexpr(3)
NUMBERS = ["seed", "stream", "step", "n_particles", "n", "n_tiles", "limit", "n_values"]


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _rising(c):
    return tl.associative_scan(c, 0, _larger)


@triton.jit
def _load(log_weights, run, k, n_particles):
    """Log weights in float64, with −inf for NaN and +inf."""
    n_particles = n_particles.to(tl.int64)
    at = log_weights + run * n_particles + k
    x = tl.load(at, mask=k < n_particles, other=-float("inf")).to(tl.float64)
    return tl.where((x != x) | (x == float("inf")), -float("inf"), x)


@triton.jit
def _weights(x, top, k, n_particles):
    """Weights over the largest; 1 where all are zero, and 0 beyond the particles."""
    dead = top == -float("inf")
    w = tl.exp(x - tl.where(dead, 0.0, top))
    w = tl.where(dead, 1.0, w)
    return tl.where(k < n_particles, w, 0.0)


@triton.jit
def _uniform(seed, i, run, stream, step):
    word, _, _, _ = words4(seed, i, run, stream, step)
    return uniform64(word)


@triton.jit
def _seed(seed_at, seed, POINTER: tl.constexpr):
    if POINTER:
        return tl.load(seed_at)
    else:
        return seed


@triton.jit
def _row(sums, run, tile, n_tiles, TILES: tl.constexpr):
    """Sums of the tiles before ``tile``, up to it, and of all; and the largest of a later one."""
    t = tl.arange(0, TILES)
    v = tl.load(sums + run * n_tiles + t, mask=t < n_tiles, other=0.0)
    c = _rising(tl.where(v > 0, tl.cumsum(v, 0), 0.0))
    before = tl.max(tl.where(t < tile, c, 0.0), 0)
    upto = tl.max(tl.where(t <= tile, c, 0.0), 0)
    later = tl.max(tl.where(t > tile, v, 0.0), 0)
    return before, upto, tl.max(c, 0), later


@triton.jit
def _cumulative(w, before, upto):
    c = tl.minimum(before + tl.cumsum(w, 0), upto)
    return _rising(tl.where(w > 0, c, before))


@triton.jit
def _complete(w, k, later):
    """Whether no later particle has a positive weight; ``later`` is the most of later tiles."""
    last = tl.max(tl.where(w > 0, k, -1), 0)
    return k >= tl.where(later > 0, 2147483647, last)


@triton.jit
def _copies(certain, c, u, rest, parts, complete):
    """Numbers of copies up to each particle: certain ones, and points of the rest below it."""
    t = rest * (c / tl.where(parts > 0, parts, 1.0))
    points = tl.minimum(tl.maximum(tl.ceil(t - u), 0.0), rest)
    return certain + tl.where((t >= rest) | complete, rest, points)


@triton.jit
def _finish(
    log_w, ess, log_sum, degenerate, x, top, total, squares,
    run, k, n_particles, first,
):  # fmt: skip
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
    log_weights, log_w, ess, log_sum, degenerate, thresholds,
    points, seed_at, seed, stream, step, n_particles, n,
    POINTER: tl.constexpr, SCHEME: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """All of a run, a tile after the other. A negative scheme normalises only."""
    run = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    top = tl.max(_load(log_weights, run, lanes, n_particles), 0)
    for start in range(BLOCK, n_particles, BLOCK):
        top = tl.maximum(top, tl.max(_load(log_weights, run, start + lanes, n_particles), 0))
    zero = tl.where(top != top, top, 0.0)  # a float64 that is no constant
    total, squares, last = zero, zero, tl.max(lanes * 0, 0) - 1
    for start in range(0, n_particles, BLOCK):
        k = start + lanes
        w = _weights(_load(log_weights, run, k, n_particles), top, k, n_particles)
        squares += tl.sum(w * w, 0)
        # The last of the sums that are formed below, in the same order.
        total = tl.max(total + tl.cumsum(w, 0), 0)
        last = tl.maximum(last, tl.max(tl.where(w > 0, k, -1), 0))
    count = n.to(tl.float64)
    n_all = n_particles.to(tl.int64)
    wholes, parts, u = zero, zero, zero
    if SCHEME == RESIDUAL:
        u = tl.max(_uniform(_seed(seed_at, seed, POINTER), lanes * 0, run, stream, step), 0)
        last = last * 0 - 1
        for start in range(0, n_particles, BLOCK):
            k = start + lanes
            w = _weights(_load(log_weights, run, k, n_particles), top, k, n_particles)
            expected = w * (count / total)
            wholes += tl.sum(tl.floor(expected), 0)
            part = expected - tl.floor(expected)
            parts = tl.max(parts + tl.cumsum(part, 0), 0)
            last = tl.maximum(last, tl.max(tl.where(part > 0, k, -1), 0))
    certain, before = zero, zero
    for start in range(0, n_particles, BLOCK):
        k = start + lanes
        x = _load(log_weights, run, k, n_particles)
        _finish(
            log_w, ess, log_sum, degenerate, x, top, total, squares, run, k, n_particles, start == 0
        )
        w = _weights(x, top, k, n_particles)
        if SCHEME == RESIDUAL:
            expected = w * (count / total)
            whole = tl.floor(expected)
            part = expected - whole
            c = _cumulative(part, before, parts)
            t = _copies(certain + tl.cumsum(whole, 0), c, u, count - wholes, parts, k >= last)
            tl.store(thresholds + run * n_all + k, t, mask=k < n_all)
            certain += tl.sum(whole, 0)
            before = tl.max(c, 0)
        elif SCHEME >= 0:
            c = _cumulative(w, before, total)
            t = tl.where(k >= last, 2.0 * count + 2.0, count * (c / total))
            tl.store(thresholds + run * n_all + k, t, mask=k < n_all)
            before = tl.max(c, 0)
    if SCHEME == MULTINOMIAL:
        key = _seed(seed_at, seed, POINTER)
        places = tl.arange(0, PLACES)
        end = zero
        for start in range(0, n + 1, PLACES):
            i = start + places
            times = tl.where(i <= n, -tl.log(_uniform(key, i, run, stream, step)), 0.0)
            end = tl.max(end + tl.cumsum(times, 0), 0)
        before = zero
        for start in range(0, n + 1, PLACES):
            i = start + places
            times = tl.where(i <= n, -tl.log(_uniform(key, i, run, stream, step)), 0.0)
            c = _cumulative(times, before, end)
            tl.store(points + run * n.to(tl.int64) + i, count * (c / end), mask=i < n)
            before = tl.max(c, 0)


@triton.jit(do_not_specialize=NUMBERS)
def tile_max_kernel(log_weights, tops, n_particles, n_tiles, BLOCK: tl.constexpr):
    """Largest log weight of a tile."""
    run, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    k = tile * BLOCK + tl.arange(0, BLOCK)
    x = _load(log_weights, run, k, n_particles)
    tl.store(tops + tl.program_id(0), tl.max(x, 0))


@triton.jit
def _top(tops, run, n_tiles, TILES: tl.constexpr):
    t = tl.arange(0, TILES)
    return tl.max(tl.load(tops + run * n_tiles + t, mask=t < n_tiles, other=-float("inf")), 0)


@triton.jit(do_not_specialize=NUMBERS)
def tile_sum_kernel(
    log_weights, tops, sums, squares, n_particles, n_tiles,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's weights and of their squares."""
    run, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    k = tile * BLOCK + tl.arange(0, BLOCK)
    x = _load(log_weights, run, k, n_particles)
    w = _weights(x, _top(tops, run, n_tiles, TILES), k, n_particles)
    tl.store(sums + tl.program_id(0), tl.sum(w, 0))
    tl.store(squares + tl.program_id(0), tl.sum(w * w, 0))


@triton.jit(do_not_specialize=NUMBERS)
def tile_parts_kernel(
    log_weights, tops, sums, wholes, parts, n_particles, n,
    n_tiles, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
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
    log_weights, tops, sums, squares, wholes, parts,
    log_w, ess, log_sum, degenerate, thresholds,
    seed_at, seed, stream, step, n_particles, n, n_tiles,
    POINTER: tl.constexpr, SCHEME: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
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
            part = expected - whole
            c = _cumulative(part, before, upto)
            certain = whole_before + tl.cumsum(whole, 0)
            t = _copies(certain, c, u, count - whole_total, total, _complete(part, k, later))
        else:
            t = count * (_cumulative(w, before, upto) / total)
            t = tl.where(_complete(w, k, later), 2.0 * count + 2.0, t)
        n_all = n_particles.to(tl.int64)
        tl.store(thresholds + run * n_all + k, t, mask=k < n_all)


@triton.jit(do_not_specialize=NUMBERS)
def time_sum_kernel(
    sums, seed_at, seed, stream, step, n, n_tiles,
    POINTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of a tile of the n + 1 waiting times whose arrivals are ordered uniforms."""
    run, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    i = tile * BLOCK + tl.arange(0, BLOCK)
    u = _uniform(_seed(seed_at, seed, POINTER), i, run, stream, step)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(i <= n, -tl.log(u), 0.0), 0))


@triton.jit(do_not_specialize=NUMBERS)
def time_kernel(
    sums, points, seed_at, seed, stream, step, n, n_tiles,
    POINTER: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
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
    thresholds, points, log_w, ess, ancestors, new_log_w,
    resampled, values, taken,
    seed_at, seed, stream, step, n_particles, n, n_tiles,
    limit, n_values,
    POINTER: tl.constexpr, SCHEME: tl.constexpr, ALWAYS: tl.constexpr, GATHER: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
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
    equal = -tl.log(n.to(tl.float64))
    old = equal
    drawn = run >= 0
    if not ALWAYS:
        # The bits of a float64: a number with a point would come as a float32.
        drawn = tl.load(ess + run) <= tl.to_tensor(limit).to(tl.int64).to(tl.float64, bitcast=True)
        chosen = tl.where(drawn, chosen, i)
        old = tl.load(log_w + run * n_all + i, mask=inside, other=0.0)
    new = tl.where(drawn, equal, old)
    tl.store(new_log_w + run * n_places + i, tl.where(inside, new, 0.0), mask=inside)
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
    values, ancestors, taken, n_particles, n, n_tiles, n_values,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
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

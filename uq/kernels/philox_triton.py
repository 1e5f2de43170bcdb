"""Philox in Triton: the helpers that kernels draw their noise with. See :mod:`uq.kernels.philox`.

The counters c0 … c3 may be blocks or numbers of any integer type; they are taken modulo 2³². c0
gives the shape of what comes back.
"""

# Triton compiles annotations, too, and knows none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words4(seed, c0, c1, c2, c3):
    """Four uint32 words at each counter."""
    first = c0.to(tl.uint32)
    zero = first * 0
    return tl.philox(
        seed,
        first,
        zero + tl.to_tensor(c1).to(tl.uint32),
        zero + tl.to_tensor(c2).to(tl.uint32),
        zero + tl.to_tensor(c3).to(tl.uint32),
    )


@triton.jit
def unit(word):
    """Word → float32 in [0, 1)."""
    bits = word.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -bits - 1, bits).to(tl.float32) * 4.6566127342e-10


@triton.jit
def uniform64(word):
    """Word → float64 strictly inside (0, 1)."""
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10


@triton.jit
def radius(word):
    """Length of the two normals that a pair of words gives, from its first."""
    return tl.sqrt(-2.0 * tl.log(tl.maximum(unit(word), 1.0e-7)))


@triton.jit
def normals4(seed, c0, c1, c2, c3):
    """Four float32 normals at each counter: those of samples 4c1, 4c1 + 1, 4c1 + 2, 4c1 + 3."""
    w0, w1, w2, w3 = words4(seed, c0, c1, c2, c3)
    r, t = radius(w0), 6.283185307179586 * unit(w1)
    q, s = radius(w2), 6.283185307179586 * unit(w3)
    return r * tl.cos(t), r * tl.sin(t), q * tl.cos(s), q * tl.sin(s)


@triton.jit
def normal_lane(seed, c0, c1, c2, c3, LANE: tl.constexpr):
    """One of the four normals: that of sample 4c1 + LANE."""
    w0, w1, w2, w3 = words4(seed, c0, c1, c2, c3)
    if LANE < 2:
        r, t = radius(w0), 6.283185307179586 * unit(w1)
    else:
        r, t = radius(w2), 6.283185307179586 * unit(w3)
    if LANE % 2 == 0:
        return r * tl.cos(t)
    else:
        return r * tl.sin(t)


@triton.jit(do_not_specialize=["seed", "group", "stream", "step", "start", "n"])
def fill_words(out, seed, group, stream, step, start, n, BLOCK: tl.constexpr):
    """Four words of elements start … start + n − 1, to rows of ``out`` (4, n) int64."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = words4(seed, i + start, group, stream, step)
    n = tl.to_tensor(n).to(tl.int64)
    tl.store(out + i, w0.to(tl.int64), mask=i < n)
    tl.store(out + n + i, w1.to(tl.int64), mask=i < n)
    tl.store(out + 2 * n + i, w2.to(tl.int64), mask=i < n)
    tl.store(out + 3 * n + i, w3.to(tl.int64), mask=i < n)


@triton.jit(
    do_not_specialize=["seed", "group", "stream", "step", "start", "n", "before", "n_samples"]
)
def fill_normals(
    out,
    seed,
    group,
    stream,
    step,
    start,
    n,
    before,
    n_samples,
    BLOCK: tl.constexpr,
):
    """Noise of samples first … first + n_samples − 1, to ``out`` (n_samples, n).

    Axis 1 of the grid counts groups of four samples from ``group``; ``before`` samples of the first
    group precede the first that is wanted.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = tl.program_id(1)
    e0, e1, e2, e3 = normals4(seed, i + start, here + group, stream, step)
    n = tl.to_tensor(n).to(tl.int64)
    row = (here * 4).to(tl.int64) - before
    for lane in tl.static_range(4):
        if lane == 0:
            e = e0
        elif lane == 1:
            e = e1
        elif lane == 2:
            e = e2
        else:
            e = e3
        keep = (i < n) & (row + lane >= 0) & (row + lane < n_samples)
        tl.store(out + (row + lane) * n + i, e.to(out.dtype.element_ty), mask=keep)

"""Triton kernels of :mod:`uq.kernels.ivon`; imported only where Triton runs.

A program works on a block of one tensor. Tensors are found through a table of addresses, so that
one launch serves a whole network, whose parameters stay where they are.
"""

# Triton compiles annotations, too, and knows none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from uq.kernels.philox_triton import normal_lane

_NUMBERS = ["seed", "stream", "step", "next_step", "n_summed"]


@triton.jit
def _place(segment_of, offset_of, start, size, group, BLOCK: tl.constexpr):
    """Segment, element in it, element of the flat vector, which are there, and group."""
    program = tl.program_id(0)
    segment = tl.load(segment_of + program)
    i = tl.load(offset_of + program) + tl.arange(0, BLOCK)
    inside = i < tl.load(size + segment)
    return segment, i, i + tl.load(start + segment), inside, tl.load(group + segment)


@triton.jit
def _address(addresses, segment, like):
    return tl.load(addresses + segment).to(tl.pointer_type(like.dtype.element_ty))


@triton.jit
def _std(hess, settings, group, ACC: tl.constexpr):
    """1/√(λ(h + δ))."""
    ess, delta = tl.load(settings + 7 * group), tl.load(settings + 7 * group + 1)
    return (1.0 / tl.sqrt(ess)).to(ACC) * tl.rsqrt(hess + delta.to(ACC))


@triton.jit(do_not_specialize=_NUMBERS)
def sample_kernel(
    weights, hess, mean, holds, settings,
    segment_of, offset_of, start, size, group,
    seed, stream, step, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep the mean aside and write mean + σz."""
    segment, i, flat, inside, g = _place(segment_of, offset_of, start, size, group, BLOCK)
    p = _address(weights, segment, hess)
    m = tl.load(p + i, mask=inside, other=0.0).to(ACC)
    h = tl.load(hess + flat, mask=inside, other=1.0).to(ACC)
    z = normal_lane(seed, flat, 0, stream, step, 0).to(ACC)
    tl.store(mean + flat, m.to(hess.dtype.element_ty), mask=inside)
    sample = m + z * _std(h, settings, g, ACC)
    tl.store(p + i, sample.to(hess.dtype.element_ty), mask=inside)
    tl.store(holds, 1, mask=tl.program_id(0) == 0)


@triton.jit
def restore_kernel(
    weights, mean, holds,
    segment_of, offset_of, start, size, group, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put the mean back, if the parameters hold a sample."""
    segment, i, flat, inside, _ = _place(segment_of, offset_of, start, size, group, BLOCK)
    inside = inside & (tl.load(holds) != 0)
    m = tl.load(mean + flat, mask=inside, other=0.0)
    tl.store(_address(weights, segment, mean) + i, m, mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def accumulate_kernel(
    grads, hess, grad_sum, price_sum, drawn,
    segment_of, offset_of, start, size, group,
    seed, stream, step, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add gradient and noise × gradient to their sums."""
    segment, i, flat, inside, g = _place(segment_of, offset_of, start, size, group, BLOCK)
    grad = tl.load(_address(grads, segment, hess) + i, mask=inside, other=0.0).to(ACC)
    h = tl.load(hess + flat, mask=inside, other=1.0).to(ACC)
    z = normal_lane(seed, flat, 0, stream, step, 0).to(ACC)
    a = tl.load(grad_sum + flat, mask=inside, other=0.0).to(ACC) + grad
    b = tl.load(price_sum + flat, mask=inside, other=0.0).to(ACC)
    b += z * _std(h, drawn, g, ACC) * grad
    tl.store(grad_sum + flat, a.to(hess.dtype.element_ty), mask=inside)
    tl.store(price_sum + flat, b.to(hess.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def update_kernel(
    weights, grads, hess, momentum, mean, grad_sum, price_sum,
    squares, holds, settings, drawn,
    segment_of, offset_of, start, size, group,
    seed, stream, step, next_step, n_summed,
    SAMPLED: tl.constexpr, SUMMED: tl.constexpr, NEXT: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of curvature, momentum and mean; with NEXT also the following sample."""
    segment, i, flat, inside, g = _place(segment_of, offset_of, start, size, group, BLOCK)
    TYPE: tl.constexpr = hess.dtype.element_ty
    row = settings + 7 * g
    ess, delta = tl.load(row), tl.load(row + 1).to(ACC)
    keep, gain = tl.load(row + 2).to(ACC), tl.load(row + 3).to(ACC)
    rate, pull, radius = tl.load(row + 4), tl.load(row + 5).to(ACC), tl.load(row + 6).to(ACC)
    p = _address(weights, segment, hess)
    h = tl.load(hess + flat, mask=inside, other=1.0).to(ACC)
    if SAMPLED:
        m = tl.load(mean + flat, mask=inside, other=0.0).to(ACC)
    else:
        m = tl.load(p + i, mask=inside, other=0.0).to(ACC)
    if SUMMED:
        grad = tl.load(grad_sum + flat, mask=inside, other=0.0).to(ACC) / n_summed
        c = tl.load(price_sum + flat, mask=inside, other=0.0).to(ACC) / n_summed
    else:
        grad = tl.load(_address(grads, segment, hess) + i, mask=inside, other=0.0).to(ACC)
        z = normal_lane(seed, flat, 0, stream, step, 0).to(ACC)
        c = z * _std(h, drawn, g, ACC) * grad
    a = h + delta
    c = c - (1.0 / ess).to(ACC) * (h / a)
    c = tl.where(inside, c, 0.0)
    tl.store(squares + tl.program_id(0), tl.sum(c * c, 0))
    h += gain * a * (c + 0.5 * gain * c * c)
    old = tl.load(momentum + flat, mask=inside, other=0.0).to(ACC)
    new = old + keep * (grad - old)
    move = (new + pull * m) / (h + delta)
    # Not minimum and maximum, which would take a NaN for the radius.
    move = tl.where(move > radius, radius, tl.where(move < -radius, -radius, move))
    m -= rate.to(ACC) * move
    tl.store(hess + flat, h.to(TYPE), mask=inside)
    tl.store(momentum + flat, new.to(TYPE), mask=inside)
    if NEXT:
        tl.store(mean + flat, m.to(TYPE), mask=inside)
        z = normal_lane(seed, flat, 0, stream, next_step, 0).to(ACC)
        tl.store(p + i, (m + z * _std(h, settings, g, ACC)).to(TYPE), mask=inside)
    else:
        tl.store(p + i, m.to(TYPE), mask=inside)
    tl.store(holds, 1 if NEXT else 0, mask=tl.program_id(0) == 0)

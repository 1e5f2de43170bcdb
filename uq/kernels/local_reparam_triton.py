"""Triton kernels of :mod:`uq.kernels.local_reparam`; imported only where Triton runs.

Both products of a layer, of x with μ and of x² with σ², come from one reading of x, μ and σ; the
noise is drawn where the output is written.
"""

# Triton compiles annotations, too, and knows none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from uq.kernels.linear_triton import load_weights, softplus
from uq.kernels.philox_triton import normals4

_SCALARS = ["seed", "stream", "step", "first", "first_row", "n_samples", "n_rows", "floor"]


@triton.jit
def _pick(e0, e1, e2, e3, lane):
    low = tl.where(lane == 0, e0, e1)
    high = tl.where(lane == 2, e2, e3)
    return tl.where(lane < 2, low, high)


@triton.jit
def _noise(b, n, n_out, first_row, group, seed, stream, step):
    """Noise of a tile of outputs (b, n) for the four samples of a group."""
    index = (b + first_row).to(tl.uint32)[:, None] * n_out + n.to(tl.uint32)[None, :]
    return normals4(seed, index, group, stream, step)


@triton.jit
def _store(out, value, sample, n_samples, b, n, n_rows, n_out):
    at = (sample.to(tl.int64) * n_rows + b[:, None]) * n_out + n[None, :]
    keep = (b[:, None] < n_rows) & (n[None, :] < n_out) & (sample >= 0) & (sample < n_samples)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=_SCALARS)
def forward_kernel(
    x, mean, std, mask, bias, bias_std, out, root,
    seed, stream, step, first, first_row, floor,
    n_samples, n_rows, n_out, n_in,
    SHARED: tl.constexpr, RHO: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, NOISY_BIAS: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Y_s = m + √(v + floor) ξ_s, and √(v + floor) for the gradient.

    Inputs shared by the samples: a program writes a tile of all of them. Others: of one sample.
    """
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    sample = tl.program_id(2)
    m = tl.zeros((BM, BN), ACC)
    v = tl.zeros((BM, BN), ACC)
    row = b.to(tl.int64)[:, None] * n_in
    if not SHARED:
        row += sample.to(tl.int64) * n_rows * n_in
    for start in range(0, n_in, BK):
        k = start + tl.arange(0, BK)
        at = n.to(tl.int64)[:, None] * n_in + k[None, :]
        inside = (n[:, None] < n_out) & (k[None, :] < n_in)
        w, s = load_weights(mean, std, mask, at, inside, RHO, MASK, ACC)
        here = (b[:, None] < n_rows) & (k[None, :] < n_in)
        xs = tl.load(x + row + k[None, :], mask=here, other=0.0).to(ACC)
        m = tl.dot(xs.to(DOT), tl.trans(w).to(DOT), m, input_precision=PRECISION, out_dtype=ACC)
        v = tl.dot(
            (xs * xs).to(DOT), tl.trans(s * s).to(DOT), v, input_precision=PRECISION, out_dtype=ACC
        )
    if BIAS:
        m += tl.load(bias + n, mask=n < n_out, other=0.0).to(ACC)[None, :]
    if NOISY_BIAS:
        t = tl.load(bias_std + n, mask=n < n_out, other=0.0).to(ACC)
        if RHO:
            t = softplus(t)
        v += (t * t)[None, :]
    r = tl.sqrt(v + floor)
    if SHARED:
        _store(root, r, 0 * sample, 1, b, n, n_rows, n_out)
        first_group = first // 4
        for group in range(first_group, (first + n_samples - 1) // 4 + 1):
            s0 = 4 * group - first
            e0, e1, e2, e3 = _noise(b, n, n_out, first_row, group, seed, stream, step)
            _store(out, m + r * e0.to(ACC), s0, n_samples, b, n, n_rows, n_out)
            _store(out, m + r * e1.to(ACC), s0 + 1, n_samples, b, n, n_rows, n_out)
            _store(out, m + r * e2.to(ACC), s0 + 2, n_samples, b, n, n_rows, n_out)
            _store(out, m + r * e3.to(ACC), s0 + 3, n_samples, b, n, n_rows, n_out)
    else:
        _store(root, r, sample, n_samples, b, n, n_rows, n_out)
        draw = first + sample
        e0, e1, e2, e3 = _noise(b, n, n_out, first_row, draw // 4, seed, stream, step)
        e = _pick(e0, e1, e2, e3, draw % 4)
        _store(out, m + r * e.to(ACC), sample, n_samples, b, n, n_rows, n_out)


@triton.jit
def _lane(
    grad, eps, sample, n_samples, b, n, n_rows, n_out,
    ACC: tl.constexpr,
):  # fmt: skip
    at = (sample.to(tl.int64) * n_rows + b[:, None]) * n_out + n[None, :]
    keep = (b[:, None] < n_rows) & (n[None, :] < n_out) & (sample >= 0) & (sample < n_samples)
    g = tl.load(grad + at, mask=keep, other=0.0).to(ACC)
    return g, g * eps.to(ACC)


@triton.jit(do_not_specialize=_SCALARS)
def moments_kernel(
    grad, root, dm, dv,
    seed, stream, step, first, first_row,
    n_samples, n_rows, n_out,
    SHARED: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dm = Σ_s g_s and dv = Σ_s g_s ξ_s / (2 √(v + floor)); of one sample where x is its own."""
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    plane = tl.program_id(2)
    total = tl.zeros((BM, BN), ACC)
    noisy = tl.zeros((BM, BN), ACC)
    if SHARED:
        for group in range(first // 4, (first + n_samples - 1) // 4 + 1):
            s = 4 * group - first
            e0, e1, e2, e3 = _noise(b, n, n_out, first_row, group, seed, stream, step)
            g0, h0 = _lane(grad, e0, s, n_samples, b, n, n_rows, n_out, ACC)
            g1, h1 = _lane(grad, e1, s + 1, n_samples, b, n, n_rows, n_out, ACC)
            g2, h2 = _lane(grad, e2, s + 2, n_samples, b, n, n_rows, n_out, ACC)
            g3, h3 = _lane(grad, e3, s + 3, n_samples, b, n, n_rows, n_out, ACC)
            total += g0 + g1 + (g2 + g3)
            noisy += h0 + h1 + (h2 + h3)
    else:
        draw = first + plane
        e0, e1, e2, e3 = _noise(b, n, n_out, first_row, draw // 4, seed, stream, step)
        e = _pick(e0, e1, e2, e3, draw % 4)
        total, noisy = _lane(grad, e, plane, n_samples, b, n, n_rows, n_out, ACC)
    at = (plane.to(tl.int64) * n_rows + b[:, None]) * n_out + n[None, :]
    keep = (b[:, None] < n_rows) & (n[None, :] < n_out)
    r = tl.load(root + at, mask=keep, other=1.0).to(ACC)
    # A variance of exactly zero does not pull: its noise is zero on both sides.
    half = tl.where(r > 0, noisy / (2 * tl.where(r > 0, r, 1.0)), 0.0)
    tl.store(dm + at, total, mask=keep)
    tl.store(dv + at, half, mask=keep)


@triton.jit(do_not_specialize=["n_rows"])
def input_kernel(
    x, mean, std, mask, dm, dv, dx,
    n_rows, n_out, n_in,
    RHO: tl.constexpr, MASK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dX = dm μ + 2X ⊙ (dv σ²)."""
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    of_mean = tl.zeros((BM, BK), ACC)
    of_square = tl.zeros((BM, BK), ACC)
    row = b.to(tl.int64)[:, None]
    for start in range(0, n_out, BN):
        n = start + tl.arange(0, BN)
        at = n.to(tl.int64)[:, None] * n_in + k[None, :]
        inside = (n[:, None] < n_out) & (k[None, :] < n_in)
        w, s = load_weights(mean, std, mask, at, inside, RHO, MASK, ACC)
        here = (b[:, None] < n_rows) & (n[None, :] < n_out)
        a = tl.load(dm + row * n_out + n[None, :], mask=here, other=0.0).to(DOT)
        of_mean = tl.dot(a, w.to(DOT), of_mean, input_precision=PRECISION, out_dtype=ACC)
        c = tl.load(dv + row * n_out + n[None, :], mask=here, other=0.0).to(DOT)
        of_square = tl.dot(c, (s * s).to(DOT), of_square, input_precision=PRECISION, out_dtype=ACC)
    keep = (b[:, None] < n_rows) & (k[None, :] < n_in)
    xs = tl.load(x + row * n_in + k[None, :], mask=keep, other=0.0).to(ACC)
    value = of_mean + 2 * xs * of_square
    tl.store(dx + row * n_in + k[None, :], value.to(dx.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["n_rows", "rows_each"])
def weight_kernel(
    x, dm, dv, d_mean, d_square,
    n_rows, n_out, n_in, rows_each,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dmᵀX and dvᵀX², of a share of the rows."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    share = tl.program_id(2)
    of_mean = tl.zeros((BN, BK), ACC)
    of_square = tl.zeros((BN, BK), ACC)
    stop = tl.minimum((share + 1) * rows_each, n_rows)
    for start in range(share * rows_each, stop, BM):
        b = start + tl.arange(0, BM)
        row = b.to(tl.int64)[:, None]
        in_g = (b[:, None] < stop) & (n[None, :] < n_out)
        in_x = (b[:, None] < stop) & (k[None, :] < n_in)
        a = tl.load(dm + row * n_out + n[None, :], mask=in_g, other=0.0).to(DOT)
        c = tl.load(dv + row * n_out + n[None, :], mask=in_g, other=0.0).to(DOT)
        xs = tl.load(x + row * n_in + k[None, :], mask=in_x, other=0.0).to(ACC)
        of_mean = tl.dot(tl.trans(a), xs.to(DOT), of_mean, input_precision=PRECISION, out_dtype=ACC)
        of_square = tl.dot(
            tl.trans(c), (xs * xs).to(DOT), of_square, input_precision=PRECISION, out_dtype=ACC
        )
    at = (share.to(tl.int64) * n_out + n[:, None]) * n_in + k[None, :]
    keep = (n[:, None] < n_out) & (k[None, :] < n_in)
    tl.store(d_mean + at, of_mean, mask=keep)
    tl.store(d_square + at, of_square, mask=keep)

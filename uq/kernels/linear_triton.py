"""Triton kernels of :mod:`uq.kernels.linear`; imported only where Triton runs.

A tile of weights is read once for the four samples of a group, and its noise comes from one call of
the counter-based generator at the position of each weight: it never touches memory.
"""

# Triton compiles annotations, too, and knows none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from uq.kernels.philox_triton import normals4

_SCALARS = ["seed", "stream", "bias_stream", "step", "first", "n_samples", "n_rows"]


@triton.jit
def softplus(r):
    """log(1 + eʳ), also where eʳ is lost beside 1."""
    small = tl.exp(-tl.abs(r))
    whole = 1.0 + small
    # Kahan's log(1 + y) = y log(w)/(w − 1) with w = 1 + y as rounded.
    safe = tl.where(whole == 1.0, 2.0, whole)
    log1p = tl.where(whole == 1.0, small, tl.log(safe) * (small / (safe - 1.0)))
    return tl.maximum(r, 0.0) + log1p


@triton.jit
def load_weights(
    mean, std, mask, at, keep,
    RHO: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of means and standard deviations, zero where the mask is."""
    m = tl.load(mean + at, mask=keep, other=0.0).to(ACC)
    s = tl.load(std + at, mask=keep, other=0.0).to(ACC)
    if RHO:
        s = softplus(s)
    if MASK:
        on = tl.load(mask + at, mask=keep, other=0).to(ACC)
        m = m * on
        s = s * on
    return m, s


@triton.jit
def lanes(n, k, n_in, group, seed, stream, step):
    """Noise of a tile of weights (n, k) for the four samples of a group."""
    index = n.to(tl.uint32)[:, None] * n_in + k.to(tl.uint32)[None, :]
    return normals4(seed, index, group, stream, step)


@triton.jit
def bias_lanes(n, group, seed, stream, step):
    """Noise of biases for the four samples of a group."""
    return normals4(seed, n.to(tl.uint32), group, stream, step)


@triton.jit
def _store_lane(
    out, acc, lane, shift, eps, sample, b, n,
    n_samples, n_rows, n_out,
):  # fmt: skip
    at = (sample.to(tl.int64) * n_rows + b[:, None]) * n_out + n[None, :]
    keep = (b[:, None] < n_rows) & (n[None, :] < n_out) & (sample >= 0) & (sample < n_samples)
    tl.store(out + at, (acc + (lane + shift * eps)[None, :]).to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=_SCALARS)
def forward_kernel(
    x, mean, std, mask, bias, bias_std, out,
    seed, stream, bias_stream, step, first,
    n_samples, n_rows, n_out, n_in,
    SHARED: tl.constexpr, RHO: tl.constexpr, MASK: tl.constexpr,
    BIAS: tl.constexpr, NOISY_BIAS: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Y[s, b, n] = Σ_k X[s or 0, b, k] (μ + σ ε_s)[n, k] + bias_s[n], four samples a program."""
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    group = first // 4 + tl.program_id(2)
    sample = 4 * group - first
    acc0 = tl.zeros((BM, BN), ACC)
    acc1 = tl.zeros((BM, BN), ACC)
    acc2 = tl.zeros((BM, BN), ACC)
    acc3 = tl.zeros((BM, BN), ACC)
    plane = n_rows.to(tl.int64) * n_in
    row = b.to(tl.int64)[:, None] * n_in
    for start in range(0, n_in, BK):
        k = start + tl.arange(0, BK)
        at = n.to(tl.int64)[:, None] * n_in + k[None, :]
        inside = (n[:, None] < n_out) & (k[None, :] < n_in)
        m, s = load_weights(mean, std, mask, at, inside, RHO, MASK, ACC)
        e0, e1, e2, e3 = lanes(n, k, n_in, group, seed, stream, step)
        w0 = tl.trans(m + s * e0.to(ACC)).to(DOT)
        w1 = tl.trans(m + s * e1.to(ACC)).to(DOT)
        w2 = tl.trans(m + s * e2.to(ACC)).to(DOT)
        w3 = tl.trans(m + s * e3.to(ACC)).to(DOT)
        here = (b[:, None] < n_rows) & (k[None, :] < n_in)
        if SHARED:
            xs = tl.load(x + row + k[None, :], mask=here, other=0.0).to(ACC).to(DOT)
            acc0 = tl.dot(xs, w0, acc0, input_precision=PRECISION, out_dtype=ACC)
            acc1 = tl.dot(xs, w1, acc1, input_precision=PRECISION, out_dtype=ACC)
            acc2 = tl.dot(xs, w2, acc2, input_precision=PRECISION, out_dtype=ACC)
            acc3 = tl.dot(xs, w3, acc3, input_precision=PRECISION, out_dtype=ACC)
        else:
            p = x + row + k[None, :]
            x0 = _lane_of(p, plane, sample, n_samples, here).to(ACC).to(DOT)
            acc0 = tl.dot(x0, w0, acc0, input_precision=PRECISION, out_dtype=ACC)
            x1 = _lane_of(p, plane, sample + 1, n_samples, here).to(ACC).to(DOT)
            acc1 = tl.dot(x1, w1, acc1, input_precision=PRECISION, out_dtype=ACC)
            x2 = _lane_of(p, plane, sample + 2, n_samples, here).to(ACC).to(DOT)
            acc2 = tl.dot(x2, w2, acc2, input_precision=PRECISION, out_dtype=ACC)
            x3 = _lane_of(p, plane, sample + 3, n_samples, here).to(ACC).to(DOT)
            acc3 = tl.dot(x3, w3, acc3, input_precision=PRECISION, out_dtype=ACC)
    level = tl.zeros((BN,), ACC)
    shift = tl.zeros((BN,), ACC)
    if BIAS:
        level = tl.load(bias + n, mask=n < n_out, other=0.0).to(ACC)
    if NOISY_BIAS:
        shift = tl.load(bias_std + n, mask=n < n_out, other=0.0).to(ACC)
        if RHO:
            shift = softplus(shift)
    e0, e1, e2, e3 = bias_lanes(n, group, seed, bias_stream, step)
    _store_lane(out, acc0, level, shift, e0.to(ACC), sample, b, n, n_samples, n_rows, n_out)
    _store_lane(out, acc1, level, shift, e1.to(ACC), sample + 1, b, n, n_samples, n_rows, n_out)
    _store_lane(out, acc2, level, shift, e2.to(ACC), sample + 2, b, n, n_samples, n_rows, n_out)
    _store_lane(out, acc3, level, shift, e3.to(ACC), sample + 3, b, n, n_samples, n_rows, n_out)


@triton.jit
def _lane_of(pointer, plane, sample, n_samples, keep):
    """A tile of one sample; zeros where there is no such sample."""
    exists = (sample >= 0) & (sample < n_samples)
    return tl.load(pointer + sample * plane, mask=keep & exists, other=0.0)


@triton.jit
def _outer(
    x, grad, sample, n, k, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, n_samples, n_rows, n_out, n_in,
    SHARED: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_b dY[s, b, n] X[s or 0, b, k] and Σ_b dY[s, b, n] of one sample."""
    total = tl.zeros((BN, BK), ACC)
    column = tl.zeros((BN,), ACC)
    plane_x = n_rows.to(tl.int64) * n_in
    plane_g = n_rows.to(tl.int64) * n_out
    for start in range(0, n_rows, BM):
        b = start + tl.arange(0, BM)
        rows = b.to(tl.int64)[:, None]
        in_g = (b[:, None] < n_rows) & (n[None, :] < n_out)
        in_x = (b[:, None] < n_rows) & (k[None, :] < n_in)
        g = _lane_of(grad + rows * n_out + n[None, :], plane_g, sample, n_samples, in_g).to(ACC)
        if SHARED:
            xs = tl.load(x + rows * n_in + k[None, :], mask=in_x, other=0.0).to(ACC)
        else:
            xs = _lane_of(x + rows * n_in + k[None, :], plane_x, sample, n_samples, in_x).to(ACC)
        total = tl.dot(
            tl.trans(g).to(DOT), xs.to(DOT), total, input_precision=PRECISION, out_dtype=ACC
        )
        column += tl.sum(g, 0)
    return total, column


@triton.jit(do_not_specialize=_SCALARS)
def weight_kernel(
    x, grad, d_mean, d_std, d_bias, d_bias_std,
    seed, stream, bias_stream, step, first,
    n_samples, n_rows, n_out, n_in, groups_each,
    SHARED: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dμ = Σ_s dY_sᵀX_s and dσ = Σ_s (dY_sᵀX_s) ε_s, of a share of the groups of samples."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    share = tl.program_id(2)
    of_mean = tl.zeros((BN, BK), ACC)
    of_std = tl.zeros((BN, BK), ACC)
    of_bias = tl.zeros((BN,), ACC)
    of_bias_std = tl.zeros((BN,), ACC)
    n_groups = (first + n_samples - 1) // 4 - first // 4 + 1
    for i in range(share * groups_each, tl.minimum((share + 1) * groups_each, n_groups)):
        group = first // 4 + i
        sample = 4 * group - first
        e0, e1, e2, e3 = lanes(n, k, n_in, group, seed, stream, step)
        f0, f1, f2, f3 = bias_lanes(n, group, seed, bias_stream, step)
        t, c = _outer(x, grad, sample, n, k, BM, BN, BK, n_samples, n_rows, n_out, n_in,
                      SHARED, ACC, DOT, PRECISION)  # fmt: skip
        of_mean += t
        of_std += t * e0.to(ACC)
        of_bias += c
        of_bias_std += c * f0.to(ACC)
        t, c = _outer(x, grad, sample + 1, n, k, BM, BN, BK, n_samples, n_rows, n_out, n_in,
                      SHARED, ACC, DOT, PRECISION)  # fmt: skip
        of_mean += t
        of_std += t * e1.to(ACC)
        of_bias += c
        of_bias_std += c * f1.to(ACC)
        t, c = _outer(x, grad, sample + 2, n, k, BM, BN, BK, n_samples, n_rows, n_out, n_in,
                      SHARED, ACC, DOT, PRECISION)  # fmt: skip
        of_mean += t
        of_std += t * e2.to(ACC)
        of_bias += c
        of_bias_std += c * f2.to(ACC)
        t, c = _outer(x, grad, sample + 3, n, k, BM, BN, BK, n_samples, n_rows, n_out, n_in,
                      SHARED, ACC, DOT, PRECISION)  # fmt: skip
        of_mean += t
        of_std += t * e3.to(ACC)
        of_bias += c
        of_bias_std += c * f3.to(ACC)
    plane = share.to(tl.int64) * n_out * n_in
    at = plane + n.to(tl.int64)[:, None] * n_in + k[None, :]
    keep = (n[:, None] < n_out) & (k[None, :] < n_in)
    tl.store(d_mean + at, of_mean, mask=keep)
    tl.store(d_std + at, of_std, mask=keep)
    if tl.program_id(1) == 0:
        tl.store(d_bias + share * n_out + n, of_bias, mask=n < n_out)
        tl.store(d_bias_std + share * n_out + n, of_bias_std, mask=n < n_out)


@triton.jit(do_not_specialize=_SCALARS)
def input_kernel(
    grad, mean, std, mask, dx,
    seed, stream, step, first,
    n_samples, n_rows, n_out, n_in,
    SHARED: tl.constexpr, RHO: tl.constexpr, MASK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dX_s = dY_s W_s; of a shared input its sum over all samples."""
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    acc0 = tl.zeros((BM, BK), ACC)
    acc1 = tl.zeros((BM, BK), ACC)
    acc2 = tl.zeros((BM, BK), ACC)
    acc3 = tl.zeros((BM, BK), ACC)
    first_group = first // 4
    n_groups = 1
    if SHARED:
        n_groups = (first + n_samples - 1) // 4 - first_group + 1
    else:
        first_group += tl.program_id(2)
    plane = n_rows.to(tl.int64) * n_out
    row = b.to(tl.int64)[:, None] * n_out
    for i in range(0, n_groups):
        group = first_group + i
        sample = 4 * group - first
        for start in range(0, n_out, BN):
            n = start + tl.arange(0, BN)
            at = n.to(tl.int64)[:, None] * n_in + k[None, :]
            inside = (n[:, None] < n_out) & (k[None, :] < n_in)
            m, s = load_weights(mean, std, mask, at, inside, RHO, MASK, ACC)
            e0, e1, e2, e3 = lanes(n, k, n_in, group, seed, stream, step)
            here = (b[:, None] < n_rows) & (n[None, :] < n_out)
            p = grad + row + n[None, :]
            g0 = _lane_of(p, plane, sample, n_samples, here).to(ACC).to(DOT)
            g1 = _lane_of(p, plane, sample + 1, n_samples, here).to(ACC).to(DOT)
            g2 = _lane_of(p, plane, sample + 2, n_samples, here).to(ACC).to(DOT)
            g3 = _lane_of(p, plane, sample + 3, n_samples, here).to(ACC).to(DOT)
            w0 = (m + s * e0.to(ACC)).to(DOT)
            w1 = (m + s * e1.to(ACC)).to(DOT)
            w2 = (m + s * e2.to(ACC)).to(DOT)
            w3 = (m + s * e3.to(ACC)).to(DOT)
            acc0 = tl.dot(g0, w0, acc0, input_precision=PRECISION, out_dtype=ACC)
            if SHARED:
                acc0 = tl.dot(g1, w1, acc0, input_precision=PRECISION, out_dtype=ACC)
                acc0 = tl.dot(g2, w2, acc0, input_precision=PRECISION, out_dtype=ACC)
                acc0 = tl.dot(g3, w3, acc0, input_precision=PRECISION, out_dtype=ACC)
            else:
                acc1 = tl.dot(g1, w1, acc1, input_precision=PRECISION, out_dtype=ACC)
                acc2 = tl.dot(g2, w2, acc2, input_precision=PRECISION, out_dtype=ACC)
                acc3 = tl.dot(g3, w3, acc3, input_precision=PRECISION, out_dtype=ACC)
    keep = (b[:, None] < n_rows) & (k[None, :] < n_in)
    at = b.to(tl.int64)[:, None] * n_in + k[None, :]
    kind = dx.dtype.element_ty
    if SHARED:
        tl.store(dx + at, acc0.to(kind), mask=keep)
    else:
        sample = 4 * first_group - first
        size = n_rows.to(tl.int64) * n_in
        _store_plane(dx + at, acc0.to(kind), size, sample, n_samples, keep)
        _store_plane(dx + at, acc1.to(kind), size, sample + 1, n_samples, keep)
        _store_plane(dx + at, acc2.to(kind), size, sample + 2, n_samples, keep)
        _store_plane(dx + at, acc3.to(kind), size, sample + 3, n_samples, keep)


@triton.jit
def _store_plane(pointer, value, plane, sample, n_samples, keep):
    exists = (sample >= 0) & (sample < n_samples)
    tl.store(pointer + sample * plane, value, mask=keep & exists)

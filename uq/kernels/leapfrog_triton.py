"""Triton kernels of :mod:`uq.kernels.leapfrog`; imported only where Triton runs."""

# Triton compiles annotations, too, and knows none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kick_drift_kernel(
    position, momentum, gradient, step, new_position, new_momentum,
    n_coordinates, step_row, step_column,
    SHARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p ← p + share · ε g and θ ← θ + ε p, of a block of one chain: 20 bytes a coordinate."""
    chain = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = d < n_coordinates
    at = chain * n_coordinates + d
    e = tl.load(step + chain * step_row + d * step_column, mask=keep, other=0.0)
    g = tl.load(gradient + at, mask=keep, other=0.0)
    p = tl.load(momentum + at, mask=keep, other=0.0) + SHARE * e * g
    x = tl.load(position + at, mask=keep, other=0.0) + e * p
    tl.store(new_momentum + at, p, mask=keep)
    tl.store(new_position + at, x, mask=keep)


@triton.jit
def kick_energy_kernel(
    momentum, gradient, step, new_momentum, energy,
    n_coordinates, step_row, step_column, BLOCK: tl.constexpr,
):  # fmt: skip
    """p ← p + ½ ε g, and ½ ‖p‖² of a chain in float64: the last half kick."""
    chain = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_coordinates, BLOCK):
        d = start + tl.arange(0, BLOCK)
        keep = d < n_coordinates
        at = chain * n_coordinates + d
        e = tl.load(step + chain * step_row + d * step_column, mask=keep, other=0.0)
        g = tl.load(gradient + at, mask=keep, other=0.0)
        p = tl.load(momentum + at, mask=keep, other=0.0) + 0.5 * e * g
        tl.store(new_momentum + at, p, mask=keep)
        # Squares in the type of p, as the reference has them; their sum in float64.
        total += (p * p).to(tl.float64)
    tl.store(energy + chain, 0.5 * tl.sum(total, 0))

"""Types and tiles of the matrix products in the Triton kernels, in one place."""

from __future__ import annotations

from typing import Any

import torch

from uq.kernels.dispatch import block

PROGRAMS = 264
"""Programs that fill a large GPU twice."""


def types(dtype: torch.dtype) -> dict[str, Any]:
    """Types that a kernel adds up and multiplies in, for inputs of ``dtype``.

    Products of float32 follow :func:`torch.set_float32_matmul_precision`, as torch's own do:
    "highest" is exact float32, the others TF32.
    """
    import triton.language as tl

    kinds = {torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "DOT": kinds.get(dtype, tl.float32),
        "PRECISION": "ieee" if exact else "tf32",
    }


def tiles(rows: int) -> dict[str, int]:
    """Tile of rows × outputs × inputs, and the warps of a program."""
    height = block(rows, 16, 128)
    width = 64 if height <= 64 else 32
    return {
        "BM": height,
        "BN": width,
        "BK": 32,
        "num_warps": 8 if height * width >= 4096 else 4,
        "num_stages": 3,
    }

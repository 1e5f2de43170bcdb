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
    "highest" takes three passes of TF32, which is float32 to a rounding or two and needs a
    fraction of the registers that its multiplication outside the tensor cores does; the others
    take one.
    """
    import triton.language as tl

    kinds = {torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    precision = "ieee"
    if dtype == torch.float32:
        highest = torch.get_float32_matmul_precision() == "highest"
        precision = "tf32x3" if highest else "tf32"
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "DOT": kinds.get(dtype, tl.float32),
        "PRECISION": precision,
    }


def tiles(rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of rows × outputs × inputs, and the warps of a program.

    With these the kernels stay below 99 kB of shared memory a program, which all GPUs since 2020
    have.
    """
    if dtype == torch.float64:
        return {"BM": 16, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2}
    height = block(rows, 16, 128)
    width = 64 if height <= 64 else 32
    warps = 8 if height * width >= 4096 else 4
    return {"BM": height, "BN": width, "BK": 32, "num_warps": warps, "num_stages": 2}


def turned(how: dict[str, Any]) -> dict[str, Any]:
    """The same for a sum over outputs: tiles of the inputs are the large ones."""
    return how | {"BN": how["BK"], "BK": how["BN"], "num_stages": 1}


def over_rows(how: dict[str, Any]) -> dict[str, Any]:
    """The same for a sum over rows, of which a program takes a few at a time."""
    return how | {"BM": min(32, how["BM"])}

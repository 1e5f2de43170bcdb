"""Where an operation runs: the one rule that chooses between a Triton kernel and plain torch.

A kernel runs on tensors that lie on a CUDA device, where Triton is installed; anything else takes
the torch reference. The environment variable ``UQ_KERNELS`` overrules that:

    auto (default)   as above
    reference        torch everywhere
    triton           Triton everywhere; on the CPU that needs its interpreter, TRITON_INTERPRET=1,
                     in the environment before anything imports Triton, and is for tests: it takes
                     some 15 ms for what a GPU does in a microsecond

The choice is made from the tensor, at each call. That Triton can be imported says nothing: without
a GPU its kernels cannot be launched.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from uq.errors import ParameterError

VARIABLE = "UQ_KERNELS"
_CHOICES = ("auto", "reference", "triton")


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported for that."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, by what it saw when it was imported."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def use_triton(*tensors: Tensor) -> bool:
    """Choose for an operation on these tensors.

    Parameters
    ----------
    *tensors : Tensor
        What the kernel would read; they have to lie on one device.

    Returns
    -------
    bool
        True for the Triton kernel, False for the torch reference.

    Raises
    ------
    ParameterError
        If the tensors lie on several devices, ``UQ_KERNELS`` has an unknown value, or it asks for
        Triton where that cannot run.

    Examples
    --------
    >>> import torch
    >>> from uq.kernels import use_triton
    >>> use_triton(torch.zeros(3))  # on the CPU
    False
    """
    device = tensors[0].device
    if any(t.device != device for t in tensors[1:]):
        raise ParameterError(
            "uq.kernels: the tensors of an operation must lie on one device, got "
            f"{', '.join(str(t.device) for t in tensors)}."
        )
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in _CHOICES:
        raise ParameterError(
            f"{VARIABLE} must be one of {', '.join(_CHOICES)}, got {choice!r} in the environment."
        )
    if choice == "triton":
        if not has_triton():
            raise ParameterError(f"{VARIABLE}=triton, but Triton is not installed.")
        if device.type != "cuda" and not interpreting():
            raise ParameterError(
                f"{VARIABLE}=triton needs CUDA tensors, got {device}; on the CPU set "
                "TRITON_INTERPRET=1 before Triton is imported."
            )
        return True
    # Interpreted kernels on a GPU would copy everything to the CPU and crawl.
    return choice == "auto" and device.type == "cuda" and has_triton() and not interpreting()


def strides(tensor: Tensor, *axes: int) -> tuple[Any, ...]:
    """Strides in elements of the given axes; kernels take them to int64 before they multiply."""
    return tuple(tensor.stride(axis) for axis in axes)


def cdiv(a: int, b: int) -> int:
    """Blocks of b that cover a."""
    return -(-a // b)


def block(n: int, smallest: int, largest: int) -> int:
    """Power of two that covers n, within two powers of two."""
    return min(largest, max(smallest, 1 << max(0, n - 1).bit_length()))

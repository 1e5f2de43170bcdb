"""Checks and conversions of arguments that the kernels of linear layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from uq.errors import ParameterError

_MAX_ELEMENTS = 1 << 32


def autocast_input(x: Tensor) -> Tensor:
    """Inputs in the type of products under autocast, as torch's own layers take them."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def signed(seed: int) -> int:
    """The 64 bits of a seed as the signed integer that operators take."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def fresh_seed() -> int:
    """A seed from torch's global generator on the CPU, whatever the device: nothing waits for it.

    What a method trains with is seeded there, so that a fit stays reproducible.
    """
    return int(torch.randint(1 << 62, ()))


def check_counters(what: str, n_elements: int, tensor: int, step: int, first: int) -> None:
    """Raise a ParameterError where a counter would leave its bits, and streams would meet."""
    if n_elements >= _MAX_ELEMENTS:
        raise ParameterError(
            f"{what}: noise is counted in 32 bits, got {n_elements} elements; split the layer."
        )
    for name, value, bits in (("tensor", tensor, 24), ("step", step, 32), ("first", first, 31)):
        if not 0 <= value < 1 << bits:
            raise ParameterError(f"{what}: {name} must be from 0 to 2^{bits} − 1, got {value!r}.")


def check_shapes(
    what: str,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    n_samples: int,
    bias: Tensor | None,
    bias_std: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raise a ParameterError where tensors of a linear layer do not fit together."""
    if mean.ndim != 2 or std.shape != mean.shape or (mask is not None and mask.shape != mean.shape):
        raise ParameterError(
            f"{what}: mean, std and mask must have one shape (N, K), got {tuple(mean.shape)}, "
            f"{tuple(std.shape)} and {None if mask is None else tuple(mask.shape)}."
        )
    if n_samples < 1:
        raise ParameterError(f"{what}: n_samples must be at least 1, got {n_samples!r}.")
    leading = (n_samples,) if x.ndim == 3 else ()
    if x.ndim not in (2, 3) or x.shape[-1] != mean.shape[1] or x.shape[:-2] != leading:
        raise ParameterError(
            f"{what}: x must be (rows, {mean.shape[1]}) or ({n_samples}, rows, {mean.shape[1]}) "
            f"for weights {tuple(mean.shape)}, got {tuple(x.shape)}."
        )
    for name, part in (("bias", bias), ("bias_std", bias_std)):
        if part is not None and part.shape != mean.shape[:1]:
            raise ParameterError(
                f"{what}: {name} must have shape ({mean.shape[0]},), got {tuple(part.shape)}."
            )

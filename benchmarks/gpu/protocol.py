"""What a case of the device benchmark is.

Cases get a :class:`Place` and build their tensors there. Under Triton's interpreter on a CPU
(``--device cpu``) ``place.small`` is set: shapes must then stay below some thirty programs, and
nothing is timed: that run shows that the benchmark itself works.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["bits", "fp64", "fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class Place:
    """Where a case runs."""

    device: torch.device
    small: bool

    def size(self, full: int, small: int) -> int:
        """A dimension: ``full`` on a device, ``small`` in the interpreter."""
        return small if self.small else full

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True)
class Check:
    """Correctness: ``run(place)`` gives the error, which must be at most ``tolerance``."""

    kernel: str
    name: str
    precision: Precision
    run: Callable[[Place], float]
    tolerance: float
    why: str
    """Where the tolerance comes from."""
    memory: int = 0
    """Bytes that it needs on the device; a smaller one leaves it out, and says so."""
    device_only: bool = False
    """Left out under the interpreter (which has neither tf32 nor a right bf16)."""


@dataclass(frozen=True)
class Repeat:
    """Equality of 20 runs bit by bit: a race, or an atomic sum of floats, would show."""

    kernel: str
    name: str
    run: Callable[[Place], Tensor | tuple[Tensor, ...]]
    device_only: bool = False


@dataclass(frozen=True)
class Timing:
    """Time of one operation by several means.

    ``make(place)`` gives functions by name: "uq" is the kernel, "eager" the same in eager torch,
    "compile" that under ``torch.compile``, other names are peers. They take nothing, and have to be
    callable repeatedly. One that cannot run here (a package that is missing) is left out of the
    mapping.
    """

    kernel: str
    name: str
    make: Callable[[Place], Mapping[str, Callable[[], Any]]]
    moved: int = 0
    """Bytes that have to be read and written; 0 leaves the bandwidth out."""
    flop: int = 0
    """Floating-point operations that have to be done; 0 leaves the rate out."""
    rate: Precision = "fp32"
    """Which measured ceiling the rate is held against."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """Contender → how many times faster than it the kernel has to be (0.8: up to 1.25 × its time);
    "copy" → share of the measured copy bandwidth."""
    memory: int = 0


Case = Check | Repeat | Timing


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest error over the largest entry that is wanted; NaN counts as infinite."""
    error = (found.double() - wanted.double().to(found.device)).abs().amax()
    scale = wanted.double().abs().amax().clamp_min(1e-300)
    return float((error / scale.to(error.device)).nan_to_num(nan=float("inf")))


def absolute(found: Tensor, wanted: Tensor) -> float:
    """Largest error; NaN counts as infinite."""
    error = (found.double() - wanted.double().to(found.device)).abs().amax()
    return float(error.nan_to_num(nan=float("inf")))


def differing(found: Tensor, wanted: Tensor) -> float:
    """Share of entries that are not equal."""
    return float((found != wanted.to(found.device)).double().mean())


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Within it ``UQ_KERNELS`` is as given; "reference" for the torch reference on the device."""
    before = os.environ.get("UQ_KERNELS")
    os.environ["UQ_KERNELS"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["UQ_KERNELS"]
        else:
            os.environ["UQ_KERNELS"] = before

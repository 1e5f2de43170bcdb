"""Sampling kernels: Triton on CUDA, a torch reference of the same operation everywhere.

Methods reach them by the device of their tensors; :mod:`uq.kernels.dispatch` has the rule, and
:mod:`uq.kernels.philox` the noise, which is the same on all devices. Nothing here is imported
before it is asked for, and none of it needs more than torch (and Triton, on a GPU).

Modules whose functions are used through them: :mod:`~uq.kernels.ivon` (sample and step over tensors
where they lie), :mod:`~uq.kernels.leapfrog`, :mod:`~uq.kernels.resampling`, :mod:`~uq.kernels.sdm`
and :mod:`~uq.kernels.sparse_linear`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Purpose": "uq.kernels.philox",
    "local_reparam_linear": "uq.kernels.local_reparam",
    "normal": "uq.kernels.philox",
    "sampled_linear": "uq.kernels.linear",
    "stream": "uq.kernels.philox",
    "uniform": "uq.kernels.philox",
    "use_triton": "uq.kernels.dispatch",
}

__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from uq.kernels.dispatch import use_triton as use_triton
    from uq.kernels.linear import sampled_linear as sampled_linear
    from uq.kernels.local_reparam import local_reparam_linear as local_reparam_linear
    from uq.kernels.philox import Purpose as Purpose
    from uq.kernels.philox import normal as normal
    from uq.kernels.philox import stream as stream
    from uq.kernels.philox import uniform as uniform


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'uq.kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

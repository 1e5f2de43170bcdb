"""Sparse networks as they are stored and run after training: compressed rows, and nothing else.

A weight of ``n`` entries, ``s`` of them active, takes 4s bytes each for means and standard
deviations, 2s for columns (4s beyond 32,767 of them) and 4 a row for where rows start. Linear
layers of low density multiply by the compressed rows on a CPU; elsewhere the weight is unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uq.kernels.sparse_linear import can_compress, compressed
from uq.nn.ssvi import Operation, Product, SparseGaussian, SparseGaussianLayer, swap

# Where products with compressed rows beat dense ones, measured on one core.
_MAX_DENSITY = 0.12
_MIN_WEIGHTS = 1 << 14


class CompactWeight(nn.Module):
    """Means and standard deviations of the active entries, in compressed rows.

    Parameters
    ----------
    shape : tuple of int
        Shape of the weight; its first axis makes the rows, the others together the columns.
    n_active : int
        Number of active entries. A weight that is all active stores no positions.
    prior_scale : float
        Standard deviation of the prior.
    dtype : torch.dtype
        Of the means and standard deviations.
    """

    std: Tensor
    columns: Tensor
    row_starts: Tensor

    def __init__(
        self, shape: tuple[int, ...], n_active: int, prior_scale: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = shape
        self.n: int = math.prod(shape)
        self.prior_scale: float = prior_scale
        rows, width = shape[0], self.n // shape[0]
        full = n_active == self.n
        small = torch.int16 if width <= torch.iinfo(torch.int16).max else torch.int32
        self.mean: nn.Parameter = nn.Parameter(torch.empty(n_active, dtype=dtype))
        self.register_buffer("std", torch.empty(n_active, dtype=dtype))
        self.register_buffer("columns", torch.empty(0 if full else n_active, dtype=small))
        self.register_buffer("row_starts", torch.empty(0 if full else rows + 1, dtype=torch.int32))
        self._unpacked: dict[str, Tensor] = {}

    @classmethod
    def of(cls, weight: SparseGaussian) -> CompactWeight:
        """Compress a trained weight."""
        made = cls(weight.shape, weight.n_active, weight.prior_scale, weight.mean.dtype)
        if weight.mean.is_meta:  # shapes alone, to load a file into
            return made
        made.to(weight.mean.device)
        with torch.no_grad():
            made.mean.copy_(weight.mean)
            made.std.copy_(weight.std)
            if len(made.columns):
                width = weight.n // weight.shape[0]
                made.columns.copy_(weight.index % width)
                rows = torch.arange(weight.shape[0] + 1, device=weight.index.device) * width
                made.row_starts.copy_(torch.searchsorted(weight.index, rows))
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be computed."""
        return self.__dict__ | {"_unpacked": {}}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpacked = {}
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def n_active(self) -> int:
        """Number of active entries."""
        return len(self.mean)

    @property
    def by_rows(self) -> bool:
        """Whether products should go through the compressed rows."""
        return (
            self.n_active <= _MAX_DENSITY * self.n
            and self.n >= _MIN_WEIGHTS
            and can_compress(self.mean)
        )

    def index(self) -> Tensor:
        """Flat positions of the active entries."""
        if not len(self.columns):
            return torch.arange(self.n, device=self.mean.device)
        device = self.columns.device
        index = self._unpacked.get("index")
        if index is None or index.device != device:
            counts = self.row_starts.diff().long()
            row = torch.arange(len(counts), device=device).repeat_interleave(counts)
            index = row * (self.n // self.shape[0]) + self.columns
            self._unpacked["index"] = index
        return index

    def dense(self, values: Tensor | None = None) -> Tensor:
        """The weight in its full shape, at the means or at other values of the active entries."""
        values = self.mean if values is None else values
        if not len(self.columns):
            return values.view(self.shape)
        zeros = torch.zeros(self.n, dtype=values.dtype, device=values.device)
        return zeros.scatter(0, self.index(), values).view(self.shape)

    def compressed(self) -> Tensor:
        """The means as a torch tensor of compressed rows (rows, columns)."""
        columns = self._unpacked.get("columns")
        if columns is None:
            columns = self._unpacked["columns"] = self.columns.int()
        size = (self.shape[0], self.n // self.shape[0])
        return compressed(self.row_starts, columns, self.mean, size)


class CompactLayer(nn.Module):
    """Linear or convolutional layer at the means of a :class:`CompactWeight`.

    ``torch.func.functional_call`` with other values of ``weight.mean`` evaluates other draws.
    """

    def __init__(
        self, operation: Operation, weight: CompactWeight, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.operation = operation
        self.weight = weight
        self.bias = bias

    @property
    def by_rows(self) -> bool:
        """Whether products go through the compressed rows."""
        return isinstance(self.operation, Product) and self.weight.by_rows

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if not self.by_rows or torch.is_grad_enabled():
            # After compressed rows x lies by columns, where narrow products are slow.
            return self.operation(x.contiguous(), self.weight.dense(), self.bias)
        rows = x.reshape(-1, x.shape[-1])
        out = self.weight.compressed() @ rows.T.contiguous()
        if self.bias is not None:
            out += self.bias[:, None]
        return out.T.reshape(*x.shape[:-1], -1)


def compact(module: nn.Module) -> nn.Module:
    """Copy a sparse network into its compact form, in eval mode.

    Parameters
    ----------
    module : Module
        From :func:`uq.nn.ssvi.sparsify`, trained or not.

    Returns
    -------
    Module
        The same function in eval mode; its ``state_dict`` holds active entries alone.
    """
    from copy import deepcopy

    module = deepcopy(module)
    swapped: dict[int, nn.Module] = {
        id(part): CompactLayer(part.operation, CompactWeight.of(part.weight), part.bias)
        for part in module.modules()
        if isinstance(part, SparseGaussianLayer)
    }
    return swap(module, swapped).eval()


def compact_weights(module: nn.Module) -> dict[str, CompactWeight]:
    """The :class:`CompactWeight` parts of a module, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, CompactWeight)}


def densify(module: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Copy a compact network into ordinary layers with zeros written out.

    Returns
    -------
    Module
        With ``Linear`` and ``Conv`` layers at the mean weights.
    dict of Tensor
        Standard deviation of each weight by parameter name, zero where it is not active.
    """
    from copy import deepcopy

    module = deepcopy(module)
    stds = {name: w.dense(w.std) for name, w in compact_weights(module).items()}
    swapped: dict[int, nn.Module] = {
        id(part): _ordinary(part) for part in module.modules() if isinstance(part, CompactLayer)
    }
    return swap(module, swapped).eval(), stds


def _ordinary(layer: CompactLayer) -> nn.Module:
    weight = layer.weight.dense().detach()
    operation = layer.operation
    made: Any
    # On meta, where initial weights take no random numbers; they are replaced.
    if isinstance(operation, Product):
        made = nn.Linear(
            weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta"
        )
    else:
        kinds: Mapping[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        made = kinds[operation.dimensions](
            weight.shape[1] * operation.groups,
            weight.shape[0],
            weight.shape[2:],
            operation.stride,
            operation.padding,
            operation.dilation,
            operation.groups,
            layer.bias is not None,
            operation.padding_mode,
            device="meta",
        )
    made.weight = nn.Parameter(weight.clone())
    made.bias = layer.bias
    return made

"""Mini-batches: tensors are sliced on their device, datasets go through a DataLoader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

# Rows are shuffled by gathering blocks of about this many bytes and slicing batches off them:
# a batch then costs two views, and no second copy of the whole data exists.
_BLOCK_BYTES = 64 << 20


class ArrayBatches:
    """Shuffled mini-batches of tensors that share their first axis.

    Parameters
    ----------
    *tensors : Tensor
        All with n rows, on one device.
    batch_size : int or None
        Rows per batch; None or a number >= n takes all rows at once, unshuffled.
    generator : torch.Generator
        Source of the shuffling, on the tensors' device.
    """

    def __init__(
        self, *tensors: Tensor, batch_size: int | None, generator: torch.Generator
    ) -> None:
        self.tensors = tensors
        self.n_rows = len(tensors[0])
        self.batch_size = min(batch_size or self.n_rows, self.n_rows)
        self.generator = generator

    def __len__(self) -> int:
        return math.ceil(self.n_rows / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.batch_size == self.n_rows:
            yield self.tensors
            return
        first = self.tensors[0]
        order = torch.randperm(self.n_rows, generator=self.generator, device=first.device)
        row_bytes = max(1, sum(t.element_size() * t[0].numel() for t in self.tensors))
        block = self.batch_size * max(1, _BLOCK_BYTES // (row_bytes * self.batch_size))
        for rows in order.split(block):
            gathered = [t[rows].split(self.batch_size) for t in self.tensors]
            yield from zip(*gathered, strict=True)


class LoaderBatches:
    """Mini-batches of a DataLoader, converted and moved to a device.

    Parameters
    ----------
    loader : DataLoader
        Yields (x, y) batches.
    prepare : callable
        Maps (x, y) to the tensors that the objective takes, on the right device.
    n_rows : int
        Number of rows of one pass.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        prepare: Callable[[Any, Any], tuple[Tensor, ...]],
        n_rows: int,
    ) -> None:
        self.loader = loader
        self.prepare = prepare
        self.n_rows = n_rows
        self.batch_size = loader.batch_size or 1

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for x, y in self.loader:
            yield self.prepare(x, y)

"""Mini-batches: tensors are sliced on their device, datasets go through a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from uq.errors import DataError

if TYPE_CHECKING:
    from uq.streams import RowChunks

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

    _not_in_checkpoints = ("tensors",)

    def __init__(
        self, *tensors: Tensor, batch_size: int | None, generator: torch.Generator
    ) -> None:
        self.tensors = tensors
        self.n_rows: int = len(tensors[0])
        self.batch_size: int = min(batch_size or self.n_rows, self.n_rows)
        self.generator = generator

    def shuffled_by(self, generator: torch.Generator) -> ArrayBatches:
        """Return batches of the same rows in an order of their own."""
        return ArrayBatches(*self.tensors, batch_size=self.batch_size, generator=generator)

    def __len__(self) -> int:
        return len(self._sizes())

    def _sizes(self) -> list[int]:
        """Rows of each batch. A last batch of one row, which BatchNorm refuses, joins another."""
        full, rest = divmod(self.n_rows, self.batch_size)
        sizes = [self.batch_size] * full
        if rest == 1 and full:
            sizes[-1] += 1
        elif rest:
            sizes.append(rest)
        return sizes

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.batch_size == self.n_rows:
            yield self.tensors
            return
        first = self.tensors[0]
        order = torch.randperm(self.n_rows, generator=self.generator, device=first.device)
        row_bytes = max(1, sum(t.element_size() * t[0].numel() for t in self.tensors))
        per_block = max(1, _BLOCK_BYTES // (row_bytes * self.batch_size))
        sizes, start = self._sizes(), 0
        for i in range(0, len(sizes), per_block):
            block = sizes[i : i + per_block]
            rows = order[start : start + sum(block)]
            start += len(rows)
            gathered = [t[rows].split(block) for t in self.tensors]
            yield from zip(*gathered, strict=True)


class LoaderBatches:
    """Mini-batches of a DataLoader, converted and moved to a device.

    Parameters
    ----------
    loader : DataLoader
        Yields (x, y) batches.
    prepare : callable
        Maps (x, y) to the tensors that the objective takes, on the right device.
    n_batches : int
        Batches of one pass.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        prepare: Callable[[Any, Any], tuple[Tensor, ...]],
        n_batches: int,
    ) -> None:
        self.loader = loader
        self.prepare = prepare
        self.n_batches = n_batches

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for x, y in self.loader:
            yield self.prepare(x, y)


class ChunkBatches:
    """Shuffled mini-batches of rows that are read in chunks.

    Parameters
    ----------
    source : RowChunks
        Where the rows come from.
    prepare : callable
        Maps arrays (X, y) of a chunk to the tensors that the objective takes, on its device.
    n_rows : int
        Rows of one pass.
    batch_size : int
        Rows per batch.
    seed : int
        Seed of the order; each pass has its own.
    """

    _not_in_checkpoints = ("source", "prepare")

    def __init__(
        self,
        source: RowChunks,
        prepare: Callable[[Any, Any], tuple[Tensor, ...]],
        n_rows: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.source: RowChunks = source
        self.prepare = prepare
        self.n_rows: int = n_rows
        self.batch_size: int = min(batch_size, n_rows)
        self.seed: int = seed
        self.n_passes = 0

    def __len__(self) -> int:
        # As in ArrayBatches, a last batch of one row joins another.
        full, rest = divmod(self.n_rows, self.batch_size)
        return full + (rest > 1 or full == 0)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = np.random.default_rng([self.seed, self.n_passes])
        self.n_passes += 1
        left: tuple[Tensor, ...] | None = None
        given, size = 0, self.batch_size
        for X, y in self.source.shuffled(order):
            tensors = self.prepare(X, y)
            if left is not None:
                tensors = tuple(torch.cat(pair) for pair in zip(left, tensors, strict=True))
            n = len(tensors[0])
            # A last batch of one row joins the one before: enough is kept back for that.
            n_now = max(0, (n - (2 if size > 1 else 1)) // size) * size
            if n_now:
                yield from zip(*(t[:n_now].split(size) for t in tensors), strict=True)
                given += n_now
            left = tuple(t[n_now:] for t in tensors)
        if left is None:
            return
        rest = self.n_rows - given
        if rest != len(left[0]):
            raise DataError(
                f"the stream gave {given + len(left[0])} rows in this pass and {self.n_rows} in "
                "the first; it must give the same rows in each."
            )
        yield left

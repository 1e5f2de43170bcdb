"""What a method's ``_infer`` gets and minimises: data on the device, seeds, the loss of a batch."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from uq.inference.checkpoints import Checkpoints, Stage
from uq.inference.data import ArrayBatches
from uq.inference.training import Batches
from uq.nn.network import Network

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Seeds:
    """Independent seeds, so that one more draw somewhere does not move the draws elsewhere."""

    init: int
    shuffle: int
    noise: int
    predict: int
    split: int


@dataclass(frozen=True)
class TrainingData:
    """What a method's ``_infer`` gets: batches of (x, y[, weight]) on the device."""

    batches: Batches
    n_effective: float
    """Sum of the sample weights: the N of a log likelihood."""
    held_out: tuple[Tensor, ...] | None
    fabric: Fabric
    seeds: Seeds
    checkpoints: Checkpoints | None = None

    def stage(self) -> Stage | None:
        """Where the next piece of the fit writes its checkpoints."""
        return None if self.checkpoints is None else self.checkpoints.stage()

    def fingerprint(self) -> str:
        """Hash of the rows, as far as they are in memory."""
        parts = [torch.tensor([self.n_effective, len(self.batches)])]
        if isinstance(self.batches, ArrayBatches):
            parts += [*self.batches.tensors, *(self.held_out or ())]
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def generator(self, seed: int) -> torch.Generator:
        """Return a generator on the device of the data."""
        return torch.Generator(self.fabric.device).manual_seed(seed)


class Objective(nn.Module, ABC):
    """Loss of a batch, and the log score that early stopping watches."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Loss of a batch: a mean over rows, in nats."""

    @abstractmethod
    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Predictive negative log likelihood of each row at the current weights."""


def weighted_mean(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over rows; ``weight`` has mean 1 over the whole data."""
    return rows.mean() if weight is None else (rows * weight).mean()


class NetworkObjective(Objective):
    """Mean negative log likelihood of a network."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean negative log likelihood of the batch, in nats."""
        return weighted_mean(self.network.nll(x, y), weight)

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log likelihood of each row."""
        return self.network.nll(x, y)

"""Training of an SDM network on one split, usable from plain torch.

Rows are split into support and calibration halves. After each epoch the support is embedded again
under the current weights, and q and d are found again: for support rows (each without itself) as
constants of the next epoch's loss, for calibration rows to judge the epoch by the balanced loss:
the mean over true classes of the mean loss of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uq.errors import DataError
from uq.inference.sdm_calibration import SDMPosterior, distance_cdfs, distance_quantile
from uq.nn.sdm import Q_SOFTMAX, ExemplarAdaptor, SDMLoss


class SDMObjective(nn.Module):
    """Loss of a batch whose q and d are known."""

    def __init__(self, body: nn.Module, head: ExemplarAdaptor) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.loss: SDMLoss = SDMLoss("none")

    def forward(
        self, x: Tensor, y: Tensor, q: Tensor, d: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Mean SDM loss of the batch."""
        _, logits = self.head(self.body(x))
        rows = self.loss(logits, y, q, d)
        return rows.mean() if weight is None else (rows * weight).mean()


@dataclass(frozen=True)
class Rows:
    """Distinct rows: outputs of the frozen part, class, weight, and where they came from."""

    embedded: Tensor
    y: Tensor
    weight: Tensor
    position: Tensor

    def __getitem__(self, at: Tensor) -> Rows:
        return Rows(self.embedded[at], self.y[at], self.weight[at], self.position[at])


class Round:
    """One split and one training: what :func:`train` needs, and what is kept of it."""

    def __init__(self, posterior: SDMPosterior, support: Rows, calibration: Rows) -> None:
        self.posterior = posterior
        self.support = support
        self.calibration = calibration
        # The first epoch is that of a softmax and its cross-entropy.
        self.d: Tensor = torch.ones_like(support.weight)
        self.q: Tensor = Q_SOFTMAX * self.d
        self.mean_q: list[float] = []

    def refresh(self) -> float:
        """Find q and d again under the current weights; return the balanced calibration loss."""
        posterior, s, c = self.posterior, self.support, self.calibration
        posterior.learn_support(s.embedded, s.y, s.position)
        if not bool(posterior.support.isfinite().all()):
            return math.nan  # the training loop says what to do
        own = posterior.match_support()
        cdfs = distance_cdfs(own.d0, own.q, s.y, posterior.n_classes, s.weight)
        d = distance_quantile(own.d0, cdfs)
        # d = 0 at all rows has no gradient, and nothing would ever move: as in the first epoch.
        alive = bool(d.any())
        self.q.copy_(own.q if alive else torch.full_like(d, Q_SOFTMAX))
        self.d.copy_(d if alive else torch.ones_like(d))
        v = posterior.calibrate(c.embedded, c.y, c.weight)
        loss = SDMLoss("none")(v.logits, c.y, v.q.double(), v.d)
        self.mean_q.append(self._balanced(v.q.double()))
        return self._balanced(loss)

    def _balanced(self, rows: Tensor) -> float:
        """Mean over classes of the weighted mean over the calibration rows of each."""
        y, w = self.calibration.y, self.calibration.weight
        total = torch.zeros(self.posterior.n_classes, dtype=rows.dtype, device=rows.device)
        weight = total.index_add(0, y, w)
        mean = total.index_add(0, y, rows * w) / weight
        return float(mean[weight > 0].mean())


def distinct(x: Tensor, y: Tensor, weight: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """First position and joint weight of each distinct (x, y), in an order of the values alone."""
    flat = x.flatten(1)
    ids = flat.unique(dim=0, return_inverse=True)[1]
    keys, group = (ids * n_classes + y).unique(return_inverse=True)
    total = weight.new_zeros(len(keys)).index_add(0, group, weight)
    positions = torch.arange(len(y), device=y.device)
    first = positions.new_full((len(keys),), len(y))
    return first.scatter_reduce(0, group, positions, "amin"), total


def halves(y: Tensor, n_classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of a support and a calibration half of every class; a single row is support.

    Raises
    ------
    DataError
        If no class has two rows.
    """
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for c in range(n_classes):
        rows = (y == c).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator, device=rows.device)]
        middle = (len(rows) + 1) // 2
        parts[0].append(rows[:middle])
        parts[1].append(rows[middle:])
    support, calibration = (torch.cat(part).sort().values for part in parts)
    if not len(calibration):
        raise DataError(
            "SDM: no class has two distinct rows, of which one could be held for calibration; give "
            "more rows."
        )
    return support, calibration

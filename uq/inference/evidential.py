"""Evidential models after training: a network, and a head that reads distributions off it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from uq.distributions import Predictive
from uq.inference.posterior import Posterior

_ROWS = 8192


class EvidentialPosterior(Posterior):
    """Second-order distribution of each row, in closed form from one forward pass.

    Parameters
    ----------
    network : Module
        Maps inputs to the outputs that ``head`` reads.
    head : Module
        :class:`uq.nn.DirichletHead`, :class:`uq.nn.ETPHead` or
        :class:`uq.nn.NormalInverseGammaHead`.
    seed : int, default=0
        Seed of :meth:`functions`.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import EvidentialPosterior
    >>> from uq.nn import MLP, DirichletHead
    >>> net, head = MLP(2, (8,), 3), DirichletHead(3)  # trained by ``head.loss``
    >>> EvidentialPosterior(net, head)(torch.randn(5, 2)).concentration.shape
    torch.Size([5, 3])
    """

    def __init__(self, network: nn.Module, head: nn.Module, seed: int = 0) -> None:
        super().__init__(seed)
        self.network = network
        self.head: Any = head

    def outputs(self, x: Tensor) -> Tensor:
        """What the network gives at each row, in eval mode and in chunks."""
        self.network.eval()
        with torch.no_grad():
            return torch.cat([self.network(rows) for rows in x.split(_ROWS)])

    def forward(self, x: Tensor, n_samples: int = 1) -> Predictive:
        """Predictive distribution at the rows of ``x``; there is nothing to sample."""
        with torch.no_grad():
            dist: Predictive = self.head.predictive(self.outputs(x))
        return dist.cpu()

    def functions(self, x: Tensor, n: int) -> Tensor:
        """Draw probabilities or means; see :meth:`uq.inference.Posterior.functions`."""
        # Heads draw on the CPU: the same functions on every device.
        generator = self.generator(torch.device("cpu"))
        with torch.no_grad():
            values: Tensor = self.head.functions(self.outputs(x), n, generator)
        return values

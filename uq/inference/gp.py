"""Posterior of a Gaussian process on features, exact or variational."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from uq.distributions import Predictive
from uq.distributions.base import concatenate
from uq.inference.posterior import Posterior
from uq.nn.gp import GaussianProcess, VariationalClassification

_ROWS = 4096


class GPPosterior(Posterior):
    """Gaussian process on the features of a body (the inputs themselves for an empty one).

    Parameters
    ----------
    body : Module
        Maps inputs to features (n, D).
    process : GaussianProcess
        Exact and conditioned, or variational.
    """

    def __init__(self, body: nn.Module, process: GaussianProcess, seed: int = 0) -> None:
        super().__init__(seed)
        self.body = body
        self.process = process

    def forward(self, x: Tensor, n_samples: int = 64) -> Predictive:
        """Normal in closed form for regression; ``n_samples`` draws of the logits for classes."""
        process: Any = self.process
        classes = isinstance(self.process, VariationalClassification)
        self.body.eval()
        parts = []
        with torch.no_grad():
            for rows in x.split(_ROWS):
                moments = process.moments(self.body(rows))
                if classes:
                    generator = self.generator(x.device)  # the same draws for all rows
                    parts.append(process.predict(*moments, n_samples, generator))
                else:
                    parts.append(process.predict(*moments))
        return concatenate(parts).cpu() if len(parts) > 1 else parts[0].cpu()

    def functions(self, x: Tensor, n: int) -> Tensor:
        """Draw functions of the process; see :meth:`Posterior.functions`."""
        self.body.eval()
        with torch.no_grad():
            values = self.process.draw(self.body(x), n, self.generator(x.device))
        if isinstance(self.process, VariationalClassification):
            values = values.softmax(-1)
        return values.cpu()

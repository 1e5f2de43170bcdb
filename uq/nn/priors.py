"""Priors over the weights of a network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor

from uq.errors import ParameterError


class NormalPrior:
    """Independent N(0, scale²) on every weight.

    Parameters
    ----------
    scale : float
        Standard deviation.

    Raises
    ------
    ParameterError
        Unless ``scale`` is a number above 0.

    Examples
    --------
    >>> from uq.nn import NormalPrior
    >>> NormalPrior(0.5).precision
    4.0
    """

    def __init__(self, scale: float) -> None:
        if not isinstance(scale, Real) or not scale > 0:
            raise ParameterError(f"NormalPrior: scale must be a number > 0, got {scale!r}.")
        self.scale: float = scale

    @property
    def precision(self) -> float:
        """1/scale², the curvature that the prior adds to the log posterior."""
        return self.scale**-2

    def distribution(self, parameter: Tensor) -> TorchDistribution:
        """Pyro distribution over one weight tensor, all of it one event."""
        zero = torch.zeros_like(parameter)
        return Normal(zero, self.scale, validate_args=False).to_event(parameter.ndim)

    def log_prob(self, weights: Iterable[Tensor]) -> Tensor:
        """Log density of all ``weights`` together, in nats."""
        tensors = list(weights)
        n = sum(p.numel() for p in tensors)
        squares = torch.stack([p.square().sum() for p in tensors]).sum()
        constant = n * (math.log(self.scale) + 0.5 * math.log(2 * math.pi))
        return -0.5 * self.precision * squares - constant

"""Likelihoods: what the outputs of a network mean for the target.

A likelihood is a module, so that a learned noise scale is one more weight: an optimiser trains it
and a posterior covers it. Calling it turns raw outputs into the parameters of a Pyro distribution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from numbers import Integral

import torch
from pyro.distributions import Categorical, Normal, TorchDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from uq.distributions import CategoricalMixture, NormalMixture, Predictive
from uq.errors import ParameterError

# Noise below this share of the target's standard deviation is not identifiable in float32 and
# lets the density run off to infinity on interpolated data.
SCALE_FLOOR = 1e-3
INITIAL_SCALE = 0.5


def _check_count(owner: str, name: str, value: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ParameterError(f"{owner}: {name} must be an integer >= 1, got {value!r}.")


class Likelihood(nn.Module, ABC):
    """p(y | outputs of the network).

    The parts work on what a network puts out:

    - ``likelihood(outputs)``: parameters of the distribution of y, rows first;
    - ``nll(parameters, y)``: what training minimises, in nats a row;
    - ``predictive(parameters)``: the mixture over posterior draws, on a first axis of draws.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import CategoricalLikelihood
    >>> likelihood = CategoricalLikelihood(3)
    >>> parameters = likelihood(torch.zeros(4, 3))  # outputs of a network for four rows
    >>> likelihood.nll(parameters, torch.tensor([0, 1, 2, 0]))  # log 3 each
    tensor([1.0986, 1.0986, 1.0986, 1.0986])
    """

    n_outputs: int
    """Width that the network must have."""

    @abstractmethod
    def forward(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Parameters of the distribution of y, each with the rows on the first axis."""

    @abstractmethod
    def nll(self, parameters: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Negative log likelihood of each row, in nats, shape (n,)."""

    @abstractmethod
    def distribution(self, parameters: tuple[Tensor, ...]) -> TorchDistribution:
        """Pyro distribution of y, one row a batch element."""

    @abstractmethod
    def predictive(self, parameters: tuple[Tensor, ...]) -> Predictive:
        """Mixture over posterior draws; ``parameters`` carry them on a new first axis."""


class CategoricalLikelihood(Likelihood):
    """Class labels 0 … K−1 with logits from the network.

    Parameters
    ----------
    n_classes : int
        Number of classes K.

    Raises
    ------
    ParameterError
        If ``n_classes`` is no integer of at least 1.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import CategoricalLikelihood
    >>> likelihood = CategoricalLikelihood(2)
    >>> likelihood.n_outputs  # what the network must put out
    2
    >>> draws = torch.tensor([[[3.0, 0.0]], [[0.0, 3.0]]])  # logits (draws, rows, classes)
    >>> likelihood.predictive((draws,)).probs
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        _check_count("CategoricalLikelihood", "n_classes", n_classes)
        self.n_outputs = n_classes

    def forward(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Logits, unchanged."""
        return (outputs,)

    def nll(self, parameters: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Cross entropy of each row."""
        return F.cross_entropy(parameters[0], y, reduction="none")

    def distribution(self, parameters: tuple[Tensor, ...]) -> TorchDistribution:
        """Categorical of each row."""
        return Categorical(logits=parameters[0], validate_args=False)

    def predictive(self, parameters: tuple[Tensor, ...]) -> Predictive:
        """Mixture of the draws' categoricals."""
        return CategoricalMixture(parameters[0])


class NormalLikelihood(Likelihood):
    """Normal noise around the network's mean, independent over the m outputs of a row.

    Parameters
    ----------
    n_targets : int
        Number of outputs m.
    noise : {"homoscedastic", "heteroscedastic"}, default="homoscedastic"
        One learned standard deviation per output, or a second output of the network per target
        that gives the standard deviation at each input. Both are softplus + 1e-3, in units of the
        standardised target.

    Raises
    ------
    ParameterError
        If ``n_targets`` is no integer of at least 1, or ``noise`` is neither.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import NormalLikelihood
    >>> likelihood = NormalLikelihood(1)
    >>> loc, scale = likelihood(torch.tensor([[0.2], [1.5]]))
    >>> scale.detach()  # learned: a parameter
    tensor([[0.5000],
            [0.5000]])
    >>> likelihood.nll((loc, scale), torch.tensor([[0.2], [1.0]])).detach()
    tensor([0.2258, 0.7258])
    >>> NormalLikelihood(2, "heteroscedastic").n_outputs  # two means, two scales
    4
    """

    def __init__(self, n_targets: int, noise: str = "homoscedastic") -> None:
        super().__init__()
        _check_count("NormalLikelihood", "n_targets", n_targets)
        if noise not in ("homoscedastic", "heteroscedastic"):
            raise ParameterError(
                f"noise must be 'homoscedastic' or 'heteroscedastic', got {noise!r}."
            )
        raw = INITIAL_SCALE - SCALE_FLOOR
        self.n_targets = n_targets
        self.offset: float = raw + math.log(-math.expm1(-raw))  # inverse softplus
        self.raw_scale: nn.Parameter | None = None
        self.n_outputs = 2 * n_targets
        if noise == "homoscedastic":
            self.n_outputs = n_targets
            # Zero is the initial value, so that a prior centred at zero pulls the noise to where
            # it starts. No gain on it: that would square into the curvature, which IVON learns
            # more slowly than the noise would then move.
            self.raw_scale = nn.Parameter(torch.zeros(n_targets))

    def forward(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Mean and standard deviation of each row, both (n, m)."""
        if self.raw_scale is None:
            loc, raw = outputs.split(self.n_targets, -1)
            return loc, F.softplus(raw + self.offset) + SCALE_FLOOR
        scale = F.softplus(self.raw_scale + self.offset) + SCALE_FLOOR
        return outputs, scale.expand_as(outputs)

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Set the one noise level per output to ``scale`` (m,), or to its floor."""
        if self.raw_scale is None:
            raise ParameterError("set_scale: heteroscedastic noise comes from the network.")
        raw = (scale - SCALE_FLOOR).clamp_min(SCALE_FLOOR / 100)
        self.raw_scale.copy_(raw + torch.log(-torch.expm1(-raw)) - self.offset)

    def nll(self, parameters: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Gaussian negative log density of each row, summed over outputs."""
        loc, scale = parameters
        z = (y - loc) / scale
        return (0.5 * z.square() + scale.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def distribution(self, parameters: tuple[Tensor, ...]) -> TorchDistribution:
        """Normal of each row, event shape (m,)."""
        loc, scale = parameters
        return Normal(loc, scale, validate_args=False).to_event(1)

    def predictive(self, parameters: tuple[Tensor, ...]) -> Predictive:
        """Mixture of the draws' Normals, batch shape (n, m)."""
        loc, scale = parameters
        return NormalMixture(loc.double(), scale.double())

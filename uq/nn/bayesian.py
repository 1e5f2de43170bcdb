"""A network as a Pyro model: every trainable weight a sample site, the likelihood under a plate."""

from __future__ import annotations

from collections.abc import Callable

import pyro
from pyro.distributions import Normal
from pyro.nn import PyroModule
from torch import Tensor
from torch.func import functional_call

from uq.nn.network import Network
from uq.nn.priors import NormalPrior


class BayesianNetwork(PyroModule):
    """Pyro model of a network: ``model(x, y)``, for NUTS, autoguides and ``Predictive``.

    The methods of uq train on the functional form :meth:`log_joint`, which a test holds equal to
    the traced model; tracing costs several times a small network's forward pass.

    Parameters
    ----------
    network : Network
        Architecture and likelihood. Its own weights are not used.
    prior : NormalPrior
        Prior of every weight.

    Examples
    --------
    >>> import torch
    >>> from pyro.infer import Predictive
    >>> from uq.nn import MLP, BayesianNetwork, Network, NormalLikelihood, NormalPrior
    >>> model = BayesianNetwork(Network(MLP(2, (8,), 1), NormalLikelihood(1)), NormalPrior(1.0))
    >>> drawn = Predictive(model, num_samples=5)(torch.zeros(3, 2))  # from the prior
    >>> drawn["y"].shape
    torch.Size([5, 3, 1])
    """

    def __init__(self, network: Network, prior: NormalPrior) -> None:
        super().__init__()
        self._network = [network]  # in a list: its parameters are not this module's
        self.prior = prior

    @property
    def network(self) -> Network:
        """The network, with weights that the model does not use."""
        return self._network[0]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Sample weights and targets; condition on ``y`` where it is given."""
        weights = {
            name: pyro.sample(name, self.prior.distribution(p.detach()))
            for name, p in self.network.named_parameters()
            if p.requires_grad
        }
        parameters = functional_call(self.network, weights, (x,))
        with pyro.plate("data", len(x)):
            value: Tensor = pyro.sample(
                "y", self.network.likelihood.distribution(parameters), obs=y
            )
        return value

    def log_joint(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Log prior plus log likelihood at ``weights``, in nats."""
        parameters = functional_call(self.network, weights, (x,))
        nll = self.network.likelihood.nll(parameters, y).sum()
        return self.prior.log_prob(weights.values()) - nll


def normal_guide(
    means: dict[str, Tensor], stds: dict[str, Tensor]
) -> Callable[[Tensor, Tensor | None], None]:
    """Pyro guide of independent Normals over the sites of a :class:`BayesianNetwork`."""

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        for name, mean in means.items():
            site = Normal(mean, stds[name], validate_args=False).to_event(mean.ndim)
            pyro.sample(name, site)

    return guide

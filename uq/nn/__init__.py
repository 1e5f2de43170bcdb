"""Networks, likelihoods and Bayesian layers: plain ``torch.nn`` modules."""

from uq.nn.bayesian import BayesianNetwork
from uq.nn.bodies import MLP, ConvNet
from uq.nn.likelihoods import CategoricalLikelihood, Likelihood, NormalLikelihood
from uq.nn.network import Network
from uq.nn.priors import NormalPrior
from uq.nn.vbll import BayesianLastLayer, CategoricalLastLayer, NormalLastLayer

__all__ = [
    "MLP",
    "BayesianLastLayer",
    "BayesianNetwork",
    "CategoricalLastLayer",
    "CategoricalLikelihood",
    "ConvNet",
    "Likelihood",
    "Network",
    "NormalLastLayer",
    "NormalLikelihood",
    "NormalPrior",
]

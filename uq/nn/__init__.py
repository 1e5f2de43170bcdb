"""Networks, likelihoods and Bayesian layers: plain ``torch.nn`` modules."""

from uq.nn.abnn import BayesianNorm, bayesian_norm, without_noise
from uq.nn.bayesian import BayesianNetwork
from uq.nn.bodies import MLP, ConvNet
from uq.nn.etp import ETPHead, VariationalLinear, dirichlet_kl, variational
from uq.nn.evidential import DirichletHead, evidential_loss
from uq.nn.evidential_functions import fisher_log_det
from uq.nn.evidential_regression import NormalInverseGammaHead, nig_kl, nig_nll
from uq.nn.implicit import MatrixGenerator, MLPGenerator, WeightLayout
from uq.nn.likelihoods import CategoricalLikelihood, Likelihood, NormalLikelihood
from uq.nn.network import Network
from uq.nn.pfn import PFN, PFNConfig, load_pfn, preprocess, save_pfn
from uq.nn.priors import NormalPrior
from uq.nn.sdm import ExemplarAdaptor, FeatureNetwork, SDMActivation, SDMLoss
from uq.nn.vbll import (
    BayesianLastLayer,
    VBLLHeteroscedasticRegression,
    VBLLRegression,
    VBLLStudentTRegression,
)
from uq.nn.vbll_classification import (
    VBLLClassification,
    VBLLGenerativeClassification,
    VBLLHeteroscedasticClassification,
)
from uq.nn.vbll_statistics import ClassStatistics, LinearStatistics

__all__ = [
    "MLP",
    "PFN",
    "BayesianLastLayer",
    "BayesianNetwork",
    "BayesianNorm",
    "CategoricalLikelihood",
    "ClassStatistics",
    "ConvNet",
    "DirichletHead",
    "ETPHead",
    "ExemplarAdaptor",
    "FeatureNetwork",
    "Likelihood",
    "LinearStatistics",
    "MLPGenerator",
    "MatrixGenerator",
    "Network",
    "NormalInverseGammaHead",
    "NormalLikelihood",
    "NormalPrior",
    "PFNConfig",
    "SDMActivation",
    "SDMLoss",
    "VBLLClassification",
    "VBLLGenerativeClassification",
    "VBLLHeteroscedasticClassification",
    "VBLLHeteroscedasticRegression",
    "VBLLRegression",
    "VBLLStudentTRegression",
    "VariationalLinear",
    "WeightLayout",
    "bayesian_norm",
    "dirichlet_kl",
    "evidential_loss",
    "fisher_log_det",
    "load_pfn",
    "nig_kl",
    "nig_nll",
    "preprocess",
    "save_pfn",
    "variational",
    "without_noise",
]

"""Algorithms that find a posterior, usable from plain torch or Pyro without an estimator."""

from uq.inference.abnn import (
    ABNNPosterior,
    epistemic_parts,
    insert_norms,
    random_class_weights,
    to_abnn,
)
from uq.inference.evidential import EvidentialPosterior
from uq.inference.implicit_vi import (
    ImplicitGuide,
    ImplicitPosterior,
    ImplicitWeights,
)
from uq.inference.ivon import IVON
from uq.inference.ivon_influence import LeaveOneOut, leave_one_out
from uq.inference.ivon_merging import merge
from uq.inference.masked_bnn import MaskedBNN, MaskedMoves, MaskedState
from uq.inference.masked_bnn_moves import WidthPrior, width_penalty
from uq.inference.masked_bnn_runs import MaskedBNNKernel, SamplerWarning
from uq.inference.pbnn import OHSMC, SGSMC, PartialPosterior
from uq.inference.pbnn_network import ParticleNetwork, stochastic_names
from uq.inference.pfn import pretrain_pfn
from uq.inference.posterior import (
    DrawsPosterior,
    LastLayerPosterior,
    MixturePosterior,
    NormalPosterior,
    Posterior,
)
from uq.inference.resampling import ParticleWarning, resample
from uq.inference.sdm import Matches, match
from uq.inference.smc import DataSchedule, SMCResult, SMCSampler
from uq.inference.smc_moves import HMC, RandomWalk
from uq.inference.ssvi import SSVI, removal_score
from uq.inference.ssvi_posterior import SparseNormalGuide, SparsePosterior
from uq.inference.tensorboard import TensorBoardCallback
from uq.inference.training import TrainingState, TrainingStep
from uq.inference.vbll import post_train

__all__ = [
    "HMC",
    "IVON",
    "OHSMC",
    "SGSMC",
    "SSVI",
    "ABNNPosterior",
    "DataSchedule",
    "DrawsPosterior",
    "EvidentialPosterior",
    "ImplicitGuide",
    "ImplicitPosterior",
    "ImplicitWeights",
    "LastLayerPosterior",
    "LeaveOneOut",
    "MaskedBNN",
    "MaskedBNNKernel",
    "MaskedMoves",
    "MaskedState",
    "Matches",
    "MixturePosterior",
    "NormalPosterior",
    "PartialPosterior",
    "ParticleNetwork",
    "ParticleWarning",
    "Posterior",
    "RandomWalk",
    "SMCResult",
    "SMCSampler",
    "SamplerWarning",
    "SparseNormalGuide",
    "SparsePosterior",
    "TensorBoardCallback",
    "TrainingState",
    "TrainingStep",
    "WidthPrior",
    "epistemic_parts",
    "insert_norms",
    "leave_one_out",
    "match",
    "merge",
    "post_train",
    "pretrain_pfn",
    "random_class_weights",
    "removal_score",
    "resample",
    "stochastic_names",
    "to_abnn",
    "width_penalty",
]

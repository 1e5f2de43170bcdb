"""Algorithms that find a posterior, usable from plain torch or Pyro without an estimator."""

from uq.inference.evidential import EvidentialPosterior
from uq.inference.ivon import IVON
from uq.inference.ivon_influence import LeaveOneOut, leave_one_out
from uq.inference.ivon_merging import merge
from uq.inference.posterior import (
    DrawsPosterior,
    LastLayerPosterior,
    MixturePosterior,
    NormalPosterior,
    Posterior,
)
from uq.inference.ssvi import SSVI, account, removal_score
from uq.inference.ssvi_posterior import SparseNormalGuide, SparsePosterior
from uq.inference.training import TrainingState, train
from uq.inference.vbll import post_train

__all__ = [
    "IVON",
    "SSVI",
    "DrawsPosterior",
    "EvidentialPosterior",
    "LastLayerPosterior",
    "LeaveOneOut",
    "MixturePosterior",
    "NormalPosterior",
    "Posterior",
    "SparseNormalGuide",
    "SparsePosterior",
    "TrainingState",
    "account",
    "leave_one_out",
    "merge",
    "post_train",
    "removal_score",
    "train",
]

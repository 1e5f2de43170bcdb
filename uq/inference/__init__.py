"""Algorithms that find a posterior, usable from plain torch or Pyro without an estimator."""

from uq.inference.ivon import IVON
from uq.inference.posterior import DrawsPosterior, LastLayerPosterior, NormalPosterior, Posterior
from uq.inference.training import TrainingState, train

__all__ = [
    "IVON",
    "DrawsPosterior",
    "LastLayerPosterior",
    "NormalPosterior",
    "Posterior",
    "TrainingState",
    "train",
]

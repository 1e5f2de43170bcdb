"""Predictive distributions: Pyro distributions with quantiles and a split of uncertainty."""

from uq.distributions.base import Predictive
from uq.distributions.classification import CategoricalMixture
from uq.distributions.regression import NormalMixture

__all__ = ["CategoricalMixture", "NormalMixture", "Predictive"]

"""Predictive distributions: Pyro distributions with quantiles and a split of uncertainty."""

from uq.distributions.base import ClassPredictive, Predictive, RealPredictive
from uq.distributions.classification import CategoricalMixture
from uq.distributions.regression import NormalMixture

__all__ = ["CategoricalMixture", "ClassPredictive", "NormalMixture", "Predictive", "RealPredictive"]

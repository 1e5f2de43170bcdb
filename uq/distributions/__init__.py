"""Predictive distributions: Pyro distributions that know their quantiles and their two uncertainties."""

from uq.distributions.base import Predictive
from uq.distributions.classification import CategoricalMixture
from uq.distributions.regression import NormalMixture

__all__ = ["CategoricalMixture", "NormalMixture", "Predictive"]

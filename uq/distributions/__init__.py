"""Predictive distributions: Pyro distributions with quantiles and a split of uncertainty."""

from uq.distributions.bar import BarDistribution
from uq.distributions.base import ClassPredictive, Predictive, RealPredictive, concatenate, mixture
from uq.distributions.classification import CategoricalMixture
from uq.distributions.dirichlet import DirichletCategorical
from uq.distributions.empirical import Empirical
from uq.distributions.normal_inverse_gamma import NormalInverseGamma
from uq.distributions.parametric import Parametric
from uq.distributions.recalibrated import Recalibrated
from uq.distributions.regression import NormalMixture
from uq.distributions.sample_scores import energy_score, sample_crps

__all__ = [
    "BarDistribution",
    "CategoricalMixture",
    "ClassPredictive",
    "DirichletCategorical",
    "Empirical",
    "NormalInverseGamma",
    "NormalMixture",
    "Parametric",
    "Predictive",
    "RealPredictive",
    "Recalibrated",
    "concatenate",
    "energy_score",
    "mixture",
    "sample_crps",
]

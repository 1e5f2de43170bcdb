"""Predictive uncertainty behind one scikit-learn-style API.

``Est().fit(X, y).predict_distribution(X_new)`` gives a Pyro distribution, and
``uq.calibration.report(dist, y)`` a calibration report on held-out data.
"""

import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# A library writes to its logger; whether anything is shown is for the application to say.
logging.getLogger("uq").addHandler(logging.NullHandler())

# Loaded on first use (PEP 562): `import uq` costs nothing until something is asked of it.
_EXPORTS = {
    "ABNNClassifier": "uq.models.abnn",
    "ABNNRegressor": "uq.models.abnn",
    "Calibrated": "uq.models.calibrated",
    "Conformal": "uq.models.conformal",
    "ETPClassifier": "uq.models.etp",
    "EnsembleClassifier": "uq.models.ensemble",
    "EnsembleRegressor": "uq.models.ensemble",
    "EvidentialClassifier": "uq.models.evidential",
    "EvidentialRegressor": "uq.models.evidential",
    "IVONClassifier": "uq.models.ivon",
    "IVONRegressor": "uq.models.ivon",
    "GPClassifier": "uq.models.gp",
    "GPRegressor": "uq.models.gp",
    "ImplicitVIClassifier": "uq.models.implicit",
    "ImplicitVIRegressor": "uq.models.implicit",
    "MAPClassifier": "uq.models.map",
    "MAPRegressor": "uq.models.map",
    "MaskedBNNClassifier": "uq.models.masked_bnn",
    "MaskedBNNRegressor": "uq.models.masked_bnn",
    "PartialBNNClassifier": "uq.models.pbnn",
    "PartialBNNRegressor": "uq.models.pbnn",
    "NUTSClassifier": "uq.models.nuts",
    "NUTSRegressor": "uq.models.nuts",
    "PFNClassifier": "uq.models.pfn",
    "PFNRegressor": "uq.models.pfn",
    "PyroClassifier": "uq.models.pyro_models",
    "PyroRegressor": "uq.models.pyro_models",
    "SSVIClassifier": "uq.models.ssvi",
    "SSVIRegressor": "uq.models.ssvi",
    "SDMClassifier": "uq.models.sdm",
    "TableModel": "uq.models.table",
    "TableStream": "uq.streams",
    "UQError": "uq.errors",
    "VBLLClassifier": "uq.models.vbll",
    "VBLLRegressor": "uq.models.vbll",
    "load": "uq.io",
    "methods": "uq.models.registry",
}
_PARTS = ("calibration", "data", "distributions", "inference", "kernels", "models", "nn")

__all__ = [*_EXPORTS, *_PARTS]

if TYPE_CHECKING:
    from uq import calibration as calibration
    from uq import data as data
    from uq import distributions as distributions
    from uq import inference as inference
    from uq import kernels as kernels
    from uq import models as models
    from uq import nn as nn
    from uq.errors import UQError as UQError
    from uq.io import load as load
    from uq.models.abnn import ABNNClassifier as ABNNClassifier
    from uq.models.abnn import ABNNRegressor as ABNNRegressor
    from uq.models.calibrated import Calibrated as Calibrated
    from uq.models.conformal import Conformal as Conformal
    from uq.models.ensemble import EnsembleClassifier as EnsembleClassifier
    from uq.models.ensemble import EnsembleRegressor as EnsembleRegressor
    from uq.models.etp import ETPClassifier as ETPClassifier
    from uq.models.evidential import EvidentialClassifier as EvidentialClassifier
    from uq.models.evidential import EvidentialRegressor as EvidentialRegressor
    from uq.models.gp import GPClassifier as GPClassifier
    from uq.models.gp import GPRegressor as GPRegressor
    from uq.models.implicit import ImplicitVIClassifier as ImplicitVIClassifier
    from uq.models.implicit import ImplicitVIRegressor as ImplicitVIRegressor
    from uq.models.ivon import IVONClassifier as IVONClassifier
    from uq.models.ivon import IVONRegressor as IVONRegressor
    from uq.models.map import MAPClassifier as MAPClassifier
    from uq.models.map import MAPRegressor as MAPRegressor
    from uq.models.masked_bnn import MaskedBNNClassifier as MaskedBNNClassifier
    from uq.models.masked_bnn import MaskedBNNRegressor as MaskedBNNRegressor
    from uq.models.nuts import NUTSClassifier as NUTSClassifier
    from uq.models.nuts import NUTSRegressor as NUTSRegressor
    from uq.models.pbnn import PartialBNNClassifier as PartialBNNClassifier
    from uq.models.pbnn import PartialBNNRegressor as PartialBNNRegressor
    from uq.models.pfn import PFNClassifier as PFNClassifier
    from uq.models.pfn import PFNRegressor as PFNRegressor
    from uq.models.pyro_models import PyroClassifier as PyroClassifier
    from uq.models.pyro_models import PyroRegressor as PyroRegressor
    from uq.models.registry import methods as methods
    from uq.models.sdm import SDMClassifier as SDMClassifier
    from uq.models.ssvi import SSVIClassifier as SSVIClassifier
    from uq.models.ssvi import SSVIRegressor as SSVIRegressor
    from uq.models.table import TableModel as TableModel
    from uq.models.vbll import VBLLClassifier as VBLLClassifier
    from uq.models.vbll import VBLLRegressor as VBLLRegressor
    from uq.streams import TableStream as TableStream


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"uq.{name}")
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    # With name and object Python adds "Did you mean …?".
    message = f"module 'uq' has no attribute {name!r}"
    raise AttributeError(message, name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

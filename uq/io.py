"""Save and load fitted models: one safetensors file, tensors plus a JSON header.

Loading never unpickles and never imports what a file names: a file holds numbers and text, and the
classes that it may mention are listed here.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import nn

from uq.errors import LoadError
from uq.files import write_atomically
from uq.inference.training import isolated_rng
from uq.migrations import FORMAT, FORMAT_VERSION, migrate
from uq.models.loading import (
    check_fitted,
    check_parameters,
    fitted_names,
    load_weights,
    stored_parameters,
    try_out,
)
from uq.models.registry import METHODS
from uq.plain import PlainReader, PlainWriter, one_line, read_file

_CLASSES: dict[str, str] = {
    m.class_name(task): m.module for m in METHODS.values() for task in m.tasks
} | {
    "BetaCalibration": "uq.calibration",
    "Calibrated": "uq.models.calibrated",
    "Conformal": "uq.models.conformal",
    "ConformalIntervals": "uq.calibration",
    "ConformalSets": "uq.calibration",
    "EvidenceScaling": "uq.calibration",
    "HistogramBinning": "uq.calibration",
    "IsotonicCalibration": "uq.calibration",
    "MatrixScaling": "uq.calibration",
    "PyroClassifier": "uq.models.pyro_models",
    "PyroRegressor": "uq.models.pyro_models",
    "QuantileRecalibration": "uq.calibration",
    "TablePreprocessor": "uq.models.table",
    "TableModel": "uq.models.table",
    "TemperatureScaling": "uq.calibration",
    "VarianceScaling": "uq.calibration",
    "VectorScaling": "uq.calibration",
}


def save(model: BaseEstimator, path: str | Path) -> None:
    """Write a fitted model to ``path``, atomically.

    Parameters
    ----------
    model : estimator
        A fitted uq estimator, :class:`uq.TableModel` or :class:`uq.Calibrated`.
    path : str or Path
        File to write, by habit with the suffix ``.uq``.

    Raises
    ------
    SaveError
        If the file cannot be written (no such folder, disk full, no permission). Whatever was at
        ``path`` before is unchanged.
    ParameterError
        If the model holds something that cannot be stored as numbers and text.
    """
    from uq import __version__

    writer = _Writer()
    root = writer.encode(model, type(model).__name__)
    header = {"format": FORMAT, "version": FORMAT_VERSION, "uq": __version__, "model": root}
    write_atomically({path: writer.to_bytes(header)})


def load(path: str | Path, *, module: Any = None) -> Any:
    """Load a model written by :meth:`uq.models.base.Estimator.save`.

    Parameters
    ----------
    path : str or Path
        File to read.
    module : torch.nn.Module or callable, optional
        The network, for a model that was fitted with ``module=``: code is never stored in a file,
        so the architecture has to come from you; its weights come from the file.

    Returns
    -------
    estimator
        Fitted; it predicts the same bits as the one saved. ``callbacks`` are not stored, and
        neither are a ``random_state`` other than an integer and a ``cv`` that is a splitter. The
        ``prior`` of a PFN is not taken from the file where it is a path: to fit anew, give it.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    LoadError
        If the file is damaged, is not a uq model, comes from a newer version, or does not fit
        ``module``.

    Examples
    --------
    >>> import tempfile, uq
    >>> from sklearn.datasets import load_wine
    >>> X, y = load_wine(return_X_y=True)
    >>> model = uq.MAPClassifier(max_epochs=5, random_state=0).fit(X, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(folder + "/wine.uq")
    ...     again = uq.load(folder + "/wine.uq")
    >>> bool((model.predict_proba(X) == again.predict_proba(X)).all())
    True
    """
    header, tensors = read_file(path, "model")
    if header.get("format") != FORMAT:
        raise LoadError(f"{str(path)!r} is a safetensors file, but not a model saved by uq.")
    try:
        header = migrate(header)
        reader = _Reader(tensors, module)
        model = reader.decode(header["model"])
        reader.finish()
        if not isinstance(model, BaseEstimator):
            raise LoadError("it does not hold a model.")
        return model
    except NeedsCodeError as error:
        raise LoadError(f"{str(path)!r}: {error}") from None
    except LoadError as error:
        raise LoadError(f"{str(path)!r} does not hold a usable model: {one_line(error)}") from error
    except Exception as error:  # whatever hostile values make the classes raise
        raise LoadError(
            f"{str(path)!r} does not hold a usable model: {type(error).__name__}: {one_line(error)}"
        ) from error


class NeedsCodeError(LoadError):
    """The file is in order, but was fitted with code that only the caller has."""


class _Writer(PlainWriter):
    """Encodes a model as JSON whose tensors are set aside."""

    def encode_other(self, value: Any, where: str) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, nn.Module):
            state = value.state_dict()
            return {"module": {k: self.store(t, f"{where}.{k}") for k, t in state.items()}}
        if isinstance(value, BaseEstimator) and type(value).__name__ in _CLASSES:
            return self._estimator(value, where)
        return super().encode_other(value, where)

    def _estimator(self, model: BaseEstimator, where: str) -> dict[str, Any]:
        params = model.get_params(deep=False)
        if hasattr(model, "params_"):
            # What was fitted decides the shapes; what was set later decides only how to predict.
            later = {"n_samples": params["n_samples"]} if "n_samples" in params else {}
            params = model.params_ | later
        if not isinstance(params.get("random_state"), int | np.integer):
            params.pop("random_state", None)
        if not isinstance(params.get("cv", 0), int | float | str | np.number):
            params.pop("cv")  # a splitter, which only fitting needs
        # A network, a Pyro model and a foreign estimator are code, which a file never holds. So is
        # a function; what it chose is among the fitted.
        needs = [
            name
            for name, value in params.items()
            if (name in ("module", "model") and value is not None) or _is_code(value)
        ]
        stored = stored_parameters(type(model))
        params = {
            k: v for k, v in params.items() if k in stored and k not in needs and not callable(v)
        }
        fitted = {k: v for k, v in vars(model).items() if _is_fitted_name(k) and k != "params_"}
        return {
            "class": type(model).__name__,
            "needs": needs,
            "params": {k: self.encode(v, f"{where}.{k}") for k, v in params.items()},
            "fitted": {k: self.encode(v, f"{where}.{k}") for k, v in fitted.items()},
        }


class _Reader(PlainReader):
    """Rebuilds what a _Writer encoded."""

    def __init__(self, tensors: dict[str, torch.Tensor], module: Any) -> None:
        super().__init__(tensors)
        self.module = module
        self.n_tensors = len(tensors)

    def decode_other(self, node: dict[str, Any], depth: int) -> Any:
        if node.keys() != {"class", "needs", "params", "fitted"}:
            return super().decode_other(node, depth)
        name, needs = node["class"], node["needs"]
        if not isinstance(name, str) or name not in _CLASSES:
            raise LoadError(f"the file holds a {name!r}, which this uq does not know.")
        cls = getattr(import_module(_CLASSES[name]), name)
        params = self._entries(node["params"], stored_parameters(cls), "parameter", depth)
        arguments = cls._get_param_names()
        for argument in needs:
            if argument not in ("module", "base", "model") or argument not in arguments:
                raise LoadError(f"the file needs {argument!r}, which is nothing that can be given.")
            if self.module is None:
                raise NeedsCodeError(
                    f"this {name} was fitted with {argument}=, and code is never stored in a file; "
                    "pass the network: uq.load(path, module=...)."
                )
            params[argument] = self.module
        model = cls(**params)
        check_parameters(model, has_model="model" in needs)
        weights = None
        plain = {}
        for key, value in dict(node["fitted"]).items():
            if isinstance(value, dict) and value.keys() == {"module"} and weights is None:
                weights = key, value["module"]
            else:
                plain[key] = value
        for key, value in self._entries(
            plain, fitted_names(cls), "fitted attribute", depth
        ).items():
            setattr(model, key, value)
        if not node["fitted"]:
            return model
        check_fitted(model)  # before anything is built by it
        if weights is not None:
            key, keys = weights
            if key != "posterior_" or not hasattr(model, "_build_posterior"):
                raise LoadError(f"the file has weights for {key!r}.")
            state = {k: self.take(where) for k, where in keys.items()}
            # Code of the user's may draw random numbers where it builds the network.
            with isolated_rng(0, torch.device("cpu")) if needs else nullcontext():
                load_weights(model, state, self.n_tensors)
        if not needs:
            try_out(model)
        return model

    def _entries(
        self, node: dict[str, Any], known: set[str], what: str, depth: int
    ) -> dict[str, Any]:
        for key in node:
            if key not in known:
                raise LoadError(f"the file sets {key!r}, which is not a {what} in files.")
        return {k: self.decode(v, depth + 1) for k, v in node.items()}


def _is_code(value: Any) -> bool:
    """Whether ``value`` is a network, or an estimator that is not one of uq's."""
    uqs = isinstance(value, BaseEstimator) and type(value).__name__ in _CLASSES
    return isinstance(value, nn.Module | BaseEstimator) and not uqs


def _is_fitted_name(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")

"""Save and load fitted models: one safetensors file, tensors plus a JSON header.

Loading never unpickles and never imports what a file names: a file holds numbers and text, and the
classes that it may mention are listed here.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from uq.errors import LoadError, ParameterError
from uq.files import write_atomically
from uq.inference.training import isolated_rng
from uq.models.registry import METHODS

FORMAT = "uq-model"
FORMAT_VERSION = 1
STATE_FORMAT = "uq-state-1"

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
    data = to_bytes(writer.tensors, {"uq": json.dumps(header)})
    write_atomically({path: data})


def load(path: str | Path, *, module: Any = None) -> Any:
    """Load a model written by :meth:`save`.

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
        neither are a ``random_state`` other than an integer and a ``cv`` that is a splitter.

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
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file at {str(path)!r}.")
    header, tensors = _open(path)
    if header.get("format") != FORMAT:
        raise LoadError(f"{str(path)!r} is a safetensors file, but not a model saved by uq.")
    if header.get("version") != FORMAT_VERSION:
        raise LoadError(
            f"{str(path)!r} has format version {header.get('version')!r}; this uq reads "
            f"{FORMAT_VERSION}. It was written by uq {header.get('uq')}; install that version."
        )
    try:
        model = _Reader(tensors, module).decode(header["model"])
        if not isinstance(model, BaseEstimator):
            raise LoadError(f"{str(path)!r} does not hold a model.")
        return model
    except LoadError:
        raise
    except _BROKEN as error:
        raise LoadError(
            f"{str(path)!r} does not hold a usable model: {type(error).__name__}: {error}"
        ) from error


# What decoding a header that was tampered with may raise.
_BROKEN = (
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,  # RecursionError among them
    AttributeError,
    ArithmeticError,
    MemoryError,
)


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the JSON header and the tensors of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "uq" not in metadata:
                raise LoadError(
                    f"{str(path)!r} is a safetensors file, but not a model saved by uq."
                )
            header = json.loads(metadata["uq"])
            # clone: the file's own memory is not aligned, and products then round differently.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, RecursionError, OSError) as error:
        raise LoadError(f"{str(path)!r} is not a uq model, or is damaged: {error}") from error
    if not isinstance(header, dict):
        raise LoadError(f"{str(path)!r} is a safetensors file, but not a model saved by uq.")
    return header, tensors


def state_bytes(state: Any) -> bytes:
    """Encode plain data (numbers, text, tensors, lists, dictionaries) as safetensors and JSON."""
    writer = _Writer()
    root = writer.encode(state, "state")
    return to_bytes(writer.tensors, {"uq": json.dumps({"format": STATE_FORMAT, "state": root})})


def read_state(path: str | Path) -> Any:
    """Decode what :func:`state_bytes` gave.

    Raises
    ------
    LoadError
        If the file is damaged or is something else.
    """
    header, tensors = _open(Path(path))
    if header.get("format") != STATE_FORMAT:
        raise LoadError(f"{str(path)!r} is not a checkpoint of uq.")
    try:
        return _Reader(tensors, None).decode(header["state"])
    except LoadError:
        raise
    except _BROKEN as error:
        raise LoadError(f"{str(path)!r} does not hold a usable checkpoint: {error}") from error


class _Writer:
    """Encodes a model as JSON whose tensors are set aside."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if np.isfinite(value) else {"float": repr(value)}
        if isinstance(value, np.generic):
            return self.encode(value.item(), where)
        if isinstance(value, list | tuple):
            items = [self.encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, dict):
            pairs = [
                [self.encode(k, where), self.encode(v, f"{where}.{k}")] for k, v in value.items()
            ]
            return {"dict": pairs}
        if isinstance(value, np.ndarray):
            if value.dtype.kind in "OSUT":
                items = [self.encode(v, where) for v in value.ravel().tolist()]
                text = "str" if value.dtype.kind in "SUT" else "object"
                return {"array": items, "shape": list(value.shape), "dtype": text}
            return {"numpy": self._store(torch.from_numpy(np.ascontiguousarray(value)), where)}
        if isinstance(value, Tensor):
            return {"tensor": self._store(value, where)}
        if isinstance(value, nn.Module):
            state = value.state_dict()
            return {"module": {k: self._store(t, f"{where}.{k}") for k, t in state.items()}}
        if isinstance(value, BaseEstimator) and type(value).__name__ in _CLASSES:
            return self._estimator(value, where)
        raise ParameterError(
            f"{where} cannot be saved: a {type(value).__name__} is not plain data."
        )

    def _store(self, tensor: Tensor, where: str) -> str:
        # clone: safetensors refuses tensors that share memory.
        self.tensors[where] = tensor.detach().cpu().contiguous().clone()
        return where

    def _estimator(self, model: BaseEstimator, where: str) -> dict[str, Any]:
        params = model.get_params(deep=False)
        if hasattr(model, "params_"):
            # What was fitted decides the shapes; what was set later decides only how to predict.
            later = {"n_samples": params["n_samples"]} if "n_samples" in params else {}
            params = model.params_ | later
        if "callbacks" in params:
            params["callbacks"] = ()
        params.pop("checkpoint_dir", None)
        if not isinstance(params.get("random_state"), int | np.integer):
            params.pop("random_state", None)
        if not isinstance(params.get("cv", 0), int | float | str | np.number):
            params.pop("cv")  # a splitter, which only fitting needs
        has_module = params.pop("module", None) is not None
        # A Pyro model is code; so are its guide and kernel, which only fitting needs.
        needs_model = params.pop("model", None) is not None
        if needs_model:
            params = {k: v for k, v in params.items() if k not in ("guide", "kernel")}
        needs_base = _is_code(params.get("base"))
        if needs_base:
            params.pop("base")
        # A function is code, which a file never holds: what it chose is among the fitted.
        params = {k: v for k, v in params.items() if not callable(v)}
        fitted = {k: v for k, v in vars(model).items() if _is_fitted_name(k) and k != "params_"}
        return {
            "class": type(model).__name__,
            "needs_module": has_module,
            **({"needs_base": True} if needs_base else {}),
            **({"needs_model": True} if needs_model else {}),
            "params": {k: self.encode(v, f"{where}.{k}") for k, v in params.items()},
            "fitted": {k: self.encode(v, f"{where}.{k}") for k, v in fitted.items()},
        }


class _Reader:
    """Rebuilds what a _Writer encoded."""

    def __init__(self, tensors: dict[str, Tensor], module: Any) -> None:
        self.tensors = tensors
        self.module = module

    def decode(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.decode(v) for v in node]
        if not isinstance(node, dict):
            return node
        if "class" in node:
            return self._estimator(node)
        ((kind, value), *_) = node.items()
        if kind == "float":
            return float(value)
        if kind == "tuple":
            return tuple(self.decode(v) for v in value)
        if kind == "dict":
            return {self.decode(k): self.decode(v) for k, v in value}
        if kind == "array":
            dtype: Any = str if node["dtype"] == "str" else object
            items = np.empty(len(value), dtype=object)
            items[:] = [self.decode(v) for v in value]
            return items.astype(dtype).reshape(node["shape"])
        if kind == "numpy":
            return self.tensors[value].numpy()
        if kind == "tensor":
            return self.tensors[value]
        raise LoadError(f"unknown entry {kind!r} in the model file.")

    def _estimator(self, node: dict[str, Any]) -> Any:
        name = node["class"]
        if name not in _CLASSES:
            raise LoadError(f"the file holds a {name!r}, which this uq does not know.")
        params = {k: self.decode(v) for k, v in node["params"].items()}
        for argument in ("module", "base", "model"):
            if not node.get(f"needs_{argument}"):
                continue
            if self.module is None:
                raise LoadError(
                    f"this {name} was fitted with {argument}=, and code is never stored in a file; "
                    "pass the network: uq.load(path, module=...)."
                )
            params[argument] = self.module
        cls = getattr(import_module(_CLASSES[name]), name)
        model = cls(**params)
        posterior = None
        for key, value in node["fitted"].items():
            if not _is_fitted_name(key) or hasattr(cls, key):
                raise LoadError(f"the file sets {key!r}, which is not a fitted attribute.")
            if isinstance(value, dict) and "module" in value:
                posterior = key, value["module"]
            else:
                setattr(model, key, self.decode(value))
        if posterior is not None:
            key, keys = posterior
            # On the meta device only shapes are made: no random numbers, and no memory for
            # sizes that a damaged header makes up.
            with isolated_rng(0, torch.device("cpu")), torch.device("meta"):
                built = model._build_posterior()  # after the other attributes: they give shapes
            state = {k: self.tensors[where] for k, where in keys.items()}
            built.load_state_dict(state, assign=True)
            setattr(model, key, built.eval())
        if dataclasses.is_dataclass(cls) and node["fitted"]:
            model.params_ = model.get_params(deep=False)
            fields = (f.name for f in dataclasses.fields(cls) if not f.init)
            if missing := [f for f in fields if not hasattr(model, f)]:
                raise LoadError(f"the file lacks {', '.join(missing)} of the {name}.")
        return model


def _is_code(value: Any) -> bool:
    """Whether ``value`` is a network, or an estimator that is not one of uq's."""
    uqs = isinstance(value, BaseEstimator) and type(value).__name__ in _CLASSES
    return isinstance(value, nn.Module | BaseEstimator) and not uqs


def _is_fitted_name(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")

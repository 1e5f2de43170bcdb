"""What a file may say of an estimator, and what must be true of it afterwards.

A file may be damaged, or made up to do harm. Its parameters and fitted attributes are known by
name, have the types that the classes declare, and fit one another; networks are built without
memory for their weights, and with no more of these than the file holds; at last the model predicts
a row.
"""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.base import is_classifier
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from uq.errors import LoadError
from uq.models.base import Estimator
from uq.models.table import TableModel, TablePreprocessor
from uq.models.tasks import Classifier, Regressor
from uq.models.wrapper import Wrapper

# Code, what only fitting needs, and what would write to a folder when the model is fitted again.
_NOT_STORED = {"callbacks", "checkpoint_dir", "module", "model"}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_MAX_SAMPLES = 10**6
_MAX_INPUTS = 2**32

_WRAPPED = {"estimator_", "recalibrator_", "conformal_", "fold_estimators_", "preprocessor_"}
_OF_TABLE = {"columns_", "medians_", "gaps_", "categories_", "n_features_in_"}
_OF_INPUTS = {"n_features_in_", "feature_names_in_"}


def stored_parameters(cls: type) -> set[str]:
    """Names of the constructor arguments that a file holds."""
    names = set(cls._get_param_names())  # type: ignore[attr-defined]
    return names - _NOT_STORED - ({"guide", "kernel"} if "model" in names else set())


def fitted_names(cls: type) -> set[str]:
    """Names of the fitted attributes that a file holds."""
    if issubclass(cls, Estimator):
        return {f.name for f in _fitted_fields(cls)} | _OF_INPUTS
    if issubclass(cls, TablePreprocessor):
        return _OF_TABLE
    if issubclass(cls, Wrapper | TableModel):
        return _WRAPPED
    declared = {name for c in cls.__mro__ for name in vars(c).get("__annotations__", {})}
    return {name for name in declared if name.endswith("_") and not name.startswith("_")}


def _fitted_fields(cls: Any) -> list[Any]:
    fields = dataclasses.fields(cls)
    return [f for f in fields if not f.init and f.name.endswith("_") and f.name != "params_"]


# -- parameters and attributes -------------------------------------------------------------------


def check_parameters(model: Any, *, has_model: bool) -> None:
    """Check what a file gave as constructor arguments.

    Parameters
    ----------
    model : estimator
        Not fitted yet.
    has_model : bool
        Whether it has a Pyro model, without the guide or kernel that it was fitted by.
    """
    if not isinstance(model, Estimator):
        return
    if not has_model:
        model._check_parameters()
    model._forget_paths()
    if not isinstance(model.device, str) or not _DEVICE.fullmatch(model.device):
        raise LoadError(f"device is {model.device!r}.")
    if getattr(model, "n_samples", 1) > _MAX_SAMPLES:
        raise LoadError(f"n_samples is {model.n_samples!r}.")


def check_fitted(model: Any) -> None:
    """Check what a file gave as fitted attributes; the posterior is not there yet."""
    if isinstance(model, TablePreprocessor):
        _check_table(model)
    elif isinstance(model, Estimator):
        for field in _fitted_fields(type(model)):
            if field.name == "posterior_":
                continue
            if not hasattr(model, field.name):
                raise LoadError(f"it lacks {field.name}.")
            value = getattr(model, field.name)
            if (fits := TYPES.get(field.type)) and not fits(value):
                raise LoadError(f"{field.name} is not of the type {field.type}.")
        _check_inputs(model)
        if isinstance(model, Classifier):
            _check_classes(model.classes_)
        if isinstance(model, Regressor):
            n = len(model.y_mean_)
            _check_scale(model.y_mean_, model.y_scale_, n, "y")
            if n < 1 or (model.y_is_1d_ and n > 1):
                raise LoadError(f"it has {n} targets.")
    elif hasattr(model, "classes_") and "classes_" in vars(model):
        _check_classes(model.classes_)


def _check_inputs(model: Any) -> None:
    shape = model.input_shape_
    if math.prod(shape) > _MAX_INPUTS or min(shape, default=1) < 1:
        raise LoadError(f"input_shape_ is {shape}.")
    flat = len(shape) == 1
    if (model.x_mean_ is None) != (model.x_scale_ is None):
        raise LoadError("one of x_mean_ and x_scale_ is missing.")
    if model.x_mean_ is not None:
        _check_scale(model.x_mean_, model.x_scale_, shape[0] if flat else -1, "x")
    n = getattr(model, "n_features_in_", None)
    if type(n) is not int or (flat and n != shape[0]):
        raise LoadError(f"n_features_in_ is {n!r}, for inputs of shape {shape}.")
    names = getattr(model, "feature_names_in_", None)
    if names is not None and not (
        isinstance(names, np.ndarray)
        and names.shape == (n,)
        and all(isinstance(name, str) for name in names.tolist())
    ):
        raise LoadError("feature_names_in_ does not name the inputs.")


def _check_scale(mean: Any, scale: Any, n: int, of: str) -> None:
    for name, values in ((f"{of}_mean_", mean), (f"{of}_scale_", scale)):
        if values.dtype.kind != "f" or values.shape != (n,) or not np.isfinite(values).all():
            raise LoadError(f"{name} does not hold one finite number for each column.")
    if not (scale > 0).all():
        raise LoadError(f"{of}_scale_ holds numbers that are not positive.")


def _check_classes(classes: Any) -> None:
    """Labels, sorted and different, of one plain type."""
    ok = isinstance(classes, np.ndarray) and classes.ndim == 1 and len(classes) > 1
    if not ok or classes.dtype.kind not in "biufUO":
        raise LoadError("classes_ does not hold labels.")
    if classes.dtype == object:
        ok = len({type(label) for label in classes.tolist()}) == 1 and classes[0] is not None
    if not ok or not np.array_equal(np.unique(classes), classes):
        raise LoadError("classes_ does not hold labels that are sorted and different.")


def _check_table(table: TablePreprocessor) -> None:
    known = vars(table)
    if missing := _OF_TABLE - known.keys():
        raise LoadError(f"it lacks {min(missing)}.")
    columns, medians = known["columns_"], known["medians_"]
    categories, gaps = known["categories_"], known["gaps_"]
    ok = _is_names(columns) and len(set(columns)) == len(columns) and _is_names(gaps)
    ok = ok and isinstance(medians, dict) and isinstance(categories, dict)
    ok = ok and sorted([*medians, *categories]) == sorted(columns) and set(gaps) <= medians.keys()
    ok = ok and all(type(m) in (int, float) and math.isfinite(m) for m in medians.values())
    ok = ok and all(map(_is_names, categories.values())) and len(set(gaps)) == len(gaps)
    if not ok or known["n_features_in_"] != len(columns):
        raise LoadError("its columns, medians and categories do not fit one another.")


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_real(value: Any) -> bool:
    return type(value) in (int, float)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _table_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, dict) and all(
            isinstance(k, str) and fits(v) for k, v in value.items()
        )

    return check


TYPES: dict[str, Callable[[Any], bool]] = {
    "int": _is_whole,
    "int | None": lambda v: v is None or _is_whole(v),
    "float": _is_real,
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
    "list[str]": _is_names,
    "np.ndarray": _is_array,
    "np.ndarray | None": lambda v: v is None or _is_array(v),
    "tuple[int, ...]": lambda v: isinstance(v, tuple) and all(map(_is_whole, v)),
    "tuple[int, int]": lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_is_whole, v)),
    "dict[str, float]": _table_of(_is_real),
    "dict[str, str]": _table_of(lambda v: isinstance(v, str)),
    "dict[str, np.ndarray]": _table_of(_is_array),
    "dict[str, list[float]]": _table_of(lambda v: isinstance(v, list) and all(map(_is_real, v))),
    "dict[str, list[str]]": _table_of(_is_names),
    "dict[str, Any]": _table_of(lambda v: True),
}


# -- weights -------------------------------------------------------------------------------------


def load_weights(model: Any, state: dict[str, Tensor], n_tensors: int) -> None:
    """Build the posterior of ``model`` and put ``state`` into it.

    Parameters
    ----------
    model : Estimator
        With all its other attributes, which give the shapes.
    state : dict of Tensor
        As ``posterior_.state_dict()``.
    n_tensors : int
        Number of tensors in the file: what is built has about as many.
    """
    # On the meta device only shapes are made: no random numbers, and no memory for sizes that a
    # damaged header makes up.
    with _few_parameters(16 * n_tensors + 256), torch.device("meta"):
        built = model._build_posterior()
    for name, expected in built.state_dict().items():
        given = state.get(name)
        if isinstance(expected, Tensor) and given is not None and given.dtype != expected.dtype:
            raise LoadError(f"{name} is of type {given.dtype}, not {expected.dtype}.")
    built.load_state_dict(state, assign=True)
    model.posterior_ = built.eval()
    if model.module is None and getattr(model, "model", None) is None:
        for name, values in state.items():
            bound = name.endswith("_bound")  # of GPyTorch's constraints: may be infinite
            if values.is_floating_point() and not bound and not bool(values.isfinite().all()):
                raise LoadError(f"{name} holds NaN or infinity.")
            if re.search(r"(^|\.)std_\d+$", name) and bool((values < 0).any()):
                raise LoadError(f"{name} holds negative standard deviations.")
    model.params_ = model.get_params(deep=False)


@contextmanager
def _few_parameters(limit: int) -> Iterator[None]:
    """Stop this thread where it makes more than ``limit`` parameters of modules."""
    me, count = threading.get_ident(), 0

    def counted(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        if threading.get_ident() == me:
            count += 1
            if count > limit:
                raise LoadError("its parameters ask for a larger network than it holds.")

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


# -- a prediction --------------------------------------------------------------------------------


def try_out(model: Any) -> None:
    """Predict one row by a few draws, which fails where attributes do not fit one another."""
    if isinstance(model, TablePreprocessor):
        model.transform(_row(model))
        return
    if not hasattr(model, "predict_distribution"):
        return
    leaves = _leaves(model)
    if any(leaf.module is not None or getattr(leaf, "model", None) for leaf in leaves):
        return  # code of the user's: what it takes is not known here
    asked = [vars(leaf).get("n_samples") for leaf in leaves]
    for leaf in leaves:
        if hasattr(leaf, "n_samples"):
            leaf.n_samples = min(leaf.n_samples, 8)
    try:
        row = _row(model)
        dist: Any = model.predict_distribution(row)
        values = dist.probs if is_classifier(model) else dist.mean
        if not bool(values.isfinite().all()):
            raise LoadError("it predicts NaN or infinity.")
        if is_classifier(model) and values.shape[1:] != (len(model.classes_),):
            raise LoadError("it does not predict its classes.")
        for method in ("predict_interval", "predict_set"):
            if hasattr(model, method):
                getattr(model, method)(row)
    finally:
        for leaf, n in zip(leaves, asked, strict=True):
            if n is not None:
                leaf.n_samples = n


def _leaves(model: Any) -> list[Any]:
    if isinstance(model, Estimator):
        base = getattr(model, "base", None)
        return [model] if base is None else [model, *_leaves(base)]
    inner = [model.estimator_, *getattr(model, "fold_estimators_", [])]
    return [leaf for one in inner for leaf in _leaves(one)]


def _row(model: Any) -> Any:
    """A row of the kind that ``model`` was fitted on, in the middle of the data."""
    if isinstance(model, TablePreprocessor):
        values = {name: model.medians_.get(name, "") for name in model.columns_}
        return pd.DataFrame([values], columns=model.columns_)
    if isinstance(model, TableModel):
        return _row(model.preprocessor_)
    if isinstance(model, Wrapper):
        return _row(model.estimator_)
    if isinstance(base := getattr(model, "base", None), Estimator):
        return _row(base)
    mean = model.x_mean_
    row = np.zeros((1, *model.input_shape_)) if mean is None else mean[None]
    names = getattr(model, "feature_names_in_", None)
    return row if names is None else pd.DataFrame(row, columns=names)

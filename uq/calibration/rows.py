"""Held-out labels beside their predictions: checked once, then one quantity a row, in float64."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from uq.distributions import ClassPredictive, Predictive, RealPredictive
from uq.errors import DataError, NoEpistemicError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Names:
    """What error messages call the function and its two arguments."""

    where: str
    y: str = "y_true"
    prediction: str = "prediction"


class ClassificationRows:
    """Labels and class probabilities of n rows.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        Labels, as in ``prediction.classes``.
    prediction : CategoricalMixture
        Predictive distribution of batch shape (n,).
    names : Names
        What error messages call the two.
    """

    def __init__(self, y_true: ArrayLike | Tensor, prediction: Predictive, names: Names) -> None:
        if not isinstance(prediction, ClassPredictive):
            raise _wrong_type(names, "predictive distribution over classes", prediction)
        if len(prediction.batch_shape) != 1:
            raise _wrong_shape(names, "(n,)", prediction)
        labels = _match(names, as_array(y_true), tuple(prediction.batch_shape))
        self.prediction = prediction
        self.y = _positions(names, labels, prediction.classes)
        _check_finite(f"{names.where}: {names.prediction}.probs", self.probs)

    @cached_property
    def probs(self) -> NDArray[np.float64]:
        """Class probabilities, shape (n, n_classes)."""
        return as_array(self.prediction.probs)

    @cached_property
    def neg_log(self) -> NDArray[np.float64]:
        """Negative log probability of the label, nats, shape (n,)."""
        y = torch.as_tensor(self.y, device=self.prediction.probs.device)
        return _warn_infinite(-as_array(self.prediction.log_prob(y)))

    @cached_property
    def confidence(self) -> NDArray[np.float64]:
        """Probability of the most probable class, shape (n,)."""
        return self.probs.max(1)

    @cached_property
    def correct(self) -> NDArray[np.float64]:
        """1 where the most probable class is the label, else 0, shape (n,)."""
        return (self.probs.argmax(1) == self.y).astype(np.float64)

    @cached_property
    def aleatoric(self) -> NDArray[np.float64]:
        """Aleatoric uncertainty, nats, shape (n,)."""
        return as_array(self.prediction.aleatoric)

    @cached_property
    def epistemic(self) -> NDArray[np.float64]:
        """Epistemic uncertainty, nats, shape (n,); NaN where the method has none."""
        return _epistemic(self.prediction, self.aleatoric)


class RegressionRows:
    """Targets and predictive mixtures of n rows and m outputs.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets.
    prediction : NormalMixture
        Predictive distribution of batch shape (n,) or (n, m), or (n,) with event shape (m,).
    names : Names
        What error messages call the two.
    """

    def __init__(self, y_true: ArrayLike | Tensor, prediction: Predictive, names: Names) -> None:
        if not isinstance(prediction, RealPredictive):
            raise _wrong_type(names, "predictive distribution over real targets", prediction)
        shape = tuple(prediction.batch_shape) + tuple(prediction.event_shape)
        if not prediction.batch_shape or len(shape) > 2:
            raise _wrong_shape(names, "(n,) or (n, m)", prediction)
        y = _match(names, _numbers(f"{names.where}: {names.y}", y_true), shape)
        _check_finite(f"{names.where}: {names.y}", y)
        self.y = y.reshape(len(y), -1)  # (n, m)
        self.prediction = prediction.marginal().double()
        self._y = torch.as_tensor(y, device=self.prediction.mean.device)
        _check_finite(f"{names.where}: {names.prediction}.mean", as_array(self.prediction.mean))
        _check_finite(f"{names.where}: {names.prediction}.variance", self.variance)

    @cached_property
    def neg_log(self) -> NDArray[np.float64]:
        """Negative log density, joint over outputs, nats, shape (n,)."""
        return _warn_infinite(-as_array(self.prediction.joint().log_prob(self._y)))

    @cached_property
    def crps(self) -> NDArray[np.float64]:
        """Continuous ranked probability score, target units, shape (n, m)."""
        return self._columns(self.prediction.crps(self._y))

    @cached_property
    def pit(self) -> NDArray[np.float64]:
        """Probability integral transform F(y), shape (n, m)."""
        return self._columns(self.prediction.cdf(self._y))

    @cached_property
    def error(self) -> NDArray[np.float64]:
        """Target minus predictive mean, shape (n, m)."""
        return self.y - self._columns(self.prediction.mean)

    @cached_property
    def variance(self) -> NDArray[np.float64]:
        """Predictive variance, squared target units, shape (n, m)."""
        return self._columns(self.prediction.variance)

    @cached_property
    def aleatoric(self) -> NDArray[np.float64]:
        """Aleatoric variance, squared target units, shape (n, m)."""
        return self._columns(self.prediction.aleatoric)

    @cached_property
    def epistemic(self) -> NDArray[np.float64]:
        """Epistemic variance, shape (n, m); NaN where the method has none."""
        return _epistemic(self.prediction, self.aleatoric)

    def width(self, coverage: float) -> NDArray[np.float64]:
        """Width of the equal-tailed interval of ``coverage``, target units, shape (n, m)."""
        lower, upper = self.prediction.interval(coverage)
        return self._columns(upper - lower)

    def _columns(self, t: Tensor) -> NDArray[np.float64]:
        return as_array(t).reshape(self.y.shape)


Rows = ClassificationRows | RegressionRows


def make_rows(y_true: ArrayLike | Tensor, prediction: Predictive, names: Names) -> Rows:
    """Rows of the kind that ``prediction`` calls for."""
    if isinstance(prediction, ClassPredictive):
        return ClassificationRows(y_true, prediction, names)
    if isinstance(prediction, RealPredictive):
        return RegressionRows(y_true, prediction, names)
    raise DataError(
        f"{names.where}: {names.prediction} must be a predictive distribution "
        f"of uq, got a {type(prediction).__name__}."
    )


def as_array(values: ArrayLike | Tensor) -> NDArray[Any]:
    """Array of anything array-like; tensors come from any device."""
    if isinstance(values, Tensor):
        return np.asarray(values.detach().cpu().numpy())
    return np.asarray(values)


def check_weight(where: str, weight: ArrayLike | None, n: int) -> NDArray[np.float64]:
    """Row weights of shape (n,), ones by default."""
    if weight is None:
        return np.ones(n)
    w = _numbers(f"{where}: sample_weight", weight)
    if w.shape != (n,):
        raise DataError(f"{where}: sample_weight has shape {w.shape}, expected ({n},).")
    if not np.isfinite(w).all() or (w < 0).any() or not w.any():
        raise DataError(f"{where}: sample_weight must be finite, >= 0 and not all zero.")
    return w


def _epistemic(prediction: Predictive, like: NDArray[np.float64]) -> NDArray[np.float64]:
    try:
        return as_array(prediction.epistemic).reshape(like.shape)
    except NoEpistemicError:
        return np.full_like(like, np.nan)


def _warn_infinite(neg_log: NDArray[np.float64]) -> NDArray[np.float64]:
    bad = np.isinf(neg_log)
    if bad.any():
        warnings.warn(
            f"{int(bad.sum())} of {bad.size} labels have predictive probability 0 (first at row "
            f"{int(bad.argmax())}), so the log score is infinite; it is not clipped.",
            RuntimeWarning,
            stacklevel=2,
        )
    return neg_log


def _numbers(name: str, values: ArrayLike | Tensor) -> NDArray[np.float64]:
    try:
        return as_array(values).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must hold numbers: {error}.") from error


def _match(names: Names, y: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Give ``y`` the ``shape`` of the prediction; a single column may be missing or extra."""
    if y.shape != shape and {y.shape, shape} != {shape[:1], (shape[0], 1)}:
        raise DataError(
            f"{names.where}: {names.y} has shape {y.shape}, expected {shape}, "
            f"the shape of {names.prediction}."
        )
    if shape[0] == 0:
        raise DataError(f"{names.where}: {names.y} is empty; at least one row is needed.")
    return y.reshape(shape)


def _positions(names: Names, labels: NDArray[Any], classes: NDArray[Any]) -> NDArray[np.int64]:
    lookup = {label: position for position, label in enumerate(classes.tolist())}
    positions = np.array([lookup.get(label, -1) for label in labels.tolist()], dtype=np.int64)
    if (positions < 0).any():
        row = int((positions < 0).argmax())
        some = ", ".join(repr(c) for c in classes[:10].tolist()) + ", …" * (len(classes) > 10)
        raise DataError(
            f"{names.where}: {names.y} holds {labels.tolist()[row]!r} at row {row}, "
            f"which is none of the classes of {names.prediction}: {some}."
        )
    return positions


def _check_finite(name: str, values: NDArray[np.float64]) -> None:
    bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
    if bad.any():
        raise DataError(f"{name} is NaN or infinite at row {int(bad.argmax())}.")


def _wrong_type(names: Names, expected: str, got: object) -> DataError:
    return DataError(
        f"{names.where}: {names.prediction} must be a {expected}, got a {type(got).__name__}."
    )


def _wrong_shape(names: Names, expected: str, got: Predictive) -> DataError:
    shape = tuple(got.batch_shape)
    return DataError(
        f"{names.where}: {names.prediction} needs batch shape {expected}, got {shape}."
    )

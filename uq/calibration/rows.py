"""Held-out labels beside their predictions: checked once, then one quantity a row, in float64."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from uq.calibration.ranking import Ranking
from uq.distributions import ClassPredictive, Empirical, Predictive, RealPredictive
from uq.errors import DataError, NoEpistemicError, ParameterError

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
    prediction : ClassPredictive, or array or DataFrame of shape (n, n_classes)
        Predictive distribution of batch shape (n,), or its probabilities: the columns of an array
        are the labels 0, 1, …, those of a DataFrame are named by their labels.
    names : Names
        What error messages call the two.
    """

    def __init__(self, y_true: ArrayLike | Tensor, prediction: Any, names: Names) -> None:
        if isinstance(prediction, Predictive) and not isinstance(prediction, ClassPredictive):
            raise _wrong_type(names, "predictive distribution over classes", prediction)
        if isinstance(prediction, ClassPredictive):
            if len(prediction.batch_shape) != 1:
                raise _wrong_shape(names, "(n,)", prediction)
            self.prediction: ClassPredictive | None = prediction
            self.probs: NDArray[Any] = as_array(prediction.probs)
            self.classes: NDArray[Any] = prediction.classes
            check_finite_rows(f"{names.where}: {names.prediction}.probs", self.probs.sum(1))
        else:
            self.prediction = None
            self.probs, self.classes = _probabilities(names, prediction)
        labels = _regular(f"{names.where}: {names.y}", y_true)
        labels = _match(names, labels, self.probs.shape[:1])
        self.y: NDArray[np.int64] = _positions(names, labels, self.classes)

    @cached_property
    def neg_log(self) -> NDArray[np.float64]:
        """Negative log probability of the label, nats, shape (n,)."""
        if self.prediction is None:
            with np.errstate(divide="ignore"):
                p = self.probs[np.arange(len(self.y)), self.y]
                return _warn_infinite(-np.log(p, dtype=np.float64))
        y = torch.as_tensor(self.y, device=self.prediction.probs.device)
        return _warn_infinite(-as_array(self.prediction.log_prob(y)))

    @cached_property
    def _top(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        confidence, label = torch.from_numpy(self.probs).max(1)  # one pass, faster than NumPy's two
        return confidence.double().numpy(), label.numpy()

    @cached_property
    def confidence(self) -> NDArray[np.float64]:
        """Probability of the most probable class, shape (n,)."""
        return self._top[0]

    @cached_property
    def correct(self) -> NDArray[np.float64]:
        """1 where the most probable class is the label, else 0, shape (n,)."""
        return (self._top[1] == self.y).astype(np.float64)

    @cached_property
    def ranking(self) -> Ranking:
        """Rows from the most to the least confident, and whether they are wrong."""
        return Ranking.of(self.confidence, 1 - self.correct)

    def positive(self) -> BinaryRows:
        """Rows of two classes as the probability of the second."""
        return BinaryRows(self.y, self.probs[:, 1].astype(np.float64))

    @cached_property
    def entropy(self) -> NDArray[np.float64]:
        """Entropy of the probabilities, nats, shape (n,)."""
        p = torch.from_numpy(self.probs).double()
        return as_array(torch.special.entr(p).sum(1))

    @cached_property
    def aleatoric(self) -> NDArray[np.float64]:
        """Aleatoric uncertainty, nats, shape (n,); the entropy of bare probabilities."""
        return self.entropy if self.prediction is None else as_array(self.prediction.aleatoric)

    @cached_property
    def epistemic(self) -> NDArray[np.float64]:
        """Epistemic uncertainty, nats, shape (n,); NaN where the method has none."""
        return _epistemic(self.prediction, self.entropy)


@dataclass(frozen=True)
class BinaryRows:
    """Probability ``confidence`` of an event, and whether it came true (``y``), of n rows."""

    y: NDArray[np.int64]
    confidence: NDArray[np.float64]

    @cached_property
    def correct(self) -> NDArray[np.float64]:
        """1 where the event came true, else 0, shape (n,)."""
        return self.y.astype(np.float64)

    @cached_property
    def ranking(self) -> Ranking:
        """Rows from the highest to the lowest probability, and whether it failed to come true."""
        return Ranking.of(self.confidence, 1 - self.correct)


class RegressionRows:
    """Targets and predictive distributions of n rows and m outputs.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets.
    prediction : RealPredictive
        Predictive distribution of batch shape (n,) or (n, m), or (n,) with event shape (m,).
    names : Names
        What error messages call the two.
    """

    def __init__(self, y_true: ArrayLike | Tensor, prediction: Any, names: Names) -> None:
        if not isinstance(prediction, RealPredictive):
            raise _wrong_type(names, "predictive distribution over real targets", prediction)
        shape = tuple(prediction.batch_shape) + tuple(prediction.event_shape)
        if not prediction.batch_shape or len(shape) > 2:
            raise _wrong_shape(names, "(n,) or (n, m)", prediction)
        y = _match(names, _numbers(f"{names.where}: {names.y}", y_true), shape)
        check_finite_rows(f"{names.where}: {names.y}", y)
        self.y: NDArray[Any] = y.reshape(len(y), -1)  # (n, m)
        self.prediction: RealPredictive = prediction.marginal().double()
        self._quantiles: dict[float, NDArray[np.float64]] = {}
        self._y = torch.as_tensor(y, device=self.prediction.mean.device)
        check_finite_rows(f"{names.where}: {names.prediction}.mean", as_array(self.prediction.mean))
        # A variance may be infinite (Student t with df <= 2): all but the variance is defined.
        _refuse_rows(f"{names.where}: {names.prediction}.variance", "NaN", np.isnan(self.variance))

    @cached_property
    def neg_log(self) -> NDArray[np.float64]:
        """Negative log density, joint over outputs, nats, shape (n,); NaN without a density."""
        if not getattr(self.prediction, "has_log_prob", True):
            return np.full(len(self.y), np.nan)
        return _warn_infinite(-as_array(self.prediction.joint().log_prob(self._y)))

    @cached_property
    def crps(self) -> NDArray[np.float64]:
        """Continuous ranked probability score, target units, shape (n, m)."""
        return self._columns(self.prediction.crps(self._y))

    @cached_property
    def pit(self) -> NDArray[np.float64]:
        """Probability integral transform F(y), shape (n, m)."""
        return self._columns(self.prediction.cdf(self._y))

    def random_pit(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """PIT that is uniform for calibrated predictions though F may jump, shape (n, m).

        A target from the same law as S draws takes each of the S + 1 places among them alike, at
        random among equal ones: the PIT is drawn within its place.
        """
        if not isinstance(self.prediction, Empirical):
            return self.pit
        size, below = len(self.prediction.values), self._share_below
        places = (self.pit - below) * size + 1
        return (below * size + places * rng.random(below.shape)) / (size + 1)

    @cached_property
    def least_level(self) -> NDArray[np.float64]:
        """Least level whose quantile is not below the target, shape (n, m): F(y) if continuous."""
        if not isinstance(self.prediction, Empirical):
            return self.pit
        # A step: the quantiles of all levels above F(y−), up to F(y), are y.
        return np.nextafter(self._share_below, 1.0)

    @cached_property
    def _share_below(self) -> NDArray[np.float64]:
        """F(y−), shape (n, m)."""
        before = torch.nextafter(self._y, torch.full_like(self._y, -torch.inf))
        return self._columns(self.prediction.cdf(before))

    @cached_property
    def absolute_error(self) -> NDArray[np.float64]:
        """Distance of the target from the predictive median, shape (n, m)."""
        return np.abs(self.y - self.quantile(0.5))

    @cached_property
    def ranking(self) -> Ranking:
        """Rows from the least to the most predictive variance, and their squared errors."""
        return Ranking.of(-self.variance.mean(1), np.square(self.error).mean(1))

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

    def quantile(self, level: float) -> NDArray[np.float64]:
        """Predictive quantile, target units, shape (n, m); each level is computed once."""
        if level not in self._quantiles:
            self._quantiles[level] = self._columns(self.prediction.quantile(level))
        return self._quantiles[level]

    def interval(self, coverage: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ends of the equal-tailed interval of ``coverage``, target units, each (n, m)."""
        tail = (1 - coverage) / 2
        return self.quantile(tail), self.quantile(1 - tail)

    def _columns(self, t: Tensor) -> NDArray[np.float64]:
        return as_array(t).reshape(self.y.shape)


Rows = ClassificationRows | RegressionRows


def make_rows(y_true: ArrayLike | Tensor, prediction: Any, names: Names) -> Rows:
    """Rows of the kind that ``prediction`` calls for."""
    if isinstance(prediction, RealPredictive):
        return RegressionRows(y_true, prediction, names)
    return ClassificationRows(y_true, prediction, names)


def as_array(values: ArrayLike | Tensor) -> NDArray[Any]:
    """Array of anything array-like; tensors come from any device."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # NumPy has no such type.
        return np.asarray((values.float() if values.dtype == torch.bfloat16 else values).numpy())
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


def check_count(where: str, name: str, value: int, least: int = 1) -> int:
    """Whole number >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ParameterError(f"{where}: {name} must be an integer >= {least}, got {value!r}.")
    return int(value)


def check_share(where: str, name: str, value: float, *, closed: bool = False) -> float:
    """Number in (0, 1), or in (0, 1] if ``closed``."""
    number = isinstance(value, Real)
    if not number or not (0 < value < 1 or (closed and value == 1)):
        interval = "(0, 1]" if closed else "(0, 1)"
        raise ParameterError(f"{where}: {name} must lie in {interval}, got {value!r}.")
    return float(value)


def _epistemic(prediction: Predictive | None, like: NDArray[np.float64]) -> NDArray[np.float64]:
    if prediction is not None:
        with suppress(NoEpistemicError):
            return as_array(prediction.epistemic).reshape(like.shape)
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


def _regular(name: str, values: ArrayLike | Tensor) -> NDArray[Any]:
    try:
        return as_array(values)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{name} must be a regular array: {error}.") from error


def _numbers(name: str, values: ArrayLike | Tensor) -> NDArray[np.float64]:
    try:
        return _regular(name, values).astype(np.float64)
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


def _probabilities(names: Names, values: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Class probabilities given as numbers, and the labels of their columns."""
    what = f"{names.where}: {names.prediction}"
    if not hasattr(values, "__array__") and not isinstance(values, list | tuple):
        raise _wrong_type(names, "predictive distribution of uq or an array (n, K)", values)
    p = _regular(what, values)
    if p.dtype != np.float32:
        p = _numbers(what, p)
    if p.ndim != 2 or p.shape[1] < 2:
        raise DataError(
            f"{what}: class probabilities need shape (n, n_classes), n_classes >= 2, got "
            f"{p.shape}; for two classes give both columns, for real targets a distribution"
            + (" (metrics take y first, report the prediction)." if p.ndim == 1 else ".")
        )
    p = np.require(p, requirements=["C", "W"])  # torch warns of arrays that cannot be written
    total = as_array(torch.from_numpy(p).sum(1))
    check_finite_rows(what, total)
    # Half precision that was summed in double: each of K probabilities is off by 5e-4 of itself.
    half = str(getattr(values, "dtype", "")).removeprefix("torch.") in ("float16", "bfloat16")
    tolerance = 1e-2 if half else 1e-3 if p.dtype == np.float32 else 1e-6
    bad = np.abs(total - 1) > tolerance
    if bad.any() or (p.size and p.min() < 0):
        row = int((bad | (p < 0).any(1)).argmax())
        raise DataError(
            f"{what}: probabilities must be >= 0 and sum to 1 in each row; row {row} holds "
            f"{np.round(p[row, :6], 6).tolist()} with sum {float(total[row]):.9g} "
            f"({_what_for_probabilities(p[row], float(total[row]))})."
        )
    return p, np.asarray(getattr(values, "columns", np.arange(p.shape[1])))


def _what_for_probabilities(p: NDArray[Any], total: float) -> str:
    if p.min() < 0 or p.max() > 100:
        return "logits? use CategoricalMixture(logits[None])"
    if abs(total - 1) < 0.05:
        return "rounded? divide by their sum, p / p.sum(1, keepdims=True)"
    if abs(total - 100) < 5:
        return "percent? divide by 100"
    return "logits? use CategoricalMixture(logits[None])"


def _positions(names: Names, labels: NDArray[Any], classes: NDArray[Any]) -> NDArray[np.int64]:
    if labels.dtype.kind in "iu" and np.array_equal(classes, np.arange(len(classes))):
        positions = labels.astype(np.int64)
        positions[(positions < 0) | (positions >= len(classes))] = -1
    else:
        lookup = {label: position for position, label in enumerate(classes.tolist())}
        positions = np.array([lookup.get(label, -1) for label in labels.tolist()], dtype=np.int64)
    if len(positions) and positions.min() < 0:
        row = int((positions < 0).argmax())
        some = ", ".join(repr(c) for c in classes[:10].tolist()) + ", …" * (len(classes) > 10)
        raise DataError(
            f"{names.where}: {names.y} holds {labels.tolist()[row]!r} at row {row}, "
            f"which is none of the classes of {names.prediction}: {some}."
        )
    return positions


def check_finite_rows(name: str, values: NDArray[Any]) -> None:
    """Refuse NaN and infinity, naming the first such row."""
    _refuse_rows(name, "NaN or infinite", ~np.isfinite(values))


def _refuse_rows(name: str, what: str, bad: NDArray[np.bool_]) -> None:
    rows = bad.any(tuple(range(1, bad.ndim)))
    if rows.any():
        raise DataError(f"{name} is {what} at row {int(rows.argmax())}.")


def _wrong_type(names: Names, expected: str, got: object) -> DataError:
    remedy = "; give its predict_distribution(X)" if hasattr(got, "predict_distribution") else ""
    return DataError(
        f"{names.where}: {names.prediction} must be a {expected}, got a {type(got).__name__}"
        f"{remedy}."
    )


def _wrong_shape(names: Names, expected: str, got: Predictive) -> DataError:
    shape = tuple(got.batch_shape)
    return DataError(
        f"{names.where}: {names.prediction} needs batch shape {expected}, got {shape}."
    )

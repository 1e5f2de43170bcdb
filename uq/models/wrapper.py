"""What the estimators that wrap another one share: they predict, score and save as it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, is_classifier, is_regressor
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import assert_all_finite, get_tags, indexable
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    has_fit_parameter,
)

from uq.calibration.rows import Names, make_rows
from uq.distributions import Predictive
from uq.errors import DataError, ParameterError
from uq.models.base import as_numpy

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike


def classifies(model: Wrapper) -> bool:
    """Whether the wrapped estimator is a classifier."""
    return is_classifier(model.estimator)


def regresses(model: Wrapper) -> bool:
    """Whether the wrapped estimator is a regressor."""
    return is_regressor(model.estimator)


class Wrapper(MetaEstimatorMixin, BaseEstimator, ABC):
    """Base class of estimators that fit ``estimator`` as ``estimator_`` and add to it."""

    estimator: Any
    estimator_: Any

    @abstractmethod
    def predict_distribution(self, X: Any) -> Predictive:
        """Return the predictive distribution of each row."""

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable labels, or the predictive means."""
        dist: Any = self.predict_distribution(X)
        if not classifies(self):
            return as_numpy(dist.mean)
        return self.classes_[as_numpy(dist.mode)]

    @available_if(classifies)
    def predict_proba(self, X: Any) -> np.ndarray:
        """Return class probabilities, columns in the order of ``classes_``."""
        dist: Any = self.predict_distribution(X)
        return as_numpy(dist.probs)

    def score(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return accuracy, or R² for a regressor."""
        predicted = self.predict(X)
        if classifies(self):
            return float(accuracy_score(plain_labels(y), predicted, sample_weight=sample_weight))
        return float(r2_score(y, predicted, sample_weight=sample_weight))

    def log_score(self, X: Any, y: ArrayLike) -> float:
        """Return the mean log predictive probability or density of ``y``, in nats."""
        dist = self.predict_distribution(X)
        target = plain_labels(y) if classifies(self) else np.asarray(y)
        where = f"{type(self).__name__}.log_score"
        rows = make_rows(target, dist, Names(where, "y", "the prediction"))
        return -float(rows.neg_log.mean())

    def save(self, path: str | Path) -> None:
        """Write the estimator and what was added to one file that :func:`uq.load` reads.

        A ``cv`` other than a number or "prefit" is not stored.

        Raises
        ------
        SaveError
            If the file cannot be written; whatever was at ``path`` before is unchanged.
        """
        from uq.io import save

        check_is_fitted(self)
        save(self, path)

    @property
    def classes_(self) -> np.ndarray:
        """Labels of a fitted classifier."""
        classes: np.ndarray = self.estimator_.classes_
        return classes

    @property
    def n_features_in_(self) -> int:
        """Number of features seen in training."""
        n_features: int = self.estimator_.n_features_in_
        return n_features

    @property
    def feature_names_in_(self) -> np.ndarray:
        """Names of the columns seen in training, where they are known."""
        names: np.ndarray = self.estimator_.feature_names_in_
        return names

    def _check_rows(self, X: Any, y: Any, sample_weight: Any = None) -> tuple[Any, Any]:
        """Inputs and targets of equal length whose rows can be picked."""
        name = type(self).__name__
        if not hasattr(self.estimator, "predict_distribution"):
            raise ParameterError(
                f"{name}: estimator must have predict_distribution, as those of uq.methods() and "
                f"uq.TableModel have, got {self.estimator!r}."
            )
        if y is None:
            raise DataError(
                f"{name} requires y to be passed, but the target y is None (a Dataset or "
                "DataLoader has no rows that could be split; give arrays)."
            )
        if sample_weight is not None and not has_fit_parameter(self.estimator, "sample_weight"):
            raise DataError(
                f"{name}: {type(self.estimator).__name__} takes no sample_weight; leave it out."
            )
        check_consistent_length(X, y, sample_weight)
        X, y = indexable(X, y)
        return X, plain_labels(y) if classifies(self) else y

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        for name in (
            "estimator_type",
            "classifier_tags",
            "regressor_tags",
            "target_tags",
            "input_tags",
        ):
            setattr(tags, name, getattr(inner, name))
        return tags


def plain_labels(y: Any) -> np.ndarray:
    """Labels as an array of one plain dtype, which a label of any file comes to."""
    labels = column_or_1d(y, warn=True)
    if labels.dtype.kind == "f":
        assert_all_finite(labels, input_name="y")
    if labels.dtype == object and not any(v is None or v != v for v in labels.tolist()):
        labels = np.array(labels.tolist())
    check_classification_targets(labels)
    return labels

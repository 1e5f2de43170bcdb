"""Any estimator of uq with a recalibrator behind it, fitted on predictions of rows it did not see.

A recalibrator must learn from predictions that are as wrong as those of new rows will be, which
those of training rows are not. With k folds the predictions of all rows come from k fits, each
without the rows it predicts; they are pooled, and one recalibrator is fitted to them. It is put
behind a last fit on all rows, so that one model predicts and no row is lost. (That fit has seen
k/(k − 1) times the rows of the others and may be slightly less over-confident than they were: the
price of using every row twice.)
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier, is_regressor
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import (
    KFold,
    ShuffleSplit,
    StratifiedKFold,
    StratifiedShuffleSplit,
    check_cv,
)
from sklearn.utils import _safe_indexing, get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _num_samples,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    has_fit_parameter,
)

from uq.calibration import (
    BetaCalibration,
    EvidenceScaling,
    HistogramBinning,
    IsotonicCalibration,
    MatrixScaling,
    QuantileRecalibration,
    TemperatureScaling,
    VarianceScaling,
    VectorScaling,
)
from uq.calibration.recalibration import Recalibrator
from uq.calibration.rows import Names, make_rows
from uq.distributions import Predictive, concatenate
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike

    Split = tuple[np.ndarray, np.ndarray]

# The first of each is what "auto" means.
_CLASSIFICATION: dict[str, Callable[[], Recalibrator]] = {
    "temperature": TemperatureScaling,
    "vector": VectorScaling,
    "matrix": MatrixScaling,
    "beta": BetaCalibration,
    "isotonic": IsotonicCalibration,
    "histogram": HistogramBinning,
    "evidence_scale": EvidenceScaling,
}
_REGRESSION: dict[str, Callable[[], Recalibrator]] = {
    "variance": VarianceScaling,
    "quantile": QuantileRecalibration,
    "isotonic": lambda: QuantileRecalibration(levels=None),
}
# Rows are shuffled, because files are often sorted; always alike, so that a fit can be repeated.
_SEED = 0


def _classifies(model: Calibrated) -> bool:
    return is_classifier(model.estimator)


def _regresses(model: Calibrated) -> bool:
    return is_regressor(model.estimator)


class Calibrated(MetaEstimatorMixin, BaseEstimator):
    """Recalibrate an estimator's predictive distributions on rows that it was not trained on.

    Parameters
    ----------
    estimator : classifier or regressor
        Any estimator of uq, or a :class:`uq.TableModel`; cloned in ``fit`` unless ``cv="prefit"``.
    method : str or Recalibrator, default="auto"
        For a classifier "temperature", "vector", "matrix", "beta", "isotonic", "histogram" or
        "evidence_scale"; for a regressor "variance", "quantile" or "isotonic"; or a recalibrator
        of :mod:`uq.calibration`, which is cloned. "auto" is "temperature" or "variance": one number
        to learn, and the split into aleatoric and epistemic stays.
    cv : int, float, "prefit", splitter or iterable of (train, test), default=5
        Where the predictions come from that the recalibrator is fitted to.

        - int k: from k fits, each without the rows of one fold; then ``estimator`` is fitted on all
          rows. Folds are shuffled with a fixed seed, and hold the classes evenly.
        - float in (0, 1): from one fit, which is the one that is kept; this share of the rows is
          held out from it, with a fixed seed.
        - a scikit-learn splitter, or (train, test) positions: as k folds, for rows that depend on
          one another (time, groups).
        - "prefit": from ``estimator``, which is fitted already. All rows given to ``fit`` must be
          new to it. Rows that it was trained on cannot be told from new ones, and would pass its
          over-confidence for calibration; where there are no others, use an int.

    Attributes
    ----------
    estimator_ : estimator
        The fitted estimator.
    recalibrator_ : Recalibrator
        The fitted recalibrator.
    classes_ : ndarray of shape (n_classes,)
        Labels, for a classifier.
    n_features_in_ : int
        Number of features, and ``feature_names_in_`` where ``estimator`` has it.

    See Also
    --------
    sklearn.calibration.CalibratedClassifierCV : for scikit-learn's classifiers; probabilities only,
        and by default the mean of k models.
    uq.calibration.TemperatureScaling : a recalibrator by itself.

    Examples
    --------
    >>> import uq
    >>> from sklearn.datasets import load_breast_cancer
    >>> from sklearn.model_selection import train_test_split
    >>> X, X_new, y, y_new = train_test_split(*load_breast_cancer(return_X_y=True), random_state=0)
    >>> settings = dict(hidden=(32,), max_epochs=60, patience=None, lr=0.01, random_state=0)
    >>> plain = uq.MAPClassifier(**settings).fit(X, y)
    >>> model = uq.Calibrated(uq.MAPClassifier(**settings), cv=3).fit(X, y)
    >>> bool(model.recalibrator_.temperature_ > 1)  # it was over-confident
    True
    >>> bool(model.log_score(X_new, y_new) > plain.log_score(X_new, y_new))
    True
    """

    def __init__(self, estimator: Any, method: str | Recalibrator = "auto", cv: Any = 5) -> None:
        self.estimator = estimator
        self.method = method
        self.cv = cv

    # -- fit -------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Fit the estimator and the recalibrator.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n, d)
            Inputs, as ``estimator`` takes them.
        y : array-like of shape (n,), or (n, m) for several outputs of a regressor
            Labels or targets.
        sample_weight : array-like of shape (n,), optional
            Weight of each row in both fits, for an ``estimator`` that takes weights.

        Returns
        -------
        self

        Raises
        ------
        ParameterError
            If ``method`` or ``cv`` cannot be used.
        DataError, ValueError
            If the data cannot be used by ``estimator``, there are fewer rows, or rows of a class,
            than folds, or a split leaves a class out of training.
        NotFittedError
            If ``cv="prefit"`` and ``estimator`` is not fitted.
        """
        recalibrator = self._recalibrator()
        y = self._check_targets(X, y, sample_weight)
        splits = self._splits(X, y)
        if not splits:
            check_is_fitted(self.estimator)
            fitted = self.estimator
            dist, target, weight = fitted.predict_distribution(X), np.asarray(y), sample_weight
        else:
            # With folds the fit on all rows comes first: its complaints name the user's rows.
            fitted = None if self._holds_out else self._fit_rows(X, y, sample_weight)
            parts = []
            for train, test in splits:
                fold = self._fit_rows(X, y, sample_weight, train)
                parts.append(fold.predict_distribution(_safe_indexing(X, test)))
                fitted = fitted or fold
            dist = concatenate(parts)
            rows = np.concatenate([test for _, test in splits])
            target = np.asarray(_safe_indexing(y, rows))
            weight = None if sample_weight is None else np.asarray(sample_weight)[rows]
        self.recalibrator_ = recalibrator.fit(dist, target, weight)
        self.estimator_ = fitted
        return self

    def _recalibrator(self) -> Recalibrator:
        """Unfitted recalibrator that ``method`` asks for."""
        if isinstance(self.method, Recalibrator):
            return clone(self.method)
        task, kinds = (
            ("classifier", _CLASSIFICATION) if _classifies(self) else ("regressor", _REGRESSION)
        )
        names = ["auto", *kinds]
        if not isinstance(self.method, str) or self.method not in names:
            raise ParameterError(
                f"Calibrated: method for a {task} must be one of {', '.join(map(repr, names))}, or "
                f"a recalibrator of uq.calibration, got {self.method!r}."
            )
        return kinds[names[1] if self.method == "auto" else self.method]()

    def _check_targets(self, X: Any, y: Any, sample_weight: Any) -> Any:
        if y is None:
            raise DataError(
                "Calibrated requires y to be passed, but the target y is None (a Dataset or "
                "DataLoader has no rows that could be split; give arrays)."
            )
        if sample_weight is not None and not has_fit_parameter(self.estimator, "sample_weight"):
            raise DataError(
                f"Calibrated: {type(self.estimator).__name__} takes no sample_weight; leave it out."
            )
        check_consistent_length(X, y, sample_weight)
        return _labels(y) if _classifies(self) else y

    def _splits(self, X: Any, y: Any) -> list[Split]:
        """Positions (train, test) of each fit that is judged; none for "prefit"."""
        if isinstance(self.cv, str) and self.cv == "prefit":
            return []
        n, strata = _num_samples(X), y if _classifies(self) else None
        splitter = self._splitter(n, strata)
        try:
            found = list(splitter.split(X, y))
        except ValueError as error:
            raise DataError(f"Calibrated.fit: cv={self.cv!r} cannot split: {error}") from error
        splits = []
        for i, pair in enumerate(found):
            train, test = (np.arange(n)[part] for part in pair)  # masks become positions, too
            if strata is not None and len(left_out := np.setdiff1d(strata, strata[train])):
                raise DataError(
                    f"Calibrated.fit: split {i} trains without class {left_out.tolist()[0]!r}, so "
                    "that it cannot predict it; give a cv that keeps some of each class in every "
                    "training part (StratifiedKFold, or an int)."
                )
            splits.append((train, test))
        return splits

    def _splitter(self, n: int, strata: np.ndarray | None) -> Any:
        cv = self.cv
        if isinstance(cv, Integral) and not isinstance(cv, bool) and cv >= 2:
            if n < cv:
                raise DataError(
                    f"Calibrated.fit: cv={cv} needs n_samples >= {cv}, got n_samples = {n}."
                )
            if strata is None:
                return KFold(cv, shuffle=True, random_state=_SEED)
            labels, counts = np.unique(strata, return_counts=True)
            if counts.min() < cv:
                raise DataError(
                    f"Calibrated.fit: class {labels[counts.argmin()].item()!r} has "
                    f"{counts.min()} rows, but cv={cv} needs {cv} of each class; lower cv, or add "
                    "rows of that class."
                )
            return StratifiedKFold(cv, shuffle=True, random_state=_SEED)
        if self._holds_out:
            kind = ShuffleSplit if strata is None else StratifiedShuffleSplit
            return kind(1, test_size=cv, random_state=_SEED)
        if isinstance(cv, str | Real) or cv is None:
            raise ParameterError(
                "Calibrated: cv must be an integer >= 2, a share in (0, 1), 'prefit', a splitter "
                f"of scikit-learn or pairs (train, test), got {cv!r}."
            )
        try:
            return check_cv(cv)
        except ValueError as error:
            raise ParameterError(f"Calibrated: cv is of no use: {error}") from error

    @property
    def _holds_out(self) -> bool:
        return isinstance(self.cv, Real) and 0 < self.cv < 1

    def _fit_rows(self, X: Any, y: Any, weight: Any, rows: np.ndarray | None = None) -> Any:
        """Fit a clone of the estimator, to some of the rows."""
        if rows is not None:
            X, y = _safe_indexing(X, rows), _safe_indexing(y, rows)
            weight = None if weight is None else np.asarray(weight)[rows]
        settings = {} if weight is None else {"sample_weight": weight}
        return clone(self.estimator).fit(X, y, **settings)

    # -- predict ---------------------------------------------------------------------------

    def predict_distribution(self, X: Any) -> Predictive:
        """Return the recalibrated predictive distribution; it keeps the index of a DataFrame."""
        check_is_fitted(self)
        dist: Predictive = self.estimator_.predict_distribution(X)
        out = self.recalibrator_.transform(dist)
        out.index = dist.index
        return out

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable labels, or the predictive means."""
        dist: Any = self.predict_distribution(X)
        if not _classifies(self):
            return _numpy(dist.mean)
        return self.classes_[_numpy(dist.mode)]

    @available_if(_classifies)
    def predict_proba(self, X: Any) -> np.ndarray:
        """Return class probabilities, columns in the order of ``classes_``."""
        dist: Any = self.predict_distribution(X)
        return _numpy(dist.probs)

    @available_if(_regresses)
    def predict_interval(self, X: Any, coverage: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Return the equal-tailed interval that holds ``coverage`` of the predictive mass."""
        dist: Any = self.predict_distribution(X)
        lower, upper = dist.interval(coverage)
        return _numpy(lower), _numpy(upper)

    @available_if(_regresses)
    def predict_quantiles(self, X: Any, q: ArrayLike) -> np.ndarray:
        """Return quantiles at levels ``q``: (n[, m]) for one level, (Q, n[, m]) for several."""
        dist: Any = self.predict_distribution(X)
        return _numpy(dist.quantile(q))

    def score(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return accuracy, or R² for a regressor."""
        predicted = self.predict(X)
        if _classifies(self):
            return float(accuracy_score(_labels(y), predicted, sample_weight=sample_weight))
        return float(r2_score(y, predicted, sample_weight=sample_weight))

    def log_score(self, X: Any, y: ArrayLike) -> float:
        """Return the mean log predictive probability or density of ``y``, in nats."""
        dist = self.predict_distribution(X)
        target = _labels(y) if _classifies(self) else np.asarray(y)
        rows = make_rows(target, dist, Names("Calibrated.log_score", "y", "the prediction"))
        return -float(rows.neg_log.mean())

    def save(self, path: str | Path) -> None:
        """Write estimator and recalibrator to one file that :func:`uq.load` reads.

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


def _labels(y: Any) -> np.ndarray:
    """Labels as an array of one plain dtype, which a label of any file comes to."""
    labels = column_or_1d(y, warn=True)
    if labels.dtype == object and not any(v is None or v != v for v in labels.tolist()):
        labels = np.array(labels.tolist())
    check_classification_targets(labels)
    return labels


def _numpy(t: Any) -> np.ndarray:
    values: np.ndarray = t.detach().cpu().numpy()
    return values

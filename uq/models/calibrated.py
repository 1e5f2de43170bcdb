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
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.base import clone
from sklearn.utils import _safe_indexing
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

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
from uq.distributions import Predictive, concatenate
from uq.errors import ParameterError
from uq.models.base import as_numpy
from uq.models.splitting import find_splits, fit_rows, holds_out
from uq.models.wrapper import Wrapper, classifies, regresses

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

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


class Calibrated(Wrapper):
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
        X, y = self._check_rows(X, y, sample_weight)
        labels = y if classifies(self) else None
        splits = find_splits(self, self.cv, X, y, labels=labels, stratify=True)
        if not splits:
            check_is_fitted(self.estimator)
            fitted = self.estimator
            dist, target, weight = fitted.predict_distribution(X), np.asarray(y), sample_weight
        else:
            # With folds the fit on all rows comes first: its complaints name the user's rows.
            whole = not holds_out(self.cv)
            fitted = fit_rows(self.estimator, X, y, sample_weight) if whole else None
            parts = []
            for train, test in splits:
                fold = fit_rows(self.estimator, X, y, sample_weight, train)
                parts.append(fold.predict_distribution(_safe_indexing(X, test)))
                fitted = fitted or fold
            dist = concatenate(parts)
            rows = np.concatenate([test for _, test in splits])
            target = np.asarray(_safe_indexing(y, rows))
            weight = None if sample_weight is None else np.asarray(sample_weight)[rows]
        self.recalibrator_: Recalibrator = recalibrator.fit(dist, target, weight)
        self.estimator_ = fitted
        return self

    def _recalibrator(self) -> Recalibrator:
        """Unfitted recalibrator that ``method`` asks for."""
        if isinstance(self.method, Recalibrator):
            return clone(self.method)
        task, kinds = (
            ("classifier", _CLASSIFICATION) if classifies(self) else ("regressor", _REGRESSION)
        )
        names = ["auto", *kinds]
        if not isinstance(self.method, str) or self.method not in names:
            raise ParameterError(
                f"Calibrated: method for a {task} must be one of {', '.join(map(repr, names))}, or "
                f"a recalibrator of uq.calibration, got {self.method!r}."
            )
        return kinds[names[1] if self.method == "auto" else self.method]()

    # -- predict ---------------------------------------------------------------------------

    def predict_distribution(self, X: Any) -> Predictive:
        """Return the recalibrated predictive distribution; it keeps the index of a DataFrame."""
        check_is_fitted(self)
        dist: Predictive = self.estimator_.predict_distribution(X)
        out = self.recalibrator_.transform(dist)
        out.index = dist.index
        return out

    @available_if(regresses)
    def predict_interval(self, X: Any, coverage: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Return the equal-tailed interval that holds ``coverage`` of the predictive mass."""
        dist: Any = self.predict_distribution(X)
        lower, upper = dist.interval(coverage)
        return as_numpy(lower), as_numpy(upper)

    @available_if(regresses)
    def predict_quantiles(self, X: Any, q: ArrayLike) -> np.ndarray:
        """Return quantiles at levels ``q``: (n[, m]) for one level, (Q, n[, m]) for several."""
        dist: Any = self.predict_distribution(X)
        return as_numpy(dist.quantile(q))

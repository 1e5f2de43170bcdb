"""Any estimator of uq with conformal intervals or sets, fitted on rows it was not trained on.

Held-out rows say how far targets lie from predictions, and with that a guarantee that needs no
trust in the model: the next target is in the interval, the next label in the set, with a stated
probability. With a share of rows held out it is exact, and the model has fewer rows; with k folds
(CV+) every row both trains and judges, for k more fits and a weaker guarantee that is kept with
room to spare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.base import clone
from sklearn.utils import _safe_indexing
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from uq.calibration import ConformalIntervals, ConformalSets
from uq.calibration.conformal import check_coverage
from uq.calibration.conformal_classes import CLASS_SCORES
from uq.calibration.conformal_real import REAL_SCORES
from uq.distributions import Predictive
from uq.errors import ParameterError
from uq.models.splitting import find_splits, fit_rows, holds_out, is_fold_count
from uq.models.wrapper import Wrapper, classifies, regresses

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Conformal(Wrapper):
    """Give an estimator intervals or sets that hold the target with a stated probability.

    Parameters
    ----------
    estimator : classifier or regressor
        Any estimator of uq, a :class:`uq.Calibrated` or a :class:`uq.TableModel`; cloned in ``fit``
        unless ``cv="prefit"``.
    method : str, ConformalIntervals or ConformalSets, default="auto"
        For a classifier "lac", "aps" or "raps", the score of
        :class:`uq.calibration.ConformalSets`; for a regressor "quantile", "normalized", "residual"
        or "density", that of :class:`uq.calibration.ConformalIntervals`; or one of these objects,
        which is cloned, where more is to be said (class-conditional coverage, for one). "auto" is
        "lac" or "quantile": they alter least what the model says by itself.
    coverage : float, default=0.9
        Probability that the interval or set of a new row holds its target, in (0, 1). If ``method``
        is an object, its own must be the same.
    cv : float, int or "prefit", default=0.25
        Where the rows come from that judge the predictions.

        - float in (0, 1): this share of the rows is held out, with a fixed seed; one fit. The
          guarantee is exact. A quarter costs little accuracy, and is enough of 33 rows for a
          coverage of 0.9.
        - int k: k fits judge each the rows of one fold, with a fixed seed (CV+), and one more, to
          all rows, is ``estimator_``. For small data. Not for "density", nor class-conditional.
        - "prefit": ``estimator`` is fitted already, and all rows given to ``fit`` are new to it.
          Rows that it was trained on cannot be told from new ones, and give too narrow intervals.
          To be used as well where rows depend on one another (time, groups) and you split them.

    Attributes
    ----------
    estimator_ : estimator
        The fitted estimator, behind all that is not conformal.
    fold_estimators_ : list of estimators
        The k models behind intervals and sets, for an int ``cv``; else empty.
    conformal_ : ConformalIntervals or ConformalSets
        What held-out rows taught.
    classes_ : ndarray of shape (n_classes,)
        Labels, for a classifier.
    n_features_in_ : int
        Number of features, and ``feature_names_in_`` where ``estimator`` has it.

    See Also
    --------
    uq.Calibrated : corrects the whole distribution; both go together, this one outside.
    mapie.regression.SplitConformalRegressor : the same for estimators of scikit-learn.
    mapie.regression.CrossConformalRegressor : CV+ of them.

    Notes
    -----
    Rows must be exchangeable: shuffling them changes nothing about what is asked of the model. For
    a float the target is then in the interval with probability ``coverage`` or up to 1/(n + 1) more
    for n held-out rows; for an int with at least 2 ``coverage`` − 1 − √(2/n), and about
    ``coverage`` in practice. Both are averages over all rows, not a promise for each x. Splits are
    not stratified by class, which the guarantee does not allow for, and there are no row weights:
    held-out rows of different weight would not be exchangeable.

    References
    ----------
    See :class:`uq.calibration.ConformalIntervals` and :class:`uq.calibration.ConformalSets`.

    Examples
    --------
    >>> import uq
    >>> from sklearn.datasets import load_diabetes
    >>> from sklearn.model_selection import train_test_split
    >>> X, X_new, y, y_new = train_test_split(*load_diabetes(return_X_y=True), random_state=0)
    >>> model = uq.MAPRegressor(hidden=(16,), max_epochs=30, random_state=0)
    >>> model = uq.Conformal(model, coverage=0.8).fit(X, y)
    >>> lower, upper = model.predict_interval(X_new)
    >>> bool(abs(((lower <= y_new) & (y_new <= upper)).mean() - 0.8) < 0.1)
    True
    """

    def __init__(
        self,
        estimator: Any,
        method: str | ConformalIntervals | ConformalSets = "auto",
        coverage: float = 0.9,
        cv: float | str = 0.25,
    ) -> None:
        self.estimator = estimator
        self.method = method
        self.coverage = coverage
        self.cv = cv

    # -- fit -------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any) -> Self:
        """Fit the estimator, and score its predictions of rows that it did not see.

        Parameters
        ----------
        X : DataFrame or array-like of shape (n, d)
            Inputs, as ``estimator`` takes them.
        y : array-like of shape (n,), or (n, m) for several outputs of a regressor
            Labels or targets.

        Returns
        -------
        self

        Warns
        -----
        UserWarning
            If too few rows are held out for ``coverage``, so that intervals are the whole line, or
            sets hold all classes.

        Raises
        ------
        ParameterError
            If ``method``, ``coverage`` or ``cv`` cannot be used, or not together.
        DataError, ValueError
            If the data cannot be used by ``estimator``, there are too few rows to split, or a split
            leaves a class out of training.
        NotFittedError
            If ``cv="prefit"`` and ``estimator`` is not fitted.
        """
        conformal = self._conformal()
        if not (is_fold_count(self.cv) or holds_out(self.cv) or self._prefit):
            raise ParameterError(
                "Conformal: cv must be a share in (0, 1), an integer >= 2 or 'prefit' (for other "
                f"splits, fit the estimator yourself), got {self.cv!r}."
            )
        X, y = self._check_rows(X, y)
        labels = y if classifies(self) else None
        splits = find_splits(self, self.cv, X, y, labels=labels, stratify=False)
        folds: list[Any] = []
        if self._prefit:
            check_is_fitted(self.estimator)
            fitted = self.estimator
            conformal.fit(fitted.predict_distribution(X), np.asarray(y))
        elif holds_out(self.cv):
            ((train, test),) = splits
            fitted = fit_rows(self.estimator, X, y, rows=train)
            held_out = fitted.predict_distribution(_safe_indexing(X, test))
            conformal.fit(held_out, np.asarray(_safe_indexing(y, test)))
        else:
            # The fit on all rows comes first: its complaints name the user's rows.
            fitted = fit_rows(self.estimator, X, y)
            folds = [fit_rows(self.estimator, X, y, rows=train) for train, _ in splits]
            conformal.fit(
                [
                    fold.predict_distribution(_safe_indexing(X, test))
                    for fold, (_, test) in zip(folds, splits, strict=True)
                ],
                [np.asarray(_safe_indexing(y, test)) for _, test in splits],
            )
        self.estimator_ = fitted
        self.fold_estimators_: list[Any] = folds
        self.conformal_: ConformalIntervals | ConformalSets = conformal
        return self

    @property
    def _prefit(self) -> bool:
        return isinstance(self.cv, str) and self.cv == "prefit"

    def _conformal(self) -> ConformalIntervals | ConformalSets:
        """Unfitted intervals or sets that ``method`` asks for."""
        check_coverage("Conformal", self.coverage)
        kind: type[ConformalIntervals] | type[ConformalSets] = (
            ConformalSets if classifies(self) else ConformalIntervals
        )
        scores = CLASS_SCORES if classifies(self) else REAL_SCORES
        if isinstance(self.method, kind):
            if self.method.coverage != self.coverage:
                raise ParameterError(
                    f"Conformal: method has coverage {self.method.coverage!r}, but coverage is "
                    f"{self.coverage!r}; give both the same."
                )
            conformal = clone(self.method)
        elif isinstance(self.method, str) and self.method in ("auto", *scores):
            score: Any = scores[0] if self.method == "auto" else self.method
            conformal = kind(score=score, coverage=self.coverage)
        else:
            task = "classifier" if classifies(self) else "regressor"
            names = ", ".join(map(repr, ("auto", *scores)))
            raise ParameterError(
                f"Conformal: method for a {task} must be one of {names}, or a {kind.__name__}, got "
                f"{self.method!r}."
            )
        # Said here, because fits come before the conformal object sees that there are folds.
        whole = conformal.score == "density" or getattr(conformal, "class_conditional", False)
        if whole and is_fold_count(self.cv):
            raise ParameterError(
                "Conformal: an int cv (CV+) has no form with a known guarantee for density regions "
                f"and class-conditional sets, got cv={self.cv}; pass a share such as cv=0.25."
            )
        return conformal

    # -- predict ---------------------------------------------------------------------------

    def predict_distribution(self, X: Any) -> Predictive:
        """Return the predictive distribution of ``estimator_``, as it is."""
        check_is_fitted(self)
        dist: Predictive = self.estimator_.predict_distribution(X)
        return dist

    @available_if(regresses)
    def predict_interval(
        self, X: Any, coverage: float | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the conformal interval (lower, upper), shape (n,) or (n, m) each.

        For "density" the smallest interval around the region. Another ``coverage`` than that of
        ``fit`` costs nothing, but for the method "quantile", which has to be fitted with it.
        """
        dist = self._judged(X)
        lower, upper = self.conformal_.interval(dist, coverage)
        return lower, upper

    @available_if(regresses)
    def predict_region(self, X: Any, coverage: float | None = None) -> list[Any]:
        """Return the intervals (k, 2) that make up the conformal region of each row.

        More than one for "density" where the distribution has several modes. ``coverage`` is as for
        :meth:`predict_interval`.
        """
        dist = self._judged(X)
        regions: list[Any] = self.conformal_.region(dist, coverage)
        return regions

    @available_if(classifies)
    def predict_set(self, X: Any, coverage: float | None = None) -> NDArray[np.bool_]:
        """Return which classes are in the conformal set, (n, n_classes), as in ``classes_``.

        Another ``coverage`` than that of ``fit`` costs nothing, but for class-conditional sets,
        which have to be fitted with it.
        """
        dist = self._judged(X)
        sets: NDArray[np.bool_] = self.conformal_.predict_set(dist, coverage)
        return sets

    def _judged(self, X: Any) -> Any:
        """Predictions of the kind that the scores are of: one, or a list of those of the folds."""
        check_is_fitted(self)
        folds = [fold.predict_distribution(X) for fold in self.fold_estimators_]
        return folds or self.estimator_.predict_distribution(X)

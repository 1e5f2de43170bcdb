"""Scorers for ``cross_validate``, ``GridSearchCV`` and whatever else takes ``scoring=``.

A scorer is called with a fitted estimator and held-out rows, and higher is better: losses are
negated and their names begin with ``neg_``. The estimator may be any that has
``predict_distribution``, also as the last step of a Pipeline or as the best one of a finished
search, or a classifier of scikit-learn with ``predict_proba`` and ``classes_``.

Every metric that needs no parameter is here by name; :func:`make` gives the others, and other
values of their parameters::

    from uq.calibration import scorers

    scoring = {
        "nll": scorers.neg_negative_log_likelihood,
        "q10": scorers.make("neg_pinball_loss", level=0.1),
    }

Each of these predicts anew, because scikit-learn shares only its own methods' results between
scorers; :func:`battery` predicts once for all of them.

Calibration errors compare the *top label* unless ``kind`` says otherwise, for two classes too.
Coverage has no better side: read ``interval_coverage``, do not select by it. A metric that is
undefined on a fold, such as ``misclassification_auroc`` where nothing is wrong, scores NaN, which
``GridSearchCV`` ranks last; averages of it need ``numpy.nanmean``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from uq.calibration import class_metrics, real_metrics
from uq.distributions import RealPredictive
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Task = Literal["classification", "regression"]

_PREFIX = "neg_"
_BOTH: dict[str, Callable[..., float]] = {
    "neg_negative_log_likelihood": class_metrics.negative_log_likelihood,
    "neg_aurc": class_metrics.aurc,
    "neg_augrc": class_metrics.augrc,
}
_METRICS: dict[Task, dict[str, Callable[..., float]]] = {
    "classification": {
        **_BOTH,
        "neg_brier_score": class_metrics.brier_score,
        "accuracy": class_metrics.accuracy,
        "neg_expected_calibration_error": class_metrics.expected_calibration_error,
        "neg_debiased_calibration_error": class_metrics.debiased_calibration_error,
        "neg_maximum_calibration_error": class_metrics.maximum_calibration_error,
        "neg_classwise_calibration_error": class_metrics.classwise_calibration_error,
        "neg_smooth_calibration_error": class_metrics.smooth_calibration_error,
        "neg_mmce": class_metrics.mmce,
        "misclassification_auroc": class_metrics.misclassification_auroc,
        "neg_excess_aurc": class_metrics.excess_aurc,
        "accuracy_at_coverage": class_metrics.accuracy_at_coverage,
        "coverage_at_accuracy": class_metrics.coverage_at_accuracy,
    },
    "regression": {
        **_BOTH,
        "neg_crps": real_metrics.crps,
        "neg_energy_score": real_metrics.energy_score,
        "neg_rmse": real_metrics.rmse,
        "neg_mae": real_metrics.mae,
        "neg_pinball_loss": real_metrics.pinball_loss,
        "neg_interval_score": real_metrics.interval_score,
        "interval_coverage": real_metrics.interval_coverage,
        "neg_quantile_calibration_error": real_metrics.quantile_calibration_error,
        "neg_expected_normalized_calibration_error": (
            real_metrics.expected_normalized_calibration_error
        ),
        "neg_uncertainty_calibration_error": real_metrics.uncertainty_calibration_error,
        "neg_mean_interval_width": real_metrics.mean_interval_width,
        "neg_sharpness": real_metrics.sharpness,
    },
}
_BY_NAME = {name: metric for metrics in _METRICS.values() for name, metric in metrics.items()}


# -- scorers -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Routed:
    """What scikit-learn asks of a scorer besides its value. Scorers never change."""

    weight_request: bool | str | None = field(default=None)

    def set_score_request(self, *, sample_weight: bool | str | None) -> Self:
        """Return a scorer that asks for row weights where scikit-learn routes metadata.

        Parameters
        ----------
        sample_weight : bool, str or None
            True asks for ``sample_weight``, a string for weights under that name, False for none;
            None raises an error if weights are passed.

        Returns
        -------
        scorer
            A new one: unlike those of scikit-learn this method changes nothing, so that the named
            scorers of this module stay as they are.

        Raises
        ------
        ParameterError
            If ``sklearn.set_config(enable_metadata_routing=True)`` was not called, without which
            the request would have no effect.
        """
        from sklearn import get_config

        if not get_config()["enable_metadata_routing"]:
            raise ParameterError(
                f"{self!r}.set_score_request has no effect without metadata routing; call "
                "sklearn.set_config(enable_metadata_routing=True) first."
            )
        return replace(self, weight_request=sample_weight)

    def get_metadata_routing(self) -> Any:
        """Return which metadata this scorer asks for, as scikit-learn's ``MetadataRequest``."""
        from sklearn.utils.metadata_routing import MetadataRequest

        request = MetadataRequest(owner=self)
        request.score.add_request(param="sample_weight", alias=self.weight_request)
        return request

    def _accept_sample_weight(self) -> bool:
        # A search that is fitted with weights asks this of its scorers where nothing is routed.
        return True

    def __sklearn_clone__(self) -> Self:
        return self


@dataclass(frozen=True, repr=False)
class Scorer(_Routed):
    """Metric of an estimator's predictions of held-out rows; made by :func:`make`.

    Parameters
    ----------
    name : str
        Name of the scorer.
    parameters : tuple of (str, value)
        Keyword arguments of the metric.
    weight_request : bool, str or None, default=None
        See :meth:`set_score_request`.
    """

    name: str
    parameters: tuple[tuple[str, Any], ...] = ()

    def __call__(
        self, estimator: Any, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> float:
        """Score a fitted estimator.

        Parameters
        ----------
        estimator : estimator
            Fitted, with ``predict_distribution``, or with ``predict_proba`` and ``classes_``.
        X : array-like or DataFrame of shape (n, d)
            Held-out inputs.
        y : array-like of shape (n,) or (n, m)
            Their labels or targets.
        sample_weight : array-like of shape (n,), optional
            Row weights.

        Returns
        -------
        float
            The metric, negated if it is a loss. NaN where the metric is undefined.

        Raises
        ------
        ParameterError
            If the estimator has no predictive distribution, or a parameter cannot be used.
        DataError
            If the metric does not fit the task, or ``y`` does not fit the predictions.
        """
        return self._score(y, _predict(estimator, X), sample_weight)

    def _score(self, y: ArrayLike, prediction: Any, sample_weight: ArrayLike | None) -> float:
        metric = _BY_NAME[self.name]
        value = metric(y, prediction, sample_weight=sample_weight, **dict(self.parameters))
        return -value if self.name.startswith(_PREFIX) else value

    def __repr__(self) -> str:
        arguments = [repr(self.name), *(f"{key}={value!r}" for key, value in self.parameters)]
        return f"scorers.make({', '.join(arguments)})"


def make(name: str, **parameters: Any) -> Scorer:
    """Make a scorer of a metric.

    Parameters
    ----------
    name : str
        Name of a metric in :mod:`uq.calibration`, with ``neg_`` before it for a loss:
        ``"neg_pinball_loss"``, ``"interval_coverage"``.
    **parameters
        Keyword arguments of the metric, such as ``coverage``, ``level``, ``n_bins`` or ``kind``
        (here "top_label" by default, whatever the number of classes).

    Returns
    -------
    Scorer
        ``scorer(estimator, X, y, sample_weight=None) -> float``, higher is better; it can be
        pickled, cloned and compared.

    Raises
    ------
    ParameterError
        If there is no such scorer, or the parameters are not those of the metric. Values are
        checked where they are used, as those of estimators are.

    Examples
    --------
    >>> from sklearn.datasets import load_breast_cancer
    >>> from sklearn.model_selection import cross_val_score
    >>> from sklearn.naive_bayes import GaussianNB
    >>> from uq.calibration import scorers
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> careful = scorers.make("accuracy_at_coverage", coverage=0.5)
    >>> cross_val_score(GaussianNB(), X, y, scoring=careful, cv=3).round(2)
    array([0.98, 1.  , 1.  ])
    >>> cross_val_score(GaussianNB(), X, y, scoring=scorers.neg_brier_score, cv=3).round(2)
    array([-0.08, -0.05, -0.04])
    """
    if name not in _BY_NAME:
        raise ParameterError(f"scorers.make: {_unknown(name)}")
    accepted = _keywords(_BY_NAME[name])
    if "kind" in accepted:
        parameters = {"kind": "top_label", **parameters}
    unknown = sorted(set(parameters) - set(accepted))
    if unknown:
        expected = ", ".join(accepted) or "no parameters"
        raise ParameterError(f"scorers.make: {name} takes {expected}, got {', '.join(unknown)}.")
    missing = [key for key, needed in accepted.items() if needed and key not in parameters]
    if missing:
        raise ParameterError(
            f"scorers.make: {name} needs {', '.join(missing)}; give it as a keyword argument."
        )
    # In the order of the signature, so that scorers of the same metric are equal.
    return Scorer(name, tuple((key, parameters[key]) for key in accepted if key in parameters))


def _keywords(metric: Callable[..., float]) -> dict[str, bool]:
    """Keyword parameters of a metric, in order, and whether each must be given."""
    return {
        key: parameter.default is parameter.empty
        for key, parameter in inspect.signature(metric).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key != "sample_weight"
    }


def _unknown(name: Any) -> str:
    if f"{_PREFIX}{name}" in _BY_NAME:
        return f"{name} is a loss, and higher scores are better: use '{_PREFIX}{name}'."
    return f"name must be one of {', '.join(sorted(_BY_NAME))}, got {name!r}."


def all(task: Task) -> dict[str, Scorer]:
    """Every scorer of a task that needs no parameter, by its name.

    Parameters
    ----------
    task : {"classification", "regression"}
        What the estimator predicts.

    Returns
    -------
    dict of str to Scorer
        A new dict, to take from; each scorer predicts anew, see :func:`battery`.

    Raises
    ------
    ParameterError
        If ``task`` is neither.

    Examples
    --------
    >>> from uq.calibration import scorers
    >>> scorers.all("regression")["neg_crps"]
    scorers.make('neg_crps')
    """
    if task not in _METRICS:
        raise ParameterError(
            f"scorers.all: task must be 'classification' or 'regression', got {task!r}."
        )
    chosen = {}
    for name, metric in _METRICS[task].items():
        if True not in _keywords(metric).values():
            chosen[name] = make(name)
    return chosen


# -- many at once ------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Battery(_Routed):
    """Several scorers that share one prediction; made by :func:`battery`.

    Parameters
    ----------
    scoring : {"classification", "regression", "auto"} or tuple of (str, Scorer)
        Which, with their keys.
    weight_request : bool, str or None, default=None
        See :meth:`set_score_request`.
    """

    scoring: Task | Literal["auto"] | tuple[tuple[str, Scorer], ...]

    def __call__(
        self, estimator: Any, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> dict[str, float]:
        """Score a fitted estimator, predicting once; arguments and errors as of a scorer.

        Returns
        -------
        dict of str to float
            Scores by key.
        """
        prediction = _predict(estimator, X)
        if isinstance(self.scoring, tuple):
            chosen = dict(self.scoring)
        elif self.scoring == "auto":
            is_real = isinstance(prediction, RealPredictive)
            chosen = all("regression" if is_real else "classification")
        else:
            chosen = all(self.scoring)
        return {key: s._score(y, prediction, sample_weight) for key, s in chosen.items()}

    def __repr__(self) -> str:
        scoring = dict(self.scoring) if isinstance(self.scoring, tuple) else self.scoring
        return f"scorers.battery({scoring!r})"


def battery(
    scoring: Task | Literal["auto"] | Mapping[str, Scorer] = "auto",
) -> Battery:
    """Score many metrics for one prediction, which is what costs time.

    Parameters
    ----------
    scoring : {"auto", "classification", "regression"} or mapping of str to Scorer, default="auto"
        Scorers by the key that they get in the results; or all of a task, by name. "auto" goes by
        what the estimator predicts.

    Returns
    -------
    Battery
        ``battery(estimator, X, y, sample_weight=None) -> dict``, which ``cross_validate`` and
        ``GridSearchCV`` take as ``scoring``; the latter needs ``refit="a key"``.

    Raises
    ------
    ParameterError
        If ``scoring`` is none of these, or is empty.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    >>> from sklearn.model_selection import cross_validate
    >>> from uq.calibration import scorers
    >>> X, y = load_iris(return_X_y=True)
    >>> both = {"nll": scorers.neg_negative_log_likelihood, "accuracy": scorers.accuracy}
    >>> found = cross_validate(
    ...     LinearDiscriminantAnalysis(), X, y, scoring=scorers.battery(both), cv=3
    ... )
    >>> found["test_nll"].round(2), found["test_accuracy"].round(2)
    (array([-0.01, -0.04, -0.08]), array([1.  , 0.98, 0.96]))
    """
    if isinstance(scoring, Mapping):
        if not scoring or not {type(s) for s in scoring.values()} <= {Scorer}:
            raise ParameterError(
                "scorers.battery: scoring must map keys to scorers of this module, at least one, "
                f"got {dict(scoring)!r}; scorers of scikit-learn predict for themselves."
            )
        return Battery(tuple(scoring.items()))
    if scoring != "auto" and scoring not in _METRICS:
        raise ParameterError(
            "scorers.battery: scoring must be 'auto', 'classification', 'regression' or a mapping "
            f"of keys to scorers, got {scoring!r}."
        )
    return Battery(scoring)


# -- predictions -------------------------------------------------------------------------------


def _predict(estimator: Any, X: Any) -> Any:
    """Predictive distribution at ``X``, or class probabilities with the labels as columns."""
    from sklearn.pipeline import Pipeline

    if hasattr(estimator, "predict_distribution"):
        return estimator.predict_distribution(X)
    # These two pass on only the methods that scikit-learn knows.
    if isinstance(estimator, Pipeline):
        before = estimator[:-1]
        return _predict(estimator[-1], before.transform(X) if len(before) else X)
    if hasattr(estimator, "best_estimator_"):
        return _predict(estimator.best_estimator_, X)
    if hasattr(estimator, "predict_proba") and hasattr(estimator, "classes_"):
        return _probabilities(estimator, X)
    raise ParameterError(
        "scorer: estimator must have predict_distribution, or predict_proba and classes_, but "
        f"{type(estimator).__name__} has neither; use an estimator of uq, or a scorer of "
        "scikit-learn for point predictions."
    )


def _probabilities(classifier: Any, X: Any) -> Any:
    import pandas as pd

    probs = classifier.predict_proba(X)
    if isinstance(probs, list):
        raise DataError(
            f"scorer: {type(classifier).__name__} predicts {len(probs)} outputs; score each by a "
            "classifier of its own."
        )
    return pd.DataFrame(probs, columns=classifier.classes_)


# -- by name -----------------------------------------------------------------------------------

neg_negative_log_likelihood: Scorer = make("neg_negative_log_likelihood")
neg_aurc: Scorer = make("neg_aurc")
neg_augrc: Scorer = make("neg_augrc")

neg_brier_score: Scorer = make("neg_brier_score")
accuracy: Scorer = make("accuracy")
neg_expected_calibration_error: Scorer = make("neg_expected_calibration_error")
neg_debiased_calibration_error: Scorer = make("neg_debiased_calibration_error")
neg_maximum_calibration_error: Scorer = make("neg_maximum_calibration_error")
neg_classwise_calibration_error: Scorer = make("neg_classwise_calibration_error")
neg_smooth_calibration_error: Scorer = make("neg_smooth_calibration_error")
neg_mmce: Scorer = make("neg_mmce")
misclassification_auroc: Scorer = make("misclassification_auroc")
neg_excess_aurc: Scorer = make("neg_excess_aurc")

neg_crps: Scorer = make("neg_crps")
neg_energy_score: Scorer = make("neg_energy_score")
neg_rmse: Scorer = make("neg_rmse")
neg_mae: Scorer = make("neg_mae")
neg_interval_score: Scorer = make("neg_interval_score")
interval_coverage: Scorer = make("interval_coverage")
neg_quantile_calibration_error: Scorer = make("neg_quantile_calibration_error")
neg_expected_normalized_calibration_error: Scorer = make(
    "neg_expected_normalized_calibration_error"
)
neg_uncertainty_calibration_error: Scorer = make("neg_uncertainty_calibration_error")
neg_mean_interval_width: Scorer = make("neg_mean_interval_width")
neg_sharpness: Scorer = make("neg_sharpness")

"""Classifier and regressor: what a method adds to :class:`uq.models.base.Estimator` by its task."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from uq.distributions import (
    CategoricalMixture,
    NormalMixture,
    Parametric,
    Predictive,
    RealPredictive,
)
from uq.errors import DataError
from uq.models.base import Estimator, estimator
from uq.models.checks import check_choice
from uq.nn.likelihoods import CategoricalLikelihood, Likelihood, NormalLikelihood

Noise = Literal["homoscedastic", "heteroscedastic"]


@estimator
class Classifier(ClassifierMixin, Estimator):
    """Template of the classifiers."""

    classes_: np.ndarray = field(init=False)

    def _likelihood(self) -> Likelihood:
        return CategoricalLikelihood(len(self.classes_))

    def _width_reason(self) -> str:
        return f"one logit for each of the {len(self.classes_)} classes"

    def _check_targets(self, y: np.ndarray) -> np.ndarray:
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        try:
            self.classes_, positions = np.unique(y, return_inverse=True)
        except TypeError as error:
            raise DataError(
                f"{type(self).__name__}.fit: the labels in y cannot be ordered ({error}); missing "
                "or mixed labels?"
            ) from error
        self._need_two_classes()
        return positions

    def _learn_target_scale(self, y: np.ndarray, weight: np.ndarray | None) -> None:
        pass

    def _scale_targets(self, y: np.ndarray) -> np.ndarray:
        return y

    def _need_two_classes(self) -> None:
        if len(self.classes_) < 2:
            raise DataError(
                f"{type(self).__name__}.fit needs at least 2 classes in y, got one class only: "
                f"{self.classes_.tolist()[0]!r}."
            )

    def _encode_targets(self, y: np.ndarray) -> np.ndarray:
        positions = np.searchsorted(self.classes_, y).clip(max=len(self.classes_) - 1)
        unknown = self.classes_[positions] != y
        if unknown.any():
            raise DataError(
                f"{type(self).__name__}: y holds the label {np.asarray(y)[unknown][0]!r}, which "
                "was not in the data that was fitted."
            )
        return positions

    def _user_scale(self, dist: CategoricalMixture) -> Predictive:
        dist.classes = self.classes_
        return dist

    def _function_scale(self, values: np.ndarray) -> np.ndarray:
        return values

    def _log_prob(self, dist: CategoricalMixture, y: Any) -> Tensor:
        return dist.log_prob(torch.as_tensor(self._encode_targets(column_or_1d(y, warn=True))))

    def predict(self, X: Any) -> np.ndarray:
        """Predict the most probable label of each row, shape (n,)."""
        proba = self.predict_proba(X)  # first: it checks that the model is fitted
        return self.classes_[np.argmax(proba, axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict class probabilities, shape (n, n_classes), columns as in ``classes_``."""
        dist: Any = self.predict_distribution(X)
        proba: np.ndarray = dist.probs.numpy()
        return proba


@estimator
class Regressor(RegressorMixin, Estimator):
    """Template of the regressors. Targets are standardised inside and given back in their unit."""

    y_mean_: np.ndarray = field(init=False)
    y_scale_: np.ndarray = field(init=False)
    y_is_1d_: bool = field(init=False)

    def _likelihood(self) -> Likelihood:
        return NormalLikelihood(len(self.y_mean_))

    def _width_reason(self) -> str:
        return f"one for each of the {len(self.y_mean_)} targets"

    def _check_targets(self, y: np.ndarray) -> np.ndarray:
        self.y_is_1d_ = y.ndim == 1
        return self._as_real(y).reshape(len(y), -1)

    def _as_real(self, y: Any) -> np.ndarray:
        y = np.asarray(y)
        y = y.astype(object) if y.dtype.kind == "U" else y  # an error then quotes plain text
        try:
            real = np.asarray(y, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{type(self).__name__}: y must hold numbers: {error}; use a classifier for labels."
            ) from error
        if not np.isfinite(real).all():
            raise DataError(f"{type(self).__name__}: y contains NaN or infinity.")
        if real.size and np.abs(real).max() > 1e150:  # squares overflow
            raise DataError(f"{type(self).__name__}: y holds values above 1e150; rescale it.")
        return real

    def _learn_target_scale(self, y: np.ndarray, weight: np.ndarray | None) -> None:
        scaler = StandardScaler().fit(y, sample_weight=weight)
        self.y_mean_, self.y_scale_ = scaler.mean_, scaler.scale_

    def _scale_targets(self, y: np.ndarray) -> np.ndarray:
        return (y - self.y_mean_) / self.y_scale_

    def _encode_targets(self, y: np.ndarray) -> np.ndarray:
        return self._scale_targets(self._as_real(y).reshape(len(y), -1))

    def _user_scale(self, dist: NormalMixture | Parametric) -> Predictive:
        dist = dist.affine(torch.as_tensor(self.y_mean_), torch.as_tensor(self.y_scale_))
        return dist.output(0) if self.y_is_1d_ else dist

    def _function_scale(self, values: np.ndarray) -> np.ndarray:
        values = values * self.y_scale_ + self.y_mean_
        return values[..., 0] if self.y_is_1d_ else values

    def _log_prob(self, dist: RealPredictive, y: Any) -> Tensor:
        y = torch.tensor(self._as_real(y))
        if y.shape != dist.batch_shape:
            raise DataError(
                f"{type(self).__name__}: y has shape {tuple(y.shape)}, but the predictions have "
                f"shape {tuple(dist.batch_shape)}."
            )
        return dist.joint().log_prob(y)

    def predict(self, X: Any) -> np.ndarray:
        """Predict the mean, shape (n,) or (n, m), in target units."""
        return self.predict_distribution(X).mean.numpy()

    def predict_interval(self, X: Any, coverage: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Predict equal-tailed intervals: lower and upper ends, each (n,) or (n, m)."""
        dist = self.predict_distribution(X)
        assert isinstance(dist, RealPredictive)
        lower, upper = dist.interval(coverage)
        return lower.numpy(), upper.numpy()

    def predict_quantiles(self, X: Any, q: Any) -> np.ndarray:
        """Predict quantiles at levels ``q``: (n[, m]) for one level, (Q, n[, m]) for several."""
        dist = self.predict_distribution(X)
        assert isinstance(dist, RealPredictive)
        return dist.quantile(q).numpy()

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that several targets are fine."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


@estimator
class NetworkRegressor(Regressor):
    """Template of the regressors whose network gives the noise, too."""

    noise: Noise = "homoscedastic"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "noise", ("homoscedastic", "heteroscedastic"))

    def _likelihood(self) -> Likelihood:
        return NormalLikelihood(len(self.y_mean_), self.noise)

    def _width_reason(self) -> str:
        two = ", twice for heteroscedastic noise" if self.noise == "heteroscedastic" else ""
        return super()._width_reason() + two

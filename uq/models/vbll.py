"""VBLL: a network with a variational Bayesian last layer, one forward pass to predict.

The heads and their equations are in :mod:`uq.nn.vbll` and :mod:`uq.nn.vbll_classification`. The
body is trained together with the head by −ELBO/N; AdamW's weight decay regularises the body, the
head's own prior is in the ELBO. With ``features="frozen"`` the body stays as it is and the head is
found in closed form, where it has one. With ``features="bayesian"`` IVON learns a Normal posterior
q(θ) over the body's weights, too: each step takes one sample of θ, at which the last layer is
integrated out analytically,

    −ELBO/N = E_q(θ)[loss of the head at φ_θ] + KL(q(θ) ‖ p(θ))/N.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_consistent_length
from torch import Tensor

from uq.errors import DataError, ParameterError
from uq.inference.ivon import IVON
from uq.inference.posterior import BayesianFeaturesPosterior, LastLayerPosterior
from uq.inference.training import TrainingResult, cosine_schedule
from uq.inference.vbll import sum_features
from uq.models.base import Estimator, as_numpy, estimator
from uq.models.checks import check_choice, check_number
from uq.models.documentation import documented
from uq.models.ivon import IVONClassifier, posterior_optimizer, warn_of_noise
from uq.models.objectives import Objective, TrainingData
from uq.models.tasks import Classifier, Regressor
from uq.nn.network import probe_outputs
from uq.nn.vbll import (
    BayesianLastLayer,
    VBLLHeteroscedasticRegression,
    VBLLRegression,
    VBLLStudentTRegression,
)
from uq.nn.vbll_classification import (
    BOUNDS,
    VBLLClassification,
    VBLLGenerativeClassification,
    VBLLHeteroscedasticClassification,
)
from uq.nn.vbll_weights import COVARIANCES

# The authors call clipping the gradient's norm at 1 strongly recommended.
_CLIP_NORM = 1.0
_HELD_OUT_DRAWS = 16


class _VBLLObjective(Objective):
    """−ELBO/N of the head on the body's features."""

    def __init__(self, posterior: LastLayerPosterior, n_effective: float, *, frozen: bool) -> None:
        super().__init__()
        # Frozen features come without gradients, in eval mode.
        self.features = posterior.features if frozen else posterior.body
        self.head = posterior.head
        self.n_effective = n_effective
        self.seed = int(posterior.seed)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Expected negative log likelihood of the batch, plus KL and noise prior over N."""
        return self.head.loss(self.features(x), y, self.n_effective, weight)

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log predictive density of each row (the training loss is only a bound)."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        dist: Any = self.head.predictive(self.features(x), _HELD_OUT_DRAWS, generator)
        if y.ndim == 2:
            dist = dist.joint()
        return -dist.log_prob(y)


class _BodyAndHead(torch.optim.Optimizer):
    """IVON on the body and another optimizer on the head, stepped at the same weight sample."""

    def __init__(self, body: IVON, head: torch.optim.Optimizer) -> None:
        # Not super().__init__: the groups are those of the two, so that a schedule reaches both.
        self.body, self.head = body, head

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [*self.body.param_groups, *self.head.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.body.zero_grad(set_to_none)
        self.head.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        loss = self.body.step(closure)
        self.head.step()
        return loss


@estimator
class _VBLL(Estimator):
    prior_scale: float = 1.0
    wishart_scale: float = 0.1
    covariance: str = "dense"
    rank: int = 3
    features: Literal["trained", "frozen", "bayesian"] = "trained"
    weight_decay: float = 1e-4
    n_samples: int = 64
    patience: int | Literal["auto"] | None = "auto"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "prior_scale", above=0)
        check_number(self, "wishart_scale", above=0)
        check_choice(self, "covariance", COVARIANCES)
        check_number(self, "rank", at_least=1, integer=True)
        check_choice(self, "features", ("trained", "frozen", "bayesian"))
        check_number(self, "weight_decay", at_least=0)
        check_number(self, "n_samples", at_least=1, integer=True)
        if self.features == "frozen" and self.module is None:
            raise ParameterError(
                f"{type(self).__name__}: features='frozen' needs module=, a trained network that "
                "maps inputs to features."
            )

    @property
    @abstractmethod
    def _conjugate(self) -> bool:
        """Whether the last layer has a closed form given the features."""

    @abstractmethod
    def _head(self, n_features: int) -> BayesianLastLayer:
        """Head on ``n_features`` features of size 1, for the targets that were fitted."""

    def _build_posterior(self, seed: int = 0) -> LastLayerPosterior:
        body = self._body(None)
        n_features = probe_outputs(body, self._example()).shape[1]
        head = self._head(n_features).to(self._dtype)
        if self.features == "bayesian":
            return BayesianFeaturesPosterior(body, head, {}, seed)
        return LastLayerPosterior(body, head, seed)

    @property
    def _trains_in_processes(self) -> bool:
        return self.features == "trained"

    def _infer(self, data: TrainingData) -> tuple[LastLayerPosterior, TrainingResult]:
        posterior = self._build_posterior(data.seeds.predict).to(data.fabric.device)
        frozen = self.features == "frozen"
        if frozen and self._conjugate:
            self._solve(posterior, data)
            return posterior, TrainingResult(stop_reason="closed_form", best_epoch=1)
        self._start(posterior, data)
        objective = _VBLLObjective(posterior, data.n_effective, frozen=frozen)
        if self.features == "bayesian":
            if not any(p.requires_grad for p in posterior.body.parameters()):
                raise ParameterError(
                    f"{type(self).__name__}: features='bayesian' needs a body with weights to "
                    "learn, but this one has none; use features='trained', or 'frozen' with a "
                    "module whose weights are to stay."
                )
            warn_of_noise(type(self).__name__, posterior.body)
            return self._infer_both(posterior, objective, data)
        groups: list[dict[str, Any]] = [{"params": list(posterior.head.parameters())}]
        body = [p for p in posterior.body.parameters() if p.requires_grad and not frozen]
        if body:
            groups.append({"params": body, "weight_decay": self.weight_decay})
        optimizer = torch.optim.AdamW(groups, self.lr, weight_decay=0.0, fused=True)
        n_steps = self._n_epochs(data) * len(data.batches)
        result = self._train(
            objective,
            optimizer,
            data,
            schedule=cosine_schedule(n_steps),
            clip_norm=_CLIP_NORM,
        )
        return posterior, result

    def _infer_both(
        self, posterior: LastLayerPosterior, objective: Objective, data: TrainingData
    ) -> tuple[LastLayerPosterior, TrainingResult]:
        """Learn a posterior over the body's weights, too."""
        n_steps = self._n_epochs(data) * len(data.batches)
        body = posterior_optimizer(
            posterior.body.parameters(),
            n_effective=data.n_effective,
            n_steps=n_steps,
            generator=data.generator(data.seeds.noise),
            lr=IVONClassifier.lr,
            prior_scale=IVONClassifier.prior_scale,
            init_std=IVONClassifier.init_std,
        )
        head = torch.optim.AdamW(posterior.head.parameters(), self.lr, weight_decay=0.0, fused=True)
        # The gradient is not clipped: a clipped one would bias the curvature.
        result = self._train(
            objective,
            _BodyAndHead(body, head),
            data,
            schedule=cosine_schedule(n_steps),
            extra_state=body.curvature,
        )
        (diagnosis,) = body.diagnostics(warn=False)
        if diagnosis.noise_share > 0.5:  # the curvature ran away; as in IVON's own estimators
            body.diagnostics()
        stds = body.posterior_std()
        named = {name: stds[p] for name, p in posterior.body.named_parameters() if p in stds}
        seed = data.seeds.predict
        return BayesianFeaturesPosterior(posterior.body, posterior.head, named, seed), result

    def _start(self, posterior: LastLayerPosterior, data: TrainingData) -> None:
        """Set what training starts from, where that depends on the data; nothing by default."""

    def _solve(self, posterior: LastLayerPosterior, data: TrainingData) -> None:
        """Set the head to its exact posterior given the features of all rows."""
        statistics: Any = posterior.head.statistics()
        sum_features(posterior, data.batches, statistics)
        # Weights have mean 1 over the rows to train on. Nothing is stopped early here, so that the
        # rows held out for it count, too.
        factor = data.n_effective / statistics.n_rows
        if data.held_out is not None:
            sum_features(posterior, [data.held_out], statistics)
        statistics.scale(factor)
        self._fit_prior(posterior.head, statistics)
        posterior.head.fit_statistics(statistics)

    @abstractmethod
    def _fit_prior(self, head: Any, statistics: Any) -> None:
        """Scale the prior, which is for features of size 1, to the size of the features."""

    def _condition(self, X: Any, y: Any, sample_weight: ArrayLike | None) -> Self:
        """Condition the last layer on more rows."""
        x, _ = self._posterior_at(X)
        y = as_numpy(y)
        check_consistent_length(x, y, sample_weight)
        weight = None
        if sample_weight is not None:
            weight = torch.as_tensor(np.array(sample_weight, dtype=np.float64), device=x.device)
            if not bool((weight >= 0).all() and weight.isfinite().all()):
                raise DataError(
                    f"{type(self).__name__}.partial_fit: sample_weight must be >= 0 and finite."
                )
        posterior: Any = self.posterior_
        target = torch.as_tensor(self._encode_targets(y), device=x.device)
        posterior.head.update(posterior.features(x), target, weight)
        posterior.seed += 1  # so that functions drawn before and after are independent draws
        return self


def _has_partial_fit(model: _VBLL) -> bool:
    exact = model._conjugate and model.features != "bayesian"
    return exact and model.covariance in ("dense", "dense_precision")


_PARAMETERS = """\
prior_scale : float, default=1.0
        Variance of the prior on the last layer's weights, times the number of features{times}.
    wishart_scale : float, default={wishart}
        Scale V of the inverse-Wishart prior on the noise variance{wishart_note}.
    covariance : {{"dense", "dense_precision", "diagonal", "lowrank"}}, default="dense"
        Covariance of q(w) for each output; the dense ones cost (features)² numbers per output.
    rank : int, default=3
        Rank of the "lowrank" covariance.
    features : {{"trained", "frozen", "bayesian"}}, default="trained"
        "frozen" keeps the weights of ``module`` and finds the last layer alone: {closed}
        In closed form, the prior is scaled to the size of the features, E‖φ‖²; gradient steps take
        features of size about 1. "bayesian" learns a posterior over the body's weights, too, by
        IVON with its own prior and rate ({only}): a
        prediction is then the mixture over ``n_samples`` draws of the body, at a forward pass each.
        The widths of that posterior take the whole run to learn: after an early stop they are near
        the initial 0.02, so set ``patience=None``.
    weight_decay : float, default=1e-4
        Decoupled (AdamW) weight decay of a "trained" body; the head's prior is part of its loss."""


@documented(
    lr="3e-3",
    patience='"auto"',
    outputs="features (n, D)",
    own=_PARAMETERS.format(
        wishart="1.0",
        times=", halved",
        wishart_note="s (for the generative head: of each feature)",
        closed='in one\n        pass for ``head="generative"``, by gradient steps for the others.',
        only='not for ``head="generative"``',
    ),
)
@estimator
class VBLLClassifier(_VBLL, Classifier):
    """Classify by a network with a Bayesian last layer.

    Parameters
    ----------
    {shared}
    {own}
    head : {"discriminative", "heteroscedastic", "generative"}, default="discriminative"
        Gaussian logits with one noise level a class; with a noise level that depends on the input;
        or a Gaussian over the features of each class, with a Dirichlet prior on class frequencies.
        ``covariance`` and ``rank`` do not apply to the last, whose exact posterior is diagonal.
    bound : {"jensen", "knowles_minka"}, default="jensen"
        Training bound of the discriminative head: the paper's, or a tighter one.
    n_samples : int, default=64
        Draws of the last layer that a prediction averages over; the body runs once, or for each
        draw if it is "bayesian". The generative head predicts in closed form.
    {tail}

    Attributes
    ----------
    {fitted}
    classes_ : ndarray of shape (n_classes,)
        Labels.

    Notes
    -----
    Training maximises a bound, whose value is not a log likelihood; early stopping and reports use
    the predictive. Logit noise is averaged inside each draw, so ``epistemic`` is the mutual
    information with the last layer's weights alone. The generative head's predictive is one draw
    without ``epistemic``; see :meth:`feature_log_density`.

    ``stop_reason_`` is "closed_form" where no gradient step was taken.

    References
    ----------
    J. Harrison, J. Willes, J. Snoek, "Variational Bayesian Last Layers", ICLR 2024,
    arXiv 2404.11599: Theorem 2; eqs. 3 (model), 14 (bound), 16 (objective) and 19 (predictive) are
    the discriminative head's.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from uq import VBLLClassifier
    >>> X, y = load_wine(return_X_y=True)
    >>> model = VBLLClassifier(max_epochs=30, random_state=0).fit(X, y)
    >>> model.predict_distribution(X[:2]).epistemic.shape
    torch.Size([2])
    """

    wishart_scale: float = 1.0
    head: Literal["discriminative", "heteroscedastic", "generative"] = "discriminative"
    bound: Literal["jensen", "knowles_minka"] = "jensen"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "head", ("discriminative", "heteroscedastic", "generative"))
        check_choice(self, "bound", BOUNDS)
        if self.features == "bayesian" and self.head == "generative":
            raise ParameterError(
                f"{type(self).__name__}: features='bayesian' needs head='discriminative' or "
                "'heteroscedastic': the generative head is fitted to fixed features."
            )

    @property
    def _conjugate(self) -> bool:
        return self.head == "generative"

    def _head(self, n_features: int) -> BayesianLastLayer:
        k = len(self.classes_)
        if self.head == "generative":
            return VBLLGenerativeClassification(
                n_features, k, prior_variance=self.prior_scale, wishart_scale=self.wishart_scale
            )
        s = 2 * self.prior_scale / (n_features + 1)
        shared: Any = {"covariance": self.covariance, "rank": self.rank, "prior_variance": s}
        if self.head == "heteroscedastic":
            return VBLLHeteroscedasticClassification(n_features, k, **shared)
        return VBLLClassification(
            n_features, k, wishart_scale=self.wishart_scale, bound=self.bound, **shared
        )

    def _start(self, posterior: LastLayerPosterior, data: TrainingData) -> None:
        """Start the generative head at the classes of the initial features."""
        if self.head == "generative":
            statistics: Any = posterior.head.statistics()
            sum_features(posterior, data.batches, statistics)
            statistics.scale(data.n_effective / statistics.n_rows)
            posterior.head.fit_statistics(statistics)

    def _fit_prior(self, head: VBLLGenerativeClassification, statistics: Any) -> None:
        size = float(statistics.squares.mean()) / statistics.n_rows
        if size > 0:
            head.prior_variance *= size
            head.wishart_scale *= size

    @available_if(lambda self: self.head == "generative")
    def partial_fit(
        self,
        X: Any,
        y: Any,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Add rows to a fitted generative head; the body stays as it is.

        Parameters
        ----------
        X : array-like of shape (n, d)
            Inputs of the new rows.
        y : array-like of shape (n,)
            Their labels; not every class needs to be there.
        classes : array-like, optional
            All labels, for the first call, whose rows must hold each of them: it is a :meth:`fit`.
        sample_weight : array-like of shape (n,), optional
            How many times each row counts.

        Returns
        -------
        self

        Raises
        ------
        DataError
            If a label is new, or the first call lacks one of ``classes``.
        """
        if not hasattr(self, "posterior_"):
            missing = np.setdiff1d(y if classes is None else classes, y)
            if len(missing):
                raise DataError(
                    f"{type(self).__name__}.partial_fit: the first call trains the network and "
                    f"needs rows of each class, but y lacks {missing.tolist()[0]!r}; later calls "
                    "may lack classes."
                )
            return self.fit(X, y, sample_weight)
        return self._condition(X, y, sample_weight)

    @available_if(lambda self: self.head == "generative")
    def feature_log_density(self, X: Any) -> np.ndarray:
        """Log density of each row's features under the classes, in nats, shape (n,).

        Low values are unlike the rows that were fitted: an out-of-distribution score.
        """
        x, _ = self._posterior_at(X)
        posterior: Any = self.posterior_
        with torch.no_grad():
            density = posterior.head.feature_log_density(posterior.features(x))
        values: np.ndarray = density.double().cpu().numpy()
        return values


@documented(
    lr="3e-3",
    patience='"auto"',
    outputs="features (n, D)",
    own=_PARAMETERS.format(
        wishart="0.1",
        times="",
        wishart_note='; Gamma(1, V/2)\n        on the noise precision for noise="student_t"',
        closed="in closed\n        form in one pass, by gradient steps for heteroscedastic noise.",
        only='not for ``noise="student_t"``',
    ),
)
@estimator
class VBLLRegressor(_VBLL, Regressor):
    """Predict a Normal in closed form by a network with a Bayesian last layer.

    Parameters
    ----------
    {shared}
    {own}
    noise : {"homoscedastic", "student_t", "heteroscedastic"}, default="homoscedastic"
        One most probable noise level per target; one that is integrated out, for Student-t
        predictions (matters with few rows); or one that depends on the input.
    n_samples : int, default=64
        Draws of the noise that heteroscedastic predictions mix, or of a "bayesian" body; the other
        predictions are in closed form.
    {tail}

    Attributes
    ----------
    {fitted}

    Notes
    -----
    The predictive is N(mᵀφ, σ² + φᵀSφ) (one pass, no sampling): ``aleatoric`` is σ² and
    ``epistemic`` is φᵀSφ.

    ``stop_reason_`` is "closed_form" where no gradient step was taken.

    References
    ----------
    J. Harrison, J. Willes, J. Snoek, "Variational Bayesian Last Layers", ICLR 2024,
    arXiv 2404.11599.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import VBLLRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = VBLLRegressor(max_epochs=30, random_state=0).fit(X[:400], y[:400])
    >>> dist = model.predict_distribution(X[:3])
    >>> dist.n_draws, bool((dist.epistemic > 0).all())
    (1, True)
    >>> model.partial_fit(X[400:], y[400:]).sample_functions(X[:3], n=5).shape
    (5, 3)
    """

    noise: Literal["homoscedastic", "student_t", "heteroscedastic"] = "homoscedastic"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "noise", ("homoscedastic", "student_t", "heteroscedastic"))
        if self.features == "bayesian" and self.noise == "student_t":
            raise ParameterError(
                f"{type(self).__name__}: features='bayesian' needs noise='homoscedastic' or "
                "'heteroscedastic': its predictive is a mixture of Normals."
            )
        if self.features == "frozen" and self._conjugate and self.covariance == "lowrank":
            raise ParameterError(
                f"{type(self).__name__}: covariance='lowrank' has no closed form for "
                "features='frozen'; use 'dense', 'dense_precision' or 'diagonal'."
            )

    @property
    def _conjugate(self) -> bool:
        return self.noise != "heteroscedastic"

    def _head(self, n_features: int) -> BayesianLastLayer:
        m, s = len(self.y_mean_), self.prior_scale / (n_features + 1)
        shared: Any = {"covariance": self.covariance, "rank": self.rank}
        if self.noise == "heteroscedastic":
            return VBLLHeteroscedasticRegression(n_features, m, prior_variance=s, **shared)
        if self.noise == "student_t":
            # In units of the noise variance, which starts at ¼.
            return VBLLStudentTRegression(
                n_features, m, prior_variance=4 * s, noise_rate=self.wishart_scale / 2, **shared
            )
        return VBLLRegression(
            n_features, m, prior_variance=s, wishart_scale=self.wishart_scale, **shared
        )

    def _fit_prior(self, head: BayesianLastLayer, statistics: Any) -> None:
        size = float(statistics.gram.trace()) / statistics.n_rows  # E‖φ‖², the constant included
        head.prior_variance *= (head.n_features + 1) / size

    @available_if(_has_partial_fit)
    def partial_fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Condition the last layer on more rows; the body and the noise level stay as they are.

        The result is the posterior of all rows given the features, in any order and any split, at
        O(D³) a call whatever the number of rows before. The noise of ``noise="student_t"`` is
        updated, too. The first call is a :meth:`fit`.

        Parameters
        ----------
        X : array-like of shape (n, d)
            Inputs of the new rows.
        y : array-like of shape (n,) or (n, m)
            Their targets, in the unit of the targets that were fitted.
        sample_weight : array-like of shape (n,), optional
            How many times each row counts.

        Returns
        -------
        self
        """
        if not hasattr(self, "posterior_"):
            return self.fit(X, y, sample_weight)
        shape = np.shape(y)[1:]
        expected = () if self.y_is_1d_ else (len(self.y_mean_),)
        if shape != expected:
            raise DataError(
                f"{type(self).__name__}.partial_fit: y has rows of shape {shape}, but was fitted "
                f"on rows of shape {expected}."
            )
        return self._condition(X, y, sample_weight)

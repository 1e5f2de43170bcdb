"""VBLL: a network with a variational Bayesian last layer, one forward pass to predict.

The heads and their equations are in :mod:`uq.nn.vbll`. The body is trained together with the head
by −ELBO/N; AdamW's weight decay regularises the body, the head's own prior is in the ELBO.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from uq.inference.posterior import LastLayerPosterior
from uq.inference.training import TrainingResult, cosine_schedule
from uq.models.base import (
    Classifier,
    Estimator,
    Objective,
    Regressor,
    TrainingData,
    estimator,
    weighted_mean,
)
from uq.models.checks import check_choice, check_number
from uq.models.documentation import documented
from uq.nn.network import probe_outputs
from uq.nn.vbll import COVARIANCES, BayesianLastLayer, CategoricalLastLayer, NormalLastLayer

# The authors call clipping the gradient's norm at 1 strongly recommended.
_CLIP_NORM = 1.0
_HELD_OUT_DRAWS = 16


class _VBLLObjective(Objective):
    """−ELBO/N of the head on the body's features."""

    def __init__(self, posterior: LastLayerPosterior, n_effective: float) -> None:
        super().__init__()
        self.body = posterior.body
        self.head = posterior.head
        self.n_effective = n_effective
        self.seed = int(posterior.seed)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Expected negative log likelihood of the batch, plus KL and noise prior over N."""
        rows = self.head.expected_nll(self.body(x), y)
        return weighted_mean(rows, weight) + self.head.regularizer() / self.n_effective

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log predictive density of each row (the training loss is only a bound)."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        dist: Any = self.head.predictive(self.body(x), _HELD_OUT_DRAWS, generator)
        if isinstance(self.head, NormalLastLayer):
            dist = dist.joint()
        return -dist.log_prob(y)


@estimator
class _VBLL(Estimator):
    prior_scale: float = 1.0
    wishart_scale: float = 0.1
    covariance: str = "dense"
    rank: int = 3
    weight_decay: float = 1e-4
    patience: int | Literal["auto"] | None = "auto"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "prior_scale", above=0)
        check_number(self, "wishart_scale", above=0)
        check_choice(self, "covariance", COVARIANCES)
        check_number(self, "rank", at_least=1, integer=True)
        check_number(self, "weight_decay", at_least=0)

    @abstractmethod
    def _head(self, n_features: int) -> BayesianLastLayer:
        """Head on ``n_features`` features, for the targets that were fitted."""

    def _build_posterior(self, seed: int = 0) -> LastLayerPosterior:
        body = self._body(None)
        n_features = probe_outputs(body, self._example()).shape[1]
        return LastLayerPosterior(body, self._head(n_features).to(self._dtype), seed)

    def _infer(self, data: TrainingData) -> tuple[LastLayerPosterior, TrainingResult]:
        posterior = self._build_posterior(data.seeds.predict).to(data.fabric.device)
        objective = _VBLLObjective(posterior, data.n_effective)
        groups: list[dict[str, Any]] = [{"params": list(posterior.head.parameters())}]
        if body := [p for p in posterior.body.parameters() if p.requires_grad]:
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


_PARAMETERS = """\
prior_scale : float, default=1.0
        Variance of the prior on the last layer's weights, times the number of features{times}.
    wishart_scale : float, default={wishart}
        Scale V of the inverse-Wishart prior on the noise variance.
    covariance : {{"dense", "diagonal", "lowrank"}}, default="dense"
        Covariance of q(w) for each output; dense costs (features)² numbers per output.
    rank : int, default=3
        Rank of the "lowrank" covariance.
    weight_decay : float, default=1e-4
        Decoupled (AdamW) weight decay of the body; the head's prior is part of its loss."""


@documented(
    lr="3e-3",
    patience='"auto"',
    outputs="features (n, D)",
    own=_PARAMETERS.format(wishart="1.0", times=", halved"),
)
@estimator
class VBLLClassifier(_VBLL, Classifier):
    """Classify by a network with a Bayesian last layer (discriminative VBLL).

    Parameters
    ----------
    {shared}
    {own}
    n_samples : int, default=64
        Draws of the last layer that a prediction averages over; the body runs once.
    {tail}

    Attributes
    ----------
    {fitted}
    classes_ : ndarray of shape (n_classes,)
        Labels.

    Notes
    -----
    Training maximises Jensen's bound (Theorem 2), whose value is not a log likelihood; early
    stopping and reports use the predictive. Logit noise is averaged inside each draw, so
    ``epistemic`` is the mutual information with the last layer's weights alone.

    References
    ----------
    J. Harrison, J. Willes, J. Snoek, "Variational Bayesian Last Layers", ICLR 2024,
    arXiv 2404.11599.

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
    n_samples: int = 64

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "n_samples", at_least=1, integer=True)

    def _head(self, n_features: int) -> CategoricalLastLayer:
        return CategoricalLastLayer(
            n_features,
            len(self.classes_),
            covariance=self.covariance,
            rank=self.rank,
            prior_variance=2 * self.prior_scale / (n_features + 1),
            wishart_scale=self.wishart_scale,
            noise_scale=0.5,
        )


@documented(
    lr="3e-3",
    patience='"auto"',
    outputs="features (n, D)",
    own=_PARAMETERS.format(wishart="0.1", times=""),
)
@estimator
class VBLLRegressor(_VBLL, Regressor):
    """Predict a Normal in closed form by a network with a Bayesian last layer.

    Parameters
    ----------
    {shared}
    {own}
    {tail}

    Attributes
    ----------
    {fitted}

    Notes
    -----
    The predictive is N(mᵀφ, σ² + φᵀSφ) (one pass, no sampling): ``aleatoric`` is σ² and
    ``epistemic`` is φᵀSφ. The noise level is the same at all inputs.

    References
    ----------
    J. Harrison, J. Willes, J. Snoek, "Variational Bayesian Last Layers", ICLR 2024,
    arXiv 2404.11599.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import VBLLRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = VBLLRegressor(max_epochs=30, random_state=0).fit(X, y)
    >>> dist = model.predict_distribution(X[:3])
    >>> dist.n_draws, bool((dist.epistemic > 0).all())
    (1, True)
    """

    def _head(self, n_features: int) -> NormalLastLayer:
        return NormalLastLayer(
            n_features,
            len(self.y_mean_),
            covariance=self.covariance,
            rank=self.rank,
            prior_variance=self.prior_scale / (n_features + 1),
            wishart_scale=self.wishart_scale,
            noise_scale=0.5,
        )

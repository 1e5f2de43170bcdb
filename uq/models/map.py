"""MAP: one network at the maximum of the posterior density, the deterministic baseline.

    θ_MAP = argmin  −(1/N) Σ_i log p(y_i | x_i, θ) + ‖θ‖² / (2 N s²),    prior θ ~ N(0, s² I)

found by Adam, whose coupled weight decay 1/(N s²) is the exact gradient of the prior term.
"""

from __future__ import annotations

from typing import Literal

import torch

from uq.inference.posterior import DrawsPosterior
from uq.inference.training import TrainingResult, cosine_schedule
from uq.models.base import Estimator, estimator
from uq.models.checks import check_number
from uq.models.documentation import documented
from uq.models.objectives import NetworkObjective, TrainingData
from uq.models.tasks import Classifier, NetworkRegressor
from uq.nn.network import Network
from uq.nn.priors import NormalPrior


@estimator
class PointEstimator(Estimator):
    """Parameters and training of one MAP network, shared with the ensemble."""

    prior_scale: float = 1.0
    patience: int | Literal["auto"] | None = "auto"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "prior_scale", above=0)

    def _fit_network(self, network: Network, data: TrainingData) -> TrainingResult:
        """Train one network in place."""
        network.to(data.fabric.device)
        decay = NormalPrior(self.prior_scale).precision / data.n_effective
        optimizer = torch.optim.Adam(network.parameters(), self.lr, weight_decay=decay, fused=True)
        n_steps = self._n_epochs(data) * len(data.batches)
        objective = NetworkObjective(network)
        return self._train(objective, optimizer, data, schedule=cosine_schedule(n_steps))


@estimator
class _MAP(PointEstimator):
    @property
    def _trains_in_processes(self) -> bool:
        return True

    def _infer(self, data: TrainingData) -> tuple[DrawsPosterior, TrainingResult]:
        network = self._network()
        result = self._fit_network(network, data)
        return DrawsPosterior.stack([network], data.seeds.predict), result

    def _build_posterior(self) -> DrawsPosterior:
        return DrawsPosterior.stack([self._network()])


@documented(lr="3e-3", patience='"auto"')
@estimator
class MAPClassifier(_MAP, Classifier):
    """Classify by one network at the posterior mode; aleatoric uncertainty only.

    Parameters
    ----------
    {shared}
    prior_scale : float, default=1.0
        Standard deviation of the Gaussian prior on every weight; smaller regularises more.
    {tail}

    Attributes
    ----------
    {fitted}
    classes_ : ndarray of shape (n_classes,)
        Labels.

    See Also
    --------
    sklearn.neural_network.MLPClassifier : similar, without a predictive distribution.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from uq import MAPClassifier
    >>> X, y = load_wine(return_X_y=True)
    >>> model = MAPClassifier(max_epochs=30, random_state=0).fit(X, y)
    >>> model.predict_distribution(X[:2]).probs.shape
    torch.Size([2, 3])
    """


@documented(lr="3e-3", patience='"auto"')
@estimator
class MAPRegressor(_MAP, NetworkRegressor):
    """Predict a Normal by one network at the posterior mode; aleatoric uncertainty only.

    Parameters
    ----------
    {shared}
    prior_scale : float, default=1.0
        Standard deviation of the Gaussian prior on every weight; smaller regularises more.
    {noise}
    {tail}

    Attributes
    ----------
    {fitted}

    See Also
    --------
    sklearn.neural_network.MLPRegressor : similar, without a predictive distribution.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import MAPRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = MAPRegressor(max_epochs=30, random_state=0).fit(X, y)
    >>> model.predict_distribution(X[:2]).stddev.shape
    torch.Size([2])
    """

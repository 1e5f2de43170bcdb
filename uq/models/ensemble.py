"""Deep ensemble: MAP networks from different initialisations, mixed with equal weight.

B. Lakshminarayanan, A. Pritzel, C. Blundell, "Simple and Scalable Predictive Uncertainty Estimation
using Deep Ensembles", NeurIPS 2017, arXiv 1612.01474. Members see all the rows, in different order.
A ``module`` that is given as an instance is re-initialised for each member. ``history_`` and
``stop_reason_`` are those of the last member.
"""

from __future__ import annotations

from dataclasses import field

import torch
from torch import nn

from uq.errors import ParameterError
from uq.inference.posterior import DrawsPosterior
from uq.inference.training import TrainingResult, isolated_rng, warn_interrupted
from uq.models.base import (
    Classifier,
    Estimator,
    NetworkRegressor,
    TrainingData,
    estimator,
)
from uq.models.checks import check_number
from uq.models.documentation import documented
from uq.models.map import PointEstimator
from uq.nn.network import Network


def initial_networks(model: Estimator, n: int, data: TrainingData) -> list[Network]:
    """Make n networks of an estimator with initial weights of their own."""
    networks = []
    for member in range(n):
        with isolated_rng(data.seeds.init + member, data.fabric.device):
            network = model._network()
            if isinstance(model.module, nn.Module):  # copies of one network start as one
                for part in network.body.modules():
                    if callable(reset := getattr(part, "reset_parameters", None)):
                        reset()
        networks.append(network)
    first, second = ([*network.body.parameters()] for network in networks[:2])
    if first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise ParameterError(
            f"{type(model).__name__}: module gives every member the same initial weights; pass "
            "a function f(d_in, d_out) that makes a new network at each call."
        )
    return networks


@estimator
class _Ensemble(PointEstimator):
    n_members: int = 5

    n_members_: int = field(init=False)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "n_members", at_least=2, integer=True)

    @property
    def _trains_in_processes(self) -> bool:
        return True

    def _infer(self, data: TrainingData) -> tuple[DrawsPosterior, TrainingResult]:
        networks: list[Network] = []
        for network in initial_networks(self, self.n_members, data):
            try:
                result = self._fit_network(network, data)
            except KeyboardInterrupt:
                if not networks:
                    raise
                result.stop_reason = "interrupted"  # of the member before
                warn_interrupted(type(self).__name__, f"the first {len(networks)} members are kept")
                break
            if result.best_epoch > 0:
                networks.append(network)
            if result.error is not None or result.stop_reason == "interrupted":
                break
        if not networks:
            raise result.error or KeyboardInterrupt
        result.best_epoch = max(result.best_epoch, 1)  # there are members to keep
        self.n_members_ = len(networks)
        return DrawsPosterior.stack(networks, data.seeds.predict), result

    def _build_posterior(self) -> DrawsPosterior:
        return DrawsPosterior.stack([self._network() for _ in range(self.n_members_)])


@documented(lr="3e-3", patience='"auto"')
@estimator
class EnsembleClassifier(_Ensemble, Classifier):
    """Classify by the mean probabilities of several networks.

    Parameters
    ----------
    {shared}
    prior_scale : float, default=1.0
        Standard deviation of the Gaussian prior on every weight.
    n_members : int, default=5
        Networks trained; the paper finds little gain beyond 5.
    {tail}

    Attributes
    ----------
    {fitted}
    n_members_ : int
        Networks held: fewer than asked for after an interrupt.
    classes_ : ndarray of shape (n_classes,)
        Labels.

    References
    ----------
    B. Lakshminarayanan, A. Pritzel, C. Blundell, NeurIPS 2017, arXiv 1612.01474.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from uq import EnsembleClassifier
    >>> X, y = load_wine(return_X_y=True)
    >>> model = EnsembleClassifier(n_members=3, max_epochs=20, random_state=0).fit(X, y)
    >>> model.predict_distribution(X[:2]).n_draws
    3
    """


@documented(lr="3e-3", patience='"auto"')
@estimator
class EnsembleRegressor(_Ensemble, NetworkRegressor):
    """Predict by a mixture of the Normals of several networks.

    Parameters
    ----------
    {shared}
    prior_scale : float, default=1.0
        Standard deviation of the Gaussian prior on every weight.
    n_members : int, default=5
        Networks trained; the paper finds little gain beyond 5.
    {noise}
    {tail}

    Attributes
    ----------
    {fitted}
    n_members_ : int
        Networks held: fewer than asked for after an interrupt.

    References
    ----------
    B. Lakshminarayanan, A. Pritzel, C. Blundell, NeurIPS 2017, arXiv 1612.01474. The paper reports
    the moment-matched Normal; here the mixture itself is kept.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import EnsembleRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = EnsembleRegressor(n_members=3, max_epochs=20, random_state=0).fit(X, y)
    >>> bool((model.predict_distribution(X).epistemic > 0).all())
    True
    """

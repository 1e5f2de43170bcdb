"""Deep ensemble: MAP networks from different initialisations, mixed with equal weight.

B. Lakshminarayanan, A. Pritzel, C. Blundell, "Simple and Scalable Predictive Uncertainty Estimation
using Deep Ensembles", NeurIPS 2017, arXiv 1612.01474. Members see all the rows, in different order.
A ``module`` that is given as an instance is re-initialised for each member. ``history_`` and
``stop_reason_`` are those of the last member.
"""

from __future__ import annotations

from dataclasses import field, replace

import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from uq.errors import ParameterError
from uq.inference.data import ArrayBatches
from uq.inference.posterior import DrawsPosterior
from uq.inference.training import TrainingResult, isolated_rng, warn_interrupted
from uq.models.base import Estimator, estimator
from uq.models.checks import check_number
from uq.models.documentation import documented
from uq.models.map import PointEstimator
from uq.models.objectives import TrainingData
from uq.models.tasks import Classifier, NetworkRegressor
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
    n_jobs: int | None = None

    n_members_: int = field(init=False)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "n_members", at_least=2, integer=True)
        check_number(self, "n_jobs", integer=True, optional=True)
        if self.n_jobs == 0:
            raise ParameterError(f"{type(self).__name__}: n_jobs must not be 0; None is 1.")

    @property
    def _trains_in_processes(self) -> bool:
        return True

    def _infer(self, data: TrainingData) -> tuple[DrawsPosterior, TrainingResult]:
        starts = initial_networks(self, self.n_members, data)
        if self.n_jobs not in (None, 1):
            return self._infer_in_parallel(starts, data)
        networks: list[Network] = []
        for i, start in enumerate(starts):
            try:
                network, result = self._fit_member(i, start, data)
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

    def _fit_member(
        self, i: int, network: Network, data: TrainingData
    ) -> tuple[Network, TrainingResult]:
        """Train one network in place; what it is does not depend on the others."""
        if isinstance(data.batches, ArrayBatches):
            shuffle = data.generator(data.seeds.shuffle + i)
            data = replace(data, batches=data.batches.shuffled_by(shuffle))
        if data.checkpoints is not None:
            data.checkpoints.go_to(i)
        with isolated_rng(data.seeds.init + self.n_members + i, data.fabric.device):  # dropout
            return network, self._fit_network(network, data)

    def _fitted_weights(
        self, i: int, network: Network, data: TrainingData
    ) -> tuple[dict[str, Tensor], TrainingResult]:
        # Tensors alone: what becomes of a module on its way back is the backend's business.
        network, result = self._fit_member(i, network, data)
        return dict(network.state_dict()), result

    def _infer_in_parallel(
        self, starts: list[Network], data: TrainingData
    ) -> tuple[DrawsPosterior, TrainingResult]:
        """Train the members in several processes, on whatever backend joblib is set to."""
        if not isinstance(data.batches, ArrayBatches):
            raise ParameterError(
                f"{type(self).__name__}: n_jobs needs rows in memory, to send them to the "
                "processes; leave n_jobs at None for a DataLoader or a stream."
            )
        fit = delayed(self._fitted_weights)
        fitted = Parallel(self.n_jobs)(fit(i, net, data) for i, net in enumerate(starts))
        for network, (weights, _) in zip(starts, fitted, strict=True):
            network.to(data.fabric.device).load_state_dict(weights)
        results = [result for _, result in fitted]
        networks = [n for n, r in zip(starts, results, strict=True) if r.best_epoch > 0]
        errors = [result.error for result in results if result.error is not None]
        if not networks:
            raise errors[0]
        result = results[-1]
        result.error = errors[0] if errors else None
        result.best_epoch = max(result.best_epoch, 1)
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
    n_jobs : int, optional
        Members trained at a time, in processes of joblib (or of ``joblib.parallel_config``: Dask,
        Ray); -1 takes all cores. The result is the same. Callbacks then run in the processes.
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
    n_jobs : int, optional
        Members trained at a time, in processes of joblib (or of ``joblib.parallel_config``: Dask,
        Ray); -1 takes all cores. The result is the same. Callbacks then run in the processes.
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

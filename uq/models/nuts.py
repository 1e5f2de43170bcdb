"""NUTS: the posterior over all weights of a small network by Hamiltonian Monte Carlo, in NumPyro.

The reference that approximate methods are compared with: the model and prior of MAP, no
approximation but the finite number of draws. Each chain starts from a short Adam run of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from uq.inference.data import ArrayBatches
from uq.inference.nuts import sample_nuts
from uq.inference.posterior import DrawsPosterior
from uq.inference.training import TrainingResult
from uq.models.base import estimator
from uq.models.chains import ChainDiagnostics
from uq.models.checks import check_number
from uq.models.documentation import documented
from uq.models.ensemble import initial_networks
from uq.models.map import PointEstimator
from uq.models.objectives import TrainingData
from uq.models.tasks import Classifier, NetworkRegressor
from uq.nn.network import Network
from uq.nn.nuts import JaxNetwork

_SAMPLING = """\
prior_scale : float, default=1.0
        Standard deviation of the Gaussian prior on every weight.
    n_chains : int, default=4
        Chains, run side by side; four is what R-hat was studied with.
    n_warmup : int, default=500
        Transitions that adapt step size and mass matrix, thrown away.
    n_draws : int, default=250
        Draws of each chain. All of them predict.
    target_accept : float, default=0.8
        Acceptance probability that the step size is adapted to. Raise it where trajectories
        diverge.
    max_tree_depth : int, default=10
        A trajectory has at most 2^depth − 1 gradient steps."""

_FITTED = """\
n_chains_ : int
        Chains held.
    sample_stats_ : dict of ndarray
        Sampler statistics of each draw, ``(n_chains_, n_draws)``, by ArviZ's names: "lp",
        "acceptance_rate", "n_steps", "diverging", "energy", "step_size",
        "reached_max_treedepth". Empty where an interrupt came before the end of warm-up."""


@estimator
class _NUTS(ChainDiagnostics, PointEstimator):
    hidden: Sequence[int] = (32,)
    patience: int | Literal["auto"] | None = None
    n_chains: int = 4
    n_warmup: int = 500
    n_draws: int = 250
    target_accept: float = 0.8
    max_tree_depth: int = 10

    n_chains_: int = field(init=False)
    n_draws_: int = field(init=False)
    sample_stats_: dict[str, np.ndarray] = field(init=False)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "n_chains", at_least=1, integer=True)
        check_number(self, "n_warmup", at_least=0, integer=True)
        check_number(self, "n_draws", at_least=1, integer=True)
        check_number(self, "target_accept", above=0, below=1)
        check_number(self, "max_tree_depth", at_least=1, integer=True)

    def _n_epochs(self, data: TrainingData) -> int:
        return self.max_epochs or max(1, math.ceil(1000 / len(data.batches)))

    def _infer(self, data: TrainingData) -> tuple[DrawsPosterior, TrainingResult]:
        networks, result = self._start(data)
        self.n_chains_, self.n_draws_, self.sample_stats_ = len(networks), 1, {}
        posterior = DrawsPosterior.stack(networks, data.seeds.predict)
        if result.error is not None or result.stop_reason == "interrupted":
            return posterior, result  # what was learned; there was no time to sample
        trained = [k for k, p in networks[0].named_parameters() if p.requires_grad]
        x, y, weight = _rows(data)
        run = sample_nuts(
            networks[0],
            x,
            y,
            {k: posterior.draws[k] for k in trained},
            weight=weight,
            prior_scale=self.prior_scale,
            n_warmup=self.n_warmup,
            n_draws=self.n_draws,
            target_accept=self.target_accept,
            max_tree_depth=self.max_tree_depth,
            seed=data.seeds.noise,
            checkpoint=data.stage(),
            verbose=self.verbose,
            description=type(self).__name__,
        )
        if run.interrupted:
            result.stop_reason = "interrupted"
        if run.sample_stats:
            self.n_draws_ = run.sample_stats["lp"].shape[1]
            self.sample_stats_ = run.sample_stats
            draws = {
                k: run.draws[k].flatten(0, 1).to(t)
                if k in run.draws
                else t.repeat_interleave(self.n_draws_, 0)
                for k, t in posterior.draws.items()
            }
            posterior = DrawsPosterior(networks[0], draws, data.seeds.predict)
        return posterior, result

    def _start(self, data: TrainingData) -> tuple[list[Network], TrainingResult]:
        """Train a network for each chain to start from."""
        # Frozen weights are one set for all chains, so a network with some is not re-initialised.
        if self.n_chains == 1:
            networks = [self._network()]
        else:
            networks = initial_networks(self, self.n_chains, data)
        JaxNetwork(networks[0])  # says now, not after training, what cannot be translated
        kept: list[Network] = []
        for network in networks:
            result = self._fit_network(network, data)
            if result.best_epoch > 0:
                kept.append(network)
            if result.error is not None or result.stop_reason == "interrupted":
                break
        result.best_epoch = max(result.best_epoch, int(bool(kept)))
        return kept or networks[:1], result

    def _build_posterior(self) -> DrawsPosterior:
        network = self._network()
        n = self.n_chains_ * self.n_draws_
        draws = DrawsPosterior.stack([network]).draws
        return DrawsPosterior(
            network, {k: torch.empty(n, *t.shape[1:], dtype=t.dtype) for k, t in draws.items()}
        )


def _rows(data: TrainingData) -> tuple[Tensor, Tensor, Tensor | None]:
    """All training rows, and the factor of each one's log likelihood."""
    batches = data.batches
    parts = [batches.tensors] if isinstance(batches, ArrayBatches) else list(batches)
    x, y, *weight = (torch.cat(ts) for ts in zip(*parts, strict=True))
    # Weights come with mean 1; their sum is to be the N of the likelihood.
    return x, y, weight[0] * (data.n_effective / len(x)) if weight else None


@documented(lr="3e-3")
@estimator
class NUTSClassifier(_NUTS, Classifier):
    """Classify by draws from the exact posterior of a small network (No-U-Turn sampler).

    Parameters
    ----------
    {shared}
    {sampling}
    {tail}

    Attributes
    ----------
    {fitted}
    {sampled}
    classes_ : ndarray of shape (n_classes,)
        Labels.

    Notes
    -----
    ``max_epochs`` (by default about 1,000 steps), ``batch_size``, ``lr`` and ``patience`` are those
    of the Adam runs that the chains start from, one after another; ``history_`` is the last one's.
    Rows that ``patience`` holds out are not sampled on. The sampler itself runs in JAX, in float64,
    on the CPU; layers of a ``module`` that it cannot translate are named in the error. It compiles
    for some seconds at the first fit of an architecture and size of data.

    References
    ----------
    M. D. Hoffman, A. Gelman, JMLR 15 (2014), arXiv 1111.4246; NumPyro: D. Phan et al.,
    arXiv 1912.11554.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from uq import NUTSClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = NUTSClassifier(hidden=(), n_chains=2, n_warmup=50, n_draws=50, random_state=0)
    >>> model.fit(X, y).predict_distribution(X[:2]).n_draws
    100
    """


@documented(lr="3e-3")
@estimator
class NUTSRegressor(_NUTS, NetworkRegressor):
    """Predict by draws from the exact posterior of a small network (No-U-Turn sampler).

    Parameters
    ----------
    {shared}
    {sampling}
    {noise}
    {tail}

    Attributes
    ----------
    {fitted}
    {sampled}

    Notes
    -----
    The learned noise scale (softplus of a weight with the common prior) is sampled with the other
    weights. See :class:`NUTSClassifier` on where chains start, on ``module`` and on compiling.

    Targets with next to no noise make the posterior a thin curved sheet: steps fall to a thousandth
    of the prior's scale, trajectories are cut off at ``max_tree_depth``, and small networks have
    modes that chains do not leave, whatever the start or mass matrix. ``diagnostics`` says so. What
    helps is a narrower prior on a wider network (``prior_scale=0.3`` with 20 to 50 nodes), which is
    another model and may fit less well; where the chains merely are slow, more draws.

    References
    ----------
    M. D. Hoffman, A. Gelman, JMLR 15 (2014), arXiv 1111.4246; NumPyro: D. Phan et al.,
    arXiv 1912.11554.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import NUTSRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = NUTSRegressor(hidden=(), n_chains=2, n_warmup=50, n_draws=50, random_state=0)
    >>> model.fit(X[:100], y[:100]).predict_distribution(X[:2]).n_draws
    100
    """


for _cls in (NUTSClassifier, NUTSRegressor):
    _doc = (_cls.__doc__ or "").replace("{sampling}", _SAMPLING)
    _cls.__doc__ = _doc.replace("{sampled}", _FITTED)

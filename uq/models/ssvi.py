"""SSVI: a network whose weights are sparse and Gaussian from the first step to the last.

The layers are in :mod:`uq.nn.ssvi`, the exchange of active weights in :mod:`uq.inference.ssvi`.
Means and biases are trained by Adam at ``lr``, standard deviations at ``lr_std``: plain SGD, which
the authors use for both, moves a standard deviation of 6e-4 by less than a thousandth of itself
in a run.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from uq.distributions import Predictive
from uq.inference.posterior import NormalPosterior
from uq.inference.ssvi import (
    CRITERIA,
    GROW_GRADS,
    SSVI,
    account,
    kl_warmup,
    set_same_noise,
)
from uq.inference.ssvi_posterior import SparsePosterior
from uq.inference.training import TrainingResult, cosine_schedule
from uq.models.base import Estimator, estimator
from uq.models.checks import check_choice, check_number
from uq.models.documentation import documented
from uq.models.objectives import Objective, TrainingData, weighted_mean
from uq.models.tasks import Classifier, NetworkRegressor
from uq.nn.network import Network
from uq.nn.ssvi import ALLOCATIONS, sparse_kl, sparse_weights, sparsify
from uq.nn.ssvi_compact import compact

_MIN_STEPS_BETWEEN_UPDATES = 20
_LAST_UPDATE = 0.75  # of the run


def _steps_between_updates(n_steps: int, n_batches: int) -> int:
    """An epoch, at least 20 steps; in a short run half the steps that exchanges are made in."""
    half = int(0.5 * _LAST_UPDATE * n_steps)
    return max(1, min(max(_MIN_STEPS_BETWEEN_UPDATES, n_batches), half))


class _SSVIObjective(Objective):
    """Expected negative log likelihood at noisy weights, plus the weighted KL over N."""

    def __init__(
        self, network: Network, n_effective: float, temperature: float, beta: tuple[int, int, float]
    ) -> None:
        super().__init__()
        self.network = network
        self.n_effective = n_effective
        self.temperature = temperature
        self.steps_per_epoch, self.n_epochs, self.warmup = beta
        self.step = 0

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Negative log likelihood of the batch, plus the KL at its weight in this epoch."""
        epoch = 1 + self.step // self.steps_per_epoch
        self.step += 1
        beta = kl_warmup(epoch, self.n_epochs, self.warmup)
        kl = (self.temperature * beta / self.n_effective) * sparse_kl(self.network)
        return weighted_mean(self.network.nll(x, y), weight) + kl

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log likelihood of each row at the mean weights."""
        return self.network.nll(x, y)


@estimator
class _SSVI(Estimator):
    density: float = 0.1
    allocation: str = "uniform"
    criterion: str = "snr"
    grow_grad: str = "post"
    update_every: int | None = None
    replace: float = 0.3
    prior_scale: float = 1.0
    init_std: float = 0.1
    lr_std: float = 1e-2
    temperature: float = 0.1
    kl_warmup: float = 0.5
    n_samples: int = 32

    sparsity_: float = field(init=False)
    n_active_: int = field(init=False)
    flops_ratio_: float = field(init=False)
    size_ratio_: float = field(init=False)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "density", above=0, below=math.nextafter(1, 2))
        check_choice(self, "allocation", ALLOCATIONS)
        check_choice(self, "criterion", CRITERIA)
        check_choice(self, "grow_grad", GROW_GRADS)
        check_number(self, "update_every", at_least=1, integer=True, optional=True)
        check_number(self, "replace", at_least=0, below=1)
        check_number(self, "prior_scale", above=0, below=math.inf)
        check_number(self, "init_std", above=0, below=math.inf)
        check_number(self, "lr_std", above=0, below=math.inf)
        check_number(self, "temperature", above=0, below=math.inf)
        check_number(self, "kl_warmup", at_least=0, below=math.nextafter(1, 2))
        check_number(self, "n_samples", at_least=1, integer=True)

    def _sparse_network(self) -> Network:
        network = sparsify(
            self._network(),
            self.density,
            allocation=self.allocation,
            prior_scale=self.prior_scale,
            init_std=self.init_std,
        )
        return cast(Network, network)

    def _build_posterior(self) -> SparsePosterior:
        return SparsePosterior(cast(Network, compact(self._sparse_network())))

    def _infer(self, data: TrainingData) -> tuple[SparsePosterior, TrainingResult]:
        network = self._sparse_network().to(data.fabric.device)
        n_epochs, n_batches = self._n_epochs(data), len(data.batches)
        # One batch of all rows: noise that is the same for all of them makes a row of weight 2
        # the row given twice.
        set_same_noise(network, n_batches == 1)
        rhos = [w.rho for w in sparse_weights(network).values()]
        known = {id(p) for p in rhos}
        rest = [p for p in network.parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": rhos, "lr": self.lr_std}]
        n_steps = n_epochs * n_batches
        every = self.update_every or _steps_between_updates(n_steps, n_batches)
        if self.density < 1 and self.replace > 0 and every >= _LAST_UPDATE * n_steps:
            warnings.warn(
                f"{type(self).__name__}: no active weight is ever exchanged: update_every={every}, "
                f"but exchanges end at three quarters of the run's {n_steps} steps. Lower "
                "update_every, or raise max_epochs; replace=0 keeps the initial set on purpose.",
                UserWarning,
                stacklevel=4,
            )
        optimizer = SSVI(
            network,
            torch.optim.Adam(groups, self.lr, fused=True),
            n_steps=n_steps,
            update_every=every,
            stop=_LAST_UPDATE,
            replace=self.replace,
            criterion=self.criterion,
            grow_grad=self.grow_grad,
        )
        beta = n_batches, n_epochs, self.kl_warmup
        objective = _SSVIObjective(network, data.n_effective, self.temperature, beta)
        result = self._train(objective, optimizer, data, schedule=cosine_schedule(n_steps))
        trained = cast(Network, compact(network))
        self._account(trained)
        return SparsePosterior(trained, data.seeds.predict), result

    def _account(self, network: Network) -> None:
        device = next(network.parameters()).device
        counted = account(network, self._example().to(device))
        self.sparsity_ = counted.sparsity
        self.n_active_ = counted.n_active
        self.flops_ratio_ = counted.flops_ratio
        self.size_ratio_ = counted.size_ratio

    # -- beyond prediction -------------------------------------------------------------------

    def predict_distribution_at_mean(self, X: Any) -> Predictive:
        """Predict with the mean weights alone: one sparse forward pass.

        Parameters
        ----------
        X : array-like of shape (n, d)
            Inputs.

        Returns
        -------
        Predictive
            As from :meth:`predict_distribution`, of one draw: without the uncertainty about the
            weights.
        """
        x, index = self._posterior_at(X)
        dist = self._user_scale(cast(SparsePosterior, self.posterior_).at_mean(x))
        dist.index = index
        return dist

    def to_dense(self) -> NormalPosterior:
        """Return the posterior over ordinary torch layers, with zeros written out."""
        if not hasattr(self, "posterior_"):
            self._posterior_at(None)  # says that the model is not fitted
        return cast(SparsePosterior, self.posterior_).to_dense()


_PARAMETERS = """\
density : float, default=0.1
        Share of weights that are active, in (0, 1]; all others are exactly zero. Biases and
        normalisation layers are dense, and ordinary parameters.
    allocation : {"uniform", "erdos_renyi"}, default="uniform"
        "uniform" gives each layer this density but the last, which is dense where there are
        several; "erdos_renyi" makes small layers denser so that all together have this density.
    criterion : {"snr", "snr_abs", "mean", "mean_abs", "exp_abs", "snr_exp_abs", "random"}, \
default="snr"
        Score by which active weights are kept, see :func:`uq.inference.removal_score`; "random" is
        a control.
    grow_grad : {"post", "pre"}, default="post"
        Whether the gradient that picks new weights is taken after or before the removal. After it,
        a removed weight that was needed comes back.
    update_every : int, optional
        Steps between exchanges of active weights; by default an epoch, at least 20. Runs too short
        for two of these have one exchange or two, which judge new weights early. A value that
        leaves no exchange at all is warned about.
    replace : float, default=0.3
        Share of active weights that the first exchange replaces; decays to 0 by a cosine at three
        quarters of the run. 0 keeps the initial random set.
    prior_scale : float, default=1.0
        Standard deviation of the Gaussian prior, times 1/√(fan-in × density) of each layer; at 1
        the prior keeps the variance of a layer's input.
    init_std : float, default=0.1
        Posterior standard deviation at the start, as a share of the prior's.
    lr_std : float, default=1e-2
        Learning rate of the standard deviations' parameters, scheduled like ``lr``.
    temperature : float, default=0.1
        Weight of the KL. 1 is the Bayesian posterior, whose mean-field form underfits networks of
        more weights than rows; the authors take 0.01.
    kl_warmup : float, default=0.5
        Share of the epochs over which the weight of the KL rises to ``temperature``.
    n_samples : int, default=32
        Weight draws that a prediction averages over."""

_FITTED = """\
sparsity_ : float
        Share of the weights of linear and convolutional layers that are zero.
    n_active_ : int
        Number of those that are not.
    flops_ratio_ : float
        Multiply-adds of these layers in one forward pass, over those of the dense network.
    size_ratio_ : float
        Bytes of the posterior, over those of means and standard deviations of all weights."""


@documented(lr="3e-3", patience='"auto"', own=_PARAMETERS)
@estimator
class SSVIClassifier(_SSVI, Classifier):
    """Classify with a sparse network whose active weights are Gaussian.

    Parameters
    ----------
    {shared}
    {own}
    {tail}

    Attributes
    ----------
    {fitted}
    {counted}
    classes_ : ndarray of shape (n_classes,)
        Labels.

    Notes
    -----
    The posterior is mean-field on the active weights. On few or noisy rows a long run ends in far
    too sure a fit: by default a tenth of the rows stops it (``patience=None`` trains on all). The
    held-out score is that of the mean weights, and the active set of the best epoch is kept.
    :class:`SSVIRegressor`, whose noise is learned, does better with all rows.

    Predictions multiply by compressed rows on a CPU where that is faster (a density up to 0.12,
    layers of 16,384 weights); so does training (up to 0.2, linear layers of 131,072 weights).
    Elsewhere zeros are written out for a product, and exchanges of active weights look at the
    gradient of all. Convolutions gain size, but no speed: there is no compressed product for them,
    in training or in prediction.

    Sparsity is of single weights. The structured variant with a hidden Markov prior on the support,
    which removes whole neurons (Turbo-VBI), is not there.

    In training each row has noise of its own; with all rows in one batch all have the same, so
    that a sample weight of 2 is exactly the row given twice.

    References
    ----------
    J. Li, Z. Miao, Q. Qiu, R. Zhang, "Training Bayesian Neural Networks with Sparse Subspace
    Variational Inference", ICLR 2024, arXiv 2402.11025, Algorithm 1.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from uq import SSVIClassifier
    >>> X, y = load_wine(return_X_y=True)
    >>> model = SSVIClassifier(density=0.1, max_epochs=30, random_state=0).fit(X, y)
    >>> round(model.sparsity_, 2), model.predict_distribution(X[:2]).n_draws
    (0.87, 32)
    """

    patience: int | Literal["auto"] | None = "auto"


@documented(lr="3e-3", own=_PARAMETERS)
@estimator
class SSVIRegressor(_SSVI, NetworkRegressor):
    """Predict real targets with a sparse network whose active weights are Gaussian.

    Parameters
    ----------
    {shared}
    {own}
    {noise}
    {tail}

    Attributes
    ----------
    {fitted}
    {counted}

    Notes
    -----
    The noise level is a point estimate. The predictive is the mixture of the draws' Normals. All
    rows train it unless ``patience`` asks for some to stop by. See :class:`SSVIClassifier` for the
    rest.

    References
    ----------
    J. Li, Z. Miao, Q. Qiu, R. Zhang, "Training Bayesian Neural Networks with Sparse Subspace
    Variational Inference", ICLR 2024, arXiv 2402.11025, Algorithm 1.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import SSVIRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = SSVIRegressor(density=0.2, max_epochs=30, random_state=0).fit(X, y)
    >>> lower, upper = model.predict_interval(X[:3], coverage=0.9)
    >>> bool((lower < upper).all())
    True
    """


for _class in (SSVIClassifier, SSVIRegressor):
    _class.__doc__ = (_class.__doc__ or "").replace("{counted}", _FITTED)

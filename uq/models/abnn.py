"""ABNN: a trained network becomes Bayesian by noise on its normalisation layers, post hoc.

Layers and algorithm are in :mod:`uq.nn.abnn` and :mod:`uq.inference.abnn`. A ``module`` that is
given as an instance is taken as trained, and ``fit`` fine-tunes; otherwise ``fit`` first trains the
network as MAP. ``history_`` and ``stop_reason_`` are those of the last member.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from uq.errors import ParameterError
from uq.inference.abnn import (
    SCOPES,
    ABNNPosterior,
    Scope,
    convert,
    epistemic_parts,
    quantile_edges,
    random_class_weights,
    tuned_names,
)
from uq.inference.posterior import Weights
from uq.inference.training import TrainingResult, warn_interrupted
from uq.models.base import estimator
from uq.models.checks import check_choice, check_number
from uq.models.documentation import documented
from uq.models.map import PointEstimator
from uq.models.objectives import Objective, TrainingData
from uq.models.tasks import Classifier, NetworkRegressor
from uq.nn.abnn import NOISE_SHAPES, NoiseShape, bayesian_layers, without_noise
from uq.nn.bodies import MLP
from uq.nn.likelihoods import NormalLikelihood
from uq.nn.network import Network

_MOMENTUM = 0.9
_LR_STEP = 0.1  # factor on the learning rate at each milestone
_TARGET_BINS = 10
# Below these, statistics of batches say less than those that the network was trained to.
_FEW_ROWS, _SMALL_BATCH = 1000, 16


class _ABNNObjective(Objective):
    """Negative log likelihood under noise, weighted by class or bin of the target."""

    def __init__(
        self,
        network: Network,
        class_weights: Tensor,
        edges: Tensor | None,
        *,
        per_batch: bool,
    ) -> None:
        super().__init__()
        self.network = network
        self.class_weights = class_weights
        self.edges = edges
        self.per_batch = per_batch

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Weighted mean over the batch, in nats."""
        rows = self.network.nll(x, y)
        weights = self.class_weights.to(rows.dtype)[self._classes(y)]
        weights = weights if weight is None else weights * weight
        if self.per_batch:
            return (rows * weights).mean()
        tiny = torch.finfo(rows.dtype).tiny  # random_prior=0 may leave a batch without weight
        return (rows * weights).sum() / weights.sum().clamp_min(tiny)

    def _classes(self, y: Tensor) -> Tensor:
        if y.ndim == 1:
            return y
        if self.edges is None:
            return torch.zeros(len(y), dtype=torch.long, device=y.device)
        return torch.bucketize(y.mean(-1), self.edges)

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log likelihood of each row, under noise."""
        return self.network.nll(x, y)


class _Standardised(nn.Module):
    """A network in target units whose means are put on the standardised scale."""

    mean: Tensor
    scale: Tensor

    def __init__(self, module: nn.Module, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        m = len(self.mean)
        loc = (out[:, :m] - self.mean) / self.scale
        return loc if out.shape[1] == m else torch.cat([loc, out[:, m:]], 1)


@estimator
class _ABNN(PointEstimator):
    alpha: float | None = None
    noise_shape: NoiseShape = "channel"
    n_members: int = 3
    include_original: bool = True
    n_samples: int = 10
    random_prior: float = 7.0
    train_scope: Scope = "norm"
    max_epochs: int | None = 5
    batch_size: int | None = 128
    lr: float = 5e-3
    milestones: Sequence[int] = (1, 4)
    weight_decay: float = 1e-4
    loss_norm: Literal["weighted_mean", "batch"] = "weighted_mean"
    batch_statistics: Literal["auto", "frozen", "updated"] = "auto"
    base_max_epochs: int | None = None
    base_lr: float = 3e-3

    n_members_: int = field(init=False)
    class_weights_: np.ndarray = field(init=False)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "alpha", at_least=0, below=math.inf, optional=True)
        check_choice(self, "noise_shape", NOISE_SHAPES)
        check_number(self, "n_members", at_least=0, integer=True)
        check_number(self, "n_samples", at_least=1, integer=True)
        check_number(self, "random_prior", at_least=0, below=math.inf)
        check_choice(self, "train_scope", SCOPES)
        check_number(self, "max_epochs", at_least=1, integer=True)
        check_number(self, "weight_decay", at_least=0, below=math.inf)
        check_choice(self, "loss_norm", ("weighted_mean", "batch"))
        check_choice(self, "batch_statistics", ("auto", "frozen", "updated"))
        check_number(self, "base_max_epochs", at_least=1, integer=True, optional=True)
        check_number(self, "base_lr", above=0, below=math.inf)
        name = type(self).__name__
        if not isinstance(self.include_original, bool | np.bool_):
            raise ParameterError(
                f"{name}: include_original must be True or False, got {self.include_original!r}."
            )
        if self.n_members == 0 and not self.include_original:
            raise ParameterError(
                f"{name}: n_members=0 leaves only the original network; include it."
            )
        steps = self.milestones
        ok = isinstance(steps, list | tuple) and all(
            isinstance(s, int | np.integer) and s >= 1 for s in steps
        )
        if not ok or any(a >= b for a, b in pairwise(steps)):
            raise ParameterError(
                f"{name}: milestones must be increasing epochs >= 1, such as (1, 4), or (), got "
                f"{steps!r}."
            )
        if self.module is None and not self.hidden:
            raise ParameterError(
                f"{name}: hidden must not be empty: the normalisation layers that carry the noise "
                "lie behind hidden layers."
            )

    # -- network -----------------------------------------------------------------------------

    @property
    def _pretrained(self) -> bool:
        return isinstance(self.module, nn.Module)

    def _body(self, d_out: int | None, why: str = "") -> nn.Module:
        if self.module is None:
            # Layer, not batch normalisation: a row's prediction and loss depend on that row alone.
            return MLP(self.input_shape_[0], self.hidden, d_out, norm=True).to(self._dtype)
        return super()._body(d_out, why)

    def _network(self) -> Network:
        network = super()._network()
        convert(network.body, self.alpha, self.noise_shape)
        return network

    def _split(self, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        if self._pretrained:  # no training that could stop early
            return np.arange(len(y)), np.arange(0)
        return super()._split(y, seed)

    def _build_posterior(self) -> ABNNPosterior:
        network = self._network()
        state = _state(network, tuned_names(network, self.train_scope))
        return ABNNPosterior(
            network, {k: torch.stack([t] * self.n_members_) for k, t in state.items()}
        )

    # -- training ----------------------------------------------------------------------------

    def _infer(self, data: TrainingData) -> tuple[ABNNPosterior, TrainingResult]:
        network = self._network().to(data.fabric.device)
        n_classes = self._n_weights()
        self.class_weights_ = np.ones((0, n_classes))
        result = TrainingResult(stop_reason="untuned", best_epoch=1)
        if self._pretrained:
            self._meet_checkpoint(network, data)
        else:
            result = self._fit_base(network, data)
        names = tuned_names(network, self.train_scope)
        # Buffers that members share (spectral norm's, say) move in training, too.
        start = _state(network, {*names, *dict(network.named_buffers())})
        edges = self._edges(data)
        members: list[Weights] = []
        failed = result.error is not None or result.stop_reason == "interrupted"
        for i in range(0 if failed else self.n_members):
            drawn = random_class_weights(
                n_classes, self.random_prior, generator=data.generator(data.seeds.noise + i)
            )
            try:
                result = self._tune(network, drawn, edges, names, data)
            except KeyboardInterrupt:
                result.stop_reason = "interrupted"  # of the member before
                warn_interrupted(type(self).__name__, f"the first {len(members)} members are kept")
                break
            if result.best_epoch > 0:
                members.append(_state(network, names))
                drawn_row = drawn.double().cpu().numpy()[None]
                self.class_weights_ = np.concatenate([self.class_weights_, drawn_row])
            _restore(network, start)
            if result.error is not None or result.stop_reason == "interrupted":
                break
        if not failed:
            result.best_epoch = max(result.best_epoch, 1)  # the checkpoint can predict
        if self.include_original or not members:
            members.append({name: start[name] for name in names})
        self.n_members_ = len(members)
        stacked = {name: torch.stack([m[name] for m in members]) for name in names}
        return ABNNPosterior(network, stacked, data.seeds.predict), result

    def _fit_base(self, network: Network, data: TrainingData) -> TrainingResult:
        """Train the plain network as MAP, in place."""
        trainer = copy.copy(self)
        trainer.lr, trainer.max_epochs = self.base_lr, self.base_max_epochs
        with without_noise(network):
            return trainer._fit_network(network, data)

    def _tune(
        self,
        network: Network,
        class_weights: Tensor,
        edges: Tensor | None,
        names: list[str],
        data: TrainingData,
    ) -> TrainingResult:
        """Fine-tune one member in place, from where the network is."""
        frozen = self.batch_statistics == "frozen"
        if self.batch_statistics == "auto":
            n_rows = getattr(data.batches, "n_rows", data.n_effective)
            frozen = n_rows < _FEW_ROWS or n_rows / len(data.batches) < _SMALL_BATCH
        for layer in bayesian_layers(network).values():
            layer.frozen_statistics = frozen
        if self.train_scope == "norm":
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name in names)
        optimizer = torch.optim.SGD(
            [p for p in network.parameters() if p.requires_grad],
            self.lr * self._loss_unit(network, data),
            momentum=_MOMENTUM,
            nesterov=True,
            weight_decay=self.weight_decay,
            fused=True,
        )
        per_batch = self.loss_norm == "batch"
        objective = _ABNNObjective(network, class_weights, edges, per_batch=per_batch)
        schedule = _steps(self.milestones, len(data.batches))
        return self._train(objective, optimizer, replace(data, held_out=None), schedule=schedule)

    @abstractmethod
    def _n_weights(self) -> int:
        """Number of classes, or of bins of the target, that weights are drawn for."""

    def _edges(self, data: TrainingData) -> Tensor | None:
        """Inner edges of the target's bins; None for classes, and for a single bin."""
        return None

    def _meet_checkpoint(self, network: Network, data: TrainingData) -> None:
        """Learn what a trained ``module`` does not hold."""

    def _loss_unit(self, network: Network, data: TrainingData) -> float:
        """What makes the loss's mean curvature in the outputs one, at most: a factor on ``lr``."""
        return 1.0

    # -- beyond prediction -------------------------------------------------------------------

    def epistemic_parts(self, X: Any) -> dict[str, np.ndarray]:
        """Split the epistemic uncertainty of each row by where it comes from.

        Parameters
        ----------
        X : array-like of shape (n, d)
            Inputs.

        Returns
        -------
        dict of ndarray
            "between_members" (disagreement of the members' averages) and "within_members" (what
            the noise adds in each), in nats, or squared target units. They add up to
            ``predict_distribution(X).epistemic``.
        """
        dist = self.predict_distribution(X)
        return {k: t.numpy() for k, t in epistemic_parts(dist, self.n_members_).items()}


def _state(network: nn.Module, names: Any) -> Weights:
    every = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: every[name].detach().clone() for name in every if name in set(names)}


@torch.no_grad()
def _restore(network: nn.Module, state: Weights) -> None:
    every = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, value in state.items():
        every[name].copy_(value)


def _steps(milestones: Sequence[int], per_epoch: int) -> Callable[[int], float]:
    """Learning-rate factor: a tenth from each milestone on."""
    return lambda step: _LR_STEP ** sum(step >= m * per_epoch for m in milestones)


_SHARED = """\
module : torch.nn.Module or callable, optional
        A trained network with normalisation layers (any kind, any number), which is copied, never
        changed, and fine-tuned. It maps inputs, taken as they are, to {outputs}.
        Or a factory ``f(d_in, d_out)`` of an untrained one, which is trained first, as is the
        default, an MLP with layer normalisation on standardised inputs.
    hidden : tuple of int, default=(64, 64)
        Widths of the MLP's hidden layers, where no ``module`` is given.
    alpha : float, optional
        Standard deviation of the noise, as a share of each scale: by default 0.03, and 0.1 for
        "element". It is not learned: compare a few values on held-out rows. Above 0.3
        it costs accuracy.
    noise_shape : {{"channel", "sample", "element"}}, default="channel"
        One noise number per channel and draw (a draw is one function of all rows, and costs a plain
        forward pass), per channel and row, or per activation (the authors' code; costs
        that many random numbers).
    n_members : int, default=3
        Fine-tuned copies, as in the paper. 0 puts noise on the original network alone.
    include_original : bool, default=True
        Whether the network before fine-tuning is a member, too.
    n_samples : int, default=10
        Noise draws of each member that a prediction averages over.
    random_prior : float, default={prior}
        {prior_text}
    train_scope : {{"norm", "all"}}, default="norm"
        Fine-tune scales and shifts (and batch statistics) alone, so that members share the
        backbone; or all weights.
    max_epochs : int, default=5
        Passes over the data of each member's fine-tuning.
    batch_size : int or None, default=128
        Rows per step; None takes all rows at once.
    lr : float, default=5e-3
        Learning rate of the fine-tuning, by SGD with Nesterov momentum 0.9.
    milestones : tuple of int, default=(1, 4)
        Epochs, from 0, from which on the learning rate is a tenth of what it was.
    weight_decay : float, default=1e-4
        Pull of the fine-tuned weights to 0, as in the authors' code.
    loss_norm : {{"weighted_mean", "batch"}}, default="weighted_mean"
        Divide the weighted loss of a batch by the sum of its weights, or by its rows: the optimum
        is the same, the size of a step is not.
    batch_statistics : {{"auto", "frozen", "updated"}}, default="auto"
        Whether fine-tuning normalises by batches and updates batch normalisation's running
        statistics; "auto" freezes them below 1,000 rows or 16 rows a batch.
    base_max_epochs : int, optional
        Passes over the data of the training before, where ``module`` is no trained network; by
        default as many as give about 5,000 steps, at least 20, and at most 1,000 beyond 320 rows.
    base_lr : float, default=3e-3
        Peak learning rate of that training, by Adam.
    prior_scale : float, default=1.0
        Standard deviation of the Gaussian prior on every weight in that training."""
_HELD_OUT = """\
Of the training before fine-tuning: stop after this many epochs without a better negative
        log likelihood on a tenth of the rows, held out for it; "auto" takes a tenth of the epochs,
        at least 20, and a fifth of more than 1,000. None trains on all rows. A trained
        ``module`` holds nothing out."""


@documented(
    lr="",
    patience='"auto"',
    held_out=_HELD_OUT,
    own=_SHARED.format(
        outputs="logits (n, n_classes),\n        columns in the order of the sorted labels",
        prior="7.0",
        prior_text="Loss weight of ⌊√C⌋ random classes in each member; 1 favours none, 0 ignores\n"
        "        them. It shifts a member's logits of these classes by up to its log.",
    ),
)
@estimator
class ABNNClassifier(_ABNN, Classifier):
    """Classify by a trained network with Bayesian normalisation layers (ABNN).

    Parameters
    ----------
    {own}
    {tail}

    Attributes
    ----------
    {fitted}
    n_members_ : int
        Members T held, the original among them: fewer than asked for after an interrupt.
    class_weights_ : ndarray of shape (n_members, n_classes)
        Loss weights of each fine-tuned member.
    classes_ : ndarray of shape (n_classes,)
        Labels.

    Notes
    -----
    Made for epistemic scores, OOD detection above all: expect accuracy, log likelihood and
    calibration of the original network, not better ones. Probabilities are averaged, never logits.
    ``stop_reason_`` is "untuned" where no step was taken.

    References
    ----------
    G. Franchi et al., "Make Me a BNN: A Simple Strategy for Estimating Bayesian Uncertainty from
    Pre-trained Models", CVPR 2024, arXiv 2312.15297, Algorithm 1. The noise scale α is the
    authors' code's, not in the paper's equation, which breaks a network.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> from uq import ABNNClassifier
    >>> X, y = load_wine(return_X_y=True)
    >>> model = ABNNClassifier(base_max_epochs=20, random_state=0).fit(X, y)
    >>> dist = model.predict_distribution(X[:2])
    >>> dist.n_draws, bool((dist.epistemic >= 0).all())
    (40, True)
    """

    def _n_weights(self) -> int:
        return len(self.classes_)


@documented(
    lr="",
    patience='"auto"',
    held_out=_HELD_OUT,
    own=_SHARED.format(
        outputs="means (n, m) in\n        target units (with heteroscedastic noise followed by m "
        "raw scales, as\n        :class:`uq.nn.NormalLikelihood` reads them, standardised)",
        prior="1.0",
        prior_text="Loss weight of three of ten quantile bins of the target in each member. An\n"
        "        extension: the method has weights for classes only, so that the default is none.",
    ),
)
@estimator
class ABNNRegressor(_ABNN, NetworkRegressor):
    """Predict real targets by a trained network with Bayesian normalisation layers (ABNN).

    Parameters
    ----------
    {own}
    {noise}
    {tail}

    Attributes
    ----------
    {fitted}
    n_members_ : int
        Members T held, the original among them: fewer than asked for after an interrupt.
    class_weights_ : ndarray of shape (n_members, 10)
        Loss weights of the target's bins of each fine-tuned member.

    Notes
    -----
    The paper has no regression: loss and noise are those of the likelihood, and the predictive is
    the mixture of all draws' Normals. The homoscedastic noise of a trained ``module`` starts at its
    residuals on the rows given. Fine-tuning multiplies ``lr`` by the harmonic mean of the noise
    variances (standardised), so that its steps are those of squared error, however closely the
    network fits. ``stop_reason_`` is "untuned" where no step was taken.

    References
    ----------
    G. Franchi et al., "Make Me a BNN: A Simple Strategy for Estimating Bayesian Uncertainty from
    Pre-trained Models", CVPR 2024, arXiv 2312.15297, Algorithm 1.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import ABNNRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = ABNNRegressor(base_max_epochs=20, random_state=0).fit(X, y)
    >>> lower, upper = model.predict_interval(X[:3], coverage=0.9)
    >>> bool((lower < upper).all())
    True
    """

    random_prior: float = 1.0

    def _body(self, d_out: int | None, why: str = "") -> nn.Module:
        body = super()._body(d_out, why)
        if not self._pretrained:
            return body
        mean, scale = (torch.as_tensor(a, dtype=self._dtype) for a in (self.y_mean_, self.y_scale_))
        return _Standardised(body, mean, scale)

    def _n_weights(self) -> int:
        return _TARGET_BINS

    def _edges(self, data: TrainingData) -> Tensor | None:
        return None if self.random_prior == 1 else quantile_edges(data.batches, _TARGET_BINS)

    @torch.no_grad()
    def _loss_unit(self, network: Network, data: TrainingData) -> float:
        """Harmonic mean of the noise variances.

        Gradients grow with 1 / variance: little noise would make plain SGD diverge.
        """
        network.eval()
        precision, count = 0.0, 0
        with without_noise(network):
            for x, *_ in data.batches:
                scale = network(x)[1]
                precision += float(scale.double().pow(-2).sum())
                count += scale.numel()
        return count / precision

    @torch.no_grad()
    def _meet_checkpoint(self, network: Network, data: TrainingData) -> None:
        """Set the noise level to the residuals of the trained network."""
        likelihood = cast(NormalLikelihood, network.likelihood)
        if likelihood.raw_scale is None:
            return
        network.eval()
        total = torch.zeros_like(likelihood.raw_scale, dtype=torch.float64)
        count = 0.0
        with without_noise(network):
            for x, y, *weight in data.batches:
                squared = (y - network(x)[0]).double().square()
                rows = weight[0].double() if weight else torch.ones_like(squared[:, 0])
                total += (rows[:, None] * squared).sum(0)
                count += float(rows.sum())
        likelihood.set_scale((total / count).sqrt())

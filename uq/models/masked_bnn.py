"""Masked Bayesian networks: MCMC over weights and over which hidden nodes there are.

The sampler and its equations are in :mod:`uq.inference.masked_bnn`. Each chain starts from a short
Adam run of its own, with all nodes on; the prior on widths then takes away what the data does not
ask for, and a tenth of spare nodes lets a layer grow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import field
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from uq.errors import ParameterError
from uq.inference.data import ArrayBatches
from uq.inference.masked_bnn import PRIORS, MaskedBNN, MaskedMoves, MaskedState
from uq.inference.masked_bnn_moves import PROPOSALS, WidthPrior, width_penalty
from uq.inference.masked_bnn_runs import MaskedRun, SamplerWarning, sample_masked
from uq.inference.posterior import DrawsPosterior
from uq.inference.training import TrainingResult, warn_interrupted
from uq.models.base import estimator
from uq.models.chains import ChainDiagnostics
from uq.models.checks import check_choice, check_number
from uq.models.documentation import documented
from uq.models.ensemble import initial_networks
from uq.models.map import PointEstimator
from uq.models.objectives import TrainingData
from uq.models.tasks import Classifier, Regressor
from uq.nn.likelihoods import SCALE_FLOOR
from uq.nn.masked_bnn import MaskedMLP, MaskedModule, relu_mlp
from uq.nn.network import Network

# Share of divergent trajectories above which a chain is not to be trusted.
_DIVERGENT_SHARE = 0.1


@estimator
class _MaskedBNN(ChainDiagnostics, PointEstimator):
    hidden: Sequence[int] = (50, 50)
    prior_scale: float = 0.3
    patience: int | Literal["auto"] | None = None
    prior: str = "cauchy"
    width_penalty: float = 0.1
    min_width: int = 1
    select_features: bool = False
    n_chains: int = 4
    n_warmup: int = 500
    n_draws: int = 100
    thin: int = 5
    n_leapfrog: int = 50
    n_mask_moves: int = 10
    max_flips: int = 3
    death: str = "small"
    birth: str = "uniform"
    target_accept: float = 0.8

    n_chains_: int = field(init=False)
    n_draws_: int = field(init=False)
    widths_: np.ndarray = field(init=False)
    inclusion_: np.ndarray = field(init=False)
    sample_stats_: dict[str, np.ndarray] = field(init=False)
    diagnostics_: dict[str, np.ndarray] = field(init=False)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        name = type(self).__name__
        check_choice(self, "prior", PRIORS)
        check_number(self, "width_penalty", at_least=0, below=math.inf)
        check_number(self, "min_width", at_least=0, integer=True)
        if self.module is None and self.min_width > min(self.hidden, default=self.min_width):
            raise ParameterError(
                f"{name}: min_width must be at most the smallest of hidden={self.hidden!r}, got "
                f"{self.min_width!r}; a layer cannot keep more nodes than it has."
            )
        if not isinstance(self.select_features, bool | np.bool_):
            raise ParameterError(
                f"{name}: select_features must be True or False, got {self.select_features!r}."
            )
        if self.select_features and self.module is not None:
            raise ParameterError(
                f"{name}: select_features masks the inputs of the built-in network; leave it at "
                "False with module=."
            )
        for count in ("n_chains", "n_draws", "thin", "n_leapfrog", "max_flips"):
            check_number(self, count, at_least=1, integer=True)
        if self.max_flips > 5:
            raise ParameterError(
                f"{name}: max_flips must be at most 5, got {self.max_flips!r}: the probability of "
                "a set is a sum over max_flips! orders."
            )
        check_number(self, "n_warmup", at_least=0, integer=True)
        check_number(self, "n_mask_moves", at_least=0, integer=True)
        check_choice(self, "death", PROPOSALS)
        check_choice(self, "birth", PROPOSALS)
        check_number(self, "target_accept", above=0, below=1)

    def _n_epochs(self, data: TrainingData) -> int:
        return self.max_epochs or max(1, math.ceil(1000 / len(data.batches)))

    def _body(self, d_out: int | None, why: str = "", hidden: Sequence[int] = ()) -> nn.Module:
        if self.module is not None:
            return super()._body(d_out, why)
        assert d_out is not None
        return relu_mlp((self.input_shape_[0], *(hidden or self.hidden), d_out)).to(self._dtype)

    def _infer(self, data: TrainingData) -> tuple[DrawsPosterior, TrainingResult]:
        networks, result = self._start(data)
        first = networks[0]
        self.n_chains_, self.n_draws_ = len(networks), 1
        self.sample_stats_, self.diagnostics_ = {}, {}
        self.inclusion_ = np.ones(self.input_shape_[0] if self.module is None else 0)
        own = np.array(self._groups(first), dtype=np.int64)
        self.widths_ = np.tile(own, (len(networks), 1, 1))
        if result.error is not None or result.stop_reason == "interrupted":
            # What was learned; there was no time to sample.
            return DrawsPosterior.stack(networks, data.seeds.predict), result
        try:
            run = self._sample(networks, data)
        except KeyboardInterrupt:
            warn_interrupted(f"{type(self).__name__}, before sampling", "the starts are kept")
            result.stop_reason = "interrupted"
            return DrawsPosterior.stack(networks, data.seeds.predict), result
        if run.interrupted:
            result.stop_reason = "interrupted"
        self._read(run)
        self._warn_if_divergent()
        return self._posterior(first, run, data.seeds.predict), result

    def _start(self, data: TrainingData) -> tuple[list[Network], TrainingResult]:
        """Train a network for each chain to start from."""
        if self.n_chains == 1:
            networks = [self._network()]
        else:
            networks = initial_networks(self, self.n_chains, data)
            # Frozen weights are those of the module, one set for all chains.
            given = self._network() if isinstance(self.module, nn.Module) else networks[0]
            for network in networks:
                own = dict(network.named_parameters())
                for k, p in given.named_parameters():
                    if not p.requires_grad:
                        own[k].data.copy_(p)
        kept: list[Network] = []
        for network in networks:
            result = self._fit_network(network, data)
            if result.best_epoch > 0:
                kept.append(network)
            if result.error is not None or result.stop_reason == "interrupted":
                break
        result.best_epoch = max(result.best_epoch, int(bool(kept)))
        return kept or networks[:1], result

    def _groups(self, network: Network) -> tuple[int, ...]:
        """Nodes of each masked layer that a chain starts with."""
        if self.module is None:
            return tuple(int(h) for h in self.hidden)
        return MaskedModule(network.body).groups

    def _sample(self, networks: list[Network], data: TrainingData) -> MaskedRun:
        batches = data.batches
        parts = [batches.tensors] if isinstance(batches, ArrayBatches) else list(batches)
        x, y, *factor = (torch.cat(ts) for ts in zip(*parts, strict=True))
        # Weights come with mean 1; their sum is to be the N of the likelihood.
        weight = factor[0] * (data.n_effective / len(x)) if factor else None
        generator = data.generator(data.seeds.noise)
        bodies = [network.body for network in networks]
        penalty = width_penalty(self.width_penalty, data.n_effective)
        network: Any
        if self.module is None:
            outputs = networks[0].likelihood.n_outputs
            spare = [int(h) + max(1, int(h) // 10) for h in self.hidden]
            network = MaskedMLP((x.shape[1], *spare, outputs), bool(self.select_features))
        else:
            network = MaskedModule(bodies[0])
        inputs = int(bool(self.select_features))
        hidden = len(network.groups) - inputs
        # Among the features every number of them is as likely as any other.
        width_prior = WidthPrior(
            network.groups,
            [0.0] * inputs + [penalty] * hidden,
            [0] * inputs + [min(self.min_width, g) for g in network.groups[inputs:]],
        )
        model = MaskedBNN(
            network,
            x,
            y,
            width_prior,
            weight,
            self.prior,
            self.prior_scale,
            getattr(self, "noise_prior", (1.0, 0.01)),  # a classifier has no noise
        )
        state = self._first_state(model, networks, generator)
        return sample_masked(
            model,
            state,
            moves=MaskedMoves(
                self.n_leapfrog, self.n_mask_moves, self.max_flips, self.death, self.birth
            ),
            n_warmup=self.n_warmup,
            n_draws=self.n_draws,
            thin=self.thin,
            target_accept=self.target_accept,
            generator=generator,
            checkpoint=data.stage(),
            verbose=self.verbose,
            description=type(self).__name__,
        )

    def _first_state(
        self, model: MaskedBNN, networks: list[Network], generator: torch.Generator
    ) -> MaskedState:
        bodies = [network.body for network in networks]
        network: Any = model.network
        like = model.x.new_empty(len(bodies), network.n_weights)
        if self.module is None:
            weights, masks = network.embedded(bodies, model.draw_prior(like, generator))
        else:
            weights = network.flat(bodies)
            masks = like.new_ones(len(bodies), sum(network.groups))
        variance = None
        if model.y.is_floating_point():
            with torch.no_grad():
                scales = [n.likelihood(model.y[:1])[1][0] for n in networks]
            variance = torch.stack(scales).double().square()
        return MaskedState(weights.to(model.x.dtype), masks, variance)

    def _read(self, run: MaskedRun) -> None:
        """Set the fitted attributes of a run."""
        self.n_chains_, self.n_draws_ = run.masks.shape[:2]
        self.sample_stats_, self.diagnostics_ = run.sample_stats, run.trace
        self.widths_ = run.widths
        if self.select_features:
            features = run.masks[..., : self.input_shape_[0]]
            self.inclusion_ = features.double().mean((0, 1)).cpu().numpy()
            self.widths_ = run.widths[..., 1:]

    def _posterior(self, first: Network, run: MaskedRun, seed: int) -> DrawsPosterior:
        network = self._compact_network() if self.module is None else first
        draws = {f"body.{k}": t.flatten(0, 1) for k, t in run.parameters.items()}
        n = run.masks.shape[0] * run.masks.shape[1]
        if run.variance is not None:
            scale = (run.variance.sqrt().flatten(0, 1) - SCALE_FLOOR).clamp_min(SCALE_FLOOR / 100)
            likelihood: Any = network.likelihood
            raw = scale + torch.log(-torch.expm1(-scale)) - likelihood.offset  # inverse softplus
            draws["likelihood.raw_scale"] = raw.to(run.masks.dtype)
        named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        whole = {
            k: draws[k] if k in draws else t.detach().expand(n, *t.shape).clone()
            for k, t in named.items()
        }
        return DrawsPosterior(network.to(run.masks.device), whole, seed)

    def _compact_network(self) -> Network:
        """Network as wide as the widest draw."""
        widths = self.widths_.max((0, 1), initial=1)
        likelihood = self._likelihood()
        body = self._body(likelihood.n_outputs, hidden=tuple(int(w) for w in widths))
        return Network(body, likelihood.to(self._dtype))

    def _build_posterior(self) -> DrawsPosterior:
        network = self._compact_network() if self.module is None else self._network()
        n = self.n_chains_ * self.n_draws_
        draws = DrawsPosterior.stack([network]).draws
        return DrawsPosterior(
            network, {k: torch.empty(n, *t.shape[1:], dtype=t.dtype) for k, t in draws.items()}
        )

    def _warn_if_divergent(self) -> None:
        later = self.diagnostics_["diverging"][:, self.n_warmup :]
        # With little warm-up the step size has not found its place, which is no news.
        if self.n_warmup < 100 or not later.shape[1]:
            return
        bad = later.mean(1) > _DIVERGENT_SHARE
        if bad.any():
            warnings.warn(
                f"{type(self).__name__}: in {int(bad.sum())} of {len(bad)} chains more than "
                f"{_DIVERGENT_SHARE:.0%} of the trajectories after warm-up were divergent and "
                "rejected; raise target_accept or n_warmup, or lower prior_scale.",
                SamplerWarning,
                stacklevel=4,
            )


_OWN = """\
prior : {"cauchy", "normal"}, default="cauchy"
        Law of every weight. Under the Cauchy law a few weights may be large.
    prior_scale : float, default=0.3
        Its scale; in the Adam runs, the standard deviation of a Normal prior. Births propose nodes
        with weights of the prior: under a wide one few are accepted, and widths settle slowly.
    width_penalty : float, default=0.1
        λ of π(p) ∝ exp(−(λ log n)⁵ p²) for a layer of p active nodes: the knob that decides the
        width. The penalty grows steeply with the rows; 0 gives every width the same probability.
    min_width : int, default=1
        Narrower layers have prior probability 0.{features}
    n_chains : int, default=4
        Chains, run as one batch.
    n_warmup : int, default=500
        Transitions that let the widths settle and adapt the scale of each weight and the step
        size, thrown away.
    n_draws : int, default=100
        Draws of each chain. All of them predict.
    thin : int, default=5
        Transitions for each draw.
    n_leapfrog : int, default=50
        Gradients of all rows in a trajectory, of which each transition has one.
    n_mask_moves : int, default=10
        Births or deaths proposed in each transition; 0 keeps every node.
    max_flips : int, default=3
        A move flips 1 to this many nodes, at most 5.
    death, birth : {"small", "informed", "uniform"}, default="small" and "uniform"
        Nodes that moves prefer: those that the likelihood hardly feels; those whose flip it favours
        to first order; none. All are exact; births that look at gradients cost the full width.
    target_accept : float, default=0.8
        Acceptance probability that step sizes are adapted to. Raise it where trajectories
        diverge."""

_FEATURES = """
    select_features : bool, default=False
        Mask the inputs, too; every number of active features is as likely as any other."""

_FITTED = """\
n_chains_ : int
        Chains held.
    n_draws_ : int
        Draws of each.
    widths_ : ndarray of shape (n_chains, n_draws, n_hidden)
        Active nodes of each hidden layer in each draw. Which nodes they are means nothing: nodes
        can be exchanged.
    inclusion_ : ndarray of shape (n_features,)
        Posterior probability of each feature to be active; 1 without ``select_features``.
    sample_stats_ : dict of ndarray
        Of each draw, ``(n_chains_, n_draws_)``, by ArviZ's names: "lp", "log_likelihood",
        "acceptance_rate", "mask_acceptance_rate", "diverging", "step_size", "n_steps". Empty where
        an interrupt came before sampling.
    diagnostics_ : dict of ndarray
        Of each transition from the first on, ``(n_chains_, transitions)``: "acceptance_rate",
        "mask_acceptance_rate", "diverging", "log_likelihood", "step_size"; and "width"
        ``(n_chains_, transitions, n_groups)``, of the features first where they are selected."""

_NOTES = """\
Warns
    -----
    uq.inference.SamplerWarning
        If many trajectories of a chain diverge, with what to change.

    Notes
    -----
    The built-in network has ReLU nodes; a tenth of ``hidden`` is allocated on top, switched off, so
    that layers can grow. Draws are kept without the nodes that are off, which gives the same
    outputs from a smaller network. In a ``module`` masks are on the nodes or channels of all Linear
    and Conv layers but the last, and nothing is cut away.

    ``max_epochs`` (by default about 1,000 steps), ``batch_size``, ``lr`` and ``patience`` are those
    of the Adam runs that the chains start from, one after another; ``history_`` is the last one's.
    Rows that ``patience`` holds out are not sampled on. Every gradient of the sampler takes all
    rows: this is for some thousand of them.

    References
    ----------
    I. Kong, D. Yang, J. Lee, I. Ohn, G. Baek, Y. Kim, "Masked Bayesian Neural Networks: Theoretical
    Guarantee and its Posterior Inference", ICML 2023, arXiv 2305.14765."""


@documented(lr="3e-3", hidden="(50, 50)", steps="1,000 steps")
@estimator
class MaskedBNNClassifier(_MaskedBNN, Classifier):
    """Classify by networks whose width is sampled with their weights.

    Parameters
    ----------
    {shared}
    {masked}
    {tail}

    Attributes
    ----------
    {fitted}
    {sampled}
    classes_ : ndarray of shape (n_classes,)
        Labels.

    {notes}

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from uq import MaskedBNNClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = MaskedBNNClassifier(
    ...     hidden=(10,), n_chains=2, n_warmup=50, n_draws=10, max_epochs=20, random_state=0
    ... ).fit(X, y)
    >>> model.predict_distribution(X[:2]).n_draws
    20
    >>> bool((model.widths_ <= 11).all())
    True
    """


@documented(lr="3e-3", hidden="(50, 50)", steps="1,000 steps")
@estimator
class MaskedBNNRegressor(_MaskedBNN, Regressor):
    """Predict real targets by networks whose width is sampled with their weights.

    Parameters
    ----------
    {shared}
    {masked}
    noise_prior : tuple of float, default=(1.0, 0.01)
        a and b of the prior σ² ~ InvGamma(a, b) on the noise variance of each target, in squared
        units of the standardised target: noise around a tenth of its standard deviation.
    {tail}

    Attributes
    ----------
    {fitted}
    {sampled}

    {notes}

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import MaskedBNNRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = MaskedBNNRegressor(
    ...     hidden=(10,), n_chains=2, n_warmup=50, n_draws=10, max_epochs=20, random_state=0
    ... ).fit(X, y)
    >>> lower, upper = model.predict_interval(X[:3], coverage=0.9)
    >>> bool((lower < upper).all())
    True
    """

    noise_prior: tuple[float, float] = (1.0, 0.01)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        pair: Any = self.noise_prior
        if not (
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and all(isinstance(v, Real) and 0 < float(v) < math.inf for v in pair)
        ):
            raise ParameterError(
                f"{type(self).__name__}: noise_prior must be a pair of numbers > 0, such as "
                f"(1.0, 0.01), got {pair!r}."
            )


for _cls in (MaskedBNNClassifier, MaskedBNNRegressor):
    _doc = (_cls.__doc__ or "").replace("{masked}", _OWN.replace("{features}", _FEATURES))
    _cls.__doc__ = _doc.replace("{sampled}", _FITTED).replace("{notes}", _NOTES)

"""Partial Bayesian networks: one layer of weights is a cloud of particles, the rest is learned.

The algorithms and their equations are in :mod:`uq.inference.pbnn`. Training brings the loss of
OHSMC or SGSMC to the shared loop by Adam on ψ; the cloud is part of what the loop keeps of the best
epoch, since the last one is much worse than the best on small data.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from uq.errors import ParameterError
from uq.inference.pbnn import (
    MOVES,
    OHSMC,
    SGSMC,
    PartialPosterior,
    refresh,
)
from uq.inference.pbnn_network import ParticleNetwork, Stochastic, stochastic_names
from uq.inference.resampling import SCHEMES, ParticleWarning, ancestors
from uq.inference.training import TrainingResult, cosine_schedule, warn_interrupted
from uq.models.base import Estimator, estimator
from uq.models.checks import check_choice, check_number
from uq.models.documentation import documented
from uq.models.objectives import TrainingData
from uq.models.tasks import Classifier, NetworkRegressor

# Median share of effective particles in the last quarter of the steps below which a cloud is taken
# as collapsed.
_COLLAPSED = 0.05
# Steps that a cloud takes from the prior to where it settles: few particles are left in these.
_TRANSIENT = 20


@estimator
class _PartialBNN(Estimator):
    hidden: Sequence[int] = (50, 20, 5)
    lr: float = 1e-2
    stochastic: Stochastic = "penultimate"
    algorithm: Literal["ohsmc", "sgsmc"] = "ohsmc"
    n_particles: int = 1000
    move: str = "ou"
    move_var: float = 0.01
    n_move_steps: int = 10
    prior_scale: float = 1.0
    ess_threshold: float | None = None
    resampling: str = "stratified"
    gradient: Literal["pre", "post"] = "pre"
    refresh: bool | None = None
    validation_fraction: float = 0.2
    n_samples: int = 200
    patience: int | Literal["auto"] | None = "auto"

    stochastic_: list[str] = field(init=False)
    diagnostics_: dict[str, Any] = field(init=False)

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "algorithm", ("ohsmc", "sgsmc"))
        check_number(self, "n_particles", at_least=1, integer=True)
        check_choice(self, "move", MOVES)
        check_number(self, "move_var", above=0)
        check_number(self, "n_move_steps", at_least=1, integer=True)
        check_number(self, "prior_scale", above=0)
        check_number(self, "ess_threshold", above=0, optional=True)
        check_choice(self, "resampling", SCHEMES)
        check_choice(self, "gradient", ("pre", "post"))
        check_number(self, "validation_fraction", above=0, below=1)
        check_number(self, "n_samples", at_least=1, integer=True)
        if self.ess_threshold is not None and self.ess_threshold > 1:
            raise ParameterError(
                f"{type(self).__name__}: ess_threshold must be a number in (0, 1] or None, got "
                f"{self.ess_threshold!r}."
            )
        if self.refresh not in (None, True, False):
            raise ParameterError(
                f"{type(self).__name__}: refresh must be True, False or None, got {self.refresh!r}."
            )

    def _n_held_out(self, n: int) -> int:
        return max(1, round(self.validation_fraction * n))

    def _n_epochs(self, data: TrainingData) -> int:
        if self.max_epochs is not None:
            return self.max_epochs
        return min(200, max(20, -(-2000 // len(data.batches))))

    def _build_posterior(self) -> PartialPosterior:
        network = self._network()
        own = dict(network.body.named_parameters())
        dim = sum(own[name].numel() for name in self.stochastic_)
        return PartialPosterior(
            network, self.stochastic_, torch.zeros(self.n_particles, dim, dtype=self._dtype)
        )

    def _infer(self, data: TrainingData) -> tuple[PartialPosterior, TrainingResult]:
        network = self._network().to(data.fabric.device)
        try:
            self.stochastic_ = stochastic_names(network.body, self.stochastic)
        except ParameterError as error:
            raise ParameterError(f"{type(self).__name__}: {error}") from error
        model = ParticleNetwork(network, self.stochastic_)
        generator = data.generator(data.seeds.noise)
        objective: Any = self._objective(model, data, generator)
        result = self._train(
            objective,
            torch.optim.Adam(objective.trained(), self.lr, fused=True),
            data,
            schedule=cosine_schedule(self._n_epochs(data) * len(data.batches)),
        )
        self.diagnostics_ = objective.diagnostics() | {
            "best_epoch": result.best_epoch,
            "log_evidence": None,
            "log_evidence_se": None,
            "refresh": None,
        }
        particles, log_weights = objective.particles, objective.log_weights
        renew = self.algorithm == "sgsmc" if self.refresh is None else self.refresh
        if result.error is None:
            self._warn_if_collapsed(model.dim)
            fresh = self._refreshed(model, objective, data, generator, result) if renew else None
            if fresh is not None:
                particles, log_weights = fresh
        if float(log_weights.max() - log_weights.min()) > 0:
            chosen = ancestors(log_weights, "systematic", len(log_weights), generator)
            particles = particles[chosen]
        seed = data.seeds.predict
        return PartialPosterior(network, self.stochastic_, particles.clone(), seed), result

    def _objective(
        self, model: ParticleNetwork, data: TrainingData, generator: torch.Generator
    ) -> OHSMC | SGSMC:
        n_rows = getattr(data.batches, "n_rows", data.n_effective)
        shared: dict[str, Any] = {
            "generator": generator,
            "n_move_steps": self.n_move_steps,
            "prior_scale": self.prior_scale,
            "resampling": self.resampling,
            "gradient": self.gradient,
            # Rows come with weights of mean 1; the cloud needs how often each one is there.
            "weight_factor": data.n_effective / n_rows,
        }
        threshold = self.ess_threshold
        if self.algorithm == "sgsmc":
            shared["ess_threshold"] = 0.5 if threshold is None else threshold
            return SGSMC(model, self.n_particles, **shared)
        return OHSMC(
            model,
            self.n_particles,
            move=self.move,
            move_var=self.move_var,
            ess_threshold=1.0 if threshold is None else threshold,
            **shared,
        )

    def _refreshed(
        self,
        model: ParticleNetwork,
        objective: OHSMC | SGSMC,
        data: TrainingData,
        generator: torch.Generator,
        trained: TrainingResult,
    ) -> tuple[Tensor, Tensor] | None:
        """Cloud of the posterior given all rows at the learned ψ; None after an interrupt."""
        parts = [*data.batches, *([] if data.held_out is None else [data.held_out])]
        x, y, *weight = (torch.cat(ts) for ts in zip(*parts, strict=True))
        rows = weight[0] * objective.weight_factor if weight else None
        # Training that goes on later ends with another ψ: this cloud is not its.
        checkpoint = None if trained.stop_reason == "interrupted" else data.stage()
        try:
            result = refresh(
                model,
                x,
                y,
                rows,
                n_particles=self.n_particles,
                prior_scale=self.prior_scale,
                generator=generator,
                checkpoint=checkpoint,
            )
        except KeyboardInterrupt:
            warn_interrupted(f"{type(self).__name__}, refresh", "the cloud of training is kept")
            trained.stop_reason = "interrupted"
            return None
        found = result.diagnostics()
        self.diagnostics_["log_evidence"] = found.pop("log_evidence")
        self.diagnostics_["log_evidence_se"] = found.pop("log_evidence_se")
        self.diagnostics_["refresh"] = found
        if result.interrupted:
            trained.stop_reason = "interrupted"
            return None
        return result.particles, result.log_weights

    def _warn_if_collapsed(self, dim: int) -> None:
        ess = self.diagnostics_["ess"]
        if self.n_particles < 2 or len(ess) < _TRANSIENT:
            return
        share = float(np.median(ess[-max(1, len(ess) // 4) :]))
        if share < max(_COLLAPSED, 1.5 / self.n_particles):
            warnings.warn(
                f"{type(self).__name__}: the particles collapsed: at the end of training the "
                f"weights were those of {share * self.n_particles:.1f} of {self.n_particles} "
                f"(median), with {dim} stochastic weights and batches of up to "
                f"{self.batch_size or 'all'} rows. Lower batch_size or move_var, raise "
                "n_particles, choose a smaller layer in stochastic=, or take move='mh'.",
                ParticleWarning,
                stacklevel=4,
            )


_PARAMETERS = """\
stochastic : str, sequence of str or callable, default="penultimate"
        Weights that are particles: "penultimate", "first", "last" or "all" among the layers with
        weights; names of modules or parameters of ``module``; or ``f(name, module)``. A late layer
        of 100 to 1,000 weights is cheap and stays in the particles' reach; before the first one
        everything is computed once for all particles.
    algorithm : {"ohsmc", "sgsmc"}, default="ohsmc"
        One SMC step a batch on a cloud that persists, or SMC from the prior at every batch: exact
        for the batch, and ten times the cost and more.
    n_particles : int, default=1000
        Size of the cloud. With 1 the layer only diffuses.
    move : {"ou", "rw", "mh", "langevin", "adaptive_rw"}, default="ou"
        Of "ohsmc": how particles move from batch to batch. "ou" keeps the prior, "rw" (the paper's
        code) forgets it, "mh" and "langevin" aim at the posterior of the batch before,
        "adaptive_rw" follows the cloud's covariance.
    move_var : float, default=0.01
        Variance (for "langevin" length, for "adaptive_rw" factor) of a move. It sets the cloud's
        spread, and so the epistemic uncertainty, more than the number of rows does: worth a search
        over 0.001, 0.01, 0.1.
    n_move_steps : int, default=10
        Metropolis steps of "mh" and of "sgsmc".
    prior_scale : float, default=1.0
        Standard deviation of the Gaussian prior on the stochastic weights.
    ess_threshold : float, optional
        Resample where the effective number of particles is at most this share; by default 1 (at
        every step) for "ohsmc" and 0.5 for "sgsmc".
    resampling : {"stratified", "systematic", "residual", "multinomial"}, default="stratified"
        Scheme of resampling.
    gradient : {"pre", "post"}, default="pre"
        Gradient before resampling, or after it as in the paper's code: same mean, more variance.
    refresh : bool, optional
        After training, sample the posterior of the stochastic weights given all rows (held-out ones
        too) by tempered SMC, and estimate the evidence. By default for "sgsmc" only, whose cloud
        knows the last batch alone.
    validation_fraction : float, default=0.2
        Share of the rows held out for ``patience``. The best epoch is often an early one: keeping
        it is part of the method.
    n_samples : int, default=200
        Particles that a prediction averages over, evenly chosen from the cloud."""

_HELD_OUT = """\
Stop after this many epochs without a better negative log likelihood on
        ``validation_fraction`` of the rows, and keep the best epoch's network and cloud; "auto"
        takes a tenth of the epochs, at least 20. None trains on all rows to the end, which on small
        data is much worse. A DataLoader holds nothing out."""

_OWN_ATTRIBUTES = """\
stochastic_ : list of str
        Names of the stochastic parameters.
    diagnostics_ : dict
        One value a step: "ess" (effective share of the cloud), "unique_ancestors" (share of
        distinct ones in resampling), "acceptance" ("mh", "sgsmc"), "log_increments" (log p̂ of the
        batch given those before, in nats), "impossible" (particles of NaN likelihood). Also
        "best_epoch", and after a refresh "log_evidence" of all rows at the learned deterministic
        weights, "log_evidence_se", and "refresh": the path of the tempered run ("temperatures",
        "ess", "acceptance", "founders", "unique_ancestors")."""


@documented(
    lr="1e-2",
    patience='"auto"',
    own=_PARAMETERS,
    held_out=_HELD_OUT,
    hidden="(50, 20, 5)",
    steps="2,000 steps, within 20 to 200",
)
@estimator
class PartialBNNClassifier(_PartialBNN, Classifier):
    """Classify by a network with one Bayesian layer, a cloud of particles trained by SMC.

    The cloud takes any shape: it holds the several modes of a hidden layer, which a Gaussian
    posterior cannot.

    Parameters
    ----------
    {shared}
    {own}
    {tail}

    Attributes
    ----------
    {fitted}
    classes_ : ndarray of shape (n_classes,)
        Labels.
    {own_fitted}

    Warns
    -----
    uq.inference.ParticleWarning
        If the particles collapsed, with what to change.

    Notes
    -----
    "train_loss" is −log p̂ of each batch over its rows. The network runs in eval mode throughout:
    dropout does nothing, and batch normalisation keeps the statistics that it came with.

    References
    ----------
    Z. Zhao, S. Mair, T. B. Schön, J. Sjölund, "On Feynman–Kac training of partial Bayesian neural
    networks", AISTATS 2024, arXiv 2310.19608.

    Examples
    --------
    >>> from sklearn.datasets import make_moons
    >>> from uq import PartialBNNClassifier
    >>> X, y = make_moons(100, noise=0.3, random_state=0)
    >>> model = PartialBNNClassifier(
    ...     n_particles=100, max_epochs=20, batch_size=20, random_state=0
    ... ).fit(X, y)
    >>> model.predict_distribution(X[:2]).probs.shape
    torch.Size([2, 2])
    >>> model.stochastic_
    ['4.weight', '4.bias']
    """


@documented(
    lr="1e-2",
    patience='"auto"',
    own=_PARAMETERS,
    held_out=_HELD_OUT,
    hidden="(50, 20, 5)",
    steps="2,000 steps, within 20 to 200",
)
@estimator
class PartialBNNRegressor(_PartialBNN, NetworkRegressor):
    """Predict real targets by a network with one Bayesian layer, a cloud of particles.

    Parameters
    ----------
    {shared}
    {own}
    {noise}
    {tail}

    Attributes
    ----------
    {fitted}
    {own_fitted}

    Warns
    -----
    uq.inference.ParticleWarning
        If the particles collapsed, with what to change.

    Notes
    -----
    The noise level is learned with the deterministic weights. As it falls the likelihood of a batch
    gets sharper and fewer particles are left: with some hundred rows take ``batch_size=20``, as the
    paper does, and enough epochs for the noise to come down. "train_loss" is −log p̂ of each batch
    over its rows. The network runs in eval mode throughout.

    References
    ----------
    Z. Zhao, S. Mair, T. B. Schön, J. Sjölund, "On Feynman–Kac training of partial Bayesian neural
    networks", AISTATS 2024, arXiv 2310.19608.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from uq import PartialBNNRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = PartialBNNRegressor(n_particles=100, max_epochs=5, random_state=0).fit(X, y)
    >>> lower, upper = model.predict_interval(X[:3], coverage=0.9)
    >>> bool((lower < upper).all())
    True
    """


for _cls in (PartialBNNClassifier, PartialBNNRegressor):
    _cls.__doc__ = (_cls.__doc__ or "").replace("{own_fitted}", _OWN_ATTRIBUTES)

"""Partial Bayesian networks trained as a Feynman–Kac model: some weights are a cloud of particles.

The weights are φ (stochastic, few: a layer, with prior N(0, s²I)) and ψ (deterministic, the rest
and the noise). ψ is learned by marginal likelihood, φ's posterior as particles Φ_1 … Φ_S of
weights w_j, both in one pass (Z. Zhao, S. Mair, T. B. Schön, J. Sjölund, "On Feynman–Kac training
of partial Bayesian neural networks", AISTATS 2024, arXiv 2310.19608). With ℓ_j the log likelihood
of a batch of M rows at Φ_j, each batch of OHSMC (open-horizon SMC) does

    1. Φ_j ← move(Φ_j)                             2. a_j = log w_j + ℓ_j
    3. ψ ← Adam(ψ, ∇_ψ loss)                       4. w ∝ exp(a), and resample where ESS <= τS
    loss = −(1/M) log Σ_j exp(a_j),       ∇_ψ loss = −(1/M) Σ_j w_j ∇_ψ ℓ_j,

by one forward and one backward pass. That is the Rao–Blackwellised form ("pre") of the paper's mean
over the resampled particles ("post"); the resampled particles' ℓ are those computed before, so
that neither needs a second pass. ℓ is never scaled by N/M: the cloud of OHSMC is that of a filter
whose spread is set by the move and M, wider than p(φ | y_1:N; ψ); :func:`refresh` finds the latter.

SGSMC (stochastic-gradient SMC) restarts from the prior at each batch and takes its rows in one by
one (:class:`uq.inference.smc.SMCSampler` with a DataSchedule), so that w is the exact posterior
given the batch; the gradient is as above. The likelihood that it climbs is that of batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uq.distributions import Predictive
from uq.errors import DataError, ParameterError
from uq.inference.checkpoints import Stage
from uq.inference.pbnn_network import ParticleNetwork, split_network
from uq.inference.posterior import WeightPosterior, Weights, monte_carlo
from uq.inference.resampling import ancestors, normalize, resample_below, unique_share
from uq.inference.smc import DataSchedule, SMCResult, SMCSampler
from uq.inference.smc_moves import HMC, RandomWalk, accept, value_and_gradient
from uq.nn.network import Network

MOVES = ("ou", "rw", "mh", "langevin", "adaptive_rw")
# Of a prediction, in the layers that all particles share: those of images may be large.
_ROWS_AT_ONCE = 512


# -- training --------------------------------------------------------------------------------------


class _ParticleObjective(nn.Module):
    """What OHSMC and SGSMC share: the cloud, its trace, and predictions by it."""

    particles: Tensor
    log_weights: Tensor

    def __init__(
        self,
        network: ParticleNetwork,
        n_particles: int,
        prior_scale: float,
        ess_threshold: float,
        resampling: str,
        generator: torch.Generator,
        weight_factor: float,
    ) -> None:
        super().__init__()
        self.model = network
        self.prior_scale = prior_scale
        self.ess_threshold = ess_threshold
        self.resampling = resampling
        self.generator = generator
        self.weight_factor = weight_factor
        like = next(network.parameters())
        self.register_buffer("particles", self._prior((n_particles,), like))
        uniform = torch.full((n_particles,), -math.log(n_particles), dtype=torch.float64)
        self.register_buffer("log_weights", uniform.to(like.device))
        # A network that is stochastic throughout still needs something for the optimiser.
        self.anchor: nn.Parameter | None = (
            None if network.psi() else nn.Parameter(torch.zeros((), device=like.device))
        )
        self.trace: dict[str, list[Tensor]] = {
            k: [] for k in ("ess", "unique_ancestors", "acceptance", "log_increments", "impossible")
        }

    def trained(self) -> list[nn.Parameter]:
        """Parameters for the optimiser: ψ alone."""
        return self.model.psi() if self.anchor is None else [self.anchor]

    def diagnostics(self) -> dict[str, np.ndarray]:
        """Trace of the steps so far; see :class:`OHSMC`."""
        return {
            name: torch.stack(values).double().cpu().numpy() if values else np.zeros(0)
            for name, values in self.trace.items()
        }

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log predictive density of each row, by the weighted cloud."""
        size = self.model.particles_at_once(x)
        parts = []
        for phi, log_w in zip(
            self.particles.split(size), self.log_weights.split(size), strict=True
        ):
            rows = self.model.log_likelihood_rows(phi, x, y).double()
            parts.append((rows + log_w).logsumexp(1))
        return -torch.stack(parts).logsumexp(0)

    def _prior(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        z = torch.randn(
            *shape, self.model.dim, generator=self.generator, dtype=like.dtype, device=like.device
        )
        return z.mul_(self.prior_scale)

    def _log_prior(self, phi: Tensor) -> Tensor:
        """Log prior density, up to a constant."""
        return -0.5 * (phi / self.prior_scale).square().sum(-1)

    def _likelihood(
        self, phi: Tensor, x: Tensor, y: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log likelihood (S,), and the particles: those where it is NaN are replaced.

        A NaN in the forward pass would be one in the gradient of ψ whatever its weight. So these
        particles become copies of others for that pass, and get weight 0.
        """
        log_l = self.model(phi, x, y, weight)
        bad = ~log_l.isfinite()
        self.trace["impossible"].append(bad.sum())
        if not bool(bad.any()) or bool(bad.all()):
            return log_l, phi
        donor = bad.logical_not().nonzero()[0]
        phi = torch.where(bad[:, None], phi[donor], phi)
        log_l = self.model(phi, x, y, weight)
        return log_l.masked_fill(bad, -math.inf), phi

    def _anchored(self, loss: Tensor) -> Tensor:
        return loss if self.anchor is None else loss + 0 * self.anchor


class OHSMC(_ParticleObjective):
    """Open-horizon SMC: one SMC step a batch, on a cloud that persists.

    A module whose ``forward(x, y, weight)`` moves, weights and resamples its cloud and returns the
    loss for ψ; train it by any optimiser over ``trained()``.

    Parameters
    ----------
    network : ParticleNetwork
        Network and the choice of φ.
    n_particles : int, default=1000
        Number S.
    move : {"ou", "rw", "mh", "langevin", "adaptive_rw"}, default="ou"
        "rw" adds N(0, v I) (the paper's code); "ou" shrinks as well, so that the prior stays
        invariant; "mh" takes Metropolis steps of variance v on log p(φ) + κℓ of the batch before;
        "langevin" an unadjusted Langevin step of length v on the same; "adaptive_rw" adds
        N(0, v Σ̂) with the cloud's covariance Σ̂.
    move_var : float, default=0.01
        Variance v. With a random walk the variance of a weight settles at about
        (√(v² + 4v/(M i)) − v)/2, i the information in a row: v, not N, sets the spread.
    n_move_steps : int, default=10
        Metropolis steps of "mh".
    likelihood_power : float, default=1
        κ of "mh" and "langevin"; N/M would be the scale of the whole data.
    prior_scale : float, default=1
        Standard deviation s of φ's prior.
    ess_threshold : float, default=1
        τ: resample where the effective sample size is at most τS; 1 is at every step.
    resampling : str, default="stratified"
        See :func:`uq.inference.resampling.resample`.
    gradient : {"pre", "post"}, default="pre"
        Weighted mean before resampling, or plain mean after it (same expectation, more variance).
    generator : torch.Generator
        On the device of the network.
    weight_factor : float, default=1
        Factor on the weights of rows: ``forward`` gets them scaled to mean 1.

    Attributes
    ----------
    particles : Tensor of shape (S, D)
    log_weights : Tensor of shape (S,)
    trace : dict of list
        For each step "ess" (over S), "unique_ancestors" (share of distinct ones), "acceptance"
        (moves "mh"), "log_increments" (log p̂ of the batch given those before) and "impossible"
        (particles of NaN likelihood).

    Examples
    --------
    >>> import torch
    >>> from uq.inference import OHSMC, ParticleNetwork, stochastic_names
    >>> from uq.nn import MLP, Network, NormalLikelihood
    >>> x = torch.linspace(-2, 2, 50)[:, None]
    >>> body = MLP(1, (20, 5), 1)
    >>> net = ParticleNetwork(Network(body, NormalLikelihood(1)), stochastic_names(body))
    >>> smc = OHSMC(net, 100, generator=torch.Generator().manual_seed(0))
    >>> optimizer = torch.optim.Adam(smc.trained(), 0.01)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     loss = smc(x, x.sin())
    ...     loss.backward()
    ...     _ = optimizer.step()
    >>> bool(loss < 0.5)
    True
    """

    def __init__(
        self,
        network: ParticleNetwork,
        n_particles: int = 1000,
        *,
        generator: torch.Generator,
        move: str = "ou",
        move_var: float = 0.01,
        n_move_steps: int = 10,
        likelihood_power: float = 1.0,
        prior_scale: float = 1.0,
        ess_threshold: float = 1.0,
        resampling: str = "stratified",
        gradient: str = "pre",
        weight_factor: float = 1.0,
    ) -> None:
        if move not in MOVES:
            raise ParameterError(
                f"OHSMC: move must be one of {', '.join(map(repr, MOVES))}, got {move!r}."
            )
        if gradient not in ("pre", "post"):
            raise ParameterError(f"OHSMC: gradient must be 'pre' or 'post', got {gradient!r}.")
        if move == "ou" and move_var >= prior_scale**2:
            raise ParameterError(
                "OHSMC: with move='ou', move_var must be below prior_scale² = "
                f"{prior_scale**2:.3g}, got {move_var!r}."
            )
        super().__init__(
            network, n_particles, prior_scale, ess_threshold, resampling, generator, weight_factor
        )
        self.move = move
        self.move_var = move_var
        self.n_move_steps = n_move_steps
        self.likelihood_power = likelihood_power
        self.gradient = gradient
        self._previous: tuple[Tensor, Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Take one SMC step on a batch; return the loss, in nats per row."""
        if weight is not None:
            weight = weight * self.weight_factor
        with torch.no_grad():
            phi = self._move(self.particles)
        log_l, phi = self._likelihood(phi, x, y, weight)
        joint = self.log_weights + log_l
        with torch.no_grad():
            weights = normalize(joint.detach())
            chosen, log_w, _ = resample_below(
                weights, self.ess_threshold, self.resampling, self.generator
            )
            # In place: the best epoch is restored into these tensors.
            self.particles.copy_(phi[chosen])
            self.log_weights.copy_(log_w)
            self.trace["ess"].append(weights.ess / len(phi))
            self.trace["unique_ancestors"].append(unique_share(chosen))
            self.trace["log_increments"].append(weights.log_sum)
        # The next move must not see this step's rows twice: it uses them as the batch before.
        self._previous = (x, y, weight)
        if self.gradient == "pre":
            value = joint.logsumexp(0)
        else:  # the resampled particles' likelihoods are those above
            w = log_w.exp()
            value = (w * log_l[chosen].masked_fill(w == 0, 0.0)).sum()
        return self._anchored(-value / (len(x) * self.weight_factor))

    def _move(self, phi: Tensor) -> Tensor:
        v = self.move_var
        if self.move == "rw":
            return phi + math.sqrt(v) * self._noise(phi)
        if self.move == "ou":
            return math.sqrt(1 - v / self.prior_scale**2) * phi + math.sqrt(v) * self._noise(phi)
        if self.move == "adaptive_rw":
            return phi + math.sqrt(v) * self._noise(phi) @ self._covariance_root(phi).T
        if self._previous is None:  # no row has been seen: the cloud is the prior
            return phi.clone()
        if self.move == "langevin":
            _, gradient = value_and_gradient(self._log_target, phi)
            return phi + 0.5 * v * gradient + math.sqrt(v) * self._noise(phi)
        log_p = self._log_target(phi)
        rates = []
        for _ in range(self.n_move_steps):
            proposal = phi + math.sqrt(v) * self._noise(phi)
            log_q = self._log_target(proposal)
            take = accept(log_q - log_p, self.generator)
            phi = torch.where(take[:, None], proposal, phi)
            log_p = torch.where(take, log_q, log_p)
            rates.append(take.double().mean())
        self.trace["acceptance"].append(torch.stack(rates).mean())
        return phi

    def _log_target(self, phi: Tensor) -> Tensor:
        """Log prior + κ times the log likelihood of the batch before."""
        assert self._previous is not None
        return self._log_prior(phi) + self.likelihood_power * self.model(phi, *self._previous)

    def _noise(self, phi: Tensor) -> Tensor:
        return torch.randn(phi.shape, generator=self.generator, dtype=phi.dtype, device=phi.device)

    def _covariance_root(self, phi: Tensor) -> Tensor:
        """Cholesky root of the weighted covariance, divided by 1 − Σw²."""
        w = self.log_weights.exp().to(phi.dtype)
        centered = phi - w @ phi
        cov = (w[:, None] * centered).T @ centered / (1 - w.square().sum()).clamp(min=1e-6)
        ridge = 1e-5 * cov.diagonal().mean() + 1e-12
        root, info = torch.linalg.cholesky_ex(cov + ridge * torch.eye(len(cov)).to(cov))
        return torch.where(info == 0, root, torch.diag_embed((cov.diagonal() + ridge).sqrt()))


class SGSMC(_ParticleObjective):
    """Stochastic-gradient SMC: at each batch, IBIS from the prior through its rows.

    Metropolis moves follow only where particles are resampled, with the covariance of the cloud.

    Parameters
    ----------
    network, n_particles, generator, prior_scale, resampling, gradient, weight_factor
        As in :class:`OHSMC`.
    n_move_steps : int, default=10
        Metropolis steps after each resampling.
    ess_threshold : float, default=0.5
        Resample where the effective sample size is at most this share of the particles.

    Notes
    -----
    A batch of M rows costs about n_move_steps · M/3 passes over it. The cloud is the posterior
    given the last batch alone: use :func:`refresh` after training.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import SGSMC, ParticleNetwork, stochastic_names
    >>> from uq.nn import MLP, Network, NormalLikelihood
    >>> x = torch.linspace(-2, 2, 20)[:, None]
    >>> body = MLP(1, (10, 4), 1)
    >>> net = ParticleNetwork(Network(body, NormalLikelihood(1)), stochastic_names(body))
    >>> smc = SGSMC(net, 50, generator=torch.Generator().manual_seed(0), n_move_steps=2)
    >>> loss = smc(x, x.sin())  # nats per row
    >>> loss.backward()
    >>> smc.particles.shape  # 10 · 4 weights and 4 biases
    torch.Size([50, 44])
    """

    def __init__(
        self,
        network: ParticleNetwork,
        n_particles: int = 1000,
        *,
        generator: torch.Generator,
        n_move_steps: int = 10,
        prior_scale: float = 1.0,
        ess_threshold: float = 0.5,
        resampling: str = "stratified",
        gradient: str = "pre",
        weight_factor: float = 1.0,
    ) -> None:
        super().__init__(
            network, n_particles, prior_scale, ess_threshold, resampling, generator, weight_factor
        )
        self.gradient = gradient
        self.kernel: RandomWalk = RandomWalk(n_move_steps)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Find the posterior given a batch; return the loss, in nats per row."""
        if weight is not None:
            weight = weight * self.weight_factor

        def log_likelihood(phi: Tensor, rows: slice) -> Tensor:
            part = None if weight is None else weight[rows]
            return self.model(phi[0], x[rows], y[rows], part)[None]

        def sample_prior(shape: tuple[int, ...], _: torch.Generator) -> Tensor:
            return self._prior(shape, self.particles)

        sampler = SMCSampler(
            sample_prior,
            self._log_prior,
            log_likelihood,
            self.kernel,
            n_particles=len(self.particles),
            schedule=DataSchedule(len(x)),
            ess_threshold=self.ess_threshold,
            resampling=self.resampling,
        )
        state = sampler._start(self.generator)
        try:
            for _ in sampler._walk(state, self.generator):
                pass
        except DataError:  # no particle is possible: let the loss say so
            return self._anchored(self.model(self.particles, x, y, weight).sum() * math.nan)
        result = sampler._finish(state, interrupted=False)
        self.particles.copy_(result.particles)
        self.log_weights.copy_(result.log_weights)
        log_l, _ = self._likelihood(result.particles, x, y, weight)
        with torch.no_grad():
            self.trace["ess"].append(result.ess.min())
            self.trace["unique_ancestors"].append(result.unique_ancestors.min())
            self.trace["acceptance"].append(result.acceptance.nanmean())
            self.trace["log_increments"].append(result.log_evidence)
            w = result.log_weights.exp()
            if self.gradient == "post":
                chosen = ancestors(result.log_weights, self.resampling, len(w), self.generator)
                w = torch.bincount(chosen, minlength=len(w)).double() / len(w)
        # Its gradient is that of log p(batch; ψ), and its value log p̂ as well.
        weighted = (w * log_l.masked_fill(w == 0, 0.0)).sum()
        value = weighted - weighted.detach() + result.log_evidence
        return self._anchored(-value / (len(x) * self.weight_factor))


def refresh(
    network: ParticleNetwork,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    *,
    n_particles: int = 1000,
    prior_scale: float = 1.0,
    generator: torch.Generator,
    checkpoint: Stage | None = None,
) -> SMCResult:
    """Sample p(φ | all rows; ψ) by tempered SMC with HMC moves, and estimate p(all rows; ψ).

    Parameters
    ----------
    network : ParticleNetwork
        Its ψ is held fixed.
    x, y, weight : Tensor
        All rows.
    n_particles, prior_scale, generator
        As in :class:`OHSMC`.
    checkpoint : Stage, optional
        As in :meth:`uq.inference.SMCSampler.run`.

    Returns
    -------
    SMCResult
    """
    like = next(network.parameters())

    def sample_prior(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
        return prior_scale * torch.randn(
            *shape, network.dim, generator=g, dtype=like.dtype, device=like.device
        )

    return SMCSampler(
        sample_prior,
        lambda phi: -0.5 * (phi / prior_scale).square().sum(-1),
        lambda phi: network(phi[0], x, y, weight)[None],
        HMC(),
        n_particles=n_particles,
    ).run(generator=generator, checkpoint=checkpoint)


# -- posterior -------------------------------------------------------------------------------------


class PartialPosterior(WeightPosterior):
    """Equally weighted particles of some weights of a network; the others are points.

    Parameters
    ----------
    network : Network
        Holds ψ.
    names : list of str
        Parameters of its body that are φ.
    particles : Tensor of shape (S, D)
        Values of φ, flattened in the order of ``names``.
    seed : int, default=0
        Seed of the draws: predicting twice gives the same numbers.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import PartialPosterior
    >>> from uq.nn import MLP, CategoricalLikelihood, Network
    >>> network = Network(MLP(2, (4,), 2), CategoricalLikelihood(2))
    >>> biases = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # two particles of the last bias
    >>> posterior = PartialPosterior(network, ["2.bias"], biases)
    >>> posterior(torch.zeros(3, 2)).n_draws
    2
    """

    particles: Tensor

    def __init__(
        self, network: Network, names: list[str], particles: Tensor, seed: int = 0
    ) -> None:
        super().__init__(network, seed)
        self._names = names
        self.register_buffer("particles", particles)

    @property
    def max_draws(self) -> int:
        """Number of particles held."""
        return len(self.particles)

    def draws(self, n: int | None = None) -> Weights:
        """``n`` evenly spaced particles (all by default), by parameter name.

        Particles lie in the order of their ancestors, so that an even choice is systematic
        resampling.
        """
        total = len(self.particles)
        phi = self.particles
        if n is not None and n < total:
            phi = phi[torch.arange(n, device=phi.device) * total // n]
        own = dict(self.network.body.named_parameters())
        shapes = [own[name].shape for name in self._names]
        parts = phi.split([shape.numel() for shape in shapes], -1)
        return {
            f"body.{name}": part.reshape(-1, *shape)
            for name, part, shape in zip(self._names, parts, shapes, strict=True)
        }

    def forward(self, x: Tensor, n_samples: int = 64) -> Predictive:
        """Mixture over ``n_samples`` particles, evenly chosen (all where there are fewer)."""
        n = min(n_samples, self.max_draws)
        draw = self.sampler(n, self.generator(x.device))
        before, network = split_network(self.network, self._names)
        with torch.no_grad():
            # Once for all particles, in parts that bound the memory.
            h = (
                torch.cat([before(part) for part in x.split(_ROWS_AT_ONCE)])
                if len(x)
                else before(x)
            )
        return network.likelihood.predictive(monte_carlo(network, draw, n, h))

    def functions(self, x: Tensor, n: int) -> Tensor:
        """Evaluate particles chosen at random; see :meth:`Posterior.functions`."""
        dist: Any = self(x, self.max_draws)
        values: Tensor = dist.logits.exp() if hasattr(dist, "logits") else dist.loc
        g = torch.Generator().manual_seed(int(self.seed))
        return values[torch.randperm(len(values), generator=g)[:n]]

    def sampler(self, n: int, generator: torch.Generator) -> Callable[[int], Weights]:
        """Hand out ``n`` evenly chosen particles in order."""
        draws, position = self.draws(n), 0

        def draw(k: int) -> Weights:
            nonlocal position
            position += k
            return {name: t[position - k : position] for name, t in draws.items()}

        return draw

"""Sequential Monte Carlo samplers: a cloud of particles goes from the prior to the posterior.

The posterior is reached through targets that change little from one to the next,

    tempering (Neal 2001; Del Moral, Doucet, Jasra 2006)   π_t(θ) ∝ p(θ) p(y | θ)^λ_t,  λ: 0 → 1
    data by data (Chopin 2002, "IBIS")                      π_t(θ) ∝ p(θ) p(y_1:t | θ)

At each the particles are weighted by π_t/π_{t−1}, resampled where the effective sample size falls
below τS, and moved by a Markov kernel that leaves π_t invariant. The product of the mean weights
is an unbiased estimate of p(y) for a fixed schedule. Its standard error from a single run follows
A. Lee, N. Whiteley, "Variance estimation in the particle filter", Biometrika 2018: with E_i the
prior particle that particle i descends from and r multinomial resamplings,

    Var(Ẑ)/Z² ≈ 1 − (S/(S−1))^{r+1} (1 − Σ_e (Σ_{i: E_i = e} W_i)²).

The other schemes add little noise of their own; r = 0, the variance between families of particles
that descend from one, is then on the safe side.

The step of temperature is the largest whose incremental weights keep an effective size of τS
(A. Jasra et al., "Inference for Lévy-driven stochastic volatility models via adaptive SMC", 2011).

All of it runs on (R, S, D) tensors: R independent runs, each with temperatures, steps and
resamplings of its own, at the cost of one with R·S particles.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from uq.errors import DataError, ParameterError
from uq.inference import checkpoints
from uq.inference.resampling import (
    ParticleWarning,
    ancestors,
    check_scheme,
    normalize,
    resample_below,
    take,
    unique_share,
)
from uq.inference.smc_moves import LogDensity, Move, RandomWalk, check_count
from uq.inference.training import obey, stops, warn_interrupted

# A cloud is taken as collapsed below this effective number of particles or rate of acceptance.
_FEW_PARTICLES = 5
_STUCK = 0.01
_SMALLEST_STEP = 1e-10


# -- paths from prior to posterior ---------------------------------------------------------------


@dataclass(frozen=True)
class DataSchedule:
    """Rows enter the likelihood a few at a time (IBIS).

    Parameters
    ----------
    n_rows : int
        Number of rows in all.
    batch_size : int, default=1
        Rows that enter together.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import DataSchedule, SMCSampler
    >>> y = torch.full((10,), 2.0)
    >>> sampler = SMCSampler(
    ...     lambda shape, g: torch.randn(*shape, 1, generator=g),
    ...     lambda theta: -0.5 * theta.square().sum(-1),
    ...     lambda theta, rows: -0.5 * (y[rows] - theta).square().sum(-1),
    ...     schedule=DataSchedule(n_rows=10, batch_size=2),
    ... )
    >>> result = sampler.run(seed=0)
    >>> result.temperatures  # share of the rows that are in
    tensor([0.2000, 0.4000, 0.6000, 0.8000, 1.0000], dtype=torch.float64)
    >>> abs(float(result.resample(500).mean()) - 20 / 11) < 0.1  # posterior N(20/11, 1/11)
    True
    """

    n_rows: int
    batch_size: int = 1


@dataclass
class SMCResult:
    """What a run of :class:`SMCSampler` found. With ``n_runs`` there is an axis of runs in front.

    Entries that have one value for each target are ordered as the targets were.

    See Also
    --------
    SMCSampler.run : makes one; its class has an example.
    """

    particles: Any
    """Tensor (S, D); for a Pyro model a dict of site values (S, …) in the model's space."""
    log_weights: Tensor
    """Normalised, shape (S,)."""
    log_evidence: Tensor
    """Estimate of log p(y), in nats."""
    log_evidence_se: Tensor
    """Standard error of it, from the genealogy of this run; on the safe side unless resampling is
    multinomial, and towards 1 as ``founders`` run out."""
    temperatures: Tensor
    """Temperature of each target, or share of the rows in it; (targets,)."""
    ess: Tensor
    """Effective sample size over S at each target, before resampling."""
    acceptance: Tensor
    """Share of accepted moves at each target; NaN where nothing was moved."""
    founders: Tensor
    """Share of the prior's particles that have descendants, at each target."""
    unique_ancestors: Tensor
    """Share of distinct ancestors in each resampling; 1 where there was none."""
    interrupted: bool = False
    """Whether an interrupt ended the run: particles are then of the last target reached."""

    def resample(self, n: int, generator: torch.Generator | None = None) -> Any:
        """Draw ``n`` particles of equal weight (systematic resampling)."""
        chosen = ancestors(self.log_weights, "systematic", n, generator)
        if isinstance(self.particles, dict):
            return {k: take(v, chosen) for k, v in self.particles.items()}
        return take(self.particles, chosen)

    def diagnostics(self) -> dict[str, Any]:
        """Return all but the particles as NumPy arrays."""
        names = ("temperatures", "ess", "acceptance", "founders", "unique_ancestors")
        found: dict[str, Any] = {name: getattr(self, name).cpu().numpy() for name in names}
        for name in ("log_evidence", "log_evidence_se"):
            value = getattr(self, name).cpu().numpy()
            found[name] = value if value.ndim else float(value)
        return found


@dataclass
class _State:
    """Particles of all runs between two targets."""

    theta: Tensor  # (R, S, D)
    log_weights: Tensor  # (R, S)
    founders: Tensor  # (R, S)
    log_evidence: Tensor  # (R,)
    n_resampled: Tensor  # (R,)
    trace: dict[str, list[Tensor]] = field(
        default_factory=lambda: {
            k: [] for k in ("temperatures", "ess", "acceptance", "founders", "unique_ancestors")
        }
    )


class SMCSampler:
    """Sample a posterior and estimate its evidence by sequential Monte Carlo.

    Parameters
    ----------
    sample_prior : callable
        ``sample_prior(shape, generator)`` gives prior draws of shape ``(*shape, D)``.
    log_prior : callable
        Maps (R, S, D) to log prior densities (R, S).
    log_likelihood : callable
        Maps (R, S, D) to log likelihoods (R, S); with a :class:`DataSchedule`
        ``log_likelihood(theta, rows)`` with a slice of rows.
    move : callable, optional
        Markov kernel: :class:`RandomWalk` (the default), :class:`HMC`, or a function
        ``(theta, log_target, generator) -> (theta, acceptance)``.
    n_particles : int, default=1000
        Particles S of a run; the error of the evidence falls as 1/√S.
    n_runs : int, optional
        Independent runs in one batch; results then have an axis of runs in front.
    schedule : "adaptive", sequence of float or DataSchedule, default="adaptive"
        Temperatures: chosen on the way, given (increasing to 1), or rows one by one.
    ess_threshold : float, default=0.5
        Resample where the effective sample size is at most this share of S, and what an adaptive
        step of temperature keeps. The evidence is exactly unbiased for a given schedule only; the
        bias of an adaptive one is of order 1/S.
    resampling : {"systematic", "stratified", "residual", "multinomial"}, default="systematic"
        See :func:`uq.inference.resampling.resample`.

    Raises
    ------
    ParameterError
        If an argument is out of its range.

    See Also
    --------
    SMCSampler.from_pyro : the same for a Pyro model.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import SMCSampler
    >>> normal = torch.distributions.Normal(0.0, 1.0)
    >>> sampler = SMCSampler(
    ...     lambda shape, g: torch.randn(*shape, 1, generator=g),
    ...     lambda theta: normal.log_prob(theta).sum(-1),
    ...     lambda theta: normal.log_prob(theta[..., 0] - 2.0),
    ... )
    >>> result = sampler.run(seed=0)  # y = 2: evidence N(2; 0, 2), posterior N(1, 1/2)
    >>> abs(float(result.log_evidence) + 2.2655) < 0.2
    True
    >>> abs(float(result.resample(500).mean()) - 1) < 0.2
    True
    """

    def __init__(
        self,
        sample_prior: Callable[[tuple[int, ...], torch.Generator], Tensor],
        log_prior: LogDensity,
        log_likelihood: Callable[..., Tensor],
        move: Move | None = None,
        *,
        n_particles: int = 1000,
        n_runs: int | None = None,
        schedule: Literal["adaptive"] | Sequence[float] | DataSchedule = "adaptive",
        ess_threshold: float = 0.5,
        resampling: str = "systematic",
    ) -> None:
        check_count("SMCSampler", n_particles=n_particles)
        if n_runs is not None:
            check_count("SMCSampler", n_runs=n_runs)
        if not 0 < ess_threshold <= 1 or (schedule == "adaptive" and ess_threshold == 1):
            raise ParameterError(
                "SMCSampler: ess_threshold must be a number in (0, 1], and below 1 with an "
                f"adaptive schedule, got {ess_threshold!r}."
            )
        if isinstance(schedule, DataSchedule):
            check_count("DataSchedule", n_rows=schedule.n_rows, batch_size=schedule.batch_size)
        elif schedule != "adaptive":
            schedule = _temperatures(schedule)
        if schedule == "adaptive" and n_particles < 2:
            raise ParameterError(
                "SMCSampler: an adaptive schedule needs n_particles >= 2, got 1; give temperatures."
            )
        check_scheme(resampling, "SMCSampler")
        self.sample_prior = sample_prior
        self.log_prior = log_prior
        self.log_likelihood = log_likelihood
        self.move: Move = RandomWalk() if move is None else move
        self.n_particles = n_particles
        self.n_runs = n_runs
        self.schedule = schedule
        self.ess_threshold = ess_threshold
        self.resampling = resampling
        self._constrain: Callable[[Tensor], dict[str, Tensor]] | None = None

    @classmethod
    def from_pyro(cls, model: Callable[..., Any], *args: Any, **settings: Any) -> SMCSampler:
        """Build a sampler for a Pyro model; see ``uq.inference.smc_pyro.pyro_densities``.

        Parameters
        ----------
        model : callable
            Pyro model with continuous latent sites and observed ones, called as ``model(*args)``.
        *args
            Of the model.
        **settings
            ``move``, ``n_particles``, ``schedule`` and so on. ``model_kwargs`` (a dict) goes to the
            model.

        Returns
        -------
        SMCSampler
            Its result holds a dict of site values in the model's own space.

        Examples
        --------
        >>> import pyro, pyro.distributions as dist, torch
        >>> from uq.inference import SMCSampler
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Exponential(rate), obs=y)
        >>> y = torch.tensor([0.5, 1.0, 1.5])
        >>> result = SMCSampler.from_pyro(model, y, n_particles=500).run(seed=0)
        >>> result.particles["rate"].shape  # posterior Gamma(5, 4), evidence 4! / 4^5
        torch.Size([500])
        >>> abs(float(result.log_evidence) + 3.7534) < 0.2
        True
        """
        from uq.inference.smc_pyro import pyro_densities

        sample_prior, log_prior, log_likelihood, constrain = pyro_densities(
            model, args, settings.pop("model_kwargs", {})
        )
        sampler = cls(sample_prior, log_prior, log_likelihood, **settings)
        sampler._constrain = constrain
        return sampler

    def run(
        self,
        seed: int | None = None,
        *,
        generator: torch.Generator | None = None,
        checkpoint: checkpoints.Stage | None = None,
    ) -> SMCResult:
        """Take the particles from the prior to the posterior.

        Parameters
        ----------
        seed : int, optional
            Of everything random; the same seed gives the same particles. 0 by default.
        generator : torch.Generator, optional
            In place of a seed, on the device of the particles.
        checkpoint : Stage, optional
            Where to write the particles now and then, and to go on from, to the same bits. A
            ``move`` of your own must remember nothing from one target to the next.

        Returns
        -------
        SMCResult

        Raises
        ------
        DataError
            If the prior or the likelihood gives the wrong shape, or no particle of a run has a
            finite likelihood.

        Warns
        -----
        ParticleWarning
            If the cloud collapsed, so that neither particles nor evidence can be trusted.
        FitInterruptedWarning
            If an interrupt ended the run; what was reached is returned.
        """
        if generator is None:
            generator = torch.Generator().manual_seed(0 if seed is None else seed)
        state = self._start(generator)
        move = {"move": self.move}
        saved, _ = (None, False) if checkpoint is None else checkpoint.load()
        if saved is not None:
            device = state.theta.device
            trace = {k: list(v.to(device)) for k, v in saved["state"].pop("trace").items()}
            particles = {k: v.to(device) for k, v in saved["state"].items()}
            state = _State(**particles, trace=trace)
            steps = {
                k: v.to(device) if isinstance(v, Tensor) else v for k, v in saved["move"].items()
            }
            checkpoints.put_back(move, steps)
            generator.set_state(saved["generator"])

        def now() -> dict[str, Any]:
            own = {"move": checkpoints.take(move), "generator": generator.get_state()}
            trace = {k: torch.stack(v) for k, v in state.trace.items()}
            return own | {"state": vars(state) | {"trace": trace}}

        interrupted = False
        try:
            with stops(checkpoint) as stop:
                for n in self._walk(state, generator):
                    if checkpoint is not None and (stop.asked or checkpoint.due(n)):
                        checkpoint.save(n, now())
                    obey(stop, "SMCSampler")
            if checkpoint is not None:
                checkpoint.finish(now())
        except KeyboardInterrupt:
            if not state.trace["ess"]:
                raise  # no target was reached: there is nothing to keep
            interrupted = True
            reached = float(state.trace["temperatures"][-1].min())
            kept = f"the particles of the last target, {reached:.3g} of the way, are kept"
            warn_interrupted("SMCSampler", kept)
        result = self._finish(state, interrupted)
        self._warn(result)
        return result

    # -- steps -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _walk(self, state: _State, generator: torch.Generator) -> Iterator[int]:
        """Go on from ``state``; yields the number of targets reached."""
        if isinstance(self.schedule, DataSchedule):
            steps = self._through_data(state, self.schedule, generator)
        else:
            steps = self._through_temperatures(state, generator)
        for _ in steps:
            yield len(state.trace["ess"])

    def _start(self, generator: torch.Generator) -> _State:
        runs, n = self.n_runs or 1, self.n_particles
        theta = self.sample_prior((runs, n), generator)
        if theta.ndim != 3 or theta.shape[:2] != (runs, n) or not theta.is_floating_point():
            raise DataError(
                f"SMCSampler: sample_prior(({runs}, {n}), generator) must give floats of shape "
                f"({runs}, {n}, D), got {tuple(theta.shape)} of {theta.dtype}."
            )
        zeros = torch.zeros(runs, dtype=torch.float64, device=theta.device)
        return _State(
            theta,
            zeros[:, None].expand(runs, n) - math.log(n),
            torch.arange(n, device=theta.device).expand(runs, n),
            zeros,
            zeros,
        )

    def _evaluate(self, theta: Tensor, rows: slice | None) -> Tensor:
        log_l = self.log_likelihood(theta) if rows is None else self.log_likelihood(theta, rows)
        if log_l.shape != theta.shape[:2]:
            raise DataError(
                f"SMCSampler: log_likelihood must give one number a particle, shape "
                f"{tuple(theta.shape[:2])}, got {tuple(log_l.shape)}."
            )
        return log_l

    def _through_temperatures(self, state: _State, generator: torch.Generator) -> Iterator[None]:
        seen = state.trace["temperatures"]
        now = seen[-1] if seen else torch.zeros_like(state.log_evidence)
        given = None if self.schedule == "adaptive" else list(self.schedule)[len(seen) :]  # type: ignore[arg-type]
        while bool((now < 1).any()):
            log_l = _usable(self._evaluate(state.theta, None))
            if given is None:
                following = _next_temperature(state.log_weights, log_l, now, self.ess_threshold)
            else:
                following = torch.full_like(now, given.pop(0))
            # A finished run has an increment of zero: 0 · −inf would be NaN.
            step = (following - now)[:, None]
            increment = torch.where(step > 0, step * log_l, 0.0)
            now = following

            def log_target(theta: Tensor, power: Tensor = now) -> Tensor:
                power = power[:, None].to(theta.dtype)
                return self.log_prior(theta) + power * self._evaluate(theta, None)

            self._advance(state, increment, now, log_target, generator)
            yield

    def _through_data(
        self, state: _State, schedule: DataSchedule, generator: torch.Generator
    ) -> Iterator[None]:
        n_seen = len(state.trace["ess"]) * schedule.batch_size
        for start in range(n_seen, schedule.n_rows, schedule.batch_size):
            stop = min(start + schedule.batch_size, schedule.n_rows)
            increment = _usable(self._evaluate(state.theta, slice(start, stop)))

            def log_target(theta: Tensor, seen: slice = slice(0, stop)) -> Tensor:
                return self.log_prior(theta) + self._evaluate(theta, seen)

            share = torch.full_like(state.log_evidence, stop / schedule.n_rows)
            self._advance(state, increment, share, log_target, generator)
            yield

    def _advance(
        self,
        state: _State,
        increment: Tensor,
        reached: Tensor,
        log_target: LogDensity,
        generator: torch.Generator,
    ) -> None:
        """Weight by ``increment``, resample where that is needed, then move."""
        weights = normalize(state.log_weights + increment)
        if bool(weights.degenerate.any()):
            raise DataError(
                "SMCSampler: no particle has a finite log likelihood (all weights are zero, in "
                f"{int(weights.degenerate.sum())} of {len(reached)} runs). Look for NaN in the "
                "data or in log_likelihood; otherwise take a prior closer to the data, or more "
                "particles."
            )
        chosen, log_w, resampled = resample_below(
            weights, self.ess_threshold, self.resampling, generator
        )
        theta = take(state.theta, chosen)
        acceptance = torch.full_like(reached, math.nan)
        # Where no run was resampled there is nothing to diversify.
        if bool(resampled.any()):
            moved, rate = self.move(theta, log_target, generator)
            theta = torch.where(resampled[:, None, None], moved, theta)
            acceptance = torch.where(resampled, rate.to(acceptance), math.nan)
        # All at once, so that an interrupt leaves one target or the next.
        state.theta, state.log_weights = theta, log_w
        state.founders = state.founders.gather(-1, chosen)
        state.log_evidence = state.log_evidence + weights.log_sum
        state.n_resampled = state.n_resampled + resampled
        n = theta.shape[1]
        distinct = (state.founders.sort(-1).values.diff() > 0).sum(-1) + 1
        entries = (reached, weights.ess / n, acceptance, distinct / n, unique_share(chosen))
        for values, entry in zip(state.trace.values(), entries, strict=True):
            values.append(entry.double())

    def _finish(self, state: _State, interrupted: bool) -> SMCResult:
        share = torch.zeros_like(state.log_weights)
        share.scatter_add_(-1, state.founders, state.log_weights.exp())
        n = self.n_particles
        noisy = state.n_resampled if self.resampling == "multinomial" else 0
        factor = (n / max(1, n - 1)) ** (noisy + 1)
        relative = 1 - factor * (1 - share.square().sum(-1))
        error = relative.clamp(min=0).sqrt()
        if n == 1:
            error = torch.full_like(error, math.nan)
        traces = {name: torch.stack(values) for name, values in state.trace.items()}
        particles: Any = state.theta
        if self._constrain is not None:
            particles = self._constrain(state.theta)
        parts = {
            "log_weights": state.log_weights,
            "log_evidence": state.log_evidence,
            "log_evidence_se": error,
        }
        if self.n_runs is None:
            parts = {k: v[0] for k, v in parts.items()}
            traces = {k: v[:, 0] for k, v in traces.items()}
            if isinstance(particles, dict):
                particles = {k: v[0] for k, v in particles.items()}
            else:
                particles = particles[0]
        return SMCResult(particles, **parts, **traces, interrupted=interrupted)

    def _warn(self, result: SMCResult) -> None:
        n = self.n_particles
        acceptance = float(result.acceptance.nan_to_num(nan=1.0).min())
        ess = float(result.ess.min())
        if acceptance < _STUCK or ess * n < min(_FEW_PARTICLES, n / 2):
            why = (
                f"at some target moves were accepted at a rate of {acceptance:.2g}"
                if acceptance < _STUCK
                else f"at some target the weights were those of {ess * n:.1f} of {n} particles"
            )
            warnings.warn(
                f"SMCSampler: the cloud collapsed ({why}); neither the particles nor the evidence "
                "can be trusted. Take more particles, smaller steps (schedule='adaptive' with a "
                "higher ess_threshold, or fewer rows at a time), better moves (HMC(n_steps=…), "
                "RandomWalk(n_steps=…)), or a prior closer to the data.",
                ParticleWarning,
                stacklevel=3,
            )


def _usable(log_l: Tensor) -> Tensor:
    """Log likelihood in float64, with −inf where it is NaN."""
    return torch.nan_to_num(log_l.double(), nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def _next_temperature(log_weights: Tensor, log_l: Tensor, now: Tensor, threshold: float) -> Tensor:
    """Largest temperature of each run whose weights keep an effective size of threshold · S.

    The size is that of the increments: for particles of equal weights, the usual one.
    """
    # Impossible particles cost the same at any temperature; only the others choose it.
    possible = log_l > -math.inf
    log_w = log_weights.masked_fill(~possible, -math.inf)
    log_l = log_l.masked_fill(~possible, 0.0)

    def size(step: Tensor) -> Tensor:
        increment = step[:, None] * log_l
        # (Σ W u)² / Σ W u², in units of the cloud.
        return (2 * (log_w + increment).logsumexp(-1) - (log_w + 2 * increment).logsumexp(-1)).exp()

    limit = threshold * log_w.logsumexp(-1).exp()
    low, high = torch.zeros_like(now), 1 - now
    done = size(high) >= limit
    for _ in range(40):
        middle = (low + high) / 2
        good = size(middle) >= limit
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    # The upper end: its size is just below the limit, so that the cloud is resampled.
    step = torch.where(done, 1 - now, high.clamp(min=_SMALLEST_STEP))
    return torch.where(done, 1.0, now + step).clamp(max=1.0)


def _temperatures(schedule: Any) -> list[float]:
    try:
        values = [float(t) for t in schedule]
    except (TypeError, ValueError):
        values = []
    increasing = all(a < b for a, b in zip([0.0, *values], values, strict=False))
    if isinstance(schedule, str) or not values or not increasing or values[-1] != 1:
        raise ParameterError(
            "SMCSampler: schedule must be 'adaptive', temperatures that increase from above 0 to "
            f"1, or a DataSchedule, got {schedule!r}."
        )
    return values

"""Markov kernels that move the particles of :class:`uq.inference.smc.SMCSampler`.

Each leaves its target invariant, takes particles of independent runs as (R, S, D), and has a step
of its own in each run, which follows the acceptance rate between targets only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from uq.errors import ParameterError

LogDensity = Callable[[Tensor], Tensor]


class Move(Protocol):
    """Markov kernel on particles."""

    def __call__(
        self, theta: Tensor, log_target: LogDensity, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Move particles (R, S, D), leaving ``log_target`` invariant.

        Returns them and the share of accepted moves of each run, (R,).
        """
        ...


class RandomWalk:
    """Random-walk Metropolis with the covariance of the particles.

    The proposal is Normal with covariance s² Σ̂ of each run; s starts at 2.38/√D and follows the
    acceptance rate from one target to the next, never within one.

    Parameters
    ----------
    n_steps : int, default=10
        Metropolis steps at each target.
    covariance : {"dense", "diagonal"}, default="dense"
        Of the proposal. Diagonal where D exceeds the number of particles.
    scale : float, optional
        Fixes s, without adaptation.

    Raises
    ------
    ParameterError
        If ``n_steps`` is no integer of at least 1, or ``covariance`` is neither.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import RandomWalk, SMCSampler
    >>> sampler = SMCSampler(
    ...     lambda shape, g: torch.randn(*shape, 2, generator=g),
    ...     lambda theta: -0.5 * theta.square().sum(-1),
    ...     lambda theta: -0.5 * (theta - 1.0).square().sum(-1),
    ...     RandomWalk(n_steps=5, covariance="diagonal"),
    ...     n_particles=500,
    ... )
    >>> bool((sampler.run(seed=0).resample(500).mean(0) - 0.5).abs().max() < 0.1)  # N(1/2, 1/2)
    True
    """

    def __init__(
        self,
        n_steps: int = 10,
        covariance: Literal["dense", "diagonal"] = "dense",
        scale: float | None = None,
    ) -> None:
        check_count("RandomWalk", n_steps=n_steps)
        if covariance not in ("dense", "diagonal"):
            raise ParameterError(
                f"RandomWalk: covariance must be 'dense' or 'diagonal', got {covariance!r}."
            )
        self.n_steps = n_steps
        self.covariance = covariance
        self.fixed = scale
        self.log_scale: Tensor | None = None

    def __call__(
        self, theta: Tensor, log_target: LogDensity, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Move by ``n_steps`` Metropolis steps."""
        runs, _, d = theta.shape
        if self.log_scale is None or len(self.log_scale) != runs:
            start = 2.38 / math.sqrt(d) if self.fixed is None else self.fixed
            self.log_scale = theta.new_full((runs,), math.log(start))
        root = self._root(theta) * self.log_scale.exp()[:, None, None]
        log_p = log_target(theta)
        accepted = theta.new_zeros(runs)
        for _ in range(self.n_steps):
            noise = _normal(theta, generator)
            proposal = theta + (noise @ root.mT if root.shape[-2] == d else noise * root)
            log_q = log_target(proposal)
            take = accept(log_q - log_p, generator)
            theta = torch.where(take[..., None], proposal, theta)
            log_p = torch.where(take, log_q, log_p)
            accepted += take.to(theta.dtype).mean(-1)
        rate = accepted / self.n_steps
        if self.fixed is None:
            self.log_scale = self.log_scale + 2 * (rate - (0.44 if d == 1 else 0.234))
        return theta, rate

    def _root(self, theta: Tensor) -> Tensor:
        """Root of the covariance, (R, D, D), or standard deviations, (R, 1, D)."""
        _, n, d = theta.shape
        centered = theta - theta.mean(1, keepdim=True)
        variance = centered.square().mean(1).clamp(min=1e-12)
        if self.covariance == "diagonal" or d >= n:
            return variance.sqrt()[:, None] if d > 1 else variance.sqrt()[..., None]
        cov = centered.mT @ centered / n + torch.diag_embed(1e-6 * variance)
        root, info = torch.linalg.cholesky_ex(cov)
        fallback = torch.diag_embed(variance.sqrt())
        return torch.where((info == 0)[:, None, None], root, fallback)


class HMC:
    """Hamiltonian Monte Carlo with the inverse variances of the particles as masses.

    Parameters
    ----------
    n_leapfrog : int, default=10
        Leapfrog steps of a trajectory.
    n_steps : int, default=2
        Trajectories at each target.
    target_accept : float, default=0.8
        The step size follows it from one target to the next, never within one.

    Notes
    -----
    Densities must be differentiable by autograd. Steps vary by ±20 % from trajectory to trajectory,
    so that none closes on itself.

    Raises
    ------
    ParameterError
        If ``n_leapfrog`` or ``n_steps`` is no integer of at least 1.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import HMC, SMCSampler
    >>> sampler = SMCSampler(
    ...     lambda shape, g: torch.randn(*shape, 2, generator=g),
    ...     lambda theta: -0.5 * theta.square().sum(-1),
    ...     lambda theta: -0.5 * (theta - 1.0).square().sum(-1),
    ...     HMC(n_leapfrog=5),
    ...     n_particles=500,
    ... )
    >>> bool((sampler.run(seed=0).resample(500).mean(0) - 0.5).abs().max() < 0.1)  # N(1/2, 1/2)
    True
    """

    def __init__(self, n_leapfrog: int = 10, n_steps: int = 2, target_accept: float = 0.8) -> None:
        check_count("HMC", n_leapfrog=n_leapfrog, n_steps=n_steps)
        self.n_leapfrog = n_leapfrog
        self.n_steps = n_steps
        self.target_accept = target_accept
        self.log_step: Tensor | None = None

    def __call__(
        self, theta: Tensor, log_target: LogDensity, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Move by ``n_steps`` trajectories."""
        runs, _, d = theta.shape
        if self.log_step is None or len(self.log_step) != runs:
            self.log_step = theta.new_full((runs,), math.log(0.5 * d**-0.25))
        scale = theta.var(1, correction=0, keepdim=True).clamp(min=1e-12).sqrt()
        log_p, gradient = value_and_gradient(log_target, theta)
        accepted = theta.new_zeros(runs)
        for _ in range(self.n_steps):
            jitter = torch.empty(runs, dtype=theta.dtype, device=theta.device)
            jitter.uniform_(0.8, 1.2, generator=generator)
            step = (self.log_step.exp() * jitter)[:, None, None]
            momentum = _normal(theta, generator)
            # In coordinates of standard deviation 1: θ = scale · z.
            position, p, g = theta, momentum, gradient
            for _ in range(self.n_leapfrog):
                p = p + 0.5 * step * scale * g
                position = position + step * scale * p
                log_q, g = value_and_gradient(log_target, position)
                p = p + 0.5 * step * scale * g
            change = log_q - log_p + 0.5 * (momentum.square() - p.square()).sum(-1)
            take = accept(change, generator)
            theta = torch.where(take[..., None], position, theta)
            gradient = torch.where(take[..., None], g, gradient)
            log_p = torch.where(take, log_q, log_p)
            accepted += take.to(theta.dtype).mean(-1)
        rate = accepted / self.n_steps
        self.log_step = self.log_step + rate - self.target_accept
        return theta, rate


def accept(log_ratio: Tensor, generator: torch.Generator) -> Tensor:
    """Metropolis decision in log space; a ratio of NaN is a rejection."""
    u = torch.empty_like(log_ratio).uniform_(generator=generator)
    return (u.log() < log_ratio) & ~log_ratio.isnan()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def value_and_gradient(log_target: LogDensity, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Log density of each particle, and its gradient."""
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        value = log_target(theta)
        (gradient,) = torch.autograd.grad(value.sum(), theta)
    return value.detach(), gradient


def check_count(owner: str, **values: int) -> None:
    """Raise a ParameterError unless each value is an integer of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ParameterError(f"{owner}: {name} must be an integer >= 1, got {value!r}.")

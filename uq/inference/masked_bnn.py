"""Masked Bayesian networks: MCMC over the weights and the number of active nodes.

    p_l = Σ_j m_lj,   π(p_l) ∝ exp(−(λ log n)⁵ p_l²) for p_l ≥ p_min,   m_l | p_l uniform

One transition updates the weights given the masks, the masks given the weights, and the noise; each
of the parts leaves the posterior invariant:

1. weights that no output depends on are drawn from the prior; the others move by HMC;
2. k nodes, drawn without replacement by weights q, die or are born. With ℓ the log likelihood and
   Q(I) the probability of the *set* I, over all orders in which it can be drawn,

       log r = ℓ(m′) − ℓ(m) + log π(m′) − log π(m) + log Q′(I) − log Q(I)

3. σ² ~ InvGamma(a + n/2, b + SSE/2).

Masked nodes keep their weights, so the dimension stays and a birth needs no Jacobian. Chains are a
batch: weights are (C, D), masks (C, M), and every chain has a step size of its own.

I. Kong, D. Yang, J. Lee, I. Ohn, G. Baek, Y. Kim, "Masked Bayesian Neural Networks", ICML 2023,
arXiv 2305.14765. Their code takes the ratio out of log space, where it overflows, and stops a layer
at its smallest width after acceptance, which leaves another law invariant: here the floor is in
the prior.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from uq.errors import NonFiniteLossError
from uq.inference.masked_bnn_moves import (
    Integrator,
    WidthPrior,
    by_direction,
    draw_set,
    draw_variance,
    flipped,
    hmc,
    leapfrog,
    log_mask_ratio,
    total,
)
from uq.kernels import use_triton
from uq.kernels.leapfrog import Density, Recorded
from uq.kernels.leapfrog import leapfrog as leapfrog_kernel
from uq.nn.masked_bnn import Evaluation, MaskedMLP, MaskedNetwork, Pull, Restricted

PRIORS = ("cauchy", "normal")
# Recorded trajectories that are kept: widths move by one or two nodes once warm-up is over.
_MAX_GRAPHS = 16


@dataclass(frozen=True)
class MaskedState:
    """Where chains are.

    Of C chains, D weights and M hidden nodes.

    See Also
    --------
    MaskedBNN.draw_state : draws one from the prior.
    """

    weights: Tensor
    """(C, D)."""
    masks: Tensor
    """(C, M) of 0 and 1."""
    variance: Tensor | None
    """Noise variance (C, K) in float64; None for classes."""


@dataclass(frozen=True)
class Moved:
    """What happened in a transition, (C,) each."""

    acceptance: Tensor
    diverged: Tensor
    mask_acceptance: Tensor
    """Mean acceptance probability of the mask moves."""
    log_likelihood: Tensor
    """Of the new state, in nats."""


@dataclass(frozen=True)
class MaskedBNN:
    """Posterior of a masked network.

    Parameters
    ----------
    network : MaskedNetwork
        A MaskedMLP or MaskedModule.
    x : Tensor of shape (n, …)
        Inputs.
    y : Tensor of shape (n,), (n, K) or (C, n, K)
        Positions of the classes (integers), or targets.
    width_prior : WidthPrior
        Prior on the masks.
    weight : Tensor of shape (n,), optional
        How often each row is there.
    prior : {"cauchy", "normal"}, default="cauchy"
        Law of every weight.
    prior_scale : float, default=1.0
        Its scale.
    noise_prior : tuple of float, default=(1, 0.01)
        a and b of σ² ~ InvGamma(a, b), in squared units of ``y``.

    See Also
    --------
    MaskedBNNKernel : samples it.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import MaskedBNN, WidthPrior
    >>> from uq.nn.masked_bnn import MaskedMLP
    >>> x = torch.linspace(-1, 1, 20)[:, None]
    >>> model = MaskedBNN(MaskedMLP((1, 8, 1)), x, x.square(), WidthPrior([8], [0.1], [1]))
    >>> state = model.draw_state(4, torch.Generator().manual_seed(0))  # four chains
    >>> state.weights.shape, state.masks.shape, state.variance.shape
    (torch.Size([4, 25]), torch.Size([4, 8]), torch.Size([4, 1]))
    """

    network: MaskedNetwork
    x: Tensor
    y: Tensor
    width_prior: WidthPrior
    weight: Tensor | None = None
    prior: str = "cauchy"
    prior_scale: float = 1.0
    noise_prior: tuple[float, float] = (1.0, 0.01)

    def log_prior(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Log density of weights (C, D), and its gradient."""
        s2 = self.prior_scale**2
        n = weights.shape[1]
        if self.prior == "normal":
            constant = -n * (math.log(self.prior_scale) + 0.5 * math.log(2 * math.pi))
            return constant - total(weights.square()) / (2 * s2), weights / -s2
        constant = n * (math.log(self.prior_scale) - math.log(math.pi))
        spread = weights.square().add_(s2)
        return constant - total(spread.log()), weights * -2 / spread

    def draw_prior(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Draw weights of the shape of ``like``."""
        if self.prior == "normal":
            return torch.empty_like(like).normal_(0, self.prior_scale, generator=generator)
        return torch.empty_like(like).cauchy_(0, self.prior_scale, generator=generator)

    @cached_property
    def _onehot(self) -> Tensor:
        return F.one_hot(self.y).to(self.x.dtype)

    @cached_property
    def _n_rows(self) -> float:
        if self.weight is None:
            return float(self.y.shape[-2])
        return float(self.weight.double().sum())

    @cached_property
    def _recorded(self) -> dict[Any, Recorded | None]:
        """Trajectories by shape; None of one that was met once, or cannot be recorded."""
        return {}

    def pull(self, variance: Tensor | None) -> Pull:
        """Log likelihood of outputs, and its gradient, at a noise variance (C, K)."""
        y, weight = self.y, self.weight
        if variance is None:
            onehot = self._onehot

            def classes(outputs: Tensor) -> tuple[Tensor, Tensor]:
                log_p = outputs.log_softmax(-1)
                width = log_p.shape[-1] - onehot.shape[-1]
                target = F.pad(onehot, (0, width)) if width else onehot
                rows = (log_p * target).sum(-1)
                delta = target - log_p.exp()
                if weight is not None:
                    rows, delta = rows * weight, delta * weight[:, None]
                return total(rows), delta

            return classes
        precision = (1 / variance).to(self.x.dtype)[:, None]
        n = self._n_rows
        constant = -0.5 * n * (variance.log() + math.log(2 * math.pi)).sum(1)
        scale = precision if weight is None else precision * weight[:, None]

        def real(outputs: Tensor) -> tuple[Tensor, Tensor]:
            error = y - outputs
            delta = error * scale
            return constant - 0.5 * total((error * delta).flatten(1)), delta

        return real

    def log_joint(self, state: MaskedState, log_likelihood: Tensor) -> Tensor:
        """Log joint density of state and data, (C,), from the log likelihood."""
        joint = self.log_prior(state.weights)[0] + self.width_prior.log_prob(state.masks)
        if state.variance is not None:
            a, b = self.noise_prior
            law = torch.distributions.InverseGamma(
                torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
            )
            joint = joint + law.log_prob(state.variance.cpu()).sum(1).to(joint.device)
        return joint + log_likelihood

    def draw_state(self, n_chains: int, generator: torch.Generator) -> MaskedState:
        """Draw states from the prior: of regression where ``y`` is real."""
        device = self.x.device
        like = self.x.new_empty(n_chains, self.network.n_weights)
        masks = []
        for table, size in zip(self.width_prior.tables, self.width_prior.groups, strict=True):
            p = torch.arange(size + 1, dtype=torch.float64)
            log_width = table + (
                math.lgamma(size + 1) - torch.lgamma(p + 1) - torch.lgamma(size - p + 1)
            )
            law = log_width.exp().to(device)
            width = torch.multinomial(law, n_chains, replacement=True, generator=generator)
            key = torch.rand(n_chains, size, generator=generator, device=device)
            rank = key.argsort(1).argsort(1)
            masks.append((rank < width[:, None]).to(self.x.dtype))
        variance = None
        if self.y.is_floating_point():
            shape = torch.full(
                (n_chains, self.y.shape[-1]),
                self.noise_prior[0],
                dtype=torch.float64,
                device=device,
            )
            variance = self.noise_prior[1] / torch._standard_gamma(shape, generator=generator)
        every = torch.cat(masks, 1) if masks else like[:, :0]
        return MaskedState(self.draw_prior(like, generator), every, variance)


@dataclass(frozen=True)
class MaskedMoves:
    """Settings of a transition.

    Parameters
    ----------
    n_leapfrog : int, default=50
        Gradients of a trajectory.
    n_mask_moves : int, default=10
        Mask moves of a transition.
    max_flips : int, default=3
        A mask move flips 1 to this many nodes; set probabilities cost its factorial.
    death, birth : {"small", "informed", "uniform"}
        Weights of the nodes in either direction; see ``proposal_log_weights``.

    Examples
    --------
    >>> from uq.inference import MaskedMoves
    >>> MaskedMoves(n_leapfrog=10)  # the argument ``moves`` of :class:`MaskedBNNKernel`
    MaskedMoves(n_leapfrog=10, n_mask_moves=10, max_flips=3, death='small', birth='uniform')
    """

    n_leapfrog: int = 50
    n_mask_moves: int = 10
    max_flips: int = 3
    death: str = "small"
    birth: str = "uniform"


def move_weights(
    model: MaskedBNN,
    state: MaskedState,
    step: Tensor,
    moves: MaskedMoves,
    generator: torch.Generator,
    scale: Tensor | None = None,
) -> tuple[MaskedState, Tensor, Tensor]:
    """HMC on the weights that matter, fresh prior draws for the others, given the masks.

    Returns
    -------
    state : MaskedState
        The new one.
    acceptance, diverged : Tensor of shape (C,)
        As of :func:`hmc`.
    """
    part = model.network.restrict(state.masks)
    density = log_density(model, part, model.pull(state.variance))
    if scale is not None:
        step = step[:, None] * part.weights(scale)
    integrate = recorded(model, part, state.variance, step, moves.n_leapfrog)
    moved, acceptance, diverged = hmc(
        part.weights(state.weights),
        density,
        step,
        moves.n_leapfrog,
        generator,
        part.active,
        integrate,
    )
    fresh = model.draw_prior(state.weights, generator)
    return replace(state, weights=part.restore(fresh, moved)), acceptance, diverged


def log_density(model: MaskedBNN, part: Restricted, pull: Pull) -> Density:
    """Log density of the active weights, up to a constant, and its gradient."""

    def density(weights: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = part.gradient(weights, model.x, pull)
        log_prior, slope = model.log_prior(weights)  # constant where a weight is inactive, and 0
        return value + log_prior, gradient.add_(slope)

    return density


def recorded(
    model: MaskedBNN, part: Restricted, variance: Tensor | None, step: Tensor, n_steps: int
) -> Integrator | None:
    """On a GPU, trajectories as graphs that one launch replays, from the second of a shape on.

    Returns
    -------
    callable or None
        For :func:`hmc`; None where it integrates by itself.
    """
    if not (_records(model.x) and isinstance(model.network, MaskedMLP)):
        return None
    given = (part.active,) if variance is None else (part.active, variance)
    key = (*(tuple(t.shape) for t in (*given, step)), tuple(part.sizes), n_steps)  # type: ignore[attr-defined]
    graphs = model._recorded
    if key not in graphs:
        if len(graphs) >= _MAX_GRAPHS:
            del graphs[next(iter(graphs))]
        graphs[key] = None
        return None

    def function(
        position: Tensor, momentum: Tensor, gradient: Tensor, step: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        # What changes from call to call comes as an argument, and stays where the graph reads it.
        own = copy.copy(part)
        own.active = given[0]
        density = log_density(model, own, model.pull(given[1] if len(given) > 1 else None))
        return leapfrog_kernel(position, momentum, gradient, step, density, n_steps)

    def integrate(
        position: Tensor, momentum: Tensor, gradient: Tensor, step: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = (position, momentum, gradient, step, *given)
        graph = graphs.get(key)
        if graph is None:
            try:
                graph = graphs[key] = Recorded(function, *inputs)
            except RuntimeError:  # recording is no more than a matter of speed
                return function(*inputs)
        return graph(*inputs)

    return integrate


def _records(like: Tensor) -> bool:
    return use_triton(like) and like.is_cuda


def move_masks(
    model: MaskedBNN,
    state: MaskedState,
    now: Evaluation,
    moves: MaskedMoves,
    generator: torch.Generator,
) -> tuple[MaskedState, Evaluation, Tensor]:
    """One birth or death of 1 to ``max_flips`` nodes in each chain, given the weights.

    Parameters
    ----------
    now : Evaluation
        Of the network at ``state``.

    Returns
    -------
    state : MaskedState
        The new one.
    now : Evaluation
        Of the network there.
    acceptance : Tensor of shape (C,)
        Probability that the flip was accepted with.
    """
    kinds = (moves.death, moves.birth)
    chains, nodes = state.masks.shape
    device = state.masks.device
    n_max = min(moves.max_flips, nodes)
    birth = torch.rand(chains, generator=generator, device=device) < 0.5
    count = torch.randint(1, n_max + 1, (chains,), generator=generator, device=device)
    u = torch.rand(chains, generator=generator, dtype=torch.float64, device=device)
    forward = by_direction(kinds, now.mask_gradient, state.masks, birth)
    chosen = draw_set(forward, n_max, generator)
    masks = flipped(state.masks, chosen, count)
    # Gradients at inactive nodes are needed where births look at them, and nowhere else.
    new = model.network.evaluate(
        state.weights, masks, model.x, model.pull(state.variance), moves.birth != "uniform"
    )
    log_ratio = log_mask_ratio(
        model.width_prior,
        kinds,
        (state.masks, masks),
        (now.value, new.value),
        (now.mask_gradient, new.mask_gradient),
        chosen,
        count,
        birth,
    )
    acceptance = log_ratio.clamp(max=0).exp()
    take = u < acceptance
    column = take[:, None]
    now = Evaluation(
        torch.where(column[..., None], new.outputs, now.outputs),
        torch.where(take, new.value, now.value),
        torch.where(column, new.mask_gradient, now.mask_gradient),
    )
    return replace(state, masks=torch.where(column, masks, state.masks)), now, acceptance


def transition(
    model: MaskedBNN,
    state: MaskedState,
    step: Tensor,
    moves: MaskedMoves,
    generator: torch.Generator,
    scale: Tensor | None = None,
) -> tuple[MaskedState, Moved]:
    """Weights by HMC, masks by births and deaths, noise by Gibbs: leaves the posterior invariant.

    Parameters
    ----------
    model : MaskedBNN
        The posterior.
    state : MaskedState
        Where the chains are.
    step : Tensor of shape (C,)
        Step size of each chain.
    moves : MaskedMoves
        Settings.
    generator : torch.Generator
        Source of everything random.
    scale : Tensor of shape (C, D), optional
        Factor on the step size of each weight.
    """
    state, acceptance, diverged = move_weights(model, state, step, moves, generator, scale)
    pull = model.pull(state.variance)
    everywhere = moves.birth != "uniform"
    now = model.network.evaluate(state.weights, state.masks, model.x, pull, everywhere)
    accepted = torch.zeros_like(acceptance)
    if state.masks.shape[1]:
        for _ in range(moves.n_mask_moves):
            state, now, share = move_masks(model, state, now, moves, generator)
            accepted += share / moves.n_mask_moves
    value = now.value
    if state.variance is not None:
        variance = draw_variance(now.outputs, model.y, model.weight, model.noise_prior, generator)
        state = replace(state, variance=variance)
        value = model.pull(variance)(now.outputs)[0]
    return state, Moved(acceptance, diverged, accepted, value)


def first_step_size(
    model: MaskedBNN,
    state: MaskedState,
    generator: torch.Generator,
    scale: Tensor | None = None,
    n_doublings: int = 20,
) -> Tensor:
    """Step size of each chain at which one leapfrog step is accepted about half of the time.

    Raises
    ------
    NonFiniteLossError
        If the log density is not finite where a chain starts.
    """
    part = model.network.restrict(state.masks)
    density = log_density(model, part, model.pull(state.variance))
    position = part.weights(state.weights)
    value, gradient = density(position)
    if not bool(value.isfinite().all()):
        raise NonFiniteLossError(
            "the log posterior is not finite where the chains start; look for extreme values in X "
            "or y."
        )
    momentum = torch.randn(
        position.shape, generator=generator, dtype=position.dtype, device=position.device
    )
    momentum = momentum * part.active
    own = None if scale is None else part.weights(scale)

    def likely(step: Tensor) -> Tensor:
        if own is not None:
            step = step[:, None] * own
        _, kick, end, _ = leapfrog(position, momentum, gradient, density, step, 1)
        gain = end - value + 0.5 * (total(momentum.square()) - total(kick.square()))
        return gain > math.log(0.5)

    step = torch.full_like(value, 0.01)
    up = likely(step)
    going = torch.ones_like(up)
    for _ in range(n_doublings):
        step = torch.where(going, torch.where(up, step * 2, step / 2), step)
        going &= likely(step) == up
        if not bool(going.any()):
            break
    return step

"""Pure functions that masked Bayesian networks are sampled with: masks, trajectories, noise.

Chains are a batch: each function works on all of them at once and knows nothing of networks.
Equations and paper are in :mod:`uq.inference.masked_bnn`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations

import torch
from torch import Tensor

from uq.kernels import leapfrog as kernel
from uq.kernels.leapfrog import Density

PROPOSALS = ("small", "informed", "uniform")
# A trajectory that gains as much energy has left the region where the integrator is stable.
_DIVERGENT = 1000.0

Integrator = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""Maps position, momentum, gradient and step to what :func:`uq.kernels.leapfrog.leapfrog` gives."""

# -- masks ---------------------------------------------------------------------------------------


class WidthPrior:
    """Prior on masks: a law for the width of each layer, uniform over its masks given the width.

    Parameters
    ----------
    groups : sequence of int
        Nodes of each layer.
    penalties : sequence of float
        c of each layer, in π(p) ∝ exp(−c p²).
    floors : sequence of int
        Smallest width of each layer; fewer active nodes have probability 0.

    Examples
    --------
    >>> import torch
    >>> prior = WidthPrior([3], [0.0], [1])
    >>> prior.log_prob(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])).exp()
    tensor([0.1111, 0.0000], dtype=torch.float64)
    """

    def __init__(
        self, groups: Sequence[int], penalties: Sequence[float], floors: Sequence[int]
    ) -> None:
        self.groups: list[int] = list(groups)
        self.tables: list[Tensor] = []
        for width, penalty, floor in zip(groups, penalties, floors, strict=True):
            p = torch.arange(width + 1, dtype=torch.float64)
            log_p = (-penalty * p.square()).masked_fill(p < floor, -math.inf)
            masks = math.lgamma(width + 1) - torch.lgamma(p + 1) - torch.lgamma(width - p + 1)
            self.tables.append(log_p.log_softmax(0) - masks)

    def widths(self, masks: Tensor) -> Tensor:
        """Active nodes of each layer, (C, L)."""
        if not self.groups:
            return masks[:, :0].long()
        return torch.stack([m.sum(1) for m in masks.split(self.groups, 1)], 1).round().long()

    def log_prob(self, masks: Tensor) -> Tensor:
        """Log probability of masks (C, M): (C,), float64."""
        log_p = torch.zeros(len(masks), dtype=torch.float64, device=masks.device)
        for table, width in zip(self.tables, self.widths(masks).T, strict=True):
            log_p += table.to(masks.device)[width]
        return log_p


def width_penalty(strength: float, n: float) -> float:
    """c = (λ log n)⁵ of the prior π(p) ∝ exp(−c p²) on widths, in nats; 0 for a single row.

    Parameters
    ----------
    strength : float
        λ.
    n : float
        Number of rows.

    Returns
    -------
    float
        c, in nats.

    Examples
    --------
    >>> from uq.inference import WidthPrior, width_penalty
    >>> width_penalty(0.1, 1000)
    0.157
    >>> prior = WidthPrior([100], [width_penalty(0.1, 1000)], [1])  # of a layer of 100 nodes
    """
    return (strength * math.log(max(n, 1.0))) ** 5


def proposal_log_weights(kind: str, gradient: Tensor, masks: Tensor, birth: Tensor) -> Tensor:
    """Log weight of each node in a death or birth; −inf for nodes that are no candidates.

    Parameters
    ----------
    kind : {"small", "informed", "uniform"}
        exp(−|g|/2), nodes that the likelihood hardly feels; exp((1 − 2m) g/2), nodes whose flip the
        likelihood favours to first order; 1.
    gradient : Tensor of shape (C, M)
        g = ∂ log likelihood / ∂m.
    masks : Tensor of shape (C, M)
        Current masks, 0 and 1.
    birth : Tensor of shape (C,), bool
        Whether inactive nodes are to be switched on, or active ones off.
    """
    if kind == "uniform":
        log_weights = torch.zeros_like(gradient, dtype=torch.float64)
    elif kind == "small":
        log_weights = -0.5 * gradient.double().abs()
    else:
        log_weights = (0.5 - masks.double()) * gradient.double()
    return log_weights.masked_fill((masks > 0) == birth[:, None], -math.inf)


def draw_set(log_weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw n nodes one after another without replacement, (C, n); the first k are such a draw of k.

    The largest of log w + Gumbel noise have that law. Candidates come first.
    """
    uniform = torch.rand(
        log_weights.shape, generator=generator, dtype=torch.float64, device=log_weights.device
    )
    # 0 would be an infinite Gumbel.
    gumbel = -(-uniform.clamp_min(1e-300).log()).clamp_min(1e-300).log()
    return (log_weights + gumbel).topk(n, 1).indices


def log_set_probability(log_weights: Tensor, chosen: Tensor, count: Tensor) -> Tensor:
    """Log probability that the first ``count`` draws without replacement are a set, in any order.

        Q(I) = Σ_orders Π_k q_{i_k} / (1 − Σ_{k′<k} q_{i_k′})

    What is left before each draw is a sum of positive terms, never a difference.

    Parameters
    ----------
    log_weights : Tensor of shape (C, M)
        Log weights, up to a constant; −inf for nodes that cannot be drawn.
    chosen : Tensor of shape (C, N)
        Nodes; the first ``count`` of a row are the set. Costs N! orders.
    count : Tensor of shape (C,)
        Size of each set, at least 1.

    Examples
    --------
    >>> import torch
    >>> q = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    >>> log_set_probability(q.log(), torch.tensor([[0, 1]]), torch.tensor([2])).exp()
    tensor([0.5143], dtype=torch.float64)
    """
    n = chosen.shape[1]
    member = torch.arange(n, device=chosen.device) < count[:, None]
    inside = log_weights.gather(1, chosen).masked_fill(~member, -math.inf)
    outside = torch.zeros_like(log_weights, dtype=torch.bool).scatter(1, chosen, member)
    rest = log_weights.masked_fill(outside, -math.inf).logsumexp(1)
    orders = torch.tensor(list(permutations(range(n))), device=chosen.device)
    w, valid = inside[:, orders], member[:, orders]  # (C, N!, N)
    left = torch.logaddexp(w.flip(-1).logcumsumexp(-1).flip(-1), rest[:, None, None])
    each = torch.where(valid, w - left, 0.0).sum(-1)
    # Orders that differ in where the other nodes stand are one order of the set.
    repeats = math.lgamma(n + 1) - torch.lgamma(count.double() + 1)
    return each.logsumexp(1) - repeats


def flipped(masks: Tensor, chosen: Tensor, count: Tensor) -> Tensor:
    """Masks with the first ``count`` of the chosen nodes flipped."""
    member = torch.arange(chosen.shape[1], device=chosen.device) < count[:, None]
    return (masks - torch.zeros_like(masks).scatter(1, chosen, member.to(masks.dtype))).abs()


def log_mask_ratio(
    prior: WidthPrior,
    kinds: tuple[str, str],
    masks: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    chosen: Tensor,
    count: Tensor,
    birth: Tensor,
) -> Tensor:
    """Log Metropolis–Hastings ratio of a flip, (C,).

    Parameters
    ----------
    prior : WidthPrior
        Prior on masks.
    kinds : tuple of str
        Proposals of deaths and births.
    masks, values, gradients : tuple of two Tensors
        Masks, log likelihood and mask gradient, before and after.
    chosen, count, birth : Tensor
        The flip: nodes, how many of them, and its direction.

    Returns
    -------
    Tensor of shape (C,)
        −inf where there are too few candidates, or the new value is not finite.
    """
    forward = by_direction(kinds, gradients[0], masks[0], birth)
    backward = by_direction(kinds, gradients[1], masks[1], ~birth)
    ratio = (
        values[1]
        - values[0]
        + prior.log_prob(masks[1])
        - prior.log_prob(masks[0])
        + log_set_probability(backward, chosen, count)
        - log_set_probability(forward, chosen, count)
    )
    possible = forward.isfinite().sum(1) >= count
    return ratio.masked_fill(~possible | ratio.isnan(), -math.inf)


def by_direction(kinds: tuple[str, str], gradient: Tensor, masks: Tensor, birth: Tensor) -> Tensor:
    """Log weights of each chain's direction: ``kinds`` are those of deaths and of births."""
    if kinds[0] == kinds[1]:
        return proposal_log_weights(kinds[0], gradient, masks, birth)
    death, born = (proposal_log_weights(k, gradient, masks, birth) for k in kinds)
    return torch.where(birth[:, None], born, death)


# -- weights and noise ---------------------------------------------------------------------------


def leapfrog(
    position: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    density: Density,
    step: Tensor,
    n_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integrate Hamilton's equations.

    Parameters
    ----------
    position, momentum, gradient : Tensor of shape (C, D)
        Start, and the gradient of the log density there.
    density : callable
        Maps (C, D) to the log density (C,) and its gradient (C, D).
    step : Tensor of shape (C,) or (C, D)
        Step size of each chain, or of each entry: a mass of 1/step².
    n_steps : int
        Steps, each of one gradient.

    Returns
    -------
    tuple of Tensor
        Position, momentum, log density and gradient at the end.
    """
    end = kernel.leapfrog(position, momentum, gradient, step, density, n_steps)
    position, momentum, _, value, gradient = end
    return position, momentum, value, gradient


def hmc(
    position: Tensor,
    density: Density,
    step: Tensor,
    n_steps: int,
    generator: torch.Generator,
    active: Tensor | None = None,
    integrate: Integrator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move by one Hamiltonian trajectory, accepted or not.

    Parameters
    ----------
    position : Tensor of shape (C, D)
        Current state.
    density, step, n_steps
        As for :func:`leapfrog`; steps vary by ±20 %, so that no trajectory closes on itself.
    generator : torch.Generator
        Source of momenta and decisions.
    active : Tensor of shape (C, D), optional
        Entries of 0 stay where they are.
    integrate : callable, optional
        Takes the place of :func:`uq.kernels.leapfrog.leapfrog` at this density and number of steps.

    Returns
    -------
    position : Tensor of shape (C, D)
        New state.
    acceptance : Tensor of shape (C,)
        Probability that the trajectory was accepted with.
    diverged : Tensor of shape (C,), bool
        Whether it gained more than 1,000 nats of energy or its end is not finite.
    """
    momentum = torch.randn(
        position.shape, generator=generator, dtype=position.dtype, device=position.device
    )
    if active is not None:
        momentum = momentum * active
    start, gradient = density(position)
    u = torch.rand(2, len(position), generator=generator, dtype=torch.float64, device=step.device)
    vary = 0.8 + 0.4 * u[0]
    step = step * (vary if step.ndim == 1 else vary[:, None])
    if integrate is None:
        integrate = partial(kernel.leapfrog, density=density, n_steps=n_steps)
    end, _, energy, value, _ = integrate(position, momentum, gradient, step)
    gain = value - start + 0.5 * total(momentum.square()) - energy
    diverged = ~(gain > -_DIVERGENT)  # NaN is a divergence, too
    acceptance = torch.where(diverged, 0.0, gain.clamp(max=0).exp())
    return torch.where((u[1] < acceptance)[:, None], end, position), acceptance, diverged


def total(terms: Tensor) -> Tensor:
    """Sum over the second axis, in float64."""
    return terms.sum(1, dtype=torch.float64)


def draw_variance(
    outputs: Tensor,
    y: Tensor,
    weight: Tensor | None,
    prior: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Draw the noise variance of each target from its conditional, (C, K).

    Parameters
    ----------
    outputs : Tensor of shape (C, n, K)
        Means.
    y : Tensor of shape (n, K) or (C, n, K)
        Targets.
    weight : Tensor of shape (n,), optional
        How often each row is there.
    prior : tuple of float
        a and b of InvGamma(a, b).
    generator : torch.Generator
        Source of the draw.
    """
    squares = (y - outputs).double().square()
    n = float(y.shape[-2]) if weight is None else float(weight.double().sum())
    errors = squares.sum(1) if weight is None else (squares * weight[:, None]).sum(1)
    gamma = torch._standard_gamma(torch.full_like(errors, prior[0] + 0.5 * n), generator=generator)
    return (prior[1] + 0.5 * errors) / gamma


class StepSize:
    """Step sizes of chains, each adapted to an acceptance rate by dual averaging.

    M. D. Hoffman, A. Gelman, JMLR 15 (2014), eq. 6, with γ = 0.05, t₀ = 10, κ = 0.75.
    """

    def __init__(self, start: Tensor, target: float) -> None:
        self.target = target
        self.restart(start)

    def restart(self, start: Tensor) -> None:
        """Begin anew at these step sizes, (C,)."""
        self.center: Tensor = start.log() + math.log(10)
        self.log_step: Tensor = start.log()
        self.mean: Tensor = torch.zeros_like(start)
        self.error: Tensor = torch.zeros_like(start)
        self.t: int = 0

    def update(self, acceptance: Tensor) -> Tensor:
        """Learn from a trajectory's acceptance probability; return the steps to try next."""
        self.t += 1
        share = 1 / (self.t + 10)
        self.error = (1 - share) * self.error + share * (self.target - acceptance)
        self.log_step = self.center - math.sqrt(self.t) / 0.05 * self.error
        eta = self.t**-0.75
        self.mean = eta * self.log_step + (1 - eta) * self.mean
        return self.log_step.exp()

    def final(self) -> Tensor:
        """Averaged step sizes, to sample with."""
        return (self.mean if self.t else self.log_step).exp()

"""Random functions and random causal graphs: what the tabular priors make their targets of.

Every function draws one mechanism a data set, for a group of G data sets at once: inputs
(G, n, d), standardised, to outputs (G, n, k). ``relevance`` (G, d) is how much a column matters;
0 means not at all. All of it is rows apart, so that rows stay exchangeable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_UNITS = 40
_HIDDEN = 24
_TREES = 16
_DEPTH = 6
_EPSILON = 1e-6

Mechanism = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]


def uniform(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """U(low, high) of this shape, from this generator."""
    draws = torch.rand(shape, generator=generator, device=generator.device)
    return draws.mul_(high - low).add_(low)


def log_uniform(generator: torch.Generator, *shape: int, low: float, high: float) -> Tensor:
    """Draws whose logarithm is uniform between those of ``low`` and ``high``."""
    bounds = torch.tensor([low, high]).log().tolist()
    return uniform(generator, *shape, low=bounds[0], high=bounds[1]).exp_()


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal draws of this shape, from this generator."""
    return torch.randn(shape, generator=generator, device=generator.device)


def chance(generator: torch.Generator, probability: float | Tensor, *shape: int) -> Tensor:
    """Boolean draws that are True with ``probability``."""
    return uniform(generator, *shape) < probability


def choice(generator: torch.Generator, weights: Sequence[float], *shape: int) -> Tensor:
    """Indices drawn with these weights."""
    cumulative = torch.tensor(weights, device=generator.device).cumsum(0)
    points = uniform(generator, *shape, high=float(cumulative[-1]))
    return torch.bucketize(points, cumulative).clamp_(max=len(weights) - 1)


def integers(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    """Integers from ``low`` to ``high``, both included."""
    return torch.randint(low, high + 1, shape, generator=generator, device=generator.device)


def standardise(values: Tensor, dim: int = 1) -> Tensor:
    """Mean 0 and standard deviation 1 along ``dim``; constants become 0."""
    centred = values - values.mean(dim, keepdim=True)
    return centred / centred.square().mean(dim, keepdim=True).sqrt().clamp_min(_EPSILON)


def by_kind(
    kinds: Tensor, values: Tensor, functions: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """Apply to each leading row of ``values`` the function that ``kinds`` names."""
    result = torch.empty_like(values)
    for kind in kinds.unique().tolist():
        rows = (kinds == kind).nonzero().squeeze(1)
        result[rows] = functions[kind](values[rows])
    return result


# Smooth first, then kinked, then piecewise constant: choices weigh them.
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.tanh,
    torch.sin,
    lambda x: torch.exp(-0.5 * x.square()),
    functional.softplus,
    lambda x: x,
    lambda x: x.clamp(-4, 4).square(),
    lambda x: x.clamp(-3, 3).pow(3),
    lambda x: x.clamp(-8, 3).exp(),
    lambda x: (1 + x.abs()).log() * x.sign(),
    functional.relu,
    torch.abs,
    lambda x: functional.hardtanh(x),
    lambda x: (x > 0).to(x.dtype),
    lambda x: (2 * x).round() / 2,
)
_SMOOTH = (3.0, 3.0, 2.0, 1.5, 1.0, 1.5, 0.7, 1.0, 1.0)
_KINKED = (2.0, 0.7, 0.7)
_STEPS = (0.6, 0.5)
ACTIVATION_WEIGHTS = (*_SMOOTH, *_KINKED, *_STEPS)


def linear(z: Tensor, relevance: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Weighted sums; in four of ten data sets with products of pairs of columns."""
    g, _, d = z.shape
    weights = normal(generator, g, d, k) * relevance[..., None]
    pairs = normal(generator, g, d, d) * relevance[:, :, None] * relevance[:, None, :]
    strength = uniform(generator, g, 1, 1) * chance(generator, 0.4, g, 1, 1)
    products = ((z @ (strength * pairs)) * z).sum(2, keepdim=True)
    return z @ weights + products * normal(generator, g, 1, k)


def ridge(z: Tensor, relevance: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Sums of up to 40 functions of one, two or all columns: additive models, GPs, wide networks.

    Σ_u a_u φ(s_u (w_u·z − t_u)) with one activation φ a data set and scales s log-uniform.
    """
    g, _, d = z.shape
    # Each unit looks at `order` columns, relevant ones more often.
    keys = uniform(generator, g, d, _UNITS).log().neg() / relevance[..., None].clamp_min(1e-9)
    order = torch.tensor([1, 2, d], device=z.device)[choice(generator, (4, 2.5, 3.5), g)]
    ranks = keys.argsort(1).argsort(1)
    weights = normal(generator, g, d, _UNITS) * (ranks < order[:, None, None])
    weights *= torch.where(order == 1, 1.0, relevance.T).T[..., None]
    weights /= weights.norm(dim=1, keepdim=True).clamp_min(_EPSILON)
    scale = log_uniform(generator, g, 1, 1, low=0.2, high=3)
    scale = scale * torch.exp(0.4 * normal(generator, g, 1, _UNITS))
    threshold = normal(generator, g, 1, _UNITS)
    units = by_kind(
        choice(generator, ACTIVATION_WEIGHTS, g), (z @ weights - threshold) * scale, ACTIVATIONS
    )
    number = log_uniform(generator, g, 1, 1, low=1, high=_UNITS + 0.99).floor()
    used = torch.arange(_UNITS, device=z.device)[:, None] < number
    amounts = normal(generator, g, _UNITS, k) * torch.exp(0.5 * normal(generator, g, _UNITS, 1))
    return standardise(units) @ (amounts * used)


def trees(z: Tensor, relevance: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Sums of 1 to 16 decision trees of depth 1 to 6 that split at values of the data."""
    g, n = z.shape[:2]
    nodes = 2**_DEPTH - 1
    columns = torch.multinomial(
        relevance + 1e-9, _TREES * nodes, replacement=True, generator=generator
    )
    rows = integers(generator, 0, n - 1, g, _TREES * nodes)
    thresholds = z[torch.arange(g, device=z.device)[:, None], rows, columns]
    # Below its depth a tree no longer splits: everything goes left.
    level = torch.arange(1, nodes + 1, device=z.device).log2().floor()
    depth = integers(generator, 1, _DEPTH, g, 1)
    thresholds = thresholds.view(g, _TREES, nodes).masked_fill(
        (level >= depth)[:, None, :], float("inf")
    )
    columns = columns.view(g, 1, _TREES, nodes).expand(g, n, _TREES, nodes)
    thresholds = thresholds[:, None].expand(g, n, _TREES, nodes)
    node = torch.zeros(g, n, _TREES, 1, dtype=torch.long, device=z.device)
    for _ in range(_DEPTH):
        column = columns.gather(3, node).squeeze(3)
        right = z.gather(2, column) >= thresholds.gather(3, node).squeeze(3)
        node = 2 * node + 1 + right[..., None]
    leaves = normal(generator, g, 1, _TREES, nodes + 1, k)
    number = log_uniform(generator, g, 1, low=1, high=_TREES + 0.99).floor()
    leaves *= (torch.arange(_TREES, device=z.device) < number)[:, None, :, None, None]
    index = (node - nodes)[..., None].expand(g, n, _TREES, 1, k)
    return leaves.expand(g, n, -1, -1, -1).gather(3, index).sum((2, 3))


def network(z: Tensor, relevance: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Networks of 2 to 3 hidden layers, each with its own activation; layers are standardised."""
    g = len(z)
    hidden = z * relevance[:, None, :]
    layers = integers(generator, 2, 3, g)
    for layer in range(3):
        width = hidden.shape[2]
        weights = normal(generator, g, width, _HIDDEN) / width**0.5
        bias = normal(generator, g, 1, _HIDDEN)
        scale = log_uniform(generator, g, 1, 1, low=0.4, high=2)
        inputs = hidden @ weights
        inputs = inputs / inputs.square().mean((1, 2), keepdim=True).sqrt().clamp_min(_EPSILON)
        kinds = choice(generator, ACTIVATION_WEIGHTS, g)
        output = standardise(by_kind(kinds, scale * (inputs + 0.5 * bias), ACTIVATIONS))
        skip = (layer >= layers)[:, None, None]
        hidden = torch.where(skip, hidden, output) if layer else output
    return hidden @ normal(generator, g, _HIDDEN, k)


MECHANISMS: tuple[Mechanism, ...] = (linear, ridge, trees, network)


def causal_graph(
    g: int, n: int, d: int, k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Columns (G, n, d) and k target nodes (G, n, k) of random structural causal models.

    Root causes go through a random sparse network of 2 to 4 layers with noise in every node.
    Columns and targets are random nodes, so that a column may be a cause of the target, an effect
    of it, or neither. In six of ten data sets the target is a late node.
    """
    layers, width = 4, d + k // 2 + 5
    causes = integers(generator, 2, 8, g, 1, 1)
    spread = normal(generator, g, 1, 8).abs() + 0.1
    roots = torch.where(
        chance(generator, 0.5, g, 1, 8), normal(generator, g, n, 8), uniform(generator, g, n, 8)
    )
    hidden = roots * spread * (torch.arange(8, device=roots.device) < causes)
    noise = log_uniform(generator, g, 1, 1, low=0.002, high=0.3)
    keep = 1 - 0.7 * uniform(generator, g, 1, 1)
    values = []
    for _ in range(layers):
        fan_in = hidden.shape[2]
        weights = normal(generator, g, fan_in, width) * chance(generator, keep, g, fan_in, width)
        inputs = standardise(hidden @ weights) * log_uniform(generator, g, 1, 1, low=0.4, high=2)
        inputs = inputs + 0.5 * normal(generator, g, 1, width)
        kinds = choice(generator, ACTIVATION_WEIGHTS, g)
        output = standardise(by_kind(kinds, inputs, ACTIVATIONS))
        hidden = output + noise * log_uniform(generator, g, 1, width, low=0.1, high=2) * normal(
            generator, g, n, width
        )
        values.append(hidden)
    nodes = torch.cat(values, 2)
    total = nodes.shape[2]
    depth = integers(generator, 2, layers, g, 1) * width
    keys = uniform(generator, g, total)
    position = torch.arange(total, device=nodes.device)
    keys = keys + 10.0 * (position >= depth)  # layers beyond the graph's depth do not exist
    late = chance(generator, 0.6, g, 1) & (position >= depth - width) & (position < depth)
    target = (keys - 5.0 * late).argsort(1)[:, :k]
    keys = keys.scatter(1, target, 20.0)
    column = keys.argsort(1)[:, :d]
    return (
        nodes.gather(2, column[:, None].expand(g, n, d)),
        nodes.gather(2, target[:, None].expand(g, n, k)),
    )

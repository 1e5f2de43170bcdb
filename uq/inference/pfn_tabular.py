"""Prior over tables: what the shipped prior-data fitted networks learned from.

Every data set of a batch draws its own settings. Columns come first: independent, correlated,
clustered or on a grid of designs, with marginals from uniform to heavy-tailed, rounded, with excess
zeros, coded categories, near-copies of other columns, missing cells. The target is a random
mechanism (:mod:`uq.inference.pfn_mechanisms`) of the columns that matter, or columns and target are
nodes of one random causal graph. Regression adds a link and noise whose standard deviation is 0.01
to 1 of the signal's (outside of it in one of ten), constant or not, light- or heavy-tailed.
Classification cuts a score at uneven quantiles, takes the largest of several noisy scores, or draws
the columns given the class.

The construction follows the published ones (Hollmann et al., ICLR 2023, arXiv 2207.01848, §4 and
App. C; Hollmann et al., Nature 637, 2025, Methods); distributions and constants are ours, set by
looking at how well a ridge regression and gradient boosting do on what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from uq.inference.pfn_mechanisms import (
    MECHANISMS,
    by_kind,
    causal_graph,
    chance,
    choice,
    integers,
    log_uniform,
    normal,
    standardise,
    uniform,
)
from uq.inference.pfn_priors import _Described

_MECHANISM_WEIGHTS = (2.2, 4.0, 1.5, 2.0)
_LEVELS = 12


@dataclass(frozen=True)
class TabularPrior(_Described):
    """Mixture of tables; see the module's docstring.

    Parameters
    ----------
    task : {"regression", "classification"}, default="regression"
        What y is.
    max_features : int, default=10
        Most columns that are drawn.
    max_classes : int, default=10
        Most classes; a data set has 2 with probability 0.45, else any number up to it.
    causal : float, default=0.25
        Share of data sets that are nodes of one causal graph.
    """

    task: Literal["regression", "classification"] = "regression"
    max_features: int = 10
    max_classes: int = 10
    causal: float = 0.25

    scaled = True

    @torch.no_grad()
    def __call__(
        self, batch: int, n: int, d: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw data sets, each with settings of its own."""
        classes = self.task == "classification"
        causal = chance(generator, self.causal, batch)
        z = _columns(batch, n, d, generator)
        relevance = _relevance(batch, d, generator)
        outputs = self.max_classes if classes else 1
        scores = torch.zeros(batch, n, outputs, device=generator.device)
        rows = causal.nonzero().squeeze(1)
        if len(rows):
            nodes, scores[rows] = causal_graph(len(rows), n, d, outputs, generator)
            z[rows] = standardise(nodes)
        if classes:
            count = torch.where(
                chance(generator, 0.45, batch),
                torch.full((batch,), min(2, self.max_classes), device=z.device),
                integers(generator, min(2, self.max_classes), self.max_classes, batch),
            )
            drawn = ~causal & chance(generator, 0.2, batch)
            labels = _class_columns(z, drawn, relevance, count, self.max_classes, generator)
        x, u = _observe(z, causal, generator)
        others = ~causal if not classes else ~causal & ~drawn
        _add_mechanisms(scores, u, relevance, others, generator)
        if classes:
            labels = torch.where(drawn[:, None], labels, _classes(scores, count, generator))
            y = _relabel(labels, count, self.max_classes, generator)
        else:
            y = _targets(scores.squeeze(2), u, generator)
        return _missing(x, generator), y


def _columns(b: int, n: int, d: int, generator: torch.Generator) -> Tensor:
    """Latent columns (b, n, d), standardised: independent, correlated, clustered or designs."""
    z = normal(generator, b, n, d)
    kind = choice(generator, (4, 3, 1.5, 1.5), b)[:, None, None]
    # Correlated: up to three common factors.
    loadings = normal(generator, b, 3, d) * (
        torch.arange(3, device=z.device)[:, None] < integers(generator, 1, 3, b, 1, 1)
    )
    share = uniform(generator, b, 1, 1, low=0.1, high=0.98)
    factors = normal(generator, b, n, 3) @ functional.normalize(loadings, dim=1)
    z = torch.where(kind == 1, share.sqrt() * factors + (1 - share).sqrt() * z, z)
    # Clusters and designs: rows take one of M rows; designs take some columns of it exactly.
    number = log_uniform(generator, b, 2, low=2, high=60).floor().long()
    centres = normal(generator, b, 2, 60, d)
    groups = (uniform(generator, b, 2, n) * number[..., None]).long()
    picked = centres.gather(2, groups[..., None].expand(b, 2, n, d))
    spread = uniform(generator, b, 1, d, low=0.05, high=0.8)
    z = torch.where(kind == 2, picked[:, 0] + spread * z, z)
    exact = chance(generator, uniform(generator, b, 1, 1), b, 1, d)
    which = chance(generator, 0.5, b, 1, d)
    design = torch.where(which, picked[:, 0], picked[:, 1])
    z = torch.where((kind == 3) & exact, design, z)
    return standardise(z)


def _relevance(b: int, d: int, generator: torch.Generator) -> Tensor:
    """How much each column matters, (b, d): decaying or even, some not at all, one always 1."""
    decay = uniform(generator, b, 1, high=4)
    relevance = torch.exp(decay * uniform(generator, b, d).clamp_min(1e-6).log())
    relevant = chance(generator, uniform(generator, b, 1, low=0.25, high=1.3), b, d)
    relevance *= relevant
    first = integers(generator, 0, d - 1, b, 1)
    return relevance.scatter(1, first, 1.0)


def _normal_cdf(z: Tensor) -> Tensor:
    return torch.special.ndtr(z)


# Marginals: the first five are monotone and lose nothing of z.
_MARGINALS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda z: z,
    _normal_cdf,
    lambda z: z.clamp(max=4).exp(),
    lambda z: torch.sinh(1.3 * z.clamp(-4, 4)),
    lambda z: torch.sigmoid(3 * z),
    lambda z: (0.6 * z.clamp(max=6)).exp().mul(3).round(),
    lambda z: (2 * z).round(),
    lambda z: (z - 0.3).clamp_min(0).pow(1.5),
    lambda z: (_normal_cdf(z) * 5).floor(),
    lambda z: (z > 0.5).to(z.dtype),
)
_MARGINAL_WEIGHTS = (3.0, 2.0, 1.5, 0.4, 0.4, 0.7, 0.6, 0.5, 0.5, 0.3)
_LOSSLESS = 5


def _observe(z: Tensor, causal: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Raw columns X and the standardised inputs u of the mechanisms, both (b, n, d)."""
    b, n, d = z.shape
    plain = chance(generator, torch.where(causal, 0.6, 0.25)[:, None], b, d)
    kinds = torch.where(plain, 0, choice(generator, _MARGINAL_WEIGHTS, b, d))
    columns = z.transpose(1, 2).reshape(b * d, n)
    x = by_kind(kinds.reshape(-1), columns, _MARGINALS).view(b, d, n).transpose(1, 2)
    x = x * torch.where(chance(generator, 0.25, b, 1, d), -1.0, 1.0)
    # Mechanisms see z or what is observed of it; information that is lost is lost for them, too.
    latent = (kinds < _LOSSLESS)[:, None, :] & chance(generator, 0.5, b, 1, 1)
    u = torch.where(latent, z, standardise(x).clamp(-6, 6))
    x, u = _categories(z, x, u, generator)
    # Near-copies: a column measured again.
    copied = chance(generator, 0.3, b, 1, d) & chance(generator, 0.2, b, 1, 1)
    source = integers(generator, 0, d - 1, b, 1, d)
    error = torch.tensor([0.0, 0.03, 0.3], device=z.device)[integers(generator, 0, 2, b, 1, d)]
    scale = x.std(1, keepdim=True, correction=0)
    x = (
        x
        + torch.where(copied, x.gather(2, source.expand(b, n, d)) - x, 0.0)
        + torch.where(copied, error * scale * normal(generator, b, n, d), 0.0)
    )
    return x, torch.where(copied, u.gather(2, source.expand(b, n, d)), u)


def _categories(
    z: Tensor, x: Tensor, u: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Replace some columns by codes of categories, cut at values of the column."""
    b, n, d = z.shape
    share = 0.9 * uniform(generator, b, 1) * chance(generator, 0.35, b, 1)
    coded = chance(generator, share, b, d)
    levels = torch.where(chance(generator, 0.4, b, d), 2, integers(generator, 2, _LEVELS, b, d))
    cuts = z.gather(1, integers(generator, 0, n - 1, b, _LEVELS - 1, d))
    used = torch.arange(_LEVELS - 1, device=z.device)[:, None] < (levels - 1)[:, None, :]
    level = ((z[:, :, None, :] > cuts[:, None]) & used[:, None]).sum(2)
    order = uniform(generator, b, _LEVELS, d).argsort(1)  # codes, not ranks, in seven of ten
    ordinal = chance(generator, 0.3, b, 1, d)
    code = torch.where(ordinal, level, order.gather(1, level)).to(z.dtype)
    effect = normal(generator, b, _LEVELS, d).gather(1, level)
    by_level = torch.where(ordinal, level.to(z.dtype), effect)
    coded = coded[:, None, :]
    return torch.where(coded, code, x), torch.where(coded, standardise(by_level), u)


def _add_mechanisms(
    scores: Tensor, u: Tensor, relevance: Tensor, chosen: Tensor, generator: torch.Generator
) -> None:
    """Write the outputs of one mechanism a data set, or of two in four of ten, into ``scores``."""
    b, _, k = scores.shape
    for term in range(2):
        # The second is weaker, and mostly linear: trends with something on top.
        weights = _MECHANISM_WEIGHTS if term == 0 else (4.0, 1.0, 0.5, 0.5)
        kinds = choice(generator, weights, b)
        active = chosen if term == 0 else chosen & chance(generator, 0.4, b)
        strength = uniform(generator, b, 1, 1, low=0.1, high=1.0)
        for kind in kinds[active].unique().tolist():
            rows = (active & (kinds == kind)).nonzero().squeeze(1)
            values = standardise(MECHANISMS[kind](u[rows], relevance[rows], k, generator))
            scores[rows] += values if term == 0 else strength[rows] * values


_LINKS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda f: f,
    lambda f: (0.5 * f.clamp(-6, 6)).exp(),
    lambda f: (1.2 * f.clamp(-4, 4)).exp(),
    lambda f: torch.sinh(f.clamp(-4, 4)),
    functional.relu,
    lambda f: f.clamp(max=1.3),
    lambda f: torch.sigmoid(2 * f),
    lambda f: f.sign() * f.abs().sqrt(),
    lambda f: (1 + f.square()).sqrt(),
)
_LINK_WEIGHTS = (6.0, 0.9, 0.7, 0.4, 0.3, 0.3, 0.5, 0.3, 0.3)


def _noise(f: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
    """Noise (b, n) of unit scale or so: five laws; in a third of data sets its scale varies."""
    b, n = f.shape
    white = normal(generator, b, n)
    squares = normal(generator, b, n, 6).square()
    degrees = integers(generator, 3, 6, b, 1, 1)
    used = torch.arange(6, device=f.device) < degrees
    student = white * (degrees[..., 0] / (squares * used).sum(2)).sqrt()
    exponential = squares[..., :2].sum(2) / 2
    sign = torch.where(chance(generator, 0.5, b, 1), 1.0, -1.0)
    laplace = white * exponential.sqrt()
    skewed = (exponential - 1) * sign
    hidden = chance(generator, uniform(generator, b, 1, low=0.05, high=0.5), b, n)
    bimodal = 0.4 * white + 2 * hidden * sign
    kind = choice(generator, (5.5, 1.8, 0.8, 1.0, 0.5), b)
    laws = torch.stack((white, student, laplace, skewed, bimodal))
    noise = laws.gather(0, kind[None, :, None].expand(1, b, n)).squeeze(0)
    # The log scale follows a column, a weighted sum of columns, or the signal.
    weights = normal(generator, b, u.shape[2]) * chance(generator, 0.5, b, u.shape[2])
    column = standardise((u * weights[:, None, :]).sum(2))
    driver = torch.where(chance(generator, 0.5, b, 1), column, standardise(f)).clamp(-2.5, 2.5)
    slope = uniform(generator, b, 1, low=-1.0, high=1.0) * chance(generator, 0.35, b, 1)
    return noise * torch.exp(slope * driver)


def _targets(f: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
    """Targets (b, n) of the signals (b, n): link, noise, rounding."""
    b = len(f)
    links = choice(generator, _LINK_WEIGHTS, b)
    f = standardise(f)
    early = chance(generator, 0.7, b)  # link before the noise, else after
    signal = torch.where(early[:, None], standardise(by_kind(links, f, _LINKS)), f)
    # As in tables: from practically none (formulas, simulations) to as much as the signal.
    kind = choice(generator, (7.0, 2.0, 0.6, 0.4), b)
    scale = (
        torch.stack(
            (
                log_uniform(generator, b, low=0.01, high=1),
                uniform(generator, b, low=0.2, high=1.2),
                log_uniform(generator, b, low=0.001, high=0.01),
                log_uniform(generator, b, low=1, high=10),
            )
        )
        .gather(0, kind[None])
        .T
    )
    y = signal + scale * _noise(signal, u, generator)
    late = by_kind(torch.where(early, 0, links), standardise(y), _LINKS)
    y = standardise(torch.where(early[:, None], y, late))
    # Counts, marks and gauges.
    step = log_uniform(generator, b, 1, low=0.02, high=1)
    y = torch.where(chance(generator, 0.12, b, 1), (y / step).round() * step, y)
    return y.clamp(-1e3, 1e3)


def _shares(b: int, most: int, count: Tensor, generator: torch.Generator) -> Tensor:
    """Shares of the classes (b, most), from even to very uneven; 0 beyond a data set's count."""
    unevenness = uniform(generator, b, 1, high=1.3) * chance(generator, 0.8, b, 1)
    shares = torch.exp(unevenness * normal(generator, b, most))
    shares = shares * (torch.arange(most, device=shares.device) < count[:, None])
    return shares / shares.sum(1, keepdim=True)


def _class_columns(
    z: Tensor,
    drawn: Tensor,
    relevance: Tensor,
    count: Tensor,
    most: int,
    generator: torch.Generator,
) -> Tensor:
    """Labels (b, n) first, columns given them: the rows of ``drawn`` data sets move to clusters."""
    b, n, d = z.shape
    cumulative = _shares(b, most, count, generator).cumsum(1)
    labels = torch.searchsorted(cumulative, uniform(generator, b, n) * 0.9999)
    labels = torch.minimum(labels, (count - 1)[:, None])
    cluster = (uniform(generator, b, n) * integers(generator, 1, 3, b, 1)).long()
    centres = normal(generator, b, most * 3, d) * relevance[:, None, :]
    distance = log_uniform(generator, b, 1, 1, low=0.5, high=6)
    spreads = torch.exp(0.5 * normal(generator, b, most * 3, d))
    index = (labels * 3 + cluster)[..., None].expand(b, n, d)
    moved = distance * centres.gather(1, index) + z * spreads.gather(1, index)
    z.copy_(torch.where(drawn[:, None, None], standardise(moved), z))
    return labels


def _classes(scores: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """Labels (b, n) of scores (b, n, C): intervals of the first, or the largest of noisy ones."""
    b, n, most = scores.shape
    scores = standardise(scores)
    noise = log_uniform(generator, b, 1, low=0.02, high=1.5)
    score = standardise(scores[..., 0] + noise * normal(generator, b, n))
    cumulative = _shares(b, most, count, generator).cumsum(1)
    # Boundaries at quantiles of the score itself, so that shares hold whatever its law.
    position = (cumulative[:, :-1] * (n - 1)).round().long().clamp(0, n - 1)
    bounds = score.sort(1).values.gather(1, position)
    ranks = torch.searchsorted(bounds, score)
    ranks = torch.minimum(ranks, (count - 1)[:, None])
    gumbel = -uniform(generator, b, n, most).clamp(1e-7, 1 - 1e-7).log().neg().log()
    bias = uniform(generator, b, 1, 1, high=1.2) * normal(generator, b, 1, most)
    temperature = log_uniform(generator, b, 1, 1, low=0.02, high=1)
    logits = scores + bias + temperature * gumbel
    index = torch.arange(most, device=scores.device)
    logits = logits.masked_fill(index >= count[:, None, None], -torch.inf)
    ordinal = chance(generator, 0.45, b, 1)
    return torch.where(ordinal, ranks, logits.argmax(2))


def _relabel(labels: Tensor, count: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Wrong labels here and there; then classes that occur get codes 0.. in random order."""
    b, n = labels.shape
    rate = uniform(generator, b, 1, high=0.15) * chance(generator, 0.3, b, 1)
    other = (uniform(generator, b, n) * count[:, None]).long()
    labels = torch.where(chance(generator, rate, b, n), other, labels)
    present = functional.one_hot(labels, most).amax(1).bool()
    keys = uniform(generator, b, most) + 2.0 * ~present
    return keys.argsort(1).argsort(1).gather(1, labels)


def _missing(x: Tensor, generator: torch.Generator) -> Tensor:
    """Cells lost in one of seven data sets, at random or above a column's random value."""
    b, n, d = x.shape
    affected = chance(generator, 0.14, b, 1, 1) & chance(generator, 0.5, b, 1, d)
    rate = uniform(generator, b, 1, d).square() * 0.6
    lost = chance(generator, rate, b, n, d)
    bound = x.gather(1, integers(generator, 0, n - 1, b, 1, d))
    selective = chance(generator, 0.15, b, 1, d)
    lost = torch.where(selective, lost & (x > bound), lost)
    return x.masked_fill(lost & affected, torch.nan)

"""Simulation-based calibration of the samplers: SMC, masked MCMC and NUTS.

Parameters are drawn from the prior and data from them; among posterior draws given that data, the
rank of what it was made with is uniform where the sampler is right (S. Talts et al. 2018,
arXiv 1804.06788). Each sampler has a conjugate model (linear, Normal weights; masked networks draw
their noise, too) and one that is not (3 hidden nodes, noise unknown). Ranks are of the function at
a new row, of the noise, and of the width. ``results/plots/sbc_SAMPLER.png`` has the histograms,
with the band that a count is in with probability 0.99. Of NUTS and masked MCMC the draws are
thinned, not independent, which a p-value takes them to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.func import functional_call

from tests.models.test_masked_bnn import ranks as masked_ranks
from uq.inference import MaskedMoves, RandomWalk, SMCSampler, WidthPrior
from uq.inference.nuts import sample_nuts
from uq.nn import MLP, Network, NormalLikelihood
from uq.nn.masked_bnn import MaskedMLP

Row = dict[str, Any]
Ranks = dict[str, np.ndarray]
PLOTS = Path(__file__).parent / "results" / "plots"
DRAWS, CLASSES = 19, 10
RUNS, NUTS_RUNS = 300, 100


def smc(hidden: bool) -> Ranks:
    """All data sets in one batch, each with 200 particles.

    The moves must be many: noise has to shrink at every temperature as the function finds the data.
    After a few steps it is still too large, which shows as ranks of 0.
    """
    g = torch.Generator().manual_seed(0)
    d = 11 if hidden else 3
    x = torch.randn(15, 1 if hidden else 2, generator=g, dtype=torch.float64)

    def function(theta: Tensor, x: Tensor) -> Tensor:
        """(…, D) and (n, d) to (…, n)."""
        if not hidden:
            return theta[..., :2] @ x.T + theta[..., 2:]
        w, b, v = theta[..., :3], theta[..., 3:6], theta[..., 6:9]
        return ((w[..., None, :] * x + b[..., None, :]).tanh() @ v[..., None])[..., 0] + theta[
            ..., 9:10
        ]

    def log_scale(theta: Tensor) -> Tensor:
        return 0.5 * theta[..., 10] - 1 if hidden else torch.full(theta.shape[:-1], math.log(0.5))

    def draw(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
        return torch.randn(*shape, d, generator=g, dtype=torch.float64)

    truth = draw((RUNS, 1), g)
    noise = torch.randn(RUNS, 1, len(x), generator=g, dtype=torch.float64)
    y = function(truth, x) + log_scale(truth)[..., None].exp() * noise

    def log_likelihood(theta: Tensor) -> Tensor:
        s = log_scale(theta)
        z = (y - function(theta, x)) / s[..., None].exp()
        return -0.5 * z.square().sum(-1) - len(x) * s

    sampler = SMCSampler(
        draw,
        lambda theta: -0.5 * theta.square().sum(-1),
        log_likelihood,
        RandomWalk(150 if hidden else 20),
        n_particles=200,
        n_runs=RUNS,
    )
    result = sampler.run(generator=g)
    chosen = torch.multinomial(result.log_weights.exp(), DRAWS, True, generator=g)
    draws = result.particles.gather(1, chosen[..., None].expand(-1, -1, d))
    new = torch.randn(1, x.shape[1], generator=g, dtype=torch.float64)
    found = {"function": (function(draws, new) < function(truth, new)).sum(1)[:, 0].numpy()}
    if hidden:
        found["noise"] = (draws[..., 10] < truth[..., 10]).sum(1).numpy()
    return found


def masked(hidden: bool) -> Ranks:
    """Each data set a chain, all chains in one batch."""
    network = MaskedMLP((1, 3, 1) if hidden else (2, 1))
    floors = [1] * len(network.groups)
    prior = WidthPrior(network.groups, [0.1] * len(floors), floors)
    moves = MaskedMoves(n_leapfrog=8, n_mask_moves=3)
    below = masked_ranks(network, prior, moves, 0.15, 16, RUNS, DRAWS).long().numpy()
    return dict(zip(("function", "noise", "width")[: 3 if hidden else 2], below, strict=False))


def nuts(hidden: bool) -> Ranks:
    """Two chains a data set; every 20th draw is kept."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(15, 2, dtype=torch.float64, generator=g)
    network = Network(MLP(2, (3,) if hidden else (), 1), NormalLikelihood(1)).double()
    if not hidden:  # known noise: a Normal posterior
        network.likelihood.requires_grad_(False)
    shapes = {k: p.shape for k, p in network.named_parameters() if p.requires_grad}
    found: dict[str, list[int]] = {"function": [], "noise": []}
    for run in range(NUTS_RUNS):
        truth = {
            k: torch.randn(shape, dtype=torch.float64, generator=g) for k, shape in shapes.items()
        }
        loc, scale = functional_call(network, truth, (x,))
        y = (loc + scale * torch.randn(loc.shape, dtype=torch.float64, generator=g)).detach()
        starts = {k: torch.randn(2, *shape, generator=g) for k, shape in shapes.items()}
        chains = sample_nuts(
            network, x, y, starts, n_warmup=200, n_draws=200, target_accept=0.9, seed=run
        )
        draws = {k: t[:, ::20].flatten(0, 1)[:DRAWS] for k, t in chains.draws.items()}
        values = torch.stack(
            [
                functional_call(network, {k: t[i] for k, t in draws.items()}, (x[:1],))[0]
                for i in range(DRAWS)
            ]
        )
        found["function"].append(int((values[:, 0, 0] < loc[0, 0]).sum()))
        if hidden:
            raw = draws["likelihood.raw_scale"][:, 0]
            found["noise"].append(int((raw < truth["likelihood.raw_scale"][0]).sum()))
    return {k: np.array(v) for k, v in found.items() if v}


def counted(ranks: np.ndarray) -> np.ndarray:
    """Counts of the 20 ranks in classes of equal size."""
    return np.bincount(ranks * CLASSES // (DRAWS + 1), minlength=CLASSES)


def plot(sampler: str, found: dict[str, Ranks]) -> None:
    from matplotlib.figure import Figure

    panels = [(model, of, r) for model, part in found.items() for of, r in part.items()]
    figure = Figure((2.6 * len(panels), 2.3), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), sharey=True)
    for ax, (model, of, ranks) in zip(axes, panels, strict=True):
        counts = counted(ranks)
        ax.axhspan(*stats.binom(len(ranks), 1 / CLASSES).interval(0.99), color="0.88", lw=0)
        ax.axhline(len(ranks) / CLASSES, color="0.5", lw=1)
        ax.bar(np.arange(CLASSES) * 2 + 0.5, counts, width=1.7, color="#3b6ea5")
        p = stats.chisquare(counts).pvalue
        ax.set_title(f"{model}: {of}\n$p$ = {p:.2f}", fontsize=9)
        ax.set_xlabel(f"rank among {DRAWS} draws", fontsize=8)
        ax.tick_params(labelsize=8)
    axes[0].set_ylabel("simulations", fontsize=8)
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / f"sbc_{sampler}.png", dpi=90)


def run() -> list[Row]:
    """Counts and p-values of all ranks; writes the histograms."""
    rows: list[Row] = []
    samplers: dict[str, Callable[[bool], Ranks]] = {"SMC": smc, "masked": masked, "NUTS": nuts}
    for name, sample in samplers.items():
        found = {"conjugate": sample(False), "3 nodes": sample(True)}
        plot(name.lower(), found)
        for model, part in found.items():
            for of, ranks in part.items():
                counts = counted(ranks)
                rows.append(
                    {
                        "sampler": name,
                        "model": model,
                        "of": of,
                        "simulations": len(ranks),
                        "counts": " ".join(map(str, counts)),
                        "chi2_p": float(f"{stats.chisquare(counts).pvalue:.3g}"),
                    }
                )
    return rows

"""The No-U-Turn sampler over all weights of a network, by NumPyro, with vectorised chains.

    log p(θ | D) = Σ_i w_i log p(y_i | x_i, θ) + log N(θ; 0, s² I) + const

θ holds the learned noise scale, too. Sampling is exact up to Monte-Carlo error, which makes it the
reference that approximations are held against; it is for small networks and some thousand rows.

M. D. Hoffman, A. Gelman, "The No-U-Turn Sampler", JMLR 15 (2014), arXiv 1111.4246; multinomial
draws along the trajectory: M. Betancourt, arXiv 1701.02434, appendix A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uq.errors import NonFiniteLossError
from uq.inference.training import warn_interrupted
from uq.nn.network import Network
from uq.nn.nuts import JaxNetwork, to_arrays

# Transitions between two looks at the keyboard and the progress bar.
_BLOCK = 50
_STATS = ("lp", "acceptance_rate", "n_steps", "diverging", "energy", "step_size")

Layout = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class NUTSRun:
    """What the sampler drew after warm-up."""

    draws: dict[str, Tensor]
    """Trainable weights by name, each (chains, draws, …), in float64."""
    sample_stats: dict[str, np.ndarray]
    """"lp" (log density up to a constant, in nats), "acceptance_rate", "n_steps", "diverging",
    "energy", "step_size", "reached_max_treedepth": each (chains, draws)."""
    interrupted: bool


def sample_nuts(
    network: Network,
    x: Tensor,
    y: Tensor,
    starts: Mapping[str, Tensor],
    *,
    weight: Tensor | None = None,
    prior_scale: float = 1.0,
    n_warmup: int = 500,
    n_draws: int = 250,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    seed: int = 0,
    verbose: int = 0,
    description: str = "NUTS",
) -> NUTSRun:
    """Draw from the posterior over the weights of ``network``.

    The chains run in float64 on the CPU as one vectorised program, which is compiled once for an
    architecture and a size of data (rows are padded to a few sizes): a second run of the same
    shape starts at once. Warm-up adapts the step size and a diagonal mass matrix, for each chain.

    Parameters
    ----------
    network : Network
        Architecture, likelihood, frozen weights and buffers.
    x : Tensor of shape (n, …)
        Inputs.
    y : Tensor of shape (n,) or (n, m)
        Positions of the classes, or targets.
    starts : dict of Tensor
        Where the chains start: trainable weights by name, each (chains, …).
    weight : Tensor of shape (n,), optional
        Factor of each row's log likelihood.
    prior_scale : float, default=1.0
        Standard deviation of the Normal prior on every weight.
    n_warmup, n_draws : int
        Transitions of each chain before and after adaptation ends.
    target_accept : float, default=0.8
        Mean acceptance probability that the step size is adapted to.
    max_tree_depth : int, default=10
        A trajectory has at most 2^depth − 1 leapfrog steps.
    seed : int, default=0
        Seed of all chains.
    verbose : int, default=0
        1 shows a progress bar.
    description : str, default="NUTS"
        Name on the progress bar and in messages.

    Returns
    -------
    NUTSRun
        After an interrupt, the draws so far (none where it came during warm-up).

    Raises
    ------
    ParameterError
        If the network cannot be translated to JAX.
    NonFiniteLossError
        If the log density is not finite where the chains start.
    """
    import jax
    from tqdm.auto import tqdm

    layout: Layout = tuple((name, tuple(t.shape[1:])) for name, t in starts.items())
    rest = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    fixed = to_arrays({k: v for k, v in rest.items() if k not in starts})
    start = np.concatenate([a.reshape(len(a), -1) for a in to_arrays(starts).values()], 1)
    data = _padded(x, y, weight)
    total = n_warmup + n_draws
    n_blocks = -(-total // _BLOCK)
    block = -(-total // n_blocks)
    blocks: list[tuple[np.ndarray, ...]] = []
    interrupted = False
    progress = tqdm(total=total, desc=description, unit="draw", disable=verbose < 1)
    try:
        with jax.enable_x64(True):
            first, advance = _compiled(
                JaxNetwork(network), layout, n_warmup, target_accept, max_tree_depth, block
            )
            args = (*data, fixed, float(prior_scale))
            keys = jax.random.split(jax.random.key(seed), len(start))
            state = first(start, keys, args)
            if not np.isfinite(np.asarray(state.potential_energy)).all():
                raise NonFiniteLossError(
                    f"{description}: the log posterior is not finite where the chains start; look "
                    "for extreme values in X or y."
                )
            for _ in range(n_blocks):
                state, out = advance(state, args)
                blocks.append(tuple(np.asarray(a) for a in out))
                progress.update(min(block, total - progress.n))
    except KeyboardInterrupt:
        interrupted = True
        kept = max(0, block * len(blocks) - n_warmup)
        warn_interrupted(
            f"{description}, after {block * len(blocks)} of {total} transitions",
            f"the {kept} draws of each chain after warm-up are kept"
            if kept
            else "warm-up had not ended, so the chains' starting points are kept",
        )
    finally:
        progress.close()
    if block * len(blocks) <= n_warmup:
        return NUTSRun({name: t[:, :0].double() for name, t in starts.items()}, {}, interrupted)
    # Scan puts the transitions first within a chain: (chains, block, …).
    columns = [np.concatenate(parts, 1)[:, n_warmup:total] for parts in zip(*blocks, strict=True)]
    flat, *stats = columns
    sizes = [int(np.prod(shape)) for _, shape in layout]
    parts = np.split(flat, np.cumsum(sizes)[:-1], -1)
    draws = {
        name: torch.tensor(part.reshape(*flat.shape[:2], *shape))
        for (name, shape), part in zip(layout, parts, strict=True)
    }
    table = dict(zip(_STATS, stats, strict=True))
    table["reached_max_treedepth"] = table["n_steps"] >= 2**max_tree_depth - 1
    return NUTSRun(draws, table, interrupted)


def _padded(
    x: Tensor, y: Tensor, weight: Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of weight 0 up to 64, 96, 128, 192, …: one compiled program serves many sizes."""
    arrays = to_arrays({"x": x, "y": y})
    n, size = len(x), 64
    while size < n:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    w = np.zeros(size)
    w[:n] = 1.0 if weight is None else weight.cpu().double().numpy()
    pad = {k: np.zeros((size, *a.shape[1:]), a.dtype) for k, a in arrays.items()}
    for k, a in arrays.items():
        pad[k][:n] = a
    return pad["x"], pad["y"], w


@lru_cache(maxsize=16)
def _compiled(
    network: JaxNetwork,
    layout: Layout,
    n_warmup: int,
    target_accept: float,
    max_tree_depth: int,
    block: int,
) -> tuple[Any, Any]:
    """Start and advance all chains. One flat vector of weights halves the time to compile."""
    import jax
    from jax import numpy as jnp
    from numpyro.infer.hmc import hmc

    ends = np.cumsum([int(np.prod(shape)) for _, shape in layout])[:-1]

    def potential(x: Any, y: Any, w: Any, fixed: Any, prior_scale: Any) -> Any:
        def minus_log_density(flat: Any) -> Any:
            parts = jnp.split(flat, ends)
            weights = {k: p.reshape(s) for (k, s), p in zip(layout, parts, strict=True)} | fixed
            log_likelihood = (w * network.log_likelihood(weights, x, y)).sum()
            constant = flat.size * (jnp.log(prior_scale) + 0.5 * np.log(2 * np.pi))
            return 0.5 * ((flat / prior_scale) ** 2).sum() + constant - log_likelihood

        return minus_log_density

    start, sample = hmc(potential_fn_gen=potential, algo="NUTS")

    def first(flat: Any, key: Any, args: Any) -> Any:
        return start(
            flat,
            n_warmup,
            step_size=0.1,
            target_accept_prob=target_accept,
            max_tree_depth=max_tree_depth,
            model_args=args,
            rng_key=key,
        )

    def advance(state: Any, args: Any) -> Any:
        def one(state: Any, _: None) -> Any:
            new = sample(state, args)
            return new, (
                new.z,
                -new.potential_energy,
                new.accept_prob,
                new.num_steps,
                new.diverging,
                new.energy,
                new.adapt_state.step_size,
            )

        return jax.lax.scan(one, state, None, length=block)

    over_chains = jax.vmap(first, (0, 0, None)), jax.vmap(advance, (0, None))
    return jax.jit(over_chains[0]), jax.jit(over_chains[1])

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

from uq.errors import LoadError, NonFiniteLossError
from uq.inference.checkpoints import Stage
from uq.inference.training import obey, stops, warn_interrupted
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
    checkpoint: Stage | None = None,
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
    checkpoint : Stage, optional
        Where to write the chains now and then (every 50 transitions at most), and to go on from, to
        the same bits.
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
    LoadError
        If the checkpoint is that of other chains.
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
    saved, _ = (None, False) if checkpoint is None else checkpoint.load()
    done: int = 0 if saved is None else saved["done"]  # transitions
    blocks = [] if saved is None else [tuple(saved["draws"])]
    interrupted = False
    progress = tqdm(
        total=total, initial=min(done, total), desc=description, unit="draw", disable=verbose < 1
    )
    try:
        with jax.enable_x64(True), stops(checkpoint) as stop:
            first, advance = _compiled(
                JaxNetwork(network), layout, n_warmup, target_accept, max_tree_depth, block
            )
            args = (*data, fixed, float(prior_scale))
            keys = jax.random.split(jax.random.key(seed), len(start))
            if saved is None:
                state = first(start, keys, args)
                if not np.isfinite(np.asarray(state.potential_energy)).all():
                    raise NonFiniteLossError(
                        f"{description}: the log posterior is not finite where the chains start; "
                        "look for extreme values in X or y."
                    )
            elif done < total:
                state = _state_from(saved["state"], first.eval_shape(start, keys, args))
            while done < total:
                state, out = advance(state, args)
                # Scan puts the transitions first within a chain: (chains, block, …).
                kept = tuple(np.asarray(a)[:, max(0, n_warmup - done) :] for a in out)
                blocks, done = [*blocks, kept], done + block
                progress.update(min(block, total - progress.n))
                if checkpoint is not None and (stop.asked or checkpoint.due(done, block)):
                    chains = {"draws": _joined(blocks), "state": _as_arrays(state)}
                    checkpoint.save(done, {"done": done} | chains)
                obey(stop, description)
            if checkpoint is not None:
                checkpoint.finish({"done": done, "draws": _joined(blocks)})
    except KeyboardInterrupt:
        interrupted = True
        n_kept = max(0, done - n_warmup)
        warn_interrupted(
            f"{description}, after {done} of {total} transitions",
            f"the {n_kept} draws of each chain after warm-up are kept"
            if n_kept
            else "warm-up had not ended, so the chains' starting points are kept",
        )
    finally:
        progress.close()
    if done <= n_warmup:
        return NUTSRun({name: t[:, :0].double() for name, t in starts.items()}, {}, interrupted)
    flat, *stats = (column[:, :n_draws] for column in _joined(blocks))
    sizes = [int(np.prod(shape)) for _, shape in layout]
    parts = np.split(flat, np.cumsum(sizes)[:-1], -1)
    draws = {
        name: torch.tensor(part.reshape(*flat.shape[:2], *shape))
        for (name, shape), part in zip(layout, parts, strict=True)
    }
    table = dict(zip(_STATS, stats, strict=True))
    table["reached_max_treedepth"] = table["n_steps"] >= 2**max_tree_depth - 1
    return NUTSRun(draws, table, interrupted)


def _joined(blocks: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    return [np.concatenate(parts, 1) for parts in zip(*blocks, strict=True)]


def _as_arrays(state: Any) -> list[np.ndarray]:
    """Numbers of a sampler's state, its random keys among them."""
    import jax

    def numbers(leaf: Any) -> Any:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(leaf) if is_key else leaf)

    return [numbers(leaf) for leaf in jax.tree.leaves(state)]


def _state_from(arrays: list[np.ndarray], like: Any) -> Any:
    """State of these numbers, of the structure of ``like``."""
    import jax

    leaves, structure = jax.tree.flatten(like)
    state = [
        jax.random.wrap_key_data(jax.numpy.asarray(array))
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jax.numpy.asarray(array)
        for array, leaf in zip(arrays, leaves, strict=False)
    ]
    if [(a.shape, a.dtype) for a in state] != [(a.shape, a.dtype) for a in leaves]:
        raise LoadError("the checkpoint does not fit the chains of this fit.")
    return jax.tree.unflatten(structure, state)


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

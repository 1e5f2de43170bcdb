"""A Pyro model as the densities that :class:`uq.inference.smc.SMCSampler` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.func import vmap

from uq.errors import ParameterError
from uq.inference.training import isolated_rng

Densities = tuple[
    Callable[[tuple[int, ...], torch.Generator], Tensor],
    Callable[[Tensor], Tensor],
    Callable[[Tensor], Tensor],
    Callable[[Tensor], dict[str, Tensor]],
]


def pyro_densities(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Densities:
    """Split a Pyro model into prior and likelihood over unconstrained vectors.

    Parameters
    ----------
    model : callable
        Pyro model; called many times, under ``torch.func.vmap`` where it allows that.
    args, kwargs
        Of the model.

    Returns
    -------
    sample_prior, log_prior, log_likelihood : callable
        As :class:`uq.inference.SMCSampler` takes them. The prior is that of the unconstrained
        values, with the Jacobian of Pyro's transforms.
    constrain : callable
        Maps (…, D) to a dict of site values (…, *shape).

    Raises
    ------
    ParameterError
        If a latent site is discrete, there is none, nothing is observed, or data is subsampled.
    """
    with isolated_rng(0, torch.device("cpu")), torch.no_grad():
        trace = _trace(model, args, kwargs, {})
    sites = {k: trace.nodes[k] for k in trace.stochastic_nodes}
    if any(_subsamples(node) for node in trace.nodes.values()):
        raise ParameterError("SMC on a Pyro model: plates must not subsample the data.")
    sites = {k: node for k, node in sites.items() if not site_is_subsample(node)}
    discrete = [k for k, node in sites.items() if node["fn"].support.is_discrete]
    if discrete or not sites:
        raise ParameterError(
            "SMC on a Pyro model: it needs latent sites, all of them continuous, got "
            f"{', '.join(discrete) + ' (discrete)' if discrete else 'none'}."
        )
    if not [k for k in trace.observation_nodes if not site_is_subsample(trace.nodes[k])]:
        raise ParameterError("SMC on a Pyro model: no site is observed; pass obs=.")
    # Supports may depend on other sites' values in rare models; those of this trace are taken.
    transforms = {k: biject_to(node["fn"].support) for k, node in sites.items()}
    free = {k: transforms[k].inv(node["value"]) for k, node in sites.items()}
    shapes = {k: v.shape for k, v in free.items()}
    sizes = [v.numel() for v in free.values()]
    dtype = torch.promote_types(next(iter(free.values())).dtype, torch.float32)

    def split(theta: Tensor) -> dict[str, Tensor]:
        parts = theta.split(sizes, -1)
        return {
            k: part.reshape(theta.shape[:-1] + shapes[k])
            for k, part in zip(shapes, parts, strict=True)
        }

    def constrain(theta: Tensor) -> dict[str, Tensor]:
        return {k: transforms[k](v) for k, v in split(theta).items()}

    def both(vector: Tensor) -> tuple[Tensor, Tensor]:
        """Log prior with Jacobian, and log likelihood, of one vector."""
        unconstrained = split(vector)
        values = {k: transforms[k](v) for k, v in unconstrained.items()}
        found = _trace(model, args, kwargs, values)
        with pyro.validation_enabled(False):  # it would branch on values
            found.compute_log_prob()
        prior = likelihood = vector.new_zeros(())
        for name, node in found.nodes.items():
            if node["type"] != "sample" or site_is_subsample(node):
                continue
            if name in values:
                u, v = unconstrained[name], values[name]
                prior = (
                    prior + node["log_prob_sum"] + transforms[name].log_abs_det_jacobian(u, v).sum()
                )
            else:
                likelihood = likelihood + node["log_prob_sum"]
        return prior, likelihood

    def batched(theta: Tensor) -> tuple[Tensor, Tensor]:
        flat = theta.reshape(-1, theta.shape[-1])
        try:
            prior, likelihood = vmap(both)(flat)
        except RuntimeError as error:
            # Control flow on values, or an operation without a batching rule.
            if "vmap" not in str(error) and "atching rule" not in str(error):
                raise
            parts = [both(vector) for vector in flat]
            prior, likelihood = (torch.stack(list(p)) for p in zip(*parts, strict=True))
        return prior.reshape(theta.shape[:-1]), likelihood.reshape(theta.shape[:-1])

    def sample_prior(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        rows = []
        with isolated_rng(seed, generator.device), torch.no_grad():
            for _ in range(torch.Size(shape).numel()):
                nodes = _trace(model, args, kwargs, {}).nodes
                row = [transforms[k].inv(nodes[k]["value"]).reshape(-1).to(dtype) for k in shapes]
                rows.append(torch.cat(row))
        return torch.stack(rows).reshape(*shape, -1)

    return sample_prior, lambda t: batched(t)[0], lambda t: batched(t)[1], constrain


def _subsamples(node: Any) -> bool:
    """Whether a plate takes fewer rows than it has."""
    if node["type"] != "sample" or not site_is_subsample(node):
        return False
    size = getattr(node["fn"], "subsample_size", None)
    return size is not None and size < node["fn"].size


def _trace(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[str, Tensor],
) -> Any:
    """Run the model with latent sites fixed, leaving the parameter store as it was."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()), pyro.validation_enabled(False):
        handler = poutine.condition(model, data=values) if values else model
        return poutine.trace(handler).get_trace(*args, **kwargs)

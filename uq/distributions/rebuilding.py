"""Distributions of PyTorch and Pyro, changed in their parameters: the same tree with new leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

Function = Callable[[Tensor], Tensor]


def rebuild(d: td.Distribution, f: Function, shape: torch.Size) -> Any:
    """Same distribution with ``f`` applied to each parameter, expanded to the batch shape.

    Parameters of the components of a mixture come with the components on the first axis.
    """
    kind: Any = type(d)
    if isinstance(d, td.MixtureSameFamily):
        logits = d.mixture_distribution.logits
        wide = torch.Size((*shape, logits.shape[-1]))

        def of_parts(t: Tensor) -> Tensor:
            return f(t.movedim(-1, 0)).movedim(0, -1)

        weights = td.Categorical(logits=of_parts(logits.expand(wide)), validate_args=False)
        return kind(weights, rebuild(d.component_distribution, of_parts, wide), validate_args=False)
    names = list(d.arg_constraints)
    if not names and isinstance(d, td.TransformedDistribution):
        like = _first_parameter(d.base_dist).expand(shape)
        transforms = [_rebuild_transform(t, f, like) for t in d.transforms]
        return kind(rebuild(d.base_dist, f, shape), transforms, validate_args=False)
    if "probs" in names and "logits" in names:  # two names of one parameter
        names.remove("logits")
    parameters = {name: f(getattr(d, name).expand(shape)) for name in names}
    return kind(**parameters, validate_args=False)


def _rebuild_transform(t: td.Transform, f: Function, like: Tensor) -> td.Transform:
    if isinstance(t, td.ComposeTransform):
        return td.ComposeTransform([_rebuild_transform(part, f, like) for part in t.parts])
    if isinstance(t, td.AffineTransform):
        loc, scale = (p if isinstance(p, Tensor) else like.new_tensor(p) for p in (t.loc, t.scale))
        return td.AffineTransform(f(loc.expand(like.shape)), f(scale.expand(like.shape)))
    if isinstance(t, td.PowerTransform):
        return td.PowerTransform(f(t.exponent.expand(like.shape)))
    inverse = vars(t).get("_inv")  # a weak reference unless t is defined as an inverse
    if isinstance(inverse, td.Transform):
        return _rebuild_transform(inverse, f, like).inv
    if any(isinstance(value, Tensor) for value in vars(t).values()):
        raise NotImplementedError(f"the parameters of {type(t).__name__} are not known")
    return copy.copy(t)


def _first_parameter(d: Any) -> Tensor:
    if isinstance(d, td.MixtureSameFamily):
        return d.mixture_distribution.logits[..., 0]
    names = list(d.arg_constraints)
    return getattr(d, names[0]) if names else _first_parameter(d.base_dist)


def structure(d: Any) -> tuple[Any, ...]:
    """What ``rebuild`` keeps: the types in the tree, and the number of parts of a mixture."""
    if isinstance(d, td.MixtureSameFamily):
        n_parts = d.mixture_distribution.logits.shape[-1]
        return (type(d), n_parts, *structure(d.component_distribution))
    if isinstance(d, td.TransformedDistribution) and not d.arg_constraints:
        return (type(d), *structure(d.base_dist), *(repr(t) for t in d.transforms))
    return (type(d),)

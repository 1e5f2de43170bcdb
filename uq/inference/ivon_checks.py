"""Checks of IVON: of what it is given, and of what became of its curvature."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from uq.errors import ParameterError, UQError
from uq.inference.ivon_blocks import FlatGroup


class IVONStateError(UQError, RuntimeError):
    """The optimizer was used in an order that cannot work."""


class CurvatureWarning(UserWarning):
    """The learned curvature, and with it the posterior's width, is not to be trusted."""


@dataclass(frozen=True)
class Diagnostics:
    """What became of the curvature of one parameter group."""

    change: float
    """max |log((h + δ)/(h₀ + δ))| over the weights: below 0.1 the posterior is the initial one."""
    lowest: float
    """min log((h + δ)/(h₀ + δ)): far below 0 where the data says less than the initial guess."""
    memory: float
    """β₂ᵗ, the share of h₀ that is left after t steps."""
    noise_share: float
    """Share of h + δ that is gradient noise rather than curvature, mean(x²)/2ρ with x = ρ(ĥ − h)/
    (h + δ), averaged over the last hundred steps. At equilibrium it is ½ρλv/(h + δ), where v is
    the variance of the gradient; near 1 the curvature has run away."""


def diagnose(group: dict[str, Any], flat: FlatGroup) -> Diagnostics:
    """Measure what became of a group's curvature."""
    delta, rho = group["weight_decay"], 1 - group["beta2"]
    moved = ((flat.hess + delta) / (group["hess_init"] + delta)).log()
    return Diagnostics(
        change=float(moved.abs().max()),
        lowest=float(moved.min()),
        memory=group["beta2"] ** group["step"],
        noise_share=float(flat.squares) / (2 * rho) if rho > 0 else 0.0,
    )


def warn_about(found: Diagnostics, group: dict[str, Any]) -> None:
    """Warn where a group's curvature is not to be trusted."""
    if found.change < 0.1:
        _warn(
            f"the curvature moved by {100 * math.expm1(found.change):.2g} % at most in "
            f"{group['step']} steps: the posterior's width is still that of hess_init. Lower beta2 "
            f"({group['beta2']!r}); 1 - 2/steps is a good value."
        )
    if found.noise_share > 0.5:
        _warn(
            f"{100 * min(found.noise_share, 1):.0f} % of the curvature is gradient noise: it has "
            "run away, the posterior is too narrow and the learning rate too small. Raise beta2 "
            f"({group['beta2']!r}), the batch size or mc_samples, or lower ess."
        )
    if group["weight_decay"] == 0 and found.lowest < math.log(1e-3):
        _warn(
            "weights of a group with weight_decay=0 have less than a thousandth of hess_init left: "
            "the loss is flat there and no prior bounds their standard deviation. Give the group "
            "a small weight_decay."
        )


def _warn(message: str) -> None:
    warnings.warn(f"IVON: {message}", CurvatureWarning, stacklevel=4)


def check_group(group: dict[str, Any]) -> None:
    """Check the settings and the parameters of a group."""

    def need(name: str, expected: str, holds: Callable[[Any], bool]) -> None:
        value = group[name]
        if not isinstance(value, Real) or isinstance(value, bool) or not holds(value):
            raise ParameterError(f"IVON: {name} must be {expected}, got {value!r}.")

    parameters = group["params"]
    if not parameters:
        raise ParameterError("IVON: a group has no parameter that requires gradients.")
    need("lr", "a number >= 0", lambda v: 0 <= v < math.inf)
    need(
        "ess",
        "a number > 0 (the number of training rows, for the Bayesian posterior)",
        lambda v: 0 < v < math.inf,
    )
    need("weight_decay", "a number >= 0", lambda v: 0 <= v < math.inf)
    need("beta1", "in [0, 1)", lambda v: 0 <= v < 1)
    need("beta2", "in [0, 1]", lambda v: 0 <= v <= 1)
    need("clip_radius", "a number > 0", lambda v: v > 0)
    need(
        "hess_init",
        "a number >= 0, and > 0 without weight_decay",
        lambda v: 0 <= v < math.inf and v + group["weight_decay"] > 0,
    )
    if any(not p.dtype.is_floating_point or p.dtype.itemsize < 4 for p in parameters):
        raise ParameterError(
            "IVON: parameters must be float32 or float64, got "
            f"{sorted({str(p.dtype) for p in parameters})} (in fewer bits, steps vanish in the "
            "rounding); train in mixed precision by autocast instead."
        )
    kinds = {(p.dtype, p.device) for p in parameters}
    if len(kinds) > 1:
        raise ParameterError(
            "IVON: the parameters of one group must share dtype and device, got "
            f"{sorted(map(str, kinds))}; give each kind a group of its own."
        )


def check_memory(parameters: list[Tensor]) -> None:
    """Refuse parameters that overlap in memory: a sample written to one would move the other."""
    ranges = []
    for p in parameters:
        reach = sum((side - 1) * step for side, step in zip(p.shape, p.stride(), strict=True)) + 1
        start = p.data_ptr()
        if p.numel():
            ranges.append((p.device.type, p.device.index or 0, start, reach * p.element_size(), p))
    ranges.sort(key=lambda r: r[:3])
    for (kind, index, start, length, p), (kind2, index2, start2, _, q) in itertools.pairwise(
        ranges
    ):
        if (kind, index) == (kind2, index2) and start + length > start2:
            raise ParameterError(
                f"IVON: two parameters, of shapes {tuple(p.shape)} and {tuple(q.shape)}, share "
                "memory; to tie weights, use one and the same Parameter in both places."
            )


def check_ranks(pending: list[list[Tensor]], flats: list[FlatGroup]) -> None:
    """See that noises and gradients differ between processes; all of them must call it."""
    sums = [
        sum(float(g.double().sum()) for part in pending for g in part),
        sum(flat.noise_mark() for flat in flats),
    ]
    mine = torch.tensor(sums, dtype=torch.float64, device=flats[0].kept.device)
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    same_gradient, same_noise = (torch.stack(everyone) == mine).all(0).tolist()
    if len(everyone) == 1:
        return
    if same_noise:
        warnings.warn(
            "IVON: all processes draw the same noise, so that they count as one sample; give each "
            "a generator with a seed of its own.",
            UserWarning,
            stacklevel=4,
        )
    elif same_gradient:
        raise IVONStateError(
            "IVON: gradients are the same in all processes, as if DDP had averaged them; with "
            "sync=True run forward and backward inside `with model.no_sync():`."
        )

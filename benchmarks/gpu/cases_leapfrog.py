"""Cases of trajectories of many chains: kick and drift, energies, recorded graphs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from benchmarks.gpu.protocol import Case, Check, Place, Repeat, Timing, relative
from uq.kernels.leapfrog import Recorded, kick_drift, kick_energy, leapfrog, mlp_gradient

SIZES = (8, 32, 32, 1)


def by_reference(f: Callable[[], Any]) -> Callable[[], Any]:
    """The same in plain torch, on the same device."""

    def run() -> Any:
        before = os.environ.get("UQ_KERNELS")
        os.environ["UQ_KERNELS"] = "reference"
        try:
            return f()
        finally:
            if before is None:
                del os.environ["UQ_KERNELS"]
            else:
                os.environ["UQ_KERNELS"] = before

    return run


def state(place: Place, chains: int, n: int, dtype: torch.dtype, full: bool) -> list[Tensor]:
    g = place.generator()
    q, p, pull = (
        torch.randn(chains, n, generator=g, device=place.device, dtype=dtype) for _ in range(3)
    )
    size = (chains, n if full else 1)
    step = 0.1 + 0.1 * torch.rand(size, generator=g, device=place.device, dtype=dtype)
    return [q, p, pull, step]


def pieces(place: Place, dtype: torch.dtype, full: bool) -> float:
    q, p, pull, step = state(place, place.size(67, 3), place.size(5003, 1500), dtype, full)
    moved, kicked = kick_drift(q, p, pull, step, 0.5)
    last, energy = kick_energy(p, pull, step)
    half = p.double() + 0.5 * step.double() * pull.double()
    return max(
        relative(kicked, half),
        relative(moved, q.double() + step.double() * half),
        relative(last, half),
        relative(energy, 0.5 * half.square().sum(1)),
    )


def problem(place: Place, chains: int) -> tuple[list[Tensor], Callable[..., Any], Tensor, Tensor]:
    """State, density, and data of a regression by small networks."""
    g = place.generator()
    rows = place.size(455, 12)
    x = torch.randn(rows, SIZES[0], generator=g, device=place.device)
    y = x.sum(1, keepdim=True).sin()
    n = sum((a + 1) * b for a, b in pairwise(SIZES))

    def pull(outputs: Tensor) -> tuple[Tensor, Tensor]:
        error = y - outputs
        return -0.5 * error.square().sum((1, 2)), error

    def density(theta: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = mlp_gradient(theta, SIZES, x, pull)
        return value - 0.5 * theta.square().sum(1), gradient - theta

    theta = 0.3 * torch.randn(chains, n, generator=g, device=place.device)
    momentum = torch.randn(chains, n, generator=g, device=place.device)
    step = torch.full((chains,), 1e-3, device=place.device)
    return [theta, momentum, density(theta)[1], step], density, x, y


def trajectory(place: Place) -> float:
    """A recorded graph, replayed at another state, against plain torch there."""
    steps = place.size(20, 2)
    given, density, *_ = problem(place, place.size(64, 3))
    run = Recorded(lambda *t: leapfrog(*t, density, steps), *given)
    other = [given[0] + 0.1, -given[1], density(given[0] + 0.1)[1], 0.5 * given[3]]
    found = run(*other)
    wanted = by_reference(lambda: leapfrog(*other, density, steps))()
    return max(relative(a, b) for a, b in zip(found, wanted, strict=True))


def chains_apart(place: Place) -> float:
    """The first chains alone against among all of them."""
    given, density, *_ = problem(place, place.size(64, 4))
    steps = place.size(20, 2)
    some = [t[:2] for t in given]
    found, wanted = leapfrog(*some, density, steps), leapfrog(*given, density, steps)
    return max(relative(a, b[:2]) for a, b in zip(found, wanted, strict=True))


def contenders(place: Place) -> Mapping[str, Callable[[], Any]]:
    steps = place.size(20, 2)
    given, density, x, y = problem(place, place.size(64, 3))
    recorded = Recorded(lambda *t: leapfrog(*t, density, steps), *given)

    def one(theta: Tensor) -> Tensor:
        h, start = x, 0
        for i, (a, b) in enumerate(pairwise(SIZES)):
            weight = theta[start : start + a * b].view(b, a)
            start += a * b
            h = h @ weight.T + theta[start : start + b]
            start += b
            h = h.relu() if i < len(SIZES) - 2 else h
        return -0.5 * (y - h).square().sum() - 0.5 * theta.square().sum()

    both = vmap(grad_and_value(one))

    def by_vmap(theta: Tensor) -> tuple[Tensor, Tensor]:
        gradient, value = both(theta)
        return value, gradient

    runs = {
        "uq": lambda: recorded(*given),
        "kernels, no graph": lambda: leapfrog(*given, density, steps),
        "eager": by_reference(lambda: leapfrog(*given, density, steps)),
        "vmap": by_reference(lambda: leapfrog(*given, by_vmap, steps)),
    }
    if not place.small:
        compiled = torch.compile(density)
        runs["compile"] = by_reference(lambda: leapfrog(*given, compiled, steps))
    return runs


def kick_contenders(place: Place) -> Mapping[str, Callable[[], Any]]:
    q, p, pull, step = state(
        place, place.size(64, 2), place.size(1 << 20, 1500), torch.float32, False
    )

    def eager() -> tuple[Tensor, Tensor]:
        momentum = torch.addcmul(p, step, pull)
        return torch.addcmul(q, step, momentum), momentum

    return {"uq": lambda: kick_drift(q, p, pull, step), "eager": eager}


def repeated(place: Place) -> tuple[Tensor, ...]:
    q, p, pull, step = state(place, 5, place.size(5003, 1500), torch.float32, True)
    return (*kick_drift(q, p, pull, step), *kick_energy(p, pull, step))


def cases() -> list[Case]:
    found: list[Case] = [
        Check(
            "leapfrog",
            f"kick, drift and energy, steps of each {'entry' if full else 'chain'}",
            "fp64" if dtype == torch.float64 else "fp32",
            lambda place, dtype=dtype, full=full: pieces(place, dtype, full),
            1e-14 if dtype == torch.float64 else 1e-6,
            "a few roundings",
        )
        for dtype in (torch.float32, torch.float64)
        for full in (False, True)
    ]
    flop = 20 * 64 * 6 * 455 * sum(a * b for a, b in pairwise(SIZES))
    return [
        *found,
        Check("leapfrog", "recorded trajectory of 64 networks at a new state", "fp32", trajectory,
              1e-4, "roundings of 20 steps, each some 1e-6"),
        Check("leapfrog", "chains do not know of each other", "fp32", chains_apart, 1e-4,
              "batched products of another size may add in another order, as above"),
        Repeat("leapfrog", "kick, drift and energy", repeated),
        Timing("leapfrog", "20 steps, 64 chains, network 8-32-32-1, 455 rows", contenders,
               flop=flop, targets={"eager": 8.0}),
        Timing("leapfrog", "kick and drift, 64 × 2^20 coordinates", kick_contenders,
               moved=20 << 26, targets={"copy": 0.75}, memory=4 << 30),
    ]  # fmt: skip

"""Speed on a CPU of Gaussian layers, trajectories and reductions: a part of the kernel suite."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from benchmarks.gpu.protocol import forced
from benchmarks.measure import paired, row
from uq.kernels import local_reparam_linear, sampled_linear, sparse_linear
from uq.kernels.leapfrog import leapfrog, mlp_gradient
from uq.kernels.sdm import Support, count, nearest_keys, scan


def seconds(f: Callable[[], Any], calls: int = 1) -> Callable[[], float]:
    def measure() -> float:
        start = time.process_time()
        for _ in range(calls):
            f()
        return (time.process_time() - start) / calls

    return measure


def against(
    name: str, ours: Callable[[], Any], peer: Callable[[], Any], target: float | None = None,
    calls: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """How many times faster than the peer."""
    measured = paired(seconds(peer, calls), seconds(ours, calls), repeats=5)
    measured["ours"], measured["peer"] = measured["peer"], measured["ours"]
    label = "(for comparison)" if target is None else f">= {target:g} (higher is better)"
    met = None if target is None else measured["ratio"] >= target
    return row(name, "s", label, met, measured)


def benchmark_linear() -> list[dict[str, Any]]:
    rows = []
    for s, b, k, n in ((32, 128, 512, 512), (64, 8, 256, 256)):
        x, mean, std = torch.randn(b, k), torch.randn(n, k), torch.rand(n, k)

        def naive(x: Tensor = x, mean: Tensor = mean, std: Tensor = std, s: int = s) -> Any:
            return torch.stack([F.linear(x, mean + std * torch.randn_like(mean)) for _ in range(s)])

        def ours(x: Tensor = x, mean: Tensor = mean, std: Tensor = std, s: int = s) -> Any:
            return sampled_linear(x, mean, std, n_samples=s, seed=1)

        name = f"sampled_linear, {s} draws, {b} rows, {k} × {n} / a loop with torch.randn"
        rows.append(against(name, ours, naive))
    x, mean, std = torch.randn(256, 512), torch.randn(512, 512), torch.rand(512, 512)

    def by_hand() -> Tensor:
        m, v = F.linear(x, mean), F.linear(x.square(), std.square())
        return m + (v + 1e-8).sqrt() * torch.randn_like(m)

    name = "local_reparam_linear, 256 rows, 512 × 512 / by hand with torch.randn"
    rows.append(against(name, lambda: local_reparam_linear(x, mean, std, seed=1), by_hand))
    return rows


def trained(f: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], None]:
    own = [t.clone().requires_grad_() for t in leaves]

    def run() -> None:
        for t in own:
            t.grad = None
        f(*own).sum().backward()

    return run


def benchmark_sparse() -> list[dict[str, Any]]:
    """Compressed rows against dense products over densities: where the two meet."""
    n, rows, found = 1024, 256, []
    x = torch.randn(rows, n)
    limits = sparse_linear.MAX_DENSITY, sparse_linear.MIN_WEIGHTS

    def by_rows(f: Callable[[], Any], on: bool) -> Callable[[], Any]:
        def run() -> Any:
            sparse_linear.MAX_DENSITY, sparse_linear.MIN_WEIGHTS = (1.0, 1) if on else (0.0, 1)
            try:
                return f()
            finally:
                sparse_linear.MAX_DENSITY, sparse_linear.MIN_WEIGHTS = limits

        return run

    for density in (0.01, 0.03, 0.1, 0.2, 0.3, 0.5):
        size = int(density * n * n)
        index = torch.randperm(n * n)[:size].sort().values
        mean, std = torch.randn(size), torch.rand(size)

        def layer(x: Tensor, mean: Tensor, std: Tensor, index: Tensor = index) -> Tensor:
            return sparse_linear.sparse_local_reparam_linear(x, mean, std, index, (n, n), seed=1)

        step = trained(layer, x, mean, std)
        name = f"sparse_local_reparam_linear, gradients too, density {density:g} / dense products"
        target = 1.5 if density <= 0.03 else None
        found.append(against(name, by_rows(step, True), by_rows(step, False), target))
    return found


def benchmark_leapfrog() -> list[dict[str, Any]]:
    sizes, chains, steps = (8, 32, 32, 1), 16, 10
    x = torch.randn(455, 8)
    y = x.sum(1, keepdim=True).sin()

    def pull(outputs: Tensor) -> tuple[Tensor, Tensor]:
        error = y - outputs
        return -0.5 * error.square().sum((1, 2)), error

    def density(theta: Tensor) -> tuple[Tensor, Tensor]:
        return mlp_gradient(theta, sizes, x, pull)

    def one(theta: Tensor) -> Tensor:
        h, start = x, 0
        for i, (a, b) in enumerate(pairwise(sizes)):
            weight = theta[start : start + a * b].view(b, a)
            start += a * b
            h = h @ weight.T + theta[start : start + b]
            start += b
            h = h.relu() if i < len(sizes) - 2 else h
        return -0.5 * (y - h).square().sum()

    both = grad_and_value(one)

    def by_vmap(theta: Tensor) -> tuple[Tensor, Tensor]:
        gradient, value = vmap(both)(theta)
        return value, gradient

    theta = 0.3 * torch.randn(chains, sum((a + 1) * b for a, b in pairwise(sizes)))
    momentum, step = torch.randn_like(theta), torch.full((chains,), 1e-3)
    start = density(theta)[1]

    def run(f: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[], Any]:
        return lambda: leapfrog(theta, momentum, start, step, f, steps)

    def loop() -> None:
        for c in range(chains):
            at = slice(c, c + 1)
            leapfrog(theta[at], momentum[at], start[at], step[at], by_vmap, steps)

    label = f"trajectory of {steps} steps, {chains} chains, 455 rows"
    return [
        against(f"{label} / vmap of automatic gradients", run(density), run(by_vmap)),
        against(f"{label} / a loop over chains", run(density), loop, 1.5),
    ]


def benchmark_sdm() -> list[dict[str, Any]]:
    h, s = torch.randn(1000, 64), torch.randn(20_000, 64)
    group, own = torch.randint(-1, 10, (20_000,)), torch.randint(0, 10, (1000,))
    rows = Support.of(s)

    def ours() -> Any:
        nearest, radius = scan(h, own, rows, group)
        return nearest, count(h, rows, radius)

    def by_sorting() -> Any:
        d = torch.cdist(h, s)
        order = d.argsort(1)
        return (group[order] == own[:, None]).long().cumprod(1).sum(1)

    def by_radius() -> Any:
        d = torch.cdist(h, s)
        radius = d.masked_fill(group == own[:, None], torch.inf).amin(1)
        return d.min(1), (d < radius[:, None]).sum(1)

    label = "1,000 queries, 20,000 rows of 64"
    return [
        against(f"SDM's radius and count, {label} / cdist and sort", ours, by_sorting, 1.5),
        against(f"SDM's radius and count, {label} / cdist and reductions", ours, by_radius),
        against(f"32 nearest, {label} / cdist and topk", lambda: nearest_keys(h, rows, 32),
                lambda: torch.cdist(h, s).topk(32, largest=False)),
    ]  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Measure everything here."""
    torch.manual_seed(0)
    with forced("reference"):
        return [
            *benchmark_linear(),
            *benchmark_sparse(),
            *benchmark_leapfrog(),
            *benchmark_sdm(),
        ]

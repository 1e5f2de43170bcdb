"""Cases of reductions over distances: radius, count, window, k nearest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.protocol import Case, Check, Place, Repeat, Timing, differing
from uq.kernels.sdm import Support, count, nearest_keys, scan, unpack, window


def lattice(place: Place, n_support: int, n: int, m: int) -> tuple[Tensor, ...]:
    """Small integers of mean 0: distances are exact in float32 (and TF32), many are equal."""
    g = torch.Generator().manual_seed(0)
    half = torch.randint(-1, 2, (n_support // 2, m), generator=g).float()
    support = torch.cat([half, -half])
    queries = torch.cat([support[: n // 2], torch.randint(-2, 3, (n - n // 2, m), generator=g)])
    group = torch.randint(-1, 2, (n_support,), generator=g)
    predictions = torch.randint(0, 2, (n,), generator=g)
    exclude = torch.randint(-1, n_support, (n,), generator=g)
    exclude[: n // 2] = torch.arange(n // 2)
    parts = (queries, predictions, support, group, exclude)
    return tuple(t.to(place.device) for t in parts)


def sorted_distances(queries: Tensor, support: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
    """All squared distances in float64, on the CPU, by (distance, position)."""
    d = torch.cdist(queries.cpu().double(), support.cpu().double()).square().round(decimals=6)
    hidden = exclude.cpu()
    d[torch.arange(len(d))[hidden >= 0], hidden[hidden >= 0]] = torch.inf
    squared, order = d.sort(dim=1, stable=True)
    return squared, order


def ties(place: Place, n_support: int, n: int, m: int) -> float:
    """Share of wrong nearest rows, radii, and counts."""
    sizes = (64, 6, 5) if place.small else (n_support, n, m)
    queries, predictions, support, group, exclude = lattice(place, *sizes)
    squared, order = sorted_distances(queries, support, exclude)
    good = (group.cpu()[order] == predictions.cpu()[:, None]) & squared.isfinite()
    q = good.long().cumprod(1).sum(1)
    rows = Support.of(support)
    nearest, radius = scan(queries, predictions, rows, group, exclude)
    first_bad = order.gather(1, q.clamp_max(order.shape[1] - 1)[:, None])[:, 0]
    any_bad = q < squared.isfinite().sum(1)
    found = unpack(radius)[1].cpu()
    return max(
        differing(unpack(nearest)[1], order[:, 0]),
        differing(found[any_bad], first_bad[any_bad]) if any_bad.any() else 0.0,
        differing(count(queries, rows, radius, exclude), q),
    )


def k_nearest(place: Place, k: int) -> float:
    sizes = (64, 4, 5) if place.small else (5000, 301, 17)
    queries, _, support, _, exclude = lattice(place, *sizes)
    _, order = sorted_distances(queries, support, exclude)
    k = min(k, 5) if place.small else k
    found = unpack(nearest_keys(queries, Support.of(support), k, exclude))[1]
    return differing(found, order[:, :k])


def listed(place: Place) -> float:
    """Window: rows that are missing from the list, or should not be there."""
    sizes = (64, 6, 5) if place.small else (5000, 301, 17)
    queries, _, support, _, exclude = lattice(place, *sizes)
    squared, order = sorted_distances(queries, support, exclude)
    low = squared[:, 5]
    bounds = [t.float().to(place.device) for t in (low, low, squared[:, 0])]
    seen = window(queries, Support.of(support), *bounds, exclude)
    hit = (squared == low[:, None]) | (squared <= squared[:, :1])
    full = seen.full.cpu()
    wanted = {(i, int(order[i, c])) for i, c in hit.nonzero().tolist() if not full[i]}
    pairs = zip(seen.query.tolist(), seen.row.tolist(), strict=True)
    found = {(i, j) for i, j in pairs if not full[i]}
    wrong = len(wanted ^ found) + int((seen.closer.cpu() != (squared < low[:, None]).sum(1)).sum())
    return float(wrong)


def rounding(place: Place) -> float:
    """Largest error of the nearest distance in units of the bound that callers rely on."""
    g = place.generator()
    n, m = place.size(20_000, 64), place.size(300, 20)
    support = 30 + torch.randn(n, m, generator=g, device=place.device)
    queries = support[: place.size(200, 5)] + 1e-3
    rows = Support.of(support)
    nearest, _ = scan(queries, torch.zeros_like(queries[:, 0]).long(), rows,
                      torch.zeros(n, dtype=torch.long, device=place.device))  # fmt: skip
    squared, index = unpack(nearest)
    exact = (queries.double() - support.double()[index]).square().sum(1)
    norms = rows.centred(queries)[1].double()
    bound = 4 * (m + 4) * 2.0**-23 * (norms + (norms.sqrt() + exact.sqrt()) ** 2)
    return float(((squared.double() - exact).abs() / bound).max())


def features(place: Place) -> tuple[Tensor, ...]:
    g = place.generator()
    n, support, m = place.size(10_000, 6), place.size(100_000, 64), place.size(128, 5)
    h, s = (torch.randn(k, m, generator=g, device=place.device) for k in (n, support))
    group = torch.randint(-1, 10, (support,), generator=g, device=place.device)
    predictions = torch.randint(0, 10, (n,), generator=g, device=place.device)
    return h, predictions, s, group


def contenders(place: Place) -> Mapping[str, Callable[[], Any]]:
    h, predictions, s, group = features(place)
    rows = Support.of(s)

    def ours() -> Any:
        nearest, radius = scan(h, predictions, rows, group)
        return nearest, count(h, rows, radius)

    def reduce(part: Tensor, own: Tensor, s: Tensor, group: Tensor) -> Any:
        d = torch.cdist(part, s)
        radius = d.masked_fill(group == own[:, None], torch.inf).amin(1)
        return d.min(1), (d < radius[:, None]).sum(1)

    def blocks(f: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            parts = zip(h.split(1024), predictions.split(1024), strict=True)
            return [f(part, own, s, group) for part, own in parts]

        return run

    runs = {"uq": ours, "cdist": blocks(reduce)}
    if not place.small:
        runs["compile"] = blocks(torch.compile(reduce))
    return runs


def k_contenders(place: Place) -> Mapping[str, Callable[[], Any]]:
    h, _, s, _ = features(place)
    rows, k = Support.of(s), place.size(32, 4)

    def blocks() -> Any:
        return [torch.cdist(part, s).topk(k, largest=False) for part in h.split(1024)]

    return {"uq": lambda: nearest_keys(h, rows, k), "cdist and topk": blocks}


def repeated(place: Place) -> tuple[Tensor, ...]:
    h, predictions, s, group = features(place)
    nearest, radius = scan(h[:1000], predictions[:1000], Support.of(s), group)
    return nearest, radius, count(h[:1000], Support.of(s), radius)


def cases() -> list[Case]:
    why = "integers: distances are exact, ties go by position"
    found: list[Case] = [
        Check("sdm", f"radius and count, ties, {n} × {s} × {m}", "bits",
              lambda place, s=s, n=n, m=m: ties(place, s, n, m), 0.0, why)
        for s, n, m in ((5000, 301, 17), (20_000, 3, 64), (66, 1000, 1))
    ]  # fmt: skip
    flop = 2 * 10_000 * 100_000 * 128
    return [
        *found,
        *(Check("sdm", f"{k} nearest, ties", "bits", lambda place, k=k: k_nearest(place, k), 0.0,
                why) for k in (1, 7, 64)),
        Check("sdm", "window", "bits", listed, 0.0, why),
        Check("sdm", "distance in units of the bound on its rounding", "fp32", rounding, 1.0,
              "4 (M + 4) 2^-23 of the norms; what lies within goes to float64"),
        Repeat("sdm", "radius and count", repeated),
        Timing("sdm", "10,000 queries, 100,000 rows of 128, radius and count", contenders,
               flop=2 * flop, targets={"cdist": 2.0}, memory=2 << 30),
        Timing("sdm", "the same, 32 nearest", k_contenders, flop=flop, memory=2 << 30),
    ]  # fmt: skip

"""Cases of resampling: ancestors against the reference on the CPU, launches, and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.protocol import Case, Check, Place, Repeat, Timing, absolute, differing, forced
from uq.kernels import resampling
from uq.kernels.resampling import SCHEMES, normalize, resample, take


def log_weights(place: Place, runs: int, size: int) -> Tensor:
    """Far from zero; NaN in the first run, zeros in the second, nothing in the last."""
    g = torch.Generator().manual_seed(size)
    x = 3 * torch.randn(runs, size, generator=g) - 1e4
    x[0, size // 2] = math.nan
    if runs > 2:
        x[1, : size // 3] = -math.inf
        x[-1] = -math.inf
    return x.to(place.device)


@contextmanager
def _tiles(place: Place) -> Iterator[None]:
    """Small tiles under the interpreter, so that a run has several there, too."""
    before = resampling.TILE, resampling.RUN
    if place.small:
        resampling.TILE, resampling.RUN = 64, 200
    try:
        yield
    finally:
        resampling.TILE, resampling.RUN = before


def _ancestors(place: Place, scheme: str, runs: int, size: int) -> float:
    x = log_weights(place, runs, size)
    values = torch.arange(runs * size * 3, device=place.device).view(runs, size, 3)
    with _tiles(place):
        found = resample(x, scheme, -3, step=2, threshold=0.9, values=values)
    with forced("reference"):
        wanted = resample(x.cpu(), scheme, -3, step=2, threshold=0.9, values=values.cpu())
    assert found.values is not None
    assert wanted.values is not None
    wrong = differing(found.values, wanted.values)
    return max(wrong, differing(found.ancestors, wanted.ancestors))


def _normalized(place: Place, runs: int, size: int) -> float:
    x = log_weights(place, runs, size)[:-1]
    with _tiles(place):
        found = normalize(x)
    with forced("reference"):
        wanted = normalize(x.cpu())
    shares = absolute(found.log_weights.exp(), wanted.log_weights.exp())
    ess = float((found.ess.cpu() / wanted.ess - 1).abs().amax())
    return max(shares, ess)


def _far(place: Place) -> float:
    """Values beyond 2³¹ elements."""
    size = place.size((1 << 20) + 3, 70)
    width = place.size(2051, 3)
    values = torch.zeros(1, size, width, dtype=torch.float16, device=place.device)
    values[0, -1] = 1.0
    ancestors = torch.full((1, size), size - 1, device=place.device)
    taken = take(values, ancestors)
    return float((taken[0, [0, size // 2, size - 1]].float() - 1).abs().amax())


def _launches(place: Place) -> float:
    """Launches of kernels that a call makes, by the profiler."""
    x = log_weights(place, 64, 10_000)
    values = torch.randn(64, 10_000, 8, device=place.device)
    worst = 0
    for scheme in SCHEMES:
        run = partial(resample, x, scheme, 1, threshold=0.5, values=values)
        run()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        worst = max(worst, len(kernels))
    return float(worst)


def _waits(place: Place) -> float:
    """1 if a call waits for the device."""
    x = log_weights(place, 4, 3000)
    resample(x, "residual", 1, threshold=0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for scheme in SCHEMES:
            seed = torch.randint(1 << 62, (), device=place.device)
            take(x[..., None], resample(x, scheme, seed, threshold=0.5).ancestors)
            normalize(x)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return 1.0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0.0


def _repeated(place: Place, scheme: str) -> tuple[Tensor, ...]:
    x = log_weights(place, 3, place.size(100_003, 300))
    found = resample(x, scheme, 5)
    return found.ancestors, found.weights.log_weights, found.weights.ess


def _contenders(place: Place, runs: int, size: int, width: int) -> Mapping[str, Callable[[], Any]]:
    runs, size, width = place.size(runs, 2), place.size(size, 40), place.size(width, 3)
    x = torch.randn(runs, size, device=place.device)
    values = torch.randn(runs, size, width, device=place.device)

    def eager() -> Tensor:
        from uq.kernels.resampling import _resample_reference

        found: Tensor = _resample_reference(x, "systematic", None, 1, 0, size, math.inf, values)[3]
        return found

    def multinomial() -> Tensor:
        chosen = torch.multinomial(x.softmax(-1), size, replacement=True)
        return values.gather(1, chosen[..., None].expand(-1, -1, width))

    found: dict[str, Callable[[], Any]] = {
        "uq": lambda: resample(x, "systematic", 1, values=values),
        "eager": eager,
        "torch.multinomial": multinomial,
    }
    if not place.small:
        found["compile"] = torch.compile(eager)
    return found


def cases() -> list[Case]:
    found: list[Case] = []
    for runs, full, small in ((3, 500, 50), (64, 10_000, 130), (3, 1_000_003, 260)):
        found += [
            Check(
                "resampling",
                f"{scheme}, {full:,} particles",
                "fp64",
                lambda p, s=scheme, r=runs, f=full, m=small: _ancestors(
                    p, s, p.size(r, 3), p.size(f, m)
                ),
                0.0 if full < 1e5 else 1e-6,
                "sums to 1e-15 in another order: a tie has odds of 1e-12 (10⁴) to 1e-3 (10⁶)",
            )
            for scheme in SCHEMES
        ]
        found += [
            Check(
                "resampling",
                f"weights and effective size, {full:,} particles",
                "fp64",
                lambda p, r=runs, f=full, m=small: _normalized(p, p.size(r, 3), p.size(f, m)),
                1e-11,
                "log weights near 1e4 are exact; their sum's logarithm there has 1e4 · 1.1e-16",
            )
        ]
    found += [
        Check("gather", "values beyond 2^31", "bits", _far, 0.0, "a copy", memory=9 << 30),
        Check(
            "resampling",
            "launches, 10,000 particles, 64 runs",
            "bits",
            _launches,
            2.0,
            "the target",
            device_only=True,
        ),
        Check("resampling", "waits for the device", "bits", _waits, 0.0, "none", device_only=True),
    ]
    found += [Repeat("resampling", s, partial(_repeated, scheme=s)) for s in SCHEMES]
    for runs, size, width in ((64, 10_000, 32), (1, 1000, 320), (1, 1_000_000, 16)):
        found.append(
            Timing(
                "resampling",
                f"systematic with gather, {size:,} particles of {width} numbers, {runs} runs",
                partial(_contenders, runs=runs, size=size, width=width),
                # Weights in, normalised weights, thresholds out and in, ancestors, values.
                moved=runs * size * (4 + 8 + 16 + 8 + 8 + 8 * width),
            )
        )
    return found

"""Cases of the noise: words and normals of a device against the reference on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.protocol import Case, Check, Place, Repeat, Timing, absolute, differing
from uq.kernels import philox

N = 1 << 26


def _words(place: Place, seed: int, start: int) -> float:
    from uq.kernels.philox_triton import fill_words

    n = 100_000
    found = torch.empty(4, n, dtype=torch.int64, device=place.device)
    at = philox.stream(philox.Purpose.IVON, 3)
    block = 32768 if place.small else 1024
    fill_words[(-(-n // block),)](found, seed, 7, at, 9, start, n, BLOCK=block)
    wanted = torch.stack(philox.words(seed, torch.arange(start, start + n), 7, at, 9))
    return differing(found, wanted)


def _normals(place: Place) -> float:
    n = place.size(1_000_003, 3001)
    found = philox.sample_normals(11, n, 2, 7, 5, 9, place.device, offset=(1 << 32) - n)
    index = torch.arange((1 << 32) - n, 1 << 32)
    wanted = torch.cat([philox.normals(11, index, group, 5, 9) for group in range(3)])
    return absolute(found, wanted[2:9])


def _far(place: Place) -> float:
    """Samples whose place in the output lies beyond 2³¹ elements."""
    n = place.size((1 << 30) + 5, 4097)
    found = philox.sample_normals(3, n, 0, 3, 5, 1, place.device)
    tail = torch.arange(n - 1000, n)
    wanted = philox.normals(3, tail, 0, 5, 1)[:3]
    return absolute(found[:, -1000:], wanted)


def _moments(place: Place) -> float:
    """Mean, variance and kurtosis in units of four standard errors."""
    n = place.size(10_000_000, 16_384)
    z = philox.sample_normals(17, n // 4, 0, 4, 5, 1, place.device).double().flatten()
    scores = (
        z.mean() * math.sqrt(n),
        (z.square().mean() - 1) * math.sqrt(n / 2),
        (z.pow(4).mean() - 3) * math.sqrt(n / 96),
    )
    return max(abs(float(s)) for s in scores) / 4


def _contenders(place: Place) -> Mapping[str, Callable[[], Any]]:
    n = place.size(N, 4096)
    out = torch.empty(n, device=place.device)
    generator = place.generator()

    def ours() -> Tensor:
        return philox.sample_normals(1, n // 4, 0, 4, 5, 1, place.device)

    return {"uq": ours, "torch.randn": lambda: out.normal_(generator=generator)}


def cases() -> list[Case]:
    found: list[Case] = [
        Check(
            "philox",
            f"100,000 words, seed {seed}, elements from {start}",
            "bits",
            lambda place, seed=seed, start=start: _words(place, seed, start),
            0.0,
            "integers",
        )
        for seed in (0, 1234, (1 << 31) + 5, (1 << 40) + 7, -1)
        for start in (0, (1 << 32) - 100_000)
    ]
    return [
        *found,
        Check(
            "philox",
            "normals against the CPU",
            "fp32",
            _normals,
            1e-5,
            "angles up to 2π in float32 (half a unit: 2.4e-7) times radii up to 5.7, a few ulp",
        ),
        Check(
            "philox",
            "output beyond 2^31 elements",
            "fp32",
            _far,
            1e-5,
            "as above",
            memory=14 << 30,
        ),
        Check("philox", "moments", "fp32", _moments, 1.0, "four standard errors"),
        Repeat(
            "philox",
            "normals",
            lambda p: philox.sample_normals(1, p.size(1 << 20, 2000), 1, 6, 5, 1, p.device),
        ),
        Timing(
            "philox",
            f"{N:,} normals, four samples of an element",
            _contenders,
            moved=4 * N,
            targets={"torch.randn": 1.0},
        ),
    ]

"""Cases of IVON: a step against the paper's formulas in float64, and its time against AdamW's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.protocol import Case, Check, Place, Repeat, Timing, forced, relative
from uq.kernels import ivon
from uq.kernels.ivon import Noise, Segments, Setting, settings_table
from uq.kernels.philox import normals

SETTING = Setting(ess=5e4, delta=1e-4, beta1=0.9, beta2=0.9999, rate=0.1, bias=0.5)
NOISE = Noise(seed=(1 << 63) + 5, step=7)
N = 1 << 26
_FP32 = "a dozen float32 roundings, and noise to 1e-6"


class State:
    """Tensors of the given sizes in the middle of training."""

    def __init__(self, place: Place, sizes: list[int], dtype: torch.dtype = torch.float32) -> None:
        g = place.generator()

        def draw(n: int) -> Tensor:
            return torch.randn(n, generator=g, device=place.device, dtype=dtype)

        self.params = Segments([draw(n) for n in sizes])
        self.grads = Segments([draw(n) for n in sizes])
        n = self.params.n
        self.hess, self.momentum = draw(n).abs_().add_(0.1), draw(n)
        self.mean = torch.empty_like(self.hess)
        self.holds = torch.zeros(1, dtype=torch.int32, device=place.device)
        self.table = settings_table(SETTING, place.device)

    def sample(self) -> None:
        ivon.sample(self.params, self.hess, self.mean, self.holds, self.table, NOISE)

    def update(self, next_step: int | None = None) -> Tensor:
        return ivon.update(
            self.params,
            self.grads,
            self.hess,
            self.momentum,
            self.mean,
            self.holds,
            self.table,
            NOISE,
            next_step=next_step,
        )

    def flat(self) -> Tensor:
        return torch.cat([p for p, _, _ in self.params.parts()])


def in_float64(
    mean: Tensor, h: Tensor, g: Tensor, grad: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """New h, g and mean by the formulas of the paper."""
    s = SETTING
    mean, h, g, grad, z = (t.double() for t in (mean, h, g, grad, z))
    estimate = z * grad * (s.ess * (h + s.delta)).sqrt()
    rho = 1 - s.beta2
    new_h = s.beta2 * h + rho * estimate + 0.5 * rho**2 * (h - estimate) ** 2 / (h + s.delta)
    new_g = s.beta1 * g + (1 - s.beta1) * grad
    move = (new_g / s.bias + s.delta * mean) / (new_h + s.delta)
    return new_h, new_g, mean - s.rate * move


def _step(place: Place, sizes: list[int], dtype: torch.dtype) -> float:
    """Error of the first and the last elements of each tensor, at most 64 of each."""
    state = State(place, sizes, dtype)
    some = [sorted({*range(min(n, 64)), *range(max(0, n - 64), n)}) for n in sizes]
    starts = [here.start for _, here, _ in state.params.parts()]
    at = torch.tensor([start + i for start, part in zip(starts, some, strict=True) for i in part])

    def chosen(of: Segments) -> Tensor:
        return torch.cat([p[i] for (p, _, _), i in zip(of.parts(), some, strict=True)]).cpu()

    def old(flat: Tensor) -> Tensor:
        return flat[at.to(place.device)].cpu()

    z = normals(NOISE.seed, at, 0, NOISE.stream, NOISE.step)[0]
    wanted = in_float64(
        chosen(state.params), old(state.hess), old(state.momentum), chosen(state.grads), z
    )
    state.sample()
    state.update()
    found = old(state.hess), old(state.momentum), chosen(state.params)
    return max(relative(a, b) for a, b in zip(found, wanted, strict=True))


def _far(place: Place) -> float:
    """A tensor that ends beyond 2³¹ elements of the flat state."""
    return _step(place, [place.size((1 << 31) + 3, 2051), 999], torch.float32)


def _repeated(place: Place) -> tuple[Tensor, ...]:
    state = State(place, [place.size(3_000_017, 3001), 5])
    state.sample()
    squares = state.update(next_step=8)
    return state.hess, state.momentum, state.mean, state.flat(), squares


def _plain(
    m: Tensor, h: Tensor, g: Tensor, grad: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Step and next sample in tensor operations, with torch's own noise."""
    s = SETTING
    gain = (1 - s.beta2) * s.ess
    a = h + s.delta
    c = z * (s.ess * a).rsqrt() * grad - h / (s.ess * a)
    h = h + gain * a * (c + 0.5 * gain * c * c)
    g = g + (1 - s.beta1) * (grad - g)
    m = m - s.rate / s.bias * (g + s.delta * s.bias * m) / (h + s.delta)
    z = torch.randn_like(m)
    return m, h, g, z, m + z * (s.ess * (h + s.delta)).rsqrt()


def _fused(place: Place) -> Mapping[str, Callable[[], Any]]:
    n = place.size(N, 4096)
    state = State(place, [n])
    state.sample()
    m, h, g, grad, z = (torch.rand(n, device=place.device) for _ in range(5))
    found: dict[str, Callable[[], Any]] = {
        "uq": lambda: state.update(next_step=8),
        "eager": partial(_plain, m, h, g, grad, z),
    }
    if place.small:
        return found
    found["compile"] = partial(torch.compile(_plain), m, h, g, grad, z)
    w = torch.nn.Parameter(torch.rand(n, device=place.device))
    w.grad = torch.rand_like(w)
    found["AdamW fused"] = torch.optim.AdamW([w], 1e-3, fused=True).step
    return found


def _optimizer(place: Place) -> Mapping[str, Callable[[], Any]]:
    """A network of 50 layers of 24 million weights: sample, and step, without the gradients."""
    try:
        from uq.inference import IVON
    except ImportError:  # which needs Pyro and others
        return {}

    sizes = [(512, place.size(900, 2)), (512,)] * place.size(50, 1)

    def parameters() -> list[torch.nn.Parameter]:
        found = [torch.nn.Parameter(torch.rand(s, device=place.device)) for s in sizes]
        for p in found:
            p.grad = torch.rand_like(p)
        return found

    ours = IVON(parameters(), 0.1, ess=5e4)
    found: dict[str, Callable[[], Any]] = {"uq": lambda: ours.step(lambda: None)}
    with forced("reference"):
        reference = IVON(parameters(), 0.1, ess=5e4)

    def eager() -> None:
        with forced("reference"):
            reference.step(lambda: None)

    found["eager"] = eager
    if place.small:
        return found
    found["AdamW fused"] = torch.optim.AdamW(parameters(), 1e-3, fused=True).step
    try:
        from ivon import IVON as Peer
    except ImportError:
        return found
    peer = Peer(parameters(), lr=0.1, ess=5e4)

    def step() -> None:
        with peer.sampled_params(train=True):
            pass
        peer.step()

    found["ivon-opt"] = step
    return found


def cases() -> list[Case]:
    odd = [1, 1023, 1024, 1025, 30_011]
    return [
        Check(
            "ivon", "step, odd sizes", "fp32", lambda p: _step(p, odd, torch.float32), 2e-5, _FP32
        ),
        Check(
            "ivon",
            "step, odd sizes",
            "fp64",
            lambda p: _step(p, odd, torch.float64),
            2e-5,
            "noise, which is made in float32, to 1e-6",
        ),
        Check(
            "ivon",
            "step, one tensor of 10^8",
            "fp32",
            lambda p: _step(p, [p.size(100_000_007, 4099)], torch.float32),
            2e-5,
            _FP32,
            memory=4 << 30,
        ),
        Check("ivon", "state beyond 2^31 elements", "fp32", _far, 2e-5, _FP32, memory=46 << 30),
        Repeat("ivon", "step and next sample", _repeated),
        Timing(
            "ivon",
            f"step and next sample, {N:,} parameters",
            _fused,
            moved=32 * N,
            targets={"AdamW fused": 1 / 1.2, "copy": 0.75},
        ),
        Timing("ivon", "optimizer: sample and step, 100 tensors, 23 million", _optimizer),
    ]

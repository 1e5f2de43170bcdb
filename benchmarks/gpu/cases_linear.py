"""Cases of Gaussian linear layers: sampled weights, local reparameterisation, masked weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.protocol import Case, Check, Place, Repeat, Timing, relative
from uq.kernels import Purpose, local_reparam_linear, normal, sampled_linear, stream
from uq.kernels.sparse_linear import compressed

SEED, STEP, TENSOR = (1 << 40) + 7, 3, 5
Layer = dict[str, Tensor]
_TF32 = "two factors rounded to 11 bits (2^-11 each), and their sum of either sign"
_FP32 = "rounding of a sum of K ≤ 1,024 terms (√K · 6e-8), noise to 1e-6"


def layer(
    place: Place, sizes: tuple[int, ...], *, shared: bool, dtype: torch.dtype = torch.float32
) -> Layer:
    samples, rows, n_in, n_out = sizes
    g = place.generator()

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=place.device, dtype=dtype)

    x = draw(rows, n_in) if shared else draw(samples, rows, n_in)
    mean, std, bias, tau = draw(n_out, n_in), draw(n_out, n_in), draw(n_out), draw(n_out)
    return {"x": x, "mean": mean, "std": 0.3 * std.exp(), "bias": bias, "bias_std": tau.exp()}


def noise(place: Place, purpose: Purpose, shape: tuple[int, ...], samples: int) -> Tensor:
    """From the reference on the CPU."""
    found = normal(shape, SEED, stream=stream(purpose, TENSOR), step=STEP, samples=samples)
    return found.to(place.device)


def drawn_reference(place: Place, given: Layer, samples: int) -> Tensor:
    x, mean = given["x"], given["mean"]
    eps = noise(place, Purpose.WEIGHT, tuple(mean.shape), samples).to(mean.dtype)
    zeta = noise(place, Purpose.BIAS, (len(mean),), samples).to(mean.dtype)
    weight = mean + given["std"] * eps
    bias = given["bias"] + given["bias_std"] * zeta
    return torch.matmul(x, weight.mT) + bias[:, None]


def local_reference(place: Place, given: Layer, samples: int) -> Tensor:
    from uq.kernels.local_reparam import reference

    shape = (given["x"].shape[-2], len(given["mean"]))
    xi = noise(place, Purpose.OUTPUT, shape, samples).to(given["mean"].dtype)
    return reference(noise=xi, **given)


def kernel(which: Callable[..., Tensor], given: Layer, samples: int) -> Tensor:
    return which(**given, n_samples=samples, seed=SEED, step=STEP, tensor=TENSOR)


def with_gradients(f: Callable[[Layer], Tensor], given: Layer) -> list[Tensor]:
    leaves = {k: t.clone().requires_grad_() for k, t in given.items()}
    y = f(leaves)
    g = torch.Generator().manual_seed(3)
    pull = torch.randn(y.shape, generator=g).to(y.device, y.dtype)
    y.backward(pull)
    return [y.detach(), *(t.grad for t in leaves.values() if t.grad is not None)]


def error(
    place: Place,
    which: Callable[..., Tensor],
    full: tuple[int, ...],
    small: tuple[int, ...],
    shared: bool,
    dtype: torch.dtype = torch.float32,
    precision: str = "highest",
) -> float:
    """Of outputs and all gradients against the reference in float64."""
    sizes = small if place.small else full
    given = layer(place, sizes, shared=shared)
    given = {k: t.to(dtype).float() for k, t in given.items()}  # the same numbers on both sides
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mine = {k: t.to(dtype if k == "x" else wide) for k, t in given.items()}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = with_gradients(lambda g: kernel(which, g, sizes[0]), mine)
    finally:
        torch.set_float32_matmul_precision(before)
    wanted_by = drawn_reference if which is sampled_linear else local_reference
    exact = {k: t.double() for k, t in given.items()}
    wanted = with_gradients(lambda g: wanted_by(place, g, sizes[0]), exact)
    return max(relative(a, b) for a, b in zip(found, wanted, strict=True))


def far(place: Place) -> float:
    """The end of an output of more than 2³¹ elements."""
    samples, rows, n_in, n_out = (133, 256, 4, 65_536) if not place.small else (5, 17, 4, 9)
    given = layer(place, (samples, rows, n_in, n_out), shared=True)
    found = kernel(sampled_linear, given, samples)[-1]
    mean = given["mean"]
    address = {"step": STEP, "samples": 1, "first": samples - 1, "device": place.device}
    eps = normal(tuple(mean.shape), SEED, stream=stream(Purpose.WEIGHT, TENSOR), **address)[0]
    zeta = normal(n_out, SEED, stream=stream(Purpose.BIAS, TENSOR), **address)[0]
    weight = (mean + given["std"] * eps).double()
    wanted = given["x"].double() @ weight.T + (given["bias"] + given["bias_std"] * zeta)
    return relative(found, wanted)


def plain(place: Place, which: Callable[..., Tensor]) -> float:
    """Without spread: the linear layer of torch."""
    sizes = (5, place.size(200, 9), place.size(500, 20), place.size(130, 6))
    given = layer(place, sizes, shared=True)
    given |= {k: torch.zeros_like(given[k]) for k in ("std", "bias_std")}
    rest = {} if which is sampled_linear else {"floor": 0.0}
    found = which(**given, n_samples=5, seed=1, **rest)
    wanted = F.linear(*(given[k].double() for k in ("x", "mean", "bias"))).expand(5, -1, -1)
    return relative(found, wanted)


def splits(place: Place) -> float:
    """Draws 3 to 9 and rows from 40 on are those of the whole."""
    sizes = (12, place.size(100, 20), place.size(64, 8), place.size(48, 6))
    given = layer(place, sizes, shared=True)
    whole = sampled_linear(**given, n_samples=12, seed=1)
    part = given | {"x": given["x"][sizes[1] // 2 :]}
    found = sampled_linear(**part, n_samples=6, seed=1, first=3)
    return relative(found, whole[3:9, sizes[1] // 2 :])


def masked(place: Place) -> float:
    """Masked weights against the same weights with zeros."""
    sizes = (4, place.size(120, 12), place.size(300, 20), place.size(140, 9))
    given = layer(place, sizes, shared=True)
    mask = torch.rand(given["mean"].shape, generator=place.generator(1), device=place.device) < 0.1
    zeros = given | {k: given[k] * mask for k in ("mean", "std")}
    errors = []
    for which in (sampled_linear, local_reparam_linear):
        found = which(**given, mask=mask, n_samples=4, seed=1)
        errors.append(relative(found, which(**zeros, n_samples=4, seed=1)))
    return max(errors)


def repeat(place: Place, which: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    sizes = (7, place.size(100, 9), place.size(300, 20), place.size(130, 9))
    given = layer(place, sizes, shared=True)
    return tuple(with_gradients(lambda g: kernel(which, g, sizes[0]), given))


# -- timings -------------------------------------------------------------------------------------


def at_precision(precision: str, f: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return f()
        finally:
            torch.set_float32_matmul_precision(before)

    return run


def trained(f: Callable[..., Tensor], given: Layer) -> Callable[[], Any]:
    leaves = {k: t.detach().clone().requires_grad_() for k, t in given.items()}

    def run() -> Any:
        for t in leaves.values():
            t.grad = None
        f(**leaves).sum().backward()

    return run


def eager_drawn(x: Tensor, mean: Tensor, std: Tensor, n_samples: int) -> Tensor:
    """As one writes it: noise, weights, one batched product."""
    eps = torch.randn(n_samples, *mean.shape, device=mean.device, dtype=mean.dtype)
    return torch.matmul(x, (mean + std * eps).to(x.dtype).mT)


def eager_local(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    m = F.linear(x, mean.to(x.dtype))
    v = F.linear(x.square(), std.square().to(x.dtype))
    return torch.addcmul(m, (v + 1e-8).sqrt(), torch.randn_like(m))


def contenders(
    place: Place,
    which: str,
    sizes: tuple[int, int, int, int],
    precision: str,
    train: bool,
    dtype: torch.dtype = torch.float32,
) -> Mapping[str, Callable[[], Any]]:
    if place.small:
        sizes = (4, 9, 20, 9)
    given = layer(place, sizes, shared=True)
    given = {k: given[k] for k in ("x", "mean", "std")}
    given["x"] = given["x"].to(dtype)
    if which == "sampled":
        ours: Callable[..., Tensor] = partial(sampled_linear, n_samples=sizes[0], seed=1)
        eager: Callable[..., Tensor] = partial(eager_drawn, n_samples=sizes[0])
    else:
        ours, eager = partial(local_reparam_linear, seed=1), eager_local
    runs = {"uq": ours, "eager": eager}
    if not place.small:
        runs["compile"] = torch.compile(eager)
    if train:
        return {k: at_precision(precision, trained(f, given)) for k, f in runs.items()}

    def forward(f: Callable[..., Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return f(**given)

        return run

    return {k: at_precision(precision, forward(f)) for k, f in runs.items()}


def sparse_contenders(place: Place, density: float) -> Mapping[str, Callable[[], Any]]:
    """Where compressed rows would pay on a GPU: the break-even of masked dense weights."""
    rows, n = place.size(256, 9), place.size(4096, 20)
    given = layer(place, (1, rows, n, n), shared=True)
    x, mean, std = (given[k] for k in ("x", "mean", "std"))
    mask = torch.rand(mean.shape, generator=place.generator(1), device=place.device) < density
    # Positions from the CPU, so that the interpreter's run has the same form.
    row, column = mask.cpu().nonzero(as_tuple=True)
    starts = F.pad(mask.cpu().sum(1).cumsum(0), (1, 0))
    parts = [t.to(place.device) for t in (starts.int(), column.int())]
    at = (row.to(place.device), column.to(place.device))
    matrices = [
        compressed(*parts, values, size=mask.shape) for values in (mean[at], std[at].square())
    ]

    def csr() -> Tensor:
        m, v = (a @ b for a, b in zip(matrices, (x.T, x.square().T), strict=True))
        return torch.addcmul(m, (v + 1e-8).sqrt(), torch.randn_like(m))

    def ours() -> Tensor:
        return local_reparam_linear(x, mean, std, mask=mask, seed=1)

    return {"uq": at_precision("high", ours), "csr": csr}


def cases() -> list[Case]:
    found: list[Case] = []
    odd = {
        "shared inputs": ((7, 33, 257, 65), (5, 9, 20, 9), True),
        "inputs of each draw": ((6, 33, 257, 65), (3, 9, 20, 9), False),
        "one row, one output": ((9, 1, 1000, 1), (2, 1, 20, 1), True),
    }
    for which in (sampled_linear, local_reparam_linear):
        name = which.__name__
        for label, (full, small, shared) in odd.items():
            for precision, dtype, how, tolerance, why in (
                ("fp32", torch.float32, "highest", 1e-5, _FP32),
                ("fp64", torch.float64, "highest", 2e-6, "noise is float32, to 1e-6"),
                ("tf32", torch.float32, "high", 3e-3, _TF32),
                ("bf16", torch.bfloat16, "highest", 3e-2, "as for TF32, with 8 bits"),
            ):
                found.append(
                    Check(
                        name,
                        f"{label}, outputs and gradients, {full}",
                        precision,  # type: ignore[arg-type]
                        partial(
                            error, which=which, full=full, small=small, shared=shared,
                            dtype=dtype, precision=how,
                        ),
                        tolerance,
                        why,
                        device_only=precision in ("tf32", "bf16"),
                    )
                )  # fmt: skip
        found += [
            Check(name, "no spread: F.linear", "fp32", partial(plain, which=which), 1e-5, _FP32),
            Repeat(name, "outputs and gradients", partial(repeat, which=which)),
        ]
    # Each height of a tile, and so many rows that weights are written out.
    large = {
        "large": ((16, 200, 1024, 1024), (3, 80, 20, 9), True),
        "large, inputs of each draw": ((16, 200, 1024, 1024), (3, 80, 20, 9), False),
        "tiles of 64 rows": ((16, 60, 1024, 1024), (3, 60, 20, 9), True),
        "tiles of 64 rows, inputs of each draw": ((16, 60, 512, 512), (3, 60, 20, 9), False),
        "written out": ((4, 700, 512, 512), (3, 300, 20, 9), True),
    }
    for which in (sampled_linear, local_reparam_linear):
        for label, (full, small, shared) in large.items():
            run = partial(error, which=which, full=full, small=small, shared=shared)
            found.append(Check(which.__name__, f"{label}, {full}", "fp32", run, 1e-5, _FP32))
    found += [
        Check("sampled_linear", "draws and rows in parts", "fp32", splits, 1e-6, "same products"),
        Check("sampled_linear", "output beyond 2^31 elements", "fp32", far, 1e-5, _FP32, 12 << 30),
        Check("masked", "against zeros", "fp32", masked, 1e-6, "the same products"),
    ]
    targets = {"eager": 3.0, "compile": 1.5}
    shapes = [(32, 128, 4096, 4096), (32, 16, 1024, 1024), (64, 256, 1024, 1024)]
    for sizes in shapes:
        s, b, k, n = sizes
        for label, how, dtype, rate in (
            ("tf32", "high", torch.float32, "tf32"),
            ("bf16", "highest", torch.bfloat16, "bf16"),
        ):
            found.append(
                Timing(
                    "sampled_linear",
                    f"{s} draws, {b} rows, {k} × {n}, {label}",
                    partial(
                        contenders, which="sampled", sizes=sizes, precision=how, train=False,
                        dtype=dtype,
                    ),
                    flop=2 * s * b * k * n,
                    rate=rate,  # type: ignore[arg-type]
                    targets=targets,
                    memory=8 << 30,
                )
            )  # fmt: skip
    train = partial(
        contenders, which="sampled", sizes=(32, 128, 1024, 1024), precision="high", train=True
    )
    found.append(
        Timing("sampled_linear", "32 draws, 128 rows, 1024 × 1024, tf32, with gradients", train,
               flop=6 * 32 * 128 * 1024 * 1024, rate="tf32", targets=targets)
    )  # fmt: skip
    for sizes in ((1, 256, 1024, 1024), (1, 4096, 1024, 1024)):
        _, b, k, n = sizes
        make = partial(contenders, which="local", sizes=sizes, precision="high", train=True)
        found.append(
            Timing("local_reparam_linear", f"{b} rows, {k} × {n}, tf32, with gradients", make,
                   flop=12 * b * k * n, rate="tf32", targets={"eager": 1.0})
        )  # fmt: skip
    for density in (0.01, 0.02, 0.05, 0.1):
        make = partial(sparse_contenders, density=density)
        found.append(Timing("masked", f"density {density:g}, 256 rows, 4096 × 4096", make))
    return found

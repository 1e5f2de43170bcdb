"""Kernels without a GPU: errors of references and of interpreted kernels, speed of the CPU paths.

The interpreter's column runs every case of ``benchmarks.gpu`` in Triton's interpreter and takes the
worst; the device's column comes from the JSON of runs on devices.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import kernels_layers
from benchmarks.gpu import cases_ivon, cases_leapfrog, cases_linear, cases_sdm
from benchmarks.gpu.protocol import Place, absolute, forced, relative
from benchmarks.gpu.table import runs
from benchmarks.measure import paired, row
from uq.inference import IVON
from uq.inference.resampling import ancestors
from uq.kernels import local_reparam_linear, philox, resampling, sampled_linear

CPU = Place(torch.device("cpu"), small=False)
SMALL = Place(torch.device("cpu"), small=True)
N = 1 << 20


# -- errors of the references ------------------------------------------------------------------


def _philox() -> float:
    n = 100_000
    found = philox.sample_normals(3, n, 0, 4, 5, 1)
    w = philox.words(3, torch.arange(n), 0, 5, 1)
    u = [torch.where(x >> 31 == 1, philox.MASK - x, x).double() * 2.0**-31 for x in w]
    wanted = []
    for one, two in ((u[0], u[1]), (u[2], u[3])):
        r = (-2 * one.clamp_min(1e-7).log()).sqrt()
        wanted += [r * (2 * math.pi * two).cos(), r * (2 * math.pi * two).sin()]
    return absolute(found, torch.stack(wanted))


def _weights() -> float:
    """Shares against sums in extended precision."""
    x = 3 * torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = np.exp((x - x.max()).numpy().astype(np.longdouble))
    found = resampling.normalize(x).log_weights.exp().numpy()
    return float(np.max(np.abs(found / (w / w.sum()) - 1)))


def _layer(which: Callable[..., Tensor]) -> float:
    """Float32 against float64 of the same numbers and noise."""
    given = cases_linear.layer(CPU, (8, 100, 300, 70), shared=True)
    double = {k: v.double() for k, v in given.items()}
    found, wanted = (cases_linear.kernel(which, g, 8) for g in (given, double))
    return relative(found, wanted)


REFERENCES: dict[str, tuple[Callable[[], float], str]] = {
    "philox": (_philox, "absolute: uniforms rounded near 1"),
    "ivon": (
        lambda: cases_ivon._step(CPU, [1, 1025, 30_011], torch.float32),
        "relative to the largest",
    ),
    "resampling": (_weights, "relative, of weights"),
    "gather": (lambda: 0.0 if _gathers() else 1.0, "share that differs"),
    "sampled_linear": (partial(_layer, sampled_linear), "relative to the largest"),
    "local_reparam_linear": (partial(_layer, local_reparam_linear), "relative to the largest"),
    "masked": (lambda: cases_linear.masked(SMALL), "relative to the largest"),
    "leapfrog": (
        lambda: cases_leapfrog.pieces(CPU, torch.float32, False),
        "relative to the largest",
    ),
    "sdm": (lambda: cases_sdm.rounding(SMALL), "in units of the bound on the rounding"),
}


def _gathers() -> bool:
    values = torch.randn(3, 50, 4)
    index = torch.randint(0, 50, (3, 70))
    wanted = torch.stack([v[i] for v, i in zip(values, index, strict=True)])
    return torch.equal(resampling.take(values, index), wanted)


def _interpreted() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--device", "cpu"]
        subprocess.run(
            [*command, "--budget", "3000", "--out", str(out)], check=False, capture_output=True
        )
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def benchmark_errors() -> list[dict[str, Any]]:
    """Table kernel × (reference, interpreter, device)."""
    interpreted, devices = _interpreted(), runs()
    if interpreted["failures"]:
        raise RuntimeError(f"cases failed: {interpreted['failures']}")
    rows = []
    for kernel, (error, unit) in REFERENCES.items():
        with forced("reference"):
            reference = error()
        checks = [c for c in interpreted["checks"] if c["kernel"] == kernel]
        ran = [c for c in checks if c["state"] in ("right", "wrong")]
        # Moments are in standard errors, not an error of the kernel.
        worst = max(float(c["error"]) for c in ran if c["name"] != "moments")
        on_device = [
            f"{float(c['error']):.2g}"
            for run in devices[:1]
            for c in run["checks"]
            if c["kernel"] == kernel and c["state"] in ("right", "wrong")
        ]
        rows.append(
            {
                "part": "errors",
                "kernel": kernel,
                "reference_against_float64": float(f"{reference:.3g}"),
                "unit": unit,
                "interpreter_against_reference": float(f"{worst:.3g}"),
                "interpreted_checks": len(ran),
                "right": sum(c["state"] == "right" for c in checks),
                "need_a_device": len(checks) - len(ran),
                "device": max(on_device, key=float) if on_device else "not run",
            }
        )
    return rows


# -- speed of the CPU paths --------------------------------------------------------------------


def _seconds(f: Callable[[], Any]) -> Callable[[], float]:
    def measure() -> float:
        start = time.process_time()
        f()
        return time.process_time() - start

    return measure


def benchmark_noise() -> list[dict[str, Any]]:
    """Against torch.randn, before and after compilation."""

    def ours(samples: int) -> Callable[[], float]:
        return _seconds(lambda: philox.sample_normals(1, N // samples, 0, samples, 5, 1))

    peer = _seconds(lambda: torch.randn(N))
    found = []
    eager = paired(ours(4), peer)
    found.append(row(f"{N:,} normals, not compiled / torch.randn", "s", "(fallback)", None, eager))
    if philox.compile_reference():
        for samples in (4, 1):
            measured = paired(ours(samples), peer)
            name = f"{N:,} normals, compiled, samples in {samples}s / torch.randn"
            target = "<= 1.0" if samples == 4 else "(three words of four unused)"
            met = measured["ratio"] <= 1 if samples == 4 else None
            found.append(row(name, "s", target, met, measured))
    return found


def benchmark_resampling() -> list[dict[str, Any]]:
    """A million particles: the linear counts of the CPU path against a search."""
    x = torch.randn(N, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    found = []
    for scheme in resampling.SCHEMES:
        ours = _seconds(lambda s=scheme: ancestors(x, s, N, g))
        search = _seconds(lambda s=scheme: resampling.resample(x, s, 1))

        def by_numpy(scheme: str = scheme) -> None:
            w = np.exp(x.numpy().astype(np.float64) - float(x.max()))
            c = np.cumsum(w) / w.sum()
            c[-1] = 1.0
            rng = np.random.default_rng(0)
            if scheme == "multinomial":
                times = np.cumsum(rng.exponential(size=N + 1))
                points = times[:-1] / times[-1]
            else:
                points = (np.arange(N) + rng.random(N if scheme == "stratified" else 1)) / N
            np.searchsorted(c, points, side="right")

        name = f"{N:,} particles, {scheme}"
        measured = paired(ours, search)
        found.append(row(f"{name}: CPU path / kernels' reference", "s", "(search)", None, measured))
        if scheme != "residual":
            measured = paired(ours, _seconds(by_numpy))
            met = measured["ratio"] <= 1
            found.append(row(f"{name}: CPU path / NumPy searchsorted", "s", "<= 1", met, measured))
    return found


def benchmark_ivon() -> list[dict[str, Any]]:
    """Sample and step of the optimizer's CPU path, in blocks, against whole-vector formulas."""
    w = torch.nn.Parameter(torch.rand(4 * N))
    w.grad = torch.rand_like(w)
    optimizer = IVON([w], 0.1, ess=5e4)
    parts = [torch.rand(4 * N) for _ in range(5)]
    plain = _seconds(lambda: cases_ivon._plain(*parts))
    measured = paired(_seconds(lambda: optimizer.step(lambda: None)), plain)
    name = f"IVON, {4 * N:,} parameters: optimizer's step / formulas on whole vectors"
    return [row(name, "s", "<= 0.67", measured["ratio"] <= 0.67, measured)]


def run() -> list[dict[str, Any]]:
    """Measure everything of the suite."""
    speed = [
        *benchmark_noise(),
        *benchmark_resampling(),
        *benchmark_ivon(),
        *kernels_layers.rows(),
    ]
    return [*benchmark_errors(), *({"part": "speed", **r} for r in speed)]

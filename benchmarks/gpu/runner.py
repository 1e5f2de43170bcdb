"""Run the cases of a module, and measure what a device can do at most."""

from __future__ import annotations

import math
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.protocol import Case, Check, Place, Repeat, Timing

REPEATS = 20
# More than the last-level cache of any present device: writing it empties the cache.
_FLUSH = 256 << 20


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if device == "cpu":
        return found | {"name": "interpreter"}
    about = torch.cuda.get_device_properties(0)
    try:
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
    except RuntimeError:
        driver = None
    return found | {
        "name": about.name,
        "memory": about.total_memory,
        "processors": about.multi_processor_count,
        "capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver() or driver,
    }


def _driver() -> str | None:
    import subprocess

    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip().splitlines()[0]


def ceilings() -> dict[str, float]:
    """Copy bandwidth, and rates of large products in each precision."""
    found = {}
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").fill_(1.0)
    target = torch.empty_like(source)
    seconds = measure(lambda: target.copy_(source))["median"]
    found["copy_bytes_per_second"] = 2 * 4 * source.numel() / seconds
    n = 8192
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in (
        ("fp64", torch.float64, "highest"),
        ("fp32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bf16", torch.bfloat16, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        size = n // 2 if dtype == torch.float64 else n
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        seconds = measure(lambda a=a, b=b: a @ b)["median"]
        found[f"{name}_flop_per_second"] = 2 * size**3 / seconds
    torch.set_float32_matmul_precision(before)
    return found


def measure(run: Callable[[], Any], repeats: int = REPEATS) -> dict[str, float]:
    """Seconds of a call on the device, cold cache: median, 10 % and 90 % of the repeats."""
    for _ in range(3):
        run()
    flush = torch.empty(_FLUSH, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    low, *_, high = statistics.quantiles(times, n=10)
    return {"median": statistics.median(times), "low": low, "high": high}


def run_module(name: str, device: str, budget: float) -> dict[str, Any]:
    """Rows of the checks and of the timings of ``cases_NAME``."""
    begin = time.monotonic()
    torch.set_float32_matmul_precision("highest")
    place = Place(torch.device(device), device == "cpu")
    if device == "cuda":
        place = Place(torch.device("cuda", 0), False)
    cases: list[Case] = import_module(f"benchmarks.gpu.cases_{name}").cases()
    checks, timings = [], []
    # Correctness first: no figure of a wrong kernel.
    for case in sorted(cases, key=lambda c: isinstance(c, Timing)):
        late = time.monotonic() - begin > budget
        if isinstance(case, Timing):
            timings.append(_time(case, place, late))
        else:
            checks.append(_check(case, place, late))
    return {"checks": checks, "timings": timings}


def _check(case: Check | Repeat, place: Place, late: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": case.kernel, "name": case.name}
    if isinstance(case, Check):
        row |= {"precision": case.precision, "tolerance": case.tolerance, "why": case.why}
    else:
        row |= {"precision": "bits", "tolerance": 0.0, "why": f"{REPEATS} runs, bit by bit"}
    reason = _left_out(case, place, late)
    if reason:
        return row | {"state": "not run", "message": reason}
    start = time.monotonic()
    try:
        error = case.run(place) if isinstance(case, Check) else _unequal(case, place)
        _settle(place)
    except Exception as trouble:
        message = "".join(traceback.format_exception_only(trouble)).strip()
        return row | {"state": "error", "message": message[-1000:]}
    good = error <= row["tolerance"]
    return row | {
        "state": "right" if good else "wrong",
        "error": error if math.isfinite(error) else str(error),
        "seconds": round(time.monotonic() - start, 2),
    }


def _left_out(case: Case, place: Place, late: bool) -> str | None:
    if late:
        return "out of time"
    if place.small:
        device_only = not isinstance(case, Timing) and case.device_only
        return "needs a device" if device_only else None
    need = 0 if isinstance(case, Repeat) else case.memory
    free = torch.cuda.mem_get_info()[0]
    if need > free:
        return f"needs {need / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
    return None


def _unequal(case: Repeat, place: Place) -> float:
    """Number of runs that differ from the first."""
    first = _tuple(case.run(place))
    runs = 2 if place.small else REPEATS
    different = 0
    for _ in range(runs - 1):
        again = _tuple(case.run(place))
        different += not all(
            torch.equal(_bits(a), _bits(b)) for a, b in zip(first, again, strict=True)
        )
    return float(different)


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def _bits(found: Tensor) -> Tensor:
    return found.contiguous().view(torch.uint8)


def _settle(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _time(case: Timing, place: Place, late: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kernel": case.kernel,
        "name": case.name,
        "moved": case.moved,
        "flop": case.flop,
        "rate": case.rate,
        "targets": dict(case.targets),
    }
    reason = _left_out(case, place, late)
    if reason:
        return row | {"state": "not run", "message": reason}
    seconds: dict[str, float] = {}
    spread: dict[str, list[float]] = {}
    peak: dict[str, int] = {}
    troubles: dict[str, str] = {}
    try:
        contenders = case.make(place)
    except Exception as trouble:
        return row | {"state": "error", "message": str(trouble)[-1000:]}
    for name, run in contenders.items():
        try:
            if place.small:
                run()
                continue
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            peak[name] = torch.cuda.max_memory_allocated() - before
            found = measure(run)
            seconds[name], spread[name] = found["median"], [found["low"], found["high"]]
        except Exception as trouble:
            troubles[name] = str(trouble)[-500:]
    _settle(place)
    state = "error" if "uq" in troubles else "not timed" if place.small else "timed"
    return row | {
        "state": state,
        "seconds": seconds,
        "spread": spread,
        "peak_bytes": peak,
        "troubles": troubles,
    }

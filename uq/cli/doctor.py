"""``uq doctor``: what is installed, what it runs on, and whether it works."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from packaging.requirements import Requirement

State = Literal["ok", "absent", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was seen, and what to do where that is not right.

    ``absent`` is an optional part that is not there; ``wrong`` keeps the package from working.
    """

    part: str
    name: str
    state: State
    seen: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at versions, optional parts, device, threads and kernels, and fit a small model."""
    findings = [
        Finding("system", "uq", "ok", version("uq")),
        Finding("system", "python", "ok", f"{platform.python_version()} ({sys.executable})"),
        Finding("system", "platform", "ok", platform.platform()),
        *_packages(),
    ]
    if all(finding.state != "wrong" for finding in findings):
        findings += [*_hardware(), _trial()]
    return findings


def _packages() -> list[Finding]:
    needed: dict[str, Finding] = {}
    for requirement in map(Requirement, requires("uq") or []):
        marker = str(requirement.marker or "")
        extra = marker.rpartition("extra == ")[2].strip("\"'") if "extra ==" in marker else ""
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if extra in ("", "fast", "cluster") and applies:
            needed.setdefault(requirement.name, _package(requirement, extra))
    # Only for kernels on a GPU; it comes with torch there.
    needed.setdefault("triton", _package(Requirement("triton"), "cuda"))
    return list(needed.values())


def _package(requirement: Requirement, extra: str) -> Finding:
    name, wanted = requirement.name, requirement.specifier
    part = f"optional: {extra}" if extra else "needed"
    install = f"pip install '{name}{wanted}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(part, name, "absent" if extra else "wrong", "not installed", install)
    if not wanted.contains(found, prereleases=True):
        seen = f"{found}, needs {wanted}"
        return Finding(part, name, "absent" if extra else "wrong", seen, install)
    return Finding(part, name, "ok", found)


def _hardware() -> list[Finding]:
    import torch

    from uq.kernels.dispatch import VARIABLE, has_triton

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS")
    threads = f"{torch.get_num_threads()} of torch, {cores} cores"
    found = [
        Finding(
            "hardware", "threads", "ok", threads + (f", OMP_NUM_THREADS={asked}" if asked else "")
        )
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            seen = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
            found.append(Finding("hardware", f"cuda:{i}", "ok", seen))
    else:
        built = torch.version.cuda
        seen = (
            f"torch is built for CUDA {built}, but finds no GPU" if built else "torch for the CPU"
        )
        found.append(Finding("hardware", "cuda", "absent", seen))
    if torch.backends.mps.is_available():
        found.append(Finding("hardware", "mps", "ok", "device='mps'"))
    chosen = os.environ.get(VARIABLE) or "auto"
    runs = "Triton" if torch.cuda.is_available() and has_triton() else "plain torch"
    found.append(
        Finding("hardware", "kernels", "ok", f"{VARIABLE}={chosen}: {runs} on this device")
    )
    return found


def _trial() -> Finding:
    """Fit and predict; what is broken under the packages shows here."""
    import time

    import numpy as np

    from uq.models.map import MAPClassifier

    start = time.perf_counter()
    try:
        model = MAPClassifier(max_epochs=2, patience=None, random_state=0)
        model.fit(np.eye(8), np.arange(8) % 2).predict_proba(np.eye(8))
    except Exception as error:
        return Finding(
            "trial", "fit", "wrong", f"{type(error).__name__}: {error}", "install uq anew"
        )
    return Finding("trial", "fit", "ok", f"{time.perf_counter() - start:.2f} s")

"""What the suites share: paired timings, rows of a table of speed, means over seeds."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

REPEATS = 7


def paired(
    a: Callable[[], float], b: Callable[[], float], repeats: int = REPEATS
) -> dict[str, Any]:
    """Median of a, of b and of their pairwise ratios, with the ratios' range."""
    a()
    b()
    pairs = [(a(), b()) for _ in range(repeats)]
    ratios = [x / y for x, y in pairs]
    return {
        "ours": statistics.median(x for x, _ in pairs),
        "peer": statistics.median(y for _, y in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def is_target(target: str) -> bool:
    """Whether there is something to meet: an empty text, a dash or one in brackets is no target."""
    return target not in ("", "-") and not target.startswith("(")


def row(
    name: str, unit: str, target: str, met: bool | None, measured: dict[str, Any]
) -> dict[str, Any]:
    """Row of a table of speed; ``met`` is None where there is no target to meet."""
    rounded = {k: float(f"{v:.4g}") for k, v in measured.items()}
    return {
        "benchmark": name,
        "unit": unit,
        **rounded,
        "target": target,
        "met": met if is_target(target) else None,
    }


def mean_rows(rows: list[dict[str, Any]], by: list[str], over: str) -> list[dict[str, Any]]:
    """Mean, standard error and values of every number over seeds or splits, for each group."""
    table = pd.DataFrame(rows)
    found = []
    for key, part in table.groupby(by, sort=False):
        row: dict[str, Any] = dict(zip(by, key, strict=True)) | {f"{over}s": len(part)}
        for score in part.columns.drop([*by, over]):
            values = part[score].dropna().astype(float)
            if len(values):
                row[score] = float(f"{values.mean():.4g}")
                row[f"{score}_se"] = float(f"{values.sem():.2g}")
                row[f"{score}_each"] = [float(f"{v:.4g}") for v in values]
        found.append(row)
    return found


def machine() -> dict[str, str | int | None]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("uq", "torch", "pyro-ppl", "scikit-learn")},
    }

"""Run a benchmark suite: ``python -m benchmarks.run core`` prints a table and writes JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

SUITES = (
    "core",
    "contract",
    "calibration",
    "vbll",
    "ivon",
    "uci_regression",
    "fashion",
    "nuts",
    "evidential",
    "sdm",
    "abnn",
    "smc",
    "ssvi",
    "implicit",
    "masked",
    "kernels",
    "pfn",
    "sbc",
    "large",
    "stress",
)
RESULTS = Path(__file__).parent / "results"


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


def main() -> None:
    """Run the suites that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "suites", nargs="+", choices=SUITES, metavar="SUITE", help=", ".join(SUITES)
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of SUITE.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for suite in args.suites:
        rows = import_module(f"benchmarks.{suite}").run()
        table = pd.DataFrame(rows)
        # A suite of several parts has a table for each, with the columns that it fills.
        parts = table.groupby("part", sort=False) if "part" in table else [("", table)]
        for _, part in parts:
            print(part.dropna(axis=1, how="all").to_string(index=False), end="\n\n")
        out = args.out / f"{suite}.json"
        out.write_text(json.dumps({"machine": machine(), "results": rows}, indent=1) + "\n")
        print(f"wrote {out}")


if __name__ == "__main__":
    main()

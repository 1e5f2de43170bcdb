"""Run benchmark suites: ``python -m benchmarks.run speed`` prints tables and writes results.

Suites of tasks (``uci-regression`` and others) fill ``results/SUITE.jsonl`` and go on where they
stopped; the others measure all they have in one go and write ``results/SUITE.json``.
``python -m benchmarks.run render`` makes ``RESULTS.md`` of what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import import_module
from pathlib import Path

import pandas as pd
import torch

from benchmarks import harness
from benchmarks.measure import machine

TASKS = ("uci-regression", "uci-classification", "images", "toys")
WHOLE = (
    "speed",
    "contract",
    "calibration",
    "vbll",
    "ivon",
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


def run_whole(suite: str, out: Path) -> None:
    """Measure everything of a suite, print its tables and write its file."""
    start = time.perf_counter()
    rows = import_module(f"benchmarks.{suite}").run()
    seconds = round(time.perf_counter() - start)
    table = pd.DataFrame(rows)
    table = table.loc[:, [c.rpartition("_")[2] != "each" for c in table.columns]]
    # A suite of several parts has a table for each, with the columns that it fills.
    parts = table.groupby("part", sort=False) if "part" in table else [("", table)]
    for _, part in parts:
        print(part.dropna(axis=1, how="all").to_string(index=False), end="\n\n")
    path = out / f"{suite}.json"
    where = {"machine": machine(), "seconds": seconds, **harness.version_and_date()}
    path.write_text(json.dumps({**where, "results": rows}, indent=1) + "\n")
    print(f"wrote {path}")


def main() -> None:
    """Run the suites that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*TASKS, *WHOLE, "render")
    parser.add_argument("suites", nargs="+", choices=names, metavar="SUITE", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    tasks = parser.add_argument_group("suites of tasks: " + ", ".join(TASKS))
    tasks.add_argument("--jobs", type=int, default=1, help="processes at a time")
    tasks.add_argument("--budget", type=float, metavar="MINUTES", help="stop after this time")
    tasks.add_argument("--methods", nargs="+", default=(), help="these alone")
    tasks.add_argument("--sets", nargs="+", default=(), help="these alone")
    tasks.add_argument("--splits", nargs="+", type=int, default=(), help="these alone")
    tasks.add_argument("--again", action="store_true", help="also what has a row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for suite in args.suites:
        if suite == "render":
            from benchmarks.page import render

            print(f"wrote {render(args.out)}")
        elif suite in TASKS:
            harness.run(
                suite,
                args.out,
                jobs=args.jobs,
                budget=args.budget,
                methods=args.methods,
                sets=args.sets,
                splits=args.splits,
                again=args.again,
            )
        else:
            run_whole(suite, args.out)


if __name__ == "__main__":
    main()

"""Check and time every kernel on a device: ``python -m benchmarks.gpu [KERNELS]``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Seconds for all of it, and what is kept back at the end of each module for a case that lasts.
BUDGET = 460.0


def modules() -> list[str]:
    return sorted(path.stem.removeprefix("cases_") for path in HERE.glob("cases_*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="KERNELS", help=f"of {', '.join(modules())}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help="JSON; results/DEVICE.json by default")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all of it")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a process for the cases of one module
    args = parser.parse_args()
    unknown = set(args.modules) - set(modules())
    if unknown:
        parser.error(f"no cases for {', '.join(sorted(unknown))}; there are {', '.join(modules())}")
    if args.device == "cpu":
        os.environ.update(TRITON_INTERPRET="1", UQ_KERNELS="triton")
    if args.one:
        from benchmarks.gpu.runner import run_module

        print(json.dumps(run_module(args.one, args.device, args.budget), allow_nan=False))
        return 0

    from benchmarks.gpu.runner import ceilings, machine

    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device; --device cpu runs the checks in Triton's interpreter")
            return 2
    start = time.monotonic()
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": machine(args.device),
        "ceilings": ceilings() if args.device == "cuda" else {},
        "checks": [],
        "timings": [],
        "failures": [],
    }
    chosen = args.modules or modules()
    for i, name in enumerate(chosen):
        left = args.budget - (time.monotonic() - start)
        share = left / (len(chosen) - i)
        _one(name, args.device, max(10.0, share), found)
    found["seconds"] = round(time.monotonic() - start, 1)
    bandwidth = found["ceilings"].get("copy_bytes_per_second")
    for row in found["timings"]:
        _judge(row, bandwidth, found["ceilings"])
    wrong = [r for r in found["checks"] if r["state"] in ("wrong", "error")] + found["failures"]
    name = str(found["device"]["name"]).lower().replace(" ", "_")
    out = args.out or HERE / "results" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["checks"]:
        print(
            f"{row['state']:>10}  {row['kernel']}: {row['name']} [{row['precision']}]"
            f"  error {row.get('error', '—')}  tolerance {row.get('tolerance', '—')}"
            f"  {row.get('message', '')}"
        )
    for row in found["timings"]:
        print(json.dumps({k: v for k, v in row.items() if k != "repeats"}))
    for failure in found["failures"]:
        print(failure)
    print(f"{len(found['checks'])} checks, {len(wrong)} wrong, {found['seconds']} s; wrote {out}")
    return 1 if wrong else 0


def _one(name: str, device: str, budget: float, found: dict[str, Any]) -> None:
    """Cases of a module, in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", name, "--device", device]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            # A hanging kernel must not take the others' time.
            code: int | str = subprocess.run(
                [*command, "--budget", str(budget)],
                stdout=out,
                stderr=err,
                timeout=2 * budget + 30,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = "timeout"
        out.seek(0)
        err.seek(0)
        lines, trouble = out.read().splitlines(), err.read()
    try:
        part = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        part = None
    if code != 0 or part is None:
        found["failures"].append({"module": name, "exit": code, "message": trouble[-2000:]})
        return
    found["checks"] += part["checks"]
    found["timings"] += part["timings"]


def _judge(row: dict[str, Any], bandwidth: float | None, ceilings: dict[str, float]) -> None:
    """Ratios to the contenders and to the ceilings, and whether targets are met."""
    seconds: dict[str, float] = row.get("seconds", {})
    ours = seconds.get("uq")
    if not ours:
        return
    row["times_faster_than"] = {k: v / ours for k, v in seconds.items() if k != "uq"}
    if row.get("moved") and bandwidth:
        row["bytes_per_second"] = row["moved"] / ours
        row["share_of_copy"] = row["bytes_per_second"] / bandwidth
    if row.get("flop"):
        row["flop_per_second"] = row["flop"] / ours
        ceiling = ceilings.get(f"{row['rate']}_flop_per_second")
        if ceiling:
            row["share_of_matmul"] = row["flop_per_second"] / ceiling
    row["met"] = {}
    for name, least in row.get("targets", {}).items():
        reached = row.get("share_of_copy") if name == "copy" else row["times_faster_than"].get(name)
        row["met"][name] = None if reached is None else bool(reached >= least)


if __name__ == "__main__":
    sys.exit(main())

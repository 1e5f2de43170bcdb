"""Write the README's tables from the JSON of runs: ``python -m benchmarks.gpu.table``."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK = "<!-- tables: written by `python -m benchmarks.gpu.table` -->"


def runs() -> list[dict[str, Any]]:
    """Runs on devices, the newest first; those of the interpreter are none."""
    found = [json.loads(p.read_text()) for p in sorted((HERE / "results").glob("*.json"))]
    found = [r for r in found if r["device"]["name"] != "interpreter"]
    return sorted(found, key=lambda r: r["date"], reverse=True)


def kernels() -> dict[str, int]:
    """Number of cases of each kernel."""
    found: dict[str, int] = {}
    for path in sorted(HERE.glob("cases_*.py")):
        for case in import_module(f"benchmarks.gpu.{path.stem}").cases():
            found[case.kernel] = found.get(case.kernel, 0) + 1
    return found


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "—"


def tables() -> str:
    """Markdown."""
    cases, done = kernels(), runs()
    ran = {r["kernel"] for run in done for r in run["checks"] if r["state"] in ("right", "wrong")}
    missing = [k for k in cases if k not in ran]
    lines = []
    if not ran:
        lines += [
            "**No kernel has run on a device yet.** Nothing below this line was measured.",
            "",
        ]
    elif missing:
        lines += [f"Not yet run on a device: {', '.join(missing)}.", ""]
    else:
        lines += ["Every kernel has run on a device.", ""]
    lines += ["| kernel | cases | last run on a device |", "|---|---|---|"]
    for kernel, count in cases.items():
        last = "not run"
        for run in done:
            states = [r["state"] for r in run["checks"] if r["kernel"] == kernel]
            if "right" in states or "wrong" in states:
                device = run["device"]["name"]
                last = f"{run['date']}, {device}: {states.count('right')} of {len(states)} right"
                break
        lines.append(f"| {kernel} | {count} | {last} |")
    for run in done:
        device = run["device"]
        lines += [
            "",
            f"## {device['name']}, {run['date']}",
            "",
            f"Driver {device.get('driver')}, CUDA {device.get('cuda')}, torch {device['torch']}, "
            f"Triton {device['triton']}; {run['seconds']} s for all of it. Copy: "
            f"{_number(run['ceilings'].get('copy_bytes_per_second'))} B/s.",
            "",
            "| kernel | operation | s | times faster than | of copy | of matmul | met |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in run["timings"]:
            faster = row.get("times_faster_than", {})
            against = ", ".join(f"{k} {_number(v)}" for k, v in faster.items()) or "—"
            met = ", ".join(f"{k}: {v}" for k, v in row.get("met", {}).items()) or "—"
            ours = _number(row.get("seconds", {}).get("uq"))
            lines.append(
                f"| {row['kernel']} | {row['name']} | {ours} | {against} | "
                f"{_number(row.get('share_of_copy'))} | {_number(row.get('share_of_matmul'))} | "
                f"{met} |"
            )
    return "\n".join(lines)


def main() -> None:
    readme = HERE / "README.md"
    head = readme.read_text().split(MARK)[0]
    readme.write_text(f"{head}{MARK}\n\n{tables()}\n")


if __name__ == "__main__":
    main()

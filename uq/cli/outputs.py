"""What commands write: predictions, reports, progress, and the checks before that."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from uq.errors import DataError, SaveError
from uq.texts import visible

if TYPE_CHECKING:
    import pandas as pd

    from uq.cli.doctor import Finding
    from uq.data import Dataset


def number_frame(dist: Any, coverage: float) -> pd.DataFrame:
    """Moments and an interval, a row each."""
    if len(dist.batch_shape) > 1:
        raise DataError(f"uq predict writes one target; the model has {dist.batch_shape[1]}.")
    frame = dist.to_frame()
    lower, upper = dist.interval(coverage)
    frame["lower"], frame["upper"] = lower.cpu().numpy(), upper.cpu().numpy()
    return frame[["mean", "std", "lower", "upper", "aleatoric", "epistemic"]]


def label_frame(dist: Any) -> pd.DataFrame:
    """Label and class probabilities, a row each."""
    frame = dist.to_frame().add_prefix("p_")
    frame.insert(0, "label", dist.classes[dist.mode.cpu().numpy()])
    return frame.assign(entropy=dist.entropy().cpu().numpy())


def is_row_number(index: pd.Index) -> bool:
    """Whether an index only counts the rows."""
    import pandas as pd

    return index.equals(pd.RangeIndex(len(index)))


def facts(data: Dataset) -> dict[str, str]:
    """What a report says of its data."""
    facts = {"data": data.description or data.name, "target": f"{data.y.name} ({data.task})"}
    return facts | ({"target unit": data.target_unit} if data.target_unit else {})


def publish(report: Any, out: Path, *, as_json: bool) -> None:
    """Save a report and print it."""
    html = report.save(out)
    if as_json:
        print(json.dumps({"html": str(html), **report.to_dict()}, indent=2, allow_nan=False))
    else:
        # Once more what a terminal has scrolled away.
        again = ["", *wrap(report.recommendation, 100, subsequent_indent="    ")]
        print(coloured(str(report)), *(again if len(again) > 1 else []), "", html, sep="\n")


def coloured(text: str) -> str:
    """On a terminal: headings bold, the best of each row green (NO_COLOR turns it off)."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    text = re.sub(r"(?m)^(?! ).*\?$", "\033[1m\\g<0>\033[0m", text)
    return re.sub(r"[\d−∞]\S*(?: ±\S+)? \*(?=\s|$)", "\033[32m\\g<0>\033[0m", text)


def finding_table(findings: list[Finding]) -> str:
    """What ``uq doctor`` found, a line each."""
    width = max(len(finding.name) for finding in findings)
    lines, part = [], ""
    for finding in findings:
        if finding.part != part:
            part = finding.part
            lines.append(part)
        mark = {"ok": "+", "absent": "-", "wrong": "!"}[finding.state]
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        lines.append(f"  {mark} {finding.name:{width}}  {finding.seen}{remedy}")
    return "\n".join(lines)


def progress(args: argparse.Namespace, line: str) -> None:
    """Tell on stderr how far a command is."""
    if not (getattr(args, "quiet", False) or getattr(args, "json_progress", False)):
        print(visible(line), file=sys.stderr, flush=True)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning as one line."""
    print("uq: warning:", visible(" ".join(str(message).split())), file=sys.stderr)


def on_terminal() -> bool:
    """Whether someone watches stderr, who is shown progress bars."""
    return sys.stderr.isatty()


def report_folder(path: Path) -> Path:
    """Create the folder before anything is fitted, so that a wrong path costs no time."""
    folder = path.parent if path.suffix in (".html", ".json", ".md") else path
    folder.mkdir(parents=True, exist_ok=True)
    return path


def check_file(path: Path) -> None:
    """Refuse a path that cannot be written before anything is fitted."""
    if path.is_dir():
        raise SaveError(f"{path}: is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise SaveError(f"{path}: the folder {path.parent} does not exist.")

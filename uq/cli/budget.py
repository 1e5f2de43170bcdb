"""Which methods the size of a table and a time budget allow (``uq compare --budget``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from uq.texts import spelled_seconds

# In the order in which they are worth their time: the baseline, then what is often best for little.
ORDER = (
    "map",
    "vbll",
    "pfn",
    "ensemble",
    "ivon",
    "gp",
    "evidential",
    "abnn",
    "pbnn",
    "sdm",
    "etp",
    "ssvi",
    "implicit",
    "masked",
    "nuts",
)
# Time to fit in fits of MAP to the same table: the upper side of what one thread took on wine and
# diabetes, of the quicker ones also on breast_cancer and digits. Off by two does no harm.
_COST = {
    "map": 1.0,
    "vbll": 3.0,
    "pfn": 0.5,
    "ensemble": 4.5,
    "ivon": 4.0,
    "gp": 40.0,
    "evidential": 3.0,
    "abnn": 1.5,
    "sdm": 4.5,
    "etp": 4.5,
    "ssvi": 12.0,
    "pbnn": 2.0,
    "implicit": 9.0,
    "masked": 60.0,
    "nuts": 250.0,  # 88 on wine; on diabetes it was stopped beyond 200
}
# A step of these takes all rows.
_MOST_ROWS = {"masked": 5000, "nuts": 5000}


@dataclass(frozen=True)
class Choice:
    """Methods to fit, and why others are left out."""

    names: list[str]
    left_out: dict[str, str]


def affordable(
    names: Iterable[str], *, n_rows: int, map_seconds: float, budget: float, jobs: int = 1
) -> Choice:
    """Choose methods whose fits together take at most ``budget`` seconds.

    Parameters
    ----------
    names : iterable of str
        Methods that do the task.
    n_rows : int
        Rows to fit.
    map_seconds : float
        What a fit of MAP to them took.
    budget : float
        Seconds for all fits.
    jobs : int, default=1
        Fits at a time.
    """
    chosen: list[str] = []
    left_out: dict[str, str] = {}
    spent = 0.0
    for name in sorted(names, key=ORDER.index):
        seconds = _COST[name] * map_seconds
        if n_rows > _MOST_ROWS.get(name, n_rows):
            left_out[name] = f"each step takes all {n_rows:,} rows"
        elif chosen and spent + seconds > budget * jobs:
            left_out[name] = f"about {spelled_seconds(seconds)}"
        else:
            chosen.append(name)
            spent += seconds
    return Choice(chosen, left_out)

"""The first lines of a comparison: the ranking with its uncertainty, what to pick, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uq.calibration.bootstrap import Difference, Estimate

_AUROC = "auroc"  # of OOD rows


@dataclass(frozen=True)
class Standing:
    """One line of the ranking.

    Attributes
    ----------
    method : str
        Its name.
    value, low, high : float
        The score by which methods are ranked, lower is better, and its interval.
    behind, behind_low, behind_high : float
        How far behind the first method, with the interval of the paired difference that holds for
        all pairs of methods together; 0 for the first.
    tied : bool
        Whether it is the first, or cannot be told from it.
    fault : str
        What is wrong with its calibration beyond chance; "" for nothing.
    seconds : float or None
        To fit, where that is known.
    """

    method: str
    value: float
    low: float
    high: float
    behind: float
    behind_low: float
    behind_high: float
    tied: bool
    fault: str
    seconds: float | None


def headline(estimates: Mapping[str, Mapping[str, Estimate]]) -> tuple[str, str, str]:
    """Metric that ranks methods, its label and its unit: CRPS where one has no density."""
    metric = "negative_log_likelihood"
    if any(np.isnan(e[metric].value) for e in estimates.values()):
        return "crps", "CRPS", ""
    return metric, "log score", " nats"


def ranking(
    estimates: Mapping[str, Mapping[str, Estimate]],
    differences: Sequence[Difference],
    faults: Mapping[str, str],
    seconds: Mapping[str, float],
) -> list[Standing]:
    """Methods from the best score to the worst; empty for one method."""
    if len(estimates) == 1:
        return []
    metric, _, _ = headline(estimates)
    scores = {name: e[metric] for name, e in estimates.items()}
    order = sorted(scores, key=lambda name: (np.isnan(scores[name].value), scores[name].value))
    lines: list[Standing] = []
    for name in order:
        behind = (0.0, 0.0, 0.0)
        for d in differences:
            if d.metric == metric and {d.first, d.second} == {order[0], name}:
                behind = (
                    (d.value, d.low, d.high) if d.first == name else (-d.value, -d.high, -d.low)
                )
        e = scores[name]
        tied = name == order[0] or e.standing in ("best", "tied") or e.value == lines[0].value
        lines.append(
            Standing(name, e.value, e.low, e.high, *behind, tied, faults[name], seconds.get(name))
        )
    return lines


def summary(estimates: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Which method has the best log score, and which cannot be told from it; "" for one method."""
    if len(estimates) == 1:
        return ""
    metric, label, unit = headline(estimates)
    scores = {name: e[metric] for name, e in estimates.items()}
    best = [name for name, e in scores.items() if e.standing == "best"]
    tied = [name for name, e in scores.items() if e.standing == "tied"]
    if not best:  # all are equal
        return f"The {label} is the same for all: {next(iter(scores.values())).value:.4g}{unit}."
    said = f"Best {label}: {', '.join(best)} ({scores[best[0]].value:.4g}{unit})"
    return f"{said}; not distinguishable from it: {', '.join(tied)}." if tied else f"{said}."


def recommendation(
    lines: Sequence[Standing],
    estimates: Mapping[str, Mapping[str, Estimate]],
    differences: Sequence[Difference],
    baseline: Mapping[str, float],
) -> str:
    """Which method to pick and why; "" for one method.

    Of the methods whose score cannot be told from the best: first those that tell OOD rows no worse
    than the best of them, where there are such rows; then those with nothing against their
    calibration; then the quickest to fit, or the best where times are unknown.
    """
    if not lines:
        return ""
    metric, label, unit = headline(estimates)
    if not lines[0].value < baseline[metric]:
        return (
            f"Pick none: no {label} is better than that of one constant prediction for all rows "
            f"({baseline[metric]:.4g}{unit})."
        )
    tied = [line for line in lines if line.tied]
    aware = _aware(tied, estimates, differences)
    pool = [line for line in aware if not line.fault] or aware
    timed = all(line.seconds is not None for line in pool)
    pick = min(pool, key=lambda line: line.seconds or 0.0) if timed else pool[0]
    if pick is lines[0]:
        why = [f"it has the best {label}"]
    else:
        why = [f"its {label} cannot be told from the best ({lines[0].method})"]
    if len(aware) < len(tied):
        auroc = estimates[pick.method][_AUROC].value
        why.append(f"it tells OOD rows better than others of these (AUROC {auroc:.3f})")
    if not pick.fault:
        why.append("nothing is against its calibration")
    if timed and len(pool) > 1:
        slower = max(line.seconds or 0.0 for line in pool if line is not pick)
        why.append(
            f"of {_count(len(pool))} such methods it fits quickest ({pick.seconds:.3g} s, the "
            f"others up to {slower:.3g} s)"
        )
    said = f"Pick {pick.method}: {_joined(why)}."
    if pick.fault:
        by = "VarianceScaling" if pick.fault.startswith("intervals") else "TemperatureScaling"
        said += f" Mend its calibration ({pick.fault}), as by uq.calibration.{by}."
    return said


def _aware(
    lines: Sequence[Standing],
    estimates: Mapping[str, Mapping[str, Estimate]],
    differences: Sequence[Difference],
) -> list[Standing]:
    """Those that tell OOD rows no worse than the best of them."""
    scores = {
        x.method: estimates[x.method][_AUROC].value for x in lines if _AUROC in estimates[x.method]
    }
    if not scores:
        return list(lines)
    best = max(scores, key=lambda name: scores[name])
    worse = {
        loser
        for d in differences
        for loser in (d.first, d.second)
        if d.metric == _AUROC and d.winner == best and loser != best
    }
    return [line for line in lines if line.method not in worse]


def _joined(reasons: Sequence[str]) -> str:
    *others, last = reasons
    return f"{', '.join(others)}, and {last}" if others else last


def _count(n: int) -> str:
    return {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}.get(n, str(n))

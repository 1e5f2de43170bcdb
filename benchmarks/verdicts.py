"""Numbers with their errors, and verdicts of them: yes, no, and None for "not decided"."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student_t

# Fewest values of which a standard error says anything.
ERROR_LEAST = 3
Verdict = bool | None


class Measured(float):
    """A number, its standard error (NaN where it was measured once) and its value of each seed."""

    def __new__(cls, value: float, error: float = math.nan, each: tuple[float, ...] = ()) -> Any:
        found = super().__new__(cls, value)
        found.error, found.each = error, each
        return found

    error: float
    each: tuple[float, ...]


class Share(float):
    """A share k / n of n sets."""

    def __new__(cls, k: int, n: int) -> Any:
        found = super().__new__(cls, k / n)
        found.k, found.n = k, n
        return found

    k: int
    n: int


def half_width(error: Any, n: Any) -> Any:
    """Half of Student's 95 % interval of a mean of n values with this standard error."""
    return student_t.ppf(0.975, n - 1) * error


def above(a: float, b: float, *, by: float = 0.0, times: float = 1.0) -> Verdict:
    """Whether a > times b + by: None where the 95 % interval of the difference holds 0.

    Student's interval of the differences by seed where both have the same seeds; else two standard
    errors, as if independent.
    """
    difference, half = a - times * b - by, 0.0
    if isinstance(a, Measured) and isinstance(b, Measured):
        if (n := len(a.each)) == len(b.each) > 1:
            pairs = np.subtract(a.each, np.multiply(times, b.each))
            half = float(half_width(pairs.std(ddof=1) / math.sqrt(n), n))
        else:
            half = 2 * math.hypot(*np.nan_to_num([a.error, times * b.error]))
    return None if abs(difference) <= half else difference > 0


def mostly(share: float) -> Verdict:
    """Whether it is most sets, by a sign test at 5 %."""
    assert isinstance(share, Share)
    for answer, side in ((True, "greater"), (False, "less")):
        if binomtest(share.k, share.n, alternative=side).pvalue <= 0.05:
            return answer
    return None


def near(a: float, target: float, *, within: float) -> Verdict:
    """Whether a is within ``within`` of a target; None where its 95 % interval reaches there."""
    assert isinstance(a, Measured)
    half = float(half_width(a.error, len(a.each))) if len(a.each) > 1 else 0.0
    distance = abs(a - target)
    return True if distance <= within else None if distance <= within + half else False


def alike(difference: float, p: float, *, within: float) -> Verdict:
    """Whether a difference is small; False where it is also no chance at 5 %."""
    return True if abs(difference) <= within else False if p <= 0.05 else None


def every(*verdicts: Verdict) -> Verdict:
    """True if all are, False if one is."""
    if any(v is not None and not v for v in verdicts):
        return False
    return None if None in verdicts else True

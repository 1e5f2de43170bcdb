"""What conformal intervals and sets share: the rank of a score, folds, and checks.

A score s(x, y) says how badly a target y conforms to the prediction at x. With the scores
s_1 … s_n of held-out rows and k = ⌈(n + 1) c⌉, the split conformal region of coverage c is

    C(x) = {y : s(x, y) <= s_(k)},

which holds the target of a new row with probability at least c if the rows are exchangeable, and at
most c + 1/(n + 1) if no scores are tied: the new score is equally likely to have any of n + 1
ranks. Given the held-out rows, the coverage is distributed as Beta(k, n + 1 − k). With k > n no
score is high enough, and the region is everything.

The cross-conformal region (CV+) needs no rows set apart. Fold j is predicted by a model fitted
without it, which also gives the scores s_j of the new row:

    C(x) = {y : #{rows i : s_i < s_{j(i)}(x, y)} < k}.

It holds the target with probability at least 2c − 1 − √(2/n), and close to c in practice.
"""

from __future__ import annotations

import math
import warnings
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def check_coverage(where: str, coverage: Any) -> None:
    """Refuse what is no share strictly between 0 and 1."""
    if not isinstance(coverage, Real) or not 0 < float(coverage) < 1:
        raise ParameterError(f"{where}: coverage must lie in (0, 1), got {coverage!r}.")


def rank(n: int, level: float) -> int:
    """⌈(n + 1) level⌉; what exceeds a whole number by rounding alone is not rounded up."""
    return math.ceil((n + 1) * level - 1e-9)


def kth_score(scores: Floats, level: float) -> Floats:
    """Score of rank ⌈(n + 1) level⌉ along the first axis, infinite where there are too few."""
    k = rank(len(scores), level)
    if k > len(scores):
        return np.full(scores.shape[1:], np.inf)
    kth: Floats = np.partition(scores, k - 1, axis=0)[k - 1]
    return kth


def rows_needed(level: float) -> int:
    """Fewest rows for which the rank of ``level`` exists."""
    return math.ceil(level / (1 - level) - 1e-9)


def warn_too_few(message: str) -> None:
    """Say that regions are of no use, from where ``fit`` was called."""
    warnings.warn(message, UserWarning, stacklevel=4)


def pair_folds(where: str, dist: Any, y: Any) -> list[tuple[Any, Any]]:
    """Predictions and targets of each fold; a single pair for split conformal."""
    if not isinstance(dist, list | tuple):
        return [(dist, y)]
    if not isinstance(y, list | tuple) or len(y) != len(dist) or len(dist) < 2:
        got = f"{len(y)} parts" if isinstance(y, list | tuple) else f"a {type(y).__name__}"
        raise DataError(
            f"{where}: with a list of distributions, one for each of at least two folds, y must be "
            f"a list of their targets; got {len(dist)} distributions and {got} of y."
        )
    return list(zip(dist, y, strict=True))


def match_folds(where: str, dist: Any, n_folds: int) -> list[Any]:
    """Predictions of the same new rows by the model of each fold, or the one of split conformal."""
    dists = list(dist) if isinstance(dist, list | tuple) else [dist]
    if isinstance(dist, list | tuple) != (n_folds > 1) or len(dists) != n_folds:
        got = f"a list of {len(dists)}" if isinstance(dist, list | tuple) else "one distribution"
        expected = (
            f"a list of the predictions of its {n_folds} models for the same rows"
            if n_folds > 1
            else "the predictions of one model"
        )
        raise DataError(f"{where}: dist must be {expected}, as in fit; got {got}.")
    if len({getattr(d, "batch_shape", None) for d in dists}) > 1:
        raise DataError(f"{where}: the {n_folds} distributions must be of the same rows.")
    return dists

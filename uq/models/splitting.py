"""Which rows a wrapped estimator is fitted to, and which judge it.

Used by the estimators that wrap another one and learn from its predictions of rows it did not see.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import (
    KFold,
    ShuffleSplit,
    StratifiedKFold,
    StratifiedShuffleSplit,
    check_cv,
)
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import _num_samples

from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    Split = tuple[np.ndarray, np.ndarray]

# Rows are shuffled, because files are often sorted; always alike, so that a fit can be repeated.
_SEED = 0


def holds_out(cv: Any) -> bool:
    """Whether ``cv`` is a share of rows to be held out from a single fit."""
    return isinstance(cv, Real) and 0 < float(cv) < 1


def is_fold_count(cv: Any) -> bool:
    """Whether ``cv`` is a number of folds."""
    return isinstance(cv, Integral) and not isinstance(cv, bool) and int(cv) >= 2


def find_splits(
    owner: object, cv: Any, X: Any, y: Any, *, labels: np.ndarray | None, stratify: bool
) -> list[Split]:
    """Positions (train, test) of each fit that is judged; none for "prefit".

    Parameters
    ----------
    owner : estimator
        Whose argument ``cv`` is, for messages.
    cv : int, float, "prefit", splitter or iterable of (train, test)
        How to split.
    X, y : array-like
        The rows.
    labels : ndarray of shape (n,) or None
        Labels, for a classifier; every training part must have all of them.
    stratify : bool
        Whether an int or a float splits each class in the same proportion.

    Raises
    ------
    ParameterError
        If ``cv`` is none of these.
    DataError
        If the rows cannot be split in that way.
    """
    if isinstance(cv, str) and cv == "prefit":
        return []
    n, name = _num_samples(X), type(owner).__name__
    splitter = _splitter(name, cv, n, labels if stratify else None)
    try:
        found = list(splitter.split(X, y))
    except ValueError as error:
        raise DataError(f"{name}.fit: cv={cv!r} cannot split: {error}") from error
    remedy = (
        "give a cv that keeps some of each class in every training part (StratifiedKFold, or an "
        "int)"
        if stratify
        else "give more rows of it, or fit the estimator yourself and pass cv='prefit'"
    )
    splits = []
    for i, pair in enumerate(found):
        train, test = (np.arange(n)[part] for part in pair)  # masks become positions, too
        if labels is not None and len(left_out := np.setdiff1d(labels, labels[train])):
            raise DataError(
                f"{name}.fit: split {i} trains without class {left_out.tolist()[0]!r}, so that it "
                f"cannot predict it; {remedy}."
            )
        splits.append((train, test))
    return splits


def _splitter(name: str, cv: Any, n: int, strata: np.ndarray | None) -> Any:
    if is_fold_count(cv):
        if n < cv:
            raise DataError(f"{name}.fit: cv={cv} needs n_samples >= {cv}, got n_samples = {n}.")
        if strata is None:
            return KFold(cv, shuffle=True, random_state=_SEED)
        labels, counts = np.unique(strata, return_counts=True)
        if counts.min() < cv:
            raise DataError(
                f"{name}.fit: class {labels[counts.argmin()].item()!r} has {counts.min()} rows, "
                f"but cv={cv} needs {cv} of each class; lower cv, or add rows of that class."
            )
        return StratifiedKFold(cv, shuffle=True, random_state=_SEED)
    if holds_out(cv):
        kind = ShuffleSplit if strata is None else StratifiedShuffleSplit
        return kind(1, test_size=cv, random_state=_SEED)
    if isinstance(cv, str | Real) or cv is None:
        raise ParameterError(
            f"{name}: cv must be an integer >= 2, a share in (0, 1), 'prefit', a splitter of "
            f"scikit-learn or pairs (train, test), got {cv!r}."
        )
    try:
        return check_cv(cv)
    except ValueError as error:
        raise ParameterError(f"{name}: cv is of no use: {error}") from error


def fit_rows(
    estimator: Any, X: Any, y: Any, weight: Any = None, rows: np.ndarray | None = None
) -> Any:
    """Fit a clone of ``estimator``, to some of the rows."""
    if rows is not None:
        X, y = _safe_indexing(X, rows), _safe_indexing(y, rows)
        weight = None if weight is None else np.asarray(weight)[rows]
    settings = {} if weight is None else {"sample_weight": weight}
    return clone(estimator).fit(X, y, **settings)

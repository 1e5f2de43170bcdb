"""Checks of arguments, with messages that say what came, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from uq.errors import DataError, ParameterError


def check_number(
    owner: object,
    name: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    integer: bool = False,
    optional: bool = False,
) -> None:
    """Check the numeric constructor argument ``name`` of an estimator."""
    value = getattr(owner, name)
    if value is None and optional:
        return
    kind = Integral if integer else Real
    ok = isinstance(value, kind) and not isinstance(value, bool | np.bool_)
    bounds = []
    if above is not None:
        ok = ok and value > above
        bounds.append(f"> {above}")
    if at_least is not None:
        ok = ok and value >= at_least
        bounds.append(f">= {at_least}")
    if below is not None:
        ok = ok and value < below
        bounds.append(f"< {below}")
    if not ok:
        what = "an integer" if integer else "a number"
        none = " or None" if optional else ""
        raise ParameterError(
            f"{type(owner).__name__}: {name} must be {what} {' and '.join(bounds)}{none}, "
            f"got {value!r}."
        )


def check_choice(owner: object, name: str, choices: Sequence[str]) -> None:
    """Check that the constructor argument ``name`` is one of ``choices``."""
    value = getattr(owner, name)
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ParameterError(
            f"{type(owner).__name__}: {name} must be one of {listed}, got {value!r}."
        )


def check_hidden(owner: Any) -> None:
    """Check that ``hidden`` is a sequence of positive widths."""
    hidden = owner.hidden
    ok = isinstance(hidden, list | tuple) and all(
        isinstance(h, Integral) and not isinstance(h, bool) and int(h) > 0 for h in hidden
    )
    if not ok:
        raise ParameterError(
            f"{type(owner).__name__}: hidden must be a tuple of widths >= 1, such as (64, 64), "
            f"got {hidden!r}."
        )


def check_finite(X: np.ndarray, where: str, columns: Sequence[str] | None) -> None:
    """Raise a DataError that points at the first NaN or infinity of ``X``."""
    if np.isfinite(X.sum(dtype=np.float64)):  # one pass; overflow falls through to the real check
        return
    bad = ~np.isfinite(X)
    if not bad.any():
        return
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    named = f" (column {columns[first[1]]!r})" if columns is not None and len(first) == 2 else ""
    kind = "NaN" if np.isnan(X[first]) else "infinity"
    raise DataError(
        f"{where}: X contains {kind}, first at position {list(first)}{named}, {int(bad.sum())} "
        "entries in all; remove or impute them (sklearn.impute.SimpleImputer; uq.TableModel does "
        "it for tables)."
    )


# What scikit-learn's checks say, and what to do about it.
_ADVICE = {
    "could not convert string to float": "Text must be encoded; uq.TableModel(estimator) does it.",
    "could not be promoted": "All columns must be numbers; turn dates into numbers first.",
    "feature names should match": "Give the columns of fit in their order: "
    "X[model.feature_names_in_].",
    "Input y contains": "Drop these rows, or fill them in.",
    "y should be a 1d array": "Give one label a row; of one-hot rows that is y.argmax(axis=1).",
    "Found input variables with inconsistent": "X and y need the same rows.",
}


@contextmanager
def advice(where: str) -> Iterator[None]:
    """Add what to do to errors that scikit-learn's checks raise inside the block."""
    try:
        yield
    except (ValueError, TypeError) as error:
        text = str(error).rstrip()
        found = next((hint for key, hint in _ADVICE.items() if key in text), None)
        if found is None:
            raise
        gap = "\n" if "\n" in text else " " if text.endswith(".") else ". "
        raise DataError(f"{where}: {text}{gap}{found}") from error


def check_is_data(where: str, **arguments: Any) -> None:
    """Refuse names of files and columns, and dicts, where arrays or tables are expected."""
    for name, value in arguments.items():
        if isinstance(value, str | bytes | Path) or (name == "X" and value is None):
            raise DataError(
                f"{where}: {name} must hold data, got {value!r}. Read a file with "
                "uq.data.read_table(path), and take the target out of a table with "
                "uq.data.split_target(table, name)."
            )
        if isinstance(value, Mapping) and not hasattr(value, "shape"):  # SciPy has dicts with one
            raise DataError(
                f"{where}: {name} must be an array or a table, got a {type(value).__name__}; "
                "pandas.DataFrame makes a table of one."
            )


def seed_of(owner: Any) -> int:
    """Draw a seed from ``random_state``."""
    try:
        return int(check_random_state(owner.random_state).randint(2**31))
    except ValueError as error:
        raise ParameterError(
            f"{type(owner).__name__}: random_state must be an integer in [0, 2**32), a "
            f"numpy.random.RandomState or None, got {owner.random_state!r}."
        ) from error

"""Fits of several methods to the same rows, one after another or in processes."""

from __future__ import annotations

import argparse
import threading
import time
import warnings
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uq.cli.inputs import warm_up
from uq.cli.outputs import progress, show_warning
from uq.errors import FitInterruptedWarning, UQError

if TYPE_CHECKING:
    import pandas as pd

    from uq.distributions import Predictive


@dataclass(frozen=True)
class Fitted:
    """What is left of a method once it is fitted."""

    dists: list[Predictive]
    """Predictions for each of the tables."""
    fit_seconds: float
    predict_seconds: float
    """For the first table."""


def fit_methods(
    args: argparse.Namespace,
    models: dict[str, Any],
    X: pd.DataFrame,
    y: pd.Series,
    tables: list[pd.DataFrame],
) -> dict[str, Fitted]:
    """Fit every model to ``X`` and ``y`` and predict the rows of ``tables``.

    ``args.jobs`` fits go on at a time. What comes out does not depend on that, the seconds apart.
    """
    # joblib takes half a second to import.
    from joblib import Parallel, delayed

    one = delayed(_fit_method)
    jobs = min(args.jobs, len(models))
    # A large array would otherwise reach the processes as a memory map that cannot be written to.
    run = Parallel(jobs, max_nbytes=None)
    try:
        results = run(one(args, name, model, X, y, tables) for name, model in models.items())
    except BrokenExecutor as error:
        raise UQError(
            f"a process failed, perhaps for want of memory (then lower --jobs): {error}"
        ) from error
    return dict(zip(models, results, strict=True))


def _fit_method(
    args: argparse.Namespace,
    name: str,
    model: Any,
    X: pd.DataFrame,
    y: pd.Series,
    tables: list[pd.DataFrame],
) -> Fitted:
    from sklearn.base import clone
    from tqdm.auto import tqdm

    with warnings.catch_warnings():  # as the command does in its own process
        warnings.simplefilter("error", FitInterruptedWarning)
        warnings.showwarning = show_warning
        if args.jobs > 1:
            # The lock that tqdm shares between processes is left behind by one that is killed.
            tqdm.set_lock(threading.RLock())
        warm_up()
        model = clone(model)  # what was fitted can go
        progress(args, f"{name}: fitting {len(y)} rows")
        try:
            start = time.perf_counter()
            model.fit(X, y)
            fitted = time.perf_counter()
            dists = [model.predict_distribution(tables[0])]
            end = time.perf_counter()
            dists += [model.predict_distribution(table) for table in tables[1:]]
        except (UQError, ValueError, OSError) as error:
            raise UQError(f"{name}: {error}") from error
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
        progress(args, f"{name}: fitted in {fitted - start:.1f} s")
    return Fitted(dists, round(fitted - start, 3), round(end - fitted, 3))

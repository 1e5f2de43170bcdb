"""Numbers under stress: every method on data that breaks arithmetic, memory or assumptions.

Each cell fits a small model with few steps and predicts: "finite" predictions, or the "clear error"
that the package raised; anything else is a failure. Cells come in the order of the table and are
kept as they come, in ``stress.partial.jsonl``.
"""

from __future__ import annotations

import json
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uq.errors import UQError
from uq.models.registry import METHODS, estimator_class

PARTIAL = Path(__file__).parent / "results" / "stress.partial.jsonl"
SECONDS = 180  # for one cell; what takes longer is said to
SMALL: dict[str, dict[str, Any]] = {
    "nuts": {"n_chains": 1, "n_warmup": 10, "n_draws": 10, "max_tree_depth": 4},
    "masked": {"n_chains": 1, "n_warmup": 10, "n_draws": 10, "thin": 1, "n_leapfrog": 5},
    "pbnn": {"n_particles": 64},
    "ensemble": {"n_members": 2},
    "abnn": {"n_members": 1, "n_samples": 4, "base_max_epochs": 5},
    "implicit": {"noise_dim": 4, "generator_width": 4, "n_samples": 8},
    "ivon": {"n_samples": 8},
    "ssvi": {"n_samples": 8, "density": 0.5},
    "gp": {"n_inducing": 16},
}

Data = tuple[np.ndarray, np.ndarray]


def base(task: str, n: int = 300, d: int = 5, seed: int = 0) -> Data:
    """Rows that every method learns something from."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    signal_ = X[:, 0] - 0.5 * X[:, 1]
    y = signal_ + 0.3 * rng.normal(size=n)
    return X, (y > 0).astype(int) if task == "classification" else y


def scaled(factor: float) -> Callable[[str], Data]:
    def make(task: str) -> Data:
        X, y = base(task)
        return X * factor, y

    return make


def target(factor: float, shift: float = 0.0) -> Callable[[str], Data]:
    def make(task: str) -> Data:
        X, y = base(task)
        return X, y * factor + shift

    return make


def constant(task: str) -> Data:
    X, y = base(task)
    X[:, 2], X[:, 3] = 7.0, 0.0
    return X, y


def duplicated(task: str) -> Data:
    X, y = base(task, 20)
    return np.repeat(X, 20, axis=0), np.repeat(y, 20)


def many_classes(task: str) -> Data:
    X, _ = base(task, 3000)
    return X, np.arange(3000) % 1000


def imbalanced(task: str) -> Data:
    X, _ = base(task, 1000)
    y = np.zeros(1000, dtype=int)
    y[:5] = 1
    return X, y


def half(task: str) -> Data:
    X, y = base(task)
    return X.astype(np.float16), y


STRESSES: dict[str, tuple[Callable[[str], Data], tuple[str, ...]]] = {
    "features of scale 1e12": (scaled(1e12), ("classification", "regression")),
    "features of scale 1e-12": (scaled(1e-12), ("classification", "regression")),
    "constant columns": (constant, ("classification", "regression")),
    "100,000 features x 50 rows": (
        lambda task: base(task, 50, 100_000),
        ("classification", "regression"),
    ),
    "1,000,000 rows x 10 features": (
        lambda task: base(task, 1_000_000, 10),
        ("classification", "regression"),
    ),
    "1,000 classes": (many_classes, ("classification",)),
    "5 rows of 1,000 in one class": (imbalanced, ("classification",)),
    "each row 20 times": (duplicated, ("classification", "regression")),
    "targets of scale 1e9": (target(1e9), ("regression",)),
    "targets of scale 1e-9": (target(1e-9), ("regression",)),
    "targets 1 ± 1e-6": (target(1e-6, 1.0), ("regression",)),
    "float16 features": (half, ("classification", "regression")),
}


class TimeIsUpError(Exception):
    """A cell took longer than ``SECONDS``."""


def _alarm(*_: Any) -> None:
    raise TimeIsUpError


def cell(method: str, task: Any, make: Callable[[str], Data]) -> dict[str, Any]:
    X, y = make(task)
    large = len(X) > 10_000
    settings: dict[str, Any] = {
        "hidden": (16,),
        "max_epochs": 1 if large else 10,
        "batch_size": 4096 if large else 32,
        "random_state": 0,
        "device": "cpu",
        **SMALL.get(method, {}),
    }
    model = estimator_class(method, task)()
    known = model.get_params(deep=False)
    model.set_params(**{k: v for k, v in settings.items() if k in known})
    start = time.perf_counter()
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    outcome, message = "finite", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist = model.fit(X, y).predict_distribution(X[:200])
            score = dist.log_prob(torch.as_tensor(np.unique(y, return_inverse=True)[1][:200]))
            if task == "regression":
                score = dist.log_prob(torch.as_tensor(np.asarray(y[:200], dtype=float)))
                values = torch.cat([dist.mean, dist.stddev])
            else:
                values = dist.probs
            if not bool(values.isfinite().all()) or bool(score.isnan().any()):
                outcome = "not finite"
    except TimeIsUpError:
        outcome = f"longer than {SECONDS} s"
    except UQError as error:
        outcome, message = "clear error", str(error)
    except MemoryError:
        outcome = "out of memory"
    except Exception as error:
        outcome, message = "failure", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return {
        "method": method,
        "task": task,
        "outcome": outcome,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "message": message[:200],
    }


def run() -> list[dict[str, Any]]:
    """All cells."""
    PARTIAL.parent.mkdir(exist_ok=True)
    rows = (
        [json.loads(line) for line in PARTIAL.read_text().splitlines()] if PARTIAL.exists() else []
    )
    done = {(r["stress"], r["method"], r["task"]) for r in rows}
    for stress, (make, tasks) in STRESSES.items():
        for method, m in METHODS.items():
            for task in tasks:
                if task in m.tasks and (stress, method, task) not in done:
                    rows.append({"stress": stress, **cell(method, task, make)})
                    with PARTIAL.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    PARTIAL.unlink()
    return rows

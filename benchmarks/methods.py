"""Methods of the suites of tasks, and what each is not run on, with the reason.

Ours are as they come: no argument is given but the seed (and the network, for images and toys).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import peers
from benchmarks.harness import Method
from uq.models.registry import METHODS, Task, estimator_class

# Most rows of a set on which a method is run, and why not on more.
MAX_ROWS: dict[str, tuple[int, str]] = {
    "NUTS": (800, "thousands of gradients of all rows: many minutes beyond"),
    "MaskedBNN": (1_100, "thousands of gradients of all rows: many minutes beyond"),
    "gp-sklearn": (2_000, "cubic in the rows, at every step of its optimiser"),
}
# Most classes, and why not more.
MAX_CLASSES: dict[str, tuple[int, str]] = {
    "PFN": (10, "its weights were trained on tables of up to 10 classes"),
}


# Most splits of a set, and why not more.
MAX_SPLITS: dict[str, tuple[int, str]] = {
    "NUTS": (1, "many CPU minutes a split"),
    "MaskedBNN": (3, "CPU minutes a split"),
}


def too_dear(method: str, split: int, n_rows: int, n_classes: int = 0) -> str:
    """Why ``method`` is not run on a split of a set of this size; empty where it is."""
    sizes = ((MAX_ROWS, n_rows), (MAX_CLASSES, n_classes), (MAX_SPLITS, split + 1))
    for table, size in sizes:
        limit, reason = table.get(method, (size, ""))
        if size > limit:
            return reason
    return ""


def ours(
    task: Task, settings: Callable[[str, str], Mapping[str, Any]] = lambda name, method: {}
) -> dict[str, Method]:
    """Every method of the registry; ``settings(set, method)`` gives arguments besides the seed."""

    def maker(key: str, label: str) -> Method:
        def make(name: str, seed: int) -> Any:
            chosen = {"device": "cpu", "random_state": seed, **settings(name, label)}
            return estimator_class(key, task)(**chosen)

        return Method(make)

    return {m.name: maker(key, m.name) for key, m in METHODS.items() if task in m.tasks}


# Tells what ABNN's network brings from what its noise and its members bring.
NORM = "MAP-norm"


def map_with_norm(task: Task) -> Method:
    """MAP on the network that ABNN takes: with layer normalisation."""

    def make(name: str, seed: int) -> Any:
        module = peers.mlp_with_norm
        return estimator_class("map", task)(module=module, device="cpu", random_state=seed)

    return Method(make)


REGRESSION_PEERS = {
    NORM: map_with_norm("regression"),
    "ridge": Method(lambda name, seed: peers.Ridge(), "scikit-learn"),
    "gp-sklearn": Method(lambda name, seed: peers.SklearnGP(seed), "scikit-learn"),
    "quantile-gb": Method(lambda name, seed: peers.QuantileBoosting(seed), "scikit-learn"),
    "ngboost": Method(lambda name, seed: peers.NGBoost(seed), "ngboost"),
    "laplace-torch": Method(lambda name, seed: peers.LaplaceRegressor(seed), "laplace-torch"),
    "vbll-package": Method(
        lambda name, seed: peers.PackageVBLL(device="cpu", random_state=seed), "vbll"
    ),
    "ivon-opt": Method(
        lambda name, seed: peers.PackageIVON(device="cpu", random_state=seed), "ivon-opt"
    ),
}
CLASS_PEERS = {
    NORM: map_with_norm("classification"),
    "logistic": Method(lambda name, seed: peers.logistic_regression(), "scikit-learn"),
    "gb-isotonic": Method(lambda name, seed: peers.boosting_isotonic(seed), "scikit-learn"),
    "random-forest": Method(lambda name, seed: peers.random_forest(seed), "scikit-learn"),
    "laplace-torch": Method(
        lambda name, seed: peers.LaplaceClassifier(
            estimator_class("map", "classification")(device="cpu", random_state=seed)
        ),
        "laplace-torch",
    ),
}

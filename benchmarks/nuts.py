"""Five methods on subsets of UCI regression: NUTS, a Gaussian process, MAP, PartialBNN, MaskedBNN.

All on the same rows of the first ``SPLITS`` splits of yacht, boston, energy and concrete, the
training rows cut to ``N_TRAIN`` and the test rows to ``N_TEST`` so that four chains take seconds.
"NUTS" and "MAP" have the same network and prior. "NUTS, narrow prior" is a wider network whose
weights have the scale 0.3: a posterior that chains explore in full, which fits less well. Of the
others networks and settings are the defaults, but for the smaller batches of PartialBNN. Settings
were chosen on training rows.

Where chains disagree ("rhat" of the worst prediction above 1.05), "NUTS" is a mixture of what four
chains found, no exact posterior. On energy and yacht the targets have next to no noise: the
posterior is a thin curved sheet, with steps of a thousandth of the prior's scale, and on yacht it
has several modes of like density, whichever start, mass matrix and length of the trajectories.

"rmse_near" leaves out rows that are ``FAR`` training standard deviations off in a feature. Boston
has one in the third split, 18 off, where networks extrapolate to hundreds, and say so by their
standard deviation. Data is read from ``UQ_DATA`` or ``../shared/data``. Rows are kept as they
come, in ``nuts.partial.jsonl``. Times are CPU seconds of this process, compiling included.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data import DATA
from benchmarks.measure import mean_rows
from uq import (
    GPRegressor,
    MAPRegressor,
    MaskedBNNRegressor,
    NUTSRegressor,
    PartialBNNRegressor,
)

PARTIAL = Path(__file__).parent / "results" / "nuts.partial.jsonl"
SETS = ("yacht", "boston", "energy", "concrete")
SPLITS, N_TRAIN, N_TEST, FAR = 5, 128, 100, 10
NETWORK: dict[str, Any] = {"hidden": (8,), "device": "cpu"}
SAMPLER: dict[str, Any] = {"n_warmup": 500, "n_draws": 300, "precision": "64-true"}
NARROW: dict[str, Any] = {
    "hidden": (20,),
    "prior_scale": 0.3,
    "n_warmup": 400,
    "n_draws": 200,
    "max_tree_depth": 9,
    "device": "cpu",
    "precision": "64-true",
}
# Batches as small as the paper's for 100 rows: with larger ones few particles are left.
PARTIAL_BNN: dict[str, Any] = {"batch_size": 20, "patience": 100, "device": "cpu"}
METHODS: dict[str, Callable[[int], Any]] = {
    "NUTS": lambda seed: NUTSRegressor(**NETWORK, **SAMPLER, random_state=seed),
    "NUTS, narrow prior": lambda seed: NUTSRegressor(**NARROW, random_state=seed),
    "GP": lambda seed: GPRegressor(random_state=seed, device="cpu"),
    "MAP": lambda seed: MAPRegressor(**NETWORK, patience=None, random_state=seed),
    "PartialBNN": lambda seed: PartialBNNRegressor(**PARTIAL_BNN, random_state=seed),
    "MaskedBNN": lambda seed: MaskedBNNRegressor(random_state=seed, device="cpu"),
}


def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(DATA / "uci_regression" / f"{name}.npz") as file:
        return file["X"], file["y"]


def subset(name: str, split: int) -> tuple[np.ndarray, ...]:
    """Training and test rows of a split, cut."""
    X, y = table(name)
    with np.load(DATA / "uci_regression" / f"{name}.npz") as file:
        train, test = file["train_idx"][split][:N_TRAIN], file["test_idx"][split][:N_TEST]
    return X[train], y[train], X[test], y[test]


def untested(name: str) -> np.ndarray:
    """Rows in the training part of all splits of the table, in the order of the first one."""
    with np.load(DATA / "uci_regression" / f"{name}.npz") as file:
        first, tested = file["train_idx"][0], [file["test_idx"][i] for i in range(SPLITS)]
    return first[~np.isin(first, np.concatenate(tested))]


def scored(
    model: Any, X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray
) -> dict[str, Any]:
    """Fit, and score on the test rows; of a sampler, whether it can be trusted."""
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is in the table
        model.fit(X, y)
    seconds = time.process_time() - start
    dist, target = model.predict_distribution(X_test), torch.tensor(y_test)
    square = (dist.mean - target).square()
    scale = np.where(X.std(0) > 0, X.std(0), 1)
    near = torch.tensor((np.abs((X_test - X.mean(0)) / scale) < FAR).all(1))
    found = {
        "nll": -float(dist.log_prob(target).mean()),
        "crps": float(dist.crps(target).mean()),
        "rmse": float(square.mean().sqrt()),
        "rmse_near": float(square[near].mean().sqrt()),
        "cpu_s": seconds,
    }
    if hasattr(model, "sample_stats_"):
        row = model.diagnostics(X_test).table.loc["prediction"]
        found["rhat"], found["ess"] = float(row["R-hat"]), float(row["ESS bulk"])
        found["ess_per_s"] = found["ess"] / seconds
        found["diverging"] = float(model.sample_stats_["diverging"].mean())
        if "reached_max_treedepth" in model.sample_stats_:
            found["cut_off"] = float(model.sample_stats_["reached_max_treedepth"].mean())
    elif isinstance(model, PartialBNNRegressor):
        # One cloud has no R-hat: effective share of the particles at each step, at the end.
        found["particle_ess"] = float(np.median(model.diagnostics_["ess"][-20:]))
    return found


def run() -> list[dict[str, Any]]:
    """Fit everything; means and standard errors over splits."""
    PARTIAL.parent.mkdir(exist_ok=True)
    rows = (
        [json.loads(line) for line in PARTIAL.read_text().splitlines()] if PARTIAL.exists() else []
    )
    rows = [r for r in rows if r["split"] < SPLITS]
    done = {(r["set"], r["split"], r["method"]) for r in rows}
    for split in range(SPLITS):
        for name in SETS:
            for method, make in METHODS.items():
                if (name, split, method) in done:
                    continue
                row = {"set": name, "method": method, "split": split}
                rows.append(row | scored(make(split), *subset(name, split)))
                with PARTIAL.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    order = {name: i for i, name in enumerate(SETS)}
    rows.sort(key=lambda r: order[r["set"]])
    found = mean_rows(rows, ["set", "method"], "split")
    PARTIAL.unlink()
    return found

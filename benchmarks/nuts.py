"""NUTS, the Gaussian process and MAP on subsets of UCI regression: what exact inference gains.

The first splits of yacht, boston, energy and concrete, the training rows cut to ``N_TRAIN`` and the
test rows to ``N_TEST`` so that four chains take seconds. MAP and NUTS have the same network and
prior. Data is read from ``UQ_DATA`` or ``../shared/data``. Rows are kept as they come, in
``nuts.partial.jsonl``.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.core import mean_rows
from uq import GPRegressor, MAPRegressor, NUTSRegressor

DATA = Path(os.environ.get("UQ_DATA", Path(__file__).parents[2] / "shared" / "data"))
PARTIAL = Path(__file__).parent / "results" / "nuts.partial.jsonl"
SETS = ("yacht", "boston", "energy", "concrete")
SPLITS, N_TRAIN, N_TEST = 3, 128, 100
NETWORK: dict[str, Any] = {"hidden": (8,), "device": "cpu"}
SAMPLER: dict[str, Any] = {
    "n_warmup": 300,
    "n_draws": 200,
    "max_tree_depth": 7,
    "precision": "64-true",
}
METHODS: dict[str, Any] = {
    "NUTS": lambda seed: NUTSRegressor(**NETWORK, **SAMPLER, random_state=seed),
    "GP": lambda seed: GPRegressor(random_state=seed, device="cpu"),
    "MAP": lambda seed: MAPRegressor(**NETWORK, patience=None, random_state=seed),
}


def one_fit(name: str, split: int, method: str) -> dict[str, Any]:
    with np.load(DATA / "uci_regression" / f"{name}.npz") as file:
        X, y = file["X"], file["y"]
        train, test = file["train_idx"][split][:N_TRAIN], file["test_idx"][split][:N_TEST]
    model = METHODS[method](split)
    start = time.process_time()
    model.fit(X[train], y[train])
    seconds = time.process_time() - start
    dist = model.predict_distribution(X[test])
    target = torch.tensor(y[test])
    row = {
        "set": name,
        "method": method,
        "split": split,
        "nll": -float(dist.log_prob(target).mean()),
        "crps": float(dist.crps(target).mean()),
        "rmse": float((dist.mean - target).square().mean().sqrt()),
        "cpu_s": seconds,
    }
    if method == "NUTS":
        stats = model.sample_stats_
        found = model.diagnostics(X[test])
        row["rhat"] = float(found.table.loc["prediction", "R-hat"])
        row["ess"] = float(found.table.loc["prediction", "ESS bulk"])
        row["ess_per_s"] = row["ess"] / seconds
        row["divergences"] = int(stats["diverging"].sum())
    return row


def run() -> list[dict[str, Any]]:
    """Fit everything; means and standard errors over splits."""
    PARTIAL.parent.mkdir(exist_ok=True)
    rows = (
        [json.loads(line) for line in PARTIAL.read_text().splitlines()] if PARTIAL.exists() else []
    )
    done = {(r["set"], r["split"], r["method"]) for r in rows}
    for name in SETS:
        for split in range(SPLITS):
            for method in METHODS:
                if (name, split, method) not in done:
                    rows.append(one_fit(name, split, method))
                    with PARTIAL.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    found = mean_rows(rows, ["set", "method"], "split")
    PARTIAL.unlink()
    return found

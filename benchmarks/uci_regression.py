"""UCI regression on the standard splits: ours, the reference packages on the same networks, and the
published per-split results of MC dropout.

The reference packages run inside our training loop: same network, rows, batches, steps, learning
rate schedule and held-out rows; only the head (``vbll``) or the optimizer (``ivon-opt``) is theirs.
Data is read from ``UQ_DATA`` or ``../shared/data``. The run is resumable: finished fits are kept in
``uci_regression.partial.jsonl`` beside the results until all are there.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.core import mean_rows
from uq import EnsembleRegressor, IVONRegressor, MAPRegressor, VBLLRegressor
from uq.distributions import NormalMixture
from uq.inference.posterior import NormalPosterior
from uq.inference.training import TrainingResult, cosine_schedule
from uq.models.base import NetworkObjective, Regressor, TrainingData
from uq.nn.network import Network

Row = dict[str, Any]
DATA = Path(os.environ.get("UQ_DATA", Path(__file__).parents[2] / "shared" / "data"))
PARTIAL = Path(__file__).parent / "results" / "uci_regression.partial.jsonl"
# Splits of each set; power has 9,568 rows.
SETS = {"boston": 7, "concrete": 7, "energy": 7, "wine_red": 7, "yacht": 7, "power": 5}
SETTINGS: dict[str, Any] = {"hidden": (50, 50), "batch_size": 64, "device": "cpu"}
N_STEPS = 10_000

# -- the reference packages inside our loop ------------------------------------------------------


class PackageHead(nn.Module):
    """``vbll.Regression`` as our training loop calls a head."""

    def __init__(self, n_features: int, n_outputs: int) -> None:
        import vbll

        super().__init__()
        self.head = vbll.Regression(n_features, n_outputs, 1.0, parameterization="dense")
        # Read by the estimator to place the sums of a closed form, which this head has not.
        self.register_buffer("prior_variance", torch.tensor(1.0))

    def loss(self, features: Tensor, y: Tensor, n_rows: float, weight: Any = None) -> Tensor:
        self.head.regularization_weight = 1 / n_rows
        loss: Tensor = self.head(features).train_loss_fn(y)
        return loss

    def predictive(self, features: Tensor, n_samples: int, generator: Any) -> NormalMixture:
        dist = self.head(features).predictive
        mean, scale = dist.mean.double(), dist.variance.double().sqrt()
        return NormalMixture(mean[None], scale[None])


class PackageVBLL(VBLLRegressor):
    """VBLL with the head of the ``vbll`` package."""

    def _head(self, n_features: int) -> Any:
        return PackageHead(n_features, len(self.y_mean_))


class PackageStep(torch.optim.Optimizer):
    """``ivon.IVON`` stepped by a closure."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        with self.optimizer.sampled_params(train=True):
            loss = closure()
        self.optimizer.step()
        return loss


class PackageIVON(IVONRegressor):
    """IVON with the optimizer of the ``ivon-opt`` package."""

    def _fit_member(
        self, network: Network, i: int, data: TrainingData
    ) -> tuple[NormalPosterior, TrainingResult]:
        import ivon

        n_steps = self._n_epochs(data) * len(data.batches)
        ess = data.n_effective
        decay = self.prior_scale**-2 / ess
        theirs = ivon.IVON(
            network.parameters(),
            self.lr,
            ess=ess,
            weight_decay=decay,
            beta2=max(0.998, 1 - 2 / n_steps),
            hess_init=1 / (ess * self.init_std**2) - decay,
        )
        schedule = cosine_schedule(n_steps)
        objective = NetworkObjective(network)
        result = self._train(objective, PackageStep(theirs), data, schedule=schedule)
        self.diagnostics_ = {}
        (group,) = theirs.param_groups
        flat = (ess * (group["hess"] + decay)).rsqrt()
        parts = flat.split([p.numel() for p in network.parameters()])
        stds = {
            name: part.view_as(p).clone()
            for (name, p), part in zip(network.named_parameters(), parts, strict=True)
        }
        return NormalPosterior(network, stds, data.seeds.predict), result


METHODS: dict[str, tuple[type[Regressor], dict[str, Any]]] = {
    "MAP": (MAPRegressor, {}),
    "ensemble": (EnsembleRegressor, {}),
    "IVON": (IVONRegressor, {}),
    "ivon-opt": (PackageIVON, {}),
    "VBLL": (VBLLRegressor, {}),
    "vbll package": (PackageVBLL, {}),
}
PEERS = {"IVON": "ivon-opt", "VBLL": "vbll package"}

# -- fits ----------------------------------------------------------------------------------------


def split(name: str, i: int) -> tuple[np.ndarray, ...]:
    """Rows to train on and to test on: X, y, X_test, y_test."""
    with np.load(DATA / "uci_regression" / f"{name}.npz") as file:
        X, y = file["X"], file["y"]
        train, test = file["train_idx"][i], file["test_idx"][i]
    return X[train], y[train], X[test], y[test]


def one_fit(name: str, i: int, method: str) -> Row:
    """Scores of one method on the test rows of one split, in target units."""
    X, y, X_test, y_test = split(name, i)
    cls, own = METHODS[method]
    epochs = max(20, math.ceil(N_STEPS / math.ceil(len(X) / SETTINGS["batch_size"])))
    model = cls(**{**SETTINGS, "max_epochs": epochs, "random_state": i, **own})
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers
        model.fit(X, y)
    fitted = time.perf_counter()
    dist = cast(NormalMixture, model.predict_distribution(X_test))
    mean = dist.mean.numpy()
    predicted = time.perf_counter()
    lower, upper = (t.numpy() for t in dist.interval(0.9))
    target = torch.as_tensor(y_test)
    return {
        "set": name,
        "split": i,
        "method": method,
        "nll": -float(dist.log_prob(target).mean()),
        "rmse": float(np.sqrt(np.mean((mean - y_test) ** 2))),
        "crps": float(dist.crps(target).mean()),
        "coverage_90": float(np.mean((lower <= y_test) & (y_test <= upper))),
        "fit_seconds": fitted - start,
        "predict_seconds": predicted - fitted,
    }


def fits() -> Iterator[Row]:
    """All fits, split by split, so that an early stop leaves complete splits."""
    done = {}
    if PARTIAL.exists():
        rows = map(json.loads, PARTIAL.read_text().splitlines())
        done = {(r["set"], r["split"], r["method"]): r for r in rows}
    with PARTIAL.open("a") as file:
        for i in range(max(SETS.values())):
            for name in (s for s, n in SETS.items() if i < n):
                for method in METHODS:
                    row = done.get((name, i, method))
                    if row is None:
                        row = one_fit(name, i, method)
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                    yield row


def published() -> list[Row]:
    """MC dropout, one hidden layer of 50 units, tuned by grid search: its authors' own results."""
    table = pd.read_csv(DATA / "uci_regression" / "reference_mc_dropout.csv")
    return [
        {"set": r.dataset, "split": r.split, "method": "MC dropout", "nll": -r.loglik_mc}
        | {"rmse": r.rmse_mc}
        for r in table.itertuples()
        if r.dataset in SETS and r.split < SETS[r.dataset]
    ]


# -- tables --------------------------------------------------------------------------------------


def standard_error(values: pd.Series) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def against(table: pd.DataFrame, pairs: dict[str, str]) -> list[Row]:
    """NLL and RMSE of a method less those of another on the same splits."""
    rows = []
    for ours, theirs in pairs.items():
        for name in table["set"].unique():
            of_set = table[table["set"] == name].set_index("split")
            a, b = (of_set[of_set["method"] == m] for m in (ours, theirs))
            row: Row = {"part": "difference", "set": name, "method": ours, "less": theirs}
            for score in ("nll", "rmse"):
                difference = (a[score] - b[score]).dropna()
                row |= {
                    score: round(float(difference.mean()), 4),
                    f"{score}_se": round(standard_error(difference), 4),
                    f"{score}_won": f"{int((difference < 0).sum())}/{len(difference)}",
                }
            row["splits"] = len(difference)
            rows.append(row)
    return rows


def run() -> list[Row]:
    """Fit everything; means, differences, and the fits themselves."""
    per_split = [*fits(), *published()]
    table = pd.DataFrame(per_split)
    ours = [m for m in METHODS if m not in PEERS.values()]
    rows = [
        *(
            {"part": "mean over splits", **row}
            for row in mean_rows(per_split, ["set", "method"], over="split")
        ),
        *against(table, PEERS),
        *(row for m in ours for row in against(table, {m: "MC dropout"})),
        *({"part": "split", **row} for row in per_split),
    ]
    PARTIAL.unlink(missing_ok=True)
    return rows

"""Speed of the core, each as a ratio against a peer measured in the same run.

Alternating repeats (A B A B …); the ratio is the median of the pairwise ratios, and its spread is
their range, so that a machine whose speed drifts changes both sides alike.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyro.infer import Predictive
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from benchmarks.measure import REPEATS, paired, row
from uq import IVONClassifier, MAPClassifier, calibration
from uq.distributions import CategoricalMixture, NormalMixture
from uq.nn import NormalPrior

EPOCHS = 60


def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return X[:1280], y[:1280]


def fit_seconds(make: Callable[[], Any]) -> Callable[[], float]:
    """Microseconds per training step of an estimator, fixed costs of fit included."""
    X, y = digits()

    def measure() -> float:
        start = time.perf_counter()
        model = make().fit(X, y)
        seconds = time.perf_counter() - start
        return 1e6 * seconds / (model.n_epochs_ * 10)

    return measure


SETTINGS: dict[str, Any] = {
    "max_epochs": EPOCHS,
    "batch_size": 128,
    "patience": None,
    "random_state": 0,
    "device": "cpu",
}


def hand_written() -> float:
    """Microseconds per step of a plain loop: same network, batches, loss and fused Adam."""
    X, y = digits()
    X = (X - X.mean(0)) / np.where(X.std(0) > 0, X.std(0), 1)
    start = time.perf_counter()
    x, t = torch.tensor(X, dtype=torch.float32), torch.tensor(y)
    net = nn.Sequential(nn.Linear(64, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3, fused=True)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x))
        for rows in order.split(128):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[rows]), t[rows])
            loss.backward()
            optimizer.step()
    return 1e6 * (time.perf_counter() - start) / (EPOCHS * 10)


def import_seconds(code: str) -> Callable[[], float]:
    def measure() -> float:
        script = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
        out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        return float(out.stdout)

    return measure


def benchmark_import() -> list[dict[str, Any]]:
    base = import_seconds("import torch, pyro")
    rows = []
    for name, code in (
        ("import uq, beside torch and pyro", "import torch, pyro; import uq"),
        ("import uq and an estimator", "import torch, pyro; from uq import IVONClassifier"),
    ):
        measured = paired(import_seconds(code), base)
        extra = measured["ours"] - measured["peer"]
        if "beside" in name:
            rows.append(row(name, "s", "adds <= 0.3 s", extra <= 0.3, measured))
        else:
            rows.append(row(name, "s", "(scikit-learn included)", True, measured))
    return rows


def benchmark_training() -> list[dict[str, Any]]:
    ours = fit_seconds(lambda: MAPClassifier(**SETTINGS))
    mapped = paired(ours, hand_written)
    ivon = paired(fit_seconds(lambda: IVONClassifier(**SETTINGS)), ours)
    return [
        row(
            "MAPClassifier step / hand-written loop", "us", "<= 1.3", mapped["ratio"] <= 1.3, mapped
        ),
        row("IVONClassifier step / MAPClassifier step", "us", "<= 1.5", ivon["ratio"] <= 1.5, ivon),
    ]


def benchmark_prediction() -> list[dict[str, Any]]:
    X, y = digits()
    model = IVONClassifier(**SETTINGS | {"max_epochs": 5}).fit(X, y)
    posterior = model.posterior_
    x = torch.tensor((X - model.x_mean_) / model.x_scale_, dtype=torch.float32)
    pyro_model, guide = posterior.to_pyro(NormalPrior(model.prior_scale))
    predictive = Predictive(pyro_model, guide=guide, num_samples=64, return_sites=("y",))

    def seconds(f: Callable[[], Any]) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            with torch.no_grad():
                f()
            return time.perf_counter() - start

        return measure

    def compare(part: torch.Tensor) -> dict[str, Any]:
        measured = paired(seconds(lambda: predictive(part)), seconds(lambda: posterior(part, 64)))
        # Turned round: the ratio says how many times faster uq is.
        measured["ours"], measured["peer"] = measured["peer"], measured["ours"]
        return measured

    rows = []
    for n in (1, 100, 1280):
        measured = compare(x[:n])
        name = f"64 draws, {n} rows: Pyro Predictive / uq"
        rows.append(row(name, "s", ">= 5 (higher is better)", measured["ratio"] >= 5, measured))
    return rows


def benchmark_report() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    n, s = 5000, 100
    loc = torch.randn(s, n, generator=g, dtype=torch.float64)
    regression = NormalMixture(loc, 0.5 + torch.rand(s, n, generator=g, dtype=torch.float64))
    classes = CategoricalMixture(2 * torch.randn(s, n, 10, generator=g))
    y = regression.sample(generator=g).numpy()
    labels = classes.sample(generator=g).numpy()
    rows = []
    for name, dist, target in (("regression", regression, y), ("10 classes", classes, labels)):
        times = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            calibration.report(dist, target).to_html()
            times.append(time.perf_counter() - start)
        median = statistics.median(times[1:])
        measured = {"ours": median, "first_call": times[0]}
        label = f"report, 5,000 rows, 100 draws, {name}"
        rows.append(row(label, "s", "< 1 s", median < 1, measured))
    return rows


def run() -> list[dict[str, Any]]:
    """Measure everything of the suite."""
    return [
        *benchmark_import(),
        *benchmark_training(),
        *benchmark_prediction(),
        *benchmark_report(),
    ]

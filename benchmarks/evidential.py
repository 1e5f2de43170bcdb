"""Evidential learning: speed of a training step, and stand-ins for the papers' results over seeds.

A step under each loss against cross entropy, on the same network; scikit-learn's digits with two
classes left out as OOD; the cubic toy of deep evidential regression; Fashion-MNIST (10,000 images)
against the softmax of the same ConvNet, with MNIST, USPS and noise as OOD. Data is read from
``UQ_DATA`` or ``../shared/data``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from benchmarks.data import DATA
from benchmarks.measure import mean_rows, paired, row
from uq import ETPClassifier, EvidentialClassifier, EvidentialRegressor, MAPClassifier
from uq.calibration import (
    EvidenceScaling,
    TemperatureScaling,
    auroc,
    expected_calibration_error,
    fpr_at_tpr,
    ood_score,
)
from uq.models.etp import ETPObjective
from uq.nn import ConvNet, DirichletHead, ETPHead, variational

Row = dict[str, Any]
SEEDS = range(3)
N_TRAIN, EPOCHS = 10_000, 6
BATCH = 64

# -- speed ---------------------------------------------------------------------------------------


def stepper(n_classes: int, loss: str | None) -> Callable[[], float]:
    """Seconds of CPU time of a training step of a 64-64-64-64 network; cross entropy for None.

    That of "etp" draws the weights of all layers, and reads and writes the memory.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(64, n_classes))
    x, y = torch.randn(BATCH, 64), torch.randint(n_classes, (BATCH,))
    head = DirichletHead(n_classes, loss) if loss not in (None, "etp") else None
    process = None
    if loss == "etp":
        process = ETPObjective(variational(net), ETPHead(n_classes), 1000.0, 1e-3)
    optimizer = torch.optim.Adam((process or net).parameters(), 1e-3, fused=True)

    def measure() -> float:
        n = 200 if n_classes < 100 else 50
        # CPU time: other programs on the machine stay out of the numbers.
        start = time.process_time()
        for _ in range(n):
            optimizer.zero_grad()
            if process is not None:
                mean = process(x, y)
            else:
                out = net(x)
                mean = head.loss(out, y, 0.5).mean() if head else F.cross_entropy(out, y)
            mean.backward()
            optimizer.step()
        return (time.process_time() - start) / n

    return measure


def benchmark_speed() -> list[Row]:
    rows = []
    for n_classes, limit in ((10, 1.3), (1000, 1.6)):
        for loss in ("edl", "iedl", "edl_ce", "edl_nll", "redl", "etp"):
            measured = paired(stepper(n_classes, loss), stepper(n_classes, None), repeats=9)
            name = f"step, K = {n_classes}, {loss} / cross entropy"
            target = f"<= {limit}" if loss in ("edl", "iedl") else ""
            met = not target or measured["ratio"] <= limit
            rows.append({"part": "speed", **row(name, "s", target, met, measured)})
    return rows


# -- digits and the cubic toy --------------------------------------------------------------------


def averaged(part: str, rows: list[Row], keys: list[str]) -> list[Row]:
    """Means over seeds, with standard errors."""
    return [{"part": part, **r} for r in mean_rows(rows, keys, over="seed")]


def scores(dist: Any, y: np.ndarray) -> Row:
    labels = torch.as_tensor(np.searchsorted(dist.classes, y))
    return {
        "accuracy": float((dist.mode == labels).double().mean()),
        "nll": -float(dist.log_prob(labels).mean()),
        "ece": float(expected_calibration_error(y, dist)),
    }


def ood_row(familiar: Any, new: Any) -> tuple[float, float]:
    kind: Any = "vacuity" if hasattr(familiar, "vacuity") else "entropy"
    pair = ood_score(familiar, kind), ood_score(new, kind)
    return float(auroc(*pair)), float(fpr_at_tpr(*pair))


def benchmark_digits() -> list[Row]:
    X, y = load_digits(return_X_y=True)
    known = y < 8
    rows = []
    for seed in SEEDS:
        X_fit, X_test, y_fit, y_test = train_test_split(
            X[known] / 16, y[known], test_size=0.3, random_state=seed, stratify=y[known]
        )
        shared: Any = {
            "hidden": (64, 64, 64),
            "max_epochs": 40,
            "lr": 1e-3,
            "patience": None,
            "random_state": seed,
        }
        models: dict[str, Any] = {"softmax": MAPClassifier(**shared)} | {
            loss: EvidentialClassifier(loss=loss, **shared)
            for loss in ("edl", "iedl", "edl_ce", "edl_nll", "redl")
        }
        # What the pieces of ETP do: memory, weight of its prior, divergence of the weights in full.
        models |= {
            "etp": ETPClassifier(**shared),
            "etp, memory forgotten": ETPClassifier(memory_decay=0.0, **shared),
            "etp, dirichlet_kl_weight 0.1": ETPClassifier(dirichlet_kl_weight=0.1, **shared),
            "etp, layer_kl_weight 1": ETPClassifier(layer_kl_weight=1.0, **shared),
            "edl_ce, dirichlet_kl_weight 0.001": EvidentialClassifier(
                loss="edl_ce", dirichlet_kl_weight=1e-3, evidence="exp", **shared
            ),
        }
        half = len(X_test) // 2
        for name, model in models.items():
            model.fit(X_fit, y_fit)
            dist = model.predict_distribution(X_test)
            new = model.predict_distribution(X[~known] / 16)
            area, _ = ood_row(dist, new)
            # Scaling the evidence of ETP, which has no prior in common, changes no probability.
            by_evidence = isinstance(model, EvidentialClassifier)
            scaling: Any = EvidenceScaling() if by_evidence else TemperatureScaling()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mended = scaling.fit(dist[:half], y_test[:half]).transform(dist[half:])
            after = scores(mended, y_test[half:])
            extra = {"ece_scaled": after["ece"], "nll_scaled": after["nll"], "auroc_8_9": area}
            if name != "softmax":  # medians: without much of a divergence a few rows go far up
                extra["strength"] = float(dist.concentration.sum(-1).median())
                extra["strength_8_9"] = float(new.concentration.sum(-1).median())
            rows.append({"method": name, "seed": seed, **scores(dist, y_test), **extra})
    softmax = averaged("digits", [r for r in rows if r["method"] == "softmax"], ["method"])
    return softmax + averaged("digits", [r for r in rows if r["method"] != "softmax"], ["method"])


def benchmark_cubic() -> list[Row]:
    """y = x³ + N(0, 3²): the Student-t's scale is the noise, the aleatoric part is not."""
    rows = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        x = rng.uniform(-4, 4, (1000, 1))
        y = x[:, 0] ** 3 + rng.normal(0, 3, 1000)
        model = EvidentialRegressor(
            hidden=(64, 64), max_epochs=300, batch_size=100, lr=2.5e-3, patience=None,
            random_state=seed,
        ).fit(x, y)  # fmt: skip
        grid = np.linspace(-3.5, 3.5, 200)[:, None]
        dist: Any = model.predict_distribution(grid)
        far: Any = model.predict_distribution(np.array([[-6.0], [6.0]]))
        rows.append(
            {
                "method": "NIG, y = x³ + N(0, 3²)",
                "seed": seed,
                "rmse": float((dist.mean - torch.as_tensor(grid[:, 0]) ** 3).square().mean())
                ** 0.5,
                "scale": float(dist.base.scale.mean()),
                "aleatoric_std": float(dist.aleatoric.sqrt().mean()),
                "epistemic_std": float(dist.epistemic.sqrt().mean()),
                "epistemic_std_at_-6": float(far.epistemic[0].sqrt()),
                "epistemic_std_at_6": float(far.epistemic[1].sqrt()),
            }
        )
    return averaged("cubic", rows, ["method"])


# -- Fashion-MNIST -------------------------------------------------------------------------------


def images() -> dict[str, np.ndarray]:
    """Fashion-MNIST to fit and to test on; MNIST, USPS (if there) and noise as OOD; in [0, 1]."""
    folder = DATA / "images"
    with np.load(folder / "fashion_mnist.npz") as file:
        found = {k: file[k] for k in ("X_train", "y_train", "X_test", "y_test")}
    with np.load(folder / "mnist.npz") as file:
        ood = {"MNIST": file["X_test"][:5000] / 255}
    for name in ("X_train", "X_test"):
        found[name] = found[name] / 255
    if (folder / "usps_test.npz").exists():
        with np.load(folder / "usps_test.npz") as file:
            small = torch.as_tensor((file["X_milli"] / 1000.0 + 1) / 2)[:, None]
        ood["USPS"] = F.interpolate(small, (28, 28), mode="bilinear")[:, 0].numpy()
    ood["noise"] = np.random.default_rng(0).uniform(size=(5000, 28, 28))
    found |= ood
    return {k: v.astype(np.float32) if v.ndim > 1 else v for k, v in found.items()}


def conv(shape: Any, d_out: int) -> nn.Module:
    return ConvNet(shape, d_out)


def benchmark_fashion() -> list[Row]:
    data = images()
    rows = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        fit = rng.permutation(len(data["X_train"]))[:N_TRAIN]
        shared: Any = {
            "module": conv,
            "max_epochs": EPOCHS,
            "lr": 1e-3,
            "patience": None,
            "device": "cpu",
            "random_state": seed,
        }
        models: dict[str, Any] = {
            "softmax": MAPClassifier(**shared),
            "EDL": EvidentialClassifier(loss="edl", **shared),
            "I-EDL": EvidentialClassifier(loss="iedl", **shared),
        }
        order = rng.permutation(len(data["X_test"]))
        held, test = order[:2000], order[2000:]
        for name, model in models.items():
            start = time.process_time()
            model.fit(data["X_train"][fit], data["y_train"][fit])
            seconds = time.process_time() - start
            dist = model.predict_distribution(data["X_test"][test])
            before = model.predict_distribution(data["X_test"][held])
            scaling: Any = TemperatureScaling() if name == "softmax" else EvidenceScaling()
            mended = scaling.fit(before, data["y_test"][held]).transform(dist)
            after = scores(mended, data["y_test"][test])
            found = scores(dist, data["y_test"][test])
            found |= {"nll_scaled": after["nll"], "ece_scaled": after["ece"]}
            for ood in ("MNIST", "USPS", "noise"):
                if ood in data:
                    pair = ood_row(dist, model.predict_distribution(data[ood]))
                    found[f"auroc_{ood}"], found[f"fpr95_{ood}"] = pair
            rows.append({"method": name, "seed": seed, **found, "fit_seconds": seconds})
    return averaged("fashion", rows, ["method"])


def run() -> list[Row]:
    """Measure everything of the suite."""
    return [*benchmark_speed(), *benchmark_digits(), *benchmark_cubic(), *benchmark_fashion()]

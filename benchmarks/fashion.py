"""Fashion-MNIST with 10,000 training images and a small ConvNet without batch normalisation.

Accuracy, log score and calibration on the official test images, and how well MNIST digits are told
from them by the entropy of the prediction: IVON and VBLL against AdamW, over seeds. All train the
same network for the same epochs; post-hoc VBLL takes the AdamW network and finds a new last layer.
Data is read from ``UQ_DATA`` or ``../shared/data``.
"""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.core import mean_rows
from benchmarks.uci_regression import DATA
from uq import EnsembleClassifier, IVONClassifier, MAPClassifier, VBLLClassifier
from uq.calibration import (
    auroc,
    debiased_calibration_error,
    expected_calibration_error,
    ood_score,
)
from uq.nn import ConvNet

Row = dict[str, Any]
SEEDS = range(3)
N_TRAIN, N_OOD, EPOCHS = 10_000, 2000, 5


def images() -> tuple[np.ndarray, ...]:
    """Fashion-MNIST to train and to test on, MNIST as OOD; pixels of mean 0 and deviation 1."""
    with np.load(DATA / "images" / "fashion_mnist.npz") as file:
        X, y = file["X_train"], file["y_train"]
        X_test, y_test = file["X_test"], file["y_test"]
    with np.load(DATA / "images" / "mnist.npz") as file:
        ood = file["X_test"][:N_OOD]
    X, X_test, ood = ((a.astype(np.float32) / 255 - 0.286) / 0.353 for a in (X, X_test, ood))
    return X, y, X_test, y_test, ood


def conv(shape: Any, d_out: int) -> nn.Module:
    return ConvNet(shape, d_out)


class Features(nn.Module):
    """A trained ConvNet without its last layer."""

    def __init__(self, network: ConvNet) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.network.head = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.network(x)
        return features


def models(seed: int) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "module": conv,
        "max_epochs": EPOCHS,
        "batch_size": 64,
        "patience": None,
        "device": "cpu",
        "random_state": seed,
    }
    return {
        "AdamW (MAP)": MAPClassifier(**shared, lr=1e-3),
        "IVON": IVONClassifier(**shared, n_samples=16),
        "VBLL": VBLLClassifier(**shared, hidden=(64,), lr=1e-3),
        "ensemble of 5": EnsembleClassifier(**shared, lr=1e-3),
    }


def judged(model: Any, data: tuple[np.ndarray, ...], fit_seconds: float) -> Row:
    _, _, X_test, y_test, ood = data
    start = time.perf_counter()
    dist = model.predict_distribution(X_test)
    seconds = time.perf_counter() - start
    labels = torch.as_tensor(y_test.astype(np.int64))
    familiar, new = ood_score(dist), ood_score(model.predict_distribution(ood))
    return {
        "accuracy": float((dist.probs.argmax(-1) == labels).double().mean()),
        "nll": -float(dist.log_prob(labels).mean()),
        "ece": float(expected_calibration_error(y_test, dist)),
        "ece_debiased": float(debiased_calibration_error(y_test, dist)),
        "auroc_mnist": float(auroc(familiar, new)),
        "fit_seconds": fit_seconds,
        "predict_seconds": seconds,
    }


def one_seed(seed: int, data: tuple[np.ndarray, ...]) -> list[Row]:
    X, y, *_ = data
    rows = np.random.default_rng(seed).permutation(len(X))[:N_TRAIN]
    found = []
    fitted: dict[str, Any] = {}
    for name, model in models(seed).items():
        start = time.perf_counter()
        fitted[name] = model.fit(X[rows], y[rows])
        row = judged(model, data, time.perf_counter() - start)
        found.append({"method": name, "seed": seed, **row})
    body = Features(fitted["AdamW (MAP)"].posterior_.network.body)
    for head in ("generative", "discriminative"):
        start = time.perf_counter()
        model = VBLLClassifier(
            module=body,
            features="frozen",
            head=head,
            covariance="diagonal",
            max_epochs=EPOCHS,
            patience=None,
            random_state=seed,
        ).fit(X[rows], y[rows])
        row = judged(model, data, time.perf_counter() - start)
        found.append({"method": f"VBLL post-hoc, {head}", "seed": seed, **row})
    return found


def run() -> list[Row]:
    """Scores of each method: mean and standard error over seeds."""
    data = images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [row for seed in SEEDS for row in one_seed(seed, data)]
    return mean_rows(rows, ["method"], over="seed")

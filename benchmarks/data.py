"""Benchmark data, read from the folder ``UQ_DATA`` or ``../shared/data``.

UCI tables come with their standard splits; image sets with what is strange to them. Nothing here
learns from rows: whoever standardises takes training rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import rotate, zoom

DATA = Path(os.environ.get("UQ_DATA", Path(__file__).parents[2] / "shared" / "data"))
STANDARD, FOLDS = "uci_regression", "uci_regression_10fold"
N_TEST, N_STRANGE = 2000, 1000
ANGLES = (15, 30, 45, 60)


@dataclass(frozen=True)
class Split:
    """Rows to train on and to test on."""

    X: np.ndarray
    y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    strange: dict[str, np.ndarray] = field(default_factory=dict)
    """Inputs of other origin, by name."""
    shifted: dict[str, np.ndarray] = field(default_factory=dict)
    """The test inputs under a shift, by name; labels are those of the first rows of ``y_test``."""


def regression_split(name: str, split: int) -> Split:
    """Split of a UCI regression table: 20 standard ones, or 10 folds for the other tables."""
    if (DATA / STANDARD / f"{name}.npz").exists():
        with np.load(DATA / STANDARD / f"{name}.npz") as file:
            X, y = file["X"], file["y"]
            train, test = file["train_idx"][split], file["test_idx"][split]
    else:
        with np.load(DATA / FOLDS / f"{name}.npz") as file:
            X, y, fold = file["X"], file["y"], file["test_fold"]
        train, test = np.flatnonzero(fold != split), np.flatnonzero(fold == split)
    return Split(X[train], y[train], X[test], y[test])


def class_split(name: str, fold: int) -> Split:
    """One of the 10 folds of a UCI classification table; categories become columns of 0 and 1."""
    with np.load(DATA / "uci_classification" / f"{name}.npz") as file:
        X, y, is_test = file["X"], file["y"], file["test_fold"] == fold
        categorical = file["is_categorical"] if "is_categorical" in file else np.zeros(X.shape[1])
    table = pd.DataFrame(X)
    coded = [c for c, is_category in zip(table, categorical, strict=True) if is_category]
    X = pd.get_dummies(table, columns=coded, dtype=float).to_numpy() if coded else X
    return Split(X[~is_test], y[~is_test], X[is_test], y[is_test])


def published_mc_dropout(name: str, split: int) -> dict[str, float]:
    """NLL and RMSE of MC dropout on a standard split, as its authors published them."""
    table = pd.read_csv(DATA / STANDARD / "reference_mc_dropout.csv").set_index(
        ["dataset", "split"]
    )
    loglik, rmse = table.loc[(name, split), ["loglik_mc", "rmse_mc"]].to_numpy(float)
    return {"nll": -float(loglik), "rmse": float(rmse)}


def image_split(name: str, seed: int) -> Split:
    """Images of mean 0 and deviation 1; the seed draws training rows."""
    return (
        _cifar(seed) if name == "cifar10_2k" else _fashion(seed, 10_000 if "10k" in name else None)
    )


def _pictures(
    scaled: Callable[[np.ndarray], np.ndarray],
    X: np.ndarray,
    y: np.ndarray,
    X_test: np.ndarray,
    y_test: np.ndarray,
    strange: dict[str, np.ndarray],
    turned: dict[str, np.ndarray],
) -> Split:
    strange, turned = ({k: scaled(v) for k, v in part.items()} for part in (strange, turned))
    return Split(scaled(X), y, scaled(X_test), y_test, strange, turned)


def _fashion(seed: int, n_train: int | None) -> Split:
    def scaled(pixels: np.ndarray) -> np.ndarray:
        return (pixels.astype(np.float32) / 255 - 0.286) / 0.353

    with np.load(DATA / "images" / "fashion_mnist.npz") as file:
        X, y = file["X_train"], file["y_train"].astype(np.int64)
        X_test, y_test = file["X_test"][:N_TEST], file["y_test"][:N_TEST].astype(np.int64)
    with np.load(DATA / "images" / "mnist.npz") as file:
        mnist = file["X_test"][:N_STRANGE]
    with np.load(DATA / "images" / "usps_test.npz") as file:
        usps = (file["X_milli"][:N_STRANGE] / 1000 + 1) / 2 * 255
    strange = {
        "MNIST": mnist,
        "USPS": zoom(usps, (1, 28 / 16, 28 / 16), order=1),
        "noise": np.random.default_rng(0).uniform(0, 255, (N_STRANGE, 28, 28)),
    }
    few = X_test[:N_STRANGE]
    turned = {f"{a}°": rotate(few, a, axes=(2, 1), reshape=False, order=1) for a in ANGLES}
    rows = np.random.default_rng(seed).permutation(len(X))[:n_train]
    return _pictures(scaled, X[rows], y[rows], X_test, y_test, strange, turned)


def _cifar(seed: int) -> Split:
    mean = np.array([0.4914, 0.4822, 0.4465])[:, None, None]
    std = np.array([0.2470, 0.2435, 0.2616])[:, None, None]

    def scaled(pixels: np.ndarray) -> np.ndarray:
        return ((pixels / 255 - mean) / std).astype(np.float32)

    with np.load(DATA / "images" / "cifar10_subset.npz") as file:
        X, y = file["X_train"], file["y_train"].astype(np.int64)
        X_test, y_test = file["X_test"], file["y_test"].astype(np.int64)
    with np.load(DATA / "images" / "cifar100_test_subset.npz") as file:
        strange = {"CIFAR-100": file["X_test"]}
    strange["noise"] = np.random.default_rng(0).uniform(0, 255, (N_STRANGE, 3, 32, 32))
    turned = {f"{a}°": rotate(X_test, a, axes=(3, 2), reshape=False, order=1) for a in ANGLES}
    rows = np.random.default_rng(seed).permutation(len(X))
    return _pictures(scaled, X[rows], y[rows], X_test, y_test, strange, turned)

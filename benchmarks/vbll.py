"""Speed of VBLL: heads against the ``vbll`` package, fits against a linear head, streaming."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
import vbll
from torch import Tensor, nn

from benchmarks.measure import paired, row
from uq import MAPClassifier, MAPRegressor, VBLLClassifier, VBLLRegressor
from uq.inference import post_train
from uq.nn import ConvNet, VBLLClassification, VBLLRegression

# The sizes that the target names.
WIDTH, OUTPUTS, ROWS = 256, 10, 512
STREAM_ROWS, STREAM_BATCH = 1_000_000, 10_000


def seconds(f: Callable[[], Any]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    return measure


def faster(name: str, ours: Callable[[], Any], peer: Callable[[], Any]) -> dict[str, Any]:
    measured = paired(seconds(peer), seconds(ours), repeats=3)
    # Turned round: the ratio says how many times faster uq is.
    measured["ours"], measured["peer"] = measured["peer"], measured["ours"]
    return row(name, "s", ">= 10 (higher is better)", measured["ratio"] >= 10, measured)


def benchmark_heads() -> list[dict[str, Any]]:
    """Forward and backward of the dense heads, gradients to the features included."""
    torch.manual_seed(0)
    features = torch.randn(ROWS, WIDTH, requires_grad=True)
    labels = torch.randint(OUTPUTS, (ROWS,))
    targets = torch.randn(ROWS, OUTPUTS)
    weight, size = 1e-4, f"D = {WIDTH}, K = {OUTPUTS}, B = {ROWS}"
    classes = VBLLClassification(WIDTH, OUTPUTS)
    their_classes = vbll.DiscClassification(WIDTH, OUTPUTS, weight, parameterization="dense")
    reals = VBLLRegression(WIDTH, OUTPUTS)
    their_reals = vbll.Regression(WIDTH, OUTPUTS, weight, parameterization="dense")
    return [
        faster(
            f"dense classification head, {size}: vbll / uq",
            lambda: classes.loss(features, labels, 1 / weight).backward(),
            lambda: their_classes(features).train_loss_fn(labels).backward(),
        ),
        faster(
            f"dense regression head, {size}: vbll / uq",
            lambda: reals.loss(features, targets, 1 / weight).backward(),
            lambda: their_reals(features).train_loss_fn(targets).backward(),
        ),
    ]


def benchmark_fits() -> list[dict[str, Any]]:
    """A fit of a VBLL estimator against MAP: the same network with a plain linear head."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "max_epochs": 4,
        "batch_size": 128,
        "patience": None,
        "random_state": 0,
        "device": "cpu",
    }
    table, images = torch.randn(2560, 64), torch.randn(1024, 28, 28)
    wide: dict[str, Any] = {"hidden": (1024, 1024, 64)}
    small: dict[str, Any] = {"hidden": (64, 64)}

    def conv(shape: Any, d_out: int) -> nn.Module:
        return ConvNet(shape, d_out)

    image: dict[str, Any] = {"module": conv, "hidden": (64,)}
    cases: list[tuple[str, Tensor, bool, dict[str, Any], str]] = [
        ("64-1024-1024-64, regression, dense", table, False, wide, "dense"),
        ("64-1024-1024-64, 10 classes, dense", table, True, wide, "dense"),
        ("64-1024-1024-64, 10 classes, diagonal", table, True, wide, "diagonal"),
        ("ConvNet 28 × 28, D = 64, 10 classes, dense", images, True, image, "dense"),
        ("64-64-64, regression, dense", table, False, small, "dense"),
        ("64-64-64, 10 classes, dense", table, True, small, "dense"),
        ("64-64-64, 10 classes, diagonal", table, True, small, "diagonal"),
    ]
    rows = []
    for name, X, classify, network, covariance in cases:
        y = torch.arange(len(X)) % 10 if classify else X.reshape(len(X), -1)[:, 0]
        ours: Any = VBLLClassifier if classify else VBLLRegressor
        peer: Any = MAPClassifier if classify else MAPRegressor
        measured = paired(
            seconds(lambda: ours(covariance=covariance, **network, **settings).fit(X, y)),  # noqa: B023
            seconds(lambda: peer(**network, **settings).fit(X, y)),  # noqa: B023
            repeats=5,
        )
        label = f"fit, {name}: VBLL / MAP"
        rows.append(row(label, "s", "<= 1.2", measured["ratio"] <= 1.2, measured))
    return rows


def benchmark_stream() -> list[dict[str, Any]]:
    """Closed-form post-training on features that are made batch by batch."""
    head = VBLLRegression(WIDTH)
    first = torch.randn(STREAM_BATCH, WIDTH)
    signal = torch.randn(WIDTH, 1) / WIDTH**0.5

    def batches() -> Any:
        for i in range(STREAM_ROWS // STREAM_BATCH):
            features = first.roll(i, 1)
            yield features, features @ signal

    post_train(nn.Identity(), head, [(first, first @ signal)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    post_train(nn.Identity(), head, batches())
    took = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [
        row("closed form of 1 M × 256 streamed features", "s", "< 30", took < 30, {"ours": took}),
        row(
            "memory that the stream adds (1 M × 256 is 1,000 MB)",
            "MB",
            "< 100",
            grown < 100,
            {"ours": grown},
        ),
    ]


def run() -> list[dict[str, Any]]:
    """Measure everything of the suite."""
    return [*benchmark_heads(), *benchmark_fits(), *benchmark_stream()]

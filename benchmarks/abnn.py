"""ABNN: cost of a noise draw, the digits stand-in of its paper's claims, and Fashion-MNIST.

The last two give the mean over seeds with its standard error. What to expect: accuracy and log
score of the network that it was made from, and an epistemic score that knows strange inputs.
Fashion-MNIST is read from ``UQ_DATA`` or ``../shared/data``; its part is left out without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from benchmarks.data import DATA
from benchmarks.measure import mean_rows, paired, row
from uq import ABNNClassifier, MAPClassifier
from uq.calibration import auroc, expected_calibration_error, fpr_at_tpr
from uq.inference import ABNNPosterior, to_abnn
from uq.inference.abnn import tuned_names
from uq.nn import CategoricalLikelihood, ConvNet, Network

Row = dict[str, Any]
Arrays = dict[str, np.ndarray]

# -- speed -----------------------------------------------------------------------------------------

MEMBERS, DRAWS = 4, 10


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Networks to predict with, and the shape of their rows."""

    def conv(norm: Callable[[int], nn.Module]) -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in ((3, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), norm(b), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def mlp() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in ((64, 256), (256, 256)):
            layers += [nn.Linear(a, b), nn.LayerNorm(b), nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(256, 10))

    return {
        "3 convolutions, BatchNorm2d": (conv(nn.BatchNorm2d), (3, 32, 32)),
        "3 convolutions, GroupNorm": (conv(lambda c: nn.GroupNorm(4, c)), (3, 32, 32)),
        "64-256-256-10, LayerNorm": (mlp(), (64,)),
    }


def posterior_of(net: nn.Module, noise_shape: Any = "channel") -> ABNNPosterior:
    network = Network(to_abnn(net, noise_shape=noise_shape), CategoricalLikelihood(10))
    every = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    names = tuned_names(network, "norm")
    members = {name: torch.stack([every[name].detach()] * MEMBERS) for name in names}
    return ABNNPosterior(network, members).eval()


def seconds(f: Callable[[], Any], per: int = 1) -> Callable[[], float]:
    """Processor time of a call: others on the machine count less."""

    def measure() -> float:
        start = time.process_time()
        with torch.no_grad():
            f()
        return (time.process_time() - start) / per

    return measure


def benchmark_speed() -> list[Row]:
    """A draw of a whole prediction (noise, members, memory bound and all) against a plain pass."""
    torch.manual_seed(0)
    rows = []
    for name, (net, shape) in networks().items():
        net.eval()
        posterior = posterior_of(net)
        for n in (1, 16, 64, 256):
            x = torch.randn(n, *shape)
            times = max(1, 64 // n)

            def plain(x: torch.Tensor = x, net: nn.Module = net, times: int = times) -> None:
                for _ in range(times):
                    net(x)

            draws = MEMBERS * DRAWS
            measured = paired(
                seconds(lambda: posterior._by_channel(x, draws), draws),  # noqa: B023
                seconds(plain, times),
                repeats=9,
            )
            label = f"channel noise, a draw of {draws}, {n} rows, {name}: ABNN / plain forward"
            rows.append(row(label, "s", "<= 1.15", measured["ratio"] <= 1.15, measured))
    return rows


# -- digits: classes 0 to 7 to learn, 8 and 9 to find ---------------------------------------------

SEEDS = range(5)


def small_net() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b, pool in ((1, 16, False), (16, 32, True), (32, 32, False)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8))


def trained_small_net(x: torch.Tensor, y: torch.Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20])
    for _ in range(30):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    return net.eval()


def digits_parts(seed: int) -> tuple[Arrays, Arrays]:
    """Training half of the familiar classes; test half and the strange classes."""
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    familiar = np.flatnonzero(y < 8)
    order = np.random.default_rng(seed).permutation(familiar)
    half = len(order) // 2
    train, test = order[:half], order[half:]
    return {"X": X[train], "y": y[train]}, {"X": X[test], "y": y[test], "ood": X[y >= 8]}


def scores(dist: Any, y: np.ndarray) -> Row:
    labels = torch.as_tensor(y.astype(np.int64))
    return {
        "accuracy": float((dist.probs.argmax(-1) == labels).double().mean()),
        "nll": -float(dist.log_prob(labels).mean()),
        "ece": float(expected_calibration_error(y, dist)),
    }


def digits_rows(seed: int) -> list[Row]:
    """The network itself, ABNN before and after fine-tuning for several α and shapes."""
    train, test = digits_parts(seed)
    net = trained_small_net(torch.tensor(train["X"]), torch.tensor(train["y"]), seed)
    tuned: Row = {"include_original": False, "n_samples": 3, "batch_statistics": "updated"}
    untuned: Row = {"n_members": 0, "n_samples": 9}
    plain: Row = {"alpha": 0.0, "n_members": 0, "n_samples": 2}
    settings: dict[str, Row] = {"network": plain}
    for noise_shape in ("element", "channel"):
        for alpha in (0.01, 0.1, 0.3):
            noise = {"alpha": alpha, "noise_shape": noise_shape}
            settings[f"untuned, {noise_shape} {alpha}"] = untuned | noise
            settings[f"tuned, {noise_shape} {alpha}"] = tuned | noise
    settings["untuned, channel 1.0"] = untuned | {"alpha": 1.0}
    found = []
    for name, chosen in settings.items():
        model = ABNNClassifier(module=net, random_state=seed, **chosen)
        model.fit(train["X"], train["y"])
        inside, outside = (model.predict_distribution(test[k]) for k in ("X", "ood"))
        scored: Row = {"model": name, "seed": seed, **scores(inside, test["y"])}
        scored["auroc_entropy"] = auroc(inside.entropy(), outside.entropy())
        if model.alpha:  # without noise, one network has no epistemic part
            scored["auroc_mi"] = auroc(inside.epistemic, outside.epistemic)
            scored["mi_in"] = float(inside.epistemic.mean())
            scored["mi_out"] = float(outside.epistemic.mean())
        found.append(scored)
    return found


def benchmark_digits() -> list[Row]:
    rows = [r for seed in SEEDS for r in digits_rows(seed)]
    return [{"part": "digits", **r} for r in mean_rows(rows, ["model"], over="seed")]


# -- Fashion-MNIST ---------------------------------------------------------------------------------

N_TRAIN, N_TEST, N_OOD, EPOCHS = 10_000, 5_000, 1_000, 5
FASHION_SEEDS = range(3)


def images() -> Arrays:
    """Pixels of mean 0 and deviation 1 on Fashion-MNIST; strange images by name."""
    with np.load(DATA / "images" / "fashion_mnist.npz") as file:
        X, y = file["X_train"], file["y_train"].astype(np.int64)
        X_test, y_test = file["X_test"][:N_TEST], file["y_test"][:N_TEST].astype(np.int64)
    strange: Arrays = {}
    with np.load(DATA / "images" / "mnist.npz") as file:
        strange["mnist"] = file["X_test"][:N_OOD]
    if (DATA / "images" / "usps_test.npz").exists():
        with np.load(DATA / "images" / "usps_test.npz") as file:
            usps = torch.tensor((file["X_milli"] / 1000 + 1) / 2 * 255, dtype=torch.float32)
        strange["usps"] = F.interpolate(usps[:N_OOD, None], (28, 28), mode="bilinear")[:, 0].numpy()
    strange["noise"] = np.random.default_rng(0).uniform(0, 255, size=(N_OOD, 28, 28))
    every = {"X": X, "X_test": X_test, **strange}
    scaled = {k: ((v.astype(np.float32) / 255) - 0.286) / 0.353 for k, v in every.items()}
    return scaled | {"y": y, "y_test": y_test}


def judged(model: Any, data: Arrays) -> Row:
    """Scores on test images; strange images by entropy, and by mutual information if there is."""
    start = time.perf_counter()
    inside = model.predict_distribution(data["X_test"])
    found = scores(inside, data["y_test"]) | {"predict_s": time.perf_counter() - start}
    for name in ("mnist", "usps", "noise"):
        if name in data:
            outside = model.predict_distribution(data[name])
            pairs = {"entropy": (inside.entropy(), outside.entropy())}
            if inside.n_draws > 1:
                pairs["mi"] = inside.epistemic, outside.epistemic
            for kind, pair in pairs.items():
                found[f"auroc_{name}_{kind}"] = auroc(*pair)
                found[f"fpr95_{name}_{kind}"] = fpr_at_tpr(*pair)
    return found


def fashion_rows(seed: int, data: Arrays) -> list[Row]:
    order = np.random.default_rng(seed).permutation(len(data["X"]))[:N_TRAIN]
    X, y = data["X"][order], data["y"][order]
    start = time.perf_counter()
    base = MAPClassifier(
        module=lambda shape, d_out: ConvNet(shape, d_out),
        max_epochs=EPOCHS,
        batch_size=64,
        patience=None,
        lr=1e-3,
        random_state=seed,
        device="cpu",
    ).fit(X, y)
    took = time.perf_counter() - start
    found = [{"method": "softmax", "seed": seed, **judged(base, data), "fit_s": took}]
    network = base.posterior_.network.body
    shared: Row = {"module": network, "n_samples": 3, "random_state": seed, "device": "cpu"}
    for name, chosen in {
        "ABNN": {},
        "ABNN, untuned, 12 draws": {"n_members": 0, "n_samples": 12},
    }.items():
        start = time.perf_counter()
        model = ABNNClassifier(**shared | chosen).fit(X, y)
        took = time.perf_counter() - start
        found.append({"method": name, "seed": seed, **judged(model, data), "fit_s": took})
    return found


def fashion() -> list[Row]:
    """ABNN against softmax of the same trained ConvNet (GroupNorm): mean and standard error."""
    if not (DATA / "images").is_dir():
        return []
    data = images()
    rows = [r for seed in FASHION_SEEDS for r in fashion_rows(seed, data)]
    return [{"part": "fashion", **r} for r in mean_rows(rows, ["method"], over="seed")]


def run() -> list[Row]:
    """Measure everything of the suite."""
    speed = [{"part": "speed", **r} for r in benchmark_speed()]
    return [*speed, *benchmark_digits(), *fashion()]

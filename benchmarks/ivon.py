"""IVON: speed and memory of a step against AdamW and ``ivon-opt``, and small stand-ins for the
paper's results (mean over seeds, with standard errors).

``ivon-opt`` is GPL: it is installed by ``pip install '.[bench]'`` to be measured, and nothing of uq
uses it.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.measure import paired, row
from uq import IVONRegressor
from uq.inference import IVON
from uq.inference.training import cosine_schedule
from uq.nn import CategoricalLikelihood, Network

SEEDS = range(5)
Step = Callable[[], Any]

# -- speed and memory ----------------------------------------------------------------------------


def large_mlp() -> nn.Sequential:
    """784-1750-1750-1750-1750-10: 10.6 M parameters."""
    torch.manual_seed(0)
    widths = [784, 1750, 1750, 1750, 1750]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1750, 10))


def step_of(name: str) -> Step:
    """A whole training step: forward, backward, sample, update; batch of 128."""
    net = large_mlp()
    x, y = torch.randn(128, 784), torch.randint(0, 10, (128,))

    def closure() -> Tensor:
        net.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss.detach()

    if name == "none":
        # The first optimizer of a process imports parts of torch, of which the peak is not ours.
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        return closure
    if name in ("foreach", "fused"):
        adamw = torch.optim.AdamW(net.parameters(), 1e-4, **{name: True})
        return lambda: (closure(), adamw.step())
    if name == "uq":
        ours = IVON(net.parameters(), 0.1, ess=60_000, beta2=0.999)
        return lambda: ours.step(closure)
    import ivon

    theirs = ivon.IVON(net.parameters(), lr=0.1, ess=60_000, beta2=0.999)

    def step() -> None:
        with theirs.sampled_params(train=True):
            closure()
        theirs.step()

    return step


def seconds(step: Step) -> Callable[[], float]:
    """Processor time of a step, which runs on one thread: others on the machine count less."""

    def measure() -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    return measure


_PEAK = """
import sys, torch
from benchmarks.ivon import step_of
torch.set_num_threads(1)
step = step_of(sys.argv[1])
for _ in range(3):
    step()
# Not getrusage: its maximum starts at that of the parent process.
(peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(1024 * int(peak.split()[1]))
"""


def peak_bytes(name: str) -> float:
    command = [sys.executable, "-c", _PEAK, name]
    return float(subprocess.run(command, capture_output=True, check=True).stdout)


def benchmark_step() -> list[dict[str, Any]]:
    ours = seconds(step_of("uq"))
    adamw, fused = (
        paired(ours, seconds(step_of(name)), repeats=15) for name in ("foreach", "fused")
    )
    theirs = paired(ours, seconds(step_of("ivon-opt")), repeats=9)
    size = 4 * sum(p.numel() for p in large_mlp().parameters())
    bare = peak_bytes("none")
    memory = {
        "ours": (peak_bytes("uq") - bare) / size,
        "peer": (peak_bytes("foreach") - bare) / size,
    }
    memory["ratio"] = memory["ours"] / memory["peer"]
    return [
        row("10.6 M MLP, step / AdamW foreach", "s", "<= 1.5", adamw["ratio"] <= 1.5, adamw),
        row("10.6 M MLP, step / AdamW fused", "s", "<= 1.5", fused["ratio"] <= 1.5, fused),
        row("10.6 M MLP, step / ivon-opt", "s", "<= 0.5", theirs["ratio"] <= 0.5, theirs),
        row(
            "10.6 M MLP, peak memory beside weights, gradients and activations; peer AdamW",
            "P",
            "<= 3 and the pages of code",
            memory["ours"] <= 3.25,
            memory,
        ),
    ]


# -- stand-ins for the paper's results -----------------------------------------------------------


def digits_split(seed: int, n_train: int, flipped: float) -> tuple[Tensor, ...]:
    """Train and clean test rows of digits; a share of training labels is drawn at random."""
    rng = np.random.default_rng(seed)
    X, y = load_digits(return_X_y=True)
    order = rng.permutation(len(X))
    train, test = order[:n_train], order[n_train:]
    labels = y[train].copy()
    wrong = rng.random(n_train) < flipped
    labels[wrong] = rng.integers(0, 10, wrong.sum())
    as_x = [torch.tensor(X[rows] / 16, dtype=torch.float32) for rows in (train, test)]
    noise = torch.tensor(rng.random((500, 64)), dtype=torch.float32)
    return as_x[0], torch.tensor(labels), as_x[1], torch.tensor(y[test]), noise


def fit_digits(
    name: str, seed: int, x: Tensor, y: Tensor, epochs: int, **settings: float
) -> tuple[nn.Sequential, Optimizer]:
    """Train the 64-128-128-10 MLP, batch 50, cosine rate per step."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer: Optimizer
    if name == "ivon":
        chosen = {"weight_decay": 1e-4, "beta2": 0.9995} | settings
        optimizer = IVON(net.parameters(), 0.2, ess=len(x), **chosen)  # type: ignore[arg-type]
    elif name == "adamw":
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    else:
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    rate = optimizer.param_groups[0]["lr"]
    per_epoch = math.ceil(len(x) / 50)
    factor = cosine_schedule(epochs * per_epoch)
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.param_groups[0]["lr"] = rate * factor(step)
            step += 1

            def closure(rows: Tensor = rows) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x[rows]), y[rows])
                loss.backward()
                return loss.detach()

            optimizer.step(closure)  # type: ignore[arg-type]
    return net, optimizer


def scores(probs: Tensor, noise_probs: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, NLL, and AUROC of noise images by the largest probability."""
    confidence = torch.cat([probs.amax(-1), noise_probs.amax(-1)])
    is_noise = np.repeat([0, 1], [len(probs), len(noise_probs)])
    nll = -probs.clamp(min=1e-30).log()[torch.arange(len(y)), y].mean()
    return {
        "accuracy": float((probs.argmax(-1) == y).double().mean()),
        "nll": float(nll),
        "auroc": float(roc_auc_score(is_noise, -confidence.numpy())),
    }


def digits_scores(
    seed: int, *, n_train: int, flipped: float, epochs: int, **settings: float
) -> dict[str, dict[str, float]]:
    """Scores of AdamW, SGD, IVON at its mean, and IVON with 1, 8, 32 and 64 draws."""
    x, y, x_test, y_test, noise = digits_split(seed, n_train, flipped)
    found = {}
    for name in ("adamw", "sgd", "ivon"):
        net, optimizer = fit_digits(name, seed, x, y, epochs, **settings)
        with torch.no_grad():
            probs, noise_probs = (net(t).softmax(-1).double() for t in (x_test, noise))
        found["ivon@mean" if name == "ivon" else name] = scores(probs, noise_probs, y_test)
    assert isinstance(optimizer, IVON)
    posterior = optimizer.posterior(Network(net, CategoricalLikelihood(10)), seed)
    for n in (1, 8, 32, 64):
        sampled = (posterior(t, n).probs for t in (x_test, noise))  # type: ignore[attr-defined]
        found[f"ivon x {n}"] = scores(*sampled, y_test)
    return found


def noisy_digits(seed: int, **settings: float) -> dict[str, dict[str, float]]:
    """S1: 300 rows, one label in ten random, 200 epochs."""
    chosen = {"hess_init": 0.7} | settings
    return digits_scores(seed, n_train=300, flipped=0.1, epochs=200, **chosen)


def clean_digits(seed: int) -> dict[str, dict[str, float]]:
    """S2: half of the rows, 60 epochs."""
    return digits_scores(seed, n_train=898, flipped=0.0, epochs=60, hess_init=0.7, beta2=0.998)


def gap(seed: int) -> dict[str, float]:
    """S4: epistemic standard deviation in a gap and away from the data, relative to on the data."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.uniform(-2, -1, 100), rng.uniform(1, 2, 100)])[:, None]
    y = np.sin(2 * x[:, 0]) + 0.1 * rng.normal(size=200)
    model = IVONRegressor(random_state=seed, max_epochs=400).fit(x, y)

    def deviation(low: float, high: float) -> float:
        grid = np.linspace(low, high, 50)[:, None]
        return float(model.predict_distribution(grid).epistemic.sqrt().mean())

    on_data = 0.5 * (deviation(-2, -1) + deviation(1, 2))
    return {
        "gap": deviation(-0.5, 0.5) / on_data,
        "beside": deviation(4, 5) / on_data,
        "far": deviation(20, 25) / on_data,
    }


def summary(name: str, values: list[float]) -> dict[str, Any]:
    array = np.array(values)
    error = array.std(ddof=1) / math.sqrt(len(array))
    return {
        "benchmark": name,
        "mean": round(float(array.mean()), 4),
        "standard_error": round(float(error), 4),
        "seeds": len(array),
        "each": [float(f"{v:.4g}") for v in values],
    }


def benchmark_standins() -> list[dict[str, Any]]:
    rows = []
    for label, experiment in (("S1 noisy digits", noisy_digits), ("S2 clean digits", clean_digits)):
        runs = [experiment(seed) for seed in SEEDS]
        rows += [
            summary(f"{label}, {metric}, {method}", [run[method][metric] for run in runs])
            for method in runs[0]
            for metric in ("accuracy", "nll", "auroc")
        ]
    runs_of_gap = [gap(seed) for seed in SEEDS]
    rows += [
        summary(
            f"S4 epistemic deviation over that on data, {place}", [r[place] for r in runs_of_gap]
        )
        for place in ("gap", "beside", "far")
    ]
    return rows


def run() -> list[dict[str, Any]]:
    """Measure everything of the suite."""
    return [*benchmark_step(), *benchmark_standins()]

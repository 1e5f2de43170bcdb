"""SSVI: speed and size against dense mean-field inference, stand-in of the paper's table."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import paired, row
from uq import SSVIClassifier
from uq.inference import SSVI, SparsePosterior
from uq.nn import CategoricalLikelihood, Network
from uq.nn.ssvi import sparse_kl, sparsify
from uq.nn.ssvi_compact import compact

WIDTHS = (784, 1024, 1024, 10)
ROWS, DRAWS = 256, 20
SEEDS = range(4)


def seconds(f: Callable[[], Any]) -> Callable[[], float]:
    """CPU seconds of a call: others on the machine do not count."""

    def measure() -> float:
        start = time.process_time()
        f()
        return time.process_time() - start

    return measure


def body() -> nn.Sequential:
    torch.manual_seed(0)
    a, b, c, d = WIDTHS
    return nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d))


# -- a training step -----------------------------------------------------------------------------


class DenseMeanField(nn.Module):
    """Dense mean-field layer with local reparameterisation, as one writes it by hand."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(layer.in_features)
        self.loc = nn.Parameter(layer.weight.detach().clone())
        std = 0.1 * self.scale
        self.raw = nn.Parameter(torch.full_like(self.loc, math.log(math.expm1(std))))
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        self.std = F.softplus(self.raw)
        mean = F.linear(x, self.loc, self.bias)
        variance = F.linear(x.square(), self.std.square())
        return mean + (variance + 1e-10).sqrt() * torch.randn_like(mean)

    def kl(self) -> Tensor:
        squares = (self.std.square() + self.loc.square()).sum() / (2 * self.scale**2)
        return squares - self.std.log().sum() + self.loc.numel() * (math.log(self.scale) - 0.5)


def step_of(net: nn.Module, kl: Callable[[], Tensor], optimizer: Any) -> Callable[[], float]:
    """CPU seconds of a training step, the mean of a few."""
    x, y = torch.randn(ROWS, WIDTHS[0]), torch.randint(WIDTHS[-1], (ROWS,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y) + kl() / 60_000
        loss.backward()
        return loss

    def steps() -> None:
        for _ in range(20):
            optimizer.step(closure)

    measure = seconds(steps)
    return lambda: measure() / 20


def sparse_step(density: float) -> Callable[[], float]:
    net = sparsify(body(), density)
    base = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    # One exchange in each measurement: as often as the estimators ever do.
    optimizer = SSVI(net, base, n_steps=10**9, update_every=20)
    return step_of(net, lambda: sparse_kl(net), optimizer)


def dense_step() -> Callable[[], float]:
    layers = [DenseMeanField(m) if isinstance(m, nn.Linear) else m for m in body()]
    net = nn.Sequential(*layers)
    heads = [m for m in layers if isinstance(m, DenseMeanField)]
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    return step_of(net, lambda: torch.stack([m.kl() for m in heads]).sum(), optimizer)


def benchmark_steps() -> list[dict[str, Any]]:
    rows = []
    for density, limit in ((0.03, 1.0), (0.1, 1.0), (1.0, math.inf)):
        measured = paired(sparse_step(density), dense_step(), repeats=3)
        name = f"step at density {density:g} / dense mean-field step by hand, batch {ROWS}"
        met = measured["ratio"] <= limit
        target = "(for comparison)" if math.isinf(limit) else f"<= {limit:g}"
        rows.append({"part": "speed", **row(name, "s", target, met, measured)})
    return rows


# -- prediction and size -------------------------------------------------------------------------


def posterior(density: float) -> SparsePosterior:
    network = sparsify(Network(body(), CategoricalLikelihood(WIDTHS[-1])), density)
    return SparsePosterior(cast(Network, compact(network)))


def benchmark_prediction() -> list[dict[str, Any]]:
    x = torch.randn(ROWS, WIDTHS[0])
    sparse, dense, plain = posterior(0.05), posterior(1.0).to_dense(), body().eval()
    cases: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = [
        ("one pass, dense torch layers / compressed rows", lambda: plain(x),
         lambda: sparse.network.body(x)),
        (f"{DRAWS} draws, dense posterior / sparse", lambda: dense(x, DRAWS),
         lambda: sparse(x, DRAWS)),
    ]  # fmt: skip
    rows = []
    with torch.no_grad():
        for name, peer, ours in cases:
            measured = paired(seconds(peer), seconds(ours), repeats=15)
            # Turned round: the ratio says how many times faster the sparse one is.
            measured["ours"], measured["peer"] = measured["peer"], measured["ours"]
            label = f"prediction at density 0.05, batch {ROWS}, {name}"
            met = measured["ratio"] >= 3
            rows.append(
                {"part": "speed", **row(label, "s", ">= 3 (higher is better)", met, measured)}
            )
    return rows


def benchmark_size() -> list[dict[str, Any]]:
    """Files of fitted estimators: of density 1, and of a plain network's float32 weights."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, WIDTHS[0])), np.arange(40) % WIDTHS[-1]
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for density in (0.05, 1.0):
            settings: dict[str, Any] = {"hidden": WIDTHS[1:-1], "max_epochs": 1, "random_state": 0}
            path = Path(folder) / f"{density}.uq"
            SSVIClassifier(density=density, **settings).fit(X, y).save(path)
            sizes[density] = path.stat().st_size / 2**20
    plain = 4 * sum(p.numel() for p in body().parameters()) / 2**20
    rows = []
    for name, peer, target in (
        ("dense mean-field file / file at density 0.05", sizes[1.0], 8.0),
        ("plain float32 weights, without uncertainty / file at density 0.05", plain, 0.0),
    ):
        ratio = peer / sizes[0.05]
        measured = {"ours": sizes[0.05], "peer": peer, "ratio": ratio}
        label = ">= 8 (higher is better)" if target else "(for comparison)"
        rows.append({"part": "speed", **row(name, "MB", label, ratio >= target, measured)})
    return rows


# -- stand-in ------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "static mask": {"replace": 0.0},
    "random removal": {"criterion": "random"},
    "SSVI, gradient before removal": {"grow_grad": "pre"},
    "SSVI, |μ|": {"criterion": "mean"},
    "SSVI": {},
}


def fit_digits(seed: int, **settings: Any) -> tuple[dict[str, float], float]:
    """Scores on the held-out half of digits, and the final size of σ as a share of the prior's."""
    X, y = load_digits(return_X_y=True)
    parts = train_test_split(X / 16, y, test_size=0.5, random_state=seed, stratify=y)
    train, test, labels, expected = parts
    model = SSVIClassifier(
        hidden=(128, 128),
        max_epochs=60,
        patience=None,
        batch_size=64,
        update_every=50,
        random_state=seed,
        device="cpu",
        **settings,
    ).fit(train, labels)
    scores = {}
    target = torch.tensor(expected)
    for name, dist in (
        ("draws", cast(Any, model.predict_distribution(test))),
        ("mean", cast(Any, model.predict_distribution_at_mean(test))),
    ):
        scores[f"nll_{name}"] = -float(dist.log_prob(target).mean())
        scores[f"accuracy_{name}"] = float((dist.probs.argmax(1) == target).double().mean())
    return scores, model.sparsity_


def benchmark_table() -> list[dict[str, Any]]:
    """Density against variant on digits, the weights of MLP 64-128-128-10, mean and SE of seeds."""
    results: dict[tuple[float, str], dict[str, np.ndarray]] = {}
    sparsity = {}
    for density in (1.0, 0.1, 0.03):
        variants = {"dense": {}} if density == 1 else VARIANTS
        for name, changes in variants.items():
            runs = [fit_digits(seed, density=density, **changes) for seed in SEEDS]
            results[density, name] = {
                k: np.array([scores[k] for scores, _ in runs]) for k in runs[0][0]
            }
            sparsity[density, name] = runs[0][1]
    rows: list[dict[str, Any]] = []
    dense = results[1.0, "dense"]
    limits = {0.1: (0.9, 0.02), 0.03: (0.8, 0.04)}
    for (density, name), scores in results.items():
        line: dict[str, Any] = {
            "part": "digits", "density": density, "variant": name,
            "sparsity": round(sparsity[density, name], 3),
        }  # fmt: skip
        for key, values in scores.items():
            line[key] = round(float(values.mean()), 4)
            line[f"{key}_se"] = round(float(values.std(ddof=1) / math.sqrt(len(values))), 4)
            line[f"{key}_each"] = [float(f"{v:.4g}") for v in values]
        if name == "SSVI":
            ratio_limit, drop_limit = limits[density]
            static = results[density, "static mask"]
            ratio = float(scores["nll_mean"].mean() / static["nll_mean"].mean())
            drop = float((dense["accuracy_mean"] - scores["accuracy_mean"]).mean())
            line["nll_over_static"], line["accuracy_drop"] = round(ratio, 3), round(drop, 4)
            line["target"] = f"<= {ratio_limit:g} of static, drop <= {drop_limit:g}"
            line["met"] = ratio <= ratio_limit and drop <= drop_limit
        rows.append(line)
    return rows


def run() -> list[dict[str, Any]]:
    """Measure everything of the suite."""
    return [
        *benchmark_steps(),
        *benchmark_prediction(),
        *benchmark_size(),
        *benchmark_table(),
    ]

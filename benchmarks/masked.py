"""Masked Bayesian networks: speed, the cubic run, widths of a known truth, defaults, UCI subsets.

The ``nuts`` suite has them beside other methods, on the rows of the table here: the training rows
of each split cut to ``N_TRAIN``, the test rows to ``N_TEST``. "choice" is what the defaults
``prior_scale`` and ``n_leapfrog`` are chosen by: fits to some of the rows that no split of the
tables tests on, judged on others of these rows. Data is read from ``UQ_DATA`` or
``../shared/data``. Rows are kept as they come, in ``masked.partial.jsonl``. Times are CPU seconds
of this process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import mean_rows, paired, row
from benchmarks.nuts import N_TEST, N_TRAIN, SAMPLER, SETS, scored, subset, table, untested
from tests.models.test_masked_bnn import ranks
from uq import MaskedBNNRegressor, NUTSRegressor
from uq.inference import (
    MaskedBNN,
    MaskedMoves,
    MaskedState,
    WidthPrior,
    width_penalty,
)
from uq.inference.masked_bnn_runs import sample_masked
from uq.nn.masked_bnn import MaskedMLP, relu_mlp

Row = dict[str, Any]
PARTIAL = Path(__file__).parent / "results" / "masked.partial.jsonl"
SEEDS = SPLITS = 3
WIDE: Row = {"hidden": (50, 50), "device": "cpu"}
SHORT: Row = {"n_warmup": 400, "n_draws": 80}

# -- the cubic run -------------------------------------------------------------------------------


def cubic(seed: int, n_chains: int = 1) -> tuple[MaskedBNN, MaskedState, Any]:
    """20 rows of x³ + N(0, 9), two layers of 100 nodes and 10 spare ones, Cauchy(0, 0.3)."""
    g = torch.Generator().manual_seed(seed)
    x = 8 * torch.rand(20, 1, generator=g) - 4
    y = x**3 + 3 * torch.randn(20, 1, generator=g)
    shift, scale = y.mean(), y.std()
    network = MaskedMLP((1, 110, 110, 1))
    penalty = width_penalty(0.1, 20)
    prior = WidthPrior(network.groups, [penalty, penalty], [1, 1])
    model = MaskedBNN(network, x / 4, (y - shift) / scale, prior, prior_scale=0.3)
    bodies = [relu_mlp((1, 100, 100, 1)) for _ in range(n_chains)]
    like = torch.empty(n_chains, network.n_weights)
    weights, masks = network.embedded(bodies, model.draw_prior(like, g))
    variance = torch.full((n_chains, 1), 0.1, dtype=torch.float64)
    return model, MaskedState(weights, masks, variance), (g, shift, scale)


def cubic_run(seed: int, masked: bool, n_chains: int = 1, n: int = 1000) -> Row:
    torch.manual_seed(seed)
    model, state, (g, shift, scale) = cubic(seed, n_chains)
    moves = MaskedMoves(n_leapfrog=30, n_mask_moves=2 if masked else 0)
    start = time.process_time()
    run = sample_masked(
        model,
        state,
        moves=moves,
        n_warmup=n // 2,
        n_draws=n // 10,
        thin=5,
        target_accept=0.7,
        generator=g,
    )
    seconds = time.process_time() - start
    grid = torch.linspace(-4, 4, 200)[:, None]
    total = torch.zeros(200, 1)
    n_draws = n // 10
    for i in range(n_draws):
        parts = {k: t[0, i] for k, t in run.parameters.items()}
        h = grid / 4
        for layer in (0, 2, 4):
            h = h @ parts[f"{layer}.weight"].T + parts[f"{layer}.bias"]
            h = h.relu() if layer < 4 else h
        total += h / n_draws
    error = total * scale + shift - grid**3
    return {
        "part": "cubic",
        "method": "masked" if masked else "all nodes",
        "seed": seed,
        "cpu_s": seconds,
        "rmse": float(error.square().mean().sqrt()),
        "width_1": float(run.widths[..., 0].mean()),
        "width_2": float(run.widths[..., 1].mean()),
        "hmc_acceptance": float(run.sample_stats["acceptance_rate"].mean()),
        "mask_acceptance": float(run.sample_stats["mask_acceptance_rate"].mean()),
    }


def speed() -> list[Row]:
    """8 chains against one; effective samples per second against NUTS."""

    def seconds(n_chains: int) -> Callable[[], float]:
        return lambda: float(cubic_run(0, True, n_chains, 200)["cpu_s"])

    chains = paired(seconds(8), seconds(1), 3)
    X, y, X_test, _ = subset("boston", 0)

    def per_second(make: Callable[[], Any]) -> Callable[[], float]:
        def measure() -> float:
            start = time.process_time()
            model = make().fit(X, y)
            spent = time.process_time() - start
            table = model.diagnostics(X_test).table
            return float(table.loc["prediction", "ESS bulk"]) / spent

        return measure

    def network(d_in: int, d_out: int) -> Any:
        return relu_mlp((d_in, 8, d_out))

    scaled: Row = {"device": "cpu", "prior_scale": 1.0, "random_state": 0}
    ours = per_second(
        lambda: MaskedBNNRegressor(
            **scaled, hidden=(8,), prior="normal", n_mask_moves=0, n_warmup=300, n_draws=200
        )
    )
    nuts = per_second(lambda: NUTSRegressor(**scaled, **SAMPLER, module=network))
    ess = paired(ours, nuts, 1)
    return [
        {"part": "speed"}
        | row("cubic, 200 transitions: 8 chains / 1", "s", "<= 3", chains["ratio"] <= 3, chains),
        {"part": "speed"}
        | row("ESS of the worst prediction / s, all nodes on: HMC / NUTS", "1/s", "-", None, ess),
    ]


# -- a known truth -------------------------------------------------------------------------------


def known_width(strength: float, seed: int = 0) -> Row:
    """Posterior width where three ReLU nodes made the data."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(500, 3))
    nodes = np.maximum(X @ rng.normal(size=(3, 3)) + 0.5 * rng.normal(size=3), 0)
    y = nodes @ np.array([1.5, -1.0, 1.0]) + 0.1 * rng.normal(size=500)
    model = MaskedBNNRegressor(
        hidden=(30,), width_penalty=strength, device="cpu", random_state=seed, **SHORT
    ).fit(X, y)
    counts = np.bincount(model.widths_.ravel())
    return {
        "part": "three nodes",
        "width_penalty": strength,
        "mode": int(counts.argmax()),
        "mean": float(f"{model.widths_.mean():.3g}"),
        "noise_scale": float(
            f"{np.sqrt(np.mean(model.predict_distribution(X[:1]).aleatoric.numpy())):.3g}"
        ),
    }


# -- UCI -----------------------------------------------------------------------------------------

METHODS: dict[str, Row] = {"masked": {}, "all nodes": {"n_mask_moves": 0}}
CHOICE = [{"prior_scale": s, "n_leapfrog": n} for s in (0.1, 0.3, 1.0) for n in (20, 50)]


def one_fit(name: str, split: int, method: str) -> Row:
    X, y, X_test, y_test = subset(name, split)
    model = MaskedBNNRegressor(**WIDE, **SHORT, **METHODS[method], random_state=split)
    found = {"part": "uci", "set": name, "method": method, "split": split}
    found |= scored(model, X, y, X_test, y_test)
    found["width_1"], found["width_2"] = model.widths_.mean((0, 1)).tolist()
    return found


def choice(name: str, settings: Row) -> Row:
    """Score of settings on rows that no table tests on."""
    rows = untested(name)
    X, y = table(name)
    n = min(N_TRAIN, len(rows) // 2)
    train, held_out = rows[:n], rows[n:][:N_TEST]
    model = MaskedBNNRegressor(**WIDE, **SHORT, **settings, random_state=0)
    found = {"part": "choice", "set": name, **settings}
    return found | scored(model, X[train], y[train], X[held_out], y[held_out])


def calibration_ranks() -> list[Row]:
    """Ranks of simulation-based calibration in 5 classes of 80 expected counts."""
    rows = []
    for name, sizes in (("linear, conjugate given noise", (2, 1)), ("3 nodes", (1, 3, 1))):
        network = MaskedMLP(sizes)
        floors = [1] * len(network.groups)
        prior = WidthPrior(network.groups, [0.1] * len(floors), floors)
        below = ranks(network, prior, MaskedMoves(n_leapfrog=8, n_mask_moves=3), 0.15, 12)
        for k, quantity in enumerate(("function", "noise", "width")[: 3 if floors else 2]):
            counts = np.bincount((below[k].long() // 4).numpy(), minlength=5)
            text = " ".join(map(str, counts))
            rows.append({"part": "ranks", "model": name, "of": quantity, "counts": text})
    return rows


def run() -> list[Row]:
    """Measure everything of the suite."""
    PARTIAL.parent.mkdir(exist_ok=True)
    rows = (
        [json.loads(line) for line in PARTIAL.read_text().splitlines()] if PARTIAL.exists() else []
    )

    def once(key: str, make: Callable[[], Row]) -> None:
        if key not in {r["key"] for r in rows}:
            rows.append(make() | {"key": key})
            with PARTIAL.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")

    for seed in range(SEEDS):
        for masked in (True, False):
            once(f"cubic {seed} {masked}", lambda s=seed, m=masked: cubic_run(s, m))
    for split in range(SPLITS):
        for name in SETS:
            for method in METHODS:
                key = f"{name} {split} {method}"
                once(key, lambda n=name, s=split, m=method: one_fit(n, s, m))
    for name in SETS:
        for settings in CHOICE:
            key = f"choice {name} {settings}"
            once(key, lambda n=name, s=settings: choice(n, s))
    for strength in (0.05, 0.1, 0.15):
        once(f"width {strength}", lambda s=strength: known_width(s))
    parts = {
        p: [r for r in rows if r["part"] == p] for p in ("cubic", "uci", "choice", "three nodes")
    }
    bare = {p: [{k: v for k, v in r.items() if k != "key"} for r in rs] for p, rs in parts.items()}
    found = [
        *speed(),
        *mean_rows(bare["cubic"], ["part", "method"], "seed"),
        *bare["three nodes"],
        *mean_rows(bare["choice"], ["part", "prior_scale", "n_leapfrog"], "set"),
        *mean_rows(bare["uci"], ["part", "set", "method"], "split"),
        *calibration_ranks(),
    ]
    PARTIAL.unlink()
    return found

"""Calibration: do the intervals hold what they promise, do libraries agree, how fast is it?

Three parts, in one table each: measured coverage of the 95 % interval of every metric, agreement
with other libraries, and speed as a ratio against a peer of the same run.
"""

from __future__ import annotations

import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import uq.calibration as ours
from benchmarks.agreement import agreement
from benchmarks.measure import paired, row
from uq.calibration.bootstrap import (
    Resampling,
    differences,
    estimates,
    sample_metrics,
    sample_ood,
)
from uq.calibration.class_definitions import CLASSIFICATION
from uq.calibration.definitions import Definition
from uq.calibration.ood import OOD_METRICS
from uq.calibration.real_definitions import REGRESSION
from uq.calibration.rows import ClassificationRows, Names, RegressionRows, Rows
from uq.distributions import CategoricalMixture, NormalMixture, sample_crps

Row = dict[str, Any]
POPULATION = 1_000_000

# -- simulators --------------------------------------------------------------------------------


def class_rows(rng: np.random.Generator, n: int, temperature: float) -> Rows:
    """Labels drawn from a softmax, predicted at another temperature; 1 is calibrated."""
    logits = 2 * rng.standard_normal((n, 4))
    y = (logits + rng.gumbel(size=(n, 4))).argmax(1)
    prediction = CategoricalMixture(torch.as_tensor(logits / temperature)[None])
    return ClassificationRows(y, prediction, Names("benchmark"))


def real_rows(rng: np.random.Generator, n: int, factor: float) -> Rows:
    """Normal targets of various scales, predicted with scales times a factor; 1 is calibrated."""
    mean, scale = rng.standard_normal(n), np.exp(0.5 * rng.standard_normal(n))
    y = mean + scale * rng.standard_normal(n)
    prediction = NormalMixture(torch.as_tensor(mean)[None], torch.as_tensor(factor * scale)[None])
    return RegressionRows(y, prediction, Names("benchmark"))


def ood_scores(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores N(0, 1) of familiar and N(1, 2²) of OOD rows."""
    return rng.standard_normal(n), 1 + 2 * rng.standard_normal(n // 2)


@dataclass(frozen=True)
class Simulation:
    """Data sets of one kind, and the value of each metric on a large one."""

    name: str
    definitions: Sequence[Any]
    make: Callable[[np.random.Generator, int], Any]
    exact: dict[str, float]

    def judge(self, data: Any, settings: Resampling) -> dict[str, Any]:
        """Estimates of one data set."""
        if isinstance(data, tuple):
            sampled = sample_ood([data[0]], [data[1]], settings)
            return estimates(sampled, self.definitions, settings)[0]
        sampled = sample_metrics([data], self.definitions, settings)
        return estimates(sampled, self.definitions, settings, [data])[0]

    def truth(self) -> dict[str, float]:
        """Value of each metric on a population, where it is not known exactly."""
        data = self.make(np.random.default_rng(1), POPULATION)
        ones = np.ones(POPULATION)
        if isinstance(data, tuple):
            few = Resampling(n_resamples=1)
            values = sample_ood([data[0]], [data[1]], few).values[0]
            return dict(zip((d.name for d in self.definitions), values, strict=True)) | self.exact
        return {
            d.name: self.exact[d.name] if d.name in self.exact else d.value(data, ones)
            for d in self.definitions
        }


def _all(sections: dict[str, Sequence[Definition]]) -> list[Definition]:
    return [metric for section in sections.values() for metric in section]


def simulations() -> Iterator[Simulation]:
    """Calibrated and over-confident predictions of both tasks, and OOD scores."""
    classes, reals = _all(CLASSIFICATION), _all(REGRESSION)  # type: ignore[arg-type]
    errors = [d.name for d in classes if d.null is not None]  # type: ignore[attr-defined]
    real_errors = ["quantile_calibration_error", "expected_normalized_calibration_error"]
    yield Simulation(
        "classes, calibrated",
        classes,
        lambda rng, n: class_rows(rng, n, 1.0),
        dict.fromkeys(errors, 0.0),
    )
    yield Simulation("classes, over-confident", classes, lambda rng, n: class_rows(rng, n, 0.6), {})
    yield Simulation(
        "targets, calibrated",
        reals,
        lambda rng, n: real_rows(rng, n, 1.0),
        dict.fromkeys(real_errors, 0.0),
    )
    yield Simulation("targets, over-confident", reals, lambda rng, n: real_rows(rng, n, 0.7), {})
    yield Simulation("OOD scores", OOD_METRICS, ood_scores, {})


def nominal_rates(
    sizes: Sequence[int] = (200, 1000), repeats: int = 400, n_resamples: int = 500
) -> list[Row]:
    """Share of data sets whose 95 % interval holds the population value, by metric."""
    rows = []
    for simulation in simulations():
        truth = simulation.truth()
        for n in sizes:
            held = {d.name: 0 for d in simulation.definitions}
            for seed in range(repeats):
                data = simulation.make(np.random.default_rng([seed, n]), n)
                found = simulation.judge(data, Resampling(n_resamples=n_resamples, seed=seed))
                for name, e in found.items():
                    # A hair: sums of a million rows round in another order.
                    slack = 1e-9 * (1 + abs(truth[name]))
                    held[name] += e.low - slack <= truth[name] <= e.high + slack
            rows += [
                {
                    "part": "nominal rate",
                    "simulation": simulation.name,
                    "n": n,
                    "metric": name,
                    "population": float(f"{truth[name]:.5g}"),
                    "coverage": round(count / repeats, 4),
                    "standard_error": round((0.95 * 0.05 / repeats) ** 0.5, 4),
                }
                for name, count in held.items()
                if not np.isnan(truth[name])
            ]
    return rows


def false_winners(repeats: int = 400, n: int = 500, n_resamples: int = 500) -> list[Row]:
    """How often any of four equally good methods wins a metric, and a better one is found."""
    metrics = [m for m in _all(REGRESSION) if m.better]
    found = {m.name: [0, 0] for m in metrics}
    for seed in range(repeats):
        rng = np.random.default_rng([seed, n])
        mean, y = rng.standard_normal(n), rng.standard_normal((2, n))
        methods = [
            mean + 0.5 * y[0] + 0.5 * rng.standard_normal(n) for _ in range(4)
        ]  # each errs by noise of its own
        truth = mean + 0.5 * y[0] + 0.7 * y[1]
        for case, shrink in ((0, 1.0), (1, 0.6)):
            errors = [shrink if i == 3 else 1.0 for i in range(4)]
            rows = [
                _normal_rows(truth, truth + e * (m - truth), 0.86 * e)
                for m, e in zip(methods, errors, strict=True)
            ]
            settings = Resampling(n_resamples=n_resamples, seed=seed)
            sampled = sample_metrics(rows, metrics, settings)
            compared = differences(sampled, metrics, list("abcd"), settings)
            for m in metrics:
                winners = {d.winner for d in compared if d.metric == m.name} - {""}
                found[m.name][case] += bool(winners) if case == 0 else "d" in winners
    return [
        {
            "part": "differences",
            "simulation": "four equal methods; one better by 40 %",
            "n": n,
            "metric": name,
            "any_false_winner": round(wrong / repeats, 4),
            "power": round(right / repeats, 4),
            "standard_error": round((0.05 * 0.95 / repeats) ** 0.5, 4),
        }
        for name, (wrong, right) in found.items()
    ]


def _normal_rows(y: np.ndarray, mean: np.ndarray, scale: float) -> RegressionRows:
    prediction = NormalMixture(torch.as_tensor(mean)[None], torch.tensor(scale))
    return RegressionRows(y, prediction, Names("benchmark"))


# -- speed -------------------------------------------------------------------------------------


def timed(f: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def speed() -> list[Row]:
    """Seconds and ratios to peers, one thread, alternating repeats."""
    return [
        _report_seconds(),
        *_report_memory(),
        _ece(),
        *_crps(),
        _battery(),
    ]


def _report_seconds() -> Row:
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((100_000, 10))
    y = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    d = CategoricalMixture(torch.as_tensor(logits, dtype=torch.float32)[None])
    seconds = min(timed(lambda: ours.report(d, y)) for _ in range(3))
    return _absolute("report, n = 100,000, K = 10, 1,000 resamples", "s", seconds, 10.0)


def _report_memory() -> list[Row]:
    """Peak of Python's and NumPy's memory at n and 4 n; linear is a ratio of 4."""
    peaks = []
    for n in (25_000, 100_000):
        rng = np.random.default_rng(0)
        logits = 2 * rng.standard_normal((n, 10))
        y = (logits + rng.gumbel(size=logits.shape)).argmax(1)
        d = CategoricalMixture(torch.as_tensor(logits, dtype=torch.float32)[None])
        tracemalloc.start()
        ours.report(d, y, n_resamples=100)
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    ratio = peaks[1] / peaks[0]
    return [
        _absolute("report, peak memory at n = 100,000, K = 10", "MiB", peaks[1], 1024.0),
        _absolute("report, peak memory at 4 n / at n", "ratio", ratio, 4.2),
    ]


def _absolute(name: str, unit: str, value: float, limit: float) -> Row:
    return {
        "part": "speed",
        "benchmark": name,
        "unit": unit,
        "ours": float(f"{value:.4g}"),
        "target": f"<= {limit:g}",
        "met": value <= limit,
    }


def _against(name: str, mine: Callable[[], Any], peer: Callable[[], Any], at_most: float) -> Row:
    measured = paired(lambda: 1e3 * timed(mine), lambda: 1e3 * timed(peer))
    met = measured["ratio"] <= at_most
    return {"part": "speed", **row(name, "ms", f"ratio <= {at_most:g}", met, measured)}


def _ece() -> Row:
    from torchmetrics.functional.classification import multiclass_calibration_error

    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(10), 1_000_000).astype(np.float32)
    y = rng.integers(10, size=len(p))
    tensors = torch.as_tensor(p), torch.as_tensor(y)
    return _against(
        "ECE, n = 1,000,000, K = 10 / torchmetrics",
        lambda: ours.expected_calibration_error(y, p),
        lambda: multiclass_calibration_error(*tensors, 10),
        1.0,
    )


def _crps() -> Iterator[Row]:
    import properscoring
    import scoringrules
    from pyro.ops.stats import crps_empirical

    rng = np.random.default_rng(0)
    draws, y = rng.standard_normal((1000, 2000)), rng.standard_normal(2000)
    last = np.ascontiguousarray(draws.T)  # their layout, not counted against them
    tensors = torch.as_tensor(draws), torch.as_tensor(y)
    peers: dict[str, Callable[[], Any]] = {
        "scoringrules": lambda: scoringrules.crps_ensemble(y, last, backend="numpy"),
        "properscoring": lambda: properscoring.crps_ensemble(y, last),
        "Pyro": lambda: crps_empirical(*tensors),
    }
    peers["scoringrules, numba"] = lambda: scoringrules.crps_ensemble(y, last, backend="numba")
    for name, peer in peers.items():
        yield _against(
            f"CRPS of 1,000 draws x 2,000 rows / {name}", lambda: sample_crps(draws, y), peer, 1.0
        )


def _battery() -> Row:
    """All regression metrics of Normal predictions, without intervals, as the peer has none."""
    import uncertainty_toolbox

    rng = np.random.default_rng(0)
    mean, scale = rng.standard_normal(5000), np.exp(0.3 * rng.standard_normal(5000))
    y = mean + scale * rng.standard_normal(5000)
    metrics = _all(REGRESSION)

    def mine() -> list[float]:
        d = NormalMixture(torch.as_tensor(mean)[None], torch.as_tensor(scale)[None])
        rows = RegressionRows(y, d, Names("benchmark"))
        return [m.value(rows, np.ones(len(y))) for m in metrics]

    return _against(
        "regression battery, n = 5,000 / uncertainty-toolbox",
        mine,
        lambda: uncertainty_toolbox.metrics.get_all_metrics(mean, scale, y, verbose=False),
        0.2,
    )


def run() -> list[Row]:
    """All parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers
        return [*speed(), *agreement(), *false_winners(), *nominal_rates()]

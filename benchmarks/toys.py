"""Toys whose truth is known: how far each predictive is from the truth and from the posterior's.

The posterior's is exact for the linear model and by long NUTS chains of the same network for the
others (``rhat`` of its predictions is in the row: above 1.05 the chains disagree, and the distance
is to a mixture of what they found). Networks have one hidden layer of 32 units, none for the linear
model; a split is a draw of the data.

- ``excess_nll``: NLL on 2,000 fresh rows less that of the truth, an estimate of the mean KL, nats.
- ``distance``: to the reference over a grid that reaches beyond the data. Regression: mean
  W₁ between predictives in units of the reference's deviation. Classes: mean total variation.
- ``spread``: mean epistemic uncertainty over the grid, divided by the reference's (standard
  deviations of the function, or mutual information).

GP, PFN, PartialBNN, SDM, ABNN and MaskedBNN have other models or priors than the reference, and so
have those with a hidden layer on the linear toy: their distance is also that of the models. NUTS
beside its own longer chains shows what is left to chance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from joblib import Memory
from sklearn.datasets import make_moons

from benchmarks.data import Split
from benchmarks.harness import RESULTS, Method, Suite
from benchmarks.methods import ours
from benchmarks.peers import normal
from benchmarks.scores import predicted
from uq import NUTSClassifier, NUTSRegressor
from uq.errors import NoEpistemicError

Row = dict[str, Any]
Arrays = np.ndarray
CACHE = Memory(RESULTS / ".cache", verbose=0)
LEVELS = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
N_FRESH = 2000
MOON_NOISE, LINEAR_NOISE, LINEAR_PRIOR = 0.3, 0.5, 10.0


@dataclass(frozen=True)
class Toy:
    """Rows that can be drawn, the log density of their targets, and where to compare."""

    draw: Callable[[np.random.Generator, int], tuple[Arrays, Arrays]]
    log_density: Callable[[Arrays, Arrays], Arrays]
    grid: Arrays
    n_rows: int
    classes: bool = False


def log_normal(y: Arrays, mean: Arrays, scale: float) -> Arrays:
    found: Arrays = -0.5 * ((y - mean) / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi))
    return found


def regression(
    f: Callable[[Arrays], Arrays],
    inputs: Callable[[np.random.Generator, int], Arrays],
    scale: float,
    grid: Arrays,
    n_rows: int,
) -> Toy:
    def draw(rng: np.random.Generator, n: int) -> tuple[Arrays, Arrays]:
        X = inputs(rng, n)
        return X, f(X) + scale * rng.standard_normal(n)

    return Toy(draw, lambda X, y: log_normal(y, f(X), scale), grid, n_rows)


def waves(X: Arrays) -> Arrays:
    x = 1.28 * X[:, 0]
    found: Arrays = x + 0.8 * np.sin(2 * np.pi * x) + 0.8 * np.sin(4 * np.pi * x)
    return found


def beside_gap(rng: np.random.Generator, n: int) -> Arrays:
    found: Arrays = (rng.choice([-1, 1], n) * rng.uniform(0.5, 1, n))[:, None]
    return found


def two_moons() -> Toy:
    """Half circles that are blurred by Normal noise; their densities by quadrature over the arc."""
    arc = np.pi * (np.arange(400) + 0.5) / 400
    outer = np.stack([np.cos(arc), np.sin(arc)], 1)
    moons = outer, np.stack([1 - np.cos(arc), 0.5 - np.sin(arc)], 1)

    def draw(rng: np.random.Generator, n: int) -> tuple[Arrays, Arrays]:
        X, y = make_moons(n, noise=MOON_NOISE, random_state=int(rng.integers(2**31)))
        return X, y

    def log_density(X: Arrays, y: Arrays) -> Arrays:
        square = [((X[:, None] - moon) ** 2).sum(-1) for moon in moons]
        p = np.stack([np.exp(-0.5 * s / MOON_NOISE**2).mean(1) for s in square], 1)
        found: Arrays = np.log(p[np.arange(len(y)), y] / p.sum(1))
        return found

    return Toy(draw, log_density, plane((-2.5, 3.5), (-2, 2.5)), 100, classes=True)


def crescent() -> Toy:
    """A crescent x₂ ~ N(x₁²/2 − 1, ½²), x₁ ~ N(0, 1), and a disc N((0, 1), ½² I) inside it."""

    def log_joint(X: Arrays) -> Arrays:
        bent = log_normal(X[:, 0], 0.0, 1.0) + log_normal(X[:, 1], X[:, 0] ** 2 / 2 - 1, 0.5)
        disc = log_normal(X[:, 0], 0.0, 0.5) + log_normal(X[:, 1], 1.0, 0.5)
        return np.stack([disc, bent], 1)

    def draw(rng: np.random.Generator, n: int) -> tuple[Arrays, Arrays]:
        y = rng.integers(2, size=n)
        u, v = rng.standard_normal((2, n))
        bent, disc = np.stack([u, u**2 / 2 - 1 + v / 2], 1), np.stack([u / 2, 1 + v / 2], 1)
        return np.where(y[:, None] == 1, bent, disc), y

    def log_density(X: Arrays, y: Arrays) -> Arrays:
        joint = log_joint(X)
        found: Arrays = joint[np.arange(len(y)), y] - np.logaddexp(*joint.T)
        return found

    return Toy(draw, log_density, plane((-4, 4), (-3, 4)), 100, classes=True)


def plane(first: tuple[float, float], second: tuple[float, float]) -> Arrays:
    axes = np.meshgrid(np.linspace(*first, 20), np.linspace(*second, 20))
    return np.stack([a.ravel() for a in axes], 1)


def line(low: float, high: float) -> Arrays:
    return np.linspace(low, high, 100)[:, None]


WEIGHTS = np.array([1.0, -0.5, 0.25])
TOYS = {
    "linear": regression(
        lambda X: X @ WEIGHTS + 1,
        lambda rng, n: rng.standard_normal((n, 3)),
        LINEAR_NOISE,
        3 * np.random.default_rng(0).standard_normal((100, 3)),
        60,
    ),
    "gap": regression(waves, beside_gap, 0.3, line(-1.5, 1.5), 70),
    "cubic": regression(
        lambda X: X[:, 0] ** 3, lambda rng, n: rng.uniform(-4, 4, (n, 1)), 3.0, line(-6, 6), 60
    ),
    "two_moons": two_moons(),
    "crescent": crescent(),
}


def load(name: str, split: int) -> Split:
    """Draw ``split`` of the data; the test rows are fresh ones."""
    toy = TOYS[name]
    X, y = toy.draw(np.random.default_rng([split, 0]), toy.n_rows)
    return Split(X, y, *toy.draw(np.random.default_rng([split, 1]), N_FRESH))


# -- references ------------------------------------------------------------------------------------


def exact_linear(X: Arrays, y: Arrays, grid: Arrays) -> Any:
    """Posterior predictive given the noise, weights and intercept N(0, 10²)."""
    A, G = (np.c_[np.ones(len(M)), M] for M in (X, grid))
    covariance = np.linalg.inv(A.T @ A / LINEAR_NOISE**2 + np.eye(A.shape[1]) / LINEAR_PRIOR**2)
    variance = np.einsum("ij,jk,ik->i", G, covariance, G)
    dist = normal(G @ covariance @ A.T @ y / LINEAR_NOISE**2, np.sqrt(variance + LINEAR_NOISE**2))
    return dist, variance, 1.0


@CACHE.cache
def reference(name: str, split: int) -> Row:
    """Quantiles or class probabilities on the grid, epistemic part, R-hat of the chains."""
    toy, data = TOYS[name], load(name, split)
    if name == "linear":
        dist, epistemic, rhat = exact_linear(data.X, data.y, toy.grid)
    else:
        nuts = NUTSClassifier if toy.classes else NUTSRegressor
        settings: Row = {"n_warmup": 1000, "n_draws": 1000, "precision": "64-true"}
        model = nuts(**settings, device="cpu", random_state=1000 + split).fit(data.X, data.y)
        dist = model.predict_distribution(toy.grid)
        rhat = float(model.diagnostics(data.X).table.loc["prediction", "R-hat"])
        epistemic = dist.epistemic.numpy()
    kind = {"probs": dist.probs.numpy()} if toy.classes else {"quantiles": quantiles(dist)}
    scale = None if toy.classes else dist.stddev.numpy()
    return {**kind, "scale": scale, "epistemic": epistemic, "rhat": rhat}


def quantiles(dist: Any) -> Arrays:
    found: Arrays = dist.quantile(LEVELS).numpy()
    return found


def score(model: Any, data: Split, name: str, split: int) -> Row:
    """Distances of a fitted model to the truth and to the reference."""
    toy, exact = TOYS[name], reference(name, split)
    dist, seconds = predicted(model, data.X_test)
    nll = -float(dist.log_prob(torch.as_tensor(data.y_test)).double().mean())
    on_grid = model.predict_distribution(toy.grid)
    if toy.classes:
        apart = 0.5 * np.abs(on_grid.probs.numpy() - exact["probs"]).sum(-1)
    else:
        apart = np.abs(quantiles(on_grid) - exact["quantiles"]).mean(0) / exact["scale"]
    found = {
        "excess_nll": nll + float(toy.log_density(data.X_test, data.y_test).mean()),
        "distance": float(apart.mean()),
        "rhat": exact["rhat"],
        "predict_seconds": seconds,
    }
    with contextlib.suppress(NoEpistemicError):
        spread, of_exact = on_grid.epistemic.numpy(), exact["epistemic"]
        if not toy.classes:
            spread, of_exact = np.sqrt(spread), np.sqrt(of_exact)
        found["spread"] = float(spread.mean() / of_exact.mean())
    return found


# -- suite -----------------------------------------------------------------------------------------

# These have no network of 32 units to give, or none without hidden layers.
OWN_NETWORK = ("GP", "PFN", "PartialBNN", "SDM")
# Layer normalisation, and a prior over widths.
OWN_PRIOR = ("ABNN", "MaskedBNN")
NEEDS_HIDDEN = ("ABNN", "MaskedBNN", "ETP", "SSVI")


def same_model(name: str, method: str) -> bool:
    """Whether the reference on a toy is the posterior of a method's own model, and not its own."""
    if method in (*OWN_NETWORK, *OWN_PRIOR):
        return False
    return method not in NEEDS_HIDDEN if name == "linear" else method != "NUTS"


def settings(name: str, method: str) -> Row:
    """The network, where a method takes one."""
    if method in OWN_NETWORK:
        return {}
    return {"hidden": () if name == "linear" and method not in NEEDS_HIDDEN else (32,)}


def both(method: str) -> Method:
    """The regressor or the classifier of a method, as the toy asks."""

    def make(name: str, seed: int) -> Any:
        task = CLASSIFIERS if TOYS[name].classes else REGRESSORS
        return task[method].make(name, seed)

    return Method(make)


REGRESSORS, CLASSIFIERS = ours("regression", settings), ours("classification", settings)


def left_out(name: str, method: str, split: int) -> str:
    """Why a method is not run on a toy."""
    if method not in (CLASSIFIERS if TOYS[name].classes else REGRESSORS):
        return "does not do this task"
    return ""


SUITE = Suite(
    name="toys",
    sets=dict.fromkeys(TOYS, 3),
    methods={m: both(m) for m in {**REGRESSORS, **CLASSIFIERS}},
    load=load,
    score=score,
    left_out=left_out,
    prepare=lambda name, split: reference(name, split),
)

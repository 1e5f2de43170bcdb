"""Prior-data fitted networks: distance from exact posteriors, real tables, bias, and speed.

Four small networks are trained here first (a GP with known hyper-parameters within ten minutes on
two cores, a GP with random ones, coins, a linear model); the rest is measured on the weights that
come with the package. The run is resumable: networks are kept as ``pfn.*.partial.safetensors`` and
finished parts in ``pfn.partial.jsonl`` beside the results until all are there.
``UQ_BENCHMARK_QUICK=1`` goes
through all of it with tiny settings, for a look at the code and not at the numbers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.data import DATA
from benchmarks.measure import mean_rows, paired, row
from uq import (
    GPClassifier,
    GPRegressor,
    MAPClassifier,
    MAPRegressor,
    PFNClassifier,
    PFNRegressor,
)
from uq.distributions import BarDistribution, NormalMixture
from uq.inference import pretrain_pfn
from uq.inference.pfn import pretrain_gp
from uq.inference.pfn_losses import gp_gap
from uq.inference.pfn_priors import GPHyperPrior, GPPrior, rbf_covariance
from uq.nn import PFN, load_pfn, preprocess

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
QUICK = bool(os.environ.get("UQ_BENCHMARK_QUICK"))
# A run with tiny settings must not be taken for a part of a real one.
STEM = "pfn.quick" if QUICK else "pfn"
PARTIAL = RESULTS / f"{STEM}.partial.jsonl"
SPLITS = 1 if QUICK else 5
MAX_ROWS = 1000


def seconds(f: Callable[[], Any]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    return measure


def standard_error(values: Tensor) -> float:
    return float(values.double().std() / len(values) ** 0.5)


# -- networks that are trained here --------------------------------------------------------------


def coins(batch: int, n: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Beta(1, 1)-Bernoulli: no columns that say anything."""
    p = torch.rand(batch, 1, generator=generator)
    y = torch.rand(batch, n, generator=generator) < p
    return torch.zeros(batch, n, d), y.long()


coins.task = "classification"  # type: ignore[attr-defined]
coins.max_features, coins.max_classes = 1, 2  # type: ignore[attr-defined]
coins.scaled = False  # type: ignore[attr-defined]


WEIGHT_SCALE, NOISE = 1.0, 0.3


def linear(batch: int, n: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bayesian linear regression: y = wᵀx + ε, w ∼ N(0, τ²I), x uniform on [−1, 1]^d."""
    x = 2 * torch.rand(batch, n, d, generator=generator) - 1
    w = WEIGHT_SCALE * torch.randn(batch, d, 1, generator=generator)
    return x, (x @ w)[..., 0] + NOISE * torch.randn(batch, n, generator=generator)


linear.task = "regression"  # type: ignore[attr-defined]
linear.max_features = 2  # type: ignore[attr-defined]
linear.scaled = False  # type: ignore[attr-defined]


def trained(name: str, train: Callable[..., Any]) -> tuple[PFN, dict[str, Any]]:
    """A network of this benchmark: read, if it is there, else trained (and resumed)."""
    out = RESULTS / f"{STEM}.{name}.partial.safetensors"
    if not out.exists() or (state := out.with_suffix(".state")).exists():
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if QUICK else 2)  # the budget is ten minutes on two cores
        try:
            train(out=out, resume=out.exists() and state.exists(), log_entries=4)
        finally:
            torch.set_num_threads(threads)
    return load_pfn(out)


def gp_network() -> tuple[PFN, dict[str, Any]]:
    return trained("gp", lambda **o: pretrain_gp(steps=50 if QUICK else 8000, **o))


def hyper_network() -> tuple[PFN, dict[str, Any]]:
    def train(**options: Any) -> Any:
        return pretrain_gp(
            GPHyperPrior(),  # type: ignore[arg-type]
            steps=50 if QUICK else 5000,
            max_context=32,
            **options,
        )

    return trained("hyper", train)


def coin_network() -> tuple[PFN, dict[str, Any]]:
    sizes: dict[str, Any] = {"d_model": 32, "n_layers": 2, "max_context": 20, "rows_per_step": 2000}
    steps = 50 if QUICK else 1500
    return trained("coins", lambda **o: pretrain_pfn(coins, steps=steps, **sizes, **o))


def linear_network() -> tuple[PFN, dict[str, Any]]:
    sizes: dict[str, Any] = {"d_model": 48, "n_layers": 4}
    steps = 50 if QUICK else 4000
    return trained("linear", lambda **o: pretrain_pfn(linear, steps=steps, **sizes, **o))


def cost(meta: dict[str, Any]) -> Row:
    run = meta["runs"][-1]
    return {k: run[k] for k in ("steps", "seconds", "cpu_seconds", "threads") if k in run}


# -- exact posteriors ----------------------------------------------------------------------------


def gp_part() -> list[Row]:
    model, meta = gp_network()
    rows: list[Row] = []
    for n in (0, 1, 2, 5, 10, 20, 40):
        found = gp_gap(model, GPPrior(), n, n_sets=100 if QUICK else 2000, random_state=n)
        rows.append(
            {
                "part": "GP with known hyper-parameters",
                "n": n,
                "exact_nll": round(found.exact, 4),
                "gap": round(found.gap, 4),
                "gap_se": round(found.standard_error, 4),
                "mean_error_in_sd": round(found.mean_error, 3),
                "coverage_90": round(found.coverage, 3),
            }
        )
    mean = float(np.mean([r["gap"] for r in rows]))
    total = {"part": "GP with known hyper-parameters", "n": "mean", "gap": round(mean, 4)}
    error = math.sqrt(sum(r["gap_se"] ** 2 for r in rows)) / len(rows)
    rows.append(total | {"gap_se": round(error, 4), "target": "<= 0.02", "met": mean <= 0.02})
    return [r | (cost(meta) if r["n"] == "mean" else {}) for r in rows]


def coin_part() -> list[Row]:
    """P(y = 1 | k of n) = (k + 1) / (n + 2), and it is a martingale: Σ_y q(y) q(1 | y) = q(1)."""
    model, meta = coin_network()

    def q(n: int, k: int) -> float:
        y = (torch.arange(n) < k).long()[None]
        x = torch.zeros(1, n, 1)
        prepared = preprocess(x, y, torch.zeros(1, 1, 1), model.config)[:3]
        with torch.no_grad():
            return float(torch.softmax(model(*prepared)[0, 0], -1)[1])

    rows: list[Row] = []
    for n in (0, 1, 2, 5, 10, 20):
        error = max(abs(q(n, k) - (k + 1) / (n + 2)) for k in range(n + 1))
        rows.append(
            {"part": "Beta(1, 1)-Bernoulli", "n": n, "largest_error": round(error, 4)}
            | {"target": "<= 0.03", "met": error <= 0.03}
        )
    for n in range(6):
        seen = [(q(n, k), q(n + 1, k), q(n + 1, k + 1)) for k in range(n + 1)]
        error = max(abs((1 - p) * tails + p * heads - p) for p, tails, heads in seen)
        rows.append(
            {"part": "Tower property, Beta(1, 1)-Bernoulli", "n": n}
            | {"largest_error": round(error, 4), "target": "<= 0.03", "met": error <= 0.03}
        )
    rows[-1] |= cost(meta)
    return rows


def linear_part() -> list[Row]:
    """Mean xᵀA⁻¹Xᵀy/σ² and variance σ² + xᵀA⁻¹x with A = XᵀX/σ² + I/τ², in two columns."""
    model, meta = linear_network()
    assert model.borders is not None
    rows: list[Row] = []
    for n in (0, 1, 2, 5, 10, 20, 40):
        generator = torch.Generator().manual_seed(n)
        x, y = linear(100 if QUICK else 2000, n + 4, 2, generator)
        context, query = x[:, :n].double(), x[:, n:].double()
        a = context.mT @ context / NOISE**2 + torch.eye(2).double() / WEIGHT_SCALE**2
        weights = torch.linalg.solve(a, context.mT @ y[:, :n, None].double()) / NOISE**2
        spread = (query.mT * torch.linalg.solve(a, query.mT)).sum(1)
        exact = torch.distributions.Normal(
            (query @ weights)[..., 0], (NOISE**2 + spread).sqrt()
        ).log_prob(y[:, n:].double())
        prepared = preprocess(x[:, :n], y[:, :n], x[:, n:], model.config)[:3]
        with torch.no_grad():
            bars = BarDistribution(model(*prepared).double(), model.borders)
        gap = (exact - bars.log_prob(y[:, n:].double())).mean(1)
        rows.append(
            {"part": "Bayesian linear regression", "n": n, "exact_nll": -float(exact.mean())}
            | {"gap": float(gap.mean()), "gap_se": standard_error(gap)}
            | {"target": "<= 0.05", "met": float(gap.mean()) <= 0.05}
        )
    rows[-1] |= cost(meta)
    return [{k: round(v, 4) if type(v) is float else v for k, v in r.items()} for r in rows]


def mixture_losses(x: Tensor, y: Tensor, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """−log p of the queries: posterior mixture over draws from the prior, ML-II and MAP-II.

    Each of 1,500 draws of the hyper-parameters is an exact GP; likelihoods weigh them.
    """
    prior = GPHyperPrior()
    n_draws = 200 if QUICK else 1500
    length, noise = (t.double() for t in prior.hyperparameters(n_draws, generator))
    log_prior = prior.lengthscale.log_prob(length) + prior.noise_variance.log_prob(noise)
    x, y = x.double(), y.double()
    found: dict[str, list[Tensor]] = {"exact": [], "ML-II": [], "MAP-II": []}
    for rows, target in zip(x, y, strict=True):
        k = rbf_covariance(rows.expand(n_draws, *rows.shape), length)
        inner = k[:, :n, :n] + noise[:, None, None] * torch.eye(n)
        factor = torch.linalg.cholesky(inner)
        white = torch.linalg.solve_triangular(
            factor, target[:n].expand(n_draws, n)[..., None], upper=False
        )
        evidence = -0.5 * white.square().sum((1, 2)) - factor.diagonal(dim1=1, dim2=2).log().sum(1)
        cross = torch.linalg.solve_triangular(factor, k[:, :n, n:], upper=False)
        mean = (cross.transpose(1, 2) @ white).squeeze(2)
        variance = 1 + noise[:, None] - cross.square().sum(1)
        logp = torch.distributions.Normal(mean, variance.sqrt()).log_prob(target[n:])
        weight = torch.log_softmax(evidence, 0)
        found["exact"].append(-torch.logsumexp(weight[:, None] + logp, 0))
        found["ML-II"].append(-logp[evidence.argmax()])
        found["MAP-II"].append(-logp[(evidence + log_prior).argmax()])
    return {k: torch.stack(v).mean(1) for k, v in found.items()}


def hyper_part() -> list[Row]:
    model, meta = hyper_network()
    assert model.borders is not None
    rows: list[Row] = []
    for n in (1, 2, 5, 10, 20, 30):
        generator = torch.Generator().manual_seed(n)
        x, y = GPHyperPrior()(20 if QUICK else 400, n + 4, 1, generator)
        losses = mixture_losses(x, y, n, generator)
        prepared = preprocess(x[:, :n], y[:, :n], x[:, n:], model.config)[:3]
        with torch.no_grad():
            bars = BarDistribution(model(*prepared).double(), model.borders)
        ours = -bars.log_prob(y[:, n:].double()).mean(1)
        less = ours - losses["ML-II"]
        new: Row = {"part": "GP with random hyper-parameters", "n": n}
        new |= {"exact_nll": float(losses["exact"].mean()), "pfn_nll": float(ours.mean())}
        new |= {"gap": float((ours - losses["exact"]).mean())}
        new |= {"gap_se": standard_error(ours - losses["exact"])}
        new |= {
            "ml2_nll": float(losses["ML-II"].mean()),
            "map2_nll": float(losses["MAP-II"].mean()),
        }
        new |= {"less_ml2": float(less.mean()), "less_ml2_se": standard_error(less)}
        new |= {"less_ml2_median": float(less.median())}
        new = {k: round(v, 4) if isinstance(v, float) else v for k, v in new.items()}
        rows.append(
            new | ({"target": "less_ml2 < 0", "met": new["less_ml2"] < 0} if n <= 10 else {})
        )
    rows[-1] |= cost(meta)
    return rows


# -- real tables ---------------------------------------------------------------------------------

UCI = ("boston", "energy", "yacht", "concrete", "wine_red")


class Boosting:
    """Gradient boosting with Normal noise of the cross-validated residuals."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> Boosting:
        self.model = HistGradientBoostingRegressor(random_state=0).fit(X, y)
        held_out = cross_val_predict(HistGradientBoostingRegressor(random_state=0), X, y, cv=5)
        self.scale = float(np.std(y - held_out))
        return self

    def predict_distribution(self, X: np.ndarray) -> NormalMixture:
        mean = torch.as_tensor(self.model.predict(X))
        return NormalMixture(mean[None], torch.full_like(mean, self.scale)[None])


def regression_methods(i: int) -> dict[str, Callable[[], Any]]:
    quick: dict[str, Any] = {"max_epochs": 5} if QUICK else {}
    return {
        "PFN": lambda: PFNRegressor(random_state=i, device="cpu"),
        "PFN, one view": lambda: PFNRegressor(random_state=i, n_views=1, device="cpu"),
        "GP": lambda: GPRegressor(random_state=i, device="cpu", **quick),
        "gradient boosting": Boosting,
        "MAP": lambda: MAPRegressor(random_state=i, hidden=(50, 50), device="cpu", **quick),
    }


def table(name: str, i: int) -> tuple[np.ndarray, ...]:
    """Rows of a standard split, of the first thousand rows of the set."""
    with np.load(DATA / "uci_regression" / f"{name}.npz") as file:
        X, y = file["X"], file["y"]
        train, test = file["train_idx"][i], file["test_idx"][i]
    train, test = train[train < MAX_ROWS], test[test < MAX_ROWS]
    return X[train], y[train], X[test], y[test]


def uci_part(name: str) -> list[Row]:
    scores = []
    for i in range(SPLITS):
        X, y, X_test, y_test = table(name, i)
        for method, make in regression_methods(i).items():
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = make().fit(X, y)
            dist = model.predict_distribution(X_test)
            target = torch.as_tensor(y_test, dtype=torch.float64)
            lower, upper = dist.interval(0.9)
            scores.append(
                {
                    "set": name,
                    "method": method,
                    "split": i,
                    "nll": -float(dist.log_prob(target).mean()),
                    "crps": float(dist.crps(target).mean()),
                    "rmse": float((dist.mean - target).square().mean().sqrt()),
                    "coverage_90": float(((lower <= target) & (target <= upper)).double().mean()),
                    "seconds": time.perf_counter() - start,
                }
            )
    found = mean_rows(scores, ["set", "method"], "split")
    return [{"part": "UCI regression, at most 1,000 rows"} | r for r in found]


LOADERS = {"iris": load_iris, "wine": load_wine, "breast_cancer": load_breast_cancer}
CLASS_SETS = (*LOADERS, "pima", "ionosphere", "german_credit", "banknote", "segment", "phoneme")


def class_table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A thousand random rows of a set, or all."""
    if name in LOADERS:
        X, y = LOADERS[name](return_X_y=True)
    else:
        with np.load(DATA / "uci_classification" / f"{name}.npz") as file:
            X, y = file["X"], file["y"]
    rows = np.random.default_rng(0).permutation(len(X))[:MAX_ROWS]
    return X[rows], y[rows]


def classification_methods(i: int) -> dict[str, Callable[[], Any]]:
    quick: dict[str, Any] = {"max_epochs": 5} if QUICK else {}
    return {
        "PFN": lambda: PFNClassifier(random_state=i, device="cpu"),
        "PFN, one view": lambda: PFNClassifier(random_state=i, n_views=1, device="cpu"),
        "GP": lambda: GPClassifier(random_state=i, device="cpu", **quick),
        "gradient boosting": lambda: HistGradientBoostingClassifier(random_state=i),
        "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        "MAP": lambda: MAPClassifier(random_state=i, hidden=(50, 50), device="cpu", **quick),
    }


def classification_part(name: str) -> list[Row]:
    scores = []
    X, y = class_table(name)
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(X, y)
    for i, (train, test) in enumerate(folds):
        if i >= SPLITS:
            break
        for method, make in classification_methods(i).items():
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = make().fit(X[train], y[train])
            proba = np.clip(model.predict_proba(X[test]), 1e-12, 1)
            position = np.searchsorted(model.classes_, y[test])
            nll = -np.log(proba[np.arange(len(test)), position]).mean()
            accuracy = float((proba.argmax(1) == position).mean())
            scores.append(
                {"set": name, "method": method, "split": i, "nll": float(nll)}
                | {"accuracy": accuracy, "seconds": time.perf_counter() - start}
            )
    found = mean_rows(scores, ["set", "method"], "split")
    return [{"part": "classification, at most 1,000 rows"} | r for r in found]


# -- bias and variance ---------------------------------------------------------------------------


def bias_part(n: int) -> list[Row]:
    """Nagler's experiment: p(1 | x) = ½ + ½ sin(1ᵀx), x ~ N(0, I₅), over random data sets.

    Bias² is the mean over test points of (mean prediction − p)², less the variance of that mean.
    """
    rng = np.random.default_rng(0)
    X_test = rng.normal(size=(50, 5))  # the same for every n
    truth = 0.5 + 0.5 * np.sin(X_test.sum(1))
    repeats = 3 if QUICK else 40
    rows: list[Row] = []
    near = min(500, math.ceil(n ** (4 / 9)))
    found: dict[str, list[np.ndarray]] = {"plain": [], "localised": []}
    for _ in range(repeats):
        X = rng.normal(size=(n, 5))
        y = (rng.uniform(size=n) < 0.5 + 0.5 * np.sin(X.sum(1))).astype(int)
        for method, k in (("plain", None), ("localised", near)):
            model = PFNClassifier(n_views=1, localize=k, random_state=0, device="cpu")
            found[method].append(model.fit(X, y).predict_proba(X_test)[:, 1])
    for method, values in found.items():
        p = np.stack(values)
        variance = p.var(0, ddof=1)
        squared = (p.mean(0) - truth) ** 2 - variance / repeats
        rows.append(
            {
                "part": "bias under misspecification",
                "n": n,
                "method": method,
                "neighbours": near if method == "localised" else n,
                "bias2": round(float(squared.mean()), 5),
                "bias2_se": round(float(squared.std(ddof=1) / len(squared) ** 0.5), 5),
                "variance": round(float(variance.mean()), 5),
                "data_sets": repeats,
            }
        )
    return rows


# -- speed ---------------------------------------------------------------------------------------


def speed_part() -> list[Row]:
    return [*fit_and_predict(), *against_scikit_learn(), *against_nuts(), *cache(), memory()]


def fit_and_predict() -> list[Row]:
    rng = np.random.default_rng(0)
    X, X_new = rng.normal(size=(500, 8)), rng.normal(size=(200, 8))
    y = np.sin(X[:, 0]) + X[:, 1] + 0.1 * rng.normal(size=500)
    cases: list[tuple[str, Any, np.ndarray]] = [
        ("PFNRegressor", PFNRegressor, y),
        ("PFNClassifier", PFNClassifier, (y > 0).astype(int)),
    ]
    rows = []
    for name, cls, target in cases:
        for views in (4, 1):
            model = cls(n_views=views, random_state=0, device="cpu")

            def once(model: Any = model, target: np.ndarray = target) -> Any:
                return model.fit(X, target).predict(X_new)

            once()
            times = [seconds(once)() for _ in range(5)]
            ours = float(np.median(times))
            label = f"{name}, {views} view(s): fit 500 × 8 and predict 200, one core"
            rows.append(
                row(label, "s", "< 0.5", ours < 0.5, {"ours": ours, "ours_max": max(times)})
            )
    return [{"part": "speed"} | r for r in rows]


def small_gp_sets(n_sets: int) -> tuple[Tensor, Tensor]:
    return GPHyperPrior()(n_sets, 130, 1, torch.Generator().manual_seed(0))


def pfn_posterior(model: PFN, x: Tensor, y: Tensor, n: int) -> Tensor:
    with torch.no_grad():
        Xc, yc, Xq, _ = preprocess(x[:, :n], y[:, :n], x[:, n:], model.config)
        logits: Tensor = model(Xc, yc, Xq)
    return logits


def against_scikit_learn() -> list[Row]:
    model, _ = hyper_network()
    n_sets = 5 if QUICK else 100
    x, y = small_gp_sets(n_sets)
    kernel = RBF(0.5, (1e-2, 1e2)) + WhiteKernel(0.05, (1e-4, 1e1))

    def theirs() -> None:
        for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True):
            gp = GaussianProcessRegressor(kernel, random_state=0).fit(a[:30], b[:30])
            gp.predict(a[30:], return_std=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = paired(seconds(theirs), seconds(lambda: pfn_posterior(model, x, y, 30)), 3)
    measured["ours"], measured["peer"] = measured["peer"], measured["ours"]
    label = f"{n_sets} data sets of 30 rows and 100 queries: scikit-learn's GP fit / one PFN batch"
    met = measured["ratio"] >= 3
    return [{"part": "speed"} | row(label, "s", ">= 3 (higher is better)", met, measured)]


def against_nuts() -> list[Row]:
    """NUTS as NumPyro's MCMC runs it, and its kernel compiled into one program with its chain."""
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import MCMC, NUTS

    model, _ = hyper_network()
    n, n_sets = 30, 5 if QUICK else 100
    warmup, draws = (20, 20) if QUICK else (500, 500)
    x, y = small_gp_sets(n_sets)
    a, b = (jnp.asarray(t.numpy()) for t in (x, y))
    known, targets = a[:, :n], b[:, :n]

    def covariance(u: Any, v: Any, length: Any) -> Any:
        return jnp.exp(-0.5 * ((u - v.T) / length) ** 2)

    def gp(inputs: Any, target: Any) -> None:
        length = numpyro.sample("length", numpyro.distributions.Gamma(3.0, 6.0))
        noise = numpyro.sample("noise", numpyro.distributions.Gamma(1.1, 20.0))
        k = covariance(inputs, inputs, length) + (noise + 1e-3) * jnp.eye(n)
        numpyro.sample("y", numpyro.distributions.MultivariateNormal(jnp.zeros(n), k), obs=target)

    def predict(length: Any, noise: Any, rows: Any, target: Any) -> Any:
        def one(scale: Any, variance: Any) -> Any:
            k = covariance(rows[:n], rows[:n], scale) + (variance + 1e-3) * jnp.eye(n)
            cross = covariance(rows[:n], rows[n:], scale)
            solved = jnp.linalg.solve(k, jnp.concatenate([target[:, None], cross], 1))
            mean = cross.T @ solved[:, 0]
            return mean, 1 + variance + 1e-3 - (cross * solved[:, 1:]).sum(0)

        return jax.vmap(one)(length, noise)

    sampler = MCMC(NUTS(gp), num_warmup=warmup, num_samples=draws, progress_bar=False)
    predict_once = jax.jit(predict)
    first = known[0], targets[0]  # the same arrays in every run: NumPyro compiles for them

    def as_called() -> None:
        sampler.run(jax.random.PRNGKey(0), *first)
        found = sampler.get_samples()
        jax.block_until_ready(predict_once(found["length"], found["noise"], a[0], first[1]))

    @jax.jit
    def whole(rows: Any, target: Any) -> Any:
        kernel, data = NUTS(gp), (rows[:n], target)
        state = kernel.init(jax.random.PRNGKey(0), warmup, None, data, {})

        def step(current: Any, _: Any) -> Any:
            following = kernel.sample(current, data, {})
            return following, following.z

        state, _ = jax.lax.scan(step, state, None, length=warmup)
        _, found = jax.lax.scan(step, state, None, length=draws)
        # Positions are logarithms: both supports are positive.
        return predict(jnp.exp(found["length"]), jnp.exp(found["noise"]), rows, target)

    def one_by_one() -> None:
        for rows, target in zip(a, targets, strict=True):
            jax.block_until_ready(whole(rows, target))

    def single() -> Any:
        return jax.block_until_ready(whole(a[0], targets[0]))

    # `paired` runs both once before: compilation is not counted.
    sizes = f"30 rows, 100 queries, {warmup} + {draws} draws of NumPyro's NUTS"
    cases: list[tuple[str, Callable[[], Any], int, int]] = [
        (f"{sizes}, MCMC.run / one PFN pass", as_called, 1, 3),
        (f"{sizes}, compiled into one program / one PFN pass", single, 1, 7),
        (f"{n_sets} sets of {sizes}, compiled, in turn / one PFN batch", one_by_one, n_sets, 3),
    ]
    rows = []
    for label, theirs, k, repeats in cases:

        def ours(k: int = k) -> Tensor:
            return pfn_posterior(model, x[:k], y[:k], n)

        measured = paired(seconds(theirs), seconds(ours), repeats)
        measured["ours"], measured["peer"] = measured["peer"], measured["ours"]
        met = measured["ratio"] >= 50
        rows.append(row(label, "s", ">= 50 (higher is better)", met, measured))
    return [{"part": "speed"} | r for r in rows]


def cache() -> list[Row]:
    rng = np.random.default_rng(0)
    n = 100 if QUICK else 1000
    X, X_new = rng.normal(size=(n, 8)), rng.normal(size=(10, 8))
    model = PFNRegressor(n_views=1, random_state=0, device="cpu")
    model.fit(X, np.sin(X[:, 0]) + 0.1 * rng.normal(size=n))
    posterior: Any = model.posterior_

    def without() -> None:
        posterior._views = []
        model.predict(X_new)

    measured = paired(seconds(without), seconds(lambda: model.predict(X_new)), 7)
    measured["ours"], measured["peer"] = measured["peer"], measured["ours"]
    label = f"predict 10 rows of a context of {n}: without / with its cache"
    met = measured["ratio"] >= 5
    return [{"part": "speed"} | row(label, "s", ">= 5 (higher is better)", met, measured)]


MEMORY = """
import sys
import numpy as np, torch
torch.set_num_threads(1)
from uq import PFNRegressor
rng = np.random.default_rng(0)
X = rng.normal(size=(int(sys.argv[1]), 10))
model = PFNRegressor(random_state=0, device="cpu").fit(X, X[:, 0] + rng.normal(size=len(X)))
model.predict(X[:1000])
# Not ru_maxrss, which a child takes over from its parent.
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(int(peak.split()[1]) / 2**20)
"""


def memory() -> Row:
    n = 500 if QUICK else 5000
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, str(n)], capture_output=True, text=True, check=True
    )
    peak = float(found.stdout.split()[-1])
    label = f"peak memory of the process: fit {n} × 10, 4 views, and predict 1,000"
    return {"part": "speed"} | row(label, "GB", "< 2", peak < 2, {"ours": peak})


# -- all -----------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], list[Row]]] = {
    "coins": coin_part,
    "linear": linear_part,
    "gp": gp_part,
    "hyper": hyper_part,
    "speed": speed_part,
}
for _name in UCI[:2] if QUICK else UCI:
    PARTS[f"UCI {_name}"] = partial(uci_part, _name)
for _name in CLASS_SETS[:2] if QUICK else CLASS_SETS:
    PARTS[f"classes {_name}"] = partial(classification_part, _name)
for _n in (50, 200) if QUICK else (50, 100, 200, 500, 1000, 2000, 4000):
    PARTS[f"bias {_n}"] = partial(bias_part, _n)


def run() -> list[Row]:
    """All parts; those that an earlier run finished are read."""
    RESULTS.mkdir(exist_ok=True)
    done: dict[str, list[Row]] = {}
    if PARTIAL.exists():
        done = {r["part"]: r["rows"] for r in map(json.loads, PARTIAL.read_text().splitlines())}
    rows = []
    with PARTIAL.open("a") as file:
        for name, part in PARTS.items():
            if name not in done:
                start = time.perf_counter()
                done[name] = part()
                print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
                file.write(json.dumps({"part": name, "rows": done[name]}) + "\n")
                file.flush()
            rows += done[name]
    for path in RESULTS.glob(f"{STEM}.*partial*"):
        path.unlink()
    return rows

"""Implicit VI: speed and memory of a step, recovery of a full covariance, stand-ins for the paper's
results, and distances to NUTS on a toy regression with a gap.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.ivon import summary
from benchmarks.measure import paired, row
from uq import (
    EnsembleRegressor,
    ImplicitVIClassifier,
    ImplicitVIRegressor,
    IVONRegressor,
    SSVIRegressor,
)
from uq.distributions import NormalMixture
from uq.inference.implicit_vi import ImplicitWeights, linearized_entropy
from uq.nn import MLP, CategoricalLikelihood, Network, NormalLikelihood, NormalPrior
from uq.nn.bayesian import BayesianNetwork
from uq.nn.implicit import MatrixGenerator, MLPGenerator, WeightLayout

SEEDS = range(3)
PLOTS = Path(__file__).parent / "results" / "plots"

# -- speed and memory ----------------------------------------------------------------------------

SAMPLES, BATCH, PROBES = 2, 256, 8


def cpu_seconds(step: Callable[[], Any]) -> Callable[[], float]:
    """Processor time of a step, which runs on one thread: others on the machine count less."""

    def measure() -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    return measure


def digits_batch() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return MLP(64, (32,), 10), torch.randn(BATCH, 64), torch.randint(0, 10, (BATCH,))


def card_generator() -> MatrixGenerator:
    """10 × 10 → 40 × 40 → 40 × 40 → 50 × 49, cut to the 2,410 weights of 64-32-10."""
    return MatrixGenerator((10, 10), [(40, 40), (40, 40)], [(50, 49)], 2410)


def implicit_step(generator: Any, bound: Any, **options: Any) -> Callable[[], Any]:
    """A whole step as the estimators take it: 2 draws, the entropy at one of them, Adam."""
    net, x, y = digits_batch()
    q = ImplicitWeights(net, generator)
    optimizer = torch.optim.Adam(q.parameters(), 1e-3, fused=True)
    prior = NormalPrior(1.0)

    def step() -> None:
        draw = q.draw(SAMPLES)
        logits = q.evaluate(draw.weights, x).flatten(0, 1)
        entropy = q.entropy(draw.noise[:1], bound, **options).float()[0]
        kl = -q.log_prior(draw, prior).mean() - entropy
        loss = F.cross_entropy(logits, y.repeat(SAMPLES)) + kl / 1000
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def mean_field_step() -> Callable[[], Any]:
    """The same with independent Normals, written by hand: 2 draws, closed-form KL, Adam."""
    net, x, y = digits_batch()
    layout = WeightLayout(net)
    mean = layout.flatten({k: p.detach().clone() for k, p in net.named_parameters()})
    rho = torch.full_like(mean, -3)
    parameters = [mean.requires_grad_(), rho.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, 1e-3, fused=True)

    def step() -> None:
        std = F.softplus(rho)
        weights = layout.unflatten(mean + std * torch.randn(SAMPLES, len(mean)))
        each = [
            functional_call(net, {k: w[s] for k, w in weights.items()}, (x,))
            for s in range(SAMPLES)
        ]
        kl = 0.5 * (std.square() + mean.square() - 1).sum() - std.log().sum()
        loss = F.cross_entropy(torch.cat(each), y.repeat(SAMPLES)) + kl / 1000
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def pyro_step() -> Callable[[], Any]:
    """The same by Pyro: AutoNormal, 2 particles."""
    net, x, y = digits_batch()
    model = BayesianNetwork(Network(net, CategoricalLikelihood(10)), NormalPrior(1.0))
    pyro.clear_param_store()
    elbo = TraceMeanField_ELBO(num_particles=SAMPLES)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 1e-3}), elbo)
    return lambda: svi.step(x, y)


def benchmark_step() -> list[dict[str, Any]]:
    rows = []
    name = "digits network (2,410 weights, d = 100), step with L'"
    card = cpu_seconds(implicit_step(card_generator(), "exact", probes=PROBES))
    for peer, make in (("Pyro AutoNormal", pyro_step), ("a hand-written loop", mean_field_step)):
        measured = paired(card, cpu_seconds(make()))
        label = f"{name} / mean-field step of {peer}"
        rows.append(row(label, "s", "<= 3", measured["ratio"] <= 3, measured))
    exact = paired(cpu_seconds(implicit_step(card_generator(), "exact")), card)
    rows.append(row(f"{name}, exact gradient / by 8 probes", "s", "(no target)", None, exact))
    net = MLP(64, (32,), 10)
    ours = MatrixGenerator.for_layout(WeightLayout(net))
    measured = paired(
        cpu_seconds(implicit_step(ours, "exact", probes=PROBES)), cpu_seconds(mean_field_step())
    )
    label = "the same, generator sized by default (d = 64) / hand-written mean-field step"
    rows.append(row(label, "s", "<= 3", measured["ratio"] <= 3, measured))
    return rows


def benchmark_large() -> list[dict[str, Any]]:
    """L'' with d = 1,024 at 10⁶ weights, and the memory of a step at 10⁷."""
    rows = []
    for widths, noise_dim, target in (
        (((784, 920, 300), 10), 1024, 1.0),
        (((3000, 2800, 600), 10), 1024, None),
    ):
        net = MLP(widths[0][0], widths[0][1:], widths[1])
        layout = WeightLayout(net)
        before = peak_mb()
        generator = MatrixGenerator.for_layout(layout, noise_dim, width=128)
        q = ImplicitWeights(net, generator)
        optimizer = torch.optim.Adam(q.parameters(), 1e-4, fused=True)
        x, y = torch.randn(128, widths[0][0]), torch.randint(0, 10, (128,))
        prior, m = NormalPrior(1.0), layout.n_weights

        def step() -> None:
            draw = q.draw(1)  # noqa: B023
            kl = q.kl(draw, prior, "smallest").mean()  # noqa: B023
            loss = F.cross_entropy(q.evaluate(draw.weights, x)[0], y) + kl / 60_000  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023

        measure = cpu_seconds(step)
        times = [measure() for _ in range(4)][1:]
        label = f"step with L'', {m:,} weights, d = {noise_dim}, 12 iterations"
        limit = "(no target)" if target is None else "< 1"
        took = float(np.median(times))
        rows.append(row(label, "s", limit, target is None or took < target, {"ours": took}))
        if target is None:
            # θ, then the generator (its last biases alone are m), its gradient and Adam's moments.
            size = 4e-6 * (m + 4 * sum(p.numel() for p in q.parameters()))
            used = peak_mb() - before
            label = f"memory of that step; peer: theta and 4 times the generator, {m:,} weights"
            measured = {"ours": used, "peer": size, "ratio": used / size}
            rows.append(row(label, "MB", "<= 1.5", used <= 1.5 * size, measured))
    return rows


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- linear regression: the full covariance ------------------------------------------------------


def covariances(seed: int) -> dict[str, Tensor]:
    """Posterior covariance of the weights of correlated inputs: exact, implicit and mean-field."""
    g = torch.Generator().manual_seed(seed)
    d, n, noise, sigma = 5, 12, 0.5, 1e-3
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ mix
    precision = torch.eye(d, dtype=torch.float64) + x.T @ x / noise**2
    exact = torch.linalg.inv(precision)
    torch.manual_seed(seed)
    generator = MLPGenerator(d, (), d).double()
    a = generator.layers[0].weight

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        a.data = torch.as_tensor(flat).view(d, d)
        entropy = linearized_entropy(generator, torch.zeros(1, d, dtype=a.dtype), sigma)[0]
        value = 0.5 * (precision @ a @ a.T).trace() - entropy
        (gradient,) = torch.autograd.grad(value, a)
        return value.item(), gradient.flatten().numpy()

    minimize(loss, a.detach().flatten().numpy(), jac=True, method="L-BFGS-B")
    return {
        "exact": exact,
        "implicit": (a @ a.T).detach() + sigma**2 * torch.eye(d),
        "mean-field": (1 / precision.diagonal()).diag(),  # its optimum, in closed form
    }


def linear_regression(seed: int) -> dict[str, float]:
    """Standard deviations and covariance, relative to the exact."""
    found = covariances(seed)
    exact = found.pop("exact")
    out = {}
    for name, covariance in found.items():
        ratio = (covariance.diagonal() / exact.diagonal()).sqrt().mean()
        out[f"{name}, mean std / exact"] = float(ratio)
        error = (covariance - exact).norm() / exact.norm()
        out[f"{name}, relative error of the covariance"] = float(error)
    return out


def plot_covariances(seed: int = 0) -> Path:
    """Ellipses of one and two standard deviations, for the two weights of largest correlation."""
    found = covariances(seed)
    exact = found["exact"]
    std = exact.diagonal().sqrt()
    correlation = (exact / std / std[:, None]).fill_diagonal_(0).abs()
    i, j = divmod(int(correlation.argmax()), len(exact))
    angle = torch.linspace(0, 2 * math.pi, 200, dtype=exact.dtype)
    circle = torch.stack([angle.cos(), angle.sin()])
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, style in (("exact", "k-"), ("implicit", "C1--"), ("mean-field", "C0-")):
        covariance = found[name][[i, j]][:, [i, j]]
        error = (found[name] - exact).norm() / exact.norm()
        label = name if name == "exact" else f"{name} (relative error {float(error):.2g})"
        for size in (1, 2):
            x, y = (size * torch.linalg.cholesky(covariance) @ circle).numpy()
            axes.plot(x, y, style, label=label if size == 1 else None)
    axes.set(
        title="Posterior of Bayesian linear regression",
        xlabel=f"weight {i + 1}, from its mean",
        ylabel=f"weight {j + 1}, from its mean",
    )
    axes.legend(loc="best", fontsize=8)
    path = PLOTS / "implicit_covariance.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


# -- digits: collapse without the entropy --------------------------------------------------------


def digits_collapse(seed: int) -> dict[str, float]:
    """Detection of pixel-permuted digits by mutual information, and spread of the weights."""
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(X))
    train, test = order[:1200], order[1200:]
    # Not standardised: a pixel that is always empty would be blown up where a permutation fills it.
    X = X / 16
    torch.manual_seed(seed)
    network = MLP(64, (32,), 10)
    shuffled = X[test][:, rng.permutation(64)]
    out = {}
    for name, changes in (
        ("L'", {"bound": "exact"}),
        ("L''", {"bound": "smallest"}),
        ("no entropy", {"entropy_weight": 0.0}),
    ):
        model = ImplicitVIClassifier(
            module=network,
            max_epochs=DIGITS_EPOCHS,
            patience=None,
            random_state=seed,
            device="cpu",
            **changes,
        ).fit(X[train], y[train])
        inside, outside = (model.predict_distribution(part) for part in (X[test], shuffled))
        labels = np.repeat([0, 1], [len(test), len(test)])
        mi = torch.cat([inside.epistemic, outside.epistemic])
        posterior: Any = model.posterior_
        with torch.no_grad():
            spread = posterior.q.draw(200).flat.std(0).mean()
        out[f"{name}: AUROC of mutual information"] = float(roc_auc_score(labels, mi))
        out[f"{name}: standard deviation of a weight"] = float(spread)
        out[f"{name}: accuracy"] = float((inside.probs.argmax(-1).numpy() == y[test]).mean())
        out[f"{name}: NLL"] = -float(inside.log_prob(torch.as_tensor(y[test])).mean())
    return out


DIGITS_EPOCHS = 60

# -- toy regression with a gap, against NUTS -----------------------------------------------------

HIDDEN = (7, 10)
TOY_PRIOR = 1.0
TOY_STEPS = 2500
GRID = np.linspace(-2, 2, 81)
REGIONS = {
    "data": (abs(GRID) > 0.5) & (abs(GRID) < 0.98),
    "gap": abs(GRID) < 0.4,
    "outside": abs(GRID) > 1.4,
}


def toy(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """70 noisy rows of x + 0.8 sin 2πx + 0.8 sin 4πx, on both sides of a gap; noise 0.3."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.uniform(-1.28, -0.61, 38), rng.uniform(0.61, 1.28, 32)])
    y = x + 0.8 * np.sin(2 * np.pi * x) + 0.8 * np.sin(4 * np.pi * x)
    return x / x.max(), y + 0.3 * rng.normal(size=len(x))


def nuts(warmup: int = 1000, draws: int = 5000, chains: int = 4) -> dict[str, Any]:
    """Draws of the exact posterior of the estimators' network, at GRID, by NumPyro's NUTS."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    import jax
    import numpyro
    from jax.nn import elu, softplus
    from numpyro.infer import MCMC, NUTS

    jax.config.update("jax_enable_x64", True)
    x, y = toy()
    # The estimators' standardised scale.
    inputs, grid = ((t - x.mean())[:, None] / x.std() for t in (x, GRID))
    target = (y - y.mean()) / y.std()
    widths = (1, *HIDDEN, 1)
    pairs = list(pairwise(widths))
    n = sum(a * b + b for a, b in pairs) + 1
    offset = 0.499 + math.log(-math.expm1(-0.499))  # noise of 0.5 at 0, as NormalLikelihood has

    def network(theta: Any, h: Any) -> tuple[Any, Any]:
        at = 0
        for i, (a, b) in enumerate(pairs):
            end = at + a * b
            h = h @ theta[at:end].reshape(b, a).T + theta[end : end + b]
            h = elu(h) if i < len(pairs) - 1 else h
            at = end + b
        return h[:, 0], softplus(theta[at] + offset) + 1e-3

    def model() -> None:
        base = numpyro.distributions.Normal(0, 1).expand([n]).to_event(1)
        loc, scale = network(TOY_PRIOR * numpyro.sample("theta", base), inputs)
        numpyro.sample("y", numpyro.distributions.Normal(loc, scale), obs=target)

    mcmc = MCMC(
        NUTS(model, max_tree_depth=9),
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.PRNGKey(0))
    theta = TOY_PRIOR * mcmc.get_samples(group_by_chain=True)["theta"]
    loc, scale = jax.vmap(jax.vmap(lambda t: network(t, grid)))(theta)
    rhat = numpyro.diagnostics.split_gelman_rubin(np.asarray(loc))
    return {
        "loc": np.asarray(loc).reshape(-1, len(GRID)) * y.std() + y.mean(),
        "scale": np.asarray(scale).reshape(-1) * y.std(),
        "rhat": rhat,
    }


TOY: dict[str, Any] = {
    "hidden": HIDDEN,
    "batch_size": None,
    "max_epochs": TOY_STEPS,
    "device": "cpu",
}
IMPLICIT: dict[str, Any] = {
    "patience": None,
    "lr": 3e-3,
    "mc_samples": 4,
    "noise_dim": 100,
    "generator_width": 24,
    "n_samples": 256,
    "prior_scale": TOY_PRIOR,
    **TOY,
}


# A weight of 0.1 on the prior is a prior that is wider by its root.
AUTHORS: dict[str, Any] = IMPLICIT | {
    "max_epochs": 7500,
    "lr": 1.52e-3,
    "mc_samples": 3,
    "noise_dim": 60,
    "weight_noise": 0.009,
    "prior_scale": TOY_PRIOR / math.sqrt(0.1),
}


def mean_field(seed: int) -> NormalMixture:
    """Independent Normals on the weights of the same network under the same prior, by hand.

    Draws, steps and warm-up of the KL are those of implicit VI; the step size is a mean-field one.
    """
    torch.manual_seed(seed)
    net = Network(MLP(1, HIDDEN, 1), NormalLikelihood(1))
    layout = WeightLayout(net)
    x, y = toy()
    inputs, grid = (torch.tensor((t - x.mean()) / x.std()).float()[:, None] for t in (x, GRID))
    target = torch.tensor((y - y.mean()) / y.std()).float()[:, None]
    mean = layout.flatten({k: p.detach().clone() for k, p in net.named_parameters()})
    rho = torch.full_like(mean, math.log(math.expm1(0.05)))
    optimizer = torch.optim.Adam([mean.requires_grad_(), rho.requires_grad_()], 1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOY_STEPS)

    def draw(n: int) -> list[dict[str, Tensor]]:
        flat = mean + F.softplus(rho) * torch.randn(n, len(mean))
        weights = layout.unflatten(flat)
        return [{k: w[s] for k, w in weights.items()} for s in range(n)]

    for step in range(TOY_STEPS):
        std = F.softplus(rho)
        precision = TOY_PRIOR**-2
        kl = 0.5 * precision * (std.square() + mean.square()).sum() - std.log().sum()
        nll = [
            net.likelihood.nll(functional_call(net, w, (inputs,)), target).sum()
            for w in draw(IMPLICIT["mc_samples"])
        ]
        beta = min(1.0, 2 * (step + 1) / TOY_STEPS)
        optimizer.zero_grad()
        ((torch.stack(nll).mean() + beta * kl) / len(x)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        each = [functional_call(net, w, (grid,)) for w in draw(256)]
    loc, scale = (torch.stack(t)[..., 0].double() * y.std() for t in zip(*each, strict=True))
    return NormalMixture(loc + y.mean(), scale)


def fitted(model: Any) -> NormalMixture:
    """Predictive at GRID of an estimator."""
    x, y = toy()
    found: NormalMixture = model.fit(x[:, None], y).predict_distribution(GRID[:, None])
    return found


PREDICTIVES: dict[str, Callable[[int], NormalMixture]] = {
    "implicit VI, L'": lambda seed: fitted(ImplicitVIRegressor(**IMPLICIT, random_state=seed)),
    "implicit VI, L', authors' settings": lambda seed: fitted(
        ImplicitVIRegressor(**AUTHORS, random_state=seed)
    ),
    "implicit VI, L', no warm-up": lambda seed: fitted(
        ImplicitVIRegressor(**IMPLICIT, kl_warmup=0.0, random_state=seed)
    ),
    "implicit VI, L''": lambda seed: fitted(
        ImplicitVIRegressor(**IMPLICIT, bound="smallest", random_state=seed)
    ),
    "mean-field VI": mean_field,
    # The prior of its layers is narrower, by the root of the fan-in.
    "SSVI of density 1": lambda seed: fitted(
        SSVIRegressor(density=1.0, temperature=1.0, n_samples=256, **TOY, random_state=seed)
    ),
    "IVON": lambda seed: fitted(
        IVONRegressor(n_samples=256, prior_scale=TOY_PRIOR, **TOY, random_state=seed)
    ),
    "ensemble of 5": lambda seed: fitted(
        EnsembleRegressor(
            n_members=5, prior_scale=TOY_PRIOR, patience=None, **TOY, random_state=seed
        )
    ),
}


def distances(reference: dict[str, Any], dist: NormalMixture) -> dict[str, float]:
    """Predictive KL in nats and W₁ of the functions' values, in target units; and noise."""
    y = np.linspace(-40, 40, 3201)

    def density(loc: np.ndarray, scale: np.ndarray) -> np.ndarray:
        out = np.zeros((len(GRID), len(y)))
        for m, s in zip(loc, scale, strict=True):
            z = (y - m[:, None]) / np.broadcast_to(s, m.shape)[:, None]
            out += np.exp(-0.5 * z**2) / np.broadcast_to(s, m.shape)[:, None]
        return out / (len(loc) * math.sqrt(2 * math.pi))

    every = slice(None, None, max(1, len(reference["loc"]) // 500))
    p = density(reference["loc"][every], reference["scale"][every])
    loc, scale = dist.loc.numpy(), dist.scale.numpy()
    q = density(loc, scale)
    tiny = 1e-300
    kl = (p * (np.log(p + tiny) - np.log(q + tiny))).sum(1) * (y[1] - y[0])
    levels = np.linspace(0.005, 0.995, 199)
    quantiles = [np.quantile(t, levels, axis=0) for t in (reference["loc"], loc)]
    w1 = abs(quantiles[0] - quantiles[1]).mean(0)
    out = {"noise": float(scale.mean())}
    for name, where in REGIONS.items():
        out[f"KL, {name}"] = float(kl[where].mean())
        out[f"W1, {name}"] = float(w1[where].mean())
        out[f"std of functions, {name}"] = float(loc.std(0)[where].mean())
    return out


def benchmark_toy() -> list[dict[str, Any]]:
    """One row for each method and measure, over seeds of the method; and NUTS itself."""
    reference = nuts()
    rows = [
        {"part": "toy", "benchmark": f"NUTS, {name}", "mean": round(float(value), 4)}
        for name, value in {
            "noise": reference["scale"].mean(),
            "largest split R-hat of a function value": reference["rhat"].max(),
            "median split R-hat": np.median(reference["rhat"]),
            **{
                f"std of functions, {region}": reference["loc"].std(0)[where].mean()
                for region, where in REGIONS.items()
            },
        }.items()
    ]
    for name, predictive in PREDICTIVES.items():
        runs = [distances(reference, predictive(seed)) for seed in SEEDS]
        rows += [
            {"part": "toy"} | summary(f"{name}, {measure}", [run[measure] for run in runs])
            for measure in runs[0]
        ]
    return rows


def benchmark_over_seeds(part: str, experiment: Callable[[int], dict[str, float]]) -> list[Any]:
    runs = [experiment(seed) for seed in SEEDS]
    return [{"part": part} | summary(name, [run[name] for run in runs]) for name in runs[0]]


def run() -> list[dict[str, Any]]:
    """Measure everything of the suite."""
    speed = [{"part": "speed"} | r for r in (*benchmark_step(), *benchmark_large())]
    return [
        *speed,
        *benchmark_over_seeds("linear regression", linear_regression),
        {"part": "linear regression", "benchmark": f"plots/{plot_covariances().name}"},
        *benchmark_over_seeds("digits", digits_collapse),
        *benchmark_toy(),
    ]

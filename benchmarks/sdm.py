"""SDM: speed and memory of the search, and stand-ins for the paper's results over seeds.

The search for q and d against ``torch.cdist`` and a sort of each row; digits in four classes with
near and far OOD images; Fashion-MNIST (10,000 images) against the softmax of the same small
ConvNet, with MNIST, USPS and noise as OOD. Data is read from ``UQ_DATA`` or ``../shared/data``.
"""

from __future__ import annotations

import copy
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data import DATA
from benchmarks.measure import mean_rows, paired, row
from uq import MAPClassifier, SDMClassifier
from uq.calibration import auroc, expected_calibration_error, fpr_at_tpr
from uq.inference import match
from uq.nn import ConvNet

Row = dict[str, Any]
SEEDS = range(3)
QUERIES, SUPPORT, WIDTH, CLASSES = 10_000, 100_000, 64, 10
PEER_QUERIES, PEER_CHUNK = 512, 128
ALPHA = 0.9

# -- speed and memory ----------------------------------------------------------------------------


def exemplars(n: int, seed: int, *, integers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows around one centre a class, their labels, and predictions of which 5 % are wrong."""
    g = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (n,), generator=g)
    rows = centres[labels] + torch.randn(n, WIDTH, generator=g)
    wrong = torch.rand(n, generator=g) < 0.05
    other = torch.randint(CLASSES, (n,), generator=g)
    return rows.round() if integers else rows, labels, torch.where(wrong, other, labels)


def seconds(f: Callable[[], Any]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    return measure


def cdist_and_sort(h: Tensor, support: Tensor) -> None:
    """In chunks, since the whole is 16 GB; that costs nothing."""
    for part in h.split(PEER_CHUNK):
        torch.cdist(part, support).sort(1)


def benchmark_search() -> list[Row]:
    rows = []
    size = f"{SUPPORT:,} support rows × {WIDTH}"
    for kind, integers in (("Gaussian", False), ("integer (ties)", True)):
        support, labels, own = exemplars(SUPPORT, 0, integers=integers)
        h, _, predicted = exemplars(QUERIES, 1, integers=integers)
        few, few_predicted = h[:PEER_QUERIES], predicted[:PEER_QUERIES]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        match(h, predicted, support, labels, own)
        took = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        rows.append(
            row(f"q and d of {QUERIES:,} {kind} queries, {size}", "s", "", True, {"ours": took})
        )
        rows.append(
            row(
                f"memory that it adds, {kind} (all distances: 4,000 MB)",
                "MB",
                "< 400",
                grown < 400,
                {"ours": grown},
            )
        )
        measured = paired(
            seconds(lambda: cdist_and_sort(few, support)),  # noqa: B023
            seconds(lambda: match(few, few_predicted, support, labels, own)),  # noqa: B023
            repeats=3,
        )
        # Turned round: the ratio says how many times faster uq is.
        measured["ours"], measured["peer"] = measured["peer"], measured["ours"]
        name = f"{PEER_QUERIES} {kind} queries, {size}: torch.cdist and sort / uq"
        rows.append(row(name, "s", ">= 3 (higher is better)", measured["ratio"] >= 3, measured))
    return [{"part": "search", **r} for r in rows]


# -- digits: four classes of two digits each ------------------------------------------------------

PAIRS = {3: 0, 8: 0, 5: 1, 9: 1, 4: 2, 7: 2, 0: 3, 6: 3}


def digit_pairs(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Rows to fit and to test on, and what is not one of the eight digits."""
    X, digit = load_digits(return_X_y=True)
    X, rng = X / 16, np.random.default_rng(seed)
    known = np.isin(digit, list(PAIRS))
    inside, y = X[known], np.array([PAIRS[d] for d in digit[known]])
    order = rng.permutation(len(inside))
    fit, test = order[: 5 * len(order) // 6], order[5 * len(order) // 6 :]
    return {
        "fit": (inside[fit], y[fit]),
        "test": (inside[test], y[test]),
        "digits 1 and 2": (X[~known], None),
        "inverted": (1 - inside[test], None),
        "noise": (rng.uniform(size=(500, 64)), None),
    }


def softmax_of_the_logits(model: SDMClassifier, X: np.ndarray) -> np.ndarray:
    """What an ordinary softmax would say with the same adaptor and logits."""
    x, _ = model._posterior_at(X)
    posterior: Any = model.posterior_
    return posterior.judge(x).logits.softmax(1).numpy()


# The inputs as they are, and slow training as in the paper; and the estimator's own defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "paper's": {"base": nn.Identity(), "lr": 1e-3},
    "defaults": {},
}


def one_digits_fit(setting: str, seed: int) -> list[Row]:
    data = digit_pairs(seed)
    X, y = data.pop("fit")
    model = SDMClassifier(
        **SETTINGS[setting],
        alpha=ALPHA,
        exemplar_dim=32,
        n_rounds=2,
        max_epochs=60,
        batch_size=50,
        random_state=seed,
    ).fit(X, y)
    q, loss = model.history_["mean_q"], model.history_["held_out_loss"]
    rows = []
    for name, (inputs, labels) in data.items():
        checked = model.verify(inputs)
        plain = softmax_of_the_logits(model, inputs)
        confident = plain.max(1) >= ALPHA
        found = {
            "setting": setting,
            "data": name,
            "seed": seed,
            "sdm_share": checked["in_region"].mean(),
            "sdm_lower_share": checked["in_region_lower"].mean(),
            "softmax_share": confident.mean(),
        }
        if labels is not None:
            right = (checked["prediction"] == labels).to_numpy()
            table = model.region_accuracy(inputs, labels)["accuracy"]
            found |= {
                "accuracy_all": right.mean(),
                "sdm_accuracy": table["all", ""],
                "sdm_worst_true_class": table["true"].min(),
                "sdm_worst_predicted": table["predicted"].min(),
                "softmax_accuracy": (plain.argmax(1) == labels)[confident].mean(),
                "q_first": q[0],
                "q_last": q[-1],
                "loss_first": loss[0],
                "loss_best": min(loss),
            }
        rows.append(found)
    return rows


def benchmark_digits() -> list[Row]:
    """Shares answered at 0.9 by the region, by its lower end, and by a softmax >= 0.9."""
    rows = [r for s in SETTINGS for seed in range(5) for r in one_digits_fit(s, seed)]
    return [{"part": "digits", **r} for r in mean_rows(rows, ["setting", "data"], over="seed")]


# -- Fashion-MNIST ---------------------------------------------------------------------------------

N_TRAIN, N_TEST, N_OOD, EPOCHS = 10_000, 3_000, 1_000, 5


def images() -> dict[str, np.ndarray]:
    """Pixels of mean 0 and deviation 1 on Fashion-MNIST."""
    folder = DATA / "images"
    with np.load(folder / "fashion_mnist.npz") as file:
        data = {k: file[k] for k in ("X_train", "y_train", "X_test", "y_test")}
    with np.load(folder / "mnist.npz") as file:
        data["MNIST"] = file["X_test"][:N_OOD]
    if (folder / "usps_test.npz").exists():
        with np.load(folder / "usps_test.npz") as file:
            usps = torch.tensor((file["X_milli"] / 1000 + 1) / 2 * 255, dtype=torch.float32)
        usps = F.interpolate(usps[:N_OOD, None], size=(28, 28), mode="bilinear")[:, 0]
        data["USPS"] = usps.numpy()
    data["noise"] = np.random.default_rng(0).uniform(0, 255, size=(N_OOD, 28, 28))
    data["X_test"], data["y_test"] = data["X_test"][:N_TEST], data["y_test"][:N_TEST]
    return {
        k: v if k.startswith("y_") else ((v.astype(np.float32) / 255 - 0.286) / 0.353)
        for k, v in data.items()
    }


def conv(shape: Any, d_out: int) -> nn.Module:
    return ConvNet(shape, d_out)


def judged(probs: np.ndarray, log_p: np.ndarray, answered: np.ndarray, y: np.ndarray) -> Row:
    """Scores of class probabilities, and of the rows that would be answered at 0.95."""
    right = probs.argmax(1) == y
    given = [right[answered & (y == c)] for c in np.unique(y)]
    return {
        "accuracy": right.mean(),
        "nll": -log_p[np.arange(len(y)), y].mean(),
        "ece": expected_calibration_error(y, probs),
        "answered": answered.mean(),
        "accuracy_answered": right[answered].mean() if answered.any() else None,
        "worst_true_class": min((g.mean() for g in given if len(g)), default=None),
    }


def ood_row(answered: np.ndarray, inside: np.ndarray, outside: np.ndarray, name: str) -> Row:
    return {
        f"auroc_{name}": auroc(inside, outside),
        f"fpr95_{name}": fpr_at_tpr(inside, outside),
        f"answered_{name}": answered.mean(),
    }


def of_softmax(model: Any, data: dict[str, np.ndarray], ood: list[str]) -> Row:
    def predict(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dist: Any = model.predict_distribution(data[name])
        p = dist.probs.numpy()
        return p, p.max(1) >= 0.95, dist.logits[0].double().numpy()

    p, answered, log_p = predict("X_test")
    found = judged(p, log_p, answered, data["y_test"])
    for name in ood:
        p_new, answered, _ = predict(name)
        found |= ood_row(answered, -p.max(1), -p_new.max(1), name)
    return found


def of_sdm(model: SDMClassifier, data: dict[str, np.ndarray], ood: list[str]) -> Row:
    """OOD rows are those of small q', ties by small probability."""

    def score(checked: Any) -> np.ndarray:
        # Both in one number: q' is at least 0 and p is in (0, 1].
        order: np.ndarray = -(checked["q_prime"] + 1e-6 * checked["probability"]).to_numpy()
        return order

    dist: Any = model.predict_distribution(data["X_test"])
    checked = model.verify(data["X_test"])
    found = judged(
        dist.probs.numpy(),
        dist.logits[0].double().numpy(),
        checked["in_region"].to_numpy(),
        data["y_test"],
    )
    for name in ood:
        new = model.verify(data[name])
        found |= ood_row(new["in_region"].to_numpy(), score(checked), score(new), name)
    return found | {"q_min": model.q_min_ if np.isfinite(model.q_min_) else None}


def benchmark_fashion() -> list[Row]:
    data = images()
    ood = [name for name in ("MNIST", "USPS", "noise") if name in data]
    shared: dict[str, Any] = {"batch_size": 64, "device": "cpu"}
    rows = []
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(len(data["X_train"]))[:N_TRAIN]
        X, y = data["X_train"][order], data["y_train"][order].astype(np.int64)
        half = N_TRAIN // 2

        def softmax(n: int, seed: int = seed, X: np.ndarray = X, y: np.ndarray = y) -> Any:
            return MAPClassifier(
                module=conv,
                max_epochs=EPOCHS * N_TRAIN // n,
                patience=None,
                lr=1e-3,
                random_state=seed,
                **shared,
            ).fit(X[:n], y[:n])

        start = time.perf_counter()
        whole = softmax(N_TRAIN)
        took = time.perf_counter() - start
        rows.append(
            {"method": "softmax", "seed": seed, **of_softmax(whole, data, ood), "fit_s": took}
        )
        settings: dict[str, Any] = {"random_state": seed, "max_epochs": 20, **shared}
        for name, network, n in (
            ("SDM, network fitted to all rows", whole, 0),
            ("SDM, network fitted to half the rows", softmax(half), half),
        ):
            body = copy.deepcopy(network.posterior_.network.body)
            start = time.perf_counter()
            # The network's last layer is left out; SDM sees rows that it did not, if n > 0.
            model = SDMClassifier(body, layer="features", **settings).fit(X[n:], y[n:])
            took = time.perf_counter() - start
            rows.append({"method": name, "seed": seed, **of_sdm(model, data, ood), "fit_s": took})
    return [{"part": "fashion", **r} for r in mean_rows(rows, ["method"], over="seed")]


def run() -> list[Row]:
    """Measure everything of the suite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*benchmark_search(), *benchmark_digits(), *benchmark_fashion()]

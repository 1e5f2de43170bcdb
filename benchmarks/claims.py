"""What the papers claim, the smallest faithful setting of it here, and where its numbers are.

Values are looked up in ``results/``; a claim whose numbers are not there is "not run". "Reference"
is the authors' implementation (or what stands for it) measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd


class NotRun(KeyError):
    """A number that is not among the results."""


class Results:
    """Numbers of all suites by name: ``whole`` JSON files, and ``tables`` of tasks."""

    def __init__(
        self, whole: dict[str, list[dict[str, Any]]], tables: dict[str, pd.DataFrame]
    ) -> None:
        self.whole, self.tables = whole, tables

    def __call__(self, suite: str, column: str, **where: Any) -> float:
        """Value of ``column`` in the one row of ``suite`` that has all of ``where``."""
        found = [
            row[column]
            for row in self.whole.get(suite, [])
            if row.get(column) is not None and all(row.get(k) == v for k, v in where.items())
        ]
        if len(found) != 1:
            raise NotRun(f"{suite}: {len(found)} rows with {column} and {where}")
        return float(found[0])

    def pair(self, suite: str, metric: str, ours: str, theirs: str) -> pd.DataFrame:
        """Means over their common splits of two methods, one row a set."""
        table = self.tables.get(suite, pd.DataFrame())
        if metric not in table:
            raise NotRun(suite)
        chosen = table[table["method"].isin((ours, theirs))]
        wide = chosen.pivot_table(index=["set", "split"], columns="method", values=metric)
        if ours not in wide or theirs not in wide:
            raise NotRun(f"{suite}: {ours} or {theirs}")
        means = wide.dropna().groupby(level="set").mean()
        if means.empty:
            raise NotRun(f"{suite}: {ours} and {theirs} have no split in common")
        return means


@dataclass(frozen=True)
class Claim:
    """One row of a table of a paper's claims."""

    method: str
    claim: str
    source: str
    setting: str
    ours: Callable[[Results], dict[str, float]]
    reference: Callable[[Results], dict[str, float]] | None
    holds: Callable[[dict[str, float], dict[str, float]], bool]
    why_not: str = ""
    """Shown where it does not hold."""


Values = dict[str, float]


def means(suite: str, metric: str, method: str, other: str) -> Callable[[Results], Values]:
    """Mean over sets of a method's metric, on the splits that another has, too."""

    def found(r: Results) -> Values:
        pairs = r.pair(suite, metric, method, other)
        return {f"{metric.upper()}, mean of {len(pairs)} sets": float(pairs[method].mean())}

    return found


def close(a: Values, b: Values, within: float) -> bool:
    (x,), (y,) = a.values(), b.values()
    return abs(x - y) <= within


def wins(
    suite: str, metric: str, method: str, base: str, most_rows: float = float("inf")
) -> Callable[[Results], Values]:
    """Share of sets, of so many training rows, on which a method is at least as good as another."""

    def found(r: Results) -> Values:
        pairs = r.pair(suite, metric, method, base)
        n_train = r.tables[suite].groupby("set")["n_train"].max()
        pairs = pairs[n_train[pairs.index] <= most_rows]
        if pairs.empty:
            raise NotRun(f"{suite}: no set of at most {most_rows:g} training rows")
        share = float((pairs[method] <= pairs[base]).mean())
        return {f"share of {len(pairs)} sets": share}

    return found


def json_wins(
    suite: str, column: str, part: str, method: str, base: str, sets: tuple[str, ...]
) -> Callable[[Results], Values]:
    """The same from a suite that is measured as a whole."""

    def found(r: Results) -> Values:
        better = [
            r(suite, column, part=part, set=s, method=method)
            <= r(suite, column, part=part, set=s, method=base)
            for s in sets
        ]
        return {f"share of {len(sets)} sets": sum(better) / len(sets)}

    return found


def values(suite: str, **named: tuple[str, dict[str, Any]]) -> Callable[[Results], Values]:
    """Several numbers of one suite by name: (column, where)."""

    def found(r: Results) -> Values:
        return {
            name.replace("_", " "): r(suite, column, **where)
            for name, (column, where) in named.items()
        }

    return found


def noisy(method: str, measure: str) -> tuple[str, dict[str, Any]]:
    return "mean", {"benchmark": f"S1 noisy digits, {measure}, {method}"}


def implicit(part: str, label: str) -> tuple[str, dict[str, Any]]:
    return "mean", {"part": part, "benchmark": label}


UCI = ("yacht", "boston", "energy", "concrete")
DENSITY, STATIC = ({"part": "digits", "variant": v} for v in ("SSVI", "static mask"))

CLAIMS = (
    # -- IVON ------------------------------------------------------------------------------------
    Claim(
        "IVON",
        "A step costs about a fifth more than AdamW's",
        "Shen et al. 2024: GPT-2 wall time, 18.5 h against 15 h",
        "step of a 10.6 M MLP, seconds over AdamW's; reference: over ivon-opt's",
        values("ivon", ratio=("ratio", {"benchmark": "10.6 M MLP, step / AdamW foreach"})),
        values("ivon", ratio=("ratio", {"benchmark": "10.6 M MLP, step / ivon-opt"})),
        lambda a, b: a["ratio"] <= 1.25,
    ),
    Claim(
        "IVON",
        "More accurate than AdamW where networks over-fit, with a better NLL",
        "Shen et al. 2024: ImageNet ResNet-50, top-1 77.5 % against 75.2 %",
        "digits, 300 rows, a tenth of the labels wrong, weights at their mean; reference: AdamW",
        values("ivon", accuracy=noisy("ivon@mean", "accuracy"), nll=noisy("ivon@mean", "nll")),
        values("ivon", accuracy=noisy("adamw", "accuracy"), nll=noisy("adamw", "nll")),
        lambda a, b: a["accuracy"] > b["accuracy"] and a["nll"] < b["nll"],
    ),
    Claim(
        "IVON",
        "NLL falls with the draws at prediction and is flat from 16 or so",
        "a third party's sweep on CIFAR-10: 0.446 (1), 0.421 (8), 0.418 (32)",
        "the same digits, NLL by number of draws",
        values("ivon", **{f"{n}_draws": noisy(f"ivon x {n}", "nll") for n in (1, 8, 32, 64)}),
        None,
        lambda a, b: a["1 draws"] > a["8 draws"] > a["32 draws"] >= a["64 draws"] - 0.01,
    ),
    Claim(
        "IVON",
        "Same optimizer as the authors'",
        "reference implementation ivon-opt",
        "UCI regression, both in the same training loop",
        means("uci-regression", "nll", "IVON", "ivon-opt"),
        means("uci-regression", "nll", "ivon-opt", "IVON"),
        lambda a, b: close(a, b, 0.05),
    ),
    # -- VBLL ------------------------------------------------------------------------------------
    Claim(
        "VBLL",
        "A Bayesian last layer costs next to nothing beside the network",
        "Harrison et al. 2024: cost of the last layer alone",
        "fit of a 64-1024-1024-64 regressor, seconds over MAP's",
        values(
            "vbll",
            ratio=("ratio", {"benchmark": "fit, 64-1024-1024-64, regression, dense: VBLL / MAP"}),
        ),
        None,
        lambda a, b: a["ratio"] <= 1.2,
    ),
    Claim(
        "VBLL",
        "Better NLL than a deterministic network on most UCI tables",
        "Harrison et al. 2024, UCI regression",
        "UCI regression, defaults: share of sets with an NLL at least as good as MAP's",
        wins("uci-regression", "nll", "VBLL", "MAP"),
        wins("uci-regression", "nll", "vbll-package", "MAP"),
        lambda a, b: min(a.values()) > 0.5,
    ),
    Claim(
        "VBLL",
        "Calibration of image classifiers no worse than a softmax layer's",
        "Harrison et al. 2024, CIFAR-10; Fashion-MNIST by a third party",
        "images: share of sets with a debiased ECE at least as good as MAP's",
        wins("images", "ece_debiased", "VBLL", "MAP"),
        None,
        lambda a, b: min(a.values()) > 0.5,
    ),
    # -- SSVI ------------------------------------------------------------------------------------
    Claim(
        "SSVI",
        "10 to 20 times smaller than dense variational inference",
        "Li et al. 2024, abstract",
        "files of a mean-field network, dense over density 0.05",
        values(
            "ssvi", ratio=("ratio", {"benchmark": "dense mean-field file / file at density 0.05"})
        ),
        None,
        lambda a, b: a["ratio"] >= 10,
    ),
    Claim(
        "SSVI",
        "Accuracy falls by less than 3 points at a tenth of the weights",
        "Li et al. 2024, abstract",
        "digits, accuracy by draws; reference: the dense network",
        values("ssvi", accuracy=("accuracy_draws", DENSITY | {"density": 0.1})),
        values("ssvi", accuracy=("accuracy_draws", {"part": "digits", "variant": "dense"})),
        lambda a, b: a["accuracy"] > b["accuracy"] - 0.03,
    ),
    Claim(
        "SSVI",
        "A topology that moves beats one that stays",
        "Li et al. 2024, ablation",
        "digits, NLL by draws at density 0.1 and 0.03; reference: a static mask",
        values(
            "ssvi",
            at_10_percent=("nll_draws", DENSITY | {"density": 0.1}),
            at_3_percent=("nll_draws", DENSITY | {"density": 0.03}),
        ),
        values(
            "ssvi",
            at_10_percent=("nll_draws", STATIC | {"density": 0.1}),
            at_3_percent=("nll_draws", STATIC | {"density": 0.03}),
        ),
        lambda a, b: all(a[k] < b[k] for k in a),
    ),
    # -- ABNN ------------------------------------------------------------------------------------
    Claim(
        "ABNN",
        "Accuracy stays within a point of the network's",
        "Franchi et al. 2024, CIFAR tables",
        "Fashion-MNIST, 10,000 images; reference: the network",
        values("abnn", accuracy=("accuracy", {"part": "fashion", "method": "ABNN"})),
        values("abnn", accuracy=("accuracy", {"part": "fashion", "method": "softmax"})),
        lambda a, b: abs(a["accuracy"] - b["accuracy"]) <= 0.01,
    ),
    Claim(
        "ABNN",
        "Finds out-of-distribution inputs better than the network does",
        "Franchi et al. 2024: FPR95 lower by 6 points or more",
        "the same, AUROC by entropy; reference: the network",
        values(
            "abnn",
            MNIST=("auroc_mnist_entropy", {"part": "fashion", "method": "ABNN"}),
            USPS=("auroc_usps_entropy", {"part": "fashion", "method": "ABNN"}),
            noise=("auroc_noise_entropy", {"part": "fashion", "method": "ABNN"}),
        ),
        values(
            "abnn",
            MNIST=("auroc_mnist_entropy", {"part": "fashion", "method": "softmax"}),
            USPS=("auroc_usps_entropy", {"part": "fashion", "method": "softmax"}),
            noise=("auroc_noise_entropy", {"part": "fashion", "method": "softmax"}),
        ),
        lambda a, b: all(a[k] > b[k] for k in a),
        "not on all three: the network has group normalisation, the paper's batch normalisation",
    ),
    Claim(
        "ABNN",
        "Its spread marks strange inputs",
        "Franchi et al. 2024",
        "digits 8 and 9 unseen, mutual information; reference: on familiar digits",
        values("abnn", MI=("mi_out", {"part": "digits", "model": "tuned, channel 0.1"})),
        values("abnn", MI=("mi_in", {"part": "digits", "model": "tuned, channel 0.1"})),
        lambda a, b: a["MI"] >= 4 * b["MI"],
    ),
    # -- Evidential ------------------------------------------------------------------------------
    Claim(
        "Evidential",
        "I-EDL is more accurate than EDL and finds out-of-distribution inputs better",
        "Deng et al. 2023: CIFAR-10, accuracy 89.2 against 83.6 %",
        "Fashion-MNIST, 10,000 images, AUROC on MNIST; reference: EDL",
        values(
            "evidential",
            accuracy=("accuracy", {"part": "fashion", "method": "I-EDL"}),
            AUROC=("auroc_MNIST", {"part": "fashion", "method": "I-EDL"}),
        ),
        values(
            "evidential",
            accuracy=("accuracy", {"part": "fashion", "method": "EDL"}),
            AUROC=("auroc_MNIST", {"part": "fashion", "method": "EDL"}),
        ),
        lambda a, b: all(a[k] > b[k] for k in a),
    ),
    Claim(
        "Evidential",
        "Evidence beats softmax at finding out-of-distribution inputs",
        "Deng et al. 2023, MNIST and CIFAR-10 tables",
        "Fashion-MNIST against MNIST, AUROC of I-EDL; reference: softmax",
        values("evidential", AUROC=("auroc_MNIST", {"part": "fashion", "method": "I-EDL"})),
        values("evidential", AUROC=("auroc_MNIST", {"part": "fashion", "method": "softmax"})),
        lambda a, b: a["AUROC"] > b["AUROC"],
        "five epochs; critiques (Bengs et al., Shen et al.) expect no gain",
    ),
    Claim(
        "Evidential",
        "The evidential Turing process is better calibrated and finds strange inputs better",
        "Kandemir et al. 2022: Fashion-MNIST, NLL 0.29 against 0.37, AUROC 90.0 against 77.5 %",
        "digits 8 and 9 unseen; reference: EDL",
        values(
            "evidential",
            nll=("nll", {"part": "digits", "method": "etp"}),
            AUROC=("auroc_8_9", {"part": "digits", "method": "etp"}),
        ),
        values(
            "evidential",
            nll=("nll", {"part": "digits", "method": "edl"}),
            AUROC=("auroc_8_9", {"part": "digits", "method": "edl"}),
        ),
        lambda a, b: a["nll"] < b["nll"] and a["AUROC"] > b["AUROC"],
    ),
    # -- PartialBNN ------------------------------------------------------------------------------
    Claim(
        "PartialBNN",
        "Two moons: NLPD 0.288 ± 0.077, accuracy of a particle 0.887 ± 0.026",
        "Zhao et al. 2024, 100 runs",
        "the same data and network, random walk, 8 seeds",
        values(
            "smc",
            NLPD=("nlpd", {"part": "two moons", "method": "OHSMC rw"}),
            accuracy=("particle_accuracy", {"part": "two moons", "method": "OHSMC rw"}),
        ),
        values(
            "smc",
            NLPD=(
                "nlpd",
                {"part": "two moons", "method": "paper, 100 runs (accuracy per particle)"},
            ),
            accuracy=(
                "accuracy",
                {"part": "two moons", "method": "paper, 100 runs (accuracy per particle)"},
            ),
        ),
        lambda a, b: abs(a["NLPD"] - b["NLPD"]) <= 0.05 and a["accuracy"] >= b["accuracy"] - 0.026,
    ),
    Claim(
        "PartialBNN",
        "Synthetic regression: NLPD 1.49 in one run (1.419 is the truth's)",
        "Zhao et al. 2024, figure",
        "the same data and network, 5 seeds; reference: MAP",
        values("smc", NLPD=("nlpd", {"part": "synthetic regression", "method": "OHSMC rw"})),
        values("smc", NLPD=("nlpd", {"part": "synthetic regression", "method": "MAP"})),
        lambda a, b: 1.42 <= a["NLPD"] <= 1.60 and a["NLPD"] < b["NLPD"],
    ),
    Claim(
        "PartialBNN",
        "The cloud of particles beats one particle on UCI tables",
        "Zhao et al. 2024, UCI tables",
        "NLPD after 200 epochs: share of sets at least as good as one particle",
        json_wins("smc", "nlpd", "UCI, 200 epochs, 3 splits", "OHSMC ou", "OHSMC S = 1", UCI),
        None,
        lambda a, b: min(a.values()) > 0.5,
    ),
    # -- MaskedBNN -------------------------------------------------------------------------------
    Claim(
        "MaskedBNN",
        "The posterior turns nodes off, and fits no worse for it",
        "Kong et al. 2023, noisy cubic",
        "cubic, 20 rows, 100 nodes a layer, RMSE to x³; reference: all nodes on",
        values(
            "masked",
            nodes=("width_1", {"part": "cubic", "method": "masked"}),
            RMSE=("rmse", {"part": "cubic", "method": "masked"}),
        ),
        values(
            "masked",
            nodes=("width_1", {"part": "cubic", "method": "all nodes"}),
            RMSE=("rmse", {"part": "cubic", "method": "all nodes"}),
        ),
        lambda a, b: a["nodes"] < 0.6 * b["nodes"] and a["RMSE"] <= b["RMSE"],
    ),
    Claim(
        "MaskedBNN",
        "Better NLL than the Bayesian network of fixed width on UCI tables",
        "Kong et al. 2023, UCI tables",
        "128 training rows: share of sets at least as good as with all nodes on",
        json_wins("masked", "nll", "uci", "masked", "all nodes", UCI),
        None,
        lambda a, b: min(a.values()) > 0.5,
    ),
    Claim(
        "MaskedBNN",
        "Finds the width of the truth",
        "Kong et al. 2023, theory",
        "500 rows of a network with 3 nodes: most probable width",
        values("masked", mode=("mode", {"part": "three nodes", "width_penalty": 0.1})),
        None,
        lambda a, b: 3 <= a["mode"] <= 8,
    ),
    # -- ImplicitVI ------------------------------------------------------------------------------
    Claim(
        "ImplicitVI",
        "Learns correlations that a mean-field posterior cannot",
        "Uppal et al. 2023",
        "linear regression, relative error of the covariance; reference: mean-field",
        values(
            "implicit",
            error=implicit("linear regression", "implicit, relative error of the covariance"),
        ),
        values(
            "implicit",
            error=implicit("linear regression", "mean-field, relative error of the covariance"),
        ),
        lambda a, b: a["error"] < 0.05 < b["error"],
    ),
    Claim(
        "ImplicitVI",
        "The entropy term is what keeps the posterior from collapsing",
        "Uppal et al. 2023, ablation",
        "digits, permuted pixels as strange, AUROC of mutual information; reference: no entropy",
        values("implicit", AUROC=implicit("digits", "L': AUROC of mutual information")),
        values("implicit", AUROC=implicit("digits", "no entropy: AUROC of mutual information")),
        lambda a, b: a["AUROC"] >= 0.99 > b["AUROC"],
    ),
    Claim(
        "ImplicitVI",
        "Regression with a gap: noise near 0.3, spread in the gap above that on the data",
        "Uppal et al. 2023, toy",
        "the same data and network at prior weight 1; reference: NUTS",
        values(
            "implicit",
            noise=implicit("toy", "implicit VI, L', noise"),
            on_data=implicit("toy", "implicit VI, L', std of functions, data"),
            in_gap=implicit("toy", "implicit VI, L', std of functions, gap"),
        ),
        values(
            "implicit",
            noise=implicit("toy", "NUTS, noise"),
            on_data=implicit("toy", "NUTS, std of functions, data"),
            in_gap=implicit("toy", "NUTS, std of functions, gap"),
        ),
        lambda a, b: abs(a["noise"] - 0.3) < 0.06 and a["in gap"] > a["on data"],
        "the authors weigh the prior by 0.1; the whole prior makes the network smoother",
    ),
    # -- PFN -------------------------------------------------------------------------------------
    Claim(
        "PFN",
        "Its predictive is the exact Gaussian process's where the prior is one",
        "Müller et al. 2022, figures 3 and 7",
        "10 minutes of training on two cores: mean gap of the NLL to the exact one, nats",
        values("pfn", gap=("gap", {"part": "GP with known hyper-parameters", "n": "mean"})),
        None,
        lambda a, b: a["gap"] <= 0.05,
    ),
    Claim(
        "PFN",
        "As good as tuned gradient boosting on small tables",
        "Müller et al. 2022, table 1 (21 OpenML sets, 30 rows)",
        "UCI classification: share of sets with an NLL at least as good as gb-isotonic, of no more "
        "training rows than the contexts that its weights were trained on; reference: of all sets",
        # max_context in the model card, uq/weights/tabular-classification.md
        wins("uci-classification", "nll", "PFN", "gb-isotonic", most_rows=1000),
        wins("uci-classification", "nll", "PFN", "gb-isotonic"),
        lambda a, b: min(a.values()) >= 0.5,
    ),
    # -- SDM -------------------------------------------------------------------------------------
    Claim(
        "SDM",
        "Answers in the region are as accurate as promised, given each class",
        "Schmaltz 2026, tables 1 and 4: 0.98 to 1.0 at alpha 0.95",
        "digits in pairs, accuracy in the region; reference: softmax at the same threshold",
        values(
            "sdm",
            accuracy=("sdm_accuracy", {"part": "digits", "setting": "paper's", "data": "test"}),
            worst_class=(
                "sdm_worst_true_class",
                {"part": "digits", "setting": "paper's", "data": "test"},
            ),
        ),
        values(
            "sdm",
            accuracy=(
                "softmax_accuracy",
                {"part": "digits", "setting": "paper's", "data": "test"},
            ),
        ),
        lambda a, b: a["worst class"] >= 0.95,
    ),
    Claim(
        "SDM",
        "Next to nothing strange is answered",
        "Schmaltz 2026: 1 % of sentiment-OOD rows, where softmax answers 87 %",
        "unseen digits 1 and 2, share answered, settings of the paper and defaults; "
        "reference: softmax",
        values(
            "sdm",
            paper=("sdm_share", {"part": "digits", "setting": "paper's", "data": "digits 1 and 2"}),
            defaults=(
                "sdm_share",
                {"part": "digits", "setting": "defaults", "data": "digits 1 and 2"},
            ),
        ),
        values(
            "sdm",
            paper=(
                "softmax_share",
                {"part": "digits", "setting": "paper's", "data": "digits 1 and 2"},
            ),
            defaults=(
                "softmax_share",
                {"part": "digits", "setting": "defaults", "data": "digits 1 and 2"},
            ),
        ),
        lambda a, b: all(a[k] <= 0.1 * b[k] for k in a),
        "the default learning rate admits more rows, strange ones among them",
    ),
    Claim(
        "SDM",
        "Similarity rises and the loss falls over the epochs",
        "Schmaltz 2026, AG News: q 103 to 433, loss 0.389 to 0.218",
        "digits in pairs, first epoch; reference: last or best",
        values(
            "sdm",
            q=("q_first", {"part": "digits", "setting": "paper's", "data": "test"}),
            loss=("loss_first", {"part": "digits", "setting": "paper's", "data": "test"}),
        ),
        values(
            "sdm",
            q=("q_last", {"part": "digits", "setting": "paper's", "data": "test"}),
            loss=("loss_best", {"part": "digits", "setting": "paper's", "data": "test"}),
        ),
        lambda a, b: b["q"] > a["q"] and b["loss"] < a["loss"],
    ),
)

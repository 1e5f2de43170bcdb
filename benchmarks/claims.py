"""What the papers claim, the smallest faithful setting of it here, and where its numbers are.

Values are looked up in ``results/``; a claim whose numbers are not there is "not run". "Reference"
is what a method is compared with, measured in the same run: the authors' implementation where it
installs, else what the claim speaks of; a paper's own number only where the setting says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy.stats import ttest_1samp

from benchmarks.verdicts import Measured, Share, Verdict, above, alike, every, mostly, near


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
            row
            for row in self.whole.get(suite, [])
            if row.get(column) is not None and all(row.get(k) == v for k, v in where.items())
        ]
        if len(found) != 1:
            raise NotRun(f"{suite}: {len(found)} rows with {column} and {where}")
        (row,) = found
        is_mean = column == "mean"
        error = row.get("standard_error" if is_mean else f"{column}_se")
        each = tuple(row.get("each" if is_mean else f"{column}_each", ()))
        return Measured(row[column], math.nan if error is None else error, each)

    def pair(self, suite: str, metric: str, ours: str, theirs: str) -> pd.DataFrame:
        """Values of two methods on the splits that both have."""
        table = self.tables.get(suite, pd.DataFrame())
        if metric not in table:
            raise NotRun(suite)
        chosen = table[table["method"].isin((ours, theirs))]
        wide = chosen.pivot_table(index=["set", "split"], columns="method", values=metric)
        if ours not in wide or theirs not in wide:
            raise NotRun(f"{suite}: {ours} or {theirs}")
        if (both := wide.dropna()).empty:
            raise NotRun(f"{suite}: {ours} and {theirs} have no split in common")
        return both


@dataclass(frozen=True)
class Claim:
    """One row of a table of a paper's claims."""

    method: str
    claim: str
    source: str
    setting: str
    ours: Callable[[Results], dict[str, float]]
    reference: Callable[[Results], dict[str, float]] | None
    holds: Callable[[dict[str, float], dict[str, float]], Verdict]
    why_not: str = ""
    """Shown where it does not hold."""


Values = dict[str, float]


def largest_difference(suite: str, metric: str, a: str, b: str) -> Callable[[Results], Values]:
    """Difference of two methods on the set where it is largest, and the least p of all sets.

    Of t tests by set over its splits, times the number of sets (Bonferroni).
    """

    def found(r: Results) -> Values:
        pairs = r.pair(suite, metric, a, b)
        by_set = (pairs[a] - pairs[b]).groupby(level="set")
        means, count = by_set.mean(), by_set.count()
        worst = str(means.abs().idxmax())
        several = (x for _, x in by_set if len(x) > 1)
        p = min((float(ttest_1samp(x, 0).pvalue) for x in several), default=1.0)
        return {
            f"largest difference ({worst})": Measured(means[worst], float(by_set.sem()[worst])),
            f"p, least of {len(count)} sets": min(1.0, p * len(count)),
        }

    return found


def wins(suite: str, metric: str, method: str, base: str) -> Callable[[Results], Values]:
    """Sets on which a method is at least as good as another."""

    def found(r: Results) -> Values:
        means = r.pair(suite, metric, method, base).groupby(level="set").mean()
        return {"sets": Share(int((means[method] <= means[base]).sum()), len(means))}

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
        return {"sets": Share(sum(better), len(sets))}

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


def fpr95(method: str) -> dict[str, tuple[str, dict[str, Any]]]:
    where = {"part": "fashion", "method": method}
    return {k: (f"fpr95_{k.lower()}_entropy", where) for k in ("MNIST", "USPS", "noise")}


def on_fashion(method: str) -> dict[str, tuple[str, dict[str, Any]]]:
    where = {"part": "fashion", "method": method}
    strange = {k: (f"auroc_{k}", where) for k in ("MNIST", "USPS", "noise")}
    return {"accuracy": ("accuracy", where), **strange}


def on_digits(method: str) -> dict[str, tuple[str, dict[str, Any]]]:
    where = {"part": "digits", "method": method}
    columns = {"NLL": "nll", "ECE": "ece", "AUROC": "auroc_8_9"}
    return {name: (column, where) for name, column in columns.items()}


def gap(name: str, suffix: str = "") -> dict[str, tuple[str, dict[str, Any]]]:
    measures = {"noise": "noise", "on_data": "data", "in_gap": "gap"}
    return {
        k + suffix: implicit("toy", f"{name}, {m if m == 'noise' else f'std of functions, {m}'}")
        for k, m in measures.items()
    }


UCI = ("yacht", "boston", "energy", "concrete")
DENSITY, STATIC = ({"part": "digits", "variant": v} for v in ("SSVI", "static mask"))

CLAIMS = (
    # -- IVON ------------------------------------------------------------------------------------
    Claim(
        "IVON",
        "A step costs about a fifth more than AdamW's",
        "Shen et al. 2024: GPT-2 wall time, 18.5 h against 15 h",
        "step of a 10.6 M MLP, seconds over those of both AdamW in PyTorch; "
        "reference: over ivon-opt's",
        values(
            "ivon",
            foreach=("ratio", {"benchmark": "10.6 M MLP, step / AdamW foreach"}),
            fused=("ratio", {"benchmark": "10.6 M MLP, step / AdamW fused"}),
        ),
        values("ivon", ratio=("ratio", {"benchmark": "10.6 M MLP, step / ivon-opt"})),
        lambda a, b: all(ratio <= 1.25 for ratio in a.values()),
        "on a CPU a normal number for each weight and several passes over all of them take longer "
        "than AdamW's update, above all than the one pass of the fused",
    ),
    Claim(
        "IVON",
        "More accurate than AdamW where networks over-fit, with a better NLL",
        "Shen et al. 2024: ImageNet ResNet-50, top-1 77.5 % against 75.2 %",
        "digits, 300 rows, a tenth of the labels wrong, weights at their mean; reference: AdamW",
        values("ivon", accuracy=noisy("ivon@mean", "accuracy"), nll=noisy("ivon@mean", "nll")),
        values("ivon", accuracy=noisy("adamw", "accuracy"), nll=noisy("adamw", "nll")),
        lambda a, b: every(above(a["accuracy"], b["accuracy"]), above(b["nll"], a["nll"])),
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
        "UCI regression, NLL less that of ivon-opt in the same training loop",
        largest_difference("uci-regression", "nll", "IVON", "ivon-opt"),
        None,
        lambda a, b: alike(*a.values(), within=0.05),
    ),
    # -- VBLL ------------------------------------------------------------------------------------
    Claim(
        "VBLL",
        "A Bayesian last layer costs next to nothing beside the network",
        "Harrison et al. 2024: cost of the last layer alone",
        "fit of a regressor with 64-1024-1024-64 and with 64-64-64 units, seconds over MAP's",
        values(
            "vbll",
            wide=("ratio", {"benchmark": "fit, 64-1024-1024-64, regression, dense: VBLL / MAP"}),
            narrow=("ratio", {"benchmark": "fit, 64-64-64, regression, dense: VBLL / MAP"}),
        ),
        None,
        lambda a, b: all(ratio <= 1.2 for ratio in a.values()),
        "beside layers of 64 units a dense covariance of 64 × 64 is no small part",
    ),
    Claim(
        "VBLL",
        "Better NLL than a deterministic network on most UCI tables",
        "Harrison et al. 2024, UCI regression",
        "UCI regression, defaults: sets with an NLL at least as good as MAP's; reference: vbll's",
        wins("uci-regression", "nll", "VBLL", "MAP"),
        wins("uci-regression", "nll", "vbll-package", "MAP"),
        lambda a, b: mostly(a["sets"]),
    ),
    Claim(
        "VBLL",
        "Calibration of image classifiers no worse than a softmax layer's",
        "Harrison et al. 2024, CIFAR-10; Fashion-MNIST by a third party",
        "images: sets with a debiased ECE at least as good as MAP's",
        wins("images", "ece_debiased", "VBLL", "MAP"),
        None,
        lambda a, b: mostly(a["sets"]),
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
        "digits, density 0.1 of the large layers (sparsity is of all weights), accuracy by draws; "
        "reference: the dense network",
        values(
            "ssvi",
            accuracy=("accuracy_draws", DENSITY | {"density": 0.1}),
            sparsity=("sparsity", DENSITY | {"density": 0.1}),
        ),
        values("ssvi", accuracy=("accuracy_draws", {"part": "digits", "variant": "dense"})),
        lambda a, b: above(a["accuracy"], b["accuracy"], by=-0.03),
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
        lambda a, b: every(*(above(b[k], a[k]) for k in a)),
    ),
    # -- ABNN ------------------------------------------------------------------------------------
    Claim(
        "ABNN",
        "Accuracy stays within a point of the network's",
        "Franchi et al. 2024, CIFAR tables",
        "Fashion-MNIST, 10,000 images; reference: the network",
        values("abnn", accuracy=("accuracy", {"part": "fashion", "method": "ABNN"})),
        values("abnn", accuracy=("accuracy", {"part": "fashion", "method": "softmax"})),
        lambda a, b: above(a["accuracy"], b["accuracy"], by=-0.01),
    ),
    Claim(
        "ABNN",
        "Finds out-of-distribution inputs better than the network does",
        "Franchi et al. 2024: FPR95 lower by 6 points or more",
        "the same, FPR95 by entropy; reference: the network",
        values("abnn", **fpr95("ABNN")),
        values("abnn", **fpr95("softmax")),
        lambda a, b: every(*(above(b[k], a[k]) for k in a)),
        "the network has group normalisation, the paper's batch normalisation",
    ),
    Claim(
        "ABNN",
        "Its spread marks strange inputs",
        "Franchi et al. 2024",
        "digits 8 and 9 unseen, mutual information; reference: on familiar digits",
        values("abnn", MI=("mi_out", {"part": "digits", "model": "tuned, channel 0.1"})),
        values("abnn", MI=("mi_in", {"part": "digits", "model": "tuned, channel 0.1"})),
        lambda a, b: above(a["MI"], b["MI"], times=4),
    ),
    # -- Evidential ------------------------------------------------------------------------------
    Claim(
        "Evidential",
        "I-EDL is more accurate than EDL and finds out-of-distribution inputs better",
        "Deng et al. 2023: CIFAR-10, accuracy 89.2 against 83.6 %",
        "Fashion-MNIST, 10,000 images, accuracy and AUROC; reference: EDL",
        values("evidential", **on_fashion("I-EDL")),
        values("evidential", **on_fashion("EDL")),
        lambda a, b: every(*(above(a[k], b[k]) for k in a)),
        "strange images are not found better",
    ),
    Claim(
        "Evidential",
        "Evidence beats softmax at finding out-of-distribution inputs",
        "Deng et al. 2023, MNIST and CIFAR-10 tables",
        "Fashion-MNIST against MNIST, AUROC of I-EDL; reference: softmax",
        values("evidential", AUROC=("auroc_MNIST", {"part": "fashion", "method": "I-EDL"})),
        values("evidential", AUROC=("auroc_MNIST", {"part": "fashion", "method": "softmax"})),
        lambda a, b: above(a["AUROC"], b["AUROC"]),
        "five epochs; critiques (Bengs et al., Shen et al.) expect no gain",
    ),
    Claim(
        "Evidential",
        "The evidential Turing process is better calibrated and finds strange inputs better",
        "Kandemir et al. 2022: Fashion-MNIST, ECE 2.6 against 3.7 %, AUROC 90.0 against 77.5 %",
        "digits 8 and 9 unseen; reference: EDL",
        values("evidential", **on_digits("etp")),
        values("evidential", **on_digits("edl")),
        lambda a, b: every(above(b["ECE"], a["ECE"]), above(a["AUROC"], b["AUROC"])),
    ),
    # -- PartialBNN ------------------------------------------------------------------------------
    Claim(
        "PartialBNN",
        "Two moons: NLPD 0.288 ± 0.077, accuracy of a particle 0.887 ± 0.026",
        "Zhao et al. 2024, 100 runs",
        "the same data and network, random walk, 8 seeds; reference: the paper's numbers",
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
        lambda a, b: every(1.42 <= a["NLPD"] <= 1.60, above(b["NLPD"], a["NLPD"])),
    ),
    Claim(
        "PartialBNN",
        "The cloud of particles beats one particle on UCI tables",
        "Zhao et al. 2024, UCI tables",
        "NLPD after 200 epochs: sets at least as good as one particle",
        json_wins("smc", "nlpd", "UCI, 200 epochs, 3 splits", "OHSMC ou", "OHSMC S = 1", UCI),
        None,
        lambda a, b: mostly(a["sets"]),
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
        lambda a, b: every(a["nodes"] < 0.6 * b["nodes"], above(b["RMSE"], a["RMSE"])),
    ),
    Claim(
        "MaskedBNN",
        "Better NLL than the Bayesian network of fixed width on UCI tables",
        "Kong et al. 2023, UCI tables",
        "128 training rows: sets at least as good as with all nodes on; the largest split R-hat",
        lambda r: {
            **json_wins("masked", "nll", "uci", "masked", "all nodes", UCI)(r),
            "R-hat": max(r("masked", "rhat", part="uci", set=s, method="masked") for s in UCI),
        },
        None,
        lambda a, b: mostly(a["sets"]),
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
        lambda a, b: every(a["error"] < 0.05, above(b["error"], a["error"])),
    ),
    Claim(
        "ImplicitVI",
        "The entropy term is what keeps the posterior from collapsing",
        "Uppal et al. 2023, ablation",
        "digits, permuted pixels as strange, AUROC of mutual information; reference: no entropy",
        values("implicit", AUROC=implicit("digits", "L': AUROC of mutual information")),
        values("implicit", AUROC=implicit("digits", "no entropy: AUROC of mutual information")),
        lambda a, b: every(a["AUROC"] >= 0.99, above(a["AUROC"], b["AUROC"])),
    ),
    Claim(
        "ImplicitVI",
        "Regression with a gap: noise near 0.3, spread in the gap above that on the data",
        "Uppal et al. 2023, toy",
        "the same data, network and steps, the prior weighed by 0.1; (1) fewer steps, more inputs "
        "of the generator and the whole prior; reference: NUTS with the whole prior",
        values(
            "implicit", **gap("implicit VI, L', authors' settings"), **gap("implicit VI, L'", "_1")
        ),
        values("implicit", **gap("NUTS")),
        lambda a, b: every(near(a["noise"], 0.3, within=0.06), above(a["in gap"], a["on data"])),
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
        "UCI classification: sets with an NLL as good as that of gradient boosting, untuned and "
        "made calibrated by isotonic regression",
        wins("uci-classification", "nll", "PFN", "gb-isotonic"),
        None,
        lambda a, b: mostly(a["sets"]),
        "tables of thousands of rows, more than its weights were trained on",
    ),
    # -- SDM -------------------------------------------------------------------------------------
    Claim(
        "SDM",
        "Answers in the region are as accurate as promised, given each class",
        "Schmaltz 2026, tables 1 and 4: 0.98 to 1.0 at alpha 0.95",
        "digits in pairs, share answered and accuracy of it; reference: softmax at the same "
        "threshold",
        values(
            "sdm",
            answered=("sdm_share", {"part": "digits", "setting": "paper's", "data": "test"}),
            accuracy=("sdm_accuracy", {"part": "digits", "setting": "paper's", "data": "test"}),
            worst_class=(
                "sdm_worst_true_class",
                {"part": "digits", "setting": "paper's", "data": "test"},
            ),
        ),
        values(
            "sdm",
            answered=("softmax_share", {"part": "digits", "setting": "paper's", "data": "test"}),
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
        lambda a, b: every(*(above(b[k], a[k], times=10) for k in a)),
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
        lambda a, b: every(above(b["q"], a["q"]), above(a["loss"], b["loss"])),
    ),
)

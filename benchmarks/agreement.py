"""Our metrics beside those of other libraries on the same predictions, and why they differ."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from uq import calibration as ours
from uq.distributions import Empirical, NormalMixture, Parametric

N, K, BINS = 2000, 5, 15
RNG = np.random.default_rng(0)
LOGITS = 1.5 * RNG.standard_normal((N, K))
LABELS = (LOGITS + RNG.gumbel(size=(N, K))).argmax(1)
P = torch.softmax(torch.as_tensor(1.4 * LOGITS), -1).numpy()
TWO = np.stack([1 - P[:, 0], P[:, 0]], 1)
IS_ZERO = (LABELS == 0).astype(int)
RIGHT = (P.argmax(1) == LABELS).astype(int)
EDGE = np.array([[0.05, 0.95], [0.0, 1.0]])  # the last is a confidence of exactly 1

MEAN, SCALE = RNG.standard_normal(N), np.exp(0.3 * RNG.standard_normal(N))
Y = MEAN + 1.3 * SCALE * RNG.standard_normal(N)
NORMAL = NormalMixture(torch.as_tensor(MEAN)[None], torch.as_tensor(SCALE)[None])
DRAWS = MEAN + SCALE * RNG.standard_normal((200, N))
SCORE_IN, SCORE_OUT = RNG.standard_normal(500).round(1), 1 + RNG.standard_normal(300).round(1)

Case = tuple[str, str, Callable[[], float], Callable[[], float], str]


def agreement() -> list[dict[str, Any]]:
    """One row a metric and library: both values, their difference, and its reason."""
    rows = []
    for metric, library, our, their, reason in _cases():
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                a, b = float(our()), float(their())
            except ImportError as error:
                rows.append(_row(metric, library, math.nan, math.nan, f"not installed: {error}"))
                continue
        same = math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)
        rows.append(_row(metric, library, a, b, "" if same else reason or "UNEXPLAINED"))
    return rows


def _row(metric: str, library: str, a: float, b: float, reason: str) -> dict[str, Any]:
    digits = {"ours": float(f"{a:.7g}"), "theirs": float(f"{b:.7g}")}
    difference = float(f"{a - b:.2g}")
    return {
        "part": "agreement",
        "metric": metric,
        "library": library,
        **digits,
        "difference": difference,
        "reason": reason,
    }


def _cases() -> Iterator[Case]:
    yield from _class_cases()
    yield from _real_cases()
    yield from _ood_cases()


def _class_cases() -> Iterator[Case]:
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

    yield (
        "NLL",
        "scikit-learn",
        lambda: ours.negative_log_likelihood(LABELS, P),
        lambda: log_loss(LABELS, P),
        "",
    )
    yield (
        "Brier, two classes",
        "scikit-learn",
        lambda: ours.brier_score(IS_ZERO, TWO),
        lambda: brier_score_loss(IS_ZERO, TWO[:, 1]),
        "",
    )
    yield (
        "Brier, K classes",
        "scikit-learn",
        lambda: ours.brier_score(LABELS, P),
        lambda: brier_score_loss(LABELS, P),
        "",
    )
    yield (
        "AUROC of errors",
        "scikit-learn",
        lambda: ours.misclassification_auroc(LABELS, P),
        lambda: roc_auc_score(RIGHT, P.max(1)),
        "",
    )

    def torchmetrics_ece(p: np.ndarray, y: np.ndarray, norm: str, n_bins: int = BINS) -> float:
        from torchmetrics.functional import classification as tm

        if p.shape[1] > 2:
            args = torch.as_tensor(p), torch.as_tensor(y)
            return float(tm.multiclass_calibration_error(*args, p.shape[1], n_bins, norm))  # type: ignore[arg-type]
        args = torch.as_tensor(p[:, 1]), torch.as_tensor(y)
        return float(tm.binary_calibration_error(*args, n_bins, norm))  # type: ignore[arg-type]

    yield (
        "ECE, top label",
        "torchmetrics",
        lambda: ours.expected_calibration_error(LABELS, P),
        lambda: torchmetrics_ece(P, LABELS, "l1"),
        "",
    )
    yield (
        "ECE, two classes, positive",
        "torchmetrics",
        lambda: ours.expected_calibration_error(IS_ZERO, TWO, kind="positive"),
        lambda: torchmetrics_ece(TWO, IS_ZERO, "l1"),
        "",
    )
    yield (
        "ECE, a confidence of 1",
        "torchmetrics",
        lambda: ours.expected_calibration_error([1, 0], EDGE, n_bins=10, kind="positive"),
        lambda: torchmetrics_ece(EDGE, np.array([1, 0]), "l1", 10),
        (
            "torchmetrics gives confidence 1 a bin of its own beyond the last; by the definition B "
            "bins cover [0, 1], so that 1 belongs to the last, as in ours"
        ),
    )
    yield (
        "MCE",
        "torchmetrics",
        lambda: ours.maximum_calibration_error(LABELS, P),
        lambda: torchmetrics_ece(P, LABELS, "max"),
        "",
    )

    def netcal(name: str, **arguments: Any) -> float:
        from netcal import metrics

        return getattr(metrics, name)(**arguments).measure(P, LABELS)

    yield (
        "ECE, top label",
        "netcal",
        lambda: ours.expected_calibration_error(LABELS, P),
        lambda: netcal("ECE", bins=BINS),
        "",
    )
    yield (
        "ECE, equal mass",
        "netcal",
        lambda: ours.expected_calibration_error(LABELS, P, bins="equal_mass"),
        lambda: netcal("ECE", bins=BINS, equal_intervals=False),
        "",
    )
    yield (
        "ACE",
        "netcal",
        lambda: ours.expected_calibration_error(LABELS, P),
        lambda: netcal("ACE", bins=BINS),
        (
            "netcal's ACE is the unweighted mean over bins; ours weighs bins by their rows, which "
            "makes it an expectation"
        ),
    )
    yield (
        "MCE",
        "netcal",
        lambda: ours.maximum_calibration_error(LABELS, P),
        lambda: netcal("MCE", bins=BINS),
        "",
    )
    yield (
        "MMCE",
        "netcal",
        lambda: ours.mmce(LABELS, P),
        lambda: netcal("MMCE"),
        "",
    )


def _real_cases() -> Iterator[Case]:
    from pyro.ops.stats import crps_empirical
    from scipy.stats import norm
    from sklearn.metrics import mean_pinball_loss

    exact = Parametric(torch.distributions.Normal(torch.as_tensor(MEAN), torch.as_tensor(SCALE)))
    empirical = Empirical(torch.as_tensor(DRAWS))

    def scoringrules(name: str, *args: Any, **kwargs: Any) -> float:
        import scoringrules as sr

        return float(np.mean(getattr(sr, name)(*args, **kwargs)))

    def properscoring(name: str, *args: Any) -> float:
        import properscoring as ps

        return float(np.mean(getattr(ps, name)(*args)))

    yield (
        "NLL",
        "SciPy",
        lambda: ours.negative_log_likelihood(Y, NORMAL),
        lambda: -norm(MEAN, SCALE).logpdf(Y).mean(),
        "",
    )
    yield (
        "PIT, mean",
        "SciPy",
        lambda: ours.pit_values(Y, NORMAL).mean(),
        lambda: norm(MEAN, SCALE).cdf(Y).mean(),
        "",
    )
    yield (
        "CRPS, Normal",
        "scoringrules",
        lambda: ours.crps(Y, NORMAL),
        lambda: scoringrules("crps_normal", Y, MEAN, SCALE),
        "",
    )
    yield (
        "CRPS, Normal",
        "properscoring",
        lambda: ours.crps(Y, exact),
        lambda: properscoring("crps_gaussian", Y, MEAN, SCALE),
        "",
    )
    student = torch.distributions.StudentT(5.0, torch.as_tensor(MEAN), torch.as_tensor(SCALE))
    yield (
        "CRPS, Student t",
        "scoringrules",
        lambda: ours.crps(Y, Parametric(student)),
        lambda: scoringrules("crps_t", Y, 5.0, MEAN, SCALE),
        "",
    )
    yield (
        "CRPS, draws",
        "scoringrules",
        lambda: ours.crps(Y, empirical),
        lambda: scoringrules("crps_ensemble", Y, DRAWS.T, estimator="nrg"),
        "",
    )
    from uq.distributions import sample_crps

    yield (
        "CRPS, draws, fair",
        "scoringrules",
        lambda: sample_crps(DRAWS, Y, fair=True).mean(),
        lambda: scoringrules("crps_ensemble", Y, DRAWS.T, estimator="fair"),
        "",
    )
    yield (
        "CRPS, draws",
        "properscoring",
        lambda: ours.crps(Y, empirical),
        lambda: properscoring("crps_ensemble", Y, DRAWS.T),
        "",
    )
    yield (
        "CRPS, draws",
        "Pyro",
        lambda: ours.crps(Y, empirical),
        lambda: float(crps_empirical(torch.as_tensor(DRAWS), torch.as_tensor(Y)).mean()),
        "",
    )
    yield (
        "pinball, 90 %",
        "scikit-learn",
        lambda: ours.pinball_loss(Y, NORMAL, level=0.9),
        lambda: mean_pinball_loss(Y, norm(MEAN, SCALE).ppf(0.9), alpha=0.9),
        "",
    )
    lower, upper = norm(MEAN, SCALE).interval(0.9)
    yield (
        "interval score",
        "scoringrules",
        lambda: ours.interval_score(Y, NORMAL, coverage=0.9),
        lambda: scoringrules("interval_score", Y, lower, upper, alpha=0.1),
        "",
    )

    def toolbox(name: str, **arguments: Any) -> float:
        import uncertainty_toolbox as ut

        return float(getattr(ut.metrics, name)(MEAN, SCALE, Y, **arguments))

    yield (
        "NLL",
        "uncertainty-toolbox",
        lambda: ours.negative_log_likelihood(Y, NORMAL),
        lambda: toolbox("nll_gaussian", scaled=True),
        "",
    )
    yield (
        "CRPS, Normal",
        "uncertainty-toolbox",
        lambda: ours.crps(Y, NORMAL),
        lambda: toolbox("crps_gaussian", scaled=True),
        "",
    )
    yield (
        "quantile calibration error",
        "uncertainty-toolbox",
        lambda: ours.quantile_calibration_error(Y, NORMAL),
        lambda: toolbox("mean_absolute_calibration_error", prop_type="quantile"),
        ("99 levels 0.01 … 0.99 here; theirs are 100 levels 0 … 1, of which two are always right"),
    )
    yield (
        "sharpness",
        "uncertainty-toolbox",
        lambda: ours.sharpness(Y, NORMAL),
        lambda: float(_toolbox_sharpness()),
        "",
    )

    def netcal(name: str, **arguments: Any) -> float:
        from netcal.metrics import regression

        return float(np.mean(getattr(regression, name)(**arguments).measure((MEAN, SCALE), Y)))

    yield (
        "ENCE",
        "netcal",
        lambda: ours.expected_normalized_calibration_error(Y, NORMAL),
        lambda: netcal("ENCE", bins=10),
        "bins of equal width in the deviation there, of equal mass here: none rests on few rows",
    )
    yield (
        "UCE",
        "netcal",
        lambda: ours.uncertainty_calibration_error(Y, NORMAL),
        lambda: netcal("UCE", bins=10),
        "bins of equal width in the variance there, of equal mass here",
    )
    yield (
        "coverage, 90 %",
        "SciPy",
        lambda: ours.interval_coverage(Y, NORMAL, coverage=0.9),
        lambda: np.mean((lower <= Y) & (upper >= Y)),
        "",
    )


def _toolbox_sharpness() -> float:
    import uncertainty_toolbox as ut

    return ut.metrics.sharpness(SCALE)


def _ood_cases() -> Iterator[Case]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    is_out = np.r_[np.zeros(len(SCORE_IN)), np.ones(len(SCORE_OUT))]
    scores = np.r_[SCORE_IN, SCORE_OUT]
    yield (
        "AUROC",
        "scikit-learn",
        lambda: ours.auroc(SCORE_IN, SCORE_OUT),
        lambda: roc_auc_score(is_out, scores),
        "",
    )
    yield (
        "AUPR-out",
        "scikit-learn",
        lambda: ours.aupr_out(SCORE_IN, SCORE_OUT),
        lambda: average_precision_score(is_out, scores),
        "",
    )
    yield (
        "AUPR-in",
        "scikit-learn",
        lambda: ours.aupr_in(SCORE_IN, SCORE_OUT),
        lambda: average_precision_score(1 - is_out, -scores),
        "",
    )
    split = _conformal()
    yield "split conformal, upper end", "MAPIE", split[0], split[1], ""


def _conformal() -> tuple[Callable[[], float], Callable[[], float]]:
    """Mean upper end of split conformal intervals of a fixed model."""
    X, y = MEAN[:, None], Y

    def our() -> float:
        d = NormalMixture(torch.as_tensor(MEAN)[None], torch.tensor(1.0, dtype=torch.float64))
        fitted = ours.ConformalIntervals(score="residual", coverage=0.9).fit(d[:1000], y[:1000])
        return float(fitted.interval(d[1000:])[1].mean())

    def their() -> float:
        from mapie.regression import SplitConformalRegressor
        from sklearn.base import BaseEstimator, RegressorMixin

        class Identity(RegressorMixin, BaseEstimator):
            def fit(self, X: Any, y: Any) -> Any:
                self.n_features_in_ = 1
                return self

            def predict(self, X: Any) -> Any:
                return np.asarray(X)[:, 0]

        model = SplitConformalRegressor(
            Identity().fit(X, y), confidence_level=0.9, prefit=True
        ).conformalize(X[:1000], y[:1000])
        return float(model.predict_interval(X[1000:])[1][:, 1, 0].mean())

    return our, their

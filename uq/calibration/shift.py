"""What becomes of accuracy, calibration and uncertainty when inputs leave the training data.

:func:`shift_curve` follows metrics over the strength of a shift (a corruption, a distance in time
or place) where labels are known, and :meth:`ShiftCurve.check` says whether uncertainty rises as
accuracy falls. :func:`epistemic_drift` needs no labels: it tells whether new inputs make the model
more uncertain than familiar ones do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from uq.calibration.bootstrap import Estimate, Resampling, Sampled, estimates, sample_metrics
from uq.calibration.class_definitions import ACCURACY, CLASSIFICATION
from uq.calibration.definitions import MeanMetric, Metric
from uq.calibration.ood import ood_score
from uq.calibration.real_definitions import REGRESSION, RMSE, SHARPNESS
from uq.calibration.rows import ClassificationRows, Names, Rows, make_rows
from uq.distributions import ClassPredictive, RealPredictive
from uq.errors import DataError, NoEpistemicError, ParameterError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    from uq.distributions import Predictive

    Floats = NDArray[np.float64]

Task = Literal["classification", "regression"]

_DEFAULT: dict[Task, tuple[str, ...]] = {
    "classification": (
        "negative_log_likelihood",
        "accuracy",
        "mean_confidence",
        "expected_calibration_error",
        "mean_entropy",
        "mean_epistemic",
    ),
    "regression": (
        "negative_log_likelihood",
        "crps",
        "rmse",
        "coverage_90",
        "sharpness",
        "mean_epistemic",
    ),
}
_KNOWN: dict[Task, dict[str, Metric]] = {
    "classification": {m.name: m for section in CLASSIFICATION.values() for m in section},
    "regression": {m.name: m for section in REGRESSION.values() for m in section},
}


# -- the check ---------------------------------------------------------------------------------


class Change(NamedTuple):
    """A difference and its interval."""

    value: float
    low: float
    high: float


Verdict = Literal[
    "no rise in error", "unaware", "lags behind", "keeps pace", "overshoots", "undecided"
]
_MEANING: dict[Verdict, str] = {
    "no rise in error": "no rise in error that can be told from chance",
    "unaware": "the uncertainty does not rise with the error, so the model does not notice",
    "lags behind": "the uncertainty rises, but less than the error",
    "keeps pace": "the uncertainty rises as much as the error, within chance",
    "overshoots": "the uncertainty rises more than the error",
    "undecided": "too few rows to tell whether the uncertainty rises with the error",
}
_NAMES: dict[Task, tuple[str, str]] = {
    "classification": ("the error rate", "1 − mean confidence"),
    "regression": ("the RMSE", "the root mean predictive variance"),
}


@dataclass(frozen=True)
class ShiftCheck:
    """Whether uncertainty rises as accuracy falls, between two intensities; prints as a sentence.

    Attributes
    ----------
    task : {"classification", "regression"}
        What is predicted.
    reference, intensity : float
        Where the comparison starts and ends.
    error, uncertainty : Change
        Rise of the error, and of the uncertainty that should announce it: 1 − accuracy and
        1 − mean confidence, or RMSE and root mean predictive variance in target units. The two
        are equal, in expectation, for calibrated predictions.
    unannounced : Change
        Rise of the error less that of the uncertainty; 0 is right.
    verdict : str
        What the intervals say. "no rise in error"; or the error rises and the uncertainty does not
        ("unaware"), or by less ("lags behind"), as much ("keeps pace") or more ("overshoots"); or
        there are too few rows to tell ("undecided").
    interval : float
        Coverage of each interval.
    """

    task: Task
    reference: float
    intensity: float
    error: Change
    uncertainty: Change
    unannounced: Change
    verdict: Verdict
    interval: float

    def __str__(self) -> str:
        error, uncertainty = _NAMES[self.task]
        return (
            f"From intensity {self.reference:g} to {self.intensity:g}, {error} changes by "
            f"{_shown(self.error, self.interval)} and {uncertainty} by "
            f"{_shown(self.uncertainty, self.interval)}: {_MEANING[self.verdict]}."
        )


def _shown(change: Change, interval: float) -> str:
    value, low, high = (f"{v:+.3g}" for v in change)
    return f"{value} ({100 * interval:g} % interval {low} to {high})"


def _verdict(error: Change, uncertainty: Change, unannounced: Change) -> Verdict:
    if error.low <= 0:
        return "no rise in error"
    if unannounced.high < 0:
        return "overshoots"
    rises = uncertainty.low > 0
    if unannounced.low > 0:
        return "lags behind" if rises else "unaware"
    return "keeps pace" if rises else "undecided"


# -- curves ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShiftCurve:
    """Metrics against the intensity of a shift, with intervals; made by :func:`shift_curve`.

    Attributes
    ----------
    task : {"classification", "regression"}
        What is predicted.
    intensities : tuple of float
        In rising order.
    n_rows : tuple of int
        Rows at each intensity.
    metrics : tuple of Metric
        Definitions: ``name``, ``label``, ``definition``, ``better``.
    estimates : tuple of dict of str to Estimate
        Value and interval of each metric, at each intensity.
    interval : float
        Coverage of each interval.

    See Also
    --------
    shift_curve : makes one; its example prints the table and the verdict.
    """

    task: Task
    intensities: tuple[float, ...]
    n_rows: tuple[int, ...]
    metrics: tuple[Metric, ...] = field(repr=False)
    estimates: tuple[dict[str, Estimate], ...] = field(repr=False)
    interval: float
    # Error and uncertainty of the check: values (levels, 2), replicates (resamples, levels, 2).
    _tracked: Sampled = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each metric and intensity.

        Returns
        -------
        DataFrame
            Columns ``metric``, ``intensity``, ``n_rows``, ``value``, ``low``, ``high``; NaN where
            undefined.
        """
        import pandas as pd

        levels = list(zip(self.intensities, self.n_rows, self.estimates, strict=True))
        found = [
            (m.name, intensity, n, e[m.name].value, e[m.name].low, e[m.name].high)
            for m in self.metrics
            for intensity, n, e in levels
        ]
        columns = ["metric", "intensity", "n_rows", "value", "low", "high"]
        return pd.DataFrame(found, columns=columns)

    def check(
        self, intensity: float | None = None, *, reference: float | None = None
    ) -> ShiftCheck:
        """Check whether uncertainty rises as accuracy falls.

        Parameters
        ----------
        intensity : float, optional
            Where to look; by default the strongest shift.
        reference : float, optional
            What to compare with; by default the weakest shift, which should be none at all.

        Returns
        -------
        ShiftCheck
            Changes with bootstrap intervals, and a verdict; ``print`` shows a sentence.

        Raises
        ------
        ParameterError
            If an intensity is not in the curve, or the two are the same.
        DataError
            If there is a single row at one of them.
        """
        where = "ShiftCurve.check"
        start = self._position(where, "reference", reference, 0)
        end = self._position(where, "intensity", intensity, len(self.intensities) - 1)
        if start == end:
            raise ParameterError(
                f"{where}: intensity and reference are both {self.intensities[end]:g}; choose two "
                f"of {list(self.intensities)}."
            )
        if min(self.n_rows[start], self.n_rows[end]) < 2:
            raise DataError(f"{where} needs at least two rows at each intensity, got one.")
        value = self._tracked.values[end] - self._tracked.values[start]
        moved = self._tracked.replicates[:, end] - self._tracked.replicates[:, start]
        tails = Resampling(self.interval).tails
        error, uncertainty, unannounced = (
            Change(float(value @ signs), *map(float, np.quantile(moved @ signs, tails)))
            for signs in ((1, 0), (0, 1), (1, -1))
        )
        return ShiftCheck(
            self.task,
            self.intensities[start],
            self.intensities[end],
            error,
            uncertainty,
            unannounced,
            _verdict(error, uncertainty, unannounced),
            self.interval,
        )

    def _position(self, where: str, name: str, intensity: float | None, default: int) -> int:
        if intensity is None:
            return default
        if intensity not in self.intensities:
            raise ParameterError(
                f"{where}: {name} must be one of {list(self.intensities)}, got {intensity!r}."
            )
        return self.intensities.index(intensity)

    def plot(
        self,
        metrics: str | Sequence[str] | None = None,
        *,
        axes: Any = None,
        label: str | None = None,
    ) -> list[Axes]:
        """Draw each metric against the intensity, with its interval.

        Parameters
        ----------
        metrics : str or sequence of str, optional
            Names of metrics of the curve; by default all that are defined somewhere.
        axes : sequence of Matplotlib Axes, optional
            Where to draw, one for each metric; by default a new figure. Those returned for one
            method can be given for the next.
        label : str, optional
            What the legend of the first panel calls the curve, such as the name of the method.

        Returns
        -------
        list of Axes
            One a metric. A dashed line is what coverage should be.

        Raises
        ------
        ParameterError
            If a metric is not in the curve, or there are too few axes.
        """
        frame = self.to_frame().replace([np.inf, -np.inf], np.nan)
        known = {m.name: m for m in self.metrics}
        if metrics is None:
            metrics = frame["metric"][frame["value"].notna()].unique().tolist()
        metrics = [metrics] if isinstance(metrics, str) else metrics
        chosen = [_pick("ShiftCurve.plot", known, name) for name in metrics]
        drawn = _axes(axes, len(chosen))
        for ax, metric in zip(drawn, chosen, strict=True):
            points = frame[frame["metric"] == metric.name]
            (line,) = ax.plot(points["intensity"], points["value"], marker="o", label=label)
            ax.fill_between(
                points["intensity"],
                points["low"],
                points["high"],
                color=line.get_color(),
                alpha=0.2,
            )
            if isinstance(metric, MeanMetric) and metric.target is not None:
                ax.axhline(metric.target, color="0.5", linewidth=1, linestyle="--")
            ax.set(xlabel="Intensity of the shift", ylabel=metric.label)
        if label is not None and drawn:
            drawn[0].legend(frameon=False)
        return drawn


def _axes(axes: Any, count: int) -> list[Axes]:
    if axes is None:
        import matplotlib.pyplot as plt

        size = (3.4 * count, 3.0)
        _, axes = plt.subplots(1, count, squeeze=False, figsize=size, layout="constrained")
    given: list[Axes] = list(np.ravel(axes))
    if len(given) < count:
        raise ParameterError(
            f"ShiftCurve.plot: axes must hold {count}, one a metric, got {len(given)}; name fewer "
            "metrics."
        )
    return given[:count]


def _pick(where: str, known: Mapping[str, Metric], name: Any) -> Metric:
    if name not in known:
        raise ParameterError(f"{where}: metrics must be among {', '.join(known)}, got {name!r}.")
    return known[name]


def shift_curve(
    y_true: ArrayLike | Tensor | Mapping[float, ArrayLike | Tensor],
    predictions: Mapping[float, Any],
    *,
    metrics: str | Sequence[str] | None = None,
    interval: float = 0.95,
    n_resamples: int = 1000,
    random_state: int = 0,
) -> ShiftCurve:
    """Follow metrics over the intensity of a shift.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m), or mapping of float to array-like
        Labels or targets. An array belongs to the same rows at every intensity (one test set,
        corrupted more and more): resamples are then shared, which makes changes sharper. A mapping
        {intensity: array} holds those of different, independent rows.
    predictions : mapping of float to Predictive, or to class probabilities
        Predictions at each intensity, two at least, as the metrics take them.
    metrics : str or sequence of str, optional
        Names as in reports, such as "brier_score" or "coverage_50". Default: for classes
        "negative_log_likelihood", "accuracy", "mean_confidence", "expected_calibration_error",
        "mean_entropy" and "mean_epistemic"; for targets "negative_log_likelihood", "crps", "rmse",
        "coverage_90", "sharpness" and "mean_epistemic" (NaN where the method has none).
    interval : float, default=0.95
        Coverage of each interval, in (0, 1).
    n_resamples : int, default=1000
        Resamples of the rows behind the intervals, >= 100.
    random_state : int, default=0
        Seed of the resamples.

    Returns
    -------
    ShiftCurve
        With ``to_frame()``, ``plot()`` and ``check()``. Intervals are those of reports: exact for
        shares of rows, corrected for what chance adds to calibration errors, else bootstrap
        percentiles. They cover the choice of test rows, not that of training data.

    Raises
    ------
    DataError
        If labels do not fit predictions, or the predictions are not all of one task.
    ParameterError
        If a metric or setting cannot be used.

    See Also
    --------
    epistemic_drift : without labels.

    References
    ----------
    Y. Ovadia et al. "Can you trust your model's uncertainty? Evaluating predictive uncertainty
    under dataset shift." NeurIPS 2019. arXiv:1906.02530.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from uq.calibration import shift_curve
    >>> from uq.distributions import NormalMixture
    >>> y = np.random.default_rng(0).normal(size=500)
    >>> shifted = {d: NormalMixture(torch.full((1, 500), d), torch.tensor(1.0)) for d in (0.0, 2.0)}
    >>> curve = shift_curve(y, shifted, metrics=["rmse", "coverage_90"])
    >>> curve.to_frame().round(2)
            metric  intensity  n_rows  value   low  high
    0         rmse        0.0     500   1.01  0.95  1.09
    1         rmse        2.0     500   2.27  2.18  2.36
    2  coverage_90        0.0     500   0.92  0.89  0.94
    3  coverage_90        2.0     500   0.36  0.31  0.40
    >>> curve.check().verdict  # the predictive variance stays the same
    'unaware'
    """
    where = "shift_curve"
    settings = Resampling(interval, n_resamples, random_state)
    settings.check(where)
    intensities = _intensities(where, y_true, predictions)
    rows = [
        make_rows(
            y_true[key] if isinstance(y_true, Mapping) else y_true,
            predictions[key],
            Names(where, f"y_true at intensity {key:g}", f"predictions[{key:g}]"),
        )
        for key in intensities
    ]
    if len({type(r) for r in rows}) > 1:
        raise DataError(
            f"{where}: predictions must be all of classes or all of real targets, got both."
        )
    task: Task = "classification" if isinstance(rows[0], ClassificationRows) else "regression"
    metrics = [metrics] if isinstance(metrics, str) else metrics
    names = _DEFAULT[task] if metrics is None else metrics
    chosen = [_pick(where, _KNOWN[task], name) for name in names]
    if not chosen:
        raise ParameterError(f"{where}: metrics is empty; name one, or pass None.")
    tracked = _TRACKED[task]
    sampled = _sample(rows, [*tracked, *chosen], settings, paired=not isinstance(y_true, Mapping))
    values, replicates = sampled.values, sampled.replicates
    own = Sampled(values[:, 2:], replicates[:, :, 2:])
    pair = Sampled(values[:, :2], replicates[:, :, :2])
    if task == "classification":  # accuracy and confidence become error and uncertainty
        pair = Sampled(1 - pair.values, 1 - pair.replicates)
    return ShiftCurve(
        task,
        tuple(float(key) for key in intensities),
        tuple(len(r.y) for r in rows),
        tuple(chosen),
        tuple(estimates(own, chosen, settings, rows)),
        interval,
        pair,
    )


_TRACKED: dict[Task, tuple[Metric, Metric]] = {
    "classification": (ACCURACY, _KNOWN["classification"]["mean_confidence"]),
    "regression": (RMSE, SHARPNESS),
}


def _intensities(where: str, y_true: Any, predictions: Any) -> list[Any]:
    if not isinstance(predictions, Mapping) or len(predictions) < 2:
        raise DataError(
            f"{where}: predictions must map at least two intensities to predictions, got "
            f"{len(predictions) if isinstance(predictions, Mapping) else type(predictions)}."
        )
    for key in predictions:
        if not isinstance(key, int | float | np.number) or not np.isfinite(key):
            raise DataError(f"{where}: intensities must be finite numbers, got {key!r}.")
    if isinstance(y_true, Mapping) and set(y_true) != set(predictions):
        raise DataError(
            f"{where}: y_true has the intensities {sorted(y_true)}, predictions have "
            f"{sorted(predictions)}; they must be the same."
        )
    return sorted(predictions)


def _sample(
    rows: Sequence[Rows], metrics: Sequence[Metric], settings: Resampling, *, paired: bool
) -> Sampled:
    """Sample all intensities on the same resamples, or each on its own."""
    if paired:
        return sample_metrics(rows, metrics, settings)
    # Seeds differ, so that the intensities are resampled independently of one another.
    parts = [
        sample_metrics([r], metrics, replace(settings, seed=settings.seed + i))
        for i, r in enumerate(rows)
    ]
    return Sampled(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.replicates for part in parts], axis=1),
    )


# -- drift -------------------------------------------------------------------------------------

_EXACT_PAIRS = 10_000  # the exact law of the rank test costs more with each pair of rows


@dataclass(frozen=True)
class Drift:
    """How the uncertainty of new rows differs from that of reference rows; prints as words.

    Attributes
    ----------
    kind : {"epistemic", "total"}
        Which uncertainty was compared.
    unit : str
        "nats" for classes, "squared target units" for real targets.
    reference, new : float
        Mean uncertainty of each group of rows.
    shift, low, high : float
        Difference ``new − reference`` and its interval (Welch's); NaN ends where there is a single
        row or infinite uncertainty.
    auroc : float
        Probability that a new row is the more uncertain of two, a tie counting one half: 0.5 is no
        drift, and the size of one that does not depend on the number of rows.
    p_value : float
        Two-sided Mann–Whitney test that the uncertainties of both groups are equally distributed.
    n_reference, n_new : int
        Numbers of rows.
    interval : float
        Coverage of the interval; the words call p-values under 1 − interval a drift.

    See Also
    --------
    epistemic_drift : makes one; its example prints the words.
    """

    kind: Literal["epistemic", "total"]
    unit: str
    reference: float
    new: float
    shift: float
    low: float
    high: float
    auroc: float
    p_value: float
    n_reference: int
    n_new: int
    interval: float

    def __str__(self) -> str:
        p = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        if self.p_value >= 1 - self.interval:
            found = "no drift that can be told from chance"
        else:
            found = f"the model is {'more' if self.auroc > 0.5 else 'less'} uncertain on new rows"
        change = _shown(Change(self.shift, self.low, self.high), self.interval)
        return (
            f"Mean {self.kind} uncertainty is {self.reference:.3g} {self.unit} on "
            f"{self.n_reference} reference rows and {self.new:.3g} on {self.n_new} new rows, a "
            f"change of {change}; a new row is the more uncertain of two with probability "
            f"{self.auroc:.3f} ({p}): {found}."
        )


def epistemic_drift(
    reference: Predictive,
    new: Predictive,
    *,
    kind: Literal["auto", "epistemic", "total"] = "auto",
    interval: float = 0.95,
) -> Drift:
    """Test whether new rows make a model more, or less, uncertain than reference rows do.

    Parameters
    ----------
    reference : Predictive
        Predictions of a model for rows that are like the training data but were not in it: on
        training rows a model is more certain than on any others, which would pass for drift.
    new : Predictive
        Predictions of the same model for the rows in question.
    kind : {"auto", "epistemic", "total"}, default="auto"
        Epistemic uncertainty (mutual information in nats, or the variance of the mean), which is
        what unfamiliar inputs raise; or the total (entropy, or variance), which noisier inputs
        raise too. "auto" is epistemic, or total where the method has no epistemic one; the result
        says which.
    interval : float, default=0.95
        Coverage of the interval of the shift, in (0, 1).

    Returns
    -------
    Drift
        ``shift``, ``low``, ``high``, ``auroc``, ``p_value``, …; ``print`` shows words.

    Raises
    ------
    DataError
        If the two are not predictive distributions over the same kind of target.
    NoEpistemicError
        If ``kind`` is "epistemic" and the method has none.
    ParameterError
        If ``kind`` or ``interval`` cannot be used.

    See Also
    --------
    shift_curve : what a shift costs, where labels are known.
    uq.calibration.auroc : the same probability for any score.

    Notes
    -----
    The test holds for independent rows, whatever the quality of the model, and is a test of ranks:
    few rows of huge uncertainty do not decide it. With many rows the smallest drift is significant;
    its size is ``auroc``. A shift that the model does not notice is not found, and p-values that
    are looked at every day need a correction for that. Variances of several outputs are averaged.

    References
    ----------
    H. B. Mann, D. R. Whitney, Annals of Mathematical Statistics 18 (1947).

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import epistemic_drift
    >>> from uq.distributions import NormalMixture
    >>> draws = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    >>> known, moved = (NormalMixture(s * draws, torch.tensor(1.0)) for s in (1.0, 1.5))
    >>> print(epistemic_drift(known, moved))
    Mean epistemic uncertainty is 0.979 squared target units on 100 reference rows and 2.2 on 100
    new rows, a change of +1.22 (95 % interval +1.05 to +1.4); a new row is the more uncertain of
    two with probability 0.940 (p < 0.001): the model is more uncertain on new rows.
    """
    where = "epistemic_drift"
    settings = Resampling(interval)
    settings.check(where)
    if kind not in ("auto", "epistemic", "total"):
        raise ParameterError(f"{where}: kind must be 'auto', 'epistemic' or 'total', got {kind!r}.")
    for name, given in (("reference", reference), ("new", new)):
        if not isinstance(given, ClassPredictive | RealPredictive):
            raise DataError(
                f"{where}: {name} must be a predictive distribution of uq, got a "
                f"{type(given).__name__}."
            )
    classes = isinstance(reference, ClassPredictive)
    if classes != isinstance(new, ClassPredictive):
        raise DataError(
            f"{where}: reference and new must be predictions of the same model, got a "
            f"{type(reference).__name__} and a {type(new).__name__}."
        )
    found, (a, b) = _scores(reference, new, kind, "entropy" if classes else "variance")
    for name, scores in (("reference", a), ("new", b)):
        if len(scores) == 0 or np.isnan(scores).any():
            raise DataError(f"{where}: {name} holds no rows, or uncertainty that is NaN.")
    shift, low, high = _welch(a, b, settings)
    area, p_value = _rank_test(a, b)
    return Drift(
        found,
        "nats" if classes else "squared target units",
        float(a.mean()),
        float(b.mean()),
        shift,
        low,
        high,
        area,
        p_value,
        len(a),
        len(b),
        interval,
    )


def _scores(
    reference: Predictive, new: Predictive, kind: str, total: Literal["entropy", "variance"]
) -> tuple[Literal["epistemic", "total"], tuple[Floats, Floats]]:
    if kind != "total":
        try:
            return "epistemic", (ood_score(reference, "epistemic"), ood_score(new, "epistemic"))
        except NoEpistemicError:
            if kind == "epistemic":
                raise
    return "total", (ood_score(reference, total), ood_score(new, total))


def _welch(a: Floats, b: Floats, settings: Resampling) -> Change:
    """Mean of ``b`` less that of ``a``, for unequal variances."""
    from scipy.stats import t

    with np.errstate(invalid="ignore"):  # ∞ − ∞
        shift = float(b.mean() - a.mean())
    if min(len(a), len(b)) < 2 or not np.isfinite(shift):
        return Change(shift, np.nan, np.nan)
    parts = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
    if not parts.any():
        return Change(shift, shift, shift)
    freedom = parts.sum() ** 2 / (parts**2 / [len(a) - 1, len(b) - 1]).sum()
    low, high = shift + np.sqrt(parts.sum()) * t.ppf(settings.tails, freedom)
    return Change(shift, float(low), float(high))


def _rank_test(a: Floats, b: Floats) -> tuple[float, float]:
    """P(b > a) + ½ P(b = a), and the two-sided p-value of "equally distributed"."""
    from scipy.stats import mannwhitneyu

    distinct = len(np.unique(np.concatenate([a, b])))
    if distinct == 1:
        return 0.5, 1.0
    untied = distinct == len(a) + len(b)
    method = "exact" if untied and len(a) * len(b) <= _EXACT_PAIRS else "asymptotic"
    test = mannwhitneyu(b, a, method=method)
    return float(test.statistic) / (len(a) * len(b)), float(test.pvalue)

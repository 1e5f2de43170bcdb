"""Metrics of predicted classes on held-out labels, in the style of scikit-learn.

Every function takes a predictive distribution, or the probabilities themselves: an array of shape
(n, n_classes) whose columns are the labels 0, 1, …, or a DataFrame whose columns are the labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from uq.calibration.class_definitions import (
    ACCURACY,
    AUGRC,
    AURC,
    BRIER,
    EXCESS_AURC,
    MISCLASSIFICATION_AUROC,
    MMCE,
    N_BINS,
    NLL,
    SMOOTH,
    BinKind,
    Kind,
    accuracy_at_metric,
    classwise_metric,
    debiased_metric,
    ece_metric,
    mce_metric,
)
from uq.calibration.definitions import TIE, Metric, TestResult
from uq.calibration.documentation import documented
from uq.calibration.rows import (
    BinaryRows,
    ClassificationRows,
    Names,
    RegressionRows,
    check_count,
    check_share,
    check_weight,
    make_rows,
)
from uq.errors import ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

    Prediction = Any  # ClassPredictive, array (n, n_classes) or DataFrame


def _score(
    metric: Metric,
    rows: ClassificationRows | BinaryRows | RegressionRows,
    sample_weight: ArrayLike | None,
    where: str,
) -> float:
    return metric.value(rows, check_weight(where, sample_weight, len(rows.y)))


def _by_kind(
    where: str,
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    kind: Kind | None,
) -> ClassificationRows | BinaryRows:
    """Rows as the probability of the most probable class, or of ``classes[1]``."""
    if kind not in (None, "top_label", "positive"):
        raise ParameterError(f"{where}: kind must be 'top_label' or 'positive', got {kind!r}.")
    rows = ClassificationRows(y_true, prediction, Names(where))
    n_classes = rows.probs.shape[1]
    if n_classes == 2 and kind is None:
        raise ParameterError(
            f"{where}: two classes need kind='top_label' or kind='positive', which differ."
        )
    if n_classes != 2 and kind == "positive":
        raise ParameterError(f"{where}: kind='positive' needs two classes, got {n_classes}.")
    return rows.positive() if kind == "positive" else rows


# -- scores ------------------------------------------------------------------------------------


@documented
def negative_log_likelihood(
    y_true: ArrayLike | Tensor,
    prediction: Any,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Mean negative log predictive probability (classes) or density (targets).

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Labels, as in ``prediction.classes``, or targets.
    prediction : Predictive, or class probabilities of shape (n, n_classes)
        Predictive distribution of the same rows, of classes or of targets.
    {sample_weight}

    Returns
    -------
    float
        Σ w_i (−log p(y_i)) / Σ w_i in nats; lower is better. Several outputs are scored jointly.
        Nothing is clipped: a label of probability 0 gives inf, with a RuntimeWarning. NaN for a
        distribution that is given by samples and so has no density: use :func:`crps`.

    Raises
    ------
    DataError
        If shapes do not match, ``y_true`` holds NaN, or a label is not among the classes.

    See Also
    --------
    sklearn.metrics.log_loss : clips probabilities.

    Examples
    --------
    >>> from uq.calibration import negative_log_likelihood
    >>> round(negative_log_likelihood([0, 1], [[0.25, 0.75], [0.5, 0.5]]), 4)  # log 8 / 2
    1.0397
    """
    where = "negative_log_likelihood"
    return _score(NLL, make_rows(y_true, prediction, Names(where)), sample_weight, where)


@documented
def brier_score(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Mean squared distance of the class probabilities from the label.

    Parameters
    ----------
    {classes}
    {sample_weight}

    Returns
    -------
    float
        Mean Σ_k (p_k − y_k)² in [0, 2] for three classes and more; (p₁ − y)² in [0, 1], half of
        that sum, for two. Lower is better.

    See Also
    --------
    sklearn.metrics.brier_score_loss : the same convention since 1.7 (``scale_by_half="auto"``).

    Examples
    --------
    >>> from uq.calibration import brier_score
    >>> brier_score([0, 2], [[0.25] * 4] * 2)  # 1 − 1/4
    0.75
    """
    where = "brier_score"
    rows = ClassificationRows(y_true, prediction, Names(where))
    return _score(BRIER, rows, sample_weight, where)


class BrierDecomposition(NamedTuple):
    """Parts of the Brier score: ``reliability − resolution + uncertainty`` is the score."""

    reliability: float
    resolution: float
    uncertainty: float


@documented
def brier_decomposition(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
) -> BrierDecomposition:
    """Split the Brier score into reliability, resolution and uncertainty.

    Parameters
    ----------
    {classes}
    {sample_weight}

    Returns
    -------
    BrierDecomposition
        ``reliability`` S(p) − S(π), what calibration would gain (0 is best); ``resolution``
        S(ȳ) − S(π), what the predictions tell beyond the class frequencies ȳ (more is better);
        ``uncertainty`` S(ȳ), which no prediction changes. All are >= 0, in units of
        :func:`brier_score`, and the score is reliability − resolution + uncertainty exactly.

    Notes
    -----
    π is the isotonic regression of each class on its probability, one class against the rest: the
    decomposition of Murphy (1973) with bins that need no choosing. For predictions of few distinct
    values in the right order it is Murphy's own.

    References
    ----------
    T. Dimitriadis, T. Gneiting, A. Jordan, PNAS 118 (2021), arXiv 2008.03033.

    Examples
    --------
    >>> from uq.calibration import brier_decomposition
    >>> parts = brier_decomposition([0, 1, 0, 1], [[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
    >>> [round(part, 3) for part in parts]  # neither half tells anything
    [0.125, 0.0, 0.25]
    """
    from sklearn.isotonic import isotonic_regression

    where = "brier_decomposition"
    rows = ClassificationRows(y_true, prediction, Names(where))
    weight = check_weight(where, sample_weight, len(rows.y))
    parts = np.zeros(3)
    columns = [1] if rows.probs.shape[1] == 2 else range(rows.probs.shape[1])
    for k in columns:
        # Equal probabilities are one point of the regression.
        p, group = np.unique(rows.probs[:, k].astype(np.float64), return_inverse=True)
        mass = np.bincount(group, weight)
        share = np.bincount(group, weight * (rows.y == k)) / np.where(mass > 0, mass, 1.0)
        known = mass > 0
        p, mass, share = p[known], mass[known] / mass.sum(), share[known]
        fitted = isotonic_regression(share, sample_weight=mass, y_min=0.0, y_max=1.0)
        mean = mass @ share
        # Σ mass (π − share) = 0 in each block, so differences of scores are these squares.
        parts += (
            mass @ (np.square(p - share) - np.square(fitted - share)),
            mass @ (np.square(mean - share) - np.square(fitted - share)),
            mean * (1 - mean),
        )
    return BrierDecomposition(*(float(part) for part in parts))


@documented
def accuracy(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Share of rows whose most probable class is the label.

    Parameters
    ----------
    {classes}
    {sample_weight}

    Returns
    -------
    float
        In [0, 1]; higher is better. Of equally probable classes the first counts.

    Examples
    --------
    >>> from uq.calibration import accuracy
    >>> accuracy([0, 0], [[0.9, 0.1], [0.2, 0.8]])
    0.5
    """
    where = "accuracy"
    rows = ClassificationRows(y_true, prediction, Names(where))
    return _score(ACCURACY, rows, sample_weight, where)


# -- calibration errors ------------------------------------------------------------------------


@documented
def expected_calibration_error(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
    n_bins: int = N_BINS,
    kind: Kind | None = None,
    bins: BinKind = "equal_width",
) -> float:
    """Mean gap between confidence and accuracy over bins of confidence.

    Parameters
    ----------
    {classes}
    {sample_weight}
    {n_bins}
    {kind}
    bins : {"equal_width", "equal_mass"}, default="equal_width"
        Bins of equal width, where a confidence p falls into bin min(⌊pB⌋, B − 1), so that 1 is in
        the last; or of about equal weight ("adaptive"), where equal confidences stay together.

    Returns
    -------
    float
        Σ_b (n_b/n) |accuracy_b − confidence_b| in [0, 1]; lower is better. It is biased upwards on
        few rows: noise in a bin counts as a gap. See :func:`debiased_calibration_error`.

    Raises
    ------
    ParameterError
        If ``n_bins``, ``kind`` or ``bins`` cannot be used.

    References
    ----------
    M. P. Naeini, G. F. Cooper, M. Hauskrecht, AAAI 2015; C. Guo et al., ICML 2017.

    Examples
    --------
    >>> from uq.calibration import expected_calibration_error
    >>> p = [[0.05, 0.95], [0.0, 1.0]]
    >>> round(expected_calibration_error([1, 0], p, n_bins=10, kind="positive"), 3)
    0.475
    """
    where = "expected_calibration_error"
    if bins not in ("equal_width", "equal_mass"):
        raise ParameterError(f"{where}: bins must be 'equal_width' or 'equal_mass', got {bins!r}.")
    metric = ece_metric(check_count(where, "n_bins", n_bins), bins)
    return _score(metric, _by_kind(where, y_true, prediction, kind), sample_weight, where)


@documented
def debiased_calibration_error(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
    n_bins: int = N_BINS,
    kind: Kind | None = None,
) -> float:
    """Root mean squared gap between confidence and accuracy, without what chance adds.

    Parameters
    ----------
    {classes}
    {sample_weight}
        Weights count as numbers of rows.
    {n_bins}
    {kind}

    Returns
    -------
    float
        √max(0, Σ_b (n_b/n) [(a_b − c_b)² − a_b(1 − a_b)/(n_b − 1)]) over equal-mass bins with
        accuracy a_b and mean confidence c_b, bins of a single row left out. Lower is better. The
        sum is unbiased for its population value where the confidences of a bin are equal; where
        they have variance v_b in it, too low by about v_b/n_b.

    References
    ----------
    A. Kumar, P. Liang, T. Ma, NeurIPS 2019, arXiv 1909.10155, definition 4.2; J. Bröcker, Climate
    Dynamics 39 (2012).

    Examples
    --------
    >>> from uq.calibration import debiased_calibration_error
    >>> p = [[0.3, 0.7]] * 10
    >>> debiased_calibration_error([1] * 6 + [0] * 4, p, kind="positive")  # chance explains it
    0.0
    >>> round(debiased_calibration_error([1] + [0] * 9, p, kind="positive"), 4)
    0.5916
    """
    where = "debiased_calibration_error"
    metric = debiased_metric(check_count(where, "n_bins", n_bins))
    return _score(metric, _by_kind(where, y_true, prediction, kind), sample_weight, where)


@documented
def maximum_calibration_error(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
    n_bins: int = N_BINS,
    kind: Kind | None = None,
) -> float:
    """Largest gap between confidence and accuracy of a bin.

    Parameters
    ----------
    {classes}
    {sample_weight}
    {n_bins}
    {kind}

    Returns
    -------
    float
        max_b |accuracy_b − confidence_b| over the equal-width bins that hold rows, in [0, 1]. A
        single row can decide it; on few rows it says little.

    Examples
    --------
    >>> from uq.calibration import maximum_calibration_error
    >>> p = [[0.1, 0.9], [0.4, 0.6]]
    >>> round(maximum_calibration_error([1, 0], p, kind="positive"), 3)
    0.6
    """
    where = "maximum_calibration_error"
    metric = mce_metric(check_count(where, "n_bins", n_bins))
    return _score(metric, _by_kind(where, y_true, prediction, kind), sample_weight, where)


@documented
def classwise_calibration_error(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
    n_bins: int = N_BINS,
) -> float:
    """Mean over the classes of the calibration error of the probability of each.

    Parameters
    ----------
    {classes}
    {sample_weight}
    {n_bins}

    Returns
    -------
    float
        (1/K) Σ_k Σ_b (n_bk/n) |share of class k − its mean probability| over equal-width bins of
        each class's probability; lower is better. With two classes, that of either class.

    References
    ----------
    M. Kull et al., NeurIPS 2019, arXiv 1910.12656, eq. 3; J. Nixon et al., CVPR workshops 2019.

    Examples
    --------
    >>> from uq.calibration import classwise_calibration_error
    >>> p = [[0.6, 0.3, 0.1]] * 10
    >>> round(classwise_calibration_error([0] * 6 + [1] * 4, p), 4)
    0.0667
    """
    where = "classwise_calibration_error"
    metric = classwise_metric(check_count(where, "n_bins", n_bins))
    rows = ClassificationRows(y_true, prediction, Names(where))
    return _score(metric, rows, sample_weight, where)


@documented
def smooth_calibration_error(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
    kind: Kind | None = None,
) -> float:
    """Calibration error by kernel smoothing, without bins and without a bandwidth.

    Parameters
    ----------
    {classes}
    {sample_weight}
    {kind}

    Returns
    -------
    float
        The σ at which ∫₀¹ |(1/n) Σ_i (correct_i − c_i) K_σ(t, c_i)| dt = σ, with K_σ the Gaussian
        of deviation σ reflected at 0 and 1; in [0, 1], lower is better. Unlike binned errors it
        moves continuously with the confidences.

    Notes
    -----
    Residuals are shared between the two nearest of 512 grid points, where the reflected Gaussian
    is diagonal in the cosine transform: the error is accurate to about 1e-3 of itself or 1e-5.

    References
    ----------
    J. Błasiok, P. Nakkiran, ICLR 2024, arXiv 2309.12236.

    Examples
    --------
    >>> from uq.calibration import smooth_calibration_error
    >>> p = [[0.25, 0.75]] * 4
    >>> round(smooth_calibration_error([1, 1, 1, 0], p, kind="positive"), 4)
    0.0
    """
    where = "smooth_calibration_error"
    return _score(SMOOTH, _by_kind(where, y_true, prediction, kind), sample_weight, where)


@documented
def mmce(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
    kind: Kind | None = None,
) -> float:
    """Maximum mean calibration error: the largest gap that a smooth function of confidence sees.

    Parameters
    ----------
    {classes}
    {sample_weight}
    {kind}

    Returns
    -------
    float
        √(Σ_ij e_i e_j k(c_i, c_j))/n with e = correct − c and k(c, c′) = exp(−|c − c′|/0.4), exact
        in O(n log n); lower is better.

    References
    ----------
    A. Kumar, S. Sarawagi, U. Jain, ICML 2018.

    Examples
    --------
    >>> from uq.calibration import mmce
    >>> round(mmce([1, 0], [[0.3, 0.7]] * 2, kind="positive"), 4)  # |1 − 2 · 0.7|/2
    0.2
    """
    where = "mmce"
    return _score(MMCE, _by_kind(where, y_true, prediction, kind), sample_weight, where)


TestStatistic = Literal[
    "smooth_calibration_error",
    "mmce",
    "expected_calibration_error",
    "debiased_calibration_error",
    "classwise_calibration_error",
]
_STATISTICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (SMOOTH, MMCE, ece_metric(), debiased_metric(), classwise_metric())
}


@documented
def calibration_test(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    statistic: TestStatistic = "smooth_calibration_error",
    kind: Kind | None = None,
    n_draws: int = 1000,
    random_state: int = 0,
) -> TestResult:
    """Test whether class probabilities are calibrated, by labels drawn from them.

    Parameters
    ----------
    {classes}
    statistic : str, default="smooth_calibration_error"
        Calibration error to test: "smooth_calibration_error", "mmce",
        "expected_calibration_error", "debiased_calibration_error" or
        "classwise_calibration_error", with the default bins of the function of that name.
    {kind} Not for "classwise_calibration_error", which looks at all classes.
    n_draws : int, default=1000
        Data sets drawn. The smallest p-value is 1/(n_draws + 1).
    random_state : int, default=0
        Seed of the draws.

    Returns
    -------
    TestResult
        ``statistic``, the error on the rows, and ``p_value`` = (1 + number of data sets with an
        error at least as large)/(1 + n_draws). A calibrated method has a p-value of at most α in
        no more than a share α of data sets, whatever their size.

    Raises
    ------
    ParameterError
        If ``statistic``, ``kind`` or ``n_draws`` cannot be used.

    Notes
    -----
    The data sets have the same probabilities, with labels drawn from them: rows are taken to be
    independent. On many rows a deviation that is too small to matter is found too: look at the
    error beside the p-value.

    The default has no bins, whose number decides what a binned error can see, and looks at the
    scale of the deviation itself. ``"mmce"`` sees more of one that is broad, and little of one that
    changes sign within a tenth or two. Share of data sets of 500 rows with p <= 0.05:

    ==================================  ======  =====  =====  ========  =========
    deviation                           smooth  mmce   ECE    debiased  classwise
    ==================================  ======  =====  =====  ========  =========
    three classes, logits times 1.3     .84     .89    .68    .39       .71
    three classes, logits times .77     .69     .73    .35    .34       .29
    two, logits shifted by .3           .63     .76    .33    .33       .32
    two, logits times 1.4               .68     .49    .55    .36       .53
    two, one wave of height .08         .65     .47    .47    .36       .48
    two, four waves of height .15       .80     .08    .95    .87       .95
    two, .2 off between .4 and .6       .79     .75    .65    .80       .67
    ==================================  ======  =====  =====  ========  =========

    References
    ----------
    J. Bröcker, L. A. Smith, Weather and Forecasting 22 (2007); J. Vaicenavicius et al., AISTATS
    2019, arXiv 1902.06977; D. Widmann, F. Lindsten, D. Zachariah, NeurIPS 2019, arXiv 1910.11385.

    Examples
    --------
    >>> from uq.calibration import calibration_test
    >>> p = [[0.1, 0.9]] * 50
    >>> calibration_test([1] * 45 + [0] * 5, p, kind="positive").p_value  # 9 of 10 are right
    1.0
    >>> calibration_test([1] * 30 + [0] * 20, p, kind="positive").p_value < 0.01
    True
    """
    where = "calibration_test"
    if statistic not in _STATISTICS:
        known = ", ".join(map(repr, _STATISTICS))
        raise ParameterError(f"{where}: statistic must be one of {known}, got {statistic!r}.")
    n_draws = check_count(where, "n_draws", n_draws)
    metric = _STATISTICS[statistic]
    rows: ClassificationRows | BinaryRows
    if statistic == "classwise_calibration_error":
        if kind is not None:
            raise ParameterError(
                f"{where}: statistic={statistic!r} looks at all classes; leave out kind={kind!r}."
            )
        rows = ClassificationRows(y_true, prediction, Names(where))
    else:
        rows = _by_kind(where, y_true, prediction, kind)
    assert metric.null is not None
    value = metric.value(rows, np.ones(len(rows.y)))
    null = metric.null(rows, np.random.default_rng(random_state), n_draws)
    return TestResult(value, float((1 + (null >= value - TIE).sum()) / (1 + n_draws)))


# -- selective prediction ----------------------------------------------------------------------


@documented
def misclassification_auroc(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Probability that a right prediction is more confident than a wrong one.

    Parameters
    ----------
    {classes}
    {sample_weight}

    Returns
    -------
    float
        Area under the ROC curve of errors against right predictions, by the probability of the
        most probable class; a tie counts one half. NaN where all are right or all wrong.

    Examples
    --------
    >>> from uq.calibration import misclassification_auroc
    >>> misclassification_auroc([0, 0, 1], [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    1.0
    """
    where = "misclassification_auroc"
    rows = ClassificationRows(y_true, prediction, Names(where))
    return _score(MISCLASSIFICATION_AUROC, rows, sample_weight, where)


@documented
def excess_aurc(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Area under the risk–coverage curve beyond that of the best order.

    Parameters
    ----------
    {classes}
    {sample_weight}
        A row of weight w is w rows.

    Returns
    -------
    float
        :func:`aurc` less its value if every error were less confident than every right
        prediction; 0 is a perfect order, whatever the accuracy. The best value is that of the n
        rows, not its limit e + (1 − e) log(1 − e) for errors of share e.

    References
    ----------
    Y. Geifman, G. Uziel, R. El-Yaniv, ICLR 2019, arXiv 1805.08206.

    Examples
    --------
    >>> from uq.calibration import excess_aurc
    >>> excess_aurc([0, 0, 1], [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    0.0
    """
    where = "excess_aurc"
    rows = ClassificationRows(y_true, prediction, Names(where))
    return _score(EXCESS_AURC, rows, sample_weight, where)


@documented
def aurc(
    y_true: ArrayLike | Tensor,
    prediction: Any,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Area under the risk–coverage curve: mean risk of the k most confident rows.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Labels or targets.
    prediction : Predictive, or class probabilities of shape (n, n_classes)
        Predictive distribution of the same rows. Classes rank by the probability of the most
        probable class, with risk 1 for an error; targets by the variance (mean over outputs), with
        the squared error as risk.
    {sample_weight}
        A row of weight w is w rows.

    Returns
    -------
    float
        (1/n) Σ_k (mean risk of the k most confident rows); lower is better. Equal confidences
        stand in random order, of which this is the mean.

    References
    ----------
    Y. Geifman, R. El-Yaniv, NeurIPS 2017, arXiv 1705.08500.

    Examples
    --------
    >>> from uq.calibration import aurc
    >>> round(aurc([0, 0, 1], [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]), 4)  # (0 + 0 + 1/3)/3
    0.1111
    """
    return _score(AURC, make_rows(y_true, prediction, Names("aurc")), sample_weight, "aurc")


@documented
def augrc(
    y_true: ArrayLike | Tensor,
    prediction: Any,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Area under the generalised risk–coverage curve: mean risk of undetected failures.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Labels or targets.
    prediction : Predictive, or class probabilities of shape (n, n_classes)
        Predictive distribution of the same rows; ranks and risks as in :func:`aurc`.
    {sample_weight}
        A row of weight w is w rows.

    Returns
    -------
    float
        (1/n) Σ_k (sum of the risks of the k most confident rows)/n; lower is better, e(n + 1)/(2n)
        for errors of share e at random. Unlike AURC it does not weigh the few most confident rows
        far above the others.

    References
    ----------
    J. Traub et al., NeurIPS 2024, arXiv 2407.01032.

    Examples
    --------
    >>> from uq.calibration import augrc
    >>> round(augrc([0, 0, 1], [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]), 4)  # (0 + 0 + 1/3)/3
    0.1111
    """
    return _score(AUGRC, make_rows(y_true, prediction, Names("augrc")), sample_weight, "augrc")


class RiskCoverageCurve(NamedTuple):
    """Risk among the most confident rows: arrays ``coverage`` and ``risk``."""

    coverage: np.ndarray
    risk: np.ndarray


@documented
def risk_coverage_curve(
    y_true: ArrayLike | Tensor,
    prediction: Any,
    *,
    sample_weight: ArrayLike | None = None,
) -> RiskCoverageCurve:
    """Return the risk among the most confident rows against their share.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Labels or targets.
    prediction : Predictive, or class probabilities of shape (n, n_classes)
        Predictive distribution of the same rows; ranks and risks as in :func:`aurc`.
    {sample_weight}

    Returns
    -------
    RiskCoverageCurve
        ``coverage`` rising to 1 and ``risk``, one entry for each distinct confidence.

    Examples
    --------
    >>> from uq.calibration import risk_coverage_curve
    >>> curve = risk_coverage_curve([0, 0, 1], [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    >>> curve.risk.round(3)
    array([0.   , 0.   , 0.333])
    """
    where = "risk_coverage_curve"
    rows = make_rows(y_true, prediction, Names(where))
    weight = check_weight(where, sample_weight, len(rows.y))
    ranking = rows.ranking.under(weight[None])
    mass, loss = ranking.mass[0], ranking.loss[0]
    known = np.diff(mass, prepend=0.0) > 0  # a row without weight makes no point
    return RiskCoverageCurve(mass[known] / mass[-1], loss[known] / mass[known])


@documented
def accuracy_at_coverage(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
    coverage: float,
) -> float:
    """Accuracy among the most confident share of rows.

    Parameters
    ----------
    {classes}
    {sample_weight}
    coverage : float
        Share of rows that are answered, in (0, 1].

    Returns
    -------
    float
        In [0, 1]; higher is better. Equal confidences count with their mean accuracy.

    Examples
    --------
    >>> from uq.calibration import accuracy_at_coverage
    >>> p = [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]]
    >>> accuracy_at_coverage([0, 0, 1, 1], p, coverage=0.75)
    1.0
    """
    where = "accuracy_at_coverage"
    coverage = check_share(where, "coverage", coverage, closed=True)
    rows = ClassificationRows(y_true, prediction, Names(where))
    return _score(accuracy_at_metric(coverage), rows, sample_weight, where)


@documented
def coverage_at_accuracy(
    y_true: ArrayLike | Tensor,
    prediction: Prediction,
    *,
    sample_weight: ArrayLike | None = None,
    accuracy: float,
) -> float:
    """Largest share of rows, from the most confident, with at least the given accuracy.

    Parameters
    ----------
    {classes}
    {sample_weight}
    accuracy : float
        Accuracy that is asked for, in (0, 1].

    Returns
    -------
    float
        In [0, 1]; higher is better, 0 if even the most confident rows are less accurate. It is
        read off the held-out rows: a threshold chosen by it promises nothing on new ones (see the
        conformal methods for that).

    Examples
    --------
    >>> from uq.calibration import coverage_at_accuracy
    >>> p = [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]]
    >>> coverage_at_accuracy([0, 0, 1, 1], p, accuracy=1.0)
    0.75
    """
    where = "coverage_at_accuracy"
    accuracy = check_share(where, "accuracy", accuracy, closed=True)
    rows = ClassificationRows(y_true, prediction, Names(where))
    weight = check_weight(where, sample_weight, len(rows.y))
    return float(rows.ranking.under(weight[None]).coverage_at(1 - accuracy)[0])

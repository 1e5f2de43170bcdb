"""Metrics of predicted targets on held-out data, in the style of scikit-learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uq.calibration.definitions import Metric, TestResult, equal_width_bins
from uq.calibration.documentation import documented
from uq.calibration.real_definitions import (
    CRPS,
    MAE,
    QUANTILE_ERROR,
    RMSE,
    SHARPNESS,
    VARIANCE_BINS,
    coverage_metric,
    ence_metric,
    interval_score_metric,
    pinball_metric,
    uce_metric,
    width_metric,
)
from uq.calibration.rows import (
    Names,
    RegressionRows,
    as_array,
    check_count,
    check_share,
    check_weight,
)
from uq.distributions import RealPredictive
from uq.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor


_LEAST_EXPECTED = 5  # rows a bin, for a χ² test


def _score(
    where: str,
    metric: Metric,
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    sample_weight: ArrayLike | None,
) -> float:
    rows = RegressionRows(y_true, prediction, Names(where))
    return metric.value(rows, check_weight(where, sample_weight, len(rows.y)))


# -- scores ------------------------------------------------------------------------------------


@documented
def crps(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Mean continuous ranked probability score, exact for the distribution.

    Parameters
    ----------
    {targets}
    {sample_weight}

    Returns
    -------
    float
        Mean ∫ (F(x) − 1[y ≤ x])² dx in target units, averaged over outputs; lower is better. In
        closed form where there is one, by a sort for :class:`uq.distributions.Empirical`.

    See Also
    --------
    uq.distributions.NormalMixture.crps : the score of each row.
    uq.distributions.sample_crps : from draws, also unbiased in their number ("fair").

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import crps
    >>> from uq.distributions import NormalMixture
    >>> round(crps([0.0], NormalMixture(torch.zeros(1, 1), torch.tensor(1.0))), 7)
    0.233695
    """
    return _score("crps", CRPS, y_true, prediction, sample_weight)


@documented
def energy_score(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
    n_draws: int = 500,
    random_state: int = 0,
) -> float:
    """Mean energy score: the CRPS of several outputs jointly.

    Parameters
    ----------
    {targets}
    {sample_weight}
    n_draws : int, default=500
        Draws from the joint distribution of each row. The score is unbiased for any number; its
        Monte-Carlo error shrinks with it and with the number of rows.
    random_state : int, default=0
        Seed of the draws.

    Returns
    -------
    float
        Mean E‖Y − y‖ − ½ E‖Y − Y′‖ over rows, in the common unit of the outputs; lower is better.
        For one output it is the CRPS.

    References
    ----------
    T. Gneiting, A. E. Raftery, JASA 102 (2007), eq. 22.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import energy_score
    >>> from uq.distributions import NormalMixture
    >>> d = NormalMixture(torch.zeros(1, 400, 2), torch.tensor(1.0))
    >>> round(energy_score(torch.zeros(400, 2), d), 1)  # √(π/2) − √π/2
    0.4
    """
    import torch

    from uq.distributions import energy_score as sample_energy_score

    where = "energy_score"
    n_draws = check_count(where, "n_draws", n_draws, least=2)
    rows = RegressionRows(y_true, prediction, Names(where))
    weight = check_weight(where, sample_weight, len(rows.y))
    generator = torch.Generator().manual_seed(int(random_state))
    drawn = rows.prediction.cpu().joint().sample((n_draws,), generator=generator)
    values = drawn.reshape(n_draws, *rows.y.shape).numpy()
    score = sample_energy_score(values, rows.y, fair=True)
    return float(weight @ score / weight.sum())


@documented
def rmse(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Root mean squared error of the predictive mean.

    Parameters
    ----------
    {targets}
    {sample_weight}

    Returns
    -------
    float
        √ mean (y − E y)² in target units, the mean over rows and outputs; lower is better.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import rmse
    >>> from uq.distributions import NormalMixture
    >>> rmse([3.0, -3.0], NormalMixture(torch.zeros(1, 2), torch.tensor(1.0)))
    3.0
    """
    return _score("rmse", RMSE, y_true, prediction, sample_weight)


@documented
def mae(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Mean absolute error of the predictive median, which is the best point for it.

    Parameters
    ----------
    {targets}
    {sample_weight}

    Returns
    -------
    float
        Mean |y − median| in target units over rows and outputs; lower is better.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import mae
    >>> from uq.distributions import NormalMixture
    >>> mae([3.0, -1.0], NormalMixture(torch.zeros(1, 2), torch.tensor(1.0)))
    2.0
    """
    return _score("mae", MAE, y_true, prediction, sample_weight)


@documented
def pinball_loss(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
    level: float,
) -> float:
    """Mean pinball (quantile) loss of one predictive quantile.

    Parameters
    ----------
    {targets}
    {sample_weight}
    level : float
        Level q of the quantile, in (0, 1).

    Returns
    -------
    float
        Mean max(q(y − Q), (q − 1)(y − Q)) with Q the predictive quantile, in target units; lower is
        better. Twice its mean over all levels is the CRPS.

    See Also
    --------
    sklearn.metrics.mean_pinball_loss : the same number from quantiles.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import pinball_loss
    >>> from uq.distributions import NormalMixture
    >>> pinball_loss([1.0], NormalMixture(torch.zeros(1, 1), torch.tensor(1.0)), level=0.5)
    0.5
    """
    where = "pinball_loss"
    metric = pinball_metric(check_share(where, "level", level))
    return _score(where, metric, y_true, prediction, sample_weight)


@documented
def interval_score(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
    coverage: float = 0.9,
) -> float:
    """Mean interval (Winkler) score of the equal-tailed predictive interval.

    Parameters
    ----------
    {targets}
    {sample_weight}
    {coverage}

    Returns
    -------
    float
        Mean (u − l) + (2/α)(l − y)₊ + (2/α)(y − u)₊ with α = 1 − coverage, in target units; lower
        is better. It rewards narrow intervals and punishes misses by their distance.

    References
    ----------
    T. Gneiting, A. E. Raftery, JASA 102 (2007), eq. 43.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import interval_score
    >>> from uq.distributions import NormalMixture
    >>> d = NormalMixture(torch.zeros(1, 2), torch.tensor(1.0))
    >>> round(interval_score([0.0, 2.0], d), 3)  # 2 · 1.645 + 10 · (2 − 1.645)
    6.841
    """
    where = "interval_score"
    metric = interval_score_metric(check_share(where, "coverage", coverage))
    return _score(where, metric, y_true, prediction, sample_weight)


# -- calibration -------------------------------------------------------------------------------


@documented
def interval_coverage(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
    coverage: float = 0.9,
) -> float:
    """Share of targets inside the equal-tailed predictive interval.

    Parameters
    ----------
    {targets}
    {sample_weight}
    {coverage}

    Returns
    -------
    float
        In [0, 1]; right if equal to ``coverage``. The interval is closed; outputs are averaged.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import interval_coverage
    >>> from uq.distributions import NormalMixture
    >>> interval_coverage([0.0, 1.7], NormalMixture(torch.zeros(1, 2), torch.tensor(1.0)))
    0.5
    """
    where = "interval_coverage"
    metric = coverage_metric(check_share(where, "coverage", coverage))
    return _score(where, metric, y_true, prediction, sample_weight)


def pit_values(
    y_true: ArrayLike | Tensor, prediction: RealPredictive, *, random_state: int = 0
) -> NDArray[np.float64]:
    """Probability integral transform: the predictive cdf at each target.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets.
    prediction : RealPredictive
        Predictive distribution of the same rows.
    random_state : int, default=0
        Seed of the draws where F jumps; not used for continuous distributions.

    Returns
    -------
    ndarray of the shape of ``y_true``
        F_i(y_i) in [0, 1]: uniform for calibrated predictions, heaped at both ends for
        over-confident ones, in the middle for under-confident ones. Where F jumps it is drawn, so
        as to be uniform too. ``np.histogram(pit, 20, (0, 1))`` counts them.

    Notes
    -----
    For :class:`uq.distributions.Empirical` with S draws, b of them below y and t equal to it, the
    value is drawn between b/(S + 1) and (b + t + 1)/(S + 1): a target from the law of the draws
    takes each of the S + 1 places among them alike. ``prediction.cdf(y)`` is the plain share.

    See Also
    --------
    uq.calibration.pit_test : a p-value for "uniform".

    References
    ----------
    C. Czado, T. Gneiting, L. Held, Biometrics 65 (2009).

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import pit_values
    >>> from uq.distributions import NormalMixture
    >>> pit_values([0.0], NormalMixture(torch.zeros(1, 1), torch.tensor(1.0)))
    array([0.5])
    """
    rows = RegressionRows(y_true, prediction, Names("pit_values"))
    return rows.random_pit(np.random.default_rng(random_state)).reshape(as_array(y_true).shape)


def pit_test(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    n_bins: int = 20,
    random_state: int = 0,
) -> TestResult:
    """Test whether predictive distributions of one output are calibrated: is the PIT uniform?

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, 1)
        Targets of at least ten rows, independent of each other.
    prediction : RealPredictive
        Predictive distribution of the same rows. Outputs of a row depend on each other, so that
        several are tested one by one, with ``prediction.output(j)``.
    n_bins : int, default=20
        Bins of equal width, at least two. Fewer rows than five a bin are put into n // 5 bins,
        where the distribution of the statistic is still close to χ².
    random_state : int, default=0
        Seed of the draws where F jumps; not used for continuous distributions.

    Returns
    -------
    TestResult
        ``statistic`` Σ_b (n_b − n/B)² / (n/B) over B bins of the PIT, and ``p_value``, the
        probability that χ² with B − 1 degrees of freedom is as large.

    Raises
    ------
    DataError
        If there are several outputs, or fewer than ten rows.

    Notes
    -----
    The PIT is that of :func:`pit_values`: for :class:`uq.distributions.Empirical` it is drawn
    within the place of the target among the draws.

    A wrong scale moves little mass far, which Kolmogorov–Smirnov tests hardly see: one that is off
    by 10 % is found on 2000 rows, at a level of 1e-4, in 4 to 7 of 10 data sets by this test and in
    1 of 100 by Kolmogorov–Smirnov.

    References
    ----------
    A. P. Dawid, JRSS A 147 (1984); C. Czado, T. Gneiting, L. Held, Biometrics 65 (2009).

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import pit_test
    >>> from uq.distributions import NormalMixture
    >>> d = NormalMixture(torch.zeros(1, 100), torch.tensor(1.0))
    >>> y = 3 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    >>> pit_test(y, d).p_value < 0.001  # a third of the deviation that the targets have
    True
    """
    from scipy.stats import chi2

    where = "pit_test"
    n_bins = check_count(where, "n_bins", n_bins, least=2)
    rows = RegressionRows(y_true, prediction, Names(where))
    n, n_outputs = rows.y.shape
    if n_outputs > 1:
        raise DataError(
            f"{where}: expected one output, got {n_outputs}, which depend on each other within a "
            "row; test each with prediction.output(j)."
        )
    if n < 2 * _LEAST_EXPECTED:
        raise DataError(f"{where}: at least {2 * _LEAST_EXPECTED} rows are needed, got {n}.")
    n_bins = min(n_bins, n // _LEAST_EXPECTED)
    pit = rows.random_pit(np.random.default_rng(random_state))[:, 0]
    counts = np.bincount(equal_width_bins(pit, n_bins), minlength=n_bins)
    statistic = float(np.square(counts - n / n_bins).sum() / (n / n_bins))
    return TestResult(statistic, float(chi2.sf(statistic, n_bins - 1)))


@documented
def quantile_calibration_error(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Mean gap between quantile levels and the share of targets at or below the quantiles.

    Parameters
    ----------
    {targets}
    {sample_weight}

    Returns
    -------
    float
        Mean over the levels q = 1, …, 99 % of |q − share of y ≤ quantile(q)|, averaged over
        outputs; in [0, 0.5], lower is better.

    References
    ----------
    V. Kuleshov, N. Fenner, S. Ermon, ICML 2018, arXiv 1807.00263 (there squared, few levels).

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import quantile_calibration_error
    >>> from uq.distributions import NormalMixture
    >>> d = NormalMixture(torch.zeros(1, 3), torch.tensor(1.0))
    >>> round(quantile_calibration_error([9.0, 9.0, 9.0], d), 3)
    0.5
    """
    where = "quantile_calibration_error"
    return _score(where, QUANTILE_ERROR, y_true, prediction, sample_weight)


@documented
def expected_normalized_calibration_error(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
    n_bins: int = VARIANCE_BINS,
) -> float:
    """Relative gap between predicted deviation and actual error over bins of the variance (ENCE).

    Parameters
    ----------
    {targets}
    {sample_weight}
    n_bins : int, default=10
        Bins of about equal weight by predicted variance; equal variances stay together.

    Returns
    -------
    float
        Mean over bins of |√ mean variance − RMSE| / √ mean variance, dimensionless; lower is
        better. Outputs have their own bins. NaN where a predictive variance is infinite, and where
        all variances of a bin are 0 but an error is not.

    References
    ----------
    D. Levi et al., Sensors 22 (2022), arXiv 1905.11659, eq. 8.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import expected_normalized_calibration_error
    >>> from uq.distributions import NormalMixture
    >>> d = NormalMixture(torch.zeros(1, 2), torch.tensor([1.0, 2.0]))
    >>> expected_normalized_calibration_error([1.5, 3.0], d)  # half as large again, everywhere
    0.5
    """
    where = "expected_normalized_calibration_error"
    metric = ence_metric(check_count(where, "n_bins", n_bins))
    return _score(where, metric, y_true, prediction, sample_weight)


@documented
def uncertainty_calibration_error(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
    n_bins: int = VARIANCE_BINS,
) -> float:
    """Gap between predicted variance and squared error over bins of the variance (UCE).

    Parameters
    ----------
    {targets}
    {sample_weight}
    n_bins : int, default=10
        Bins of about equal weight by predicted variance; equal variances stay together.

    Returns
    -------
    float
        Σ_b (n_b/n) |mean variance − mean squared error|, in squared target units, averaged over
        outputs; lower is better. NaN where a predictive variance is infinite.

    References
    ----------
    M.-H. Laves et al., MIDL 2020, arXiv 2104.12376.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import uncertainty_calibration_error
    >>> from uq.distributions import NormalMixture
    >>> d = NormalMixture(torch.zeros(1, 2), torch.tensor(1.0))
    >>> uncertainty_calibration_error([2.0, 2.0], d)
    3.0
    """
    where = "uncertainty_calibration_error"
    metric = uce_metric(check_count(where, "n_bins", n_bins))
    return _score(where, metric, y_true, prediction, sample_weight)


# -- sharpness ---------------------------------------------------------------------------------


@documented
def mean_interval_width(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
    coverage: float = 0.9,
) -> float:
    """Mean width of the equal-tailed predictive interval.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets; only their shape is used, so that all metrics are called alike.
    prediction : RealPredictive
        Predictive distribution of the same rows.
    {sample_weight}
    {coverage}

    Returns
    -------
    float
        In target units, averaged over outputs; lower is better at equal coverage.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import mean_interval_width
    >>> from uq.distributions import NormalMixture
    >>> d = NormalMixture(torch.zeros(1, 2), torch.tensor(1.0))
    >>> round(mean_interval_width([0.0, 1.7], d), 3)
    3.29
    """
    where = "mean_interval_width"
    metric = width_metric(check_share(where, "coverage", coverage))
    return _score(where, metric, y_true, prediction, sample_weight)


@documented
def sharpness(
    y_true: ArrayLike | Tensor,
    prediction: RealPredictive,
    *,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Root mean predictive variance.

    Parameters
    ----------
    y_true : array-like of shape (n,) or (n, m)
        Targets; only their shape is used, so that all metrics are called alike.
    prediction : RealPredictive
        Predictive distribution of the same rows.
    {sample_weight}

    Returns
    -------
    float
        √ mean Var y in target units, the mean over rows and outputs; lower is better among
        calibrated predictions. Infinite where a predictive variance is.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import sharpness
    >>> from uq.distributions import NormalMixture
    >>> sharpness([0.0, 1.7], NormalMixture(torch.zeros(1, 2), torch.tensor(2.0)))
    2.0
    """
    return _score("sharpness", SHARPNESS, y_true, prediction, sample_weight)

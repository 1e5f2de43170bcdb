"""How well an uncertainty score tells out-of-distribution (OOD) inputs from familiar ones.

High score means OOD and OOD is the positive class, here and in :mod:`uq.calibration.detectors`.
Thresholds stand only between different scores, so that ties cannot be sorted in anyone's favour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from uq.calibration.definitions import Definition
from uq.calibration.rows import as_array
from uq.distributions import ClassPredictive, DirichletCategorical, Predictive, RealPredictive
from uq.errors import DataError, NoEpistemicError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]

ScoreKind = Literal[
    "auto",
    "max_probability",
    "entropy",
    "mutual_information",
    "epistemic",
    "vacuity",
    "differential_entropy",
    "variance",
]

OOD_METRICS = (
    Definition(
        "auroc",
        "OOD: AUROC",
        "probability that an OOD input gets the higher score; a tie counts one half",
        "higher",
    ),
    Definition(
        "aupr_in",
        "OOD: AUPR-in",
        "average precision of finding the held-out inputs, by low scores",
        "higher",
        shifted=True,
    ),
    Definition(
        "aupr_out",
        "OOD: AUPR-out",
        "average precision of finding the OOD inputs, by high scores",
        "higher",
        shifted=True,
    ),
    Definition(
        "fpr_at_95_tpr",
        "OOD: FPR at 95 % TPR",
        "share of held-out inputs flagged by the threshold that flags 95 % of the OOD inputs",
        "lower",
    ),
    Definition(
        "detection_error",
        "OOD: detection error",
        "least ½ (share of held-out inputs flagged + share of OOD inputs missed) of any threshold",
        "lower",
        optimised=True,
    ),
)


@dataclass(frozen=True)
class Curve:
    """Weights above each threshold, from the highest distinct score down, shape (..., groups)."""

    true_positives: Floats
    false_positives: Floats

    def reversed(self) -> Curve:
        """Curve that finds the familiar inputs, from the lowest score up."""
        tp, fp = self.true_positives, self.false_positives
        return Curve(fp[..., -1:] - _before(fp)[..., ::-1], tp[..., -1:] - _before(tp)[..., ::-1])


class ScoreGroups:
    """Scores of familiar and of OOD inputs, sorted into groups of equal score."""

    def __init__(self, score_in: Floats, score_out: Floats) -> None:
        scores = np.concatenate([score_in, score_out])
        self._order = np.argsort(-scores)  # stability would cost time and groups need none
        ranked = scores[self._order]
        self._ends = np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True])
        self._is_out = self._order >= len(score_in)

    def metrics(self, weight_in: Floats, weight_out: Floats) -> Floats:
        """Values (..., metrics) of ``OOD_METRICS`` under row weights."""
        out = self.curve(weight_in, weight_out)
        values = [
            curve_auroc(out),
            curve_aupr(out.reversed()),
            curve_aupr(out),
            curve_fpr_at_tpr(out),
            curve_detection_error(out),
        ]
        return np.stack(values, -1)

    def curve(self, weight_in: Floats, weight_out: Floats) -> Curve:
        """Cumulate row weights (..., n_in) and (..., n_out) from the highest score down."""
        weights = np.concatenate([weight_in, weight_out], -1)[..., self._order]
        out, familiar = np.where(self._is_out, weights, 0.0), np.where(self._is_out, 0.0, weights)
        return Curve(out.cumsum(-1)[..., self._ends], familiar.cumsum(-1)[..., self._ends])


def curve_auroc(c: Curve) -> Floats:
    """Area under the ROC curve of each weighting."""
    tp, fp = c.true_positives, c.false_positives
    # Trapezoids give a tied pair one half.
    area: Floats = (0.5 * (tp + _before(tp)) * (fp - _before(fp))).sum(-1)
    area /= tp[..., -1] * fp[..., -1]
    return area


def curve_aupr(c: Curve) -> Floats:
    """Average precision of each weighting: Σ (R_g − R_{g−1}) P_g over groups of equal score."""
    tp, fp = c.true_positives, c.false_positives
    precision = np.divide(tp, tp + fp, out=np.zeros_like(tp), where=tp > 0)
    area: Floats = ((tp - _before(tp)) * precision).sum(-1) / tp[..., -1]
    return area


def curve_fpr_at_tpr(c: Curve, tpr: float = 0.95) -> Floats:
    """False-positive rate of each weighting where the true-positive rate first reaches ``tpr``."""
    tp, fp = c.true_positives, c.false_positives
    # A hair of slack: 0.95 of 60 is 57 rows, whatever its last bit says.
    reached = tp >= tpr * (1 - 1e-12) * tp[..., -1:]
    first = reached.argmax(-1)[..., None]
    rate: Floats = np.take_along_axis(fp, first, -1)[..., 0] / fp[..., -1]
    return rate


def curve_detection_error(c: Curve) -> Floats:
    """Least mean of false-positive and false-negative rate of each weighting."""
    tp, fp = c.true_positives, c.false_positives
    error: Floats = 0.5 * (1 + (fp / fp[..., -1:] - tp / tp[..., -1:]).min(-1))
    return error


def _before(cumulated: Floats) -> Floats:
    """Sums before each group."""
    return np.concatenate([np.zeros_like(cumulated[..., :1]), cumulated[..., :-1]], -1)


def auroc(score_in: ArrayLike | Tensor, score_out: ArrayLike | Tensor) -> float:
    """Probability that an OOD input gets the higher score.

    Parameters
    ----------
    score_in : array-like of shape (n,)
        Scores of inputs like the training data; high means OOD.
    score_out : array-like of shape (k,)
        Scores of OOD inputs.

    Returns
    -------
    float
        P(out > in) + ½ P(out = in) in [0, 1]: 0.5 is chance, 1 a perfect separation.

    See Also
    --------
    sklearn.metrics.roc_auc_score : the same number from labels and scores.

    Examples
    --------
    >>> from uq.calibration import auroc
    >>> auroc([0.1, 0.2, 0.3], [0.3, 0.4])  # one tie in six pairs
    0.9166666666666666
    """
    return _evaluate("auroc", curve_auroc, score_in, score_out)


def aupr_out(score_in: ArrayLike | Tensor, score_out: ArrayLike | Tensor) -> float:
    """Average precision of finding the OOD inputs.

    Parameters
    ----------
    score_in : array-like of shape (n,)
        Scores of inputs like the training data; high means OOD.
    score_out : array-like of shape (k,)
        Scores of OOD inputs, the positive class.

    Returns
    -------
    float
        Σ_g (R_g − R_{g−1}) P_g over groups of equal score, from the highest down; higher is
        better. Chance is the share of OOD inputs, so it compares only at equal shares.

    See Also
    --------
    sklearn.metrics.average_precision_score : the same number from labels and scores.

    Examples
    --------
    >>> from uq.calibration import aupr_out
    >>> aupr_out([0.1, 0.2], [0.3, 0.4])
    1.0
    """
    return _evaluate("aupr_out", curve_aupr, score_in, score_out)


def aupr_in(score_in: ArrayLike | Tensor, score_out: ArrayLike | Tensor) -> float:
    """Average precision of finding the familiar inputs, by low scores.

    Parameters
    ----------
    score_in : array-like of shape (n,)
        Scores of inputs like the training data, here the positive class; high means OOD.
    score_out : array-like of shape (k,)
        Scores of OOD inputs.

    Returns
    -------
    float
        As :func:`aupr_out` with the classes and the order of scores reversed; higher is better.

    Examples
    --------
    >>> from uq.calibration import aupr_in
    >>> aupr_in([0.1, 0.2], [0.3, 0.4])
    1.0
    """
    return _evaluate("aupr_in", lambda c: curve_aupr(c.reversed()), score_in, score_out)


def fpr_at_tpr(
    score_in: ArrayLike | Tensor, score_out: ArrayLike | Tensor, *, tpr: float = 0.95
) -> float:
    """Share of familiar inputs flagged when the given share of OOD inputs is.

    Parameters
    ----------
    score_in : array-like of shape (n,)
        Scores of inputs like the training data; high means OOD.
    score_out : array-like of shape (k,)
        Scores of OOD inputs, the positive class. (Some papers take the familiar inputs as
        positive, which gives another number.)
    tpr : float, default=0.95
        Share of OOD inputs that must be flagged, in (0, 1].

    Returns
    -------
    float
        False-positive rate at the highest threshold that flags at least ``tpr``; lower is better.

    Examples
    --------
    >>> from uq.calibration import fpr_at_tpr
    >>> fpr_at_tpr([0.1, 0.2, 0.3, 0.4], [0.35, 0.5])
    0.25
    """
    if not 0 < tpr <= 1:
        raise ParameterError(f"fpr_at_tpr: tpr must lie in (0, 1], got {tpr!r}.")
    return _evaluate("fpr_at_tpr", lambda c: curve_fpr_at_tpr(c, tpr), score_in, score_out)


def detection_error(score_in: ArrayLike | Tensor, score_out: ArrayLike | Tensor) -> float:
    """Error rate of the best threshold when familiar and OOD inputs are equally frequent.

    Parameters
    ----------
    score_in : array-like of shape (n,)
        Scores of inputs like the training data; high means OOD.
    score_out : array-like of shape (k,)
        Scores of OOD inputs, the positive class.

    Returns
    -------
    float
        min_t ½ (FPR(t) + FNR(t)) in [0, 0.5]: 0.5 is chance, lower is better. The threshold is
        chosen on the scores that are judged, which flatters small samples.

    Notes
    -----
    One less this is the *detection accuracy* of Lee et al. (2018); 1 − 2 · error is the largest gap
    between the two distribution functions. Liang et al. (2018) also call ½ (FPR + FNR) detection
    error, but at the threshold of 95 % true positives, with the familiar inputs as positives.

    References
    ----------
    K. Lee, K. Lee, H. Lee, J. Shin. "A simple unified framework for detecting out-of-distribution
    samples and adversarial attacks." NeurIPS 2018. arXiv:1807.03888.
    S. Liang, Y. Li, R. Srikant. "Enhancing the reliability of out-of-distribution image detection
    in neural networks." ICLR 2018. arXiv:1706.02690.

    Examples
    --------
    >>> from uq.calibration import detection_error
    >>> detection_error([0.1, 0.2, 0.3, 0.4], [0.35, 0.5])  # flags one of four, misses none
    0.125
    """
    return _evaluate("detection_error", curve_detection_error, score_in, score_out)


def roc_curve(
    score_in: ArrayLike | Tensor, score_out: ArrayLike | Tensor, *, max_points: int = 500
) -> tuple[Floats, Floats]:
    """Return the corners of the ROC curve, few enough to draw.

    Parameters
    ----------
    score_in : array-like of shape (n,)
        Scores of inputs like the training data; high means OOD.
    score_out : array-like of shape (k,)
        Scores of OOD inputs, the positive class.
    max_points : int, default=500
        Largest number of points, >= 2. A curve with more corners is thinned evenly along its
        length, which moves no point of it by more than 2/(max_points − 1).

    Returns
    -------
    fpr, tpr : ndarray of shape (n_points,)
        Shares of familiar and of OOD inputs above each threshold, from (0, 0) to (1, 1). Equal
        scores make one slanted step; points on straight stretches are left out.

    See Also
    --------
    sklearn.metrics.roc_curve : never thins, and gives the thresholds too.

    Examples
    --------
    >>> from uq.calibration import roc_curve
    >>> fpr, tpr = roc_curve([0.1, 0.2, 0.3, 0.4], [0.35, 0.5])
    >>> fpr.tolist(), tpr.tolist()
    ([0.0, 0.0, 0.25, 0.25, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0])
    """
    if not isinstance(max_points, int | np.integer) or max_points < 2:
        raise ParameterError(f"roc_curve: max_points must be an integer >= 2, got {max_points!r}.")
    curve = _curve("roc_curve", score_in, score_out)
    points = np.stack([curve.false_positives, curve.true_positives])  # (2, groups), whole numbers
    points = np.concatenate([np.zeros((2, 1)), points], axis=1)
    step = np.diff(points)
    turns = step[0, 1:] * step[1, :-1] != step[0, :-1] * step[1, 1:]
    points = points[:, np.r_[True, turns, True]]
    fpr, tpr = points / points[:, -1:]
    if len(fpr) > max_points:
        # fpr + tpr is the length along the axes, so skipped points lie close to a kept one.
        kept = np.unique(np.searchsorted(fpr + tpr, np.linspace(0, 2, max_points)))
        fpr, tpr = fpr[kept], tpr[kept]
    return fpr, tpr


# -- scores ------------------------------------------------------------------------------------


def ood_score(prediction: Predictive, kind: ScoreKind = "auto") -> Floats:
    """Score of each row that should be high on OOD inputs.

    Parameters
    ----------
    prediction : ClassPredictive or RealPredictive
        Predictive distribution of n rows; a regression may have m outputs.
    kind : {"auto", "max_probability", "entropy", "mutual_information", "epistemic", "vacuity", \
            "differential_entropy", "variance"}
        Classification: ``"max_probability"`` is 1 − max p (Hendrycks and Gimpel, 2017),
        ``"entropy"`` the entropy of the predictive, ``"mutual_information"`` or ``"epistemic"`` the
        epistemic part of it; both in nats. ``"vacuity"``, which orders rows as the negative of the
        total evidence does, and ``"differential_entropy"`` are for Dirichlet predictions.
        Regression: ``"epistemic"`` or ``"variance"``, the
        epistemic or the whole predictive variance. ``"auto"`` is the entropy for classification;
        for regression the epistemic variance, or the whole where the method has no epistemic one.

    Returns
    -------
    ndarray of shape (n,)
        Scores in float64. Variances are averaged over outputs, which should then be in like units.

    Raises
    ------
    DataError
        If ``prediction`` is no predictive distribution of several rows.
    ParameterError
        If ``kind`` is unknown or does not exist for this distribution.
    NoEpistemicError
        If the epistemic part is asked of a distribution that has none.

    Notes
    -----
    1 − max p is summed from the other probabilities, so that predictions whose largest probability
    rounds to 1 are still told apart.

    References
    ----------
    D. Hendrycks, K. Gimpel. "A baseline for detecting misclassified and out-of-distribution
    examples in neural networks." ICLR 2017. arXiv:1610.02136.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import ood_score
    >>> from uq.distributions import CategoricalMixture, NormalMixture
    >>> ood_score(NormalMixture(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor(1.0)))
    array([0., 1.])
    >>> sure_or_not = CategoricalMixture(torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log())
    >>> ood_score(sure_or_not, kind="max_probability").round(3)
    array([0.1, 0.5])
    """
    if not isinstance(prediction, ClassPredictive | RealPredictive):
        raise DataError(
            "ood_score: prediction must be a predictive distribution of uq, got a "
            f"{type(prediction).__name__}."
        )
    of_classes = isinstance(prediction, ClassPredictive)
    kinds = _CLASS_SCORES if of_classes else _REAL_SCORES
    if kind not in kinds:
        task = "classification" if of_classes else "regression"
        raise ParameterError(
            f"ood_score: kind must be one of {list(kinds)} for {task}, got {kind!r}."
        )
    shape = tuple(prediction.batch_shape)
    if not 1 <= len(shape) <= (1 if of_classes else 2):
        raise DataError(
            f"ood_score: prediction needs batch shape {'(n,)' if of_classes else '(n,) or (n, m)'}"
            f", got {shape}."
        )
    score = as_array(kinds[kind](prediction))
    return score.mean(tuple(range(1, score.ndim)), dtype=np.float64)


def _one_less_max(d: ClassPredictive) -> Tensor:
    p = d.probs
    return p.scatter(-1, p.argmax(-1, keepdim=True), 0.0).sum(-1)


def _dirichlet(d: ClassPredictive, kind: str) -> DirichletCategorical:
    if not isinstance(d, DirichletCategorical):
        raise ParameterError(
            f"ood_score: kind={kind!r} is for a DirichletCategorical, got a {type(d).__name__}; "
            "use 'entropy' or 'epistemic'."
        )
    return d


def _epistemic_if_any(d: RealPredictive) -> Tensor:
    try:
        return d.epistemic
    except NoEpistemicError:
        return torch.as_tensor(d.variance)


_CLASS_SCORES: dict[str, Callable[[Any], Tensor]] = {
    "auto": lambda d: d.entropy(),
    "max_probability": _one_less_max,
    "entropy": lambda d: d.entropy(),
    "mutual_information": lambda d: d.epistemic,
    "epistemic": lambda d: d.epistemic,
    "vacuity": lambda d: _dirichlet(d, "vacuity").vacuity,
    "differential_entropy": lambda d: _dirichlet(d, "differential_entropy").differential_entropy(),
}
_REAL_SCORES: dict[str, Callable[[Any], Tensor]] = {
    "auto": _epistemic_if_any,
    "epistemic": lambda d: d.epistemic,
    "variance": lambda d: d.variance,
}


# -- checks ------------------------------------------------------------------------------------


def check_scores(name: str, scores: ArrayLike | Tensor) -> Floats:
    """Scores as float64 of shape (n,), n > 0; infinity is a score like any other."""
    try:
        s = as_array(scores).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must hold numbers: {error}.") from error
    if s.ndim != 1 or len(s) == 0:
        raise DataError(f"{name} needs shape (n,) with n >= 1, got {s.shape}.")
    if np.isnan(s).any():
        raise DataError(f"{name} is NaN at row {int(np.isnan(s).argmax())}.")
    return s


def _curve(where: str, score_in: ArrayLike | Tensor, score_out: ArrayLike | Tensor) -> Curve:
    familiar = check_scores(f"{where}: score_in", score_in)
    out = check_scores(f"{where}: score_out", score_out)
    return ScoreGroups(familiar, out).curve(np.ones(len(familiar)), np.ones(len(out)))


def _evaluate(
    where: str,
    statistic: Callable[[Curve], Floats],
    score_in: ArrayLike | Tensor,
    score_out: ArrayLike | Tensor,
) -> float:
    for name, scores in (("score_in", score_in), ("score_out", score_out)):
        if isinstance(scores, Predictive):
            raise DataError(
                f"{where}: {name} must be one number a row, got a {type(scores).__name__}; pass "
                f"ood_score({name})."
            )
    return float(statistic(_curve(where, score_in, score_out)))

"""How well an uncertainty score tells out-of-distribution (OOD) inputs from familiar ones.

High score means OOD and OOD is the positive class. Thresholds stand only between different
scores, so that ties cannot be sorted in anyone's favour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from uq.calibration.definitions import Definition
from uq.calibration.rows import as_array
from uq.distributions import NormalMixture, Predictive
from uq.errors import DataError, NoEpistemicError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]


OOD_METRICS = (
    Definition(
        "auroc",
        "AUROC",
        "probability that an OOD input gets the higher score; a tie counts one half",
        "higher",
    ),
    Definition(
        "aupr_in",
        "AUPR-in",
        "average precision of finding the held-out inputs, by low scores",
        "higher",
    ),
    Definition(
        "aupr_out",
        "AUPR-out",
        "average precision of finding the OOD inputs, by high scores",
        "higher",
    ),
    Definition(
        "fpr_at_95_tpr",
        "FPR at 95 % TPR",
        "share of held-out inputs flagged by the threshold that flags 95 % of the OOD inputs",
        "lower",
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
        self._order = np.argsort(-scores, kind="stable")
        ranked = scores[self._order]
        self._starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        self._n_in = len(score_in)

    def metrics(self, weight_in: Floats, weight_out: Floats) -> Floats:
        """Values (..., metrics) of ``OOD_METRICS`` under row weights."""
        out = self.curve(weight_in, weight_out)
        familiar = out.reversed()
        return np.stack(
            [curve_auroc(out), curve_aupr(familiar), curve_aupr(out), curve_fpr_at_tpr(out)], -1
        )

    def curve(self, weight_in: Floats, weight_out: Floats) -> Curve:
        """Cumulate row weights (..., n_in) and (..., n_out) from the highest score down."""
        weights = np.concatenate([weight_in, weight_out], -1)[..., self._order]
        is_out = self._order >= self._n_in
        out, familiar = np.where(is_out, weights, 0.0), np.where(is_out, 0.0, weights)
        return Curve(
            np.add.reduceat(out, self._starts, axis=-1).cumsum(-1),
            np.add.reduceat(familiar, self._starts, axis=-1).cumsum(-1),
        )


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


def ood_score(prediction: Predictive) -> Floats:
    """Score that should be high on OOD inputs.

    Parameters
    ----------
    prediction : CategoricalMixture or NormalMixture
        Predictive distribution of batch shape (n,), or (n, m) for regression.

    Returns
    -------
    ndarray of shape (n,)
        Classification: the predictive entropy, in nats. Regression: the epistemic variance, or
        the whole variance where the method has no epistemic one; averaged over outputs.

    Examples
    --------
    >>> import torch
    >>> from uq.calibration import ood_score
    >>> from uq.distributions import NormalMixture
    >>> ood_score(NormalMixture(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor(1.0)))
    array([0., 1.])
    """
    if isinstance(prediction, NormalMixture):
        try:
            score = as_array(prediction.epistemic)
        except NoEpistemicError:
            score = as_array(prediction.variance)
    else:
        score = as_array(prediction.entropy())
    return score.mean(tuple(range(1, score.ndim)), dtype=np.float64)


def check_scores(name: str, scores: ArrayLike | Tensor) -> Floats:
    """Scores as finite float64 of shape (n,), n > 0."""
    s = as_array(scores).astype(np.float64)
    if s.ndim != 1 or len(s) == 0:
        raise DataError(f"{name} needs shape (n,) with n >= 1, got {s.shape}.")
    if np.isnan(s).any():
        raise DataError(f"{name} is NaN at row {int(np.isnan(s).argmax())}.")
    return s


def _evaluate(
    where: str,
    statistic: Callable[[Curve], Floats],
    score_in: ArrayLike | Tensor,
    score_out: ArrayLike | Tensor,
) -> float:
    familiar = check_scores(f"{where}: score_in", score_in)
    out = check_scores(f"{where}: score_out", score_out)
    curve = ScoreGroups(familiar, out).curve(np.ones(len(familiar)), np.ones(len(out)))
    return float(statistic(curve))

"""Conformal prediction sets: the classes that the label of a row may well be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from uq.calibration.conformal import (
    check_coverage,
    kth_score,
    match_folds,
    pair_folds,
    rank,
    rows_needed,
    warn_too_few,
)
from uq.calibration.rows import ClassificationRows, Names, as_array, check_finite_rows
from uq.distributions import ClassPredictive
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]

CLASS_SCORES = ("lac", "aps", "raps")
# Numbers that one pass over (rows, classes) holds at a time.
_CHUNK = 1 << 18
# Decimals of scores: sums of the same numbers in another order are the same.
_DECIMALS = 12
# Log probabilities are weighted by numbers of this size: rows that differ by 1e-2 in them have
# unrelated noise, and rounding of 1e-7 hardly moves it.
_NOISE_SCALE = 1e3


class ConformalSets(BaseEstimator):
    """Sets of classes that hold the label with a stated probability, whatever the model got wrong.

    Parameters
    ----------
    score : {"lac", "aps", "raps"}, default="lac"
        What a held-out label is judged by; p are the row's class probabilities.

        - "lac": 1 − p_y. The default: where the probabilities are right, no other sets of the
          same coverage are smaller on average. Easy rows are covered more often than hard ones.
        - "aps": mass of the classes at least as probable as the label. Larger sets, which adapt to
          how hard a row is.
        - "raps": "aps" plus a penalty on each class beyond ``k_reg``, so that the many improbable
          classes of a long tail stay out.
    coverage : float, default=0.9
        Probability c that the set of a new row holds its label, in (0, 1).
    class_conditional : bool, default=False
        True promises the coverage for the rows of each class by themselves (Mondrian), from a
        threshold for each: more rows are needed, those of every class. A class without enough of
        them is in all sets.
    k_reg : int, default=1
        Classes that cost nothing, for "raps". 1: any second class must earn its place.
    penalty_weight : float, default=0.1
        λ of each class beyond ``k_reg`` for "raps", in units of probability. By default ten classes
        more than ``k_reg`` cost as much as all the mass there is.
    randomized : bool, default=False
        For "aps" and "raps": True counts a random share of the mass of the class itself, which
        makes sets smaller as a rule, some of them empty. The randomness is a fixed function of the
        row's probabilities, so that the set of a row is always the same.
    allow_empty : bool, default=True
        False puts the most probable class in sets that would be empty. Coverage can then exceed c
        by more than chance.
    random_state : int, RandomState or None, default=None
        Fixes the random function.

    Attributes
    ----------
    threshold_ : ndarray of shape (n_classes,)
        Highest score with which a class is in a set; infinite with too few rows. All equal unless
        ``class_conditional``.
    scores_ : list of ndarray of shape (n_k,)
        Scores of the held-out labels in increasing order, for each fold; one fold unless ``fit``
        was given several.
    classes_ : ndarray of shape (n_classes,)
        Labels.
    noise_ : ndarray of shape (n_classes,)
        Weights of the random function.

    See Also
    --------
    uq.Conformal : the same behind an estimator, which holds the rows out itself.
    TemperatureScaling : corrects the probabilities rather than a set.

    Notes
    -----
    With k = ⌈(n + 1) c⌉ and the k-th smallest score s_(k) of n held-out rows, the set is
    {y : s(x, y) <= s_(k)}. The scores are

        lac   1 − p_y,
        aps   Σ {p_j : p_j > p_y} + u Σ {p_j : p_j = p_y},    u = 1, or in [0, 1) if randomized,
        raps  aps + λ max(0, r − k_reg),                      r = #{j : p_j >= p_y}.

    Classes that tie in probability share their fate. Each score is a fixed function of (p, y): so
    the set holds the label of a new row with probability in [c, c + 1/(n + 1)] if rows are
    exchangeable and scores have no ties, and at least c with ties (which all rows have, for which
    the label is the least probable class and u = 1: their score is 1). This is on average over
    held-out and new rows, and no promise for each x. If k > n, that is with fewer than c/(1 − c)
    rows (9 for c = 0.9), all sets hold all classes.

    The noise is u = Σ_k a_k log p_(k) modulo 1, with sorted probabilities and large random weights
    a: spread evenly over [0, 1) across rows, and equal for rows of the same probabilities. That is
    enough for the coverage above, which holds for any function.

    Lists of the folds' distributions and labels give cross-conformal sets (CV+): a class is in the
    set unless k or more of the held-out scores are below its own by the model of their fold. Then
    2c − 1 − √(2/n) is what is certain, and c is typical.

    References
    ----------
    M. Sadinle, J. Lei, L. Wasserman, "Least Ambiguous Set-Valued Classifiers with Bounded Error
    Levels", JASA 2019, arXiv 1609.00451 ("lac", class-conditional).
    Y. Romano, M. Sesia, E. Candès, "Classification with Valid and Adaptive Coverage", NeurIPS
    2020, arXiv 2006.02544 ("aps", CV+).
    A. Angelopoulos, S. Bates, J. Malik, M. Jordan, "Uncertainty Sets for Image Classifiers using
    Conformal Prediction", ICLR 2021, arXiv 2009.14193 ("raps").

    Examples
    --------
    The label is the class of 0.7 in nine of ten rows, and once that of 0.2:

    >>> import torch
    >>> from uq.calibration import ConformalSets
    >>> from uq.distributions import CategoricalMixture
    >>> dist = CategoricalMixture(torch.tensor([[[0.7, 0.2, 0.1]] * 10]).log())
    >>> y = [0] * 9 + [1]
    >>> ConformalSets(coverage=0.8).fit(dist, y).predict_set(dist[:1])
    array([[ True, False, False]])
    >>> ConformalSets(coverage=0.9).fit(dist, y).predict_set(dist[:1])
    array([[ True,  True, False]])
    """

    threshold_: Floats
    scores_: list[Floats]
    classes_: NDArray[Any]
    noise_: Floats

    def __init__(
        self,
        score: Literal["lac", "aps", "raps"] = "lac",
        coverage: float = 0.9,
        class_conditional: bool = False,
        k_reg: int = 1,
        penalty_weight: float = 0.1,
        randomized: bool = False,
        allow_empty: bool = True,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.score = score
        self.coverage = coverage
        self.class_conditional = class_conditional
        self.k_reg = k_reg
        self.penalty_weight = penalty_weight
        self.randomized = randomized
        self.allow_empty = allow_empty
        self.random_state = random_state

    # -- fit -------------------------------------------------------------------------------

    def fit(
        self,
        dist: ClassPredictive | Sequence[ClassPredictive],
        y: ArrayLike | Tensor | Sequence[ArrayLike | Tensor],
    ) -> Self:
        """Score held-out labels.

        Parameters
        ----------
        dist : ClassPredictive, or list of them
            Predictive distribution of rows that the model was not trained on. For CV+ a list with
            one for the rows of each fold, by the model that was fitted without them.
        y : array-like of shape (n,), or list of them
            The labels, as in ``dist.classes``.

        Warns
        -----
        UserWarning
            If there are too few rows (of a class, if ``class_conditional``), so that all sets hold
            all classes (that class).

        Raises
        ------
        DataError
            If shapes do not match, there is NaN, a label is unknown, or folds differ in classes.
        ParameterError
            If a constructor argument cannot be used, or class-conditional sets are asked for with
            folds.
        """
        where = "ConformalSets.fit"
        self._check_parameters()
        folds = pair_folds(where, dist, y)
        if len(folds) > 1 and self.class_conditional:
            raise ParameterError(
                f"{where}: class_conditional=True has no cross-conformal form with a known "
                "guarantee; give one distribution of held-out rows."
            )
        for d, _ in folds:
            _check_class_predictive(where, d)
        rows = [ClassificationRows(t, d, Names(where, "y", "dist")) for d, t in folds]
        classes = rows[0].classes
        if any(r.classes.tolist() != classes.tolist() for r in rows):
            raise DataError(f"{where}: the distributions of the folds have different classes.")
        noise = check_random_state(self.random_state).standard_normal(len(classes))
        self.noise_ = _NOISE_SCALE * noise
        self.classes_ = classes
        scores = [self._label_scores(r) for r in rows]
        if self.class_conditional:
            self.threshold_ = self._class_thresholds(scores[0], rows[0].y)
        else:
            self.threshold_ = self._threshold(where, scores, self.coverage)
        self.scores_ = [np.sort(s) for s in scores]
        return self

    def _check_parameters(self) -> None:
        if self.score not in CLASS_SCORES:
            listed = ", ".join(map(repr, CLASS_SCORES))
            raise ParameterError(
                f"ConformalSets: score must be one of {listed}, got {self.score!r}."
            )
        check_coverage("ConformalSets", self.coverage)
        if not isinstance(self.k_reg, Integral) or self.k_reg < 0:
            raise ParameterError(
                f"ConformalSets: k_reg must be an integer >= 0, got {self.k_reg!r}."
            )
        if not isinstance(self.penalty_weight, Real) or not 0 <= self.penalty_weight < np.inf:
            raise ParameterError(
                f"ConformalSets: penalty_weight must be a number >= 0, got {self.penalty_weight!r}."
            )

    def _label_scores(self, rows: ClassificationRows) -> Floats:
        parts = [
            self._scores(rows.probs[part])[np.arange(len(rows.y[part])), rows.y[part]]
            for part in _chunks(rows.probs)
        ]
        return np.concatenate(parts)

    def _class_thresholds(self, scores: Floats, y: NDArray[np.int64]) -> Floats:
        groups = [scores[y == j] for j in range(len(self.classes_))]
        needed = rows_needed(self.coverage)
        rare = [
            f"{label!r} ({len(group)})"
            for label, group in zip(self.classes_.tolist(), groups, strict=True)
            if rank(len(group), self.coverage) > len(group)
        ]
        if rare:
            warn_too_few(
                f"ConformalSets.fit: coverage {self.coverage:g} of each class needs at least "
                f"{needed} held-out rows of it, so that these classes (rows) will be in all sets: "
                f"{', '.join(rare[:10])}{', …' * (len(rare) > 10)}; hold out more of their rows."
            )
        return np.array([float(kth_score(group, self.coverage)) for group in groups])

    def _threshold(self, where: str, scores: list[Floats], coverage: float) -> Floats:
        """Threshold for ``coverage``, with a warning if there are too few rows for it."""
        n = sum(map(len, scores))
        if rank(n, coverage) > n:
            warn_too_few(
                f"{where}: coverage {coverage:g} needs at least {rows_needed(coverage)} held-out "
                f"rows, got {n}, so that all sets will hold all classes; hold out more rows or "
                "lower the coverage."
            )
        return np.full(len(self.classes_), kth_score(np.concatenate(scores), coverage))

    # -- scores ----------------------------------------------------------------------------

    def _scores(self, p: Floats) -> Floats:
        """Scores of all classes as the label, from probabilities; both (n, n_classes)."""
        if self.score == "lac":
            return (1 - p).round(_DECIMALS)
        n_classes = p.shape[1]
        order = np.argsort(-p, axis=1, kind="stable")
        sorted_p = np.take_along_axis(p, order, 1)
        last = _last_of_tie(sorted_p)
        mass = np.pad(sorted_p.cumsum(1), ((0, 0), (1, 0)))
        score = np.take_along_axis(mass, last + 1, 1)  # of the classes at least as probable
        if self.randomized:
            first = n_classes - 1 - _last_of_tie(sorted_p[:, ::-1])[:, ::-1]
            own = score - np.take_along_axis(mass, first, 1)
            score -= (1 - self._noise(sorted_p)) * own
        if self.score == "raps":
            score += self.penalty_weight * np.maximum(last + 1 - self.k_reg, 0)
        out = np.empty_like(score)
        np.put_along_axis(out, order, score.round(_DECIMALS), 1)
        return out

    def _noise(self, sorted_p: Floats) -> Floats:
        """Noise of each row in [0, 1), shape (n, 1)."""
        log_p = np.log(np.maximum(sorted_p, np.finfo(np.float64).tiny))
        return np.mod((log_p * self.noise_).sum(1, keepdims=True), 1.0)

    # -- predict ---------------------------------------------------------------------------

    def predict_set(
        self,
        dist: ClassPredictive | Sequence[ClassPredictive],
        coverage: float | None = None,
    ) -> NDArray[np.bool_]:
        """Return which classes are in the set of each row.

        Parameters
        ----------
        dist : ClassPredictive, or list of them
            Predictive distribution of new rows; a list, from the model of each fold, if ``fit`` was
            given one.
        coverage : float, optional
            Another coverage than that of ``fit``, of the same held-out scores. Not with
            ``class_conditional``, whose scores are kept of all classes together.

        Returns
        -------
        ndarray of shape (n, n_classes)
            True where a class is in the set; columns in the order of ``classes_``.

        Raises
        ------
        DataError
            If ``dist`` has other classes than were fitted, or NaN.
        ParameterError
            If ``coverage`` is not in (0, 1), or another one with ``class_conditional``.
        """
        check_is_fitted(self)
        where = "ConformalSets.predict_set"
        coverage, threshold = self._asked(where, coverage)
        dists = match_folds(where, dist, len(self.scores_))
        for d in dists:
            _check_class_predictive(where, d)
            if len(d.batch_shape) != 1:
                raise DataError(
                    f"{where}: dist needs batch shape (n,), got {tuple(d.batch_shape)}."
                )
            if d.classes.tolist() != self.classes_.tolist():
                raise DataError(
                    f"{where}: dist has the classes {d.classes.tolist()[:10]}, but was fitted on "
                    f"{self.classes_.tolist()[:10]}."
                )
        probs = [as_array(d.probs) for d in dists]
        for p in probs:
            if len(p):
                check_finite_rows(f"{where}: dist.probs", p.sum(1))
        sets = np.empty(probs[0].shape, dtype=bool)
        for part in _chunks(probs[0]):
            sets[part] = self._in_set([p[part] for p in probs], coverage, threshold)
            if not self.allow_empty:
                total = np.sum([p[part] for p in probs], axis=0)
                top = total == total.max(1, keepdims=True)
                sets[part] |= top & ~sets[part].any(1, keepdims=True)
        return sets

    def _asked(self, where: str, coverage: float | None) -> tuple[float, Floats]:
        """Coverage asked for, and the threshold of each class."""
        if coverage is None or coverage == self.coverage:
            return self.coverage, self.threshold_
        check_coverage(where, coverage)
        if self.class_conditional:
            raise ParameterError(
                f"{where}: class-conditional sets were fitted for coverage {self.coverage:g}, got "
                f"coverage={coverage:g}; fit with that coverage."
            )
        return coverage, self._threshold(where, self.scores_, coverage)

    def _in_set(self, probs: list[Floats], coverage: float, threshold: Floats) -> NDArray[np.bool_]:
        if len(probs) == 1:
            return self._scores(probs[0]) <= threshold
        below = np.zeros(probs[0].shape, dtype=np.int64)
        for scores, p in zip(self.scores_, probs, strict=True):
            below += np.searchsorted(scores, self._scores(p))
        return below < rank(sum(map(len, self.scores_)), coverage)


def _last_of_tie(sorted_p: Floats) -> NDArray[np.int64]:
    """Position of the last of the neighbours in a row that are equal, (n, n_classes)."""
    n_classes = sorted_p.shape[1]
    position = np.broadcast_to(np.arange(n_classes), sorted_p.shape).copy()
    position[:, :-1][sorted_p[:, :-1] == sorted_p[:, 1:]] = n_classes
    last: NDArray[np.int64] = np.minimum.accumulate(position[:, ::-1], 1)[:, ::-1]
    return last


def _check_class_predictive(where: str, dist: object) -> None:
    if not isinstance(dist, ClassPredictive):
        raise DataError(
            f"{where}: dist must be a predictive distribution over classes, got a "
            f"{type(dist).__name__}; make one by CategoricalMixture(log_probabilities[None])."
        )


def _chunks(p: Floats) -> Iterator[slice]:
    """Rows a few at a time, at least one slice."""
    size = max(1, _CHUNK // p.shape[1])
    for start in range(0, max(len(p), 1), size):
        yield slice(start, start + size)

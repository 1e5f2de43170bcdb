"""Rows ranked by confidence, under any weights: selective prediction and ranking of errors.

Rows of equal confidence stand in random order, so every statistic is its mean over the orders of
the groups that they make, and needs no more than the sums over each group. With weights, a row of
weight w is w rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from uq.calibration.definitions import OneHot

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

KERNEL_WIDTH = 0.4
MAX_GROUPS = 4096  # groups beyond which resamples merge neighbours: exact to 1/4096 of a rank


@dataclass(frozen=True, eq=False)
class Ranking:
    """Rows in groups of equal confidence.

    Parameters
    ----------
    levels : ndarray of shape (G,)
        Confidence of each group, falling.
    group : ndarray of shape (n,)
        Group of each row.
    risk : ndarray of shape (n,)
        Loss of each row; 0 or 1 for classes.
    """

    levels: Floats
    group: NDArray[np.int64]
    risk: Floats

    @classmethod
    def of(cls, confidence: Floats, risk: Floats) -> Ranking:
        """Rank rows by ``confidence``."""
        levels, group = np.unique(-confidence, return_inverse=True)
        return cls(-levels, group.ravel(), risk)

    def coarse(self, n_groups: int) -> Ranking:
        """Return the same rows in at most ``n_groups`` groups of about as many rows."""
        if len(self.levels) <= n_groups:
            return self
        count = np.bincount(self.group)
        middle = (count.cumsum() - count / 2) / len(self.group)
        _, merged = np.unique((middle * n_groups).astype(np.int64), return_inverse=True)
        size = np.bincount(merged, count)
        levels = np.bincount(merged, count * self.levels) / size
        return replace(self, levels=levels, group=merged[self.group])

    def under(self, weight: Floats) -> Ranked:
        """Sums over the groups under weights (R, n)."""
        sums = self._columns.sums(weight)
        mass, loss, gap = np.split(sums, 3, axis=-1)
        return Ranked(self.levels, mass.cumsum(-1), loss.cumsum(-1), gap)

    def gaps(self, correct: Floats) -> Ranked:
        """Groups when the rows (R, n) that are right are others; for :meth:`Ranked.mmce` only."""
        right = self._ones.sums(correct)
        count = np.bincount(self.group).astype(np.float64)[None]
        gap = right - self._ones.sums(self.levels[self.group][None])
        return Ranked(self.levels, count.cumsum(-1), np.zeros_like(gap), gap)

    @cached_property
    def _columns(self) -> OneHot:
        level = self.levels[self.group]
        gap = np.where(np.isfinite(level), 1 - self.risk - level, 0.0)  # an infinite variance
        return OneHot(self.group, len(self.levels), [1.0, self.risk, gap])

    @cached_property
    def _ones(self) -> OneHot:
        return OneHot(self.group, len(self.levels), [1.0])


@dataclass(frozen=True, eq=False)
class Ranked:
    """Groups of rows from the most to the least confident, under R weightings.

    Parameters
    ----------
    levels : ndarray of shape (G,)
        Confidence of each group, falling.
    mass, loss : ndarray of shape (R, G)
        Weight and loss up to the end of each group.
    gap : ndarray of shape (R, G)
        Sum of weight · (1 − loss − confidence) of each group.
    """

    levels: Floats
    mass: Floats
    loss: Floats
    gap: Floats

    @cached_property
    def _groups(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Mass and loss before each group, and its own."""
        mass_before, loss_before = _before(self.mass), _before(self.loss)
        return mass_before, loss_before, self.mass - mass_before, self.loss - loss_before

    @cached_property
    def aurc(self) -> Floats:
        """(1/n) Σ_k risk among the k most confident rows."""
        mass_before, loss_before, mass, loss = self._groups
        rate = np.divide(loss, mass, out=np.zeros_like(mass), where=mass > 0)
        inverse = harmonic(self.mass) - harmonic(mass_before)  # Σ 1/k over the group
        return (loss + (loss_before - rate * mass_before) * inverse).sum(-1) / self.mass[:, -1]

    def best_aurc(self) -> Floats:
        """AURC of the order that puts every loss last (losses of 0 and 1)."""
        total, wrong = self.mass[:, -1], self.loss[:, -1]
        right = total - wrong
        return (wrong - right * (harmonic(total) - harmonic(right))) / total

    def augrc(self) -> Floats:
        """(1/n) Σ_k (loss of the k most confident rows)/n."""
        _, loss_before, mass, loss = self._groups
        return (loss_before * mass + loss * (mass + 1) / 2).sum(-1) / self.mass[:, -1] ** 2

    def auroc(self) -> Floats:
        """Probability that a right row is more confident than a wrong one; a tie counts ½."""
        mass_before, loss_before, mass, loss = self._groups
        right_before, right = mass_before - loss_before, mass - loss
        wrong, all_right = self.loss[:, -1], self.mass[:, -1] - self.loss[:, -1]
        pairs = (loss * (right_before + right / 2)).sum(-1)
        total = wrong * all_right
        return np.divide(pairs, total, out=np.full_like(total, np.nan), where=total > 0)

    def risk_at(self, coverage: float) -> Floats:
        """Mean loss among the share ``coverage`` of most confident rows."""
        target = coverage * self.mass[:, -1:]
        group = (self.mass >= target * (1 - 1e-12)).argmax(-1)[:, None]
        mass_before, loss_before, mass, loss = (
            np.take_along_axis(a, group, -1) for a in self._groups
        )
        part = np.clip((target - mass_before) / mass, 0.0, 1.0)
        return ((loss_before + part * loss) / target)[:, 0]

    def coverage_at(self, risk: float) -> Floats:
        """Largest share of rows, from the most confident, whose mean loss is at most ``risk``."""
        mass_before, loss_before, mass, loss = self._groups
        rate = np.divide(loss, mass, out=np.zeros_like(mass), where=mass > 0)
        whole = self.loss <= risk * self.mass + 1e-12
        # Within a group the mean loss moves from one end's value to the other's.
        starts = loss_before <= risk * mass_before + 1e-12
        with np.errstate(divide="ignore", invalid="ignore"):
            cut = (loss_before - rate * mass_before) / (risk - rate)
        reached = np.where(
            whole, self.mass, np.where(starts & (mass_before > 0), np.minimum(cut, self.mass), 0.0)
        )
        return np.nan_to_num(reached).max(-1) / self.mass[:, -1]

    def mmce(self) -> Floats:
        """√(Σ_ij e_i e_j k(r_i, r_j))/n with e = correct − r, k = exp(−|r − r′|/0.4).

        The kernel is a product on either side of the diagonal, so one cumulated sum replaces n².
        """
        growth = np.exp(self.levels / KERNEL_WIDTH)
        above = _before((self.gap / growth).cumsum(-1))  # groups of higher confidence
        total = np.square(self.gap).sum(-1) + 2 * (self.gap * growth * above).sum(-1)
        return np.sqrt(total.clip(min=0)) / self.mass[:, -1]


def harmonic(n: Floats) -> Floats:
    """H(n) = Σ_{k ≤ n} 1/k, by the digamma function between whole numbers."""
    from scipy.special import digamma

    # Resampled weights are whole numbers, whose table is made once.
    if n.size > 1000 and ((whole := n.astype(np.int64)) == n).all():
        found: Floats = _harmonic_numbers(int(whole.max()))[whole]
        return found
    return digamma(n + 1) + np.euler_gamma


@lru_cache(maxsize=2)
def _harmonic_numbers(top: int) -> Floats:
    return np.concatenate([[0.0], np.cumsum(1 / np.arange(1, top + 1))])


def _before(cumulated: Floats) -> Floats:
    """Sums before each group."""
    return np.concatenate([np.zeros_like(cumulated[..., :1]), cumulated[..., :-1]], -1)

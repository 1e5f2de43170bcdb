"""Rows ranked by confidence, under any weights: selective prediction and ranking of errors.

Ties stand in random order, so every statistic is its mean over the orders of equal confidences.
With weights, a row of weight w is w rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Rows from the most to the least confident.

    Parameters
    ----------
    order : ndarray of shape (n,)
        Positions of the rows.
    confidence : ndarray of shape (n,)
        Confidence in that order, falling.
    risk : ndarray of shape (n,) or (R, n)
        Loss of each row in that order; 0 or 1 for classes.
    weight : ndarray of shape (R, n)
        Weights in that order, a line for each weighting.
    """

    order: NDArray[np.int64]
    confidence: Floats
    risk: Floats
    weight: Floats

    @classmethod
    def of(cls, confidence: Floats, risk: Floats) -> Ranking:
        """Rank rows by ``confidence``, each with weight 1."""
        order = np.argsort(-confidence, kind="stable")
        return cls(order, confidence[order], risk[order], np.ones((1, len(order))))

    def under(self, weight: Floats) -> Ranking:
        """Return the same rows under weights (R, n) in their original order."""
        changed = replace(self, weight=weight[:, self.order])
        changed.__dict__["_ends"] = self._ends
        return changed

    def with_risk(self, risk: Floats) -> Ranking:
        """Return the same rows with other losses (R, n), in the order of the ranking."""
        return replace(self, risk=risk)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Position of the last row of each group of equal confidence."""
        return np.flatnonzero(np.r_[self.confidence[1:] != self.confidence[:-1], True])

    @cached_property
    def mass(self) -> Floats:
        """Weight up to the end of each group, (R, groups)."""
        return self.weight.cumsum(-1)[:, self._ends]

    @cached_property
    def loss(self) -> Floats:
        """Loss up to the end of each group, (R, groups)."""
        return (self.weight * self.risk).cumsum(-1)[:, self._ends]

    @property
    def _groups(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Mass and loss before each group, and its own."""
        mass_before, loss_before = _before(self.mass), _before(self.loss)
        return mass_before, loss_before, self.mass - mass_before, self.loss - loss_before

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
        gap = self.weight * (1 - self.risk - self.confidence)
        growth = np.exp(self.confidence / KERNEL_WIDTH)
        above = _before((gap / growth).cumsum(-1))  # rows of higher confidence
        total = np.square(gap).sum(-1) + 2 * (gap * growth * above).sum(-1)
        return np.sqrt(total.clip(min=0)) / self.weight.sum(-1)


KERNEL_WIDTH = 0.4


def harmonic(n: Floats) -> Floats:
    """H(n) = Σ_{k ≤ n} 1/k, by the digamma function between whole numbers."""
    from scipy.special import digamma

    top = n.max()
    # A table where that is cheaper; resampled weights are whole numbers.
    if n.size > top and (whole := n.astype(np.int64)).max() == top and (whole == n).all():
        table = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, top + 1))])
        found: Floats = table[whole]
        return found
    return digamma(n + 1) + np.euler_gamma


def _before(cumulated: Floats) -> Floats:
    """Sums before each group."""
    return np.concatenate([np.zeros_like(cumulated[..., :1]), cumulated[..., :-1]], -1)

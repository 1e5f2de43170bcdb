"""Distance quantiles, the high-reliability region and its sampling error, for SDM activations.

Held-out (calibration) rows with q, d0, true class y and P = SDM(z) say how far is unusual and how
reliable an answer is. With the lists CDF_c = {d0_i : y_i = c, q_i > 0},

    d  = min_c (1 − #{v ∈ CDF_c : v < d0} / #CDF_c)          (0 if one of the lists is empty)
    q' = min(q, (2 + q)^{P_ŷ})                                (0 exactly where q = 0)

The region is the smallest t among the q' >= 1 such that for each class c the ⌊(1 − α) n_c⌋-th
smallest P_c of the rows of class c with q' >= t, ψ_c, is at least α. A row is answered where
q' >= t and P_ŷ >= ψ_ŷ; t = ∞, nothing answered, says that α is out of reach.

Weights of rows count as if rows were repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from uq.distributions import CategoricalMixture
from uq.errors import DataError, ParameterError
from uq.inference.posterior import Posterior
from uq.inference.sdm import MAX_Q, Matches, match
from uq.nn.sdm import ExemplarAdaptor, log_base, sdm_logits

# Distances and probabilities of the same row, computed in batches of different size, differ by
# rounding; a row must still equal itself.
TIE = 1e-6
_FEATURE_ROWS = 8192
# d = 0 makes all classes equal; this keeps the predicted one the largest, by less than 1e-7.
_SMALLEST_D = 2.0**-30


class Cdf(NamedTuple):
    """Values in order, and the weight of the first k of them for k = 0, 1, …"""

    values: Tensor
    weight: Tensor

    def share(self, t: Tensor, *, right: bool) -> Tensor:
        """Share of the values that are < t, or <= t with ``right``; 1 if there are none."""
        if not len(self.values):
            return torch.ones_like(t)
        return self.below(t, right=right) / self.weight[-1]

    def below(self, t: Tensor, *, right: bool) -> Tensor:
        """Weight of the values that are < t, or <= t with ``right``."""
        return self.weight[torch.searchsorted(self.values, t.contiguous(), right=right)]


def class_cdfs(
    values: Tensor, labels: Tensor, n_classes: int, weight: Tensor | None = None
) -> list[Cdf]:
    """Empirical distribution of ``values`` (n,) within each of the classes ``labels`` (n,)."""
    cdfs = []
    for c in range(n_classes):
        at = labels == c
        ordered, order = values[at].double().sort(stable=True)
        w = torch.ones_like(ordered) if weight is None else weight[at].double()[order]
        cdfs.append(Cdf(ordered, torch.cat([w.new_zeros(1), w.cumsum(0)])))
    return cdfs


def distance_cdfs(
    d0: Tensor, q: Tensor, labels: Tensor, n_classes: int, weight: Tensor | None = None
) -> list[Cdf]:
    """Class-wise distributions of the distances ``d0`` of the rows with q > 0."""
    kept = q > 0
    w = None if weight is None else weight[kept]
    return class_cdfs(d0[kept], labels[kept], n_classes, w)


def distance_quantile(d0: Tensor, cdfs: list[Cdf], *, tie: float = 0.0) -> Tensor:
    """Distance quantile d of each row, in [0, 1], float64.

    Parameters
    ----------
    d0 : Tensor of shape (n,)
        Distances to the nearest support row.
    cdfs : list of Cdf
        From :func:`distance_cdfs`.
    tie : float, default=0
        Relative difference up to which distances count as equal.
    """
    t = d0.double() * (1 - tie)
    shares = torch.stack([cdf.share(t, right=False) for cdf in cdfs])
    return 1 - shares.amax(0)


def rescaled_similarity(q: Tensor, p: Tensor) -> Tensor:
    """q' = min(q, (2 + q)^p) with p the probability of the predicted class."""
    q = q.double()
    return torch.minimum(q, (p.double() * log_base(q)).exp())


@dataclass(frozen=True)
class Region:
    """High-reliability region.

    Attributes
    ----------
    alpha : float
        Accuracy that it is to have, given each true class.
    q_min : float
        Smallest q' that is answered; infinite if ``alpha`` is out of reach.
    psi : Tensor of shape (n_classes,), float64
        Smallest probability of each predicted class that is answered.
    """

    alpha: float
    q_min: float
    psi: Tensor

    def admits(self, q_prime: Tensor, p: Tensor, predictions: Tensor) -> Tensor:
        """Whether rows are answered, from q' and the probability of their predicted class."""
        similar = (q_prime >= 1) & (q_prime >= self.q_min * (1 - TIE))
        return similar & (p.double() >= self.psi.to(p.device)[predictions] - TIE)


def check_alpha(owner: str, alpha: object) -> float:
    """Return ``alpha`` if it is in (1/2, 1]."""
    ok = isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0.5 < alpha <= 1
    if not ok:
        raise ParameterError(f"{owner}: alpha must be a number > 0.5 and <= 1, got {alpha!r}.")
    return float(alpha)  # type: ignore[arg-type]


def find_region(
    q_prime: Tensor,
    p_true: Tensor,
    labels: Tensor,
    n_classes: int,
    alpha: float,
    weight: Tensor | None = None,
) -> Region:
    """Find the high-reliability region (Algorithm 1), in O(n log n).

    Parameters
    ----------
    q_prime : Tensor of shape (n,)
        q' of the calibration rows.
    p_true : Tensor of shape (n,)
        Their probability of the true class.
    labels : Tensor of shape (n,)
        Their true classes.
    n_classes : int
        Number of classes.
    alpha : float
        Accuracy asked for, in (1/2, 1].
    weight : Tensor of shape (n,), optional
        Weights.

    Returns
    -------
    Region
        With ``q_min`` = ∞ where no t will do: a class without rows is one reason, fewer than
        about 1/(1 − alpha) rows of a class with one error among them another.
    """
    alpha = check_alpha("find_region", alpha)
    if not q_prime.shape == p_true.shape == labels.shape:
        raise DataError(
            "find_region: q_prime, p_true and labels need one number a row, got shapes "
            f"{tuple(q_prime.shape)}, {tuple(p_true.shape)} and {tuple(labels.shape)}."
        )
    rest = round(1 - alpha, 10)  # 1 − 0.8 is below 0.2 in floating point
    q_prime, p_true = q_prime.double(), p_true.double()
    w = torch.ones_like(p_true) if weight is None else weight.double()
    kept = q_prime >= 1
    q_prime, p_true, y, w = (t[kept] for t in (q_prime, p_true, labels, w))
    nowhere = Region(alpha, torch.inf, p_true.new_full((n_classes,), torch.inf))
    if not len(q_prime):
        return nowhere
    order = q_prime.argsort()
    q_prime, p_true, y, w = (t[order] for t in (q_prime, p_true, y, w))
    member = torch.nn.functional.one_hot(y, n_classes).double() * w[:, None]

    def from_here_on(t: Tensor) -> Tensor:
        return t.flip(0).cumsum(0).flip(0)

    total = from_here_on(member)
    low = from_here_on(member * (p_true < alpha)[:, None])
    spared = _spared(rest, total)
    first_of_value = torch.ones_like(kept[kept])
    first_of_value[1:] = q_prime[1:] > q_prime[:-1]
    # ψ_c >= α: no more rows below α than are spared.
    valid = first_of_value & ((total > 0) & (low <= spared + 1e-9)).all(1)
    if not bool(valid.any()):
        return nowhere
    at = int(valid.nonzero()[0])
    psi = []
    for cdf, passed in zip(
        class_cdfs(p_true[at:], y[at:], n_classes, w[at:]), spared[at], strict=True
    ):
        rank = int(torch.searchsorted(cdf.weight[1:], passed + 1e-9, right=True))
        psi.append(cdf.values[min(rank, len(cdf.values) - 1)])
    return Region(alpha, float(q_prime[at]), torch.stack(psi))


def _spared(rest: float, total: Tensor) -> Tensor:
    """How many of ``total`` rows may lie below the threshold: ⌊(1 − α) n⌋."""
    return (rest * total + 1e-9).floor()


def effective_sizes(q_prime: Tensor, cdfs: list[Cdf]) -> Tensor:
    """Weight of the calibration rows of each class whose q' is no larger, shape (n, n_classes)."""
    t = q_prime.double() * (1 + TIE)
    return torch.stack([cdf.below(t, right=True) for cdf in cdfs], 1)


def dkw_error(sizes: Tensor, alpha: float) -> Tensor:
    """Half-width ε of the Dvoretzky–Kiefer–Wolfowitz band at level α for the scarcest class.

    ε = sqrt(ln(2/(1 − α)) / (2 min_c n_c)); 1 if a class has no rows, or if α is 1.
    """
    least = sizes.double().amin(1)
    if alpha >= 1:
        return torch.ones_like(least)
    level = torch.log(torch.tensor(2 / round(1 - alpha, 10), dtype=torch.float64)).to(least.device)
    return torch.where(least > 0, (level / (2 * least)).sqrt(), 1.0)


class Verdicts(NamedTuple):
    """What SDM says of each row; all tensors have the rows first, floats are float64."""

    predictions: Tensor
    probs: Tensor
    q: Tensor
    d: Tensor
    d0: Tensor
    q_prime: Tensor
    nearest: Tensor
    exemplars: Tensor
    logits: Tensor

    @property
    def p(self) -> Tensor:
        """Probability of the predicted class."""
        return self.probs.gather(1, self.predictions[:, None])[:, 0]

    def at(self, d: Tensor) -> Tensor:
        """Probability of the predicted class at another distance quantile."""
        probs = sdm_logits(self.logits, self.q.double(), d).softmax(1)
        return probs.gather(1, self.predictions[:, None])[:, 0]


class SDMPosterior(Posterior):
    """A network with an SDM activation, its support and its calibration rows.

    Parameters
    ----------
    frozen : Module
        Maps inputs to what ``body`` takes; not trained, always in eval mode.
    body : Module
        Maps that to features (n, D).
    head : ExemplarAdaptor
        Maps features to exemplars and logits.
    n_support, n_calibration : int
        Rows of each.
    """

    support: Tensor
    support_labels: Tensor
    support_predictions: Tensor
    support_rows: Tensor
    cal_d0: Tensor
    cal_q: Tensor
    cal_q_prime: Tensor
    cal_p_true: Tensor
    cal_labels: Tensor
    cal_weight: Tensor

    def __init__(
        self,
        frozen: torch.nn.Module,
        body: torch.nn.Module,
        head: ExemplarAdaptor,
        n_support: int,
        n_calibration: int,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.frozen = frozen
        self.body = body
        self.head = head
        dtype = head.exemplar.weight.dtype
        width = head.exemplar.out_features
        self.register_buffer("support", torch.zeros(n_support, width, dtype=dtype))
        for name in ("labels", "predictions", "rows"):
            self.register_buffer(f"support_{name}", torch.zeros(n_support, dtype=torch.long))
        for name in ("d0", "q_prime", "p_true", "weight"):
            self.register_buffer(f"cal_{name}", torch.zeros(n_calibration, dtype=torch.float64))
        for name in ("q", "labels"):
            self.register_buffer(f"cal_{name}", torch.zeros(n_calibration, dtype=torch.long))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.head.exemplar.weight.dtype

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self.head.classify.out_features

    # -- learn -----------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """Outputs of the frozen part, in chunks."""
        self.frozen.eval()
        return torch.cat([self.frozen(rows) for rows in x.split(_FEATURE_ROWS)])

    @torch.no_grad()
    def exemplars(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Exemplars and logits, float64, of outputs of the frozen part."""
        self.body.eval()
        parts = [self.head(self.body(rows)) for rows in embedded.split(_FEATURE_ROWS)]
        h, z = (torch.cat(ts) for ts in zip(*parts, strict=True))
        return h, z.double()

    def learn_support(self, embedded: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Hold the exemplars of the support rows under the current weights."""
        self.support, logits = self.exemplars(embedded)
        self.support_labels, self.support_rows = labels, rows
        self.support_predictions = logits.argmax(1)

    def calibrate(self, embedded: Tensor, labels: Tensor, weight: Tensor) -> Verdicts:
        """Hold what calibration rows say under the current weights and support."""
        h, z = self.exemplars(embedded)
        found = self._match(h, z.argmax(1))
        self.cal_d0, self.cal_q = found.d0, found.q
        self.cal_labels, self.cal_weight = labels, weight.double()
        d = distance_quantile(found.d0, self.cdfs)
        verdicts = _judge(h, z, found, d)
        self.cal_q_prime = verdicts.q_prime
        self.cal_p_true = verdicts.probs.gather(1, labels[:, None])[:, 0]
        return verdicts

    def match_support(self, cap: int = MAX_Q) -> Matches:
        """q and d0 of the support rows, each without itself."""
        itself = torch.arange(len(self.support), device=self.support.device)
        return match(
            self.support,
            self.support_predictions,
            self.support,
            self.support_labels,
            self.support_predictions,
            exclude=itself,
            cap=cap,
        )

    def _match(self, h: Tensor, predictions: Tensor) -> Matches:
        return match(h, predictions, self.support, self.support_labels, self.support_predictions)

    # -- predict ---------------------------------------------------------------------------

    @property
    def cdfs(self) -> list[Cdf]:
        """Distances of the calibration rows by class."""
        return distance_cdfs(
            self.cal_d0, self.cal_q, self.cal_labels, self.n_classes, self.cal_weight
        )

    def region(self, alpha: float) -> Region:
        """High-reliability region for ``alpha``."""
        return find_region(
            self.cal_q_prime,
            self.cal_p_true,
            self.cal_labels,
            self.n_classes,
            alpha,
            self.cal_weight,
        )

    def judge(self, x: Tensor) -> Verdicts:
        """What SDM says of each row of ``x``."""
        h, z = self.exemplars(self.embed(x))
        found = self._match(h, z.argmax(1))
        return _judge(h, z, found, distance_quantile(found.d0, self.cdfs, tie=TIE))

    def band(self, verdicts: Verdicts, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
        """Effective sizes (n, n_classes), and d at the lower and upper end of the DKW band."""
        cdfs = class_cdfs(self.cal_q_prime, self.cal_labels, self.n_classes, self.cal_weight)
        sizes = effective_sizes(verdicts.q_prime, cdfs)
        error = dkw_error(sizes, alpha)
        return sizes, (verdicts.d - error).clamp_min(0), (verdicts.d + error).clamp_max(1)

    def forward(self, x: Tensor, n_samples: int = 1) -> CategoricalMixture:
        """One categorical distribution a row; there are no draws."""
        v = self.judge(x)
        least = _SMALLEST_D / v.logits.abs().amax(1).clamp_min(1)
        logits = sdm_logits(v.logits, v.q.double(), torch.maximum(v.d, least))
        return CategoricalMixture(logits[None].cpu())

    def functions(self, x: Tensor, n: int) -> Tensor:
        """Class probabilities: the one function there is."""
        return self(x).logits.exp()


def _judge(h: Tensor, z: Tensor, found: Matches, d: Tensor) -> Verdicts:
    probs = sdm_logits(z, found.q.double(), d).softmax(1)
    predictions = z.argmax(1)
    p = probs.gather(1, predictions[:, None])[:, 0]
    q_prime = rescaled_similarity(found.q, p)
    return Verdicts(predictions, probs, found.q, d, found.d0, q_prime, found.nearest, h, z)

"""Mixtures over posterior draws for class labels.

Draw ``s`` predicts class probabilities p_s; the predictive is their mean p̄, and in nats

    aleatoric = mean_s H(p_s),    epistemic = mean_s KL(p_s ‖ p̄)  (the mutual information),

which add up to H(p̄). The KL form is non-negative without clamping.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from pyro.distributions import Categorical
from torch import Tensor

from uq.distributions.base import ClassPredictive, TorchDistribution
from uq.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class CategoricalMixture(ClassPredictive):
    """Equal-weight mixture of categorical distributions over posterior draws.

    Parameters
    ----------
    logits : Tensor of shape (n_draws, n, n_classes)
        Unnormalised log probabilities of each draw.
    classes : ndarray of shape (n_classes,), optional
        Labels, in the order of the columns of ``probs``; positions 0, 1, … by default. The
        distribution itself is over positions.
    validate_args : bool, optional
        False leaves out the check of values, which reads all of them.

    See Also
    --------
    torch.distributions.Categorical : a single draw.

    Examples
    --------
    >>> import torch
    >>> from uq.distributions import CategoricalMixture
    >>> d = CategoricalMixture(torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]).log())
    >>> d.probs
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    >>> torch.allclose(d.aleatoric + d.epistemic, d.entropy())
    True
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        classes: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if logits.ndim < 2:
            raise DataError(
                "CategoricalMixture: logits need shape (n_draws, …, n_classes), "
                f"got {tuple(logits.shape)}."
            )
        self.logits: Tensor = torch.log_softmax(logits, -1)
        if validate_args is not False and bool(self.logits.isnan().any()):
            raise DataError("CategoricalMixture: logits hold NaN or a row of -inf only.")
        self.classes = np.arange(logits.shape[-1]) if classes is None else np.asarray(classes)
        if self.classes.shape != (logits.shape[-1],):
            raise DataError(
                f"CategoricalMixture: classes must name each of the {logits.shape[-1]} columns, "
                f"got shape {self.classes.shape}."
            )
        super().__init__(logits.shape[1:-1], validate_args=False)

    # -- shape -------------------------------------------------------------------------------

    @property
    def n_draws(self) -> int:
        """Number of posterior draws that are mixed."""
        return self.logits.shape[0]

    @property
    def draws(self) -> TorchDistribution:
        """Categorical of each posterior draw, batch shape ``(n_draws, *batch_shape)``."""
        return Categorical(logits=self.logits, validate_args=False)

    def _with(self, logits: Tensor) -> Self:
        return type(self)(logits, classes=self.classes, validate_args=False)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Self:
        return self._with(f(self.logits))

    def _rows(self, key: Any) -> Self:
        return self._with(self.logits[:, key])

    def expand(self, batch_shape: Any, _instance: None = None) -> Self:
        """Return the distribution with its batch shape expanded to ``batch_shape``."""
        shape = (self.n_draws, *batch_shape, self.n_classes)
        extra = len(shape) - self.logits.ndim
        t = self.logits
        return self._with(t.reshape(t.shape[0], *(1,) * extra, *t.shape[1:]).expand(shape))

    # -- probabilities -------------------------------------------------------------------------

    @property
    def probs(self) -> Tensor:
        """Class probabilities averaged over draws, float64, shape (n, n_classes)."""
        mean = self.logits.exp().mean(0, dtype=torch.float64)
        return mean / mean.sum(-1, keepdim=True)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability, in nats, of class positions ``value``."""
        self._check_positions(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        # The draws go behind the batch, so that leading axes of value broadcast in front.
        per_draw = self.logits.movedim(0, -1).expand(*shape, self.n_classes, self.n_draws)
        where = value.long().expand(shape)[..., None, None].expand(*shape, 1, self.n_draws)
        picked = per_draw.gather(-2, where).squeeze(-2).double()
        return torch.logsumexp(picked, -1) - math.log(self.n_draws)

    @property
    def aleatoric(self) -> Tensor:
        """Mean entropy of the draws, in nats."""
        total = torch.zeros(self.batch_shape, dtype=torch.float64, device=self.logits.device)
        for log_p in self.logits:  # draw by draw: float64 copies of one draw only
            total += torch.special.entr(log_p.double().exp()).sum(-1)
        return total / self.n_draws

    @property
    def epistemic(self) -> Tensor:
        """Mutual information between label and model, in nats.

        Raises
        ------
        NoEpistemicError
            If there is a single draw.
        """
        if self.n_draws == 1:
            raise self._no_epistemic()
        mean = torch.zeros(self.logits.shape[1:], dtype=torch.float64, device=self.logits.device)
        for log_p in self.logits:
            mean += log_p.double().exp()
        mean /= self.n_draws
        log_mean = mean.log()
        total = torch.zeros(self.batch_shape, dtype=torch.float64, device=self.logits.device)
        for log_p in self.logits:
            p = log_p.double().exp()
            # p log(p/m) − p + m is >= 0 in each term; what is added to the KL cancels over draws.
            kl = torch.where(p > 0, p * (log_p.double() - log_mean), 0.0) - p + mean
            total += kl.clamp_min(0.0).sum(-1)  # below 0 by float64 rounding only
        return total / self.n_draws

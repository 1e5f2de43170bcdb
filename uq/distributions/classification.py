"""Mixtures over posterior draws for class labels.

Draw ``s`` predicts class probabilities p_s; the predictive is their mean p̄, and in nats

    aleatoric = mean_s H(p_s),    epistemic = mean_s KL(p_s ‖ p̄)  (the mutual information),

which add up to H(p̄). The KL form is non-negative without clamping.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from uq.distributions.base import Predictive
from uq.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike


class CategoricalMixture(Predictive):
    """Equal-weight mixture of categorical distributions over posterior draws.

    Parameters
    ----------
    logits : Tensor of shape (n_draws, n, n_classes)
        Unnormalised log probabilities of each draw.
    classes : ndarray of shape (n_classes,), optional
        Labels, in the order of the columns of ``probs``; positions 0, 1, … by default. The
        distribution itself is over positions.

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

    arg_constraints: ClassVar[dict[str, Any]] = {}  # checked in __init__, with our own messages
    has_rsample = False
    has_enumerate_support = True

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
        self.logits = torch.log_softmax(logits, -1)
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
    def support(self) -> constraints.Constraint:
        """Class positions 0 … n_classes − 1."""
        return constraints.integer_interval(0, self.n_classes - 1)

    @property
    def n_draws(self) -> int:
        """Number of posterior draws that are mixed."""
        return self.logits.shape[0]

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self.logits.shape[-1]

    @property
    def draws(self) -> TorchDistribution:
        """Categorical of each posterior draw, batch shape ``(n_draws, *batch_shape)``."""
        return Categorical(logits=self.logits, validate_args=False)

    def _with(self, logits: Tensor) -> Self:
        return type(self)(logits, classes=self.classes, validate_args=False)

    def cpu(self) -> Self:
        """Return the same distribution with its tensors on the CPU."""
        return self._with(self.logits.cpu())

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

    @property
    def confidence(self) -> Tensor:
        """Probability of the most probable class."""
        return self.probs.amax(-1)

    @property
    def mode(self) -> Tensor:
        """Position of the most probable class."""
        return self.probs.argmax(-1)

    @property
    def mean(self) -> Tensor:
        """Not defined: labels have no mean. Use ``probs``."""
        raise NotImplementedError(
            "CategoricalMixture has no mean: labels are not numbers; see .probs."
        )

    @property
    def variance(self) -> Tensor:
        """Not defined: labels have no variance. Use ``entropy()``."""
        raise NotImplementedError(
            "CategoricalMixture has no variance: labels are not numbers; see .entropy()."
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability, in nats, of class positions ``value``."""
        if not isinstance(value, Tensor):
            raise DataError(
                "CategoricalMixture.log_prob: value must be a tensor of class positions (in "
                ".classes); for labels use the model's log_score or uq.calibration.report."
            )
        if bool(((value < 0) | (value >= self.n_classes) | (value != value.floor())).any()):
            raise DataError(
                f"CategoricalMixture.log_prob: value must hold class positions 0 to "
                f"{self.n_classes - 1}, not labels or probabilities."
            )
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

    def entropy(self) -> Tensor:
        """Entropy of the averaged probabilities, in nats: aleatoric + epistemic."""
        p = self.probs
        return -torch.xlogy(p, p).sum(-1)

    # -- sampling ----------------------------------------------------------------------------

    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw class positions."""
        shape = torch.Size(sample_shape) + self.batch_shape
        n = math.prod(torch.Size(sample_shape))
        flat = self.probs.reshape(-1, self.n_classes)
        if n == 0 or flat.shape[0] == 0:
            return torch.empty(shape, dtype=torch.long, device=flat.device)
        drawn = torch.multinomial(flat, n, replacement=True, generator=generator)  # (rows, n)
        return drawn.T.reshape(shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All class positions, on a new first axis."""
        values = torch.arange(self.n_classes, device=self.logits.device)
        values = values.reshape(-1, *(1,) * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    # -- presentation --------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """Class probabilities, one column a label."""
        import pandas as pd

        probs = self.probs.reshape(-1, self.n_classes).detach().cpu().numpy()
        return pd.DataFrame(probs, columns=list(self.classes), index=self.index)

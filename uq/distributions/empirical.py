"""Predictive distributions given by draws of the target: simulators, ensembles of forecasts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from uq.distributions.base import RealPredictive, TorchDistribution, check_levels
from uq.distributions.sample_scores import check_draws, not_finite, sample_crps
from uq.errors import NoEpistemicError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class Empirical(RealPredictive):
    """Predictive distribution given by draws of the target itself, equally likely.

    For simulators, posterior predictive draws and ensembles of point forecasts.

    Parameters
    ----------
    values : Tensor or array of shape (S, n) or (S, n, m)
        Draws of the targets of n rows and m outputs, in target units, finite. Draw s of all outputs
        of a row belongs together.
    event_dim : {0, 1}, default=0
        1 makes the outputs one event, sampled together. Use :meth:`joint` rather than this.
    validate_args : bool, optional
        False leaves out the check of values, which reads all of them.

    Raises
    ------
    DataError
        If ``values`` has no axis of draws, no draws, or a value that is NaN or infinite.

    See Also
    --------
    pyro.distributions.Empirical : has no cdf, quantile or CRPS.
    NormalMixture : for draws of a mean and a scale, which says more than draws of the target.

    Notes
    -----
    The S draws are one distribution, not S: ``n_draws`` is 1. They do not tell noise from
    uncertainty about the model, so ``aleatoric`` is the whole variance and ``epistemic`` raises.
    There is no density: ``has_log_prob`` is False and ``log_prob`` raises.

    Examples
    --------
    >>> import torch
    >>> from uq.distributions import Empirical
    >>> d = Empirical(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 3.0], [6.0, 5.0]]))
    >>> d.mean, d.quantile(0.75)
    (tensor([3., 2.]), tensor([3., 3.]))
    >>> d.cdf(torch.tensor([2.0, 4.0]))
    tensor([0.5000, 0.7500])
    """

    has_rsample = False
    has_log_prob: ClassVar[bool] = False

    def __init__(
        self,
        values: Tensor | ArrayLike,
        *,
        event_dim: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        values = values if isinstance(values, Tensor) else torch.tensor(np.asarray(values))
        self.values: Tensor = values if values.is_floating_point() else values.to(torch.float64)
        if validate_args is not False:
            check_draws("Empirical", tuple(self.values.shape))
            if not bool(self.values.isfinite().all()):
                raise not_finite("Empirical: values", self.values.detach().cpu().numpy())
        self._event_dim = event_dim
        cut = self.values.ndim - event_dim
        super().__init__(self.values.shape[1:cut], self.values.shape[cut:], validate_args=False)

    # -- shape -------------------------------------------------------------------------------

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers; real vectors after :meth:`joint`."""
        return constraints.independent(constraints.real, self._event_dim)

    @property
    def n_draws(self) -> int:
        """Always 1: the draws of the target are one predictive distribution."""
        return 1

    @property
    def draws(self) -> TorchDistribution:
        """The distribution itself, with a first axis of one draw."""
        return self.expand((1, *self.batch_shape))

    def _map(self, f: Callable[[Tensor], Tensor], event_dim: int | None = None) -> Self:
        event_dim = self._event_dim if event_dim is None else event_dim
        return type(self)(f(self.values), event_dim=event_dim, validate_args=False)

    def _rows(self, key: Any) -> Self:
        return self._map(lambda t: t[:, key])

    def _kind(self) -> tuple[Any, ...]:
        return (*super()._kind(), len(self.values))

    def expand(self, batch_shape: Any, _instance: None = None) -> Self:
        """Return the distribution with its batch shape expanded to ``batch_shape``."""
        shape = (len(self.values), *batch_shape, *self.event_shape)
        extra = len(shape) - self.values.ndim
        return self._map(lambda t: t.reshape(t.shape[0], *(1,) * extra, *t.shape[1:]).expand(shape))

    def joint(self) -> Self:
        """Make the outputs of a row one event, whose dependence samples keep.

        Returns
        -------
        Empirical
            Batch shape (n,), event shape (m,). A one-output distribution returns itself.
        """
        if self._event_dim or len(self.batch_shape) < 2:
            return self
        return self._regrouped(1)

    def marginal(self) -> Self:
        """Undo :meth:`joint`: one distribution an output, batch shape (n, m)."""
        return self._regrouped(0) if self._event_dim else self

    def _regrouped(self, event_dim: int) -> Self:
        same = self._map(lambda t: t, event_dim)
        same.index = self.index
        return same

    def output(self, j: int) -> Self:
        """Marginal distribution of output ``j`` of batch shape (n, m), batch shape (n,)."""
        return self._map(lambda t: t[..., j], event_dim=0)

    # -- moments -----------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """Mean of the draws, in target units."""
        return self.values.mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance of the draws as a distribution (divided by S), in squared target units."""
        return (self.values - self.mean).square().mean(0)

    @property
    def aleatoric(self) -> Tensor:
        """The whole variance: draws of the target do not tell its sources apart."""
        return self.variance

    @property
    def epistemic(self) -> Tensor:
        """Not known from draws of the target: raises NoEpistemicError."""
        raise NoEpistemicError(
            "Empirical: draws of the target do not tell noise from uncertainty about the model, so "
            "there is no epistemic part; use NormalMixture with the mean and scale of each draw."
        )

    # -- cdf, quantiles, scores ----------------------------------------------------------------

    @cached_property
    def _sorted(self) -> Tensor:
        """Draws in increasing order, (elements of the batch, S)."""
        rows = self.values.detach().cpu().reshape(len(self.values), -1).T
        in_order = np.sort(rows.numpy(), axis=1)  # several times as fast as torch's
        return torch.from_numpy(np.ascontiguousarray(in_order)).to(self.values.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Not defined: draws have no density. Use :meth:`crps`."""
        raise NotImplementedError(
            "Empirical.log_prob: draws of the target have no density, so no log score; use crps, "
            "energy_score, pinball_loss, interval_score or the coverage of intervals instead."
        )

    def cdf(self, value: Tensor) -> Tensor:
        """Share of the draws that are <= ``value``: a step function, continuous from the right."""
        self._need_marginal("cdf")
        value = self._targets("cdf", value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        in_order = self._sorted.to(torch.result_type(self._sorted, value))
        columns = value.to(in_order.dtype).expand(shape).reshape(-1, len(in_order))
        below = torch.searchsorted(in_order, columns.T.contiguous(), right=True).T.reshape(shape)
        share = below.to(self.values.dtype) / len(self.values)
        return torch.where(value.isnan(), torch.nan, share)

    def quantile(self, q: Tensor | float | Any) -> Tensor:
        """Smallest draw x with F(x) >= q, the inverse of :meth:`cdf`.

        Parameters
        ----------
        q : float or array-like of shape (Q,)
            Levels in (0, 1).

        Returns
        -------
        Tensor
            Shape (n[, m]) for a scalar level, (Q, n[, m]) for Q levels.
        """
        self._need_marginal("quantile")
        levels = check_levels(q)
        n_values = len(self.values)
        heights = torch.arange(1, n_values + 1, dtype=torch.float64) / n_values
        position = torch.searchsorted(heights, levels.cpu()).to(self.values.device)
        out = self._sorted[:, position.reshape(-1)].T
        return out.reshape(*levels.shape, *self.batch_shape)

    @property
    def mode(self) -> Tensor:
        """Half-sample mode: the narrowest half of the draws, again and again, until two are left.

        References
        ----------
        D. R. Bickel, R. Frühwirth, "On a fast, robust estimator of the mode", Computational
        Statistics & Data Analysis 50, 2006.
        """
        self._need_marginal("mode")
        x = self._sorted
        while x.shape[1] > 2:
            half = (x.shape[1] + 1) // 2
            width = x[:, half - 1 :] - x[:, : x.shape[1] - half + 1]
            start = width.argmin(1, keepdim=True)
            x = x.gather(1, start + torch.arange(half, device=x.device))
        return x.mean(1).reshape(self.batch_shape)

    def crps(self, value: Tensor, *, fair: bool = False) -> Tensor:
        """Continuous ranked probability score of each output at ``value``, in target units.

        Parameters
        ----------
        value : Tensor of shape (n,) or (n, m)
            Outcomes.
        fair : bool, default=False
            Estimate, without bias, the score of the distribution that the draws come from, as
            :func:`sample_crps` does; the default is the score of the draws as a distribution.

        Returns
        -------
        Tensor
            Scores of shape (n,) or (n, m), lower is better.
        """
        self._need_marginal("crps")
        value = self._targets("crps", value)
        score = sample_crps(self.values, value.expand(self.batch_shape), fair=fair)
        return score.to(self.values.dtype)

    # -- sampling ----------------------------------------------------------------------------

    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Pick draws with replacement, for each row anew; outputs of a joint event together."""
        shape, values = torch.Size(sample_shape) + self.batch_shape, self.values.detach()
        chosen = torch.randint(len(values), shape, generator=generator, device=values.device)
        flat = chosen.reshape(-1, *self.batch_shape, *(1,) * self._event_dim)
        picked = values.gather(0, flat.expand(-1, *values.shape[1:]))
        return picked.reshape(shape + self.event_shape)

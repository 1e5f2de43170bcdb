"""Predictive distributions from any univariate, continuous PyTorch or Pyro distribution."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import constraints

from uq.distributions import families, numeric
from uq.distributions.base import RealPredictive, TorchDistribution, check_levels
from uq.distributions.rebuilding import Function, rebuild, structure
from uq.errors import DataError, ParameterError
from uq.threads import process_state

# Integrals over y go in pieces that end at quantiles of these levels.
_TAIL = 2.0 ** torch.tensor([-50, -35, -24, -16, -10, -6, -3], dtype=torch.float64)
_LEVELS = torch.cat([_TAIL, torch.tensor([0.5], dtype=torch.float64), 1 - _TAIL.flip(0)])
_MIDDLE = len(_TAIL)  # position of the median


class Parametric(RealPredictive):
    """Distribution of PyTorch or Pyro as a predictive distribution, one batch element a row.

    Parameters
    ----------
    base : torch.distributions.Distribution
        Univariate and continuous, in target units: batch shape (n,) or (n, m), or (n,) with event
        shape (m,) by ``.to_event(1)``. Families with a cumulative distribution in PyTorch, Pyro or
        SciPy, their transforms (``TransformedDistribution``), mixtures (``MixtureSameFamily``).
    epistemic_share : Tensor, broadcastable to the batch of ``base``, optional
        Share of the variance, in [0, 1), that is uncertainty about the model, where a method has
        integrated it out in closed form.
    event_dim : int, default=0
        Batch dimensions on the right that are one event, as in ``pyro.distributions.Independent``.
    validate_args : bool, optional
        False leaves out the check of values, which reads all of them.

    Raises
    ------
    DataError
        If ``base`` is discrete, multivariate, has no cumulative distribution, or cannot be rebuilt
        from its parameters.

    See Also
    --------
    NormalMixture : for draws of a mean and a scale, with epistemic uncertainty.
    Empirical : for draws of the target.

    Notes
    -----
    Without ``epistemic_share``, ``aleatoric`` is the whole variance and ``epistemic`` raises: there
    is one parameter value.
    ``log_prob``, ``mean``, ``variance`` and ``rsample`` carry gradients where PyTorch's do; the
    rest is computed in float64 without. What PyTorch leaves undefined stays so: the variance of a
    Student t is inf for df <= 2 and nan for df <= 1, the mode of a Uniform nan.

    The CRPS is in closed form for Normal, StudentT, Cauchy, Laplace, Logistic, Gumbel, LogNormal,
    Gamma, Chi2, Exponential, Uniform, Weibull, Beta and HalfNormal; otherwise, and where PyTorch
    lacks a mean, variance or entropy, it is an adaptive quadrature, to about 1e-10 of the distance
    between the octiles (less tails of probability 1e-15 on both sides). Where the mean is infinite
    it is ∫ (F(t) − 1{t >= y})² dt, which is finite for a Student t with df > 1/2, and else inf.

    References
    ----------
    A. Jordan, F. Krüger, S. Lerch, "Evaluating Probabilistic Forecasts with scoringRules", Journal
    of Statistical Software 90 (12), 2019.

    Examples
    --------
    >>> import torch
    >>> from pyro.distributions import StudentT
    >>> from uq.distributions import Parametric
    >>> d = Parametric(StudentT(4.0, torch.tensor([0.0, 1.0]), 2.0))
    >>> d.quantile(0.975)
    tensor([5.5529, 6.5529])
    >>> d.crps(torch.tensor([0.0, 0.0]))
    tensor([0.5274, 0.7102])
    """

    def __init__(
        self,
        base: td.Distribution,
        *,
        epistemic_share: Tensor | None = None,
        event_dim: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        while isinstance(base, td.Independent):
            event_dim += base.reinterpreted_batch_ndims
            base = base.base_dist
        if validate_args is not False:
            base = _checked(base, event_dim)
        share = epistemic_share
        if share is not None:
            share = share.expand(base.batch_shape)
            if validate_args is not False and not bool(((share >= 0) & (share < 1)).all()):
                raise ParameterError("Parametric: epistemic_share must lie in [0, 1).")
        self.base: Any = base
        self.epistemic_share = share
        self._event_dim = event_dim
        cut = len(base.batch_shape) - event_dim
        super().__init__(base.batch_shape[:cut], base.batch_shape[cut:], validate_args=False)

    # -- shape -------------------------------------------------------------------------------

    @property
    def support(self) -> constraints.Constraint:
        """Support of the base, of each output."""
        return constraints.independent(self._base_support, self._event_dim)

    @property
    def _base_support(self) -> Any:
        return self.base.support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether :meth:`rsample` exists: as for the base."""
        return self.base.has_rsample

    @property
    def n_draws(self) -> int:
        """Always 1: one parameter value."""
        return 1

    @property
    def draws(self) -> TorchDistribution:
        """The distribution itself, with a first axis of one draw."""
        return self.expand((1, *self.batch_shape))

    def _map(self, f: Function, event_dim: int | None = None) -> Self:
        share = self.epistemic_share
        return type(self)(
            rebuild(self.base, f, self.base.batch_shape),
            epistemic_share=None if share is None else f(share),
            event_dim=self._event_dim if event_dim is None else event_dim,
            validate_args=False,
        )

    def _rows(self, key: Any) -> Self:
        before = len(self.base.batch_shape)
        return self._map(lambda t: t[(slice(None),) * (t.ndim - before) + (key,)])

    def _kind(self) -> tuple[Any, ...]:
        return (*super()._kind(), structure(self.base), self.epistemic_share is None)

    def expand(self, batch_shape: Any, _instance: None = None) -> Self:
        """Return the distribution with its batch shape expanded to ``batch_shape``."""
        old, new = self.base.batch_shape, (*batch_shape, *self.event_shape)

        def expanded(t: Tensor) -> Tensor:
            before = t.shape[: t.ndim - len(old)]
            return t.reshape(*before, *(1,) * (len(new) - len(old)), *old).expand(*before, *new)

        return self._map(expanded)

    def joint(self) -> Self:
        """Make the outputs of a row one event: independent, so that their log densities add up.

        Returns
        -------
        Parametric
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

    def affine(self, shift: Tensor | float, factor: Tensor | float) -> Self:
        """Distribution of ``shift + factor * y``, with ``factor`` > 0, for a location and scale."""
        base: Any = self.base
        if set(base.arg_constraints) - {"df"} != {"loc", "scale"}:
            raise NotImplementedError(
                f"Parametric.affine needs a family with loc and scale, not {type(base).__name__}; "
                "wrap it in a TransformedDistribution first."
            )
        if not bool((torch.as_tensor(factor) > 0).all()):
            raise ParameterError("Parametric.affine: factor must be > 0.")
        kept = {"df": base.df} if "df" in base.arg_constraints else {}
        loc, scale = base.loc * factor + shift, base.scale * factor
        return type(self)(
            type(base)(loc=loc, scale=scale, **kept, validate_args=False),
            epistemic_share=self.epistemic_share,
            event_dim=self._event_dim,
            validate_args=False,
        )

    # -- moments -----------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """Predictive mean, in target units."""
        try:
            return self.base.mean
        except NotImplementedError:
            return self._same_dtype(self._moments[0])

    @property
    def variance(self) -> Tensor:
        """Predictive variance, in squared target units."""
        try:
            return self.base.variance
        except NotImplementedError:
            return self._same_dtype(self._moments[1])

    @property
    def aleatoric(self) -> Tensor:
        """Variance that is not ``epistemic``, in squared target units."""
        if self.epistemic_share is None:
            return self.variance
        return (1 - self.epistemic_share) * self.variance

    @property
    def epistemic(self) -> Tensor:
        """Variance that comes from uncertainty about the model, in squared target units.

        Raises
        ------
        NoEpistemicError
            If there is a single parameter value, without ``epistemic_share``.
        """
        if self.epistemic_share is None:
            raise self._no_epistemic()
        return self.epistemic_share * self.variance

    @property
    def _has_epistemic(self) -> bool:
        return self.epistemic_share is not None

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, from E(Y − c) = ∫ (1 − F) − ∫ F above and below c, and the like."""
        edges = self._edges
        centre = edges[_MIDDLE]

        def first(y: Tensor) -> Tensor:
            below = families.cdf(self._exact, y)
            return torch.where(y > centre, 1 - below, -below)

        mean = numeric.integrate(first, edges, self._scale)

        def second(y: Tensor) -> Tensor:
            return 2 * (y - centre) / self._scale * first(y)

        square = self._scale * numeric.integrate(second, edges, self._scale)
        return centre + mean, square - mean.square()

    def entropy(self) -> Tensor:
        """Differential entropy in nats, per output or of the joint distribution."""
        try:
            h = self.base.entropy()
        except NotImplementedError:
            h = self._same_dtype(self._numeric_entropy())
        return h.sum(-1) if self._event_dim else h

    def _numeric_entropy(self) -> Tensor:
        def surprise(y: Tensor) -> Tensor:
            log_p = self._exact.log_prob(y)
            return -self._scale * torch.special.xlogy(log_p.exp(), log_p.exp())

        return numeric.integrate(surprise, self._edges, self._scale) / self._scale

    # -- density, cdf, quantiles ---------------------------------------------------------------

    @cached_property
    def _exact(self) -> td.Distribution:
        """The base in float64, without gradients."""
        return rebuild(self.base, lambda t: t.detach().double(), self.base.batch_shape)

    @cached_property
    def _edges(self) -> Tensor:
        """Quantiles at ``_LEVELS``, (P, *batch)."""
        return self._quantiles(_LEVELS)

    @property
    def _scale(self) -> Tensor:
        """Distance between the octiles, by which errors of integrals are judged."""
        return self._edges[_MIDDLE + 1] - self._edges[_MIDDLE - 1]

    @cached_property
    def _like(self) -> Tensor:
        """An empty tensor of the device and dtype of the parameters."""
        return torch.cat([t.detach().reshape(-1)[:0] for t in _parameters(self.base)])

    def _same_dtype(self, t: Tensor) -> Tensor:
        return t.to(self._like.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, −inf outside the support; summed over the outputs of an event."""
        value = self._targets("log_prob", value)
        low, high = families.support_bounds(self.base)
        inside = (value >= low) & (value <= high) & self._base_support.check(value)
        inside = inside | value.isnan()
        if bool(inside.all()):
            log_p = self.base.log_prob(value)
        else:
            # The median stands in, so that neither the value nor its gradient is NaN.
            within = torch.where(inside, value, self.marginal().median)
            log_p = torch.where(inside, self.base.log_prob(within), -torch.inf)
        return log_p.sum(-1) if self._event_dim else log_p

    def cdf(self, value: Tensor) -> Tensor:
        """Cumulative distribution of each output."""
        self._need_marginal("cdf")
        value = self._targets("cdf", value)
        return self._same_dtype(families.cdf(self._exact, value.double()))

    def quantile(self, q: Tensor | float | Any) -> Tensor:
        """Quantiles, in closed form or by halving, to float64 rounding of the cdf.

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
        out = self._quantiles(levels.reshape(-1))
        return self._same_dtype(out.reshape(*levels.shape, *self.batch_shape))

    def _quantiles(self, levels: Tensor) -> Tensor:
        """Quantiles (Q, *batch) of each output in float64."""
        batch = self.base.batch_shape
        q = levels.to(self._like.device).reshape(-1, *(1,) * len(batch))
        q = q.expand(-1, *batch)
        try:
            return families.quantile(self._exact, q)
        except NotImplementedError:
            low, high = self._brackets(q)
            return numeric.invert(lambda x: families.cdf(self._exact, x), q, low, high)

    def _brackets(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Values between which the quantiles lie: for a mixture, the quantiles of its parts."""
        low, high = (end.double().expand_as(q) for end in families.support_bounds(self._exact))
        if isinstance(self._exact, td.MixtureSameFamily):
            n_parts = self._exact.mixture_distribution.probs.shape[-1]
            levels = q[..., None].expand(*q.shape, n_parts)
            try:
                parts = families.quantile(self._exact.component_distribution, levels)
            except NotImplementedError:
                return low, high
            low, high = parts.amin(-1), parts.amax(-1)
        return low, high

    @property
    def mode(self) -> Tensor:
        """Highest point of the density; where PyTorch has none, found between 63 quantiles."""
        self._need_marginal("mode")
        try:
            return self.base.mode
        except NotImplementedError:
            grid = self._quantiles(torch.arange(1, 64, dtype=torch.float64) / 64)
            return self._same_dtype(numeric.highest(self._exact.log_prob, grid))

    def crps(self, value: Tensor) -> Tensor:
        """Continuous ranked probability score of each output at ``value``, in target units."""
        self._need_marginal("crps")
        value = self._targets("crps", value)
        y = value.detach().expand(self.batch_shape).double()
        family = families.family_of(self._exact)
        if family is not None and family.crps is not None:
            return self._same_dtype(family.crps(self._exact, y))
        edges = torch.cat([self._edges, y[None]]).sort(0).values

        def integrand(t: Tensor) -> Tensor:
            return (families.cdf(self._exact, t) - (t > y).double()).square()

        return self._same_dtype(numeric.integrate(integrand, edges, self._scale))

    # -- sampling ----------------------------------------------------------------------------

    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw targets; a ``generator`` seeds PyTorch's for the time of the call."""
        return self._draw(self.base.sample, sample_shape, generator)

    def rsample(
        self, sample_shape: Any = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw targets with gradients, where the base can."""
        return self._draw(self.base.rsample, sample_shape, generator)

    def _draw(
        self,
        draw: Callable[[torch.Size], Tensor],
        sample_shape: Any,
        generator: torch.Generator | None,
    ) -> Tensor:
        shape = torch.Size(sample_shape)
        if generator is None:
            return draw(shape)
        # PyTorch's distributions take no generator.
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        device = self._like.device
        devices = [device] if device.type == "cuda" else []
        with process_state(), torch.random.fork_rng(devices):
            torch.manual_seed(int(seed))
            return draw(shape)


def _checked(base: Any, event_dim: int) -> Any:
    """The distribution without its own checks, if it can be used."""
    name = type(base).__name__
    if not isinstance(base, td.Distribution):
        raise DataError(
            f"Parametric: base must be a distribution of PyTorch or Pyro, got a {name}."
        )
    if base.event_shape or event_dim > 1 or event_dim > len(base.batch_shape):
        raise DataError(
            f"Parametric: base must be univariate, got a {name} of batch shape "
            f"{tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}; independent "
            "outputs go in the batch, (n, m), or in one event by .to_event(1)."
        )
    if base.support is None or base.support.is_discrete:
        raise DataError(f"Parametric: base must be continuous, got a {name}.")
    try:
        parameters = _parameters(base)
        exact = rebuild(base, lambda t: t.detach().double(), base.batch_shape)
        some = torch.full(base.batch_shape, 0.5, device=parameters[0].device)
        families.cdf(exact, some.double())
    except (NotImplementedError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise DataError(
            f"Parametric: a {name} cannot be used: it needs a cumulative distribution, and to be "
            f"rebuilt from its parameters ({error}). Draws of it can: see Empirical."
        ) from error
    if not all(bool(t.isfinite().all()) for t in parameters):
        raise DataError(f"Parametric: the parameters of {name} must be finite.")
    return rebuild(base, lambda t: t, base.batch_shape)


def _parameters(d: td.Distribution) -> list[Tensor]:
    seen: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        seen.append(t)
        return t

    rebuild(d, keep, d.batch_shape)
    return seen

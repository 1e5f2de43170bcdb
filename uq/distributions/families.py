"""Closed forms of univariate families: what PyTorch and Pyro lack, or lose digits in.

CRPS follow from E|Y − y| − ½ E|Y − Y′| = y (2F(y) − 1) + E Y − 2 E[Y; Y <= y] − ½ E|Y − Y′|; they
are collected in A. Jordan, F. Krüger, S. Lerch, "Evaluating Probabilistic Forecasts with
scoringRules", Journal of Statistical Software 90 (12), 2019, appendix A.

All functions take a distribution with float64 parameters and values that broadcast against its
batch, and carry no gradients. Values below or above the support are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from pyro.distributions import Logistic
from torch import Tensor
from torch import distributions as td

_EULER = 0.5772156649015329

Function = Callable[[Any, Tensor], Tensor]


# -- cumulative distribution, in pieces --------------------------------------------------------


def support_bounds(d: td.Distribution) -> tuple[Tensor, Tensor]:
    """Ends of the support, which may be infinite."""
    if isinstance(d, td.MixtureSameFamily):
        low, high = support_bounds(d.component_distribution)
        shape = (*d.batch_shape, d.mixture_distribution.logits.shape[-1])
        return low.expand(shape).amin(-1), high.expand(shape).amax(-1)
    if not isinstance(d, td.TransformedDistribution) or d.arg_constraints:
        return _ends(d.support)
    low, high = support_bounds(d.base_dist)
    for t in transforms_of(d):
        # An end of the domain goes to that of the codomain: t itself may not be defined there.
        (domain_low, domain_high), (a, b) = _ends(t.domain), _ends(t.codomain)
        sign = torch.as_tensor(t.sign)
        first = torch.where(low == domain_low, torch.where(sign > 0, a, b), t(low))
        second = torch.where(high == domain_high, torch.where(sign > 0, b, a), t(high))
        low, high = torch.minimum(first, second), torch.maximum(first, second)
    return low, high


def cdf(d: td.Distribution, x: Tensor) -> Tensor:
    """P(Y <= x).

    Raises
    ------
    NotImplementedError
        If neither PyTorch, Pyro nor this module knows it.
    """
    low, high = support_bounds(d)
    below, above = x <= low, x >= high
    inside = _cdf_inside(d, torch.minimum(torch.maximum(x, low), high))
    return torch.where(below, 0.0, torch.where(above, 1.0, inside))


def _cdf_inside(d: td.Distribution, x: Tensor) -> Tensor:
    family = family_of(d)
    if family is not None and family.cdf is not None:
        return family.cdf(d, x)
    if isinstance(d, td.MixtureSameFamily):
        return (d.mixture_distribution.probs * cdf(d.component_distribution, x[..., None])).sum(-1)
    if _is_generic(d):
        sign = torch.ones_like(x)
        for t in reversed(list(transforms_of(d))):
            x, sign = t.inv(x), sign * t.sign
        below = cdf(d.base_dist, x)
        return torch.where(sign > 0, below, 1 - below)
    return d.cdf(x)


def quantile(d: td.Distribution, q: Tensor) -> Tensor:
    """Values x with cdf(x) = q.

    Raises
    ------
    NotImplementedError
        If there is no closed form.
    """
    family = family_of(d)
    if family is not None and family.quantile is not None:
        return family.quantile(d, q)
    if _is_generic(d):
        sign = torch.ones_like(q)
        for t in transforms_of(d):
            sign = sign * t.sign
        x = quantile(d.base_dist, torch.where(sign > 0, q, 1 - q))
        for t in transforms_of(d):
            x = t(x)
        return x
    return d.icdf(q)


def transforms_of(d: td.TransformedDistribution) -> Iterator[td.Transform]:
    """Transforms from the base outwards, with compositions taken apart."""
    pending = list(reversed(d.transforms))
    while pending:
        t = pending.pop()
        if isinstance(t, td.ComposeTransform):
            pending.extend(reversed(t.parts))
        elif t.bijective:
            yield t
        else:
            raise NotImplementedError(f"{type(t).__name__} cannot be inverted")


def _is_generic(d: td.Distribution) -> TypeGuard[td.TransformedDistribution]:
    """Whether the cdf of ``d`` comes from a base and transforms."""
    return isinstance(d, td.TransformedDistribution) and (
        type(d).cdf is td.TransformedDistribution.cdf
    )


def _ends(c: Any) -> tuple[Tensor, Tensor]:
    ends = getattr(c, "lower_bound", -math.inf), getattr(c, "upper_bound", math.inf)
    return torch.as_tensor(ends[0]), torch.as_tensor(ends[1])


# -- helpers -----------------------------------------------------------------------------------


def _special(name: str, *args: Tensor) -> Tensor:
    """``scipy.special``'s function of that name, of tensors."""
    from scipy import special  # not needed by most users of the package, and slow to import

    value = getattr(special, name)(*(a.detach().cpu().numpy() for a in args))
    return torch.as_tensor(value, dtype=torch.float64, device=args[-1].device)


def _phi(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def _Phi(z: Tensor) -> Tensor:
    """Normal cdf with full relative precision in the lower tail."""
    return 0.5 * torch.special.erfc(-math.sqrt(0.5) * z)


def _location_scale(crps: Callable[[Tensor], Tensor]) -> Function:
    """CRPS of a location-scale family from that of its standard member."""
    return lambda d, y: d.scale * crps((y - d.loc) / d.scale)


# -- CRPS of each family -----------------------------------------------------------------------


def _normal_crps(z: Tensor) -> Tensor:
    return z * torch.erf(math.sqrt(0.5) * z) + 2 * _phi(z) - 1 / math.sqrt(math.pi)


def _laplace_crps(z: Tensor) -> Tensor:
    return z.abs() + torch.exp(-z.abs()) - 0.75


def _logistic_crps(z: Tensor) -> Tensor:
    return z.abs() + 2 * torch.log1p(torch.exp(-z.abs())) - 1


def _cauchy_crps(z: Tensor) -> Tensor:
    return (2 * z * torch.atan(z) - torch.log1p(z.square()) + math.log(4)) / math.pi


def _gumbel_crps(z: Tensor) -> Tensor:
    return 2 * _special("exp1", torch.exp(-z)) - z + _EULER - math.log(2)


def _student_crps(d: td.StudentT, y: Tensor) -> Tensor:
    """z (2F − 1) + 2√ν/((ν − 1) B(½, ν/2)) [(1 + z²/ν)^((1 − ν)/2) − r], r = B(½, ν − ½)/B(½, ν/2).

    The published form for ν > 1, rearranged. It is analytic in ν, as ∫(F − 1)² is, so it holds for
    ν > ½, where that converges though the mean may not; at ν = 1 it is the Cauchy distribution's.
    The two parts of the bracket cancel there, hence expm1.
    """
    df = d.df.clamp_min(0.5)  # where B(½, ν − ½) is infinite
    z = (y - d.loc) / d.scale
    excess = df - 1
    half = torch.full_like(df, 0.5)
    beta = _special("betaln", half, 0.5 * df)
    log_r = _special("betaln", half, df - 0.5) - beta
    # Next to ν = 1 the Taylor series of log r loses no digits.
    near = excess.abs() < 1e-5
    log_r = torch.where(near, excess * (excess * math.pi**2 / 8 - math.log(2)), log_r)
    log_power = torch.log1p(z.square() / df)
    bracket = (torch.expm1(-0.5 * excess * log_power) - torch.expm1(log_r)) / excess
    bracket = torch.where(excess == 0, math.log(2) - 0.5 * log_power, bracket)
    twice = 2 * _special("stdtr", df, -z.abs())
    return d.scale * (z.abs() * (1 - twice) + 2 * df.sqrt() * torch.exp(-beta) * bracket)


def _log_normal_crps(d: td.LogNormal, y: Tensor) -> Tensor:
    omega = (y.clamp_min(0).log() - d.loc) / d.scale
    spread = _Phi(omega - d.scale) - _Phi(-math.sqrt(0.5) * d.scale)
    return y * (2 * _Phi(omega) - 1) - 2 * torch.exp(d.loc + 0.5 * d.scale.square()) * spread


def _gamma_crps(d: td.Gamma, y: Tensor) -> Tensor:
    a, x = d.concentration, d.rate * y.clamp_min(0)
    below, partial = _special("gammainc", a, x), _special("gammainc", a + 1, x)
    half = torch.full_like(a, 0.5)
    spread = torch.exp(-_special("betaln", half, a))
    return y * (2 * below - 1) - (a * (2 * partial - 1) + spread) / d.rate


def _exponential_crps(d: td.Exponential, y: Tensor) -> Tensor:
    below = -torch.expm1(-d.rate * y.clamp_min(0))
    return y.abs() + (0.5 - 2 * below) / d.rate


def _uniform_crps(d: td.Uniform, y: Tensor) -> Tensor:
    width = d.high - d.low
    z = (y - d.low) / width
    below = z.clamp(0, 1)
    return width * ((z - below).abs() + below.square() - below + 1 / 3)


def _weibull_crps(d: td.Weibull, y: Tensor) -> Tensor:
    power = 1 / d.concentration
    x = (y.clamp_min(0) / d.scale) ** d.concentration
    mean = d.scale * torch.exp(torch.lgamma(1 + power))
    partial = _special("gammainc", 1 + power, x)
    return y * (1 - 2 * torch.exp(-x)) + mean * (torch.exp2(-power) - 2 * partial)


def _beta_crps(d: td.Beta, y: Tensor) -> Tensor:
    a, b = d.concentration1, d.concentration0
    x = y.clamp(0, 1)
    below, partial = _special("betainc", a, b, x), _special("betainc", a + 1, b, x)
    log_ratio = _special("betaln", 2 * a, 2 * b) - 2 * _special("betaln", a, b)
    mean = a / (a + b)
    return y * (2 * below - 1) + mean * (1 - 2 * partial - 2 * torch.exp(log_ratio) / a)


def _half_normal_crps(d: td.HalfNormal, y: Tensor) -> Tensor:
    z = y / d.scale
    above = z.clamp_min(0)
    inside = 2 * torch.exp(-0.5 * above.square()) - math.sqrt(2)
    below = 2 * torch.erf(math.sqrt(0.5) * above)
    return d.scale * (z * (below - 1) + math.sqrt(2 / math.pi) * inside)


# -- the table ---------------------------------------------------------------------------------


def _laplace_cdf(d: td.Laplace, x: Tensor) -> Tensor:
    z = (x - d.loc) / d.scale
    tail = 0.5 * torch.exp(-z.abs())
    return torch.where(z < 0, tail, 1 - tail)


def _laplace_quantile(d: td.Laplace, q: Tensor) -> Tensor:
    return d.loc + d.scale * torch.where(q < 0.5, (2 * q).log(), -(2 * (1 - q)).log())


@dataclass(frozen=True)
class Family:
    """Closed forms; those that are None are PyTorch's own."""

    crps: Function | None
    cdf: Function | None = None
    quantile: Function | None = None


_FAMILIES: dict[type[td.Distribution], Family] = {
    td.Normal: Family(
        _location_scale(_normal_crps),
        lambda d, x: _Phi((x - d.loc) / d.scale),
        lambda d, q: d.loc + d.scale * torch.special.ndtri(q),
    ),
    td.StudentT: Family(
        _student_crps,
        lambda d, x: _special("stdtr", d.df, (x - d.loc) / d.scale),
        lambda d, q: d.loc + d.scale * _special("stdtrit", d.df, q),
    ),
    td.Laplace: Family(_location_scale(_laplace_crps), _laplace_cdf, _laplace_quantile),
    Logistic: Family(_location_scale(_logistic_crps)),
    td.Cauchy: Family(_location_scale(_cauchy_crps)),
    td.Gumbel: Family(
        _location_scale(_gumbel_crps),
        lambda d, x: torch.exp(-torch.exp((d.loc - x) / d.scale)),
        lambda d, q: d.loc - d.scale * (-q.log()).log(),
    ),
    td.LogNormal: Family(_log_normal_crps),
    td.Gamma: Family(
        _gamma_crps,
        lambda d, x: _special("gammainc", d.concentration, d.rate * x),
        lambda d, q: _special("gammaincinv", d.concentration, q) / d.rate,
    ),
    td.Exponential: Family(
        _exponential_crps,
        lambda d, x: -torch.expm1(-d.rate * x),
        lambda d, q: -torch.log1p(-q) / d.rate,
    ),
    td.Uniform: Family(_uniform_crps),
    td.Weibull: Family(_weibull_crps),
    td.Beta: Family(
        _beta_crps,
        lambda d, x: _special("betainc", d.concentration1, d.concentration0, x),
        lambda d, q: _special("betaincinv", d.concentration1, d.concentration0, q),
    ),
    td.HalfNormal: Family(_half_normal_crps),
    td.FisherSnedecor: Family(
        None,
        lambda d, x: _special("fdtr", d.df1, d.df2, x),
        lambda d, q: _special("fdtri", d.df1, d.df2, q),
    ),
}


def family_of(d: td.Distribution) -> Family | None:
    """Closed forms of the family of ``d``, if it is in the table."""
    return next((_FAMILIES[c] for c in type(d).__mro__ if c in _FAMILIES), None)

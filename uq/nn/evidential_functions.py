"""Functions of the gamma family that Dirichlet losses need: fast, and free of cancellation.

The trigamma function is ψ1(x) = 1/(x + g(x)) with −1/2 < g < 0. For x >= 1, g, its slope,

    r(x) = −log Γ(x) + (x − 1) ψ(x) − x − ½ log ψ1(x)   and   E(x) = ψ(x) + log ψ1(x)

are smooth in t = 1/x, down to t = 0: on (0, 1] a polynomial of degree 8 is within 4e-8 (2e-7 for
the slope of g), which is about what float32 rounds. One pass over the powers of t gives all of
them; PyTorch's tetragamma alone costs thirty times as much. Recurrences lead from there to smaller
x, and to float64, where x >= 12 makes the same degree exact to 2e-11 (PyTorch's own trigamma is to
5e-10).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from scipy import special
from torch import Tensor

_DEGREE = 8
_SHIFT_FLOAT64 = 12


class GammaParts(NamedTuple):
    """Functions of α that appear in the losses, each of the shape of α."""

    trigamma: Tensor
    g_slope: Tensor
    """dg/dα = −ψ2(α)/ψ1(α)² − 1."""
    g: Tensor
    """1/ψ1(α) − α."""
    q: Tensor
    """−log Γ(α) + (α − prior) ψ(α) − α."""
    log_trigamma: Tensor


def gamma_parts(alpha: Tensor, prior: float = 1.0) -> GammaParts:
    """Evaluate the functions at ``alpha`` >= ``prior`` > 0, without gradient.

    Parameters
    ----------
    alpha : Tensor
        Concentrations, float32 or float64, contiguous.
    prior : float, default=1.0
        Least concentration; it is also a part of ``q``.

    Notes
    -----
    Errors are about 1e-7 (float32) or 1e-11 (float64) times max(1, log α), for any α.
    """
    parts = GammaParts(*alpha.new_empty(5, *alpha.shape))
    fill_gamma_parts(alpha, prior, parts)
    return parts


def fill_gamma_parts(alpha: Tensor, prior: float, out: GammaParts) -> None:
    """Write what :func:`gamma_parts` gives to ``out``, rows of one contiguous tensor."""
    shift = _SHIFT_FLOAT64 if alpha.dtype == torch.float64 else int(prior < 1)
    # With x = α + n:  q(α) = −log Γ(x) + (x − 1) ψ(x) − α + c ψ(x) + Σ log(α + i)
    #                         − (α − prior) Σ 1/(α + i),   c = 1 − prior − n,   i = 0 … n − 1.
    c = 1 - prior - shift
    x = alpha + shift if shift else alpha
    _fill_polynomials(x, c, shift, out)
    torch.add(x, out.g, out=out.trigamma).reciprocal_()
    torch.log(out.trigamma, out=out.log_trigamma)
    out.q.add_(out.log_trigamma, alpha=0.5 - c)
    if shift == 0:
        return
    out.q.add_(shift)
    trigamma, g = out.trigamma, out.g.clone()
    tetragamma = -trigamma.square() * (1 + out.g_slope)
    for i in reversed(range(shift)):
        x = alpha + i
        one = x.reciprocal()
        g = x * (x * g - 1 - g) / (x * x + x + 1 + g)  # 1/(1/x² + ψ1(x + 1)) − x
        trigamma += one.square()
        tetragamma -= 2 * one.pow(3)
        out.q.add_(x.log() - (alpha - prior) * one)
    out.g.copy_(g)
    torch.sub(-tetragamma / trigamma.square(), 1, out=out.g_slope)
    torch.log(trigamma, out=out.log_trigamma)


def fisher_log_det(concentration: Tensor) -> Tensor:
    """Log determinant of the Fisher information of Dirichlet distributions.

    Parameters
    ----------
    concentration : Tensor of shape (n, n_classes)
        Concentrations α > 0.

    Returns
    -------
    Tensor of shape (n,)
        log |diag ψ1(α) − ψ1(S) 11ᵀ| with S = Σ α_k, without gradient. Finite for any α that
        float32 holds: it is Σ log ψ1(α_k) + log ψ1(S) + log(g(S) − Σ g(α_k)), whose terms do
        not cancel, where the textbook's log(1 − Σ ψ1(S)/ψ1(α_k)) is −inf from S = 1e8.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import fisher_log_det
    >>> fisher_log_det(torch.tensor([[2.0, 1.0, 1.0], [3e8, 1e8, 1e8]]))
    tensor([ -0.9811, -76.3908])
    """
    alpha = concentration.detach()
    total = alpha.sum(-1, keepdim=True)
    least = 1.0 if bool((alpha >= 1).all()) else 0.5
    parts = gamma_parts(torch.cat([alpha, total], -1), least)
    gap = parts.g[..., -1] - parts.g[..., :-1].sum(-1)
    return parts.log_trigamma.sum(-1) + gap.log()


# -- polynomials in t = 1/x ------------------------------------------------------------------


def _fill_polynomials(x: Tensor, c: float, shift: int, out: GammaParts) -> None:
    """Write dg/dx, g and r + c E at x >= 1 to ``g_slope``, ``g`` and ``q``."""
    coefficients = polynomials(c, shift, x.dtype, x.device)
    if x.device.type == "cpu":
        # Powers of t by doubling, then one matrix product: few passes over memory.
        powers = x.new_empty(_DEGREE + 1, *x.shape)
        powers[0].fill_(1)
        torch.reciprocal(x, out=powers[1])
        torch.mul(powers[1], powers[1], out=powers[2])
        torch.mul(powers[1:3], powers[2], out=powers[3:5])
        torch.mul(powers[1:5], powers[4], out=powers[5:9])
        size = x.numel()
        block = out.g_slope.as_strided((3, size), (size, 1))
        torch.mm(coefficients, powers.view(_DEGREE + 1, -1), out=block)
        return
    # Horner's rule: on a GPU the product might be rounded to TF32.
    t = x.reciprocal()
    columns = coefficients.T.reshape(_DEGREE + 1, -1, *(1,) * t.ndim)
    values = torch.addcmul(columns[-2], columns[-1], t)
    for column in columns[:-2].flip(0):
        values = torch.addcmul(column, values, t)
    for target, value in zip((out.g_slope, out.g, out.q), values, strict=True):
        target.copy_(value)


@lru_cache(maxsize=32)
def polynomials(c: float, shift: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Coefficients in t of dg/dx, g and r + c E at x = 1/t >= max(1, ``shift``), shape (3, 9).

    By interpolation at Chebyshev nodes, in float64.
    """
    least = max(1, shift)  # of x
    n = _DEGREE + 1
    nodes = (1 + np.cos(np.pi * (np.arange(n) + 0.5) / n)) / (2 * least)
    x = 1 / nodes
    digamma, trigamma, tetragamma = (special.polygamma(k, x) for k in range(3))
    g = 1 / trigamma - x
    g_slope = -tetragamma / trigamma**2 - 1
    r = -special.gammaln(x) + (x - 1) * digamma - x - 0.5 * np.log(trigamma)
    r += c * (digamma + np.log(trigamma))
    fits = [Chebyshev.fit(nodes, v, _DEGREE, domain=[0, 1 / least]) for v in (g_slope, g, r)]
    rows = [f.convert(kind=Polynomial).coef for f in fits]
    return torch.tensor(np.array(rows), dtype=dtype, device=device)

"""Dirichlet losses and their gradients on a CPU, a row at a time in one compiled loop.

The same numbers as the operations on whole tensors in :mod:`uq.nn.evidential`, which for a small
network take longer to be called than to be computed, and for many classes do not fit the cache.
Used where Numba is installed; it compiles once and keeps the result on disk.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Sums may be reordered, and so vectorised; NaN and infinity stay what they are.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_LOG_BLOCK = 8


@njit(cache=True, fastmath=_FAST)
def _horner(c: Any, t: Any) -> Any:
    value = c[8]
    for j in range(7, -1, -1):
        value = value * t + c[j]
    return value


@njit(cache=True, fastmath=_FAST)
def _digamma(x: float) -> float:
    below = 0.0
    while x < 8.0:
        below += 1.0 / x
        x += 1.0
    u = 1.0 / (x * x)
    series = u * (1 / 12 - u * (1 / 120 - u * (1 / 252 - u * (1 / 240 - u / 132))))
    return math.log(x) - 0.5 / x - series - below


@njit(cache=True, fastmath=_FAST)
def _sum_of_logs(x: Any, n: int) -> float:
    """Σ log x from products of a few, one log each."""
    total, i = 0.0, 0
    while i + _LOG_BLOCK <= n:
        product = 1.0
        for j in range(_LOG_BLOCK):
            product *= float(x[i + j])
        total += math.log(product)
        i += _LOG_BLOCK
    for j in range(i, n):
        total += math.log(float(x[j]))
    return total


@njit(cache=True, fastmath=_FAST, error_model="numpy")
def dirichlet_rows(
    evidence: NDArray[np.float32],
    y: NDArray[np.int64],
    coefficients: NDArray[np.float32],
    loss: int,
    prior: float,
    dirichlet_kl_weight: float,
    logdet_weight: float,
    rows: NDArray[np.float32],
    grad: NDArray[np.float32],
) -> None:
    """Write loss and gradient of each row.

    Parameters
    ----------
    evidence : ndarray of shape (n, n_classes)
        Float32, with ``prior`` >= 1.
    y : ndarray of shape (n,)
        Class positions.
    coefficients : ndarray of shape (3, 9)
        Of dg/dx, g and r + (1 − prior) E; see :mod:`uq.nn.evidential_functions`.
    loss : int
        Position in :data:`uq.nn.evidential.LOSSES`.
    prior, dirichlet_kl_weight, logdet_weight : float
        As in :func:`uq.nn.evidential_loss`.
    rows, grad : ndarray of shape (n,), (n, n_classes)
        Filled.
    """
    n, k = evidence.shape
    edl_nll, edl_ce, iedl, redl = loss == 1, loss == 2, loss == 3, loss == 4
    one32, prior32 = np.float32(1), np.float32(prior)
    variance = np.float32(0.0 if redl else 1.0)
    c_slope, c_g, c_r = coefficients[0], coefficients[1], coefficients[2]
    # Weight of log ψ1 in q.
    of_log = prior - 0.5
    constant = (k - 1) * math.lgamma(prior) - math.lgamma(k * prior) - prior
    psi, fall, slope = np.empty(k, np.float32), np.empty(k, np.float32), np.empty(k, np.float32)
    for i in range(n):
        e, d, label = evidence[i], grad[i], y[i]
        if label < 0 or label >= k:
            raise IndexError("y must hold class positions")
        sum_all = np.float32(0)
        for j in range(k):
            sum_all += e[j]
        wrong_sum = np.float32(0)
        if e[label] < np.float32(0.5) * sum_all:
            wrong_sum = sum_all - e[label]
        else:  # the difference would lose what the other classes hold
            for j in range(k):
                wrong_sum += e[j] if j != label else np.float32(0)
        s, s_wrong = float(sum_all) + k * prior, float(wrong_sum) + k * prior

        sum_g, sum_r, sum_squares = np.float32(0), np.float32(0), np.float32(0)
        if iedl:
            for j in range(k):
                a = e[j] + prior32
                t = one32 / a
                g, slope_j = _horner(c_g, t), _horner(c_slope, t)
                psi_j = one32 / (a + g)
                b = a * a + a
                sum_g += g
                sum_r += _horner(c_r, t)
                sum_squares += psi_j * b
                psi[j], slope[j] = psi_j, slope_j
                fall[j] = psi_j * (slope_j + one32)  # −ψ2/ψ1
        else:
            for j in range(k):
                a = e[j] + prior32
                t = one32 / a
                psi[j] = one32 / (a + _horner(c_g, t))
                sum_r += _horner(c_r, t)
                sum_squares += a * (a + variance)
        a_y, psi_y = float(e[label]) + prior, float(psi[label])
        log_psi_sum = _sum_of_logs(psi, k)
        t, t_wrong = 1 / s, 1 / s_wrong
        g_s, g_wrong = _horner(c_g, t), _horner(c_g, t_wrong)
        psi_s, psi_wrong = 1 / (s + g_s), 1 / (s_wrong + g_wrong)
        slope_s = _horner(c_slope, t)

        # The gradient is a part of each class, a shift of the row, a corner at the true class.
        scale, value, shift, corner, pull = 0.0, 0.0, 0.0, 0.0, 0.0
        if edl_nll:
            value, shift, corner = math.log(s / a_y), 1 / s, -1 / a_y
        elif edl_ce:
            value, shift, corner = _digamma(s) - _digamma(a_y), psi_s, -psi_y
        else:
            other = t if redl else 1 / (s + 1)
            scale = t * other
            p_y, weight_y = a_y / s, psi_y if iedl else 1.0
            gap_y = weight_y * (1 - 2 * p_y)
            value = float(sum_squares) * scale
            shift = 2 * weight_y * p_y * t - value * (t + other)
            corner = -2 * weight_y * t
            value += gap_y
            if iedl:
                corner -= float(fall[label]) * gap_y
                gap = g_s - float(sum_g)
                value -= logdet_weight * (log_psi_sum + math.log(psi_s) + math.log(gap))
                pull = logdet_weight / gap
                shift += logdet_weight * psi_s * (slope_s + 1) - pull * slope_s

        t_y = 1 / a_y
        q = float(sum_r) - _horner(c_r, t_y) - _horner(c_r, t_wrong)
        q += of_log * (log_psi_sum - math.log(psi_y) - math.log(psi_wrong))
        value += dirichlet_kl_weight * (q + prior * (k - 1) * _digamma(s_wrong) + constant)
        back = dirichlet_kl_weight * float(wrong_sum) * psi_wrong
        shift -= back
        corner += back - dirichlet_kl_weight * float(e[label]) * psi_y
        rows[i] = value
        scale32, shift32 = np.float32(scale), np.float32(shift)
        kl32, logdet32, pull32 = (
            np.float32(dirichlet_kl_weight),
            np.float32(logdet_weight),
            np.float32(pull),
        )
        two = np.float32(2)
        if iedl:
            for j in range(k):
                a = e[j] + prior32
                part = (two * a + one32 - fall[j] * (a * a + a)) * scale32 + kl32 * e[j]
                d[j] = part * psi[j] + logdet32 * fall[j] + pull32 * slope[j] + shift32
        else:
            for j in range(k):
                a = e[j] + prior32
                d[j] = (two * a + variance) * scale32 + kl32 * e[j] * psi[j] + shift32
        d[label] += np.float32(corner)

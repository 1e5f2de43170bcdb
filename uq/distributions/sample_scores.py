"""Scores of draws of the target, without a distribution around them.

For draws x_1 … x_S of one target and an outcome y,

    CRPS = (1/S) Σ_s |x_s − y| − (1/2S²) Σ_{s,t} |x_s − x_t|;

the energy score is the same with Euclidean distances between vectors of outputs. The last sum
counts each draw's distance 0 to itself, which makes the score larger than that of the distribution
that the draws come from, by E|x − x′|/(2S). The "fair" scores divide by S(S − 1): no bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from uq.distributions.base import CHUNK_ELEMENTS
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

# Draws of one row whose pairwise distances are held at once: 8 MB in float64.
_PAIR_BLOCK = 1000


@overload
def sample_crps(values: Tensor, y: Tensor | ArrayLike, *, fair: bool = False) -> Tensor: ...
@overload
def sample_crps(values: ArrayLike, y: Tensor | ArrayLike, *, fair: bool = False) -> Floats: ...
def sample_crps(
    values: Tensor | ArrayLike, y: Tensor | ArrayLike, *, fair: bool = False
) -> Tensor | Floats:
    """Score draws against outcomes by the continuous ranked probability score of each element.

    Parameters
    ----------
    values : Tensor or array of shape (S, n) or (S, n, m)
        Draws, in target units.
    y : Tensor or array of shape (n,) or (n, m)
        Outcomes.
    fair : bool, default=False
        Divide the sum of distances between draws by S(S − 1) rather than S²: unbiased for the score
        of the distribution that the draws come from. It needs S >= 2 and may be negative.

    Returns
    -------
    Tensor or ndarray
        Scores of the shape of ``y``, float64, in target units, lower is better; a tensor if
        ``values`` is one, without gradients.

    Raises
    ------
    DataError
        If the shapes do not fit, there are no draws, or a number is NaN or infinite.
    ParameterError
        If ``fair`` meets a single draw.

    See Also
    --------
    properscoring.crps_ensemble, scoringrules.crps_ensemble, pyro.ops.stats.crps_empirical

    Notes
    -----
    With the draws in increasing order, Σ_{s,t} |x_s − x_t| = 2 Σ_i (2i − S − 1) x_(i): one sort of
    x − y, in the precision of the input, and sums in float64. The draws of several rows are sorted
    at a time, in an array that fits the cache.

    References
    ----------
    T. Gneiting, A. E. Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", JASA
    102, 2007, eq. 21. C. A. T. Ferro, "Fair scores for ensemble forecasts", Q. J. R. Meteorol. Soc.
    140, 2014.

    Examples
    --------
    >>> import numpy as np
    >>> from uq.distributions import sample_crps
    >>> draws = np.array([[0.0, 1.0], [2.0, 1.0]])
    >>> sample_crps(draws, [1.0, 3.0])
    array([0.5, 2. ])
    >>> sample_crps(draws, [1.0, 3.0], fair=True)
    array([0., 2.])
    """
    where = "sample_crps"
    x, outcomes, n_pairs = _checked(where, values, y, fair)
    score = _crps(x.reshape(len(x), -1), outcomes.reshape(-1), n_pairs).reshape(outcomes.shape)
    return _finished(where, score, x, outcomes, values)


def _crps(x: NDArray[Any], y: NDArray[Any], n_pairs: int) -> Floats:
    """Scores (n,) of draws (S, n), with the mean over ``n_pairs`` ordered pairs of draws."""
    n_values = len(x)
    weight = (2 * np.arange(1, n_values + 1) - n_values - 1) / n_pairs
    out = np.empty(len(y))
    n_rows = max(1, CHUNK_ELEMENTS // n_values)
    work = np.empty((n_rows, n_values), x.dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # looked for in the result
        for start in range(0, len(y), n_rows):
            rows = slice(start, start + n_rows)
            distance = work[: len(y[rows])]
            np.subtract(x[:, rows].T, y[rows, None], out=distance)
            distance.sort(axis=1)
            exact = distance.astype(np.float64, copy=False)
            spread = exact @ weight
            out[rows] = np.abs(exact, out=exact).mean(1) - spread
    return out


@overload
def energy_score(values: Tensor, y: Tensor | ArrayLike, *, fair: bool = False) -> Tensor: ...
@overload
def energy_score(values: ArrayLike, y: Tensor | ArrayLike, *, fair: bool = False) -> Floats: ...
def energy_score(
    values: Tensor | ArrayLike, y: Tensor | ArrayLike, *, fair: bool = False
) -> Tensor | Floats:
    """Score joint draws of several outputs by the energy score of each row.

    (1/S) Σ_s ‖x_s − y‖ − (1/2S²) Σ_{s,t} ‖x_s − x_t‖ with Euclidean norms over the outputs, which
    should have one scale: the output of the largest scale rules the score. For m = 1 it is
    :func:`sample_crps`.

    Parameters
    ----------
    values : Tensor or array of shape (S, n, m)
        Draws; draw s of all outputs of a row belongs together.
    y : Tensor or array of shape (n, m)
        Outcomes.
    fair : bool, default=False
        Divide the sum of distances between draws by S(S − 1) rather than S²: unbiased for the score
        of the distribution that the draws come from. It needs S >= 2 and may be negative.

    Returns
    -------
    Tensor or ndarray
        Scores of shape (n,), float64, in the common unit of the outputs, lower is better; a tensor
        if ``values`` is one, without gradients.

    Raises
    ------
    DataError
        If the shapes do not fit, there are no draws, or a number is NaN or infinite.
    ParameterError
        If ``fair`` meets a single draw.

    References
    ----------
    T. Gneiting, A. E. Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", JASA
    102, 2007, eq. 22.

    Examples
    --------
    >>> import numpy as np
    >>> from uq.distributions import energy_score
    >>> draws = np.array([[[0.0, 0.0]], [[3.0, 4.0]]])
    >>> energy_score(draws, [[0.0, 0.0]])
    array([1.25])
    """
    where = "energy_score"
    x, outcomes, n_pairs = _checked(where, values, y, fair)
    if outcomes.ndim != 2 or outcomes.shape[1] == 0:
        raise DataError(
            f"{where}: values need shape (S, n, m) with m >= 1, got {x.shape}; for one output "
            "without its axis use sample_crps."
        )
    if outcomes.shape[1] == 1:
        score = _crps(x[..., 0], outcomes[:, 0], n_pairs)
    else:
        score = np.empty(len(outcomes))
        for i, at in enumerate(outcomes):
            row = x[:, i].astype(np.float64)  # (S, m)
            to_outcome = np.sqrt(np.square(row - at).sum(1)).mean()
            score[i] = to_outcome - _sum_of_distances(row) / n_pairs
    return _finished(where, score, x, outcomes, values)


def _sum_of_distances(x: Floats) -> float:
    """Σ_{s<t} ‖x_s − x_t‖ over the rows of (S, m)."""
    from scipy.spatial.distance import cdist, pdist

    total = 0.0
    for start in range(0, len(x), _PAIR_BLOCK):
        block, rest = x[start : start + _PAIR_BLOCK], x[start + _PAIR_BLOCK :]
        total += pdist(block).sum() + sum(
            cdist(block, rest[i : i + _PAIR_BLOCK]).sum() for i in range(0, len(rest), _PAIR_BLOCK)
        )
    return total


def check_draws(where: str, shape: tuple[int, ...]) -> None:
    """Refuse values without an axis of draws, or without draws on it."""
    if not shape or shape[0] == 0:
        raise DataError(
            f"{where}: values need a leading axis of at least one draw, shape (S, n) or (S, n, m), "
            f"got {shape}."
        )


def _checked(where: str, values: Any, y: Any, fair: bool) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Both as NumPy arrays of one floating type, and by how many pairs of draws to divide."""
    x, outcomes = _as_floats(f"{where}: values", values), _as_floats(f"{where}: y", y)
    check_draws(where, x.shape)
    if x.shape[1:] != outcomes.shape:
        raise DataError(
            f"{where}: y has shape {outcomes.shape}, expected {x.shape[1:]}: that of values, "
            f"{x.shape}, without its leading axis of draws."
        )
    if fair and len(x) < 2:
        raise ParameterError(f"{where}: fair=True needs at least 2 draws, got 1; use fair=False.")
    dtype, n_pairs = np.result_type(x, outcomes), len(x) * (len(x) - 1 if fair else len(x))
    return x.astype(dtype, copy=False), outcomes.astype(dtype, copy=False), n_pairs


def _as_floats(name: str, values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values if values.dtype == torch.float32 else values.double()).numpy()
    array = np.asarray(values)
    if array.dtype in (np.float32, np.float64):
        return array
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must hold numbers: {error}.") from error


def _finished(
    where: str, score: Floats, x: NDArray[Any], outcomes: NDArray[Any], values: Any
) -> Any:
    """The scores in the kind of ``values``; input that is not finite shows in them."""
    if not np.isfinite(score).all():
        for name, array in (("values", x), ("y", outcomes)):
            if not np.isfinite(array).all():
                raise not_finite(f"{where}: {name}", array)
    return torch.from_numpy(score).to(values.device) if isinstance(values, Tensor) else score


def not_finite(name: str, array: NDArray[Any]) -> DataError:
    """Error that names the first index at which ``array`` is NaN or infinite."""
    first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    return DataError(f"{name} must be finite; the first NaN or infinity is at index {first}.")

"""Sufficient statistics of a last layer on frozen features, and the noise that fits them.

One pass over the rows, in any order and any split, in memory O(D²): a last layer is then found in
closed form, without a gradient step. Sums are in float64.

With ΦᵀΦ = Q diag(λ) Qᵀ and c = QᵀΦᵀy, the evidence of y under w ~ N(0, s I) and noise σ² is

    −2 ln p(y | σ²) = N ln 2πσ² + Σ_j ln(1 + s λ_j/σ²) + (yᵀy − Σ_j c_j²/(λ_j + σ²/s))/σ²,

so that one eigendecomposition makes every value of σ² cost O(D).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from uq.errors import DataError

_CHUNK_ROWS = 4096
_GRID = 64
_HALVINGS = 50
_GRID_ELEMENTS = 1 << 22


class LinearStatistics:
    """N, ΦᵀΦ, Φᵀy and yᵀy of a linear regression on features with a constant appended.

    Parameters
    ----------
    n_features : int
        Width D of the features, without the constant.
    n_outputs : int
        Number of targets K.
    device : torch.device, default="cpu"
        Where the sums are kept.

    Attributes
    ----------
    n_rows : float
        Rows seen, or the sum of their weights.
    gram : Tensor of shape (D + 1, D + 1)
        ΦᵀΦ, weighted.
    cross : Tensor of shape (D + 1, K)
        ΦᵀY, weighted.
    squares : Tensor of shape (K,)
        Σ y², weighted.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import LinearStatistics
    >>> statistics = LinearStatistics(2, 1)
    >>> for _ in range(3):
    ...     statistics.add(torch.ones(10, 2), torch.ones(10, 1))
    >>> statistics.n_rows, float(statistics.gram[0, 2])
    (30.0, 30.0)
    """

    def __init__(self, n_features: int, n_outputs: int, device: torch.device | str = "cpu") -> None:
        d = n_features + 1
        self.n_rows: float = 0.0
        self.gram: Tensor = torch.zeros(d, d, dtype=torch.float64, device=device)
        self.cross: Tensor = torch.zeros(d, n_outputs, dtype=torch.float64, device=device)
        self.squares: Tensor = torch.zeros(n_outputs, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, features: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows: features (n, D), targets (n, K), or (n,) if K is 1, weights (n,)."""
        d, k = self.cross.shape
        if y.ndim == 1 and k == 1:
            y = y.unsqueeze(-1)
        if features.shape[1:] != (d - 1,) or y.shape != (len(features), k):
            raise DataError(
                f"statistics: features and y must have shapes (n, {d - 1}) and (n, {k}), got "
                f"{tuple(features.shape)} and {tuple(y.shape)}."
            )
        check_weight(weight, len(features))
        for start in range(0, len(features), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            x, targets = features[rows].double(), y[rows].double()
            w = x.new_ones(len(x)) if weight is None else weight[rows].double()
            weighted = x if weight is None else x * w.unsqueeze(-1)
            self.gram[:-1, :-1].addmm_(weighted.mT, x)
            sums = weighted.sum(0)
            self.gram[:-1, -1] += sums
            self.gram[-1, :-1] += sums
            self.gram[-1, -1] += w.sum()
            self.cross[:-1].addmm_(weighted.mT, targets)
            self.cross[-1] += w @ targets
            self.squares += w @ targets.square()
            self.n_rows += float(w.sum())

    def scale(self, factor: float) -> None:
        """Count every row seen so far ``factor`` times."""
        self.n_rows *= factor
        for sums in (self.gram, self.cross, self.squares):
            sums *= factor

    def spectrum(self) -> Spectrum:
        """Eigendecomposition of ΦᵀΦ.

        Raises
        ------
        DataError
            If no row was added, or a feature or target was NaN or infinite.
        """
        _check(self.n_rows, self.gram, self.cross, self.squares)
        values, vectors = torch.linalg.eigh(self.gram)
        # Collinear features: eigenvalues that are 0 come out as rounding of either sign.
        return Spectrum(values.clamp_min(0.0), vectors, vectors.mT @ self.cross)


class Spectrum(NamedTuple):
    """ΦᵀΦ = Q diag(λ) Qᵀ and QᵀΦᵀy."""

    values: Tensor
    """λ, shape (D,)."""
    vectors: Tensor
    """Q, shape (D, D)."""
    rotated: Tensor
    """QᵀΦᵀY, shape (D, K)."""


class ClassStatistics:
    """Rows, sums of features and sums of squares of each class, for Gaussian classes.

    Parameters
    ----------
    n_features : int
        Width D of the features.
    n_classes : int
        Number of classes K.
    device : torch.device, default="cpu"
        Where the sums are kept.

    Attributes
    ----------
    counts : Tensor of shape (K,)
        Rows, or sums of weights, of each class.
    sums : Tensor of shape (K, D)
        Sums of the features of each class.
    squares : Tensor of shape (D,)
        Sums of the squared features of all rows.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import ClassStatistics
    >>> statistics = ClassStatistics(2, 3)
    >>> statistics.add(torch.ones(4, 2), torch.tensor([0, 0, 2, 2]))
    >>> statistics.counts
    tensor([2., 0., 2.], dtype=torch.float64)
    """

    def __init__(self, n_features: int, n_classes: int, device: torch.device | str = "cpu") -> None:
        self.counts: Tensor = torch.zeros(n_classes, dtype=torch.float64, device=device)
        self.sums: Tensor = torch.zeros(n_classes, n_features, dtype=torch.float64, device=device)
        self.squares: Tensor = torch.zeros(n_features, dtype=torch.float64, device=device)

    @property
    def n_rows(self) -> float:
        """Rows seen, or the sum of their weights."""
        return float(self.counts.sum())

    @torch.no_grad()
    def add(self, features: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Add rows: features (n, D), class positions (n,), weights (n,)."""
        check_weight(weight, len(features))
        for start in range(0, len(features), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            x, classes = features[rows].double(), y[rows]
            w = x.new_ones(len(x)) if weight is None else weight[rows].double()
            self.counts.index_add_(0, classes, w)
            self.sums.index_add_(0, classes, x * w.unsqueeze(-1))
            self.squares += w @ x.square()

    def scale(self, factor: float) -> None:
        """Count every row seen so far ``factor`` times."""
        for sums in (self.counts, self.sums, self.squares):
            sums *= factor

    def check(self) -> None:
        """Raise a DataError if no row was added or a feature was NaN or infinite."""
        _check(self.n_rows, self.sums, self.squares)


def check_weight(weight: Tensor | None, n: int) -> None:
    """Raise a DataError if weights of n rows have another shape, or are not finite and >= 0."""
    if weight is not None and (
        weight.shape != (n,) or not bool((weight.isfinite() & (weight >= 0)).all())
    ):
        raise DataError(
            f"weight must hold {n} finite numbers >= 0, in shape ({n},), got shape "
            f"{tuple(weight.shape)}."
        )


def _check(n_rows: float, *sums: Tensor) -> None:
    if not n_rows > 0:
        raise DataError("statistics: no rows were added; call add(features, y) first.")
    if not all(bool(t.isfinite().all()) for t in sums):
        raise DataError(
            "statistics: features or targets held NaN or infinity, or values whose squares "
            "overflow; clean or rescale them and start anew."
        )


def most_probable_noise(
    values: Tensor,
    rotated: Tensor,
    squares: Tensor,
    n_rows: float,
    *,
    prior_variance: float,
    dof: float,
    scale: float,
    volumes: Tensor | None = None,
) -> Tensor:
    """Noise variances that maximise evidence times prior, the weights integrated out.

    Parameters
    ----------
    values : Tensor of shape (D,)
        Eigenvalues λ of ΦᵀΦ.
    rotated : Tensor of shape (D, K)
        c = QᵀΦᵀY.
    squares : Tensor of shape (K,)
        yᵀy of each output.
    n_rows : float
        N.
    prior_variance : float
        Variance s of the weights' prior.
    dof, scale : float
        The prior of σ² is ∝ (σ²)^(−dof/2) e^(−scale/(2σ²)).
    volumes : Tensor of shape (D,), optional
        Diagonal of ΦᵀΦ, where the posterior is diagonal: the evidence is then replaced by its
        mean-field bound, whose log determinant is that of the diagonal.

    Returns
    -------
    Tensor of shape (K,)
        Global maximisers: the best point of a grid in ln σ² (the evidence may have two modes, much
        signal or much noise), then bisection on the slope beside it.
    """
    volumes = values if volumes is None else volumes
    power = n_rows + dof
    # At a maximum σ² power = scale + E‖y − Φw‖², and E‖y − Φw‖² <= yᵀy + s tr ΦᵀΦ.
    low = torch.full_like(squares, math.log(scale / power))
    high = ((squares + scale + prior_variance * volumes.sum()) / power).log()
    steps = torch.linspace(0, 1, _GRID, dtype=squares.dtype, device=squares.device)
    best = torch.empty_like(squares)
    width = max(1, _GRID_ELEMENTS // (_GRID * len(values)))
    for start in range(0, len(squares), width):
        at = slice(start, start + width)
        c2, yy = rotated.mT[at].square(), squares[at]

        def cost(noise: Tensor, c2: Tensor = c2, yy: Tensor = yy) -> Tensor:
            ratio = noise.unsqueeze(-1) / prior_variance
            misfit = yy - (c2 / (values + ratio)).sum(-1)
            log_det = torch.log1p(volumes / ratio).sum(-1)
            return power * noise.log() + (misfit.clamp_min(0.0) + scale) / noise + log_det

        def slope(noise: Tensor, c2: Tensor = c2, yy: Tensor = yy) -> Tensor:
            """Derivative of the cost in ln σ²: N + dof − (scale + E‖y − Φw‖²)/σ²."""
            ratio = noise.unsqueeze(-1) / prior_variance
            residual = yy - (c2 * (values + 2 * ratio) / (values + ratio).square()).sum(-1)
            spread = (volumes / (volumes + ratio)).sum(-1)
            return power - spread - (residual.clamp_min(0.0) + scale) / noise

        grid = low[at] + steps.unsqueeze(-1) * (high[at] - low[at])  # (grid, outputs)
        place = cost(grid.exp()).argmin(0, keepdim=True)
        a = grid.gather(0, (place - 1).clamp_min(0))[0]
        b = grid.gather(0, (place + 1).clamp_max(_GRID - 1))[0]
        for _ in range(_HALVINGS):
            middle = 0.5 * (a + b)
            falling = slope(middle.exp()) < 0
            a, b = torch.where(falling, middle, a), torch.where(falling, b, middle)
        best[at] = 0.5 * (a + b)
    return best.exp()

"""Out-of-distribution (OOD) scores from the inside of a network: its logits and its features.

Logits give a score at once; detectors of features are fitted on features of the training inputs.
With class means μ_c, their shared covariance Σ, the whole's μ_0 and Σ_0, z = x/‖x‖ and the
complement P of the principal subspace around o,

    Mahalanobis  min_c (x − μ_c)ᵀ Σ⁻¹ (x − μ_c),    relative  that less (x − μ_0)ᵀ Σ_0⁻¹ (x − μ_0),
    neighbours   ‖z − z_(k)‖,                       residual  ‖Pᵀ(x − o)‖.

High score means OOD, as everywhere in :mod:`uq.calibration.ood`.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from uq.calibration.rows import as_array, check_finite_rows
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    Shrinkage = float | Literal["auto"]

_CHUNK_ELEMENTS = 1 << 22  # whitened features, or distances to all means, held at a time


# -- logits ------------------------------------------------------------------------------------


def free_energy(logits: ArrayLike | Tensor, temperature: float = 1.0) -> Floats:
    """Score inputs by the free energy of their logits.

    Parameters
    ----------
    logits : array-like of shape (n, n_classes)
        Outputs of a classifier before the softmax. Log probabilities will not do: their free energy
        is 0 everywhere.
    temperature : float, default=1.0
        T > 0, in units of the logits.

    Returns
    -------
    ndarray of shape (n,)
        −T log Σ_k exp(l_k / T) in float64; high means OOD.

    Raises
    ------
    DataError
        If ``logits`` has another shape or holds NaN or infinity.
    ParameterError
        If ``temperature`` is not positive.

    References
    ----------
    W. Liu, X. Wang, J. Owens, Y. Li. "Energy-based out-of-distribution detection." NeurIPS 2020,
    eq. 4. arXiv:2010.03759.

    Examples
    --------
    >>> from uq.calibration import free_energy
    >>> free_energy([[0.0, 0.0], [3.0, -3.0]]).round(3)
    array([-0.693, -3.002])
    """
    from scipy.special import logsumexp

    if not isinstance(temperature, Real) or not 0 < temperature < np.inf:
        raise ParameterError(f"free_energy: temperature must be > 0, got {temperature!r}.")
    scaled = _matrix("free_energy: logits", logits, min_columns=2) / temperature
    energy: Floats = -temperature * logsumexp(scaled, axis=1)
    return energy


def max_logit(logits: ArrayLike | Tensor) -> Floats:
    """Score inputs by their largest logit.

    Parameters
    ----------
    logits : array-like of shape (n, n_classes)
        Outputs of a classifier before the softmax.

    Returns
    -------
    ndarray of shape (n,)
        −max_k l_k in float64; high means OOD.

    Raises
    ------
    DataError
        If ``logits`` has another shape or holds NaN or infinity.

    References
    ----------
    D. Hendrycks et al. "Scaling out-of-distribution detection for real-world settings."
    ICML 2022. arXiv:1911.11132.

    Examples
    --------
    >>> from uq.calibration import max_logit
    >>> max_logit([[0.0, 0.0], [3.0, -3.0]])
    array([-0., -3.])
    """
    largest: Floats = _matrix("max_logit: logits", logits, min_columns=2).max(1)
    return -largest


# -- features ----------------------------------------------------------------------------------


class MahalanobisDetector(BaseEstimator):
    """Distance from the nearest class mean, measured by the covariance within classes.

    Parameters
    ----------
    shrinkage : float or "auto", default="auto"
        Weight s in [0, 1] of the scaled identity in Σ = (1 − s) S + s (tr S/d) I, where S is the
        mean of (x − μ_c)(x − μ_c)ᵀ. ``"auto"`` takes the estimate of Ledoit and Wolf, which works
        for more features than rows and vanishes as 1/n. The paper has 0; that needs S invertible.

    Attributes
    ----------
    gaussians_ : Gaussians
        ``means`` (n_classes, d), ``covariance`` Σ (d, d) and ``shrinkage`` s.
    n_features_in_ : int
        Number of features d.

    See Also
    --------
    RelativeMahalanobisDetector : for OOD inputs that look like the training inputs.
    sklearn.covariance.EmpiricalCovariance : squared distance from one mean.

    Notes
    -----
    Features should be in like units, as those of one layer are: the identity that Σ is shrunk
    towards depends on them. Without shrinkage the score is the same for any invertible affine map
    of the features, and for a Gaussian class it follows the χ² law with d degrees of freedom.

    References
    ----------
    K. Lee, K. Lee, H. Lee, J. Shin. "A simple unified framework for detecting out-of-distribution
    samples and adversarial attacks." NeurIPS 2018, eq. 2. arXiv:1807.03888.
    O. Ledoit, M. Wolf. "A well-conditioned estimator for large-dimensional covariance matrices."
    J. Multivariate Analysis 88, 2004.

    Examples
    --------
    >>> from uq.calibration import MahalanobisDetector
    >>> detector = MahalanobisDetector(shrinkage=0).fit([[-1, 0], [1, 0], [0, -2], [0, 2]])
    >>> detector.score([[0, 0], [1, 0], [0, 2]])  # variances ½ and 2
    array([0., 2., 2.])
    """

    gaussians_: Gaussians
    n_features_in_: int

    def __init__(self, shrinkage: Shrinkage = "auto") -> None:
        self.shrinkage = shrinkage

    def fit(self, features: ArrayLike | Tensor, y: ArrayLike | Tensor | None = None) -> Self:
        """Estimate means and covariance.

        Parameters
        ----------
        features : array-like of shape (n, d)
            Features of training inputs.
        y : array-like of shape (n,), optional
            Their classes, two rows each or more. Without them all rows are one class.

        Returns
        -------
        Self
            The fitted detector.

        Raises
        ------
        DataError
            If shapes do not match, features hold NaN or infinity, a class has one row, or the
            covariance cannot be inverted.
        ParameterError
            If ``shrinkage`` is out of range.
        """
        where = "MahalanobisDetector.fit"
        x = _matrix(f"{where}: features", features, min_rows=2)
        groups = np.zeros(len(x), np.int64) if y is None else _groups(where, y, len(x))
        self.gaussians_ = Gaussians.fit(where, x, groups, self.shrinkage)
        self.n_features_in_ = x.shape[1]
        return self

    def score(self, features: ArrayLike | Tensor) -> Floats:
        """Squared Mahalanobis distance from the nearest class mean.

        Parameters
        ----------
        features : array-like of shape (n, d)
            Features of the inputs to judge.

        Returns
        -------
        ndarray of shape (n,)
            Scores >= 0, without unit; high means OOD.

        Raises
        ------
        DataError
            If features have another width or hold NaN or infinity.
        NotFittedError
            Before :meth:`fit`.
        """
        x = _features_to_score(self, features)
        return self.gaussians_.distance(x)


class RelativeMahalanobisDetector(BaseEstimator):
    """Mahalanobis distance from the nearest class mean, less that from the mean of all classes.

    What classes have in common, such as an unusual brightness, moves both distances and cancels, so
    that OOD inputs which look like the training inputs are found better.

    Parameters
    ----------
    shrinkage : float or "auto", default="auto"
        As in :class:`MahalanobisDetector`, for the covariance within classes. The paper has 0.

    Attributes
    ----------
    gaussians_, background_ : Gaussians
        Of the classes, and of all rows together: ``means``, ``covariance`` and ``shrinkage``.
    n_features_in_ : int
        Number of features d.

    See Also
    --------
    MahalanobisDetector : for OOD inputs far from all training inputs, and without classes.

    Notes
    -----
    The background covariance is the shrunk one within classes plus that between them, which without
    shrinkage is the covariance of all rows, as in the paper. Shrunk apart, the two would differ in
    directions along which the classes do not, and far inputs could score low.

    References
    ----------
    J. Ren, S. Fort, J. Liu, A. Guha Roy, S. Padhy, B. Lakshminarayanan. "A simple fix to
    Mahalanobis distance for improving near-OOD detection." 2021, eq. 2. arXiv:2106.09022.

    Examples
    --------
    >>> from uq.calibration import RelativeMahalanobisDetector
    >>> features = [[-3, -1], [-3, 1], [-2, 0], [-4, 0], [3, -1], [3, 1], [2, 0], [4, 0]]
    >>> detector = RelativeMahalanobisDetector(shrinkage=0).fit(features, [0] * 4 + [1] * 4)
    >>> detector.score([[3, 0], [0, 0], [3, 9]]).round(1)  # at a mean, between, along both
    array([-0.9, 18. , -0.9])
    """

    gaussians_: Gaussians
    background_: Gaussians
    n_features_in_: int

    def __init__(self, shrinkage: Shrinkage = "auto") -> None:
        self.shrinkage = shrinkage

    def fit(self, features: ArrayLike | Tensor, y: ArrayLike | Tensor) -> Self:
        """Estimate the Gaussians of the classes and of all rows.

        Parameters
        ----------
        features : array-like of shape (n, d)
            Features of training inputs.
        y : array-like of shape (n,)
            Their classes: two or more, of two rows each or more.

        Returns
        -------
        Self
            The fitted detector.

        Raises
        ------
        DataError
            If shapes do not match, features hold NaN or infinity, there is one class only, a class
            has one row, or a covariance cannot be inverted.
        ParameterError
            If ``shrinkage`` is out of range.
        """
        where = "RelativeMahalanobisDetector.fit"
        x = _matrix(f"{where}: features", features, min_rows=2)
        groups = _groups(where, y, len(x))
        if groups.max() == 0:
            raise DataError(
                f"{where}: y holds one class, with which all scores would be 0; give two classes "
                "or use MahalanobisDetector."
            )
        self.gaussians_ = Gaussians.fit(where, x, groups, self.shrinkage)
        self.background_ = self.gaussians_.pooled(where, np.bincount(groups) / len(x))
        self.n_features_in_ = x.shape[1]
        return self

    def score(self, features: ArrayLike | Tensor) -> Floats:
        """Difference of the squared distances.

        Parameters
        ----------
        features : array-like of shape (n, d)
            Features of the inputs to judge.

        Returns
        -------
        ndarray of shape (n,)
            Scores of either sign, without unit; high means OOD.

        Raises
        ------
        DataError
            If features have another width or hold NaN or infinity.
        NotFittedError
            Before :meth:`fit`.
        """
        x = _features_to_score(self, features)
        return self.gaussians_.distance(x) - self.background_.distance(x)


class NearestNeighboursDetector(BaseEstimator):
    """Distance from the k-th nearest training input in the direction of its features.

    Parameters
    ----------
    k : int, default=50
        Which neighbour. The paper has 50 for CIFAR-10, 200 for CIFAR-100 and 1000 for ImageNet:
        some 1 in 1000 rows. An input that was fitted is its own first neighbour.

    Attributes
    ----------
    neighbours_ : sklearn.neighbors.NearestNeighbors
        Index of the normalised training features; the search is exact.
    n_features_in_ : int
        Number of features d.

    Notes
    -----
    Features are divided by their Euclidean norm, so that their length says nothing. A row of zeros
    has no direction and stays as it is, at distance 1 from all others.

    References
    ----------
    Y. Sun, Y. Ming, X. Zhu, Y. Li. "Out-of-distribution detection with deep nearest neighbors."
    ICML 2022, section 3. arXiv:2204.06507.

    Examples
    --------
    >>> from uq.calibration import NearestNeighboursDetector
    >>> detector = NearestNeighboursDetector(k=2).fit([[1, 0], [2, 0], [0, 1]])
    >>> detector.score([[5, 0], [0, -1]]).round(3)
    array([0.   , 1.414])
    """

    neighbours_: Any
    n_features_in_: int

    def __init__(self, k: int = 50) -> None:
        self.k = k

    def fit(self, features: ArrayLike | Tensor, y: object = None) -> Self:
        """Keep the normalised features.

        Parameters
        ----------
        features : array-like of shape (n, d)
            Features of training inputs, ``k`` rows or more.
        y : object, optional
            Not used; the other detectors have it.

        Returns
        -------
        Self
            The fitted detector.

        Raises
        ------
        DataError
            If there are fewer than ``k`` rows, or features hold NaN or infinity.
        ParameterError
            If ``k`` is not a positive integer.
        """
        from sklearn.neighbors import NearestNeighbors

        where = "NearestNeighboursDetector.fit"
        k = _check_count(where, "k", self.k)
        x = _matrix(f"{where}: features", features)
        if len(x) < k:
            raise DataError(f"{where}: k={k} needs as many rows of features, got {len(x)}.")
        self.neighbours_ = NearestNeighbors(n_neighbors=k).fit(_normalised(x))
        self.n_features_in_ = x.shape[1]
        return self

    def score(self, features: ArrayLike | Tensor) -> Floats:
        """Distance from the k-th nearest neighbour.

        Parameters
        ----------
        features : array-like of shape (n, d)
            Features of the inputs to judge.

        Returns
        -------
        ndarray of shape (n,)
            Distances in [0, 2]; high means OOD.

        Raises
        ------
        DataError
            If features have another width or hold NaN or infinity.
        NotFittedError
            Before :meth:`fit`.
        """
        x = _features_to_score(self, features)
        distance: Floats = self.neighbours_.kneighbors(_normalised(x))[0][:, -1]
        return distance.copy()  # a view would keep the distances of all neighbours


class ResidualDetector(BaseEstimator):
    """Length of the part of the features outside their principal subspace (ViM).

    With logits the residual stands as the logit of one more, virtual class against the others.

    Parameters
    ----------
    n_components : int, optional
        Dimension of the principal subspace, in [1, d − 1]. The paper has 1000 for d >= 2048 and
        512 for d >= 768; below that the default is half of d.
    origin : array-like of shape (d,), optional
        Point o from which features are measured; their mean by default. The paper has the point
        where all logits W o + b vanish, ``-numpy.linalg.pinv(W) @ b`` with W of shape
        (n_classes, d).

    Attributes
    ----------
    origin_ : ndarray of shape (d,)
        The point o.
    complement_ : ndarray of shape (d, d - n_components)
        Orthonormal directions P of least second moment around o.
    alpha_ : float or None
        Mean of the largest logit over mean of the residual, which brings the residual to the scale
        of the logits; None where no logits were fitted.
    n_features_in_ : int
        Number of features d.

    References
    ----------
    H. Wang, Z. Li, L. Feng, W. Zhang. "ViM: Out-of-distribution with virtual-logit matching."
    CVPR 2022, eqs. 4 to 6. arXiv:2203.10807.

    Examples
    --------
    >>> from uq.calibration import ResidualDetector
    >>> detector = ResidualDetector(n_components=1).fit([[-2, 0.5], [2, 0.5], [0, -1]])
    >>> detector.score([[9, 0], [0, 3]])
    array([0., 3.])
    """

    origin_: Floats
    complement_: Floats
    alpha_: float | None
    n_features_in_: int

    def __init__(
        self, n_components: int | None = None, *, origin: ArrayLike | Tensor | None = None
    ) -> None:
        self.n_components = n_components
        self.origin = origin

    def fit(
        self,
        features: ArrayLike | Tensor,
        y: object = None,
        *,
        logits: ArrayLike | Tensor | None = None,
    ) -> Self:
        """Find the principal subspace, and the scale of the residual beside the logits.

        Parameters
        ----------
        features : array-like of shape (n, d)
            Features of training inputs, more than ``n_components`` rows.
        y : object, optional
            Not used; the other detectors have it.
        logits : array-like of shape (n, n_classes), optional
            Outputs of the classifier on the same inputs before the softmax.

        Returns
        -------
        Self
            The fitted detector.

        Raises
        ------
        DataError
            If there are too few rows or columns, shapes do not match, an argument holds NaN or
            infinity, or logits cannot set the scale.
        ParameterError
            If ``n_components`` or ``origin`` does not fit the features.
        """
        where = "ResidualDetector.fit"
        x = _matrix(f"{where}: features", features, min_columns=2)
        n_components = self._dimension(where, *x.shape)
        origin = self._origin(where, x)
        x = x - origin
        # Ascending eigenvalues: the first vectors span the complement.
        complement = np.linalg.eigh(x.T @ x)[1][:, : x.shape[1] - n_components]
        self.alpha_ = None
        if logits is not None:
            ls = _matrix(f"{where}: logits", logits, min_columns=2)
            self.alpha_ = _virtual_scale(where, x, complement, ls)
        self.origin_, self.complement_ = origin, np.ascontiguousarray(complement)
        self.n_features_in_ = x.shape[1]
        return self

    def score(
        self, features: ArrayLike | Tensor, *, logits: ArrayLike | Tensor | None = None
    ) -> Floats:
        """Residual, or the virtual logit against the logits.

        Parameters
        ----------
        features : array-like of shape (n, d)
            Features of the inputs to judge.
        logits : array-like of shape (n, n_classes), optional
            Their logits: needed where logits were fitted, else not to be given.

        Returns
        -------
        ndarray of shape (n,)
            ‖Pᵀ(x − o)‖ in units of the features, or α ‖Pᵀ(x − o)‖ − log Σ_k exp l_k; high means
            OOD. The latter is the log odds of the virtual class, whose probability the paper
            reports: the order is the same.

        Raises
        ------
        DataError
            If an argument has another shape or holds NaN or infinity.
        ParameterError
            If logits are missing, or were not fitted.
        NotFittedError
            Before :meth:`fit`.
        """
        where = "ResidualDetector.score"
        x = _features_to_score(self, features)
        residual: Floats = np.linalg.norm((x - self.origin_) @ self.complement_, axis=1)
        if self.alpha_ is None:
            if logits is not None:
                raise ParameterError(f"{where}: logits need fit(features, logits=...) first.")
            return residual
        if logits is None:
            raise ParameterError(f"{where}: logits are needed, as they were given to fit.")
        energy = free_energy(logits)
        if len(energy) != len(residual):
            raise DataError(
                f"{where}: logits have {len(energy)} rows, features have {len(residual)}."
            )
        return self.alpha_ * residual + energy

    def _dimension(self, where: str, n: int, d: int) -> int:
        if self.n_components is None:
            found = 1000 if d >= 2048 else 512 if d >= 768 else d // 2
        else:
            found = _check_count(where, "n_components", self.n_components)
        if found >= d:
            raise ParameterError(
                f"{where}: n_components must be < {d}, the number of features, got {found}."
            )
        if n <= found:
            raise DataError(
                f"{where}: n_components={found} needs more rows than that, got {n}; lower it."
            )
        return found

    def _origin(self, where: str, x: Floats) -> Floats:
        if self.origin is None:
            mean: Floats = x.mean(0)
            return mean
        origin = as_array(self.origin).astype(np.float64)
        if origin.shape != x.shape[1:] or not np.isfinite(origin).all():
            raise ParameterError(
                f"{where}: origin needs shape {x.shape[1:]} and finite values, got shape "
                f"{origin.shape}."
            )
        return origin


# -- Gaussians ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Gaussians:
    """Gaussians of one covariance, one for each class.

    Attributes
    ----------
    means : ndarray of shape (n_classes, d)
        Mean of each class.
    covariance : ndarray of shape (d, d)
        Covariance within classes, after shrinkage.
    shrinkage : float
        Weight of the scaled identity in it.
    root : ndarray of shape (d, d)
        Lower Cholesky factor of it.
    """

    means: Floats
    covariance: Floats
    shrinkage: float
    root: Floats

    @classmethod
    def fit(
        cls, where: str, x: Floats, groups: NDArray[np.int64], shrinkage: Shrinkage
    ) -> Gaussians:
        """Estimate from rows ``x`` of classes ``groups`` 0, 1, …."""
        counts = np.bincount(groups)
        members = np.split(x[np.argsort(groups, kind="stable")], counts.cumsum()[:-1])
        means = np.stack([rows.mean(0) for rows in members])
        covariance, weight = _shrunk_covariance(where, x - means[groups], shrinkage)
        return cls(means, covariance, weight, _cholesky(where, covariance))

    def pooled(self, where: str, share: Floats) -> Gaussians:
        """One Gaussian with the mean and covariance of the mixture of classes of these shares."""
        mean = share @ self.means
        between = self.means - mean
        covariance = self.covariance + (share * between.T) @ between
        return Gaussians(mean[None], covariance, self.shrinkage, _cholesky(where, covariance))

    def distance(self, x: Floats) -> Floats:
        """Squared Mahalanobis distance of each row from its nearest mean."""
        from scipy.linalg import solve_triangular

        def whiten(rows: Floats) -> Floats:
            whitened: Floats = solve_triangular(self.root, (rows - centre).T, lower=True).T
            return whitened

        centre = self.means.mean(0)  # keeps the numbers small that are squared below
        means = whiten(self.means)
        offset = 0.5 * np.square(means).sum(1)
        chunk = max(1, _CHUNK_ELEMENTS // max(self.means.shape))
        found = []
        for start in range(0, len(x), chunk):
            z = whiten(x[start : start + chunk])
            nearest = (offset - z @ means.T).argmin(1)
            found.append(np.square(z - means[nearest]).sum(1))
        return np.concatenate(found)


def _shrunk_covariance(where: str, x: Floats, shrinkage: Shrinkage) -> tuple[Floats, float]:
    """Covariance of centred rows, and the weight of the scaled identity in it."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    if isinstance(shrinkage, str) and shrinkage == "auto":
        weight = float(ledoit_wolf_shrinkage(x, assume_centered=True))
    elif isinstance(shrinkage, Real) and 0 <= shrinkage <= 1:
        weight = float(shrinkage)
    else:
        raise ParameterError(
            f"{where}: shrinkage must be 'auto' or a number in [0, 1], got {shrinkage!r}."
        )
    covariance = (1 - weight) * (x.T @ x / len(x))
    covariance.flat[:: x.shape[1] + 1] += weight * np.square(x).sum() / x.size
    return covariance, weight


def _cholesky(where: str, covariance: Floats) -> Floats:
    """Lower factor of a covariance that is invertible beyond rounding."""
    variance = covariance.diagonal()
    try:
        root = np.linalg.cholesky(covariance).astype(np.float64, copy=False)
        # A squared pivot is the variance that the features before it leave unexplained.
        rank = (root.diagonal() ** 2 > len(root) * np.finfo(float).eps * variance).sum()
    except np.linalg.LinAlgError:
        rank = 0
    if rank < len(covariance):
        raise DataError(
            f"{where}: the covariance within classes cannot be inverted: features are constant or "
            "depend on one another, or rows are fewer than features; use shrinkage='auto' or drop "
            "constant features."
        )
    return root


# -- checks ------------------------------------------------------------------------------------


def _matrix(
    name: str, values: ArrayLike | Tensor, *, min_rows: int = 1, min_columns: int = 1
) -> Floats:
    """Finite float64 (n, d) of at least so many rows and columns."""
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu().double()  # NumPy has no bfloat16
        x: Floats = as_array(values).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must hold numbers, one row an input: {error}.") from error
    if x.ndim != 2 or len(x) < min_rows or x.shape[1] < min_columns:
        raise DataError(
            f"{name} must have shape (n, d) with n >= {min_rows} and d >= {min_columns}, "
            f"got {x.shape}; flatten or pool further axes."
        )
    check_finite_rows(name, x)
    return x


def _features_to_score(detector: Any, features: ArrayLike | Tensor) -> Floats:
    check_is_fitted(detector, "n_features_in_")
    name = f"{type(detector).__name__}.score: features"
    x = _matrix(name, features)
    if x.shape[1] != detector.n_features_in_:
        raise DataError(
            f"{name} must have {detector.n_features_in_} columns, as in fit, got {x.shape[1]}."
        )
    return x


def _groups(where: str, y: ArrayLike | Tensor, n: int) -> NDArray[np.int64]:
    """Classes as 0, 1, …, each of two rows or more."""
    labels = as_array(y)
    if labels.shape != (n,):
        raise DataError(f"{where}: y has shape {labels.shape}, expected ({n},), one class a row.")
    if labels.dtype.kind == "f":
        check_finite_rows(f"{where}: y", labels)
    classes, groups, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        raise DataError(
            f"{where}: class {classes[counts.argmin()]!r} has one row; a class needs two or more "
            "(is y the class labels?)."
        )
    return groups.astype(np.int64)


def _check_count(where: str, name: str, value: int) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ParameterError(f"{where}: {name} must be an integer >= 1, got {value!r}.")
    return int(value)


def _normalised(x: Floats) -> Floats:
    largest = np.abs(x).max(1, keepdims=True)  # so that squares neither overflow nor vanish
    x = np.divide(x, largest, out=np.zeros_like(x), where=largest > 0)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norm, out=x, where=norm > 0)


def _virtual_scale(where: str, x: Floats, complement: Floats, logits: Floats) -> float:
    """α that gives the virtual logit the mean of the largest logit."""
    if len(logits) != len(x):
        raise DataError(f"{where}: logits have {len(logits)} rows, features have {len(x)}.")
    largest = logits.max(1).mean()
    if largest <= 0:
        raise DataError(
            f"{where}: the largest logits have mean {largest:.3g}, expected > 0; give the outputs "
            "before the softmax, not log probabilities."
        )
    residual = np.linalg.norm(x @ complement, axis=1).mean()
    if residual <= 1e-12 * np.linalg.norm(x, axis=1).mean():  # rounding
        raise DataError(
            f"{where}: the principal subspace holds all features, so no residual is left to scale; "
            "lower n_components."
        )
    return float(largest / residual)

"""What every predictive distribution shares: rows, indexing, and the split of uncertainty."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from uq.errors import DataError, NoEpistemicError, ParameterError

if TYPE_CHECKING:
    import pandas as pd

    # Pyro has no types; to a type checker its distributions are torch's.
    from torch.distributions import Distribution as TorchDistribution
else:
    from pyro.distributions import TorchDistribution

# Elements that one pass over (draws, rows) touches at a time: fits the L2 cache, so that a chain of
# elementwise operations is not paid in memory traffic.
CHUNK_ELEMENTS = 1 << 16


class Predictive(TorchDistribution):
    """Base class of the predictive distributions: one batch element per row of ``X``.

    Attributes
    ----------
    index : pandas.Index or None
        Row labels of the DataFrame that was predicted, used by :meth:`to_frame`.

    Examples
    --------
    What ``predict_distribution`` of any estimator returns:

    >>> import torch
    >>> from uq.distributions import NormalMixture
    >>> dist = NormalMixture(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor(0.5))
    >>> dist.batch_shape, dist.n_draws  # two rows, two posterior draws of each
    (torch.Size([2]), 2)
    >>> dist.aleatoric, dist.epistemic  # variances: of the noise, and of the means over draws
    (tensor([0.2500, 0.2500]), tensor([1., 0.]))
    """

    index: pd.Index | None = None
    # Constructors check their arguments themselves, with messages that say what to do.
    arg_constraints: ClassVar[dict[str, Any]] = {}

    @property
    @abstractmethod
    def n_draws(self) -> int:
        """Number of posterior draws that are mixed."""

    @property
    @abstractmethod
    def aleatoric(self) -> Tensor:
        """Uncertainty that more training data would not remove."""

    @property
    @abstractmethod
    def epistemic(self) -> Tensor:
        """Uncertainty about the model that more training data would remove."""

    @property
    @abstractmethod
    def mode(self) -> Tensor:
        """Most probable value of each row."""

    @property
    @abstractmethod
    def draws(self) -> TorchDistribution:
        """Distribution of each posterior draw, batch shape ``(n_draws, *batch_shape)``."""

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """Summarise each row in a DataFrame."""

    @abstractmethod
    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw values; the same ``generator`` gives the same draws."""

    @abstractmethod
    def _map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """Same distribution with ``f`` applied to each tensor that has a value a row."""

    @abstractmethod
    def _rows(self, key: Any) -> Self:
        """Distribution of the rows that ``key`` selects along the first batch dimension."""

    @property
    def _row_axis(self) -> int:
        """Axis of the rows, counted from the end, in the tensors that ``_map`` visits."""
        return -len(self.batch_shape) - len(self.event_shape)

    def _kind(self) -> tuple[Any, ...]:
        """What must be equal for the rows of two distributions to be put in one."""
        return (type(self), tuple(self.batch_shape[1:]), tuple(self.event_shape), self.n_draws)

    def _check_shape(self, where: str, value: Tensor) -> None:
        shape = self.batch_shape + self.event_shape
        # Outcomes without the axis of their single output would be paired with every row.
        if len(shape) == 2 and shape[1] == 1 < shape[0] and value.shape == shape[:1]:
            raise DataError(
                f"{where}: value has shape {tuple(value.shape)}, expected {tuple(shape)}; add the "
                "axis of the output (value[:, None]), or take output(0) of the distribution."
            )
        try:
            torch.broadcast_shapes(value.shape, shape)
        except RuntimeError as error:
            raise DataError(
                f"{where}: value has shape {tuple(value.shape)}, expected {tuple(shape)}: one "
                "outcome a row."
            ) from error

    def cpu(self) -> Self:
        """Return the same distribution with its tensors on the CPU."""
        return self._map(lambda t: t.cpu())

    def double(self) -> Self:
        """Return the same distribution in float64, without gradients."""
        return self._map(lambda t: t.detach().double())

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError(f"{type(self).__name__} of a single row has no len().")
        return self.batch_shape[0]

    def __getitem__(self, key: int | slice | Any) -> Self:
        """Select rows by position: an integer, a slice, or an array of positions or booleans."""
        if not self.batch_shape:
            raise DataError(f"{type(self).__name__} of a single row cannot be indexed.")
        if isinstance(key, tuple):
            raise DataError(
                f"{type(self).__name__}: rows are selected by one index; for one of several "
                "outputs use output(j)."
            )
        if isinstance(key, int | np.integer):
            key = int(key)
        elif not isinstance(key, slice):
            key = torch.as_tensor(np.array(key))  # torch warns of arrays that cannot be written
        rows = self._rows(key)
        if self.index is not None and not isinstance(key, int):
            rows.index = self.index[key if isinstance(key, slice) else key.numpy()]
        return rows

    def __repr__(self) -> str:
        shape, event = tuple(self.batch_shape), tuple(self.event_shape)
        return (
            f"{type(self).__name__}(batch_shape={shape}, event_shape={event}, "
            f"n_draws={self.n_draws})"
        )

    def _no_epistemic(self) -> NoEpistemicError:
        return NoEpistemicError(
            f"This {type(self).__name__} comes from a single parameter value, so it has no "
            "epistemic uncertainty; use a method with a posterior (IVON, VBLL) or an ensemble."
        )


class ClassPredictive(Predictive):
    """Base class of predictive distributions over class labels, by position in ``classes``.

    A subclass gives ``probs``, ``log_prob``, ``aleatoric``, ``epistemic``, ``draws``.

    Attributes
    ----------
    classes : ndarray of shape (n_classes,)
        Labels, in the order of the columns of ``probs``.

    Examples
    --------
    >>> import torch
    >>> from uq.distributions import CategoricalMixture
    >>> probs = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]])  # two draws, one row, two classes
    >>> dist = CategoricalMixture(probs.log(), classes=["cat", "dog"])
    >>> dist.to_frame().round(2)
       cat  dog
    0  0.5  0.5
    >>> dist.entropy().item(), dist.epistemic.item()  # nats; the draws contradict each other
    (0.693, 0.368)
    """

    classes: np.ndarray
    has_rsample = False
    has_enumerate_support = True

    @property
    @abstractmethod
    def probs(self) -> Tensor:
        """Class probabilities, float64, shape (n, n_classes)."""

    @property
    def _row_axis(self) -> int:
        return -len(self.batch_shape) - 1  # the classes come last

    def _kind(self) -> tuple[Any, ...]:
        return (*super()._kind(), tuple(self.classes.tolist()))

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def support(self) -> constraints.Constraint:
        """Class positions 0 … n_classes − 1."""
        return constraints.integer_interval(0, self.n_classes - 1)

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
            f"{type(self).__name__} has no mean: labels are not numbers; see .probs."
        )

    @property
    def variance(self) -> Tensor:
        """Not defined: labels have no variance. Use ``entropy()``."""
        raise NotImplementedError(
            f"{type(self).__name__} has no variance: labels are not numbers; see .entropy()."
        )

    def entropy(self) -> Tensor:
        """Entropy of the averaged probabilities, in nats: aleatoric + epistemic."""
        p = self.probs
        return -torch.xlogy(p, p).sum(-1)

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
        values = torch.arange(self.n_classes, device=self.probs.device)
        values = values.reshape(-1, *(1,) * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    def to_frame(self) -> pd.DataFrame:
        """Class probabilities, one column a label."""
        import pandas as pd

        probs = self.probs.reshape(-1, self.n_classes).detach().cpu().numpy()
        return pd.DataFrame(probs, columns=list(self.classes), index=self.index)

    def _check_positions(self, value: Tensor) -> None:
        where = f"{type(self).__name__}.log_prob"
        if not isinstance(value, Tensor):
            raise DataError(
                f"{where}: value must be a tensor of class positions (in .classes); for labels "
                "use the model's log_score or uq.calibration.report."
            )
        if bool(((value < 0) | (value >= self.n_classes) | (value != value.floor())).any()):
            raise DataError(
                f"{where}: value must hold class positions 0 to {self.n_classes - 1}, not labels "
                "or probabilities."
            )
        self._check_shape(where, value)


class RealPredictive(Predictive):
    """Base class of predictive distributions over real targets.

    A subclass gives ``mean``, ``aleatoric``, ``epistemic``, ``log_prob``, ``cdf``, ``quantile``,
    ``crps``, ``sample``, ``mode``, ``draws``, ``joint`` and ``output``.

    Examples
    --------
    >>> import torch
    >>> from uq.distributions import NormalMixture
    >>> dist = NormalMixture(torch.zeros(1, 3), torch.tensor(2.0))  # one draw, three rows
    >>> dist.interval(0.9)[1]  # upper ends, in target units
    tensor([3.2897, 3.2897, 3.2897])
    >>> dist.crps(torch.tensor([0.0, 1.0, 4.0]))
    tensor([0.4674, 0.6628, 2.9056])
    """

    has_log_prob: ClassVar[bool] = True

    @abstractmethod
    def cdf(self, value: Tensor) -> Tensor:
        """Cumulative distribution of each output."""

    @abstractmethod
    def quantile(self, q: Tensor | float | Any) -> Tensor:
        """Quantiles: shape (n[, m]) for a scalar level, (Q, n[, m]) for Q levels in (0, 1)."""

    @abstractmethod
    def crps(self, value: Tensor) -> Tensor:
        """Continuous ranked probability score of each output at ``value``, in target units."""

    @abstractmethod
    def joint(self) -> Self:
        """Make the outputs of a row one event; a one-output distribution returns itself."""

    @abstractmethod
    def marginal(self) -> Self:
        """Undo :meth:`joint`: one distribution an output, batch shape (n, m)."""

    @abstractmethod
    def output(self, j: int) -> Self:
        """Marginal distribution of output ``j`` of batch shape (n, m), batch shape (n,)."""

    @property
    def _has_epistemic(self) -> bool:
        return self.n_draws > 1

    @property
    def stddev(self) -> Tensor:
        """Predictive standard deviation, in target units."""
        return self.variance.sqrt()

    @property
    def median(self) -> Tensor:
        """Predictive median, in target units."""
        return self.quantile(0.5)

    def icdf(self, value: Tensor | float) -> Tensor:
        """Quantiles; the same as :meth:`quantile`."""
        return self.quantile(value)

    def interval(self, coverage: float = 0.9) -> tuple[Tensor, Tensor]:
        """Equal-tailed interval that holds ``coverage`` of the predictive mass."""
        if not 0 < coverage < 1:
            raise ParameterError(f"interval: coverage must lie in (0, 1), got {coverage!r}.")
        tail = (1 - coverage) / 2
        lower, upper = self.quantile([tail, 1 - tail])
        return lower, upper

    def to_frame(self) -> pd.DataFrame:
        """Summarise rows: mean, std, q05, q50, q95, aleatoric and epistemic (NaN if it has none).

        Several outputs give a column MultiIndex (output, statistic).
        """
        import pandas as pd

        each = self.marginal()
        q05, q50, q95 = each.quantile([0.05, 0.5, 0.95])
        known = each._has_epistemic
        columns = {
            "mean": each.mean,
            "std": each.stddev,
            "q05": q05,
            "q50": q50,
            "q95": q95,
            "aleatoric": each.aleatoric,
            "epistemic": each.epistemic if known else torch.full_like(each.mean, math.nan),
        }
        arrays = {name: t.detach().cpu().numpy() for name, t in columns.items()}
        if len(each.batch_shape) < 2:
            return pd.DataFrame({k: np.atleast_1d(v) for k, v in arrays.items()}, index=self.index)
        outputs = range(each.batch_shape[1])
        return pd.DataFrame(
            {(f"y{j}", name): a[:, j] for j in outputs for name, a in arrays.items()},
            index=self.index,
        )

    def _targets(self, method: str, value: Any) -> Tensor:
        """Outcomes, which may come as an array or a Series, as a tensor that fits the rows."""
        where = f"{type(self).__name__}.{method}"
        if not isinstance(value, Tensor):
            try:
                value = torch.tensor(np.asarray(value, dtype=np.float64))
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{where}: value must hold numbers, got a {type(value).__name__}: {error}."
                ) from error
        self._check_shape(where, value)
        return value

    def _need_marginal(self, what: str) -> None:
        if self.event_shape:
            raise NotImplementedError(
                f"{type(self).__name__}.{what} is per output; call it on the distribution before "
                "joint()."
            )


def check_levels(q: Any) -> Tensor:
    """Quantile levels as float64, strictly between 0 and 1."""
    levels = torch.as_tensor(q, dtype=torch.float64)
    if not bool(((levels > 0) & (levels < 1)).all()):
        raise ParameterError(f"quantile: levels must lie strictly between 0 and 1, got {q!r}.")
    return levels


def concatenate(parts: Sequence[Predictive]) -> Predictive:
    """Put the rows of several predictive distributions in one, in order.

    Parameters
    ----------
    parts : sequence of Predictive
        Distributions of one kind: the same class, outputs, classes and number of draws, as those of
        one estimator at different rows, or of its fits on different folds.

    Returns
    -------
    Predictive
        Distribution of all rows; its ``index`` is joined where each part has one. Draw ``s`` of the
        result is draw ``s`` of each part, so draws of different fits are not functions of one
        posterior; what is per row (densities, quantiles, uncertainty) is unaffected.

    Raises
    ------
    DataError
        If there are no parts, one is a single row without a batch, or two are of different kinds.

    Examples
    --------
    >>> import torch
    >>> from uq.distributions import NormalMixture, concatenate
    >>> one = NormalMixture(torch.tensor([[0.0, 1.0]]), torch.tensor(1.0))
    >>> concatenate([one, one[1:]]).mean
    tensor([0., 1., 1.])
    """
    if not parts:
        raise DataError("concatenate: parts is empty; at least one distribution is needed.")
    first = parts[0]
    for i, part in enumerate(parts):
        if not isinstance(part, Predictive) or not part.batch_shape:
            raise DataError(
                f"concatenate: parts[{i}] must be a predictive distribution of rows, got {part!r}."
            )
        if part._kind() != first._kind():
            raise DataError(
                f"concatenate: parts[{i}] is {part!r}, which differs in kind (class, outputs, "
                f"classes, draws or parameters) from parts[0], {first!r}."
            )
    columns = iter(zip(*map(_tensors, parts), strict=True))
    whole = first._map(lambda _: torch.cat(next(columns), first._row_axis))
    indexes = [part.index for part in parts if part.index is not None]
    if len(indexes) == len(parts):
        whole.index = indexes[0].append(indexes[1:])
    return whole


def mixture(parts: Sequence[Predictive]) -> Predictive:
    """Mix the draws of several predictive distributions of the same rows, with equal weights.

    Parameters
    ----------
    parts : sequence of Predictive
        Distributions over draws (:class:`NormalMixture`, :class:`CategoricalMixture`) of one kind:
        the same rows, outputs, classes and number of draws, as those of several estimators.

    Returns
    -------
    Predictive
        Its draws are those of all parts; disagreement between parts becomes epistemic.

    Raises
    ------
    DataError
        If there are no parts, or two are of different kinds or rows.

    Examples
    --------
    >>> import torch
    >>> from uq.distributions import NormalMixture, mixture
    >>> one, two = (NormalMixture(torch.tensor([[m]]), torch.tensor(1.0)) for m in (0.0, 2.0))
    >>> d = mixture([one, two])
    >>> float(d.mean), float(d.aleatoric), float(d.epistemic)
    (1.0, 1.0, 1.0)
    """
    if not parts:
        raise DataError("mixture: parts is empty; at least one distribution is needed.")
    first = parts[0]
    for i, part in enumerate(parts):
        of_draws = isinstance(part, Predictive) and _tensors(part)[0].ndim + part._row_axis == 1
        same = of_draws and part._kind() == first._kind() and part.batch_shape == first.batch_shape
        if not same:
            raise DataError(
                f"mixture: parts[{i}] is {part!r}, which is not made of draws or differs in kind "
                f"or rows from parts[0], {first!r}."
            )
    columns = iter(zip(*map(_tensors, parts), strict=True))
    mixed = first._map(lambda _: torch.cat(next(columns), 0))
    mixed.index = first.index
    return mixed


def _tensors(d: Predictive) -> list[Tensor]:
    """Tensors with a value a row, in the order in which ``_map`` visits them."""
    seen: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        seen.append(t)
        return t

    d._map(keep)
    return seen

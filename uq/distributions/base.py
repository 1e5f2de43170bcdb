"""What every predictive distribution shares: rows, indexing, and the split of uncertainty."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from uq.errors import DataError, NoEpistemicError

if TYPE_CHECKING:
    import pandas as pd

# Elements that one pass over (draws, rows) touches at a time: fits the L2 cache, so that a chain of
# elementwise operations is not paid in memory traffic.
CHUNK_ELEMENTS = 1 << 16


class Predictive(TorchDistribution):
    """Base class of the predictive distributions: one batch element per row of ``X``.

    Attributes
    ----------
    index : pandas.Index or None
        Row labels of the DataFrame that was predicted, used by :meth:`to_frame`.
    """

    index: pd.Index | None = None

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
    def cpu(self) -> Self:
        """Return the same distribution with its tensors on the CPU."""

    @abstractmethod
    def _rows(self, key: Any) -> Self:
        """Distribution of the rows that ``key`` selects along the first batch dimension."""

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
            key = torch.as_tensor(np.asarray(key))
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

"""Rows that do not fit in memory: tables on disk, read in chunks, shuffled on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uq.data import csv_options, read_table, split_target, table_kind
from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    import pandas as pd

_CHUNK_ROWS = 65_536
# Chunks of a shuffled pass that are mixed with one another: more mix better and take more memory.
_MIXED_CHUNKS = 4


class TableStream:
    """A CSV or Parquet file that is read in chunks, again for each pass over it.

    Give it to ``fit`` of :class:`uq.TableModel`, or to ``predict_batches``. Memory is that of a few
    chunks, and of the targets, whatever the size of the file.

    Parameters
    ----------
    path : str or Path
        ``.csv``, ``.tsv``, ``.txt`` (also ``.gz``), ``.parquet`` or ``.pq``; or a folder of Parquet
        files with the same columns.
    target : str, optional
        Column to predict; needed to fit.
    chunk_rows : int, default=65536
        Rows read at once.

    Raises
    ------
    DataError
        If the file is missing, damaged, of another type, or lacks the target.

    Notes
    -----
    A pass for training visits the chunks of a Parquet file (its row groups) in random order, and
    shuffles the rows of four chunks with one another. A CSV file can only be read from its start:
    there rows are mixed within four chunks alone, so write rows in random order, or use Parquet.

    Examples
    --------
    >>> import tempfile, uq
    >>> from pathlib import Path
    >>> from uq.data import load_dataset
    >>> wine = load_dataset("wine")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "wine.parquet"
    ...     wine.X.assign(cultivar=wine.y).to_parquet(path)
    ...     stream = uq.TableStream(path, "cultivar", chunk_rows=50)
    ...     model = uq.TableModel(uq.MAPClassifier(max_epochs=2, random_state=0)).fit(stream)
    ...     [len(dist.index) for dist in model.predict_batches(uq.TableStream(path), 100)]
    [100, 78]
    """

    def __init__(
        self, path: str | Path, target: str | None = None, *, chunk_rows: int = _CHUNK_ROWS
    ) -> None:
        if not isinstance(chunk_rows, int) or chunk_rows < 2:
            raise ParameterError(
                f"TableStream: chunk_rows must be an integer >= 2, got {chunk_rows!r}."
            )
        self.path: Path = Path(path)
        self.target: str | None = target
        self.chunk_rows: int = chunk_rows
        self.is_parquet: bool = self.path.is_dir() or table_kind(self.path) == "parquet"
        if target is not None:
            split_target(self._head(), target)

    def _head(self) -> pd.DataFrame:
        """Return the first rows."""
        return next(iter(self.frames()))

    def frames(
        self, *, columns: list[str] | None = None, order: np.random.Generator | None = None
    ) -> Iterator[pd.DataFrame]:
        """Read the table in chunks.

        Parameters
        ----------
        columns : list of str, optional
            Columns to read; all by default.
        order : numpy.random.Generator, optional
            Read the row groups of Parquet files in random order.

        Raises
        ------
        DataError
            If the file is missing, damaged or has no rows.
        """
        import pyarrow

        read = self._parquet if self.is_parquet else self._csv
        n = 0
        try:
            for frame in read(columns, order):
                if len(frame):
                    frame.columns = frame.columns.map(str)
                    n += len(frame)
                    yield frame
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            if n == 0 and not self.is_parquet:
                read_table(self.path)  # says it in the words that a small file gets
            reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
            raise DataError(f"{self.path}: cannot be read: {reason}.") from None
        if n == 0:
            raise DataError(f"{self.path}: the table has no rows.")

    def _csv(
        self, columns: list[str] | None, order: np.random.Generator | None
    ) -> Iterator[pd.DataFrame]:
        import pandas as pd

        options, index = csv_options(self.path)
        with pd.read_csv(self.path, chunksize=self.chunk_rows, **options) as reader:
            for frame in reader:
                if index:
                    frame = frame.set_index(frame.columns[0])
                    frame.index.name = None
                yield frame if columns is None else frame[columns]

    def _parquet(
        self, columns: list[str] | None, order: np.random.Generator | None
    ) -> Iterator[pd.DataFrame]:
        import pyarrow.parquet as pq

        files = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        if not files:
            raise DataError(f"{self.path}: the folder holds no .parquet file.")
        groups = []
        for path in files:
            with pq.ParquetFile(path) as file:
                groups += [(path, i) for i in range(file.num_row_groups)]
        if order is not None:
            groups = [groups[i] for i in order.permutation(len(groups))]
        start = 0
        for path, i in groups:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(self.chunk_rows, [i], columns):
                    frame = batch.to_pandas()
                    if order is None and _is_count(frame.index):
                        frame.index = frame.index + (start - frame.index[0]) if len(frame) else []
                    start += len(frame)
                    yield frame


def _is_count(index: Any) -> bool:
    import pandas as pd

    return isinstance(index, pd.RangeIndex) and index.step == 1


class RowChunks:
    """Chunks of inputs and targets, as numbers: what an estimator learns from in passes.

    Parameters
    ----------
    read : callable
        ``read(order)`` yields (X, y) arrays; ``order`` is a ``numpy.random.Generator`` for a
        shuffled pass, else None.
    """

    def __init__(
        self, read: Callable[[np.random.Generator | None], Iterator[tuple[np.ndarray, np.ndarray]]]
    ) -> None:
        self.read = read

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self.read(None)

    def shuffled(self, order: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield chunks in random order, their rows mixed over a few chunks."""
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for part in self.read(order):
            parts.append(part)
            if len(parts) == _MIXED_CHUNKS:
                yield _mixed(parts, order)
                parts = []
        if parts:
            yield _mixed(parts, order)


def _mixed(
    parts: list[tuple[np.ndarray, np.ndarray]], order: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    X, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    rows = order.permutation(len(y))
    return X[rows], y[rows]


def array_chunks(X: Any, y: Any, chunk_rows: int = _CHUNK_ROWS) -> RowChunks:
    """Chunks of arrays that lie on disk (``numpy.memmap``)."""

    def read(order: np.random.Generator | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        starts = np.arange(0, len(y), chunk_rows)
        for start in starts if order is None else order.permutation(starts):
            rows = slice(start, start + chunk_rows)
            yield np.asarray(X[rows]), np.asarray(y[rows])

    return RowChunks(read)


def row_batches(X: Any, batch_rows: int) -> Iterator[Any]:
    """Cut inputs into batches, as they are: arrays, frames, streams and loaders.

    Raises
    ------
    ParameterError
        If ``batch_rows`` is no positive integer.
    """
    from torch.utils.data import DataLoader

    if not isinstance(batch_rows, int) or batch_rows < 1:
        raise ParameterError(f"batch_rows must be an integer >= 1, got {batch_rows!r}.")
    if isinstance(X, DataLoader):
        for batch in X:
            yield batch[0] if isinstance(batch, list | tuple) else batch
        return
    parts = X.frames() if isinstance(X, TableStream) else [X]
    for part in parts:
        rows = part.iloc if hasattr(part, "iloc") else part
        for start in range(0, len(part), batch_rows):
            yield rows[start : start + batch_rows]

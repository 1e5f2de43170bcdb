"""Tables with numbers, text and gaps in front of any estimator.

:class:`TablePreprocessor` turns a DataFrame into the array of numbers that a network needs, and
:class:`TableModel` joins it with an estimator, so that the pair is fitted, scored and saved as
one. What is learned is kept as plain numbers and strings; scikit-learn's transformers are built
from them when they are needed, so that saving a model never pickles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from pandas.api import types
from sklearn.base import (
    BaseEstimator,
    MetaEstimatorMixin,
    TransformerMixin,
    clone,
    is_classifier,
    is_regressor,
)
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.preprocessing import OneHotEncoder
from sklearn.utils import get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_array, check_is_fitted

from uq.data import split_target
from uq.errors import DataError, ParameterError
from uq.models.checks import check_is_data
from uq.streams import RowChunks, TableStream, row_batches

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike

    from uq.distributions import Predictive

MISSING = "missing"
# Distinct texts of a column that are counted exactly, and rows from which a median is taken.
_MAX_TEXTS = 1_000_000
_MEDIAN_ROWS = 1_000_000
_NUMBERS = {"integer", "floating", "mixed-integer-float", "decimal"}
_TEXT = {"string", "boolean", "categorical", "mixed", "mixed-integer", "empty"}


class TablePreprocessor(TransformerMixin, BaseEstimator):
    """Turn the columns of a table into an array of numbers.

    Columns of numbers keep their values; a gap becomes the training median, and a column that had
    gaps in training gets an indicator of them beside it. Columns of text, categories or booleans
    become one 0/1 column per category, a gap being the category ``missing``. A category that is
    rare in training, or unseen, has 0 in all of them.

    Parameters
    ----------
    max_categories : int, default=50
        At most this many categories of a column, the most frequent ones, get a 0/1 column.
    min_frequency : int, default=2
        Rows that a category needs to get one: what is seen once, such as a name, teaches nothing.

    Attributes
    ----------
    columns_ : list of str
        Columns in training order. At prediction they are found by name, others being
        ignored; those of an array by position.
    medians_ : dict of str to float
        Median of each column of numbers (0 for one with gaps only).
    gaps_ : list of str
        Columns of numbers that had gaps in training.
    categories_ : dict of str to list of str
        Categories with a 0/1 column, sorted, for each column of text.

    See Also
    --------
    sklearn.compose.make_column_transformer : the parts that this is made of.

    Notes
    -----
    Values are not scaled: the estimators of uq standardise their inputs themselves. Dates are
    refused, because whether their year, month, weekday or distance in days matters is for you to
    say.

    Examples
    --------
    >>> import pandas as pd
    >>> from uq.models.table import TablePreprocessor
    >>> table = pd.DataFrame({"age": [20, None, 40, 60], "city": ["Rome", "Oslo", "Rome", "Oslo"]})
    >>> prepare = TablePreprocessor().fit(table)
    >>> list(prepare.get_feature_names_out())
    ['age', 'missingindicator_age', 'city=Oslo', 'city=Rome']
    >>> prepare.transform(pd.DataFrame({"city": ["Paris", "Oslo"], "age": [30, None]}))
    array([[30.,  0.,  0.,  0.],
           [40.,  1.,  1.,  0.]])
    """

    def __init__(self, max_categories: int = 50, min_frequency: int = 2) -> None:
        self.max_categories = max_categories
        self.min_frequency = min_frequency

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn medians and categories.

        Parameters
        ----------
        X : DataFrame, array-like of shape (n, d) or TableStream
            The columns of an array are called ``x0``, ``x1``, …. The medians of a stream above a
            million rows are those of a million rows drawn from it.
        y : ignored
        """
        for name in ("max_categories", "min_frequency"):
            if getattr(self, name) < 1:
                raise ParameterError(
                    f"TablePreprocessor: {name} must be at least 1, got {getattr(self, name)!r}."
                )
        columns: dict[str, _Column] = {}
        for part in X.frames() if isinstance(X, TableStream) else [X]:
            table = _as_table(part)
            if table.empty:
                raise DataError(
                    "TablePreprocessor needs at least one row and one column, got shape "
                    f"{table.shape}."
                )
            for name in table.columns:
                if name != getattr(X, "target", None):
                    columns.setdefault(name, _Column()).add(table[name])
        medians: dict[str, float] = {}
        gaps: list[str] = []
        categories: dict[str, list[str]] = {}
        for name, column in columns.items():
            if column.counts is None:
                medians[name] = column.median()
                if column.has_gaps:
                    gaps.append(name)
            else:
                categories[name] = self._frequent(column.counts)
        if not medians and not any(categories.values()):
            raise DataError(
                "TablePreprocessor: no column can be used; all hold text of which no value comes "
                f"{self.min_frequency} times."
            )
        self.columns_: list[str] = list(columns)
        self.medians_: dict[str, float] = medians
        self.gaps_: list[str] = gaps
        self.categories_: dict[str, list[str]] = categories
        self.n_features_in_: int = len(self.columns_)
        return self

    def _frequent(self, counts: Counter[str]) -> list[str]:
        often = [item for item in counts.items() if item[1] >= self.min_frequency]
        ranked = sorted(often, key=lambda item: (-item[1], item[0]))
        return sorted(str(name) for name, _ in ranked[: self.max_categories])

    def transform(self, X: Any) -> np.ndarray:
        """Return the float64 array of shape (n, number of output columns).

        Raises
        ------
        DataError
            If a training column is missing, or a column of numbers holds text or infinity.
        """
        check_is_fitted(self)
        table = _as_table(X)
        if not isinstance(X, pd.DataFrame):
            if table.shape[1] != self.n_features_in_:
                raise DataError(
                    f"X has {table.shape[1]} features, but {type(self).__name__} is expecting "
                    f"{self.n_features_in_} features as input."
                )
            table.columns = pd.Index(self.columns_)
        absent = [name for name in self.columns_ if name not in table.columns]
        if absent:
            named = ", ".join(map(repr, absent[:8])) + (" and more" if len(absent) > 8 else "")
            raise DataError(
                f"{len(absent)} of the {len(self.columns_)} columns seen in training "
                f"{'is' if len(absent) == 1 else 'are'} missing: {named}."
            )
        ready = {
            name: _numbers(table[name]) if name in self.medians_ else _text(table[name])
            for name in self.columns_
        }
        if len(table) == 0:
            return np.empty((0, len(self.get_feature_names_out())))
        out = self._transformer().transform(pd.DataFrame(ready, index=table.index))
        return np.asarray(out, dtype=np.float64)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the output columns: ``age``, ``missingindicator_age``, ``city=Rome``."""
        check_is_fitted(self)
        names: np.ndarray = self._transformer().get_feature_names_out()
        return names

    def _transformer(self) -> ColumnTransformer:
        """Build scikit-learn's transformer from what was learned.

        Its ``fit`` sees one row that holds the medians: the median of one value is that value, so
        the imputer learns what it was given; categories and indicators are given outright.
        """
        encoded = {name: cats for name, cats in self.categories_.items() if cats}
        encoder = OneHotEncoder(
            categories=[np.array(cats, dtype=object) for cats in encoded.values()],
            handle_unknown="ignore",
            sparse_output=False,
            feature_name_combiner=_category_name,
        )
        transformer = ColumnTransformer(
            [
                ("number", SimpleImputer(strategy="median"), list(self.medians_)),
                ("gap", MissingIndicator(features="all"), self.gaps_),
                ("category", encoder, list(encoded)),
            ],
            verbose_feature_names_out=False,
        )
        row = {name: self.medians_.get(name, MISSING) for name in self.columns_}
        return transformer.fit(pd.DataFrame([row]).astype(dict.fromkeys(self.categories_, object)))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.string = tags.input_tags.categorical = True
        return tags


class _Column:
    """What is learned of a column, chunk by chunk."""

    def __init__(self) -> None:
        self.counts: Counter[str] | None = None
        self.has_gaps = False
        self._sample: list[np.ndarray] = []
        self._n = 0
        self._rng = np.random.default_rng(0)

    def add(self, column: pd.Series) -> None:
        if self._n == 0 and self.counts is None and not _holds_numbers(column):
            self.counts = Counter()
        if self.counts is not None:
            found = _text(column).value_counts()
            self.counts.update(dict(zip(found.index, found.tolist(), strict=True)))
            if len(self.counts) > _MAX_TEXTS:  # of names and the like, only the frequent matter
                self.counts = Counter(dict(self.counts.most_common(_MAX_TEXTS // 2)))
            return
        numbers = _numbers(column)
        present = numbers[~np.isnan(numbers)]
        self.has_gaps = self.has_gaps or len(present) < len(numbers)
        self._n += len(present)
        self._sample.append(present)
        if self._n > _MEDIAN_ROWS:
            # Each row so far is in the sample with the same probability.
            share = _MEDIAN_ROWS / self._n
            new = present[self._rng.random(len(present)) < share]
            old = np.concatenate(self._sample[:-1])
            room = max(0, min(len(old), _MEDIAN_ROWS - len(new)))
            self._sample = [self._rng.choice(old, room, replace=False), new]

    def median(self) -> float:
        return float(np.median(np.concatenate(self._sample))) if self._n else 0.0


def _category_name(column: str, category: str) -> str:
    return f"{column}={category}"


def _as_table(X: Any) -> pd.DataFrame:
    """Table with unique string column names; those of an array are x0, x1, …."""
    if not isinstance(X, pd.DataFrame) and hasattr(X, "__dataframe__"):  # of another library
        X = pd.api.interchange.from_dataframe(X)
    if not isinstance(X, pd.DataFrame):
        array = check_array(X, dtype=None, ensure_all_finite=False, estimator="TablePreprocessor")
        return pd.DataFrame(array, columns=[f"x{j}" for j in range(array.shape[1])])
    names = pd.Index([str(name) for name in X.columns])
    if names.has_duplicates:
        raise DataError(f"two columns are called {names[names.duplicated()][0]!r}; rename one.")
    return X.set_axis(names, axis=1)


def _holds_numbers(column: pd.Series) -> bool:
    """Whether a training column is numeric; refuses what is neither numbers nor text."""
    if isinstance(column.dtype, pd.CategoricalDtype) or types.is_bool_dtype(column):
        return False
    kind = types.infer_dtype(column, skipna=True)
    if kind in _NUMBERS or (kind == "empty" and types.is_numeric_dtype(column)):
        return True
    if kind not in _TEXT or not all(map(types.is_scalar, column.array)):
        raise DataError(
            f"column {column.name!r} holds {kind} values; turn them into numbers or text first "
            "(a date, for example, into its year, or the days since some day)."
        )
    return False


def _numbers(column: pd.Series) -> np.ndarray:
    """Values as float64 with NaN for gaps; text is parsed."""
    if column.dtype.kind in "iuf" and isinstance(column.dtype, np.dtype):
        numbers = column.to_numpy(dtype=np.float64)
        if not np.isinf(numbers).any():
            return numbers
    parsed = pd.to_numeric(column.astype(object), errors="coerce")
    numbers = np.asarray(parsed, dtype=np.float64)
    bad = np.flatnonzero((np.isnan(numbers) & ~column.isna().to_numpy()) | np.isinf(numbers))
    if len(bad):
        raise DataError(
            f"column {column.name!r} must hold finite numbers or gaps, got "
            f"{_shown(column.iloc[bad[0]])} in row {_shown(column.index[bad[0]])} "
            f"({len(bad)} such rows)."
        )
    return numbers


def _shown(value: Any) -> str:
    """``repr`` without NumPy's type around a scalar."""
    return repr(value.item() if isinstance(value, np.generic) else value)


def _text(column: pd.Series) -> pd.Series:
    """Values as text, so that 1, 1.0 and "1" are one category whatever the file made of them."""
    values = column.astype(object)
    text = [
        str(int(v)) if isinstance(v, float | np.floating) and v % 1 == 0 else str(v) for v in values
    ]
    return pd.Series(text, index=column.index, dtype=object).where(column.notna(), MISSING)


# -- model ---------------------------------------------------------------------------------------


def _classifies(model: TableModel) -> bool:
    return is_classifier(model.estimator)


def _regresses(model: TableModel) -> bool:
    return is_regressor(model.estimator)


class TableModel(MetaEstimatorMixin, BaseEstimator):
    """Let an estimator of uq learn from tables with text, categories and gaps.

    Parameters
    ----------
    estimator : classifier or regressor
        Any estimator of uq; it is cloned in ``fit``.
    preprocessor : TablePreprocessor, optional
        One with other than the default settings; it is cloned too.

    Attributes
    ----------
    estimator_ : estimator
        The fitted clone, which sees arrays.
    preprocessor_ : TablePreprocessor
        The fitted preprocessor.

    See Also
    --------
    sklearn.pipeline.Pipeline : joins any steps, without predictive distributions or ``save``.

    Examples
    --------
    >>> from uq.data import load_dataset
    >>> from uq.models.map import MAPClassifier
    >>> from uq.models.table import TableModel
    >>> wine = load_dataset("wine")
    >>> model = TableModel(MAPClassifier(max_epochs=2, random_state=0)).fit(wine.X, wine.y)
    >>> list(model.predict_distribution(wine.X.tail(2)).index)
    [176, 177]
    """

    def __init__(self, estimator: Any, preprocessor: TablePreprocessor | None = None) -> None:
        self.estimator = estimator
        self.preprocessor = preprocessor

    def fit(self, X: Any, y: ArrayLike | None = None, *, resume: bool = False) -> Self:
        """Fit the preprocessor and the estimator.

        Parameters
        ----------
        X : DataFrame, array-like of shape (n, d) or TableStream
            A :class:`uq.TableStream` is read in chunks, again for each epoch, and holds no rows
            out for ``patience``.
        y : array-like of shape (n,), or (n, m) for several outputs of a regressor
            Left out for a stream, which names its target.
        resume : bool, default=False
            Go on from the estimator's ``checkpoint_dir``.

        Raises
        ------
        DataError
            If values of ``y`` are missing, or are text for a regressor.
        """
        if not hasattr(self.estimator, "predict_distribution"):
            raise ParameterError(
                "TableModel: estimator must have predict_distribution, as those of uq.methods() "
                f"have, for example uq.IVONClassifier(), got {self.estimator!r}."
            )
        check_is_data("TableModel.fit", X=X, y=y)
        self.preprocessor_: Any = clone(self.preprocessor or TablePreprocessor()).fit(X)
        model = clone(self.estimator)
        options = {"resume": True} if resume else {}
        if isinstance(X, TableStream):
            self.estimator_: Any = model.fit(self._chunks(X, y), **options)
        else:
            array = self.preprocessor_.transform(X)
            self.estimator_ = model.fit(array, self._target(y), **options)
        return self

    def _chunks(self, stream: TableStream, y: Any) -> RowChunks:
        target = stream.target
        if target is None or y is not None:
            raise DataError(
                "TableModel: a stream brings its target: TableStream(path, target=...), and no y."
            )

        def read(order: np.random.Generator | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for frame in stream.frames(columns=[*self.preprocessor_.columns_, target], order=order):
                X, labels = split_target(frame, target)
                yield self.preprocessor_.transform(X), self._target(labels)

        return RowChunks(read)

    def predict_batches(self, X: Any, batch_rows: int = 8192) -> Iterator[Predictive]:
        """Predict in batches: the rows of a :class:`uq.TableStream`, or of a table.

        Parameters
        ----------
        X : DataFrame, array-like of shape (n, d) or TableStream
        batch_rows : int, default=8192
            Rows predicted at once.

        Yields
        ------
        Predictive
            What :meth:`predict_distribution` gives for the next rows.
        """
        for rows in row_batches(X, batch_rows):
            yield self.predict_distribution(rows)

    def predict_distribution(self, X: Any) -> Predictive:
        """Return the predictive distribution; it keeps the index of a DataFrame."""
        check_is_fitted(self)
        dist: Predictive = self.estimator_.predict_distribution(self.preprocessor_.transform(X))
        if isinstance(X, pd.DataFrame):
            dist.index = X.index
        return dist

    def predict(self, X: Any) -> np.ndarray:
        """Return labels or predictive means."""
        return self._call("predict", X)

    @available_if(_classifies)
    def predict_proba(self, X: Any) -> np.ndarray:
        """Return class probabilities, columns in the order of ``classes_``."""
        return self._call("predict_proba", X)

    @available_if(_regresses)
    def predict_interval(self, X: Any, coverage: float = 0.9) -> Any:
        """Return the equal-tailed interval that holds ``coverage`` of the predictive mass."""
        return self._call("predict_interval", X, coverage)

    @available_if(_regresses)
    def predict_quantiles(self, X: Any, q: ArrayLike) -> np.ndarray:
        """Return the predictive quantiles at levels ``q``."""
        return self._call("predict_quantiles", X, q)

    def score(self, X: Any, y: ArrayLike) -> float:
        """Return accuracy, or R² for a regressor."""
        return self._call("score", X, self._target(y))

    def sample_functions(self, X: Any, n: int = 10) -> np.ndarray:
        """Draw functions from the posterior at the rows of ``X``; see the estimator's own."""
        return self._call("sample_functions", X, n)

    def log_score(self, X: Any, y: ArrayLike) -> float:
        """Return the mean log predictive density of ``y``, in nats."""
        return self._call("log_score", X, self._target(y))

    def save(self, path: str | Path) -> None:
        """Write preprocessor and estimator to one file that :func:`uq.load` reads."""
        from uq.io import save

        check_is_fitted(self)
        save(self, path)

    @property
    def classes_(self) -> np.ndarray:
        """Labels of a fitted classifier."""
        classes: np.ndarray = self.estimator_.classes_
        return classes

    @property
    def n_features_in_(self) -> int:
        """Number of table columns seen in training."""
        return self.preprocessor_.n_features_in_

    def _call(self, name: str, X: Any, *args: Any) -> Any:
        check_is_fitted(self)
        return getattr(self.estimator_, name)(self.preprocessor_.transform(X), *args)

    def _target(self, y: Any) -> np.ndarray:
        """``y`` as an array of one plain dtype, without gaps."""
        if y is None:
            raise DataError("TableModel requires y to be passed, but the target y is None.")
        target = y if isinstance(y, pd.DataFrame | pd.Series) else np.asarray(y)
        gaps = np.asarray(pd.isna(target))
        missing = np.flatnonzero(gaps.reshape(len(gaps), -1).any(axis=1))
        if len(missing):
            first = missing[0] if isinstance(target, np.ndarray) else target.index[missing[0]]
            raise DataError(
                f"TableModel: y is missing in {len(missing)} of {len(target)} rows "
                f"(first: row {_shown(first)}); drop these rows or fill them in."
            )
        array = np.asarray(target)
        # Object and nullable dtypes become the dtype of their values: text, bool, int or float.
        array = np.array(array.tolist()) if array.dtype == object else array
        if _regresses(self) and array.dtype.kind not in "iufb":
            raise DataError(
                f"TableModel: a regressor needs numbers as y, got {_shown(array.flat[0])}; use a "
                "classifier for labels."
            )
        return array

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        for name in ("estimator_type", "classifier_tags", "regressor_tags", "target_tags"):
            setattr(tags, name, getattr(inner, name))
        own = tags.input_tags
        own.allow_nan = own.string = own.categorical = True
        return tags

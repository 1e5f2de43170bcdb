"""Tables to learn from: bundled data sets that need no network, and files of the user's.

Every loader returns pandas objects, so that column names and row labels reach the predictions.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uq.errors import DataError, ParameterError

if TYPE_CHECKING:
    import pandas as pd

    from uq.models.registry import Task

__all__ = [
    "Dataset",
    "infer_task",
    "load_dataset",
    "open_dataset",
    "read_table",
    "split_rows",
    "split_target",
]

MAX_WHOLE_NUMBER_CLASSES = 20
_SNIFFED_BYTES = 1 << 16
_SEPARATORS = ",;\t|"
_CSV_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz")
_PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class Dataset:
    """A table with its target and, where there is one, data from elsewhere.

    Attributes
    ----------
    name : str
        Short name, used for titles and folders.
    X : pandas.DataFrame of shape (n, d)
        Features, one named column each.
    y : pandas.Series of shape (n,)
        Labels or numbers, with the index of ``X``.
    task : {"classification", "regression"}
        What ``y`` asks for.
    description : str
        Where the data comes from; for generated data the formula and the seed.
    target_unit : str
        Unit of ``y``; empty for labels and pure numbers.
    ood : pandas.DataFrame or None
        Rows with the columns of ``X`` that do not come from its distribution.
    ood_name : str
        What the rows of ``ood`` are.
    noise_std : ndarray of shape (n,) or None
        True standard deviation of ``y`` given each row, in target units, where it is known.

    See Also
    --------
    load_dataset, open_dataset : make one.
    """

    name: str
    X: pd.DataFrame
    y: pd.Series
    task: Task
    description: str = ""
    target_unit: str = ""
    ood: pd.DataFrame | None = None
    ood_name: str = ""
    noise_std: np.ndarray | None = None


# -- bundled data sets ---------------------------------------------------------------------------


def load_dataset(name: str) -> Dataset:
    """Load a bundled data set; nothing is downloaded.

    Parameters
    ----------
    name : {"digits", "breast_cancer", "wine", "diabetes", "moons", "sine"}
        The first four come in scikit-learn's wheel; the last two are generated with seed 0.

    Returns
    -------
    Dataset
        ``digits``, ``moons`` and ``sine`` carry out-of-distribution rows.

    Raises
    ------
    DataError
        If there is no such data set.

    Notes
    -----
    ``moons``: class 0 is (cos t, sin t) and class 1 is (1 − cos t, ½ − sin t), t evenly spaced
    on [0, π], plus Gaussian noise of standard deviation 0.2 on both coordinates; the other data
    lies on a ring of radius 4 ± 0.3 around the middle of the moons, (½, ¼).

    ``sine``: y ~ Normal(sin 2x, (0.05 + 0.1 |x|)²) with x uniform on [−3, −1] ∪ [1, 3]; the other
    data has half of its x uniform in the gap [−0.6, 0.6] and half on ±[3.5, 5].

    ``digits``: the other data are 8 × 8 grey patches cut from scikit-learn's two photographs, each
    scaled to 0 … 16 and rounded, as the pixels of the digits are.

    Examples
    --------
    >>> from uq.data import load_dataset
    >>> moons = load_dataset("moons")
    >>> moons.X.shape, moons.task, moons.ood.shape
    ((600, 2), 'classification', (300, 2))
    """
    if name not in _LOADERS:
        raise DataError(f"data set {name!r} is unknown{suggest(name, DATASETS)}")
    return _LOADERS[name]()


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits(as_frame=True)
    return Dataset(
        "digits",
        bunch.data,
        bunch.target.rename("digit"),
        "classification",
        "1797 handwritten digits of 8 × 8 pixels, 0 … 16 (UCI, in scikit-learn).",
        ood=_photo_patches(450, bunch.data.columns),
        ood_name="photo patches",
    )


def _photo_patches(n: int, columns: pd.Index) -> pd.DataFrame:
    import pandas as pd
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    luma = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    greys = [image @ luma for image in load_sample_images().images]
    patches: list[np.ndarray] = []
    while len(patches) < n:
        grey = greys[len(patches) % len(greys)]
        top, left = (int(rng.integers(side - 8)) for side in grey.shape)
        patch = grey[top : top + 8, left : left + 8]
        low, high = patch.min(), patch.max()
        if high - low >= 16:  # a flat patch of sky would be scaled-up sensor noise
            patches.append(np.rint(16 * (patch - low) / (high - low)).ravel())
    return pd.DataFrame(np.stack(patches), columns=columns)


def _breast_cancer() -> Dataset:
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer(as_frame=True)
    return Dataset(
        "breast_cancer",
        bunch.data,
        _labels(bunch, "diagnosis"),
        "classification",
        "569 breast masses, 30 measurements of cell nuclei (UCI Wisconsin, in scikit-learn).",
    )


def _wine() -> Dataset:
    from sklearn.datasets import load_wine

    bunch = load_wine(as_frame=True)
    return Dataset(
        "wine",
        bunch.data,
        _labels(bunch, "cultivar"),
        "classification",
        "178 Italian wines of three cultivars, 13 chemical measurements (UCI, in scikit-learn).",
    )


def _labels(bunch: Any, name: str) -> pd.Series:
    import pandas as pd

    names = np.asarray(bunch.target_names)[bunch.target.to_numpy()]
    return pd.Series(names.tolist(), index=bunch.target.index, name=name)


def _diabetes() -> Dataset:
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(as_frame=True, scaled=False)
    return Dataset(
        "diabetes",
        bunch.data,
        bunch.target.rename("progression"),
        "regression",
        "442 diabetes patients, 10 measurements; disease progression after one year "
        "(Efron et al., 2004, in scikit-learn).",
        target_unit="progression score, 25 … 346",
    )


def _moons() -> Dataset:
    import pandas as pd
    from sklearn.datasets import make_moons

    points, label = make_moons(600, noise=0.2, random_state=0)
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 300)
    radius = rng.normal(4, 0.3, 300)
    ring = np.stack([0.5 + radius * np.cos(angle), 0.25 + radius * np.sin(angle)], axis=1)
    columns = ["x1", "x2"]
    return Dataset(
        "moons",
        pd.DataFrame(points, columns=columns),
        pd.Series(label, name="moon"),
        "classification",
        "Generated, seed 0: two half circles of radius 1, Gaussian noise 0.2 on both coordinates.",
        ood=pd.DataFrame(ring, columns=columns),
        ood_name="far ring",
    )


def _sine() -> Dataset:
    import pandas as pd

    rng = np.random.default_rng(0)
    x = rng.choice([-1.0, 1.0], 400) * rng.uniform(1, 3, 400)
    noise_std = 0.05 + 0.1 * np.abs(x)
    y = np.sin(2 * x) + noise_std * rng.standard_normal(400)
    gap = rng.uniform(-0.6, 0.6, 100)
    beyond = rng.choice([-1.0, 1.0], 100) * rng.uniform(3.5, 5, 100)
    return Dataset(
        "sine",
        pd.DataFrame({"x": x}),
        pd.Series(y, name="y"),
        "regression",
        "Generated, seed 0: y ~ Normal(sin 2x, (0.05 + 0.1 |x|)²), x on [−3, −1] ∪ [1, 3].",
        ood=pd.DataFrame({"x": np.concatenate([gap, beyond])}),
        ood_name="gap and beyond",
        noise_std=noise_std,
    )


_LOADERS: dict[str, Callable[[], Dataset]] = {
    "digits": _digits,
    "breast_cancer": _breast_cancer,
    "wine": _wine,
    "diabetes": _diabetes,
    "moons": _moons,
    "sine": _sine,
}
DATASETS: tuple[str, ...] = tuple(_LOADERS)


# -- files ---------------------------------------------------------------------------------------


def open_dataset(source: str, *, target: str | None = None, task: Task | None = None) -> Dataset:
    """Load a bundled data set by name, or a CSV or Parquet file with its target column.

    Parameters
    ----------
    source : str
        A name that :func:`load_dataset` knows, or a path. A file that has the name of a bundled
        data set is reached with a folder in front, such as ``./digits``.
    target : str, optional
        Column to predict; required for a file, refused for a bundled data set.
    task : {"classification", "regression"}, optional
        By default found by :func:`infer_task`. For classification the labels of a CSV file are kept
        as they are written where a number or a truth value would be written otherwise: 001, true.

    Raises
    ------
    ParameterError
        If ``target`` is missing or superfluous.
    DataError
        If the file or the column cannot be used.

    Returns
    -------
    Dataset
        Named after the file, without its suffixes.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import pandas as pd
    >>> from uq.data import open_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "houses.csv"
    ...     pd.DataFrame({"area": [50, 80], "price": [210.5, 300.0]}).to_csv(path, index=False)
    ...     houses = open_dataset(str(path), target="price")
    >>> houses.name, houses.task, list(houses.X)
    ('houses', 'regression', ['area'])
    """
    if source in DATASETS:
        if target is not None:
            raise ParameterError(f"{source} is bundled with its target; leave the target out.")
        found = load_dataset(source)
        if task not in (None, found.task):
            raise ParameterError(f"{source} is a {found.task} data set, not {task}.")
        return found
    path = Path(source)
    if not path.suffix and not path.exists():
        raise DataError(
            f"{source!r} is neither a file nor a bundled data set{suggest(source, DATASETS)}"
        )
    frame = read_table(path)
    if target is None:
        raise ParameterError(f"{source}: name the column to predict; there are {_some(frame)}.")
    X, y = split_target(frame, target)
    task = task or infer_task(y)
    if task == "classification" and table_kind(path) == "csv":
        y = _as_written(path, y, frame.columns.get_loc(target))
    return Dataset(path.name.split(".")[0], X, y, task)


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a CSV or Parquet file.

    Parameters
    ----------
    path : str or Path
        ``.csv``, ``.tsv``, ``.txt`` (also ``.gz``), ``.parquet`` or ``.pq``. Text is UTF-8 with a
        header. The separator is whichever of comma, semicolon, tab and bar the header holds most
        of; semicolons may come with decimal commas. A first column without a name, which
        ``DataFrame.to_csv`` writes, becomes the index.

    Raises
    ------
    DataError
        If the file is missing, empty, damaged, has no rows or is of another type.

    Returns
    -------
    pandas.DataFrame
        One row a line; the names of its columns are text.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import pandas as pd
    >>> from uq.data import read_table
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "people.csv"
    ...     pd.DataFrame({"name": ["Anna"], "kg": [61.5]}).to_csv(path, index=False)
    ...     table = read_table(path)
    >>> table
       name    kg
    0  Anna  61.5
    """
    import pandas as pd

    path = Path(path)
    read = _read_csv if table_kind(path) == "csv" else _read_parquet
    try:
        frame = read(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except pd.errors.EmptyDataError:
        raise DataError(f"{path}: the file is empty.") from None
    except UnicodeDecodeError as error:
        if path.read_bytes()[:4] == b"PAR1":
            raise DataError(f"{path}: this is a Parquet file; name it .parquet.") from None
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        # pyarrow's errors about damaged files carry no strerror.
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except pd.errors.ParserWarning:
        raise DataError(f"{path}: rows have more cells than the header has names.") from None
    except (ValueError, EOFError, zlib.error) as error:
        reason = str(error).removeprefix("Error tokenizing data. C error: ").strip().rstrip(".")
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {reason}.") from None
    if frame.empty:
        raise DataError(f"{path}: the file has a header but no rows.")
    frame.columns = frame.columns.map(str)
    return frame


def table_kind(path: Path) -> str:
    """Return "csv" or "parquet", by the name of a file.

    Raises
    ------
    DataError
        If the suffix is another.
    """
    name = path.name.lower()
    if name.endswith(_CSV_SUFFIXES):
        return "csv"
    if name.endswith(_PARQUET_SUFFIXES):
        return "parquet"
    known = ", ".join(_CSV_SUFFIXES + _PARQUET_SUFFIXES)
    got = f"the suffix {path.suffix!r} is unknown" if path.suffix else "the name has no suffix"
    raise DataError(f"{path}: {got}; a table is read from {known}.")


def csv_options(path: Path) -> tuple[dict[str, Any], bool]:
    """Arguments of ``pandas.read_csv`` for a file, and whether its first column is the index."""
    import gzip

    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        head = file.read(_SNIFFED_BYTES).decode("utf-8-sig", errors="replace")
    header = head.partition("\n")[0]
    separator = max(_SEPARATORS, key=header.count)
    decimal_comma = (
        separator == ";" and re.search(r"\d,\d", head) and not re.search(r"\d\.\d", head)
    )
    options = {
        "sep": separator,
        "decimal": "," if decimal_comma else ".",
        "index_col": False,
        "skipinitialspace": True,
        "low_memory": False,
        "encoding": "utf-8-sig",
    }
    return options, header.startswith(separator) or header.startswith('""')


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    options, has_index = csv_options(path)
    with warnings.catch_warnings():
        # Rows longer than the header would lose their last cells with a warning only.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        frame = pd.read_csv(path, **options)
    if has_index:
        frame = frame.set_index(frame.columns[0])
        frame.index.name = None
    return frame


def _as_written(path: Path, y: pd.Series, column: Any) -> pd.Series:
    """Labels as the text of a CSV file where numbers would not give it back: 001, true, 2.50."""
    from pandas.api import types

    if not isinstance(column, int) or not (types.is_bool_dtype(y) or types.is_numeric_dtype(y)):
        return y
    import pandas as pd

    options, has_index = csv_options(path)
    text = pd.read_csv(path, **options, usecols=[column + has_index], dtype=str).iloc[:, 0]
    text = text.set_axis(y.index).rename(y.name)
    # Two spellings of one value, such as 1 and 1.0, are one label: the value.
    one_spelling = text.nunique() == y.nunique()
    return text if one_spelling and (text != y.astype(str)).any() else y


def _read_parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    if path.stat().st_size == 0:
        raise pd.errors.EmptyDataError
    return pd.read_parquet(path)


def split_target(frame: pd.DataFrame, target: str) -> tuple[pd.DataFrame, pd.Series]:
    """Split a table into features and the column ``target``.

    Parameters
    ----------
    frame : pandas.DataFrame of shape (n, d + 1)
        Table.
    target : str
        Name of a column.

    Returns
    -------
    X : pandas.DataFrame of shape (n, d)
        The other columns.
    y : pandas.Series of shape (n,)
        The column.

    Raises
    ------
    DataError
        If there is no such column (close matches are named), no other, or if some of its values
        are missing.

    Examples
    --------
    >>> import pandas as pd
    >>> from uq.data import split_target
    >>> X, y = split_target(pd.DataFrame({"age": [30, 40], "price": [1.5, 2.0]}), "price")
    >>> list(X), list(y)
    (['age'], [1.5, 2.0])
    """
    if target not in frame.columns:
        raise DataError(f"there is no column {target!r}{suggest(target, map(str, frame.columns))}")
    X = frame.drop(columns=target)
    if X.shape[1] == 0:
        raise DataError(f"there is no column besides the target {target!r} to predict it from.")
    y = frame[target]
    missing = np.flatnonzero(y.isna())
    if len(missing):
        raise DataError(
            f"the target {target!r} is missing in {len(missing)} of {len(y)} rows "
            f"(first: row {y.index[missing[0]]}); drop these rows or fill them in."
        )
    return X, y


def infer_task(y: pd.Series) -> Task:
    """Tell whether a target asks for classification or regression.

    Text, booleans and categoricals are labels. So are numbers when all are whole, at most 20 of
    them differ, and each of those comes twice or more on average. Everything else is regression.

    Parameters
    ----------
    y : pandas.Series of shape (n,)
        Target; missing values are passed over.

    Returns
    -------
    {"classification", "regression"}
        The task.

    Raises
    ------
    DataError
        If ``y`` holds dates.

    Examples
    --------
    >>> import pandas as pd
    >>> from uq.data import infer_task
    >>> infer_task(pd.Series(["yes", "no"])), infer_task(pd.Series([0.5, 1.5]))
    ('classification', 'regression')
    """
    from pandas.api import types

    if types.is_datetime64_any_dtype(y) or types.is_timedelta64_dtype(y):
        raise DataError(f"the target {y.name!r} holds dates or times; turn it into numbers first.")
    if types.is_bool_dtype(y) or not types.is_numeric_dtype(y):
        return "classification"
    present = y.dropna().to_numpy(dtype=np.float64)
    distinct = np.unique(present)
    few = len(distinct) <= min(MAX_WHOLE_NUMBER_CLASSES, len(present) / 2)
    return "classification" if few and bool((distinct % 1 == 0).all()) else "regression"


def split_rows(
    X: pd.DataFrame, y: pd.Series, task: Task, *, test_size: float = 0.25, random_state: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame, pd.Series, pd.Series]:
    """Split rows at random into a training and a held-out part.

    For classification the parts have the same class shares wherever every class fits into both;
    the row of a class that has only one goes to training, since nothing could predict it.

    Parameters
    ----------
    X : pandas.DataFrame of shape (n, d)
        Features.
    y : pandas.Series of shape (n,)
        Labels or numbers of the same rows.
    task : {"classification", "regression"}
        Whether class shares are kept.
    test_size : float, default=0.25
        Share of rows that is held out, in (0, 1).
    random_state : int, default=0
        Same seed, same parts.

    Returns
    -------
    X_train, X_test, y_train, y_test : pandas objects
        With the rows' labels, in random order.

    Raises
    ------
    ParameterError
        If ``test_size`` is not in (0, 1).
    DataError
        If a part would be empty.

    Examples
    --------
    >>> from uq.data import load_dataset, split_rows
    >>> wine = load_dataset("wine")
    >>> X_train, X_test, y_train, y_test = split_rows(wine.X, wine.y, wine.task)
    >>> len(X_train), len(X_test)
    (133, 45)
    """
    import pandas as pd
    from sklearn.model_selection import train_test_split

    if not 0 < test_size < 1:
        raise ParameterError(f"split_rows: test_size must lie in (0, 1), got {test_size!r}.")
    positions = np.arange(len(y))
    only: np.ndarray = np.array([], dtype=int)
    strata = None
    if task == "classification":
        codes = pd.factorize(y)[0]
        sizes = np.bincount(codes)[codes]
        only, positions = positions[sizes == 1], positions[sizes > 1]
        n_classes = len(np.unique(codes[positions]))
        n_test = int(np.ceil(test_size * len(positions)))
        if n_classes <= min(n_test, len(positions) - n_test):
            strata = codes[positions]
    if len(positions) < 2:
        raise DataError(
            f"{len(y)} rows cannot be split into training and held-out rows"
            + (": no class has two rows." if len(only) else ".")
        )
    train, test = train_test_split(
        positions, test_size=test_size, random_state=random_state, stratify=strata
    )
    train = np.concatenate([train, only])
    return X.iloc[train], X.iloc[test], y.iloc[train], y.iloc[test]


# -- wording -------------------------------------------------------------------------------------


def suggest(name: str, known: Iterable[str]) -> str:
    """End a sentence about an unknown ``name``: with the names close to it, or else with all.

    Examples
    --------
    >>> from uq.data import suggest
    >>> "no column 'prize'" + suggest("prize", ["price", "year"])
    "no column 'prize'; did you mean 'price'?"
    """
    folded = {k.lower(): k for k in known}
    close = [folded[k] for k in get_close_matches(str(name).lower(), folded)]
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there are {_some(folded.values())}."


def _some(names: Iterable[Any], limit: int = 12) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

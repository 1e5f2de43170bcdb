"""Methods, models and tables that a command line names."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uq.cli.outputs import progress, show_warning
from uq.errors import DataError, UQError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from uq.data import Dataset

_GROUP_VALUES = 10  # distinct numbers that are groups as they are
_ODD_SHARE = 0.1  # of the values of a column: few enough to be slips among numbers


class UsageError(UQError):
    """The command line itself is wrong; nothing was started."""


def known_method(name: str) -> str:
    """Check the name of a method."""
    from uq.data import suggest
    from uq.models.registry import METHODS

    if name.lower() not in METHODS:
        raise UsageError(f"method {name!r} is unknown{suggest(name, METHODS)}")
    return name.lower()


def chosen_methods(text: str | None) -> list[str]:
    """Names that ``--methods`` stands for."""
    from uq.models.registry import METHODS, QUICK

    if text is None:
        return list(QUICK)
    names = list(METHODS) if text == "all" else [n.strip() for n in text.split(",") if n.strip()]
    if not names:
        raise UsageError("--methods names no method; see `uq methods`")
    return list(dict.fromkeys(map(known_method, names)))


def table_model(
    name: str, task: Any, settings: dict[str, Any], seed: int, *, bar: bool = False
) -> Any:
    """Build the estimator of a method, with the columns of a table encoded for it."""
    from uq.data import suggest
    from uq.models.registry import estimator_class
    from uq.models.table import TableModel

    estimator = estimator_class(name, task)()
    known = estimator.get_params(deep=False)
    for key in settings:
        if key not in known:
            raise UsageError(
                f"{type(estimator).__name__} has no parameter {key!r}{suggest(key, known)}"
            )
    shown = {"verbose": 1} if bar and "verbose" in known else {}
    return TableModel(estimator.set_params(**{"random_state": seed, **shown, **settings}))


def warm_up() -> None:
    """Pay what torch does once in a process before the clock of the first method runs."""
    import numpy as np

    from uq.models.map import MAPRegressor

    MAPRegressor(max_epochs=1, patience=None, random_state=0).fit(np.eye(4), np.arange(4.0))


def setting(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (equals and name.strip() and value.strip()):
        raise UsageError(f"--set takes NAME=VALUE, got {text!r}")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        # A bare word is text, so that the shell's quotes need no quotes around them.
        if value.strip().replace(":", "").replace("-", "").isidentifier():
            return name.strip(), value.strip()
    raise UsageError(f"--set {text}: the value is neither a Python literal nor a word")


def load_model(path: str) -> Any:
    """Load a model, with an error that says so where the file is data."""
    from uq.io import load

    if Path(path).suffix.lower() in (".csv", ".tsv", ".txt", ".parquet", ".pq"):
        raise DataError(f"{path} looks like data, not a model; the model comes first: MODEL DATA.")
    model = load(path)
    if not hasattr(model, "predict_distribution"):
        raise DataError(f"{path}: holds a {type(model).__name__}, which is not a model.")
    return model


def task_of(model: Any) -> Any:
    """Whether a model predicts classes or numbers."""
    from sklearn.base import is_classifier

    return "classification" if is_classifier(model) else "regression"


def labels_of(model: Any, y: pd.Series) -> np.ndarray:
    """Targets of a table as the model has them: text, numbers or truth values, as it was fitted."""
    import pandas as pd

    if task_of(model) != "classification":
        return y.to_numpy()
    kind = model.classes_.dtype.kind
    if kind in "UO":
        return y.astype(str).to_numpy()
    if kind == "b" and _is_text(y):
        truth = y.str.lower().map({"true": True, "false": False})
        return (truth if truth.notna().all() else y).to_numpy()
    # 01 is 1 to a model whose labels are numbers, though a file's labels stay as they are written.
    return (pd.to_numeric(y) if kind in "iuf" and _is_numbers(y) else y).to_numpy()


def target_of(args: argparse.Namespace) -> str | None:
    """Check that there is a target exactly where DATA is a file; a mistake in usage otherwise."""
    from uq.data import DATASETS

    if args.data in DATASETS and args.target is not None:
        raise UsageError(f"{args.data} is bundled with its target; leave --target out")
    if args.data not in DATASETS and args.target is None and Path(args.data).exists():
        raise UsageError(f"{args.data} is a file: name the column to predict with --target")
    target: str | None = args.target
    return target


def open_data(args: argparse.Namespace) -> Dataset:
    """Read DATA with its target, and tell of columns that may not be read as they were meant."""
    from uq.data import DATASETS, open_dataset

    data = open_dataset(args.data, target=target_of(args), task=args.task)
    if args.data in DATASETS:
        return data
    if args.task is None and data.task == "classification" and _is_numbers(data.y):
        progress(
            args,
            f"{data.y.nunique()} whole numbers in the target are taken as classes; "
            "--task regression predicts them as numbers",
        )
    for column in (data.X[name] for name in data.X):
        if text := _almost_numbers(column):
            show_warning(f"the column {column.name!r} is taken as text: {text}")
    if args.task is None and (text := _almost_numbers(data.y)):
        show_warning(f"the target {data.y.name!r} is taken as classes: {text}")
    if unique := [repr(name) for name in data.X if _is_unique_text(data.X[name])]:
        progress(
            args,
            f"{', '.join(unique)}: left out, as no text there occurs twice (names, keys, dates)",
        )
    return data


def _is_numbers(column: pd.Series) -> bool:
    """Whether all values are numbers, or labels that a file spells as numbers: 001, 2.00."""
    import pandas as pd

    return column.dtype.kind not in "bmM" and bool(
        pd.to_numeric(column, errors="coerce").notna().all()
    )


def _almost_numbers(column: pd.Series) -> str:
    """What keeps a column of text from being one of numbers, if it is little; "" otherwise."""
    import pandas as pd

    if not _is_text(column):
        return ""
    present = column.dropna()
    odd = pd.to_numeric(present, errors="coerce").isna()
    if not 0 < odd.sum() <= _ODD_SHARE * len(present):
        return ""
    first = int(odd.to_numpy().argmax())
    return (
        f"{len(present) - odd.sum()} of its {len(present)} values are numbers, but row "
        f"{present.index[first]} holds {present.iloc[first]!r}; leave such a cell empty if its "
        "number is missing"
    )


def _is_unique_text(column: pd.Series) -> bool:
    present = column.dropna()
    return _is_text(column) and len(present) > 1 and present.is_unique


def _is_text(column: pd.Series) -> bool:
    from pandas.api import types

    return types.infer_dtype(column, skipna=True) == "string"


def _features(source: str) -> pd.DataFrame:
    from uq.data import DATASETS, load_dataset, read_table

    return load_dataset(source).X if source in DATASETS else read_table(source)


def ood_rows(source: str | None, data: Dataset) -> pd.DataFrame | None:
    """Read the out-of-distribution rows, if there are any."""
    if source is None:
        return data.ood
    frame = _features(source)
    absent = [name for name in data.X.columns if name not in frame.columns]
    if absent:  # said before the fits rather than after the first
        raise DataError(f"{source}: there is no column {absent[0]!r}, which {data.name} has.")
    return frame


def group_columns(names: str | None, data: Dataset) -> pd.DataFrame | None:
    """Columns that group the rows; numbers of many values by quarters."""
    if names is None:
        return None
    import pandas as pd

    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    absent = [name for name in chosen if name not in data.X]
    if absent:
        raise DataError(
            f"--groups: {data.name} has no column {absent[0]!r}; it has "
            f"{', '.join(map(str, data.X.columns))}."
        )
    frame = data.X[chosen].copy()
    for name in chosen:
        if pd.api.types.is_numeric_dtype(frame[name]) and frame[name].nunique() > _GROUP_VALUES:
            frame[name] = pd.qcut(frame[name], 4, duplicates="drop", precision=3)
    return frame

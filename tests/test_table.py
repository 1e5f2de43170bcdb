from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from uq.errors import DataError, ParameterError
from uq.io import load
from uq.models.map import MAPClassifier, MAPRegressor
from uq.models.table import TableModel, TablePreprocessor

# `uq` may be tested from a checkout beside the data or elsewhere.
DATA = Path(os.environ.get("UQ_DATA", Path(__file__).parents[2] / "shared" / "data"))


def _classifier(**settings):
    return TableModel(MAPClassifier(max_epochs=2, random_state=0, **settings))


def _regressor(**settings):
    return TableModel(MAPRegressor(max_epochs=2, random_state=0, **settings))


def _mixed(n=60):
    """Each kind of column, with gaps, and labels that depend on them."""
    rng = np.random.default_rng(0)
    city = rng.choice(["Oslo", "Rome", "Lima"], n)
    table = pd.DataFrame(
        {
            "age": rng.integers(18, 90, n).astype(float),
            "city": city,
            "member": rng.choice([True, False], n),
            "size": pd.Categorical(rng.choice(["S", "M"], n)),
            "constant": 1.0,
        },
        index=[f"row{i}" for i in range(n)],
    )
    table.loc["row3", "age"] = np.nan
    table.loc[["row4", "row5"], "city"] = None
    return table, pd.Series(np.where(city == "Rome", "yes", "no"), index=table.index)


# -- preprocessor --------------------------------------------------------------------------------


# scikit-learn wants R² > 0.5 of a regressor, which takes more than the two epochs, and predictions
# of some rows to be equal to 1e-7 to those of all, which float32 cannot promise.
EXACT = {"estimator__max_epochs": 40, "estimator__precision": "64-true"}


@parametrize_with_checks([TablePreprocessor(), _classifier(), _regressor().set_params(**EXACT)])
def test_sklearn_checks(estimator, check):
    check(estimator)


def test_every_value_of_a_small_table():
    table = pd.DataFrame(
        {
            "age": [20.0, np.nan, 40.0, 60.0],
            "full": [1, 2, 3, 4],
            "city": ["Rome", None, "Rome", None],
            "member": [True, False, False, True],
        }
    )
    prepare = TablePreprocessor().fit(table)
    names = ["age", "full", "missingindicator_age", "city=Rome", "city=missing"]
    names += ["member=False", "member=True"]
    assert list(prepare.get_feature_names_out()) == names
    expected = [
        [20, 1, 0, 1, 0, 0, 1],
        [40, 2, 1, 0, 1, 1, 0],  # the median of 20, 40, 60
        [40, 3, 0, 1, 0, 1, 0],
        [60, 4, 0, 0, 1, 0, 1],
    ]
    out = prepare.transform(table)
    assert out.dtype == np.float64
    np.testing.assert_array_equal(out, expected)


def test_medians_do_not_depend_on_later_rows():
    prepare = TablePreprocessor().fit(pd.DataFrame({"a": [1.0, 3.0, np.nan], "b": [1.0, 2.0, 3.0]}))
    out = prepare.transform(pd.DataFrame({"a": [np.nan, 100.0], "b": [np.nan, 1.0]}))
    # b had no gap in training: filled with its median, without an indicator of its own.
    np.testing.assert_array_equal(out, [[2, 2, 1], [100, 1, 0]])


def test_rare_and_unseen_categories_have_no_column():
    table = pd.DataFrame({"c": ["a"] * 5 + ["b"] * 4 + ["d"] * 4 + ["once"]})
    assert TablePreprocessor().fit(table).categories_ == {"c": ["a", "b", "d"]}
    assert TablePreprocessor(max_categories=2).fit(table).categories_ == {"c": ["a", "b"]}
    assert "once" in TablePreprocessor(min_frequency=1).fit(table).categories_["c"]
    out = TablePreprocessor().fit(table).transform(pd.DataFrame({"c": ["once", "new", None, "d"]}))
    np.testing.assert_array_equal(out, [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]])


def test_a_category_is_the_same_whatever_type_the_file_gave_it():
    table = pd.DataFrame({"code": pd.Categorical([1, 2, 1, 2]), "flag": [True, False] * 2})
    prepare = TablePreprocessor().fit(table)
    expected = prepare.transform(table)
    for code, flag in (
        ([1.0, 2.0, 1.0, 2.0], ["True", "False"] * 2),
        (["1", "2", "1", "2"], pd.array([True, False] * 2, dtype="boolean")),
    ):
        again = pd.DataFrame({"code": code, "flag": flag})
        np.testing.assert_array_equal(prepare.transform(again), expected)


@pytest.mark.parametrize(
    "column",
    [
        pd.array([1, None, 3], dtype="Int64"),
        pd.array([1.0, None, 3.0], dtype="Float32"),
        np.array([1, None, 3.0], dtype=object),
        [1.0, np.nan, 3.0],
    ],
    ids=["Int64", "Float32", "object", "float"],
)
def test_numbers_of_every_dtype(column):
    out = TablePreprocessor().fit_transform(pd.DataFrame({"a": column}))
    np.testing.assert_array_equal(out, [[1, 0], [2, 1], [3, 0]])


def test_column_with_gaps_only_is_harmless():
    table = pd.DataFrame({"empty": [np.nan] * 3, "a": [1.0, 2.0, 3.0]})
    out = TablePreprocessor().fit_transform(table)
    np.testing.assert_array_equal(out, [[0, 1, 1], [0, 2, 1], [0, 3, 1]])


def test_columns_are_found_by_name_and_others_ignored():
    table, _ = _mixed()
    prepare = TablePreprocessor().fit(table)
    shuffled = table[table.columns[::-1]].assign(extra="ignored")
    np.testing.assert_array_equal(prepare.transform(shuffled), prepare.transform(table))


def test_array_columns_are_found_by_position():
    table = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    prepare = TablePreprocessor().fit(table)
    np.testing.assert_array_equal(prepare.transform(table.to_numpy()), table)
    with pytest.raises(DataError, match="X has 3 features, but TablePreprocessor is expecting 2"):
        prepare.transform(np.ones((2, 3)))


def test_transform_errors_name_the_column():
    table, _ = _mixed()
    prepare = TablePreprocessor().fit(table)
    with pytest.raises(DataError, match=r"1 of the 5 columns seen in training is missing: 'city'"):
        prepare.transform(table.drop(columns="city"))
    with pytest.raises(DataError, match=r"2 of the 5 columns .* are missing: 'age', 'city'"):
        prepare.transform(table.drop(columns=["age", "city"]))
    text = table.astype({"age": object})
    text.loc["row7", "age"] = "forty"
    with pytest.raises(DataError, match=r"'age' must hold finite numbers .*'forty' in row 'row7'"):
        prepare.transform(text)
    with pytest.raises(DataError, match=r"'age' .* got inf in row 'row0' \(60 such rows\)"):
        prepare.transform(table.assign(age=np.inf))


def test_text_that_parses_is_a_number():
    prepare = TablePreprocessor().fit(pd.DataFrame({"a": [1.0, 2.0]}))
    np.testing.assert_array_equal(
        prepare.transform(pd.DataFrame({"a": ["3.5", " 4"]})), [[3.5], [4]]
    )


def test_no_rows_give_no_rows():
    table, _ = _mixed()
    prepare = TablePreprocessor().fit(table)
    assert prepare.transform(table[:0]).shape == (0, len(prepare.get_feature_names_out()))


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pd.to_datetime(["2020-01-01", "2020-01-02"]), "datetime64"),
        (pd.to_timedelta([1, 2], unit="s"), "timedelta64"),
        (pd.period_range("2020", periods=2, freq="D"), "period"),
        ([[1], [2]], "mixed"),
        ([1j, 2j], "complex"),
    ],
    ids=["date", "duration", "period", "lists", "complex"],
)
def test_other_kinds_of_column_are_refused(column, kind):
    with pytest.raises(DataError, match=f"column 'when' holds {kind} values; turn them into"):
        TablePreprocessor().fit(pd.DataFrame({"when": column}))


def test_fit_errors():
    with pytest.raises(DataError, match="no column can be used"):
        TablePreprocessor().fit(pd.DataFrame({"name": ["Ada", "Bob"]}))
    with pytest.raises(DataError, match="two columns are called '1'"):
        TablePreprocessor().fit(pd.DataFrame([[1, 2]], columns=[1, "1"]))
    with pytest.raises(ParameterError, match="max_categories must be at least 1, got 0"):
        TablePreprocessor(max_categories=0).fit(pd.DataFrame({"a": [1.0]}))


def test_what_is_learned_is_plain():
    """Plain values are what uq.io can store without pickle."""

    def plain(value):
        if isinstance(value, dict):
            return all(plain(k) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return type(value) in (str, int, float)

    prepare = TablePreprocessor().fit(_mixed()[0])
    assert all(plain(value) for key, value in vars(prepare).items() if key.endswith("_"))


# -- model ---------------------------------------------------------------------------------------


def test_model_is_what_its_estimator_is():
    assert is_classifier(_classifier())
    assert is_regressor(_regressor())
    assert hasattr(_classifier(), "predict_proba")
    assert not hasattr(_classifier(), "predict_interval")
    assert not hasattr(_regressor(), "predict_proba")
    assert hasattr(_regressor(), "predict_quantiles")


def test_classifier_on_a_mixed_table():
    table, y = _mixed()
    model = TableModel(MAPClassifier(max_epochs=60, random_state=0)).fit(table, y)
    assert list(model.classes_) == ["no", "yes"]
    assert model.score(table, y) == 1.0  # the label is a function of the city
    probs = model.predict_proba(table)
    positions = (y == "yes").to_numpy().astype(int)
    by_hand = np.log(probs[np.arange(len(y)), positions]).mean()
    assert model.log_score(table, y) == pytest.approx(by_hand, abs=1e-6)
    dist = model.predict_distribution(table)
    assert dist.index.equals(table.index)
    assert list(dist.to_frame().columns) == ["no", "yes"]
    assert model.predict_distribution(table.iloc[2:3]).index.tolist() == ["row2"]


def test_regressor_on_a_mixed_table():
    table, _ = _mixed()
    y = table["age"].fillna(50) * 2
    model = _regressor().fit(table, y)
    dist = model.predict_distribution(table)
    np.testing.assert_allclose(model.predict(table), dist.mean.numpy())
    lower, upper = model.predict_interval(table, coverage=0.5)
    np.testing.assert_allclose(model.predict_quantiles(table, [0.25, 0.75]), [lower, upper])
    by_hand = dist.log_prob(torch.as_tensor(y.to_numpy())).mean()
    assert model.log_score(table, y) == pytest.approx(float(by_hand), abs=1e-6)


def test_fit_leaves_parameters_alone_and_repeats():
    table, y = _mixed()
    model = _classifier().fit(table, y)
    assert not hasattr(model.estimator, "classes_")
    np.testing.assert_array_equal(
        clone(model).fit(table, y).predict_proba(table), model.predict_proba(table)
    )
    assert model.get_params()["estimator__max_epochs"] == 2
    assert clone(model).set_params(estimator__max_epochs=3).estimator.max_epochs == 3


def test_settings_of_the_preprocessor():
    table, y = _mixed()
    model = TableModel(MAPClassifier(max_epochs=1), TablePreprocessor(max_categories=1))
    model.fit(table, y)
    assert all(len(names) == 1 for names in model.preprocessor_.categories_.values())


def test_model_selection_tools():
    table, y = _mixed()
    assert cross_val_score(_classifier(), table, y, cv=3).shape == (3,)
    search = GridSearchCV(_classifier(), {"estimator__lr": [1e-3, 1e-2]}, cv=2).fit(table, y)
    assert search.best_params_["estimator__lr"] in (1e-3, 1e-2)


def test_save_and_load_and_pickle(tmp_path):
    table, y = _mixed()
    model = _classifier().fit(table, y)
    model.save(tmp_path / "m.uq")
    for again in (load(tmp_path / "m.uq"), pickle.loads(pickle.dumps(model))):
        assert isinstance(again, TableModel)
        np.testing.assert_array_equal(again.predict_proba(table), model.predict_proba(table))
        np.testing.assert_array_equal(again.predict(table), model.predict(table))


@pytest.mark.parametrize(
    "y",
    [
        pd.Series([True, False] * 30),
        pd.Series(["a", "b"] * 30, dtype="category"),
        pd.Series(["a", "b"] * 30, dtype="string"),
        pd.array([0, 1] * 30, dtype="Int64"),
        ["a", "b"] * 30,
        [0.0, 1.0] * 30,
    ],
    ids=["bool", "category", "string", "Int64", "list", "float"],
)
def test_labels_of_every_dtype_come_back(y):
    table, _ = _mixed()
    model = _classifier().fit(table, y)
    assert model.classes_.tolist() == sorted(set(np.asarray(y).tolist()))
    assert model.classes_.dtype != object
    assert 0 <= model.score(table, y) <= 1


def test_unusable_targets():
    table, y = _mixed()
    with pytest.raises(DataError, match=r"y is missing in 1 of 60 rows \(first: row 'row9'\)"):
        _classifier().fit(table, y.mask(y.index == "row9"))
    with pytest.raises(DataError, match=r"y is missing in 60 of 60 rows \(first: row 0\)"):
        _regressor().fit(table, np.full((60, 2), np.nan))
    with pytest.raises(DataError, match=r"regressor needs numbers as y, got '(no|yes)'"):
        _regressor().fit(table, y)
    with pytest.raises(ValueError, match="class"):
        _classifier().fit(table, ["same"] * 60)
    with pytest.raises(NotFittedError, match="TableModel"):
        _classifier().save("never-written.uq")
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        _classifier().fit(table, y[:-1])


def test_penguins_with_their_gaps():
    path = DATA / "small" / "penguins.csv"
    if not path.exists():
        pytest.skip(f"{path} is absent; set UQ_DATA to the folder that holds small/penguins.csv")
    from uq.data import open_dataset, split_rows

    data = open_dataset(str(path), target="species")
    assert data.task == "classification"
    X_train, X_test, y_train, y_test = split_rows(data.X, data.y, data.task)
    model = TableModel(MAPClassifier(max_epochs=30, random_state=0)).fit(X_train, y_train)
    assert model.preprocessor_.categories_["sex"] == ["female", "male", "missing"]
    # The species differ plainly in their measurements; the largest is 44 % of the rows.
    assert model.score(X_test, y_test) > 0.9

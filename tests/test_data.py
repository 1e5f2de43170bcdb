from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import NearestNeighbors

from uq.cli import main
from uq.data import (
    DATASETS,
    infer_task,
    load_dataset,
    open_dataset,
    read_table,
    split_rows,
    split_target,
)
from uq.errors import DataError, ParameterError

# -- bundled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_every_bundled_data_set_is_complete_and_repeatable(name):
    data, again = load_dataset(name), load_dataset(name)
    pd.testing.assert_frame_equal(data.X, again.X)
    pd.testing.assert_series_equal(data.y, again.y)
    assert data.X.index.equals(data.y.index)
    assert data.y.name not in data.X.columns
    assert np.isfinite(data.X.to_numpy()).all()
    assert infer_task(data.y) == data.task
    assert data.description
    if data.ood is not None:
        pd.testing.assert_frame_equal(data.ood, again.ood)
        assert list(data.ood.columns) == list(data.X.columns)
        assert data.ood_name


def test_sizes_are_those_of_the_sources():
    shapes = {name: load_dataset(name).X.shape for name in ("digits", "breast_cancer", "wine")}
    assert shapes == {"digits": (1797, 64), "breast_cancer": (569, 30), "wine": (178, 13)}
    diabetes = load_dataset("diabetes")
    assert diabetes.X["age"].between(19, 79).all()  # years, not scikit-learn's scaled values
    assert diabetes.y.min() == 25
    assert diabetes.y.max() == 346
    assert set(load_dataset("breast_cancer").y) == {"malignant", "benign"}


def test_sine_has_the_stated_mean_and_noise():
    data = load_dataset("sine")
    x = data.X["x"].to_numpy()
    assert (np.abs(x) >= 1).all()
    assert (np.abs(x) <= 3).all()
    np.testing.assert_allclose(data.noise_std, 0.05 + 0.1 * np.abs(x))
    z = (data.y.to_numpy() - np.sin(2 * x)) / data.noise_std
    # z ~ N(0, 1): 5 standard errors of the mean (1/√n) and of the mean square (√(2/n)).
    assert abs(z.mean()) < 5 / np.sqrt(len(z))
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / len(z))


def test_ood_rows_lie_away_from_the_data():
    x = load_dataset("sine").ood["x"].abs()
    assert ((x <= 0.6) | (x >= 3.5)).all()
    assert (x <= 0.6).sum() == 100

    moons = load_dataset("moons")
    nearest = NearestNeighbors(n_neighbors=1).fit(moons.X)
    assert nearest.kneighbors(moons.ood)[0].min() > 0.5

    patches = load_dataset("digits").ood.to_numpy()
    assert (patches.min(axis=1) == 0).all()
    assert (patches.max(axis=1) == 16).all()
    assert (patches == np.rint(patches)).all()
    assert len(np.unique(patches, axis=0)) == len(patches)


def test_unknown_name_suggests_the_close_one():
    with pytest.raises(DataError, match="did you mean 'digits'"):
        load_dataset("digit")
    with pytest.raises(DataError, match="there are digits, breast_cancer"):
        load_dataset("zzz")


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("comma.csv", "a,b,c\n1,x,0.5\n2,y,1.5\n"),
        ("semicolon.csv", "a;b;c\n1;x;0.5\n2;y;1.5\n"),
        ("decimal_comma.csv", "a;b;c\n1;x;0,5\n2;y;1,5\n"),
        ("tab.tsv", "a\tb\tc\n1\tx\t0.5\n2\ty\t1.5\n"),
        ("bar.txt", "a|b|c\n1|x|0.5\n2|y|1.5\n"),
        ("spaces.csv", "a, b, c\n1, x, 0.5\n2, y, 1.5\n"),
        ("bom.csv", "\ufeffa,b,c\n1,x,0.5\n2,y,1.5\n"),
        ("windows.csv", "a,b,c\r\n1,x,0.5\r\n2,y,1.5\r\n"),
    ],
)
def test_separators_are_found(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    table = read_table(tmp_path / name)
    assert table.to_dict("list") == {"a": [1, 2], "b": ["x", "y"], "c": [0.5, 1.5]}


def test_index_column_gzip_and_parquet_come_back_as_written(tmp_path):
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}, index=["first", "second"])
    table.to_csv(tmp_path / "t.csv")
    table.to_csv(tmp_path / "t.csv.gz")
    table.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.csv.gz", "t.parquet"):
        pd.testing.assert_frame_equal(read_table(tmp_path / name), table)


def test_one_column_without_any_separator(tmp_path):
    (tmp_path / "one.csv").write_text("value\n1\n2\n")
    assert read_table(tmp_path / "one.csv")["value"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "is empty"),
        ("blank.csv", b"\n\n", "is empty"),
        ("header.csv", b"a,b\n", "no rows"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("long.csv", b"a,b\n1,2,3\n4,5,6\n", "more cells than the header"),
        ("quote.csv", b'a,b\n"1,2\n', "EOF inside string"),
        ("latin.csv", "a,b\nä,2\n".encode("latin-1"), "not UTF-8"),
        ("binary.csv", bytes(range(256)) * 4, "not UTF-8"),
        ("notgzip.csv.gz", b"a,b\n1,2\n", "[Nn]ot a gzipped file"),
        ("cut.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 100, mtime=0)[:-12], "cannot be read"),
        ("empty.parquet", b"", "is empty"),
        ("damaged.parquet", b"PAR1 but nothing else", "cannot be read"),
        ("table.xlsx", b"PK", "'.xlsx' is unknown; a table is read from .csv"),
        ("table", b"a,b\n", "no suffix"),
    ],
)
def test_unusable_file_gives_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_table(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"nope\.csv: there is no such file"):
        read_table(tmp_path / "nope.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="directory"):
        read_table(tmp_path / "folder.csv")


# -- target and task -----------------------------------------------------------------------------


def test_split_target_errors_name_the_column():
    table = pd.DataFrame({"price": [1.0, np.nan], "Year": [1, 2]}, index=["r1", "r2"])
    with pytest.raises(DataError, match="no column 'prize'; did you mean 'price'"):
        split_target(table, "prize")
    with pytest.raises(DataError, match="did you mean 'Year'"):
        split_target(table, "year")
    with pytest.raises(DataError, match=r"'price' is missing in 1 of 2 rows \(first: row r2\)"):
        split_target(table, "price")
    with pytest.raises(DataError, match="no column besides the target"):
        split_target(table[["Year"]], "Year")


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (["a", "b"], "classification"),
        ([True, False], "classification"),
        (pd.Categorical([1.5, 2.5]), "classification"),
        ([0, 1] * 5, "classification"),
        ([0.0, 1.0, np.nan] * 5, "classification"),
        (list(range(20)) * 2, "classification"),
        (list(range(21)) * 2, "regression"),
        (list(range(10)), "regression"),  # whole numbers that hardly ever repeat
        ([0.5, 1.0] * 5, "regression"),
        (pd.array([0, 1, None] * 5, dtype="Int64"), "classification"),
    ],
)
def test_infer_task(values, task):
    assert infer_task(pd.Series(values)) == task


def test_infer_task_refuses_dates():
    with pytest.raises(DataError, match="'when' holds dates"):
        infer_task(pd.Series(pd.to_datetime(["2020-01-01"]), name="when"))


def test_open_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("houses.csv").write_text("size,price\n" + "".join(f"{i},{i + 0.5}\n" for i in range(9)))
    data = open_dataset("houses.csv", target="price")
    assert (data.name, data.task, list(data.X)) == ("houses", "regression", ["size"])
    assert open_dataset("moons").name == "moons"
    with pytest.raises(ParameterError, match="name the column to predict; there are size, price"):
        open_dataset("houses.csv")
    with pytest.raises(ParameterError, match="bundled with its target"):
        open_dataset("moons", target="moon")
    with pytest.raises(ParameterError, match="not regression"):
        open_dataset("moons", task="regression")
    with pytest.raises(DataError, match=r"neither a file nor a bundled .* did you mean 'moons'"):
        open_dataset("moon")


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        (["001", "002"], ["001", "002"]),
        (["true", "false"], ["true", "false"]),
        (["+1", "-1"], ["+1", "-1"]),
        (["0.50", "2"], ["0.50", "2"]),
        # These come back from the numbers, too.
        (["1", "-2"], [1, -2]),
        (["1.0", "2.5"], [1.0, 2.5]),
        (["True", "False"], [True, False]),
        # Two spellings of one value are one label.
        (["1", "1.0"], [1.0, 1.0]),
        (["true", "True"], [True, True]),
    ],
)
@pytest.mark.parametrize("index", ["", "row,"])
def test_labels_of_a_csv_file_are_those_written(tmp_path, written, labels, index):
    path = tmp_path / "labels.csv"
    rows = [f"{'' if not index else f'r{i},'}{i},{written[i % 2]},7" for i in range(6)]
    header = index.replace("row", "") + "x,y,z"
    path.write_text("\n".join([header, *rows[:2], "", *rows[2:]]) + "\n")
    data = open_dataset(str(path), target="y", task="classification")
    assert data.y.tolist() == labels * 3
    assert data.y.name == "y"
    assert data.y.index.equals(data.X.index)
    if written[0] != "0.50":
        assert open_dataset(str(path), target="y").y.tolist() == labels * 3


def test_numbers_to_predict_stay_numbers(tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text("x,y\n" + "".join(f"{i},{i:03}\n" for i in range(9)))
    assert open_dataset(str(path), target="y").y.tolist() == list(range(9))


def test_labels_pass_through_the_command_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = np.where(np.arange(60) % 2, 3, -3) + rng.normal(size=60)
    frame = pd.DataFrame({"x": x, "site": np.where(np.arange(60) % 2, "010", "9")})
    frame.to_csv("sites.csv", index=False)
    fit = ["fit", "sites.csv", "--target", "site", "--method", "map", "--out", "m.uq"]
    assert main([*fit, "--set", "max_epochs=100", "--set", "patience=None"]) == 0
    assert main(["predict", "m.uq", "sites.csv", "--out", "p.csv"]) == 0
    found = pd.read_csv("p.csv", dtype=str)
    assert (found["label"] == frame["site"]).all()
    assert {"p_010", "p_9"} < set(found)
    # A file that happens to hold the label 9 alone.
    frame[frame["site"] == "9"].to_csv("nine.csv", index=False)
    assert main(["report", "m.uq", "nine.csv", "--target", "site", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert printed["methods"]["m"]["estimates"]["accuracy"]["value"] == 1


# -- split ---------------------------------------------------------------------------------------


def test_split_rows_partitions_and_keeps_class_shares():
    X = pd.DataFrame({"x": range(100)})
    y = pd.Series(["rare"] * 8 + ["common"] * 92)
    X_train, X_test, y_train, y_test = split_rows(X, y, "classification", random_state=3)
    assert sorted([*X_train["x"], *X_test["x"]]) == list(range(100))
    assert X_train.index.equals(y_train.index)
    assert X_test.index.equals(y_test.index)
    assert (y_test == "rare").sum() == 2
    assert len(y_test) == 25
    again = split_rows(X, y, "classification", random_state=3)[1]
    assert again.index.equals(X_test.index)
    assert not split_rows(X, y, "classification", random_state=4)[1].index.equals(X_test.index)


def test_a_class_of_one_row_is_trained_on():
    y = pd.Series(["a"] * 10 + ["b"] * 10 + ["typo"])
    X = pd.DataFrame({"x": range(21)})
    for seed in range(5):
        *_, y_train, y_test = split_rows(X, y, "classification", random_state=seed)
        assert "typo" in set(y_train)
        assert set(y_test) == {"a", "b"}


def test_split_rows_with_more_classes_than_held_out_rows():
    y = pd.Series([0, 0, 1, 1, 2, 2, 3, 3])
    parts = split_rows(pd.DataFrame({"x": range(8)}), y, "classification")
    assert [len(part) for part in parts] == [6, 2, 6, 2]


def test_split_rows_errors():
    X, y = pd.DataFrame({"x": [1, 2]}), pd.Series(["a", "b"])
    with pytest.raises(DataError, match="no class has two rows"):
        split_rows(X, y, "classification")
    with pytest.raises(DataError, match="1 rows cannot be split"):
        split_rows(X[:1], pd.Series([0.5]), "regression")
    with pytest.raises(ParameterError, match=r"test_size must lie in \(0, 1\)"):
        split_rows(X, y, "regression", test_size=1.5)

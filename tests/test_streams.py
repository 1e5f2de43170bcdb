"""Rows read in chunks: the same rows as a table in memory, in any order, in bounded memory."""

import gzip

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import uq
from uq.errors import DataError, ParameterError
from uq.inference.data import ChunkBatches
from uq.models import base
from uq.models.table import TablePreprocessor
from uq.streams import RowChunks, TableStream, array_chunks


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    n = 1003
    frame = pd.DataFrame(
        {
            "age": rng.integers(18, 90, n).astype(float),
            "city": rng.choice(["Rome", "Oslo", "Lima"], n),
            "income": rng.lognormal(size=n),
        }
    )
    frame.loc[::17, "age"] = np.nan
    frame["bought"] = np.where(frame.income + rng.normal(size=n) > 1.5, "yes", "no")
    return frame


def write(frame, folder, kind):
    path = folder / ("t." + kind)
    if kind == "parquet":
        frame.to_parquet(path, row_group_size=170)
    elif kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "csv.gz":
        with gzip.open(path, "wt") as file:
            frame.to_csv(file, index=False)
    else:
        path = folder / "parts"
        path.mkdir()
        frame[:600].to_parquet(path / "a.parquet", row_group_size=170)
        frame[600:].to_parquet(path / "b.parquet")
    return path


KINDS = ("parquet", "csv", "csv.gz", "folder")


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunks_are_the_table(table, tmp_path, kind):
    stream = TableStream(write(table, tmp_path, kind), chunk_rows=100)
    parts = list(stream.frames())
    assert max(map(len, parts)) <= 100
    pd.testing.assert_frame_equal(pd.concat(parts), table, check_dtype=False)
    picked = pd.concat(stream.frames(columns=["income"], order=np.random.default_rng(0)))
    assert list(picked) == ["income"]
    assert sorted(picked.income) == pytest.approx(sorted(table.income))


@pytest.mark.parametrize("kind", KINDS)
def test_the_preprocessor_learns_the_same_from_a_stream(table, tmp_path, kind):
    whole = TablePreprocessor().fit(table.drop(columns="bought"))
    chunks = TablePreprocessor().fit(
        TableStream(write(table, tmp_path, kind), "bought", chunk_rows=100)
    )
    for name in ("columns_", "medians_", "gaps_", "categories_", "n_features_in_"):
        assert getattr(chunks, name) == getattr(whole, name), name


def test_the_median_of_many_rows_is_that_of_a_sample(monkeypatch):
    from uq.models import table as module

    monkeypatch.setattr(module, "_MEDIAN_ROWS", 4000)
    column = module._Column()
    values = np.random.default_rng(1).normal(size=100_000)
    values.sort()  # the worst order: each chunk lies beyond the one before
    for part in np.split(values, 100):
        column.add(pd.Series(part))
    # The median of n Normal values has standard error sqrt(π / 2n).
    assert abs(column.median()) < 4 * np.sqrt(np.pi / 2 / 4000)


@pytest.mark.parametrize("method", ["map", "vbll", "ivon", "evidential", "ssvi", "ensemble"])
def test_fit_from_a_file_learns_what_fit_from_memory_learns(table, tmp_path, method):
    from uq.models.registry import estimator_class

    few = {"n_members": 2} if method == "ensemble" else {}
    model = estimator_class(method, "classification")(
        hidden=(16,), max_epochs=8, patience=None, random_state=0, lr=0.02, **few
    )
    stream = TableStream(write(table, tmp_path, "parquet"), "bought", chunk_rows=250)
    streamed = uq.TableModel(model).fit(stream)
    X, y = table.drop(columns="bought"), table.bought
    direct = uq.TableModel(model).fit(X, y)
    assert streamed.estimator_.x_mean_ == pytest.approx(direct.estimator_.x_mean_, rel=1e-6)
    assert list(streamed.classes_) == ["no", "yes"]
    again = uq.TableModel(model).fit(stream)
    assert (again.predict_proba(X) == streamed.predict_proba(X)).all()
    # Another order of the rows is another path of the optimizer, to a model that is as good: to
    # within three standard errors of what the score of these rows is known by.
    codes = torch.tensor((y == "yes").to_numpy()).long()
    one, other = (m.predict_distribution(X).log_prob(codes) for m in (streamed, direct))
    assert abs(one.mean() - other.mean()) < 3 * other.std() / len(y) ** 0.5
    whole = streamed.predict_distribution(X).probs
    parts = list(streamed.predict_batches(TableStream(stream.path, chunk_rows=300), 200))
    assert [len(p.probs) for p in parts] == [170] * 5 + [153]  # row groups, cut further
    assert torch.cat([p.probs for p in parts]) == pytest.approx(whole, abs=1e-6)
    assert list(np.concatenate([p.index for p in parts])) == list(range(1003))


def numbers(n, d=3):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, d))
    return X, X[:, 0] + 0.1 * rng.normal(size=n)


@pytest.mark.parametrize("n", [2, 3, 63, 64, 65, 128, 129, 1000, 1001])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_a_pass_gives_each_row_once(n, size):
    X = np.arange(n, dtype=float)[:, None]
    batches = ChunkBatches(
        array_chunks(X, X[:, 0], 50), lambda a, b: (torch.tensor(a),), n, size, seed=1
    )
    passes = [[t[:, 0].tolist() for (t,) in batches] for _ in range(2)]
    for one in passes:
        assert len(one) == len(batches)
        assert sorted(row for batch in one for row in batch) == list(range(n))
        assert all(len(b) == min(size, n) for b in one[:-1])
        assert n == 1 or size == 1 or len(one[-1]) > 1  # BatchNorm
    assert n < 10 or passes[0] != passes[1]


def test_a_pass_mixes_rows_well():
    """Neighbours of the file are no nearer in a pass than four chunks allow."""
    X = np.arange(10_000.0)[:, None]
    order = [
        a
        for part, _ in array_chunks(X, X[:, 0], 500).shuffled(np.random.default_rng(0))
        for a in part[:, 0]
    ]
    # Of 20 chunks the first fifth of a pass holds 4 at random, in random order.
    first = np.array(order[:2000])
    assert len(np.unique(first // 500)) == 4
    assert abs(np.corrcoef(np.arange(2000), first)[0, 1]) < 4 / np.sqrt(2000)


def test_a_large_memory_map_stays_on_the_disk(tmp_path, monkeypatch):
    X, y = numbers(2000)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    small = uq.MAPRegressor(max_epochs=3, random_state=0).fit(mapped, y)
    direct = uq.MAPRegressor(max_epochs=3, random_state=0).fit(X, y)
    assert (small.predict(X) == direct.predict(X)).all()
    monkeypatch.setattr(base, "_LARGE_BYTES", 1000)
    model = uq.MAPRegressor(max_epochs=20, random_state=0).fit(mapped, y)
    assert model.score(X, y) > 0.95
    parts = np.concatenate([d.mean for d in model.predict_batches(mapped, 300)])
    assert parts == pytest.approx(model.predict(X), abs=1e-6)


class Rows(IterableDataset):
    def __init__(self, X, y):
        self.X, self.y = torch.tensor(X).float(), torch.tensor(y).float()

    def __iter__(self):
        return zip(self.X, self.y, strict=True)


def test_an_iterable_dataset_comes_as_it_is():
    X, y = numbers(500)
    model = uq.MAPRegressor(max_epochs=40, random_state=0).fit(Rows(X, y))
    loader = DataLoader(Rows(X, y), 64)
    same = uq.MAPRegressor(max_epochs=40, random_state=0).fit(loader)
    assert (model.predict(X) == same.predict(X)).all()
    assert model.score(X, y) > 0.95
    inputs = DataLoader(torch.tensor(X).float(), 128)
    assert [len(d.mean) for d in model.predict_batches(inputs)] == [128, 128, 128, 116]


def test_polars_frames(table):
    polars = pytest.importorskip("polars")
    X, y = table.drop(columns="bought"), table.bought
    model = uq.TableModel(uq.MAPClassifier(max_epochs=2, random_state=0))
    expected = model.fit(X, y).predict_proba(X)
    other = polars.from_pandas(X)
    assert (model.fit(other, y).predict_proba(other) == expected).all()


def test_what_is_refused(table, tmp_path):
    path = write(table, tmp_path, "parquet")
    model = uq.TableModel(uq.MAPClassifier())
    with pytest.raises(DataError, match="no column 'bougt'; did you mean 'bought'"):
        TableStream(path, "bougt")
    with pytest.raises(DataError, match="brings its target"):
        model.fit(TableStream(path))
    with pytest.raises(DataError, match="brings its target"):
        model.fit(TableStream(path, "bought"), table.bought)
    for wrong in (0, 1, 2.5, "many"):
        with pytest.raises(ParameterError, match="chunk_rows"):
            TableStream(path, chunk_rows=wrong)
    with pytest.raises(DataError, match="no such file"):
        list(TableStream(tmp_path / "none.csv").frames())
    with pytest.raises(DataError, match="suffix"):
        TableStream(tmp_path / "t.xlsx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.parquet file"):
        list(TableStream(tmp_path / "empty").frames())
    damaged = tmp_path / "d.parquet"
    damaged.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="cannot be read"):
        list(TableStream(damaged).frames())
    gap = write(table.assign(bought=table.bought.where(table.index != 700)), tmp_path, "csv")
    with pytest.raises(DataError, match="'bought' is missing in 1 of"):
        model.fit(TableStream(gap, "bought", chunk_rows=100))
    fitted = uq.MAPRegressor(max_epochs=1).fit(*numbers(50))
    with pytest.raises(ParameterError, match="batch_rows"):
        list(fitted.predict_batches(numbers(50)[0], 0))


def test_a_stream_that_changes_between_passes_is_told():
    X, y = numbers(300)
    passes = []

    def read(order):
        passes.append(order)
        n = 300 if len(passes) == 1 else 200
        yield X[:n], y[:n]

    with pytest.raises(DataError, match="same rows"):
        uq.MAPRegressor(max_epochs=3, random_state=0).fit(RowChunks(read))

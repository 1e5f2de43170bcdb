"""Cases that once went wrong, or that users bring: odd data, odd modules, odd orders of calls."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import uq
from uq.errors import DataError, ParameterError
from uq.models.base import Estimator
from uq.models.registry import estimator_class


def line(n=60, seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 3))
    return X, X[:, 0] + noise * rng.normal(size=n)


def labels(y):
    return (y > 0).astype(int)


@pytest.mark.statistical
@pytest.mark.parametrize("n", [200, 2000])
def test_ivon_learns_easy_regression_from_any_seed(n):
    """Noise scale and mean must not drive each other off: RMSE stays near the noise's 0.1."""
    for seed in range(10):
        X, y = line(n, seed)
        model = uq.IVONRegressor(random_state=seed, max_epochs=max(20, 20_000 // n)).fit(X, y)
        Xt, yt = line(500, seed + 100)
        dist = model.predict_distribution(Xt)
        assert np.sqrt(((dist.mean.numpy() - yt) ** 2).mean()) < 0.3
        assert float(dist.stddev.mean()) < 0.5


def test_ensemble_members_differ_from_a_module_instance():
    X, y = line()
    net = nn.Sequential(nn.Linear(3, 16), nn.ELU(), nn.Linear(16, 1))
    model = uq.EnsembleRegressor(module=net, max_epochs=5, batch_size=None, random_state=0)
    assert (model.fit(X, y).predict_distribution(X).epistemic > 1e-4).all()
    shared = nn.Linear(3, 1)
    with pytest.raises(ParameterError, match="same initial weights"):
        uq.EnsembleRegressor(module=lambda d_in, d_out: shared, max_epochs=1).fit(X, y)


def test_weights_are_normalised_over_the_rows_trained_on():
    X, y = line()
    weight = np.ones(60)
    weight[:6] = 100.0
    seen = []

    class Spy(uq.MAPRegressor):
        def _infer(self, data):
            seen.append(data)
            return super()._infer(data)

    Spy(max_epochs=1, random_state=0).fit(X, y, sample_weight=weight)
    (data,) = seen
    kept = torch.cat([b[2] for b in data.batches])
    assert float(kept.mean()) == pytest.approx(1.0)
    held = data.held_out[2]
    scale = kept.min() if kept.min() > 0 else 1
    assert data.n_effective == pytest.approx(float(kept.sum() / scale), rel=1e-5)
    assert set(np.unique(np.round((held / scale).numpy()))) <= {1.0, 100.0}


def test_held_out_rows_do_not_set_the_scale():
    X, y = line()
    arrays = uq.MAPRegressor(max_epochs=1, random_state=0).fit(X, y)
    source = TensorDataset(torch.tensor(X), torch.tensor(y))
    stream = uq.MAPRegressor(max_epochs=1, random_state=0).fit(source)
    np.testing.assert_allclose(stream.x_mean_, arrays.x_mean_, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(stream.y_scale_, arrays.y_scale_, rtol=1e-9)
    assert not np.allclose(arrays.x_mean_, X.mean(0))


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(1, 4, batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.rnn(x.unsqueeze(-1))[0][:, -1])


def test_recurrent_modules_predict():
    X, y = line()
    model = uq.IVONRegressor(module=LSTM(), max_epochs=1, n_samples=3, random_state=0).fit(X, y)
    assert model.predict_distribution(X[:4]).n_draws == 3


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))


@pytest.mark.filterwarnings("ignore:IVONRegressor. module holds BatchNorm1d, Dropout")
@pytest.mark.parametrize("kind", [uq.MAPRegressor, uq.IVONRegressor, uq.EnsembleRegressor])
def test_batch_norm_with_one_row_left_over(kind):
    X, y = line(33)
    model = kind(module=Normed(), batch_size=16, max_epochs=2, patience=None, random_state=0)
    np.testing.assert_allclose(model.fit(X, y).predict(X[:1]), model.predict(X)[:1], rtol=1e-4)


def test_frozen_and_tied_parameters():
    X, y = line()
    net = nn.Sequential(nn.Linear(3, 3), nn.ELU(), nn.Linear(3, 3), nn.Linear(3, 1))
    net[2].weight = net[0].weight
    net[3].requires_grad_(False)
    before = net[3].weight.clone()
    model = uq.IVONRegressor(module=net, max_epochs=2, random_state=0).fit(X, y)
    assert torch.equal(model.posterior_.network.body[3].weight, before)
    assert (model.predict_distribution(X).epistemic > 0).all()


@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("method", ["map", "vbll", "ivon", "ensemble"])
def test_very_few_rows(method, n):
    X, y = line(n)
    for model, target in (
        (estimator_class(method, "regression"), y),
        (estimator_class(method, "classification"), np.arange(n) % 2),
    ):
        fitted = model(max_epochs=2, random_state=0).fit(X, target)
        assert np.isfinite(fitted.log_score(X, target))
        source = TensorDataset(torch.tensor(X), torch.tensor(target))
        assert np.isfinite(model(max_epochs=2, random_state=0).fit(source).log_score(X, target))


def test_rare_class_is_trained_on():
    X, y = line()
    for seed in range(5):
        target = labels(y)
        target[seed] = 2
        model = uq.MAPClassifier(max_epochs=1, random_state=seed).fit(X, target)
        assert list(model.classes_) == [0, 1, 2]
        source = TensorDataset(torch.tensor(X), torch.tensor(target))
        uq.MAPClassifier(max_epochs=1, random_state=seed).fit(source)


@pytest.mark.parametrize(
    ("X", "y"),
    [
        (np.ones((20, 2)), np.linspace(0, 1, 20)),
        (np.linspace(0, 1, 20)[:, None], np.full(20, 3.0)),
        (1e8 * np.linspace(1, 2, 20)[:, None], 1e-8 * np.linspace(0, 1, 20)),
        (np.linspace(0, 1, 20)[:, None].astype(np.float16), np.arange(20)),
        (np.arange(20)[:, None] % 2 == 0, np.arange(20) % 3),
    ],
    ids=["constant X", "constant y", "scales", "float16", "bool"],
)
@pytest.mark.parametrize("hidden", [(), (8,)])
def test_odd_data(X, y, hidden):
    for kind in (uq.MAPRegressor, uq.VBLLRegressor, uq.IVONRegressor):
        model = kind(hidden=hidden, max_epochs=3, random_state=0).fit(X, y)
        dist = model.predict_distribution(X)
        assert dist.mean.isfinite().all()
        assert (dist.stddev > 0).all()


def test_values_out_of_range_at_prediction():
    X, y = line()
    for kind in (uq.MAPRegressor, uq.IVONRegressor):
        with pytest.raises(DataError, match="beyond the range"):
            kind(max_epochs=1, random_state=0).fit(X, y).predict([[1e300] * 3])
    with pytest.raises(DataError, match="1e150"):
        uq.MAPRegressor(max_epochs=1).fit(X, 1e200 * y)
    with pytest.raises(DataError, match="numbers"):
        uq.MAPRegressor(max_epochs=1).fit(X, np.array(["a"] * 60))


def test_parameters_set_after_the_fit_do_not_break_it(tmp_path):
    X, y = line()
    model = uq.IVONRegressor(hidden=(8,), max_epochs=2, random_state=0).fit(X, y)
    expected = model.predict(X)
    model.set_params(hidden=(3,), precision="64-true", noise="heteroscedastic")
    np.testing.assert_array_equal(model.predict(X), expected)
    model.save(tmp_path / "m.uq")
    loaded = uq.load(tmp_path / "m.uq")
    np.testing.assert_array_equal(loaded.predict(X), expected)
    assert loaded.hidden == (8,)
    with pytest.raises(ParameterError, match="n_samples"):
        model.set_params(n_samples=0).predict(X)
    with pytest.raises(ParameterError, match="n must be"):
        model.sample_functions(X, 0)


class Pairs(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.item(i)


class Endless(IterableDataset):
    def __iter__(self):
        for i in range(20):
            yield torch.full((3,), float(i)), i % 2


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda i: {"x": torch.ones(3)}, "pairs"),
        (lambda i: (torch.ones(3), "label"), "pairs"),
        (lambda i: torch.ones(3), "pairs"),
        (lambda i: (torch.full((3,), np.nan), i % 2), "NaN"),
        (lambda i: (torch.ones(3), i * 0.37), "continuous"),
        (lambda i: (torch.ones(3, 2), i % 2), "module="),
    ],
)
def test_bad_datasets(item, message):
    with pytest.raises(ValueError, match=message):
        uq.MAPClassifier(max_epochs=1).fit(Pairs(item))


def test_iterable_dataset_in_batches_of_a_loader():
    model = uq.MAPClassifier(max_epochs=2, random_state=0).fit(DataLoader(Endless(), 8))
    assert model.n_features_in_ == 3


@pytest.mark.parametrize(
    "bad", [{"lr": np.inf}, {"device": None}, {"callbacks": (3,)}, {"verbose": "x"}]
)
def test_more_bad_arguments(bad):
    X, y = line()
    with pytest.raises(ParameterError, match=next(iter(bad))):
        uq.MAPRegressor(**bad).fit(X, y)


def test_wide_dense_last_layer_is_refused():
    X, y = line()
    with pytest.raises(ParameterError, match="diagonal"):
        uq.VBLLRegressor(hidden=(9000,), max_epochs=1).fit(X, y)


def test_template_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Estimator()

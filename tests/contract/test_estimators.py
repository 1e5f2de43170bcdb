"""The contract of uq on every estimator of the registry."""

import copy
import pickle

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import TransformedTargetRegressor
from sklearn.datasets import load_diabetes, load_wine
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, TensorDataset

import uq
from tests.contract.estimators import (
    CASES,
    CLASSIFIERS,
    COMPILED,
    CONSTANT_NOISE,
    FEATURES,
    REGRESSORS,
    SEEDLESS,
    SINGLE,
    make,
)

every = pytest.mark.parametrize(("method", "task"), CASES)
every_compiled = pytest.mark.parametrize(("method", "task"), COMPILED)
classifier = pytest.mark.parametrize(("method", "task"), CLASSIFIERS)
regressor = pytest.mark.parametrize(("method", "task"), REGRESSORS)


def data(task):
    load = load_wine if task == "classification" else load_diabetes
    X, y = load(return_X_y=True)
    return X[::3], y[::3]


def output(model, X):
    """Everything that a prediction holds, as one array."""
    dist = model.predict_distribution(X)
    if hasattr(dist, "borders"):  # bars: one column a row
        bars = torch.cat([dist.logits.expand(*dist.borders.shape[:-1], -1), dist.borders], -1)
        return bars.movedim(-1, 0).numpy()
    if hasattr(dist, "logits"):
        return dist.logits.numpy()
    if hasattr(dist, "concentration"):
        return dist.concentration[None].numpy()
    if hasattr(dist, "base"):
        parameters = [getattr(dist.base, name) for name in sorted(dist.base.arg_constraints)]
        return np.stack([t.numpy() for t in parameters])
    return np.stack([dist.loc.numpy(), dist.scale.numpy()])


@every
def test_predictions_are_pyro_distributions_of_the_right_shape(method, task):
    X, y = data(task)
    model = make(method, task).fit(X, y)
    dist = model.predict_distribution(X[:7])
    assert isinstance(dist, pyro.distributions.TorchDistribution)
    assert isinstance(dist, TorchDistributionMixin)
    assert dist.batch_shape == (7,)
    assert dist.event_shape == ()
    assert len(dist) == 7
    assert dist[2:4].batch_shape == (2,)
    drawn = pyro.sample("y", dist)
    assert drawn.shape == (7,)
    assert dist.log_prob(drawn).isfinite().all()
    assert dist.mean.dtype == torch.float64 if task == "regression" else True
    assert np.isfinite(model.log_score(X, y))


@every
def test_single_row(method, task):
    X, y = data(task)
    model = make(method, task).fit(X, y)
    # 1e-5: matrix products of another size round differently in float32.
    np.testing.assert_allclose(
        output(model, X[4:5])[..., 0:1, :] if task == "classification" else output(model, X[4:5]),
        output(model, X)[:, 4:5] if task == "classification" else output(model, X)[..., 4:5],
        rtol=1e-4,
        atol=1e-5,
    )


@every
def test_array_frame_and_tensor_give_the_same(method, task):
    X, y = data(task)
    expected = output(make(method, task).fit(X, y), X)
    frame = pd.DataFrame(
        X, columns=[f"f{i}" for i in range(X.shape[1])], index=range(5, 5 + len(X))
    )
    on_frame = make(method, task).fit(frame, pd.Series(y, index=frame.index))
    np.testing.assert_array_equal(output(on_frame, frame), expected)
    assert list(on_frame.predict_distribution(frame).to_frame().index) == list(frame.index)
    assert list(on_frame.predict_distribution(frame)[2:5].to_frame().index) == [7, 8, 9]
    on_tensor = make(method, task).fit(torch.tensor(X), torch.tensor(y))
    np.testing.assert_array_equal(output(on_tensor, torch.tensor(X)), expected)


@every
def test_feature_names_and_count_are_checked(method, task):
    X, y = data(task)
    frame = pd.DataFrame(X).add_prefix("f")
    model = make(method, task).fit(frame, y)
    with pytest.raises(ValueError, match="feature names"):
        model.predict_distribution(frame.rename(columns={"f0": "other"}))
    with pytest.raises(ValueError, match="missing"):
        model.predict_distribution(frame.iloc[:, 1:])
    with pytest.raises(ValueError, match="features"):
        make(method, task).fit(X, y).predict_distribution(X[:, 1:])


@every
def test_same_seed_same_bits_and_second_fit_equals_first(method, task):
    X, y = data(task)
    model = make(method, task)
    first = output(model.fit(X, y), X)
    np.testing.assert_array_equal(output(model.fit(X, y), X), first)
    np.testing.assert_array_equal(output(clone(model).fit(X, y), X), first)
    np.testing.assert_array_equal(output(model, X), first)
    other = output(make(method, task, random_state=1).fit(X, y), X)
    assert np.array_equal(other, first) == ((method, task) in SEEDLESS)


@every
def test_other_seed_type_is_taken(method, task):
    X, y = data(task)
    by_state = make(method, task, random_state=np.random.RandomState(3)).fit(X, y)
    by_int = make(method, task, random_state=3).fit(X, y)
    np.testing.assert_array_equal(output(by_state, X), output(by_int, X))


@every
def test_fit_and_predict_leave_global_state_alone(method, task):
    X, y = data(task)
    pyro.get_param_store().setdefault("mine", torch.ones(1))
    before = (
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),  # noqa: NPY002
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        set(pyro.get_param_store().keys()),
    )
    model = make(method, task).fit(X, y)
    model.predict_distribution(X)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.get_num_threads() == before[2]
    assert torch.get_default_dtype() == before[3]
    assert torch.is_grad_enabled() == before[4]
    assert set(pyro.get_param_store().keys()) == before[5]
    pyro.get_param_store().clear()


@every
def test_save_load_pickle_and_copy_keep_every_bit(method, task, tmp_path):
    X, y = data(task)
    y = np.array(["a", "b", "c"])[y] if task == "classification" else y
    model = make(method, task).fit(pd.DataFrame(X).add_prefix("f"), y)
    frame = pd.DataFrame(X).add_prefix("f")
    expected = output(model, frame)
    state = torch.get_rng_state()
    model.save(tmp_path / "model.uq")
    loaded = uq.load(tmp_path / "model.uq")
    assert torch.equal(torch.get_rng_state(), state)
    for again in (loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        np.testing.assert_array_equal(output(again, frame), expected)
        assert again.get_params().keys() == model.get_params().keys()
        assert list(again.feature_names_in_) == list(model.feature_names_in_)
        assert again.history_ == model.history_
    assert loaded.get_params() == model.get_params()
    # A loaded model can be fitted again, and gives what the first one gave.
    np.testing.assert_array_equal(output(loaded.fit(frame, y), frame), expected)


@every_compiled
def test_module_factory_and_module_instance(method, task, tmp_path):
    X, y = data(task)
    X = (X - X.mean(0)) / X.std(0)
    width = 3 if task == "classification" else 1
    if method in FEATURES:
        width = 12
    elif method == "evidential" and task == "regression":
        width = 4
    net = torch.nn.Sequential(
        torch.nn.Linear(X.shape[1], 8), torch.nn.Tanh(), torch.nn.Linear(8, width)
    )
    if method == "abnn":
        net.insert(1, torch.nn.LayerNorm(8))
    before = copy.deepcopy(net.state_dict())
    model = make(method, task, module=net).fit(X, y)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    model.save(tmp_path / "model.uq")
    with pytest.raises(uq.UQError, match="module="):
        uq.load(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq", module=net)
    np.testing.assert_array_equal(output(again, X), output(model, X))

    def factory(d_in, d_out):
        linear = torch.nn.Linear(d_in, d_out)
        return torch.nn.Sequential(torch.nn.LayerNorm(d_in), linear) if method == "abnn" else linear

    by_factory = make(method, task, module=factory)
    assert np.isfinite(output(by_factory.fit(X, y), X)).all()
    clone(by_factory)


# On 40 images of noise there may be no class that SDM can tell apart.
@pytest.mark.filterwarnings("ignore:SDMClassifier. no calibration row:UserWarning")
@every_compiled
def test_images(method, task):
    X = np.random.default_rng(0).normal(size=(40, 8, 8)).astype(np.float32)
    y = np.arange(40) % 3 if task == "classification" else X.mean((1, 2))
    model = make(method, task, module=uq.nn.ConvNet).fit(X, y)
    assert model.predict_distribution(X[:5]).batch_shape == (5,)
    with pytest.raises(ValueError, match="rows of shape"):
        model.predict_distribution(X[:, :, :4])


@every
def test_dataset_and_loader(method, task):
    X, y = data(task)
    target = torch.tensor(y) if task == "classification" else torch.tensor(y, dtype=torch.float32)
    source = TensorDataset(torch.tensor(X, dtype=torch.float32), target)
    for stream in (source, DataLoader(source, 16)):
        model = make(method, task).fit(stream)
        assert model.predict_distribution(X[:5]).batch_shape == (5,)
        assert np.isfinite(model.log_score(X, y))
    with pytest.raises(ValueError, match="yields"):
        make(method, task).fit(source, y)


@every
def test_sample_weight_scales_rows_not_the_model(method, task):
    X, y = data(task)
    whole = {"batch_size": None, "patience": None, "precision": "64-true"}
    weight = np.ones(len(X))
    weight[:10] = 2.0
    weight[-10:] = 0.0
    weighted = make(method, task, **whole).fit(X, y, sample_weight=weight)
    repeated = make(method, task, **whole).fit(
        np.concatenate([X[:-10], X[:10]]), np.concatenate([y[:-10], y[:10]])
    )
    np.testing.assert_allclose(output(weighted, X), output(repeated, X), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="sample_weight"):
        make(method, task).fit(X, y, sample_weight=-weight)


@every
def test_uncertainty_split_adds_up(method, task):
    X, y = data(task)
    dist = make(method, task).fit(X, y).predict_distribution(X)
    if method in SINGLE:
        with pytest.raises(uq.UQError, match="epistemic"):
            _ = dist.epistemic
        return
    total = dist.entropy() if task == "classification" else dist.variance
    # Class probabilities are float32 inside: 1e-6 is about ten roundings.
    torch.testing.assert_close(dist.aleatoric + dist.epistemic, total, rtol=1e-6, atol=1e-6)
    assert (dist.epistemic >= -1e-7).all()


@every
def test_sampled_functions_are_shared_by_rows(method, task):
    X, y = data(task)
    model = make(method, task).fit(X, y)
    functions = model.sample_functions(X, 4)
    assert functions.shape[1] == len(X)
    assert functions.shape[0] == (1 if method in SINGLE else 2 if method == "ensemble" else 4)
    np.testing.assert_allclose(
        model.sample_functions(X[3:5], 4), functions[:, 3:5], rtol=1e-4, atol=1e-5
    )


@classifier
@pytest.mark.parametrize("labels", [["red", "green", "blue"], [10, 20, 30], [0.0, 1.0, 2.0]])
def test_labels_of_any_type(method, task, labels):
    X, y = data(task)
    labels = np.array(labels)
    model = make(method, task, max_epochs=20).fit(X, labels[y])
    np.testing.assert_array_equal(model.classes_, np.unique(labels))
    assert set(model.predict(X)) <= set(labels)
    dist = model.predict_distribution(X)
    assert list(dist.to_frame().columns) == list(model.classes_)
    proba = model.predict_proba(X)
    np.testing.assert_allclose(proba.sum(1), 1, rtol=1e-12)
    own = dist.log_prob(torch.as_tensor(np.searchsorted(model.classes_, labels[y])))
    assert model.log_score(X, labels[y]) == pytest.approx(float(own.mean()))
    with pytest.raises(ValueError, match="label"):
        model.log_score(X[:1], np.array(["nobody"]))


@classifier
def test_boolean_labels(method, task):
    X, y = data(task)
    model = make(method, task).fit(X, y == 1)
    assert model.predict(X).dtype == bool


@regressor
def test_two_dimensional_targets(method, task):
    X, y = data(task)
    one = make(method, task).fit(X, y).predict_distribution(X)
    assert one.batch_shape == (len(X),)
    both = np.stack([y, 1000 - 3 * y], 1)
    model = make(method, task).fit(X, both)
    dist = model.predict_distribution(X)
    assert dist.batch_shape == (len(X), 2)
    assert dist.joint().batch_shape == (len(X),)
    assert dist.joint().event_shape == (2,)
    assert model.predict(X).shape == (len(X), 2)
    lower, upper = model.predict_interval(X, 0.8)
    assert lower.shape == upper.shape == (len(X), 2)
    assert model.predict_quantiles(X, [0.1, 0.5, 0.9]).shape == (3, len(X), 2)
    joint = dist.joint().log_prob(torch.tensor(both))
    assert model.log_score(X, both) == pytest.approx(float(joint.mean()))


@regressor
def test_predictions_follow_the_unit_of_the_target(method, task):
    X, y = data(task)
    a = make(method, task, precision="64-true").fit(X, y).predict_distribution(X)
    b = make(method, task, precision="64-true").fit(X, 5 - 1e-4 * y[:, None] * -1)
    b = b.predict_distribution(X)
    torch.testing.assert_close(b.mean[:, 0], 5 + 1e-4 * a.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(b.stddev[:, 0], 1e-4 * a.stddev, rtol=1e-7, atol=0)


@regressor
def test_heteroscedastic_noise(method, task):
    X, y = data(task)
    if method in CONSTANT_NOISE:
        pytest.skip("a process with one level of noise")
    model = make(method, task)
    if "noise" in model.get_params():  # the others' noise always depends on the input
        model.set_params(noise="heteroscedastic")
    model.fit(X, y)
    assert model.predict_distribution(X).aleatoric.std() > 0


@every_compiled
def test_inside_scikit_learn(method, task):
    X, y = data(task)
    model = make(method, task)
    pipe = make_pipeline(StandardScaler().set_output(transform="pandas"), model).fit(X, y)
    assert next(iter(pipe[-1].feature_names_in_)) == "x0"
    search = GridSearchCV(model, {"hidden": [(4,), (8,)]}, cv=2, error_score="raise").fit(X, y)
    assert search.best_estimator_.hidden in [(4,), (8,)]
    assert len(cross_val_predict(model, X, y, cv=2)) == len(X)


@classifier
def test_calibration_and_frozen(method, task):
    X, y = data(task)
    model = make(method, task).fit(X, y)
    for how in ("sigmoid", "isotonic", "temperature"):
        calibrated = CalibratedClassifierCV(FrozenEstimator(model), method=how).fit(X, y)
        np.testing.assert_allclose(calibrated.predict_proba(X).sum(1), 1)


@regressor
def test_target_wrappers(method, task):
    X, y = data(task)
    model = make(method, task)
    logged = TransformedTargetRegressor(model, func=np.log, inverse_func=np.exp).fit(X, y)
    assert (logged.predict(X) > 0).all()
    both = MultiOutputRegressor(model).fit(X, np.stack([y, y], 1))
    assert both.predict(X).shape == (len(X), 2)

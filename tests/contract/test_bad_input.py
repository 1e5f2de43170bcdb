"""Bad input on every estimator: a clear error that names the argument."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.exceptions import NotFittedError

import uq
from tests.contract.estimators import (
    CASES,
    CLASSIFIERS,
    FEATURES,
    TAKE_MISSING,
    make,
    make_trained,
)
from tests.contract.test_estimators import data
from uq.errors import DataError, ParameterError, UQError

every = pytest.mark.parametrize(("method", "task"), CASES)


@every
def test_an_unknown_parameter_is_answered_with_the_closest(method, task):
    kind = type(make(method, task))
    name = kind.__name__
    with pytest.raises(
        TypeError, match=f"^{name} has no parameter 'epochs'; did you mean .*epochs"
    ):
        kind(epochs=3)
    with pytest.raises(TypeError, match=f"^{name} has no parameter 'seed'; there are "):
        kind(seed=3)
    # scikit-learn and help() see the parameters themselves.
    found = inspect.signature(kind).parameters
    assert set(found) == set(kind().get_params(deep=False))
    assert all(p.kind is not p.VAR_KEYWORD for p in found.values())


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(method, task, bad):
    if np.isnan(bad) and method in TAKE_MISSING:
        pytest.skip("NaN is a missing value, which this method takes")
    X, y = data(task)
    frame = pd.DataFrame(X).add_prefix("f")
    frame.iloc[3, 2] = bad
    with pytest.raises(DataError, match=r"X contains (NaN|infinity).*\[3, 2\].*'f2'"):
        make(method, task).fit(frame, y)
    model = make(method, task).fit(X, y)
    with pytest.raises(DataError, match=r"\[3, 2\]"):
        model.predict_distribution(frame.to_numpy())
    y = y.astype(float)
    y[1] = bad
    with pytest.raises(ValueError, match="y contains"):
        make(method, task).fit(X, y)


@every
def test_wrong_lengths_and_shapes(method, task):
    X, y = data(task)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        make(method, task).fit(X, y[:-1])
    with pytest.raises(ValueError, match="n_samples >= 2"):
        make(method, task).fit(X[:1], y[:1])
    with pytest.raises(ValueError, match="0 sample"):
        make(method, task).fit(X[:0], y[:0])
    with pytest.raises(ValueError, match="y"):
        make(method, task).fit(X)
    with pytest.raises(ValueError, match="dim 3"):
        make(method, task).fit(X[:, :, None], y)
    model = make(method, task).fit(X, y)
    with pytest.raises(ValueError, match="0 sample"):
        model.predict_distribution(X[:0])
    with pytest.raises(ValueError, match="2D array"):
        model.predict(X[0])


@every
def test_not_fitted(method, task, tmp_path):
    X, _ = data(task)
    with pytest.raises(NotFittedError):
        make(method, task).predict_distribution(X)
    with pytest.raises(NotFittedError):
        make(method, task).save(tmp_path / "model.uq")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "task"), CLASSIFIERS)
def test_one_class_only(method, task):
    X, _ = data(task)
    with pytest.raises(DataError, match="one class"):
        make(method, task).fit(X, np.zeros(len(X), int))
    with pytest.raises(ValueError, match="continuous"):
        make(method, task).fit(X, np.linspace(0, 1, len(X)))


@every
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", (8, 0)),
        ("hidden", 8),
        ("max_epochs", 0),
        ("max_epochs", 2.5),
        ("batch_size", -1),
        ("lr", 0),
        ("lr", "fast"),
        ("patience", 0),
        ("precision", "16"),
        ("device", "abacus"),
        ("module", "resnet"),
    ],
)
def test_constructor_arguments_are_named(method, task, name, value):
    X, y = data(task)
    with pytest.raises(ParameterError, match=name):
        make(method, task, **{name: value}).fit(X, y)


def test_slips_of_a_newcomer_are_answered_with_what_to_do():
    """Checks that every estimator shares: one of them is enough."""
    X, y = data("classification")
    frame = pd.DataFrame(X).add_prefix("f")
    model = make("map", "classification").fit(frame, y)
    text = frame.assign(f1=["red", "blue"] * (len(X) // 2) + ["red"] * (len(X) % 2))
    dates = frame.assign(f1=pd.date_range("2020-01-01", periods=len(X)))
    for wrong, message in (
        (("rows.csv", y), r"fit: X must hold data, got 'rows.csv'.*read_table"),
        ((None, y), "fit: X must hold data, got None"),
        ((frame, "target"), r"fit: y must hold data, got 'target'.*split_target"),
        ((dict(frame), y), r"X must be an array or a table, got a dict; pandas.DataFrame"),
        ((text, y), r"fit: could not convert.*TableModel"),
        ((dates, y), r"fit: .*dates into numbers"),
        ((frame, y[:-1]), "fit: .*the same rows"),
        ((frame, np.eye(int(y.max()) + 1)[y]), r"fit: .*argmax"),
        ((frame, y, "balanced"), "sample_weight must hold data, got 'balanced'"),
    ):
        with pytest.raises(DataError, match=f"(?s){message}"):
            make("map", "classification").fit(*wrong)
    for wrong, message in (
        (frame[frame.columns[::-1]], r"same order.*X\[model.feature_names_in_\]"),
        (frame.rename(columns={"f1": "F1"}), r"- F1\n.*feature_names_in_"),
        ("rows.csv", "X must hold data"),
    ):
        with pytest.raises(DataError, match=f"(?s){message}"):
            model.predict(wrong)
    with pytest.raises(DataError, match=r"y must hold numbers: .*: 'red'; use a classifier"):
        make("map", "regression").fit(frame, ["red"] * len(X))
    with pytest.raises(ParameterError, match="MAPClassifier: random_state must be an integer"):
        make("map", "classification", random_state="seven").fit(X, y)
    with pytest.raises(ParameterError, match="device must be 'auto' or a torch device such as"):
        make("map", "classification", device="gpu").fit(X, y)
    with pytest.raises(ParameterError, match=r"TableModel: estimator must.*uq.IVONClassifier\(\)"):
        uq.TableModel("ivon").fit(frame, y)
    with pytest.raises(DataError, match=r"TableModel\.fit: X must hold data"):
        uq.TableModel(model).fit("rows.csv", y)


@pytest.mark.parametrize(
    ("make_part", "message"),
    [
        (lambda: uq.nn.MLP(3, 16, 2), "MLP: hidden must be a sequence of widths.*got 16"),
        (lambda: uq.nn.NormalPrior(-1.0), "NormalPrior: scale must be a number > 0, got -1.0"),
        (lambda: uq.nn.CategoricalLikelihood(0), "n_classes must be an integer >= 1, got 0"),
        (lambda: uq.nn.NormalLikelihood(1.5), "n_targets must be an integer >= 1, got 1.5"),
        (lambda: uq.inference.RandomWalk(covariance="ful"), "covariance must be.*got 'ful'"),
        (lambda: uq.distributions.NormalMixture(np.zeros((1, 2)), 1.0), "must be tensors"),
        (lambda: uq.data.load_dataset(3), "data set 3 is unknown; there are digits"),
    ],
)
def test_parts_that_are_used_alone_check_their_arguments(make_part, message):
    with pytest.raises(UQError, match=message):
        make_part()


@every
def test_modules_that_do_not_fit(method, task):
    X, y = data(task)
    d = X.shape[1]
    with pytest.raises(ParameterError, match="module fails on an input"):
        make(method, task, module=torch.nn.Linear(d + 1, 3)).fit(X, y)
    if method not in FEATURES:
        with pytest.raises(ParameterError, match="7 outputs"):
            make(method, task, module=torch.nn.Linear(d, 7)).fit(X, y)
    with pytest.raises(ParameterError, match="must map"):
        make(method, task, module=torch.nn.Unflatten(1, (d, 1))).fit(X, y)
    with pytest.raises(ParameterError, match="must return"):
        make(method, task, module=lambda d_in, d_out: "net").fit(X, y)


@every
def test_interrupt_keeps_what_was_learned(method, task):
    X, y = data(task)

    def interrupt(state):
        if state.epoch == 2:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="after 2 epochs: interrupted"):
        model = make_trained(method, task, max_epochs=50, callbacks=[interrupt]).fit(X, y)
    assert model.stop_reason_ == "interrupted"
    assert model.n_epochs_ == 2
    assert np.isfinite(model.log_score(X, y))


@every
def test_runaway_loss_is_an_error_that_keeps_the_model(method, task):
    X, y = data(task)

    def explode(state):
        if state.epoch == 3:
            for p in state.module.parameters():
                p.data.fill_(float("nan"))

    model = make_trained(method, task, max_epochs=10, callbacks=[explode])
    with pytest.raises(UQError, match=r"epoch 4.*last finite loss.*lr"):
        model.fit(X, y)
    assert model.stop_reason_ == "non_finite"
    assert np.isfinite(model.log_score(X, y))


@every
def test_callbacks_and_progress(method, task, capsys):
    X, y = data(task)
    seen = []

    def stop_at_two(state):
        seen.append(state)
        return state.epoch == 2

    model = make_trained(method, task, max_epochs=9, callbacks=[stop_at_two], verbose=1)
    model.fit(X, y)
    trainings = 2 if method in ("ensemble", "abnn") else 1  # members; network and member
    assert [s.epoch for s in seen] == [1, 2] * trainings
    assert model.stop_reason_ == "callback"
    assert type(model).__name__ in capsys.readouterr().err

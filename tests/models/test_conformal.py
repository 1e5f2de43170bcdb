from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_wine, make_classification
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV, KFold, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import uq
from uq.calibration import ConformalIntervals, ConformalSets
from uq.errors import DataError, ParameterError

REAL = ["quantile", "normalized", "residual", "density"]
CLASSES = ["lac", "aps", "raps"]


def regressor(**changes):
    settings = {"hidden": (8,), "max_epochs": 10, "lr": 0.02, "random_state": 0}
    return uq.MAPRegressor(**settings | changes)


def classifier(**changes):
    settings = {"hidden": (8,), "max_epochs": 10, "lr": 0.02, "random_state": 0}
    return uq.MAPClassifier(**settings | changes)


def real_rows(n, seed=0, d=3):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X, X.sum(1) + np.exp(X[:, 0] / 2) * rng.standard_normal(n)


def class_rows(n, seed=0, n_classes=3):
    return make_classification(
        n, 6, n_informative=5, n_redundant=0, n_classes=n_classes, flip_y=0.2, random_state=seed
    )


# -- scikit-learn --------------------------------------------------------------------------------

CHECKED = {"max_epochs": 60, "batch_size": None, "patience": None, "precision": "64-true"}


# Samples of these checks are too small for a coverage of 0.9.
@pytest.mark.filterwarnings("ignore:.* held-out rows:UserWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(
    [uq.Conformal(make(**CHECKED), cv=cv) for make in (regressor, classifier) for cv in (0.25, 2)]
)
def test_scikit_learn_check(estimator, check):
    check(estimator)


def test_inside_scikit_learn():
    X, y = real_rows(80)
    model = make_pipeline(StandardScaler(), uq.Conformal(regressor(), coverage=0.8)).fit(X, y)
    assert model.predict(X).shape == (80,)
    search = GridSearchCV(
        uq.Conformal(regressor(), coverage=0.8), {"estimator__lr": [0.01, 0.1]}, cv=2
    )
    lower, _ = search.fit(X, y).best_estimator_.predict_interval(X)
    assert lower.shape == (80,)


# -- what it gives -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", REAL)
@pytest.mark.parametrize("cv", [0.3, "prefit", 3])
def test_intervals_are_those_of_the_held_out_rows(method, cv):
    """The same intervals from the parts by hand: the fits, and the rows they hold out."""
    if method == "density" and cv == 3:
        return
    (X, y), (X_new, _) = real_rows(90), real_rows(10, seed=1)
    estimator = regressor().fit(*real_rows(60, seed=2)) if cv == "prefit" else regressor()
    model = uq.Conformal(estimator, method, coverage=0.8, cv=cv).fit(X, y)
    by_hand = ConformalIntervals(method, 0.8)
    if cv == "prefit":
        assert model.estimator_ is estimator
        by_hand.fit(estimator.predict_distribution(X), y)
        new = estimator.predict_distribution(X_new)
    elif cv == 3:
        splits = list(KFold(3, shuffle=True, random_state=0).split(X))
        fits = [regressor().fit(X[train], y[train]) for train, _ in splits]
        by_hand.fit(
            [
                fit.predict_distribution(X[test])
                for fit, (_, test) in zip(fits, splits, strict=True)
            ],
            [y[test] for _, test in splits],
        )
        new = [fit.predict_distribution(X_new) for fit in fits]
        np.testing.assert_array_equal(model.predict(X_new), regressor().fit(X, y).predict(X_new))
    else:
        ((train, test),) = ShuffleSplit(1, test_size=0.3, random_state=0).split(X)
        fit = regressor().fit(X[train], y[train])
        by_hand.fit(fit.predict_distribution(X[test]), y[test])
        new = fit.predict_distribution(X_new)
        np.testing.assert_array_equal(model.predict(X_new), fit.predict(X_new))
    np.testing.assert_array_equal(model.predict_interval(X_new), by_hand.interval(new))
    for one, other in zip(model.predict_region(X_new), by_hand.region(new), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(model.fold_estimators_) == (3 if cv == 3 else 0)


@pytest.mark.statistical
@pytest.mark.parametrize(("method", "cv"), [("quantile", 0.25), ("density", 0.25), ("residual", 4)])
def test_coverage_of_new_rows(method, cv):
    """Given the held-out rows coverage is Beta: five standard deviations, at 1000 new rows."""
    X, y = real_rows(400)
    model = uq.Conformal(regressor(max_epochs=40), method, cv=cv).fit(X, y)
    X_new, y_new = real_rows(1000, seed=1)
    lower, upper = model.predict_interval(X_new)
    inside = np.mean((lower <= y_new) & (y_new <= upper))
    n = 100 if cv == 0.25 else 400
    assert abs(inside - 0.9) < 5 * math.sqrt(0.09 / n + 0.09 / 1000)


@pytest.mark.statistical
@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.parametrize("cv", [0.25, 4])
def test_coverage_of_new_labels(method, cv):
    X, y = class_rows(1400)
    model = uq.Conformal(classifier(max_epochs=40), method, coverage=0.8, cv=cv).fit(
        X[:400], y[:400]
    )
    sets = model.predict_set(X[400:])
    inside = sets[np.arange(1000), y[400:]].mean()
    n = 100 if cv == 0.25 else 400
    assert abs(inside - 0.8) < 5 * math.sqrt(0.16 / n + 0.16 / 1000)
    assert sets.shape == (1000, 3)


def test_the_rest_is_that_of_the_estimator():
    X, y = load_wine(return_X_y=True)
    names = np.array(["red", "rosé", "white"])[y]
    frame = pd.DataFrame(X).add_prefix("x").set_index(np.arange(len(X)) * 10)
    plain = classifier().fit(frame[::2], names[::2])
    model = uq.Conformal(plain, cv="prefit").fit(frame[1::2], names[1::2])
    np.testing.assert_array_equal(model.predict(frame), plain.predict(frame))
    np.testing.assert_array_equal(model.predict_proba(frame), plain.predict_proba(frame))
    assert model.score(frame, names) == plain.score(frame, names)
    assert model.log_score(frame, names) == pytest.approx(plain.log_score(frame, names))
    assert model.classes_.tolist() == ["red", "rosé", "white"]
    assert model.predict_distribution(frame).index.equals(frame.index)
    assert model.feature_names_in_.tolist() == frame.columns.tolist()
    assert model.n_features_in_ == 13
    assert not hasattr(model, "predict_interval")
    assert not hasattr(uq.Conformal(regressor()), "predict_set")
    assert not hasattr(uq.Conformal(regressor()), "predict_proba")


def test_another_coverage(tmp_path):
    """Of the rows held out in ``fit``, which the file holds, too."""
    X, y = real_rows(60)
    model = uq.Conformal(regressor(), "normalized").fit(X, y)
    expected = uq.Conformal(regressor(), "normalized", coverage=0.6).fit(X, y).predict_interval(X)
    model.save(tmp_path / "model.uq")
    for one in (model, uq.load(tmp_path / "model.uq")):
        np.testing.assert_array_equal(one.predict_interval(X, 0.6), expected)
        ends = np.array(one.predict_region(X, coverage=0.6))[:, 0].T
        np.testing.assert_array_equal(ends, expected)
    with pytest.raises(ParameterError, match="fit with that coverage, or with 'normalized'"):
        uq.Conformal(regressor()).fit(X, y).predict_interval(X, coverage=0.6)
    X, y = class_rows(120)
    model = uq.Conformal(classifier(), "aps").fit(X, y)
    expected = uq.Conformal(classifier(), "aps", coverage=0.6).fit(X, y).predict_set(X)
    np.testing.assert_array_equal(model.predict_set(X, coverage=0.6), expected)


def test_auto_and_objects():
    X, y = real_rows(60)
    assert uq.Conformal(regressor()).fit(X, y).conformal_.score == "quantile"
    own = ConformalIntervals("residual", symmetric=False)
    model = uq.Conformal(regressor(), own, cv=0.5).fit(X, y)
    assert model.conformal_.threshold_.shape == (2, 1)
    assert not hasattr(own, "threshold_")
    X, y = class_rows(120)
    assert uq.Conformal(classifier()).fit(X, y).conformal_.score == "lac"
    own = ConformalSets("lac", class_conditional=True, coverage=0.8)
    model = uq.Conformal(classifier(), own, coverage=0.8, cv=0.5).fit(X, y)
    assert len(set(model.conformal_.threshold_)) == 3


def test_around_recalibration_and_tables():
    X, y = class_rows(150)
    model = uq.Conformal(uq.Calibrated(classifier(), cv=2), "aps").fit(X, y)
    assert model.predict_set(X).shape == (150, 3)
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    model = uq.Conformal(uq.TableModel(regressor()), cv=2).fit(X[:100], y[:100])
    lower, upper = model.predict_interval(X[100:])
    assert (lower < upper).all()


def test_several_outputs():
    X, y = real_rows(60)
    y = np.stack([y, 5 * y[::-1]], 1)
    for cv in (0.3, 2):
        lower, upper = uq.Conformal(regressor(), cv=cv).fit(X, y).predict_interval(X)
        assert lower.shape == upper.shape == (60, 2)


@pytest.mark.parametrize("cv", [0.3, 2, "prefit"])
def test_save_and_load(cv, tmp_path):
    X, y = real_rows(60)
    estimator = regressor().fit(X, y) if cv == "prefit" else regressor()
    model = uq.Conformal(estimator, cv=cv).fit(X, y)
    model.save(tmp_path / "real.uq")
    again = uq.load(tmp_path / "real.uq")
    np.testing.assert_array_equal(again.predict_interval(X), model.predict_interval(X))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    assert again.get_params()["cv"] == cv
    X, y = class_rows(80)
    estimator = classifier().fit(X, y) if cv == "prefit" else classifier()
    method = ConformalSets("raps", randomized=True, random_state=0)
    model = uq.Conformal(estimator, method, cv=cv).fit(X, y)
    model.save(tmp_path / "classes.uq")
    again = uq.load(tmp_path / "classes.uq")
    np.testing.assert_array_equal(again.predict_set(X), model.predict_set(X))


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lac"}, "method for a regressor must be one of 'auto', 'quantile'"),
        ({"method": ConformalSets()}, "or a ConformalIntervals"),
        ({"method": None}, "method for a regressor"),
        ({"coverage": 1}, r"coverage must lie in \(0, 1\), got 1"),
        (
            {"method": ConformalIntervals(coverage=0.8)},
            "method has coverage 0.8, but coverage is 0.9",
        ),
        ({"method": ConformalIntervals("mean")}, "score must be one of"),
        ({"method": "density", "cv": 3}, "no form with a known guarantee"),
        ({"cv": 1}, "cv must be a share"),
        ({"cv": 1.5}, "cv must be a share"),
        ({"cv": True}, "cv must be a share"),
        ({"cv": None}, "cv must be a share"),
        ({"cv": "5"}, "cv must be a share"),
        ({"cv": KFold(3)}, "cv must be a share"),
    ],
)
def test_bad_parameters(changes, message):
    with pytest.raises(ParameterError, match=message):
        uq.Conformal(regressor(), **changes).fit(*real_rows(40))


def test_bad_data():
    X, y = real_rows(40)
    with pytest.raises(DataError, match="Conformal requires y to be passed"):
        uq.Conformal(regressor()).fit(X, None)
    with pytest.raises(ValueError, match="inconsistent"):
        uq.Conformal(regressor()).fit(X, y[:5])
    with pytest.raises(DataError, match=r"Conformal.fit: cv=0.25 cannot split"):
        uq.Conformal(regressor()).fit(X[:1], y[:1])
    with pytest.raises(DataError, match="cv=5 needs n_samples >= 5, got n_samples = 4"):
        uq.Conformal(regressor(), cv=5).fit(X[:4], y[:4])
    with pytest.raises(ValueError, match="NaN"):
        uq.Conformal(regressor()).fit(np.where(np.arange(3) == 0, np.nan, X), y)
    with pytest.raises(NotFittedError):
        uq.Conformal(regressor(), cv="prefit").fit(X, y)
    with pytest.warns(UserWarning, match="needs at least 9 held-out rows, got 8"):
        model = uq.Conformal(regressor()).fit(X[:32], y[:32])
    assert np.isinf(model.predict_interval(X)).all()
    with pytest.raises(NotFittedError):
        uq.Conformal(regressor()).predict_interval(X)
    with pytest.raises(NotFittedError):
        uq.Conformal(regressor()).predict_region(X)
    with pytest.raises(ValueError, match="features"):
        model.predict_interval(X[:, :2])


def test_bad_classes():
    X, y = class_rows(60)
    for labels in (np.where(np.arange(60) == 0, 9, y % 2), y):
        model = uq.Conformal(classifier().fit(X, y), cv="prefit")
        if 9 in labels:
            with pytest.raises(DataError, match="y holds 9 at row 0"):
                model.fit(X, labels)
        else:
            model.fit(X, labels)
    with pytest.raises(NotFittedError):
        uq.Conformal(classifier()).predict_set(X)
    with pytest.raises(ParameterError, match="class-conditional"):
        uq.Conformal(classifier(), ConformalSets(class_conditional=True), cv=3).fit(X, y)
    ((_, test),) = ShuffleSplit(1, test_size=0.25, random_state=0).split(X)
    y[test[0]] = 7  # the only row of its class is held out
    with pytest.raises(DataError, match=r"trains without class 7, .* pass cv='prefit'"):
        uq.Conformal(classifier()).fit(X, y)


def test_clone_is_unfitted():
    model = uq.Conformal(regressor(), "residual", coverage=0.8, cv=3).fit(*real_rows(40))
    again = clone(model)
    assert {k: v for k, v in again.get_params().items() if "estimator" not in k} == {
        "method": "residual",
        "coverage": 0.8,
        "cv": 3,
    }
    assert not hasattr(again, "conformal_")
    assert not hasattr(uq.Conformal(LinearRegression()), "predict_set")

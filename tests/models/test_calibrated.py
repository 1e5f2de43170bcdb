from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_wine, make_classification
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    ShuffleSplit,
    StratifiedKFold,
    StratifiedShuffleSplit,
    TimeSeriesSplit,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import uq
from uq.calibration import (
    BetaCalibration,
    EvidenceScaling,
    HistogramBinning,
    IsotonicCalibration,
    MatrixScaling,
    QuantileRecalibration,
    TemperatureScaling,
    VarianceScaling,
    VectorScaling,
)
from uq.distributions import concatenate
from uq.errors import DataError, ParameterError

CLASSES = {
    "temperature": TemperatureScaling,
    "vector": VectorScaling,
    "matrix": MatrixScaling,
    "beta": BetaCalibration,
    "isotonic": IsotonicCalibration,
    "histogram": HistogramBinning,
}
REAL = {
    "variance": VarianceScaling,
    "quantile": QuantileRecalibration,
    "isotonic": lambda: QuantileRecalibration(levels=None),
}
NAMES = np.array(["red", "rosé", "white"])


def regressor(**changes):
    settings = {"hidden": (8,), "max_epochs": 10, "lr": 0.02, "random_state": 0}
    return uq.MAPRegressor(**settings | changes)


def classifier(**changes):
    settings = {"hidden": (8,), "max_epochs": 10, "lr": 0.02, "random_state": 0}
    return uq.MAPClassifier(**settings | changes)


def real_rows(n, seed=0, d=3):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X, 100 + 10 * (X.sum(1) + np.exp(X[:, 0] / 2) * rng.standard_normal(n))


def class_rows(n, seed=0, n_classes=3):
    """Rows of one population; each seed has rows of its own."""
    X, y = make_classification(
        4000, 6, n_informative=5, n_redundant=0, n_classes=n_classes, flip_y=0.2, random_state=0
    )
    rows = slice(500 * seed, 500 * seed + n)
    return X[rows], NAMES[y[rows]]


def two_class_rows(n, seed=0):
    return class_rows(n, seed, 2)


def task_of(method, cls):
    if method == "beta":
        return classifier, two_class_rows
    return (classifier, class_rows) if cls in CLASSES.values() else (regressor, real_rows)


EVERY = [pytest.param(m, c, id=f"classes-{m}") for m, c in CLASSES.items()] + [
    pytest.param(m, c, id=f"targets-{m}") for m, c in REAL.items()
]
every = pytest.mark.parametrize(("method", "cls"), EVERY)


def values(dist):
    """A few numbers that say all of a prediction."""
    if hasattr(dist, "probs"):
        return dist.probs.numpy()
    return np.stack([dist.quantile(q).numpy() for q in (0.05, 0.3, 0.5, 0.9)])


# -- scikit-learn --------------------------------------------------------------------------------

CHECKED = {"max_epochs": 60, "batch_size": None, "patience": None, "precision": "64-true"}


# Labels of these checks are easy or random: the best temperature is then at a bound.
@pytest.mark.filterwarnings("ignore:.* ended at its bound:sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(
    [uq.Calibrated(make(**CHECKED), cv=cv) for make in (regressor, classifier) for cv in (0.25, 2)]
)
def test_scikit_learn_check(estimator, check):
    check(estimator)


def test_inside_scikit_learn():
    X, y = class_rows(90)
    model = make_pipeline(StandardScaler(), uq.Calibrated(classifier(), cv=2)).fit(X, y)
    assert model.predict_proba(X).shape == (90, 3)
    search = GridSearchCV(
        uq.Calibrated(classifier(), cv=2),
        {"method": ["temperature", "vector"], "estimator__lr": [0.01, 0.1]},
        scoring="neg_log_loss",
        cv=2,
    ).fit(X, y)
    assert set(search.best_params_) == {"method", "estimator__lr"}


# -- what it gives -------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("cv", [0.3, "prefit", 3])
def test_equals_its_parts_by_hand(method, cls, cv):
    """The same bits from the fit, and the recalibrator to its minimiser's tolerance.

    That is not to the bit: sums in NumPy depend on where in memory its arrays happen to lie.
    """
    make, rows = task_of(method, cls)
    (X, y), (X_new, _) = rows(150), rows(12, seed=1)
    estimator = make().fit(*rows(90, seed=2)) if cv == "prefit" else make()
    model = uq.Calibrated(estimator, method, cv).fit(X, y)
    if cv == "prefit":
        assert model.estimator_ is estimator
        kept = estimator
        by_hand = cls().fit(estimator.predict_distribution(X), y)
    elif cv == 3:
        splitter = StratifiedKFold if make is classifier else KFold
        splits = list(splitter(3, shuffle=True, random_state=0).split(X, y))
        parts = [make().fit(X[a], y[a]).predict_distribution(X[b]) for a, b in splits]
        by_hand = cls().fit(concatenate(parts), np.concatenate([y[b] for _, b in splits]))
        kept = make().fit(X, y)
    else:
        splitter = StratifiedShuffleSplit if make is classifier else ShuffleSplit
        ((train, test),) = splitter(1, test_size=0.3, random_state=0).split(X, y)
        kept = make().fit(X[train], y[train])
        by_hand = cls().fit(kept.predict_distribution(X[test]), y[test])
    plain = kept.predict_distribution(X_new)
    np.testing.assert_array_equal(
        values(model.estimator_.predict_distribution(X_new)), values(plain)
    )
    np.testing.assert_allclose(
        values(model.predict_distribution(X_new)),
        values(by_hand.transform(plain)),
        rtol=1e-5,
        atol=1e-6,
    )


@every
def test_weight_of_a_row_is_its_number(method, cls):
    """Given the fits, doubling a row's weight is repeating it (rtol: the minimiser's tolerance)."""
    make, rows = task_of(method, cls)
    X, y = rows(150)
    estimator = make().fit(*rows(60, seed=2))
    twice = np.r_[np.arange(150), np.arange(0, 150, 3)]
    weight = np.bincount(twice).astype(float)
    weighted = uq.Calibrated(estimator, method, "prefit").fit(X, y, weight)
    repeated = uq.Calibrated(estimator, method, "prefit").fit(X[twice], y[twice])
    np.testing.assert_allclose(
        values(weighted.predict_distribution(X)),
        values(repeated.predict_distribution(X)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_weights_reach_every_fit():
    """With a share held out: rows of weight 0 change nothing but who is held out."""
    X, y = real_rows(80)
    ((train, test),) = ShuffleSplit(1, test_size=0.3, random_state=0).split(X)
    weight = np.where(np.arange(80) % 5 == 0, 0.0, 2.0)
    model = uq.Calibrated(regressor(), cv=0.3).fit(X, y, weight)
    fit = regressor().fit(X[train], y[train], weight[train])
    by_hand = VarianceScaling().fit(fit.predict_distribution(X[test]), y[test], weight[test])
    np.testing.assert_array_equal(
        values(model.predict_distribution(X)),
        values(by_hand.transform(fit.predict_distribution(X))),
    )


@pytest.mark.statistical
@pytest.mark.parametrize("cv", [0.3, 4])
def test_mends_overconfidence(cv):
    """A network fitted to noise until it knows it by heart scores worse than its mended self.

    A fifth of the labels is noise, so that a network that is sure of all of them pays nats for it.
    Claimed is a gain of three standard errors of the paired mean over 2000 rows.
    """
    X, y = class_rows(2300)
    overfit = {"hidden": (64,), "max_epochs": 200, "patience": None, "lr": 0.01}
    train, new = slice(0, 300), slice(300, None)
    mended = uq.Calibrated(classifier(**overfit, prior_scale=100), cv=cv).fit(X[train], y[train])
    plain = mended.estimator_
    assert mended.recalibrator_.temperature_ > 1.5
    labels = torch.as_tensor(np.searchsorted(NAMES, y[new]))
    after, before = (m.predict_distribution(X[new]).log_prob(labels) for m in (mended, plain))
    gain = (after - before).double()
    assert gain.mean() > 3 * gain.std() / math.sqrt(len(gain))


def test_splitters_and_pairs():
    X, y = real_rows(60)
    splits = list(TimeSeriesSplit(3).split(X))
    by_splitter = uq.Calibrated(regressor(), cv=TimeSeriesSplit(3)).fit(X, y)
    by_pairs = uq.Calibrated(regressor(), cv=splits).fit(X, y)
    assert by_splitter.recalibrator_.scale_ == by_pairs.recalibrator_.scale_
    masks = [(np.isin(np.arange(60), a), np.isin(np.arange(60), b)) for a, b in splits]
    by_masks = uq.Calibrated(regressor(), cv=masks).fit(X, y)
    assert by_masks.recalibrator_.scale_ == by_pairs.recalibrator_.scale_


def test_the_rest_is_that_of_the_estimator():
    X, y = load_wine(return_X_y=True)
    frame = pd.DataFrame(X).add_prefix("x").set_index(np.arange(len(X)) * 10)
    model = uq.Calibrated(classifier(), cv=0.3).fit(frame, pd.Series(NAMES[y], index=frame.index))
    # One temperature changes no label of a single network.
    np.testing.assert_array_equal(model.predict(frame), model.estimator_.predict(frame))
    assert model.classes_.tolist() == NAMES.tolist()
    assert model.predict_distribution(frame).index.equals(frame.index)
    assert model.feature_names_in_.tolist() == frame.columns.tolist()
    assert model.n_features_in_ == 13
    assert 0.9 < model.score(frame, NAMES[y]) <= 1
    assert not hasattr(model, "predict_interval")
    assert not hasattr(uq.Calibrated(regressor()), "predict_proba")


def test_intervals_and_quantiles():
    X, y = real_rows(120)
    for method in REAL:
        model = uq.Calibrated(regressor(), method, 3).fit(X, y)
        lower, upper = model.predict_interval(X, 0.8)
        np.testing.assert_allclose(lower, model.predict_quantiles(X, 0.1))
        np.testing.assert_allclose(upper, model.predict_quantiles(X, 0.9))
        assert model.predict_quantiles(X, [0.1, 0.5, 0.9]).shape == (3, 120)


def test_several_targets():
    X, y = real_rows(90)
    y = np.stack([y, 5 * y[::-1]], 1)
    for cv in (0.3, 3):
        model = uq.Calibrated(regressor(), cv=cv).fit(X, y)
        assert model.predict_distribution(X).batch_shape == (90, 2)
        assert model.predict(X).shape == (90, 2)
        assert np.isfinite(model.log_score(X, y))


def test_keeps_the_split_of_uncertainty():
    X, y = load_breast_cancer(return_X_y=True)
    settings = {"n_members": 3, "hidden": (8,), "max_epochs": 10, "random_state": 0}
    model = uq.Calibrated(uq.EnsembleClassifier(**settings), cv=0.3).fit(X, y)
    dist = model.predict_distribution(X)
    assert dist.epistemic.max() > 0
    np.testing.assert_allclose(dist.aleatoric + dist.epistemic, dist.entropy(), atol=1e-6)


def test_around_tables():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.standard_normal(120), "site": rng.choice(["x", "y"], 120)})
    frame.loc[::7, "a"] = np.nan
    y = np.where(rng.random(120) < 0.3, "no", "yes")
    model = uq.Calibrated(uq.TableModel(classifier()), cv=3).fit(frame, y)
    assert model.predict_proba(frame).shape == (120, 2)


@every
@pytest.mark.parametrize("cv", [0.3, 3, "prefit"])
def test_save_and_load(method, cls, cv, tmp_path):
    make, rows = task_of(method, cls)
    X, y = rows(150)
    estimator = make().fit(X, y) if cv == "prefit" else make()
    model = uq.Calibrated(estimator, method, cv).fit(X, y)
    model.save(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq")
    np.testing.assert_array_equal(
        values(again.predict_distribution(X)), values(model.predict_distribution(X))
    )
    assert again.get_params()["cv"] == cv


def test_own_recalibrator_is_cloned():
    X, y = real_rows(90)
    own = QuantileRecalibration(levels=(0.2, 0.5, 0.8))
    model = uq.Calibrated(regressor(), own, 0.3).fit(X, y)
    assert model.recalibrator_ is not own
    assert model.recalibrator_.levels == (0.2, 0.5, 0.8)
    assert not [name for name in vars(own) if name.endswith("_")]


def test_clone_is_unfitted():
    model = uq.Calibrated(regressor(), "quantile", 3).fit(*real_rows(60))
    again = clone(model)
    assert again.get_params()["method"] == "quantile"
    assert not hasattr(again, "recalibrator_")


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "temperature"}, "method for a regressor must be one of 'auto', 'variance'"),
        ({"method": None}, "method for a regressor must be one of"),
        ({"method": VarianceScaling}, "or a recalibrator"),
        ({"cv": 1}, "cv must be an integer >= 2, a share"),
        ({"cv": 1.5}, "cv must be an integer >= 2"),
        ({"cv": True}, "cv must be an integer >= 2"),
        ({"cv": None}, "cv must be an integer >= 2"),
        ({"cv": "5"}, "cv must be an integer >= 2"),
        ({"cv": object()}, "cv is of no use"),
    ],
)
def test_bad_parameters(changes, message):
    with pytest.raises(ParameterError, match=message):
        uq.Calibrated(regressor(), **changes).fit(*real_rows(40))
    with pytest.raises(ParameterError, match="method for a classifier must be one of 'auto'"):
        uq.Calibrated(classifier(), "variance").fit(*class_rows(40))


def test_bad_data():
    X, y = class_rows(60)
    model = uq.Calibrated(classifier(), cv=3)
    with pytest.raises(DataError, match="Calibrated requires y to be passed"):
        model.fit(X, None)
    with pytest.raises(ValueError, match="inconsistent"):
        model.fit(X, y[:5])
    with pytest.raises(ValueError, match="NaN"):
        model.fit(np.where(np.arange(6) == 0, np.nan, X), y)
    with pytest.raises(DataError, match=r"class 'odd' has 1 rows, but cv=3 needs 3 of each"):
        model.fit(X, np.where(np.arange(60) == 0, "odd", y))
    with pytest.raises(DataError, match=r"needs at least 2 classes"):
        model.fit(X, np.full(60, "red"))
    with pytest.raises(DataError, match="cv=5 needs n_samples >= 5, got n_samples = 4"):
        uq.Calibrated(regressor()).fit(*real_rows(4))
    order = np.argsort(y, kind="stable")
    with pytest.raises(DataError, match="trains without class 'red'"):
        uq.Calibrated(classifier(), cv=KFold(3)).fit(X[order], y[order])
    with pytest.raises(NotFittedError):
        uq.Calibrated(classifier(), cv="prefit").fit(X, y)
    with pytest.raises(NotFittedError):
        uq.Calibrated(classifier()).predict(X)
    with pytest.raises(ValueError, match="features"):
        model.fit(X, y).predict(X[:, :2])


def test_a_label_that_the_estimator_never_saw():
    X, y = class_rows(60)
    model = uq.Calibrated(classifier().fit(X, y), cv="prefit")
    with pytest.raises(DataError, match="'blue'"):
        model.fit(X, np.where(np.arange(60) == 0, "blue", y))


def test_method_that_does_not_fit_the_prediction():
    X, y = class_rows(60)
    with pytest.raises((DataError, TypeError, ValueError), match="Dirichlet"):
        uq.Calibrated(classifier(), "evidence_scale", 0.3).fit(X, y)
    assert isinstance(
        uq.Calibrated(classifier(), "evidence_scale")._recalibrator(), EvidenceScaling
    )


def test_estimator_without_distributions():
    X, y = class_rows(60)
    for wrapper in (uq.Calibrated, uq.Conformal):
        with pytest.raises(ParameterError, match="estimator must have predict_distribution"):
            wrapper(LogisticRegression(), cv=0.3).fit(X, y)


def test_perfect_predictions_end_at_a_bound_and_say_so():
    X = np.repeat(np.eye(2), 40, 0)
    y = X[:, 0].astype(int)
    with pytest.warns(ConvergenceWarning, match="ended at its bound"):
        model = uq.Calibrated(classifier(max_epochs=60), cv=0.5).fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()

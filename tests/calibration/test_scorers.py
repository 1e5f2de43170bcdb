from __future__ import annotations

import inspect
import math
import pickle

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from scipy.stats import norm
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss
from sklearn.model_selection import (
    GridSearchCV,
    cross_val_predict,
    cross_val_score,
    cross_validate,
)
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.fixes import parse_version

import uq
from uq.calibration import class_metrics, real_metrics, scorers
from uq.distributions import CategoricalMixture, NormalMixture
from uq.errors import DataError, ParameterError

QUICK = {"hidden": (8,), "max_epochs": 5, "patience": None, "lr": 0.05, "random_state": 0}


class Tempered(ClassifierMixin, BaseEstimator):
    """Predicts p ∝ (.75, .25)^(1/T) whatever the input, and counts its predictions."""

    calls = 0

    def __init__(self, temperature=1.0):
        self.temperature = temperature

    def fit(self, X, y, sample_weight=None):
        self.classes_ = np.unique(y)
        return self

    def predict_distribution(self, X):
        Tempered.calls += 1
        logits = torch.tensor([0.75, 0.25]).log() / self.temperature
        dist = CategoricalMixture(logits.expand(1, len(X), 2))
        dist.classes = self.classes_
        return dist


class Gaussian(RegressorMixin, BaseEstimator):
    """Predicts N(0, scale²) whatever the input."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def fit(self, X, y, sample_weight=None):
        self.fitted_ = True
        return self

    def predict_distribution(self, X):
        return NormalMixture(torch.zeros(1, len(X)).double(), torch.tensor(self.scale).double())


def coin(n=16):
    """Three rows of "a" for one of "b", in this order throughout."""
    return np.arange(n, dtype=float)[:, None], np.array(["a", "a", "a", "b"] * (n // 4))


@pytest.fixture
def routing():
    with sklearn.config_context(enable_metadata_routing=True):
        yield


# -- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [class_metrics, real_metrics])
def test_every_scalar_metric_has_a_scorer(module):
    metrics = {
        function
        for _, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not function.__name__.startswith("_")
        and inspect.signature(function).return_annotation == "float"
    }
    assert metrics
    assert metrics <= set(scorers._BY_NAME.values())


def test_names_are_those_of_the_metrics_and_of_the_module():
    for name, metric in scorers._BY_NAME.items():
        assert name.removeprefix("neg_") == metric.__name__
    for task in ("classification", "regression"):
        for name, scorer in scorers.all(task).items():
            assert getattr(scorers, name) == scorer == scorers.make(name)


def test_losses_are_negated_and_nothing_else():
    # What is better the lower says so in its docstring, and only that.
    for name, metric in scorers._BY_NAME.items():
        doc = " ".join(metric.__doc__.split()).lower()
        says_lower = "lower is better" in doc or metric is class_metrics.maximum_calibration_error
        if metric is not class_metrics.excess_aurc:  # "0 is a perfect order"
            assert name.startswith("neg_") == says_lower, name


# -- values --------------------------------------------------------------------------------------


def test_classification_scores_equal_the_metrics_called_by_hand():
    X, y = load_wine(return_X_y=True)
    y = np.array(["red", "white", "rose"])[y]  # the classes are not in the order of the numbers
    model = uq.MAPClassifier(**QUICK).fit(X[::2], y[::2])
    X, y = X[1::2], y[1::2]
    dist = model.predict_distribution(X)
    weight = np.random.default_rng(0).uniform(0.1, 3, len(y))
    for name, scorer in scorers.all("classification").items():
        sign = -1 if name.startswith("neg_") else 1
        metric = getattr(class_metrics, name.removeprefix("neg_"))
        assert scorer(model, X, y) == sign * metric(y, dist), name
        assert scorer(model, X, y, weight) == sign * metric(y, dist, sample_weight=weight), name
        assert scorer(model, X, y, weight) != scorer(model, X, y), name
    at = scorers.make("accuracy_at_coverage", coverage=0.3)
    assert at(model, X, y) == class_metrics.accuracy_at_coverage(y, dist, coverage=0.3)
    at = scorers.make("coverage_at_accuracy", accuracy=0.9)
    assert at(model, X, y) == class_metrics.coverage_at_accuracy(y, dist, accuracy=0.9)


def test_regression_scores_equal_the_metrics_called_by_hand():
    X, y = load_diabetes(return_X_y=True)
    model = uq.EnsembleRegressor(n_members=2, noise="heteroscedastic", **QUICK).fit(X[::2], y[::2])
    X, y = X[1:200:2], y[1:200:2]
    dist = model.predict_distribution(X)
    weight = np.random.default_rng(0).uniform(0.1, 3, len(y))
    for name, scorer in scorers.all("regression").items():
        sign = -1 if name.startswith("neg_") else 1
        metric = getattr(real_metrics, name.removeprefix("neg_"), None)
        metric = metric or getattr(class_metrics, name.removeprefix("neg_"))
        assert scorer(model, X, y) == sign * metric(y, dist), name
        assert scorer(model, X, y, weight) == sign * metric(y, dist, sample_weight=weight), name
        assert scorer(model, X, y, weight) != scorer(model, X, y), name
    for changed, metric in (
        (scorers.make("neg_pinball_loss", level=0.1), real_metrics.pinball_loss),
        (scorers.make("interval_coverage", coverage=0.5), real_metrics.interval_coverage),
        (scorers.make("neg_uncertainty_calibration_error", n_bins=3), None),
    ):
        metric = metric or real_metrics.uncertainty_calibration_error
        sign = -1 if changed.name.startswith("neg_") else 1
        assert changed(model, X, y) == sign * metric(y, dist, **dict(changed.parameters))


def test_probabilities_of_scikit_learn_are_read_by_their_labels():
    X, y = load_breast_cancer(return_X_y=True)
    names = np.array(["malignant", "benign"])[y]  # sorted the other way round
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01)).fit(X[::2], names[::2])
    X, names = X[1::2], names[1::2]
    p = model.predict_proba(X)
    # log_loss clips at the precision of a float, which these probabilities stay away from.
    assert p.min() > 1e-15
    nll = scorers.neg_negative_log_likelihood(model, X, names)
    assert nll == pytest.approx(-log_loss(names, p, labels=model.classes_), rel=1e-12)
    brier = scorers.neg_brier_score(model, X, names)
    expected = -brier_score_loss(names, p[:, 1], pos_label=model.classes_[1])
    assert brier == pytest.approx(expected, rel=1e-12)
    assert scorers.accuracy(model, X, names) == model.score(X, names)


@pytest.mark.parametrize("labels", [[True, False], [7, -3], [2.0, -1.0], ["b", "a"]])
def test_labels_of_any_type(labels):
    X, y = load_breast_cancer(return_X_y=True)
    y = np.array(labels)[y]
    model = KNeighborsClassifier().fit(X, y)
    assert scorers.accuracy(model, X, y) == model.score(X, y)
    assert scorers.accuracy(model, X, pd.Series(y)) == model.score(X, y)


def test_calibration_errors_take_the_top_label_unless_told():
    X, y = coin(12)
    y[0] = "b"
    model = Tempered().fit(X, y)  # says "a" with .75; 8 of 12 are
    assert scorers.neg_expected_calibration_error(model, X, y) == pytest.approx(-(0.75 - 8 / 12))
    positive = scorers.make("neg_maximum_calibration_error", kind="positive", n_bins=1)
    assert positive(model, X, y) == pytest.approx(-(4 / 12 - 0.25))
    y = np.where(y == "b", "a", "b")
    # Top label: 4 of 12 right at .75. The second class comes 8 times in 12 at .25, the same gap.
    assert scorers.neg_expected_calibration_error(model, X, y) == pytest.approx(-(0.75 - 4 / 12))


def test_an_undefined_metric_scores_nan():
    X, y = coin(8)
    y[:] = "a"
    model = Tempered().fit(*coin())
    assert math.isnan(scorers.misclassification_auroc(model, X, y))
    found = scorers.battery()(model, X, y)
    assert math.isnan(found["misclassification_auroc"])
    assert found["accuracy"] == 1.0


def test_a_label_of_probability_zero_scores_minus_infinity():
    X = np.array([[0.0], [0.1], [5.0], [5.1]])
    model = KNeighborsClassifier(2).fit(X, [0, 0, 1, 1])
    with pytest.warns(RuntimeWarning, match="probability 0"):
        assert scorers.neg_negative_log_likelihood(model, X, [0, 0, 1, 0]) == -np.inf


# -- estimators ----------------------------------------------------------------------------------


def test_a_pipeline_scores_as_its_parts_do():
    X, y = load_diabetes(return_X_y=True)
    scale = StandardScaler().fit(X)
    inner = uq.MAPRegressor(**QUICK).fit(scale.transform(X), y)
    pipe = make_pipeline(StandardScaler(), uq.MAPRegressor(**QUICK)).fit(X, y)
    expected = scorers.neg_crps(inner, scale.transform(X), y)
    assert scorers.neg_crps(pipe, X, y) == expected
    nested = make_pipeline("passthrough", make_pipeline(pipe)).fit(X, y)
    assert scorers.neg_crps(nested, X, y) == expected
    assert np.isfinite(cross_val_score(pipe, X, y, scoring=scorers.neg_crps, cv=2)).all()


def test_a_pipeline_of_scikit_learn():
    X, y = load_iris(return_X_y=True)
    pipe = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
    expected = -log_loss(y, pipe.predict_proba(X))
    assert scorers.neg_negative_log_likelihood(pipe, X, y) == pytest.approx(expected, rel=1e-12)


def test_tables_and_recalibrated_estimators():
    bunch = load_wine(as_frame=True)
    X = bunch.data.assign(origin=["north", "south"] * 89)
    y = bunch.target.map({0: "red", 1: "white", 2: "rose"})
    model = uq.TableModel(uq.MAPClassifier(**QUICK))
    found = cross_validate(
        uq.Calibrated(model, cv=2), X, y, scoring=scorers.battery(), cv=2, error_score="raise"
    )
    assert (found["test_accuracy"] > 0.8).all()  # chance is .4
    assert (found["test_neg_negative_log_likelihood"] > -np.log(3)).all()
    fitted = model.fit(X, y)
    nll = class_metrics.negative_log_likelihood(y, fitted.predict_distribution(X))
    assert scorers.neg_negative_log_likelihood(fitted, X, y) == -nll


def test_several_targets():
    X, y = load_diabetes(return_X_y=True)
    Y = np.stack([y, -2 * y], 1)
    model = uq.VBLLRegressor(**QUICK).fit(X, Y)
    found = scorers.battery("regression")(model, X, Y)
    assert all(np.isfinite(list(found.values())))
    assert found["neg_rmse"] == -real_metrics.rmse(Y, model.predict_distribution(X))


def test_a_finished_search_is_scored_as_its_best_estimator():
    X, y = coin()
    search = GridSearchCV(Tempered(), {"temperature": [1.0, 9.0]}, cv=2, scoring=scorers.accuracy)
    nested = cross_val_score(search, X, y, scoring=scorers.neg_brier_score, cv=2)
    assert nested == pytest.approx([-0.1875] * 2)  # .25 · .75, predictions being right


def test_an_estimator_without_probabilities_is_refused():
    X, y = load_diabetes(return_X_y=True)
    model = LinearRegression().fit(X, y)
    with pytest.raises(ParameterError, match=r"predict_distribution.*LinearRegression has neither"):
        scorers.neg_rmse(model, X, y)
    with pytest.raises(ParameterError, match="LinearRegression has neither"):
        scorers.battery()(make_pipeline(StandardScaler(), model).fit(X, y), X, y)
    two = MultiOutputClassifier(GaussianNB()).fit(X, np.stack([y > 100, y > 200], 1))
    with pytest.raises(DataError, match="predicts 2 outputs"):
        scorers.accuracy(two, X, np.stack([y > 100, y > 200], 1))


def test_a_metric_of_the_other_task_is_refused():
    X, y = coin()
    with pytest.raises(DataError, match="crps: prediction must be a predictive distribution over"):
        scorers.neg_crps(Tempered().fit(X, y), X, y)
    with pytest.raises(DataError, match="prediction must be a predictive distribution over"):
        scorers.battery("classification")(Gaussian().fit(X, y), X, np.arange(16.0))


# -- scikit-learn --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["neg_negative_log_likelihood", "neg_brier_score"])
def test_a_search_finds_the_right_temperature(name):
    # Each fold holds the labels at 3 : 1, where proper scores are best at T = 1 exactly.
    X, y = coin(40)
    grid = {"temperature": [0.25, 0.8, 1.0, 1.25, 4.0]}
    search = GridSearchCV(Tempered(), grid, scoring=scorers.make(name), cv=5).fit(X, y)
    assert search.best_params_ == {"temperature": 1.0}
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    best = {"neg_negative_log_likelihood": -entropy, "neg_brier_score": -0.1875}[name]
    assert search.best_score_ == pytest.approx(best, rel=1e-6)  # logits are float32


@pytest.mark.parametrize(
    "scorer",
    [
        scorers.neg_negative_log_likelihood,
        scorers.neg_crps,
        scorers.neg_energy_score,
        scorers.neg_interval_score,
        scorers.neg_quantile_calibration_error,
    ],
    ids=lambda s: s.name,
)
def test_a_search_finds_the_right_noise(scorer):
    # Quantiles of N(0, 2²), spread evenly over the folds.
    y = norm.ppf((np.arange(400) + 0.5) / 400, scale=2).reshape(4, 100, order="F").ravel()
    search = GridSearchCV(Gaussian(), {"scale": [1.0, 1.6, 2.0, 2.5, 4.0]}, scoring=scorer, cv=4)
    assert search.fit(y[:, None], y).best_params_ == {"scale": 2.0}


def test_a_search_by_one_score_of_a_battery():
    X, y = coin(40)
    search = GridSearchCV(
        Tempered(),
        {"temperature": [0.25, 1.0, 4.0]},
        scoring=scorers.battery("auto"),
        refit="neg_brier_score",
        cv=2,
    ).fit(X, y)
    assert search.best_params_ == {"temperature": 1.0}
    assert set(scorers.all("classification")) == {
        key.removeprefix("mean_test_") for key in search.cv_results_ if key.startswith("mean_test_")
    }


def test_a_battery_predicts_once_and_agrees_with_its_scorers():
    X, y = coin(40)
    y[::7] = "b"
    given = {"sure": scorers.make("accuracy_at_coverage", coverage=0.5), "all": scorers.accuracy}
    for scoring, count in (("auto", 13), ("classification", 13), (given, 2)):
        Tempered.calls = 0
        found = cross_validate(Tempered(), X, y, scoring=scorers.battery(scoring), cv=4)
        assert Tempered.calls == 4
        alone = scorers.all("classification") if isinstance(scoring, str) else scoring
        assert len(alone) == count
        apart = cross_validate(Tempered(), X, y, scoring=alone, cv=4)
        for key in alone:
            np.testing.assert_array_equal(found[f"test_{key}"], apart[f"test_{key}"])


def test_cross_validation_agrees_with_cross_validated_predictions():
    X, y = load_iris(return_X_y=True)
    model = GaussianNB()
    found = cross_val_score(model, X, y, scoring=scorers.neg_negative_log_likelihood, cv=5)
    p = cross_val_predict(model, X, y, cv=5, method="predict_proba")
    assert found.mean() == pytest.approx(-log_loss(y, p), rel=1e-9)  # the folds are equally large


@pytest.mark.parametrize(
    "scorer",
    [
        scorers.neg_crps,
        scorers.make("neg_expected_calibration_error", n_bins=4, kind="positive"),
        scorers.battery("regression"),
        scorers.battery({"a b": scorers.make("neg_pinball_loss", level=0.1)}),
    ],
    ids=repr,
)
def test_scorers_are_values(scorer):
    assert pickle.loads(pickle.dumps(scorer)) == scorer
    assert clone(scorer) == scorer
    assert eval(repr(scorer), {"scorers": scorers}) == scorer  # the repr is what makes it
    search = GridSearchCV(Gaussian(), {"scale": [1.0]}, scoring=scorer)
    assert clone(search).scoring == scorer
    assert repr(scorer) in repr(search).replace("\n", "")


def test_equal_scorers_are_equal_however_they_were_written():
    a = scorers.make("neg_expected_calibration_error", bins="equal_mass", n_bins=3)
    b = scorers.make(
        "neg_expected_calibration_error", n_bins=3, kind="top_label", bins="equal_mass"
    )
    assert a == b
    assert hash(a) == hash(b)
    assert a != scorers.neg_expected_calibration_error


# -- weights -------------------------------------------------------------------------------------


def test_weights_reach_the_scorer_where_it_asks_for_them(routing):
    X, y = coin(16)
    weight = np.where(y == "b", 3.0, 1.0)  # makes both labels equally heavy
    model = Tempered().set_fit_request(sample_weight=True)

    def accuracy(scorer):
        return cross_val_score(
            model, X, y, scoring=scorer, cv=2, params={"sample_weight": weight}
        ).tolist()

    assert accuracy(scorers.accuracy.set_score_request(sample_weight=True)) == [0.5, 0.5]
    assert accuracy(scorers.accuracy.set_score_request(sample_weight=False)) == [0.75, 0.75]
    with pytest.raises(sklearn.exceptions.UnsetMetadataPassedError, match="sample_weight"):
        accuracy(scorers.accuracy)
    found = cross_validate(
        model,
        X,
        y,
        scoring=scorers.battery().set_score_request(sample_weight="rows"),
        params={"sample_weight": weight, "rows": weight},
        cv=2,
    )
    assert found["test_accuracy"].tolist() == [0.5, 0.5]
    both = {
        "weighted": scorers.accuracy.set_score_request(sample_weight=True),
        "plain": scorers.accuracy.set_score_request(sample_weight=False),
    }
    found = cross_validate(model, X, y, scoring=both, params={"sample_weight": weight}, cv=2)
    assert found["test_weighted"].tolist() == [0.5, 0.5]
    assert found["test_plain"].tolist() == [0.75, 0.75]


def test_a_request_leaves_the_named_scorer_alone(routing):
    changed = scorers.accuracy.set_score_request(sample_weight=True)
    assert changed.weight_request is True
    assert scorers.accuracy.weight_request is None


def test_a_request_without_routing_is_refused():
    with pytest.raises(ParameterError, match="enable_metadata_routing"):
        scorers.accuracy.set_score_request(sample_weight=True)


@pytest.mark.skipif(
    parse_version(sklearn.__version__) < parse_version("1.9"),
    reason="scikit-learn gives weights to the scorers of a search since 1.9",
)
@pytest.mark.parametrize("scoring", [scorers.accuracy, {"accuracy": scorers.accuracy}])
def test_a_search_takes_weights_without_routing(scoring):
    X, y = coin(16)
    refit = "accuracy" if isinstance(scoring, dict) else True
    search = GridSearchCV(Tempered(), {"temperature": [1.0]}, scoring=scoring, refit=refit, cv=2)
    search.fit(X, y, sample_weight=np.where(y == "b", 3.0, 1.0))
    assert search.best_score_ == 0.5


# -- errors --------------------------------------------------------------------------------------


def test_what_cannot_be_made_says_why():
    with pytest.raises(ParameterError, match=r"brier_score is a loss.*use 'neg_brier_score'"):
        scorers.make("brier_score")
    with pytest.raises(ParameterError, match=r"name must be one of accuracy, .*got 'f1'"):
        scorers.make("f1")
    with pytest.raises(ParameterError, match="neg_pinball_loss needs level"):
        scorers.make("neg_pinball_loss")
    with pytest.raises(ParameterError, match="interval_coverage takes coverage, got level"):
        scorers.make("interval_coverage", level=0.1)
    with pytest.raises(ParameterError, match="neg_crps takes no parameters, got n_bins"):
        scorers.make("neg_crps", n_bins=3)
    with pytest.raises(ParameterError, match="task must be"):
        scorers.all("ranking")
    with pytest.raises(ParameterError, match="scoring must be 'auto'"):
        scorers.battery("neg_crps")
    for wrong in ({}, {"a": "accuracy"}):
        with pytest.raises(ParameterError, match="must map keys to scorers of this module"):
            scorers.battery(wrong)


def test_a_wrong_value_is_refused_where_it_is_used():
    X, y = coin()
    scorer = scorers.make("neg_expected_calibration_error", n_bins=0)
    with pytest.raises(ParameterError, match="n_bins must be an integer >= 1, got 0"):
        scorer(Tempered().fit(X, y), X, y)

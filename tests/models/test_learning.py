"""The methods learn: on real data, against scikit-learn's linear models on the same splits."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.datasets import load_digits
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import uq
from tests.contract.estimators import CLASSIFIERS, REGRESSORS, SAMPLERS
from uq.models.registry import estimator_class

FAST_CLASSIFIERS = [c for c in CLASSIFIERS if c[0] not in SAMPLERS]
FAST_REGRESSORS = [c for c in REGRESSORS if c[0] not in SAMPLERS]


@pytest.mark.parametrize("kind", [uq.IVONRegressor, uq.VBLLRegressor, uq.EnsembleRegressor])
def test_uncertainty_grows_away_from_the_data(kind):
    """A gap in x: epistemic deviation larger outside than on the data, and larger in the gap."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-2, -1, 100), rng.uniform(1, 2, 100)])[:, None]
    y = np.sin(2 * x[:, 0]) + 0.1 * rng.normal(size=200)
    model = kind(random_state=0, patience=None, max_epochs=400).fit(x, y)

    def epistemic(low, high):
        grid = np.linspace(low, high, 50)[:, None]
        return float(model.predict_distribution(grid).epistemic.sqrt().mean())

    on_data = 0.5 * (epistemic(-2, -1) + epistemic(1, 2))
    # Deviation of a slope grows with the distance, whatever the posterior.
    assert epistemic(20, 25) > 2 * on_data
    # A mean-field posterior over all weights is known not to widen between clusters of data, and
    # hardly just beside them (Foong et al., NeurIPS 2020, arXiv 1909.00719).
    if kind is not uq.IVONRegressor:
        assert epistemic(4, 5) > 2 * on_data
        assert epistemic(-0.5, 0.5) > 1.2 * on_data


# Not those that claim no such thing: single networks, evidence whose amounts mean little, and SDM
# and a cloud of particles for one layer, which need more rows or epochs for ten classes. A network
# that was pre-trained on tables of ten columns sees ten components of an image.
NO_CLAIM = ("map", "ensemble", "sdm", "evidential", "pbnn", "pfn")


@pytest.mark.parametrize(("method", "task"), [c for c in FAST_CLASSIFIERS if c[0] not in NO_CLAIM])
def test_noise_is_more_uncertain_than_digits(method, task):
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0, stratify=y)
    epochs = 15 if method == "gp" else 60  # its epochs are dear, and few will do
    model = estimator_class(method, task)(random_state=0, max_epochs=epochs).fit(X_train, y_train)
    assert model.score(X_test, y_test) > 0.94
    noise = np.random.default_rng(0).uniform(0, 16, size=(200, 64))
    familiar = model.predict_distribution(X_test).entropy()
    assert model.predict_distribution(noise).entropy().median() > 3 * familiar.median()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["boston", "concrete", "energy", "yacht"])
@pytest.mark.parametrize(("method", "task"), FAST_REGRESSORS)
def test_better_than_least_squares(shared_data, name, method, task):
    """Mean over three of the standard splits, of RMSE and of NLL in the target's unit."""
    data = np.load(shared_data / "uci_regression" / f"{name}.npz")
    ours, theirs = [], []
    for split in range(3):
        train, test = data["train_idx"][split], data["test_idx"][split]
        model = estimator_class(method, task)(random_state=split)
        model.fit(data["X"][train], data["y"][train])
        X, y = data["X"][test], data["y"][test]
        rmse = np.sqrt(((model.predict(X) - y) ** 2).mean())
        ours.append([rmse, -model.log_score(X, y)])
        ols = LinearRegression().fit(data["X"][train], data["y"][train])
        scale = np.std(data["y"][train] - ols.predict(data["X"][train]))
        residual = y - ols.predict(X)
        nll = -norm.logpdf(residual, scale=scale).mean()
        theirs.append([np.sqrt((residual**2).mean()), nll])
    assert (np.mean(ours, 0) < np.mean(theirs, 0)).all(), (ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "task"), FAST_REGRESSORS)
def test_coverage_on_concrete(shared_data, method, task):
    """90 % intervals over five splits (515 rows): within 80 and 99 %."""
    data = np.load(shared_data / "uci_regression" / "concrete.npz")
    inside = []
    for split in range(5):
        train, test = data["train_idx"][split], data["test_idx"][split]
        model = estimator_class(method, task)(random_state=split)
        model.fit(data["X"][train], data["y"][train])
        lower, upper = model.predict_interval(data["X"][test], 0.9)
        inside.append((lower <= data["y"][test]) & (data["y"][test] <= upper))
    assert 0.80 <= np.concatenate(inside).mean() <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["banknote", "segment", "ionosphere", "phoneme"])
@pytest.mark.parametrize(("method", "task"), FAST_CLASSIFIERS)
def test_better_than_logistic_regression(shared_data, name, method, task):
    data = np.load(shared_data / "uci_classification" / f"{name}.npz")
    ours, theirs = [], []
    for fold in range(3):
        test = data["test_fold"] == fold
        model = estimator_class(method, task)(random_state=fold)
        model.fit(data["X"][~test], data["y"][~test])
        ours.append(-model.log_score(data["X"][test], data["y"][test]))
        linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        linear.fit(data["X"][~test], data["y"][~test])
        theirs.append(log_loss(data["y"][test], linear.predict_proba(data["X"][test])))
    assert np.mean(ours) < np.mean(theirs), (ours, theirs)


@pytest.mark.slow
def test_ivon_beats_its_deterministic_twin_on_noisy_labels():
    """300 digits with a tenth of the labels random: lower NLL than MAP on every one of 3 seeds."""
    X, y = load_digits(return_X_y=True)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(X))
        train, test = order[:300], order[300:]
        noisy = y[train].copy()
        noisy[:30] = rng.integers(10, size=30)
        settings = {"random_state": seed, "patience": None, "max_epochs": 200}
        ivon = uq.IVONClassifier(**settings).fit(X[train], noisy)
        twin = uq.MAPClassifier(**settings).fit(X[train], noisy)
        assert ivon.log_score(X[test], y[test]) > twin.log_score(X[test], y[test])
        assert torch.isfinite(ivon.predict_distribution(X[test]).epistemic).all()


@pytest.mark.parametrize("kind", [uq.MAPRegressor, uq.VBLLRegressor])
def test_few_rows_are_not_left_on_a_plateau(kind):
    """60 rows of a cubic: training is counted in steps, not in epochs of one step each."""
    noise, rng = 3.0, np.random.default_rng(0)
    x, x_test = rng.uniform(-4, 4, 60), rng.uniform(-4, 4, 2000)
    y = x**3 + noise * rng.standard_normal(60)
    model = kind(hidden=(32,), random_state=0).fit(x[:, None], y)
    left = np.mean((model.predict(x_test[:, None]) - x_test**3) ** 2)
    # The best straight line leaves E x⁶ − (E x⁴)² / E x², all of the curve.
    assert left < 4**6 * (1 / 7 - 3 / 25) / 4


@pytest.mark.parametrize(
    ("n", "batch_size", "epochs"), [(40, 64, 5000), (160, 64, 1667), (400, None, 1000)]
)
def test_steps_by_default(n, batch_size, epochs):
    """5,000 steps, but for many rows in one batch."""
    X = np.random.default_rng(0).normal(size=(n, 2))
    settings = {"hidden": (), "patience": None, "random_state": 0}
    model = uq.MAPRegressor(batch_size=batch_size, **settings).fit(X, X.sum(1))
    assert model.n_epochs_ == epochs

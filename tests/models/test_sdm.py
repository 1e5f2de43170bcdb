"""SDMClassifier: what it takes as a base, what verify says, files, bad input, digits."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import uq
from uq.errors import DataError, LoadError, ParameterError
from uq.models.sdm_bases import embeddings
from uq.nn.sdm import FeatureNetwork

QUICK = {"max_epochs": 20, "random_state": 0, "exemplar_dim": 16, "lr": 0.01}


@pytest.fixture(scope="module")
def tumours():
    X, y = load_breast_cancer(return_X_y=True)
    return train_test_split(X, np.array(["bad", "good"])[y], random_state=0, stratify=y)


@pytest.fixture(scope="module")
def fitted(tumours):
    X, _, y, _ = tumours
    return uq.SDMClassifier(alpha=0.9, **QUICK).fit(X, y)


# -- verify ----------------------------------------------------------------------------------------


def test_verify_agrees_with_the_prediction_and_its_parts(fitted, tumours):
    _, X_new, y, _ = tumours
    checked = fitted.verify(X_new, n_exemplars=3)
    assert list(checked.index) == list(range(len(X_new)))
    np.testing.assert_array_equal(checked["prediction"], fitted.predict(X_new))
    proba = fitted.predict_proba(X_new).max(1)
    np.testing.assert_allclose(checked["probability"], proba, atol=1e-6)
    assert (checked["lower"] <= checked["probability"] + 1e-12).all()
    assert (checked["upper"] >= checked["probability"] - 1e-12).all()
    q, q_prime = checked["q"].to_numpy(), checked["q_prime"].to_numpy()
    np.testing.assert_allclose(
        q_prime, np.minimum(q, (2.0 + q) ** checked["probability"]), rtol=1e-9
    )
    psi = fitted.psi_[np.searchsorted(fitted.classes_, checked["prediction"])]
    inside = (q_prime >= fitted.q_min_) & (checked["probability"] >= psi)
    np.testing.assert_array_equal(checked["in_region"], inside)
    np.testing.assert_array_equal(checked["abstain"], ~inside)
    np.testing.assert_array_equal(checked["out_of_distribution"], q == 0)
    assert not (checked["in_region_lower"] & ~checked["in_region"]).any()
    assert 0.2 < inside.mean() < 1
    # A prediction rests on rows of the data that was fitted, with their labels.
    for suffix in ("", "_2", "_3"):
        rows = checked[f"exemplar_index{suffix}"]
        np.testing.assert_array_equal(y[rows], checked[f"exemplar_label{suffix}"])
    distances = checked[[f"exemplar_distance{s}" for s in ("", "_2", "_3")]].to_numpy()
    assert (np.diff(distances, axis=1) >= 0).all()
    np.testing.assert_allclose(distances[:, 0], checked["distance"], rtol=1e-9)
    first = fitted.verify(X_new)["exemplar_index"]
    np.testing.assert_array_equal(first, checked["exemplar_index"])


def test_right_answers_are_in_the_region(fitted, tumours):
    _, X_new, _, y_new = tumours
    table = fitted.region_accuracy(X_new, y_new)
    checked = fitted.verify(X_new)
    inside = checked["in_region"].to_numpy()
    right = (checked["prediction"] == y_new).to_numpy()
    assert table.loc[("all", ""), "n"] == len(y_new)
    assert table.loc[("all", ""), "accuracy"] == right[inside].mean()
    bad = y_new == "bad"
    row = table.loc[("true", "bad")]
    assert (row["n"], row["n_in_region"]) == (bad.sum(), (bad & inside).sum())
    assert row["accuracy"] == right[bad & inside].mean()
    said = (checked["prediction"] == "good").to_numpy()
    assert table.loc[("predicted", "good"), "share"] == pytest.approx(inside[said].mean())
    # Held-out rows of each class: no more than two standard errors below alpha.
    for name in ("true", "predicted"):
        for _, row in table.loc[name].iterrows():
            slack = 2 * math.sqrt(0.9 * 0.1 / row["n_in_region"])
            assert row["accuracy"] >= 0.9 - slack


def test_calibration_rows_keep_alpha_in_each_class(fitted, tumours):
    """By construction, on the very rows that calibrated."""
    X, _, y, _ = tumours
    support = set(fitted.verify(X, n_exemplars=1).query("distance == 0")["exemplar_index"])
    assert len(support) == fitted.n_support_
    held = np.array([i for i in range(len(X)) if i not in support])
    assert len(held) == fitted.n_calibration_
    table = fitted.region_accuracy(X[held], y[held])
    assert (table.loc["true", "accuracy"] >= 0.9).all()


def test_region_for_another_alpha_needs_no_fit(fitted, tumours):
    X, X_new, y, _ = tumours
    other = uq.SDMClassifier(alpha=0.8, **QUICK).fit(X, y)
    pd.testing.assert_frame_equal(fitted.verify(X_new, alpha=0.8), other.verify(X_new))
    shares = [fitted.verify(X_new, alpha=a)["in_region"].mean() for a in (0.6, 0.9, 1.0)]
    assert shares[0] >= shares[1] >= shares[2] == 0  # P = 1 is out of reach
    with pytest.raises(ParameterError, match="alpha"):
        fitted.verify(X_new, alpha=0.4)
    with pytest.raises(ParameterError, match="k must be"):
        fitted.verify(X_new, n_exemplars=0)


def test_alpha_out_of_reach_is_an_outcome(tumours, tmp_path):
    X, X_new, y, y_new = tumours
    model = uq.SDMClassifier(alpha=1.0, **QUICK).fit(X, y)
    model.save(tmp_path / "model.uq")
    for m in (model, uq.load(tmp_path / "model.uq")):
        assert m.q_min_ == math.inf
        assert (m.psi_ == math.inf).all()
        assert m.verify(X_new)["abstain"].all()
        assert m.region_accuracy(X_new, y_new)["accuracy"].isna().all()
    assert model.score(X_new, y_new) > 0.9


def test_far_inputs_are_uniform_and_still_named(fitted, tumours):
    _, X_new, *_ = tumours
    far = X_new[:40] * 1e4
    checked = fitted.verify(far)
    assert (checked["d"] == 0).all()
    assert checked["abstain"].all()
    np.testing.assert_allclose(checked["probability"], 0.5)
    proba = fitted.predict_proba(far)
    np.testing.assert_allclose(proba, 0.5, atol=1e-7)
    np.testing.assert_array_equal(fitted.classes_[proba.argmax(1)], checked["prediction"])


def test_region_as_groups_of_the_report(fitted, tumours):
    _, X_new, _, y_new = tumours
    checked = fitted.verify(X_new)
    dist = fitted.predict_distribution(X_new)
    report = uq.calibration.report(dist, y_new, groups=checked["in_region"])
    accuracy = report.groups_frame().query("metric == 'accuracy'").set_index("group")["value"]
    inside = checked["in_region"].to_numpy()
    right = (checked["prediction"] == y_new).to_numpy()
    assert accuracy["True"] == pytest.approx(right[inside].mean())
    assert accuracy["False"] == pytest.approx(right[~inside].mean())


def test_training_makes_neighbours_agree(fitted):
    loss, q = fitted.history_["held_out_loss"], fitted.history_["mean_q"]
    assert len(loss) == len(q) == fitted.n_epochs_
    assert min(loss) < 0.5 * loss[0]
    assert q[-1] > 1.5 * q[0]


def test_more_rounds_keep_the_best(tumours):
    X, _, y, _ = tumours
    one = uq.SDMClassifier(**QUICK).fit(X, y)
    three = uq.SDMClassifier(n_rounds=3, **QUICK).fit(X, y)
    assert min(three.history_["held_out_loss"]) <= min(one.history_["held_out_loss"])


# -- bases -----------------------------------------------------------------------------------------


def trained(X, y):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(X.shape[1], 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 2)
    )
    x = torch.tensor((X - X.mean(0)) / X.std(0), dtype=torch.float32)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), torch.tensor((y == "good").astype(int)))
        loss.backward()
        optimizer.step()
    return net, x.numpy()


@pytest.mark.parametrize("layer", [None, "penultimate", "2"])
def test_base_is_a_network(tumours, tmp_path, layer):
    X, _, y, _ = tumours
    net, x = trained(X, y)
    net.train()  # statistics of the batch norm must not follow
    before = copy.deepcopy(net.state_dict())
    model = uq.SDMClassifier(net, layer=layer, **QUICK).fit(x, y)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    frozen = model.posterior_.frozen.network.state_dict()
    assert all(torch.equal(before[k], v) for k, v in frozen.items())
    assert model.widths_[0] == (2 if layer is None else 24)
    assert model.score(x, y) > 0.95
    model.save(tmp_path / "model.uq")
    with pytest.raises(LoadError, match="base="):
        uq.load(tmp_path / "model.uq")
    torch.manual_seed(5)
    other = nn.Sequential(
        nn.Linear(30, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 2)
    )
    again = uq.load(tmp_path / "model.uq", module=other)
    pd.testing.assert_frame_equal(again.verify(x), model.verify(x))
    # In the frozen network's eval mode: the features are those of plain torch.
    net.eval()
    with torch.no_grad():
        features = net[:3](torch.tensor(x)) if layer else net(torch.tensor(x))
    torch.testing.assert_close(model.posterior_.embed(torch.tensor(x)), features)


def test_base_in_half_precision(tumours):
    X, _, y, _ = tumours
    net, x = trained(X, y)
    model = uq.SDMClassifier(copy.deepcopy(net).half(), layer="2", **QUICK).fit(x, y)
    assert model.posterior_.dtype == torch.float32
    assert model.score(x, y) > 0.95


def test_base_on_images_and_a_dataset():
    X, y = load_digits(return_X_y=True)
    keep = y < 3
    X, y = X[keep].reshape(-1, 8, 8).astype(np.float32) / 16, y[keep]
    net = uq.nn.ConvNet((8, 8), 3)
    model = uq.SDMClassifier(net, layer="features", **QUICK).fit(X, y)
    assert model.score(X, y) > 0.9
    source = TensorDataset(torch.tensor(X), torch.tensor(y))
    by_dataset = uq.SDMClassifier(net, layer="features", **QUICK).fit(source)
    assert by_dataset.score(X, y) > 0.8  # its initial weights are other ones
    trained_with = uq.SDMClassifier(net, layer="features", hidden=(8,), **QUICK).fit(X, y)
    assert trained_with.posterior_.support.shape[1] == 16
    assert trained_with.widths_ == (128, 8)


@pytest.mark.parametrize("kind", [uq.MAPClassifier, uq.VBLLClassifier, uq.EnsembleClassifier])
def test_base_is_a_classifier_of_uq(tumours, tmp_path, kind):
    X, X_new, y, y_new = tumours
    base = kind(hidden=(16,), max_epochs=20, random_state=0).fit(X, y)
    model = uq.SDMClassifier(base, **QUICK).fit(X, y)
    assert model.n_features_in_ == 16
    assert model.score(X_new, y_new) > 0.9
    frame = pd.DataFrame(X_new, index=range(5, 5 + len(X_new)))
    assert list(model.verify(frame.to_numpy()).columns) == list(model.verify(X_new).columns)
    model.save(tmp_path / "model.uq")
    again = uq.load(tmp_path / "model.uq")
    pd.testing.assert_frame_equal(again.verify(X_new), model.verify(X_new))


@pytest.mark.parametrize(
    "kind",
    [uq.SSVIClassifier, uq.ImplicitVIClassifier, uq.ABNNClassifier],
    ids=lambda k: k.__name__,
)
def test_base_whose_weights_are_random(tumours, tmp_path, kind):
    """Features are those of weights that were learned, the same at every call."""
    X, X_new, y, y_new = tumours
    base = kind(hidden=(16,), max_epochs=20, random_state=0).fit(X, y)
    features = embeddings(base, X)
    assert features.shape == (len(X), 16)
    np.testing.assert_array_equal(features, embeddings(base, X))
    if kind is uq.ImplicitVIClassifier:  # its network holds weights that nobody trained
        x = torch.tensor((X - base.x_mean_) / base.x_scale_, dtype=torch.float32)
        body = copy.deepcopy(base.posterior_.network.body)
        with torch.no_grad():
            untrained = FeatureNetwork(body, "penultimate").eval()(x).numpy()
        assert not np.allclose(features, untrained, atol=0.1)
    model = uq.SDMClassifier(base, **QUICK).fit(X, y)
    assert model.score(X_new, y_new) > 0.9
    pd.testing.assert_frame_equal(model.verify(X_new), model.verify(X_new))
    model.save(tmp_path / "model.uq")
    pd.testing.assert_frame_equal(uq.load(tmp_path / "model.uq").verify(X_new), model.verify(X_new))


def test_base_is_a_network_with_noise(tumours):
    X, _, y, _ = tumours
    net, x = trained(X, y)
    model = uq.SDMClassifier(uq.inference.to_abnn(net), layer="2", **QUICK).fit(x, y)
    pd.testing.assert_frame_equal(model.verify(x), model.verify(x))


def test_base_knows_a_frame(tumours):
    X, _, y, _ = tumours
    frame = pd.DataFrame(X, index=range(5, 5 + len(X))).add_prefix("f")
    base = uq.MAPClassifier(hidden=(8,), max_epochs=5, random_state=0).fit(frame, y)
    model = uq.SDMClassifier(base, **QUICK).fit(frame, y)
    assert list(model.verify(frame[:9]).index) == list(range(5, 14))
    assert list(model.predict_distribution(frame[:9]).to_frame().index) == list(range(5, 14))


def test_base_is_a_classifier_of_scikit_learn(tumours, tmp_path):
    X, X_new, y, y_new = tumours
    for last in (LogisticRegression(), LinearSVC()):
        base = make_pipeline(StandardScaler(), last).fit(X, y)
        model = uq.SDMClassifier(FrozenEstimator(base), **QUICK).fit(X, y)
        assert model.score(X_new, y_new) > 0.9
        assert len(cross_val_predict(model, X, y, cv=2)) == len(X)
        model.save(tmp_path / "model.uq")
        again = uq.load(tmp_path / "model.uq", module=base)
        np.testing.assert_array_equal(again.predict_proba(X_new), model.predict_proba(X_new))


def test_bad_bases(tumours):
    X, _, y, _ = tumours
    with pytest.raises(NotFittedError):
        uq.SDMClassifier(uq.MAPClassifier(), **QUICK).fit(X, y)
    with pytest.raises(ParameterError, match="base must be"):
        uq.SDMClassifier("resnet", **QUICK).fit(X, y)
    with pytest.raises(ParameterError, match="layer is a part of base"):
        uq.SDMClassifier(layer="2", **QUICK).fit(X, y)
    with pytest.raises(ParameterError, match="module must be None"):
        uq.SDMClassifier(nn.Linear(30, 4), module=nn.Linear(4, 4), **QUICK).fit(X, y)
    with pytest.raises(ParameterError, match="'nine' is not in the network; it has '0'"):
        uq.SDMClassifier(nn.Sequential(nn.Linear(30, 4)), layer="nine", **QUICK).fit(X, y)
    with pytest.raises(ParameterError, match="needs a linear layer"):
        FeatureNetwork(nn.Sequential(nn.ReLU()), "penultimate")
    with pytest.raises(ParameterError, match="base fails on an input"):
        uq.SDMClassifier(nn.Linear(29, 4), **QUICK).fit(X, y)
    lines = LogisticRegression(max_iter=5000).fit(X / X.max(0), y)
    with pytest.raises(ParameterError, match="layer needs a base with a network"):
        uq.SDMClassifier(lines, layer="2", **QUICK).fit(X, y)
    source = TensorDataset(torch.tensor(X), torch.tensor(y == "good"))
    with pytest.raises(DataError, match="not a TensorDataset"):
        uq.SDMClassifier(lines, **QUICK).fit(source)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", 0.5),
        ("alpha", 1.2),
        ("alpha", "high"),
        ("exemplar_dim", 0),
        ("n_rounds", 0),
        ("n_rounds", 1.5),
        ("layer", 3),
    ],
)
def test_arguments_are_named(tumours, name, value):
    X, _, y, _ = tumours
    with pytest.raises(ParameterError, match=name):
        uq.SDMClassifier(**{**QUICK, name: value}).fit(X, y)


# -- rows ------------------------------------------------------------------------------------------


def test_copies_are_one_row():
    """Copied rows change nothing but weights; they cannot stand on both sides of the split."""
    X, y = load_wine(return_X_y=True)
    twice = uq.SDMClassifier(**QUICK).fit(np.tile(X, (2, 1)), np.tile(y, 2))
    assert twice.n_support_ + twice.n_calibration_ == len(X)
    assert set(twice.posterior_.cal_weight.tolist()) == {2}
    assert twice.verify(X)["exemplar_index"].max() < len(X)


def test_positions_count_the_rows_of_weight_0():
    X, y = load_wine(return_X_y=True)
    weight = (np.arange(len(X)) % 3 > 0).astype(float)
    model = uq.SDMClassifier(**QUICK).fit(X, y, weight)
    checked = model.verify(X[weight > 0])
    same = checked["distance"] == 0
    np.testing.assert_array_equal(
        checked["exemplar_index"][same], np.flatnonzero(weight > 0)[same.to_numpy()]
    )
    assert same.sum() == model.n_support_


@pytest.mark.parametrize("loads", [False, True])
def test_positions_are_those_of_a_dataset(loads):
    """Batches come shuffled; positions do not."""
    X, y = load_wine(return_X_y=True)
    x = ((X - X.mean(0)) / X.std(0)).astype(np.float32)
    source = TensorDataset(torch.tensor(x), torch.tensor(y))
    source = DataLoader(source, 50, shuffle=True, drop_last=True) if loads else source
    model = uq.SDMClassifier(**QUICK).fit(source)
    assert model.n_support_ + model.n_calibration_ == len(x)
    checked = model.verify(x).query("distance < 1e-5")
    assert len(checked) == model.n_support_
    np.testing.assert_array_equal(checked["exemplar_index"], checked.index)
    np.testing.assert_array_equal(checked["exemplar_label"], y[checked.index])


def test_a_class_of_one_row_is_said_to_rule_out_every_answer():
    X, y = load_wine(return_X_y=True)
    y = y.copy()
    y[0] = 7
    with pytest.warns(UserWarning, match="no calibration row of class 7"):
        model = uq.SDMClassifier(**QUICK).fit(X, y)
    checked = model.verify(X)
    assert checked["abstain"].all()
    assert (checked["d"] == 0).all()
    with pytest.raises(DataError, match="no class has two distinct rows"):
        uq.SDMClassifier(**QUICK).fit(X[[0, 100, 0]], y[[0, 100, 0]])


def test_columns_without_variance():
    X, y = load_wine(return_X_y=True)
    X = np.column_stack([X, np.full(len(X), 3.0)])
    assert uq.SDMClassifier(**QUICK).fit(X, y).score(X, y) > 0.9
    constant = np.zeros((20, 2))
    constant[0] = 1
    with pytest.warns(UserWarning, match="no calibration row"):
        model = uq.SDMClassifier(nn.Identity(), **QUICK).fit(constant, np.arange(20) % 2)
    assert np.isfinite(model.predict_proba(constant)).all()


# -- digits ----------------------------------------------------------------------------------------

# Four classes of two digits each; 1 and 2 are near OOD, inverted images and noise far.
PAIRS = {3: 0, 8: 0, 5: 1, 9: 1, 4: 2, 7: 2, 0: 3, 6: 3}


@pytest.mark.statistical
@pytest.mark.parametrize("seed", range(3))
def test_digits_and_what_is_none_of_them(seed):
    """In the region: alpha in each class, within two standard errors, and next to nothing OOD."""
    alpha = 0.9
    X, digit = load_digits(return_X_y=True)
    X, known = X / 16, np.isin(digit, list(PAIRS))
    y = np.array([PAIRS[d] for d in digit[known]])
    X_fit, X_test, y_fit, y_test = train_test_split(X[known], y, test_size=240, random_state=seed)
    model = uq.SDMClassifier(
        nn.Identity(), alpha=alpha, exemplar_dim=32, lr=1e-3, max_epochs=60, random_state=seed
    ).fit(X_fit, y_fit)
    table = model.region_accuracy(X_test, y_test)
    assert 0.1 < table.loc[("all", ""), "share"] < 1
    for name in ("true", "predicted"):
        for _, row in table.loc[name].iterrows():
            if row["n_in_region"]:
                slack = 2 * math.sqrt(alpha * (1 - alpha) / row["n_in_region"])
                assert row["accuracy"] >= alpha - slack
    noise = np.random.default_rng(seed).uniform(size=(500, 64))
    for ood in (X[~known], 1 - X_test, noise):
        x, _ = model._posterior_at(ood)
        softmax = model.posterior_.judge(x).logits.softmax(1).amax(1) >= alpha
        share = model.verify(ood)["in_region"].mean()
        assert share <= 0.01
        assert share <= 0.1 * float(softmax.double().mean())
    q, loss = model.history_["mean_q"], model.history_["held_out_loss"]
    assert q[-1] > 2 * q[0]
    assert loss[-1] < 0.5 * loss[0]
    assert model.predict_distribution(X_test).entropy().median() < 0.7 * math.log(4)
    entropy = model.predict_distribution(noise).entropy().median()
    assert float(entropy) == pytest.approx(math.log(4))

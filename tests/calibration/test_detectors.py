from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import null_space
from scipy.spatial.distance import cdist, mahalanobis
from scipy.special import logsumexp, softmax
from scipy.stats import chi2, chisquare, ortho_group
from sklearn.base import clone
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

from uq.calibration import (
    MahalanobisDetector,
    NearestNeighboursDetector,
    RelativeMahalanobisDetector,
    ResidualDetector,
    auroc,
    detectors,
    free_energy,
    max_logit,
)
from uq.data import load_dataset
from uq.errors import DataError, ParameterError

GAUSSIAN = [MahalanobisDetector, RelativeMahalanobisDetector]
DETECTORS = [
    MahalanobisDetector(),
    RelativeMahalanobisDetector(),
    NearestNeighboursDetector(k=3),
    ResidualDetector(),
]


@pytest.fixture
def data():
    """Features of 3 correlated classes of unequal size, their labels, and features to judge."""
    return make_data(0)


def make_data(seed, d=6):
    rng = np.random.default_rng(seed)
    y = np.repeat([0, 1, 2], [30, 50, 20])
    mix = rng.normal(size=(d, d)) + 2 * np.eye(d)
    x = 5 + (rng.normal(size=(3, d)) * 3)[y] + rng.normal(size=(100, d)) @ mix
    return x, y, 5 + 4 * rng.normal(size=(40, d))


def moments(x, y):
    """Class means and the covariance within classes, dividing by n."""
    means = np.stack([x[y == c].mean(0) for c in np.unique(y)])
    within = sum((y == c).mean() * np.cov(x[y == c].T, bias=True) for c in np.unique(y))
    return means, within


# -- logits ------------------------------------------------------------------------------------


@given(st.integers(0, 2**20), st.floats(0.1, 10))
def test_scores_of_logits_are_their_formulas(seed, temperature):
    logits = 3 * np.random.default_rng(seed).normal(size=(5, 4))
    expected = -temperature * np.log(np.exp(logits / temperature).sum(1))
    np.testing.assert_allclose(free_energy(logits, temperature), expected, rtol=1e-12)
    np.testing.assert_array_equal(max_logit(logits), -logits.max(1))
    # Adding c to all logits lowers both scores by c, unlike a score of the probabilities.
    np.testing.assert_allclose(free_energy(logits + 7, temperature), expected - 7, rtol=1e-11)


def test_free_energy_of_large_logits_and_of_a_low_temperature():
    np.testing.assert_allclose(free_energy([[1e4, 0.0], [-1e4, -1e4]]), [-1e4, 1e4 - np.log(2)])
    np.testing.assert_allclose(free_energy([[1.0, 3.0]], 1e-3), max_logit([[1.0, 3.0]]))


def test_logits_come_as_tensors_of_any_kind():
    logits = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    for score in (free_energy, max_logit):
        assert score(logits).dtype == np.float64
        np.testing.assert_array_equal(score(logits), score([[1.0, 2.0]]))


@pytest.mark.parametrize("score", [free_energy, max_logit])
def test_bad_logits_are_named(score):
    name = score.__name__
    with pytest.raises(DataError, match=f"{name}: logits is NaN or infinite at row 1"):
        score([[0.0, 1.0], [np.nan, 0.0]])
    for bad in ([0.0, 1.0], [[0.0], [1.0]], np.empty((0, 2))):
        with pytest.raises(DataError, match=rf"{name}: logits must have shape \(n, d\) .* d >= 2"):
            score(bad)
    with pytest.raises(DataError, match=f"{name}: logits must hold numbers"):
        score([["a", "b"]])


@pytest.mark.parametrize("temperature", [0, -1.0, np.nan, np.inf, "1"])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ParameterError, match="temperature must be > 0, got"):
        free_energy([[0.0, 1.0]], temperature)


# -- Mahalanobis -------------------------------------------------------------------------------


def test_mahalanobis_agrees_with_scipy(data):
    x, y, new = data
    means, within = moments(x, y)
    inverse = np.linalg.inv(within)
    expected = [min(mahalanobis(r, m, inverse) for m in means) ** 2 for r in new]
    found = MahalanobisDetector(shrinkage=0).fit(x, np.array(["b", "a", "c"])[y]).score(new)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    one = MahalanobisDetector(shrinkage=0.0).fit(x).score(new)
    inverse = np.linalg.inv(np.cov(x.T, bias=True))
    np.testing.assert_allclose(one, [mahalanobis(r, x.mean(0), inverse) ** 2 for r in new])


@pytest.mark.statistical
def test_distances_of_gaussian_classes_follow_the_chi_square_law():
    n, d = 40_000, 5
    rng = np.random.default_rng(1)
    mix = np.eye(d) + 0.3 * rng.normal(size=(d, d))

    def draw():
        y = np.arange(n) % 2
        return (rng.normal(size=(n, d)) + 40 * y[:, None]) @ mix, y  # far apart

    score = MahalanobisDetector(shrinkage=0).fit(*draw()).score(draw()[0])
    # The mean has the error of the drawn distances and of the covariance, √(2d/n) each.
    assert score.mean() == pytest.approx(d, abs=5 * np.sqrt(2 * 2 * d / n))
    counts = np.histogram(chi2(d).cdf(score), 20, (0, 1))[0]
    assert chisquare(counts).pvalue > 1e-6


def test_shrinkage_is_that_of_ledoit_and_wolf_and_works_for_more_features_than_rows(data):
    x, y, new = make_data(3, d=150)
    means, _ = moments(x, y)
    covariance, weight = ledoit_wolf(x - means[y], assume_centered=True)
    detector = MahalanobisDetector().fit(x, y)
    assert detector.gaussians_.shrinkage == pytest.approx(weight)
    assert 0 < weight < 1
    np.testing.assert_allclose(detector.gaussians_.covariance, covariance, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(detector.gaussians_.means, means)
    squared = cdist(new, means, "mahalanobis", VI=np.linalg.inv(covariance)).min(1) ** 2
    np.testing.assert_allclose(detector.score(new), squared, rtol=1e-8)


def test_full_shrinkage_is_the_euclidean_distance(data):
    x, y, new = data
    means, within = moments(x, y)
    found = MahalanobisDetector(shrinkage=1).fit(x, y).score(new)
    np.testing.assert_allclose(found, cdist(new, means).min(1) ** 2 / np.diag(within).mean())


@pytest.mark.parametrize("detector", GAUSSIAN)
@given(seed=st.integers(0, 2**20))
def test_affine_maps_leave_mahalanobis_unchanged(detector, seed):
    x, y, new = make_data(seed)
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(6, 6)) + 4 * np.eye(6), 100 * rng.normal(size=6)
    plain = detector(shrinkage=0).fit(x, y).score(new)
    mapped = detector(shrinkage=0).fit(x @ a + b, y).score(new @ a + b)
    np.testing.assert_allclose(mapped, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("detector", GAUSSIAN)
def test_rows_are_scored_alike_in_one_piece_and_in_many(detector, data, monkeypatch):
    x, y, new = data
    fitted = detector().fit(x, y)
    whole = fitted.score(new)
    monkeypatch.setattr(detectors, "_CHUNK_ELEMENTS", 42)  # 7 rows of 6 features
    np.testing.assert_allclose(fitted.score(new), whole, rtol=1e-12)


@pytest.mark.parametrize("detector", GAUSSIAN)
def test_many_classes_are_scored_as_few(detector):
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(300), 3)
    x = rng.normal(size=(300, 2))[y] + 0.1 * rng.normal(size=(900, 2))
    _, within = moments(x, y)
    fitted = detector(shrinkage=0).fit(x, y)
    expected = cdist(x, moments(x, y)[0], "mahalanobis", VI=np.linalg.inv(within)).min(1) ** 2
    if detector is RelativeMahalanobisDetector:
        inverse = np.linalg.inv(np.cov(x.T, bias=True))
        expected -= cdist(x, x.mean(0)[None], "mahalanobis", VI=inverse)[:, 0] ** 2
    np.testing.assert_allclose(fitted.score(x), expected, rtol=1e-9, atol=1e-9)


def test_relative_mahalanobis_is_the_difference_of_the_papers(data):
    x, y, new = data
    means, within = moments(x, y)
    near = cdist(new, means, "mahalanobis", VI=np.linalg.inv(within)).min(1) ** 2
    inverse = np.linalg.inv(np.cov(x.T, bias=True))
    background = cdist(new, x.mean(0)[None], "mahalanobis", VI=inverse)[:, 0] ** 2
    found = RelativeMahalanobisDetector(shrinkage=0).fit(x, y).score(new)
    np.testing.assert_allclose(found, near - background, rtol=1e-9)


def test_relative_mahalanobis_finds_what_lies_between_classes():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 500)
    x, within, between = rng.normal(size=(3, 1000, 50))
    for inside in (x, within):
        inside[:, 0] += np.where(y == 0, -4.0, 4.0)
    relative, plain = RelativeMahalanobisDetector().fit(x, y), MahalanobisDetector().fit(x, y)
    assert auroc(plain.score(within), plain.score(between)) < 0.9  # drowned by 49 other features
    assert auroc(relative.score(within), relative.score(between)) > 0.99


@pytest.mark.parametrize("shrinkage", [0, 0.3, "auto"])
def test_relative_mahalanobis_ignores_what_no_class_differs_in(shrinkage):
    x, y, new = make_data(0)
    y[y == 2] = 0
    detector = RelativeMahalanobisDetector(shrinkage).fit(x, y)
    classes = detector.gaussians_
    # Moves along v leave all discriminants as they are where v = Σu and u is normal to μ_1 − μ_0.
    u = null_space(classes.means[1:] - classes.means[0])[:, 0]
    far = new + 100 * classes.covariance @ u
    np.testing.assert_allclose(detector.score(far), detector.score(new), rtol=1e-6, atol=1e-6)
    assert MahalanobisDetector(shrinkage).fit(x, y).score(far).min() > 1e3


@pytest.mark.parametrize("detector", GAUSSIAN)
def test_a_covariance_without_inverse_is_refused(detector, data):
    x, y, _ = data
    constant, doubled = x.copy(), x.copy()
    constant[:, 2] = 7.0
    doubled[:, 2] = 3 * x[:, 1] - x[:, 0]
    wide = make_data(0, d=150)[0]
    for bad in (constant, doubled, wide):
        with pytest.raises(DataError, match=r"within classes cannot be inverted.*shrinkage='auto'"):
            detector(shrinkage=0).fit(bad, y)
        assert np.isfinite(detector().fit(bad, y).score(bad)).all()
    with pytest.raises(DataError, match="cannot be inverted"):
        detector().fit(np.ones((100, 3)), y)


@pytest.mark.parametrize("detector", GAUSSIAN)
def test_bad_classes_are_named(detector, data):
    x, y, _ = data
    name = detector.__name__
    with pytest.raises(DataError, match=rf"{name}.fit: y has shape \(99,\), expected \(100,\)"):
        detector().fit(x, y[1:])
    y = y.astype(float)
    y[0] = 9.0
    with pytest.raises(DataError, match=r"class .*9.0.* has one row"):
        detector().fit(x, y)
    y[3] = np.nan
    with pytest.raises(DataError, match=f"{name}.fit: y is NaN or infinite at row 3"):
        detector().fit(x, y)
    for shrinkage in (-0.1, 1.1, np.nan, "ledoit", None):
        with pytest.raises(ParameterError, match=r"'auto' or a number in \[0, 1\], got"):
            detector(shrinkage=shrinkage).fit(x, data[1])


def test_relative_mahalanobis_needs_two_classes(data):
    with pytest.raises(DataError, match=r"y holds one class.*MahalanobisDetector"):
        RelativeMahalanobisDetector().fit(data[0], np.zeros(100))


# -- neighbours --------------------------------------------------------------------------------


@given(st.integers(0, 2**20), st.integers(1, 12), st.sampled_from([2, 30]))
def test_neighbours_agree_with_brute_force(seed, k, d):
    rng = np.random.default_rng(seed)
    x, new = rng.normal(size=(12, d)), rng.normal(size=(5, d))
    unit, new_unit = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, new))
    expected = np.sort(cdist(new_unit, unit))[:, k - 1]
    found = NearestNeighboursDetector(k=k).fit(x).score(new)
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_neighbours_judge_directions_only(data):
    x, _, new = data
    length = np.random.default_rng(0).uniform(0.1, 10, size=(100, 1))
    found = NearestNeighboursDetector(k=4).fit(x * length).score(new / 3)
    expected = NearestNeighboursDetector(k=4).fit(x).score(new)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    extreme = NearestNeighboursDetector(k=4).fit(1e300 * x).score(1e-300 * new)
    np.testing.assert_allclose(extreme, expected, rtol=1e-10)


def test_a_row_of_zeros_lies_at_distance_one(data):
    x, _, _ = data
    assert NearestNeighboursDetector().fit(x).score(np.zeros((2, 6))).tolist() == [1.0, 1.0]


def test_neighbours_need_as_many_rows(data):
    assert NearestNeighboursDetector(k=100).fit(data[0]).score(data[2]).shape == (40,)
    with pytest.raises(DataError, match="k=101 needs as many rows of features, got 100"):
        NearestNeighboursDetector(k=101).fit(data[0])
    for k in (0, 2.0, None, True):
        with pytest.raises(ParameterError, match="k must be an integer >= 1, got"):
            NearestNeighboursDetector(k=k).fit(data[0])


# -- residual ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_components", [1, 3, 5])
def test_residual_agrees_with_an_explicit_projection(data, n_components):
    x, y, new = data
    pca = PCA(n_components).fit(x)
    expected = np.linalg.norm(new - pca.inverse_transform(pca.transform(new)), axis=1)
    detector = ResidualDetector(n_components)
    np.testing.assert_allclose(detector.fit(x, y).score(new), expected, rtol=1e-9)
    assert detector.complement_.shape == (6, 6 - n_components)
    origin = np.arange(6.0)
    basis = np.linalg.svd(x - origin)[2][n_components:]
    expected = np.linalg.norm((new - origin) @ basis.T, axis=1)
    found = ResidualDetector(n_components, origin=origin).fit(x).score(new)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(("d", "n_components"), [(2, 1), (9, 4), (768, 512)])
def test_the_default_dimension_is_the_papers(d, n_components):
    x = np.random.default_rng(0).normal(size=(n_components + 1, d))
    assert ResidualDetector().fit(x).complement_.shape == (d, d - n_components)


def test_the_default_dimension_of_wide_features():
    assert ResidualDetector()._dimension("fit", 1001, 2048) == 1000
    assert ResidualDetector()._dimension("fit", 1001, 2047) == 512
    with pytest.raises(DataError, match="n_components=1000 needs more rows than that, got 1000"):
        ResidualDetector()._dimension("fit", 1000, 2048)


def test_the_virtual_logit_is_the_papers():
    x, _, new = make_data(1)
    rng = np.random.default_rng(1)
    w, b = rng.normal(size=(3, 6)), rng.normal(size=3)
    origin = -np.linalg.pinv(w) @ b
    np.testing.assert_allclose(w @ origin + b, 0, atol=1e-12)
    logits, new_logits = x @ w.T + b, new @ w.T + b
    detector = ResidualDetector(2, origin=origin).fit(x, logits=logits)
    found = detector.score(new, logits=new_logits)

    principal = np.linalg.svd(x - origin)[2][:2]
    rest = null_space(principal)
    train, judged = (np.linalg.norm((a - origin) @ rest, axis=1) for a in (x, new))
    alpha = logits.max(1).sum() / train.sum()
    assert detector.alpha_ == pytest.approx(alpha, rel=1e-10)
    probability = softmax(np.c_[new_logits, alpha * judged], axis=1)[:, -1]
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), probability, rtol=1e-8, atol=1e-300)
    np.testing.assert_allclose(found, alpha * judged - logsumexp(new_logits, axis=1), rtol=1e-9)


def test_logits_belong_to_both_fit_and_score(data):
    x, _, new = data
    logits = np.abs(x[:, :3])
    plain = ResidualDetector().fit(x)
    virtual = ResidualDetector().fit(x, logits=logits)
    with pytest.raises(ParameterError, match=r"logits need fit\(features, logits=...\) first"):
        plain.score(new, logits=new[:, :3])
    with pytest.raises(ParameterError, match="logits are needed, as they were given to fit"):
        virtual.score(new)
    with pytest.raises(DataError, match="logits have 39 rows, features have 40"):
        virtual.score(new, logits=new[1:, :3])
    with pytest.raises(DataError, match="fit: logits have 99 rows, features have 100"):
        ResidualDetector().fit(x, logits=logits[1:])
    assert virtual.fit(x).alpha_ is None


def test_logits_that_cannot_set_the_scale_are_refused(data):
    x, _, _ = data
    with pytest.raises(DataError, match="expected > 0; give the outputs before the softmax"):
        ResidualDetector().fit(x, logits=np.log(softmax(x, axis=1)))
    turn = ortho_group.rvs(6, random_state=0)  # leaves a residual of the size of rounding
    flat = (x * [1, 1, 1, 0, 0, 0]) @ turn
    with pytest.raises(DataError, match="no residual is left to scale; lower n_components"):
        ResidualDetector(3).fit(flat, logits=np.abs(x))
    # The residual alone still finds what leaves the subspace.
    outside = flat + 2 * turn[5]
    np.testing.assert_allclose(ResidualDetector(3).fit(flat).score(outside), 2)


def test_a_residual_needs_room(data):
    x, _, _ = data
    with pytest.raises(ParameterError, match="n_components must be < 6, the number of features"):
        ResidualDetector(6).fit(x)
    with pytest.raises(ParameterError, match="n_components must be an integer >= 1, got 0"):
        ResidualDetector(0).fit(x)
    with pytest.raises(DataError, match="n_components=5 needs more rows than that, got 5"):
        ResidualDetector(5).fit(x[:5])
    with pytest.raises(DataError, match=r"features must have shape \(n, d\) .* d >= 2"):
        ResidualDetector().fit(x[:, :1])
    for origin in (np.zeros(5), [np.nan] * 6):
        with pytest.raises(ParameterError, match=r"origin needs shape \(6,\) and finite values"):
            ResidualDetector(origin=origin).fit(x)


# -- all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", DETECTORS)
@given(seed=st.integers(0, 2**20))
def test_rotations_leave_scores_unchanged(detector, seed):
    x, y, new = make_data(seed)
    turn = ortho_group.rvs(6, random_state=seed)
    plain = clone(detector).fit(x, y).score(new)
    np.testing.assert_allclose(
        clone(detector).fit(x @ turn, y).score(new @ turn), plain, rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_order_of_rows_does_not_matter(detector, data):
    x, y, new = data
    order = np.random.default_rng(0).permutation(100)
    plain = clone(detector).fit(x, y)
    shuffled = clone(detector).fit(x[order], y[order])
    np.testing.assert_allclose(shuffled.score(new), plain.score(new), rtol=1e-9)
    np.testing.assert_allclose(plain.score(new[::-1])[::-1], plain.score(new), rtol=1e-12)
    np.testing.assert_allclose(plain.score(new[3:4]), plain.score(new)[3:4], rtol=1e-7)


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_detector_is_an_estimator_of_scikit_learn(detector, data):
    x, y, new = data
    detector = clone(detector)
    with pytest.raises(NotFittedError):
        detector.score(new)
    before = x.copy()
    expected = detector.fit(x, y).score(new)
    assert expected.shape == (40,)
    assert expected.dtype == np.float64
    np.testing.assert_array_equal(x, before)
    assert detector.n_features_in_ == 6
    for copied in (pickle.loads(pickle.dumps(detector)), clone(detector).fit(x, y)):
        np.testing.assert_array_equal(copied.score(new), expected)
    assert type(detector)(**detector.get_params()).get_params() == detector.get_params()
    # A second fit is a fresh one.
    detector.fit(x[:, :4] - 1, y)
    np.testing.assert_array_equal(detector.fit(x, y).score(new), expected)


@pytest.mark.parametrize("detector", DETECTORS)
def test_features_come_in_any_container(detector, data):
    x, y, new = (np.float32(data[0]), data[1], np.float32(data[2]))
    expected = clone(detector).fit(x.astype(float), y).score(new.astype(float))
    for wrap in (np.asarray, torch.tensor, pd.DataFrame, np.ndarray.tolist):
        labels = torch.tensor(y) if wrap is torch.tensor else y
        found = clone(detector).fit(wrap(x), labels).score(wrap(new))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("detector", DETECTORS)
def test_bad_features_are_named(detector, data):
    x, y, new = data
    name = type(detector).__name__
    fitted = clone(detector).fit(x, y)
    broken = x.copy()
    broken[7, 1] = np.nan
    for act, what in ((lambda f: clone(detector).fit(f, y), "fit"), (fitted.score, "score")):
        with pytest.raises(DataError, match=f"{name}.{what}: features is NaN or infinite at row 7"):
            act(broken)
        for bad in (x[0], x[None], x[:0]):
            with pytest.raises(DataError, match=rf"{name}.{what}: features must have shape \(n, d"):
                act(bad)
        with pytest.raises(DataError, match=f"{name}.{what}: features must hold numbers"):
            act([["a", "b"]])
    with pytest.raises(DataError, match="must have 6 columns, as in fit, got 5"):
        fitted.score(new[:, :5])


@pytest.mark.parametrize("name", ["MahalanobisDetector", "RelativeMahalanobisDetector"])
def test_mahalanobis_orders_inputs_as_pytorch_ood_does(name, data):
    peer = pytest.importorskip("pytorch_ood", exc_type=ImportError).detector
    x, y, new = data
    theirs = {"MahalanobisDetector": peer.Mahalanobis, "RelativeMahalanobisDetector": peer.RMD}
    other = theirs[name](None).fit_features(torch.tensor(x).float(), torch.tensor(y))
    expected = other.predict_features(torch.tensor(new).float()).double().numpy()
    found = getattr(detectors, name)(shrinkage=0).fit(x, y).score(new)
    # Theirs leaves the scatter undivided by n, which rescales all scores alike.
    np.testing.assert_allclose(found / found.std(), expected / expected.std(), rtol=2e-3)


def test_other_scores_agree_with_pytorch_ood(data):
    peer = pytest.importorskip("pytorch_ood", exc_type=ImportError).detector
    x, y, new = data
    w, b = np.random.default_rng(0).normal(size=(3, 6)), np.ones(3)
    logits, new_logits = x @ w.T + b, torch.tensor(new @ w.T + b)
    train, judged = torch.tensor(x).float(), torch.tensor(new).float()
    pairs = [
        (free_energy(new_logits, 2.0), peer.EnergyBased.score(new_logits, 2.0)),
        (max_logit(new_logits), peer.MaxLogit.score(new_logits)),
        (
            NearestNeighboursDetector(k=7).fit(x).score(new),
            peer.KNN(None, k=7).fit_features(train, torch.tensor(y)).predict_features(judged),
        ),
        (
            ResidualDetector(3, origin=-np.linalg.pinv(w) @ b)
            .fit(x, logits=logits)
            .score(new, logits=new_logits),
            peer.ViM(None, 3, torch.tensor(w).float(), torch.tensor(b).float())
            .fit_features(train, torch.tensor(y))
            .predict_features(judged),
        ),
    ]
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected.double().numpy(), rtol=1e-4, atol=1e-5)


# -- real data ---------------------------------------------------------------------------------


def compare_detectors(x, y, new, ood):
    """AUROC of each score, on features and on the logits of a linear classifier of them."""
    classifier = LogisticRegression(max_iter=300).fit(x, y)
    logits, new_logits, ood_logits = (classifier.decision_function(a) for a in (x, new, ood))
    fitted = {type(d).__name__: clone(d).fit(x, y) for d in DETECTORS}
    found = {name: auroc(d.score(new), d.score(ood)) for name, d in fitted.items()}
    vim = ResidualDetector().fit(x, logits=logits)
    found["ViM"] = auroc(vim.score(new, logits=new_logits), vim.score(ood, logits=ood_logits))
    for score in (free_energy, max_logit):
        found[score.__name__] = auroc(score(new_logits), score(ood_logits))
    return found


def test_photo_patches_are_told_from_digits():
    data = load_dataset("digits")
    x, ood = data.X.to_numpy() / 16, data.ood.to_numpy() / 16
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1200], order[1200:]
    found = compare_detectors(x[train], data.y.to_numpy()[train], x[test], ood)
    # Chance is 0.5, with a standard error of 0.02 at 597 and 450 rows.
    for name in ("MahalanobisDetector", "NearestNeighboursDetector", "ResidualDetector", "ViM"):
        assert found[name] > 0.99, found
    for name in ("RelativeMahalanobisDetector", "free_energy", "max_logit"):
        assert found[name] > 0.8, found


def test_mnist_is_told_from_fashion(shared_data):
    fashion, mnist = (
        np.load(shared_data / "images" / f) for f in ("fashion_mnist.npz", "mnist.npz")
    )
    x, new = (fashion[k][:3000].reshape(-1, 784) / 255 for k in ("X_train", "X_test"))
    ood = mnist["X_test"][:1000].reshape(-1, 784) / 255
    pca = PCA(50, random_state=0).fit(x)
    x, new, ood = (pca.transform(a) for a in (x, new[:1000], ood))
    found = compare_detectors(x, fashion["y_train"][:3000], new, ood)
    for name, value in found.items():  # chance is 0.5 ± 0.013
        assert value > 0.8, (name, found)

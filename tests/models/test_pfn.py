"""PFN estimators: views, weights of rows, what is beyond a network, bad input, files."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_wine

import uq
from uq import PFNClassifier, PFNRegressor
from uq.errors import DataError, LoadError, NoEpistemicError, ParameterError
from uq.inference.pfn_posterior import (
    Expert,
    PFNPosterior,
    choose_neighbours,
)
from uq.inference.pfn_transforms import PowerTransform, principal_axes
from uq.nn import PFN, PFNConfig, preprocess, save_pfn


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(task="regression", seed=0, **changes):
    """A network of random weights, in float64: what it says is arbitrary, but it listens."""
    sizes = {"max_features": 4, "n_outputs": 30 if task == "regression" else 3, "d_model": 16}
    sizes |= {"n_layers": 2, "n_heads": 2, "d_ff": 16} | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        borders = torch.linspace(-3, 3, sizes["n_outputs"] + 1) if task == "regression" else None
        model = PFN(PFNConfig(task, **sizes), borders).double()
        for p in model.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return model.requires_grad_(False).eval()


def rows(n, d, n_classes=None, m=1, seed=0):
    g = seeded(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    if n_classes is None:
        y = torch.randn(n, m, generator=g, dtype=torch.float64)
    else:
        y = torch.arange(n) % n_classes
    return x, y, torch.ones(n, dtype=torch.float64)


def assert_same(a, b, tolerance=1e-9):
    if hasattr(a, "borders"):
        torch.testing.assert_close(a.borders, b.borders, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.logits, b.logits, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    for task in ("regression", "classification"):
        save_pfn(folder / f"{task}.safetensors", network(task).float(), {})
    save_pfn(folder / "unscaled.safetensors", network(scaled=False, max_features=1).float(), {})
    return folder


# -- views and experts ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [None, 3])
def test_one_view_is_the_network_on_the_prepared_table(n_classes):
    task = "regression" if n_classes is None else "classification"
    model = network(task)
    x, y, w = rows(20, 3, n_classes)
    queries = rows(7, 3, seed=1)[0]
    made = PFNPosterior(model, x, y, w, n_classes=n_classes)(queries)
    targets = y.T if n_classes is None else y[None]
    Xc, yc, Xq, scaling = preprocess(x[None], targets, queries[None], model.config)
    logits = model(Xc, yc, Xq)[0]
    if n_classes is None:
        torch.testing.assert_close(made.logits[:, 0], logits, rtol=1e-9, atol=1e-9)
        expected = scaling.y_mean[0] + scaling.y_scale[0] * model.borders.double()
        torch.testing.assert_close(made.borders[0, 0], expected)
    else:
        torch.testing.assert_close(made.probs, logits.softmax(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_classes", [None, 3, 7])
@pytest.mark.parametrize(("d", "n_near"), [(3, None), (6, None), (3, 9)])
def test_queries_answer_alone(n_classes, d, n_near):
    model = network("regression" if n_classes is None else "classification")
    posterior = PFNPosterior(
        model, *rows(40, d, n_classes), n_classes=n_classes, n_views=4, n_near=n_near
    )
    queries = rows(5, d, seed=1)[0]
    whole = posterior(queries)
    one = posterior(queries[2:3])
    if n_classes is None:
        assert_same(whole[2:3], one)
    else:
        torch.testing.assert_close(whole.probs[2:3], one.probs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_classes", [None, 3, 7])
@pytest.mark.parametrize("d", [3, 6])
def test_a_weight_is_a_row_that_is_there_so_many_times(n_classes, d):
    model = network("regression" if n_classes is None else "classification")
    x, y, w = rows(42, d, n_classes)
    x[3, 1] = torch.nan
    w[:21] = 2
    settings = {"n_classes": n_classes, "n_views": 4}
    weighted = PFNPosterior(model, x, y, w, **settings)
    twice = torch.cat([torch.arange(42), torch.arange(21)])
    repeated = PFNPosterior(model, x[twice], y[twice], torch.ones(63).double(), **settings)
    queries = rows(6, d, seed=1)[0]
    a, b = weighted(queries), repeated(queries)
    if n_classes is None:
        assert_same(a, b)
    else:
        torch.testing.assert_close(a.probs, b.probs, rtol=1e-9, atol=1e-9)


def test_all_neighbours_are_the_plain_context():
    model, (x, y, _) = network(), rows(25, 3, m=2)
    queries = rows(6, 3, seed=1)[0]
    plain = Expert(model, x, y.T).logits(queries)
    local = Expert(model, x, y.T, n_near=25)
    assert local.n_near is None
    near = Expert(model, x, y.T, n_near=24)
    for found, expected in zip(near._local(queries, 25), plain, strict=True):
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-8, atol=1e-8)


def test_neighbours_are_the_nearest_rows_and_no_others():
    model, (x, y, w) = network(), rows(40, 2)
    x[:20] += 50
    posterior = PFNPosterior(model, x, y, w, n_near=10)
    queries = rows(4, 2, seed=1)[0]
    before = posterior(queries)
    changed = y.clone()
    changed[:20] += 100  # of rows far away
    assert_same(PFNPosterior(model, x, changed, w, n_near=10)(queries), before)
    changed = y.clone()
    changed[20:] += 1
    assert not torch.allclose(
        PFNPosterior(model, x, changed, w, n_near=10)(queries).mean, before.mean
    )


@pytest.mark.parametrize("n_classes", [4, 7, 9, 10, 29])
def test_a_tree_of_classes_gives_probabilities(n_classes):
    """With 3 outputs: P(class) = P(group) P(class | group) down to two or more levels."""
    posterior = PFNPosterior(
        network("classification"), *rows(90, 3, n_classes), n_classes=n_classes, n_views=2
    )
    probs = posterior(rows(8, 3, seed=1)[0]).probs
    assert probs.shape == (8, n_classes)
    assert float(probs.min()) > 0
    torch.testing.assert_close(probs.sum(1), torch.ones(8).double())
    tree = posterior.views()[0].tree
    members = torch.cat(tree.groups).sort().values
    assert members.tolist() == list(range(n_classes))
    assert len(tree.groups) <= 3


def test_a_subset_of_the_context_has_every_class():
    x, _, w = rows(300, 2)
    y = torch.zeros(300, dtype=torch.long)
    y[7], y[9] = 1, 2
    posterior = PFNPosterior(
        network("classification"), x, y, w, n_classes=3, n_views=3, max_context=20
    )
    for view in posterior.views():
        assert len(view.experts[0].x) == 20
        assert view.experts[0].y.unique().tolist() == [0, 1, 2]


def test_principal_axes_are_those_of_the_covariance():
    x, _, w = rows(50, 6)
    x = x * torch.tensor([5.0, 1.0, 3.0, 0.5, 2.0, 1.5]).double()
    w[:10] = 3
    axes = principal_axes(x, 3, w)
    torch.testing.assert_close(axes.T @ axes, torch.eye(3).double())
    centred = x - (w[:, None] * x).sum(0) / w.sum()
    vectors = np.linalg.eigh((centred.T @ (centred * w[:, None])).numpy()).eigenvectors
    overlap = np.abs(vectors[:, ::-1][:, :3].T @ axes.numpy())
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-9)
    # Fewer rows than columns: as many axes as there are directions.
    assert principal_axes(x[:4], 6, None).shape == (6, 3)


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0, 1.7, 2.0])
def test_yeo_johnson_and_its_inverse(power):
    from scipy.stats import yeojohnson

    transform = PowerTransform(rows(40, 1)[1].T)
    transform.power = torch.tensor([[power]], dtype=torch.float64)
    transform.low, transform.high = (torch.full((1, 1), e).double() for e in (-6.0, 6.0))
    y = torch.linspace(-6, 6, 50).double()[None]
    z = transform(y)
    np.testing.assert_allclose(z[0].numpy(), yeojohnson(y[0].numpy(), power), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transform.inverse(z), y, rtol=1e-9, atol=1e-9)
    # Beyond: the same slope as at the end, in both directions.
    far = torch.tensor([[6.0, 6.001, 7.0, 8.0, 9.0]], dtype=torch.float64)
    for end in (far, -far.flip(1)):
        slope = transform(end).diff() / end.diff()
        torch.testing.assert_close(slope, slope[:, :1].expand_as(slope), rtol=1e-9, atol=0)
        torch.testing.assert_close(transform.inverse(transform(end)), end, rtol=1e-9, atol=0)
    near = transform(torch.tensor([[5.999, 6.0]], dtype=torch.float64)).diff() / 0.001
    ahead = transform(far[:, :2]).diff() / 0.001
    torch.testing.assert_close(near, ahead, rtol=1e-3, atol=0)


def test_yeo_johnson_power_is_the_most_likely():
    from scipy.stats import yeojohnson_normmax

    y = torch.randn(1, 400, generator=seeded(), dtype=torch.float64).exp()
    y = (y - y.mean()) / y.std()
    best = float(np.clip(yeojohnson_normmax(y[0].numpy()), 0, 2))
    assert float(PowerTransform(y).power) == pytest.approx(best, abs=0.026)  # the grid's half


def test_views_of_equal_columns_do_not_repeat():
    posterior = PFNPosterior(network(), *rows(20, 3), n_views=9)
    assert len(posterior.views()) == 4  # columns and targets, as they are or bent
    assert len(PFNPosterior(network(), *rows(20, 6), n_views=5).views()) == 5
    assert len(PFNPosterior(network(scaled=False), *rows(20, 3), n_views=5).views()) == 1


def test_neighbours_are_chosen_only_where_they_gain():
    # On rows in no order there is nothing near: random weights must not look better by chance.
    posterior = PFNPosterior(network(), *rows(300, 3))
    assert choose_neighbours(posterior) in (None, 20, 60)


# -- estimators with the weights that come with the package --------------------------------------


@pytest.fixture(scope="module")
def diabetes():
    X, y = load_diabetes(return_X_y=True)
    return X[:300], y[:300], X[300:], y[300:]


def test_columns_in_any_order_and_unit_and_sign(diabetes):
    X, y, X_new, _ = diabetes
    first = PFNRegressor(random_state=0, n_views=1).fit(X, y).predict(X_new)
    order = np.random.default_rng(0).permutation(10)
    other = PFNRegressor(random_state=0, n_views=1).fit(5 - 1000 * X[:, order], y)
    np.testing.assert_allclose(other.predict(5 - 1000 * X_new[:, order]), first, rtol=2e-3)


def test_better_than_a_normal_of_the_mean_and_sized_right(diabetes):
    X, y, X_new, y_new = diabetes
    model = PFNRegressor(random_state=0).fit(X, y)
    constant = torch.distributions.Normal(y.mean(), y.std()).log_prob(torch.tensor(y_new)).mean()
    assert model.log_score(X_new, y_new) > float(constant) + 0.1
    lower, upper = model.predict_interval(X_new, 0.9)
    # 142 rows: 0.9 ± 3 standard errors of 0.025.
    assert 0.82 < ((lower <= y_new) & (y_new <= upper)).mean() < 0.98
    with pytest.raises(NoEpistemicError):
        _ = model.predict_distribution(X_new).epistemic


def test_classes_are_told_apart():
    X, y = load_wine(return_X_y=True)
    model = PFNClassifier(random_state=0).fit(X[::2], y[::2])
    assert model.score(X[1::2], y[1::2]) > 0.9
    assert model.n_epochs_ == 0
    assert model.stop_reason_ == "untuned"


def test_missing_values_and_empty_columns(diabetes):
    X, y, X_new, _ = diabetes
    rng = np.random.default_rng(0)
    gaps = np.where(rng.uniform(size=X.shape) < 0.2, np.nan, X)
    gaps[:, 3] = np.nan
    model = PFNRegressor(random_state=0).fit(gaps, y)
    holes = X_new.copy()
    holes[:, 2] = np.nan
    assert np.isfinite(model.predict(holes)).all()
    assert model.predict_distribution(X_new).variance.isfinite().all()
    # A column that is missing in all rows is as good as absent.
    without = PFNRegressor(random_state=0).fit(np.delete(gaps, 3, 1), y)
    np.testing.assert_allclose(
        model.predict(X_new), without.predict(np.delete(X_new, 3, 1)), rtol=1e-4
    )


def test_text_columns_are_categories(diabetes, tmp_path):
    X, y, _, _ = diabetes
    frame = pd.DataFrame({"a": X[:, 2], "town": np.where(X[:, 8] > 0, "Rome", "Oslo")})
    frame["grade"] = pd.Categorical(
        np.where(X[:, 3] > 0, "high", "low"), categories=["low", "high"], ordered=True
    )
    frame["flag"] = X[:, 1] > 0
    model = PFNRegressor(random_state=0).fit(frame, y)
    assert model.categories_ == {"town": ["Oslo", "Rome"], "grade": ["low", "high"]}
    coded = frame.assign(
        town=(frame["town"] == "Rome").astype(float),
        grade=(frame["grade"] == "high").astype(float),
    )
    np.testing.assert_array_equal(
        model.predict(frame), PFNRegressor(random_state=0).fit(coded, y).predict(coded)
    )
    strange = frame.assign(town="Paris")
    strange.loc[0, "town"] = None
    assert np.isfinite(model.predict(strange)).all()
    model.save(tmp_path / "m.uq")
    np.testing.assert_array_equal(uq.load(tmp_path / "m.uq").predict(frame), model.predict(frame))
    with pytest.raises(DataError, match="'day' holds dates"):
        PFNRegressor().fit(frame.assign(day=pd.Timestamp("2020-01-01")), y)


@pytest.mark.parametrize("constant", [0.0, -37.5, 1e9])
def test_a_constant_target_is_predicted_closely(constant, diabetes):
    X, _, X_new, _ = diabetes
    dist = (
        PFNRegressor(random_state=0).fit(X, np.full(len(X), constant)).predict_distribution(X_new)
    )
    assert float((dist.mean - constant).abs().max()) < 1e-4 * max(1, abs(constant))
    assert float(dist.stddev.max()) < 1e-4 * max(1, abs(constant))


def test_two_rows_are_enough(files):
    X = np.array([[0.0, 1.0], [1.0, 0.0]])
    for prior in ("tabular-regression", files / "regression.safetensors"):
        assert np.isfinite(PFNRegressor(prior=prior).fit(X, [0.0, 1.0]).predict(X)).all()
    assert PFNClassifier().fit(X, ["a", "b"]).predict_proba(X).shape == (2, 2)


def test_more_columns_and_classes_than_the_network(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(260) % 13
    X = rng.normal(size=(260, 25)) + 4 * rng.normal(size=(13, 25))[y]
    model = PFNClassifier(random_state=0, n_views=2).fit(X, y)
    assert model.score(X, y) > 0.6  # one of 13 by chance
    model.save(tmp_path / "m.uq")
    again = uq.load(tmp_path / "m.uq")
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    with pytest.raises(ParameterError, match="as many classes as the network has"):
        PFNClassifier(fine_tune=True).fit(X, y)


def test_localised_and_subset_and_auto(diabetes):
    X, y, X_new, y_new = diabetes
    local = PFNRegressor(random_state=0, n_views=1, localize=60).fit(X, y)
    assert local.n_near_ == 60
    assert np.isfinite(local.log_score(X_new, y_new))
    some = PFNRegressor(random_state=0, n_views=2, max_context=100).fit(X, y)
    assert some.log_score(X_new, y_new) < 0
    assert [len(v.experts[0].x) for v in some.posterior_.views()] == [100, 100]
    chosen = PFNRegressor(random_state=0, n_views=1, localize="auto").fit(X, y)
    assert chosen.n_near_ is None or chosen.n_near_ < 300


def test_fine_tuning_lowers_the_loss_of_a_network_that_knows_nothing(files, diabetes):
    X, y, X_new, y_new = diabetes
    settings = {"prior": files / "regression.safetensors", "n_views": 1, "random_state": 0}
    # The network has 4 columns.
    plain = PFNRegressor(**settings).fit(X[:, :4], y)
    tuned = PFNRegressor(**settings, fine_tune=True, lr=3e-3, max_epochs=60).fit(X[:, :4], y)
    held_out = tuned.history_["held_out_loss"]
    assert min(held_out) < held_out[0] - 0.2
    assert tuned.log_score(X_new[:, :4], y_new) > plain.log_score(X_new[:, :4], y_new) + 0.2
    assert tuned.n_context_ == plain.n_context_ == 300


def test_fine_tuning_that_does_harm_is_undone(files, diabetes):
    X, y, X_new, _ = diabetes
    plain = PFNRegressor(random_state=0, n_views=1).fit(X, y)
    # A learning rate that ruins the network in one step.
    ruined = PFNRegressor(random_state=0, n_views=1, fine_tune=True, lr=3.0, max_epochs=2)
    # The rows that were held out come last: sums round differently.
    np.testing.assert_allclose(ruined.fit(X, y).predict(X_new), plain.predict(X_new), rtol=1e-4)


# -- bad input -----------------------------------------------------------------------------------


def test_priors_that_cannot_be_used(files, tmp_path, diabetes):
    X, y, _, _ = diabetes
    with pytest.raises(ParameterError, match="there is no network file at 'nowhere'"):
        PFNRegressor(prior="nowhere").fit(X, y)
    with pytest.raises(ParameterError, match="is a network for classification"):
        PFNRegressor(prior=files / "classification.safetensors").fit(X, y)
    with pytest.raises(ParameterError, match="is a network for regression"):
        PFNClassifier(prior="tabular-regression").fit(X, y > 100)
    (tmp_path / "foreign.safetensors").write_bytes(b"not a network")
    with pytest.raises(LoadError, match="not a usable prior-data fitted network"):
        PFNRegressor(prior=tmp_path / "foreign.safetensors").fit(X, y)
    with pytest.raises(ParameterError, match="prior must be a name or a path"):
        PFNRegressor(prior=3).fit(X, y)


def test_a_prior_with_a_scale_of_its_own(files):
    X, y = np.linspace(0, 1, 30)[:, None], np.linspace(-1, 1, 30)
    model = PFNRegressor(prior=files / "unscaled.safetensors", random_state=0).fit(X, y)
    assert model.x_mean_ is None
    assert model.y_scale_.tolist() == [1.0]
    with pytest.raises(DataError, match=r"inputs in \[0, 1\], X goes from 0 to 1.5"):
        model.predict(1.5 * X)
    with pytest.raises(DataError, match=r"X goes from -1 to"):
        PFNRegressor(prior=files / "unscaled.safetensors").fit(2 * X - 1, y)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_views", 0),
        ("localize", 0),
        ("localize", "near"),
        ("max_context", 1),
        ("fine_tune", 3),
    ],
)
def test_arguments_are_named(name, value, diabetes):
    X, y, _, _ = diabetes
    with pytest.raises(ParameterError, match=name):
        PFNRegressor(**{name: value}).fit(X, y)


def test_a_file_holds_all_that_is_needed(files, tmp_path, diabetes):
    X, y, X_new, _ = diabetes
    prior = tmp_path / "mine.safetensors"
    prior.write_bytes((files / "regression.safetensors").read_bytes())
    gaps = X.copy()
    gaps[::7, 0] = np.nan
    model = PFNRegressor(prior=str(prior), random_state=0).fit(gaps[:, :4], y)
    model.save(tmp_path / "m.uq")
    prior.unlink()
    again = uq.load(tmp_path / "m.uq")
    np.testing.assert_array_equal(again.predict(X_new[:, :4]), model.predict(X_new[:, :4]))
    assert again.prior_ == model.prior_


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_does_not_have_a_fit_open_another(kind, files, tmp_path, diabetes, monkeypatch):
    """Whoever wrote the model would choose what is opened, also where it is there."""
    X, y = diabetes[0][:, :4], diabetes[1]
    path = files / "regression.safetensors"
    PFNRegressor(prior=kind(path)).fit(X, y).save(tmp_path / "m.uq")
    uq.Calibrated(PFNRegressor(prior=kind(path)), "quantile", cv=2).fit(X, y).save(
        tmp_path / "c.uq"
    )
    loaded, wrapped = uq.load(tmp_path / "m.uq"), uq.load(tmp_path / "c.uq")
    with monkeypatch.context() as patch:
        patch.setattr("uq.models.pfn.load_pfn", lambda path: pytest.fail(f"{path} was opened"))
        for model in (loaded, clone(loaded), wrapped):
            with pytest.raises(ParameterError, match="forgets the path of its prior"):
                model.fit(X, y)
    again = loaded.set_params(prior=path).fit(X, y)
    np.testing.assert_array_equal(again.predict(X), uq.load(tmp_path / "m.uq").predict(X))
    # The networks of the package are known by their names.
    PFNRegressor().fit(X, y).save(tmp_path / "s.uq")
    assert uq.load(tmp_path / "s.uq").fit(X, y).prior == "tabular-regression"


def test_more_columns_than_there_can_be():
    X = np.zeros((4, 5000), dtype=np.float32)
    with pytest.raises(DataError, match=r"X has 5,000 columns, .* at most 4,096"):
        PFNRegressor().fit(X, np.arange(4.0))


def test_rows_beyond_the_default_context_are_left_out_with_a_warning(monkeypatch):
    monkeypatch.setattr("uq.models.pfn._MAX_CONTEXT", 50)
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(80, 2)), rng.normal(size=80)
    with pytest.warns(UserWarning, match="random 50 of the 80 rows"):
        PFNRegressor(max_context=50, n_views=1).fit(X, y)
    PFNRegressor(max_context=40, n_views=1).fit(X, y)  # warnings are errors here

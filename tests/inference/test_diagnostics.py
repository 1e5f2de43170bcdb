"""Diagnostics of sampling: the tree, ArviZ's numbers, warnings, and the report's section."""

import numpy as np
import pandas as pd
import pytest
import torch

from uq import NUTSClassifier, NUTSRegressor
from uq.calibration import Report, report
from uq.distributions import NormalMixture
from uq.errors import DataError, ParameterError
from uq.inference.diagnostics import Diagnostics, diagnose, to_inference_data

RNG = np.random.default_rng(0)
GOOD = RNG.normal(size=(4, 250, 3))
X = RNG.normal(size=(60, 2))
Y = X[:, 0] - 0.5 * X[:, 1] + 0.3 * RNG.normal(size=60)


def split_rhat(draws):
    """Rank-normalised split R-hat, folded too, written out from the paper (eqs. 3, 4, 14)."""
    from scipy import stats

    def basic(x):
        n = x.shape[1]
        within, between = x.var(1, ddof=1).mean(), x.mean(1).var(ddof=1)
        return np.sqrt(((n - 1) / n * within + between) / within)

    halves = np.concatenate(np.split(draws, 2, 1))

    def ranked(x):
        ranks = stats.rankdata(x, axis=None).reshape(x.shape)
        return stats.norm.ppf((ranks - 0.375) / (x.size + 0.25))

    folded = np.abs(halves - np.median(halves))
    return max(basic(ranked(halves)), basic(ranked(folded)))


def test_rhat_is_that_of_the_paper_at_the_worst_element():
    draws = GOOD + np.array([0, 0, 0.4]) * np.arange(4)[:, None, None]
    table = diagnose(to_inference_data({"q": draws})).table
    expected = max(split_rhat(draws[..., i]) for i in range(3))
    assert table.loc["q", "R-hat"] == pytest.approx(expected, rel=1e-6)
    assert expected > 1.05


@pytest.mark.statistical
def test_effective_size_of_an_autoregression():
    x = np.zeros((4, 2000))
    noise = np.random.default_rng(1).normal(size=x.shape)
    for t in range(1, 2000):
        x[:, t] = 0.8 * x[:, t - 1] + noise[:, t]
    found = diagnose(to_inference_data({"x": x})).table.loc["x"]
    # 8,000 (1 − ρ)/(1 + ρ) = 889; the estimate's error is about a tenth.
    assert found["ESS bulk"] == pytest.approx(889, rel=0.3)


def test_tree_has_arvizs_groups():
    tree = to_inference_data(
        {"w": torch.tensor(GOOD), "s": GOOD[..., 0]},
        sample_stats={"diverging": np.zeros((4, 250), bool)},
        log_likelihood={"y": GOOD},
        posterior_predictive={"y": GOOD},
        observed_data={"y": np.arange(3.0)},
        attrs={"log_evidence": -3.0},
    )
    assert set(tree.children) == {
        "posterior",
        "sample_stats",
        "log_likelihood",
        "posterior_predictive",
        "observed_data",
    }
    assert tree["posterior"]["w"].dims == ("chain", "draw", "w_dim_0")
    np.testing.assert_array_equal(tree["posterior"]["w"], GOOD)
    assert tree.attrs["log_evidence"] == -3


def test_each_fault_has_its_warning():
    def said(quantity, **stats):
        tree = to_inference_data({"q": quantity}, sample_stats=stats)
        return " ".join(diagnose(tree).warnings)

    fine = GOOD[..., 0]
    rate = np.full((4, 250), 0.8)
    energy = RNG.normal(size=(4, 250))
    cut = np.zeros((4, 250), bool)
    good = {
        "acceptance_rate": rate,
        "energy": energy,
        "diverging": cut,
        "reached_max_treedepth": cut,
    }
    assert said(fine, **good) == ""
    assert "disagree about q (R-hat" in said(fine + np.arange(4)[:, None])
    assert "worth" in said(np.repeat(fine[:, :50], 5, 1).cumsum(1))
    assert "One chain alone" in said(fine[:1])
    assert "does not move" in said(np.zeros((4, 250)))
    assert "too few draws (3)" in said(fine[:, :3])
    one = cut.copy()
    one[2, 3] = True
    assert "1 trajectories (0.1 %) diverged" in said(fine, diverging=one)
    assert "raise target_accept" in said(fine, diverging=one)
    assert "cut off" in said(fine, reached_max_treedepth=~cut)
    assert "accepts only 0.20" in said(fine, acceptance_rate=rate * [[1], [1], [1], [0.25]])
    assert "too small to go far" in said(fine, acceptance_rate=np.ones((4, 250)))
    assert "E-BFMI" in said(fine, energy=energy.cumsum(1))


def test_extra_numbers_and_bad_input():
    tree = to_inference_data({"q": GOOD})
    table = diagnose(tree, extra={"log evidence": -12.5}).table
    assert table.loc["log evidence", "value"] == -12.5
    with pytest.raises(DataError, match="no \\['r'\\]"):
        diagnose(tree, quantities=["r"])
    with pytest.raises(DataError, match=r"posterior\['b'\] has shape \(4, 3\)"):
        to_inference_data({"a": GOOD, "b": np.zeros((4, 3))})
    with pytest.raises(DataError, match="chains, draws"):
        to_inference_data({"a": np.zeros(3)})
    with pytest.raises(DataError, match="empty"):
        to_inference_data({})


def regressor(**changes):
    settings = {"n_warmup": 150, "n_draws": 150, "max_tree_depth": 6, "max_epochs": 20}
    return NUTSRegressor(hidden=(), random_state=0, **settings | changes)


@pytest.fixture(scope="module")
def good():
    return regressor().fit(X, 1000 * Y)


@pytest.fixture(scope="module")
def bad():
    """Too few transitions, cut off too soon."""
    return regressor(n_warmup=2, n_draws=20, max_tree_depth=1).fit(X, 1000 * Y)


def test_tree_of_nuts_is_in_target_units(good):
    tree = good.to_inference_data(X[:9], 1000 * Y[:9])
    posterior = tree["posterior"]
    assert dict(posterior.sizes)["chain"] == 4
    mean = posterior["prediction"].mean(("chain", "draw")).to_numpy()
    np.testing.assert_allclose(mean, good.predict(X[:9]), rtol=1e-6)
    noise = np.square(posterior["noise_scale"].to_numpy()).mean()
    dist = good.predict_distribution(X[:9])
    np.testing.assert_allclose(noise, dist.aleatoric, rtol=1e-5)
    # The mean density over draws is the predictive density.
    rows = tree["log_likelihood"]["y"].to_numpy()
    density = np.log(np.exp(rows).mean((0, 1)))
    np.testing.assert_allclose(density, dist.log_prob(torch.tensor(1000 * Y[:9])), rtol=1e-4)
    np.testing.assert_allclose(posterior["log_likelihood"], rows.sum(-1), rtol=1e-6)


def test_good_and_bad_runs_in_the_report(good, bad, tmp_path):
    trusted, doubted = good.diagnostics(X, 1000 * Y), bad.diagnostics(X, 1000 * Y)
    assert trusted.warnings == ()
    assert list(trusted.table.index[:3]) == ["prediction", "log_likelihood", "noise_scale"]
    assert any("disagree about prediction" in w for w in doubted.warnings)
    assert any("raise max_tree_depth" in w for w in doubted.warnings)
    for model, found, sentence in (
        (good, trusted, "No warning: chains agree"),
        (bad, doubted, "The chains disagree about prediction"),
    ):
        made = report(model.predict_distribution(X), 1000 * Y, diagnostics=found, n_resamples=100)
        page = made.to_html()
        for text in (str(made), made.to_markdown(), page):
            assert "Did sampling work?" in text
            assert sentence in text
            assert "ESS bulk" in text
            assert "E-BFMI" in text
        made.save(tmp_path / "r.html")
        made.save(tmp_path / "r.json")
        assert Report.load(tmp_path / "r.json").to_html() == page


def test_classifier_and_interrupted_run(good):
    model = NUTSClassifier(
        hidden=(), random_state=0, n_chains=2, n_warmup=20, n_draws=30, max_epochs=5
    ).fit(X, Y > 0)
    tree = model.to_inference_data(X[:5], (Y > 0)[:5])
    assert tree["posterior"]["prediction"].shape == (2, 30, 5, 2)
    picked = np.exp(tree["log_likelihood"]["y"]).mean(("chain", "draw"))
    expected = model.predict_proba(X[:5])[np.arange(5), (Y > 0)[:5].astype(int)]
    np.testing.assert_allclose(picked, expected, rtol=1e-5)


def test_reports_without_diagnostics_and_with_bad_ones():
    dist = NormalMixture(torch.zeros(1, 60), torch.tensor(1.0))
    plain = report(dist, Y, n_resamples=100)
    assert "Did sampling work?" not in str(plain) + plain.to_html() + plain.to_markdown()
    old = plain.to_dict()
    del old["diagnostics"]  # written before there were any
    assert Report.from_dict(old).diagnostics == {}
    table = pd.DataFrame({"value": [1.0]}, index=["<b>"])
    shown = report(dist, Y, n_resamples=100, diagnostics=(table, ["a & b"]))
    assert "&lt;b&gt;" in shown.to_html()
    for wrong in (table, (table,), (table.astype(str) + "x", [])):
        with pytest.raises(ParameterError, match="diagnostics must be a pair"):
            report(dist, Y, n_resamples=100, diagnostics=wrong)
    assert isinstance(diagnose(to_inference_data({"q": GOOD})), Diagnostics)

"""Masked networks as estimators: widths, features, interrupts, warnings, bad input, calibration."""

import numpy as np
import pytest
import torch
from pyro.infer import MCMC
from scipy import stats
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn

import uq
from uq import MaskedBNNClassifier, MaskedBNNRegressor
from uq.errors import FitInterruptedWarning, ParameterError
from uq.inference import (
    MaskedBNN,
    MaskedBNNKernel,
    MaskedMoves,
    SamplerWarning,
    WidthPrior,
    masked_bnn_runs,
)
from uq.inference.masked_bnn import transition
from uq.inference.masked_bnn_runs import sample_masked
from uq.nn.masked_bnn import MaskedMLP

QUICK = {
    "hidden": (8, 6),
    "n_chains": 2,
    "n_warmup": 40,
    "n_draws": 6,
    "thin": 2,
    "n_leapfrog": 5,
    "n_mask_moves": 4,
    "max_epochs": 10,
    "random_state": 0,
}


def ramp(n=80, d=3, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, np.maximum(X[:, 0], 0) + 0.1 * rng.normal(size=n)


def test_widths_and_the_compact_network(tmp_path):
    X, y = ramp()
    model = MaskedBNNRegressor(**QUICK, width_penalty=0.5).fit(X, y)
    assert model.widths_.shape == (2, 6, 2)
    assert (model.widths_ >= 1).all()
    assert (model.widths_.max((0, 1)) <= [9, 7]).all()
    widest = model.widths_.max((0, 1))
    body = model.posterior_.network.body
    assert [body[0].out_features, body[2].out_features] == widest.tolist()
    assert model.inclusion_.tolist() == [1, 1, 1]
    assert model.predict_distribution(X).n_draws == 12
    assert model.diagnostics_["width"].shape == (2, 52, 2)
    assert all(a.shape == (2, 6) for a in model.sample_stats_.values())
    # The recorded log likelihood is that of the draws as they predict (standardised targets).
    x = torch.tensor((X - model.x_mean_) / model.x_scale_, dtype=torch.float32)
    scaled = torch.tensor((y - model.y_mean_) / model.y_scale_)
    dist = model.posterior_(x)
    rows = torch.distributions.Normal(dist.loc, dist.scale).log_prob(scaled[:, None])
    own = rows.sum((1, 2)).reshape(2, 6)
    np.testing.assert_allclose(own, model.sample_stats_["log_likelihood"], rtol=1e-3, atol=1e-2)
    model.save(tmp_path / "m.uq")
    again = uq.load(tmp_path / "m.uq")
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    np.testing.assert_array_equal(again.widths_, model.widths_)


def test_the_penalty_decides_the_width():
    X, y = ramp()
    widths = [
        MaskedBNNRegressor(**QUICK | {"hidden": (12,), "n_warmup": 100}, width_penalty=p)
        .fit(X, y)
        .widths_.mean()
        for p in (0.0, 0.15, 0.3)
    ]
    assert widths[0] > widths[1] > widths[2]


# So short a warm-up does not always find a step size for so heavy tails.
@pytest.mark.filterwarnings("ignore::uq.inference.SamplerWarning")
def test_masks_at_the_floor_stay_alive():
    X, y = ramp()
    settings = QUICK | {"hidden": (5,), "n_warmup": 150, "n_draws": 100, "thin": 1}
    model = MaskedBNNRegressor(**settings, width_penalty=1.0, min_width=3).fit(X, y)
    # c = (log 80)⁵ makes one more node impossible: every draw is at the floor …
    assert (model.widths_ == 3).all()
    # … and where it does not, chains leave the floor and come back.
    model = MaskedBNNRegressor(**settings, width_penalty=0.16, min_width=3).fit(X, y)
    assert model.widths_.min() == 3
    assert model.widths_.max() > 3
    steps = np.diff(model.widths_[:, :, 0], axis=1)
    assert steps.max() > 0
    assert steps.min() < 0


def test_an_empty_layer_is_a_constant():
    X = np.random.default_rng(0).normal(size=(60, 2))
    y = np.random.default_rng(1).normal(size=60)
    settings = QUICK | {"hidden": (3,), "n_warmup": 200}
    model = MaskedBNNRegressor(**settings, width_penalty=1.0, min_width=0).fit(X, y)
    assert (model.widths_ == 0).all()
    assert np.ptp(model.sample_functions(X, 12), axis=1).max() == 0


@pytest.mark.statistical
# Short chains: rounding, which differs between processors, decides how many trajectories diverge.
@pytest.mark.filterwarnings("ignore:.* trajectories after warm-up were divergent")
def test_features_that_matter_are_included():
    X, y = ramp(150, 5, seed=2)
    settings = QUICK | {"n_chains": 4, "n_warmup": 250, "n_draws": 40, "n_mask_moves": 10}
    model = MaskedBNNRegressor(**settings, select_features=True).fit(X, y)
    assert model.inclusion_.shape == (5,)
    assert model.inclusion_[0] == 1
    assert model.inclusion_[1:].mean() < 0.6
    assert model.widths_.shape == (4, 40, 2)
    # What is excluded has weights 0.
    weights = model.posterior_.draws["body.0.weight"]
    share = (weights.abs().sum(1) > 0).double().mean(0)
    np.testing.assert_allclose(share, model.inclusion_)


def test_no_hidden_layer_is_bayesian_regression():
    X, y = load_diabetes(return_X_y=True)
    model = MaskedBNNRegressor(**QUICK | {"hidden": (), "n_warmup": 100, "n_leapfrog": 20}).fit(
        X, y
    )
    assert model.widths_.shape == (2, 6, 0)
    assert model.score(X, y) > 0.45


def test_masks_of_a_module():
    X, y = ramp()
    net = nn.Sequential(nn.Linear(3, 8), nn.ELU(), nn.LayerNorm(8), nn.Linear(8, 6), nn.Tanh())
    net.append(nn.Linear(6, 1))
    net[3].bias.requires_grad_(False)
    model = MaskedBNNRegressor(module=net, **QUICK, width_penalty=0.6).fit(X, y)
    assert model.widths_.shape == (2, 6, 2)
    assert model.widths_[:, -1].max() < 8
    active = (model.posterior_.draws["body.0.weight"].abs().sum(-1) > 0).sum(-1)
    np.testing.assert_array_equal(active, model.widths_[..., 0].ravel())
    frozen = model.posterior_.draws["body.3.bias"]
    assert torch.equal(frozen, net[3].bias.detach().expand_as(frozen))


def interrupt_after(monkeypatch, n):
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > n:
            raise KeyboardInterrupt
        return transition(*args)

    monkeypatch.setattr(masked_bnn_runs, "transition", interrupted)


@pytest.mark.parametrize(("after", "draws"), [(47, 3), (20, 1)])
def test_interrupted_sampling_keeps_the_draws_so_far(monkeypatch, after, draws):
    X, y = ramp()
    interrupt_after(monkeypatch, after)
    said = "the 3 draws of each chain" if draws == 3 else "the states that the chains had reached"
    with pytest.warns(FitInterruptedWarning, match=f"after {after} of 52 transitions.*{said}"):
        model = MaskedBNNRegressor(**QUICK).fit(X, y)
    assert model.stop_reason_ == "interrupted"
    assert model.widths_.shape == (2, draws, 2)
    assert model.sample_stats_["lp"].shape == (2, draws)
    assert model.diagnostics_["width"].shape == (2, after, 2)
    assert np.isfinite(model.log_score(X, y))


def test_an_interrupt_before_the_first_transition_keeps_the_starts(monkeypatch):
    X, y = ramp()
    interrupt_after(monkeypatch, 0)
    with pytest.warns(FitInterruptedWarning, match="before sampling: interrupted; the starts"):
        model = MaskedBNNRegressor(**QUICK).fit(X, y)
    assert model.stop_reason_ == "interrupted"
    assert model.widths_.tolist() == [[[8, 6]], [[8, 6]]]
    assert np.isfinite(model.log_score(X, y))


def test_divergent_trajectories_are_said(monkeypatch):
    X, y = ramp()

    def too_far(model, state, step, *rest):
        return transition(model, state, 1e4 * step, *rest)

    monkeypatch.setattr(masked_bnn_runs, "transition", too_far)
    monkeypatch.setattr(masked_bnn_runs.StepSize, "update", lambda self, _: self.log_step.exp())
    with pytest.warns(SamplerWarning, match=r"2 of 2 chains.*divergent.*target_accept"):
        model = MaskedBNNRegressor(**QUICK | {"n_warmup": 100}).fit(X, y)
    assert model.sample_stats_["diverging"].all()
    assert (model.sample_stats_["acceptance_rate"] == 0).all()
    assert np.isfinite(model.log_score(X, y))  # rejected, not followed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior": "horseshoe"}, "prior must be one of 'cauchy', 'normal'"),
        ({"width_penalty": -1}, "width_penalty"),
        ({"min_width": 7}, "min_width must be at most the smallest of hidden"),
        ({"min_width": -1}, "min_width"),
        ({"max_flips": 6}, "max_flips must be at most 5"),
        ({"death": "random"}, "death must be one of"),
        ({"birth": "random"}, "birth must be one of"),
        ({"n_chains": 0}, "n_chains"),
        ({"n_draws": 0}, "n_draws"),
        ({"thin": 0}, "thin"),
        ({"n_leapfrog": 0}, "n_leapfrog"),
        ({"target_accept": 1.0}, "target_accept"),
        ({"noise_prior": 0.01}, "noise_prior must be a pair"),
        ({"noise_prior": (1.0, 0.0)}, "noise_prior must be a pair"),
        ({"select_features": 1.5}, "select_features must be True or False"),
        ({"select_features": True, "module": nn.Linear(3, 1)}, "select_features masks the inputs"),
    ],
)
def test_bad_parameters_are_named(settings, message):
    X, y = ramp(20)
    with pytest.raises(ParameterError, match=message):
        MaskedBNNRegressor(**QUICK | settings).fit(X, y)


@pytest.mark.statistical
def test_pyro_runs_the_kernel():
    g = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    prior = WidthPrior([6], [0.1], [1])
    model = MaskedBNN(MaskedMLP((1, 6, 1)), x, x.abs(), prior, prior="normal")
    kernel = MaskedBNNKernel(model, model.draw_state(8, g), generator=g)
    mcmc = MCMC(kernel, num_samples=30, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    assert draws["weights"].shape == (30, 8, 19)
    assert draws["variance"].shape == (30, 8, 1)
    assert set(draws["masks"].unique().tolist()) == {0.0, 1.0}
    rates = mcmc.diagnostics()["acceptance rate"]["chain 0"]
    assert rates.shape == (8,)
    assert 0.4 < rates.mean() < 1
    run = sample_masked(model, model.draw_state(8, g), n_warmup=60, n_draws=30, thin=1, generator=g)
    assert run.parameters["0.weight"].shape[:2] == (8, 30)
    # The same law: mean log noise of 8 chains each, in standard errors over chains.
    ours, theirs = run.variance.log().mean((1, 2)), draws["variance"].log().mean((0, 2))
    error = (ours.var() / 8 + theirs.var() / 8).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 4 * error


def ranks(network, prior, moves, step, n_transitions, chains=400, draws=19):
    """Ranks of what data was simulated with among draws given that data; all chains at once."""
    g = torch.Generator().manual_seed(1)
    d = network.sizes[0]
    x = torch.randn(6, d, generator=g, dtype=torch.float64)
    new = torch.randn(1, d, generator=g, dtype=torch.float64)
    blank = torch.zeros(chains, 6, 1, dtype=torch.float64)
    options = {"prior": "normal", "noise_prior": (4.0, 3.0)}
    model = MaskedBNN(network, x, blank, prior, **options)

    def quantities(state):
        at = network.evaluate(
            state.weights, state.masks, new, lambda f: (f.double().sum((1, 2)), f)
        )
        widths = prior.widths(state.masks).sum(1).double()
        # A count has ties, which a little noise breaks.
        noise = torch.rand(chains, generator=g, dtype=torch.float64)
        return torch.stack([at.value, state.variance[:, 0], widths + 0.5 * noise])

    truth = model.draw_state(chains, g)
    pull = model.pull(truth.variance)
    f = network.evaluate(truth.weights, truth.masks, x, pull).outputs
    noise = torch.randn(f.shape, generator=g, dtype=torch.float64)
    y = f + noise * truth.variance.sqrt()[:, None]
    model = MaskedBNN(network, x, y, prior, **options)
    expected = quantities(truth)
    state = model.draw_state(chains, g)
    below = torch.zeros_like(expected)
    steps = torch.full((chains,), step, dtype=torch.float64)
    for i in range(n_transitions * (draws + 5)):
        state, _ = transition(model, state, steps, moves, g)
        if i % n_transitions == n_transitions - 1 and i >= 5 * n_transitions:
            below += quantities(state) < expected
    return below


@pytest.mark.statistical
@pytest.mark.parametrize("sizes", [(2, 1), (1, 3, 1)])
def test_simulation_based_calibration(sizes):
    """A conjugate model and one that is not: ranks among 19 nearly independent draws are uniform.

    Draws are thinned, not independent: 20 ranks in 5 classes leave a fourth of the resolution that
    would notice it, and still see a law that is wrong.
    """
    network = MaskedMLP(sizes)
    prior = WidthPrior(network.groups, [0.1] * len(network.groups), [1] * len(network.groups))
    moves = MaskedMoves(n_leapfrog=8, n_mask_moves=3)
    below = ranks(network, prior, moves, 0.15, 12)
    for k in range(3 if network.groups else 2):
        counts = np.bincount((below[k].long() // 4).numpy(), minlength=5)
        assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.statistical
def test_breast_cancer():
    X, y = load_breast_cancer(return_X_y=True)
    settings = {"hidden": (20,), "n_chains": 2, "n_warmup": 60, "n_draws": 10, "thin": 2}
    model = MaskedBNNClassifier(**settings, max_epochs=20, random_state=0).fit(X[::2], y[::2])
    assert model.score(X[1::2], y[1::2]) >= 0.94
    assert model.log_score(X[1::2], y[1::2]) > -0.2

"""Prior-data fitted network against the exact posterior of the GP that it was trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from uq.distributions import BarDistribution
from uq.inference.pfn import pretrain_gp
from uq.inference.pfn_losses import exact_gp, exact_gp_loss, gp_gap
from uq.inference.pfn_priors import GPPrior
from uq.nn import load_pfn, preprocess, save_pfn

PRIOR = GPPrior()
SIZES = (0, 1, 2, 5, 10, 20, 40)


def test_the_exact_posterior_is_that_of_scikit_learn():
    X, y = PRIOR(2, 14, 1, torch.Generator().manual_seed(0))
    mean, variance = exact_gp(PRIOR, X, y, 10)
    for b in range(2):
        gp = GaussianProcessRegressor(RBF(0.2), alpha=0.01, optimizer=None)
        gp.fit(X[b, :10].double().numpy(), y[b, :10].double().numpy())
        m, s = gp.predict(X[b, 10:].double().numpy(), return_std=True)
        np.testing.assert_allclose(mean[b].numpy(), m, atol=1e-9)
        np.testing.assert_allclose(variance[b].numpy(), s**2 + 0.01, atol=1e-9)
    normal = torch.distributions.Normal(mean, variance.sqrt())
    torch.testing.assert_close(exact_gp_loss(PRIOR, X, y, 10), -normal.log_prob(y[:, 10:].double()))


@pytest.fixture(scope="module")
def small():
    """Seconds of training: far from the exact posterior, but the right way there."""
    sizes = {"d_model": 32, "n_layers": 4, "d_ff": 64, "rows_per_step": 1000, "n_buckets": 100}
    return pretrain_gp(steps=400, log_entries=2, **sizes)


@pytest.mark.statistical
def test_the_gap_is_positive_and_most_of_the_information_is_used(small):
    model, meta = small
    (run,) = meta["runs"]
    prior_loss = run["reference"]["exact"]["0"]
    for n in (0, 5, 40):
        gap = gp_gap(model, PRIOR, n, n_sets=300)
        # An expected divergence: below 0 there is a leak, or a density that is not one.
        assert gap.gap > -2 * gap.standard_error
        # What the context is worth is the fall of the exact loss from none to n rows.
        worth = prior_loss - gap.exact
        assert gap.gap < 0.05 + 0.4 * max(worth, 0.0) + 3 * gap.standard_error


@pytest.mark.statistical
def test_a_repeated_context_makes_the_network_more_certain(small):
    model, _ = small
    X, y = PRIOR(300, 14, 1, torch.Generator().manual_seed(5))
    entropies = []
    for times in (1, 2):
        Xc, yc, Xq, _ = preprocess(
            X[:, :10].repeat(1, times, 1), y[:, :10].repeat(1, times), X[:, 10:], model.config
        )
        entropies.append(BarDistribution(model(Xc, yc, Xq), model.borders).entropy().mean(1))
    fall = entropies[0] - entropies[1]
    assert float(fall.mean()) > 3 * float(fall.std()) / 300**0.5


@pytest.mark.slow
@pytest.mark.statistical
def test_ten_minutes_of_training_come_within_two_hundredths_of_a_nat(tmp_path):
    model, _ = pretrain_gp()
    gaps = [gp_gap(model, PRIOR, n, n_sets=1000, random_state=n) for n in SIZES]
    for gap in gaps:
        assert gap.gap > -2 * gap.standard_error
        assert 0.87 < gap.coverage < 0.93
    assert np.mean([gap.gap for gap in gaps]) <= 0.02
    # Without a context the bars have the mass of the prior's marginal, N(0, 1 + σ²).
    empty = torch.zeros(1, 0, 1), torch.zeros(1, 0), torch.rand(1, 50, 1)
    Xc, yc, Xq, _ = preprocess(*empty, model.config)
    p = torch.softmax(model(Xc, yc, Xq)[0].double(), -1)
    cdf = torch.distributions.Normal(0.0, 1.01**0.5).cdf(model.borders[1:-1].double())
    edge = torch.zeros(1, dtype=torch.float64)
    marginal = torch.cat([edge, cdf, edge + 1]).diff()
    assert float((p - marginal).abs().sum(-1).max()) / 2 < 0.03  # total variation
    # Half precision costs nothing: the same queries, so that only rounding differs.
    save_pfn(tmp_path / "half.safetensors", model, {})
    half, _ = load_pfn(tmp_path / "half.safetensors")
    for gap in gaps:
        again = gp_gap(half, PRIOR, gap.n, n_sets=1000, random_state=gap.n)
        assert abs(again.gap - gap.gap) < 1e-3

"""IVON against exact answers: closed forms, hand-computed steps, limits, and Pyro's SVI."""

import copy
import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy.optimize import minimize
from torch import nn

from uq.errors import ParameterError
from uq.inference import IVON
from uq.inference.ivon_checks import IVONStateError
from uq.nn import CategoricalLikelihood, Network, NormalPrior
from uq.nn.bayesian import BayesianNetwork


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quadratic_step(opt, w, a, b):
    def closure():
        opt.zero_grad()
        loss = 0.5 * (a * (w - b).square()).sum()
        loss.backward()
        return loss.detach()

    return opt.step(closure)


@pytest.mark.parametrize("mc_samples", [1, 3])
@pytest.mark.parametrize("clip", [math.inf, 0.05])
@pytest.mark.parametrize("debias", [True, False])
def test_two_steps_by_hand(mc_samples, clip, debias):
    """Every buffer after two steps, by the scalar equations of the algorithm, two groups."""
    lam, b1, b2, h0, lr = 50.0, 0.9, 0.99, 0.3, 0.2
    deltas = [1e-2, 3e-2]
    w = [nn.Parameter(torch.tensor([0.7], dtype=torch.float64)) for _ in deltas]
    opt = IVON(
        [{"params": [p], "weight_decay": d} for p, d in zip(w, deltas, strict=True)],
        lr,
        ess=lam,
        beta1=b1,
        beta2=b2,
        hess_init=h0,
        mc_samples=mc_samples,
        clip_radius=clip,
        debias=debias,
        generator=generator(1),
    )
    noise = generator(1)
    m, h, g = [0.7, 0.7], [h0, h0], [0.0, 0.0]
    for t in (1, 2):

        def closure():
            opt.zero_grad()
            loss = sum((p**4 + 2 * p).sum() for p in w)
            loss.backward()
            return loss.detach()

        opt.step(closure)
        grads, prices = np.zeros(2), np.zeros(2)
        for _ in range(mc_samples):
            for i, delta in enumerate(deltas):
                z = float(torch.empty(1, dtype=torch.float64).normal_(generator=noise))
                n = z / math.sqrt(lam * (h[i] + delta))
                grad = 4 * (m[i] + n) ** 3 + 2
                grads[i] += grad / mc_samples
                prices[i] += n * grad / mc_samples
        for i, delta in enumerate(deltas):
            rho = 1 - b2
            g[i] = b1 * g[i] + (1 - b1) * grads[i]
            h_hat = lam * (h[i] + delta) * prices[i]
            new = h[i] + rho * (h_hat - h[i]) + 0.5 * rho**2 * (h[i] - h_hat) ** 2 / (h[i] + delta)
            h[i] = new
            bias = 1 - b1**t if debias else 1.0
            update = (g[i] / bias + delta * m[i]) / (h[i] + delta)
            m[i] -= lr * (h0 + delta) * float(np.clip(update, -clip, clip))
        for i, p in enumerate(w):
            assert p.item() == pytest.approx(m[i], rel=1e-12)
            assert opt.state[p]["hess"].item() == pytest.approx(h[i], rel=1e-12)
            assert opt.state[p]["momentum"].item() == pytest.approx(g[i], rel=1e-12)
            expected_std = 1 / math.sqrt(lam * (h[i] + deltas[i]))
            assert opt.posterior_std()[p].item() == pytest.approx(expected_std, rel=1e-12)


def test_limit_is_momentum_sgd():
    """Without noise and with frozen curvature it is EMA-momentum SGD with L2, whatever h0."""
    delta, lr, b1 = 1e-2, 0.05, 0.9
    a, b = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([1.0, -1.0]).double()
    for h0 in (0.1, 10.0):
        w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        opt = IVON([w], lr, ess=1e16, weight_decay=delta, beta1=b1, beta2=1.0, hess_init=h0)
        m, g = torch.zeros(2).double(), torch.zeros(2).double()
        for t in range(1, 6):
            quadratic_step(opt, w, a, b)
            g = b1 * g + (1 - b1) * a * (m - b)
            m = m - lr * (g / (1 - b1**t) + delta * m)
        torch.testing.assert_close(w.detach(), m, rtol=1e-6, atol=1e-7)


@pytest.mark.statistical
def test_price_estimator_is_unbiased_with_the_stated_spread():
    """On a quadratic at its minimum one sample's ĥ has mean a and standard deviation √2 a."""
    n, rho, delta, h0, curvature = 100_000, 1e-3, 0.1, 1.3, 1.7
    w = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    opt = IVON(
        [w],
        0.0,
        ess=10,
        weight_decay=delta,
        beta2=1 - rho,
        hess_init=h0,
        generator=generator(2),
    )
    a = torch.full((n,), curvature, dtype=torch.float64)
    quadratic_step(opt, w, a, torch.zeros(n).double())
    # h + δ = (h₀ + δ)(1 + x + x²/2), solved for ĥ.
    ratio = (opt.state[w]["hess"] + delta) / (h0 + delta)
    h_hat = h0 + (torch.sqrt(2 * ratio - 1) - 1) * (h0 + delta) / rho
    # ĥ = a z²: the fourth central moment of z² is 60.
    standard_error = math.sqrt(2) * curvature / math.sqrt(n)
    assert float(h_hat.mean()) == pytest.approx(curvature, abs=5 * standard_error)
    spread = math.sqrt((60 - 4) / (4 * 2) / n)  # relative, of a standard deviation
    assert float(h_hat.std()) == pytest.approx(math.sqrt(2) * curvature, rel=5 * spread)


@pytest.mark.parametrize("h_hat", [-1e3, -2.0, -1.0, -0.5, 0.0, 1.0, 1e3])
def test_curvature_stays_positive(h_hat):
    """h + δ ≥ (h_old + δ)/2 for any ĥ, with equality at x = −1."""
    delta, h0, beta2, lam = 0.1, 0.4, 0.5, 30.0
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = IVON([w], 0.0, ess=lam, weight_decay=delta, beta2=beta2, hess_init=h0)
    with opt.sampled_params(train=True):
        # A gradient that makes ĥ what the test wants: ĥ = λ(h + δ) n ĝ.
        n = w.detach().clone()
        w.grad = h_hat / (lam * (h0 + delta) * n)
    opt.step()
    x = (1 - beta2) * (h_hat - h0) / (h0 + delta)
    new = opt.state[w]["hess"].item() + delta
    assert new == pytest.approx((h0 + delta) * (1 + x + x**2 / 2), rel=1e-9)
    assert new >= (h0 + delta) / 2 * (1 - 1e-12)


@pytest.mark.statistical
@pytest.mark.parametrize("s0", [2.0, 0.0])
def test_linear_regression_reaches_the_mean_field_fixed_point(s0):
    """m = exact posterior mean, σ_i² = 1/Λ_ii, for correlated features; without prior, too."""
    rng = np.random.default_rng(0)
    n, d, noise = 200, 5, 0.5
    X = rng.normal(size=(n, d)) @ (np.eye(d) + 0.4 * rng.normal(size=(d, d)))
    y = X @ rng.normal(size=d) + noise * rng.normal(size=n)
    precision = X.T @ X / noise**2 + s0 * np.eye(d)
    exact_mean = np.linalg.solve(precision, X.T @ y / noise**2)
    # The loss by its sufficient statistics: mean squared error over 2 noise².
    A = torch.tensor(X.T @ X / (n * noise**2))
    b = torch.tensor(X.T @ y / (n * noise**2))
    w = nn.Parameter(torch.zeros(d, dtype=torch.float64))
    opt = IVON(
        [w],
        0.3,
        ess=n,
        weight_decay=s0 / n,
        beta2=0.995,
        hess_init=1.0,
        mc_samples=4,
        generator=generator(3),
    )

    def closure():
        w.grad = A @ w.detach() - b

    steps, kept = 1500, []
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        opt.step(closure)
        if step >= steps // 2:
            kept.append(opt.state[w]["hess"].clone())
    variance = 1 / (n * (torch.stack(kept).mean(0).numpy() + s0 / n))
    # 5 % on σ², a tenth of a posterior standard deviation on the mean.
    np.testing.assert_allclose(variance, 1 / np.diag(precision), rtol=0.05)
    std = np.sqrt(1 / np.diag(precision))
    assert (np.abs(w.detach().numpy() - exact_mean) < 0.1 * std).all()
    # Mean-field variances are never above the exact marginal ones, and here clearly below.
    assert (variance < 0.95 * np.diag(np.linalg.inv(precision))).all()


@pytest.mark.statistical
def test_equilibrium_bias_and_spread_of_the_curvature():
    """Gradient noise of variance v lifts E[h] by ½ρλv; sd(h)² = ½ρ(λ(a + δ)v + 2a²)."""
    n, a, delta, lam, rho, extra = 4000, 0.1, 1e-3, 100.0, 0.005, 0.03
    w = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    opt = IVON(
        [w], 0.0, ess=lam, weight_decay=delta, beta2=1 - rho, hess_init=a, generator=generator(4)
    )
    noise = generator(5)
    mean = square = torch.zeros(n, dtype=torch.float64)
    kept = 0
    for step in range(3000):
        with opt.sampled_params(train=True):
            disturbance = math.sqrt(extra) * torch.randn(n, generator=noise, dtype=torch.float64)
            w.grad = a * w.detach() + disturbance
        opt.step()
        if step >= 1000:
            h = opt.state[w]["hess"]
            mean, square, kept = mean + h, square + h**2, kept + 1
    lifted = float(mean.mean() / kept)
    spread = float((square.mean() / kept - lifted**2).sqrt())
    # v is the gradient's variance at the sample: a²σ² from the weight noise beside the extra one,
    # of which the former is correlated with the noise: its part of ĥ is the 2a².
    predicted = a + 0.5 * rho * lam * (extra + a**2 / (lam * (lifted + delta)))
    assert lifted == pytest.approx(predicted, rel=0.03)
    assert lifted > 1.05 * a
    sd = math.sqrt(0.5 * rho * (lam * (lifted + delta) * extra + 2 * a**2))
    assert spread == pytest.approx(sd, rel=0.1)
    # The diagnosis measures the same bias, without knowing a or v: relative to h + δ.
    found = opt.diagnostics()[0].noise_share
    assert found == pytest.approx((lifted - a) / (lifted + delta), rel=0.15)


def test_resume_is_bit_exact():
    def run(steps, opt, w, data):
        for _ in range(steps):
            quadratic_step(opt, w, *data)

    data = torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0])
    w = nn.Parameter(torch.zeros(2))
    gen = generator(6)
    opt = IVON([w], 0.1, ess=100, beta2=0.9, generator=gen)
    run(5, opt, w, data)
    saved = copy.deepcopy((opt.state_dict(), w.detach(), gen.get_state()))
    run(5, opt, w, data)
    w2 = nn.Parameter(saved[1].clone())
    gen2 = generator()
    gen2.set_state(saved[2])
    opt2 = IVON([w2], 0.1, ess=100, beta2=0.9, generator=gen2)
    opt2.load_state_dict(saved[0])
    run(5, opt2, w2, data)
    assert torch.equal(w, w2)
    assert torch.equal(opt.state[w]["hess"], opt2.state[w2]["hess"])


def _interrupt(w):
    assert not torch.equal(w.detach(), torch.arange(3.0))
    raise KeyboardInterrupt


def test_mean_is_restored_on_any_exception_and_storage_stays():
    w = nn.Parameter(torch.arange(3.0))
    pointer = w.data_ptr()
    opt = IVON([w], 0.1, ess=10)
    with pytest.raises(KeyboardInterrupt), opt.sampled_params(train=True):
        _interrupt(w)
    assert torch.equal(w.detach(), torch.arange(3.0))
    with pytest.raises(IVONStateError, match="no gradient was captured"):
        opt.step()
    with opt.sampled_params(), pytest.raises(IVONStateError, match="nested"):
        opt.sampled_params().__enter__()
    quadratic_step(opt, w, torch.ones(3), torch.zeros(3))
    assert w.data_ptr() == pointer


def test_unused_and_frozen_parameters():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    opt = IVON([used, unused, frozen], 0.1, ess=10, weight_decay=0.1, beta2=0.5, hess_init=1.0)
    with pytest.warns(UserWarning, match="no gradient"):
        quadratic_step(opt, used, torch.ones(2), torch.zeros(2))
    for _ in range(60):
        quadratic_step(opt, used, torch.ones(2), torch.zeros(2))
    assert torch.equal(frozen, torch.ones(2))
    # ĥ = 0 takes a to a(1 + x + x²/2), x = −ρh/a: its fixed point is h = 0, the prior.
    std = opt.posterior_std()[unused]
    torch.testing.assert_close(std, torch.full((2,), 1 / math.sqrt(10 * 0.1)), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1},
        {"ess": 0},
        {"weight_decay": -1},
        {"beta1": 1},
        {"beta2": 2},
        {"hess_init": -1},
        {"mc_samples": 0},
        {"clip_radius": 0},
    ],
)
def test_arguments_are_named(bad):
    with pytest.raises(ParameterError, match=next(iter(bad))):
        IVON([nn.Parameter(torch.ones(1))], **{"lr": 0.1, "ess": 10} | bad)


@pytest.mark.statistical
def test_sampled_outputs_have_the_closed_form_variance():
    """Linear model: Var f(x) = Σ x_i² σ_i², by the functional samples."""
    net = nn.Linear(3, 1, bias=False).double()
    opt = IVON(net.parameters(), 0.1, ess=7, generator=generator(8))
    opt.state[net.weight]["hess"].copy_(torch.tensor([[0.2, 1.0, 5.0]]))
    x = torch.tensor([1.0, -2.0, 3.0]).double()
    n = 100_000
    outputs = opt.sample(net, n)["weight"][:, 0] @ x
    variance = float((x.square() * opt.posterior_std()[net.weight][0].square()).sum())
    tolerance = 5 * math.sqrt(2 / n)  # relative standard error of a variance of Normals
    assert float(outputs.var()) == pytest.approx(variance, rel=tolerance)
    center = float(net.weight[0].detach() @ x)
    assert float(outputs.mean()) == pytest.approx(center, abs=5 * math.sqrt(variance / n))


@pytest.mark.statistical
def test_prediction_averages_probabilities_not_logits():
    """p = E[sigmoid(N(μ, s²))], by quadrature; sigmoid(μ) is far from it."""
    network = Network(nn.Linear(1, 2, bias=False), CategoricalLikelihood(2))
    network.body.weight.data = torch.tensor([[0.0], [2.0]])
    opt = IVON(network.parameters(), 0.1, ess=1, weight_decay=1e-6, hess_init=0.125)
    s = math.sqrt(2 * 8)  # the difference of two logits of variance 8 each
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    exact = float((weights / (1 + np.exp(-(2 + s * nodes)))).sum() / weights.sum())
    probability = float(opt.posterior(network, seed=0)(torch.ones(1, 1), 20_000).probs[0, 1])
    assert probability == pytest.approx(exact, abs=5 * 0.5 / math.sqrt(20_000))
    assert abs(1 / (1 + math.exp(-2)) - exact) > 0.15


class Logistic(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        z = x @ self.w
        return torch.stack([torch.zeros_like(z), z], -1)


def logistic_data():
    rng = np.random.default_rng(1)
    n = 120
    X = torch.tensor(rng.normal(size=(n, 2)))
    return X, torch.tensor((X.numpy() @ [1.5, -1.0] + rng.logistic(size=n) > 0).astype(int))


def ivon_on_logistic(X, y, prior):
    n = len(y)
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = IVON(
        [w],
        0.1,
        ess=n,
        weight_decay=prior.precision / n,
        beta2=0.995,
        hess_init=0.2,
        mc_samples=6,
        generator=generator(7),
    )

    def closure():
        p = torch.sigmoid(X @ w.detach())
        w.grad = X.T @ (p - y) / n

    kept, steps = [], 1500
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        opt.step(closure)
        if step >= steps // 2:
            kept.append(opt.curvature[0].clone())
    sigma = 1 / torch.sqrt(n * torch.stack(kept).mean(0) + prior.precision)
    return w.detach(), sigma


@pytest.mark.statistical
def test_logistic_regression_reaches_the_best_mean_field_normal():
    """The ELBO's optimum over (m, σ), with expectations by Gauss–Hermite quadrature."""
    X, y = logistic_data()
    prior = NormalPrior(1.5)
    mean, sigma = ivon_on_logistic(X, y, prior)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    rows, signs = X.numpy(), 2 * y.numpy() - 1

    def negative_elbo(theta):
        m, s = theta[:2], np.exp(theta[2:])
        margin = rows @ m  # of a linear model, Normal with variance Σ x²σ²
        z = margin[:, None] + np.sqrt(rows**2 @ s**2)[:, None] * nodes
        nll = (np.logaddexp(0, -signs[:, None] * z) @ weights).sum()
        return nll + 0.5 * prior.precision * (m @ m + s @ s) - np.log(s).sum()

    best = minimize(negative_elbo, [0, 0, -1, -1], method="BFGS").x
    exact_sigma = torch.tensor(np.exp(best[2:]))
    torch.testing.assert_close(sigma, exact_sigma, rtol=0.05, atol=0)
    assert ((mean - torch.tensor(best[:2])).abs() < 0.1 * exact_sigma).all()


@pytest.mark.slow
@pytest.mark.statistical
def test_logistic_regression_matches_pyro_mean_field():
    """Same family, ordinary gradients: AutoNormal with Trace_ELBO reaches the same (m, σ)."""
    X, y = logistic_data()
    prior = NormalPrior(1.5)
    network = Network(Logistic(), CategoricalLikelihood(2))
    mean, sigma = ivon_on_logistic(X, y, prior)

    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = BayesianNetwork(network, prior)
        guide = AutoNormal(model, init_scale=0.2)
        adam = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.997})
        svi = SVI(model, guide, adam, TraceMeanField_ELBO(num_particles=8))
        for _ in range(600):
            svi.step(X, y)
        quantiles = guide.quantiles([0.5, 0.8413447460685429])["body.w"]
    reference_mean, upper = (torch.as_tensor(q).detach() for q in quantiles)
    reference_sigma = upper - reference_mean
    torch.testing.assert_close(sigma, reference_sigma, rtol=0.05, atol=0)
    assert ((mean - reference_mean).abs() < 0.15 * reference_sigma).all()

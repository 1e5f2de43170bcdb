"""Implicit VI against exact answers: Gaussian VI, closed-form optima, identities, Pyro."""

import copy
import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy.optimize import minimize
from sklearn.exceptions import NotFittedError
from torch import nn

from uq import ImplicitVIRegressor
from uq.errors import ParameterError
from uq.inference.implicit_vi import (
    ImplicitGuide,
    ImplicitWeights,
    SingularJacobianWarning,
    linearized_entropy,
    smallest_singular_value,
    smallest_value_entropy,
)
from uq.nn import MLP, NormalPrior
from uq.nn.implicit import Generator, MatrixGenerator, MatrixLinear, MLPGenerator, WeightLayout

LOG_2PI_E = math.log(2 * math.pi) + 1


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Function(Generator):
    """Generator of a closed form, whose Jacobian is left to torch.func."""

    def __init__(self, noise_dim, n_weights, function):
        super().__init__(noise_dim, n_weights)
        self.function = function

    def forward(self, z):
        return self.function(z)


def generators():
    torch.manual_seed(0)
    shapes = [(3, 4), (4, 3)]
    return {
        "affine": MLPGenerator(6, (), 20),
        "mlp": MLPGenerator(6, (9, 8), 20),
        "matrix": MatrixGenerator((2, 3), [(4, 5), (5, 6)], shapes),
        "one layer": MatrixGenerator((2, 3), [(4, 5)], shapes),
        "deep": MatrixGenerator((2, 3), [(4, 5), (5, 3), (3, 4)], shapes),
        "surplus": MatrixGenerator((2, 3), [(4, 5), (5, 6)], shapes, 22),
        "surplus, one layer": MatrixGenerator((2, 3), [(4, 5)], shapes, 23),
    }


every = pytest.mark.parametrize("kind", generators())


# -- linear regression: the posterior is known ---------------------------------------------------


class LinearRegression:
    """Bayesian linear regression of correlated inputs: unit prior, known noise."""

    def __init__(self, d=5, n=12, noise=0.5, seed=0):
        g = rng(seed)
        mix = torch.randn(d, d, generator=g, dtype=torch.float64)
        self.x = torch.randn(n, d, generator=g, dtype=torch.float64) @ mix
        self.y = torch.randn(n, generator=g, dtype=torch.float64)
        self.noise = noise
        self.precision = torch.eye(d, dtype=torch.float64) + self.x.T @ self.x / noise**2
        self.covariance = torch.linalg.inv(self.precision)
        self.mean = self.covariance @ self.x.T @ self.y / noise**2
        marginal = torch.distributions.MultivariateNormal(
            torch.zeros(n, dtype=torch.float64),
            noise**2 * torch.eye(n, dtype=torch.float64) + self.x @ self.x.T,
        )
        self.evidence = marginal.log_prob(self.y)

    def log_joint(self, theta):
        """Log p(y, θ) at each row of ``theta``."""
        likelihood = torch.distributions.Normal(theta @ self.x.T, self.noise).log_prob(self.y)
        return likelihood.sum(-1) + torch.distributions.Normal(0.0, 1.0).log_prob(theta).sum(-1)

    def expected_log_joint(self, mean, covariance):
        return self.log_joint(mean[None])[0] - 0.5 * (self.precision @ covariance).trace()


def maximise(generator, objective):
    """L-BFGS from SciPy on the parameters of ``generator``; the value reached."""
    parameters = list(generator.parameters())

    def negative(flat):
        torch.nn.utils.vector_to_parameters(torch.as_tensor(flat), parameters)
        value = -objective()
        gradient = torch.autograd.grad(value, parameters)
        return value.item(), torch.cat([g.flatten() for g in gradient]).numpy()

    start = torch.nn.utils.parameters_to_vector(parameters).detach().numpy()
    result = minimize(negative, start, jac=True, method="L-BFGS-B", options={"maxiter": 20_000})
    torch.nn.utils.vector_to_parameters(torch.as_tensor(result.x), parameters)
    return -result.fun


def affine(d, seed=0):
    torch.manual_seed(seed)
    return MLPGenerator(d, (), d).double()


def covariance_of(generator, sigma):
    a = generator.layers[0].weight.detach()
    return a @ a.T + sigma**2 * torch.eye(len(a), dtype=a.dtype)


def test_affine_generator_under_the_exact_bound_is_gaussian_vi():
    """O1: the evidence and the full posterior covariance; fails if J is detached (A collapses)."""
    problem, sigma = LinearRegression(), 1e-3
    generator = affine(5)

    def bound():
        a, b = generator.layers[0].weight, generator.layers[0].bias
        covariance = a @ a.T + sigma**2 * torch.eye(5, dtype=a.dtype)
        entropy = linearized_entropy(generator, torch.zeros(1, 5, dtype=a.dtype), sigma)[0]
        return problem.expected_log_joint(b, covariance) + entropy

    reached = maximise(generator, bound)
    # Exact but for the optimiser's tolerance; O8: never above the evidence.
    assert reached <= problem.evidence + 1e-9
    assert reached == pytest.approx(problem.evidence.item(), abs=1e-4)
    found = covariance_of(generator, sigma)
    assert (found - problem.covariance).norm() / problem.covariance.norm() < 1e-3
    # What a mean-field posterior, which matches the precision's diagonal, makes of it.
    variances = 1 / problem.precision.diagonal()
    assert (variances < 0.75 * problem.covariance.diagonal()).any()


@pytest.mark.statistical
def test_stochastic_training_finds_the_posterior():
    """O1 on the path that estimators take: draws, noise, Adam, averaged over the last steps."""
    problem, sigma = LinearRegression(d=3, n=8), 1e-2
    linear = nn.Linear(3, 1, bias=False).double()
    q = ImplicitWeights(linear, affine(3), weight_noise=sigma)
    optimizer = torch.optim.Adam(q.parameters(), 3e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    g = rng(1)
    torch.manual_seed(0)
    for _ in range(1000):
        draw = q.draw(8, g)
        f = q.evaluate(draw.weights, problem.x)[..., 0]
        likelihood = torch.distributions.Normal(f, problem.noise).log_prob(problem.y).sum(-1)
        loss = (q.kl(draw, NormalPrior(1.0)) - likelihood).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = covariance_of(q.generator, sigma)
    # Gradients of 8 draws, annealed: a few percent are left; mean-field is 0.4 away.
    assert (found - problem.covariance).norm() / problem.covariance.norm() < 0.05
    draw = q.draw(20_000, g)
    with torch.no_grad():
        values = problem.log_joint(draw.flat) + q.entropy(draw.noise[:1])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - problem.evidence) < 1e-2 + 4 * error


def test_affine_generator_under_the_smallest_value_bound_is_isotropic():
    """O2: s² = d / tr Λ, no correlation; the bound falls short of the evidence."""
    problem, sigma = LinearRegression(), 1e-3
    generator = affine(5)
    values = []

    def bound():
        a, b = generator.layers[0].weight, generator.layers[0].bias
        s = torch.linalg.svdvals(a)
        # The kink where singular values cross, smoothed: −log Σ exp(−βs²)/β.
        smooth = -(-values[-1] * s.square()).logsumexp(0) / values[-1]
        entropy = 0.5 * 5 * ((sigma**2 + smooth).log() + LOG_2PI_E)
        covariance = a @ a.T + sigma**2 * torch.eye(5, dtype=a.dtype)
        return problem.expected_log_joint(b, covariance) + entropy

    expected = 5 / problem.precision.trace()
    for beta in (1e2, 1e3, 1e4):
        values.append(beta / expected)
        maximise(generator, bound)
    found = torch.linalg.svdvals(generator.layers[0].weight.detach()).square()
    torch.testing.assert_close(found, expected.expand(5), rtol=1e-2, atol=0)
    reached = problem.expected_log_joint(
        problem.mean, covariance_of(generator, sigma)
    ) + smallest_value_entropy(
        generator, torch.zeros(1, 5, dtype=torch.float64), sigma, iterations=50, rng=rng()
    )
    assert reached.item() < problem.evidence - 0.5


@pytest.mark.statistical
def test_smallest_value_bound_by_its_own_gradients():
    """O2 by stochastic gradients of LOBPCG's vector: they equalise the singular values."""
    problem, sigma, lr = LinearRegression(d=4), 1e-3, 5e-3
    generator = affine(4)
    optimizer = torch.optim.Adam(generator.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    g, zero = rng(), torch.zeros(1, 4, dtype=torch.float64)
    for _ in range(2000):
        entropy = smallest_value_entropy(generator, zero, sigma, iterations=8, rng=g)[0]
        covariance = generator.layers[0].weight @ generator.layers[0].weight.T
        loss = -problem.expected_log_joint(generator.layers[0].bias, covariance) - entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = torch.linalg.svdvals(generator.layers[0].weight.detach()).square()
    expected = 4 / problem.precision.trace()
    # One vector is pushed up at a time, and a step of Adam moves a weight by lr at most.
    rtol = 2 * lr / float(expected.sqrt())
    torch.testing.assert_close(found, expected.expand(4), rtol=rtol, atol=0)


# -- entropy -------------------------------------------------------------------------------------


@every
def test_gradient_by_probes(kind):
    """The value is exact; the gradient is, on average over probes, too."""
    generator, sigma = generators()[kind].double(), 0.05
    z = torch.randn(3, 6, generator=rng(), dtype=torch.float64)
    w = (generator.heads if isinstance(generator, MatrixGenerator) else generator.layers)[0]
    w = w.left if isinstance(w, MatrixLinear) else w.weight
    exact = linearized_entropy(generator, z, sigma)
    (gradient,) = torch.autograd.grad(exact.sum(), w)
    g, found = rng(1), []
    for _ in range(400):
        value = linearized_entropy(generator, z, sigma, probes=2, rng=g)
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)
        found.append(torch.autograd.grad(value.sum(), w)[0])
    error = torch.stack(found).std(0) / 20
    assert ((torch.stack(found).mean(0) - gradient).abs() < 5 * error + 1e-9).all()


def test_injective_and_folding_maps():
    """O3: exact for exp; |z|, which maps two noise values to one weight, gains log 2."""
    z = torch.randn(200_000, 1, generator=rng(), dtype=torch.float64)
    exact = 0.5 * LOG_2PI_E  # of a log-normal(0, 1): its mean log-Jacobian is that of z, 0
    found = linearized_entropy(Function(1, 1, torch.exp), z, 1e-6).mean()
    # ½ log(e^2z) has standard deviation 1.
    assert found == pytest.approx(exact, abs=4 / math.sqrt(len(z)))
    half_normal = 0.5 * math.log(math.pi / 2) + 0.5
    folded = linearized_entropy(Function(1, 1, torch.abs), z[:10], 1e-6)
    assert folded.mean().item() == pytest.approx(half_normal + math.log(2), abs=1e-9)


@every
@pytest.mark.parametrize("m", ["more weights than noise", "as many", "fewer"])
def test_determinant_lemma(kind, m):
    """O4: the smaller Gram matrix gives the m × m log-determinant."""
    generator, sigma = generators()[kind].double(), 0.03
    noise = {"more weights than noise": 6, "as many": None, "fewer": None}[m]
    if noise is None:
        n_out = 6 if m == "as many" else 4
        torch.manual_seed(1)
        generator = (
            MLPGenerator(6, (9,), n_out)
            if "m" in kind[:1]
            else MatrixGenerator((2, 3), [(4, 5)], [(2, n_out // 2)])
        ).double()
    z = torch.randn(4, 6, generator=rng(), dtype=torch.float64)
    jacobian = Generator.jacobian(generator, z).detach()
    n = generator.n_weights
    full = jacobian @ jacobian.mT + sigma**2 * torch.eye(n, dtype=torch.float64)
    expected = 0.5 * (torch.linalg.slogdet(full)[1] + n * LOG_2PI_E)
    torch.testing.assert_close(
        linearized_entropy(generator, z, sigma), expected, rtol=1e-10, atol=0
    )


@every
def test_products_with_the_jacobian(kind):
    """Fast Gram matrix and products are those of the Jacobian by torch.func, gradients too."""
    generator = generators()[kind].double()
    z = torch.randn(4, 6, generator=rng(), dtype=torch.float64)
    jacobian = Generator.jacobian(generator, z)
    v = torch.randn(4, 3, 6, generator=rng(1), dtype=torch.float64)
    exact = {"rtol": 1e-10, "atol": 1e-14}
    torch.testing.assert_close(generator.gram(z), jacobian.mT @ jacobian, **exact)
    torch.testing.assert_close(generator.push(z, v), v @ jacobian.mT, **exact)
    torch.testing.assert_close(Generator.push(generator, z, v), v @ jacobian.mT, **exact)
    normal = v @ jacobian.mT @ jacobian
    torch.testing.assert_close(generator.normal_product(z)(v), normal, **exact)
    torch.testing.assert_close(Generator.normal_product(generator, z)(v), normal, **exact)
    probe = torch.randn(4, 6, 6, generator=rng(2), dtype=torch.float64)
    p = list(generator.parameters())
    fast = torch.autograd.grad((generator.gram(z) * probe).sum(), p, allow_unused=True)
    slow = torch.autograd.grad((jacobian.mT @ jacobian * probe).sum(), p, allow_unused=True)
    for a, b in zip(fast, slow, strict=True):
        if a is None or b is None:
            assert b is None or not b.any()  # last biases move no tangent
            continue
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-13)


def test_matrix_layer_is_a_kronecker_product():
    """O5: J = W_l ⊗ W_rᵀ, its singular values and log-determinant."""
    torch.manual_seed(0)
    layer = MatrixLinear((3, 4), (5, 6)).double()
    generator = Function(12, 30, lambda z: layer(z.unflatten(-1, (3, 4))).flatten(1))
    z = torch.randn(2, 12, dtype=torch.float64)
    jacobian = generator.jacobian(z)[0]
    left, right = layer.left.detach(), layer.right.detach()
    torch.testing.assert_close(
        jacobian, torch.kron(left, right.T.contiguous()), rtol=1e-12, atol=1e-14
    )
    products = torch.linalg.svdvals(left)[:, None] * torch.linalg.svdvals(right)
    found = torch.linalg.svdvals(jacobian)
    torch.testing.assert_close(found, products.flatten().sort(descending=True)[0])
    assert found[-1].item() == pytest.approx(
        torch.linalg.svdvals(left)[-1].item() * torch.linalg.svdvals(right)[-1].item(), rel=1e-8
    )
    expected = 4 * torch.logdet(left.T @ left) + 3 * torch.logdet(right @ right.T)
    torch.testing.assert_close(torch.logdet(jacobian.T @ jacobian), expected, rtol=1e-8, atol=0)
    t = torch.randn(7, 3, 4, dtype=torch.float64)
    pushed = (t.flatten(1) @ jacobian.T).view(7, 5, 6)
    torch.testing.assert_close(layer.push(t), pushed)
    torch.testing.assert_close(layer.pull(pushed).flatten(1), pushed.flatten(1) @ jacobian)


@every
def test_scaling_the_last_layer(kind):
    """O6: d/dt of H at a last layer times e^t is Σ s²/(s² + σ²): the entropy's sign and weight."""
    generator, sigma = generators()[kind].double(), 0.05
    z = torch.randn(1, 6, generator=rng(), dtype=torch.float64)
    s2 = torch.linalg.svdvals(Generator.jacobian(generator, z)[0].detach()).square()
    expected = (s2 / (s2 + sigma**2)).sum()
    last = generator.heads if isinstance(generator, MatrixGenerator) else [generator.layers[-1]]

    def scaled(t):
        for layer in last:
            w = layer.right if isinstance(layer, MatrixLinear) else layer.weight
            w.data.mul_(math.exp(t))
        value = linearized_entropy(generator, z, sigma).item()
        for layer in last:
            w = layer.right if isinstance(layer, MatrixLinear) else layer.weight
            w.data.mul_(math.exp(-t))
        return value

    slope = (scaled(1e-4) - scaled(-1e-4)) / 2e-4
    assert slope == pytest.approx(expected.item(), rel=1e-3)


# -- the smallest singular value -----------------------------------------------------------------


def test_smallest_singular_value():
    """O7: non-increasing in k, never below the true one, equal in the end, and its gradient."""
    torch.manual_seed(0)
    generator = MLPGenerator(20, (60,), 105).double()
    z = torch.randn(3, 20, dtype=torch.float64)
    jacobian = generator.jacobian(z)
    exact = torch.linalg.svdvals(jacobian)[:, -1]
    found = torch.stack(
        [
            smallest_singular_value(generator, z, iterations=k, rng=rng()).detach()
            for k in (1, 2, 5, 12, 30, 100)
        ]
    )
    assert (found.diff(dim=0) <= 1e-9).all()
    assert (found >= exact - 1e-9).all()
    torch.testing.assert_close(found[-1], exact.detach(), rtol=1e-3, atol=0)
    parameters = [p for layer in generator.layers for p in (layer.weight,)]
    ours = torch.autograd.grad(
        smallest_singular_value(generator, z, iterations=100, rng=rng()).sum(), parameters
    )
    theirs = torch.autograd.grad(exact.sum(), parameters)
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (ours, theirs))
    assert torch.cosine_similarity(a, b, 0) > 0.999
    torch.testing.assert_close(a.norm(), b.norm(), rtol=1e-2, atol=0)


@every
def test_the_smallest_value_bound_is_below_the_exact_one(kind):
    """O8, pointwise, with s_min converged."""
    generator = generators()[kind].double()
    z = torch.randn(5, 6, generator=rng(), dtype=torch.float64)
    for sigma in (1e-3, 0.3):
        lower = smallest_value_entropy(generator, z, sigma, iterations=200, rng=rng())
        assert (lower <= linearized_entropy(generator, z, sigma) + 1e-9).all()
        s = torch.linalg.svdvals(Generator.jacobian(generator, z))[:, -1]
        m = generator.n_weights
        expected = 3 * (s**2 + sigma**2).log() + (m - 6) * math.log(sigma) + 0.5 * m * LOG_2PI_E
        torch.testing.assert_close(lower, expected, rtol=1e-4, atol=1e-4)


def test_few_noise_dimensions_and_large_ones_of_the_iteration():
    """The basis of three vectors is cut to what d holds."""
    for d in (1, 2, 3):
        torch.manual_seed(d)
        generator = MLPGenerator(d, (5,), 9).double()
        z = torch.randn(4, d, dtype=torch.float64)
        exact = torch.linalg.svdvals(generator.jacobian(z))[:, -1]
        found = smallest_singular_value(generator, z, iterations=20, rng=rng())
        torch.testing.assert_close(found, exact)


# -- weights of a module -------------------------------------------------------------------------


class Odd(nn.Module):
    """Layers of several kinds, a frozen parameter, a scalar and a shared weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.GroupNorm(1, 3)
        self.gru = nn.GRU(3, 4)
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.again = self.gru
        self.out = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.out.weight

    def forward(self, x):
        h = self.norm(self.conv(x)).mean((2, 3))
        h = self.gain * self.again(h[None])[0][0] * self.frozen.sum()
        return self.tied(self.out(h))


def test_layout_of_any_module():
    net = Odd()
    layout = WeightLayout(net)
    shapes = {(b.layer, b.shape) for b in layout.blocks}
    # GRU: 12 × 3 and 12 × 4 weights and two biases of 12 share their rows.
    known = {("conv", (3, 19)), ("norm", (3, 2)), ("gru", (12, 9)), ("", (1, 1)), ("out", (4, 5))}
    assert shapes == known | {("tied", (4, 1))}  # its weight is that of "out"
    weights = {k: p.detach() for k, p in net.named_parameters() if p.requires_grad}
    flat = layout.flatten(weights)
    assert len(flat) == layout.n_weights == sum(p.numel() for p in weights.values())
    again = layout.unflatten(torch.stack([flat, 2 * flat]))
    assert again.keys() == weights.keys()
    for name, w in weights.items():
        assert torch.equal(again[name], torch.stack([w, 2 * w]))
    q = ImplicitWeights(net)
    x = torch.randn(5, 2, 6, 6)
    draw = q.draw(3)
    out = q.evaluate(draw.weights, x)
    assert out.shape == (3, 5, 4)
    one = copy.deepcopy(net)
    one.load_state_dict({k: w[1] for k, w in draw.weights.items()}, strict=False)
    torch.testing.assert_close(out[1], one(x), rtol=1e-5, atol=1e-6)
    q.kl(draw, NormalPrior(1.0)).mean().backward()
    assert all(p.grad is not None for p in q.generator.trunk.parameters())
    assert all(p.grad is None for p in net.parameters())


def test_starts_around_the_weights_of_the_module():
    torch.manual_seed(0)
    net = MLP(6, (12,), 3)
    q = ImplicitWeights(net, init_std=0.07)
    draw = q.draw(4000, rng())
    start = q.layout.flatten({k: p.detach() for k, p in net.named_parameters()})
    # Spread set from 64 draws of the noise: 1/√128 = 9 %, and the noise σ = 0.01.
    assert draw.flat.std(0).square().mean().sqrt().item() == pytest.approx(0.07, rel=0.2)
    assert (draw.flat.mean(0) - start).abs().max() < 0.04


@pytest.mark.statistical
def test_correlation_of_layers():
    """A generator of which the covariance AAᵀ + σ²I is known."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    a = torch.zeros(10, 3, dtype=torch.float64)
    a[:2, 0] = a[4:6, 0] = 1.0
    a[2:4, 1] = a[6:, 2] = 1.0
    generator = MLPGenerator(3, (), 10).double()
    generator.layers[0].weight.data = a
    q = ImplicitWeights(net, generator, weight_noise=0.5)
    covariance = a @ a.T + 0.25 * torch.eye(10)
    variance = covariance.diagonal()
    expected = (covariance / (variance[:, None] * variance).sqrt()).square()
    found = q.block_correlation(4000, rng()).square()
    # Each squared correlation has a standard error below 2·0.8/√4,000 = 0.025.
    within = (expected[:4, :4].sum() - 4) / 12
    assert found[0, 0].item() == pytest.approx(within.item(), abs=0.05)
    assert found[0, 1].item() == pytest.approx(expected[:4, 4:].mean().item(), abs=0.05)
    cross = q.covariance("0.weight", "1.weight", 4000, rng())
    torch.testing.assert_close(cross, covariance[:4, 4:], rtol=0, atol=0.1)
    generator.layers[0].weight.data = torch.zeros_like(a)
    assert q.block_correlation(2000, rng()).max() < 0.05
    with pytest.raises(ParameterError, match=r"'2\.weight' is not a parameter.*0\.weight"):
        q.covariance("0.weight", "2.weight")


def test_prior_of_any_pyro_distribution():
    net = MLP(3, (4,), 2).double()
    q = ImplicitWeights(net)
    draw = q.draw(3, rng())

    class Laplace:
        def distribution(self, parameter):
            one = pyro.distributions.Laplace(torch.zeros_like(parameter), 0.3)
            return one.to_event(parameter.ndim)

    expected = torch.distributions.Laplace(0.0, 0.3).log_prob(draw.flat).sum(-1)
    torch.testing.assert_close(q.log_prior(draw, Laplace()), expected)
    scale = torch.tensor(0.3, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, scale).log_prob(draw.flat).sum(-1)
    torch.testing.assert_close(q.log_prior(draw, NormalPrior(0.3)), normal)
    kl = q.kl(draw, NormalPrior(0.3), entropy_weight=0.5)
    torch.testing.assert_close(kl, -normal - 0.5 * q.entropy(draw.noise))


# -- Pyro ----------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("vectorize", [False, True])
def test_pyro_guide_gives_the_same_bound(vectorize):
    """Trace_ELBO of the guide is L′: on an affine generator, where L′ is known."""
    problem, sigma = LinearRegression(), 0.1

    def model():
        zeros = torch.zeros(5, dtype=torch.float64)
        theta = pyro.sample("theta", pyro.distributions.Normal(zeros, 1.0).to_event(1))
        f = theta @ problem.x.T
        f = f.squeeze(-2) if f.ndim > 2 else f  # particles, and no other plate
        with pyro.plate("rows", len(problem.x)):
            pyro.sample("y", pyro.distributions.Normal(f, problem.noise), obs=problem.y)

    generator = affine(5)
    covariance = covariance_of(generator, sigma)
    expected = problem.expected_log_joint(generator.layers[0].bias.detach(), covariance) + (
        0.5 * (torch.logdet(covariance) + 5 * LOG_2PI_E)
    )
    guide = ImplicitGuide(model, generator, weight_noise=sigma)
    n = 1000 if vectorize else 50
    elbo = Trace_ELBO(num_particles=n, vectorize_particles=vectorize, max_plate_nesting=1)
    with torch.no_grad():
        values = torch.tensor([-elbo.loss(model, guide) for _ in range(8)])
    error = values.std() / math.sqrt(8)
    assert abs(values.mean() - expected) < 5 * error


def test_pyro_guide_of_a_constrained_model_leaves_the_parameter_store_alone():
    """A PyroModule of the user's own with a positive noise, through the ELBO module."""
    import pyro.distributions as dist
    from pyro.nn import PyroModule, PyroSample

    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

        def forward(self, x, y=None):
            noise = pyro.sample("noise", dist.Gamma(2.0, 4.0))
            mean = self.linear(x)[:, 0]
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(mean, noise), obs=y)

    pyro.clear_param_store()
    x = torch.randn(60, 2, generator=rng())
    y = x @ torch.tensor([1.0, -2.0]) + 0.5 + 0.3 * torch.randn(60, generator=rng(1))
    model = Regression()
    guide = ImplicitGuide(model)
    guide(x, y)
    elbo = Trace_ELBO(num_particles=2)(model, guide)
    optimizer = torch.optim.Adam(elbo.parameters(), 2e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = elbo(x, y)
        loss.backward()
        optimizer.step()
    assert not list(pyro.get_param_store().keys())
    with torch.no_grad():
        draws = [guide(x, y) for _ in range(100)]
    noise = torch.stack([d["noise"] for d in draws])
    weight = torch.stack([d["linear.weight"] for d in draws])[:, 0]
    assert (noise > 0).all()
    # The posterior's standard deviations are 0.3/√60 = 0.04 and, for the noise, 0.03.
    assert noise.mean().item() == pytest.approx(0.3, abs=0.1)
    torch.testing.assert_close(weight.mean(0), torch.tensor([1.0, -2.0]), rtol=0, atol=0.15)
    assert weight.std(0).max() < 0.12


# -- bad input -----------------------------------------------------------------------------------


def test_arguments_that_cannot_be_used():
    net = MLP(3, (4,), 2)
    with pytest.raises(ParameterError, match="generator makes 7 weights, but MLP has 26"):
        ImplicitWeights(net, MLPGenerator(2, (3,), 7))
    for sigma in (0.0, 1e-5, 0.7, math.nan):
        with pytest.raises(ParameterError, match="weight_noise must be within"):
            ImplicitWeights(net, weight_noise=sigma)
    with pytest.raises(ParameterError, match="no trainable parameters"):
        ImplicitWeights(nn.Flatten())
    with pytest.raises(ParameterError, match=r"BatchNorm1d.*GroupNorm"):
        ImplicitWeights(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    with pytest.raises(ParameterError, match="bound must be one of"):
        ImplicitWeights(net).entropy(torch.zeros(1, 64), "tight")
    with pytest.raises(ParameterError, match=r"noise_dim <= n_weights, got 9 > 4.*null space"):
        smallest_value_entropy(MLPGenerator(9, (5,), 4), torch.zeros(1, 9), 0.1)
    with pytest.raises(ParameterError, match="noise_dim and n_weights must be >= 1"):
        MLPGenerator(0, (5,), 4)
    with pytest.raises(ParameterError, match="make 20 weights for n_weights=16"):
        MatrixGenerator((2, 2), [(3, 3)], [(5, 4)], 16)
    with pytest.raises(ParameterError, match="one shape each"):
        MatrixGenerator((2, 2), [], [(5, 4)])

    def model():
        pyro.sample("theta", pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(ParameterError, match="makes 4 numbers, but the model has 3"):
        ImplicitGuide(model, MLPGenerator(2, (3,), 4))()


def test_singular_jacobians():
    """Directions that g does not move count with σ; where rounding wins, a warning says so."""
    generator = Function(3, 5, lambda z: torch.cat([z[:, :1]] * 5, 1))
    z = torch.randn(2, 3, dtype=torch.float64)
    sigma = 0.1
    expected = 0.5 * (math.log(5 + sigma**2) + 4 * math.log(sigma**2) + 5 * LOG_2PI_E)
    found = linearized_entropy(generator, z, sigma)
    torch.testing.assert_close(found, torch.full((2,), expected, dtype=torch.float64))
    lowest = smallest_value_entropy(generator, z, sigma)
    at_sigma = torch.full((2,), 5 * math.log(sigma) + 2.5 * LOG_2PI_E, dtype=torch.float64)
    torch.testing.assert_close(lowest, at_sigma)
    # In float32 the Gram matrix of large weights rounds to negative eigenvalues.
    torch.manual_seed(0)
    mix = torch.randn(3, 20)
    large = Function(20, 40, lambda z: 1e4 * z @ mix.T @ torch.ones(3, 40).cumsum(1).sin())
    with pytest.warns(SingularJacobianWarning, match="Raise weight_noise"):
        value = linearized_entropy(large, torch.randn(2, 20), 1e-3)
    assert value.isfinite().all()


def test_nan_in_the_iteration():
    class Broken(Function):
        calls = 0

        def normal_product(self, z):
            exact = super().normal_product(z)

            def product(v):
                self.calls += 1
                return exact(v) * (math.nan if self.calls > 3 else 1.0)

            return product

    torch.manual_seed(0)
    layer = MLPGenerator(6, (8,), 12).double()
    z = torch.randn(2, 6, dtype=torch.float64)
    broken = Broken(6, 12, layer)
    with pytest.warns(SingularJacobianWarning, match="last finite vector"):
        found = smallest_singular_value(broken, z, iterations=12, rng=rng())
    expected = smallest_singular_value(layer, z, iterations=2, rng=rng())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


# -- estimators ----------------------------------------------------------------------------------


def sine(n=40):
    x = torch.linspace(-2, 2, n, dtype=torch.float64)[:, None].numpy()
    return x, torch.sin(torch.as_tensor(2 * x[:, 0])).numpy()


QUICK = {
    "hidden": (6,),
    "max_epochs": 4,
    "patience": None,
    "random_state": 0,
    "device": "cpu",
    "generator_width": 6,
}


def test_estimator_arguments_that_cannot_be_used():
    x, y = sine()
    for name, value in {
        "weight_noise": 0.0,
        "init_weight_noise": 0.6,
        "noise_dim": 0,
        "generator_width": 2.5,
        "bound": "tight",
        "entropy_weight": -1.0,
        "kl_warmup": 1.5,
        "mc_samples": 0,
        "sv_iterations": 0,
        "init_std": 0.0,
        "prior_scale": -1.0,
    }.items():
        with pytest.raises(ParameterError, match=name):
            ImplicitVIRegressor(**QUICK | {name: value}).fit(x, y)
    # 6 + 6 + 6 + 1 weights and the noise level.
    with pytest.raises(ParameterError, match="network's 20 weights, got noise_dim=21"):
        ImplicitVIRegressor(**QUICK, bound="smallest", noise_dim=21).fit(x, y)
    model = ImplicitVIRegressor(**QUICK, noise_dim=21).fit(x, y)  # the exact one takes m × m
    assert math.isfinite(model.log_score(x, y))


def test_weight_of_the_kl_rises():
    """The first step's loss is a + βk, with one a and one k whatever the warm-up."""
    x, y = sine()

    def first(share):
        settings = QUICK | {"max_epochs": 10, "batch_size": None}
        model = ImplicitVIRegressor(**settings, kl_warmup=share).fit(x, y)
        return model.history_["train_loss"][0]

    none, half, whole = (first(share) for share in (0.0, 0.5, 1.0))
    k = (none - whole) / 0.9
    assert k > 0.1
    assert half - whole == pytest.approx(0.1 * k, rel=1e-4)


def test_estimator_runs_sigma_down_and_shows_correlations():
    x, y = sine()
    seen = []
    model = ImplicitVIRegressor(
        **QUICK | {"max_epochs": 8},
        batch_size=None,
        init_weight_noise=0.16,
        weight_noise=0.01,
        callbacks=[lambda state: seen.append(float(state.module.q.weight_noise)) or False],
    ).fit(x, y)
    # A factor of 16 over the first four steps, then constant.
    expected = [0.16, 0.08, 0.04, 0.02, 0.01, 0.01, 0.01, 0.01]
    assert seen == pytest.approx(expected, rel=1e-5)
    table = model.weight_correlation(256)
    assert list(table.index) == list(table.columns) == ["body.0", "body.2", "likelihood"]
    assert table.to_numpy().max() <= 1
    assert table.loc["body.0", "body.2"] > 0.05  # all layers see the same noise
    assert (table.to_numpy() == model.weight_correlation(256).to_numpy()).all()
    with pytest.raises(NotFittedError):
        ImplicitVIRegressor().weight_correlation()


@pytest.mark.statistical
def test_estimator_as_pyro():
    """The guide draws the posterior's weights: the same means and deviations."""
    x, y = sine()
    model = ImplicitVIRegressor(**QUICK, init_std=0.3).fit(x, y)
    network, guide = model.posterior_.to_pyro(NormalPrior(1.0))
    inputs = torch.as_tensor((x - model.x_mean_) / model.x_scale_, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        found = [guide(inputs) for _ in range(500)]
        draw = model.posterior_.q.draw(4000, rng())
    for name, ours in draw.weights.items():
        theirs = torch.stack([f[name] for f in found])
        assert theirs.shape[1:] == ours.shape[1:]
        deviation = ours.std(0)
        # Five standard errors of 500 draws, of the mean and of the deviation.
        assert ((theirs.mean(0) - ours.mean(0)).abs() < 0.24 * deviation + 1e-3).all()
        assert ((theirs.std(0) / deviation).log().abs() < 0.3).all()
    loss = Trace_ELBO().differentiable_loss(network, guide, inputs, torch.as_tensor(y)[:, None])
    assert loss.isfinite()


def test_entropy_keeps_the_weights_apart():
    """Without the entropy the weights' spread collapses (the digits check, in small)."""
    x, y = sine()
    settings = QUICK | {"max_epochs": 200, "batch_size": None, "lr": 1e-2, "noise_dim": 8}
    spread = {}
    for weight in (0.0, 1.0):
        model = ImplicitVIRegressor(**settings, entropy_weight=weight, init_std=0.2).fit(x, y)
        with torch.no_grad():
            spread[weight] = model.posterior_.q.draw(200, rng()).flat.std(0).mean()
    assert spread[1.0] > 3 * spread[0.0]

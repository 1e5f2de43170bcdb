"""SSVI against exact answers: folded normals, closed-form optima, best subsets, counted weights."""

import copy
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from uq.inference.ssvi import (
    CRITERIA,
    SSVI,
    account,
    kl_warmup,
    removal_score,
    replaced_share,
    set_same_noise,
)
from uq.kernels.sparse_linear import Pattern, sparse_product
from uq.nn.ssvi import (
    SparseGaussian,
    SparseGaussianLayer,
    count_active,
    layer_densities,
    sparse_kl,
    sparse_weights,
    sparsify,
)
from uq.nn.ssvi_compact import compact, densify

MLP = [(64, 48), (48, 32), (32, 10)]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 48), nn.ELU(), nn.Linear(48, 32), nn.ELU(), nn.Linear(32, 10)
    ).double()


def batch(n=32, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 64, generator=g, dtype=torch.float64)
    return x, torch.randint(10, (n,), generator=g)


def random_gaussians(n=100_000, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, generator=g, dtype=torch.float64)
    return mean, torch.exp(torch.randn(n, generator=g, dtype=torch.float64))


def spread(module, seed=3):
    """Give every weight a mean and standard deviation of its own."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in sparse_weights(module).values():
            w.mean.copy_(torch.randn(w.mean.shape, generator=g, dtype=w.mean.dtype))
            w.rho.copy_(torch.randn(w.rho.shape, generator=g, dtype=w.rho.dtype) - 1)
    return module


# -- scores ------------------------------------------------------------------------------------


def test_folded_normal_moments():
    mean, std = random_gaussians(200)
    folded = stats.foldnorm(c=(mean.abs() / std).numpy(), scale=std.numpy())
    first = removal_score("mean_abs", mean, std).numpy()
    np.testing.assert_allclose(first, folded.mean(), rtol=1e-10)
    ratio = removal_score("snr_abs", mean, std).numpy()
    np.testing.assert_allclose(first / ratio, folded.std(), rtol=1e-10)


def test_scores_at_known_values():
    r = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 50.0], dtype=torch.float64)
    got = removal_score("snr_abs", r, torch.ones_like(r)).numpy()
    known = [1.3236081, 1.3381781, 1.4594610, 2.0895069, 3.0076695, 50.0]
    np.testing.assert_allclose(got, known, rtol=4e-8)
    one = torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    assert float(removal_score("exp_abs", *one).exp()) == pytest.approx(2.18399, abs=5e-6)


@pytest.mark.parametrize(("mean", "std"), [(0.4, 0.7), (-1.3, 0.2), (0.0, 1.1)])
def test_exponential_scores_by_quadrature(mean, std):
    def expected_exp(k):
        def integrand(t):
            return math.exp(k * abs(t)) * stats.norm.pdf(t, mean, std)

        ends = mean - 14 * std, 0, mean + 14 * std
        return sum(integrate.quad(integrand, *side, epsabs=1e-13)[0] for side in pairwise(ends))

    once, twice = expected_exp(1), expected_exp(2)
    args = torch.tensor([[mean], [std]], dtype=torch.float64)
    assert float(removal_score("exp_abs", *args)) == pytest.approx(math.log(once), rel=1e-8)
    expected = math.log(once / math.sqrt(twice - once**2))
    assert float(removal_score("snr_exp_abs", *args)) == pytest.approx(expected, rel=1e-6)


def test_both_signal_to_noise_scores_order_alike():
    mean, std = random_gaussians()
    snr = removal_score("snr", mean, std)
    by_snr = removal_score("snr_abs", mean, std)[snr.argsort()]
    # Not strictly: next to 0 the second one is flat to the fourth order.
    assert (by_snr.diff() >= -1e-13 * by_snr[1:]).all()
    above = snr > 1e-2
    a, b = (removal_score(c, mean[above], std[above]) for c in ("snr", "snr_abs"))
    assert torch.equal(a.argsort(), b.argsort())


def test_scores_of_almost_certain_weights_are_finite_and_ordered():
    # Where σ is a millionth of |μ|, μ² + σ² − E|θ|² cancels in float32.
    mean = torch.linspace(0.5, 1.5, 100)
    for criterion in CRITERIA[:-1]:
        score = removal_score(criterion, mean, torch.full_like(mean, 1e-6))
        assert score.isfinite().all(), criterion
        if criterion != "snr_exp_abs":  # there the exact score is flat: e^|θ|/sd = 1/σ
            assert (score.diff() > 0).all(), criterion


def test_vanishing_equal_noise_is_magnitude_pruning():
    mean, _ = random_gaussians(1000)
    std = torch.full_like(mean, 1e-9)
    order = removal_score("mean", mean, std).argsort()
    for criterion in ("snr", "snr_abs", "mean_abs", "exp_abs"):
        assert torch.equal(removal_score(criterion, mean, std).argsort(), order), criterion


# -- objective ---------------------------------------------------------------------------------


def test_kl_is_that_of_the_active_entries():
    torch.manual_seed(0)
    weight = SparseGaussian(torch.randn(20, 30, dtype=torch.float64), 50, 0.3)
    with torch.no_grad():
        weight.rho.copy_(torch.randn(50))
    q = Normal(weight.mean, weight.std)
    expected = kl_divergence(q, Normal(torch.zeros(50).double(), 0.3)).sum()
    torch.testing.assert_close(weight.kl(), expected, rtol=1e-12, atol=0)
    assert sum(p.numel() for p in weight.parameters()) == 100  # nothing else to have a gradient
    pyro_kl = kl_divergence(Normal(weight.mean, weight.std), weight.prior.base_dist).sum()
    torch.testing.assert_close(weight.kl(), pyro_kl, rtol=1e-12, atol=0)


LAYERS = [
    (lambda: nn.Linear(12, 5), (12,)),
    (lambda: nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"), (4, 7, 7)),
    (lambda: nn.Conv3d(2, 3, 2, dilation=2, padding="same", bias=False), (2, 5, 5, 5)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_layer_moments(make, shape):
    torch.manual_seed(0)
    ordinary = make().double()
    layer = spread(sparsify(ordinary, 0.5))
    assert isinstance(layer, SparseGaussianLayer)
    x = torch.randn(2, *shape, dtype=torch.float64)
    mean, variance = layer.moments(x)
    # The mean is the ordinary layer's at the mean weights, in eval mode, too.
    with torch.no_grad():
        ordinary.weight.copy_(layer.weight.mean_tensor())
    torch.testing.assert_close(ordinary(x), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.eval()(x), mean, rtol=0, atol=0)
    # The variance is Σ x² σ² over the active entries: by the Jacobian in the weights.
    ordinary.weight.requires_grad_()
    jacobian = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(ordinary, {"weight": w}, (x,)),
        ordinary.weight.detach(),
    )
    variances = layer.weight.variance_tensor()
    assert (variances[~layer.weight.mask] == 0).all()
    expected = (jacobian.square() * variances).flatten(mean.ndim).sum(-1)
    torch.testing.assert_close(variance, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.statistical
def test_noise_of_a_layer_has_its_moments():
    n = 100_000
    torch.manual_seed(0)
    layer = spread(sparsify(nn.Linear(6, 3).double(), 0.4))
    x = torch.randn(1, 6, dtype=torch.float64)
    mean, variance = (t.detach()[0] for t in layer.moments(x))
    local = layer(x.expand(n, -1)).detach()
    layer.same_noise = True
    weights = torch.stack([layer(x).detach()[0] for _ in range(n // 5)])
    for draws in (local, weights):
        # Five standard errors of a mean, of a variance and (independent outputs) of a correlation.
        error = 5 / math.sqrt(len(draws))
        torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=error * float(variance.max()))
        torch.testing.assert_close(draws.var(0), variance, rtol=error * math.sqrt(2), atol=0)
        off_diagonal = np.corrcoef(draws.numpy().T) - np.eye(3)
        assert abs(off_diagonal).max() < error
    assert torch.equal(layer(x.expand(4, -1))[0], layer(x)[0]) is False  # a draw each call
    both = layer(x.expand(4, -1))
    torch.testing.assert_close(both[0], both[3], rtol=0, atol=0)


def linear_gaussian(n=80, d=12, density=0.5, prior_scale=0.7):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    x = x @ torch.randn(d, d, generator=g, dtype=torch.float64) / 3
    y = x @ torch.randn(d, generator=g, dtype=torch.float64)
    y = y + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)
    torch.manual_seed(2)
    layer = sparsify(nn.Linear(d, 1, bias=False).double(), density)
    layer.weight.prior_scale = prior_scale
    return layer, x, y


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_fixed_mask_optimum_of_a_linear_gaussian_model(density, temperature):
    layer, x, y = linear_gaussian(density=density)
    n, noise, s0 = len(x), 0.25, layer.weight.prior_scale
    active = x[:, layer.weight.index]
    gram = active.T @ active / noise
    precision = gram + temperature / s0**2 * torch.eye(len(gram)).double()
    mean = torch.linalg.solve(precision, active.T @ y / noise)
    variance = temperature / (temperature / s0**2 + gram.diagonal())
    with torch.no_grad():
        layer.weight.mean.copy_(mean)
        std = variance.sqrt()
        layer.weight.rho.copy_(std + torch.log(-torch.expm1(-std)))
    # The objective is convex in the means and has one stationary point in each deviation.
    loc, spread_ = layer.moments(x)
    nll = ((y - loc[:, 0]).square() + spread_[:, 0]) / (2 * noise)
    loss = nll.mean() + temperature * sparse_kl(layer) / n
    for gradient in torch.autograd.grad(loss, [layer.weight.mean, layer.weight.rho]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)


def test_standard_deviations_return_to_the_prior_without_data():
    """They move: what plain SGD on them does not do."""
    net = sparsify(nn.Linear(20, 5).double(), 0.3, prior_scale=2.0)
    scale = net.weight.prior_scale
    optimizer = SSVI(net, torch.optim.Adam(net.parameters(), 0.05), n_steps=1500)

    def closure():
        optimizer.zero_grad()
        loss = sparse_kl(net) / 100
        loss.backward()
        return loss

    for _ in range(1500):
        optimizer.step(closure)
    torch.testing.assert_close(net.weight.std, torch.full((30,), scale).double(), rtol=1e-3, atol=0)
    # Adam's steps do not shrink with the gradient.
    assert net.weight.mean.abs().max() < 0.1 * scale


# -- exchange of the active set ----------------------------------------------------------------


class ExactSolver(torch.optim.Optimizer):
    """Sets the active means of an orthogonal regression to their optimum: an exact inner solve."""

    def __init__(self, weight, optimum):
        super().__init__(weight.parameters(), {})
        self.weight, self.optimum = weight, optimum

    def step(self, closure):
        with torch.no_grad():
            self.weight.mean.copy_(self.optimum[self.weight.index])
            self.weight.rho.fill_(-3.0)
        return closure()


def best_subset(grow_grad, seed, rounds=30, s=8, d=50, n=200):
    g = torch.Generator().manual_seed(seed)
    x = torch.linalg.qr(torch.randn(n, d, generator=g, dtype=torch.float64)).Q * math.sqrt(n)
    y = x @ torch.randn(d, generator=g, dtype=torch.float64)
    scores = x.T @ y / n
    torch.manual_seed(seed)
    layer = sparsify(nn.Linear(d, 1, bias=False).double(), s / d).eval()
    assert layer.weight.n_active == s
    base = ExactSolver(layer.weight, scores)
    # Two thirds of a run that is very long, so that the share stays at 0.3: n_rep = 2.
    opt = SSVI(layer, base, n_steps=10**6, update_every=2, grow_grad=grow_grad)

    def closure():
        layer.zero_grad()
        loss = 0.5 * (y - layer(x)[:, 0]).square().mean()
        loss.backward()
        return loss

    best = set(scores.abs().topk(s).indices.tolist())
    overlaps = []
    for _ in range(2 * rounds):
        opt.step(closure)
        if opt.t % 2 == 0:
            overlaps.append(len(best & set(layer.weight.index.tolist())))
    assert opt.n_updates == rounds
    return overlaps


@pytest.mark.parametrize("seed", range(5))
def test_best_subset_of_an_orthogonal_design(seed):
    s, n_rep = 8, 2
    overlaps = best_subset("post", seed)
    reached = math.ceil(s / n_rep) + 1
    assert overlaps[reached:] == [s] * (len(overlaps) - reached)
    before = best_subset("pre", seed)
    assert min(before[reached:]) >= s - n_rep
    assert min(before[reached:]) < s  # the best set does not stay there


class Checked:
    """Runs SSVI on a network and checks what must hold at every step."""

    def __init__(self, base, density=0.2, **settings):
        self.net = sparsify(mlp(), density)
        self.opt = SSVI(self.net, base(self.net.parameters()), **settings)
        self.counts = {k: w.n_active for k, w in sparse_weights(self.net).items()}
        self.x, self.y = batch()
        self.changed = []

    def closure(self):
        self.opt.zero_grad()
        nll = F.cross_entropy(self.net(self.x), self.y)
        loss = nll + sparse_kl(self.net) / 100
        loss.backward()
        return loss

    def state(self, weight):
        values = zip(weight.mean.tolist(), weight.rho.tolist(), strict=True)
        return dict(zip(weight.index.tolist(), values, strict=True))

    def moments(self, weight):
        kept = []
        for p in (weight.mean, weight.rho):
            kept += [v for v in self.opt.state[p].values() if torch.is_tensor(v) and v.ndim]
        values = torch.stack(kept, 1).tolist() if kept else [[]] * weight.n_active
        return dict(zip(weight.index.tolist(), values, strict=True))

    def step(self):
        weights = sparse_weights(self.net)
        before = {k: self.state(w) for k, w in weights.items()}
        held = {k: self.moments(w) for k, w in weights.items()}
        others = [p.clone() for n, p in self.net.named_parameters() if "weight" not in n]
        updates = self.opt.n_updates
        self.opt.step(self.closure)
        exchanged = self.opt.n_updates > updates
        for name, w in weights.items():
            assert w.n_active == self.counts[name]
            assert torch.equal(w.index, w.index.unique())  # ascending, none twice
            assert 0 <= int(w.index[0]) <= int(w.index[-1]) < w.n
            assert (w.mean_tensor()[~w.mask] == 0).all()
            assert (w.variance_tensor()[~w.mask] == 0).all()
            assert int(w.mask.sum()) == w.n_active
            after, moments = self.state(w), self.moments(w)
            new = after.keys() - before[name].keys()
            if not exchanged:
                assert not new
                continue
            rho = [r for i, (_, r) in before[name].items() if i in after]
            for i, (mean, r) in after.items():
                if i in new:
                    assert mean == 0
                    # The mean over those that survived the removal, some of which may be among
                    # those that were removed and came back: between the extremes of both.
                    assert min(rho) - 1e-12 <= r <= max(rho) + 1e-12
                    assert not any(moments[i])
                else:
                    assert (mean, r) == before[name][i]
                    assert moments[i] == held[name][i]
        if exchanged:
            kept = [p for n, p in self.net.named_parameters() if "weight" not in n]
            assert all(torch.equal(a, b) for a, b in zip(kept, others, strict=True))
            self.changed.append(self.opt.t)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=5e-4),
}


@pytest.mark.parametrize("grow_grad", ["post", "pre"])
@pytest.mark.parametrize("base", OPTIMIZERS)
def test_invariants_at_every_step(base, grow_grad):
    run = Checked(OPTIMIZERS[base], n_steps=60, update_every=7, grow_grad=grow_grad)
    assert run.counts == {
        f"{i}.weight": count_active(density, a * b)
        for i, density, (a, b) in zip((0, 2, 4), (0.2, 0.2, 1.0), MLP, strict=True)
    }
    for _ in range(60):
        run.step()
    # T_end = 45: at steps 7, 14, …, 42, as often as ⌈T_end/ΔT⌉ − 1.
    assert run.changed == list(range(7, 45, 7))
    assert len(run.changed) == math.ceil(45 / 7) - 1


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_keeps_the_invariants(criterion):
    run = Checked(OPTIMIZERS["adam"], n_steps=20, update_every=5, criterion=criterion)
    for _ in range(20):
        run.step()
    assert run.changed == [5, 10]


def test_counts_are_those_of_the_definition():
    for density in (0.03, 0.05, 0.1, 0.2, 0.35, 0.9, 1.0):
        for n in (10, 64, 640, 8192, 100_000):
            exact = n - math.floor((1 - Fraction(str(density))) * n)
            assert count_active(density, n) == exact


def test_schedule():
    assert replaced_share(0, 100, 0.3) == 0.3
    assert replaced_share(50, 100, 0.3) == pytest.approx(0.15)
    assert replaced_share(100, 100, 0.3) == 0
    assert [kl_warmup(e, 20) for e in (1, 10, 20)] == [pytest.approx(2 / 20), 1, 1]
    assert kl_warmup(1, 20, 0) == 1


def test_exchange_takes_the_worst_and_adds_the_largest_gradients():
    """Against a plain implementation on dense tensors: masks, not positions."""
    for grow_grad in ("post", "pre"):
        net = spread(sparsify(nn.Linear(40, 6).double(), 0.3)).eval()
        w = net.weight
        x, y = torch.randn(25, 40).double(), torch.randn(25, 6).double()

        def loss_at(mean, std, mask, net=net, x=x, y=y):
            out = F.linear(x, mean, net.bias)
            nll = (out - y).square().mean()
            entries = kl_divergence(Normal(mean, std), Normal(0.0, net.weight.prior_scale))
            return nll + entries[mask].sum() / 10

        mask, mean = w.mask.clone(), w.mean_tensor().detach().clone()
        std = torch.where(mask, w.variance_tensor().sqrt().detach(), 1.0)
        n_rep = int(w.n_active * replaced_share(10, 75, 0.3))
        score = torch.where(mask, mean.abs() / std, -math.inf)
        keep = torch.zeros(240, dtype=torch.bool)
        keep[score.flatten().topk(w.n_active - n_rep).indices] = True
        keep = keep.view(6, 40)
        at = keep if grow_grad == "post" else mask
        free = (mean * at).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_at(free, std, at), free)
        size = gradient.abs().masked_fill(keep, -1)
        grown = torch.zeros(240, dtype=torch.bool)
        grown[size.flatten().topk(n_rep).indices] = True
        expected = keep | grown.view(6, 40)

        opt = SSVI(
            net,
            torch.optim.SGD(net.parameters(), 0.0),
            n_steps=100,
            update_every=10,
            grow_grad=grow_grad,
        )

        def closure(net=net, opt=opt, x=x, y=y):
            opt.zero_grad()
            loss = (net(x) - y).square().mean() + sparse_kl(net) / 10
            loss.backward()
            return loss

        for _ in range(10):
            opt.step(closure)
        assert opt.n_updates == 1
        assert torch.equal(w.mask, expected)


def test_equal_scores_give_equal_runs():
    runs = []
    for criterion in ("snr", "snr_abs"):
        torch.manual_seed(0)
        run = Checked(OPTIMIZERS["adam"], n_steps=60, update_every=5, criterion=criterion)
        for _ in range(60):
            run.opt.step(run.closure)
        runs.append(run.net.state_dict())
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())


# -- density 1 ---------------------------------------------------------------------------------


class DenseMeanField(nn.Module):
    """Dense mean-field layer with local reparameterisation, written from the equations."""

    def __init__(self, layer, prior_scale, init_std):
        super().__init__()
        self.prior_scale = prior_scale
        self.loc = nn.Parameter(layer.weight.detach().clone())
        std = init_std * prior_scale
        self.raw = nn.Parameter(torch.full_like(self.loc, std + math.log(-math.expm1(-std))))
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x):
        mean = F.linear(x, self.loc, self.bias)
        variance = F.linear(x**2, F.softplus(self.raw) ** 2)
        return mean.addcmul(torch.sqrt(variance + 1e-10), torch.randn_like(mean))

    def kl(self):
        std, s = F.softplus(self.raw), self.prior_scale
        squares = (std**2 + self.loc**2).sum() / (2 * s**2)
        return squares - std.log().sum() + self.loc.numel() * (math.log(s) - 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_one_is_dense_mean_field(dtype):
    x, y = batch()
    x = x.to(dtype)
    ours = sparsify(mlp().to(dtype), 1.0)
    dense = nn.Sequential(
        *[
            DenseMeanField(m, 1 / math.sqrt(m.in_features), 0.1) if isinstance(m, nn.Linear) else m
            for m in mlp().to(dtype)
        ]
    )
    base = torch.optim.Adam(ours.parameters(), 1e-2)
    opt = SSVI(ours, base, n_steps=60, update_every=5)
    peer = torch.optim.Adam(dense.parameters(), 1e-2)

    def run(net, optimizer, kl):
        torch.manual_seed(7)
        losses = []
        for _ in range(60):

            def closure():
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y) + kl() / 100
                loss.backward()
                for p in net.parameters():  # else Adam adds in another order
                    p.grad = p.grad.contiguous()
                return loss

            losses.append(optimizer.step(closure).detach())
        return torch.stack(losses)

    a = run(ours, opt, lambda: sparse_kl(ours))
    b = run(dense, peer, lambda: torch.stack([m.kl() for m in dense[::2]]).sum())
    assert torch.equal(a, b)
    for mine, theirs in zip(sparse_weights(ours).values(), dense[::2], strict=True):
        assert torch.equal(mine.mean_tensor(), theirs.loc)
        assert torch.equal(mine.rho.view(mine.shape), theirs.raw)
    assert opt.n_updates == 0


# -- densities, accounting and compact form ----------------------------------------------------


def test_erdos_renyi_reaches_the_density_and_favours_small_layers():
    shapes = {"a": (300, 100), "b": (100, 100), "c": (10, 100)}
    sizes = {k: math.prod(s) for k, s in shapes.items()}
    for density in (0.05, 0.1, 0.5, 0.95, 1.0):
        got = layer_densities(shapes, density, "erdos_renyi")
        total = sum(got[k] * sizes[k] for k in shapes)
        assert total == pytest.approx(density * sum(sizes.values()))
        assert got["a"] <= got["b"] <= got["c"] <= 1
    low = layer_densities(shapes, 0.05, "erdos_renyi")
    assert low["a"] / low["b"] == pytest.approx((400 / 30_000) / (200 / 10_000))
    net = sparsify(mlp(), 0.1, allocation="erdos_renyi")
    counts = [w.n_active for w in sparse_weights(net).values()]
    assert sum(counts) == pytest.approx(0.1 * sum(a * b for a, b in MLP), abs=3)


def test_accounting_by_hand():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    small = compact(sparsify(net, 0.25))
    counted = account(small, torch.zeros(2, 1, 8, 8))
    assert counted.n_weights == 72 + 2880
    assert counted.n_active == 18 + 2880  # the last layer is dense
    assert counted.dense_flops == 72 * 36 + 2880
    assert counted.flops == 18 * 36 + 2880
    # Means, deviations and int16 columns of 18 weights, 9 row starts, all of the second layer.
    assert counted.n_bytes == 18 * 10 + 9 * 4 + 2880 * 8 + 18 * 4
    assert counted.dense_bytes == (72 + 2880) * 8 + 18 * 4
    assert counted.sparsity == pytest.approx(54 / 2952)


@pytest.mark.parametrize("density", [0.03, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(300, 200), (40, 30)])
def test_compact_form_is_the_same_function(density, shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(shape[0], shape[1]), nn.Tanh(), nn.Linear(shape[1], 3))
    trained = spread(sparsify(net, density)).eval()
    small = compact(trained)
    x = torch.randn(5, 4, shape[0])  # layers take any number of leading axes
    with torch.no_grad():
        expected = trained(x)
        torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
        ordinary, stds = densify(small)
        torch.testing.assert_close(ordinary(x), expected, rtol=1e-5, atol=1e-5)
    assert {type(m) for m in ordinary} == {nn.Linear, nn.Tanh}
    w = trained[0].weight
    torch.testing.assert_close(stds["0.weight"].square(), w.variance_tensor().detach())
    # Through a file: what state_dict holds is all of it.
    again = compact(sparsify(net, density))
    again.load_state_dict(copy.deepcopy(small.state_dict()))
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_compressed_rows_are_used_where_they_should_be():
    big = compact(sparsify(nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 5)), 0.05))
    by_rows = torch.backends.mkl.is_available()
    assert [layer.by_rows for layer in big] == [by_rows, False]
    assert not compact(sparsify(nn.Linear(300, 200), 0.5)).by_rows


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_compact_layers_of_every_kind(make, shape):
    torch.manual_seed(0)
    layer = spread(sparsify(make(), 0.4)).eval()
    x = torch.randn(3, *shape)
    small = compact(layer)
    ordinary, _ = densify(small)
    with torch.no_grad():
        torch.testing.assert_close(small(x), layer(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ordinary(x), layer(x), rtol=1e-6, atol=1e-6)
    assert type(ordinary) is type(make())


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="compressed rows need MKL")
@pytest.mark.parametrize("same_noise", [False, True])
def test_training_by_compressed_rows_is_training_by_dense_products(same_noise, monkeypatch):
    results = {}
    for limit in (1, 10**9):  # by rows, dense
        monkeypatch.setattr("uq.kernels.sparse_linear.MIN_WEIGHTS", limit)
        net = spread(sparsify(mlp(), 0.15))
        set_same_noise(net, same_noise)
        assert net[0].by_rows == (limit == 1)
        assert not net[4].by_rows  # dense
        base = torch.optim.SGD(net.parameters(), 1e-2, momentum=0.9)
        opt = SSVI(net, base, n_steps=20, update_every=4)
        x, y = batch()
        x.requires_grad_()
        torch.manual_seed(1)

        def closure(net=net, opt=opt, x=x, y=y):
            opt.zero_grad()
            # One row of output, so that noise comes in the same order in both layouts.
            loss = F.cross_entropy(net(x[:1]), y[:1]) + sparse_kl(net) / 100
            loss.backward()
            return loss

        losses = [opt.step(closure).detach() for _ in range(20)]
        assert opt.n_updates == 3
        results[limit] = [torch.stack(losses), x.grad, *net.state_dict().values()]
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="compressed rows need MKL")
def test_gradients_of_sparse_products():
    torch.manual_seed(0)
    index = torch.randperm(7 * 9)[:15].sort().values
    pattern = Pattern.of(index, (7, 9))
    values = torch.randn(15, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    dense = torch.zeros(63, dtype=torch.float64).scatter(0, index, values.detach()).view(7, 9)
    torch.testing.assert_close(sparse_product(x, values, pattern), x @ dense.T)
    torch.testing.assert_close(pattern.transposed(values.detach()).to_dense(), dense.T)
    assert torch.autograd.gradcheck(lambda x, v: sparse_product(x, v, pattern), (x, values))


def test_norms_of_several_axes_stay_ordinary():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LayerNorm((4, 6, 6)), nn.Flatten())
    assert list(sparse_weights(sparsify(net, 0.5))) == ["0.weight"]


@pytest.mark.parametrize("make", [lambda: nn.Linear(30, 10), lambda: nn.Conv2d(2, 3, 3)])
def test_writing_zeros_out_takes_no_random_numbers(make):
    small = compact(sparsify(make(), 0.5))
    before = torch.get_rng_state()
    ordinary, _ = densify(small)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.device.type for p in ordinary.parameters()} == {"cpu"}


def test_same_noise_is_set_everywhere():
    net = sparsify(mlp(), 0.2)
    set_same_noise(net, True)
    x, _ = batch()
    out = net(torch.cat([x, x]))
    assert torch.equal(out[: len(x)], out[len(x) :])

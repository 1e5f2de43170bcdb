"""Exact answers for ABNN: identities of the layers, variances, optima, entropies, memory."""

import copy
import math
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from uq import ABNNClassifier, ABNNRegressor
from uq.distributions import CategoricalMixture, NormalMixture
from uq.inference import (
    ABNNPosterior,
    epistemic_parts,
    insert_norms,
    random_class_weights,
    to_abnn,
)
from uq.inference.abnn import quantile_edges
from uq.models.abnn import _ABNNObjective
from uq.nn import CategoricalLikelihood, Network, bayesian_norm, without_noise
from uq.nn.abnn import NOISE_SHAPES, bayesian_layers


class BatchNormAct(nn.BatchNorm2d):
    """A normalisation layer with an activation inside, as timm has them."""

    def forward(self, x):
        return F.silu(super().forward(x))


def moved(layer, x):
    """The layer in float64 eval mode, with scale, shift and statistics that are not the default."""
    layer = layer.double()
    for i, t in enumerate((*layer.parameters(), *layer.buffers())):
        if t.is_floating_point():
            t.data = 0.5 + torch.rand(t.shape, dtype=t.dtype, generator=g(i))
    return layer.eval(), x.double()


def g(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape):
    return torch.randn(shape, generator=g(99))


LAYERS = {
    "batch1d": (nn.BatchNorm1d(4, eps=1e-3), randn(5, 4)),
    "batch1d_sequence": (nn.BatchNorm1d(4, affine=False, eps=1e-3), randn(5, 4, 3)),
    "batch2d": (nn.BatchNorm2d(4, eps=1e-3, momentum=None), randn(5, 4, 3, 3)),
    "batch2d_plain": (nn.BatchNorm2d(4, affine=False), randn(5, 4, 3, 3)),
    "batch3d": (nn.BatchNorm3d(4, eps=1e-3), randn(5, 4, 2, 2, 3)),
    "sync": (nn.SyncBatchNorm(4, eps=1e-3), randn(5, 4, 3)),
    "layer": (nn.LayerNorm(4, eps=1e-3), randn(5, 3, 4)),
    "layer_plain": (nn.LayerNorm(4, elementwise_affine=False), randn(5, 3, 4)),
    "layer_no_shift": (nn.LayerNorm(4, bias=False), randn(5, 4)),
    "layer_two_axes": (nn.LayerNorm((3, 4), eps=1e-3), randn(5, 3, 4)),
    "layer_two_axes_plain": (nn.LayerNorm((3, 4), elementwise_affine=False), randn(5, 2, 3, 4)),
    "rms": (nn.RMSNorm(4, eps=1e-3), randn(5, 4)),
    "group": (nn.GroupNorm(2, 4, eps=1e-3), randn(5, 4, 3, 3)),
    "group_plain": (nn.GroupNorm(2, 4, affine=False), randn(5, 4, 3)),
    "instance1d": (nn.InstanceNorm1d(4, affine=True, eps=1e-3), randn(5, 4, 3)),
    "instance2d": (nn.InstanceNorm2d(4, track_running_stats=True), randn(5, 4, 3, 3)),
    "instance3d": (nn.InstanceNorm3d(4), randn(5, 4, 2, 2, 3)),
    "instance_unbatched": (nn.InstanceNorm1d(4, affine=True), randn(4, 3)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_shape = pytest.mark.parametrize("noise_shape", NOISE_SHAPES)


# -- 1: α = 0 is the source ----------------------------------------------------------------------


@every_layer
@every_shape
def test_without_noise_it_is_the_source_layer(name, noise_shape):
    layer, x = moved(*copy.deepcopy(LAYERS[name]))
    expected = layer(x)
    for made in (
        bayesian_norm(layer, 0.0, noise_shape),
        pickle.loads(pickle.dumps(bayesian_norm(layer, 0.0, noise_shape))),
        copy.deepcopy(bayesian_norm(layer, 0.0, noise_shape)),
    ):
        torch.testing.assert_close(made.double().eval()(x), expected, rtol=0, atol=1e-12)
        assert isinstance(made, type(layer))
    noisy = bayesian_norm(layer, 0.3, noise_shape).double()
    assert not torch.equal(noisy(x), expected)
    with without_noise(noisy):
        torch.testing.assert_close(noisy(x), expected, rtol=0, atol=1e-12)
    assert not torch.equal(noisy(x), expected)


@pytest.mark.parametrize("name", ["batch1d", "batch2d", "instance2d"])
def test_training_updates_the_statistics_as_the_source_does(name):
    layer, x = moved(*copy.deepcopy(LAYERS[name]))
    made = bayesian_norm(layer, 0.1)
    layer.train()(x)
    made.train()(x)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(made.state_dict()[key], layer.state_dict()[key])
    made.frozen_statistics = True
    before = made.running_mean.clone()
    made.train()(x)
    assert torch.equal(made.running_mean, before)


def test_activation_inside_a_layer_is_kept():
    layer, x = moved(BatchNormAct(4, eps=1e-3), randn(5, 4, 3, 3))
    torch.testing.assert_close(bayesian_norm(layer, 0.0)(x), layer(x))
    noisy = bayesian_norm(layer, 0.5)
    factor = 1 + 0.5 * torch.randn(4, generator=g(3), dtype=torch.float64)
    noisy.generator = g(3)
    plain = F.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight * factor, layer.bias, eps=1e-3
    )
    torch.testing.assert_close(noisy(x), F.silu(plain))
    with pytest.raises(ValueError, match="forward of its own"):
        bayesian_norm(layer, 0.5, "element")


# -- 2, 3: variances -----------------------------------------------------------------------------

DRAWS = 20_000


def draws_of(layer, x, n=DRAWS):
    with torch.no_grad():
        return torch.stack([layer(x) for _ in range(n)])


@pytest.mark.statistical
@every_layer
@every_shape
def test_moments_and_correlation_over_rows(name, noise_shape):
    layer, x = moved(*copy.deepcopy(LAYERS[name]))
    clean = layer(x).detach()
    made = bayesian_norm(layer, 0.2, noise_shape, g(0)).double()
    shift = getattr(made, "bias", None)
    centred = clean if shift is None else clean - shift.view(made._scale_shape(clean))
    n = 4000
    out = draws_of(made, x, n)
    std = 0.2 * centred.abs()
    # The mean of n draws is off by std/√n, the standard deviation by a share 1/√(2n); 5 of each.
    assert ((out.mean(0) - clean).abs() <= 5 * std / math.sqrt(n) + 1e-12).all()
    torch.testing.assert_close(out.std(0), std, rtol=5 / math.sqrt(2 * n), atol=1e-9)
    if name == "instance_unbatched":  # no rows
        return
    noise = (out - clean) / centred  # αε of each activation
    same = bool((noise[:, 0] - noise[:, 1]).abs().max() < 1e-9)
    assert same == (noise_shape == "channel")
    if noise_shape != "channel":
        product = (noise[:, 0] * noise[:, 1] / 0.04).mean(0)  # standard error 1/√n
        assert (product.abs() < 5 / math.sqrt(n)).all()


@pytest.mark.statistical
@every_shape
def test_variance_of_a_linear_readout(noise_shape):
    # Var = α² Σ_c (v_c γ_c mean x̂_c)², or with a noise number for each of the HW elements
    # α² Σ_c (v_c γ_c)² Σ x̂_c² / (HW)².
    layer = nn.BatchNorm2d(3, eps=0.0).double().eval()  # x̂ = x
    layer.weight.data = torch.tensor([1.5, -0.5, 2.0], dtype=torch.float64)
    x = randn(1, 3, 4, 4).double() + 0.5
    v = torch.tensor([0.7, 1.0, -0.4], dtype=torch.float64)
    made = bayesian_norm(layer, 0.3, noise_shape, g(1))
    readout = draws_of(made, x).mean((-2, -1)) @ v
    scale = v * layer.weight.detach()
    if noise_shape == "element":
        expected = 0.09 * (scale**2 * (x[0] ** 2).sum((-2, -1)) / 16**2).sum()
    else:
        expected = 0.09 * ((scale * x[0].mean((-2, -1))) ** 2).sum()
    # The variance of n draws is off by a share √(2/n) = 1 %; 5 of them. The two differ by more.
    torch.testing.assert_close(readout.var(), expected, rtol=5 * math.sqrt(2 / DRAWS), atol=0)


@pytest.mark.statistical
def test_element_noise_is_gaussian_dropout():
    p = 0.2
    made = bayesian_norm(nn.LayerNorm(6), math.sqrt(p / (1 - p)), "element", g(0)).double()
    x = randn(1, 6).double()
    out = draws_of(made, x)
    with without_noise(made):
        clean = made(x)
    dropped = clean * dist.Normal(1.0, math.sqrt(p / (1 - p))).sample((DRAWS, 1, 6)).double()
    torch.testing.assert_close(out.std(0), dropped.std(0), rtol=0.05, atol=0)  # 5·√(2/2n)·√2


# -- 4: what noise does to training --------------------------------------------------------------


def test_noise_on_a_linear_model_is_a_ridge():
    # E‖y − X̂ diag(1 + αε) w‖² = ‖y − X̂w‖² + α² Σ_j w_j² ‖X̂_j‖²: one optimum for both shapes.
    torch.manual_seed(0)
    x = randn(60, 3).double() * torch.tensor([1.0, 2.0, 0.5]).double()
    y = x @ torch.tensor([1.0, -1.0, 2.0]).double() + 0.1 * torch.randn(60).double()
    gram = x.T @ x
    ridge = torch.linalg.solve(gram + 0.25 * torch.diag(gram.diagonal()), x.T @ y)
    for noise_shape in ("channel", "sample"):
        norm = bayesian_norm(nn.BatchNorm1d(3, eps=0.0), 0.5, noise_shape, g(0)).double().eval()
        w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], 0.02)
        average, steps = torch.zeros(3, dtype=torch.float64), 3000
        for step in range(steps):
            optimizer.zero_grad()
            (norm(x) @ w - y).square().mean().backward()
            optimizer.step()
            if step >= steps // 5:
                average += w.detach() / (steps - steps // 5)
        torch.testing.assert_close(average, ridge, rtol=0, atol=0.03)
        least_squares = torch.linalg.solve(gram, x.T @ y)
        assert (least_squares - ridge).abs().max() > 0.15  # what no noise would give


def test_gradient_goes_through_the_noise():
    # ∂y/∂γ = x̂(1 + αε), ∂y/∂β = 1.
    x = randn(5, 4).double()
    made = bayesian_norm(nn.BatchNorm1d(4, eps=0.0), 0.3, "channel", g(2)).double().eval()
    made(x).sum().backward()
    factor = 1 + 0.3 * torch.randn(4, generator=g(2), dtype=torch.float64)
    torch.testing.assert_close(made.weight.grad, x.sum(0) * factor)
    torch.testing.assert_close(made.bias.grad, torch.full((4,), 5.0, dtype=torch.float64))


# -- 5: class weights ----------------------------------------------------------------------------


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        return self.logits.expand(len(x), 3)


@pytest.mark.parametrize("per_batch", [True, False])
@pytest.mark.parametrize("rows_weighted", [True, False])
def test_prior_shift(per_batch, rows_weighted):
    # A model of class shares alone: p_c = w_c n_c / Σ w n.
    counts, w = torch.tensor([5.0, 2.0, 3.0]), torch.tensor([7.0, 1.0, 1.0])
    y = torch.arange(3).repeat_interleave(counts.long())
    weight = None
    if rows_weighted:
        y, weight = torch.arange(3), counts.double() / counts.mean()
    network = Network(Bias(), CategoricalLikelihood(3))
    objective = _ABNNObjective(network, w, None, per_batch=per_batch)
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(torch.zeros(len(y), 1), y, weight)
        loss.backward()
        return loss

    optimizer.step(closure)
    shares = network(torch.zeros(1, 1))[0].softmax(-1)[0].detach()
    torch.testing.assert_close(
        shares, (w * counts / (w * counts).sum()).double(), atol=1e-4, rtol=0
    )
    if not per_batch:
        reference = F.cross_entropy(
            network(torch.zeros(10, 1))[0],
            torch.arange(3).repeat_interleave(counts.long()),
            w.double(),
        )
        torch.testing.assert_close(objective(torch.zeros(len(y), 1), y, weight), reference)


def test_favoured_classes():
    for n, k in ((2, 1), (3, 1), (10, 3), (100, 10)):
        draws = torch.stack([random_class_weights(n, 7.0, generator=g(s)) for s in range(300)])
        assert ((draws == 7).sum(1) == k).all()
        assert ((draws == 1).sum(1) == n - k).all()
        assert (draws == 7).any(0).all()  # every class has its turn, the last one too
    assert torch.equal(random_class_weights(5, 1.0), torch.ones(5))


def test_bins_of_the_target_have_equal_weight():
    y = torch.randperm(100, generator=g(0)).double()[:, None]
    edges = quantile_edges([(y, y)], 10)
    assert torch.bucketize(y[:, 0], edges).bincount().tolist() == [10] * 10
    weight = torch.ones(100).double()
    weight[y[:, 0] < 10] = 3.0
    repeated = torch.cat([y, y[y[:, 0] < 10], y[y[:, 0] < 10]])
    weighted = quantile_edges([(y[:50], y[:50], weight[:50]), (y[50:], y[50:], weight[50:])], 10)
    assert torch.equal(weighted, quantile_edges([(repeated, repeated)], 10))


# -- 6, 7, 8: prediction -------------------------------------------------------------------------


def convnet(seed=0, n_out=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, n_out),
    )  # fmt: skip


def images(n=40):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 1, 8, 8)).astype(np.float32), np.arange(n) % 3


def test_nothing_moves_without_noise_and_learning_rate():
    X, y = images()
    net = convnet().eval()
    still = {"alpha": 0.0, "random_prior": 1, "lr": 1e-30, "weight_decay": 0.0, "n_samples": 2}
    d = ABNNClassifier(module=net, batch_statistics="frozen", **still).fit(X, y)
    d = d.predict_distribution(X)
    assert d.n_draws == 8
    assert (d.logits == d.logits[0]).all()
    # Exactly 0 but for the rounding of the mean of 8 equal numbers.
    assert d.epistemic.abs().max() < 1e-12
    base = net(torch.tensor(X)).softmax(-1).double()
    torch.testing.assert_close(d.probs, base, rtol=0, atol=1e-6)


def test_entropy_identities():
    T, L = 3, 5
    logits = 3 * torch.randn(L * T, 7, 4, generator=g(0), dtype=torch.float64)
    d = CategoricalMixture(logits)
    parts = epistemic_parts(d, T)
    p = logits.softmax(-1).view(L, T, 7, 4)

    def entropy(q):
        return -(q * q.log()).sum(-1)

    within = (entropy(p.mean(0)) - entropy(p).mean(0)).mean(0)
    between = entropy(p.mean((0, 1))) - entropy(p.mean(0)).mean(0)
    torch.testing.assert_close(parts["within_members"], within)
    torch.testing.assert_close(parts["between_members"], between)
    torch.testing.assert_close(sum(parts.values()), d.epistemic, rtol=0, atol=1e-6)
    torch.testing.assert_close(d.aleatoric + d.epistemic, d.entropy(), rtol=0, atol=1e-6)
    assert min(float(v.min()) for v in parts.values()) >= -1e-7
    real = NormalMixture(logits[..., 0], torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(sum(epistemic_parts(real, T).values()), real.epistemic)
    with pytest.raises(ValueError, match="15 draws"):
        epistemic_parts(d, 4)


class Shift(nn.Module):
    """Logits (a, b) by a layer normalisation that gives its shift."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.norm.weight.data.zero_()

    def forward(self, x):
        return self.norm(x)


def test_probabilities_are_averaged_not_logits():
    network = Network(to_abnn(Shift(), alpha=0.0), CategoricalLikelihood(2))
    members = {
        "body.norm.weight": torch.zeros(2, 2),
        "body.norm.bias": torch.tensor([[10.0, 0.0], [0.0, 1.0]]),
    }
    p = ABNNPosterior(network, members)(torch.zeros(2, 2), 1).probs[0]
    expected = (torch.tensor([10.0, 0]).softmax(0) + torch.tensor([0, 1.0]).softmax(0)) / 2
    torch.testing.assert_close(p, expected.double(), rtol=0, atol=1e-6)
    assert float(p[0]) == pytest.approx(0.634, abs=1e-3)  # the mean of logits gives 0.989


@every_shape
def test_posterior_draws_are_the_members_under_noise(noise_shape):
    # By hand: each member in turn, layers with noise numbers of the stored seed.
    X, y = images()
    model = ABNNClassifier(
        module=convnet(), alpha=0.3, noise_shape=noise_shape, n_members=2, n_samples=3,
        random_state=0, max_epochs=2,
    ).fit(X, y)  # fmt: skip
    posterior, x = model.posterior_, torch.tensor(X)
    T = posterior.n_members
    assert T == model.n_members_ == 3
    ours = posterior(x, 3).logits
    generator = torch.Generator().manual_seed(int(posterior.seed))
    expected: list = [None] * (3 * T)
    body = posterior.network
    with torch.no_grad():
        if noise_shape == "channel":
            for s in range(3 * T):
                weights = {k: t[s % T] for k, t in posterior.members.items()}
                flat = torch.randn(12, generator=generator)
                for name, noise in zip(bayesian_layers(body), flat.split([4, 8]), strict=True):
                    weights[f"{name}.weight"] = weights[f"{name}.weight"] * (1 + 0.3 * noise)
                with without_noise(body):
                    expected[s] = functional_call(body, weights, (x,))[0]
        else:
            for layer in bayesian_layers(body).values():
                layer.generator = generator
            for m in range(T):
                weights = {k: t[m] for k, t in posterior.members.items()}
                out = functional_call(body, weights, (x.repeat(3, 1, 1, 1),))[0]
                for draw, values in enumerate(out.split(len(x))):
                    expected[draw * T + m] = values
    torch.testing.assert_close(ours, torch.stack(expected).log_softmax(-1), rtol=1e-4, atol=1e-5)


# -- 9: memory -----------------------------------------------------------------------------------


def test_members_share_the_backbone():
    net = convnet()
    before = copy.deepcopy(net.state_dict())
    members = [to_abnn(net) for _ in range(3)]
    own = {"1", "4"}  # the normalisation layers
    for member in members:
        assert member.state_dict().keys() == net.state_dict().keys()
        count = sum(p.numel() for p in member.parameters() if p.requires_grad)
        assert count == 2 * (4 + 8)
        for name, p in member.named_parameters():
            shared = p.data_ptr() == dict(net.named_parameters())[name].data_ptr()
            assert shared == (name.split(".")[0] not in own)
            assert p.requires_grad == (not shared)
        optimizer = torch.optim.SGD((p for p in member.parameters() if p.requires_grad), 0.1)
        member.train()(randn(6, 1, 8, 8)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    whole = to_abnn(net, train_scope="all")
    shared = {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in whole.parameters()}
    assert not shared
    X, y = images()
    model = ABNNClassifier(module=net, max_epochs=1, random_state=0).fit(X, y)
    sizes = {k: t[0].numel() for k, t in model.posterior_.members.items()}
    trained = sum(n for k, n in sizes.items() if k.endswith(("weight", "bias")))
    assert trained == 2 * (4 + 8)
    fixed = {k: t for k, t in model.posterior_.network.body.named_parameters()
             if k.split(".")[0] not in own}  # fmt: skip
    assert all(torch.equal(t, before[k]) for k, t in fixed.items())
    moved_names = [k for k, t in model.posterior_.members.items() if not torch.equal(t[0], t[-1])]
    assert "body.1.weight" in moved_names
    assert "body.4.bias" in moved_names


def test_numbers_of_a_member_of_known_networks():
    # 2 ΣC over the normalisation layers: ViT-B/16, 25 layers of 768 channels.
    vit = nn.Sequential(*[nn.LayerNorm(768) for _ in range(25)])
    assert sum(p.numel() for p in to_abnn(vit).parameters() if p.requires_grad) == 38_400
    # WRN-28-10: 4 blocks of two pre-activation layers in each of three groups, and the last one.
    widths = [16, 160, *[160] * 6, 160, 320, *[320] * 6, 320, 640, *[640] * 6, 640]
    wide = nn.Sequential(*[nn.BatchNorm2d(w) for w in widths])
    assert sum(p.numel() for p in to_abnn(wide).parameters() if p.requires_grad) == 17_952


# -- 10: reproducibility -------------------------------------------------------------------------


@every_shape
def test_generator_and_copies_in_a_batch(noise_shape):
    net = convnet()
    x = randn(1, 1, 8, 8).expand(2, 1, 8, 8)
    made = to_abnn(net, noise_shape=noise_shape, alpha=0.3, generator=g(5))
    again = to_abnn(net, noise_shape=noise_shape, alpha=0.3, generator=g(5))
    first = made(x)
    assert torch.equal(first, again(x))
    assert not torch.equal(first, made(x))
    assert torch.allclose(first[0], first[1], atol=1e-6) == (noise_shape == "channel")


def test_pyro_draws_the_same_posterior_of_a_scale():
    # q(γ) = N(γ, α²γ²): two samples of one distribution, by the Kolmogorov-Smirnov test.
    from scipy.stats import kstest

    made = bayesian_norm(nn.LayerNorm(3), 0.2, "channel", g(0)).double()
    made.weight.data = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    x = randn(1, 3).double()
    with without_noise(made):
        normalised = made(x) / made.weight
    drawn = (draws_of(made, x, 3000) / normalised.detach())[:, 0]
    for j, weight in enumerate(made.weight.tolist()):
        pyro_site = dist.Normal(weight, 0.2 * abs(weight))
        p_value = kstest(drawn[:, j].numpy(), lambda v, s=pyro_site: s.cdf(torch.tensor(v)).numpy())
        assert p_value.pvalue > 1e-4


def test_added_scales_take_the_type_of_the_network():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False)).double()
    assert to_abnn(net)(randn(2, 3).double()).dtype == torch.float64


# -- extensions ----------------------------------------------------------------------------------


def test_inserted_norms_change_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 8), nn.Tanh(), nn.Linear(8, 2),
    ).double()  # fmt: skip
    x = randn(20, 1, 8, 8).double()
    made = insert_norms(net, x)
    torch.testing.assert_close(made(x), net(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(made(3 * x), net(3 * x), rtol=0, atol=1e-10)
    assert [type(made[i][1]).__name__ for i in (0, 2, 5)] == ["BatchNorm2d"] * 2 + ["BatchNorm1d"]
    assert isinstance(made[7], nn.Linear)
    assert len(bayesian_layers(to_abnn(made))) == 3
    with pytest.raises(ValueError, match="besides its last"):
        insert_norms(nn.Linear(3, 2), randn(4, 3))


def test_trained_regression_network_keeps_its_unit():
    # A network in target units: means stay, the noise level is that of its residuals.
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 2))
    y = 1e4 + 300 * X[:, 0] + 50 * rng.normal(size=400)
    net = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0), nn.Unflatten(0, (-1, 1)), nn.LayerNorm(1))
    net[3].bias.data = torch.tensor([1e4])
    model = ABNNRegressor(module=net, n_members=0, alpha=0.0).fit(X, y)
    d = model.predict_distribution(X)
    torch.testing.assert_close(
        d.mean, torch.full((400,), 1e4, dtype=torch.float64), rtol=1e-6, atol=0
    )
    rms = math.sqrt(((y - 1e4) ** 2).mean())
    torch.testing.assert_close(d.stddev, torch.full_like(d.mean, rms), rtol=1e-5, atol=0)
    assert model.stop_reason_ == "untuned"

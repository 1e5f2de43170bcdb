"""Evidential Turing process: objective, memory and weights against other computations."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import brentq
from torch import distributions as td
from torch import nn
from torch.autograd import gradcheck

from uq.distributions import DirichletCategorical
from uq.errors import DataError, ParameterError
from uq.models.etp import ETPObjective
from uq.nn import ETPHead, VariationalLinear, dirichlet_kl, variational

F64 = torch.float64


def head_of(k=3, size=4, seed=0, **settings):
    """Head in float64 whose memory and weights are not those that it starts with."""
    torch.manual_seed(seed)
    head = ETPHead(k, size, **settings).double()
    head.memory.uniform_(-0.9, 0.9)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return head


def rows_of(n=6, k=3, seed=1):
    rng = np.random.default_rng(seed)
    return torch.as_tensor(rng.normal(0, 2, (n, k))), torch.as_tensor(rng.integers(k, size=n))


def reference_attention(head, v, cells):
    """φ with loops over rows and cells."""
    found = np.empty((len(v), len(cells)))
    for i, x in enumerate(v.numpy()):
        logits = [x @ head.key.detach().numpy() @ z / math.sqrt(len(x)) for z in cells.numpy()]
        found[i] = np.exp(logits) / np.exp(logits).sum()
    return found


def reference_write(head, v, y, cells):
    """The memory after one step, from the equation."""
    phi = reference_attention(head, v, cells)
    total = np.zeros(tuple(cells.shape))
    for i in range(len(v)):
        new = np.exp(v[i].numpy()) / np.exp(v[i].numpy()).sum()
        new[int(y[i])] += 1
        total += np.outer(phi[i], new)
    kept = head.memory_decay
    return np.tanh(kept * head.memory.numpy() + (1 - kept) * total)


# -- memory --------------------------------------------------------------------------------------


def test_worked_example_of_the_memory():
    head = ETPHead(2, 2, memory_noise=0.0).double()  # starts with W = 1
    head.memory.copy_(torch.tensor([[0.1, 0.0], [0.0, 0.2]]))
    v, y = torch.tensor([[2.0, -1], [0.5, 1.5], [-1, 1]], dtype=F64), torch.tensor([0, 1, 1])
    near = {"rtol": 0, "atol": 1e-6}
    phi = torch.tensor([[0.570243, 0.429757], [0.455921, 0.544079], [0.447165, 0.552835]])
    torch.testing.assert_close(head.attention(v, head.read()), phi.double(), **near)
    prior = torch.tensor([[0.057024, 0.085951], [0.045592, 0.108816], [0.044716, 0.110567]])
    torch.testing.assert_close(head.log_concentrations(v, head.read())[1], prior.double(), **near)
    head.write(v, y)
    after = torch.tensor([[0.111429, 0.016571], [0.010513, 0.214630]])
    torch.testing.assert_close(head.memory, after.double(), **near)


def test_reading_and_writing_equal_the_equations_by_hand():
    head = head_of(memory_noise=0.2, memory_decay=0.8)
    v, y = rows_of()
    torch.manual_seed(5)
    noise = torch.randn(4, 3, dtype=F64)
    cells = head.memory + 0.2 * noise
    expected = reference_write(head, v, y, cells)
    torch.manual_seed(5)
    head.write(v, y)
    np.testing.assert_allclose(head.memory, expected, rtol=0, atol=1e-12)
    # In eval mode there is no noise.
    expected = reference_write(head, v, y, head.memory)
    head.eval().write(v, y)
    np.testing.assert_allclose(head.memory, expected, rtol=0, atol=1e-12)


def test_order_of_rows_and_of_cells_does_not_matter():
    v, y = rows_of()
    head, turned = (head_of(memory_noise=0.0) for _ in range(2))
    cells, rows = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 3, 0, 1, 4, 2])
    turned.memory.copy_(head.memory[cells])
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(turned(v), head(v), **exact)
    torch.testing.assert_close(turned.loss(v, y), head.loss(v, y), **exact)
    torch.testing.assert_close(head(v[rows]), head(v)[rows], **exact)
    turned.write(v[rows], y[rows])
    head.write(v, y)
    torch.testing.assert_close(turned.memory, head.memory[cells], **exact)


def test_a_row_of_weight_two_is_written_twice():
    v, y = rows_of()
    weighted, repeated = (head_of(memory_noise=0.0) for _ in range(2))
    weighted.write(v, y, torch.tensor([2.0, 1, 0, 1, 3, 1], dtype=F64))
    twice = torch.tensor([0, 0, 1, 3, 4, 4, 4, 5])
    repeated.write(v[twice], y[twice])
    torch.testing.assert_close(weighted.memory, repeated.memory, rtol=0, atol=1e-12)


def test_memory_settles_inside_its_bounds():
    """Alike cells and balanced classes: m = tanh(γ m + (1 − γ) n/R · 2/K), 0.149 for 26 rows."""
    head = ETPHead(10, 20, memory_noise=0.0).double()
    head.memory.zero_()
    y = torch.arange(260) % 10
    v = torch.zeros(260, 10, dtype=F64)
    for _ in range(1500):
        head.write(v, y, torch.full((260,), 0.1, dtype=F64))
    fixed = brentq(lambda m: math.tanh(0.99 * m + 0.01 * 26 / 20 * 0.2) - m, 0.01, 0.9)
    assert fixed == pytest.approx(0.149, abs=1e-3)
    torch.testing.assert_close(head.memory, torch.full((20, 10), fixed, dtype=F64))
    for _ in range(200):  # noise, unbalanced rows, large outputs
        head.memory_noise = 1.0
        head.write(1e3 * torch.randn(49, 10, dtype=F64), torch.zeros(49, dtype=torch.long))
        assert (head.memory.abs() < 1).all()


# -- objective -----------------------------------------------------------------------------------


def test_divergence_of_dirichlets():
    rng = np.random.default_rng(0)
    alpha, beta = (torch.as_tensor(10 ** rng.uniform(-2, 3, (50, 4))) for _ in range(2))
    torch.testing.assert_close(
        dirichlet_kl(alpha, beta), td.kl_divergence(td.Dirichlet(alpha), td.Dirichlet(beta)),
        rtol=1e-10, atol=1e-9,
    )  # fmt: skip
    torch.testing.assert_close(dirichlet_kl(alpha, alpha), torch.zeros(50, dtype=F64))
    a, b = np.array([2.0, 0.7, 5.0]), np.array([1.2, 0.9, 0.5])
    draws = rng.dirichlet(a, 200_000)
    gap = stats.dirichlet(a).logpdf(draws.T) - stats.dirichlet(b).logpdf(draws.T)
    error = gap.std() / len(gap) ** 0.5
    got = dirichlet_kl(torch.as_tensor(a), torch.as_tensor(b)).item()
    assert got == pytest.approx(gap.mean(), abs=5 * error)


def test_loss_is_the_bound_under_draws_of_the_probabilities():
    """−E log π_y and τ E [log q(π) − log p(π)] with π drawn from q, Z the one that was read."""
    tau = 0.3
    head = head_of(memory_noise=0.2, dirichlet_kl_weight=tau)
    v, y = rows_of()
    torch.manual_seed(7)
    rows = head.loss(v, y)
    torch.manual_seed(7)
    cells = head.read()
    prior = reference_attention(head, v, cells) @ cells.numpy()
    joined = np.concatenate([v.numpy(), prior], 1)
    f = joined @ head.fusion.detach().numpy().T + head.fusion_bias.detach().numpy()
    rng = np.random.default_rng(0)
    for i in range(len(v)):
        q, p = stats.dirichlet(np.exp(f[i])), stats.dirichlet(np.exp(prior[i]))
        # Draws of tiny concentrations underflow to 0, where the densities are infinite.
        draws = rng.dirichlet(np.exp(f[i]), 100_000).clip(1e-300)
        draws /= draws.sum(1, keepdims=True)
        sample = -np.log(draws[:, y[i]]) + tau * (q.logpdf(draws.T) - p.logpdf(draws.T))
        error = sample.std() / len(sample) ** 0.5
        assert rows[i].item() == pytest.approx(sample.mean(), abs=5 * error)
    # Exactly, by PyTorch's distributions.
    alpha, beta = torch.as_tensor(np.exp(f)), torch.as_tensor(np.exp(prior))
    expected = torch.digamma(alpha.sum(1)) - torch.digamma(alpha.gather(1, y[:, None])[:, 0])
    expected += tau * td.kl_divergence(td.Dirichlet(alpha), td.Dirichlet(beta))
    torch.testing.assert_close(rows.detach(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tau", [1e-3, 0.1, 1e6])
def test_optimum_is_the_prior_plus_frequencies_over_the_weight(tau):
    """With cells alike β is their exp, whatever the attention; as τ grows, α goes to β."""
    head = ETPHead(3, 5, dirichlet_kl_weight=tau).double().eval()  # starts with f = v
    cell = torch.tensor([0.4, -0.6, 0.1], dtype=F64)
    head.memory.copy_(cell.expand(5, 3))
    share, y = torch.tensor([0.7, 0.2, 0.1], dtype=F64), torch.arange(3)
    v = torch.zeros(3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=500, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-14, tolerance_change=1e-16)  # fmt: skip

    def closure():
        optimizer.zero_grad()
        # In units of the larger part, so that the tolerances hold for both.
        loss = (share * head.loss(v.expand(3, 3), y)).sum() / max(1, tau)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = cell.exp() + share / tau
    torch.testing.assert_close(head(v.detach()[None])[0].detach(), best, rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_prior_and_posterior():
    head, (v, y) = head_of(memory_noise=0.0, dirichlet_kl_weight=0.5), rows_of(3)
    memory = head.memory.clone()

    def loss(v, key, fusion, bias):
        parameters = {"key": key, "fusion": fusion, "fusion_bias": bias}
        return torch.func.functional_call(_Loss(head), {f"head.{k}": p for k, p in
                                                        parameters.items()}, (v, y))  # fmt: skip

    assert gradcheck(loss, (v.requires_grad_(), head.key, head.fusion, head.fusion_bias))
    assert torch.equal(head.memory, memory)
    assert not head.memory.requires_grad
    # Writing after the loss must not disturb its gradient, in eval mode, too.
    rows = head.eval().loss(v, y)
    head.write(v, y)
    rows.sum().backward()
    assert v.grad.isfinite().all()


class _Loss(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, v, y):
        return self.head.loss(v, y)


def test_float32_and_autocast():
    head, (v, y) = head_of(memory_noise=0.0), rows_of()
    v[0] = torch.tensor([40.0, -40.0, 3.0])  # beyond the caps on both sides
    exact = head.loss(v, y)
    single = head.float()
    rows = single.loss(v.float(), y)
    assert rows.dtype == torch.float32
    # The loss of a wrong and certain row is near 1/α = exp 15; f in float32 is good to 1e-6.
    torch.testing.assert_close(rows.double(), exact, rtol=2e-5, atol=2e-5)
    outputs = v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = single.loss(outputs, y)
        nll = single.nll(outputs, y)
    torch.testing.assert_close(mixed, single.loss(outputs.float(), y))
    torch.testing.assert_close(nll, single.nll(outputs.float(), y))


def test_predictive_is_the_softmax_of_f():
    head, (v, y) = head_of(), rows_of()
    dist = head.predictive(v)
    assert isinstance(dist, DirichletCategorical)
    f, _ = head.log_concentrations(v, head.memory)  # no noise, in train mode, too
    torch.testing.assert_close(dist.probs, f.softmax(1))
    torch.testing.assert_close(dist.concentration, f.exp())
    torch.testing.assert_close(head.nll(v, y), -dist.log_prob(y))
    assert ((dist.vacuity > 0) & (dist.vacuity <= 1)).all()
    far = head.float().predictive(torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]]))
    assert far.concentration.isfinite().all()


@pytest.mark.statistical
def test_drawn_probabilities_follow_the_dirichlet():
    head, (v, _) = head_of().eval(), rows_of(3)
    drawn = head.functions(v, 4000, torch.Generator().manual_seed(0))
    alpha = head(v).detach()
    for i in range(3):
        for j in range(3):
            beta = stats.beta(alpha[i, j], alpha[i].sum() - alpha[i, j])
            assert stats.kstest(drawn[:, i, j], beta.cdf).pvalue > 1e-4


# -- weights -------------------------------------------------------------------------------------


def test_divergence_of_the_weights():
    layer = VariationalLinear(nn.Linear(5, 3).double())
    with torch.no_grad():
        layer.log_var.normal_(-3, 2)
    q = td.Normal(layer.weight, layer.variance.sqrt())
    for precision in (10.0, 0.5):
        p = td.Normal(torch.zeros((), dtype=F64), precision**-0.5)
        expected = td.kl_divergence(q, p).sum()
        torch.testing.assert_close(layer.kl(precision), expected, rtol=1e-12, atol=1e-12)
    # Variances stay inside exp(±11), where gradients end.
    with torch.no_grad():
        layer.log_var.fill_(50.0)
    assert layer.variance.max().item() == pytest.approx(math.exp(11))


@pytest.mark.statistical
def test_outputs_have_the_law_that_the_weights_imply():
    torch.manual_seed(0)
    layer = VariationalLinear(nn.Linear(4, 2).double())
    with torch.no_grad():
        layer.log_var.normal_(-1, 0.5)
    x = torch.randn(3, 4, dtype=F64)
    drawn = torch.stack([layer(x) for _ in range(4000)]).detach()
    mean = nn.functional.linear(x, layer.weight, layer.bias).detach()
    std = (x.square() @ layer.variance.T).sqrt().detach()
    for r in range(3):
        for o in range(2):
            assert stats.kstest(drawn[:, r, o], stats.norm(mean[r, o], std[r, o]).cdf).pvalue > 1e-4
    # Rows of a call share their weights.
    cov = (x[0] * x[1] * layer.variance[0]).sum() / (std[0, 0] * std[1, 0])
    got = np.corrcoef(drawn[:, 0, 0], drawn[:, 1, 0])[0, 1]
    assert got == pytest.approx(cov.item(), abs=5 / 4000**0.5)
    assert torch.equal(layer.eval()(x), mean)


def test_which_layers_become_variational():
    shared, frozen = nn.Linear(4, 4), nn.Linear(4, 4)
    frozen.requires_grad_(False)
    attention = nn.MultiheadAttention(4, 2)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared), "c": frozen,
                         "d": attention, "e": nn.Conv1d(2, 2, 1)})  # fmt: skip
    weight = shared.weight
    assert variational(net) is net
    assert isinstance(net["a"], VariationalLinear)
    assert net["a"] is net["b"][1]
    assert net["a"].weight is weight
    assert net["c"] is frozen
    assert not any(isinstance(layer, VariationalLinear) for layer in net["d"].modules())
    attention(torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4))
    alone = nn.Linear(2, 2, bias=False).eval()
    found = variational(alone)
    assert isinstance(found, VariationalLinear)
    assert torch.equal(found(torch.ones(2)), alone(torch.ones(2)))
    assert len(list(found.parameters())) == 2


# -- one step of all of it -----------------------------------------------------------------------


def test_a_step_is_the_mean_of_the_rows_and_the_weights_divergence_then_writes():
    """Without noise a step can be done by hand, given how many rows it writes."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    head = head_of(memory_noise=0.0, dirichlet_kl_weight=0.1)
    x, y = torch.randn(3, 4, dtype=F64), torch.tensor([2, 0, 0])
    weight = torch.tensor([0.5, 2.0, 1.5], dtype=F64)  # no sum of 3: a batch of heavy rows
    plain = ETPObjective(net, head, 30.0, 0.7).train()
    sizes = set()
    for seed in range(300):
        v = net(x).detach()
        torch.manual_seed(seed)
        expected = (head.loss(v, y) * weight).mean()  # with the memory before the step
        size = int(torch.randint(3, 50, ()))
        sizes.add(size)
        phi = torch.as_tensor(reference_attention(head, v, head.memory))
        new = nn.functional.one_hot(y, 3) + v.softmax(1)
        share = size * weight / 4
        memory = torch.tanh(0.99 * head.memory + 0.01 * phi.T @ (share[:, None] * new))
        torch.manual_seed(seed)
        got = plain(x, y, weight)
        assert got.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(head.memory, memory, rtol=0, atol=1e-12)
    got.backward()
    assert sizes == set(range(3, 50))
    # Evaluating writes nothing; variational layers add their divergence over N.
    layer = VariationalLinear(net)
    whole = ETPObjective(nn.Sequential(layer), head, 30.0, 0.7).eval()
    memory = head.memory.clone()
    expected = head.loss(net(x), y).mean() + 0.7 * layer.kl() / 30
    assert whole(x, y).item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(head.memory, memory)


def test_bad_input():
    head, (v, y) = ETPHead(3), rows_of()
    for wrong in (v[:, :2], v[0]):
        with pytest.raises(DataError, match=r"shape \(n, 3\)"):
            head.loss(wrong, y)
    with pytest.raises(DataError, match="integer class positions"):
        head.loss(v, y.double())
    for label in (-1, 3):
        with pytest.raises(DataError, match=f"positions 0 to 2, got {label}"):
            head.write(v, torch.full_like(y, label))
    for name, value in (
        ("memory_size", 0),
        ("memory_decay", 1.0),
        ("memory_noise", -0.1),
        ("dirichlet_kl_weight", math.nan),
    ):
        with pytest.raises(ParameterError, match=name):
            ETPHead(3, **{name: value})

"""Evidential losses against tables, dense matrices, enumeration of definitions and quadrature."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import gammaln
from torch import distributions as td
from torch.autograd import gradcheck

from uq.distributions import DirichletCategorical, NormalInverseGamma
from uq.errors import DataError, ParameterError
from uq.nn import (
    DirichletHead,
    NormalInverseGammaHead,
    evidential,
    evidential_loss,
    fisher_log_det,
    nig_kl,
    nig_nll,
)
from uq.nn.evidential import LOSSES
from uq.nn.evidential_functions import gamma_parts

F64 = torch.float64
TABLE = [
    # α, y, squared error + variance, UCE, NLL, KL(α̃), log |I|, I-MSE
    ((2, 1, 1), 0, 0.5, 0.833333, 0.693147, 0.0, -0.981105, 0.522467),
    ((2, 1, 1), 1, 1.0, 1.833333, 1.386294, 0.265279, -0.981105, 1.344934),
    ((1, 1, 1), 0, 0.833333, 1.5, 1.098612, 0.0, 0.219158, 1.370778),
    ((10, 2, 3, 1), 0, 0.227941, 0.489261, 0.470004, 0.744345, -5.596309, 0.059984),
    ((1,) * 10, 0, 0.981818, 2.828968, 2.302585, 0.0, 3.957198, 1.615026),
    ((101, *(1,) * 9), 0, 0.008845, 0.085766, 0.085360, 0.0, -3.565897, 0.002498),
]


@pytest.fixture(params=["compiled", "tensors"])
def path(request, monkeypatch):
    """Both ways in which float32 losses are computed on a CPU."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(evidential, "_kernel", lambda: None)
    return request.param


def reference(evidence, y, loss, prior, dirichlet_kl_weight, logdet_weight):
    """The definitions, by PyTorch's distributions, dense matrices and autograd."""
    alpha = evidence + prior
    k = alpha.shape[1]
    dirichlet = td.Dirichlet(alpha)
    p, total = dirichlet.mean, alpha.sum(1)
    one_hot = torch.nn.functional.one_hot(y, k).to(alpha)
    fisher = torch.diag_embed(torch.polygamma(1, alpha)) - torch.polygamma(1, total)[:, None, None]
    if loss == "edl_nll":
        rows = -td.Categorical(probs=p).log_prob(y)
    elif loss == "edl_ce":
        rows = torch.digamma(total) - (one_hot * torch.digamma(alpha)).sum(1)
    else:
        cov = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        cov = cov / (total + 1)[:, None, None]
        error = one_hot - p
        weight = fisher if loss == "iedl" else torch.eye(k, dtype=alpha.dtype)
        rows = torch.einsum("ni,nij,nj->n", error, weight.expand_as(cov), error)
        if loss != "redl":  # E (y − π)ᵀ W (y − π)
            rows = rows + (weight * cov).sum((1, 2))
    if loss == "iedl":
        rows = rows - logdet_weight * torch.linalg.slogdet(fisher).logabsdet
    without = td.Dirichlet(alpha * (1 - one_hot) + prior * one_hot)
    return rows + dirichlet_kl_weight * td.kl_divergence(
        without, td.Dirichlet(torch.full_like(alpha, prior))
    )


def random_rows(seed, n=6, k=5, high=3.0):
    rng = np.random.default_rng(seed)
    evidence = torch.as_tensor(10 ** rng.uniform(-3, high, (n, k)))
    return evidence, torch.as_tensor(rng.integers(k, size=n))


# -- classification ------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE)
def test_losses_have_their_known_values(row, path):
    alpha, y, edl, uce, nll, kl, log_det, weighted = row
    for dtype, tolerance in ((F64, 1e-6), (torch.float32, 3e-6)):
        evidence, label = torch.tensor([alpha], dtype=dtype) - 1, torch.tensor([y])

        def value(loss, evidence=evidence, label=label, **weights):
            weights = {"dirichlet_kl_weight": 0.0, "logdet_weight": 0.0} | weights
            return evidential_loss(evidence, label, loss, **weights).item()

        close = {"abs": tolerance}
        assert value("edl") == pytest.approx(edl, **close)
        assert value("edl_ce") == pytest.approx(uce, **close)
        assert value("edl_nll") == pytest.approx(nll, **close)
        assert value("iedl") == pytest.approx(weighted, **close)
        assert value("edl", dirichlet_kl_weight=1.0) - edl == pytest.approx(kl, abs=2 * tolerance)
        plus = value("iedl", logdet_weight=1.0)
        assert value("iedl") - plus == pytest.approx(log_det, abs=2 * tolerance)
        assert fisher_log_det(evidence + 1).item() == pytest.approx(log_det, abs=2 * tolerance)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("prior", [0.1, 1.0, 2.5])
def test_value_and_gradient_equal_the_definitions(loss, prior):
    evidence, y = random_rows(1)
    both = []
    for f in (evidential_loss, reference):
        e = evidence.clone().requires_grad_()
        rows = f(e, y, loss, prior=prior, dirichlet_kl_weight=0.7, logdet_weight=0.3)
        rows.sum().backward()
        both.append((rows.detach(), e.grad))
    # PyTorch's trigamma, in the reference, is good to 5e-10.
    torch.testing.assert_close(both[0][0], both[1][0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(both[0][1], both[1][1], rtol=1e-7, atol=1e-8)
    few = (evidence[:3].clamp_max(50) + 0.1).requires_grad_()
    assert gradcheck(lambda t: evidential_loss(t, y[:3], loss, prior=prior), (few,))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("k", [2, 9, 300])
def test_float32_agrees_with_float64_up_to_huge_evidence(loss, k, path):
    evidence, y = random_rows(2, n=40, k=k, high=7)
    evidence[0], evidence[1, y[1]] = 0.0, 1e8
    exact, single = evidence.clone().requires_grad_(), evidence.float().requires_grad_()
    for e in (exact, single):
        rows = evidential_loss(e, y, loss, dirichlet_kl_weight=0.5)
        rows.backward(torch.linspace(0.5, 2, len(rows), dtype=rows.dtype))
        assert e.grad.isfinite().all()
    rows = [evidential_loss(e, y, loss, dirichlet_kl_weight=0.5).double() for e in (exact, single)]
    # Sums over k classes of terms of size log α round to about k ulps of them.
    torch.testing.assert_close(rows[1], rows[0], rtol=5e-6, atol=2e-6 * k)
    # The divergence's gradient is a difference of terms e ψ1(α), which are close to 1.
    scale = exact.grad.abs().amax(1, keepdim=True)
    assert ((single.grad.double() - exact.grad).abs() <= 1e-6 + 2e-5 * scale).all()


def test_redl_with_prior_one_and_the_variance_is_edl():
    evidence, y = random_rows(3)
    alpha = evidence + 1
    p, total = alpha / alpha.sum(1, keepdim=True), alpha.sum(1, keepdim=True)
    redl = evidential_loss(evidence, y, "redl", prior=1.0) + (p * (1 - p) / (total + 1)).sum(1)
    torch.testing.assert_close(redl, evidential_loss(evidence, y, "edl"), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**20))
def test_inequalities_and_scaling(seed):
    evidence, y = random_rows(seed)
    off = {"dirichlet_kl_weight": 0.0, "prior": 1e-9}
    nll, uce = (evidential_loss(evidence, y, loss, **off) for loss in ("edl_nll", "edl_ce"))
    assert (nll <= uce + 1e-12).all()  # Jensen
    # Along α → cα: the expected losses fall with the variance, the marginal one stays.
    more = evidence * 3
    assert (
        evidential_loss(more, y, "edl", **off) < evidential_loss(evidence, y, "edl", **off)
    ).all()
    assert (evidential_loss(more, y, "edl_ce", **off) < uce).all()
    torch.testing.assert_close(evidential_loss(more, y, "edl_nll", **off), nll, atol=1e-5, rtol=0)
    d = DirichletCategorical(evidence + 1)
    assert (d.epistemic >= 0).all()
    assert (d.differential_entropy() <= -gammaln(5) + 1e-9).all()


@pytest.mark.parametrize("prior", [1.0, 2.0])
def test_the_optimum_is_the_prior_plus_frequencies_over_the_weight(prior):
    """Σ η (ψ(S) − ψ(α)) + λ KL(Dir(α) ‖ Dir(β)) is least at α = β + η/λ: what limits EDL."""
    share, weight = torch.tensor([0.7, 0.2, 0.1], dtype=F64), 0.1
    alpha = torch.full((3,), 2.0, dtype=F64, requires_grad=True)
    base = td.Dirichlet(torch.full((3,), prior, dtype=F64))
    optimizer = torch.optim.LBFGS([alpha], max_iter=200, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-12, tolerance_change=1e-14)  # fmt: skip

    def closure():
        optimizer.zero_grad()
        expected = sum(
            share[j]
            * evidential_loss(
                alpha[None] - prior, torch.tensor([j]), "edl_ce", prior=prior,
                dirichlet_kl_weight=0.0, validate_args=False,
            )[0]
            for j in range(3)
        )  # fmt: skip
        loss = expected + weight * td.kl_divergence(td.Dirichlet(alpha), base)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(alpha.detach(), prior + share / weight, rtol=1e-5, atol=1e-5)


def test_evidence_of_the_true_class_is_not_penalised():
    """A divergence on α in place of α̃ would pull the right evidence down."""
    y = torch.tensor([0])
    for size in (1.0, 1e3):
        e = torch.tensor([[size, 0.0, 0.0]], dtype=F64, requires_grad=True)
        with_kl = evidential_loss(e, y, "edl", dirichlet_kl_weight=1.0)
        assert with_kl.item() == pytest.approx(
            evidential_loss(e, y, "edl", dirichlet_kl_weight=0.0).item(), abs=1e-9
        )
        with_kl.backward()
        assert e.grad[0, 0] < 0  # more evidence for it is better
        assert (e.grad[0, 1:] > 0).all()


@pytest.mark.parametrize("prior", [0.1, 1.0, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-11), (torch.float32, 5e-7)])
def test_gamma_functions_equal_fifty_digits(prior, dtype, tolerance):
    values = [0.1, 0.15, 0.3, 0.9, 1, 1.2, 2, 3.7, 10, 33, 100, 1e3, 1e4, 1e6, 1e8, 1e12]
    alpha = torch.tensor([v for v in values if v >= prior], dtype=dtype)
    got = gamma_parts(alpha, prior)
    with mpmath.workdps(50):
        for i, a in enumerate(map(mpmath.mpf, alpha.tolist())):
            one, two = mpmath.polygamma(1, a), mpmath.polygamma(2, a)
            q = -mpmath.loggamma(a) + (a - prior) * mpmath.digamma(a) - a
            assert got.trigamma[i].item() == pytest.approx(float(one), rel=tolerance)
            for name, value in (
                ("log_trigamma", mpmath.log(one)),
                ("g", 1 / one - a),
                ("g_slope", -two / one**2 - 1),
                ("q", q),
            ):
                near = pytest.approx(float(value), rel=tolerance, abs=2 * tolerance)
                assert getattr(got, name)[i].item() == near, name


@pytest.mark.parametrize(
    "alpha", [[3e8, 1e8, 1e8], [1e8, 1.0, 1.0], [1e12, 1e12, 3.0], [5.0] * 100, [0.1, 0.2, 0.3]]
)
def test_log_determinant_does_not_cancel(alpha):
    single = torch.tensor([alpha])
    with mpmath.workdps(60):
        a = [mpmath.mpf(v) for v in single[0].tolist()]
        of_total = mpmath.polygamma(1, sum(a))
        exact = sum(mpmath.log(mpmath.polygamma(1, v)) for v in a)
        exact += mpmath.log(1 - sum(of_total / mpmath.polygamma(1, v) for v in a))
    assert fisher_log_det(single).item() == pytest.approx(float(exact), rel=1e-6, abs=1e-5)
    assert fisher_log_det(single.double()).item() == pytest.approx(float(exact), abs=1e-9)


def test_log_determinant_equals_the_dense_one():
    alpha = random_rows(4)[0] + 1
    dense = torch.diag_embed(torch.polygamma(1, alpha))
    dense = dense - torch.polygamma(1, alpha.sum(1))[:, None, None]
    # The dense matrix comes from PyTorch's trigamma, good to 5e-10.
    torch.testing.assert_close(
        fisher_log_det(alpha), torch.linalg.slogdet(dense).logabsdet, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", ["softplus", "exp", "relu"])
def test_head_reads_evidence(name):
    outputs = torch.tensor([[-1.0, 0.5, 300.0]])
    head = DirichletHead(3, "edl", evidence=name)
    rows = head.loss(outputs.requires_grad_(), torch.tensor([0]))
    rows.sum().backward()
    assert outputs.grad.isfinite().all()
    dist = head.predictive(outputs.detach())
    assert isinstance(dist, DirichletCategorical)
    assert dist.concentration[0, 2] == pytest.approx(1 + (math.exp(15) if name == "exp" else 300))


def test_the_head_computes_in_float32_under_autocast():
    head, y = DirichletHead(4), torch.tensor([0, 3])
    outputs = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        rows = head.loss(outputs.bfloat16(), y)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, head.loss(outputs.bfloat16().float(), y))


@pytest.mark.statistical
def test_drawn_probabilities_follow_the_dirichlet():
    outputs = torch.tensor([[-3.0, 0.1, 1.0], [2.0, -8.0, 4.0]])
    head = DirichletHead(3, "redl")  # concentrations far below 1, too
    drawn = head.functions(outputs, 4000, torch.Generator().manual_seed(0))
    alpha = head(outputs.double())
    torch.testing.assert_close(drawn.sum(-1), torch.ones(4000, 2, dtype=F64))
    for i in range(2):
        for j in range(3):
            beta = stats.beta(alpha[i, j], alpha[i].sum() - alpha[i, j])
            assert stats.kstest(drawn[:, i, j], beta.cdf).pvalue > 1e-4


def test_bad_evidence_and_labels():
    e, y = torch.ones(2, 3), torch.tensor([0, 2])
    for bad in (torch.nan, -1.0, torch.inf):
        wrong = e.clone()
        wrong[1, 2] = bad
        with pytest.raises(DataError, match=r"evidence must be >= 0.*\(1, 2\)"):
            evidential_loss(wrong, y)
    for label in (-1, 3):
        with pytest.raises(DataError, match="positions 0 to 2"):
            evidential_loss(e, torch.tensor([0, label]))
    with pytest.raises(DataError, match="shape"):
        evidential_loss(e, y[:1])
    with pytest.raises(DataError, match="integer class positions"):
        evidential_loss(e, y.float())
    with pytest.raises(ParameterError, match="loss must be"):
        evidential_loss(e, y, "mse")
    with pytest.raises(ParameterError, match="prior must be > 0"):
        evidential_loss(e, y, prior=0.0)
    with pytest.raises(ParameterError, match="dirichlet_kl_weight"):
        evidential_loss(e, y, dirichlet_kl_weight=-1.0)
    with pytest.raises((IndexError, RuntimeError)):
        evidential_loss(e, torch.tensor([0, 3]), validate_args=False)
    with pytest.raises(ParameterError, match="prior must be > 0"):
        DirichletHead(3, prior=0.0)
    with pytest.raises(ParameterError, match="logdet_weight"):
        DirichletHead(3, logdet_weight=-1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_of_any_integer_type(dtype):
    e, y = torch.rand(3, 3, dtype=dtype), torch.tensor([0, 2, 1])
    for kind in (torch.uint8, torch.int16, torch.int32):
        torch.testing.assert_close(evidential_loss(e, y.to(kind)), evidential_loss(e, y))


# -- regression ----------------------------------------------------------------------------------


def nig(seed=0, n=5):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=n), *(10 ** rng.uniform(-1, 1.5, (3, n)))
    loc, nu, alpha, beta = (torch.as_tensor(v) for v in values)
    return loc, nu, 1 + alpha, beta


def test_nll_is_that_of_the_student_t():
    assert nig_nll(*torch.tensor([1.3, 0.2, 0.5, 1.8, 0.7], dtype=F64)).item() == pytest.approx(
        1.646912, abs=1e-6
    )
    assert nig_nll(*torch.tensor([0, 0, 1, 2, 1], dtype=F64)).item() == pytest.approx(
        0.980829, abs=1e-6
    )
    loc, nu, alpha, beta = nig()
    y = torch.linspace(-4, 4, 5, dtype=F64)
    scale = (beta * (1 + nu) / (nu * alpha)).sqrt()
    expected = -stats.t(2 * alpha, loc, scale).logpdf(y)
    np.testing.assert_allclose(nig_nll(y, loc, nu, alpha, beta), expected, rtol=1e-12)
    d = NormalInverseGamma.from_parameters(loc, nu, alpha, beta)
    np.testing.assert_allclose(-d.log_prob(y), expected, rtol=1e-12)


def test_likelihood_does_not_see_the_split():
    """β = c ν/(1 + ν) keeps the density and changes aleatoric and epistemic a hundredfold."""
    y, loc, alpha = (torch.tensor(v, dtype=F64) for v in (1.3, 0.2, 1.8))
    nu = torch.logspace(-2, 2, 9, dtype=F64)
    beta = 2.1 * nu / (1 + nu)
    rows = nig_nll(y, loc, nu, alpha, beta)
    torch.testing.assert_close(rows, rows[:1].expand(9), rtol=1e-12, atol=0)
    d = NormalInverseGamma.from_parameters(loc.expand(9), nu, alpha.expand(9), beta)
    torch.testing.assert_close(d.variance, d.variance[:1].expand(9), rtol=1e-12, atol=0)
    assert d.aleatoric[-1] > 50 * d.aleatoric[0]


def test_divergence_has_the_right_first_term():
    p, q = torch.tensor([0.5, 2, 3, 1.5], dtype=F64), torch.tensor([-0.3, 0.7, 2, 1], dtype=F64)
    assert nig_kl(p, q).item() == pytest.approx(0.688478, abs=1e-6)
    assert nig_kl(p, p).item() == pytest.approx(0, abs=1e-12)
    generator = np.random.default_rng(0)
    variance = stats.invgamma(3, scale=1.5).rvs(400_000, random_state=generator)
    mean = generator.normal(0.5, np.sqrt(variance / 2))

    def log_density(loc, nu, alpha, beta):
        of_mean = stats.norm(loc, np.sqrt(variance / nu)).logpdf(mean)
        return of_mean + stats.invgamma(alpha, scale=beta).logpdf(variance)

    gap = log_density(*p.numpy()) - log_density(*q.numpy())
    error = gap.std() / len(gap) ** 0.5
    assert nig_kl(p, q).item() == pytest.approx(gap.mean(), abs=5 * error)
    assert gap.mean() > 0.539145 + 20 * error  # what (α₁ − 1)/β₁ would give


def test_split_and_entropies_of_the_normal_inverse_gamma():
    loc, nu, alpha, beta = nig()
    d = NormalInverseGamma.from_parameters(loc, nu, alpha, beta)
    for got, expected in ((d.nu, nu), (d.alpha, alpha), (d.beta, beta)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(d.aleatoric, beta / (alpha - 1))
    torch.testing.assert_close(d.epistemic, beta / (nu * (alpha - 1)))
    torch.testing.assert_close(d.variance, d.aleatoric + d.epistemic)
    np.testing.assert_allclose(
        d.entropy(), stats.t(2 * alpha).entropy() + np.log(d.base.scale.numpy())
    )
    rng = np.random.default_rng(1)
    variance = stats.invgamma(alpha, scale=beta).rvs((100_000, 5), random_state=rng)
    conditional = 0.5 * np.log(2 * np.pi * np.e * variance)
    error = conditional.std(0) / 100_000**0.5
    assert (np.abs(conditional.mean(0) - d.expected_entropy().numpy()) < 5 * error).all()
    mean = rng.normal(loc, np.sqrt(variance / nu.numpy()))
    surprise = -stats.norm(loc, np.sqrt(variance / nu.numpy())).logpdf(mean)
    surprise -= stats.invgamma(alpha, scale=beta).logpdf(variance)
    error = surprise.std(0) / 100_000**0.5
    assert (np.abs(surprise.mean(0) - d.differential_entropy().numpy()) < 5 * error).all()
    assert (d.mutual_information() > 0).all()
    torch.testing.assert_close(
        d.affine(torch.tensor(2.0), torch.tensor(3.0)).mutual_information(),
        d.mutual_information(),
    )
    with pytest.raises(DataError, match="alpha must be finite and > 1"):
        NormalInverseGamma.from_parameters(loc, nu, alpha - 1 - alpha.min() + 1e-9, beta)


@pytest.mark.parametrize("penalty", ["evidence", "normalised", "kl"])
def test_penalties(penalty):
    head = NormalInverseGammaHead(1, penalty, penalty_weight=0.3)
    outputs = torch.tensor([[0.2, -0.5, 0.7, 0.1]], dtype=F64, requires_grad=True)
    loc, nu, alpha, beta = (t[0, 0].detach() for t in head(outputs))
    y = torch.tensor([[1.5]], dtype=F64)
    error = abs(1.5 - loc)
    factor = 2 * nu + alpha
    if penalty == "normalised":
        factor = factor / (beta * (1 + nu) / (nu * alpha)).sqrt()
    elif penalty == "kl":
        omega = torch.tensor(0.01, dtype=F64)
        factor = nig_kl((loc, nu, alpha, beta), (loc, omega, 1 + omega, beta))
    expected = nig_nll(y[0, 0], loc, nu, alpha, beta) + 0.3 * error * factor
    assert head.loss(outputs, y).item() == pytest.approx(expected.item(), rel=1e-12)
    assert gradcheck(lambda t: head.loss(t, y), (outputs,))
    with pytest.raises(ParameterError, match="penalty"):
        NormalInverseGammaHead(1, "amini")
    with pytest.raises(ParameterError, match="penalty_weight"):
        NormalInverseGammaHead(1, penalty, penalty_weight=-0.1)


def test_targets_are_not_broadcast():
    head = NormalInverseGammaHead(1)
    for method in (head.loss, head.nll):
        with pytest.raises(DataError, match=r"\(5, 1\).*got \(5,\)"):
            method(torch.randn(5, 4), torch.randn(5))


@pytest.mark.statistical
def test_drawn_means_follow_their_student_t():
    head = NormalInverseGammaHead(1)
    outputs = torch.tensor([[0.5, -1.0, 0.3, 1.0], [1.0, 2.0, 3.0, -1.0]], dtype=F64)
    drawn = head.functions(outputs, 4000, torch.Generator().manual_seed(0))[..., 0]
    loc, nu, alpha, beta = (t[:, 0] for t in head(outputs))
    for i in range(2):
        t = stats.t(2 * alpha[i], loc[i], (beta / (nu * alpha))[i].sqrt())
        assert stats.kstest(drawn[:, i], t.cdf).pvalue > 1e-4


@pytest.mark.parametrize(
    ("ours", "theirs"), [("edl", "mse"), ("edl_nll", "log"), ("edl_ce", "digamma")]
)
def test_torch_uncertainty(ours, theirs):
    losses = pytest.importorskip("torch_uncertainty.losses", exc_type=ImportError)
    generator = torch.Generator().manual_seed(0)
    evidence = 10 * torch.rand(50, 6, generator=generator, dtype=torch.float64)
    y = torch.arange(50) % 6
    expected = losses.DECLoss(reg_weight=0.3, loss_type=theirs)(evidence, y)
    found = evidential_loss(evidence, y, ours, dirichlet_kl_weight=0.3).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)

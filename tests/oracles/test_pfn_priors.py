"""Priors of prior-data fitted networks: exact laws where they have one, protocol, statistics."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score

from uq.errors import DataError, ParameterError
from uq.inference.pfn_mechanisms import ACTIVATIONS, MECHANISMS, by_kind, causal_graph, choice
from uq.inference.pfn_priors import (
    BNNPrior,
    GPHyperPrior,
    GPPrior,
    PyroPrior,
    pfn_prior,
    prior_task,
    rbf_covariance,
    sample_prior,
)

NAMES = ("gp", "gp-hyper", "bnn", "scm", "tabular-regression", "tabular-classification")
TABLES = NAMES[-2:]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(name, batch=6, n=40, d=None, seed=0, **options):
    prior = pfn_prior(name, **options)
    return sample_prior(prior, batch, n, d or min(4, prior.max_features), seeded(seed))


# -- protocol ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "n", "d"), [(1, 1, 1), (3, 2, 1), (2, 30, 10), (40, 12, 3)])
def test_shapes_and_dtypes(name, batch, n, d):
    d = min(d, pfn_prior(name).max_features)
    x, y = draw(name, batch, n, d)
    assert x.shape == (batch, n, d)
    assert y.shape == (batch, n)
    assert x.dtype == torch.float32
    assert y.dtype == (torch.int64 if "classification" in name else torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_is_the_only_source_of_randomness(name):
    before = torch.get_rng_state()
    x, y = draw(name)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = draw(name)
    assert torch.equal(x.nan_to_num(7), again[0].nan_to_num(7))
    assert torch.equal(y, again[1])
    other = draw(name, seed=1)
    assert not torch.equal(x, other[0])
    assert not torch.equal(y, other[1])
    # A generator that goes on gives new data sets.
    prior, g = pfn_prior(name), seeded()
    first, second = (sample_prior(prior, 2, 9, 1, g)[1] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_description_is_plain(name):
    described = pfn_prior(name).describe()
    assert all(isinstance(v, int | float | str | None) for v in described.values())
    assert "object at" not in str(described)


def prior_of(x=None, y=None, task="regression", **attributes):
    def sample(batch, n, d, generator):
        good = torch.zeros(batch, n, d), torch.zeros(batch, n)
        return tuple(made or given for made, given in zip((x, y), good, strict=True))

    sample.task = task
    for key, value in attributes.items():
        setattr(sample, key, value)
    return sample


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (prior_of(x=[0.0]), r"X has shape list, expected a tensor of shape \(2, 5, 3\)"),
        (lambda b, n, d, g: torch.zeros(b, n), r"expected a tuple \(X, y\)"),
        (lambda b, n, d, g: (torch.zeros(b, d, n), torch.zeros(b, n)), r"X has shape \(2, 3, 5\)"),
        (lambda b, n, d, g: (torch.zeros(b, n, d), torch.zeros(b, n, 1)), r"y has shape"),
        (
            lambda b, n, d, g: (torch.zeros(b, n, d).double(), torch.zeros(b, n)),
            "X has dtype torch.float64, expected torch.float32",
        ),
        (
            lambda b, n, d, g: (torch.zeros(b, n, d), torch.zeros(b, n).long()),
            "y has dtype torch.int64, expected torch.float32",
        ),
        (
            lambda b, n, d, g: (torch.zeros(b, n, d), torch.zeros(b, n) / 0),
            "y has missing or infinite",
        ),
        (
            lambda b, n, d, g: (torch.ones(b, n, d) / 0, torch.zeros(b, n)),
            "X has infinite values",
        ),
    ],
)
def test_what_a_prior_must_not_return(prior, message):
    with pytest.raises(DataError, match=message):
        sample_prior(prior, 2, 5, 3, seeded())


def test_labels_and_tasks_of_a_prior_are_checked():
    def labels(batch, n, d, generator):
        return torch.zeros(batch, n, d), torch.full((batch, n), 3)

    labels.task = "classification"
    sample_prior(labels, 2, 5, 3, seeded())
    labels.max_classes = 3
    with pytest.raises(DataError, match="labels from 3 to 3, expected 0 to 2"):
        sample_prior(labels, 2, 5, 3, seeded())
    labels.task = "ranking"
    with pytest.raises(ParameterError, match="task must be"):
        prior_task(labels)
    with pytest.raises(ParameterError, match="unknown prior 'gps'; there are gp, gp-hyper"):
        pfn_prior("gps")
    with pytest.raises(ParameterError, match=r"pfn_prior\('gp'\).*length_scale"):
        pfn_prior("gp", length_scale=1)


# -- Gaussian processes --------------------------------------------------------------------------


def test_covariance_is_the_kernel():
    x = torch.rand(3, 5, 2, generator=seeded(), dtype=torch.float64)
    length = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    made = rbf_covariance(x, length)
    for b, i, j in ((0, 0, 3), (1, 2, 4), (2, 1, 1)):
        gap = float((x[b, i] - x[b, j]).square().sum())
        assert float(made[b, i, j]) == pytest.approx(math.exp(-gap / (2 * float(length[b]) ** 2)))


@pytest.mark.statistical
def test_gp_draws_are_normal_given_the_inputs():
    # White noise again: L⁻¹y of each data set is N(0, I) where K + σ²I = LLᵀ.
    prior = GPPrior(lengthscale=0.3, noise_variance=0.05, max_features=2)
    x, y = prior(500, 20, 2, seeded())
    covariance = rbf_covariance(x.double(), 0.3) + 0.05 * torch.eye(20, dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, y.double()[..., None], upper=False)
    assert stats.kstest(white.flatten().numpy(), "norm").pvalue > 1e-3
    # A wrong lengthscale or noise shows in the spread: the variance of 10,000 has error 0.014.
    assert float(white.var()) == pytest.approx(1, abs=0.06)
    later = white[:, -1, 0]  # the last innovation is the most sensitive
    assert float(later.var()) == pytest.approx(1, abs=4 * (2 / 500) ** 0.5)
    assert stats.kstest(x.flatten().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.statistical
def test_hyperparameters_follow_their_priors():
    prior = GPHyperPrior(min_noise=0.0)
    length, noise = prior.hyperparameters(4000, seeded())
    assert stats.kstest(length.numpy(), stats.gamma(3, scale=1 / 6).cdf).pvalue > 1e-3
    assert stats.kstest(noise.numpy(), stats.gamma(1.1, scale=1 / 20).cdf).pvalue > 1e-3
    assert float(GPHyperPrior().hyperparameters(4000, seeded())[1].min()) >= 1e-3
    # One draw a data set, and y uses it: y has variance 1 + E σ² over data sets.
    _, y = GPHyperPrior()(4000, 2, 1, seeded(1))
    expected = 1 + 1.1 / 20
    assert float(y[:, 0].var()) == pytest.approx(expected, abs=4 * expected * (2 / 4000) ** 0.5)


@pytest.mark.statistical
def test_hyperparameters_of_ones_own():
    prior = GPHyperPrior(
        lengthscale=dist.Delta(torch.tensor(0.2)), noise_variance=dist.Delta(torch.tensor(0.01))
    )
    x, y = prior(2000, 2, 1, seeded())
    # E y₁y₂ given the inputs is the kernel.
    kernel = torch.exp(-(x[:, 0, 0] - x[:, 1, 0]).square() / 0.08)
    rest = (y[:, 0] * y[:, 1] - kernel).double()
    assert abs(float(rest.mean())) < 4 * float(rest.std()) / 2000**0.5


# -- networks and Pyro ---------------------------------------------------------------------------


@pytest.mark.statistical
def test_bnn_targets_have_the_variance_of_the_prior():
    # Without hidden layers y = 2.0 w·x + b + noise with w ~ N(0, I/d): Var = 4 + 1 + σ².
    prior = BNNPrior(layers=0, weight_scale=2.0, noise_scale=dist.Delta(torch.tensor(0.5)))
    _, y = prior(4000, 1, 3, seeded())
    # w·x given |x|² is normal with variance |x|²/3: kurtosis 3·E|x|⁴/9 = 5 rather than 3.
    assert float(y.var()) == pytest.approx(5.25, abs=4 * 5.25 * (4 / 4000) ** 0.5)


@pytest.mark.statistical
def test_bnn_classes_fill_their_number():
    _, y = BNNPrior(task="classification", max_classes=4)(600, 60, 2, seeded())
    n_classes = torch.tensor([len(row.unique()) for row in y])
    assert int(y.max()) == 3
    # 2, 3 or 4 classes are equally likely, ±4 standard errors; rare ones may not show in 60 rows.
    error = 4 * (600 * 2 / 9) ** 0.5
    assert int((n_classes <= 2).sum()) > 200 - error
    assert 50 < int((n_classes == 4).sum()) < 200 + error


def coin(n, d):
    p = pyro.sample("p", dist.Beta(2.0, 1.0))
    return torch.zeros(n, d), pyro.sample("y", dist.Bernoulli(p).expand([n]))


def coins(batch, n, d):
    p = pyro.sample("p", dist.Beta(2.0, 1.0).expand([batch, 1]))
    return torch.zeros(batch, n, d), pyro.sample("y", dist.Bernoulli(p.expand(batch, n)))


@pytest.mark.statistical
@pytest.mark.parametrize(("model", "batch"), [(coin, 400), (coins, 4000)])
def test_a_pyro_model_is_a_prior(model, batch):
    prior = PyroPrior(model, task="classification", vectorised=model is coins, max_classes=2)
    before = torch.get_rng_state()
    _, y = sample_prior(prior, batch, 2, 1, seeded())
    assert torch.equal(torch.get_rng_state(), before)
    # P(y₁ = y₂ = 1) = E p² = 2·3/(3·4) for Beta(2, 1): the rows share p.
    share = float(y.prod(1).double().mean())
    assert share == pytest.approx(0.5, abs=4 * 0.5 / batch**0.5)
    assert model.__name__ in prior.describe()["model"]


# -- tables --------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("name", [*TABLES, "scm"])
def test_rows_are_exchangeable(name):
    # A statistic of one row, its position among the others, has the same law for every row.
    x, y = draw(name, batch=1500, n=12, d=2)
    first = torch.stack([x[..., 0].nan_to_num(0), y.float()])
    ranks = first.argsort(-1).argsort(-1).double()
    # Ties break by position under argsort: of values that occur once only.
    alone = (first[..., None] == first[..., None, :]).sum(-1) == 1
    for k in range(2):
        early, late = (ranks[k, :, i][alone[k, :, i]] for i in (0, -1))
        assert stats.ks_2samp(early.numpy(), late.numpy()).pvalue > 1e-3
    # Neighbours are no more alike than rows far apart.
    near = (x[:, 0, 0] - x[:, 1, 0]).abs().nan_to_num(0).clamp(max=5)
    far = (x[:, 0, 0] - x[:, -1, 0]).abs().nan_to_num(0).clamp(max=5)
    gap = (near - far).double()
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / 1500**0.5


@pytest.mark.parametrize("most", [2, 3, 10])
def test_classes_are_dense_and_within_range(most):
    _, y = draw("tabular-classification", batch=400, n=200, d=3, max_classes=most)
    present = [row.unique() for row in y]
    for labels in present:
        assert labels.tolist() == list(range(len(labels)))
    sizes = np.bincount([len(p) for p in present], minlength=most + 1)
    assert sizes[most] > 0
    assert sizes[1] < 0.03 * 400
    if most == 10:
        assert (sizes[2:] > 0).all()
        assert 0.3 * 400 < sizes[2] < 0.65 * 400


@pytest.mark.statistical
def test_labels_mean_nothing():
    # The codes are a random permutation: the most frequent class is any of them.
    _, y = draw("tabular-classification", batch=900, n=60, d=2, max_classes=2)
    share = y.double().mean(1)
    both = share[(share > 0) & (share < 1)]
    assert float((both > 0.5).double().mean()) == pytest.approx(0.5, abs=0.07)


def test_classes_are_balanced_in_some_data_sets_and_not_in_others():
    _, y = draw("tabular-classification", batch=300, n=300, d=4, max_classes=2)
    top = torch.stack([torch.bincount(row, minlength=2).max() / 300 for row in y])
    assert float((top < 0.6).double().mean()) > 0.25
    assert 0.05 < float((top > 0.85).double().mean()) < 0.4


def test_columns_of_all_kinds():
    x, _ = draw("tabular-regression", batch=400, n=200, d=5)
    missing = x.isnan()
    affected = missing.any(1).any(1).double().mean()
    assert 0.06 < float(affected) < 0.22
    assert not missing.all(1).any()
    few = torch.tensor([[len(c.unique()) <= 12 for c in s.T] for s in x.nan_to_num(0)])
    assert 0.1 < float(few.double().mean()) < 0.6
    whole = x[~missing.any(1).any(1)].double()
    columns = whole.transpose(1, 2).reshape(-1, 200)
    skew = stats.skew(columns[columns.std(1) > 1e-3 * columns.abs().amax(1)].numpy(), axis=1)
    assert (np.abs(skew) > 1.5).mean() > 0.1
    assert (np.abs(skew) < 0.3).mean() > 0.2
    pairs = torch.stack([torch.corrcoef(s.T) for s in whole])[:, 0, 1].abs()
    assert float((pairs > 0.9).double().mean()) > 0.02
    assert float((pairs < 0.2).double().mean()) > 0.2


def test_targets_can_be_learned_to_every_degree():
    x, y = draw("tabular-regression", batch=60, n=300, d=3, seed=3)
    r2 = []
    for inputs, target in zip(x.double().nan_to_num(0).numpy(), y.numpy(), strict=True):
        inputs = (inputs - inputs.mean(0)) / (inputs.std(0) + 1e-9)
        model = RidgeCV().fit(inputs[:200], target[:200])
        r2.append(r2_score(target[200:], model.predict(inputs[200:])))
    r2 = np.array(r2)
    assert 0.03 < (r2 > 0.9).mean() < 0.4
    assert 0.1 < (r2 < 0.1).mean() < 0.6
    assert float((y.std(1) - 1).abs().median()) < 0.01


def test_heavy_tails_and_varying_noise_occur():
    _, y = draw("tabular-regression", batch=300, n=400, d=3)
    kurtosis = stats.kurtosis(y.double().numpy(), axis=1)
    assert (kurtosis > 5).mean() > 0.1
    assert (kurtosis < 0.5).mean() > 0.3
    assert float(y.abs().max()) <= 1e3


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.__name__)
def test_mechanisms_are_functions_of_the_columns_that_matter(mechanism):
    z = torch.randn(5, 60, 4, generator=seeded())
    relevance = torch.tensor([[1.0, 0.7, 0.0, 0.3]]).expand(5, 4)
    changed = z.clone()
    changed[..., 2] = torch.randn(5, 60, generator=seeded(1))
    one, other = (mechanism(inputs, relevance, 2, seeded(2)) for inputs in (z, changed))
    assert one.shape == (5, 60, 2)
    assert float(one.std(1).min()) > 0
    torch.testing.assert_close(one, other)
    # Rows with equal inputs have equal outputs.
    z[:, 1] = z[:, 0]
    same = mechanism(z, relevance, 2, seeded(2))
    torch.testing.assert_close(same[:, 0], same[:, 1])


def test_targets_of_a_graph_depend_on_its_columns():
    x, f = causal_graph(200, 300, 6, 1, seeded())
    assert x.shape == (200, 300, 6)
    assert f.shape == (200, 300, 1)
    strongest = torch.stack(
        [
            torch.corrcoef(torch.cat([a, b], 1).T)[-1, :-1].abs().max()
            for a, b in zip(x, f, strict=True)
        ]
    )
    assert float((strongest > 0.5).double().mean()) > 0.6
    assert float((strongest > 0.999).double().mean()) < 0.05  # a column is not the target itself


def test_by_kind_applies_each_function_to_its_rows():
    values = torch.linspace(-2, 2, 24).view(6, 4)
    kinds = torch.tensor([0, 1, 1, 5, 0, 12])
    made = by_kind(kinds, values, ACTIVATIONS)
    for row, kind in enumerate(kinds.tolist()):
        torch.testing.assert_close(made[row], ACTIVATIONS[kind](values[row]))
    picked = choice(seeded(), (1.0, 0.0, 3.0), 4000)
    counts = torch.bincount(picked, minlength=3)
    assert counts[1] == 0
    assert float(counts[2]) == pytest.approx(3000, abs=4 * (4000 * 0.75 * 0.25) ** 0.5)

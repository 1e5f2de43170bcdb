"""Bar distribution against quadrature of its density, and its borders against exact posteriors."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from uq.distributions import BarDistribution
from uq.distributions.bar import bar_borders, bar_loss
from uq.errors import DataError, NoEpistemicError, ParameterError

BORDERS = torch.tensor([-3.0, -1.5, -1.0, 0.0, 0.3, 2.0, 4.0], dtype=torch.float64)
LOGITS = torch.tensor(
    [[0.5, -1.0, 2.0, 0.3, 0.0, 1.0], [2.0, 0.0, -3.0, 0.5, 0.1, 2.5]], dtype=torch.float64
)
# A point in each bucket, both beyond and inside the outermost borders, and one on a border.
POINTS = (-9.0, -2.0, -1.2, -0.7, 0.0, 0.1, 1.0, 2.5, 8.0)


@pytest.fixture
def d():
    return BarDistribution(LOGITS, BORDERS)


def density(row):
    def f(y):
        return math.exp(float(row.log_prob(torch.tensor(y, dtype=torch.float64))))

    return f


def integral(f, low=-np.inf, high=np.inf):
    """Quadrature in pieces that end where the density jumps."""
    edges = [low, *(b for b in BORDERS[1:-1].tolist() if low < b < high), high]
    return sum(quad(f, a, b, epsabs=1e-11, epsrel=1e-11)[0] for a, b in pairwise(edges))


@pytest.mark.parametrize("i", [0, 1])
def test_density_moments_and_entropy_are_those_of_quadrature(d, i):
    row, f = d[i], density(d[i])
    mean = integral(lambda y: y * f(y))
    assert integral(f) == pytest.approx(1, abs=1e-9)
    assert float(row.mean) == pytest.approx(mean, abs=1e-9)
    assert float(row.variance) == pytest.approx(
        integral(lambda y: (y - mean) ** 2 * f(y)), abs=1e-8
    )

    def surprise(y):
        return -float(row.log_prob(torch.tensor(y, dtype=torch.float64))) * f(y)

    # Beyond 60 scales the density underflows, and its logarithm times it is not a number.
    assert float(row.entropy()) == pytest.approx(integral(surprise, -60, 60), abs=1e-8)


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("y", POINTS)
def test_cdf_and_crps_are_integrals_of_the_density(d, i, y):
    row, f = d[i], density(d[i])
    value = torch.tensor(y, dtype=torch.float64)
    assert float(row.cdf(value)) == pytest.approx(integral(f, high=y), abs=1e-9)

    def cdf(t):
        return float(row.cdf(torch.tensor(t, dtype=torch.float64)))

    below = integral(lambda t: cdf(t) ** 2, -60, y)
    above = integral(lambda t: (1 - cdf(t)) ** 2, y, 60)
    assert float(row.crps(value)) == pytest.approx(below + above, abs=1e-8)


def test_half_of_each_tail_lies_beyond_the_outermost_border(d):
    p = torch.softmax(LOGITS, -1)
    torch.testing.assert_close(d.cdf(BORDERS[0].expand(2)), 0.5 * p[:, 0])
    torch.testing.assert_close(d.cdf(BORDERS[-1].expand(2)), 1 - 0.5 * p[:, -1])


def test_quantiles_invert_the_cdf_in_the_bars_and_in_the_tails(d):
    u = torch.tensor([1e-12, 1e-4, 0.01, 0.2, 0.5, 0.77, 0.99, 1 - 1e-4], dtype=torch.float64)
    torch.testing.assert_close(
        d.cdf(d.quantile(u)), u[:, None].expand(-1, 2), rtol=1e-9, atol=1e-13
    )
    y = torch.tensor(POINTS, dtype=torch.float64)[:, None].expand(-1, 2)
    for row in y:
        q = d.cdf(row)
        again = torch.stack([d[i].quantile(q[i]) for i in range(2)])
        torch.testing.assert_close(again, row, rtol=1e-6, atol=1e-6)


@pytest.mark.statistical
def test_samples_follow_the_cdf_and_leave_the_borders(d):
    n = 40_000
    draws = d.sample((n,), generator=torch.Generator().manual_seed(0))
    p = torch.softmax(LOGITS, -1)
    for i in range(2):
        # 1.6 / √n is the 1.2 % point of the Kolmogorov distribution.
        ks = stats.kstest(draws[:, i].numpy(), lambda y, i=i: d[i].cdf(torch.tensor(y)).numpy())
        assert ks.statistic < 1.6 / math.sqrt(n)
        outside = ((draws[:, i] < BORDERS[0]) | (draws[:, i] > BORDERS[-1])).double().mean()
        share = float(p[i, 0] + p[i, -1]) / 2
        assert abs(float(outside) - share) < 4 * math.sqrt(share * (1 - share) / n)


def test_gradient_of_the_loss_is_the_softmax_less_the_bucket():
    logits = LOGITS.clone().requires_grad_()
    y = torch.tensor([-0.5, 7.0], dtype=torch.float64)
    bar_loss(logits, BORDERS, y).sum().backward()
    onehot = torch.zeros_like(LOGITS)
    onehot[0, 2] = onehot[1, 5] = 1
    torch.testing.assert_close(logits.grad, torch.softmax(LOGITS, -1) - onehot, rtol=0, atol=1e-12)


def test_the_loss_is_the_negative_log_density(d):
    for y in POINTS:
        value = torch.full((2,), y, dtype=torch.float64)
        torch.testing.assert_close(bar_loss(LOGITS, BORDERS, value), -d.log_prob(value))


def test_rows_with_borders_of_their_own_are_those_of_separate_distributions():
    borders = torch.stack([BORDERS, 2 * BORDERS + 1])
    both = BarDistribution(LOGITS, borders)
    y = torch.tensor([[0.2, 7.0], [-4.0, -30.0]], dtype=torch.float64)
    for i in range(2):
        alone = BarDistribution(LOGITS[i : i + 1], borders[i])
        for name in ("log_prob", "cdf"):
            torch.testing.assert_close(
                getattr(both, name)(y)[:, i], getattr(alone, name)(y[:, i : i + 1])[:, 0]
            )
        torch.testing.assert_close(both.crps(y[0])[i], alone.crps(y[0, i : i + 1])[0])
        torch.testing.assert_close(
            both.quantile([0.01, 0.6])[:, i], alone.quantile([0.01, 0.6])[:, 0]
        )
        for name in ("mean", "variance", "mode"):
            torch.testing.assert_close(getattr(both, name)[i], getattr(alone, name)[0])


def test_an_affine_map_changes_variables_exactly_tails_included(d):
    shift, factor = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.1])
    moved = d.affine(shift, factor)
    for y in POINTS:
        value = torch.full((2,), y, dtype=torch.float64)
        there = shift + factor * value
        torch.testing.assert_close(
            moved.log_prob(there), d.log_prob(value) - factor.double().log(), rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(moved.mean, shift + factor * d.mean)
    torch.testing.assert_close(moved.stddev, factor * d.stddev)
    with pytest.raises(ParameterError, match="factor must be > 0"):
        d.affine(0.0, -1.0)


def test_an_increasing_map_keeps_the_cdf_at_the_borders(d):
    moved = d.transformed(torch.exp)
    for b in BORDERS[1:-1]:
        torch.testing.assert_close(moved.cdf(b.exp().expand(2)), d.cdf(b.expand(2)))


def test_average_is_the_mixture():
    one, two = BarDistribution(LOGITS, BORDERS), BarDistribution(LOGITS.flip(0), BORDERS)
    mixed = BarDistribution.average([one, two], [1.0, 3.0])
    for y in POINTS:
        value = torch.full((2,), y, dtype=torch.float64)
        expected = 0.25 * one.log_prob(value).exp() + 0.75 * two.log_prob(value).exp()
        torch.testing.assert_close(mixed.log_prob(value).exp(), expected)
    other = BarDistribution(LOGITS, BORDERS + 0.1)
    mixed = BarDistribution.average([one, other])
    for b in BORDERS[1:-1]:
        expected = 0.5 * (one.cdf(b.expand(2)) + other.cdf(b.expand(2)))
        torch.testing.assert_close(mixed.cdf(b.expand(2)), expected)
    with pytest.raises(DataError, match="parts is empty"):
        BarDistribution.average([])
    with pytest.raises(DataError, match="same batch shape"):
        BarDistribution.average([one, one[:1]])


def test_averaging_float32_bars_keeps_small_buckets():
    # Beyond the cdf's float32 resolution of 6e-8 near 1; what remains is float64 rounding.
    p = torch.tensor([[0.2, 0.3, 0.3, 0.2 - 1e-9, 1e-9]], dtype=torch.float64)
    borders = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    d = BarDistribution(p.log().float(), borders)
    finer = torch.tensor([-2.0, -1.5, -1.0, 0.0, 1.0, 2.0, 3.0])
    mixed = BarDistribution.average([d], borders=finer)
    value = torch.tensor([2.5])
    torch.testing.assert_close(mixed.log_prob(value), d.log_prob(value), rtol=0, atol=1e-5)


def test_mode_is_the_highest_bar():
    logits = torch.full((1, 6), -5.0, dtype=torch.float64)
    logits[0, 3] = 0.0  # the narrowest
    assert float(BarDistribution(logits, BORDERS).mode) == pytest.approx(0.15)
    logits[0, 5] = 9.0  # a half-normal is highest at its inner border
    assert float(BarDistribution(logits, BORDERS).mode) == 2.0


def test_outputs_of_a_joint_event_are_independent():
    d = BarDistribution(torch.stack([LOGITS, LOGITS.flip(0)], 1), BORDERS)
    y = torch.tensor([[0.1, 3.0], [-2.0, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(d.joint().log_prob(y), d.log_prob(y).sum(-1))
    torch.testing.assert_close(d.joint().entropy(), d.entropy().sum(-1))
    torch.testing.assert_close(d.output(1).mean, d.mean[:, 1])
    assert d.joint().sample((3,)).shape == (3, 2, 2)


def test_it_has_no_epistemic_part(d):
    torch.testing.assert_close(d.aleatoric, d.variance)
    with pytest.raises(NoEpistemicError, match="one predictive distribution"):
        _ = d.epistemic
    assert d.to_frame()["epistemic"].isna().all()


@pytest.mark.parametrize(
    ("logits", "borders", "match"),
    [
        (LOGITS, BORDERS[:-1], "K buckets need K"),
        (LOGITS[:, :1], BORDERS[:2], "K >= 2"),
        (LOGITS, BORDERS.flip(0), "increase"),
        (LOGITS, BORDERS.expand(3, 7), "do not fit"),
        (LOGITS * float("nan"), BORDERS, "NaN"),
        (torch.full_like(LOGITS, -math.inf), BORDERS, "only -inf"),
        (LOGITS.long(), BORDERS, "real numbers"),
    ],
)
def test_bad_input(logits, borders, match):
    with pytest.raises(DataError, match=match):
        BarDistribution(logits, borders)


# -- borders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["equal_mass", "equal_width", "fine_tails"])
def test_the_outermost_borders_are_the_medians_of_their_tails(rule):
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    b = bar_borders(values, 100, rule)
    assert len(b) == 101
    for inner, outer in ((values[values < b[1]], b[0]), (values[values > b[-2]], b[-1])):
        # The share beyond the outer border is 1/2, to within 4 standard errors.
        share = float(((inner - outer) * (1 if outer > 0 else -1) > 0).double().mean())
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(len(inner)) + 1 / len(inner)


def test_border_rules():
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(1)).double()
    mass = torch.histogram(values, bar_borders(values, 50, "equal_mass")[1:-1]).hist
    assert float(mass.max() / mass.min()) < 1.001
    width = bar_borders(values, 50, "equal_width")[1:-1].diff()
    torch.testing.assert_close(width, width[:1].expand(48))
    fine = bar_borders(values, 100, "fine_tails")
    assert float((values < fine[1]).double().mean()) == pytest.approx(1e-5, rel=0.5)
    few = bar_borders(torch.tensor([0.0, 1.0, 2.0]).repeat(1000), 50, "equal_mass")
    assert len(few) == 3  # repeated values share a border
    with pytest.raises(ParameterError, match="border_rule"):
        bar_borders(values, 10, "even")
    with pytest.raises(ParameterError, match="at least 2"):
        bar_borders(values, 1)
    with pytest.raises(DataError, match="distinct"):
        bar_borders(torch.zeros(100), 10)
    with pytest.raises(DataError, match="finite"):
        bar_borders(torch.tensor([0.0, math.nan]), 10)


def floor(n, n_buckets, rule, *, n_sets=1500, n_points=400):
    """E KL(exact GP posterior ‖ its own bucket probabilities), by quadrature over its quantiles."""
    from uq.inference.pfn_losses import exact_gp
    from uq.inference.pfn_priors import GPPrior

    prior, g = GPPrior(), torch.Generator().manual_seed(n)
    X, y = prior(n_sets, n + 1, 1, g)
    mean, variance = exact_gp(prior, X, y, n)
    normal = torch.distributions.Normal(mean, variance.sqrt())
    borders = bar_borders(math.sqrt(1.01) * torch.randn(1_000_000, generator=g), n_buckets, rule)
    cdf = normal.cdf(borders[1:-1])
    edge = torch.zeros(n_sets, 1, dtype=torch.float64)
    p = torch.cat([edge, cdf, edge + 1], 1).diff(dim=1)
    bars = BarDistribution(p.clamp_min(1e-300).log(), borders)
    u = (torch.arange(n_points, dtype=torch.float64) + 0.5) / n_points
    values = normal.icdf(u)  # (sets, points)
    log_ratio = normal.log_prob(values).T - bars.log_prob(values.T)
    each = log_ratio.mean(0)
    return float(each.mean()), float(each.std()) / math.sqrt(n_sets)


@pytest.mark.parametrize(
    ("n_buckets", "rule", "n", "expected"),
    [
        (100, "equal_width", 1, 0.002),
        (100, "equal_width", 10, 0.008),
        (100, "equal_width", 40, 0.015),
        (200, "equal_width", 10, 0.003),
        (100, "equal_mass", 10, 0.021),
        (100, "equal_mass", 40, 0.027),
        (50, "equal_mass", 40, 0.064),
    ],
)
def test_the_projection_floor_of_the_exact_posterior(n_buckets, rule, n, expected):
    # Figures of an independent computation over data sets of its own, rounded to 0.001: the
    # difference of two means with a standard error like ours each.
    found, se = floor(n, n_buckets, rule)
    assert abs(found - expected) < 3 * math.sqrt(2) * se + 1e-3

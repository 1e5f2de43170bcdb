"""Masked networks: the mask chain by enumeration, reversibility, joint tests, exact posteriors."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from uq.inference import (
    MaskedBNN,
    MaskedMoves,
    MaskedState,
    WidthPrior,
    masked_bnn_runs,
    width_penalty,
)
from uq.inference.masked_bnn import move_masks, move_weights, transition
from uq.inference.masked_bnn_moves import (
    PROPOSALS,
    draw_set,
    draw_variance,
    flipped,
    hmc,
    leapfrog,
    log_mask_ratio,
    log_set_probability,
    proposal_log_weights,
)
from uq.nn.masked_bnn import MaskedMLP, MaskedModule, relu_mlp

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def all_masks(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=F64)


# -- prior on masks ------------------------------------------------------------------------------


def test_width_prior_by_enumeration():
    penalty = width_penalty(0.3, 50)
    assert penalty == pytest.approx((0.3 * math.log(50)) ** 5, rel=1e-14)
    assert width_penalty(0.1, 0.5) == 0  # a single row and less: no penalty, none negative
    prior = WidthPrior([3, 2], [penalty, 0.0], [1, 0])
    masks = all_masks(5)
    log_p = prior.log_prob(masks)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)
    weights = {p: math.exp(-penalty * p * p) for p in (1, 2, 3)}
    for mask, got in zip(masks, log_p, strict=True):
        p, q = int(mask[:3].sum()), int(mask[3:].sum())
        expected = 0.0
        if p:
            expected = weights[p] / sum(weights.values()) / math.comb(3, p) / 3 / math.comb(2, q)
        assert math.exp(got) == pytest.approx(expected, rel=1e-12, abs=1e-300)


def brute_force(q, members):
    total = 0.0
    for order in itertools.permutations(members):
        left, p = sum(q), 1.0
        for i in order:
            p *= q[i] / left
            left -= q[i]
        total += p
    return total


def test_set_probability_by_brute_force():
    q = [0.5, 0.3, 0.2]
    assert brute_force(q, (0, 1)) == pytest.approx(0.51428571428571, rel=1e-12)
    q = torch.rand(6, generator=generator(), dtype=F64).tolist()
    rows = torch.tensor(q, dtype=F64).log()[None]
    for k in (1, 2, 3):
        sets = list(itertools.combinations(range(6), k))
        total = 0.0
        for members in sets:
            rest = [i for i in range(6) if i not in members]
            chosen = torch.tensor([[*members, *rest][:3]])  # what stands behind k is not looked at
            got = float(log_set_probability(rows, chosen, torch.tensor([k])).exp())
            assert got == pytest.approx(brute_force(q, members), rel=1e-12)
            total += got
        assert total == pytest.approx(1, abs=1e-12)


def test_set_probability_where_one_node_has_all_the_mass():
    # 1 − Σ q would be 0 here; the two nodes left are drawn with 1/3 and 2/3.
    log_w = torch.tensor([[800.0, 0.0, math.log(2.0)]], dtype=F64)
    two = torch.tensor([2])
    a = log_set_probability(log_w, torch.tensor([[0, 1]]), two).exp()
    b = log_set_probability(log_w, torch.tensor([[0, 2]]), two).exp()
    torch.testing.assert_close(torch.cat([a, b]), torch.tensor([1, 2], dtype=F64) / 3)
    every = log_set_probability(log_w, torch.tensor([[2, 1, 0]]), torch.tensor([3]))
    assert float(every) == pytest.approx(0, abs=1e-12)


@pytest.mark.statistical
def test_sets_are_drawn_with_their_probability():
    n = 20_000
    log_w = torch.tensor([2.0, 1.0, 0.5, 0.0, -math.inf], dtype=F64).expand(n, 5)
    chosen = draw_set(log_w, 2, generator())
    assert int(chosen.max()) < 4
    sets = list(itertools.combinations(range(4), 2))
    seen = chosen.sort(1).values
    counts = [int((seen == torch.tensor(s)).all(1).sum()) for s in sets]
    law = log_set_probability(log_w[:6], torch.tensor(sets), torch.full((6,), 2)).exp()
    assert stats.chisquare(counts, (n * law).numpy()).pvalue > 1e-4


# -- the mask chain ------------------------------------------------------------------------------

SIZES = [4, 4]


@functools.cache
def flips(n_max):
    """All flips of 1 to n_max nodes on all 256 states: state, direction, size, nodes."""
    masks = list(itertools.product([0, 1], repeat=8))
    moves = [
        (i, birth, list(members))
        for i, mask in enumerate(masks)
        for birth in (False, True)
        for n in range(1, n_max + 1)
        for members in itertools.combinations([j for j in range(8) if mask[j] != birth], n)
    ]
    # Behind the set stand other nodes, which are not to be looked at.
    filled = [(m + [j for j in range(8) if j not in m])[:n_max] for _, _, m in moves]
    return (
        torch.tensor([m[0] for m in moves]),
        torch.tensor([m[1] for m in moves]),
        torch.tensor([len(m[2]) for m in moves]),
        torch.tensor(filled),
    )


def transition_matrix(kinds, n_max, prior, value, gradient, correct=True):
    """All 256 states: P(m → m′) = ½ 1/N_max Q(I) min(1, r), summed over what leads there."""
    masks = all_masks(8)
    code = 2 ** torch.arange(7, -1, -1)
    start, birth, count, chosen = flips(n_max)
    now = masks[start]
    new = flipped(now, chosen, count)
    end = (new.long() * code).sum(1)
    log_r = log_mask_ratio(
        prior,
        kinds,
        (now, new),
        (value[start], value[end]),
        (gradient[start], gradient[end]),
        chosen,
        count,
        birth,
    )
    death, born = (proposal_log_weights(k, gradient[start], now, birth) for k in kinds)
    log_w = torch.where(birth[:, None], born, death)
    log_q = log_set_probability(log_w, chosen, count)
    if not correct:  # the ratio without the proposals
        log_r = value[end] - value[start] + prior.log_prob(new) - prior.log_prob(now)
    rate = 0.5 / n_max * (log_q + log_r.clamp(max=0)).exp()
    matrix = torch.zeros(256, 256, dtype=F64).index_put((start, end), rate, accumulate=True)
    return matrix + torch.diag(1 - matrix.sum(1))


@pytest.fixture(scope="module")
def landscape():
    return 2 * normal(256, seed=1), 3 * normal(256, 8, seed=2)


@pytest.mark.parametrize("n_max", [1, 2, 3])
@pytest.mark.parametrize("kinds", list(itertools.product(PROPOSALS, repeat=2)))
def test_mask_chain_on_all_states(kinds, n_max, landscape):
    value, gradient = landscape
    for floors in ([0, 0], [2, 1]):
        prior = WidthPrior(SIZES, [0.05, 0.2], floors)
        target = (value + prior.log_prob(all_masks(8))).softmax(0)
        matrix = transition_matrix(kinds, n_max, prior, value, gradient)
        inside = target > 0  # states below the floor are never reached
        assert float(matrix[inside][:, ~inside].sum()) == 0
        flow = target[:, None] * matrix
        assert (flow - flow.T).abs().max() < 1e-12
        assert (target @ matrix - target).abs().max() < 1e-12
        assert matrix.min() >= -1e-15
        # No state is frozen, one at the floor neither: all can be reached from any.
        reach = torch.linalg.matrix_power(matrix[inside][:, inside], 64)
        assert reach.min() > 0


def test_the_enumeration_notices_a_missing_proposal_ratio(landscape):
    value, gradient = landscape
    prior = WidthPrior(SIZES, [0.05, 0.2], [0, 0])
    target = (value + prior.log_prob(all_masks(8))).softmax(0)
    matrix = transition_matrix(("small", "uniform"), 3, prior, value, gradient, correct=False)
    assert (target @ matrix - target).abs().max() > 1e-3


# -- networks ------------------------------------------------------------------------------------


def regression(chains=4, sizes=(2, 5, 4, 1), n=12, select=False, **options):
    g = generator(3)
    network = MaskedMLP(sizes, select)
    x = torch.randn(n, sizes[0], generator=g, dtype=F64)
    y = torch.randn(n, sizes[-1], generator=g, dtype=F64)
    prior = WidthPrior(network.groups, [0.05] * len(network.groups), [1] * len(network.groups))
    model = MaskedBNN(network, x, y, prior, **({"prior": "normal"} | options))
    state = model.draw_state(chains, g)
    return model, state, g


def by_autograd(model, state, classes=False):
    """Outputs, log likelihood and gradients of masked networks in the plainest words."""
    weights = state.weights.clone().requires_grad_()
    masks = state.masks.clone().requires_grad_()
    sizes, first = model.network.sizes, int(model.network.select_features)
    values, outputs = [], []
    for c in range(len(weights)):
        parts = list(masks[c].split(model.network.groups))
        h, start = model.x, 0
        if first:
            h = h * parts[0]
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            weight = weights[c, start : start + a * b].view(b, a)
            h = h @ weight.T + weights[c, start + a * b : start + a * b + b]
            start += a * b + b
            if i < len(sizes) - 2:
                h = h.relu() * parts[i + first]
        outputs.append(h)
        rows = (
            -nn.functional.cross_entropy(h, model.y, reduction="none")
            if classes
            else torch.distributions.Normal(h, state.variance[c].sqrt()).log_prob(model.y).sum(1)
        )
        values.append((rows if model.weight is None else rows * model.weight).sum())
    value = torch.stack(values)
    value.sum().backward()
    return torch.stack(outputs), value, weights.grad, masks.grad


@pytest.mark.parametrize("select", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_network_on_its_active_nodes_is_the_masked_network(select, weighted, everywhere):
    weight = torch.linspace(0.5, 2, 12, dtype=F64) if weighted else None
    model, state, _ = regression(select=select, weight=weight)
    outputs, value, by_weights, by_masks = by_autograd(model, state)
    pull = model.pull(state.variance)
    got = model.network.evaluate(state.weights, state.masks, model.x, pull, everywhere)
    torch.testing.assert_close(got.outputs, outputs.detach())
    torch.testing.assert_close(got.value, value.detach())
    if not everywhere:
        by_masks = by_masks * state.masks
    torch.testing.assert_close(got.mask_gradient, by_masks)
    part = model.network.restrict(state.masks)
    assert part.sizes[1:-1] != list(model.network.sizes[1:-1])
    own = part.weights(state.weights)
    value_again, gradient = part.gradient(own, model.x, pull)
    torch.testing.assert_close(value_again, value.detach())
    placed = part.restore(torch.zeros_like(state.weights), gradient)
    torch.testing.assert_close(placed, by_weights)  # others have gradient 0
    # And the active weights go back to where they came from, the others untouched.
    other = normal(*state.weights.shape, seed=9)
    back = part.restore(other, own)
    used = part.restore(torch.zeros_like(other), torch.ones_like(own)) > 0
    torch.testing.assert_close(back, torch.where(used, state.weights, other), rtol=0, atol=0)


def test_classes_and_compaction():
    g = generator(5)
    network = MaskedMLP((3, 6, 5, 3))
    x = torch.randn(10, 3, generator=g, dtype=F64)
    y = torch.randint(0, 2, (10,), generator=g)  # no row of the last class
    model = MaskedBNN(network, x, y, WidthPrior(network.groups, [0.1, 0.1], [0, 0]))
    state = model.draw_state(5, g)
    state.masks[0, :6] = 0  # an empty layer: the function is constant
    outputs, value, by_weights, _ = by_autograd(model, state, classes=True)
    got = network.evaluate(state.weights, state.masks, x, model.pull(None))
    torch.testing.assert_close(got.value, value.detach())
    torch.testing.assert_close(got.outputs, outputs.detach())
    assert got.outputs[0].std(0).max() == 0
    part = network.restrict(state.masks)
    gradient = part.gradient(part.weights(state.weights), x, model.pull(None))[1]
    torch.testing.assert_close(part.restore(torch.zeros_like(state.weights), gradient), by_weights)
    named = network.compacted(state.weights, state.masks)
    body = relu_mlp([3, named["0.weight"].shape[1], named["2.weight"].shape[1], 3]).double()
    assert named["0.weight"].shape[1] == state.masks[:, :6].sum(1).max()
    for c in range(5):
        body.load_state_dict({k: t[c] for k, t in named.items()})
        torch.testing.assert_close(body(x), outputs[c], rtol=1e-12, atol=1e-12)


def test_any_module_agrees_with_the_built_in_network():
    model, state, _ = regression()
    body = relu_mlp(model.network.sizes).double()
    module = MaskedModule(body)
    assert module.groups == model.network.groups
    assert module.n_weights == model.network.n_weights
    pull = model.pull(state.variance)
    ours = model.network.evaluate(state.weights, state.masks, model.x, pull, everywhere=True)
    theirs = module.evaluate(state.weights, state.masks, model.x, pull)
    torch.testing.assert_close(theirs.outputs, ours.outputs)
    torch.testing.assert_close(theirs.value, ours.value)
    # A relaxed mask acts before ReLU here, after it there: the same for nodes that are on.
    torch.testing.assert_close(theirs.mask_gradient * state.masks, ours.mask_gradient * state.masks)
    a, b = model.network.restrict(state.masks), module.restrict(state.masks)
    placed = a.restore(
        torch.zeros_like(state.weights), a.gradient(a.weights(state.weights), model.x, pull)[1]
    )
    other = b.gradient(b.weights(state.weights), model.x, pull)[1]
    used = a.restore(torch.zeros_like(placed), torch.ones_like(a.active)) > 0
    torch.testing.assert_close(other * used, placed)
    named = module.compacted(state.weights, state.masks)
    for c in range(4):
        body.load_state_dict({k: t[c] for k, t in named.items()})
        torch.testing.assert_close(body(model.x), ours.outputs[c])


def test_networks_are_embedded_with_their_function():
    bodies = [relu_mlp((3, 4, 2, 2)).double() for _ in range(3)]
    network = MaskedMLP((3, 6, 3, 2), select_features=True)
    weights, masks = network.embedded(bodies, normal(3, network.n_weights))
    assert masks.sum(1).tolist() == [3 + 4 + 2] * 3
    x = normal(7, 3)
    got = network.evaluate(weights, masks, x, lambda f: (f.sum((1, 2)), torch.ones_like(f)))
    for body, outputs in zip(bodies, got.outputs, strict=True):
        torch.testing.assert_close(body(x), outputs)


# -- weights and noise ---------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_trajectories_are_reversible_and_keep_energy_to_second_order(scaled):
    model, state, g = regression(chains=2, prior="cauchy")
    part = model.network.restrict(state.masks)
    pull = model.pull(state.variance)

    def density(w):
        value, gradient = part.gradient(w, model.x, pull)
        prior, slope = model.log_prior(w)
        return value + prior, gradient + slope

    start = part.weights(0.1 * state.weights)
    momentum = torch.randn(start.shape, generator=g, dtype=F64) * part.active
    value, gradient = density(start)
    errors = []
    for n in (100, 200):
        step = torch.full((2,), 0.02 / n, dtype=F64)
        if scaled:
            step = step[:, None] * (1 + torch.arange(start.shape[1], dtype=F64) % 3) / 4
        end, kick, final, slope = leapfrog(start, momentum, gradient, density, step, n)
        back, other, _, _ = leapfrog(end, -kick, slope, density, step, n)
        torch.testing.assert_close(back, start, rtol=0, atol=1e-10)
        torch.testing.assert_close(other, -momentum, rtol=0, atol=1e-10)
        errors.append(final - value + 0.5 * (momentum.square() - kick.square()).sum(1))
        assert (end[part.active == 0] == 0).all()
    # Where a node switches, the error is of first order; these trajectories pass by none.
    if not scaled:
        ratio = errors[0] / errors[1]
        assert ((ratio > 3.5) & (ratio < 4.5)).all()


def test_divergent_trajectories_are_rejected_and_said():
    start = torch.ones(3, 2, dtype=F64)

    def density(w):
        return -0.5 * w.square().sum(1), -w

    step = torch.tensor([0.1, 50.0, 1e200], dtype=F64)
    end, acceptance, diverged = hmc(start, density, step, 20, generator())
    assert diverged.tolist() == [False, True, True]
    assert acceptance[0] > 0.9
    assert acceptance[1:].tolist() == [0, 0]
    assert torch.equal(end[1:], start[1:])


@pytest.mark.statistical
def test_hmc_leaves_a_normal_law_alone():
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    n = 4000
    g = generator()
    w = torch.randn(n, 3, generator=g, dtype=F64) * scale

    def density(w):
        return -0.5 * (w / scale).square().sum(1), -w / scale.square()

    for _ in range(5):  # steps so long that a third is rejected
        w, acceptance, _ = hmc(w, density, torch.full((n,), 0.9, dtype=F64), 3, g)
    assert 0.2 < acceptance.mean() < 0.9
    for j in range(3):
        assert stats.kstest((w[:, j] / scale[j]).numpy(), "norm").pvalue > 1e-4


@pytest.mark.statistical
def test_noise_is_drawn_from_its_conditional():
    y, outputs = normal(9, 2), normal(9, 2, seed=1)
    weight = torch.tensor([1.0, 2.0, 0.5] * 3, dtype=F64)
    n = 4000
    draws = draw_variance(outputs.expand(n, 9, 2), y, weight, (1.5, 0.3), generator())
    errors = (weight[:, None] * (y - outputs).square()).sum(0)
    for k in range(2):
        law = stats.invgamma(1.5 + float(weight.sum()) / 2, scale=0.3 + float(errors[k]) / 2)
        assert stats.kstest(draws[:, k].numpy(), law.cdf).pvalue > 1e-4


@pytest.mark.statistical
@pytest.mark.parametrize("prior", ["normal", "cauchy"])
def test_weights_that_do_not_matter_follow_the_prior(prior):
    model, _, g = regression(chains=600, prior=prior, prior_scale=0.7)
    state = model.draw_state(600, g)
    step = torch.full((600,), 0.01, dtype=F64)
    off = state.masks[:, 0] == 0
    moved, _, _ = move_weights(model, state, step, MaskedMoves(n_leapfrog=2), g)
    law = stats.norm(0, 0.7) if prior == "normal" else stats.cauchy(0, 0.7)
    assert off.sum() > 100
    for j in (0, 1, 10):  # both weights of the first node, and its bias
        assert stats.kstest(moved.weights[off, j].numpy(), law.cdf).pvalue > 1e-4
        assert (moved.weights[off, j] != state.weights[off, j]).all()


# -- the whole -----------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("kinds", [("small", "uniform"), ("informed", "informed")])
def test_mask_posterior_of_fixed_weights_by_enumeration(kinds):
    chains, nodes = 4000, 6
    g = generator(11)
    network = MaskedMLP((1, nodes, 1))
    x = torch.linspace(-2, 2, 10, dtype=F64)[:, None]
    model = MaskedBNN(network, x, x.abs(), WidthPrior([nodes], [0.1], [1]), prior="normal")
    theta = 0.7 * torch.randn(1, network.n_weights, generator=g, dtype=F64)
    variance = torch.full((1, 1), 8.0, dtype=F64)
    masks = all_masks(nodes)
    every = network.evaluate(
        theta.expand(64, -1), masks, x, model.pull(variance.expand(64, 1)), False
    )
    law = (every.value + model.width_prior.log_prob(masks)).softmax(0)
    assert float(law.max()) < 0.5  # a posterior with something to find
    # Deaths of "small" nodes go the slow way: they start in the law, and have to stay in it.
    start = torch.ones(chains, nodes, dtype=F64)
    if kinds[0] == "small":
        start = masks[torch.multinomial(law, chains, replacement=True, generator=g)]
    state = MaskedState(theta.expand(chains, -1), start, variance.expand(chains, 1))
    moves = MaskedMoves(death=kinds[0], birth=kinds[1])
    pull = model.pull(state.variance)
    now = network.evaluate(state.weights, state.masks, x, pull, kinds[1] != "uniform")
    moved = 0.0
    for _ in range(60):
        state, now, rate = move_masks(model, state, now, moves, g)
        moved += float(rate.mean())
    assert moved > 60 * 0.1
    fresh = network.evaluate(state.weights, state.masks, x, pull, kinds[1] != "uniform")
    torch.testing.assert_close(now.value, fresh.value)
    torch.testing.assert_close(now.mask_gradient, fresh.mask_gradient)
    code = (state.masks.long() * 2 ** torch.arange(nodes - 1, -1, -1)).sum(1)
    counts = torch.bincount(code, minlength=64).double()
    # States that are expected fewer than 5 times are one.
    rare = law * chains < 5
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([law[~rare], law[rare].sum()[None]]) * chains
    assert stats.chisquare(seen.numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.statistical
@pytest.mark.parametrize("select", [False, True])
def test_joint_law_survives_transitions_with_data_redrawn(select):
    """Geweke's joint test on independent chains: what starts in the prior must stay in it."""
    chains = 3000
    g = generator(21)
    network = MaskedMLP((2, 3, 3, 1), select)
    x = torch.randn(5, 2, generator=g, dtype=F64)
    floors = [0, 1, 1] if select else [1, 1]
    prior = WidthPrior(network.groups, [0.15] * len(floors), floors)
    blank = torch.zeros(chains, 5, 1, dtype=F64)
    model = MaskedBNN(network, x, blank, prior, prior="normal", noise_prior=(3.0, 2.0))
    state = model.draw_state(chains, g)
    moves = MaskedMoves(n_leapfrog=4, n_mask_moves=3, death="small", birth="uniform")
    step = torch.full((chains,), 0.15, dtype=F64)
    # Weights of scales of their own move by other steps, to the same law.
    spread = torch.rand(1, network.n_weights, generator=g, dtype=F64) + 0.5
    scale = spread.expand(chains, -1) if select else None
    rates = []
    for _ in range(15):
        pull = model.pull(state.variance)
        outputs = network.evaluate(state.weights, state.masks, x, pull).outputs
        noise = torch.randn(outputs.shape, generator=g, dtype=F64)
        y = outputs + noise * state.variance.sqrt()[:, None]
        model = MaskedBNN(network, x, y, prior, prior="normal", noise_prior=(3.0, 2.0))
        state, moved = transition(model, state, step, moves, g, scale)
        rates.append((float(moved.acceptance.mean()), float(moved.mask_acceptance.mean())))
    hmc_rate, mask_rate = np.mean(rates, 0)
    assert 0.3 < hmc_rate < 0.98  # both kinds of move are at work, and reject
    assert 0.1 < mask_rate < 0.98
    for j in (0, 3, network.n_weights - 1):
        assert stats.kstest(state.weights[:, j].numpy(), "norm").pvalue > 1e-4
    law = stats.invgamma(3, scale=2)
    assert stats.kstest(state.variance[:, 0].numpy(), law.cdf).pvalue > 1e-4
    # The masks' law is known: by widths, and uniform given them.
    widths = prior.widths(state.masks)
    for group, size in enumerate(network.groups):
        p = np.arange(floors[group], size + 1)
        expected = np.exp(-0.15 * p**2)
        counts = np.bincount(widths[:, group].numpy(), minlength=size + 1)[floors[group] :]
        assert stats.chisquare(counts, chains * expected / expected.sum()).pvalue > 1e-4
    one = state.masks[:, -3:][widths[:, -1] == 1]
    assert stats.chisquare(one.sum(0).numpy()).pvalue > 1e-4
    # And what weights, masks and noise have to do with one another: nothing, in the prior.
    active = state.masks[:, -3] > 0
    both = stats.ks_2samp(state.weights[active, 0].numpy(), state.weights[~active, 0].numpy())
    assert both.pvalue > 1e-4


@pytest.mark.statistical
def test_conjugate_linear_regression_with_weights():
    """Without hidden layers the posterior given σ is Normal; with its prior, a mixture."""
    chains = 600
    g = generator(31)
    x = torch.randn(15, 2, generator=g, dtype=F64)
    y = x @ torch.tensor([[1.0], [-0.5]], dtype=F64) + 0.3 * torch.randn(
        15, 1, generator=g, dtype=F64
    )
    weight = torch.linspace(0.5, 1.5, 15, dtype=F64)
    network = MaskedMLP((2, 1))
    model = MaskedBNN(network, x, y, WidthPrior([], [], []), weight, "normal", 0.8, (2.0, 0.3))
    state = model.draw_state(chains, g)
    moves = MaskedMoves(n_leapfrog=8)
    step = torch.full((chains,), 0.03, dtype=F64)
    for _ in range(100):
        state, moved = transition(model, state, step, moves, g)
    assert moved.acceptance.mean() > 0.5
    # Marginal of σ² by quadrature over log σ², of the weights by the same mixture.
    design = torch.cat([x, torch.ones(15, 1, dtype=F64)], 1)
    log_v = torch.linspace(-7, 3, 2001, dtype=F64)
    log_p, means = [], []
    for v in log_v.exp():
        precision = design.T @ (weight[:, None] * design) / v + torch.eye(3, dtype=F64) / 0.64
        b = design.T @ (weight[:, None] * y)[:, 0] / v
        mean = torch.linalg.solve(precision, b)
        rest = (weight * y[:, 0].square()).sum() / v - b @ mean
        log_p.append(
            -0.5 * weight.sum() * v.log()
            - 0.5 * torch.logdet(precision)
            - 0.5 * rest
            - 2.0 * v.log()  # the prior's −(a + 1) log v, and +log v of the change to log v
            - 0.3 / v
        )
        means.append(mean)
    p = torch.stack(log_p).softmax(0)
    cdf = p.cumsum(0).numpy()
    draws = state.variance[:, 0].log().numpy()
    assert stats.kstest(draws, lambda t: np.interp(t, log_v.numpy(), cdf)).pvalue > 1e-4
    mean = (p[:, None] * torch.stack(means)).sum(0)
    error = state.weights.std(0) / chains**0.5
    assert ((state.weights.mean(0) - mean).abs() < 4.5 * error).all()


@pytest.mark.statistical
def test_spike_and_slab_by_enumeration_of_models():
    """Linear regression with masked features: 2⁴ models, weights integrated out."""
    chains, d = 1500, 4
    g = generator(41)
    x = torch.randn(20, d, generator=g, dtype=F64)
    y = 0.6 * x[:, :1] - 0.35 * x[:, 1:2] + 0.7 * torch.randn(20, 1, generator=g, dtype=F64)
    network = MaskedMLP((d, 1), select_features=True)
    prior = WidthPrior([d], [0.0], [0])
    # σ² is held at 0.5 by a prior that is as good as a point.
    model = MaskedBNN(network, x, y, prior, None, "normal", 1.0, (1e9, 0.5e9))
    state = model.draw_state(chains, g)
    step = torch.full((chains,), 0.08, dtype=F64)
    moves = MaskedMoves(n_leapfrog=5, n_mask_moves=4)
    for _ in range(80):
        state, _ = transition(model, state, step, moves, g)
    log_p, masks = [], all_masks(d)
    for mask in masks:
        on = torch.cat([x[:, mask > 0], torch.ones(20, 1, dtype=F64)], 1)
        covariance = on @ on.T + 0.5 * torch.eye(20, dtype=F64)
        marginal = torch.distributions.MultivariateNormal(torch.zeros(20, dtype=F64), covariance)
        log_p.append(marginal.log_prob(y[:, 0]) + prior.log_prob(mask[None])[0])
    law = torch.stack(log_p).softmax(0)
    inclusion = law @ masks
    error = (inclusion * (1 - inclusion) / chains).sqrt()
    assert ((state.masks.mean(0) - inclusion).abs() < 4.5 * error).all()
    assert 0.02 < inclusion.min() < inclusion.max() < 0.999


def test_scales_are_those_of_a_normal_law():
    """Linear regression: E g² over the posterior is the precision of each weight."""
    g = generator(51)
    x = torch.randn(30, 2, generator=g, dtype=F64) * torch.tensor([1.0, 10.0], dtype=F64)
    y = x @ torch.tensor([[1.0], [0.2]], dtype=F64)
    network = MaskedMLP((2, 1))
    model = MaskedBNN(network, x, y, WidthPrior([], [], []), prior="normal")
    variance = torch.full((2000, 1), 0.7, dtype=F64)
    design = torch.cat([x, torch.ones(30, 1, dtype=F64)], 1)
    precision = design.T @ design / 0.7 + torch.eye(3, dtype=F64)
    mean = torch.linalg.solve(precision, design.T @ y[:, 0] / 0.7)
    law = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    torch.manual_seed(0)
    scales = masked_bnn_runs.Scales(torch.zeros(2000, 3, dtype=F64))
    for _ in range(20):
        draws = law.sample((2000,))
        scales.update(model, MaskedState(draws, draws[:, :0], variance))
    own = scales.squares.mean(0) / 20
    # 40,000 squares of a Normal: relative error √(2 / 40,000), five times.
    torch.testing.assert_close(own, precision.diagonal(), rtol=5 * (2 / 40_000) ** 0.5, atol=0)
    learned = scales.learned()
    torch.testing.assert_close(learned.median(1).values, torch.ones(2000, dtype=F64))
    assert (learned[:, 1] < learned[:, 0]).all()

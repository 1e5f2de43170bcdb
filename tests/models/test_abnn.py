"""ABNN estimators: what a user gives, what they refuse, and that the method does what it claims."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits, load_wine
from torch import nn

import uq
from uq import ABNNClassifier, ABNNRegressor
from uq.inference import to_abnn
from uq.nn import bayesian_norm
from uq.nn.abnn import bayesian_layers


def wine():
    X, y = load_wine(return_X_y=True)
    return ((X - X.mean(0)) / X.std(0)).astype(np.float32), y


def network(*norms, d_out=3):
    torch.manual_seed(0)
    layers = []
    for norm in norms:
        layers += [nn.Linear(8 if layers else 13, 8), norm, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, d_out))


def quick(**changes):
    return ABNNClassifier(**{"random_state": 0, "max_epochs": 2, "n_samples": 3} | changes)


# -- modules ---------------------------------------------------------------------------------------


def test_a_trained_network_is_not_touched_whatever_its_mode():
    X, y = wine()
    net = network(nn.BatchNorm1d(8), nn.LayerNorm(8, elementwise_affine=False)).train()
    net[4].register_forward_hook(lambda m, i, o: None)
    before, predict = copy.deepcopy(net.state_dict()), []
    for mode in (True, False):
        model = quick(module=net.train(mode), batch_statistics="updated").fit(X, y)
        assert net.training == mode
        assert all(torch.equal(before[k], t) for k, t in net.state_dict().items())
        predict.append(model.predict_proba(X))
        np.testing.assert_array_equal(model.predict_proba(X), predict[-1])  # no statistics move
    np.testing.assert_array_equal(*predict)
    assert not torch.equal(
        model.posterior_.members["body.1.running_mean"][0], before["1.running_mean"]
    )


def test_frozen_statistics_stay():
    X, y = wine()
    net = network(nn.BatchNorm1d(8))
    for choice, moves in (("frozen", False), ("updated", True), ("auto", False)):  # 178 rows
        model = quick(module=net, batch_statistics=choice).fit(X, y)
        mean = model.posterior_.members["body.1.running_mean"]
        assert bool((mean[0] != mean[-1]).any()) == moves


def test_half_precision_networks():
    X, y = wine()
    for dtype in (torch.float16, torch.bfloat16):
        net = network(nn.LayerNorm(8)).to(dtype)
        model = quick(module=net).fit(X, y)  # trained and used in float32
        assert model.posterior_.dtype == torch.float32
        assert next(net.parameters()).dtype == dtype
        made = to_abnn(net, alpha=0.1)
        assert made(torch.tensor(X, dtype=dtype)).dtype == dtype
        with pytest.raises(ValueError, match=r"lost in the rounding.*module\.float\(\)"):
            to_abnn(net, alpha=1e-4)


def test_root_shared_and_nested_layers():
    assert isinstance(to_abnn(nn.BatchNorm2d(3)), nn.BatchNorm2d)
    norm = nn.LayerNorm(4)
    shared = to_abnn(nn.Sequential(norm, nn.Linear(4, 4), norm))
    assert shared[0] is shared[2]
    transformer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert sorted(bayesian_layers(to_abnn(transformer))) == ["norm1", "norm2"]
    x = torch.randn(2, 5, 8)
    stack = nn.TransformerEncoder(transformer, 2).eval()
    padded = torch.zeros(2, 5, dtype=torch.bool)
    padded[:, 4] = True
    made, plain = to_abnn(stack, alpha=0.2), to_abnn(stack, alpha=0.0)
    for mask in (None, padded):
        kept = slice(None) if mask is None else slice(4)
        expected = stack(x, src_key_padding_mask=mask).detach()  # with gradients: the plain path
        with torch.no_grad():  # torch's fast path, which must not pass the noise by
            first, second = (made(x, src_key_padding_mask=mask) for _ in range(2))
            same = plain(x, src_key_padding_mask=mask)
        assert not torch.equal(first, second)
        torch.testing.assert_close(same[:, kept], expected[:, kept], rtol=1e-4, atol=1e-5)


def test_all_weights_may_move_and_are_saved(tmp_path):
    X, y = wine()
    net = network(nn.BatchNorm1d(8))
    model = quick(module=net, train_scope="all", noise_shape="element").fit(X, y)
    weights = model.posterior_.members["body.0.weight"]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[-1], net[0].weight)  # the original
    model.save(tmp_path / "m.uq")
    again = uq.load(tmp_path / "m.uq", module=net)
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))


def test_members_and_originals_are_counted():
    X, y = wine()
    net = network(nn.LayerNorm(8))
    for M, original in ((2, True), (2, False), (0, True)):
        model = quick(module=net, n_members=M, include_original=original).fit(X, y)
        T = M + original
        assert model.n_members_ == T
        assert model.class_weights_.shape == (M, 3)
        assert model.predict_distribution(X).n_draws == 3 * T
        parts = model.epistemic_parts(X)
        total = model.predict_distribution(X).epistemic.numpy()
        np.testing.assert_allclose(sum(parts.values()), total, atol=1e-6)
        if T == 1:
            assert parts["between_members"].max() < 1e-12


@pytest.mark.parametrize("loss_norm", ["weighted_mean", "batch"])
@pytest.mark.parametrize("random_prior", [0, 7])
def test_random_priors_and_regression_bins(loss_norm, random_prior):
    X, y = load_diabetes(return_X_y=True)
    model = ABNNRegressor(
        base_max_epochs=5, random_prior=random_prior, loss_norm=loss_norm, random_state=0
    ).fit(X, np.stack([y, -y], 1))
    assert (np.sort(model.class_weights_, 1)[:, 3 if random_prior == 0 else 0] == 1).all()
    assert ((model.class_weights_ == random_prior).sum(1) == 3).all()
    assert np.isfinite(model.log_score(X, np.stack([y, -y], 1)))


@pytest.mark.parametrize("spread", [1e-2, 1.0])
def test_a_step_is_that_of_squared_error_whatever_the_noise(spread):
    """A network that fits closely has large gradients, which must not make its step larger."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)).double()
    X = torch.randn(60, 2, dtype=torch.float64)
    with torch.no_grad():
        y = net(X)[:, 0] + spread * torch.randn(60, dtype=torch.float64)
    model = ABNNRegressor(
        module=net,
        alpha=0.0,
        n_members=1,
        include_original=False,
        max_epochs=1,
        batch_size=None,
        milestones=(),
        weight_decay=0.0,
        precision="64-true",
    ).fit(X.numpy(), y.numpy())
    residual = (net(X)[:, 0] - y) / y.std(correction=0)
    (0.5 * residual.square().mean()).backward()
    tuned = model.posterior_.members
    moved = [v[0] for k, v in tuned.items() if v[0].shape == (8,)]
    # Nesterov's first step is (1 + momentum) lr times the gradient.
    for after, before in zip(moved, [net[1].weight, net[1].bias], strict=True):
        torch.testing.assert_close(after, before - 1.9 * 5e-3 * before.grad)


def test_epistemic_grows_with_alpha():
    X, y = wine()
    net = network(nn.LayerNorm(8), nn.BatchNorm1d(8))
    mi = [
        quick(module=net, n_members=0, alpha=a, n_samples=20).fit(X, y).predict_distribution(X)
        for a in (0.0, 0.01, 0.1, 0.3)
    ]
    values = [float(d.epistemic.mean()) for d in mi]
    assert values[0] < 1e-12
    assert values[1] < values[2] < values[3]


# -- bad input -------------------------------------------------------------------------------------


def test_no_normalisation_layer_says_what_to_do():
    X, y = wine()
    net = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 3))
    for call in (lambda: to_abnn(net), lambda: quick(module=net).fit(X, y)):
        with pytest.raises(uq.UQError, match=r"no normalisation layer.*insert_norms"):
            call()
    with_norms = uq.inference.insert_norms(net, torch.tensor(X))
    assert quick(module=with_norms).fit(X, y).n_members_ == 4
    with pytest.raises(uq.UQError, match="hidden must not be empty"):
        quick(hidden=()).fit(X, y)


def test_layers_that_cannot_be_used():
    with pytest.raises(uq.UQError, match="other rows"):
        to_abnn(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(uq.UQError, match="lazy"):
        bayesian_norm(nn.LazyBatchNorm1d())
    with pytest.raises(uq.UQError, match="lazy"):
        to_abnn(nn.Sequential(nn.LazyLinear(3), nn.LayerNorm(3)))
    with pytest.raises(uq.UQError, match="not a normalisation layer"):
        bayesian_norm(nn.Linear(2, 2))
    parametrised = nn.utils.parametrizations.weight_norm(nn.LayerNorm((3, 3)))
    with pytest.raises(uq.UQError, match="parametri"):
        to_abnn(nn.Sequential(parametrised))
    with pytest.raises(uq.UQError, match="alpha"):
        to_abnn(nn.LayerNorm(3), alpha=-1.0)
    with pytest.raises(uq.UQError, match="noise_shape"):
        to_abnn(nn.LayerNorm(3), noise_shape="row")
    with pytest.raises(uq.UQError, match="train_scope"):
        to_abnn(nn.LayerNorm(3), train_scope="some")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -0.1),
        ("alpha", "auto"),
        ("noise_shape", "pixel"),
        ("n_members", -1),
        ("n_samples", 0),
        ("random_prior", -1),
        ("random_prior", float("inf")),
        ("train_scope", "last"),
        ("max_epochs", None),
        ("milestones", (4, 1)),
        ("milestones", 3),
        ("weight_decay", -1),
        ("loss_norm", "sum"),
        ("batch_statistics", "on"),
        ("base_max_epochs", 0),
        ("base_lr", 0),
        ("include_original", "yes"),
    ],
)
def test_arguments_are_named(name, value):
    with pytest.raises(uq.UQError, match=name):
        quick(**{name: value}).fit(*wine())


def test_nothing_left_to_predict_with():
    with pytest.raises(uq.UQError, match="n_members=0"):
        quick(n_members=0, include_original=False).fit(*wine())


def test_noise_of_rows_makes_no_functions():
    X, y = wine()
    model = quick(module=network(nn.LayerNorm(8)), noise_shape="sample").fit(X, y)
    with pytest.raises(uq.UQError, match="channel"):
        model.sample_functions(X, 2)


@pytest.mark.parametrize("noise_shape", ["channel", "sample", "element"])
def test_prediction_leaves_the_global_generator_alone(noise_shape):
    X, y = wine()
    model = quick(module=network(nn.LayerNorm(8)), noise_shape=noise_shape).fit(X, y)
    before = torch.get_rng_state()
    model.predict_proba(X)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("noise_shape", ["channel", "element"])
def test_layers_that_share_a_scale(noise_shape):
    X, y = wine()
    net = network(nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8))
    net[7].weight = net[1].weight
    model = quick(module=net, noise_shape=noise_shape, alpha=0.1).fit(X, y)
    assert (model.predict_distribution(X).epistemic > 0).all()
    plain = quick(module=net, noise_shape=noise_shape, alpha=0.0, n_members=0).fit(X, y)
    expected = net(torch.tensor(X)).softmax(-1).double()
    torch.testing.assert_close(torch.tensor(plain.predict_proba(X)), expected, rtol=0, atol=1e-6)


def test_interrupt_in_fine_tuning_keeps_the_members_before():
    X, y = wine()
    seen = []

    def interrupt(state):
        seen.append(state.epoch)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted"):
        model = quick(module=network(nn.LayerNorm(8)), callbacks=[interrupt]).fit(X, y)
    assert model.stop_reason_ == "interrupted"
    assert model.n_members_ == 3  # one whole, one of a single epoch, the original
    assert model.class_weights_.shape == (2, 3)


# -- the stand-in of the paper's claims: digits 0 to 7, with 8 and 9 to find ---------------------


@pytest.mark.slow
@pytest.mark.statistical
def test_digits_stand_in():
    from benchmarks.abnn import digits_rows

    rows = [r for seed in range(5) for r in digits_rows(seed)]

    def mean(model, score):
        return np.mean([r[score] for r in rows if r["model"] == model])

    for name in ("element", "channel"):
        for state in ("tuned", "untuned"):
            for alpha in (0.01, 0.1):
                key = f"{state}, {name} {alpha}"
                assert abs(mean(key, "accuracy") - mean("network", "accuracy")) <= 0.01
                gap = mean(key, "auroc_entropy") - mean("network", "auroc_entropy")
                assert abs(gap) <= 0.01
                assert mean(key, "mi_out") >= 4 * mean(key, "mi_in")
                assert mean(key, "auroc_mi") >= 0.93
            mi = [mean(f"{state}, {name} {a}", "mi_out") for a in (0.01, 0.1, 0.3)]
            assert mi == sorted(mi)
    assert mean("untuned, channel 1.0", "accuracy") < 0.7


@pytest.mark.slow
def test_default_network_stays_accurate():
    """Noise of 3 % on layer normalisation costs nothing; it does not tell noise images, either."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    train, test = order[:1000], order[1000:]
    model = ABNNClassifier(random_state=0, base_max_epochs=60).fit(X[train], y[train])
    assert (model.predict_distribution(X[test]).epistemic > 0).all()
    assert model.score(X[test], y[test]) > 0.95

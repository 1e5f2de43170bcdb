"""Prior-data fitted network: what holds for any weights, and conjugate posteriors once trained."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
import struct

import pytest
import torch
from safetensors.torch import save_file

from uq.distributions import BarDistribution
from uq.errors import LoadError, NonFiniteLossError, ParameterError
from uq.inference.pfn import pretrain_pfn
from uq.inference.pfn_losses import query_loss
from uq.nn import PFN, PFNConfig, load_pfn, preprocess, save_pfn
from uq.nn.pfn_tables import PFNScaling

B, N, M, D = 3, 12, 5, 4


def network(task="regression", *, context_tokens=2, scaled=True, seed=0, **sizes):
    """A float64 network whose layers all do something: a new one has zeros in each block."""
    torch.manual_seed(seed)
    given = {"d_model": 16, "n_layers": 3, "n_heads": 2, "d_ff": 32} | sizes
    n_outputs = 6 if task == "classification" else 20
    config = PFNConfig(task, 6, n_outputs, context_tokens=context_tokens, scaled=scaled, **given)
    borders = torch.linspace(-3, 3, 21) if task == "regression" else None
    model = PFN(config, borders).double()
    for name, p in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(p, 0, 0.4)
    return model.requires_grad_(False).eval()


@pytest.fixture(params=["regression", "classification"])
def model(request):
    return network(request.param)


def tables(model, n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(B, n + M, D, generator=g, dtype=torch.float64)
    X[0, 0:1, 1] = math.nan
    if model.config.task == "classification":
        y = torch.randint(4, (B, n + M), generator=g)
        if n >= 4:
            y[:, :4] = torch.arange(4)  # each class is there
    else:
        y = torch.randn(B, n + M, generator=g, dtype=torch.float64)
    return X[:, :n], y[:, :n], X[:, n:]


def predict(model, X, y, Xq):
    Xc, yc, Xq, _ = preprocess(X, y, Xq, model.config)
    return model(Xc, yc, Xq)


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# -- symmetries, for any weights -------------------------------------------------------------------


def test_the_order_of_the_context_does_not_matter(model):
    X, y, Xq = tables(model)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    close(predict(model, X[:, order], y[:, order], Xq), predict(model, X, y, Xq))


@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize("n", [0, 1, 2, 12])
def test_queries_do_not_see_one_another(task, n):
    model = network(task, scaled=n > 1)  # one row has no spread to scale by
    X, y, Xq = tables(model, n)
    together = predict(model, X, y, Xq)
    order = torch.tensor([3, 0, 4, 1, 2])
    close(predict(model, X, y, Xq[:, order]), together[:, order])
    alone = torch.cat([predict(model, X, y, Xq[:, j : j + 1]) for j in range(M)], 1)
    close(alone, together)
    changed = Xq.clone()
    changed[:, 2] = 1e3
    others = [0, 1, 3, 4]
    again = predict(model, X, y, changed)
    assert torch.equal(again[:, others], together[:, others])
    assert not torch.equal(again[:, 2], together[:, 2])


def test_targets_of_queries_are_not_even_arguments(model):
    X, y, Xq = tables(model)
    Z = torch.cat([X, Xq], 1)
    queries = torch.zeros(B, M, dtype=y.dtype)
    losses = []
    for value in (0, 1):
        with torch.no_grad():
            losses.append(query_loss(model, Z, torch.cat([y, queries + value], 1), N)[0])
    # Only the target of the density itself changed: the distributions agree at both values.
    logits = predict(model, X, y, Xq)
    if model.config.task == "regression":
        bars = BarDistribution(logits, model.borders)
        scaling = PFNScaling.fit(X, y, model.config)
        for value, loss in zip((0.0, 1.0), losses, strict=True):
            z = scaling.targets(queries + value)
            close(loss, -bars.log_prob(z), atol=1e-6)  # borders are stored in float32
    else:
        log_p = torch.log_softmax(logits[..., :4], -1)
        for value, loss in zip((0, 1), losses, strict=True):
            close(loss, -log_p[..., value])


def test_a_context_can_be_cached(model):
    for n in (0, 1, N):
        X, y, Xq = tables(model, n)
        Xc, yc, Xq, _ = preprocess(X, y, Xq, model.config)
        cache = model.encode(Xc, yc)
        close(model.query(cache, Xq), model(Xc, yc, Xq))
        assert cache.n_context == n
        assert cache.keys[0].shape == (B, 2, 2 + n, 8)


def test_only_a_learned_context_row_lets_a_network_count():
    def change(tokens):
        # The sharpening that depends on n is a second way to count: off here.
        model = network(context_tokens=tokens, scaled=False)
        for block in model.blocks:
            block.sharpening.zero_()
        X, y, Xq = tables(model)
        X, y = X.nan_to_num(0.5), y
        twice = predict(model, X.repeat(1, 2, 1), y.repeat(1, 2), Xq)
        return float((twice - predict(model, X, y, Xq)).abs().max())

    assert change(0) < 1e-12
    assert change(1) > 1e-3


def test_new_blocks_do_nothing():
    model = PFN(PFNConfig("classification", 6, 4, 16, 5, 2, 32)).eval()
    X, y, Xq = (t.float() if t.is_floating_point() else t for t in tables(model))
    deep = predict(model, X, y, Xq)
    shallow = PFN(PFNConfig("classification", 6, 4, 16, 1, 2, 32)).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.")}
    shallow.load_state_dict(state, strict=False)
    close(predict(shallow, X, y, Xq), deep, atol=1e-5)


# -- preparing tables ------------------------------------------------------------------------------


def test_statistics_come_from_the_context_alone(model):
    X, y, Xq = tables(model)
    Xc, yc, first, _ = preprocess(X, y, Xq, model.config)
    again = preprocess(X, y, 1e3 * Xq, model.config)
    assert torch.equal(again[0], Xc)
    assert torch.equal(again[1], yc)
    known = X[1]
    z = Xc[1, :, :D] / math.sqrt(6 / D)
    close(z.mean(0), torch.zeros(D, dtype=torch.float64))
    close(z.square().mean(0), torch.ones(D, dtype=torch.float64))
    assert known.shape == (N, D)
    assert not Xc[..., D:6].any()
    assert first.shape == (B, M, 12)


def test_predictions_do_not_depend_on_units_order_or_signs_of_columns():
    model = network()
    X, y, Xq = tables(model)
    base = predict(model, X, y, Xq)
    factor = torch.tensor([3.0, -0.01, 1e4, -1.0], dtype=torch.float64)
    shift = torch.tensor([10.0, 0.0, -5.0, 2.0], dtype=torch.float64)
    order = [2, 0, 3, 1]
    there = predict(model, (X * factor + shift)[..., order], y, (Xq * factor + shift)[..., order])
    close(there, base)
    close(predict(model, X, 100 * y - 3, Xq), base)


def test_constant_and_empty_columns_are_dropped_and_missing_values_marked(model):
    X, y, Xq = tables(model)
    X[..., 3], Xq[..., 3] = 7.0, 1e6
    X[..., 2], Xq[0, :, 2] = math.nan, 1.0
    Xc, _, Xq2, scaling = preprocess(X, y, Xq, model.config)
    assert scaling.used.sum(-1).tolist() == [[2]] * B
    assert Xc.isfinite().all()
    assert Xq2.isfinite().all()
    assert not Xc[..., 2:6].any()  # two columns are left, at the first positions
    assert not Xq2[..., 2:6].any()
    marks = Xc[..., 6:]
    assert float(marks.sum()) == 1.0  # the one missing value of tables()
    row, column = 0, int((scaling.order[0, 0] == 1).nonzero())
    assert float(marks[row, 0, column]) == 1.0
    assert float(Xc[row, 0, column]) == 0.0


def test_extreme_values_grow_with_their_logarithm():
    config = PFNConfig("classification", 1, 2)
    X = torch.linspace(-1, 1, 21, dtype=torch.float64)[None, :, None]
    y = torch.arange(21)[None] % 2
    Xq = torch.tensor([0.5, 2.4, 2.45, 1e6, -1e6], dtype=torch.float64)[None, :, None]
    z = preprocess(X, y, Xq, config)[2][0, :, 0]
    raw = Xq[0, :, 0] / X.std(correction=0)
    close(z[0], raw[0])
    assert 4 < float(z[2]) < float(raw[2])
    close(z[3:], torch.tensor([1.0, -1.0]).double() * (4 + (raw[3] - 3).log()))


def test_a_constant_target_has_scale_one():
    config = PFNConfig("regression", 2, 4)
    X = torch.randn(1, 6, 2)
    y = torch.full((1, 6), 1e4)
    scaling = PFNScaling.fit(X, y, config)
    assert float(scaling.y_scale) == 1.0
    assert not scaling.targets(y).any()


def test_bad_tables():
    config = PFNConfig("regression", 2, 4)
    with pytest.raises(ParameterError, match="3 features, but the network has 2"):
        preprocess(torch.zeros(1, 5, 3), torch.zeros(1, 5), torch.zeros(1, 1, 3), config)
    with pytest.raises(ParameterError, match="contexts must have the shapes"):
        preprocess(torch.zeros(5, 2), torch.zeros(5), torch.zeros(1, 2), config)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"task": "ranking"}, "task must be"),
        ({"d_model": 30}, "does not divide"),
        ({"n_layers": 0}, "n_layers must be a whole number from 1"),
        ({"n_outputs": 1}, "n_outputs must be at least 2"),
        ({"d_model": 10**9}, "d_model must be"),
        ({"scaled": 1}, "scaled must be"),
    ],
)
def test_bad_sizes(changed, match):
    good = {"task": "regression", "max_features": 3, "n_outputs": 10}
    with pytest.raises(ParameterError, match=match):
        PFNConfig(**(good | changed))


def test_bars_need_borders():
    with pytest.raises(ParameterError, match="needs 11 borders"):
        PFN(PFNConfig("regression", 3, 10), torch.zeros(5))


# -- files -----------------------------------------------------------------------------------------


def test_a_file_keeps_every_bit_in_float32_and_the_predictions_in_half(model, tmp_path):
    model = model.float()
    X, y, Xq = (t.float() if t.is_floating_point() else t for t in tables(model))
    meta = {"prior": "mine", "runs": [{"steps": 3}]}
    save_pfn(tmp_path / "full.safetensors", model, meta, dtype=torch.float32)
    again, kept = load_pfn(tmp_path / "full.safetensors")
    assert kept == meta
    assert again.config == model.config
    assert torch.equal(predict(again, X, y, Xq), predict(model, X, y, Xq))
    save_pfn(tmp_path / "half.safetensors", model, meta)
    half, _ = load_pfn(tmp_path / "half.safetensors")
    assert not half.training
    assert next(half.parameters()).dtype == torch.float32
    # Half precision rounds weights to 2^-11 of themselves; logits of size 10 follow.
    p, q = (torch.softmax(predict(m, X, y, Xq), -1) for m in (model, half))
    assert float((p - q).abs().max()) < 0.02
    if model.borders is not None:
        assert torch.equal(half.borders, model.borders)


def write(path, model, **changed):
    header = {
        "format": "uq-pfn",
        "version": 1,
        "config": dataclasses.asdict(model.config),
        "meta": {},
    } | changed
    tensors = {k: t.contiguous() for k, t in model.float().state_dict().items()}
    save_file(tensors, path, {"uq": json.dumps(header)})
    return tensors, header


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"format": "uq-model"}, "something else"),
        ({"version": 2}, "format version 2"),
        ({"config": None}, "states no sizes"),
        ({"config": {"task": "regression"}}, "its sizes are"),
        ({"meta": []}, "not a table"),
    ],
)
def test_foreign_headers(tmp_path, changed, match):
    path = tmp_path / "x.safetensors"
    write(path, network(), **changed)
    with pytest.raises(LoadError, match=match):
        load_pfn(path)


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ({"d_model": 32}, "but should be"),
        ({"n_layers": 200}, "but should be"),
        ({"d_model": 10**12}, "d_model must be"),
        ({"n_layers": "3"}, "n_layers must be"),
    ],
)
def test_sizes_that_the_tensors_do_not_have(tmp_path, size, match):
    path, model = tmp_path / "x.safetensors", network()
    write(path, model, config=dataclasses.asdict(model.config) | size)
    with pytest.raises(LoadError, match=match):
        load_pfn(path)


def test_damaged_files(tmp_path):
    path, model = tmp_path / "x.safetensors", network()
    tensors, header = write(path, model)
    whole = path.read_bytes()
    load_pfn(path)
    for data in (
        b"",
        b"PK\x03\x04 a pickle in a zip",
        whole[:100],
        whole[:-7],
        struct.pack("<Q", 1 << 60) + whole[8:],  # a header of an exabyte
        struct.pack("<Q", len(whole) * 2) + whole[8:],
    ):
        path.write_bytes(data)
        with pytest.raises(LoadError, match="not a usable prior-data fitted network"):
            load_pfn(path)
    text = {"uq": json.dumps(header)}
    for name, value, match in (
        ("out.bias", math.nan, "NaN or infinite"),
        ("borders", 0.0, "do not increase"),
    ):
        broken = {k: t.clone() for k, t in tensors.items()}
        broken[name][:] = value
        save_file(broken, path, text)
        with pytest.raises(LoadError, match=match):
            load_pfn(path)
    save_file(tensors, path, {"uq": "[" * 100_000})
    with pytest.raises(LoadError):
        load_pfn(path)
    save_file(tensors, path)
    with pytest.raises(LoadError, match="without the header"):
        load_pfn(path)
    with pytest.raises(FileNotFoundError, match="tabular-regression"):
        load_pfn(tmp_path / "none.safetensors")


def test_what_cannot_be_saved(tmp_path):
    model = network()
    with pytest.raises(ParameterError, match="plain JSON"):
        save_pfn(tmp_path / "x", model, {"prior": object()})
    model.out.bias.fill_(1e6)
    with pytest.raises(ParameterError, match="not finite in torch"):
        save_pfn(tmp_path / "x", model, {})
    assert not list(tmp_path.iterdir())


# -- training --------------------------------------------------------------------------------------

TINY = {
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "n_buckets": 30,
    "max_context": 10,
    "n_queries": 5,
    "rows_per_step": 300,
    "log_entries": 4,
}


def test_training_lowers_the_held_out_loss_and_is_reproducible():
    _, meta = pretrain_pfn("gp", steps=120, random_state=3, **TINY)
    (run,) = meta["runs"]
    held_out = [entry["held_out"]["mean"] for entry in run["log"]]
    # A trivial rule has 1.42 nats on this prior; the exact posterior less than 0.1.
    assert held_out[-1] < run["reference"]["trivial"]["mean"] - 0.1
    assert held_out[-1] < held_out[0]
    assert run["reference"]["exact"]["mean"] < held_out[-1]
    state = torch.random.get_rng_state()
    once, again, other = (
        pretrain_pfn("gp", steps=5, random_state=seed, **TINY)[0] for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(once.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(other.out.weight, once.out.weight)


@pytest.mark.parametrize("prior", ["gp", "tabular-classification"])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path, prior):
    out = tmp_path / "net.safetensors"
    sizes = TINY | {"min_context": 2}
    whole, _ = pretrain_pfn(prior, steps=12, **sizes)

    def stop(state):
        if state.step >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain_pfn(prior, steps=12, out=out, callbacks=[stop], **sizes)
    assert load_pfn(out)[1]["runs"][0]["steps_done"] == 6
    again, meta = pretrain_pfn(prior, steps=12, out=out, resume=True, **sizes)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [entry["step"] for entry in meta["runs"][0]["log"]] == [3, 6, 9, 12]
    with pytest.raises(ParameterError, match=r"other settings: lr \(0.004 there, 0.001 here\)"):
        pretrain_pfn(prior, steps=12, out=out, resume=True, lr=1e-3, **sizes)


def lines(batch, n, d, generator):
    """Straight lines with noise: a prior that leaves scaling to the context, as a user's does."""
    x = torch.randn(batch, n, d, generator=generator)
    slope = torch.randn(batch, d, 1, generator=generator)
    return x, (x @ slope).squeeze(-1) + 0.1 * torch.randn(batch, n, generator=generator)


def test_a_users_prior_is_kept_with_contexts_from_no_rows_on(tmp_path):
    # An empty context has no mean or deviation to scale by; NaN could not be written to the file.
    out = tmp_path / "lines.safetensors"
    model, meta = pretrain_pfn(lines, **(TINY | {"steps": 2, "out": out}))
    load_pfn(out)
    # Scaled by one row or two, targets have far tails: bars in the middle must stay fine.
    assert meta["runs"][0]["border_rule"] == "fine_tails"
    widths = model.borders.diff()
    assert widths.min() < widths.median() < widths.max() / 10
    trivial = meta["runs"][0]["reference"]["trivial"]
    assert "0" in trivial
    assert all(math.isfinite(loss) for loss in trivial.values())


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path):
    out = tmp_path / "net.safetensors"
    whole, _ = pretrain_pfn("gp", steps=12, **TINY)

    def die(state):
        if state.step == 9:
            raise MemoryError  # nothing is written on the way out

    with pytest.raises(MemoryError):
        pretrain_pfn("gp", steps=12, out=out, checkpoint_seconds=0.0, callbacks=[die], **TINY)
    assert load_pfn(out)[1]["runs"][0]["steps_done"] == 8
    again, _ = pretrain_pfn("gp", steps=12, out=out, resume=True, **TINY)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_network_is_continued_and_keeps_its_runs(tmp_path):
    first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    pretrain_pfn("gp", steps=4, out=first, command="one", **TINY)
    options = {"max_context": 10, "n_queries": 5, "rows_per_step": 300, "log_entries": 1}
    model, meta = pretrain_pfn(
        "gp", steps=3, init=first, out=second, command="two", random_state=1, **options
    )
    assert [run["command"] for run in meta["runs"]] == ["one", "two"]
    assert model.config == load_pfn(first)[0].config
    assert torch.equal(model.borders, load_pfn(first)[0].borders)
    assert load_pfn(second)[1] == meta
    with pytest.raises(ParameterError, match="init has 16"):
        pretrain_pfn("gp", steps=3, init=first, d_model=32, **options)
    with pytest.raises(ParameterError, match="init is for regression"):
        pretrain_pfn("tabular-classification", steps=3, init=first, **options)
    with pytest.raises(ParameterError, match="scaled"):
        pretrain_pfn("tabular-regression", steps=3, init=first, **options)


def test_damaged_checkpoints(tmp_path):
    out = tmp_path / "net.safetensors"
    pretrain_pfn("gp", steps=2, out=out, **TINY)
    state = tmp_path / "net.state"
    good = state.read_bytes()
    state.write_bytes(good[:200])
    with pytest.raises(LoadError, match="damaged"):
        pretrain_pfn("gp", steps=2, out=out, resume=True, **TINY)
    state.write_bytes(out.read_bytes())
    with pytest.raises(LoadError, match="not the state of a pre-training run"):
        pretrain_pfn("gp", steps=2, out=out, resume=True, **TINY)


def test_a_loss_that_runs_off_is_an_error():
    class Wild:
        scaled, max_features = False, 1

        def __call__(self, batch, n, d, generator):
            X = torch.rand(batch, n, d, generator=generator)
            wild = torch.rand(batch, n, generator=generator) < 0.1
            return X, torch.where(wild, 3e38, X[..., 0])

    with pytest.raises(NonFiniteLossError, match="in step 1"):
        pretrain_pfn(
            Wild(), steps=3, init=None, **(TINY | {"n_buckets": 2, "border_rule": "equal_mass"})
        )


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"steps": 0}, "steps must be"),
        ({"min_context": 50}, "at most max_context=10"),
        ({"context_sampling": "log_uniform"}, "at least 1 with log_uniform"),
        ({"border_rule": "even"}, "border_rule must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"average": 1.0}, "average must be"),
        ({"random_state": -1}, "random_state must be"),
        ({"resume": True}, "resume=True needs"),
        ({"prior": "gaussian"}, "gaussian"),
    ],
)
def test_bad_settings(changed, match):
    settings = TINY | {"prior": "gp", "steps": 2} | changed
    with pytest.raises(ParameterError, match=match):
        pretrain_pfn(settings.pop("prior"), **settings)


def coins(batch, n, d, generator):
    """Beta(1, 1)–Bernoulli without columns."""
    rate = torch.rand(batch, 1, generator=generator)
    y = (torch.rand(batch, n, generator=generator) < rate).long()
    return torch.zeros(batch, n, 0), y


coins.task, coins.max_features, coins.max_classes, coins.scaled = "classification", 0, 2, False


def coin_predictions(model, n):
    """P(y = 1 | k ones in n) for k = 0 … n."""
    y = (torch.arange(n) < torch.arange(n + 1)[:, None]).long()
    X = torch.zeros(n + 1, n, 0)
    Xc, yc, Xq, _ = preprocess(X, y, torch.zeros(n + 1, 1, 0), model.config)
    return torch.softmax(model(Xc, yc, Xq)[:, 0], -1)[:, 1]


@pytest.mark.statistical
def test_coins_are_counted():
    options = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "min_context": 0,
        "max_context": 20,
        "n_queries": 10,
        "rows_per_step": 1200,
        "log_entries": 1,
    }
    model, _ = pretrain_pfn(coins, steps=1500, **options)
    for n in range(21):
        k = torch.arange(n + 1)
        # A network that cannot count errs by 0.16: it cannot tell {1} from {1, 1}.
        close(coin_predictions(model, n), (1 + k) / (2 + n), atol=0.03)


def means(batch, n, d, generator):
    """y = μ + ε, μ ~ N(0, 1), ε ~ N(0, 0.5²), without columns."""
    mu = torch.randn(batch, 1, generator=generator)
    return torch.zeros(batch, n, 0), mu + 0.5 * torch.randn(batch, n, generator=generator)


means.max_features, means.scaled = 0, False


@pytest.mark.statistical
def test_normal_means_are_those_of_the_conjugate_posterior():
    options = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "n_buckets": 60,
        "max_context": 20,
        "n_queries": 10,
        "rows_per_step": 1200,
        "log_entries": 1,
    }
    model, _ = pretrain_pfn(means, steps=800, **options)
    g = torch.Generator().manual_seed(9)
    for n in (0, 1, 3, 10, 20):
        X, y = means(2000, n + 1, 0, g)
        Xc, yc, Xq, _ = preprocess(X[:, :n], y[:, :n], X[:, n:], model.config)
        bars = BarDistribution(model(Xc, yc, Xq).double()[:, 0], model.borders)
        posterior = 1 / (1 + n / 0.25)
        mean = posterior * y[:, :n].double().sum(1) / 0.25
        exact = torch.distributions.Normal(mean, math.sqrt(posterior + 0.25))
        gap = -bars.log_prob(y[:, n]) + exact.log_prob(y[:, n].double())
        se = float(gap.std()) / math.sqrt(len(gap))
        # A negative gap would be a leak, or a density that does not integrate to one.
        assert -3 * se < float(gap.mean()) < 0.02 + 3 * se
        off = (bars.mean - mean) / exact.scale
        assert float(off.square().mean().sqrt()) < 0.15


# -- shipped ---------------------------------------------------------------------------------------


def test_a_network_is_read_without_the_internet(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    save_pfn(tmp_path / "net.safetensors", network(), {})
    load_pfn(tmp_path / "net.safetensors")

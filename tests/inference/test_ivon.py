"""The IVON optimizer as a citizen of torch: memory, state, errors, processes, mixed precision."""

import contextlib
import copy
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from tests.inference import ivon_ddp
from uq import IVONClassifier, IVONRegressor
from uq.errors import ParameterError
from uq.inference import IVON, ivon_blocks
from uq.inference.ivon_checks import CurvatureWarning, IVONStateError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3))


X = torch.randn(16, 5, generator=generator(1))
Y = torch.arange(16) % 3


def backward(net):
    net.zero_grad()
    loss = F.cross_entropy(net(X), Y)
    loss.backward()
    return loss.detach()


def flat(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def run(net, opt, steps, *, samples=1, closure=False):
    for _ in range(steps):
        if closure:
            opt.step(lambda: backward(net))
            continue
        for _ in range(samples):
            with opt.sampled_params(train=True):
                backward(net)
        opt.step()


# -- arithmetic does not depend on how it is asked for -------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
def test_closure_and_context_give_the_same_bits(samples):
    results = []
    for closure in (True, False):
        net = small_net()
        opt = IVON(net.parameters(), 0.1, ess=16, beta2=0.9, mc_samples=samples)
        opt.generator = generator(2)
        run(net, opt, 4, samples=samples, closure=closure)
        results.append((flat(net), opt.curvature[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_blocks_do_not_change_the_result(monkeypatch):
    """Cut parameters, gathered ones and one block for all: the same up to rounding."""
    results = []
    noise = torch.randn(4, 273, generator=generator(3))
    for block in (7, 64, 10**6):
        monkeypatch.setitem(ivon_blocks._BLOCK_ELEMENTS, "cpu", block)
        net = small_net()
        opt = IVON(net.parameters(), 0.1, ess=16, beta2=0.9, clip_radius=0.5)
        for z in noise:
            # The stream of normal_ depends on the sizes asked for: put the same noise in.
            with opt.sampled_params(train=True):
                kept = opt._flat[0].kept
                assert len(kept) == z.numel()
                std = torch.rsqrt(16 * (opt.curvature[0] + 1e-4))
                nn.utils.vector_to_parameters(kept + std * z, net.parameters())
                backward(net)
            opt.step()
        results.append((flat(net), opt.curvature[0].clone()))
    for mean, h in results[1:]:
        torch.testing.assert_close(mean, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(h, results[0][1], rtol=1e-5, atol=1e-6)


def test_accumulated_gradients_are_one_sample():
    """Two half batches under one noise, each loss halved, are the whole batch."""
    whole, parts = small_net().double(), small_net().double()
    opt = [IVON(n.parameters(), 0.1, ess=16, generator=generator(4)) for n in (whole, parts)]
    with opt[0].sampled_params(train=True):
        F.cross_entropy(whole(X.double()), Y).backward()
    with opt[1].sampled_params(train=True):
        for rows in (slice(0, 8), slice(8, 16)):
            (F.cross_entropy(parts(X[rows].double()), Y[rows]) / 2).backward()
    for o in opt:
        o.step()
    torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(opt[1].curvature[0], opt[0].curvature[0], rtol=1e-12, atol=0)


def test_noise_differs_between_weights_and_steps():
    w = nn.Parameter(torch.zeros(300_000))  # several blocks
    opt = IVON([w], 0.1, ess=1, weight_decay=1e-9, hess_init=1.0, generator=generator(5))
    draws = []
    for _ in range(2):
        with opt.sampled_params():
            draws.append(w.detach().clone())
    z = torch.stack(draws).double()
    se = 1 / math.sqrt(z[0].numel())
    assert abs(float(z[0].mean())) < 5 * se
    assert float(z[0].var()) == pytest.approx(1, abs=5 * math.sqrt(2) * se)
    assert abs(float((z[0] * z[1]).mean())) < 5 * se
    half = z[0].view(2, -1)
    assert abs(float((half[0] * half[1]).mean())) < 5 * math.sqrt(2) * se


# -- memory --------------------------------------------------------------------------------------


def test_persistent_memory_is_three_vectors(monkeypatch):
    monkeypatch.setitem(ivon_blocks._BLOCK_ELEMENTS, "cpu", 1000)
    w = nn.Parameter(torch.zeros(100_000))
    opt = IVON([w], 0.1, ess=10)
    w.grad = torch.ones_like(w)
    opt.step(lambda: None)
    held = {
        t.untyped_storage().data_ptr(): t.numel()
        for t in vars(opt._flat[0]).values()
        if isinstance(t, torch.Tensor)
    }
    scratch = [t for name in ("scratch", "gathered") for t in getattr(opt._flat[0], name)]
    assert sum(held.values()) + sum(t.numel() for t in scratch) <= 3 * w.numel() + 2 * 1000 + 2
    assert opt._flat[0].sums is None


def test_storage_stays_and_layouts_are_kept():
    """Non-contiguous and shared-storage parameters are updated where they lie."""
    base = torch.randn(6, 8, generator=generator(6))
    strided = nn.Parameter(base[:, ::2])
    transposed = nn.Parameter(torch.randn(4, 3, generator=generator(7)).T)
    one = nn.Parameter(strided.detach().clone().contiguous())
    two = nn.Parameter(transposed.detach().clone().contiguous())
    results = []
    for pair in ((strided, transposed), (one, two)):
        pointers = [p.data_ptr() for p in pair]
        opt = IVON(pair, 0.1, ess=10, beta2=0.9, generator=generator(8))
        for _ in range(3):
            with opt.sampled_params(train=True):
                for p in pair:
                    p.grad = p.detach() ** 3 + 1
            opt.step()
        assert [p.data_ptr() for p in pair] == pointers
        results.append([p.detach().clone() for p in pair])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not strided.is_contiguous()
    assert torch.equal(base[:, 1::2], torch.randn(6, 8, generator=generator(6))[:, 1::2])


def test_parameters_that_share_memory_are_refused():
    data = torch.zeros(10)
    with pytest.raises(ParameterError, match="share memory"):
        IVON([nn.Parameter(data[:6]), nn.Parameter(data[4:])], 0.1, ess=10)
    with pytest.raises(ParameterError, match="share memory"):
        IVON([{"params": nn.Parameter(data)}, {"params": nn.Parameter(data)}], 0.1, ess=10)
    IVON([nn.Parameter(data[:5]), nn.Parameter(data[5:])], 0.1, ess=10)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert len(IVON(tied.parameters(), 0.1, ess=10).posterior_std()) == 3


# -- state ---------------------------------------------------------------------------------------


def test_resume_from_a_file_is_bit_exact(tmp_path, monkeypatch):
    """Two groups, cut and gathered blocks, the generator's state in the state_dict."""
    monkeypatch.setitem(ivon_blocks._BLOCK_ELEMENTS, "cpu", 64)

    def build(seed):
        net = small_net(seed)
        groups = [
            {"params": net[0].parameters()},
            {"params": net[2].parameters(), "weight_decay": 1e-2, "lr": 0.05},
        ]
        return net, IVON(groups, 0.1, ess=16, beta2=0.9, generator=generator(seed))

    net, opt = build(0)
    run(net, opt, 5)
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    run(net, opt, 5)
    again, opt2 = build(9)
    saved = torch.load(tmp_path / "run.pt")  # weights_only: nothing but tensors and numbers
    again.load_state_dict(saved["net"])
    opt2.load_state_dict(saved["opt"])
    assert opt2.param_groups[1]["step"] == 5
    run(again, opt2, 5)
    assert torch.equal(flat(net), flat(again))
    for a, b in zip(opt.curvature, opt2.curvature, strict=True):
        assert torch.equal(a, b)


def test_scheduler_drives_the_rate():
    net = small_net()
    opt = IVON(net.parameters(), 0.1, ess=16)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.0)
    before = flat(net)
    run(net, opt, 2)
    schedule.step()
    assert torch.equal(flat(net), before)


# -- the mean comes back -------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["read", "write"])
@pytest.mark.parametrize("closure", [True, False])
def test_interrupt_anywhere_restores_a_mean(monkeypatch, closure, when):
    """KeyboardInterrupt at the k-th access of a block, for every k of a step: no noise is left."""
    monkeypatch.setitem(ivon_blocks._BLOCK_ELEMENTS, "cpu", 40)
    real = getattr(ivon_blocks.Block, when)
    # With lr = 0 the mean never changes, so whatever differs from it is noise.
    for k in range(60):
        net = small_net()
        before = flat(net)
        opt = IVON(net.parameters(), 0.0, ess=16)
        calls = 0

        def interrupting(*args, k=k):
            nonlocal calls
            calls += 1
            if calls == k:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(ivon_blocks.Block, when, interrupting)
        with contextlib.suppress(KeyboardInterrupt):
            run(net, opt, 1, closure=closure)
        monkeypatch.setattr(ivon_blocks.Block, when, real)
        assert torch.equal(flat(net), before), k
        run(net, opt, 1, closure=closure)  # usable again
        if calls < k:
            break
    else:
        pytest.fail("the loop never reached the end of a step")


def test_exceptions_in_the_closure_restore_the_mean():
    net = small_net()
    before = flat(net)
    for samples in (1, 2):
        opt = IVON(net.parameters(), 0.1, ess=16, mc_samples=samples)
        with pytest.raises(ZeroDivisionError):
            opt.step(lambda: 1 / 0)
        assert torch.equal(flat(net), before)
    with opt.sampled_params():
        with pytest.raises(IVONStateError, match="leave"):
            opt.step()
        with pytest.raises(IVONStateError, match="leave"):
            opt.sample(net)
        assert not torch.equal(flat(net), before)
    assert torch.equal(flat(net), before)


# -- gradients -----------------------------------------------------------------------------------


def test_changed_gradients_are_noticed():
    net = small_net()
    opt = IVON(net.parameters(), 0.1, ess=16)
    with opt.sampled_params(train=True):
        backward(net)
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    with pytest.raises(IVONStateError, match="inside the context"):
        opt.step()
    # Forgetting to zero the gradients of the first sample corrupts it.
    with opt.sampled_params(train=True):
        backward(net)
    with opt.sampled_params(train=True):
        F.cross_entropy(net(X), Y).backward()
    # They were added up before the second backward wrote to them, so the first is right …
    opt.step()
    # … and setting them to None between capture and step is fine.
    with opt.sampled_params(train=True):
        backward(net)
    opt.zero_grad()
    opt.step()


def test_overflow_drops_the_capture():
    """float16-style loss scaling: the step is skipped, and so is its sample."""
    net, twin = small_net(), small_net()
    opt = IVON(net.parameters(), 0.1, ess=16, generator=generator(9))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    for factor in (2.0**100, 1.0):  # float32 overflows with the first on a loss of 1e20
        with opt.sampled_params(train=True):
            opt.zero_grad()
            scaler.scale(F.cross_entropy(net(X), Y) * (1e20 if factor > 1 else 1)).backward()
            scaler.unscale_(opt)
        before = flat(net)
        scaler.step(opt)
        scaler.update(2.0**10)
        assert torch.equal(flat(net), before) == (factor > 1)
    # The twin takes the second sample alone.
    opt2 = IVON(twin.parameters(), 0.1, ess=16, generator=generator(9))
    with opt2.sampled_params():
        pass
    run(twin, opt2, 1)
    torch.testing.assert_close(flat(net), flat(twin), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(opt.curvature[0], opt2.curvature[0], rtol=1e-5, atol=1e-7)


def test_gradients_unscaled_by_the_scalers_step_are_right():
    net, twin = small_net(), small_net()
    opt, opt2 = (IVON(n.parameters(), 0.1, ess=16, generator=generator()) for n in (net, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with opt.sampled_params(train=True):
        scaler.scale(F.cross_entropy(net(X), Y)).backward()
    scaler.step(opt)
    run(twin, opt2, 1)
    torch.testing.assert_close(flat(net), flat(twin), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(opt.curvature[0], opt2.curvature[0], rtol=1e-6, atol=0)


def test_autocast_trains_float32_parameters():
    net = small_net()
    opt = IVON(net.parameters(), 0.1, ess=16)

    def closure():
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(X), Y)
        loss.backward()
        return loss.detach()

    first = float(opt.step(closure))
    for _ in range(60):
        last = float(opt.step(closure))
    assert last < first
    assert opt.curvature[0].dtype == torch.float32


def test_bad_gradients_and_parameters_are_explained():
    with pytest.raises(ParameterError, match=r"bfloat16.*autocast"):
        IVON([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], 0.1, ess=10)
    with pytest.raises(ParameterError, match="share dtype and device"):
        IVON([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2).double())], 0.1, ess=10)
    with pytest.raises(ParameterError, match="requires gradients"):
        IVON([nn.Parameter(torch.zeros(2), requires_grad=False)], 0.1, ess=10)
    for ess in (0, -1, math.nan, math.inf, "many"):
        with pytest.raises(ParameterError, match="ess must be a number > 0"):
            IVON([nn.Parameter(torch.zeros(2))], 0.1, ess=ess)
    with pytest.raises(TypeError, match="ess"):
        IVON([nn.Parameter(torch.zeros(2))], 0.1)
    with pytest.raises(ParameterError, match="hess_init"):
        IVON([nn.Parameter(torch.zeros(2))], 0.1, ess=1, weight_decay=0, hess_init=0)
    table = nn.Embedding(4, 2, sparse=True)
    opt = IVON(table.parameters(), 0.1, ess=10)
    with pytest.raises(ParameterError, match="sparse=False"):
        opt.step(lambda: table(torch.tensor([1])).sum().backward())
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(opt)


def test_a_parameter_with_neither_prior_nor_data_is_refused():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": used}, {"params": unused, "weight_decay": 0.0}]
    opt = IVON(groups, 0.1, ess=10)
    with pytest.raises(IVONStateError, match="neither data nor prior"):
        opt.step(lambda: used.square().sum().backward())
    assert torch.equal(used.detach(), torch.ones(2))


# -- diagnostics ---------------------------------------------------------------------------------


def digits_run(beta2, hess_init=1.0):
    data, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(data[:898] / 16).float(), torch.tensor(labels[:898])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = IVON(
        net.parameters(), 0.1, ess=898, beta2=beta2, hess_init=hess_init, generator=generator()
    )
    for step in range(300):
        rows = torch.randint(898, (50,), generator=generator(step))

        def closure(rows=rows):
            opt.zero_grad()
            loss = F.cross_entropy(net(x[rows]), y[rows])
            loss.backward()
            return loss.detach()

        opt.step(closure)
    return opt


def test_runaway_curvature_is_told():
    with pytest.warns(CurvatureWarning, match="run away"):
        (found,) = digits_run(0.8, hess_init=0.1).diagnostics()
    assert found.noise_share > 0.5
    opt = digits_run(0.998)
    (found,) = opt.diagnostics()
    assert found.noise_share < 0.2
    assert found.memory == pytest.approx(0.998**300)


def test_curvature_that_did_not_move_is_told():
    opt = digits_run(0.99999)
    with pytest.warns(CurvatureWarning, match="hess_init. Lower beta2"):
        (found,) = opt.diagnostics()
    assert found.change < 0.1
    assert opt.diagnostics(warn=False) == [found]


def test_unbounded_width_without_prior_is_told():
    w = nn.Parameter(torch.zeros(3))
    opt = IVON([w], 0.1, ess=10, weight_decay=0, beta2=0.5)

    def closure():
        w.grad = torch.zeros(3)

    for _ in range(30):
        opt.step(closure)
    with pytest.warns(CurvatureWarning, match="no prior bounds"):
        opt.diagnostics()


# -- several processes ---------------------------------------------------------------------------


def test_two_processes_are_one_with_two_samples(tmp_path):
    """The same noises and batches; and gradients that DDP averaged before are refused."""
    command = [sys.executable, "-m", "tests.inference.ivon_ddp"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), tmp_path / "store", tmp_path / "out"],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=200)[1] for worker in workers]
    assert [w.returncode for w in workers] == [0, 0], errors
    ranks = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]

    net, batches, settings = ivon_ddp.problem()
    opt = IVON(net.parameters(), **settings)
    noises = [ivon_ddp.noise(rank) for rank in range(2)]
    for _ in range(3):
        for batch, opt.generator in zip(batches, noises, strict=True):
            with opt.sampled_params(train=True):
                opt.zero_grad()
                ivon_ddp.loss_of(net, batch).backward()
        opt.step()
    for found in ranks:
        for name, value in net.state_dict().items():
            torch.testing.assert_close(found["mean"][name], value, rtol=1e-12, atol=1e-14)
        for i, p in enumerate(net.parameters()):
            expected = opt.state[p]["hess"]
            torch.testing.assert_close(found["state"][i]["hess"], expected, rtol=1e-12, atol=1e-14)
        assert "no_sync" in found["error_of_averaged"]
    assert all(torch.equal(ranks[0]["mean"][k], ranks[1]["mean"][k]) for k in ranks[0]["mean"])


# -- estimators ----------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(40):
            yield torch.tensor([float(i % 7), float(i % 3)]), torch.tensor(float(i % 7))


def test_rows_of_an_iterable_dataset_are_counted():
    """The survey of the loader finds N, and the posterior follows from it."""
    model = IVONRegressor(max_epochs=1, hidden=(4,), random_state=0)
    seen = []
    model.callbacks = [lambda state: seen.append(state.train_loss)]
    model.fit(DataLoader(Stream(), 10))
    std = torch.cat([s.reshape(-1) for s in model.posterior_.stds.values()])
    # After four steps the width is still init_std, which hess_init gives only with λ = 40.
    assert float(std.median()) == pytest.approx(model.init_std, rel=0.05)


def test_batch_norm_and_dropout_are_warned_of():
    X, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"BatchNorm1d, Dropout.*wrong at other draws"):
        IVONClassifier(module=net, max_epochs=1, random_state=0).fit(X, y)
    quiet = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.0), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IVONClassifier(module=quiet, max_epochs=1, random_state=0).fit(X, y)


def test_a_slow_beta2_is_told_by_the_estimator():
    X, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    with pytest.warns(CurvatureWarning, match="still that of hess_init"):
        model = IVONClassifier(beta2=0.99999, max_epochs=3, random_state=0).fit(X, y)
    assert model.diagnostics_["change"] < 0.1

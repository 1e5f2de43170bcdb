"""The training loop and its batches."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from uq.errors import ParameterError
from uq.inference.data import ArrayBatches
from uq.inference.training import cosine_schedule, isolated_rng, make_fabric, train


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([4.0]))

    def forward(self, x):
        return (self.w - x).square().mean()


def run(objective=None, **settings):
    objective = objective or Quadratic()
    x = torch.arange(10.0)
    batches = ArrayBatches(x, batch_size=5, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(objective.parameters(), 0.1)
    settings = {"max_epochs": 5, "fabric": make_fabric("cpu", "32-true")} | settings
    return objective, train(objective, batches, optimizer, **settings)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 11, None])
def test_batches_hold_each_row_once_in_fresh_order(batch_size):
    x = torch.arange(10)
    batches = ArrayBatches(x, 2 * x, batch_size=batch_size, generator=torch.Generator())
    seen = []
    for _ in range(2):
        parts = list(batches)
        assert len(parts) == len(batches)
        rows = torch.cat([p[0] for p in parts])
        assert torch.equal(torch.cat([p[1] for p in parts]), 2 * rows)
        assert torch.equal(rows.sort().values, x)
        seen.append(rows)
    shuffled = batch_size is not None and batch_size < 10
    assert torch.equal(seen[0], seen[1]) != shuffled


def test_batches_larger_than_a_block(monkeypatch):
    monkeypatch.setattr("uq.inference.data._BLOCK_BYTES", 64)
    x = torch.arange(1000)
    batches = ArrayBatches(x, batch_size=7, generator=torch.Generator())
    parts = [p[0] for p in batches]
    assert torch.equal(torch.cat(parts).sort().values, x)
    assert len(parts) == len(batches)


@pytest.mark.parametrize(("max_epochs", "said"), [(50, True), (2, False)])
def test_a_bar_that_ends_before_its_end_says_why(capsys, max_epochs, said):
    _, result = run(max_epochs=max_epochs, patience=2, held_out_loss=lambda: 1.0, verbose=1)
    assert result.stop_reason == ("patience" if said else "max_epochs")
    assert ("stopped early" in capsys.readouterr().err) is said


def test_best_weights_are_restored_and_patience_stops():
    objective = Quadratic()
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    kept = []
    _, result = run(
        objective,
        max_epochs=6,
        held_out_loss=lambda: next(losses),
        patience=3,
        callbacks=[lambda s: kept.append(objective.w.item())],
    )
    assert result.stop_reason == "patience"
    assert result.best_epoch == 2
    assert result.history["held_out_loss"] == [3.0, 1.0, 2.0, 2.0, 2.0]
    assert objective.w.item() == kept[1]
    assert not objective.training


def test_extra_state_belongs_to_the_best_epoch():
    extra = torch.zeros(1)
    losses = iter([1.0, 2.0])
    run(
        max_epochs=2,
        held_out_loss=lambda: next(losses),
        extra_state=[extra],
        callbacks=[lambda s: extra.add_(1) and None],
    )
    # The callback runs after the snapshot of epoch 1, so epoch 1's value is 0.
    assert extra.item() == 0


def test_interrupt_before_the_first_epoch_is_passed_on():
    class Interrupting(Quadratic):
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Interrupting())


def test_nan_ends_with_an_error_and_the_last_good_weights():
    objective = Quadratic()

    def poison(state):
        if state.epoch == 2:
            objective.w.data.fill_(math.nan)

    _, result = run(objective, callbacks=[poison])
    assert result.stop_reason == "non_finite"
    assert "epoch 3" in str(result.error)
    assert math.isfinite(objective.w.item())


def test_gradient_clipping_bounds_the_step():
    objective, _ = run(max_epochs=1, clip_norm=1e-3)
    assert abs(objective.w.item() - 4.0) <= 2 * 0.1 * 1e-3 * (1 + 1e-5)


def test_schedule_reaches_the_optimizer():
    objective, _ = run(schedule=lambda step: 0.0)
    assert objective.w.item() == 4.0


def test_cosine_schedule():
    factor = cosine_schedule(100, warmup=0.1)
    values = [factor(t) for t in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0
    assert values[55] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(values[10:]))


def test_isolated_rng_restores():
    before = torch.get_rng_state()
    with isolated_rng(3, torch.device("cpu")):
        first = torch.randn(2)
    assert torch.equal(torch.get_rng_state(), before)
    with isolated_rng(3, torch.device("cpu")):
        assert torch.equal(torch.randn(2), first)


@pytest.mark.parametrize("bad", [("gpu:9", "32-true"), ("meta", "32-true"), ("cpu", "8-bit")])
def test_bad_device_and_precision(bad):
    with pytest.raises(ParameterError):
        make_fabric(*bad)
    if not torch.cuda.is_available():
        with pytest.raises(ParameterError, match="use device='cpu'"):
            make_fabric("cuda", "32-true")


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_precisions_learn(precision):
    from sklearn.datasets import load_wine

    import uq

    X, y = load_wine(return_X_y=True)
    model = uq.MAPClassifier(precision=precision, max_epochs=30, random_state=0).fit(X, y)
    assert model.score(X, y) > 0.9
    kind = torch.float64 if precision == "64-true" else torch.float32
    assert {p.dtype for p in model.posterior_.network.parameters()} == {kind}
    assert np.isfinite(model.log_score(X, y))

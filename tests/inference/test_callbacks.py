"""What callbacks are told, the record of a fit, and losses in TensorBoard."""

import copy
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_wine

from tests.contract.estimators import make_trained
from uq import EnsembleClassifier, MAPClassifier
from uq.errors import ParameterError
from uq.inference import TensorBoardCallback

X, y = load_wine(return_X_y=True)


def fit(callback, **changes):
    settings = {"hidden": (4,), "max_epochs": 3, "batch_size": 60, "random_state": 0}
    return MAPClassifier(**settings | changes, callbacks=[callback]).fit(X, y)


class Steps:
    def __init__(self):
        self.steps, self.weights = [], []

    def __call__(self, state):
        self.steps.append(state)

    def on_step_end(self, step):
        self.steps.append(step)
        self.weights.append(next(step.module.parameters()).detach().clone())


def test_every_step_and_every_epoch_is_told_in_order():
    seen = Steps()
    model = fit(seen, patience=None)
    # 178 rows in batches of 60, 60 and 58: three steps and then the epoch.
    steps = [getattr(s, "step", None) for s in seen.steps]
    assert steps == [*(1, 2, 3), None, *(4, 5, 6), None, *(7, 8, 9), None]
    assert [s.epoch for s in seen.steps] == [1] * 4 + [2] * 4 + [3] * 4
    for i, epoch in enumerate(s for s in seen.steps if not hasattr(s, "step")):
        losses = [float(s.loss) for s in seen.steps if hasattr(s, "step") and s.epoch == i + 1]
        assert epoch.train_loss == pytest.approx(np.mean(losses), rel=1e-6)
        assert epoch.train_loss == model.history_["train_loss"][i]
        assert epoch.held_out_loss is None
    for one, other in zip(seen.weights, seen.weights[1:], strict=False):
        assert not torch.equal(one, other)  # called after the step, not before


@pytest.mark.parametrize("patience", [None, "auto"])
@pytest.mark.parametrize("method", ["map", "sdm", "pbnn", "abnn"])
def test_the_history_is_a_table(method, patience):
    model = make_trained(method, "classification", patience=patience, max_epochs=2).fit(X, y)
    frame = pd.DataFrame(model.history_)
    # SDM always watches its calibration rows; members of ABNN have none.
    watches = {"sdm": True, "abnn": False}.get(method, patience is not None)
    own = {"mean_q"} if method == "sdm" else set()
    assert set(frame) == {"train_loss"} | ({"held_out_loss"} if watches else set()) | own
    assert frame.shape[0] == 2
    assert frame.notna().all(axis=None)


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    callback = TensorBoardCallback(tmp_path)
    model = fit(callback, patience="auto")
    found = scalars(tmp_path / "0")
    assert found.keys() == {"train_loss", "held_out_loss"}
    for name, values in found.items():
        assert [step for step, _ in values] == [1, 2, 3]
        np.testing.assert_allclose([v for _, v in values], model.history_[name], rtol=1e-6)
    # Members are runs of their own, and so are copies, which scikit-learn makes of parameters.
    ensemble = EnsembleClassifier(n_members=2, max_epochs=1, patience=None, callbacks=[callback])
    clone(ensemble).fit(X, y)
    copy.deepcopy(callback)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2"]
    assert scalars(tmp_path / "2").keys() == {"train_loss"}


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ParameterError, match="pip install tensorboard"):
        fit(TensorBoardCallback(tmp_path))
    assert not list(tmp_path.iterdir())

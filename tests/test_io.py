"""Files: nothing half-written, nothing executed, every failure explained."""

import errno
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_wine

import uq
from uq.errors import LoadError, SaveError


@pytest.fixture(scope="module")
def model():
    X, y = load_wine(return_X_y=True)
    return uq.MAPClassifier(hidden=(4,), max_epochs=2, random_state=0).fit(X, y)


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model.uq")
    return tmp_path / "model.uq"


def rewrite(path, change):
    """Change the JSON header of a model file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["uq"])
    change(header)
    save_file(load_file(path), path, {"uq": json.dumps(header)})


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model file"):
        uq.load(tmp_path / "nothing.uq")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04K\x01.", pickle.dumps({"a": 1})])
def test_foreign_bytes(tmp_path, content):
    path = tmp_path / "model.uq"
    path.write_bytes(content)
    with pytest.raises(LoadError, match="not a uq model, or is damaged"):
        uq.load(path)


def test_foreign_safetensors(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(LoadError, match="not a model saved by uq"):
        uq.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(LoadError, match="damaged"):
        uq.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=99), "version 99"),
        (lambda h: h.update(format="other"), "not a model saved by uq"),
        (lambda h: h["model"].update({"class": "os.system"}), "does not know"),
        (lambda h: h["model"]["params"].update(unknown=1), "usable"),
        (lambda h: h["model"]["params"].update(hidden={"tuple": [7]}), "usable"),
        (lambda h: h["model"]["fitted"].pop("classes_"), "usable"),
        (lambda h: h["model"]["fitted"].update(classes_={"pickle": "x"}), "unknown entry"),
        (lambda h: h.pop("model"), "usable"),
    ],
)
def test_tampered_header(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(LoadError, match=message):
        uq.load(saved)


def test_full_disk_leaves_the_old_file(model, saved, monkeypatch):
    before = saved.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left"):
        model.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["model.uq"]


def test_no_such_folder(model, tmp_path):
    with pytest.raises(SaveError, match="cannot write"):
        model.save(tmp_path / "nowhere" / "model.uq")


def test_permissions_are_the_usual_ones(saved, tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("x")
    assert saved.stat().st_mode == ordinary.stat().st_mode


def test_random_state_and_callbacks_are_left_out(tmp_path):
    X, y = load_wine(return_X_y=True)
    state = np.random.RandomState(0)
    model = uq.MAPClassifier(max_epochs=1, random_state=state, callbacks=[print]).fit(X, y)
    model.save(tmp_path / "m.uq")
    loaded = uq.load(str(tmp_path / "m.uq"))
    assert loaded.random_state is None
    assert loaded.callbacks == ()
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))


def test_nothing_is_pickled(saved):
    data = Path(saved).read_bytes()
    assert b"pickle" not in data
    assert b"sklearn" not in data


@pytest.mark.parametrize("key", ["predict", "_infer", "__doc__", "fit", "save"])
def test_file_cannot_replace_a_method(saved, key):
    rewrite(saved, lambda h: h["model"]["fitted"].update({key: "boo"}))
    with pytest.raises(LoadError, match="not a fitted attribute"):
        uq.load(saved)


@pytest.mark.parametrize("key", ["posterior_", "x_mean_", "classes_", "input_shape_"])
def test_incomplete_file(saved, key):
    rewrite(saved, lambda h: h["model"]["fitted"].pop(key))
    with pytest.raises(LoadError, match=r"lacks|usable"):
        uq.load(saved)


def test_invented_sizes_take_no_memory(saved):
    huge = {"tuple": [10**6, 10**6]}
    rewrite(saved, lambda h: h["model"]["params"].update(hidden=huge))
    with pytest.raises(LoadError, match="usable"):  # a terabyte, if it were allocated
        uq.load(saved)


def test_deep_header(saved):
    from safetensors.torch import save_file as write

    deep = '{"format": "uq-model", "version": 1, "model": ' + "[" * 100_000 + "]" * 100_000 + "}"
    write({"w": torch.ones(1)}, saved, {"uq": deep})
    with pytest.raises(LoadError):
        uq.load(saved)

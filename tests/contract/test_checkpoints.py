"""A fit that was killed ends, when it is resumed, with the bits that it would have had."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_wine
from torch.utils.data import DataLoader, TensorDataset

from tests.contract.estimators import CASES, make, make_trained
from uq import MAPClassifier
from uq.errors import FitInterruptedWarning, LoadError, ParameterError
from uq.inference.checkpoints import Stage
from uq.plain import read_state


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def data(task):
    X, y = (load_wine if task == "classification" else load_diabetes)(return_X_y=True)
    return X[::2], y[::2]


def kill_at(count):
    """Return a callback that kills at the ``count``-th epoch of all that it sees."""
    seen = []

    def callback(state):
        seen.append(state.epoch)
        if len(seen) == count:
            raise Killed

    return callback


def assert_same(a, b, X):
    one, other = a.predict_distribution(X), b.predict_distribution(X)
    y = torch.zeros(len(X)) if hasattr(one, "interval") else torch.zeros(len(X), dtype=torch.long)
    assert torch.equal(one.log_prob(y), other.log_prob(y))
    for name, values in a.history_.items():
        np.testing.assert_array_equal(values, b.history_[name], err_msg=name)
    assert (a.stop_reason_, a.n_epochs_) == (b.stop_reason_, b.n_epochs_)


@pytest.mark.parametrize(("method", "task"), CASES)
def test_a_resumed_fit_has_the_bits_of_an_undisturbed_one(method, task, tmp_path):
    X, y = data(task)
    settings = {"max_epochs": 6, "patience": "auto"}
    plain = make_trained(method, task, **settings).fit(X, y)
    settings |= {"checkpoint_dir": tmp_path / "run", "checkpoint_every": 1}
    try:
        make_trained(method, task, **settings, callbacks=[kill_at(4)]).fit(X, y)
    except Killed:
        pass
    else:
        pytest.skip("has no epochs")
    assert list((tmp_path / "run").glob("stage-*"))
    resumed = make_trained(method, task, **settings).fit(X, y, resume=True)
    assert_same(plain, resumed, X)
    again = make_trained(method, task, **settings).fit(X, y, resume=True)  # of a run that is done
    assert_same(plain, again, X)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("ivon", {}),
        ("ivon", {"mc_samples": 2, "n_members": 2}),
        ("vbll", {"features": "bayesian"}),
        ("ssvi", {"update_every": 2}),
        ("evidential", {}),
        ("implicit", {}),
        ("pbnn", {}),
        ("pbnn", {"algorithm": "sgsmc"}),
        ("ensemble", {}),
    ],
)
@pytest.mark.parametrize("n_saved", [1, 4, 7])
def test_a_kill_between_two_steps_of_an_epoch(method, changes, n_saved, tmp_path, monkeypatch):
    X, y = data("classification")
    plain = make(method, "classification", **changes).fit(X, y)
    settings = changes | {"checkpoint_dir": tmp_path, "checkpoint_every": "0s"}
    save, saved = Stage.save, []

    def save_and_die(self, step, state):
        save(self, step, state)
        saved.append(step)
        if len(saved) == n_saved:
            raise Killed

    monkeypatch.setattr(Stage, "save", save_and_die)
    with pytest.raises(Killed):
        make(method, "classification", **settings).fit(X, y)
    monkeypatch.undo()
    assert_same(plain, make(method, "classification", **settings).fit(X, y, resume=True), X)


class NoisyRows(torch.utils.data.Dataset):
    """Rows that are augmented at random, by torch's global generator."""

    def __init__(self, X, y):
        self.X, self.y = torch.tensor(X).float(), torch.tensor(y)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.X[i] + 0.1 * torch.randn(self.X.shape[1]), self.y[i]


@pytest.mark.parametrize("every", [1, "0s"])
@pytest.mark.parametrize("source", ["dataset", "loader"])
def test_rows_that_are_drawn_at_random(source, every, tmp_path):
    X, y = data("classification")

    def rows():
        if source == "dataset":
            return NoisyRows(X, y)
        shuffle = torch.Generator().manual_seed(3)
        table = TensorDataset(torch.tensor(X).float(), torch.tensor(y))
        return DataLoader(table, 32, shuffle=True, generator=shuffle)

    plain = make("map", "classification", max_epochs=6).fit(rows())
    settings = {"max_epochs": 6, "checkpoint_dir": tmp_path, "checkpoint_every": every}
    with pytest.raises(Killed):
        make("map", "classification", **settings, callbacks=[kill_at(3)]).fit(rows())
    resumed = make("map", "classification", **settings).fit(rows(), resume=True)
    assert_same(plain, resumed, X)


def test_a_drawn_seed_is_kept(tmp_path):
    X, y = data("classification")
    settings = {"random_state": None, "checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Killed):
        make("map", "classification", **settings, callbacks=[kill_at(2)]).fit(X, y)
    first = make("map", "classification", **settings).fit(X, y, resume=True)
    second = make("map", "classification", **settings).fit(X, y, resume=True)
    assert_same(first, second, X)


def test_a_damaged_newest_checkpoint_falls_back_on_the_one_before(tmp_path):
    X, y = data("classification")
    plain = make("map", "classification", max_epochs=6).fit(X, y)
    settings = {"max_epochs": 6, "checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Killed):
        make("map", "classification", **settings, callbacks=[kill_at(4)]).fit(X, y)
    steps = sorted(tmp_path.glob("stage-0000.step-*"))
    assert len(steps) == 2  # no more are kept
    steps[-1].write_bytes(steps[-1].read_bytes()[:-100])
    with pytest.warns(UserWarning, match="the one before is taken"):
        resumed = make("map", "classification", **settings).fit(X, y, resume=True)
    assert_same(plain, resumed, X)


def test_what_is_refused(tmp_path):
    X, y = data("classification")
    settings = {"checkpoint_dir": tmp_path}
    with pytest.raises(ParameterError, match="resume=True needs checkpoint_dir"):
        make("map", "classification").fit(X, y, resume=True)
    model = make("map", "classification", **settings).fit(X, y, resume=True)  # nothing there yet
    with pytest.raises(ParameterError, match="holds a fit already"):
        model.fit(X, y)
    with pytest.raises(ParameterError, match=r"holds a fit with lr = 0.02, not 0.1"):
        make("map", "classification", **settings, lr=0.1).fit(X, y, resume=True)
    with pytest.raises(ParameterError, match="other data"):
        model.fit(X + 1e-3 * X**2, y, resume=True)
    with pytest.raises(ParameterError, match="with estimator = 'MAPClassifier', not 'IVONClass"):
        make("ivon", "classification", **settings).fit(X, y, resume=True)
    for wrong in (0, -1, True, "fast", "3m", 1.5, None):
        with pytest.raises(ParameterError, match="checkpoint_every"):
            make(
                "map", "classification", checkpoint_dir=tmp_path / "b", checkpoint_every=wrong
            ).fit(X, y)
    with pytest.raises(ParameterError, match="checkpoint_dir must be"):
        make("map", "classification", checkpoint_dir=3).fit(X, y)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(LoadError, match="cannot be read"):
        model.fit(X, y, resume=True)


def test_a_module_of_another_shape_is_refused(tmp_path):
    X, y = data("classification")
    settings = {"max_epochs": 4, "checkpoint_dir": tmp_path, "checkpoint_every": 1}

    def network(width):
        return torch.nn.Sequential(
            torch.nn.Linear(13, width), torch.nn.Tanh(), torch.nn.Linear(width, 3)
        )

    with pytest.raises(Killed):
        MAPClassifier(module=network(4), callbacks=[kill_at(2)], **settings).fit(X, y)
    with pytest.raises(LoadError, match="does not fit"):
        MAPClassifier(module=network(5), **settings).fit(X, y, resume=True)


SCRIPT = textwrap.dedent(
    """
    import sys, time, torch
    torch.set_num_threads(1)
    from sklearn.datasets import load_digits
    from uq import IVONClassifier
    X, y = load_digits(return_X_y=True)
    folder, out = sys.argv[1:]
    model = IVONClassifier(hidden=(32,), max_epochs=12, random_state=1, device="cpu",
        checkpoint_dir=folder or None, checkpoint_every="0s" if folder else 1,
        callbacks=[lambda state: print(state.epoch, flush=True)])
    print("start", flush=True)
    model.fit(X, y, resume=bool(folder))
    torch.save(model.predict_distribution(X).logits, out)
    print(model.stop_reason_, flush=True)
    """
)


def run(*args):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
    run("", tmp_path / "plain.pt").communicate()
    rng, kills = random.Random(0), 0
    folder = tmp_path / "run"
    for _ in range(20):
        process = run(folder, tmp_path / "resumed.pt")
        assert process.stdout.readline() == "start\n"
        time.sleep(rng.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        for path in folder.glob("stage-*"):  # whole, or not there
            read_state(path)
    out, err = run(folder, tmp_path / "resumed.pt").communicate()
    assert "max_epochs" in out, err
    assert "the one before is taken" not in err
    plain, resumed = (torch.load(tmp_path / f"{n}.pt") for n in ("plain", "resumed"))
    assert torch.equal(plain, resumed)
    print(f"{kills} kills, then the same bits")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_fit_with_what_is_there(number, tmp_path):
    process = run(tmp_path / "run", tmp_path / "out.pt")
    while process.stdout.readline() != "2\n":
        pass
    process.send_signal(number)
    out, err = process.communicate()
    if number == signal.SIGTERM:  # the process was asked to end
        assert process.returncode == 128 + signal.SIGTERM, err
        assert "resume=True" in err
    else:  # the fit was
        assert process.returncode == 0, err
        assert out.endswith("interrupted\n")
    assert FitInterruptedWarning.__name__ in err
    assert list((tmp_path / "run").glob("stage-0000.step-*"))


# -- samplers --------------------------------------------------------------------------------------


def sampling(state):
    """Whether a state is that of a sampler, not of the training before."""
    return bool(state.keys() & {"draws", "kept", "move"})


@pytest.mark.parametrize("n_saved", [1, 3])
@pytest.mark.parametrize(
    ("method", "task", "changes"),
    [
        ("masked", "classification", {}),
        ("masked", "regression", {"n_chains": 2, "thin": 2}),
        ("pbnn", "regression", {"refresh": True, "n_particles": 20, "hidden": (4,)}),
        pytest.param("nuts", "classification", {"hidden": ()}, marks=pytest.mark.slow),
        pytest.param("nuts", "regression", {"n_chains": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_kill_between_two_steps_of_a_sampler(
    method, task, changes, n_saved, tmp_path, monkeypatch
):
    monkeypatch.setattr("uq.inference.nuts._BLOCK", 3)
    X, y = data(task)
    changes = changes | {"max_epochs": 1}
    plain = make(method, task, **changes).fit(X, y)
    settings = changes | {"checkpoint_dir": tmp_path, "checkpoint_every": "0s"}
    save, saved = Stage.save, []

    def save_and_die(self, step, state):
        save(self, step, state)
        saved.append(sampling(state))
        if sum(saved) == n_saved:
            raise Killed

    monkeypatch.setattr(Stage, "save", save_and_die)
    with pytest.raises(Killed):
        make(method, task, **settings).fit(X, y)
    saved.clear()
    n_saved = -1
    resumed = make(method, task, **settings).fit(X, y, resume=True)
    assert saved
    assert all(saved)  # nothing was trained again
    assert_same_chains(plain, resumed, X)
    saved.clear()
    again = make(method, task, **settings).fit(X, y, resume=True)
    assert not saved
    assert_same_chains(plain, again, X)


@pytest.mark.parametrize(
    ("method", "n_draws"), [("masked", 2), pytest.param("nuts", 5, marks=pytest.mark.slow)]
)
def test_ctrl_c_in_a_sampler_keeps_its_draws_and_a_checkpoint(
    method, n_draws, tmp_path, monkeypatch
):
    monkeypatch.setattr("uq.inference.nuts._BLOCK", 3)
    X, y = data("classification")
    settings = {"max_epochs": 1, "hidden": (4,), "checkpoint_dir": tmp_path, "n_warmup": 4}
    pressed = []

    def update(self, n=1):
        pressed.append(n)
        if sum(pressed) == 4 + n_draws:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("tqdm.auto.tqdm.update", update)
        with pytest.warns(FitInterruptedWarning, match=f"the {n_draws} draws of each chain"):
            model = make(method, "classification", **settings).fit(X, y)
    assert model.stop_reason_ == "interrupted"
    assert model.predict_distribution(X).n_draws == n_draws
    (step,) = tmp_path.glob("stage-0001.step-*")  # though no 30 seconds had passed
    assert sampling(read_state(step))
    resumed = make(method, "classification", **settings).fit(X, y, resume=True)
    plain = make(method, "classification", **settings | {"checkpoint_dir": None}).fit(X, y)
    assert_same_chains(plain, resumed, X)
    lp = model.sample_stats_["lp"]
    np.testing.assert_array_equal(resumed.sample_stats_["lp"][:, :n_draws], lp)  # appended


@pytest.mark.slow
def test_a_killed_process_that_samples(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", CHAINS, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not list(tmp_path.glob("stage-0001.step-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "resume=True" in err
    done = [read_state(p)["kept"]["moved"]["acceptance"] for p in tmp_path.glob("stage-0001.*")]
    assert 0 < max(chains.shape[1] for chains in done) < 10000


CHAINS = textwrap.dedent(
    """
    import sys, torch
    torch.set_num_threads(1)
    from sklearn.datasets import load_wine
    from uq import MaskedBNNClassifier
    MaskedBNNClassifier(
        hidden=(4,), max_epochs=1, n_chains=1, n_draws=10000, device="cpu", random_state=0,
        checkpoint_dir=sys.argv[1], checkpoint_every=10,
    ).fit(*load_wine(return_X_y=True))
    """
)


def assert_same_chains(a, b, X):
    assert_same(a, b, X)
    for name in ("sample_stats_", "diagnostics_"):
        tables = getattr(a, name, {})
        assert tables.keys() == getattr(b, name, {}).keys()
        for key, values in tables.items():
            np.testing.assert_equal(getattr(b, name)[key], values, err_msg=key)

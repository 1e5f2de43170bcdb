"""Training in several processes gives what one process gives, where the mathematics says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import uq
from tests.inference.ddp_fit import fit
from uq.errors import ParameterError

METHODS = ("map", "vbll", "evidential", "ensemble", "ivon")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*command, "-m", "tests.inference.ddp_fit", str(folder), *METHODS],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {
        method: [torch.load(folder / f"{method}.{rank}") for rank in range(2)] for method in METHODS
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_processes_agree(fitted, method):
    one, other = fitted[method]
    assert torch.equal(one["mean"], other["mean"])
    assert torch.equal(one["std"], other["std"])
    assert one["history"] == other["history"]


@pytest.mark.parametrize("method", METHODS[:-1])
def test_two_processes_learn_what_one_learns(fitted, method):
    """The mean over processes of their gradients is the gradient of the batch."""
    model, X = fit(method, "auto")
    dist = model.predict_distribution(X)
    torch.testing.assert_close(fitted[method][0]["mean"], dist.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fitted[method][0]["std"], dist.stddev, rtol=1e-9, atol=1e-9)


def test_ivon_learns_as_well_with_noise_from_two_processes(fitted):
    """Each process has weight noise of its own: the same posterior, along another path."""
    model, _ = fit("ivon", "auto")
    ours, one = fitted["ivon"][0]["history"]["train_loss"], model.history_["train_loss"]
    assert ours != one
    assert ours[-1] == pytest.approx(one[-1], abs=0.1)


def test_what_is_refused():
    X, y = [[0.0], [1.0], [2.0]], [0.0, 1.0, 2.0]
    with pytest.raises(ParameterError, match="torchrun"):
        uq.MAPRegressor(strategy="ddp").fit(X, y)
    with pytest.raises(ParameterError, match="strategy must be one of"):
        uq.MAPRegressor(strategy="fsdp").fit(X, y)
    with pytest.raises(ParameterError, match="one process"):
        uq.SSVIRegressor(strategy="ddp").fit(X, y)
    with pytest.raises(ParameterError, match="one process"):
        uq.VBLLRegressor(strategy="ddp", features="frozen", module=torch.nn.Linear(1, 2)).fit(X, y)

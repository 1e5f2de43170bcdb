"""Members in several processes: the same bits as one after another, on any joblib backend."""

import joblib
import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import cross_val_score
from torch.utils.data import DataLoader, TensorDataset

import uq
from uq.errors import ParameterError

X, y = load_wine(return_X_y=True)


def ensemble(**changes):
    settings = {"n_members": 3, "hidden": (16,), "max_epochs": 5, "random_state": 0}
    return uq.EnsembleClassifier(**settings | changes)


class Dropout(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(13, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))


def network(d_in, d_out):
    return Dropout()


@pytest.mark.parametrize("changes", [{}, {"module": network}])
def test_processes_give_the_bits_of_one_process(changes):
    one = ensemble(**changes).fit(X, y)
    two = ensemble(**changes, n_jobs=2).fit(X, y)
    np.testing.assert_array_equal(one.predict_proba(X), two.predict_proba(X))
    assert one.history_ == two.history_


def test_members_do_not_depend_on_how_many_there_are():
    few, many = (ensemble(n_members=n).fit(X, y).posterior_.draws for n in (2, 3))
    for name, draws in few.items():
        assert torch.equal(draws, many[name][:2])


def test_a_resumed_parallel_fit(tmp_path):
    one = ensemble().fit(X, y)
    ensemble(n_jobs=2, checkpoint_dir=tmp_path).fit(X, y)
    (tmp_path / "stage-0001.done.safetensors").unlink()
    again = ensemble(n_jobs=None, checkpoint_dir=tmp_path).fit(X, y, resume=True)
    np.testing.assert_array_equal(one.predict_proba(X), again.predict_proba(X))


def test_what_is_refused():
    rows = TensorDataset(torch.tensor(X).float(), torch.tensor(y))
    with pytest.raises(ParameterError, match="rows in memory"):
        ensemble(n_jobs=2).fit(DataLoader(rows, 32))
    with pytest.raises(ParameterError, match="n_jobs must not be 0"):
        ensemble(n_jobs=0).fit(X, y)


def on_backend(name, **options):
    """Fit an ensemble and cross-validate on a joblib backend; compare with one process."""
    expected = ensemble().fit(X, y).predict_proba(X)
    scores = cross_val_score(ensemble(), X, y, cv=2)
    with joblib.parallel_config(name, **options):
        found = ensemble(n_jobs=2).fit(X, y).predict_proba(X)
        several = cross_val_score(ensemble(), X, y, cv=2, n_jobs=2)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(several, scores)


@pytest.mark.slow
def test_dask():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
    ):
        on_backend("dask")


@pytest.mark.slow
def test_ray():
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        register_ray()
        on_backend("ray")
    finally:
        ray.shutdown()

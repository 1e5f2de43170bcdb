"""Threads and forks: the same bits as one after another, and no lock left behind."""

import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_wine

from tests.contract.estimators import CASES, make

FORK = "fork" in multiprocessing.get_all_start_methods()


def data(task):
    X, y = (load_wine if task == "classification" else load_diabetes)(return_X_y=True)
    return X[::3], y[::3]


def values(model, X):
    dist = model.predict_distribution(X)
    return (dist.probs if hasattr(dist, "probs") else torch.stack([dist.mean, dist.stddev])).numpy()


@pytest.mark.parametrize(("method", "task"), CASES)
def test_predictions_of_several_threads(method, task):
    X, y = data(task)
    model = make(method, task).fit(X, y)
    parts = [X[i : i + 20] for i in range(0, 40, 5)]
    alone = [values(model, part) for part in parts]
    functions = model.sample_functions(X[:5], 3)
    barrier = threading.Barrier(4)

    def work(k):
        barrier.wait()
        for _ in range(3):
            for i in np.roll(np.arange(len(parts)), k):
                np.testing.assert_array_equal(values(model, parts[i]), alone[i])
            np.testing.assert_array_equal(model.sample_functions(X[:5], 3), functions)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.parametrize("method", ["map", "ivon", "implicit", "pbnn", "ssvi"])
def test_fits_in_several_threads(method):
    X, y = data("classification")
    seeds = range(4)
    alone = [values(make(method, "classification", random_state=s).fit(X, y), X) for s in seeds]
    state, n_threads = torch.get_rng_state(), torch.get_num_threads()
    barrier = threading.Barrier(len(seeds))

    def fit(seed):
        barrier.wait()
        return values(make(method, "classification", random_state=seed).fit(X, y), X)

    with ThreadPoolExecutor(len(seeds)) as pool:
        for found, expected in zip(pool.map(fit, seeds), alone, strict=True):
            np.testing.assert_array_equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == n_threads


def test_predictions_go_on_beside_a_fit():
    X, y = data("classification")
    model = make("ivon", "classification").fit(X, y)
    expected, predicted = values(model, X), threading.Event()

    def predict():
        np.testing.assert_array_equal(values(model, X), expected)
        predicted.set()

    def callback(state):  # the fit is inside, and waits for the other thread
        threading.Thread(target=predict).start()
        assert predicted.wait(30)

    make("map", "classification", max_epochs=1, callbacks=[callback]).fit(X, y)


def _fit_in_child(queue, model, X, y):
    torch.set_num_threads(1)
    again = make("ivon", "classification").fit(X, y)
    queue.put((values(model, X), values(again, X)))


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.skipif(not FORK, reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_child_process(start):
    """A fork while another thread fits: the child fits and predicts, with the same bits."""
    X, y = data("classification")
    model = make("ivon", "classification").fit(X, y)
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    inside, done = threading.Event(), threading.Event()

    def callback(state):
        inside.set()
        assert done.wait(60)

    fit = make("map", "classification", max_epochs=1, callbacks=[callback]).fit
    thread = threading.Thread(target=fit, args=(X, y))
    thread.start()
    try:
        assert inside.wait(30)
        child = context.Process(target=_fit_in_child, args=(queue, model, X, y))
        child.start()
        found = queue.get(timeout=60)
        child.join(30)
    finally:
        done.set()
        thread.join()
    assert child.exitcode == 0
    for each in found:
        np.testing.assert_array_equal(each, values(model, X))


@pytest.fixture(scope="module")
def spawned():
    context = multiprocessing.get_context("spawn")
    # As many threads as here, for the same bits.
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize(("method", "task"), CASES)
def test_a_fitted_estimator_predicts_in_a_spawned_process(method, task, spawned):
    X, y = data(task)
    model = make(method, task).fit(X, y)
    found = spawned.submit(values, model, X).result(timeout=300)
    np.testing.assert_array_equal(found, values(model, X))


@pytest.mark.slow
def test_members_in_processes_of_joblib():
    from joblib import Parallel, delayed

    X, y = data("regression")
    models = [make("map", "regression", random_state=seed) for seed in range(2)]
    fitted = Parallel(n_jobs=2)(delayed(model.fit)(X, y) for model in models)
    for again, model in zip(fitted, models, strict=True):
        np.testing.assert_array_equal(values(again, X), values(model.fit(X, y), X))

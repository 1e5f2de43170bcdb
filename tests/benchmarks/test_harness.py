import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import harness
from benchmarks.data import Split
from benchmarks.harness import Method, Suite, Task, append, read, run, run_task, settings_of


class Model:
    def __init__(self, level):
        self.level = level

    def fit(self, X, y):
        if self.level < 0:
            raise ValueError("level is below 0")


def suite(**levels):
    methods = {
        name: Method(lambda name, seed, level=level: Model(level)) for name, level in levels.items()
    }
    return Suite(
        name="made-up",
        sets={"small": 3, "large": 1},
        methods=methods,
        load=lambda name, split: Split(*(np.zeros((2, 1)), np.zeros(2)) * 2),
        score=lambda model, data, name, split: {"nll": model.level, "predict_seconds": 0.5},
    )


def in_this_process(name, task, seconds):
    """What a child does, without the child."""
    return harness.attempt(name, task) | {"task_seconds": 1.0}


@pytest.fixture
def made_up(monkeypatch):
    def use(made):
        monkeypatch.setattr(harness, "suite_of", lambda name: made)
        monkeypatch.setattr(os, "environ", dict(os.environ))
        monkeypatch.setattr(
            "multiprocessing.context.ForkServerContext.set_forkserver_preload", lambda *a: None
        )

    return use


def fill(out, **options):
    return run("made-up", out, runner=in_this_process, **options)


def ids(rows):
    return [(r["set"], r["split"], r["method"]) for r in rows]


def test_splits_come_before_sets_and_sets_before_methods(made_up, tmp_path):
    made_up(suite(a=1.0, b=2.0))
    assert ids(fill(tmp_path)) == [
        ("small", 0, "a"),
        ("small", 0, "b"),
        ("large", 0, "a"),
        ("large", 0, "b"),
        ("small", 1, "a"),
        ("small", 1, "b"),
        ("small", 2, "a"),
        ("small", 2, "b"),
    ]


def test_a_second_call_runs_only_what_is_missing(made_up, tmp_path):
    made_up(suite(a=1.0, b=2.0))
    assert ids(fill(tmp_path, methods=["a"], splits=[0])) == [("small", 0, "a"), ("large", 0, "a")]
    assert len(fill(tmp_path)) == 6
    assert fill(tmp_path) == []
    assert len(read(tmp_path / "made-up.jsonl")) == 8
    assert len(fill(tmp_path, sets=["large"], again=True)) == 2


def test_other_arguments_of_a_method_are_measured_anew(made_up, tmp_path):
    made_up(suite(a=1.0, b=2.0))
    fill(tmp_path)
    made_up(suite(a=1.5, b=2.0))
    assert {r["method"] for r in fill(tmp_path)} == {"a"}


def test_a_changed_default_changes_the_key_but_a_seed_does_not():
    from uq import MAPRegressor

    method = Method(lambda name, seed: MAPRegressor(random_state=0))
    shown, key = settings_of(method, "small")
    assert shown == ""
    assert (
        settings_of(Method(lambda name, seed: MAPRegressor(random_state=0, lr=3e-3)), "")[1] == key
    )
    shown, other = settings_of(Method(lambda name, seed: MAPRegressor(random_state=0, lr=0.1)), "")
    assert (shown, other != key) == ("lr=0.1", True)


def test_a_method_that_fails_gives_a_row_and_stops_nothing(made_up, tmp_path):
    made_up(suite(bad=-1.0, good=1.0))
    rows = fill(tmp_path)
    assert len(rows) == 8
    for row in rows:
        assert ("error" in row) == (row["method"] == "bad")
    error = rows[0]["error"]
    assert error.startswith("ValueError: level is below 0 (test_harness.py:")
    assert fill(tmp_path) == []


def test_a_failure_is_tried_again_when_the_code_is_another(made_up, tmp_path, monkeypatch):
    made_up(suite(bad=-1.0, good=1.0))
    fill(tmp_path)
    monkeypatch.setattr(harness, "code_version", lambda: "another")
    assert {r["method"] for r in fill(tmp_path)} == {"bad"}


def test_what_is_left_out_is_no_task(made_up, tmp_path):
    made = suite(a=1.0, b=2.0)
    made_up(replace(made, left_out=lambda name, m, split: "dear" if m == "b" and split else ""))
    assert ids(fill(tmp_path)).count(("small", 0, "b")) == 1
    assert not any(m == "b" and split for _, split, m in ids(read(tmp_path / "made-up.jsonl")))


def test_the_budget_ends_the_run(made_up, tmp_path):
    made_up(suite(a=1.0))
    assert fill(tmp_path, budget=0.0) == []
    # One that ran out of time leaves no row: the next run starts it again.
    assert run("made-up", tmp_path, runner=lambda *a: None, budget=1.0) == []
    assert len(fill(tmp_path, budget=1.0)) == 4


def test_what_tasks_share_is_prepared_within_the_budget(made_up, tmp_path):
    prepared = []
    made_up(replace(suite(a=1.0), prepare=lambda name, split: prepared.append((name, split))))
    assert fill(tmp_path, budget=0.0) == []
    assert prepared == []  # a reference of minutes is not begun after the budget
    assert len(fill(tmp_path, sets=["large"])) == 1
    assert prepared == [("large", 0)]


def test_unknown_names_are_named(made_up, tmp_path):
    made_up(suite(a=1.0))
    with pytest.raises(SystemExit, match="method 'c' is unknown"):
        fill(tmp_path, methods=["c"])


def test_a_line_that_was_cut_off_costs_that_line_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    append(path, {"a": 1})
    with path.open("a") as file:
        file.write(json.dumps({"a": 2})[:4])
    append(path, {"a": 3})
    append(path, {"a": float("inf")})
    assert read(path) == [{"a": 1}, {"a": 3}, {"a": float("inf")}]


def test_a_row_says_where_it_comes_from(made_up, tmp_path):
    made_up(suite(a=1.0))
    row = fill(tmp_path)[0]
    assert (row["nll"], row["predict_seconds"]) == (1.0, 0.5)
    for name in (
        "cpu",
        "torch",
        "threads",
        "scikit-learn",
        "code",
        "date",
        "peak_mb",
        "fit_cpu_seconds",
    ):
        assert name in row


def dies(name, task, pipe):
    os._exit(3)


def is_stopped(name, task, pipe):
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_crash_is_a_row_and_a_stop_is_none(monkeypatch):
    task = Task("toys", "linear", 0, "GP")
    monkeypatch.setattr(harness, "_in_child", dies)
    assert run_task("toys", task)["error"] == "the process ended with code 3"
    monkeypatch.setattr(harness, "_in_child", is_stopped)
    assert run_task("toys", task) is None


@pytest.mark.slow
def test_a_task_in_a_process_of_its_own():
    row = run_task("toys", Task("toys", "linear", 0, "GP"))
    assert "error" not in row
    assert 0 <= row["excess_nll"] < 0.5
    assert row["peak_mb"] > 0
    assert run_task("toys", Task("toys", "linear", 0, "GP"), seconds=0.001) is None

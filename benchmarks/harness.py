"""Suites of tasks: a task is a data set, a split of it and a method, and gives one row.

Each task runs in a fresh process with one thread, so that its peak memory is its own and a crash
is one row. Rows are lines of ``results/SUITE.jsonl``. A task is skipped where a row of it with the
same arguments of the method (defaults included) is there: a changed default is measured anew, a
change of code alone is not unless ``--again`` says so. A row names the version of the code. A
method that fails gives a row with its error, and is tried again when the code is another. Splits
come first, then sets, then methods: whenever a run stops, the splits before are whole.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed
from sklearn.base import BaseEstimator

from benchmarks.data import Split
from benchmarks.measure import machine

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# A task that takes longer is stopped, and says so in its row.
LIMIT_SECONDS = 3600.0
# Somebody ended the run, the task did not fail.
STOPPED = (-signal.SIGINT, -signal.SIGTERM)
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")} | {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"
}


@dataclass(frozen=True)
class Method:
    """``make(set, seed)`` gives what has ``fit(X, y)`` and ``predict_distribution(X)``."""

    make: Callable[[str, int], Any]
    package: str = "uq"


@dataclass(frozen=True)
class Suite:
    """A table to fill: sets with their planned splits, smallest first, methods, and scores."""

    name: str
    sets: Mapping[str, int]
    methods: Mapping[str, Method]
    load: Callable[[str, int], Split]
    score: Callable[[Any, Split, str, int], Row]
    """Metrics of a fitted model on a split, of this set and number."""
    left_out: Callable[[str, str, int], str] = lambda name, method, split: ""
    """Why a method is not run on a split of a set; empty where it is."""
    prepare: Callable[[str, int], object] = lambda name, split: None
    """What the scores of a split need of all methods, made before the first of its tasks."""

    def tasks(self) -> Iterator[Task]:
        """All tasks in the order of work."""
        for split in range(max(self.sets.values())):
            for name, n_splits in self.sets.items():
                if split < n_splits:
                    for method in self.methods:
                        if not self.left_out(name, method, split):
                            yield Task(self.name, name, split, method)


@dataclass(frozen=True)
class Task:
    """One row to be."""

    suite: str
    set: str
    split: int
    method: str


def suite_of(name: str) -> Suite:
    """Suite ``SUITE`` of the module whose name is ``name`` with underscores."""
    suite: Suite = import_module(f"benchmarks.{name.replace('-', '_')}").SUITE
    return suite


# -- rows in a file --------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """Rows of a file; a last line that was cut off is no row."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(path: Path, row: Row) -> None:
    """Add a line in one write, which no other process can cut in two."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with path.open("ab+", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def settings_of(method: Method, name: str) -> tuple[str, str]:
    """Arguments on a set that differ from the defaults, and a key of all of them."""
    model = method.make(name, 0)
    parameters = model.get_params() if isinstance(model, BaseEstimator) else vars(model)
    named = {k: getattr(v, "__qualname__", v) for k, v in parameters.items()}
    text = json.dumps(named, sort_keys=True, default=_without_address)
    full = f"{method.package} {type(model).__name__} {text}"
    if isinstance(model, BaseEstimator):
        fields = getattr(type(model), "__dataclass_fields__", {})
        named = {k: v for k, v in named.items() if k not in fields or fields[k].default != v}
    named = {k: v for k, v in named.items() if k not in ("random_state", "device", "seed")}
    shown = ", ".join(f"{k}={_without_address(v)}" for k, v in named.items())
    return shown, hashlib.blake2b(full.encode(), digest_size=4).hexdigest()


def _without_address(value: Any) -> str:
    return repr(value).split(" at 0x")[0]


# -- what a row says of where it comes from --------------------------------------------------------


def code_version() -> str:
    """Version of uq and commit of the checkout, "+" where the package differs from it."""
    try:

        def git(*arguments: str) -> str:
            found = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            )
            return found.stdout.strip()

        changed = "+" if git("status", "--porcelain", "uq") else ""
        return f"{version('uq')} {git('rev-parse', '--short', 'HEAD')}{changed}"
    except (OSError, subprocess.CalledProcessError):
        return version("uq")


def version_and_date() -> Row:
    """What the rows are of."""
    return {"code": code_version(), "date": datetime.now(UTC).date().isoformat()}


def provenance(package: str) -> Row:
    """Versions, processor and date."""
    found = machine()
    try:
        found[package] = version(package)
    except PackageNotFoundError:
        found[package] = "not installed"
    return {**found, **version_and_date()}


# -- one task --------------------------------------------------------------------------------------


def _resident_mb(field: str) -> float:
    """Resident memory ("VmRSS") of this process or its peak ("VmHWM") from /proc, in MiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    (line,) = (x for x in status.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def measure(suite: Suite, task: Task) -> Row:
    """Fit, predict and score; the row without its provenance."""
    import torch

    torch.set_num_threads(1)
    data = suite.load(task.set, task.split)
    model = suite.methods[task.method].make(task.set, task.split)
    before = _resident_mb("VmRSS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start, cpu = time.perf_counter(), time.process_time()
        model.fit(data.X, data.y)
        fitted, fitted_cpu = time.perf_counter(), time.process_time()
        scores = suite.score(model, data, task.set, task.split)
    seconds = scores.pop("predict_seconds")
    return {
        "n_train": len(data.X),
        "n_test": len(data.X_test),
        **{k: float(f"{v:.6g}") for k, v in scores.items()},
        "fit_seconds": float(f"{fitted - start:.4g}"),
        "fit_cpu_seconds": float(f"{fitted_cpu - cpu:.4g}"),
        "predict_seconds": float(f"{seconds:.4g}"),
        "peak_mb": round(max(0.0, _resident_mb("VmHWM") - before), 1),
    }


def attempt(name: str, task: Task) -> Row:
    """Row of a task, or that of its error."""
    try:
        return measure(suite_of(name), task)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return {"error": f"{type(error).__name__}: {error} ({where})"[:500]}


def _in_child(name: str, task: Task, pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, without a row
    # A run that is killed takes its tasks with it.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(ONE_THREAD)
    pipe.send(attempt(name, task))
    pipe.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_task(name: str, task: Task, seconds: float = LIMIT_SECONDS) -> Row | None:
    """Run in a fresh process; None where it was stopped, by ``seconds`` or by a signal."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    start = time.perf_counter()
    # A daemon ends with this process.
    child = context.Process(target=_in_child, args=(name, task, there), daemon=True)
    child.start()
    there.close()
    row: Row | None = None
    try:
        if here.poll(min(seconds, LIMIT_SECONDS)):
            row = here.recv()
        else:
            child.kill()
    except EOFError:
        child.join()
        if child.exitcode in STOPPED:
            return None
        row = {"error": f"the process ended with code {child.exitcode}"}
    child.join(5)  # one that has sent its row is about to leave
    child.kill()
    child.join()
    here.close()
    if row is None:
        if seconds < LIMIT_SECONDS:
            return None
        row = {"error": f"took longer than {LIMIT_SECONDS:g} s"}
    return row | {"task_seconds": round(time.perf_counter() - start, 2)}


# -- all of them -----------------------------------------------------------------------------------


def run(
    name: str,
    out: Path = RESULTS,
    *,
    jobs: int = 1,
    budget: float | None = None,
    methods: Iterable[str] = (),
    sets: Iterable[str] = (),
    splits: Iterable[int] = (),
    again: bool = False,
    runner: Callable[[str, Task, float], Row | None] = run_task,
) -> list[Row]:
    """Fill the table of a suite, within ``budget`` minutes; the rows that were added."""
    suite = suite_of(name)
    for kind, asked, there in (("method", methods, suite.methods), ("set", sets, suite.sets)):
        for unknown in set(asked) - set(there):
            raise SystemExit(f"{name}: {kind} {unknown!r} is unknown; choose from {list(there)}.")
    path = out / f"{name}.jsonl"
    pairs = {(t.set, t.method) for t in suite.tasks()}
    settings = {(s, m): settings_of(suite.methods[m], s) for s, m in pairs}
    code = code_version()
    done = {
        (r["set"], r["split"], r["method"], r["key"])
        for r in read(path)
        if not again and ("error" not in r or r["code"] == code)
    }
    chosen = [
        t
        for t in suite.tasks()
        if (not methods or t.method in methods)
        and (not sets or t.set in sets)
        and (not splits or t.split in splits)
        and (t.set, t.split, t.method, settings[t.set, t.method][1]) not in done
    ]
    known = {m: provenance(suite.methods[m].package) for m in {t.method for t in chosen}}
    end = time.monotonic() + 60 * budget if budget is not None else float("inf")
    os.environ.update(ONE_THREAD)
    # What is loaded before the fork is no part of a task's seconds and memory.
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        [f"benchmarks.{name.replace('-', '_')}", "lightning.fabric", "gpytorch"]
    )
    lock, preparing, added = threading.Lock(), threading.Lock(), []

    def work(i: int, task: Task) -> None:
        with preparing:
            if time.monotonic() < end:
                suite.prepare(task.set, task.split)
        left = end - time.monotonic()
        found = runner(name, task, left) if left > 0 else None
        if found is None:
            return
        shown, key = settings[task.set, task.method]
        row = {**vars(task), "settings": shown, "key": key, **found, **known[task.method]}
        with lock:
            append(path, row)
            added.append(row)
            said = row.get("error") or f"fit {row['fit_seconds']:.3g} s"
            print(
                f"{i + 1}/{len(chosen)} {task.set} {task.split} {task.method}: {said}", flush=True
            )

    Parallel(n_jobs=jobs, prefer="threads", batch_size=1, pre_dispatch="all")(
        delayed(work)(i, task) for i, task in enumerate(chosen)
    )
    return added

"""Large data: passes over a file, bounded memory, two processes, a fit that is killed.

Everything runs in processes of its own, so that peak memory and the clock are those of one job. The
table is generated (seed 0) in a temporary folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.measure import row

N_ROWS, N_COLUMNS = 1_000_000, 20

_HEAD = """
import json, resource, sys, time
import numpy as np, pandas as pd, torch
torch.set_num_threads(1)
import uq
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model = uq.TableModel(uq.MAPClassifier(hidden=(64, 64), max_epochs=1, patience=None,
    random_state=0, device="cpu"))
"""

_STREAM = """
start = time.perf_counter()
model.fit(uq.TableStream(PATH, "y"))
print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak()}))
"""

_ARRAYS = """
table = pd.read_parquet(PATH)
X, y = table.drop(columns="y").to_numpy(), table["y"].to_numpy()
start = time.perf_counter()
model.estimator.fit(X, y)
print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak()}))
"""

_PREDICT = """
model = uq.TableModel(uq.IVONClassifier(hidden=(64, 64), max_epochs=1, n_samples=32,
    random_state=0, device="cpu"))
table = next(iter(uq.TableStream(PATH, "y").frames()))
model.fit(table.drop(columns="y"), table["y"])
next(iter(model.predict_batches(table)))
before, start, rows = peak(), time.perf_counter(), 0
for dist in model.predict_batches(uq.TableStream(PATH)):
    rows += len(dist.probs)
print(json.dumps({"seconds": time.perf_counter() - start, "rows": rows,
    "growth_mib": peak() - before}))
"""

_PROCESSES = """
import sys, time, torch
torch.set_num_threads(1)
import uq
strategy = sys.argv[1]
rng = torch.Generator().manual_seed(0)
X = torch.randn(16384, 512, generator=rng)
y = (X[:, 0] > 0).long()
model = uq.MAPClassifier(hidden=(2048, 2048, 2048), max_epochs=1, batch_size=1024, patience=None,
    random_state=0, device="cpu", strategy=strategy)
start = time.perf_counter()
model.fit(X, y)
if strategy == "auto" or torch.distributed.get_rank() == 0:
    print("seconds", time.perf_counter() - start)
"""


def table(path: Path) -> None:
    """Write the table: 20 numeric columns, a label that the first four tell."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N_ROWS, N_COLUMNS)).astype(np.float32)
    logit = X[:, 0] + X[:, 1] * X[:, 2] - X[:, 3]
    y = rng.uniform(size=N_ROWS) < 1 / (1 + np.exp(-logit))
    frame = pd.DataFrame(X, columns=[f"x{j}" for j in range(N_COLUMNS)]).assign(y=y.astype(int))
    frame.to_parquet(path, row_group_size=65_536, index=False)


def python(code: str, *args: str, launcher: tuple[str, ...] = ()) -> str:
    """Run code in a process of its own on one thread; return what it prints."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(textwrap.dedent(code))
        file.flush()
        command = [sys.executable, *launcher, file.name, *args]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return done.stdout


def measured(code: str, path: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(python(f"PATH = {str(path)!r}\n" + _HEAD + code))
    return found


def processes_seconds(strategy: str) -> float:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
    torchrun += ("--rdzv-endpoint", "localhost:0")
    out = python(_PROCESSES, strategy, launcher=torchrun if strategy == "ddp" else ())
    return float(out.split()[-1])


def passes(path: Path) -> list[dict[str, Any]]:
    """One epoch from the file against one from arrays: the whole of ``fit``."""
    pairs = [(measured(_STREAM, path), measured(_ARRAYS, path)) for _ in range(3)]
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in pairs)
    peak = max(a["peak_mib"] for a, _ in pairs)
    predicted = measured(_PREDICT, path)
    growth = predicted["growth_mib"]
    assert predicted["rows"] == N_ROWS
    return [
        row(
            "MAP, one epoch of 1 M x 20 rows: rows/s from Parquet / from arrays",
            "ratio",
            ">= 0.5",
            ratios[1] >= 0.5,
            {
                "ours": N_ROWS / sorted(a["seconds"] for a, _ in pairs)[1],
                "peer": N_ROWS / sorted(b["seconds"] for _, b in pairs)[1],
                "ratio": ratios[1],
                "ratio_min": ratios[0],
                "ratio_max": ratios[2],
            },
        ),
        row(
            "the same from Parquet: peak resident memory of the process",
            "MiB",
            "< 1500",
            peak < 1500,
            {"ours": peak},
        ),
        row(
            "IVON, 1 M rows x 32 draws from Parquet in batches: growth of resident memory",
            "MiB",
            "< 500",
            growth < 500,
            {"ours": growth, "rows_per_s": N_ROWS / predicted["seconds"]},
        ),
    ]


def two_processes() -> dict[str, Any]:
    """An epoch of a network of 10 M parameters, in one process and in two of one thread each."""
    pairs = [(processes_seconds("ddp"), processes_seconds("auto")) for _ in range(3)]
    ratios = sorted(b / a for a, b in pairs)
    return row(
        "MAP of 10 M parameters: speed of two processes / one",
        "ratio",
        ">= 1.5",
        ratios[1] >= 1.5,
        {
            "ours": sorted(a for a, _ in pairs)[1],
            "peer": sorted(b for _, b in pairs)[1],
            "ratio": ratios[1],
            "ratio_min": ratios[0],
            "ratio_max": ratios[2],
        },
    )


_KILLED = """
import sys, torch
torch.set_num_threads(1)
from sklearn.datasets import load_digits
from uq import IVONClassifier
X, y = load_digits(return_X_y=True)
model = IVONClassifier(hidden=(32,), max_epochs=12, random_state=1, device="cpu",
    checkpoint_dir=sys.argv[1] or None, checkpoint_every="0s" if sys.argv[1] else 1)
print("start", flush=True)
model.fit(X, y, resume=bool(sys.argv[1]))
print(model.predict_distribution(X).logits.double().numpy().tobytes().hex())
"""


def kills(n: int = 20) -> dict[str, Any]:
    """SIGKILL at random moments of a fit that is resumed each time: the same bits in the end?"""
    rng = np.random.default_rng(0)
    plain = python(_KILLED, "").split()[-1]
    n_killed = 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(n):
            process = subprocess.Popen(
                [sys.executable, "-c", _KILLED, f"{folder}/run"],
                stdout=subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            n_killed += process.returncode == -signal.SIGKILL
        same = python(_KILLED, f"{folder}/run").split()[-1] == plain
    return row(
        "IVON, killed at random moments and resumed: the bits of an undisturbed fit",
        "kills",
        "same bits",
        same,
        {"ours": n_killed},
    )


def run() -> list[dict[str, Any]]:
    """All of the above."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.parquet"
        table(path)
        rows = passes(path)
    return [*rows, two_processes(), kills()]

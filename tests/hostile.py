"""Files that were damaged or made up to do harm: seeded mutations of good ones.

``python -m tests.hostile N SEED`` tries N files in this process under a limit on memory, and prints
how they were met.
"""

import copy
import json
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

LIMIT_SECONDS = 2.0
HOSTILE = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    7,
    10**6,
    10**12,
    -(10**18),
    2**63,
    2**64,
    10**400,
    0.5,
    -1.5,
    1e308,
    -0.0,
    "",
    "x",
    "auto",
    "a" * 10_000,
    "\ud800",
    "\x00",
    "\x1b[31m",
    "__class__",
    "__init__",
    "os.system",
    "/etc/passwd",
    "../../x",
    "cuda:0",
    "meta",
    "cpu:999999",
    [],
    {},
    [[]],
    [0] * 100,
    [10**12],
    {"tuple": []},
    {"tuple": [1] * 1000},
    {"tuple": [10**12]},
    {"tuple": [10**6, 10**6]},
    {"tuple": [-1]},
    {"dict": []},
    {"dict": [["a", 1], ["a", 2]]},
    {"dict": [[[], 1]]},
    {"float": "nan"},
    {"float": "inf"},
    {"float": "1_0"},
    {"numpy": "nowhere"},
    {"tensor": "nowhere"},
    {"module": {}},
    {"pickle": "x"},
    {"class": "Popen", "needs": [], "params": {}, "fitted": {}},
    {"class": "TableModel", "needs": [], "params": {"estimator": None}, "fitted": {}},
    {"class": "TablePreprocessor", "needs": [], "params": {}, "fitted": {}},
    {"class": "TemperatureScaling", "needs": [], "params": {}, "fitted": {"temperature_": -1}},
    {"array": [], "shape": [0, 10**12], "dtype": "str"},
    {"array": ["a", "b", "c"], "shape": [3], "dtype": "str"},
    {"array": ["a", None, 3], "shape": [3], "dtype": "object"},
    {"array": ["x" * 10**5] + ["y"] * 2000, "shape": [2001], "dtype": "str"},
]
NAMES = ["__class__", "__dict__", "fit", "_infer", "predict", "posterior_", "params_", "classes_"]
NAMES += [
    "callbacks",
    "checkpoint_dir",
    "module",
    "hidden",
    "n_samples",
    "device",
    "x_scale_",
    "x_",
]


def split(data):
    """Header and tensors of a safetensors file."""
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def join(header, blob):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + blob


def nodes(root):
    """Every place in a JSON document: (container, key)."""
    found, todo = [], [root]
    while todo:
        at = todo.pop()
        pairs = at.items() if isinstance(at, dict) else enumerate(at)
        for key, value in list(pairs):
            found.append((at, key))
            if isinstance(value, dict | list):
                todo.append(value)
    return found


def change_json(root, rng):
    """Edit a JSON document in one to three places; it stays valid."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = nodes(root)
        if not places:
            return
        at, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind <= 2:
            at[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind == 3:
            del at[key]
        elif kind == 4:
            other, where = rng.choice(places)
            at[key] = copy.deepcopy(other[where])
        elif kind == 5 and isinstance(at, dict):
            at[rng.choice(NAMES)] = at.pop(key)
        elif kind == 6 and isinstance(at[key], int | float) and not isinstance(at[key], bool):
            at[key] = rng.choice([-at[key], at[key] + 1, at[key] * 10**9, at[key] % 1000 / 3])
        else:
            at[key] = [at[key]]


def change_tensors(header, blob, rng):
    """Edit what the file says of its tensors, or their values."""
    names = [n for n in header if n != "__metadata__"]
    if not names:
        return blob
    kind = rng.randrange(6)
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    if kind == 0:
        header[name], header[other] = header[other], header[name]
    elif kind == 1:
        entry["dtype"] = rng.choice(["F64", "F32", "F16", "I64", "U8", "BOOL", "F8_E4M3", "X", 3])
    elif kind == 2:
        shape = entry["shape"]
        change = [
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            [0, *shape],
            [-1],
            [10**12],
            [2**62, 4],
            [],
        ]
        entry["shape"] = rng.choice(change)
    elif kind == 3:
        entry["data_offsets"] = rng.choice([[0, 0], [0, 10**12], [-8, 0], [1], {}, [0, len(blob)]])
    elif kind == 4:
        header[rng.choice(NAMES)] = header.pop(name)
    else:
        special = rng.choice([np.nan, np.inf, -1.0, 0.0, 1e38, -1e300])
        start, end = entry["data_offsets"]
        kinds = {"F32": np.float32, "F64": np.float64, "I64": np.int64}
        if entry["dtype"] in kinds and end > start:
            values = np.frombuffer(blob[start:end], kinds[entry["dtype"]]).copy()
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values[rng.randrange(len(values)) if rng.random() < 0.5 else slice(None)] = (
                    special if entry["dtype"] != "I64" else rng.choice([-1, 0, 10**12, -(2**63)])
                )
            blob = blob[:start] + values.tobytes() + blob[end:]
    return blob


def change_bytes(data, rng):
    """Truncate, flip bits, overwrite or insert bytes, or lie about the header's length."""
    data = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if kind == 1:
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        start = rng.randrange(len(data))
        data[start : start + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
    elif kind == 3:
        sizes = [0, 1, 2**24 + 1, 2**31, 2**63, 2**64 - 1, len(data), len(data) - 8]
        data[:8] = rng.choice(sizes).to_bytes(8, "little")
    elif kind == 4:
        data += rng.randbytes(rng.randrange(1, 100))
    else:
        start = rng.randrange(len(data))
        data[start : start + rng.randrange(64)] = b"\0" * 64
    return bytes(data)


def text_tricks(text, rng):
    """JSON that is not quite JSON, or too much of it."""
    deep = rng.choice([50, 100, 900, 5000, 100_000])
    tricks = [
        text.replace("1", "NaN", 1),
        text.replace("0", "-Infinity", 1),
        text.replace("{", '{"format": "uq-model", ', 1),
        text.replace('"params": {', '"params": {"hidden": 3, "hidden": 4, ', 1),
        text.replace("null", "[" * deep + "]" * deep, 1),
        text.replace("null", '{"tuple": [' * deep + "]}" * deep, 1),
        text.replace("null", "9" * 5000, 1),
        text.replace("null", "1e999", 1),
        text.replace("true", '"\\ud800"', 1),
        text.replace("null", "[" + "[]," * 300_000 + "0]", 1),
        text[:-1],
        "",
        "null",
        "[]",
    ]
    return rng.choice(tricks)


def mutate(data, rng):
    """One hostile file made of a good one, and what was done to it."""
    kind = rng.choice(["bytes", "header", "header", "header", "tensors", "text"])
    if kind == "bytes":
        return kind, change_bytes(data, rng)
    header, blob = split(data)
    if kind == "tensors":
        blob = change_tensors(header, blob, rng)
    elif kind == "header":
        uq = json.loads(header["__metadata__"]["uq"])
        change_json(uq, rng)
        header["__metadata__"]["uq"] = json.dumps(uq)
    else:
        header["__metadata__"]["uq"] = text_tricks(header["__metadata__"]["uq"], rng)
    return kind, join(header, blob)


def meet(path):
    """Load a file and predict with it; return what came of it, or raise what should not."""
    import torch

    import uq

    start = time.process_time()  # of this process: the machine may be busy
    try:
        model = uq.load(path)
    except (uq.UQError, FileNotFoundError):
        outcome = "refused"
    else:
        outcome = "loaded"
    seconds = time.process_time() - start
    if seconds > LIMIT_SECONDS:
        raise AssertionError(f"{path}: {seconds:.1f} s to load")
    if outcome == "loaded" and hasattr(model, "predict_distribution"):
        from uq.models.loading import _leaves, _row

        for leaf in _leaves(model):
            if hasattr(leaf, "n_samples"):
                leaf.n_samples = min(leaf.n_samples, 8)
        row = _row(model)
        try:
            dist = model.predict_distribution(row)
            values = dist.probs if hasattr(dist, "probs") else dist.mean
        except uq.UQError:
            return "loaded, does not predict"
        # Finite weights of absurd size may still overflow under some draw.
        return "loaded, predicts" if torch.isfinite(values).all() else "loaded, predicts NaN"
    return outcome


def good_files(folder):
    """Write a file for each kind of thing that files hold."""
    import pandas as pd
    from sklearn.datasets import load_diabetes, load_wine

    import uq
    from tests.contract.estimators import make

    folder = Path(folder)
    X, y = load_wine(return_X_y=True)
    D, z = load_diabetes(return_X_y=True)
    X, y, D, z = X[::3, :3], y[::3], D[::6, :3], z[::6]
    labels = np.array(["low", "middle", "high"])[y]
    table = pd.DataFrame({"a": X[:, 0], "b": np.where(X[:, 1] > 2, "dark", "light")})
    table.loc[3, "a"] = np.nan
    small = {"hidden": (4,), "max_epochs": 2}
    regressor, classifier = (
        make("map", task, **small) for task in ("regression", "classification")
    )
    models = {
        "ivon": make("ivon", "regression", **small).fit(pd.DataFrame(D, columns=list("abc")), z),
        "mixture": make("ivon", "classification", n_members=2, **small).fit(X, labels),
        "ensemble": make("ensemble", "regression", **small).fit(D, np.c_[z, z]),
        "vbll": make("vbll", "classification", **small).fit(X, labels),
        "evidential": make("evidential", "regression", **small).fit(D, z),
        "etp": make("etp", "classification", **small).fit(X, y),
        "ssvi": make("ssvi", "regression", **small).fit(D, z),
        "sdm": make("sdm", "classification", **small).fit(X, y),
        "implicit": make("implicit", "classification", **small).fit(X, labels),
        "abnn": make("abnn", "regression", **small).fit(D, z),
        "pbnn": make("pbnn", "regression", **small).fit(D, z),
        "masked": make("masked", "regression", **small).fit(D, z),
        "exact": make("gp", "regression", max_epochs=2).fit(D[:20], z[:20]),
        "gp": make("gp", "classification", max_epochs=2, hidden=(2,)).fit(X, y),
        "table": uq.TableModel(classifier).fit(table, labels),
        "calibrated": uq.Calibrated(regressor, method="isotonic", cv=0.6).fit(D, z),
        "scaled": uq.Calibrated(classifier, cv=2).fit(X, labels),
        "conformal": uq.Conformal(classifier, coverage=0.5).fit(X, labels),
        "folds": uq.Conformal(regressor, coverage=0.5, cv=2).fit(D, z),
    }
    for name, model in models.items():
        model.save(folder / f"{name}.uq")
    return {path.stem: path.read_bytes() for path in sorted(folder.glob("*.uq"))}


def campaign(n, seed, files, path, limit_bytes=None):
    """Try ``n`` mutations; count (kind, outcome)."""
    rng = random.Random(seed)
    counts = Counter()
    names = sorted(files)
    for i in range(n):
        name = names[i % len(names)]
        kind, data = mutate(files[name], rng)
        path.write_bytes(data)
        try:
            outcome = meet(path)
        except Exception as error:
            kept = path.with_name(f"finding-{i}-{name}-{kind}.uq")
            kept.write_bytes(data)
            raise AssertionError(f"{kept}: {type(error).__name__}: {error}") from error
        counts[kind, outcome] += 1
    return counts


def main(n, seed):
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        files = good_files(folder)
        for name in files:  # each is good before it is changed
            path = Path(folder) / f"{name}.uq"
            assert meet(path) == "loaded, predicts", name
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        used = int(status["VmSize"].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        out = Path(os.environ.get("UQ_FUZZ_OUT", folder)) / "tried.uq"
        start, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts = campaign(n, seed, files, out)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    print(f"{sum(counts.values())} files tried in {time.perf_counter() - start:.0f} s, seed {seed}")
    print(f"peak memory grew by {grown / 1024:.0f} MB; 0 crashes, 0 other errors")
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:10}{outcome:28}{count:8}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

"""Whatever a file holds: a clear error, in no time, in little memory, with nothing executed."""

import json
import os
import random
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import uq
from tests import hostile
from tests.hostile import join, meet, mutate, split
from uq.errors import LoadError, ParameterError
from uq.inference.checkpoints import read_run
from uq.migrations import FORMAT_VERSION, MIGRATIONS
from uq.models.loading import TYPES, _fitted_fields, fitted_names
from uq.models.registry import METHODS, estimator_class
from uq.plain import PlainWriter, read_state, state_bytes

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def model():
    X = np.random.default_rng(0).normal(size=(40, 3))
    return uq.MAPClassifier(hidden=(4,), max_epochs=2, random_state=0).fit(X, X[:, 0] > 0)


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.uq"
    model.save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def old():
    """Files of the version before, as seeds of the mutations."""
    return {path.stem: path.read_bytes() for path in FIXTURES.glob("*.uq")}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.uq"


def edited(data, change):
    header, blob = split(data)
    document = json.loads(header["__metadata__"]["uq"])
    change(document["model"])
    header["__metadata__"]["uq"] = json.dumps(document)
    return join(header, blob)


# -- versions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ivon", "vbll", "table", "calibrated"])
def test_files_of_the_version_before(name):
    """Written by format version 1, before estimators had ``checkpoint_dir``."""
    known = json.loads((FIXTURES / "version-1.json").read_text())["models"][name]
    header, _ = split((FIXTURES / f"{name}-version-1.uq").read_bytes())
    assert json.loads(header["__metadata__"]["uq"])["version"] == 1
    assert "checkpoint_dir" not in header["__metadata__"]["uq"]
    loaded = uq.load(FIXTURES / f"{name}-version-1.uq")
    rows = known["rows"]
    dist = loaded.predict_distribution(pd.DataFrame(rows) if isinstance(rows, dict) else rows)
    values = dist.probs if hasattr(dist, "probs") else dist.mean
    # float32 networks: another processor sums in another order.
    np.testing.assert_allclose(values.numpy(), known["prediction"], rtol=1e-4)
    leaf = getattr(loaded, "estimator_", loaded)
    assert (leaf.checkpoint_dir, leaf.callbacks) == (None, ())


def test_the_version_before_is_all_that_is_read():
    assert set(MIGRATIONS) == {FORMAT_VERSION - 1}


@pytest.mark.parametrize("version", [0, 3, 99, -1, "2", 2.0, True, None, [2]])
def test_other_versions_say_who_wrote_them(good, path, version):
    header, blob = split(good)
    document = json.loads(header["__metadata__"]["uq"]) | {"version": version, "uq": "9.9"}
    header["__metadata__"]["uq"] = json.dumps(document)
    path.write_bytes(join(header, blob))
    with pytest.raises(LoadError, match=r"reads 1 and 2. It was written by uq '9.9'"):
        uq.load(path)


@pytest.mark.parametrize(("method", "task"), [(m, t) for m in METHODS for t in METHODS[m].tasks])
def test_every_fitted_attribute_has_a_type_that_files_are_held_to(method, task):
    cls = estimator_class(method, task)
    for field in _fitted_fields(cls):
        assert field.name == "posterior_" or field.type in TYPES, field
    assert "params_" not in fitted_names(cls)


# -- attacks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update({"class": "os.system"}),
        lambda m: m.update({"class": "_MAP"}),
        lambda m: m.update({"class": ["MAPClassifier"]}),
        lambda m: m.update(needs=["base"]),
        lambda m: m.update(needs=["__init__"]),
        lambda m: m["params"].update(callbacks={"tuple": ["print"]}),
        lambda m: m["params"].update(checkpoint_dir="/tmp/elsewhere"),
        lambda m: m["params"].update(module="torch.nn.Linear"),
        lambda m: m["params"].update(self=1),
        lambda m: m["params"].update(device="/dev/sda"),
        lambda m: m["params"].update(device="meta"),
        lambda m: m["params"].update(n_epochs_=1),
        lambda m: m["params"].update(hidden={"tuple": [10**12]}),
        lambda m: m["params"].update(hidden={"tuple": [1] * 100_000}),
        lambda m: m["params"].update(hidden=[4, [4]]),
        lambda m: m["params"].update(lr={"float": "nan"}),
        lambda m: m["params"].update(max_epochs=10**40),
        lambda m: m["params"].update(precision="64-true"),
        lambda m: m["fitted"].update(__class__="x"),
        lambda m: m["fitted"].update(__dict__={"dict": []}),
        lambda m: m["fitted"].update(_dtype="x"),
        lambda m: m["fitted"].update(predict="x"),
        lambda m: m["fitted"].update(params_={"dict": []}),
        lambda m: m["fitted"].update(posterior_="x"),
        lambda m: m["fitted"].update(classes_=m["fitted"]["posterior_"]),
        lambda m: m["fitted"].update(history_={"dict": [["train_loss", "long ago"]]}),
        lambda m: m["fitted"].update(input_shape_={"tuple": [10**12]}),
        lambda m: m["fitted"].update(input_shape_={"tuple": [3, 10**12]}),
        lambda m: m["fitted"].update(input_shape_={"tuple": []}),
        lambda m: m["fitted"].update(n_features_in_=4),
        lambda m: m["fitted"].update(n_epochs_=-1),
        lambda m: m["fitted"].update(x_mean_=None),
        lambda m: m["fitted"].update(x_mean_=m["fitted"]["x_scale_"]),
        lambda m: m["fitted"].update(
            classes_={"array": ["a", None], "shape": [2], "dtype": "object"}
        ),
        lambda m: m["fitted"].update(classes_={"array": ["b", "a"], "shape": [2], "dtype": "str"}),
        lambda m: m["fitted"].update(
            classes_={"array": ["a", ["b"]], "shape": [2], "dtype": "object"}
        ),
        lambda m: m["fitted"].update(
            feature_names_in_={"array": [1, 2, 3], "shape": [3], "dtype": "object"}
        ),
        lambda m: m["fitted"].update(
            feature_names_in_={"array": ["\ud800", "b", "c"], "shape": [3], "dtype": "object"}
        ),
    ],
)
def test_attacks_by_the_header(good, path, change):
    path.write_bytes(edited(good, change))
    start = time.perf_counter()
    with pytest.raises(LoadError, match="usable") as caught:
        uq.load(path)
    assert time.perf_counter() - start < hostile.LIMIT_SECONDS
    assert str(caught.value).isprintable()


def test_draws_without_number_are_refused(path):
    X = np.random.default_rng(0).normal(size=(40, 3))
    model = uq.IVONRegressor(hidden=(4,), max_epochs=1, random_state=0).fit(X, X[:, 0])
    model.save(path)
    good = path.read_bytes()
    for attack in ({"n_samples": 10**12}, {"n_samples": 0}, {"n_samples": True}):
        path.write_bytes(edited(good, lambda m, attack=attack: m["params"].update(attack)))
        with pytest.raises(LoadError, match="n_samples"):
            uq.load(path)
    path.write_bytes(edited(good, lambda m: m["fitted"].update(n_members_=10**12)))
    with pytest.raises(LoadError, match="larger network"):
        uq.load(path)
    names = split(good)[0]
    std = next(name for name in names if name.endswith("std_0"))
    start, _ = names[std]["data_offsets"]
    header, blob = split(good)
    for value, message in ((-1.0, "negative"), (np.nan, "NaN"), (np.inf, "infinity")):
        bad = blob[:start] + np.float32(value).tobytes() + blob[start + 4 :]
        path.write_bytes(join(header, bad))
        with pytest.raises(LoadError, match=message):
            uq.load(path)


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("tensors", "blob"),
    [
        ({"a": entry(shape=[10**12], offsets=[0, 4 * 10**12])}, b"1234"),
        ({"a": entry(shape=[2**62, 4])}, b"1234"),
        ({"a": entry(shape=[-1])}, b"1234"),
        ({"a": entry(shape=[1.0])}, b"1234"),
        ({"a": entry(shape=[True])}, b"1234"),
        ({"a": entry(shape=[0, 10**12], offsets=[0, 0])}, b""),
        ({"a": entry(shape=[1] * 1000)}, b"1234"),
        ({"a": entry(dtype="OBJECT")}, b"1234"),
        ({"a": entry(dtype=["F32"])}, b"1234"),
        ({"a": entry(dtype="BOOL", shape=[4])}, b"\x01\x00\x02\x00"),
        ({"a": entry(offsets=[4, 8])}, b"12341234"),
        ({"a": entry(offsets=[0, 4, 8])}, b"1234"),
        ({"a": entry(), "b": entry()}, b"1234"),
        ({"a": entry()}, b"12345"),
        ({"a": entry() | {"more": 1}}, b"1234"),
        ({"a": 3}, b""),
    ],
)
def test_attacks_by_the_tensors(path, tensors, blob):
    path.write_bytes(join({"__metadata__": {"uq": "{}"}, **tensors}, blob))
    with pytest.raises(LoadError):
        uq.load(path)
    with pytest.raises(LoadError):
        read_state(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "uq-model", "format": "uq-model"}',
        '{"format": NaN}',
        '{"format": -Infinity}',
        '{"format": 1' + "0" * 5000 + "}",
        "[" * 100_000,
        '{"format": "uq-model", "version": 2, "model": [' + "{}," * 600_000 + "0]}",
        "null",
        '"\\ud800"',
    ],
)
def test_text_that_is_not_strict_json(path, text):
    save_file({"a": torch.ones(1)}, path, {"uq": text})
    tracemalloc.start()
    with pytest.raises(LoadError):
        uq.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6


def test_a_text_array_as_long_as_its_longest_item(good, path):
    long = {"array": ["x" * 10**6] + ["y"] * 5000, "shape": [5001], "dtype": "str"}  # 20 GB
    path.write_bytes(edited(good, lambda m: m["fitted"].update(classes_=long)))
    with pytest.raises(LoadError, match="too large"):
        uq.load(path)


def test_a_user_module_is_never_in_the_file(path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    X = np.random.default_rng(0).normal(size=(40, 3))
    uq.MAPClassifier(module=net, max_epochs=1, random_state=0).fit(X, X[:, 0] > 0).save(path)
    with pytest.raises(LoadError, match=re.escape("uq.load(path, module=...)")):
        uq.load(path)
    with pytest.raises(LoadError, match="usable"):
        uq.load(path, module=torch.nn.Linear(3, 2))
    with pytest.raises(LoadError, match="must be a torch"):
        uq.load(path, module="torch.nn.Linear")
    assert uq.load(path, module=net).predict_proba(X).shape == (40, 2)


def test_nothing_that_a_file_names_is_imported_or_opened(good, tmp_path):
    """Paths and modules that a file names, in a process that watches what is opened."""
    for i, target in enumerate(["antigravity", str(tmp_path / "secret"), "os.system"]):
        for where in ("class", "device", "needs"):

            def change(m, where=where, target=target):
                if where == "device":
                    m["params"]["device"] = target
                else:
                    m[where] = target if where == "class" else [target]

            (tmp_path / f"{i}-{where}.uq").write_bytes(edited(good, change))
    (tmp_path / "secret").write_text("x")
    script = f"""
import sys, pathlib, uq
from uq.models.map import MAPClassifier
from uq.io import load
import uq.models.vbll
files = sorted(pathlib.Path({str(tmp_path)!r}).glob("*.uq"))
opened = []
def watch(event, args):
    if event == "open": opened.append(str(args[0]))
    if event in ("import", "exec", "subprocess.Popen", "os.system", "socket.connect", "compile"):
        opened.append(event + str(args[:1]))
try: load(files[0])
except uq.UQError: pass
sys.addaudithook(watch)
for file in files:
    try: load(file)
    except uq.UQError: pass
    else: print("loaded", file)
print([o for o in opened if not o.endswith(".uq")])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


# -- what is not a file ----------------------------------------------------------------------------


def test_what_is_not_a_file(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)
    odd = [tmp_path, tmp_path / "loop", tmp_path / "empty", tmp_path / "pipe", "/dev/zero"]
    odd += ["a\0b", "x" * 5000, tmp_path / "secret" / "below", tmp_path / "sparse", "/dev/null"]
    for where in odd:
        for read in (uq.load, read_state):
            start = time.perf_counter()
            with pytest.raises((LoadError, FileNotFoundError)):
                read(where)
            assert time.perf_counter() - start < 1, where
    for wrong in (3, None, b"model.uq", ["x"]):
        with pytest.raises(uq.UQError):
            uq.load(wrong)
    with pytest.raises(FileNotFoundError, match="no model file"):
        uq.load("")


def test_the_run_of_a_checkpoint(tmp_path):
    run = tmp_path / "run.json"
    assert read_run(tmp_path) is None
    good = json.dumps({"format": 1, "estimator": "MAPClassifier", "seed": 3, "lr": 0.1})
    run.write_text(good)
    assert read_run(tmp_path)["seed"] == 3
    attacks = [good[:-3], "", "null", "[1]", "[" * 10**5, good.replace("3", "NaN"), "\ud800"]
    attacks += [good.replace("3", x) for x in ('"3"', "-1", "1e999", "true", "9" * 5000, "2.5")]
    attacks += [good.replace("}", ', "seed": 4}'), good.replace("0.1", "x" * 100), " " * 2**24]
    for text in attacks:
        run.write_text(text, errors="surrogatepass")
        with pytest.raises(LoadError, match="cannot be read"):
            read_run(tmp_path)
    run.unlink()
    os.mkfifo(run)
    with pytest.raises(LoadError, match="cannot be read"):
        read_run(tmp_path)


def test_saving_refuses_what_loading_would(monkeypatch, tmp_path):
    with pytest.raises(ParameterError, match="Unicode"):
        state_bytes({"a": "\ud800"})
    with pytest.raises(ParameterError, match="64 bits"):
        state_bytes({"a": 10**30})
    with pytest.raises(ParameterError, match="at most"):
        state_bytes(["x" * 2**24])
    with pytest.raises(ParameterError, match="entries"):
        state_bytes([0] * 2**19)
    (tmp_path / "state").write_bytes(state_bytes({1: torch.ones(1), "1": torch.zeros(1)}))
    again = read_state(tmp_path / "state")  # two keys that look alike
    assert (float(again[1]), float(again["1"])) == (1.0, 0.0)
    assert PlainWriter().encode(np.float32(0.5), "x") == 0.5


# -- many ------------------------------------------------------------------------------------------


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=2000)
@given(PLAIN)
def test_plain_data_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("state") / "s"
    path.write_bytes(state_bytes(value))
    assert repr(read_state(path)) == repr(value)


JSON = st.recursive(
    st.sampled_from([h for h in hostile.HOSTILE if not isinstance(h, dict | list)])
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["tuple", "dict", "float", "array", "shape", "class", "params", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 10**6), name=st.integers(0, 3), value=JSON)
def test_any_json_in_any_place(old, tmp_path, place, name, value):
    header, blob = split(old[sorted(old)[name]])
    document = json.loads(header["__metadata__"]["uq"])
    places = hostile.nodes(document)
    at, key = places[place % len(places)]
    at[key] = value
    header["__metadata__"]["uq"] = json.dumps(document)
    (tmp_path / "m.uq").write_bytes(join(header, blob))
    meet(tmp_path / "m.uq")


@settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.integers(0, 3),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8)), max_size=4),
    cut=st.floats(0.01, 1),
)
def test_any_bytes_in_any_place(old, tmp_path, name, edits, cut):
    data = bytearray(old[sorted(old)[name]])
    for share, new in edits:
        start = int(share * len(data))
        data[start : start + len(new)] = new
    (tmp_path / "m.uq").write_bytes(data[: int(cut * len(data))] if cut < 0.3 else data)
    meet(tmp_path / "m.uq")


def test_mutations_of_models(old, good, path):
    counts = hostile.campaign(300, 1, old | {"new": good}, path)
    assert sum(counts.values()) == 300
    assert {outcome for _, outcome in counts} > {"refused"}  # some are harmless


def test_mutations_of_checkpoints(tmp_path):
    state = {
        "epoch": 3,
        "best": [torch.ones(2, 3), torch.zeros(0)],
        "history": {"train_loss": [0.5, float("nan")]},
        "objects": {"a.b": torch.arange(4), "t": (None, True, "x")},
    }
    good, rng = state_bytes(state), random.Random(0)
    refused = 0
    for _ in range(300):
        (tmp_path / "s").write_bytes(mutate(good, rng)[1])
        try:
            read_state(tmp_path / "s")
        except LoadError:
            refused += 1
    assert refused > 100


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_tens_of_thousands_in_little_memory(capsys):
    """In a process that may take 256 MB more than it had after loading the good files."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.hostile", "40000", "0"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    with capsys.disabled():
        print("\n" + run.stdout)
    assert run.returncode == 0, run.stderr

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from uq.cli import commands, doctor, main, outputs
from uq.cli.budget import ORDER, affordable
from uq.cli.inputs import table_model
from uq.cli.parser import parser
from uq.data import load_dataset
from uq.errors import FitInterruptedWarning
from uq.io import load
from uq.models.registry import METHODS, QUICK
from uq.texts import spelled_seconds

UQ = [sys.executable, "-m", "uq"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has its own working folder with two small tables."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    size = rng.normal(size=60)
    flats = pd.DataFrame(
        {"size": size, "city": rng.choice(["Oslo", "Rome"], 60), "price": 3 * size + 10}
    )
    flats.to_csv("flats.csv", index=False)
    flats.assign(sold=np.where(size > 0, "yes", "no")).drop(columns="price").to_csv(
        "sold.csv", index=False
    )
    return tmp_path


@pytest.fixture
def model():
    assert main(_fit("sold.csv", "sold", "sold.uq")) == 0
    return "sold.uq"


def _fit(data, target, out, *more):
    always = ["--method", "map", "--out", out, "--set", "max_epochs=2"]
    return ["fit", data, "--target", target, *always, *more]


def _run(*argv):
    """Run the command as a shell does."""
    return subprocess.run([*UQ, *argv], capture_output=True, text=True, check=False)


# -- what works ----------------------------------------------------------------------------------


def test_help_imports_neither_torch_nor_pandas():
    code = (
        "import sys; from uq.cli import main; main(['--help']); main(['compare', '--help']); "
        "sys.exit(bool({'torch', 'pandas', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("compare", "fit", "predict", "report", "methods"):
        assert command in done.stdout


def test_methods_lists_every_method(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    one_task = [name for name in METHODS if "regression" not in METHODS[name].tasks]
    assert text.count("; classification only\n") == len(one_task) > 0
    assert all(name in text for name in METHODS)
    assert main(["methods", "--json"]) == 0
    assert [m["method"] for m in json.loads(capsys.readouterr().out)] == list(METHODS)


def test_compare_bundled_data(capsys):
    assert main(["compare", "moons", "--max-epochs", "1"]) == 0
    out, err = capsys.readouterr()
    html = Path(out.strip().splitlines()[-1])
    assert html == Path("reports/moons/report.html")
    assert html.exists()
    assert html.with_name("report.json").exists()
    for name in QUICK:
        assert name in out
        assert f"{name}: fitted in" in err
    assert "450" in out  # rows to fit: 75 % of 600
    assert "far ring" in out
    assert "AUROC" in out


def test_compare_a_file_as_json(capsys):
    argv = ["compare", "flats.csv", "--target", "price", "--methods", "map,VBLL,map", "--json"]
    argv += ["--max-epochs", "1", "--out", "here", "--ood", "flats.csv", "--test-size", "0.4"]
    assert main([*argv, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(out)
    assert document["task"] == "regression"
    assert set(document["methods"]) == {"map", "vbll"}
    assert (document["n"], document["n_ood"]) == (24, 60)
    assert {x["method"]: x["seconds"] > 0 for x in document["ranking"]} == {
        "map": True,
        "vbll": True,
    }
    assert Path(document["html"]) == Path("here/report.html")
    assert main(argv) == 0  # with progress, which goes to stderr
    assert json.loads(capsys.readouterr().out)["title"] == "flats"


def test_compare_takes_the_quick_methods_or_all_that_do_the_task(capsys, monkeypatch):
    argv = ["compare", "flats.csv", "--target", "price", "--max-epochs", "1", "--json", "--quiet"]
    assert main(argv) == 0
    assert set(json.loads(capsys.readouterr().out)["methods"]) == set(QUICK)
    some = {name: METHODS[name] for name in ("sdm", "evidential", "map")}
    monkeypatch.setattr("uq.models.registry.METHODS", some)
    assert main([*argv, "--methods", "all"]) == 0
    assert set(json.loads(capsys.readouterr().out)["methods"]) == {"evidential", "map"}
    assert main([*argv, "--methods", "map,sdm"]) != 0
    assert "'sdm' does not do regression" in capsys.readouterr().err


def test_a_report_may_be_one_file(capsys):
    argv = ["compare", "flats.csv", "--target", "price", "--methods", "map", "--quiet"]
    assert main([*argv, "--max-epochs", "1", "--out", "new/flats.md"]) == 0
    assert Path("new/flats.md").read_text().startswith("#")
    assert capsys.readouterr().out.strip().endswith("flats.md")


def test_groups_are_columns_and_numbers_go_by_quarters(capsys):
    argv = ["compare", "flats.csv", "--target", "price", "--methods", "map", "--json", "--quiet"]
    assert main([*argv, "--max-epochs", "1", "--groups", "city,size"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    table = pd.read_csv("flats.csv")
    cities = [g["label"] for g in groups if g["grouping"] == "city"]
    assert set(cities) <= {*map(str, table["city"].dropna().unique()), "missing"}
    assert len([g for g in groups if g["grouping"] == "size"]) == 4
    code, line = _error(capsys, *argv, "--groups", "colour")
    assert code == 1
    assert "--groups: flats has no column 'colour'; it has" in line


def test_targets_of_every_dtype(capsys):
    X = pd.read_csv("sold.csv")[["size"]]
    positive = (X["size"] > 0).rename("y")
    kinds = {
        "bool": positive,
        "boolean": positive.astype("boolean"),
        "category": positive.map({True: "a", False: "b"}).astype("category"),
        "string": positive.map({True: "a", False: "b"}).astype("string"),
        "Int64": positive.astype("Int64"),
        "Float64": X["size"].rename("y").astype("Float64"),
    }
    for kind, y in kinds.items():
        X.join(y).to_parquet(f"{kind}.parquet")
        argv = ["compare", f"{kind}.parquet", "--target", "y", "--methods", "map", "--json"]
        assert main([*argv, "--max-epochs", "1", "--quiet"]) == 0
        task = json.loads(capsys.readouterr().out)["task"]
        assert task == ("regression" if kind == "Float64" else "classification")


def test_same_seed_same_report(capsys):
    argv = ["compare", "sold.csv", "--target", "sold", "--methods", "map", "--json", "--quiet"]
    methods = []
    for seed in ("1", "1", "2"):
        assert main([*argv, "--max-epochs", "1", "--seed", seed]) == 0
        methods.append(json.loads(capsys.readouterr().out)["methods"])
    assert methods[0] == methods[1] != methods[2]


def test_regression_from_fit_to_report(capsys):
    settings = ["--set", "hidden=8,8", "--set", "device=cpu", "--seed", "7"]
    assert main(_fit("flats.csv", "price", "m.uq", *settings)) == 0
    assert "MAPRegressor fitted on 60 rows, 2 columns" in capsys.readouterr().out
    saved = load("m.uq")
    inner = saved.estimator
    assert (inner.hidden, inner.device, inner.random_state) == ((8, 8), "cpu", 7)

    assert main(["predict", "m.uq", "flats.csv", "--coverage", "0.5"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(table) == ["mean", "std", "lower", "upper", "aleatoric", "epistemic"]
    X = pd.read_csv("flats.csv")
    lower, upper = saved.predict_interval(X, 0.5)
    np.testing.assert_allclose(table["mean"], saved.predict(X), rtol=1e-6)
    np.testing.assert_allclose(table[["lower", "upper"]].T, [lower, upper], rtol=1e-6)
    assert table["epistemic"].isna().all()  # MAP has none

    assert main(["report", "m.uq", "flats.csv", "--target", "price", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["title"] == "m on flats"
    assert Path("reports/m/report.html").exists()


def test_classification_from_fit_to_report(model, capsys):
    saved, X = load(model), pd.read_csv("sold.csv")
    for out in ("p.csv", "p.parquet"):
        assert main(["predict", model, "sold.csv", "--out", out]) == 0
    for table in (pd.read_csv("p.csv"), pd.read_parquet("p.parquet")):
        assert list(table) == ["label", "p_no", "p_yes", "entropy"]
        assert table["label"].tolist() == saved.predict(X).tolist()
        np.testing.assert_allclose(table[["p_no", "p_yes"]], saved.predict_proba(X), rtol=1e-6)
        p = saved.predict_proba(X)
        np.testing.assert_allclose(table["entropy"], -(p * np.log(p)).sum(1), rtol=1e-5)
    capsys.readouterr()
    assert main(["report", model, "sold.csv", "--target", "sold", "--ood", "sold.csv"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(str(Path("reports/sold/report.html")))


@pytest.mark.parametrize(
    "labels",
    [
        ["1", "3", "20"],
        ["1.0", "2.0", "1234567890.0"],
        ["False", "True"],
        ["a,b", 'say "q"', "ünï\ntwo lines"],
        ["=1+1", "a", "b "],
    ],
)
def test_predictions_hold_the_labels_of_the_file(labels, capsys):
    group = np.arange(30) * len(labels) // 30
    given = [labels[g] for g in group]
    pd.DataFrame({"size": 5.0 * group, "kind": given}).to_csv("kinds.csv", index=False)
    more = ["--task", "classification", "--set", "max_epochs=60", "--set", "lr=0.05"]
    assert main(_fit("kinds.csv", "kind", "kinds.uq", *more)) == 0
    capsys.readouterr()
    assert main(["predict", "kinds.uq", "kinds.csv"]) == 0
    assert main(["predict", "kinds.uq", "kinds.csv", "--out", "p.csv"]) == 0
    for source in (io.StringIO(capsys.readouterr().out), "p.csv"):
        table = pd.read_csv(source, dtype=str)
        assert table["label"].tolist() == given  # groups far apart are told apart
        assert list(table) == ["label", *(f"p_{label}" for label in labels), "entropy"]


@pytest.mark.parametrize(
    ("fitted", "reported"), [([1, 2], ["01", "02"]), ([False, True], ["false", "TRUE"])]
)
def test_a_report_reads_labels_as_the_model_was_fitted(fitted, reported):
    group = np.arange(30) % 2
    pd.DataFrame({"size": 5.0 * group, "kind": [fitted[g] for g in group]}).to_parquet("k.parquet")
    more = ["--task", "classification", "--set", "max_epochs=60", "--set", "lr=0.05"]
    assert main(_fit("k.parquet", "kind", "k.uq", *more)) == 0
    given = [reported[g] for g in group]
    pd.DataFrame({"size": 5.0 * group, "kind": given}).to_csv("other.csv", index=False)
    assert main(["report", "k.uq", "other.csv", "--target", "kind", "--out", "r.json"]) == 0
    found = json.loads(Path("r.json").read_text())
    assert found["methods"]["k"]["estimates"]["accuracy"]["value"] == 1  # they are far apart


def test_row_labels_are_kept_and_row_numbers_are_not(model, capsys):
    table = pd.read_csv("sold.csv")
    table.set_axis([f"row{i}" for i in range(60)]).to_csv("named.csv")
    capsys.readouterr()
    assert main(["predict", model, "named.csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("row0,")
    assert main(["predict", model, "sold.csv"]) == 0
    assert capsys.readouterr().out.startswith("label,")


def test_predict_needs_no_target_and_no_order(model):
    table = pd.read_csv("sold.csv")
    table[["city", "size"]].assign(more=1).to_csv("rows.csv", index=False)
    assert main(["predict", model, "rows.csv", "--out", "a.csv"]) == 0
    assert main(["predict", model, "sold.csv", "--out", "b.csv"]) == 0
    assert Path("a.csv").read_text() == Path("b.csv").read_text()


# -- what does not -------------------------------------------------------------------------------


def _error(capsys, *argv):
    """Run, and return the exit code and the one line on stderr."""
    capsys.readouterr()
    code = main(list(argv))
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("map: ")]  # progress
    assert out == ""
    assert len(lines) == 1
    assert lines[0].startswith("uq: error: ")
    return code, lines[0].removeprefix("uq: error: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("guess", "invalid choice: 'guess'"),
        ("compare", "required: DATA (see uq compare --help)"),
        ("compare moons --bogus", "unrecognized arguments: --bogus"),
        ("compare moons --methods ivan", "method 'ivan' is unknown; did you mean 'ivon'?"),
        ("compare moons --methods ,", "--methods names no method"),
        ("compare moons --test-size 1", "--test-size: needs a number between 0 and 1, got '1'"),
        ("compare moons --max-epochs 0", "--max-epochs: needs a whole number from 1 on, got '0'"),
        ("compare moons --seed x", "--seed: needs a whole number from 0 to 2^32 - 1, got 'x'"),
        ("compare moons --target moon", "moons is bundled with its target"),
        ("compare flats.csv", "flats.csv is a file: name the column to predict with --target"),
        ("compare moons --task ranking", "--task: invalid choice: 'ranking'"),
        ("fit moons --out m.uq", "required: --method"),
        ("fit moons --out m.uq --method zzz", "'zzz' is unknown; there are ivon, vbll"),
        ("fit moons --out m.uq --method map --set lr", "--set takes NAME=VALUE, got 'lr'"),
        ("fit moons --out m.uq --method map --set lr=[1", "neither a Python literal nor a word"),
        ("fit moons --out m.uq --method map --set lrr=1", "no parameter 'lrr'; did you mean 'lr'?"),
        ("predict m.uq flats.csv --out p.txt", "--out must end in .csv or .parquet, got p.txt"),
        ("predict m.uq flats.csv --coverage 90", "--coverage: needs a number between 0 and 1"),
    ],
)
def test_usage_errors(capsys, argv, message):
    code, line = _error(capsys, *argv.split())
    assert message in line
    assert code == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("compare moon", "did you mean 'moons'?"),
        ("compare nope.csv --target y", "nope.csv: there is no such file"),
        ("compare empty.csv --target y", "empty.csv: the file is empty"),
        ("compare ragged.csv --target b", "Expected 2 fields in line 3, saw 3"),
        ("compare binary.csv --target b", "not UTF-8 text"),
        ("compare flats.csv --target Pricee", "no column 'Pricee'; did you mean 'price'?"),
        ("compare moons --task regression", "moons is a classification data set"),
        ("compare moons --ood flats.csv", "flats.csv: there is no column 'x1'"),
        ("compare moons --ood nope.csv", "nope.csv: there is no such file"),
        ("compare moons --out flats.csv", "flats.csv: File exists"),
        ("compare one.csv --target b --task classification --methods map", "at least 2 classes"),
        ("compare sold.csv --target sold --task regression --methods map", "needs numbers as y"),
        ("compare inf.csv --target b --methods map", "'a' must hold finite numbers"),
        ("compare gap.csv --target b", "'b' is missing in 1 of 2 rows (first: row 1)"),
        ("fit moons --method map --out no/m.uq", "no/m.uq: the folder no does not exist"),
        ("fit moons --method map --out .", "is a folder"),
        ("fit moons --method map --out m.uq --set lr=-1", "MAPClassifier: lr must be"),
        ("predict nope.uq flats.csv", "there is no model file at 'nope.uq'"),
        ("predict flats.csv flats.csv", "flats.csv"),
        ("predict zeros.uq flats.csv", "zeros.uq"),
        ("predict . flats.csv", "'.' cannot be read: Is a directory"),
    ],
)
def test_failures(capsys, argv, message):
    Path("empty.csv").touch()
    Path("ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    Path("binary.csv").write_bytes(bytes(range(256)))
    Path("one.csv").write_text("a,b\n" + "".join(f"{i},7\n" for i in range(20)))
    Path("inf.csv").write_text("a,b\n" + "".join(f"inf,{i}.5\n" for i in range(20)))
    Path("gap.csv").write_text("a,b\n1,x\n2,\n")
    Path("zeros.uq").write_bytes(bytes(1000))
    code, line = _error(capsys, *argv.split())
    assert message in line
    assert code == 1
    assert not Path("m.uq").exists()


def test_columns_that_changed_since_the_fit(model, capsys):
    table = pd.read_csv("sold.csv")
    table.drop(columns="city").to_csv("less.csv", index=False)
    code, line = _error(capsys, "predict", model, "less.csv")
    assert (code, line) == (1, "1 of the 2 columns seen in training is missing: 'city'.")
    table.astype({"size": object}).replace({"size": {table["size"][5]: "big"}}).to_csv(
        "text.csv", index=False
    )
    code, line = _error(capsys, "predict", model, "text.csv")
    assert "column 'size' must hold finite numbers or gaps, got 'big' in row 5" in line
    table.assign(sold="maybe").to_csv("label.csv", index=False)
    code, line = _error(capsys, "report", model, "label.csv", "--target", "sold")
    assert code == 1
    assert "maybe" in line


def test_gaps_in_the_features_are_predicted(model, capsys):
    table = pd.read_csv("sold.csv")
    table.loc[0, ["size", "city"]] = np.nan
    table.to_csv("gaps.csv", index=False)
    assert main(["predict", model, "gaps.csv", "--out", "p.csv"]) == 0
    assert pd.read_csv("p.csv").notna().all(axis=None)


def test_damaged_model_file(model, capsys):
    whole = Path(model).read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], b"", b"PK\x03\x04" + whole):
        Path("damaged.uq").write_bytes(content)
        code, line = _error(capsys, "predict", "damaged.uq", "sold.csv")
        assert code == 1
        assert "damaged.uq" in line


def test_preprocessor_alone_is_not_a_model(model, capsys):
    from uq.io import save

    save(load(model).preprocessor_, "half.uq")
    code, line = _error(capsys, "predict", "half.uq", "sold.csv")
    assert (code, line) == (1, "half.uq: holds a TablePreprocessor, which is not a model.")


def test_model_with_several_targets_is_refused(capsys):
    from uq.models.map import MAPRegressor
    from uq.models.table import TableModel

    X = pd.read_csv("flats.csv")
    y = np.stack([X["price"], -X["price"]], axis=1)
    TableModel(MAPRegressor(max_epochs=1, random_state=0)).fit(X, y).save("two.uq")
    assert _error(capsys, "predict", "two.uq", "flats.csv") == (
        1,
        "uq predict writes one target; the model has 2.",
    )


def test_full_disk_leaves_the_old_files(model, capsys, monkeypatch):
    main(["predict", model, "sold.csv", "--out", "p.csv"])
    before = {name: Path(name).read_bytes() for name in (model, "p.csv")}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    for argv in (_fit("sold.csv", "sold", model), ["predict", model, "sold.csv", "--out", "p.csv"]):
        code, line = _error(capsys, *argv)
        assert code == 1
        assert "No space left on device" in line
    code, line = _error(capsys, "report", model, "sold.csv", "--target", "sold")
    assert code == 1
    assert {name: Path(name).read_bytes() for name in before} == before
    assert not [p for p in Path().iterdir() if p.name.startswith(".")]  # nothing left behind


def test_interrupt(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "methods", interrupted)
    assert _error(capsys, "methods") == (1, "interrupted")
    # An estimator that is interrupted warns and keeps what it has; the command stops.
    monkeypatch.setattr(
        commands,
        "methods",
        lambda args: warnings.warn(FitInterruptedWarning("so far"), stacklevel=2),
    )
    assert _error(capsys, "methods") == (1, "interrupted")


def test_a_bug_is_one_line_and_shows_more_on_request(capsys, monkeypatch):
    def broken(args):
        raise TypeError("two\nlines")

    monkeypatch.setattr(commands, "methods", broken)
    assert _error(capsys, "methods") == (
        1,
        "TypeError: two lines (unexpected; --debug shows where)",
    )
    assert main(["methods", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


# -- as a process --------------------------------------------------------------------------------


def test_exit_codes_and_streams_of_the_process():
    done = _run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    done = _run("compare", "nope.csv", "--target", "y")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "uq: error: nope.csv: there is no such file.\n"


def test_reader_that_stops(model):
    table = pd.read_csv("sold.csv")
    pd.concat([table] * 200).to_csv("long.csv", index=False)  # more than a pipe holds
    command = [*UQ, "predict", model, "long.csv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b"label,")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_behind_stdout(model, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert _error(capsys, "predict", model, "sold.csv") == (1, "No space left on device")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predict_in_batches_writes_what_it_writes_at_once(model, monkeypatch, suffix):
    read = pd.read_csv if suffix == "csv" else pd.read_parquet
    for rows in (8192, 7):
        monkeypatch.setattr("uq.cli.commands._BATCH_ROWS", rows)
        assert main(["predict", model, "sold.csv", "--out", f"{rows}.{suffix}"]) == 0
    pd.testing.assert_frame_equal(read(f"8192.{suffix}"), read(f"7.{suffix}"), rtol=1e-6)


# -- pretrain ------------------------------------------------------------------------------------

_SMALL = [
    "d_model=16",
    "n_layers=2",
    "n_heads=2",
    "n_buckets=20",
    "rows_per_step=300",
    "log_entries=2",
]


def _pretrain(*more, out="net.safetensors"):
    settings = [word for text in _SMALL for word in ("--set", text)]
    return ["pretrain", "--prior", "gp", "--out", out, "--steps", "4", *settings, *more]


def test_pretrain_writes_a_network_and_a_card_and_goes_on_from_them(capsys):
    from uq.nn import load_pfn

    assert main(_pretrain("--seed", "3")) == 0
    said = capsys.readouterr()
    assert "4 steps" in said.out
    assert "step 4/4" in said.err
    model, meta = load_pfn("net.safetensors")
    assert model.config.d_model == 16
    (run,) = meta["runs"]
    assert run["command"].startswith(
        "uq pretrain --prior gp --steps 4 --seed 3 --out net.safetensors --set d_model=16"
    )
    card = Path("net.md").read_text()
    assert run["command"] in card
    assert "exact posterior" in card
    held_out = run["log"][-1]["held_out"]["mean"]
    assert f"{held_out:.3f}" in card
    # A finished run that is resumed has nothing left to do.
    assert main(_pretrain("--seed", "3", "--resume", "--quiet")) == 0
    assert capsys.readouterr().err == ""
    again, _ = load_pfn("net.safetensors")
    assert all((a == b).all() for a, b in zip(model.parameters(), again.parameters(), strict=True))
    more = ["--steps", "2", "--init", "net.safetensors", "--set", "rows_per_step=300", "--quiet"]
    assert main(["pretrain", "--prior", "gp", "--out", "two.safetensors", *more]) == 0
    assert len(load_pfn("two.safetensors")[1]["runs"]) == 2


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--set", "d_modle=3"], 2, "no setting 'd_modle'; did you mean 'd_model'"),
        (["--set", "steps=3"], 2, "no setting 'steps'"),
        (["--prior", "gauss"], 1, "gauss"),
        (["--out", "net.pt"], 2, "must end in .safetensors"),
        (["--out", "no/net.safetensors"], 1, "does not exist"),
        (["--steps", "0"], 2, "whole number from 1"),
        (["--init", "none.safetensors"], 1, "none.safetensors"),
        (["--set", "lr=-1.0"], 1, "lr must be"),
    ],
)
def test_pretrain_says_what_is_wrong(capsys, more, code, message):
    assert main([*_pretrain(), *more]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1


# -- the newcomer's commands -----------------------------------------------------------------------


def test_the_bare_command_shows_its_help(capsys):
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert bare == capsys.readouterr().out
    assert "uq compare digits" in bare


def test_help_names_the_quick_methods(capsys):
    assert main(["compare", "--help"]) == 0
    assert f"(default: {','.join(QUICK)})" in " ".join(capsys.readouterr().out.split())


def test_columns_that_are_not_read_as_meant_are_told(capsys):
    frame = pd.read_csv("sold.csv").assign(key=[f"K{i}" for i in range(60)])
    frame["size"] = [f"{i % 9}.5" for i in range(60)]
    frame.loc[7, "size"] = "unknown"
    frame.to_csv("slips.csv", index=False)
    assert main(_fit("slips.csv", "sold", "s.uq")) == 0
    err = capsys.readouterr().err
    assert "the column 'size' is taken as text: 59 of its 60 values are numbers, but row 7" in err
    assert "holds 'unknown'" in err
    assert "'key': left out, as no text there occurs twice" in err
    assert "city" not in err
    assert main(_fit("slips.csv", "size", "s.uq")) == 0
    assert "the target 'size' is taken as classes: 59 of its 60" in capsys.readouterr().err
    assert main(_fit("sold.csv", "sold", "s.uq")) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stars", [[1, 2, 3], ["1.00", "2.00", "3.00"]])
def test_whole_numbers_as_classes_are_told_by_every_fit(stars, capsys):
    pd.read_csv("flats.csv").assign(stars=stars * 20).to_csv("stars.csv", index=False)
    assert main(_fit("stars.csv", "stars", "s.uq")) == 0
    assert "3 whole numbers in the target are taken as classes" in capsys.readouterr().err
    assert main(_fit("stars.csv", "stars", "s.uq", "--json-progress")) == 0
    assert all(json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert main(_fit("stars.csv", "stars", "s.uq", "--task", "classification")) == 0
    assert capsys.readouterr().err == ""


def test_what_to_pick_stands_below_the_tables_too(capsys):
    argv = ["compare", "flats.csv", "--target", "price", "--max-epochs", "2", "--methods"]
    assert main([*argv, "map,ivon", "--quiet"]) == 0
    *_, said, blank, path = capsys.readouterr().out.strip().split("\n")
    report = json.loads(Path(path).with_suffix(".json").read_text())
    assert blank == ""
    assert " ".join(report["recommendation"].split()).endswith(said.strip())
    assert main([*argv, "map", "--quiet"]) == 0  # nothing to pick from
    assert "Pick" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.31, "0.31 s"), (34.4, "34 s"), (114, "110 s"), (210, "3.5 min"), (9000, "2.5 h")],
)
def test_times_are_spelled_in_two_digits(seconds, text):
    assert spelled_seconds(seconds) == text


def test_every_command_shows_examples_that_parse(capsys):
    for command in ("compare", "fit", "predict", "report", "pretrain", "methods", "doctor"):
        assert main([command, "--help"]) == 0
        examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
        assert examples
        for line in examples:
            prog, *argv = line.split()
            assert prog == "uq"
            assert parser().parse_args(argv).handler


def test_a_budget_takes_methods_by_worth_until_it_is_spent():
    every = list(METHODS)
    assert set(ORDER) == set(every)
    most = affordable(every, n_rows=100, map_seconds=1.0, budget=1e6)
    assert (most.names, most.left_out) == (list(ORDER), {})
    few = affordable(every, n_rows=100, map_seconds=1.0, budget=6.0)
    assert few.names == ["map", "vbll", "pfn", "abnn"]  # 1 + 3 + 0.5 + 1.5
    assert few.left_out["ensemble"] == "about 4.5 s"
    both = affordable(every, n_rows=100, map_seconds=1.0, budget=4.5, jobs=2)
    assert both.names == ["map", "vbll", "pfn", "ensemble"]
    assert affordable(["nuts"], n_rows=100, map_seconds=9.0, budget=1.0).names == ["nuts"]
    large = affordable(every, n_rows=10**6, map_seconds=1.0, budget=1e6).left_out
    assert large == dict.fromkeys(("masked", "nuts"), "each step takes all 1,000,000 rows")


def test_compare_in_a_budget_says_what_it_left_out(capsys):
    argv = ["compare", "flats.csv", "--target", "price", "--max-epochs", "2", "--json"]
    assert main([*argv, "--methods", "map,nuts,vbll", "--budget", "0.01s"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert set(document["methods"]) == {"map"}
    told, first, *_, last = err.splitlines()
    assert told.startswith("budget: a fit of map")
    assert first.startswith("vbll: left out, about ")
    assert last == "reporting on 15 held-out rows"
    assert "nuts: left out, about " in err
    assert set(document["notes"]["left out for want of time"]) == {"vbll", "nuts"}


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("60s", 60), ("5min", 300), ("5m", 300), ("1.5h", 5400)]
)
def test_times(text, seconds):
    assert parser().parse_args(["compare", "x.csv", "--budget", text]).budget == seconds


@pytest.mark.parametrize("text", ["soon", "-1s", "0", "infs", "5 weeks", "5minutes"])
def test_times_that_are_none(capsys, text):
    assert main(["compare", "flats.csv", "--target", "price", f"--budget={text}"]) == 2
    assert f"needs a time such as 60s, 5min or 1h, got '{text}'" in capsys.readouterr().err


def test_progress_bars_are_for_those_who_watch(monkeypatch):
    shown = []
    monkeypatch.setattr(commands, "table_model", lambda *_, bar: shown.append(bar) or 1 / 0)
    for watched in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched)
        for more in ([], ["--quiet"], ["--jobs", "2"]):
            main(["compare", "flats.csv", "--target", "price", "--methods", "map", *more])
    assert shown == [False, False, False, True, False, False]
    assert table_model("map", "regression", {}, 0, bar=True).estimator.verbose == 1


def test_doctor_says_what_is_installed_and_that_it_works(capsys):
    assert main(["doctor", "--json"]) == 0
    found = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert found["torch"]["seen"] == torch.__version__
    assert found["fit"]["state"] == "ok"
    assert main(["doctor"]) == 0
    assert "+ torch" in capsys.readouterr().out


def test_doctor_fails_where_a_needed_part_is_too_old(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["numpy>=999", "no-such>=1; extra == 'fast'"])
    assert main(["doctor"]) == 1
    said = capsys.readouterr()
    assert "! numpy" in said.out
    assert "pip install 'numpy>=999'" in said.out
    assert "- no-such" in said.out
    assert said.err.startswith("uq: error: not in order: numpy;")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "compare" in script
    assert "coverage" in script
    if shell == "bash" and shutil.which("bash"):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch):
    text = "How accurate?\n  Accuracy  1.000 ±0.079 *   0.9 ±0.1"
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert outputs.coloured(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert outputs.coloured(text) == (
        "\033[1mHow accurate?\033[0m\n  Accuracy  \033[32m1.000 ±0.079 *\033[0m   0.9 ±0.1"
    )
    legend = "± the longer side of the 95 % interval. * best"
    assert outputs.coloured(legend) == legend
    monkeypatch.setenv("NO_COLOR", "1")
    assert outputs.coloured(text) == text


# -- long runs -------------------------------------------------------------------------------------

LONG = ["fit", "wine", "--method", "map", "--set", "max_epochs=20000", "--set", "patience=None"]


def _command(folder, *more):
    return subprocess.Popen(
        [*UQ, *LONG, "--set", "hidden=8,", "--json-progress", *more, "--out", f"{folder}/m.uq"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_fit_and_says_how_to_go_on(tmp_path, number):
    run = tmp_path / "run"
    process = _command(tmp_path, "--checkpoint", str(run))
    lines = [json.loads(process.stderr.readline()) for _ in range(4)]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert [line["event"] for line in lines] == ["start", "epoch", "epoch", "epoch"]
    assert lines[3] | {"train_loss": 0, "seconds": 0} == {
        "event": "epoch",
        "method": "map",
        "epoch": 3,
        "train_loss": 0,
        "held_out_loss": None,
        "seconds": 0,
    }
    last = err.splitlines()[-1]
    assert last.startswith("uq: error: interrupted; the same command with --resume goes on from")
    assert not (tmp_path / "m.uq").exists()
    assert not list(tmp_path.rglob(".uq-*"))
    assert list(run.glob("stage-*"))


def test_resuming_on_the_command_line(tmp_path, capsys):
    run, out = tmp_path / "run", str(tmp_path / "m.uq")
    short = ["fit", "wine", "--method", "map", "--set", "max_epochs=3", "--set", "hidden=8,"]
    assert main([*short, "--out", out, "--checkpoint", str(run)]) == 0
    assert _error(capsys, *short, "--out", out, "--checkpoint", str(run))[0] == 1  # there already
    assert main([*short, "--out", out, "--checkpoint", str(run), "--resume"]) == 0
    assert main([*short, "--out", str(tmp_path / "plain.uq")]) == 0
    rows = load_dataset("wine").X
    one, other = (load(tmp_path / name).predict_proba(rows) for name in ("m.uq", "plain.uq"))
    np.testing.assert_array_equal(one, other)
    assert _error(capsys, *short, "--out", out, "--resume") == (
        2,
        "--resume needs --checkpoint, the folder that the fit before wrote to",
    )


def test_hostile_names_on_the_terminal(tmp_path, capsys):
    name = "a\x1b]0;owned\x07\u202e"
    pd.DataFrame({name: [1.0, 2.0] * 10, "y": [0, 1] * 10}).to_csv(tmp_path / "t.csv", index=False)
    assert main(["fit", str(tmp_path / "t.csv"), "--target", name[:3], "--method", "map"]) == 2
    main(["report", str(tmp_path / "t.csv"), str(tmp_path / "t.csv"), "--target", name])
    main(["fit", str(tmp_path / "t.csv"), "--target", name + "!", "--method", "map", "--out", "m"])
    shown = capsys.readouterr()
    assert all(c == "\n" or c.isprintable() for c in shown.out + shown.err)


# -- several methods at a time ---------------------------------------------------------------------


@pytest.mark.slow
def test_compare_in_processes_gives_the_same_numbers(capsys):
    argv = ["compare", "flats.csv", "--target", "price", "--methods", "map,vbll,ivon", "--json"]
    argv += ["--max-epochs", "2", "--ood", "flats.csv"]
    found = []
    for more in ([], ["--jobs", "2"]):
        assert main([*argv, *more, "--quiet"]) == 0
        document = json.loads(capsys.readouterr().out)
        document["notes"].pop("seconds to predict")
        document.pop("recommendation")  # weighs seconds
        for row in document["ranking"]:
            row.pop("seconds")
        found.append(document)
    assert found[1]["notes"].pop("methods fitted at a time") == 2
    assert found[0]["methods"].keys() == found[1]["methods"].keys()
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_error_of_one_method_names_it(jobs):
    pd.DataFrame({"a": [0.0, 1.0, 2.0, 3.0], "b": [0.0, 1.0, np.inf, 3.0]}).to_csv("inf.csv")
    done = _run("compare", "inf.csv", "--target", "a", "--methods", "gp,map", "--jobs", jobs)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("uq: error: gp: ")
    assert "'b' must hold finite numbers" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_interrupt_ends_the_processes_too():
    argv = ["compare", "digits", "--methods", "map,vbll", "--max-epochs", "100000", "--jobs", "2"]
    process = subprocess.Popen(
        [*UQ, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(2):
        assert ": fitting 1347 rows" in process.stderr.readline()
    process.send_signal(signal.SIGINT)  # to the command alone
    # The pipe closes when no process holds it any more.
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "uq: error: interrupted"
    assert "Traceback" not in err


@pytest.mark.slow
def test_pretraining_killed_at_random_moments_ends_with_the_same_bits():
    from uq.nn import load_pfn

    settings = ["--set", "checkpoint_seconds=0.2", "--quiet", "--resume"]

    def train(out):
        return subprocess.Popen([*UQ, *_pretrain(*settings, "--steps", "600", out=out)])

    assert train("plain.safetensors").wait() == 0
    rng, kills = random.Random(0), 0
    for _ in range(5):
        process = train("killed.safetensors")
        try:
            process.wait(timeout=rng.uniform(3, 6))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert train("killed.safetensors").wait() == 0
    assert kills > 1
    plain, killed = (load_pfn(f"{n}.safetensors")[0].state_dict() for n in ("plain", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in plain.items())

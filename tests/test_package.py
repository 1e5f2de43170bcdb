"""The package as a whole: layers, lazy imports, exports."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import uq

ROOT = Path(uq.__file__).parent
# What each layer may import from uq, itself included.
LAYERS = {
    "errors": set(),
    "distributions": {"errors", "threads"},
    "files": {"errors"},
    "calibration": {"distributions", "errors", "files", "texts"},
    "kernels": {"errors"},
    "nn": {"distributions", "errors", "files", "kernels"},
    "inference": {"distributions", "errors", "files", "kernels", "nn", "plain", "threads"},
    "texts": set(),
    "threads": set(),
    "plain": {"errors", "texts"},
    "migrations": {"errors"},
    "io": {"models", "inference", "errors", "files", "migrations", "plain"},
    "models": {
        "calibration",
        "inference",
        "nn",
        "distributions",
        "errors",
        "data",
        "io",
        "streams",
        "threads",
    },
    "data": {"errors"},
    "streams": {"data", "errors"},
}


def imports(path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("uq."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("uq."):
                    yield name.name.split(".")[1]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_downwards(layer):
    files = (
        [ROOT / f"{layer}.py"] if (ROOT / f"{layer}.py").exists() else ROOT.glob(f"{layer}/**/*.py")
    )
    for path in files:
        wrong = set(imports(path)) - LAYERS[layer] - {layer}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def modules_after(code):
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_uq_loads_nothing_heavy():
    loaded = modules_after("import uq")
    assert not loaded & {"torch", "pyro", "sklearn", "pandas", "matplotlib", "jax", "numpyro"}


def test_estimators_do_not_load_optional_packages():
    loaded = modules_after("import uq; uq.IVONClassifier; uq.calibration")
    assert not loaded & {"arviz", "numpyro", "jax", "gpytorch", "matplotlib", "jinja2"}


def test_every_export_resolves():
    for name in uq.__all__:
        assert getattr(uq, name) is not None
    assert set(uq.__all__) <= set(dir(uq))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = uq.nothing
    # With these two, Python's message ends in "Did you mean: …?".
    with pytest.raises(AttributeError) as caught:
        _ = uq.IVONClasifier
    assert (caught.value.name, caught.value.obj) == ("IVONClasifier", uq)


def test_methods_table():
    table = uq.methods()
    assert {"ivon", "vbll", "ensemble", "map"} <= set(table.index)
    for name in table["classifier"]:
        assert hasattr(uq, name)


PUBLIC = ("", ".calibration", ".data", ".distributions", ".inference", ".kernels", ".nn")
# Made by functions and methods, whose examples show them; each says which under "See Also".
RESULTS = {
    "uq.calibration.Drift",
    "uq.calibration.ShiftCurve",
    "uq.data.Dataset",
    "uq.inference.LeaveOneOut",
    "uq.inference.MaskedState",
    "uq.inference.Matches",
    "uq.inference.SMCResult",
    "uq.inference.TrainingStep",
    "uq.nn.BayesianNorm",
}


def public_callables():
    for part in PUBLIC:
        module = importlib.import_module(f"uq{part}")
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                yield f"uq{part}.{name}", value


def test_every_public_callable_has_an_example():
    named = dict(public_callables())
    assert len(named) > 150
    assert set(named) >= RESULTS
    lacking = []
    for name, value in named.items():
        doc = inspect.getdoc(value) or ""
        if inspect.isclass(value) and issubclass(value, Warning):
            continue
        wanted = "See Also\n----" if name in RESULTS else "Examples\n----"
        if wanted not in doc or (name not in RESULTS and ">>> " not in doc):
            lacking.append(name)
    assert not lacking


def documented(value, *sections):
    """Names that the sections of a docstring describe."""
    found = set()
    for section in sections:
        text = re.search(
            rf"^{section}\n-+\n(.*?)(?=\n\n[A-Z][\w ]+\n---|\Z)", inspect.getdoc(value), re.M | re.S
        )
        lines = text[1].splitlines() if text else []
        heads = [line.partition(" : ")[0] for line in lines if line and not line.startswith(" ")]
        found |= {name.strip().lstrip("*") for head in heads for name in head.split(",")}
    return found


def test_every_parameter_of_a_public_callable_is_described():
    # Their constructors are those of torch and enum.
    inherited = {"ClassPredictive", "Likelihood", "Predictive", "Purpose", "RealPredictive"}
    lacking = {}
    for name, value in public_callables():
        if name in RESULTS or name.rpartition(".")[2] in inherited:
            continue
        if inspect.isclass(value) and issubclass(value, Exception | uq.inference.TrainingState):
            continue
        known = documented(value, "Parameters", "Attributes")
        missing = [p for p in inspect.signature(value).parameters if p not in known]
        if missing:
            lacking[name] = missing
    assert not lacking

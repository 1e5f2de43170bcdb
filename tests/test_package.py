"""The package as a whole: layers, lazy imports, exports."""

import ast
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


def test_methods_table():
    table = uq.methods()
    assert {"ivon", "vbll", "ensemble", "map"} <= set(table.index)
    for name in table["classifier"]:
        assert hasattr(uq, name)

"""The pages of the documentation and the code know of each other; ``make docs`` builds them."""

import ast
import json
import re
from pathlib import Path

import pytest

import uq
from uq.models.registry import METHODS

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="a source archive has no docs")
PARTS = ("calibration", "data", "distributions", "inference", "kernels", "nn")


def summarised():
    """Full names that the tables of the API reference list, in their current modules."""
    names = set()
    for page in (DOCS / "api").glob("*.rst"):
        module, table = "", False
        for line in page.read_text().splitlines():
            if found := re.match(r"\.\. (?:current)?module:: (\S+)", line):
                module = found[1]
            elif line.startswith("   ") and table and not line.strip().startswith(":"):
                names.add(f"{module}.{line.strip()}")
            elif line.strip():
                table = line.startswith(".. autosummary::") or (table and line.startswith("   "))
    return names


def exported(part):
    """``__all__`` of a part, read and not imported: that would take seconds."""
    folder = Path(uq.__file__).parent / part
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "_EXPORTS"):
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"uq.{part} has no __all__")


def test_every_public_name_is_in_the_reference():
    public = {f"uq.{name}" for name in uq.__all__ if name not in uq._PARTS}
    for part in PARTS:
        public |= {f"uq.{part}.{name}" for name in exported(part)}
    assert len(public) > 200
    missing = public - summarised()
    assert not missing, f"docs/api has no line for {sorted(missing)}"


def test_every_method_has_a_page_with_its_parts():
    listed = (DOCS / "methods" / "index.md").read_text()
    for key, method in METHODS.items():
        text = (DOCS / "methods" / f"{key}.md").read_text()
        assert re.search(rf"^{key}$", listed, re.MULTILINE), key
        parts = ("What it does", "When to use it", "Mathematics", "Parameters that matter")
        for part in (*parts, "Limits", "Measured", "Sources"):
            assert f"\n## {part}\n" in text, (key, part)
        assert f"{{facts}} {key}\n" in text
        assert "$$" in text
        assert "{measured}" in text or "{standard}" in text
        for task in method.tasks:
            assert f"uq.{method.class_name(task)}`" in text, (key, task)


def test_tables_of_results_ask_for_columns_that_are_there():
    results = DOCS.parent / "benchmarks" / "results"
    asked = 0
    for page in DOCS.rglob("*.md"):
        for suite, body in re.findall(r"```\{measured\} (\S+)\n(.*?)```", page.read_text(), re.S):
            path = results / f"{suite}.json"
            if not path.exists():
                continue
            asked += 1
            there = {column for row in json.loads(path.read_text())["results"] for column in row}
            columns = re.search(r":columns: (.*)", body)[1]
            wanted = {column.split("=")[0].strip() for column in columns.split(",")}
            assert wanted <= there, (page.name, suite, wanted - there)
    assert asked > 10


def test_means_are_over_the_splits_that_all_methods_have(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    import results

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    rows = [
        {"set": "a", "split": 0, "method": "X", "nll": 9.0},  # measured again below
        {"set": "a", "split": 0, "method": "Y", "nll": 3.0},
        {"set": "a", "split": 0, "method": "X", "nll": 1.0},
        {"set": "a", "split": 1, "method": "X", "nll": 3.0},
        {"set": "a", "split": 1, "method": "Y", "nll": 4.0},
        {"set": "a", "split": 2, "method": "X", "nll": 50.0},
        {"set": "a", "split": 2, "method": "Y", "error": "MemoryError"},
        {"set": "b", "split": 0, "method": "X", "nll": 7.0},
    ]
    assert results.read("suite") is None
    (tmp_path / "suite.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    table, _, name = results.read("suite")
    assert name == "suite.jsonl"
    means = results.over_splits(table).set_index(["set", "method"])
    assert means["nll"].to_dict() == {("a", "X"): 2.0, ("a", "Y"): 3.5, ("b", "X"): 7.0}
    assert means.loc[("a", "X"), "nll_se"] == 1.0  # |3 − 1|/2
    assert means["splits"].tolist() == [2, 2, 1]
    assert results.with_error(2.0, 1.0) == "2.0\u00a0±\u00a01.0"
    assert results.with_error(0.12345, 0.0123) == "0.123\u00a0±\u00a00.012"
    assert results.with_error(1234.5, 67.0) == "1234\u00a0±\u00a067"
    assert results.with_error(7.0, float("nan")) == "7"
    assert [results.number(v) for v in (True, 0.12344, 1.5e-7, 3.0)] == [
        "yes",
        "0.1234",
        "1.5e-07",
        "3",
    ]

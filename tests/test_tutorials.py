"""Tutorials run from start to end, and what is committed is a clean, full run."""

import re
import socket
from pathlib import Path

import nbformat
import pytest

from tutorials.run import FOLDER, execute, index, notebooks

# The quickest two, of classification and regression; the others are slow.
QUICK = {"01", "08"}
ABSOLUTE = re.compile(
    r"(?<![\w.~/-])/(?:home|root|work|tmp|usr|opt|var|mnt|srv|data|content|Users|private)/"
    r"|\b[A-Za-z]:\\"
)

every_notebook = pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.name[:2])


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in _code(notebook) for output in cell.outputs]


def _texts(notebook: nbformat.NotebookNode) -> list[str]:
    """Everything in outputs that a reader sees as text."""
    texts = []
    for output in _outputs(notebook):
        texts.append(output.get("text", ""))
        texts += [v for kind, v in output.get("data", {}).items() if kind.startswith("text/")]
    return texts


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.name[:2], marks=() if p.name[:2] in QUICK else pytest.mark.slow)
        for p in notebooks()
    ],
)
def test_runs_from_start_to_end(path: Path) -> None:
    committed = path.read_bytes()
    notebook = execute(path, smoke=True)
    assert path.read_bytes() == committed
    # Warnings and progress bars would stand between the text of a page.
    assert [o.text for o in _outputs(notebook) if o.get("name") == "stderr"] == []


@every_notebook
def test_committed_outputs_are_those_of_one_clean_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = _code(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [output.output_type for output in _outputs(notebook)]
    assert "error" not in kinds
    assert [o.text for o in _outputs(notebook) if o.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in _outputs(notebook))
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    assert notebook.metadata["seconds"] > 0


@every_notebook
def test_committed_notebook_says_nothing_about_the_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for text in [*_texts(notebook), *(cell.source for cell in notebook.cells)]:
        assert not (found := ABSOLUTE.search(text)), text[found.start() :][:80]
        assert str(FOLDER.parent) not in text
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)


@pytest.mark.parametrize("text", ["in /home/a/b", "'/tmp/x.uq'", r"C:\data"])
def test_absolute_paths_are_recognised(text: str) -> None:
    assert ABSOLUTE.search(text)
    assert not ABSOLUTE.search("reports/tmp/x, ../shared/data, 1/2 and https://a.org/tmp/")


@every_notebook
def test_one_line_makes_it_short(path: Path) -> None:
    first = _code(nbformat.read(path, as_version=4))[0].source
    assert first.count("UQ_SMOKE") == 1
    assert 10 <= len(nbformat.read(path, as_version=4).cells) <= 22


def test_readme_lists_the_notebooks_as_they_are() -> None:
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == index()

"""Execute tutorials in place, and list them in README.md with their run times: ``make tutorials``.

``python -m tutorials.run 01 04`` executes some of them. ``UQ_SMOKE=1`` in the environment of a
notebook makes it short, for tests; what is committed is the full run.
"""

import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def notebooks() -> list[Path]:
    """All tutorials, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))


def execute(path: Path, *, smoke: bool = False) -> nbformat.NotebookNode:
    """Run a notebook from start to end on one thread; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,  # it would make every run a difference in git
        resources={"metadata": {"path": str(FOLDER)}},
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    env["UQ_SMOKE"] = "1" if smoke else "0"
    before = os.times()
    client.execute(env=env)
    after = os.times()
    # Processor time: on one thread it is the run time where nothing else runs.
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    notebook.metadata["seconds"] = max(1, round(spent))
    return notebook


def index() -> str:
    """README of the folder: heading, question and processor time of each notebook."""
    lines = [
        "# Tutorials",
        "",
        "One question each, answered on real data; outputs are those of a full run on one thread.",
        "`make tutorials` runs them all and writes this list. They need the package, Jupyter and",
        "the data in scikit-learn; one that can use more says so. `UQ_SMOKE=1` makes them short.",
        "",
        "| tutorial | question | processor time |",
        "| --- | --- | --- |",
    ]
    for path in notebooks():
        notebook = nbformat.read(path, as_version=4)
        heading, question = re.findall(r"\S[^\n]*", notebook.cells[0].source)[:2]
        seconds = notebook.metadata["seconds"]
        lines.append(f"| [{heading.lstrip('# ')}]({path.name}) | {question} | {seconds} s |")
    return "\n".join(lines) + "\n"


def main(wanted: list[str]) -> None:
    """Execute the notebooks whose names start with one of ``wanted``, or all of them."""
    for path in notebooks():
        if wanted and not path.name.startswith(tuple(wanted)):
            continue
        notebook = execute(path)
        nbformat.write(notebook, path)
        print(f"{path.name}: {notebook.metadata['seconds']} s", flush=True)
    (FOLDER / "README.md").write_text(index(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

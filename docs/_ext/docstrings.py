"""What autodoc shows of a docstring and of a class, and where its references lead.

Docstrings hold equations as indented blocks, which read well in an editor. In reStructuredText an
indented block is a quotation, whose lines are joined: here it becomes a literal block. A bar is an
absolute value, never a substitution.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode


def keep_equations(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Put ``::`` before blocks that are indented by four and follow a blank line."""
    out: list[str] = []
    text = ""  # the last line with words outside of a literal block
    block = 0  # indentation of the literal block that runs, or 0
    for i, line in enumerate(lines):
        here = len(line) - len(line.lstrip())
        if line.strip() and not (block and here >= block):
            outer = len(text) - len(text.lstrip())
            starts = i > 0 and not lines[i - 1].strip() and here >= outer + 4
            block = here if starts else 0
            if starts and not text.endswith("::"):
                out += [" " * outer + "::", ""]
            if not starts:
                text = line.rstrip()
        out.append(line if block else escape_bars(line))
    lines[:] = out


def escape_bars(line: str) -> str:
    """Escape ``|`` outside of literals and doctests."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = re.split(r"(``.*?``)", line)
    return "".join(p if p.startswith("``") else p.replace("|", r"\|") for p in parts)


def skip_foreign(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out what a class has from other libraries, and fields of named tuples."""
    found = obj.fget if isinstance(obj, property) else obj
    module = getattr(found, "__module__", None) or ""  # what is written in C may have none
    if callable(found) and not module.startswith("uq"):
        return True
    if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number"):
        return True
    return None


def find_public(app: Sphinx, env: BuildEnvironment, node: Any, contnode: Any) -> Any:
    """Find what a docstring calls by its bare name or by the name of its module.

    ``uq.inference.resampling.resample`` has its page as ``uq.inference.resample``, and in a table
    of summaries a bare name has lost the module that it belongs to.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    last = target.rpartition(".")[2]
    objects = env.get_domain("py").objects
    same = [name for name in objects if name.rpartition(".")[2] == last]
    if target.startswith("uq."):
        same = [name for name in same if defined_at(name) == target]
    elif "." in target:
        same = [name for name in same if name.endswith("." + target)]
    found = {objects[name].docname: name for name in same if not objects[name].aliased}
    if len(found) != 1:
        return None
    ((document, name),) = found.items()
    id_ = objects[name].node_id
    return make_refnode(app.builder, node["refdoc"], document, id_, contnode, name)


def defined_at(name: str) -> str:
    """Module and name under which an object was written."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            found = getattr(found, part, None)
        return f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    return name


def setup(app: Sphinx) -> dict[str, bool]:
    """Register both, before numpydoc reads the sections."""
    app.setup_extension("sphinx.ext.autodoc")  # which has the events
    app.connect("autodoc-process-docstring", keep_equations, priority=400)
    app.connect("autodoc-skip-member", skip_foreign)
    app.connect("missing-reference", find_public)
    return {"parallel_read_safe": True}

"""Versions of the model file: version N of the format is read with N - 1, by rewriting its header.

Each change of the format raises ``FORMAT_VERSION`` and adds one function here, which takes a header
of the version before and returns one of the next. Functions for older versions are removed with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uq.errors import LoadError

FORMAT = "uq-model"
FORMAT_VERSION = 2

Header = dict[str, Any]


def _from_1(header: Header) -> Header:
    """Say what code a model needs in one list; leave out what is never stored."""

    def convert(node: Any) -> Any:
        if isinstance(node, list):
            return [convert(v) for v in node]
        if not isinstance(node, dict):
            return node
        node = {k: convert(v) for k, v in node.items()}
        if "class" in node and "params" in node:
            code = ("module", "base", "model")
            node["needs"] = [name for name in code if node.pop(f"needs_{name}", False)]
            callbacks = node["params"].pop("callbacks", {"tuple": []})
            if callbacks != {"tuple": []}:
                raise LoadError("the file sets 'callbacks', which is not a parameter in files.")
        return node

    return header | {"model": convert(header["model"])}


MIGRATIONS: dict[int, Callable[[Header], Header]] = {1: _from_1}


def migrate(header: Header) -> Header:
    """Return the header in the version of today.

    Raises
    ------
    LoadError
        If the file's version is neither this one nor the one before.
    """
    version = header.get("version")
    if version == FORMAT_VERSION and type(version) is int:
        return header
    if type(version) is not int or version not in MIGRATIONS:
        raise LoadError(
            f"it has format version {version!r}; this uq reads {FORMAT_VERSION - 1} and "
            f"{FORMAT_VERSION}. It was written by uq {header.get('uq')!r}; install that version."
        )
    return MIGRATIONS[version](header) | {"version": FORMAT_VERSION}

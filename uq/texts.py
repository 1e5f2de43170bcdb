"""Text of the user's (names of columns, labels, files) made safe to show."""

from __future__ import annotations

import unicodedata
from typing import Any

# Control characters (terminal sequences begin with one), marks that turn the direction of writing
# around, lone surrogates, which cannot be written, and line separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_KEPT = "\n\t\u200c\u200d"  # joiners are part of words and emoji
_LONGEST = 2000


def visible(text: str) -> str:
    r"""Return ``text`` with characters that are not seen, or do harm, as escapes; cut if huge.

    Examples
    --------
    >>> from uq.texts import visible
    >>> print(visible("size\x1b[2J"))
    size\x1b[2J
    """
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        ascii(c)[1:-1] if unicodedata.category(c) in _HIDDEN and c not in _KEPT else c for c in text
    )


def all_visible(value: Any) -> Any:
    """Return plain data with every text in it made visible, keys of dictionaries too."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [all_visible(v) for v in value]
    if isinstance(value, tuple):
        return tuple(all_visible(v) for v in value)
    if isinstance(value, dict):
        made: dict[Any, Any] = {}
        for key, item in value.items():
            name = shown = all_visible(key)
            while name in made:  # two long names that begin alike
                name = f"{shown} ({len(made)})"
            made[name] = all_visible(item)
        return made
    return value


def spelled_seconds(seconds: float) -> str:
    """Two digits of a time in the unit that a reader would choose."""
    size, unit = next(
        ((size, unit) for size, unit in ((3600, "h"), (60, "min")) if seconds >= 2 * size),
        (1, "s"),
    )
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"

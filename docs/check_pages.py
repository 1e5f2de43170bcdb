"""Check the pages that were built: no link into nowhere, nothing that is fetched from elsewhere.

``python docs/check_pages.py docs/_build/html`` prints what is wrong and exits with 1.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LEFT_OUT = ("_modules", "_static")


class Page(HTMLParser):
    """Links, anchors and what a browser would load of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.append(found["href"])
        elif "src" in found:
            self.loaded.append(found["src"])


def check(root: Path) -> list[str]:
    """Sentences on what is wrong."""
    # Listings of code link back to where Sphinx thinks that a name is; _static holds templates.
    found = [p for p in sorted(root.rglob("*.html")) if p.parts[len(root.parts)] not in LEFT_OUT]
    pages = {path.resolve(): Page(path) for path in found}
    wrong = []
    for path, page in pages.items():
        where = path.relative_to(root.resolve())
        wrong += [
            f"{where}: loads {link}, which is not there without a network."
            for link in page.loaded
            if urlsplit(link).netloc
        ]
        for link in {*page.links, *page.loaded}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                wrong.append(f"{where}: {link} does not exist.")
            elif parts.fragment.endswith(".ipynb"):  # a tutorial that is not there yet
                continue
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors | {""}:
                wrong.append(f"{where}: {link} has no such anchor.")
    return wrong


def main() -> None:
    root = Path(sys.argv[1])
    wrong = check(root)
    print(
        "\n".join(wrong) or f"{len(list(root.rglob('*.html')))} pages, every link leads somewhere"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

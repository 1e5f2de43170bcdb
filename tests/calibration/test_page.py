"""The report as Chromium shows it: every figure drawn, nothing fetched, no complaint."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch

from uq.calibration import compare
from uq.distributions import CategoricalMixture, NormalMixture

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")

N = 200
RNG = np.random.default_rng(0)
LOGITS = 2 * RNG.standard_normal((N, 3))
LABELS = (LOGITS + RNG.gumbel(size=(N, 3))).argmax(1)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def classes(scale):
    return CategoricalMixture(torch.as_tensor(scale * LOGITS)[None])


def targets(scale):
    return NormalMixture(torch.as_tensor(LOGITS[:, 0])[None], torch.tensor(scale))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    groups = {"half": np.arange(N) % 2}
    c = compare(
        {"one <&>": classes(1.0), "two": classes(3.0)},
        LABELS,
        ood={"one <&>": classes(0.2), "two": classes(2.0)},
        groups=groups,
    )
    y = LOGITS[:, 0] + 0.5 * RNG.standard_normal(N)
    r = compare({"one": targets(0.5), "two": targets(0.2)}, y, groups=groups)
    return {
        "classification": (c.save(folder / "c.html"), 6),
        "regression": (r.save(folder / "r.html"), 4),
    }


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two colours ``rgb(r, g, b)``."""

    def luminance(colour: str) -> float:
        rgb = np.array([int(v) for v in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    a, b = sorted((luminance(one), luminance(other)))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_page_in_chromium(browser, pages, task, scheme):
    path, n_figures = pages[task]
    page = browser.new_page(viewport={"width": 1000, "height": 800}, color_scheme=scheme)
    fetched, said = [], []
    page.on("request", lambda request: fetched.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    assert fetched == [path.as_uri()]
    assert said == []

    figures = page.locator("figure svg")
    assert figures.count() == n_figures
    for i in range(n_figures):
        svg = figures.nth(i)
        box = svg.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 150
        assert len(svg.get_attribute("aria-label")) > 20
        # What is drawn lies inside the picture and is not empty.
        assert svg.locator("path").count() > 5
        assert svg.evaluate("s => s.getBBox().width") > 150
        shot = svg.screenshot()
        assert len(set(shot)) > 50

    # Text can be read: WCAG AA asks for 4.5.
    card = page.locator("section").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert (contrast(card, "rgb(0,0,0)") > 10) == (scheme == "light")
    for selector in (
        "section td",
        "section td small",
        "dd",
        "caption:visible",
        ".caption",
        "summary",
    ):
        colour = page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
        assert contrast(colour, card) >= 4.5, selector
    text = page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill")
    assert contrast(text, card) >= 4.5

    # Tables have headers for readers that speak; the page never scrolls sideways.
    tables = page.locator("table")
    for i in range(tables.count()):
        assert tables.nth(i).locator("th[scope=col]").count() >= 2
        assert tables.nth(i).locator("caption").count() == 1
    page.set_viewport_size({"width": 420, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.close()


def test_page_prints(browser, pages):
    page = browser.new_page()
    page.goto(pages["classification"][0].as_uri())
    assert page.pdf().startswith(b"%PDF")
    page.close()


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</style><img src=x onerror='window.hacked = 1'>",
    '"><svg onload="window.hacked=1"></svg>',
    "</title></script><iframe src='javascript:window.hacked=1'></iframe>",
    "javascript:window.hacked=1",
    "[click](javascript:window.hacked=1) ![x](http://127.0.0.1:9/x.png)",
    "{{ 7 * 7 }}{% include 'x' %}&lt;script&gt;&#x3C;script>",
    "\x1b]0;owned\x07\x1b[2J\x9b31m",
    "\u202egnp.exe\u2066\u200f",
    "nul\0byte\r\n\u2028",
    "$\\frac{$ ' \" ` ]]>--><!--",
    "x" * 100_000,
]


def hostile_report(task, name, other):
    """A report in which every text that a user can give is hostile."""
    groups = {name: np.where(np.arange(N) % 2, other, name)}
    notes = {name: other, "list": name, other: {name: 3}}
    if task == "regression":
        y = LOGITS[:, 0] + 0.5 * RNG.standard_normal(N)
        both = {name: targets(0.5), other: targets(0.2)}
        return compare(both, y, groups=groups, title=name, notes=notes)
    labels = np.array(["a", "b" + name[:50], "c" + other[:50]])

    def named(scale):
        dist = classes(scale)
        dist.classes = labels
        return dist

    return compare(
        {name: named(1.0), other: named(3.0)},
        labels[LABELS],
        ood={name: named(0.2), other: named(2.0)},
        groups=groups,
        title=other,
        notes=notes,
    )


@pytest.mark.parametrize("i", range(0, len(HOSTILE), 2))
@pytest.mark.parametrize(
    "task", ["classification", pytest.param("regression", marks=pytest.mark.slow)]
)
def test_hostile_texts(browser, tmp_path, task, i):
    report = hostile_report(task, HOSTILE[i], HOSTILE[i + 1])
    path = report.save(tmp_path / "r.html")
    page = browser.new_page(viewport={"width": 420, "height": 800})
    fetched, said = [], []
    page.on("request", lambda request: fetched.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(path.as_uri())
    page.wait_for_timeout(50)
    assert fetched == [path.as_uri()]
    assert said == []
    assert page.evaluate("window.hacked") is None
    assert page.locator("script, iframe, img, object, embed, form, base").count() == 0
    assert (
        page.evaluate(
            """[...document.querySelectorAll('*')].flatMap(e => [...e.attributes])
        .filter(a => a.name.startsWith('on')
            || /href|src|action|data/.test(a.name) && /^\\s*javascript:/i.test(a.value)).length"""
        )
        == 0
    )
    links = page.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert all(link.startswith("#") for link in links)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    assert page.locator("h1").first.inner_text().strip()
    page.close()


@pytest.mark.parametrize("i", range(0, len(HOSTILE), 2))
def test_hostile_texts_in_a_terminal_and_in_markdown(i, tmp_path):
    report = hostile_report("regression", HOSTILE[i], HOSTILE[i + 1])
    text, markdown = str(report), report.to_markdown()
    for out in (text, markdown):
        assert all(c == "\n" or c.isprintable() or c in "\xa0\u2009\u202f" for c in out)
        out.encode()
    assert len(text) < 300_000
    assert not re.search(r"(?<!\\)\[", markdown)  # no link, no image
    assert "<" not in markdown
    assert json.loads(report.save(tmp_path / "r.json").read_text())["title"] == HOSTILE[i]

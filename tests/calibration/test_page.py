"""The report as Chromium shows it: every figure drawn, nothing fetched, no complaint."""

from __future__ import annotations

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

"""Figures of reliability diagrams and PIT histograms, and SVG that follows a page's theme."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from uq.calibration.curves import Curve

# The colours of the light theme; in SVG they become CSS variables, which the page may redefine.
COLOURS = {
    "ink": "#1d2733",
    "muted": "#5f6b7a",
    "line": "#c9d1db",
    "accent": "#1f6fb2",
    "band": "#cfe0f1",
    "outside": "#c2571a",
}


def reliability_figure(curve: Curve) -> Figure:
    """Draw accuracy against confidence, with the number of rows in each bin below."""
    figure, (top, bottom) = _figure(3.5, 3.9, heights=(3.2, 1.0))
    full = [i for i, count in enumerate(curve["count"]) if count]
    data = {key: np.array([values[i] for i in full], float) for key, values in curve.items()}
    width = 1 / len(curve["count"])
    centre = (data["left"] + data["right"]) / 2
    top.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
    _bars(top, centre, data["band_low"], data["band_high"], width, COLOURS["band"])
    outside = (data["accuracy"] < data["band_low"]) | (data["accuracy"] > data["band_high"])
    top.plot(data["confidence"], data["accuracy"], color=COLOURS["accent"], linewidth=1.2)
    for here, colour in ((~outside, COLOURS["accent"]), (outside, COLOURS["outside"])):
        x, y = data["confidence"][here], data["accuracy"][here]
        top.plot(x, y, "o", markersize=5, color=colour, markeredgewidth=0, clip_on=False)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="Accuracy")
    top.tick_params(labelbottom=False)
    _bars(bottom, centre, 0 * centre, data["count"], 0.86 * width, COLOURS["accent"])
    bottom.set(xlim=(0, 1), xlabel="Confidence", ylabel="Rows", ylim=(0, None))
    return figure


def pit_figure(curve: Curve) -> Figure:
    """Draw the histogram of PIT values with the band that calibrated predictions keep to."""
    figure, (axes,) = _figure(3.5, 2.8, heights=(1.0,))
    data = {key: np.array(values, float) for key, values in curve.items()}
    width = 1 / len(data["left"])
    centre, share = (data["left"] + data["right"]) / 2, 100 * data["share"]
    low, high = 100 * data["band_low"], 100 * data["band_high"]
    outside = (share < low) | (share > high)
    for here, colour in ((~outside, COLOURS["accent"]), (outside, COLOURS["outside"])):
        _bars(axes, centre[here], 0 * share[here], share[here], 0.86 * width, colour)
    # Before the bars the band would hide their ends; behind them only its edges can be seen.
    axes.fill_between([0, 1], low[0], high[0], color=COLOURS["band"], linewidth=0, zorder=0)
    for edge in (low[0], high[0]):
        axes.axhline(edge, color=COLOURS["ink"], linewidth=0.9)
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="PIT value F(y)", ylabel="Targets, %")
    return figure


def to_svg(figure: Figure, label: str, prefix: str) -> str:
    """SVG element to put into a page: ids under ``prefix``, colours as CSS variables, no size."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "uq"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name}, {colour})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


_METADATA = ("Creator", "Date", "Format", "Type")


def _figure(width: float, height: float, heights: tuple[float, ...]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(len(heights), squeeze=False, gridspec_kw={"height_ratios": heights})
    figure.subplots_adjust(left=0.16, right=0.96, top=0.97, bottom=0.5 / height, hspace=0.09)
    for ax in axes[:, 0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(COLOURS["line"])
        ax.tick_params(color=COLOURS["line"], labelcolor=COLOURS["muted"], labelsize=9)
        ax.xaxis.label.set(color=COLOURS["ink"], size=10)
        ax.yaxis.label.set(color=COLOURS["ink"], size=10)
        ax.set_axisbelow(True)
    figure.align_ylabels()
    return figure, list(axes[:, 0])


def _bars(
    axes: Axes,
    centre: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    width: float,
    colour: str,
) -> None:
    # One collection instead of a patch a bar: several times faster to draw.
    from matplotlib.collections import PolyCollection

    left, right = centre - width / 2, centre + width / 2
    corners = np.stack([left, low, right, low, right, high, left, high], -1).reshape(-1, 4, 2)
    axes.add_collection(PolyCollection(list(corners), facecolors=colour, linewidths=0))
    axes.autoscale_view()

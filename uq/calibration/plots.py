"""Diagrams of a report: on Matplotlib axes for papers, and as SVG that follows a page's theme."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from uq.errors import ParameterError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from uq.calibration.curves import Curve
    from uq.calibration.report_data import Report

# The colours of the light theme; in SVG they become CSS variables, which the page may redefine.
COLOURS = {
    "ink": "#1d2733",
    "muted": "#5f6b7a",
    "line": "#c9d1db",
    "accent": "#1f6fb2",
    "band": "#cfe0f1",
    "outside": "#b84f14",
    "series-3": "#2b7a3d",
    "series-4": "#8a4fb3",
    "series-5": "#b0356b",
    "series-6": "#0f7f86",
    "series-7": "#7a6a1b",
    "series-8": "#555e69",
}
_SERIES = ("accent", "outside", *(name for name in COLOURS if name.startswith("series")))
# Lines differ in dashes too, for readers who do not see the colours.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)))

TITLES = {
    "reliability": "Reliability",
    "pit": "PIT histogram",
    "coverage": "Interval coverage",
    "risk_coverage": "Risk and coverage",
    "roc": "ROC curve",
    "scores": "Uncertainty of held-out and OOD rows",
}
OVERLAID = ("coverage", "risk_coverage", "roc")  # all methods in one diagram


# -- one method an axes ------------------------------------------------------------------------


def draw_reliability(ax: Axes, curve: Curve) -> None:
    """Accuracy against confidence in bins, with the band that calibrated predictions keep to."""
    data = _full(curve)
    width = 1 / len(curve["count"])
    centre = (data["left"] + data["right"]) / 2
    _diagonal(ax)
    _bars(ax, centre, data["band_low"], data["band_high"], width, COLOURS["band"])
    outside = (data["accuracy"] < data["band_low"]) | (data["accuracy"] > data["band_high"])
    ax.plot(data["confidence"], data["accuracy"], color=COLOURS["accent"], linewidth=1.2)
    for here, colour in ((~outside, "accent"), (outside, "outside")):
        x, y = data["confidence"][here], data["accuracy"][here]
        ax.plot(x, y, "o", markersize=5, color=COLOURS[colour], markeredgewidth=0, clip_on=False)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="Confidence", ylabel="Accuracy")


def draw_counts(ax: Axes, curve: Curve) -> None:
    """Number of rows in each bin of confidence."""
    data = _full(curve)
    centre = (data["left"] + data["right"]) / 2
    width = 0.86 / len(curve["count"])
    _bars(ax, centre, 0 * centre, data["count"], width, COLOURS["accent"])
    ax.set(xlim=(0, 1), xlabel="Confidence", ylabel="Rows", ylim=(0, None))


def draw_pit(ax: Axes, curve: Curve) -> None:
    """Histogram of PIT values with the band that calibrated predictions keep to."""
    data = {key: np.array(values, float) for key, values in curve.items()}
    width = 1 / len(data["left"])
    centre, share = (data["left"] + data["right"]) / 2, 100 * data["share"]
    low, high = 100 * data["band_low"], 100 * data["band_high"]
    outside = (share < low) | (share > high)
    for here, colour in ((~outside, "accent"), (outside, "outside")):
        _bars(ax, centre[here], 0 * share[here], share[here], 0.86 * width, COLOURS[colour])
    # Before the bars the band would hide their ends; behind them only its edges can be seen.
    ax.fill_between([0, 1], low[0], high[0], color=COLOURS["band"], linewidth=0, zorder=0)
    for edge in (low[0], high[0]):
        ax.axhline(edge, color=COLOURS["ink"], linewidth=0.9)
    ax.set(xlim=(0, 1), ylim=(0, None), xlabel="PIT value F(y)", ylabel="Targets, %")


def draw_scores(ax: Axes, curve: Curve) -> None:
    """Histograms of the uncertainty of held-out and OOD rows."""
    data = {key: np.array(values, float) for key, values in curve.items()}
    edges = np.append(data["left"], data["right"][-1])
    for key, label, colour, dash in (
        ("held_out", "held-out", "accent", "-"),
        ("ood", "OOD", "outside", _DASHES[1]),
    ):
        ax.stairs(
            100 * data[key],
            edges,
            color=COLOURS[colour],
            linewidth=1.4,
            linestyle=dash,
            label=label,
        )
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, None), xlabel="Uncertainty", ylabel="Rows, %")
    _legend(ax)


# -- all methods on one axes -------------------------------------------------------------------


def draw_coverage(ax: Axes, curves: Mapping[str, Curve]) -> None:
    """Share of targets inside intervals of each nominal coverage."""
    _diagonal(ax)
    first = next(iter(curves.values()))
    nominal = np.array(first["nominal"])
    low, high = np.array(first["band_low"]), np.array(first["band_high"])
    ax.fill_between(nominal, low, high, color=COLOURS["band"], linewidth=0)
    for style, (name, curve) in _styled(curves):
        ax.plot(curve["nominal"], curve["share"], label=name, **style)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="Nominal coverage", ylabel="Share of targets inside")
    _legend(ax, len(curves) > 1)


def draw_risk_coverage(ax: Axes, curves: Mapping[str, Curve], risk: str) -> None:
    """Risk among the most confident rows against their share."""
    for style, (name, curve) in _styled(curves):
        ax.plot(curve["coverage"], curve["risk"], label=name, **style)
    ax.set(xlim=(0, 1), ylim=(0, None), xlabel="Share of rows answered", ylabel=risk)
    _legend(ax, len(curves) > 1)


def draw_roc(ax: Axes, curves: Mapping[str, Curve]) -> None:
    """ROC curve of telling OOD from held-out rows."""
    _diagonal(ax)
    for style, (name, curve) in _styled(curves):
        ax.plot(curve["fpr"], curve["tpr"], label=name, **style)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="Held-out rows flagged", ylabel="OOD rows flagged")
    _legend(ax, len(curves) > 1)


def risk_label(task: str) -> str:
    """What the risk of a risk–coverage curve is."""
    return "Error rate" if task == "classification" else "RMSE, target units"


_ALONE: dict[str, Callable[[Axes, Curve], None]] = {
    "reliability": draw_reliability,
    "pit": draw_pit,
    "scores": draw_scores,
}


# -- for papers --------------------------------------------------------------------------------


def plot(
    report: Report, kind: str | None, methods: Sequence[str] | None, ax: Any
) -> Axes | list[Axes]:
    """Draw a diagram of ``report``; see :meth:`Report.plot`."""
    first = next(iter(report.methods.values()))
    kind = next(iter(first.curves)) if kind is None else kind
    if kind not in first.curves:
        raise ParameterError(
            f"Report.plot: kind must be one of {sorted(first.curves)} for this report, got "
            f"{kind!r}{'' if report.n_ood else ' (roc and scores need ood=)'}."
        )
    chosen = list(report.methods) if methods is None else list(methods)
    unknown = [name for name in chosen if name not in report.methods]
    if unknown or not chosen:
        raise ParameterError(
            f"Report.plot: methods must be among {list(report.methods)}, got "
            f"{unknown[0] if unknown else 'none'!r}."
        )
    curves = {name: report.methods[name].curves[kind] for name in chosen}
    axes = _axes(ax, 1 if kind in OVERLAID else len(chosen))
    if kind in OVERLAID:
        draw_overlaid(axes[0], kind, curves, report.task)
        return axes[0]
    for each, (name, curve) in zip(axes, curves.items(), strict=True):
        _ALONE[kind](each, curve)
        if len(chosen) > 1:
            each.set_title(name, parse_math=False)
    return axes[0] if len(axes) == 1 else axes


def draw_overlaid(ax: Axes, kind: str, curves: Mapping[str, Curve], task: str) -> None:
    """Draw one of the kinds that show all methods in one diagram."""
    if kind == "coverage":
        draw_coverage(ax, curves)
    elif kind == "roc":
        draw_roc(ax, curves)
    else:
        draw_risk_coverage(ax, curves, risk_label(task))


def _axes(ax: Any, count: int) -> list[Axes]:
    if ax is None:
        import matplotlib.pyplot as plt

        _, made = plt.subplots(
            1, count, squeeze=False, figsize=(4 * count, 3.4), layout="constrained"
        )
        return list(made[0])
    given = list(np.ravel(ax))
    if len(given) < count:
        raise ParameterError(
            f"Report.plot: ax must hold {count} axes, one a method, got {len(given)}; name one "
            "method with methods=[…]."
        )
    return given[:count]


# -- for pages ---------------------------------------------------------------------------------


def reliability_figure(curve: Curve) -> Figure:
    """Reliability diagram with the number of rows in each bin below."""
    figure, (top, bottom) = _figure(3.5, 3.9, heights=(3.2, 1.0))
    draw_reliability(top, curve)
    top.set_xlabel("")
    top.tick_params(labelbottom=False)
    draw_counts(bottom, curve)
    return figure


def figure_of(kind: str, curves: Mapping[str, Curve], task: str) -> Figure:
    """Figure of one diagram; all methods in it, or a single one."""
    curve = next(iter(curves.values()))
    if kind == "reliability":
        return reliability_figure(curve)
    figure, (ax,) = _figure(3.5, 2.8, heights=(1.0,))
    if kind in OVERLAID:
        draw_overlaid(ax, kind, curves, task)
    else:
        _ALONE[kind](ax, curve)
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
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


_METADATA = ("Creator", "Date", "Format", "Type")


# -- parts -------------------------------------------------------------------------------------


def _figure(width: float, height: float, heights: tuple[float, ...]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(len(heights), squeeze=False, gridspec_kw={"height_ratios": heights})
    if len(heights) == 1:
        figure.set_layout_engine("constrained")  # numbers of any width beside the axis
    else:
        figure.subplots_adjust(left=0.17, right=0.96, top=0.97, bottom=0.5 / height, hspace=0.09)
    for ax in axes[:, 0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(COLOURS["line"])
        ax.tick_params(color=COLOURS["line"], labelcolor=COLOURS["muted"], labelsize=9)
        ax.xaxis.label.set(color=COLOURS["ink"], size=10)
        ax.yaxis.label.set(color=COLOURS["ink"], size=10)
        ax.set_axisbelow(True)
    figure.align_ylabels()
    return figure, list(axes[:, 0])


def _full(curve: Curve) -> dict[str, NDArray[np.float64]]:
    """Columns of the bins that hold rows."""
    full = [i for i, count in enumerate(curve["count"]) if count]
    return {key: np.array([values[i] for i in full], float) for key, values in curve.items()}


def _diagonal(ax: Axes) -> None:
    ax.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))


def _styled(curves: Mapping[str, Curve]) -> Any:
    for i, item in enumerate(curves.items()):
        colour, dash = COLOURS[_SERIES[i % len(_SERIES)]], _DASHES[i % len(_DASHES)]
        yield {"color": colour, "linestyle": dash, "linewidth": 1.5}, item


def _legend(ax: Axes, shown: bool = True) -> None:
    if not shown:
        return
    legend = ax.legend(frameon=False, fontsize=8.5, labelcolor=COLOURS["ink"], handlelength=2.6)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a dollar sign
        name = text.get_text()
        text.set_text(name if len(name) <= 24 else name[:23] + "…")


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

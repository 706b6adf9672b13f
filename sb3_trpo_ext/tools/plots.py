"""Panels as pictures, by Matplotlib. Not by way of pyplot: this needs no display, and leaves the user's backend alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from sb3_trpo_ext.tools.panels import Panel

STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "dashed": {"linewidth": 1.2, "linestyle": "--"},
    "faint": {"linewidth": 0.7, "alpha": 0.35},
    "points": {"linestyle": "", "marker": ".", "markeredgewidth": 0, "alpha": 0.4, "rasterized": True},
    "dots": {"linestyle": "", "marker": "o", "markersize": 4},
    "crosses": {"linestyle": "", "marker": "x", "markersize": 5},
}


def style(axes: Axes, title: str) -> None:
    """Make a small diagram plain."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_panel(axes: Axes, panel: Panel, end: float) -> None:
    """
    Draw a panel.

    :param axes: where
    :param panel: what
    :param end: the last timestep of the page
    """
    style(axes, panel.title)
    shown: set[str] = set()
    for line in panel.lines:
        # Several runs have their own legend: what a mark means is said once
        label = line.label if line.in_legend and line.label not in shown else None
        shown.add(line.label)
        if line.upper is not None:
            axes.fill_between(line.x, line.y, line.upper, color=line.color, alpha=0.2, linewidth=0, label=label)
            continue
        (drawn,) = axes.plot(line.x, line.y, color=line.color, label=label, **STYLES[line.kind])
        if line.kind == "points":
            drawn.set_markersize(4 if len(line.x) > 1000 else 7)
    if panel.is_log:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=panel.scale == "whole"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    if panel.scale in ("whole", "zero"):
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_legend_handles_labels()[0]:
        for handle in axes.legend(fontsize=8, framealpha=0.85, loc="best").get_lines():
            handle.set_alpha(1.0)


def run_colors(n_runs: int) -> list[str]:
    """A color for each run, the same in every panel."""
    palette = colormaps["tab10" if n_runs <= 10 else "tab20"]
    return [to_hex(palette(index % palette.N)) for index in range(n_runs)]


def draw_learning_curve(path: str | Path, panel: Panel, end: float, final: Sequence[float] = ()) -> None:
    """
    Draw a picture of returns against environment steps.

    :param path: where to write it
    :param panel: the returns
    :param end: the last timestep
    :param final: returns of the agent at the end, if there are any
    """
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    if final:
        mean, std, label = np.mean(final), np.std(final), f"trained agent, mean ± std of {len(final)} episodes"
        axes.errorbar(end, mean, yerr=std, label=label, fmt="D", color="black", markersize=5, capsize=4, zorder=5)
    draw_panel(axes, panel, 1.02 * end)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return of an episode")
    figure.savefig(path)

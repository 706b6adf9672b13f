"""The command ``sb3-trpo plot``: one page of diagnostics of one run or of several, as a picture and as an interactive page."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from sb3_trpo_ext.tools.panels import PHASE_COLORS, Bars, Panel, make_panels, phases
from sb3_trpo_ext.tools.plots import run_colors, show_legend
from sb3_trpo_ext.zoo.runs import Run, read_run

STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "dashed": {"linewidth": 1.2, "linestyle": "--"},
    "faint": {"linewidth": 0.7, "alpha": 0.35},
    "points": {"linestyle": "", "marker": ".", "markeredgewidth": 0, "alpha": 0.4, "rasterized": True},
    "dots": {"linestyle": "", "marker": "o", "markersize": 4},
    "crosses": {"linestyle": "", "marker": "x", "markersize": 5},
}
N_COLUMNS = 3


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
    if any(line.in_legend for line in panel.lines):
        show_legend(axes, fontsize=8, framealpha=0.85)


def draw_bars(axes: Axes, bars: Bars) -> None:
    """Draw the time per phase."""
    style(axes, bars.title)
    rows = np.arange(len(bars.labels))
    left = np.zeros(len(rows))
    for phase, seconds in bars.seconds.items():
        axes.barh(rows, seconds, left=left, color=PHASE_COLORS[phase], label=phase, height=0.6)
        left += seconds
    axes.set_yticks(rows, bars.labels if len(rows) > 1 else [""])
    # From the top, with room for the legend at the bottom
    axes.set_ylim(1.35 * len(rows) - 0.4, -0.6)
    axes.set_xlabel("seconds", fontsize=9)
    axes.set_xlim(0, 1.05 * left.max())
    axes.grid(visible=False, axis="y")
    axes.legend(fontsize=8, ncols=len(bars.seconds), loc="lower right", framealpha=0.85)


def draw_page(path: str | Path, runs: Sequence[Run]) -> None:
    """
    Draw the page as a picture: the returns above, everything else in three columns.

    :param path: where to write it
    :param runs: the runs
    """
    colors = run_colors(len(runs))
    (first, *others), bars = make_panels(runs, colors), phases(runs)
    n_small = len(others) + bool(bars.labels)
    n_rows = -(-n_small // N_COLUMNS)
    end = 1.01 * max((line.x.max() for panel in (first, *others) for line in panel.lines), default=1.0)
    figure = Figure(figsize=(12, 4 + 2.5 * n_rows), dpi=110, layout="constrained")
    grid = figure.add_gridspec(1 + n_rows, N_COLUMNS, height_ratios=[1.6] + [1.0] * n_rows)
    cells = [grid[0, :], *(grid[1 + index // N_COLUMNS, index % N_COLUMNS] for index in range(len(others)))]
    drawn = [figure.add_subplot(cell) for cell in cells]
    for axes, panel in zip(drawn, (first, *others), strict=True):
        draw_panel(axes, panel, end)
    if bars.labels:
        row, column = divmod(len(others), N_COLUMNS)
        draw_bars(figure.add_subplot(grid[1 + row, column:]), bars)
    # The first one, and those with nothing below them
    for axes in (drawn[0], *drawn[max(n_small - N_COLUMNS + 1, 1) :]):
        axes.set_xlabel("environment steps", fontsize=9)
    if len(runs) == 1:
        figure.suptitle(runs[0].label, fontsize=13)
    else:
        handles = [Line2D([], [], color=color, linewidth=3, label=run.label) for run, color in zip(runs, colors, strict=True)]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 4), fontsize=9)
    figure.savefig(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sb3-trpo plot", description="Draw returns and updates of one run, or of several over each other."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of a run, such as logs/trpo_ext/Hopper-v5_1")
    output_help = "the picture (default: diagnostics.png, of one run in its folder, of several here)"
    parser.add_argument("-o", "--output", metavar="PNG", help=output_help)
    parser.add_argument("--no-html", action="store_true", help="leave out the interactive page")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """
    Draw the diagnostics of runs.

    :param argv: the arguments, those of the process if None
    :raises ValueError: if a run cannot be read, or the output is not a picture
    """
    args = _parser().parse_args(argv)
    default = Path(args.runs[0] if len(args.runs) == 1 else ".") / "diagnostics.png"
    png = Path(args.output) if args.output else default
    if png.suffix.lower() != ".png":
        raise ValueError(f"--output must be a file that ends in .png, got {str(png)!r}")
    runs = [read_run(folder) for folder in args.runs]
    draw_page(png, runs)
    print(f"  diagnostics      {png}")
    if args.no_html:
        return
    if importlib.util.find_spec("plotly") is None:
        print("  no interactive page: pip install 'sb3-trpo-ext[plots]' brings Plotly, which draws it")
        return
    from sb3_trpo_ext.tools.diagnostics_html import write_page

    html = png.with_suffix(".html")
    write_page(html, runs)
    print(f"  interactive page {html}")

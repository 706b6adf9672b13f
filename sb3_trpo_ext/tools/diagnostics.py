"""The command ``sb3-trpo plot``: one page of diagnostics of one run or of several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sb3_trpo_ext.tools.panels import PHASE_COLORS, Bars, make_panels, phases
from sb3_trpo_ext.tools.plots import draw_panel, run_colors, style
from sb3_trpo_ext.zoo.runs import Run, read_run

N_COLUMNS = 3


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

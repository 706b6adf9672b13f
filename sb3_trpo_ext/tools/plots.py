"""
Lines in panels, and how Matplotlib draws them.

Not by way of pyplot: this needs no display, and leaves the user's backend alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from sb3_trpo_ext.zoo.runs import Curve

#: Episodes of a moving average, at most.
WINDOW = 100
STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "dashed": {"linewidth": 1.2, "linestyle": "--"},
    "faint": {"linewidth": 0.7, "alpha": 0.35},
    "points": {"linestyle": "", "marker": ".", "markeredgewidth": 0, "alpha": 0.4, "rasterized": True},
    "dots": {"linestyle": "", "marker": "o", "markersize": 4},
    "crosses": {"linestyle": "", "marker": "x", "markersize": 5},
}


class Line(NamedTuple):
    """Something to draw: ``kind`` is one of ``STYLES``, or band (between ``y`` and ``upper``)."""

    kind: str
    #: In the legend of the panel, which has what is special to it; empty for no entry.
    label: str
    color: str
    x: np.ndarray
    y: np.ndarray
    upper: np.ndarray | None = None


class Panel(NamedTuple):
    """One diagram."""

    title: str
    lines: list[Line]
    # How the values are scaled: "auto", "log" (where that helps), "whole" numbers, from "zero" on, or without "outliers"
    scale: str = "auto"

    @property
    def _values(self) -> np.ndarray:
        return np.concatenate([line.y[np.isfinite(line.y)] for line in self.lines])

    @property
    def is_log(self) -> bool:
        """Whether the axis is logarithmic: only where the values are positive and far apart."""
        return self.scale == "log" and bool(self._values.max() > 20 * self._values.min() > 0)

    @property
    def limits(self) -> tuple[float, float] | None:
        """What to show where single values would hide all others; None for all."""
        if self.scale != "outliers":
            return None
        low, high = np.quantile(self._values, (0.01, 0.97))
        margin = 0.1 * (high - low)
        return (low - margin, high + margin) if np.ptp(self._values) > 5 * (high - low) > 0 else None


def return_lines(episodes: Curve, evaluations: Curve, color: str, is_single: bool) -> list[Line]:
    """
    Returns of a run: episodes with their moving average and the middle 80%, and evaluations.

    :param episodes: of training
    :param evaluations: during training
    :param color: of the run
    :param is_single: whether it is the only run of the picture, which has room for more
    :return: the lines, none of what is empty
    """
    lines = []
    steps, returns = episodes
    if len(steps) > 0:
        window = min(WINDOW, max(len(steps) // 10, 1))
        rolling = pandas.Series(returns).rolling(window, min_periods=1)
        # Where several environments end an episode in the same step, one point is enough
        last = np.append(np.diff(steps) > 0, True)
        low, high, mean = (part[last].to_numpy() for part in (rolling.quantile(0.1), rolling.quantile(0.9), rolling.mean()))
        if is_single:
            lines.append(Line("points", "episode", color, steps, returns))
        lines.append(Line("band", "10-90%" if is_single else "", color, steps[last], low, high))
        lines.append(Line("line", f"mean of {window} episodes" if is_single else "", color, steps[last], mean))
    steps, returns = evaluations
    if len(steps) > 0:
        mean, std = returns.mean(axis=1), returns.std(axis=1)
        if is_single:
            color = "#ff7f0e"
            lines.append(Line("band", "evaluation, ± std", color, steps, mean - std, mean + std))
        lines.append(Line("dots", "evaluation", color, steps, mean))
    return lines


def threshold_line(label: str, threshold: float, end: float) -> Line:
    """A return that counts as a solution, from the first timestep to the last."""
    return Line("dashed", label, "#444444", np.array([0.0, end]), np.full(2, threshold))


def run_colors(n_runs: int) -> list[str]:
    """A color for each run, the same in every panel."""
    palette = colormaps["tab10" if n_runs <= 10 else "tab20"]
    return [to_hex(palette(index % palette.N)) for index in range(n_runs)]


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
        label = "" if line.label in shown else line.label
        shown.add(label)
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

"""The command ``sb3-trpo plot``: one page of diagnostics of one run or of several, as a picture and as an interactive page."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from sb3_trpo_ext.optim import UpdateStatus
from sb3_trpo_ext.tools.plots import WINDOW, moving_average
from sb3_trpo_ext.zoo.runs import Run, read_run, reward_threshold

#: Statuses of an update with which nothing is wrong.
NOT_REJECTED = tuple(map(str, (UpdateStatus.ACCEPTED, UpdateStatus.ZERO_TARGET_KL, UpdateStatus.NOTHING_TO_TRAIN)))
#: Above this many points a line has its moving average drawn over it, of a fortieth of them.
N_SMOOTH = 40
#: Parts of an update's time, in the order in which they are stacked.
PHASES = {
    "rollout": ("time/rollout",),
    "evaluation": ("time/evaluation",),
    "policy": ("time/policy_update",),
    "critic": ("time/critic_update",),
    "update": ("time/update",),
}
PHASE_COLORS = {"rollout": "#9aa5b1", "evaluation": "#5b9e6f", "policy": "#d9822b", "critic": "#3d7ebf", "update": "#7a5aa6"}

STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.6},
    "dashed": {"linewidth": 1.2, "linestyle": "--"},
    "faint": {"linewidth": 0.7, "alpha": 0.35},
    "points": {"linestyle": "", "marker": ".", "markeredgewidth": 0, "alpha": 0.4, "rasterized": True},
    "dots": {"linestyle": "", "marker": "o", "markersize": 4},
    "crosses": {"linestyle": "", "marker": "x", "markersize": 5},
}


class Line(NamedTuple):
    """Something to draw: ``kind`` is line, dashed, faint, points, dots, crosses or band (between ``y`` and ``upper``)."""

    kind: str
    label: str
    color: str
    x: np.ndarray
    y: np.ndarray
    upper: np.ndarray | None = None
    # The legend of the page has runs, the legend of a panel what is special to it
    in_legend: bool = False


class Panel(NamedTuple):
    """One diagram of the page."""

    title: str
    lines: list[Line]
    # How the values are scaled: "auto", "log" (where that helps), "whole" numbers, from "zero" on, or without "outliers"
    scale: str = "auto"

    @property
    def is_log(self) -> bool:
        """Whether the axis is logarithmic: only where the values are positive and far apart."""
        values = np.concatenate([line.y for line in self.lines])
        return self.scale == "log" and bool(values.min() > 0) and bool(values.max() > 20 * values.min())

    @property
    def limits(self) -> tuple[float, float] | None:
        """What to show where single values would hide all others; None for all."""
        values = np.array([value for line in self.lines for value in line.y if np.isfinite(value)])
        if self.scale != "outliers" or len(values) == 0:
            return None
        low, high = np.quantile(values, (0.01, 0.97))
        margin = 0.1 * (high - low)
        return (low - margin, high + margin) if values.max() - values.min() > 5 * (high - low) > 0 else None


class Bars(NamedTuple):
    """Seconds of an update, by run and phase."""

    title: str
    labels: list[str]
    colors: list[str]
    seconds: dict[str, list[float]]


def returns_panel(runs: Sequence[Run], colors: Sequence[str]) -> Panel:
    """
    Returns of episodes with their moving average and the band of the middle 80%, evaluations, and the registry's threshold.

    :param runs: the runs
    :param colors: one for each run
    :return: the panel
    """
    lines = []
    for run, color in zip(runs, colors, strict=True):
        steps, returns = run.episodes
        if len(steps) > 0:
            window = min(WINDOW, max(len(steps) // 10, 1))
            rolling = pandas.Series(returns).rolling(window, min_periods=1)
            if len(runs) == 1:
                lines.append(Line("points", "episode", color, steps, returns, in_legend=True))
            # Where several environments end an episode in the same step, one point is enough
            last = np.append(np.diff(steps) > 0, True)
            low, high = (rolling.quantile(share).to_numpy()[last] for share in (0.1, 0.9))
            lines.append(Line("band", "10-90%", color, steps[last], low, high, in_legend=len(runs) == 1))
            label, average = f"mean of {window} episodes", moving_average(returns, window)[last]
            lines.append(Line("line", label, color, steps[last], average, in_legend=len(runs) == 1))
        if len(run.evaluations.steps) > 0:
            mean = run.evaluations.returns.mean(axis=1)
            dots = "black" if len(runs) == 1 else color
            lines.append(Line("dots", "evaluation", dots, run.evaluations.steps, mean, in_legend=True))
    end = max((line.x[-1] for line in lines), default=1.0)
    for env_id in sorted({run.env_id for run in runs if run.env_id}):
        threshold = reward_threshold(env_id)
        if threshold is not None:
            solved = f"{env_id}: solved at {threshold:g}"
            lines.append(Line("dashed", solved, "#444444", np.array([0.0, end]), np.full(2, threshold), in_legend=True))
    return Panel("return of an episode", lines)


def series(run: Run, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """
    A column of the updates, without the rows that have no number there.

    :param run: the run
    :param names: of the column; the first one that exists is taken, and one that begins with a minus is negated
    :return: timesteps and values; empty if there is no such column
    """
    for name in names:
        column = name.removeprefix("-")
        if column in run.updates:
            values = pandas.to_numeric(run.updates[column], errors="coerce").to_numpy(float)
            finite = np.isfinite(values)
            if finite.any():
                sign = -1.0 if name.startswith("-") else 1.0
                return run.updates["timesteps"].to_numpy(float)[finite], sign * values[finite]
    return np.zeros(0), np.zeros(0)


def update_lines(run: Run, color: str, names: Sequence[str], kind: str = "line", label: str = "") -> list[Line]:
    """
    A column of the updates as a line; a long one is faint, with its moving average over it.

    :param run: the run
    :param color: its colour
    :param names: as for :func:`series`
    :param kind: of the line
    :param label: for the panel's legend; empty for none
    :return: the lines, none if there is no such column
    """
    x, y = series(run, names)
    if len(x) == 0:
        return []
    smooth = Line(kind, label or run.label, color, x, moving_average(y, max(len(y) // N_SMOOTH, 1)), None, bool(label))
    return [smooth] if len(y) < 2 * N_SMOOTH else [Line("faint", run.label, color, x, y), smooth]


def kl_panel(runs: Sequence[Run], colors: Sequence[str]) -> Panel:
    """
    KL divergence of the updates, with its bound, and crosses where an update was rejected.

    :param runs: the runs
    :param colors: one for each run
    :return: the panel
    """
    lines = []
    for run, color in zip(runs, colors, strict=True):
        x, kl = series(run, ("kl_divergence_loss", "approx_kl"))
        if len(x) == 0:
            continue
        lines.append(Line("line" if len(x) < 2 * N_SMOOTH else "points", run.label, color, x, kl))
        bound_x, bound = series(run, ("target_kl",))
        if len(bound) == 0 and isinstance(run.settings.get("target_kl"), float):
            # sb3-contrib and PPO do not log it
            bound_x, bound = x[[0, -1]], np.full(2, run.settings["target_kl"])
        if len(bound) > 0:
            lines.append(Line("dashed", "target_kl", color, bound_x, bound, in_legend=True))
        rejected = rejected_steps(run)
        if len(rejected) > 0:
            lines.append(Line("crosses", "rejected", "#c0392b", rejected, np.zeros(len(rejected)), in_legend=True))
    return Panel("KL divergence of an update", lines, "zero")


def rejected_steps(run: Run) -> np.ndarray:
    """
    When updates were rejected; one that there was no reason to make, such as for a frozen actor, was not.

    :param run: the run
    :return: timesteps
    """
    names = None
    # The first one is a number where the second one is there, and was the text before
    for column in ("status", "status_name"):
        if column in run.updates and not pandas.api.types.is_numeric_dtype(run.updates[column]):
            names = run.updates[column] if names is None else run.updates[column].combine_first(names)
    if names is None:
        steps, accepted = series(run, ("is_line_search_success",))
        return steps[accepted == 0]
    return run.updates["timesteps"].to_numpy(float)[(names.notna() & ~names.isin(NOT_REJECTED)).to_numpy()]


def phases(runs: Sequence[Run]) -> Bars:
    """
    How long an update took, by phase: the mean over a run.

    :param runs: the runs
    :return: bars; where policy and critic are logged, the rest of the update is left out
    """
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    timed = [run for run in runs if len(series(run, ("time/rollout",))[0]) > 0]
    for run in timed:
        means = {phase: float(np.mean(series(run, names)[1])) for phase, names in PHASES.items() if len(series(run, names)[1])}
        if "policy" in means:
            means.pop("update", None)
        for phase in PHASES:
            seconds[phase].append(means.get(phase, 0.0))
    total = {phase: values for phase, values in seconds.items() if any(values)}
    return Bars("seconds of an update, by phase", [run.label for run in timed], [], total)


def make_panels(runs: Sequence[Run], colors: Sequence[str]) -> list[Panel]:
    """
    All diagrams for which there is data; the returns come first.

    :param runs: the runs
    :param colors: one for each run
    :return: the panels
    """
    both = list(zip(runs, colors, strict=True))

    def of(*names: str) -> list[Line]:
        return [line for run, color in both for line in update_lines(run, color, names)]

    improvement = []
    for run, color in both:
        improvement += update_lines(run, color, ("improvement",), label="actual")
        improvement += update_lines(run, color, ("predicted_improvement",), "dashed", "predicted")[-1:]
    panels = [
        returns_panel(runs, colors),
        kl_panel(runs, colors),
        Panel("improvement of the objective", improvement, "outliers"),
        Panel("explained variance of the critic", of("explained_variance")),
        Panel("entropy of the policy", of("entropy", "-entropy_loss")),
        Panel("standard deviation of the actions", of("std")),
        Panel("step size", of("step_size"), "log"),
        Panel("trials of the line search", of("line_search_trials"), "whole"),
        Panel("conjugate gradient: steps", of("cg_steps"), "whole"),
        Panel("conjugate gradient: relative residual", of("cg_residual"), "log"),
        Panel("loss of the critic", of("value_loss"), "log"),
        Panel("KL penalty: beta", of("beta"), "log"),
    ]
    return [panel for panel in panels if panel.lines]


def draw_lines(axes: Axes, panel: Panel, end: float) -> None:
    """
    Draw a panel.

    :param axes: where
    :param panel: what
    :param end: the last timestep of the page
    """
    in_legend: set[str] = set()
    for line in panel.lines:
        # Several runs have their own legend: what a mark means is said once
        label = line.label if line.in_legend and line.label not in in_legend else None
        in_legend |= {line.label}
        if line.upper is not None:
            axes.fill_between(line.x, line.y, line.upper, color=line.color, alpha=0.2, linewidth=0, label=label)
            continue
        style = dict(STYLES[line.kind])
        if line.kind == "points":
            style["markersize"] = 4 if len(line.x) > 1000 else 7
        axes.plot(line.x, line.y, color=line.color, label=label, **style)
    axes.set_title(panel.title, fontsize=10, loc="left")
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
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if any(line.in_legend for line in panel.lines):
        for handle in axes.legend(fontsize=8, framealpha=0.85, loc="best").get_lines():
            handle.set_alpha(1.0)


def draw_bars(axes: Axes, bars: Bars) -> None:
    """
    Draw the time per phase.

    :param axes: where
    :param bars: what
    """
    left = np.zeros(len(bars.labels))
    rows = np.arange(len(bars.labels))
    for phase, seconds in bars.seconds.items():
        axes.barh(rows, seconds, left=left, color=PHASE_COLORS[phase], label=phase, height=0.6)
        left += seconds
    axes.set_yticks(rows, bars.labels if len(rows) > 1 else [""])
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.4 + 0.35 * len(rows), -0.6)
    axes.set_title(bars.title, fontsize=10, loc="left")
    axes.set_xlabel("seconds", fontsize=9)
    axes.set_xlim(0, 1.05 * left.max())
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, ncols=len(bars.seconds), loc="lower right", framealpha=0.85)


def draw_page(path: str | Path, runs: Sequence[Run]) -> None:
    """
    Draw the page as a picture.

    :param path: where to write it
    :param runs: the runs
    """
    colors = run_colors(len(runs))
    panels, bars = make_panels(runs, colors), phases(runs)
    first, others = panels[0], panels[1:]
    n_small = len(others) + bool(bars.labels)
    n_rows = -(-n_small // 3)
    end = 1.01 * max((line.x.max() for panel in panels for line in panel.lines), default=1.0)
    figure = Figure(figsize=(12, 4 + 2.5 * n_rows), dpi=110, layout="constrained")
    grid = figure.add_gridspec(1 + n_rows, 3, height_ratios=[1.6] + [1.0] * n_rows)
    top = figure.add_subplot(grid[0, :])
    draw_lines(top, first, end)
    lowest = [top]
    for index, panel in enumerate(others):
        axes = figure.add_subplot(grid[1 + index // 3, index % 3])
        draw_lines(axes, panel, end)
        if index + 3 >= n_small:
            lowest.append(axes)
    for axes in lowest[-3:]:
        axes.set_xlabel("environment steps", fontsize=9)
    if bars.labels:
        draw_bars(figure.add_subplot(grid[1 + len(others) // 3, len(others) % 3 :]), bars)
    if len(runs) == 1:
        figure.suptitle(runs[0].label, fontsize=13)
    else:
        handles = [Line2D([], [], color=color, linewidth=3, label=run.label) for run, color in zip(runs, colors, strict=True)]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 4), fontsize=9)
    figure.savefig(path)


def run_colors(n_runs: int) -> list[str]:
    """
    A colour for each run, the same in every panel.

    :param n_runs: number of runs
    :return: colours that Matplotlib and Plotly understand
    """
    palette = colormaps["tab10" if n_runs <= 10 else "tab20"]
    return [to_hex(palette(index % palette.N)) for index in range(n_runs)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sb3-trpo plot", description="Draw returns and updates of one run, or of several over each other."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of a run, such as logs/trpo_ext/Hopper-v5_1")
    parser.add_argument(
        "-o",
        "--output",
        metavar="PNG",
        help="the picture (default: diagnostics.png, of one run in its folder, of several here)",
    )
    parser.add_argument("--no-html", action="store_true", help="leave out the interactive page")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """
    Draw the diagnostics of runs.

    :param argv: the arguments, those of the process if None
    :raises ValueError: if a run cannot be read, or the output is no picture
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

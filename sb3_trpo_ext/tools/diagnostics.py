"""The command ``sb3-trpo plot``: one page of diagnostics of one run or of several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sb3_trpo_ext.optim import UpdateStatus
from sb3_trpo_ext.tools.plots import Line, Panel, draw_panel, return_lines, run_colors, style, threshold_line
from sb3_trpo_ext.zoo.runs import Run, read_run, reward_threshold

N_COLUMNS = 3
#: Statuses of an update with which nothing is wrong.
NOT_REJECTED = tuple(map(str, (UpdateStatus.ACCEPTED, UpdateStatus.ZERO_TARGET_KL, UpdateStatus.NOTHING_TO_TRAIN)))
#: A line of at least twice as many points gets its moving average, over a fortieth of them.
N_SMOOTH = 40
#: Columns of the parts of an update's time, in the order in which they are stacked, and their names.
PHASES = {
    "time/rollout": "rollout",
    "time/evaluation": "evaluation",
    "time/policy_update": "policy",
    "time/critic_update": "critic",
    "time/update": "update",
}
PHASE_COLORS = {"rollout": "#9aa5b1", "evaluation": "#5b9e6f", "policy": "#d9822b", "critic": "#3d7ebf", "update": "#7a5aa6"}
PHASES_TITLE = "seconds of an update, by phase"


def column(run: Run, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """
    A column of the updates, without the rows that have no number there.

    :param run: the run
    :param names: of the column; the first one with numbers is taken, and one that begins with a minus is negated
    :return: timesteps and values; empty if there is no such column
    """
    for name in names:
        if name.removeprefix("-") in run.updates:
            values = pandas.to_numeric(run.updates[name.removeprefix("-")], errors="coerce").to_numpy(float)
            finite = np.isfinite(values)
            if finite.any():
                return run.updates["timesteps"].to_numpy(float)[finite], values[finite] * (-1 if name.startswith("-") else 1)
    return np.zeros(0), np.zeros(0)


def returns_panel(runs: Sequence[Run], colors: Sequence[str]) -> Panel:
    """Returns of episodes and of evaluations, and the registry's thresholds."""
    lines = []
    for run, color in zip(runs, colors, strict=True):
        lines += return_lines(run.episodes, run.evaluations, color, len(runs) == 1)
    end = max((line.x[-1] for line in lines), default=1.0)
    for env_id in sorted({run.env_id for run in runs if run.env_id}):
        threshold = reward_threshold(env_id)
        if threshold is not None:
            lines.append(threshold_line(f"{env_id}: solved at {threshold:g}", threshold, end))
    return Panel("return of an episode", lines)


def kl_panel(runs: Sequence[Run], colors: Sequence[str]) -> Panel:
    """KL divergence of the updates, with its bound, and crosses where an update was rejected."""
    lines = []
    for run, color in zip(runs, colors, strict=True):
        x, kl = column(run, "kl_divergence_loss", "approx_kl")
        if len(x) == 0:
            continue
        lines.append(Line("line" if len(x) < 2 * N_SMOOTH else "points", "", color, x, kl))
        bound_x, bound = column(run, "target_kl")
        if len(bound) == 0 and isinstance(run.settings.get("target_kl"), float):
            # sb3-contrib and PPO do not log it
            bound_x, bound = x[[0, -1]], np.full(2, run.settings["target_kl"])
        rejected = rejected_steps(run)
        crosses = Line("crosses", "rejected", "#c0392b", rejected, np.zeros(len(rejected)))
        lines += [mark for mark in (Line("dashed", "target_kl", color, bound_x, bound), crosses) if len(mark.x) > 0]
    return Panel("KL divergence of an update", lines, "zero")


def rejected_steps(run: Run) -> np.ndarray:
    """The timesteps of rejected updates, without those that had nothing to do, as for a frozen actor."""
    # `status` is a number where `status_name` is there, and was the text before
    texts = run.updates.filter(["status_name", "status"]).select_dtypes(exclude="number")
    if texts.empty:
        steps, accepted = column(run, "is_line_search_success")
        return steps[accepted == 0]
    names = texts.bfill(axis=1).iloc[:, 0]
    return run.updates["timesteps"].to_numpy(float)[(names.notna() & ~names.isin(NOT_REJECTED)).to_numpy()]


def phases(runs: Sequence[Run]) -> pandas.DataFrame:
    """How long an update took: a row for each run that was timed with its means, a column for each phase that took time."""
    means = [run.updates.reindex(columns=list(PHASES)).mean() for run in runs]
    seconds = pandas.DataFrame(means, index=[run.label for run in runs]).rename(columns=PHASES)
    seconds = seconds.dropna(subset="rollout").fillna(0.0)
    # Where its parts are known, they are drawn instead
    seconds.loc[seconds["policy"] > 0, "update"] = 0.0
    return seconds.loc[:, seconds.any()]


def make_panels(runs: Sequence[Run], colors: Sequence[str]) -> list[Panel]:
    """
    All diagrams for which there is data; the returns come first.

    :param runs: the runs
    :param colors: one for each run
    :return: the panels
    """

    def lines_of(*names: str, kind: str = "line", label: str = "") -> list[Line]:
        """A column of each run; a long one is faint, with its moving average over it."""
        lines = []
        for run, color in zip(runs, colors, strict=True):
            x, y = column(run, *names)
            if len(x) == 0:
                continue
            if len(y) >= 2 * N_SMOOTH and kind == "line":
                lines.append(Line("faint", "", color, x, y))
            smooth = pandas.Series(y).rolling(max(len(y) // N_SMOOTH, 1), min_periods=1).mean().to_numpy()
            lines.append(Line(kind, label, color, x, smooth))
        return lines

    improvement = lines_of("improvement", label="actual")
    improvement += lines_of("predicted_improvement", kind="dashed", label="predicted")
    panels = [
        returns_panel(runs, colors),
        kl_panel(runs, colors),
        Panel("improvement of the objective", improvement, "outliers"),
        Panel("explained variance of the critic", lines_of("explained_variance")),
        Panel("entropy of the policy", lines_of("entropy", "-entropy_loss")),
        Panel("standard deviation of the actions", lines_of("std")),
        Panel("step size", lines_of("step_size"), "log"),
        Panel("trials of the line search", lines_of("line_search_trials"), "whole"),
        Panel("conjugate gradient: steps", lines_of("cg_steps"), "whole"),
        Panel("conjugate gradient: relative residual", lines_of("cg_residual"), "log"),
        Panel("loss of the critic", lines_of("value_loss"), "log"),
        Panel("KL penalty: beta", lines_of("beta"), "log"),
    ]
    return [panel for panel in panels if panel.lines]


def draw_phases(axes: Axes, seconds: pandas.DataFrame) -> None:
    """Draw what :func:`phases` returns."""
    style(axes, PHASES_TITLE)
    rows = np.arange(len(seconds))
    left = np.zeros(len(rows))
    for phase in seconds:
        axes.barh(rows, seconds[phase].to_numpy(), left=left, color=PHASE_COLORS[phase], label=phase, height=0.6)
        left += seconds[phase].to_numpy()
    axes.set_yticks(rows, seconds.index if len(rows) > 1 else [""])
    # From the top, with room for the legend at the bottom
    axes.set_ylim(1.35 * len(rows) - 0.4, -0.6)
    axes.set_xlabel("seconds", fontsize=9)
    axes.set_xlim(0, 1.05 * left.max())
    axes.grid(visible=False, axis="y")
    axes.legend(fontsize=8, ncols=seconds.shape[1], loc="lower right", framealpha=0.85)


def draw_page(path: str | Path, runs: Sequence[Run]) -> None:
    """
    Draw the page as a picture: the returns above, everything else in three columns.

    :param path: where to write it
    :param runs: the runs
    """
    colors = run_colors(len(runs))
    (first, *others), seconds = make_panels(runs, colors), phases(runs)
    names = [panel.title for panel in others] + [PHASES_TITLE] * (len(seconds) > 0)
    # The time per phase takes what is left of its row
    cells = names + [PHASES_TITLE if len(seconds) > 0 else "."] * (-len(names) % N_COLUMNS)
    mosaic = [[first.title] * N_COLUMNS, *np.reshape(cells, (-1, N_COLUMNS)).tolist()]
    n_rows = len(mosaic) - 1
    figure = Figure(figsize=(12, 4 + 2.5 * n_rows), dpi=110, layout="constrained")
    axes = figure.subplot_mosaic(mosaic, height_ratios=[1.6] + [1.0] * n_rows)
    end = 1.01 * max(line.x.max() for panel in (first, *others) for line in panel.lines)
    for panel in (first, *others):
        draw_panel(axes[panel.title], panel, end)
    if len(seconds) > 0:
        draw_phases(axes[PHASES_TITLE], seconds)
    # The first one, and those with nothing below them
    for panel in (first, *others[max(len(names) - N_COLUMNS, 0) :]):
        axes[panel.title].set_xlabel("environment steps", fontsize=9)
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

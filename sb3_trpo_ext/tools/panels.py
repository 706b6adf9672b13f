"""What the page of ``sb3-trpo plot`` shows of runs: lines in panels, before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas

from sb3_trpo_ext.optim import UpdateStatus
from sb3_trpo_ext.zoo.runs import Curve, Run, reward_threshold

#: Episodes of a moving average, at most.
WINDOW = 100
#: Statuses of an update with which nothing is wrong.
NOT_REJECTED = tuple(map(str, (UpdateStatus.ACCEPTED, UpdateStatus.ZERO_TARGET_KL, UpdateStatus.NOTHING_TO_TRAIN)))
#: A line of twice as many points has its moving average drawn over it, of a fortieth of them.
N_SMOOTH = 40
#: Parts of an update's time, in the order in which they are stacked, and their columns.
PHASES = {
    "rollout": "time/rollout",
    "evaluation": "time/evaluation",
    "policy": "time/policy_update",
    "critic": "time/critic_update",
    "update": "time/update",
}
PHASE_COLORS = {"rollout": "#9aa5b1", "evaluation": "#5b9e6f", "policy": "#d9822b", "critic": "#3d7ebf", "update": "#7a5aa6"}


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
    def _values(self) -> np.ndarray:
        return np.concatenate([np.zeros(0), *(line.y[np.isfinite(line.y)] for line in self.lines)])

    @property
    def is_log(self) -> bool:
        """Whether the axis is logarithmic: only where the values are positive and far apart."""
        values = self._values
        return self.scale == "log" and bool(values.min() > 0) and bool(values.max() > 20 * values.min())

    @property
    def limits(self) -> tuple[float, float] | None:
        """What to show where single values would hide all others; None for all."""
        values = self._values
        if self.scale != "outliers" or len(values) == 0:
            return None
        low, high = np.quantile(values, (0.01, 0.97))
        margin = 0.1 * (high - low)
        return (low - margin, high + margin) if np.ptp(values) > 5 * (high - low) > 0 else None


class Bars(NamedTuple):
    """Seconds of an update, by phase and run."""

    labels: list[str]
    seconds: dict[str, list[float]]
    title: str = "seconds of an update, by phase"


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values up to each one, of fewer at the beginning."""
    return pandas.Series(values).rolling(window, min_periods=1).mean().to_numpy()


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
        if is_single:
            lines.append(Line("points", "episode", color, steps, returns, in_legend=True))
        # Where several environments end an episode in the same step, one point is enough
        last = np.append(np.diff(steps) > 0, True)
        low, high = (rolling.quantile(share).to_numpy()[last] for share in (0.1, 0.9))
        lines.append(Line("band", "10-90%", color, steps[last], low, high, in_legend=is_single))
        mean = moving_average(returns, window)[last]
        lines.append(Line("line", f"mean of {window} episodes", color, steps[last], mean, in_legend=is_single))
    steps, returns = evaluations
    if len(steps) > 0:
        mean, std = returns.mean(axis=1), returns.std(axis=1)
        if is_single:
            color = "#ff7f0e"
            lines.append(Line("band", "evaluation, ± std", color, steps, mean - std, mean + std, in_legend=True))
        lines.append(Line("dots", "evaluation", color, steps, mean, in_legend=True))
    return lines


def threshold_line(label: str, threshold: float, end: float) -> Line:
    """A return that counts as a solution, from the first timestep to the last."""
    return Line("dashed", label, "#444444", np.array([0.0, end]), np.full(2, threshold), in_legend=True)


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
        lines.append(Line("line" if len(x) < 2 * N_SMOOTH else "points", run.label, color, x, kl))
        bound_x, bound = column(run, "target_kl")
        if len(bound) == 0 and isinstance(run.settings.get("target_kl"), float):
            # sb3-contrib and PPO do not log it
            bound_x, bound = x[[0, -1]], np.full(2, run.settings["target_kl"])
        rejected = rejected_steps(run)
        crosses = Line("crosses", "rejected", "#c0392b", rejected, np.zeros(len(rejected)), in_legend=True)
        marks = (Line("dashed", "target_kl", color, bound_x, bound, in_legend=True), crosses)
        lines += [mark for mark in marks if len(mark.x) > 0]
    return Panel("KL divergence of an update", lines, "zero")


def rejected_steps(run: Run) -> np.ndarray:
    """The timesteps of updates that were rejected; one that there was no reason to make, as for a frozen actor, was not."""
    # `status` is a number where `status_name` is there, and was the text before
    texts = run.updates.filter(["status_name", "status"]).select_dtypes(exclude="number")
    if texts.empty:
        steps, accepted = column(run, "is_line_search_success")
        return steps[accepted == 0]
    names = texts.iloc[:, 0] if texts.shape[1] == 1 else texts.iloc[:, 0].combine_first(texts.iloc[:, 1])
    return run.updates["timesteps"].to_numpy(float)[(names.notna() & ~names.isin(NOT_REJECTED)).to_numpy()]


def phases(runs: Sequence[Run]) -> Bars:
    """How long an update took, by phase: the mean over each run that was timed."""
    timed = [run for run in runs if len(column(run, PHASES["rollout"])[0]) > 0]
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for run in timed:
        means = {phase: float(values.mean()) if len(values := column(run, name)[1]) else 0.0 for phase, name in PHASES.items()}
        if means["policy"] > 0:
            # Its parts are known
            means["update"] = 0.0
        for phase, mean in means.items():
            seconds[phase].append(mean)
    return Bars([run.label for run in timed], {phase: values for phase, values in seconds.items() if any(values)})


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
                lines.append(Line("faint", run.label, color, x, y))
            smooth = moving_average(y, max(len(y) // N_SMOOTH, 1))
            lines.append(Line(kind, label or run.label, color, x, smooth, in_legend=bool(label)))
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

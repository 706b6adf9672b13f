"""The picture of one training run, and what it shares with other pictures: moving averages, colors, axes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from sb3_trpo_ext.zoo.runs import Curve

WINDOW = 100
EPISODES: dict[str, Any] = {"markersize": 5, "markeredgewidth": 0, "alpha": 0.4, "rasterized": True}
EVALUATIONS: dict[str, Any] = {"color": "tab:orange", "markersize": 3.5, "linewidth": 1.4}
FINAL: dict[str, Any] = {"color": "black", "markersize": 5, "capsize": 4, "linewidth": 1.4, "zorder": 5}


def averaging_window(values: Sequence[float] | np.ndarray) -> int:
    """Over how many values to average: a tenth of them, up to 100."""
    return min(WINDOW, max(len(values) // 10, 1))


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values up to each one, of fewer at the beginning."""
    return pandas.Series(values).rolling(window, min_periods=1).mean().to_numpy()


def run_colors(n_runs: int) -> list[str]:
    """A color for each run, the same in every panel, for Matplotlib and Plotly."""
    palette = colormaps["tab10" if n_runs <= 10 else "tab20"]
    return [to_hex(palette(index % palette.N)) for index in range(n_runs)]


def style_axes(axes: Axes, title: str) -> None:
    """Label and format the axes of a learning curve: environment steps against returns."""
    axes.set_title(title)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return of an episode")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def show_legend(axes: Axes, **style: Any) -> None:
    """Show the legend, with lines that are not transparent there."""
    for handle in axes.legend(loc="best", **style).get_lines():
        handle.set_alpha(1.0)


def plot_learning_curve(
    path: str | Path, title: str, training: Curve, evaluations: Curve, final_step: int, final_returns: Sequence[float]
) -> None:
    """
    Draw the learning curve of one run: returns of training and of evaluations against environment steps.

    :param path: where to write the picture
    :param title: title of the picture
    :param training: episodes of training
    :param evaluations: evaluations during training
    :param final_step: number of steps the agent was trained for
    :param final_returns: returns of the trained agent
    """
    # Not by way of pyplot: this needs no display, and leaves the user's backend and figures alone
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    if len(training.steps) > 0:
        axes.plot(*training, ".", color="tab:blue", label="training episode", **EPISODES)
        window = averaging_window(training.steps)
        average = moving_average(training.returns, window)
        axes.plot(training.steps, average, color="tab:blue", linewidth=1.8, label=f"training, mean of {window} episodes")
    if len(evaluations.steps) > 0:
        mean, std = evaluations.returns.mean(axis=1), evaluations.returns.std(axis=1)
        axes.fill_between(evaluations.steps, mean - std, mean + std, color="tab:orange", alpha=0.2, linewidth=0)
        label = f"evaluation, mean ± std of {evaluations.returns.shape[1]} episodes"
        axes.plot(evaluations.steps, mean, "o-", label=label, **EVALUATIONS)
    label = f"trained agent, mean ± std of {len(final_returns)} episodes"
    axes.errorbar(final_step, np.mean(final_returns), yerr=np.std(final_returns), fmt="D", label=label, **FINAL)
    style_axes(axes, title)
    show_legend(axes, framealpha=0.9, fontsize=9)
    figure.savefig(path)

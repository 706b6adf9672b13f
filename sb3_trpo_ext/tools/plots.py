"""The picture of a training run: returns of training and of evaluations against environment steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from sb3_trpo_ext.zoo.runs import Curve

WINDOW = 100


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """
    Mean of the last ``window`` values up to each one, of fewer at the beginning.

    :param values: shape ``(n,)``
    :param window: number of values
    :return: shape ``(n,)``
    """
    return pandas.Series(values).rolling(window, min_periods=1).mean().to_numpy()


def style_axes(axes: Axes, title: str) -> None:
    """
    Label and format the axes of a learning curve.

    :param axes: environment steps against returns
    :param title: title of the picture
    """
    axes.set_title(title)
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return of an episode")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_learning_curve(
    path: str | Path, title: str, training: Curve, evaluations: Curve, final_step: int, final_returns: Sequence[float]
) -> None:
    """
    Draw the learning curve of one run.

    :param path: where to write the picture
    :param title: title of the picture
    :param training: episodes of training
    :param evaluations: evaluations during training
    :param final_step: number of steps the agent was trained for
    :param final_returns: returns of the trained agent
    """
    # Not by way of pyplot: this needs no display, and leaves the user's backend and figures alone.
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    if len(training.steps) > 0:
        window = min(WINDOW, max(len(training.steps) // 10, 1))
        axes.plot(
            training.steps,
            training.returns,
            ".",
            color="tab:blue",
            markersize=5,
            markeredgewidth=0,
            alpha=0.4,
            rasterized=True,
            label="training episode",
        )
        average = moving_average(training.returns, window)
        axes.plot(training.steps, average, color="tab:blue", linewidth=1.8, label=f"training, mean of {window} episodes")
    if len(evaluations.steps) > 0:
        mean, std = evaluations.returns.mean(axis=1), evaluations.returns.std(axis=1)
        n_episodes = evaluations.returns.shape[1]
        axes.fill_between(evaluations.steps, mean - std, mean + std, color="tab:orange", alpha=0.2, linewidth=0)
        axes.plot(
            evaluations.steps,
            mean,
            "o-",
            color="tab:orange",
            markersize=3.5,
            linewidth=1.4,
            label=f"evaluation, mean ± std of {n_episodes} episodes",
        )
    axes.errorbar(
        [final_step],
        [np.mean(final_returns)],
        yerr=[np.std(final_returns)],
        fmt="D",
        color="black",
        markersize=5,
        capsize=4,
        linewidth=1.4,
        zorder=5,
        label=f"trained agent, mean ± std of {len(final_returns)} episodes",
    )
    style_axes(axes, title)
    legend = axes.legend(loc="best", frameon=True, framealpha=0.9, fontsize=9)
    for handle in legend.get_lines():
        handle.set_alpha(1.0)
    figure.savefig(path)

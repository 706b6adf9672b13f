"""What a comparison comes to: statistics over seeds, as a table and as learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas
from rliable import library, metrics

from sb3_trpo_ext.callbacks import EVALUATION
from sb3_trpo_ext.tools.plots import Line, Panel, draw_learning_curve, run_colors, threshold_line
from sb3_trpo_ext.zoo.runs import Curve, Run

N_BOOTSTRAP = 2000


def interquartile_means(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Interquartile mean over seeds, and tasks if there are several, with its 95% interval, by rliable's stratified bootstrap.

    :param scores: shape ``(n_seeds, n_points)`` or ``(n_seeds, n_tasks, n_points)``
    :return: the means, shape ``(n_points,)``, and the ends of the intervals, shape ``(2, n_points)``; NaN for a single seed
    """

    def means(values: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(values[..., point]) for point in range(values.shape[-1])])

    # rliable's runs, tasks and points
    stacked = scores[:, None, :] if scores.ndim == 2 else scores
    if len(scores) == 1:
        return means(stacked), np.full((2, scores.shape[-1]), np.nan)
    # rliable draws from NumPy's global generator, whatever `random_state` says
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        center, interval = library.get_interval_estimates({"": stacked}, means, reps=N_BOOTSTRAP)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return center[""], interval[""]


def common_curves(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """
    The evaluations of several seeds at the same steps: those of the shortest run, between which the others are interpolated.

    :param curves: of each seed, at least one
    :return: the steps, shape ``(n_points,)``, and mean returns, shape ``(n_seeds, n_points)``
    """
    steps = min((curve.steps for curve in curves), key=lambda steps: steps[-1])
    return steps, np.stack([np.interp(steps, curve.steps, curve.returns.mean(axis=1)) for curve in curves])


def steps_to(threshold: float, curve: Curve) -> float:
    """
    When a run has first been evaluated at a return or better.

    :param threshold: the return
    :param curve: evaluations
    :return: environment steps; NaN if never
    """
    reached = curve.steps[curve.returns.mean(axis=1) >= threshold]
    return float(reached[0]) if len(reached) else float("nan")


def area_under(curve: Curve) -> float:
    """
    The area under a learning curve divided by its length: the mean return over all of training, from the first evaluation on.

    :param curve: evaluations
    :return: in units of the return
    """
    steps, returns = curve.steps, curve.returns.mean(axis=1)
    return float(np.trapezoid(returns, steps) / (steps[-1] - steps[0])) if len(steps) > 1 else float(returns[0])


def speed_of(updates: pandas.DataFrame) -> float:
    """
    Steps per second of a training, its evaluations left out.

    :param updates: what each update has logged
    :return: the speed; NaN where it is not known how long the evaluations took
    """
    if len(updates) == 0 or not {"time/time_elapsed", EVALUATION} <= set(updates):
        return float("nan")
    last = updates.iloc[-1]
    return float(last["timesteps"] / (last["time/time_elapsed"] - updates[EVALUATION].sum()))


def make_table(results: Mapping[str, Sequence[Run]], threshold: float | None) -> pandas.DataFrame:
    """
    The figures of a comparison, one row for each algorithm.

    :param results: finished runs by algorithm; one without any has a row of NaN
    :param threshold: the return of the column "steps to", None for no such column
    :return: the table
    """
    rows = []
    for algo, runs in results.items():
        row: dict[str, object] = {"algorithm": algo, "seeds": len(runs)}
        rows.append(row)
        if not runs:
            continue
        curves = [run.evaluations for run in runs]
        final = pandas.Series([curve.returns[-1].mean() for curve in curves])
        iqm, interval = interquartile_means(final.to_numpy()[:, None])
        row |= {"final return": final.mean(), "std over seeds": final.std()}
        row |= {"IQM": iqm[0], "IQM low": interval[0, 0], "IQM high": interval[1, 0]}
        row |= {"area under curve": np.mean([area_under(curve) for curve in curves]), "worst seed": final.min()}
        if threshold is not None:
            reached = pandas.Series([steps_to(threshold, curve) for curve in curves]).dropna()
            row |= {f"steps to {threshold:g}": reached.median(), f"seeds that reach {threshold:g}": len(reached)}
        row["steps/s"] = pandas.Series([speed_of(run.updates) for run in runs]).dropna().median()
    return pandas.DataFrame(rows)


def as_markdown(table: pandas.DataFrame) -> str:
    """
    The table for people: intervals in brackets, thousands separated.

    :param table: of :func:`make_table`
    :return: Markdown
    """

    def number(value: float) -> str:
        return "-" if not np.isfinite(value) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"

    text = table.drop(columns="algorithm").map(number)
    shown = {
        "algorithm": table["algorithm"],
        "seeds": text["seeds"],
        "final return": text["final return"] + " ± " + text["std over seeds"],
        "IQM [95%]": text["IQM"] + " [" + text["IQM low"] + ", " + text["IQM high"] + "]",
        "area under the curve": text["area under curve"],
        "worst seed": text["worst seed"],
    }
    for name in text.filter(like="steps to "):
        reached = " (" + text[name.replace("steps to", "seeds that reach")] + " of " + text["seeds"] + " seeds)"
        shown[name] = text[name] + reached.where(table["seeds"] > 0, "")
    shown["steps/s"] = text["steps/s"]
    rows = ["| " + " | ".join(row) + " |" for row in zip(*shown.values(), strict=True)]
    return "\n".join(["| " + " | ".join(shown) + " |", "|---" * len(shown) + "|", *rows])


def draw_curves(path: Path, title: str, results: Mapping[str, Sequence[Run]], threshold: float | None) -> None:
    """
    Draw the learning curves: the interquartile mean over seeds with its 95% interval, and each seed as a thin line.

    :param path: where to write the picture
    :param title: its title
    :param results: finished runs by algorithm
    :param threshold: a line to draw, None for none
    """
    lines = []
    for (algo, runs), color in zip(results.items(), run_colors(len(results)), strict=True):
        if not runs:
            continue
        steps, curves = common_curves([run.evaluations for run in runs])
        center, (low, high) = interquartile_means(curves)
        lines += [Line("faint", "", color, steps, curve) for curve in curves]
        lines.append(Line("band", "", color, steps, low, high))
        label = f"{algo} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
        lines.append(Line("line", label, color, steps, center))
    end = max((line.x[-1] for line in lines), default=1.0)
    if threshold is not None:
        lines.append(threshold_line(f"threshold {threshold:g}", threshold, end))
    draw_learning_curve(path, Panel(title, lines), end)

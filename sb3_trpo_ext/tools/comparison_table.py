"""What a comparison comes to: statistics over seeds, as a table and as learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
from rliable import library, metrics

from sb3_trpo_ext.tools.plots import Line, Panel, draw_learning_curve, run_colors, threshold_line
from sb3_trpo_ext.zoo.runs import Curve

N_BOOTSTRAP = 2000


class SeedRun(NamedTuple):
    """A finished run of one seed: its evaluations, and the steps per second of its training, NaN if not known."""

    seed: int
    evaluations: Curve
    speed: float


def interquartile_means(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Interquartile mean over seeds with its 95% interval, by rliable's stratified bootstrap.

    :param scores: shape ``(n_seeds, n_points)``
    :return: the means, shape ``(n_points,)``, and the ends of the intervals, shape ``(2, n_points)``; NaN for a single seed
    """

    def means(values: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(values[..., point]) for point in range(values.shape[-1])])

    # rliable's runs, tasks and points
    stacked = scores[:, None, :]
    if len(scores) == 1:
        return means(stacked), np.full((2, scores.shape[1]), np.nan)
    # rliable draws from NumPy's global generator, whatever `random_state` says
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        center, interval = library.get_interval_estimates({"": stacked}, means, reps=N_BOOTSTRAP)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return center[""], interval[""]


def common_curves(runs: Sequence[SeedRun]) -> tuple[np.ndarray, np.ndarray]:
    """
    The evaluations of several seeds at the same steps: those of the shortest run, between which the others are interpolated.

    :param runs: at least one, with evaluations
    :return: the steps, shape ``(n_points,)``, and mean returns, shape ``(n_seeds, n_points)``
    """
    steps = min((run.evaluations.steps for run in runs), key=lambda steps: steps[-1])
    curves = [np.interp(steps, run.evaluations.steps, run.evaluations.returns.mean(axis=1)) for run in runs]
    return steps, np.stack(curves)


def steps_to(threshold: float, run: SeedRun) -> float:
    """
    When a run has first been evaluated at a return or better.

    :param threshold: the return
    :param run: the run
    :return: environment steps; NaN if never
    """
    reached = np.flatnonzero(run.evaluations.returns.mean(axis=1) >= threshold)
    return float(run.evaluations.steps[reached[0]]) if len(reached) else float("nan")


def area_under(curve: Curve) -> float:
    """
    The area under a learning curve divided by its length: the mean return over all of training, from the first evaluation on.

    :param curve: evaluations
    :return: in units of the return
    """
    steps, returns = curve.steps, curve.returns.mean(axis=1)
    return float(np.trapezoid(returns, steps) / (steps[-1] - steps[0])) if len(steps) > 1 else float(returns[0])


def median(values: Sequence[float]) -> float:
    """The median, NaN of nothing."""
    return float(np.median(values)) if values else float("nan")


def make_table(results: Mapping[str, Sequence[SeedRun]], threshold: float | None) -> pandas.DataFrame:
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
        final = np.array([run.evaluations.returns[-1].mean() for run in runs])
        iqm, interval = interquartile_means(final[:, None])
        row |= {"final return": final.mean(), "std over seeds": final.std(ddof=1) if len(runs) > 1 else np.nan}
        row |= {"IQM": iqm[0], "IQM low": interval[0, 0], "IQM high": interval[1, 0]}
        row |= {"area under curve": np.mean([area_under(run.evaluations) for run in runs]), "worst seed": final.min()}
        if threshold is not None:
            reached = [steps for run in runs if np.isfinite(steps := steps_to(threshold, run))]
            row |= {f"steps to {threshold:g}": median(reached), f"seeds that reach {threshold:g}": len(reached)}
        row["steps/s"] = median([run.speed for run in runs if np.isfinite(run.speed)])
    return pandas.DataFrame(rows)


def as_markdown(table: pandas.DataFrame) -> str:
    """
    The table for people: intervals in brackets, thousands separated.

    :param table: of :func:`make_table`
    :return: Markdown
    """

    def cells(row: dict[str, Any]) -> dict[str, str]:
        def number(name: str) -> str:
            value = float(row.get(name, np.nan))
            return "-" if not np.isfinite(value) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"

        shown = {
            "algorithm": row["algorithm"],
            "seeds": number("seeds"),
            "final return": f"{number('final return')} ± {number('std over seeds')}",
            "IQM [95%]": f"{number('IQM')} [{number('IQM low')}, {number('IQM high')}]",
            "area under the curve": number("area under curve"),
            "worst seed": number("worst seed"),
        }
        for name in (name for name in row if name.startswith("steps to ")):
            reached = f" ({number(name.replace('steps to', 'seeds that reach'))} of {row['seeds']} seeds)"
            shown[name] = number(name) + (reached if row["seeds"] else "")
        return {**shown, "steps/s": number("steps/s")}

    rows = [cells(row) for row in table.to_dict("records")]
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])


def draw_curves(path: Path, title: str, results: Mapping[str, Sequence[SeedRun]], threshold: float | None) -> None:
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
        steps, curves = common_curves(runs)
        center, (low, high) = interquartile_means(curves)
        lines += [Line("faint", "", color, steps, curve) for curve in curves]
        lines.append(Line("band", "", color, steps, low, high))
        label = f"{algo} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
        lines.append(Line("line", label, color, steps, center))
    end = max((line.x[-1] for line in lines), default=1.0)
    if threshold is not None:
        lines.append(threshold_line(f"threshold {threshold:g}", threshold, end))
    draw_learning_curve(path, Panel(title, lines), end)

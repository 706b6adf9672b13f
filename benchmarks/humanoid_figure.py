"""Draw the comparison on Humanoid-v5 from the runs in ``results/``, and print its tables for README and docs.

python benchmarks/humanoid_figure.py
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas
from matplotlib.figure import Figure

from sb3_trpo_ext.tools.plots import style_axes
from sb3_trpo_ext.zoo.runs import evaluation_curve, read_settings

RESULTS = pathlib.Path(__file__).parent.parent / "results"
STEPS = (200_000, 400_000, 600_000, 1_000_000)


class Group(NamedTuple):
    """Runs with the same settings."""

    label: str
    folders: list[str]
    color: str


GROUPS = (
    Group("sb3-trpo-ext", [f"trpo_ext/Humanoid-v5_{number}" for number in range(12, 17)], "tab:orange"),
    Group("sb3-trpo-ext, settings before", [f"trpo_ext/Humanoid-v5_{number}" for number in range(6, 11)], "tab:green"),
    Group("sb3-contrib TRPO, RL-Zoo's settings", ["trpo/Humanoid-v5_1"], "tab:blue"),
    Group("SB3 PPO, RL-Zoo's settings", ["ppo/Humanoid-v5_1"], "tab:purple"),
)

#: Runs for the table of falls, by how long they were and what sets their settings apart.
ENDINGS = {
    "1M, today's": GROUPS[0].folders,
    "1M, those before": GROUPS[1].folders,
    "1M, today's, the last seed alone": ["trpo_ext/Humanoid-v5_16"],
    "1M, ... `gamma` 0.995": ["trpo_ext/Humanoid-v5_5"],
    "1M, ... KL falling from 0.25": ["trpo_ext/Humanoid-v5_3"],
    "1M, ... KL falling from 0.25, `gamma` 0.995": ["trpo_ext/Humanoid-v5_4"],
    "3M, those before": ["trpo_ext/Humanoid-v5_11"],
    "3M, today's": ["trpo_ext/Humanoid-v5_17", "trpo_ext/Humanoid-v5_18"],
    "3M, ... KL falling from 0.15, advantages without limit": ["trpo_ext/Humanoid-v5_19"],
    "3M, ... KL falling from 0.25, `gamma` 0.995": ["trpo_ext/Humanoid-v5_20"],
    "3M, ... `ent_coef` 0.005": ["trpo_ext/Humanoid-v5_21"],
    "3M, those before, KL falling from 0.2": ["trpo_ext/Humanoid-v5_23"],
    "3M, those before, a constant KL of 0.12": ["trpo_ext/Humanoid-v5_24"],
    "3M, those before, KL falling from 0.12": [f"trpo_ext/Humanoid-v5_{number}" for number in (27, 25, 26)],
    "3M, ... `gae_lambda` 0.7": ["trpo_ext/Humanoid-v5_28"],
    "10M, those before": ["trpo_ext/Humanoid-v5_22"],
    "10M, those before, KL falling from 0.12": ["trpo_ext/Humanoid-v5_29"],
}
#: Steps of an episode without a fall.
TIME_LIMIT = 1000


def seed_and_end(run: str) -> tuple[int, dict[str, Any]]:
    """
    What a run was started with, and what it ended in.

    :param run: its folder in ``results/``
    :return: the seed, and the evaluation at the end
    """
    seed = read_settings(RESULTS / run / "Humanoid-v5" / "args.yml")["seed"]
    return seed, json.loads((RESULTS / run / "evaluation.json").read_text())


def head(columns: Sequence[str]) -> list[str]:
    """
    The first two lines of a table.

    :param columns: their names
    :return: Markdown
    """
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def row(label: str, steps: np.ndarray, returns: np.ndarray, finals: list[dict[str, Any]]) -> str:
    """
    One row of a table.

    :param label: its first cell
    :param steps: of the evaluations
    :param returns: their means
    :param finals: evaluations at the end, of one run or of several
    :return: Markdown
    """
    cells = [f"{returns[np.abs(steps - step).argmin()]:,.0f}" for step in STEPS]
    ends = [final["return"]["mean"] for final in finals]
    spread = np.std(ends, ddof=1) if len(ends) > 1 else finals[0]["return"]["std"]
    cells += [f"{np.mean(ends):,.0f} ± {spread:,.0f}", f"{np.mean([final['distance']['mean'] for final in finals]):.1f} m"]
    return f"| {label} | " + " | ".join(cells) + " |"


def ending(label: str, folders: list[str]) -> str:
    """
    One row of the table of falls.

    :param label: its first cell
    :param folders: of runs with the same settings
    :return: Markdown
    """
    seeds, finals = zip(*map(seed_and_end, folders), strict=True)
    returns, lengths, distances = (
        np.concatenate([final[name]["episodes"] for final in finals]) for name in ("return", "length", "distance")
    )
    is_whole = lengths >= TIME_LIMIT
    std = np.mean([pandas.read_csv(RESULTS / folder / "progress.csv")["train/std"].iloc[-1] for folder in folders])
    cells = (f"{returns.mean():,.0f}", f"{(~is_whole).mean():.0%}", f"{returns[is_whole].mean():,.0f}")
    cells += (f"{distances[is_whole].mean():.1f} m", f"{std:.2f}")
    return f"| {label} | {', '.join(map(str, seeds))} | " + " | ".join(cells) + " |"


def main() -> None:
    """Draw and print."""
    figure = Figure(figsize=(8, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    columns = ("Humanoid-v5", *(f"{steps // 1000}k" for steps in STEPS), "100 episodes at the end", "distance")
    seeds, means = head(columns), head(columns)
    for group in GROUPS:
        curves, finals = [], []
        for folder in group.folders:
            seed, final = seed_and_end(folder)
            steps, returns = evaluation_curve(RESULTS / folder)
            curves.append(returns.mean(axis=1))
            finals.append(final)
            seeds.append(row(f"{group.label}, seed {seed}", steps, curves[-1], finals[-1:]))
            axes.plot(steps, curves[-1], color=group.color, linewidth=0.8, alpha=0.45)
        mean = np.mean(curves, axis=0)
        n_seeds = "1 seed" if len(curves) == 1 else f"{len(curves)} seeds"
        axes.plot(steps, mean, color=group.color, linewidth=2.2, label=f"{group.label} ({n_seeds})")
        means.append(row(f"{group.label}, {n_seeds}", steps, mean, finals))
    columns = ("steps, settings", "seeds", "return", "episodes with a fall", "return of the others", "their distance", "std")
    falls = [*head(columns), *(ending(label, folders) for label, folders in ENDINGS.items())]
    print("\n".join(seeds), "\n".join(means), "\n".join(falls), sep="\n\n")
    for folder in (RESULTS / name for group in GROUPS[:2] for name in group.folders):
        updates = pandas.read_csv(folder / "progress.csv")
        share = updates["train/kl_divergence_loss"] / updates["train/target_kl"]
        print(
            f"{folder.name}: {len(updates)} updates, {updates['train/is_line_search_success'].sum():.0f} accepted, "
            f"{share.between(0.95, 1).sum()} with a KL within 95 to 100% of target_kl, "
            f"{updates['train/cg_steps'].mean():.1f} Fisher-vector products, "
            f"{updates['train/line_search_trials'].mean():.2f} trials each"
        )
    style_axes(axes, "Humanoid-v5: 10 deterministic episodes, each seed and the mean over seeds")
    axes.legend(loc="center right", bbox_to_anchor=(1.0, 0.36), fontsize=9, framealpha=0.85)
    figure.savefig(RESULTS / "humanoid.png")


if __name__ == "__main__":
    main()

"""What was tried on a task, won or lost: the return of each run while it trained, as a small file and as tables.

    python -m benchmarks.studies.tried "KL 0.4" logs/trpo_ext/Humanoid-v5_7 logs/trpo_ext/Humanoid-v5_8

reads the ``progress.csv`` of runs with the same settings and appends a line for each to ``results/tried.csv``: the mean return
of the last 100 training episodes at each 50,000 steps. ``python -m benchmarks.tables`` writes the tables of ``docs/tried.md``.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas

from benchmarks.markdown import ROOT, load, table
from sb3_trpo_ext.zoo.runs import read_settings

FILE = ROOT / "results" / "tried.csv"
STEPS = range(50_000, 1_000_001, 50_000)


class Shown(NamedTuple):
    """What the page shows of a task: after how many thousand steps, and lines of at least so many seeds."""

    steps: tuple[int, ...]
    n_seeds: int = 3


SHOWN = {
    "Humanoid-v5": Shown((100, 200, 300, 400, 500, 600, 700, 1000)),
    "HalfCheetah-v5": Shown((100, 200, 300)),
    "Ant-v5": Shown((200, 400, 600, 800, 1000)),
    "Hopper-v5": Shown((200, 400, 600, 800, 1000)),
    "Swimmer-v5": Shown((100, 200, 400, 600, 1000)),
    "Walker2d-v5": Shown((200, 400, 600, 800, 1000)),
    "LunarLander-v3": Shown((50, 100, 150, 200)),
    "LunarLanderContinuous-v3": Shown((50, 100), n_seeds=5),
    "Pendulum-v1": Shown((50, 100)),
}


def add(difference: str, runs: Sequence[Path]) -> None:
    """
    Append runs to the file.

    :param difference: what sets their settings apart; after three dots, from the last line without any
    :param runs: their folders
    """
    lines = []
    for run in runs:
        progress = pandas.read_csv(run / "progress.csv")
        (folder,) = (path.parent for path in run.glob("*/args.yml"))
        steps, returns = progress["time/total_timesteps"].to_numpy(), progress["rollout/ep_rew_mean"].to_numpy()
        # A rollout may end a little before the step that is asked for
        reached = {str(step): round(float(np.interp(step, steps, returns))) for step in STEPS if step <= steps[-1] * 1.02}
        seed = read_settings(folder / "args.yml")["seed"]
        lines.append({"task": folder.name, "settings": difference, "seed": seed, **reached})
    columns = list(pandas.read_csv(FILE, nrows=0))
    pandas.DataFrame(lines, columns=columns).to_csv(FILE, mode="a", header=False, index=False)


def rows_of(runs: pandas.DataFrame, shown: Shown) -> Iterator[list[str]]:
    """The lines of one task: means over the seeds that got that far, and how many these are if not all did."""
    for settings, group in runs.groupby("settings", sort=False):
        # A line without dots is what those below it differ from
        if len(group) < shown.n_seeds and str(settings).startswith("..."):
            continue
        columns = [group[f"{step}000"].dropna() for step in shown.steps]
        cells = [
            "" if column.empty else f"{column.mean():,.0f}" + (f" ({len(column)})" if len(column) < len(group) else "")
            for column in columns
        ]
        yield [str(settings), str(len(group)), *cells]


def age(n_steps: int) -> str:
    """How old a policy is."""
    return f"after {n_steps:,} steps" if n_steps else "fresh"


def clipped_likelihood_table() -> str:
    """What an update gains with the likelihood of clipped actions, and without."""
    rows = [
        [
            age(policy["steps"]),
            f"{policy['share_of_components_clipped']:.0%}",
            f"{policy['gain_with']:.4f}",
            f"{policy['gain_without']:.4f}",
            f"{policy['ratio']:.2f}",
            policy["difference_in_standard_errors"],
        ]
        for policy in load("clipped_likelihood")["policies"]
    ]
    head = ("policy", "action components clipped", "gain with", "gain without", "ratio", "standard errors apart")
    return table(head, rows)


def advantages_table() -> str:
    """What an update gains for values of ``gae_lambda`` and ``clip_advantage``, relative to 0.8 without a limit."""
    rows = []
    for policy in load("advantages")["policies"]:
        cells: dict[float, list[str]] = {}
        for gain in policy["gains"]:
            is_reference = gain["gae_lambda"] == 0.8 and gain["clip_advantage"] is None
            text = "1" if is_reference else f"{gain['ratio']:.2f} ± {gain['standard_error']:.2f}"
            cells.setdefault(gain["gae_lambda"], []).append(text)
        first = [age(policy["steps"]), f"{policy['mean_return']:,.0f}", f"{policy['kurtosis']:.0f}"]
        for index, (gae_lambda, gains) in enumerate(cells.items()):
            rows.append([*(first if index == 0 else ["", "", ""]), gae_lambda, *gains])
    return table(("policy", "return", "kurtosis", "`gae_lambda`", "no limit", "limit 1", "limit 0.5"), rows)


def tables() -> dict[str, str]:
    """The tables of the page, by name."""
    runs = pandas.read_csv(FILE)
    found = {}
    for task, shown in SHOWN.items():
        head = ("settings", "seeds", *(f"{step}k" for step in shown.steps))
        found[f"tried {task}"] = table(head, rows_of(runs[runs["task"] == task], shown))
    return {**found, "clipped likelihood": clipped_likelihood_table(), "advantages": advantages_table()}


def main() -> None:
    """Add runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("difference")
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    add(args.difference, args.runs)


if __name__ == "__main__":
    main()

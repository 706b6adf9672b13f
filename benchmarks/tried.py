"""Keep what was tried on a task: the return of each run while it trained, won or lost, as small files and as a table.

    python benchmarks/tried.py add "KL 0.4" logs/trpo_ext/Humanoid-v5_7 logs/trpo_ext/Humanoid-v5_8
    python benchmarks/tried.py page

``add`` reads the ``progress.csv`` of runs with the same settings, and appends a line for each to ``results/tried/TASK.csv``:
what the policy, exploring, got in its last 100 episodes at each 50,000 steps. ``page`` writes the table of ``docs/results.md``
from it, with the steps that the page names.
"""

import argparse
import pathlib
import re

import numpy as np
import pandas

from sb3_trpo_ext.zoo.runs import read_settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "results" / "tried"
PAGE = ROOT / "docs" / "results.md"
#: Where the table goes, on a page that people write the rest of.
BLOCK = re.compile(r"(<!-- tried: (\S+)((?: \d+)+) -->\n).*?(<!-- end -->)", re.DOTALL)
STEPS = range(50_000, 1_000_001, 50_000)


def line_of(difference: str, run: pathlib.Path) -> tuple[str, dict[str, object]]:
    """
    Read one run.

    :param difference: what sets its settings apart
    :param run: its folder
    :return: the task, and the run's line
    """
    progress = pandas.read_csv(run / "progress.csv")
    (folder,) = (path.parent for path in run.glob("*/args.yml"))
    seed = read_settings(folder / "args.yml")["seed"]
    steps, returns = progress["time/total_timesteps"].to_numpy(), progress["rollout/ep_rew_mean"].to_numpy()
    # A rollout may end a little before the step that is asked for
    reached = {step: round(float(np.interp(step, steps, returns))) for step in STEPS if step <= steps[-1] * 1.02}
    return folder.name, {"settings": difference, "seed": seed, **{str(step): reached.get(step, "") for step in STEPS}}


def add(difference: str, runs: list[pathlib.Path]) -> None:
    """
    Append runs to the file of their task.

    :param difference: what sets their settings apart
    :param runs: their folders
    """
    for run in runs:
        task, line = line_of(difference, run)
        file = FOLDER / f"{task}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame([line]).to_csv(file, mode="a", header=not file.exists(), index=False)


def table_of(task: str, shown: list[int]) -> str:
    """
    The table of a task: the mean over the seeds that got that far, and how many if not all did.

    :param task: id of the environment
    :param shown: after how many steps
    :return: Markdown
    """
    runs = pandas.read_csv(FOLDER / f"{task}.csv")
    lines = [
        "| settings | seeds | " + " | ".join(f"{step // 1000}k" for step in shown) + " |",
        "|---" * (2 + len(shown)) + "|",
    ]
    for settings, group in runs.groupby("settings", sort=False):
        columns = [group[str(step)].dropna() for step in shown]
        cells = [
            "" if column.empty else f"{column.mean():,.0f}" + (f" ({len(column)})" if len(column) < len(group) else "")
            for column in columns
        ]
        lines.append(f"| {settings} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Add runs, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("difference")
    adding.add_argument("runs", type=pathlib.Path, nargs="+")
    commands.add_parser("page")
    arguments = parser.parse_args()
    if arguments.command == "add":
        add(arguments.difference, arguments.runs)
    else:
        text = PAGE.read_text()
        PAGE.write_text(BLOCK.sub(lambda found: found[1] + table_of(found[2], [*map(int, found[3].split())]) + found[4], text))


if __name__ == "__main__":
    main()

"""Keep the runs of ``sb3-trpo compare`` on several tasks as small files, and make the table and the figure from them.

    sb3-trpo compare --env Hopper-v5 --algos trpo_ext trpo --seeds 3 -n 1000000 --vec-env envpool
    python benchmarks/suite.py add comparisons/Hopper-v5
    python benchmarks/suite.py page

``add`` lets each trained agent act for 100 deterministic episodes with a seed that no training has used, and writes a file for
each run into ``results/suite/``: these episodes, the evaluations on the way, settings and speed. ``page`` writes the tables of
``docs/results.md`` and draws ``results/suite.png``.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from stable_baselines3.common.utils import set_random_seed

from sb3_trpo_ext.tools.comparison_table import SeedRun, area_under, common_curves, interquartile_means
from sb3_trpo_ext.tools.plots import style_axes
from sb3_trpo_ext.tools.report import load_run, run_episodes
from sb3_trpo_ext.zoo.manager import register
from sb3_trpo_ext.zoo.runs import Curve, read_run

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "results" / "suite"
PAGE = ROOT / "docs" / "results.md"
FIGURE = ROOT / "results" / "suite.png"
BLOCK = re.compile(r"(<!-- suite: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
EVALUATION_SEED = 1000
N_ENVS = 10
LABELS = {"trpo_ext": "sb3-trpo-ext", "trpo": "sb3-contrib TRPO", "ppo": "SB3 PPO"}
COLORS = {"trpo_ext": "tab:orange", "trpo": "tab:blue", "ppo": "tab:green"}


def add(comparison: pathlib.Path, n_episodes: int) -> None:
    """
    Evaluate the finished runs of a comparison, and keep what they came to.

    :param comparison: folder of the comparison of one task
    :param n_episodes: of the evaluation
    """
    task = comparison.name
    FOLDER.mkdir(parents=True, exist_ok=True)
    for done in sorted(comparison.glob("*/seed_*/done.json")):
        algo, seed = done.parent.parent.name, int(done.parent.name.removeprefix("seed_"))
        content = json.loads(done.read_text())
        file = FOLDER / f"{task}_{algo}_{seed}.json"
        if file.exists() and json.loads(file.read_text())["identity"] == content["identity"]:
            continue
        run = load_run(task, str(done.parent), algo, exp_id=1, seed=EVALUATION_SEED, device="cpu", n_envs=N_ENVS)
        set_random_seed(EVALUATION_SEED)
        episodes = run_episodes(run.model, run.env, n_episodes, deterministic=True)
        run.env.close()
        evaluations = read_run(run.folder).evaluations
        result: dict[str, Any] = {
            "task": task,
            "algorithm": algo,
            "seed": seed,
            "identity": content["identity"],
            "seconds": round(content["seconds"]),
            "timesteps": evaluations.steps.tolist(),
            "evaluations": np.round(evaluations.returns, 1).tolist(),
            "final": np.round(episodes.returns, 1).tolist(),
        }
        file.write_text(json.dumps(result, indent=None) + "\n")
        print(f"{file.name}: {np.mean(episodes.returns):,.0f}")


def read(task: str, algo: str) -> list[dict[str, Any]]:
    """
    The runs of an algorithm on a task.

    :param task: id of the environment
    :param algo: key of the algorithm
    :return: one for each seed
    """
    return [json.loads(file.read_text()) for file in sorted(FOLDER.glob(f"{task}_{algo}_[0-9]*.json"))]


def curve_of(run: dict[str, Any]) -> Curve:
    """
    The evaluations of a run.

    :param run: as in its file
    :return: the curve
    """
    return Curve(np.array(run["timesteps"]), np.array(run["evaluations"]))


def table_of(tasks: Sequence[str]) -> str:
    """
    The table of some tasks.

    :param tasks: ids of the environments
    :return: Markdown
    """
    columns = ("task, steps", "algorithm", "seeds", "100 episodes at the end", "interquartile mean [95%]", "worst seed")
    lines = ["| " + " | ".join(columns) + " | area under the curve |", "|---" * (len(columns) + 1) + "|"]
    for task in tasks:
        for algo in LABELS:
            runs = read(task, algo)
            if not runs:
                continue
            finals = np.array([np.mean(run["final"]) for run in runs])
            iqm, interval = interquartile_means(finals[:, None])
            spread = f" ± {finals.std(ddof=1):,.0f}" if len(runs) > 1 else ""
            ends = f" [{interval[0, 0]:,.0f}, {interval[1, 0]:,.0f}]" if len(runs) > 1 else ""
            area = np.mean([area_under(curve_of(run)) for run in runs])
            steps = f"{runs[0]['identity']['-n'] // 1000:,}k"
            lines.append(
                f"| {task}, {steps} | {LABELS[algo]} | {len(runs)} | {finals.mean():,.0f}{spread} | {iqm[0]:,.0f}{ends} | "
                f"{finals.min():,.0f} | {area:,.0f} |"
            )
    return "\n".join(lines) + "\n"


def draw() -> None:
    """Draw the learning curves of all tasks side by side."""
    tasks = sorted({file.name.split("_")[0] for file in FOLDER.glob("*.json")})
    n_columns = 3
    n_rows = -(-len(tasks) // n_columns)
    figure = Figure(figsize=(4.2 * n_columns, 3.1 * n_rows), dpi=130, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, task in zip(panels, tasks, strict=False):
        for algo, label in LABELS.items():
            runs = [SeedRun(run["seed"], curve_of(run), float("nan")) for run in read(task, algo)]
            if not runs:
                continue
            steps, curves = common_curves(runs)
            for curve in curves:
                axes.plot(steps, curve, color=COLORS[algo], linewidth=0.7, alpha=0.45)
            axes.plot(steps, curves.mean(axis=0), color=COLORS[algo], linewidth=2, label=f"{label} ({len(runs)})")
        style_axes(axes, task)
        axes.legend(fontsize=8, framealpha=0.85)
    for axes in panels[len(tasks) :]:
        axes.remove()
    figure.savefig(FIGURE)


def page() -> None:
    """Write the tables between their marks, and draw the figure."""
    text = PAGE.read_text()
    PAGE.write_text(BLOCK.sub(lambda match: match[1] + table_of(match[2].split()) + match[3], text))
    draw()


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="evaluate and keep the runs of a comparison")
    adding.add_argument("comparison", type=pathlib.Path)
    adding.add_argument("--episodes", type=int, default=100)
    commands.add_parser("page", help="write the tables and draw the figure")
    args = parser.parse_args()
    if args.command == "add":
        register()
        add(args.comparison, args.episodes)
    else:
        page()


if __name__ == "__main__":
    main()

"""Returns over seeds: keep the runs of ``sb3-trpo compare`` as rows of a small file, and draw the figures from such files.

    sb3-trpo compare --env Hopper-v5 --algos trpo_ext trpo --seeds 3 -n 1000000 --vec-env envpool
    python -m benchmarks.returns add comparisons/Hopper-v5
    sb3-trpo train --env Humanoid-v5 --vec-env envpool --seed 3 --eval-freq 50000 --eval-episodes 10 -f logs/seed_3
    python -m benchmarks.returns humanoid logs/seed_3
    python -m benchmarks.returns draw

``add`` lets each trained agent act for 100 deterministic episodes in Gymnasium's environment, with a seed that no training has
used, and puts rows into ``results/suite.csv``: one for each evaluation during training, and one for these episodes. A run that
is there with the same settings is left out, so that an interrupted ``add`` can be repeated; delete its rows to add it anew.
``humanoid`` does the same for single runs of Humanoid-v5, with distances and falls, in ``results/humanoid.csv``.
``draw`` writes ``results/humanoid.png`` and ``results/suite.png``; ``python -m benchmarks.tables`` writes the tables.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
from matplotlib.figure import Figure

from benchmarks.markdown import ROOT, table
from sb3_trpo_ext.tools.comparison_table import area_under, common_curves, interquartile_means
from sb3_trpo_ext.tools.plots import Line, Panel, draw_learning_curve, draw_panel
from sb3_trpo_ext.zoo.runs import Curve

RESULTS = ROOT / "results"
SUITE = RESULTS / "suite.csv"
MUJOCO = ("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Swimmer-v5", "Walker2d-v5")
CLASSIC = ("CartPole-v1", "Pendulum-v1", "LunarLander-v3", "LunarLanderContinuous-v3")
#: Without velocities, which an agent has to remember positions for.
MEMORY = ("CartPoleNoVel-v1", "PendulumNoVel-v1")
LABELS = {
    "trpo_ext_lstm": "sb3-trpo-ext, LSTM",
    "ppo_lstm": "sb3-contrib RecurrentPPO",
    "trpo_ext": "sb3-trpo-ext",
    "trpo": "sb3-contrib TRPO",
    "ppo": "SB3 PPO",
}
COLORS = {"trpo_ext": "tab:orange", "trpo": "tab:blue", "ppo": "tab:green"}
EVALUATION_SEED = 1000
N_ENVS = 10
#: Of an episode without a fall.
HUMANOID_STEPS = 1000
#: Of fewer seeds, the interquartile mean is about the mean, and its interval their range.
N_SEEDS_OF_INTERVAL = 5

#: Settings of Humanoid-v5 as they are in the file: those of the package, and what it takes for longer trainings.
PUBLISHED = "trpo_ext.yml"
LONG = "clip_advantage:None gae_lambda:0.8 target_kl:lin_0.12"
#: Seeds of the published trainings of a million steps. The settings were also chosen on 0, 1 and 2.
UNSEEN_SEEDS = (3, 4, 5, 6, 7)
CURVE_STEPS = (200_000, 400_000, 600_000, 1_000_000)


class Result(NamedTuple):
    """One training: its evaluations on the way, and the row of the 100 episodes at the end."""

    seed: int
    curve: Curve
    end: pandas.Series


def results_of(file: Path, **wanted: Any) -> list[Result]:
    """
    The trainings in a file.

    :param file: such as ``results/suite.csv``
    :param wanted: what its columns have to be, such as ``task`` and ``algorithm``
    :return: one for each seed, in the order of the seeds
    """
    rows = pandas.read_csv(file)
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    results = []
    for seed, run in rows.groupby("seed"):
        on_the_way = run[run["evaluation"] == "training"]
        curve = Curve(on_the_way["steps"].to_numpy(), on_the_way["return"].to_numpy()[:, None])
        results.append(Result(int(str(seed)), curve, run[run["evaluation"] == "end"].iloc[-1]))
    return results


def n_seeds(results: Sequence[Result]) -> str:
    """How many seeds there are, in words."""
    return "1 seed" if len(results) == 1 else f"{len(results)} seeds"


def with_spread(results: Sequence[Result]) -> str:
    """The mean return at the end, with its standard deviation over seeds; over episodes, where there is one seed."""
    ends = np.array([result.end["return"] for result in results])
    spread = ends.std(ddof=1) if len(ends) > 1 else results[0].end["return_std"]
    return f"{ends.mean():,.0f} ± {spread:,.0f}"


# === Tables ===


def humanoid(algorithm: str = "trpo_ext", settings: str = PUBLISHED, training_steps: int = 1_000_000) -> list[Result]:
    """The trainings on Humanoid-v5 with some settings."""
    wanted = {"algorithm": algorithm, "settings": settings, "training_steps": training_steps}
    return results_of(RESULTS / "humanoid.csv", **wanted)


def published() -> list[Result]:
    """Ours on Humanoid-v5 for a million steps, with seeds that no choice was made on."""
    return [result for result in humanoid() if result.seed in UNSEEN_SEEDS]


def curve_row(label: str, results: Sequence[Result]) -> list[str]:
    """A row of the table of learning curves on Humanoid-v5."""
    means = np.mean([result.curve.returns[:, 0] for result in results], axis=0)
    at = [means[np.abs(results[0].curve.steps - step).argmin()] for step in CURVE_STEPS]
    distance = np.mean([result.end["distance"] for result in results])
    return [label, *(f"{mean:,.0f}" for mean in at), with_spread(results), f"{distance:.1f} m"]


def ending_row(label: str, results: Sequence[Result]) -> list[str]:
    """A row of the table of endings on Humanoid-v5: returns, falls, and what episodes without a fall are worth."""
    ends = pandas.DataFrame([result.end for result in results])
    whole = ends["episodes"] - ends["falls"]
    without_fall = [(ends[f"{name}_without_fall"] * whole).sum() / whole.sum() for name in ("return", "distance")]
    cells = [
        label,
        ", ".join(str(result.seed) for result in results),
        with_spread(results),
        f"{ends['distance'].mean():.1f} m",
    ]
    cells += [f"{ends['falls'].sum() / ends['episodes'].sum():.0%}", f"{without_fall[0]:,.0f}", f"{without_fall[1]:.1f} m"]
    return [*cells, "" if ends["action_std"].isna().any() else f"{ends['action_std'].mean():.2f}"]


def suite_rows(task: str) -> Iterator[list[object]]:
    """The rows of one task, for each algorithm that has runs."""
    for algorithm, label in LABELS.items():
        results = results_of(SUITE, task=task, algorithm=algorithm)
        if not results:
            continue
        ends = np.array([result.end["return"] for result in results])
        spread = f" ± {ends.std(ddof=1):,.0f}" if len(ends) > 1 else ""
        iqm = "-"
        if len(ends) >= N_SEEDS_OF_INTERVAL:
            (middle,), ((low,), (high,)) = interquartile_means(ends[:, None])
            iqm = f"{middle:,.0f} [{low:,.0f}, {high:,.0f}]"
        area = np.mean([area_under(result.curve) for result in results])
        steps = f"{task}, {results[0].end['training_steps'] // 1000:,}k"
        figures = (f"{ends.mean():,.0f}{spread}", iqm, f"{ends.min():,.0f}", f"{area:,.0f}")
        yield [steps, label, len(ends), *figures]


def tables() -> dict[str, str]:
    """The tables of returns, by name."""
    ours, theirs, ppo = published(), humanoid("trpo", "RL-Zoo"), humanoid("ppo", "RL-Zoo")
    head = ("Humanoid-v5", *(f"{steps // 1000}k" for steps in CURVE_STEPS), "100 episodes at the end", "distance")
    rivals = (("sb3-contrib TRPO, RL-Zoo's settings", theirs), ("SB3 PPO, RL-Zoo's settings", ppo))
    single = [curve_row(f"{label}, seed {result.seed}", [result]) for label, group in rivals for result in group]
    seeds = [curve_row(f"sb3-trpo-ext, seed {result.seed}", [result]) for result in ours]
    mean = curve_row(f"**sb3-trpo-ext, mean of {n_seeds(ours)}**", ours)

    ending = ("settings", "seeds", "return", "distance", "falls", "return without a fall", "distance without a fall", "std")
    longer = [ending_row("1M steps, the package's settings", ours)[:5]]
    longer += [
        ending_row(f"{steps // 1_000_000}M steps, {name}", humanoid(settings=settings, training_steps=steps))[:5]
        for steps, settings, name in (
            (3_000_000, PUBLISHED, "the package's settings"),
            (3_000_000, LONG, "settings for long trainings"),
            (10_000_000, LONG, "settings for long trainings"),
        )
    ]
    rows = pandas.read_csv(RESULTS / "humanoid.csv")
    groups = rows[rows["algorithm"] == "trpo_ext"][["training_steps", "settings"]].drop_duplicates().itertuples(index=False)
    endings = [
        ending_row(f"{steps // 1_000_000}M, `{settings}`", humanoid(settings=settings, training_steps=steps))
        for steps, settings in sorted(groups, key=lambda group: group[0])
    ]
    suite = ["task, steps", "algorithm", "seeds", "100 episodes at the end", "interquartile mean [95%]", "worst seed"]
    suite += ["area under the curve"]
    return {
        "humanoid": table(head, [*seeds, mean, *single]),
        "humanoid long": table(ending[:5], longer),
        "humanoid endings": table(ending, endings),
        "mujoco": table(suite, (row for task in MUJOCO for row in suite_rows(task))),
        "classic": table(suite, (row for task in CLASSIC for row in suite_rows(task))),
        "memory": table(suite, (row for task in MEMORY for row in suite_rows(task))),
    }


# === Figures ===


def seed_lines(results: Sequence[Result], color: str, label: str) -> list[Line]:
    """Each seed as a thin line, and the mean over seeds."""
    steps, curves = common_curves([result.curve for result in results])
    seeds = [Line("faint", "", color, steps, curve) for curve in curves]
    return [*seeds, Line("line", label, color, steps, curves.mean(axis=0))]


def draw_humanoid() -> None:
    """Draw the learning curves on Humanoid-v5."""
    lines = []
    for algorithm, color in COLORS.items():
        is_ours = algorithm == "trpo_ext"
        results, whose = (published(), "") if is_ours else (humanoid(algorithm, "RL-Zoo"), ", RL-Zoo's settings")
        lines += seed_lines(results, color, f"{LABELS[algorithm]}{whose} ({n_seeds(results)})")
    title = "Humanoid-v5: 10 deterministic episodes, each seed and the mean over seeds"
    draw_learning_curve(RESULTS / "humanoid.png", Panel(title, lines), 1e6)


def draw_suite() -> None:
    """Draw the learning curves of all other tasks side by side."""
    n_columns = 3
    n_rows = -(-len(MUJOCO + CLASSIC) // n_columns)
    figure = Figure(figsize=(4.2 * n_columns, 3.1 * n_rows), dpi=100, layout="constrained")
    for axes, task in zip(figure.subplots(n_rows, n_columns).flatten(), (*MUJOCO, *CLASSIC), strict=True):
        lines = []
        for algorithm, label in LABELS.items():
            if results := results_of(SUITE, task=task, algorithm=algorithm):
                lines += seed_lines(results, COLORS[algorithm], f"{label} ({len(results)})")
        draw_panel(axes, Panel(task, lines), max(line.x[-1] for line in lines))
        axes.set_xlabel("environment steps", fontsize=9)
    figure.savefig(RESULTS / "suite.png", pil_kwargs={"optimize": True})


# === Runs ===


def evaluation_row(returns: np.ndarray, steps: int, evaluation: str) -> dict[str, Any]:
    """What the columns of an evaluation are."""
    mean, std = round(float(np.mean(returns)), 1), round(float(np.std(returns)), 1)
    return {"steps": steps, "evaluation": evaluation, "episodes": len(returns), "return": mean, "return_std": std}


def final_episodes(task: str, algorithm: str, folder: Path, n_episodes: int) -> tuple[Any, Any]:
    """Let a trained agent act, with a seed that no training has used; returns the run and its episodes."""
    from stable_baselines3.common.utils import set_random_seed

    from sb3_trpo_ext.tools.report import load_run, run_episodes

    run = load_run(task, str(folder), algorithm, exp_id=1, seed=EVALUATION_SEED, device="cpu", n_envs=N_ENVS)
    set_random_seed(EVALUATION_SEED)
    episodes = run_episodes(run.model, run.env, n_episodes, deterministic=True)
    run.env.close()
    return run, episodes


def add(comparison: Path, n_episodes: int) -> None:
    """
    Evaluate the finished runs of a comparison, and keep what they came to.

    :param comparison: folder of the comparison of one task
    :param n_episodes: of the evaluation at the end
    """
    from sb3_trpo_ext.zoo.manager import register
    from sb3_trpo_ext.zoo.runs import read_run

    register()
    task = comparison.name
    for done in sorted(comparison.glob("*/seed_*/done.json")):
        algorithm, seed = done.parent.parent.name, int(done.parent.name.removeprefix("seed_"))
        settings = json.loads(done.read_text())["identity"]
        identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        rows = pandas.read_csv(SUITE)
        is_run = (rows["task"] == task) & (rows["algorithm"] == algorithm) & (rows["seed"] == seed)
        if (rows["identity"][is_run] == identity).any():
            continue
        (folder,) = (path for path in (done.parent / algorithm).iterdir() if path.is_dir())
        evaluations = read_run(folder).evaluations
        returns = np.array(final_episodes(task, algorithm, done.parent, n_episodes)[1].returns)
        made = [
            evaluation_row(values, int(steps), "training")
            for steps, values in zip(evaluations.steps, evaluations.returns, strict=True)
        ]
        made.append(evaluation_row(returns, settings["-n"], "end"))
        key = {"task": task, "algorithm": algorithm, "identity": identity, "training_steps": settings["-n"], "seed": seed}
        joined = pandas.concat([rows[~is_run], pandas.DataFrame([{**key, **row} for row in made])])
        write(joined.sort_values(["task", "algorithm", "seed"], kind="stable"), SUITE)
        print(f"{task} {algorithm} seed {seed}: {returns.mean():,.0f}")


def write(rows: pandas.DataFrame, path: Path) -> None:
    """Replace a file in one go."""
    partial = path.with_suffix(".partial")
    rows.to_csv(partial, index=False)
    partial.replace(path)


def humanoid_row(returns: Any, lengths: Any, steps: int, evaluation: str) -> dict[str, Any]:
    """What the columns of an evaluation on Humanoid-v5 are: an episode that does not last is a fall."""
    row = evaluation_row(returns, steps, evaluation)
    figures = {"length": round(float(np.mean(lengths)), 1), "length_std": round(float(np.std(lengths)), 1)}
    return {**row, **figures, "falls": int((np.array(lengths) < HUMANOID_STEPS).sum())}


def add_humanoid(folder: Path, n_episodes: int) -> None:
    """
    Evaluate a run of Humanoid-v5, and keep what it came to.

    :param folder: the ``-f`` of its training
    :param n_episodes: of the evaluation at the end
    """
    from sb3_trpo_ext.zoo.manager import register
    from sb3_trpo_ext.zoo.runs import read_settings

    register()
    run, episodes = final_episodes("Humanoid-v5", "trpo_ext", folder, n_episodes)
    arguments = read_settings(run.folder / "Humanoid-v5" / "args.yml")
    changes = [f"{name}:{value}" for name, value in (arguments["hyperparams"] or {}).items()]
    key = {"task": "Humanoid-v5", "algorithm": "trpo_ext", "settings": " ".join(changes) or PUBLISHED}
    key |= {"training_steps": run.model._total_timesteps, "seed": arguments["seed"]}
    with np.load(run.folder / "evaluations.npz") as table:
        on_the_way = zip(table["timesteps"], table["results"], table["ep_lengths"], strict=True)
        made = [humanoid_row(returns, lengths, int(steps), "training") for steps, returns, lengths in on_the_way]
    end = humanoid_row(episodes.returns, episodes.lengths, run.model.num_timesteps, "end")
    returns, distances = np.array(episodes.returns), np.array(episodes.distances)
    is_whole = np.array(episodes.lengths) == HUMANOID_STEPS
    end |= {"distance": round(float(distances.mean()), 3), "distance_std": round(float(distances.std()), 3)}
    if is_whole.any():
        end["return_without_fall"] = round(float(returns[is_whole].mean()), 1)
        end["distance_without_fall"] = round(float(distances[is_whole].mean()), 3)
    end["action_std"] = round(float(run.model.policy.log_std.detach().exp().mean()), 3)
    file = RESULTS / "humanoid.csv"
    rows = pandas.read_csv(file)
    is_run = (rows[list(key)] == pandas.Series(key)).all(axis=1)
    write(pandas.concat([rows[~is_run], pandas.DataFrame([{**key, **row} for row in [*made, end]])]), file)
    print(f"seed {key['seed']}: {returns.mean():,.0f}, {distances.mean():.1f} m, {end['falls']} falls")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="evaluate and keep the runs of a comparison")
    adding.add_argument("comparison", type=Path)
    alone = commands.add_parser("humanoid", help="evaluate and keep runs of Humanoid-v5")
    alone.add_argument("folders", nargs="+", type=Path)
    for parser_of_runs in (adding, alone):
        parser_of_runs.add_argument("--episodes", type=int, default=100)
    commands.add_parser("draw", help="draw the figures")
    args = parser.parse_args()
    if args.command == "add":
        add(args.comparison, args.episodes)
    elif args.command == "humanoid":
        for folder in args.folders:
            add_humanoid(folder, args.episodes)
    else:
        draw_humanoid()
        draw_suite()


if __name__ == "__main__":
    main()

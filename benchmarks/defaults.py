"""Returns with default settings: ours, Stable-Baselines3's PPO and sb3-contrib's TRPO on tasks that no setting was tuned for.

    python -m benchmarks.defaults run --agents ppo-1 ppo-16-normalized ours-16 --tasks judging --seeds 0 1 2
    python -m benchmarks.defaults show
    python -m benchmarks.defaults draw

An agent is an algorithm and its number of environments, each with all of its arguments at their defaults; "normalized" has the
environments in SB3's VecNormalize, with its defaults. "ppo-tuned" is PPO with RL-Zoo's settings for the task, if any.
``run`` trains each agent on each task with each seed, and adds a row to ``results/defaults.csv``: the mean return of 20
deterministic episodes after the training, and the mean returns of the training episodes in each twentieth of the steps. A run
that has a row is left out, so that an interrupted ``run`` can be repeated. ``draw`` makes ``results/defaults.png``.

Settings are chosen on one half of the tasks (``choosing``) and judged on the other (``judging``): see :mod:`benchmarks.tasks`.
"""

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
import sb3_contrib
import torch as th
import yaml
from gymnasium import spaces
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from benchmarks.markdown import table
from benchmarks.tasks import CHOOSING, JUDGING, TASKS, Task, task_named
from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs import EnvPoolVecEnv
from sb3_trpo_ext.tools.comparison_table import interquartile_means

RESULTS = Path(__file__).parents[1] / "results" / "defaults.csv"
COLUMNS = ("task", "agent", "seed", "steps", "return", "return_std", "episodes", "seconds", "curve")
N_EPISODES = 20
EVALUATION_SEED = 10_000
N_BINS = 20


class Agent(NamedTuple):
    """What is trained: an algorithm, and the environments that it gets."""

    #: ``None`` for actions that are drawn uniformly.
    algorithm: type[OnPolicyAlgorithm] | None
    n_envs: int = 1
    is_normalized: bool = False
    #: Arguments of the algorithm, where they are not the defaults.
    settings: dict[str, Any] = {}  # noqa: RUF012 it is not changed
    #: Whether it trains in EnvPool, where that has the task: the same physics, and faster.
    is_in_envpool: bool = False
    #: Makes the model, environments and normalization included, of a task and a seed; the above is not used then.
    make_model: Callable[[Task, int], OnPolicyAlgorithm] | None = None


class Job(NamedTuple):
    """One training."""

    task: str
    n_steps: int
    name: str
    agent: Agent
    seed: int


#: Where RL-Zoo has settings for PPO under the name of an older version, and of the same simulator.
TUNED_NAMES = {
    "Walker2d-v5": "Walker2d-v4",
    "Swimmer-v5": "Swimmer-v4",
    "Humanoid-v5": "Humanoid-v4",
    "InvertedDoublePendulum-v5": "InvertedDoublePendulum-v2",
    "HumanoidStandup-v5": "HumanoidStandup-v2",
}


def tuned_settings() -> dict[str, dict[str, Any]]:
    """RL-Zoo's settings of PPO, by the names of our tasks."""
    import rl_zoo3

    entries = yaml.safe_load((Path(rl_zoo3.__path__[0]) / "hyperparams" / "ppo.yml").read_text())
    names = {task: TUNED_NAMES.get(task, task) for task in TASKS}
    return {task: entries[name] for task, name in names.items() if name in entries}


def zoo_model(
    manager_class: Callable[..., Any], algo: str, settings: dict[str, Any], task: Task, seed: int
) -> OnPolicyAlgorithm:
    """
    The model that RL-Zoo's ``train`` makes.

    :param manager_class: RL-Zoo's, or one that knows more
    :param algo: key of the algorithm
    :param settings: for the task
    :param task: the task
    :param seed: of the training
    :return: with its environments
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        config = Path(folder, f"{algo}.yml")
        config.write_text(yaml.safe_dump({task.name: settings}))
        options = {"n_timesteps": task.n_steps, "eval_freq": -1, "verbose": 0, "device": "cpu", "config": str(config)}
        experiment = manager_class(argparse.Namespace(), algo, task.name, folder, seed=seed, **options).setup_experiment()
    assert experiment is not None
    model = experiment[0]
    assert isinstance(model, OnPolicyAlgorithm)
    return model


def tuned_model(task: Task, seed: int) -> OnPolicyAlgorithm:
    """The PPO that ``python -m rl_zoo3.train --algo ppo`` makes, with the settings that it has for a task."""
    from rl_zoo3.exp_manager import ExperimentManager

    return zoo_model(ExperimentManager, "ppo", tuned_settings()[task.name], task, seed)


RIVALS = {
    f"{name}-{n_envs}{'-normalized' * is_normalized}": Agent(algorithm, n_envs, is_normalized)
    for name, algorithm in (("ppo", PPO), ("trpo", sb3_contrib.TRPO))
    for n_envs in (1, 16)
    for is_normalized in (False, True)
}
#: Those that have more than one seed.
FINALISTS = ("trpo-1-normalized", "ppo-1-normalized")
TUNED = "ppo-tuned"
AGENTS: dict[str, Agent] = {
    "random": Agent(None),
    **RIVALS,
    TUNED: Agent(PPO, make_model=tuned_model),
    **{f"ours-{n_envs}": Agent(TRPO, n_envs) for n_envs in (1, 8, 16, 32)},
}

#: Ours, as it is compared with the rivals, and with as many environments as the best of these have.
OURS, OURS_ALONE = "ours-16", "ours-1"
#: The same with a candidate for the default of `gae_lambda`, of which no code is kept.
BY_DIMENSIONS = f"{OURS}, lambda by dimensions"


def policy_for(space: spaces.Space) -> str:
    """The policy that fits an observation space."""
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if len(space.shape or ()) == 3 else "MlpPolicy"


def normalized(venv: VecEnv, **options: Any) -> VecNormalize:
    """An environment in VecNormalize, which scales observations that are vectors, and rewards."""
    space = venv.observation_space
    if isinstance(space, spaces.Dict):
        options["norm_obs_keys"] = [key for key, part in space.items() if isinstance(part, spaces.Box)]
    elif len(space.shape or ()) == 3:
        options["norm_obs"] = False
    return VecNormalize(venv, **options)


def environments(task: Task, agent: Agent, seed: int) -> VecEnv:
    """What an agent trains in."""
    if agent.is_in_envpool and task.name.endswith("-v5"):
        return EnvPoolVecEnv(task.name, agent.n_envs, seed=seed, num_threads=1)
    return make_vec_env(task.make, n_envs=agent.n_envs, seed=seed)


class Returns(BaseCallback):
    """Records when each training episode ended, and its return."""

    episodes: list[tuple[int, float]]

    def _on_training_start(self) -> None:
        self.episodes = []

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.episodes.append((self.num_timesteps, info["episode"]["r"]))
        return True


def run(job: Job) -> dict[str, Any]:
    """Train an agent, and let it act: a row of the file."""
    agent, seed = job.agent, job.seed
    task = task_named(job.task)._replace(n_steps=job.n_steps)
    th.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.time()
    evaluation = make_vec_env(task.make, n_envs=5, seed=EVALUATION_SEED)
    row = {"task": task.name, "agent": job.name, "seed": seed, "episodes": N_EPISODES}
    if agent.algorithm is None:
        return {**row, "steps": 0, **_random(evaluation, seed), "seconds": round(time.time() - started), "curve": ""}
    if agent.make_model is not None:
        model = agent.make_model(task, seed)
    else:
        venv = environments(task, agent, seed)
        if agent.is_normalized:
            venv = normalized(venv)
        model = agent.algorithm(policy_for(venv.observation_space), venv, seed=seed, device="cpu", **agent.settings)
    recorder = Returns()
    model.learn(task.n_steps, recorder)
    training = model.get_vec_normalize_env()
    if training is not None:
        evaluation = normalized(evaluation, training=False, norm_obs=training.norm_obs, norm_reward=False)
        sync_envs_normalization(training, evaluation)
    returns, _ = evaluate_policy(model, evaluation, N_EPISODES, deterministic=True, return_episode_rewards=True)
    curve = np.full(N_BINS, np.nan)
    steps, episode_returns = np.array(recorder.episodes or np.zeros((0, 2))).T
    bins = np.minimum((steps * N_BINS / task.n_steps).astype(int), N_BINS - 1)
    for index in np.unique(bins):
        curve[index] = episode_returns[bins == index].mean()
    return {
        **row,
        "steps": task.n_steps,
        "return": f"{np.mean(returns):.5g}",
        "return_std": f"{np.std(returns):.3g}",
        "seconds": round(time.time() - started),
        "curve": " ".join(f"{value:.5g}" for value in curve),
    }


def _random(venv: Any, seed: int) -> dict[str, Any]:
    """Returns of actions that are drawn uniformly."""
    venv.action_space.seed(seed)
    venv.reset()
    returns: list[float] = []
    while len(returns) < N_EPISODES:
        _, _, _, infos = venv.step(np.array([venv.action_space.sample() for _ in range(venv.num_envs)]))
        returns += [info["episode"]["r"] for info in infos if "episode" in info]
    return {"return": f"{np.mean(returns):.5g}", "return_std": f"{np.std(returns):.3g}"}


def _run_safely(job: Job) -> dict[str, Any] | str:
    """A row, or what went wrong."""
    try:
        return run(job)
    except Exception as error:  # one run must not end the others
        return f"{job.task}, {job.name}, seed {job.seed}: {type(error).__name__}: {error}"


def run_all(jobs: Sequence[Job], path: Path, n_workers: int) -> None:
    """
    Do all runs that a file has no row for, and add their rows to it.

    :param jobs: the runs
    :param path: the file
    :param n_workers: how many run at a time, on one thread each
    """
    done = set()
    if path.exists():
        with path.open() as file:
            done = {(row["task"], int(row["steps"]), row["agent"], int(row["seed"])) for row in csv.DictReader(file)}
    else:
        path.write_text(",".join(COLUMNS) + "\n")
    os.environ["OMP_NUM_THREADS"] = "1"
    left = [job for job in jobs if (job.task, job.n_steps, job.name, job.seed) not in done]
    # A new process for each run: nothing that one leaves behind can reach another
    with multiprocessing.get_context("spawn").Pool(n_workers, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(_run_safely, left, chunksize=1):
            print(row if isinstance(row, str) else json.dumps(row), flush=True)
            if isinstance(row, dict):
                with path.open("a") as file:
                    csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


# === What it comes to ===


def best_known(frame: pandas.DataFrame) -> pandas.Series:
    """The mean return of the best agent of each task, with any settings and any length of training that results/ knows."""
    means = [frame.groupby(["task", "agent"])["return"].mean().groupby("task").max()]
    for name in ("suite", "humanoid"):
        tuned = pandas.read_csv(RESULTS.with_name(f"{name}.csv"))
        ends = tuned[tuned["evaluation"] == "end"]
        columns = [name for name in ("task", "algorithm", "identity", "settings", "training_steps") if name in ends]
        means.append(ends.groupby(columns)["return"].mean().groupby("task").max())
    return pandas.concat(means).groupby("task").max()


def scored(frame: pandas.DataFrame) -> pandas.DataFrame:
    """All runs with a score: 0 for random actions, 1 for the best agent that is known."""
    random = frame[frame["agent"] == "random"].groupby("task")["return"].mean()
    low, high = frame["task"].map(random), frame["task"].map(best_known(frame))
    return frame.assign(score=(frame["return"] - low) / (high - low))


def returns_and_area(runs: pandas.DataFrame) -> tuple[str, str]:
    """Cells of a table: the return of each run, and the mean return while training, averaged over the runs."""
    areas = [pandas.Series(map(float, curve.split())).mean() for curve in runs["curve"]]
    return listed(runs), f"{sum(areas) / len(areas):,.4g}"


def listed(runs: pandas.DataFrame) -> str:
    """The return of each run."""
    return ", ".join(f"{value:,.4g}" for value in runs["return"])


def rows_of_returns(frame: pandas.DataFrame) -> Iterator[list[str]]:
    """Rows of a table, one for each agent of each task and length, in the order of the runs."""
    for (task, steps), part in frame.groupby(["task", "steps"], sort=False):
        for agent, runs in part.groupby("agent", sort=False):
            yield [str(task), f"{steps:,}", str(agent), *returns_and_area(runs)]


def best_rivals(frame: pandas.DataFrame) -> dict[str, str]:
    """
    The better one of two rivals on each task, by its return with seed 0; the others were nowhere ahead of both by 1%.

    Not by the mean over seeds: one that has few would win by luck.
    """
    first = frame[frame["agent"].isin(FINALISTS) & (frame["seed"] == 0)]
    best = first.loc[first.groupby("task")["return"].idxmax()]
    return dict(zip(best["task"], best["agent"], strict=True))


def short(name: str) -> str:
    """The name of a task for a table."""
    return name.removeprefix("dm_control/").removesuffix("-v0") if name.startswith("dm_control/") else name


def interquartile(columns: Sequence[np.ndarray]) -> str:
    """
    The interquartile mean of scores, with its interval if there are several seeds.

    :param columns: scores of each task; all get as many seeds as the task with the fewest
    """
    n_seeds = min(map(len, columns))
    scores = np.array([column[:n_seeds] for column in columns]).T
    (mean,), ((low,), (high,)) = interquartile_means(scores[..., None])
    return f"{mean:.2f}" if n_seeds == 1 else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def tables() -> dict[str, str]:
    """Tables of the judging half, by name."""
    frame = scored(pandas.read_csv(RESULTS))
    return {
        "defaults": task_table(frame),
        "defaults summary": summary_table(frame),
        "defaults environments": environments_table(frame),
        "defaults humanoid": humanoid_table(frame),
        "defaults lambda": lambda_table(frame),
    }


def runs_of(frame: pandas.DataFrame, task: str, agent: str | None) -> pandas.DataFrame:
    """The runs of an agent on a task, in the order of seeds."""
    return frame[(frame["task"] == task) & (frame["agent"] == agent)].sort_values("seed")


def task_table(frame: pandas.DataFrame) -> str:
    """Ours, the best rival and tuned PPO on each task."""
    rivals, rows = best_rivals(frame), []
    for task in JUDGING:
        random = runs_of(frame, task.name, "random")["return"].mean()
        ours, alone, rival, tuned = (
            runs_of(frame, task.name, name) for name in (OURS, OURS_ALONE, rivals.get(task.name), TUNED)
        )
        cells = [short(task.name), f"{task.n_steps:,}", f"{random:,.4g}", listed(ours), listed(alone)]
        cells += [rivals.get(task.name, ""), listed(rival), listed(tuned)]
        rows.append([*cells, ahead(ours, rival), ahead(alone, rival)])
    head = ("task", "steps", "random", "ours, 16 envs", "ours, 1 env", "best default rival", "its returns", "tuned PPO")
    return table((*head, "clearly ahead, 16 envs", "clearly ahead, 1 env"), rows)


def ahead(ours: pandas.DataFrame, rival: pandas.DataFrame) -> str:
    """Whose worst run is above the other's best one."""
    if rival["return"].min() > ours["return"].max():
        return "rival"
    return "ours" if ours["return"].min() > rival["return"].max() else ""


def summary_table(frame: pandas.DataFrame) -> str:
    """Interquartile means of scores over tasks: ours and others, on the tasks that the others have."""
    best, rows = best_rivals(frame), []
    others: dict[str, dict[str, str]] = {
        "the best default rival of each task": best,
        **{f"`{name}` on every task": dict.fromkeys(TASKS, name) for name in FINALISTS},
        "PPO with RL-Zoo's settings": dict.fromkeys(TASKS, TUNED),
    }
    for label, agents in others.items():
        found = []
        for task in JUDGING:
            runs = [runs_of(frame, task.name, name) for name in (OURS, OURS_ALONE, agents.get(task.name))]
            if all(map(len, runs)):
                found.append([part["score"].to_numpy() for part in runs])
        n_seeds = min(len(column) for columns in found for column in columns)
        means = [interquartile([column[:n_seeds] for column in columns]) for columns in zip(*found, strict=True)]
        rows.append([label, len(found), n_seeds, *means])
    return table(("other", "tasks", "seeds", "ours, 16 envs", "ours, 1 env", "the other"), rows)


def environments_table(frame: pandas.DataFrame) -> str:
    """Ours with other numbers of environments, and the same number of steps; means over seeds that all of them have."""
    numbers, rows = (1, 8, 16, 32), []
    for task in JUDGING:
        parts = [runs_of(frame, task.name, f"ours-{number}").set_index("seed") for number in numbers]
        seeds = sorted(set.intersection(*(set(part.index) for part in parts)))
        if seeds:
            scores = [part.loc[seeds, "score"].mean() for part in parts]
            returns = [f"{part.loc[seeds, 'return'].mean():,.4g}" for part in parts]
            rows.append([short(task.name), len(seeds), *returns, f"{min(scores) / max(scores):.2f}"])
    return table(("task", "seeds", *(f"{number} env{'s' * (number > 1)}" for number in numbers), "worst / best score"), rows)


def humanoid_table(frame: pandas.DataFrame) -> str:
    """Ours on Humanoid-v5 for a million steps."""
    runs = runs_of(frame, "Humanoid-v5", f"{OURS}-1000000")
    return table([f"seed {seed}" for seed in runs["seed"]], [[f"{value:,.4g}" for value in runs["return"]]])


def lambda_table(frame: pandas.DataFrame) -> str:
    """The defaults, and a candidate that lost, on each task and over all of them."""
    agents = {"defaults": OURS, "lambda by dimensions": BY_DIMENSIONS}
    parts = {task.name: [runs_of(frame, task.name, agent) for agent in agents.values()] for task in JUDGING}
    rows = [[short(task), *map(listed, pair)] for task, pair in parts.items()]
    means = [interquartile([part["score"].to_numpy() for part in column]) for column in zip(*parts.values(), strict=True)]
    return table(("task", *agents), [*rows, ["interquartile mean of the scores", *means]])


def draw(path: Path) -> None:
    """
    Draw the performance profile: for each score, the share of runs on the judging half that are above it.

    :param path: of the picture
    """
    frame = scored(pandas.read_csv(RESULTS))
    rivals = best_rivals(frame)
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    taus = np.linspace(-0.05, 1.05, 221)
    curves = {"ours, 16 environments": dict.fromkeys(TASKS, OURS), "ours, 1 environment": dict.fromkeys(TASKS, OURS_ALONE)}
    for label, agents in {**curves, "the best default rival of each task": rivals}.items():
        columns = [runs_of(frame, task.name, agents.get(task.name))["score"].to_numpy() for task in JUDGING]
        # Each task counts the same, however many seeds it has
        shares = np.mean([(column[:, None] > taus).mean(0) for column in columns if len(column)], axis=0)
        axes.plot(taus, shares, label=label)
    axes.set_xlabel("score: 0 for random actions, 1 for the best agent that is known")
    axes.set_ylabel("share of runs above it")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, pil_kwargs={"optimize": True})


def selected_tasks(names: Sequence[str]) -> list[str]:
    """Names of tasks, where "choosing" and "judging" stand for the two halves."""
    halves = {"choosing": [task.name for task in CHOOSING], "judging": [task.name for task in JUDGING]}
    return [task for name in names for task in halves.get(name, [name])]


def job_of(task: str, name: str, seed: int, n_steps: int | None) -> Job:
    """One training, of another length than the task's if ``n_steps`` is one; random actions need none."""
    agent = AGENTS[name]
    if agent.algorithm is None:
        return Job(task, 0, name, agent, seed)
    return Job(task, n_steps or TASKS[task].n_steps, f"{name}-{n_steps}" if n_steps else name, agent, seed)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("run", help="train and evaluate")
    train.add_argument("--agents", nargs="+", choices=AGENTS, default=list(AGENTS), metavar="AGENT")
    train.add_argument("--tasks", nargs="+", default=["judging"], metavar="TASK")
    train.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    train.add_argument("--workers", type=int, default=2)
    train.add_argument("--steps", type=int, help="length of the training, which is added to the agent's name")
    commands.add_parser("show", help="print the tables of the judging half")
    commands.add_parser("draw", help="draw the profile of the judging half")
    args = parser.parse_args()
    if args.command == "draw":
        draw(RESULTS.with_suffix(".png"))
        return
    if args.command == "show":
        print("\n".join(tables().values()))
        return
    with_tuned = tuned_settings()
    jobs = [
        job_of(task, agent, seed, args.steps)
        for seed in args.seeds
        for task in selected_tasks(args.tasks)
        for agent in args.agents
        if agent != TUNED or task in with_tuned
    ]
    run_all(jobs, RESULTS, args.workers)


if __name__ == "__main__":
    main()

"""Returns with default settings: ours, Stable-Baselines3's PPO and sb3-contrib's TRPO on tasks that no setting was tuned for.

    python -m benchmarks.defaults run --agents ppo-1 ppo-16-normalized ours-16 --tasks judging --seeds 0 1 2
    python -m benchmarks.defaults show

An agent is an algorithm and its number of environments, each with all of its arguments at their defaults; "normalized" has the
environments in SB3's VecNormalize, with its defaults. ``run`` trains each agent on each task with each seed, and adds a row to
``results/defaults.csv``: the mean return of 20 deterministic episodes after the training, and the mean returns of the training
episodes in each twentieth of the steps. A run that has a row is left out, so that an interrupted ``run`` can be repeated.

Settings are chosen on one half of the tasks (``choosing``) and judged on the other (``judging``): see :mod:`benchmarks.tasks`.
"""

import argparse
import csv
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from benchmarks.tasks import CHOOSING, JUDGING, TASKS, Task

RESULTS = Path(__file__).parents[1] / "results" / "defaults.csv"
COLUMNS = ("task", "agent", "seed", "steps", "return", "return_std", "episodes", "seconds", "curve")
N_EPISODES = 20
EVALUATION_SEED = 10_000
N_BINS = 20


class Agent(NamedTuple):
    """What is trained: an algorithm, and the environments that it gets."""

    #: "ours", "trpo" for sb3-contrib's, "ppo", or "random" for actions that are drawn uniformly.
    algorithm: str
    n_envs: int = 1
    is_normalized: bool = False
    #: Arguments of the algorithm, where they are not the defaults.
    settings: Mapping[str, Any] = MappingProxyType({})


RIVALS = {
    f"{algorithm}-{n_envs}{'-normalized' * is_normalized}": Agent(algorithm, n_envs, is_normalized)
    for algorithm in ("ppo", "trpo")
    for n_envs in (1, 16)
    for is_normalized in (False, True)
}
AGENTS: dict[str, Agent] = {
    "random": Agent("random"),
    **RIVALS,
    **{f"ours-{n_envs}": Agent("ours", n_envs) for n_envs in (1, 8, 16, 32)},
}


def policy_for(space: spaces.Space) -> str:
    """The policy that fits an observation space."""
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if len(space.shape or ()) == 3 else "MlpPolicy"


def normalized(venv: Any, **options: Any) -> Any:
    """An environment in VecNormalize, which scales observations that are vectors, and rewards."""
    from stable_baselines3.common.vec_env import VecNormalize

    space = venv.observation_space
    if isinstance(space, spaces.Dict):
        options["norm_obs_keys"] = [key for key, part in space.items() if isinstance(part, spaces.Box)]
    elif len(space.shape or ()) == 3:
        options["norm_obs"] = False
    return VecNormalize(venv, **options)


def model_for(agent: Agent, venv: Any, seed: int) -> Any:
    """An untrained model."""
    import sb3_contrib
    import stable_baselines3

    import sb3_trpo_ext

    classes = {"ours": sb3_trpo_ext.TRPO, "trpo": sb3_contrib.TRPO, "ppo": stable_baselines3.PPO}
    policy = policy_for(venv.observation_space)
    return classes[agent.algorithm](policy, venv, seed=seed, device="cpu", **agent.settings)


def run(task: Task, name: str, agent: Agent, seed: int) -> dict[str, Any]:
    """Train an agent, and let it act: a row of the file."""
    import torch as th
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

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

    th.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.time()
    evaluation = make_vec_env(task.make, n_envs=5, seed=EVALUATION_SEED)
    row = {"task": task.name, "agent": name, "seed": seed, "episodes": N_EPISODES}
    if agent.algorithm == "random":
        return {**row, "steps": 0, **_random(evaluation, seed), "seconds": round(time.time() - started), "curve": ""}
    venv = make_vec_env(task.make, n_envs=agent.n_envs, seed=seed)
    if agent.is_normalized:
        venv = normalized(venv)
        evaluation = normalized(evaluation, training=False, norm_reward=False)
    model = model_for(agent, venv, seed)
    recorder = Returns()
    model.learn(task.n_steps, recorder)
    if isinstance(venv, VecNormalize):
        sync_envs_normalization(venv, evaluation)
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


def _run_safely(job: tuple[str, str, Agent, int]) -> dict[str, Any] | str:
    """A row, or what went wrong."""
    task, name, agent, seed = job
    try:
        return run(TASKS[task], name, agent, seed)
    except Exception as error:  # one run must not end the others
        return f"{task}, {name}, seed {seed}: {type(error).__name__}: {error}"


def run_all(jobs: Sequence[tuple[str, str, Agent, int]], path: Path, n_workers: int) -> None:
    """
    Do all runs that a file has no row for, and add their rows to it.

    :param jobs: task, name of the agent, agent and seed of each
    :param path: the file
    :param n_workers: how many run at a time, on one thread each
    """
    done = set()
    if path.exists():
        with path.open() as file:
            done = {(row["task"], row["agent"], int(row["seed"])) for row in csv.DictReader(file)}
    else:
        path.write_text(",".join(COLUMNS) + "\n")
    os.environ["OMP_NUM_THREADS"] = "1"
    left = [job for job in jobs if (job[0], job[1], job[3]) not in done]
    # A new process for each run: nothing that one leaves behind can reach another
    with multiprocessing.get_context("spawn").Pool(n_workers, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(_run_safely, left, chunksize=1):
            print(row if isinstance(row, str) else json.dumps(row), flush=True)
            if isinstance(row, dict):
                with path.open("a") as file:
                    csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def selected_tasks(names: Sequence[str]) -> list[str]:
    """Names of tasks, where "choosing" and "judging" stand for the two halves."""
    halves = {"choosing": [task.name for task in CHOOSING], "judging": [task.name for task in JUDGING]}
    return [task for name in names for task in halves.get(name, [name])]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("run", help="train and evaluate")
    train.add_argument("--agents", nargs="+", choices=AGENTS, default=list(AGENTS), metavar="AGENT")
    train.add_argument("--tasks", nargs="+", default=["judging"], metavar="TASK")
    train.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    train.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    jobs = [
        (task, agent, AGENTS[agent], seed)
        for seed in args.seeds
        for task in selected_tasks(args.tasks)
        for agent in args.agents
    ]
    run_all(jobs, RESULTS, args.workers)


if __name__ == "__main__":
    main()

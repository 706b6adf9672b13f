"""The command ``sb3-trpo report``: evaluates the agent of a run in RL-Zoo's layout and draws its learning curve."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_sb3 import EnvironmentName
from rl_zoo3 import ALGOS, create_test_env, get_saved_hyperparams
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import StoreDict, get_model_path
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_trpo_ext._files import write_json
from sb3_trpo_ext.tools.plots import Panel, draw_learning_curve, return_lines
from sb3_trpo_ext.zoo.masks import remember
from sb3_trpo_ext.zoo.runs import has_objects, latest_run, read_curves, read_settings
from sb3_trpo_ext.zoo.settings import KEY


class DistanceRecorder(VecEnvWrapper):
    """
    Adds ``distance`` to the info of an episode's last step: how far ``x_position`` has moved since the episode began.

    :param venv: the environments; those that do not report an ``x_position`` get no ``distance``
    """

    def reset(self) -> VecEnvObs:
        """Reset the environments and remember where they start."""
        observations = self.venv.reset()
        # Wrappers have a list `reset_infos` of their own that stays empty: only that of the innermost VecEnv is filled
        self._starts = [info.get("x_position") for info in self.unwrapped.reset_infos]
        return observations

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step, and measure the episodes that it ends."""
        observations, rewards, dones, infos = self.venv.step_wait()
        for index, info in enumerate(infos):
            position = info.get("x_position")
            if self._starts[index] is None:
                # Not every environment reports its position on reset: count from the first step then
                self._starts[index] = position
            if dones[index]:
                # The environment has been reset already: `info` is of the old episode, `reset_infos` of the new one
                if position is not None:
                    info["distance"] = float(position - self._starts[index])
                self._starts[index] = self.unwrapped.reset_infos[index].get("x_position")
        return observations, rewards, dones, infos


class Episodes(NamedTuple):
    """What episodes came to."""

    returns: list[float]
    lengths: list[int]
    # Empty if the environment does not report an `x_position`
    distances: list[float]


def run_episodes(model: BaseAlgorithm, env: VecEnv, n_episodes: int, deterministic: bool) -> Episodes:
    """
    Let an agent act until it has finished some episodes.

    :param model: the agent
    :param env: environments, whose rewards are not normalized
    :param n_episodes: number of episodes
    :param deterministic: whether to take the mode of the distribution, not a sample
    :return: return, length and distance of each episode
    """
    distances = []

    def collect(scope: dict[str, Any], _: dict[str, Any]) -> None:
        # "episode" marks the true end of an episode; a lost life in an Atari game is only `done`.
        if "episode" in scope["info"] and "distance" in scope["info"]:
            distances.append(scope["info"]["distance"])

    returns, lengths = evaluate_policy(
        model, DistanceRecorder(env), n_episodes, deterministic, callback=collect, return_episode_rewards=True
    )
    assert isinstance(returns, list) and isinstance(lengths, list)
    return Episodes([float(value) for value in returns], [int(value) for value in lengths], distances)


class Run(NamedTuple):
    """A trained agent, with the environment it was trained for."""

    model: BaseAlgorithm
    model_path: Path
    env: VecEnv

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.model_path.parent


def model_of_run(env_id: str, folder: str, algo: str = KEY, exp_id: int = 0) -> Path:
    """
    Find the agent of a run.

    :param env_id: the environment
    :param folder: the folder of all runs
    :param algo: key of the algorithm
    :param exp_id: number of the run, 0 for the latest one with an agent, -1 for an agent that lies in the folder of the
        algorithm itself
    :return: its file
    :raises AssertionError: if there is no such run
    :raises ValueError: if there is no agent in it
    """
    name = EnvironmentName(env_id)
    if exp_id == 0:
        exp_id = latest_run(Path(folder) / algo, name, [f"{name}.zip"])
    return Path(get_model_path(exp_id, folder, algo, name)[1])


def load_run(
    env_id: str,
    folder: str,
    algo: str = KEY,
    exp_id: int = 0,
    seed: int = 0,
    device: str = "auto",
    n_envs: int = 1,
    env_kwargs: dict[str, Any] | None = None,
) -> Run:
    """
    Load an agent that RL-Zoo has trained, and make its environment as it was in training.

    :param env_id: the environment
    :param folder: the folder of all runs
    :param algo: key of the algorithm
    :param exp_id: number of the run, as for :func:`model_of_run`
    :param seed: seed of the environment
    :param device: device of the policy
    :param n_envs: number of environments
    :param env_kwargs: arguments of the environment that are other than in training
    :return: the agent and its environments, with raw rewards and the saved, frozen statistics of observations
    :raises AssertionError: if there is no such run
    :raises ValueError: if there is no agent in it
    """
    model_path = model_of_run(env_id, folder, algo, exp_id)
    settings = model_path.parent / EnvironmentName(env_id)
    hyperparams, stats_path = get_saved_hyperparams(str(settings), norm_reward=False, test_mode=True)
    args_path = settings / "args.yml"
    options = read_settings(args_path)
    if (args_path.is_file() and not options) or has_objects(options.get("env_kwargs")):
        raise ValueError(f"{args_path} is damaged, or holds what only Python can read: remove it, and give --env-kwargs")
    # Those of the command line win
    kwargs_in_training = options.get("env_kwargs") or hyperparams.get("env_kwargs") or {}
    env = create_test_env(
        env_id,
        n_envs,
        stats_path=stats_path,
        seed=seed,
        should_render=False,
        hyperparams=hyperparams,
        env_kwargs={**kwargs_in_training, **(env_kwargs or {})},
        vec_env_cls=ExperimentManager.default_vec_env_cls or DummyVecEnv,
    )
    return Run(ALGOS[algo].load(model_path, device=device), model_path, remember(env))


def summarize(run: Run, episodes: Episodes) -> dict[str, Any]:
    """
    Gather the figures of an evaluation.

    :param run: the agent
    :param episodes: its episodes
    :return: a dictionary for ``evaluation.json``, with mean, standard deviation and single values of each quantity
    """
    summary: dict[str, Any] = {"model": run.model_path.name, "n_timesteps": run.model.num_timesteps}
    quantities: dict[str, Sequence[float]] = dict(zip(("return", "length", "distance"), episodes, strict=True))
    for name, values in quantities.items():
        if values:
            summary[name] = {"mean": float(np.mean(values)), "std": float(np.std(values)), "episodes": values}
    return summary


def run_parser(name: str, description: str) -> argparse.ArgumentParser:
    """
    A parser for the options that tell a run.

    :param name: of the command
    :param description: of the command
    """
    parser = argparse.ArgumentParser(name, description=description)
    default = " (default: %(default)s)"
    exp_id_help = "number of the run (default: the latest with an agent; -1: no folder of its own)"
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("-f", "--folder", "--log-folder", dest="folder", default="logs", help=f"folder of all runs{default}")
    parser.add_argument("--algo", default=KEY, choices=list(ALGOS), metavar="ALGO", help=f"key of the algorithm{default}")
    parser.add_argument("--exp-id", type=int, default=0, help=exp_id_help)
    return parser


def add_acting(parser: argparse.ArgumentParser) -> None:
    """Add the options that tell how an agent acts, and where."""
    env_kwargs_help = "arguments of the environment (default: those of training)"
    parser.add_argument("--stochastic", action="store_true", help="sample the actions")
    parser.add_argument("--env-kwargs", nargs="+", action=StoreDict, metavar="NAME:VALUE", help=env_kwargs_help)


def main(argv: Sequence[str] | None = None) -> None:
    """
    Evaluate the agent of a run; write ``evaluation.json`` and ``learning_curve.png`` into its folder and print what came out.

    :param argv: the arguments, those of the process if None
    :raises ValueError: for arguments that are wrong
    """
    parser = run_parser("sb3-trpo report", "Evaluate a trained agent and draw its learning curve.")
    add_acting(parser)
    parser.add_argument("--n-eval-episodes", type=int, default=20, help="number of episodes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the evaluation (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="device of the policy (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.n_eval_episodes < 1:
        raise ValueError(f"--n-eval-episodes must be at least 1, got {args.n_eval_episodes}")
    run = load_run(args.env, args.folder, args.algo, args.exp_id, args.seed, args.device, env_kwargs=args.env_kwargs)
    # Before the evaluation, which takes a while: a file may be damaged
    lines = return_lines(*read_curves(run.folder), "#1f77b4", is_single=True)
    set_random_seed(args.seed)
    episodes = run_episodes(run.model, run.env, args.n_eval_episodes, deterministic=not args.stochastic)
    run.env.close()

    settings = {"env": args.env, "algo": args.algo, "seed": args.seed, "deterministic": not args.stochastic}
    summary = {**settings, **summarize(run, episodes)}
    json_path, png_path = run.folder / "evaluation.json", run.folder / "learning_curve.png"
    write_json(json_path, summary)
    title = f"{args.algo} on {args.env} ({run.folder.name})"
    draw_learning_curve(png_path, Panel(title, lines), run.model.num_timesteps, episodes.returns)

    kind = "stochastic" if args.stochastic else "deterministic"
    print(f"\n{args.algo} on {args.env} after {run.model.num_timesteps:,} steps: {args.n_eval_episodes} {kind} episodes")
    for name, label in {"return": "return", "length": "episode length", "distance": "distance walked"}.items():
        if name in summary:
            print(f"  {label:<16} {summary[name]['mean']:>10,.2f} +- {summary[name]['std']:,.2f}")
    print(f"  evaluation       {json_path}\n  learning curve   {png_path}")

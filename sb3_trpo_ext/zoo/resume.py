"""Going on with a run of RL-Zoo from its last checkpoint: ``sb3-trpo train --resume``, and a restart of ``torchrun``."""

from __future__ import annotations

import argparse
import contextlib
import functools
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.zoo.patching import replaced, replaced_all
from sb3_trpo_ext.zoo.runs import read_settings

#: The options of ``train`` that make a run what it is; they are given again when it goes on.
KEPT = (
    "algo",
    "env",
    "env_kwargs",
    "eval_env_kwargs",
    "eval_episodes",
    "eval_freq",
    "device",
    "gym_packages",
    "log_folder",
    "log_interval",
    "n_eval_envs",
    "n_timesteps",
    "num_threads",
    "save_freq",
    "seed",
    "tensorboard_log",
    "vec_env",
    "verbose",
)


class Checkpoint(NamedTuple):
    """A state to go on from."""

    model: Path
    #: VecNormalize's statistics, if the run has any.
    statistics: Path | None
    num_timesteps: int


def split_resume(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """
    Take ``--resume FOLDER`` out of a command line, and put the options in that the run was started with.

    :param arguments: the arguments of ``train``
    :return: the folder, if there is one, and the arguments for RL-Zoo; what the user wrote comes last, where it wins
    :raises ValueError: if there is no run in the folder, or nothing to go on from
    """
    parser = argparse.ArgumentParser("sb3-trpo train", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    given, others = parser.parse_known_args(arguments)
    if given.resume is None:
        return None, others
    folder: Path = given.resume.absolute()
    found = sorted(folder.glob("*/args.yml"))
    saved = read_settings(found[0]) if len(found) == 1 else {}
    settings = read_settings(found[0].with_name("config.yml")) if saved else {}
    if not settings:
        raise ValueError(
            f"`--resume`: there is no run of `sb3-trpo train` in {folder}: give a folder such as logs/trpo_ext/Ant-v5_1."
        )
    env_folder = found[0].parent
    if last_checkpoint(folder, env_folder.name, bool(settings.get("normalize"))) is None:
        raise ValueError(
            f"`--resume`: there is no checkpoint in {folder}: `--save-freq` leaves some, and an interruption leaves one."
        )
    # With `hyperparams` of the command line in it, and whatever the package says by now
    conf_file = env_folder / "settings.yml"
    conf_file.write_text(yaml.safe_dump({saved["env"]: settings}, sort_keys=False), encoding="utf-8")
    options = ["--conf-file", str(conf_file)]
    for name in KEPT:
        options += _option(name, saved.get(name))
    return folder, [*options, *others]


def _option(name: str, value: Any) -> list[str]:
    """
    An option as RL-Zoo's parser takes it.

    :param name: of the argument
    :param value: what it was
    :return: the option with its values; empty if there is none
    """
    if value is None or value in ("", [], {}):
        return []
    values = [value]
    if isinstance(value, dict):
        # RL-Zoo evaluates what comes after the colon
        values = [f"{key}:{item!r}" for key, item in value.items()]
    elif isinstance(value, list):
        values = value
    return [f"--{name.replace('_', '-')}", *map(str, values)]


def last_checkpoint(folder: Path, env_name: str, has_statistics: bool) -> Checkpoint | None:
    """
    The latest state in a folder that is complete.

    :param folder: of a run
    :param env_name: of its environment, after which the agent is named that RL-Zoo saves at the end or when it is interrupted
    :param has_statistics: whether the run normalises with VecNormalize
    :return: the checkpoint, if there is one
    """
    found = []
    # First, where it wins over a checkpoint of the same step: that one comes before the last update
    ended = folder / f"{env_name}.zip"
    if (steps_at_end := _timesteps_of(ended)) is not None:
        found.append(Checkpoint(ended, folder / env_name / "vecnormalize.pkl" if has_statistics else None, steps_at_end))
    for model in folder.glob("rl_model_*_steps.zip"):
        if match := re.fullmatch(r"rl_model_(\d+)_steps", model.stem):
            steps = int(match[1])
            statistics = model.with_name(f"rl_model_vecnormalize_{steps}_steps.pkl")
            found.append(Checkpoint(model, statistics if has_statistics else None, steps))
    for checkpoint in sorted(found, key=lambda each: -each.num_timesteps):
        if checkpoint.statistics is None or _is_readable(checkpoint.statistics):
            return checkpoint
    return None


def _timesteps_of(model: Path) -> int | None:
    """
    How far an agent has been trained.

    :param model: its file
    :return: the number of timesteps; ``None`` if there is no such file, or not all of it
    """
    # Zipfile, pickle and PyTorch have no common error for a file that is cut off
    with contextlib.suppress(Exception):
        data, _, _ = load_from_zip_file(model, device="cpu")
        return int(data["num_timesteps"]) if data else None
    return None


def _is_readable(path: Path) -> bool:
    """
    Whether a pickle is there in full: the process may have been killed while it wrote it.

    :param path: the file
    :return: false if it is missing or cut off
    """
    try:
        with path.open("rb") as file:
            pickle.load(file)
    except (OSError, EOFError, pickle.UnpicklingError):
        return False
    return True


def resume(manager: ExperimentManager, folder: Path) -> Checkpoint | None:
    """
    Go on in the folder of an earlier run, from its last checkpoint.

    :param manager: RL-Zoo's, before it has made anything
    :param folder: of the run
    :return: the checkpoint; ``None`` for a start from the beginning
    """
    manager.save_path, manager.params_path = str(folder), str(folder / manager.env_name)
    params_path = folder / manager.env_name
    has_statistics = bool(read_settings(params_path / "config.yml").get("normalize"))
    checkpoint = last_checkpoint(folder, manager.env_name, has_statistics)
    if checkpoint is None:
        return None
    # Where RL-Zoo looks for those of an agent that it is to train further
    statistics = params_path / "vecnormalize.pkl"
    if checkpoint.statistics is not None and checkpoint.statistics != statistics:
        shutil.copyfile(checkpoint.statistics, statistics)
    manager.trained_agent, manager.continue_training = str(checkpoint.model), True
    print(f"Going on from {checkpoint.model} after {checkpoint.num_timesteps:,} steps")
    return checkpoint


def restore_evaluations(callback: EvalCallback, num_timesteps: int) -> None:
    """
    Let an evaluation go on with the table that is there.

    :param callback: RL-Zoo's
    :param num_timesteps: later evaluations are made again
    """
    assert callback.log_path is not None
    path = Path(f"{callback.log_path}.npz")
    try:
        with np.load(path) as table:
            steps, results, lengths = (table[name] for name in ("timesteps", "results", "ep_lengths"))
    # NumPy and zipfile have no common error for a missing or a damaged file
    except Exception:
        return
    callback.best_mean_reward = float(np.max(results.mean(axis=1)))
    n_kept = int((steps <= num_timesteps).sum())
    callback.evaluations_timesteps = steps[:n_kept].tolist()
    callback.evaluations_results = results[:n_kept].tolist()
    callback.evaluations_length = lengths[:n_kept].tolist()


def going_on_methods(find: Callable[[ExperimentManager], Path | None]) -> dict[str, Any]:
    """
    What RL-Zoo does differently where a run may go on.

    :param find: the folder of the run, if there is one to go on with
    :return: methods of the experiment manager by name
    """
    manager_class = ExperimentManager
    set_up, make_envs = manager_class.setup_experiment, manager_class.create_envs
    make_callbacks, learn_alone = manager_class.create_callbacks, manager_class.learn
    checkpoint: Checkpoint | None = None

    @functools.wraps(set_up)
    def setup_experiment(self: ExperimentManager) -> Any:
        nonlocal checkpoint
        folder = find(self)
        checkpoint = None if folder is None else resume(self, folder)
        return set_up(self)

    @functools.wraps(make_envs)
    def create_envs(self: ExperimentManager, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        if checkpoint is not None:
            self.monitor_kwargs = {**self.monitor_kwargs, "override_existing": False}
        return make_envs(self, n_envs, eval_env, no_log)

    @functools.wraps(make_callbacks)
    def create_callbacks(self: ExperimentManager) -> None:
        make_callbacks(self)
        for callback in self.callbacks:
            if isinstance(callback, EvalCallback) and checkpoint is not None:
                restore_evaluations(callback, checkpoint.num_timesteps)

    @functools.wraps(learn_alone)
    def learn(self: ExperimentManager, model: BaseAlgorithm) -> None:
        if checkpoint is None:
            return learn_alone(self, model)
        if model.num_timesteps >= self.n_timesteps:
            print(f"It has made the {self.n_timesteps:,} steps already: `-n` asks for more.")
        algorithm = type(model)
        original = algorithm.learn

        @functools.wraps(original)
        def go_on(model: BaseAlgorithm, total_timesteps: int, *args: Any, **kwargs: Any) -> Any:
            remaining = max(total_timesteps - model.num_timesteps, 0)
            return original(model, remaining, *args, **{**kwargs, "reset_num_timesteps": False})

        with replaced(algorithm, "learn", go_on):
            return learn_alone(self, model)

    return {
        "setup_experiment": setup_experiment,
        "create_envs": create_envs,
        "create_callbacks": create_callbacks,
        "learn": learn,
    }


@contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """
    Let RL-Zoo go on with a run.

    :param folder: of the run
    """
    with replaced_all(ExperimentManager, going_on_methods(lambda _: folder)):
        yield

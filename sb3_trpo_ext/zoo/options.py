"""The options that ``sb3-trpo`` adds to RL-Zoo's scripts, and what it checks and completes before they read theirs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym

from sb3_trpo_ext._checks import closest

#: For the end of every command's help.
COMMON_HELP = """options of every command:
  --gym-packages MODULE [MODULE ...]
                        modules that register environments, also of the current folder
  --verbose 2           show the traceback of an error"""
#: For the end of the help of `train`.
TRAIN_HELP = """options of sb3-trpo:
  --vec-env envpool     train in EnvPool's environments
  --resume FOLDER       go on with the run in that folder from its last checkpoint, with the options it was started with

"""


class Common(NamedTuple):
    """The options of every command."""

    verbose: int
    gym_packages: list[str]
    #: For the command's own parser.
    others: list[str]


def split_common(arguments: Sequence[str], known: Sequence[str]) -> Common:
    """
    Read the options of every command.

    :param arguments: what the user wrote after the command
    :param known: those of the options that the command's own parser has: they stay
    :return: the options
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--verbose", type=int)
    parser.add_argument("--gym-packages", nargs="+", default=[])
    given, others = parser.parse_known_args(arguments)
    if "--verbose" in known and given.verbose is not None:
        others += ["--verbose", str(given.verbose)]
    if "--gym-packages" in known and given.gym_packages:
        others += ["--gym-packages", *given.gym_packages]
    return Common(1 if given.verbose is None else given.verbose, given.gym_packages, others)


def import_packages(modules: Iterable[str]) -> None:
    """
    Let modules register their environments.

    :param modules: their names
    :raises ImportError: if there is no such module, or none that it needs
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"--gym-packages {module}: {error}") from error


def check_env(env_id: str | None) -> str:
    """
    Refuse environments that do not exist.

    :param env_id: of the command line; ``None`` if there is none
    :return: the same
    :raises ValueError: if it is missing, or not registered
    """
    if env_id is None:
        raise ValueError("--env is missing: give the id of an environment, such as --env Humanoid-v5")
    if env_id not in gym.registry:
        raise ValueError(f"--env: there is no environment {env_id!r}; {closest(env_id, gym.registry)}")
    return env_id


def env_of(arguments: Sequence[str]) -> str | None:
    """
    The environment that a command line asks for.

    :param arguments: the arguments of a command
    :return: its id, if there is any
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env")
    env_id: str | None = parser.parse_known_args(arguments)[0].env
    return env_id


def with_chosen_run(name: str, arguments: Sequence[str]) -> list[str]:
    """
    Name the run that a script of RL-Zoo is to load: the latest one that has the model asked for.

    RL-Zoo takes the latest folder, which may be that of a start that failed or of a search for hyperparameters.

    :param name: the command
    :param arguments: for RL-Zoo, with an environment
    :return: the same with ``--exp-id``, where the user has not given any
    :raises ValueError: if there is no such run
    """
    from huggingface_sb3 import EnvironmentName

    from sb3_trpo_ext.zoo.runs import latest_run

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env")
    parser.add_argument("--algo")
    parser.add_argument("-f", "--folder", default="rl-trained-agents")
    parser.add_argument("--exp-id", type=int, default=0)
    parser.add_argument("--load-best", action="store_true")
    parser.add_argument("--load-checkpoint", type=int)
    parser.add_argument("--load-last-checkpoint", action="store_true")
    given, _ = parser.parse_known_args(arguments)
    # Agents that `enjoy` downloads
    if given.exp_id != 0 or "rl-trained-agents" in given.folder:
        return list(arguments)
    env_name = EnvironmentName(given.env)
    if name == "record-training":
        wanted = [f"{env_name}.zip", "best_model.zip", "rl_model_*_steps.zip"]
    elif given.load_best:
        wanted = ["best_model.zip"]
    elif given.load_checkpoint is not None:
        wanted = [f"rl_model_{given.load_checkpoint}_steps.zip"]
    elif given.load_last_checkpoint:
        wanted = ["rl_model_*_steps.zip"]
    else:
        wanted = [f"{env_name}.zip"]
    return [*arguments, "--exp-id", str(latest_run(Path(given.folder) / given.algo, env_name, wanted))]

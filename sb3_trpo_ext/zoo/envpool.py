"""Training in EnvPool with RL-Zoo: what ``sb3-trpo train --vec-env envpool`` does."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.envs import EnvPoolVecEnv
from sb3_trpo_ext.envs.envpool import load_envpool
from sb3_trpo_ext.zoo.patching import replaced


def split_vec_env(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """
    Take ``--vec-env envpool`` out of a command line: RL-Zoo's parser knows its own kinds only.

    :param arguments: the arguments of ``train``
    :return: whether EnvPool is asked for, and the arguments for RL-Zoo
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--vec-env")
    given, others = parser.parse_known_args(arguments)
    if given.vec_env == "envpool":
        return True, others
    return False, list(arguments)


def make_envpool(
    env_id: str,
    make_env: Callable[..., gym.Env],
    n_envs: int = 1,
    seed: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    monitor_dir: str | None = None,
    monitor_kwargs: dict[str, Any] | None = None,
    **_: Any,
) -> VecEnv:
    """
    Stand in for SB3's ``make_vec_env``, as RL-Zoo calls it.

    :param env_id: the task
    :param make_env: makes Gymnasium's environment, which nobody needs here
    :param n_envs: the number of environments
    :param seed: their seed
    :param env_kwargs: options of the task, with EnvPool's names
    :param monitor_dir: where to write the episodes, None for nowhere
    :param monitor_kwargs: ``info_keywords``, which keys of ``info`` to write for each episode, and ``override_existing``
    :return: environments of EnvPool, whose episodes are in one file, where RL-Zoo has a file for each environment
    """
    monitor_file = None
    if monitor_dir is not None:
        os.makedirs(monitor_dir, exist_ok=True)
        monitor_file = os.path.join(monitor_dir, "0")
    return EnvPoolVecEnv(env_id, n_envs, seed=seed, monitor_file=monitor_file, **(monitor_kwargs or {}), **(env_kwargs or {}))


def check_settings(manager: ExperimentManager) -> None:
    """
    Refuse settings that need environments in Python, before a folder is made.

    :param manager: RL-Zoo's experiment manager, which has read its settings
    :raises ValueError: if there is such a setting, or if EnvPool has no such task or option
    """
    if manager.env_wrapper is not None:
        raise ValueError(
            "`env_wrapper`: EnvPool's environments run in C++, where no wrapper gets at them; take it out of the settings of "
            f"{manager.env_name.gym_id}, use `vec_env_wrapper`, or train with `--vec-env dummy`"
        )
    others = sorted(manager.monitor_kwargs.keys() - {"info_keywords", "override_existing"})
    if others:
        raise ValueError(f"`monitor_kwargs`: with EnvPool only `info_keywords` and `override_existing`, got {others}")
    EnvPoolVecEnv(manager.env_name.gym_id, manager.n_envs, **manager.env_kwargs).close()


@contextmanager
def envpool_for_training() -> Iterator[None]:
    """
    Let RL-Zoo train in EnvPool; evaluation stays with Gymnasium's environments.

    :raises ImportError: if EnvPool is not installed
    """
    load_envpool()
    make_ordinary, create_folder = ExperimentManager.create_envs, ExperimentManager.create_log_folder

    @functools.wraps(make_ordinary)
    def create_envs(self: ExperimentManager, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        if eval_env:
            return make_ordinary(self, n_envs, eval_env, no_log)
        with replaced(exp_manager, "make_vec_env", functools.partial(make_envpool, self.env_name.gym_id)):
            return make_ordinary(self, n_envs, eval_env, no_log)

    @functools.wraps(create_folder)
    def create_log_folder(self: ExperimentManager) -> None:
        check_settings(self)
        # For `args.yml`, which tells how the agent was trained
        self.args.vec_env = "envpool"
        create_folder(self)

    with (
        replaced(ExperimentManager, "create_envs", create_envs),
        replaced(ExperimentManager, "create_log_folder", create_log_folder),
    ):
        yield

"""Which settings an algorithm is compared with: ours, or RL-Zoo's for the nearest version of the task."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import rl_zoo3
import yaml
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager

from sb3_trpo_ext import TRPO
from sb3_trpo_ext._checks import closest
from sb3_trpo_ext.arguments import AUTO
from sb3_trpo_ext.contrib import joint_kl_factor
from sb3_trpo_ext.zoo.settings import KEY, KEYS, linear_schedule, load_hyperparams


class Settings(NamedTuple):
    """The arguments of an algorithm in RL-Zoo's format, and where they are from."""

    entry: dict[str, Any]
    source: str


def nearest_version(env_id: str, entries: dict[str, Any]) -> str | None:
    """
    The entry of the same task whose version is nearest; the newer one of two.

    :param env_id: the task, such as ``Hopper-v5``
    :param entries: settings by environment id
    :return: the id of the entry, None if there is none of this task
    """
    match = re.fullmatch(r"(.+)-v(\d+)", env_id)
    if match is None:
        return env_id if env_id in entries else None
    versions = [int(found[1]) for key in entries if (found := re.fullmatch(re.escape(match[1]) + r"-v(\d+)", key))]
    wanted = int(match[2])
    if not versions:
        return None
    return f"{match[1]}-v{min(versions, key=lambda version: (abs(version - wanted), -version))}"


def find_settings(algo: str, env_id: str) -> Settings:
    """
    The settings that come with an algorithm: this package's for its own, RL-Zoo's for all others.

    :param algo: key of RL-Zoo
    :param env_id: the task
    :return: the settings
    :raises ValueError: if there is no such algorithm, or no settings for the task
    """
    if algo not in ALGOS:
        raise ValueError(f"--algos: there is no algorithm {algo!r}; {closest(algo, ALGOS)}")
    if algo in KEYS:
        owner, entries = "sb3-trpo-ext", load_hyperparams(algo)
    else:
        path = Path(rl_zoo3.__path__[0]) / "hyperparams" / f"{algo}.yml"
        owner, entries = "RL-Zoo", yaml.safe_load(path.read_text(encoding="utf-8"))
    name = nearest_version(env_id, entries)
    if name is None:
        name = "atari" if "atari" in entries and ExperimentManager.is_atari(env_id) else "default"
    if name not in entries:
        raise ValueError(f"--algos: {owner} has no settings of {algo} for {env_id}, nor defaults: leave it out")
    return Settings(dict(entries[name]), f"{owner}'s {name}")


def with_equal_kl(settings: Settings, env_id: str) -> Settings:
    """
    Give sb3-contrib's TRPO the trust region and the damping of our entry, in its units.

    :param settings: sb3-contrib's
    :param env_id: the task
    :return: the same with ``target_kl`` and ``cg_damping`` of our entry, divided by the number of action dimensions; the mean
        of a linear schedule, which sb3-contrib does not have
    :raises ValueError: if our entry leaves one of them to the class
    """
    ours = find_settings(KEY, env_id).entry
    defaults = inspect.signature(TRPO.__init__).parameters
    env = gym.make(env_id)
    n_dims = joint_kl_factor(env.action_space)
    env.close()
    converted = {}
    for name in ("target_kl", "cg_damping"):
        value = ours.get(name, defaults[name].default)
        if value == AUTO:
            raise ValueError(f"--equal-kl needs numbers, and our settings for {env_id} leave `{name}` to the class.")
        if isinstance(value, str):
            value = linear_schedule(name, value)(0.5)
        converted[name] = value / n_dims
    figures = ", ".join(f"{name} {value:.3g} x {n_dims}" for name, value in converted.items())
    return Settings({**settings.entry, **converted}, f"{settings.source}, in joint units: {figures}")

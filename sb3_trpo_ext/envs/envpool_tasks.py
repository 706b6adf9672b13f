"""What has to be known of a task of EnvPool before there are environments of it."""

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_trpo_ext._checks import check_integer, closest

#: Options of EnvPool that have a name of their own here, or that this class cannot do.
RESERVED = ("num_envs", "batch_size", "env_seed", "gym_reset_return_info", "render_mode", "max_num_players")


def load_envpool() -> ModuleType:
    """Import EnvPool, which is an extra, and slow to import; raises an ``ImportError`` that says how to install it."""
    try:
        return importlib.import_module("envpool")
    except ImportError as error:
        raise ImportError(f"EnvPoolVecEnv needs Python >= 3.11: pip install sb3-trpo-ext[envpool] ({error})") from error


@contextmanager
def spaces_without_warnings() -> Iterator[None]:
    """Keep Gymnasium quiet about EnvPool's spaces of float32, which are made with bounds in float64."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*precision lowered by casting")
        yield


def n_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked_task(envpool: ModuleType, env_id: str, kwargs: dict[str, Any]) -> Any:
    """
    Check the name of a task and its options.

    :param envpool: the package
    :param env_id: the task
    :param kwargs: the options that were given
    :return: the task as EnvPool describes it, with these options
    :raises ValueError: if there is no such task or option, or if EnvPool does not take a value
    """
    tasks = envpool.list_all_envs()
    if env_id not in tasks:
        raise ValueError(f"`env_id`: EnvPool has no task {env_id!r}; {closest(str(env_id), tasks)}")
    defaults = envpool.make_spec(env_id).config._asdict()
    for name in kwargs:
        if name in RESERVED:
            hint = "pass `n_envs` and `seed`; all environments step together, have one agent each, and do not render"
            raise ValueError(f"`{name}` is not an option here: {hint}")
        if name not in defaults:
            raise ValueError(f"`{name}`: {env_id} of EnvPool has no such option; {closest(name, defaults)}")
    try:
        task = envpool.make_spec(env_id, **kwargs)
    except (TypeError, RuntimeError, AssertionError) as error:
        replaced = {name: defaults[name] for name in kwargs}
        raise ValueError(f"EnvPool does not take {kwargs} as options of {env_id}; the defaults are {replaced}") from error
    if defaults.get("max_num_players", 1) != 1:
        raise ValueError(f"`env_id`: {env_id} has several players, and EnvPoolVecEnv is for one agent per environment")
    check_integer("max_episode_steps", task.config.max_episode_steps, 1)
    return task


def single_precision(space: Any) -> spaces.Space:
    """
    Make a space of float32 out of one of float64.

    :param space: a space of EnvPool
    :return: the space; other data types are left as they are
    """
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: single_precision(part) for key, part in space.spaces.items()})
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        # Some tasks of EnvPool give the smallest positive number where they have no lower bound
        low = np.where(space.low == np.finfo(space.low.dtype).tiny, -np.inf, space.low)
        with np.errstate(over="ignore"):
            return spaces.Box(low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
    return space

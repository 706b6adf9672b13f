"""Gymnasium's vector environments as a ``VecEnv`` of Stable-Baselines3."""

import operator
import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_trpo_ext._checks import ArgumentError, checked_actions
from sb3_trpo_ext._observations import mapped, parts_of
from sb3_trpo_ext.envs.vector_modes import SAME_STEP, check_vector_env


class VectorEnvAdapter(VecEnv):
    """
    A ``gymnasium.vector.VectorEnv`` of NumPy arrays for any algorithm of Stable-Baselines3.

    :class:`~sb3_trpo_ext.TRPO` wraps one by itself. As in SB3's own VecEnvs, an environment that is done begins a new episode
    in the same step. How depends on the autoreset mode:

    * ``NEXT_STEP``, Gymnasium's default: the adapter resets what is done at once, with the option ``reset_mask``, and no step
      is spent on it. ``SyncVectorEnv`` and ``AsyncVectorEnv`` (with shared memory) can do that. Others are refused, and so is
      an environment that does not say its mode, for Gymnasium takes that for ``NEXT_STEP``.
    * ``DISABLED``: the adapter resets what is done in the same way, which every environment in this mode must support.
    * ``SAME_STEP``: the environment does it. The last observation of an episode is ``infos["final_obs"]``.

    ``info["episode"]`` holds return, length and time of an episode, of the rewards that ``env`` returns, as with
    ``VecMonitor``.

    :param env: such as ``gymnasium.make_vec("Pendulum-v1", 8)``
    :raises ValueError: if ``env`` is not such an environment, or in a mode that does not work
    """

    def __init__(self, env: VectorEnv) -> None:
        self._resets_itself = check_vector_env(env) == SAME_STEP
        self.env = env
        #: Without vector wrappers, if it has single environments.
        self._singles: Any = env.unwrapped if isinstance(env.unwrapped, (SyncVectorEnv, AsyncVectorEnv)) else None
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, dtype=np.int64)
        self._start = time.time()
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.metadata = env.metadata

    # === What SB3 calls in training ===

    def set_options(self, options: list[dict] | dict | None = None) -> None:
        """
        Set options for the next reset.

        :param options: the same for all environments: a vector environment takes no list
        """
        if options is not None and not isinstance(options, dict):
            raise ArgumentError(f"`options` must be one dict for all environments, got {options!r}.")
        super().set_options(options)

    def reset(self) -> VecEnvObs:
        """Start a new episode in all environments."""
        # Environment i gets `seed + i`, by SB3's convention and by Gymnasium's
        seed = None if self._seeds[0] is None else int(self._seeds[0])
        observations, columns = self.env.reset(seed=seed, options=self._options[0] or None)
        for part in parts_of(observations).values():
            if not isinstance(part, np.ndarray):
                raise ArgumentError(
                    f"`env` must return NumPy arrays, got observations of type {type(part).__name__}: use "
                    "sb3_trpo_ext.envs.GymnasiumTensorVecEnv for tensors, or a wrapper such as "
                    "gymnasium.wrappers.vector.JaxToNumpy."
                )
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = rows(columns, self.num_envs)
        self._returns[:] = 0
        self._lengths[:] = 0
        return self._own(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """
        Keep the actions of a step.

        :param actions: of shape ``(n_envs, *action_space.shape)``; an array of tuples or dicts for Tuple and Dict actions
        :raises ValueError: if they have another shape
        """
        self._actions: Any = checked_actions(actions, (self.num_envs, *(self.action_space.shape or ())))
        if isinstance(self.action_space, (spaces.Tuple, spaces.Dict)):
            # Gymnasium wants a structure of arrays, and there is an array of structures
            empty: Any = create_empty_array(self.action_space, self.num_envs)
            self._actions = concatenate(self.action_space, self._actions, empty)

    def step_wait(self) -> VecEnvStepReturn:
        """Make the step, and start a new episode in the environments that are done."""
        returned, rewards, terminated, truncated, columns = self.env.step(self._actions)
        observations, infos = self._own(returned), rows(columns, self.num_envs)
        self._returns += rewards
        self._lengths += 1
        dones = np.logical_or(terminated, truncated)
        ended = np.flatnonzero(dones).tolist()
        final = self._final(ended, infos) if self._resets_itself else [row(observations, index) for index in ended]
        elapsed = round(time.time() - self._start, 6)
        for index, observation in zip(ended, final, strict=True):
            episode = {"r": round(float(self._returns[index]), 6), "l": int(self._lengths[index]), "t": elapsed}
            infos[index].update(terminal_observation=self._own(observation), episode=episode)
        for info, is_cut_off in zip(infos, np.logical_and(truncated, np.logical_not(terminated)).tolist(), strict=True):
            info["TimeLimit.truncated"] = is_cut_off
        self._returns[dones] = 0
        self._lengths[dones] = 0
        if ended and not self._resets_itself:
            first = parts_of(self._first_observations(dones))
            for key, part in parts_of(observations).items():
                part[dones] = first[key][dones]
        return observations, np.array(rewards, dtype=np.float32), dones, infos

    def _final(self, ended: list[int], infos: list[dict[str, Any]]) -> list[Any]:
        """
        Separate old episodes from new ones in an environment that resets itself.

        :param ended: the environments whose episode has ended
        :param infos: those of the new episodes there; replaced by those of the old ones
        :return: the last observations of the old ones
        """
        # Some environments have an observation there for all
        final = [(info.pop("final_obs", None), info.pop("final_info", None)) for info in infos]
        for index in ended:
            observation, info = final[index]
            if observation is None:
                raise ArgumentError(
                    "`env` has the autoreset mode SAME_STEP, and must have `final_obs` in its infos where an episode has "
                    f"ended, got {sorted(infos[index])}."
                )
            self.reset_infos[index] = infos[index]
            infos[index] = dict(infos[index] if info is None else info)
        return [final[index][0] for index in ended]

    def _first_observations(self, where: np.ndarray) -> Any:
        """Begin a new episode in some environments; returns observations of all, those of the others being of no use."""
        observations, columns = self.env.reset(options={"reset_mask": where})
        infos = rows(columns, self.num_envs)
        for index in np.flatnonzero(where).tolist():
            self.reset_infos[index] = infos[index]
        return observations

    def _own(self, observations: Any) -> VecEnvObs:
        """Observations as arrays of their own, since the next step may write over those of the environment."""
        space = self.observation_space
        if isinstance(space, spaces.Dict):
            return {key: np.array(observations[key], dtype=part.dtype) for key, part in space.items()}
        return np.array(observations, dtype=space.dtype)

    @property
    def can_restart(self) -> bool:
        """Whether single environments can begin a new episode before the old one has ended."""
        # A vector wrapper may not know of it
        is_bare = self.env is self._singles
        return is_bare and (not self.has_attr("allow_early_resets") or all(self.get_attr("allow_early_resets")))

    def restart(self, indices: list[int]) -> list[Any]:
        """
        Begin a new episode in some environments, between two steps.

        :param indices: in which
        :return: the first observation of each
        """
        where = np.zeros(self.num_envs, dtype=bool)
        where[indices] = True
        self._returns[where] = 0
        self._lengths[where] = 0
        observations = self._own(self._first_observations(where))
        return [row(observations, index) for index in indices]

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """A picture of each environment if ``render_mode`` is ``"rgb_array"``."""
        pictures: Any = self.env.render() if self.render_mode == "rgb_array" else [None] * self.num_envs
        return list(pictures)

    # === What SB3 asks single environments for ===

    def has_attr(self, attr_name: str) -> bool:
        """Whether all environments have an attribute or a method."""
        if self._singles is None:
            return hasattr(self.env.unwrapped, attr_name)
        # To ask for what is not there would end the processes of an `AsyncVectorEnv`
        return all(self._singles.call("has_wrapper_attr", attr_name))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Give an attribute of single environments, or of ``env`` itself if it has none.

        :param attr_name: the attribute; Gymnasium calls it if it is a method
        :param indices: of which environments, all of them if None
        :return: the value of each
        :raises AttributeError: if there is no such attribute
        """
        if attr_name == "render_mode":
            # A vector wrapper may change it
            values = [self.env.render_mode] * self.num_envs
        elif not self.has_attr(attr_name):
            raise AttributeError(f"`{attr_name}`: {self.env} has no such attribute")
        elif self._singles is None:
            values = [getattr(self.env.unwrapped, attr_name)] * self.num_envs
        else:
            values = list(self._singles.get_attr(attr_name))
        return [values[index] for index in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """
        Set an attribute of single environments.

        :param attr_name: the attribute
        :param value: the same for each
        :param indices: of which environments, all of them if None
        :raises AttributeError: if there are no single environments
        """
        if self._singles is None:
            raise AttributeError(f"`{attr_name}`: {self.env} has no single environments: set attributes of itself")
        values = [value] * self.num_envs if indices is None else self.get_attr(attr_name)
        for index in self._get_indices(indices):
            values[index] = value
        self._singles.set_attr(attr_name, values)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Call a method of all environments.

        :param method_name: the method
        :param method_args: its arguments
        :param indices: all of them, in any order, or None: Gymnasium cannot call only some
        :param method_kwargs: its keyword arguments
        :return: what each returns
        :raises ValueError: for ``indices`` that leave some out
        :raises AttributeError: if there are no single environments, or if they have no such method
        """
        if self._singles is None or not self.has_attr(method_name):
            raise AttributeError(f"`{method_name}`: {self.env} has no single environments with such a method")
        order = list(self._get_indices(indices))
        if sorted(order) != list(range(self.num_envs)):
            raise ArgumentError(f"`indices` must be None, got {indices!r}: Gymnasium calls a method of all environments.")
        results = self._singles.call(method_name, *method_args, **method_kwargs)
        return [results[index] for index in order]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        Whether the environments are wrapped.

        ``info["episode"]`` holds what ``Monitor`` would put there, and SB3 asks for ``Monitor`` to know whether it may rely on
        that.

        :param wrapper_class: the wrapper
        :param indices: which environments, all of them if None
        :return: True for ``Monitor``; for others, False where the environments are not in this process
        """
        envs = self._singles.envs if isinstance(self._singles, SyncVectorEnv) else None
        return [
            wrapper_class is Monitor or (envs is not None and is_wrapped(envs[index], wrapper_class))
            for index in self._get_indices(indices)
        ]


def rows(columns: Any, n_envs: int) -> list[dict[str, Any]]:
    """
    Turn Gymnasium's one dictionary of arrays into SB3's list of dictionaries.

    :param columns: ``{"x": array, "_x": mask, ...}``; ``x`` is of the environments where the mask is True, of all if there is
        none. A list of dictionaries, which ``DictInfoToList`` makes, is copied
    :param n_envs: how many there are
    :return: a dictionary for each
    """
    if not isinstance(columns, dict):
        return [dict(info) for info in columns]
    infos: list[dict[str, Any]] = [{} for _ in range(n_envs)]
    for key, column in columns.items():
        if key.startswith("_") and key[1:] in columns:
            continue
        values: Sequence[Any]
        if isinstance(column, dict):
            values = rows(column, n_envs)
        elif isinstance(column, np.ndarray) and column.shape[:1] == (n_envs,):
            values = column.tolist() if column.ndim == 1 else list(column)
        else:
            values = [column] * n_envs
        for info, value, is_there in zip(infos, values, columns.get(f"_{key}", [True] * n_envs), strict=True):
            if is_there:
                info[key] = value
    return infos


def row(observations: Any, index: int) -> Any:
    """The observation of one environment."""
    return mapped(operator.itemgetter(index), observations)

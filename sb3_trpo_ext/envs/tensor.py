"""Environments whose observations and rewards are tensors on a device, as a ``VecEnv`` of Stable-Baselines3."""

import operator
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_trpo_ext._checks import ArgumentError, check_integer, checked_actions
from sb3_trpo_ext._observations import mapped

#: One tensor of shape ``(n_envs, *shape)``, or a dict of those.
TensorObs: TypeAlias = th.Tensor | dict[str, th.Tensor]


class TensorStep(NamedTuple):
    """What a step of all environments led to."""

    #: Of shape ``(n_envs, *shape)``; where an episode has ended, the first one of the next.
    observations: TensorObs
    #: Of shape ``(n_envs,)``, as are the others.
    rewards: th.Tensor
    #: Whether an episode has come to its end, after which there is nothing to gain.
    terminated: th.Tensor
    #: Whether a time limit, or the like, has cut an episode off.
    truncated: th.Tensor
    #: Observations before any reset, so the last ones where an episode has ended. ``None`` if none is ever cut off.
    final_observations: TensorObs | None = None

    @property
    def dones(self) -> th.Tensor:
        """Whether an episode has ended, in either way."""
        return self.terminated | self.truncated


class TensorVecEnv(VecEnv):
    """
    Many environments that a device steps together.

    A subclass has :meth:`reset_tensors` and :meth:`step_tensors`. Environments that are done begin a new episode in the same
    step. :class:`~sb3_trpo_ext.TRPO` on the same device trains without taking anything to the host. For all else, such as
    other algorithms, SB3's wrappers and ``evaluate_policy``, it is an ordinary ``VecEnv`` of NumPy arrays.

    The tensors of a step may be overwritten by the next one.

    :param n_envs: the number of environments
    :param observation_space: of one environment
    :param action_space: of one environment
    :param device: where the tensors are
    """

    def __init__(
        self, n_envs: int, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], device: th.device | str
    ):
        # With an index such as in cuda:0, since the devices of tensors have one
        self.device = th.empty(0, device=device).device
        #: Return and length of the episode that each environment was in when it made its last step: shape ``(n_envs,)``.
        self.episode_returns = self.episode_lengths = th.zeros(0)
        #: The same without the episodes that ended with that step.
        self._returns = self._lengths = th.zeros(0)
        self._start = time.time()
        self._actions: np.ndarray | None = None
        self._needs_reset = True
        super().__init__(check_integer("n_envs", n_envs, 1), observation_space, action_space)

    # === What a subclass has ===

    @abstractmethod
    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        """
        Start a new episode in all environments.

        :param seed: of all random numbers from here on; ``None`` to go on with those that there are
        :return: the first observations
        """

    @abstractmethod
    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """
        Make a step in all environments.

        :param actions: on the device, of shape ``(n_envs, *action_space.shape)``; within the bounds of a Box
        :return: what it led to
        """

    def restart_tensors(self, where: th.Tensor) -> TensorObs:
        """
        Start a new episode in some environments, between two steps. A subclass need not have it.

        :param where: in which, on the device, of shape ``(n_envs,)`` and type bool
        :return: observations of all environments, the first ones of an episode there
        """
        raise NotImplementedError

    # === For a rollout on the device ===

    @property
    def can_restart(self) -> bool:
        """Whether there is a :meth:`restart_tensors`."""
        return type(self).restart_tensors is not TensorVecEnv.restart_tensors

    def restart(self, indices: list[int]) -> list[Any]:
        """
        Start a new episode in some environments, between two steps.

        :param indices: in which
        :return: the first observation of each, in arrays
        """
        where = th.zeros(self.num_envs, dtype=th.bool)
        where[indices] = True
        where = where.to(self.device)
        observations = self.restart_tensors(where)
        self._check_observations("observations", observations)
        self._returns, self._lengths = self._returns.masked_fill(where, 0), self._lengths.masked_fill(where, 0)
        arrays = self._on_host(observations)
        return [mapped(operator.itemgetter(index), arrays) for index in indices]

    def advance(self, actions: th.Tensor) -> TensorStep:
        """
        Make a step, check its shapes and devices, and count it in :attr:`episode_returns` and :attr:`episode_lengths`.

        :param actions: as for :meth:`step_tensors`
        :return: what it led to
        :raises ValueError: if what the environment returned is not what it must be
        :raises RuntimeError: before the first reset
        """
        if self._needs_reset:
            raise RuntimeError("call `reset` before the first step")
        step = TensorStep(*self.step_tensors(actions))
        self._check_observations("observations", step.observations)
        if step.final_observations is not None:
            self._check_observations("final_observations", step.final_observations)
        for name in ("rewards", "terminated", "truncated"):
            self._check(name, getattr(step, name), ())
        step = step._replace(terminated=step.terminated.bool(), truncated=step.truncated.bool())
        # New tensors: whoever has the ones before may keep them
        self.episode_returns = self._returns + step.rewards
        self.episode_lengths = self._lengths + 1
        dones = step.dones
        self._returns = self.episode_returns.masked_fill(dones, 0)
        self._lengths = self.episode_lengths.masked_fill(dones, 0)
        return step

    def infos_of(self, step: TensorStep, returns: th.Tensor, lengths: th.Tensor) -> list[dict[str, Any]]:
        """
        What SB3 has in ``infos``: how an episode ended, its last observation, its return and its length.

        :param step: what a step led to
        :param returns: :attr:`episode_returns` after that step
        :param lengths: :attr:`episode_lengths` after that step
        :return: a dict for each environment, empty where no episode has ended
        """
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = step.dones.nonzero().flatten()
        if len(ended) == 0:
            return infos
        last = step.observations if step.final_observations is None else step.final_observations
        rows = mapped(lambda tensor: tensor[ended].cpu().numpy(), last)
        elapsed = round(time.time() - self._start, 6)
        columns = (ended, step.truncated[ended] & ~step.terminated[ended], returns[ended], lengths[ended])
        numbers = zip(*(column.tolist() for column in columns), strict=True)
        for row, (index, is_cut_off, episode_return, length) in enumerate(numbers):
            infos[index] = {
                "TimeLimit.truncated": is_cut_off,
                "terminal_observation": mapped(operator.itemgetter(row), rows),
                "episode": {"r": round(episode_return, 6), "l": length, "t": elapsed},
            }
        return infos

    def _check_observations(self, name: str, value: Any) -> None:
        """Check observations, part by part if they are a dict."""
        space = self.observation_space
        if not isinstance(space, spaces.Dict):
            self._check(name, value, space.shape or ())
        elif not isinstance(value, dict) or value.keys() != space.spaces.keys():
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ArgumentError(f"`{name}` of {self._name} must be a dict with the keys {sorted(space.spaces)}, got {got}.")
        else:
            for key, part in space.items():
                self._check(f"{name}[{key!r}]", value[key], part.shape or ())

    def _check(self, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
        """Check one tensor, without waiting for the device."""
        expected = (self.num_envs, *shape)
        if not isinstance(tensor, th.Tensor):
            problem = f"be a tensor, got {type(tensor).__name__}"
        elif tensor.device != self.device:
            problem = f"be on the device {self.device}, as the environment says, got {tensor.device}"
        elif tensor.shape != expected:
            problem = f"have the shape {expected}, got {tuple(tensor.shape)}"
        else:
            return
        raise ArgumentError(f"`{name}` of {self._name} must {problem}.")

    @property
    def _name(self) -> str:
        """What error messages call it."""
        return type(self).__name__

    # === SB3's side ===

    def reset(self) -> VecEnvObs:
        """Start a new episode in all environments."""
        observations = self.reset_tensors(self._seeds[0])
        self._reset_seeds()
        self._check_observations("observations", observations)
        # Apple's GPUs have no double precision
        has_double = self.device.type != "mps"
        self._returns = th.zeros(self.num_envs, dtype=th.float64 if has_double else th.float32, device=self.device)
        self._lengths = th.zeros(self.num_envs, dtype=th.int64, device=self.device)
        self.episode_returns, self.episode_lengths = self._returns, self._lengths
        self._needs_reset = False
        return self._on_host(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """
        Keep the actions of a step.

        :param actions: of shape ``(n_envs, *action_space.shape)``
        :raises ValueError: if they have another shape
        """
        self._actions = checked_actions(actions, (self.num_envs, *(self.action_space.shape or ())))

    def step_wait(self) -> VecEnvStepReturn:
        """Make the step."""
        step = self.advance(th.as_tensor(self._actions, device=self.device))
        infos = self.infos_of(step, self.episode_returns, self.episode_lengths)
        rewards = step.rewards.cpu().numpy().astype(np.float32)
        return self._on_host(step.observations), rewards, step.dones.cpu().numpy(), infos

    def _on_host(self, observations: TensorObs) -> VecEnvObs:
        """Observations as arrays of their own."""
        space, parts = self.observation_space, observations
        if isinstance(space, spaces.Dict):
            assert isinstance(parts, dict)
            return {key: np.array(parts[key].cpu().numpy(), dtype=part.dtype) for key, part in space.items()}
        assert isinstance(parts, th.Tensor)
        return np.array(parts.cpu().numpy(), dtype=space.dtype)

    def close(self) -> None:
        """Do nothing: a subclass may have something to end."""

    # === What SB3 asks single environments for: there are none ===

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Give an attribute that all environments have in common, which is one of this object.

        :param attr_name: such as ``action_space``, ``render_mode`` or ``spec``
        :param indices: of which environments, all of them if None
        :return: the same value for each
        :raises AttributeError: if there is no such attribute
        """
        value = None if attr_name == "render_mode" else getattr(self, attr_name)
        return [value] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refuse to set an attribute of single environments."""
        raise AttributeError(f"`{attr_name}`: {self._name} has no single environments: set attributes of itself")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refuse to call a method of single environments."""
        raise AttributeError(f"`{method_name}`: {self._name} has no single environments: call methods of itself")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        Whether the environments are wrapped.

        There are no wrappers, but ``info["episode"]`` holds what ``Monitor`` would put there, and SB3 asks for ``Monitor`` to
        know whether it may rely on that.

        :param wrapper_class: the wrapper
        :param indices: which environments, all of them if None
        :return: True for ``Monitor``, False for everything else
        """
        return [wrapper_class is Monitor] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[np.ndarray | None]:
        """No pictures."""
        return [None] * self.num_envs

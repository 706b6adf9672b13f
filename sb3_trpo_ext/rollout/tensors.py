"""A rollout buffer of tensors on the device of the policy."""

import functools
from collections.abc import Generator
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples

from sb3_trpo_ext._observations import mapped, parts_of
from sb3_trpo_ext.envs.tensor import TensorObs, TensorStep
from sb3_trpo_ext.update.batch import in_order, take


class TensorRolloutBuffer(RolloutBuffer):
    """
    SB3's rollout buffer with a tensor for each array: the same names, shapes ``(n_steps, n_envs, ...)`` and types.

    The memory is allocated once. It lies environment by environment, so that a batch of all samples, in the order in which
    SB3's ``swap_and_flatten`` has them, is a view of it.

    Arguments are those of SB3's buffer, whose subclass for Dict observations this is too.
    """

    observations: Any
    actions: Any
    rewards: Any
    advantages: Any
    returns: Any
    episode_starts: Any
    log_probs: Any
    values: Any
    #: Rewards as the environment gave them.
    raw_rewards: th.Tensor
    #: Whether an episode ended with that step, and whether it was truncated and not terminated.
    dones: th.Tensor
    truncated: th.Tensor
    #: Observations after each step, before ended episodes are reset; ``None`` if none was ever cut off.
    final_observations: TensorObs | None = None

    def _tensor(self, shape: tuple[int, ...] = (), dtype: th.dtype = th.float32) -> th.Tensor:
        """Zeros of the shape ``(n_steps, n_envs, *shape)``."""
        return th.zeros(self.n_envs, self.buffer_size, *shape, dtype=dtype, device=self.device).transpose(0, 1)

    def _allocate(self) -> None:
        """Make the tensors."""
        self.observations = self._like_observations()
        self.actions = self._tensor((self.action_dim,), _dtype_of(self.action_space))
        for name in ("rewards", "raw_rewards", "returns", "episode_starts", "values", "log_probs", "advantages"):
            setattr(self, name, self._tensor())
        self.dones, self.truncated = self._tensor(dtype=th.bool), self._tensor(dtype=th.bool)

    def _like_observations(self) -> TensorObs:
        """Zeros for the observations of all steps."""
        space = self.observation_space
        if isinstance(space, spaces.Dict):
            return {key: self._tensor(self.obs_shape[key], _dtype_of(part)) for key, part in space.items()}  # type: ignore[call-overload]
        return self._tensor(self.obs_shape, _dtype_of(space))

    def reset(self) -> None:
        """Begin with the first step again, in the same memory."""
        if not hasattr(self, "raw_rewards"):
            self._allocate()
        # A callback may look at what is not there yet, which is zero in SB3's
        for tensor in (self.rewards, self.values, self.log_probs, self.advantages, self.returns):
            tensor.zero_()
        self.pos, self.full = 0, False

    def store_before(self, observations: TensorObs, actions: th.Tensor, episode_starts: th.Tensor) -> None:
        """
        Write what comes before a step of the environments.

        :param observations: shape ``(n_envs, *shape)``, as is all else
        :param actions: as the policy chose them
        :param episode_starts: whether an episode began with this step
        """
        _write(self.observations, self.pos, observations)
        self.actions[self.pos].copy_(actions.reshape(self.n_envs, self.action_dim))
        self.episode_starts[self.pos].copy_(episode_starts)

    def store_after(self, step: TensorStep) -> None:
        """
        Write what a step of the environments led to, and go on to the next one.

        :param step: as the environment returned it
        """
        self.raw_rewards[self.pos].copy_(step.rewards)
        self.dones[self.pos].copy_(step.dones)
        self.truncated[self.pos].copy_(step.truncated & ~step.terminated)
        if step.final_observations is not None:
            if self.final_observations is None:
                self.final_observations = self._like_observations()
            _write(self.final_observations, self.pos, step.final_observations)
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Refuse arrays: raises a ``NotImplementedError``."""
        raise NotImplementedError("TensorRolloutBuffer takes tensors, by `store_before` and `store_after`")

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: Any) -> None:
        """
        Compute advantages and returns as SB3 does.

        :param last_values: of the observations after the last step
        :param dones: whether an episode ended with the last step, shape ``(n_envs,)``
        """
        self.advantages.copy_(self.advantages_for(self.gae_lambda, last_values, dones))
        th.add(self.advantages, self.values, out=self.returns)

    def advantages_for(self, gae_lambda: float, last_values: th.Tensor, dones: Any) -> th.Tensor:
        """Advantages for a lambda, shape ``(n_steps, n_envs)``."""
        ends = th.as_tensor(dones, device=self.device)
        columns = self.rewards, self.values, self.episode_starts, last_values.flatten(), ends
        return advantages_of(*columns, gamma=self.gamma, gae_lambda=gae_lambda)

    def get(self, batch_size: int | None = None) -> Generator[RolloutBufferSamples, None, None]:
        """
        All samples in minibatches, in a random order.

        :param batch_size: samples in a minibatch, all of them if ``None``
        """
        assert self.full
        n_samples = self.buffer_size * self.n_envs
        for index in th.randperm(n_samples, device=self.device).split(batch_size or n_samples):
            columns = (self.actions.float(), self.values, self.log_probs, self.advantages, self.returns)
            observations = take(mapped(functools.partial(in_order, self), self.observations), index)
            kind: Any = DictRolloutBufferSamples if isinstance(observations, dict) else RolloutBufferSamples
            yield kind(observations, *(in_order(self, column)[index] for column in columns))


def advantages_of(
    rewards: th.Tensor,
    values: th.Tensor,
    episode_starts: th.Tensor,
    last_values: th.Tensor,
    dones: th.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> th.Tensor:
    """
    Generalized advantage estimates (Schulman et al. 2016, equation 16), by the operations of SB3's ``RolloutBuffer``.

    :param rewards: shape ``(n_steps, n_envs)``, with the discounted value of what came after an episode that was cut off
    :param values: of the observations before each step, the same shape
    :param episode_starts: 1 where an episode began with that step, the same shape
    :param last_values: of the observations after the last step, shape ``(n_envs,)``
    :param dones: whether an episode ended with the last step, shape ``(n_envs,)``
    :param gamma: discount factor
    :param gae_lambda: from 0 to 1
    :return: shape ``(n_steps, n_envs)``
    """
    continues = 1.0 - th.cat([episode_starts[1:], dones[None].to(values.dtype)])
    next_values = th.cat([values[1:], last_values[None]])
    deltas = rewards + gamma * next_values * continues - values
    decays = gamma * gae_lambda * continues
    advantages = th.empty_like(deltas)
    advantage = th.zeros_like(last_values)
    for step in reversed(range(len(deltas))):
        advantage = deltas[step] + decays[step] * advantage
        advantages[step] = advantage
    return advantages


def _write(stored: Any, step: int, observations: Any) -> None:
    """Write the observations of a step."""
    given = parts_of(observations)
    for key, tensor in parts_of(stored).items():
        tensor[step].copy_(given[key].reshape(tensor[step].shape))


def _dtype_of(space: spaces.Space[Any]) -> th.dtype:
    """PyTorch's dtype for a space."""
    dtype = getattr(th, str(space.dtype), None)
    # Types that PyTorch lacks, such as uint16, fit into this one
    return dtype if isinstance(dtype, th.dtype) else th.int64

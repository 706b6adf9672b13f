"""Targets of the value function with a lambda of their own."""

import copy
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_trpo_ext.rollout.tensors import TensorRolloutBuffer


def by_step(flat: Any, shape: tuple[int, ...]) -> Any:
    """Undo SB3's ``swap_and_flatten``, which goes environment by environment: the shape ``(n_steps, n_envs)`` again."""
    return flat.reshape(shape[::-1]).T


def ending(model: Any) -> tuple[th.Tensor, np.ndarray]:
    """How a rollout has ended: the values after its last step, and whether episodes ended in it."""
    return model._last_values(), np.asarray(model._last_episode_starts)


@th.no_grad()
def set_returns_(model: Any, buffer: RolloutBuffer, vf_lambda: float | None) -> None:
    """
    Replace the returns of a full buffer by TD(lambda) returns, and leave its advantages.

    A buffer whose class computes returns in its own way is left alone.

    :param model: after the rollout
    :param buffer: full, flattened by ``get`` or not
    :param vf_lambda: from 0 (one reward and the next value) to 1 (rewards alone); ``None`` to leave the returns as they are
    """
    if vf_lambda is None:
        return
    if isinstance(buffer, TensorRolloutBuffer):
        th.add(buffer.advantages_for(vf_lambda, *ending(model)), buffer.values, out=buffer.returns)
        return
    own = RolloutBuffer.compute_returns_and_advantage
    if getattr(type(buffer), "compute_returns_and_advantage", None) is not own or vf_lambda == buffer.gae_lambda:
        return
    scratch = copy.copy(buffer)
    scratch.gae_lambda = vf_lambda
    scratch.advantages = np.zeros_like(buffer.rewards)
    for name in ("values", "episode_starts"):
        # What `get` has flattened: in sb3-contrib's buffers, more than in SB3's
        array, shape = getattr(buffer, name), buffer.rewards.shape
        setattr(scratch, name, array if array.shape == shape else by_step(array, shape))
    own(scratch, *ending(model))
    buffer.returns = buffer.swap_and_flatten(scratch.returns) if buffer.generator_ready else scratch.returns

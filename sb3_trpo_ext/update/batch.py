"""One rollout as one batch."""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_trpo_ext._checks import ArgumentError, is_known
from sb3_trpo_ext._observations import mapped
from sb3_trpo_ext.optim.devices import sent_to
from sb3_trpo_ext.parallel.moments import all_moments
from sb3_trpo_ext.parallel.reductions import all_max


class Batch(NamedTuple):
    """One rollout, flattened to ``n_batch`` samples."""

    observations: PyTorchObs
    #: Shape ``(n_batch, n_actions)``, or ``(n_batch,)`` for Discrete.
    actions: th.Tensor
    #: Log-probabilities at the time of the rollout, shape ``(n_batch,)``.
    old_log_prob: th.Tensor
    #: Shape ``(n_batch,)``.
    advantages: th.Tensor
    #: Targets of the value function, shape ``(n_batch,)``.
    returns: th.Tensor
    #: Values at the time of the rollout, shape ``(n_batch,)``.
    old_values: th.Tensor

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return self.advantages.shape[0]


def rollout_batch(
    buffer: RolloutBuffer, is_discrete: bool, normalize_advantage: bool, clip_advantage: float | None = None
) -> Batch:
    """
    The whole rollout in a full buffer: in the order of time within each environment, unless it has a ``get`` of its own.

    :raises ValueError: if the buffer is not full
    """
    if not buffer.full:
        raise ArgumentError(
            f"The rollout buffer has {buffer.pos} of {buffer.buffer_size} steps. If `n_steps` was changed after the model was "
            "made, make a new buffer by `model._setup_model()`, or load the model with the new `n_steps`; if a callback has "
            "called `reset` of the buffer, leave it out."
        )
    data = _in_order(buffer) if is_known(type(buffer).get) else next(iter(buffer.get(buffer.buffer_size * buffer.n_envs)))
    advantages = _normalized(data.advantages) if normalize_advantage else data.advantages
    if clip_advantage is not None:
        # Normalized again: the mean of what is left is a baseline at no cost, and the objective keeps its unit
        advantages = _normalized(advantages.clamp(-clip_advantage, clip_advantage))
    return Batch(
        # Once, instead of at each of the many forward passes of an update
        observations=mapped(lambda tensor: tensor.float() if tensor.dtype == th.float64 else tensor, data.observations),
        actions=data.actions.long().flatten() if is_discrete else data.actions,
        old_log_prob=data.old_log_prob,
        advantages=advantages,
        returns=data.returns,
        old_values=data.old_values,
    )


def in_order(buffer: RolloutBuffer, array: np.ndarray | th.Tensor) -> th.Tensor:
    """An array of SB3's own buffer, sample by sample: environment by environment, in the order of time."""
    if isinstance(array, th.Tensor):
        return array.transpose(0, 1).flatten(0, 1)
    # A callback that has called `get` has left flat arrays
    return sent_to(buffer.device, th.as_tensor(array if buffer.generator_ready else buffer.swap_and_flatten(array)))


def _in_order(buffer: RolloutBuffer) -> Batch:
    """The contents of SB3's own buffer as they are: its ``get`` would shuffle them."""
    tensor = functools.partial(in_order, buffer)
    return Batch(
        observations=mapped(tensor, buffer.observations),
        # As in SB3, which needs it for MultiBinary
        actions=tensor(buffer.actions).float(),
        old_log_prob=tensor(buffer.log_probs).flatten(),
        advantages=tensor(buffer.advantages).flatten(),
        returns=tensor(buffer.returns).flatten(),
        old_values=tensor(buffer.values).flatten(),
    )


def take(observations: PyTorchObs, index: Any) -> PyTorchObs:
    """Select samples of a batch of observations."""
    taken: PyTorchObs = mapped(lambda tensor: tensor[index], observations)
    return taken


def numbers_per_sample(observations: PyTorchObs) -> int:
    """How many numbers an observation has, at least 1."""
    tensors = observations.values() if isinstance(observations, dict) else [observations]
    return max(sum(tensor[0].numel() for tensor in tensors), 1)


def _normalized(advantages: th.Tensor) -> th.Tensor:
    """
    Shift and scale advantages to mean zero and standard deviation one, over the samples of all processes.

    Advantages that are all the same become zero.

    :param advantages: shape ``(n_batch,)``, at least two
    :return: the same shape
    """
    mean, std = all_moments(advantages)
    # The mean of equal numbers is off by a rounding error, which the division would blow up to a full step in a random
    # direction. A product and not `th.where`, which would turn a NaN into zero
    is_more_than_rounding = std > 10 * th.finfo(advantages.dtype).eps * all_max(advantages.abs().max())
    return (advantages - mean) / (std + 1e-8) * is_more_than_rounding

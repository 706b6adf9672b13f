"""One rollout as one batch."""

import copy
import functools
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import PyTorchObs

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
    The whole rollout in a full buffer, in the order of time within each environment.

    :param buffer: SB3's or one with its methods
    :param is_discrete: whether an action is one whole number
    :param normalize_advantage: whether to shift and scale the advantages
    :param clip_advantage: at how many standard deviations to clip the normalised advantages; ``None`` for no limit
    :return: the batch, to be read only: it may share the buffer's memory; what is float64 in the buffer's observations is
        float32 in it
    """
    is_stock = type(buffer) in (RolloutBuffer, DictRolloutBuffer)
    device = buffer.device
    # Asking for one minibatch makes the buffer flatten its arrays; its samples come in random order, and we want the order of
    # time: thinning the Fisher matrix then takes every so many-th step of each environment
    try:
        # For that one sample nobody has to wait for an accelerator
        buffer.device = th.device("cpu") if is_stock else device
        next(iter(buffer.get(batch_size=1)))
    finally:
        buffer.device = device
    # A slice, and tensors that share it, save SB3's own buffers two copies of the observations on the CPU
    every: Any = slice(None) if is_stock else np.arange(buffer.buffer_size * buffer.n_envs)
    if is_stock:
        buffer = copy.copy(buffer)
        buffer.to_torch = functools.partial(_to_torch, buffer.device)  # type: ignore[method-assign]
    data = buffer._get_samples(every)
    advantages = _normalised(data.advantages) if normalize_advantage else data.advantages
    if clip_advantage is not None:
        # Normalised again: the mean of what is left is a baseline that costs nothing, and the objective keeps its unit
        advantages = _normalised(advantages.clamp(-clip_advantage, clip_advantage))
    return Batch(
        observations=_as_float32(data.observations),
        actions=data.actions.long().flatten() if is_discrete else data.actions,
        old_log_prob=data.old_log_prob,
        advantages=advantages,
        returns=data.returns,
        old_values=data.old_values,
    )


def _to_torch(device: th.device, array: np.ndarray) -> th.Tensor:
    """
    Bring an array of a rollout to where the policy is.

    :param device: the policy's
    :param array: of the buffer
    :return: shares the array's memory on the CPU; on a GPU it is on its way there
    """
    return sent_to(device, th.as_tensor(array))


def take(observations: PyTorchObs, index: th.Tensor | slice) -> PyTorchObs:
    """
    Select samples of a batch of observations.

    :param observations: a tensor or a dict of tensors with first axis ``n_batch``
    :param index: indices, or a slice (then the result is a view)
    :return: the selected samples, in the same form
    """
    if isinstance(observations, dict):
        return {key: value[index] for key, value in observations.items()}
    return observations[index]


def numbers_per_sample(observations: PyTorchObs) -> int:
    """
    How many numbers an observation has.

    :param observations: a tensor or a dict of tensors with first axis ``n_batch``
    :return: the count, at least 1
    """
    tensors = observations.values() if isinstance(observations, dict) else [observations]
    return max(sum(tensor[0].numel() for tensor in tensors), 1)


def _normalised(advantages: th.Tensor) -> th.Tensor:
    """
    Shift and scale advantages to mean zero and standard deviation one, over the samples of all processes.

    Advantages that are all the same become zero.

    :param advantages: shape ``(n_batch,)``, at least two
    :return: the same shape
    """
    mean, std = all_moments(advantages)
    # The mean of equal numbers is off by a rounding error, which the division would blow up to a full step in no direction at
    # all. A product and not `th.where`, which would turn a NaN into zero
    is_more_than_rounding = std > 10 * th.finfo(advantages.dtype).eps * all_max(advantages.abs().max())
    return (advantages - mean) / (std + 1e-8) * is_more_than_rounding


def _as_float32(observations: PyTorchObs) -> PyTorchObs:
    """
    Convert float64 observations once, instead of at each of the many forward passes of an update.

    :param observations: a tensor or a dict of tensors
    :return: the same with float32 for float64
    """
    if isinstance(observations, dict):
        return {key: _as_float32(value) for key, value in observations.items()}  # type: ignore[misc]
    return observations.float() if observations.dtype == th.float64 else observations

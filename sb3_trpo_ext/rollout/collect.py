"""Fill a rollout buffer: by the lean loop of :mod:`sb3_trpo_ext.rollout.lean` where it gives the same as SB3's, else by SB3's.

Errors say what the environment did wrong. A class that always wants SB3's loop says
``collect_rollouts = OnPolicyAlgorithm.collect_rollouts``; its rewards are not scaled then, and its returns have the lambda of
the advantages.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_trpo_ext._checks import is_known
from sb3_trpo_ext._observations import parts_of
from sb3_trpo_ext.rollout.actors import is_deferrable_policy
from sb3_trpo_ext.rollout.errors import explain_dead_worker, explain_observation
from sb3_trpo_ext.rollout.lean import LeanRollout
from sb3_trpo_ext.rollout.normalization import RecordedRewards
from sb3_trpo_ext.rollout.snapshot import Snapshot
from sb3_trpo_ext.rollout.tensors import TensorRolloutBuffer


def collect_rollouts(
    model: OnPolicyAlgorithm,
    env: VecEnv,
    callback: BaseCallback,
    rollout_buffer: RolloutBuffer,
    n_rollout_steps: int,
    before_end: Callable[[RolloutBuffer, Snapshot], None],
    rewards: RecordedRewards | None,
    *,
    rollout_class: Callable[..., LeanRollout] | None = None,
    loop: Callable[..., bool] = OnPolicyAlgorithm.collect_rollouts,
) -> bool:
    """
    Fill the buffer with experience of the current policy.

    :param model: whose policy acts
    :param env: the training environment
    :param callback: called at each step, and at the beginning and the end
    :param rollout_buffer: buffer to fill
    :param n_rollout_steps: number of steps to collect per environment
    :param before_end: gets the full buffer and the policy that acted first, before the callback's ``on_rollout_end``
    :param rewards: what the rewards go through on their way to the buffer; ``None`` if they are left alone
    :param rollout_class: collects a rollout whose values can wait; ``None`` for the one of :mod:`sb3_trpo_ext.rollout.lean`
    :param loop: collects any other, with the arguments of SB3's
    :return: False if the callback ended the training
    :raises ValueError: if the environment returned a NaN that the policy cannot digest, or an observation of a wrong shape
    :raises RuntimeError: if a process of the environment has died
    """
    if isinstance(rollout_buffer, TensorRolloutBuffer):
        assert rollout_class is not None
        return rollout_class(model, env, callback, rollout_buffer).collect(n_rollout_steps, before_end)
    try:
        if is_deferrable(model, rollout_buffer):
            rollout = (rollout_class or LeanRollout)(model, env, callback, rollout_buffer, rewards)
            return rollout.collect(n_rollout_steps, before_end)
        snapshot = Snapshot(model.policy)
        listener: Any = _Listener(callback, model.env, rewards, functools.partial(before_end, rollout_buffer, snapshot))
        shown: Any = env if rewards is None else _Recorded(env, rewards)
        with snapshot.watching():
            return loop(model, shown, listener, rollout_buffer, n_rollout_steps)
    except (ValueError, RuntimeError) as error:
        explain_observation(model, env, error)
        raise
    except (EOFError, ConnectionError) as error:
        explain_dead_worker(model, env, error)
        raise


def is_deferrable(model: OnPolicyAlgorithm, buffer: RolloutBuffer) -> bool:
    """
    Whether values and log-probabilities can be computed at the end of the rollout, from what is in the buffer.

    The buffer must store things the way SB3's do, and lose nothing that the networks see; the policy must give the same
    numbers whenever it is asked (:func:`~sb3_trpo_ext.rollout.actors.is_deferrable_policy`).

    :param model: before the rollout
    :param buffer: to be filled
    :return: false if SB3's loop has to be used
    """
    if not is_known(type(buffer)):
        return False
    observations = parts_of(model._last_obs)
    for key, stored in parts_of(buffer.observations).items():
        # SB3's policies compute in float32, whatever comes
        is_rounded_later = observations[key].dtype == np.float64 and stored.dtype == np.float32
        if not (is_rounded_later or np.can_cast(observations[key].dtype, stored.dtype)):
            return False
    return is_deferrable_policy(model.policy)


class _Recorded:
    """
    The environments of one rollout, whose rewards are recorded.

    No ``VecEnvWrapper``, which would ask the environments for attributes, and call ``step_wait`` of those that have only a
    ``step``.

    :param env: the environments
    :param rewards: records their rewards
    """

    def __init__(self, env: VecEnv, rewards: RecordedRewards):
        self._env, self._rewards = env, rewards

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def step(self, actions: np.ndarray) -> VecEnvStepReturn:
        """Make a step."""
        observations, rewards, dones, infos = self._env.step(actions)
        return observations, self._rewards.seen(rewards, dones, infos), dones, infos


class _Listener:
    """
    A callback, and what is done around it in SB3's loop.

    :param callback: the callback
    :param env: what it is to find under the locals: the environment without what is wrapped around it for one rollout
    :param recorded: what rewards go through after its ``on_step``; ``None`` if they are left alone
    :param before_end: what is done before its ``on_rollout_end``
    """

    #: Of the present step: the loop's own, and those that the callback may change.
    _rewards: np.ndarray
    _shown: np.ndarray

    def __init__(
        self,
        callback: BaseCallback,
        env: VecEnv | None,
        recorded: RecordedRewards | None,
        before_end: Callable[[], None],
    ):
        self._callback, self._env, self._recorded, self._before_end = callback, env, recorded, before_end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)

    def update_locals(self, locals_: dict[str, Any]) -> None:
        """The local variables of SB3's loop."""
        shown = {**locals_, "env": self._env}
        if self._recorded is not None:
            # A copy, which the callback may keep: the loop's own will be scaled in place
            self._rewards, self._shown = locals_["rewards"], locals_["rewards"].copy()
            shown["rewards"] = self._shown
        self._callback.update_locals(shown)

    def on_step(self) -> bool:
        """A step is over."""
        goes_on = self._callback.on_step()
        if self._recorded is not None:
            self._rewards[:] = self._recorded.scaled(self._shown)
        return goes_on

    def on_rollout_end(self) -> None:
        """The rollout is full."""
        self._before_end()
        self._callback.on_rollout_end()

"""Rollouts that never leave the device of the policy: for a :class:`~sb3_trpo_ext.envs.tensor.TensorVecEnv` that is there.

They fill a :class:`~sb3_trpo_ext.rollout.tensors.TensorRolloutBuffer` with the numbers that SB3's loop would get from the
NumPy side of the same environment. What differs from :mod:`sb3_trpo_ext.rollout.lean`:

1. What callbacks find under SB3's names are tensors. ``rewards`` are as the environment gave them until the rollout is over,
   and ``infos`` is made when it is read.
2. Episodes that were cut off are worth what the policy says at the end of the rollout.
3. A NaN in observations or rewards is noticed at the end of the rollout.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_trpo_ext._observations import mapped, parts_of
from sb3_trpo_ext.envs.tensor import TensorObs, TensorStep, TensorVecEnv
from sb3_trpo_ext.rollout.actors import Actor, is_deferrable_policy
from sb3_trpo_ext.rollout.errors import INTACT
from sb3_trpo_ext.rollout.lazy import callbacks_in, lazy_class, lazy_pair
from sb3_trpo_ext.rollout.lean import LeanRollout
from sb3_trpo_ext.rollout.tensors import TensorRolloutBuffer
from sb3_trpo_ext.update.batch import take
from sb3_trpo_ext.update.normalization import CLIP
from sb3_trpo_ext.update.settings import no_argument_checks

#: Samples that go through the policy at a time, at most.
_CHUNK = 2**16


class TensorRollout(LeanRollout):
    """
    One rollout.

    :param model: whose policy acts
    :param env: the training environment, on the device of the policy
    :param callback: called at each step
    :param buffer: to be filled
    :param scale: what rewards are divided by; ``None`` to leave them alone
    """

    env: TensorVecEnv
    buffer: TensorRolloutBuffer

    def __init__(
        self,
        model: OnPolicyAlgorithm,
        env: TensorVecEnv,
        callback: BaseCallback,
        buffer: TensorRolloutBuffer,
        scale: float | None,
    ):
        super().__init__(model, env, callback, buffer)
        self._scale = scale
        #: Returns and lengths of episodes after each step.
        self._episodes: list[tuple[th.Tensor, th.Tensor]] = []
        # This callback sums `dones` by NumPy, which takes no tensors
        self._counts_episodes = any(isinstance(part, StopTrainingOnMaxEpisodes) for part in callbacks_in(callback))
        self._stock_class = type(buffer)
        self._class_in_callbacks: Any = lazy_class(type(buffer), self._evaluate) if self._is_watched else type(buffer)
        space = model.action_space
        if isinstance(space, spaces.Box):
            self._low, self._high = (th.as_tensor(bound, device=env.device) for bound in (space.low, space.high))

    def _run(self, n_rollout_steps: int) -> bool:
        """Run the environment; returns False if the callback ended the training."""
        model, device = self.model, self.env.device
        observations = mapped(lambda array: th.as_tensor(array, device=device), model._last_obs)
        starts = th.as_tensor(model._last_episode_starts, device=device)
        try:
            # The checks would make the host wait in each step: finiteness is checked below
            with no_argument_checks:
                for n_steps in range(n_rollout_steps):
                    step = self._step(n_steps, observations, starts)
                    if step is None:
                        return False
                    observations, starts = step.observations, step.dones
        except (ValueError, RuntimeError):
            # Some policies raise one for a NaN
            self._check_finite(observations)
            raise
        finally:
            # For saving, and for the next rollout
            model._last_obs = mapped(lambda tensor: tensor.cpu().numpy().copy(), observations)
            model._last_episode_starts = starts.cpu().numpy()
        self._check_finite(observations)
        self._report_episodes()
        return True

    def _step(self, n_steps: int, observations: TensorObs, starts: th.Tensor) -> TensorStep | None:
        """Make and store one step; returns ``None`` if the callback ended the training."""
        model, env, callback, buffer, scope = self.model, self.env, self.callback, self.buffer, self._scope
        if model.sde_sample_freq > 0 and n_steps % model.sde_sample_freq == 0:
            self._reset_noise()
        if self._is_eager:
            with th.no_grad():
                actions, values, log_probs = self.policy(observations)
        else:
            actions = self._actor.act_on_device(observations)
        # Before the environment may write over the observations
        buffer.store_before(observations, actions, starts)
        if self._is_watched:
            observations = mapped(th.clone, observations)
        clipped_actions = self._clipped(actions)
        step = env.advance(clipped_actions)
        model.num_timesteps += env.num_envs
        episodes = env.episode_returns, env.episode_lengths
        if self._is_watched:
            if not self._is_eager:
                evaluate = functools.partial(self._evaluate_step, n_steps, observations)
                values, log_probs = lazy_pair(evaluate, env.num_envs, model.device)
                self._actor.show_distribution()
            scope["values"], scope["log_probs"] = values, log_probs
        # RL-Zoo has a callback that looks at these
        scope["infos"] = LazyList(functools.partial(env.infos_of, step, *episodes), env.num_envs)
        scope.update(n_steps=n_steps, obs_tensor=observations, actions=actions, clipped_actions=clipped_actions)
        scope.update(new_obs=step.observations, rewards=step.rewards)
        scope["dones"] = step.dones.cpu().numpy() if self._counts_episodes else step.dones
        callback.update_locals(scope)
        buffer.__class__ = self._class_in_callbacks
        try:
            goes_on = callback.on_step()
        finally:
            buffer.__class__ = self._stock_class
        if not goes_on:
            return None
        if self._is_eager:
            buffer.values[n_steps], buffer.log_probs[n_steps] = values.flatten(), log_probs.flatten()
        buffer.store_after(step)
        self._episodes.append(episodes)
        self._n_stored += 1
        if self._is_eager:
            self._n_evaluated = self._n_stored
        if not self._snapshot.is_of(model.policy, in_detail=self._is_watched):
            self._evaluate()
            self._follow_policy()
        return step

    def _follow_policy(self) -> None:
        """Let the policy act as it is now."""
        # Then its own `forward` acts: asked later, it may give other answers
        self._is_eager = not is_deferrable_policy(self.model.policy)
        super()._follow_policy()

    def _make_actor(self) -> Actor:
        """How the policy acts as it is now."""
        return Actor(self.policy) if self._is_eager else super()._make_actor()

    def _clipped(self, actions: Any) -> Any:
        """Actions as the environment gets them."""
        if not isinstance(self.policy.action_space, spaces.Box):
            return actions
        if self.policy.squash_output:
            return self._low + 0.5 * (actions + 1.0) * (self._high - self._low)
        return actions.clamp(self._low, self._high)

    def _check_finite(self, observations: TensorObs) -> None:
        """Raise a ``ValueError`` if the environment returned a NaN or an infinity in this rollout."""
        n_steps = self._n_stored
        named = {"rewards": [self.buffer.raw_rewards[:n_steps]]}
        for key, stored in parts_of(self.buffer.observations).items():
            if stored.is_floating_point():
                named[f"observation {key!r}" if key else "observations"] = [stored[:n_steps], parts_of(observations)[key]]
        are_finite = th.stack([th.stack([part.isfinite().all() for part in parts]).all() for parts in named.values()])
        wrong = [name for name, is_finite in zip(named, are_finite.tolist(), strict=True) if not is_finite]
        if wrong:
            raise ValueError(
                f"The environment returned a NaN or an infinity in its {' and '.join(wrong)} before "
                f"{self.model.num_timesteps} timesteps. {INTACT}"
            )

    def _report_episodes(self) -> None:
        """Let SB3's log know the last episodes of this rollout."""
        buffer, info_buffer = self.buffer, self.model.ep_info_buffer
        assert info_buffer is not None and info_buffer.maxlen is not None
        last = buffer.dones.nonzero()[-info_buffer.maxlen :]
        steps, indices = last.unbind(1)
        returns, lengths = (th.stack(parts)[steps, indices].tolist() for parts in zip(*self._episodes, strict=True))
        elapsed = round(time.time() - self.model.start_time / 1e9, 6)
        episodes = [{"r": r, "l": length, "t": elapsed} for r, length in zip(returns, lengths, strict=True)]
        info_buffer.extend(episodes)
        self._scope["finished_episodes"] = episodes

    def _steps_at_a_time(self, n_numbers: int) -> int:
        """How many steps are evaluated in one batch."""
        # With small observations, the activations take more memory
        return max(1, min(super()._steps_at_a_time(n_numbers), _CHUNK // self.env.num_envs))

    def _sent(self, observations: Any) -> Any:
        """Observations are on the device."""
        return observations

    def _finish(self) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Compute rewards and advantages; returns the values after the last step, and its log-probabilities and rewards."""
        model, buffer, scope = self.model, self.buffer, self._scope
        set_rewards_(model, buffer, self._scale)
        with th.no_grad():
            values = self.policy.predict_values(scope["new_obs"])
        buffer.compute_returns_and_advantage(values, scope["dones"])
        return values, buffer.log_probs[-1].clone(), buffer.rewards[-1].clone()


@th.no_grad()
def set_rewards_(model: Any, buffer: TensorRolloutBuffer, scale: float | None) -> None:
    """
    Scale the rewards of a rollout, and add what episodes that were cut off are still worth.

    :param model: after the rollout
    :param buffer: with the rewards as they came
    :param scale: what they are divided by; ``None`` to leave them alone
    """
    raw = buffer.raw_rewards
    buffer.rewards.copy_(raw if scale is None else (raw / scale).clamp(-CLIP, CLIP))
    if buffer.final_observations is None:
        return
    for where in buffer.truncated.nonzero().split(_CHUNK):
        steps, indices = where.unbind(1)
        observations: Any = take(buffer.final_observations, (steps, indices))
        if isinstance(model.observation_space, spaces.Discrete):
            observations = observations.flatten()
        buffer.rewards[steps, indices] += model.gamma * model.policy.predict_values(observations).flatten()


class LazyList(Sequence[Any]):
    """
    A list that is made when something in it is read.

    :param make: returns it
    :param length: of it
    """

    def __init__(self, make: Callable[[], list[Any]], length: int):
        self._make = functools.cache(make)
        self._length = length

    def __getitem__(self, index: Any) -> Any:
        return self._make()[index]

    def __len__(self) -> int:
        return self._length

"""A rollout that does only the actor's work in each step, and fills SB3's buffer as SB3's own loop would.

Values, log-probabilities and the bootstrap values of truncated episodes are not needed before the rollout is over: they are
computed in batches at its end, at a small part of the cost of a network call per step.

Differences from ``OnPolicyAlgorithm.collect_rollouts``:

1. While callbacks run in ``on_step``, ``locals["values"]``, ``locals["log_probs"]`` and what the buffer has of values,
   log-probabilities and bootstrapped rewards are computed when the callback reads them (:mod:`sb3_trpo_ext.rollout.lazy`).
   What a callback changes in the first two in place does not get into the buffer.
2. ``terminal_obs`` and ``terminal_value`` are not among the locals.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext._observations import parts_of
from sb3_trpo_ext.rollout.actors import Actor, is_deferrable_policy, make_actor
from sb3_trpo_ext.rollout.lazy import lazy_class, lazy_pair, may_look
from sb3_trpo_ext.rollout.snapshot import Snapshot

#: Numbers in the observations of one batch at the end of a rollout: 16 MiB of float32.
CHUNK_NUMBERS = 2**22


class LeanRollout:
    """
    One rollout.

    :param model: whose policy acts
    :param env: the training environment
    :param callback: called at each step
    :param buffer: to be filled
    :param rewards: what the rewards go through on their way to the buffer; ``None`` if they are left alone
    """

    #: The policy that acts first.
    snapshot: Snapshot

    def __init__(
        self,
        model: OnPolicyAlgorithm,
        env: VecEnv,
        callback: BaseCallback,
        buffer: RolloutBuffer,
        rewards: Any = None,
    ):
        self._rewards = rewards
        self.model, self.env, self.callback, self.buffer = model, env, callback, buffer
        #: Ends what watches the policy.
        self._watching = ExitStack()
        #: The number of steps in the buffer, and of those that have their values and log-probabilities.
        self._n_stored = self._n_evaluated = 0
        #: Whether the callback may look at what is computed only at the end.
        self._is_watched = may_look(callback)
        #: Whether values and log-probabilities are computed after each step.
        self._is_eager = False
        #: Truncated episodes: step, environment and last observation.
        self._truncated: list[tuple[int, int, PyTorchObs]] = []
        #: What SB3 has in its local variables, under the same names.
        self._scope: dict[str, Any] = {"self": model, "env": model.env, "callback": callback, "rollout_buffer": buffer}

    def collect(self, n_rollout_steps: int, before_end: Callable[[RolloutBuffer, Snapshot], None]) -> bool:
        """Run the environment, then compute what was deferred; as :func:`collect_rollouts`."""
        callback, buffer, scope = self.callback, self.buffer, self._scope
        buffer.reset()
        # For tensors that a callback keeps: the buffer makes new arrays in its next reset
        self._values, self._log_probs = buffer.values, buffer.log_probs
        self._reset_noise()
        callback.on_rollout_start()
        self._follow_policy()
        self.snapshot = self._snapshot
        scope["n_rollout_steps"] = n_rollout_steps
        with self._watching:
            try:
                is_full = self._run(n_rollout_steps)
            finally:
                # After an error too: tensors that a callback has kept must not be computed with a later policy
                self._evaluate()
        if not is_full:
            return False
        values, log_probs, rewards = self._finish()
        before_end(buffer, self.snapshot)
        if self._is_watched:
            self._actor.show_distribution()
        scope.update(n_steps=n_rollout_steps, values=values, log_probs=log_probs, rewards=rewards)
        callback.update_locals(scope)
        callback.on_rollout_end()
        return True

    def _finish(self) -> tuple[Any, Any, Any]:
        """Compute advantages; returns the values after the last step, and its log-probabilities and rewards."""
        model, buffer = self.model, self.buffer
        with th.no_grad():
            values = self.policy.predict_values(self._sent(self._scope["new_obs"]))
        buffer.compute_returns_and_advantage(last_values=values, dones=self._scope["dones"])
        return values, th.tensor(buffer.log_probs[-1], device=model.device), buffer.rewards[-1].copy()

    def _run(self, n_rollout_steps: int) -> bool:
        """Run the environment; returns False if the callback ended the training."""
        model, env, callback, buffer, scope = self.model, self.env, self.callback, self.buffer, self._scope
        is_watched = self._is_watched
        stock_class = type(buffer)
        class_in_callbacks = lazy_class(stock_class, self._evaluate) if is_watched else stock_class
        unknown = th.zeros(env.num_envs)
        for n_steps in range(n_rollout_steps):
            if model.sde_sample_freq > 0 and n_steps % model.sde_sample_freq == 0:
                self._reset_noise()
            obs_tensor = obs_as_tensor(model._last_obs, model.device)  # type: ignore[arg-type]
            actions = self._act(obs_tensor)
            clipped_actions = self._clipped(actions)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            if self._rewards is not None:
                rewards = self._rewards.seen(rewards, dones, infos)
            model.num_timesteps += env.num_envs
            if is_watched:
                evaluate = functools.partial(self._evaluate_step, n_steps, obs_tensor)
                scope["values"], scope["log_probs"] = lazy_pair(evaluate, env.num_envs, model.device)
                self._actor.show_distribution()
            scope.update(n_steps=n_steps, obs_tensor=obs_tensor, actions=actions, clipped_actions=clipped_actions)
            scope.update(new_obs=new_obs, rewards=rewards, dones=dones, infos=infos)
            callback.update_locals(scope)
            buffer.__class__ = class_in_callbacks
            try:
                goes_on = callback.on_step()
            finally:
                buffer.__class__ = stock_class
            if not goes_on:
                return False
            model._update_info_buffer(infos, dones)
            if self._rewards is not None:
                rewards = self._rewards.scaled(rewards)
            self._store(model._last_obs, actions, rewards, model._last_episode_starts, unknown, unknown)
            self._n_stored += 1
            model._last_obs = new_obs  # type: ignore[assignment]
            model._last_episode_starts = dones
            if not self._snapshot.is_of(model.policy, in_detail=is_watched):
                self._evaluate()
                self._follow_policy()
                # New parts may give other answers later
                self._is_eager = not is_deferrable_policy(model.policy)
            # As in SB3, an episode that is truncated in this step is worth what the policy says after the callback
            self._note_truncated(n_steps, dones, infos)
            if self._is_eager:
                self._evaluate()
        return True

    def _make_actor(self) -> Actor:
        """How the policy acts as it is now."""
        return make_actor(self.policy)

    def _act(self, observations: PyTorchObs) -> np.ndarray:
        """Choose the actions of one step."""
        return self._actor.act(observations)

    def _store(self, *transition: Any) -> None:
        """Put one step into the buffer: what SB3's ``add`` takes."""
        self.buffer.add(*transition)

    def _clipped(self, actions: np.ndarray) -> np.ndarray:
        """Actions as the environment gets them."""
        space = self.policy.action_space
        if self.policy.squash_output:
            return self.policy.unscale_action(actions)
        # Faster than `np.clip`
        return np.minimum(np.maximum(actions, space.low), space.high) if isinstance(space, spaces.Box) else actions

    def _reset_noise(self) -> None:
        """Draw new noise matrices for gSDE, without a graph, with which the policy could not be copied."""
        if self.model.use_sde:
            with th.no_grad():
                self.model.policy.reset_noise(self.env.num_envs)

    def _note_truncated(self, step: int, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """Keep the last observations of episodes that a time limit has ended."""
        for index, last in truncated(dones, infos):
            self._truncated.append((step, index, self.policy.obs_to_tensor(last)[0]))

    def _follow_policy(self) -> None:
        """Let the policy act as it is now."""
        self.policy: ActorCriticPolicy = self.model.policy
        self.policy.set_training_mode(False)
        self._snapshot = Snapshot(self.policy)
        # In the place of the one before: a callback may change the policy in every step
        self._watching.close()
        self._watching.enter_context(self._snapshot.watching())
        self._actor = self._make_actor()
        #: The first step that this actor makes.
        self._first_step = self._n_stored

    @th.no_grad()
    def _evaluate_step(self, step: int, observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """Values and log-probabilities of the current step or an earlier one, for a callback that reads them."""
        if step < self._n_stored:
            self._evaluate()
            device = self.model.device
            values, log_probs = (th.as_tensor(part[step], device=device).clone() for part in (self._values, self._log_probs))
        else:
            with self._snapshot.restored():
                number = step - self._first_step
                values, log_probs = self._actor.evaluate(observations, number, number + 1)
        return values.reshape(-1, 1), log_probs.flatten()

    def _steps_at_a_time(self, n_numbers: int) -> int:
        """How many steps are evaluated in one batch, if each has ``n_numbers`` numbers in its observations."""
        return max(1, CHUNK_NUMBERS // n_numbers)

    def _sent(self, observations: Any) -> PyTorchObs:
        """Observations of the buffer or the environment on the device of the policy."""
        return obs_as_tensor(observations, self.model.device)

    @th.no_grad()
    def _evaluate(self) -> None:
        """Compute values, log-probabilities and bootstrapped rewards of all stored steps that do not have them yet."""
        start, stop = self._n_evaluated, self._n_stored
        truncated, self._truncated = self._truncated, []
        if start == stop and not truncated:
            return
        self._n_evaluated = stop
        stored, space = parts_of(self.buffer.observations), self.model.observation_space
        shapes = {key: part.shape or () for key, part in parts_of(space).items()}
        chunk = self._steps_at_a_time(sum(math.prod(array.shape[1:]) for array in stored.values()))
        with self._snapshot.restored():
            for begin in range(start, stop, chunk):
                end = min(begin + chunk, stop)
                parts = {key: stored[key][begin:end].reshape(-1, *shape) for key, shape in shapes.items()}
                observations = self._sent(parts if isinstance(space, spaces.Dict) else parts[""])
                values, log_probs = self._actor.evaluate(observations, begin - self._first_step, end - self._first_step)
                outputs: tuple[tuple[Any, th.Tensor], ...] = ((self._values, values), (self._log_probs, log_probs))
                for array, output in outputs:
                    numbers = output.reshape(end - begin, -1)
                    array[begin:end] = numbers if isinstance(array, th.Tensor) else numbers.cpu().numpy()
            n_observations = chunk * self.env.num_envs
            for first in range(0, len(truncated), n_observations):
                steps, indices, terminal = zip(*truncated[first : first + n_observations], strict=True)
                terminal_values = self.policy.predict_values(_concatenated(terminal)).flatten().cpu().numpy()
                self.buffer.rewards[list(steps), list(indices)] += self.model.gamma * terminal_values


def truncated(dones: np.ndarray, infos: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """The environments in which a time limit has ended an episode in a step, and the last observations of these episodes."""
    for index in np.flatnonzero(dones).tolist():
        last = infos[index].get("terminal_observation")
        if last is not None and infos[index].get("TimeLimit.truncated", False):
            yield index, last


def _concatenated(observations: tuple[PyTorchObs, ...]) -> PyTorchObs:
    """One batch of several observations."""
    if isinstance(observations[0], dict):
        return {key: th.cat([part[key] for part in observations]) for key in observations[0]}  # type: ignore[index]
    return th.cat(observations)  # type: ignore[arg-type]

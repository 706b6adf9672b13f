"""Rollouts that do only the actor's work in each step, and fill SB3's buffer with what SB3's own loop would put there.

Values, log-probabilities and the bootstrap values of truncated episodes need no answer before the rollout is over: they are
computed in batches at its end, where a network costs a small part of what it costs step by step.

Differences from ``OnPolicyAlgorithm.collect_rollouts``:

1. While callbacks run in ``on_step``, ``locals["values"]``, ``locals["log_probs"]`` and what the buffer has of values,
   log-probabilities and bootstrapped rewards are computed when the callback reads them (:mod:`sb3_trpo_ext.rollout.lazy`).
2. ``terminal_obs`` and ``terminal_value`` are not among the locals.
3. Errors say what the environment did wrong.

Where it is not certain that the contents would be the same, SB3's loop runs instead: see :func:`is_deferrable`. A class that
always wants it says ``collect_rollouts = OnPolicyAlgorithm.collect_rollouts``.
"""

from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext.rollout.actors import Actor, is_deferrable_policy, make_actor
from sb3_trpo_ext.rollout.lazy import LazySteps, lazy_buffer, may_look
from sb3_trpo_ext.rollout.snapshot import Snapshot

#: Numbers in the observations of one batch at the end of a rollout: 16 MiB of float32.
_CHUNK_NUMBERS = 2**22

Observations = np.ndarray | dict[str, np.ndarray]


def collect_rollouts(
    model: OnPolicyAlgorithm,
    env: VecEnv,
    callback: BaseCallback,
    rollout_buffer: RolloutBuffer,
    n_rollout_steps: int,
) -> tuple[bool, Snapshot]:
    """
    Fill the buffer with experience of the current policy.

    :param model: whose policy acts
    :param env: the training environment
    :param callback: called at each step, and at the beginning and the end
    :param rollout_buffer: buffer to fill
    :param n_rollout_steps: number of steps to collect per environment
    :return: False if the callback ended the training; the policy that acted first
    :raises ValueError: if the environment returned a NaN that the policy cannot digest, or an observation of a wrong shape
    :raises RuntimeError: if a process of the environment has died
    """
    try:
        if is_deferrable(model, rollout_buffer):
            rollout = _LeanRollout(model, env, callback, rollout_buffer)
            with rollout.stack:
                return rollout.collect(n_rollout_steps), rollout.snapshot
        snapshot = Snapshot(model.policy)
        with snapshot.watching():
            is_full = OnPolicyAlgorithm.collect_rollouts(model, env, callback, rollout_buffer, n_rollout_steps)
        return is_full, snapshot
    except (ValueError, RuntimeError) as error:
        _explain_observation(model, env, error)
        raise
    except (EOFError, ConnectionError) as error:
        _explain_dead_worker(model, env, error)
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
    stock: type[RolloutBuffer] = DictRolloutBuffer if isinstance(buffer, DictRolloutBuffer) else RolloutBuffer
    for name in ("add", "reset"):
        if name in vars(buffer) or getattr(type(buffer), name) is not getattr(stock, name):
            return False
    observations = model._last_obs
    if not isinstance(observations, dict if stock is DictRolloutBuffer else np.ndarray):
        return False
    for key, observation, space in _parts(observations, model.observation_space):
        stored = buffer.observations[key] if isinstance(buffer.observations, dict) else buffer.observations
        # SB3's policies compute in float32, whatever comes
        is_lossless = np.can_cast(observation.dtype, stored.dtype) or (
            observation.dtype == np.float64 and stored.dtype == np.float32 and isinstance(space, spaces.Box)
        )
        if not is_lossless or observation.shape != (buffer.n_envs, *(space.shape or ())):
            return False
    return is_deferrable_policy(model.policy)


class _LeanRollout:
    """One rollout."""

    #: The policy that acts first.
    snapshot: Snapshot

    def __init__(self, model: OnPolicyAlgorithm, env: VecEnv, callback: BaseCallback, buffer: RolloutBuffer):
        self.model = model
        self.policy: ActorCriticPolicy = model.policy
        #: Ends what watches the policy.
        self.stack = ExitStack()
        self.env = env
        self.callback = callback
        self.buffer = buffer
        #: Its arrays themselves, also while it is lazy.
        self._arrays: dict[str, Any] = vars(buffer)
        #: Steps up to this one have their values and log-probabilities.
        self._n_complete = 0
        #: Whether values and log-probabilities are computed after each step.
        self._is_eager = False
        #: Truncated episodes: step, environment and last observation.
        self._truncated: list[tuple[int, int, PyTorchObs]] = []

    def collect(self, n_rollout_steps: int) -> bool:
        """Run the environment, then fill in what has been put off."""
        model, callback, buffer = self.model, self.callback, self.buffer
        self.policy.set_training_mode(False)
        buffer.reset()
        self._reset_noise()
        callback.on_rollout_start()
        self._follow_policy()
        self.snapshot = self._snapshot
        self._steps = LazySteps(self._evaluate_step)
        with lazy_buffer(buffer, self._complete):
            try:
                is_full = self._run(n_rollout_steps)
            except BaseException:
                # What somebody has kept of this rollout must not be computed with a later policy
                with suppress(Exception):
                    self._finish()
                raise
            self._finish()
        if not is_full:
            return False
        with th.no_grad():
            values = self.policy.predict_values(obs_as_tensor(self._scope["new_obs"], model.device))
        buffer.compute_returns_and_advantage(last_values=values, dones=self._scope["dones"])
        log_probs, rewards = th.as_tensor(buffer.log_probs[-1].copy(), device=model.device), buffer.rewards[-1].copy()
        self._scope.update(n_steps=n_rollout_steps, values=values, log_probs=log_probs, rewards=rewards)
        callback.update_locals(self._scope)
        callback.on_rollout_end()
        return True

    def _finish(self) -> None:
        """Fill in what has been put off."""
        # A callback may have trained something
        self.policy.set_training_mode(False)
        self._complete()
        self._steps.finish(self._arrays["values"], self._arrays["log_probs"], self.model.device)

    def _run(self, n_rollout_steps: int) -> bool:
        """Run the environment; returns False if the callback ended the training."""
        model, env, callback = self.model, self.env, self.callback
        is_watched = may_look(callback)
        # What SB3 has in its local variables, under the same names
        scope: dict[str, Any] = {"self": model, "env": env, "callback": callback, "rollout_buffer": self.buffer}
        scope["n_rollout_steps"] = n_rollout_steps
        self._scope = scope
        for n_steps in range(n_rollout_steps):
            if model.sde_sample_freq > 0 and n_steps % model.sde_sample_freq == 0:
                self._reset_noise()
            self._observations = obs_tensor = obs_as_tensor(model._last_obs, model.device)  # type: ignore[arg-type]
            actions = self._actor.act(obs_tensor)
            clipped_actions = self._clipped(actions)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            model.num_timesteps += env.num_envs
            _check_shape(model, new_obs, env.num_envs)
            if is_watched:
                scope["values"], scope["log_probs"] = self._steps.at(n_steps, env.num_envs, model.device)
            scope.update(
                n_steps=n_steps,
                obs_tensor=obs_tensor,
                actions=actions,
                clipped_actions=clipped_actions,
                new_obs=new_obs,
                rewards=rewards,
                dones=dones,
                infos=infos,
            )
            callback.update_locals(scope)
            if not callback.on_step():
                # This step never gets into the buffer
                self._steps.keep(must_look=True)
                return False
            self._steps.keep()
            self._store(n_steps, actions, rewards, dones, infos)
            model._last_obs = new_obs  # type: ignore[assignment]
            model._last_episode_starts = dones
            if not self._snapshot.is_of(model.policy, in_detail=is_watched):
                self._follow_change(n_steps)
            elif self._is_eager:
                self._complete()
        return True

    def _clipped(self, actions: np.ndarray) -> np.ndarray:
        """Actions as the environment gets them."""
        if self._action_bounds is not None:
            return np.minimum(np.maximum(actions, self._action_bounds[0]), self._action_bounds[1])
        return self.policy.unscale_action(actions) if self.policy.squash_output else actions

    def _follow_change(self, step: int) -> None:
        """Complete the steps so far with the policy that made them, and go on with the policy as it is now."""
        # As in SB3, an episode that is cut short in this step is worth what the policy says after the callback
        present = [episode for episode in self._truncated if episode[0] == step]
        del self._truncated[len(self._truncated) - len(present) :]
        self._complete()
        self._truncated = present
        before = self._snapshot
        self._follow_policy()
        if not self._snapshot.has_parts_of(before):
            # New parts may give other answers later
            self._is_eager = not is_deferrable(self.model, self.buffer)

    def _reset_noise(self) -> None:
        """Draw new noise matrices for gSDE, without a graph: nobody uses it, and with it the policy could not be copied."""
        if self.model.use_sde:
            with th.no_grad():
                self.model.policy.reset_noise(self.env.num_envs)

    def _store(self, step: int, actions: np.ndarray, rewards: np.ndarray, dones: np.ndarray, infos: list[Any]) -> None:
        """Put one step into the buffer, as its ``add`` would, without values and log-probabilities."""
        self.model._update_info_buffer(infos, dones)
        for index in np.flatnonzero(dones):
            terminal_observation = infos[index].get("terminal_observation")
            if terminal_observation is not None and infos[index].get("TimeLimit.truncated", False):
                self._truncated.append((step, int(index), self.policy.obs_to_tensor(terminal_observation)[0]))
        buffer, arrays = self.buffer, self._arrays
        if isinstance(arrays["observations"], dict):
            for key, stored in arrays["observations"].items():
                stored[step] = self.model._last_obs[key].reshape(stored.shape[1:])  # type: ignore[index]
        else:
            stored = arrays["observations"]
            stored[step] = self.model._last_obs.reshape(stored.shape[1:])  # type: ignore[union-attr]
        arrays["actions"][step] = actions.reshape(arrays["actions"].shape[1:])
        arrays["rewards"][step] = rewards
        arrays["episode_starts"][step] = self.model._last_episode_starts
        buffer.pos = step + 1
        buffer.full = buffer.pos == buffer.buffer_size

    def _follow_policy(self) -> None:
        """Let the policy act as it is now."""
        self.policy = self.model.policy
        self.policy.set_training_mode(False)
        self._snapshot = Snapshot(self.policy)
        # In the place of the one before: a callback may change the policy in every step
        self.stack.close()
        self.stack.enter_context(self._snapshot.watching())
        self._action_bounds = _clipping_bounds(self.policy)
        self._actor: Actor = make_actor(self.policy)
        #: The first step that this actor makes.
        self._first_step = self.buffer.pos

    @th.no_grad()
    def _evaluate_step(self, step: int) -> tuple[th.Tensor, th.Tensor]:
        """
        Values and log-probabilities of one step, for somebody who looks at them during the rollout.

        :param step: the present one, or an earlier one
        :return: tensors of shapes ``(n_envs, 1)`` and ``(n_envs,)``
        """
        if step >= self.buffer.pos:
            with self._snapshot.restored():
                values, log_probs = self._actor.evaluate(
                    self._observations, step - self._first_step, step - self._first_step + 1
                )
            return values.reshape(-1, 1), log_probs.flatten()
        self._complete()
        values, log_probs = (th.tensor(self._arrays[name][step], device=self.model.device) for name in ("values", "log_probs"))
        return values[:, None], log_probs

    @th.no_grad()
    def _complete(self) -> None:
        """Compute values, log-probabilities and bootstrapped rewards of all stored steps that do not have them yet."""
        buffer, arrays = self.buffer, self._arrays
        start, stop = self._n_complete, buffer.pos
        self._n_complete = stop
        space = self.model.observation_space
        n_numbers = sum(stored[0].size for _, stored, _ in _parts(arrays["observations"], space))
        chunk = max(1, _CHUNK_NUMBERS // n_numbers)
        with self._snapshot.restored():
            for begin in range(start, stop, chunk):
                end = min(begin + chunk, stop)
                flat = {
                    key: obs[begin:end].reshape(-1, *(sub.shape or ()))
                    for key, obs, sub in _parts(arrays["observations"], space)
                }
                observations = obs_as_tensor(flat if isinstance(space, spaces.Dict) else flat[""], self.model.device)
                values, log_probs = self._actor.evaluate(observations, begin - self._first_step, end - self._first_step)
                arrays["values"][begin:end] = values.reshape(end - begin, -1).cpu().numpy()
                arrays["log_probs"][begin:end] = log_probs.reshape(end - begin, -1).cpu().numpy()
                self._steps.write(begin, end, arrays["values"], arrays["log_probs"])
            n_observations = chunk * buffer.n_envs
            for first in range(0, len(self._truncated), n_observations):
                steps, indices, terminal = zip(*self._truncated[first : first + n_observations], strict=True)
                terminal_values = self.policy.predict_values(_concatenated(terminal)).flatten().cpu().numpy()
                arrays["rewards"][list(steps), list(indices)] += self.model.gamma * terminal_values
        self._truncated.clear()


#: What is safe when a rollout fails: said in every message.
_INTACT = "The policy is as it was after the last update and can be saved."


def _clipping_bounds(policy: ActorCriticPolicy) -> tuple[np.ndarray, np.ndarray] | None:
    """Bounds that actions are clipped to before the environment gets them, or ``None`` if they are not."""
    space = policy.action_space
    return (space.low, space.high) if isinstance(space, spaces.Box) and not policy.squash_output else None


def _parts(observations: Any, space: spaces.Space) -> list[tuple[str, np.ndarray, spaces.Space]]:
    """Key, array and space of each part of a Dict observation; an empty key for any other observation."""
    if isinstance(space, spaces.Dict):
        return [(key, observations[key], sub) for key, sub in space.spaces.items()]
    return [("", observations, space)]


def _concatenated(observations: tuple[PyTorchObs, ...]) -> PyTorchObs:
    """One batch of several observations."""
    if isinstance(observations[0], dict):
        return {key: th.cat([part[key] for part in observations]) for key in observations[0]}  # type: ignore[index]
    return th.cat(observations)  # type: ignore[arg-type]


def _check_shape(model: OnPolicyAlgorithm, observations: Any, n_envs: int, cause: Exception | None = None) -> None:
    """Raise a ``ValueError`` if observations do not have the shape of their space."""
    problem = ""
    if isinstance(model.observation_space, spaces.Dict) and (missing := set(model.observation_space) - observations.keys()):
        problem = f"an observation without {sorted(missing)}"
    else:
        for key, observation, space in _parts(observations, model.observation_space):
            if observation.shape != (n_envs, *(space.shape or ())):
                where = f" in {key!r}" if key else ""
                problem = f"observations of shape {observation.shape}{where} for {n_envs} environments of shape {space.shape}"
                break
    if problem:
        raise ValueError(f"The environment returned {problem} after {model.num_timesteps} timesteps. {_INTACT}") from cause


def _explain_observation(model: OnPolicyAlgorithm, env: VecEnv, error: Exception) -> None:
    """Raise a ``ValueError`` if a NaN, an infinity or a wrong shape of the last observation explains this error."""
    if model._last_obs is None:
        return
    _check_shape(model, model._last_obs, env.num_envs, error)
    for key, observation, _ in _parts(model._last_obs, model.observation_space):
        # Policies raise a ValueError for a NaN
        if isinstance(error, ValueError) and not np.isfinite(observation).all():
            raise ValueError(
                f"The environment returned a NaN or an infinity in its {key or 'observation'} after {model.num_timesteps} "
                f"timesteps. {_INTACT[:-1]}; `VecCheckNan` from stable_baselines3.common.vec_env finds the step at which it "
                "happens."
            ) from error


def _explain_dead_worker(model: OnPolicyAlgorithm, env: VecEnv, error: Exception) -> None:
    """Raise a ``RuntimeError`` if a worker of ``SubprocVecEnv`` has died."""
    inner: Any = env
    while hasattr(inner, "venv"):
        inner = inner.venv
    processes = getattr(inner, "processes", [])
    for process in processes:
        # It may be about to end; all but the dead ones go on waiting for a command
        process.join(timeout=0.2)
    dead = {index: process.exitcode for index, process in enumerate(processes) if process.exitcode is not None}
    if dead:
        codes = ", ".join(f"{index} with exit code {code}" for index, code in dead.items())
        raise RuntimeError(
            f"Of the {len(processes)} worker processes of {type(inner).__name__} some have ended after {model.num_timesteps} "
            f"timesteps: {codes}. If the environment raised an error, that is on stderr; a negative code is the signal that "
            f"killed the process. {_INTACT}"
        ) from error

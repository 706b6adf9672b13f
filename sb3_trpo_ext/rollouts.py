"""Rollouts that do only the actor's work in each step, and fill SB3's buffer with what SB3's own loop would put there.

Values, log-probabilities and the bootstrap values of truncated episodes need no answer before the rollout is over: they are
computed in batches at its end, where a network costs a small part of what it costs step by step.

Differences from ``OnPolicyAlgorithm.collect_rollouts``:

1. While callbacks run in ``on_step``, ``locals["values"]`` and ``locals["log_probs"]`` are ``None``. In ``on_rollout_end``
   they are what they are in SB3: the values of the last observation, and the log-probabilities of the last step.
2. ``terminal_obs`` and ``terminal_value`` are not among the locals.
3. Errors say what the environment did wrong.

Where it is not certain that the contents would be the same, SB3's loop runs instead: see :func:`is_deferrable`. A class that
always wants it says ``collect_rollouts = OnPolicyAlgorithm.collect_rollouts``.
"""

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
from torch import nn

from sb3_trpo_ext.actors import Actor, is_deferrable_policy, make_actor
from sb3_trpo_ext.optim.vectors import assign_, flatten

#: Numbers in the observations of one batch at the end of a rollout: 16 MiB of float32.
_CHUNK_NUMBERS = 2**22

Observations = np.ndarray | dict[str, np.ndarray]


def collect_rollouts(
    model: OnPolicyAlgorithm,
    actor_params: list[nn.Parameter],
    env: VecEnv,
    callback: BaseCallback,
    rollout_buffer: RolloutBuffer,
    n_rollout_steps: int,
) -> bool:
    """
    Fill the buffer with experience of the current policy.

    :param model: whose policy acts
    :param actor_params: the parameters of its actor
    :param env: the training environment
    :param callback: called at each step, and at the beginning and the end
    :param rollout_buffer: buffer to fill
    :param n_rollout_steps: number of steps to collect per environment
    :return: False if the callback ended the training
    :raises ValueError: if the environment returned a NaN that the policy cannot digest, or an observation of a wrong shape
    :raises RuntimeError: if a process of the environment has died
    """
    try:
        if is_deferrable(model, rollout_buffer):
            return _LeanRollout(model, actor_params, env, callback, rollout_buffer).collect(n_rollout_steps)
        return OnPolicyAlgorithm.collect_rollouts(model, env, callback, rollout_buffer, n_rollout_steps)
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
    numbers whenever it is asked (:func:`~sb3_trpo_ext.actors.is_deferrable_policy`).

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
    return is_deferrable_policy(model.policy, obs_as_tensor(observations, model.device))


class _LeanRollout:
    """
    One rollout.

    :param model: whose policy acts
    :param actor_params: the parameters of its actor
    :param env: the training environment
    :param callback: called at each step, and at the beginning and the end
    :param buffer: buffer to fill
    """

    def __init__(
        self,
        model: OnPolicyAlgorithm,
        actor_params: list[nn.Parameter],
        env: VecEnv,
        callback: BaseCallback,
        buffer: RolloutBuffer,
    ):
        self.model = model
        self.policy: ActorCriticPolicy = model.policy
        self.env = env
        self.callback = callback
        self.buffer = buffer
        self._actor_params = actor_params
        #: Steps up to this one have their values and log-probabilities.
        self._n_complete = 0
        #: Truncated episodes: step, environment and last observation.
        self._truncated: list[tuple[int, int, PyTorchObs]] = []

    def collect(self, n_rollout_steps: int) -> bool:
        """
        Run the environment, then fill in what has been put off.

        :param n_rollout_steps: number of steps per environment
        :return: False if the callback ended the training
        """
        model, policy, env, callback, buffer = self.model, self.policy, self.env, self.callback, self.buffer
        policy.set_training_mode(False)
        buffer.reset()
        if model.use_sde:
            policy.reset_noise(env.num_envs)
        callback.on_rollout_start()

        self._look_at_policy()
        space = model.observation_space
        action_bounds = _clipping_bounds(policy)
        # What SB3 has in its local variables, under the same names
        scope: dict[str, Any] = {"self": model, "env": env, "callback": callback, "rollout_buffer": buffer}
        scope |= {"n_rollout_steps": n_rollout_steps, "values": None, "log_probs": None}
        for n_steps in range(n_rollout_steps):
            if model.use_sde and model.sde_sample_freq > 0 and n_steps % model.sde_sample_freq == 0:
                policy.reset_noise(env.num_envs)
            obs_tensor = obs_as_tensor(model._last_obs, model.device)  # type: ignore[arg-type]
            actions = self._actor.act(obs_tensor)
            if action_bounds is not None:
                clipped_actions = np.minimum(np.maximum(actions, action_bounds[0]), action_bounds[1])
            else:
                clipped_actions = policy.unscale_action(actions) if policy.squash_output else actions
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            model.num_timesteps += env.num_envs
            if problem := _misfit(new_obs, space, env.num_envs):
                raise ValueError(f"The environment returned {problem} after {model.num_timesteps} timesteps. {_INTACT}")

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
                return False

            model._update_info_buffer(infos, dones)
            for index in np.flatnonzero(dones):
                terminal_observation = infos[index].get("terminal_observation")
                if terminal_observation is not None and infos[index].get("TimeLimit.truncated", False):
                    self._truncated.append((n_steps, int(index), policy.obs_to_tensor(terminal_observation)[0]))
            self._store(n_steps, actions, rewards)
            model._last_obs = new_obs  # type: ignore[assignment]
            model._last_episode_starts = dones
            if self._identity != self._identity_of_params():
                self._complete_with_old_params()

        # A callback may have trained something
        policy.set_training_mode(False)
        self._complete()
        with th.no_grad():
            values = policy.predict_values(obs_as_tensor(new_obs, model.device))  # type: ignore[arg-type]
        buffer.compute_returns_and_advantage(last_values=values, dones=dones)
        log_probs = th.as_tensor(buffer.log_probs[n_steps].copy(), device=model.device)
        scope.update(n_steps=n_rollout_steps, values=values, log_probs=log_probs, rewards=buffer.rewards[n_steps].copy())
        callback.update_locals(scope)
        callback.on_rollout_end()
        return True

    def _store(self, step: int, actions: np.ndarray, rewards: np.ndarray) -> None:
        """
        Put one step into the buffer, as its ``add`` would, without values and log-probabilities.

        :param step: where
        :param actions: as the policy put them out
        :param rewards: as the environment gave them
        """
        buffer = self.buffer
        if isinstance(buffer.observations, dict):
            for key, stored in buffer.observations.items():
                stored[step] = self.model._last_obs[key].reshape(stored.shape[1:])  # type: ignore[index]
        else:
            stored = buffer.observations
            stored[step] = self.model._last_obs.reshape(stored.shape[1:])  # type: ignore[union-attr]
        buffer.actions[step] = actions.reshape(buffer.actions.shape[1:])
        buffer.rewards[step] = rewards
        buffer.episode_starts[step] = self.model._last_episode_starts
        buffer.pos = step + 1
        buffer.full = buffer.pos == buffer.buffer_size

    def _look_at_policy(self) -> None:
        """Prepare the actor, and remember the parameters: a callback may change them in the middle of a rollout."""
        self._actor: Actor = make_actor(self.policy, self._actor_params)
        self._params = list(self.policy.parameters())
        self._old_params = flatten(self._params)
        self._identity = self._identity_of_params()

    def _identity_of_params(self) -> list[int]:
        """
        What changes if a parameter is written to or replaced, in a microsecond.

        :return: version and address of each
        """
        return [number for param in self._params for number in (param._version, param.data_ptr())]

    def _complete_with_old_params(self) -> None:
        """Compute for the steps so far what they would have been given before the parameters were changed."""
        now = flatten(self._params)
        assign_(self._params, self._old_params)
        try:
            self._complete()
        finally:
            assign_(self._params, now)
        self._look_at_policy()

    @th.no_grad()
    def _complete(self) -> None:
        """Compute values, log-probabilities and bootstrapped rewards of all steps that do not have them yet."""
        buffer, policy = self.buffer, self.policy
        start, stop = self._n_complete, buffer.pos
        self._n_complete = stop
        space = self.model.observation_space
        n_numbers = sum(stored[0].size for _, stored, _ in _parts(buffer.observations, space))
        chunk = max(1, _CHUNK_NUMBERS // n_numbers)
        for begin in range(start, stop, chunk):
            end = min(begin + chunk, stop)
            flat = {
                key: obs[begin:end].reshape(-1, *(sub.shape or ())) for key, obs, sub in _parts(buffer.observations, space)
            }
            observations = obs_as_tensor(flat if isinstance(space, spaces.Dict) else flat[""], self.model.device)
            values, log_probs = self._actor.evaluate(observations, begin - start, end - start)
            buffer.values[begin:end] = values.reshape(end - begin, -1).cpu().numpy()
            buffer.log_probs[begin:end] = log_probs.reshape(end - begin, -1).cpu().numpy()
        n_observations = chunk * buffer.n_envs
        for first in range(0, len(self._truncated), n_observations):
            steps, indices, terminal = zip(*self._truncated[first : first + n_observations], strict=True)
            terminal_values = policy.predict_values(_concatenated(terminal)).flatten().cpu().numpy()
            buffer.rewards[list(steps), list(indices)] += self.model.gamma * terminal_values
        self._truncated.clear()


#: What is safe when a rollout fails: said in every message.
_INTACT = "The policy is as it was after the last update and can be saved."


def _clipping_bounds(policy: ActorCriticPolicy) -> tuple[np.ndarray, np.ndarray] | None:
    """
    What actions are clipped to before the environment sees them.

    :param policy: any policy
    :return: lower and upper bounds, or ``None`` if its actions are not clipped
    """
    space = policy.action_space
    return (space.low, space.high) if isinstance(space, spaces.Box) and not policy.squash_output else None


def _parts(observations: Any, space: spaces.Space) -> list[tuple[str, np.ndarray, spaces.Space]]:
    """
    Go through the entries of a dict observation, or through the one observation that there is.

    :param observations: arrays
    :param space: their space
    :return: key (empty for the one), array and space of each
    """
    if isinstance(space, spaces.Dict):
        return [(key, observations[key], sub) for key, sub in space.spaces.items()]
    return [("", observations, space)]


def _concatenated(observations: tuple[PyTorchObs, ...]) -> PyTorchObs:
    """
    Make one batch of several.

    :param observations: tensors or dicts of tensors
    :return: the same kind
    """
    if isinstance(observations[0], dict):
        return {key: th.cat([part[key] for part in observations]) for key in observations[0]}  # type: ignore[index]
    return th.cat(observations)  # type: ignore[arg-type]


def _misfit(observations: Any, space: spaces.Space, n_envs: int) -> str | None:
    """
    What is wrong with the shape of observations.

    :param observations: of all environments
    :param space: of one observation
    :param n_envs: number of environments
    :return: a description, or ``None`` if nothing is
    """
    if isinstance(space, spaces.Dict):
        if missing := space.spaces.keys() - observations.keys():
            return f"an observation without {sorted(missing)}"
        problems = (_misfit(observations[key], sub, n_envs) for key, sub in space.spaces.items())
        return next((f"in {key!r} {problem}" for key, problem in zip(space.spaces, problems, strict=True) if problem), None)
    expected = (n_envs, *(space.shape or ()))
    if observations.shape == expected:
        return None
    return f"observations of shape {observations.shape} for {n_envs} environments, where its space has {space.shape}"


def _explain_observation(model: OnPolicyAlgorithm, env: VecEnv, error: Exception) -> None:
    """
    Raise a clearer error if the last observation explains this one.

    :param model: in the middle of a rollout
    :param env: the training environment
    :param error: what was raised
    :raises ValueError: if the observation has a NaN, an infinity or a wrong shape
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is not None and traceback.tb_frame.f_code.co_name == "_save_obs":
        # Where DummyVecEnv copies an observation into an array of the space's shape
        raise ValueError(
            f"The environment returned an observation that does not fit its space {model.observation_space} after "
            f"{model.num_timesteps} timesteps: {error}. {_INTACT}"
        ) from error
    if model._last_obs is None:
        return
    if problem := _misfit(model._last_obs, model.observation_space, env.num_envs):
        raise ValueError(f"The environment returned {problem} after {model.num_timesteps} timesteps. {_INTACT}") from error
    for key, observation, _ in _parts(model._last_obs, model.observation_space):
        # Policies raise a ValueError for a NaN
        if isinstance(error, ValueError) and not np.isfinite(observation).all():
            raise ValueError(
                f"The environment returned a NaN or an infinity in its {key or 'observation'} after {model.num_timesteps} "
                f"timesteps. {_INTACT[:-1]}; `VecCheckNan` from stable_baselines3.common.vec_env finds the step at which it "
                "happens."
            ) from error


def _explain_dead_worker(model: OnPolicyAlgorithm, env: VecEnv, error: Exception) -> None:
    """
    Raise a clearer error if a worker of ``SubprocVecEnv`` has died.

    :param model: in the middle of a rollout
    :param env: the training environment
    :param error: what was raised when the worker did not answer
    :raises RuntimeError: if one has
    """
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

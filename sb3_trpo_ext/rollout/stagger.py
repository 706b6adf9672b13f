"""Desynchronizes episodes that all began together."""

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_trpo_ext._checks import is_known
from sb3_trpo_ext._observations import parts_of
from sb3_trpo_ext.envs.envpool import EnvPoolVecEnv
from sb3_trpo_ext.envs.tensor import TensorVecEnv
from sb3_trpo_ext.envs.vector import VectorEnvAdapter

#: Steps over which the beginnings of episodes are spread: twice the most common time limit. What begins in the second thousand
#: falls between what began in the first.
SPREAD = 2000


class Stagger:
    """
    Lets environments begin their episodes at different times.

    Environments that are reset together stay in step as long as nothing but a time limit ends an episode. A rollout then shows
    one part of the episodes, and an update on it forgets what the policy knew about the others. So, after each of the first
    rollouts, some environments begin a new episode. No sample is lost: what the episode that is cut off was still worth is in
    the value after the last step of the rollout. (rsl_rl has an option for this, ``init_at_random_ep_len``.)

    Environments whose episodes have ended at different times, within the first rollout, are left alone.
    """

    def __init__(self) -> None:
        #: Environments that are to begin anew, a group after each rollout.
        self._groups: list[np.ndarray] = []
        self._is_first = False

    def before_rollout(self, model: Any) -> None:
        """
        Take note of a training that begins.

        :param model: before the rollout
        """
        self._is_first = bool(np.all(model._last_episode_starts))

    def after_rollout(self, model: Any, buffer: RolloutBuffer) -> None:
        """
        Let some environments begin a new episode.

        :param model: after the rollout, when nothing else will be computed from its last observations
        :param buffer: full
        """
        env = model.env
        if self._is_first:
            n_groups = min(env.num_envs, -(-SPREAD // model.n_steps))
            groups = np.array_split(np.arange(env.num_envs), n_groups)[:-1]
            # Where all episodes have just begun, a restart changes nothing
            is_mid_episode = not np.all(model._last_episode_starts)
            self._groups = groups if is_mid_episode and are_in_step(model, buffer) and can_restart(env) else []
        if not self._groups:
            return
        indices = self._groups.pop(0).tolist()
        observations = parts_of(model._last_obs)
        # Arrays of its own: those of the environment or of a callback must stay
        copies = {key: np.array(part) for key, part in observations.items()}
        for index, observation in zip(indices, restarted(env, indices), strict=True):
            for key, part in parts_of(observation).items():
                copies[key][index] = part
        model._last_obs = copies if isinstance(model._last_obs, dict) else copies[""]
        model._last_episode_starts = np.array(model._last_episode_starts)
        model._last_episode_starts[indices] = True
        model.reward_scale.start_episodes(indices)


def are_in_step(model: Any, buffer: RolloutBuffer) -> bool:
    """Whether in a rollout all environments began and ended their episodes in the same steps."""
    if not is_known(type(buffer)):
        return False
    starts: Any = buffer.episode_starts
    if starts.shape != buffer.rewards.shape:
        # Flattened by a callback
        return False
    ends = np.asarray(model._last_episode_starts)
    return bool((starts == starts[:, :1]).all() and (ends == ends[0]).all())


def can_restart(env: VecEnv) -> bool:
    """Whether single environments can be reset in the middle of an episode, with no wrapper that would not know of it."""
    if type(env) is EnvPoolVecEnv:
        return True
    if isinstance(env, (TensorVecEnv, VectorEnvAdapter)):
        return env.can_restart
    if type(env) not in (DummyVecEnv, SubprocVecEnv):
        return False
    monitored = np.flatnonzero(env.env_is_wrapped(Monitor)).tolist()
    return all(env.get_attr("allow_early_resets", monitored))


def restarted(env: Any, indices: list[int]) -> list[Any]:
    """
    Begin new episodes.

    :param env: for which :func:`can_restart` holds
    :param indices: of which environments
    :return: their first observations
    """
    if isinstance(env, (EnvPoolVecEnv, TensorVecEnv, VectorEnvAdapter)):
        return env.restart(indices)
    try:
        results = env.env_method("reset", indices=indices)
    except Exception as error:
        raise RuntimeError(
            f"The environments {indices} cannot be reset in the middle of an episode ({error}): pass `stagger_episodes=False`."
        ) from error
    env.reset_infos = list(env.reset_infos)
    for index, (_, info) in zip(indices, results, strict=True):
        env.reset_infos[index] = info
    return [observation for observation, _ in results]

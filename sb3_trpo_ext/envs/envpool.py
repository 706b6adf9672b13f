"""EnvPool, which steps many environments in C++ threads, as a ``VecEnv`` of Stable-Baselines3."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs, obs_space_info

from sb3_trpo_ext._checks import check_integer, check_seed, checked_actions
from sb3_trpo_ext.envs.envpool_tasks import checked_task, load_envpool, n_cores, single_precision, spaces_without_warnings

#: EnvPool counts seeds and steps in 32 bits.
MAX_INT32 = int(np.iinfo(np.int32).max)


class EnvPoolVecEnv(VecEnv):
    """
    Environments of EnvPool for any algorithm of Stable-Baselines3.

    It behaves as SB3's own VecEnvs do. An environment that is done is reset at once: the observation returned is the first
    one of the new episode, and ``info["terminal_observation"]`` is the last one of the old. (EnvPool itself would reset it in
    the next step, and ignore the action of that step.) ``info["TimeLimit.truncated"]`` tells a time limit from a true end, and
    ``info["episode"]`` holds return, length and time of the episode, as with ``Monitor`` and ``VecMonitor``.

    Observations and actions are float32 where EnvPool has float64, and so are their spaces. SB3 compares data types when a
    model is loaded together with an environment: wrap a Gymnasium environment in ``gymnasium.wrappers.DtypeObservation`` to
    go on training there with a model that was trained here.

    :param env_id: the task, such as ``"Humanoid-v5"``; ``envpool.list_all_envs()`` names them all
    :param n_envs: the number of environments
    :param seed: environment i is seeded with ``seed + i``; if None, with a number of NumPy's global generator
    :param num_threads: the number of threads that step the environments; if None, one per environment, but no more than there
        are cores for this process
    :param monitor_file: where to write every episode, as ``Monitor`` does, with ``.monitor.csv`` at its end; None for nowhere.
        ``VecMonitor`` can do that too, but then the environments for evaluation would have to be wrapped in it as well
    :param info_keywords: keys of ``info`` to add to ``info["episode"]`` and to that file
    :param override_existing: whether to overwrite that file, as ``Monitor`` does, or to append to it
    :param kwargs: options of the task, such as ``max_episode_steps`` or ``healthy_reward``
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: if there is no such task or option, or if a value is of no use
    """

    def __init__(
        self,
        env_id: str,
        n_envs: int = 1,
        seed: int | None = None,
        num_threads: int | None = None,
        monitor_file: str | None = None,
        info_keywords: tuple[str, ...] = (),
        override_existing: bool = True,
        **kwargs: Any,
    ) -> None:
        self._envpool = load_envpool()
        n_envs = check_integer("n_envs", n_envs, 1)
        num_threads = check_integer("num_threads", min(n_envs, n_cores()) if num_threads is None else num_threads, 1)
        seed = check_seed(seed)
        task = checked_task(self._envpool, env_id, kwargs)

        self._env_id = env_id
        self._options_of_task = {**kwargs, "num_envs": n_envs, "num_threads": num_threads}
        self.spec = copy.deepcopy(gym.registry.get(env_id)) or EnvSpec(env_id)
        # If an episode ends by itself in the very step of its time limit, EnvPool calls that truncated only, and an algorithm
        # would bootstrap from a state that has no future. Where Gymnasium keeps the time limit outside of the environment, the
        # task cannot depend on it: then we count the steps ourselves, and EnvPool reports all true ends
        self._keeps_time_limit = self.spec.max_episode_steps is not None
        if self._keeps_time_limit:
            self._options_of_task["max_episode_steps"] = MAX_INT32
        self.spec.max_episode_steps = self._max_episode_steps = int(task.config.max_episode_steps)
        self._pool: Any = None
        # From the call into EnvPool until its answer is dealt with. After a Ctrl-C in between there may be no answer
        # to wait for, and waiting would never end.
        self._is_busy = False

        self._returns = np.zeros(n_envs)
        self._lengths = np.zeros(n_envs, dtype=np.int64)
        self._start = time.time()
        self._info_keywords = tuple(info_keywords)
        self._results: ResultsWriter | None = None
        if monitor_file is not None:
            header: dict[str, float | str] = {"t_start": self._start, "env_id": env_id}
            self._results = ResultsWriter(monitor_file, header, self._info_keywords, override_existing)

        with spaces_without_warnings():
            super().__init__(n_envs, single_precision(task.observation_space), single_precision(task.action_space))
        self._dtypes = obs_space_info(self.observation_space)[2]
        self.seed(seed)

    # === What SB3 calls in training ===

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """
        Seed the environments, which takes effect at the next reset.

        EnvPool takes seeds only when it makes environments, so the next reset makes new ones.

        :param seed: environment i gets ``seed + i``; if None, a number of NumPy's global generator is taken
        :return: the seed of every environment
        """
        if seed is None:
            seed = int(np.random.randint(MAX_INT32 - self.num_envs))  # noqa: NPY002 as SB3, for `set_random_seed`
        # SB3's seeds go up to 2^32, EnvPool's up to 2^31
        return super().seed(int(seed) % (MAX_INT32 - self.num_envs))

    def set_options(self, options: list[dict] | dict | None = None) -> None:
        """Refuse options for the next reset, for EnvPool has none: raises a ``ValueError`` if there is one."""
        if options and (isinstance(options, dict) or any(options)):
            raise ValueError(f"`options`: EnvPool takes options when the environments are made, not at reset, got {options!r}")

    def reset(self) -> VecEnvObs:
        """Start a new episode in all environments; raises a ``RuntimeError`` if they have been closed."""
        if self._pool is None and self._seeds[0] is None:
            raise RuntimeError("the environments have been closed: make new ones")
        if self._is_busy:
            # The seed of the old environments would repeat the episodes that they have had
            self.seed(None)
        if self._seeds[0] is not None:
            # First end the threads of the old environments
            self._pool = None
            self._pool = self._envpool.make_gymnasium(self._env_id, seed=self._seeds[0], **self._options_of_task)
            self._reset_seeds()
        self._is_busy = True
        with spaces_without_warnings():
            observations, columns = self._pool.reset()
        self.reset_infos = rows(columns)
        self._returns[:] = 0
        self._lengths[:] = 0
        self._is_busy = False
        return dict_to_obs(self.observation_space, self._copies(observations))

    def step_async(self, actions: np.ndarray) -> None:
        """
        Start a step of all environments in EnvPool's threads.

        :param actions: of shape ``(n_envs, *action_space.shape)``
        :raises ValueError: if the actions are of another shape
        """
        if self._pool is None or self._is_busy:
            raise RuntimeError("call `reset` before the first step, and after a step that was interrupted")
        # EnvPool checks the first step only, and reads beyond the array after that
        actions = checked_actions(actions, (self.num_envs, *(self.action_space.shape or ())))
        self._is_busy = True
        self._pool.send(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for the step, and start a new episode in the environments that are done."""
        returned, rewards, terminated, truncated, columns = self._pool.recv()
        observations = self._copies(returned)
        self._returns += rewards
        self._lengths += 1
        if self._keeps_time_limit:
            truncated = self._lengths >= self._max_episode_steps
        dones = terminated | truncated

        infos = rows(columns)
        for info, is_cut_off in zip(infos, (truncated & ~terminated).tolist(), strict=True):
            info["TimeLimit.truncated"] = is_cut_off
        if dones.any():
            self._restart(np.flatnonzero(dones), observations, infos)
        self._is_busy = False
        return dict_to_obs(self.observation_space, observations), rewards.astype(np.float32), dones, infos

    def _copies(self, observations: Any) -> dict[Any, np.ndarray]:
        """Copy observations, in float32 where EnvPool has float64, by key; under the key None if there is only one."""
        parts = observations if isinstance(observations, dict) else {None: observations}
        return {key: parts[key].astype(dtype) for key, dtype in self._dtypes.items()}

    def _restart(self, done: np.ndarray, observations: dict[Any, np.ndarray], infos: list[dict[str, Any]]) -> None:
        """Report finished episodes, and reset their environments in one batch."""
        elapsed = round(time.time() - self._start, 6)
        for index in done.tolist():
            info = infos[index]
            episode = {"r": round(float(self._returns[index]), 6), "l": int(self._lengths[index]), "t": elapsed}
            episode.update((name, info[name]) for name in self._info_keywords)
            info["episode"] = episode
            terminal_observation = {key: part[index].copy() for key, part in observations.items()}
            info["terminal_observation"] = dict_to_obs(self.observation_space, terminal_observation)
            if self._results is not None:
                self._results.write_row(episode)
        for key, part in self._first_observations(done).items():
            observations[key][done] = part

    def _first_observations(self, indices: np.ndarray) -> dict[Any, np.ndarray]:
        """Begin a new episode in some environments, in one batch; returns the observations of these by key."""
        self._returns[indices] = 0
        self._lengths[indices] = 0
        observations, columns = self._pool.reset(indices.astype(np.int32))
        for index, info in zip(indices.tolist(), rows(columns), strict=True):
            self.reset_infos[index] = info
        return self._copies(observations)

    def restart(self, indices: list[int]) -> list[Any]:
        """
        Begin a new episode in some environments, between two steps.

        :param indices: which
        :return: the first observation of each
        """
        self._is_busy = True
        parts = self._first_observations(np.array(indices))
        self._is_busy = False
        return [
            dict_to_obs(self.observation_space, {key: part[row] for key, part in parts.items()}) for row in range(len(indices))
        ]

    def close(self) -> None:
        """End the threads; calling it twice does no harm."""
        self._pool = None
        if self._results is not None:
            self._results.close()

    # === What SB3 asks single environments for: there are none in Python ===

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Give the attributes that all environments have in common.

        :param attr_name: ``action_space``, ``metadata``, ``observation_space``, ``render_mode`` or ``spec``
        :param indices: of which environments, all of them if None
        :return: the same value for each
        :raises AttributeError: if it is another attribute
        """
        known = {"action_space": self.action_space, "observation_space": self.observation_space, "spec": self.spec}
        known |= {"metadata": {"render_modes": []}, "render_mode": None}
        if attr_name not in known:
            raise AttributeError(f"EnvPool's environments run in C++ and have no attribute {attr_name!r}, only {list(known)}")
        return [known[attr_name]] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refuse to set an attribute: EnvPool's environments have none that could be set."""
        raise AttributeError(f"`{attr_name}`: EnvPool's environments run in C++, pass options of the task to EnvPoolVecEnv")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refuse to call a method: EnvPool's environments have none in Python."""
        raise AttributeError(f"`{method_name}`: EnvPool's environments run in C++, use DummyVecEnv for a method in Python")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        Whether the environments are wrapped.

        There are no wrappers, but ``info["episode"]`` holds what ``Monitor`` would put there. SB3 asks for ``Monitor`` to know
        whether it may rely on that, as ``evaluate_policy`` does.

        :param wrapper_class: the wrapper
        :param indices: which environments, all of them if None
        :return: True for ``Monitor``, False for everything else
        """
        return [wrapper_class is Monitor] * len(list(self._get_indices(indices)))

    def render(self, mode: str | None = None) -> np.ndarray | None:
        """Refuse to render."""
        watch = f"gymnasium.make({self._env_id!r}, render_mode={mode or 'human'!r})"
        raise NotImplementedError(f"EnvPoolVecEnv does not render: watch the agent in {watch}, or with `sb3-trpo enjoy`")


def was_interrupted(env: VecEnv | None) -> bool:
    """Whether a step of an environment in EnvPool has not come to its end, after a Ctrl-C: only its ``reset`` helps."""
    return env is not None and isinstance(env.unwrapped, EnvPoolVecEnv) and env.unwrapped._is_busy


def rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn EnvPool's one dictionary of arrays into SB3's list of dictionaries."""
    names = [name for name, column in columns.items() if isinstance(column, np.ndarray) and name != "env_id"]
    values = [columns[name].tolist() if columns[name].ndim == 1 else list(columns[name]) for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]

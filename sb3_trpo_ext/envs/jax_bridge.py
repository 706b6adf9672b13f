"""Environments that JAX steps, as environments of tensors."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch.utils.dlpack import from_dlpack

from sb3_trpo_ext._checks import ArgumentError, check_integer
from sb3_trpo_ext._observations import mapped
from sb3_trpo_ext.envs.tensor import TensorObs, TensorStep, TensorVecEnv

#: What JAX calls the kinds of devices of PyTorch.
PLATFORMS = {"cpu": "cpu", "cuda": "gpu"}


class JaxVecEnv(TensorVecEnv):
    """
    Many environments of one task that is written in JAX.

    Physics, time limit and resets are one compiled function. Tensors and JAX's arrays share their memory: nothing is copied.
    JAX writes the results of a step into new memory, so the tensors of an earlier step stay as they are. Do not write into
    them: JAX relies on its arrays being constant.

    The state of the task is a pytree with the fields ``obs``, ``reward`` and ``done``.

    :param make_task: makes the task of one environment, with ``reset(key)``, ``step(state, action)`` and ``action_size``
    :param n_envs: the number of environments
    :param max_episode_steps: the time limit, in steps
    :param action_repeat: how many steps of the task are one step of the environment
    :param device: where the tensors are
    """

    def __init__(
        self,
        make_task: Callable[[], Any],
        n_envs: int,
        max_episode_steps: int,
        action_repeat: int,
        device: th.device | str,
    ):
        # Compiling takes a minute: first what can be wrong
        check_integer("n_envs", n_envs, 1)
        self.max_episode_steps = max_episode_steps
        self._action_repeat = action_repeat
        self._jax = jax = importlib.import_module("jax")
        self._device_of_jax = device_of_jax(device)
        # Models become arrays here already
        with jax.default_device(self._device_of_jax):
            #: The task of one environment, as its library made it.
            self.task = make_task()
            first = jax.eval_shape(self.task.reset, jax.random.PRNGKey(0))
        actions = spaces.Box(-1.0, 1.0, (self.task.action_size,))
        super().__init__(n_envs, space_of(first.obs), actions, device)
        #: States of all environments, the steps since they began, and the key of the random numbers to come.
        self._carry: Any = None
        # Compiled by the first calls
        self._reset_all, self._step_all = jax.jit(self._started), jax.jit(self._stepped)
        self._restart_some = jax.jit(self._started_again)

    # === With tensors ===

    def reset_tensors(self, seed: int | None = None) -> TensorObs:
        """Start a new episode in all environments."""
        if seed is None and self._carry is None:
            seed = int(np.random.randint(2**31))  # noqa: NPY002 as SB3, for `set_random_seed`
        key = self._carry[-1] if seed is None else self._jax.random.PRNGKey(seed)
        # All that is computed from the key is computed where the key is
        self._carry, observations = self._reset_all(self._jax.device_put(key, self._device_of_jax))
        return mapped(from_dlpack, observations)

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """Make a step in all environments."""
        # JAX takes no tensor that requires gradients, and compiles anew for other types and orders of memory
        actions = actions.detach().to(th.float32).contiguous()
        self._carry, results = self._step_all(self._carry, self._jax.dlpack.from_dlpack(actions))
        # On a GPU, PyTorch's stream now waits for JAX's, so that the actions are free only when JAX has read them
        return TensorStep(*(mapped(from_dlpack, result) for result in results))

    def restart_tensors(self, where: th.Tensor) -> TensorObs:
        """Start a new episode in some environments."""
        self._carry, observations = self._restart_some(self._carry, self._jax.dlpack.from_dlpack(where.contiguous()))
        return mapped(from_dlpack, observations)

    @property
    def dt(self) -> float:
        """Seconds of simulated time in one step; 1/30 per repetition for a task without ``dt``."""
        return float(getattr(self.task, "dt", 1 / 30)) * self._action_repeat

    def picture(self) -> np.ndarray:
        """
        Draw the first environment with MuJoCo.

        :return: shape ``(height, width, 3)``
        """
        state = self._jax.tree.map(lambda leaf: leaf[0], self._carry[0])
        return np.asarray(self.task.render([self._drawn(state)])[0])

    def _drawn(self, state: Any) -> Any:
        """What the ``render`` of the task takes of a state."""
        return state

    # === What is compiled ===

    def _started(self, key: Any) -> tuple[Any, Any]:
        """First states, and the observations of them."""
        jax = self._jax
        key, used_key = jax.random.split(key)
        states = jax.vmap(self.task.reset)(jax.random.split(used_key, self.num_envs))
        # Weak types would be strong ones after a step, and the second step be compiled again
        states = retyped(jax, states, states)
        return (states, jax.numpy.zeros(self.num_envs, int), key), self._observed(states)

    def _started_again(self, carry: Any, where: Any) -> tuple[Any, Any]:
        """What to carry on when some environments begin a new episode, and the observations of all."""
        states, ages, key = carry
        key, used_key = self._jax.random.split(key)
        states = self._restarted(states, where, used_key)
        return (states, self._jax.numpy.where(where, 0, ages), key), self._observed(states)

    def _stepped(self, carry: Any, actions: Any) -> tuple[Any, tuple[Any, ...]]:
        """What to carry on, and the parts of a :class:`TensorStep`."""
        jax = self._jax
        states, ages, key = carry
        states, rewards, terminated = jax.vmap(self._repeated)(states, actions)
        final_observations = self._observed(states)
        ages = ages + 1
        truncated = (ages >= self.max_episode_steps) & ~terminated
        dones = terminated | truncated
        key, used_key = jax.random.split(key)
        states = self._restarted(states, dones, used_key)
        carry = states, jax.numpy.where(dones, 0, ages), key
        return carry, (self._observed(states), rewards, terminated, truncated, final_observations)

    def _repeated(self, state: Any, action: Any) -> tuple[Any, Any, Any]:
        """The next state of one environment, its reward and whether the episode terminates."""
        jax = self._jax

        def once(before: Any, _: None) -> Any:
            # Tasks write into the dicts of the state that they get
            after = self.task.step(jax.tree.map(lambda leaf: leaf, before), action)
            # Some return a number of Python as the reward
            after = retyped(jax, after, before)
            return after, (after.reward.astype("float32"), after.done.astype(bool))

        state, (rewards, terminated) = jax.lax.scan(once, state, length=self._action_repeat)
        return state, rewards.sum(0), terminated.any(0)

    def _restarted(self, states: Any, dones: Any, key: Any) -> Any:
        """
        Start a new episode, from a new random state, where one has ended.

        All environments are reset, and what is not needed is dropped. On a CPU, that takes 3% of the time of Brax's ant, and
        a quarter of that of its inverted pendulum. To reset only those that are done, a few at a time, would save half of that
        for the pendulum and nothing elsewhere, and take longer to compile.

        :param states: of all environments
        :param dones: whether an episode has ended, shape ``(n_envs,)``
        :param key: of random numbers
        :return: the states
        """
        jax, n_envs = self._jax, self.num_envs
        fresh = jax.vmap(self.task.reset)(jax.random.split(key, n_envs))

        def chosen(old: Any, new: Any) -> Any:
            # With MuJoCo Warp, some memory belongs to no environment
            if old.shape[:1] != (n_envs,):
                return old
            return jax.numpy.where(dones.reshape(n_envs, *[1] * (old.ndim - 1)), new.astype(old.dtype), old)

        return jax.tree.map(chosen, states, fresh)

    def _observed(self, states: Any) -> Any:
        """Observations in single precision, whatever JAX computes in."""
        observations = dict(states.obs) if isinstance(states.obs, Mapping) else states.obs
        return mapped(lambda part: part.astype("float32"), observations)


def device_of_jax(device: th.device | str) -> Any:
    """
    Find the device that PyTorch and JAX are to share.

    :param device: as PyTorch calls it
    :return: JAX's object for it
    :raises ValueError: if JAX does not know it
    """
    jax = importlib.import_module("jax")
    device = th.device(device)
    try:
        return jax.local_devices(backend=PLATFORMS[device.type])[device.index or 0]
    except (KeyError, RuntimeError, IndexError) as error:
        raise ArgumentError(
            f"`device`: JAX has no device {str(device)!r} here, only {jax.local_devices()}. Pass one that it has, "
            "or install JAX for it, such as `jax[cuda12]`, and see that JAX_PLATFORMS does not exclude it."
        ) from error


def space_of(observations: Any) -> spaces.Space[Any]:
    """
    Make the space of observations without known bounds.

    :param observations: an array of JAX or its shape, or a dict of those
    :return: the space
    """
    if isinstance(observations, Mapping):
        return spaces.Dict({key: space_of(part) for key, part in observations.items()})
    return spaces.Box(-np.inf, np.inf, observations.shape)


def retyped(jax: Any, tree: Any, like: Any) -> Any:
    """
    Give each leaf of a pytree the type of the leaf in another one, and no weak type.

    :param jax: the package
    :param tree: of arrays and of numbers of Python
    :param like: of arrays
    :return: a tree of arrays
    """
    return jax.tree.map(lambda leaf, other: jax.lax.convert_element_type(leaf, other.dtype), tree, like)

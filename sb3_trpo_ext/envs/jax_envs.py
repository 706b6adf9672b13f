"""Environments of Brax and of MuJoCo Playground, which JAX steps."""

import importlib
from typing import Any

import torch as th

from sb3_trpo_ext._checks import ArgumentError, check_integer, closest
from sb3_trpo_ext.envs.jax_bridge import JaxVecEnv


class BraxVecEnv(JaxVecEnv):
    """
    Environments of Brax, with which :class:`~sb3_trpo_ext.TRPO` trains without leaving the device.

    Each episode begins with a new random state. (Brax's own ``AutoResetWrapper`` returns each environment to its first state,
    to save resets. They cost little: 57 ms instead of 55 ms for a step of 256 ants on one core.)

    The first reset and the first step take long: JAX compiles them. On a GPU, JAX takes most of the memory unless the
    variable ``XLA_PYTHON_CLIENT_PREALLOCATE`` is ``false``.

    :param env_name: such as ``"ant"`` or ``"inverted_pendulum"``
    :param n_envs: the number of environments
    :param episode_length: the time limit, in steps
    :param backend: ``"generalized"``, ``"positional"``, ``"spring"`` or ``"mjx"``: which physics; ``None`` for the default
        of the environment, which is ``"generalized"`` for all that are part of Brax
    :param device: where the tensors are, and where JAX computes
    :param kwargs: arguments of the environment, such as ``terminate_when_unhealthy``
    :raises ImportError: if Brax is not installed
    :raises ValueError: if there is no such environment, or if JAX does not know the device
    """

    def __init__(
        self,
        env_name: str,
        n_envs: int,
        *,
        episode_length: int = 1000,
        backend: str | None = None,
        device: th.device | str = "cpu",
        **kwargs: Any,
    ):
        envs = load_library("brax.envs", "brax", "BraxVecEnv")
        # Brax has no public list of them
        known = envs._envs
        if env_name not in known:
            raise ArgumentError(f"`env_name`: Brax has no environment {env_name!r}; {closest(str(env_name), known)}")
        check_integer("episode_length", episode_length, 1)
        options = kwargs if backend is None else {"backend": backend, **kwargs}
        super().__init__(lambda: envs.get_environment(env_name, **options), n_envs, episode_length, 1, device)

    def _drawn(self, state: Any) -> Any:
        """The state of the physics."""
        return state.pipeline_state


class PlaygroundVecEnv(JaxVecEnv):
    """
    Environments of MuJoCo Playground, with which :class:`~sb3_trpo_ext.TRPO` trains without leaving the device.

    Each episode begins with a new random state. The first reset and the first step take long: JAX compiles them. On a GPU,
    JAX takes most of the memory unless the variable ``XLA_PYTHON_CLIENT_PREALLOCATE`` is ``false``.

    Tasks of locomotion and manipulation download models of robots when they are made for the first time; those of DeepMind's
    Control Suite, such as ``"CartpoleBalance"``, do not. Observations are a dict, and the space is a ``Dict``, where a task
    tells the critic more than the policy; SB3's ``MultiInputPolicy`` shows all of it to both.

    :param env_name: such as ``"WalkerWalk"``; ``mujoco_playground.registry.ALL_ENVS`` names them all
    :param n_envs: the number of environments
    :param episode_length: the time limit, in steps of the task; ``None`` for that of its configuration
    :param config_overrides: what to change in the configuration of the task. On a CPU, ``{"impl": "jax"}`` is the default:
        the other one, MuJoCo Warp, is made for GPUs
    :param device: where the tensors are, and where JAX computes
    :raises ImportError: if MuJoCo Playground is not installed
    :raises ValueError: if there is no such environment, or if JAX does not know the device
    """

    def __init__(
        self,
        env_name: str,
        n_envs: int,
        *,
        episode_length: int | None = None,
        config_overrides: dict[str, Any] | None = None,
        device: th.device | str = "cpu",
    ):
        registry = load_library("mujoco_playground", "playground", "PlaygroundVecEnv").registry
        try:
            config = registry.get_default_config(env_name)
        except ValueError as error:
            hint = closest(str(env_name), registry.ALL_ENVS)
            raise ArgumentError(f"`env_name`: MuJoCo Playground has no environment {env_name!r}; {hint}") from error
        overrides = dict(config_overrides or {})
        if "impl" in config and th.device(device).type == "cpu":
            overrides.setdefault("impl", "jax")
        config.update_from_flattened_dict(overrides)
        length = check_integer("episode_length", config.episode_length if episode_length is None else episode_length, 1)
        action_repeat = check_integer("action_repeat", config.get("action_repeat", 1), 1)
        super().__init__(
            lambda: registry.load(env_name, config=config), n_envs, -(-length // action_repeat), action_repeat, device
        )


#: The class for the environments of each library.
LIBRARIES: dict[str, Any] = {"brax": BraxVecEnv, "playground": PlaygroundVecEnv}


# === Before there are environments ===


def load_library(module: str, extra: str, name: str) -> Any:
    """
    Import a library that an extra installs.

    :param module: what to import
    :param extra: which installs it
    :param name: of the class that needs it
    :return: the module
    :raises ImportError: that says how to install it
    """
    try:
        # Not loaded by the import of JAX alone
        importlib.import_module("jax.dlpack")
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{name} needs Python >= 3.11: pip install sb3-trpo-ext[{extra}] ({error})") from error

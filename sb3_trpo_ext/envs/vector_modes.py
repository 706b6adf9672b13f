"""Which of Gymnasium's vector environments can begin a new episode in the step that ends one."""

from typing import Any

import gymnasium as gym
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv, VectorWrapper

from sb3_trpo_ext._checks import ArgumentError
from sb3_trpo_ext._observations import parts_of

#: Values of ``gymnasium.vector.AutoresetMode``, which Gymnasium 1.0 does not have.
NEXT_STEP, SAME_STEP, DISABLED = "NextStep", "SameStep", "Disabled"
#: Wrappers in which ``reset`` with a ``reset_mask`` fails, or silently leads to wrong numbers.
STATEFUL_WRAPPERS = (gym.wrappers.vector.NormalizeObservation, gym.wrappers.vector.NormalizeReward)


def check_vector_env(env: Any) -> str:
    """
    Check that :class:`VectorEnvAdapter` can adapt a vector environment.

    :param env: what the user gave
    :return: the value of its autoreset mode
    :raises ValueError: if it cannot, with what to do
    """
    if not isinstance(env, VectorEnv):
        raise ArgumentError(f"`env` must be a gymnasium.vector.VectorEnv, got {env!r}.")
    if getattr(env, "device", None) is not None:
        raise ArgumentError(
            f"`env` has tensors on {env.device}: use sb3_trpo_ext.envs.GymnasiumTensorVecEnv(env)."  # type: ignore[attr-defined]
        )
    for part in parts_of(env.single_observation_space).values():
        if isinstance(part, (spaces.Dict, spaces.Tuple)):
            raise ArgumentError(
                f"`env` has the observation space {env.single_observation_space}, which SB3 does not support: "
                "use gymnasium.wrappers.FlattenObservation."
            )
    mode = env.metadata.get("autoreset_mode")
    mode = getattr(mode, "value", mode)
    if mode == SAME_STEP:
        return mode
    base = env.unwrapped
    # Without shared memory an `AsyncVectorEnv` would reset again in the next step, and ignore its action
    can_reset_now = isinstance(base, SyncVectorEnv) or (isinstance(base, AsyncVectorEnv) and base.shared_memory)
    if mode != DISABLED and not (mode == NEXT_STEP and can_reset_now):
        given = "does not tell its autoreset mode, which Gymnasium takes for" if mode is None else "has the autoreset mode"
        raise ArgumentError(
            f"`env` {given} {mode or NEXT_STEP}, and cannot begin a new episode in the same step, as SB3 needs it, got {env}: "
            'use gymnasium.make_vec(id, num_envs, vectorization_mode="sync"), or pass '
            "autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP to an environment that has this option."
        )
    layer = env
    while isinstance(layer, VectorWrapper):
        if isinstance(layer, STATEFUL_WRAPPERS):
            raise ArgumentError(
                f"`env` is wrapped in {type(layer).__name__}, which cannot reset single environments: use SB3's VecNormalize, "
                "or leave it to TRPO's norm_obs and norm_reward."
            )
        layer = layer.env
    return mode

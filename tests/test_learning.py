"""That it learns: tasks whose best return is known, with thresholds that leave room for bad luck."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext import TRPO


def identity_env(make_env: Callable[[], gym.Env[Any, Any]], seed: int) -> VecEnv:
    """Five environments of 100 steps that pay 1 for repeating the observation, 100 per episode."""
    env = make_vec_env(make_env, n_envs=5, seed=seed)
    # What they sample their states from is not seeded by SB3
    for index, space in enumerate(env.get_attr("action_space")):
        space.seed(seed + index)
    return env


#: Environment, steps, and arguments of each identity task, with the mean returns of seeds 0 to 4 (100 is the most there is).
IDENTITIES: dict[str, tuple[Callable[[], gym.Env[Any, Any]], int, dict[str, Any]]] = {
    # 100, 100, 100, 100, 100
    "discrete": (lambda: IdentityEnv(10), 4000, {}),
    # 100, 100, 100, 100, 100
    "box": (lambda: IdentityEnvBox(eps=0.5), 4000, {}),
    # 100, 100, 97, 100, 100
    "multi-discrete": (lambda: IdentityEnvMultiDiscrete(6), 6000, {}),
    # 100, 100, 100, 100, 100
    "multi-binary": (lambda: IdentityEnvMultiBinary(3), 4000, {}),
    # 100, 100, 100, 90, 100
    "penalty-discrete": (lambda: IdentityEnv(10), 7000, {"trust_region": "penalty"}),
    # 100, 100, 100, 100, 100
    "squashed": (lambda: IdentityEnvBox(eps=0.5), 5000, {"policy": "SquashedMlpPolicy"}),
    # 100, 100, 100, 100, 93
    "gSDE": (lambda: IdentityEnvBox(eps=0.5), 5000, {"use_sde": True}),
}


def learn_identity(make_env: Callable[[], gym.Env[Any, Any]], n_timesteps: int, kwargs: dict[str, Any], seed: int) -> float:
    """Mean return of 20 episodes after training."""
    settings: dict[str, Any] = {"policy": "MlpPolicy", "n_steps": 100, "batch_size": 125, "gamma": 0.0, **kwargs}
    if kwargs.get("trust_region") == "penalty":
        settings["trust_region_kwargs"] = {"learning_rate": 3e-3}
    model = TRPO(**settings, env=identity_env(make_env, seed), target_kl=0.1, cg_damping=0.01, seed=seed, device="cpu")
    model.learn(n_timesteps)
    mean_return, _ = evaluate_policy(model, identity_env(make_env, seed + 100), n_eval_episodes=20)
    assert isinstance(mean_return, float)
    return mean_return


@pytest.mark.parametrize(("make_env", "n_timesteps", "kwargs"), IDENTITIES.values(), ids=list(IDENTITIES))
def test_identity(make_env: Callable[[], gym.Env[Any, Any]], n_timesteps: int, kwargs: dict[str, Any]) -> None:
    # Guessing gets 10 of 100 (discrete), 44 (box), 3 (multi-discrete) or 12 (multi-binary)
    assert learn_identity(make_env, n_timesteps, kwargs, seed=0) > 85


def decaying(start: float) -> Callable[[float], float]:
    """A trust region that shrinks to nothing, so that a policy which has learned the task is not moved on by noise."""
    return lambda progress_remaining: start * progress_remaining


CART_POLE: dict[str, Any] = {"n_steps": 256, "batch_size": 256, "target_kl": decaying(0.03), "learning_rate": 3e-3}
PENALTY: dict[str, Any] = {"trust_region": "penalty", "trust_region_kwargs": {"learning_rate": 1e-3, "batch_size": 256}}
PENDULUM: dict[str, Any] = {"n_steps": 256, "gamma": 0.9, "cg_damping": 0.05, "n_critic_updates": 15}
#: Environment, steps, arguments and threshold of each control task, with the mean returns of seeds 0 to 4.
CONTROL: dict[str, tuple[str, int, dict[str, Any], float]] = {
    # 500 is the most there is. Seeds 0 to 4: 500, 500, 500, 500, 500; for both forms
    "cart-pole": ("CartPole-v1", 30_000, {**CART_POLE, "cg_damping": 0.01}, 475),
    "cart-pole-penalty": ("CartPole-v1", 60_000, {**CART_POLE, **PENALTY}, 475),
    # Good agents get about -150, idle ones -1200. Seeds 0 to 4: -219, -219, -189, -186, -183
    "pendulum": ("Pendulum-v1", 100_000, {**PENDULUM, "target_kl": decaying(0.1)}, -300),
    # Seeds 0 to 4: -170, -161, -161, -173, -190
    "pendulum-gSDE": (
        "Pendulum-v1",
        100_000,
        {**PENDULUM, "target_kl": decaying(0.06), "use_sde": True, "sde_sample_freq": 4},
        -300,
    ),
}


def learn_control(env_id: str, n_timesteps: int, kwargs: dict[str, Any], seed: int) -> float:
    """Mean return after training in eight environments."""
    model = TRPO("MlpPolicy", make_vec_env(env_id, n_envs=8, seed=seed), seed=seed, device="cpu", **kwargs)
    model.learn(n_timesteps)
    # Those of CartPole are long when they are good, and hardly differ
    n_episodes = 24 if env_id == "CartPole-v1" else 100
    mean_return, _ = evaluate_policy(model, make_vec_env(env_id, n_envs=8, seed=seed + 1000), n_eval_episodes=n_episodes)
    assert isinstance(mean_return, float)
    return mean_return


@pytest.mark.parametrize(
    ("env_id", "n_timesteps", "kwargs", "threshold"),
    # The first takes a few seconds, the others much longer
    [pytest.param(*task, id=name, marks=[] if name == "cart-pole" else pytest.mark.slow) for name, task in CONTROL.items()],
)
def test_control(env_id: str, n_timesteps: int, kwargs: dict[str, Any], threshold: float) -> None:
    assert learn_control(env_id, n_timesteps, kwargs, seed=0) > threshold

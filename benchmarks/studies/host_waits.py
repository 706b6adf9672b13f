"""How often the host waits for an accelerator, and sends it something, beside sb3-contrib's TRPO and SB3's PPO.

    python -m benchmarks.studies.host_waits --output benchmarks/results/host_waits.json

On a GPU each of these waits ends only when all that has been asked of it so far is done. Counted, not timed, and not on a GPU:
the accelerator of ``tests/accelerator.py`` is none, but as strict as one. "ours_tensors" trains in an environment of tensors
that is there too; what that environment itself sends is left out. All have the same networks, rollouts of one size, 10 epochs
over them with minibatches of 128, up to 15 steps of conjugate gradient, and otherwise their defaults.
"""

import argparse
import json
import pathlib
import sys
import warnings
from typing import Any

import numpy as np
import sb3_contrib
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo_ext import TRPO

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests"))
import accelerator
from agents import random_vec_env
from tensor_envs import RandomTensorEnv

N_ENVS, N_STEPS = 8, 128
ALGORITHMS: dict[str, tuple[type[OnPolicyAlgorithm], dict[str, Any]]] = {
    "ours": (TRPO, {"n_critic_updates": 10, "cg_max_steps": 15}),
    "sb3_contrib": (sb3_contrib.TRPO, {"n_critic_updates": 10, "cg_max_steps": 15}),
    "ppo": (PPO, {"n_epochs": 10}),
    "ours_tensors": (TRPO, {"n_critic_updates": 10, "cg_max_steps": 15}),
}
#: Policy, and spaces of observations and actions.
CASES: dict[str, tuple[str, spaces.Space, spaces.Space]] = {
    "MLP, 17 continuous actions": ("MlpPolicy", spaces.Box(-1.0, 1.0, (348,)), spaces.Box(-1.0, 1.0, (17,))),
    "MLP, one of 2 actions": ("MlpPolicy", spaces.Box(-1.0, 1.0, (4,)), spaces.Discrete(2)),
    "NatureCNN, one of 6 actions": ("CnnPolicy", spaces.Box(0, 255, (1, 36, 36), np.uint8), spaces.Discrete(6)),
}


def count(algorithm: str, case: str) -> dict[str, float]:
    """
    Count in the second rollout and its update, when all that is made once has been made.

    :param algorithm: which
    :param case: which networks
    :return: waits and transfers, for one step of all environments and for one update
    """
    policy, observation_space, action_space = CASES[case]
    make, kwargs = ALGORITHMS[algorithm]
    env: VecEnv
    if algorithm == "ours_tensors":
        env = RandomTensorEnv(observation_space, action_space, N_ENVS, accelerator.NAME)
    else:
        env = random_vec_env(N_ENVS, observation_space, action_space)
    model = make(policy, env, n_steps=N_STEPS, batch_size=128, device=accelerator.NAME, seed=0, **kwargs)
    model.learn(N_ENVS * N_STEPS)
    _, callback = model._setup_learn(N_ENVS * N_STEPS, reset_num_timesteps=False)
    with accelerator.counted() as rollout:
        model.collect_rollouts(env, callback, model.rollout_buffer, N_STEPS)
    with accelerator.counted() as update:
        model.train()
    return {
        "waits_per_step": round(sum(rollout.values()) / N_STEPS, 2),
        "transfers_per_step": round(sum(n for name, n in rollout.sent.items() if name != "tensor.advance") / N_STEPS, 2),
        "waits_per_update": sum(update.values()),
        "transfers_per_update": sum(update.sent.values()),
    }


def main() -> None:
    """Count and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "You are trying to run")
    result = {case: {algorithm: count(algorithm, case) for algorithm in ALGORITHMS} for case in CASES}
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

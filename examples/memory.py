"""Memory: CartPole that shows positions and no velocities (`pip install "sb3-trpo-ext[contrib]"`)."""

import argparse

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import TransformObservation
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import RecurrentTRPO


def make_env() -> gym.Env:
    env = gym.make("CartPole-v1")
    space = gym.spaces.Box(-np.inf, np.inf, (2,))
    return TransformObservation(env, lambda observation: observation[[0, 2]], space)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    env = make_vec_env(make_env, n_envs=16, seed=args.seed)
    model = RecurrentTRPO("MlpLstmPolicy", env, policy_kwargs={"lstm_hidden_size": 64}, seed=args.seed, verbose=1)
    model.learn(args.steps)

    # Acting: `predict` takes and returns the states of the LSTM, and is told where an episode begins
    test_env = make_vec_env(make_env, n_envs=1, seed=args.seed + 1000)
    observations, states, starts = test_env.reset(), None, np.ones(1, dtype=bool)
    for _ in range(10):
        actions, states = model.predict(observations, state=states, episode_start=starts, deterministic=True)
        observations, _, starts, _ = test_env.step(actions)

    # SB3's `evaluate_policy` does that
    mean, std = evaluate_policy(model, test_env, n_eval_episodes=20)
    print(f"mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()

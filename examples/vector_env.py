"""Eight pendulums in a vector environment of Gymnasium."""

import argparse

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs import VectorEnvAdapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # A process for each, with "async", is for environments that take longer
    env = gym.make_vec("Pendulum-v1", 8, vectorization_mode="sync")
    model = TRPO("MlpPolicy", env, seed=args.seed, verbose=1)
    model.learn(args.steps)
    env.close()

    mean, std = evaluate_policy(model, VectorEnvAdapter(gym.make_vec("Pendulum-v1", 4)), n_eval_episodes=20)
    print(f"mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()

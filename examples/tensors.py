"""A pole balanced in 64 environments that PyTorch steps together: on a GPU if there is one."""

import argparse

import torch as th
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO
from sb3_trpo_ext.envs import TensorCartPole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = "cuda" if th.cuda.is_available() else "cpu"
    model = TRPO("MlpPolicy", TensorCartPole(64, device), seed=args.seed, verbose=1)
    model.learn(args.steps)

    # For everything but training it is an ordinary VecEnv
    mean, std = evaluate_policy(model, TensorCartPole(16, device), n_eval_episodes=32)
    print(f"mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()

"""A tanh-squashed Gaussian: every action is within its bounds, without clipping."""

import argparse

import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    env = make_vec_env("Pendulum-v1", n_envs=8, seed=args.seed)
    model = TRPO("SquashedMlpPolicy", env, gamma=0.9, seed=args.seed, verbose=1)
    model.learn(args.steps)

    actions, _ = model.predict(np.stack([env.observation_space.sample() for _ in range(1000)]))
    print(f"1000 sampled actions lie between {actions.min():.3f} and {actions.max():.3f}; the bounds are -2 and 2")
    mean, std = evaluate_policy(model, make_vec_env("Pendulum-v1", seed=args.seed + 1000), n_eval_episodes=10)
    print(f"mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()

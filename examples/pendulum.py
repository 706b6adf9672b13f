"""Pendulum: a continuous action with state-dependent exploration (gSDE)."""

import argparse

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo_ext import TRPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = TRPO(
        "MlpPolicy",
        make_vec_env("Pendulum-v1", n_envs=8, seed=args.seed),
        gamma=0.9,
        use_sde=True,
        sde_sample_freq=4,
        seed=args.seed,
        verbose=1,
    )
    model.learn(args.steps)

    # Good agents get about -150, idle ones -1200
    mean, std = evaluate_policy(model, make_vec_env("Pendulum-v1", seed=args.seed + 1000), n_eval_episodes=10)
    print(f"mean return: {mean:.1f} +- {std:.1f}")


if __name__ == "__main__":
    main()
